"""Tokens in files: the same as from the whole text, found again, and never a damaged one."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import REPOSITORY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from engine.errors import DataError, ResourceError
from text import token_cache
from text.corpora import CORPORA
from text.documents import DataSpec, ReadingReport
from text.token_cache import TokenizedText, choose_validation, cut_into_chunks, find_cut, tokenize
from text.tokenizer import CharTokenizer, GPT2Tokenizer, train_bpe

ENGLISH, CHINESE = (
    (REPOSITORY / "corpus" / f"sample-{code}.txt").read_bytes().decode() for code in ("en", "zh")
)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def by_kind() -> dict:
    return {
        "gpt2": GPT2Tokenizer(),
        "bpe": train_bpe([ENGLISH[:9000] + CHINESE[:9000]], 600),
        "char": CharTokenizer(ENGLISH),
    }


def write_lines(path: Path, documents: list[str], field: str = "text") -> str:
    path.write_text(
        "".join(json.dumps({field: document}) + "\n" for document in documents), encoding="utf-8"
    )
    return str(path)


def write_text(path: Path, text: str) -> str:
    path.write_bytes(text.encode("utf-8"))
    return str(path)


def tokens_of(text: TokenizedText) -> list[int]:
    tokens = np.fromfile(text.path, dtype=text.dtype).tolist()
    assert len(tokens) == text.n_tokens
    return tokens


def documents_of(text: TokenizedText, tokens: list[int]) -> list[str]:
    """The documents that tokens are made of; "" shows an end-of-text too many."""
    documents = [[]]
    for token in tokens:
        if token == text.tokenizer.end_of_text_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [text.tokenizer.decode(ids) for ids in documents]


def sides_of(text: TokenizedText) -> tuple[list[str], list[str]]:
    tokens = tokens_of(text)
    return (
        documents_of(text, tokens[: text.n_train]),
        documents_of(text, tokens[text.n_train :]),
    )


def never_read(*_):
    raise AssertionError("the text was read again")


# ------------------------------------------------------------------------------ cutting

WORDS = st.sampled_from(
    [
        *("I'll", "don't", "'Tis", "it's", "word", "Wörter", "12", "3.14", "a_b", "²", "春江潮水"),
        *("مرحبا", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\u00a0", ".", ", ", "...", "?!"),
        *("，", "。", "'", "’", "(", ")", "\x00", "👩\u200d👩\u200d👧", "_", "-", "e\u0301"),
    ]
)
UNCUT = st.text(st.sampled_from("ab春_-'’👍\u00a0\u200b\u0301"), max_size=400)
TEXTS = st.lists(WORDS, max_size=150).map("".join) | st.text(max_size=200) | UNCUT


@pytest.mark.parametrize("chunk", [16, 50, 1000])
@settings(max_examples=120, derandomize=True, deadline=None, database=None)
@given(text=TEXTS)
@example(text="word " * 500)
@example(text="x" * 5000 + " y")
@example(text=" " * 3000)
def test_tokens_of_the_chunks_equal_tokens_of_the_whole_text(by_kind, chunk, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "CHUNK", chunk)
        chunks = list(cut_into_chunks([(text, True)]))
    assert "".join(part for part, _ in chunks) == text
    assert [is_last for _, is_last in chunks] == [False] * (len(chunks) - 1) + [True]
    for tokenizer in by_kind.values():
        assert [i for part, _ in chunks for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_a_text_with_places_to_cut_is_cut_about_every_chunk(monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 100)
    chunks = [part for part, _ in cut_into_chunks([(ENGLISH, True)])]
    assert "".join(chunks) == ENGLISH
    assert all(70 <= len(part) <= 100 for part in chunks[:-1])


@pytest.mark.parametrize("last", ["x" * 20, "x " * 20])
def test_what_goes_on_without_a_place_to_cut_is_refused(monkeypatch, last):
    monkeypatch.setattr(token_cache, "CHUNK", 16)
    monkeypatch.setattr(token_cache, "MOST_UNCUT", 100)
    documents = [("word " * 99 + "x" * 90, False), (last, True)]
    if last.startswith("x "):
        assert "".join(part for part, _ in cut_into_chunks(documents)) == "".join(
            piece for piece, _ in documents
        )
        return
    with pytest.raises(DataError, match="more than 100 characters in a row") as caught:
        list(cut_into_chunks(documents))
    assert "' xxxxx" in str(caught.value)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(TEXTS, st.lists(st.integers(0, 1000), max_size=8), st.sampled_from([16, 50]))
@example("x" * 20 + " y z", [20], 16)  # what may end a word comes with the next piece
def test_where_a_text_is_cut_does_not_depend_on_the_pieces_it_comes_in(text, stops, chunk):
    bounds = sorted({0, len(text), *(min(stop, len(text)) for stop in stops)})
    if len(bounds) == 1:
        bounds.append(0)
    pieces = [text[i:j] for i, j in itertools.pairwise(bounds)]
    flags = [False] * (len(pieces) - 1) + [True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "CHUNK", chunk)
        expected = list(cut_into_chunks([(text, True)]))
        assert list(cut_into_chunks(zip(pieces, flags, strict=True))) == expected


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(TEXTS | st.lists(st.characters(exclude_categories=["Cs"]) | WORDS).map("".join))
@example("'s, 'saw. I'll, 'LL.")
def test_a_cut_at_any_place_that_is_allowed_leaves_the_tokens_alone(by_kind, text):
    places = [match.end() for match in token_cache._CUT.finditer(text)]
    for tokenizer in by_kind.values():
        whole = tokenizer.encode(text)
        for place in places:
            assert tokenizer.encode(text[:place]) + tokenizer.encode(text[place:]) == whole


@pytest.mark.parametrize("mark", [".", " ", "\n", "，", "\u3000"], ids=ascii)
def test_every_letter_and_digit_of_unicode_can_be_cut_off_from_what_follows(by_kind, mark):
    letters = [
        chr(code)
        for code in range(0x110000)
        if not 0xD800 <= code < 0xE000 and token_cache._CUT.match(chr(code) + mark)
    ]
    assert len(letters) > 100_000
    gpt2 = by_kind["gpt2"]
    # what follows must begin anew: a mark and the letter behind it, as in the whole text
    text = "".join(letter + mark + "." for letter in letters)
    expected = [
        token
        for letter in letters
        for part in (letter, mark + ".")
        for token in (gpt2.encode(part))
    ]
    assert gpt2.encode(text) == expected


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(1, 9000), st.sampled_from("ab_")), max_size=5),
    st.integers(0, 20_000),
    st.integers(1, 20_000),
    st.booleans(),
)
def test_the_cut_is_the_last_place_before_the_mark_or_the_first_behind_it(
    runs, start, length, is_searched
):
    text = "".join(f"{letter * count} " for count, letter in runs)
    start = min(start, len(text))
    near = min(start + length, len(text))
    places = [match.end() for match in token_cache._CUT.finditer(text, start)]
    before = [place for place in places if place <= near]
    behind = [place for place in places if place > near]
    expected = before[-1] if before else behind[0] if behind else None
    # what is known to hold no place changes nothing
    searched = places[0] - 1 if is_searched and places else 0
    assert find_cut(text, start, near, searched) == expected


# ------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("chunk", [50, 1000, None])
@pytest.mark.parametrize("name", ["gpt2", "bpe:500", "char"])
def test_tokens_of_a_file_equal_those_of_its_whole_text(tmp_path, cache, monkeypatch, name, chunk):
    whole = (ENGLISH + CHINESE.replace("\n", "\r\n")) + "\x00 👩‍👩‍👧 " + "ab" * 700
    if chunk:
        monkeypatch.setattr(token_cache, "CHUNK", chunk)
    # making tokenizer.json of GPT-2 takes long, and it is restored without
    monkeypatch.setattr(GPT2Tokenizer, "to_json", lambda self: "{}")
    text = tokenize(DataSpec((write_text(tmp_path / "a.txt", whole),)), name, 0.9, cache)
    assert tokens_of(text) == text.tokenizer.encode(whole)
    assert text.n_train is None
    assert text.tokenizer.kind == name.partition(":")[0]


@pytest.mark.parametrize("chunk", [16, 1 << 20])
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    documents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(str.strip),
        min_size=1,
        max_size=45,
    )
)
def test_documents_are_joined_by_one_end_of_text_and_sides_end_without(
    tmp_path_factory, chunk, documents
):
    folder = tmp_path_factory.mktemp("documents")
    spec = DataSpec((write_lines(folder / "a.jsonl", documents),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "CHUNK", chunk)
        text = tokenize(spec, "char", 0.7, folder / "cache")
    if text.n_train is None:
        assert len(documents) < 20 or len(set(documents)) == 1
        assert documents_of(text, tokens_of(text)) == documents
        return
    train, val = sides_of(text)
    assert train and val
    assert not set(train) & set(val)
    is_val = set(val)
    assert train == [document for document in documents if document not in is_val]
    assert val == [document for document in documents if document in is_val]


@pytest.mark.parametrize(("words", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_tokens_take_two_bytes_up_to_a_vocabulary_of_65536(tmp_path, cache, words, dtype):
    vocabulary = {f"w{i}": i for i in range(words)}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "words.json"))
    spec = DataSpec((write_lines(tmp_path / "a.jsonl", [f"w1 w{words - 1}", "w2 w3"]),))
    text = tokenize(spec, str(tmp_path / "words.json"), 0.9, cache)
    assert text.tokenizer.vocab_size == words + 1  # end-of-text comes last
    assert text.dtype == dtype
    assert tokens_of(text) == [1, words - 1, words, 2, 3]
    assert text.path.stat().st_size == 5 * np.dtype(dtype).itemsize


# ------------------------------------------------------------------------------ splitting


def numbered(count: int) -> list[str]:
    return [f"document {i} of {count}" for i in range(count)]


@pytest.mark.parametrize(("count", "by_hash"), [(1, False), (19, False), (20, True), (50, True)])
def test_few_documents_are_cut_by_position_and_more_by_a_hash(tmp_path, cache, count, by_hash):
    spec = DataSpec((write_lines(tmp_path / "a.jsonl", numbered(count)),))
    text = tokenize(spec, "char", 0.7, cache)
    assert (text.n_train is not None) == by_hash


@pytest.mark.parametrize("train_ratio", [0.5, 0.9, 0.98])
def test_about_the_share_asked_for_is_trained_on(tmp_path, cache, train_ratio):
    spec = DataSpec((write_lines(tmp_path / "a.jsonl", numbered(2000)),))
    train, val = sides_of(tokenize(spec, "char", train_ratio, cache))
    assert sorted(train + val) == sorted(numbered(2000))
    assert abs(len(train) / 2000 - train_ratio) < 0.025


@pytest.mark.parametrize("chunk", [30, 1 << 20])
def test_the_order_of_documents_and_files_does_not_move_them_between_sides(
    tmp_path, cache, monkeypatch, chunk
):
    monkeypatch.setattr(token_cache, "CHUNK", chunk)
    documents = [*numbered(60), *numbered(60)[:20]]
    documents += [f"{i}: " + "longer than a chunk, " * i for i in range(20)]
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(documents)
        names = tuple(
            write_lines(tmp_path / f"{seed}-{part}.jsonl", documents[part::3]) for part in range(3)
        )
        train, val = sides_of(tokenize(DataSpec(names), "char", 0.8, cache))
        assert sorted(train + val) == sorted(documents)
        assert not set(train) & set(val)  # equal documents are on one side
        found.append(set(val))
    assert found[0] == found[1] == found[2]
    assert 0 < len(found[0]) < 40


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=20, max_size=60),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
)
@example([0] * 19 + [1], 0.999)
@example([2**64 - 1] * 19 + [2**64 - 2], 0.001)
def test_no_side_is_empty_and_equal_documents_stay_together(digests, train_ratio):
    is_val = choose_validation(array("Q", digests), train_ratio)
    if len(set(digests)) == 1:
        assert is_val is None
        return
    sides = list(zip(digests, is_val.tolist(), strict=True))
    train = {digest for digest, on_val in sides if not on_val}
    val = {digest for digest, on_val in sides if on_val}
    assert train and val
    assert max(train) < min(val)


def test_documents_that_are_all_equal_are_cut_by_position(tmp_path, cache):
    spec = DataSpec((write_lines(tmp_path / "a.jsonl", ["the same"] * 30),))
    text = tokenize(spec, "char", 0.5, cache)
    assert text.n_train is None
    assert documents_of(text, tokens_of(text)) == ["the same"] * 30
    assert text.report["duplicate_documents"] == 29


@pytest.mark.parametrize("count", [1, 2, 40])
def test_validation_texts_of_their_own_are_what_is_validated_on(tmp_path, cache, count):
    train = [f"train {i}" for i in range(count)]
    val = ["val one", "val two"]
    spec = DataSpec(
        (write_lines(tmp_path / "a.jsonl", train),), (write_lines(tmp_path / "b.jsonl", val),)
    )
    text = tokenize(spec, "char", 0.5, cache)
    assert sides_of(text) == (train, val)
    assert text.report["tokens"] == text.n_tokens
    # the tokenizer is made from what is trained on
    assert text.tokenizer.chars == sorted(set("".join(train)))


def test_a_validation_text_that_is_empty_is_not_replaced_by_another(tmp_path, cache):
    spec = DataSpec(
        (write_text(tmp_path / "a.txt", ENGLISH),), (write_text(tmp_path / "b.txt", " \n"),)
    )
    text = tokenize(spec, "char", 0.5, cache)
    assert text.n_train == text.n_tokens == len(ENGLISH)


@pytest.mark.parametrize("name", ["char", "bpe:500", "auto"])
@pytest.mark.parametrize("content", ["", " \n\t\n"], ids=["nothing", "blanks"])
def test_a_text_without_any_text_is_an_error_and_leaves_no_entry(tmp_path, cache, name, content):
    spec = DataSpec((write_text(tmp_path / "a.txt", content),))
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        tokenize(spec, name, 0.9, cache)
    assert os.listdir(cache / "tokens") == []


# ------------------------------------------------------------------------------ the report


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("chunk", [16, 1 << 20])
@pytest.mark.parametrize("has_val", [False, True])
def test_every_figure_of_the_report_equals_a_naive_count(
    tmp_path, cache, monkeypatch, count, chunk, has_val
):
    monkeypatch.setattr(token_cache, "CHUNK", chunk)
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [*numbered(count), "", "  ", "the same", "the same", "老友 the same"]
    write_lines(folder / "a.jsonl", lines)
    write_text(folder / "b.txt", "one\r\ntwo\r\n")
    write_text(folder / "c.txt", "one\r\ntwo\r\n")
    (folder / "d.bin").write_bytes(b"\x00\x01" * 100)
    (folder / ".hidden").write_text("x")
    val = (write_lines(tmp_path / "v.jsonl", ["the same", "unheard of ŝ"]),) if has_val else ()
    text = tokenize(DataSpec((str(folder),), val), "char", 0.8, cache)

    documents = [line for line in lines if line.strip()] + ["one\r\ntwo\r\n"] * 2
    documents += ["the same", "unheard of ŝ"] * has_val
    paths = [folder / "a.jsonl", folder / "b.txt", folder / "c.txt", *map(Path, val)]
    in_file = [len(lines) - 2, 1, 1, 2][: len(paths)]
    tokens = tokens_of(text)
    characters = sum(map(len, documents))
    assert text.report == {
        "files": [
            {
                "name": path.name,
                "path": str(path),
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "documents": n_documents,
            }
            for path, n_documents in zip(paths, in_file, strict=True)
        ],
        "passed_over": [
            {"name": str(folder / ".hidden"), "reason": "hidden"},
            {"name": str(folder / "d.bin"), "reason": "binary"},
        ],
        "notes": [f"{name}.txt: lines end in CRLF; kept as they are" for name in "bc"],
        "documents": len(documents),
        "empty_documents": 2,
        "duplicate_documents": len(documents) - len(set(documents)),
        "documents_on_both_sides": int(has_val),  # "the same"
        "bytes": sum(path.stat().st_size for path in paths),
        "characters": characters,
        "tokens": len(tokens),
        "tokens_per_character": len(tokens) / characters,
        "tokenizer": text.tokenizer.name,
        "vocabulary": text.tokenizer.vocab_size,
        "vocabulary_used": len(set(tokens)),
    }


def test_the_report_names_the_files_as_they_are_now(tmp_path, cache):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    write_text(first / "a.txt", ENGLISH)
    (first / "b.bin").write_bytes(b"\0")
    made = tokenize(DataSpec((str(first),)), "char", 0.9, cache)
    assert [entry["name"] for entry in made.report["passed_over"]] == [str(first / "b.bin")]
    shutil.copytree(first, second)
    (second / "b.bin").unlink()
    found = tokenize(DataSpec((str(second),)), "char", 0.9, cache)
    assert found.path == made.path
    assert found.report["passed_over"] == []
    assert [entry["path"] for entry in found.report["files"]] == [str(second / "a.txt")]
    (second / "a.txt").rename(second / "c.txt")
    renamed = tokenize(DataSpec((str(second),)), "char", 0.9, cache)
    assert [entry["name"] for entry in renamed.report["files"]] == ["c.txt"]
    assert tokens_of(renamed) == tokens_of(made)
    assert renamed.path == made.path


# ------------------------------------------------------------------------------ found again


@pytest.mark.parametrize("name", ["char", "bpe:400", "tokenizer.json"])
def test_a_text_that_has_not_changed_is_not_read_again(tmp_path, cache, monkeypatch, by_kind, name):
    if name == "tokenizer.json":
        name = write_text(tmp_path / name, by_kind["bpe"].to_json())
    spec = DataSpec(
        (write_lines(tmp_path / "a.jsonl", numbered(30)),), (write_text(tmp_path / "b.txt", "b"),)
    )
    made = tokenize(spec, name, 0.8, cache)
    monkeypatch.setattr(token_cache, "read_documents", never_read)
    monkeypatch.setattr(token_cache, "file_sha256", never_read)
    found = tokenize(spec, name, 0.8, cache)
    assert tokens_of(found) == tokens_of(made)
    assert found.tokenizer.fingerprint == made.tokenizer.fingerprint
    assert found.tokenizer.kind == made.tokenizer.kind
    same = {"tokenizer": None}
    assert replace(found, **same) == replace(made, **same)


def test_a_file_with_a_new_time_and_the_same_content_is_found(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.txt"
    spec = DataSpec((write_text(path, ENGLISH),))
    made = tokenize(spec, "char", 0.9, cache)
    os.utime(path, (1, 1))
    monkeypatch.setattr(token_cache, "read_documents", never_read)
    assert tokenize(spec, "char", 0.9, cache).path == made.path
    monkeypatch.setattr(token_cache, "file_sha256", never_read)  # and remembered by its new time
    assert tokenize(spec, "char", 0.9, cache).path == made.path


@pytest.mark.parametrize("keeps_time", [True, False])
def test_a_file_is_known_by_path_size_and_time(tmp_path, cache, keeps_time):
    path = tmp_path / "a.txt"
    spec = DataSpec((write_text(path, "abcabc"),))
    made = tokenize(spec, "char", 0.9, cache)
    facts = path.stat()
    write_text(path, "abcabb")
    later = facts.st_mtime_ns if keeps_time else facts.st_mtime_ns + 1000
    os.utime(path, ns=(facts.st_atime_ns, later))
    again = tokenize(spec, "char", 0.9, cache)
    expected = "abcabc" if keeps_time else "abcabb"
    assert again.tokenizer.decode(tokens_of(again)) == expected
    assert (again.path == made.path) == keeps_time


def test_a_file_that_has_grown_or_come_to_a_folder_is_read(tmp_path, cache):
    folder = tmp_path / "texts"
    folder.mkdir()
    spec = DataSpec((str(folder),))
    expected = {}
    for name, content in [("a.txt", "aa"), ("a.txt", "aaa"), ("b.txt", "b")]:
        write_text(folder / name, content)
        expected[name] = content
        text = tokenize(spec, "char", 0.9, cache)
        assert documents_of(text, tokens_of(text)) == list(expected.values())


def test_each_request_has_an_entry_of_its_own(tmp_path, cache, by_kind):
    both = [{"text": line, "body": f"({line})"} for line in numbered(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, both)))
    file = tmp_path / "tokenizer.json"
    write_text(file, by_kind["bpe"].to_json())
    spec = DataSpec((str(path),))
    requests = [
        (spec, "char", 0.8),
        (spec, "char", 0.6),
        (spec, "bpe:400", 0.8),
        (spec, "bpe:401", 0.8),
        (spec, str(file), 0.8),
        (replace(spec, field="body"), "char", 0.8),
        (replace(spec, val=spec.train), "char", 0.8),
        (replace(spec, train=spec.train * 2), "char", 0.8),
        (replace(spec, encoding="latin-1"), "char", 0.8),
    ]
    made = [tokenize(*request, cache) for request in requests]
    assert len({text.path for text in made}) == len(requests)
    assert [text.path for text in made] == [tokenize(*request, cache).path for request in requests]
    write_text(file, CharTokenizer("abc").to_json())
    changed = tokenize(spec, str(file), 0.8, cache)
    assert changed.path not in {text.path for text in made}
    assert changed.tokenizer.kind == "char"


def test_another_format_makes_every_entry_anew(tmp_path, cache, monkeypatch):
    spec = DataSpec((write_text(tmp_path / "a.txt", ENGLISH),))
    made = tokenize(spec, "char", 0.9, cache)
    monkeypatch.setattr(token_cache, "FORMAT", token_cache.FORMAT + 1)
    assert tokenize(spec, "char", 0.9, cache).path != made.path


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"state": 1, "entry": 2}'])
def test_a_damaged_memory_of_a_request_costs_no_more_than_a_look_at_the_text(
    tmp_path, cache, monkeypatch, content
):
    spec = DataSpec((write_text(tmp_path / "a.txt", ENGLISH),))
    made = tokenize(spec, "char", 0.9, cache)
    [found] = (cache / "tokens").glob("found-*.json")
    found.write_bytes(content)
    monkeypatch.setattr(token_cache, "read_documents", never_read)
    assert tokenize(spec, "char", 0.9, cache).path == made.path


# ------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["tokens.bin", "tokenizer.json", "entry.json"])
def test_an_entry_that_is_damaged_anywhere_is_made_anew_and_said(tmp_path, cache, capsys, name):
    spec = DataSpec((write_text(tmp_path / "a.txt", ENGLISH[:700]),))
    made = tokenize(spec, "char", 0.9, cache)
    expected = tokens_of(made)
    path = made.path.with_name(name)
    content = path.read_bytes()
    capsys.readouterr()
    damages = [None, content + b" \x00", b""]
    for at in range(0, len(content), 97):
        damages += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], content[:at]]
    for damage in damages:
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        again = tokenize(spec, "char", 0.9, cache)
        assert f"{made.path.parent} is damaged" in capsys.readouterr().out, damage
        assert tokens_of(again) == expected
        assert path.read_bytes() == content
    tokenize(spec, "char", 0.9, cache)
    assert capsys.readouterr().out == ""


def test_a_byte_changed_in_any_block_is_noticed(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(token_cache, "BLOCK", 100)
    spec = DataSpec((write_text(tmp_path / "a.txt", ENGLISH[:700]),))
    made = tokenize(spec, "char", 0.9, cache)
    content = made.path.read_bytes()
    assert len(content) == 1400
    capsys.readouterr()
    for at in range(0, 1400, 100):
        made.path.write_bytes(content[:at] + bytes([content[at] ^ 128]) + content[at + 1 :])
        assert made.path.read_bytes() != content
        tokenize(spec, "char", 0.9, cache)
        assert "is damaged" in capsys.readouterr().out
        assert made.path.read_bytes() == content


STEPS = ("make_tokenizer", "_write_tokens", "_arrange", "write_atomically", "_block_hashes")


@pytest.mark.parametrize("step", [*STEPS, "write_json", "rename_folder"])
def test_a_build_that_is_stopped_leaves_nothing_and_the_next_is_right(
    tmp_path, cache, monkeypatch, step
):
    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    spec = DataSpec((write_lines(tmp_path / "a.jsonl", numbered(30)),))
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, step, stop)
        with pytest.raises(KeyboardInterrupt):
            tokenize(spec, "char", 0.8, cache)
    assert os.listdir(cache / "tokens") == []
    train, val = sides_of(tokenize(spec, "char", 0.8, cache))
    assert sorted(train + val) == sorted(numbered(30))


def test_what_a_killed_build_left_is_removed_after_a_day(tmp_path, cache):
    tokens = cache / "tokens"
    day_ago = time.time() - token_cache.ORPHAN_AGE_S
    for name, age in [(".tmp-1-old", -60), (".tmp-2-young", 60), ("kept", -60)]:
        (tokens / name).mkdir(parents=True)
        (tokens / name / "all.bin").write_bytes(b"x")
        os.utime(tokens / name, (day_ago + age, day_ago + age))
    for name, age in [(".tmp-3-old.json", -60), (".tmp-4-young.json", 60)]:
        (tokens / name).write_bytes(b"x")
        os.utime(tokens / name, (day_ago + age, day_ago + age))
    tokenize(DataSpec((write_text(tmp_path / "a.txt", ENGLISH),)), "char", 0.9, cache)
    left = {path.name for path in tokens.iterdir()}
    assert {".tmp-2-young", "kept", ".tmp-4-young.json"} <= left
    assert not left & {".tmp-1-old", ".tmp-3-old.json"}


@pytest.mark.parametrize("in_the_way", ["cache", "cache/tokens"])
def test_a_cache_that_cannot_be_written_is_a_resource_error(tmp_path, cache, in_the_way):
    spec = DataSpec((write_text(tmp_path / "a.txt", ENGLISH),))
    (tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    (tmp_path / in_the_way).write_text("a file")
    with pytest.raises(ResourceError, match="can't write") as caught:
        tokenize(spec, "char", 0.9, cache)
    assert str(tmp_path / in_the_way) in str(caught.value)
    assert (tmp_path / in_the_way).read_text() == "a file"


def test_a_file_where_the_entry_belongs_is_a_resource_error(tmp_path, cache):
    spec = DataSpec((write_text(tmp_path / "a.txt", ENGLISH),))
    folder = tokenize(spec, "char", 0.9, cache).path.parent
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(ResourceError, match="can't write"):
        tokenize(spec, "char", 0.9, cache)
    assert not list((cache / "tokens").glob(".tmp-*"))


# ------------------------------------------------------------------------------ which text


def test_equal_tokens_cut_alike_have_equal_hashes_wherever_the_text_lies(tmp_path, cache):
    one, other = (write_text(tmp_path / name, ENGLISH) for name in ("a.txt", "b.md"))
    made = tokenize(DataSpec((one,)), "char", 0.9, cache)
    assert len(made.sha256) == 64
    again = tokenize(DataSpec((one,)), "char", 0.9, cache)
    moved = tokenize(DataSpec((other,)), "char", 0.9, cache)
    elsewhere = tokenize(DataSpec((one,)), "char", 0.9, tmp_path / "other cache")
    assert moved.path != made.path
    assert {text.sha256 for text in (again, moved, elsewhere)} == {made.sha256}


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_one_changed_byte_of_a_text_changes_its_hash(tmp_path, cache, at):
    text = list(ENGLISH)
    before = tokenize(
        DataSpec((write_text(tmp_path / "a.txt", "".join(text)),)), "char", 0.9, cache
    )
    text[at] = "e" if text[at] != "e" else "a"
    after = tokenize(DataSpec((write_text(tmp_path / "b.txt", "".join(text)),)), "char", 0.9, cache)
    assert (before.n_tokens, before.n_train) == (after.n_tokens, after.n_train)
    assert before.sha256 != after.sha256


def test_the_same_tokens_cut_elsewhere_have_another_hash(tmp_path, cache):
    tokenizer = write_text(tmp_path / "tokenizer.json", CharTokenizer(ENGLISH).to_json())
    texts = []
    for cut in (1000, 1001):
        train = write_text(tmp_path / f"train-{cut}.txt", ENGLISH[:cut])
        val = write_text(tmp_path / f"val-{cut}.txt", ENGLISH[cut:])
        texts.append(tokenize(DataSpec((train,), (val,)), tokenizer, 0.9, cache))
    assert [text.n_train for text in texts] == [1000, 1001]
    assert tokens_of(texts[0]) == tokens_of(texts[1])
    assert texts[0].sha256 != texts[1].sha256


@pytest.fixture
def verdict(monkeypatch) -> bytes:
    """A text in place of the-verdict, which no server has: nobody listens at its address."""
    content = CHINESE.encode()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/text.txt"
    known = replace(CORPORA["the-verdict"], url=url, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(CORPORA, "the-verdict", known)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return content


def save_verdict(cache: Path, content: bytes) -> None:
    """Put the text itself where a download would."""
    path = cache / "corpora" / "the-verdict.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_a_stand_in_is_told_from_the_text_itself_and_taken_as_asked_for(cache, verdict):
    def read(stand_in):
        text = tokenize(DataSpec(("the-verdict",)), "char", 0.9, cache, stand_in=stand_in)
        documents = documents_of(text, tokens_of(text))
        assert text.stood_in == (documents == [ENGLISH]) != (documents == [verdict.decode()])
        assert len(text.notices) == text.stood_in
        return text

    stood_in = read(None)
    assert stood_in.stood_in
    assert "can't be had" in stood_in.notices[0]
    with pytest.raises(DataError, match="the-verdict can't be had"):
        read(False)
    save_verdict(cache, verdict)
    itself = read(None)
    assert not itself.stood_in
    assert read(False).sha256 == itself.sha256 != stood_in.sha256
    as_before = read(True)
    assert (as_before.stood_in, as_before.sha256) == (True, stood_in.sha256)
    assert "as when this run began" in as_before.notices[0]
    (cache / "corpora" / "the-verdict.txt").unlink()
    assert read(None).stood_in


@pytest.mark.parametrize("stand_in", [True, False, None])
def test_a_file_of_ones_own_never_stands_in(tmp_path, cache, verdict, stand_in):
    spec = DataSpec((write_text(tmp_path / "a.txt", ENGLISH),))
    text = tokenize(spec, "char", 0.9, cache, stand_in=stand_in)
    assert (text.stood_in, text.notices) == (False, [])
    assert documents_of(text, tokens_of(text)) == [ENGLISH]


# ------------------------------------------------------------------------------ processes

PROGRAM = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from text.sources import DataSpec
from text.token_cache import tokenize
print("ready", flush=True)
sys.stdin.readline()
text = tokenize(DataSpec((sys.argv[1],)), sys.argv[2], 0.9, Path(sys.argv[3]))
print(text.path, flush=True)
"""


