"""Which number format the arithmetic runs in: bf16 where the hardware has it, else fp32.

fp16 is for older GPUs, and only where it is asked for: its narrow range needs the loss scaled.
"""

import contextlib
from dataclasses import dataclass

import torch

from engine.errors import SettingsError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Precision:
    """The format of the matrix products and why it was chosen; weights are fp32 in all."""

    name: str  # "bf16", "fp16" or "fp32"
    reason: str
    device_type: str

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which forward passes run."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        dtype = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(self.device_type, dtype=dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """What scales the loss of fp16, so that small gradients survive; else it does nothing."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(requested: str, device: torch.device) -> Precision:
    """Turn PRECISION ("auto", "bf16", "fp16" or "fp32") into what this device runs.

    Raises SettingsError for fp16 anywhere but on CUDA: elsewhere it is slow, or wrong.
    """
    if requested == "fp16" and device.type != "cuda":
        raise SettingsError(
            f'PRECISION = "fp16" needs a CUDA GPU, and this run is on {device.type}.\n'
            'Set PRECISION = "auto".'
        )
    has_bf16, hardware = _bf16_hardware(device)
    if requested == "auto":
        return Precision("bf16" if has_bf16 else "fp32", hardware, device.type)
    reason = "as set"
    if requested == "bf16" and not has_bf16:
        reason = f"as set, but slow here: {hardware}"
    return Precision(requested, reason, device.type)


def _bf16_hardware(device: torch.device) -> tuple[bool, str]:
    """Whether products in bf16 are fast on this device, and what says so."""
    if device.type == "cuda":
        # compute capability 8.0 (Ampere) is the first with bf16 units; older cards emulate it
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return has_bf16, "this GPU has bf16 units" if has_bf16 else "this GPU has no bf16 units"
    if device.type == "cpu":
        found = [name for name in ("amx_bf16", "avx512_bf16") if _cpu_capabilities().get(name)]
        return bool(found), f"this CPU has {found[0]}" if found else "this CPU has no bf16 units"
    if device.type == "mps":
        # before macOS 14 Metal has no bf16
        has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
        return has_bf16, "this Mac has bf16" if has_bf16 else "bf16 needs macOS 14"
    return False, f"bf16 on {device.type} is not relied upon"


def _cpu_capabilities() -> dict[str, object]:
    """What torch says of the processor's instruction sets."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        return get_capabilities()
    # before torch 2.12 the same facts have private names
    names = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {unit: getattr(torch.cpu, name, bool)() for unit, name in names.items()}
