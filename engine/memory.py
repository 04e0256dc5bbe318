"""Memory: what a step takes, what is there, and how the lack of it shows."""

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine.devices import free_memory
from engine.errors import PipelineError
from engine.loss import chunk_rows, softmax_rows
from engine.precision import Precision
from engine.randomness import random_state, set_random_state

# Activations are measured on windows this short and carried over to the real ones. A GPU's
# attention kernels keep something for each 128 positions, used or not.
PROBED_TOKENS = {"cpu": 16, "cuda": 512, "mps": 128, "xpu": 512}
OPTIMIZER_BYTES = {"adamw": (8, 8), "muon": (4, 8)}  # a parameter of hidden matrices, of others
ADVICE = (  # where even one window at a time is too much
    "Set activation_checkpointing to True, a smaller max_length, n_layers or emb_dim, or another "
    "MODEL."
)
# What a RuntimeError says where memory ran out: the allocators of CUDA, XPU, Metal and NCCL, the
# one of CPUs on Linux and macOS, on Windows, C++'s own, Metal's for one tensor, and libraries'
# whose own allocation failed. A word alone, such as "allocate", is in messages of other kinds.
_OUT_OF_MEMORY = re.compile(
    "out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc"
    "|Invalid buffer size: |(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS)_STATUS_ALLOC_FAILED"
)


class OutOfStepMemory(MemoryError):
    """A micro-batch did not fit; weights, moments and random generators are as before the step."""

    def __init__(self, error: BaseException, n_windows: int, where: str = "a step") -> None:
        super().__init__(next(iter(str(error).splitlines()), type(error).__name__))
        self.n_windows = n_windows  # those that did not fit
        self.where = where


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device.

    A PipelineError says in its own words what it is about.
    """
    if isinstance(error, PipelineError):
        return False
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


# ------------------------------------------------------------------------------ what it takes


@dataclass(frozen=True)
class MemoryEstimate:
    """What training takes at its peak, in bytes, in parts; `window` is that of one window more."""

    weights: int
    gradients: int
    optimizer: int
    best_weights: int  # the copy that a run on the CPU keeps beside
    activations: int  # those that any number of windows share, such as weights in half precision
    window: int
    head: int  # at most: the logits are only there for some rows at a time
    gathered: int = 0  # weights of other ranks that are here for a moment of a step
    whole: int = 0  # all weights, which an evaluation of a model in parts gathers

    def activations_of(self, n_windows: int) -> int:
        """The activations of n_windows at a time."""
        return self.activations + n_windows * self.window

    def total(self, n_windows: int) -> int:
        """All parts together, for n_windows at a time; or an evaluation, where that takes more."""
        kept = self.weights + self.optimizer + self.best_weights
        step = self.gathered + self.gradients + self.head + self.activations_of(n_windows)
        return kept + max(step, self.whole)

    def largest_fit(self, n_windows: int, room: int | None) -> int:
        """n_windows, halved until they fit into room bytes; 0 where not even one does.

        room None is a machine that doesn't say: nothing is judged.
        """
        while room is not None and self.total(n_windows) > room:
            if n_windows == 1:
                return 0
            n_windows = halved(n_windows)
        return n_windows

    def described(self, n_windows: int) -> str:
        """The parts for n_windows at a time, in words."""
        parts = {
            "weights": self.weights,
            "weights of others": max(self.gathered, self.whole),
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "best weights": self.best_weights,
            f"activations of {n_windows} window{'s' * (n_windows != 1)}": self.activations_of(
                n_windows
            ),
            "head": self.head,
        }
        return ", ".join(f"{name} {as_bytes(size)}" for name, size in parts.items() if size)


def estimate_memory(
    model: nn.Module,
    *,
    n_tokens: int,
    n_windows: int,
    precision: Precision,
    device: torch.device,
    optimizer: str = "adamw",
    keeps_best: bool = False,
    parts: int = 1,
    accumulates: bool = True,
) -> MemoryEstimate:
    """What training a GPTModel on windows of n_tokens takes; n_windows is the most at a time.

    Activations are measured, by a forward pass over few tokens, which leaves the random
    generators as they were; everything else is counted. keeps_best: the best weights are copied
    to memory that is the device's too. parts: the ranks that the model lies over in parts, each of
    which takes this much; where it accumulates gradients over several micro-batches, it keeps
    them whole.
    """
    n_parameters = sum(p.numel() for p in model.parameters())
    weights = gradients = 4 * n_parameters
    gathered = whole = 0
    if parts > 1:  # as distributed/sharding.py lays it out
        width = 4 if precision.name == "fp32" else 2
        block = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
        in_blocks = block * len(model.blocks)
        weights //= parts
        gathered = 2 * width * block + 4 * (n_parameters - in_blocks)  # one is fetched ahead
        whole = width * in_blocks + 4 * (n_parameters - in_blocks)
        gradients = gradients if accumulates else gradients // parts + 4 * block
    hidden = sum(weight.numel() for weight, _ in model.hidden_matrices())
    others = n_parameters - hidden
    of_hidden, of_others = OPTIMIZER_BYTES[optimizer]
    fixed, window = measure_activations(model, n_tokens, precision, device)
    if model.activation_checkpointing:
        # what goes into each block is kept, and one block at a time is computed once more
        n_layers = len(model.blocks)
        window = window // n_layers + n_layers * n_tokens * model.config.emb_dim * 4
        fixed //= n_layers
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=(hidden * of_hidden + others * of_others) // parts,
        best_weights=4 * n_parameters if keeps_best else 0,
        activations=fixed,
        window=window,
        head=_head_bytes(model.head.weight, n_windows * n_tokens, precision, device),
        gathered=gathered,
        whole=whole,
    )


def measure_activations(
    model: nn.Module, n_tokens: int, precision: Precision, device: torch.device
) -> tuple[int, int]:
    """Bytes kept for the backward pass: (whatever the number of windows, for each of n_tokens).

    Measured on two and three short windows, and on two of half the length: what is kept grows
    with the length and, where attention keeps its weights, with its square. (One window alone
    takes other paths through torch.)
    """
    probed = min(n_tokens, PROBED_TOKENS[device.type])
    random_before = random_state(device)
    was_training, was_checkpointing = model.training, model.activation_checkpointing
    model.train()
    model.activation_checkpointing = False
    try:
        two = _kept_bytes(model, 2, probed, precision, device)
        window = _kept_bytes(model, 3, probed, precision, device) - two
        fixed = max(0, two - 2 * window)
        if probed == n_tokens:
            return fixed, window
        half = (_kept_bytes(model, 2, probed // 2, precision, device) - fixed) / 2
    finally:
        model.train(was_training)
        model.activation_checkpointing = was_checkpointing
        set_random_state(random_before, device)
    # window = linear n + square n^2, and the same for half of n
    square = max(0.0, (window - 2 * half) / (probed**2 / 2))
    linear = window / probed - square * probed
    return fixed, round(linear * n_tokens + square * n_tokens**2)


def _kept_bytes(
    model: nn.Module, n_windows: int, n_tokens: int, precision: Precision, device: torch.device
) -> int:
    """The bytes that a forward pass keeps beside parameters and buffers, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # it lives, and keeps its place, until the end
        return tensor

    ids = torch.zeros(n_windows, n_tokens, dtype=torch.long, device=device)
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        precision.autocast(),
    ):
        hidden = model.hidden(ids)
    total = sum(size for place, size in kept.items() if place not in own)
    del hidden  # only now: what it held was to be counted
    return total


