"""The benchmarks count right, hold the contenders to the same training, and run."""

import dataclasses
import functools
import json
import math
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import generate, learn, peer_job, peers, report, startup, steps, train
from data import WindowDataset
from engine.precision import choose_precision
from model import GPTConfig, GPTModel
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")
TINY = GPTConfig(vocab_size=100, context_length=16, emb_dim=8, n_heads=2, n_layers=3)


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(steps, "MULTIPLY_SHAPES", ((256, 256, 256),))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for the figures, so that the published ones stay as they are."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


# ------------------------------------------------------------------ counting


@pytest.mark.slow
def test_products_are_counted_in_the_linear_layers_and_the_head(monkeypatch):
    monkeypatch.setattr(steps, "MULTIPLY_SHAPES", ((10, 20, 30),))
    monkeypatch.setattr(steps, "median_seconds", lambda *_, **__: 0.5)
    assert steps.multiply_rate(torch.float32, CPU) == 2 * 10 * 20 * 30 / 0.5
    # a model's own products are three of every linear layer and of the head
    weights = 100 * 8 + 3 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8)
    products = 3 * (1 + 3 * 4)
    assert steps.own_products_rate(TINY, 5, torch.bfloat16, CPU) == pytest.approx(
        3 * 2 * 5 * weights / (0.5 * products)
    )


def test_pieces_of_work_take_turns_and_the_first_two_runs_do_not_count(monkeypatch):
    order = []
    clock = iter([0, 9, 9, 18, 20, 29, 29, 38, 40, 41, 41, 43, 50, 53, 53, 57])
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(clock))
    pieces = [lambda: order.append("a"), lambda: order.append("b")]
    assert steps.median_seconds_in_turn(pieces, CPU, repeats=2) == [2, 3]
    assert order == ["a", "b"] * 4


def test_the_peak_is_that_of_the_named_gpu_or_none():
    peaks = {"H100 80GB HBM3": 989, "H100 PCIe": 756, "H200": 989, "A100-SXM4-80GB": 312}
    peaks |= {"L4": 121, "L40S": None, "GeForce RTX 4090": 165, "T4": None}
    for name, peak in peaks.items():
        assert steps.bf16_peak(f"NVIDIA {name}") == (peak and peak * 1e12)


