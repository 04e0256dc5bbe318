"""Which phase of a run a forked process is in, seen from outside: where a kill is to come."""

import functools
import mmap
import time
from collections.abc import Callable
from typing import Any

PHASES = ("other", "step", "save", "evaluation", "sampling")


class PhaseBoard:
    """Memory shared with a forked run: the phase that it is in, and how often and long in each."""

    def __init__(self) -> None:
        memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._now = memory[:8].cast("q")
        self._counts = memory[64:128].cast("q")
        self._seconds = memory[128:192].cast("d")

    def clear(self) -> None:
        """Begin anew, for another process."""
        self._now[0] = 0
        for i in range(len(PHASES)):
            self._counts[i], self._seconds[i] = 0, 0.0

    @property
    def phase(self) -> str:
        """The phase that the process is in, or was in when it ended."""
        return PHASES[self._now[0]]

    def count(self, phase: str) -> int:
        """How often the process has entered a phase."""
        return self._counts[PHASES.index(phase)]

    def mean_s(self, phase: str) -> float:
        """How long the process was in a phase each time, on average."""
        return self._seconds[PHASES.index(phase)] / max(1, self.count(phase))

    def marking(self, phase: str, function: Callable) -> Callable:
        """The function, with its phase marked while it runs."""
        index = PHASES.index(phase)

        @functools.wraps(function)
        def marked(*arguments: Any, **options: Any) -> Any:
            self._now[0] = index
            self._counts[index] += 1
            entered_at = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._seconds[index] += time.perf_counter() - entered_at
                self._now[0] = 0

        return marked
