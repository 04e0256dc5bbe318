"""What the programs for finished runs share: options, the run, output, exit codes."""

import argparse
import contextlib
import dataclasses
import errno
import functools
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
from engine.settings import raise_if_any, shown, unknown_name
from engine.starting import raise_at_ctrl_c
from engine.weights import WEIGHTS
from exchange.opening import load_model
from exchange.saved_run import LoadedModel, load_run
from generation import SamplingConfig, find_sampling_problems
from storage.files import to_json

HIGHEST_SEED = 2**32 - 1
# tokens at most where neither an option nor a run says how many: of a text, and of an answer, which
# a chat model ends by itself
TEXT_TOKENS, ANSWER_TOKENS = 100, 1024
# valid in JSON, but a terminal obeys some of them, and some programs take others for a line end
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
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


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes underscores in flags, and raises SettingsError."""

    def parse_args(self, args: list[str] | None = None) -> Any:  # type: ignore[override]
        """The arguments; SettingsError for an unknown flag, with the most similar known one."""
        # mypy's complaint: no program needs the second argument of argparse's method
        given = sys.argv[1:] if args is None else args
        given = [re.sub(r"^--\w+(?==|$)", lambda m: m[0].replace("_", "-"), a) for a in given]
        parsed, rest = self.parse_known_args(given)
        if rest:
            name = rest[0].partition("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            if not name.startswith("-"):
                hint = "text with blanks needs quotes around it"
                if "--prompt" in known and "--prompt" not in given:
                    hint = f'to go on from it give --prompt "{" ".join(rest)}"'
                self.error(f"{shown(name)} is no option; {hint}")
            self.error(unknown_name(name, name, known))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise SettingsError, where argparse prints the usage and exits."""
        raise SettingsError(f"{message}\n{self.prog} --help lists the options.")


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A Parser for `python -m scripts.NAME`, without abbreviated flags."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = getattr(spec, "name", "")
    return Parser(
        prog=f"python -m {name}" if name.startswith("scripts.") else None,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


@dataclasses.dataclass(frozen=True)
class Named:
    """A model as the options name it: by --run or --model."""

    option: str  # "run" or "model"
    where: str | None = None  # None: the run that finished last


def add_model_options(group: argparse._ActionsContainer) -> None:
    """Add --run, --model and --which, which models_of() and open_model() read."""
    for option, meaning in (
        ("run", "a run's folder, or its name in OUTPUT_DIR (newest finished)"),
        (
            "model",
            "in place of a run: whatever INIT_FROM takes, such as a folder, a .gguf file, "
            '"hf:owner/name" or "smollm2-135m"',
        ),
    ):
        group.add_argument(
            f"--{option}",
            metavar=option.upper(),
            dest="models",
            action="append",
            type=functools.partial(Named, option),
            help=meaning,
        )
    group.add_argument(
        "--which",
        choices=("best", "last"),
        help="a run's weights of the lowest validation loss, or its last ones (best)",
    )


def add_device_option(group: argparse._ActionsContainer) -> None:
    """Add --device, which models_of() checks and open_model() reads."""
    group.add_argument("--device", help='"cpu", "cuda", "cuda:1", "mps", "xpu" (the best there is)')


def add_runs_argument(parser: argparse.ArgumentParser, if_none: str) -> None:
    """Add RUN ..., a list for find_run(); if_none says which runs serve without any."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        help=f"a run's folder, or its name in OUTPUT_DIR ({if_none})",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what load() takes: the options of a model, --weights and --compile."""
    group = parser.add_argument_group("the model")
    add_model_options(group)
    add_device_option(group)
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="what is read for a token; int8 is faster on CPUs, and a little less exact (auto)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="on CUDA: for each number of texts the first token waits half a minute, the others "
        "come faster",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of SamplingConfig, and --seed; None if not given."""
    group = parser.add_argument_group("sampling (what is not given is as the run has it)")
    for name, field in _FIELDS.items():
        can_be_none = "None" in str(field.type) and name != "max_new_tokens"
        group.add_argument(
            flag_of(name),
            metavar="N" if "int" in str(field.type) else "X",
            help=_MEANING[name] + ('; "none" for no limit' if can_be_none else ""),
        )
    group.add_argument("--seed", metavar="N", help="the same seed draws the same text (random)")


def add_stop_option(parser: argparse._ActionsContainer) -> None:
    """Add --stop, which may be repeated: a list of texts, empty if not given."""
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        type=_stop_text,
        default=[],
        help="end before this text; may be repeated",
    )


def sampling_of(arguments: argparse.Namespace, run: LoadedModel) -> dict[str, Any]:
    """All fields of SamplingConfig, from the options or the run; SettingsError for problems."""
    sampling = dataclasses.asdict(run.sampling)
    if sampling["max_new_tokens"] is None:  # a model from elsewhere
        sampling["max_new_tokens"] = TEXT_TOKENS
    sampling |= _given_sampling(arguments)
    raise_if_any(find_sampling_problems(sampling), "the run's settings.json")
    return sampling


def answer_length_of(arguments: argparse.Namespace, run: LoadedModel) -> int:
    """The max_new_tokens of a chat model's answer: of the options or the run where they set it.

    A run works out what is not set so that its samples are short, which would cut answers off.
    """
    in_run = run.settings.get("settings", {}).get("sampling_params", {}).get("max_new_tokens")
    is_open = arguments.max_new_tokens is None and in_run is None
    return ANSWER_TOKENS if is_open else sampling_of(arguments, run)["max_new_tokens"]


def seed_of(arguments: argparse.Namespace) -> int:
    """The seed of the options, or a random one; SettingsError if it is invalid."""
    if arguments.seed is None:
        return secrets.randbelow(HIGHEST_SEED + 1)
    raise_if_any(_seed_problems(arguments.seed), "the options")
    return int(arguments.seed)


def read_sampling(texts: dict[str, str]) -> dict[str, Any]:
    """Fields of SamplingConfig parsed from texts; SettingsError for wrong names and values."""
    problems = [unknown_name(name, name, _FIELDS) for name in texts if name not in _FIELDS]
    known = {name: _value(name, text) for name, text in texts.items() if name in _FIELDS}
    raise_if_any(problems + find_sampling_problems(known), "the sampling settings")
    return known


def _given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    texts = {name: getattr(arguments, name) for name in _FIELDS}
    given = {name: _value(name, text) for name, text in texts.items() if text is not None}
    problems = find_sampling_problems(given, flag_of) + _seed_problems(arguments.seed)
    raise_if_any(problems, "the options")
    return given


def _seed_problems(text: str | None) -> list[str]:
    is_right = text is None or (
        text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= HIGHEST_SEED
    )
    allowed = f"it must be a whole number from 0 to {HIGHEST_SEED}"
    return [] if is_right else [f"--seed is {shown(text)}; {allowed}"]


def _value(name: str, text: str) -> int | float | str | None:
    """A text as a number or None; the text itself if it is neither, for the check to refuse."""
    if text.lower() == "none":
        return None
    for kind in (int, float) if "int" in str(_FIELDS[name].type) else (float,):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _stop_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; it must be some text")
    return whole(text)


def flag_of(name: str) -> str:
    """The flag of an option's name."""
    return "--" + name.replace("_", "-")


def models_of(arguments: argparse.Namespace) -> list[Named]:
    """The models that the options name, the newest finished run where none is.

    Raises SettingsError for a wrong --device, and for --which without a run.
    """
    named = arguments.models or [Named("run")]
    if fault := find_device_fault(arguments.device):
        raise SettingsError(f"--device is {shown(arguments.device)}; it {fault}")
    if arguments.which and all(model.option != "run" for model in named):
        raise SettingsError("--which is for runs; leave it out with --model.")
    return named


def open_model(
    named: Named, arguments: argparse.Namespace, *, weights: str, compiled: bool = False
) -> LoadedModel:
    """Load a model of models_of(). Raises what load_run() and load_model() raise."""
    options = {"weights": weights, "device": arguments.device, "compiled": compiled}
    if named.option == "run":
        model = load_run(named.where, which=arguments.which or "best", **options)
    else:
        assert named.where is not None, "only the newest run has no name"
        model = load_model(named.where, **options)
    threads = default_threads()
    if threads != torch.get_num_threads():  # setting it, even to the same, makes a new thread pool
        torch.set_num_threads(threads)
    return model


def one_model(arguments: argparse.Namespace) -> Named:
    """The one model of models_of(); SettingsError where --run and --model name two."""
    named = models_of(arguments)
    if len({model.option for model in named}) > 1:
        raise SettingsError("--run and --model name a model each; leave one of them out.")
    return named[-1]


def load(arguments: argparse.Namespace) -> LoadedModel:
    """Load the model that the options name, after a check of the sampling options.

    Raises what open_model() raises, SettingsError for an option.
    """
    _given_sampling(arguments)
    named = one_model(arguments)
    return open_model(named, arguments, weights=arguments.weights, compiled=arguments.compile)


def describe(run: LoadedModel) -> str:
    """One line: the model, the format of its weights, and the device."""
    measured = "" if run.why_weights is None else f" ({run.why_weights})"
    return f"{run.source}, {run.weights} weights on {run.device}{measured}"


def whole(text: str) -> str:
    """A text from the command line or a terminal, with U+FFFD for bytes that were not UTF-8."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def to_json_line(value: dict[str, Any]) -> str:
    """A dict as one line of JSON that a terminal can show safely."""
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", to_json(value)) + "\n"


def write(text: str) -> None:
    """Write text to standard output without control characters, and flush.

    Raises BrokenPipeError if the reader has gone, ResourceError for another failure.
    """
    if sys.stdout is None:  # closed before the program started
        raise BrokenPipeError
    try:
        sys.stdout.write(printable(text))
        sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.errno == errno.EINVAL:  # so on Windows
            raise BrokenPipeError from None
        reason = error.strerror or error
        raise ResourceError(f"can't write to standard output: {reason}.") from None


def run_program(
    main: Callable[[], int],
    memory_advice: str = "Ask for less at a time, or try --weights int8.",
) -> NoReturn:
    """Run a program and exit with its code, or print its error and exit with that of the error.

    memory_advice says what to do when memory ran out. The code for Ctrl-C is 130, and 0 for a
    broken pipe. GPT_DEBUG=1 shows tracebacks.
    """
    raise_at_ctrl_c()
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
        code = report_failure(error, memory_advice)
    finally:
        _flush_or_discard()
    sys.exit(code)


def _flush_or_discard() -> None:
    """Flush the output; discard it if that fails, else Python would report it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
