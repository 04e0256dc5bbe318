"""Quantized weights for inference, where a decoding step is as fast as the weights are read.

The nn.Linear layers get bf16 or int8 weights; embeddings, norms and the residual stream stay fp32.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import SettingsError
from engine.precision import choose_precision

WEIGHTS = ("auto", "fp32", "bf16", "int8")
# of the highest logits, which are recomputed in fp32: bf16 can't tell 20.0 from 20.1
EXACT_LOGITS = 32
# what "auto" chooses from on a CPU: by name, the kind, and whether oneDNN multiplies one row
READERS = {
    "bf16 by torch": ("bf16", False),
    "bf16 by oneDNN": ("bf16", True),
    "fp32": ("fp32", True),
}
# weights that a trial multiplies: more than processors' caches hold. A model with fewer in all is
# about as fast either way
TRIAL_WEIGHTS = 2**25
# the int8 kernel goes row by row: with more rows a bf16 product is faster. It reads INT8_WIDTH
# weights at once, beyond the end of a row whose length is no multiple of that
MOST_INT8_ROWS, INT8_WIDTH = 16, 64


def choose_weights(requested: str, device: torch.device) -> str:
    """What weights "auto" or a kind means here. Raises SettingsError for int8 on a GPU."""
    if requested not in WEIGHTS:
        listed = ", ".join(f'"{kind}"' for kind in WEIGHTS)
        raise SettingsError(f'weights is "{requested}"; it must be one of {listed}')
    if requested == "int8" and device.type != "cpu":
        raise SettingsError(f'weights "int8" are for CPUs, and this is {device.type}; use "bf16"')
    if requested != "auto":
        return requested
    # any CPU is faster: a product of one row needs no bf16 units
    is_fast = device.type == "cpu" or choose_precision("auto", device).name == "bf16"
    return "bf16" if is_fast else "fp32"


def reading_trials(
    shapes: Sequence[tuple[int, int]], requested: str
) -> dict[str, Callable[[], object]]:
    """The READERS for "auto" or "bf16" weights of these (out, in) shapes, each as a product of
    one row by about TRIAL_WEIGHTS of them, to be timed."""
    sizes = [rows * columns for rows, columns in shapes]
    n = next((n for n in range(1, len(sizes)) if sum(sizes[:n]) >= TRIAL_WEIGHTS), len(sizes))

    def trial(dtype: torch.dtype, with_onednn: bool) -> Callable[[], object]:
        weights = [torch.full(shape, 0.01, dtype=dtype) for shape in shapes[:n]]
        inputs = [torch.full((1, shape[1]), 0.01, dtype=dtype) for shape in shapes[:n]]

        @torch.no_grad()
        def run() -> None:
            with contextlib.nullcontext() if with_onednn else OneRowProducts():
                for x, weight in zip(inputs, weights, strict=True):
                    F.linear(x, weight)

        return run

    return {
        name: trial(torch.float32 if kind == "fp32" else torch.bfloat16, with_onednn)
        for name, (kind, with_onednn) in READERS.items()
        if kind == "bf16" or requested == "auto"
    }


@functools.cache
def is_slow_in_bf16(device: torch.device) -> bool:
    """Whether bf16 products of many rows are slow: on a CPU without bf16 units."""
    return device.type == "cpu" and choose_precision("auto", device).name != "bf16"


def convert_weights(model: nn.Module, kind: str) -> None:
    """Replace a model's linear layers and its head by quantized ones; "fp32" changes nothing."""
    if kind == "fp32":
        return
    layer = Bf16Linear if kind == "bf16" else Int8Linear
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                converted = layer(child)
                setattr(parent, name, Head(converted) if child is model.head else converted)


class Bf16Linear(nn.Module):
    """A linear layer with bf16 weights and products."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16())
        self.register_buffer("bias", _bf16_bias(linear))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) of any float format -> (..., out) in bf16."""
        if x.device.type == "cpu" and x.numel() > x.shape[-1] and is_slow_in_bf16(x.device):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias).bfloat16()
        return F.linear(x.bfloat16(), self.weight, self.bias)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """The weights of some outputs, (..., in), in fp32."""
        return self.weight[indices].float()


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, a scale for each output, and bf16 products."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        scale = scale.bfloat16()  # the kernel's format: the weights take the rounding into account
        weight = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", _bf16_bias(linear))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) of any float format -> (..., out) in bf16."""
        flat = x.bfloat16().flatten(0, -2)
        kernel = getattr(torch, "_weight_int8pack_mm", None)  # torch has no public name for it
        if kernel and len(flat) <= MOST_INT8_ROWS and flat.shape[1] % INT8_WIDTH == 0:
            product = kernel(flat, self.weight, self.scale)
        elif is_slow_in_bf16(x.device):
            product = F.linear(x.float().flatten(0, -2), self.weight.float()).bfloat16()
            product = product * self.scale
        else:
            product = F.linear(flat, self.weight.bfloat16()) * self.scale
        if self.bias is not None:
            product = product + self.bias
        return product.unflatten(0, x.shape[:-1])

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """The weights of some outputs, (..., in), in fp32."""
        return self.weight[indices] * self.scale[indices].float()[..., None]


def _bf16_bias(linear: nn.Linear) -> torch.Tensor | None:
    return None if linear.bias is None else linear.bias.detach().bfloat16()


class Head(nn.Module):
    """The quantized head: fp32 logits, of which the highest are recomputed in fp32."""

    def __init__(self, linear: Bf16Linear | Int8Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., V)."""
        logits = self.linear(x).float()
        highest = logits.topk(min(EXACT_LOGITS, logits.shape[-1]), dim=-1).indices
        exact = (self.linear.rows(highest) @ x.float()[..., None])[..., 0]
        return logits.scatter(-1, highest, exact)


class OneRowProducts(contextlib.AbstractContextManager):
    """A context without oneDNN: torch's own kernel multiplies one row by bf16 twice as fast."""

    # the switch is global: the last thread that leaves restores what the first one found
    _lock = threading.Lock()
    _before: ClassVar[list[bool]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._before.append(torch.backends.mkldnn.enabled)
            torch.backends.mkldnn.enabled = False

    def __exit__(self, *_: object) -> None:
        with self._lock:
            torch.backends.mkldnn.enabled = self._before.pop()
