"""Choosing a token, against distributions worked out by hand and sorted in full."""

import itertools
import math
import random

import pytest
import torch

from engine.errors import NumericsError
from generation import NUCLEUS, choose_next

# chi-square values that chance exceeds once in a thousand times, by degrees of freedom (tables)
CRITICAL = {1: 10.828, 2: 13.816, 3: 16.266, 4: 18.467, 5: 20.515, 6: 22.458, 7: 24.322}
N_DRAWS = 20_000
INF = math.inf

# probabilities 0.1, 0.4, 0.2, 0.3: not in order, so that a mix-up of ranks and tokens shows
PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])
ALL, THREE, TWO = [0.1, 0.4, 0.2, 0.3], [0, 4 / 9, 2 / 9, 3 / 9], [0, 4 / 7, 0, 3 / 7]
ONE, EQUAL = [0, 1, 0, 0], [0.25] * 4


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(logits: torch.Tensor, **sampling) -> list[int]:
    """How often each token is drawn in N_DRAWS rows of the same logits; recent is for all rows."""
    if "recent" in sampling:
        sampling["recent"] = torch.tensor(sampling["recent"]).expand(N_DRAWS, -1)
    chosen = choose_next(logits.float().expand(N_DRAWS, -1), generator=seeded(0), **sampling)
    assert chosen.shape == (N_DRAWS, 1)
    return torch.bincount(chosen.flatten(), minlength=len(logits)).tolist()


def assert_drawn(logits: torch.Tensor, probabilities: list[float], **sampling) -> None:
    """Tokens are drawn as often as probabilities say, and none that has none, by chi-square."""
    counts = draw(logits, **sampling)
    assert math.isclose(sum(probabilities), 1.0)
    possible = [(n, p * N_DRAWS) for n, p in zip(counts, probabilities, strict=True) if p > 0]
    assert sum(count for count, _ in possible) == N_DRAWS, "a token of no probability was drawn"
    if len(possible) > 1:
        statistic = sum((count - expected) ** 2 / expected for count, expected in possible)
        assert statistic < CRITICAL[len(possible) - 1]


