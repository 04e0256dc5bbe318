"""What the programs around a finished run share: options, the run, text on a terminal, exits."""

import argparse
import dataclasses
import errno
import os
import re
import secrets
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from engine.console import complain, printable, report_failure, use_utf8
from engine.devices import find_device_fault
from engine.errors import PipelineError, ResourceError, SettingsError
from engine.processor import default_threads
from engine.settings import find_problems, raise_if_any, shown, unknown_name
from engine.weights import WEIGHTS
from exchange.saved_run import LoadedRun, load_run
from generation import SamplingConfig

HIGHEST_SEED = 2**32 - 1
_FIELDS = {field.name: field for field in dataclasses.fields(SamplingConfig)}
_MEANING = {
    "max_new_tokens": "tokens that are drawn at most",
    "temperature": "0 always takes the likeliest token; higher is bolder",
    "top_k": "draw from the k likeliest tokens",
    "top_p": "draw from the likeliest tokens that sum to this probability",
    "min_p": "leave out tokens below this share of the likeliest one's probability",
    "repetition_penalty": "above 1 makes tokens that have just come less likely",
    "repetition_window": "how many of the newest tokens the penalty is for",
}


# -------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags may have underscores, and whose errors are SettingsErrors."""

    def parse_args(self, args: list[str] | None = None, namespace: Any = None) -> Any:
        """The arguments; SettingsError for a flag that is unknown, with the nearest known one."""
        given = sys.argv[1:] if args is None else args
        given = [re.sub(r"^--\w+(?==|$)", lambda m: m[0].replace("_", "-"), a) for a in given]
        parsed, rest = self.parse_known_args(given, namespace)
        if rest:
            name = rest[0].partition("=")[0]
            if not name.startswith("-"):
                self.error(f"{shown(name)} is no option; text with blanks needs quotes around it")
            known = [flag for action in self._actions for flag in action.option_strings]
            self.error(unknown_name(name, name, known))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise SettingsError in place of an exit with the whole usage."""
        raise SettingsError(f"{message}\n{self.prog} --help lists the options.")


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose flags work with dashes and with underscores; abbreviations do not."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = getattr(spec, "name", "")
    return Parser(
        prog=f"python -m {name}" if name.startswith("scripts.") else None,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """--run, --which, --weights, --device and --compile: whose weights are used, and how."""
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--run", metavar="RUN", help="a run's folder, or its name in OUTPUT_DIR (newest finished)"
    )
    group.add_argument(
        "--which",
        choices=("best", "last"),
        default="best",
        help="the weights of the lowest validation loss, or the last ones (best)",
    )
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="what is read for a token; int8 is faster on CPUs, and a little less exact (auto)",
    )
    group.add_argument("--device", help='"cpu", "cuda", "cuda:1", "mps", "xpu" (the best there is)')
    group.add_argument(
        "--compile",
        action="store_true",
        help="on CUDA: for each number of texts the first token waits half a minute, the others "
        "come faster",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of SamplingConfig, None where it is not given, and --seed."""
    group = parser.add_argument_group("sampling (what is not given is as the run has it)")
    for name, field in _FIELDS.items():
        can_be_none = "None" in str(field.type)
        group.add_argument(
            _flag(name),
            metavar="N" if "int" in str(field.type) else "X",
            help=_MEANING[name] + ('; "none" for no limit' if can_be_none else ""),
        )
    group.add_argument("--seed", metavar="N", help="the same seed draws the same text (random)")


def add_stop_option(parser: argparse.ArgumentParser) -> None:
    """--stop, which may be repeated: a list of texts, empty where it is not given."""
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        type=_stop_text,
        default=[],
        help="end before this text; may be repeated",
    )


def sampling_of(arguments: argparse.Namespace, run: LoadedRun) -> dict[str, Any]:
    """All fields of SamplingConfig: those that were given, the run's own for the others.

    Raises SettingsError with every wrong value.
    """
    return dataclasses.asdict(run.sampling) | _given_sampling(arguments)


