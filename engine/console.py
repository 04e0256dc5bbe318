"""Lines and progress bars on a terminal, in a log file or in a notebook."""

import contextlib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from engine.errors import PipelineError, ResourceError, first_line, is_out_of_memory

T = TypeVar("T")

# control characters but newline and tab, and those that change the direction of writing
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_is_silent = False
LINE_EVERY_S = 2.0  # between progress lines in a notebook, whose page keeps them all
# and elsewhere, where so many more come at once, so that a short run prints all of its own
TERMINAL_LINE_EVERY_S, SPARE_LINES = 15.0, 4
_next_report_at = 0.0  # by time.monotonic()
_PLAIN_BAR = "{l_bar}{bar:30}| {n_fmt}/{total_fmt}"


def printable(text: str) -> str:
    """A text without the control characters that a terminal obeys; newline and tab stay."""
    return _CONTROL.sub("", text)


def in_kernel() -> bool:
    """Whether this process is a notebook's kernel: of Jupyter, Colab, Kaggle or an editor."""
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)  # a kernel imports it
    return get_shell is not None and getattr(get_shell(), "kernel", None) is not None


def use_utf8() -> None:
    """Switch standard output and error to UTF-8, so that a ✓ never crashes a console."""
    for stream in (sys.stdout, sys.stderr):  # None without a console; a caller's may lack it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def silence(is_silent: bool) -> None:
    """Turn this process's output off or on: only one rank of several prints."""
    global _is_silent
    _is_silent = is_silent


def say(line: str = "") -> None:
    """Print a line to standard output, above a progress bar where one is drawn."""
    above = contextlib.nullcontext()
    if _bars_move() and not _is_silent:
        above = _tqdm().external_write_mode(file=sys.stdout)
    with above:
        _print(line, "stdout")


def report(*lines: str, keep: bool = False, asked: bool = False) -> bool:
    """Print lines on a run's progress; returns whether they were printed.

    Drops those that come too fast, unless `keep`: in a notebook within LINE_EVERY_S of the last
    one, elsewhere faster than one each TERMINAL_LINE_EVERY_S, after the first SPARE_LINES. Only a
    notebook drops lines that a setting asked for.
    """
    if (in_kernel() or not asked) and not _has_room(len(lines), keep):
        return False
    for line in lines:
        say(line)
    return True


def begin_report() -> None:
    """Begin a run's progress: lines of an earlier run in this process don't count."""
    global _next_report_at
    _next_report_at = 0.0


def _has_room(n_lines: int, keep: bool) -> bool:
    """Whether lines come slowly enough, or are kept; counts them if so."""
    global _next_report_at
    every_s, spare = (LINE_EVERY_S, 0) if in_kernel() else (TERMINAL_LINE_EVERY_S, SPARE_LINES)
    now = time.monotonic()
    if now + spare * every_s < _next_report_at and not keep:
        return False
    _next_report_at = max(now, _next_report_at) + every_s * n_lines
    return True


def show_picture(path: Path) -> None:
    """Show a PNG in a notebook's running cell; elsewhere do nothing."""
    if in_kernel() and not _is_silent and path.is_file():
        from IPython.display import Image, display

        display(Image(data=path.read_bytes()))


def complain(message: str) -> None:
    """Print an error message to standard error, below the bar that is drawn there."""
    _print(f"\n{message}", "stderr")


def report_failure(
    error: Exception,
    memory_advice: str,
    *,
    kept: str = "",
    prefix: str = "",
    is_told: Callable[[str], bool] = lambda message: True,
) -> int:
    """Print an expected error and return its exit code; call it in the except block.

    Reraises an unexpected error, and every error with GPT_DEBUG=1. memory_advice says what to do
    when memory ran out, kept what is saved; is_told(message) is whether this process prints it.
    """
    if os.environ.get("GPT_DEBUG") == "1":
        raise
    if is_out_of_memory(error):
        error = ResourceError(f"out of memory: {first_line(error)[:100]}\n{memory_advice}")
    if not isinstance(error, PipelineError):
        raise
    if is_told(str(error)):
        complain(f"{prefix}{type(error).__name__}: {error}{kept}")
    return error.exit_code


