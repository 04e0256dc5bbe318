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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import DataError, SettingsError, first_line

READ_BYTES = 1 << 20
ZSTD_BYTES = 256  # of input per call, each of which may expand thirty-thousandfold
BOMB_BYTES, BOMB_RATIO = 256 << 20, 300  # what expands further is a decompression bomb
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_DECODER = json.JSONDecoder()
_NOT_BLANK = re.compile(r"[^ \t\r\n]|\Z")
_MEND_JSON = "Mend it, or save one object a line in a file whose name ends in .jsonl."
Documents = Iterator[tuple[str, bool]]  # pieces of text; whether each is its document's last


@dataclass(frozen=True)
class DataSpec:
    """DATA, parsed: the names or paths to train and to validate on, and how to read them."""

    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    field: str = "text"
    encoding: str | None = None


@dataclass(frozen=True)
class Part:
    """A file to read, or a split of a dataset if path is None."""

    name: str
    path: Path | None
    dataset: str = ""
    configuration: str | None = None
    split: str = "train"


@dataclass
class ReadingReport:
    """What was read and what was not; updated while documents are read."""

    files: list[dict[str, Any]] = field(default_factory=list)  # name, bytes, sha256, documents
    passed_over: list[dict[str, str]] = field(default_factory=list)  # name, reason
    notes: list[str] = field(default_factory=list)  # on encodings and the like
    notices: list[str] = field(default_factory=list)  # to print in every run
    stand_in: bool | None = None  # whether to read a corpus's stand-in; None: if it is needed
    stood_in: bool = False  # whether one was read
    documents: int = 0
    empty_documents: int = 0
    characters: int = 0
    bytes_read: int = 0

    def note(self, line: str) -> None:
        """Keep a remark on how a file was read, once."""
        if line not in self.notes:
            self.notes.append(line)


def read_documents(parts: Iterable[Part], spec: DataSpec, report: ReadingReport) -> Documents:
    """Stream all documents in pieces; memory stays bounded.

    A text file is one document, and so is each line of .jsonl, element of .json, and row of .csv,
    .tsv or .parquet. Blank documents are counted and left out. Raises DataError that names file
    and line.
    """
    for part in parts:
        before = report.documents
        entry: dict[str, Any] = {"name": part.name}
        if part.path is None:
            rows = enumerate(_load_splits(part.dataset, part.configuration)[part.split], start=1)
            for row, record in rows:
                where = f"{part.name} {part.split} row {row}"
                yield from _count([_field_of(record, spec.field, where, report)], report)
            name = f"{part.name} ({part.split})"
            entry |= {"name": name, "sha256": dataset_fingerprint(part)}
        else:
            source = _HashedFile(part.path, report)
            for pieces in _documents_of(source, part, spec, report):
                yield from _count(pieces, report)
            source.read_rest()
            entry |= {"path": str(part.path), "bytes": source.bytes_read}
            entry["sha256"] = source.sha256.hexdigest()
        report.files.append(entry | {"documents": report.documents - before})


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
    source: "_HashedFile", part: Part, spec: DataSpec, report: ReadingReport
) -> Iterator[Iterable[str]]:
    """The documents of a file, each as pieces of text; the suffix tells the format."""
    suffixes = [suffix.lower() for suffix in source.path.suffixes]
    name = part.name
    stream: Iterator[bytes] = source.chunks
    if suffixes and suffixes[-1] in _DECOMPRESSORS:
        stream = _decompress(stream, suffixes.pop(), source, name)
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        return ([text] for text in _parquet_rows(source.path, spec.field, name, report))
    stream = _refuse_impostors(stream, name)
    text = decode(stream, spec.encoding, name, report)
    if kind in (".jsonl", ".ndjson"):
        return ([row] for row in _jsonl_rows(text, spec.field, name, report))
    if kind == ".json":
        return ([row] for row in _json_elements(text, spec.field, name, report))
    if kind in _DELIMITERS:
        return ([row] for row in _table_rows(text, spec.field, name, _DELIMITERS[kind]))
    return iter([text])


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


