"""Devices by name, and every call that CUDA, Apple's, Intel's GPUs and the CPU have of their own.

Nothing else in the project calls torch.cuda, torch.mps or torch.xpu for memory, generators or
properties, so that what one of them lacks is known in one place.
"""

import functools
import re
import sys

import torch

KINDS = ("cpu", "cuda", "mps", "xpu")
INDEXED = ("cuda", "xpu")  # of which a machine may have several
_NAME = re.compile(r"cpu|mps|(cuda|xpu)(:\d{1,3})?")


def find_device_fault(name: object) -> str | None:
    """What a message says of a name that no device has; None where it is one, or None."""
    if name is None or (isinstance(name, str) and _NAME.fullmatch(name)):
        return None
    return 'must be "cpu", "cuda", "cuda:1", "mps" or "xpu"'


def with_index(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" is the current one, and torch.cuda's calls want to know.

    A CPU and Apple's GPU have none.
    """
    device = torch.device(device)
    if device.type in INDEXED and device.index is None:
        return torch.device(device.type, _module(device).current_device())
    return device


def device_name(device: torch.device) -> str | None:
    """The GPU's name for people; None for a CPU."""
    if device.type == "mps":
        return "Apple Silicon"
    return None if device.type == "cpu" else _module(device).get_device_name(device)


def device_count(kind: str) -> int:
    """How many devices of a kind torch can use."""
    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind)
    return module.device_count() if module.is_available() else 0


def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """NVIDIA's compute capability, (8, 6) for example; None for all other devices, AMD's too."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def xpu_has_bf16(device: torch.device) -> bool:
    """Whether an Intel GPU computes in bf16 rather than emulate it."""
    properties = torch.xpu.get_device_properties(device)
    return getattr(properties, "has_bfloat16_conversions", True)  # torch 2.7 does not tell


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        _module(device).synchronize(device)


# ----------------------------------------------------------------------------------- memory


@functools.cache
def total_memory(device: torch.device) -> int:
    """The bytes of memory that a GPU has, or Metal recommends to use; "meta" holds anything."""
    if device.type == "meta":
        return sys.maxsize
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return _module(device).get_device_properties(device).total_memory


def free_memory(device: torch.device) -> int:
    """The bytes that this process may still take on a GPU.

    What torch's cache holds counts as free; a share set by limit_memory() is heeded.
    """
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    torch_device = _module(device)
    free, total = torch_device.mem_get_info(device)
    reserved = torch_device.memory_reserved(device)
    share = 1.0
    if hasattr(torch_device, "get_per_process_memory_fraction"):  # XPU has it from torch 2.9 on
        share = torch_device.get_per_process_memory_fraction(device)
    allowed = int(total * share) - reserved
    return max(0, min(free, allowed) + reserved - torch_device.memory_allocated(device))


def limit_memory(device: torch.device, share: float) -> bool:
    """Let this process take at most a share of a GPU's memory; False where torch can't."""
    if device.type == "mps":
        torch.mps.set_per_process_memory_fraction(share)
        return True
    can = hasattr(_module(device), "set_per_process_memory_fraction")
    if can:
        _module(device).set_per_process_memory_fraction(share, device)
    return can


def release_memory(device: torch.device) -> None:
    """Give back what torch's cache holds: it may lie in pieces that are too small."""
    if device.type != "cpu":
        _module(device).empty_cache()


# ------------------------------------------------------------------------------- generators


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of a GPU's random generator, uint8 on the CPU."""
    return _module(device).get_rng_state(device)


def set_generator_state(state: torch.Tensor, device: torch.device) -> None:
    """Set a GPU's random generator to what generator_state() gave."""
    _module(device).set_rng_state(state, device)


def _module(device: torch.device):
    """torch.cuda, torch.mps or torch.xpu."""
    return getattr(torch, device.type)
