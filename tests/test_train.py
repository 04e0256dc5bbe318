"""The loop and its steps on a model so small that every number can be checked."""

import ast
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import distributed.signals
import train
from data import WindowDataset, evaluation_loader, make_loaders, plan_windows
from engine.console import say
from engine.errors import NumericsError, SettingsError, Stopped
from engine.optim import Schedule, build_adamw, build_optimizer, learning_rate_at
from engine.precision import Precision
from model import GPTConfig, GPTModel
from storage.checkpoint import CheckpointStore, SaveClock
from tests.conftest import REPOSITORY, HostReads
from train import (
    MOST_HALVINGS,
    MOST_SKIPPED,
    LoopPlan,
    Saving,
    SkippedSteps,
    Trainer,
    continue_prompts,
    train_model_simple,
    training_loop,
)
from training.journal import PICTURE, History, Journal
from training.learner import Learner, batch_loss, count_steps, mean_loss, steps_of_epoch, take_step

CPU = torch.device("cpu")
FP32 = Precision("fp32", "as set", "cpu")
CONTEXT = 8
BATCH = 2
OPTIMIZERS = {
    "fused AdamW": lambda model: build_adamw(model, learning_rate=1e-2, weight_decay=0.1),
    "Muon": lambda model: build_optimizer("muon", model, 1e-2, 0.1),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


class Letters:
    """The tokenizer of the eight letters a to h."""

    name = fingerprint = "letters"
    vocab_size = 8
    end_of_text_id = 8  # which is none of the letters

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def tiny_model(**changes) -> GPTModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 8, "context_length": CONTEXT, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
    return GPTModel(GPTConfig(**(shape | changes)))


def tiny_loaders(n_batches: int = 5) -> tuple[DataLoader, DataLoader]:
    """n_batches training batches of letters that count to seven, each with a coin toss on top."""
    n_train = n_batches * BATCH * CONTEXT + 1
    n_tokens = n_train + 21  # validation: two whole windows, then a tail of four targets
    windows, notices = plan_windows(
        n_tokens,
        max_length=CONTEXT,
        stride=CONTEXT,
        batch_size=BATCH,
        train_ratio=(n_train + 0.5) / n_tokens,
    )
    assert (windows.n_train, notices) == (n_train, [])
    noise = np.random.default_rng(0).integers(0, 2, n_tokens)
    tokens = (np.arange(n_tokens) % 7 + noise).astype(np.uint16)
    train, val = make_loaders(tokens, windows, seed=1, num_workers=0, device=torch.device("cpu"))
    assert len(train) == n_batches
    return train, val


def new_trainer(
    total_steps: int,
    *,
    model=None,
    optimizer=None,
    folder=None,
    log_every=0,
    kind=Trainer,
    **plan,
) -> Trainer:
    """A trainer of a tiny model that saves nothing."""
    model = model or tiny_model()
    optimizer = optimizer or build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
    journal = Journal(8, total_steps, log_every, folder)
    learner = Learner(model, optimizer, FP32)
    return kind(learner, journal, Letters(), new_plan(total_steps, **plan))


def new_plan(total_steps: int, **changes) -> LoopPlan:
    defaults = {"eval_freq": 100, "eval_iter": 2, "max_grad_norm": 1.0, "schedule": None}
    return LoopPlan(total_steps=total_steps, **(defaults | {"prompts": ["abc"]} | changes))


def run(
    total_steps: int,
    *,
    model=None,
    n_batches=5,
    optimizer=None,
    folder=None,
    log_every=0,
    kind=Trainer,
    **plan,
):
    """A run of the loop; what it left: trainer, model, optimizer and history."""
    trainer = new_trainer(
        total_steps,
        model=model,
        optimizer=optimizer,
        folder=folder,
        log_every=log_every,
        kind=kind,
        **plan,
    )
    training_loop(trainer, *tiny_loaders(n_batches))
    return SimpleNamespace(
        trainer=trainer,
        model=trainer.learner.model,
        optimizer=trainer.learner.optimizer,
        history=trainer.journal.history,
    )


def rows_of(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------ the loop


@pytest.mark.parametrize(
    ("total_steps", "eval_freq", "expected"),
    [
        (10, 100, [0, 5, 10]),
        (10, 5, [0, 5, 10]),  # an epoch's end is not evaluated twice
        (10, 2, [0, 2, 4, 5, 6, 8, 10]),
        (10, 1, list(range(11))),
        (7, 3, [0, 3, 5, 6, 7]),  # an epoch cut short ends there
        (5, 100, [0, 5]),
        (1, 100, [0, 1]),
        (0, 1, [0]),
    ],
)
def test_evaluations_fall_on_step_0_every_eval_freq_and_each_epochs_end(
    total_steps, eval_freq, expected
):
    history = run(total_steps, eval_freq=eval_freq).history
    assert history.steps == expected
    assert len(history.train_losses) == len(history.val_losses) == len(expected)
    assert history.tokens_seen == [step * BATCH * CONTEXT for step in expected]
    assert len(history.batch_losses) == total_steps
    assert history.elapsed_s > 0


@pytest.mark.parametrize("num_epochs", [0, 1, 3])
def test_train_model_simple_returns_three_lists_of_one_length(num_epochs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    train_loader, val_loader = tiny_loaders()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_losses, val_losses, tokens_seen = train_model_simple(
        model,
        train_loader,
        val_loader,
        optimizer,
        "cpu",
        num_epochs=num_epochs,
        eval_freq=2,
        eval_iter=3,
        start_context="abc",
        tokenizer=Letters(),
    )
    steps = [0] + [5 * epoch + step for epoch in range(num_epochs) for step in (2, 4, 5)]
    if num_epochs == 3:
        steps = [0, 2, 4, 5, 6, 8, 10, 12, 14, 15]  # every second step, and each fifth
    assert tokens_seen == [step * BATCH * CONTEXT for step in steps]
    assert len(train_losses) == len(val_losses) == len(steps)
    assert all(math.isfinite(loss) for loss in train_losses + val_losses)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3, 1.0])
def test_train_model_simple_is_the_same_loop(max_grad_norm):
    model = tiny_model()
    train_losses, val_losses, _ = train_model_simple(
        model,
        *tiny_loaders(),
        OPTIMIZERS["SGD"](model),
        CPU,
        2,
        3,
        2,
        "abc",
        Letters(),
        precision=FP32,
        max_grad_norm=max_grad_norm,
    )
    twin = tiny_model()
    expected = run(
        10, model=twin, optimizer=OPTIMIZERS["SGD"](twin), eval_freq=3, max_grad_norm=max_grad_norm
    ).history
    assert (train_losses, val_losses) == (expected.train_losses, expected.val_losses)


def test_gradients_that_a_caller_left_behind_are_not_trained_on():
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert run(3, model=model).history.batch_losses == run(3).history.batch_losses


def test_training_lowers_the_loss_down_to_that_of_the_noise():
    history = run(150, n_batches=150, eval_iter=20).history
    assert history.batch_losses[0] == pytest.approx(math.log(8), rel=0.05)
    assert history.train_losses[0] == pytest.approx(math.log(8), rel=0.05)
    # the letter before leaves 1.04 nats, and no letters leave less than the toss, ln 2
    assert math.log(2) < history.train_losses[-1] < 1.4
    assert history.val_losses[-1] < 1.4


def test_the_same_run_gives_the_same_numbers_whatever_the_global_seed():
    histories = []
    for seed in (1, 2):
        model = tiny_model()
        torch.manual_seed(seed)
        histories.append(run(8, model=model).history)
    assert histories[0].batch_losses == histories[1].batch_losses
    assert histories[0].val_losses == histories[1].val_losses


def test_evaluating_more_often_does_not_change_the_training():
    often = run(8, model=tiny_model(drop_rate=0.2), eval_freq=1, eval_iter=100)
    rarely = run(8, model=tiny_model(drop_rate=0.2), eval_freq=100, eval_iter=1)
    assert often.history.batch_losses == rarely.history.batch_losses
    for name, value in often.model.state_dict().items():
        assert torch.equal(value, rarely.model.state_dict()[name]), name


def test_steps_equal_a_loop_written_out_by_hand():
    found = run(10, max_grad_norm=0.0)
    model = tiny_model()
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
    loader, _ = tiny_loaders()
    losses = []
    for ids, targets in itertools.chain(loader, loader):  # the second epoch has an order of its own
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found.history.batch_losses == pytest.approx(losses, rel=1e-6)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_each_step_has_the_learning_rate_of_the_schedule(kind, tmp_path, no_pictures):
    schedule = Schedule(kind, peak=3e-3, warmup_steps=3, total_steps=8, decay_steps=3)
    model = tiny_model()
    optimizer = build_adamw(model, learning_rate=1.0, weight_decay=0.1)
    used = []
    optimizer.register_step_post_hook(
        lambda stepped, *_: used.append([group["lr"] for group in stepped.param_groups])
    )
    run(8, model=model, optimizer=optimizer, folder=tmp_path, schedule=schedule)
    expected = [learning_rate_at(step, schedule) for step in range(8)]
    assert len(set(expected)) > 3
    assert used == [[rate, rate] for rate in expected]
    assert [row["train/lr"] for row in rows_of(tmp_path) if "train/lr" in row] == expected


def test_without_a_schedule_the_rates_stay_as_they_are():
    model = tiny_model()
    groups = [
        {"params": [model.token_embedding.weight], "lr": 1e-3},
        {"params": list(model.blocks.parameters()), "lr": 2e-3},
    ]
    optimizer = torch.optim.SGD(groups)
    run(3, model=model, optimizer=optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2e-3]


def norms_at_each_step(optimizer: torch.optim.Optimizer) -> list[float]:
    """A list that will hold the length of the whole gradient that each step used."""
    norms = []

    def note(stepped, *_):
        gradients = [p.grad.double() for group in stepped.param_groups for p in group["params"]]
        norms.append(math.sqrt(sum((gradient**2).sum().item() for gradient in gradients)))

    optimizer.register_step_pre_hook(note)
    return norms


def gradient_norms(max_grad_norm: float, folder: Path) -> tuple[list[float], list[float]]:
    """The lengths that each step used, and those that metrics.jsonl tells."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = norms_at_each_step(optimizer)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    run(5, model=model, optimizer=optimizer, max_grad_norm=max_grad_norm, folder=folder)
    told = [row["train/grad_norm"] for row in rows_of(folder) if "train/grad_norm" in row]
    return norms, told


def test_gradients_are_cut_to_max_grad_norm_and_0_never_cuts(tmp_path, no_pictures):
    uncut, told = gradient_norms(0.0, tmp_path)
    assert told == pytest.approx(uncut)
    assert gradient_norms(1e6, tmp_path)[0] == pytest.approx(uncut)
    limit = sorted(uncut)[2]  # above some, below others
    cut, told = gradient_norms(limit, tmp_path)
    assert cut == pytest.approx([min(norm, limit) for norm in uncut], rel=1e-3)
    assert told == pytest.approx(uncut)  # what there was before the cut
    assert min(uncut) < limit < max(uncut)


def test_train_model_simple_cuts_gradients_to_length_1():
    model = tiny_model(tie_embeddings=False)
    with torch.no_grad():
        model.head.weight *= 100  # all gradients are longer than 1 now
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = norms_at_each_step(optimizer)
    train_model_simple(
        model, *tiny_loaders(), optimizer, CPU, 1, 100, 1, "abc", tokenizer=Letters()
    )
    assert norms == pytest.approx([1.0] * 5, rel=1e-3)


# ------------------------------------------------------------------ accumulation


def loader_of_13_windows(micro_batch: int | None, sampling: str = "windows") -> DataLoader:
    """Thirteen windows of letters in steps of 2 x 3, so that an epoch's last step has one."""
    n_train = 13 * CONTEXT + 1
    tokens = np.random.default_rng(0).integers(0, 8, n_train + 21).astype(np.uint16)
    windows, _ = plan_windows(
        len(tokens),
        max_length=CONTEXT,
        stride=CONTEXT,
        batch_size=3,
        train_ratio=0.5,
        n_train=n_train,
    )
    return make_loaders(
        tokens,
        windows,
        seed=1,
        num_workers=0,
        device=CPU,
        sampling=sampling,
        accumulation=2,
        micro_batch=micro_batch,
    )[0]


@pytest.mark.parametrize(
    ("micro_batch", "sampling", "sizes"),
    [
        (None, "windows", [[3, 3], [3, 3], [1]]),
        (6, "windows", [[6], [6], [1]]),
        (4, "windows", [[4, 2], [4, 2], [1]]),
        (1, "windows", [[1] * 6, [1] * 6, [1]]),
        (4, "random", [[4, 2]] * 3),
    ],
)
def test_a_step_takes_the_same_windows_in_whatever_micro_batches(micro_batch, sampling, sizes):
    def steps(loader, epoch, first=0):
        found = list(steps_of_epoch(loader, epoch, first, 3))
        for batches, n_targets, _ in found:
            assert n_targets == sum(targets.numel() for _, targets in batches)
        return [step.batches for step in found]

    loader, whole = (loader_of_13_windows(size, sampling) for size in (micro_batch, 6))
    assert count_steps(loader) == count_steps(whole) == 3
    orders = []
    for epoch in (0, 1, 0):
        found = steps(loader, epoch)
        assert [[len(ids) for ids, _ in batches] for batches in found] == sizes
        for batches, ((ids, targets),) in zip(found, steps(whole, epoch), strict=True):
            assert torch.equal(torch.cat([x for x, _ in batches]), ids)
            assert torch.equal(torch.cat([y for _, y in batches]), targets)
        orders.append(torch.cat([ids for batches in found for ids, _ in batches]))
        late = steps(loader, epoch, first=1)  # as after a resume
        assert torch.equal(
            torch.cat([ids for batches in late for ids, _ in batches]), orders[-1][6:]
        )
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 5])
def test_a_step_in_micro_batches_equals_the_one_big_batch(micro_batch):
    # steps of a length that shows each difference: no clipping, no momentum, a rate of 1
    def gradients_losses_weights(size: int):
        model, gradients, losses = tiny_model(), [], []
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer.register_step_pre_hook(
            lambda *_: gradients.append([p.grad.clone() for p in model.parameters()])
        )
        loader = loader_of_13_windows(size)
        for step in [*steps_of_epoch(loader, 0, 0, 3), *steps_of_epoch(loader, 1, 0, 3)]:
            losses.append(take_step(model, step.batches, optimizer, FP32, 0.0)[0].item())
        return gradients, losses, list(model.parameters())

    gradients, losses, weights = gradients_losses_weights(micro_batch)
    expected_gradients, expected_losses, expected_weights = gradients_losses_weights(6)
    assert len(losses) == 6
    assert losses == pytest.approx(expected_losses, abs=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=2e-6)


