"""The only place that computes cross-entropy: the head and its loss together, in chunks of rows.

The logits of a batch are its largest tensor by far (8 x 1024 x 50,257 in fp32: 1.6 GB), and their
gradient is as large. Both only ever exist for a chunk here: the gradients of the hidden states
and of the head are computed along with the loss, while the chunk's logits are at hand.
"""

import math

import torch

from engine.devices import total_memory

GPU_CHUNK_ROWS = 8192
GPU_CHUNK_SHARE = 16  # a chunk's logits in fp32 take at most this part of a GPU's memory
FP16_LIFT = 2.0**6  # probabilities are multiplied by it: of the small ones fp16 has few digits


def chunk_rows(hidden: torch.Tensor, vocab_size: int) -> int:
    """How many rows of hidden states (N, D) to go through at a time.

    Few rows make slow products, and each chunk adds a gradient of the head's size (V, D) to that
    of the others. On a CPU these numbers were the fastest for D of 64 to 768, V of 65 to 50,257.
    """
    if hidden.device.type == "cpu":
        return max(1024, 2**22 // vocab_size)
    fitting = total_memory(hidden.device) // GPU_CHUNK_SHARE // (4 * vocab_size)
    return max(256, min(GPU_CHUNK_ROWS, fitting))


def softmax_rows(hidden: torch.Tensor, vocab_size: int) -> int:
    """How many rows of logits (N, V) to turn into probabilities at a time, in fp32.

    On a CPU few of them stay in its caches.
    """
    return GPU_CHUNK_ROWS if hidden.device.type != "cpu" else max(16, 2**20 // vocab_size)


def next_token_loss(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    n_targets: float | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats, as a 0-d fp32 tensor.

    hidden is (B, T, D), head_weight (V, D) and targets (B, T). The products run in autocast's
    precision where it is on, softmax and mean in fp32. n_targets is what the sum is divided by,
    where these are a part of a larger batch; None is the number of targets. B may be 0 where
    n_targets is given.
    """
    rows, flat_targets = hidden.flatten(0, -2), targets.flatten()
    n_targets = n_targets or flat_targets.numel()
    wants_gradients = torch.is_grad_enabled() and (
        hidden.requires_grad or head_weight.requires_grad
    )
    if wants_gradients:
        return _HeadLoss.apply(rows, head_weight, flat_targets, n_targets)
    return _loss_and_gradients(rows, head_weight, flat_targets, n_targets, gradients=False)[0]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, n_targets):
        loss, d_hidden, d_weight = _loss_and_gradients(
            hidden, weight, targets, n_targets, gradients=True
        )
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        # the host may look at a CPU's tensor without waiting; 1 is the usual case
        if d_loss.device.type != "cpu" or d_loss.item() != 1:
            d_hidden, d_weight = d_hidden * d_loss, d_weight * d_loss
        return d_hidden, d_weight, None, None


def _loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    n_targets: int,
    *,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The loss of hidden (N, D), weight (V, D) and targets (N,), and both gradients."""
    device_type, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        rows, head = hidden.detach().to(dtype), weight.detach().to(dtype)
        V, N = len(head), len(rows)
        n_chunks = max(1, -(-N // chunk_rows(rows, V)))
        largest = -(-N // n_chunks)  # all of one size, no small one at the end
        # new memory for each chunk would cost more than the arithmetic on it; columns of zeros
        # up to a multiple of 64 speed up the product for the head's gradient. Before macOS 15
        # Metal leaves an `out` with gaps between its rows unwritten (pytorch#104832)
        is_dense = dtype == torch.float32 or device_type == "mps"
        width = V if is_dense else -(-V // 64) * 64
        padded = rows.new_empty(largest, width)
        padded[:, V:] = 0
        at_once = largest if dtype == torch.float32 else min(largest, softmax_rows(rows, V))
        buffer = padded if dtype == torch.float32 else torch.empty(at_once, V, device=rows.device)
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(rows) if gradients else None
        d_weight = part = None
        # near 1 / rows, so that fp16 holds a chunk's sum and its small parts too; a power of two,
        # so that no digit is lost
        share = 0.5 ** round(math.log2(max(1, largest)))
        lift = FP16_LIFT if dtype == torch.float16 else 1.0
        for first in range(0, N, max(1, largest)):
            x, y = rows[first : first + largest], targets[first : first + largest, None]
            d_logits = padded[: len(x)]
            logits = d_logits[:, :V]
            torch.mm(x, head.T, out=logits)
            for start in range(0, len(x), at_once):
                block, target = logits[start : start + at_once], y[start : start + at_once]
                p, losses = _softmax_minus_target(block, target, buffer)
                total += losses.sum()
                if gradients and p.dtype != block.dtype:
                    block.copy_(p if lift == 1 else p.mul_(lift))
            if gradients:
                if device_type == "mps":  # and one that begins within its memory
                    d_hidden[first : first + largest] = torch.mm(logits, head)
                else:
                    torch.mm(logits, head, out=d_hidden[first : first + largest])
                part = torch.mm(d_logits.T, x * share, out=part)
                if d_weight is None:
                    d_weight = part[:V].to(torch.float32, copy=True)
                else:
                    d_weight += part[:V]
        if gradients:
            d_hidden = d_hidden.to(hidden.dtype).mul_(1 / (n_targets * lift))
            if d_weight is None:  # there are no targets here
                d_weight = torch.zeros(head.shape, device=head.device)
            d_weight = d_weight.mul_(1 / (n_targets * share * lift)).to(weight.dtype)
    return total / n_targets, d_hidden, d_weight


def _softmax_minus_target(
    logits: torch.Tensor, target: torch.Tensor, buffer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient by the logits of some rows, (N, V) in the buffer, and their losses, (N, 1).

    It is the softmax, less 1 at the target. The buffer is fp32, and may be the logits' own memory.
    """
    p = buffer[: len(logits)]
    if p.dtype != logits.dtype:
        p.copy_(logits)
    # by way of the likeliest token, whose probability is at least 1 / V
    highest, of_target = p.amax(1, keepdim=True), p.gather(1, target)
    torch.softmax(p, 1, out=p)
    log_sum = highest - p.amax(1, keepdim=True).log()
    p.scatter_(1, target, (of_target - log_sum).expm1())
    return p, log_sum - of_target
