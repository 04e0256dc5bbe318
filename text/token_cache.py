"""The token cache: each text is tokenized once, into a flat array on disk.

An entry is a folder cache/tokens/<id>/ with tokens.bin, tokenizer.json and entry.json, which has
the hashes of the other two. Its id is a hash of all that it was made from, and it appears by one
rename. The file found-<id>.json records the files and the entry of a request (names and options).
"""

import collections
import contextlib
import hashlib
import json
import os
import re
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.console import Progress, say
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
    Documents,
    Part,
    ReadingReport,
    dataset_fingerprint,
    file_sha256,
    read_documents,
    validation_parts,
)
from text.sources import find_parts
from text.tokenizer import Tokenizer, make_tokenizer, restore_tokenizer

FORMAT = 1  # of an entry; no other is read
CHUNK = 1 << 20  # characters to encode in one task
MOST_UNCUT = 1 << 26  # characters without a place to cut; a text has one in each sentence
BLOCK = 16 << 20  # bytes of tokens per hash
HASH_SPLIT_FROM = 20  # documents; the validation tokens of fewer are the last ones
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
    spec: DataSpec, tokenizer: str, train_ratio: float, cache: Path, *, stand_in: bool | None = None
) -> TokenizedText:
    """Tokenize DATA, or find its tokens in the cache if nothing has changed.

    tokenizer is TOKENIZER's value; stand_in is that of corpus_path(). Raises DataError for data
    that can't be read, SettingsError for a missing library, ResourceError if the cache can't be
    written.
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
    request = _hash_of([FORMAT, asdict(spec), tokenizer, train_ratio])
    found_path = tokens_folder / f"found-{request}.json"
    state = [_state_of(part) for part in parts]
    entry_id = _recall(found_path, state)
    if entry_id is None:
        content = [
            dataset_fingerprint(part) if part.path is None else file_sha256(part.path)
            for part in parts
        ]
        how = [tokenizer_kind, spec.field, spec.encoding]
        # of a file's name only the suffixes matter
        kinds = ["".join(Path(part.name).suffixes).lower() for part in texts]
        entry_id = _hash_of([FORMAT, how, train_ratio, len(train), content, kinds])
    folder = tokens_folder / entry_id
    text = _open_entry(folder, report)
    if text is None:
        _build_entry(folder, [train, val], spec, tokenizer, train_ratio, report)
        text = _open_entry(folder, report)
        assert text is not None, f"{folder} was written and can't be read"
    write_json(found_path, {"state": state, "entry": entry_id})
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
    content = json.dumps([entry["block_sha256"], entry["n_train"]])
    return TokenizedText(
        path=folder / "tokens.bin",
        dtype=entry["dtype"],
        n_tokens=entry["n_tokens"],
        n_train=entry["n_train"],
        tokenizer=restore_tokenizer(entry["tokenizer_kind"], tokenizer_json),
        tokenizer_file=folder / "tokenizer.json",
        sha256=hashlib.sha256(content.encode()).hexdigest(),
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


def _write_tokens(
    path: Path, tokenizer: Tokenizer, sides: list[list[Part]], spec: DataSpec, report: ReadingReport
) -> list[_Side]:
    """Write the tokens of all documents in order, with an end-of-text between those of a side."""
    position, written = 0, []
    with (
        NewFile(path, durable=False) as file,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        Progress("Tokenizing", sum(map(_size_of, sides))) as progress,
    ):
        for parts in sides:
            ends, digests, counts = array("Q"), array("Q"), np.zeros(tokenizer.vocab_size)
            open_digests: list[bytes] = []
            for batch in _encode(read_documents(parts, spec, report), tokenizer, pool):
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
    return written


def _dtype_for(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


@dataclass
class _Batch:
    """The tokens of some chunks, with an end-of-text before each document but the first."""

    ids: np.ndarray
    chunks: list[tuple[int, bytes, bool]]  # tokens, the end-of-text included; digest; is last
    counts: np.ndarray


def _encode(
    documents: Documents, tokenizer: Tokenizer, pool: ThreadPoolExecutor
) -> Iterator[_Batch]:
    """Encode documents in parallel, in order; only a few batches are in memory."""
    pending: collections.deque[Future[_Batch]] = collections.deque()
    follows_document = False
    # where a foreign tokenizer could cut is unknown
    cut = _join_pieces if tokenizer.kind == "foreign" else cut_into_chunks
    for chunks in _batches(cut(documents)):
        pending.append(pool.submit(_encode_batch, tokenizer, chunks, follows_document))
        follows_document = chunks[-1][1]
        if len(pending) > 2 * (os.cpu_count() or 1):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _encode_batch(
    tokenizer: Tokenizer, chunks: list[tuple[str, bool]], follows_document: bool
) -> _Batch:
    end_of_text = np.array([tokenizer.end_of_text_id])
    parts, facts = [], []
    for text, is_last in chunks:
        ids = tokenizer.encode_array(text)
        parts += [end_of_text, ids] if follows_document else [ids]
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        facts.append((len(ids) + follows_document, digest, is_last))
        follows_document = is_last
    ids = np.concatenate(parts).astype(_dtype_for(tokenizer))
    return _Batch(ids, facts, np.bincount(ids, minlength=tokenizer.vocab_size))


def _batches(chunks: Documents) -> Iterator[list[tuple[str, bool]]]:
    """Group short documents, so that a task takes longer than its overhead."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for chunk, is_last in chunks:
        batch.append((chunk, is_last))
        characters += len(chunk)
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


