"""What a loss and a pace mean, against figures worked out by hand."""

import math
import random

import pytest

from engine.metrics import (
    TokenSize,
    as_duration,
    bits_per_byte,
    bits_per_character,
    perplexity,
    seconds_left,
)


def test_perplexity_is_the_number_of_equally_likely_tokens():
    losses = [0.0, math.log(50257), 699.0, 700.0, math.inf, math.nan]
    expected = [1.0, 50257, math.exp(699), math.inf, math.inf, math.nan]
    assert [perplexity(loss) for loss in losses] == pytest.approx(expected, nan_ok=True)


def test_a_model_that_knows_nothing_but_the_alphabet_needs_its_bits():
    """One of 16 letters by chance is 4 bits, whatever it is cut into."""
    for letters, n_bytes in ((1, 1), (2, 2), (1, 3), (3, 9)):
        loss = math.log(16**letters)  # nats of a token of so many letters
        size = TokenSize(characters=letters, bytes=n_bytes)
        assert bits_per_character(loss, size) == pytest.approx(4)
        assert bits_per_byte(loss, size) == pytest.approx(4 * letters / n_bytes)


def test_bits_of_a_text_do_not_depend_on_how_it_is_cut():
    """A unigram model of letters, and one of pairs that multiplies their chances, say the same."""
    chooser = random.Random(3)
    text = "".join(chooser.choices("abc春", weights=[5, 3, 1, 1], k=2000))
    chance = {letter: text.count(letter) / len(text) for letter in set(text)}
    n_bytes = len(text.encode("utf-8"))
    found = []
    for width in (1, 2, 5):
        tokens = [text[i : i + width] for i in range(0, len(text), width)]
        loss = sum(-math.log(chance[c]) for token in tokens for c in token) / len(tokens)
        size = TokenSize(len(text) / len(tokens), n_bytes / len(tokens))
        found.append((bits_per_character(loss, size), bits_per_byte(loss, size)))
    assert found == [pytest.approx(found[0])] * 3
    entropy = -sum(p * math.log2(p) for p in chance.values())
    assert found[0][0] == pytest.approx(entropy)
    assert found[0][1] == pytest.approx(entropy * len(text) / n_bytes)


def test_a_duration_is_shown_as_people_read_it():
    shown = {-1.0: "0m 0.0s", 0.0: "0m 0.0s", 15.8: "0m 15.8s", 59.94: "0m 59.9s", 59.96: "1m 0.0s"}
    shown |= {723.0: "12m 3.0s", 3599.94: "59m 59.9s", 3599.96: "1h 0m", 12_340.0: "3h 25m"}
    shown |= {360_000.0: "100h 0m"}
    assert {seconds: as_duration(seconds) for seconds in shown} == shown


def test_the_time_left_is_that_of_the_steps_left_at_the_mean_pace():
    runs = [(0, 10, 5.0), (1, 10, 5.0), (4, 10, 2.0), (10, 10, 7.0)]
    assert [seconds_left(*run) for run in runs] == [None, 45.0, 3.0, 0.0]
