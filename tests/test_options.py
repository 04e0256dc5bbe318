"""What the programs around a run share: how options are read, and how a program ends."""

import io
import os
import subprocess
import sys
from argparse import Namespace

import pytest

from engine.errors import (
    BusyError,
    CheckpointError,
    DataError,
    NumericsError,
    ResourceError,
    SettingsError,
    Stopped,
)
from scripts import options
from tests.conftest import REPOSITORY


def ending(main, capsys) -> tuple[int, str]:
    """The exit code of a program, and what it says on standard error."""
    with pytest.raises(SystemExit) as exit:
        options.run_program(main)
    return exit.value.code, capsys.readouterr().err


def failing(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("what"), 2),
        (DataError("what"), 3),
        (CheckpointError("what"), 4),
        (NumericsError("what"), 5),
        (ResourceError("what"), 6),
        (BusyError("what"), 7),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failure_is_told_in_words_and_ends_with_its_code(error, code, monkeypatch, capsys):
    monkeypatch.delenv("GPT_DEBUG", raising=False)
    assert ending(failing(error), capsys) == (code, f"\n{type(error).__name__}: what\n")
    monkeypatch.setenv("GPT_DEBUG", "1")
    with pytest.raises(type(error)):
        options.run_program(failing(error))


def test_a_failure_s_message_gives_a_terminal_no_orders(capsys):
    _, said = ending(failing(DataError("\x1b[31mfile\x07 line\n2")), capsys)
    assert said == "\nDataError: [31mfile line\n2\n"


def test_interrupts_end_with_their_codes(capsys):
    assert ending(failing(KeyboardInterrupt()), capsys) == (130, "\nStopped.\n")
    assert ending(failing(Stopped(15)), capsys)[0] == 143


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_lack_of_memory_is_one_of_resources(error, capsys):
    code, said = ending(failing(error), capsys)
    assert code == 6
    assert "out of memory" in said


def test_an_error_that_nobody_expected_keeps_its_traceback():
    for error in RuntimeError("odd"), KeyError("odd"):
        with pytest.raises(type(error), match="odd"):
            options.run_program(failing(error))


def test_a_program_ends_with_its_own_code(capsys):
    assert ending(lambda: 3, capsys) == (3, "")
    assert ending(failing(BrokenPipeError()), capsys) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_output_that_nobody_reads_makes_no_noise_at_the_end(closed):
    code = (
        "from engine.console import tell\n"
        "from scripts import options\n"
        "def main():\n"
        "    tell('beside')\n"
        "    print('a' * 100_000)\n"
        "    options.write('result')\n"
        "    return 0\n"
        "options.run_program(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    getattr(process, closed).close()
    open_pipe = process.stderr if closed == "stdout" else process.stdout
    shown = open_pipe.read().decode()
    assert process.wait(timeout=60) == 0
    assert shown.splitlines() == (["beside"] if closed == "stdout" else ["a" * 100_000, "result"])


def test_text_is_written_at_once_and_without_orders_to_a_terminal(monkeypatch):
    everything = "".join(map(chr, [*range(0x300), 0x200D, 0x6625, 0x1F600]))
    kept = [*range(0x20, 0x7F), *range(0xA0, 0x300), 0x200D, 0x6625, 0x1F600]
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8", newline=""))
    options.write(everything)
    assert raw.getvalue().decode() == "\t\n" + "".join(map(chr, kept))


def test_a_closed_standard_output_is_a_broken_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(BrokenPipeError):
        options.write("a")


@pytest.mark.parametrize(
    ("text", "made_whole"),
    [
        ("春 👩‍🚀 a", "春 👩‍🚀 a"),
        ("caf\udce9", "caf\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\ud83d", "\ufffd"),
    ],
)
def test_half_characters_are_made_whole(text, made_whole):
    assert options.whole(text) == made_whole


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (["--top-k", "5"], "5"),
        (["--top_k", "5"], "5"),
        (["--top_k=5"], "5"),
        (["--top-k=a_b"], "a_b"),
        (["--top-k", "-5"], "-5"),
        ([], None),
    ],
)
def test_flags_have_dashes_or_underscores_and_values_are_as_given(given, value):
    parser = options.new_parser("")
    options.add_sampling_options(parser)
    assert parser.parse_args(given).top_k == value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--top"], '--top is unknown; did you mean "--top-'),
        (["--tempature=1"], '--tempature is unknown; did you mean "--temperature"?'),
        (["--xyzzy"], "--xyzzy is unknown; known are: "),
        (["word"], "'word' is no option"),
        (["--seed"], "--seed: expected one argument"),
    ],
)
def test_an_unknown_flag_is_an_error_that_names_the_nearest(given, said):
    parser = options.new_parser("")
    options.add_sampling_options(parser)
    with pytest.raises(SettingsError) as error:
        parser.parse_args(given)
    assert said in str(error.value)
    assert str(error.value).endswith("--help lists the options.")


@pytest.mark.parametrize("seed", ["0", "4294967295", "7"])
def test_a_seed_is_the_one_that_was_given(seed):
    assert options.seed_of(Namespace(seed=seed)) == int(seed)


@pytest.mark.parametrize(
    "seed",
    ["-1", "4294967296", "1.5", "x", "", pytest.param("9" * 5000, id="thousands of digits"), "²"],
)
def test_a_wrong_seed_is_told_with_what_is_allowed(seed):
    with pytest.raises(SettingsError, match="from 0 to 4294967295"):
        options.seed_of(Namespace(seed=seed))


def test_seeds_that_are_not_given_differ():
    nothing = Namespace(seed=None)
    assert len({options.seed_of(nothing) for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "1", 1.0),
        ("temperature", "1e-9", 1e-9),
        ("top_p", "None", None),
        ("top_k", "none", None),
        ("top_k", "40", 40),
        ("max_new_tokens", "100000", 100_000),
    ],
)
def test_values_are_read_from_their_text(name, text, value):
    (read,) = options.read_sampling({name: text}).values()
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nan",
        "inf",
        "-1",
        "None",
        "1,5",
        pytest.param("9" * 5000, id="thousands of digits"),
        "1e400",
    ],
)
def test_what_is_no_temperature_is_refused(text):
    with pytest.raises(SettingsError, match="temperature is "):
        options.read_sampling({"temperature": text})