def start(path: Path, name: str, cache: Path) -> subprocess.Popen:
    """A process that builds as soon as it is sent a line."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path), name, str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_that_build_at_once_both_succeed(tmp_path, cache):
    path = tmp_path / "a.txt"
    whole = (ENGLISH + CHINESE) * 20
    write_text(path, whole)
    processes = [start(path, "bpe:500", cache) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0] == answers[1]
    assert not list((cache / "tokens").glob(".tmp-*"))
    text = tokenize(DataSpec((str(path),)), "bpe:500", 0.9, cache)
    assert answers[0] == (f"{text.path}\n", "")
    assert tokens_of(text) == text.tokenizer.encode(whole)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_build_that_is_killed_at_any_moment_leaves_no_half_entry(tmp_path, cache, capsys):
    path = tmp_path / "a.txt"
    whole = (ENGLISH + CHINESE) * 115  # 5 MB
    write_text(path, whole)
    spec = DataSpec((str(path),))
    started_at = time.perf_counter()
    expected = tokens_of(tokenize(spec, "gpt2", 0.9, tmp_path / "other"))
    needed_s = time.perf_counter() - started_at
    chooser = random.Random(11)
    n_killed = 0
    for _ in range(10):
        process = start(path, "gpt2", cache)
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(chooser.uniform(0, needed_s))
        process.send_signal(signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
        process.communicate()
        for folder in (cache / "tokens").glob("[!.]*/"):
            entry = token_cache._open_entry(folder, ReadingReport())
            assert entry is not None and tokens_of(entry) == expected
    assert n_killed > 0
    assert "damaged" not in capsys.readouterr().out
    text = tokenize(spec, "gpt2", 0.9, cache)
    assert tokens_of(text) == expected == text.tokenizer.encode(whole)
    assert "damaged" not in capsys.readouterr().out


def test_documents_in_training_and_validation_text_are_counted(tmp_path, cache):
    for name, lines in (("train", "abcd"), ("val", "cdde")):
        rows = "".join(f'{{"text": "{line}"}}\n' for line in lines)
        write_text(tmp_path / f"{name}.jsonl", rows)
    spec = DataSpec((str(tmp_path / "train.jsonl"),), (str(tmp_path / "val.jsonl"),))
    report = tokenize(spec, "gpt2", 0.9, cache).report
    assert report["documents_on_both_sides"] == 2
    assert report["duplicate_documents"] == 3


def test_what_has_no_place_to_cut_for_very_long_is_refused(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 100)
    monkeypatch.setattr(token_cache, "MOST_UNCUT", 1000)
    write_text(tmp_path / "a.txt", "words, words. " * 100 + "\0" * 1200)
    with pytest.raises(DataError, match="more than 1,000 characters in a row"):
        tokenize(DataSpec((str(tmp_path / "a.txt"),)), "gpt2", 0.9, cache)
    assert not list((cache / "tokens").glob("*"))


def test_the_tokens_are_the_same_whatever_the_locale(tmp_path):
    write_text(tmp_path / "a.txt", "caf\u00e9, \u6625\u6c5f. \U0001f600\r\n" * 50)
    code = (
        "import sys; from pathlib import Path\n"
        "from text.sources import DataSpec; from text.token_cache import tokenize\n"
        "print(tokenize(DataSpec(('a.txt',)), 'char', 0.9, Path(sys.argv[1])).path)"
    )
    entries = []
    for number, locale in enumerate(({"PYTHONUTF8": "0", "LC_ALL": "C"}, {"PYTHONUTF8": "1"})):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / f"cache-{number}")],
            cwd=tmp_path,
            env=os.environ | locale | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        path = Path(done.stdout.strip())
        entries.append((path.parent.name, path.read_bytes()))
    assert entries[0] == entries[1]


def test_a_tokenizer_from_elsewhere_gets_each_document_whole(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 16)
    made = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # which puts a blank before each text
    path = tmp_path / "tokenizer.json"
    path.write_text(made.to_str(), encoding="utf-8")
    whole = "one, two. " * 40
    write_text(tmp_path / "a.txt", whole)
    text = tokenize(DataSpec((str(tmp_path / "a.txt"),)), str(path), 0.9, cache)
    assert text.tokenizer.kind == "foreign"
    assert tokens_of(text) == made.encode(whole).ids
