"""Choosing a token, against distributions worked out by hand and sorted in full."""

import math

import pytest
import torch

from engine.errors import NumericsError
from generation import NUCLEUS, _likeliest, choose_next

# chi-square values that chance exceeds once in a thousand times, by degrees of freedom (tables)
CRITICAL = {1: 10.828, 2: 13.816, 3: 16.266, 4: 18.467, 5: 20.515, 6: 22.458, 7: 24.322}
N_DRAWS = 20_000
INF = math.inf

# probabilities 0.1, 0.4, 0.2, 0.3: not in order, so that a mix-up of ranks and tokens shows
PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def draw(logits: torch.Tensor, seed: int = 0, **sampling) -> list[int]:
    """How often each token is drawn in N_DRAWS rows of the same logits; recent is for all rows."""
    if isinstance(sampling.get("recent"), list):
        sampling["recent"] = torch.tensor(sampling["recent"]).expand(N_DRAWS, -1)
    generator = torch.Generator().manual_seed(seed)
    rows = logits.float().expand(N_DRAWS, -1)
    chosen = choose_next(rows, generator=generator, **sampling)
    assert chosen.shape == (N_DRAWS, 1)
    return torch.bincount(chosen.flatten(), minlength=len(logits)).tolist()


def chi_square(counts: list[int], probabilities: list[float]) -> tuple[float, int]:
    """The statistic over tokens that can be drawn, and its degrees of freedom."""
    assert len(counts) == len(probabilities)
    assert math.isclose(sum(probabilities), 1.0)
    statistic, cells = 0.0, 0
    for count, probability in zip(counts, probabilities, strict=True):
        if probability == 0:
            assert count == 0, "a token was drawn that has no probability"
            continue
        expected = probability * N_DRAWS
        statistic += (count - expected) ** 2 / expected
        cells += 1
    return statistic, cells - 1


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (
            {"temperature": 2.0},
            [
                math.sqrt(p) / sum(map(math.sqrt, (0.1, 0.4, 0.2, 0.3)))
                for p in (0.1, 0.4, 0.2, 0.3)
            ],
        ),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 3}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 4}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 1000}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.95}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        # top_k first: of 4/9, 3/9 and 2/9 the first two reach 0.75
        ({"top_k": 3, "top_p": 0.75}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 1000, "top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        # the nucleus is that of the distribution at this temperature: 16/30, 9/30, ...
        ({"temperature": 0.5, "top_p": 0.8}, [0, 16 / 25, 0, 9 / 25]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9}, [0, 16 / 29, 4 / 29, 9 / 29]),
        # the likeliest has 0.4: the others have a quarter, half and three quarters of that
        ({"min_p": 0.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"min_p": 0.24}, [0.1, 0.4, 0.2, 0.3]),
        ({"min_p": 0.26}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"min_p": 0.49}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"min_p": 0.51}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.74}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.26, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.26, "top_k": 1000, "top_p": 1.0}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"min_p": 0.51, "top_p": 0.95}, [0, 4 / 7, 0, 3 / 7]),
        # the shares are those at this temperature: (3 / 4) ** 2 and the root of 1 / 4
        ({"temperature": 0.5, "min_p": 0.55}, [0, 16 / 25, 0, 9 / 25]),
        ({"temperature": 1e9, "min_p": 0.9}, [0.25] * 4),
        # the nucleus is that of all tokens: of those that min_p leaves one alone would reach 0.5
        ({"top_p": 0.5, "min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_worked_out_by_hand(sampling, expected):
    counts = draw(PROBABILITIES.log() + 3.0, **sampling)
    statistic, freedom = chi_square(counts, expected)
    assert statistic < CRITICAL[freedom]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1e-9},
        {"temperature": 1e-300},
        {"top_k": 1},
        {"top_p": 0.0},
        {"top_p": 0.39},
        {"temperature": 0.0, "top_k": 3, "top_p": 0.99},
        {"temperature": 1e9, "top_p": 0.0},
        {"top_k": 1000, "top_p": 0.0},
        {"min_p": 1.0},
        {"min_p": 0.76},
        {"temperature": 0.5, "min_p": 0.57},
        {"temperature": 1e-9, "top_k": 3, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1e6, "min_p": 1.0},
    ],
)
def test_the_likeliest_token_alone_is_left(sampling):
    assert draw(PROBABILITIES.log(), **sampling) == [0, N_DRAWS, 0, 0]


