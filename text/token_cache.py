"""The token cache: each text is tokenized once, into a flat array on disk.

An entry is a folder cache/tokens/<id>/ with tokens.bin, tokenizer.json and entry.json, which has
the hashes of the others; with conversations, targets.bin marks the tokens that count, a byte each,
and starts.bin has where each conversation begins, and ~place of a text. Its id is a hash of all
that it was made from, and it appears by one rename. The file found-<id>.json records the files and
the entry of a request (names and options).
"""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.console import Progress, say
from engine.errors import DataError, ResourceError
from engine.words import Words
from storage.cache import keep_within_limit, note_use
from storage.files import (
    NewFile,
    discard,
    make_folder,
    remove_folder,
    rename_folder,
    write_atomically,
    write_json,
)
from text.arrangement import Side, arrange, divide, times_seen
from text.chat import Conversation
from text.chat_template import CHATML, ChatTemplate
from text.chat_tokens import (
    ChatReport,
    EncodedConversation,
    chat_template_for,
    digests_of,
    encode_conversations,
    require_answers,
    writer_of,
)
from text.corpora import CORPORA
from text.documents import (
    DataSpec,
    Document,
    Documents,
    Part,
    ReadingReport,
    dataset_fingerprint,
    each_document,
    file_sha256,
    has_conversations,
    pieces_of,
    read_documents,
    validation_parts,
)
from text.repeats import Repeats
from text.sources import find_parts
from text.split import Split
from text.tokenizer import (
    BLANK,
    LONGEST_WORD,
    RUN,
    ForeignTokenizer,
    Tokenizer,
    make_tokenizer,
    restore_tokenizer,
)

FORMAT = 6  # of an entry; no other is read
CHUNK = 1 << 18  # characters to encode in one task, which no Ctrl-C can end
NEIGHBORHOOD = 1 << 12  # characters beside a chunk that its first and last tokens depend on
MOST_UNCUT = 1 << 18  # characters without a place to cut, at most; a text has one in each sentence
BLOCK = 16 << 20  # bytes of tokens per hash
TARGETS, STARTS = "targets.bin", "starts.bin"  # of an entry with conversations
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
    notices: list[Words]  # to print in every run
    chat: "ChatTokens | None" = None  # of a text with conversations


@dataclass(frozen=True)
class ChatTokens:
    """What the tokens of conversations have besides. There may be texts among them, of which all
    tokens are targets, the end-of-text behind each too."""

    template: str  # the chat template that they were written down by, in Jinja
    targets: Path  # a byte for each token: 1 if it is an answer's, or the end of its turn
    train_starts: np.ndarray  # (N,) where each document begins, in the training tokens
    val_starts: np.ndarray  # the same in the validation tokens
    train_is_text: np.ndarray  # (N,) bool, which of them are texts
    val_is_text: np.ndarray
    n_different: int  # conversations to train on: no texts, and each once
    added: tuple[str, ...]  # the special tokens that the tokenizer got for the template


def tokenize(
    spec: DataSpec,
    tokenizer: str,
    train_ratio: float,
    cache: Path,
    *,
    stand_in: bool | None = None,
    is_free: bool = True,
    chat_template: str | None = None,
) -> TokenizedText:
    """Tokenize DATA, or find its tokens in the cache if nothing has changed.

    tokenizer is TOKENIZER's value, but not "auto", is_free whether another one could be set;
    stand_in is that of corpus_path(). chat_template is the one by which conversations are written
    down, if there are any; None is ChatML, whose tokens the tokenizer then gets too. Raises
    DataError for data that can't be read, SettingsError for a missing library, ResourceError if the
    cache can't be written.
    """
    report = ReadingReport(stand_in=stand_in)
    train = find_parts(spec.train, cache, report, spec.weights)
    val = find_parts(spec.val, cache, report) if spec.val else validation_parts(train)
    tokens_folder = cache / "tokens"
    make_folder(tokens_folder)
    texts = [*train, *val]
    parts, tokenizer_kind = texts, tokenizer
    if tokenizer.endswith(".json"):
        parts = [*texts, Part(tokenizer, Path(tokenizer).expanduser())]
        tokenizer_kind = "json"
    template = chat_template or CHATML.source
    request = _hash_of([FORMAT, asdict(spec), tokenizer, tokenizer_kind, train_ratio, template])
    found_path = tokens_folder / f"found-{request}.json"
    state = [_state_of(part) for part in parts]
    entry_id = _recall(found_path, state)
    if entry_id is None:
        entry_id = _name_entry(spec, tokenizer_kind, train_ratio, [train, val], parts, template)
    folder = tokens_folder / entry_id
    text = _open_entry(folder, report)
    if text is None:
        used = template if has_conversations(texts, spec) else None
        _build_entry(folder, [train, val], spec, tokenizer, train_ratio, report, template=used)
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


