"""Which number format the matrix products run in: the fastest one that the hardware has units for.

That is bf16, or fp16 on NVIDIA's Volta and Turing GPUs, which have no other: its narrow range
needs the loss to be scaled. fp32 is for all the rest.
"""

import contextlib
from dataclasses import dataclass

import torch

from engine.devices import cuda_capability, xpu_has_bf16
from engine.errors import SettingsError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
        return torch.autocast(self.device_type, dtype=DTYPES[self.name])

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, so that small gradients survive the format's narrow range."""
        return self.name == "fp16"

    def scaler(self) -> torch.amp.GradScaler:
        """What scales the loss of fp16, so that small gradients survive; else it does nothing."""
        return torch.amp.GradScaler(self.device_type, enabled=self.scales_loss)


def choose_precision(requested: str, device: torch.device) -> Precision:
    """Turn PRECISION ("auto", "bf16", "fp16" or "fp32") into what this device runs.

    "auto" is the fastest format of the device. Raises SettingsError for fp16 anywhere but on CUDA:
    elsewhere it is slow, or wrong.
    """
    if requested == "fp16" and device.type != "cuda":
        raise SettingsError(
            f'PRECISION = "fp16" needs a CUDA GPU, and this run is on {device.type}.\n'
            'Set PRECISION = "auto".'
        )
    fastest, hardware = _fastest_format(device)
    if requested == "auto":
        return Precision(fastest, hardware, device.type)
    reason = "as set"
    if requested not in ("fp32", fastest):
        reason = f"as set, but slow here: {hardware}"
    return Precision(requested, reason, device.type)


def keep_precision(name: str, device: torch.device) -> Precision:
    """The precision of a run that goes on, with PRECISION = "auto": the one it was begun in.

    A GPU without units for it emulates it at a fraction of the speed, so there the run goes on in
    the fastest format that the GPU has. Numbers on GPUs are not bit for bit the same anyway.
    """
    fastest, hardware = _fastest_format(device)
    if name in ("fp32", fastest):
        return Precision(name, "as when this run began", device.type)
    if device.type == "cuda" or name == "fp16":  # fp16 is for CUDA alone
        return Precision(fastest, f"{hardware}; this run began in {name}", device.type)
    return Precision(name, f"as when this run began, but slow here: {hardware}", device.type)


def _fastest_format(device: torch.device) -> tuple[str, str]:
    """The format whose products are fastest on this device, and what says so."""
    if device.type == "cuda":
        capability = cuda_capability(device)
        if capability is None or capability >= (8, 0):  # AMD's GPUs for torch all have it
            return "bf16", "this GPU has bf16 units"
        if capability >= (7, 0):
            return "fp16", "this GPU has fp16 units, but none for bf16"
        return "fp32", "this GPU has no bf16 or fp16 units"
    if device.type == "cpu":
        found = [name for name in ("amx_bf16", "avx512_bf16") if _cpu_capabilities().get(name)]
        if found:
            return "bf16", f"this CPU has {found[0]}"
        return "fp32", "this CPU has no bf16 units"
    if device.type == "mps":
        # before macOS 14 Metal has no bf16
        if torch.backends.mps.is_macos_or_newer(14, 0):
            return "bf16", "this Mac has bf16"
        return "fp32", "bf16 needs macOS 14"
    if xpu_has_bf16(device):
        return "bf16", "this GPU has bf16 units"
    return "fp32", "this GPU has no bf16 units"


def _cpu_capabilities() -> dict[str, object]:
    """What torch says of the processor's instruction sets."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        return get_capabilities()
    # before torch 2.12 the same facts have private names
    names = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {unit: getattr(torch.cpu, name, bool)() for unit, name in names.items()}
