"""The loop and its steps on a model so small that every number can be checked."""

import ast
import inspect
import itertools
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

import engine.loss
import train
from data import WindowDataset, evaluation_loader
from engine.console import say
from engine.errors import CheckpointError, NumericsError, ResourceError, SettingsError, Stopped
from engine.optim import Schedule, build_adamw, build_optimizer, learning_rate_at
from engine.precision import Precision
from model import GPTModel
from storage import checkpoint
from storage.checkpoint import BestWeights, CheckpointStore, SaveClock
from tests.conftest import HostReads
from tests.letters import (
    BATCH,
    CONTEXT,
    CPU,
    FP32,
    Letters,
    assert_the_same,
    everything,
    loader_of_13_windows,
    new_plan,
    new_trainer,
    tiny_loaders,
    tiny_model,
)
from tests.resuming import Bench, rows_of
from train import (
    MOST_HALVINGS,
    MOST_SKIPPED,
    Saving,
    SkippedSteps,
    Trainer,
    _train_and_save,
    train_model_simple,
    training_loop,
)
from training import spacing
from training.journal import History, Journal
from training.learner import Learner, batch_loss, count_steps, mean_loss, steps_between, take_step

FP16 = Precision("fp16", "as set", "cpu")
OPTIMIZERS = {
    "fused AdamW": lambda model: build_adamw(model, learning_rate=1e-2, weight_decay=0.1),
    "Muon": lambda model: build_optimizer("muon", model, 1e-2, 0.1),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


@pytest.fixture(autouse=True, scope="module")
def short_samples():
    """To write a whole sample takes longer than an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAMPLE_TOKENS", 3)
        yield


def run(total_steps: int, *, n_batches=5, **options) -> Trainer:
    """A run of the loop, options being those of new_trainer(); the trainer that it leaves."""
    trainer = new_trainer(total_steps, **options)
    training_loop(trainer, *tiny_loaders(n_batches))
    return trainer


def history_of(*arguments, **options) -> History:
    return run(*arguments, **options).journal.history


class Pretending(Trainer):
    """A trainer that neither trains nor evaluates nor writes, for what the loop counts."""

    def step(self, _):
        return torch.tensor(1.0), torch.tensor(1.0)

    def evaluate(self, _, **options):
        return 1.0

    def sample(self, label):
        self.journal.note_sample(label, ["abc"])


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return everything(trainer.learner.model, trainer.learner.optimizer)


def length(gradients: list[torch.Tensor]) -> float:
    return math.sqrt(sum((gradient.double() ** 2).sum().item() for gradient in gradients))


@pytest.mark.parametrize(
    ("total_steps", "eval_freq", "expected"),
    [
        (10, 5, [0, 5, 10]),  # an epoch's end is not evaluated twice
        (10, 2, [0, 2, 4, 5, 6, 8, 10]),
        (7, 3, [0, 3, 5, 6, 7]),  # an epoch cut short ends there
        (1, 100, [0, 1]),
        (0, 1, [0]),
    ],
)
def test_evaluations_fall_on_step_0_every_eval_freq_and_each_epochs_end(
    total_steps, eval_freq, expected
):
    history = history_of(total_steps, eval_freq=eval_freq, kind=Pretending)
    assert history.steps == expected
    assert len(history.train_losses) == len(history.val_losses) == len(expected)
    assert history.tokens_seen == [step * BATCH * CONTEXT for step in expected]
    assert len(history.batch_losses) == total_steps
    assert history.elapsed_s > 0


def test_train_model_simple_is_the_same_loop_clips_at_1_and_writes_nothing(workdir, capsys):
    def long_gradients():
        model = tiny_model(tie_embeddings=False)
        with torch.no_grad():
            model.head.weight *= 100
        return model, OPTIMIZERS["SGD"](model)

    losses, prompts = [], ["abc", "h"]
    for epochs, limit, more in ((0, 1.0, {}), (2, 1.0, {}), (2, 0.0, {"max_grad_norm": 0.0})):
        options = {"precision": FP32, **more}  # as the twin, on each processor
        model, optimizer = long_gradients()
        for parameter in model.parameters():  # what a caller left behind is not trained on
            parameter.grad = torch.full_like(parameter, 100.0)
        found = train_model_simple(
            model, *tiny_loaders(), optimizer, "cpu", epochs, 3, 2, prompts, Letters(), **options
        )
        model, twin = long_gradients()
        plan = {"eval_freq": 3, "max_grad_norm": limit, "prompts": prompts}
        expected = history_of(5 * epochs, model=model, optimizer=twin, **plan)
        assert found == (expected.train_losses, expected.val_losses, expected.tokens_seen)
        assert optimizer.param_groups[0]["lr"] == 0.1
        losses.append(found[0])
        written = [line for line in capsys.readouterr().out.splitlines() if ", prompt " in line]
        half = len(written) // 2
        assert half == 2 * (epochs + 1) and written[:half] == written[half:]
    assert losses[1] != losses[2]
    assert list(workdir.iterdir()) == []


def test_training_lowers_the_loss_down_to_that_of_the_noise():
    history = history_of(80, n_batches=80, eval_iter=10)
    assert history.batch_losses[0] == pytest.approx(math.log(8), rel=0.05)
    assert history.train_losses[0] == pytest.approx(math.log(8), rel=0.05)
    # the letter before leaves 1.04 nats, and no letters leave less than the toss, ln 2
    assert math.log(2) < history.train_losses[-1] < 1.4
    assert history.val_losses[-1] < 1.4


def test_evaluating_more_often_does_not_change_the_training():
    often = run(6, model=tiny_model(drop_rate=0.2), eval_freq=1, eval_iter=100)
    rarely = run(6, model=tiny_model(drop_rate=0.2), eval_freq=100, eval_iter=1)
    assert often.journal.history.batch_losses == rarely.journal.history.batch_losses
    assert_the_same(state_of(often), state_of(rarely))


@pytest.mark.parametrize("kind", ["fused AdamW", "SGD"])
def test_steps_equal_a_loop_written_out_by_hand_whatever_the_global_seed(
    kind, tmp_path, no_pictures
):
    """With the schedule's rates, and gradients cut to max_grad_norm, which cuts nothing at 0."""
    schedule = Schedule("cosine", peak=1e-2, warmup_steps=3, total_steps=10)

    def by_hand(max_grad_norm: float) -> tuple[GPTModel, list[tuple[float, float, float]]]:
        """The trained model, and each step's loss, gradient norm and learning rate."""
        model, rows = tiny_model(), []
        torch.manual_seed(5)
        optimizer = OPTIMIZERS[kind](model)
        loader, _ = tiny_loaders()
        # the second epoch has an order of its own
        for step, (ids, targets) in enumerate(itertools.chain(loader, loader)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
            loss.backward()
            norm = length([p.grad for p in model.parameters()])
            for p in model.parameters():
                p.grad *= min(1.0, (max_grad_norm or math.inf) / norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, schedule)
            optimizer.step()
            rows.append((loss.item(), norm, group["lr"]))
        return model, rows

    norms = sorted(norm for _, norm, _ in by_hand(0.0)[1])
    for max_grad_norm in (0.0, norms[5], 1e6):  # the second is above some, below others
        expected_model, expected = by_hand(max_grad_norm)
        model = tiny_model()
        plan = {"schedule": schedule, "max_grad_norm": max_grad_norm, "folder": tmp_path}
        found = run(10, model=model, optimizer=OPTIMIZERS[kind](model), **plan)
        told = [row for row in rows_of(tmp_path) if "train/lr" in row]
        (tmp_path / "metrics.jsonl").unlink()
        names = ("train/loss", "train/grad_norm", "train/lr")  # the norm is that before the cut
        for row, numbers in zip(told, expected, strict=True):
            assert [row[name] for name in names] == pytest.approx(numbers, rel=1e-4)
        assert found.journal.history.batch_losses == [row["train/loss"] for row in told]
        torch.testing.assert_close(model.state_dict(), expected_model.state_dict())


@pytest.mark.parametrize(
    ("micro_batch", "sampling", "sizes"),
    [
        (None, "windows", [[3, 3], [3, 3], [1]]),
        (4, "windows", [[4, 2], [4, 2], [1]]),
        (1, "windows", [[1] * 6, [1] * 6, [1]]),
        (4, "random", [[4, 2]] * 3),
    ],
)
def test_a_step_takes_the_same_windows_in_whatever_micro_batches(micro_batch, sampling, sizes):
    def steps(loader, epoch, first=0):
        found = list(steps_between(loader, 3 * epoch + first, 3 * epoch + 3))
        for batches, n_targets, _ in found:
            assert n_targets == sum(targets.numel() for _, targets in batches)
        return [step.batches for step in found]

    def all_ids(steps):
        return torch.cat([ids for batches in steps for ids, _ in batches])

    loader, whole = (loader_of_13_windows(size, sampling) for size in (micro_batch, 6))
    assert count_steps(loader) == count_steps(whole) == 3
    orders = []
    for epoch in (0, 1, 0):
        found = steps(loader, epoch)
        assert [[len(ids) for ids, _ in batches] for batches in found] == sizes
        for batches, ((ids, targets),) in zip(found, steps(whole, epoch), strict=True):
            assert torch.equal(torch.cat([x for x, _ in batches]), ids)
            assert torch.equal(torch.cat([y for _, y in batches]), targets)
        orders.append(all_ids(found))
        # as after a resume
        assert torch.equal(all_ids(steps(loader, epoch, first=1)), orders[-1][6:])
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_micro_batches_of_unequal_shapes_is_the_mean_over_targets(tied, monkeypatch):
    monkeypatch.setattr(engine.loss, "chunk_rows", lambda hidden, vocab_size: 10)
    ids = torch.randint(8, (5, CONTEXT), generator=torch.Generator().manual_seed(0))
    batches = [(ids[:3], ids[:3] // 2), (ids[3:4, :5], ids[3:4, :5]), (ids[4:], ids[4:])]
    stepped, model = tiny_model(tie_embeddings=tied), tiny_model(tie_embeddings=tied)
    optimizer = torch.optim.SGD(stepped.parameters(), lr=1.0)
    loss, norm = take_step(stepped, batches, optimizer, FP32, 0.0)
    total = sum(
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in batches
    )
    expected = total / (24 + 5 + 8)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    by_hand = [p.grad for p in model.parameters()]
    moved = [p - q for p, q in zip(model.parameters(), stepped.parameters(), strict=True)]
    torch.testing.assert_close(moved, by_hand, rtol=0, atol=1e-6)
    assert norm.item() == pytest.approx(length(by_hand), rel=1e-5)


@pytest.mark.parametrize(
    ("n_batches", "checkpointing", "expected"),
    [(1, False, "freed backward"), (2, False, "backward backward"), (1, True, "backward")],
)
def test_casts_of_the_weights_last_for_a_backward_pass_only_where_they_are_used_again(
    n_batches, checkpointing, expected, monkeypatch
):
    """A single batch's are freed before it, as it then keeps those alone that it has not used."""
    model, events = tiny_model().train(), []
    model.activation_checkpointing = checkpointing
    backward, clear = torch.Tensor.backward, torch.clear_autocast_cache

    def note(event: str, call, *arguments) -> None:
        events.append(event)
        call(*arguments)

    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: note("backward", backward, loss))
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: note("freed", clear))
    ids = torch.zeros(1, CONTEXT, dtype=torch.long)
    optimizer = build_adamw(model, 1e-3, 0.1)
    take_step(model, [(ids, ids)] * n_batches, optimizer, Precision("bf16", "as set", "cpu"), 1.0)
    assert events == [*expected.split(), "freed"]


def test_the_loop_counts_steps_and_tokens_of_whole_steps():
    def history(micro_batch):
        trainer = new_trainer(7)
        training_loop(trainer, loader_of_13_windows(micro_batch), tiny_loaders()[1])
        return trainer.journal.history

    found, expected = history(2), history(6)
    assert found.steps == expected.steps == [0, 3, 6, 7]
    assert found.tokens_seen == expected.tokens_seen == [n * CONTEXT for n in (0, 13, 26, 32)]
    assert found.batch_losses == pytest.approx(expected.batch_losses, abs=1e-4)


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


@pytest.mark.parametrize("precision", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_with_a_bad_number_changes_nothing_but_halves_the_scale_of_fp16(kind, precision):
    first, second, third = itertools.islice(tiny_loaders()[0], 3)
    model, twin, scaler = tiny_model(), tiny_model(), precision.scaler()
    optimizers = [OPTIMIZERS[kind](each) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        take_step(each, [first], optimizer, precision, 1.0, scaler=scaler)
    before, scale = everything(model, optimizers[0]), scaler.get_scale()
    assert (scale > 1) == (precision is FP16)
    for spoil, batches, max_grad_norm in itertools.product(
        (spoil_loss, spoil_gradient), ([second], [first, first]), (1.0, 0.0)
    ):
        spoiling = spoil(model)
        loss, norm = take_step(
            model, batches, optimizers[0], precision, max_grad_norm, scaler=scaler
        )
        spoiling.remove()
        assert math.isfinite(loss) == (spoil is spoil_gradient)
        assert not math.isfinite(norm)
        scale = scale / 2 if precision is FP16 else scale
        assert scaler.get_scale() == scale
        assert_the_same(everything(model, optimizers[0]), before)
        assert all(parameter.grad is None for parameter in model.parameters())
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        ids, targets = third  # a step of the caller's own
        F.cross_entropy(each(ids).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    assert_the_same(everything(model, optimizers[0]), everything(twin, optimizers[1]))
    assert not torch.equal(model.head.weight, before["token_embedding.weight"])


def test_with_a_fused_optimizer_nobody_waits_for_the_numbers():
    def waits(kind: str) -> int:
        model = tiny_model()
        optimizer = OPTIMIZERS[kind](model)
        batches = list(itertools.islice(tiny_loaders()[0], 2))
        with HostReads() as of_losses:  # on a CPU the loss looks whether its gradient is 1
            for ids, targets in batches:
                batch_loss(model, (ids, targets), FP32).backward()
        with HostReads() as mode:
            take_step(model, batches, optimizer, FP32, 1.0)
        return mode.count - of_losses.count

    assert waits("fused AdamW") == waits("Muon") == 0
    assert waits("SGD") > 0  # so the count can count


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fp16_scales_the_loss_and_not_the_gradients(kind):
    model, twin = tiny_model(), tiny_model()
    batches = list(itertools.islice(tiny_loaders()[0], 2))
    found = take_step(model, batches, OPTIMIZERS[kind](model), FP16, 1e-3)
    expected = take_step(twin, batches, OPTIMIZERS[kind](twin), FP32, 1e-3)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in expected], rel=0.01)
    if kind == "SGD":  # which moves by the gradient's length, so it was cut unscaled
        torch.testing.assert_close(model.state_dict(), twin.state_dict())


GOOD, NAN, INF = 1.0, math.nan, math.inf


class Counted:
    """A run's steps as the rule on skipped ones sees them: a loss and a gradient's norm each."""

    def __init__(self, *, scales_loss: bool = False) -> None:
        self.skipped, self.history, self.steps = SkippedSteps(scales_loss), History(), 0

    def step(self, loss: float = GOOD, norm: float = GOOD) -> None:
        self.steps += 1
        row = {"step": self.steps, "train/loss": loss, "train/grad_norm": norm, "train/lr": 0.01}
        self.skipped.look_at(row, self.history)


def test_skipped_steps_are_counted_and_said_and_too_many_in_a_row_stop_the_run(capsys):
    for loss, norm in ((NAN, NAN), (INF, NAN), (-INF, GOOD), (GOOD, INF), (GOOD, NAN)):
        run = Counted()
        run.step()
        run.step(loss, norm)
        run.step()
        assert (run.history.skipped, run.skipped.in_a_row) == (1, 0)
        assert capsys.readouterr().out == (
            f"Note: step 2: the loss is {loss:.4g} and the gradient's norm {norm:.4g}: the step "
            "is skipped (1 so far)\n"
        )
    run = Counted()
    for _ in range(3):
        for _ in range(MOST_SKIPPED - 1):
            run.step(NAN, NAN)
        run.step()
    assert run.history.skipped == 3 * (MOST_SKIPPED - 1)
    told = f"step {4 * MOST_SKIPPED}: the loss is 1 and (?s:.)*The learning rate was 0.01; begin a"
    with pytest.raises(NumericsError, match=told) as caught:
        for _ in range(MOST_SKIPPED):
            run.step(GOOD, INF)
    assert (run.steps, caught.value.exit_code) == (4 * MOST_SKIPPED, 5)


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


def test_a_run_whose_steps_are_all_bad_or_whose_weights_are_spoilt_ends_and_names_the_step():
    for log_every, ends_at in ((1, 13), (0, 15)):  # where the numbers are looked at next
        trainer = new_trainer(50, log_every=log_every)
        spoil_gradient(trainer.learner.model, lambda t=trainer: t.journal.steps >= 3)
        with pytest.raises(NumericsError, match=f"step 13: .* as {MOST_SKIPPED - 1} times in a"):
            training_loop(trainer, *tiny_loaders())
        assert trainer.journal.steps == ends_at
        assert all(parameter.isfinite().all() for parameter in trainer.learner.model.parameters())
    model = tiny_model()
    with pytest.raises(NumericsError, match="after step 1 the training loss is nan"):
        run(1, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=math.inf))


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
    folder.mkdir(exist_ok=True)
    model = tiny_model(drop_rate=0.1)
    torch.manual_seed(3)
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
    trainer = kind(
        Learner(model, optimizer, precision),
        Journal(8, total_steps, plan.pop("log_every", 0), folder),
        Letters(),
        new_plan(total_steps, schedule=RATES, **plan),
        Saving(None, NotingStore(folder, "some run", keep=2), SaveClock(save_every, minutes=5)),
    )
    trainer.restore()
    return trainer


def stop_within(trainer: Trainer, loaders, where: str, at_step: int) -> None:
    """Train until a signal comes in a step or in its evaluation, and save."""
    done, passes = at_step - (where == "step"), []

    def count(module, _):
        if module.training == (where == "step") and trainer.journal.steps == done:
            passes.append(where)
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.learner.model.final_norm.register_forward_pre_hook(count)
    with pytest.raises(Stopped), trainer.stop:
        training_loop(trainer, *loaders)
    assert len(passes) == 1  # an evaluation stops between two batches
    trainer.save()


@pytest.mark.parametrize(
    ("refusals", "saved"),
    [
        (0, [4, 8, 12]),
        (1, [5, 8, 12]),  # full for a moment: the next step saves
        (5, [9, 12]),
        (9, [12]),  # freed while the end of the run waits
    ],
)
def test_a_save_that_the_disk_refuses_is_told_trained_on_and_tried_again(
    refusals, saved, tmp_path, monkeypatch, no_pictures, capsys
):
    left = refusals

    def require_space(*_) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise ResourceError("can't write x: No space left on device.\nFree some.")

    monkeypatch.setattr(checkpoint, "require_space", require_space)
    monkeypatch.setattr(checkpoint, "RETRY_S", 1e-9)
    monkeypatch.setattr(checkpoint, "MOST_RETRY_S", 1e-9 if refusals < 9 else 1e9)
    if refusals == 9:  # the end comes long before the second try
        monkeypatch.setattr(checkpoint, "RETRY_S", 1e9)
        left = 3
    monkeypatch.setattr("train.END_WAITS_S", (0, 0, 0))
    trainer = saving_trainer(tmp_path, 12, save_every=4)
    with trainer.stop:
        _train_and_save(trainer, trainer.saving.store, *tiny_loaders())
    said = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"^saved (\d+)$", said, re.MULTILINE)] == saved
    assert said.count("No space left on device. T") == (3 if refusals == 9 else refusals)
    assert saving_trainer(tmp_path, 12, save_every=4).steps == 12


