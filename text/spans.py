"""How much of a text is there twice: within what trains, and in what trains and validates.

Spans of 64 bytes are compared by their hashes, so that copies are found however far apart they
are, as by a compressor whose window is as large as the text, in a tenth of its time.
"""

from array import array

import numpy as np

SPAN_POWER = 6  # a span is 2**6 = 64 bytes long
SPAN = 1 << SPAN_POWER
MOST_SPANS = 1 << 19  # compared with each other
LEAST_LINE = 20  # bytes of a line that says something when both sides have it
BLOCK = 1 << 20  # bytes of a long text that are looked at together
WORD, CHOSEN_POWER = 8, 4  # of a long text, spans by their first 8 bytes: one of 2**4
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def measure_repeats(train: bytes, val: bytes) -> tuple[float, float]:
    """The share of the training text's spans that came before, and of validation's that are in it.

    Lines count as wholes where most of the validation text is in them. Where there are more than
    MOST_SPANS, only spans of some hashes count, and so all copies of those that do.
    """
    if len(train) < SPAN:
        return 0.0, 0.0
    hashes = _span_hashes(train)
    held_out = _span_hashes(val) if len(val) >= SPAN else hashes[:0]
    divisor = np.uint64(-(-len(hashes) // MOST_SPANS))
    some = hashes[hashes % divisor == 0]
    if len(some) >= len(hashes) / float(divisor) / 2:
        hashes, held_out = some, held_out[held_out % divisor == 0]
    else:  # few different spans, of which the divisor happens to miss most
        hashes = hashes[:MOST_SPANS].copy()
    repeated, leaked = _shares(hashes, held_out)
    return repeated, max(leaked, round(_leaked_lines(train, val), 4))


def _shares(hashes: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """The share of some spans that came before, and of others that are among them."""
    hashes = np.sort(hashes)  # np.unique() takes ten times as long for numbers of 64 bits
    repeated = np.count_nonzero(hashes[1:] == hashes[:-1]) / len(hashes)
    leaked = 0.0
    if len(held_out):
        places = np.minimum(np.searchsorted(hashes, held_out), len(hashes) - 1)
        leaked = float((hashes[places] == held_out).mean())
    return round(repeated, 4), round(leaked, 4)


def _leaked_lines(train: bytes, val: bytes) -> float:
    """The share of the validation text in lines of LEAST_LINE bytes or more that the training text
    has too; 0 below half: a text repeats some of its lines, as code does."""
    known = set(train.splitlines())
    found = [line for line in val.splitlines() if len(line) >= LEAST_LINE and line in known]
    share = sum(map(len, found)) / max(1, len(val))
    return share if share > 0.5 else 0.0


def _span_hashes(content: bytes) -> np.ndarray:
    """A hash of the 64 bytes from each position on, (n - 63,) uint64."""
    hashes = np.frombuffer(content, np.uint8).astype(np.uint64) + np.uint64(1)
    factor = int(_FACTOR)
    for power in range(SPAN_POWER):
        # the hash of twice the length, of two neighbors; wrap-around is meant
        half = 1 << power
        hashes = hashes[:-half] * np.uint64(factor) + hashes[half:]
        hashes ^= hashes >> np.uint64(29)
        factor = factor * 0xBF58476D1CE4E5B9 % 2**64 | 1
    return hashes


class SpanSample:
    """Spans of a text of any length, in bounded memory: all copies of those that are chosen.

    A span is chosen by its first 8 bytes, and by its hash where there are too many.
    """

    def __init__(self) -> None:
        self.n_bytes = 0
        self._pieces: list[bytes] = []  # to look at, after the last 63 bytes of those before
        self._waiting = 0  # bytes of them
        self._starts, self._sides = array("Q"), array("B")  # of those pieces
        self._divisor = np.uint64(1)
        self._hashes = np.empty(0, np.uint64)
        self._places = np.empty(0, np.uint64)  # where each span begins in the text
        self._validates = np.empty(0, bool)  # whether its document does

    def add(self, content: bytes, validates: bool) -> None:
        """Take the next bytes of a document."""
        self._starts.append(self.n_bytes)
        self._sides.append(validates)
        self._pieces.append(content)
        self.n_bytes += len(content)
        self._waiting += len(content)
        if self._waiting >= BLOCK:
            self._look()

    def shares(self, n_train: int | None) -> tuple[float, float] | None:
        """What measure_repeats() returns for the whole text; None where so few different spans are
        in it that the choice missed most. The first n_train bytes train; None: by documents."""
        self._look()
        validates = self._validates if n_train is None else self._places >= n_train
        hashes, held_out = self._hashes[~validates], self._hashes[validates]
        expected = self.n_bytes / 2**CHOSEN_POWER / float(self._divisor)
        if len(hashes) == 0 or len(self._hashes) < expected / 2:
            return None
        return _shares(hashes, held_out)

    def _look(self) -> None:
        """Choose among the spans that begin in the waiting pieces."""
        content = b"".join(self._pieces)
        if len(content) < SPAN:
            return
        # a number at each byte: the eight from there on
        words = np.ndarray((len(content) - WORD + 1,), "<u8", content, strides=(1,))
        own = words[: len(content) - SPAN + 1] * _FACTOR
        chosen = np.flatnonzero(own < np.uint64(1 << 64 - CHOSEN_POWER))
        hashes = np.ones(len(chosen), np.uint64)
        for start in range(0, SPAN, WORD):
            hashes = (hashes ^ words[chosen + start]) * _FACTOR
            hashes ^= hashes >> np.uint64(29)
        starts = np.frombuffer(self._starts, np.uint64)
        places = chosen.astype(np.uint64) + np.uint64(self.n_bytes - len(content))
        documents = np.searchsorted(starts, places, side="right") - 1
        validates = np.frombuffer(self._sides, np.uint8)[documents].astype(bool)
        self._keep(
            np.concatenate([self._hashes, hashes]),
            np.concatenate([self._places, places]),
            np.concatenate([self._validates, validates]),
        )
        rest = content[len(content) - SPAN + 1 :]
        self._pieces, self._waiting = [rest], 0
        first = int(np.searchsorted(starts, self.n_bytes - len(rest), side="right")) - 1
        self._starts, self._sides = self._starts[first:], self._sides[first:]

    def _keep(self, hashes: np.ndarray, places: np.ndarray, validates: np.ndarray) -> None:
        """Keep spans of some hashes, fewer where MOST_SPANS would be exceeded."""
        while True:
            kept = (hashes >> np.uint64(20)) % self._divisor == 0
            hashes, places, validates = hashes[kept], places[kept], validates[kept]
            if len(hashes) <= MOST_SPANS or self._divisor > MOST_SPANS:
                break
            self._divisor *= np.uint64(2)
        self._hashes, self._places, self._validates = hashes, places, validates
