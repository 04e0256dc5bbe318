"""Whole programs that are stopped, killed, robbed of their disk and started again.

Each is a process of its own with real signals and real file systems. That what they come to is
exact is test_resume's matter; here it is how they end, what they leave and what they say.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.files import verify_folder
from tests.conftest import REPOSITORY
from tests.forking import CAN_FORK, fork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="POSIX signals"),
]

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
import environment, main, train
from training import learner
environment.CACHE = Path("cache").resolve()
take_step = learner.take_step

def slow_step(*arguments, **options):
    time.sleep(STEP_S)
    return take_step(*arguments, **options)

learner.take_step = slow_step
{more}
sys.exit(main.main(["settings.py"]))
"""


class Program:
    """A run in a process group of its own, its output in files.

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
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8")

    def until(self, happened: Callable[[], object]) -> None:
        """Wait for something that the program does."""
        wait_until(lambda: happened() or self.process.poll() is not None)
        assert happened(), f"ended with {self.process.poll()}:\n{self.out}\n{self.err}"

    def until_it_trains(self) -> None:
        self.until(lambda: "Before training: the" in self.out or "Resuming" in self.out)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def ends_with(self, code: int, within_s: float = 60.0) -> None:
        assert self.process.wait(within_s) == code, self.out + self.err
        assert "Traceback" not in self.err
        assert "Exception" not in self.err
        wait_until(lambda: not self.living(), within_s=15)  # no orphans

    def living(self) -> list[int]:
        """The processes of its group that are still there."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.pid and state != "Z":
                    found.append(int(stat.parent.name))
        return found


def wait_until(happened: Callable[[], object], within_s: float = 60.0) -> None:
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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.process.wait()


@pytest.fixture
def launch(tmp_path):
    with launching(tmp_path) as start:
        yield start


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; nothing else may be there."""
    found = sorted((run / "checkpoints").iterdir())
    assert all(re.fullmatch(r"step-\d{8}", path.name) for path in found), found
    for path in found:
        verify_folder(path)
    return found


def assert_finishes(program: Program, done: int, of: int = STEPS) -> None:
    program.ends_with(0)
    assert f"Resuming runs/one: {done} of {of} steps are done" in program.out
    assert (program.folder / "runs" / "one" / "summary.json").exists()


def saved_steps(program: Program, run: Path) -> int:
    """The step that a stopped program says that it saved; it must be there, and whole."""
    said = re.search(r"Stopped after step (\d+) of \d+: (.+)\.\nThe same command", program.err)
    assert said, program.err
    step = int(said[1])
    if step == 0:
        assert said[2] == "nothing was trained yet"
    else:
        assert said[2] == f"saved in runs/one/checkpoints/step-{step:08d}"
        assert checkpoints(run)[-1].name == f"step-{step:08d}"
    return step


# ------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("name", "seed"),
    [("SIGINT", 1), ("SIGINT", 2), ("SIGINT", 3), ("SIGTERM", 4), ("SIGTERM", 5), ("SIGHUP", 6)],
)
def test_a_signal_at_any_time_saves_and_the_next_start_finishes(launch, run, name, seed):
    number = getattr(signal, name)
    program = launch(step_s=0.03)
    program.until_it_trains()
    time.sleep(random.Random(seed).uniform(0, 1.2))
    program.send(number)
    program.ends_with(128 + number, within_s=10)
    assert "Stopping after this step; Ctrl-C again stops at once, without saving." in program.err
    done = saved_steps(program, run)
    assert done < STEPS
    assert_finishes(launch(), done)


def test_under_nohup_a_closed_terminal_ends_nothing(launch, run):
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    program = launch(step_s=0.02, streams=ignoring)
    program.until_it_trains()
    program.send(signal.SIGHUP)
    program.ends_with(0)
    assert (run / "summary.json").exists()


SLOW_SAVES = """
from storage import files as storage
write = storage.NewFolder.write

def slow_write(folder, name, chunks):
    write(folder, name, chunks)
    if Path("slow").exists():
        time.sleep(30)

storage.NewFolder.write = slow_write
"""


def test_a_second_ctrl_c_while_it_saves_stops_at_once_with_the_checkpoint_before(
    launch, run, tmp_path
):
    program = launch(SLOW_SAVES, step_s=0.3, save_every=5)
    program.until(lambda: (run / "checkpoints" / "step-00000005").exists())
    (tmp_path / "slow").touch()
    time.sleep(0.15)  # the next step has begun: after the saved one there is nothing to save
    program.send(signal.SIGINT)
    program.until(lambda: list((run / "checkpoints").glob(".tmp-*/model.safetensors")))
    time.sleep(0.7)  # what comes sooner is an echo of the first one
    program.send(signal.SIGINT)
    program.ends_with(130, within_s=5)
    assert "Stopped. What was measured so far is in runs/one" in program.err
    left = checkpoints(run)
    assert left[-1].name < "step-00000030"
    (tmp_path / "slow").unlink()
    assert_finishes(launch(), int(left[-1].name[5:]))


SLOW_READING = """
def reads_for_long(*arguments, **options):
    Path("reading").touch()
    time.sleep(30)

