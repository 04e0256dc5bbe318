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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from engine.errors import DataError, ResourceError
from tests.conftest import REPOSITORY
from tests.texts import CHINESE, ENGLISH
from text import token_cache
from text.corpora import CORPORA
from text.documents import DataSpec
from text.token_cache import TokenizedText, choose_validation, cut_into_chunks, find_cut, tokenize
from text.tokenizer import CharTokenizer, GPT2Tokenizer, train_bpe

STORY = ENGLISH[:2000]


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def build(cache) -> Callable[..., TokenizedText]:
    """tokenize() for the files to train and to validate on."""

    def tokenized(*train, val=(), name="char", ratio=0.9, cache=cache, **options) -> TokenizedText:
        spec = DataSpec(tuple(map(str, train)), tuple(map(str, val)))
        return tokenize(spec, str(name), ratio, cache, **options)

    return tokenized


@pytest.fixture
def story(tmp_path) -> Path:
    return write_text(tmp_path / "a.txt", STORY)


@pytest.fixture(scope="module")
def by_kind() -> dict:
    return {
        "gpt2": GPT2Tokenizer(),
        "bpe": train_bpe([ENGLISH[:9000] + CHINESE[:9000]], 600),
        "char": CharTokenizer(ENGLISH),
    }


def write_lines(path: Path, documents: list[str]) -> Path:
    return write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in documents))


