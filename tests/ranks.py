"""Start programs as several ranks under torchrun, on the CPU, and look at what they left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.conftest import REPOSITORY

# main.py with a cache in its folder; drawing would take longer than training
PROGRAM = """
import sys
from pathlib import Path
sys.modules["matplotlib"] = None
import main  # before torch, for which it sets some variables
import environment
environment.CACHE = Path("cache").resolve()
sys.exit(main.main(sys.argv[1:]))
"""
MARK = "GPT_TEST_JOB"  # a variable by which a job's processes are known, whoever their parent is


class Job(subprocess.Popen):
    """A program in a session of its own, its output in files of its folder."""

    def __init__(self, folder: Path, command: list[str], env: dict[str, str]) -> None:
        self._name = uuid.uuid4().hex
        self._out, self._err = (folder / f"{name}-{self._name}.log" for name in ("out", "err"))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("GPT_")}
        own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", MARK: self._name}
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            super().__init__(
                command,
                cwd=folder,
                env=inherited | own | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def until(self, happened: Callable[[], object], within_s: float = 300.0) -> None:
        """Wait for something that the job does before it ends."""
        deadline = time.monotonic() + within_s
        while not happened():
            assert self.poll() is None or happened(), f"it ended:\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"it never happened:\n{self.out}\n{self.err}"
            time.sleep(0.01)

    def living(self) -> list[int]:
        """The job's processes that are still there: torchrun gives each rank its own session."""
        mark, found = f"{MARK}={self._name}".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                if state != "Z" and mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found

    def end(self) -> None:
        """Kill what is left of the job."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        while living := self.living():
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.wait()


def start_ranks(
    folder: Path,
    n: int,
    *arguments: str,
    program: str = PROGRAM,
    env: dict[str, str] | None = None,
    options: tuple[str, ...] = (),
) -> Job:
    """Start a program as n ranks under torchrun, in a folder; without torchrun where n is 1.

    options are further ones of torchrun. Whoever starts a job ends it: by run_ranks(), or end().
    """
    script = folder / f"program-{uuid.uuid4().hex}.py"
    script.write_text(program, encoding="utf-8")
    command = [sys.executable, str(script), *arguments]
    if n > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        command[4:4] = options
    return Job(folder, command, env or {})


def run_ranks(
    folder: Path, n: int, *arguments: str, code: int = 0, within_s: float = 300.0, **options
) -> Job:
    """Run a program as n ranks to its end, which must come in time with that exit code."""
    job = start_ranks(folder, n, *arguments, **options)
    try:
        assert job.wait(within_s) == code, f"{job.out}\n{job.err}"
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it did not end:\n{job.out}\n{job.err}") from None
    finally:
        job.end()
    return job


def write_settings(folder: Path, name: str = "settings.py", **settings) -> str:
    """Write a settings file; returns its name, which is what the program takes."""
    lines = "".join(f"{key} = {value!r}\n" for key, value in settings.items())
    (folder / name).write_text(lines, encoding="utf-8")
    return name


def write_tiny_run(folder: Path, name: str, params: dict, **given) -> str:
    """Write the settings of a run in fp32 on the CPU; names in lower case go into its params."""
    params = params | {key: value for key, value in given.items() if key.islower()}
    capitals = {key: value for key, value in given.items() if key.isupper()}
    fixed = {"TOKENIZER": "char", "CUSTOM_MODE": True, "DEVICE": "cpu", "PRECISION": "fp32"}
    fixed |= {"COMPILE": False, "sampling_params": {"max_new_tokens": 4}}
    return write_settings(folder, name, **fixed | capitals, custom_params=params)


def metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