@pytest.mark.parametrize("temperature", [1e9, 1e300])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_an_endless_temperature_makes_all_tokens_alike(temperature, scale):
    counts = draw(scale * PROBABILITIES, temperature=temperature)
    statistic, freedom = chi_square(counts, [0.25] * 4)
    assert statistic < CRITICAL[freedom]


@pytest.mark.parametrize("level", [0.0, -1e30, 1e30])
@pytest.mark.parametrize("temperature", [1e-9, 1.0, 1e9])
def test_equal_logits_are_drawn_alike(level, temperature):
    statistic, freedom = chi_square(
        draw(torch.full((4,), level), temperature=temperature), [0.25] * 4
    )
    assert statistic < CRITICAL[freedom]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [({"top_k": 2}, 2), ({"top_p": 0.5}, 2), ({"top_k": 3, "top_p": 0.6}, 2), ({"top_p": 0.0}, 1)],
)
def test_of_equal_logits_no_more_are_kept_than_asked_for(sampling, kept):
    counts = draw(torch.zeros(4), **sampling)
    assert sorted(count > 0 for count in counts) == [False] * (4 - kept) + [True] * kept


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"top_k": 3},
        {"top_k": 9},
        {"top_p": 1.0},
        {"top_p": 0.999},
        {"top_k": 3, "top_p": 1.0},
        {"min_p": 0.5},
        {"top_k": 3, "top_p": 0.999, "min_p": 0.1},
        {"repetition_penalty": 2.0, "recent": [0, 2, 2]},
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 1e9])
def test_a_logit_of_minus_infinity_is_never_drawn(sampling, temperature):
    logits = torch.tensor([-INF, 0.0, -INF, 0.0])
    statistic, freedom = chi_square(
        draw(logits, temperature=temperature, **sampling), [0, 0.5, 0, 0.5]
    )
    assert statistic < CRITICAL[freedom]
    only_one = torch.tensor([-INF, -INF, 5.0, -INF])
    assert draw(only_one, temperature=temperature, **sampling) == [0, 0, N_DRAWS, 0]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}])
def test_each_row_of_a_batch_is_chosen_by_its_own_logits(sampling):
    logits = torch.full((3, 5), -1000.0)
    for row, token in enumerate((4, 0, 2)):
        logits[row, token] = 0.0
    assert choose_next(logits, **sampling).tolist() == [[4], [0], [2]]


def test_choosing_leaves_the_logits_as_they_were():
    logits = PROBABILITIES.log()[None]
    before = logits.clone()
    choose_next(logits, temperature=0.7, top_k=3, top_p=0.8)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("logits", [[0.0, 1.0, 1.0, 0.5], [-3.0, 2.0, 2.0, 2.0]], ids=str)
def test_of_the_likeliest_tokens_min_p_one_keeps_all_and_no_other(logits):
    likeliest = [logit == max(logits) for logit in logits]
    counts = draw(torch.tensor(logits), min_p=1.0)
    statistic, freedom = chi_square(counts, [is_one / sum(likeliest) for is_one in likeliest])
    assert statistic < CRITICAL[freedom]


# ------------------------------------------------------------------ repetition


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("recent", "penalty", "expected"),
    [
        # logits 1.5, -0.5, 0.0, 0.75: above zero they are divided, below it multiplied
        ([0], 2.0, [0.75, -0.5, 0.0, 0.75]),
        ([1], 2.0, [1.5, -1.0, 0.0, 0.75]),
        ([2], 2.0, [1.5, -0.5, 0.0, 0.75]),
        ([0, 1, 3], 3.0, [0.5, -1.5, 0.0, 0.25]),
        ([3, 3, 3, 3], 3.0, [1.5, -0.5, 0.0, 0.25]),  # once, however often it came
        ([3, 0, 3, 0], 3.0, [0.5, -0.5, 0.0, 0.25]),
        ([0, 1], 0.5, [3.0, -0.25, 0.0, 0.75]),  # below 1 it favours what was there
        ([0, 1, 2, 3], 1.0, [1.5, -0.5, 0.0, 0.75]),
    ],
)
def test_recent_tokens_are_drawn_with_the_penalty_worked_out_by_hand(recent, penalty, expected):
    logits = torch.tensor([1.5, -0.5, 0.0, 0.75])
    counts = draw(logits, recent=recent, repetition_penalty=penalty)
    statistic, freedom = chi_square(counts, softmax(expected))
    assert statistic < CRITICAL[freedom]


