"""AdamW and Muon with their parameter groups; learning rates as pure functions of the step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import nn
from torch.optim.adamw import adamw

from engine.devices import KINDS
from engine.precision import DTYPES, choose_precision

OPTIMIZERS = ("adamw", "muon")
BETAS, EPS = (0.9, 0.95), 1e-8  # AdamW's
# Muon's, as in torch.optim.Muon
MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5
MUON_RMS = 0.2  # what AdamW's updates have as a rule, so that its learning rates serve both
MOST_AT_ONCE = 2**22  # numbers in a stack of matrices: more is no faster and takes memory

SCHEDULES = ("cosine", "wsd", "constant")
FLOOR = 0.1  # a schedule that decays ends at this share of its peak
# of a run's evaluations where nothing is set: how many, and the most steps between two of them
EVALUATIONS, LONGEST_EVAL_FREQ = 10, 100
MUON_TIMES_ADAMW = 2.5  # in the learning rate that is best for a model 192 wide
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


def default_learning_rate(emb_dim: int, optimizer: str = "adamw") -> float:
    """A peak that suits a model of this width: for AdamW 6e-4 at 768, inversely to the width.

    Narrower than 64, the rate of 64 holds. Rates of matrices scale like this from width to width
    (Yang et al. 2022, "Tensor Programs V"). Muon bears more (benchmarks/learn.py).
    """
    return 6e-4 * 768 / max(emb_dim, 64) * MUON_TIMES_ADAMW ** (optimizer == "muon")


def default_warmup_steps(total_steps: int) -> int:
    """A tenth of the run, at most 100 steps."""
    return min(100, total_steps // 10)


def default_eval_freq(total_steps: int) -> int:
    """Steps between evaluations: ten in a run, or one every 100 steps of a long one."""
    return max(1, min(LONGEST_EVAL_FREQ, total_steps // EVALUATIONS))


def build_optimizer(
    kind: str, model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer that TrainingConfig.optimizer names, over the model's parameters.

    "muon" needs a model that has hidden_matrices(), as GPTModel does.
    """
    build = {"adamw": build_adamw, "muon": build_muon}[kind]
    return build(model, learning_rate, weight_decay)


def build_adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the model's parameters; only the weights of Linear layers decay.

    Norms, biases and embeddings (a head tied to them too) are left alone by weight decay.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        _adamw_groups(model, trained, weight_decay),
        lr=learning_rate,
        betas=BETAS,
        eps=EPS,
        fused=_has_fused_adamw(trained),
    )


def build_muon(model: nn.Module, learning_rate: float, weight_decay: float) -> "Muon":
    """Muon for the matrices in the model's blocks, AdamW as build_adamw's for all the rest.

    model.hidden_matrices() says which matrices those are.
    """
    matrices = [(weight, rows) for weight, rows in model.hidden_matrices() if weight.requires_grad]
    hidden = {weight for weight, _ in matrices}
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if p not in hidden]
    precision = choose_precision("auto", next(model.parameters()).device)
    return Muon(
        matrices,
        _adamw_groups(model, rest, weight_decay),
        learning_rate,
        weight_decay,
        fused=_has_fused_adamw(trained),
        dtype=DTYPES[precision.name],
    )


