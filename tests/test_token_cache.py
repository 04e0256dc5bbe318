"""Tokens in files: the same as from the whole text, found again, and never a damaged one."""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from engine.errors import DataError, ResourceError
from tests.conftest import REPOSITORY
from tests.forking import CAN_FORK
from tests.texts import CHINESE, ENGLISH, train_in_the_library
from text import token_cache
from text.corpora import CORPORA
from text.documents import DataSpec
from text.split import split_documents
from text.token_cache import TokenizedText, cut_into_chunks, tokenize
from text.tokenizer import CharTokenizer, GPT2Tokenizer, train_bpe
from text.tokenizer_file import END_OF_TEXT

STORY = ENGLISH[:2000]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk proves nothing here: no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


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
    tokens = tokens_of(text) if tokens is None else tokens
    return text.tokenizer.decode(tokens).split(END_OF_TEXT)


def sides_of(text: TokenizedText) -> tuple[list[str], list[str]]:
    tokens, n_train = tokens_of(text), text.n_train
    return documents_of(text, tokens[:n_train]), documents_of(text, tokens[n_train:])


def never_read(*_):
    raise AssertionError("the text was read again")


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


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(TEXTS, st.sampled_from([16, 50, 1000]), st.lists(st.integers(0, 1000), max_size=8))
@example("word " * 500, 16, [])
@example("'s, 'saw. I'll, 'LL." * 9, 16, [])
@example("x" * 5000 + " y", 1000, [])
@example(" " * 3000, 50, [])
@example("a_. _, b_ " * 9, 16, [])
@example("x" * 20 + " y z", 16, [20])  # what may end a word comes with the next piece
def test_chunks_have_the_tokens_of_the_whole_text_in_whatever_pieces_it_comes(
    by_kind, text, size, stops
):
    chunks = chunks_of([(text, True)], size)
    assert "".join(part for part, _ in chunks) == text
    assert [is_last for _, is_last in chunks] == [False] * (len(chunks) - 1) + [True]
    for tokenizer in by_kind.values():
        assert [i for part, _ in chunks for i in tokenizer.encode(part)] == tokenizer.encode(text)
    bounds = [0, *sorted(min(stop, len(text)) for stop in stops), len(text)]
    pieces = [(text[i:j], False) for i, j in itertools.pairwise(bounds)]
    pieces[-1] = (pieces[-1][0], True)
    assert chunks_of(pieces, size) == chunks


def test_a_text_is_cut_about_every_chunk_and_one_without_a_place_to_cut_after_the_most(
    monkeypatch,
):
    chunks = [part for part, _ in chunks_of([(ENGLISH, True)], 100)]
    assert "".join(chunks) == ENGLISH
    assert all(70 <= len(part) <= 100 for part in chunks[:-1])
    monkeypatch.setattr(token_cache, "LONGEST_WORD", 8)
    documents = [("word " * 9 + "!" + "x" * 90, False), ("x" * 90 + " y", True)]
    sizes = [len(part) for part, _ in chunks_of(documents, 16, 30)]
    # of the letters, multiples of 8, as many as 30 characters have room for
    assert sizes == [14, 15, 15, 26, 24, 24, 24, 24, 24, 24, 14]


def test_letters_and_digits_of_unicode_can_be_cut_off_from_what_follows(by_kind):
    # of the large blocks, whose letters are alike, every 64th
    all_of = [range(0x3400), range(0xA000, 0xAC00), range(0xE000, 0x20000)]
    some_of = [range(0x3400, 0xA000, 64), range(0xAC00, 0xD800, 64), range(0x20000, 0x110000, 64)]
    characters = map(chr, itertools.chain(*all_of, *some_of))
    letters = [char for char in characters if token_cache._CUT.match(f"{char}.")]
    assert len(letters) > 20_000
    encode = by_kind["gpt2"].encode
    # what follows must begin anew: a mark and the letter behind it, as in the whole text
    for mark in (".", " ", "\n", "，", "\u3000"):
        some = letters if mark == "." else letters[::20]
        behind = encode(f"{mark}.")
        expected = [token for letter in some for token in (*encode(letter), *behind)]
        assert encode("".join(f"{letter}{mark}." for letter in some)) == expected


def test_a_tokenizer_from_elsewhere_gets_each_document_whole_and_four_bytes_a_token(
    tmp_path, build, monkeypatch
):
    monkeypatch.setattr(token_cache, "CHUNK", 16)
    monkeypatch.setattr(token_cache, "MOST_UNKNOWN", 1.0)  # ", " and "." are unknown to it
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