environment.tokenize = reads_for_long
"""


def test_ctrl_c_while_the_text_is_read_leaves_nothing(launch, tmp_path):
    program = launch(SLOW_READING)
    program.until((tmp_path / "reading").exists)
    program.send(signal.SIGINT)
    program.ends_with(130, within_s=5)
    assert program.err.strip() == "Stopped."
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_in_a_download_that_hangs_leaves_nothing(launch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        more = (
            "import dataclasses\nfrom text.corpora import CORPORA\n"
            "for name in list(os.environ):\n"
            "    if name.lower().endswith('_proxy'):\n"
            "        del os.environ[name]\n"
            "CORPORA['the-verdict'] = dataclasses.replace(\n"
            "    CORPORA['the-verdict'],\n"
            f"    url='http://127.0.0.1:{server.getsockname()[1]}/x.txt',\n"
            ")\n"
        )
        program = launch(more, DATA="the-verdict")
        connection, _ = server.accept()
        with connection:
            connection.recv(10)
            program.send(signal.SIGINT)
            program.ends_with(130, within_s=5)
    assert program.err.strip() == "Stopped."
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "cache").rglob("*verdict*"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_whole_group_saves_and_leaves_no_worker_behind(launch, run, name):
    number = getattr(signal, name)
    program = launch(step_s=0.03, num_workers=2)
    program.until_it_trains()
    program.until(lambda: len(program.living()) == 3)
    time.sleep(0.5)
    os.killpg(program.pid, number)
    program.ends_with(128 + number, within_s=20)
    assert program.err.count("Stopping after this step") == 1, "a worker speaks, too"
    done = saved_steps(program, run)
    assert_finishes(launch(num_workers=2), done)


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_that_is_killed_ends_the_run_with_6_and_a_word(launch, run, seed):
    # a long epoch: between two of them there is no worker
    program = launch(step_s=0.02, num_workers=2, stride=1, save_every=20, max_steps=400)
    program.until(lambda: (run / "checkpoints" / "step-00000020").exists())
    time.sleep(random.Random(seed).uniform(0, 1.0))
    worker = max(program.living())
    assert worker != program.pid
    os.kill(worker, signal.SIGKILL)
    program.ends_with(6, within_s=30)
    assert "a process that prepares batches was ended from outside" in program.err
    assert "Set num_workers to 0" in program.err
    newest = max((run / "checkpoints").glob("step-*"))
    verify_folder(newest)
    assert_finishes(launch(num_workers=2, stride=1, max_steps=400), int(newest.name[5:]), 400)


def test_an_error_of_ours_ends_a_run_that_has_workers(launch):
    more = (
        "step = learner.take_step\n"
        "def broken(*arguments, **options):\n"
        "    raise ZeroDivisionError('a bug of ours')\n"
        "learner.take_step = broken\n"
    )
    program = launch(more, num_workers=2)
    assert program.process.wait(40) == 1
    assert "ZeroDivisionError: a bug of ours" in program.err
    wait_until(lambda: not program.living(), within_s=15)


def test_a_program_that_is_held_and_let_go_goes_on(launch, run):
    program = launch(step_s=0.02)
    program.until_it_trains()
    program.send(signal.SIGSTOP)
    time.sleep(2)
    program.send(signal.SIGCONT)
    program.ends_with(0)
    assert (run / "summary.json").exists()


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")], ids=["head", "terminal"])
def test_output_that_nobody_reads_any_more_ends_nothing(launch, run, streams):
    program = launch(step_s=0.02, streams=dict.fromkeys(streams, subprocess.PIPE))
    assert program.process.stdout.readline().startswith(b"=")
    for name in streams:
        getattr(program.process, name).close()
    program.ends_with(0)
    assert (run / "summary.json").exists()


# -------------------------------------------------------------------------------- two programs

WAITING = """
def step_when_told(*arguments, **options):
    while not Path("go-on").exists():
        time.sleep(0.01)
    return take_step(*arguments, **options)

