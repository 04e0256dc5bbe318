"""The self-check: it passes here, and each fault that is planted is found by its check, by name."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable

import pytest
import torch

import engine.attention as attention
import model as rooms_model
import storage.checkpoint
from engine.precision import Precision
from scripts import checks, selfcheck
from scripts.checks import CHECKS, Bench, Failed
from tests.conftest import REPOSITORY
from training import learner

CPU = torch.device("cpu")


def bench(name: str = "fp32") -> Bench:
    return Bench(CPU, Precision(name, "as set", "cpu"))


def fault_found(check: str, precision: str = "fp32") -> str:
    """What a check says of the fault that is planted."""
    with pytest.raises(Failed) as caught:
        CHECKS[check](bench(precision))
    return str(caught.value)


def sees(n_ahead: int, scale: float = 1.0) -> Callable:
    """attend(), but by its own formula: with so many positions ahead seen, and scores that are
    multiplied."""

    def attend(q, k, v, dropout, *, is_plain):
        T, D = q.shape[2:]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        hidden = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1 + n_ahead)
        return ((q @ k.mT) * (scale * D**-0.5) + hidden).softmax(-1) @ v

    return attend


def test_attention_by_the_tests_own_formula_passes(monkeypatch):
    monkeypatch.setattr(attention, "attend", sees(0))
    assert "off by" in CHECKS["logits"](bench())
    assert "no position sees" in CHECKS["causality"](bench())


def test_a_mask_that_is_off_by_one_is_found_by_the_causality_check(monkeypatch):
    monkeypatch.setattr(attention, "attend", sees(1))
    assert "a position sees what comes behind it" in fault_found("causality")


def test_a_wrong_scale_of_attention_is_found_by_the_logits_check(monkeypatch):
    monkeypatch.setattr(attention, "attend", sees(0, scale=1.25))
    for precision in ("fp32", "bf16"):
        assert "is off by" in fault_found("logits", precision)


@pytest.mark.slow
def test_a_dropped_division_of_accumulated_gradients_is_found(monkeypatch):
    real = learner.batch_loss
    monkeypatch.setattr(
        learner,
        "batch_loss",
        lambda model, batch, precision, n=None: real(model, batch, precision, batch[1].numel()),
    )
    assert "in micro-batches is off by" in fault_found("accumulation")


def test_a_cache_that_keeps_old_keys_is_found(monkeypatch):
    def extend(self, layer, k, v):
        fresh = layer == len(self.cache.layers)
        keys, values = real(self, layer, k, v)
        if not fresh:  # a later step does not see what it has just added, but what was there
            keys[:, :, self.columns] = 0
        return keys, values

    real = rooms_model.Newest.extend
    monkeypatch.setattr(rooms_model.Newest, "extend", extend)
    assert "with its cache is off by" in fault_found("KV cache")


def test_a_swapped_weight_is_found_by_the_saving_check(monkeypatch):
    real = storage.checkpoint.read_safetensors

    def swapped(path):
        tensors = real(path)
        one, other = (f"blocks.{n}.mlp_norm.weight" for n in (0, 1))
        if one in tensors:
            tensors[one], tensors[other] = tensors[other], tensors[one]
        return tensors

    monkeypatch.setattr(storage.checkpoint, "read_safetensors", swapped)
    said = fault_found("saving")
    assert "blocks.0.mlp_norm.weight of gpt2 is another one after it was saved" in said


@pytest.mark.slow
def test_an_overflow_in_fp16_is_found_by_the_logits_check(monkeypatch):
    def attend(q, k, v, dropout, *, is_plain):  # the products come before they are made smaller
        return sees(0, scale=1e-4)(q * 1e2, k * 1e4, v, dropout, is_plain=is_plain)

    CHECKS["logits"](bench("fp16"))
    monkeypatch.setattr(attention, "attend", attend)
    assert re.search("of gpt2 .* are not finite", fault_found("logits", "fp16"))


@pytest.mark.slow
def test_nan_in_bf16_is_found_by_the_logits_check(monkeypatch):
    CHECKS["logits"](bench("bf16"))
    real = attention.attend

    def attend(q, k, v, dropout, *, is_plain):
        found = real(q, k, v, dropout, is_plain=is_plain)
        if q.dtype == torch.bfloat16:
            found[:, :, 0] = 0 * torch.log(-found[:, :, :1].abs() - 1)[:, :, 0]
        return found

    monkeypatch.setattr(attention, "attend", attend)
    assert re.search("of gpt2 .* are not finite", fault_found("logits", "bf16"))


def test_an_optimizer_that_does_not_step_is_found_by_the_overfitting_check(monkeypatch):
    monkeypatch.setattr(checks, "OVERFIT_STEPS", 2)
    assert re.search(
        r"after 2 steps on one batch gpt2 has a loss of \d", fault_found("overfitting")
    )


def test_weights_that_begin_too_large_are_found_by_the_initial_loss(monkeypatch):
    monkeypatch.setattr(rooms_model, "INIT_STD", 0.3)
    assert "gpt2 begins with a loss of" in fault_found("initial loss")


@pytest.mark.slow
def test_steps_that_wait_are_found_by_the_speed_check(monkeypatch):
    monkeypatch.setattr(checks, "_fastest_s", lambda device, jobs: [20.0, 0.1])
    assert "of plain products'" in fault_found("speed")
    monkeypatch.setattr(checks, "_fastest_s", lambda device, jobs: [1e-9, 0.1])
    assert "GFLOP/s in training steps" in CHECKS["speed"](bench())


@pytest.mark.slow
def test_a_lost_state_of_the_random_generator_is_found_in_a_copy_by_a_run_that_is_killed(
    tmp_path, monkeypatch
):
    skipped = shutil.ignore_patterns(".git", "runs", "cache", "__pycache__", "tests", "docs")
    shutil.copytree(REPOSITORY, tmp_path / "copy", ignore=skipped)
    monkeypatch.setattr(checks, "REPOSITORY", tmp_path / "copy")
    file = tmp_path / "copy" / "engine" / "randomness.py"
    code = file.read_text(encoding="utf-8")
    broken = code.replace("torch.set_rng_state(state)", "pass")
    assert broken != code
    file.write_text(broken, encoding="utf-8")
    assert "tensors in model.safetensors have other bits" in fault_found("kill and resume")


def test_what_a_check_says_has_no_path_of_this_machine_and_is_short(monkeypatch, tmp_path):
    monkeypatch.setattr(selfcheck.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("USERPROFILE", "/home/alice")
    library = selfcheck.Path(sys.prefix, "lib", "torch", "__init__.py")
    for said, expected in (
        (f"no name in {library!s}:5", "no name in <python>/lib/torch/__init__.py:5"),
        (f"[Errno 2] {str(tmp_path / 'one')!r}", "[Errno 2] '<temporary>/one'"),
        (f'File "{REPOSITORY / "model.py"}"', 'File "<repository>/model.py"'),
        ("('/home/alice/x/y.py')", "('<home>/x/y.py')"),
        ("from /mnt/bob/lib/a.so", "from <elsewhere>a.so"),
        (r"C:\Users\bob\a.dll is 'C:\\bob\\a.dll'", "<elsewhere>a.dll is '<elsewhere>a.dll'"),
        ("83 GFLOP/s, off by 6e-07 / 2; 1/2", "83 GFLOP/s, off by 6e-07 / 2; 1/2"),
        ("x" * 9999, "x" * 300),
    ):

        def fail(_: Bench, said: str = said) -> str:
            raise Failed(said)

        monkeypatch.setitem(CHECKS, "causality", fail)
        outcome = selfcheck.outcome_of("causality", bench())
        assert outcome.said.replace("\\", "/") == expected


def run(monkeypatch, capsys, *options: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["selfcheck", "--device", "cpu", "--precision=fp32", *options])
    return selfcheck.main(), capsys.readouterr().out


def test_a_line_says_what_came_of_each_check_and_the_exit_code_whether_all_passed(
    monkeypatch, capsys
):
    two = ("--only", "causality", "--only", "initial loss")
    code, out = run(monkeypatch, capsys, *two)
    machine, *lines, last = out.splitlines()
    assert code == 0
    assert machine.startswith("device cpu · precision fp32 (as set")
    assert [line[:14] for line in lines] == ["✓ causality   ", "✓ initial loss"]
    assert last == "All 2 checks passed."

    def broken(bench: Bench) -> str:
        raise ZeroDivisionError("a library\nfails")

    monkeypatch.setitem(CHECKS, "causality", broken)
    code, out = run(monkeypatch, capsys, *two)
    assert code == 1
    assert "✗ causality        ZeroDivisionError: a library (" in out
    assert "1 of 2 checks failed: causality." in out
    code, out = run(monkeypatch, capsys, *two, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["passed"] is False
    assert [(c["check"], c["passed"]) for c in found["checks"]] == [
        ("causality", False),
        ("initial loss", True),
    ]
    assert found["machine"]["torch"] == torch.__version__
