"""The loop and its journal on a model so small that every number can be checked."""

import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import image
from torch.utils.data import DataLoader

from data import WindowDataset, evaluation_loader, make_loaders, plan_windows
from engine.errors import NumericsError
from engine.optim import Schedule, build_adamw, learning_rate_at
from engine.precision import Precision
from model import GPTConfig, GPTModel
from train import (
    FETCH_EVERY,
    PICTURE,
    History,
    Journal,
    LoopPlan,
    mean_loss,
    train_model_simple,
    training_loop,
)

CPU = torch.device("cpu")
FP32 = Precision("fp32", "as set", "cpu")
CONTEXT = 8
BATCH = 2


class Letters:
    """The tokenizer of the eight letters a to h."""

    name = fingerprint = "letters"
    vocab_size = 8

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


def run(total_steps: int, *, model=None, n_batches=5, optimizer=None, journal=None, **plan):
    """A run of the loop; what it left: model, optimizer, journal and history."""
    model = model or tiny_model()
    optimizer = optimizer or build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
    journal = journal or Journal(Letters(), "abc")
    defaults = {"eval_freq": 100, "eval_iter": 2, "max_grad_norm": 1.0, "schedule": None}
    training_loop(
        model,
        *tiny_loaders(n_batches),
        optimizer,
        CPU,
        FP32,
        LoopPlan(total_steps=total_steps, **(defaults | plan)),
        journal,
    )
    return SimpleNamespace(
        model=model, optimizer=optimizer, journal=journal, history=journal.history
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


def test_train_model_simple_is_the_same_loop():
    model = tiny_model()
    train_losses, val_losses, _ = train_model_simple(
        model,
        *tiny_loaders(),
        build_adamw(model, learning_rate=1e-2, weight_decay=0.1),
        CPU,
        2,
        3,
        2,
        "abc",
        Letters(),
    )
    expected = run(10, eval_freq=3).history
    # arithmetic may be bf16 in the one and is fp32 in the other
    assert train_losses == pytest.approx(expected.train_losses, abs=0.02)
    assert val_losses == pytest.approx(expected.val_losses, abs=0.02)


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


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_each_step_has_the_learning_rate_of_the_schedule(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule = Schedule(kind, peak=3e-3, warmup_steps=3, total_steps=8)
    model = tiny_model()
    optimizer = build_adamw(model, learning_rate=1.0, weight_decay=0.1)
    used = []
    optimizer.register_step_post_hook(
        lambda stepped, *_: used.append([group["lr"] for group in stepped.param_groups])
    )
    journal = Journal(Letters(), "abc", folder=tmp_path)
    run(8, model=model, optimizer=optimizer, journal=journal, schedule=schedule)
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


def gradient_norms(max_grad_norm: float) -> list[float]:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = norms_at_each_step(optimizer)
    run(5, model=model, optimizer=optimizer, max_grad_norm=max_grad_norm)
    return norms


def test_gradients_are_cut_to_max_grad_norm_and_0_never_cuts():
    uncut = gradient_norms(0.0)
    assert gradient_norms(1e6) == pytest.approx(uncut)
    limit = sorted(uncut)[2]  # above some, below others
    expected = [min(norm, limit) for norm in uncut]
    assert gradient_norms(limit) == pytest.approx(expected, rel=1e-3)
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


# ------------------------------------------------------------------ numbers gone bad


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.0)
    steps = []

    def poison(*_):
        steps.append(None)
        if len(steps) == 3:
            with torch.no_grad():
                model.final_norm.bias.fill_(math.nan)

    optimizer.register_step_post_hook(poison)
    journal = Journal(Letters(), "abc", folder=tmp_path)
    with pytest.raises(NumericsError, match="the loss of step 4 is nan") as caught:
        run(10, model=model, optimizer=optimizer, journal=journal)
    assert caught.value.exit_code == 5
    assert "learning rate was 0.01" in str(caught.value)
    losses = {row["step"]: row["train/loss"] for row in rows_of(tmp_path) if "train/loss" in row}
    assert losses[3] > 0
    assert losses[4] is None
    assert not (tmp_path / PICTURE).exists()


def test_weights_that_the_last_step_spoils_stop_the_run_too():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=math.inf)
    with pytest.raises(NumericsError, match="after step 1 the training loss is nan"):
        run(1, model=model, optimizer=optimizer)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bad_loss_is_found_at_the_next_log_line(bad):
    journal = Journal(Letters(), "abc", log_every=3)
    journal.step(torch.tensor(1.0), 16, 0.1)
    journal.step(torch.tensor(bad), 16, 0.1)
    with pytest.raises(NumericsError, match="the loss of step 2 is"):
        journal.step(torch.tensor(1.0), 16, 0.1)


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
    journal = Journal(Letters(), "abc", log_every=2)
    history = run(7, journal=journal, eval_freq=3).history
    printed = capsys.readouterr()
    evaluations = [
        f"Train loss {train:.3f}, Val loss {val:.3f}"
        for train, val in zip(history.train_losses, history.val_losses, strict=True)
    ]
    samples = [text for _, text in history.samples]
    batch = [f"batch loss {loss:.4f}" for loss in history.batch_losses]
    assert printed.out.splitlines() == [
        f"Before training: {evaluations[0]}",
        f"Before training: {samples[0]}",
        f"step 2: {batch[1]}",
        f"Ep 1 (Step 000003): {evaluations[1]}",
        f"step 4: {batch[3]}",
        f"Ep 1 (End Epoch): {evaluations[2]}",
        f"After epoch 1: {samples[1]}",
        f"step 6: {batch[5]}",
        f"Ep 2 (Step 000006): {evaluations[3]}",
        f"Ep 2 (End Epoch): {evaluations[4]}",
        f"After epoch 2: {samples[2]}",
    ]
    bars = [re.sub(r"\|.*\|", "||", line) for line in printed.err.splitlines()]
    assert bars == ["Epoch 1: 100%|| 5/5", "Epoch 2: 100%|| 2/2"]


