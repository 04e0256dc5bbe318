"""Ctrl-C while a program imports its libraries, which may swallow a KeyboardInterrupt."""

import contextlib
import os
import signal


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


def _end(*_: object) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, b"Stopped.\n")
    os._exit(130)