def _name_entry(
    spec: DataSpec,
    tokenizer_kind: str,
    train_ratio: float,
    sides: list[list[Part]],
    parts: list[Part],
    template: str,
) -> str:
    """The hash of all that an entry is made from; parts are those of both sides, and more."""
    content = [
        dataset_fingerprint(part) if part.path is None else file_sha256(part.path) for part in parts
    ]
    train, val = sides
    how = [tokenizer_kind, spec.field, spec.encoding, spec.separator, spec.bad_rows]
    # of a file's name only the suffixes matter
    kinds = ["".join(Path(part.name).suffixes).lower() for part in (*train, *val)]
    weights = [part.weight for part in train]
    used = template if has_conversations([*train, *val], spec) else None
    return _hash_of([FORMAT, how, train_ratio, len(train), content, kinds, weights, used])


def _rename(report: dict[str, Any], file: dict[str, Any], part: Part) -> None:
    """Update the name of a file in a cached report: it may have been renamed since."""
    own = f"{file['name']}: "
    for number, note in enumerate(report["notes"]):
        if note.en.startswith(own):
            ends = (text.removeprefix(file["name"]) for text in note)
            report["notes"][number] = Words(*(f"{part.name}{end}" for end in ends))
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
    """The sha256 of an entry's tokens, of its conversations and of their split."""
    content = json.dumps([entry["block_sha256"], entry["n_train"]])
    if entry["chat"] is not None:
        content += json.dumps(entry["chat"])
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
        chat = _open_chat(folder, entry)
    except (OSError, ValueError, KeyError, TypeError):
        intact, chat = False, None
    if not intact or (chat is None and entry["chat"] is not None):
        say(f"Note: the token cache {folder} is damaged; it is made anew")
        if not remove_folder(folder):
            raise ResourceError(
                f"the damaged token cache {folder} can't be removed.\n"
                "End the programs that have a file in it open, or remove it yourself."
            )
        return None
    report = entry["report"]
    report["notes"] = [Words.of(note) for note in report["notes"]]
    return TokenizedText(
        path=folder / "tokens.bin",
        dtype=entry["dtype"],
        n_tokens=entry["n_tokens"],
        n_train=entry["n_train"],
        tokenizer=restore_tokenizer(entry["tokenizer_kind"], tokenizer_json),
        tokenizer_file=folder / "tokenizer.json",
        sha256=_sha256_of(entry),
        stood_in=reading.stood_in,
        report=report,
        notices=reading.notices,
        chat=chat,
    )


def _open_chat(folder: Path, entry: dict[str, Any]) -> ChatTokens | None:
    """What an entry has of conversations; None if it has none, or other than it says."""
    chat, n_train = entry["chat"], entry["n_train"]
    if chat is None or chat["block_sha256"] != _chat_hashes(folder):
        return None
    starts = np.fromfile(folder / STARTS, dtype="<i8").astype(np.int64)
    is_text = starts < 0
    starts[is_text] = ~starts[is_text]
    is_val = starts >= n_train
    return ChatTokens(
        template=chat["template"],
        targets=folder / TARGETS,
        train_starts=starts[~is_val],
        val_starts=starts[is_val] - n_train,
        train_is_text=is_text[~is_val],
        val_is_text=is_text[is_val],
        n_different=chat["n_different"],
        added=tuple(entry.get("added", ())),  # an old entry has none
    )


