"""How lines and progress bars reach the screen, whatever the console can show."""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from engine.errors import PipelineError, ResourceError, first_line

# all but newline and tab, which a terminal may take for orders, and what turns the direction of
# writing
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_is_silent = False
LINE_EVERY_S = 2.0  # how often a notebook's page, which keeps all lines, gets one on progress
_next_report_at = 0.0  # by time.monotonic()


def printable(text: str) -> str:
    """A text without control characters but newline and tab, which no terminal obeys then."""
    return _CONTROL.sub("", text)


def in_kernel() -> bool:
    """Whether this process is a notebook's kernel: of Jupyter, Colab, Kaggle or an editor."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython.get_ipython() if hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


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
    if _bars_move() and not _is_silent:
        _tqdm().write(line, file=sys.stdout)
    else:
        _print(line, "stdout")


def report(*lines: str, keep: bool = False) -> bool:
    """Print lines on a run's progress; returns whether they were printed.

    A notebook gets one every LINE_EVERY_S on average: lines that come earlier are left out, unless
    `keep`. Everywhere else all are printed.
    """
    global _next_report_at
    if in_kernel():
        now = time.monotonic()
        if now < _next_report_at and not keep:
            return False
        _next_report_at = max(now, _next_report_at) + LINE_EVERY_S * len(lines)
    for line in lines:
        say(line)
    return True


def show_picture(path: Path) -> None:
    """Show a PNG in the cell of a notebook that runs; elsewhere do nothing."""
    if in_kernel() and not _is_silent and path.is_file():
        from IPython.display import Image, display

        display(Image(data=path.read_bytes()))


def complain(message: str) -> None:
    """Print a message of failure to standard error, below whatever bar is drawn there."""
    _print(f"\n{_for_console(message, sys.stderr)}", "stderr")


def report_failure(
    error: Exception,
    memory_advice: str,
    *,
    kept: str = "",
    prefix: str = "",
    is_told: Callable[[str], bool] = lambda message: True,
) -> int:
    """Say what went wrong; returns the exit code. To be called where the error is being handled.

    The error being handled goes on where nobody expected it, and with GPT_DEBUG=1. memory_advice
    says what to do when memory ran out, kept what is left of the work; is_told decides by the
    message whether this process says it.
    """
    from engine.memory import is_out_of_memory  # imports torch, which storage/ does without

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
    """Print a line to standard error, beside a result that standard output is for."""
    _print(_for_console(line, sys.stderr), "stderr")


def track(steps: Iterable, total: int, label: str, done: int = 0) -> Iterator:
    """Yield from steps and show "label: 100%|...| total/total" on standard error.

    done is how many of the total were done before. On a terminal the bar moves; elsewhere (a log
    file) it is drawn once, when the loop is left. Without tqdm the line is "label: done/total".
    In a notebook RunBar stands for the bars of all epochs.
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


class RunBar:
    """A notebook's bar for all steps of a run, with the time left; elsewhere nothing is drawn.

    It is a widget where ipywidgets is installed, else text. One for each epoch would fill the page.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar = None

    def show(self, done: int) -> None:
        """Draw that so many steps are done; the first call draws the bar."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif in_kernel() and not _is_silent and _tqdm() is not None:
            self._bar = _tqdm()(
                total=self._total,
                initial=done,
                desc="Steps",
                file=sys.stdout,  # as the lines: another stream would be another block of output
                dynamic_ncols=True,
                mininterval=LINE_EVERY_S,
                miniters=1,
            )

    def close(self) -> None:
        """Leave the bar as it is; a widget turns red where steps are missing."""
        if self._bar is not None:
            self._bar.close()


class ByteProgress:
    """A bar of bytes done, on a terminal's standard error or in a notebook, once work takes more
    than a second.

    Use it as `with ByteProgress("Reading", total) as progress: progress.show(done)`.
    """

    def __init__(self, label: str, total: int) -> None:
        self._bar = None
        if _bars_move() and not _is_silent:
            self._bar = _tqdm()(
                total=total,
                desc=label,
                file=sys.stdout if in_kernel() else sys.stderr,
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


def _bars_move() -> bool:
    """Whether a bar can move: tqdm is there, and somebody watches."""
    has_terminal = sys.stderr is not None and sys.stderr.isatty()
    return (has_terminal or in_kernel()) and _tqdm() is not None


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
        if not in_kernel():
            from tqdm import tqdm

            return tqdm
        from tqdm import TqdmWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets the bar is text
            from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm
