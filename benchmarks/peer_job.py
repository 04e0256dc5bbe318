"""A contender's job and its report, one JSON file each.

The peers' environment imports it too, so it needs only numpy.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Job:
    """Steps to train on the windows of a token file, in order.

    tokens is a .npy of uint16; weights a folder in transformers' GPT-2 format; model the fields
    of a GPTConfig; report the file to write. precision "auto" is the contender's default.
    """

    tokens: str
    weights: str
    model: dict
    batch_size: int
    steps: int
    device: str
    learning_rate: float
    precision: str
    keep_losses: bool
    report: str

    @property
    def max_length(self) -> int:
        """Tokens in a window, T."""
        return self.model["context_length"]

    def windows(self) -> Iterator[np.ndarray]:
        """(T + 1,) int64 tokens of each window: ids are all but the last, targets but the first."""
        tokens = np.load(self.tokens, mmap_mode="r")
        for start in range(0, len(tokens) - self.max_length, self.max_length):
            yield tokens[start : start + self.max_length + 1].astype(np.int64)


def read_job(path: str) -> Job:
    """Read a job that peers.py wrote."""
    return Job(**json.loads(Path(path).read_text(encoding="utf-8")))


class StepClock:
    """Times the steps from mark to mark, so that they include all of the loop."""

    def __init__(self) -> None:
        self._marks: list[float] = []
        self.first_step_at: float | None = None  # the wall clock at the end of the first step

    def mark(self) -> None:
        """Mark the end of a step and the start of the next; the first mark starts the first."""
        self._marks.append(time.perf_counter())
        if len(self._marks) == 2:
            self.first_step_at = time.time()

    def seconds(self) -> list[float]:
        """The duration of each step."""
        return [end - start for start, end in zip(self._marks, self._marks[1:], strict=False)]


def report(
    job: Job,
    clock: StepClock,
    *,
    losses: list[float],
    parameters: int,
    in_products: int,
    precision: str,
    versions: dict[str, str],
) -> None:
    """Write a contender's measurements.

    losses has an entry for each step, or none; in_products is N of 6N + 12LHDT: the parameters of
    matrix products, each counted once.
    """
    model = job.model
    attention = 12 * model["n_layers"] * model["emb_dim"] * job.max_length
    measured = {
        "step_s": clock.seconds(),
        "first_step_at": clock.first_step_at,
        "losses": losses,
        "parameters": parameters,
        "flop_per_token": 6 * in_products + attention,
        "peak_bytes": peak_bytes(),
        "precision": precision,
        "versions": versions,
    }
    Path(job.report).write_text(json.dumps(measured), encoding="utf-8")


def peak_bytes() -> int | None:
    """The peak resident memory of this process; None on Windows."""
    status = Path("/proc/self/status")
    if status.exists():
        # not getrusage, whose peak includes the parent's memory at the fork
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
