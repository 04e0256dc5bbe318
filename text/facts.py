"""What a text is like: its size, how hard it is to predict, and its tokens by each tokenizer.

A recipe is chosen from these facts before the text is tokenized. One pass reads all of the text;
what takes longer than reading is measured on an even sample of it.
"""

import bz2
import hashlib
import itertools
import json
import zlib
from array import array
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.console import Progress, say
from engine.errors import DataError, ResourceError, SettingsError, first_line
from engine.settings import check, from_json, setting
from storage.files import make_folder, write_json
from text.documents import (
    DataSpec,
    Documents,
    Part,
    ReadingReport,
    dataset_fingerprint,
    has_conversations,
    read_documents,
    validation_parts,
)
from text.learn_bpe import learn_bpe
from text.sources import find_parts
from text.spans import SpanSample, measure_repeats
from text.split import FEWEST
from text.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    can_train,
    load_tokenizer,
)
from text.tokenizer_file import SHORT_WORDS, ranks_of

FORMAT = 6  # of the facts in the cache; no other is read
SAMPLE_BYTES = 8 << 20  # a larger text is sampled evenly: more make no difference
CHUNK = 1 << 15  # characters of the sample that lie together
BPE_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
LEAST_BYTES_A_TOKEN = 60  # of text for each token of a vocabulary that is worth learning
BPE_BYTES = 3 << 19  # of the sample, to learn vocabularies from
ENCODED_BYTES = 1 << 17  # of the validation text, to count tokens in
BZ2_BLOCK = 880_000  # bytes that bz2 compresses together, a little below its 900,000
BZ2_PIECES, BZ2_PIECE = 2, 150_000  # of validation text, each behind as much training text as fits
LEAST_MEASURED = 4096  # bytes: of fewer, bz2's tables take more than what they say
ENTROPY_BYTES = 1 << 20


@dataclass(frozen=True)
class TextFacts:
    """What a recipe needs to know of a text. Sizes are in bytes of UTF-8, entropies in bits a byte.

    Raises SettingsError with every wrong value.
    """

    fingerprint: str = setting()  # of the text's content
    train_bytes: int = setting(minimum=0)
    val_bytes: int = setting(minimum=0)
    n_characters: int = setting(minimum=0)
    distinct_characters: int = setting(minimum=0)
    entropies: list[Any] = setting()  # of a byte, given none, one and two bytes before it
    bz2_bits: float = setting(minimum=0)  # of a byte of validation text, given training text
    repeated: float = setting(minimum=0, maximum=1)  # share of the training text, of 64 bytes each
    leaked: float = setting(minimum=0, maximum=1)  # share of validation text that is in training's
    document_bytes: int = setting(minimum=0)  # the document that the median byte is in
    bytes_per_token: dict[str, Any] = setting()  # by TOKENIZER's values, on validation text
    vocabularies: dict[str, Any] = setting()  # their numbers of tokens
    can_train: bool = setting()  # whether the library that trains vocabularies is there
    is_chat: bool = setting(False)  # whether it has conversations, of which the answers count

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def conflicts(values: dict[str, Any]) -> list[str]:
        """The problems of the fields that hold several numbers."""
        known, sizes = values["bytes_per_token"] or {}, values["vocabularies"] or {}
        faulty = [f"bytes_per_token is {known!r}; it must be above 0 for at least one tokenizer"]
        problems = [] if known and all(_is_number(size) for size in known.values()) else faulty
        if known.keys() != sizes.keys():
            problems.append("vocabularies must name the tokenizers of bytes_per_token")
        entropies = values["entropies"] or []
        if len(entropies) != 3 or not all(isinstance(e, int | float) for e in entropies):
            problems.append(f"entropies is {entropies!r}; it must be 3 numbers")
        return problems

    @property
    def unique_bytes(self) -> int:
        """The training text without its repeats, at least 1 byte."""
        return max(1, round(self.train_bytes * (1 - self.repeated)))

    @property
    def bytes_per_character(self) -> float:
        """The mean length of a character in UTF-8."""
        return (self.train_bytes + self.val_bytes) / max(1, self.n_characters)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


