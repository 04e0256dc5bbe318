"""Which parts of a text stand word for word in the training text, and where."""

import contextlib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.console import say
from engine.errors import BusyError, CheckpointError, first_line
from insight.run_text import DIVIDER, RunText, sample_tokens, to_bytes
from storage.cache import keep_within_limit, note_use
from storage.files import (
    FolderLock,
    NewFolder,
    make_folder,
    remove_folder,
    remove_orphans,
    verify_folder,
)

FORMAT = 1  # of a folder in the cache; no other is read
WORD = 8  # bytes that are compared at once
WINDOW = 3 * WORD  # bytes that are looked up
STRIDE = 4  # between two windows of the training text that are looked up in
LEAST = WINDOW + STRIDE - 1  # bytes of a copy that is found wherever it begins
MOST_PLACES = 1000  # of one window: the first ones stand for all
MOST_BYTES = 256 << 20  # of the training text; of a larger one a sample is looked up in
KEPT_FROM = 1 << 20  # tokens of a text whose index is worth a place in the cache
BEFORE = 40  # bytes of the training text that are shown before a copy
TEXT_FILE, KEYS_FILE = "text.bin", "keys.bin"
BLOCK = 1 << 20  # windows that are hashed at once
AT_ONCE = 1 << 11  # bytes of a text whose windows are looked up at once
HALF = np.uint64(32)
# odd numbers with as many ones as zeros: each bit of a product depends on all lower ones
FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64
)


@dataclass(frozen=True)
class Span:
    """Bytes of a text, start to stop, that the training text has from `source` on."""

    start: int
    stop: int
    source: int

    @property
    def length(self) -> int:
        """The bytes of the span."""
        return self.stop - self.start


@dataclass(frozen=True)
class CopyIndex:
    """A text in which copies are looked up; it takes 3 bytes of memory or disk a byte.

    The keys, (N / STRIDE,) uint64 in order, have the hash of a window in their upper half and in
    the lower one its place in strides.
    """

    text: np.ndarray  # (N,) uint8
    keys: np.ndarray
    share: float = 1.0  # of the training text

    @classmethod
    def of(cls, text: bytes | np.ndarray) -> "CopyIndex":
        """The index of a text, in memory."""
        array = np.frombuffer(text, dtype=np.uint8) if isinstance(text, bytes) else text
        return cls(array, make_keys(array))

    def spans(self, written: bytes) -> list[Span]:
        """The parts of a text that are copied and can't be longer to either side.

        Each has LEAST bytes or more and is not within another one; they are in order and may
        overlap. No span contains the end of a document. Of a window that the training text has very
        often only the first MOST_PLACES are looked at.
        """
        content = np.frombuffer(written, dtype=np.uint8)
        found = [np.empty((3, 0), dtype=np.int64)]
        for start in range(0, len(content) - WINDOW + 1, AT_ONCE):
            runs = self._runs(content[start : start + AT_ONCE + WINDOW - 1])
            found.append(runs + np.array([[start], [start], [0]]))
        runs = _joined(np.concatenate(found, axis=1))
        starts, stops, sources = _extended(content, self.text, runs)
        order = np.lexsort((sources, -stops, starts))
        spans, reached = [], 0
        for start, stop, source in np.stack([starts, stops, sources], axis=1)[order].tolist():
            if stop > reached and stop - start >= LEAST:
                spans.append(Span(start, stop, source))
                reached = stop
        return spans

    def _runs(self, part: np.ndarray) -> np.ndarray:
        """Where windows of a part of a text are those of the training text, as _joined() runs."""
        words = _words(part)
        places = np.arange(len(part) - WINDOW + 1)
        hashes = _hashes(words, places)
        first = np.searchsorted(self.keys, hashes)
        counts = np.searchsorted(self.keys, hashes | (~np.uint64(0) >> HALF), side="right") - first
        counts = np.minimum(counts, MOST_PLACES)
        here = np.repeat(places, counts)
        number = np.arange(len(here)) - np.repeat(np.cumsum(counts) - counts, counts)
        keys = self.keys[np.repeat(first, counts) + number]
        there = (keys & (~np.uint64(0) >> HALF)).astype(np.int64) * STRIDE
        of_text = _words(self.text)
        is_same = np.ones(len(here), dtype=bool)
        for at in range(0, WINDOW, WORD):  # a hash alone is no proof
            is_same &= words[here + at] == of_text[there + at]
        here, there = here[is_same], there[is_same]
        return _joined(np.stack([here, here + WINDOW, there]))


def _joined(runs: np.ndarray) -> np.ndarray:
    """Runs, (3, R) of start, stop and source, with those of one copy that touch or overlap as one.

    Those of one copy have the same difference of source and start.
    """
    diagonals = runs[2] - runs[0]
    order = np.lexsort((runs[0], diagonals))
    (starts, stops, sources), diagonals = runs[:, order], diagonals[order]
    breaks = (diagonals[1:] != diagonals[:-1]) | (starts[1:] > stops[:-1])
    is_first = np.concatenate(([True], breaks))[: len(starts)]
    is_last = np.concatenate((breaks, [True]))[-len(starts) :][: len(starts)]
    return np.stack([starts[is_first], stops[is_last], sources[is_first]])


