"""Text made into tokens once: one flat array on disk, found again as long as nothing differs.

An entry is a folder cache/tokens/<id>/ with tokens.bin, tokenizer.json and entry.json, which has
the hashes of the other two; the folder appears by one rename. Its id is a hash of all that it was
made from. Beside it, found-<id>.json remembers for a request (names and options) which files it
stood for and which entry they led to.
"""

import collections
import contextlib
import hashlib
import json
import os
import re
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.console import ByteProgress, say
from engine.errors import DataError, ResourceError
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
from text.documents import (
    DataSpec,
    Part,
    ReadingReport,
    dataset_fingerprint,
    file_sha256,
    read_documents,
    validation_parts,
)
from text.sources import find_parts
from text.tokenizer import Tokenizer, make_tokenizer, restore_tokenizer

FORMAT = 1  # of an entry; with another number every entry is made anew
CHUNK = 1 << 20  # characters that a core encodes at a time
MOST_UNCUT = 1 << 26  # characters without a place to cut; a text has one in each sentence
BLOCK = 16 << 20  # bytes of tokens that share a hash
HASH_SPLIT_FROM = 20  # documents; of fewer, validation is cut off the end
ORPHAN_AGE_S = 24 * 3600


@dataclass(frozen=True)
class TokenizedText:
    """A text as tokens: a flat array in a file, training tokens first."""

    path: Path
    dtype: str  # "uint16" or "uint32"
    n_tokens: int
    n_train: int | None  # None: training and validation are still to be cut by position
    tokenizer: Tokenizer
    tokenizer_file: Path
    sha256: str  # of the tokens and where they are cut
    stood_in: bool  # a stand-in was read in place of what DATA names
    report: dict[str, Any]  # what was read, for data.json
    notices: list[str]  # what the user must know of how the text was had


def tokenize(
    spec: DataSpec,
    tokenizer: str,
    train_ratio: float,
    cache: Path,
    *,
    stand_in: bool | None = None,
) -> TokenizedText:
    """The tokens of what DATA asks for, from the cache where nothing has changed since.

    tokenizer is TOKENIZER's value. stand_in tells whether a text with a stand-in is to be that
    stand-in: True, False, or None for only where the text itself can't be had. Raises DataError
    for what can't be read, SettingsError for a library that is missing, ResourceError where the
    cache can't be written.
    """
    report = ReadingReport(stand_in=stand_in)
    train = find_parts(spec.train, cache, report)
    val = find_parts(spec.val, cache, report) if spec.val else validation_parts(train)
    tokens_folder = cache / "tokens"
    make_folder(tokens_folder)
    request = {
        "format": FORMAT,
        "spec": asdict(spec),
        "tokenizer": tokenizer,
        "train_ratio": train_ratio,
    }
    parts = [*train, *val]
    if tokenizer.endswith(".json"):
        parts.append(Part(tokenizer, Path(tokenizer).expanduser()))
    found_path = tokens_folder / f"found-{_hash_of(request)}.json"
    state = [_state_of(part) for part in parts]
    entry_id = _recall(found_path, state)
    if entry_id is None:
        content = [
            dataset_fingerprint(part) if part.path is None else file_sha256(part.path)
            for part in parts
        ]
        how = [
            "json" if tokenizer.endswith(".json") else tokenizer,
            spec.field,
            spec.encoding,
        ]
        # what a file is read as; what it is called doesn't matter
        kinds = ["".join(Path(part.name).suffixes).lower() for part in [*train, *val]]
        entry_id = _hash_of([FORMAT, how, train_ratio, len(train), content, kinds])
    folder = tokens_folder / entry_id
    text = _open_entry(folder, report)
    if text is None:
        _build_entry(folder, [train, val], spec, tokenizer, train_ratio, report)
        text = _open_entry(folder, report)
        assert text is not None, f"{folder} was written and can't be read"
    write_json(found_path, {"state": state, "entry": entry_id})
    text.report["passed_over"] = report.passed_over
    for told, part in zip(text.report["files"], [*train, *val], strict=True):
        if part.path is not None:
            _tell_anew(text.report, told, part)
    return text