def test_each_row_has_recent_tokens_of_its_own():
    logits = torch.tensor([[1.0, 1.1, 1.2]]).repeat(3, 1)
    recent = torch.tensor([[2, 2], [2, 1], [0, 0]])
    chosen = choose_next(logits, temperature=0.0, recent=recent, repetition_penalty=2.0)
    assert chosen.tolist() == [[1], [0], [2]]
    assert torch.equal(logits, torch.tensor([[1.0, 1.1, 1.2]]).repeat(3, 1))


# ------------------------------------------------------------------ all together


def by_hand(logits: list[float], recent: list[int], penalty, temperature, top_k, top_p, min_p):
    """The probabilities that remain after each step in the documented order, in plain Python."""
    for token in set(recent):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
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


def test_penalty_temperature_top_k_top_p_and_min_p_act_in_this_order():
    logits = [3.0, 2.0, 1.6, 1.2, 0.8, -0.2, -1.0]
    # penalty 2 for tokens 0 and 5: 1.5, 2.0, 1.6, 1.2, 0.8, -0.4, -1.0: token 1 is the likeliest
    # temperature 0.5: 3.0, 4.0, 3.2, 2.4, 1.6, -0.8, -2.0
    # top_k 5 drops tokens 5 and 6; of the rest they have .175, .475, .214, .096, .043
    # top_p 0.95: .475 + .214 + .175 + .096 reach it, and token 4 goes
    # min_p 0.25 of .475 is .119: token 3 goes
    expected = by_hand(logits[:], [0, 5, 0], 2.0, 0.5, 5, 0.95, 0.25)
    weights = [math.exp(3.0), math.exp(4.0), math.exp(3.2), 0, 0, 0, 0]
    assert expected == pytest.approx([weight / sum(weights) for weight in weights])
    counts = draw(
        torch.tensor(logits),
        recent=[0, 5, 0],
        repetition_penalty=2.0,
        temperature=0.5,
        top_k=5,
        top_p=0.95,
        min_p=0.25,
    )
    statistic, freedom = chi_square(counts, expected)
    assert statistic < CRITICAL[freedom]


