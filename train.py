"""The training loop: steps, evaluations and samples, checkpoints and how to go on from them."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import WindowBatches
from distributed.parallel import joined
from distributed.sharding import whole
from distributed.signals import StopSignals
from engine.console import say, track
from engine.devices import with_index
from engine.errors import (
    CheckpointError,
    NumericsError,
    ResourceError,
    SettingsError,
    Stopped,
)
from engine.memory import ADVICE, OutOfStepMemory
from engine.optim import (
    Schedule,
    extend_schedule,
    learning_rate_at,
    make_schedule,
    set_learning_rate,
)
from engine.precision import Precision, choose_precision
from engine.randomness import random_state, set_random_state
from engine.settings import find_problems, raise_if_any, shown
from environment import RuntimeEnv
from generation import generate, text_to_token_ids
from storage.checkpoint import BestWeights, CheckpointStore, SaveClock, copy_weights, load_weights
from storage.tracking import open_trackers
from text.tokenizer import Tokenizer
from training.journal import History, Journal
from training.learner import Learner, Step, count_steps, steps_of_epoch, using_threads
from training.run_folder import RunFolder
from training_utils import TrainingConfig, as_prompts

SAMPLE_TOKENS = 30
SAMPLE_CHARACTERS = 1000  # of a long prompt the end is enough to see what it led to
# in long epochs the model also writes at evaluations, so many steps apart or more: on a CPU it
# takes less time than two steps, for 16 prompts too
SAMPLE_EVERY, SAMPLES_A_RUN = 100, 10


MOST_SKIPPED = 10  # steps in a row; then it is no accident
# steps in a row by which fp16 may halve its loss scale, from 2 ** 16 to 1, to find the one it needs
MOST_HALVINGS = 16


@dataclass(frozen=True)
class LoopPlan:
    """What the loop does when; counts are in optimizer steps."""

    total_steps: int
    eval_freq: int
    eval_iter: int
    max_grad_norm: float  # 0: gradients are not clipped
    schedule: Schedule | None  # None: the optimizer's learning rates stay as they are
    prompts: list[str]  # what samples go on from
    patience: int | None = None  # evaluations without a better one that end the run
    former_end: int | None = None  # the last step that a run had before it was made longer


def training_loop(trainer: "Trainer", train_loader: DataLoader, val_loader: DataLoader) -> None:
    """Train until the plan's total_steps are done, in as many epochs as that takes.

    An evaluation is made before the first step, every eval_freq steps and at each epoch's
    end, over the same batches each time; the model writes samples before the first step, at each
    epoch's end and, where epochs are long, at evaluations on the way. Checkpoints come before
    evaluations, so that a run that goes on owes at most one. Raises Stopped where a signal asks
    for it, at a step's end.
    """
    steps_per_epoch = count_steps(train_loader)
    learner, journal, plan = trainer.learner, trainer.journal, trainer.plan

    def evaluate_where_due() -> None:
        step = trainer.steps
        epochs, within = divmod(step, steps_per_epoch)
        epoch_ends = within == 0 or step in (plan.total_steps, plan.former_end)
        if journal.has_evaluated() or not (epoch_ends or step % plan.eval_freq == 0):
            return
        trainer.look_at(journal.pause())
        losses = [trainer.evaluate(loader) for loader in (train_loader, val_loader)]
        epoch = epochs + (within > 0) if epoch_ends and step > 0 else None
        journal.evaluation(epoch, *losses)
        trainer.keep_best()
        if epoch_ends:
            label = "Before training" if step == 0 else f"After epoch {epoch}"
            trainer.sample(label)
        elif journal.steps_since_sample >= max(SAMPLE_EVERY, plan.total_steps // SAMPLES_A_RUN):
            trainer.sample(f"After step {step}")

    def is_over() -> bool:
        out_of_patience = plan.patience is not None and journal.history.since_best >= plan.patience
        return trainer.steps >= plan.total_steps or out_of_patience

    learner.model.train()
    learner.optimizer.zero_grad()  # a caller may have left gradients behind
    evaluate_where_due()
    while not is_over():
        epoch, first = divmod(trainer.steps, steps_per_epoch)
        last = min(steps_per_epoch, plan.total_steps - epoch * steps_per_epoch)
        steps = steps_of_epoch(train_loader, epoch, first, last)
        for taken in track(steps, last, f"Epoch {epoch + 1}", first):
            trainer.stop.check()
            if is_over():
                break
            if plan.schedule is not None:
                rate = learning_rate_at(trainer.steps, plan.schedule)
                set_learning_rate(learner.optimizer, rate)
            loss, grad_norm = trainer.step(taken)
            trainer.steps += 1
            rate = learner.optimizer.param_groups[0]["lr"]
            trainer.look_at(journal.step(trainer.steps, loss, grad_norm, taken.n_targets, rate))
            trainer.save_where_due()
            if trainer.steps < epoch * steps_per_epoch + last:
                evaluate_where_due()
        trainer.stop.check()
        evaluate_where_due()  # below the epoch's bar


@dataclass
class SkippedSteps:
    """How many steps in a row were skipped, because their loss or gradient was not finite."""

    scales_loss: bool  # as fp16 needs it: an overflow then only lowers the scale
    in_a_row: int = 0
    halvings: int = 0  # of the loss scale, in a row

    def look_at(self, row: dict[str, Any], history: History) -> None:
        """Count a step by its row in metrics.jsonl, and say where it was skipped.

        Raises NumericsError after MOST_SKIPPED skipped steps in a row.
        """
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
        said = f"step {row['step']}: the loss is {loss:.4g} and the gradient's norm {norm:.4g}"
        if self.in_a_row == MOST_SKIPPED:
            raise NumericsError(
                f"{said}, as {MOST_SKIPPED - 1} times in a row before: training diverged.\n"
                f"The learning rate was {row['train/lr']:.3g}; begin a run with a third of it, or "
                "with a smaller max_grad_norm."
            )
        say(f"Note: {said}: the step is skipped ({history.skipped} so far)")


@dataclass
class Saving:
    """A run's folder and checkpoints: where they are, when one is due, what the next will hold."""

    run: RunFolder | None  # None: a smaller micro-batch is not kept for a later start
    store: CheckpointStore
    clock: SaveClock
    best: BestWeights | None = None
    last_step: int = 0  # of the newest checkpoint


