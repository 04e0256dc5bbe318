"""Memory: what a training step needs and what the device has."""

import contextlib
import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine.attention import count_kept_weights
from engine.devices import free_memory
from engine.errors import first_line
from engine.linear import HalfGradients, layers_in_half
from engine.loss import chunk_rows, light_chunk_rows, softmax_rows
from engine.precision import Precision
from engine.randomness import random_state, set_random_state

# the windows that activations are measured on; a GPU's attention kernels round up to 128 tokens
PROBED_TOKENS = {"cpu": 16, "cuda": 512, "mps": 128, "xpu": 512}
OPTIMIZER_BYTES = {"adamw": (8, 8), "muon": (4, 8)}  # a parameter of hidden matrices, of others
ADVICE = (  # where a micro-batch of one window does not fit
    "Set activation_checkpointing to True, a smaller max_length, n_layers or emb_dim, or another "
    "MODEL."
)


class OutOfStepMemory(MemoryError):
    """A micro-batch did not fit; weights, moments and random generators are as before the step."""

    def __init__(self, error: BaseException, n_windows: int, where: str = "a step") -> None:
        super().__init__(first_line(error))
        self.n_windows = n_windows  # of the micro-batch
        self.where = where


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak memory of training on one device, in bytes, by its use."""

    weights: int
    gradients: int
    optimizer: int
    best_weights: int  # the copy of the best weights that a run on the CPU keeps
    activations: int  # independent of the micro-batch, such as autocast's copies of the weights
    window: int  # the activations of each window of the micro-batch
    head: int  # its logits and gradients, for the largest chunk of rows
    gathered: int = 0  # by the all-gathers of a step
    unsharded: int = 0  # all weights, gathered for an evaluation

    def activations_of(self, n_windows: int) -> int:
        """The activations of a micro-batch of n_windows."""
        return self.activations + n_windows * self.window

    def total(self, n_windows: int) -> int:
        """The peak with micro-batches of n_windows, in a step or in an evaluation."""
        kept = self.weights + self.optimizer + self.best_weights
        step = self.gathered + self.gradients + self.head + self.activations_of(n_windows)
        return kept + max(step, self.unsharded)

    def largest_fit(self, n_windows: int, room: int | None) -> int:
        """n_windows, halved until they fit into room bytes; 0 if one does not. None is no limit."""
        while room is not None and self.total(n_windows) > room:
            if n_windows == 1:
                return 0
            n_windows = halved(n_windows)
        return n_windows

    def described(self, n_windows: int) -> str:
        """The uses of memory with micro-batches of n_windows, as text."""
        windows = f"{n_windows} window{'s' * (n_windows != 1)}"
        uses = {
            "weights": self.weights,
            "weights of others": max(self.gathered, self.unsharded),
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "best weights": self.best_weights,
            f"activations of {windows}": self.activations_of(n_windows),
            "head": self.head,
        }
        return ", ".join(f"{name} {as_bytes(size)}" for name, size in uses.items() if size)


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
    """What training a GPTModel on n_windows windows of n_tokens a micro-batch needs on one rank.

    Activations are measured by short forward passes, everything else is counted. keeps_best: the
    device's memory holds a copy of the best weights. parts: the ranks that the model is sharded
    over; with gradient accumulation (accumulates) or an all-reduce gradients stay unsharded and in
    fp32.
    """
    n_parameters = sum(p.numel() for p in model.parameters())
    n_trained = count_trained(model)
    weights, gradients = sum(p.nbytes for p in model.parameters()), 4 * n_trained
    gathered = unsharded = 0
    if parts > 1:  # as distributed/sharding.py lays it out
        width = 4 if precision.name == "fp32" else 2
        block = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
        in_blocks = block * len(model.blocks)
        weights //= parts
        gathered = 2 * width * block + 4 * (n_parameters - in_blocks)  # one block is prefetched
        unsharded = width * in_blocks + 4 * (n_parameters - in_blocks)
        gradients = gradients if accumulates else gradients // parts + 4 * block
    hidden = sum(w.numel() for w, _ in model.hidden_matrices() if w.requires_grad)
    of_hidden, of_others = OPTIMIZER_BYTES[optimizer]
    adds_up = accumulates or parts > 1 or optimizer != "adamw"
    in_half = [] if adds_up else layers_in_half(model, precision)
    gradients -= 2 * sum(layer.weight.numel() for layer in in_half)
    with HalfGradients(in_half).taken():
        fixed, window = measure_activations(model, n_tokens, precision, device)
    if model.activation_checkpointing:
        # each block's input is kept; the backward pass recomputes one block at a time
        n_layers = len(model.blocks)
        window = window // n_layers + n_layers * n_tokens * model.config.emb_dim * 4
        fixed //= n_layers
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=(hidden * of_hidden + (n_trained - hidden) * of_others) // parts,
        best_weights=4 * n_trained if keeps_best else 0,
        activations=fixed,
        window=window,
        head=head_bytes(model.head.weight, n_windows * n_tokens, precision),
        gathered=gathered,
        unsharded=unsharded,
    )


def measure_activations(
    model: nn.Module, n_tokens: int, precision: Precision, device: torch.device
) -> tuple[int, int]:
    """Bytes kept for the backward pass: independent of the micro-batch, and a window of n_tokens.

    Measured on short windows and on half as long ones, since the bytes grow with the length and
    with the weights that attention keeps, which are its square in windows as short as these.
    """

    def kept(n_windows: int, n_tokens: int) -> int:
        ids = torch.zeros(n_windows, n_tokens, dtype=torch.long, device=device)
        return _kept_bytes(model, ids, precision)

    probed = min(n_tokens, PROBED_TOKENS[device.type])
    random_before = random_state(device)
    was_training, was_checkpointing = model.training, model.activation_checkpointing
    model.train()
    model.activation_checkpointing = False
    try:
        two = kept(2, probed)  # for one window torch takes other paths
        window = kept(3, probed) - two
        fixed = max(0, two - 2 * window)
        if probed == n_tokens:
            return fixed, window
        half = (kept(2, probed // 2) - fixed) / 2
    finally:
        model.train(was_training)
        model.activation_checkpointing = was_checkpointing
        set_random_state(random_before, device)
    # window = linear n + square n^2, and so for n / 2
    square = max(0.0, (window - 2 * half) / (probed**2 / 2))
    linear = window / probed - square * probed
    n_weights = count_kept_weights(device, n_tokens, model.config.attention_drop_rate)
    return fixed, round(linear * n_tokens + square * n_weights)


def _kept_bytes(model: nn.Module, ids: torch.Tensor, precision: Precision) -> int:
    """The bytes that a forward pass saves beyond parameters and buffers, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # alive until the end, so no address recurs
        return tensor.detach()  # an operation's own output would keep the operation, and itself

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        precision.autocast(),
    ):
        hidden = model.hidden(ids)
    total = sum(size for address, size in kept.items() if address not in own)
    del hidden  # not before: it keeps the saved tensors alive
    return total


