"""Runs in this process that are stopped by signals and started again, and what they come to."""

import copy
import hashlib
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

import environment
import storage.cache
import train
from engine.errors import Stopped
from planning.trial import Costs, Trial
from training import journal, learner
from training.journal import Journal
from training.pace import Spent

# 29 windows: 7 whole batches of 4 and one window left over
TEXT_LENGTH = 522
STEPS = 20
PARAMS = {
    "max_steps": STEPS,
    "batch_size": 4,
    "max_length": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 4,
    "eval_freq": 7,
    "eval_iter": 2,
    "model_overrides": {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "drop_rate": 0.1},
}
# 4 steps an epoch, the last of three micro-batches (2, 2 and 1 windows)
ACCUMULATION = {"gradient_accumulation_steps": 4, "batch_size": 2}
WHOLE: dict[str, dict] = {}  # what runs that nobody stopped came to, by their settings


def room_of(function: str) -> ModuleType:
    """The module that has a function under this name when training calls it."""
    return train if function == "generate" else learner


def use_steady_clock(
    patch: pytest.MonkeyPatch, step_s: float, batch_s: float, run_step_s: Callable[[], float]
) -> None:
    """Steps and batches take these seconds where they are tried, and run_step_s() each in the run,
    where nothing else takes time."""
    patch.setattr(Trial, "step_seconds", lambda trial, **_: step_s)
    patch.setattr(Trial, "costs", lambda *_: Costs(step_s, batch_s, 0.0, 0.0))
    patch.setattr(Costs, "with_files", lambda costs, model, device: costs)
    patch.setattr(train, "UNSEEN_PICTURE_S", 0.0)
    patch.setattr(Spent, "mean", lambda spent, kind, default=0.0: 0.0)
    patch.setattr(Spent, "total_s", 0.0)
    patch.setattr(Journal, "elapsed_s", property(lambda journal: journal.steps * run_step_s()))


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
        patch.setattr(storage.cache, "CACHE", folder / "cache")
        patch.setattr(journal, "render_losses", self._draw)
        patch.setattr(os, "fsync", lambda handle: None)  # no power is cut here
        patch.setattr(train, "SAMPLE_TOKENS", 5)

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
            of_evaluation = function == "batch_loss" and not torch.is_grad_enabled()
            of_trial = function == "take_step" and keywords.get("stop") is None
            if of_evaluation or of_trial:
                return real(*arguments, **keywords)
            count += 1
            is_meant = count in calls
            if is_meant and not after:
                signal.raise_signal(signal.SIGTERM)
            result = real(*arguments, **keywords)
            if is_meant and after:
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
        for _ in range(STEPS + 2):
            if self.session():
                return self.outcome()
        raise AssertionError("the run never ends")

    def outcome(self) -> dict:
        """Everything that must not depend on how often the run was stopped."""
        history = asdict(self.journal.history)
        history.pop("elapsed_s")
        newest = max((self.run / "checkpoints").glob("step-*"))
        best_step = self.journal.history.steps[self.journal.history.best]
        best = self.run / "best" / f"step-{best_step:08d}" / "model.safetensors"
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        # times have more digits, or fewer
        for name in ("metrics_bytes", "tokens_per_s", "spent", "marks"):
            state["journal"].pop(name, None)
        state["journal"]["history"].pop("elapsed_s")
        for name in ("title", "baselines"):  # what is measured depends on the time
            self.drawn.pop(name, None)
        moments = [value for _, value in sorted(self.env.optimizer.state_dict()["state"].items())]
        return {
            # to the last bit; a speed is no result
            "rows": [
                {name: float(x).hex() for name, x in row.items() if name != "train/tok_per_sec"}
                for row in rows_of(self.run)
            ],
            "weights": sha256(*self.env.model.state_dict().values()),
            "optimizer": sha256(*(kinds[kind] for kinds in moments for kind in sorted(kinds))),
            "generator": sha256(torch.get_rng_state()),
            "saved step": newest.name,
            "saved weights": file_sha256(newest / "model.safetensors"),
            "saved optimizer": file_sha256(newest / "optimizer.safetensors"),
            "saved state": state,
            # a run on few conversations keeps none
            "best": file_sha256(best) if self.env.run.record.chat is None else None,
            "samples.md": (self.run / "samples.md").read_text(encoding="utf-8"),
            "history": json.loads(json.dumps(history)),
            "drawn": json.loads(json.dumps(self.drawn)),
        }


def rows_of(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


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
    bench.describe("run", **settings)
    bench.signal_at("take_step", *stops, after=True)
    compare(bench.finish(), expected)
    assert bench.stopped_at == stops
