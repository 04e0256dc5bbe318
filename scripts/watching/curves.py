"""The curves of a run that may be training: metrics.jsonl, read as it grows, in bounded memory."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from insight.curves import MetricsReader

MOST_POINTS = 1000  # of a curve; beyond, its points stand for twice as many steps each
HIGHEST_STEP = 10**12
HIGHEST_VALUE = 1e200  # sums of them are finite
# the names in metrics.jsonl that have a curve
NAMES = (
    "train/loss",
    "val/loss",
    "val/bits_per_byte",
    "train/lr",
    "train/grad_norm",
    "train/tok_per_sec",
)


@dataclass
class Point:
    """Some steps in a row: the last of them, and the mean and the range of their values."""

    first: int  # where its steps begin, a multiple of the curve's width
    step: int
    count: int
    total: float
    low: float
    high: float

    def add(self, other: "Point") -> None:
        """Take in a point of later steps."""
        self.step = other.step
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


class Curve:
    """The values of some steps, of which at most MOST_POINTS points remain, however many come."""

    def __init__(self) -> None:
        self.width = 1  # steps of a point
        self.points: list[Point] = []

    def add(self, step: int, value: float) -> None:
        """Add a value; one of an earlier step than the last takes the place of those after it."""
        first = step - step % self.width
        while self.points and self.points[-1].step >= step:
            self.points.pop()
        self._append(Point(first, step, 1, value, value, value))
        if len(self.points) > MOST_POINTS:
            self.width *= 2
            points, self.points = self.points, []
            for point in points:
                point.first -= point.first % self.width
                self._append(point)

    def _append(self, point: Point) -> None:
        if self.points and self.points[-1].first == point.first:
            self.points[-1].add(point)
        else:
            self.points.append(point)

    @property
    def last(self) -> float | None:
        """The newest point's mean; None without a point."""
        return self.points[-1].total / self.points[-1].count if self.points else None

    def to_json(self, first: int = 0) -> list[list[float]]:
        """The points from one on: step, mean, lowest and highest value, in six digits."""
        return [
            [point.step, *(_short(x) for x in (point.total / point.count, point.low, point.high))]
            for point in self.points[first:]
        ]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class Sent:
    """What a reader of the curves has already."""

    edition: int = -1
    # of each curve its width, the number of its points, and the steps of the newest one
    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)


class Metrics:
    """The curves of a metrics.jsonl, brought up to date by read().

    Rows that are not ours are passed over. Where a run goes on from a checkpoint, all of its file
    is read anew. Any thread may call it.
    """

    def __init__(self, path: Path) -> None:
        self._file = MetricsReader(path)
        self._lock = threading.Lock()
        self._edition = -1
        self._reset()

    def _reset(self) -> None:
        self._edition += 1
        self.curves = {name: Curve() for name in NAMES}
        self.step = self.tokens = 0
        self.forecast: dict[str, float] = {}

    def read(self) -> None:
        """Read what was added to the file since the last time; nothing where there is none."""
        with self._lock:
            is_another, rows = self._file.read()
            if is_another:
                self._reset()
            for row in rows:
                self._note(row)

    def _note(self, row: Any) -> None:
        step = row.get("step")
        if not is_number(step) or not isinstance(step, int) or not 0 <= step <= HIGHEST_STEP:
            return
        if step < self.step:  # points that a reader has are taken away
            self._edition += 1
        self.step = step
        if is_number(tokens := row.get("train/tokens")):
            self.tokens = tokens
        for name, curve in self.curves.items():
            if is_number(value := row.get(name)):
                curve.add(step, float(value))
        found = {name: row.get(f"forecast/val_{name}") for name in ("least", "expected", "most")}
        if all(map(is_number, found.values())):
            self.forecast = {name: _short(value) for name, value in found.items()}

    def news(self, sent: Sent) -> tuple[dict[str, Any], Sent]:
        """The points that a reader lacks, by the curve's name, and what it has with them.

        Each curve has the index `from` of its first point here, which replaces those behind it.
        """
        with self._lock:
            shapes = {
                name: (curve.width, len(curve.points), curve.points[-1].count)
                for name, curve in self.curves.items()
                if curve.points
            }
            if sent.edition != self._edition:
                news = {name: _part(curve) for name, curve in self.curves.items()}
                return news, Sent(self._edition, shapes)
            news = {}
            for name, shape in shapes.items():
                width, n_points, _ = known = sent.shapes.get(name, (0, 0, 0))
                if known != shape:
                    # the newest point that is known may have grown
                    first = max(0, n_points - 1) if width == shape[0] else 0
                    news[name] = _part(self.curves[name], first)
            return news, Sent(self._edition, shapes)


def _part(curve: Curve, first: int = 0) -> dict[str, Any]:
    return {"from": first, "points": curve.to_json(first)}


def is_number(value: Any) -> bool:
    """Whether a value of a run's files, which anyone may have changed, is a number to show."""
    if isinstance(value, float):
        return abs(value) < HIGHEST_VALUE
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e18