@pytest.mark.slow
def test_the_step_with_full_logits_is_the_same_training():
    precision = choose_precision("fp32", CPU)
    ids, targets = torch.randint(100, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    ours, step = steps.prepare_step(TINY, CPU, precision)
    plain, full_logits_step = steps.prepare_full_logits_step(TINY, CPU, precision)
    for _ in range(3):
        torch.testing.assert_close(step(ids, targets), full_logits_step(ids, targets))
    start = steps.fresh_model(TINY, CPU)
    for ended, other, began in zip(
        ours.parameters(), plain.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(ended, other)
        assert not torch.equal(ended, began)


# ------------------------------------------------------------------ contenders


def job_for(tmp_path, tokens, **changes) -> peer_job.Job:
    np.save(tmp_path / "tokens.npy", tokens.astype(np.uint16))
    fields = {
        "tokens": str(tmp_path / "tokens.npy"),
        "weights": "",
        "model": dataclasses.asdict(TINY),
        "batch_size": 2,
        "steps": 2,
        "device": "cpu",
        "learning_rate": 1e-4,
        "precision": "fp32",
        "keep_losses": True,
        "report": str(tmp_path / "report.json"),
    }
    return peer_job.Job(**fields | changes)


def test_the_contenders_windows_are_those_of_the_trainer(tmp_path):
    for count in (16, 17, 48, 49):
        tokens = np.arange(count)
        theirs = list(job_for(tmp_path, tokens).windows())
        ours = WindowDataset(tokens, TINY.context_length, TINY.context_length)
        assert len(theirs) == len(ours) == (count - 1) // 16
        for window, (ids, targets) in zip(theirs, ours, strict=True):
            assert window[:-1].tolist() == ids.tolist()
            assert window[1:].tolist() == targets.tolist()


def test_a_report_counts_operations_and_leaves_out_no_time(tmp_path, monkeypatch):
    times = iter([1.0, 3.0, 3.5])
    monkeypatch.setattr(peer_job.time, "perf_counter", lambda: next(times))
    clock = peer_job.StepClock()
    for _ in range(3):
        clock.mark()
    job = job_for(tmp_path, np.arange(40))
    peer_job.report(
        job, clock, losses=[], parameters=9, in_products=7, precision="fp32", versions={}
    )
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["step_s"] == [2.0, 0.5]
    assert written["flop_per_token"] == 6 * 7 + 12 * 3 * 8 * 16
    assert clock.first_step_at == written["first_step_at"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is getrusage's")
def test_the_peak_is_the_processes_own_and_stays_when_memory_is_given_back():
    held = np.ones(25_000_000)  # what this process holds is not the other's
    code = (
        "import numpy; from benchmarks.peer_job import peak_bytes; before = peak_bytes();"
        "numpy.ones(12_500_000); print(before, peak_bytes())"
    )
    command = [sys.executable, "-c", code]
    before, after = map(int, subprocess.check_output(command, cwd=REPOSITORY).split())
    assert before < held.nbytes // 2
    assert 90e6 < after - before < 110e6


@pytest.mark.slow  # transformers takes seconds to import
def test_transformers_reads_our_weights_as_the_same_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    for tied in (True, False):
        model = GPTModel(dataclasses.replace(TINY, tie_embeddings=tied))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        peers.save_for_transformers(model, tmp_path / str(tied))
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / str(tied)).eval()
        ids = torch.randint(100, (3, 16))
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-4)


def test_the_tokens_are_the_repositorys_texts_over_and_over():
    tokens = peers.sample_tokens(60_000)
    assert len(tokens) == 60_000
    assert tokens.dtype == np.uint16
    period = next(n for n in range(1000, 60_000) if (tokens[n : n + 50] == tokens[:50]).all())
    assert (tokens[period:] == tokens[:-period]).all()
    assert len(set(tokens.tolist())) > 1000


# ------------------------------------------------------------------ which rows count

LOSSES = [10.0 - 0.1 * step for step in range(50)]


def test_losses_that_differ_at_a_compared_step_or_dont_fall_void_a_row():
    assert peers.disagreement(LOSSES, [loss + 0.019 for loss in LOSSES]) is None
    for step in (1, 10, 50):
        for error in (0.021, -0.021, math.nan):
            theirs = list(LOSSES)
            theirs[step - 1] += error
            assert f"loss of step {step} is" in peers.disagreement(LOSSES, theirs)
    assert peers.not_falling(LOSSES) is None
    assert peers.not_falling(LOSSES[::-1]) == "its loss goes from 5.100 to 10.000"
    assert peers.not_falling([*LOSSES[:-1], math.nan]) is not None
    # too short to compare
    assert peers.disagreement(LOSSES, LOSSES[:49]) == "no loss of step 50 to compare"
    assert peers.not_falling(LOSSES[:49]) == "no loss of step 50"


def run_of(seconds: float, flop: int, losses=()) -> dict:
    return {
        "step_s": [99.0] * 3 + [seconds] * 2,
        "flop_per_token": flop,
        "losses": list(losses),
        "precision": "bf16",
        "parameters": 9,
        "peak_bytes": 5,
        "start_s": 1.0,
        "versions": {},
    }


@pytest.mark.parametrize(("same_model", "ratio"), [(True, 2.0), (False, 1.0)])
def test_a_ratio_is_taken_round_by_round_without_the_warm_up(same_model, ratio):
    race = peers.Race(TINY, batch_size=4)
    peer = peers.Contender("peer", "", starts_from_our_weights=same_model)
    checks = {name: run_of(1.0, 100, LOSSES) for name in ("ours", "peer")}
    reports = {
        "ours": [run_of(s, 100) for s in (1.0, 2.0, 4.0)],
        "peer": [run_of(s, 200) for s in (2.0, 4.0, 12.0)],  # twice the work a token
    }
    rates = {"large_products": 3200.0, "own_products": 6400.0}
    row = peers.make_row(peer, race, checks, reports, rates)
    assert row["void"] is None
    assert row["ratio"] == {"median": ratio, "min": ratio, "max": 1.5 * ratio}
    assert row["tokens_per_second"] == {"median": 16.0, "min": 64 / 12, "max": 32.0}
    assert row["flop_per_second"] == 3200.0
    assert (row["share_of_large_products"], row["share_of_own_products"]) == (1.0, 0.5)
    assert row["losses"] == {"1": LOSSES[0], "10": LOSSES[9], "50": LOSSES[49]}
    checks["peer"]["losses"] = LOSSES[::-1]
    assert peers.make_row(peer, race, checks, reports, rates)["void"] is not None
    # losses in fp32 are held against ours in fp32
    peer = peers.Contender("peer", "", "fp32")
    checks = {name: run_of(1.0, 100, LOSSES) for name in ("ours-fp32", "peer")}
    checks["ours"] = run_of(1.0, 100, LOSSES[::-1])
    reports = {name: [run_of(1.0, 100)] for name in ("ours", "peer")}
    rates = {"large_products": 1.0, "own_products": 1.0}
    assert peers.make_row(peer, race, checks, reports, rates)["void"] is None
    checks["ours-fp32"] = checks["ours"]
    assert peers.make_row(peer, race, checks, reports, rates)["void"] is not None


def test_a_peer_that_fails_is_a_void_row_with_its_last_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "peers_python", lambda: sys.executable)
    missing = peers.Contender("missing", "benchmarks.no_such_peer")
    failed = peers.run(missing, peers.Race(TINY, 2), 2, CPU, tmp_path, False)
    assert "no_such_peer" in failed["failed"]
    row = peers.make_row(missing, peers.Race(TINY, 2), {"missing": failed}, {"missing": []}, {})
    assert row == {"name": "missing", "void": failed["failed"]}
    peers.print_rows([row], {"large_products": 1.0, "own_products": 1.0})
    assert f"void: {failed['failed']}" in capsys.readouterr().out
    # our own failure is raised and no row
    broken = dataclasses.replace(peers.OURS, module="benchmarks.no_such_peer")
    monkeypatch.setattr(peers, "OURS", broken)
    with pytest.raises(RuntimeError, match="no_such_peer"):
        peers.run(broken, peers.Race(TINY, 2), 2, CPU, tmp_path, False)