def test_the_loss_of_micro_batches_of_unequal_shapes_is_the_mean_over_targets():
    ids = torch.randint(8, (5, CONTEXT), generator=torch.Generator().manual_seed(0))
    batches = [(ids[:3], ids[:3] // 2), (ids[3:4, :5], ids[3:4, :5]), (ids[4:], ids[4:])]
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in model.parameters())
    )
    loss, norm = take_step(model, batches, optimizer, FP32, 0.0)
    total = sum(
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in batches
    )
    expected = total / (24 + 5 + 8)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    by_hand = [p.grad for p in model.parameters()]
    torch.testing.assert_close(seen, by_hand, rtol=0, atol=1e-6)
    length = math.sqrt(sum((gradient.double() ** 2).sum().item() for gradient in by_hand))
    assert norm.item() == pytest.approx(length, rel=1e-5)


def test_the_loop_counts_steps_and_tokens_of_whole_steps():
    def history(micro_batch):
        trainer = new_trainer(7, optimizer=None)
        loader = loader_of_13_windows(micro_batch)
        training_loop(trainer, loader, tiny_loaders()[1])
        return trainer.journal.history

    found, expected = history(2), history(6)
    assert found.steps == expected.steps == [0, 3, 6, 7]
    assert found.tokens_seen == [n * CONTEXT for n in (0, 13, 26, 32)]
    assert found.tokens_seen == expected.tokens_seen
    assert found.batch_losses == pytest.approx(expected.batch_losses, abs=1e-4)


