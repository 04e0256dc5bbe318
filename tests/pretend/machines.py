"""Pretended machines: which accelerators torch finds, told by torch's C calls and by nothing else.

torch.cuda, torch.mps and torch.xpu are Python over functions of torch._C. A CPU build of torch
lacks those functions; `c_calls(machine)` is a set of them, and torch's own Python runs on top.
"""

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GB = 10**9


@dataclass(frozen=True)
class Card:
    """A GPU: its name, compute capability (CUDA's only) and memory in bytes."""

    name: str
    capability: tuple[int, int] = (0, 0)
    memory: int = 16 * GB


LISTED = (
    Card("Tesla P100-PCIE-16GB", (6, 0)),
    Card("NVIDIA GeForce GTX 1080", (6, 1), 8 * GB),
    Card("Tesla V100-SXM2-16GB", (7, 0)),
    Card("Tesla T4", (7, 5)),
    Card("NVIDIA A100-SXM4-40GB", (8, 0), 40 * GB),
    Card("NVIDIA GeForce RTX 3090", (8, 6), 24 * GB),
    Card("NVIDIA GeForce RTX 4090", (8, 9), 24 * GB),
    Card("NVIDIA H100 80GB HBM3", (9, 0), 80 * GB),
    Card("NVIDIA B200", (10, 0), 180 * GB),
    Card("NVIDIA GeForce RTX 5090", (12, 0), 32 * GB),
)
CARDS = {card.capability: card for card in LISTED}

# what torch.cuda.get_arch_list() says in the wheels that people have
ARCHITECTURES = {
    "12.6": "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90",
    "13.0": "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120",
}


@dataclass(frozen=True)
class Machine:
    """What torch was built for, and the cards that it finds there.

    kind is the build, "cpu", "cuda", "mps" or "xpu", and cuda the version of a CUDA build; macos is
    (major, minor). has_nvidia_smi puts one on PATH, which is how a driver shows. Where the driver
    is too old for the build, the cards are there and torch does not see them.
    """

    kind: str
    cards: tuple[Card, ...] = ()
    cuda: str | None = None
    macos: tuple[int, int] | None = None
    driver_too_old: bool = False
    has_nvidia_smi: bool = False

    @property
    def visible(self) -> tuple[Card, ...]:
        """The cards that torch can see."""
        return () if self.driver_too_old or self.kind == "cpu" else self.cards

    def __str__(self) -> str:
        build = f"cu{self.cuda.replace('.', '')}" if self.cuda else self.kind
        if self.macos:
            build = f"macOS {self.macos[0]}"
        return f"{' + '.join(card.name for card in self.cards) or 'no card'} ({build})"


def cuda_machine(*capabilities: tuple[int, int], cuda: str = "12.6", **changes: Any) -> Machine:
    """A machine with cards of these capabilities and a CUDA build of torch."""
    cards = tuple(CARDS[capability] for capability in capabilities)
    return Machine("cuda", cards, cuda=cuda, **{"has_nvidia_smi": True, **changes})


def mac(major: int) -> Machine:
    """An Apple-silicon Mac with this version of macOS."""
    return Machine("mps", (Card("Apple M2"),), macos=(major, 0))


XPU_MACHINE = Machine("xpu", (Card("Intel(R) Arc(TM) A770 Graphics"),))


# torch.xpu.memory names these when it is imported
XPU_CLASSES = (
    "_xpu_XPUAllocator",
    "_XPUMemPool",
    "_xpu_beginAllocateCurrentThreadToPool",
    "_xpu_endAllocateToPool",
    "_xpu_releasePool",
)


# torch.cuda and its users look for this beginning
ABOUT_THE_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). "
    "Please update your GPU driver."
)


