"""The curves of a run, read from its metrics.jsonl as that grows."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MOST_LINE_BYTES = 1 << 20  # of metrics.jsonl; a longer line is none of ours
BLOCK_BYTES = 1 << 20
KEPT_BYTES = 256  # of the end of what was read: a row, more or less


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


class MetricsReader:
    """metrics.jsonl, of which each read() takes only what was added since the one before.

    Where a run goes on from a checkpoint, another file takes its place, without the rows of later
    steps: it may soon be longer than what was read, but has another row there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._offset, self._last, self._rest = 0, b"", b""
        self._skips = False  # the rest of a line that is too long

    def read(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """Whether all earlier rows are void, and the new ones: take them all, there is one block
        of the file in memory. A line that is half written, damaged or too long is left out."""
        try:
            file = open(self._path, "rb")  # noqa: SIM115  which _rows() closes
            file.seek(self._offset - len(self._last))
            is_another = file.read(len(self._last)) != self._last
        except OSError:
            return False, iter(())
        if is_another:
            self._begin()
        return is_another, self._rows(file)

    def _rows(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        with file:
            file.seek(self._offset)
            while block := self._block(file):
                self._offset += len(block)
                self._last = (self._last + block)[-KEPT_BYTES:]
                *lines, self._rest = (self._rest + block).split(b"\n")
                for line in lines:
                    if not self._skips and (row := _row(line)) is not None:
                        yield row
                    self._skips = False
                if len(self._rest) > MOST_LINE_BYTES:
                    self._rest, self._skips = b"", True

    def _block(self, file: BinaryIO) -> bytes:
        try:
            return file.read(BLOCK_BYTES)
        except OSError:  # of a network, say; the next read() goes on from here
            return b""


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class CurvesFile:
    """The Curves of a metrics.jsonl that grows."""

    def __init__(self, path: Path) -> None:
        self.curves = Curves()
        self._file = MetricsReader(path)

    def read(self) -> Curves:
        """The curves so far."""
        is_another, rows = self._file.read()
        if is_another:
            self.curves = Curves()
        for row in rows:
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