def of_others(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of another project's kind, which has learnt both samples."""
    parts, texts = pre_tokenizers, [ENGLISH[:20_000], CHINESE[:9000]]
    special = {"special_tokens": ["<unk>", "</s>"], "show_progress": False, "vocab_size": 1500}
    if kind == "byte level":  # of GPT-2's kind, whose tokens are parts of characters
        return train_in_the_library("".join(texts), 700, "</s>")
    if kind == "word pieces":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), parts.BertPreTokenizer()
        made.train_from_iterator(texts, trainers.WordPieceTrainer(**special))
    elif kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer, made.pre_tokenizer = normalizers.NFKC(), parts.Metaspace()
        made.train_from_iterator(texts, trainers.UnigramTrainer(unk_token="<unk>", **special))
    else:  # of Llama's kind, which has no words: a token may hold a word's end and what follows
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        blanks = normalizers.Replace(" ", "▁")
        words = parts.Split(tokenizers.Regex("▁?[^▁]+|▁+"), "isolated")
        made.normalizer, made.pre_tokenizer = blanks, words
        made.train_from_iterator(texts, trainers.BpeTrainer(**special))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
        made.pre_tokenizer = None
    return made


@pytest.mark.parametrize("kind", ["byte level", "word pieces", "unigram", "no words"])
def test_tokenizers_of_others_give_parts_of_a_document_the_tokens_of_the_whole(
    tmp_path, build, monkeypatch, kind
):
    monkeypatch.setattr(token_cache, "CHUNK", 500)
    monkeypatch.setattr(token_cache, "NEIGHBORHOOD", 100)
    made = of_others(kind)
    file = write_text(tmp_path / "tokenizer.json", made.to_str())
    documents = [ENGLISH[:9000], "short", CHINESE[:5000], " \n" + ENGLISH[9000:12_000] + "  \n"]
    text = build(write_lines(tmp_path / "a.jsonl", documents), name=file)
    assert text.tokenizer.kind == "foreign"
    expected = []
    for document in documents:
        ids = made.encode(document, add_special_tokens=False).ids
        expected += [*ids, text.tokenizer.end_of_text_id]
    assert tokens_of(text) == expected[:-1]


def test_a_document_that_is_one_long_word_is_cut_and_comes_back_whole(tmp_path, build, monkeypatch):
    for name, size in {"CHUNK": 200, "MOST_UNCUT": 200, "NEIGHBORHOOD": 50}.items():
        monkeypatch.setattr(token_cache, name, size)
    file = write_text(tmp_path / "tokenizer.json", of_others("byte level").to_str())
    for document in ("ab" * 1001, "lamp" * 700, "渡口" * 600):
        text = build(write_text(tmp_path / "a.txt", document), name=file)
        assert documents_of(text) == [document]


def numbered(count: int) -> list[str]:
    return [f"document {i} of {count}" for i in range(count)]


@pytest.fixture
def thirty(tmp_path) -> Path:
    return write_lines(tmp_path / "a.jsonl", numbered(30))


def test_about_the_share_asked_for_is_trained_on_and_few_documents_are_not_chosen_from():
    digests, sizes = np.arange(0, 2**64 - 1, 2**64 // 2000, dtype=np.uint64), np.full(2001, 9)
    for train_ratio in (0.5, 0.9, 0.98):
        split = split_documents(digests, sizes, train_ratio)
        assert split.cut is None and abs(1 - split.is_val.mean() - train_ratio) < 0.001
    assert split_documents(digests[:19], sizes[:19], 0.5) is None
    assert split_documents(digests[:20], sizes[:20], 0.5) is not None


def test_few_documents_stay_as_they_are_with_one_end_of_text_between_them(tmp_path, build):
    for documents in (numbered(1), ["a", "ab", "a", "\x00春\ufeff"], ["the same"] * 30):
        text = build(write_lines(tmp_path / "a.jsonl", documents))
        assert text.n_train is None
        assert documents_of(text) == documents


@pytest.mark.parametrize("chunk", [30, 1 << 20])
def test_the_order_of_documents_and_files_moves_none_to_the_other_side(
    tmp_path, build, monkeypatch, chunk
):
    monkeypatch.setattr(token_cache, "CHUNK", chunk)
    documents = [*numbered(40), *numbered(40)[:20]]
    documents += [f"{i}: " + "longer than a chunk, " * i for i in range(20)]
    _, val = sides_of(build(write_lines(tmp_path / "a.jsonl", documents), ratio=0.8))
    assert 0 < len(val) < 40
    val_last = sorted(documents, key=lambda document: document in val)
    random.Random(0).shuffle(documents)
    for number, order in enumerate([documents, val_last, val_last[::-1]]):
        files = [
            write_lines(tmp_path / f"{number}-{part}.jsonl", order[20 * part : 20 * part + 20])
            for part in range(4)
        ]
        # equal documents are on one side, all others as they come
        train = [document for document in order if document not in val]
        held_out = [document for document in order if document in val]
        assert sides_of(build(*files, ratio=0.8)) == (train, held_out)


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 5000)), min_size=20, max_size=60),
    st.floats(0.001, 0.999),
)
@example([(0, 9)] * 19 + [(1, 9)], 0.999)
@example([(2**64 - 1, 1)] * 19 + [(2**64 - 2, 1)], 0.001)
def test_no_side_is_empty_and_equal_documents_stay_together(documents, train_ratio):
    digests = np.array([digest for digest, _ in documents], dtype=np.uint64)
    sizes = np.array([size for _, size in documents])
    split = split_documents(digests, sizes, train_ratio)
    if split is None:
        assert len(set(digests.tolist())) < 20  # copies
        return
    sides = list(zip(digests.tolist(), split.is_val.tolist(), strict=True))
    train = {digest for digest, on_val in sides if not on_val}
    val = {digest for digest, on_val in sides if on_val}
    assert train and not train & val
    if split.cut is None:
        assert val
    else:
        assert not split.is_val[split.cut] and 0 < split.n_cut < sizes[split.cut]


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


