"""Whether the model's blocks are compiled, and what to do where that fails.

torch.compile turns the small operations between the products into a few kernels. It takes from
seconds to minutes at the start, so it must be repaid by the steps that follow.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from engine.devices import cuda_capability
from engine.errors import SettingsError

# what was seen of 6- and 12-layer models: the share of a step's time that is saved, and the wait
CPU_SAVES, CPU_SECONDS = 0.15, 30.0
GPU_SAVES, GPU_SECONDS = 0.3, 60.0
# smaller models than this leave a GPU waiting for the host, which replayed graphs avoid
SMALL_MODEL = 30_000_000


def what_prevents_compiling(device: torch.device) -> str | None:
    """Why torch.compile can't work on this machine, or None."""
    if device.type == "mps":
        return "it is not dependable on Apple's GPUs"
    if device.type != "cpu":
        capability = cuda_capability(device)
        if capability is not None and capability < (7, 0):
            return "Triton does not serve GPUs this old (compute capability below 7.0)"
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if sys.platform == "win32":
        return None if shutil.which("cl") else "there is no C++ compiler (cl) here"
    if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        return "there is no C++ compiler (g++) here"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's header files are not installed (python3-dev)"
    return None


def is_repaid(step_seconds: float, steps: int, device: torch.device) -> bool:
    """Whether so many steps, which take so long without, save twice what compiling costs."""
    on_cpu = device.type == "cpu"
    saves, seconds = (CPU_SAVES, CPU_SECONDS) if on_cpu else (GPU_SAVES, GPU_SECONDS)
    return steps * step_seconds * saves > 2 * seconds


def compile_model(
    model: nn.Module, device: torch.device, *, micro_batches: int, is_alone: bool = True
) -> None:
    """Compile the model's training steps, of so many micro-batches each, at the first of them.

    On a CPU each block is a region of its own: the code of one serves all. On a GPU the whole of
    `hidden` is one region; but with other processes, gradients are reduced block by block while
    the rest is computed. A small model with one micro-batch a step runs as CUDA graphs: of
    several, each would overwrite the gradients of the one before (pytorch#169545).
    """
    if device.type == "cpu" or not is_alone:
        for block in model.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        return
    is_small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL
    has_graphs = device.type == "cuda" and is_small and micro_batches == 1
    mode = "reduce-overhead" if has_graphs else "default"
    model.hidden = torch.compile(model.hidden, dynamic=False, mode=mode)


def compile_decoding(model: nn.Module, device: torch.device) -> None:
    """Have the model's steps of one position compiled, at the first for each number of texts.

    Raises SettingsError where that can't work, or does not pay.
    """
    prevented = what_prevents_compiling(device)
    if device.type != "cuda" or prevented:
        why = prevented or f"on {device.type} a step is as fast as its weights are read"
        raise SettingsError(f"generation can't be compiled: {why}.\nLeave compiling out.")
    model.decode = torch.compile(model.decode, dynamic=False)


def is_compiled(model: nn.Module) -> bool:
    """Whether compile_model() has been at a model."""
    blocks = getattr(model, "blocks", ())
    return "hidden" in model.__dict__ or any("forward" in block.__dict__ for block in blocks)


def undo_compiling(model: nn.Module) -> None:
    """Run the model as it is written again."""
    model.__dict__.pop("hidden", None)
    for block in model.blocks:
        block.__dict__.pop("forward", None)


def compile_again(model: nn.Module, device: torch.device, *, micro_batches: int) -> None:
    """Compile a compiled model's steps anew, in the same regions, for so many micro-batches."""
    is_one_region = "hidden" in model.__dict__
    undo_compiling(model)
    compile_model(model, device, micro_batches=micro_batches, is_alone=is_one_region)


class RecordedStep:
    """A function of tensors on a GPU, recorded once and replayed: its kernels wait for no host.

    The inputs' shapes stay the same, and so does the place of all else that it reads and writes;
    what it returns is overwritten by the next call.
    """

    def __init__(self, step: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
        self._inputs = inputs
        device = inputs[0].device
        with torch.cuda.device(device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries choose their kernels, and compiled code is made
                    step(*inputs)
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # a loader's thread that pins memory meanwhile would else spoil the recording
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._output = step(*inputs)

    def __call__(self, *values: torch.Tensor) -> torch.Tensor:
        """What the function gives for these values."""
        for place, value in zip(self._inputs, values, strict=True):
            if place is not value:
                place.copy_(value)
        self._graph.replay()
        return self._output


@contextlib.contextmanager
def not_compiled() -> Iterator[None]:
    """Run compiled models as they are written: shapes that change would be compiled each."""
    # the module that has it takes a second to import; where it isn't there, nothing is compiled
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