def _join_pieces(documents: Documents) -> Documents:
    held = []
    for piece, is_last in documents:
        held.append(piece)
        if is_last:
            yield "".join(held), True
            held = []


def cut_into_chunks(documents: Documents) -> Documents:
    """Rearrange documents in pieces into chunks of about CHUNK characters.

    The cuts depend on the document's text alone. They are where GPT-2's pattern starts a new word
    in any context, so the tokens of the chunks are those of the document. A text without such a
    place stays in one chunk; DataError if that is longer than MOST_UNCUT.
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
    """The last place to cut a text after start and up to near, else the first one after near.

    That is between a letter or digit and a space or punctuation mark: a word of GPT-2's pattern
    ends there, and its later matches don't depend on the text before. There is none below
    `searched`.
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


def _arrange(
    folder: Path, sides: list[_Side], tokenizer: Tokenizer, train_ratio: float, *, has_val: bool
) -> int | None:
    """Make tokens.bin of all.bin, training tokens first; returns the number of those.

    Returns None if the caller is to split them by position: for one text, or few documents.
    """
    train = sides[0]
    is_val = None if has_val else choose_validation(train.digests, train_ratio)
    if is_val is None:
        rename_file(folder / "all.bin", folder / "tokens.bin")
        return train.stop if has_val else None
    dtype = np.dtype(_dtype_for(tokenizer))
    end_of_text = np.array([tokenizer.end_of_text_id], dtype=dtype).tobytes()
    ends = np.frombuffer(train.ends, dtype=np.uint64).astype(np.int64)
    starts = np.concatenate(([0], ends[:-1] + 1))
    sizes = []
    with (
        (folder / "all.bin").open("rb") as source,
        NewFile(folder / "tokens.bin", durable=False) as file,
    ):
        for chosen in (~is_val, is_val):
            size = 0
            # copy adjacent documents as one, with the end-of-text between them
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


def choose_validation(digests: "array[int]", train_ratio: float) -> np.ndarray | None:
    """Which documents are for validation, by the hashes of their texts, for any seed the same.

    Returns None for few documents, or if all are equal.
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
    report: ReadingReport, sides: list[_Side], n_tokens: int, tokenizer: Tokenizer, description: str
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
        "tokens": n_tokens,
        "tokens_per_character": n_tokens / max(1, report.characters),
        "tokenizer": description,
        "vocabulary": tokenizer.vocab_size,
        "vocabulary_used": int(np.count_nonzero(sum(side.counts for side in sides))),
    }
