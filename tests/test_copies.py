"""Copied spans against a brute-force search, and the index in the cache."""

import tracemalloc

import numpy as np
import pytest

from insight import copies
from insight.copies import (
    LEAST,
    STRIDE,
    WINDOW,
    Copy,
    CopyIndex,
    Span,
    covered,
    find_copies,
    open_index,
)
from insight.run_text import RunText
from storage.files import FolderLock
from tests.texts import CHINESE, ENGLISH
from text.tokenizer import CharTokenizer


def spans_by_search(written: bytes, text: bytes) -> list[tuple[int, int]]:
    """The longest copies, found by searching the text for ever longer ones from each byte on."""
    spans, reached, stop = [], 0, 0
    for start in range(len(written)):
        stop = max(stop, start)
        while stop < len(written) and written[start : stop + 1] in text:
            stop += 1
        if stop > reached and stop - start >= LEAST:
            spans.append((start, stop))
        reached = max(reached, stop)
    return spans


def mixture(text: bytes, n_parts: int, seed: int) -> bytes:
    """Parts of a text, some as they are, some with other bytes in them, some that touch."""
    generator, parts = np.random.default_rng(seed), []
    for _ in range(n_parts):
        start, length = generator.integers(len(text) - 300), generator.integers(10, 300)
        part = bytearray(text[start : start + length])
        if generator.random() < 0.5:
            part[generator.integers(length)] ^= 1
        parts.append(bytes(part))
    return b"".join(parts)


@pytest.mark.parametrize(
    ("text", "n_parts"),
    [
        ((ENGLISH * 2 + CHINESE).encode(), 8),
        pytest.param(None, 25, marks=pytest.mark.slow),  # of a megabyte
    ],
)
def test_copied_spans_are_exactly_those_of_a_brute_force_search(text, n_parts):
    seeds = range(3)
    if text is None:
        seeds = range(1)
        words = ENGLISH.encode().split()
        chosen = np.random.default_rng(0).integers(0, len(words), 180_000)
        text = b" ".join(words[i] for i in chosen)[: 1 << 20]
    index = CopyIndex.of(text)
    for seed in seeds:
        written = mixture(text, n_parts, seed)
        spans = index.spans(written)
        assert [(span.start, span.stop) for span in spans] == spans_by_search(written, text)
        assert len(spans) > n_parts // 2
        for span in spans:
            source = text[span.source : span.source + span.length]
            assert source == written[span.start : span.stop]


def test_the_shortest_copy_is_found_wherever_it_begins_and_no_shorter_one_is():
    text = np.random.default_rng(0).integers(1, 200, 400, dtype=np.uint8).tobytes()
    index = CopyIndex.of(text)
    for at in range(2 * STRIDE):
        around = text[at : at + LEAST]
        assert index.spans(b"\xff" + around + b"\xff") == [Span(1, 1 + LEAST, at)]
        assert index.spans(b"\xff" + around[:-1] + b"\xff") == []
    for n_bytes in range(LEAST):  # too short to be looked up, or to look up in
        assert CopyIndex.of(text[:n_bytes]).spans(text) == []
        assert index.spans(text[:n_bytes]) == []
    assert CopyIndex.of(text[:LEAST]).spans(text) == [Span(0, LEAST, 0)]


def test_equal_hashes_of_other_windows_are_no_copies(monkeypatch):
    real = copies._hashes
    monkeypatch.setattr(copies, "_hashes", lambda words, places: real(words, places) & np.uint64(0))
    text = np.random.default_rng(0).integers(1, 200, 900, dtype=np.uint8).tobytes()
    index = CopyIndex.of(text)
    assert index.spans(text[200:260]) == [Span(0, 60, 200)]
    assert index.spans(text[::-1]) == []


def test_a_window_that_is_everywhere_takes_bounded_time_and_hides_no_copy_around_it(monkeypatch):
    sizes, real = [], copies._joined
    monkeypatch.setattr(copies, "_joined", lambda runs: sizes.append(runs.shape[1]) or real(runs))
    blanks, line = b" " * 20_000, ENGLISH[:100].encode()
    text = blanks + line + blanks
    spans = CopyIndex.of(text).spans(b"\n" * 40 + line + b" " * 500)
    assert [(span.start, span.stop, span.source) for span in spans] == [(40, 640, 20_000)]
    assert 1000 < max(sizes) <= copies.MOST_PLACES * 640


