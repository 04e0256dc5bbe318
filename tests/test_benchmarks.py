"""The benchmarks count right, and run."""

import json

import pytest
import torch

import benchmarks.report
import benchmarks.startup
import benchmarks.train
from benchmarks.train import flop_per_token, multiply_rate
from model import GPTConfig, GPTModel


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for the figures, so that the published ones stay as they are."""
    monkeypatch.setattr(benchmarks.report, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", [True, False])
def test_work_is_counted_with_the_head_and_without_lookups(tied):
    model = GPTModel(
        GPTConfig(
            vocab_size=100,
            context_length=16,
            emb_dim=8,
            n_heads=2,
            n_layers=3,
            tie_embeddings=tied,
        )
    )
    norms = 7 * 2 * 8
    block = 8 * 24 + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    in_products = 100 * 8 + 3 * block + norms
    assert flop_per_token(model) == 6 * in_products + 12 * 3 * 8 * 16


def test_the_multiply_rate_counts_two_operations_for_each_product(monkeypatch):
    monkeypatch.setattr(benchmarks.train, "MULTIPLY_SHAPES", ((10, 20, 30),))
    monkeypatch.setattr(benchmarks.train, "median_seconds", lambda *_, **__: 0.5)
    assert multiply_rate(torch.float32, torch.device("cpu")) == 2 * 10 * 20 * 30 / 0.5


@pytest.mark.slow
def test_the_training_benchmark_measures_the_quick_model(results, capsys):
    benchmarks.train.main(["quick"])
    (row,) = json.loads((results / "train-cpu.json").read_text(encoding="utf-8"))["rows"]
    assert row["parameters"] == 6_540_800
    assert row["tokens_per_second"] > 0
    assert 0 < row["share_of_fp32_rate"] < 10
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_the_startup_benchmark_times_the_real_program(results, capsys):
    benchmarks.startup.main(rounds=1)
    figures = json.loads((results / "startup-cpu.json").read_text(encoding="utf-8"))
    assert 0 < figures["import_torch_s"][0] < figures["first_step_s"][0]
    assert "beyond import torch" in capsys.readouterr().out
