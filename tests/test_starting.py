"""Ctrl-C while a program imports its libraries and prepares: it ends soon, and in words."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import main
from engine import starting
from engine.starting import end_at_ctrl_c, insisting_on_ctrl_c, raise_at_ctrl_c
from tests.conftest import REPOSITORY

# as libraries do that take a failing import for a missing package
SWALLOWING = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
print("goes on, half-imported", flush=True)
raise SystemExit(0)
"""
PROGRAMS = ["main.py", "scripts.inference", "scripts.chat", "scripts.serve"]


def start(program: str, folder: Path, **options) -> subprocess.CompletedProcess[str]:
    named = [program] if program.endswith(".py") else ["-m", program]
    return subprocess.run(
        [sys.executable, *named],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        encoding="utf-8",
        **options,
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_library_that_swallows_the_interrupt_keeps_no_program_from_ending(tmp_path, program):
    (tmp_path / "torch.py").write_text(SWALLOWING, encoding="utf-8")
    done = start(program, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped.\n")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_in_the_background_of_a_shell_it_stays_ignored(tmp_path):
    (tmp_path / "torch.py").write_text(SWALLOWING, encoding="utf-8")
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    assert start("main.py", tmp_path, **ignoring).returncode == 0


@pytest.fixture
def pythons_handler(monkeypatch):
    monkeypatch.setattr(starting, "AGAIN_S", 0.01)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_afterwards_an_interrupt_is_raised_as_in_any_program(pythons_handler):
    end_at_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    raise_at_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    of_others = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGINT, of_others)
    raise_at_ctrl_c()
    with insisting_on_ctrl_c():
        assert signal.getsignal(signal.SIGINT) is of_others


class Finalized:
    """An object in whose finalizer a Ctrl-C comes."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_gets_lost_comes_again_and_is_not_told(pythons_handler, capsys, recwarn):
    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), insisting_on_ctrl_c():
        for _ in range(3):
            Finalized()
        warnings.warn("Error detected in MmBackward. Traceback of forward call", stacklevel=1)
        time.sleep(60)
    assert capsys.readouterr() == ("", "") and recwarn.list == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.unraisablehook is before


def test_one_that_gets_lost_while_a_run_is_prepared_ends_the_program(
    pythons_handler, monkeypatch, capsys
):
    def prepare(settings, *, began_at):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(main, "prepare_environment", prepare)
    assert main.main([]) == 130
    assert capsys.readouterr().err == "\nStopped.\n"


def test_an_interrupt_on_its_way_comes_once_however_long_that_takes(pythons_handler):
    cleaned = False
    with pytest.raises(KeyboardInterrupt), insisting_on_ctrl_c():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            with contextlib.suppress(FileNotFoundError):
                time.sleep(0.1)
                Path("nowhere").stat()
            time.sleep(0.1)
            cleaned = True
    assert cleaned
