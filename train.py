"""The training loop, and the journal of what happened in it."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import WindowBatches, evaluation_loader
from engine.console import say, track
from engine.errors import DataError, NumericsError, ResourceError
from engine.loss import next_token_loss
from engine.optim import Schedule, learning_rate_at, set_learning_rate
from engine.precision import Precision, choose_precision
from engine.settings import raise_if_any, shown
from engine.storage import append_json_lines, write_atomically
from generation import evaluating, generate, text_to_token_ids, token_ids_to_text
from text.tokenizer import Tokenizer
from visualize import render_losses

if TYPE_CHECKING:
    from environment import RuntimeEnv

PICTURE = "training_losses.png"
FETCH_EVERY = 50  # steps whose losses stay on the device before they are read together
SAMPLE_TOKENS = 30


@dataclass(frozen=True)
class LoopPlan:
    """What the loop does when; counts are in optimizer steps."""

    total_steps: int
    eval_freq: int
    eval_iter: int
    max_grad_norm: float  # 0: gradients are not clipped
    schedule: Schedule | None  # None: the optimizer's learning rates stay as they are


@dataclass
class History:
    """What a run measured: evaluations by optimizer step, and the loss of every step."""

    steps: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    tokens_seen: list[int] = field(default_factory=list)
    batch_losses: list[float] = field(default_factory=list)
    samples: list[tuple[str, str]] = field(default_factory=list)  # (heading, text)
    elapsed_s: float = 0.0

    @property
    def best(self) -> int:
        """The index of the evaluation with the lowest validation loss."""
        return min(range(len(self.steps)), key=lambda i: self.val_losses[i])


def training_loop(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    precision: Precision,
    plan: LoopPlan,
    journal: "Journal",
) -> None:
    """Train for plan.total_steps, in as many epochs as that takes; the journal records it.

    An evaluation is made before the first step, every plan.eval_freq steps and at each epoch's
    end, over the same batches each time. Raises NumericsError where a loss is not finite.
    """
    train_view = evaluation_loader(train_loader, plan.eval_iter)
    val_view = evaluation_loader(val_loader, plan.eval_iter)

    def evaluate(label: str) -> None:
        train_loss = mean_loss(model, train_view, device, precision)
        journal.evaluation(label, train_loss, mean_loss(model, val_view, device, precision))

    evaluate("Before training")
    journal.sample("Before training", model, device, precision)
    step = 0
    model.train()
    optimizer.zero_grad()  # a caller may have left gradients behind
    for epoch in itertools.count():
        batches_left = min(len(train_loader), plan.total_steps - step)
        if batches_left == 0:
            break
        for ids, targets in track(
            epoch_batches(train_loader, epoch, batches_left),
            batches_left,
            f"Epoch {epoch + 1}",
        ):
            if plan.schedule is not None:
                set_learning_rate(optimizer, learning_rate_at(step, plan.schedule))
            ids, targets = to_device(ids, device), to_device(targets, device)
            loss = take_step(model, ids, targets, optimizer, precision, plan.max_grad_norm)
            step += 1
            batches_left -= 1
            journal.step(loss, ids.numel(), optimizer.param_groups[0]["lr"])
            if step % plan.eval_freq == 0 and batches_left > 0:
                evaluate(f"Ep {epoch + 1} (Step {step:06d})")
        evaluate(f"Ep {epoch + 1} (End Epoch)")
        journal.sample(f"After epoch {epoch + 1}", model, device, precision)


def take_step(
    model: nn.Module,
    ids: torch.Tensor,
    targets: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    max_grad_norm: float,
) -> torch.Tensor:
    """One optimizer step on a batch, (B, T) each; returns its loss, which stays on the device."""
    loss = batch_loss(model, ids, targets, precision)
    loss.backward()
    if max_grad_norm > 0:
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def batch_loss(
    model: nn.Module, ids: torch.Tensor, targets: torch.Tensor, precision: Precision
) -> torch.Tensor:
    """The mean loss of a batch, (B, T) each, as a 0-d fp32 tensor."""
    with precision.autocast():
        return next_token_loss(model.hidden(ids), model.head.weight, targets)


def epoch_batches(loader: DataLoader, epoch: int, count: int) -> Iterator:
    """The first `count` batches of an epoch, counted from 0."""
    if isinstance(loader.batch_sampler, WindowBatches):
        loader.batch_sampler.start_epoch(epoch)
    return itertools.islice(loader, count)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a batch without waiting for it where its memory is pinned."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@torch.no_grad()
def mean_loss(
    model: nn.Module, loader: DataLoader, device: torch.device, precision: Precision
) -> float:
    """The mean loss in nats over every target of the loader, each weighing the same."""
    total, count = torch.zeros((), device=device), 0
    with evaluating(model):
        for ids, targets in loader:
            ids, targets = to_device(ids, device), to_device(targets, device)
            loss = batch_loss(model, ids, targets, precision)
            total += loss * targets.numel()
            count += targets.numel()
    if count == 0:
        raise DataError("there is nothing to evaluate on: the loader has no batches")
    return total.item() / count


@dataclass
class Journal:
    """Records a run: prints its lines and, where it has a folder, keeps the files there current.

    Losses of single steps stay on the device until an evaluation, a log line or FETCH_EVERY
    steps fetch them together.
    """

    tokenizer: Tokenizer
    start_context: str
    log_every: int = 0
    folder: Path | None = None
    history: History = field(default_factory=History)
    started_at: float = field(default_factory=time.perf_counter)
    _tokens: int = 0
    _pending: list[tuple[torch.Tensor, int, float]] = field(default_factory=list)

    def step(self, loss: torch.Tensor, n_tokens: int, learning_rate: float) -> None:
        """Note a step's loss, a 0-d tensor on any device."""
        self._tokens += n_tokens
        self._pending.append((loss, self._tokens, learning_rate))
        step = len(self.history.batch_losses) + len(self._pending)
        if self.log_every and step % self.log_every == 0:
            self.fetch()
            say(f"step {step}: batch loss {self.history.batch_losses[-1]:.4f}")
        elif len(self._pending) == FETCH_EVERY:
            self.fetch()

    def fetch(self) -> None:
        """Read the pending losses from the device and log them; a bad one stops the run."""
        if not self._pending:
            return
        losses = torch.stack([loss for loss, _, _ in self._pending]).tolist()
        first = len(self.history.batch_losses) + 1
        self.history.batch_losses += losses
        rows = [
            {
                "step": first + i,
                "train/loss": loss,
                "train/lr": rate,
                "train/tokens": tokens,
            }
            for i, (loss, (_, tokens, rate)) in enumerate(zip(losses, self._pending, strict=True))
        ]
        self._pending = []
        self._log(rows)
        for row in rows:
            if row["train/loss"] - row["train/loss"] != 0:  # NaN and infinities only
                raise NumericsError(
                    f"the loss of step {row['step']} is {row['train/loss']}: training diverged.\n"
                    f"The learning rate was {row['train/lr']:.3g}; try a third of it, or a "
                    "smaller max_grad_norm."
                )

    def evaluation(self, label: str, train_loss: float, val_loss: float) -> None:
        """Note an evaluation after the steps so far, print it and draw the picture anew."""
        self.fetch()
        history = self.history
        step = len(history.batch_losses)
        history.steps.append(step)
        history.train_losses.append(train_loss)
        history.val_losses.append(val_loss)
        history.tokens_seen.append(self._tokens)
        history.elapsed_s = time.perf_counter() - self.started_at
        say(f"{label}: Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
        self._log([{"step": step, "eval/train_loss": train_loss, "val/loss": val_loss}])
        if not math.isfinite(train_loss + val_loss):  # the last step's update can be the bad one
            raise NumericsError(
                f"after step {step} the training loss is {train_loss} and the validation loss "
                f"{val_loss}: training diverged.\nTry a third of the learning rate, or a smaller "
                "max_grad_norm."
            )
        if self.folder is not None and step > 0:
            save_picture(history, self.folder, self.tokenizer.vocab_size)

    def sample(
        self, label: str, model: nn.Module, device: torch.device, precision: Precision
    ) -> None:
        """Let the model continue the start context, greedily, and show what it writes."""
        prompt = text_to_token_ids(self.start_context, self.tokenizer).to(device)
        with precision.autocast():
            ids = generate(model, prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.0)
        self.note_sample(label, token_ids_to_text(ids, self.tokenizer))

    def note_sample(self, label: str, text: str) -> None:
        """Print a sample on one line and keep it for samples.md."""
        shown = "".join(c if c.isprintable() else " " for c in text)  # no control codes
        say(f"{label}: {' '.join(shown.split())}")
        self.history.samples.append((label, text))
        if self.folder is not None:
            pages = [f"## {label}\n\n{_as_quote(text)}\n" for label, text in self.history.samples]
            content = "# What the model writes\n\n" + "\n".join(pages)
            write_atomically(self.folder / "samples.md", content.encode("utf-8"))

    def _log(self, rows: list[dict]) -> None:
        if self.folder is not None:
            append_json_lines(self.folder / "metrics.jsonl", rows)


def _as_quote(text: str) -> str:
    """Text as an indented Markdown block, in which no character has a meaning."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def save_picture(history: History, folder: Path, vocab_size: int) -> bool:
    """Draw the losses into the run's folder and the working directory; False without matplotlib."""
    png = render_losses(
        steps=history.steps,
        train_losses=history.train_losses,
        val_losses=history.val_losses,
        batch_losses=history.batch_losses,
        vocab_size=vocab_size,
        title=folder.name,
    )
    if png is None:
        return False
    write_atomically(folder / PICTURE, png)
    try:
        write_atomically(PICTURE, png)
    except ResourceError as error:  # the run has its own; this one is for convenience
        say(f"Note: {str(error).splitlines()[0]} The picture is in {folder}")
    return True


def train(env: "RuntimeEnv") -> Journal:
    """Train what prepare_environment() built; makes the run's folder and keeps it current.

    Raises CheckpointError where the folder is another run's, ResourceError where the disk won't
    take it, NumericsError where a loss is not finite.
    """
    env.run.create()
    config = env.train_config
    journal = Journal(env.tokenizer, config.start_context, env.log_every, env.run.path)
    plan = LoopPlan(
        total_steps=env.schedule.total_steps,
        eval_freq=config.eval_freq,
        eval_iter=config.eval_iter,
        max_grad_norm=config.max_grad_norm,
        schedule=env.schedule,
    )
    training_loop(
        env.model,
        env.train_loader,
        env.val_loader,
        env.optimizer,
        env.device,
        env.precision,
        plan,
        journal,
    )
    return journal


def train_model_simple(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str,
    tokenizer: Tokenizer,
    log_every: int = 0,
    *,
    precision: Precision | None = None,
    max_grad_norm: float = 1.0,
) -> tuple[list[float], list[float], list[int]]:
    """Train a GPTModel in a script of your own: no run folder, no file, no schedule.

    Returns (train_losses, val_losses, tokens_seen), one entry for each evaluation: before the
    first step, every eval_freq steps and at the end of each epoch. The optimizer's learning rates
    stay as they are. precision (RuntimeEnv has one) None is bf16 where the device has it;
    max_grad_norm 0 never clips. Raises SettingsError for counts too small and NumericsError where a
    loss is not finite.
    """
    counts = (
        ("num_epochs", num_epochs, 0),
        ("eval_freq", eval_freq, 1),
        ("eval_iter", eval_iter, 1),
    )
    raise_if_any(
        [
            f"{name} is {shown(count)}; it must be a whole number at least {least}"
            for name, count, least in counts
            if not isinstance(count, int) or count < least
        ],
        "train_model_simple()",
    )
    device = torch.device(device)
    journal = Journal(tokenizer, start_context, log_every)
    plan = LoopPlan(
        total_steps=num_epochs * len(train_loader),
        eval_freq=eval_freq,
        eval_iter=eval_iter,
        max_grad_norm=max_grad_norm,
        schedule=None,
    )
    precision = precision or choose_precision("auto", device)
    training_loop(model, train_loader, val_loader, optimizer, device, precision, plan, journal)
    history = journal.history
    return history.train_losses, history.val_losses, history.tokens_seen
