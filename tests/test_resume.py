"""A run that was stopped and goes on ends as one that was never stopped, bit for bit."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import environment
import train
from distributed import signals as stopping
from engine.errors import CheckpointError, Stopped
from storage.checkpoint import CheckpointStore, load_weights, read_safetensors
from tests.conftest import REPOSITORY
from tests.resuming import (
    ACCUMULATION,
    STEPS,
    STEPS_PER_EPOCH,
    Bench,
    check_stops,
    compare,
    of_steps,
    room_of,
    sha256,
    uninterrupted,
)
from training import learner

KINDS = {
    "muon in bf16": {"optimizer": "muon", "PRECISION": "bf16"},
    "random windows, accumulated": {"sampling": "random"} | ACCUMULATION,
}
# so high a rate that no evaluation is as good as an early one
PATIENT = {"patience": 3, "eval_freq": 2, "learning_rate": 3.0, "schedule": "constant"}


@pytest.fixture
def bench(workdir, monkeypatch) -> Bench:
    return Bench(workdir, monkeypatch)


# ----------------------------------------------------------------- stopped after a whole step


def test_a_run_stopped_after_each_of_its_steps_equals_one_that_was_never_stopped(bench):
    check_stops(bench, [*range(1, STEPS + 1)])
    rows = [json.loads(line) for line in (bench.run / "metrics.jsonl").open(encoding="utf-8")]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    evaluations = [row["step"] for row in rows if "val/loss" in row]
    assert evaluations == [0, 7, 8, 14, 16, 20] == bench.drawn["steps"]
    samples = (bench.run / "samples.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in samples if line.startswith("##")] == [
        "## Before training",
        "## After epoch 1",
        "## After epoch 2",
        "## After epoch 3",
    ]
    assert all(map(math.isfinite, bench.drawn["batch_losses"]))
    assert len(bench.drawn["batch_losses"]) == STEPS


@pytest.mark.parametrize("stop", [5, STEPS_PER_EPOCH])
def test_a_run_stopped_once_equals_one_that_was_never_stopped(bench, stop):
    check_stops(bench, [stop])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_resumes_exactly_wherever_it_is_stopped(bench, kind):
    # the first and last steps; 4, 8 and 16 are epochs' ends
    check_stops(bench, [1, 4, 7, 8, 13, 16, 17, 19], **KINDS[kind])


@pytest.mark.slow
def test_a_run_with_workers_resumes_exactly(bench):
    check_stops(bench, [7, 8, 13], num_workers=2)


def test_another_seed_gives_other_numbers(bench):
    one, another = uninterrupted(bench), uninterrupted(bench, SEED=124)
    assert one["weights"] != another["weights"]
    assert of_steps(one["rows"])[0] != of_steps(another["rows"])[0]


# ---------------------------------------------------------------- stopped at other moments


# an evaluation is two calls, one for each text; a session makes the one again that was stopped
@pytest.mark.parametrize("calls", [range(1, 17, 3), range(2, 23, 4)], ids=["first", "second"])
def test_a_run_stopped_in_each_evaluation_makes_it_again(bench, calls):
    bench.describe("run")
    bench.signal_at("mean_loss", *calls)
    compare(bench.finish(), uninterrupted(bench))
    assert bench.stopped_at == [0, 7, 8, 14, 16, 20]


def test_a_run_stopped_while_it_writes_each_sample_resumes_exactly(bench):
    bench.patch.setattr(train, "SAMPLE_EVERY", 3)  # so that it writes between epochs' ends, too
    settings, samples = {"eval_freq": 3}, [0, 3, 6, 8, 12, 15, 16, 20]
    expected = uninterrupted(bench, **settings)
    bench.describe("run", **settings)
    bench.signal_at("generate", 1, *range(3, len(samples) + 2))  # that of step 0 comes again
    compare(bench.finish(), expected)
    assert bench.stopped_at == samples


def test_a_long_step_is_left_between_micro_batches_and_done_again(bench, monkeypatch):
    monkeypatch.setattr(stopping, "_LONG_S", 0.0)
    expected = uninterrupted(bench, **ACCUMULATION)
    bench.describe("run", **ACCUMULATION)
    # in step 1 the first and then the third of 4, the first after an epoch's short step of 3,
    # and the second in the last epoch
    bench.signal_at("batch_loss", 1, 4, 20, 71)
    for step in (0, 0, 4, 17):
        assert not bench.session()
        assert bench.stopped_at[-1] == step
        assert all(parameter.grad is None for parameter in bench.env.model.parameters())
    compare(bench.finish(), expected)


def test_a_short_step_is_finished_before_the_run_stops(bench):
    bench.describe("run", **ACCUMULATION)
    bench.signal_at("batch_loss", 4 + 2)
    compare(bench.finish(), uninterrupted(bench, **ACCUMULATION))
    assert bench.stopped_at == [2]


def test_ctrl_c_does_what_a_termination_does(bench):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        bench.describe("run")
        real = learner.take_step

        def interrupted(*arguments, **keywords):
            signal.raise_signal(signal.SIGINT)
            return real(*arguments, **keywords)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learner, "take_step", interrupted)
            env = environment.prepare_environment("settings.py")
            with pytest.raises(Stopped, match="Stopped after step 1 of 20: saved in") as caught:
                train.train(env)
        assert caught.value.exit_code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        compare(bench.finish(), uninterrupted(bench))
    finally:
        signal.signal(signal.SIGINT, before)


# --------------------------------------------------------- ended without having saved


class Crash(Exception):
    """The end of a program that had no time to save."""


@pytest.mark.parametrize(
    ("function", "calls"),
    [("take_step", [3, 15, 24]), ("mean_loss", [2, 6, 10, 17]), ("generate", [1, 3, 5, 6])],
)
def test_what_came_after_the_last_checkpoint_is_done_again_exactly(bench, function, calls):
    bench.describe("run", save_every=5)
    room, count = room_of(function), 0
    real = getattr(room, function)

    def crash(*arguments, **keywords):
        nonlocal count
        count += 1
        if count in calls:
            raise Crash
        return real(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, function, crash)
        for _ in calls:
            with pytest.raises(Crash):
                bench.session()
    compare(bench.finish(), uninterrupted(bench, save_every=5))


@pytest.mark.parametrize("settings", [{}, PATIENT], ids=["to its end", "patient"])
def test_a_run_started_again_after_its_last_step_has_nothing_to_change(bench, settings):
    bench.describe("run", save_every=2, **settings)
    first = bench.finish()
    for _ in range(2):
        compare(bench.finish(), first)


def test_a_sealed_state_that_lacks_a_part_ends_the_run_and_names_the_checkpoint(bench):
    bench.describe("run")
    bench.signal_at("take_step", 5)
    assert not bench.session()
    restore = CheckpointStore.restore
    for part in ("steps", "journal", "random", "scaler", "schedule", "total_steps"):

        def lacking(store, *arguments, part=part):
            state, best = restore(store, *arguments)
            return {name: value for name, value in state.items() if name != part}, best

        bench.patch.setattr(CheckpointStore, "restore", lacking)
        with pytest.raises(CheckpointError, match=f"step-00000005 can't be gone on .*'{part}'"):
            bench.session()


# -------------------------------------------------------------------- what may change


def test_another_evaluation_frequency_on_resume_leaves_training_exact(bench):
    expected = uninterrupted(bench)
    bench.describe("run")
    bench.signal_at("take_step", 9, after=True)
    assert not bench.session()
    bench.describe("run", eval_freq=3, eval_iter=1, save_every=4, LOG_EVERY=2)
    found = bench.finish()
    assert of_steps(found["rows"]) == of_steps(expected["rows"])
    for part in ("weights", "optimizer", "generator", "saved weights", "saved optimizer"):
        assert found[part] == expected[part]
    assert found["history"]["steps"] == [0, 7, 8, 9, 12, 15, 16, 18, 20]


@pytest.mark.parametrize(("kind", "done"), [("cosine", STEPS), ("wsd", 10)])
def test_a_run_made_longer_goes_on_at_the_rates_of_its_plan_and_resumes_exactly(bench, kind, done):
    outcomes = []
    for name, stops in (("once", [done]), ("often", [done, done + 2, 21, 27])):
        bench.describe(name, schedule=kind)
        with pytest.MonkeyPatch.context() as patch:
            bench.patch = patch
            bench.signal_at("take_step", *stops, after=True)
            assert not bench.session()
            bench.describe(name, schedule=kind, max_steps=30)
            outcomes.append(bench.finish())
    compare(outcomes[1], outcomes[0])
    assert outcomes[0]["saved step"] == "step-00000030"
    rows = [of_steps(uninterrupted(bench, schedule=kind)["rows"]), of_steps(outcomes[0]["rows"])]
    old, rates = ([float.fromhex(row["train/lr"]) for row in each] for each in rows)
    if kind == "cosine":  # at its last rate
        assert rates == old + [old[-1]] * 10
    else:  # the decay of a fifth had not begun: it moves to the new end
        assert rates == old[:16] + [0.01] * 10 + old[16:]


def test_more_epochs_go_on_with_the_steps_that_follow(bench):
    epochs = {"max_steps": None, "schedule": "constant"}
    bench.describe("run", num_epochs=1, **epochs)
    assert len(of_steps(bench.finish()["rows"])) == STEPS_PER_EPOCH
    bench.describe("run", num_epochs=2, **epochs)
    found, expected = bench.finish(), uninterrupted(bench, num_epochs=2, **epochs)
    assert of_steps(found["rows"]) == of_steps(expected["rows"])
    assert found["weights"] == expected["weights"]


# -------------------------------------------------------------------------- the best weights


def evaluate_worse(bench: Bench, after: int = 0) -> None:
    """Let all evaluations be worse from here on, or after so many calls of mean_loss."""
    real, calls = learner.mean_loss, []

    def worse(*arguments):
        calls.append(1)
        return real(*arguments) + 100.0 * (len(calls) > after)

    bench.patch.setattr(learner, "mean_loss", worse)


def test_worse_evaluations_after_a_resume_leave_the_best_weights_alone(bench):
    bench.describe("run")
    bench.signal_at("take_step", 10, after=True)
    assert not bench.session()
    (best,) = (bench.run / "best").iterdir()
    content = (best / "model.safetensors").read_bytes()
    evaluate_worse(bench)
    history = bench.finish()["history"]
    assert list((bench.run / "best").iterdir()) == [best]
    assert (best / "model.safetensors").read_bytes() == content
    assert int(best.name[5:]) in (7, 8)
    assert bench.journal.history.steps[bench.journal.history.best] == int(best.name[5:])
    assert history["val_losses"][-1] > 100


def test_best_weights_that_were_lost_are_followed_by_the_best_of_those_to_come(bench, capsys):
    bench.describe("run", eval_freq=5)
    bench.signal_at("take_step", 12)
    assert not bench.session()
    (held,) = (bench.run / "best").iterdir()
    (held / "model.safetensors").write_bytes(b"damaged")
    evaluate_worse(bench)
    assert bench.session()
    assert "the best weights are lost" in capsys.readouterr().out
    history = bench.journal.history
    later = {s: x for s, x in zip(history.steps, history.val_losses, strict=True) if s > 12}
    kept = max(int(path.name[5:]) for path in (bench.run / "best").glob("step-*"))
    assert kept == min(later, key=later.get)


def test_a_finished_run_that_is_made_longer_keeps_its_last_evaluation_and_best_weights(bench):
    bench.describe("run")
    before = bench.finish()["history"]
    assert before["steps"][-1] == STEPS
    evaluate_worse(bench, after=2)  # the first pair is that of the old end
    bench.describe("run", max_steps=30)
    assert bench.session()
    history = bench.journal.history
    assert history.steps[: len(before["steps"])] == before["steps"]
    assert history.val_losses[: len(before["steps"])] == before["val_losses"]
    assert history.best == before["val_losses"].index(min(before["val_losses"]))
    assert (bench.run / "best" / f"step-{history.steps[history.best]:08d}").is_dir()


def test_patience_ends_an_interrupted_run_where_it_ends_the_whole_one(bench):
    history = uninterrupted(bench, **PATIENT)["history"]
    assert 7 < history["steps"][-1] < STEPS
    check_stops(bench, [3, 4, 6, 7], **PATIENT)
    best = history["steps"][history["val_losses"].index(min(history["val_losses"][1:]))]
    assert bench.journal.weights_of_step == best
    folder = bench.run / "best" / f"step-{best:08d}"
    kept = copy.deepcopy(bench.env.model.state_dict())
    load_weights(bench.env.model, read_safetensors(folder / "model.safetensors"), folder)
    assert sha256(*bench.env.model.state_dict().values()) == sha256(*kept.values())


# -------------------------------------------------------------- what the numbers depend on

ELSEWHERE = """
import json, sys
from pathlib import Path
import pytest, torch
from tests.resuming import Bench
torch.set_num_threads(1)
with pytest.MonkeyPatch.context() as patch:
    bench = Bench(Path(sys.argv[1]), patch)
    bench.describe("run")
    print("OUTCOME " + json.dumps(bench.finish()))
"""


@pytest.mark.slow
def test_another_process_folder_and_hash_seed_give_the_same_numbers(bench):
    folder = bench.folder / "another place 春"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)],
        env=os.environ | {"PYTHONHASHSEED": "4711", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("OUTCOME "))
    compare(json.loads(line.removeprefix("OUTCOME ")), uninterrupted(bench))


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler, and there is none",
)
def test_a_compiled_run_resumes_exactly(bench, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(bench.folder / "compiled"))
    session = Bench.session

    def as_a_process_of_its_own(run: Bench) -> bool:
        torch.compiler.reset()
        return session(run)

    monkeypatch.setattr(Bench, "session", as_a_process_of_its_own)
    check_stops(bench, [5, 13], COMPILE=True)
    assert bench.env.run.record.compiled
    assert bench.env.run.record.changes == []