# ------------------------------------------------------------------ numbers gone bad


def spoil_loss(model: GPTModel, wanted=lambda: True):
    """A NaN in the hidden states of training, where wanted; returns what ends it."""
    return model.final_norm.register_forward_hook(
        lambda module, _, out: out * math.nan if module.training and wanted() else None
    )


def spoil_gradient(model: GPTModel, wanted=lambda: True):
    """Infinities in one gradient; the loss stays fine."""
    return model.final_norm.weight.register_hook(
        lambda gradient: torch.full_like(gradient, math.inf) if wanted() else None
    )


def everything(model: GPTModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of the weights and the optimizer's state."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {name: parameter.detach().clone() for parameter, name in names.items()}
    for parameter, state in optimizer.state.items():
        for kind, value in state.items():
            found[f"{kind} {names[parameter]}"] = torch.as_tensor(value).clone()
    return found


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return everything(trainer.learner.model, trainer.learner.optimizer)


def assert_the_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_with_a_bad_number_changes_nothing(kind, spoil, max_grad_norm):
    first, second, third = itertools.islice(tiny_loaders()[0], 3)

    def subject():
        model = tiny_model()
        optimizer = OPTIMIZERS[kind](model)

        def step(*batches):
            return take_step(model, list(batches), optimizer, FP32, max_grad_norm)

        step(first)
        return model, optimizer, step

    model, optimizer, step = subject()
    before = everything(model, optimizer)
    spoiling = spoil(model)
    for batches in ([second], [second, third]):
        loss, norm = step(*batches)
        assert math.isfinite(loss) == (spoil is spoil_gradient)
        assert not math.isfinite(norm)
        assert_the_same(everything(model, optimizer), before)
        assert all(parameter.grad is None for parameter in model.parameters())
    spoiling.remove()
    step(third)
    twin_model, twin_optimizer, twin_step = subject()
    twin_step(third)
    assert_the_same(everything(model, optimizer), everything(twin_model, twin_optimizer))
    assert not torch.equal(model.head.weight, before["token_embedding.weight"])


def test_a_bad_first_step_leaves_the_weights():
    model = tiny_model()
    optimizer = OPTIMIZERS["fused AdamW"](model)
    spoil_gradient(model)
    take_step(model, [next(iter(tiny_loaders()[0]))], optimizer, FP32, 1.0)
    for name, value in tiny_model().named_parameters():
        assert torch.equal(model.get_parameter(name), value), name
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())


