"""A run that was stopped and goes on ends as one that was never stopped, bit for bit."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import train
from distributed import signals as stopping
from engine.compiling import what_prevents_compiling
from storage.checkpoint import load_weights, read_safetensors
from tests.conftest import REPOSITORY
from tests.resuming import (
    ACCUMULATION,
    STEPS,
    Bench,
    check_stops,
    compare,
    of_steps,
    room_of,
    rows_of,
    sha256,
    uninterrupted,
)
from training import learner

MUON = {"optimizer": "muon", "PRECISION": "bf16", "sampling": "random"} | ACCUMULATION
# so high a rate that no evaluation is as good as an early one
PATIENT = {"patience": 3, "eval_freq": 2, "learning_rate": 3.0, "schedule": "constant"}


@pytest.fixture
def bench(workdir, monkeypatch) -> Bench:
    return Bench(workdir, monkeypatch)


@pytest.mark.slow
def test_a_run_stopped_after_many_of_its_steps_equals_one_that_was_never_stopped(bench):
    # evaluations are after 7 and 14, epochs' ends after 8 and 16
    check_stops(bench, [1, 7, 8, 9, 16, STEPS])
    rows = rows_of(bench.run)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    evaluations = [row["step"] for row in rows if "val/loss" in row]
    assert evaluations == [0, 7, 8, 14, 16, 20] == bench.drawn["steps"]
    samples = (bench.run / "samples.md").read_text(encoding="utf-8").splitlines()
    headings = ["Before training", *(f"After epoch {n}" for n in (1, 2, 3))]
    assert [line[3:] for line in samples if line.startswith("##")] == headings
    assert all(map(math.isfinite, bench.drawn["batch_losses"]))
    assert len(bench.drawn["batch_losses"]) == STEPS


@pytest.mark.slow
def test_a_run_by_muon_in_bf16_on_random_windows_accumulated_resumes_exactly(bench):
    check_stops(bench, [1, 7, 8], **MUON)  # 8 is an epoch's end


@pytest.mark.slow
def test_a_run_with_workers_resumes_exactly(bench):
    check_stops(bench, [7], num_workers=2)


def test_another_seed_gives_other_numbers(bench):
    one, another = uninterrupted(bench), uninterrupted(bench, SEED=124)
    assert one["weights"] != another["weights"]
    assert of_steps(one["rows"])[0] != of_steps(another["rows"])[0]


def test_a_run_stopped_while_it_writes_samples_resumes_exactly(bench):
    bench.patch.setattr(train, "SAMPLE_EVERY", 3)  # so that it writes between epochs' ends, too
    expected = uninterrupted(bench, eval_freq=3)
    bench.describe("run", eval_freq=3)
    bench.signal_at("generate", 1, 3, 5, 9)  # that of step 0 comes again
    compare(bench.finish(), expected)
    assert bench.stopped_at == [0, 3, 8, 20]


@pytest.mark.slow
def test_a_long_step_is_left_between_micro_batches_and_done_again_and_a_short_one_finished(bench):
    bench.patch.setattr(stopping, "_LONG_S", 0.0)
    bench.describe("run", **ACCUMULATION)
    # in step 1 the first and then the third of 4, the first after an epoch's short step of 3,
    # the second in step 18, and the second in that step once more
    bench.signal_at("batch_loss", 1, 4, 20, 71, 73)
    for step in (0, 0, 4, 17, 18):
        if step == 18:
            bench.patch.setattr(stopping, "_LONG_S", 600.0)
        assert not bench.session()
        assert bench.stopped_at[-1] == step
        assert all(parameter.grad is None for parameter in bench.env.model.parameters())
    compare(bench.finish(), uninterrupted(bench, **ACCUMULATION))


class Crash(Exception):
    """The end of a program that had no time to save."""


def test_what_came_after_the_last_checkpoint_is_done_again_exactly(bench):
    bench.describe("run", save_every=5)
    # in step 3, in step 7's second evaluation, in step 8's sample, and in step 17
    for function, call in (("take_step", 3), ("mean_loss", 4), ("generate", 1), ("take_step", 12)):
        room, calls = room_of(function), iter(range(1, call))
        real = getattr(room, function)

        def crash(*arguments, real=real, calls=calls, **keywords):
            if next(calls, None) is None:
                raise Crash
            return real(*arguments, **keywords)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            patch.setattr(room, function, crash)
            bench.session()
    compare(bench.finish(), uninterrupted(bench, save_every=5))


def test_a_run_that_patience_ended_has_nothing_to_change_when_it_is_started_again(bench):
    bench.describe("run", save_every=2, **PATIENT)
    compare(bench.finish(), bench.finish())


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


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "done"), [("cosine", STEPS), ("wsd", 10)])
def test_a_run_made_longer_goes_on_at_the_rates_of_its_plan_and_resumes_exactly(bench, kind, done):
    outcomes = []
    for name, stops in (("once", [done]), ("often", [done, done + 2, 27])):
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


def evaluate_worse(bench: Bench, after: int = 0) -> None:
    """Let all evaluations be worse from here on, or after so many calls of mean_loss."""
    real, calls = learner.mean_loss, []

    def worse(*arguments):
        calls.append(1)
        return real(*arguments) + 100.0 * (len(calls) > after)

    bench.patch.setattr(learner, "mean_loss", worse)


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
    check_stops(bench, [4, 6], **PATIENT)
    best = history["steps"][history["val_losses"].index(min(history["val_losses"][1:]))]
    assert bench.journal.weights_of_step == best
    folder = bench.run / "best" / f"step-{best:08d}"
    kept = copy.deepcopy(bench.env.model.state_dict())
    load_weights(bench.env.model, read_safetensors(folder / "model.safetensors"), folder)
    assert sha256(*bench.env.model.state_dict().values()) == sha256(*kept.values())


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
    what_prevents_compiling(torch.device("cpu")) is not None, reason="needs a C++ compiler"
)
def test_a_compiled_run_resumes_exactly_and_learns_what_an_uncompiled_one_does(bench, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(bench.folder / "compiled"))
    session = Bench.session

    def as_a_process_of_its_own(run: Bench) -> bool:
        torch.compiler.reset()
        return session(run)

    monkeypatch.setattr(Bench, "session", as_a_process_of_its_own)
    model = {"emb_dim": 16, "n_heads": 2, "n_layers": 1}  # without dropout, whose numbers differ
    check_stops(bench, [13], COMPILE=True, model_overrides=model)
    assert bench.env.run.record.compiled
    assert bench.env.run.record.changes == []
    assert list((bench.folder / "compiled").rglob("*.so"))
    runs = [uninterrupted(bench, COMPILE=on, model_overrides=model) for on in (True, False)]
    compiled, plain = (
        [float.fromhex(row["train/loss"]) for row in of_steps(run["rows"])] for run in runs
    )
    assert compiled == pytest.approx(plain, abs=1e-3)
