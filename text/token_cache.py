"""The token cache: each text is tokenized once, into a flat array on disk.

An entry is a folder cache/tokens/<id>/ with tokens.bin, tokenizer.json and entry.json, which has
the hashes of the other two. Its id is a hash of all that it was made from, and it appears by one
rename. The file found-<id>.json records the files and the entry of a request (names and options).
"""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import re
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.console import Progress, say
from engine.errors import DataError, ResourceError
from storage.cache import keep_within_limit, note_use
from storage.files import (
    NewFile,
    discard,
    make_folder,
    remove_file,
    remove_folder,
    rename_file,
    rename_folder,
    write_atomically,
    write_json,
)
from text.corpora import CORPORA
from text.documents import (
    DataSpec,
    Documents,
    Part,
    ReadingReport,
    dataset_fingerprint,
    file_sha256,
    read_documents,
    validation_parts,
)
from text.repeats import Repeats
from text.sources import find_parts
from text.split import Split, split_documents
from text.tokenizer import (
    BLANK,
    LONGEST_WORD,
    RUN,
    ForeignTokenizer,
    Tokenizer,
    make_tokenizer,
    restore_tokenizer,
)

FORMAT = 3  # of an entry; no other is read
CHUNK = 1 << 18  # characters to encode in one task, which no Ctrl-C can end
NEIGHBORHOOD = 1 << 12  # characters beside a chunk that its first and last tokens depend on
MOST_UNCUT = 1 << 18  # characters without a place to cut, at most; a text has one in each sentence
BLOCK = 16 << 20  # bytes of tokens per hash
MOST_RATE = 1.05  # tokens a character; from there on the characters themselves are fewer
MOST_UNKNOWN = 0.5  # of all tokens
LEAST_USED = 0.03  # of the vocabulary, without a notice
SMALL_VOCABULARY = 600  # tokens, most of which may be the bytes that every one has
ORPHAN_AGE_S = 24 * 3600


@dataclass(frozen=True)
class TokenizedText:
    """A text as tokens: a flat array in a file, training tokens first."""

    path: Path
    dtype: str  # "uint16" or "uint32"
    n_tokens: int
    n_train: int | None  # None: the caller splits training and validation by position
    tokenizer: Tokenizer
    tokenizer_file: Path
    sha256: str  # of the tokens and n_train
    stood_in: bool  # whether a stand-in was read in place of what DATA names
    report: dict[str, Any]  # what was read, for data.json
    notices: list[str]  # to print in every run


def tokenize(
    spec: DataSpec,
    tokenizer: str,
    train_ratio: float,
    cache: Path,
    *,
    stand_in: bool | None = None,
    is_free: bool = True,
) -> TokenizedText:
    """Tokenize DATA, or find its tokens in the cache if nothing has changed.

    tokenizer is TOKENIZER's value, but not "auto", is_free whether another one could be set;
    stand_in is that of corpus_path(). Raises DataError for data that can't be read, SettingsError
    for a missing library, ResourceError if the cache can't be written.
    """
    report = ReadingReport(stand_in=stand_in)
    train = find_parts(spec.train, cache, report)
    val = find_parts(spec.val, cache, report) if spec.val else validation_parts(train)
    tokens_folder = cache / "tokens"
    make_folder(tokens_folder)
    texts = [*train, *val]
    parts, tokenizer_kind = texts, tokenizer
    if tokenizer.endswith(".json"):
        parts = [*texts, Part(tokenizer, Path(tokenizer).expanduser())]
        tokenizer_kind = "json"
    request = _hash_of([FORMAT, asdict(spec), tokenizer, tokenizer_kind, train_ratio])
    found_path = tokens_folder / f"found-{request}.json"
    state = [_state_of(part) for part in parts]
    entry_id = _recall(found_path, state)
    if entry_id is None:
        content = [
            dataset_fingerprint(part) if part.path is None else file_sha256(part.path)
            for part in parts
        ]
        how = [tokenizer_kind, spec.field, spec.encoding, spec.separator, spec.bad_rows]
        # of a file's name only the suffixes matter
        kinds = ["".join(Path(part.name).suffixes).lower() for part in texts]
        entry_id = _hash_of([FORMAT, how, train_ratio, len(train), content, kinds])
    folder = tokens_folder / entry_id
    text = _open_entry(folder, report)
    if text is None:
        _build_entry(folder, [train, val], spec, tokenizer, train_ratio, report)
        text = _open_entry(folder, report)
        assert text is not None, f"{folder} was written and can't be read"
        keep_within_limit([path.parent for path in tokens_folder.glob("*/entry.json")], folder)
    note_use(folder)
    write_json(found_path, {"state": state, "entry": entry_id})
    if is_free:
        text.notices.extend(_about_vocabulary(text, spec))
    text.report["passed_over"] = report.passed_over
    for file, part in zip(text.report["files"], texts, strict=True):
        if part.path is not None:
            _rename(text.report, file, part)
    return text


