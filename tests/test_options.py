"""What the programs around a run share: how options are read, and how a program ends."""

import io
import sys
from argparse import Namespace

import pytest

from engine import errors
from engine.errors import DataError, SettingsError, Stopped
from generation import SamplingConfig
from scripts import options

DIGITS = "9" * 5000


def failing(error: BaseException):
    def main() -> int:
        raise error

    return main


CODES = {"Settings": 2, "Data": 3, "Checkpoint": 4, "Numerics": 5, "Resource": 6, "Busy": 7}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        *(
            (getattr(errors, f"{name}Error")("what"), code, f"\n{name}Error: what\n")
            for name, code in CODES.items()
        ),
        (DataError("\x1b[31ma\x07 line\n2"), 3, "\nDataError: [31ma line\n2\n"),
        (MemoryError(), 6, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6, "out of memory"),
        (KeyboardInterrupt(), 130, "\nStopped.\n"),
        (Stopped(15), 143, ""),
        (BrokenPipeError(), 0, ""),
        (None, 3, ""),
    ],
)
def test_a_program_ends_with_its_code_and_in_words(error, code, said, monkeypatch, capsys):
    monkeypatch.delenv("GPT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as exit:
        options.run_program(failing(error) if error else lambda: 3)
    assert exit.value.code == code
    printed = capsys.readouterr().err
    assert printed == said if said.startswith("\n") else said in printed


def test_an_error_that_nobody_expected_or_that_is_debugged_keeps_its_traceback(monkeypatch):
    for error in RuntimeError("odd"), KeyError("odd"):
        with pytest.raises(type(error), match="odd"):
            options.run_program(failing(error))
    monkeypatch.setenv("GPT_DEBUG", "1")
    with pytest.raises(DataError):
        options.run_program(failing(DataError("odd")))


def test_text_is_written_at_once_and_without_orders_to_a_terminal(monkeypatch):
    everything = "".join(map(chr, [*range(0x300), 0x200D, 0x6625, 0x1F600]))
    kept = [*range(0x20, 0x7F), *range(0xA0, 0x300), 0x200D, 0x6625, 0x1F600]
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8", newline=""))
    options.write(everything)
    assert raw.getvalue().decode() == "\t\n" + "".join(map(chr, kept))
    monkeypatch.setattr(sys, "stdout", None)  # as where it was closed
    with pytest.raises(BrokenPipeError):
        options.write("a")


def test_half_characters_are_made_whole():
    for text, made_whole in (
        ("春 👩‍🚀 a", "春 👩‍🚀 a"),
        ("caf\udce9", "caf\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\ud83d", "\ufffd"),
    ):
        assert options.whole(text) == made_whole


def test_flags_have_dashes_or_underscores_and_values_are_as_given():
    parser = options.new_parser("")
    options.add_sampling_options(parser)
    for given, value in (
        (["--top-k", "5"], "5"),
        (["--top_k", "5"], "5"),
        (["--top_k=5"], "5"),
        (["--top-k=a_b"], "a_b"),
        (["--top-k", "-5"], "-5"),
        ([], None),
    ):
        assert parser.parse_args(given).top_k == value
    for given, said in (
        ("--top", '--top is unknown; did you mean "--top-'),
        ("--tempature=1", '--tempature is unknown; did you mean "--temperature"?'),
        ("--xyzzy", "--xyzzy is unknown; known are: "),
        ("word", "'word' is no option"),
        ("--seed", "--seed: expected one argument"),
    ):
        with pytest.raises(SettingsError) as error:
            parser.parse_args([given])
        assert said in str(error.value)
        assert str(error.value).endswith("--help lists the options.")


def test_seeds_and_values_are_read_from_their_text():
    for seed in ("0", "4294967295", "7"):
        assert options.seed_of(Namespace(seed=seed)) == int(seed)
    for seed in ("-1", "4294967296", "1.5", "x", "", DIGITS, "²"):
        with pytest.raises(SettingsError, match="from 0 to 4294967295"):
            options.seed_of(Namespace(seed=seed))
    nothing = Namespace(seed=None)  # another one each time
    assert len({options.seed_of(nothing) for _ in range(20)}) > 1
    for name, text, value in (
        ("temperature", "1", 1.0),
        ("temperature", "1e-9", 1e-9),
        ("top_p", "None", None),
        ("top_k", "none", None),
        ("top_k", "40", 40),
        ("max_new_tokens", "100000", 100_000),
    ):
        (read,) = options.read_sampling({name: text}).values()
        assert (read, type(read)) == (value, type(value))
    with pytest.raises(SettingsError, match="max_new_tokens is None; it must be a whole number"):
        options.read_sampling({"max_new_tokens": "none"})
    for text in ("", "nan", "inf", "-1", "None", "1,5", DIGITS, "1e400"):
        with pytest.raises(SettingsError, match="temperature is "):
            options.read_sampling({"temperature": text})


def test_a_model_that_has_no_length_of_its_own_gets_one():
    given = Namespace(**dict.fromkeys(("seed", *vars(SamplingConfig()))))
    elsewhere, run = SamplingConfig(temperature=0.5), SamplingConfig(max_new_tokens=7)
    for sampling, option, length in (
        (elsewhere, None, options.TEXT_TOKENS),
        (elsewhere, "9", 9),
        (run, None, 7),
        (run, "9", 9),
    ):
        given.max_new_tokens = option
        found = options.sampling_of(given, Namespace(sampling=sampling))
        assert found == vars(sampling) | {"max_new_tokens": length}
