"""The softmax of logits and its gradient in one kernel, for the GPUs that Triton compiles for.

Importing this imports Triton. The kernel reads each row of logits twice and writes it once, in the
logits' own format. The plain operations of engine/loss.py read and write fp32 copies of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.devices import as_current

_BLOCK = 4096  # logits that one program holds at once
_LIBRARY = torch.library.Library("gpt_loss", "DEF")
# an operator of torch's, so that fake tensors and profilers see one operation
_NAME = _LIBRARY.define(
    "softmax_minus_target_(Tensor(a!) logits, Tensor target, float scale) -> Tensor"
)


def softmax_minus_target_(logits: Tensor, target: Tensor, scale: float) -> Tensor:
    """Replace logits (N, W) by their gradient, and return the rows' losses, (N,) in fp32.

    The gradient is scale * softmax, less scale at the target (N,), computed in fp32. Where W is a
    multiple of 8, a thread moves 16 bytes of bf16 at once; logits of -inf may fill a row up to it.
    Raises any exception of Triton's where it can't compile.
    """
    return torch.ops.gpt_loss.softmax_minus_target_(logits, target, scale)


@torch.library.impl(_LIBRARY, _NAME, "CompositeExplicitAutograd")
def _launch(logits: Tensor, target: Tensor, scale: float) -> Tensor:
    N, W = logits.shape
    assert logits.is_contiguous() and target.shape == (N,), "the kernel steps through rows of W"
    losses = torch.empty(N, device=logits.device)
    block = min(_BLOCK, max(128, triton.next_power_of_2(W)))
    with as_current(logits.device):
        _softmax_kernel[(N,)](
            logits, target.contiguous(), losses, scale, W, block, num_warps=max(1, block // 512)
        )
    return losses


@torch.library.register_fake(f"gpt_loss::{_NAME}", lib=_LIBRARY)
def _fake(logits: Tensor, target: Tensor, scale: float) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


@triton.jit
def _softmax_kernel(logits, target, losses, scale, W: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # N * W may exceed 2^31
    logits += row * W
    y = tl.load(target + row)
    of_target = tl.load(logits + y).to(tl.float32)
    # finite: a block of -inf alone would give inf - inf
    highest = -3.0e38
    others = tl.zeros([BLOCK], tl.float32)
    for start in range(0, W, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < W, other=float("-inf")).to(tl.float32)
        before, highest = highest, tl.maximum(highest, tl.max(x, 0))
        others *= tl.exp(before - highest)
        others += tl.where(token == y, 0.0, tl.exp(x - highest))
    # the target's probability less 1 is minus that of the others, which 1 - p would round away
    sum_of_others = tl.sum(others, 0)
    total = sum_of_others + tl.exp(of_target - highest)
    tl.store(losses + row, tl.log(total) - (of_target - highest))
    share = scale / total
    for start in range(0, W, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < W, other=float("-inf")).to(tl.float32)
        d = tl.where(token == y, -sum_of_others, tl.exp(x - highest)) * share
        tl.store(logits + token, d.to(logits.dtype.element_ty), mask=token < W)
