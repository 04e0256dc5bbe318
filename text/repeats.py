"""How much of a document copies what came before in it, as in a book that was pasted twice."""

import re

SEEN_CHARACTERS = 16_000_000  # of the text; a set of the hashes of their lines takes up to 90 MB
LEAST, LEAST_WIDE = 32, 12  # characters of a passage; shorter ones recur in any text
LONG_LINE = 1000  # characters, from which a line is divided into sentences
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])")


class Repeats:
    """Counts the characters of lines and sentences that occurred before in their document."""

    def __init__(self) -> None:
        self.characters = self.counted = self.copied = 0
        self._seen: set[int] = set()
        self._rest: list[str] = []  # of the last line, whose end is yet to come

    @property
    def share(self) -> float:
        """The share of copies among the long passages in the first SEEN_CHARACTERS of the text.

        It is 0 where short ones make up most of the text.
        """
        return self.copied / self.counted if 2 * self.counted > self.characters else 0.0

    def add(self, piece: str, is_last: bool) -> None:
        """Take the next piece of a document."""
        if self.characters >= SEEN_CHARACTERS:
            return
        self.characters += len(piece)
        head, end, tail = piece.rpartition("\n")
        if end:
            self._count("".join([*self._rest, head]))
            self._rest = []
        self._rest.append(tail)
        if is_last:
            self._count("".join(self._rest))
            self._rest, self._seen = [], set()

    def _count(self, text: str) -> None:
        for line in text.split("\n"):
            for passage in _SENTENCE_END.split(line) if len(line) > LONG_LINE else (line,):
                passage = passage.strip()
                if len(passage) >= LEAST or (len(passage) >= LEAST_WIDE and not passage.isascii()):
                    known = hash(passage)
                    self.counted += len(passage)
                    self.copied += len(passage) * (known in self._seen)
                    self._seen.add(known)
