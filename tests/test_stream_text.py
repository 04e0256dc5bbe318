"""Streamed text: whole characters, stop strings, ends, and prompts of every kind."""

import itertools
from dataclasses import asdict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import generation
from engine.errors import SettingsError
from generation import (
    Piece,
    SamplingConfig,
    stream,
    stream_text,
    text_to_token_ids,
    token_ids_to_text,
)
from tests.letters import model_for
from tests.texts import train_in_the_library
from text.tokenizer import CharTokenizer, GPT2Tokenizer, restore_tokenizer, train_bpe
from text.tokenizer_file import END_OF_TEXT

LEARNT = "the bell of the river, abc abcab bcabc; 春江潮水连海平，海上明月共潮生。" * 20
KINDS = ("gpt2", "bpe", "char", "foreign")
CHINESE = "滟滟随波千万里，何处春江无月明！江流宛转绕芳甸，月照花林皆似霰；"
EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪☺️🙂"


@pytest.fixture(scope="module")
def by_kind() -> dict:
    """A tokenizer of each kind, and a model for it; all but GPT-2's have learnt one text."""
    foreign = train_in_the_library(LEARNT, 330, "<pad>", "<eos>").to_str().encode()
    made = {
        "gpt2": GPT2Tokenizer(),
        "bpe": train_bpe([LEARNT], 330),
        "char": CharTokenizer(LEARNT),
        "foreign": restore_tokenizer("foreign", foreign),
    }
    return {kind: (tokenizer, model_for(tokenizer, 0.5)) for kind, tokenizer in made.items()}


@pytest.fixture(params=KINDS)
def parts(request, by_kind):
    """A tokenizer of each kind in turn, with its model."""
    return by_kind[request.param]


@pytest.fixture
def chars(by_kind):
    return by_kind["char"]


def say(parts, *scripts: list[int], stop=(), n_tokens: int | None = None) -> list[Piece]:
    """What stream_text gives where the rows' choices are these tokens."""
    tokenizer, model = parts
    steps = zip(*(itertools.chain(script, itertools.repeat(0)) for script in scripts), strict=True)
    n_tokens = n_tokens or max(map(len, scripts))
    prompts = ["a"] * len(scripts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            generation, "choose_next", lambda logits, **_: torch.tensor(next(steps))[:, None]
        )
        return list(stream_text(model, tokenizer, prompts, stop=stop, max_new_tokens=n_tokens))


def joined(pieces: list[Piece], row: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.row == row)


def finishes(pieces: list[Piece], row: int = 0) -> list[str | None]:
    return [piece.finish for piece in pieces if piece.row == row]


def test_an_end_of_turn_ends_a_text_as_the_end_of_text_does(parts, monkeypatch):
    tokenizer, model = parts
    ids = tokenizer.encode("abc")
    for end, stop_ids in ((ids[-1], ids[-1:]), (tokenizer.end_of_text_id, ())):
        script = iter([*tokenizer.encode("a b"), end, 0, 0])
        monkeypatch.setattr(
            generation,
            "choose_next",
            lambda *_, script=script, **__: torch.tensor([[next(script)]]),
        )
        pieces = list(stream_text(model, tokenizer, "a", stop_ids=stop_ids, max_new_tokens=9))
        assert (joined(pieces), finishes(pieces)[-1]) == ("a b", "stop")
        assert pieces[-1].token.id == end


def test_chinese_and_emoji_stream_without_a_broken_character(parts):
    text = "a" + EMOJI + "𠮷𡃁 e\u0301 " + CHINESE
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


def test_a_character_that_stays_incomplete_is_shown_as_such_at_the_end(parts):
    tokenizer, _ = parts
    ids = tokenizer.encode("a🦜")  # which none has learnt
    assert len(ids) > 2
    for script in (ids[:-1], [*ids[:-1], tokenizer.end_of_text_id]):
        pieces = say(parts, script)
        assert joined(pieces) == tokenizer.decode(ids[:-1])
        assert joined(pieces).startswith("a\ufffd")
        assert not any("\ufffd" in piece.text for piece in pieces[:-1])


def test_rows_keep_their_halves_of_characters_apart(parts):
    tokenizer, _ = parts
    scripts = [tokenizer.encode(text) for text in ("🦜🦜🦜", "x🐢🐢", "yy🐙🐙")]
    shortest = min(map(len, scripts))
    pieces = say(parts, *scripts, n_tokens=shortest)
    for row, script in enumerate(scripts):
        assert joined(pieces, row) == tokenizer.decode(script[:shortest])
    assert [piece.row for piece in pieces[:6]] == [0, 1, 2, 0, 1, 2]