def seed_of(arguments: argparse.Namespace) -> int:
    """The seed that was given, or one drawn by the system; SettingsError for a wrong one."""
    if arguments.seed is None:
        return secrets.randbelow(HIGHEST_SEED + 1)
    raise_if_any(_seed_problems(arguments.seed), "the options")
    return int(arguments.seed)


def read_sampling(texts: dict[str, str]) -> dict[str, Any]:
    """Values of SamplingConfig from text, by name; SettingsError with every wrong name or value."""
    problems = [unknown_name(name, name, _FIELDS) for name in texts if name not in _FIELDS]
    known = {name: _value(name, text) for name, text in texts.items() if name in _FIELDS}
    raise_if_any(problems + find_problems(SamplingConfig, known), "the sampling settings")
    return known


def _given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in _FIELDS}
    given = {name: _value(name, text) for name, text in given.items() if text is not None}
    problems = find_problems(SamplingConfig, given, _flag) + _seed_problems(arguments.seed)
    raise_if_any(problems, "the options")
    return given


def _seed_problems(text: str | None) -> list[str]:
    is_right = text is None or (
        text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= HIGHEST_SEED
    )
    allowed = f"it must be a whole number from 0 to {HIGHEST_SEED}"
    return [] if is_right else [f"--seed is {shown(text)}; {allowed}"]


def _value(name: str, text: str) -> int | float | str | None:
    """What a text stands for; the text itself where it is no number, for the check to refuse."""
    if text.lower() == "none":
        return None
    kinds = (int, float) if "int" in str(_FIELDS[name].type) else (float,)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _stop_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; it must be some text")
    return whole(text)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# -------------------------------------------------------------------------------- the run


def load(arguments: argparse.Namespace) -> LoadedRun:
    """Load the run that the options name; wrong sampling options are told before the wait.

    Raises what load_run() raises, SettingsError for an option.
    """
    if hasattr(arguments, "seed"):
        _given_sampling(arguments)
    device = arguments.device
    if fault := find_device_fault(device):
        raise SettingsError(f"--device is {shown(device)}; it {fault}")
    run = load_run(
        arguments.run,
        which=arguments.which,
        weights=arguments.weights,
        device=device,
        compiled=arguments.compile,
    )
    threads = default_threads()
    if threads != torch.get_num_threads():  # setting it, even to what it is, costs a new pool
        torch.set_num_threads(threads)
    return run


def describe(run: LoadedRun) -> str:
    """One line: the run, the step of its weights, what they are and where."""
    return f"{run.path}, step {run.step}, {run.weights} weights on {run.device}"


# ------------------------------------------------------------------- text on a terminal


def whole(text: str) -> str:
    """A text from the command line or a console, U+FFFD in place of what was not UTF-8 in it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def write(text: str) -> None:
    """Write text to standard output now, without control characters.

    Raises BrokenPipeError where nobody reads it any more, ResourceError where it can't be kept.
    """
    if sys.stdout is None:  # closed before the program began
        raise BrokenPipeError
    try:
        sys.stdout.write(printable(text))
        sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.errno == errno.EINVAL:  # so on Windows
            raise BrokenPipeError from None
        reason = error.strerror or error
        raise ResourceError(f"can't write to standard output: {reason}.") from None


# ---------------------------------------------------------------------------------- exits


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a program and exit: with its code, or that of the failure, which is told in words.

    Ctrl-C ends with 130, a pipe that nobody reads any more quietly with 0. GPT_DEBUG=1 shows
    where a failure came from.
    """
    use_utf8()
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        code = 0
    except KeyboardInterrupt as interrupt:
        complain("Stopped.")
        code = getattr(interrupt, "exit_code", 130)
    except (PipelineError, MemoryError, RuntimeError) as error:
        code = report_failure(error, "Ask for less at a time, or try --weights int8.")
    finally:
        _drop_what_nobody_reads()
    sys.exit(code)


def _drop_what_nobody_reads() -> None:
    """Empty the buffers of closed pipes and full disks: Python would complain at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