def find_facts(
    spec: DataSpec,
    train_ratio: float,
    cache: Path,
    *,
    tokenizer: str | None = None,
    stand_in: bool | None = None,
) -> TextFacts:
    """The facts of DATA, from the cache if its files have not changed.

    tokenizer is TOKENIZER's value, None for "auto": where it is set, no other one is measured.
    stand_in is that of corpus_path(). Raises DataError for data that can't be read, SettingsError
    for a missing library.
    """
    report = ReadingReport(stand_in=stand_in)
    train = find_parts(spec.train, cache, report, spec.weights)
    val = find_parts(spec.val, cache, report) if spec.val else validation_parts(train)
    files = [*train, *val]
    if tokenizer is not None and tokenizer.endswith(".json"):
        files.append(Part(tokenizer, Path(tokenizer).expanduser()))
    states = [_state_of(part) for part in files]
    key = [FORMAT, asdict(spec), train_ratio, tokenizer, can_train(), states]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    file = cache / "facts" / f"{name}.json"
    if (known := _kept(file)) is not None:
        return known
    size = sum(part.path.stat().st_size for part in (*train, *val) if part.path)
    with Progress("Measuring", size) as progress:

        def watched(parts: list[Part], sizes: list[int]) -> Documents:
            for part in parts:
                sizes.append(0)
                for piece in read_documents([part], spec, report):
                    progress.show(report.bytes_read)
                    sizes[-1] += len(piece[0])
                    yield piece

        sizes: list[int] = []  # of what trains, part by part, in characters
        validation = watched(val, []) if val else None
        measured = measure_text(
            watched(train, sizes), train_ratio, validation=validation, tokenizer=tokenizer
        )
    # of a part whose weight is below 1 some documents are never trained on
    seen = sum(min(1, part.weight) * size for part, size in zip(train, sizes, strict=True))
    facts = replace(
        measured,
        train_bytes=round(measured.train_bytes * seen / max(1, sum(sizes))),
        is_chat=has_conversations([*train, *val], spec),
    )
    if not report.documents:
        names = ", ".join(spec.train + spec.val)
        raise DataError(f"{names} is empty.\nSet DATA to a text of at least a few sentences.")
    try:
        make_folder(file.parent)
        write_json(file, asdict(facts))
    except ResourceError as error:
        say(f"Note: {first_line(error)} The text is measured again next time")
    return facts


def _state_of(part: Part) -> list[Any]:
    if part.path is None:
        return [part.name, part.split, dataset_fingerprint(part)]
    facts = part.path.stat() if part.path.exists() else None
    return [str(part.path.resolve()), facts and facts.st_size, facts and facts.st_mtime_ns]


def _kept(file: Path) -> TextFacts | None:
    try:
        return from_json(TextFacts, json.loads(file.read_bytes()), str(file))
    except (OSError, ValueError, RecursionError, SettingsError):
        return None  # a damaged file is like none: the next measurement replaces it


def measure_text(
    documents: Documents,
    train_ratio: float,
    *,
    validation: Documents | None = None,
    tokenizer: str | None = None,
) -> TextFacts:
    """The facts of a text, from its documents' pieces, in one pass and bounded memory.

    validation: the documents to validate on; None divides the others about as tokenize() does.
    tokenizer: the only one to measure; None measures all that a recipe may choose. Raises DataError
    and SettingsError for a tokenizer that can't be used.
    """
    sample, held_out = _Sample(1 - train_ratio if validation is None else 0.0), None
    sample.read(documents)
    if validation is not None:
        held_out = _Sample(1.0, sample.spans)
        held_out.read(validation)
    train, val = sample.divided() if held_out is None else (sample.all(), held_out.all())
    share = len(val) / max(1, len(train) + len(val))
    n_bytes, n_characters = sample.n_bytes, sample.n_characters
    val_bytes = round(share * n_bytes)
    fingerprint, letters = sample.content.hexdigest(), sample.letters()
    if held_out is not None:
        n_bytes, val_bytes = n_bytes + held_out.n_bytes, held_out.n_bytes
        n_characters += held_out.n_characters
        fingerprint = _joined(fingerprint, held_out.content.hexdigest())
        letters |= held_out.letters()
    found = _measure_tokenizers(train, val or train, letters, tokenizer, n_bytes - val_bytes)
    repeats = None
    if sample.is_part or (held_out is not None and held_out.is_part):
        # where a span is in the sample, its copy need not be
        repeats = sample.spans.shares(None if held_out is not None else sample.n_train())
    repeated, leaked = repeats or measure_repeats(train, val)
    return TextFacts(
        fingerprint=fingerprint[:24],
        train_bytes=n_bytes - val_bytes,
        val_bytes=val_bytes,
        n_characters=n_characters,
        distinct_characters=len(letters),
        entropies=measure_entropies(train[:ENTROPY_BYTES]),
        bz2_bits=_difficulty(train, val),
        repeated=repeated,
        leaked=leaked,
        document_bytes=sample.usual_document(),
        bytes_per_token={name: round(rate, 4) for name, (rate, _) in found.items()},
        vocabularies={name: size for name, (_, size) in found.items()},
        can_train=can_train(),
    )


