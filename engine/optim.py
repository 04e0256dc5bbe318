"""AdamW and Muon with their parameter groups; learning-rate schedules as pure functions."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from engine.devices import KINDS
from engine.precision import DTYPES, choose_precision

OPTIMIZERS = ("adamw", "muon")
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8  # AdamW's
# Muon's, as in torch.optim.Muon
MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5
MUON_RMS = 0.2  # of an update, AdamW's usual one, so that both use the same learning rates
# elements in a stack of matrices: more is no faster and takes memory; a GPU needs more to be busy
MOST_AT_ONCE, GPU_MOST_AT_ONCE = 2**22, 2**24

SCHEDULES = ("cosine", "wsd", "constant")
FINAL_RATE = 0.1  # the share of the peak at which a decaying schedule ends
DECAY_SHARE = 0.2  # of a run, at its end, in which the rate of "wsd" falls
# a run's default evaluations, and the most steps between two of them; with a time budget these may
# be more, as many as take LONGEST_EVAL_S
EVALUATIONS, LONGEST_EVAL_FREQ, LONGEST_EVAL_S = 10, 100, 30.0
MUON_TIMES_ADAMW = 2.5  # the ratio of their best learning rates at emb_dim 192


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: linear warm-up to peak, then kind, over total_steps steps."""

    kind: str
    peak: float
    warmup_steps: int
    total_steps: int
    decay_steps: int = 0  # of "wsd" alone
    final_rate: float = FINAL_RATE  # the share of the peak at which "cosine" and "wsd" end