class Calls:
    """The C calls of one machine, as `names` to set in torch._C."""

    def __init__(self, machine: Machine) -> None:
        self.install(machine)

    def install(self, machine: Machine) -> None:
        """Answer as this machine from here on."""
        self.machine, self.current = machine, 0
        self._fractions = [1.0] * len(machine.visible)
        self._generators: tuple[Any, ...] = ()

    def allocated(self, index: int) -> int:
        """The bytes that tensors take on a card; none can be there."""
        return 0

    peak = allocated  # the most since reset_peak()

    def reset_peak(self, index: int) -> None:
        """Let the peak be what is taken now."""

    def make_generator(self, index: int) -> Any:
        """A random generator of a card; without a library for it, one of the CPU's kind."""
        import torch

        return torch.Generator()

    @property
    def names(self) -> dict[str, Any]:
        """Names of torch._C and what they are on this machine."""
        calls = {"cpu": dict, "cuda": self._cuda, "mps": self._mps, "xpu": self._xpu}
        return calls[self.machine.kind]()

    def _of_indexed(self, kind: str) -> dict[str, Any]:
        """What torch asks of CUDA and of XPU alike."""
        calls = {
            "getDeviceCount": self._count,
            "getDevice": self.get_device,
            "setDevice": self.set_device,
            "exchangeDevice": self.exchange_device,
            "maybeExchangeDevice": self.exchange_device,
            "emptyCache": lambda: None,
            "isInBadFork": lambda: False,
            "getCurrentRawStream": lambda index: 0,
            "memoryStats": self.memory_stats,
            "resetPeakMemoryStats": self.reset_peak,
            "getMemoryFraction": self.get_fraction,
            "setMemoryFraction": self.set_fraction,
        }
        return {f"_has_{kind}": True} | {f"_{kind}_{name}": call for name, call in calls.items()}

    def _cuda(self) -> dict[str, Any]:
        return self._of_indexed("cuda") | {
            "_cudart": SimpleNamespace(cudaMemGetInfo=self.memory_info),
            "_cuda_init": self._cuda_init,
            "_cuda_getArchFlags": lambda: ARCHITECTURES[self.machine.cuda],
            "_cuda_synchronize": lambda: None,
            "_host_emptyCache": lambda: None,
        }

    def _xpu(self) -> dict[str, Any]:
        return self._of_indexed("xpu") | {
            "_XpuDeviceProperties": SimpleNamespace,
            **dict.fromkeys(XPU_CLASSES, SimpleNamespace),
            "_xpu_init": self._xpu_init,
            "_xpu_getArchFlags": lambda: "",
            "_xpu_synchronize": lambda index: None,
            "_xpu_getMemoryInfo": self.memory_info,
        }

    def _mps(self) -> dict[str, Any]:
        return {
            "_has_mps": True,
            "_mps_is_available": lambda: True,
            "_mps_is_in_bad_fork": lambda: False,
            "_mps_is_on_macos_or_newer": lambda *version: self.machine.macos >= version,
            "_mps_get_name": lambda: self.machine.cards[0].name,
            "_mps_get_core_count": lambda: 10,
            "_mps_get_default_generator": lambda: self.generators()[0],
            "_mps_deviceSynchronize": lambda: None,
            "_mps_emptyCache": lambda: None,
            "_mps_setMemoryFraction": lambda fraction: self.set_fraction(fraction, 0),
            "_mps_currentAllocatedMemory": lambda: self.allocated(0),
            "_mps_driverAllocatedMemory": lambda: self.allocated(0),
            "_mps_recommendedMaxMemory": lambda: self.machine.cards[0].memory,
        }

    def _count(self) -> int:
        if self.machine.driver_too_old:
            warnings.warn(ABOUT_THE_DRIVER, stacklevel=2)
        return len(self.machine.visible)

    def _cuda_init(self) -> None:
        import torch

        if self.machine.driver_too_old:
            raise RuntimeError(ABOUT_THE_DRIVER)
        torch.cuda.default_generators = self.generators()
        torch.cuda._get_device_properties = self._properties

    def _xpu_init(self) -> None:
        import torch

        torch.xpu.default_generators = self.generators()
        torch.xpu._get_device_properties = self._properties

    def generators(self) -> tuple[Any, ...]:
        """The cards' default generators."""
        if not self._generators:
            count = len(self.machine.visible)
            self._generators = tuple(self.make_generator(index) for index in range(count))
        return self._generators

    def memory_info(self, index: int) -> tuple[int, int]:
        """The free and the total bytes of a card, as the driver tells them."""
        total = self.machine.visible[index].memory
        return total - self.allocated(index), total

    def memory_stats(self, index: int) -> dict[str, Any]:
        """What torch's allocator says of a card."""
        sizes = {"current": self.allocated(index), "peak": self.peak(index)}
        return {name: {"all": sizes} for name in ("allocated_bytes", "reserved_bytes")}

    def get_fraction(self, index: int) -> float:
        return self._fractions[index]

    def set_fraction(self, fraction: float, index: int) -> None:
        """Let this process take at most a share of a card's memory."""
        self._fractions[index] = fraction

    def _properties(self, index: int) -> SimpleNamespace:
        card = self.machine.visible[index]
        return SimpleNamespace(
            name=card.name,
            major=card.capability[0],
            minor=card.capability[1],
            total_memory=card.memory,
            multi_processor_count=40,
            has_bfloat16_conversions=self.machine.kind == "xpu",
        )

    def get_device(self) -> int:
        return self.current

    def set_device(self, index: int) -> None:
        self.current = index

    def exchange_device(self, index: int) -> int:
        """Make another card the current one, unless the index is negative; returns the former."""
        before = self.get_device()
        if index >= 0:
            self.set_device(index)
        return before


