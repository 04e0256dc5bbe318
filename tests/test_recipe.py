"""Facts of texts and machines, and the recipes that are chosen from them."""

import dataclasses
import itertools
import json
import math
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import recipe as benchmark
from distributed.parallel import ALONE
from engine.memory import as_bytes, estimate_memory
from engine.precision import choose_precision
from engine.settings import from_json
from engine.words import AS_SET
from model import GPTConfig, GPTModel
from planning import speed
from planning.card import card_lines
from planning.choices import Choices
from planning.law import COEFFICIENTS, layer_sizes, step_costs
from planning.machine import Machine
from planning.recipe import (
    LADDER,
    Fixed,
    MachineFacts,
    Recipe,
    choose_recipe,
    choose_tokenizer,
)
from storage.checkpoint import most_bytes
from tests.conftest import REPOSITORY
from tests.texts import ENGLISH
from text import facts, spans
from text.documents import DataSpec
from text.facts import TextFacts, find_facts, measure_text
from text.tokenizer import train_bpe
from training_utils import TrainingConfig

NOTHING = Fixed(None, {}, {})
CPU = MachineFacts("cpu", 6e11, 15e-6, 1e-9, 8 * 10**9)
# as measured on tiny-shakespeare
BYTES_A_TOKEN = {"char": 1.0, "gpt2": 3.09, "bpe:512": 1.88, "bpe:1024": 2.26, "bpe:2048": 2.56}
BYTES_A_TOKEN |= {"bpe:4096": 2.9, "bpe:8192": 3.19, "bpe:16384": 3.31}
VOCABULARIES = {n: int(n[4:]) for n in BYTES_A_TOKEN if n.startswith("bpe")}
VOCABULARIES |= {"char": 322, "gpt2": 50257}


def english(n_bytes: int = 1_115_394, **changes) -> TextFacts:
    """What is measured of tiny-shakespeare, or of a text like it of another size."""
    usual = {
        "fingerprint": "x",
        "train_bytes": round(0.9 * n_bytes),
        "val_bytes": n_bytes - round(0.9 * n_bytes),
        "n_characters": n_bytes,
        "distinct_characters": 65,
        "entropies": [4.77, 3.54, 2.75],
        "bz2_bits": 2.27,
        "repeated": 0.0,
        "leaked": 0.0,
        "document_bytes": n_bytes,
        "bytes_per_token": BYTES_A_TOKEN,
        "vocabularies": VOCABULARIES,
        "can_train": True,
    }
    return TextFacts(**(usual | changes))


def measured(*texts: str, **options) -> TextFacts:
    options = {"tokenizer": "char"} | options
    return measure_text(((text, True) for text in texts), 0.9, **options)


@pytest.fixture
def without_training(monkeypatch):
    """No child process that learns a vocabulary: only characters and GPT-2's tokens."""
    monkeypatch.setattr(facts, "can_train", lambda: False)


# ------------------------------------------------------------------ the recipe


def rung(recipe: Recipe) -> int:
    return LADDER.index((recipe.model["n_layers"], recipe.model["emb_dim"]))


