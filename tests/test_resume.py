"""A run that was stopped and goes on ends as one that was never stopped, bit for bit."""

import copy
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

import environment
import train
from distributed import signals as stopping
from engine.errors import CheckpointError, Stopped
from storage import files as storage
from storage.checkpoint import load_weights, read_safetensors
from tests.conftest import REPOSITORY
from training import journal, learner

# 61 windows: 15 whole batches of 4 and one window left over
TEXT_LENGTH = 1090
STEPS, STEPS_PER_EPOCH = 40, 16
PARAMS = {
    "max_steps": STEPS,
    "batch_size": 4,
    "max_length": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 4,
    "eval_freq": 7,
    "eval_iter": 2,
    "model_overrides": {"emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1},
}
KINDS = {
    "fp32": {"PRECISION": "fp32"},
    "bf16": {"PRECISION": "bf16"},
    # 8 steps an epoch, the last of three micro-batches (2, 2 and 1 windows)
    "accumulation": {"gradient_accumulation_steps": 4, "batch_size": 2},
    "workers": {"num_workers": 2},
    "random": {"sampling": "random"},
    "wsd": {"schedule": "wsd"},
    "muon": {"optimizer": "muon"},
    "muon in bf16": {"optimizer": "muon", "PRECISION": "bf16"},
}
WHOLE: dict[str, dict] = {}  # what runs that nobody stopped came to, by their settings


def room_of(function: str) -> ModuleType:
    """The module that has a function under this name when training calls it."""
    return train if function == "generate" else learner


class Bench:
    """Runs in a folder, each in as many sessions of this process as it is stopped and started.

    A session starts from the settings file, as a program of its own would: fresh weights, and a
    random generator that another seed has set.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.patch = patch
        self.prepare_model = None  # what a test does to the model before it is trained
        self.drawn: dict = {}
        self.stopped_at: list[int] = []  # the steps that were saved when a signal ended a session
        patch.chdir(folder)
        patch.setattr(environment, "CACHE", folder / "cache")
        patch.setattr(journal, "render_losses", self._draw)
        patch.setattr(os, "fsync", lambda handle: None)  # no power is cut here

    def _draw(self, **arguments) -> None:
        self.drawn = copy.deepcopy(arguments)

    def describe(self, name: str, **settings) -> None:
        """Write the settings file of the run `name`; lower-case names are custom_params."""
        words = random.Random(0)
        text = "".join(words.choice("abcdefgh  ") for _ in range(TEXT_LENGTH))
        (self.folder / "text.txt").write_text(text, encoding="utf-8")
        params = PARAMS | {key: value for key, value in settings.items() if key.islower()}
        values = {
            "DATA": "text.txt",
            "TOKENIZER": "char",
            "CUSTOM_MODE": True,
            "RUN_NAME": name,
            "PRECISION": "fp32",
            "custom_params": params,
        } | {key: value for key, value in settings.items() if key.isupper()}
        lines = [f"{key} = {value!r}\n" for key, value in values.items()]
        (self.folder / "settings.py").write_text("".join(lines), encoding="utf-8")
        self.run = self.folder / "runs" / name

    def signal_at(self, function: str, *calls: int, after: bool = False) -> None:
        """Send this process a SIGTERM when a function is called for the n-th time in training."""
        room = room_of(function)
        real, count = getattr(room, function), 0

        def called(*arguments, **keywords):
            nonlocal count
            if function == "batch_loss" and not torch.is_grad_enabled():
                return real(*arguments, **keywords)  # of an evaluation
            count += 1
            if count in calls and not after:
                signal.raise_signal(signal.SIGTERM)
            result = real(*arguments, **keywords)
            if count in calls and after:
                signal.raise_signal(signal.SIGTERM)
            return result

        self.patch.setattr(room, function, called)

    def session(self) -> bool:
        """Start the run, or go on with it; False where a signal ended it."""
        torch.manual_seed(20_261)
        self.env = environment.prepare_environment("settings.py")
        if self.prepare_model is not None:
            self.prepare_model(self.env.model)
        try:
            self.journal = train.train(self.env)
        except Stopped as stopped:
            assert stopped.exit_code == 128 + signal.SIGTERM
            saved = sorted((self.run / "checkpoints").glob("step-*"))
            self.stopped_at.append(int(saved[-1].name[5:]) if saved else 0)
            return False
        return True

    def finish(self) -> dict:
        """Start the run until it ends, and tell what it came to."""
        for _ in range(10):
            if self.session():
                return self.outcome()
        raise AssertionError("the run never ends")

    def outcome(self) -> dict:
        """Everything that must not depend on how often the run was stopped."""
        history = asdict(self.journal.history)
        history.pop("elapsed_s")
        newest = max((self.run / "checkpoints").glob("step-*"))
        best_step = self.journal.history.steps[self.journal.history.best]
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        for name in ("metrics_bytes", "tokens_per_s"):  # a speed has more digits, or fewer
            state["journal"].pop(name, None)
        state["journal"]["history"].pop("elapsed_s")
        self.drawn.pop("title", None)
        moments = [value for _, value in sorted(self.env.optimizer.state_dict()["state"].items())]
        return {
            "rows": metrics(self.run),
            "weights": sha256(*self.env.model.state_dict().values()),
            "optimizer": sha256(*(kinds[kind] for kinds in moments for kind in sorted(kinds))),
            "generator": sha256(torch.get_rng_state()),
            "saved step": newest.name,
            "saved weights": file_sha256(newest / "model.safetensors"),
            "saved optimizer": file_sha256(newest / "optimizer.safetensors"),
            "saved state": state,
            "best": file_sha256(self.run / "best" / f"step-{best_step:08d}" / "model.safetensors"),
            "samples.md": (self.run / "samples.md").read_text(encoding="utf-8"),
            "history": json.loads(json.dumps(history)),
            "drawn": json.loads(json.dumps(self.drawn)),
        }


@pytest.fixture
def bench(workdir, monkeypatch) -> Bench:
    return Bench(workdir, monkeypatch)


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.jsonl, numbers to their last bit; a speed is no result."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        {name: float(x).hex() for name, x in row.items() if name != "train/tok_per_sec"}
        for row in rows
    ]


def of_steps(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if "train/loss" in row]


def sha256(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def uninterrupted(bench: Bench, **settings) -> dict:
    """What a run with these settings comes to where nobody stops it."""
    key = repr((bench.prepare_model, sorted(settings.items())))
    if key not in WHOLE:
        with pytest.MonkeyPatch.context() as patch:
            folder = bench.folder / f"whole-{len(WHOLE)}"
            folder.mkdir()
            whole = Bench(folder, patch)
            whole.prepare_model = bench.prepare_model
            whole.describe("run", **settings)
            WHOLE[key] = whole.finish()
            assert whole.stopped_at == []
    return WHOLE[key]


def compare(found: dict, expected: dict) -> None:
    """Each part by itself, so that a failure names it."""
    assert found.keys() == expected.keys()
    for part in expected:
        assert found[part] == expected[part], part


def check_stops(bench: Bench, stops: list[int], **settings) -> None:
    """Stop a run after each of these steps, and hold what it comes to against the whole one."""
    expected = uninterrupted(bench, **settings)
    shutil.rmtree(bench.folder / "runs", ignore_errors=True)
    bench.describe("run", **settings)
    with bench.patch.context() as patch:
        bench.patch, before = patch, bench.patch
        bench.signal_at("take_step", *stops, after=True)
        bench.stopped_at = []
        found = bench.finish()
        bench.patch = before
    assert bench.stopped_at == stops
    compare(found, expected)


# ----------------------------------------------------------------- stopped after a whole step


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        ("fp32", 13),
        ("bf16", 22),
        ("accumulation", 11),
        ("wsd", 34),
        ("muon", 14),
        ("muon in bf16", 25),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(bench, kind, stop):
    check_stops(bench, [stop], **KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_run_stopped_after_any_of_its_steps_equals_an_uninterrupted_one(bench, kind):
    for stop in range(1, STEPS + 1):
        check_stops(bench, [stop], **KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["accumulation", "workers", "random", "wsd", "muon", "muon in bf16"]
)
def test_every_kind_of_run_resumes_exactly_from_eight_places(bench, kind):
    # the first and last steps; 7, 8, 16 and 32 are at an epoch's end in some kinds, 33 is in
    # the decay of wsd
    for stop in (1, 7, 8, 16, 20, 32, 33, 39):
        check_stops(bench, [stop], **KINDS[kind])


@pytest.mark.parametrize(
    "stops",
    [
        [18, 21, 30],
        [STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH],
        [STEPS],
    ],
    ids=["three in an epoch", "edges", "last of all"],
)
def test_stops_within_an_epoch_and_at_its_edges_change_nothing(bench, stops):
    check_stops(bench, stops, **KINDS["fp32"])


def test_a_resumed_log_has_each_step_and_each_evaluation_once(bench):
    check_stops(bench, [5, 14, 29], **KINDS["fp32"])  # 14 is a step with an evaluation
    rows = [json.loads(line) for line in (bench.run / "metrics.jsonl").open(encoding="utf-8")]
    steps = [row["step"] for row in rows if "train/loss" in row]
    evaluations = [row["step"] for row in rows if "val/loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert evaluations == [0, 7, 14, 16, 21, 28, 32, 35, 40]
    headings = [
        line for line in (bench.run / "samples.md").open(encoding="utf-8") if line.startswith("##")
    ]
    assert headings == [
        "## Before training\n",
        "## After epoch 1\n",
        "## After epoch 2\n",
        "## After epoch 3\n",
    ]
    assert len(bench.drawn["batch_losses"]) == STEPS
    assert all(math.isfinite(loss) for loss in bench.drawn["batch_losses"])
    assert bench.drawn["steps"] == evaluations


# ---------------------------------------------------------------- stopped at other moments


def check_moment(bench: Bench, function: str, call: int, **settings) -> None:
    expected = uninterrupted(bench, **settings)
    bench.describe("run", **settings)
    bench.signal_at(function, call)
    found = bench.finish()
    assert len(bench.stopped_at) == 1
    compare(found, expected)


# an evaluation is two calls, one for each text; calls 3 and 4 are after step 7, 17 after the last
@pytest.mark.parametrize("call", [1, 4, 17])
def test_a_run_stopped_in_an_evaluation_makes_it_again(bench, call):
    check_moment(bench, "mean_loss", call)
    assert bench.stopped_at == [{1: 0, 4: 7, 17: STEPS}[call]]


@pytest.mark.slow
@pytest.mark.parametrize("call", range(1, 19))
def test_a_run_stopped_in_any_evaluation_makes_it_again(bench, call):
    check_moment(bench, "mean_loss", call)


@pytest.mark.parametrize("call", [1, 2, 4], ids=["before training", "epoch 1", "at the end"])
def test_a_run_stopped_while_it_writes_a_sample_resumes_exactly(bench, call):
    check_moment(bench, "generate", call)


@pytest.mark.parametrize(
    ("micro_batch", "step"),
    [(1, 0), (3, 0), (4 * 9 + 1, 9), (31 * 4 + 2, 32)],
    ids=["first of all", "first step", "after an epoch's short step", "last epoch"],
)
def test_a_long_step_is_left_between_micro_batches_and_done_again(
    bench, monkeypatch, micro_batch, step
):
    monkeypatch.setattr(stopping, "_LONG_S", 0.0)
    expected = uninterrupted(bench, **KINDS["accumulation"])
    bench.describe("run", **KINDS["accumulation"])
    bench.signal_at("batch_loss", micro_batch)
    assert not bench.session()
    assert bench.stopped_at == [step]
    assert all(parameter.grad is None for parameter in bench.env.model.parameters())
    compare(bench.finish(), expected)


def test_a_short_step_is_finished_before_the_run_stops(bench):
    check_moment(bench, "batch_loss", 4 * 5 + 2, **KINDS["accumulation"])
    assert bench.stopped_at == [6]


def test_ctrl_c_does_what_a_termination_does(bench, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        bench.describe("run")
        real = learner.take_step

        def interrupted(*arguments, **keywords):
            signal.raise_signal(signal.SIGINT)
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(learner, "take_step", interrupted)
            env = environment.prepare_environment("settings.py")
            with pytest.raises(Stopped) as caught:
                train.train(env)
        assert caught.value.exit_code == 130
        assert "Stopped after step 1 of 40: saved in" in str(caught.value)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        compare(bench.finish(), uninterrupted(bench))
    finally:
        signal.signal(signal.SIGINT, before)


# --------------------------------------------------------- ended without having saved


class Crash(Exception):
    """The end of a program that had no time to save."""


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("take_step", 3),
        ("take_step", 15),
        ("take_step", 28),
        ("mean_loss", 8),
        ("mean_loss", 18),
        ("generate", 4),
    ],
)
def test_what_came_after_the_last_checkpoint_is_done_again_exactly(bench, function, call):
    settings = {"save_every": 5}
    expected = uninterrupted(bench, **settings)
    bench.describe("run", **settings)
    room = room_of(function)
    real, count = getattr(room, function), 0

    def crash(*arguments, **keywords):
        nonlocal count
        count += 1
        if count == call:
            raise Crash
        return real(*arguments, **keywords)

    bench.patch.setattr(room, function, crash)
    with pytest.raises(Crash):
        bench.session()
    compare(bench.finish(), expected)


@pytest.mark.parametrize("patient", [False, True])
def test_a_run_started_again_after_its_last_step_has_nothing_to_change(bench, patient):
    settings = (PATIENT if patient else {}) | {"save_every": 2}
    bench.describe("run", **settings)
    outcomes = [bench.finish() for _ in range(3)]
    compare(outcomes[1], outcomes[0])
    compare(outcomes[2], outcomes[0])


# -------------------------------------------------------------------- what may change


def test_another_evaluation_frequency_on_resume_leaves_training_exact(bench):
    expected = uninterrupted(bench)
    bench.describe("run")
    bench.signal_at("take_step", 15, after=True)
    assert not bench.session()
    bench.describe("run", eval_freq=3, eval_iter=1, save_every=4, LOG_EVERY=2)
    found = bench.finish()
    assert of_steps(found["rows"]) == of_steps(expected["rows"])
    for part in ("weights", "optimizer", "generator", "saved weights", "saved optimizer"):
        assert found[part] == expected[part]
    assert found["history"]["steps"] == [0, 7, 14, 15, 16, 18, 21, 24, 27, 30, 32, 33, 36, 39, 40]


def planned_rate(kind: str, step: int, total: int) -> float:
    """The rate of a plan with 4 warm-up steps and a peak of 0.01, from the rule's own words."""
    if step < 4:
        return 0.01 * (step + 1) / 5
    if kind == "cosine":
        share = (1 + math.cos(math.pi * (step - 4) / (total - 1 - 4))) / 2
    elif kind == "wsd":
        # a fifth of 40 steps decays: eight equal parts down to the floor, at the last step
        share = min(1.0, (total - 1 - step) / 8)
    else:
        return 0.01
    return 0.01 * (0.1 + 0.9 * share)


@pytest.mark.parametrize("done", [40, 20])
@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_more_steps_keep_the_old_plan_and_go_on_at_its_last_rate(bench, kind, done):
    bench.describe("run", schedule=kind)
    bench.signal_at("take_step", *([done] if done < 40 else []), after=True)
    assert bench.session() == (done == 40)
    bench.describe("run", schedule=kind, max_steps=60)
    rows = of_steps(bench.finish()["rows"])
    rates = [float.fromhex(row["train/lr"]) for row in rows]
    if kind == "wsd" and done == 20:  # the decay has not begun: it moves to the new end
        expected = [planned_rate(kind, step, 60) for step in range(60)]
    else:
        expected = [planned_rate(kind, min(step, 39), 40) for step in range(60)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[:done] == [
        float.fromhex(row["train/lr"])
        for row in of_steps(uninterrupted(bench, schedule=kind)["rows"])[:done]
    ]


def test_more_epochs_go_on_with_the_steps_that_follow(bench):
    bench.describe("run", max_steps=None, num_epochs=1, schedule="constant")
    assert len(of_steps(bench.finish()["rows"])) == STEPS_PER_EPOCH
    bench.describe("run", max_steps=None, num_epochs=2, schedule="constant")
    found = bench.finish()
    expected = uninterrupted(bench, max_steps=None, num_epochs=2, schedule="constant")
    assert of_steps(found["rows"]) == of_steps(expected["rows"])
    assert found["weights"] == expected["weights"]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_a_run_that_was_made_longer_resumes_exactly_too(bench, kind):
    outcomes = []
    for name, stops in (("once", [20]), ("often", [20, 22, 39, 40, 47])):
        bench.describe(name, schedule=kind)
        with pytest.MonkeyPatch.context() as patch:
            bench.patch = patch
            bench.signal_at("take_step", *stops, after=True)
            assert not bench.session()
            bench.describe(name, schedule=kind, max_steps=60)
            outcomes.append(bench.finish())
    compare(outcomes[1], outcomes[0])
    assert outcomes[0]["saved step"] == "step-00000060"


def test_best_weights_that_were_lost_are_followed_by_the_best_of_those_to_come(bench, capsys):
    bench.describe("run", eval_freq=5)
    bench.signal_at("take_step", 22)
    assert not bench.session()
    (held,) = (bench.run / "best").iterdir()
    (held / "model.safetensors").write_bytes(b"damaged")
    real = learner.mean_loss
    bench.patch.setattr(learner, "mean_loss", lambda *arguments: real(*arguments) + 1)  # all worse
    assert bench.session()
    assert "the best weights are lost" in capsys.readouterr().out
    history = bench.journal.history
    later = {s: x for s, x in zip(history.steps, history.val_losses, strict=True) if s > 22}
    kept = max(int(path.name[5:]) for path in (bench.run / "best").glob("step-*"))
    assert kept == min(later, key=later.get)


def test_a_finished_run_that_is_made_longer_keeps_its_last_evaluation_and_best_weights(bench):
    bench.describe("run")
    before = bench.finish()["history"]
    assert before["steps"][-1] == STEPS
    real = learner.mean_loss
    again = []

    def worse_later(*arguments):
        again.append(bench.env.run.path)
        return real(*arguments) + (len(again) > 2)  # the first pair is that of the old end

    bench.patch.setattr(learner, "mean_loss", worse_later)
    bench.describe("run", max_steps=60)
    assert bench.session()
    history = bench.journal.history
    assert history.steps[: len(before["steps"])] == before["steps"]
    assert history.val_losses[: len(before["steps"])] == before["val_losses"]
    assert history.best == before["val_losses"].index(min(before["val_losses"]))
    assert (bench.run / "best" / f"step-{history.steps[history.best]:08d}").is_dir()


@pytest.mark.parametrize(
    "missing", ["steps", "journal", "random", "scaler", "schedule", "total_steps"]
)
def test_a_sealed_state_that_lacks_a_part_ends_the_run_and_names_the_checkpoint(bench, missing):
    bench.describe("run")
    bench.signal_at("take_step", 5)
    assert not bench.session()
    (newest,) = (bench.run / "checkpoints").glob("step-*")
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    del state[missing]
    (newest / "state.json").write_text(json.dumps(state), encoding="utf-8")
    manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))["content"]
    manifest["files"]["state.json"] = {
        "bytes": (newest / "state.json").stat().st_size,
        "sha256": file_sha256(newest / "state.json"),
    }
    (newest / "manifest.json").write_bytes(storage._seal(manifest))
    with pytest.raises(CheckpointError, match=newest.name):
        bench.session()


