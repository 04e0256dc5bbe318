"""Generation against full forward passes: token for token, logit for logit, text for text."""

import contextlib
import gc
import itertools
import math

import pytest
import torch

import generation
from engine.compiling import compile_model, undo_compiling
from engine.errors import NumericsError, SettingsError
from generation import (
    evaluating,
    generate,
    generate_text_simple,
    stream,
)
from model import Dropout, GPTConfig, GPTModel

V = 23
LLAMA = {"architecture": "llama", "n_heads": 4}
FORMS = {
    "learned": {},
    "tied": {"tie_embeddings": True, "qkv_bias": True},
    "sinusoidal": {"positions": "sinusoidal"},
    "sinusoidal, tied": {"positions": "sinusoidal", "tie_embeddings": True},
    "llama": LLAMA | {"ff_dim": 40},
    "shared heads": LLAMA | {"n_kv_heads": 2, "tie_embeddings": True},
    "qwen3": LLAMA | {"n_kv_heads": 1, "qk_norm": True},
}
all_forms = pytest.mark.parametrize("form", FORMS)
# chi-square values that chance exceeds once in a thousand times, by degrees of freedom (tables)
CRITICAL = {1: 10.828, 3: 16.266}


def tiny_model(context_length: int = 8, **changes) -> GPTModel:
    """A model with weights so large that its choices depend on all of its window."""
    torch.manual_seed(0)
    shape = {"emb_dim": 16, "n_heads": 2, "n_layers": 2, "tie_embeddings": False} | changes
    model = GPTModel(GPTConfig(vocab_size=V, context_length=context_length, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        if shape.get("positions") == "sinusoidal" and shape["tie_embeddings"]:
            model.token_embedding.weight.mul_(0.4)  # or each token would call for itself
    return model.eval()


def prompt(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


def texts(*lengths: int) -> list[list[int]]:
    """A prompt of each length; the same lengths give the same prompts."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(V, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def uncached(model, ids, n_new: int, penalty: float = 1.0, window: int = 64):
    """What one prompt goes on with, greedily, by a full forward for each token: ids and logits."""
    limit, text, seen, logits = model.config.context_length, list(ids), list(ids), []
    for _ in range(n_new):
        if len(seen) > limit:
            seen = seen[-max(1, limit // 2) :]
        logits.append(model(torch.tensor([seen]))[0, -1])
        scores = logits[-1].tolist()
        for token in set(text[-window:]) if penalty != 1 else ():
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
        chosen = scores.index(max(scores))
        text.append(chosen)
        seen.append(chosen)
    return text[len(ids) :], torch.stack(logits)


def watch(patch: pytest.MonkeyPatch, model: GPTModel) -> tuple[list, list]:
    """The shape of ids in each pass through the model, and the logits of each choice."""
    shapes, logits, hidden, choose = [], [], model.hidden, generation.choose_next

    def hidden_noting(ids, *rest, **named):
        shapes.append(tuple(ids.shape))
        return hidden(ids, *rest, **named)

    def choose_noting(rows, **named):
        logits.append(rows.clone())
        return choose(rows, **named)

    patch.setattr(model, "hidden", hidden_noting)
    patch.setattr(generation, "choose_next", choose_noting)
    return shapes, logits


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the 1e-4 that is promised, of logits that are worth comparing."""
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------ greedy, and the window


@all_forms
def test_every_prompt_goes_on_as_without_a_cache_token_for_token(form, monkeypatch):
    model = tiny_model(8, **FORMS[form])
    _, logits = watch(monkeypatch, model)
    for length in (*range(1, 12), 16, 30):
        ids = prompt(length)
        expected, expected_logits = uncached(model, ids[0].tolist(), 20)
        logits.clear()
        found = generate(model, ids, max_new_tokens=20, temperature=0.0)
        assert found[0].tolist() == ids[0].tolist() + expected
        assert_equal(torch.cat(logits), expected_logits)


@pytest.mark.parametrize("form", ["learned", "sinusoidal, tied", "qwen3"])
@pytest.mark.parametrize("context_length", [1, 2, 3, 12])
def test_past_the_context_the_newest_half_goes_on(context_length, form, monkeypatch):
    model = tiny_model(context_length, **FORMS[form])
    _, logits = watch(monkeypatch, model)
    for length in (1, 2, 3, 4, 11, 12, 13, 30):
        ids = texts(length)[0]
        expected, expected_logits = uncached(model, ids, 26)
        logits.clear()
        assert generate(model, [ids], max_new_tokens=26, temperature=0.0) == [ids + expected]
        assert_equal(torch.cat(logits), expected_logits)


@all_forms
def test_the_texts_that_are_compared_vary_and_no_two_tokens_are_equally_likely(form):
    model = tiny_model(8, **FORMS[form])
    found = [uncached(model, prompt(length)[0].tolist(), 20) for length in range(1, 12)]
    assert all(len(set(text)) > 2 for text, _ in found)
    likeliest = torch.cat([logits for _, logits in found]).topk(2).values
    assert (likeliest[:, 0] - likeliest[:, 1]).min() > 1e-4  # else another CPU may choose another


@pytest.mark.parametrize("form", ["learned", "shared heads"])
def test_the_plain_way_and_the_fast_one_agree_within_the_context(form):
    model, ids = tiny_model(32, **FORMS[form]), prompt(3, rows=2)
    plain = generate_text_simple(model, ids, 29, 32)
    assert torch.equal(plain, generate(model, ids, max_new_tokens=29, temperature=0.0))
    newest = model(generate_text_simple(model, ids, 7, 4)[:, -5:-1])[:, -1].argmax(-1)
    assert torch.equal(newest, generate_text_simple(model, ids, 7, 4)[:, -1])
    assert torch.equal(generate_text_simple(model, ids, 0, 4), ids)


# ------------------------------------------------------------------ what it costs


@pytest.mark.parametrize(
    ("context_length", "prompt_length", "expected"),
    [
        (8, 7, [7, 1, 4, 1, 1, 1, 1, 4, 1]),
        (8, 1, [1, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]),
        (8, 8, [8, 4, 1, 1, 1, 1, 4]),
        (8, 9, [4, 1, 1, 1, 1, 4, 1]),
        (8, 1000, [4, 1, 1, 1, 1, 4, 1]),
        (3, 2, [2, 1, 1, 1, 1, 1, 1]),
        (2, 2, [2, 1, 1, 1, 1]),
        (1, 5, [1, 1, 1, 1]),
    ],
)
def test_a_step_reads_one_position_and_a_full_window_is_halved(
    context_length, prompt_length, expected, monkeypatch
):
    model = tiny_model(context_length)
    shapes, _ = watch(monkeypatch, model)
    generate(model, prompt(prompt_length), max_new_tokens=len(expected), temperature=0.0)
    assert shapes == [(1, n) for n in expected]


@pytest.mark.parametrize("context_length", [64, 65])
def test_past_the_window_one_reading_serves_for_half_a_context(context_length, monkeypatch):
    model = tiny_model(context_length)
    shapes, _ = watch(monkeypatch, model)
    generate(model, prompt(60), max_new_tokens=400, temperature=0.0)
    read_at = [step for step, (_, n) in enumerate(shapes) if n > 1]
    assert {later - at for at, later in itertools.pairwise(read_at[1:])} == {
        context_length - context_length // 2 + 1
    }
    assert {shapes[at] for at in read_at[1:]} == {(1, context_length // 2)}
    # less than two positions a token, where a forward of the whole window would take 64
    assert sum(n for _, n in shapes) < 2.1 * 400


def test_samples_of_a_prompt_share_its_reading(monkeypatch):
    model = tiny_model(8)
    shapes, _ = watch(monkeypatch, model)
    generate(model, prompt(6, rows=2), max_new_tokens=5, num_samples=3)
    assert shapes == [(2, 6), (6, 1), (6, 1), (6, 4), (6, 1)]


@pytest.mark.parametrize("context_length", [1, 2, 8, 9])
def test_the_cache_stays_within_the_context(context_length, monkeypatch):
    model = tiny_model(context_length)
    caches, make = [], generation.KVCache
    monkeypatch.setattr(
        generation, "KVCache", lambda *a, **k: caches.append(make(*a, **k)) or caches[-1]
    )
    prompts = texts(1, 3, 8, 30)
    for _ in stream(model, prompts, max_new_tokens=40, num_samples=2):
        assert caches[-1].filled <= caches[-1].capacity <= context_length
        assert {len(part) for layer in caches[-1].layers for part in layer} == {8}
        places = [part.shape[2] for layer in caches[-1].layers for part in layer]
        assert places == [caches[-1].capacity] * 4
    assert len(caches) > 3


def test_a_short_text_takes_no_room_for_a_long_one(monkeypatch):
    caches, make = [], generation.KVCache
    monkeypatch.setattr(
        generation, "KVCache", lambda *a, **k: caches.append(make(*a, **k)) or caches[-1]
    )
    generate(tiny_model(1000), prompt(5), max_new_tokens=6)
    assert [cache.capacity for cache in caches] == [11]


# ------------------------------------------------------------------ batches

LENGTHS = (1, 5, 3, 8, 9, 20, 4)  # in a context of 8 each overflows at a time of its own


@all_forms
def test_prompts_of_unequal_lengths_go_on_as_if_each_were_alone(form, monkeypatch):
    model = tiny_model(8, **FORMS[form])
    _, logits = watch(monkeypatch, model)
    prompts = texts(*LENGTHS)
    alone = [uncached(model, ids, 25) for ids in prompts]
    found = generate(model, prompts, max_new_tokens=25, temperature=0.0)
    assert found == [ids + new for ids, (new, _) in zip(prompts, alone, strict=True)]
    assert_equal(torch.stack(logits, dim=1), torch.stack([rows for _, rows in alone]))
    assert len({tuple(new) for new, _ in alone}) > 4


@pytest.mark.parametrize("context_length", [1, 2, 3])
def test_batches_in_the_shortest_contexts_go_on_as_if_alone(context_length, monkeypatch):
    model = tiny_model(context_length)
    _, logits = watch(monkeypatch, model)
    prompts = texts(1, 3, 2, 5)
    alone = [uncached(model, ids, 9) for ids in prompts]
    found = generate(model, prompts, max_new_tokens=9, temperature=0.0)
    assert found == [ids + new for ids, (new, _) in zip(prompts, alone, strict=True)]
    assert_equal(torch.stack(logits, dim=1), torch.stack([rows for _, rows in alone]))


@pytest.mark.parametrize("form", ["learned", "qwen3"])
def test_several_samples_are_each_the_text_that_its_tokens_make(form, monkeypatch):
    # each row's logits are those of a full forward over what this row has drawn so far
    model = tiny_model(8, **FORMS[form])
    _, logits = watch(monkeypatch, model)
    prompts = texts(2, 6, 11)
    generator = torch.Generator().manual_seed(3)
    rows = generate(model, prompts, max_new_tokens=12, num_samples=3, generator=generator)
    assert len(rows) == 9 and len(set(map(tuple, rows))) == 9
    found = torch.stack(logits[1:], dim=1)  # (9, 11, V); before, a prompt's samples are alike
    for row, text in enumerate(rows):
        ids = prompts[row // 3]
        assert text[: len(ids)] == ids and len(text) == len(ids) + 12
        assert_equal(found[row], forced(model, ids, text[len(ids) :])[1:])


@torch.no_grad()
def forced(model, ids: list[int], new: list[int]) -> torch.Tensor:
    """(n, V) logits before each of the new tokens, by full forwards."""
    limit, seen, logits = model.config.context_length, list(ids), []
    for token in new:
        if len(seen) > limit:
            seen = seen[-max(1, limit // 2) :]
        logits.append(model(torch.tensor([seen]))[0, -1])
        seen.append(token)
    return torch.stack(logits)


@pytest.mark.parametrize("shared", [True, False], ids=["one reading", "a reading each"])
def test_samples_are_drawn_from_the_models_distribution_and_apart_from_each_other(shared):
    model, ids, n_rows = tiny_model(8), texts(5)[0], 20_000 if shared else 4_000
    options = {"max_new_tokens": 2, "top_k": 2, "temperature": 6.0}
    options["generator"] = torch.Generator().manual_seed(0)
    if shared:
        rows = generate(model, [ids], num_samples=n_rows, **options)
    else:
        rows = generate(model, [ids] * n_rows, **options)
    drawn = [tuple(row[5:]) for row in rows]
    expected, first = {}, {}
    for token, share in two_likeliest(model, ids, 6.0):
        first[token] = share
        for then, then_share in two_likeliest(model, [*ids, token], 6.0):
            expected[token, then] = share * then_share
    assert min(expected.values()) > 0.01
    assert chi_square(drawn, expected) < CRITICAL[3]
    # neighbours are samples of one reading: what one draws says nothing of the other
    pairs = [(one[0], other[0]) for one, other in zip(drawn[::2], drawn[1::2], strict=True)]
    both = {(a, b): first[a] * first[b] for a in first for b in first}
    assert chi_square(pairs, both) < CRITICAL[3]


def two_likeliest(model, ids: list[int], temperature: float) -> list[tuple[int, float]]:
    with torch.no_grad():
        logits, tokens = (model(torch.tensor([ids]))[0, -1] / temperature).topk(2)
    return list(zip(tokens.tolist(), logits.softmax(0).tolist(), strict=True))


def chi_square(drawn: list[tuple], probabilities: dict[tuple, float]) -> float:
    assert set(drawn) <= set(probabilities)
    assert math.isclose(sum(probabilities.values()), 1, rel_tol=1e-5)
    return sum(
        (drawn.count(cell) - share * len(drawn)) ** 2 / (share * len(drawn))
        for cell, share in probabilities.items()
    )


# ------------------------------------------------------------------ rows that end


def an_ending(alone: list[list[int]]) -> int:
    """A token that some of the texts come to at different times, and some don't."""
    for token in range(V):
        at = {text.index(token) for text in alone if token in text}
        if len(at) > 1 and any(token not in text for text in alone):
            return token
    raise AssertionError("choose other prompts")


@pytest.mark.parametrize("form", ["learned", "sinusoidal", "qwen3"])
def test_rows_end_each_at_its_time_and_leave_the_others_as_they_were(form, monkeypatch):
    model = tiny_model(8, **FORMS[form])
    prompts = texts(*LENGTHS)
    alone = [uncached(model, ids, 25) for ids in prompts]
    end = an_ending([new for new, _ in alone])
    _, logits = watch(monkeypatch, model)
    options = {"max_new_tokens": 25, "temperature": 0.0, "end_of_text_id": end}
    steps = list(stream(model, prompts, **options))
    assert len(steps) == 25
    for row, (new, expected) in enumerate(alone):
        n = new.index(end) + 1 if end in new else 25
        found = [tokens[row] for tokens in steps]
        assert [token.id for token in found[:n]] == new[:n]
        assert found[n:] == [None] * (25 - n)
        assert_equal(torch.stack([step[row] for step in logits[:n]]), expected[:n])


def test_where_all_rows_have_ended_nothing_more_is_read(monkeypatch):
    model = tiny_model(8)
    prompts = texts(2, 5)
    alone = [uncached(model, ids, 25)[0] for ids in prompts]
    end = next(token for token in alone[0] if token in alone[1])
    last = max(new.index(end) for new in alone) + 1
    assert last < 25
    shapes, _ = watch(monkeypatch, model)
    options = {"temperature": 0.0, "end_of_text_id": end}
    steps = list(stream(model, prompts, max_new_tokens=25, **options))
    assert len(steps) == len(shapes) == last
    found = generate(model, prompts, max_new_tokens=25, **options)
    assert found == [
        ids + new[: new.index(end) + 1] for ids, new in zip(prompts, alone, strict=True)
    ]


def test_what_the_others_draw_does_not_depend_on_a_row_that_ended():
    model, prompts = tiny_model(8), texts(2, 6, 4)

    def drawn(end):
        options = {"generator": torch.Generator().manual_seed(4), "temperature": 3.0}
        return generate(
            model, prompts, max_new_tokens=40, num_samples=2, end_of_text_id=end, **options
        )

    whole, cut = drawn(None), drawn(7)
    new = [text[len(prompts[row // 2]) :] for row, text in enumerate(whole)]
    expected = [
        text[: len(text) - 40 + (added.index(7) + 1 if 7 in added else 40)]
        for text, added in zip(whole, new, strict=True)
    ]
    assert cut == expected
    assert len(set(map(len, cut))) > 3


# ------------------------------------------------------------------ what comes back


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_tensor_is_filled_up_behind_rows_that_ended(dtype):
    model, ids = tiny_model(8), prompt(5, rows=4).to(dtype)
    alone = [uncached(model, row.tolist(), 12)[0] for row in ids]
    end = an_ending(alone)
    options = {"max_new_tokens": 12, "temperature": 0.0, "end_of_text_id": end}
    found = generate(model, ids, num_samples=2, **options)
    assert found.dtype == dtype and found.shape == (8, 17) and found.device == ids.device
    for row, text in enumerate(found.tolist()):
        new = alone[row // 2]
        n = new.index(end) + 1 if end in new else 12
        assert text == ids[row // 2].tolist() + new[:n] + [end] * (12 - n)


def test_a_tensor_is_as_long_as_its_longest_row():
    model, ids = tiny_model(8), prompt(5)
    new = uncached(model, ids[0].tolist(), 12)[0]
    end = new[5]
    found = generate(model, ids, max_new_tokens=12, temperature=0.0, end_of_text_id=end)
    assert found[0].tolist() == ids[0].tolist() + new[: new.index(end) + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_stays_in_front_of_what_is_added(temperature):
    ids = prompt(11)
    found = generate(tiny_model(), ids, max_new_tokens=6, temperature=temperature)
    assert found.shape == (1, 17)
    assert torch.equal(found[:, :11], ids)


def test_no_new_tokens_give_the_prompts_back():
    ids = prompt(3, rows=2)
    assert torch.equal(generate(tiny_model(), ids, max_new_tokens=0), ids)
    twice = generate(tiny_model(), ids, max_new_tokens=0, num_samples=2)
    assert torch.equal(twice, ids.repeat_interleave(2, dim=0))
    assert generate(tiny_model(), [[1, 2], [3]], max_new_tokens=0) == [[1, 2], [3]]


def test_what_is_given_is_not_changed():
    ids, lists = prompt(3, rows=2), [[1, 2], [3]]
    before = ids.clone()
    generate(tiny_model(), ids, max_new_tokens=3)
    generate(tiny_model(), lists, max_new_tokens=3, num_samples=2)
    assert torch.equal(ids, before) and lists == [[1, 2], [3]]


@torch.no_grad()
def test_a_tokens_probability_is_the_models_own():
    model, ids = tiny_model(8), texts(6)[0]
    options = {"temperature": 3.0, "top_k": 4, "top_p": 0.9, "repetition_penalty": 2.0}
    generator = torch.Generator().manual_seed(0)
    steps = list(stream(model, [ids], max_new_tokens=12, generator=generator, **options))
    tokens = [token for (token,) in steps]
    logits = forced(model, ids, [token.id for token in tokens])
    expected = logits.log_softmax(-1)[range(12), [token.id for token in tokens]]
    assert [token.logprob for token in tokens] == pytest.approx(expected.tolist(), abs=1e-4)


# ------------------------------------------------------------------ repetition


@pytest.mark.parametrize("window", [1, 3, 64])
@pytest.mark.parametrize("penalty", [0.5, 1.5, 100.0])
def test_the_penalty_is_for_the_newest_tokens_of_each_text(window, penalty):
    model, prompts = tiny_model(8), texts(1, 5, 12)
    expected = [ids + uncached(model, ids, 20, penalty, window)[0] for ids in prompts]
    options = {"repetition_penalty": penalty, "repetition_window": window}
    assert generate(model, prompts, max_new_tokens=20, temperature=0.0, **options) == expected
    assert expected != [ids + uncached(model, ids, 20)[0] for ids in prompts]


def test_tokens_of_the_prompt_count_as_repeated():
    model, ids = tiny_model(8), texts(5)[0]
    likeliest = uncached(model, ids, 1)[0][0]
    options = {"max_new_tokens": 1, "temperature": 0.0, "repetition_penalty": 100.0}
    found = generate(model, [[likeliest, *ids]], repetition_window=6, **options)
    expected, _ = uncached(model, [likeliest, *ids], 1, 100.0)
    assert found[0][6:] == expected


# ------------------------------------------------------------------ seeds, modes and errors


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 9, "min_p": 0.1}])
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
def test_the_mode_of_the_model_is_restored(training, monkeypatch):
    model = tiny_model().train(training)
    generate(model, prompt(4), max_new_tokens=2)
    assert model.training == training
    monkeypatch.setattr(model, "hidden", None)
    with pytest.raises(TypeError):
        generate(model, prompt(4), max_new_tokens=2)
    monkeypatch.undo()
    assert model.training == training
    unfinished = stream(model, [[1, 2]], max_new_tokens=9)
    next(unfinished)
    unfinished.close()
    assert model.training == training
    dropped = stream(model, [[1, 2]], max_new_tokens=9)
    next(dropped)
    del dropped
    gc.collect()
    assert model.training == training
    with torch.no_grad():
        model.head.weight[0] = math.nan
    with pytest.raises(NumericsError):
        generate(model, prompt(4), max_new_tokens=2)
    assert model.training == training
    assert model.blocks[0].dropout.training == training


def test_texts_that_are_drawn_in_turn_leave_the_model_as_it_was():
    model = tiny_model(drop_rate=0.9).train()
    ids = texts(3)[0]
    expected, _ = uncached(model.eval(), ids, 6)
    model.train()
    first, second = (stream(model, [ids], max_new_tokens=6, temperature=0.0) for _ in range(2))
    found = [next(first)[0].id, next(first)[0].id]
    then = [next(second)[0].id]
    first.close()
    then += [tokens[0].id for tokens in second]
    assert (found, then) == (expected[:2], expected)
    assert model.training


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


@pytest.fixture
def compiled_graphs(monkeypatch):
    """Let torch.compile note each graph that it is given, and run it as it is."""
    graphs, torchs_own = [], torch.compile

    def noting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def compile_noting(function, **options):
        options.pop("mode", None)
        return torchs_own(function, **options, backend=noting)

    monkeypatch.setattr(torch, "compile", compile_noting)
    yield graphs
    torch.compiler.reset()


@pytest.mark.parametrize("part", ["cpu", "cuda"])  # says only which part is compiled
def test_a_compiled_model_generates_uncompiled_and_trains_compiled(part, compiled_graphs):
    model, prompts = tiny_model(8).train(), texts(2, 7)
    expected = generate(model, prompts, max_new_tokens=12, temperature=0.0)
    compile_model(model, torch.device(part), micro_batches=1)
    assert generate(model, prompts, max_new_tokens=12, temperature=0.0) == expected
    unfinished = stream(model, prompts, max_new_tokens=12)
    next(unfinished)
    unfinished.close()
    with torch.no_grad(), contextlib.suppress(SettingsError):
        generate(model, [[]], max_new_tokens=2)
    assert compiled_graphs == []
    model(prompt(8))
    assert compiled_graphs
    undo_compiling(model)


def test_a_compiled_model_is_uncompiled_for_each_of_two_texts_drawn_in_turn(compiled_graphs):
    model = tiny_model(8).train()
    compile_model(model, torch.device("cpu"), micro_batches=1)
    first, second = (stream(model, [[1, 2]], max_new_tokens=6) for _ in range(2))
    next(first), next(second)
    first.close()
    list(second)
    assert compiled_graphs == []
    model(prompt(8))
    assert compiled_graphs
    undo_compiling(model)


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([[]], {}, "a prompt without a token"),
        ([[1], []], {}, "a prompt without a token"),
        ([], {}, "ids has no prompt"),
        ([[1], [23]], {}, "a token that is not in 0 to 22"),
        ([[-1, 2]], {}, "a token that is not in 0 to 22"),
        ([[1]], {"num_samples": 0}, "num_samples is 0"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": math.nan}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 1.1}, "top_p"),
        ([[1]], {"min_p": -0.1}, "min_p"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty"),
        ([[1]], {"repetition_window": 0}, "repetition_window"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_runs(prompts, options, said):
    model = tiny_model().train()
    model.hidden = None
    with pytest.raises(SettingsError, match=said):
        generate(model, prompts, **({"max_new_tokens": 3} | options))
    assert model.training


def test_all_that_is_wrong_is_said_at_once():
    options = {"max_new_tokens": 3, "num_samples": -1, "top_p": 2.0, "temperature": -1.0}
    with pytest.raises(SettingsError) as caught:
        generate(tiny_model(), [[1], []], **options)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and "4 problems" in lines[0]


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)], ids=str)
def test_a_tensor_of_another_shape_is_refused(shape):
    with pytest.raises(SettingsError, match=r"needs \(B, T\)"):
        generate(tiny_model(), torch.zeros(shape, dtype=torch.long), max_new_tokens=1)
