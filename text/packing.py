"""Conversations packed into windows, so that no token is padding in vain.

Torch-free, and pure functions of the tokens: the same conversations give the same windows.
"""

import itertools
from dataclasses import dataclass

import numpy as np

BLOCK = 1 << 18  # tokens that are searched at once


@dataclass(frozen=True)
class Pieces:
    """What a model is trained on of conversations, each of which is a row of a window or less.

    Piece i has lengths[i] inputs, the tokens from starts[i] on; its targets are one token later.
    """

    starts: np.ndarray  # (N,) int64
    lengths: np.ndarray  # (N,) int64
    n_cut: int = 0  # conversations that lack their end
    n_left_out: int = 0  # that have no answer which fits, and are in no piece

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True)
class Packing:
    """Pieces in windows, one after another: window i has order[ends[i - 1] : ends[i]]."""

    order: np.ndarray  # (N,) int64
    ends: np.ndarray  # (windows,) int64

    def __len__(self) -> int:
        return len(self.ends)

    def window(self, number: int) -> np.ndarray:
        """The pieces of a window."""
        return self.order[self.ends[number - 1] if number else 0 : self.ends[number]]


def cut_pieces(
    boundaries: np.ndarray,
    is_target: np.ndarray,
    most: int,
    *,
    is_text: np.ndarray | None = None,
) -> Pieces:
    """The pieces of at most `most` inputs of conversations that begin at boundaries, (N,).

    is_target, (tokens,), marks the tokens that count. A piece ends with the last of them, as what
    follows trains nothing. A conversation that is too long ends with the last answer that fits in
    full; one without such an answer is left out. is_text, (N,), marks those that are texts (None:
    none is): each counts in full, and is cut into as many pieces as it needs.
    """
    stops = np.append(boundaries, len(is_target))[1:]
    is_text = np.zeros(len(boundaries), bool) if is_text is None else is_text
    lengths = _last_counted(boundaries, stops, is_target, is_text) - boundaries
    is_long = lengths > most
    fits = (lengths > 0) & ~is_long
    starts, sizes = [boundaries[fits]], [lengths[fits]]
    n_cut = n_left_out = 0
    for start, stop, text in zip(
        boundaries[is_long], stops[is_long], is_text[is_long], strict=True
    ):
        if text:
            places = np.arange(start, stop - 1, most)
            starts.append(places)
            sizes.append(np.minimum(most, stop - 1 - places))
            continue
        size = _length_of_answers(is_target[start:stop], most)
        n_cut, n_left_out = n_cut + (size > 0), n_left_out + (size == 0)
        if size > 0:
            starts.append(np.array([start]))
            sizes.append(np.array([size]))
    firsts, lengths = (np.concatenate(found).astype(np.int64) for found in (starts, sizes))
    order = np.argsort(firsts, kind="stable")
    return Pieces(firsts[order], lengths[order], n_cut, n_left_out)


def _last_counted(
    boundaries: np.ndarray, stops: np.ndarray, is_target: np.ndarray, is_text: np.ndarray
) -> np.ndarray:
    """The last token of each that counts, (N,); -1 where none does. Reads conversations alone, in
    blocks: a list of all places that count would be eight times as large as the marks."""
    last = np.where(is_text, stops - 1, -1)
    for at in range(0, len(is_target), BLOCK):
        first = int(np.searchsorted(stops, at, "right"))
        here = slice(first, int(np.searchsorted(boundaries, at + BLOCK)))
        if is_text[here].all():
            continue
        counted = at + np.flatnonzero(is_target[at : at + BLOCK])
        place = np.searchsorted(counted, stops[here])  # behind the last one that is before a stop
        last[here] = np.maximum(last[here], np.append(-1, counted)[place])
    return last


def _length_of_answers(is_target: np.ndarray, most: int) -> int:
    """The inputs of a conversation up to the last answer that fits in full; 0 if none does."""
    counts = is_target.astype(bool)
    is_end = counts & ~np.append(counts[1:], False)
    ends = np.flatnonzero(is_end[: most + 1])
    return int(ends[-1]) if len(ends) else 0


def pack(lengths: np.ndarray, most: int, seed: int) -> Packing:
    """Pack pieces of some lengths, (N,), into windows of at most `most` tokens.

    Best fit, the longest first (Johnson 1974): each piece goes where the least room is left. Of
    equally long ones the seed decides, so that neighbors in a file are not neighbors here too.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    windows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(most + 1)]  # the windows by the room left
    rooms = 0  # bit n is set where with_room[n] has any
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        assert 0 < length <= most, "cut_pieces() makes them fit"
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit
            window = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            window, room = len(windows), most
            windows.append([])
        windows[window].append(piece)
        with_room[room - length].append(window)
        rooms |= 1 << (room - length)
    ends = np.cumsum([len(window) for window in windows], dtype=np.int64)
    return Packing(np.fromiter(itertools.chain(*windows), np.int64, len(lengths)), ends)
