"""What is faster here: measured once, kept by what it depends on, and taken from there."""

import dataclasses
import itertools
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from data import plan_windows
from engine import weights
from engine.attention import ATTENTIONS
from engine.weights import READERS, reading_trials
from exchange import saved_run
from generation import generate
from model import GPTConfig, GPTModel
from planning import choices, machine
from planning.choices import Choice, Choices
from planning.decisions import decide_training
from planning.machine import find_machine, set_attention
from planning.plan import resolve_settings
from tests.records import record_of
from tests.resuming import Bench, compare
from training_utils import TrainingConfig

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Time that passes in candidates only: candidate(seconds) takes so long, and is counted."""
    now, calls = 0.0, []
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def candidate(*seconds: float):
        durations = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def run() -> None:
            nonlocal now
            now += next(durations)
            calls.append(seconds)

        return run

    candidate.calls = calls
    return candidate


@pytest.fixture
def store(tmp_path) -> Choices:
    return Choices(tmp_path, CPU, 2)


def test_a_choice_is_measured_once_and_then_taken_from_the_cache(clock, store):
    candidates = {"one": clock(9.0, 0.5, 0.2), "other": clock(0.1)}  # the first call is a warm-up
    expected = Choice("other", pytest.approx({"one": 0.2, "other": 0.1}))
    assert store.fastest("which", candidates) == expected
    assert expected.name in store.fastest("which", candidates).reason
    n_calls = len(clock.calls)
    assert store.fastest("which", candidates) == expected
    assert Choices(store.folder, CPU, 2).fastest("which", candidates) == expected
    assert len(clock.calls) == n_calls
    store.fastest("which", candidates | {"third": clock(1.0)})  # another question by its answers
    assert len(clock.calls) > n_calls


def test_the_usual_candidate_stays_unless_another_is_clearly_faster(clock, store):
    for number, (seconds, expected) in enumerate([(0.95, "usual"), (0.89, "new"), (2.0, "usual")]):
        candidates = {"usual": clock(1.0), "new": clock(seconds)}
        assert store.fastest(str(number), candidates).name == expected


@pytest.mark.parametrize("changed", ["processor", "torch", "threads", "question"])
def test_another_processor_torch_number_of_threads_or_question_is_measured_anew(
    clock, store, monkeypatch, changed
):
    candidates, question = {"one": clock(1.0), "other": clock(2.0)}, "which"
    store.fastest(question, candidates)
    n_calls = len(clock.calls)
    if changed == "processor":
        monkeypatch.setattr(choices, "processor_name", lambda: "another")
    elif changed == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    elif changed == "threads":
        store = dataclasses.replace(store, threads=1)
    else:
        question = "which else"
    store.fastest(question, candidates)
    assert len(clock.calls) == 2 * n_calls


@pytest.mark.parametrize(
    "damage",
    [b"", b"[" * 100_000, b'{"figures": [1]}', b'{"figures": {"one": -1}}', b"\xff", b"{}", b"[]"],
)
def test_a_damaged_file_is_like_none_and_is_replaced(clock, store, damage):
    candidates = {"one": clock(1.0), "other": clock(2.0)}
    store.fastest("which", candidates)
    (file,) = (store.folder / "choices").iterdir()
    whole = file.read_bytes()
    assert json.loads(whole)["processor"] == choices.processor_name()
    file.write_bytes(damage)
    assert store.known("which") is None
    assert store.fastest("which", candidates).name == "one"
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_told_and_the_choice_stands(clock, tmp_path, capsys):
    (tmp_path / "choices").write_text("a file where a folder should be")
    found = Choices(tmp_path, CPU, 2).fastest("which", {"one": clock(2.0), "other": clock(1.0)})
    assert found.name == "other"
    assert "is measured again next time" in capsys.readouterr().out


# ------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("units", "fp32_s", "expected", "said"),
    [
        ("avx512_bf16", 1.0, "fp32", "faster here: bf16 2e+03 ms, fp32 1e+03 ms"),
        ("avx512_bf16", 3.0, "bf16", "this CPU has avx512_bf16: bf16 2e+03 ms, fp32 3e+03 ms"),
        ("amx_bf16", 1.0, "bf16", "this CPU has amx_bf16"),
        (None, 1.0, "fp32", "this CPU has no bf16 units"),
    ],
)
def test_bf16_is_compared_with_fp32_where_its_units_may_be_weak(
    clock, monkeypatch, tmp_path, units, fp32_s, expected, said
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {units: True})
    monkeypatch.setattr(
        machine, "mlp_step", lambda p, _: clock(fp32_s if p.name == "fp32" else 2.0)
    )
    plan = resolve_settings({"DEVICE": "cpu"}, "config_run.py")
    for _ in range(2):  # the second is known from the first
        found = find_machine(plan, tmp_path)
        assert (found.precision.name, found.precision.reason) == (expected, said)
    assert len(clock.calls) == (8 if "ms" in said else 0)
    as_set = resolve_settings({"DEVICE": "cpu", "PRECISION": "bf16"}, "config_run.py")
    assert find_machine(as_set, tmp_path).precision.name == "bf16"


# ------------------------------------------------------------------ attention


def decided(folder: Path, before=None, *, training: dict, **config) -> str:
    """The kernel that set_attention() sets in every block of a tiny model."""
    shape = {"context_length": 16, "emb_dim": 8, "n_heads": 2, "n_layers": 2} | config
    model = GPTModel(GPTConfig(vocab_size=32, **shape))
    plan = resolve_settings({"DEVICE": "cpu", "CUSTOM_MODE": True}, "config_run.py")
    windows, _ = plan_windows(9999, max_length=16, stride=16, batch_size=4, train_ratio=0.9)
    found = find_machine(plan, folder)
    asked = TrainingConfig(**training)
    set_attention(model, found, plan, asked, windows, before)
    (kernel,) = {block.attention.kernel for block in model.blocks}
    return kernel


def test_the_attention_of_a_long_run_is_tried_and_that_of_others_the_usual(
    clock, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    seconds = {"fused": 2.0, "plain": 1.0}
    monkeypatch.setattr(machine, "attention_step", lambda c, d, kernel: clock(seconds[kernel]))
    long, short = {"max_steps": 10**9}, {"max_steps": 3}
    assert decided(tmp_path, training=long) == "plain"
    assert "Attention: plain (fused 2e+03 ms, plain 1e+03 ms)" in capsys.readouterr().out
    assert decided(tmp_path, training={"time_budget_minutes": 5}) == "plain"
    assert decided(tmp_path, training=short) == "fused"
    assert decided(tmp_path, training=long, context_length=1024) == "plain"
    assert decided(tmp_path, training=long, attention_drop_rate=0.1) == "fused"
    n_calls = len(clock.calls)
    plan = resolve_settings({"CUSTOM_MODE": True}, "config_run.py")
    for kernel in ATTENTIONS:  # a resumed run keeps its own
        before = record_of(plan, attention=kernel)
        assert decided(tmp_path, before, training=long) == kernel
    assert len(clock.calls) == n_calls


def test_both_kernels_of_attention_train_to_the_same_gradients():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=32, context_length=16, emb_dim=8, n_heads=2, n_layers=1)
    model, found = GPTModel(config), {}
    ids = torch.randint(32, (2, 16))
    for kernel in ATTENTIONS:
        for block in model.blocks:
            block.attention.kernel = kernel
        found[kernel] = torch.autograd.grad(model(ids, ids), list(model.parameters()))
    torch.testing.assert_close(found["plain"], found["fused"])


def test_runs_of_one_seed_are_equal_by_the_kept_choice_and_without_it_unless_a_line_says_so(
    workdir, monkeypatch, capsys
):
    monkeypatch.setattr(machine, "WORTH_A_TRIAL", 0)
    bench, lines, outcomes = Bench(workdir, monkeypatch), [], []
    for name in ("first", "again", "afresh"):
        if name == "afresh":
            shutil.rmtree(workdir / "cache")
        bench.describe(name)
        outcomes.append(bench.finish())
        lines += re.findall(r"^Attention: .*$", capsys.readouterr().out, re.M)
    first, again, afresh = lines
    assert " ms" in first
    assert again == first  # its figures were taken, not measured
    compare(outcomes[1], outcomes[0])
    if afresh.split()[1] == first.split()[1]:
        compare(outcomes[2], outcomes[0])


# ------------------------------------------------------------------ full mode's batch


@pytest.mark.parametrize(
    ("settings", "device", "n_tokens", "expected"),
    [
        ({}, "cuda", 10**9, 128),  # 32,768 tokens a step
        ({}, "cuda", 256 * 32 * 50, 50),  # 32 steps an epoch
        ({}, "cuda", 20_000, 4),
        ({}, "mps", 10**9, 128),
        ({}, "cpu", 10**9, 4),
        ({"CUSTOM_MODE": True}, "cuda", 10**9, 8),
    ],
)
def test_full_mode_gives_a_gpu_enough_to_do_in_a_step(settings, device, n_tokens, expected):
    plan = resolve_settings({"QUICK_MODE": False} | settings, "config_run.py")
    training = decide_training(plan, torch.device(device), n_tokens, None)
    assert training.batch_size == expected
    before = record_of(plan, training=training)
    for later in ("cuda", "cpu"):  # a resumed run keeps its own
        assert decide_training(plan, torch.device(later), n_tokens, before) == training


# ------------------------------------------------------------------ weights of a loaded run


def test_readers_multiply_one_row_of_the_kinds_that_were_asked_for():
    shapes = [(8, 4), (4, 8)]
    assert list(reading_trials(shapes, "auto")) == list(READERS)
    assert list(reading_trials(shapes, "bf16")) == ["bf16 by torch", "bf16 by oneDNN"]
    for run in reading_trials(shapes, "auto").values():
        run()


@pytest.mark.parametrize("fastest", READERS)
def test_a_large_model_is_read_as_a_trial_finds_fastest(clock, monkeypatch, workdir, fastest):
    config = GPTConfig(vocab_size=32, context_length=8, emb_dim=8, n_heads=2, n_layers=1)
    trials = {name: clock(1.0 if name == fastest else 2.0) for name in READERS}
    monkeypatch.setattr(saved_run, "reading_trials", lambda shapes, requested: trials)
    model = GPTModel(config)
    assert saved_run.fastest_reader("auto", CPU, model) == ("bf16", False, None)  # it is small
    monkeypatch.setattr(saved_run, "TRIAL_WEIGHTS", 1)
    kind, by_onednn, why = saved_run.fastest_reader("auto", CPU, model)
    assert (kind, by_onednn) == READERS[fastest]
    assert f"{fastest} 1e+03 ms" in why
    for requested in ("fp32", "int8"):  # nothing to choose
        assert saved_run.fastest_reader(requested, CPU, model) == (requested, False, None)
    model.decodes_by_onednn = by_onednn
    weights.convert_weights(model.eval(), kind)
    assert len(generate(model, [[1, 2]], max_new_tokens=4, temperature=0.0)[0]) == 6