def _refuse_impostors(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Raise DataError for a git-lfs pointer, a web page or an archive in place of the text."""
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
    """Decode bytes by their byte-order mark, else by the encoding, else as UTF-8.

    Line ends are kept. Raises DataError with the offset and line of an invalid byte.
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
    n_read, lines, saw_crlf, ended_in_cr = mark, 1, False, False

    def counted() -> Iterator[bytes]:
        nonlocal n_read
        for chunk in itertools.chain([start[mark:]], chunks):
            n_read += len(chunk)
            yield chunk

    try:
        for text in codecs.iterdecode(counted(), codec):
            if not saw_crlf and ("\r\n" in text or (ended_in_cr and text.startswith("\n"))):
                saw_crlf = True
                report.note(f"{name}: lines end in CRLF; kept as they are")
            yield text
            lines += text.count("\n")
            ended_in_cr = text.endswith("\r")
    except UnicodeDecodeError as error:
        before = n_read - len(error.object) + error.start
        lines += error.object[: error.start].decode(codec, "replace").count("\n")
        raise DataError(
            f"{name} is not {codec}: byte {before}, in line {lines}, is "
            f"0x{error.object[error.start]:02x}.\n"
            'Save it as UTF-8, or name its encoding: DATA = {"path": ..., "encoding": '
            '"gb18030"} (or "latin-1", ...).'
        ) from None


def _codec_of(start: bytes, encoding: str | None) -> tuple[str, int]:
    """The codec of a text with this start, and the length of its byte-order mark."""
    for mark, codec in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is its prefix
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if start.startswith(mark):
            return codec, len(mark)
    return encoding or "utf-8", 0


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
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"column {error.colno}: {error.msg}"
            raise DataError(
                f"{where} is not valid JSON: {reason}.\nA .jsonl file has one object a line."
            ) from None
        yield _field_of(value, field_name, where, report)


def _json_elements(
    pieces: Iterable[str], field_name: str, name: str, report: ReadingReport
) -> Iterator[str]:
    """The elements of a JSON array, decoded one by one as the text is read."""
    text, number = _JSONText(pieces, name), 0
    if text.take() != "[":
        raise DataError(
            f'{name} is no JSON array ("[...]").\n'
            "For one object a line, let its name end in .jsonl."
        )
    delimiter = text.take() if text.peek() == "]" else ","
    while delimiter == ",":
        number += 1
        value = text.take_element(number)
        yield _field_of(value, field_name, f"{name} element {number}", report)
        delimiter = text.take()
    if delimiter != "]":
        raise text.broken(number + 1)
    if text.peek():
        raise DataError(f"{name} goes on after the array's end.\n{_MEND_JSON}")


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

    def broken(self, number: int) -> DataError:
        """The error for invalid or truncated JSON in an element."""
        reason = f"{self._name} is not valid JSON: it breaks off or goes wrong in element {number}"
        return DataError(f"{reason}.\n{_MEND_JSON}")


def _table_rows(pieces: Iterable[str], field_name: str, name: str, delimiter: str) -> Iterator[str]:
    csv.field_size_limit(2**31 - 1)  # the default is too short for a long article
    reader = csv.reader(_lines(pieces), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        column = _column_of(field_name, header, name)
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


def _parquet_rows(path: Path, field_name: str, name: str, report: ReadingReport) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise SettingsError(f"{name} needs a library: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        _column_of(field_name, table.schema_arrow.names, name)
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[field_name]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield _field_of({field_name: value}, field_name, f"{name} row {row}", report)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} is no intact parquet file: {error}.\nGet it anew.") from None


def _column_of(field_name: str, names: list[str], name: str) -> int:
    if field_name not in names:
        raise DataError(
            f'{name} has no column "{field_name}" (has: {_listed(names) or "nothing"}).\n'
            f'Name one in DATA = {{"path": "{name}", "field": "{_listed(names[:1])}"}}.'
        )
    return names.index(field_name)


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


def _field_of(value: Any, field_name: str, where: str, report: ReadingReport) -> str:
    """The text of a decoded row: the row itself, or its field if it is an object."""
    if isinstance(value, dict):
        if field_name not in value:
            raise DataError(
                f'{where}: no "{field_name}" field (has: {_listed(value) or "no field at all"}).\n'
                'Name one in DATA = {"path": ..., "field": ...}.'
            )
        value = value[field_name]
    if not isinstance(value, str):
        raise DataError(
            f'{where}: "{field_name}" is {type(value).__name__}, not text.\n'
            'Name another in DATA = {"path": ..., "field": ...}, or mend the row.'
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON may escape half of a character, such as "\ud83d"
        report.note(f"{where.rsplit(' ', 2)[0]}: half characters (lone surrogates) became U+FFFD")
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _listed(names: Iterable[str]) -> str:
    """The first names on one line, each cut short: a header may contain anything."""
    return ", ".join(" ".join(name[:200].split())[:40] for name in itertools.islice(names, 8))