def _joined(*digests: str) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


class _Sample:
    """An even sample of documents, in chunks; half of them go whenever there are too many."""

    def __init__(self, val_share: float, spans: SpanSample | None = None) -> None:
        self.val_share = val_share
        self.spans = spans or SpanSample()  # of all documents
        self.n_bytes = self.n_characters = self.n_documents = 0
        self.sizes = array("Q")  # of each document
        self.content = hashlib.sha256()
        self._chunks: list[list[tuple[bool, bytes]]] = []  # whether it validates, and the text
        self._stride, self._count, self._kept = 1, 0, 0

    def read(self, documents: Documents) -> None:
        """Read all of some documents."""
        chunk: list[tuple[bool, bytes]] = []
        length, size, validates = 0, 0, False
        for piece, is_last in documents:
            content = piece.encode("utf-8", "replace")
            if size == 0:  # equal documents stay together
                validates = zlib.crc32(content[:4096]) < self.val_share * 2**32
            self.content.update(content)
            self.spans.add(content, validates)
            size += len(content)
            self.n_characters += len(piece)
            for start in range(0, len(piece), CHUNK):
                part = piece[start : start + CHUNK]
                chunk.append((validates, part.encode("utf-8", "replace")))
                length += len(part)
                if length >= CHUNK:
                    self._add(chunk)
                    chunk, length = [], 0
            if is_last:
                self.content.update(b"\xff")  # never in UTF-8: documents are not their join
                self.sizes.append(size)
                self.n_bytes, size = self.n_bytes + size, 0
        self._add(chunk)

    def _add(self, chunk: list[tuple[bool, bytes]]) -> None:
        if self._count % self._stride == 0:
            self._chunks.append(chunk)
            self._kept += sum(len(content) for _, content in chunk)
        self._count += 1
        while self._kept > SAMPLE_BYTES and len(self._chunks) > 1:
            self._chunks, self._stride = self._chunks[::2], 2 * self._stride
            self._kept = sum(len(content) for kept in self._chunks for _, content in kept)

    def all(self) -> bytes:
        """The sample as UTF-8."""
        return b"".join(content for chunk in self._chunks for _, content in chunk)

    def divided(self) -> tuple[bytes, bytes]:
        """Training and validation text: by documents, or by position where they are few."""
        if self._is_divided_by_documents():
            train, val = map(self._side, (False, True))
            return train, val
        content, size = self.all(), self._kept
        cut = size - round(self.val_share * size)
        while cut < size and content[cut] & 0xC0 == 0x80:  # not within a character
            cut += 1
        return content[:cut], content[cut:]

    def _side(self, validates: bool) -> bytes:
        """The sample's documents that validate, or that train."""
        return b"".join(
            content for chunk in self._chunks for val, content in chunk if val is validates
        )

    def _is_divided_by_documents(self) -> bool:
        n_val = sum(len(content) for chunk in self._chunks for val, content in chunk if val)
        return len(self.sizes) >= FEWEST and 1 / 3 < n_val / (self.val_share * self._kept or 1) < 3

    def n_train(self) -> int | None:
        """The first bytes of the text, which train; None where it is divided by documents."""
        if self._is_divided_by_documents():
            return None
        return round((1 - self.val_share) * self.spans.n_bytes)

    @property
    def is_part(self) -> bool:
        """Whether some of the text is left out."""
        return self._stride > 1

    def usual_document(self) -> int:
        """The bytes of the document that the median byte is in: many tiny ones beside a book say
        nothing of what is read. 0 where there is none."""
        sizes = np.sort(np.array(self.sizes, np.int64))
        if len(sizes) == 0:
            return 0
        return int(sizes[np.searchsorted(np.cumsum(sizes), sizes.sum() / 2)])

    def letters(self) -> set[str]:
        """The different characters of the sample."""
        found: set[str] = set()
        for chunk in self._chunks:
            for _, content in chunk:
                found.update(content.decode("utf-8", "replace"))
        return found


