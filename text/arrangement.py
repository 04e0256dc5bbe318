"""The order of documents in a token file: training tokens first, some documents several times."""

from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.errors import DataError
from storage.files import NewFile, remove_file, rename_file
from text.split import Split, split_by_position, split_documents, split_whole

COPIED = 1 << 21  # tokens that are copied at once


def _numbers() -> "array[int]":
    return array("Q")


@dataclass
class Side:
    """The training or the validation documents in a token file; positions are in tokens."""

    counts: np.ndarray  # (V,) how often each token occurs
    stop: int = 0
    unanswered: int = 0  # rows of conversations without an answer, which are no documents
    first: "array[int]" = field(default_factory=_numbers)  # token of each document
    ends: "array[int]" = field(default_factory=_numbers)  # of each; an end-of-text may follow
    digests: "array[int]" = field(default_factory=_numbers)  # of each document's text
    prompts: "array[int]" = field(default_factory=_numbers)  # of each Conversation.prompt
    chat: "array[int]" = field(default_factory=lambda: array("b"))  # whether it is a conversation

    def add(self, start: int, stop: int, digest: int, prompt: int, *, is_chat: bool) -> None:
        """Note a document that has been written."""
        self.first.append(start)
        self.ends.append(stop)
        self.digests.append(digest)
        self.prompts.append(prompt)
        self.chat.append(is_chat)

    @property
    def starts(self) -> np.ndarray:
        """Where each document begins, (N,) int64."""
        return np.frombuffer(self.first, dtype=np.uint64).astype(np.int64)

    @property
    def stops(self) -> np.ndarray:
        """Where each document ends, (N,) int64."""
        return np.frombuffer(self.ends, dtype=np.uint64).astype(np.int64)

    @property
    def hashes(self) -> np.ndarray:
        """Of each document's text, (N,) uint64."""
        return np.frombuffer(self.digests, dtype=np.uint64)

    @property
    def prompt_hashes(self) -> np.ndarray:
        """Of each conversation's prompt, (N,) uint64; of a text it says nothing."""
        return np.frombuffer(self.prompts, dtype=np.uint64)

    @property
    def is_chat(self) -> np.ndarray:
        """Which documents are conversations, (N,) bool."""
        return np.frombuffer(self.chat, dtype=np.int8).astype(bool)


def divide(side: Side, train_ratio: float, *, by_position: bool) -> Split | None:
    """Which documents of a text without validation documents of its own validate.

    Conversations are never cut, and those with one prompt stay on one side; they and the texts
    among them are divided each by themselves. Returns None for a text that the caller is to divide
    by position, unless by_position asks for that here. Raises DataError for a single conversation.
    """
    sizes = side.stops - side.starts
    if not side.is_chat.any():
        split = split_documents(side.hashes, sizes, train_ratio)
        return split_by_position(sizes, train_ratio) if split is None and by_position else split
    is_val = np.zeros(len(sizes), bool)
    chats, texts = np.flatnonzero(side.is_chat), np.flatnonzero(~side.is_chat)
    chosen = split_whole(side.prompt_hashes[chats], sizes[chats], train_ratio)
    if chosen is None:  # one question, with several answers perhaps
        chosen = split_whole(side.hashes[chats], sizes[chats], train_ratio)
    if chosen is None:
        raise DataError(
            "there is only one conversation, and one to validate on is needed besides.\n"
            'Add some, or name others to validate on: DATA = {"path": ..., "val": ...}.'
        )
    is_val[chats] = chosen
    if not len(texts):
        return Split(is_val)
    split = split_documents(side.hashes[texts], sizes[texts], train_ratio)
    split = split or split_by_position(sizes[texts], train_ratio)
    is_val[texts] = split.is_val
    cut = None if split.cut is None else int(texts[split.cut])
    return Split(is_val, cut, split.n_cut)


def times_seen(
    weights: np.ndarray, part_of: np.ndarray, hashes: np.ndarray, is_val: np.ndarray
) -> np.ndarray:
    """How often each training document is seen in an epoch, (N,), by the weights of the parts.

    Of a part with the weight 2.5 each document is seen twice, and half of them once more: those
    with the smallest hashes. Raises DataError where none is left to train on.
    """
    times = np.floor(weights)[part_of].astype(np.int64)
    for part, weight in enumerate(weights):
        mine = np.flatnonzero((part_of == part) & ~is_val)
        n_more = round((weight % 1) * len(mine))
        times[mine[np.argsort(hashes[mine], kind="stable")[:n_more]]] += 1
    if not times[~is_val].any():
        raise DataError(
            'the "weight" of each text in DATA leaves none of its documents to train on.'
        )
    return times


def arrange(
    folder: Path,
    sides: list[Side],
    dtype: np.dtype,
    end_of_text_id: int,
    split: Split | None,
    times: np.ndarray | None,
    *,
    has_val: bool,
) -> int | None:
    """Make tokens.bin of all.bin, training tokens first; returns the number of those.

    With conversations also targets.bin of all-targets.bin, and starts.bin. times is how often each
    training document comes; None: once. Returns None if the caller is to divide training and
    validation by position.
    """
    train, val = sides
    is_chat = any(side.is_chat.any() for side in sides)
    if not is_chat:
        remove_file(folder / "all-targets.bin")  # there if all rows were without an answer
    if split is None and times is None and not is_chat:
        rename_file(folder / "all.bin", folder / "tokens.bin")
        return train.stop if has_val else None
    parts = [_chosen(train, split, times, validates=False)]
    parts.append(_chosen(*((val, None, None) if has_val else (train, split, None)), validates=True))
    end_of_text = np.array([end_of_text_id], dtype=dtype)
    if is_chat:
        sizes = _write_documents(folder, parts, sides, end_of_text)
    else:
        sizes = _write_spans(folder, parts, end_of_text)
    for source in folder.glob("all*.bin"):  # which nothing maps any more: Windows would refuse
        remove_file(source)
    return sizes[0]


def _chosen(
    side: Side, split: Split | None, times: np.ndarray | None, *, validates: bool
) -> np.ndarray:
    """The documents of training or validation in their order, (N, 2), as (start, stop)."""
    starts, ends = side.starts, side.stops
    chosen = np.ones(len(starts), bool)
    if split is not None:
        chosen = split.is_val.copy() if validates else ~split.is_val
        if split.cut is not None:
            chosen[split.cut] = True
            place = ends[split.cut] - split.n_cut
            (starts if validates else ends)[split.cut] = place
    times = np.ones(len(starts), np.int64) if times is None else times
    passes = [chosen & (times > n) for n in range(times.max(initial=0))]
    return np.concatenate([np.column_stack((starts[these], ends[these])) for these in passes])


def _write_spans(folder: Path, parts: list[np.ndarray], end_of_text: np.ndarray) -> list[int]:
    """Write texts with an end-of-text between those of a side; returns both sides' tokens.

    Adjacent documents are one span, with the end-of-text that is between them.
    """
    source = np.memmap(folder / "all.bin", end_of_text.dtype, "r")
    sizes = []
    with NewFile(folder / "tokens.bin", durable=False) as file:
        for documents in parts:
            first, last = documents.T
            is_new = np.concatenate(([True], first[1:] != last[:-1] + 1))
            is_end = np.concatenate((is_new[1:], [True]))
            size = 0
            for start, stop in zip(first[is_new].tolist(), last[is_end].tolist(), strict=True):
                if size:
                    file.write(end_of_text.data.cast("B"))
                    size += 1
                for at in range(start, stop, COPIED):
                    file.write(source[at : min(stop, at + COPIED)].data.cast("B"))
                size += stop - start
            sizes.append(size)
    return sizes


def _write_documents(
    folder: Path, parts: list[np.ndarray], sides: list[Side], end_of_text: np.ndarray
) -> list[int]:
    """Write conversations, and texts with an end-of-text behind each; returns both sides' tokens.

    The end-of-text counts as a target: a model learns that a text ends. starts.bin has the place
    of each conversation, and ~place of a text.
    """
    source = np.memmap(folder / "all.bin", end_of_text.dtype, "r")
    marks = np.memmap(folder / "all-targets.bin", np.uint8, "r")
    text_starts = {start for s in sides for start in s.starts[~s.is_chat].tolist()}
    text_ends = {stop for s in sides for stop in s.stops[~s.is_chat].tolist()}
    sizes, starts, position = [], array("q"), 0
    with (
        NewFile(folder / "tokens.bin", durable=False) as tokens,
        NewFile(folder / "targets.bin", durable=False) as targets,
    ):
        for documents in parts:
            before = position
            for start, stop in documents.tolist():
                is_text = start in text_starts or stop in text_ends  # one may be cut
                starts.append(~position if is_text else position)
                for at in range(start, stop, COPIED):
                    end = min(stop, at + COPIED)
                    tokens.write(source[at:end].data.cast("B"))
                    targets.write(marks[at:end].data)
                position += stop - start
                if stop in text_ends:
                    tokens.write(end_of_text.data.cast("B"))
                    targets.write(b"\1")
                    position += 1
            sizes.append(position - before)
    with NewFile(folder / "starts.bin", durable=False) as file:
        file.write(np.frombuffer(starts, np.int64).astype("<i8").tobytes())
    return sizes
