"""Streamed text: whole characters, stop strings, ends, and prompts of every kind."""

import itertools
import math
import time

import pytest
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

import generation
from engine.errors import NumericsError, SettingsError
from generation import (
    Piece,
    SamplingConfig,
    stream,
    stream_text,
    text_to_token_ids,
    token_ids_to_text,
)
from model import GPTConfig, GPTModel
from text.tokenizer import CharTokenizer, GPT2Tokenizer, load_tokenizer, train_bpe
from text.tokenizer_file import END_OF_TEXT, byte_symbols

LEARNT = "the bell of the river, abc abcab bcabc; 春江潮水连海平，海上明月共潮生。" * 20
KINDS = ("gpt2", "bpe", "char", "foreign")
CHINESE = "滟滟随波千万里，何处春江无月明！江流宛转绕芳甸，月照花林皆似霰；"
EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪☺️🙂"


@pytest.fixture(scope="module")
def by_kind(tmp_path_factory) -> dict:
    """A tokenizer of each kind, and a model for it; all but GPT-2's have learnt one text."""
    trainable = tokenizers.Tokenizer(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainable.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(byte_symbols()),
        show_progress=False,
    )
    trainable.train_from_iterator([LEARNT], trainer)
    path = tmp_path_factory.mktemp("elsewhere") / "tokenizer.json"
    trainable.save(str(path))
    made = {
        "gpt2": GPT2Tokenizer(),
        "bpe": train_bpe([LEARNT], 330),
        "char": CharTokenizer(LEARNT),
        "foreign": load_tokenizer(path),
    }
    return {kind: (tokenizer, tiny_model(tokenizer)) for kind, tokenizer in made.items()}


def tiny_model(tokenizer, context_length: int = 8) -> GPTModel:
    torch.manual_seed(0)
    shape = {"emb_dim": 8, "n_heads": 1, "n_layers": 1, "context_length": context_length}
    model = GPTModel(GPTConfig(vocab_size=tokenizer.vocab_size, tie_embeddings=False, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=KINDS)
def parts(request, by_kind):
    """A tokenizer of each kind in turn, with its model."""
    return by_kind[request.param]


def say(parts, *scripts: list[int], stop=(), n_tokens: int | None = None, **options) -> list[Piece]:
    """What stream_text gives where the rows' choices are these tokens."""
    tokenizer, model = parts
    steps = zip(*(itertools.chain(script, itertools.repeat(0)) for script in scripts), strict=True)
    options = {"max_new_tokens": n_tokens or max(map(len, scripts))} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            generation, "choose_next", lambda logits, **_: torch.tensor(next(steps))[:, None]
        )
        return list(stream_text(model, tokenizer, ["a"] * len(scripts), stop=stop, **options))


def joined(pieces: list[Piece], row: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.row == row)


def finishes(pieces: list[Piece], row: int = 0) -> list[str | None]:
    return [piece.finish for piece in pieces if piece.row == row]


# ------------------------------------------------------------------ whole characters


@pytest.mark.parametrize("text", [CHINESE, EMOJI, "a" + EMOJI + "𠮷𡃁 e\u0301 " + CHINESE])
def test_chinese_and_emoji_stream_without_a_broken_character(parts, text):
    ids = parts[0].encode(text)
    assert len(ids) > len(text) / 3
    pieces = say(parts, ids)
    assert joined(pieces) == text
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert [piece.token.id for piece in pieces] == ids
    assert finishes(pieces) == [None] * (len(ids) - 1) + ["length"]
    # a character is shown with the token that completes it, not at the end
    for n in range(1, len(ids)):
        whole = parts[0].decode(ids[:n]).rstrip("\ufffd")
        assert "".join(piece.text for piece in pieces[:n]) == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@example("")
@example("\ufffd春\ufffd")
@given(st.text(st.sampled_from(CHINESE + EMOJI + "ab \n\ufffd\x00é"), max_size=30))
def test_any_text_streams_as_it_is(kind, by_kind, text):
    ids = by_kind[kind][0].encode(text)
    if ids:
        pieces = say(by_kind[kind], ids)
        assert joined(pieces) == text
        assert finishes(pieces)[-1] == "length"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_stream_as_they_are_decoded(kind, by_kind, data):
    tokenizer, _ = by_kind[kind]
    # bytes that make no character are the rule here
    tokens = st.integers(0, min(tokenizer.vocab_size, 400) - 1)
    ids = data.draw(st.lists(tokens, min_size=1, max_size=100))
    ids = [token for token in ids if token != tokenizer.end_of_text_id]
    if ids:
        assert joined(say(by_kind[kind], ids)) == tokenizer.decode(ids)


