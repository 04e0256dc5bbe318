"""How lines and progress bars reach the screen, whatever the console can show."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

# all but newline and tab, which a terminal may take for orders, and what turns the direction of
# writing
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_is_silent = False


def printable(text: str) -> str:
    """A text without control characters but newline and tab, which no terminal obeys then."""
    return _CONTROL.sub("", text)


def use_utf8() -> None:
    """Switch standard output and error to UTF-8, so that a ✓ never crashes a console."""
    for stream in (sys.stdout, sys.stderr):  # None where a program has no console at all
        if hasattr(stream, "reconfigure"):  # a stream that a caller put in place may lack it
            stream.reconfigure(encoding="utf-8", errors="replace")


def silence(is_silent: bool) -> None:
    """Let this process print nothing from now on, or print again: of several ranks one speaks."""
    global _is_silent
    _is_silent = is_silent


def say(line: str = "") -> None:
    """Print a line to standard output, above a progress bar where one is drawn.

    Control characters are left out, and characters that the console has no code for are shown as
    "?": a library's caller may have any encoding.
    """
    line = _for_console(line, sys.stdout)
    if _has_terminal() and not _is_silent:
        _tqdm().write(line, file=sys.stdout)
    else:
        _print(line, "stdout")


def complain(message: str) -> None:
    """Print a message of failure to standard error, below whatever bar is drawn there."""
    _print(f"\n{_for_console(message, sys.stderr)}", "stderr")


def tell(line: str) -> None:
    """Print a line to standard error, beside a result that standard output is for."""
    _print(_for_console(line, sys.stderr), "stderr")


def track(steps: Iterable, total: int, label: str, done: int = 0) -> Iterator:
    """Yield from steps and show "label: 100%|...| total/total" on standard error.

    done is how many of the total were done before. On a terminal the bar moves; elsewhere (a log
    file) it is drawn once, when the loop is left. Without tqdm the line is "label: done/total".
    """
    if _is_silent:
        yield from steps
        return
    if _has_terminal():
        with _tqdm()(total=total, initial=done, desc=label, dynamic_ncols=True) as bar:
            for item in steps:
                yield item
                bar.update()
        return
    try:
        for item in steps:
            yield item
            done += 1
    finally:
        if _tqdm() is not None:
            bar = _tqdm().format_meter(
                done,
                total,
                elapsed=0,
                ascii=not _encoding(sys.stderr).lower().startswith("utf"),  # blocks become "#"
                prefix=label,
                bar_format=_PLAIN_BAR,
            )
        else:
            bar = f"{label}: {done}/{total}"
        _print(bar, "stderr")


class ByteProgress:
    """A bar of bytes done on a terminal's standard error, once work takes more than a second.

    Use it as `with ByteProgress("Reading", total) as progress: progress.show(done)`.
    """

    def __init__(self, label: str, total: int) -> None:
        self._bar = None
        if _has_terminal() and not _is_silent:
            self._bar = _tqdm()(
                total=total,
                desc=label,
                unit="B",
                unit_scale=True,
                delay=1.0,
                leave=False,
            )

    def show(self, done: int) -> None:
        """Draw that so many bytes in all are done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def __enter__(self) -> "ByteProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


_PLAIN_BAR = "{l_bar}{bar:30}| {n_fmt}/{total_fmt}"


def _has_terminal() -> bool:
    """Whether a bar can move: tqdm is there, and somebody watches."""
    return _tqdm() is not None and sys.stderr is not None and sys.stderr.isatty()


def _print(line: str, name: str) -> None:
    """Print to sys.stdout or sys.stderr; one that nobody reads any more must not end a run."""
    stream = getattr(sys, name)
    if stream is None or _is_silent:  # print() would take standard output for None
        return
    try:
        print(line, file=stream, flush=True)
    except OSError:  # a closed pipe (| head), a full disk
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _encoding(stream: TextIO | None) -> str:
    """The encoding of a stream; one that a caller put in place may have none."""
    return getattr(stream, "encoding", None) or "utf-8"


def _for_console(text: str, stream: TextIO | None) -> str:
    """What of a text a stream can show."""
    encoding = _encoding(stream)
    return printable(text).encode(encoding, errors="replace").decode(encoding)


def _tqdm():
    """The tqdm class, or None where the package is missing: a bar is no reason to stop."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