def tell(line: str) -> None:
    """Print a line to standard error, where standard output is for a result."""
    _print(line, "stderr")


def track(steps: Iterable, total: int, label: str, done: int = 0) -> Iterator:
    """Yield from steps and show "label: 100%|...| total/total" on standard error.

    done is how many were done before. On a terminal the bar moves; in a log file it is drawn once,
    at the end, unless lines come too fast. Without tqdm it is "label: done/total". A notebook shows
    a RunBar instead.
    """
    if _is_silent or in_kernel():
        yield from steps
        return
    if _bars_move():
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
        if _has_room(1, keep=done < total):
            _print(_plain_bar(done, total, label), "stderr")


def _plain_bar(done: int, total: int, label: str) -> str:
    """A bar as a line of a log file."""
    if _tqdm() is None:
        return f"{label}: {done}/{total}"
    return _tqdm().format_meter(
        done,
        total,
        elapsed=0,
        ascii=not _encoding(sys.stderr).lower().startswith("utf"),  # blocks become "#"
        prefix=label,
        bar_format=_PLAIN_BAR,
    )


class _Bar(contextlib.AbstractContextManager):
    """A bar of tqdm's, or none; leaving the context closes it."""

    _bar: Any = None

    def show(self, done: int) -> None:
        """Draw the bar with `done` of its total done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is; a notebook's widget turns red if some is missing."""
        if self._bar is not None:
            self._bar.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class RunBar(_Bar):
    """A notebook's bar for all steps of a run, with the time left; nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total

    def show(self, done: int) -> None:
        """Draw the bar with `done` steps done; the first call creates it."""
        if self._bar is None and in_kernel() and not _is_silent and _tqdm() is not None:
            self._bar = _tqdm()(
                total=self._total,
                initial=done,
                desc="Steps",
                file=sys.stdout,  # the lines' stream: another one would be a second output block
                dynamic_ncols=True,
                mininterval=LINE_EVERY_S,
                miniters=1,
            )
        super().show(done)

    def change_total(self, total: int) -> None:
        """Go on with another number of steps."""
        self._total = total
        if self._bar is not None:
            done = self._bar.n
            self._bar.reset(total)  # a notebook's widget takes its length from nothing else
            self._bar.initial = done
            self._bar.update(done)


class Progress(_Bar):
    """A bar on a terminal or in a notebook, of bytes, drawn when the work takes over a second."""

    def __init__(self, label: str, total: int, unit: str = "B") -> None:
        if _bars_move() and not _is_silent:
            self._bar = _tqdm()(
                total=total,
                desc=label,
                file=sys.stdout if in_kernel() else sys.stderr,
                unit=unit,
                unit_scale=True,
                delay=1.0,
                leave=False,
            )


def count_off(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield from items, with a Progress of them."""
    with Progress(label, total, unit=" batches") as progress:
        for done, item in enumerate(items, start=1):
            yield item
            progress.show(done)


def _bars_move() -> bool:
    """Whether a bar can move: tqdm is installed, and the output is a terminal or a notebook."""
    has_terminal = sys.stderr is not None and sys.stderr.isatty()
    return (has_terminal or in_kernel()) and _tqdm() is not None


def _print(line: str, name: str) -> None:
    """Print to sys.stdout or sys.stderr; a closed stream must not end a run."""
    stream = getattr(sys, name)
    if stream is None or _is_silent:  # print(file=None) would print to standard output
        return
    try:
        print(_for_console(line, stream), file=stream, flush=True)
    except OSError:  # a closed pipe (| head), a full disk
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _encoding(stream: TextIO | None) -> str:
    """The encoding of a stream; a caller's own may have none."""
    return getattr(stream, "encoding", None) or "utf-8"


def _for_console(text: str, stream: TextIO | None) -> str:
    """The text without control characters, and with "?" for what the stream can't encode."""
    encoding = _encoding(stream)
    return printable(text).encode(encoding, errors="replace").decode(encoding)


def _tqdm() -> Any:
    """The tqdm class, a notebook's or a terminal's; None where the package is missing."""
    try:
        if not in_kernel():
            from tqdm import tqdm
        else:
            from tqdm import TqdmWarning

            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets the bar is text
                from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm
