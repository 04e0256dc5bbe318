"""Files that DATA names, made by tests, and what is read from them or said of them."""

import csv
import io
import json
from pathlib import Path

import pytest

from engine.errors import DataError, PipelineError
from text.documents import ReadingReport, read_documents
from text.sources import find_parts, parse_data


def read(data) -> tuple[list[str], ReadingReport]:
    """All documents of DATA, put together again, and the report on them."""
    spec, report = parse_data(data), ReadingReport()
    whole, pieces = [], []
    for piece, is_last in read_documents(
        find_parts(spec.train, Path("cache"), report), spec, report
    ):
        pieces.append(piece)
        if is_last:
            whole.append("".join(pieces))
            pieces = []
    assert pieces == []
    assert report.documents == len(whole)
    assert report.characters == sum(map(len, whole))
    return whole, report


def documents(data) -> list[str]:
    return read(data)[0]


def refusal(data, kind: type[PipelineError] = DataError) -> str:
    """What is said of DATA that can't be read."""
    with pytest.raises(kind) as caught:
        documents(data)
    assert len(str(caught.value).splitlines()) <= 4
    return str(caught.value)


def save(data, content: bytes) -> str:
    """Write the file that DATA names."""
    name = data if isinstance(data, str) else data["path"]
    Path(name).write_bytes(content)
    return name


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard", reason="zstandard is optional").compress(content)


def parquet(texts: list, column: str = "text") -> bytes:
    """A parquet file with a column of texts and one of numbers."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional")
    writer = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    writer.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), file)
    return file.getvalue()


def table(texts: list[str], delimiter: str) -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])
    return file.getvalue().encode()


def json_lines(values: list) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
