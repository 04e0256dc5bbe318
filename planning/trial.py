"""Decisions by timed steps: whether compiling pays, and the steps of a time budget."""

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from data import WindowPlan
from distributed.parallel import ALONE, Parallel
from engine.compiling import (
    compile_model,
    expected_savings,
    undo_compiling,
    what_prevents_compiling,
)
from engine.console import say
from engine.devices import synchronize
from engine.errors import first_line
from engine.memory import OutOfStepMemory
from engine.optim import EVALUATIONS, LONGEST_EVAL_FREQ, set_learning_rate
from engine.processor import using_threads
from engine.randomness import random_state, set_random_state
from model import GPTModel
from planning.choices import WORTH_A_TRIAL, Choices
from planning.decisions import RunRecord, complete_training
from planning.machine import Machine
from planning.plan import RunPlan
from training.learner import Learner, steps_of_epoch
from training_utils import TrainingConfig

TIMED_STEPS = 3
EVALUATION_COST = 1 / 3  # of a training step on as many tokens: no backward pass


@dataclass(frozen=True)
class Compiled:
    """Whether training steps run compiled, and why."""

    on: bool
    reason: str


@dataclass
class Trial:
    """Times steps of a run that is ready to train; a replicated model's without collectives."""

    learner: Learner
    loader: DataLoader
    threads: int
    parallel: Parallel = ALONE
    choices: Choices | None = None  # what was measured on this machine

    @classmethod
    def of(
        cls, machine: Machine, model: GPTModel, optimizer: torch.optim.Optimizer, loader: DataLoader
    ) -> "Trial":
        """The trial of a run on a machine."""
        ranks = machine.parallel if machine.parallel.kind == "fsdp" else ALONE
        learner = Learner(
            model, optimizer, machine.precision, ranks, micro_batch=machine.micro_batch
        )
        return cls(learner, loader, machine.threads, machine.parallel, machine.choices)

    def learner_of_the_run(self) -> Learner:
        """The learner that makes the run's steps, with all ranks."""
        return dataclasses.replace(self.learner, parallel=self.parallel)

    @property
    def steps_per_epoch(self) -> int:
        """The optimizer steps of an epoch."""
        return self.loader.batch_sampler.n_steps

    def step_seconds(self, *, may_halve: bool = True) -> float:
        """The median seconds of an optimizer step; restores weights, moments and generators.

        When memory runs out, halves the learner's micro-batch, or raises OutOfStepMemory.
        """
        if not may_halve:
            return self._step_seconds()
        return self.learner.in_smaller_parts(self._step_seconds, "a trial")

    def agreed(self, seconds: float) -> float:
        """The ranks' mean; all take the smallest of their micro-batches. Collective."""
        self.learner.micro_batch = self.parallel.lowest(self.learner.micro_batch)
        return self.parallel.mean(seconds)

    def _step_seconds(self) -> float:
        learner, optimizer = self.learner, self.learner.optimizer
        random_before = random_state(learner.device)
        rates = [group["lr"] for group in optimizer.param_groups]
        set_learning_rate(optimizer, 0.0)  # so that no weight changes
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
        """Compile the model's steps; returns why it is eager again, None if it isn't."""
        say("Compiling the model's blocks: up to a minute, once ...")
        model, windows = self.learner.model, self.loader.batch_sampler.count_own(0)
        compile_model(
            model,
            self.learner.device,
            micro_batches=-(-windows // self.learner.micro_batch),
            is_alone=self.parallel.is_alone,
        )
        started_at = time.perf_counter()
        failed, seconds = None, math.inf
        try:
            seconds = self.step_seconds(may_halve=False)
        except OutOfStepMemory:
            failed = "compiled steps ran out of memory"
        except Exception as error:  # compilers raise errors of any type
            failed = f"{type(error).__name__}: {first_line(error)[:200]}"
        seconds, taken = self.agreed(seconds), time.perf_counter() - started_at
        if as_written is not None:  # a step of inf seconds, where compiling failed, saves nothing
            self.keep("", {"saves": max(0.0, 1 - seconds / as_written), "seconds": taken})
        if any(self.parallel.highest(failed is not None)):
            undo_compiling(model)
            return failed or "compiling failed in another process"
        say(f"✓ Compiled in {taken:.0f} s")
        if as_written is not None and seconds >= as_written:
            undo_compiling(model)
            return f"compiled steps are no faster here: {seconds:.2g} s, {as_written:.2g} s without"
        return None

    def keep(self, length: str, figures: dict[str, float]) -> None:
        """Keep what was found about compiling this model, in runs of a length or in all."""
        if self.choices is not None and self.parallel.is_main:
            self.choices.keep(self._about_compiling(length), figures)

    def known(self, length: str) -> dict[str, float] | None:
        """What keep() was given for this model and length on this machine, or None. Collective."""
        choices = self.choices
        if choices is None:
            return None
        return self.parallel.from_main(lambda: choices.known(self._about_compiling(length)))

    def _about_compiling(self, length: str) -> str:
        learner = self.learner
        return (
            f"compiling {learner.model.config} in {learner.precision.name} with "
            f"{learner.micro_batch} windows {length}"
        )


def decide_compiling(
    requested: str | bool, trial: Trial, total_steps: int | None, budget_s: float | None
) -> Compiled:
    """Apply COMPILE to a run of total_steps, or if that is None, of budget_s seconds."""
    if requested is False:
        return Compiled(False, "as set")
    model, device = trial.learner.model, trial.learner.device
    obstacles = trial.parallel.gather(what_prevents_compiling(device))
    if obstacle := next(filter(None, obstacles), None):
        return Compiled(False, obstacle)
    if trial.parallel.kind == "fsdp":
        return Compiled(False, "weights that lie in parts are gathered between the operations")
    if requested is True:
        obstacle = trial.compile(None)
        return Compiled(obstacle is None, obstacle or "as set")
    tokens = len(trial.loader.dataset[0][0]) * trial.loader.batch_sampler.step_size
    n_flop = tokens // trial.parallel.world * model.flop_per_token() * (total_steps or 0)
    if budget_s is None and n_flop < WORTH_A_TRIAL:
        return Compiled(False, "a run this short would not repay it")
    # a later run of this length takes the decision from here, so that its numbers are the same
    length = f"for {total_steps} steps" if budget_s is None else f"for {budget_s:g} s"
    kept = trial.known(length)
    if kept is None:
        compiled = _try_compiling(trial, total_steps, budget_s)
        trial.keep(length, {"on": float(compiled.on)})
        return compiled
    if kept.get("on"):
        obstacle = trial.compile(None)
        return Compiled(obstacle is None, obstacle or "as a trial on this machine found")
    return Compiled(False, "a trial on this machine found that it would not pay")


def _try_compiling(trial: Trial, total_steps: int | None, budget_s: float | None) -> Compiled:
    """Compile if that saves twice its own time in the rest of the run, and is faster indeed."""
    seconds = trial.agreed(trial.step_seconds())
    steps = round((budget_s or 0) / seconds) if total_steps is None else total_steps
    saves, cost = expected_savings(trial.learner.model, trial.learner.device)
    if measured := trial.known(""):
        saves, cost = measured.get("saves", saves), measured.get("seconds", cost)
    reason = f"{steps:,} steps of {seconds:.2g} s"
    if steps * seconds * saves <= 2 * cost:
        return Compiled(False, f"{reason} would not repay it")
    obstacle = trial.compile(seconds)
    return Compiled(obstacle is None, obstacle or f"{reason} repay it")


def steps_in(budget_s: float, trial: Trial, training: TrainingConfig) -> int:
    """The optimizer steps that take budget_s seconds with their evaluations; at least 1."""
    seconds = trial.agreed(trial.step_seconds())
    batches = trial.loader.batch_sampler
    batch_seconds = seconds * batches.batch_size / batches.step_size  # gradient accumulation
    evaluation = 2 * training.eval_iter * batch_seconds * EVALUATION_COST
    per_step = evaluation / (training.eval_freq or LONGEST_EVAL_FREQ)
    steps = budget_s / (seconds + per_step)
    n_evaluations = EVALUATIONS + 1  # one before the first step
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
    """Time steps to decide on compiling and complete the hyper-parameters; and notices."""
    requested, why = plan.run.COMPILE, None
    if requested == "auto" and before is not None:
        requested, why = before.compiled, "as when this run began"
    notices = []
    minutes = asked.time_budget_minutes if asked.max_steps is None else None
    if asked.time_budget_minutes is not None and plan.training.max_steps is not None:
        notices.append("time_budget_minutes is not used: max_steps, where set, alone ends the run")
    budget_s = None if minutes is None else 60 * minutes
    total_steps = plan.count_steps(asked, trial.steps_per_epoch) if budget_s is None else None
    compiled = decide_compiling(requested, trial, total_steps, budget_s)
    if why is not None and compiled.on == requested:
        compiled = Compiled(compiled.on, why)
    elif requested is True and not compiled.on:
        notices.append(f"the model is not compiled: {compiled.reason}")
    say(f"Compile: {'on' if compiled.on else 'off'} ({compiled.reason})")
    if budget_s is not None:
        max_steps = steps_in(budget_s, trial, asked)
        notices.append(f"{max_steps:,} steps are expected to take {minutes:g} minutes")
        asked = dataclasses.replace(asked, max_steps=max_steps)
    total_steps = plan.count_steps(asked, trial.steps_per_epoch)
    training, about_steps = complete_training(asked, windows, total_steps)
    return compiled, training, notices + about_steps
