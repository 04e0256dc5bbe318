"""Which documents train and which validate: by their tokens, whole wherever that can be."""

from dataclasses import dataclass

import numpy as np

FEWEST = 20  # documents to choose from; the validation tokens of fewer are the last ones
TOLERANCE = 0.02  # of all tokens, between the validation share and 1 - train_ratio
TRIES = 64  # beginnings in the order of hashes


@dataclass(frozen=True)
class Split:
    """The documents to validate on, and the one that is cut between the two sides."""

    is_val: np.ndarray  # (N,) bool
    cut: int | None = None  # the index of a training document whose end validates
    n_cut: int = 0  # the tokens of that end


def split_documents(digests: np.ndarray, sizes: np.ndarray, train_ratio: float) -> Split | None:
    """Divide documents by (N,) uint64 hashes of their texts and (N,) sizes in tokens.

    Documents are chosen in the order of their hashes, so that neither a seed nor the order of the
    files changes the choice; equal ones stay together. The validation share is within TOLERANCE of
    1 - train_ratio, and closer where that is small. Where whole documents can't make it, or one
    outweighs the others, the end of the longest training document is added. Returns None for fewer
    than FEWEST documents, and for copies of so few texts that only a cut by position divides them.
    """
    if len(sizes) < FEWEST:
        return None
    values, group_of = np.unique(digests, return_inverse=True)
    weights = np.bincount(group_of, sizes + 1.0)  # the end-of-text counts too
    total, share = weights.sum(), 1 - train_ratio
    target, tolerance = share * total, total * min(TOLERANCE, share / 5, train_ratio / 5)
    fits = weights <= target
    # beside a document too long to validate, the others must not all validate
    rooms = [min(target, max(0.5, share) * weights[fits].sum()), target]
    for room in rooms:
        chosen = _choose(weights, fits, room, tolerance)
        missing = target - weights[chosen].sum()
        is_val = chosen[group_of]
        if abs(missing) <= tolerance and 0 < chosen.sum() < len(values):
            return Split(is_val)
        # of equally long ones the last by hash, whatever the order of the files
        longest = int(np.lexsort((digests, np.where(is_val, -1, sizes)))[-1])
        n_cut = max(1, round(missing))
        if not is_val[longest] and n_cut < sizes[longest]:
            return Split(is_val, longest, n_cut)
    return None


def split_whole(digests: np.ndarray, sizes: np.ndarray, train_ratio: float) -> np.ndarray | None:
    """The documents to validate on if none may be cut, (N,) bool; None if all are equal.

    As split_documents() chooses them, but for any number of documents; at least one validates, and
    at least one trains.
    """
    values, group_of = np.unique(digests, return_inverse=True)
    if len(values) < 2:
        return None
    weights = np.bincount(group_of, sizes)
    total, share = weights.sum(), 1 - train_ratio
    target, tolerance = share * total, total * min(TOLERANCE, share / 5, train_ratio / 5)
    chosen = _choose(weights, weights <= target, target, tolerance)
    if not chosen.any():
        chosen[np.argmin(weights)] = True
    return chosen[group_of]


def split_by_position(sizes: np.ndarray, train_ratio: float) -> Split:
    """Divide documents, (N,) sizes in tokens, so that the last tokens of all validate."""
    ends = np.cumsum(sizes)
    n_train = int(ends[-1] * train_ratio)
    is_val = ends - sizes >= n_train
    last = int(np.argmax(ends > n_train))  # the document that holds the place
    if is_val[last]:
        return Split(is_val)
    return Split(is_val, last, int(ends[last]) - n_train)


def _choose(weights: np.ndarray, fits: np.ndarray, room: float, tolerance: float) -> np.ndarray:
    """Groups of equal documents that fill the room, the last in the order first; (G,) bool."""
    order = np.flatnonzero(fits)[::-1]
    best, least = np.zeros(len(weights), dtype=bool), room
    for start in range(min(len(order), TRIES)):
        chosen, gap = np.zeros(len(weights), dtype=bool), room
        for group in np.roll(order, -start):
            if weights[group] <= gap:
                chosen[group] = True
                gap -= weights[group]
            if gap < tolerance / 100:
                break
        left = order[~chosen[order]]
        if len(left):  # one more, where too much is closer than too little
            smallest = left[np.argmin(weights[left])]
            if weights[smallest] < 2 * gap:
                chosen[smallest] = True
                gap -= weights[smallest]
        if abs(gap) < least:
            best, least = chosen, abs(gap)
        if least <= tolerance / 2:
            break
    return best