def _chat_hashes(folder: Path) -> list[list[str]]:
    return [_block_hashes(folder / TARGETS), _block_hashes(folder / STARTS)]


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
    *,
    template: str | None,
) -> None:
    """Make an entry; template is the chat template if there are conversations."""
    train, val = parts
    _remove_orphans(folder.parent)
    temporary = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    make_folder(temporary)
    try:
        # a vocabulary that has seen validation text makes it look easier than text is
        ratio = train_ratio if tokenizer_name.startswith("bpe:") and not val else None
        tokenizer = make_tokenizer(tokenizer_name, lambda: _texts(train, spec, ratio))
        chat, known = None, tokenizer.special_tokens
        if template is not None:
            chat, tokenizer = chat_template_for(template, tokenizer)
            require_answers(chat, tokenizer)
        added = [name for name in tokenizer.special_tokens if name not in known]
        sides, told = _write_tokens(temporary, tokenizer, parts, spec, report, chat)
        _check_sides(spec, sides, report)
        if not any(side.is_chat.any() for side in sides):  # no row has an answer
            chat = told = None
        unknown = _count_unknown(tokenizer, sides)
        if unknown:
            report.notes.append(_about_unknown(unknown, sides, tokenizer))
        if not tokenizer_name.startswith("bpe:"):  # made of this text
            report.notes += _about_rate(tokenizer, sides, report.characters, told)
        dtype, is_weighted = _dtype_for(tokenizer), any(part.weight != 1 for part in train)
        split = None if val else divide(sides[0], train_ratio, by_position=is_weighted)
        if split is not None and split.cut is not None:
            report.notes.append(_note_on_cut(split, sides[0], train_ratio))
        times = _times_seen(train, sides[0], split, report) if is_weighted else None
        n_train = arrange(
            temporary,
            sides,
            np.dtype(dtype),
            tokenizer.end_of_text_id,
            split,
            times,
            has_val=bool(val),
        )
        n_tokens = (temporary / "tokens.bin").stat().st_size // np.dtype(dtype).itemsize
        n_read = sum(side.counts.sum() for side in sides) if is_weighted else n_tokens
        facts = _report_of(report, sides, n_tokens, n_read, tokenizer) | {"unknown_tokens": unknown}
        if split is not None and split.cut is not None:
            facts["documents_on_both_sides"] = 1
        if told is not None:
            facts["chat"] = told.facts(_shared_prompts(sides, split))
            facts["notes"].append(told.words())
        n_different = _count_different(sides[0], split, times)
        _seal(temporary, tokenizer, n_train, facts, chat, n_different, added=added)
        rename_folder(temporary, folder)  # if another process was faster, its entry stays
    finally:
        discard(temporary)


def _seal(
    folder: Path,
    tokenizer: Tokenizer,
    n_train: int | None,
    report: dict[str, Any],
    template: ChatTemplate | None,
    n_different: int,
    *,
    added: list[str],
) -> None:
    """Write an entry's tokenizer.json and entry.json, with its n_different conversations and the
    special tokens that the tokenizer has got for them."""
    tokenizer_json = tokenizer.to_json().encode("utf-8")
    write_atomically(folder / "tokenizer.json", tokenizer_json)
    chat = None
    if template is not None:
        hashes = _chat_hashes(folder)
        chat = {"template": template.source, "n_different": n_different}
        chat |= {"block_sha256": hashes}
    entry = {
        "dtype": _dtype_for(tokenizer),
        "n_tokens": report["tokens"],
        "n_train": n_train,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_sha256": hashlib.sha256(tokenizer_json).hexdigest(),
        "block_sha256": _block_hashes(folder / "tokens.bin"),
        "chat": chat,
        "added": added,
        "report": report,
    }
    write_json(folder / "entry.json", {"sha256": _hash_of(entry), "entry": entry})


def _shared_prompts(sides: list[Side], split: Split | None) -> int:
    """The prompts that are in the training and in the validation conversations."""
    train, val = sides
    if split is None:
        pairs = [(train, train.is_chat), (val, val.is_chat)]
    else:
        pairs = [(train, train.is_chat & ~split.is_val), (train, train.is_chat & split.is_val)]
    return len(np.intersect1d(*(side.prompt_hashes[chosen] for side, chosen in pairs)))


def _count_different(side: Side, split: Split | None, times: np.ndarray | None) -> int:
    """The different conversations that are trained on, however often an epoch has each."""
    is_seen = np.ones(len(side.first), bool) if times is None else times > 0
    if split is not None:
        is_seen &= ~split.is_val
    return len(np.unique(side.hashes[side.is_chat & is_seen]))