def test_a_character_that_stays_incomplete_is_shown_as_such_at_the_end(parts):
    tokenizer, _ = parts
    ids = tokenizer.encode("a🦜")  # which none has learnt
    assert len(ids) > 2
    for pieces in (
        say(parts, ids[:-1]),
        say(parts, [*ids[:-1], tokenizer.end_of_text_id]),
    ):
        assert joined(pieces) == tokenizer.decode(ids[:-1])
        assert joined(pieces).startswith("a\ufffd")
        assert not any("\ufffd" in piece.text for piece in pieces[:-1])


def test_rows_keep_their_halves_of_characters_apart(parts):
    tokenizer, _ = parts
    scripts = [tokenizer.encode(text) for text in ("🦜🦜🦜", "x🐢🐢", "yy🐙🐙")]
    pieces = say(parts, *scripts, n_tokens=min(map(len, scripts)))
    for row, script in enumerate(scripts):
        expected = tokenizer.decode(script[: min(map(len, scripts))])
        assert joined(pieces, row) == expected
    assert [piece.row for piece in pieces[:6]] == [0, 1, 2, 0, 1, 2]


# ------------------------------------------------------------------ stop strings


def spell(text: str) -> list[int]:
    """A token for each character."""
    return CharTokenizer(LEARNT).encode(text)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("the bell", ["bell"], "the "),  # across several tokens
        ("the bell", ["e"], "th"),  # of one token
        ("the bell", ["the"], ""),  # at the first character
        ("the bell", ["t"], ""),
        ("the bell", ["l"], "the be"),
        ("the bell", ["ll"], "the be"),  # at the very end
        ("the bell", ["the bell"], ""),  # all of it
        ("the bell", ["bells"], None),  # at the end, not whole: given out
        ("the bell", ["xyz", "xbell"], None),
        ("the bell", ["river", "be"], "the "),  # several, of which one comes
        ("the bell", ["ll", "be"], "the "),
        ("abcab", ["ab", "abc"], ""),  # one the beginning of another
        ("abcab", ["abc", "ab"], ""),
        ("abcab", ["bcb", "ca"], "ab"),
        ("aabab abc", ["abc"], "aabab "),  # beginnings that come to nothing
        ("abababc", ["ababc"], "ab"),  # the true one begins inside a false one
        ("aaab", ["aab"], "a"),
        ("abc", ["b", "abc"], "a"),  # the one that is complete first
        ("abc", ["bc", "abc"], ""),  # together: the longer
        ("春江潮水", ["潮"], "春江"),
        ("the bell", [""], None),  # an empty one stops nothing
        ("the bell", ["", "b"], "the "),
        ("the bell", [], None),
    ],
)
@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2", "foreign"])
def test_a_text_ends_before_the_first_stop_string(by_kind, kind, text, stop, shown):
    tokenizer, _ = by_kind[kind]
    pieces = say(by_kind[kind], tokenizer.encode(text), stop=stop)
    assert joined(pieces) == (text if shown is None else shown)
    assert finishes(pieces)[-1] == ("length" if shown is None else "stop")
    assert set(finishes(pieces)[:-1]) <= {None}


