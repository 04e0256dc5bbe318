"""Files to documents: what is read of each, decompressed, decoded and counted."""

import codecs
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import DataError, SettingsError, first_line

READ_BYTES = 1 << 20
ZSTD_BITE = 256
BOMB_BYTES, BOMB_RATIO = (
    256 << 20,
    300,
)  # no text shrinks so much; a decompression bomb does
_GAP = re.compile(r"[ \t\r\n]*")
_MEND_JSON = "Mend it, or save one object a line in a file whose name ends in .jsonl."


@dataclass(frozen=True)
class DataSpec:
    """What DATA asks for: names or paths to train on, others to validate on, and how to read."""

    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    field: str = "text"
    encoding: str | None = None


@dataclass(frozen=True)
class Part:
    """One thing to read: a file, or a split of a data set where path is None."""

    name: str
    path: Path | None
    dataset: str = ""
    configuration: str | None = None
    split: str = "train"


@dataclass
class ReadingReport:
    """What was read and what was not; grows while documents are read."""

    files: list[dict[str, Any]] = field(default_factory=list)  # name, bytes, sha256, documents
    passed_over: list[dict[str, str]] = field(default_factory=list)  # name, reason
    notes: list[str] = field(default_factory=list)  # on encodings and the like
    notices: list[str] = field(default_factory=list)  # what the user must know each time
    stand_in: bool | None = None  # whether a text's stand-in must be read, or must not
    stood_in: bool = False  # one was read
    documents: int = 0
    empty_documents: int = 0
    characters: int = 0
    bytes_read: int = 0

    def note(self, line: str) -> None:
        """Keep a remark on how a file was read, once."""
        if line not in self.notes:
            self.notes.append(line)


def read_documents(
    parts: Iterable[Part], spec: DataSpec, report: ReadingReport
) -> Iterator[tuple[str, bool]]:
    """Stream the text of all documents as (piece, is the document's last); memory stays bounded.

    A text file is one document; a line of .jsonl, an element of .json, a row of .csv, .tsv or
    .parquet each is one. Documents without any text are counted and left out. Raises DataError
    that names file and line.
    """
    for part in parts:
        before = report.documents
        if part.path is None:
            for text in _dataset_rows(part, spec.field):
                yield from _count([text], report)
            entry = {
                "name": f"{part.name} ({part.split})",
                "sha256": dataset_fingerprint(part),
            }
        else:
            source = _HashedFile(part.path, report)
            for pieces in _documents_of(source, part, spec, report):
                yield from _count(pieces, report)
            source.finish()
            entry = {"name": part.name, "path": str(part.path)}
            entry |= {"bytes": source.bytes_read, "sha256": source.sha256.hexdigest()}
        report.files.append(entry | {"documents": report.documents - before})


def _count(pieces: Iterable[str], report: ReadingReport) -> Iterator[tuple[str, bool]]:
    """Pass a document's pieces on, marking the last; nothing of a document without text."""
    held: str | None = None
    has_text = False
    for piece in pieces:
        if not has_text and not (held or "").strip() and not piece.strip():
            held = (held or "") + piece  # white space so far
            continue
        if held is not None:
            report.characters += len(held)
            yield held, False
        held, has_text = piece, True
    if not has_text:
        report.empty_documents += 1
        return
    report.documents += 1
    report.characters += len(held)
    yield held, True


def _documents_of(
    source: "_HashedFile", part: Part, spec: DataSpec, report: ReadingReport
) -> Iterator[Iterable[str]]:
    """The documents of a file, each as pieces of text, by what its name ends in."""
    suffixes = [suffix.lower() for suffix in part.path.suffixes]
    name = part.name
    stream: Iterator[bytes] = source.chunks()
    if suffixes and suffixes[-1] in _DECOMPRESSORS:
        stream = _decompress(stream, suffixes.pop(), source, name)
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        return ([text] for text in _parquet_rows(part.path, source, spec.field, name))
    stream = _refuse_impostors(stream, name)
    text = decode(stream, spec.encoding, name, report)
    if kind in (".jsonl", ".ndjson"):
        return ([row] for row in _jsonl_rows(text, spec.field, name, report))
    if kind == ".json":
        return ([row] for row in _json_elements(text, spec.field, name, report))
    if kind in (".csv", ".tsv"):
        return (
            [row] for row in _table_rows(text, spec.field, name, "," if kind == ".csv" else "\t")
        )
    return iter([text])


