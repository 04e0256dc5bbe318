"""Runs of main.py as forks that say which phase they are in, killed there from outside."""

import contextlib
import functools
import mmap
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.saving import forked

# not conftest's, which imports torch: a process is forked faster without it
REPOSITORY = Path(__file__).resolve().parent.parent.parent
PHASES = ("other", "step", "save", "evaluation", "sampling")
# how often a phase must have been entered in a process before the kill; 40 steps have 9 saves
LATEST = {"step": 12, "save": 3, "evaluation": 4, "sampling": 2}


class PhaseBoard:
    """Memory shared with a forked run: the phase that it is in, and how often and long in each."""

    def __init__(self) -> None:
        memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._now = memory[:8].cast("q")
        self.counts = memory[64:128].cast("q")  # how often the process has entered each phase
        self._seconds = memory[128:192].cast("d")

    @property
    def phase(self) -> str:
        """The phase that the process is in, or was in when it ended."""
        return PHASES[self._now[0]]

    def mean_s(self, phase: str) -> float:
        """How long the process was in a phase each time, on average."""
        index = PHASES.index(phase)
        return self._seconds[index] / max(1, self.counts[index])

    def marking(self, phase: str, function: Callable) -> Callable:
        """The function, with its phase marked while it runs."""
        index = PHASES.index(phase)

        @functools.wraps(function)
        def marked(*arguments: Any, **options: Any) -> Any:
            self._now[0] = index
            self.counts[index] += 1
            entered_at = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._seconds[index] += time.perf_counter() - entered_at
                self._now[0] = 0

        return marked


def import_what_runs_need() -> None:
    """Import once what every run would; nothing here may start a thread before the forks."""
    import torch

    import environment  # noqa: F401

    with contextlib.suppress(ImportError):
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    torch.set_num_threads(1)


def start_run(work: Path, cache: Path, board: PhaseBoard) -> int:
    """Start main.py on work/settings.py in a process group of its own; returns its id."""
    board.__init__()  # anew
    pid = forked(lambda: _be_a_run(work, cache, board))
    with contextlib.suppress(OSError):  # it does the same; whoever is first
        os.setpgid(pid, pid)
    return pid


def _be_a_run(work: Path, cache: Path, board: PhaseBoard) -> None:
    import generation
    import storage.cache
    import train
    from storage.checkpoint import CheckpointStore
    from training import learner

    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    sys.stdout = sys.stderr = open(work / "log.txt", "a", encoding="utf-8")  # noqa: SIM115
    os.chdir(work)
    storage.cache.CACHE = cache
    learner.take_step = board.marking("step", learner.take_step)
    learner.mean_loss = board.marking("evaluation", learner.mean_loss)
    CheckpointStore.save = board.marking("save", CheckpointStore.save)
    train.Trainer.sample = board.marking("sampling", train.Trainer.sample)
    # main.py, which takes it from there, has not been imported yet
    generation.generate = board.marking("sampling", generation.generate)
    sys.argv = ["main.py", "settings.py"]
    try:
        runpy.run_path(str(REPOSITORY / "main.py"), run_name="__main__")
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(ended.code or 0)


def run_to_its_end(work: Path, cache: Path, board: PhaseBoard) -> int:
    """Run main.py and leave it alone; returns its exit code."""
    _, status = os.waitpid(start_run(work, cache, board), 0)
    return os.waitstatus_to_exitcode(status)


def run_and_kill(
    work: Path, cache: Path, board: PhaseBoard, aim: str, nth: int, delay_s: float
) -> int | None:
    """Run main.py and kill it delay_s after it entered a phase for the nth time.

    Aim "other" counts the delay from the start. Returns None where it was killed, its exit code
    where it ended before. Raises RuntimeError where it leaves a process behind.
    """
    pid = start_run(work, cache, board)
    while aim in LATEST and board.counts[PHASES.index(aim)] < nth:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.0002)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, 0)
        raise RuntimeError(f"process group {pid} has outlived its run")
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