def first_complete(text: str, stops: list[str]) -> int | None:
    """Where the stop string begins that is the first to be complete, of equals the longest."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if begins:
            return min(begins)
    return None


SHORT = st.text("abc", max_size=4)


@settings(max_examples=200, deadline=None)
@example(["abc"], ["b", "abc"])
@example(["a", "ab", "abc"], ["aab", "bc"])
@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1), st.lists(SHORT, max_size=3))
def test_how_tokens_cut_a_text_changes_nothing_and_nothing_is_held_too_long(by_kind, cut, stops):
    tokenizer, model = by_kind["bpe"]
    encode = tokenizer._encoding.encode_single_token
    vocabulary = {tokenizer.token_bytes(i) for i in range(256, tokenizer.end_of_text_id)}
    assert {b"ab", b"abc"} <= vocabulary  # so that a token may have a stop string inside
    ids = []
    for part in cut:
        ids += [encode(part)] if part.encode() in vocabulary else tokenizer.encode(part)
    text = "".join(cut)
    pieces = say((tokenizer, model), ids, stop=stops)
    at = first_complete(text, stops)
    assert joined(pieces) == text[:at]
    assert finishes(pieces)[-1] == ("length" if at is None else "stop")
    for n in range(1, len(pieces)):
        so_far = tokenizer.decode(ids[:n])
        shown = "".join(piece.text for piece in pieces[:n])
        assert so_far.startswith(shown)
        held = so_far[len(shown) :]
        assert not held or any(s.startswith(held) and s != held for s in stops)


def test_rows_stop_each_at_its_own_time(by_kind):
    texts = ["abc abc", "the bell of the", "river, river", "bell"]
    pieces = say(by_kind["char"], *map(spell, texts), stop=["c", "bell"], n_tokens=12)
    assert [joined(pieces, row) for row in range(4)] == ["ab", "the ", "river, river", ""]
    assert [len(finishes(pieces, row)) for row in range(4)] == [3, 8, 12, 4]
    assert [finishes(pieces, row)[-1] for row in range(4)] == ["stop", "stop", "length", "stop"]


def test_the_prompt_is_no_part_of_a_stop_string(by_kind):
    pieces = say(by_kind["char"], spell("bc abc"), stop=["abc"])  # behind the prompt "a"
    assert joined(pieces) == "bc "


def test_a_stop_string_may_be_what_a_half_character_looks_like(by_kind):
    ids = by_kind["char"][0].encode("a🦜b")
    assert joined(say(by_kind["char"], ids, stop=["\ufffd"])) == "a🦜b"
    assert joined(say(by_kind["char"], ids[:-2], stop=["\ufffd"])) == "a"
    assert joined(say(by_kind["char"], ids, stop=["🦜"])) == "a"


# ------------------------------------------------------------------ ends


def test_the_end_of_text_ends_a_row_and_is_not_shown(parts):
    tokenizer, _ = parts
    end = tokenizer.end_of_text_id
    one, other = tokenizer.encode("ab"), tokenizer.encode("the bell of the river")
    pieces = say(parts, [*one, end, *other], other, stop=["zz"])
    assert joined(pieces) == "ab"
    assert finishes(pieces) == [None] * len(one) + ["stop"]
    assert [piece.token.id for piece in pieces if piece.row == 0] == [*one, end]
    assert joined(pieces, 1).startswith("the bell of the river")
    # what might have become a stop string has not
    pieces = say(parts, [*tokenizer.encode("river"), end], stop=["rivers", "very"])
    assert joined(pieces) == "river"
    pieces = say(parts, [end, *one])
    assert (joined(pieces), finishes(pieces)) == ("", ["stop"])


def test_a_row_with_its_last_token_ends_once(by_kind):
    end = by_kind["char"][0].end_of_text_id
    assert finishes(say(by_kind["char"], spell("ab"))) == [None, "length"]
    assert finishes(say(by_kind["char"], [*spell("a"), end])) == [None, "stop"]
    assert finishes(say(by_kind["char"], spell("ab"), stop=["b"])) == [None, "stop"]
    assert finishes(say(by_kind["char"], spell("a"))) == ["length"]


def test_where_all_rows_have_ended_no_more_tokens_are_drawn(by_kind, monkeypatch):
    tokenizer, model = by_kind["char"]
    passes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a: passes.append(1) or hidden(*a))
    scripts = [spell("abc"), [*spell("a"), tokenizer.end_of_text_id]]
    pieces = say((tokenizer, model), *scripts, stop=["c"], n_tokens=50)
    assert len(passes) == 3 and len(pieces) == 5


# ------------------------------------------------------------------ prompts


def drawn(parts, prompts: list[str], **options) -> list[list[int]]:
    """The tokens of each row, at a seed."""
    tokenizer, model = parts
    options = {"max_new_tokens": 12, "generator": torch.Generator().manual_seed(1)} | options
    rows: dict[int, list[int]] = {}
    for piece in stream_text(model, tokenizer, prompts, **options):
        rows.setdefault(piece.row, []).append(piece.token.id)
    return [rows[row] for row in sorted(rows)]


def from_ids(parts, ids: list[list[int]], **options) -> list[list[int]]:
    """The same from token ids, with SamplingConfig's defaults."""
    tokenizer, model = parts
    default = SamplingConfig()
    options = {
        "max_new_tokens": 12,
        "temperature": default.temperature,
        "top_k": default.top_k,
        "top_p": default.top_p,
        "end_of_text_id": tokenizer.end_of_text_id,
        "generator": torch.Generator().manual_seed(1),
    } | options
    steps = list(stream(model, ids, **options))
    return [[token.id for token in row if token] for row in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    "prompts",
    [
        ["the bell"],
        ["a", "the bell of the river", "春江"],
        ["\x00\x1f𠮷🦜 \ufeff\u202e é ﷽"],  # characters that no tokenizer here has seen
        [f"ab{END_OF_TEXT}cd<eos><pad><|im_end|></s>"],
    ],
    ids=["one", "several", "unseen", "control tokens' names"],
)
def test_text_goes_on_as_its_ids_do(parts, prompts):
    ids = [parts[0].encode(prompt) for prompt in prompts]
    assert drawn(parts, prompts) == from_ids(parts, ids)
    assert drawn(parts, prompts, num_samples=3) == from_ids(parts, ids, num_samples=3)