class _HashedFile:
    """A file read from start to end in chunks, hashed on the way."""

    def __init__(self, path: Path, report: ReadingReport) -> None:
        self.path = path
        self._report = report
        self.sha256 = hashlib.sha256()
        self.bytes_read = 0
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror or error}.") from error

    def chunks(self) -> Iterator[bytes]:
        """The file's bytes, READ_BYTES at a time."""
        try:
            while chunk := self._file.read(READ_BYTES):
                self.sha256.update(chunk)
                self.bytes_read += len(chunk)
                self._report.bytes_read += len(chunk)
                yield chunk
        except OSError as error:
            raise DataError(f"can't read {self.path}: {error.strerror or error}.") from error

    def finish(self) -> None:
        """Hash what a reader left unread, and close."""
        for _ in self.chunks():
            pass
        self._file.close()


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as a reading report has it."""
    source = _HashedFile(path, ReadingReport())
    source.finish()
    return source.sha256.hexdigest()


def _gunzip(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    decoder = zlib.decompressobj(wbits=31)
    for chunk in chunks:
        while chunk:
            yield from _bounded(decoder, chunk)
            chunk = b""
            if decoder.eof:  # files joined end to end are one file to gzip
                chunk = decoder.unused_data.lstrip(b"\0")
                if chunk:
                    decoder = zlib.decompressobj(wbits=31)
    if not decoder.eof:
        raise EOFError


def _bounded(decoder, chunk: bytes) -> Iterator[bytes]:
    """Decompress a chunk in pieces of READ_BYTES, whatever it expands to."""
    yield decoder.decompress(chunk, READ_BYTES)
    while decoder.unconsumed_tail and not decoder.eof:
        yield decoder.decompress(decoder.unconsumed_tail, READ_BYTES)


def _unzstd(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise SettingsError(
            f"{name} is compressed with zstd, which needs a library: pip install zstandard"
        ) from None
    try:
        decoder = zstandard.ZstdDecompressor().decompressobj()
        for chunk in chunks:
            # small bites: one of them may expand thirty-thousandfold
            for start in range(0, len(chunk), ZSTD_BITE):
                data = chunk[start : start + ZSTD_BITE]
                while data:
                    if decoder is None:
                        decoder = zstandard.ZstdDecompressor().decompressobj()
                    yield decoder.decompress(data)
                    data = decoder.unused_data if decoder.eof else b""
                    if decoder.eof:
                        decoder = None
        if decoder is not None:
            raise EOFError
    except zstandard.ZstdError as error:
        raise zlib.error(str(error)) from None


_DECOMPRESSORS = {".gz": _gunzip, ".zst": _unzstd}


def _decompress(
    chunks: Iterator[bytes], suffix: str, source: _HashedFile, name: str
) -> Iterator[bytes]:
    """Expand a compressed file; a damaged or cut one, or a bomb, raises DataError."""
    expanded = 0
    try:
        for chunk in _DECOMPRESSORS[suffix](chunks, name):
            expanded += len(chunk)
            if expanded > BOMB_BYTES and expanded > BOMB_RATIO * source.bytes_read:
                raise DataError(
                    f"{name} expands to more than {BOMB_RATIO} times its size, as no text does.\n"
                    "Decompress it yourself if you trust it, and set DATA to the result."
                )
            if chunk:  # nothing at all would be taken for the end
                yield chunk
    except EOFError:
        raise DataError(
            f"{name} ends in the middle: {source.bytes_read:,} bytes, then nothing.\n"
            "It was cut off when it was copied or downloaded; get it anew."
        ) from None
    except zlib.error as error:
        raise DataError(f"{name} is no intact {suffix} file: {error}.\nGet it anew.") from None


def _refuse_impostors(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Stop at what is saved in place of a text: a git-lfs pointer, a web page, an archive."""
    held: list[bytes] = []
    while sum(map(len, held)) < 512 and (chunk := next(chunks, b"")):
        held.append(chunk)
    start = b"".join(held)[:512]
    lead = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    what = None
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        what = "a git-lfs pointer, not the file itself. Run: git lfs pull"
    elif lead.startswith((b"<!doctype html", b"<html")) and not name.endswith((".html", ".htm")):
        what = 'a web page, not the text. Download the file itself (the "raw" link)'
    elif start.startswith(b"PK\x03\x04"):
        what = "a zip archive. Unpack it and set DATA to what is inside"
    elif start.startswith(b"\x1f\x8b"):
        what = "compressed with gzip. Give it a name that ends in .gz"
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        what = "compressed with zstd. Give it a name that ends in .zst"
    if what:
        raise DataError(f"{name} is {what}.")
    yield from held
    yield from chunks