def _tell_anew(report: dict[str, Any], told: dict[str, Any], part: Part) -> None:
    """Let an entry's report name a file as it is called now: it may have been another then."""
    before = f"{told['name']}: "
    report["notes"] = [
        f"{part.name}: {note.removeprefix(before)}" if note.startswith(before) else note
        for note in report["notes"]
    ]
    told |= {"name": part.name, "path": str(part.path)}


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _state_of(part: Part) -> list:
    """What changes when a part does, at no cost: path, size and time of a file."""
    if part.path is None:
        return [part.name, dataset_fingerprint(part)]
    facts = os.stat(part.path) if part.path.exists() else None
    return [
        str(part.path.resolve()),
        facts and facts.st_size,
        facts and facts.st_mtime_ns,
    ]


def _recall(found_path: Path, state: list) -> str | None:
    """The entry that a request led to, where its files look the same as then."""
    try:
        found = json.loads(found_path.read_bytes())
        return found["entry"] if found["state"] == state else None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # missing or damaged: it is only a shortcut
        return None


# ----------------------------------------------------------------------------------- reading


def _open_entry(folder: Path, reading: ReadingReport) -> TokenizedText | None:
    """An entry as it was made; None where there is none. A damaged one is removed, and said."""
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
        sha256=hashlib.sha256(
            json.dumps([entry["block_sha256"], entry["n_train"]]).encode()
        ).hexdigest(),
        stood_in=reading.stood_in,
        report=entry["report"],
        notices=reading.notices,
    )


def _block_hashes(path: Path) -> list[str]:
    """The sha256 of each BLOCK of a file, computed on all cores."""

    def block_hash(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK)).hexdigest()

    starts = range(0, path.stat().st_size, BLOCK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(block_hash, starts))


# ---------------------------------------------------------------------------------- building


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
        tokenizer, description = make_tokenizer(tokenizer_name, lambda: _texts(train, spec))
        sides = _write_tokens(temporary / "all.bin", tokenizer, parts, spec, report)
        if not report.documents:
            names = ", ".join(spec.train + spec.val)
            raise DataError(f"{names} is empty.\nSet DATA to a text of at least a few sentences.")
        n_train = _arrange(temporary, sides, tokenizer, train_ratio, has_val=bool(val))
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
            "report": _report_of(report, sides, n_tokens, tokenizer, description),
        }
        write_json(temporary / "entry.json", {"sha256": _hash_of(entry), "entry": entry})
        rename_folder(temporary, folder)  # where another process was first, its entry stays
    finally:
        discard(temporary)


def _remove_orphans(tokens_folder: Path) -> None:
    """Remove what a build left that was killed; a younger one may still be running."""
    for orphan in [*tokens_folder.glob(".tmp-*"), *tokens_folder.glob(".del-*")]:
        with contextlib.suppress(FileNotFoundError):  # its own process was quicker
            if time.time() - orphan.stat().st_mtime > ORPHAN_AGE_S:
                discard(orphan)


def _texts(parts: list[Part], spec: DataSpec) -> Iterator[str]:
    """The text of all documents in chunks, for making a tokenizer."""
    report = ReadingReport()
    with ByteProgress("Reading", _size_of(parts)) as progress:
        for chunk, _ in cut_into_chunks(read_documents(parts, spec, report)):
            progress.show(report.bytes_read)
            yield chunk


@dataclass
class _Side:
    """The documents of one side, training or validation, as they stand in the token file."""

    start: int  # in tokens, as all places here
    stop: int
    ends: array  # behind each document's last token; then comes an end-of-text, but at stop
    digests: array  # of each document's text
    counts: np.ndarray  # how often each token occurs


def _write_tokens(
    path: Path,
    tokenizer: Tokenizer,
    sides: list[list[Part]],
    spec: DataSpec,
    report: ReadingReport,
) -> list[_Side]:
    """Write the tokens of all documents in order, with an end-of-text between those of a side."""
    end_of_text = np.array([tokenizer.end_of_text_id], dtype=_dtype_for(tokenizer))
    workers = os.cpu_count() or 1
    position, written = 0, []
    with (
        NewFile(path, durable=False) as file,
        ThreadPoolExecutor(workers) as pool,
        ByteProgress("Tokenizing", sum(map(_size_of, sides))) as progress,
    ):
        for parts in sides:
            side = _Side(position, position, array("Q"), array("Q"), np.zeros(tokenizer.vocab_size))
            open_digests: list[bytes] = []
            for batch in _encode(read_documents(parts, spec, report), tokenizer, pool, workers):
                side.counts += batch.counts
                for n_ids, digest, is_last in batch.chunks:
                    open_digests.append(digest)
                    if side.ends and len(open_digests) == 1:
                        position += 1  # for the end-of-text before this document
                    position += n_ids
                    if is_last:
                        side.ends.append(position)
                        side.digests.append(_join_digests(open_digests))
                        open_digests = []
                if batch.begins_document and position > side.start + len(batch.ids):
                    file.write(memoryview(end_of_text).cast("B"))
                    side.counts[tokenizer.end_of_text_id] += 1
                file.write(memoryview(batch.ids).cast("B"))
                progress.show(report.bytes_read)
            side.stop = position
            written.append(side)
    return written


