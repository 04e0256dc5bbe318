"""When a run evaluates, and how much of its time pictures and samples may take."""

import math
from dataclasses import dataclass

from engine.optim import EVALUATIONS, LONGEST_EVAL_FREQ

SAMPLE_TOKENS = 30  # that a sample on the way adds to each prompt
# at evaluations within epochs: every 100 steps or more, ten a run
SAMPLE_EVERY, SAMPLES_A_RUN = 100, 10
# of a run's time, the most that evaluations on the way take, and the forward passes that are as
# long as a step over one batch; the batches of an evaluation that are read in any case where
# neither a time budget nor the user says
EVALUATION_SHARE, STEP_PASSES, USUAL_EVAL_ITER = 0.05, 3, 10
# of the run's time, for pictures and again for samples; and what each may take before that is much
EXTRAS_SHARE, EXTRAS_GRACE_S = 0.015, 0.3


@dataclass(frozen=True)
class Spacing:
    """The evaluations of a run, by optimizer step: the same in a run that was stopped."""

    total_steps: int
    steps_per_epoch: int
    eval_freq: int

    @property
    def has_long_epochs(self) -> bool:
        """Whether an epoch is worth a bar, an evaluation and a sample of its own."""
        epochs = -(-self.total_steps // self.steps_per_epoch)
        long = max(self.eval_freq, LONGEST_EVAL_FREQ)
        return epochs <= EVALUATIONS or self.steps_per_epoch >= long

    def ends_epoch(self, step: int) -> bool:
        """Whether a step ends an epoch that is worth it, or the run; step 0 does."""
        is_end = self.has_long_epochs and step % self.steps_per_epoch == 0
        return is_end or step in (0, self.total_steps)

    def bar_at(self, step: int) -> tuple[int, int, str]:
        """The first step, the end and the name of the progress bar on which a step is done."""
        if not self.has_long_epochs:
            return 0, self.total_steps, "Steps"
        epoch = step // self.steps_per_epoch
        first = epoch * self.steps_per_epoch
        return first, min(first + self.steps_per_epoch, self.total_steps), f"Epoch {epoch + 1}"

    def is_due(self, step: int) -> bool:
        """Whether the model is evaluated after a step, or at 0 before the first one."""
        return step % self.eval_freq == 0 or self.ends_epoch(step)

    def count(self, after: int = -1) -> int:
        """The evaluations of the run, or those that are left after a step and its own."""
        at_end = self._count_regular(self.total_steps) - self._count_regular(self.total_steps - 1)
        count = self._count_regular(self.total_steps) + (not at_end)
        return count - self._count_regular(after)

    def default_eval_iter(self, n_val_batches: int, accumulation: int) -> int:
        """The batches of an evaluation: the whole validation text where EVALUATION_SHARE of the run
        is enough for that, else as many as it is enough for, but USUAL_EVAL_ITER at least."""
        passes = EVALUATION_SHARE * STEP_PASSES * self.total_steps * accumulation
        of_one = int(passes / (2 * self.count()))  # training and validation text
        return min(n_val_batches, max(USUAL_EVAL_ITER, of_one))

    def _count_regular(self, step: int) -> int:
        """The evaluations up to a step, but for one that only the run's end brings."""
        freq, epoch = self.eval_freq, self.steps_per_epoch
        count = 1 + step // freq
        if self.has_long_epochs:
            count += step // epoch - step // math.lcm(freq, epoch)
        return count


@dataclass
class Allowance:
    """The seconds that something may take of a run: a share of it, or little in all."""

    spent_s: float = 0.0
    _last_s: float = 0.0

    def allows(self, elapsed_s: float) -> bool:
        """Whether once more fits, after elapsed_s of the run, if it takes as long as the last."""
        return self.spent_s + self._last_s <= allowed_seconds(elapsed_s)

    def spend(self, seconds: float) -> None:
        """Note how long it took."""
        self.spent_s, self._last_s = self.spent_s + seconds, seconds


def allowed_seconds(elapsed_s: float) -> float:
    """The most that an Allowance allows in elapsed_s of a run."""
    return max(EXTRAS_GRACE_S, EXTRAS_SHARE * elapsed_s)