def test_a_text_without_any_text_is_an_error_and_leaves_no_entry(tmp_path, build, cache):
    blank = " \n\t\n"
    for name, content in [("char", ""), ("char", blank), ("bpe:500", "")]:
        with pytest.raises(DataError, match=r"a\.txt is empty"):
            build(write_text(tmp_path / "a.txt", content), name=name)
    assert os.listdir(cache / "tokens") == []


@pytest.mark.parametrize(
    ("count", "chunk", "has_val"), [(3, 16, True), (40, 16, False), (40, 1 << 20, True)]
)
def test_every_figure_of_the_report_equals_a_naive_count(
    tmp_path, build, monkeypatch, count, chunk, has_val
):
    monkeypatch.setattr(token_cache, "CHUNK", chunk)
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [*numbered(count), "", "  ", "the same", "the same", "老友 the same"]
    write_lines(folder / "a.jsonl", lines)
    for name in "bc":
        write_text(folder / f"{name}.txt", "one\r\ntwo\r\n")
    (folder / "d.bin").write_bytes(b"\x00\x01" * 100)
    (folder / ".hidden").write_text("x")
    val = [write_lines(tmp_path / "v.jsonl", ["the same", "unheard of ŝ"])] if has_val else []
    text = build(folder, val=val, ratio=0.8)

    documents = [line for line in lines if line.strip()] + ["one\r\ntwo\r\n"] * 2
    documents += ["the same", "unheard of ŝ"] * has_val
    in_file = {folder / "a.jsonl": len(lines) - 2, folder / "b.txt": 1, folder / "c.txt": 1}
    in_file |= dict.fromkeys(val, 2)
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
            for path, n_documents in in_file.items()
        ],
        "passed_over": [
            {"name": str(folder / ".hidden"), "reason": "hidden"},
            {"name": str(folder / "d.bin"), "reason": "binary"},
        ],
        "notes": [
            (
                f"{name}.txt: lines end in CRLF; kept as they are",
                f"{name}.txt：行尾是 CRLF，照原样保留",
            )
            for name in "bc"
        ],
        "documents": len(documents),
        "empty_documents": 2,
        "duplicate_documents": len(documents) - len(set(documents)),
        "documents_on_both_sides": int(has_val),  # "the same"
        "unknown_tokens": 0,
        "bytes": sum(path.stat().st_size for path in in_file),
        "characters": characters,
        "copied": 0.0,  # no document has a line twice that counts
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
    second.mkdir()
    (first / "a.txt").rename(second / "c.txt")
    found = build(second)
    assert (found.path, found.report["passed_over"]) == (made.path, [])
    (entry,) = found.report["files"]
    assert (entry["name"], entry["path"]) == ("c.txt", str(second / "c.txt"))


def test_a_file_is_known_by_path_size_and_time(tmp_path, build, cache, monkeypatch):
    path = write_text(tmp_path / "a.txt", "abcabc")
    made = build(path)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "read_documents", never_read)
        [found] = (cache / "tokens").glob("found-*.json")
        for content in (b"", b"[]", b"{}", b"\xff", b'{"state": 1, "entry": 2}'):
            found.write_bytes(content)  # damaged, it costs a look at the text
            assert build(path).path == made.path
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