def _rename(report: dict[str, Any], file: dict[str, Any], part: Part) -> None:
    """Update the name of a file in a cached report: it may have been renamed since."""
    before = f"{file['name']}: "
    report["notes"] = [
        f"{part.name}: {note.removeprefix(before)}" if note.startswith(before) else note
        for note in report["notes"]
    ]
    file |= {"name": part.name, "path": str(part.path)}


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _state_of(part: Part) -> list[Any]:
    """What changes if a part does, and is cheap to get: a file's path, size and time."""
    if part.path is None:
        return [part.name, dataset_fingerprint(part)]
    facts = os.stat(part.path) if part.path.exists() else None
    return [str(part.path.resolve()), facts and facts.st_size, facts and facts.st_mtime_ns]


def _recall(found_path: Path, state: list[list[Any]]) -> str | None:
    """The entry of an earlier request, if its files have the same state."""
    try:
        found = json.loads(found_path.read_bytes())
        return found["entry"] if found["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: it only saves time
        return None


def find_tokens(cache: Path, sha256: str) -> TokenizedText | None:
    """The tokens in the cache that have this sha256, or None if there are none.

    A damaged entry is reported and removed.
    """
    for file in sorted((cache / "tokens").glob("*/entry.json")):
        try:
            is_it = _sha256_of(json.loads(file.read_bytes())["entry"]) == sha256
        except (OSError, ValueError, KeyError, TypeError):  # damaged: tokenize() says so
            continue
        if is_it and (text := _open_entry(file.parent, ReadingReport())) is not None:
            note_use(file.parent)
            return text
    return None


def _sha256_of(entry: dict[str, Any]) -> str:
    """The sha256 of an entry's tokens and their split."""
    content = json.dumps([entry["block_sha256"], entry["n_train"]])
    return hashlib.sha256(content.encode()).hexdigest()


def _open_entry(folder: Path, reading: ReadingReport) -> TokenizedText | None:
    """An entry, or None if there is none; a damaged one is reported and removed."""
    if not folder.is_dir():
        return None
    try:
        sealed = json.loads((folder / "entry.json").read_bytes())
        entry = sealed["entry"]
        tokenizer_json = (folder / "tokenizer.json").read_bytes()
        intact = (
            sealed["sha256"] == _hash_of(entry)
            and entry["tokenizer_sha256"] == hashlib.sha256(tokenizer_json).hexdigest()
            and entry["block_sha256"] == _block_hashes(folder / "tokens.bin")
        )
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        say(f"Note: the token cache {folder} is damaged; it is made anew")
        if not remove_folder(folder):
            raise ResourceError(
                f"the damaged token cache {folder} can't be removed.\n"
                "End the programs that have a file in it open, or remove it yourself."
            )
        return None
    return TokenizedText(
        path=folder / "tokens.bin",
        dtype=entry["dtype"],
        n_tokens=entry["n_tokens"],
        n_train=entry["n_train"],
        tokenizer=restore_tokenizer(entry["tokenizer_kind"], tokenizer_json),
        tokenizer_file=folder / "tokenizer.json",
        sha256=_sha256_of(entry),
        stood_in=reading.stood_in,
        report=entry["report"],
        notices=reading.notices,
    )


def _block_hashes(path: Path) -> list[str]:
    """The sha256 of each BLOCK of a file, in parallel."""

    def block_hash(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK)).hexdigest()

    starts = range(0, path.stat().st_size, BLOCK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(block_hash, starts))


