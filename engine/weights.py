"""Weights in fewer bits, for using a model: a step of one token is as fast as they are read.

Products read bf16 or int8 weights; what runs through the model stays fp32 between them. Only the
nn.Linear layers are replaced, so embeddings and norms are as they were.
"""

import contextlib
import functools
import threading

import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import SettingsError
from engine.precision import choose_precision

WEIGHTS = ("auto", "fp32", "bf16", "int8")
# so many of the highest logits are computed once more: bf16 can't tell 20.0 from 20.1
EXACT_LOGITS = 32
# the int8 kernel takes a row at a time, above this a product of bf16 weights is faster; and it
# reads so many weights at once, past the end of a row that has not as many
MOST_INT8_ROWS, INT8_WIDTH = 16, 64


def choose_weights(requested: str, device: torch.device) -> str:
    """Turn "auto" into "bf16" where tokens come faster with it, else "fp32".

    They do on every CPU: a product of one row needs no bf16 units there. Raises SettingsError for
    int8 anywhere but on a CPU: GPUs are slower with it at this size.
    """
    if requested not in WEIGHTS:
        listed = ", ".join(f'"{kind}"' for kind in WEIGHTS)
        raise SettingsError(f'weights is "{requested}"; it must be one of {listed}')
    if requested == "int8" and device.type != "cpu":
        raise SettingsError(f'weights "int8" are for CPUs, and this is {device.type}; use "bf16"')
    if requested == "auto":
        is_fast = device.type == "cpu" or choose_precision("auto", device).name == "bf16"
        return "bf16" if is_fast else "fp32"
    return requested


@functools.cache
def is_slow_in_bf16(device: torch.device) -> bool:
    """Whether products of many rows are slow in bf16: on a CPU without units for it."""
    return device.type == "cpu" and choose_precision("auto", device).name != "bf16"


def convert_weights(model: nn.Module, kind: str) -> None:
    """Replace the linear layers of a model, its head among them, by such of fewer bits."""
    if kind == "fp32":
        return
    layer = {"bf16": Bf16Linear, "int8": Int8Linear}[kind]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                converted = layer(child)
                setattr(parent, name, Head(converted) if child is model.head else converted)


class Bf16Linear(nn.Module):
    """A linear layer whose weights and product are bf16: (..., in) -> (..., out) in bf16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16())
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any float format in, bf16 out."""
        if x.device.type == "cpu" and x.numel() > x.shape[-1] and is_slow_in_bf16(x.device):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias).bfloat16()
        return F.linear(x.bfloat16(), self.weight, self.bias)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """The weights of some outputs, (..., in), in fp32."""
        return self.weight[indices].float()


class Int8Linear(nn.Module):
    """A linear layer of int8 weights, each output with its own scale; the product is bf16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        scale = scale.bfloat16()  # the kernel's format; rounded before the weights are
        weight = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("scale", scale)
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any float format in, bf16 out."""
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


class Head(nn.Module):
    """The head in fewer bits, (B, C) -> (B, V) logits in fp32, the highest of them exact ones."""

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
    """Where one row meets each weight: torch's own kernel reads bf16 twice as fast as oneDNN.

    The switch is the whole process's: the first thread that enters turns oneDNN off, and the last
    that leaves restores it.
    """

    _lock = threading.Lock()
    _n_inside = 0
    _was_enabled = True

    def __enter__(self) -> None:
        cls = type(self)
        with cls._lock:
            if cls._n_inside == 0:
                cls._was_enabled = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False
            cls._n_inside += 1

    def __exit__(self, *_: object) -> None:
        cls = type(self)
        with cls._lock:
            cls._n_inside -= 1
            if cls._n_inside == 0:
                torch.backends.mkldnn.enabled = cls._was_enabled