learner.take_step = step_when_told
"""


@pytest.mark.parametrize("settings", [{}, {"RUN_NAME": None}], ids=["named", "auto"])
def test_a_second_program_in_the_same_folder_exits_7_and_names_the_first(
    launch, tmp_path, settings
):
    first = launch(WAITING, **settings)
    first.until_it_trains()
    second = launch(**settings)
    second.ends_with(7)
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"{folder} is in use by process {first.pid} on {socket.gethostname()}" in second.err
    assert "Before training" not in second.out and "Resuming" not in second.out
    assert first.process.poll() is None
    (tmp_path / "go-on").touch()
    first.ends_with(0)
    assert (folder / "summary.json").exists()
    assert len(list((folder / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_lock_of_a_killed_program_is_taken_over_at_once(launch, run, workers):
    program = launch(step_s=0.05, save_every=5, num_workers=workers)
    program.until(lambda: (run / "checkpoints" / "step-00000010").exists())
    program.send(signal.SIGKILL)
    program.process.wait()
    before = time.monotonic()
    second = launch(num_workers=workers)  # orphans may still be there
    second.ends_with(0)
    assert time.monotonic() - before < 30
    done = int(re.search(r"Resuming runs/one: (\d+) of", second.out)[1])
    assert done >= 10 and done % 5 == 0
    wait_until(lambda: not program.living(), within_s=15)


# ------------------------------------------------------------------------- killed near the end

KILLED_IN = {  # what is called then, and by which call of it that is known
    "the final evaluation": ("train.Trainer.evaluate", "lambda t, *_: t.journal.steps == 60"),
    "the last epoch's sample": ("train.Trainer.sample", "lambda t, *_: t.journal.steps == 60"),
    "the samples": ("journal.Journal.note_sample", "lambda j, label, _: 'Top-k' in label"),
    "the picture": ("journal.Journal.draw", "lambda j: 'Top-p' in j.history.samples[-1][0]"),
    "the summary": ("main.write_json", "lambda *_: True"),
}
KILL = """
import signal
from training import journal
real = {target}

def killed(*arguments, **options):
    if ({is_time})(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)

{target} = killed
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    with launching(folder) as start:
        start().ends_with(0)
    return folder / "runs" / "one"


@pytest.mark.parametrize("place", KILLED_IN)
def test_killed_between_the_last_save_and_the_summary_it_finishes_with_nothing_twice(
    launch, run, whole, place
):
    target, is_time = KILLED_IN[place]
    more = KILL.replace("{target}", target).replace("{is_time}", is_time)
    killed = launch(more)
    assert killed.process.wait(60) == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    assert checkpoints(run)[-1].name == f"step-{STEPS:08d}"
    assert_finishes(launch(), STEPS)
    for name in ("samples.md", "metrics.jsonl"):
        ours, expected = (
            re.sub(r'"train/tok_per_sec": [\d.]+', "", (folder / name).read_text(encoding="utf-8"))
            for folder in (run, whole)
        )
        assert ours == expected


# ------------------------------------------------------------------------------------ the disk


def has_mounts() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


needs_mounts = pytest.mark.skipif(not has_mounts(), reason="no tmpfs can be mounted here")
# 1.6 MB of weights: a checkpoint has 5 MB, and three with the best weights have 16
BIG = {"model_overrides": {"emb_dim": 128, "n_heads": 2, "n_layers": 2}, "OUTPUT_DIR": "disk"}


def on_a_small_disk(megabytes: int, then: str = "true") -> tuple[str, ...]:
    """Before a command: mount a tmpfs on disk/, and copy to left/ what is on it in the end."""
    script = (
        f"mkdir -p disk && mount -t tmpfs -o size={megabytes}m tmpfs disk && {then} || exit 99\n"
        '"$@"; code=$?; cp -a disk left; exit $code'
    )
    return ("unshare", "-rm", "bash", "-c", script, "bash")


FILL = """
from storage import checkpoint
from storage import files as storage
require_space = checkpoint.require_space

def fill():
    with open("disk/filler", "wb", buffering=0) as file:
        while (free := shutil.disk_usage("disk").free) > 1 << 20:
            file.write(bytes(min(free - (1 << 20), 1 << 20)))

import shutil
def full_later(folder, n_bytes, what):
    if "step 10" in what and {first}:
        fill()
    require_space(folder, n_bytes, what)
    if "step 10" in what:
        fill()

checkpoint.require_space = full_later
"""


