"""The loop and its steps on a model so small that every number can be checked."""

import ast
import itertools
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import engine.loss
import train
from data import WindowDataset, evaluation_loader
from engine.console import say
from engine.errors import NumericsError, SettingsError, Stopped
from engine.optim import Schedule, build_adamw, build_optimizer, learning_rate_at
from engine.precision import Precision
from model import GPTModel
from storage.checkpoint import CheckpointStore, SaveClock
from tests.conftest import REPOSITORY, HostReads
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
from train import (
    MOST_HALVINGS,
    MOST_SKIPPED,
    Saving,
    SkippedSteps,
    Trainer,
    continue_prompts,
    train_model_simple,
    training_loop,
)
from training.journal import History, Journal
from training.learner import Learner, batch_loss, count_steps, mean_loss, steps_of_epoch, take_step

FP16 = Precision("fp16", "as set", "cpu")
OPTIMIZERS = {
    "fused AdamW": lambda model: build_adamw(model, learning_rate=1e-2, weight_decay=0.1),
    "Muon": lambda model: build_optimizer("muon", model, 1e-2, 0.1),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


def run(total_steps: int, *, n_batches=5, **options) -> Trainer:
    """A run of the loop, options being those of new_trainer(); the trainer that it leaves."""
    trainer = new_trainer(total_steps, **options)
    training_loop(trainer, *tiny_loaders(n_batches))
    return trainer


def history_of(*arguments, **options) -> History:
    return run(*arguments, **options).journal.history


class Pretending(Trainer):
    """A trainer whose steps and samples do nothing, for what the loop counts."""

    def step(self, _):
        return torch.tensor(1.0), torch.tensor(1.0)


def rows_of(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return everything(trainer.learner.model, trainer.learner.optimizer)


def note_gradients(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """A list that will hold copies of the gradients that each step used."""
    noted = []
    optimizer.register_step_pre_hook(
        lambda used, *_: noted.append([p.grad.clone() for p in used.param_groups[0]["params"]])
    )
    return noted


def length(gradients: list[torch.Tensor]) -> float:
    return math.sqrt(sum((gradient.double() ** 2).sum().item() for gradient in gradients))


# ------------------------------------------------------------------ the loop


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
    for epochs, limit, options in ((0, 1.0, {}), (2, 1.0, {}), (2, 0.0, {"max_grad_norm": 0.0})):
        model, optimizer = long_gradients()
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


def test_gradients_that_a_caller_left_behind_are_not_trained_on():
    model = tiny_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert history_of(3, model=model).batch_losses == history_of(3).batch_losses


def test_training_lowers_the_loss_down_to_that_of_the_noise():
    history = history_of(150, n_batches=150, eval_iter=20)
    assert history.batch_losses[0] == pytest.approx(math.log(8), rel=0.05)
    assert history.train_losses[0] == pytest.approx(math.log(8), rel=0.05)
    # the letter before leaves 1.04 nats, and no letters leave less than the toss, ln 2
    assert math.log(2) < history.train_losses[-1] < 1.4
    assert history.val_losses[-1] < 1.4


def test_evaluating_more_often_does_not_change_the_training():
    often = run(8, model=tiny_model(drop_rate=0.2), eval_freq=1, eval_iter=100)
    rarely = run(8, model=tiny_model(drop_rate=0.2), eval_freq=100, eval_iter=1)
    assert often.journal.history.batch_losses == rarely.journal.history.batch_losses
    assert_the_same(state_of(often), state_of(rarely))


def test_steps_equal_a_loop_written_out_by_hand_whatever_the_global_seed():
    found = run(10, max_grad_norm=0.0)
    model = tiny_model()
    torch.manual_seed(5)
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
    loader, _ = tiny_loaders()
    losses = []
    for ids, targets in itertools.chain(loader, loader):  # the second epoch has an order of its own
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found.journal.history.batch_losses == pytest.approx(losses, rel=1e-6)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.learner.model.state_dict()[name], value)


def test_each_step_has_the_learning_rate_of_the_schedule(tmp_path, no_pictures):
    schedule = Schedule("cosine", peak=3e-3, warmup_steps=3, total_steps=8)
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


def test_gradients_are_cut_to_max_grad_norm_and_0_never_cuts(tmp_path, no_pictures):
    def norms(max_grad_norm: float) -> tuple[list[float], list[float]]:
        """The lengths that each step used, and those that metrics.jsonl tells."""
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        gradients = note_gradients(optimizer)
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        run(5, model=model, optimizer=optimizer, max_grad_norm=max_grad_norm, folder=tmp_path)
        told = [row["train/grad_norm"] for row in rows_of(tmp_path) if "train/grad_norm" in row]
        return [length(step) for step in gradients], told

    uncut, told = norms(0.0)
    assert told == pytest.approx(uncut)
    assert norms(1e6)[0] == pytest.approx(uncut)
    limit = sorted(uncut)[2]  # above some, below others
    cut, told = norms(limit)
    assert cut == pytest.approx([min(norm, limit) for norm in uncut], rel=1e-3)
    assert told == pytest.approx(uncut)  # what there was before the cut
    assert min(uncut) < limit < max(uncut)


# ------------------------------------------------------------------ accumulation


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
        found = list(steps_of_epoch(loader, epoch, first, 3))
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
    model = tiny_model(tie_embeddings=tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noted = note_gradients(optimizer)
    loss, norm = take_step(model, batches, optimizer, FP32, 0.0)
    total = sum(
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in batches
    )
    expected = total / (24 + 5 + 8)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    by_hand = [p.grad for p in model.parameters()]
    torch.testing.assert_close(noted, [by_hand], rtol=0, atol=1e-6)
    assert norm.item() == pytest.approx(length(by_hand), rel=1e-5)


def test_the_loop_counts_steps_and_tokens_of_whole_steps():
    def history(micro_batch):
        trainer = new_trainer(7)
        training_loop(trainer, loader_of_13_windows(micro_batch), tiny_loaders()[1])
        return trainer.journal.history

    found, expected = history(2), history(6)
    assert found.steps == expected.steps == [0, 3, 6, 7]
    assert found.tokens_seen == expected.tokens_seen == [n * CONTEXT for n in (0, 13, 26, 32)]
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


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_with_a_bad_number_changes_nothing(kind, max_grad_norm):
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
    for spoil, batches in itertools.product((spoil_loss, spoil_gradient), ([second], [first] * 2)):
        spoiling = spoil(model)
        loss, norm = step(*batches)
        spoiling.remove()
        assert math.isfinite(loss) == (spoil is spoil_gradient)
        assert not math.isfinite(norm)
        assert_the_same(everything(model, optimizer), before)
        assert all(parameter.grad is None for parameter in model.parameters())
    twin_model, twin_optimizer, _ = subject()
    for stepped, its_optimizer in ((model, optimizer), (twin_model, twin_optimizer)):
        ids, targets = third  # a step of the caller's own
        F.cross_entropy(stepped(ids).flatten(0, 1), targets.flatten()).backward()
        its_optimizer.step()
    assert_the_same(everything(model, optimizer), everything(twin_model, twin_optimizer))
    assert not torch.equal(model.head.weight, before["token_embedding.weight"])


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


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fp16_scales_the_loss_and_not_the_gradients_and_halves_the_scale_for_a_bad_step(kind):
    scaler = FP16.scaler()
    assert scaler.is_enabled()
    model = tiny_model()
    optimizer = OPTIMIZERS[kind](model)
    first, second, third = itertools.islice(tiny_loaders()[0], 3)
    loss, norm = take_step(model, [first, second], optimizer, FP16, 1e-3, scaler=scaler)
    twin = tiny_model()
    expected = take_step(twin, [first, second], OPTIMIZERS[kind](twin), FP32, 1e-3)
    assert (loss.item(), norm.item()) == pytest.approx([x.item() for x in expected], rel=0.01)
    if kind == "SGD":  # which moves by the gradient's length, so it was cut unscaled
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))

    scale, before = scaler.get_scale(), everything(model, optimizer)
    for halved, spoil in ((2, spoil_loss), (4, spoil_gradient)):
        spoiling = spoil(model)
        take_step(model, [second, third], optimizer, FP16, 1.0, scaler=scaler)
        spoiling.remove()
        assert scaler.get_scale() == scale / halved
        assert_the_same(everything(model, optimizer), before)
    take_step(model, [third], optimizer, FP16, 1.0, scaler=scaler)
    assert scaler.get_scale() == scale / 4
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


def test_a_step_with_a_bad_number_is_counted_and_said(capsys):
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


def test_a_run_goes_on_past_a_bad_step_that_is_counted_said_and_null(tmp_path, no_pictures, capsys):
    trainer = new_trainer(8, folder=tmp_path, eval_freq=2)
    spoil_loss(trainer.learner.model, lambda: trainer.journal.steps == 2)
    training_loop(trainer, *tiny_loaders())
    history = trainer.journal.history
    assert history.skipped == 1
    [note] = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert note.startswith("Note: step 3: the loss is ")
    norms = {row["step"]: row["train/grad_norm"] for row in rows_of(tmp_path) if "train/lr" in row}
    assert [step for step, norm in norms.items() if norm is None] == [3]
    assert len(norms) == len(history.batch_losses) == 8
    assert all(parameter.isfinite().all() for parameter in trainer.learner.model.parameters())
    assert history.val_losses[-1] < history.val_losses[0]


@pytest.mark.parametrize(("log_every", "ends_at"), [(1, 13), (0, 15)])
def test_a_run_whose_steps_are_all_bad_ends_and_names_the_step(log_every, ends_at):
    trainer = new_trainer(100, log_every=log_every)
    spoil_gradient(trainer.learner.model, lambda: trainer.journal.steps >= 3)
    with pytest.raises(NumericsError, match=f"step 13: .* as {MOST_SKIPPED - 1} times in a row"):
        training_loop(trainer, *tiny_loaders())
    assert trainer.journal.steps == ends_at  # where the numbers were looked at next
    assert all(parameter.isfinite().all() for parameter in trainer.learner.model.parameters())


def test_weights_that_the_last_step_spoils_stop_the_run_too():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=math.inf)
    with pytest.raises(NumericsError, match="after step 1 the training loss is nan"):
        run(1, model=model, optimizer=optimizer)


