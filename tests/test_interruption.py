"""Whole programs that are stopped, killed, robbed of their disk and started again.

Each is a process of its own with real signals and real file systems. That what they come to is
exact is test_resume's matter; here it is how they end, what they leave and what they say.
"""

import os
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from storage.files import verify_folder
from tests.launching import STEPS, Program, launching, needs_mounts, on_a_small_disk, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="POSIX signals")]

HOLD = """
steps = []

def held(*arguments, **options):
    steps.append(1)
    if len(steps) == AT:
        Path("held").touch()
        while not Path("go-on").exists():
            time.sleep(0.01)
        Path("held").unlink()
        Path("go-on").unlink()
    return take_step(*arguments, **options)

learner.take_step = held
"""


@pytest.fixture
def launch(tmp_path):
    with launching(tmp_path) as start:
        yield start


@pytest.fixture
def launch_held(launch):
    """Start a run and wait until it is at a step, where it stays until go_on()."""

    def start(step: int, more: str = "", **settings) -> Program:
        program = launch(more + HOLD.replace("AT", str(step)), **settings)
        program.until((program.folder / "held").exists)
        return program

    return start


def go_on(program: Program) -> None:
    (program.folder / "go-on").touch()


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


def checkpoints(run: Path) -> list[str]:
    """The whole checkpoints of a run, oldest first; nothing else may be there."""
    found = sorted((run / "checkpoints").iterdir())
    assert all(re.fullmatch(r"step-\d{8}", path.name) for path in found), found
    for path in found:
        verify_folder(path)
    return [path.name for path in found]


def assert_finishes(program: Program, done: int) -> None:
    program.ends_with(0)
    assert f"Resuming runs/one: {done} of {STEPS} steps are done" in program.out
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
        assert checkpoints(run)[-1] == f"step-{step:08d}"
    return step