def _adamw_groups(
    model: nn.Module, parameters: list[nn.Parameter], weight_decay: float
) -> list[dict]:
    """The parameters in two groups: weights of Linear layers, which decay, and the others."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} - embeddings
    return [
        {"params": [p for p in parameters if p in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p not in decayed], "weight_decay": 0.0},
    ]


def _has_fused_adamw(parameters: list[nn.Parameter]) -> bool:
    return all(p.device.type in KINDS for p in parameters)


class Muon(torch.optim.Optimizer):
    """Muon for matrices (Jordan et al. 2024), and AdamW for the parameters that are none.

    A matrix moves along its momentum made orthogonal, scaled to the size of AdamW's updates (Liu
    et al. 2025, "Muon is scalable for LLM training"), so both take the same learning rate. Each
    of `matrices` is a weight with the row counts of the matrices that are merged in it, which are
    made orthogonal one by one. The iteration for that runs in dtype, over all matrices of one
    shape together. Like a fused torch.optim.AdamW it obeys found_inf and grad_scale, where fused
    is True: a bad step changes nothing, and the device decides that.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[nn.Parameter, tuple[int, ...]]],
        adamw_groups: list[dict],
        learning_rate: float,
        weight_decay: float,
        *,
        fused: bool = True,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        muon_group = {
            "params": [weight for weight, _ in matrices],
            "rows": [rows for _, rows in matrices],
            "weight_decay": weight_decay,
        }
        groups = [muon_group] + [group | {"fused": fused} for group in adamw_groups]
        super().__init__(groups, {"lr": learning_rate})
        self._dtype = dtype
        self._step_supports_amp_scaling = fused

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step along the parameters' gradients; returns what the closure does, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if scale is not None and parameters:
                for_each("div_", [p.grad for p in parameters], scale)
            if "rows" in group:
                self._move_matrices(group, found_inf)
            else:
                self._move_by_adamw(group, parameters, found_inf)
        return loss

    def _move_by_adamw(
        self, group: dict, parameters: list[nn.Parameter], found_inf: torch.Tensor | None
    ) -> None:
        for p in parameters:
            if not self.state[p]:
                # where it is not fused, AdamW reads the count on the host
                device = p.device if group["fused"] else "cpu"
                self.state[p]["step"] = torch.zeros((), device=device)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            found_inf=found_inf,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPS,
            maximize=False,
        )

    def _move_matrices(self, group: dict, found_inf: torch.Tensor | None) -> None:
        of_shape: dict[torch.Size, list[tuple[torch.Tensor, ...]]] = {}
        for p, rows in zip(group["params"], group["rows"], strict=True):
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if hasattr(p, "full_tensor"):
                self._move_parts(p, rows, group["lr"], group["weight_decay"], found_inf)
                continue
            merged = (p, p.grad, self.state[p]["momentum_buffer"])
            for matrix in zip(*(tensor.split(rows) for tensor in merged), strict=True):
                of_shape.setdefault(matrix[0].shape, []).append(matrix)
        for shape, matrices in of_shape.items():
            count = max(1, MOST_AT_ONCE // shape.numel())
            for first in range(0, len(matrices), count):
                stack = zip(*matrices[first : first + count], strict=True)
                self._move_stack(*stack, group["lr"], group["weight_decay"], found_inf)

    def _move_stack(
        self,
        weights: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        momenta: Sequence[torch.Tensor],
        learning_rate: float,
        weight_decay: float,
        found_inf: torch.Tensor | None,
    ) -> None:
        """Move matrices of one shape."""
        decay = 1 - learning_rate * weight_decay
        if found_inf is not None:
            bad = found_inf.bool()
            decay = torch.where(bad, 1.0, decay)
            # a momentum that takes its gradient's place stays what it is
            grads = [torch.where(bad, m, g) for m, g in zip(momenta, grads, strict=True)]
        for_each("lerp_", momenta, grads, 1 - MOMENTUM)
        ahead = for_each("lerp", grads, momenta, MOMENTUM)  # Nesterov's
        updates = orthogonalize(torch.stack(ahead), self._dtype)
        if found_inf is not None:
            updates *= ~bad
        # the rms of an orthogonal matrix is 1 / sqrt(its longer side)
        size = MUON_RMS * math.sqrt(max(updates.shape[1:]))
        for_each("mul_", weights, decay)
        for_each("add_", weights, updates.unbind(), alpha=-learning_rate * size)

    def _move_parts(
        self,
        p: nn.Parameter,
        rows: tuple[int, ...],
        learning_rate: float,
        weight_decay: float,
        found_inf: torch.Tensor | None,
    ) -> None:
        """Move a weight of which each rank has a part: every rank makes the whole orthogonal."""
        from torch.distributed.tensor import distribute_tensor

        momentum, grad = self.state[p]["momentum_buffer"], p.grad
        decay = 1 - learning_rate * weight_decay
        if found_inf is not None:
            bad = found_inf.bool()
            decay = torch.where(bad, 1.0, decay)
            grad = torch.where(bad, momentum, grad)
        momentum.lerp_(grad, 1 - MOMENTUM)
        ahead = torch.lerp(grad, momentum, MOMENTUM)
        if self._dtype == torch.bfloat16:  # half to gather; fp16 does not have its range
            ahead = ahead.to(self._dtype)
        ahead = ahead.full_tensor()
        sizes = [MUON_RMS * math.sqrt(max(matrix.shape)) for matrix in ahead.split(rows)]
        parts = [
            orthogonalize(matrix[None], self._dtype)[0].float() for matrix in ahead.split(rows)
        ]
        update = torch.cat([part * size for part, size in zip(parts, sizes, strict=True)])
        if found_inf is not None:
            update *= ~bad
        # every rank has all of it, and takes its own part
        own = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
        p.mul_(decay)
        p.sub_(own * learning_rate)


def for_each(
    name: str, tensors: Sequence[torch.Tensor], *others: object, **options: float
) -> Sequence[torch.Tensor] | None:
    """Call a method of every tensor; each list in `others` has one argument for every tensor.

    That is one call, and few kernels on a GPU, where torch has it under its private name.
    """
    at_once = getattr(torch, f"_foreach_{name}", None)
    if at_once is not None:
        return at_once(tensors, *others, **options)
    columns = (other if isinstance(other, list | tuple) else repeat(other) for other in others)
    rows = zip(tensors, *columns, strict=False)
    return [getattr(tensor, name)(*values, **options) for tensor, *values in rows]


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, rows, columns) -> each matrix with its singular values brought near 1, as dtype.

    A Newton-Schulz iteration in dtype, after each matrix was divided by its norm in fp32: what
    fp16 would lose of a small gradient, it holds then. Its coefficients (Jordan et al. 2024)
    hurry: values of 0.002 and more of the matrix's norm end between 0.68 and 1.21, not at 1. A
    matrix of zeros stays one.
    """
    # the norm is at least the largest singular value
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (matrices / norms.clamp(min=1e-7)).to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        # (n, k, k), k the shorter side
        squares = torch.bmm(x.mT, x) if is_tall else torch.bmm(x, x.mT)
        factors = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        x = torch.baddbmm(x, *((x, factors) if is_tall else (factors, x)), beta=a)
    return x


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
