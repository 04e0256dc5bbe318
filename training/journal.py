"""What happened in a run: its numbers, its samples, the lines on the screen, the picture."""

import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.console import RunBar, report, say, show_picture
from engine.errors import NumericsError, ResourceError
from engine.metrics import (
    TokenSize,
    as_duration,
    bits_per_byte,
    bits_per_character,
    perplexity,
    seconds_left,
)
from storage.files import PATIENCE_S, write_atomically
from storage.tracking import MetricsFile, Trackers
from visualize import render_losses

PICTURE = "training_losses.png"
FETCH_EVERY = 50  # steps whose losses stay on the device before they are read together
MOST_MOMENTS, LAST_MOMENTS = 50, 10  # whose samples are kept, and how many of the last of all

# what would move a terminal's cursor or turn the direction of writing
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Moment(NamedTuple):
    """What the model wrote at one moment of a run."""

    label: str
    step: int | None  # whose weights wrote it; earlier versions kept none
    texts: list[str]  # one for each prompt


@dataclass
class History:
    """What a run measured: evaluations by optimizer step, and the loss of every step."""

    steps: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    tokens_seen: list[int] = field(default_factory=list)
    batch_losses: list[float] = field(default_factory=list)  # NaN: not known any more
    samples: list[Moment] = field(default_factory=list)  # at most MOST_MOMENTS
    skipped: int = 0  # steps left out because a gradient was not finite
    elapsed_s: float = 0.0

    @property
    def best(self) -> int:
        """The index of the evaluation with the lowest validation loss, after the first step."""
        trained = [i for i in range(len(self.steps)) if self.steps[i] > 0] or [0]
        return min(trained, key=lambda i: self.val_losses[i])

    @property
    def since_best(self) -> int:
        """How many evaluations in a row have not been better than the best one."""
        return len(self.steps) - 1 - self.best


