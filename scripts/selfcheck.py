"""Check that this machine computes what it should:  python -m scripts.selfcheck

Nine checks on tiny models with random weights, in less than a minute: the numbers against plain
arithmetic, what must not be seen, what must be the same in two ways, a run that is really killed,
and the speed. Nothing of yours is read, written or sent. The exit code is 1 if a check fails.
"""

import argparse
import platform
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.starting import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

import torch

from engine.devices import device_name, find_device_fault
from engine.errors import SettingsError, first_line
from engine.precision import PRECISIONS, choose_precision
from engine.processor import default_threads, prepare_processor, using_threads
from engine.settings import shown
from planning.machine import pick_device
from scripts.checks import CHECKS, REPOSITORY, Bench, Failed
from scripts.options import add_device_option, new_parser, run_program, to_json_line, write

MOST_SAID = 300  # characters of what a check says
# the folders of a path, at a place that is none of those that have a name
ELSEWHERE = re.compile(r"""(?<![\w>.:/\\])(?:[A-Za-z]:)?[\\/]+(?:[^\s"'\\/]+[\\/]+)+""")


@dataclass(frozen=True)
class Outcome:
    """What came of a check."""

    check: str
    passed: bool
    said: str
    seconds: float


def main() -> int:
    """Read the options, make the checks and print a line for each; returns 1 if one fails."""
    arguments = _parser().parse_args()
    if fault := find_device_fault(arguments.device):
        raise SettingsError(f"--device is {shown(arguments.device)}; it {fault}")
    prepare_processor()
    device = pick_device(arguments.device)
    bench = Bench(device, choose_precision(arguments.precision, device))
    names = arguments.only or list(CHECKS)
    machine = about_machine(bench)
    if not arguments.json:
        write(" · ".join(f"{name} {value}" for name, value in machine.items() if value) + "\n")
    outcomes = []
    with using_threads(1):  # over tensors as small as these threads only wait for each other
        for name in names:
            outcome = outcome_of(name, bench)
            outcomes.append(outcome)
            if not arguments.json:
                sign = "✓" if outcome.passed else "✗"
                write(f"{sign} {name:<16} {outcome.said} ({outcome.seconds:.1f} s)\n")
    failed = [outcome.check for outcome in outcomes if not outcome.passed]
    if arguments.json:
        checks = [asdict(outcome) for outcome in outcomes]
        write(to_json_line({"passed": not failed, "machine": machine, "checks": checks}))
    elif failed:
        write(
            f"{len(failed)} of {len(names)} checks failed: {', '.join(failed)}.\n"
            "For a report of the fault, add what  python -m scripts.selfcheck --json  prints.\n"
        )
    else:
        write(f"All {len(names)} checks passed.\n")
    return 1 if failed else 0


def outcome_of(name: str, bench: Bench) -> Outcome:
    """Make a check; an error that it does not expect is a failure too."""
    started_at = time.perf_counter()
    try:
        passed, said = True, CHECKS[name](bench)
    except Failed as failed:
        passed, said = False, str(failed)
    except Exception as error:  # a library's, of any type
        passed, said = False, f"{type(error).__name__}: {first_line(error)}"
    said = without_paths(said)[:MOST_SAID]
    return Outcome(name, passed, said, round(time.perf_counter() - started_at, 2))


def without_paths(text: str) -> str:
    """A text in which the folders of this machine have names that tell nothing of its user."""
    folders = {
        "repository": REPOSITORY,
        "python": Path(sys.prefix),
        "base python": Path(sys.base_prefix),
        "temporary": Path(tempfile.gettempdir()),
        "home": Path("~").expanduser(),  # stays as it is where there is none
    }
    found: dict[str, str] = {}
    for name, folder in folders.items():
        for path in {folder, folder.resolve()} if len(folder.parts) > 1 else ():
            # as in a message, within a repr(), and with slashes on Windows
            found |= dict.fromkeys((str(path), repr(str(path))[1:-1], path.as_posix()), name)
    for spelling in sorted(found, key=len, reverse=True):
        text = text.replace(spelling, f"<{found[spelling]}>")
    return ELSEWHERE.sub("<elsewhere>", text)


def about_machine(bench: Bench) -> dict[str, str | None]:
    """What a report of a fault must say of the machine; no name and no path of the user's."""
    return {
        "device": str(bench.device),
        "GPU": device_name(bench.device),
        "precision": f"{bench.precision.name} ({bench.precision.reason})",
        "threads": str(default_threads()),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_device_option(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="the precision of the matrix products (the fastest here)",
    )
    parser.add_argument(
        "--only",
        metavar="CHECK",
        choices=list(CHECKS),
        action="append",
        help=f"only this check, may be repeated: {', '.join(CHECKS)}",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, for a report of a fault"
    )
    return parser


if __name__ == "__main__":
    run_program(main)