# ------------------------------------------------------------------ leaving and coming back

RATES = Schedule("cosine", peak=1e-2, warmup_steps=2, total_steps=12)


class NotingStore(CheckpointStore):
    """A store that says what it does."""

    def save(self, step, *arguments) -> None:
        super().save(step, *arguments)
        say(f"saved {step}")


def saving_trainer(
    folder: Path,
    total_steps: int,
    save_every: int,
    *,
    kind=Trainer,
    precision=FP32,
    log_every=0,
    **plan,
) -> Trainer:
    """A trainer that goes on from what the folder has."""
    folder.mkdir(exist_ok=True)
    model = tiny_model(drop_rate=0.1)
    torch.manual_seed(3)
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
    trainer = kind(
        Learner(model, optimizer, precision),
        Journal(8, total_steps, log_every, folder),
        Letters(),
        new_plan(total_steps, **({"schedule": RATES} | plan)),
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Trainer:
    """A run of twelve steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = saving_trainer(folder, 12, save_every=7, eval_freq=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
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


# ------------------------------------------------------------------ patience


def scripted(val_losses: list[float], base: type[Trainer] = Trainer) -> type[Trainer]:
    """A kind of trainer whose evaluations come to these losses."""
    both = (loss for val_loss in val_losses for loss in (1.0, val_loss))

    class Scripted(base):
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


# ------------------------------------------------------------------ the mean loss


@torch.no_grad()
def test_mean_loss_weighs_every_target_the_same():
    model = tiny_model(drop_rate=0.5)
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
def test_mean_loss_leaves_mode_and_generator_as_found_and_is_what_the_loop_reports(training):
    model = tiny_model(drop_rate=0.5).train(training)
    state = torch.get_rng_state()
    expected = [
        [mean_loss(model, evaluation_loader(loader, 2), CPU, FP32)] for loader in tiny_loaders()
    ]
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    history = history_of(0, model=model)
    assert [history.train_losses, history.val_losses] == expected  # so there is no dropout


# ------------------------------------------------------------------ what is printed


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


def test_several_prompts_are_continued_in_one_batch_as_each_would_be_alone(monkeypatch):
    batches, real = [], train.generate
    monkeypatch.setattr(
        train, "generate", lambda model, ids, **o: batches.append(ids) or real(model, ids, **o)
    )
    prompts = ["abc", "h", "gfedcba" * 4]  # the last one is longer than the model's context
    together = history_of(5, prompts=prompts).samples
    assert len(batches) == 2  # before training, and after the epoch
    assert [len(ids) for ids in batches] == [3, 3]
    for i, prompt in enumerate(prompts):
        alone = history_of(5, prompts=[prompt]).samples
        for moment, expected in zip(together, alone, strict=True):
            assert [moment.texts[i]] == expected.texts
            assert moment.texts[i].startswith(prompt) and len(moment.texts[i]) == len(prompt) + 30


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


@pytest.mark.parametrize(
    ("total_steps", "n_batches", "expected"),
    [
        # in long epochs at evaluations a hundred steps apart or more
        (260, 250, ["Before training", "After step 120", "After step 240", "After epoch 1"]),
        # and about ten in a run of one epoch, however long it is
        (2000, 2000, ["Before training", *(f"After step {n}" for n in range(200, 2000, 200))]),
    ],
)
def test_samples_come_at_epochs_ends_and_in_long_ones_at_evaluations(
    total_steps, n_batches, expected
):
    history = history_of(
        total_steps, n_batches=n_batches, eval_freq=40, eval_iter=1, kind=Pretending
    )
    last = f"After epoch {-(-total_steps // n_batches)}"
    assert [moment.label for moment in history.samples] == [*expected, last]


def test_the_time_of_a_sample_is_not_that_of_the_tokens(monkeypatch):
    trainer, left_out = new_trainer(5), []
    monkeypatch.setattr(trainer.journal, "leave_out", left_out.append)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=iter([10.0, 13.5]).__next__))
    trainer.sample("Before training")
    assert left_out == [3.5]


# ------------------------------------------------------------------ what is kept


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


def train_simply(start_context, loaders=None, epochs=1) -> tuple[list[float], ...]:
    model = tiny_model()
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.0)
    loaders = loaders or tiny_loaders()
    return train_model_simple(
        model, *loaders, optimizer, CPU, epochs, 100, 2, start_context, Letters()
    )


def test_an_ordinary_loader_trains_too():
    tokens = (np.arange(200) % 8).astype(np.uint16)
    pairs = list(WindowDataset(tokens, CONTEXT, CONTEXT))
    loader = DataLoader(pairs, batch_size=4, shuffle=True)
    train_losses, val_losses, tokens_seen = train_simply("abc", (loader, loader), epochs=8)
    assert tokens_seen == [epoch * len(pairs) * CONTEXT for epoch in range(9)]
    assert train_losses[-1] < 0.5 * train_losses[0]
    assert val_losses == pytest.approx(train_losses)


def test_a_wrong_start_context_in_a_script_is_refused_before_anything_is_done(capsys):
    for start_context in ("", [], ["abc", ""], 5, None):
        with pytest.raises(SettingsError, match="problem in train_model_simple") as caught:
            train_simply(start_context)
        assert "\n  start_context " in str(caught.value)
    assert capsys.readouterr().out == ""