def _evenly(content: bytes, most: int, pieces: int = 16) -> list[str]:
    """At most so many bytes of a text, in evenly spaced pieces."""
    if len(content) <= most:
        return [content.decode("utf-8", "ignore")]
    length = most // pieces
    starts = np.linspace(0, len(content) - length, pieces).astype(int).tolist()
    return [content[start : start + length].decode("utf-8", "ignore") for start in starts]


def _measure_tokenizers(
    train: bytes, val: bytes, letters: set[str], wanted: str | None, train_bytes: int
) -> dict[str, tuple[float, int]]:
    """The bytes a token and the vocabulary of each tokenizer, by its name."""
    texts = _evenly(val, ENCODED_BYTES)
    n_bytes = sum(len(text.encode()) for text in texts) or 1
    sizes = [n for n in BPE_SIZES if n * LEAST_BYTES_A_TOKEN <= train_bytes]
    names = ["char", "gpt2", *(f"bpe:{n}" for n in sizes if can_train())]
    found = {}
    if wanted is not None:  # a vocabulary's tokens are compared with those of the smallest
        names = list(dict.fromkeys(("bpe:512", wanted) if wanted.startswith("bpe:") else (wanted,)))
    ranks: dict[bytes, int] = {}
    if largest := max((int(n[4:]) for n in names if n.startswith("bpe:")), default=0):
        if not can_train():
            raise SettingsError(f'TOKENIZER = "{wanted}" needs a library: pip install tokenizers')
        ranks = ranks_of(learn_bpe(_evenly(train, BPE_BYTES), largest - 1, SHORT_WORDS))
    for name in names:
        own: Tokenizer
        if name.startswith("bpe:"):
            # the first tokens of a vocabulary are those of a smaller one
            size = int(name[4:]) - 1
            if len(ranks) < size and wanted is None and name != "bpe:512":
                continue  # the text has no more
            own = BPETokenizer(name, dict(itertools.islice(ranks.items(), size)), short_words=True)
        elif name == "char":
            own = CharTokenizer(letters)
        else:
            own = GPT2Tokenizer() if name == "gpt2" else load_tokenizer(name)
        n_tokens = sum(len(own.encode_array(text)) for text in texts)
        found[name] = (n_bytes / max(1, n_tokens), own.vocab_size)
    return found


def measure_entropies(content: bytes) -> list[float]:
    """The entropy of a byte given none, one and two bytes before it, in bits, by its counts."""
    codes = np.frombuffer(content, np.uint8).astype(np.uint32)
    joint, before, found = 0.0, 0.0, []
    for order in range(3):
        grams = codes[order:].copy()
        for back in range(1, order + 1):
            grams |= codes[order - back : len(codes) - back] << np.uint32(8 * back)
        counts = np.unique(grams, return_counts=True)[1] if len(grams) else np.ones(1)
        shares = counts / counts.sum()
        joint = float(-(shares * np.log2(shares)).sum())
        found.append(round(max(0.0, joint - before), 4))
        before = joint
    return found


def _difficulty(train: bytes, val: bytes) -> float:
    """bz2_bits(), also of the end of the training text where the validation text is short."""
    if 0 < len(val) < LEAST_MEASURED <= len(train) // 2:
        place = len(train) + len(val) - LEAST_MEASURED
        train, val = train[:place], train[place:] + val
    return min(8.0, bz2_bits(train, val))


def bz2_bits(train: bytes, val: bytes) -> float:
    """The bits that bz2 needs for a byte of validation text behind training text: how hard it is.

    Of a large text two pieces are measured, each behind the training text that fits into a block.
    """
    if not val:
        return round(8 * len(bz2.compress(train[:BZ2_BLOCK])) / max(1, len(train[:BZ2_BLOCK])), 4)
    length = min(len(val), BZ2_PIECE)
    n_pieces = BZ2_PIECES if len(val) > BZ2_PIECE else 1
    starts = np.linspace(0, len(val) - length, n_pieces).astype(int).tolist()
    room, added = BZ2_BLOCK - length, 0
    for number, start in enumerate(starts):
        end = len(train) - (n_pieces - 1 - number) * max(0, len(train) - room)
        before = train[max(0, end - room) : end]
        added += len(bz2.compress(before + val[start : start + length]))
        added -= len(bz2.compress(before))
    return round(max(0.0, 8 * added / (n_pieces * length)), 4)
