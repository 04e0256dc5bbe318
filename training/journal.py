"""The record of a run: losses, samples, printed lines and the picture."""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.console import RunBar, begin_report, report, say
from engine.errors import NumericsError, ResourceError, first_line
from engine.metrics import (
    TokenSize,
    as_duration,
    bits_per_byte,
    bits_per_character,
    perplexity,
    seconds_left,
)
from engine.words import Words
from storage.files import PATIENCE_S, write_atomically
from storage.tracking import MetricsFile, Trackers
from training.pace import Spent
from training.spacing import Allowance
from visualize import render_losses

PICTURE = "training_losses.png"
# what a sample ends with where the model writes nothing that can be seen
ENDED = Words("[the model ends the text here]", "[模型在此结束文本]")
BLANK = Words("[the model goes on with blanks]", "[模型接着只写空白]")
# the rise of the training loss from start to end that may be noise: in nats, and as a share
NOISE_NATS, NOISE_SHARE = 0.1, 0.05
# the seconds of a step, and how many times as many as of others, where the machine has slept
PAUSE_S, PAUSE_TIMES, COMPILED_STEPS = 120.0, 20.0, 3
FETCH_EVERY = 50  # steps whose losses are fetched from the device in one copy
MOST_MOMENTS, LAST_MOMENTS = 50, 10  # that samples.md keeps, and the last of them that always stay

# characters that move a terminal's cursor or change the writing direction
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Moment(NamedTuple):
    """What the model wrote at one moment of a run."""

    label: str
    step: int  # whose weights wrote it
    texts: list[str]  # one for each prompt


@dataclass
class History:
    """What a run measured: its evaluations, by optimizer step, and the loss of every step."""

    steps: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    tokens_seen: list[int] = field(default_factory=list)
    batch_losses: list[float] = field(default_factory=list)  # NaN: unknown
    samples: list[Moment] = field(default_factory=list)  # at most MOST_MOMENTS
    skipped: int = 0  # steps whose loss or gradient was not finite
    # the final validation loss as expected where the decay began: the least, the middle, the most
    forecast: list[float] | None = None
    elapsed_s: float = 0.0

    @property
    def best(self) -> int:
        """The index of the evaluation with the lowest validation loss, after the first step."""
        trained = [i for i in range(len(self.steps)) if self.steps[i] > 0] or [0]
        return min(trained, key=lambda i: self.val_losses[i])

    @property
    def has_diverged(self) -> bool:
        """Whether the training loss is above that of the untrained model by more than noise."""
        first, last = self.train_losses[0], self.train_losses[-1]
        return last - first > max(NOISE_NATS, NOISE_SHARE * first)

    @property
    def since_best(self) -> int:
        """The number of evaluations since the best one."""
        return len(self.steps) - 1 - self.best