# what torch's Python keeps of the C calls' answers, and must find out anew
KEPT = {
    "torch.cuda": {
        "_initialized": False,
        "_cached_device_count": None,
        "default_generators": (),
        "_queued_calls": None,
    },
    "torch.xpu": {"_initialized": False, "_cached_device_count": None, "default_generators": ()},
    "torch.mps": {"_default_mps_generator": None},
}
CACHED = ("is_available", "is_macos_or_newer", "is_macos13_or_newer", "get_name", "get_core_count")


NO_ACCELERATOR = {"_has_cuda": False, "_has_xpu": False, "_has_mps": False}
NO_ACCELERATOR |= {"_mps_is_available": lambda: False}


@contextlib.contextmanager
def pretended(machine: Machine, folder: Path | None = None) -> Iterator[Calls]:
    """Let torch find this machine's accelerators; no tensor can be made on one.

    For what is decided before the first tensor. folder is where an `nvidia-smi` is put, and is
    needed for a machine that has one. On leaving, torch is as it was.
    """
    calls = Calls(machine)
    c = importlib.import_module("torch._C")
    with contextlib.ExitStack() as undo:
        _remove(undo, c, "_cuda_getDeviceCount")  # of a build that has it
        for name, call in (NO_ACCELERATOR | calls.names).items():
            _replace(undo, c, name, call)
        _set_what_was_read_at_import(undo, machine, calls)
        forget(undo)
        _set_path(undo, machine, folder)
        yield calls


def _set_what_was_read_at_import(
    undo: contextlib.ExitStack, machine: Machine, calls: Calls
) -> None:
    """C calls and facts of the build that modules of torch have copied when they were imported."""
    version = importlib.import_module("torch.version")
    _replace(undo, version, "cuda", machine.cuda)
    _replace(undo, version, "hip", None)
    if machine.kind in ("cuda", "xpu"):
        module = importlib.import_module(f"torch.{machine.kind}")
        _replace(undo, module, "_exchange_device", calls.exchange_device)
        _replace(undo, module, "_maybe_exchange_device", calls.exchange_device)
    if machine.kind == "cuda":
        _replace(undo, module, "_cudart", calls.names["_cudart"])
        # the guard's library makes the calls that are of a stream; no stream is here
        graphs = importlib.import_module("torch.cuda.graphs")
        _replace(undo, graphs, "_cuda_isCurrentStreamCapturing", lambda: False)


def forget(undo: contextlib.ExitStack) -> None:
    """Let torch's Python ask the C calls anew; undo gives back what it knew."""
    mps = importlib.import_module("torch.backends.mps")
    for name in CACHED:
        cached = getattr(mps, name)
        cached.cache_clear()
        undo.callback(cached.cache_clear)
    for place, values in KEPT.items():
        module = importlib.import_module(place)
        for name, value in values.items():
            if name == "_queued_calls":
                value = list(getattr(module, name))
            _replace(undo, module, name, value)
        _remove(undo, module, "_get_device_properties")


def _set_path(undo: contextlib.ExitStack, machine: Machine, folder: Path | None) -> None:
    """A PATH without any nvidia-smi of this computer's, and with one where the machine has it."""
    before = os.environ["PATH"]
    places = [p for p in before.split(os.pathsep) if not (Path(p) / "nvidia-smi").exists()]
    if machine.has_nvidia_smi:
        assert folder is not None, "where is its nvidia-smi to be?"
        _write_nvidia_smi(folder, machine)
        places.insert(0, str(folder))
    os.environ["PATH"] = os.pathsep.join(places)
    undo.callback(os.environ.__setitem__, "PATH", before)


def _write_nvidia_smi(folder: Path, machine: Machine) -> None:
    """A program that answers --query-gpu=name,driver_version,compute_cap, a line a card."""
    driver = "470.57.02" if machine.driver_too_old else "580.65.06"
    lines = [f"{c.name}, {driver}, {'.'.join(map(str, c.capability))}" for c in machine.cards]
    if os.name == "nt":
        text = "\r\n".join(["@echo off", *(f"echo {line}" for line in lines)])
    else:
        text = "\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines)])
    program = folder / ("nvidia-smi.bat" if os.name == "nt" else "nvidia-smi")
    program.write_text(text + "\n", encoding="utf-8")
    program.chmod(0o755)


_ABSENT = object()


def _replace(undo: contextlib.ExitStack, place: Any, name: str, value: Any) -> None:
    undo.callback(_put, place, name, vars(place).get(name, _ABSENT))
    setattr(place, name, value)


def _remove(undo: contextlib.ExitStack, place: Any, name: str) -> None:
    undo.callback(_put, place, name, vars(place).get(name, _ABSENT))
    _put(place, name, _ABSENT)


def _put(place: Any, name: str, value: Any) -> None:
    if value is not _ABSENT:
        setattr(place, name, value)
    elif name in vars(place):
        delattr(place, name)
