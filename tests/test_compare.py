"""Comparing runs: losses by plain loops, verdicts by runs that do and do not differ, the page."""

import dataclasses
import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import storage.cache
from engine.loss import next_token_loss, token_losses
from engine.optim import build_adamw
from engine.precision import Precision
from exchange.saved_run import load_run
from insight import compare as comparing
from insight.compare import Comparison, Curve, Standing, find_differing, read_compared, read_curve
from insight.comparison_page import as_page, draw, standings_table, verdict_of
from insight.paired import (
    USUAL_SPREAD,
    Difference,
    Spread,
    find_difference,
    find_spread,
    plan_blocks,
    score_blocks,
    score_tokens,
    t_quantile,
)
from insight.run_text import RunText, to_bytes
from model import GPTConfig, GPTModel
from scripts import compare
from scripts.options import run_program
from tests import by_heart
from tests.by_heart import Done
from tests.texts import CHINESE, ENGLISH
from text.tokenizer import CharTokenizer
from training.learner import take_step

CPU = torch.device("cpu")
FP32 = Precision("fp32", "", "cpu")


def small_model(vocab_size: int, seed: int = 0, **shape) -> GPTModel:
    torch.manual_seed(seed)
    shape = {"context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 1} | shape
    return GPTModel(GPTConfig(vocab_size, **shape)).eval()


def test_the_losses_of_tokens_are_those_whose_mean_is_trained_on(monkeypatch):
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 5, 8), torch.randn(11, 8)
    targets = torch.randint(0, 11, (2, 5))
    monkeypatch.setattr("engine.loss.chunk_rows", lambda rows, size: 3)
    losses = token_losses(hidden, head, targets)
    assert losses.shape == (2, 5)
    for row, of_row in zip(hidden, targets, strict=True):
        for state, target in zip(row, of_row, strict=True):
            expected = -(head @ state).log_softmax(0)[target]
            assert losses[(hidden == state).all(-1)].item() == pytest.approx(expected.item(), 1e-5)
    assert losses.mean().item() == pytest.approx(next_token_loss(hidden, head, targets).item())


@torch.no_grad()
def test_the_wanted_tokens_have_the_losses_of_a_loop_over_them():
    tokens = np.random.default_rng(0).integers(0, 9, 100)
    model = small_model(9)
    for parameter in model.parameters():
        parameter *= 20  # so that a token's context tells
    wanted = np.zeros(100, dtype=bool)
    wanted[[1, 2, 30, 31, 32, 77, 99]] = True
    nats = score_tokens(model, tokens, wanted, CPU, FP32)
    everything = score_tokens(model, tokens, np.ones(100, dtype=bool), CPU, FP32)
    assert np.isnan(everything).tolist() == [True] + [False] * 99
    assert np.array_equal(nats[wanted], everything[wanted])
    assert 20 < np.isnan(nats).sum() < 80  # the windows that no wanted token is in
    start = 0
    for at in range(1, 100):
        if at - start > 16:  # a window, whose newest half is kept
            start += 8
        logits = model(torch.tensor([tokens[start:at].tolist()]))[0, -1]
        expected = -logits.log_softmax(0)[tokens[at]].item()
        assert everything[at] == pytest.approx(expected, rel=2e-3)


