"""The training loop: steps, evaluations, samples, checkpoints, and resuming."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import WindowBatches, as_array
from distributed.parallel import joined
from distributed.sharding import whole
from distributed.signals import StopSignals
from engine.console import say, show_picture, track
from engine.devices import with_index
from engine.errors import (
    CheckpointError,
    LostRankError,
    NumericsError,
    ResourceError,
    SettingsError,
    Stopped,
    first_line,
)
from engine.main_guard import require_main_guard
from engine.memory import ADVICE, OutOfStepMemory
from engine.metrics import as_duration
from engine.optim import (
    Schedule,
    extend_schedule,
    learning_rate_at,
    make_schedule,
    set_learning_rate,
)
from engine.precision import Precision, choose_precision
from engine.processor import using_threads
from engine.randomness import random_state, set_random_state
from engine.settings import find_problems, raise_if_any, shown
from environment import RuntimeEnv
from generation import generate, text_to_token_ids
from insight.report import Report
from insight.run_text import RunText
from planning.chat import Question
from planning.decisions import most_steps_of
from planning.machine import keeps_best_on_disk
from planning.trial import N_SAMPLES, Budget, Costs, Trial, usable_seconds
from storage.checkpoint import (
    BestWeights,
    CheckpointStore,
    SaveClock,
    load_weights,
    most_saves,
)
from storage.tracking import open_trackers
from text.tokenizer import Tokenizer
from training.journal import BLANK, ENDED, PICTURE, History, Journal
from training.learner import Learner, Step, count_steps, steps_between
from training.pace import (
    BY_HEART,
    LATE_SHARE,
    MISS,
    TIME,
    NewPlan,
    first_review,
    forecast_loss,
    learns_by_heart,
    plan_for_time,
    plan_to_end,
)
from training.run_folder import RunFolder
from training.spacing import SAMPLE_EVERY, SAMPLE_TOKENS, SAMPLES_A_RUN, Allowance, Spacing
from training_utils import TrainingConfig, as_prompts

DRAWN = {"temperature": 0.8, "top_k": 50}  # greedy text of a young model repeats one token
SAMPLE_SEED = 123
SAMPLE_CHARACTERS = 1000  # of a prompt and its continuation; longer texts are cut at the front
WORTH_SAYING = 0.02  # of the steps, that a new plan adds or takes
UNSEEN_PICTURE_S = 0.3  # where none was drawn yet
MOST_SKIPPED = 10  # steps in a row
# from one try to save the end of a run to the next, where the disk refuses: four minutes in all
END_WAITS_S = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_HALVINGS = 16  # steps in a row in which fp16 halves its loss scale: from 2 ** 16 to 1


@dataclass(frozen=True)
class LoopPlan:
    """The schedule of the loop; counts are in optimizer steps."""

    total_steps: int
    eval_freq: int
    eval_iter: int
    max_grad_norm: float  # 0: gradients are not clipped
    schedule: Schedule | None  # None: the optimizer's learning rates don't change
    prompts: list[str] | list[Question]  # of samples
    patience: int | None = None  # evaluations without a better one, then the run ends
    former_end: int | None = None  # the last step of a run that was made longer since
    budget: Budget | None = None  # the run's time, by which its steps are planned anew
    stops_by_heart: bool = False  # ends a run that only learns its text by heart
    keeps_best: bool = True  # the weights of the lowest validation loss
    to_come: tuple[NewPlan, ...] = ()  # new plans that an earlier process has recorded


def training_loop(trainer: "Trainer", train_loader: DataLoader, val_loader: DataLoader) -> None:
    """Train until the plan's total_steps are done, in as many epochs as that takes.

    Evaluates where Spacing says: before the first step, every eval_freq steps, and at the end of
    each long epoch and of the run, over the same batches each time. Samples before the first step,
    at such ends and, in between, at evaluations, as far as there is time. Saves before it
    evaluates, so that a resumed run has at most one evaluation to catch up on. Raises Stopped after
    a signal, at a step's end.
    """
    learner, journal = trainer.learner, trainer.journal
    steps_per_epoch = count_steps(train_loader)

    def spacing() -> Spacing:
        return Spacing(trainer.plan.total_steps, steps_per_epoch, trainer.plan.eval_freq)

    def evaluate_where_due() -> None:
        step, plan = trainer.steps, trainer.plan
        run_ends = step in (plan.total_steps, plan.former_end)
        epoch_ends = run_ends or spacing().ends_epoch(step)
        if (
            journal.has_evaluated()
            or trainer.is_planned()
            or not (epoch_ends or spacing().is_due(step))
        ):
            return
        trainer.look_at(journal.pause())
        began_at = time.perf_counter()
        losses = [trainer.evaluate(train_loader, overlapping=False), trainer.evaluate(val_loader)]
        journal.spent.note("evaluation", time.perf_counter() - began_at)
        epoch = -(-step // steps_per_epoch) if epoch_ends and step > 0 else None
        journal.evaluation(epoch, *losses)
        trainer.keep_best()
        since_sample = max(SAMPLE_EVERY, plan.total_steps // SAMPLES_A_RUN)
        if step == 0 or run_ends:
            trainer.sample(f"After epoch {epoch}" if step > 0 else "Before training")
        elif trainer.may_sample() and (epoch_ends or journal.steps_since_sample >= since_sample):
            trainer.sample(f"After epoch {epoch}" if epoch_ends else f"After step {step}")

    def end_step() -> None:
        evaluate_where_due()
        trainer.plan_anew_where_due()
        trainer.forecast_where_due()

    def is_over() -> bool:
        plan = trainer.plan
        out_of_patience = plan.patience is not None and journal.history.since_best >= plan.patience
        return trainer.steps >= plan.total_steps or out_of_patience

    learner.model.train()
    learner.optimizer.zero_grad()  # the caller's gradients
    end_step()
    while not is_over():
        bar = first, last, label = spacing().bar_at(trainer.steps)
        steps = steps_between(train_loader, trainer.steps, last)
        for taken in track(steps, last - first, label, trainer.steps - first):
            trainer.stop.check()
            if is_over() or spacing().bar_at(trainer.steps) != bar:
                break
            if (schedule := trainer.plan.schedule) is not None:
                set_learning_rate(learner.optimizer, learning_rate_at(trainer.steps, schedule))
            loss, grad_norm = trainer.step(taken)
            trainer.steps += 1
            rate = learner.optimizer.param_groups[0]["lr"]
            trainer.look_at(journal.step(trainer.steps, loss, grad_norm, taken.n_targets, rate))
            trainer.save_where_due()
            if trainer.steps < last:
                end_step()
        trainer.stop.check()
        end_step()  # below the progress bar


@dataclass
class SkippedSteps:
    """Counts steps that were skipped in a row because their loss or gradient was not finite."""

    scales_loss: bool  # for fp16: an overflow then only halves the scale
    in_a_row: int = 0
    halvings: int = 0  # of the loss scale, in a row

    def look_at(self, row: dict[str, Any], history: History) -> None:
        """Count a step by its row of metrics.jsonl; NumericsError after MOST_SKIPPED skipped."""
        loss, norm = row["train/loss"], row["train/grad_norm"]
        if math.isfinite(loss + norm):
            self.in_a_row = self.halvings = 0
            return
        if self.scales_loss and math.isfinite(loss):
            self.halvings += 1
            if self.halvings <= MOST_HALVINGS:
                return
        history.skipped += 1
        self.in_a_row += 1
        fault = f"step {row['step']}: the loss is {loss:.4g} and the gradient's norm {norm:.4g}"
        if self.in_a_row == MOST_SKIPPED:
            raise NumericsError(
                f"{fault}, as {MOST_SKIPPED - 1} times in a row before: training diverged.\n"
                f"The learning rate was {row['train/lr']:.3g}; begin a run with a third of it, or "
                "with a smaller max_grad_norm."
            )
        say(f"Note: {fault}: the step is skipped ({history.skipped} so far)")


@dataclass
class Saving:
    """A run's folder, its checkpoints, and when one is due."""

    run: RunFolder | None  # records smaller micro-batches
    store: CheckpointStore
    clock: SaveClock
    best: BestWeights | None = None  # for the next checkpoint
    last_step: int = 0  # of the newest checkpoint


