"""What a loss and a pace mean, against figures worked out by hand."""

import math
import random

import pytest

from engine import metrics
from engine.metrics import TokenSize, bits_per_byte, bits_per_character


def test_perplexity_is_the_number_of_equally_likely_tokens():
    losses = [0.0, math.log(50257), 699.0, 700.0, math.inf, math.nan]
    expected = [1.0, 50257, math.exp(699), math.inf, math.inf, math.nan]
    assert [metrics.perplexity(x) for x in losses] == pytest.approx(expected, nan_ok=True)


def test_bits_of_a_text_do_not_depend_on_how_it_is_cut():
    """A unigram model of letters, and one of pairs that multiplies their chances, say the same."""
    text = "".join(random.Random(3).choices("abc春", weights=[5, 3, 1, 1], k=2000))
    chance = {letter: text.count(letter) / len(text) for letter in set(text)}
    entropy = -sum(p * math.log2(p) for p in chance.values())
    n_bytes = len(text.encode("utf-8"))
    for width in (1, 2, 5):
        tokens = [text[i : i + width] for i in range(0, len(text), width)]
        loss = sum(-math.log(chance[c]) for token in tokens for c in token) / len(tokens)
        size = TokenSize(len(text) / len(tokens), n_bytes / len(tokens))
        assert bits_per_character(loss, size) == pytest.approx(entropy)
        assert bits_per_byte(loss, size) == pytest.approx(entropy * len(text) / n_bytes)


def test_a_duration_is_shown_as_people_read_it():
    shown = {-1.0: "0m 0.0s", 0.0: "0m 0.0s", 15.8: "0m 15.8s", 59.94: "0m 59.9s", 59.96: "1m 0.0s"}
    shown |= {723.0: "12m 3.0s", 3599.94: "59m 59.9s", 3599.96: "1h 0m", 12_340.0: "3h 25m"}
    shown |= {360_000.0: "100h 0m"}
    assert {seconds: metrics.as_duration(seconds) for seconds in shown} == shown


def test_the_time_left_is_that_of_the_steps_left_at_the_mean_pace():
    runs = [(0, 10, 5.0), (1, 10, 5.0), (4, 10, 2.0), (10, 10, 7.0)]
    assert [metrics.seconds_left(*run) for run in runs] == [None, 45.0, 3.0, 0.0]