def test_an_unknown_name_ends_the_benchmark_with_the_known_ones():
    for arguments in (["no-case"], ["--peers", "--only", "no-peer"]):
        with pytest.raises(SystemExit, match=r"unknown: no-.*known are: .*, "):
            train.main(arguments)


# ------------------------------------------------------------------ the real thing


@pytest.mark.slow
def test_our_contender_trains_on_the_given_tokens_from_the_shared_weights(
    tmp_path, monkeypatch, capsys
):
    config = GPTConfig(vocab_size=50257, context_length=16, emb_dim=8, n_heads=2, n_layers=1)
    race = peers.Race(config, batch_size=2, rounds=1)
    # the longest of the runs stands for all: they differ in their number of steps
    once = functools.cache(functools.partial(peers.run, peers.OURS, race, 50, CPU, tmp_path, True))
    monkeypatch.setattr(peers, "run", lambda *_: once())
    (row,) = peers.compare_speed(race, [], CPU, tmp_path)["rows"]
    model = steps.fresh_model(config, CPU)
    windows = WindowDataset(np.load(tmp_path / "tokens.npy"), 16, 16)
    ids, targets = windows.__getitems__([0, 1])
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()
    assert row["losses"]["1"] == pytest.approx(expected, abs=1e-2)
    assert row["void"] is None
    assert row["parameters"] == model.count_parameters()
    assert row["flop_per_token"] == model.flop_per_token()
    assert 0 < row["tokens_per_second"]["min"] <= row["tokens_per_second"]["max"]
    assert row["peak_bytes"] > 1e8
    assert row["first_step_s"] > 0.1
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_the_training_benchmark_measures_every_kind_of_step(results, monkeypatch, capsys):
    quick = train.cases(CPU)[0]
    with torch.device("meta"):
        assert GPTModel(quick.config).count_parameters() == 6_540_800
    tiny = dataclasses.replace(quick, config=TINY, steps=2)
    compiled = []
    monkeypatch.setattr(train, "cases", lambda _: [tiny])
    monkeypatch.setattr(train, "what_prevents_compiling", lambda _: None)
    monkeypatch.setattr(steps, "compile_model", lambda *_, **__: compiled.append(1))
    train.main(["quick"])
    (row,) = json.loads(next(results.glob("train-cpu-*.json")).read_text(encoding="utf-8"))["rows"]
    assert row["tokens_per_second"] > 0
    assert row["share_of_fp32_rate"] > 0
    assert row["share_of_own_products"] > 0
    seconds = row["seconds"]
    assert seconds.keys() == {"as_written", "compiled", "full_logits"} and compiled == [1]
    assert row["times_full_logits"] == seconds["full_logits"] / seconds["as_written"]
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_the_startup_benchmark_measures_the_real_thing(results, monkeypatch, capsys):
    monkeypatch.setattr(startup, "BARE", "import time; print('at', time.time())")
    startup.main(rounds=1)
    figures = json.loads(next(results.glob("startup-cpu-*.json")).read_text(encoding="utf-8"))
    assert 0 < figures["import_torch_s"][0] < figures["first_step_s"][0]
    assert "beyond import torch" in capsys.readouterr().out