@dataclass
class Trainer:
    """The state of a training run, and the actions of the loop."""

    learner: Learner
    journal: Journal
    tokenizer: Tokenizer
    plan: LoopPlan
    saving: Saving | None = None  # None: no checkpoints
    steps: int = 0  # done

    def __post_init__(self) -> None:
        self.parallel = self.learner.parallel
        run = self.saving and self.saving.run
        requested = self.parallel.only_main(run.take_stop_request) if run else None
        self.stop = StopSignals(self.parallel, requested)
        self.skipped = SkippedSteps(self.learner.precision.scales_loss)
        self.planned: list[NewPlan] = []  # the new plans that are followed
        self._is_late = False  # for a new plan by time
        self._step_began_at = 0.0
        self._samples = Allowance()
        if self.saving is not None and self.saving.run is not None:
            self.learner.on_smaller = self.saving.run.note_micro_batch

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; returns the loss and gradient norm over all ranks."""
        label = self.parallel.place = f"step {self.steps + 1}"
        self._step_began_at = time.monotonic()
        return self.learner.step(step, self.plan.max_grad_norm, self.stop, label)

    def evaluate(self, loader: DataLoader, *, overlapping: bool = True) -> float:
        """Learner.evaluate() over eval_iter batches of a loader; Stopped after a signal."""
        n_batches = self.plan.eval_iter
        return self.learner.evaluate(loader, n_batches, self.stop, overlapping=overlapping)

    def look_at(self, rows: list[dict[str, Any]]) -> None:
        """Count skipped steps; NumericsError after too many."""
        for row in rows:
            self.skipped.look_at(row, self.journal.history)

    def may_sample(self) -> bool:
        """Whether the run's time allows one more sample; ranks agree on it."""
        return bool(self.parallel.lowest(self._samples.allows(self.journal.elapsed_s)))

    def sample(self, label: str) -> None:
        """Print what the model writes after the plan's prompts, drawn with the same seed."""
        began_at = time.monotonic()
        model = self.learner.model
        # its own generator: the numbers of the run don't depend on samples
        generator = torch.Generator(self.learner.device).manual_seed(SAMPLE_SEED)
        with whole(model, self.parallel), self.learner.precision.autocast():
            options = {"max_new_tokens": SAMPLE_TOKENS, "generator": generator} | DRAWN
            texts = continue_prompts(model, self.tokenizer, self.plan.prompts, **options)
        texts = [t if len(t) <= SAMPLE_CHARACTERS else f"…{t[-SAMPLE_CHARACTERS:]}" for t in texts]
        self.journal.note_sample(label, texts)
        took_s = time.monotonic() - began_at
        self._samples.spend(took_s)
        self.journal.spent.note("sample", took_s)
        self.journal.leave_out(took_s)

    def keep_best(self) -> None:
        """Keep the weights if their evaluation is the best so far: a copy, which the next save
        writes, or large ones on the disk at once."""
        history, lowest, saving = self.journal.history, math.inf, self.saving
        if saving is None or not self.plan.keeps_best:
            return
        if saving.best is not None:
            lowest = history.val_losses[history.steps.index(saving.best.step)]
        if self.steps == 0 or history.val_losses[-1] >= lowest:
            return
        began_at = time.monotonic()
        try:
            saving.best = saving.store.keep_best(self.steps, self.learner.model)
        except ResourceError as error:
            self._require_folder(error)
            say(f"Note: {first_line(error)} The best weights stay those from before")
        took_s = time.monotonic() - began_at
        self.journal.leave_out(took_s)
        self.journal.spent.note("best", took_s)

    def save_where_due(self) -> None:
        """Save after the last step and when the clock says so; ranks agree on it and on signals."""
        is_last = self.steps == self.plan.total_steps
        is_due = self.saving is not None and (is_last or self.saving.clock.is_due(self.steps))
        step_s = time.monotonic() - self._step_began_at
        budget = self.plan.budget
        if budget is not None and (pause_s := self.journal.leave_out_pause()):
            took = as_duration(pause_s)
            say(f"Note: step {self.steps:,} took {took}: the pause is not counted as training time")
        is_late = budget is not None and self.journal.elapsed_s > LATE_SHARE * budget.seconds
        saves, self._is_late = map(bool, self.stop.agree(is_due, is_late, step_s=step_s))
        if saves:
            assert self.saving is not None
            try:
                self.save()
            except ResourceError as error:
                self._require_folder(error)
                wait_s = self.saving.clock.failed()
                say(
                    f"Note: {first_line(error)} Training goes on; the next try is in {wait_s:.0f} s"
                )

    def plan_anew_where_due(self) -> None:
        """Plan the run anew after this step's evaluation, by its time or where it learns by heart;
        or as recorded by an earlier process. Collective."""
        plan = self.plan
        if plan.schedule is None or not 0 < self.steps < plan.total_steps or self.is_planned():
            return
        if plan.to_come:
            if plan.to_come[0].after_step == self.steps:
                self.plan = replace(plan, to_come=plan.to_come[1:])
                self._follow(plan.to_come[0])
            return
        new = self._plan_for_time(plan.schedule) or self._plan_by_heart(plan.schedule)
        if new is None:
            return
        if self.saving is not None and self.saving.run is not None:
            try:
                self.saving.run.note_plan(new, self.parallel.on_main)
            except ResourceError as error:
                self._require_folder(error)
                say(f"Note: {first_line(error)} The run keeps its {plan.total_steps:,} steps")
                if new.why == TIME:  # by heart is asked again after the next evaluation
                    self.plan = replace(plan, budget=None)
                return
        self._follow(new)
        say_new_plan(new, self.journal)

    def forecast_where_due(self) -> None:
        """Tell what is expected of a run of so many minutes where its decay begins, once."""
        plan, history = self.plan, self.journal.history
        schedule = plan.schedule
        if schedule is None or schedule.kind != "wsd" or plan.budget is None:
            return
        if self.steps != plan.total_steps - schedule.decay_steps or history.forecast is not None:
            return
        if any(new.why == BY_HEART for new in self.planned):
            return
        first = sum(step <= schedule.warmup_steps for step in history.steps)
        steps, losses = history.steps[first:], history.val_losses[first:]
        if found := forecast_loss(steps, losses, schedule):
            self.journal.note_forecast(*found)

    def is_planned(self) -> bool:
        """Whether the run was planned anew after this step, and what was due there is done."""
        return bool(self.planned) and self.planned[-1].after_step == self.steps

    def _follow(self, new: NewPlan) -> None:
        self.planned.append(new)
        schedule = new.apply(self.plan.schedule)
        self.plan = replace(self.plan, total_steps=new.total_steps, schedule=schedule)
        self.journal.plan_anew(new.total_steps)

    def _plan_for_time(self, schedule: Schedule) -> NewPlan | None:
        """The plan with the steps for which there is time: at a quarter of the run, and at a later
        evaluation where they are others by more than MISS."""
        plan, journal = self.plan, self.journal
        if plan.budget is None or (self.planned and self.planned[-1].why == BY_HEART):
            return None
        if self.planned:
            is_due = journal.has_evaluated()
        else:
            review = first_review(plan.total_steps, schedule)
            is_due = review is not None and (self.steps >= review or self._is_late)
        if not is_due:
            return None
        self.look_at(journal.fetch())  # waits for the device
        seconds = plan.budget.seconds - journal.elapsed_s
        left = replace(plan.budget, seconds=seconds, costs=self._costs_so_far(plan.budget))
        steps = left.steps_after(self.steps, plan.eval_freq, plan.eval_iter)
        now = max(self.parallel.broadcast(steps), schedule.warmup_steps + 1)
        if self.planned and abs(now - plan.total_steps) <= MISS * plan.total_steps:
            return None
        return plan_for_time(self.steps, plan.total_steps, now, schedule)

    def _costs_so_far(self, budget: Budget) -> Costs:
        """What the parts of the run have taken on their means, or are expected to take."""
        journal, spent, expected = self.journal, self.journal.spent, budget.costs
        return Costs(
            step=journal.step_s,
            batch=spent.mean("evaluation") / budget.batches_of_one(self.plan.eval_iter),
            token=max(0.0, spent.mean("sample") - expected.prompts) / SAMPLE_TOKENS,
            picture=spent.mean("picture", expected.picture),
            save=spent.mean("save", expected.save),
            best=spent.mean("best", expected.best),
            prompts=expected.prompts,
        )

    def _plan_by_heart(self, schedule: Schedule) -> NewPlan | None:
        """The plan that ends a run which only learns its text by heart, after an evaluation."""
        history = self.journal.history
        is_asked = self.plan.stops_by_heart and self.journal.has_evaluated()
        if not is_asked or self.steps <= schedule.warmup_steps:
            return None
        before = [plan.after_step for plan in self.planned if plan.why == BY_HEART]
        since = sum(0 < step <= max(before, default=0) for step in history.steps)
        # without the evaluation of the untrained model
        if not learns_by_heart(history.train_losses[1:], history.val_losses[1:], since):
            return None
        return plan_to_end(self.steps, schedule)

    def insist(self, write: Callable[[], None]) -> None:
        """Write at the end of a run; where the disk refuses, try again for sum(END_WAITS_S).

        Raises Stopped after a signal, ResourceError of the last try. Collective.
        """
        for wait_s in END_WAITS_S:
            try:
                write()
                return
            except ResourceError as error:
                self._require_folder(error)
                say(f"Note: {first_line(error)} Trying again in {wait_s} s")
            for _ in range(wait_s):
                time.sleep(1)
                self.stop.agree()
                self.stop.check()
        write()

    def _require_folder(self, error: ResourceError) -> None:
        """Raise an error that waiting does not mend: a lost rank, or a folder that was removed."""
        assert self.saving is not None
        folder = self.saving.store.checkpoints
        if isinstance(error, LostRankError) or not self.parallel.from_main(folder.is_dir):
            raise error

    def save(self) -> None:
        """Save a checkpoint, unless one of this step exists or there was no step.

        Raises ResourceError if the disk refuses it. Collective.
        """
        saving, learner = self.saving, self.learner
        if saving is None or self.steps in (0, saving.last_step):
            return
        began_at = time.monotonic()
        self.look_at(self.journal.fetch())
        own, *others = self.parallel.gather(random_state(learner.device))
        state = {
            "steps": self.steps,
            "skipped_in_a_row": self.skipped.in_a_row,
            "halvings_in_a_row": self.skipped.halvings,
            "journal": self.journal.state(),
            "random": own,
            "other_ranks": others,
            "scaler": learner.scaler.state_dict(),
            "schedule": vars(self.plan.schedule),
            "total_steps": self.plan.total_steps,
            "new_plans": [new.to_json() for new in self.planned],
            "budget_s": None if self.plan.budget is None else self.plan.budget.seconds,
        }
        saving.store.save(self.steps, learner.model, learner.optimizer, state, saving.best)
        saving.last_step = self.steps
        saving.clock.note(began_at)
        took_s = time.monotonic() - began_at
        self.journal.leave_out(took_s)
        self.journal.spent.note("save", took_s)

    def restore(self) -> None:
        """Resume from the newest checkpoint, if there is one; CheckpointError if all are bad."""
        assert self.saving is not None
        store = self.saving.store
        found = store.restore(self.learner.model, self.learner.optimizer)
        if found is None:
            self.journal.restore(None)
            return
        state, self.saving.best = found
        try:
            self._restore(state)
            self.saving.last_step = self.steps
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            # written by another program
            raise CheckpointError(f"{store.newest()} can't be gone on from: {error!r}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.skipped.in_a_row = state["skipped_in_a_row"]
        self.skipped.halvings = state["halvings_in_a_row"]
        self.journal.restore(state["journal"])
        random_states = [state["random"], *state["other_ranks"]]
        if self.parallel.rank < len(random_states):
            set_random_state(random_states[self.parallel.rank], self.learner.device)
        else:  # the run had fewer ranks
            self.parallel.seed_apart(self.steps)
        if state["scaler"]:  # empty without fp16
            self.learner.scaler.load_state_dict(state["scaler"])
        schedule = Schedule(**state["schedule"])
        # after the checkpoint at its former end, the run has yet to make its last evaluation
        former_end = self.steps if self.steps == state["total_steps"] else None
        plan, budget = self.plan, self.plan.budget
        self.planned = [NewPlan(**new) for new in state["new_plans"]]
        to_come = tuple(new for new in plan.to_come if new not in self.planned)
        # a new plan that the checkpoint follows may be shorter than the one before
        total = plan.total_steps if to_come == plan.to_come else state["total_steps"]
        if total > state["total_steps"]:
            schedule = extend_schedule(schedule, total, self.steps)
        if budget is not None and state["budget_s"] is not None:
            budget = replace(budget, seconds=state["budget_s"])
        self.plan = replace(
            plan,
            total_steps=total,
            schedule=schedule,
            former_end=former_end,
            budget=budget,
            to_come=to_come,
        )
        self.journal.plan_anew(total)

    def use_best(self) -> None:
        """Load the best weights into the model."""
        best = self.saving.best if self.saving else None
        if self.saving is None or best is None or best.step == self.steps:
            return
        weights = self.saving.store.weights_of_best(best, self.learner.model)
        if weights is not None:
            load_weights(self.learner.model, weights, "the best weights", self.parallel)
            self.journal.weights_of_step = best.step


def continue_prompts(
    model: nn.Module, tokenizer: Tokenizer, prompts: list[str] | list[Question], **options: Any
) -> list[str]:
    """Continue prompts up to their end of text, or answer questions, by generate(); SettingsError
    if one is empty.

    Where the model writes nothing that can be seen, the text says so.
    """
    asked = [prompt for prompt in prompts if isinstance(prompt, Question)]
    if asked:
        return _answer(model, tokenizer, asked, **options)
    ids = [text_to_token_ids(str(prompt), tokenizer)[0].tolist() for prompt in prompts]
    end, n_begin = tokenizer.end_of_text_id, len(tokenizer.begin_ids)
    texts = []
    for row, prompt in zip(generate(model, ids, end_of_text_id=end, **options), ids, strict=True):
        is_ended = row[-1] == end
        text = tokenizer.decode(row[n_begin : -1 if is_ended else None])
        if text.split() == tokenizer.decode(prompt[n_begin:]).split():
            text += f" {(ENDED if is_ended else BLANK).en}"
        texts.append(text)
    return texts


def _answer(
    model: nn.Module, tokenizer: Tokenizer, questions: list[Question], **options: Any
) -> list[str]:
    """Each question with the model's answer below it."""
    ends, prompts = questions[0].ends, [question.ids for question in questions]
    texts = []
    for question, row in zip(
        questions, generate(model, prompts, stop_ids=ends, **options), strict=True
    ):
        is_ended = row[-1] in ends
        answer = tokenizer.decode(row[len(question.ids) : -1 if is_ended else None]).strip()
        texts.append(f"{question.text}\n-> {answer or (ENDED if is_ended else BLANK).en}")
    return texts


def train(env: RuntimeEnv) -> Journal:
    """Train a prepared run, or resume it from its newest checkpoint.

    The model ends with its last weights; with patience or MINUTES set, or where training has
    diverged, with the best ones, unless the run keeps none. Raises Stopped after a signal, with a
    checkpoint saved; BusyError if another program trains in the folder, CheckpointError if its
    checkpoints are bad, ResourceError if the disk refuses them, NumericsError if training diverges.
    """
    held = env.parallel.held_by_main(env.run.opened)
    with env.parallel.watched(), held, using_threads(env.run.record.threads), env.run.training():
        env.run.path = env.parallel.broadcast(env.run.path)  # opened() may have changed it
        env.parallel.note("run", str(env.run.path))
        return _train(env)


def _train(env: RuntimeEnv) -> Journal:
    run, config, parallel = env.run, env.train_config, env.parallel
    record = run.record
    for note in run.notes:
        say(f"Note: {note}")
    store = CheckpointStore(
        run.path,
        record.run_id,
        config.keep_checkpoints,
        parallel,
        best_on_disk=keeps_best_on_disk(env.model, env.device),
    )
    store.require_room(env.model, most_saves(record.total_steps, config.save_every))
    store.keep_frozen(env.model)
    report = _report_of(env)
    journal = Journal(
        vocab_size=env.tokenizer.vocab_size,
        total_steps=record.total_steps,
        log_every=record.settings["LOG_EVERY"],
        folder=parallel.only_main(run.path),
        token_size=env.token_size,
        draw_report=parallel.only_main(report.follow),
    )
    saving = Saving(run, store, SaveClock(config.save_every, config.save_minutes))
    trainer = Trainer(env.learner, journal, env.tokenizer, _plan_loop(env), saving)
    trainer.restore()
    if run.goes_on or trainer.steps > 0:
        say(
            f"Resuming {run.path}: {trainer.steps:,} of {trainer.plan.total_steps:,} steps are done"
        )
    trackers = parallel.only_main(record.settings["TRACKING"]) or []
    journal.trackers = open_trackers(trackers, run.path, record.run_id, run.settings, trainer.steps)
    try:
        with trainer.stop, _reported(journal, parallel.only_main(report)):
            _train_and_save(trainer, store, env.train_loader, env.val_loader)
            trainer.insist(lambda: store.save_best(saving.best))
    finally:
        journal.close()
    history = journal.history
    if config.patience is not None or history.has_diverged or trainer.plan.stops_by_heart:
        trainer.use_best()
    _say_if_cut_short(trainer, config.patience)
    journal.complete_picture()
    show_picture(run.path / PICTURE)
    return journal


def _say_if_cut_short(trainer: Trainer, patience: int | None) -> None:
    """Say why a run ended before its last step, or does not keep its last weights."""
    history = trainer.journal.history
    best_step = history.steps[history.best]
    if trainer.steps < trainer.plan.total_steps:
        say(
            f"Stopped early: {patience} evaluations in a row have not been better than "
            f"that of step {best_step}"
        )
    elif trainer.planned and trainer.planned[-1].why == BY_HEART:
        say(
            "Stopped early, as the model began to learn its text by heart; the best weights, of "
            f"step {best_step}, are used from here on"
        )
    if history.has_diverged:
        losses, kept = history.train_losses, trainer.saving and trainer.saving.best
        is_used = kept and kept.step in (trainer.journal.weights_of_step, trainer.steps)
        best = f"; the best weights, of step {best_step}, are used from here on" if is_used else ""
        say(
            f"Warning: training diverged: the training loss rose from {losses[0]:.4g} to "
            f"{losses[-1]:.4g}{best}"
        )


@contextlib.contextmanager
def _reported(journal: Journal, report: Report | None) -> Iterator[None]:
    """Draw the report once more if the run diverges or is stopped in here: the one of the last
    evaluation knows nothing of the steps since."""
    try:
        yield
    except (NumericsError, Stopped):
        journal.fetch()
        if report is not None:
            report.finish()
        raise


def _report_of(env: RuntimeEnv) -> Report:
    """The report that is drawn while a run trains."""
    if env.run.record.chat is not None:  # figures of a whole text say nothing about answers
        return Report(env.run.path)
    # other ranks wait meanwhile
    limit_s = math.inf if env.parallel.is_alone else env.parallel.timeout_s / 4
    train, val = (as_array(loader.dataset.tokens) for loader in (env.train_loader, env.val_loader))
    text = RunText(train, val, env.tokenizer, env.run.record.tokenizer)
    return Report(env.run.path, text, limit_s=limit_s)


def _plan_loop(env: RuntimeEnv) -> LoopPlan:
    """The plan that a run begins with, and those that earlier processes made on its way."""
    run, config = env.run, env.train_config
    record, to_come = run.record, tuple(run.new_plans)
    total_steps = to_come[0].steps_before if to_come else record.total_steps
    assert config.eval_freq and config.eval_iter  # try_out() has completed them
    return LoopPlan(
        total_steps=total_steps,
        eval_freq=config.eval_freq,
        eval_iter=config.eval_iter,
        max_grad_norm=config.max_grad_norm,
        schedule=_schedule_of(config, total_steps),
        prompts=env.prompts,
        patience=config.patience,
        budget=_budget_until(run.deadline, env),
        stops_by_heart=record.choice is not None and not record.keeps_last,
        keeps_best=not record.keeps_last,
        to_come=to_come,
    )


def _budget_until(deadline: float | None, env: RuntimeEnv) -> Budget | None:
    """The time of a run with a budget, in seconds from now: all of it, or what is left until a
    deadline; None without a budget."""
    record, config = env.run.record, env.train_config
    minutes = config.time_budget_minutes
    if minutes is None or record.asked.training.max_steps is not None:
        return None
    assert record.sampling.max_new_tokens is not None  # fitted() to the text
    seconds = 60 * minutes
    if deadline is not None:
        seconds = usable_seconds(deadline, seconds, env.parallel)
    costs = Costs(0.0, 0.0, 0.0, UNSEEN_PICTURE_S).with_files(env.model, env.device)
    n_val = Trial.count_batches(env.val_loader)
    return Budget(
        seconds,
        costs,
        record.steps_per_epoch,
        (Trial.count_batches(env.train_loader, overlapping=False), n_val),
        N_SAMPLES * record.sampling.max_new_tokens,
        config.save_minutes,
        config.save_every,
        config.final_iter or n_val,
        most_steps_of(
            record.recipe,
            minutes,
            record.steps_per_epoch,
            from_weights=record.start is not None and record.asked.minutes is not None,
            chat=record.chat,
        ),
    )


def say_new_plan(new: NewPlan, journal: Journal) -> None:
    """Say in a line what changes, unless it is hardly anything."""
    was, now = new.steps_before, new.total_steps
    if new.why == TIME:
        if abs(now - was) > WORTH_SAYING * was:
            say(
                f"Note: after step {new.after_step:,} the run is planned anew: {now:,} steps "
                f"instead of {was:,}, at the {journal.step_s:.2g} s that a step takes"
            )
        return
    history = journal.history
    then = "the run ends here"
    if now > new.after_step:
        then = f"the learning rate falls from here on, and the run ends after step {now:,}"
    say(
        f"Note: after step {new.after_step:,} the validation text gains nothing more and the model "
        f"begins to learn by heart: {then} (best so far: step {history.steps[history.best]:,})"
    )


def _schedule_of(config: TrainingConfig, total_steps: int) -> Schedule:
    # try_out() has completed them
    assert config.learning_rate and config.warmup_steps is not None
    return make_schedule(
        config.schedule,
        config.learning_rate,
        config.warmup_steps,
        total_steps,
        decay_share=config.decay_share,
        final_rate=config.final_rate,
    )


def _train_and_save(trainer: Trainer, store: CheckpointStore, *loaders: DataLoader) -> None:
    """Run the loop; save a checkpoint at its end and after a signal."""
    try:
        try:
            training_loop(trainer, *loaders)
            # for a run that patience has ended, or whose last save failed
            trainer.insist(trainer.save)
            trainer.stop.agree()
            trainer.stop.check()
        except Stopped as stopped:
            trainer.save()
            kept = f"saved in {store.newest()}" if trainer.steps else "nothing was trained yet"
            raise Stopped(
                stopped.signal_number,
                f"Stopped after step {trainer.steps:,} of {trainer.plan.total_steps:,}: {kept}.\n"
                "The same command goes on from there.",
            ) from None
    except NumericsError as error:
        newest = store.newest()
        kept = "No checkpoint was made yet." if newest is None else f"The last good one: {newest}"
        raise NumericsError(f"{error}\n{kept}") from None
    except LostRankError:
        raise
    except ResourceError as error:
        raise ResourceError(f"{error}\n{_last_checkpoint(store)}") from error
    except OutOfStepMemory as error:
        windows = "a single window" if error.n_windows == 1 else f"{error.n_windows} windows"
        advice = ADVICE if error.n_windows == 1 else "Set a smaller batch_size, and accumulate."
        raise ResourceError(
            f"{error.where} ran out of memory with {windows} at a time: {str(error)[:100]}\n"
            f"{advice}\n{_last_checkpoint(store)}"
        ) from error


def _last_checkpoint(store: CheckpointStore) -> str:
    newest = store.newest()
    return "No checkpoint was made yet." if newest is None else f"The last checkpoint: {newest}"


def train_model_simple(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str | list[str],
    tokenizer: Tokenizer,
    log_every: int = 0,
    *,
    precision: Precision | None = None,
    max_grad_norm: float = 1.0,
) -> tuple[list[float], list[float], list[int]]:
    """Train a GPTModel in a script of your own, without files and without a schedule.

    Returns (train_losses, val_losses, tokens_seen), one entry per evaluation: before the first
    step, every eval_freq steps and at the end of each epoch, if there are at most ten or an epoch
    has at least 100 steps and eval_freq. Samples continue start_context, one text or a list of
    them. precision None is bf16 if the device has it; max_grad_norm 0 never clips. Under torchrun
    the loaders must be prepare_environment()'s, which have each process's share. Raises
    SettingsError with every wrong value, NumericsError if training diverges.
    """
    counts = {"num_epochs": num_epochs, "eval_freq": eval_freq, "eval_iter": eval_iter}
    problems = [
        f"{name} is {shown(count)}; it must be a whole number at least {least}"
        for (name, count), least in zip(counts.items(), (0, 1, 1), strict=True)
        if not isinstance(count, int) or count < least
    ]
    problems += find_problems(TrainingConfig, {"start_context": start_context})
    raise_if_any(problems, "train_model_simple()")
    parallel, batches = joined(), train_loader.batch_sampler
    if not parallel.is_alone and not isinstance(batches, WindowBatches):
        raise SettingsError(
            "train_model_simple() under torchrun needs the loaders of prepare_environment(): of "
            "others it does not know which share is whose."
        )
    context = train_loader.multiprocessing_context
    require_main_guard(train_loader.num_workers, context and context.get_start_method())
    device, micro_batch = with_index(device), getattr(batches, "micro_batch", 0)
    precision = precision or choose_precision("auto", device)
    learner = Learner(model, optimizer, precision, parallel, device=device, micro_batch=micro_batch)
    plan = LoopPlan(
        total_steps=num_epochs * count_steps(train_loader),
        eval_freq=eval_freq,
        eval_iter=eval_iter,
        max_grad_norm=max_grad_norm,
        schedule=None,
        prompts=as_prompts(start_context),
    )
    journal = Journal(tokenizer.vocab_size, plan.total_steps, log_every)
    trainer = Trainer(learner, journal, tokenizer, plan)
    with parallel.watched(), contextlib.closing(journal):
        training_loop(trainer, train_loader, val_loader)
    history = journal.history
    return history.train_losses, history.val_losses, history.tokens_seen
