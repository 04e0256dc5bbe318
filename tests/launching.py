"""Programs that tests launch and let fail, each a process with real signals and a folder."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.forking import CAN_FORK, fork

NET_S = 300.0  # after which a program hangs; nothing is expected to come near it
STEPS = 60
PARAMS = {
    "max_steps": STEPS,
    "batch_size": 2,
    "max_length": 16,
    "eval_freq": 25,
    "eval_iter": 1,
    "start_context": "the",
    "model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1},
}
# a step takes as long as a test needs; what a test breaks comes in at {more}
PROGRAM = """
import os, sys, time
from pathlib import Path
sys.modules["matplotlib"] = None
import environment, main, storage.cache, train
from training import learner
storage.cache.CACHE = Path("cache").resolve()
take_step = learner.take_step

def slow_step(*arguments, **options):
    time.sleep(STEP_S)
    return take_step(*arguments, **options)

learner.take_step = slow_step
{more}
sys.exit(main.main(["settings.py"]))
"""


class Program:
    """A program in a process group of its own, its output in files of its folder.

    With a prefix or with streams of a test's own it is a fresh interpreter, and else a fork.
    """

    def __init__(
        self, folder: Path, number: int, code: str, prefix: tuple[str, ...] = (), **options
    ) -> None:
        self.folder = folder
        self._out, self._err = (folder / f"{name}-{number}" for name in ("out", "err"))
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        environment |= options.pop("env", {})
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            if CAN_FORK and not prefix and not options:
                # what was imported before needn't be collected: a fork would take a second to end
                code = f"import gc\ngc.freeze()\n{code}"
                self.process = fork(code, folder, environment, self._out, self._err)
            else:
                self.process = subprocess.Popen(
                    [*prefix, sys.executable, "-c", code],
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    **{"stdout": out, "stderr": err} | options,
                )
        self.pid = self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def until(self, happened: Callable[[], object]) -> None:
        """Wait for something that the program does."""
        wait_until(lambda: happened() or self.process.poll() is not None)
        assert happened(), f"ended with {self.process.poll()}:\n{self.out}\n{self.err}"

    def until_it_trains(self) -> None:
        self.until(lambda: "Before training: the" in self.out or "Resuming" in self.out)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def ends_with(self, code: int, within_s: float = NET_S) -> None:
        assert self.process.wait(within_s) == code, self.out + self.err
        assert "Traceback" not in self.err
        assert "Exception" not in self.err
        wait_until(lambda: not self.living())  # no orphans

    def living(self) -> list[int]:
        """The processes that are still there of its group, and those that write to its output."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                stat = (place / "stat").read_text(errors="replace")
                state, _, group = stat.rpartition(")")[2].split()[:3]
                is_ours = int(group) == self.pid or os.readlink(place / "fd" / "1") == str(
                    self._out
                )
                if is_ours and state != "Z":
                    found.append(int(place.name))
        return found

    def end(self) -> None:
        """Kill what is left of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        while living := self.living():
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()


def wait_until(happened: Callable[[], object], within_s: float = NET_S) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@contextlib.contextmanager
def launching(folder: Path) -> Iterator[Callable[..., Program]]:
    """Start runs named "one" in a folder; what is no setting goes into custom_params."""
    programs: list[Program] = []
    (folder / "text.txt").write_text("the river carries the bell " * 40, encoding="utf-8")

    def start(
        more: str = "", step_s: float = 0.0, prefix: tuple[str, ...] = (), streams=None, **settings
    ) -> Program:
        params = PARAMS | {name: value for name, value in settings.items() if name.islower()}
        values = {
            "DATA": "text.txt",
            "TOKENIZER": "char",
            "CUSTOM_MODE": True,
            "RUN_NAME": "one",
            "custom_params": params,
        } | {name: value for name, value in settings.items() if name.isupper()}
        lines = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        (folder / "settings.py").write_text(lines, encoding="utf-8")
        code = PROGRAM.replace("STEP_S", str(step_s)).replace("{more}", more)
        programs.append(Program(folder, len(programs), code, prefix, **(streams or {})))
        return programs[-1]

    yield start
    for program in programs:
        program.end()


def has_mounts() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


needs_mounts = pytest.mark.skipif(not has_mounts(), reason="no tmpfs can be mounted here")
# mounts of the program's own, in which it is root; what is on the disk in the end is left for us
SMALL_DISK = """
import atexit, ctypes, subprocess
ids = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
assert ctypes.CDLL(None).unshare(0x10020000) == 0
for name, content in ids.items():
    Path("/proc/self", name).write_text(content)
mount = "mkdir -p disk && mount -t tmpfs -o size=SIZE tmpfs disk && THEN"
subprocess.run(mount, shell=True, check=True)
atexit.register(subprocess.run, "cp -a disk left", shell=True, check=True)
"""


def on_a_small_disk(size: str, then: str = "true") -> str:
    return SMALL_DISK.replace("SIZE", size).replace("THEN", then)
