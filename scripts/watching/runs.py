"""The runs in OUTPUT_DIR as the page shows them: their state, figures, samples and cards."""

import contextlib
import math
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.metrics import as_duration
from insight.report import Report
from insight.run_files import Sample, divide_remark, read_samples
from insight.verdict import change_lines, headline
from planning.card import card_rows
from planning.decisions import RunRecord, read_record, read_run_file
from scripts.watching.curves import Metrics, Sent, is_number
from storage.checkpoint import newest_step
from storage.files import DATA, SETTINGS, STOP, SUMMARY, FolderLock, write_atomically

MOST_RUNS = 500  # on the page, the newest
MOST_FACTS_BYTES = 1 << 24
NAMED_TEXTS = 3  # of those that a run learns from
FRESH_S = 0.5  # how long the lines of all runs serve whoever asks
DIAGNOSIS_S = 10.0  # between two diagnoses of a run
LEAST_RATE_S = 5.0  # of watching, before a run's own pace is known


@dataclass(frozen=True)
class Described:
    """A run by its settings.json; empty where that can't be read."""

    record: RunRecord | None = None
    card: list[list[dict[str, str]]] = field(default_factory=list)
    facts: list[list[str]] = field(default_factory=list)


class Run:
    """A run's folder, watched. Any thread may call its methods."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = Metrics(path / "metrics.jsonl")
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[tuple[int, int], Any]] = {}  # by file: its stamp, what it held
        self._seen: list[tuple[float, int]] = []  # when the newest step was seen first, and it
        self._report, self._diagnosis_lock = Report(path), threading.Lock()
        self._diagnosis: dict[str, Any] = {}
        self._diagnosed_at = -math.inf
        self._asked: int | None = None  # the lock's holder that was asked to stop

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / SUMMARY).exists()

    @property
    def state(self) -> str:
        """ "training", "stopping", "finished" or "stopped"."""
        lock = FolderLock(self.path)
        if lock.is_held():
            holder = lock.holder()
            if (self.path / STOP).exists():  # the run removes it, and then saves for a while
                self._asked = holder
                return "stopping"
            return "training" if holder is None or holder != self._asked else "stopping"
        return "finished" if self.is_finished else "stopped"

    def ask_to_stop(self) -> bool:
        """Ask the process that trains the run to stop; False if none does."""
        lock = FolderLock(self.path)
        holder = lock.holder()
        if not lock.is_held():
            return False
        write_atomically(self.path / STOP, b"")
        self._asked = holder
        return True

    def newest_weights(self) -> tuple[str, int] | None:
        """Which weights "write with it" takes, and their step; None if none are saved yet.

        Those of the newest checkpoint while the run trains; of a finished one the best.
        """
        which = "best" if self.is_finished else "last"
        step = newest_step(self.path, which)
        return None if step is None else (which, step)

    def described(self) -> "Described":
        """What settings.json says."""

        def read(path: Path) -> Described:
            try:
                record = read_record(path.parent)
                return Described(record, _card(record), _facts_of(record))
            except Exception:  # of another version, or with values that no run has
                return Described()

        return self._read(SETTINGS, read) or Described()

    def line(self) -> dict[str, Any]:
        """What the list of runs says of this one; of a damaged one its name and state alone."""
        state = self.state
        try:
            return self._line(state)
        except Exception:  # of files that anyone may have changed; the other runs have their lines
            unknown = dict.fromkeys(("total", "loss", "seconds_left", "started"))
            return {"name": self.path.name, "state": state, "step": 0} | unknown

    def _line(self, state: str) -> dict[str, Any]:
        record = self.described().record
        if state != "finished":
            self.metrics.read()
        if state != "training":
            self._seen = []  # a run that goes on later has its pace of then
        summary = self._facts(SUMMARY) if state == "finished" else {}
        return {
            "name": self.path.name,
            "state": state,
            "step": _number(summary.get("steps"), self.metrics.step),
            "total": None if record is None else record.total_steps,
            "loss": _number(summary.get("final_val_loss"), self.metrics.curves["val/loss"].last),
            "seconds_left": _number(self.seconds_left()) if state == "training" else None,
            "started": None if record is None else record.started,
        }

    def seconds_left(self) -> float | None:
        """How long the rest of the steps takes at the pace of now; None where that is unknown."""
        record, metrics = self.described().record, self.metrics
        if record is None or not 0 < metrics.step <= record.total_steps:
            return None
        left = record.total_steps - metrics.step
        speed = metrics.curves["train/tok_per_sec"].last
        with self._lock:
            now = time.monotonic()
            if not self._seen or self._seen[-1][1] > metrics.step:
                self._seen = [(now, metrics.step)]
            elif self._seen[-1][1] < metrics.step:
                self._seen = [self._seen[0], (now, metrics.step)]
            (since, first), (until, last) = self._seen[0], self._seen[-1]
        if until - since >= LEAST_RATE_S:
            return left * (until - since) / (last - first)
        return left * metrics.tokens / metrics.step / speed if speed and metrics.tokens else None

    def detail(self) -> dict[str, Any]:
        """What the page shows of the run that is chosen, but its curves."""
        described, data = self.described(), self._facts(DATA)
        files = data.get("files")
        names = [
            Path(str(file.get("name"))).name
            for file in (files if isinstance(files, list) else [])
            if isinstance(file, dict)
        ]
        self.metrics.read()
        weights = self.newest_weights()
        summary = self._facts(SUMMARY) if self.is_finished else {}
        bits = self.metrics.curves["val/bits_per_byte"].last
        return self.line() | {
            "bits_per_byte": _number(summary.get("final_val_bits_per_byte"), bits),
            "tokens": self.metrics.tokens,
            "forecast": self.metrics.forecast,
            "weights": None if weights is None else weights[1],
            "samples": self.samples(),
            "diagnosis": self.diagnosis(),
            "card": described.card,
            "facts": described.facts,
            "text": names[:NAMED_TEXTS],
            "more_texts": len(names[NAMED_TEXTS:]),
            "text_tokens": _number(data.get("tokens")),
        }

    def samples(self) -> list[dict[str, Any]]:
        """What the model wrote at some moments, oldest first: label, step, a text a prompt, and the
        remark on each text or None."""

        def read(path: Path) -> list[dict[str, Any]]:
            return [_as_facts(sample) for sample in read_samples(path)]

        return self._read("samples.md", read) or []

    def diagnosis(self) -> dict[str, Any]:
        """The sentence that matters first, and the findings so far, each in both languages.

        Found anew at most every DIAGNOSIS_S; empty where the run's files tell nothing yet.
        """
        with self._diagnosis_lock:
            if time.monotonic() - self._diagnosed_at < DIAGNOSIS_S:
                return self._diagnosis
            self._diagnosed_at = time.monotonic()
            try:
                run, findings = self._report.read()
                first = headline(run, findings)
            except Exception:  # of files that anyone may have changed; the page has its other parts
                self._diagnosis = {}
                return {}
            self._diagnosis = {
                "headline": first._asdict(),
                "findings": [
                    {
                        "severity": finding.severity,
                        "confidence": finding.confidence,
                        "title": finding.title._asdict(),
                        "evidence": finding.evidence._asdict(),
                        "advice": finding.advice._asdict(),
                        "lines": [
                            line._asdict() for line in change_lines(finding.changes, run.facts)
                        ],
                    }
                    for finding in findings
                ],
            }
            return self._diagnosis

    def news(self, sent: Sent) -> tuple[dict[str, Any], Sent]:
        """Metrics.news() of the run, read up to now."""
        self.metrics.read()
        return self.metrics.news(sent)

    def _facts(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; empty if it is not there or can't be read."""

        def read(path: Path) -> dict[str, Any]:
            with contextlib.suppress(CheckpointError):
                return read_run_file(path, MOST_FACTS_BYTES)
            return {}

        return self._read(name, read) or {}

    def _read(self, name: str, read: Any) -> Any:
        """What read() makes of a file of the run, kept until the file is another; None without."""
        path = self.path / name
        try:
            found = path.stat()
            stamp = found.st_mtime_ns, found.st_size
            with self._lock:
                kept = self._kept.get(name)
            if kept is None or kept[0] != stamp:
                kept = stamp, read(path)
                with self._lock:
                    self._kept[name] = kept
        except OSError:
            return None
        return kept[1]


