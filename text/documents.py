"""Files and datasets to documents: decompressed, decoded, parsed and counted."""

import codecs
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import DataError, SettingsError, first_line
from engine.words import AS_SET, Words
from text.chat import ChatForm, Conversation, form_of, is_turn, messages_of
from text.chat_template import Written
from text.encodings import SAMPLE_BYTES, codec_of, likelier_encoding, likely_encodings
from text.formats import (
    READERS,
    SNIFFED_BYTES,
    kind_of,
    page_encoding,
    page_text,
    reads_as_text,
    refusal_of,
)
from text.separators import LOOKED_AT, SURE_MARKERS, divide, find_marker, separator_of

READ_BYTES = 1 << 20
ZSTD_BYTES = 256  # of input per call, each of which may expand thirty-thousandfold
BOMB_BYTES, BOMB_RATIO = 256 << 20, 300  # what expands further is a decompression bomb
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_ROW_SUFFIXES = {*_JSON_SUFFIXES, *_DELIMITERS, ".parquet"}
_JSON_START = 1 << 16  # characters by which the shape of JSON is told
_BAD_SHARE, _FEW_BAD = 0.01, 3  # of a file's rows may be bad
_NAMED_BAD = 3  # bad rows that a message names
_HOPELESS = 100  # bad rows, and none good, after which no more are read
_DECODER = json.JSONDecoder()
_NOT_ASCII = re.compile(rb"[^\x00-\x7f]")
_NOT_BLANK = re.compile(r"[^ \t\r\n]|\Z")
_MEND_JSON = "Mend it, or save one object a line in a file whose name ends in .jsonl."
_Piece = TypeVar("_Piece", str, bytes)
Documents = Iterator[tuple[str, bool]]  # pieces of text; whether each is its document's last
Document = Iterable[str] | Conversation  # a text in pieces, or a row that is a conversation
Write = Callable[[Conversation], Written]  # DataError for a conversation that can't be written down


@dataclass(frozen=True)
class DataSpec:
    """DATA, parsed: the names or paths to train and to validate on, and how to read them."""

    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # how often each of `train` is seen in an epoch; (): once
    field: str = "text"
    encoding: str | None = None
    separator: str | None = None  # "line", "blank-line", "file" or a text; None: a known marker
    bad_rows: str = "refuse"  # or "skip": however many they are


@dataclass(frozen=True)
class BadRow:
    """A row that has no text: where it is, why it is bad, and how many lines it takes."""

    where: str
    why: str
    lines: int = 1
    fields: tuple[str, ...] = ()  # those that hold a text, if the one asked for is missing


Row = str | Conversation | BadRow


@dataclass(frozen=True)
class Part:
    """A file to read, or a split of a dataset if path is None."""

    name: str
    path: Path | None
    dataset: str = ""
    configuration: str | None = None
    split: str = "train"
    weight: float = 1.0  # how often its documents are seen in an epoch


@dataclass
class ReadingReport:
    """What was read and what was not; updated while documents are read."""

    files: list[dict[str, Any]] = field(default_factory=list)  # name, bytes, sha256, documents
    passed_over: list[dict[str, str]] = field(default_factory=list)  # name, reason
    notes: list[Words] = field(default_factory=list)  # on encodings and the like
    notices: list[Words] = field(default_factory=list)  # to print in every run
    stand_in: bool | None = None  # whether to read a corpus's stand-in; None: if it is needed
    stood_in: bool = False  # whether one was read
    documents: int = 0  # conversations among them
    unanswered: int = 0  # rows of conversations in which the assistant says nothing
    empty_documents: int = 0
    characters: int = 0
    copied: float = 0.0  # share of the text that came before in the same document
    bytes_read: int = 0

    def note(self, name: str, en: str, zh: str) -> None:
        """Keep a remark on how a file was read, once."""
        line = Words(f"{name}: {en}", f"{name}：{zh}")
        if line not in self.notes:
            self.notes.append(line)


def read_documents(parts: Iterable[Part], spec: DataSpec, report: ReadingReport) -> Documents:
    """Stream all documents in pieces; memory stays bounded.

    A text file is one document if no separator divides it; each line of .jsonl, element of .json,
    and row of .csv, .tsv or .parquet is one. A conversation is one of what its messages say. Blank
    documents are counted and left out, and so are bad rows, with a note. Raises DataError that
    names file and line, also for too many bad rows.
    """
    for document in each_document(parts, spec, report):
        yield from pieces_of(document, report)