@dataclass
class Journal:
    """Records a run: prints its lines and, with a folder, writes the files there.

    The losses of steps stay on the device until fetch(). A failed write is only a notice.
    """

    vocab_size: int
    total_steps: int
    log_every: int = 0
    folder: Path | None = None
    token_size: TokenSize | None = None
    trackers: Trackers = field(default_factory=lambda: Trackers([]))
    history: History = field(default_factory=History)
    spent: Spent = field(default_factory=Spent)
    # draws the report after so many seconds; returns what else the picture shows: losses by name
    draw_report: Callable[[float], dict[str, float]] | None = None

    def __post_init__(self) -> None:
        self._metrics = None if self.folder is None else MetricsFile(self.folder / "metrics.jsonl")
        self.weights_of_step: int | None = None  # if the model has not the last step's weights
        self._bar = RunBar(self.total_steps)
        self._was_printed = True  # the last evaluation was printed
        begin_report()
        self.steps = 0  # the last one that was noted
        self._tokens = 0
        self._pending: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = []
        self._said: set[str] = set()
        self._refused: set[Path] = set()  # files whose last write failed
        self._pictures = Allowance()
        self._drawn_at = -1  # the evaluations in the picture
        self._earlier_s = 0.0  # of earlier processes
        self._first_step = 0  # of this process
        self._judged_s = self._last_step_s = 0.0  # of all steps, and of the last one
        self._started_at = self._marked_at = time.perf_counter()
        self._marks = [(0, 0.0)]  # at the evaluations: the steps so far and their seconds
        self._marked_tokens = 0
        self._tokens_per_s = 0.0  # up to the evaluation that is being made

    @property
    def elapsed_s(self) -> float:
        """The seconds of the run so far, including earlier processes."""
        return self._earlier_s + time.perf_counter() - self._started_at

    @property
    def _steps_s(self) -> float:
        """The seconds of all steps so far, without evaluations, samples, pictures and saves."""
        return max(0.0, self.elapsed_s - self.spent.total_s)

    @property
    def step_s(self) -> float:
        """The mean seconds of a step in the later half of them: the first ones are slower, and
        the last ones know a machine that has become so."""
        step, seconds = next(mark for mark in reversed(self._marks) if mark[0] <= self.steps / 2)
        return max(0.0, self._steps_s - seconds) / max(1, self.steps - step)

    def plan_anew(self, total_steps: int) -> None:
        """Note that the run has another number of steps from here on."""
        self.total_steps = total_steps
        self._bar.change_total(total_steps)

    def note_forecast(self, least: float, expected: float, most: float) -> None:
        """Print and log the final validation loss that is expected after this step."""
        self.history.forecast = [least, expected, most]
        in_bits = ""
        if self.token_size is not None:
            in_bits = f", or {bits_per_byte(expected, self.token_size):.3f} bits a byte"
        say(
            f"Forecast: validation loss {expected:.3f} at the end ({least:.3f} to {most:.3f})"
            f"{in_bits}; the learning rate falls from here, step {self.steps:,}, on"
        )
        row = {"least": least, "expected": expected, "most": most}
        self._log([{"step": self.steps} | {f"forecast/val_{n}": x for n, x in row.items()}])

    def step(
        self,
        step: int,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        n_tokens: int,
        learning_rate: float,
    ) -> list[dict[str, Any]]:
        """Note a step, counted from 1; loss and norm are 0-d tensors. Returns rows fetched now."""
        self.steps = step
        self._tokens += n_tokens
        known = {"step": step, "train/lr": learning_rate, "train/tokens": self._tokens}
        self._pending.append((loss, grad_norm, known))
        self._bar.show(step)
        is_logged = self.log_every > 0 and step % self.log_every == 0
        rows = self.fetch() if is_logged or len(self._pending) == FETCH_EVERY else []
        if is_logged:
            elapsed_s = time.perf_counter() - self._started_at
            done, total = step - self._first_step, self.total_steps - self._first_step
            left = as_duration(seconds_left(done, total, elapsed_s) or 0.0)
            report(
                f"step {step}: batch loss {rows[-1]['train/loss']:.4f}, {self._speed():,.0f} "
                f"tokens/s, {left} left",
                asked=True,
            )
        return rows

    def fetch(self) -> list[dict[str, Any]]:
        """Copy the pending numbers from the device and log them; returns a row per step."""
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

    def _speed(self) -> float:
        """Tokens per second since the last evaluation."""
        seconds = time.perf_counter() - self._marked_at
        return (self._tokens - self._marked_tokens) / max(seconds, 1e-9)

    def pause(self) -> list[dict[str, Any]]:
        """Stop the clock of the tokens per second for an evaluation; returns fetch()'s rows."""
        rows = self.fetch()
        if self._tokens > self._marked_tokens:  # else an earlier process measured it
            self._tokens_per_s = self._speed()
        return rows

    def evaluation(self, epoch: int | None, train_loss: float, val_loss: float) -> None:
        """Note an evaluation, ending `epoch` (from 1) unless None; NumericsError if not finite."""
        history, step = self.history, self.steps
        row = {"step": step, "eval/train_loss": train_loss, "val/loss": val_loss}
        if not math.isfinite(train_loss + val_loss):
            self._log([row])  # so that the report can say why the run ended
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
        row["val/perplexity"] = perplexity(val_loss)
        if self.token_size is not None:
            row["val/bits_per_character"] = bits_per_character(val_loss, self.token_size)
            row["val/bits_per_byte"] = bits_per_byte(val_loss, self.token_size)
        if step > 0:
            row["train/tok_per_sec"] = self._tokens_per_s
        losses = f"Train loss {train_loss:.3f}, Val loss {val_loss:.3f}"
        lines = [
            f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, speed: "
            f"{self._tokens_per_s:.2f} tokens/sec, time: {as_duration(history.elapsed_s)}"
        ]
        if step == 0:
            lines = [f"Before training: {losses}"]
        elif epoch is not None:
            lines.append(f"Ep {epoch} (End Epoch): {losses}")
        self._was_printed = report(*lines, keep=step in (0, self.total_steps))
        self._log([row])
        if step > 0 and (step == self.total_steps or self._pictures.allows(self.elapsed_s)):
            self.draw()
        self._marked_at, self._marked_tokens = time.perf_counter(), self._tokens
        self._marks.append((step, self._steps_s))

    def draw(self) -> bool:
        """Draw the report and the picture of the losses; False if there is no picture.

        The picture is written into the run's folder and the working directory.
        """
        if self.folder is None:
            return False
        began_at = time.perf_counter()
        baselines = {} if self.draw_report is None else self.draw_report(self.elapsed_s)
        is_drawn = self._draw_losses(self.folder, baselines)
        self._pictures.spend(took_s := time.perf_counter() - began_at)
        self.spent.note("picture", took_s)
        return is_drawn

    def _draw_losses(self, folder: Path, baselines: dict[str, float]) -> bool:
        history = self.history
        png = render_losses(
            steps=history.steps,
            train_losses=history.train_losses,
            val_losses=history.val_losses,
            best=history.best,
            batch_losses=history.batch_losses,
            vocab_size=self.vocab_size,
            title=folder.name,
            baselines=baselines,
        )
        if png is None:
            self._say_once("matplotlib is not installed: no picture (pip install matplotlib)")
            return False
        written = [self._try_to_write(path, png) for path in (folder / PICTURE, Path(PICTURE))]
        self._drawn_at = len(history.steps) if all(written) else -1
        return any(written)

    def complete_picture(self) -> bool:
        """Draw the evaluations since the last picture, if there are any; False as draw()."""
        return self._drawn_at == len(self.history.steps) or self.draw()

    def close(self) -> None:
        """Close the trackers and the bar at the end of training."""
        self._bar.close()
        self.trackers.close()

    def leave_out(self, seconds: float) -> None:
        """Exclude some seconds, which were not spent on steps, from the tokens per second."""
        self._marked_at += seconds

    def leave_out_pause(self) -> float:
        """Leave a step out of the run's time, to be asked after each, that took so much longer than
        those before that the machine must have slept, or the process was stopped.

        Returns its seconds, or 0. Of a machine that has become slow it is the first one alone.
        """
        steps_s = self._steps_s
        step_s, before_s = steps_s - self._judged_s, self._last_step_s
        self._judged_s, self._last_step_s = steps_s, step_s
        usual_s = max(before_s, (steps_s - step_s) / max(1, self.steps - 1))
        # the first ones compile
        is_first = self.steps - self._first_step <= COMPILED_STEPS
        if is_first or step_s < max(PAUSE_S, PAUSE_TIMES * usual_s):
            return 0.0
        pause_s = step_s - usual_s
        self._started_at += pause_s
        self._judged_s -= pause_s
        self.leave_out(pause_s)
        return step_s

    def has_evaluated(self) -> bool:
        """Whether the model as it is now has been evaluated."""
        return self.history.steps[-1:] == [self.steps]

    @property
    def steps_since_sample(self) -> int:
        """The optimizer steps since the last sample."""
        return self.steps - (self.history.samples[-1].step if self.history.samples else 0)

    def note_sample(self, label: str, texts: list[str], *, is_last: bool = False) -> None:
        """Print what the model wrote, a line per prompt, and add it to samples.md.

        A notebook, which drops lines that come too fast, always prints those that are last.
        """
        lines = []
        for number, text in enumerate(texts, start=1):
            shown = "".join(c if c.isprintable() else " " for c in text)  # no control characters
            name = label if len(texts) == 1 else f"{label}, prompt {number}"
            lines.append(f"{name}: {' '.join(shown.split())}")
        report(*lines, keep=is_last or self._was_printed)
        step = self.steps if self.weights_of_step is None else self.weights_of_step
        self.history.samples.append(Moment(label, step, texts))
        _thin_out(self.history.samples)
        if self.folder is not None:
            losses = dict(zip(self.history.steps, self.history.val_losses, strict=True))
            pages = [_as_section(moment, losses) for moment in self.history.samples]
            content = "\n\n".join(["# What the model writes", *pages]) + "\n"
            self._try_to_write(self.folder / "samples.md", content.encode("utf-8", "replace"))

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps, as JSON; the losses of steps are in metrics.jsonl."""
        self.fetch()
        self.trackers.flush()
        history = vars(self.history) | {"elapsed_s": self.elapsed_s}
        del history["batch_losses"]
        return {
            "history": history,
            "spent": vars(self.spent),
            "marks": self._marks,
            "steps": self.steps,
            "tokens": self._tokens,
            "tokens_per_s": self._speed(),
            "metrics_bytes": 0 if self._metrics is None else self._metrics.sync(),
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Resume from state(), None being the start; truncates metrics.jsonl to match."""
        n_bytes = state["metrics_bytes"] if state else 0
        rows = [] if self._metrics is None else self._metrics.cut(n_bytes)
        if state is None:
            return
        samples = [Moment(*kept) for kept in state["history"].pop("samples")]
        self.history = History(**state["history"], samples=samples)
        self.history.batch_losses = _losses_in(rows, state["steps"])
        self.spent = Spent(**state["spent"])
        self.steps = self._first_step = state["steps"]
        self._tokens = self._marked_tokens = state["tokens"]
        self._tokens_per_s = state["tokens_per_s"]
        self._earlier_s = self.history.elapsed_s
        self._marks = [(step, seconds) for step, seconds in state.get("marks", self._marks)]

    def _log(self, rows: list[dict[str, Any]]) -> None:
        if self._metrics is not None:
            self._metrics.append(rows)
        for row in rows:
            self.trackers.log(row)

    def _try_to_write(self, path: Path, content: bytes) -> bool:
        """Write a file whose failure must not end a run; False if the disk refuses it."""
        # a viewer may hold the picture open for hours: wait for it only once
        patience_s = 0.0 if path in self._refused else PATIENCE_S
        try:
            write_atomically(path, content, patience_s=patience_s)
        except ResourceError as error:
            self._refused.add(path)
            self._say_once(f"{first_line(error)} Training goes on")
            return False
        self._refused.discard(path)
        return True

    def _say_once(self, note: str) -> None:
        if note not in self._said:
            self._said.add(note)
            say(f"Note: {note}")


