"""torchrun with ranks that are forks of it: a fresh interpreter takes seconds to import torch.

Its own code starts, watches, signals and restarts them. A rank is a process in a session of its
own with torchrun as its parent, without torchrun's open files and signal handlers.
"""

import atexit
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler


class Fork:
    """A rank, with what torchrun needs of subprocess.Popen."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        is_ready, closed_when_ready = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.closerange(3, 1024)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = list(command[command.index("-u") + 1 :])
            sys.stdout.reconfigure(line_buffering=True)
            end_after(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
        os.close(closed_when_ready)
        os.read(is_ready, 1)
        os.close(is_ready)

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.005)
        return self.returncode


def end_after(program: Callable[[], object]) -> NoReturn:
    """Run a program and end as an interpreter does, but for the time that it takes to clean up."""
    code = 0
    try:
        program()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: list[str]) -> NoReturn:
    """Run torchrun with these arguments."""
    SubprocessHandler._popen = lambda self, command, environment: Fork(command, environment)
    end_after(lambda: run.main(arguments))
