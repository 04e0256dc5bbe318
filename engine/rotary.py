"""Rotary positions (Su et al. 2021), in few passes over memory in a CPU's training steps.

Tensor letters: B batch, T positions, D head_dim.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """Rotary positions (Su et al. 2021): p turns features i, i + D/2 by p * theta ** (-2i / D)."""

    def __init__(
        self, length: int, head_dim: int, theta: float, scaling: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        # on the CPU even if the weights are still on the meta device
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        positions = torch.arange(length, dtype=torch.float32, device="cpu")
        frequencies = theta ** (-pairs / head_dim)
        if scaling is not None:
            frequencies = scaled_frequencies(frequencies, scaling)
        angles = positions[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The angles' cosines and sines, (..., D / 2) each, at some positions."""
        return self.cos[positions], self.sin[positions]


def scaled_frequencies(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Rotary frequencies of a context that was made longer after pretraining.

    "linear" divides all by the factor; "llama3" only those of wavelengths beyond the original
    context / low_freq_factor, fewer and fewer down to / high_freq_factor (Llama 3.1's rule).
    """
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, heads, D) by its positions' angles, (T, D / 2) or (B, T, D / 2), in fp32."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for every head
    is_step = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if is_step and x.device.type == "cpu":
        return _Rotation.apply(x, cos, sin)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """rotate(), whose backward pass rotates back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(d_y, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x32 = x.float()
    first, second = x32.chunk(2, dim=-1)
    y = x32 * torch.cat((cos, cos), dim=-1)
    y_first, y_second = y.chunk(2, dim=-1)
    y_first.addcmul_(second, sin, value=-1)
    y_second.addcmul_(first, sin)
    return y.to(x.dtype)