def test_blocks_are_the_same_text_for_any_tokenizer_and_beginning():
    text = ENGLISH[:2400] + CHINESE[:100]
    blocks = plan_blocks(len(text.encode()) - 100, 10**6)
    assert blocks.size == 64 and blocks.numbers.tolist() == list(range(1, blocks.n_bytes // 64))
    for tokenizer in (CharTokenizer(text), CharTokenizer("etaoin")):  # the others are bytes
        model = small_model(tokenizer.vocab_size)
        whole, shorter = (np.array(tokenizer.encode(part)) for part in (text, text[100:]))
        # weights of 0 make every token equally likely, whatever comes before it
        for parameter in model.parameters():
            parameter.data.zero_()
        found = [
            score_blocks(model, tokenizer, tokens, blocks, CPU, FP32) for tokens in (whole, shorter)
        ]
        counts, start = np.zeros(len(blocks.numbers)), 0
        for token in shorter.tolist():
            number = start // 64
            if 1 <= number <= len(counts):
                counts[number - 1] += 1
            start += len(tokenizer.token_bytes(token))
        assert found[1] == pytest.approx(counts * math.log2(tokenizer.vocab_size), rel=1e-5)
        assert found[0][2:] == pytest.approx(found[1][2:], rel=1e-5)


def test_a_large_text_is_scored_on_blocks_spread_over_it():
    blocks = plan_blocks(10_000_000, 100_000)
    assert blocks.size == 4096 and len(blocks.numbers) == 24
    assert blocks.numbers[0] == 1 and blocks.numbers[-1] > 0.95 * 10_000_000 / 4096 - 100
    assert len(set(np.diff(blocks.numbers))) <= 2
    assert len(plan_blocks(100, 10**6).numbers) == 0


def test_of_a_large_text_the_end_alone_is_held_in_memory_and_all_of_it_must_be_the_same(
    tmp_path, monkeypatch
):
    """Runs whose texts begin at different places, and are divided by different tokenizers."""
    text = "".join(np.random.default_rng(0).choice([*"abcdé\n"], 30_000))
    cases = {
        "letters": (CharTokenizer(text), text),
        "bytes": (CharTokenizer("etaoin"), text[500:]),
        "short": (CharTokenizer(text), text[20_000:]),
        "other": (CharTokenizer(text), "x" + text[1:]),
    }
    texts = {}
    for name, (tokenizer, content) in cases.items():
        tokens = np.array(tokenizer.encode(content))
        texts[tmp_path / name] = RunText(tokens[:0], tokens, tokenizer, name)
    monkeypatch.setattr(comparing, "open_run_text", texts.__getitem__)
    run = dataclasses.make_dataclass("Run", ["path", "record"])
    no_chat = dataclasses.make_dataclass("Record", ["chat"])(None)
    runs = {path.name: run(path, no_chat) for path in texts}

    def shared(*names: str):
        return comparing._shared_blocks([runs[name] for name in names], 1200)

    blocks, ends, why_none = shared("letters", "bytes")
    assert why_none is None and blocks.n_bytes == 4800 and blocks.scored_bytes <= 1200
    for end in ends:
        content = to_bytes(end.val, end.tokenizer)
        assert text.encode().endswith(content)
        # a context is before it, and at most twice as much
        assert 4800 + 2048 <= len(content) <= 2 * (2 * 4800 + 2048)
        model = small_model(end.tokenizer.vocab_size)
        for parameter in model.parameters():
            parameter.data.zero_()
        whole = next(of for of in texts.values() if of.tokenizer is end.tokenizer)
        of_end, of_whole = (
            score_blocks(model, end.tokenizer, tokens, blocks, CPU, FP32)
            for tokens in (end.val, whole.val)
        )
        assert of_end == pytest.approx(of_whole) and of_end.min() > 0
    assert shared("letters", "short")[2].en == "the runs have different validation texts"
    assert shared("letters", "other")[2].en == "the runs have different validation texts"


# ------------------------------------------------------------------------------ verdicts


def test_the_interval_has_the_spread_of_the_text_and_that_of_the_seeds():
    generator = np.random.default_rng(0)
    other = generator.gamma(9, 30, 200)
    bits = other * 1.03
    seeds_only = find_difference(bits, other, Spread(0.01, 0))
    assert seeds_only.share == pytest.approx(0.03)
    assert seeds_only.high - seeds_only.share == pytest.approx(1.96 * 0.01 * 2**0.5, rel=1e-3)
    bits = bits + generator.normal(0, 20, 200)
    text_only = find_difference(bits, other, Spread(0.0, 0))
    # what bootstrapping the blocks gives
    picks = generator.integers(0, 200, (4000, 200))
    shares = bits[picks].sum(1) / other[picks].sum(1) - 1
    low, high = np.quantile(shares, [0.025, 0.975])
    assert text_only.low == pytest.approx(low, abs=0.0015)
    assert text_only.high == pytest.approx(high, abs=0.0015)
    both = find_difference(bits, other, Spread(0.01, 0))
    reaches = [d.high - d.share for d in (seeds_only, text_only, both)]
    assert both.high - both.share == pytest.approx(math.hypot(*reaches[:2]), rel=0.01)
    assert [t_quantile(n) for n in (3, 10, 30, math.inf)] == pytest.approx(
        [3.182, 2.228, 2.042, 1.960], rel=0.01
    )
    assert [t_quantile(n, 28) for n in (5, 11, 30, math.inf)] == pytest.approx(
        [6.045, 4.091, 3.428, 3.124], rel=0.01
    )
    assert Difference(0.02, 0.01, 0.03).is_real and Difference(-0.02, -0.03, -0.01).is_real
    assert not Difference(0.02, -0.01, 0.05).is_real
    assert find_difference(other, other, Spread(0.0, 0)).high == 0


def test_the_spread_of_seeds_is_measured_where_there_are_several_of_one_kind():
    assert find_spread([[2.0], [3.0]]) == Spread(USUAL_SPREAD, 0)
    generator = np.random.default_rng(0)
    groups = [2.0 * np.exp(generator.normal(0, 0.02, 30)), 5 * np.exp(generator.normal(0, 0.02, 9))]
    spread = find_spread([list(group) for group in groups] + [[1.0]])
    assert spread.measured == 37
    squares = sum((len(group) - 1) * np.log(group).var(ddof=1) for group in groups)
    assert spread.share == pytest.approx(((4 * USUAL_SPREAD**2 + squares) / (4 + 37)) ** 0.5)
    assert 0.012 < spread.share < 0.025
    # two of them that happen to be equal do not make it zero
    assert find_spread([[2.0, 2.0]]).share == pytest.approx(USUAL_SPREAD * (4 / 5) ** 0.5)


@pytest.fixture(scope="module")
def seeds() -> list[np.ndarray]:
    """The bits of each block by ten models that differ in nothing but the seed."""
    tokenizer = CharTokenizer(ENGLISH)
    tokens = np.array(tokenizer.encode(ENGLISH))
    val = tokens[-9000:]
    text, found = torch.from_numpy(tokens[:-9000]), []
    blocks = plan_blocks(len(to_bytes(val, tokenizer)), 10**6)
    for seed in range(10):
        model = small_model(tokenizer.vocab_size, seed, context_length=32, emb_dim=32).train()
        optimizer = build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            starts = torch.randint(len(text) - 32, (16, 1), generator=generator)
            windows = text[starts + torch.arange(33)]
            take_step(model, [(windows[:, :-1], windows[:, 1:])], optimizer, FP32, 1.0)
        found.append(score_blocks(model.eval(), tokenizer, val, blocks, CPU, FP32))
    return found


@pytest.mark.slow
def test_other_seeds_are_noise_and_three_percent_are_not(seeds):
    usual = find_spread([])
    pairs = [(a, b) for a in range(10) for b in range(a)]
    assert len(pairs) >= 40
    different = [find_difference(seeds[a], seeds[b], usual).is_real for a, b in pairs]
    assert sum(different) <= 0.1 * len(pairs)
    apart = [find_difference(1.03 * seeds[a], seeds[b], usual).is_real for a, b in pairs]
    apart += [find_difference(seeds[a], 1.03 * seeds[b], usual).is_real for a, b in pairs]
    assert sum(apart) >= 0.8 * len(apart)
    # and with the spread that these runs have
    measured = find_spread([[bits.sum().item() for bits in seeds]])
    different = [find_difference(seeds[a], seeds[b], measured).is_real for a, b in pairs]
    assert sum(different) <= 0.1 * len(pairs)


def test_verdicts_on_simulated_pairs_with_the_usual_spread_between_seeds():
    generator, blocks = np.random.default_rng(0), 128
    usual = find_spread([])

    def run(of_text: np.ndarray, share: float) -> np.ndarray:
        noise = generator.normal(0, 0.02, blocks)  # of a block, in one model alone
        return of_text * (1 + noise) * (1 + share + generator.normal(0, USUAL_SPREAD))

    calls = dict.fromkeys((0.0, 0.03), 0)
    for share in calls:
        for _ in range(400):
            of_text = generator.gamma(9, 30, blocks)
            found = find_difference(run(of_text, share), run(of_text, 0.0), usual)
            calls[share] += found.is_real
    assert calls[0.0] <= 0.1 * 400
    assert calls[0.03] >= 0.8 * 400


def test_of_eight_equal_runs_hardly_ever_one_is_worse_than_the_one_that_came_out_best():
    generator, n_blocks, families = np.random.default_rng(0), 128, 400
    usual, fooled, seen = find_spread([]), 0, 0
    for _ in range(families):
        noise = generator.normal(0, 0.02, (8, n_blocks))  # of a block, in one model alone
        seeds = generator.normal(0, USUAL_SPREAD, (8, 1))
        bits = generator.gamma(9, 30, n_blocks) * (1 + noise) * (1 + seeds)
        best, worst = bits.sum(axis=1).argmin(), bits.sum(axis=1).argmax()
        found = find_difference(bits[worst], bits[best], usual, n_models=8)
        fooled += found.is_real
        assert found.high - found.low > find_difference(bits[worst], bits[best], usual).high
        bits[worst] *= 1.05  # and one that is really worse is seen
        seen += find_difference(bits[worst], bits[best], usual, n_models=8).is_real
    assert fooled <= 0.06 * families
    assert seen >= 0.95 * families


# ------------------------------------------------------------------------- runs and pages


def test_a_curve_has_the_tokens_and_the_training_time_of_each_evaluation(tmp_path):
    rows = [{"step": 0, "val/bits_per_byte": 8.0, "eval/train_loss": 5.0}]
    for step in range(1, 7):
        rows.append({"step": step, "train/loss": 3.0, "train/tokens": 100 * step})
        if step % 2 == 0:
            row = {"step": step, "val/bits_per_byte": 4 - step / 4, "train/tok_per_sec": 50 * step}
            rows.append(row)
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row) for row in rows]
    lines[3:3] = ["[1]", '{"step": ', '{"step": 3, "val/bits_per_byte": null}']
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    curve = read_curve(file)
    assert curve.steps.tolist() == [2, 4, 6]
    assert curve.tokens.tolist() == [200, 400, 600]
    assert curve.seconds.tolist() == pytest.approx([2, 3, 3 + 2 / 3])
    assert curve.at("tokens", 300) == pytest.approx(3.25)
    assert curve.at("seconds", 2.5) == pytest.approx(3.25)
    assert read_curve(tmp_path / "none.jsonl").steps.tolist() == []


