"""The curves of a run, read from its metrics.jsonl as that grows."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


@dataclass
class Curves:
    """What a run measured, step by step and evaluation by evaluation; NaN where unknown."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of each step's batches, nats a token
    grad_norms: list[float] = field(default_factory=list)  # before clipping
    rates: list[float] = field(default_factory=list)  # the learning rate
    eval_steps: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # tokens a second, up to an evaluation
    # tokens read, up to each step and up to each evaluation
    tokens: list[int] = field(default_factory=list)
    eval_tokens: list[int] = field(default_factory=list)
    bytes_a_token: float = math.nan  # of the validation text
    # the final validation loss as expected where the decay began: the least, the middle, the most
    forecast: tuple[float, float, float] | None = None

    @property
    def best(self) -> int:
        """The index of the evaluation with the lowest validation loss, after the first step."""
        trained = [i for i, step in enumerate(self.eval_steps) if step > 0]
        losses = [loss if math.isfinite(loss) else math.inf for loss in self.val_losses]
        return min(trained or [0], key=losses.__getitem__)

    def as_bits(self, loss: float) -> float:
        """A validation loss in bits a byte; NaN if the length of a token is unknown."""
        return loss / math.log(2) / self.bytes_a_token

    def add(self, row: dict[str, Any]) -> None:
        """Add a row of metrics.jsonl. What is no row of a step or an evaluation is passed over."""
        step = row.get("step")
        if not isinstance(step, int):
            return
        if "train/loss" in row:
            self.steps.append(step)
            self.losses.append(_number(row, "train/loss"))
            self.grad_norms.append(_number(row, "train/grad_norm"))
            self.rates.append(_number(row, "train/lr"))
            tokens = _number(row, "train/tokens")
            self.tokens.append(int(tokens) if math.isfinite(tokens) else 0)
        elif "val/loss" in row:
            self.eval_steps.append(step)
            self.train_losses.append(_number(row, "eval/train_loss"))
            self.val_losses.append(_number(row, "val/loss"))
            self.speeds.append(_number(row, "train/tok_per_sec"))
            self.eval_tokens.append(self.tokens[-1] if self.tokens else 0)
            bits = _number(row, "val/bits_per_byte")
            if bits > 0:
                self.bytes_a_token = self.val_losses[-1] / math.log(2) / bits
        elif "forecast/val_expected" in row:
            values = [
                _number(row, f"forecast/val_{name}") for name in ("least", "expected", "most")
            ]
            self.forecast = (values[0], values[1], values[2])


def _number(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


class CurvesFile:
    """metrics.jsonl, of which each read() takes only what was added since the one before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.curves = Curves()
        self._read = 0  # bytes, up to the end of a line

    def read(self) -> Curves:
        """The curves so far; a line that is only half written, or damaged, is left out."""
        try:
            with open(self.path, "rb") as file:
                if file.seek(0, 2) < self._read:  # a resumed run has cut it
                    self.curves, self._read = Curves(), 0
                file.seek(self._read)
                content = file.read()
        except OSError:
            return self.curves
        complete = content[: content.rfind(b"\n") + 1]
        self._read += len(complete)
        for line in complete.splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                self.curves.add(row)
        return self.curves


class Bucket(NamedTuple):
    """Some neighboring points of a curve as one."""

    step: int  # the last one
    mean: float
    least: float
    most: float


def buckets(steps: Sequence[int], values: Sequence[float], most: int) -> list[Bucket]:
    """A curve as at most so many buckets of equally many points; NaN where no value is finite."""
    if not len(steps):
        return []
    size = -(-len(steps) // most)
    numbers = np.asarray(values, dtype=np.float64)
    starts = np.arange(0, len(numbers), size)
    known = np.isfinite(numbers)
    masked = np.where(known, numbers, np.nan)
    counts = np.add.reduceat(known.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(known, numbers, 0.0), starts)
    means = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    least, greatest = np.fmin.reduceat(masked, starts), np.fmax.reduceat(masked, starts)
    ends = [steps[min(start + size, len(steps)) - 1] for start in starts.tolist()]
    rows = zip(ends, means.tolist(), least.tolist(), greatest.tolist(), strict=True)
    return [Bucket(*row) for row in rows]