def pieces_of(document: Document, report: ReadingReport) -> Documents:
    """A document's pieces, counted, the last one marked; nothing if it is blank."""
    if not isinstance(document, Conversation):
        return _count(document, report)
    contents = [message.content for message in document.messages]
    report.documents += 1
    report.characters += sum(map(len, contents))
    return iter([("\n".join(contents), True)])


def each_document(
    parts: Iterable[Part], spec: DataSpec, report: ReadingReport, write: Write | None = None
) -> Iterator[Document]:
    """The documents that read_documents() streams, each to be read before the next one.

    With write, each conversation is written down; one that it refuses is a bad row.
    """
    for part in parts:
        before = report.documents
        entry: dict[str, Any] = {"name": part.name}
        if part.path is None:
            split = _load_splits(part.dataset, part.configuration)[part.split]
            reader = _RowReader(spec.field, part.name, report, write)
            rows = (reader.read(record, f"row {row}") for row, record in enumerate(split, start=1))
            yield from _good_rows(rows, spec, f"{part.name} {part.split}", report)
            name = f"{part.name} ({part.split})"
            entry |= {"name": name, "sha256": dataset_fingerprint(part)}
        else:
            source = _HashedFile(part.path, report)
            yield from _documents_of(source, part, spec, report, write)
            source.read_rest()
            entry |= {"path": str(part.path), "bytes": source.bytes_read}
            entry["sha256"] = source.sha256.hexdigest()
        report.files.append(entry | {"documents": report.documents - before})


def has_conversations(parts: Iterable[Part], spec: DataSpec) -> bool:
    """Whether the first row of any part is a conversation."""
    for part in parts:
        suffixes = [] if part.path is None else [suffix.lower() for suffix in part.path.suffixes]
        if part.path is None or not _ROW_SUFFIXES.isdisjoint(suffixes):
            report = ReadingReport()
            documents = each_document([part], spec, report)
            first = next(documents, None)
            if isinstance(first, Conversation) or report.unanswered:
                return True
    return False


def _count(pieces: Iterable[str], report: ReadingReport) -> Documents:
    """Count a document and yield its pieces, the last one marked; yield nothing if it is blank."""
    held, has_text = "", False
    for piece in pieces:
        if has_text:
            report.characters += len(held)
            yield held, False
            held = ""
        held += piece
        has_text = has_text or bool(piece.strip())
    if has_text:
        report.documents += 1
        report.characters += len(held)
        yield held, True
    else:
        report.empty_documents += 1


def _documents_of(
    source: "_HashedFile", part: Part, spec: DataSpec, report: ReadingReport, write: Write | None
) -> Iterator[Document]:
    """The documents of a file; content and suffix tell the format."""
    suffixes = [suffix.lower() for suffix in source.path.suffixes]
    name = part.name
    start, stream = _ahead(source.chunks, SNIFFED_BYTES, b"")
    packed = bool(suffixes) and suffixes[-1] in _DECOMPRESSORS
    if packed:
        suffix = suffixes.pop()
        if packed := not reads_as_text(start):
            stream = _decompress(stream, suffix, source, name)
            start, stream = _ahead(stream, SNIFFED_BYTES, b"")
        else:
            report.note(name, "read as it is, for it is not compressed", "没有压缩，按原样读取")
    suffix = suffixes[-1] if suffixes else ""
    kind = kind_of(start, suffix)
    if kind in READERS and not packed:  # which need the file itself
        return _divided(READERS[kind](source.path, name), spec, name, report, marked=False)
    if kind == "parquet":
        rows = _parquet_rows(source.path, _RowReader(spec.field, name, report, write))
        return _good_rows(rows, spec, name, report)
    if kind in READERS:
        raise DataError(f"{name} is a {kind} file within a {suffix} one. Unpack that first.")
    if refusal := kind == "binary" and refusal_of(start, name):
        raise DataError(refusal)
    encoding = spec.encoding or (page_encoding(start) if kind == "html" else None)
    text = decode(stream, encoding, name, report, as_set=spec.encoding is not None)
    if kind == "html":
        report.note(name, "read as a web page, without its markup", "按网页读取，去掉标记")
        return _divided(iter([page_text(text)]), spec, name, report, marked=False)
    reader = _RowReader(spec.field, name, report, write)
    if suffix in _JSON_SUFFIXES:
        rows = _json_rows(text, suffix == ".json", reader)
    elif suffix in _DELIMITERS:
        rows = _table_rows(text, _DELIMITERS[suffix], reader)
    else:
        return _divided(text, spec, name, report)
    return _good_rows(rows, spec, name, report)


