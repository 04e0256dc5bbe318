"""Generation and its cache against full forward passes: token for token, logit for logit."""

import itertools
import math

import pytest
import torch

import generation
from engine.errors import NumericsError, SettingsError
from engine.metrics import TokenSize
from generation import SamplingConfig, evaluating, generate, generate_text_simple, stream
from model import GPTConfig, GPTModel, KVCache

CPU = torch.device("cpu")
V = 23
LLAMA = {"architecture": "llama", "n_heads": 4}
FORMS = {
    "learned": {},
    "tied": {"tie_embeddings": True, "qkv_bias": True},
    "sinusoidal, tied": {"positions": "sinusoidal", "tie_embeddings": True},
    "shared heads": LLAMA | {"ff_dim": 40, "n_kv_heads": 2, "tie_embeddings": True},
    "qwen3": LLAMA | {"n_kv_heads": 1, "qk_norm": True},
}
all_forms = pytest.mark.parametrize("form", FORMS)
fixed_or_not = pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
LENGTHS = (1, 5, 8, 9, 20)  # in a context of 8 each overflows at a time of its own


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


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompt(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(V, (rows, length), generator=seeded(length))


def texts(*lengths: int) -> list[list[int]]:
    """A prompt of each length; the same lengths give the same prompts."""
    generator = seeded(sum(lengths))
    return [torch.randint(V, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def uncached(model, ids, n_new: int, penalty=1.0, window=64, chosen=()):
    """What one prompt goes on with by a full forward for each token: ids and logits.

    Greedily, or with the ids in chosen.
    """
    limit, text, seen, logits = model.config.context_length, list(ids), list(ids), []
    for n in range(n_new):
        if len(seen) > limit:
            seen = seen[-max(1, limit // 2) :]
        logits.append(model(torch.tensor([seen]))[0, -1])
        scores = logits[-1].tolist()
        for token in set(text[-window:]) if penalty != 1 else ():
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
        token = chosen[n] if chosen else scores.index(max(scores))
        text.append(token)
        seen.append(token)
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


def read(model: GPTModel, cache: KVCache, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V) logits of the cache's next T columns."""
    with torch.no_grad():
        return model.head(model.hidden(ids, cache.advance(ids.shape[1])))


def padded(texts: list[torch.Tensor], filler: int) -> torch.Tensor:
    """(B, longest) ids, shorter texts with fillers in front."""
    longest, pad = max(map(len, texts)), torch.nn.functional.pad
    return torch.stack([pad(text, (longest - len(text), 0), value=filler) for text in texts])


@all_forms
@fixed_or_not
@torch.no_grad()
def test_texts_read_in_pieces_of_any_length_have_each_the_logits_of_a_full_forward(form, fixed):
    model = tiny_model(12, **FORMS[form])
    for lengths, pieces in (
        ((1, 1), (1,) * 11),
        ((1, 1), (11,)),
        ((6, 6), (6,)),
        ((12, 12), ()),
        ((1, 7, 2, 5), (1, 1, 1, 1, 1)),
        ((3, 4, 1), (2, 1, 4, 1)),
    ):
        texts = prompt(12, rows=len(lengths))
        cache = KVCache(list(lengths), 12, CPU, fixed=fixed)
        first = [text[:n] for text, n in zip(texts, lengths, strict=True)]
        found, done = [read(model, cache, padded(first, 0))], 0
        for size in pieces:
            places = [slice(n + done, n + done + size) for n in lengths]
            ids = torch.stack([text[at] for text, at in zip(texts, places, strict=True)])
            if fixed and size == 1 and done % 2:  # a step at given columns is the next one
                found.append(model.decode(ids, cache, cache.advance(1).columns)[:, None])
            else:
                found.append(read(model, cache, ids))
            done += size
        for row, (text, n) in enumerate(zip(texts, lengths, strict=True)):
            logits = torch.cat(found, dim=1)[row, max(lengths) - n :]
            assert_equal(logits, model(text[None, : n + done])[0])


@fixed_or_not
def test_padding_and_columns_that_are_not_filled_yet_count_for_nothing(fixed):
    model, texts = tiny_model(12), [prompt(6)[0], prompt(2)[0]]
    found = []
    for filler, rubbish in ((0, 0.0), (V - 1, 100.0)):
        cache = KVCache([6, 2], 8, CPU, fixed=fixed)
        first = read(model, cache, padded(texts, filler))[:, -2:]
        for layer in cache.layers:
            for part in layer:
                part[:, :, 7:] = rubbish
        found.append(torch.cat((first, read(model, cache, torch.tensor([[3], [4]]))), dim=1))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("form", "context_length"),
    [*((form, 8) for form in FORMS), ("learned", 1), ("qwen3", 2), ("sinusoidal, tied", 3)],
)
def test_prompts_alone_and_together_go_on_as_without_a_cache(form, context_length, monkeypatch):
    model = tiny_model(context_length, **FORMS[form])
    prompts = texts(*LENGTHS)
    alone = [uncached(model, ids, 10) for ids in prompts]
    if context_length == 8:  # these texts vary, and no CPU can choose another token
        likeliest = torch.cat([logits for _, logits in alone]).topk(2).values
        assert (likeliest[:, 0] - likeliest[:, 1]).min() > 1e-4
        assert len({tuple(new) for new, _ in alone if len(set(new)) > 2}) > 3
    _, logits = watch(monkeypatch, model)
    for ids, (new, expected) in zip(prompts, alone, strict=True):
        logits.clear()
        assert generate(model, [ids], max_new_tokens=10, temperature=0.0) == [ids + new]
        assert_equal(torch.cat(logits), expected)
    logits.clear()
    found = generate(model, prompts, max_new_tokens=10, temperature=0.0)
    assert found == [ids + new for ids, (new, _) in zip(prompts, alone, strict=True)]
    assert_equal(torch.stack(logits, dim=1), torch.stack([rows for _, rows in alone]))


@pytest.mark.parametrize("form", ["learned", "shared heads"])
def test_the_plain_way_and_the_fast_one_agree_within_the_context(form):
    model, ids = tiny_model(32, **FORMS[form]), prompt(3, rows=2)
    plain = generate_text_simple(model, ids, 29, 32)
    assert torch.equal(plain, generate(model, ids, max_new_tokens=29, temperature=0.0))
    newest = model(generate_text_simple(model, ids, 7, 4)[:, -5:-1])[:, -1].argmax(-1)
    assert torch.equal(newest, generate_text_simple(model, ids, 7, 4)[:, -1])
    assert torch.equal(generate_text_simple(model, ids, 0, 4), ids)


@pytest.mark.parametrize(
    ("context_length", "prompt_length", "expected"),
    [
        (8, 7, [7, 1, 4, 1, 1, 1, 1, 4, 1]),
        (8, 8, [8, 4, 1, 1, 1, 1, 4]),
        (8, 1000, [4, 1, 1, 1, 1, 4, 1]),
        (3, 2, [2, 1, 1, 1, 1, 1, 1]),
        (1, 5, [1, 1, 1, 1]),
    ],
)
def test_a_step_reads_one_position_a_full_window_is_halved_and_samples_share_their_prompt(
    context_length, prompt_length, expected, monkeypatch
):
    model, ids = tiny_model(context_length), prompt(prompt_length, rows=2)
    shapes, _ = watch(monkeypatch, model)
    for copies in (1, 3):
        shapes.clear()
        generate(model, ids, max_new_tokens=len(expected), num_samples=copies)
        first, *others = expected
        assert shapes == [(2, first), *((2 * copies, n) for n in others)]


def test_the_cache_stays_within_the_context_and_is_allocated_once_for_its_heads(monkeypatch):
    caches, make = [], generation.KVCache
    monkeypatch.setattr(
        generation, "KVCache", lambda *a, **k: caches.append(make(*a, **k)) or caches[-1]
    )
    for context_length, form in itertools.product((1, 2, 9), ("learned", "qwen3")):
        caches.clear()
        model, places = tiny_model(context_length, **FORMS[form]), {}
        shape = (model.config.n_kv_heads, model.config.emb_dim // model.config.n_heads)
        for _ in stream(model, texts(1, 3, 8, 30), max_new_tokens=25, num_samples=2):
            cache = caches[-1]
            assert cache.filled <= cache.capacity <= context_length
            parts = [part for layer in cache.layers for part in layer]
            assert len(parts) == 4
            assert {tuple(part.shape) for part in parts} == {
                (8, shape[0], cache.capacity, shape[1])
            }
            now = [part.data_ptr() for part in parts]
            assert places.setdefault(id(cache), now) == now
        assert len(caches) > 3
    generate(tiny_model(1000), prompt(5), max_new_tokens=6)
    assert caches[-1].capacity == 11


@pytest.mark.parametrize("lengths", [(2, 6, 11), (6, 6, 6)])
def test_several_samples_are_each_the_text_that_its_tokens_make(lengths, monkeypatch):
    # each row's logits are those of a full forward over what this row has drawn so far
    model = tiny_model(8, **FORMS["qwen3"])
    _, logits = watch(monkeypatch, model)
    prompts = texts(*lengths)
    rows = generate(model, prompts, max_new_tokens=12, num_samples=3, generator=seeded(3))
    assert len(rows) == 9 and len(set(map(tuple, rows))) == 9
    found = torch.stack(logits[1:], dim=1)  # (9, 11, V); before, a prompt's samples are alike
    for row, text in enumerate(rows):
        ids = prompts[row // 3]
        assert text[: len(ids)] == ids and len(text) == len(ids) + 12
        assert_equal(found[row], uncached(model, ids, 12, chosen=text[len(ids) :])[1][1:])


def an_ending(alone: list[list[int]]) -> int:
    """A token that some of the texts come to at different times, and some don't."""
    for token in range(V):
        at = {text.index(token) for text in alone if token in text}
        if len(at) > 1 and any(token not in text for text in alone):
            return token
    raise AssertionError("choose other prompts")


@pytest.mark.parametrize("form", ["learned", "qwen3"])
def test_rows_end_each_at_its_time_and_leave_the_others_as_they_were(form, monkeypatch):
    model = tiny_model(8, **FORMS[form])
    prompts, n_new = texts(1, 5, 3, 8, 9, 20, 4), 20
    alone = [uncached(model, ids, n_new) for ids in prompts]
    end = an_ending([new for new, _ in alone])
    shapes, logits = watch(monkeypatch, model)
    options = {"max_new_tokens": n_new, "temperature": 0.0, "end_of_text_id": end}
    steps = list(stream(model, prompts, **options))
    assert len(steps) == n_new
    ended = []
    for row, (new, expected) in enumerate(alone):
        n = new.index(end) + 1 if end in new else n_new
        found = [tokens[row] for tokens in steps]
        assert [token.id for token in found[:n]] == new[:n]
        assert found[n:] == [None] * (n_new - n)
        assert_equal(torch.stack([step[row] for step in logits[:n]]), expected[:n])
        if n < n_new:
            ended.append((prompts[row], new[:n]))
    # where all rows have ended nothing more is read
    shapes.clear()
    found = generate(model, [ids for ids, _ in ended], **options)
    assert found == [ids + new for ids, new in ended]
    assert len(shapes) == max(len(new) for _, new in ended) < n_new


def test_what_the_others_draw_does_not_depend_on_a_row_that_ended():
    model, prompts = tiny_model(8), texts(2, 6, 4)
    options = {"max_new_tokens": 40, "num_samples": 2, "temperature": 3.0}
    whole, cut, stopped = (
        generate(model, prompts, generator=seeded(4), **ends, **options)
        for ends in ({}, {"end_of_text_id": 7}, {"stop_ids": (7,)})
    )
    assert cut == stopped
    for row, (text, found) in enumerate(zip(whole, cut, strict=True)):
        begun = len(prompts[row // 2])
        n_new = text[begun:].index(7) + 1 if 7 in text[begun:] else 40
        assert found == text[: begun + n_new]
    assert len(set(map(len, cut))) > 3


def test_a_tensor_is_as_long_as_its_longest_row_and_filled_up_behind_rows_that_ended():
    model = tiny_model(8)
    for dtype, n_rows in ((torch.int64, 4), (torch.int32, 1)):
        ids = prompt(5, rows=n_rows).to(dtype)
        before = ids.clone()
        alone = [uncached(model, row.tolist(), 12)[0] for row in ids]
        end = an_ending(alone) if n_rows > 1 else alone[0][5]
        options = {"max_new_tokens": 12, "temperature": 0.0, "end_of_text_id": end}
        found = generate(model, ids, num_samples=2, **options)
        ended = [new[: new.index(end) + 1] if end in new else new for new in alone]
        longest = max(map(len, ended))
        assert longest == (12 if n_rows > 1 else alone[0].index(end) + 1)
        assert found.dtype == dtype and found.device == ids.device
        assert found.tolist() == [
            row.tolist() + new + [end] * (longest - len(new))
            for row, new in zip(ids, ended, strict=True)
            for _ in range(2)
        ]
        assert torch.equal(ids, before)
    with pytest.raises(SettingsError, match="padded with end_of_text_id"):
        generate(model, prompt(5, rows=2), max_new_tokens=1, stop_ids=[3])


def test_no_new_tokens_give_the_prompts_back_and_what_is_given_is_not_changed():
    ids, lists = prompt(3, rows=2), [[1, 2], [3]]
    assert torch.equal(generate(tiny_model(), ids, max_new_tokens=0), ids)
    twice = generate(tiny_model(), ids, max_new_tokens=0, num_samples=2)
    assert torch.equal(twice, ids.repeat_interleave(2, dim=0))
    assert generate(tiny_model(), lists, max_new_tokens=0) == lists
    generate(tiny_model(), lists, max_new_tokens=3, num_samples=2)
    assert lists == [[1, 2], [3]]


def test_a_tokens_probability_is_the_models_own():
    model, ids = tiny_model(8), texts(6)[0]
    options = {"temperature": 3.0, "top_k": 4, "top_p": 0.9, "repetition_penalty": 2.0}
    steps = list(stream(model, [ids], max_new_tokens=12, generator=seeded(0), **options))
    chosen = [token.id for (token,) in steps]
    _, logits = uncached(model, ids, 12, chosen=chosen)
    expected = logits.log_softmax(-1)[range(12), chosen]
    assert [token.logprob for (token,) in steps] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(("penalty", "window"), [(0.5, 3), (1.5, 1), (1.5, 64), (100.0, 64)])
def test_the_penalty_is_for_the_newest_tokens_of_each_text_and_its_prompt(penalty, window):
    model, prompts = tiny_model(8), texts(1, 5, 12)
    expected = [ids + uncached(model, ids, 12, penalty, window)[0] for ids in prompts]
    options = {"repetition_penalty": penalty, "repetition_window": window}
    assert generate(model, prompts, max_new_tokens=12, temperature=0.0, **options) == expected
    assert expected != [ids + uncached(model, ids, 12)[0] for ids in prompts]


def test_the_same_generator_seed_gives_the_same_text():
    model, state = tiny_model(), torch.get_rng_state()
    for sampling in ({}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 9, "min_p": 0.1}):
        one, same, other = (
            generate(model, prompt(4), max_new_tokens=15, generator=seeded(seed), **sampling)
            for seed in (1, 1, 2)
        )
        assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(training, monkeypatch):
    model = tiny_model().train(training)
    generate(model, prompt(4), max_new_tokens=2)
    assert model.training == training
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(model, "hidden", None)
        generate(model, prompt(4), max_new_tokens=2)
    assert model.training == training
    unfinished, dropped = (stream(model, [[1, 2]], max_new_tokens=9) for _ in range(2))
    next(unfinished)
    unfinished.close()
    assert model.training == training
    next(dropped)
    del dropped
    assert model.training == training
    with torch.no_grad():
        model.head.weight[0] = math.nan
    with pytest.raises(NumericsError):
        generate(model, prompt(4), max_new_tokens=2)
    assert model.training == model.blocks[0].dropout.training == training
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training == training


def test_texts_that_are_drawn_in_turn_have_no_dropout_and_no_gradients_and_leave_the_mode():
    model, graphs = tiny_model(drop_rate=0.9), []
    ids = texts(3)[0]
    expected, _ = uncached(model, ids, 6)
    model.train().head.register_forward_hook(lambda *call: graphs.append(call[-1].requires_grad))
    first, second = (stream(model, [ids], max_new_tokens=6, temperature=0.0) for _ in range(2))
    found = [next(first)[0].id, next(first)[0].id]
    then = [next(second)[0].id]
    first.close()
    then += [tokens[0].id for tokens in second]
    assert (found, then) == (expected[:2], expected)
    assert model.training
    assert graphs == [False] * 8
    found = generate(model, [ids], max_new_tokens=6, temperature=0.0)
    assert found == [ids + expected]


def test_what_makes_no_sense_is_refused_before_the_model_runs():
    calls = [
        ([[]], {}, "a prompt without a token"),
        ([[1], []], {}, "a prompt without a token"),
        ([], {}, "ids has no prompt"),
        ([[1], [23]], {}, "a token that is not in 0 to 22"),
        ([[-1, 2]], {}, "a token that is not in 0 to 22"),
        ([[1]], {"num_samples": 0}, "num_samples is 0"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1], []], {"max_new_tokens": None}, "max_new_tokens is None; it must be a whole number"),
        ([[1]], {"temperature": math.nan}, "temperature is nan"),
        ([[1], []], {"num_samples": -1, "top_p": 2.0, "temperature": -1.0}, "4 problems"),
        (torch.zeros(3, dtype=torch.long), {}, r"needs \(B, T\)"),
        (torch.zeros(1, 2, 3, dtype=torch.long), {}, r"needs \(B, T\)"),
    ]
    model = tiny_model().train()
    model.hidden = None
    for prompts, options, said in calls:
        with pytest.raises(SettingsError, match=said):
            generate(model, prompts, **({"max_new_tokens": 3} | options))
    assert model.training


def test_a_sample_without_a_number_of_tokens_is_some_300_characters_long():
    asked = SamplingConfig(max_new_tokens=None, top_k=7)
    for characters, count in ((1.0, 300), (2.4, 125), (0.7, 429), (1e9, 1), (1e-9, 100_000)):
        fitted = asked.fitted(TokenSize(characters, bytes=1.0))
        assert fitted == SamplingConfig(max_new_tokens=count, top_k=7)
    own = SamplingConfig(max_new_tokens=9)
    assert own.fitted(TokenSize(2.4, 2.4)) == own
