"""The only place that computes cross-entropy: the head fused with its loss, in chunks of rows.

A batch's logits are its largest tensor (8 x 1024 x 50,257 in fp32: 1.6 GB). Here they exist for one
chunk only, since the forward pass computes the gradients of hidden states and head too.
"""

import math

import torch
from torch import Tensor, nn

from engine.compiling import what_prevents_compiling
from engine.console import say
from engine.devices import INDEXED, total_memory
from engine.errors import first_line, is_out_of_memory

GPU_CHUNK_ROWS = 8192
GPU_CHUNK_SHARE = 16  # a chunk's fp32 logits take at most 1 / this of a GPU's memory
FP16_LIFT = 2.0**6  # scales probabilities, since fp16 loses digits of the small ones
_kernel_failed = False


class _KernelError(Exception):
    """The Triton kernel does not compile or start here."""


def chunk_rows(hidden: Tensor, vocab_size: int) -> int:
    """The rows of hidden states (N, D) in a chunk.

    Each chunk accumulates a (V, D) head gradient. The CPU's numbers were the fastest for D of 64
    to 768 and V of 65 to 50,257.
    """
    if hidden.device.type == "cpu":
        return max(1024, 2**22 // vocab_size)
    fitting = total_memory(hidden.device) // GPU_CHUNK_SHARE // (4 * vocab_size)
    return max(256, min(GPU_CHUNK_ROWS, fitting))


def light_chunk_rows(hidden: Tensor, vocab_size: int) -> int:
    """chunk_rows() where no head gradient is needed: on a CPU fewer rows are as fast, and take less
    memory."""
    rows = chunk_rows(hidden, vocab_size)
    return min(rows, max(128, 2**22 // vocab_size)) if hidden.device.type == "cpu" else rows


def softmax_rows(hidden: Tensor, vocab_size: int) -> int:
    """The rows of logits (N, V) in one fp32 softmax; on a CPU few enough for its cache.

    0 where a kernel computes it from logits of any format.
    """
    if _has_kernel(hidden.device):
        return 0
    return GPU_CHUNK_ROWS if hidden.device.type != "cpu" else max(16, 2**20 // vocab_size)


def next_token_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    n_targets: float | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of the next token, in nats, as a 0-d fp32 tensor.

    hidden is (B, T, D), head_weight (V, D) and targets (B, T). Matrix products follow autocast;
    softmax and mean are fp32. With counted, the places of some targets among all B x T, only those
    count, and the head computes no others. The sum is divided by n_targets, those of the full batch
    for a micro-batch; None counts the targets given. Without any target it is 0.
    """
    rows, targets = hidden.flatten(0, -2), targets.flatten()
    if counted is not None:
        rows, targets = rows.index_select(0, counted), targets[counted]
    given = (rows, head_weight, targets, n_targets or max(1, len(targets)))
    if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
        return _HeadLoss.apply(*given)
    return _loss_and_gradients(*given, gradients=False)[0]


@torch.no_grad()
def token_losses(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each next token, (B, T) in nats, as next_token_loss() takes its mean."""
    rows, of_row = hidden.flatten(0, -2), targets.flatten()
    size = chunk_rows(rows, len(head_weight))
    losses = [
        nn.functional.cross_entropy(
            nn.functional.linear(rows[start : start + size], head_weight).float(),
            of_row[start : start + size],
            reduction="none",
        )
        for start in range(0, len(rows), size)
    ]
    return torch.cat(losses).view(targets.shape)


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
        # usually 1; only on a CPU does reading it need no synchronization
        if d_loss.device.type != "cpu" or d_loss.item() != 1:
            d_hidden = d_hidden * d_loss
            d_weight = None if d_weight is None else d_weight * d_loss
        return d_hidden, d_weight, None, None


def _has_kernel(device: torch.device) -> bool:
    """Whether the softmax is left to the Triton kernel: until it fails, where Triton compiles."""
    is_served = device.type in INDEXED and not what_prevents_compiling(device)
    return is_served and not _kernel_failed


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, n_targets: float, *, gradients: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of hidden (N, D), weight (V, D) and targets (N,), and both gradients; the second
    one is None for a frozen weight."""
    global _kernel_failed
    given = (hidden, weight, targets, n_targets)
    if _has_kernel(hidden.device):
        try:
            return _in_chunks(*given, gradients=gradients, by_kernel=True)
        except _KernelError as error:
            _kernel_failed = True
            say(f"The Triton kernel of the loss fails here; slower operations replace it: {error}")
    return _in_chunks(*given, gradients=gradients, by_kernel=False)


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_targets: float,
    *,
    gradients: bool,
    by_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """_loss_and_gradients() with the softmax by the Triton kernel or by torch's operations."""
    device_type, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    lift = FP16_LIFT if dtype == torch.float16 else 1.0
    with torch.autocast(device_type, enabled=False):
        total, d_hidden, d_weight, share = _sums_of_chunks(
            hidden.detach().to(dtype),
            weight.detach().to(dtype),
            targets,
            gradients=gradients,
            trains_head=gradients and weight.requires_grad,
            by_kernel=by_kernel,
            lift=lift,
        )
        if gradients:
            d_hidden = d_hidden.to(hidden.dtype).mul_(1 / (n_targets * lift))
        if d_weight is not None:
            # only here, where a chunk's buffers and the head's copy are freed
            d_weight = d_weight.float().mul_(1 / (n_targets * share * lift)).to(weight.dtype)
    return total / n_targets, d_hidden, d_weight


def _sums_of_chunks(
    rows: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    gradients: bool,
    trains_head: bool,
    by_kernel: bool,
    lift: float,
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """The sums of the losses and, times lift, of the gradients of rows and, times share, of head,
    in fp32 or of a single chunk; and share."""
    V, N = len(head), len(rows)
    padded, buffer = _buffers(rows, V, by_kernel=by_kernel, trains_head=trains_head)
    largest, at_once = len(padded), len(buffer)
    total = torch.zeros((), device=rows.device)
    d_rows = torch.empty_like(rows[: N * gradients])
    d_head = part = None
    # about 1 / rows, so that fp16 holds a chunk's sum; a power of two, so exact
    share = 0.5 ** round(math.log2(largest))
    for first in range(0, N, largest):
        x, y = rows[first : first + largest], targets[first : first + largest, None]
        d_logits = padded[: len(x)]
        logits = d_logits[:, :V]
        torch.mm(x, head.T, out=logits)
        for start in range(0, len(x), at_once):
            block = slice(start, start + at_once)
            if by_kernel:
                losses = _softmax_by_kernel(d_logits[block], y[block], V, lift)
            else:
                p, losses = _softmax_minus_target(logits[block], y[block], buffer)
                if gradients and p.dtype != rows.dtype:
                    logits[block].copy_(p if lift == 1 else p.mul_(lift))
            total += losses.sum()
        if gradients:
            if rows.device.type == "mps":  # nor an `out` that starts inside its storage
                d_rows[first : first + largest] = torch.mm(logits, head)
            else:
                torch.mm(logits, head, out=d_rows[first : first + largest])
        if trains_head:
            part = torch.mm(d_logits.T, x * share, out=part)
            if d_head is None:
                d_head = part[:V] if len(x) == N else part[:V].to(torch.float32, copy=True)
            else:
                d_head += part[:V]
    if trains_head and d_head is None:  # N is 0
        d_head = torch.zeros_like(head)
    return total, d_rows, d_head, share


def _buffers(rows: Tensor, V: int, *, by_kernel: bool, trains_head: bool) -> tuple[Tensor, Tensor]:
    """Buffers for a chunk's logits, of width V or padded, and for those in one fp32 softmax.

    They are the same where the softmax works in place. All chunks use them: allocating costs more
    than the arithmetic.
    """
    most = (chunk_rows if trains_head else light_chunk_rows)(rows, V)
    n_chunks = max(1, -(-len(rows) // most))
    largest = max(1, -(-len(rows) // n_chunks))  # equal chunks: no small one at the end
    is_fp32 = rows.dtype == torch.float32
    # padding V with zeros to a multiple of 64 speeds up the product for the head's gradient. The
    # plain softmax in place would copy a padded buffer, and before macOS 15 Metal does not write
    # an `out` with gaps between its rows (pytorch#104832)
    is_dense = rows.device.type == "mps" or (is_fp32 and not by_kernel)
    padded = rows.new_empty(largest, V if is_dense else -(-V // 64) * 64)
    padded[:, V:] = 0
    if is_fp32 or by_kernel:
        return padded, padded
    return padded, torch.empty(min(largest, softmax_rows(rows, V)), V, device=rows.device)


def _softmax_minus_target(logits: Tensor, target: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of some rows' logits, (N, V) in the buffer, and the rows' losses, (N, 1).

    It is the softmax, less 1 at the target. The buffer is fp32 and may be the logits' own storage.
    """
    p = buffer[: len(logits)]
    if p.dtype != logits.dtype:
        p.copy_(logits)
    # from the likeliest token's probability, which is at least 1 / V
    highest, of_target = p.amax(1, keepdim=True), p.gather(1, target)
    torch.softmax(p, 1, out=p)
    log_sum = highest - p.amax(1, keepdim=True).log()
    p.scatter_(1, target, (of_target - log_sum).expm1())
    return p, log_sum - of_target


def _softmax_by_kernel(logits: Tensor, target: Tensor, V: int, scale: float) -> Tensor:
    """The losses of rows of V logits and padding, which become their gradient times scale."""
    try:
        from engine.loss_kernel import softmax_minus_target_  # imports Triton

        logits[:, V:] = -math.inf
        return softmax_minus_target_(logits, target[:, 0], scale)
    except Exception as error:  # compilers raise errors of any type
        if is_out_of_memory(error):
            raise
        raise _KernelError(f"{type(error).__name__}: {first_line(error)}") from error
