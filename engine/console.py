"""How lines and progress bars reach the screen, whatever the console can show."""

import sys
from collections.abc import Iterable, Iterator


def use_utf8() -> None:
    """Switch standard output and error to UTF-8, so that a ✓ never crashes a console."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream that a caller put in place may lack it
            stream.reconfigure(encoding="utf-8", errors="replace")


def say(line: str = "") -> None:
    """Print a line to standard output, above a progress bar where one is drawn.

    Characters that the console has no code for are shown as "?": a library's caller may have
    any encoding.
    """
    encoding = _encoding(sys.stdout)
    line = line.encode(encoding, errors="replace").decode(encoding)
    if _tqdm() is not None and sys.stderr.isatty():
        _tqdm().write(line, file=sys.stdout)
    else:
        print(line, flush=True)


def track(steps: Iterable, total: int, label: str) -> Iterator:
    """Yield from steps and show "label: 100%|...| total/total" on standard error.

    On a terminal the bar moves; elsewhere (a log file) it is drawn once, when the loop is left.
    Without tqdm the line is "label: done/total".
    """
    done = 0
    if _tqdm() is not None and sys.stderr.isatty():
        with _tqdm()(total=total, desc=label, dynamic_ncols=True) as bar:
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
        print(bar, file=sys.stderr, flush=True)


_PLAIN_BAR = "{l_bar}{bar:30}| {n_fmt}/{total_fmt}"


def _encoding(stream) -> str:
    """The encoding of a stream; one that a caller put in place may have none."""
    return getattr(stream, "encoding", None) or "utf-8"


def _tqdm():
    """The tqdm class, or None where the package is missing: a bar is no reason to stop."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