@pytest.mark.parametrize(
    ("expected", "samplings"),
    [
        (ALL, [{}, {"top_k": 4}, {"top_k": 1000}, {"top_p": 0.95}, {"top_p": 1.0}]),
        (THREE, [{"top_k": 3}, {"top_p": 0.75}, {"top_k": 1000, "top_p": 0.75}]),
        # top_k first: of 4/9, 3/9 and 2/9 the first two reach 0.75
        (TWO, [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.75}]),
        (ONE, [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.39}, {"top_k": 1000, "top_p": 0.0}]),
        # the likeliest has 0.4: the others have a quarter, half and three quarters of that
        (ALL, [{"min_p": 0.0}, {"min_p": 0.24}]),
        (THREE, [{"min_p": 0.26}, {"min_p": 0.49}, {"min_p": 0.26, "top_k": 1000, "top_p": 1.0}]),
        (TWO, [{"min_p": 0.51}, {"min_p": 0.74}, {"min_p": 0.26, "top_k": 2}]),
        # the nucleus is that of all tokens: of those that min_p leaves one alone would reach 0.5
        (TWO, [{"min_p": 0.51, "top_p": 0.95}, {"top_p": 0.5, "min_p": 0.6}]),
        (ONE, [{"min_p": 0.76}, {"min_p": 1.0}]),
        ([1 / 30, 16 / 30, 4 / 30, 9 / 30], [{"temperature": 0.5}]),
        ([math.sqrt(p) / sum(map(math.sqrt, ALL)) for p in ALL], [{"temperature": 2.0}]),
        (ONE, [{"temperature": 0.0}, {"temperature": 1e-9}, {"temperature": 1e-300}]),
        (ONE, [{"temperature": 0.0, "top_k": 3, "top_p": 0.99}]),
        (ONE, [{"temperature": 1e-9, "top_k": 3, "top_p": 1.0, "min_p": 0.0}]),
        (ONE, [{"temperature": 1e9, "top_p": 0.0}, {"temperature": 1e6, "min_p": 1.0}]),
        (EQUAL, [{"temperature": 1e9}, {"temperature": 1e300}, {"temperature": 1e9, "min_p": 0.9}]),
        # the nucleus is that of the distribution at this temperature: 16/30, 9/30, ...
        ([0, 16 / 25, 0, 9 / 25], [{"temperature": 0.5, "top_p": 0.8}]),
        ([0, 16 / 29, 4 / 29, 9 / 29], [{"temperature": 0.5, "top_k": 3, "top_p": 0.9}]),
        # the shares too are those at this temperature: (3 / 4) ** 2 and the root of 1 / 4
        ([0, 16 / 25, 0, 9 / 25], [{"temperature": 0.5, "min_p": 0.55}]),
        (ONE, [{"temperature": 0.5, "min_p": 0.57}]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_worked_out_by_hand(expected, samplings):
    for sampling in samplings:
        assert_drawn(PROBABILITIES.log() + 3.0, expected, **sampling)


def test_equal_logits_are_drawn_alike_and_no_more_of_them_than_asked_for():
    for level in (0.0, -1e30, 1e30):
        for temperature in (1e-9, 1.0, 1e9):
            assert_drawn(torch.full((4,), level), EQUAL, temperature=temperature)
    assert_drawn(1e4 * PROBABILITIES, EQUAL, temperature=1e9)
    for sampling in ({"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.6}):
        assert sum(count > 0 for count in draw(torch.zeros(4), **sampling)) == 2
    # of the likeliest tokens min_p 1 keeps all, and no other
    assert_drawn(torch.tensor([0.0, 1.0, 1.0, 0.5]), [0, 0.5, 0.5, 0], min_p=1.0)
    assert_drawn(torch.tensor([-3.0, 2.0, 2.0, 2.0]), [0, 1 / 3, 1 / 3, 1 / 3], min_p=1.0)


def test_a_logit_of_minus_infinity_is_never_drawn():
    samplings = [{}, {"top_k": 3}, {"top_k": 9}, {"top_p": 1.0}, {"top_p": 0.999}, {"min_p": 0.5}]
    samplings += [{"top_k": 3, "top_p": 1.0}, {"top_k": 3, "top_p": 0.999, "min_p": 0.1}]
    samplings += [{"repetition_penalty": 2.0, "recent": [0, 2, 2]}]
    for sampling, temperature in itertools.product(samplings, (1.0, 1e9)):
        options = sampling | {"temperature": temperature}
        assert_drawn(torch.tensor([-INF, 0.0, -INF, 0.0]), [0, 0.5, 0, 0.5], **options)
        assert_drawn(torch.tensor([-INF, -INF, 5.0, -INF]), [0, 0, 1, 0], **options)


def test_each_row_of_a_batch_is_chosen_by_its_own_logits_and_recent_tokens():
    logits = torch.full((3, 5), -1000.0)
    for row, token in enumerate((4, 0, 2)):
        logits[row, token] = 0.0
    for sampling in ({"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}):
        assert choose_next(logits, **sampling).tolist() == [[4], [0], [2]]
    logits = torch.tensor([[1.0, 1.1, 1.2]]).repeat(3, 1)
    before, recent = logits.clone(), torch.tensor([[2, 2], [2, 1], [0, 0]])
    chosen = choose_next(logits, temperature=0.0, recent=recent, repetition_penalty=2.0)
    assert chosen.tolist() == [[1], [0], [2]]
    choose_next(logits, temperature=0.7, top_k=3, top_p=0.8, min_p=0.1)
    assert torch.equal(logits, before)  # they are left as they were


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("frequency", "presence", "expected"),
    [
        (0.0, 0.0, [1.5, -0.5, 0.0, 0.75]),
        (0.5, 0.0, [0.0, -0.5, -0.5, 0.75]),
        (0.0, 0.5, [1.0, -0.5, -0.5, 0.75]),  # once, however often it came
        (0.25, 1.0, [-0.25, -0.5, -1.25, 0.75]),
        (-0.5, -0.25, [3.25, -0.5, 0.75, 0.75]),
    ],
)
def test_counted_tokens_are_drawn_with_the_penalties_worked_out_by_hand(
    frequency, presence, expected
):
    logits, counts = torch.tensor([1.5, -0.5, 0.0, 0.75]), torch.tensor([3.0, 0.0, 1.0, 0.0])
    options = {"frequency_penalty": frequency, "presence_penalty": presence}
    assert_drawn(logits, softmax(expected), counts=counts.expand(N_DRAWS, -1), **options)


def by_hand(
    logits: list[float], recent: list[int], repetition_penalty, temperature, top_k, top_p, min_p
) -> list[float]:
    """The probabilities that remain after each step in the documented order, in plain Python."""
    for token in set(recent):
        penalty = repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
        logits[token] *= penalty
    probabilities = softmax([logit / temperature for logit in logits])
    ranked = sorted(range(len(logits)), key=lambda token: -probabilities[token])[:top_k]
    mass = sum(probabilities[token] for token in ranked)
    nucleus, reached = [], 0.0
    for token in ranked:
        if nucleus and reached >= top_p:
            break
        nucleus.append(token)
        reached += probabilities[token] / mass
    kept = [t for t in nucleus if probabilities[t] >= min_p * probabilities[nucleus[0]]]
    mass = sum(probabilities[token] for token in kept)
    return [probabilities[t] / mass if t in kept else 0.0 for t in range(len(logits))]


@pytest.mark.parametrize("seed", range(12))
def test_any_combination_gives_what_plain_python_gives(seed):
    chance = random.Random(seed)
    logits = [chance.gauss(0, 1.5) for _ in range(8)]
    options = {
        "temperature": chance.choice([0.4, 1.0, 2.5]),
        "top_k": chance.choice([2, 5, 8, 100]),
        "top_p": chance.choice([0.05, 0.6, 0.9, 1.0]),
        "min_p": chance.choice([0.0, 0.05, 0.3]),
        "recent": chance.choice([[0], [1, 6, 1], [2, 3, 4, 5]]),
        "repetition_penalty": chance.choice([0.7, 1.0, 1.3, 4.0]),
    }
    assert_drawn(torch.tensor(logits), by_hand(logits, **options), **options)


V = NUCLEUS + 476


def large_logits(spread: float) -> torch.Tensor:
    """(V,) logits without an equal pair, shuffled; the more spread, the fewer tokens matter."""
    return (-spread * torch.arange(V) / V)[torch.randperm(V, generator=seeded(5))]


@pytest.mark.parametrize("spread", [60.0, 0.4])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(spread):
    logits = large_logits(spread)
    probabilities, order = logits.double().softmax(0).sort(descending=True)
    sums = probabilities.cumsum(0)
    place_of = torch.empty(V, dtype=torch.long).scatter(0, order, torch.arange(V))
    # among rows that are peaked and flat in turn, so that both ways are taken on the same tokens
    for share, others in itertools.product((0.02, 0.85), (60.0, 0.4)):
        n_kept = int((sums < share).sum()) + 1
        top_p = float(sums[n_kept - 1] - probabilities[n_kept - 1] / 2)
        rows = torch.stack([logits] * 600 + [large_logits(others)])
        places = place_of[choose_next(rows, top_p=top_p, generator=seeded(1))[:-1, 0]]
        assert places.max() < n_kept
        # how many of the last tenth are drawn is binomial: within five deviations
        first = n_kept - max(1, n_kept // 10)
        of_last = float(probabilities[first:n_kept].sum() / sums[n_kept - 1])
        deviation = math.sqrt(600 * of_last * (1 - of_last))
        assert abs(int((places >= first).sum()) - 600 * of_last) <= 5 * deviation
    # with half of the last token's probability: it belongs to the nucleus
    for n_kept in (1, 2, 10):
        top_p = float(sums[n_kept - 1] - probabilities[n_kept - 1] / 2)
        drawn = choose_next(logits.expand(500, -1), top_p=top_p, generator=seeded(2))
        assert set(drawn.flatten().tolist()) == set(order[:n_kept].tolist())


def test_top_k_around_the_size_of_a_large_vocabulary():
    logits = large_logits(1.0).expand(50, -1)
    plain = choose_next(logits, generator=seeded(0))
    for top_k in (V - 1, V, V + 1, 10**9):
        drawn = choose_next(logits, top_k=top_k, generator=seeded(0))
        assert drawn.min() >= 0 and drawn.max() < V
        assert top_k < V or torch.equal(drawn, plain)


@pytest.mark.parametrize(
    "row",
    [[0.0, math.nan, 1.0], [math.nan] * 3, [-INF] * 3, [INF, 0.0, 0.0], [INF, -INF, math.nan]],
    ids=str,
)
def test_logits_without_a_likeliest_token_are_an_error(row):
    filtered = ({"temperature": 0.0}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0})
    for sampling in ({}, *filtered):
        for rows in ([row], [[0.0, 1.0, 2.0], row]):
            with pytest.raises(NumericsError, match="not finite"):
                choose_next(torch.tensor(rows), **sampling)
    overflowing = {"recent": torch.tensor([[0]]), "repetition_penalty": 0.01}
    with pytest.raises(NumericsError, match="not finite"):
        choose_next(torch.tensor([[1e38, 0.0]]), **overflowing)
