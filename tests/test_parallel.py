"""Several ranks come to what one process comes to: losses, weights, batches and run folders."""

import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

import environment
import main
import planning.machine
import storage.cache
import train
from data import WindowBatches, WindowDataset, evaluation_loader, make_loaders, plan_windows
from distributed import parallel as parallel_module
from distributed.parallel import ALONE, Parallel, join
from engine.errors import BusyError, RunFinished, SettingsError, Stopped
from engine.precision import Precision
from environment import prepare_environment
from exchange.saved_run import load_run
from generation import generate
from model import GPTConfig, GPTModel
from tests.conftest import REPOSITORY
from tests.hostile import project_trees
from tests.ranks import metrics, run_ranks, write_tiny_run
from training import journal
from training.learner import (
    batch_loss,
    count_steps,
    mean_loss,
    micro_batches,
    steps_between,
    take_step,
)

needs_signals = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
LENGTH, STEPS = 16, 9  # tokens of a window, optimizer steps of a run
TINY = {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "tie_embeddings": True}
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"

# ----------------------------------------------------------------------------- real processes

# several runs in one start, for starting takes longer than training
SEVERAL = """
import json, sys
from pathlib import Path
from tests.test_parallel import train_all
train_all(Path.cwd(), json.loads(sys.argv[1]))
"""


def train_all(folder: Path, starts: list[list]) -> None:
    """Train the settings files of [name] or [name, rank, step, signal, attempt], each in turn.

    The rank gets the signal where that step begins, the attempt being how often torchrun has
    started all anew.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(storage.cache, "CACHE", folder / "cache")
        patch.setattr(planning.machine, "default_threads", lambda _=1: 1)
        patch.setattr(journal, "render_losses", lambda **_: None)  # takes longer than training
        for name, *disturbance in starts:
            with patch.context() as own:
                if disturbance and disturbance[3] == attempt:
                    disturb(own, *disturbance[:3])
                with contextlib.suppress(RunFinished, Stopped):
                    main.run_pipeline(prepare_environment(name))


def disturb(patch: pytest.MonkeyPatch, rank: int, at: int, name: str) -> None:
    """Let a rank get a signal where a step begins, the steps counted from 1."""
    step = train.Trainer.step

    def disturbed(trainer, *arguments):
        if trainer.parallel.rank == rank and trainer.journal.steps + 1 == at:
            os.kill(os.getpid(), getattr(signal, name))
        return step(trainer, *arguments)

    patch.setattr(train.Trainer, "step", disturbed)


def write_text(path: Path, n_characters: int) -> None:
    choose = random.Random(n_characters)
    words = ("river", "bell", "stone", "under", "carries", "quiet", "of", "the", "a", "north")
    text = " ".join(choose.choice(words) for _ in range(n_characters // 2))
    path.write_text(text[:n_characters], encoding="utf-8")


def settings_of(folder: Path, name: str, *, left_over: int = 1, **given) -> str:
    """Write settings whose epochs end with a step of so many windows; names in lower case go into
    custom_params. RUN_NAME is the name, unless it is given."""
    text = f"train-{left_over}.txt"
    # the last token of the end is a target only
    write_text(folder / text, (5 * 8 + left_over) * LENGTH + 1)
    write_text(folder / "val.txt", 8 * LENGTH + 7)
    params = {
        "max_steps": STEPS,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_length": LENGTH,
        "learning_rate": 3e-3,
        "max_grad_norm": 0.7,
        "eval_freq": 5,
        "eval_iter": 100,
        "save_every": 3,
        "start_context": "the river",
        "model_overrides": TINY,
    }
    given = {"RUN_NAME": name, "DATA": {"path": text, "val": "val.txt"}} | given
    return write_tiny_run(folder, f"{name}.py", params, **given)


def alone(folder: Path, *starts: list) -> str:
    """Train in this process; what it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        train_all(folder, list(starts))
    return said.getvalue()


def together(folder: Path, n: int, *starts: list, restarts: int = 0):
    options = (f"--max-restarts={restarts}",)
    return run_ranks(folder, n, json.dumps(starts), program=SEVERAL, options=options)


def facts(run: Path, name: str) -> dict:
    return json.loads((run / f"{name}.json").read_bytes())


