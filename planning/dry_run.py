"""What DRY_RUN shows in place of training."""

from data import WindowPlan
from engine.console import say
from engine.errors import RunFinished
from planning.card import run_lines
from planning.decisions import complete_training
from planning.machine import Machine
from planning.plan import RunPlan
from planning.preflight import show_start, show_training
from planning.runs import SettledRun
from planning.trial import Trial, rehearse
from storage.checkpoint import most_bytes, most_saves
from training_utils import TrainingConfig


def end_dry_run(
    run: SettledRun,
    plan: RunPlan,
    asked: TrainingConfig,
    windows: WindowPlan,
    trial: Trial,
    *,
    machine: Machine,
    notices: list[str],
) -> RunFinished:
    """Print what a run would be, with its card unless its recipe's was shown; the exception that
    ends it. Collective."""
    if plan.recipe is None:
        expected = rehearse(plan, asked, windows, trial)
        show_start(plan, expected.training, expected.total_steps, trial.learner.model)
        show_training(plan, expected.training, expected.total_steps, notices + expected.notices)
        model = trial.learner.model
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)  # kept once
        saves = most_saves(expected.total_steps, asked.save_every)
        disk = most_bytes(model, min(asked.keep_checkpoints, saves)) + frozen
        say("\n".join(["", *run_lines(expected, machine.memory, disk), ""]))
    else:
        total_steps = asked.max_steps  # known of a run that goes on
        training, about_steps = complete_training(asked, windows, total_steps)
        show_training(plan, training, total_steps, notices + about_steps)
    does = "begins this run" if run.before is None else f"goes on with {run.path}"
    return RunFinished(f"DRY_RUN is True: nothing was trained or saved. DRY_RUN = False {does}.")
