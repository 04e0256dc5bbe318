"""The only place that computes cross-entropy."""

import torch
import torch.nn.functional as F


def next_token_loss(
    hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats, as a 0-d fp32 tensor.

    hidden is (B, T, D), head_weight (V, D) and targets (B, T). The product runs in whatever
    precision autocast sets; softmax and mean are fp32.
    """
    logits = F.linear(hidden, head_weight)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