def decode(
    chunks: Iterable[bytes], encoding: str | None, name: str, report: ReadingReport
) -> Iterator[str]:
    """Text from bytes: UTF-8 or UTF-16 by their mark, else the encoding given, else UTF-8.

    Line ends stay as they are. Raises DataError with the byte's offset and line where the bytes
    don't fit; nothing is skipped or replaced.
    """
    chunks = iter(chunks)
    start = next(chunks, b"")
    while len(start) < 4 and (more := next(chunks, b"")):
        start += more
    codec, mark = _codec_of(start, encoding)
    if mark:
        report.note(f"{name}: read as {codec}, by its byte-order mark")
    elif encoding:
        report.note(f"{name}: read as {encoding}, as set")
    decoder = codecs.getincrementaldecoder(codec)()
    offset, lines, saw_crlf, ended_in_cr = mark, 1, False, False
    chunk, final = start[mark:], False
    while True:
        pending = decoder.getstate()[0]
        try:
            text = decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            before = offset - len(pending) + error.start
            lines += error.object[: error.start].decode(codec, "replace").count("\n")
            raise DataError(
                f"{name} is not {codec}: byte {before}, in line {lines}, is "
                f"0x{error.object[error.start]:02x}.\n"
                'Save it as UTF-8, or name its encoding: DATA = {"path": ..., "encoding": '
                '"gb18030"} (or "latin-1", ...).'
            ) from None
        if not saw_crlf and ("\r\n" in text or (ended_in_cr and text.startswith("\n"))):
            saw_crlf = True
            report.note(f"{name}: lines end in CRLF; kept as they are")
        yield text
        if final:
            return
        offset += len(chunk)
        lines += text.count("\n")
        ended_in_cr = text.endswith("\r") or (ended_in_cr and not text)
        chunk = next(chunks, b"")
        final = not chunk


def _codec_of(start: bytes, encoding: str | None) -> tuple[str, int]:
    """The codec for a text that begins so, and the length of its byte-order mark."""
    for mark, codec in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if start.startswith(mark):
            return codec, len(mark)
    return encoding or "utf-8", 0


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines of a text in pieces, cut at "\\n" alone, the line end kept."""
    carried: list[str] = []
    for piece in pieces:
        *whole, rest = piece.split("\n")
        for line in whole:
            yield "".join([*carried, line, "\n"])
            carried = []
        carried.append(rest)
    if last := "".join(carried):
        yield last


def _jsonl_rows(
    pieces: Iterable[str], field_name: str, name: str, report: ReadingReport
) -> Iterator[str]:
    for number, line in enumerate(_lines(pieces), start=1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"column {error.colno}: {error.msg}" if hasattr(error, "colno") else error
            raise DataError(
                f"{where} is not valid JSON: {reason}.\nA .jsonl file has one object a line."
            ) from None
        yield _field_of(value, field_name, where, report)


def _json_elements(
    pieces: Iterable[str], field_name: str, name: str, report: ReadingReport
) -> Iterator[str]:
    """The elements of a JSON array, decoded one by one as the text comes in."""
    decoder = json.JSONDecoder()
    pieces = iter(pieces)
    buffer, at, number, wanted = "", 0, 0, 0
    expected = "start"  # then "first", and "comma" and "element" by turns, and "nothing"
    while True:
        at = _GAP.match(buffer, at).end()
        if at < len(buffer):
            letter = buffer[at]
            if expected == "start" and letter != "[":
                break
            if expected == "nothing":
                raise DataError(f"{name} goes on after the array's end.\n{_MEND_JSON}")
            if expected == "comma" and letter not in ",]":
                raise _broken_json(name, number + 1)
            if expected == "start" or (expected == "comma" and letter == ","):
                at, expected = at + 1, "first" if expected == "start" else "element"
                continue
            if letter == "]" and expected != "element":
                at, expected = at + 1, "nothing"
                continue
            if found := _whole_element(decoder, buffer, at, name, number + 1):
                value, at = found
                number, wanted, expected = number + 1, 0, "comma"
                yield _field_of(value, field_name, f"{name} element {number}", report)
                continue
        # each retry reads as much again, so that a long element is not parsed a thousand times
        wanted = max(2 * wanted, len(buffer) - at, 1)
        more = []
        while wanted > sum(map(len, more)) and (piece := next(pieces, None)) is not None:
            more.append(piece)
        if not more and expected == "nothing":
            return
        if not more and expected != "start":
            raise _broken_json(name, number + 1)
        if not more:
            break
        buffer, at = buffer[at:] + "".join(more), 0
    raise DataError(
        f'{name} is no JSON array ("[...]").\nFor one object a line, let its name end in .jsonl.'
    )


def _broken_json(name: str, number: int) -> DataError:
    return DataError(
        f"{name} is not valid JSON: it breaks off or goes wrong in element {number}.\n{_MEND_JSON}"
    )


def _whole_element(
    decoder: json.JSONDecoder, buffer: str, at: int, name: str, number: int
) -> tuple[Any, int] | None:
    """The element that begins at a place and where it ends; None where more must be read first."""
    try:
        value, end = decoder.raw_decode(buffer, at)
    except json.JSONDecodeError as error:
        # the end of what was read may cut a string, or a few letters of a literal, in two
        if error.msg.startswith("Unterminated string") or error.pos + 16 > len(buffer):
            return None
        raise _broken_json(name, number) from None
    except ValueError:  # a number of thousands of digits
        raise _broken_json(name, number) from None
    except RecursionError:
        raise DataError(f"{name} element {number} is nested too deeply.\n{_MEND_JSON}") from None
    return (value, end) if end < len(buffer) else None  # a number at the very end may go on


def _table_rows(pieces: Iterable[str], field_name: str, name: str, delimiter: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)  # the usual limit is a tenth of a long article
    reader = csv.reader(_lines(pieces), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if field_name not in header:
            raise DataError(
                f'{name} has no column "{field_name}" (has: {_listed(header) or "nothing"}).\n'
                f'Name one in DATA = {{"path": "{name}", "field": "{_listed(header[:1])}"}}.'
            )
        column = header.index(field_name)
        for row in reader:
            if row and column >= len(row):
                raise DataError(
                    f"{name} line {reader.line_num}: the row has {len(row)} columns, the header "
                    f"{len(header)}.\nMend the row; a text with a comma or a new line in it goes "
                    'in "quotes".'
                )
            if row:
                yield row[column]
    except csv.Error as error:
        raise DataError(
            f"{name} line {reader.line_num}: {error}.\n"
            'Mend the row; a quote inside a "quoted" text is written twice.'
        ) from None


def _parquet_rows(path: Path, source: _HashedFile, field_name: str, name: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SettingsError(f"{name} needs a library: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if field_name not in names:
            raise DataError(
                f'{name} has no column "{field_name}" (has: {_listed(names) or "nothing"}).\n'
                f'Name one in DATA = {{"path": "{name}", "field": "{_listed(names[:1])}"}}.'
            )
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[field_name]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield _as_text(value, field_name, f"{name} row {row}", None)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} is no intact parquet file: {error}.\nGet it anew.") from None


def _dataset_rows(part: Part, field_name: str) -> Iterator[str]:
    for row, record in enumerate(_load_dataset(part)[part.split], start=1):
        yield _field_of(record, field_name, f"{part.name} {part.split} row {row}", None)


def validation_parts(train: list[Part]) -> list[Part]:
    """The validation splits of data sets that have one; none where anything else is read too."""
    if not all(part.path is None and "validation" in _load_dataset(part) for part in train):
        return []
    return [dataclasses.replace(part, split="validation") for part in train]


def dataset_fingerprint(part: Part) -> str:
    """What the library datasets calls a split's content: it changes with it."""
    return _load_dataset(part)[part.split]._fingerprint