def test_a_run_that_ends_unsaved_names_its_last_checkpoint_and_waits_longer_each_time(
    tmp_path, monkeypatch, no_pictures
):
    trainer = saving_trainer(tmp_path, 12, save_every=4)
    clock, steps = trainer.saving.clock, []
    monkeypatch.setattr("train.END_WAITS_S", (0, 0))

    def refuse(folder, n_bytes, what) -> None:
        steps.append(what)
        if len(steps) > 1:
            raise ResourceError("can't write x: No space left on device.\nFree some.")

    monkeypatch.setattr(checkpoint, "require_space", refuse)
    with pytest.raises(ResourceError, match="No space left") as caught, trainer.stop:
        _train_and_save(trainer, trainer.saving.store, *tiny_loaders())
    assert str(caught.value).endswith(
        f"The last checkpoint: {tmp_path / 'checkpoints'}/step-00000004"
    )
    # after the steps 4, 8 and 12 and three times at the end
    assert [int(what.split()[-1]) for what in steps] == [4, 8, 12, 12, 12, 12]
    waits = [clock.failed() for _ in range(9)]
    assert waits == sorted(waits) and waits[0] > 10 and waits[-1] == 600
    assert not clock.is_due(16)
    clock.note(0.0)
    assert clock.is_due(16)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Trainer:
    """A run of twelve steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = saving_trainer(folder, 12, save_every=7, eval_freq=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        patch.setattr(spacing, "EXTRAS_GRACE_S", 1e9)  # of samples, on a busy machine too
        training_loop(trainer, *tiny_loaders())
    return trainer


@pytest.mark.parametrize(
    ("where", "at_step"),
    [("step", 1), ("step", 5), ("step", 12), *(("evaluation", n) for n in (0, 4, 5, 12))],
)
def test_a_stopped_run_goes_on_with_what_it_owes_and_does_nothing_twice(
    where, at_step, undisturbed, tmp_path, no_pictures, capsys
):
    stopped = saving_trainer(tmp_path, 12, save_every=7, eval_freq=4)
    stop_within(stopped, tiny_loaders(), where, at_step)
    assert stopped.journal.steps == at_step
    assert stopped.learner.model.training
    capsys.readouterr()

    resumed = saving_trainer(tmp_path, 12, save_every=7, eval_freq=4)
    assert resumed.journal.steps == at_step
    training_loop(resumed, *tiny_loaders())
    assert_the_same(state_of(resumed), state_of(undisturbed))
    found, expected = resumed.journal.history, undisturbed.journal.history
    found.elapsed_s = expected.elapsed_s
    assert found == expected
    evaluated = [row["step"] for row in rows_of(tmp_path) if "val/loss" in row]
    assert evaluated == found.steps == [0, 4, 5, 8, 10, 12]
    assert [row["step"] for row in rows_of(tmp_path)] == sorted([*range(1, 13), *evaluated])
    bars = [re.sub(r"\|.*\|", "||", line) for line in capsys.readouterr().err.splitlines()]
    all_bars = ["Epoch 1: 100%|| 5/5", "Epoch 2: 100%|| 5/5", "Epoch 3: 100%|| 2/2"]
    assert bars == all_bars[at_step // 5 if at_step < 12 else 3 :]


def test_the_loss_scale_of_fp16_is_found_again_or_new_after_another_precision(
    tmp_path, no_pictures
):
    trainer = saving_trainer(tmp_path / "fp16", 4, save_every=9, precision=FP16)
    spoil_gradient(trainer.learner.model, lambda: trainer.journal.steps == 1)
    training_loop(trainer, *tiny_loaders())
    expected = trainer.learner.scaler.state_dict()
    assert (expected["scale"], expected["_growth_tracker"]) == (2.0**15, 2)
    again = saving_trainer(tmp_path / "fp16", 4, save_every=9, precision=FP16)
    assert again.learner.scaler.state_dict() == expected

    training_loop(saving_trainer(tmp_path / "fp32", 4, save_every=9), *tiny_loaders())
    again = saving_trainer(tmp_path / "fp32", 4, save_every=9, precision=FP16)
    assert (again.journal.steps, again.learner.scaler.get_scale()) == (4, 2.0**16)


def test_a_checkpoint_that_lacks_a_part_of_the_state_is_named(tmp_path, monkeypatch, no_pictures):
    training_loop(saving_trainer(tmp_path, 2, save_every=9), *tiny_loaders())
    restore = CheckpointStore.restore
    for part in ("steps", "journal", "random", "scaler", "schedule", "total_steps"):

        def lacking(store, *arguments, part=part):
            state, best = restore(store, *arguments)
            return {name: value for name, value in state.items() if name != part}, best

        monkeypatch.setattr(CheckpointStore, "restore", lacking)
        with pytest.raises(CheckpointError, match=f"step-00000002 can't be gone on .*'{part}'"):
            saving_trainer(tmp_path, 2, save_every=9)


def scripted(val_losses: list[float], base: type[Trainer] = Trainer) -> type[Trainer]:
    """A kind of trainer whose evaluations come to these losses."""
    both = (loss for val_loss in val_losses for loss in (1.0, val_loss))

    class Scripted(base):
        def evaluate(self, *_, **options) -> float:
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
    kind = scripted(VAL_LOSSES, Pretending)
    history = history_of(20, n_batches=50, eval_freq=2, patience=patience, kind=kind)
    assert len(history.batch_losses) == expected_steps
    assert history.steps == list(range(0, expected_steps + 1, 2))
    assert history.steps[history.best] == best_step
    assert history.since_best == (0 if patience in (None, 4) else patience)


@pytest.mark.parametrize("stop_after", [None, 5, 8])
def test_the_best_weights_are_kept_over_worse_evaluations_and_interruptions(
    stop_after, tmp_path, no_pictures
):
    def begin(total_steps, name, losses):
        plan = {"eval_freq": 2, "patience": 3, "kind": scripted(losses)}
        return saving_trainer(tmp_path / name, total_steps, 100, **plan)

    twin = begin(4, "twin", VAL_LOSSES)
    training_loop(twin, *tiny_loaders(50))

    trainer = begin(20, "run", VAL_LOSSES)
    if stop_after is not None:
        stop_within(trainer, tiny_loaders(50), "step", stop_after)
        trainer = begin(20, "run", VAL_LOSSES[-(-stop_after // 2) :])
    training_loop(trainer, *tiny_loaders(50))
    assert trainer.journal.steps == 10
    assert trainer.saving.best.step == 4
    assert not torch.equal(trainer.learner.model.head.weight, twin.learner.model.head.weight)
    trainer.use_best()
    for name, value in twin.learner.model.named_parameters():
        assert torch.equal(trainer.learner.model.get_parameter(name), value), name
    assert trainer.journal.weights_of_step == 4


@pytest.mark.parametrize("training", [True, False])
def test_mean_loss_weighs_every_target_the_same_and_leaves_mode_and_generator(training):
    model = tiny_model(drop_rate=0.5).eval()
    _, loader = tiny_loaders()
    sums, counts = [], []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        for ids, targets in loader:
            log_probabilities = model(ids).double().log_softmax(-1)
            sums.append(-log_probabilities.gather(-1, targets[..., None]).sum().item())
            counts.append(targets.numel())
    assert counts == [16, 4]
    mean_of_means = sum(s / n for s, n in zip(sums, counts, strict=True)) / 2
    assert abs(mean_of_means - sum(sums) / 20) > 0.01  # the two can be told apart
    model.train(training)
    state = torch.get_rng_state()
    assert mean_loss(model, loader, CPU, FP32) == pytest.approx(sum(sums) / 20, rel=1e-6)
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    # what the loop reports; its evaluations are of two batches
    expected = mean_loss(model, evaluation_loader(loader, 2), CPU, FP32)
    assert history_of(0, model=model).val_losses == [expected]


def test_lines_are_printed_in_the_order_of_events_and_checkpoints_come_before_evaluations(
    tmp_path, no_pictures, capsys
):
    trainer = saving_trainer(tmp_path, 7, save_every=3, eval_freq=3, log_every=2)
    training_loop(trainer, *tiny_loaders())
    history, printed = trainer.journal.history, capsys.readouterr()
    trainer.save()  # there is a checkpoint of this step
    assert capsys.readouterr().out == "" and (tmp_path / "checkpoints/step-00000007").is_dir()
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
    assert [line for line in untimed.splitlines() if "matplotlib" not in line] == [
        f"Before training: {ends[0]}",
        f"Before training: {samples[0]}",
        f"step 2: {batch[1]}",
        "saved 3",
        f"step 3: {evaluations[1]}",
        f"step 4: {batch[3]}",
        f"step 5: {evaluations[2]}",
        f"Ep 1 (End Epoch): {ends[2]}",
        f"After epoch 1: {samples[1]}",
        f"step 6: {batch[5]}",
        "saved 6",
        f"step 6: {evaluations[3]}",
        "saved 7",
        f"step 7: {evaluations[4]}",
        f"Ep 2 (End Epoch): {ends[4]}",
        f"After epoch 2: {samples[2]}",
    ]
    bars = [re.sub(r"\|.*\|", "||", line) for line in printed.err.splitlines()]
    assert bars == ["Epoch 1: 100%|| 5/5", "Epoch 2: 100%|| 2/2"]


def test_prompts_are_continued_in_one_batch_as_alone_and_of_a_very_long_one_the_end_is_shown(
    monkeypatch,
):
    batches, real = [], train.generate
    monkeypatch.setattr(
        train, "generate", lambda model, ids, **o: batches.append(ids) or real(model, ids, **o)
    )

    def sampled(*prompts: str) -> list[str]:
        trainer, left_out = new_trainer(0, prompts=prompts), []
        trainer.journal.leave_out = left_out.append
        with monkeypatch.context() as patch:
            patch.setattr(train, "DRAWN", {"temperature": 0.0})  # drawn ones depend on their row
            patch.setattr(train, "time", SimpleNamespace(monotonic=iter([10.0, 13.5]).__next__))
            trainer.sample("Before training")
        assert left_out == [3.5]  # a sample's time is not that of the tokens
        return trainer.journal.history.samples[0].texts

    prompts = ["abc", "h", "gfedcba" * 4, "ab" * 5000]  # two are longer than the model's context
    *texts, long = together = sampled(*prompts)
    assert [len(ids) for ids in batches] == [4]
    assert together == [text for prompt in prompts for text in sampled(prompt)]
    for text, prompt in zip(texts, prompts[:3], strict=True):
        assert text.startswith(prompt) and len(text) == len(prompt) + 3
    assert long.startswith("…") and "ab" * 400 in long and len(long) == 1 + 1000


def test_samples_come_at_epochs_ends_and_in_long_ones_at_evaluations(monkeypatch):
    monkeypatch.setattr(train, "SAMPLE_EVERY", 10)
    for total_steps, n_batches, within in (
        (26, 25, (12, 24)),  # in long epochs at evaluations ten steps apart or more
        (200, 200, range(20, 200, 20)),  # and about ten in a run of one epoch, however long
    ):
        history = history_of(total_steps, n_batches=n_batches, eval_freq=4, kind=Pretending)
        expected = ["Before training", *(f"After step {step}" for step in within)]
        expected += [f"After epoch {epoch + 1}" for epoch in range(-(-total_steps // n_batches))]
        assert [moment.label for moment in history.samples] == expected


def test_the_loop_leaves_files_and_ranks_to_others():
    nodes = list(ast.walk(ast.parse(inspect.getsource(training_loop))))
    names = {getattr(node, "id", getattr(node, "attr", "")) for node in nodes}
    assert "journal" in names
    foreign = re.compile("rank|world|path|folder|open|write|file|fsync|json", re.IGNORECASE)
    assert [name for name in names if foreign.search(name)] == []


@pytest.mark.parametrize(("best", "is_used"), [(None, False), (BestWeights(1, None), True)])
def test_a_diverged_run_names_its_best_weights_only_where_it_has_some(best, is_used, capsys):
    history = History(steps=[0, 1, 2], train_losses=[2.0, 1.0, 9.0], val_losses=[2.0, 1.0, 9.0])
    journal = SimpleNamespace(history=history, weights_of_step=best and best.step)
    plan, saving = SimpleNamespace(total_steps=2), SimpleNamespace(best=best)
    trainer = SimpleNamespace(journal=journal, steps=2, plan=plan, planned=[], saving=saving)
    train._say_if_cut_short(trainer, None)
    said = capsys.readouterr().out
    assert "the training loss rose from 2 to 9" in said
    assert ("the best weights, of step 1, are used" in said) == is_used


class Endless(IterableDataset):
    """A dataset that has no length."""

    def __iter__(self) -> Iterator:
        return itertools.repeat(torch.zeros(2, CONTEXT, dtype=torch.long))


def test_an_ordinary_loader_trains_too_and_a_wrong_start_context_is_refused_at_once(capsys):
    tokens = (np.arange(200) % 8).astype(np.uint16)
    pairs = list(WindowDataset(tokens, CONTEXT, CONTEXT))
    loader = DataLoader(pairs, batch_size=4, shuffle=True)
    model = tiny_model()
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.0)
    arguments = (model, loader, loader, optimizer, CPU, 8, 100, 2)
    for start_context in ("", [], ["abc", ""], 5, None):
        with pytest.raises(SettingsError, match="problem in train_model_simple") as caught:
            train_model_simple(*arguments, start_context, Letters())
        assert "\n  start_context " in str(caught.value)
    endless = DataLoader(Endless(), batch_size=4)
    for wrong, said in ((DataLoader(pairs, 200, drop_last=True), "no batch"), (endless, "length")):
        with pytest.raises(SettingsError, match=said):
            train_model_simple(model, wrong, *arguments[2:], "abc", Letters())
    assert capsys.readouterr().out == ""
    train_losses, val_losses, tokens_seen = train_model_simple(*arguments, "abc", Letters())
    assert tokens_seen == [epoch * len(pairs) * CONTEXT for epoch in range(9)]
    assert train_losses[-1] < 0.5 * train_losses[0]
    assert val_losses == pytest.approx(train_losses)


def test_training_text_is_scored_on_its_windows_and_validation_text_with_context(
    workdir, monkeypatch
):
    """A model that knows its windows by heart knows nothing of those that begin half-way."""
    bench = Bench(workdir, monkeypatch)
    bench.describe("one")
    assert bench.session()
    env, history = bench.env, bench.journal.history
    evaluate, n_batches = env.learner.evaluate, env.train_config.eval_iter
    expected = evaluate(env.train_loader, n_batches, overlapping=False)
    assert history.train_losses[-1] == pytest.approx(expected, rel=1e-6)
    assert evaluate(env.train_loader, n_batches) != pytest.approx(expected, rel=1e-4)
    assert history.val_losses[-1] == pytest.approx(evaluate(env.val_loader, n_batches), rel=1e-6)