def test_settings_that_differ_are_listed_with_the_value_of_each():
    settings = [{"a": 1, "b": [2], "c": 3}, {"a": 1, "b": [3]}]
    assert find_differing(settings) == {"b": [[2], [3]], "c": [3, None]}


def standing(name: str, difference: Difference | None, score: float | None = 2.0) -> Standing:
    curve = Curve(*(np.array([1.0, 2.0]) for _ in range(4)))
    run = dataclasses.make_dataclass("Run", ["name", "curve"])(name, curve)
    return Standing(run, score, difference, 2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([Difference(0.03, 0.01, 0.05)], "a is better than the other one, by 3.0% or more"),
        ([Difference(0.03, 0.01, 0.05), Difference(0.1, 0.08, 0.12)], "all the others, by 3.0%"),
        ([Difference(0.01, -0.01, 0.03)], "no run is shown to be better than another"),
        (
            [Difference(0.01, -0.01, 0.03), Difference(0.1, 0.08, 0.12)],
            "a is better than c; its difference to b is no more than noise.",
        ),
    ],
)
def test_the_verdict_is_one_sentence(differences, said):
    others = [standing(name, d) for name, d in zip("bc", differences, strict=False)]
    comparison = Comparison(
        [standing("a", None), *others], 1e6, 60.0, {}, 1000, find_spread([]), None
    )
    assert said in verdict_of(comparison).en
    rows = [[cell.en for cell in row] for row in standings_table(comparison)]
    assert rows[0][4:6] == ["at 1M tokens", "at 1m 0.0s"]
    assert [row[3].split()[-1] for row in rows[1:]] == [
        "best",
        *("worse" if d.is_real else "noise" for d in differences),
    ]


