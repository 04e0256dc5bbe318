"""Linear layers that need little memory for a training step in bf16 on a CPU."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.compiling import is_compiled
from engine.precision import Precision

LEAST = 65_536  # of a weight's elements, from which it is worth while
AT_ONCE = 4_000_000  # elements, whose fp32 gradients the update needs at a time


class Linear(nn.Linear):
    """nn.Linear, whose weight's gradient HalfGradients may take.

    Autocast keeps a copy of the weight in bf16 for the backward pass, which gives its gradient in
    bf16 and casts that to fp32. With HalfGradients the backward pass casts the weight again, and
    the gradient stays in bf16: the same values, for a third of the memory.
    """

    _take: Callable[[nn.Parameter, Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self._take is None:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.bfloat16()
        return _Product.apply(x.bfloat16(), self.weight, bias, self._take)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: Tensor | None,
        take: Callable[[nn.Parameter, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(x)
        # not saved: hooks for saved tensors would give another object back
        ctx.weight, ctx.take, ctx.has_bias = weight, take, bias is not None
        return F.linear(x, weight.bfloat16(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (N, out)
        ctx.take(ctx.weight, rows.T @ x.flatten(0, -2))
        d_x = (rows @ ctx.weight.bfloat16()).view_as(x)
        return d_x, None, rows.sum(0) if ctx.has_bias else None, None


class HalfGradients:
    """The gradients of some layers' weights in bf16, from a backward pass to the optimizer's step.

    For a step with a single backward pass, which uses each weight once, so that nothing is added
    up; the optimizer must treat each parameter by itself. It is False where it has no layers.
    """

    def __init__(self, layers: list[Linear]) -> None:
        self._layers = layers
        self._kept: dict[nn.Parameter, Tensor] = {}
        self.norms: list[Tensor] = []  # of each gradient, 0-d fp32

    def __bool__(self) -> bool:
        return bool(self._layers)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take the gradients of the forward and backward passes in here."""
        try:
            for layer in self._layers:
                layer._take = self._keep
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("_take", None)

    def _keep(self, weight: nn.Parameter, grad: Tensor) -> None:
        assert weight not in self._kept, "used twice"
        self._kept[weight] = grad
        # at once, while it is in the cache
        self.norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))

    def make_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """AdamW's averages, as its first step would make them: before the first forward pass they
        do not come to lie between activations, where freed memory is of little use."""
        is_first = bool(self) and not optimizer.state
        for group in optimizer.param_groups if is_first else ():
            for p in group["params"] if not group["amsgrad"] else ():  # which has a third one
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros(()), **moments}

    def update(self, optimizer: torch.optim.Optimizer, factor: Tensor | float) -> None:
        """The optimizer's step: of the parameters that have a gradient, then of the layers' weights
        with theirs times factor, some at a time."""
        optimizer.step()
        optimizer.zero_grad()
        waiting = 0
        while self._kept:
            weight = next(iter(self._kept))
            weight.grad = self._kept.pop(weight).float().mul_(factor)
            waiting += weight.numel()
            if waiting >= AT_ONCE or not self._kept:
                optimizer.step()
                optimizer.zero_grad()
                waiting = 0


def half_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, *, adds_up: bool
) -> HalfGradients:
    """Those of an optimizer's step. adds_up: whether gradients of several passes, or of other
    ranks, are added up."""
    fits = isinstance(optimizer, torch.optim.AdamW) and not adds_up
    return HalfGradients(layers_in_half(model, precision) if fits else [])


def layers_in_half(model: nn.Module, precision: Precision) -> list[Linear]:
    """The layers of a model whose gradients HalfGradients can take: those with large weights, on a
    CPU in bf16. A GPU's optimizer has one kernel for all weights."""
    if precision.name != "bf16" or is_compiled(model):
        return []
    return [
        layer
        for layer in model.modules()
        if isinstance(layer, Linear)
        and (weight := layer.weight).is_cpu
        and weight.requires_grad
        and weight.numel() >= LEAST
    ]
