"""Devices by name, and the only place for calls that differ between CUDA, MPS, XPU and CPUs."""

import contextlib
import functools
import re
import sys
from types import ModuleType

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

KINDS = ("cpu", "cuda", "mps", "xpu")
INDEXED = ("cuda", "xpu")  # of which a machine may have several
_NAME = re.compile(r"cpu|mps|(cuda|xpu)(:\d{1,3})?")
_shares: dict[torch.device, float] = {}  # of the memory of GPUs, as limit_memory() has set them


def find_device_fault(name: object) -> str | None:
    """What must be said of a value that names no device; None for a device's name or None."""
    if name is None or (isinstance(name, str) and _NAME.fullmatch(name)):
        return None
    return 'must be "cpu", "cuda", "cuda:1", "mps" or "xpu"'


def with_index(device: torch.device | str) -> torch.device:
    """The device with the index that torch.cuda's functions need; "cuda" is the current one."""
    device = torch.device(device)
    if device.type in INDEXED and device.index is None:
        return torch.device(device.type, gpu_module(device).current_device())
    return device


def as_current(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which a device is the current one of its kind, where there may be several."""
    if device.type not in INDEXED:
        return contextlib.nullcontext()
    return gpu_module(device).device(device)


def device_name(device: torch.device) -> str | None:
    """The GPU's name for people; None for a CPU."""
    if device.type == "mps":
        return "Apple Silicon"
    return None if device.type == "cpu" else gpu_module(device).get_device_name(device)


def device_count(kind: str) -> int:
    """How many devices of a kind torch can use."""
    if kind in ("cpu", "mps"):
        return int(kind == "cpu" or torch.backends.mps.is_available())
    module = getattr(torch, kind)
    return module.device_count() if module.is_available() else 0


def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """NVIDIA's compute capability, such as (8, 6); None for all other devices, AMD's too."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def xpu_has_bf16(device: torch.device) -> bool:
    """Whether an Intel GPU computes in bf16 rather than emulates it."""
    properties = torch.xpu.get_device_properties(device)
    return getattr(properties, "has_bfloat16_conversions", True)  # torch 2.7 lacks it


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        gpu_module(device).synchronize(device)


@functools.cache
def total_memory(device: torch.device) -> int:
    """The bytes of a GPU's memory, or those that Metal recommends to use; "meta" has no limit."""
    if device.type == "meta":
        return sys.maxsize
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return gpu_module(device).get_device_properties(device).total_memory


def free_memory(device: torch.device) -> int:
    """The bytes that this process can allocate on a GPU, within limit_memory()'s share."""
    if device.type == "mps":
        allowed = int(_shares.get(device, 1.0) * torch.mps.recommended_max_memory())
        return max(0, allowed - torch.mps.current_allocated_memory())
    module = gpu_module(device)
    free, total = module.mem_get_info(device)
    reserved = module.memory_reserved(device)
    share = 1.0
    if hasattr(module, "get_per_process_memory_fraction"):  # XPU has it since torch 2.9
        share = module.get_per_process_memory_fraction(device)
    allowed = int(total * share) - reserved
    # what torch's caching allocator has reserved, but not allocated, is free
    return max(0, min(free, allowed) + reserved - module.memory_allocated(device))


def limit_memory(device: torch.device, share: float) -> bool:
    """Limit this process to a share of a GPU's memory; False where torch can't. A share of 1 lifts
    an earlier limit of this function's."""
    set_fraction = getattr(gpu_module(device), "set_per_process_memory_fraction", None)
    if set_fraction is not None and share != _shares.get(device, 1.0):
        set_fraction(share, *([] if device.type == "mps" else [device]))  # Metal has one device
        _shares[device] = share
    return set_fraction is not None


def release_memory(device: torch.device) -> None:
    """Empty torch's cache, whose blocks may be too small for the next allocation."""
    if device.type != "cpu":
        gpu_module(device).empty_cache()


def steady_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which attention has no kernels that are planned for each new shape."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    # cuDNN, which torch prefers on Hopper, plans for tens of milliseconds at each new key length
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def gpu_module(device: torch.device) -> ModuleType:
    """torch.cuda, torch.mps or torch.xpu."""
    return getattr(torch, device.type)