def _losses_in(rows: list[bytes], n_steps: int) -> list[float]:
    """The loss of each step in the lines of metrics.jsonl; NaN where it has none."""
    losses = [math.nan] * n_steps
    for line in rows:
        try:
            row = json.loads(line)
            losses[row["step"] - 1] = float(row["train/loss"])
        except (ValueError, KeyError, TypeError, IndexError):  # an evaluation, or a damaged line
            continue
    return losses


def _thin_out(moments: list[Moment]) -> None:
    """Remove moments until MOST_MOMENTS are left: the first, the last ones, and an even spread."""
    while len(moments) > MOST_MOMENTS:
        steps = [moment.step for moment in moments]
        between = range(1, len(moments) - LAST_MOMENTS)
        del moments[min(between, key=lambda i: steps[i + 1] - steps[i - 1])]


def _as_section(moment: Moment, losses: dict[int, float]) -> str:
    """A section of samples.md; losses are the validation losses by step."""
    loss = losses.get(moment.step)
    suffix = "" if loss is None else f", validation loss {loss:.3f}"
    parts = [f"## {moment.label}", f"Step {moment.step}{suffix}"]
    for number, text in enumerate(moment.texts, start=1):
        if len(moment.texts) > 1:
            parts.append(f"Prompt {number}:")  # else two blocks would be read as one
        # an indented block, in which Markdown has no meaning
        lines = ["    " + _CONTROLS.sub("\ufffd", line) for line in text.splitlines()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