@pytest.mark.parametrize(("log_every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5]), (4, [4]), (6, [])])
def test_log_every_prints_the_loss_of_every_nth_step(log_every, steps, capsys):
    history = run(5, journal=Journal(Letters(), "abc", log_every=log_every)).history
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines == [
        f"step {step}: batch loss {history.batch_losses[step - 1]:.4f}" for step in steps
    ]


def test_samples_go_on_from_the_start_context_greedily():
    first, second = (run(5).history.samples for _ in range(2))
    assert first == second
    for _, text in first:
        assert text.startswith("abc")
        assert len(text) == 3 + 30


def test_control_characters_never_reach_the_screen(capsys, tmp_path):
    journal = Journal(Letters(), "abc", folder=tmp_path)
    text = "a\x1b[31mb\r\n\nc\x00\x07\x9b\u202ed\u2028e\tf  春"
    journal.note_sample("After epoch 1", text)
    assert capsys.readouterr().out == "After epoch 1: a [31mb c d e f 春\n"
    assert journal.history.samples == [("After epoch 1", text)]


# ------------------------------------------------------------------ what is kept


def test_losses_are_fetched_together():
    journal = Journal(Letters(), "abc")
    for step in range(FETCH_EVERY - 1):
        journal.step(torch.tensor(float(step)), 16, 0.1)
    assert journal.history.batch_losses == []
    journal.step(torch.tensor(7.0), 16, 0.1)
    assert journal.history.batch_losses == [*range(FETCH_EVERY - 1), 7.0]
    journal.step(torch.tensor(8.0), 16, 0.1)
    journal.fetch()
    journal.fetch()
    assert journal.history.batch_losses[-2:] == [7.0, 8.0]
    assert len(journal.history.batch_losses) == FETCH_EVERY + 1


@pytest.mark.parametrize("log_every", [0, 3])
def test_metrics_have_a_row_for_each_step_and_each_evaluation(log_every, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    journal = Journal(Letters(), "abc", log_every=log_every, folder=folder)
    history = run(7, journal=journal, eval_freq=4).history
    rows = rows_of(folder)
    kinds = ["evaluation" if "val/loss" in row else "step" for row in rows]
    expected = [("evaluation", 0)] + [("step", i) for i in (1, 2, 3, 4)] + [("evaluation", 4)]
    expected += [("step", 5), ("evaluation", 5), ("step", 6), ("step", 7), ("evaluation", 7)]
    assert [(kind, row["step"]) for kind, row in zip(kinds, rows, strict=True)] == expected
    steps = [row for kind, row in zip(kinds, rows, strict=True) if kind == "step"]
    evaluations = [row for kind, row in zip(kinds, rows, strict=True) if kind == "evaluation"]
    assert steps == [
        {"step": i, "train/loss": loss, "train/lr": 1e-2, "train/tokens": i * BATCH * CONTEXT}
        for i, loss in enumerate(history.batch_losses, start=1)
    ]
    assert [row["eval/train_loss"] for row in evaluations] == history.train_losses
    assert [row["val/loss"] for row in evaluations] == history.val_losses
    assert {frozenset(row) for row in evaluations} == {
        frozenset({"step", "eval/train_loss", "val/loss"})
    }


def test_a_run_with_a_folder_leaves_metrics_samples_and_the_picture_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    run(5, journal=Journal(Letters(), "abc", folder=folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "metrics.jsonl",
        "samples.md",
        PICTURE,
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", PICTURE]
    assert (folder / PICTURE).read_bytes() == (tmp_path / PICTURE).read_bytes()
    assert image.imread(folder / PICTURE).shape[1] > 500


def test_samples_md_holds_each_sample_as_a_quote(tmp_path):
    journal = Journal(Letters(), "abc", folder=tmp_path)
    journal.note_sample("Before training", "# no\n\n<b>heading</b>")
    journal.note_sample("After epoch 1", "春江")
    assert (tmp_path / "samples.md").read_text(encoding="utf-8") == (
        "# What the model writes\n\n"
        "## Before training\n\n    # no\n    \n    <b>heading</b>\n\n"
        "## After epoch 1\n\n    春江\n"
    )


def test_a_journal_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(5)
    assert list(tmp_path.iterdir()) == []


def test_the_best_evaluation_is_the_first_of_the_lowest_validation_loss():
    history = History(steps=[0, 4, 8, 12], val_losses=[3.0, 2.0, 2.5, 2.0])
    assert history.best == 1


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