def _load_dataset(part: Part):
    """All splits of a dataset, through the optional library datasets; loaded once.

    Raises SettingsError where the library is missing, DataError where the data can't be had.
    """
    return _load_splits(part.dataset, part.configuration)


@functools.cache
def _load_splits(dataset: str, configuration: str | None):
    try:
        import datasets
    except ImportError:
        raise SettingsError(
            f'DATA = "hf:{dataset}" needs a library: pip install -r requirements.txt datasets'
        ) from None
    try:
        splits = datasets.load_dataset(dataset, configuration)
    except Exception as error:  # whatever the library raises for a missing or unreachable dataset
        raise DataError(
            f"the dataset {dataset} ({configuration or 'default'}) can't be had: "
            f"{first_line(error)}\n"
            "Without a network, download it elsewhere and set DATA to its files."
        ) from error
    if "train" not in splits:
        raise DataError(f"the dataset {dataset} has no split train (has: {', '.join(splits)}).")
    return splits


def _field_of(value: Any, field_name: str, where: str, report: ReadingReport | None) -> str:
    """The text in a decoded JSON value: a string itself, or a field of an object."""
    if isinstance(value, dict):
        if field_name not in value:
            raise DataError(
                f'{where}: no "{field_name}" field (has: {_listed(value) or "no field at all"}).\n'
                'Name one in DATA = {"path": ..., "field": ...}.'
            )
        value = value[field_name]
    return _as_text(value, field_name, where, report)


def _listed(names: Iterable[str]) -> str:
    """The first of some names in a line, each cut short: they may be anything, even whole texts."""
    return ", ".join(" ".join(name[:200].split())[:40] for name in itertools.islice(names, 8))


def _as_text(value: Any, field_name: str, where: str, report: ReadingReport | None) -> str:
    if not isinstance(value, str):
        raise DataError(
            f'{where}: "{field_name}" is {type(value).__name__}, not text.\n'
            'Name another in DATA = {"path": ..., "field": ...}, or mend the row.'
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # "\ud83d" alone: half of a character, written as an escape
        if report is not None:
            report.note(
                f"{where.rsplit(' ', 2)[0]}: half characters (lone surrogates) became U+FFFD"
            )
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value