def _dtype_for(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


@dataclass
class _Batch:
    """Some chunks as tokens, with an end-of-text between documents."""

    ids: np.ndarray
    begins_document: bool
    chunks: list[tuple[int, bytes, bool]]  # tokens, digest of the text, is the document's last
    counts: np.ndarray


def _encode(
    documents: Iterable[tuple[str, bool]],
    tokenizer: Tokenizer,
    pool: ThreadPoolExecutor,
    workers: int,
) -> Iterator[_Batch]:
    """Encode chunks on all cores, in order; only a few are in memory at a time."""
    pending: collections.deque = collections.deque()
    begins_document = True
    cut = whole_documents if tokenizer.kind == "foreign" else cut_into_chunks
    for chunks in _batches(cut(documents)):
        pending.append(pool.submit(_encode_batch, tokenizer, chunks, begins_document))
        begins_document = chunks[-1][1]
        if len(pending) > 2 * workers:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _encode_batch(
    tokenizer: Tokenizer, chunks: list[tuple[str, bool]], begins_document: bool
) -> _Batch:
    end_of_text = np.array([tokenizer.end_of_text_id])
    parts, facts = [], []
    for number, (text, is_last) in enumerate(chunks):
        if number and chunks[number - 1][1]:
            parts.append(end_of_text)
        parts.append(tokenizer.encode_array(text))
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        facts.append((len(parts[-1]), digest, is_last))
    ids = np.concatenate(parts).astype(_dtype_for(tokenizer))
    return _Batch(ids, begins_document, facts, np.bincount(ids, minlength=tokenizer.vocab_size))


def _batches(chunks: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Put short documents together, so that each task is worth its while."""
    batch, characters = [], 0
    for chunk, is_last in chunks:
        batch.append((chunk, is_last))
        characters += len(chunk)
        if characters >= CHUNK // 2 or len(batch) == 4096:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _join_digests(digests: list[bytes]) -> int:
    whole = digests[0]
    if len(digests) > 1:
        whole = hashlib.blake2b(b"".join(digests), digest_size=8).digest()
    return int.from_bytes(whole, "big")


def whole_documents(documents: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Each document in one piece, for a tokenizer of which nothing is known."""
    held = []
    for piece, is_last in documents:
        held.append(piece)
        if is_last:
            yield "".join(held), True
            held = []


def cut_into_chunks(
    documents: Iterable[tuple[str, bool]],
) -> Iterator[tuple[str, bool]]:
    """Cut the pieces of documents anew, into chunks of about CHUNK characters.

    Where a cut lies depends on the document's text alone, and it is at a place where GPT-2's
    pattern begins a new word whatever came before: the tokens of the chunks are those of the
    whole document. A text without such a place stays in one chunk; DataError where that grows
    past MOST_UNCUT.
    """
    held, size, searched = [], 0, 0
    for piece, is_last in documents:
        held.append(piece)
        size += len(piece)
        if size > CHUNK:
            text, start = "".join(held), 0
            while len(text) - start > CHUNK:
                cut = find_cut(text, start, start + CHUNK, searched)
                if cut is None:
                    if len(text) - start > MOST_UNCUT:
                        raise DataError(
                            f"more than {MOST_UNCUT:,} characters in a row without a blank or a "
                            f"punctuation mark, beginning {text[start : start + 20]!r}.\n"
                            "That is no text; set DATA to something else."
                        )
                    searched = len(text) - 1
                    break
                yield text[start:cut], False
                start, searched = cut, 0
            searched = max(0, searched - start)
            held, size = [text[start:]], len(text) - start
        if is_last:
            yield "".join(held), True
            held, size, searched = [], 0, 0


def find_cut(text: str, start: int, near: int, searched: int = 0) -> int | None:
    """The last place to cut a text after start and up to near, else the first one behind near.

    Such a place is between a letter or digit and a blank or punctuation mark: a word of GPT-2's
    pattern ends there, and nothing that it matches behind depends on what is before. Places below
    `searched` are known to be none.
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
    behind = _CUT.search(text, max(near, searched))
    return behind.end() if behind else None


_CUT = re.compile(r"[^\W_](?=[ \t\n\r.,;:!?\"()\[\]{}<>/，。！？；：、「」『』（）《》…—“”\u3000])")


def _size_of(parts: list[Part]) -> int:
    return sum(part.path.stat().st_size for part in parts if part.path)


# --------------------------------------------------------------------------------- splitting


def _arrange(
    folder: Path,
    sides: list[_Side],
    tokenizer: Tokenizer,
    train_ratio: float,
    *,
    has_val: bool,
) -> int | None:
    """Make tokens.bin of all.bin, training tokens first; returns how many those are.

    None where they are still to be cut by position: one text, or few documents.
    """
    train = sides[0]
    is_val = None if has_val else choose_validation(train.digests, train_ratio)
    if is_val is None:
        rename_file(folder / "all.bin", folder / "tokens.bin")
        return train.stop if has_val else None
    dtype = np.dtype(_dtype_for(tokenizer))
    end_of_text = np.array([tokenizer.end_of_text_id], dtype=dtype).tobytes()
    ends = np.frombuffer(train.ends, dtype=np.uint64).astype(np.int64)
    starts = np.concatenate(([train.start], ends[:-1] + 1))
    sizes = []
    with (
        (folder / "all.bin").open("rb") as source,
        NewFile(folder / "tokens.bin", durable=False) as file,
    ):
        for chosen in (~is_val, is_val):
            size = 0
            # neighbours are one stretch, with the ends of text between them
            first = np.flatnonzero(chosen & ~np.concatenate(([False], chosen[:-1])))
            last = np.flatnonzero(chosen & ~np.concatenate((chosen[1:], [False])))
            for start, stop in zip(starts[first].tolist(), ends[last].tolist(), strict=True):
                if size:
                    file.write(end_of_text)
                    size += 1
                _copy(source, file, start * dtype.itemsize, stop * dtype.itemsize)
                size += stop - start
            sizes.append(size)
    remove_file(folder / "all.bin")
    return sizes[0]


def _copy(source: BinaryIO, file: NewFile, start: int, stop: int) -> None:
    source.seek(start)
    while start < stop:
        block = source.read(min(stop - start, 1 << 22))
        file.write(block)
        start += len(block)


def choose_validation(digests: array, train_ratio: float) -> np.ndarray | None:
    """Which documents validate, by a hash of their text: whatever the seed, and equal documents on
    one side. None for few documents, or where all are equal.
    """
    if len(digests) < HASH_SPLIT_FROM:
        return None
    values = np.frombuffer(digests, dtype=np.uint64)
    if values.min() == values.max():
        return None
    is_val = values >= np.uint64(min(int(train_ratio * 2.0**64), 2**64 - 1))
    if not is_val.any():
        return values == values.max()
    if is_val.all():
        return values != values.min()
    return is_val


def _report_of(
    report: ReadingReport,
    sides: list[_Side],
    n_tokens: int,
    tokenizer: Tokenizer,
    description: str,
) -> dict[str, Any]:
    digests = np.concatenate([np.frombuffer(side.digests, dtype=np.uint64) for side in sides])
    return {
        "files": report.files,
        "passed_over": report.passed_over,
        "notes": report.notes,
        "documents": report.documents,
        "empty_documents": report.empty_documents,
        "duplicate_documents": len(digests) - len(np.unique(digests)),
        # only where validation has a source of its own: else equal documents are on one side
        "documents_on_both_sides": len(
            np.intersect1d(*(np.frombuffer(side.digests, dtype=np.uint64) for side in sides))
        ),
        "bytes": report.bytes_read,
        "characters": report.characters,
        "tokens": n_tokens,
        "tokens_per_character": n_tokens / max(1, report.characters),
        "tokenizer": description,
        "vocabulary": tokenizer.vocab_size,
        "vocabulary_used": int(np.count_nonzero(sum(side.counts for side in sides))),
    }