class Runs:
    """The runs in a folder, each watched by one Run for as long as it is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock, self._line_lock = threading.Lock(), threading.Lock()
        self._runs: dict[str, Run] = {}
        self._lines: list[dict[str, Any]] = []
        self._lines_at = -math.inf

    def lines(self) -> list[dict[str, Any]]:
        """What the page's list says of each run; looked up once for all who ask at the time."""
        with self._line_lock:
            if time.monotonic() - self._lines_at > FRESH_S:
                self._lines = [run.line() for run in self.all()]
                self._lines_at = time.monotonic()
            return self._lines

    def all(self) -> list[Run]:
        """The newest runs, by the time of their last change, the latest first."""
        found = {}
        for file in self.folder.glob(f"*/{SETTINGS}"):
            with contextlib.suppress(OSError):
                found[file.parent.name] = file.stat().st_mtime
        names = sorted(found, key=lambda name: (found[name], name), reverse=True)[:MOST_RUNS]
        with self._lock:
            self._runs = {n: self._runs.get(n) or Run(self.folder / n) for n in names}
            return list(self._runs.values())

    def find(self, name: str) -> Run | None:
        """The run of a name; None if there is none. No other path can be reached by it."""
        return next((run for run in self.all() if run.path.name == name), None)


def _number(value: Any, otherwise: float | None = None) -> float | None:
    """A value of a run's files if it is a number."""
    return value if is_number(value) else otherwise