@pytest.mark.slow  # transformers takes seconds to import
def test_the_generation_benchmark_sets_every_kind_beside_transformers(results, monkeypatch, capsys):
    tiny = {"context_length": 16, "emb_dim": 64, "n_heads": 2, "n_layers": 2}
    small = {"read_models": lambda _: ({"gpt2-124m": tiny}, [])}
    small |= {"N_PROMPT": 5, "N_NEW": 4, "N_COMPARED": 12, "N_READ": 1 << 20}
    # a product of so many columns in bf16 takes a processor without units for it a while
    small |= {"GPTConfig": lambda **shape: GPTConfig(**shape | {"vocab_size": 300})}
    small |= {"sample_tokens": lambda count: peers.sample_tokens(count) % 300}
    for name, value in small.items():
        monkeypatch.setattr(generate, name, value)
    generate.main(rounds=2)
    figures = json.loads(next(results.glob("generate-cpu-*.json")).read_text(encoding="utf-8"))
    rows = figures["rows"]
    names = ["transformers, fp32", "transformers, bf16", "ours, fp32", "ours, bf16", "ours, int8"]
    names += ["ours, auto"]  # bf16: the model is small
    assert [(row["name"], row["batch"]) for row in rows] == [(n, b) for n in names for b in (1, 8)]
    for row in rows:
        assert min(row["tokens_per_s"], row["first_token_s"], row["cold_first_token_s"]) > 0
        size = 4 if "fp32" in row["name"] else 1 if "int8" in row["name"] else 2
        per_token = figures["parameters_in_products"] * size / row["batch"]
        n_new = 4 * row["batch"]
        rounds = zip(row["seconds"], figures["bytes_per_s"], strict=True)
        shares = [n_new / seconds * per_token / rate for seconds, rate in rounds]
        assert row["shares"] == pytest.approx(shares)
        assert row["share_of_limit"] == pytest.approx(statistics.median(shares))
    assert rows[0]["ratios"] == rows[1]["ratios"] == [1.0, 1.0]
    assert figures["fp32_tokens_are_transformers"] is True
    for kind, most in (("bf16", 0.02), ("int8", 0.1)):
        assert 0 < figures["from_fp32"][kind]["mean_difference_by_std"] < most
    assert "x transformers" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_learns_is_the_trainers_own(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the river carries the bell " * 2000, encoding="utf-8")
    monkeypatch.setattr(learn, "TEXTS", tmp_path)
    uncompiled = learn.SETTINGS.replace("{compile!r}", "False")
    monkeypatch.setattr(learn, "SETTINGS", uncompiled)
    params = {"max_length": 32, "batch_size": 4, "sampling": "random", "eval_iter": 2}
    shape = {"n_layers": 1, "n_heads": 2, "emb_dim": 32}
    side = learn.Side("tiny", "small", params | {"model_overrides": shape}, (1e-2,))
    case = learn.Case("tiny", "text.txt", "char", 0.5, 1.0, True, (side,))
    outcome = learn.run(case, side, 1e-2, seed=1, share=1.0)
    assert outcome.loss < outcome.losses[0]
    assert outcome.bits_per_byte == outcome.loss  # a character of this text is a byte
    assert outcome.train_seconds == outcome.seconds[-1] > 0
    assert len(outcome.seconds) == len(outcome.tokens) == len(outcome.losses)
    assert outcome.tokens[-1] == outcome.steps * 4 * 32
    assert outcome.other_seconds > 0
    row = {
        "unit": "bits a character",
        "sides": [{"name": "tiny", "rate": 1e-2, "runs": [vars(outcome)]}],
    }
    learn.draw(case, row, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
