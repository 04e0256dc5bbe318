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
import time
from pathlib import Path

import pytest

from storage.files import verify_folder
from tests.launching import STEPS, Program, launching, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="POSIX signals")]


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


def test_signals_at_any_time_save_and_the_last_start_finishes(launch, run):
    done, chance = 0, random.Random(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        program = launch(step_s=0.03)
        program.until_it_trains()
        time.sleep(chance.uniform(0, 0.5))
        program.send(number)
        program.ends_with(128 + number)
        assert "Stopping after this step; Ctrl-C again stops at once, without" in program.err
        before, done = done, saved_steps(program, run)
        assert before <= done < STEPS
    assert_finishes(launch(), done)


def test_a_closed_terminal_under_nohup_and_a_pause_end_nothing(launch, run):
    streams = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    program = launch(step_s=0.02, streams=streams | ignoring)
    assert program.process.stdout.readline().startswith(b"=")
    program.process.stdout.close()  # nobody reads the output any more
    program.process.stderr.close()
    program.send(signal.SIGHUP)
    program.until((run / "metrics.jsonl").exists)
    program.send(signal.SIGSTOP)
    time.sleep(0.5)
    program.send(signal.SIGCONT)
    program.ends_with(0)
    assert (run / "summary.json").exists()


def test_output_that_a_closed_pipe_takes_no_more_ends_nothing(launch, run):
    program = launch(step_s=0.02, streams={"stdout": subprocess.PIPE})  # as by head
    assert program.process.stdout.readline().startswith(b"=")
    program.process.stdout.close()
    program.ends_with(0)
    assert (run / "summary.json").exists()


SLOW_SAVES = """
from storage import files as storage
write = storage.NewFolder.write

def slow_write(folder, name, chunks):
    write(folder, name, chunks)
    if Path("slow").exists():
        time.sleep(600)

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
    program.ends_with(130)
    assert "Stopped. What was measured so far is in runs/one" in program.err
    left = checkpoints(run)
    assert left[-1].name < "step-00000030"
    (tmp_path / "slow").unlink()
    assert_finishes(launch(), int(left[-1].name[5:]))


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
            program.ends_with(130)
    assert program.err.strip() == "Stopped."
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "cache").rglob("*verdict*"))


# a long epoch: between two of them there is no worker
WORKERS = {"num_workers": 2, "stride": 1, "max_steps": 400}


def test_a_signal_to_the_whole_group_saves_and_leaves_no_worker_behind(launch, run):
    for number in (signal.SIGINT, signal.SIGTERM):
        program = launch(step_s=0.02, LOG_EVERY=1, **WORKERS)
        program.until(lambda p=program: p.out.count("batch loss") > 1)  # both are under way
        assert len(program.living()) == 3
        os.killpg(program.pid, number)
        program.ends_with(128 + number)
        assert program.err.count("Stopping after this step") == 1, "a worker speaks, too"
        done = saved_steps(program, run)
    assert_finishes(launch(**WORKERS), done, 400)


def test_a_worker_that_is_killed_ends_the_run_with_6_and_a_word(launch, run):
    program = launch(step_s=0.02, save_every=20, **WORKERS)
    program.until(lambda: (run / "checkpoints" / "step-00000020").exists())
    worker = max(program.living())
    assert worker != program.pid
    os.kill(worker, signal.SIGKILL)
    program.ends_with(6)
    assert "a process that prepares batches was ended from outside" in program.err
    assert "Set num_workers to 0" in program.err
    newest = max((run / "checkpoints").glob("step-*"))
    verify_folder(newest)
    assert_finishes(launch(**WORKERS), int(newest.name[5:]), 400)


def test_an_error_of_ours_ends_a_run_that_has_workers(launch):
    more = (
        "step = learner.take_step\n"
        "def broken(*arguments, **options):\n"
        "    raise ZeroDivisionError('a bug of ours')\n"
        "learner.take_step = broken\n"
    )
    program = launch(more, num_workers=2)
    assert program.process.wait(60) == 1
    assert "ZeroDivisionError: a bug of ours" in program.err
    wait_until(lambda: not program.living(), within_s=15)


# -------------------------------------------------------------------------------- two programs

WAITING = """
def step_when_told(*arguments, **options):
    while not Path("go-on").exists():
        time.sleep(0.01)
    return take_step(*arguments, **options)

learner.take_step = step_when_told
"""


def test_a_second_program_in_the_same_folder_exits_7_and_names_the_first(launch, tmp_path):
    first = launch(WAITING, RUN_NAME=None)
    first.until_it_trains()
    second = launch(RUN_NAME=None)
    second.ends_with(7)
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"{folder} is in use by process {first.pid} on {socket.gethostname()}" in second.err
    assert "Before training" not in second.out and "Resuming" not in second.out
    assert first.process.poll() is None
    (tmp_path / "go-on").touch()
    first.ends_with(0)
    assert (folder / "summary.json").exists()
    assert len(list((folder / "checkpoints").iterdir())) == 1


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
import shutil
from storage import checkpoint
require_space = checkpoint.require_space

def full_later(folder, n_bytes, what):
    require_space(folder, n_bytes, what)
    if "step 10" in what:
        with open("disk/filler", "wb", buffering=0) as file:
            while (free := shutil.disk_usage("disk").free) > 1 << 20:
                file.write(bytes(min(free - (1 << 20), 1 << 20)))

checkpoint.require_space = full_later
"""


@needs_mounts
def test_a_disk_that_is_full_ends_the_run_with_6_and_keeps_the_checkpoint_before(launch, tmp_path):
    settings = {"save_every": 5, "max_steps": 20} | BIG
    program = launch(FILL, prefix=on_a_small_disk(30), **settings)
    program.ends_with(6)
    said = r"can't write disk/one/checkpoints/step-00000010/\S+: No space left on device"
    assert re.search(said, program.err), program.err
    assert "Free some space there" in program.err
    left = tmp_path / "left" / "one"
    assert [path.name for path in checkpoints(left)] == ["step-00000005"]
    assert not [path for path in left.rglob("*") if path.name.startswith((".tmp", ".del"))]
    shutil.rmtree(tmp_path / "disk")
    (tmp_path / "left").rename(tmp_path / "disk")
    again = launch(**settings)
    again.ends_with(0)
    assert "Resuming disk/one: 5 of 20 steps are done" in again.out


@needs_mounts
def test_a_read_only_disk_is_told_before_training(launch, tmp_path):
    stopped = launch(step_s=0.05, OUTPUT_DIR="disk")
    stopped.until_it_trains()
    stopped.send(signal.SIGTERM)
    stopped.ends_with(143)
    (tmp_path / "disk").rename(tmp_path / "before")
    prefix = on_a_small_disk(8, "cp -a before/. disk/ && mount -o remount,ro disk")
    for name in ("one", "new"):
        program = launch(prefix=prefix, OUTPUT_DIR="disk", RUN_NAME=name)
        program.ends_with(6)
        assert "Read-only file system" in program.err
        assert "Before training" not in program.out and "Resuming" not in program.out
        shutil.rmtree(tmp_path / "left", ignore_errors=True)


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