def count_trained(model: nn.Module) -> int:
    """The number of a model's parameters that are not frozen."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def head_bytes(weight: torch.Tensor, n_rows: int, precision: Precision) -> int:
    """The peak bytes of engine/loss.py for a (V, D) weight, but for the gradient it returns."""
    V, D = weight.shape
    rows = weight.detach().new_empty(1, D).expand(n_rows, D)
    most = (chunk_rows if weight.requires_grad else light_chunk_rows)(rows, V)
    at_once = min(n_rows, most)
    logits = at_once * V * 4
    if precision.name != "fp32":  # in half precision, and some of them in fp32
        logits = at_once * V * 2 + min(at_once, softmax_rows(rows, V)) * V * 4
    if not weight.requires_grad:  # a copy of it in half precision
        return logits + V * D * (0 if precision.name == "fp32" else 2)
    # 4 bytes a weight for a chunk's gradient (in half precision with the weight's own copy), 4 for
    # a second gradient: of the embedding tied to it, or of an earlier micro-batch
    return logits + V * D * 8


def as_bytes(size: int) -> str:
    """A size as text, in bytes, KB, MB or GB."""
    if size >= 999.5e6:
        return f"{size / 1e9:,.1f} GB"
    if size >= 999.5e3:
        return f"{size / 1e6:,.{1 if size < 9.95e6 else 0}f} MB"
    return f"{size / 1e3:,.0f} KB" if size >= 1000 else f"{size:,.0f} bytes"


def halved(n_windows: int) -> int:
    """The next smaller micro-batch."""
    return -(-n_windows // 2)


def available_memory(device: torch.device) -> int | None:
    """The bytes that this process can allocate on a device; None where the system won't tell."""
    if device.type != "cpu":
        return free_memory(device)
    rooms = [_system_room(), _address_room(), *_container_rooms(Path("/proc"), Path("/sys"))]
    return min((room for room in rooms if room is not None), default=None)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows' sysinfoapi.h."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _system_room() -> int | None:
    if sys.platform == "win32":
        status = _MemoryStatus(size=ctypes.sizeof(_MemoryStatus))
        found = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status.available if found else None
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:  # macOS tells only the installed memory, an upper bound
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _address_room() -> int | None:
    """What RLIMIT_AS (ulimit -v) leaves; None without a limit."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):  # Windows; macOS, which does not enforce the limit
        return None
    taken = pages * resource.getpagesize()
    return None if limit == resource.RLIM_INFINITY else max(0, limit - taken)


def _container_rooms(proc: Path, sys: Path) -> list[int]:
    """What the limits of the process's control groups (v1 or v2) and their parents leave."""
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
        folders = [place for place in (inner, *inner.parents) if place.is_relative_to(root)]
        rooms += [_room_in(folder, *names) for folder in folders]
    return [room for room in rooms if room is not None]


def _room_in(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    try:
        text = (folder / limit).read_text("ascii").strip()
        if text == "max":
            return None
        taken = int((folder / usage).read_text("ascii"))
        lines = (folder / "memory.stat").read_text("ascii").splitlines()
    except OSError:  # in a container, its own group is the root
        return None
    # the kernel reclaims the page cache before it refuses an allocation
    stat = dict(line.split() for line in lines)
    files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, int(text) - taken + files)