def test_with_a_fused_optimizer_nobody_waits_for_the_numbers():
    def waits(kind: str) -> int:
        model = tiny_model()
        optimizer = OPTIMIZERS[kind](model)
        batches = list(itertools.islice(tiny_loaders()[0], 2))
        with HostReads() as of_losses:  # on a CPU the loss looks whether its gradient is 1
            for ids, targets in batches:
                batch_loss(model, ids, targets, FP32).backward()
        with HostReads() as mode:
            take_step(model, batches, optimizer, FP32, 1.0)
        return mode.count - of_losses.count

    assert waits("fused AdamW") == waits("Muon") == 0
    assert waits("SGD") > 0  # so the count can count


def test_after_a_bad_step_a_step_of_the_callers_own_is_taken():
    model = tiny_model()
    optimizer = OPTIMIZERS["fused AdamW"](model)
    spoiling = spoil_gradient(model)
    ids, targets = next(iter(tiny_loaders()[0]))
    take_step(model, [(ids, targets)], optimizer, FP32, 1.0)
    spoiling.remove()
    before = model.head.weight.detach().clone()
    F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fp16_scales_the_loss_and_not_the_gradients_and_halves_the_scale_for_a_bad_step(
    kind, spoil
):
    fp16 = Precision("fp16", "as set", "cpu")
    scaler = fp16.scaler()
    assert scaler.is_enabled()
    model = tiny_model()
    optimizer = OPTIMIZERS[kind](model)
    first, second, third = itertools.islice(tiny_loaders()[0], 3)
    loss, norm = take_step(model, [first, second], optimizer, fp16, 1e-3, scaler=scaler)
    twin = tiny_model()
    expected = take_step(twin, [first, second], OPTIMIZERS[kind](twin), FP32, 1e-3)
    assert (loss.item(), norm.item()) == pytest.approx([x.item() for x in expected], rel=0.01)
    if kind == "SGD":  # which moves by the gradient's length, so it was cut unscaled
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))

    scale, before = scaler.get_scale(), everything(model, optimizer)
    spoiling = spoil(model)
    take_step(model, [second, third], optimizer, fp16, 1.0, scaler=scaler)
    assert scaler.get_scale() == scale / 2
    assert_the_same(everything(model, optimizer), before)
    spoiling.remove()
    take_step(model, [third], optimizer, fp16, 1.0, scaler=scaler)
    assert scaler.get_scale() == scale / 2
    assert not torch.equal(model.head.weight, before["token_embedding.weight"])
    assert all(value.isfinite().all() for value in everything(model, optimizer).values())


GOOD, NAN, INF = 1.0, math.nan, math.inf


class Counted:
    """A run's steps as the rule on skipped ones sees them: a loss and a gradient's norm each."""

    def __init__(self, *, scales_loss: bool = False) -> None:
        self.skipped, self.history, self.steps = SkippedSteps(scales_loss), History(), 0

    def step(self, loss: float = GOOD, norm: float = GOOD) -> None:
        self.steps += 1
        row = {"step": self.steps, "train/loss": loss, "train/grad_norm": norm, "train/lr": 0.01}
        self.skipped.look_at(row, self.history)


@pytest.mark.parametrize(
    ("loss", "norm"), [(NAN, NAN), (INF, NAN), (-INF, GOOD), (GOOD, INF), (GOOD, NAN)]
)
def test_a_step_with_a_bad_number_is_counted_and_said(loss, norm, capsys):
    run = Counted()
    run.step()
    run.step(loss, norm)
    run.step()
    assert (run.history.skipped, run.skipped.in_a_row) == (1, 0)
    assert capsys.readouterr().out.splitlines() == [
        f"Note: step 2: the loss is {loss:.4g} and the gradient's norm {norm:.4g}: the step is "
        "skipped (1 so far)"
    ]


def test_too_many_skipped_in_a_row_stop_the_run_and_a_good_one_resets_the_row():
    run = Counted()
    for _ in range(3):
        for _ in range(MOST_SKIPPED - 1):
            run.step(NAN, NAN)
        run.step()
    assert run.history.skipped == 3 * (MOST_SKIPPED - 1)
    with pytest.raises(NumericsError) as caught:
        for _ in range(MOST_SKIPPED):
            run.step(GOOD, INF)
    assert run.steps == 4 * MOST_SKIPPED
    assert caught.value.exit_code == 5
    assert str(caught.value).startswith(f"step {run.steps}: the loss is 1 and the gradient's")
    assert "The learning rate was 0.01; begin a run with a third of it" in str(caught.value)


def test_overflows_that_only_lower_the_loss_scale_are_neither_counted_nor_told(capsys):
    """fp16 begins with a scale of 2 ** 16 and halves it until the gradients fit."""
    run = Counted(scales_loss=True)
    for n_overflows in (MOST_HALVINGS, 1, 0):
        for _ in range(n_overflows):
            run.step(GOOD, INF)
        run.step()
    assert (run.history.skipped, capsys.readouterr().out) == (0, "")
    run.step(NAN, NAN)  # a loss that is not a number is no overflow
    assert run.history.skipped == 1
    with pytest.raises(NumericsError):
        for _ in range(MOST_HALVINGS + MOST_SKIPPED):
            run.step(GOOD, INF)
    assert run.steps == MOST_HALVINGS + 5 + MOST_HALVINGS + MOST_SKIPPED - 1