@dataclass
class Trainer:
    """A training run: a learner, what it is to do, what it has done, and where that is kept."""

    learner: Learner
    journal: Journal
    tokenizer: Tokenizer
    plan: LoopPlan
    saving: Saving | None = None  # None: nothing is saved
    steps: int = 0  # done so far

    def __post_init__(self) -> None:
        self.parallel = self.learner.parallel
        self.stop = StopSignals(self.parallel)
        self.skipped = SkippedSteps(self.learner.precision.scales_loss)
        self._step_began_at = 0.0

    def step(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; returns its loss and gradient norm, those of all ranks."""
        label = self.parallel.place = f"step {self.steps + 1}"
        self._step_began_at = time.monotonic()
        with self._keeping_micro_batch():
            return self.learner.step(step, self.plan.max_grad_norm, self.stop, label)

    def evaluate(self, loader: DataLoader) -> float:
        """The mean loss over eval_iter batches of a loader, unless a signal asks to stop."""
        with self._keeping_micro_batch():
            return self.learner.evaluate(loader, self.plan.eval_iter, self.stop)

    @contextlib.contextmanager
    def _keeping_micro_batch(self) -> Iterator[None]:
        """Keep a micro-batch that the learner makes smaller in here for a later start.

        At once and not with the next checkpoint: the steps since the last one would run out of
        memory again.
        """
        before, run = self.learner.micro_batch, self.saving and self.saving.run
        try:
            yield
        finally:
            if run is not None and self.learner.micro_batch != before:
                run.note_micro_batch(self.learner.micro_batch)

    def look_at(self, rows: list[dict[str, Any]]) -> None:
        """Look whether steps were skipped; NumericsError where too many were."""
        for row in rows:
            self.skipped.look_at(row, self.journal.history)

    def sample(self, label: str) -> None:
        """Let the model continue the plan's prompts, greedily, and show what it writes."""
        began_at = time.monotonic()
        model = self.learner.model
        with whole(model, self.parallel), self.learner.precision.autocast():
            texts = continue_prompts(
                model,
                self.tokenizer,
                self.plan.prompts,
                max_new_tokens=SAMPLE_TOKENS,
                temperature=0.0,
            )
        texts = [t if len(t) <= SAMPLE_CHARACTERS else f"…{t[-SAMPLE_CHARACTERS:]}" for t in texts]
        self.journal.note_sample(label, texts)
        self.journal.leave_out(time.monotonic() - began_at)

    def keep_best(self) -> None:
        """Copy weights that were evaluated as better than those held; the next save writes them."""
        history, held, saving = self.journal.history, math.inf, self.saving
        if saving is None:
            return
        if saving.best is not None:
            held = history.val_losses[history.steps.index(saving.best.step)]
        if history.steps[-1] > 0 and history.val_losses[-1] < held:
            weights = copy_weights(self.learner.model, self.parallel)
            saving.best = BestWeights(history.steps[-1], weights)

    def save_where_due(self) -> None:
        """Save a checkpoint after the last step, and whenever the clock says so.

        Here, once a step, the ranks agree on that and on whether to stop.
        """
        is_last = self.steps == self.plan.total_steps
        is_due = self.saving is not None and (is_last or self.saving.clock.is_due(self.steps))
        step_s = time.monotonic() - self._step_began_at
        [is_due] = self.stop.agree(is_due, step_s=step_s)
        if is_due:
            self.save()

    def save(self) -> None:
        """Save a checkpoint of the steps so far, unless there is one or nothing to save."""
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
            "schedule": asdict(self.plan.schedule),
            "total_steps": self.plan.total_steps,
        }
        saving.store.save(self.steps, learner.model, learner.optimizer, state, saving.best)
        saving.last_step = self.steps
        saving.clock.note(began_at)
        self.journal.leave_out(time.monotonic() - began_at)

    def restore(self) -> None:
        """Go on from the newest checkpoint, where there is one, at the rates of its schedule.

        Raises CheckpointError where none can be used.
        """
        store = self.saving.store
        found = store.restore(self.learner.model, self.learner.optimizer)
        if found is None:
            self.journal.restore(None)
            return
        state, self.saving.best = found
        try:
            self._restore(state)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            # sealed, but by another program
            raise CheckpointError(f"{store.newest()} can't be gone on from: {error!r}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.steps = self.saving.last_step = state["steps"]
        self.skipped.in_a_row = state["skipped_in_a_row"]
        self.skipped.halvings = state["halvings_in_a_row"]
        self.journal.restore(state["journal"])
        self._restore_random(state)
        if state["scaler"]:  # none of a run that had another precision until now
            self.learner.scaler.load_state_dict(state["scaler"])
        schedule = Schedule(**state["schedule"])
        # the last checkpoint comes before the last evaluation, which the run then still owes
        former_end = self.steps if self.steps == state["total_steps"] else None
        if self.plan.total_steps > state["total_steps"]:
            schedule = extend_schedule(schedule, self.plan.total_steps, self.steps)
        self.plan = replace(self.plan, schedule=schedule, former_end=former_end)

    def _restore_random(self, state: dict[str, Any]) -> None:
        """Each rank's generators; where there were fewer ranks, new ones go on from a new seed."""
        states = [state["random"], *state["other_ranks"]]
        if self.parallel.rank < len(states):
            set_random_state(states[self.parallel.rank], self.learner.device)
        else:
            self.parallel.seed_apart(self.steps)

    def use_best(self) -> None:
        """Put the best weights into the model."""
        best = self.saving.best
        if best is not None and best.step != self.steps:
            load_weights(self.learner.model, best.weights, "the best weights", self.parallel)
            self.journal.weights_of_step = best.step


def continue_prompts(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[str],
    **options: float | torch.Generator | None,
) -> list[str]:
    """Continue several prompts as one batch; each text goes to its end of text at most.

    options are those of generate(). Raises SettingsError for a prompt that has no tokens.
    """
    ids = [text_to_token_ids(prompt, tokenizer)[0].tolist() for prompt in prompts]
    end = tokenizer.end_of_text_id
    rows = generate(model, ids, end_of_text_id=end, **options)
    return [tokenizer.decode(row[:-1] if row[-1] == end else row) for row in rows]


def train(env: RuntimeEnv) -> Journal:
    """Train what prepare_environment() built, or go on where an earlier process left off.

    The model ends with its last weights, or the best ones where patience was set. Raises Stopped
    after a signal, with everything saved; BusyError where another program trains in the folder,
    CheckpointError where its checkpoints can't be used, ResourceError where the disk won't take
    them, NumericsError where the numbers go bad.
    """
    held = env.parallel.held_by_main(env.run.opened)
    with env.parallel.watched(), held, using_threads(env.run.record.threads):
        env.run.path = env.parallel.broadcast(env.run.path)  # only now it is known
        env.parallel.note("run", str(env.run.path))
        return _train(env)


def _train(env: RuntimeEnv) -> Journal:
    run, config, parallel = env.run, env.train_config, env.parallel
    record = run.record
    for note in run.notes:
        say(f"Note: {note}")
    store = CheckpointStore(run.path, run.run_id, config.keep_checkpoints, parallel)
    store.require_room(env.model)
    journal = Journal(
        vocab_size=env.tokenizer.vocab_size,
        total_steps=record.total_steps,
        log_every=record.settings["LOG_EVERY"],
        folder=parallel.only_main(run.path),
        token_size=env.token_size,
    )
    clock = SaveClock(config.save_every, config.save_minutes)
    plan = LoopPlan(
        total_steps=record.total_steps,
        eval_freq=config.eval_freq,
        eval_iter=config.eval_iter,
        max_grad_norm=config.max_grad_norm,
        schedule=make_schedule(
            config.schedule, config.learning_rate, config.warmup_steps, record.total_steps
        ),
        prompts=config.prompts,
        patience=config.patience,
    )
    trainer = Trainer(env.learner, journal, env.tokenizer, plan, Saving(run, store, clock))
    trainer.restore()
    if run.goes_on or trainer.steps > 0:
        say(f"Resuming {run.path}: {trainer.steps:,} of {plan.total_steps:,} steps are done")
    journal.trackers = open_trackers(
        parallel.only_main(record.settings["TRACKING"]) or [],
        run.path,
        run.run_id,
        run.settings,
        trainer.steps,
    )
    try:
        with trainer.stop:
            _train_and_save(trainer, env.train_loader, env.val_loader)
    finally:
        journal.close()
    if trainer.steps < plan.total_steps:
        say(
            f"Stopped early: {config.patience} evaluations in a row have not been better than "
            f"that of step {journal.history.steps[journal.history.best]}"
        )
    store.save_best(trainer.saving.best)
    if config.patience is not None:
        trainer.use_best()
    journal.show_picture()
    return journal


def _train_and_save(trainer: Trainer, train_loader: DataLoader, val_loader: DataLoader) -> None:
    """Run the loop; whatever ends it in order, the last whole step is saved."""
    store = trainer.saving.store
    try:
        try:
            training_loop(trainer, train_loader, val_loader)
            trainer.save()  # patience may have ended the run between two checkpoints
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
    except OutOfStepMemory as error:
        newest = store.newest()
        kept = "No checkpoint was made yet." if newest is None else f"The last checkpoint: {newest}"
        windows = "a single window" if error.n_windows == 1 else f"{error.n_windows} windows"
        advice = ADVICE if error.n_windows == 1 else "Set a smaller batch_size, and accumulate."
        raise ResourceError(
            f"{error.where} ran out of memory with {windows} at a time: {str(error)[:100]}\n"
            f"{advice}\n{kept}"
        ) from error


def _check_counts(counts: dict[str, int], start_context: str | list[str]) -> None:
    """Raise SettingsError with every wrong value of train_model_simple()."""
    least = {"num_epochs": 0, "eval_freq": 1, "eval_iter": 1}
    raise_if_any(
        [
            f"{name} is {shown(count)}; it must be a whole number at least {least[name]}"
            for name, count in counts.items()
            if not isinstance(count, int) or count < least[name]
        ]
        + find_problems(TrainingConfig, {"start_context": start_context}),
        "train_model_simple()",
    )


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
    """Train a GPTModel in a script of your own: no run folder, no file, no schedule.

    Returns (train_losses, val_losses, tokens_seen), one entry for each evaluation: before the
    first step, every eval_freq steps and at the end of each epoch. The optimizer's learning rates
    stay as they are. start_context is what samples go on from, one text or a list of them;
    precision (RuntimeEnv has one) None is bf16 where the device has it; max_grad_norm 0 never
    clips. Under torchrun the loaders must be those of prepare_environment(), which have each
    process's share. Raises SettingsError with every wrong value and NumericsError where the
    numbers go bad.
    """
    counts = {"num_epochs": num_epochs, "eval_freq": eval_freq, "eval_iter": eval_iter}
    _check_counts(counts, start_context)
    parallel = joined()
    if not parallel.is_alone and not isinstance(train_loader.batch_sampler, WindowBatches):
        raise SettingsError(
            "train_model_simple() under torchrun needs the loaders of prepare_environment(): of "
            "others it does not know which share is whose."
        )
    device = with_index(device)
    precision = precision or choose_precision("auto", device)
    plan = LoopPlan(
        total_steps=num_epochs * count_steps(train_loader),
        eval_freq=eval_freq,
        eval_iter=eval_iter,
        max_grad_norm=max_grad_norm,
        schedule=None,
        prompts=as_prompts(start_context),
    )
    journal = Journal(tokenizer.vocab_size, plan.total_steps, log_every)
    learner = Learner(
        model,
        optimizer,
        precision,
        parallel,
        device=device,
        micro_batch=getattr(train_loader.batch_sampler, "micro_batch", None),
    )
    trainer = Trainer(learner, journal, tokenizer, plan)
    with parallel.watched(), contextlib.closing(journal):
        training_loop(trainer, train_loader, val_loader)
    history = journal.history
    return history.train_losses, history.val_losses, history.tokens_seen