@needs_mounts
@pytest.mark.parametrize(
    ("first", "said"),
    [
        (True, r"the checkpoint of step 10 takes [\d.]+ MB, but the disk of \S+ has 1\.\d MB free"),
        (False, r"can't write disk/one/checkpoints/step-00000010/\S+: No space left on device"),
    ],
    ids=["before the save", "in the save"],
)
def test_a_disk_that_is_full_ends_the_run_with_6_and_keeps_the_checkpoint_before(
    launch, tmp_path, first, said
):
    more = FILL.replace("{first}", str(first))
    program = launch(more, prefix=on_a_small_disk(30), save_every=5, max_steps=20, **BIG)
    program.ends_with(6)
    assert re.search(said, program.err), program.err
    assert "Free some space there" in program.err
    left = tmp_path / "left" / "one"
    assert [path.name for path in checkpoints(left)] == ["step-00000005"]
    assert not [path for path in left.rglob("*") if path.name.startswith((".tmp", ".del"))]
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "left").rename(tmp_path / "disk")
    again = launch(save_every=5, max_steps=20, **BIG)
    again.ends_with(0)
    assert "Resuming disk/one: 5 of 20 steps are done" in again.out


@needs_mounts
def test_a_disk_too_small_for_the_first_checkpoints_is_told_before_training(launch):
    program = launch(prefix=on_a_small_disk(8), **BIG)
    program.ends_with(6)
    assert re.search(r"keeping 2 checkpoints .* takes [\d.]+ MB, .* has 8\.\d MB free", program.err)
    assert "Before training" not in program.out


@needs_mounts
@pytest.mark.parametrize("goes_on", [False, True], ids=["new", "unfinished"])
def test_a_read_only_disk_is_told_before_training(launch, tmp_path, goes_on):
    settings = {"OUTPUT_DIR": "disk"}
    fill = "true"
    if goes_on:
        stopped = launch(step_s=0.05, **settings)
        stopped.until(lambda: "Before training: the" in stopped.out)
        stopped.send(signal.SIGTERM)
        stopped.ends_with(143)
        (tmp_path / "disk").rename(tmp_path / "before")
        fill = "cp -a before/. disk/"
    prefix = on_a_small_disk(8, f"{fill} && mount -o remount,ro disk")
    program = launch(prefix=prefix, **settings)
    program.ends_with(6)
    assert "Read-only file system" in program.err
    assert "Before training" not in program.out and "Resuming" not in program.out


@needs_mounts
def test_a_small_disk_for_temporary_files_is_not_needed(launch, tmp_path):
    prefix = on_a_small_disk(1)
    program = launch(prefix=prefix, streams={"env": {"TMPDIR": str(tmp_path / "disk")}})
    program.ends_with(0)
    assert not list((tmp_path / "left").rglob(".tmp*"))  # everything is made beside its place


def test_a_run_folder_that_is_deleted_ends_the_run_with_6_and_is_not_made_anew(
    launch, run, tmp_path
):
    program = launch(step_s=0.03, save_every=5)
    program.until(lambda: (run / "checkpoints" / "step-00000010").exists())
    time.sleep(0.05)  # in the steps after it
    run.rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    program.ends_with(6)
    assert "runs/one" in program.err
    assert not run.exists()


BREAKAGES = {
    "metrics.jsonl as a folder": ("metrics.jsonl", lambda path: path.mkdir()),
    "samples.md as a folder": ("samples.md", lambda path: path.mkdir()),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_log_that_the_disk_refuses_is_said_and_ends_nothing(launch, run, breakage):
    name, spoil = BREAKAGES[breakage]
    program = launch(step_s=0.03, save_every=5, LOG_EVERY=1)
    program.until(lambda: (run / "checkpoints" / "step-00000010").exists())
    (run / name).unlink(missing_ok=True)
    spoil(run / name)
    program.ends_with(0)
    told = [line for line in program.out.splitlines() if "Training goes on" in line]
    assert len(told) == 1, program.out
    assert f"can't write runs/one/{name}" in told[0]
    assert (run / "summary.json").exists()
    assert checkpoints(run)[-1].name == f"step-{STEPS:08d}"


FULL_LOG = """
import shutil
append = journal.MetricsFile.append

def to_a_full_disk(metrics, rows):
    if rows[0]["step"] == 20:
        shutil.move(metrics.path, "disk/metrics.jsonl")
        metrics.path.symlink_to(Path("disk/metrics.jsonl").resolve())
        with open("disk/filler", "wb", buffering=0) as file:
            while shutil.disk_usage("disk").free:
                file.write(bytes(4096))
    append(metrics, rows)

journal.MetricsFile.append = to_a_full_disk
"""


@needs_mounts
def test_a_log_on_a_full_disk_is_said_and_ends_nothing(launch, run):
    own = "from training import journal" + FULL_LOG
    program = launch(own, prefix=on_a_small_disk(1), LOG_EVERY=1)
    program.ends_with(0)
    told = [line for line in program.out.splitlines() if "Training goes on" in line]
    assert len(told) == 1, program.out
    assert "No space left on device" in told[0]
    assert (run / "summary.json").exists()
    assert checkpoints(run)[-1].name == f"step-{STEPS:08d}"