def test_hostile_names_and_settings_stay_text_in_the_page():
    evil = '<script>alert("x")</script>&'
    runs = [standing(evil, None), standing("b", Difference(0.1, 0.05, 0.2))]
    differing = {"DATA": [evil, "$x$"]}
    page = as_page(Comparison(runs, 1, 1, differing, 9, find_spread([]), None), b"png")
    assert page.count("<script") == 1 and page.count("&lt;script&gt;") >= 3  # that of its language
    assert not re.search(r"(?:src|href)=(?!\"data:)", page)
    assert "default-src 'none'" in page and "javascript" not in page


@pytest.mark.slow
def test_the_picture_takes_any_name():
    pytest.importorskip("matplotlib")
    runs = [standing(name, None) for name in ("$x$ $", "_hidden", "春江")]
    assert draw(Comparison(runs, 1, 1, {}, 0, None, "why")).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    return by_heart.tiny_run(tmp_path_factory)


@pytest.fixture
def call(tiny_run, tmp_path, monkeypatch, capsys):
    """Run the program in this process, with the tiny run's text and cache, in an empty folder."""
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(tiny_run.parent.parent / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage.cache, "CACHE", tiny_run.parent.parent / "cache")
    monkeypatch.setattr(comparing, "load_run", functools.cache(load_run))
    monkeypatch.setattr(comparing, "LEAST_BLOCKS", 2)  # its validation text is two short stories

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        with pytest.raises(SystemExit) as exit:
            run_program(compare.main)
        return Done(exit.value.code, *capsys.readouterr())

    return run


