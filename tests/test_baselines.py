"""The baselines against slow, plain computations of what they claim."""

import bz2
import collections
import lzma
import math
import time
from pathlib import Path

import numpy as np
import pytest

from insight import baselines
from insight.baselines import find_baselines, find_discounts, kneser_ney_nats, xz_bytes_behind
from insight.run_text import count_bytes, sample_tokens, to_bytes
from tests.texts import CHINESE, ENGLISH, train_in_the_library
from text.tokenizer import CharTokenizer, GPT2Tokenizer, read_tokenizer


def grams(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def plain_kneser_ney(train: list[int], val: list[int], vocab_size: int, order: int) -> list[float]:
    """Interpolated modified Kneser-Ney as Chen and Goodman write it down, with dictionaries."""
    counts = {order: collections.Counter(grams(train, order))}
    for n in range(order - 1, 0, -1):  # how many tokens precede an n-gram
        counts[n] = collections.Counter(gram[1:] for gram in set(grams(train, n + 1)))

    def discount(n: int, count: int) -> float:
        having = collections.Counter(counts[n].values())
        n1, n2, n3, n4 = (having[k] for k in (1, 2, 3, 4))
        found = [0.0, 0.5, 1.0, 1.5]
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            estimated = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            found = estimated if all(0 <= d <= k for k, d in enumerate(estimated)) else found
        return found[min(count, 3)]

    discounts = {n: [discount(n, count) for count in range(4)] for n in counts}
    after = {n: collections.defaultdict(list) for n in counts}
    for n, of_n in counts.items():
        for gram, count in of_n.items():
            after[n][gram[:-1]].append(count)

    def probability(context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        shorter = probability(context[1:], token) if context else 1 / vocab_size
        seen = after[n][context]
        if not seen:
            return shorter
        count = counts[n][*context, token]
        held = sum(discounts[n][min(c, 3)] for c in seen)
        return (max(0, count - discounts[n][min(count, 3)]) + held * shorter) / sum(seen)

    return [
        -math.log(probability(tuple(val[max(0, at - order + 1) : at]), val[at]))
        for at in range(1, len(val))
    ]


@pytest.mark.parametrize("kind", [CharTokenizer, GPT2Tokenizer])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_the_ngram_is_the_published_method_computed_with_dictionaries(kind, order):
    tokenizer = CharTokenizer(ENGLISH) if kind is CharTokenizer else GPT2Tokenizer()
    tokens = tokenizer.encode(ENGLISH[:6000])
    train, val = tokens[: len(tokens) * 3 // 4], tokens[len(tokens) * 3 // 4 :]
    found = kneser_ney_nats(np.array(train), np.array(val), tokenizer.vocab_size, order)
    expected = plain_kneser_ney(train, val, tokenizer.vocab_size, order)
    assert found == pytest.approx(expected, rel=1e-9)
    assert find_discounts(np.array([1, 1, 1, 2, 2, 3, 4, 0, 0, 7])).tolist() == pytest.approx(
        [0, 1 - 2 * (3 / 7) * 2 / 3, 2 - 3 * (3 / 7) / 2, 3 - 4 * (3 / 7)]
    )


def test_the_probabilities_of_the_ngram_sum_to_one():
    tokens = np.random.default_rng(0).integers(0, 7, 400)
    for at in range(1, 12):
        vals = [np.array([*tokens[100 : 100 + at], last]) for last in range(7)]
        last_nats = [kneser_ney_nats(tokens, val, 7)[-1] for val in vals]
        assert np.exp(-np.array(last_nats)).sum() == pytest.approx(1.0)


def test_keys_that_do_not_fit_beside_their_places_are_numbered_alike():
    keys = np.random.default_rng(0).integers(0, 50, 300)
    for limit in (50, 2**62):  # the second leaves no bits for a place
        numbers, found, places = baselines._number(keys, limit)
        assert found.tolist() == sorted(set(keys.tolist()))
        assert found[numbers].tolist() == keys.tolist()
        assert keys[places].tolist() == found.tolist()


def test_every_baseline_is_in_bits_a_byte_of_the_validation_text():
    tokenizer = CharTokenizer(ENGLISH[:3000])
    tokens = np.array(tokenizer.encode(ENGLISH[:6000]), dtype=np.uint16)
    tokens[2500] = tokens[4200] = tokenizer.end_of_text_id  # which has no byte
    train, val = tokens[:4000], tokens[4000:]
    text = to_bytes(val, tokenizer)
    assert text.count(b"\0") == 1
    n_bytes, scored = len(text) - 1, len(text[1:]) - 1
    found = find_baselines(train, val, tokenizer, limit_s=math.inf)
    n_scored, size = len(val) - 1, found.bytes_per_token
    assert size == pytest.approx(scored / n_scored)
    assert found.uniform == pytest.approx(math.log2(tokenizer.vocab_size) * n_scored / scored)
    counts = collections.Counter(train.tolist())
    of_one = (math.log2((counts[t] + 1) / (4000 + tokenizer.vocab_size)) for t in val[1:].tolist())
    assert found.unigram == pytest.approx(-sum(of_one) / scored)
    nats = kneser_ney_nats(train, val, tokenizer.vocab_size)
    assert found.ngram == pytest.approx(nats.sum() / math.log(2) / scored)
    assert found.bz2 == pytest.approx(8 * len(bz2.compress(text)) / n_bytes)
    assert found.uniform > found.unigram > found.ngram
    assert found.in_nats()["uniform"] == pytest.approx(math.log(tokenizer.vocab_size))
    assert (found.ngram_share, found.xz_share) == (1, 1)


def test_xz_behind_the_training_text_finds_what_is_copied_from_far_away():
    noise = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
    assert xz_bytes_behind(noise, noise[1000:11_000]) < 1000  # of a text 90 KB before it
    assert xz_bytes_behind(noise, noise[::-1][:10_000]) > 9_900
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    alone = len(lzma.compress(ENGLISH.encode(), lzma.FORMAT_RAW, filters=filters))
    assert xz_bytes_behind(b"", ENGLISH.encode()) == pytest.approx(alone, abs=3)


def test_a_time_limit_makes_the_samples_smaller(monkeypatch):
    monkeypatch.setattr(baselines, "PROBE", 256)
    now, sizes = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def measure(size: int) -> float:
        now[0] += size  # a second a token
        sizes.append(size)
        return float(size)

    assert baselines._largest(measure, 10_000, 0.0) == (256.0, 256)
    assert baselines._largest(measure, 100, 0.0) == (100.0, 100)
    # the next takes MARGIN of the 9,744 seconds that are left, and then there is too little
    assert baselines._largest(measure, 10_000, 10_000.0) == (6820.0, 6820)
    assert baselines._largest(measure, 10_000, math.inf) == (10_000.0, 10_000)
    assert sizes == [256, 100, 256, 6820, 10_000]
    tokens = np.arange(1000)
    part = sample_tokens(tokens, 128)
    assert len(part) == 128 and part[0] == 0 and part[-1] == 999
    assert (np.diff(part) == 1).sum() == 64


def test_tokens_become_the_bytes_of_their_text_whatever_the_tokenizer():
    text = ENGLISH[:300] + CHINESE[:200]
    library = train_in_the_library(text, 300, "<|endoftext|>")
    foreign = read_tokenizer(library.to_str().encode(), Path("library.json"))
    for tokenizer in (CharTokenizer("etaoin 春"), GPT2Tokenizer(), foreign):
        ids = np.array(tokenizer.encode(text))
        both = np.array([*ids, tokenizer.end_of_text_id, *ids])
        content = text.encode() + b"\0" + text.encode()
        assert to_bytes(both, tokenizer) == content
        counts = count_bytes(both, tokenizer)
        assert counts.sum() == len(content)
        assert counts[: len(ids)].sum() == len(text.encode())
