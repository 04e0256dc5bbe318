"""Ctrl-C while a program imports its libraries and prepares: a KeyboardInterrupt may get lost.

Libraries catch one as they import each other, and Python drops one that comes in a finalizer, of
which compilers have many.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

AGAIN_S = 1.0  # after which an interrupt that got lost is raised again


def end_at_ctrl_c() -> None:
    """Let Ctrl-C end this process at once with exit code 130, until raise_at_ctrl_c().

    An ignored SIGINT, as of a shell's background job, stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_at_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def insisting_on_ctrl_c() -> Iterator[None]:
    """Raise the KeyboardInterrupt of a Ctrl-C again where it got lost, until the block is left.

    Neither Python nor torch tells of where that was. Does nothing in other threads than the main
    one, or where SIGINT has a handler of its own.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or handler is not signal.default_int_handler:
        yield
        return
    is_left, main, hook = threading.Event(), threading.get_ident(), sys.unraisablehook

    def watch() -> None:
        while not is_left.wait(AGAIN_S):
            if not _is_interrupted(main):
                if hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(main, signal.SIGINT)  # which ends waiting, too
                else:
                    _thread.interrupt_main()

    watcher = threading.Thread(target=watch, daemon=True)

    def tell_of_lost(lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            hook(lost)

    def interrupt(*_: object) -> None:
        warnings.filterwarnings("ignore", "Error detected in")  # torch's, of a backward pass
        if watcher.ident is None:  # one alone: a second would interrupt what comes after the block
            watcher.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = tell_of_lost
    try:
        with warnings.catch_warnings():
            yield
    finally:
        is_left.set()
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = hook


def _is_interrupted(thread: int) -> bool:
    """Whether a thread is leaving its functions because of a KeyboardInterrupt."""
    error: Any = sys._current_exceptions().get(thread)
    if isinstance(error, tuple):  # before Python 3.12
        error = error[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _end(*_: object) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, b"Stopped.\n")
    os._exit(130)