def _build_entry(
    folder: Path,
    parts: list[list[Part]],
    spec: DataSpec,
    tokenizer_name: str,
    train_ratio: float,
    report: ReadingReport,
) -> None:
    train, val = parts
    _remove_orphans(folder.parent)
    temporary = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    make_folder(temporary)
    try:
        tokenizer = make_tokenizer(tokenizer_name, lambda: _texts(train, spec))
        sides = _write_tokens(temporary / "all.bin", tokenizer, parts, spec, report)
        if not report.documents:
            names = ", ".join(spec.train + spec.val)
            raise DataError(f"{names} is empty.\nSet DATA to a text of at least a few sentences.")
        unknown = _count_unknown(tokenizer, sides)
        if unknown:
            report.notes.append(_about_unknown(unknown, sides, tokenizer))
        if not tokenizer_name.startswith("bpe:"):  # made of this text
            report.notes += _about_rate(tokenizer, sides, report.characters)
        split = None if val else _split(sides[0], train_ratio)
        if split is not None and split.cut is not None:
            report.notes.append(_note_on_cut(split, sides[0], train_ratio))
        n_train = _arrange(temporary, sides, tokenizer, split, has_val=bool(val))
        dtype = _dtype_for(tokenizer)
        n_tokens = (temporary / "tokens.bin").stat().st_size // np.dtype(dtype).itemsize
        tokenizer_json = tokenizer.to_json().encode("utf-8")
        write_atomically(temporary / "tokenizer.json", tokenizer_json)
        entry = {
            "dtype": dtype,
            "n_tokens": n_tokens,
            "n_train": n_train,
            "tokenizer_kind": tokenizer.kind,
            "tokenizer_sha256": hashlib.sha256(tokenizer_json).hexdigest(),
            "block_sha256": _block_hashes(temporary / "tokens.bin"),
            "report": _report_of(report, sides, n_tokens, tokenizer)
            | {"unknown_tokens": unknown}
            | ({"documents_on_both_sides": 1} if split and split.cut is not None else {}),
        }
        write_json(temporary / "entry.json", {"sha256": _hash_of(entry), "entry": entry})
        rename_folder(temporary, folder)  # if another process was faster, its entry stays
    finally:
        discard(temporary)


def _remove_orphans(tokens_folder: Path) -> None:
    """Remove what killed builds left; a younger folder may belong to a running one."""
    for orphan in [*tokens_folder.glob(".tmp-*"), *tokens_folder.glob(".del-*")]:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - orphan.stat().st_mtime > ORPHAN_AGE_S:
                discard(orphan)


def _texts(parts: list[Part], spec: DataSpec) -> Iterator[str]:
    """The text of all documents in chunks, to make a tokenizer from."""
    report = ReadingReport()
    with Progress("Reading", _size_of(parts)) as progress:
        for chunk, _ in cut_into_chunks(read_documents(parts, spec, report)):
            progress.show(report.bytes_read)
            yield chunk


@dataclass
class _Side:
    """The training or the validation documents in the token file; positions are in tokens."""

    stop: int
    ends: "array[int]"  # of each document; an end-of-text separates it from the next
    digests: "array[int]"  # of each document's text
    counts: np.ndarray  # (V,) how often each token occurs

    @property
    def stops(self) -> np.ndarray:
        """Where each document ends, (N,) int64."""
        return np.frombuffer(self.ends, dtype=np.uint64).astype(np.int64)

    @property
    def starts(self) -> np.ndarray:
        """Where each document of the file's first side begins, (N,) int64."""
        return np.concatenate(([0], self.stops[:-1] + 1))


def _watched(documents: Documents, repeats: Repeats) -> Documents:
    for piece, is_last in documents:
        repeats.add(piece, is_last)
        yield piece, is_last


def _write_tokens(
    path: Path, tokenizer: Tokenizer, sides: list[list[Part]], spec: DataSpec, report: ReadingReport
) -> list[_Side]:
    """Write the tokens of all documents in order, with an end-of-text between those of a side.

    Sets the report's share of the text that came before in the same document.
    """
    position, written, repeats = 0, [], Repeats()
    with (
        NewFile(path, durable=False) as file,
        encoders() as pool,
        Progress("Tokenizing", sum(map(_size_of, sides))) as progress,
    ):
        for parts in sides:
            ends, digests, counts = array("Q"), array("Q"), np.zeros(tokenizer.vocab_size)
            open_digests: list[bytes] = []
            documents = _watched(read_documents(parts, spec, report), repeats)
            for batch in encode_documents(documents, tokenizer, pool):
                counts += batch.counts
                for n_ids, digest, is_last in batch.chunks:
                    open_digests.append(digest)
                    position += n_ids
                    if is_last:
                        ends.append(position)
                        digests.append(_join_digests(open_digests))
                        open_digests = []
                file.write(batch.ids.data.cast("B"))
                progress.show(report.bytes_read)
            written.append(_Side(position, ends, digests, counts))
    report.copied = repeats.share
    return written