# -------------------------------------------------------------------------- the best weights

PATIENT = {"patience": 3, "eval_freq": 2, "learning_rate": 0.1, "schedule": "constant"}


@pytest.mark.parametrize("stops", [[3], [4], [6, 9]], ids=str)
def test_patience_ends_an_interrupted_run_where_it_ends_the_whole_one(bench, stops):
    expected = uninterrupted(bench, **PATIENT)
    history = expected["history"]
    assert history["steps"][-1] < STEPS
    assert history["steps"][-1] > max(stops)
    check_stops(bench, stops, **PATIENT)
    best = history["val_losses"].index(min(history["val_losses"][1:]))
    assert bench.journal.weights_of_step == history["steps"][best]
    folder = bench.run / "best" / f"step-{history['steps'][best]:08d}"
    kept = copy.deepcopy(bench.env.model.state_dict())
    load_weights(bench.env.model, read_safetensors(folder / "model.safetensors"), folder)
    assert sha256(*bench.env.model.state_dict().values()) == sha256(*kept.values())


def test_worse_evaluations_after_a_resume_leave_the_best_weights_alone(bench):
    bench.describe("run")
    bench.signal_at("take_step", 20, after=True)
    assert not bench.session()
    (best,) = (bench.run / "best").iterdir()
    content = (best / "model.safetensors").read_bytes()
    real = learner.mean_loss
    bench.patch.setattr(learner, "mean_loss", lambda *arguments: real(*arguments) + 100.0)
    bench.finish()
    assert best.name == "step-00000016"
    assert [path.name for path in (bench.run / "best").iterdir()] == [best.name]
    assert (best / "model.safetensors").read_bytes() == content
    assert bench.journal.history.steps[bench.journal.history.best] == 16
    assert bench.journal.history.val_losses[-1] > 100


