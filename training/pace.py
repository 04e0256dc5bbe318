"""How long the parts of a run take, and its plan made anew on the way: by the time that is left,
or because the model begins to learn its text by heart."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from engine.optim import Schedule
from engine.settings import check, from_json, setting

FIRST_SHARE = 0.25  # of a run, after which its steps are planned anew from the time they took
LATE_SHARE = 0.35  # of its time, after which they are at the latest
LEAST_STEPS = 8  # of a run that is planned anew
MISS = 0.01  # of its steps, more or less than there is time for: then it is planned anew again
# by heart: the least evaluations, the least and the share of them that are compared with those
# before, the gain of validation text that counts, and the fall of the training loss that does
LEAST_EVALUATIONS, LEAST_RECENT, RECENT_SHARE = 6, 4, 0.25
GAIN, FALL = 0.002, 0.01
SHORT_DECAY = 0.25  # of the steps done: a decay that begins at once
# what the decay of "wsd" takes off the loss beside its progress, as a share of it: the least, the
# usual and the most (from six runs: 2.5 to 5.2 % in runs of 500 to 800 steps, 0.6 to 1 % in 100)
DECAY_GAINS = (0.005, 0.03, 0.055)
LEAST_FITTED = 2  # evaluations that a forecast needs
STEEPEST = 0.5  # the highest power of a step by which the loss is taken to fall: two may be noise
REASONS = TIME, BY_HEART = "time", "by heart"  # why a plan is made anew


@dataclass(frozen=True)
class NewPlan:
    """A change of a run's total steps on the way, which a resumed run repeats at the same step."""

    after_step: int = setting(minimum=1)  # and its evaluation
    why: str = setting(choices=REASONS)
    steps_before: int = setting(minimum=1)
    total_steps: int = setting(minimum=1)
    decay_steps: int = setting(minimum=0)  # of "wsd"

    def __post_init__(self) -> None:
        check(self)

    def apply(self, schedule: Schedule | None) -> Schedule | None:
        """The schedule from here on."""
        if schedule is None:
            return None
        return replace(schedule, total_steps=self.total_steps, decay_steps=self.decay_steps)

    def to_json(self) -> dict[str, Any]:
        """What settings.json and a checkpoint keep of it."""
        return asdict(self)


def recorded_plans(changes: Sequence[Any], total_steps: int) -> list[NewPlan]:
    """The new plans among the changes in settings.json of a run that has total_steps now.

    Those from before the run's length was last set anew are none of them. SettingsError for a
    damaged one.
    """
    plans = [
        from_json(NewPlan, {name: x for name, x in change.items() if name != "at"}, "changes")
        for change in changes
        if isinstance(change, dict) and "after_step" in change
    ]
    followed: list[NewPlan] = []
    for plan in reversed(plans):
        if plan.total_steps != total_steps:
            break
        followed.insert(0, plan)
        total_steps = plan.steps_before
    return followed


def first_review(total_steps: int, schedule: Schedule | None) -> int | None:
    """The step after which a run is planned anew, before "wsd" decays; None: it is too short."""
    if total_steps < LEAST_STEPS:
        return None
    step = round(FIRST_SHARE * total_steps)
    if schedule is not None and schedule.kind == "wsd":
        step = min(step, total_steps - schedule.decay_steps)
    return max(1, step)


def plan_for_time(after_step: int, total_steps: int, now: int, schedule: Schedule) -> NewPlan:
    """The plan of a run of total_steps that has time for `now` steps, more than after_step.

    "wsd" keeps its share of the steps for the decay, which begins after warm-up and not before
    after_step; one that has begun ends earlier or later.
    """
    decay, flat = schedule.decay_steps, total_steps - schedule.decay_steps
    if schedule.kind == "wsd" and after_step > flat:
        return NewPlan(after_step, TIME, total_steps, now, now - flat)
    decay = round(decay * now / total_steps)
    most = now - max(after_step, schedule.warmup_steps)
    return NewPlan(after_step, TIME, total_steps, now, max(0, min(decay, most)))