def _check_sides(spec: DataSpec, sides: list[Side], report: ReadingReport) -> None:
    """Raise DataError if there is no document, or on one side nothing but rows without answers."""
    for files, side in zip((spec.train, spec.val), sides, strict=True):
        if side.unanswered and not len(side.ends):
            raise DataError(
                f"{', '.join(files)} has no row with an answer ({side.unanswered:,} without).\n"
                "A conversation to train on has a message of the assistant."
            )
    if not report.documents:
        names = ", ".join(spec.train + spec.val)
        raise DataError(f"{names} is empty.\nSet DATA to a text of at least a few sentences.")


def _times_seen(
    parts: list[Part], side: Side, split: Split | None, report: ReadingReport
) -> np.ndarray:
    """How often each training document is seen in an epoch, with a note on each weight."""
    n_documents = [file["documents"] for file in report.files[: len(parts)]]
    part_of = np.repeat(np.arange(len(parts)), n_documents)
    is_val = np.zeros(len(part_of), bool) if split is None else split.is_val
    weights = np.array([part.weight for part in parts])
    times = times_seen(weights, part_of, side.hashes, is_val)
    for number, part in enumerate(parts):
        if part.weight != 1:
            seen = times[(part_of == number) & ~is_val]
            documents = "document" + "s" * (len(seen) != 1)
            report.note(
                part.name,
                f"its weight is {part.weight:g}: {len(seen):,} {documents} to train on, seen "
                f"{seen.sum():,} times in an epoch",
                f"权重为 {part.weight:g}：{len(seen):,} 个文档用于训练，每个 epoch 见到 "
                f"{seen.sum():,} 次",
            )
    return times


def _remove_orphans(tokens_folder: Path) -> None:
    """Remove what killed builds left; a younger folder may belong to a running one."""
    for orphan in [*tokens_folder.glob(".tmp-*"), *tokens_folder.glob(".del-*")]:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - orphan.stat().st_mtime > ORPHAN_AGE_S:
                discard(orphan)


def _texts(parts: list[Part], spec: DataSpec, train_ratio: float | None) -> Iterator[str]:
    """The text of all documents in chunks, to make a tokenizer from; with a train_ratio only what
    is to train, which is decided as for the tokens, but by characters."""
    left: collections.deque[int] | None = None
    if train_ratio is not None:
        left = _characters_to_train(parts, spec, train_ratio)
    report = ReadingReport()
    with Progress("Reading", _size_of(parts)) as progress:
        for chunk, is_last in cut_into_chunks(read_documents(parts, spec, report)):
            progress.show(report.bytes_read)
            if left is None:
                yield chunk
                continue
            yield chunk[: left[0]]
            left[0] = max(0, left[0] - len(chunk))
            if is_last:
                left.popleft()


def _characters_to_train(
    parts: list[Part], spec: DataSpec, train_ratio: float
) -> "collections.deque[int]":
    """Of each document the characters, from its first one on, that are not to validate."""
    documents = _measure_documents(parts, spec)
    if not documents.ends:
        return collections.deque()
    split = divide(documents, train_ratio, by_position=True)
    assert split is not None, "by position there is always one"
    characters = np.where(split.is_val, 0, documents.stops - documents.starts)
    if split.cut is not None:
        characters[split.cut] -= split.n_cut
    return collections.deque(characters.tolist())


def _measure_documents(parts: list[Part], spec: DataSpec) -> Side:
    """All documents as a Side has them, but with characters in place of tokens."""
    report, side = ReadingReport(), Side(np.zeros(0))
    with Progress("Reading", _size_of(parts)) as progress:
        for document in each_document(parts, spec, report):
            start, digests = side.stop, list[bytes]()
            for chunk, _ in cut_into_chunks(pieces_of(document, report)):
                digests.append(_digest_of(chunk))
                side.stop += len(chunk)
                progress.show(report.bytes_read)
            if isinstance(document, Conversation):
                digest, prompt = digests_of(document)
                side.add(start, side.stop, digest, prompt, is_chat=True)
            elif digests:
                side.add(start, side.stop, _join_digests(digests), 0, is_chat=False)
    return side


def _watched(documents: Documents, repeats: Repeats) -> Documents:
    for piece, is_last in documents:
        repeats.add(piece, is_last)
        yield piece, is_last


