"""Causal attention: by torch's fused kernel, or on CPUs by plain products where those are faster.

Tensor letters: B batch, T positions, H heads, K key-value heads, D head_dim.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTIONS = ("fused", "plain")  # kernels of a CPU's training steps
# positions up to which plain products keep their weights, and take smaller blocks; the sizes were
# the fastest of 64, 128 and 256 for heads of 32 to 64 features
SHORT, SHORT_BLOCK, BLOCK = 256, 64, 128

# the texts in windows, each of which attends to itself alone: how long they are, one after another
# in all B x T positions; or a mask, (B, 1, T, T) bool, True where attended to
Parts: TypeAlias = list[int] | Tensor


def usual_attention(dtype: torch.dtype) -> str:
    """The kernel that is usually faster in a CPU's training steps: "fused" or "plain"."""
    return "plain" if dtype == torch.bfloat16 else "fused"


def count_kept_weights(device: torch.device, n_tokens: int, dropout: float) -> int:
    """At most how many weights of a window of n_tokens a head keeps for its backward pass."""
    if device.type != "cpu" or dropout > 0:
        return n_tokens**2
    if n_tokens > SHORT:
        return 0
    return sum((stop - first) * stop for first, stop in _blocks(n_tokens))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    *,
    is_plain: bool,
    keeps: bool | None = None,
) -> Tensor:
    """Causal attention of (B, H, T, D) queries over (B, K, T, D) keys and values: (B, H, T, D).

    On CPUs, is_plain trains with plain products in place of the fused kernel, whose backward pass
    does not use the bf16 matmul kernels. `keeps`: whether they keep their weights; None: those of
    short windows.
    """
    is_plain = is_plain and q.device.type == "cpu" and torch.is_grad_enabled()
    if torch.compiler.is_compiling() and q.shape[2] > SHORT:
        is_plain = False  # a compiler would take each block for itself
    if not is_plain or dropout > 0:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    B, H, T, D = q.shape
    K = k.shape[1]
    # queries that share keys and values are rows of one product
    q, k, v = q.reshape(B * K, H // K, T, D), k.flatten(0, 1), v.flatten(0, 1)
    with torch.autocast("cpu", enabled=False):  # all in the inputs' dtype
        attended = _PlainAttention.apply(q, k, v, T <= SHORT if keeps is None else keeps)
    return attended.reshape(B, H, T, D)


class _PlainAttention(torch.autograd.Function):
    """Causal attention of (N, G, T, D) queries over (N, T, D) keys and values, by products.

    A block of queries at a time has only the keys up to its end, and so up to half of all products
    are never computed. The weights of each block are kept for the backward pass, or computed again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keeps: bool) -> Tensor:
        attended, kept = torch.empty_like(q), []
        for first, stop in _blocks(q.shape[2]):
            weights = _weights(q, k, first, stop)
            found = torch.bmm(weights, v[:, :stop])
            attended[:, :, first:stop] = found.unflatten(1, (q.shape[1], -1))
            if keeps:
                kept.append(weights)
            del weights, found  # before the next ones are made
        ctx.save_for_backward(q, k, v, *kept)
        return attended

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_attended: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        scale = q.shape[3] ** -0.5
        d_q = torch.empty_like(q)
        # from the last block on, which has all keys
        for number, (first, stop) in reversed([*enumerate(_blocks(q.shape[2]))]):
            weights = kept[number] if kept else _weights(q, k, first, stop)
            rows, d_rows = (x[:, :, first:stop].flatten(1, 2) for x in (q, d_attended))
            d_weights = torch.bmm(d_rows, v[:, :stop].mT)
            d_scores = _softmax_backward(d_weights, weights)
            of_k, of_v = torch.bmm(d_scores.mT, rows), torch.bmm(weights.mT, d_rows)
            if stop == q.shape[2]:  # half precision would round the sums each time
                d_k, d_v = of_k.to(_sum_dtype(k)), of_v.to(_sum_dtype(v))
            else:
                d_k[:, :stop].add_(of_k)  # += would copy the sums onto themselves
                d_v[:, :stop].add_(of_v)
            found = torch.bmm(d_scores, k[:, :stop]).mul_(scale)
            d_q[:, :, first:stop] = found.unflatten(1, (q.shape[1], -1))
            del weights, d_weights, d_scores, of_k, of_v  # before the next ones are made
        return d_q, d_k.mul_(scale).to(k.dtype), d_v.to(v.dtype), None


def _softmax_backward(d_weights: Tensor, weights: Tensor) -> Tensor:
    """The gradient of a softmax's inputs."""
    operation = getattr(torch, "_softmax_backward_data", None)  # torch has no public name for it
    if operation is not None:
        return operation(d_weights, weights, -1, weights.dtype)
    products = d_weights.to(_sum_dtype(weights)) * weights
    return products.sub_(weights * products.sum(-1, keepdim=True)).to(weights.dtype)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(T: int) -> list[tuple[int, int]]:
    """Where each block of T queries begins and ends."""
    size = SHORT_BLOCK if T <= SHORT else BLOCK
    return [(first, min(T, first + size)) for first in range(0, T, size)]


def _weights(q: Tensor, k: Tensor, first: int, stop: int) -> Tensor:
    """The weights of the queries from first to stop for the keys up to stop: (N, G rows, stop)."""
    rows = q[:, :, first:stop].flatten(1, 2)
    nothing = rows.new_empty(())  # multiplied by beta, 0
    scores = torch.baddbmm(nothing, rows, k[:, :stop].mT, beta=0, alpha=q.shape[3] ** -0.5)
    later = torch.full((stop - first, stop - first), -math.inf, dtype=q.dtype).triu(1)
    scores.unflatten(1, (q.shape[1], -1))[..., first:].add_(later)
    return scores.softmax(-1)  # in fp32 within


def attention_step(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kernel: str
) -> Callable[[], object]:
    """One of ATTENTIONS as a forward and a backward pass over one window on a CPU; its shape is
    (H, K, T, D)."""
    H, K, T, D = shape
    q, k, v = (
        torch.full((1, heads, T, D), 0.1, dtype=dtype, requires_grad=True) for heads in (H, K, K)
    )

    def run() -> object:
        with torch.enable_grad():
            loss = attend(q, k, v, 0.0, is_plain=kernel == "plain").sum()
            return torch.autograd.grad(loss, (q, k, v))

    return run


def find_parts(starts: Tensor, *, as_mask: bool) -> Parts:
    """The Parts of windows, in which each position's text begins at starts, (B, T)."""
    T = starts.shape[1]
    places = torch.arange(T, device=starts.device)
    if as_mask:
        is_same = starts[:, None, :, None] == starts[:, None, None, :]  # (B, 1, T, T)
        return is_same & (places <= places[:, None])
    firsts = (starts == places).flatten().nonzero()[:, 0].tolist()
    return [stop - first for first, stop in itertools.pairwise([*firsts, starts.numel()])]


def attend_within(
    parts: Parts | None, q: Tensor, k: Tensor, v: Tensor, dropout: float, *, is_plain: bool
) -> Tensor:
    """attend(), within each of the parts; None: within the windows.

    With lengths, an attention for each part computes nothing that a mask would drop.
    """
    if parts is None:
        return attend(q, k, v, dropout, is_plain=is_plain)
    if isinstance(parts, Tensor):
        if q.shape[1] != k.shape[1] and q.device.type != "cpu":  # GPUs' masked kernels need it
            shared_by = q.shape[1] // k.shape[1]
            k, v = (tensor.repeat_interleave(shared_by, dim=1) for tensor in (k, v))
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=parts, dropout_p=dropout, enable_gqa=is_grouped
        )
    B, H, T, D = q.shape
    options = {"is_plain": is_plain, "keeps": T <= SHORT}  # memory is planned by windows
    rows = (tensor.transpose(1, 2).flatten(0, 1).split(parts) for tensor in (q, k, v))
    found = []
    for part in zip(*rows, strict=True):  # (N, H, D) or (N, K, D) each
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in part)
        found.append(attend(q, k, v, dropout, **options)[0].transpose(0, 1))
    return torch.cat(found).view(B, T, H, D).transpose(1, 2)