def _ahead(pieces: Iterator[_Piece], size: int, nothing: _Piece) -> tuple[_Piece, Iterator[_Piece]]:
    """The first pieces, joined to at least `size` if there is as much, and all from the start."""
    held: list[_Piece] = []
    length = 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length >= size:
            break
    start = nothing.join(held)
    return start, itertools.chain([start], pieces)


def _divided(
    pieces: Iterator[str], spec: DataSpec, name: str, report: ReadingReport, *, marked: bool = True
) -> Iterator[Document]:
    """The documents of a text: by the separator that is set, else by a marker that is found."""
    if spec.separator is not None:
        separator = separator_of(spec.separator)
        if separator is None:
            return iter([pieces])
        return divide(pieces, separator)
    if marked:
        start, pieces = _ahead(pieces, LOOKED_AT, "")
        if marker := find_marker(start):
            report.note(
                name,
                f'divided into documents at "{marker.name}" '
                '(DATA = {"path": ..., "separator": "file"} keeps it as text)',
                f"在“{marker.name}”处分成文档"
                '（DATA = {"path": ..., "separator": "file"} 会把它留作文本）',
            )
            return divide(pieces, marker)
        pieces = _watched(pieces, name, report)
    return iter([pieces])


def _watched(pieces: Iterator[str], name: str, report: ReadingReport) -> Iterator[str]:
    """The pieces, with a note if the whole holds a marker that did not divide it."""
    counts, carried = dict.fromkeys(SURE_MARKERS, 0), ""
    for piece in pieces:
        seen = carried + piece
        for marker in counts:
            counts[marker] += seen.count(marker)
        # shorter than a marker, so that none is counted twice
        carried = seen[-min(map(len, counts)) + 1 :]
        yield piece
    for marker, count in counts.items():
        if count:
            report.note(
                name,
                f'"{marker}" is in it {count:,} time{"s" * (count != 1)}, as text '
                f'(DATA = {{"path": ..., "separator": "{marker}"}} divides it there)',
                f"其中有 {count:,} 处“{marker}”，当作文本"
                f'（DATA = {{"path": ..., "separator": "{marker}"}} 会在此处分开）',
            )


def _good_rows(
    rows: Iterable[Row], spec: DataSpec, name: str, report: ReadingReport
) -> Iterator[Document]:
    """The texts and conversations of the rows; bad ones are counted and the first ones named, and
    conversations without an answer are counted.

    Raises DataError if more than _FEW_BAD and _BAD_SHARE of the rows are bad and the DataSpec
    does not say to skip them, or if none is good.
    """
    good, bad, unanswered, named = 0, 0, 0, list[BadRow]()
    for row in rows:
        if isinstance(row, Conversation) and not row.has_answer:
            unanswered += 1
            report.unanswered += 1
            continue
        if not isinstance(row, BadRow):
            good += 1
            yield [row] if isinstance(row, str) else row
            continue
        bad += row.lines
        if len(named) < _NAMED_BAD:
            named.append(row)
        if not good and bad >= _HOPELESS and spec.bad_rows != "skip":
            break
    if unanswered:
        report.note(
            name,
            f"{unanswered:,} row{'s' * (unanswered != 1)} without an answer passed over",
            f"跳过了 {unanswered:,} 行没有回答的对话",
        )
    if not bad:
        return
    good += unanswered
    first = "; ".join(f"{row.where}: {row.why}" for row in named)
    share = bad / (good + bad)
    if spec.bad_rows != "skip" and (not good or (bad > _FEW_BAD and share > _BAD_SHARE)):
        remedy = 'Mend them, or pass them over: DATA = {"path": ..., "bad_rows": "skip"}.'
        if fields := next((row.fields for row in named if row.fields), ()):
            remedy = f'Name one in DATA = {{"path": ..., "field": "{_listed(fields[:1])}"}}, or '
            remedy += 'pass them over: DATA = {"path": ..., "bad_rows": "skip"}.'
        raise DataError(
            f"{name} {first}.\nBad are {bad:,} of {good + bad:,} rows ({share:.1%}; up to "
            f"{_BAD_SHARE:.0%} are passed over).\n{remedy}"
        )
    report.note(
        name,
        f"{bad:,} bad row{'s' * (bad != 1)} passed over ({share:.2%}): {first}",
        f"跳过了 {bad:,} 个坏行（{share:.2%}）：{first}",
    )