def test_each_request_has_an_entry_of_its_own_for_which_the_text_is_not_read_again(
    tmp_path, cache, by_kind, monkeypatch
):
    both = [{"text": line, "body": f"({line})"} for line in numbered(100)]
    # one bad row of 101, which is told, also from the cache
    path = write_text(tmp_path / "a.jsonl", "\n".join([*map(json.dumps, both), "{"]))
    file = write_text(tmp_path / "tokenizer.json", by_kind["bpe"].to_json())
    spec = DataSpec((str(path),))
    requests = [
        *((spec, name, 0.8) for name in ("char", "bpe:400", "bpe:401", str(file))),
        (spec, "char", 0.6),
        (replace(spec, field="body"), "char", 0.8),
        (replace(spec, val=spec.train), "char", 0.8),
        (replace(spec, train=spec.train * 2), "char", 0.8),
        (replace(spec, encoding="latin-1"), "char", 0.8),
        (replace(spec, bad_rows="skip"), "char", 0.8),
        (replace(spec, separator="line"), "char", 0.8),
    ]
    made = [tokenize(*request, cache) for request in requests]
    paths = {text.path for text in made}
    assert len(paths) == len(requests)
    assert "1 bad row passed over (0.99%)" in made[0].report["notes"][0].en
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "read_documents", never_read)
        patch.setattr(token_cache, "file_sha256", never_read)
        for request, before in zip(requests, made, strict=True):
            found = tokenize(*request, cache)
            assert found.tokenizer.fingerprint == before.tokenizer.fingerprint
            assert found.tokenizer.kind == before.tokenizer.kind
            assert replace(found, tokenizer=None) == replace(before, tokenizer=None)
    write_text(file, CharTokenizer("abc").to_json())
    changed = tokenize(spec, str(file), 0.8, cache)
    assert (changed.path in paths, changed.tokenizer.kind) == (False, "char")
    monkeypatch.setattr(token_cache, "FORMAT", token_cache.FORMAT + 1)
    assert tokenize(*requests[0], cache).path not in paths


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


STEPS = [
    *("make_tokenizer", "_write_tokens", "_encode_batch", "divide", "arrange"),
    *("write_atomically", "_block_hashes", "write_json", "rename_folder"),
]


@pytest.mark.slow
def test_a_build_that_is_stopped_or_killed_at_any_step_leaves_no_half_entry(
    tmp_path, build, thirty, monkeypatch, capsys
):
    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    def kill(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGKILL)

    expected = tokens_of(build(thirty))
    for step in STEPS:
        cache = tmp_path / step
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, step, stop)
            with pytest.raises(KeyboardInterrupt):
                build(thirty, cache=cache)
            assert os.listdir(cache / "tokens") == []
            if CAN_FORK:
                patch.setattr(token_cache, step, kill)
                fork = multiprocessing.get_context("fork")
                process = fork.Process(target=build, args=[thirty], kwargs={"cache": cache})
                process.start()
                process.join(60)
                assert process.exitcode == -signal.SIGKILL
                assert list((cache / "tokens").glob("[!.]*")) == []
        assert tokens_of(build(thirty, cache=cache)) == expected
    assert "damaged" not in capsys.readouterr().out


def test_what_a_killed_build_left_is_removed_after_a_day(build, cache, story):
    tokens = cache / "tokens"
    tokens.mkdir(parents=True)
    day_ago = time.time() - token_cache.ORPHAN_AGE_S
    ages = {".tmp-1-old": -60, ".tmp-2-young": 600, "kept": -60, ".tmp-3.json": -60}
    for name, age in ages.items():
        if name.endswith(".json"):
            (tokens / name).write_bytes(b"x")
        else:
            (tokens / name).mkdir()
            (tokens / name / "all.bin").write_bytes(b"x")
        os.utime(tokens / name, (day_ago + age, day_ago + age))
    build(story)
    assert {path.name for path in tokens.iterdir()} & set(ages) == {".tmp-2-young", "kept"}


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


