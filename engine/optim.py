"""AdamW with its parameter groups, and learning rates as pure functions of the step."""

import math
from dataclasses import dataclass

import torch
from torch import nn

SCHEDULES = ("cosine", "constant")
FLOOR = 0.1  # a cosine schedule ends at this share of its peak


@dataclass(frozen=True)
class Schedule:
    """A learning-rate plan: linear warm-up to peak, then kind, over total_steps optimizer steps."""

    kind: str
    peak: float
    warmup_steps: int
    total_steps: int


def learning_rate_at(step: int, schedule: Schedule) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Warm-up rises in equal parts and is never 0; "cosine" then falls to FLOOR times the peak at
    the last step and stays there, "constant" stays at the peak.
    """
    if step < schedule.warmup_steps:
        return schedule.peak * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return schedule.peak
    decay_steps = max(1, schedule.total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    return schedule.peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def default_learning_rate(emb_dim: int) -> float:
    """A peak for AdamW that suits a model of this width: 6e-4 at 768, inversely to the width.

    Narrower than 64, the rate of 64 holds. Rates of matrices scale like this from width to width
    (Yang et al. 2022, "Tensor Programs V").
    """
    return 6e-4 * 768 / max(emb_dim, 64)


def default_warmup_steps(total_steps: int) -> int:
    """A tenth of the run, at most 100 steps."""
    return min(100, total_steps // 10)


def default_eval_freq(total_steps: int) -> int:
    """Steps between evaluations: ten in a run, or one every 100 steps of a long one."""
    return max(1, min(100, total_steps // 10))


def build_adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the model's parameters; only the weights of Linear layers decay.

    Norms, biases and embeddings (a head tied to them too) are left alone by weight decay.
    """
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} - embeddings
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if p not in decayed], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in trained)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
