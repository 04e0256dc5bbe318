"""Decisions by timed steps: whether compiling pays, and the steps of a time budget."""

import bisect
import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from data import WindowPlan, evaluation_loader
from distributed.parallel import ALONE, Parallel
from distributed.sharding import whole
from engine.compiling import (
    compile_model,
    expected_savings,
    undo_compiling,
    what_prevents_compiling,
)
from engine.console import say
from engine.devices import synchronize
from engine.errors import first_line
from engine.memory import OutOfStepMemory, count_trained
from engine.optim import EVALUATIONS, LONGEST_EVAL_FREQ, LONGEST_EVAL_S, set_learning_rate
from engine.processor import using_threads
from engine.randomness import random_state, set_random_state
from generation import stream
from model import GPTModel
from planning.choices import WORTH_A_TRIAL, Choices
from planning.decisions import RunRecord, complete_training, most_steps_of
from planning.machine import Machine, keeps_best_on_disk
from planning.plan import RunPlan
from training.learner import Learner, steps_between
from training.spacing import (
    EVALUATION_SHARE,
    SAMPLE_TOKENS,
    SAMPLES_A_RUN,
    Spacing,
    allowed_seconds,
)
from training_utils import TrainingConfig
from visualize import render_losses

TIMED_STEPS = 3
N_SAMPLES = 3  # that main draws after training
# of a time budget, for which its steps are timed beforehand; and the most seconds
BUDGET_TRIAL_SHARE, MOST_TRIAL_S = 0.05, 60.0
FINAL_SHARE = 0.04  # of a time budget, the most that the evaluation after training takes
# of a time budget, the most that the samples after training take, unless their length is set; but
# so many tokens each are drawn in any case
LAST_SAMPLES_SHARE, LEAST_SAMPLE_TOKENS = 0.05, 50
LEAST_INTERVALS = 4  # between evaluations, where a time budget is short
TIMED_BATCHES, TIMED_TOKENS = 4, 10  # of an evaluation and a sample
LONG_S = 2.0  # what takes as long is timed once: to load libraries first is a small part of it
ENDING_S = 0.8  # seconds that Python takes to end after torch was imported (0.6 to 1.8)
LEAST_SHARE = 0.1  # of its minutes, that it trains even where its start-up took longer
RECIPE_WARMUP = 0.25  # of the steps, the most for the recipe's warm-up
SAVED_BYTES_A_S = 2e8  # of a checkpoint, hashed and synced


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
    prompt_lengths: Sequence[int] = (1,)  # of the run's samples, in tokens

    @classmethod
    def of(
        cls,
        machine: Machine,
        model: GPTModel,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader,
        prompt_lengths: Sequence[int],
    ) -> "Trial":
        """The trial of a run on a machine, with samples after prompts of some lengths."""
        ranks = machine.parallel if machine.parallel.kind == "fsdp" else ALONE
        learner = Learner(
            model, optimizer, machine.precision, ranks, micro_batch=machine.micro_batch
        )
        parallel, choices = machine.parallel, machine.choices
        return cls(learner, loader, machine.threads, parallel, choices, prompt_lengths)

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

    def costs(self, budget_s: float) -> "Costs":
        """What the parts of a run take, steps timed for a share of its budget. Collective."""
        most_batches = min(TIMED_BATCHES, self.count_batches(self.loader, overlapping=False))
        learner = self.learner
        steps_s = min(BUDGET_TRIAL_SHARE * budget_s, MOST_TRIAL_S)
        step = learner.in_smaller_parts(lambda: self._mean_step_seconds(steps_s), "a trial")
        generator, prompts_s = torch.Generator(learner.device).manual_seed(0), 0.0
        options = {"max_new_tokens": 1 + TIMED_TOKENS, "generator": generator}

        def evaluate(n_batches: int) -> float:
            """The seconds of a batch."""
            began_at = time.perf_counter()
            learner.evaluate(self.loader, n_batches, overlapping=False)
            return (time.perf_counter() - began_at) / n_batches

        def sample() -> None:
            """Notes when the first of its tokens is drawn: the prompts are read by then."""
            nonlocal prompts_s
            began_at = time.perf_counter()
            rows = [[0] * length for length in self.prompt_lengths]
            with whole(learner.model, learner.parallel), learner.precision.autocast():
                for n, _ in enumerate(stream(learner.model, rows, **options)):
                    if n == 0:
                        prompts_s = time.perf_counter() - began_at

        with using_threads(self.threads):
            batch = evaluate(1)
            # sharded, all ranks make each forward pass
            if not learner.parallel.lowest(batch >= LONG_S):
                batch = evaluate(most_batches)
            token = (_seconds(sample) - prompts_s) / TIMED_TOKENS
            costs = Costs(step, batch, token, _seconds(_draw), prompts=prompts_s)
            costs = costs.with_files(learner.model, learner.device)
            return Costs(*map(self.agreed, dataclasses.astuple(costs)))

    @staticmethod
    def count_batches(loader: DataLoader, *, overlapping: bool = True) -> int:
        """The batches of an evaluation over all of a loader's text."""
        size = loader.batch_sampler.batch_size
        return len(evaluation_loader(loader, micro_batch=size, overlapping=overlapping))

    def agreed(self, seconds: float) -> float:
        """The ranks' mean; all take the smallest of their micro-batches. Collective."""
        self.learner.micro_batch = self.parallel.lowest(self.learner.micro_batch)
        return self.parallel.mean(seconds)

    def _step_seconds(self) -> float:
        step, seconds = next(steps_between(self.loader, 0, 1)), []
        with self._undone():
            for _ in range(1 + TIMED_STEPS):
                started_at = time.perf_counter()
                self.learner.try_step(step, 1.0)
                synchronize(self.learner.device)
                seconds.append(time.perf_counter() - started_at)
        return statistics.median(seconds[1:])

    def _mean_step_seconds(self, least_s: float) -> float:
        """The mean over some steps, batches included: it tells what many take."""
        steps = steps_between(self.loader, 0, 1_000_000_000)
        with self._undone():
            self.learner.try_step(next(steps), 1.0)
            synchronize(self.learner.device)
            started_at = time.perf_counter()
            for count in itertools.count(1):
                self.learner.try_step(next(steps), 1.0)
                synchronize(self.learner.device)
                seconds = time.perf_counter() - started_at
                # with a sharded model all ranks make each step, so they stop after the same one
                is_enough = seconds >= least_s and (count >= TIMED_STEPS or seconds >= LONG_S)
                if self.learner.parallel.lowest(is_enough):
                    break
        return seconds / count

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Take steps in here with the run's threads; afterwards nothing has changed."""
        learner, optimizer = self.learner, self.learner.optimizer
        random_before = random_state(learner.device)
        rates = [group["lr"] for group in optimizer.param_groups]
        set_learning_rate(optimizer, 0.0)  # so that no weight changes
        try:
            with using_threads(self.threads):
                yield
        finally:
            self.loader.batch_sampler.start_at(0)
            optimizer.state.clear()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            set_random_state(random_before, learner.device)

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
    tokens = trial.loader.dataset.max_length * trial.loader.batch_sampler.step_size
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
    saves, cost = expected_savings(trial.learner.model, trial.learner.device)
    if measured := trial.known(""):
        saves, cost = measured.get("saves", saves), measured.get("seconds", cost)
    if budget_s is not None and budget_s * saves <= 2 * cost:
        return Compiled(False, f"a run of {budget_s:g} s would not repay it")
    seconds = trial.agreed(trial.step_seconds())
    steps = round((budget_s or 0) / seconds) if total_steps is None else total_steps
    reason = f"{steps:,} steps of {seconds:.2g} s"
    if steps * seconds * saves <= 2 * cost:
        return Compiled(False, f"{reason} would not repay it")
    obstacle = trial.compile(seconds)
    return Compiled(obstacle is None, obstacle or f"{reason} repay it")