def test_the_hash_tells_tokens_and_where_they_are_cut_wherever_the_text_lies(
    tmp_path, build, story
):
    made = build(story)
    assert len(made.sha256) == 64
    moved = build(write_text(tmp_path / "b.md", STORY))
    assert moved.path != made.path
    assert {moved.sha256, build(story, cache=tmp_path / "other").sha256} == {made.sha256}
    texts = [made]
    for at in (0, len(STORY) - 1):  # one changed byte
        changed = STORY[:at] + ("a" if STORY[at] != "a" else "e") + STORY[at + 1 :]
        texts.append(build(write_text(tmp_path / "c.txt", changed)))
        assert texts[-1].n_tokens == made.n_tokens
    tokenizer = write_text(tmp_path / "tokenizer.json", CharTokenizer(STORY).to_json())
    for cut in (1000, 1001):  # the same tokens
        train = write_text(tmp_path / f"train-{cut}.txt", STORY[:cut])
        val = write_text(tmp_path / f"val-{cut}.txt", STORY[cut:])
        texts.append(build(train, val=[val], name=tokenizer))
        assert texts[-1].n_train == cut
        assert tokens_of(texts[-1]) == tokens_of(made)
    assert len({text.sha256 for text in texts}) == len(texts) == 5


def test_a_stand_in_is_told_from_the_text_itself_and_taken_as_asked_for(
    build, cache, story, monkeypatch
):
    content = CHINESE.encode()
    url = "http://127.0.0.1:1/text.txt"  # where nobody listens
    known = replace(CORPORA["the-verdict"], url=url, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(CORPORA, "the-verdict", known)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(DataError, match="the-verdict can't be had"):
        build("the-verdict", stand_in=False)
    stood_in = build("the-verdict")
    assert "can't be had" in stood_in.notices[0].en
    itself_at = cache / "corpora" / "the-verdict.txt"  # where a download would put it
    itself_at.write_bytes(content)
    for stand_in, expected in ((None, CHINESE), (False, CHINESE), (True, ENGLISH)):
        text = build("the-verdict", stand_in=stand_in)
        assert documents_of(text) == [expected]
        assert text.stood_in == len(text.notices) == (expected == ENGLISH)
        assert (text.sha256 == stood_in.sha256) == text.stood_in
    itself_at.unlink()
    assert build("the-verdict").stood_in
    for stand_in in (True, False):  # nothing stands in for a file of one's own
        text = build(story, stand_in=stand_in)
        assert (documents_of(text), text.stood_in, text.notices) == ([STORY], False, [])


PROGRAM = """
import sys
from pathlib import Path
from text.documents import DataSpec
from text.token_cache import tokenize
print(tokenize(DataSpec((sys.argv[1],)), "bpe:500", 0.9, Path(sys.argv[2])).path)
"""


@pytest.mark.slow
def test_two_processes_that_build_at_once_both_succeed_whatever_the_locale(
    tmp_path, cache, build, monkeypatch
):
    whole = ENGLISH + CHINESE + "caf\u00e9, \u6625. \U0001f600\r\n"
    path = write_text(tmp_path / "a.txt", whole)
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONPATH": str(REPOSITORY)}
    said, rename = [], token_cache.rename_folder

    def let_the_other_be_faster(*folders):
        command = [sys.executable, "-c", PROGRAM, path, cache]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
        said.append((done.stdout, done.stderr))
        return rename(*folders)

    monkeypatch.setattr(token_cache, "rename_folder", let_the_other_be_faster)
    text = build(path, name="bpe:500")
    assert said == [(f"{text.path}\n", "")]
    assert not list((cache / "tokens").glob(".tmp-*"))
    assert tokens_of(text) == text.tokenizer.encode(whole)


def test_a_vocabulary_is_learnt_from_what_trains_alone(tmp_path, build, monkeypatch):
    """Else the validation text looks easier than text is: by 5 % of tiny-shakespeare's tokens."""
    odd = "zyzzyva " * 400
    content = ENGLISH[:20_000] + odd
    text = build(write_text(tmp_path / "text.txt", content), name="bpe:400")
    n_train = len(content) - round(0.1 * len(content))
    assert text.tokenizer.to_json() == train_bpe([content[:n_train]], 400).to_json()
    assert train_bpe([content], 400).encode("zyzzyva") != text.tokenizer.encode("zyzzyva")

    rows = [ENGLISH[at : at + 200] for at in range(0, 80_000, 200)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    learnt: list[str] = []
    monkeypatch.setattr(
        token_cache, "make_tokenizer", lambda name, texts: learnt.extend(texts()) or GPT2Tokenizer()
    )
    text = build(write_text(tmp_path / "rows.jsonl", lines), name="bpe:400")
    val = text.tokenizer.decode(tokens_of(text)[text.n_train :]).split("<|endoftext|>")
    # which documents validate is decided by their tokens, which are not known yet
    assert 0.85 < len("".join(learnt)) / len("".join(rows)) < 0.95
    assert len({*val} & {*learnt}) < 0.1 * len(val)