def _write_tokens(
    folder: Path,
    tokenizer: Tokenizer,
    sides: list[list[Part]],
    spec: DataSpec,
    report: ReadingReport,
    chat: ChatTemplate | None,
) -> tuple[list[Side], ChatReport | None]:
    """Write the tokens of all documents in order, with an end-of-text between two texts of a side;
    and, with a chat template, the marks of those that count.

    Sets the report's share of the text that came before in the same document.
    """
    repeats, told = Repeats(), None if chat is None else ChatReport()
    written = [Side(np.zeros(tokenizer.vocab_size)) for _ in sides]
    with (
        NewFile(folder / "all.bin", durable=False) as file,
        contextlib.ExitStack() as stack,
        encoders() as pool,
        Progress("Tokenizing", sum(map(_size_of, sides))) as progress,
    ):
        marks, write = None, None
        if chat is not None:
            write = writer_of(chat, tokenizer)
            marks = stack.enter_context(NewFile(folder / "all-targets.bin", durable=False))
        position = 0
        for parts, side in zip(sides, written, strict=True):
            side.stop, n_unanswered = position, report.unanswered
            documents = each_document(parts, spec, report, write)
            for is_chat, group in itertools.groupby(documents, _is_conversation):
                if is_chat:
                    assert chat is not None and told is not None, "has_conversations() has seen it"
                    encoded = encode_conversations(_counted(group, report), pool)
                    batches = _chat_batches(encoded, side, tokenizer, told)
                else:
                    pieces = (piece for document in group for piece in pieces_of(document, report))
                    batches = _text_batches(_watched(pieces, repeats), side, tokenizer, pool)
                for ids, targets in batches:
                    file.write(ids.data.cast("B"))
                    if marks is not None:
                        marks.write(targets.tobytes())
                    progress.show(report.bytes_read)
            position, side.unanswered = side.stop, report.unanswered - n_unanswered
    report.copied = repeats.share
    return written, told


def _is_conversation(document: Document) -> bool:
    return isinstance(document, Conversation)