def learning_rate_at(step: int, schedule: Schedule) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Warm-up is linear and never 0. Then "constant" stays at the peak; "cosine" falls to final_rate
    times the peak; "wsd" (warm-up, stable, decay; Hu et al. 2024, "MiniCPM") stays at the peak and
    falls linearly to the same rate in its last decay_steps. Beyond total_steps the last rate holds.
    """
    floor = schedule.final_rate
    if step < schedule.warmup_steps:
        return schedule.peak * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return schedule.peak
    if schedule.kind == "wsd":
        steps_left = max(0, schedule.total_steps - 1 - step)  # after this one
        share = min(1.0, steps_left / max(1, schedule.decay_steps))
        return schedule.peak * (floor + (1 - floor) * share)
    last = max(schedule.warmup_steps, schedule.total_steps - 1)
    progress = (min(step, last) - schedule.warmup_steps) / max(1, last - schedule.warmup_steps)
    return schedule.peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_schedule(
    kind: str,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    *,
    decay_share: float = DECAY_SHARE,
    final_rate: float = FINAL_RATE,
) -> Schedule:
    """The schedule of a new run; the decay of "wsd" never overlaps the warm-up."""
    decay_steps = min(math.ceil(decay_share * total_steps), total_steps - warmup_steps)
    decay_steps *= kind == "wsd"
    return Schedule(kind, peak, warmup_steps, total_steps, decay_steps, final_rate)


def extend_schedule(schedule: Schedule, total_steps: int, step: int) -> Schedule:
    """The schedule of a run that is extended to total_steps after `step` steps.

    The added steps run at its last rate; but a decay of "wsd" that has not begun moves to the end.
    """
    has_decayed = step > schedule.total_steps - schedule.decay_steps
    if schedule.kind != "wsd" or has_decayed or total_steps <= schedule.total_steps:
        return schedule
    return replace(schedule, total_steps=total_steps)


def default_learning_rate(emb_dim: int, optimizer: str = "adamw") -> float:
    """The default peak: for AdamW 6e-4 at emb_dim 768, proportional to 1 / max(emb_dim, 64)."""
    # matrices' rates scale so with the width (Yang et al. 2022, "Tensor Programs V")
    return 6e-4 * 768 / max(emb_dim, 64) * MUON_TIMES_ADAMW ** (optimizer == "muon")


def default_warmup_steps(total_steps: int) -> int:
    """A tenth of the run's steps, at most 100."""
    return min(100, total_steps // 10)


def default_eval_freq(total_steps: int) -> int:
    """The default steps between evaluations: a tenth of the run's, at most 100."""
    return max(1, min(LONGEST_EVAL_FREQ, total_steps // EVALUATIONS))


@dataclass(frozen=True)
class Rules:
    """How the parameters that are no hidden matrices train, and AdamW's second moments."""

    embedding_rate: float | None = None  # their peak learning rate; None: that of the matrices
    decay_embeddings: bool = False  # weight decay for embeddings too
    beta2: float = BETA2


DEFAULT_RULES = Rules()


class _Uncompiled(torch.optim.Optimizer):
    """An optimizer whose methods lack torch's decorators that keep torch.compile out of them.

    The first call of a decorated one imports torch._dynamo for seconds, and nothing here compiles
    an optimizer.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(_Uncompiled, torch.optim.AdamW):
    """torch.optim.AdamW without the import of torch._dynamo."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build_optimizer(
    kind: str,
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    rules: Rules = DEFAULT_RULES,
) -> torch.optim.Optimizer:
    """The optimizer that TrainingConfig.optimizer names, for the model's parameters."""
    build = {"adamw": build_adamw, "muon": build_muon}[kind]
    return build(model, learning_rate, weight_decay, rules)


def build_adamw(
    model: nn.Module, learning_rate: float, weight_decay: float, rules: Rules = DEFAULT_RULES
) -> AdamW:
    """AdamW with weight decay for Linear layers' weights, but not a head tied to an embedding.

    The first group has the model's hidden_matrices(), the others have the rest of its parameters.
    """
    hidden = [weight for weight, _ in model.hidden_matrices() if weight.requires_grad]
    first = {"params": hidden, "scale": 1.0, "weight_decay": weight_decay}
    groups = [first, *_other_groups(model, set(hidden), learning_rate, weight_decay, rules)]
    betas, fused = (BETA1, rules.beta2), _has_fused_adamw(model)
    return AdamW(groups, lr=learning_rate, betas=betas, eps=EPS, fused=fused)


def build_muon(
    model: nn.Module, learning_rate: float, weight_decay: float, rules: Rules = DEFAULT_RULES
) -> "Muon":
    """Muon for the model's hidden_matrices(), AdamW as in build_adamw() for the rest."""
    matrices = [(weight, rows) for weight, rows in model.hidden_matrices() if weight.requires_grad]
    hidden = {weight for weight, _ in matrices}
    precision = choose_precision("auto", next(model.parameters()).device)
    return Muon(
        matrices,
        _other_groups(model, hidden, learning_rate, weight_decay, rules),
        learning_rate,
        weight_decay,
        fused=_has_fused_adamw(model),
        dtype=DTYPES[precision.name],
    )


def _other_groups(
    model: nn.Module,
    hidden: set[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    rules: Rules,
) -> list[dict[str, Any]]:
    """The groups of the trained parameters that are not hidden: those that decay, and the rest."""
    parameters = [p for p in model.parameters() if p.requires_grad and p not in hidden]
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} - embeddings
    if rules.decay_embeddings:
        decayed |= embeddings
    scale = 1.0 if rules.embedding_rate is None else rules.embedding_rate / learning_rate
    common = {"lr": learning_rate * scale, "scale": scale, "betas": (BETA1, rules.beta2)}
    return [
        {"params": [p for p in parameters if p in decayed], "weight_decay": weight_decay} | common,
        {"params": [p for p in parameters if p not in decayed], "weight_decay": 0.0} | common,
    ]


def _has_fused_adamw(model: nn.Module) -> bool:
    return all(p.device.type in KINDS for p in model.parameters() if p.requires_grad)


class Muon(_Uncompiled):
    """Muon for matrices (Jordan et al. 2024), AdamW for the other parameters.

    A matrix's update is its orthogonalized momentum with the rms of AdamW's updates (Liu et al.
    2025, "Muon is scalable for LLM training"), so both take the same learning rate. `matrices` are
    weights with the row counts of the matrices merged in them, orthogonalized one by one in dtype;
    adamw_groups have torch.optim.AdamW's "betas", and a "scale" (see set_learning_rate()).
    Where fused is True, a GradScaler's found_inf and grad_scale act on the device, as in AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[nn.Parameter, tuple[int, ...]]],
        adamw_groups: list[dict[str, Any]],
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
        others = [group | {"fused": fused} for group in adamw_groups]
        super().__init__([muon_group, *others], {"lr": learning_rate, "scale": 1.0})
        self._dtype = dtype
        self._step_supports_amp_scaling = fused

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step of all parameters; returns the closure's loss, if any."""
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
        self, group: dict[str, Any], parameters: list[nn.Parameter], found_inf: torch.Tensor | None
    ) -> None:
        for p in parameters:
            if not self.state[p]:
                # unfused AdamW reads the step count on the host
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
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPS,
            maximize=False,
        )

    def _move_matrices(self, group: dict[str, Any], found_inf: torch.Tensor | None) -> None:
        of_shape: dict[torch.Size, list[tuple[torch.Tensor, ...]]] = {}
        for p, rows in zip(group["params"], group["rows"], strict=True):
            if p.grad is None:
                continue
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if hasattr(p, "full_tensor"):
                self._move_sharded(p, rows, group, found_inf)
                continue
            merged = (p, p.grad, self.state[p]["momentum_buffer"])
            for matrix in zip(*(tensor.split(rows) for tensor in merged), strict=True):
                of_shape.setdefault(matrix[0].shape, []).append(matrix)
        for shape, matrices in of_shape.items():
            is_gpu = matrices[0][0].device.type != "cpu"
            count = max(1, (GPU_MOST_AT_ONCE if is_gpu else MOST_AT_ONCE) // shape.numel())
            for first in range(0, len(matrices), count):
                self._move_stack(matrices[first : first + count], group, found_inf)

    def _move_stack(
        self,
        matrices: Sequence[tuple[torch.Tensor, ...]],
        group: dict[str, Any],
        found_inf: torch.Tensor | None,
    ) -> None:
        """Update matrices of one shape, each (weight, gradient, momentum)."""
        weights, grads, momenta = zip(*matrices, strict=True)
        ahead, decay, keep = _nesterov(grads, momenta, group, found_inf)
        updates = orthogonalize(torch.stack(ahead), self._dtype)
        if keep is not None:
            updates *= keep
        alpha = -group["lr"] * _muon_scale(updates[0])
        for_each("mul_", weights, decay)
        for_each("add_", weights, updates.unbind(), alpha=alpha)

    def _move_sharded(
        self,
        p: nn.Parameter,
        rows: tuple[int, ...],
        group: dict[str, Any],
        found_inf: torch.Tensor | None,
    ) -> None:
        """Update a sharded weight: every rank orthogonalizes the unsharded momentum."""
        from torch.distributed.tensor import distribute_tensor

        momenta = [self.state[p]["momentum_buffer"]]
        (ahead,), decay, keep = _nesterov([p.grad], momenta, group, found_inf)
        if self._dtype == torch.bfloat16:  # halves the all-gather; fp16 lacks the range
            ahead = ahead.to(self._dtype)
        update = torch.cat(
            [
                orthogonalize(matrix[None], self._dtype)[0].float() * _muon_scale(matrix)
                for matrix in ahead.full_tensor().split(rows)
            ]
        )
        if keep is not None:
            update *= keep
        # each rank cuts its own shard out of the update, without communication
        own = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
        p.mul_(decay)
        p.sub_(own * group["lr"])


def _nesterov(
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    group: dict[str, Any],
    found_inf: torch.Tensor | None,
) -> tuple[Sequence[torch.Tensor], float | torch.Tensor, torch.Tensor | None]:
    """Update the momenta; returns Nesterov's gradients, the weight decay's factor and a mask."""
    # with found_inf nothing may change: the mask of the updates is False, the factor is 1
    decay, keep = 1 - group["lr"] * group["weight_decay"], None
    if found_inf is not None:
        keep = ~found_inf.bool()
        decay = torch.where(keep, decay, 1.0)
        # lerp of a momentum with itself leaves it unchanged
        grads = [torch.where(keep, g, m) for g, m in zip(grads, momenta, strict=True)]
    for_each("lerp_", momenta, grads, 1 - MOMENTUM)
    return for_each("lerp", grads, momenta, MOMENTUM), decay, keep


def _muon_scale(matrix: torch.Tensor) -> float:
    """What gives an orthogonal matrix, whose rms is 1 / sqrt(its longer side), MUON_RMS."""
    return MUON_RMS * math.sqrt(max(matrix.shape))


def for_each(
    name: str, tensors: Sequence[torch.Tensor], *others: object, **options: float
) -> Sequence[torch.Tensor]:
    """Call a method of every tensor; a list in `others` has an argument for each of them."""
    # torch's private name for it launches fewer kernels; a DTensor, which comes alone, may lack it
    at_once = getattr(torch, f"_foreach_{name}", None)
    if at_once is not None and len(tensors) > 1:
        return at_once(tensors, *others, **options)
    columns = (other if isinstance(other, list | tuple) else repeat(other) for other in others)
    rows = zip(tensors, *columns, strict=False)
    return [getattr(tensor, name)(*values, **options) for tensor, *values in rows]


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, rows, columns) -> each matrix with its singular values brought near 1, as dtype.

    A Newton-Schulz iteration, whose coefficients (Jordan et al. 2024) trade accuracy for speed:
    singular values above 0.002 of the norm end between 0.68 and 1.21. A zero matrix stays zero.
    """
    # in fp32, since fp16 underflows; the norm is at least the largest singular value
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
    """Set the rate of each parameter group to learning_rate times the group's "scale", or 1."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("scale", 1.0)  # another optimizer has none
