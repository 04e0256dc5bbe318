"""Compare runs:  python -m scripts.compare runs/one runs/two

Says which run is better, and whether the difference is more than noise; what differs in their
settings; and what each has at equal time, at equal tokens and at its end. Draws comparison.png.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from engine.starting import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

from engine.console import count_off, tell
from engine.devices import find_device_fault
from engine.errors import SettingsError
from engine.settings import shown
from exchange.saved_run import find_run, runs_folder
from insight.compare import Comparison, compare, read_compared
from insight.comparison_page import (
    as_page,
    as_text,
    draw,
    how_judged,
    settings_table,
    standings_table,
    verdict_of,
)
from planning.runs import finished_runs
from scripts.options import (
    add_device_option,
    add_runs_argument,
    new_parser,
    run_program,
    write,
)
from storage.files import write_atomically

MOST_RUNS = 8  # without names
MOST_BYTES = 1_000_000  # of validation text, unless --bytes sets others
LEAST_BYTES = 10_000
T = TypeVar("T")


def main() -> int:
    """Read the options, compare the runs, and write table, picture and page; returns 0."""
    arguments = _parser().parse_args()
    if fault := find_device_fault(arguments.device):
        raise SettingsError(f"--device is {shown(arguments.device)}; it {fault}")
    if arguments.bytes < LEAST_BYTES:
        raise SettingsError(f"--bytes is {arguments.bytes}; it must be {LEAST_BYTES:,} or more")
    runs = [read_compared(path) for path in _paths(arguments.runs)]

    def progress(items: Sequence[T]) -> Iterator[T]:
        return count_off(items, len(items), "Scoring")

    comparison = compare(
        runs, device=arguments.device, most_bytes=arguments.bytes, progress=progress
    )
    png = draw(comparison)
    _write_text(comparison)
    if png is None:
        tell("Note: matplotlib is not installed: no picture (pip install matplotlib)")
    else:
        write_atomically(arguments.png, png)
        tell(f"✓ Saved the curves to {arguments.png}")
    if arguments.html is not None:
        write_atomically(arguments.html, as_page(comparison, png).encode("utf-8", "replace"))
        tell(f"✓ Saved the page to {arguments.html}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_runs_argument(parser, f"the newest finished ones, up to {MOST_RUNS}")
    parser.add_argument(
        "--bytes",
        metavar="N",
        type=int,
        default=MOST_BYTES,
        help=f"bytes of the validation text that each is scored on at most ({MOST_BYTES:,})",
    )
    parser.add_argument(
        "--png", metavar="FILE", default="comparison.png", help="the picture (comparison.png)"
    )
    parser.add_argument("--html", metavar="FILE", help="also write all of it as one page")
    add_device_option(parser)
    return parser


def _paths(named: list[str]) -> list[Path]:
    """The folders of the runs, each once; SettingsError for less than two."""
    found = [find_run(name) for name in named] or finished_runs(runs_folder())[:MOST_RUNS]
    paths = list({path.resolve(): path for path in found}.values())
    if len(paths) < 2:
        given = f"{paths[0]} alone" if paths else "no run"
        raise SettingsError(
            f"there is {given} to compare; it takes two or more.\n"
            "Name them: python -m scripts.compare runs/one runs/two"
        )
    return paths


def _write_text(comparison: Comparison) -> None:
    write(f"{verdict_of(comparison).en}\n\n{as_text(standings_table(comparison))}")
    if (judged := how_judged(comparison)) is not None:
        write(f"\n{judged.en}\n")
    settings = settings_table(comparison)
    write("\nTheir settings are the same.\n" if not settings else f"\n{as_text(settings)}")


if __name__ == "__main__":
    run_program(main, "Set a smaller --bytes.")