def test_the_row_of_skipped_steps_outlasts_an_interruption(tmp_path, no_pictures):
    trainer = saving_trainer(tmp_path, MOST_SKIPPED - 1, save_every=100)
    trainer.skipped.halvings = 3  # as of fp16
    spoil_gradient(trainer.learner.model)
    training_loop(trainer, *tiny_loaders())
    again = saving_trainer(tmp_path, MOST_SKIPPED, save_every=100)
    assert again.skipped == trainer.skipped
    spoil_gradient(again.learner.model)
    with pytest.raises(NumericsError, match=f"step {MOST_SKIPPED}:"):
        training_loop(again, *tiny_loaders())


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_a_run_goes_on_past_a_bad_step_that_is_counted_said_and_null(
    spoil, tmp_path, no_pictures, capsys
):
    trainer = new_trainer(8, folder=tmp_path, eval_freq=2)
    spoil(trainer.learner.model, lambda: trainer.journal.steps == 2)
    training_loop(trainer, *tiny_loaders())
    history = trainer.journal.history
    assert history.skipped == 1
    notes = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(notes) == 1
    assert notes[0].startswith("Note: step 3: the loss is ")
    norms = {row["step"]: row["train/grad_norm"] for row in rows_of(tmp_path) if "train/lr" in row}
    assert [step for step, norm in norms.items() if norm is None] == [3]
    assert len(norms) == len(history.batch_losses) == 8
    assert all(parameter.isfinite().all() for parameter in trainer.learner.model.parameters())
    assert history.val_losses[-1] < history.val_losses[0]


@pytest.mark.parametrize(("log_every", "ends_at"), [(1, 13), (0, 15)])
def test_a_run_whose_steps_are_all_bad_ends_and_names_the_step(
    log_every, ends_at, tmp_path, no_pictures
):
    trainer = new_trainer(100, folder=tmp_path, log_every=log_every)
    spoil_gradient(trainer.learner.model, lambda: trainer.journal.steps >= 3)
    with pytest.raises(NumericsError, match=f"as {MOST_SKIPPED - 1} times in a row") as caught:
        training_loop(trainer, *tiny_loaders())
    assert caught.value.exit_code == 5
    assert str(caught.value).startswith("step 13: ")
    assert "learning rate was 0.01" in str(caught.value)
    assert trainer.journal.steps == ends_at  # where the numbers were looked at next
    assert all(parameter.isfinite().all() for parameter in trainer.learner.model.parameters())


def test_weights_that_go_bad_stop_the_run_at_the_next_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = new_trainer(10, folder=tmp_path)
    steps = []

    def poison(*_):
        steps.append(None)
        if len(steps) == 3:
            with torch.no_grad():
                trainer.learner.model.final_norm.bias.fill_(math.nan)

    trainer.learner.optimizer.register_step_post_hook(poison)
    with pytest.raises(NumericsError, match="after step 5 the training loss is nan"):
        training_loop(trainer, *tiny_loaders())
    losses = {row["step"]: row["train/loss"] for row in rows_of(tmp_path) if "train/loss" in row}
    assert losses[3] > 0
    assert losses[4] is None
    assert not (tmp_path / PICTURE).exists()


def test_weights_that_the_last_step_spoils_stop_the_run_too():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=math.inf)
    with pytest.raises(NumericsError, match="after step 1 the training loss is nan"):
        run(1, model=model, optimizer=optimizer)


# ------------------------------------------------------------------ signals within a step


def send_at(model: GPTModel, number: int, *, training: bool, wanted=lambda: True) -> list[bool]:
    """Have SIGTERM sent to this process in forward pass `number`, of training or evaluation.

    Returns a list that grows with each such pass.
    """
    passes = []

    def count(module, _):
        if module.training == training and wanted():
            passes.append(training)
            if len(passes) == number:
                os.kill(os.getpid(), signal.SIGTERM)

    model.final_norm.register_forward_pre_hook(count)
    return passes


def trainer_within_a_run() -> tuple[Trainer, list]:
    """A trainer with dropout after one step, and the next, of six micro-batches."""
    trainer = new_trainer(10, model=tiny_model(drop_rate=0.2))
    first, second = steps_of_epoch(loader_of_13_windows(1), 0, 0, 2)
    torch.manual_seed(5)
    trainer.step(first)
    return trainer, second


def test_a_long_step_is_left_as_if_it_had_never_begun(monkeypatch):
    trainer, step = trainer_within_a_run()
    before, random_before = (
        state_of(trainer),
        torch.get_rng_state(),
    )
    passes = send_at(trainer.learner.model, 2, training=True)
    with monkeypatch.context() as patch, trainer.stop:
        patch.setattr(distributed.signals, "_LONG_S", 0.0)  # every step is long
        with pytest.raises(Stopped) as caught:
            trainer.step(step)
    assert caught.value.exit_code == 143
    assert len(passes) == 2
    assert_the_same(state_of(trainer), before)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert all(parameter.grad is None for parameter in trainer.learner.model.parameters())

    trainer.stop = distributed.signals.StopSignals()
    loss, _ = trainer.step(step)
    twin, step = trainer_within_a_run()
    expected, _ = twin.step(step)
    assert loss == expected
    assert_the_same(
        state_of(trainer),
        state_of(twin),
    )


def test_a_short_step_is_finished_first():
    trainer, step = trainer_within_a_run()
    passes = send_at(trainer.learner.model, 2, training=True)
    with trainer.stop:
        trainer.step(step)
        with pytest.raises(Stopped):
            trainer.stop.check()
    assert len(passes) == len(step.batches) == 6
    twin, step = trainer_within_a_run()
    twin.step(step)
    assert_the_same(
        state_of(trainer),
        state_of(twin),
    )


def test_an_evaluation_stops_between_two_batches():
    trainer = new_trainer(10)
    trainer.learner.model.train()
    loader = tiny_loaders()[0]
    assert len(loader) == 5
    passes = send_at(trainer.learner.model, 2, training=False)
    with trainer.stop, pytest.raises(Stopped):
        trainer.evaluate(loader)
    assert len(passes) == 2
    assert trainer.learner.model.training
    mean_loss(trainer.learner.model, loader, CPU, FP32)  # nobody who could stop was passed
    assert len(passes) == 7


# ------------------------------------------------------------------ leaving and coming back

RATES = Schedule("cosine", peak=1e-2, warmup_steps=2, total_steps=12)


class NotingStore(CheckpointStore):
    """A store that says what it does."""

    def save(self, step, *arguments) -> None:
        super().save(step, *arguments)
        say(f"saved {step}")


def saving_trainer(
    folder: Path, total_steps: int, save_every: int, *, kind=Trainer, precision=FP32, **plan
) -> Trainer:
    """A trainer that goes on from what the folder has."""
    model = tiny_model(drop_rate=0.1)
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
    trainer = kind(
        Learner(model, optimizer, precision),
        Journal(8, total_steps, folder=folder),
        Letters(),
        new_plan(total_steps, **({"schedule": RATES} | plan)),
        Saving(None, NotingStore(folder, "some run", keep=2), SaveClock(save_every, minutes=5)),
    )
    trainer.restore()
    return trainer


