"""Signals that ask a program to stop, turned into a wish that the loop grants at a safe place."""

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType

from distributed.parallel import ALONE, Parallel
from engine.console import complain
from engine.errors import Stopped

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # Windows lacks the third, others the last
_ECHO_S = 0.5  # a terminal and a launcher may both pass on one Ctrl-C
_LINGER_S = 10.0  # what a loader's worker leaves its owner for saving
_LONG_S = 5.0  # an optimizer step with more than this to go is not waited for


class StopSignals:
    """While it is entered, a stop signal is noted, and check() raises Stopped for it.

    A second Ctrl-C raises KeyboardInterrupt at once. Signals that were ignored before (nohup)
    stay ignored; outside of the main thread nothing is caught, and check() never raises.
    """

    def __init__(self, parallel: Parallel = ALONE) -> None:
        self._parallel = parallel
        self._number: int | None = None
        self._granted = 0  # the signal that the ranks have agreed to stop for
        self._asks_within_steps = parallel.is_alone
        self._noted_at = 0.0
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):
                    self._handlers[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._handlers.items():
            signal.signal(number, before)
        self._handlers = {}

    def check(self) -> None:
        """Raise Stopped where a signal has come; to be called where the state is whole.

        Of several ranks all stop or none: here for a signal that agree() has found.
        """
        if number := self._wish if self._parallel.is_alone else self._granted:
            raise Stopped(number)

    def agree(self, *others: float, step_s: float | None = None) -> list[float]:
        """Let a signal to one rank stop all of them, at their next check(); together.

        What else they have to agree on goes with it: of each number the highest comes back. Where
        a step takes as long as step_s, they ask each other within the next, too.
        """
        number, slowest_s, *highest = self._parallel.highest(self._wish, step_s or 0.0, *others)
        self._granted = int(number)
        if step_s is not None:
            self._asks_within_steps = self._parallel.is_alone or slowest_s > _LONG_S
        return highest

    @property
    def has_come(self) -> bool:
        """Whether a signal has come to this process."""
        return self._number is not None

    @property
    def _wish(self) -> int:
        return self._number or 0

    def check_within_step(self, started_at: float, done: float) -> None:
        """Raise Stopped where a signal has come and the rest of the step would take too long.

        started_at is the step's start by time.perf_counter(), done the share of it that is done.
        """
        if self._asks_within_steps:
            elapsed_s = time.perf_counter() - started_at
            is_long = elapsed_s / done * (1 - done) > _LONG_S
            if number := self._parallel.highest(self._wish * is_long)[0]:
                raise Stopped(int(number))

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number is None:
            self._number, self._noted_at = number, now
            with contextlib.suppress(RuntimeError):  # the signal came in the middle of a print
                complain("Stopping after this step; Ctrl-C again stops at once, without saving.")
        elif number == signal.SIGINT and now - self._noted_at > _ECHO_S:
            raise KeyboardInterrupt


def defer_to_owner(worker: int) -> None:
    """For a loader's worker processes: their owner ends them once it has saved, and says why.

    One that got SIGTERM ends by itself a while later: where the owner fails, Python sends that to
    its processes and then waits for them, however long they take. An owner that is gone before it
    has fetched a batch is no error of theirs.
    """
    for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):  # not on Windows, where SIGTERM can't be ignored
        # with status 0: another would interrupt an owner that is still saving
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, _LINGER_S))
    report = sys.excepthook  # which the thread that hands out batches calls, too

    def report_all_but_a_lost_owner(kind, error, trace) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            report(kind, error, trace)

    sys.excepthook = report_all_but_a_lost_owner
