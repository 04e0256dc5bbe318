"""A file named stop in a run's folder: it stops the run as Ctrl-C does, and no other run."""

import signal
import sys
import threading
import time

import pytest

import environment
import main
import train
from distributed import signals
from distributed.signals import StopSignals
from engine.errors import BusyError, Stopped
from storage.files import STOP, FolderLock
from tests.ranks import run_ranks, write_tiny_run
from tests.resuming import STEPS, Bench, compare, uninterrupted
from training import learner


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def ask_at(bench: Bench, step: int) -> None:
    """Put the file into the run's folder while this step is made, counted from 1."""
    real, steps = learner.take_step, []

    def asked(*arguments, **options):
        if options.get("stop") is not None:  # a trial's steps have none
            steps.append(1)
            if len(steps) == step:
                (bench.run / STOP).touch()
        return real(*arguments, **options)

    bench.patch.setattr(learner, "take_step", asked)


def test_a_run_saves_and_stops_after_the_step_and_ends_as_if_nobody_had_asked(bench, capsys):
    expected = uninterrupted(bench)
    bench.describe("run")
    bench.patch.setattr(signals, "ASK_S", 0.0)
    ask_at(bench, 6)
    assert main.main(["settings.py"]) == 130
    said = capsys.readouterr().err
    assert "Stopping after this step, as the file named stop asks for" in said
    assert f"Stopped after step 6 of {STEPS}: saved in" in said
    assert not (bench.run / STOP).exists()
    (bench.run / STOP).touch()  # too late: nothing trains here
    compare(bench.finish(), expected)
    assert not (bench.run / STOP).exists()


def test_a_request_is_looked_for_once_a_second_and_a_ctrl_c_after_it_is_a_first_one(
    monkeypatch, capsys
):
    now, asked = 100.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StopSignals(requested=lambda: asked.append(now) or len(asked) == 3) as stop:
        for _ in range(8):
            stop.check()
            now += 0.25
        assert stop.has_come
        assert asked == [100.0, 101.0, 102.0]
        for _ in range(3):
            with pytest.raises(Stopped) as caught:
                stop.check()
        assert caught.value.exit_code == 130
        now += 10
        signal.raise_signal(signal.SIGINT)  # whoever is at the terminal has asked for nothing yet
        now += 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(asked) == 3
    assert capsys.readouterr().err.count("Stopping after this step") == 2


def test_an_evaluation_is_left_by_a_request_too(bench):
    bench.describe("run", eval_iter=50)
    bench.patch.setattr(signals, "ASK_S", 0.0)
    env, real = environment.prepare_environment("settings.py"), learner.batch_loss

    def asked(*arguments, **options):
        (bench.run / STOP).touch()
        return real(*arguments, **options)

    bench.patch.setattr(learner, "batch_loss", asked)
    with pytest.raises(Stopped, match="nothing was trained yet"):
        train.train(env)


def test_a_look_whether_a_folder_is_locked_neither_takes_the_lock_nor_spoils_a_start(tmp_path):
    lock = FolderLock(tmp_path)
    assert not lock.is_held()
    assert not (tmp_path / ".lock").exists()
    with FolderLock(tmp_path):
        assert lock.is_held()
    assert not lock.is_held()
    with pytest.MonkeyPatch.context() as patch:
        real, tries = FolderLock._take, []

        def looked_at(self, file):
            tries.append(file)
            if len(tries) == 1:
                raise BusyError("somebody looks at it in this moment")
            real(self, file)

        patch.setattr(FolderLock, "_take", looked_at)
        with FolderLock(tmp_path):
            assert len(tries) == 2


# the file comes in the third step of the main rank, where both ranks are in training
ASKED = f"""
import sys
from pathlib import Path
import main, storage.cache
from distributed import signals
from training import learner
storage.cache.CACHE = Path("cache").resolve()
signals.ASK_S = 0.0
real, steps = learner.take_step, []

def asked(*arguments, **options):
    if options.get("stop") is not None:
        steps.append(1)
        if len(steps) == 3:
            Path("runs/one/{STOP}").touch()
    return real(*arguments, **options)

learner.take_step = asked
sys.exit(main.main(["settings.py"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torchrun's forks are Linux's")
def test_two_ranks_stop_after_the_same_step(tmp_path):
    (tmp_path / "text.txt").write_text("the river carries the bell " * 40, encoding="utf-8")
    params = {"max_steps": 40, "batch_size": 2, "max_length": 16, "eval_freq": 50, "eval_iter": 1}
    params |= {"model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1}}
    write_tiny_run(tmp_path, "settings.py", params, DATA="text.txt", RUN_NAME="one")
    job = run_ranks(tmp_path, 2, program=ASKED, code=1)  # torchrun's own where ranks end otherwise
    assert job.err.count("as the file named stop asks for") == 1
    assert job.err.count("Stopped after step 3 of 40") >= 1
    saved = sorted(path.name for path in (tmp_path / "runs/one/checkpoints").glob("step-*"))
    assert saved == ["step-00000003"]
    assert not (tmp_path / "runs" / "one" / STOP).exists()


def test_other_threads_may_ask_as_well():
    seen = []

    def work() -> None:
        with StopSignals(requested=lambda: True) as stop:
            try:
                stop.check()
            except Stopped as stopped:
                seen.append(stopped.exit_code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [130]
