"""Stop signals (Ctrl-C, SIGTERM) and requests, noted when they come, acted on at a safe point."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from distributed.parallel import ALONE, Parallel, is_communication_error
from engine.console import complain
from engine.errors import Stopped

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # Windows lacks the third, others the last
ASK_S = 1.0  # between two looks for a request to stop
_ECHO_S = 0.5  # a terminal and a launcher may both send the same Ctrl-C
_LINGER_S = 10.0  # how long a loader's worker outlives SIGTERM, so that its owner can save
_LONG_S = 5.0  # a step that takes longer than this to finish is abandoned


class StopSignals:
    """A context that notes stop signals, so that check() raises Stopped.

    A second Ctrl-C raises KeyboardInterrupt at once. Ignored signals (nohup) stay ignored, and
    threads other than the main one catch none. At the end the handlers are those of before, but
    after a failed collective SIGTERM is ignored, as in Parallel.watched(). `requested`, called at
    most once each ASK_S, says whether somebody asked for a stop in another way: that counts as a
    first Ctrl-C.
    """

    def __init__(
        self, parallel: Parallel = ALONE, requested: Callable[[], bool] | None = None
    ) -> None:
        self._parallel, self._requested = parallel, requested
        self._ask_at = 0.0  # by time.monotonic()
        self._number = 0  # the first stop signal of this process; 0: none
        self._agreed = 0  # the signal that all ranks stop for
        self._asks_within_steps = parallel.is_alone
        self._noted_at: float | None = None  # when the first signal came
        self._before: dict[int, Any] = {}  # the handlers of before, by signal

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in _stop_signals():
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # torchrun sends SIGTERM when another rank has ended, which this one has yet to report
        outlives = not self._parallel.is_alone and is_communication_error(error)
        for number, before in self._before.items():
            ignores = outlives and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ignores else before)
        self._before.clear()

    def check(self) -> None:
        """Raise Stopped after a signal; with several ranks, after one that agree() has found."""
        if number := self._asked() if self._parallel.is_alone else self._agreed:
            raise Stopped(number)

    def agree(self, *others: float, step_s: float | None = None) -> list[float]:
        """Make all ranks raise Stopped at their next check() if one had a signal. Collective.

        Returns the maximum of each of `others`. After a long step_s they also agree within steps.
        """
        number, slowest_s, *highest = self._parallel.highest(self._asked(), step_s or 0.0, *others)
        self._agreed = int(number)
        if step_s is not None:
            self._asks_within_steps = self._parallel.is_alone or slowest_s > _LONG_S
        return highest

    @property
    def has_come(self) -> bool:
        """Whether a signal or a request has come to this process."""
        return self._asked() > 0

    def check_within_step(self, started_at: float, done: float) -> None:
        """Raise Stopped after a signal if the rest of a step takes long; it began at started_at, by
        time.perf_counter(), and a share `done` of it is finished."""
        if self._asks_within_steps:
            elapsed_s = time.perf_counter() - started_at
            is_long = elapsed_s / done * (1 - done) > _LONG_S
            if number := self._parallel.highest(self._asked() * is_long)[0]:
                raise Stopped(int(number))

    def _asked(self) -> int:
        """The signal that this process stops for, SIGINT after a request; 0: none."""
        if not self._number and self._requested is not None:
            now = time.monotonic()
            if now >= self._ask_at:
                self._ask_at = now + ASK_S
                if self._requested():
                    self._number = signal.SIGINT
                    complain("Stopping after this step, as the file named stop asks for.")
        return self._number

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted_at is None:  # after a request too: nobody at the terminal has asked yet
            self._number, self._noted_at = self._number or number, now
            with contextlib.suppress(RuntimeError):  # the signal came in the middle of a print
                complain("Stopping after this step; Ctrl-C again stops at once, without saving.")
        elif number == signal.SIGINT and now - self._noted_at > _ECHO_S:
            raise KeyboardInterrupt


def _stop_signals() -> list[int]:
    return [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def defer_to_owner(worker: int) -> None:
    """Make a loader's worker ignore stop signals and a lost owner; the owner ends it after saving.

    Python sends SIGTERM to the workers of a failed owner and waits: they end after _LINGER_S.
    """
    for number in _stop_signals():
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):  # not on Windows, where SIGTERM can't be ignored
        # status 0: torch raises an error in an owner whose worker ends with another
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, _LINGER_S))
    report = sys.excepthook  # called by the thread that sends batches, too

    def report_all_but_lost_owner(kind, error, trace) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            report(kind, error, trace)

    sys.excepthook = report_all_but_lost_owner