def _seconds(work: Callable[[], None]) -> float:
    """The seconds of some work: at its second time, unless the first one took LONG_S."""
    for _ in range(2):
        started_at = time.perf_counter()
        work()
        seconds = time.perf_counter() - started_at
        if seconds >= LONG_S:
            break
    return seconds


def expected_save_s(model: torch.nn.Module) -> float:
    """The seconds of a checkpoint on a usual disk: weights, two moments, and the best weights."""
    return 4 * 4 * count_trained(model) / SAVED_BYTES_A_S


def _draw() -> None:
    two = [1.0, 1.0]
    render_losses(
        steps=[0, 1],
        train_losses=two,
        val_losses=two,
        best=1,
        batch_losses=two,
        vocab_size=2,
        title="",
    )


@dataclass(frozen=True)
class Costs:
    """The seconds that the parts of a run take."""

    step: float
    batch: float  # of an evaluation
    token: float  # of a sample: one for each prompt
    picture: float
    save: float = 0.0
    best: float = 0.0  # of better weights that an evaluation finds, where they go to the disk
    prompts: float = 0.0  # of a sample, before the first of its tokens

    def with_files(self, model: GPTModel, device: torch.device) -> "Costs":
        """With what a run's checkpoints and best weights take on a usual disk."""
        is_on_disk = keeps_best_on_disk(model, device)
        best = 4 * count_trained(model) / SAVED_BYTES_A_S if is_on_disk else 0.0
        return dataclasses.replace(self, save=expected_save_s(model), best=best)