def copied(run: Path, folder: Path, name: str, **changes) -> Path:
    """A copy of a run whose settings.json and data.json differ."""
    copy = folder / name
    shutil.copytree(run, copy)
    for file, values in changes.items():
        path = copy / f"{file}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        for names, value in values.items():
            *outer, last = names.split(".")
            functools.reduce(dict.__getitem__, outer, content)[last] = value
        path.write_text(json.dumps(content), encoding="utf-8")
    return copy


def test_runs_are_compared_from_their_folders(call, tiny_run, tmp_path, no_pictures):
    other = copied(tiny_run, tmp_path, "seed <2>", settings={"settings.SEED": 2})
    done = call(str(tiny_run), str(other), "--html", "page.html", "--device", "cpu")
    assert done.code == 0, done.err
    assert "no run is shown to be better than another" in done.out
    assert "1 degree of freedom" in done.out and "Bonferroni" not in done.out
    assert 0 < float(done.out.splitlines()[3].split()[2]) < 0.5  # it has the text by heart
    (row,) = [line for line in done.out.splitlines() if line.startswith("SEED")]
    assert sorted(row.split()[1:]) == ["123", "2"]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "seed &lt;2&gt;" in page and "seed <2>" not in page
    runs = [read_compared(path) for path in (tiny_run, other)]
    assert runs[0].kind() == runs[1].kind()
    # the run itself, twice, tells nothing about other seeds
    again = copied(tiny_run, tmp_path, "again")
    done = call(str(tiny_run), str(again), "--device", "cpu")
    assert "no two runs here have the same settings and different seeds" in done.out
    done = call(str(tiny_run), str(again), str(other), "--device", "cpu")
    assert "1 degree of freedom" in done.out
    assert "for all 3 pairs at once (Bonferroni)" in done.out


@pytest.mark.parametrize("kind", ["other", "gone"])
def test_runs_with_different_validation_texts_are_tabled_without_a_verdict(
    call, tiny_run, tmp_path, no_pictures, kind
):
    split = {"other": {"split.train_tokens": 300}, "gone": {"tokens_sha256": "0" * 64}}
    other = copied(tiny_run, tmp_path, "other", data=split[kind])
    done = call(str(tiny_run), str(other))
    assert done.code == 0
    assert done.out.startswith("No verdict: ")
    assert {"other": "have different validation texts", "gone": "has changed"}[kind] in done.out
    assert "at its end" in done.out and "worse" not in done.out
    assert "pip install matplotlib" in done.err


def test_runs_on_conversations_are_in_the_order_of_their_answers_without_a_verdict(
    call, tiny_run, tmp_path, no_pictures
):
    chat = {"template": "{{ messages }}", "rows": 9}
    worse, better = (
        copied(tiny_run, tmp_path, name, settings={"chat": chat | {"rows": rows}})
        for name, rows in (("a", 9), ("b", 8))
    )
    rows = [{"step": 0, "val/bits_per_byte": 8.0, "train/tok_per_sec": 9.0}]
    for run, bits in ((worse, 3.0), (better, 2.0)):
        rows[1:] = [rows[0] | {"step": 9, "val/bits_per_byte": bits, "train/tokens": 90}]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (run / "metrics.jsonl").write_text(lines, encoding="utf-8")
    done = call(str(worse), str(better))
    assert done.code == 0, done.err
    assert done.out.startswith("No verdict: a learned conversations, of which the answers alone")
    assert [line.split()[0] for line in done.out.splitlines()[3:5]] == ["b", "a"]
    (row,) = [line for line in done.out.splitlines() if line.startswith("conversations")]
    assert row.split()[1:] == ["8", "9"]
    assert "worse" not in done.out and "chat_template" not in done.out
    plain = read_compared(tiny_run)
    assert len({run.kind() for run in (plain, read_compared(worse), read_compared(better))}) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tiny"], 2, "alone to compare; it takes two or more"),
        ([], 2, "there is no run to compare"),
        (["tiny", "nothing"], 4, "nothing is no run"),
        (["tiny", "tiny", "--bytes", "5"], 2, "--bytes is 5; it must be 10,000 or more"),
        (["tiny", "empty"], 3, "has no evaluation after its first step"),
    ],
)
def test_what_can_not_be_compared_is_said(call, tiny_run, tmp_path, arguments, code, said):
    empty = copied(tiny_run, tmp_path, "empty")
    (empty / "metrics.jsonl").write_text("", encoding="utf-8")
    done = call(*(str(tiny_run) if name == "tiny" else name for name in arguments))
    assert (done.code, done.out) == (code, "")
    assert said in done.err
