"""Ctrl-C while a program still imports its libraries: it ends at once, and in words."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.starting import end_at_ctrl_c, raise_at_ctrl_c
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


def test_afterwards_an_interrupt_is_raised_as_in_any_program():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        end_at_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        raise_at_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        mine = signal.signal(signal.SIGINT, lambda *_: None)
        raise_at_ctrl_c()  # what others have set stays
        assert signal.getsignal(signal.SIGINT) is not mine
    finally:
        signal.signal(signal.SIGINT, before)