@dataclass
class Journal:
    """Records a run: prints its lines and, where it has a folder, keeps the files there current.

    Losses of single steps stay on the device until an evaluation, a log line, a checkpoint or
    FETCH_EVERY steps fetch them together. What the disk refuses is said, and training goes on.
    """

    vocab_size: int
    total_steps: int
    log_every: int = 0
    folder: Path | None = None
    token_size: TokenSize | None = None
    trackers: Trackers = field(default_factory=lambda: Trackers([]))
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self._metrics = None if self.folder is None else MetricsFile(self.folder / "metrics.jsonl")
        self.weights_of_step: int | None = None  # where the model has not the last step's
        self._bar = RunBar(self.total_steps)
        self._is_told = True  # whether the last evaluation was printed
        self.steps = 0  # the last one that was noted
        self._tokens = 0
        self._pending: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = []
        self._said: set[str] = set()
        self._refused: set[Path] = set()  # files that the disk did not take when last tried
        self._earlier_s = 0.0  # of a run that goes on
        self._first_step = 0  # of this process
        self._started_at = self._marked_at = time.perf_counter()
        self._marked_tokens = 0
        self._tokens_per_s = 0.0  # up to the evaluation that is being made

    @property
    def elapsed_s(self) -> float:
        """The time of the run so far, that of earlier processes included."""
        return self._earlier_s + time.perf_counter() - self._started_at

    # ------------------------------------------------------------------------ single steps

    def step(
        self,
        step: int,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        n_tokens: int,
        learning_rate: float,
    ) -> list[dict[str, Any]]:
        """Note a step, counted from 1; its loss and gradient norm are 0-d tensors on any device.

        Returns what fetch() does, where it is time for that.
        """
        self.steps = step
        self._tokens += n_tokens
        known = {"step": step, "train/lr": learning_rate, "train/tokens": self._tokens}
        self._pending.append((loss, grad_norm, known))
        self._bar.show(step)
        is_told = self.log_every > 0 and step % self.log_every == 0
        rows = self.fetch() if is_told or len(self._pending) == FETCH_EVERY else []
        if is_told:
            report(f"step {step}: batch loss {rows[-1]['train/loss']:.4f}{self._pace()}")
        return rows

    def fetch(self) -> list[dict[str, Any]]:
        """Read the pending numbers from the device and log them; returns a row for each step."""
        if not self._pending:
            return []
        numbers = torch.stack(
            [torch.stack((loss.float(), norm.float())) for loss, norm, _ in self._pending]
        )
        rows = [
            {"step": known["step"], "train/loss": loss, "train/grad_norm": norm} | known
            for (loss, norm), (_, _, known) in zip(numbers.tolist(), self._pending, strict=True)
        ]
        self._pending = []
        self.history.batch_losses += [row["train/loss"] for row in rows]
        self._log(rows)
        return rows

    def _pace(self) -> str:
        """Tokens a second since the last evaluation and the time left, to end a line with."""
        seconds = time.perf_counter() - self._started_at
        left = seconds_left(
            self.steps - self._first_step, self.total_steps - self._first_step, seconds
        )
        return f", {self._speed():,.0f} tokens/s, {as_duration(left or 0.0)} left"

    def _speed(self) -> float:
        seconds = time.perf_counter() - self._marked_at
        return (self._tokens - self._marked_tokens) / max(seconds, 1e-9)

    # ------------------------------------------------------------------------- evaluations

    def pause(self) -> list[dict[str, Any]]:
        """Note that training rests for an evaluation: its time is not that of the tokens.

        Returns what fetch() does.
        """
        rows = self.fetch()
        if self._tokens > self._marked_tokens:  # else an earlier process made the steps
            self._tokens_per_s = self._speed()
        return rows

    def evaluation(self, epoch: int | None, train_loss: float, val_loss: float) -> None:
        """Note an evaluation after the steps so far, print it and draw the picture anew.

        epoch is the one that ends here, counted from 1, or None. Raises NumericsError for a loss
        that is not finite.
        """
        history, step = self.history, self.steps
        if not math.isfinite(train_loss + val_loss):
            raise NumericsError(
                f"after step {step} the training loss is {train_loss} and the validation loss "
                f"{val_loss}: training diverged.\nBegin a run with a third of the learning rate, "
                "or with a smaller max_grad_norm."
            )
        history.steps.append(step)
        history.train_losses.append(train_loss)
        history.val_losses.append(val_loss)
        history.tokens_seen.append(self._tokens)
        history.elapsed_s = self.elapsed_s
        row = {"step": step, "eval/train_loss": train_loss, "val/loss": val_loss}
        row["val/perplexity"] = perplexity(val_loss)
        if self.token_size is not None:
            row["val/bits_per_character"] = bits_per_character(val_loss, self.token_size)
            row["val/bits_per_byte"] = bits_per_byte(val_loss, self.token_size)
        if step > 0:
            row["train/tok_per_sec"] = self._tokens_per_s
        lines = self._lines_on_evaluation(epoch, train_loss, val_loss)
        self._is_told = report(*lines, keep=step in (0, self.total_steps))
        self._log([row])
        if self.folder is not None and step > 0:
            self.draw()
        self._marked_at, self._marked_tokens = time.perf_counter(), self._tokens

    def _lines_on_evaluation(
        self, epoch: int | None, train_loss: float, val_loss: float
    ) -> list[str]:
        losses = f"Train loss {train_loss:.3f}, Val loss {val_loss:.3f}"
        if self.steps == 0:
            return [f"Before training: {losses}"]
        line = (
            f"step {self.steps}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, speed: "
            f"{self._tokens_per_s:.2f} tokens/sec, time: {as_duration(self.elapsed_s)}"
        )
        return [line] if epoch is None else [line, f"Ep {epoch} (End Epoch): {losses}"]

    def draw(self) -> bool:
        """Draw the losses anew, into the run's folder and the working directory.

        False where matplotlib is missing or neither place takes the picture, which is said once;
        and where there is no folder.
        """
        if self.folder is None:
            return False
        history = self.history
        png = render_losses(
            steps=history.steps,
            train_losses=history.train_losses,
            val_losses=history.val_losses,
            best=history.best,
            batch_losses=history.batch_losses,
            vocab_size=self.vocab_size,
            title=self.folder.name,
        )
        if png is None:
            self._say_once("matplotlib is not installed: no picture (pip install matplotlib)")
            return False
        written = [self._try_to_write(path, png) for path in (self.folder / PICTURE, Path(PICTURE))]
        return any(written)

    def show_picture(self) -> None:
        """Show the picture as it was drawn last in a notebook's cell."""
        if self.folder is not None:
            show_picture(self.folder / PICTURE)

    def close(self) -> None:
        """Close the trackers and leave the bar as it is: training is over here."""
        self._bar.close()
        self.trackers.close()

    def leave_out(self, seconds: float) -> None:
        """Leave a time out of the tokens a second: something else was done in it."""
        self._marked_at += seconds

    def has_evaluated(self) -> bool:
        """Whether the model as it is now has been evaluated."""
        return self.history.steps[-1:] == [self.steps]

    # ----------------------------------------------------------------------------- samples

    @property
    def steps_since_sample(self) -> int:
        """The optimizer steps since the model wrote last."""
        return self.steps - (self.history.samples[-1].step or 0 if self.history.samples else 0)

    def note_sample(self, label: str, texts: list[str], *, is_last: bool = False) -> None:
        """Print what the model wrote, a line for each prompt, and keep it for samples.md.

        A notebook, which leaves out lines that come too fast, has those that are last.
        """
        lines = []
        for number, text in enumerate(texts, start=1):
            shown = "".join(c if c.isprintable() else " " for c in text)  # no control codes
            name = label if len(texts) == 1 else f"{label}, prompt {number}"
            lines.append(f"{name}: {' '.join(shown.split())}")
        report(*lines, keep=is_last or self._is_told)
        step = self.steps if self.weights_of_step is None else self.weights_of_step
        self.history.samples.append(Moment(label, step, texts))
        _thin_out(self.history.samples)
        if self.folder is not None:
            losses = dict(zip(self.history.steps, self.history.val_losses, strict=True))
            pages = [_as_section(moment, losses) for moment in self.history.samples]
            content = "\n\n".join(["# What the model writes", *pages]) + "\n"
            self._try_to_write(self.folder / "samples.md", content.encode("utf-8", "replace"))

    # ------------------------------------------------------------------ leaving and coming back

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the journal, as JSON; single losses are in metrics.jsonl."""
        self.fetch()
        self.trackers.flush()
        history = vars(self.history) | {"elapsed_s": self.elapsed_s}
        del history["batch_losses"]
        return {
            "history": history,
            "steps": self.steps,
            "tokens": self._tokens,
            "tokens_per_s": self._speed(),
            "metrics_bytes": 0 if self._metrics is None else self._metrics.sync(),
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from state(), None being the start; metrics.jsonl is cut back to what it was."""
        n_bytes = state["metrics_bytes"] if state else 0
        rows = [] if self._metrics is None else self._metrics.cut(n_bytes)
        if state is None:
            return
        samples = [_as_moment(*kept) for kept in state["history"].pop("samples")]
        self.history = History(**state["history"], samples=samples)
        self.history.batch_losses = _losses_in(rows, state["steps"])
        self.steps = self._first_step = state["steps"]
        self._tokens = self._marked_tokens = state["tokens"]
        self._tokens_per_s = state["tokens_per_s"]
        self._earlier_s = self.history.elapsed_s

    def _log(self, rows: list[dict[str, Any]]) -> None:
        if self._metrics is not None:
            self._metrics.append(rows)
        for row in rows:
            self.trackers.log(row)

    def _try_to_write(self, path: Path, content: bytes) -> bool:
        """Write something that no run may end for; False where the disk refuses."""
        # a viewer may hold its picture open for hours: that is waited for once
        patience_s = 0.0 if path in self._refused else PATIENCE_S
        try:
            write_atomically(path, content, patience_s=patience_s)
        except ResourceError as error:
            self._refused.add(path)
            self._say_once(f"{str(error).splitlines()[0]} Training goes on")
            return False
        self._refused.discard(path)
        return True

    def _say_once(self, note: str) -> None:
        if note not in self._said:
            self._said.add(note)
            say(f"Note: {note}")