def test_a_long_copy_is_one_span():
    text = np.random.default_rng(0).integers(1, 200, 30_000, dtype=np.uint8).tobytes()
    assert CopyIndex.of(text).spans(text[5:20_000]) == [Span(0, 19_995, 5)]


def test_copies_of_characters_leave_out_parts_of_one():
    text = "前言。" + CHINESE[:60]
    index = CopyIndex.of(text.encode())
    # 昨 and 春 begin with other bytes than what is there, and 誩 with the same two
    written = "昨" + CHINESE[10:40] + chr(ord(CHINESE[40]) ^ 1) + "昨"
    (copy,) = find_copies(index, written)
    assert copy.text == written[copy.start : copy.stop] == CHINESE[10:40]
    assert text.encode()[copy.source :].startswith(copy.text.encode())
    assert copy.before == text[: 3 + 10][-13:]  # 39 bytes of at most 40
    assert index.spans(written.encode())[0].length == 3 * 30 + 2  # bytes
    assert find_copies(index, "") == find_copies(index, "昨") == []
    divided = CopyIndex.of(b"one\0" + CHINESE[:60].encode())
    assert find_copies(divided, CHINESE[:20])[0].before == ""


def test_copies_that_touch_or_overlap_cover_one_part():
    copies = [Copy(a, b, "", 0, "") for a, b in ((0, 5), (2, 9), (9, 12), (15, 20), (16, 18))]
    assert covered(copies) == [(0, 12), (15, 20)]
    assert covered([]) == []


@pytest.fixture
def large(monkeypatch) -> RunText:
    """A text that counts as large."""
    monkeypatch.setattr(copies, "KEPT_FROM", 1000)
    tokenizer = CharTokenizer(ENGLISH)
    tokens = np.array(tokenizer.encode(ENGLISH[:6000]), dtype=np.uint16)
    tokens[3000] = tokenizer.end_of_text_id
    return RunText(tokens[:5000], tokens[5000:], tokenizer, "of this text")


def test_a_large_text_is_indexed_once_and_a_damaged_index_is_made_anew(
    large, tmp_path, monkeypatch, capsys
):
    written = ENGLISH[2000:2100].encode()
    index = open_index(large, tmp_path)
    assert index.spans(written) == [Span(0, 100, 2000)]
    assert index.spans(ENGLISH[2950:3050].encode())[0].stop == 50  # no copy contains an end of text
    real = copies._make
    monkeypatch.setattr(copies, "_make", None)  # it is in the cache
    assert open_index(large, tmp_path).spans(written) == index.spans(written)
    (file,) = (tmp_path / "copies").glob("*/keys.bin")
    file.write_bytes(b"\0" * file.stat().st_size)
    monkeypatch.setattr(copies, "_make", real)
    assert open_index(large, tmp_path).spans(written) == index.spans(written)
    assert "keys.bin is damaged" in capsys.readouterr().out
    assert open_index(large, tmp_path).share == 1


def test_while_another_program_writes_the_cache_an_index_is_used_without(large, tmp_path):
    (tmp_path / "copies").mkdir()
    with FolderLock(tmp_path / "copies"):
        index = open_index(large, tmp_path)
    assert index.spans(ENGLISH[2000:2100].encode()) == [Span(0, 100, 2000)]
    assert list((tmp_path / "copies").glob("*/")) == []


def test_of_a_text_beyond_all_memory_a_sample_is_indexed(large, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "MOST_BYTES", 1280)
    index = open_index(large, tmp_path)
    assert len(index.text) == 1280
    assert index.share == open_index(large, tmp_path).share == 1280 / 5000


def test_the_index_takes_less_than_ten_bytes_of_memory_a_byte_of_text():
    text = np.random.default_rng(0).integers(0, 256, 1_000_000, dtype=np.uint8)
    tracemalloc.start()
    try:
        index = CopyIndex.of(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 10 * len(text)
    assert len(index.keys) == (len(text) - WINDOW) // STRIDE + 1
    assert index.keys.nbytes <= 2 * len(text)
