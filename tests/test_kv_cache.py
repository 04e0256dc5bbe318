"""The cache of keys and values: what is read in pieces gives what is read at once."""

import pytest
import torch

from model import GPTConfig, GPTModel, KVCache

CPU = torch.device("cpu")
V = 23
LLAMA = {"architecture": "llama", "n_heads": 4}
FORMS = {
    "learned": {},
    "tied": {"tie_embeddings": True},
    "biased": {"qkv_bias": True},
    "sinusoidal": {"positions": "sinusoidal"},
    "sinusoidal, tied": {"positions": "sinusoidal", "tie_embeddings": True},
    "llama": LLAMA,
    "shared heads": LLAMA | {"n_kv_heads": 2},
    "qwen3": LLAMA | {"n_kv_heads": 1, "qk_norm": True, "tie_embeddings": True},
}
all_forms = pytest.mark.parametrize("form", FORMS)
fixed_or_not = pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])


def tiny_model(context_length: int = 12, **changes) -> GPTModel:
    """Two layers with weights so large that every position matters to those behind it."""
    torch.manual_seed(0)
    shape = {"emb_dim": 16, "n_heads": 2, "n_layers": 2, "tie_embeddings": False} | changes
    model = GPTModel(GPTConfig(vocab_size=V, context_length=context_length, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def some_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


def read(model: GPTModel, cache: KVCache, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V) logits of the cache's next T columns."""
    with torch.no_grad():
        return model.head(model.hidden(ids, cache.advance(ids.shape[1])))


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the 1e-4 that is promised, of logits that are worth comparing."""
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@all_forms
@fixed_or_not
@torch.no_grad()
def test_logits_are_those_of_a_full_forward_whatever_was_read_at_first(form, fixed):
    model = tiny_model(**FORMS[form])
    ids = some_ids(2, 12)
    expected = model(ids)
    for n_first in range(1, 13):
        cache = KVCache([n_first] * 2, 12, CPU, fixed=fixed)
        pieces = [read(model, cache, ids[:, :n_first])]
        pieces += [read(model, cache, ids[:, at : at + 1]) for at in range(n_first, 12)]
        assert_equal(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("form", ["learned", "qwen3"])
@pytest.mark.parametrize("pieces", [(3, 2, 1, 4, 2), (1, 11), (6, 6)], ids=str)
@fixed_or_not
@torch.no_grad()
def test_a_text_may_be_read_in_pieces_of_any_length(form, pieces, fixed):
    model = tiny_model(**FORMS[form])
    ids = some_ids(2, 12)
    cache = KVCache([pieces[0]] * 2, 12, CPU, fixed=fixed)
    found = [read(model, cache, piece) for piece in ids.split(pieces, dim=1)]
    assert_equal(torch.cat(found, dim=1), model(ids))


def padded(texts: list[torch.Tensor], filler: int) -> torch.Tensor:
    """(B, longest) ids, shorter texts with fillers in front."""
    longest = max(map(len, texts))
    return torch.stack(
        [torch.nn.functional.pad(t, (longest - len(t), 0), value=filler) for t in texts]
    )


@all_forms
@fixed_or_not
@torch.no_grad()
def test_texts_of_unequal_lengths_are_each_read_as_if_alone(form, fixed):
    model = tiny_model(**FORMS[form])
    lengths, n_more = [1, 7, 2, 5], 5
    texts = [some_ids(1, 12)[0], *some_ids(3, 12)]
    cache = KVCache(lengths, 12, CPU, fixed=fixed)
    found = [read(model, cache, padded([t[:n] for t, n in zip(texts, lengths, strict=True)], 0))]
    for step in range(n_more):
        newest = [t[n + step : n + step + 1] for t, n in zip(texts, lengths, strict=True)]
        found.append(read(model, cache, torch.stack(newest)))
    found = torch.cat(found, dim=1)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        expected = model(text[None, : length + n_more])[0]
        assert_equal(found[row, max(lengths) - length :], expected)


@fixed_or_not
def test_what_stands_before_a_shorter_text_is_not_seen(fixed):
    model = tiny_model()
    texts = [some_ids(1, 6)[0], some_ids(1, 2)[0]]
    found = []
    for filler in (0, V - 1):
        cache = KVCache([6, 2], 8, CPU, fixed=fixed)
        first = read(model, cache, padded(texts, filler))
        found.append((first[:, -2:], read(model, cache, torch.tensor([[3], [4]]))))
    (first, then), (first_too, then_too) = found
    assert torch.equal(first, first_too) and torch.equal(then, then_too)


def test_positions_count_from_each_texts_own_beginning():
    cache = KVCache([4, 1, 3], 8, CPU)
    positions = cache.advance(4).positions
    assert [row[-n:] for row, n in zip(positions.tolist(), (4, 1, 3), strict=True)] == [
        [0, 1, 2, 3],
        [0],
        [0, 1, 2],
    ]
    assert positions.min() == 0
    assert cache.advance(1).positions.tolist() == [[4], [1], [3]]
    cache = KVCache([4, 4], 8, CPU)
    assert cache.advance(4).positions.tolist() == [0, 1, 2, 3]
    assert cache.advance(1).positions.tolist() == [4]


@fixed_or_not
@pytest.mark.parametrize("lengths", [[3, 3], [3, 1]], ids=str)
def test_a_repeated_row_goes_on_like_the_one_it_was(fixed, lengths):
    model = tiny_model()
    texts = [text[:n] for text, n in zip(some_ids(2, 3), lengths, strict=True)]
    one, three = (KVCache(lengths, 6, CPU, fixed=fixed) for _ in range(2))
    for cache in (one, three):
        read(model, cache, padded(texts, 0))
    three.repeat(3)
    ways = torch.tensor([[5], [9], [14]])  # side by side, each with a token of its own
    found = read(model, three, ways.repeat(2, 1)).view(2, 3, V)
    for way, token in enumerate(ways):
        cache = KVCache(lengths, 6, CPU, fixed=fixed)
        read(model, cache, padded(texts, 0))
        assert_equal(found[:, way], read(model, cache, token.expand(2, 1))[:, 0])
    assert_equal(read(model, one, ways[:2])[1], found[1, 1][None])


@pytest.mark.parametrize(
    ("form", "n_kv_heads"), [("learned", 2), ("shared heads", 2), ("qwen3", 1)]
)
def test_it_is_allocated_once_for_the_heads_that_are_kept(form, n_kv_heads):
    model = tiny_model(**FORMS[form])
    head_dim = model.config.emb_dim // model.config.n_heads
    cache = KVCache([2, 2, 2], 9, CPU)
    read(model, cache, some_ids(3, 2))
    places = [part.data_ptr() for layer in cache.layers for part in layer]
    for _ in range(7):
        read(model, cache, some_ids(3, 1))
    assert cache.filled == cache.capacity == 9
    assert [part.data_ptr() for layer in cache.layers for part in layer] == places
    shapes = {tuple(part.shape) for layer in cache.layers for part in layer}
    assert len(cache.layers) == 2 and shapes == {(3, n_kv_heads, 9, head_dim)}


def test_more_than_its_capacity_is_refused():
    model = tiny_model()
    cache = KVCache([3], 4, CPU)
    read(model, cache, some_ids(1, 3))
    read(model, cache, some_ids(1, 1))
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        read(model, cache, some_ids(1, 1))


@pytest.mark.parametrize("form", ["learned", "sinusoidal", "llama"])
def test_a_position_behind_the_context_is_refused(form):
    model = tiny_model(context_length=4, **FORMS[form])
    with pytest.raises(ValueError, match="5 token ids, but the model's context_length is 4"):
        read(model, KVCache([5], 8, CPU), some_ids(1, 5))
    cache = KVCache([4], 8, CPU)
    read(model, cache, some_ids(1, 4))
    with pytest.raises((IndexError, ValueError)):
        read(model, cache, some_ids(1, 1))


def test_a_column_that_is_not_filled_yet_counts_for_nothing():
    model = tiny_model()
    found = []
    for rubbish in (0.0, 100.0):
        cache = KVCache([3], 12, CPU, fixed=True)
        read(model, cache, some_ids(1, 3))
        for layer in cache.layers:
            for part in layer:
                part[:, :, 4:] = rubbish
        found.append(read(model, cache, some_ids(1, 1)))
    assert torch.equal(*found)


@pytest.mark.parametrize("form", ["learned", "sinusoidal, tied", "qwen3"])
@pytest.mark.parametrize("lengths", [[3, 3], [1, 4]], ids=str)
@torch.no_grad()
def test_a_step_at_given_columns_is_the_step_that_comes_next(form, lengths):
    model = tiny_model(**FORMS[form])
    texts = [text[:n] for text, n in zip(some_ids(2, 4), lengths, strict=True)]
    one, other = (KVCache(lengths, 12, CPU, fixed=True) for _ in range(2))
    for cache in (one, other):
        read(model, cache, padded(texts, 0))
    for token in range(5):
        newest = torch.tensor([[token], [token + 7]])
        column = torch.tensor([max(lengths) + token])
        found = model.decode(newest, one, column)
        assert_equal(found, read(model, other, newest)[:, 0])
