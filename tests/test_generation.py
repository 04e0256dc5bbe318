"""Generation against full forward passes, and sampling against distributions worked out by hand."""

import math

import pytest
import torch

from engine.errors import SettingsError
from generation import (
    choose_next,
    evaluating,
    generate,
    text_to_token_ids,
    token_ids_to_text,
)
from model import Dropout, GPTConfig, GPTModel
from text.tokenizer import load_tokenizer

# chi-square values that chance exceeds once in a thousand times, by degrees of freedom (tables)
CRITICAL = {1: 10.828, 2: 13.816, 3: 16.266}
N_DRAWS = 20_000
INF = math.inf


def tiny_model(context_length: int = 8, **changes) -> GPTModel:
    """A model with weights so large that its choices depend on all of its window."""
    torch.manual_seed(0)
    shape = {"emb_dim": 16, "n_heads": 2, "n_layers": 2, "tie_embeddings": False} | changes
    model = GPTModel(GPTConfig(vocab_size=23, context_length=context_length, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


def prompt(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(23, (rows, length), generator=torch.Generator().manual_seed(length))


# ------------------------------------------------------------------ greedy, and the window


@pytest.mark.parametrize(
    "changes", [{}, {"architecture": "llama", "n_kv_heads": 1, "qk_norm": True}], ids=str
)
@torch.no_grad()
def test_greedy_takes_the_argmax_of_a_full_forward_at_each_step(changes):
    model = tiny_model(context_length=32, **changes)
    ids = prompt(3)
    found = generate(model, ids, max_new_tokens=29, temperature=0.0)
    for _ in range(29):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert found.tolist() == ids.tolist()
    assert len(set(found[0, 3:].tolist())) > 3  # not one token over and over


@pytest.mark.parametrize("context_length", [1, 2, 3, 8])
@pytest.mark.parametrize("prompt_length", [1, 7, 8, 9, 30])
@torch.no_grad()
def test_past_the_context_the_newest_half_goes_on(context_length, prompt_length):
    model = tiny_model(context_length)
    ids = prompt(prompt_length)
    window, expected = ids[0].tolist(), ids[0].tolist()
    for _ in range(25):
        if len(window) > context_length:
            window = window[-(context_length // 2) :] if context_length > 1 else window[-1:]
        chosen = model(torch.tensor([window]))[0, -1].argmax().item()
        window.append(chosen)
        expected.append(chosen)
    found = generate(model, ids, max_new_tokens=25, temperature=0.0)
    assert found[0].tolist() == expected


def test_the_model_sees_a_window_that_fills_up_and_is_halved(monkeypatch):
    model = tiny_model(context_length=8)
    lengths, hidden = [], model.hidden

    def spy(ids, newest):
        lengths.append(ids.shape[1])
        return hidden(ids, newest)

    monkeypatch.setattr(model, "hidden", spy)
    generate(model, prompt(7), max_new_tokens=9, temperature=0.0)
    assert lengths == [7, 1, 4, 1, 1, 1, 1, 4, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_stays_in_front_of_what_is_added(temperature):
    ids = prompt(11)
    found = generate(tiny_model(), ids, max_new_tokens=6, temperature=temperature)
    assert found.shape == (1, 17)
    assert torch.equal(found[:, :11], ids)
    assert torch.equal(generate(tiny_model(), ids, max_new_tokens=0), ids)


def test_prompts_of_a_batch_are_continued_as_if_alone():
    model = tiny_model()
    ids = prompt(5, rows=4)
    together = generate(model, ids, max_new_tokens=12, temperature=0.0)
    alone = [generate(model, row[None], max_new_tokens=12, temperature=0.0) for row in ids]
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row) for row in together[:, 5:].tolist()}) > 1


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 9, "top_p": 0.9}])
def test_the_same_generator_seed_gives_the_same_text(sampling):
    model = tiny_model()

    def text(seed):
        generator = torch.Generator().manual_seed(seed)
        ids = generate(model, prompt(4), max_new_tokens=40, generator=generator, **sampling)
        return ids.tolist()

    state = torch.get_rng_state()
    assert text(1) == text(1)
    assert text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training):
    model = tiny_model().train(training)
    generate(model, prompt(4), max_new_tokens=2)
    assert model.training == training
    with pytest.raises(IndexError):
        generate(model, torch.tensor([[1_000_000]]), max_new_tokens=2)
    assert model.training == training
    assert model.blocks[0].dropout.training == training


def test_evaluating_acts_inside_and_restores_on_an_error():
    model = tiny_model().train()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training


def test_generation_has_no_dropout_and_no_gradients():
    dropped = tiny_model()
    for module in dropped.modules():
        if isinstance(module, Dropout):
            module.rate = 0.5
    expected = generate(tiny_model(), prompt(4), max_new_tokens=20, temperature=0.0)
    found = generate(dropped.train(), prompt(4), max_new_tokens=20, temperature=0.0)
    assert torch.equal(found, expected)
    graphs = []
    dropped.head.register_forward_hook(lambda *call: graphs.append(call[-1].requires_grad))
    generate(dropped, prompt(4), max_new_tokens=1)
    assert graphs == [False]


# ------------------------------------------------------------------ choosing a token

# probabilities 0.1, 0.4, 0.2, 0.3: not in order, so that a mix-up of ranks and tokens shows
PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def draw(logits: torch.Tensor, seed: int = 0, **sampling) -> list[int]:
    """How often each token is drawn in N_DRAWS rows of the same logits."""
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


@pytest.mark.parametrize(("sampling", "kept"), [({"top_k": 2}, 2), ({"top_p": 0.5}, 2)])
def test_of_equal_logits_no_more_are_kept_than_asked_for(sampling, kept):
    counts = draw(torch.zeros(4), **sampling)
    assert sorted(count > 0 for count in counts) == [False] * (4 - kept) + [True] * kept


@pytest.mark.parametrize(
    "sampling",
    [{}, {"top_k": 3}, {"top_k": 9}, {"top_p": 1.0}, {"top_p": 0.999}, {"top_k": 3, "top_p": 1.0}],
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


# ------------------------------------------------------------------ text and ids


def test_gpt2_ids_of_a_known_text():
    ids = text_to_token_ids("Every effort moves you", load_tokenizer("gpt2"))
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[6109, 3626, 6100, 345]]


@pytest.mark.parametrize("text", ["Every effort moves you", "春江潮水连海平", "a\n\n  b\t🙂"])
def test_text_survives_the_way_to_ids_and_back(text):
    tokenizer = load_tokenizer("gpt2")
    ids = text_to_token_ids(text, tokenizer)
    assert ids.shape[0] == 1
    assert token_ids_to_text(ids, tokenizer) == text
    assert token_ids_to_text(ids[0], tokenizer) == text


def test_an_empty_start_is_refused_with_what_to_do():
    with pytest.raises(SettingsError, match="give the model a word to start with"):
        text_to_token_ids("", load_tokenizer("gpt2"))


def test_half_a_character_becomes_a_replacement_character():
    tokenizer = load_tokenizer("gpt2")
    ids = text_to_token_ids("潮", tokenizer)
    assert ids.shape[1] > 1
    assert token_ids_to_text(ids[:, :-1], tokenizer) == "\ufffd"
