"""RMSNorm (Zhang and Sennrich 2019) in few passes over memory, which a CPU's training waits for."""

from typing import Any

import torch
from torch import Tensor, nn

EXACT = (torch.float32, torch.float64)  # dtypes whose sums need no other one


class RMSNorm(nn.RMSNorm):
    """torch's over the last dimension, whose training steps on a CPU keep little but its input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        is_step = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if is_step and x.device.type == "cpu" and x.dtype == self.weight.dtype in EXACT:
            return _RMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        normalized = x * inverse
        product = d_y * normalized
        rows = product.reshape(-1, x.shape[-1])
        d_weight = rows.sum(0) if ctx.needs_input_grad[1] else None
        # the mean of each row's products with the gradient of what is normalized
        mean = torch.mv(rows, weight).div_(x.shape[-1]).view(inverse.shape)
        d_x = torch.mul(d_y, weight, out=product)
        return d_x.addcmul_(normalized, mean, value=-1).mul_(inverse), d_weight, None