def _losses_in(rows: list[bytes], n_steps: int) -> list[float]:
    """The loss of each step by the lines of metrics.jsonl; NaN where there is none."""
    losses = [math.nan] * n_steps
    for line in rows:
        try:
            row = json.loads(line)
            losses[row["step"] - 1] = float(row["train/loss"])
        except (ValueError, KeyError, TypeError, IndexError):  # an evaluation, or a damaged line
            continue
    return losses


def _as_moment(label: str, *rest: Any) -> Moment:
    """A moment as a checkpoint keeps it; earlier versions kept a label and a single text."""
    step, texts = rest if len(rest) == 2 else (None, [*rest])
    return Moment(label, step, texts)


def _thin_out(moments: list[Moment]) -> None:
    """Take moments out until MOST_MOMENTS are left: the first, the last ones, and of those between
    the ones that divide the run most evenly.

    A run that goes on thins out as one that was never stopped: nothing else is looked at.
    """
    while len(moments) > MOST_MOMENTS:
        steps = [moment.step or 0 for moment in moments]
        between = range(1, len(moments) - LAST_MOMENTS)
        del moments[min(between, key=lambda i: steps[i + 1] - steps[i - 1])]


def _as_section(moment: Moment, losses: dict[int, float]) -> str:
    """A section of samples.md; losses are the evaluations by step."""
    parts = [f"## {moment.label}"]
    if moment.step is not None:
        loss = losses.get(moment.step)
        told = "" if loss is None else f", validation loss {loss:.3f}"
        parts.append(f"Step {moment.step}{told}")
    for number, text in enumerate(moment.texts, start=1):
        if len(moment.texts) > 1:
            parts.append(f"Prompt {number}:")  # else two blocks would be read as one
        parts.append(_as_quote(text))
    return "\n\n".join(parts)


def _as_quote(text: str) -> str:
    """Text as an indented Markdown block, in which no character has a meaning."""
    return "\n".join("    " + _CONTROLS.sub("\ufffd", line) for line in text.splitlines())