def read_by(parts, monkeypatch, prompt: str) -> list[int]:
    """The ids that the model reads of a prompt."""
    tokenizer, model = parts
    model = tiny_model(tokenizer, context_length=200)
    read, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *a: read.append(ids) or hidden(ids, *a))
    list(stream_text(model, tokenizer, [prompt], max_new_tokens=1))
    return read[0][0].tolist()


def test_the_name_of_a_control_token_is_read_as_text(parts, monkeypatch):
    tokenizer, _ = parts
    prompt = f"a{END_OF_TEXT}b<eos>{END_OF_TEXT}"
    read = read_by(parts, monkeypatch, prompt)
    assert tokenizer.end_of_text_id not in read
    assert len(read) > 8
    assert tokenizer.decode(read) == prompt


def test_an_empty_prompt_begins_behind_an_end_of_text(parts, monkeypatch):
    end = parts[0].end_of_text_id
    assert read_by(parts, monkeypatch, "") == [end]
    assert drawn(parts, ["", "a"]) == from_ids(parts, [[end], parts[0].encode("a")])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("gpt2", "the bell of the river, "),
        ("gpt2", " "),
        ("char", CHINESE),  # all of it unseen
        ("bpe", CHINESE),
        ("foreign", " the bell"),
    ],
    ids=["words", "blanks", "unseen", "Chinese", "foreign"],
)
def test_a_prompt_of_a_megabyte_is_its_newest_half_window(by_kind, kind, text):
    prompt = text * (1_000_000 // len(text.encode()) + 1)
    started = time.process_time()
    found = drawn(by_kind[kind], [prompt, "a"], repetition_penalty=1.1)
    seconds = time.process_time() - started
    tokenizer = by_kind[kind][0]
    ids = [tokenizer.encode(prompt)[-64:], tokenizer.encode("a")]
    assert found == from_ids(by_kind[kind], ids, repetition_penalty=1.1)
    assert seconds < 5  # half a second, mostly for the tokenizer


# ------------------------------------------------------------------ seeds and errors


def test_the_same_seed_gives_the_same_text_and_no_other_randomness_is_used(parts):
    def text(seed):
        tokenizer, model = parts
        options = {"temperature": 2.0, "top_k": None, "num_samples": 2, "max_new_tokens": 12}
        generator = torch.Generator().manual_seed(seed)
        return list(stream_text(model, tokenizer, ["a", "the"], generator=generator, **options))

    state = torch.get_rng_state()
    assert text(1) == text(1)
    assert text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_settings_that_are_not_given_are_those_of_sampling_config(by_kind):
    tokenizer, model = by_kind["char"]
    pieces = list(stream_text(model, tokenizer, ["a"]))
    assert len(pieces) <= SamplingConfig().max_new_tokens
    assert drawn(by_kind["char"], ["a"], max_new_tokens=30, temperature=0.0) == from_ids(
        by_kind["char"], [spell("a")], max_new_tokens=30, temperature=0.0
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_where_a_text_is_left_or_fails(by_kind, training):
    tokenizer = by_kind["char"][0]
    model = tiny_model(tokenizer).train(training)
    list(stream_text(model, tokenizer, ["a"], max_new_tokens=3))
    assert model.training == training
    left = stream_text(model, tokenizer, ["a"])
    next(left)
    left.close()
    assert model.training == training and model.blocks[0].training == training
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(NumericsError, match="not finite"):
        list(stream_text(model, tokenizer, ["a"]))
    assert model.training == training and model.blocks[0].training == training


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": "much"}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_samples": 0}, "num_samples"),
        ({"tempreture": 1.0}, "tempreture"),
    ],
)
def test_settings_that_make_no_sense_are_refused(by_kind, options, said):
    tokenizer, model = by_kind["char"]
    with pytest.raises(SettingsError, match=said):
        list(stream_text(model, tokenizer, ["a"], **options))


def test_no_prompts_are_refused(by_kind):
    tokenizer, model = by_kind["char"]
    with pytest.raises(SettingsError, match="prompt"):
        list(stream_text(model, tokenizer, []))


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
