"""What is found out by trying steps: whether compiling pays, and how many a time allows."""

import dataclasses
import statistics
import time
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from data import WindowPlan
from distributed.parallel import ALONE, Parallel
from engine.compiling import (
    compile_model,
    is_repaid,
    undo_compiling,
    what_prevents_compiling,
)
from engine.console import say
from engine.devices import synchronize
from engine.memory import OutOfStepMemory
from engine.optim import EVALUATIONS, LONGEST_EVAL_FREQ, set_learning_rate
from engine.randomness import random_state, set_random_state
from model import GPTModel
from planning.decisions import RunRecord, complete_training
from planning.machine import Machine
from planning.plan import RunPlan
from training.learner import Learner, steps_of_epoch, using_threads
from training_utils import TrainingConfig

TIMED_STEPS = 3
# floating point operations of a run below which compiling can't pay on any machine, so that
# nothing needs to be tried: 40 s of a slow one
WORTH_A_TRIAL = 4e12
EVALUATION_COST = 1 / 3  # of a training step, for as many tokens: it has no backward pass


@dataclass(frozen=True)
class Compiled:
    """Whether training steps run compiled, and why; a run that goes on keeps it."""

    on: bool
    reason: str


@dataclass
class Trial:
    """A run that is ready to train, tried without training it.

    Where each rank has the whole model, its learner makes steps without the other ranks.
    """

    learner: Learner
    loader: DataLoader
    threads: int
    parallel: Parallel = ALONE

    @classmethod
    def of(
        cls, machine: Machine, model: GPTModel, optimizer: torch.optim.Optimizer, loader: DataLoader
    ) -> "Trial":
        """The trial of a run on a machine."""
        shares_weights = machine.parallel.kind == "fsdp"
        learner = Learner(
            model,
            optimizer,
            machine.precision,
            machine.parallel if shares_weights else ALONE,
            micro_batch=machine.micro_batch,
        )
        return cls(learner, loader, machine.threads, machine.parallel)

    def learner_of_the_run(self) -> Learner:
        """What the run itself makes its steps with, together with the other ranks."""
        learner = self.learner
        return Learner(
            learner.model,
            learner.optimizer,
            learner.precision,
            self.parallel,
            micro_batch=learner.micro_batch,
        )

    @property
    def steps_per_epoch(self) -> int:
        """The optimizer steps of an epoch."""
        return self.loader.batch_sampler.n_steps

    def step_seconds(self, *, may_halve: bool = True) -> float:
        """The median time of an optimizer step here, after one that doesn't count.

        Weights, moments and random numbers are afterwards what they were. Where memory runs out,
        and may_halve, the learner's micro-batch is half as large from here on; else, and for a
        single window, OutOfStepMemory is raised.
        """
        if not may_halve:
            return self._step_seconds()
        return self.learner.in_smaller_parts(self._step_seconds, "a trial")

    def agreed(self, seconds: float) -> float:
        """The mean of what the ranks have measured; all take the smallest micro-batch."""
        self.learner.micro_batch = self.parallel.lowest(self.learner.micro_batch)
        return self.parallel.mean(seconds)

    def _step_seconds(self) -> float:
        learner, optimizer = self.learner, self.learner.optimizer
        random_before = random_state(learner.device)
        rates = [group["lr"] for group in optimizer.param_groups]
        set_learning_rate(optimizer, 0.0)  # such a step changes no weight
        step = next(steps_of_epoch(self.loader, 0, 0, 1))
        seconds = []
        try:
            with using_threads(self.threads):
                for _ in range(1 + TIMED_STEPS):
                    started_at = time.perf_counter()
                    learner.try_step(step, 1.0)
                    synchronize(learner.device)
                    seconds.append(time.perf_counter() - started_at)
        finally:
            self.loader.batch_sampler.start_at(0)
            optimizer.state.clear()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            set_random_state(random_before, learner.device)
        return statistics.median(seconds[1:])

    def compile(self, as_written: float | None) -> str | None:
        """Compile the model's steps now, with a line that says so; returns what speaks against it.

        That is a compiler's fault, a lack of memory, or steps that take no less than as_written
        seconds: the model then runs as it is written, with the micro-batch that it had.
        """
        say("Compiling the model's blocks: up to a minute, once ...")
        model, windows = self.learner.model, self.loader.batch_sampler.count_own(0)
        compile_model(
            model,
            self.learner.device,
            micro_batches=-(-windows // self.learner.micro_batch),
            is_alone=self.parallel.is_alone,
        )
        started_at = time.perf_counter()
        failed, seconds = None, 0.0
        try:
            seconds = self.step_seconds(may_halve=False)
        except OutOfStepMemory:
            failed = "compiled steps ran out of memory"
        except Exception as error:  # compilers fail in ways of their own: the model runs without
            reason = next(iter(str(error).splitlines()), "")[:200]
            failed = f"{type(error).__name__}: {reason}"
        seconds = self.agreed(seconds)
        if any(self.parallel.highest(failed is not None)):
            undo_compiling(model)
            return failed or "compiling failed in another process"
        say(f"✓ Compiled in {time.perf_counter() - started_at:.0f} s")
        if as_written is not None and seconds >= as_written:
            undo_compiling(model)
            return f"compiled steps are no faster here: {seconds:.2g} s, {as_written:.2g} s without"
        return None


def decide_compiling(
    requested: str | bool, trial: Trial, total_steps: int | None, budget_s: float | None
) -> Compiled:
    """Turn COMPILE (True, False or "auto") into what this run does, and compile where it does.

    The run has total_steps, or those that budget_s seconds allow.
    """
    if requested is False:
        return Compiled(False, "as set")
    model, device = trial.learner.model, trial.learner.device
    obstacles = trial.parallel.gather(what_prevents_compiling(device))
    if obstacle := next(filter(None, obstacles), None):
        return Compiled(False, obstacle)
    if trial.parallel.kind == "fsdp":
        return Compiled(False, "weights that lie in parts are gathered between the operations")
    reason, seconds = "as set", None
    if requested == "auto":
        tokens = len(trial.loader.dataset[0][0]) * trial.loader.batch_sampler.step_size
        tokens //= trial.parallel.world
        if budget_s is None and total_steps * tokens * model.flop_per_token() < WORTH_A_TRIAL:
            return Compiled(False, "a run this short would not repay it")
        seconds = trial.agreed(trial.step_seconds())
        steps = total_steps if budget_s is None else round(budget_s / seconds)
        reason = f"{steps:,} steps of {seconds:.2g} s"
        if not is_repaid(seconds, steps, device):
            return Compiled(False, f"{reason} would not repay it")
        reason += " repay it"
    obstacle = trial.compile(seconds)
    return Compiled(True, reason) if obstacle is None else Compiled(False, obstacle)


def steps_in(budget_s: float, trial: Trial, training: TrainingConfig) -> int:
    """How many optimizer steps, with their evaluations, take so many seconds; at least 1."""
    seconds = trial.agreed(trial.step_seconds())
    batches = trial.loader.batch_sampler
    batch_seconds = seconds * batches.batch_size / batches.step_size  # a step may have several
    evaluation = 2 * training.eval_iter * batch_seconds * EVALUATION_COST
    per_step = evaluation / (training.eval_freq or LONGEST_EVAL_FREQ)
    steps = budget_s / (seconds + per_step)
    n_evaluations = EVALUATIONS + 1  # the one before the first step, too
    if training.eval_freq is None and steps < LONGEST_EVAL_FREQ * n_evaluations:
        steps = (budget_s - n_evaluations * evaluation) / seconds
    return max(1, int(steps))


def try_out(
    plan: RunPlan,
    asked: TrainingConfig,
    windows: WindowPlan,
    trial: Trial,
    before: RunRecord | None,
) -> tuple[Compiled, TrainingConfig, list[str]]:
    """What only a tried step tells: whether to compile, and the steps of a time budget.

    Returns the hyper-parameters with every value, those that follow from the number of steps
    too, and notices. A run that goes on keeps both decisions.
    """
    requested, why = plan.run.COMPILE, None
    if requested == "auto" and before is not None:
        requested, why = before.compiled, "as when this run began"
    notices = []
    has_budget = asked.time_budget_minutes is not None and asked.max_steps is None
    if asked.time_budget_minutes is not None and plan.training.max_steps is not None:
        notices.append("time_budget_minutes is not used: max_steps, where set, alone ends the run")
    budget_s = 60 * asked.time_budget_minutes if has_budget else None
    total_steps = None if has_budget else plan.count_steps(asked, trial.steps_per_epoch)
    compiled = decide_compiling(requested, trial, total_steps, budget_s)
    if why is not None and compiled.on == requested:
        compiled = Compiled(compiled.on, why)
    elif requested is True and not compiled.on:
        notices.append(f"the model is not compiled: {compiled.reason}")
    say(f"Compile: {'on' if compiled.on else 'off'} ({compiled.reason})")
    if has_budget:
        max_steps = steps_in(budget_s, trial, asked)
        minutes = asked.time_budget_minutes
        notices.append(f"{max_steps:,} steps are expected to take {minutes:g} minutes")
        asked = dataclasses.replace(asked, max_steps=max_steps)
    total_steps = plan.count_steps(asked, trial.steps_per_epoch)
    training, about_steps = complete_training(asked, windows, total_steps)
    return compiled, training, notices + about_steps