def write_text(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8"))
    return path


def tokens_of(text: TokenizedText) -> list[int]:
    tokens = np.fromfile(text.path, dtype=text.dtype).tolist()
    assert len(tokens) == text.n_tokens
    return tokens


def documents_of(text: TokenizedText, tokens: list[int] | None = None) -> list[str]:
    """The documents that tokens are made of; "" shows an end-of-text too many."""
    documents = [[]]
    for token in tokens_of(text) if tokens is None else tokens:
        if token == text.tokenizer.end_of_text_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return [text.tokenizer.decode(ids) for ids in documents]


def sides_of(text: TokenizedText) -> tuple[list[str], list[str]]:
    tokens, n_train = tokens_of(text), text.n_train
    return documents_of(text, tokens[:n_train]), documents_of(text, tokens[n_train:])


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
ANY = st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(WORDS, max_size=150).map("".join) | st.lists(ANY | WORDS).map("".join) | UNCUT


def chunks_of(documents, size: int, most: int = token_cache.MOST_UNCUT) -> list[tuple[str, bool]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "CHUNK", size)
        patch.setattr(token_cache, "MOST_UNCUT", most)
        return list(cut_into_chunks(documents))


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(text=TEXTS, size=st.sampled_from([16, 50, 1000]))
@example(text="word " * 500, size=16)
@example(text="'s, 'saw. I'll, 'LL." * 9, size=16)
@example(text="x" * 5000 + " y", size=1000)
@example(text=" " * 3000, size=50)
def test_tokens_of_the_chunks_equal_tokens_of_the_whole_text(by_kind, size, text):
    chunks = chunks_of([(text, True)], size)
    assert "".join(part for part, _ in chunks) == text
    assert [is_last for _, is_last in chunks] == [False] * (len(chunks) - 1) + [True]
    for tokenizer in by_kind.values():
        assert [i for part, _ in chunks for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_a_text_with_places_to_cut_is_cut_about_every_chunk_and_another_refused():
    chunks = [part for part, _ in chunks_of([(ENGLISH, True)], 100)]
    assert "".join(chunks) == ENGLISH
    assert all(70 <= len(part) <= 100 for part in chunks[:-1])
    before = ("word " * 99 + "x" * 90, False)
    assert chunks_of([before, ("x " * 20, True)], 16, 100)[-1][1]
    with pytest.raises(DataError, match="more than 100 characters in a row") as caught:
        chunks_of([before, ("x" * 20, True)], 16, 100)
    assert "' xxxxx" in str(caught.value)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(TEXTS, st.lists(st.integers(0, 1000), max_size=8), st.sampled_from([16, 50]))
@example("x" * 20 + " y z", [20], 16)  # what may end a word comes with the next piece
def test_where_a_text_is_cut_does_not_depend_on_the_pieces_it_comes_in(text, stops, size):
    bounds = [0, *sorted(min(stop, len(text)) for stop in stops), len(text)]
    pieces = [(text[i:j], False) for i, j in itertools.pairwise(bounds)]
    pieces[-1] = (pieces[-1][0], True)
    assert chunks_of(pieces, size) == chunks_of([(text, True)], size)


def test_letters_and_digits_of_unicode_can_be_cut_off_from_what_follows(by_kind):
    alike = [range(0x3400, 0xA000), range(0xAC00, 0xE000), range(0x20000, 0x110000)]
    letters = [
        chr(code)
        for code in range(0x110000)
        if (code % 64 == 0 or not any(code in block for block in alike))
        and not 0xD800 <= code < 0xE000
        and token_cache._CUT.match(chr(code) + ".")
    ]
    assert len(letters) > 20_000
    encode = by_kind["gpt2"].encode
    # what follows must begin anew: a mark and the letter behind it, as in the whole text
    for mark in (".", " ", "\n", "，", "\u3000"):
        some = letters if mark == "." else letters[::20]
        behind = encode(f"{mark}.")
        expected = [token for letter in some for token in (*encode(letter), *behind)]
        assert encode("".join(f"{letter}{mark}." for letter in some)) == expected


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
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


@pytest.mark.parametrize(("name", "chunk"), [("gpt2", 50), ("bpe:500", 1000), ("char", 1 << 20)])
def test_tokens_of_a_file_equal_those_of_its_whole_text(tmp_path, build, monkeypatch, name, chunk):
    whole = (ENGLISH + CHINESE.replace("\n", "\r\n")) + "\x01 👩‍👩‍👧 " + "ab" * 700
    monkeypatch.setattr(token_cache, "CHUNK", chunk)
    # making tokenizer.json of GPT-2 takes long, and it is restored without
    monkeypatch.setattr(GPT2Tokenizer, "to_json", lambda self: "{}")
    text = build(write_text(tmp_path / "a.txt", whole), name=name)
    assert tokens_of(text) == text.tokenizer.encode(whole)
    assert text.n_train is None
    assert text.tokenizer.kind == name.partition(":")[0]


def test_a_tokenizer_from_elsewhere_gets_each_document_whole_and_four_bytes_a_token(
    tmp_path, build, monkeypatch
):
    monkeypatch.setattr(token_cache, "CHUNK", 16)
    vocabulary = {f"▁w{i}": i for i in range(65_536)}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="▁w0"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # which puts a blank before each text
    file = write_text(tmp_path / "tokenizer.json", made.to_str())
    documents = ["w1, w3. " * 40, "w2 w65535"]
    text = build(write_lines(tmp_path / "a.jsonl", documents), name=file)
    assert text.tokenizer.kind == "foreign"
    assert text.tokenizer.vocab_size == 65_537  # end-of-text comes last
    expected = [*made.encode(documents[0]).ids, 65_536, 2, 65_535]
    assert tokens_of(text) == expected
    assert text.dtype == "uint32"
    assert text.path.stat().st_size == 4 * len(expected)


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(
    chunk=st.sampled_from([16, 1 << 20]),
    documents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(str.strip),
        min_size=1,
        max_size=45,
    ),
)
def test_documents_are_joined_by_one_end_of_text_and_sides_end_without(
    tmp_path_factory, chunk, documents
):
    folder = tmp_path_factory.mktemp("documents")
    spec = DataSpec((str(write_lines(folder / "a.jsonl", documents)),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "CHUNK", chunk)
        text = tokenize(spec, "char", 0.7, folder / "cache")
    if text.n_train is None:
        assert len(documents) < 20 or len(set(documents)) == 1
        assert documents_of(text) == documents
        return
    train, val = sides_of(text)
    assert train and val
    assert not set(train) & set(val)
    is_val = set(val)
    assert train == [document for document in documents if document not in is_val]
    assert val == [document for document in documents if document in is_val]


# ------------------------------------------------------------------------------ splitting


def numbered(count: int) -> list[str]:
    return [f"document {i} of {count}" for i in range(count)]


@pytest.fixture
def thirty(tmp_path) -> Path:
    return write_lines(tmp_path / "a.jsonl", numbered(30))


def test_few_documents_are_cut_by_position_and_more_by_a_hash(tmp_path, build):
    for count, by_hash in [(1, False), (19, False), (20, True), (50, True)]:
        text = build(write_lines(tmp_path / "a.jsonl", numbered(count)), ratio=0.7)
        assert (text.n_train is not None) == by_hash
    text = build(write_lines(tmp_path / "a.jsonl", ["the same"] * 30))
    assert text.n_train is None
    assert documents_of(text) == ["the same"] * 30
    assert text.report["duplicate_documents"] == 29


def test_about_the_share_asked_for_is_trained_on():
    digests = array("Q", range(0, 2**64 - 1, 2**64 // 2000))
    for train_ratio in (0.5, 0.9, 0.98):
        assert abs(1 - choose_validation(digests, train_ratio).mean() - train_ratio) < 0.001


@pytest.mark.parametrize("chunk", [30, 1 << 20])
def test_the_order_of_documents_and_files_does_not_move_them_between_sides(
    tmp_path, build, monkeypatch, chunk
):
    monkeypatch.setattr(token_cache, "CHUNK", chunk)
    documents = [*numbered(60), *numbered(60)[:20]]
    documents += [f"{i}: " + "longer than a chunk, " * i for i in range(20)]
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(documents)
        files = [
            write_lines(tmp_path / f"{seed}-{part}.jsonl", documents[part::3]) for part in range(3)
        ]
        train, val = sides_of(build(*files, ratio=0.8))
        assert sorted(train + val) == sorted(documents)
        assert not set(train) & set(val)  # equal documents are on one side
        found.append(set(val))
    assert found[0] == found[1] == found[2]
    assert 0 < len(found[0]) < 40


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
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


@pytest.mark.parametrize("count", [1, 40])
def test_validation_texts_of_their_own_are_what_is_validated_on(tmp_path, build, story, count):
    train, val = [f"train {i}" for i in range(count)], ["val one", "val two"]
    own = write_lines(tmp_path / "v.jsonl", val)
    text = build(write_lines(tmp_path / "t.jsonl", train), val=[own], ratio=0.5)
    assert sides_of(text) == (train, val)
    # the tokenizer is made from what is trained on
    assert text.tokenizer.chars == sorted(set("".join(train)))
    # an empty one is not replaced by another
    text = build(story, val=[write_text(tmp_path / "b.txt", " \n")])
    assert text.n_train == text.n_tokens == len(STORY)


@pytest.mark.parametrize("name", ["char", "bpe:500", "auto"])
def test_a_text_without_any_text_is_an_error_and_leaves_no_entry(tmp_path, build, cache, name):
    for content in ("", " \n\t\n"):
        with pytest.raises(DataError, match=r"a\.txt is empty"):
            build(write_text(tmp_path / "a.txt", content), name=name)
    assert os.listdir(cache / "tokens") == []


# ------------------------------------------------------------------------------ the report


@pytest.mark.parametrize(("count", "chunk"), [(3, 16), (40, 16), (40, 1 << 20)])
@pytest.mark.parametrize("has_val", [False, True])
def test_every_figure_of_the_report_equals_a_naive_count(
    tmp_path, build, monkeypatch, count, chunk, has_val
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
    val = [write_lines(tmp_path / "v.jsonl", ["the same", "unheard of ŝ"])] if has_val else []
    text = build(folder, val=val, ratio=0.8)

    documents = [line for line in lines if line.strip()] + ["one\r\ntwo\r\n"] * 2
    documents += ["the same", "unheard of ŝ"] * has_val
    paths = [folder / "a.jsonl", folder / "b.txt", folder / "c.txt", *val]
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


def test_the_report_names_the_files_as_they_are_now(tmp_path, build):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    write_text(first / "a.txt", STORY)
    (first / "b.bin").write_bytes(b"\0")
    made = build(first)
    assert [entry["name"] for entry in made.report["passed_over"]] == [str(first / "b.bin")]
    shutil.copytree(first, second)
    (second / "b.bin").unlink()
    found = build(second)
    assert found.path == made.path
    assert found.report["passed_over"] == []
    assert [entry["path"] for entry in found.report["files"]] == [str(second / "a.txt")]
    (second / "a.txt").rename(second / "c.txt")
    renamed = build(second)
    assert [entry["name"] for entry in renamed.report["files"]] == ["c.txt"]
    assert renamed.path == made.path


# ------------------------------------------------------------------------------ found again


@pytest.mark.parametrize("name", ["char", "bpe:400", "tokenizer.json"])
def test_a_text_that_has_not_changed_is_not_read_again(
    tmp_path, build, monkeypatch, by_kind, thirty, name
):
    if name == "tokenizer.json":
        name = write_text(tmp_path / name, by_kind["bpe"].to_json())
    given = {"val": [write_text(tmp_path / "b.txt", "b")], "name": name}
    made = build(thirty, **given)
    monkeypatch.setattr(token_cache, "read_documents", never_read)
    monkeypatch.setattr(token_cache, "file_sha256", never_read)
    found = build(thirty, **given)
    assert tokens_of(found) == tokens_of(made)
    assert found.tokenizer.fingerprint == made.tokenizer.fingerprint
    assert found.tokenizer.kind == made.tokenizer.kind
    assert replace(found, tokenizer=None) == replace(made, tokenizer=None)


def test_a_file_is_known_by_path_size_and_time(tmp_path, build, monkeypatch):
    path = write_text(tmp_path / "a.txt", "abcabc")
    made = build(path)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "read_documents", never_read)
        os.utime(path, (1, 1))  # its content is looked at
        assert build(path).path == made.path
        patch.setattr(token_cache, "file_sha256", never_read)  # and remembered by its new time
        assert build(path).path == made.path
        write_text(path, "abcabb")
        os.utime(path, (1, 1))
        assert build(path).path == made.path
    os.utime(path, (2, 2))
    assert documents_of(build(path)) == ["abcabb"]
    write_text(tmp_path / "b.txt", "b")
    assert documents_of(build(tmp_path / "*.txt")) == ["abcabb", "b"]
    write_text(path, "aa")
    assert documents_of(build(tmp_path / "*.txt")) == ["aa", "b"]


def test_each_request_has_an_entry_of_its_own(tmp_path, cache, by_kind, monkeypatch):
    both = [{"text": line, "body": f"({line})"} for line in numbered(30)]
    path = write_text(tmp_path / "a.jsonl", "\n".join(map(json.dumps, both)))
    file = write_text(tmp_path / "tokenizer.json", by_kind["bpe"].to_json())
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
    paths = {text.path for text in made}
    assert len(paths) == len(requests)
    assert [text.path for text in made] == [tokenize(*request, cache).path for request in requests]
    write_text(file, CharTokenizer("abc").to_json())
    changed = tokenize(spec, str(file), 0.8, cache)
    assert changed.path not in paths
    assert changed.tokenizer.kind == "char"
    monkeypatch.setattr(token_cache, "FORMAT", token_cache.FORMAT + 1)
    assert tokenize(*requests[0], cache).path not in paths


def test_a_damaged_memory_of_a_request_costs_no_more_than_a_look_at_the_text(
    build, cache, story, monkeypatch
):
    made = build(story)
    [found] = (cache / "tokens").glob("found-*.json")
    monkeypatch.setattr(token_cache, "read_documents", never_read)
    for content in (b"", b"[]", b"{}", b"\xff", b'{"state": 1, "entry": 2}'):
        found.write_bytes(content)
        assert build(story).path == made.path


# ------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["tokens.bin", "tokenizer.json", "entry.json"])
def test_an_entry_that_is_damaged_anywhere_is_made_anew_and_said(
    tmp_path, build, monkeypatch, capsys, name
):
    monkeypatch.setattr(token_cache, "BLOCK", 100)
    story = write_text(tmp_path / "a.txt", ENGLISH[:400])
    made = build(story)
    expected = tokens_of(made)
    path = made.path.with_name(name)
    content = path.read_bytes()
    capsys.readouterr()
    damages = [None, content + b" \x00", b"", content[:-9], content[: len(content) // 2]]
    for at in range(0, len(content), len(content) // 8):  # of tokens, in every block
        damages.append(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    for damage in damages:
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        again = build(story)
        assert f"{made.path.parent} is damaged" in capsys.readouterr().out, damage
        assert tokens_of(again) == expected
        assert path.read_bytes() == content
    build(story)
    assert capsys.readouterr().out == ""


STEPS = ("make_tokenizer", "_write_tokens", "_arrange", "write_atomically", "_block_hashes")


@pytest.mark.parametrize("step", [*STEPS, "write_json", "rename_folder"])
def test_a_build_that_is_stopped_leaves_nothing_and_the_next_is_right(
    build, cache, thirty, monkeypatch, step
):
    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, step, stop)
        with pytest.raises(KeyboardInterrupt):
            build(thirty)
    assert os.listdir(cache / "tokens") == []
    train, val = sides_of(build(thirty))
    assert sorted(train + val) == sorted(numbered(30))


def test_what_a_killed_build_left_is_removed_after_a_day(build, cache, story):
    tokens = cache / "tokens"
    tokens.mkdir(parents=True)
    day_ago = time.time() - token_cache.ORPHAN_AGE_S
    ages = {".tmp-1-old": -60, ".tmp-2-young": 60, "kept": -60}
    for name in ages:
        (tokens / name).mkdir()
        (tokens / name / "all.bin").write_bytes(b"x")
    ages |= {".tmp-3-old.json": -60, ".tmp-4-young.json": 60}
    for name, age in ages.items():
        if name.endswith(".json"):
            (tokens / name).write_bytes(b"x")
        os.utime(tokens / name, (day_ago + age, day_ago + age))
    build(story)
    left = {path.name for path in tokens.iterdir()}
    assert left & set(ages) == {".tmp-2-young", "kept", ".tmp-4-young.json"}


def test_a_cache_that_cannot_be_written_is_a_resource_error(tmp_path, build, cache, story):
    for in_the_way in ("cache", "cache/tokens", "entry"):
        path = tmp_path / in_the_way
        if in_the_way == "entry":
            path = build(story).path.parent
            shutil.rmtree(path)
        path.parent.mkdir(exist_ok=True)
        path.write_text("a file")
        with pytest.raises(ResourceError, match="can't write") as caught:
            build(story)
        assert str(path) in str(caught.value)
        assert path.read_text() == "a file"
        path.unlink()
    assert not list((cache / "tokens").glob(".tmp-*"))


# ------------------------------------------------------------------------------ which text


def test_the_hash_tells_tokens_and_where_they_are_cut_wherever_the_text_lies(
    tmp_path, build, story
):
    made = build(story)
    assert len(made.sha256) == 64
    moved = build(write_text(tmp_path / "b.md", STORY))
    assert moved.path != made.path
    alike = (build(story), moved, build(story, cache=tmp_path / "other cache"))
    assert {text.sha256 for text in alike} == {made.sha256}
    texts = [made]
    for at in (0, 1000, len(STORY) - 1):  # one changed byte
        other = "e" if STORY[at] != "e" else "a"
        texts.append(build(write_text(tmp_path / "c.txt", STORY[:at] + other + STORY[at + 1 :])))
        assert (texts[-1].n_tokens, texts[-1].n_train) == (made.n_tokens, made.n_train)
    tokenizer = write_text(tmp_path / "tokenizer.json", CharTokenizer(STORY).to_json())
    for cut in (1000, 1001):  # the same tokens
        train = write_text(tmp_path / f"train-{cut}.txt", STORY[:cut])
        val = write_text(tmp_path / f"val-{cut}.txt", STORY[cut:])
        texts.append(build(train, val=[val], name=tokenizer))
        assert texts[-1].n_train == cut
        assert tokens_of(texts[-1]) == tokens_of(made)
    assert len({text.sha256 for text in texts}) == len(texts) == 6


def test_a_stand_in_is_told_from_the_text_itself_and_taken_as_asked_for(
    build, cache, story, monkeypatch
):
    content = CHINESE.encode()
    with socket.create_server(("127.0.0.1", 0)) as listening:  # nobody will listen there
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/text.txt"
    known = replace(CORPORA["the-verdict"], url=url, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(CORPORA, "the-verdict", known)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def read(stand_in):
        text = build("the-verdict", stand_in=stand_in)
        documents = documents_of(text)
        assert text.stood_in == (documents == [ENGLISH]) != (documents == [CHINESE])
        assert len(text.notices) == text.stood_in
        return text

    stood_in = read(None)
    assert stood_in.stood_in
    assert "can't be had" in stood_in.notices[0]
    with pytest.raises(DataError, match="the-verdict can't be had"):
        read(False)
    itself_at = cache / "corpora" / "the-verdict.txt"  # where a download would put it
    itself_at.write_bytes(content)
    itself = read(None)
    assert not itself.stood_in
    assert read(False).sha256 == itself.sha256 != stood_in.sha256
    as_before = read(True)
    assert (as_before.stood_in, as_before.sha256) == (True, stood_in.sha256)
    assert "as when this run began" in as_before.notices[0]
    itself_at.unlink()
    assert read(None).stood_in
    for stand_in in (True, False, None):  # nothing stands in for a file of one's own
        text = build(story, stand_in=stand_in)
        assert (text.stood_in, text.notices) == (False, [])
        assert documents_of(text) == [STORY]


# ------------------------------------------------------------------------------ processes

PROGRAM = """
import sys
from pathlib import Path
from text.documents import DataSpec
from text.token_cache import tokenize
print("ready", flush=True)
sys.stdin.readline()
text = tokenize(DataSpec((sys.argv[1],)), sys.argv[2], 0.9, Path(sys.argv[3]))
print(text.path, flush=True)
"""


def start(path: Path, name: str, cache: Path, **environment: str) -> subprocess.Popen:
    """A process that is about to build as soon as it is sent a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path), name, str(cache)],
        env=os.environ | environment | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_that_build_at_once_both_succeed_whatever_the_locale(tmp_path, cache, build):
    whole = (ENGLISH + CHINESE + "caf\u00e9, \u6625. \U0001f600\r\n") * 5
    path = write_text(tmp_path / "a.txt", whole)
    locales = {"PYTHONUTF8": "0", "LC_ALL": "C"}, {"PYTHONUTF8": "1"}
    processes = [start(path, "bpe:500", cache, **locale) for locale in locales]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    text = build(path, name="bpe:500")
    assert answers == [(f"{text.path}\n", "")] * 2
    assert not list((cache / "tokens").glob(".tmp-*"))
    assert tokens_of(text) == text.tokenizer.encode(whole)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_build_that_is_killed_at_any_moment_leaves_no_half_entry(tmp_path, build, cache, capsys):
    whole = (ENGLISH + CHINESE) * 60  # 3 MB
    path = write_text(tmp_path / "a.txt", whole)
    started_at = time.perf_counter()
    expected = tokens_of(build(path, cache=tmp_path / "other"))
    needed_s = time.perf_counter() - started_at
    chooser = random.Random(11)
    n_killed = 0
    for _ in range(5):
        process = start(path, "char", cache)
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(chooser.uniform(0, needed_s))
        process.send_signal(signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
        process.communicate()
        for folder in (cache / "tokens").glob("[!.]*/"):
            assert (folder / "entry.json").exists()
            assert np.fromfile(folder / "tokens.bin", dtype="uint16").tolist() == expected
    assert n_killed > 0
    text = build(path)
    assert tokens_of(text) == expected == text.tokenizer.encode(whole)
    assert "damaged" not in capsys.readouterr().out