def first_complete(text: str, stops: list[str]) -> int | None:
    """Where the stop string begins that is the first to be complete, of equals the longest."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if begins:
            return min(begins)
    return None


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@example(["abc"], ["b", "abc"])
@example(["a", "ab", "abc"], ["aab", "bc"])
@example(["ab", "abab", "c"], ["ababc"])  # the true one begins inside a false one
@example(["ab", "c"], ["", "bca", "cab"])  # which come to nothing
@example(["abc"], [""])
@given(
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=8),
    st.lists(st.text("abc", max_size=4), max_size=3),
)
def test_how_tokens_cut_a_text_changes_nothing_and_nothing_is_held_too_long(by_kind, cut, stops):
    tokenizer, model = by_kind["bpe"]
    token_of = {tokenizer.token_bytes(i): i for i in range(256, tokenizer.end_of_text_id)}
    assert {b"ab", b"abc"} <= token_of.keys()  # so that a token may have a stop string inside
    ids = []
    for part in cut:
        token = token_of.get(part.encode())
        ids += tokenizer.encode(part) if token is None else [token]
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


def test_rows_stop_each_at_its_own_time(chars):
    texts = ["abc abc", "the bell of the", "river, river", "bell"]
    pieces = say(chars, *map(chars[0].encode, texts), stop=["c", "bell"], n_tokens=12)
    assert [joined(pieces, row) for row in range(4)] == ["ab", "the ", "river, river", ""]
    assert [len(finishes(pieces, row)) for row in range(4)] == [3, 8, 12, 4]
    assert [finishes(pieces, row)[-1] for row in range(4)] == ["stop", "stop", "length", "stop"]


def test_neither_the_prompt_nor_half_a_character_is_part_of_a_stop_string(chars):
    encode = chars[0].encode
    assert joined(say(chars, encode("bc abc"), stop=["abc"])) == "bc "  # behind the prompt "a"
    ids = encode("a🦜b")
    assert joined(say(chars, ids, stop=["\ufffd"])) == "a🦜b"
    assert joined(say(chars, ids[:-2], stop=["\ufffd"])) == "a"
    assert joined(say(chars, ids, stop=["🦜"])) == "a"


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


def test_a_row_with_its_last_token_ends_once_and_no_more_are_drawn(chars, monkeypatch):
    (tokenizer, model), spell = chars, chars[0].encode
    end = tokenizer.end_of_text_id
    assert finishes(say(chars, spell("ab"))) == [None, "length"]
    assert finishes(say(chars, [*spell("a"), end])) == [None, "stop"]
    assert finishes(say(chars, spell("ab"), stop=["b"])) == [None, "stop"]
    assert finishes(say(chars, spell("a"))) == ["length"]
    passes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a: passes.append(1) or hidden(*a))
    pieces = say(chars, spell("abc"), [*spell("a"), end], stop=["c"], n_tokens=50)
    assert len(passes) == 3 and len(pieces) == 5


def drawn(parts, prompts: list[str], **options) -> list[list[int]]:
    """The tokens of each row, at a seed."""
    tokenizer, model = parts
    options = {"max_new_tokens": 9, "generator": torch.Generator().manual_seed(1)} | options
    rows: dict[int, list[int]] = {}
    for piece in stream_text(model, tokenizer, prompts, **options):
        rows.setdefault(piece.row, []).append(piece.token.id)
    return [rows[row] for row in sorted(rows)]


def from_ids(parts, ids: list[list[int]], **options) -> list[list[int]]:
    """The same from token ids."""
    tokenizer, model = parts
    given = {"max_new_tokens": 9, "generator": torch.Generator().manual_seed(1)}
    given |= {"end_of_text_id": tokenizer.end_of_text_id}
    steps = list(stream(model, ids, **asdict(SamplingConfig()) | given | options))
    return [[token.id for token in row if token] for row in zip(*steps, strict=True)]


def test_text_goes_on_as_its_ids_do_and_no_other_randomness_is_used(parts):
    encode, state = parts[0].encode, torch.get_rng_state()
    for prompts in (
        ["a", "the bell of the river", "春江"],
        ["\x00\x1f𠮷🦜 \ufeff\u202e é ﷽"],  # characters that no tokenizer here has seen
        [f"ab{END_OF_TEXT}cd<eos><pad><|im_end|></s>"],
    ):
        expected = from_ids(parts, [encode(prompt) for prompt in prompts], num_samples=3)
        assert drawn(parts, prompts, num_samples=3) == expected
    options = {"max_new_tokens": 15, "temperature": 0.0}
    assert drawn(parts, ["a"], **options) == from_ids(parts, [encode("a")], **options)
    assert torch.equal(torch.get_rng_state(), state)
    prompt = f"the bell of the river, {CHINESE}" * 20
    expected = from_ids(parts, [encode(prompt)[-64:], encode("a")], repetition_penalty=1.1)
    assert drawn(parts, [prompt, "a"], repetition_penalty=1.1) == expected


def test_a_control_token_s_name_is_read_as_text_and_no_text_as_its_end(parts, monkeypatch):
    tokenizer, _ = parts
    model = model_for(tokenizer, 0.5, context_length=200)
    read, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *a: read.append(ids) or hidden(ids, *a))
    prompt = f"a{END_OF_TEXT}b<eos>{END_OF_TEXT}"
    for text in (prompt, ""):
        list(stream_text(model, tokenizer, [text], max_new_tokens=1))
    named, empty = (ids[0].tolist() for ids in read)
    end = tokenizer.end_of_text_id
    assert end not in named
    assert len(named) > 8
    assert tokenizer.decode(named) == prompt
    assert empty == [end]
    assert drawn(parts, ["", "a"]) == from_ids(parts, [[end], tokenizer.encode("a")])


def test_settings_and_prompts_that_make_no_sense_are_refused_together(chars):
    with pytest.raises(SettingsError) as caught:
        drawn(chars, [], tempreture=1.0, max_new_tokens=0)
    for word in ("tempreture", "max_new_tokens", "prompt"):
        assert word in str(caught.value)


def test_text_survives_the_way_to_ids_and_back(by_kind):
    tokenizer, _ = by_kind["gpt2"]
    ids = text_to_token_ids("Every effort moves you", tokenizer)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[6109, 3626, 6100, 345]]
    ids = text_to_token_ids("a\n\n  b\t🙂潮", tokenizer)
    assert token_ids_to_text(ids, tokenizer) == token_ids_to_text(ids[0], tokenizer)
    assert token_ids_to_text(ids, tokenizer) == "a\n\n  b\t🙂潮"
    assert token_ids_to_text(ids[:, :-1], tokenizer) == "a\n\n  b\t🙂\ufffd"
    with pytest.raises(SettingsError, match="give the model a word to start with"):
        text_to_token_ids("", tokenizer)
