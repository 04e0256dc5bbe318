"""torch.compile: whether it works and pays here, which regions it compiles, and CUDA graphs."""

import contextlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from engine.devices import cuda_capability
from engine.errors import SettingsError

# where nothing was measured yet: the share of a step's time saved, and the seconds to compile; of
# 6- and 12-layer models on a CPU and a GPU, and of a small model's CUDA graphs
CPU_EXPECTED, GPU_EXPECTED, GRAPHS_EXPECTED = (0.15, 30.0), (0.3, 60.0), (0.5, 60.0)
# parameters; with fewer, a GPU waits for the host's kernel launches, which CUDA graphs avoid
SMALL_MODEL = 30_000_000


def what_prevents_compiling(device: torch.device) -> str | None:
    """Why torch.compile can't work on this device, or None."""
    if device.type == "mps":
        return "it is not dependable on Apple's GPUs"
    if device.type != "cpu":
        if (cuda_capability(device) or (7, 0)) < (7, 0):
            return "Triton does not serve GPUs this old (compute capability below 7.0)"
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if sys.platform == "win32":
        return None if shutil.which("cl") else "there is no C++ compiler (cl) here"
    if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        return "there is no C++ compiler (g++) here"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's header files are not installed (python3-dev)"
    return None


def expected_savings(model: nn.Module, device: torch.device) -> tuple[float, float]:
    """The share of a step's time that compiling usually saves, and the seconds that it takes."""
    if device.type == "cpu":
        return CPU_EXPECTED
    return GRAPHS_EXPECTED if device.type == "cuda" and _is_small(model) else GPU_EXPECTED


def compile_model(
    model: nn.Module, device: torch.device, *, micro_batches: int, is_alone: bool = True
) -> None:
    """Compile the model's training steps; torch does so when the first one runs.

    On a CPU each block is its own region, and all share the compiled code. On a GPU `hidden` is
    one region; with several ranks each block is, so that its all-reduce overlaps computation.
    """
    if device.type == "cpu" or not is_alone:
        for block in model.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        return
    # the CUDA graphs of several micro-batches overwrite each other's gradients (pytorch#169545)
    has_graphs = device.type == "cuda" and _is_small(model) and micro_batches == 1
    mode = "reduce-overhead" if has_graphs else "default"
    model.hidden = torch.compile(model.hidden, dynamic=False, mode=mode)


def _is_small(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) < SMALL_MODEL


def compile_decoding(model: nn.Module, device: torch.device) -> None:
    """Compile the decoding step. Raises SettingsError where that can't work or does not pay."""
    prevented = what_prevents_compiling(device)
    if device.type != "cuda" or prevented:
        why = prevented or f"on {device.type} a step is as fast as its weights are read"
        raise SettingsError(f"generation can't be compiled: {why}.\nLeave compiling out.")
    model.decode = torch.compile(model.decode, dynamic=False)


def is_compiled(model: nn.Module) -> bool:
    """Whether compile_model() has compiled a model."""
    blocks = getattr(model, "blocks", ())
    return "hidden" in model.__dict__ or any("forward" in block.__dict__ for block in blocks)


def undo_compiling(model: nn.Module) -> None:
    """Run the model uncompiled again."""
    model.__dict__.pop("hidden", None)
    for block in model.blocks:
        block.__dict__.pop("forward", None)


def compile_again(model: nn.Module, device: torch.device, *, micro_batches: int) -> None:
    """Recompile a compiled model in the same regions, for steps of micro_batches micro-batches."""
    is_one_region = "hidden" in model.__dict__
    undo_compiling(model)
    compile_model(model, device, micro_batches=micro_batches, is_alone=is_one_region)


class RecordedStep:
    """A function of CUDA tensors as a CUDA graph, recorded once and replayed.

    Shapes and the addresses of other tensors must not change. A call overwrites the last result.
    """

    def __init__(self, step: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
        self._inputs = inputs
        device = inputs[0].device
        with torch.cuda.device(device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(3):  # warm-up: libraries choose kernels, torch.compile compiles
                    step(*inputs)
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # a loader's thread that pins memory would break the capture in any other mode
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._output = step(*inputs)

    def __call__(self, *values: torch.Tensor) -> torch.Tensor:
        """The function's result for these values."""
        for static, value in zip(self._inputs, values, strict=True):
            if static is not value:
                static.copy_(value)
        self._graph.replay()
        return self._output


def not_compiled() -> contextlib.AbstractContextManager:
    """A context that runs compiled models eagerly: each new shape would be compiled again."""
    # importing torch._dynamo takes a second; where it is not imported, nothing is compiled
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