def test_a_checkpoint_comes_before_the_evaluation_of_its_step(tmp_path, no_pictures, capsys):
    trainer = saving_trainer(tmp_path, 8, save_every=3, eval_freq=3)
    training_loop(trainer, *tiny_loaders())
    events = [
        " ".join(line.split()[:2])
        for line in capsys.readouterr().out.splitlines()
        if re.match(r"saved|step \d+: train loss|Before training: Train|After epoch", line)
    ]
    assert events == [
        "Before training:",
        "saved 3",
        "step 3:",
        "step 5:",
        "After epoch",
        "saved 6",
        "step 6:",
        "saved 8",
        "step 8:",
        "After epoch",
    ]
    assert (tmp_path / "checkpoints" / "step-00000008").is_dir()
    trainer.save()  # there is one of this step
    assert "saved" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "at_step"),
    [("step", step) for step in (1, 3, 4, 5, 6, 11, 12)]
    + [("evaluation", step) for step in (0, 4, 5, 8, 12)],
)
def test_a_stopped_run_goes_on_with_what_it_owes_and_does_nothing_twice(
    where, at_step, tmp_path, no_pictures, capsys
):
    def begin(name):
        (tmp_path / name).mkdir(exist_ok=True)
        torch.manual_seed(3)
        return saving_trainer(tmp_path / name, 12, save_every=7, eval_freq=4)

    undisturbed = begin("undisturbed")
    training_loop(undisturbed, *tiny_loaders())

    stopped = begin("stopped")
    send_at(
        stopped.learner.model,
        2 if where == "evaluation" else 1,
        training=where == "step",
        wanted=lambda: stopped.journal.steps == at_step - (where == "step"),
    )
    with pytest.raises(Stopped), stopped.stop:
        training_loop(stopped, *tiny_loaders())
    stopped.save()
    assert stopped.journal.steps == at_step
    assert stopped.learner.model.training
    capsys.readouterr()

    resumed = begin("stopped")
    assert resumed.journal.steps == at_step
    training_loop(resumed, *tiny_loaders())
    assert_the_same(
        state_of(resumed),
        state_of(undisturbed),
    )
    found, expected = resumed.journal.history, undisturbed.journal.history
    found.elapsed_s = expected.elapsed_s
    assert found == expected
    assert found.steps == [0, 4, 5, 8, 10, 12]
    kinds = [
        [(row["step"], "val/loss" in row) for row in rows_of(tmp_path / name)]
        for name in ("undisturbed", "stopped")
    ]
    assert kinds[0] == kinds[1]
    bars = [re.sub(r"\|.*\|", "||", line) for line in capsys.readouterr().err.splitlines()]
    all_bars = ["Epoch 1: 100%|| 5/5", "Epoch 2: 100%|| 5/5", "Epoch 3: 100%|| 2/2"]
    assert bars == all_bars[at_step // 5 if at_step < 12 else 3 :]


def test_the_loss_scale_of_fp16_is_found_again(tmp_path, no_pictures):
    fp16 = Precision("fp16", "as set", "cpu")
    trainer = saving_trainer(tmp_path, 4, save_every=9, precision=fp16)
    spoil_gradient(trainer.learner.model, lambda: trainer.journal.steps == 1)
    training_loop(trainer, *tiny_loaders())
    expected = trainer.learner.scaler.state_dict()
    assert (expected["scale"], expected["_growth_tracker"]) == (2.0**15, 2)
    again = saving_trainer(tmp_path, 4, save_every=9, precision=fp16)
    assert again.learner.scaler.state_dict() == expected


def test_a_run_begun_in_another_precision_goes_on_in_fp16_with_a_new_scaler(tmp_path, no_pictures):
    trainer = saving_trainer(tmp_path, 4, save_every=9)
    training_loop(trainer, *tiny_loaders())
    again = saving_trainer(tmp_path, 4, save_every=9, precision=Precision("fp16", "", "cpu"))
    assert again.journal.steps == 4
    assert again.learner.scaler.get_scale() == 2.0**16


# ------------------------------------------------------------------ patience


def scripted(val_losses: list[float]) -> type[Trainer]:
    """A kind of trainer whose evaluations come to these losses."""
    both = (loss for val_loss in val_losses for loss in (1.0, val_loss))

    class Scripted(Trainer):
        def evaluate(self, *_) -> float:
            return next(both)

    return Scripted


VAL_LOSSES = [0.1, 3.0, 2.0, 2.5, 2.0, 2.1, 1.9, 1.8, 1.7, 1.6, 1.5]  # of steps 0, 2, 4, ...


@pytest.mark.parametrize(
    ("patience", "expected_steps", "best_step"),
    [(None, 20, 20), (1, 6, 4), (2, 8, 4), (3, 10, 4), (4, 20, 20)],
)
def test_patience_ends_the_run_after_so_many_evaluations_without_a_better_one(
    patience, expected_steps, best_step
):
    history = run(
        20, n_batches=50, eval_freq=2, patience=patience, kind=scripted(VAL_LOSSES)
    ).history
    assert len(history.batch_losses) == expected_steps
    assert history.steps == list(range(0, expected_steps + 1, 2))
    assert history.steps[history.best] == best_step
    assert history.since_best == (0 if patience in (None, 4) else patience)


def test_evaluations_that_are_all_the_same_use_patience_up():
    model = tiny_model()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    history = run(20, model=model, optimizer=still, eval_freq=1, patience=2).history
    assert history.steps == [0, 1, 2, 3]
    assert len(set(history.val_losses)) == 1


@pytest.mark.parametrize("stop_after", [None, 5, 8])
def test_the_best_weights_are_kept_over_worse_evaluations_and_interruptions(
    stop_after, tmp_path, no_pictures
):
    def begin(total_steps, folder, losses):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(3)
        return saving_trainer(
            folder, total_steps, 100, kind=scripted(losses), eval_freq=2, patience=3
        )

    twin = begin(4, tmp_path / "twin", VAL_LOSSES)
    training_loop(twin, *tiny_loaders(50))

    trainer = begin(20, tmp_path / "run", VAL_LOSSES)
    if stop_after is not None:
        send_at(
            trainer.learner.model,
            1,
            training=True,
            wanted=lambda: trainer.journal.steps == stop_after - 1,
        )
        with pytest.raises(Stopped), trainer.stop:
            training_loop(trainer, *tiny_loaders(50))
        trainer.save()
        trainer = begin(20, tmp_path / "run", VAL_LOSSES[-(-stop_after // 2) :])
    training_loop(trainer, *tiny_loaders(50))
    assert trainer.journal.steps == 10
    assert trainer.saving.best.step == 4
    assert not torch.equal(trainer.learner.model.head.weight, twin.learner.model.head.weight)
    trainer.use_best()
    for name, value in twin.learner.model.named_parameters():
        assert torch.equal(trainer.learner.model.get_parameter(name), value), name
    assert trainer.journal.weights_of_step == 4


# ------------------------------------------------------------------ the mean loss


@torch.no_grad()
def test_mean_loss_weighs_every_target_the_same():
    model = tiny_model(drop_rate=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    _, loader = tiny_loaders()
    sums, counts = [], []
    model.eval()
    for ids, targets in loader:
        log_probabilities = model(ids).double().log_softmax(-1)
        sums.append(-log_probabilities.gather(-1, targets[..., None]).sum().item())
        counts.append(targets.numel())
    assert counts == [16, 4]
    assert mean_loss(model, loader, CPU, FP32) == pytest.approx(sum(sums) / 20, rel=1e-6)
    mean_of_means = sum(s / n for s, n in zip(sums, counts, strict=True)) / 2
    assert abs(mean_of_means - sum(sums) / 20) > 0.01  # the two can be told apart


@pytest.mark.parametrize("training", [True, False])
def test_mean_loss_leaves_mode_and_generator_as_found(training):
    model = tiny_model(drop_rate=0.5).train(training)
    _, loader = tiny_loaders()
    state = torch.get_rng_state()
    first = mean_loss(model, evaluation_loader(loader), CPU, FP32)
    assert mean_loss(model, evaluation_loader(loader), CPU, FP32) == first  # no dropout
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loop_reports_the_mean_loss_of_its_evaluation_batches():
    model = tiny_model()
    train_loader, val_loader = tiny_loaders()
    expected_train = mean_loss(model, evaluation_loader(train_loader, 2), CPU, FP32)
    expected_val = mean_loss(model, val_loader, CPU, FP32)
    history = run(0, model=model).history
    assert (history.train_losses, history.val_losses) == ([expected_train], [expected_val])


# ------------------------------------------------------------------ what is printed


def test_lines_are_printed_in_the_order_of_events(capsys):
    history = run(7, log_every=2, eval_freq=3).history
    printed = capsys.readouterr()
    both = list(zip(history.train_losses, history.val_losses, strict=True))
    ends = [f"Train loss {train:.3f}, Val loss {val:.3f}" for train, val in both]
    evaluations = [
        f"train loss {train:.4f}, val loss {val:.4f}, speed: * tokens/sec, time: *"
        for train, val in both
    ]
    samples = [text for moment in history.samples for text in moment.texts]
    batch = [f"batch loss {loss:.4f}, * tokens/s, * left" for loss in history.batch_losses]
    untimed = re.sub(r"[\d,.]+ tokens/s", "* tokens/s", printed.out)
    untimed = re.sub(r"\d+m [\d.]+s", "*", untimed)
    assert untimed.splitlines() == [
        f"Before training: {ends[0]}",
        f"Before training: {samples[0]}",
        f"step 2: {batch[1]}",
        f"step 3: {evaluations[1]}",
        f"step 4: {batch[3]}",
        f"step 5: {evaluations[2]}",
        f"Ep 1 (End Epoch): {ends[2]}",
        f"After epoch 1: {samples[1]}",
        f"step 6: {batch[5]}",
        f"step 6: {evaluations[3]}",
        f"step 7: {evaluations[4]}",
        f"Ep 2 (End Epoch): {ends[4]}",
        f"After epoch 2: {samples[2]}",
    ]
    bars = [re.sub(r"\|.*\|", "||", line) for line in printed.err.splitlines()]
    assert bars == ["Epoch 1: 100%|| 5/5", "Epoch 2: 100%|| 2/2"]


def test_samples_go_on_from_the_start_context_greedily():
    first, second = (run(5).history.samples for _ in range(2))
    assert first == second
    for _, _, [text] in first:
        assert text.startswith("abc")
        assert len(text) == 3 + 30


def test_several_prompts_are_continued_together_as_each_would_be_alone(monkeypatch):
    batches = []

    def generate(model, ids, **options):
        batches.append(ids)
        return real(model, ids, **options)

    real = train.generate
    monkeypatch.setattr(train, "generate", generate)
    prompts = ["abc", "h", "gfedcba" * 4]  # the last one is longer than the model's context
    together = run(5, prompts=prompts).history.samples
    assert len(batches) == 2  # before training, and after the epoch
    assert [len(ids) for ids in batches] == [3, 3]
    alone = [run(5, prompts=[prompt]).history.samples for prompt in prompts]
    for i, moment in enumerate(together):
        assert moment.texts == [samples[i].texts[0] for samples in alone]


def test_a_sample_ends_at_the_end_of_text_and_the_others_go_on():
    class Ending(Letters):
        end_of_text_id = 3

    model, prompts = tiny_model(), ["abc", "hh", "g"]
    texts, ended = (
        continue_prompts(
            model,
            tokenizer,
            prompts,
            max_new_tokens=30,
            generator=torch.Generator().manual_seed(5),
        )
        for tokenizer in (Letters(), Ending())
    )
    assert ended == [text.split("d")[0] for text in texts]
    assert len({len(text) for text in ended}) == 3  # each at a place of its own
    assert all(text.startswith(prompt) for text, prompt in zip(ended, prompts, strict=True))


def test_of_a_very_long_prompt_the_end_is_shown():
    trainer = new_trainer(0, prompts=["ab" * 5000, "abc"])
    trainer.sample("Before training")
    long, short = trainer.journal.history.samples[0].texts
    assert (len(short), len(long)) == (3 + 30, 1 + 1000)
    assert long.startswith("…") and "ab" * 400 in long


def test_in_long_epochs_samples_come_at_evaluations_a_hundred_steps_apart_or_more():
    history = run(260, n_batches=250, eval_freq=40).history
    assert [(moment.label, moment.step) for moment in history.samples] == [
        ("Before training", 0),
        ("After step 120", 120),
        ("After step 240", 240),
        ("After epoch 1", 250),
        ("After epoch 2", 260),
    ]


def test_a_run_of_one_epoch_has_about_ten_samples_however_long_it_is():
    class Counting(Trainer):
        def step(self, _):
            return torch.tensor(1.0), torch.tensor(1.0)

    history = run(3000, n_batches=3000, eval_freq=50, eval_iter=1, kind=Counting).history
    assert [moment.step for moment in history.samples] == list(range(0, 3001, 300))


def test_the_time_of_a_sample_is_not_that_of_the_tokens(monkeypatch):
    trainer = new_trainer(5)
    left_out = []
    monkeypatch.setattr(trainer.journal, "leave_out", left_out.append)
    real = train.generate

    def slow(*arguments, **options):
        time.sleep(0.2)
        return real(*arguments, **options)

    monkeypatch.setattr(train, "generate", slow)
    trainer.sample("Before training")
    assert len(left_out) == 1
    assert 0.2 <= left_out[0] < 5


# ------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("log_every", [0, 3])
def test_metrics_have_a_row_for_each_step_and_each_evaluation(log_every, tmp_path, no_pictures):
    folder = tmp_path / "run"
    folder.mkdir()
    history = run(7, log_every=log_every, folder=folder, eval_freq=4).history
    rows = rows_of(folder)
    kinds = ["evaluation" if "val/loss" in row else "step" for row in rows]
    expected = [("evaluation", 0)] + [("step", i) for i in (1, 2, 3, 4)] + [("evaluation", 4)]
    expected += [("step", 5), ("evaluation", 5), ("step", 6), ("step", 7), ("evaluation", 7)]
    assert [(kind, row["step"]) for kind, row in zip(kinds, rows, strict=True)] == expected
    steps = [row for kind, row in zip(kinds, rows, strict=True) if kind == "step"]
    evaluations = [row for kind, row in zip(kinds, rows, strict=True) if kind == "evaluation"]
    assert [row.pop("train/grad_norm") > 0 for row in steps] == [True] * 7
    assert steps == [
        {"step": i, "train/loss": loss, "train/lr": 1e-2, "train/tokens": i * BATCH * CONTEXT}
        for i, loss in enumerate(history.batch_losses, start=1)
    ]
    assert [row["eval/train_loss"] for row in evaluations] == history.train_losses
    assert [row["val/loss"] for row in evaluations] == history.val_losses


def test_a_run_with_a_folder_leaves_metrics_samples_and_the_picture_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    run(5, folder=folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "metrics.jsonl",
        "samples.md",
        PICTURE,
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", PICTURE]


def test_a_folder_that_goes_away_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    trainer = new_trainer(10, folder=folder)
    trainer.learner.optimizer.register_step_post_hook(
        lambda *_: shutil.rmtree(folder, ignore_errors=True)
    )
    training_loop(trainer, *tiny_loaders())
    assert trainer.journal.history.batch_losses == run(10).history.batch_losses
    printed = capsys.readouterr().out
    assert printed.count("Note: ") == 3  # the log, the samples, the picture
    assert not folder.exists()


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(5)
    assert list(tmp_path.iterdir()) == []


def test_the_loop_is_short_and_leaves_files_and_ranks_to_others():
    tree = ast.parse((REPOSITORY / "train.py").read_text(encoding="utf-8"))
    (loop,) = (
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "training_loop"
    )
    assert loop.end_lineno - loop.lineno + 1 < 80
    names = {node.id for node in ast.walk(loop) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(loop) if isinstance(node, ast.Attribute)}
    assert "journal" in names
    foreign = re.compile("rank|world|path|folder|open|write|file|fsync|json", re.IGNORECASE)
    assert [name for name in names if foreign.search(name)] == []


def test_an_ordinary_loader_trains_too():
    tokens = (np.arange(200) % 8).astype(np.uint16)
    pairs = list(WindowDataset(tokens, CONTEXT, CONTEXT))
    loader = DataLoader(pairs, batch_size=4, shuffle=True)
    model = tiny_model()
    train_losses, val_losses, tokens_seen = train_model_simple(
        model,
        loader,
        loader,
        build_adamw(model, learning_rate=1e-2, weight_decay=0.0),
        CPU,
        num_epochs=8,
        eval_freq=100,
        eval_iter=2,
        start_context="abc",
        tokenizer=Letters(),
    )
    assert tokens_seen == [epoch * len(pairs) * CONTEXT for epoch in range(9)]
    assert train_losses[-1] < 0.5 * train_losses[0]
    assert val_losses == pytest.approx(train_losses)


def train_simply(start_context) -> None:
    model, loaders = tiny_model(), tiny_loaders()
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.0)
    train_model_simple(model, *loaders, optimizer, CPU, 1, 100, 2, start_context, Letters())


@pytest.mark.parametrize(
    ("start_context", "names"), [("abc", [""]), (["abc", "h"], [", prompt 1", ", prompt 2"])]
)
def test_one_prompt_or_several_are_continued_in_a_script(start_context, names, capsys):
    train_simply(start_context)
    printed = capsys.readouterr().out.splitlines()
    prompts = [start_context] if isinstance(start_context, str) else start_context
    for moment in ("Before training", "After epoch 1"):
        for name, prompt in zip(names, prompts, strict=True):
            line = rf"{moment}{name}: {prompt}[a-h]{{30}}"
            assert sum(re.fullmatch(line, found) is not None for found in printed) == 1


@pytest.mark.parametrize("start_context", ["", [], ["abc", ""], 5, None], ids=repr)
def test_a_wrong_start_context_in_a_script_is_refused_before_anything_is_done(
    start_context, capsys
):
    with pytest.raises(SettingsError, match="problem in train_model_simple") as caught:
        train_simply(start_context)
    assert "\n  start_context " in str(caught.value)
    assert capsys.readouterr().out == ""