def _text_batches(
    documents: Documents, side: Side, tokenizer: Tokenizer, pool: ThreadPoolExecutor
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of texts in batches, all of which count, noted in their side."""
    open_digests: list[bytes] = []
    start = side.stop
    for batch in encode_documents(documents, tokenizer, pool):
        side.counts += batch.counts
        for n_ids, digest, is_last in batch.chunks:
            open_digests.append(digest)
            side.stop += n_ids
            if is_last:
                side.add(start, side.stop, _join_digests(open_digests), 0, is_chat=False)
                open_digests, start = [], side.stop + 1
        yield batch.ids, np.ones(len(batch.ids), np.uint8)


def _counted(documents: Iterable[Document], report: ReadingReport) -> Iterator[Conversation]:
    """Conversations, counted as read_documents() counts them."""
    for document in documents:
        assert isinstance(document, Conversation), "they are grouped"
        for _ in pieces_of(document, report):
            pass
        yield document


def _chat_batches(
    batches: Iterable[list[EncodedConversation]],
    side: Side,
    tokenizer: Tokenizer,
    told: ChatReport,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of conversations in batches, and which of them count, noted in their side."""
    for batch in batches:
        for encoded in batch:
            start, side.stop = side.stop, side.stop + len(encoded.ids)
            side.add(start, side.stop, encoded.digest, encoded.prompt_digest, is_chat=True)
            told.add(encoded)
        ids = np.concatenate([encoded.ids for encoded in batch]).astype(_dtype_for(tokenizer))
        side.counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        yield ids, np.concatenate([encoded.is_target for encoded in batch]).astype(np.uint8)


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
    """The tokens of some chunks, with an end-of-text before each document but the first, and with
    the token that begins documents, where the tokenizer has one, as the first of each."""

    ids: np.ndarray
    chunks: list[tuple[int, bytes, bool]]  # tokens, with those two; digest; is last
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
            if not chunk.before:  # it begins a document
                ids = np.concatenate((np.array(tokenizer.begin_ids, ids.dtype), ids))
        else:
            ids = tokenizer.encode_array(chunk.text)
        parts += [end_of_text, ids] if follows_document else [ids]
        facts.append((len(ids) + follows_document, _digest_of(chunk.text), chunk.is_last))
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


def _digest_of(chunk: str) -> bytes:
    return hashlib.blake2b(chunk.encode("utf-8", "surrogatepass"), digest_size=8).digest()


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


def _note_on_cut(split: Split, documents: Side, train_ratio: float) -> Words:
    assert split.cut is not None
    size = int(documents.stops[split.cut] - documents.starts[split.cut])
    return Words(
        f"the longest document is cut: its last {split.n_cut:,} of {size:,} tokens validate, as "
        f"whole documents alone don't make the {1 - train_ratio:.0%} that train_ratio leaves "
        '(DATA = {"path": ..., "val": ...} names a validation text of its own)',
        f"最长的文档被切开：它的 {size:,} 个 token 中最后 {split.n_cut:,} 个用于验证，因为只用整篇"
        f"文档凑不出 train_ratio 留下的 {1 - train_ratio:.0%}"
        '（DATA = {"path": ..., "val": ...} 可另指定验证文本）',
    )


def _about_rate(
    tokenizer: Tokenizer, sides: list[Side], characters: int, told: ChatReport | None
) -> list[Words]:
    """A notice where one token a character would be fewer than this tokenizer needs, in texts and
    answers: a template's own tokens are of no message's characters."""
    n_tokens = sum(side.counts.sum() - np.count_nonzero(~side.is_chat) for side in sides)
    if told is not None:
        n_tokens, characters = n_tokens - told.other_tokens, characters - told.other_characters
    needed = n_tokens / max(1, characters)
    if tokenizer.kind == "char" or needed <= MOST_RATE:
        return []
    return [
        Words(
            f"the tokenizer needs {needed:.2f} tokens a character here, as it was made for other "
            'texts; TOKENIZER = "char" needs 1.00, and "auto" chooses by the text',
            f"这个分词器是为别的文本做的，在这里每字符需要 {needed:.2f} 个 token；"
            'TOKENIZER = "char" 只需 1.00，"auto" 按文本选择',
        )
    ]


def _about_vocabulary(text: TokenizedText, spec: DataSpec) -> list[Words]:
    """A notice where hardly any of the vocabulary occurs, unless a named text is tried out."""
    size, used = text.report["vocabulary"], text.report["vocabulary_used"]
    is_small = size <= SMALL_VOCABULARY
    if is_small or used > LEAST_USED * size or CORPORA.keys() >= set(spec.train + spec.val):
        return []
    return [
        Words(
            f"{1 - used / size:.0%} of the tokenizer's {size:,} tokens do not occur in this text; "
            "a vocabulary of its own makes a smaller and better model: "
            'TOKENIZER = "char" or "bpe:1024"',
            f"分词器的 {size:,} 个 token 有 {1 - used / size:.0%} 没有出现在这份文本中；专用的词表"
            '能得到更小更好的模型：TOKENIZER = "char" 或 "bpe:1024"',
        )
    ]


def _count_unknown(tokenizer: Tokenizer, sides: list[Side]) -> int:
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


def _about_unknown(unknown: int, sides: list[Side], tokenizer: Tokenizer) -> Words:
    """A notice with the share of unknown tokens; DataError if it is above MOST_UNKNOWN."""
    share = unknown / sum(side.counts.sum() for side in sides)
    told = (
        f"{share:.1%} of the tokens stand for what the tokenizer ({tokenizer.name}) does not know"
    )
    instead = 'TOKENIZER = "auto", "char" or "gpt2" knows every character'
    if share > MOST_UNKNOWN:
        raise DataError(f"{told}; at most half may.\n{instead}.")
    return Words(
        f"{told}, and are lost; {instead}",
        f"{share:.1%} 的 token 代表分词器（{tokenizer.name}）不认识的内容，这些内容会丢失；"
        'TOKENIZER = "auto"、"char" 或 "gpt2" 认识所有字符',
    )


def _report_of(
    report: ReadingReport, sides: list[Side], n_tokens: int, n_read: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What was read, for data.json; n_tokens has some of the n_read tokens several times."""
    train, val = (side.hashes for side in sides)
    digests = np.concatenate([train, val])
    counts = np.sum([side.counts for side in sides], axis=0)
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
        "tokens_per_character": n_read / max(1, report.characters),
        "tokenizer": tokenizer.name,
        "vocabulary": tokenizer.vocab_size,
        "vocabulary_used": int(np.count_nonzero(counts)),
    }