def final(run: Path, name: str) -> bytes:
    last = f"step-{facts(run, 'settings')['total_steps']:08d}"
    return (run / "checkpoints" / last / name).read_bytes()


def furthest(run: Path, other: Path, *keys: str) -> float:
    """The largest difference between the numbers of two runs, which are the same rows of both."""
    rows, others = metrics(run), metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    n_steps = facts(run, "settings")["total_steps"]
    assert rows[-1]["step"] == n_steps
    found = []
    for row, compared in zip(rows, others, strict=True):
        assert row.keys() == compared.keys()
        found += [abs(row[key] - compared[key]) for key in keys if key in row]
    assert len(found) >= n_steps
    return max(found)


LOSSES = ("train/loss", "eval/train_loss", "val/loss")
NORM = "train/grad_norm"


def shares_of_last_step(run: Path) -> list[int]:
    """How many micro-batches two ranks have in an epoch's last step, by the files of a run."""
    settings, n = facts(run, "settings"), facts(run, "data")["split"]["train_windows"]
    training = settings["training"]
    left = n % (training["batch_size"] * training["gradient_accumulation_steps"])
    assert settings["steps_per_epoch"] == 6 < STEPS  # the runs have such an end
    return [math.ceil(share / settings["micro_batch"]) for share in (left // 2, left - left // 2)]


# main() with MINUTES; each rank writes what it began with, what it measured, and its seconds
IN_MINUTES = """
import json, os, sys, time
from pathlib import Path
sys.modules["matplotlib"] = None
import main, storage.cache
storage.cache.CACHE = Path("cache").resolve()
train, began_at, found = main.train, time.perf_counter(), {}

def noted(env):
    found["record"] = env.run.settings
    journal = train(env)
    found["losses"] = journal.history.batch_losses
    return journal

main.train = noted
code = main.main(["settings.py"])
found["seconds"] = time.perf_counter() - began_at
Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found, sort_keys=True))
sys.exit(code)
"""


@pytest.mark.slow
@needs_signals
def test_two_ranks_with_minutes_follow_one_recipe_and_one_plan_and_end_on_time(tmp_path):
    settings = 'DATA, TOKENIZER, PRECISION, RUN_NAME = "sample-en", "char", "fp32", "run"\n'
    settings += "MINUTES, DEVICE = 0.3, 'cpu'\n"
    (tmp_path / "settings.py").write_text(settings, encoding="utf-8")
    job = run_ranks(tmp_path, 2, program=IN_MINUTES)
    assert job.out.count("\nIn 0.3 min ") == job.out.count("✓ Training pipeline finished") == 1
    ranks = [json.loads((tmp_path / f"rank-{n}.json").read_bytes()) for n in range(2)]
    seconds = [rank.pop("seconds") for rank in ranks]
    assert ranks[0] == ranks[1]  # the recipe and each step's loss
    assert ranks[0]["record"]["ranks"] == 2
    assert max(seconds) < 1.5 * 18  # a busy machine may be late
    summary = facts(tmp_path / "runs" / "run", "summary")
    assert summary["steps"] == len(ranks[0]["losses"]) >= 1


@pytest.mark.slow
@needs_signals
def test_two_ranks_learn_what_one_process_learns(tmp_path):
    cases = {  # name: its settings
        "gpt2": {"MODEL": "small"},
        "llama": {"MODEL": "llama-mini", "left_over": 3, "batch_size": 1}
        | {"gradient_accumulation_steps": 8},
        "bf16": {"PRECISION": "bf16", "max_steps": 4},
        "muon": {"optimizer": "muon", "max_steps": 7},
    }
    alone(tmp_path, *([settings_of(tmp_path, name, **given)] for name, given in cases.items()))
    cases["gpt2-again"] = cases["gpt2"] | {"activation_checkpointing": True}
    kinds = {"muon": ["fsdp", "auto"], "bf16": ["fsdp"], "gpt2-again": ["fsdp"]}
    together(
        tmp_path,
        2,
        *(
            [settings_of(tmp_path, f"{name}-{kind}", PARALLEL=kind, **given)]
            for name, given in cases.items()
            for kind in kinds.get(name, ["ddp", "fsdp"])
        ),
    )
    runs = tmp_path / "runs"
    # one rank has nothing to do in an epoch's last step, or less than the other
    assert shares_of_last_step(runs / "gpt2-ddp") == [0, 1]
    assert shares_of_last_step(runs / "llama-ddp") == [1, 2]
    norms = [row[NORM] for row in metrics(runs / "gpt2") if NORM in row]
    assert sum(norm > 0.7 for norm in norms) > 3, "clipping had too little to do"
    for name, kind in itertools.product(("gpt2", "llama"), ("ddp", "fsdp")):
        one, two = runs / name, runs / f"{name}-{kind}"
        assert "head.weight" not in final(one, WEIGHTS).decode("latin-1")  # tied
        # absolute: the losses are between 2 and 6
        assert furthest(one, two, *LOSSES) < 1e-5, (name, kind)
        assert furthest(one, two, NORM) < 1e-5, (name, kind)
        summaries = [facts(run, "summary") for run in (one, two)]
        assert [summary["ranks"] for summary in summaries] == [1, 2]
        losses = [summary["final_val_loss"] for summary in summaries]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert furthest(runs / "bf16", runs / "bf16-fsdp", *LOSSES) < 2e-3
    for kind in ("fsdp", "auto"):
        assert furthest(runs / "muon", runs / f"muon-{kind}", *LOSSES) < 1e-3
    # the same operations on the same numbers
    assert furthest(runs / "gpt2-fsdp", runs / "gpt2-again-fsdp", *LOSSES, NORM) == 0
    assert final(runs / "gpt2-fsdp", WEIGHTS) == final(runs / "gpt2-again-fsdp", WEIGHTS)
    # what the run before had is not kept
    laid = [facts(runs / name, "settings")["parallel"] for name in ("muon-auto", "gpt2-again-fsdp")]
    assert laid == ["ddp", "fsdp"]

    whole = load_run(runs / "gpt2", weights="fp32")
    prompt = whole.tokenizer.encode("the ri")
    expected = generate(whole.model, [prompt], max_new_tokens=9, temperature=0.0)
    for name in ("gpt2-ddp", "gpt2-fsdp"):
        assert files(runs / name) == files(runs / "gpt2")
        loaded = load_run(runs / name, weights="fp32")
        assert loaded.step == whole.step
        assert generate(loaded.model, [prompt], max_new_tokens=9, temperature=0.0) == expected


def files(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*"))


DROPPING = {"model_overrides": TINY | {"drop_rate": 0.1}}


def assert_same_to_the_last_bit(run: Path, undisturbed: Path) -> None:
    for name in (WEIGHTS, MOMENTS):
        assert final(run, name) == final(undisturbed, name), (run.name, name)
    states = [json.loads(final(path, "state.json")) for path in (run, undisturbed)]
    for key in ("random", "other_ranks", "scaler", "schedule"):
        assert states[0][key] == states[1][key], key
    rows = [[row.get("train/loss") for row in metrics(path)] for path in (run, undisturbed)]
    assert rows[0] == rows[1]


@pytest.mark.slow
@needs_signals
def test_runs_of_three_ranks_that_were_stopped_or_killed_end_with_the_same_bits(tmp_path):
    """Sums of three numbers depend on their order, so the messages must be cut as before."""
    for kind in ("ddp", "fsdp"):
        for name in ("whole", "stopped", "killed"):
            settings_of(tmp_path, f"{name}-{kind}", PARALLEL=kind, batch_size=3, **DROPPING)
    # one that is killed ends all, and torchrun starts all again: what is done is passed over
    job = together(
        tmp_path,
        3,
        ["whole-ddp.py"],
        ["whole-fsdp.py"],
        ["stopped-ddp.py", 1, 5, "SIGTERM", 0],
        ["stopped-fsdp.py", 0, 7, "SIGTERM", 0],
        ["killed-fsdp.py", 2, 8, "SIGKILL", 0],
        ["killed-ddp.py", 0, 5, "SIGKILL", 1],
        restarts=2,
    )
    gone_on = {"stopped-ddp": 5, "stopped-fsdp": 7, "killed-fsdp": 6, "killed-ddp": 3}
    assert steps_gone_on_from(job.out) == gone_on
    runs = tmp_path / "runs"
    for kind in ("ddp", "fsdp"):
        for name in ("stopped", "killed"):
            assert_same_to_the_last_bit(runs / f"{name}-{kind}", runs / f"whole-{kind}")


def steps_gone_on_from(out: str) -> dict[str, int]:
    """Which runs went on, and from which step."""
    lines = [line.split() for line in out.splitlines() if line.startswith("Resuming runs/")]
    return {words[1].removeprefix("runs/").rstrip(":"): int(words[2]) for words in lines}


@pytest.mark.slow
@needs_signals
def test_a_run_goes_on_with_other_ranks_or_laid_out_otherwise_and_says_so(tmp_path):
    for name in ("whole", "shrinking", "growing"):
        settings_of(tmp_path, name)
    for kind in ("ddp", "fsdp"):
        settings_of(tmp_path, f"turning-{kind}", RUN_NAME="turning", PARALLEL=kind)
        settings_of(tmp_path, f"growing-{kind}", RUN_NAME="growing", PARALLEL=kind)
        settings_of(tmp_path, f"shrinking-{kind}", RUN_NAME=f"shrinking-{kind}", PARALLEL=kind)
    alone(tmp_path, ["whole.py"], ["growing.py", 0, 5, "SIGTERM", 0])
    job = together(
        tmp_path,
        2,
        ["growing-fsdp.py"],
        ["shrinking-ddp.py", 1, 4, "SIGTERM", 0],
        ["shrinking-fsdp.py", 0, 6, "SIGTERM", 0],
        ["turning-ddp.py", 1, 4, "SIGTERM", 0],
        ["turning-fsdp.py", 0, 7, "SIGTERM", 0],
        ["turning-ddp.py"],
    )
    said = alone(tmp_path, ["shrinking-ddp.py"], ["shrinking-fsdp.py"])

    assert steps_gone_on_from(job.out) == {"growing": 5, "turning": 7}
    assert steps_gone_on_from(said) == {"shrinking-ddp": 4, "shrinking-fsdp": 6}
    rest = "from here on the numbers are not bit for bit those of an undisturbed run"
    assert said.count(f"Note: ranks was 2 and is 1: {rest}") == 2
    assert job.out.count(f"Note: ranks was 1 and is 2: {rest}") == 1
    assert f"Note: parallel was 'ddp' and is 'fsdp': {rest}" in job.out
    assert f"Note: parallel was 'fsdp' and is 'ddp': {rest}" in job.out
    runs = tmp_path / "runs"
    for name in ("growing", "shrinking-ddp", "shrinking-fsdp", "turning"):
        assert furthest(runs / name, runs / "whole", *LOSSES, "train/tokens") < 1e-5, name
    settings = json.loads((runs / "growing" / "settings.json").read_bytes())
    assert [change["ranks"] for change in settings["changes"]] == [[1, 2]]
    for name in ("growing", "turning"):  # ranks that drop out draw masks of their own
        state = json.loads(final(runs / name, "state.json"))
        (other,) = state["other_ranks"]
        assert state["random"]["cpu"] != other["cpu"]


# --------------------------------------------------------------------------- without processes


def ranks_of(world: int) -> list[Parallel]:
    return [Parallel(rank, world) for rank in range(world)]


def dataset(n_windows: int, *, tail: int = 0) -> WindowDataset:
    """Windows of 4 tokens each, whose first token is 4 times their number."""
    tokens = np.arange(4 * n_windows + 1 + tail)
    return WindowDataset(tokens, 4, 4, keep_tail=tail > 0)


def cut(batches: WindowBatches, epoch: int, first: int = 0) -> list[list[list[int]]]:
    """The micro-batches of each step from `first` on, for a rank."""
    batches.start_at(epoch, first)
    parts, steps = iter(batches), []
    for step in range(first, batches.n_steps):
        count = math.ceil(batches.count_own(step) / batches.micro_batch)
        steps.append(list(itertools.islice(parts, count)))
    assert list(parts) == []
    return steps


@pytest.mark.parametrize("sampling", ["windows", "random"])
def test_the_ranks_shares_of_a_step_are_together_what_one_process_takes(sampling):
    cases = itertools.product((2, 3), (1, 23, 24), (1, 3), (1, 2, 4))
    for world, n_windows, share, micro_batch in cases:
        step_size = world * share
        n_steps = math.ceil(n_windows / step_size) if sampling == "random" else None
        given = (dataset(n_windows), 4, 17, n_steps, step_size, micro_batch)
        one = WindowBatches(*given)
        ranks = [WindowBatches(*given, parallel=parallel) for parallel in ranks_of(world)]
        assert {batches.n_steps for batches in ranks} == {one.n_steps}
        for epoch, first in ((0, 0), (3, one.n_steps // 2), (3, one.n_steps - 1)):
            expected = cut(one, epoch, first)
            shares = [cut(batches, epoch, first) for batches in ranks]
            for number, whole in enumerate(expected):
                step = first + number
                windows = list(itertools.chain(*whole))
                own = [list(itertools.chain(*steps[number])) for steps in shares]
                # in order, so that all of them together are disjoint and lack nothing
                assert list(itertools.chain(*own)) == windows
                sizes = [len(part) for part in own]
                assert max(sizes) - min(sizes) <= 1
                assert sizes == [batches.count_own(step) for batches in ranks]
                assert {batches.count_largest(step) for batches in ranks} == {max(sizes)}
                assert {batches.count_windows(step) for batches in ranks} == {len(windows)}
                micro = [len(part) for steps in shares for part in steps[number]]
                assert max(micro) <= micro_batch
                if step < one.n_steps - 1:
                    assert sizes == [share] * world
                    assert {len(steps[number]) for steps in shares} == {ranks[0].per_step}
            if sampling == "windows" and first == 0:
                seen = sorted(itertools.chain(*itertools.chain(*expected)))
                assert seen == list(range(n_windows))
        for batches in ranks:
            batches.start_at(1)
            assert len(batches) == len(list(batches))


def loaders(n_train: int, n_val: int, parallel: Parallel, *, batch_size: int = 4, **options):
    windows, _ = plan_windows(
        n_train + n_val,
        max_length=4,
        stride=None,
        batch_size=batch_size,
        train_ratio=0.9,
        n_train=n_train,
    )
    tokens = (np.arange(n_train + n_val) * 7919 % 251).astype(np.uint16)
    fixed = {"seed": 5, "num_workers": 0, "device": torch.device("cpu")}
    return make_loaders(tokens, windows, parallel=parallel, **fixed, **options)


def as_lists(loader) -> list[tuple[list, list]]:
    return [(ids.tolist(), targets.tolist()) for ids, targets in loader]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_ranks_evaluate_all_batches_and_none_twice(world):
    cases = itertools.product((2, 4 * 8 + 3, 4 * 9 + 1), (0, 1), (None, 3), (None, 1, 2, 100))
    for n_val, number, micro_batch, most in cases:
        loader = loaders(4 * 21 + 1, n_val, ALONE, micro_batch=micro_batch)[number]
        expected = as_lists(evaluation_loader(loader, most))
        found = []
        for parallel in ranks_of(world):
            own = loaders(4 * 21 + 1, n_val, parallel, micro_batch=micro_batch)[number]
            share = as_lists(evaluation_loader(own, most, parallel))
            assert len(share) <= math.ceil(len(expected) / world)
            found += share
        assert sorted(found) == sorted(expected)
        n_targets = sum(len(row) for _, targets in found for row in targets)
        if most in (None, 100):
            assert n_targets == (n_val - 1 if number == 1 else 4 * 21)


class Listening(Parallel):
    """A rank whose sums are noted, and then are what a test gives it."""

    def __init__(self, *place: int, sums=()) -> None:
        super().__init__(*place)
        self.own, self._sums = [], list(sums)

    def sum(self, tensor):
        self.own.append(tensor.clone())
        return torch.tensor(self._sums.pop(0)) if self._sums else tensor


@pytest.mark.parametrize("n_val", [4 * 8 + 3, 4 * 16 + 2])
def test_the_validation_loss_is_the_mean_over_all_ranks_targets(n_val):
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=251, context_length=4, emb_dim=8, n_heads=2, n_layers=1)
    model, fp32 = GPTModel(config), Precision("fp32", "", "cpu")
    cpu = torch.device("cpu")
    loader = loaders(41, n_val, ALONE)[1]
    expected = mean_loss(model, evaluation_loader(loader), cpu, fp32)
    ranks = [Listening(rank, 2) for rank in range(2)]
    for rank in ranks:  # the first time only what each has is wanted
        mean_loss(model, evaluation_loader(loader, None, rank), cpu, fp32, None, rank)
    assert ranks[0].own[0] != ranks[1].own[0]  # the shares are of different sizes
    sums = [sum(rank.own[i].item() for rank in ranks) for i in range(2)]
    assert sums[0] == n_val - 1
    for number in range(2):
        rank = Listening(number, 2, sums=sums)
        share = evaluation_loader(loader, None, rank)
        assert mean_loss(model, share, cpu, fp32, None, rank) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_with_less_in_an_epochs_last_step_gets_batches_without_targets(world):
    for n_windows, micro_batch in itertools.product((world, world + 1, 3 * world + 1), (1, 2)):
        options = {"accumulation": 2 * world, "batch_size": 1, "micro_batch": micro_batch}
        steps = [
            [
                step._replace(batches=micro_batches(step, micro_batch, torch.device("cpu")))
                for step in steps_between(loader, 2 * count_steps(loader), 3 * count_steps(loader))
            ]
            for loader, _ in (loaders(4 * n_windows + 1, 9, p, **options) for p in ranks_of(world))
        ]
        n_padded = 0
        for of_ranks in zip(*steps, strict=True):
            # backward passes are made together: every rank has as many
            assert len({len(step.batches) for step in of_ranks}) == 1
            n_targets = sum(t.numel() for step in of_ranks for _, t in step.batches)
            assert {step.n_targets for step in of_ranks} == {n_targets}
            for ids, targets in itertools.chain(*(step.batches for step in of_ranks)):
                assert ids.shape[1] == targets.shape[1] == 4
                assert len(targets) in (0, len(ids))
                n_padded += len(targets) == 0
        assert sum(step.n_targets for step in steps[0]) == 4 * n_windows
        uneven = n_windows % (2 * world) % world != 0 and micro_batch == 1
        assert (n_padded > 0) == (uneven or 0 < n_windows % (2 * world) < world)


@pytest.mark.parametrize(("architecture", "name"), [("gpt2", "fp32"), ("llama", "bf16")])
def test_a_batch_without_targets_has_no_loss_and_no_gradient(architecture, name):
    shape = {"vocab_size": 50, "context_length": 8, "emb_dim": 16, "n_heads": 2, "n_layers": 2}
    kind = {"architecture": architecture, "qk_norm": architecture == "llama"}
    model = GPTModel(GPTConfig(**shape, **kind, tie_embeddings=True))
    ids = torch.zeros(1, 8, dtype=torch.long)
    loss = batch_loss(model, (ids, ids[:0]), Precision(name, "", "cpu"), 12.0)
    loss.backward()
    assert loss.item() == 0.0
    assert loss.dtype == torch.float32
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{key} would never be summed up"
        assert torch.count_nonzero(parameter.grad) == 0, key


class Syncs(torch.nn.Module):
    """A model as DDP and FSDP2 wrap it, which notes what each backward pass is asked for."""

    def __init__(self) -> None:
        super().__init__()
        config = GPTConfig(vocab_size=9, context_length=4, emb_dim=4, n_heads=2, n_layers=1)
        self.inner, self.asked, self._now = GPTModel(config), [], True

    def forward(self, *arguments):
        self.asked.append(self._now)
        return self.inner(*arguments)

    def set_requires_gradient_sync(self, now: bool) -> None:
        self._now = now

    @contextlib.contextmanager
    def no_sync(self):
        self._now = False
        yield
        self._now = True


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_travel_only_at_the_last_micro_batch_of_each_step(kind):
    model, parallel = Syncs(), Listening(0, 2)
    parallel.kind = kind
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.zeros(2, 4, dtype=torch.long)
    fp32 = Precision("fp32", "", "cpu")
    for n_batches in (3, 1, 2):
        model.asked.clear()
        take_step(model, [(ids, ids)] * n_batches, optimizer, fp32, 1.0, parallel=parallel)
        assert model.asked == [False] * (n_batches - 1) + [True]


class Echo(Parallel):
    """A rank whose others say and do what it does."""

    def highest(self, *numbers):
        return [float(number) for number in numbers]

    def sum(self, tensor):
        return tensor.mul_(self.world)

    def broadcast(self, value):
        return value

    def gather(self, value):
        return [value] * self.world

    def on_main(self, job):
        return job()

    local_first = on_main

    def require_same(self, **values):
        pass

    def watched(self):
        return contextlib.nullcontext()


def prepare_rank(monkeypatch, rank: int, world: int):
    monkeypatch.setattr(environment, "join", lambda: Echo(rank, world) if world > 1 else ALONE)
    return prepare_environment("settings.py")


def test_a_batch_that_cant_be_divided_names_the_nearest_that_can(workdir, monkeypatch):
    for world, batch, accumulation, nearest in ((3, 4, 2, "6 or 9"), (8, 3, 1, "8")):
        settings_of(workdir, "settings", batch_size=batch, gradient_accumulation_steps=accumulation)
        with pytest.raises(SettingsError) as caught:
            prepare_rank(monkeypatch, 0, world)
        assert f"a step of {batch * accumulation} windows" in str(caught.value)
        assert f"can't be divided among {world} processes" in str(caught.value)
        assert f"The nearest sizes that can: {nearest}." in str(caught.value)


@pytest.mark.parametrize(
    ("world", "batch", "accumulation", "micro_batch", "per_step"),
    [(3, 6, 2, 4, 1), (2, 1, 8, 1, 4)],
)
def test_the_global_batch_is_what_the_settings_say_whatever_the_ranks(
    workdir, monkeypatch, world, batch, accumulation, micro_batch, per_step
):
    settings_of(workdir, "settings", batch_size=batch, gradient_accumulation_steps=accumulation)
    windows = []
    for rank in range(world):
        env = prepare_rank(monkeypatch, rank, world)
        batches = env.train_loader.batch_sampler
        assert (batches.step_size, batches.micro_batch) == (batch * accumulation, micro_batch)
        assert batches.per_step == per_step
        assert env.train_config.batch_size == batch
        assert env.run.settings["ranks"] == world
        windows += cut(batches, 0)[0]
    expected = cut(prepare_rank(monkeypatch, 0, 1).train_loader.batch_sampler, 0)[0]
    assert list(itertools.chain(*windows)) == list(itertools.chain(*expected))
    assert not distributed.is_initialized()


def test_a_process_alone_gives_back_what_it_is_given_and_never_asks_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed", None)  # an import of it would fail
    monkeypatch.delattr(torch, "distributed")
    tensor, value, entered = torch.ones(3), {"a": [1]}, []
    assert (ALONE.rank, ALONE.world, ALONE.kind, ALONE.prefix) == (0, 1, "none", "")
    assert ALONE.is_main and ALONE.is_alone and ALONE.speaks_for_all("anything")
    assert (ALONE.highest(3, 2.5), ALONE.lowest(2), ALONE.mean(2.5)) == ([3, 2.5], 2, 2.5)
    assert ALONE.sum(tensor) is tensor
    assert ALONE.broadcast(value) is ALONE.only_main(value) is value
    assert ALONE.gather(value) == [value]
    assert ALONE.share_of([1, 2, 3]) == [1, 2, 3]
    assert ALONE.on_main(lambda: 4) == ALONE.local_first(lambda: 4) == 4
    ALONE.require_same(text="x")

    @contextlib.contextmanager
    def context():
        entered.append("in")
        yield
        entered.append("out")

    with ALONE.held_by_main(context), ALONE.watched():
        assert entered == ["in"]
    assert entered == ["in", "out"]
    with pytest.raises(RuntimeError, match=r"^gloo: mine$"), ALONE.watched():
        raise RuntimeError("gloo: mine")
    state = torch.get_rng_state()
    ALONE.seed_apart(1)
    assert torch.equal(torch.get_rng_state(), state)
    ALONE.leave()


def test_a_leader_is_waited_for_as_long_as_it_shows_life(monkeypatch):
    """By a clock that only the waiting moves on; in the store is what a leader would put there."""

    class Clock:
        now, monotonic = 0.0, staticmethod(lambda: Clock.now)

        @staticmethod
        def sleep(seconds: float) -> None:
            Clock.now += seconds
            while_waiting()

    monkeypatch.setattr(parallel_module, "time", Clock)

    def wait_for_leader(state: str = "?", **values: str) -> float:
        """Wait for its first turn, and return how long."""
        monkeypatch.setattr(Parallel, "_process_of", lambda self, rank: (1, state))
        Clock.now = 0.0
        for name, value in values.items():
            store.set(f"{name}/1/0" if name == "turn" else f"{name}/0", value)
        Parallel(1, 2, timeout_s=10, store=store).on_main(None)
        return Clock.now

    def beat() -> None:
        store.add("beat/0", 1)
        if Clock.now > 95:
            store.set("turn/1/0", "{}")

    store, while_waiting = distributed.HashStore(), beat
    assert wait_for_leader() == pytest.approx(95.5, abs=0.5)  # far beyond the limit
    for state, expected in (("?", 10), ("S", 10), ("Z", 2), ("", 2)):
        store, while_waiting = distributed.HashStore(), lambda: None
        with pytest.raises(RuntimeError, match="rank 0 gives no sign of life"):
            wait_for_leader(state)
        assert expected < Clock.now <= expected + 0.5
    with pytest.raises(RuntimeError, match="rank 0 gives no sign of life"):
        wait_for_leader(failed="why")
    assert Clock.now == 0
    store = distributed.HashStore()
    with pytest.raises(BusyError, match="in use"):
        wait_for_leader(turn='{"kind": "BusyError", "message": "in use"}')


def test_ranks_draw_apart_and_the_main_one_as_if_it_were_alone():
    drawn = []
    for parallel in [ALONE, *ranks_of(4)]:
        torch.manual_seed(9)
        parallel.seed_apart(9)
        drawn.append(torch.rand(8).tolist())
    assert drawn[0] == drawn[1]
    assert len({tuple(numbers) for numbers in drawn}) == 4
    torch.manual_seed(0)
    Parallel(3, 4).seed_apart(9)
    assert torch.rand(8).tolist() == drawn[4]  # whatever was drawn before


@pytest.fixture
def no_torchrun(monkeypatch):
    monkeypatch.setattr(parallel_module, "_joined", None)
    for name in (*parallel_module.ENVIRONMENT, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_there_is_no_group_without_torchrun_and_half_of_its_variables_are_an_error(no_torchrun):
    assert join() is ALONE
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        no_torchrun.setenv(name, value)
    assert join() is ALONE
    assert not distributed.is_initialized()
    no_torchrun.delenv("WORLD_SIZE")
    with pytest.raises(SettingsError, match="not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        join()
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        no_torchrun.setenv(name, "two")
    with pytest.raises(SettingsError, match="WORLD_SIZE is 'two'"):
        join()


# ------------------------------------------------------------------------- what it costs


def test_an_epoch_of_millions_is_sharded_as_fast_as_it_is_shuffled_in_ten_bytes_a_window():
    n = 2**20
    began_at = time.process_time()
    np.random.default_rng(0).permutation(n)
    permutation_s = time.process_time() - began_at

    def take_epoch() -> int:
        windows = WindowDataset(range(8 * n + 1), 8, 8)
        return sum(map(len, WindowBatches(windows, 8, 3, None, 4096, 64, parallel=Parallel(7, 8))))

    began_at = time.process_time()
    assert take_epoch() == n // 8
    assert time.process_time() - began_at < 3 * permutation_s
    tracemalloc.start()
    try:
        take_epoch()
        assert n < tracemalloc.get_traced_memory()[1] < 10 * n
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_what_only_several_ranks_need_is_imported_where_they_do():
    found = []
    for name in project_trees():
        if not name.startswith(("benchmarks/", "scripts/")):
            for line in (REPOSITORY / name).read_text(encoding="utf-8").splitlines():
                if re.match(r"\s*(from|import) torch\.(distributed\.\w|nn\.parallel)", line):
                    found.append(line)
    assert len(found) > 4
    # torch's optimizers load torch.distributed.fsdp on their own account
    assert all(line.startswith("    ") for line in found)