def _head_bytes(
    weight: torch.Tensor, n_rows: int, precision: Precision, device: torch.device
) -> int:
    """What engine/loss.py holds at its peak, beside the gradient that it makes."""
    V, D = weight.shape
    rows = weight.detach().new_empty(1, D).expand(n_rows, D)
    at_once = min(n_rows, chunk_rows(rows, V))
    # logits, and a chunk's gradient of the weight; both in half precision, and more beside: some
    # logits in fp32, the weight in half precision
    logits, beside = at_once * V * 4, 4
    if precision.name != "fp32":
        logits = at_once * V * 2 + min(at_once, softmax_rows(rows, V)) * V * 4
    # last, a second gradient of the weight: of the embedding tied to it, or of an earlier part
    return logits + V * D * beside + V * D * 4


def as_bytes(size: int) -> str:
    """A size in MB or GB, as people read it."""
    return f"{size / 1e9:,.1f} GB" if size >= 999.5e6 else f"{size / 1e6:,.0f} MB"


def halved(n_windows: int) -> int:
    """The next smaller micro-batch."""
    return -(-n_windows // 2)


# ------------------------------------------------------------------------------ what is there


def available_memory(device: torch.device) -> int | None:
    """The bytes that this process may still take on a device; None where nothing tells.

    Memory that torch's own cache holds counts as free. On the CPU it is what the system has left,
    or a limit of the process or its container where that is tighter.
    """
    if device.type != "cpu":
        return free_memory(device)
    rooms = [_system_room(), _address_room(), *_container_rooms(Path("/proc"), Path("/sys"))]
    return min((room for room in rooms if room is not None), default=None)


def _system_room() -> int | None:
    if sys.platform == "win32":
        return _windows_room()
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        # macOS tells only how much is built in, so only what can never fit is found out
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows' sysinfoapi.h."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        *((name, ctypes.c_uint64) for name in ("page_total", "page_available")),
        *((name, ctypes.c_uint64) for name in ("virtual_total", "virtual_available", "extended")),
    )


def _windows_room() -> int | None:
    status = _MemoryStatus(size=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return status.available


def _address_room() -> int | None:
    """What RLIMIT_AS (ulimit -v) leaves."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):  # Windows; macOS, which doesn't heed the limit
        return None
    taken = pages * resource.getpagesize()
    return None if limit == resource.RLIM_INFINITY else max(0, limit - taken)


def _container_rooms(proc: Path, sys: Path) -> list[int]:
    """What the process's control groups leave, of version 1 or 2, and all groups around them."""
    rooms = []
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for _, kinds, group in (line.split(":", 2) for line in lines):
        if kinds == "":
            root, names = sys / "fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in kinds.split(","):
            root = sys / "fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        inner = root / group.lstrip("/")
        for folder in (inner, *inner.parents):
            room = _room_in(folder, *names)
            if room is not None:
                rooms.append(room)
            if folder == root:
                break
    return rooms


def _room_in(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    try:
        text = (folder / limit).read_text(encoding="ascii").strip()
        if text == "max":
            return None
        taken = int((folder / usage).read_text(encoding="ascii"))
        stat = dict(
            line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines()
        )
    except OSError:  # a container sees its own group in the root's place
        return None
    # the system takes files' pages back before it refuses anything
    files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, int(text) - taken + files)
