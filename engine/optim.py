"""AdamW with its parameter groups, and learning rates as pure functions of the step."""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

SCHEDULES = ("cosine", "wsd", "constant")
FLOOR = 0.1  # a schedule that decays ends at this share of its peak
WSD_DECAY_SHARE = 0.2  # of the run, at its end


@dataclass(frozen=True)
class Schedule:
    """A learning-rate plan: linear warm-up to peak, then kind, over total_steps optimizer steps.

    decay_steps is what "wsd" keeps for its decay; the other kinds have none.
    """

    kind: str
    peak: float
    warmup_steps: int
    total_steps: int
    decay_steps: int = 0


def learning_rate_at(step: int, schedule: Schedule) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Warm-up rises in equal parts and is never 0. Then "constant" stays at the peak; "cosine" falls
    to FLOOR times the peak at the last step; "wsd" (warm-up, stable, decay; Hu et al. 2024,
    "MiniCPM") stays at the peak and falls in a line to that floor over its last decay_steps. Past
    the plan's end the rate stays where it was.
    """
    if step < schedule.warmup_steps:
        return schedule.peak * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return schedule.peak
    if schedule.kind == "wsd":
        to_go = max(0, schedule.total_steps - 1 - step)  # steps after this one
        share = min(1.0, to_go / max(1, schedule.decay_steps))
        return schedule.peak * (FLOOR + (1 - FLOOR) * share)
    decay_steps = max(1, schedule.total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    return schedule.peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_schedule(kind: str, peak: float, warmup_steps: int, total_steps: int) -> Schedule:
    """The plan of a new run; the decay of "wsd" never reaches into the warm-up."""
    decay_steps = 0
    if kind == "wsd":
        decay_steps = min(math.ceil(WSD_DECAY_SHARE * total_steps), total_steps - warmup_steps)
    return Schedule(kind, peak, warmup_steps, total_steps, decay_steps)


def extend_schedule(schedule: Schedule, total_steps: int, step: int) -> Schedule:
    """The plan of a run that is to have more steps than it was planned for, `step` of them done.

    The rates of the old plan stay as they were, and the added steps run at its last rate. Only
    where the decay of "wsd" has not begun it moves to the new end.
    """
    has_decayed = step > schedule.total_steps - schedule.decay_steps
    if schedule.kind != "wsd" or has_decayed or total_steps <= schedule.total_steps:
        return schedule
    return replace(schedule, total_steps=total_steps)


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