@contextlib.contextmanager
def encoders() -> Iterator[ThreadPoolExecutor]:
    """A pool that an exception, such as KeyboardInterrupt, ends after the running tasks."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _dtype_for(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


@dataclass
class EncodedBatch:
    """The tokens of some chunks, with an end-of-text before each document but the first."""

    ids: np.ndarray
    chunks: list[tuple[int, bytes, bool]]  # tokens, the end-of-text included; digest; is last
    counts: np.ndarray


@dataclass(frozen=True)
class _Chunk:
    """A part of a document, and what a foreign tokenizer needs to see before and after it."""

    text: str
    is_last: bool  # of its document
    before: str = ""
    after: str = ""


def encode_documents(
    documents: Documents, tokenizer: Tokenizer, pool: ThreadPoolExecutor
) -> Iterator[EncodedBatch]:
    """Encode documents in parallel, in order; only a few batches are in memory."""
    pending: collections.deque[Future[EncodedBatch]] = collections.deque()
    follows_document = False
    chunks: Iterator[_Chunk] = itertools.starmap(_Chunk, cut_into_chunks(documents))
    if isinstance(tokenizer, ForeignTokenizer):
        chunks = _with_neighbors(chunks, tokenizer)
    for batch in _batches(chunks):
        pending.append(pool.submit(_encode_batch, tokenizer, batch, follows_document))
        follows_document = batch[-1].is_last
        if len(pending) > 2 * (os.cpu_count() or 1):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _with_neighbors(chunks: Iterator[_Chunk], tokenizer: ForeignTokenizer) -> Iterator[_Chunk]:
    """The chunks, cut where tokens end, with what is beside them in the same document."""
    held, before = next(chunks, None), ""
    while held is not None:
        following = next(chunks, None)
        if following is None or held.is_last:
            yield replace(held, before=before)
            held, before = following, ""
            continue
        reach = following.text[:NEIGHBORHOOD]
        cut = tokenizer.overhang(held.text[-NEIGHBORHOOD:], reach)
        text = held.text + following.text[:cut]
        following = replace(following, text=following.text[cut:])
        yield _Chunk(text, False, before, following.text[:NEIGHBORHOOD])
        held, before = following, text[-NEIGHBORHOOD:]


def _encode_batch(
    tokenizer: Tokenizer, chunks: list[_Chunk], follows_document: bool
) -> EncodedBatch:
    end_of_text = np.array([tokenizer.end_of_text_id])
    parts, facts = [], []
    for chunk in chunks:
        if isinstance(tokenizer, ForeignTokenizer):
            ids = tokenizer.encode_part(chunk.before, chunk.text, chunk.after)
        else:
            ids = tokenizer.encode_array(chunk.text)
        parts += [end_of_text, ids] if follows_document else [ids]
        content = chunk.text.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(content, digest_size=8).digest()
        facts.append((len(ids) + follows_document, digest, chunk.is_last))
        follows_document = chunk.is_last
    ids = np.concatenate(parts).astype(_dtype_for(tokenizer))
    return EncodedBatch(ids, facts, np.bincount(ids, minlength=tokenizer.vocab_size))


def _batches(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    """Group short documents, so that a task takes longer than its overhead."""
    batch: list[_Chunk] = []
    characters = 0
    for chunk in chunks:
        batch.append(chunk)
        characters += len(chunk.text)
        if characters >= CHUNK // 2 or len(batch) == 4096:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _join_digests(digests: list[bytes]) -> int:
    joined = digests[0]
    if len(digests) > 1:
        joined = hashlib.blake2b(b"".join(digests), digest_size=8).digest()
    return int.from_bytes(joined, "big")


def cut_into_chunks(documents: Documents) -> Documents:
    """Rearrange documents in pieces into chunks of about CHUNK characters.

    The cuts depend on the document's text alone. They are where GPT-2's pattern starts a new word
    in any context, so the tokens of the chunks are those of the document. MOST_UNCUT characters
    without such a place are cut where cut_long_words() cuts.
    """
    held, size, searched = [], 0, 0
    for piece, is_last in documents:
        held.append(piece)
        size += len(piece)
        if size > CHUNK:
            text, start = "".join(held), 0
            while len(text) - start > CHUNK:
                farthest = start + max(CHUNK, MOST_UNCUT)
                cut = find_cut(text, start, start + CHUNK, farthest, searched)
                if cut is None:
                    if len(text) <= farthest:
                        searched = len(text) - 1
                        break
                    cut = _cut_run(text, start, farthest)
                yield text[start:cut], False
                start, searched = cut, 0
            searched = max(0, searched - start)
            held, size = [text[start:]], len(text) - start
        if is_last:
            yield "".join(held), True
            held, size, searched = [], 0, 0


def find_cut(text: str, start: int, near: int, farthest: int, searched: int = 0) -> int | None:
    """The last place to cut a text after start and up to near, else the first one up to farthest.

    That is behind a letter or digit and before a punctuation mark or the like, or before a blank:
    a word of GPT-2's pattern ends there, and its later matches don't depend on the text before.
    There is none below `searched`.
    """
    reach = 4096
    while searched < near:
        low = max(start, near - reach)
        found = [match.end() for match in _CUT.finditer(text, low, near + 1)]
        if found:
            return found[-1]
        if low == start:
            break
        reach *= 16
    behind = _CUT.search(text, max(near, searched), farthest + 1)
    return behind.end() if behind else None


# the signs behind a letter include Thai's vowel signs and tone marks
_CUT = re.compile(
    r"[^\W_](?=[.,;:!?\"()\[\]{}<>/，。！？；：、「」『』（）《》…—“”\u0e31\u0e34-\u0e3a\u0e47-\u0e4e])"
    rf"|[^{BLANK}](?=[{BLANK}])|[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])"
)


def _cut_run(text: str, start: int, stop: int) -> int:
    """Where to cut text[start:stop] without a word's end: a multiple of LONGEST_WORD characters
    behind the beginning of the last run of letters, digits, marks or blanks."""
    length = RUN.match(text[start:stop][::-1]).end()  # type: ignore[union-attr]
    cut = stop - length % LONGEST_WORD
    return cut if cut > start else stop


def _size_of(parts: list[Part]) -> int:
    return sum(part.path.stat().st_size for part in parts if part.path)


def _arrange(
    folder: Path, sides: list[_Side], tokenizer: Tokenizer, split: Split | None, *, has_val: bool
) -> int | None:
    """Make tokens.bin of all.bin, training tokens first; returns the number of those.

    Returns None if the caller is to split them by position: for one text, or few documents.
    """
    train = sides[0]
    if split is None:
        rename_file(folder / "all.bin", folder / "tokens.bin")
        return train.stop if has_val else None
    dtype = np.dtype(_dtype_for(tokenizer))
    end_of_text = np.array([tokenizer.end_of_text_id], dtype=dtype).tobytes()
    sizes = []
    with (
        (folder / "all.bin").open("rb") as source,
        NewFile(folder / "tokens.bin", durable=False) as file,
    ):
        for spans in _spans(train, split):
            size = 0
            for start, stop in spans:
                if size:
                    file.write(end_of_text)
                    size += 1
                _copy(source, file, start * dtype.itemsize, stop * dtype.itemsize)
                size += stop - start
            sizes.append(size)
    remove_file(folder / "all.bin")
    return sizes[0]


def _spans(documents: _Side, split: Split) -> list[list[tuple[int, int]]]:
    """The tokens of training and of validation, as (start, stop) in the token file.

    Adjacent documents are one span, with the end-of-text between them.
    """
    starts, ends = documents.starts, documents.stops
    heads, tails = ~split.is_val, split.is_val.copy()
    head_ends, tail_starts = ends.copy(), starts.copy()
    if split.cut is not None:
        tails[split.cut] = True
        head_ends[split.cut] = tail_starts[split.cut] = ends[split.cut] - split.n_cut
    spans = []
    for chosen, first, last in ((heads, starts, head_ends), (tails, tail_starts, ends)):
        first, last = first[chosen], last[chosen]
        is_new = np.concatenate(([True], first[1:] != last[:-1] + 1))
        is_end = np.concatenate((is_new[1:], [True]))
        spans.append(list(zip(first[is_new].tolist(), last[is_end].tolist(), strict=True)))
    return spans


def _copy(source: BinaryIO, file: NewFile, start: int, stop: int) -> None:
    source.seek(start)
    while start < stop:
        block = source.read(min(stop - start, 1 << 22))
        file.write(block)
        start += len(block)


def _split(documents: _Side, train_ratio: float) -> Split | None:
    digests = np.frombuffer(documents.digests, dtype=np.uint64)
    return split_documents(digests, documents.stops - documents.starts, train_ratio)


def _note_on_cut(split: Split, documents: _Side, train_ratio: float) -> str:
    assert split.cut is not None
    size = int(documents.stops[split.cut] - documents.starts[split.cut])
    return (
        f"the longest document is cut: its last {split.n_cut:,} of {size:,} tokens validate, as "
        f"whole documents alone don't make the {1 - train_ratio:.0%} that train_ratio leaves "
        '(DATA = {"path": ..., "val": ...} names a validation text of its own)'
    )


def _about_rate(tokenizer: Tokenizer, sides: list[_Side], characters: int) -> list[str]:
    """A notice where one token a character would be fewer than this tokenizer needs."""
    needed = sum(side.counts.sum() - len(side.ends) for side in sides) / max(1, characters)
    if tokenizer.kind == "char" or needed <= MOST_RATE:
        return []
    return [
        f"the tokenizer needs {needed:.2f} tokens a character here, as it was made for other "
        'texts; TOKENIZER = "char" needs 1.00, and "auto" chooses by the text'
    ]


def _about_vocabulary(text: TokenizedText, spec: DataSpec) -> list[str]:
    """A notice where hardly any of the vocabulary occurs, unless a named text is tried out."""
    size, used = text.report["vocabulary"], text.report["vocabulary_used"]
    is_small = size <= SMALL_VOCABULARY
    if is_small or used > LEAST_USED * size or CORPORA.keys() >= set(spec.train + spec.val):
        return []
    return [
        f"{1 - used / size:.0%} of the tokenizer's {size:,} tokens do not occur in this text; a "
        'vocabulary of its own makes a smaller and better model: TOKENIZER = "char" or "bpe:1024"'
    ]


def _count_unknown(tokenizer: Tokenizer, sides: list[_Side]) -> int:
    """How many tokens stand for what the tokenizer does not know."""
    if tokenizer.kind != "foreign":
        return 0  # ours know every byte
    tree = json.loads(tokenizer.to_json())
    model, token = tree["model"], tree["model"].get("unk_token")
    if token is None:
        unknown = model.get("unk_id")
    else:
        added = {entry["content"]: entry["id"] for entry in tree["added_tokens"]}
        unknown = added.get(token, model["vocab"].get(token))
    return 0 if unknown is None else int(sum(side.counts[unknown] for side in sides))


def _about_unknown(unknown: int, sides: list[_Side], tokenizer: Tokenizer) -> str:
    """A notice with the share of unknown tokens; DataError if it is above MOST_UNKNOWN."""
    share = unknown / sum(side.counts.sum() for side in sides)
    told = (
        f"{share:.1%} of the tokens stand for what the tokenizer ({tokenizer.name}) does not know"
    )
    instead = 'TOKENIZER = "auto", "char" or "gpt2" knows every character'
    if share > MOST_UNKNOWN:
        raise DataError(f"{told}; at most half may.\n{instead}.")
    return f"{told}, and are lost; {instead}"


def _report_of(
    report: ReadingReport, sides: list[_Side], n_tokens: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    train, val = (np.frombuffer(side.digests, dtype=np.uint64) for side in sides)
    digests = np.concatenate([train, val])
    return {
        "files": report.files,
        "passed_over": report.passed_over,
        "notes": report.notes,
        "documents": report.documents,
        "empty_documents": report.empty_documents,
        "duplicate_documents": len(digests) - len(np.unique(digests)),
        "documents_on_both_sides": len(np.intersect1d(train, val)),
        "bytes": report.bytes_read,
        "characters": report.characters,
        "copied": round(report.copied, 4),
        "tokens": n_tokens,
        "tokens_per_character": n_tokens / max(1, report.characters),
        "tokenizer": tokenizer.name,
        "vocabulary": tokenizer.vocab_size,
        "vocabulary_used": int(np.count_nonzero(sum(side.counts for side in sides))),
    }