def plan_to_end(after_step: int, schedule: Schedule) -> NewPlan:
    """The plan of a run that is to end soon: after a short decay of "wsd", or at once.

    At once where no decay is left to begin: in that of "wsd", and with other schedules.
    """
    total, decay = schedule.total_steps, schedule.decay_steps
    if schedule.kind != "wsd" or after_step > total - decay:
        return NewPlan(after_step, BY_HEART, total, after_step, decay)
    short = max(1, min(decay, round(SHORT_DECAY * after_step)))
    return NewPlan(after_step, BY_HEART, total, after_step + short, short)


def learns_by_heart(
    train_losses: Sequence[float], val_losses: Sequence[float], since: int = 0
) -> bool:
    """Whether validation text no longer gains while the loss on training text falls.

    The losses are those of a run's evaluations after its first step, over the same batches each
    time. Those of the last quarter, LEAST_RECENT at least and all of them later than the first
    `since`, are held against the ones before.
    """
    recent = max(LEAST_RECENT, round(RECENT_SHARE * len(val_losses)))
    if len(val_losses) < max(LEAST_EVALUATIONS, recent + max(1, since)):
        return False
    gains = min(val_losses[-recent:]) < (1 - GAIN) * min(val_losses[:-recent])
    falls = train_losses[-1] < (1 - FALL) * train_losses[-recent - 1]
    return falls and not gains


def forecast_loss(
    steps: Sequence[int], val_losses: Sequence[float], schedule: Schedule
) -> tuple[float, float, float] | None:
    """The least, the expected and the highest final validation loss of a run about to decay.

    steps (from 1) and val_losses are its evaluations between warm-up and decay. A power law of the
    step is fitted over the later half of them, at least two. It is continued by the decay's steps,
    each as much as its learning rate is of the peak, and DECAY_GAINS are taken off. None where
    there are too few evaluations.
    """
    pairs = zip(steps, val_losses, strict=True)
    known = [(s, loss) for s, loss in pairs if 0 < loss < math.inf]  # logarithms are taken
    kept = max(
        [(s, loss) for s, loss in known if 2 * s >= steps[-1]], known[-LEAST_FITTED:], key=len
    )
    if len(kept) < LEAST_FITTED:
        return None
    x, y = ([math.log(pair[i]) for pair in kept] for i in (0, 1))
    slope, intercept = statistics.linear_regression(x, y)
    # a law that rises, by noise, is none
    flat, decay = schedule.total_steps - schedule.decay_steps, schedule.decay_steps
    last = flat + decay * (1 + schedule.final_rate) / 2
    at_end = min(loss for _, loss in known)
    if slope < 0:
        slope = max(slope, -STEEPEST)
        intercept = statistics.mean(y) - slope * statistics.mean(x)
        at_end = math.exp(intercept + slope * math.log(last))
    least, usual, most = DECAY_GAINS
    return at_end * (1 - most), at_end * (1 - usual), at_end * (1 - least)


@dataclass
class Spent:
    """The seconds that a run's evaluations, samples, pictures and saves have taken so far."""

    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    firsts: dict[str, float] = field(default_factory=dict)  # of the first one of each kind

    def note(self, kind: str, seconds: float) -> None:
        """Note how long one of a kind took."""
        self.firsts.setdefault(kind, seconds)
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def mean(self, kind: str, default: float = 0.0) -> float:
        """The mean seconds of a kind, without the first one, which loads what it needs, where there
        are more; the default where there was none."""
        count = self.counts.get(kind, 0)
        if count > 1:
            return (self.seconds[kind] - self.firsts.get(kind, 0.0)) / (count - 1)
        return self.seconds.get(kind, default)

    @property
    def total_s(self) -> float:
        """The seconds of all of them."""
        return sum(self.seconds.values())
