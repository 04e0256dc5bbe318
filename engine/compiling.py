"""torch.compile: whether it works and pays here, which regions it compiles, and CUDA graphs."""

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from engine.console import tell
from engine.devices import cuda_capability
from engine.errors import SettingsError, first_line

# where nothing was measured yet: the share of a step's time saved, and the seconds to compile; of
# 6- and 12-layer models on a CPU and a GPU, and of a small model's CUDA graphs
CPU_EXPECTED, GPU_EXPECTED, GRAPHS_EXPECTED = (0.15, 30.0), (0.3, 60.0), (0.5, 60.0)
# parameters; with fewer, a GPU waits for the host's kernel launches, which CUDA graphs avoid
SMALL_MODEL = 30_000_000
MOST_KEPT = 4  # recorded steps of a model

Step = Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, ...]]]


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
    free_steps(model)  # they run uncompiled


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
    """A step that is repeated on a CUDA device, as a CUDA graph: recorded once, then replayed.

    A step takes the tensors of the state and returns a result and the next state, which
    overwrites the last. It may use other tensors at addresses that do not change. Recording runs
    it several times with one state: it must give the same each time. A call overwrites the last
    result. Where recording fails, steps run eagerly, and one line says so.
    """

    _has_complained: ClassVar[bool] = False

    def __init__(self, *state: torch.Tensor) -> None:
        self._state = [tensor.clone() for tensor in state]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_refused = False

    def restart(self, *state: torch.Tensor) -> None:
        """Overwrite the state."""
        for tensor, value in zip(self._state, state, strict=True):
            tensor.copy_(value)

    def __call__(self, step: Step) -> torch.Tensor:
        """The result of the step, or of the recorded one, which is that of the first call."""
        if self._graph is None and not self._is_refused:
            self._record(step)
        if self._graph is None:
            return self._run(step)
        self._graph.replay()
        return self._result

    def _run(self, step: Step) -> torch.Tensor:
        result, state = step(*self._state)
        self.restart(*state)
        return result

    def _record(self, step: Step) -> None:
        device = self._state[0].device
        with _recording, torch.cuda.device(device):
            current, side = torch.cuda.current_stream(), _recording_stream(device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(3):  # warm-up: libraries choose kernels, torch.compile compiles
                    step(*self._state)
                graph = torch.cuda.CUDAGraph()
                # a loader's thread that pins memory would break the capture in any other mode
                capture = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
                try:
                    with capture:
                        self._result = self._run(step)
                    self._graph = graph
                except Exception as error:  # a fault of the step itself comes again, eagerly
                    self._is_refused = True
                    self._complain(error)
            current.wait_stream(side)

    @classmethod
    def _complain(cls, error: Exception) -> None:
        if not cls._has_complained:
            cls._has_complained = True
            tell(f"Note: generation is slower, without CUDA graphs: {first_line(error)}")


_recording = threading.Lock()  # a process can record one graph at a time


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all: CUDA's libraries allocate a workspace for each."""
    return torch.cuda.Stream(device)


_kept: WeakKeyDictionary[nn.Module, list[tuple[tuple, Hashable, Any]]] = WeakKeyDictionary()
_keeping = threading.RLock()  # the garbage collector may close a stream of texts at any time


def weight_addresses(model: nn.Module) -> tuple[tuple[int, torch.dtype], ...]:
    """Where each parameter and buffer is; a recorded step reads them there."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)


def keep_step(model: nn.Module, addresses: tuple, key: Hashable, step: Any) -> None:
    """Keep what holds a recorded step for the model's next request with this key.

    The newest MOST_KEPT are kept, each with its KV cache, while the model is in evaluation mode.
    They are freed when it is set to train, moved by to() or compiled for decoding, and with the
    next request after its weights have got other addresses. Weights may change in place.
    """
    if model.training:
        return
    with _keeping:
        kept = _kept.setdefault(model, [])
        kept.append((addresses, key, step))
        del kept[:-MOST_KEPT]


def take_step(model: nn.Module, addresses: tuple, key: Hashable) -> Any | None:
    """Take a kept step, so that no other request can use it; None if there is none."""
    with _keeping:
        kept = _kept.get(model, [])
        kept[:] = [entry for entry in kept if entry[0] == addresses]
        for place, (_, own_key, step) in enumerate(kept):
            if own_key == key:
                del kept[place]
                return step
    return None


def free_steps(model: nn.Module) -> bool:
    """Free a model's kept steps; returns whether there were any."""
    with _keeping:
        return bool(_kept.pop(model, None))


def not_compiled() -> contextlib.AbstractContextManager:
    """A context that runs compiled models eagerly: each new shape would be compiled again."""
    # importing torch._dynamo takes a second; where it is not imported, nothing is compiled
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
