"""What the weights that a run begins from are worth on its validation text."""

import dataclasses
import math
import time

from torch.utils.data import DataLoader

from engine.errors import NumericsError
from engine.processor import using_threads
from planning.decisions import RunRecord
from planning.plan import RunPlan
from planning.trial import Trial
from text.tokenizer import Tokenizer

MOST_S, MOST_SHARE = 30.0, 0.03  # for the measurement; the share of a run with a time budget


def measure_start(
    plan: RunPlan, before: RunRecord | None, trial: Trial, loader: DataLoader, tokenizer: Tokenizer
) -> RunPlan:
    """The plan with the bits a byte of its start, each token with at least half a window before it.

    Where all of the loader's text would take too long, evenly spread windows of it are scored. A
    resumed run keeps its figure. Collective. Raises NumericsError where the loss is not finite.
    """
    if plan.start is None:
        return plan
    if before is not None:
        return dataclasses.replace(plan, start=before.start)
    learner, most_s = trial.learner_of_the_run(), MOST_S
    if plan.training.time_budget_minutes is not None:
        most_s = min(most_s, MOST_SHARE * 60 * plan.training.time_budget_minutes)
    with using_threads(trial.threads):
        began_at = time.perf_counter()
        score = learner.score(loader, tokenizer, 1)
        batch_s = trial.parallel.mean(time.perf_counter() - began_at)
        if (n_batches := int(most_s / batch_s)) > 1:
            score = learner.score(loader, tokenizer, n_batches)
    if not math.isfinite(score.loss):
        raise NumericsError(
            f"before training, {plan.start.source} has a loss of {score.loss} on the validation "
            f"text, in {learner.precision.name}.\nIts weights are damaged, or too large for that "
            'format: set PRECISION = "fp32", or begin from others.'
        )
    start = dataclasses.replace(
        plan.start,
        bits_per_byte=score.bits_per_byte,
        measured_share=score.n_batches / score.of_batches,
    )
    return dataclasses.replace(plan, start=start)