@dataclass(frozen=True)
class Budget:
    """A run's time, in seconds, and what it is spent on."""

    seconds: float
    costs: Costs
    steps_per_epoch: int
    batches: tuple[int, int]  # of all training and of all validation text
    last_tokens: int  # of the samples after training, a prompt
    save_minutes: float = math.inf  # between checkpoints, as are
    save_every: int | None = None  # so many steps
    final_iter: int | None = None  # batches of the evaluation after training; None: what fits
    most_steps: int | None = None  # that are of use

    def plan(self, asked: TrainingConfig, *, most_warmup: float = 1.0) -> TrainingConfig:
        """The hyper-parameters with max_steps, eval_freq, eval_iter and final_iter: as many steps
        as fit, at least 1, and at most EVALUATION_SHARE and FINAL_SHARE for evaluations, unless the
        least are more. Warm-up has at most a share of most_warmup of the steps."""
        most_iter = min(asked.eval_iter or self.batches[1], max(self.batches))
        halved = [most_iter >> n for n in range(most_iter.bit_length())]
        for intervals, eval_iter in [*((EVALUATIONS, n) for n in halved), (LEAST_INTERVALS, 1)]:
            found = self._longest(asked.eval_freq, intervals, eval_iter)
            if self.evaluation_s(found, eval_iter) <= EVALUATION_SHARE * self._run_s:
                break
        last = self.final_batches
        most = min(int(most_warmup * found.total_steps), found.total_steps - 1)
        warmup = None if asked.warmup_steps is None else min(asked.warmup_steps, most)
        return dataclasses.replace(
            asked,
            max_steps=found.total_steps,
            warmup_steps=warmup,
            eval_freq=found.eval_freq,
            eval_iter=asked.eval_iter or eval_iter if eval_iter == most_iter else eval_iter,
            final_iter=asked.final_iter if last >= self.batches[1] else last,
        )

    def _longest(self, eval_freq: int | None, intervals: int, eval_iter: int) -> Spacing:
        """The run with the most steps for which there is time."""

        def run_of(steps: int) -> Spacing:
            freq = eval_freq or self._eval_freq(steps, intervals)
            return Spacing(steps, self.steps_per_epoch, freq)

        return run_of(self._most_steps(run_of, eval_iter))

    def steps_after(self, done: int, eval_freq: int, eval_iter: int) -> int:
        """The total steps of a run that has the budget left after `done`; at least one more."""

        def run_of(steps: int) -> Spacing:
            return Spacing(steps, self.steps_per_epoch, eval_freq)

        return self._most_steps(run_of, eval_iter, done)

    def _most_steps(self, run_of: Callable[[int], Spacing], eval_iter: int, done: int = 0) -> int:
        most = done + int(max(0.0, self.seconds) / max(self.costs.step, 1e-9)) + 2
        counts = range(done + 1, most)
        fit = bisect.bisect_right(
            counts, self.seconds, key=lambda steps: self.total_s(run_of(steps), eval_iter, done)
        )
        return done + max(1, min(fit, (self.most_steps or most) - done))

    def _eval_freq(self, steps: int, intervals: int) -> int:
        longest = max(LONGEST_EVAL_FREQ, round(LONGEST_EVAL_S / self.costs.step))
        return max(1, min(longest, -(-steps // intervals)))

    def total_s(self, evaluations: Spacing, eval_iter: int, done: int = 0) -> float:
        """The seconds of a run, or of its rest after `done` steps and their evaluation."""
        steps_s = (evaluations.total_steps - done) * self.costs.step
        evaluations_s = self.evaluation_s(evaluations, eval_iter, done)
        last_s = self.final_batches * self.costs.batch
        return steps_s + evaluations_s + last_s + self._other_s(evaluations, done)

    def evaluation_s(self, evaluations: Spacing, eval_iter: int, done: int = 0) -> float:
        """The seconds of a run's evaluations before the end of training."""
        of_one = self.batches_of_one(eval_iter) * self.costs.batch + self.costs.best
        return evaluations.count(done or -1) * of_one

    @property
    def final_batches(self) -> int:
        """The batches of the evaluation after training."""
        most = self.final_iter or int(FINAL_SHARE * self._run_s / max(self.costs.batch, 1e-9))
        return min(max(1, most), self.batches[1])

    @property
    def _run_s(self) -> float:
        """About the seconds of the run: the budget, or less where fewer steps are of use."""
        return min(self.seconds, (self.most_steps or math.inf) * self.costs.step)

    def batches_of_one(self, eval_iter: int) -> int:
        """The batches of an evaluation on the way, of both texts."""
        return sum(min(eval_iter, n) for n in self.batches)

    def _other_s(self, evaluations: Spacing, done: int) -> float:
        """The most seconds of pictures, samples and checkpoints."""
        costs, is_new = self.costs, done == 0
        # between the first evaluation and the last one, which have a sample and a picture anyway
        count = max(0, evaluations.count(done or -1) - 1 - is_new)
        sample_s = costs.prompts + SAMPLE_TOKENS * costs.token
        samples = min(count, SAMPLES_A_RUN)
        between = sum(
            min(each, allowed_seconds(self.seconds))
            for each in (samples * sample_s, count * costs.picture)
        )
        last_s = N_SAMPLES * costs.prompts + self.last_tokens * costs.token
        at_ends = (1 + is_new) * sample_s + last_s
        saves = 1 + self.seconds // (60 * self.save_minutes)
        if self.save_every is not None:
            saves = -(-evaluations.total_steps // self.save_every) - done // self.save_every
        return between + at_ends + costs.picture + saves * costs.save


def usable_seconds(deadline: float, of_s: float, parallel: Parallel) -> float:
    """The seconds that the main rank has left to plan for, of of_s that end at its deadline, by
    time.perf_counter(); but LEAST_SHARE of of_s at least. Collective."""
    left_s = deadline - time.perf_counter() - ENDING_S
    return parallel.broadcast(max(left_s, LEAST_SHARE * of_s))


def shorten_samples(plan: RunPlan, costs: Costs, budget_s: float) -> tuple[RunPlan, list[str]]:
    """The plan of a run with a time budget, of which its last samples take a small part; and a
    notice if they are shorter for it."""
    length = plan.sampling.max_new_tokens
    assert length is not None  # fitted() to the text
    tokens_s = LAST_SAMPLES_SHARE * budget_s - N_SAMPLES * costs.prompts
    most = int(tokens_s / max(N_SAMPLES * costs.token, 1e-9))
    short = max(LEAST_SAMPLE_TOKENS, most)
    if not plan.sample_length_is_open or short >= length:
        return plan, []
    sampling = dataclasses.replace(plan.sampling, max_new_tokens=short)
    notice = (
        f"samples have {short} tokens: {length} would take more than {LAST_SAMPLES_SHARE:.0%} of "
        "the time"
    )
    return dataclasses.replace(plan, sampling=sampling), [notice]


def _budget(
    seconds: float,
    costs: Costs,
    trial: Trial,
    plan: RunPlan,
    asked: TrainingConfig,
    windows: WindowPlan,
) -> Budget:
    assert plan.sampling.max_new_tokens is not None  # fitted() to the text
    return Budget(
        seconds,
        costs,
        trial.steps_per_epoch,
        (trial.count_batches(trial.loader, overlapping=False), windows.n_val_batches),
        N_SAMPLES * plan.sampling.max_new_tokens,
        asked.save_minutes,
        asked.save_every,
        asked.final_iter,
    )


def _spend(
    minutes: float,
    costs: Costs,
    trial: Trial,
    plan: RunPlan,
    asked: TrainingConfig,
    windows: WindowPlan,
    *,
    deadline: float | None,
) -> tuple[TrainingConfig, list[str]]:
    """The hyper-parameters of a run that takes some minutes, or ends at a deadline; and notices."""
    seconds = 60 * minutes
    if deadline is not None:
        seconds = usable_seconds(deadline, 60 * minutes, trial.parallel)
    from_weights = plan.start is not None and plan.run.MINUTES is not None
    budget = dataclasses.replace(
        _budget(seconds, costs, trial, plan, asked, windows),
        most_steps=most_steps_of(
            plan.recipe,
            minutes,
            trial.steps_per_epoch,
            from_weights=from_weights,
            chat=plan.chat,
        ),
    )
    # the recipe's warm-up is for the steps that it expected
    is_recipes = plan.recipe is not None and "warmup_steps" in plan.recipe.training
    planned = budget.plan(asked, most_warmup=RECIPE_WARMUP if is_recipes else 1.0)
    left = "" if deadline is None else f"{seconds / 60:.3g} of "
    notices = [f"{planned.max_steps:,} steps are expected to take {left}{minutes:g} minutes"]
    if planned.max_steps == budget.most_steps:
        notices = [f"{planned.max_steps:,} steps are enough: they need less than the time"]
    if planned.warmup_steps != asked.warmup_steps:
        notices.append(
            f"warmup_steps is lowered from {asked.warmup_steps} to {planned.warmup_steps}: the run "
            f"has {planned.max_steps} steps"
        )
    if asked.eval_iter is not None and planned.eval_iter != asked.eval_iter:
        notices.append(
            f"eval_iter is lowered from {asked.eval_iter} to {planned.eval_iter}: evaluations "
            f"would take more than {EVALUATION_SHARE:.0%} of the time"
        )
    return planned, notices


@dataclass(frozen=True)
class Rehearsal:
    """What a run is expected to be."""

    training: TrainingConfig
    notices: list[str]
    total_steps: int
    step_s: float
    seconds: float  # of all of it but start-up
    tokens: int  # that it trains on
    passes: float  # through the training text


def rehearse(plan: RunPlan, asked: TrainingConfig, windows: WindowPlan, trial: Trial) -> Rehearsal:
    """What a run without MINUTES would be, uncompiled, by TIMED_STEPS steps. Collective."""
    costs, notices = trial.costs(0.0), list[str]()
    if asked.time_budget_minutes is not None and asked.max_steps is None:
        minutes = asked.time_budget_minutes
        plan, notices = shorten_samples(plan, costs, 60 * minutes)
        asked, more = _spend(minutes, costs, trial, plan, asked, windows, deadline=None)
        notices += more
    total_steps = plan.count_steps(asked, trial.steps_per_epoch)
    training, about_steps = complete_training(asked, windows, total_steps)
    assert training.eval_freq and training.eval_iter, "complete_training() sets them"
    budget = _budget(total_steps * costs.step, costs, trial, plan, training, windows)
    budget = dataclasses.replace(budget, final_iter=training.final_iter or windows.n_val_batches)
    run = Spacing(total_steps, trial.steps_per_epoch, training.eval_freq)
    seconds = budget.total_s(run, training.eval_iter)
    epochs = total_steps / trial.steps_per_epoch
    tokens = round(epochs * windows.n_windows * windows.max_length)
    return Rehearsal(
        training,
        notices + about_steps,
        total_steps,
        costs.step,
        seconds,
        tokens,
        passes=tokens / windows.n_train,
    )


def try_out(
    plan: RunPlan,
    asked: TrainingConfig,
    windows: WindowPlan,
    trial: Trial,
    before: RunRecord | None,
    deadline: float | None = None,
) -> tuple[RunPlan, Compiled, TrainingConfig, list[str]]:
    """Time steps to decide on compiling and complete the hyper-parameters; and notices.

    The plan is the given one, or has shorter samples for a time budget, as a resumed run had at its
    start. The steps of time_budget_minutes take these minutes from now on, or end at a deadline, by
    time.perf_counter(), of which all that the program has done before is a part.
    """
    requested, why = plan.run.COMPILE, None
    if requested == "auto" and before is not None:
        requested, why = before.compiled, "as when this run began"
    if before is not None and before.settings["sampling_params"] == plan.run.sampling_params:
        plan = dataclasses.replace(plan, sampling=before.sampling)
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
    if minutes is not None:
        costs = trial.costs(60 * minutes)
        plan, about_samples = shorten_samples(plan, costs, 60 * minutes)
        asked, about_budget = _spend(minutes, costs, trial, plan, asked, windows, deadline=deadline)
        notices += about_budget + about_samples
    total_steps = plan.count_steps(asked, trial.steps_per_epoch)
    training, about_steps = complete_training(asked, windows, total_steps)
    return plan, compiled, training, notices + about_steps