class _HashedFile:
    """A file in chunks of READ_BYTES, hashed as they are read."""

    def __init__(self, path: Path, report: ReadingReport) -> None:
        self.path = path
        self.sha256, self.bytes_read = hashlib.sha256(), 0
        self.chunks = self._read(report)

    def _read(self, report: ReadingReport) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                while chunk := file.read(READ_BYTES):
                    self.sha256.update(chunk)
                    self.bytes_read += len(chunk)
                    report.bytes_read += len(chunk)
                    yield chunk
        except OSError as error:
            raise DataError(f"can't read {self.path}: {error.strerror or error}.") from error

    def read_rest(self) -> None:
        """Read and hash the chunks that nobody has read."""
        for _ in self.chunks:
            pass


def file_sha256(path: Path) -> str:
    """The sha256 of a file; DataError if it can't be read."""
    source = _HashedFile(path, ReadingReport())
    source.read_rest()
    return source.sha256.hexdigest()


def _gunzip(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    decoder = zlib.decompressobj(wbits=31)
    for chunk in chunks:
        while chunk:
            yield decoder.decompress(chunk, READ_BYTES)
            chunk = decoder.unconsumed_tail
            # several gzip files in a row are one gzip file, too
            if decoder.eof and (chunk := decoder.unused_data.lstrip(b"\0")):
                decoder = zlib.decompressobj(wbits=31)
    if not decoder.eof:
        raise EOFError


def _unzstd(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise SettingsError(
            f"{name} is compressed with zstd, which needs a library: pip install zstandard"
        ) from None
    try:
        decoder: Any = zstandard.ZstdDecompressor().decompressobj()
        for chunk in chunks:
            for start in range(0, len(chunk), ZSTD_BYTES):
                data = chunk[start : start + ZSTD_BYTES]
                while data:
                    decoder = decoder or zstandard.ZstdDecompressor().decompressobj()
                    yield decoder.decompress(data)
                    data = b""
                    if decoder.eof:
                        data, decoder = decoder.unused_data, None
        if decoder:
            raise EOFError
    except zstandard.ZstdError as error:
        raise zlib.error(str(error)) from None


_DECOMPRESSORS = {".gz": _gunzip, ".zst": _unzstd}


def _decompress(
    chunks: Iterator[bytes], suffix: str, source: _HashedFile, name: str
) -> Iterator[bytes]:
    """Decompress a file; DataError if it is damaged, truncated or a decompression bomb."""
    expanded = 0
    try:
        for chunk in _DECOMPRESSORS[suffix](chunks, name):
            expanded += len(chunk)
            if expanded > BOMB_BYTES and expanded > BOMB_RATIO * source.bytes_read:
                raise DataError(
                    f"{name} expands to more than {BOMB_RATIO} times its size, as no text does.\n"
                    "Decompress it yourself if you trust it, and set DATA to the result."
                )
            if chunk:  # an empty chunk means the end
                yield chunk
    except EOFError:
        raise DataError(
            f"{name} ends in the middle: {source.bytes_read:,} bytes, then nothing.\n"
            "It was cut off when it was copied or downloaded; get it anew."
        ) from None
    except zlib.error as error:
        raise DataError(f"{name} is no intact {suffix} file: {error}.\nGet it anew.") from None


def decode(
    chunks: Iterable[bytes],
    encoding: str | None,
    name: str,
    report: ReadingReport,
    *,
    as_set: bool = True,
) -> Iterator[str]:
    """Decode bytes by their byte-order mark, else by the encoding, else as UTF-8.

    UTF-16 without a mark is known by its NULs. Line ends are kept. as_set tells whether the
    encoding was set. Raises DataError with the offset and line of an invalid byte, or with the
    line of a NUL.
    """
    start, chunks = _ahead(iter(chunks), SNIFFED_BYTES, b"")
    codec, mark, why = codec_of(start, encoding)
    if why is not None:
        why = why if as_set or why != AS_SET else Words("as the file says", "按文件自己所说")
        report.note(name, f"read as {codec}, {why.en}", f"按 {codec} 读取，{why.zh}")
    n_read, lines, saw_crlf, ended_in_cr, only_ascii = 0, 1, False, False, True

    def counted() -> Iterator[bytes]:
        nonlocal n_read
        is_doubted = encoding is not None
        for chunk in chunks:
            unmarked = chunk[mark if not n_read else 0 :]
            n_read += len(chunk)
            if is_doubted and not unmarked.isascii():
                is_doubted = False
                _doubt_encoding(unmarked, codec, name, report)
            yield unmarked

    try:
        for text in codecs.iterdecode(counted(), codec):
            if "\0" in text:
                raise DataError(
                    f"{name} line {lines + text[: text.index(chr(0))].count(chr(10))} holds a NUL, "
                    "as binary files do and texts do not.\nSet DATA to a text, remove its NULs, "
                    'or name its encoding: DATA = {"path": ..., "encoding": "utf-16"}.'
                )
            if not saw_crlf and ("\r\n" in text or (ended_in_cr and text.startswith("\n"))):
                saw_crlf = True
                report.note(name, "lines end in CRLF; kept as they are", "行尾是 CRLF，照原样保留")
            yield text
            only_ascii = only_ascii and text.isascii()
            lines += text.count("\n")
            ended_in_cr = text.endswith("\r")
    except UnicodeDecodeError as error:
        before = n_read - len(error.object) + error.start
        lines += error.object[: error.start].decode(codec, "replace").count("\n")
        remedy = _about_encoding(error, codec, chunks, is_cut=not only_ascii)
        raise DataError(
            f"{name} is not {codec}: byte {before}, in line {lines}, is "
            f"0x{error.object[error.start]:02x}.\n{remedy}"
        ) from None


def _doubt_encoding(chunk: bytes, codec: str, name: str, report: ReadingReport) -> None:
    """Note that a text with these bytes looks like another encoding than the one that is set."""
    first = _NOT_ASCII.search(chunk)
    assert first is not None
    start = chunk.rfind(b"\n", 0, first.start()) + 1
    if likelier := likelier_encoding(chunk[start : start + SAMPLE_BYTES], codec):
        report.note(
            name,
            f'this looks like "{likelier}", and {codec} makes other letters of it; set '
            f'"encoding": "{likelier}" in DATA',
            f"这看起来像“{likelier}”，用 {codec} 会读成别的字；请在 DATA 中设 "
            f'"encoding": "{likelier}"',
        )


def _about_encoding(
    error: UnicodeDecodeError, codec: str, rest: Iterator[bytes], *, is_cut: bool
) -> str:
    """What to do about bytes that are not in an encoding, by trying others on them.

    is_cut tells that an unexpected end can only be one: what comes before it is well encoded.
    """
    bad = error.start
    sample = error.object[error.object.rfind(b"\n", 0, bad) + 1 :]
    named = 'name its encoding: DATA = {"path": ..., "encoding": '
    if is_cut and error.reason == "unexpected end of data":
        return (
            "The file ends within a character, as one that was cut off. Get it anew, or "
            f"{named}...}}."
        )
    likely = likely_encodings((sample + next(rest, b""))[:SAMPLE_BYTES])
    if likely == ["utf-8"]:
        return (
            "Nearly all of it is UTF-8: the file is damaged there, or two were joined. Mend it,\n"
            f"or {named}...}} if it is another."
        )
    if likely := [encoding for encoding in likely if encoding != codec]:
        others = ", ".join(f'"{encoding}"' for encoding in likely[1:3])
        return f'Save it as UTF-8, or {named}"{likely[0]}"}}' + f" (or {others})." * bool(others)
    return (
        f"Save it as UTF-8, or {named}...}}. None of the usual ones\ngives letters of one script: "
        "is it a text at all?"
    )


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a text in pieces, cut at "\\n" only, with their line ends."""
    carried: list[str] = []
    for piece in pieces:
        *complete, rest = piece.split("\n")
        for line in complete:
            yield "".join([*carried, line, "\n"])
            carried = []
        carried.append(rest)
    if last := "".join(carried):
        yield last


def _json_rows(pieces: Iterator[str], is_json: bool, reader: "_RowReader") -> Iterator[Row]:
    """Rows of JSON in any shape: lines, an array, objects in a row, an object with an array.

    is_json tells that the name says one value, not one a line; the content may say otherwise.
    """
    name = reader.name
    start, pieces = _ahead(pieces, _JSON_START, "")
    lead = start.lstrip().removeprefix("\ufeff")
    line = lead.partition("\n")[0].strip()
    is_line = _is_json(line)
    if lead.startswith("[") and (is_json or not is_line or lead.strip() == line):
        values = _json_elements(pieces, name)
    elif lead.startswith("{") and (line == "{" or is_json):
        first = _first_value(lead)
        if first is not None and reader.reads(first):
            values = _json_sequence(pieces, name)
        elif is_line and lead.strip() != line:
            return _jsonl_rows(pieces, reader)
        else:
            values = _nested_elements(pieces, name)
    elif is_json:
        raise DataError(
            f'{name} is no JSON array ("[...]").\n'
            "For one object a line, let its name end in .jsonl."
        )
    else:
        return _jsonl_rows(pieces, reader)
    return (reader.read(value, f"element {number}") for number, value in enumerate(values, start=1))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _first_value(start: str) -> dict[str, Any] | None:
    """The first object of a text, if it is complete."""
    try:
        value, _ = _DECODER.raw_decode(start)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _jsonl_rows(pieces: Iterable[str], reader: "_RowReader") -> Iterator[Row]:
    for number, line in enumerate(_lines(pieces), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            reason = first_line(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"column {error.colno}: {error.msg}"
            yield BadRow(f"line {number}", f"not valid JSON: {reason}")
        else:
            yield reader.read(value, f"line {number}")


def _json_elements(pieces: Iterable[str], name: str) -> Iterator[Any]:
    """The elements of a JSON array, decoded one by one as the text is read."""
    text = _JSONText(pieces, name)
    text.take()  # the "["
    number = yield from text.take_elements()
    if text.peek():
        raise DataError(
            f"{name} goes on after the array's end, {number} elements in.\n{_MEND_JSON}"
        )


def _json_sequence(pieces: Iterable[str], name: str) -> Iterator[Any]:
    """JSON values one after another, each of as many lines as it likes."""
    # the line end tells that a number at the end is complete
    text, number = _JSONText(itertools.chain(pieces, ["\n"]), name), 0
    while text.peek():
        number += 1
        yield text.take_element(number)


def _nested_elements(pieces: Iterable[str], name: str) -> Iterator[Any]:
    """The elements of the first array of objects or texts in an object, such as {"data": [...]}."""
    text = _JSONText(pieces, name)
    text.take()  # the "{"
    keys: list[str] = []
    delimiter = text.take() if text.peek() == "}" else ","
    while delimiter == ",":
        keys.append(str(text.take_element(len(keys) + 1)))
        if text.take() != ":":
            raise text.broken(len(keys))
        if text.peek() == "[":
            text.take()
            if text.peek() in ("{", '"'):
                yield from text.take_elements()
                if text.take() not in (",", "}"):
                    raise text.broken(len(keys))
                return
            for _ in text.take_elements():
                pass
        else:
            text.take_element(len(keys))
        delimiter = text.take()
    raise DataError(
        f"{name} is no JSON array but one object (has: {_listed(keys) or 'nothing'}).\n"
        'Name a field that holds its text in DATA = {"path": ..., "field": ...}, or save an array.'
    )


class _JSONText:
    """JSON in pieces, which are read as they are needed."""

    def __init__(self, pieces: Iterable[str], name: str) -> None:
        self._pieces, self._name = iter(pieces), name
        self._buffer, self._at = "", 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._at = next(_NOT_BLANK.finditer(self._buffer, self._at)).start()
            if self._at < len(self._buffer) or (piece := next(self._pieces, None)) is None:
                return self._buffer[self._at : self._at + 1]
            self._buffer, self._at = piece, 0

    def take(self) -> str:
        """The same, and skip it."""
        letter = self.peek()
        self._at += len(letter)
        return letter

    def take_element(self, number: int) -> Any:
        """Decode the next element and skip it; DataError if it is invalid."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
                if end < len(self._buffer):  # else a number may continue
                    self._at = end
                    return value
            except RecursionError:
                reason = f"{self._name} element {number} is nested too deeply"
                raise DataError(f"{reason}.\n{_MEND_JSON}") from None
            except ValueError as error:  # or a number of thousands of digits
                # the end of the buffer may cut a string or a literal in two
                if not isinstance(error, json.JSONDecodeError) or (
                    error.pos + 16 <= len(self._buffer) and "Unterminated string" not in error.msg
                ):
                    raise self.broken(number) from None
            rest, more = self._buffer[self._at :], [""]
            # as much again, so that a long element is not parsed a thousand times
            while sum(map(len, more)) <= len(rest) and (piece := next(self._pieces, "")):
                more.append(piece)
            if len(more) == 1:
                raise self.broken(number)
            self._buffer, self._at = rest + "".join(more), 0

    def take_elements(self) -> Generator[Any, None, int]:
        """Decode the rest of an array whose "[" was taken; returns the number of its elements."""
        number = 0
        delimiter = self.take() if self.peek() == "]" else ","
        while delimiter == ",":
            number += 1
            yield self.take_element(number)
            delimiter = self.take()
        if delimiter != "]":
            raise self.broken(number + 1)
        return number

    def broken(self, number: int) -> DataError:
        """The error for invalid or truncated JSON in an element."""
        reason = f"{self._name} is not valid JSON: it breaks off or goes wrong in element {number}"
        return DataError(f"{reason}.\n{_MEND_JSON}")


def _table_rows(pieces: Iterator[str], delimiter: str, rows: "_RowReader") -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default is too short for a long article
    start, pieces = _ahead(pieces, _JSON_START, "")
    found = _delimiter_of(start, rows, delimiter)
    if found != delimiter:
        rows.report.note(
            rows.name, f"its columns are divided by {found!r}", f"各列以 {found!r} 分隔"
        )
    reader = csv.reader(_lines(pieces), delimiter=found, strict=True)
    header, columns, before = list[str](), list[int](), 0
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            if not columns:
                raise DataError(f"{rows.name} line {reader.line_num}: {error}.\nMend it.") from None
            # a quote that is never closed takes in the lines after it
            lines = reader.line_num - before
            yield BadRow(f"line {reader.line_num}", f"{error} (write a quote twice)", lines)
            row = []
        if row is None and columns:
            return
        if not columns:
            header = row or []
            columns = rows.columns(header)
        elif row and max(columns) >= len(row):
            why = f"the row has {len(row)} columns, the header {len(header)}"
            yield BadRow(f"line {reader.line_num}", why)
        elif row:
            values = {header[column]: row[column] for column in columns}
            yield rows.read(values, f"line {reader.line_num}")
        before = reader.line_num


def _delimiter_of(start: str, rows: "_RowReader", delimiter: str) -> str:
    """The delimiter with which the header has the fields, else that which gives most columns."""
    headers = {}
    for each in dict.fromkeys((delimiter, ",", ";", "\t", "|")):
        try:
            headers[each] = next(csv.reader(_lines([start]), delimiter=each), [])
        except csv.Error:
            headers[each] = []
        if rows.reads(headers[each]):
            return each
    best = max(headers, key=lambda each: len(headers[each]))
    return best if len(headers[delimiter]) < 2 and "\n" not in "".join(headers[best]) else delimiter


def _parquet_rows(path: Path, reader: "_RowReader") -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SettingsError(f"{reader.name} needs a library: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        columns = [names[column] for column in reader.columns(names)]
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for values in batch.to_pylist():
                row += 1
                yield reader.read(values, f"row {row}")
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{reader.name} is no intact parquet file: {error}.\nGet it anew."
        ) from None


class _RowReader:
    """Reads the rows of one file: texts by the name of their field, or conversations."""

    def __init__(
        self, field_name: str, name: str, report: ReadingReport, write: Write | None
    ) -> None:
        self.field_name, self.name, self.report, self._write = field_name, name, report, write
        self._takes_chat = field_name == DataSpec.field  # a field that is set holds a text
        self._is_chat: bool | None = None  # as the first row that was read

    def reads(self, names: Iterable[str]) -> bool:
        """Whether rows with these fields can be read."""
        names = list(names)
        return _name_in(self.field_name, names) is not None or self._form(names) is not None

    def _form(self, names: Iterable[str]) -> ChatForm | None:
        return form_of(names) if self._takes_chat else None

    def columns(self, names: list[str]) -> list[int]:
        """The columns of a table to read, by its header; DataError if it lacks them."""
        found = _name_in(self.field_name, names)
        if found is not None:
            self._note_name(found, "column")
            return [names.index(found)]
        if (form := self._form(names)) is not None:
            return [names.index(name) for name in form.names]
        raise DataError(
            f'{self.name} has no column "{self.field_name}" (has: {_listed(names) or "nothing"}).\n'
            f'Name one in DATA = {{"path": "{self.name}", "field": "{_listed(names[:1])}"}}.'
        )

    def _note_name(self, found: str, kind: str) -> None:
        if found != self.field_name:
            of = {"column": "列", "field": "字段"}[kind]
            self.report.note(self.name, f'its {kind} "{found}" is read', f"读取其中的{of}“{found}”")

    def read(self, value: Any, where: str) -> Row:
        """The text or the conversation of a decoded row: the row itself, or its fields."""
        name, form = "a list of messages", None
        if isinstance(value, dict):
            found = _name_in(self.field_name, value)
            form = None if found is not None else self._form(value)
            if found is None and form is None:
                return self._without_field(value, where)
            if found is not None:
                self._note_name(found, "field")
                name, value = found, value[found]
        is_list = isinstance(value, list) and len(value) > 0 and is_turn(value[0])
        is_chat = form is not None or is_list
        if self._is_chat not in (None, is_chat):
            kinds = ("conversation", "text") if is_chat else ("text", "conversation")
            return BadRow(where, f"a {kinds[0]}, and the rows before it are {kinds[1]}s")
        if not is_chat:
            row = self._text(value, where)
        else:
            row = self._conversation(value, form or ChatForm(name), where)
        if not isinstance(row, BadRow):
            self._is_chat = is_chat
        return row

    def _without_field(self, value: dict[str, Any], where: str) -> BadRow:
        texts = [(len(text), key) for key, text in value.items() if isinstance(text, str)]
        has = f"(has: {_listed(value) or 'no field at all'})"
        if self._is_chat:
            return BadRow(where, f"no conversation in its fields {has}")
        why = f'no "{self.field_name}" field {has}'
        return BadRow(where, why, fields=(max(texts)[1],) if texts else ())

    def _conversation(self, value: Any, form: ChatForm, where: str) -> Row:
        try:
            if isinstance(value, list):
                found = Conversation(messages_of(value, self.field_name))
            else:
                found = Conversation(form.messages(value))
            if self._write is not None and found.has_answer:
                found = dataclasses.replace(found, written=self._write(found))
        except (ValueError, DataError) as error:
            return BadRow(where, str(error).rstrip("."))
        names = ", ".join(form.names)
        self.report.note(self.name, f"chat rows: {names}", f"对话行：{names}")
        return found

    def _text(self, value: Any, where: str) -> Row:
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            return BadRow(where, f'"{self.field_name}" is {kind}, not text')
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # JSON may escape half of a character, such as "\ud83d"
            self.report.note(
                self.name,
                "half characters (lone surrogates) became U+FFFD",
                "半个字符（孤立代理项）变成了 U+FFFD",
            )
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value


def _name_in(field_name: str, names: Iterable[str]) -> str | None:
    """The name among some that is the field's: exactly, else alone but for case and blanks."""
    names = list(names)
    if field_name in names:
        return field_name
    alike = [name for name in names if name.strip().casefold() == field_name.strip().casefold()]
    return alike[0] if len(alike) == 1 else None


def validation_parts(train: list[Part]) -> list[Part]:
    """The validation splits if train consists of datasets that have them, else nothing."""
    for part in train:
        if part.path or "validation" not in _load_splits(part.dataset, part.configuration):
            return []
    return [dataclasses.replace(part, split="validation") for part in train]


def dataset_fingerprint(part: Part) -> str:
    """The fingerprint by which the library datasets identifies a split's content."""
    return _load_splits(part.dataset, part.configuration)[part.split]._fingerprint


@functools.cache
def _load_splits(dataset: str, configuration: str | None) -> Any:
    """All splits of a dataset, through the optional library datasets.

    Raises SettingsError if the library is missing, DataError if the download fails.
    """
    try:
        import datasets
    except ImportError:
        raise SettingsError(
            f'DATA = "hf:{dataset}" needs a library: pip install -r requirements.txt datasets'
        ) from None
    try:
        splits = datasets.load_dataset(dataset, configuration)
    except Exception as error:  # the library raises anything
        raise DataError(
            f"the dataset {dataset} ({configuration or 'default'}) can't be had: "
            f"{first_line(error)}\n"
            "Without a network, download it elsewhere and set DATA to its files."
        ) from error
    if "train" not in splits:
        raise DataError(f"the dataset {dataset} has no split train (has: {', '.join(splits)}).")
    return splits


def _listed(names: Iterable[str]) -> str:
    """The first names on one line, each cut short: a header may contain anything."""
    return ", ".join(" ".join(name[:200].split())[:40] for name in itertools.islice(names, 8))