def _as_facts(sample: Sample) -> dict[str, Any]:
    pairs = [divide_remark(text) for text in sample.texts]
    return {
        "label": sample.label_words._asdict(),
        "step": sample.step,
        "texts": [text for text, _ in pairs],
        "remarks": [None if remark is None else remark._asdict() for _, remark in pairs],
    }


def _card(record: RunRecord) -> list[list[dict[str, str]]]:
    """The card of the recipe that was chosen for the run's MINUTES: rows of a label and words."""
    if record.choice is None or record.asked.minutes is None:
        return []
    choice, why_start = record.choice, record.origins.get("start")
    rows = card_rows(choice.recipe, choice.text, choice.machine, record.asked.minutes, why_start)
    return [[words._asdict() for words in row] for row in rows]


def _facts_of(record: RunRecord) -> list[list[str]]:
    """The settings of a run that tell most, as rows of a name and a value; the page has words."""
    model, training = record.model, record.training
    windows = training.batch_size * training.gradient_accumulation_steps
    minutes, rate = training.time_budget_minutes, training.learning_rate
    rows = {
        "mode": record.mode,
        "model": f"{record.model_name} ({model.architecture})",
        "layers": f"{model.n_layers:,}",
        "width": f"{model.emb_dim:,}",
        "context": f"{model.context_length:,}",
        "tokenizer": record.tokenizer.partition("-")[0],
        "vocabulary": f"{model.vocab_size:,}",
        "batch": f"{windows:,} x {training.max_length:,}",
        "optimizer": training.optimizer,
        "rate": None if rate is None else f"{rate:.3g}",
        "budget": None if minutes is None else as_duration(60 * minutes),
        "start": None if record.start is None else record.start.source,
        "device": f"{record.device}, {record.precision.name}",
    }
    return [[name, value] for name, value in rows.items() if value is not None]
