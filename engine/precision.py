"""The number format of the matrix products: the fastest that the hardware has units for."""

import contextlib
from dataclasses import dataclass

import torch

from engine.devices import cuda_capability, xpu_has_bf16
from engine.errors import SettingsError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The format of the matrix products and why it was chosen; weights are always fp32."""

    name: str  # "bf16", "fp16" or "fp32"
    reason: str
    device_type: str

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of forward passes."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=DTYPES[self.name])

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, so that small gradients do not underflow in fp16."""
        return self.name == "fp16"

    def scaler(self) -> torch.amp.GradScaler:
        """The loss scaler, which does nothing but in fp16."""
        return torch.amp.GradScaler(self.device_type, enabled=self.scales_loss)


def choose_precision(requested: str, device: torch.device) -> Precision:
    """The precision for a PRECISION setting. Raises SettingsError for "fp16" without CUDA."""
    if requested == "fp16" and device.type != "cuda":
        raise SettingsError(
            f'PRECISION = "fp16" needs a CUDA GPU, and this run is on {device.type}.\n'
            'Set PRECISION = "auto".'
        )
    fastest, hardware = _fastest_format(device)
    if requested == "auto":
        return Precision(fastest, hardware, device.type)
    slow = "" if requested in ("fp32", fastest) else f", but slow here: {hardware}"
    return Precision(requested, f"as set{slow}", device.type)


def keep_precision(name: str, device: torch.device) -> Precision:
    """The precision of a resumed run with PRECISION = "auto": its own, or a GPU's fastest."""
    # a GPU would only emulate a format that it lacks, and is not bit-equal anyway
    fastest, hardware = _fastest_format(device)
    if name in ("fp32", fastest):
        return Precision(name, "as when this run began", device.type)
    if device.type == "cuda" or name == "fp16":  # fp16 is for CUDA alone
        return Precision(fastest, f"{hardware}; this run began in {name}", device.type)
    return Precision(name, f"as when this run began, but slow here: {hardware}", device.type)


def may_be_slow(precision: Precision) -> bool:
    """Whether fp32 can be faster on some devices for which this precision is chosen."""
    if precision.device_type == "cpu":  # AMX is far faster than fp32, AVX-512 not everywhere
        return precision.name == "bf16" and not _cpu_capabilities().get("amx_bf16")
    return precision.device_type == "mps" and precision.name == "bf16"  # M1 and M2 emulate it


def _fastest_format(device: torch.device) -> tuple[str, str]:
    """The format of the fastest matrix products on this device, and why."""
    if device.type == "cuda":
        capability = cuda_capability(device) or (8, 0)  # AMD's GPUs for torch all have bf16
        if capability < (7, 0):
            return "fp32", "this GPU has no bf16 or fp16 units"
        if capability < (8, 0):
            return "fp16", "this GPU has fp16 units, but none for bf16"
    elif device.type == "cpu":
        found = [name for name in ("amx_bf16", "avx512_bf16") if _cpu_capabilities().get(name)]
        if found:
            return "bf16", f"this CPU has {found[0]}"
        return "fp32", "this CPU has no bf16 units"
    elif device.type == "mps":
        if torch.backends.mps.is_macos_or_newer(14, 0):
            return "bf16", "this Mac has bf16"
        return "fp32", "bf16 needs macOS 14"
    if device.type == "cuda" or xpu_has_bf16(device):
        return "bf16", "this GPU has bf16 units"
    return "fp32", "this GPU has no bf16 units"


def _cpu_capabilities() -> dict[str, object]:
    """The processor's instruction sets, as torch names them."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        return get_capabilities()
    # before torch 2.12 the same facts have private names
    names = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {unit: getattr(torch.cpu, name, bool)() for unit, name in names.items()}
