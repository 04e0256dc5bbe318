"""Programs of the tests as forks of one process that has imported what they all import.

A fresh interpreter takes seconds to import torch. A fork is a process of its own all the same: its
own signals, streams, folder and group, and an end as any interpreter's.
"""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import REPOSITORY

# macOS has libraries that end a process which uses them after a fork
CAN_FORK = sys.platform == "linux"

TEMPLATE = """
import json, os, sys
import main  # before torch, for which it sets some variables
import environment, torch._dynamo, tqdm, train  # each of several ranks imports the second

def next_program():
    # in each fork: the request that it is for
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "code" in request:
            answer = os.fork()
            if answer == 0:
                return request
        else:
            done, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        print(json.dumps(answer), flush=True)
    sys.exit()

def become(request):
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, name in enumerate([os.devnull, request["out"], request["err"]]):
        handle = os.open(name, os.O_RDWR)
        os.dup2(handle, number)
        os.close(handle)
    return request["code"]

assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the other threads"
exec(compile(become(next_program()), "<program>", "exec"), {"__name__": "__main__"})
"""


class Forked:
    """A process that was forked for a test, with what subprocess.Popen has of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, a signal's as a negative number; None while the process runs."""
        if self.returncode is None:
            self.returncode = _ask(pid=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code when there is one; raises TimeoutExpired where that takes too long."""
        deadline = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout)
            time.sleep(0.005)
        return self.returncode


def fork(code: str, folder: Path, environment: dict[str, str], out: Path, err: Path) -> Forked:
    """Run code in a new process and session, its output into files that are there already.

    The environment is what the code finds; what an interpreter reads at its start, like
    PYTHONIOENCODING or OMP_NUM_THREADS, is as for the tests, with one thread.
    """
    request = {"code": code, "folder": folder, "environment": environment, "out": out, "err": err}
    return Forked(_ask(**request))


def run_fork(code: str, folder: Path) -> str:
    """Run code in a folder to its end, which must be a good one; what it prints."""
    out, err = folder / "fork-out", folder / "fork-err"
    out.touch(), err.touch()
    process = fork(code, folder, dict(os.environ), out, err)
    assert process.wait() == 0, err.read_text(encoding="utf-8")
    return out.read_text(encoding="utf-8")


def _ask(**request) -> int | None:
    template = _template()
    template.stdin.write(json.dumps(request, default=str) + "\n")
    template.stdin.flush()
    return json.loads(template.stdout.readline())


@functools.cache
def _template() -> subprocess.Popen:
    """The process that forks; it ends with this one, whose end closes its standard input."""
    return subprocess.Popen(
        [sys.executable, "-c", TEMPLATE],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