def test_signals_at_any_time_save_and_the_last_start_finishes(launch, run):
    done, chance = 0, random.Random(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        program = launch(step_s=0.3)
        program.until_it_trains()
        time.sleep(chance.uniform(0, 0.5))
        program.send(number)
        program.ends_with(128 + number)
        assert "Stopping after this step; Ctrl-C again stops at once, without" in program.err
        before, done = done, saved_steps(program, run)
        assert before <= done < STEPS
    assert_finishes(launch(), done)


FOR_NOBODY = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
reader, writer = os.pipe()
os.close(reader)
for handle in HANDLES:
    os.dup2(writer, handle)
sys.stdout, sys.stderr = (open(handle, "w", closefd=False) for handle in (1, 2))
"""


@pytest.mark.parametrize("handles", ["1,", "1, 2"], ids=["by head", "under nohup"])
def test_a_closed_terminal_or_pipe_and_a_pause_end_nothing(launch_held, run, handles):
    program = launch_held(5, FOR_NOBODY.replace("HANDLES", handles))
    for number in (signal.SIGHUP, signal.SIGSTOP, signal.SIGCONT):
        program.send(number)
        time.sleep(0.2)
    go_on(program)
    program.ends_with(0)
    assert (run / "summary.json").exists()


SLOW_SAVE = """
from storage import files as storage
write = storage.NewFolder.write

def slow_write(folder, name, chunks):
    write(folder, name, chunks)
    if folder.path.name == "step-00000007":
        time.sleep(600)

storage.NewFolder.write = slow_write
"""


def test_a_second_ctrl_c_while_it_saves_stops_at_once_with_the_checkpoint_before(
    launch, launch_held, run
):
    program = launch_held(7, SLOW_SAVE, save_every=5)
    program.send(signal.SIGINT)
    go_on(program)
    program.until(lambda: list((run / "checkpoints").glob(".tmp-*/model.safetensors")))
    time.sleep(0.7)  # what comes sooner is an echo of the first one
    program.send(signal.SIGINT)
    program.ends_with(130)
    assert "Stopped. What was measured so far is in runs/one" in program.err
    assert checkpoints(run) == ["step-00000005"]
    assert_finishes(launch(), 5)


def test_ctrl_c_in_a_download_that_hangs_leaves_nothing(launch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.txt"
        more = (
            "import dataclasses\nfrom text.corpora import CORPORA\n"
            "os.environ['no_proxy'] = '127.0.0.1'\n"
            f"there = dataclasses.replace(CORPORA['the-verdict'], url='{url}')\n"
            "CORPORA['the-verdict'] = there\n"
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


# with a long epoch: between two of them there is no worker
WORKERS = {"num_workers": 2, "stride": 1}


def test_a_signal_to_the_whole_group_saves_and_leaves_no_worker_behind(launch, launch_held, run):
    done = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        program = launch_held(3, **WORKERS)
        assert len(program.living()) == 3
        os.killpg(program.pid, number)
        go_on(program)
        program.ends_with(128 + number)
        assert program.err.count("Stopping after this step") == 1, "a worker speaks, too"
        done += 3
        assert saved_steps(program, run) == done
    assert_finishes(launch(**WORKERS), done)


def test_a_worker_that_is_killed_ends_the_run_with_6_and_a_word(launch, launch_held, run):
    program = launch_held(25, save_every=20, **WORKERS)
    worker = max(program.living())
    assert worker != program.pid
    os.kill(worker, signal.SIGKILL)
    go_on(program)
    program.ends_with(6)
    assert "a process that prepares batches was ended from outside" in program.err
    assert "Set num_workers to 0" in program.err
    assert checkpoints(run)[-1] == "step-00000020"
    assert_finishes(launch(**WORKERS), 20)


def test_an_error_of_ours_ends_a_run_that_has_workers(launch):
    # where the program does not end them its workers live on, and long
    more = "from distributed import signals\nsignals._LINGER_S = 0.5\n"
    program = launch(more + "learner.take_step = lambda *_, **__: 1 / 0", num_workers=2)
    assert program.process.wait(60) == 1
    assert "ZeroDivisionError: division by zero" in program.err
    wait_until(lambda: not program.living())


@needs_mounts
def test_a_disk_that_stays_full_ends_the_run_with_6_and_keeps_the_checkpoint_before(
    launch, tmp_path
):
    # two checkpoints of 1.6 MB of weights and twice as much of moments do not fit
    model = {"emb_dim": 128, "n_heads": 2, "n_layers": 2}
    settings = {"save_every": 5, "max_steps": 20, "OUTPUT_DIR": "disk", "model_overrides": model}
    filled_since = "from storage import checkpoint\ncheckpoint.require_space = lambda *_: None\n"
    at_once = "checkpoint.RETRY_S = 0.0\nimport train\ntrain.END_WAITS_S = ()\n"
    program = launch(on_a_small_disk("8m") + filled_since + at_once, **settings)
    program.ends_with(6)
    said = r"can't write disk/one/checkpoints/step-000000{}/\S+: No space left on device"
    assert re.search(said.format(10) + ".* Training goes on", program.out), program.out
    assert re.search(said.format(20), program.err), program.err
    assert "Free some space there" in program.err
    assert "The last checkpoint: disk/one/checkpoints/step-00000005" in program.err
    left = tmp_path / "left" / "one"
    assert checkpoints(left) == ["step-00000005"]
    assert not [path for path in left.rglob("*") if path.name.startswith((".tmp", ".del"))]
    (tmp_path / "disk").rmdir()  # outside, nothing is on it
    (tmp_path / "left").rename(tmp_path / "disk")
    again = launch(**settings)
    again.ends_with(0)
    assert "Resuming disk/one: 5 of 20 steps are done" in again.out


@needs_mounts
def test_a_read_only_disk_is_told_before_training(launch, launch_held, tmp_path):
    stopped = launch_held(2, OUTPUT_DIR="disk")
    stopped.send(signal.SIGTERM)
    go_on(stopped)
    stopped.ends_with(143)
    (tmp_path / "disk").rename(tmp_path / "before")
    disk = on_a_small_disk("8m", "cp -a before/. disk/ && mount -o remount,ro disk")
    for name in ("one", "new"):
        program = launch(disk, OUTPUT_DIR="disk", RUN_NAME=name)
        program.ends_with(6)
        assert "Read-only file system" in program.err
        assert "Before training" not in program.out and "Resuming" not in program.out
        shutil.rmtree(tmp_path / "left")


def test_a_run_folder_that_is_deleted_ends_the_run_with_6_and_is_not_made_anew(
    launch_held, run, tmp_path
):
    program = launch_held(12, save_every=5)
    run.rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    go_on(program)
    program.ends_with(6)
    assert "runs/one" in program.err
    assert not run.exists()