def check(recipe: Recipe, text: TextFacts, machine: MachineFacts, minutes: float) -> None:
    """A recipe is valid, fits, and is itself again after it went through JSON."""
    TrainingConfig(**recipe.training, max_steps=max(2, recipe.steps))
    GPTConfig(vocab_size=text.vocabularies[recipe.tokenizer], **recipe.model)
    assert recipe.memory <= machine.memory
    assert recipe.minutes <= minutes and 0 <= recipe.low <= recipe.bits_per_byte <= recipe.high
    context = recipe.model["context_length"]
    assert context <= max(64, text.val_bytes) and context <= max(8, text.train_bytes // 4)
    assert from_json(Recipe, json.loads(json.dumps(dataclasses.asdict(recipe))), "x") == recipe


def table(n_sizes: int, n_speeds: int, n_minutes: int) -> None:
    """Check 10 KB to 10 GB x 50 GFLOP/s to 800 TFLOP/s x 0.25 to 10,000 minutes."""
    minutes = np.geomspace(0.25, 10_000, n_minutes).tolist()
    for n_bytes in np.geomspace(1e4, 1e10, n_sizes):
        for flops in np.geomspace(5e10, 8e14, n_speeds):
            memory = 10**9 if flops < 1e12 else 10**11
            machine = MachineFacts("cpu", flops, 9e6 / flops, 6e2 / flops, memory)
            text, before = english(int(n_bytes)), math.inf
            for time in minutes:
                recipe = choose_recipe(text, machine, time, NOTHING)
                check(recipe, text, machine, time)
                assert recipe.bits_per_byte <= before
                before = recipe.bits_per_byte
            faster = dataclasses.replace(machine, flops=3 * flops, token_s=3e6 / flops)
            of_faster = choose_recipe(text, faster, minutes[-1], NOTHING)
            assert of_faster.bits_per_byte <= 1.003 * before


def test_recipes_are_valid_fit_and_get_no_worse_with_time():
    table(2, 2, 3)


@pytest.mark.slow
def test_recipes_of_the_whole_table_are_valid_fit_and_get_no_worse_with_time():
    table(6, 6, 10)


def rungs(n_bytes: int, n_steps: int) -> list[list[int]]:
    """The rungs of recipes that differ by a quarter in time, speed or text."""
    near = [1.25**k for k in range(n_steps)]
    rows = [
        [(english(n_bytes), CPU, factor) for factor in near],
        [(english(n_bytes), dataclasses.replace(CPU, flops=3e11 * f), 3.0) for f in near],
        [(english(int(n_bytes * factor)), CPU, 3.0) for factor in near],
    ]
    return [[rung(choose_recipe(*facts, NOTHING)) for facts in row] for row in rows]


@pytest.mark.parametrize(
    ("model", "allowed"),
    [
        ({"emb_dim": 64}, {(1, 64), (2, 64), (3, 64), (4, 64)}),
        ({"n_layers": 2}, {(2, 32), (2, 64), (2, 96), (2, 128), (2, 192)}),
        ({"emb_dim": 8192}, {(32, 8192)}),
    ],
)
def test_beside_a_set_width_or_depth_the_other_is_that_of_a_model_near_it(model, allowed):
    for minutes in (1, 100):
        recipe = choose_recipe(english(10**7), CPU, minutes, Fixed("char", model, {}))
        assert (recipe.model["n_layers"], recipe.model["emb_dim"]) in allowed


def test_a_small_text_on_a_fast_machine_is_no_worse_off_than_on_a_slow_one():
    slow = choose_recipe(english(20_000), CPU, 10, NOTHING)
    fast = MachineFacts("cuda", 2e14, 1e-8, 2e-11, 10**11, 3e-4)
    recipe = choose_recipe(english(20_000), fast, 10, NOTHING)
    assert recipe.bits_per_byte <= 1.001 * slow.bits_per_byte
    assert recipe.passes == pytest.approx(slow.passes, rel=0.1)  # more would be learnt by heart
    assert recipe.passes < 16.7  # with dropout 0.2 measured to be better than 7.7 on 30 KB


def jumps(rows: list[list[int]]) -> list[int]:
    return [abs(b - a) for row in rows for a, b in itertools.pairwise(row)]


@pytest.mark.slow
def test_nothing_from_100_kb_to_100_mb_moves_the_model_by_more_than_one_rung():
    for n_bytes in (100_000, 1_115_394, 30_000_000):
        assert max(jumps(rungs(n_bytes, 16))) == 1


def test_the_forecasts_are_near_what_was_measured():
    """Bits a byte of what MINUTES chooses today, by runs that the law is not fitted to."""
    results = json.loads((REPOSITORY / "benchmarks/results/recipe-auto-cpu.json").read_bytes())
    fitted = json.loads((REPOSITORY / "benchmarks/results/recipe-cpu.json").read_bytes())["runs"]
    bits_of_fit = {run["bits"] for run in fitted.values()}
    assert len(results["runs"]) == 12
    assert not bits_of_fit & {run["bits"] for run in results["runs"].values()}
    for key, run in results["runs"].items():
        facts, minutes = benchmark.TextFacts(**run["facts"]), json.loads(key)["minutes"]
        today = choose_recipe(facts, benchmark.REFERENCE, minutes, NOTHING)
        assert (today.tokenizer, today.model, today.training) == tuple(
            run["recipe"][name] for name in ("tokenizer", "model", "training")
        )
        again = benchmark.predicted(run | {"key": key}, COEFFICIENTS)
        assert again == pytest.approx(run["bits"], rel=0.05)
        assert today.low < run["bits"] < today.high
    shape = {"n_layers": 6, "emb_dim": 192, "context_length": 256, "drop_rate": 0.0}
    recipe = choose_recipe(english(), CPU, 1.85, Fixed("char", shape, {"batch_size": 16}))
    assert recipe.bits_per_byte == pytest.approx(2.213, rel=0.08)  # with a shorter decay
    chosen = choose_recipe(english(), CPU, 1.67, NOTHING)
    assert chosen.tokenizer.startswith("bpe") and chosen.bits_per_byte < 2.2


def test_what_is_set_stays_and_the_rest_is_chosen_around_it():
    fixed = Fixed(
        "char",
        {"n_heads": 5, "drop_rate": 0.3, "context_length": 96},
        {"batch_size": 7, "optimizer": "adamw", "learning_rate": 1e-3},
    )
    recipe = choose_recipe(english(), CPU, 2, fixed)
    check(recipe, english(), CPU, 2)
    assert recipe.tokenizer == "char"
    assert (recipe.model["n_heads"], recipe.model["drop_rate"]) == (5, 0.3)
    assert recipe.model["context_length"] == 96 and recipe.model["emb_dim"] % 10 == 0
    assert not {"batch_size", "optimizer", "learning_rate"} & recipe.training.keys()
    as_set = {name for name, why in recipe.reasons.items() if why == AS_SET}
    assert as_set == {"tokenizer", "n_heads", "drop_rate", "context_length", "batch_size"} | {
        "optimizer", "learning_rate",
    }  # fmt: skip
    # AdamW learns less in the same time, and so does the other architecture
    muon = choose_recipe(english(), CPU, 2, Fixed("char", {}, {}))
    assert muon.bits_per_byte < recipe.bits_per_byte
    gpt2 = choose_recipe(english(), CPU, 2, Fixed("char", {"architecture": "gpt2"}, {}))
    GPTConfig(vocab_size=322, **gpt2.model)
    assert muon.bits_per_byte < gpt2.bits_per_byte
    nothing_left = {"n_layers": 3, "emb_dim": 60, "n_heads": 3}
    only = choose_recipe(english(), CPU, 2, Fixed("char", nothing_left, {}))
    assert only.runner_up.en.startswith("none") and only.model["emb_dim"] == 60


def test_every_chosen_value_has_a_reason_and_unequal_figures_do_not_matter():
    recipe = choose_recipe(english(), CPU, 3, NOTHING)
    unexplained = {"architecture", "qkv_bias", "qk_norm", "zero_init", "tie_embeddings"}
    unexplained |= {"gradient_accumulation_steps", "sampling"}
    assert {*recipe.model, *recipe.training} - unexplained | {"tokenizer"} == {*recipe.reasons}
    assert AS_SET not in recipe.reasons.values()
    about = dataclasses.replace(CPU, flops=6.04e11, memory=8_010_000_000)
    assert choose_recipe(english(), about, 3, NOTHING) == recipe


@pytest.mark.parametrize(
    ("model", "n_bytes", "tokenizer"),
    [
        ({"n_layers": 2, "emb_dim": 64}, 20_000, "char"),  # too short to learn a vocabulary from
        ({"n_layers": 2, "emb_dim": 64}, 10**8, "bpe:1024"),  # its blocks outweigh no larger head
        ({"n_layers": 6, "emb_dim": 192}, 200_000, "bpe:512"),  # is read often in ten minutes
        ({"n_layers": 6, "emb_dim": 192}, 1_115_394, "bpe:512"),
        ({"n_layers": 6, "emb_dim": 192}, 10**8, "bpe:8192"),
    ],
)
def test_around_a_model_that_is_set_the_tokenizer_is_that_of_a_recipe(model, n_bytes, tokenizer):
    text = english(n_bytes)
    if n_bytes < 60 * 512:
        few = {name: BYTES_A_TOKEN[name] for name in ("char", "gpt2")}
        sizes = {name: VOCABULARIES[name] for name in few}
        text = dataclasses.replace(text, bytes_per_token=few, vocabularies=sizes)
    fixed = Fixed(None, model | {"context_length": 128}, {"batch_size": 8})
    assert choose_tokenizer(text, fixed, None) == tokenizer
    # on a long text a large model takes a larger vocabulary than a small one
    large = Fixed(None, {"n_layers": 12, "emb_dim": 768}, {"batch_size": 8})
    assert choose_tokenizer(english(10**8), large, 2000.0) == "bpe:2048"


def test_where_characters_have_several_bytes_tokens_hold_whole_ones():
    chinese = dataclasses.replace(
        english(1_600_000),
        n_characters=1_600_000 * 10 // 28,
        distinct_characters=5172,
        bytes_per_token={"char": 2.8, "bpe:512": 1.76, "bpe:2048": 2.74, "bpe:4096": 3.06},
        vocabularies=(sizes := {"char": 5172, "bpe:512": 512, "bpe:2048": 2048, "bpe:4096": 4096}),
    )
    expected = {
        name: choose_recipe(chinese, CPU, 2, Fixed(name, {}, {})).bits_per_byte
        for name in chinese.vocabularies
    }
    assert expected["char"] < expected["bpe:4096"] < expected["bpe:2048"] < expected["bpe:512"]
    assert choose_recipe(chinese, CPU, 2, NOTHING).tokenizer == "char"
    # so it is with few different characters, for which one as a token gains nothing beyond
    few = dataclasses.replace(chinese, distinct_characters=900, vocabularies=sizes | {"char": 1157})
    split = [choose_recipe(few, CPU, 2, Fixed(n, {}, {})).bits_per_byte for n in sizes]
    for other, bits in zip(sizes, split, strict=True):
        rates = dataclasses.replace(
            few,
            bytes_per_token={other: few.bytes_per_token[other]},
            vocabularies={other: few.vocabularies[other]},
        )
        assert choose_recipe(rates, CPU, 2, Fixed(other, {}, {})).bits_per_byte == bits
    # two bytes a letter are no word
    cyrillic = dataclasses.replace(
        english(1_600_000),
        n_characters=1_600_000 * 10 // 18,
        distinct_characters=140,
        bytes_per_token={"char": 1.8, "bpe:1024": 3.9},
        vocabularies={"char": 140, "bpe:1024": 1024},
    )
    assert choose_recipe(cyrillic, CPU, 2, NOTHING).tokenizer == "bpe:1024"


def test_rates_follow_width_batch_and_steps():
    def rate(width: int, windows: int, minutes: float) -> tuple[float, float, int]:
        model = {"n_layers": 2, "emb_dim": width, "context_length": 64}
        fixed = Fixed("char", model, {"batch_size": windows})
        training = (recipe := choose_recipe(english(10**8), CPU, minutes, fixed)).training
        return training["learning_rate"], training["embedding_rate"], recipe.steps

    matrices, embeddings, steps = rate(192, 64, 2)
    assert matrices == pytest.approx(6e-3 * (450 / steps) ** 0.3, rel=0.02)
    assert embeddings == matrices
    wide, of_wide, steps = rate(768, 64, 2)
    assert wide == pytest.approx(of_wide / 2, rel=0.02)
    assert of_wide == pytest.approx(6e-3 * (450 / steps) ** 0.3, rel=0.02)


def test_the_other_rates_follow_a_learning_rate_that_is_set():
    shape = {"n_layers": 2, "emb_dim": 768, "context_length": 64}
    own, other = (
        choose_recipe(english(), CPU, 2, Fixed("char", shape, {"batch_size": 64} | rate)).training
        for rate in ({}, {"learning_rate": 6e-3})
    )
    factor = 6e-3 / own["learning_rate"]
    assert other["embedding_rate"] == pytest.approx(own["embedding_rate"] * factor, rel=0.05)
    assert other["weight_decay"] == pytest.approx(own["weight_decay"] / factor, rel=0.05)


@pytest.mark.parametrize("kv_heads", [2, 3, 4])
def test_heads_are_a_multiple_of_the_kv_heads_that_are_set(kv_heads):
    for minutes in (0.25, 2, 60):
        fixed = Fixed("char", {"n_kv_heads": kv_heads}, {})
        recipe = choose_recipe(english(), CPU, minutes, fixed)
        check(recipe, english(), CPU, minutes)
        assert recipe.model["n_heads"] % kv_heads == 0


def test_what_is_short_of_memory_gets_a_smaller_model_or_a_warning():
    machine = dataclasses.replace(CPU, flops=8e14, token_s=1e-8, parameter_s=1e-12)
    large = choose_recipe(english(10**9), dataclasses.replace(machine, memory=10**11), 60, NOTHING)
    small = choose_recipe(english(10**9), dataclasses.replace(machine, memory=10**9), 60, NOTHING)
    assert small.memory <= 10**9 < large.memory and small.parameters < large.parameters
    wide = Fixed("char", {"n_layers": 24, "emb_dim": 2048}, {})
    none = choose_recipe(english(), dataclasses.replace(machine, memory=10**8), 60, wide)
    assert "GB of memory" in none.warnings[-1].en
    few = choose_recipe(english(), CPU, 0.25, wide)
    assert few.steps < 50 and "set a smaller MODEL" in few.warnings[0].en


def test_memory_is_near_that_of_the_estimate():
    for minutes, optimizer in ((0.5, "muon"), (2, "muon"), (2, "adamw")):
        recipe = choose_recipe(english(), CPU, minutes, Fixed(None, {}, {"optimizer": optimizer}))
        model = GPTModel(GPTConfig(vocab_size=VOCABULARIES[recipe.tokenizer], **recipe.model))
        n_windows = recipe.training["batch_size"]
        estimate = estimate_memory(
            model,
            n_tokens=recipe.model["context_length"],
            n_windows=n_windows,
            precision=choose_precision("fp32", torch.device("cpu")),
            device=torch.device("cpu"),
            optimizer=optimizer,
            keeps_best=True,
        )
        assert recipe.memory == pytest.approx(estimate.total(n_windows), rel=0.35)
        tokens = 2 * english().n_characters / BYTES_A_TOKEN[recipe.tokenizer]
        for keep in (2, 5):
            disk = recipe.keeping(keep).disk
            assert disk == pytest.approx(most_bytes(model, keep) + tokens, rel=0.05)


def test_choosing_loads_no_torch():
    code = "import sys, planning.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("page", ["recipes.md", "recipes.zh-CN.md"])
def test_the_docs_explain_every_coefficient(page):
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(COEFFICIENTS) <= set(re.findall(r"`(\w+)`", "".join(rows)))


# ------------------------------------------------------------------ odd texts


def words(text: TextFacts, minutes: float = 5) -> str:
    recipe = choose_recipe(text, CPU, minutes, NOTHING)
    check(recipe, text, CPU, minutes)
    return " ".join(warning.en for warning in recipe.warnings)


def test_odd_texts_get_a_sane_recipe_and_the_right_words(without_training):
    sentence = "The quick brown fox jumps over the lazy dog. "
    few = measured("".join(random.Random(1).choices("abcdefgh ", k=500)))
    assert "very little" in words(few) and "MINUTES = " in words(few)
    copies = measured(sentence * 2000)
    assert "repeats what came before" in words(copies) and "word for word" in words(copies)
    lines = measured(*["the same line again\n"] * 20_000)
    assert "repeats" in words(lines) and min(lines.repeated, lines.leaked) > 0.99
    for known in (copies, lines):  # the validation text is in the training text
        recipe = choose_recipe(known, CPU, 5, NOTHING)
        assert recipe.bits_per_byte < 0.1 and rung(recipe) == 0
    draw = random.Random(0)
    noise = measured("".join(draw.choices(sentence, k=60_000)))
    recipe = choose_recipe(noise, CPU, 5, NOTHING)
    assert "tells almost nothing" in words(noise)
    assert recipe.bits_per_byte == pytest.approx(noise.entropies[0], rel=0.02)
    assert rung(recipe) <= 2
    verses = [f"{''.join(draw.choices(sentence, k=40))}\n" for _ in range(400)]
    mixed = "".join(draw.sample(verses, 400))
    other = measured("".join(verses), validation=[(mixed, True)])
    assert other.leaked > 0.9  # all its lines, whose neighbors are others
    dna = measured("".join(draw.choices("ACGT", k=60_000)))
    assert choose_recipe(dna, CPU, 5, NOTHING).bits_per_byte == pytest.approx(2, rel=0.02)
    assert words(english()) == ""
    poems = "".join(chr(0x4E00 + n % 1500) for n in range(20_000))
    # what is enough for the smallest vocabulary, where characters are no words
    for content, gains in ((sentence, False), (sentence * 1000, True), (poems, False)):
        text = measured(content, tokenizer=None)
        assert ("pip install tokenizers." in words(text)) == gains


def test_a_short_validation_text_says_nothing_of_how_hard_the_text_is(without_training):
    train, rest = ENGLISH[:-6000], ENGLISH[-6000:]
    hard = measured(train, validation=[(rest, True)])
    for start in range(0, 6000, 500):
        text = measured(train, validation=[(rest[start : start + 150], True)])
        assert text.bz2_bits == pytest.approx(hard.bz2_bits, rel=0.1)
        recipe = choose_recipe(text, CPU, 5, Fixed("char", {}, {}))
        assert "tells almost nothing" not in words(text)
        assert recipe.model["context_length"] == 64
    for start in range(0, 9000, 300):
        assert "tells almost nothing" not in words(measured(train[start : start + 400]))
    assert measured("abcd").bz2_bits <= 8


def test_time_that_a_text_is_not_worth_is_left():
    recipe = choose_recipe(english(50_000), CPU, 600, NOTHING)
    assert recipe.minutes < 60 and "gains nothing more" in recipe.warnings[0].en
    assert recipe.by_heart_minute is not None
    by_heart = choose_recipe(english(10**9), CPU, 1, NOTHING).by_heart_minute
    assert by_heart is None or by_heart > 1000


# ------------------------------------------------------------------ facts of a text


def test_facts_equal_what_is_computed_directly(without_training):
    draw = random.Random(3)
    text = "".join(draw.choices("ab \u8bcd\u00e9", k=4000))
    content = text.encode()
    found = measured(text, tokenizer=None)
    assert found.train_bytes + found.val_bytes == len(content)
    assert found.val_bytes == pytest.approx(len(content) / 10, abs=3)
    assert (found.n_characters, found.distinct_characters) == (4000, 5)
    train = content[: found.train_bytes]

    def entropy(order: int) -> float:
        grams = [train[i : i + order] for i in range(len(train) - order + 1)]
        shares = [grams.count(gram) / len(grams) for gram in set(grams)]
        return -sum(share * math.log2(share) for share in shares)

    expected = [entropy(1), entropy(2) - entropy(1), entropy(3) - entropy(2)]
    assert found.entropies == pytest.approx(expected, abs=1e-3)
    assert found.bytes_per_token["char"] == pytest.approx(len(content) / 4000, rel=0.1)
    assert found.vocabularies == {"char": 5 + 257, "gpt2": 50257}
    assert found.document_bytes == len(content)
    assert measured(text).fingerprint == found.fingerprint
    assert measured(text[:100], text[100:]).fingerprint != found.fingerprint


def test_repeats_and_leaks_are_seen_at_any_distance():
    draw = random.Random(5)
    part = draw.randbytes(40_000)
    train = part + draw.randbytes(60_000) + part
    repeated, leaked = spans.measure_repeats(train, part[1000:4000] + draw.randbytes(3000))
    assert repeated == pytest.approx(40 / 140, abs=0.01)
    assert leaked == pytest.approx(0.5, abs=0.02)
    assert spans.measure_repeats(train[:60], train) == (0.0, 0.0)


def test_repeats_and_leaks_of_a_text_larger_than_the_sample_are_seen(monkeypatch, without_training):
    monkeypatch.setattr(facts, "SAMPLE_BYTES", 100_000)
    monkeypatch.setattr(facts, "CHUNK", 1000)
    monkeypatch.setattr(spans, "MOST_SPANS", 5000)
    monkeypatch.setattr(spans, "BLOCK", 10_000)
    draw = random.Random(6)
    texts = ["".join(draw.choices("abcdefgh ", k=1000)) for _ in range(400)]
    once = measured("".join(texts))
    assert (once.repeated, once.leaked) == (0, 0)
    pasted = measured("".join(3 * texts))
    assert pasted.repeated == pytest.approx(1.7 / 2.7, abs=0.02)
    assert pasted.leaked == 1
    by_documents = measured(*texts, *texts)
    assert by_documents.repeated == pytest.approx(0.5, abs=0.02)
    assert by_documents.leaked == 0
    apart = measured(*texts, validation=((text, True) for text in [*texts[:20], texts[0].upper()]))
    assert apart.leaked == pytest.approx(20 / 21, abs=0.02)
    for few in ("\0" * 400_000, "One. " * 80_000):
        assert measured(few).repeated == pytest.approx(1, abs=2e-3)
        assert measured(few).leaked == 1


def test_documents_are_as_long_as_the_one_that_the_median_byte_is_in(without_training):
    books, notes = ["book " * 2000] * 4, [f"note {n}" for n in range(200)]
    assert measured(*books, *notes).document_bytes == 10_000
    assert measured(*notes).document_bytes == 8


def test_a_large_text_is_sampled_evenly_and_counted_in_full(monkeypatch, without_training):
    monkeypatch.setattr(facts, "SAMPLE_BYTES", 200_000)
    monkeypatch.setattr(facts, "CHUNK", 1000)
    halves = ["a" * 600_000, "b" * 600_000]
    found = measured("".join(halves))
    assert (found.train_bytes, found.val_bytes, found.n_characters) == (
        pytest.approx(1_080_000, rel=0.02),
        pytest.approx(120_000, rel=0.1),
        1_200_000,
    )
    p = 600 / 1080  # of the training part
    assert found.entropies[0] == pytest.approx(
        -p * math.log2(p) - (1 - p) * math.log2(1 - p), abs=0.02
    )


def test_many_documents_are_divided_by_documents(without_training):
    draw = random.Random(7)
    texts = ["".join(draw.choices("abcdefgh ", k=200)) for _ in range(400)]
    found = measured(*texts)
    assert found.leaked == 0 and 0.05 < found.val_bytes / 80_000 < 0.2
    assert found.document_bytes == 200
    # copies of one document are on one side
    assert measured(*texts, *texts).leaked < 0.02
    alone = measured(*texts, validation=((text, True) for text in texts[:20]))
    assert (alone.train_bytes, alone.val_bytes, alone.leaked) == (80_000, 4000, 1.0)


def test_smaller_vocabularies_are_the_first_tokens_of_a_larger(monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(facts, "BPE_SIZES", (512, 700))
    monkeypatch.setattr(facts, "LEAST_BYTES_A_TOKEN", 20)
    text = (REPOSITORY / "corpus" / "sample-en.txt").read_text("utf-8")[:20_000]
    found = measured(text, tokenizer=None)
    cut = len(text.encode()) - found.val_bytes
    content = text.encode()
    own = train_bpe([content[:cut].decode()], 512)
    assert list(found.bytes_per_token) == ["char", "gpt2", "bpe:512", "bpe:700"]
    n_tokens = len(own.encode(content[cut:].decode()))
    assert found.bytes_per_token["bpe:512"] == pytest.approx(found.val_bytes / n_tokens, rel=1e-3)
    assert found.bytes_per_token["bpe:512"] < found.bytes_per_token["bpe:700"]


def test_facts_are_kept_by_the_files_state(tmp_path, monkeypatch, without_training):
    file = tmp_path / "text.txt"
    file.write_text("Some words of a text. " * 30, encoding="utf-8")
    spec = DataSpec(train=(str(file),))
    first = find_facts(spec, 0.9, tmp_path, tokenizer="char")
    monkeypatch.setattr(facts, "measure_text", None)
    assert find_facts(spec, 0.9, tmp_path, tokenizer="char") == first
    (kept,) = (tmp_path / "facts").iterdir()
    kept.write_text("{}")
    monkeypatch.undo()
    monkeypatch.setattr(facts, "can_train", lambda: False)
    assert find_facts(spec, 0.9, tmp_path, tokenizer="char") == first  # a damaged file is like none
    file.write_text("Other words, and more of them. " * 30, encoding="utf-8")
    assert find_facts(spec, 0.9, tmp_path, tokenizer="char").fingerprint != first.fingerprint


def test_a_text_counts_by_the_documents_that_its_weight_leaves_to_train_on(
    tmp_path, without_training
):
    for name in "ab":
        rows = "".join(json.dumps({"text": f"{name} {n} " * 20}) + "\n" for n in range(50))
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    names = tuple(str(tmp_path / f"{name}.jsonl") for name in "ab")
    once, part, twice = (
        find_facts(DataSpec(names, weights=weights), 0.9, tmp_path, tokenizer="char")
        for weights in ((), (1.0, 0.1), (2.0, 1.0))
    )
    assert part.train_bytes == pytest.approx(0.55 * once.train_bytes, rel=0.01)
    assert part.val_bytes == once.val_bytes and twice.train_bytes == once.train_bytes


# ------------------------------------------------------------------ the machine and the card


def test_the_figures_of_a_machine_are_found_in_its_steps():
    costs = [probe.costs() for probe in speed.CPU_PROBES]
    truth = np.array([1 / 6e11, 15e-6, 1e-9, 0.0])
    found = speed.solve(costs, [float(c @ truth) for c in costs], "cpu")
    assert found["flops"] == pytest.approx(6e11) and found["token_s"] == pytest.approx(15e-6)
    assert found["parameter_s"] == pytest.approx(1e-9) and found["layer_s"] == 0
    costs = [probe.costs() for probe in speed.GPU_PROBES]
    truth = np.array([1 / 2e14, 1e-8, speed.GPU_PARAMETER_S, 3e-4])
    found = speed.solve(costs, [float(c @ truth) for c in costs], "cuda")
    assert found["flops"] == pytest.approx(2e14) and found["layer_s"] == pytest.approx(3e-4)
    # one timing of a small model's step, most of it overhead, isn't all the products'
    found = speed.solve([speed.CPU_PROBES[0].costs()], [10 * 0.0174], "cpu")
    assert found["flops"] == pytest.approx(6e10, rel=0.05)
    assert found["token_s"] == pytest.approx(15e-5, rel=0.05)
    # one timing, or some that contradict each other, still give figures that are not negative
    for seconds in ([0.5], [0.5, 0.1, 0.01], [1e-9, 1e-9, 1e-9]):
        found = speed.solve(costs, seconds, "cuda")
        assert found["flops"] > 0 and all(value >= 0 for value in found.values())


def test_a_steps_operations_are_those_of_the_model():
    model = GPTModel(
        GPTConfig(
            vocab_size=512, context_length=64, emb_dim=64, n_heads=1, n_layers=2,
            architecture="llama",
        )
    )  # fmt: skip
    in_layer, mlp_width = layer_sizes(64, {})
    costs = step_costs(2, 64, 512, 64, 3, in_layer=in_layer, is_adamw=True)
    work, tokens, size, layers = costs
    norms = 6 * tokens * (2 * 2 + 1) * 64
    assert work + norms == tokens * model.flop_per_token()
    assert (tokens, layers) == (192, 2) and size == model.count_parameters() - 5 * 64
    assert mlp_width == model.config.ff_dim


@pytest.mark.parametrize(
    "fields",
    [
        {"ff_dim": 300},
        {"n_heads": 8, "n_kv_heads": 2},
        {"n_heads": 2, "head_dim": 64},
        {"architecture": "gpt2"},
        {"tie_embeddings": False},
    ],
)
def test_the_size_of_a_model_follows_every_field_that_is_set(fields):
    shape = {"n_layers": 3, "emb_dim": 96, "context_length": 64}
    recipe = choose_recipe(english(), CPU, 1, Fixed("char", shape | fields, {}))
    model = GPTModel(GPTConfig(vocab_size=322, **recipe.model))
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    positions = 64 * 96 if recipe.model["architecture"] == "gpt2" else 0
    assert recipe.parameters == matrices - positions


def test_speed_is_measured_once_in_little_time(tmp_path, monkeypatch, capsys):
    device = torch.device("cpu")
    monkeypatch.setattr(speed, "CPU_PROBES", [speed.Probe(1, 64, 64, 16, 2)])
    choices = Choices(tmp_path, device, torch.get_num_threads())
    machine = Machine(device, ALONE, choose_precision("fp32", device), choices=choices)
    state = torch.get_rng_state()
    monkeypatch.setattr(speed, "is_held_up", lambda cpu_s, wall_s: True)
    speed.measure_speed(machine, 10)
    assert "beside other work" in capsys.readouterr().out
    monkeypatch.setattr(speed, "is_held_up", lambda cpu_s, wall_s: False)
    first = speed.measure_speed(machine, 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert "GFLOP/s in training steps" in (printed := capsys.readouterr().out)
    assert "measured in" in printed and "other work" not in printed
    monkeypatch.setattr(speed, "_time_steps", None)
    again = speed.measure_speed(machine, 10)
    assert dataclasses.replace(again, memory=first.memory) == first
    assert "as measured before" in capsys.readouterr().out


@pytest.mark.parametrize(("minutes", "n_timed"), [(0.25, 2), (3, 3)])
def test_all_probes_are_timed_from_three_minutes_on(minutes, n_timed, monkeypatch):
    """On a machine whose steps take 20, 120 and 750 ms, its operations 1 to 19 to 119."""
    clock = SimpleNamespace(now=0.0)
    machine = Machine(torch.device("cpu"), ALONE, choose_precision("fp32", torch.device("cpu")))
    usual = dict(zip(speed.CPU_PROBES, (0.02, 0.12, 0.75), strict=True))

    def take_steps(machine, probe, most_s):
        clock.now += 4 * usual[probe]
        return speed.StepTime(usual[probe], False)

    monkeypatch.setattr(speed, "_time_steps", take_steps)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    times = speed._time_probes(machine, speed.CPU_PROBES, speed.MOST_SHARE * 60 * minutes)
    assert [step.seconds for step in times] == [*usual.values()][:n_timed]


def test_the_card_shows_every_choice_and_how_to_set_it():
    text, minutes = english(50_000), 30
    recipe = choose_recipe(text, CPU, minutes, Fixed(None, {}, {"weight_decay": 0.2}))
    lines = card_lines(recipe, text, CPU, minutes)
    card = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 100
    for shown in (
        "In 30 min", f"{recipe.low:.2f} to {recipe.high:.2f}", recipe.tokenizer, "50 KB",
        f"{recipe.model['n_layers']} layers, {recipe.model['emb_dim']} wide", recipe.runner_up.en,
        f"{recipe.steps:,} steps", f"minute {recipe.by_heart_minute:g}", recipe.warnings[0].en,
        f'"n_layers": {recipe.model["n_layers"]}', "as set: weight_decay",
    ):  # fmt: skip
        assert shown in card
    assert '"weight_decay"' not in card
    tokens = recipe.training["batch_size"] * recipe.model["context_length"]
    assert f"batch {recipe.training['batch_size']} ({tokens:,} tokens)" in card
    halved = Fixed(None, {}, {"gradient_accumulation_steps": 2})
    in_parts = card_lines(choose_recipe(text, CPU, minutes, halved), text, CPU, minutes)
    assert re.search(r"batch \d+ · ", " ".join(in_parts))
    exponent = re.compile(r"\d[eE][+-]?\d")
    assert not exponent.search(card)
    # a large machine's figures, small rates and long times have no exponent either
    fast = MachineFacts("cuda", 8e14, 1e-9, 1e-12, 10**11, 1e-6)
    recipe = choose_recipe(english(10**9), fast, 10_000, Fixed(None, {}, {"optimizer": "adamw"}))
    card = "\n".join(card_lines(recipe, english(999_999), fast, 10_000)).partition("To change")[0]
    assert "800,000 GFLOP/s" in card and "1.0 MB" in card and not exponent.search(card)


def test_the_card_of_conversations_says_nothing_that_holds_for_texts_alone(tmp_path):
    text = dataclasses.replace(english(50_000), is_chat=True)
    card = "\n".join(card_lines(choose_recipe(text, CPU, 3, NOTHING), text, CPU, 3))
    assert "no forecast: the answers alone are scored" in card
    assert not re.search("bz2|Runner-up|By heart|bits a byte on|passes|reads the text", card)
    for row, is_chat in (('{"question": "a?", "answer": "b."}', True), ('{"text": "a"}', False)):
        file = tmp_path / f"{is_chat}.jsonl"
        file.write_text(f"{row}\n" * 9, encoding="utf-8")
        found = find_facts(DataSpec((str(file),)), 0.9, tmp_path, tokenizer="char")
        assert found.is_chat == is_chat


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 KB"),
        (999_499, "999 KB"),
        (999_500, "1.0 MB"),
        (9_949_999, "9.9 MB"),
        (9_950_000, "10 MB"),
        (999_500_000, "1.0 GB"),
    ],
)
def test_sizes_have_the_unit_that_fits(size, shown):
    assert as_bytes(size) == shown


# ------------------------------------------------------------------ the fit


def test_the_fit_finds_the_numbers_behind_some_results():
    results = []
    for run in benchmark.fit_runs(["a", "b"])[::7]:
        recipe = choose_recipe(english(), benchmark.REFERENCE, run.minutes, run.fixed)
        found = {"facts": dataclasses.asdict(english()), "recipe": dataclasses.asdict(recipe)}
        results.append(found | {"steps": recipe.steps, "key": run.key})
    assert benchmark.predicted(results[0], COEFFICIENTS) == pytest.approx(
        results[0]["recipe"]["bits_per_byte"], rel=0.01
    )
    truth = COEFFICIENTS | benchmark.START | {"size": 27.0, "token_share": 0.3}
    results = [found | {"bits": benchmark.predicted(found, truth)} for found in results]

    fitted, entropies = benchmark.fit(results, 12)
    assert {"a", "b"} < entropies.keys()  # and parts of them
    for found in results:
        own = {"entropy": entropies[benchmark.text_of(found)]}
        again = benchmark.predicted(found, COEFFICIENTS | fitted | own)
        assert again == pytest.approx(found["bits"], rel=0.01)
    assert set(benchmark.left_out_errors(results, 1)) == {"a", "b"}


def test_on_code_larger_vocabularies_rank_as_they_came_out():
    path = REPOSITORY / "benchmarks/results/recipe-vocabularies-cpu.json"
    results = json.loads(path.read_bytes())["runs"]
    for text in benchmark.OF_CODE:
        runs = [results[run.key] | {"key": run.key} for run in benchmark.vocabulary_runs(text)]
        measured = np.array([run["bits"] for run in runs])
        expected = np.array([benchmark.predicted(run, COEFFICIENTS) for run in runs])
        assert np.argsort(measured).tolist() == np.argsort(expected).tolist()
        assert expected / expected[0] == pytest.approx(measured / measured[0], rel=0.08)
        facts = TextFacts(**runs[0]["facts"])
        of_a_minute = {
            found["recipe"]["tokenizer"]: found["bits"]
            for key, found in results.items()
            if (json.loads(key)["text"], json.loads(key)["minutes"]) == (text, 1)
        }
        found = of_a_minute or {run["recipe"]["tokenizer"]: run["bits"] for run in runs}
        best = choose_recipe(facts, benchmark.REFERENCE, 1, NOTHING).tokenizer
        assert best == min(found, key=found.__getitem__)
        # a vocabulary that is set has the forecast of one that is chosen
        few = {name: facts.bytes_per_token[name] for name in ("bpe:512", "bpe:2048")}
        sizes = {name: facts.vocabularies[name] for name in few}
        alone = dataclasses.replace(facts, bytes_per_token=few, vocabularies=sizes)
        fixed = Fixed("bpe:2048", {}, {})
        found = [choose_recipe(t, benchmark.REFERENCE, 1, fixed) for t in (facts, alone)]
        assert found[0] == found[1] and found[0].bits_per_byte < 1.9


def test_the_laws_numbers_are_those_of_the_kept_fit():
    results = json.loads((REPOSITORY / "benchmarks/results/recipe-cpu.json").read_bytes())
    assert {*benchmark.START, "interval"} == results["coefficients"].keys()
    for name, value in results["coefficients"].items():
        assert COEFFICIENTS[name] == pytest.approx(value, rel=0.005), name
    errors = []
    for key, run in results["runs"].items():
        if json.loads(key)["first_bytes"] is None:
            own = COEFFICIENTS | {"entropy": results["texts"][json.loads(key)["text"]]}
            errors.append(benchmark.predicted(run | {"key": key}, own) / run["bits"] - 1)
    assert np.median(np.abs(errors)) < 0.015
    # each text's errors by a fit to the other, beside the interval that the other's give
    english, chinese = results["left_out"].values()
    within = [abs(e) <= benchmark.covering(chinese) for e in english]
    within += [abs(e) <= benchmark.covering(english) for e in chinese]
    assert len(within) >= 30 and 0.65 <= np.mean(within) <= 0.95


@pytest.mark.slow
def test_the_benchmark_trains_fits_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    text = (REPOSITORY / "corpus" / "sample-en.txt").read_text("utf-8")[:12_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    options = ["--rehearse", "--texts", str(tmp_path / "text.txt")]
    options += ["--results", str(tmp_path / "results.json")]
    command = [sys.executable, "-m", "benchmarks.recipe", *options]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    results = json.loads((tmp_path / "results.json").read_bytes())
    assert len(results["runs"]) == 1
    assert all(1 < run["bits"] < 9 for run in results["runs"].values())
    assert {*benchmark.START, "interval"} == results["coefficients"].keys()
    monkeypatch.setattr(sys, "argv", ["recipe", *options])
    monkeypatch.setattr(benchmark, "train", None)  # there is nothing left to train
    benchmark.main()
    assert json.loads((tmp_path / "results.json").read_bytes()) == results