# -------------------------------------------------------------- what the numbers depend on

ELSEWHERE = """
import json, sys
from pathlib import Path
import pytest, torch
from tests.test_resume import Bench
torch.set_num_threads(1)
with pytest.MonkeyPatch.context() as patch:
    bench = Bench(Path(sys.argv[1]), patch)
    bench.describe("run")
    print("OUTCOME " + json.dumps(bench.finish()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_another_process_folder_and_hash_seed_give_the_same_numbers(bench, hash_seed):
    folder = bench.folder / "another place 春"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)],
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("OUTCOME "))
    compare(json.loads(line.removeprefix("OUTCOME ")), uninterrupted(bench))


def test_another_seed_gives_other_numbers(bench):
    one, another = uninterrupted(bench), uninterrupted(bench, SEED=124)
    assert one["weights"] != another["weights"]
    assert of_steps(one["rows"])[0] != of_steps(another["rows"])[0]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler, and there is none",
)
def test_a_compiled_model_resumes_exactly(bench):
    def compile_all(model):
        torch._dynamo.reset()  # a process of its own finds nothing compiled
        torch._dynamo.utils.counters.clear()
        for module in (*model.blocks, model):  # training calls the blocks, sampling the model
            module.compile()

    eager = uninterrupted(bench)
    bench.prepare_model = compile_all
    check_stops(bench, [13, 25])
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert bench.outcome()["weights"] != eager["weights"]