@pytest.mark.parametrize("seed", range(12))
def test_any_combination_gives_what_plain_python_gives(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (1.5 * torch.randn(8, generator=generator)).tolist()

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    chosen = {
        "temperature": pick([0.4, 1.0, 2.5]),
        "top_k": pick([2, 5, 8, 100]),
        "top_p": pick([0.05, 0.6, 0.9, 1.0]),
        "min_p": pick([0.0, 0.05, 0.3]),
    }
    recent, penalty = pick([[0], [1, 6, 1], [2, 3, 4, 5]]), pick([0.7, 1.3, 4.0])
    counts = draw(torch.tensor(logits), recent=recent, repetition_penalty=penalty, **chosen)
    statistic, freedom = chi_square(counts, by_hand(logits, recent, penalty, **chosen))
    assert freedom == 0 or statistic < CRITICAL[freedom]


# ------------------------------------------------------------------ large vocabularies

V = NUCLEUS + 476


def large_logits(spread: float) -> torch.Tensor:
    """(V,) logits without an equal pair, shuffled; the more spread, the fewer tokens matter."""
    order = torch.randperm(V, generator=torch.Generator().manual_seed(5))
    return (-spread * torch.arange(V) / V)[order]


@pytest.mark.parametrize(("spread", "is_sorted_in_full"), [(60.0, False), (0.4, True)])
@pytest.mark.parametrize("top_p", [0.1, 0.8, 0.9, 0.999])
def test_the_likeliest_tokens_are_those_of_a_full_sort(spread, is_sorted_in_full, top_p):
    logits = large_logits(spread).expand(2, -1)
    ordered = logits.sort(dim=-1, descending=True)
    values, tokens = _likeliest(logits, logits.logsumexp(-1, keepdim=True), top_p)
    n = values.shape[1]
    assert n == (V if is_sorted_in_full and top_p > 0.75 else NUCLEUS)
    assert torch.equal(values, ordered.values[:, :n])
    assert torch.equal(tokens, ordered.indices[:, :n])


@pytest.mark.parametrize("spread", [60.0, 0.4])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.85])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(spread, share):
    logits = large_logits(spread)
    probabilities, order = logits.double().softmax(0).sort(descending=True)
    sums = probabilities.cumsum(0)
    n_kept = int((sums < share).sum()) + 1
    top_p = float((sums[n_kept - 2] if n_kept > 1 else 0) + sums[n_kept - 1]) / 2
    # among rows that are peaked and flat in turn, so that both ways are taken on the same tokens
    for others in (60.0, 0.4):
        rows = torch.stack([logits] * 1500 + [large_logits(others)])
        generator = torch.Generator().manual_seed(1)
        drawn = choose_next(rows, top_p=top_p, generator=generator)[:-1, 0]
        places = torch.empty(V, dtype=torch.long).scatter(0, order, torch.arange(V))[drawn]
        assert places.max() < n_kept
        # how many of the last tenth are drawn is binomial: within five deviations
        first = n_kept - max(1, n_kept // 10)
        share_of_last = float(
            (sums[n_kept - 1] - sums[first - 1] if first else sums[0]) / sums[n_kept - 1]
        )
        deviation = math.sqrt(1500 * share_of_last * (1 - share_of_last))
        assert abs(int((places >= first).sum()) - 1500 * share_of_last) <= 5 * deviation


@pytest.mark.parametrize("spread", [60.0, 0.4])
def test_the_border_of_the_nucleus_is_exact_in_a_large_vocabulary(spread):
    # half of the last token's probability below the sum with it: it belongs to the nucleus
    logits = large_logits(spread)
    order = logits.argsort(descending=True)
    probabilities = logits.double().softmax(0)[order]
    sums = probabilities.cumsum(0)
    for n_kept in (1, 2, 3, 10):
        top_p = float(sums[n_kept - 1] - probabilities[n_kept - 1] / 2)
        rows = logits.expand(500, -1)
        drawn = choose_next(rows, top_p=top_p, generator=torch.Generator().manual_seed(2))
        assert set(drawn.flatten().tolist()) == set(order[:n_kept].tolist())


@pytest.mark.parametrize("top_k", [V - 1, V, V + 1, 10**9])
def test_top_k_around_the_size_of_a_large_vocabulary(top_k):
    logits = large_logits(1.0).expand(50, -1)
    drawn = choose_next(logits, top_k=top_k, generator=torch.Generator().manual_seed(0))
    assert drawn.min() >= 0 and drawn.max() < V
    if top_k >= V:
        plain = choose_next(logits, generator=torch.Generator().manual_seed(0))
        assert torch.equal(drawn, plain)


# ------------------------------------------------------------------ numbers gone bad


@pytest.mark.parametrize(
    "row",
    [[0.0, math.nan, 1.0], [math.nan] * 3, [-INF] * 3, [INF, 0.0, 0.0], [INF, -INF, math.nan]],
    ids=str,
)
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.0}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}],
)
def test_logits_without_a_likeliest_token_are_an_error(row, sampling):
    for rows in ([row], [[0.0, 1.0, 2.0], row]):
        with pytest.raises(NumericsError, match="not finite"):
            choose_next(torch.tensor(rows), **sampling)


def test_a_penalty_that_overflows_is_an_error():
    logits = torch.tensor([[1e38, 0.0]])
    with pytest.raises(NumericsError, match="not finite"):
        choose_next(logits, recent=torch.tensor([[0]]), repetition_penalty=0.01)