def _extended(written: np.ndarray, text: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Runs, (3, R), as far to both sides as both texts are the same."""
    starts, stops, sources = runs
    active = np.arange(len(starts))
    while len(active := active[(starts[active] > 0) & (sources[active] > 0)]):
        active = active[written[starts[active] - 1] == text[sources[active] - 1]]
        starts[active] -= 1
        sources[active] -= 1
    active = np.arange(len(starts))
    ends = sources + stops - starts
    while len(active := active[(stops[active] < len(written)) & (ends[active] < len(text))]):
        active = active[written[stops[active]] == text[ends[active]]]
        stops[active] += 1
        ends[active] += 1
    return np.stack([starts, stops, sources])


def _words(text: np.ndarray) -> np.ndarray:
    """The WORD bytes from each place of a text on, as numbers: a view, (N - WORD + 1,)."""
    n_words = max(0, len(text) - WORD + 1)
    return np.ndarray((n_words,), dtype="<u8", buffer=text.data, strides=(1,))


def _hashes(words: np.ndarray, places: np.ndarray | slice) -> np.ndarray:
    """The hash of each window, (N,) uint64, in the upper half; the lower one is 0."""
    steps = range(0, WINDOW, WORD)
    if isinstance(places, slice):
        parts = [words[places.start + at : places.stop + at : places.step] for at in steps]
    else:
        parts = [words[places + at] for at in steps]
    mixed = np.zeros(len(parts[0]), dtype=np.uint64)
    for part, factor in zip(parts, FACTORS, strict=False):
        mixed += part * factor
        mixed ^= mixed >> HALF
    return (mixed * FACTORS[-1]) >> HALF << HALF


def make_keys(text: np.ndarray) -> np.ndarray:
    """The keys of a CopyIndex; besides them it needs a few MB."""
    n_windows = max(0, (len(text) - WINDOW) // STRIDE + 1)
    keys, words = np.empty(n_windows, dtype=np.uint64), _words(text)
    for first in range(0, n_windows, BLOCK):
        last = min(n_windows, first + BLOCK)
        places = slice(first * STRIDE, (last - 1) * STRIDE + 1, STRIDE)
        keys[first:last] = _hashes(words, places)
        keys[first:last] |= np.arange(first, last, dtype=np.uint64)
    keys.sort()
    return keys


def open_index(text: RunText, cache: Path) -> CopyIndex:
    """The index of a run's training text: from the cache, or made, and kept there if it is large.

    Of more than MOST_BYTES it is that of a sample, spread evenly. Raises ResourceError.
    """
    if len(text.train) < KEPT_FROM:
        return CopyIndex.of(to_bytes(text.train, text.tokenizer))
    folder = cache / "copies" / hashlib.sha256(text.fingerprint.encode()).hexdigest()[:24]
    make_folder(folder.parent)
    if (index := _read(folder)) is None:
        index = _make(text)
        with contextlib.suppress(BusyError), FolderLock(folder.parent):  # another one makes it too
            remove_orphans(folder.parent)
            if not folder.exists():
                with NewFolder(folder, {"format": FORMAT, "share": index.share}) as new:
                    new.write(TEXT_FILE, [index.text.data])
                    new.write(KEYS_FILE, [index.keys.data.cast("B")])
            keep_within_limit(
                [path.parent for path in folder.parent.glob(f"*/{TEXT_FILE}")], folder
            )
    else:
        note_use(folder)
    return index


def _make(text: RunText) -> CopyIndex:
    """The index of a large training text, or of a sample of it."""
    probe = sample_tokens(text.train, 1 << 16)
    n_fitting = int(MOST_BYTES * len(probe) / len(to_bytes(probe, text.tokenizer)))
    tokens = sample_tokens(text.train, n_fitting)
    content = np.frombuffer(to_bytes(tokens, text.tokenizer), dtype=np.uint8)
    return CopyIndex(content, make_keys(content), len(tokens) / len(text.train))


def _read(folder: Path) -> CopyIndex | None:
    """An index in the cache; None if there is none. A damaged one is removed."""
    if not folder.is_dir():
        return None
    try:
        facts = verify_folder(folder, [TEXT_FILE, KEYS_FILE])
        content = np.memmap(folder / TEXT_FILE, dtype=np.uint8, mode="r")
        keys = np.memmap(folder / KEYS_FILE, dtype=np.uint64, mode="r")
        if facts["format"] == FORMAT:
            return CopyIndex(content, keys, facts["share"])
    except (CheckpointError, KeyError) as error:
        say(f"Note: {first_line(error)}; it is made anew")
    remove_folder(folder)
    return None


@dataclass(frozen=True)
class Copy:
    """A part of a text that stands word for word in the training text."""

    start: int  # in characters, as the stop
    stop: int
    text: str
    source: int  # the byte of the training text that it begins at
    before: str  # what the training text has there before it, in the same document


def find_copies(index: CopyIndex, text: str) -> list[Copy]:
    """The copied parts of a text, in order; they may overlap. A part of a character is left out."""
    content = text.encode("utf-8", "replace")
    # the character that each byte belongs to: bytes that go on with one are 10xxxxxx
    begins = (np.frombuffer(content, dtype=np.uint8) & 0xC0) != 0x80
    starts = np.append(np.flatnonzero(begins), len(content))
    copies = []
    for span in index.spans(content):
        start, after = np.searchsorted(starts, (span.start, span.stop + 1)).tolist()
        source = span.source + int(starts[start]) - span.start
        before = index.text[max(0, source - BEFORE) : source].tobytes().rpartition(DIVIDER)[2]
        # its first character may have begun earlier
        words = before.lstrip(bytes(range(0x80, 0xC0))).decode("utf-8", "replace")
        copies.append(Copy(start, after - 1, text[start : after - 1], source, words))
    return copies


def covered(copies: Iterable[Copy]) -> list[tuple[int, int]]:
    """The parts of a text that some copies, in order, cover: (start, stop) in characters, apart."""
    joined: list[tuple[int, int]] = []
    for copy in copies:
        if joined and copy.start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(copy.stop, joined[-1][1])
        else:
            joined.append((copy.start, copy.stop))
    return joined
