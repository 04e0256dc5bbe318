"""Whatever DATA names becomes documents: read exactly, or refused with place and remedy."""

import csv
import gzip
import hashlib
import io
import json
import os
import socket
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import DataError, PipelineError, SettingsError
from text import documents as reader
from text.corpora import CORPORA
from text.documents import DataSpec, ReadingReport, read_documents
from text.sources import find_parts, parse_data

POEMS = ["Once upon a time.\n", "从前，𠮷野家。", 'He said "no",\nand left.\t']


def documents(data, report: ReadingReport | None = None) -> list[str]:
    """All documents of DATA, put together again."""
    spec = parse_data(data)
    report = ReadingReport() if report is None else report
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
    return whole


def refusal(data, kind: type[PipelineError] = DataError, within_s: float = 5.0) -> str:
    """What is said of DATA that can't be read, which must not take long."""
    said = []

    def read():
        try:
            said.append(documents(data))
        except Exception as error:
            said.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(within_s)
    assert said, f"{data!r} was not refused in time"
    assert isinstance(said[0], kind), repr(said[0])
    assert len(str(said[0]).splitlines()) <= 4
    return str(said[0])


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
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerows([["id", "text"], *enumerate(texts)])
    return file.getvalue().encode()


def json_lines(values: list) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


FORMATS = {
    ".jsonl": json_lines([{"id": 1, "text": text} for text in POEMS]),
    ".ndjson": json_lines(POEMS),
    ".json": json.dumps([{"text": POEMS[0]}, *POEMS[1:]], indent=1).encode(),
    ".csv": table(POEMS, ","),
    ".tsv": table(POEMS, "\t"),
}
COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


# ------------------------------------------------------------------------------- DATA's forms


@pytest.mark.parametrize(
    ("data", "spec"),
    [
        ("sample-en", DataSpec(("sample-en",))),
        (Path("a.txt"), DataSpec(("a.txt",))),
        (["a.txt", Path("b")], DataSpec(("a.txt", "b"))),
        (("a.txt",), DataSpec(("a.txt",))),
        ({"path": "a.csv", "field": "body"}, DataSpec(("a.csv",), field="body")),
        ({"path": ["a", "b"], "val": "c"}, DataSpec(("a", "b"), ("c",))),
        ({"path": "a", "encoding": "gb18030"}, DataSpec(("a",), encoding="gb18030")),
    ],
    ids=str,
)
def test_forms_of_data_come_to_one(data, spec):
    assert parse_data(data) == spec


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (None, "DATA is None"),
        (7, "DATA is 7"),
        ("", "DATA is empty"),
        (["a.txt", " "], "DATA is empty"),
        ([], "DATA is []"),
        (["a.txt", 7], "DATA is ['a.txt', 7]"),
        ({}, 'without "path"'),
        ({"path": []}, 'DATA["path"] is []'),
        ({"path": "a", "val": None}, 'DATA["val"] is None'),
        ({"path": "a", "feild": "body"}, 'did you mean "field"?'),
        ({"path": "a", "split": "test"}, "known are: encoding, field, path, val"),
        ({"path": "a", "encoding": None}, 'DATA["encoding"] is None'),
        ({"path": "a", "field": 3}, 'DATA["field"] is 3'),
        ({"path": "a", "field": ""}, "DATA[\"field\"] is ''"),
        ({"path": "a", "encoding": "utf8mb4"}, "'utf8mb4', which Python does not know"),
        ({"path": "a", "encoding": "base64"}, "'base64', which Python does not know"),
        ({"path": "a", "encoding": "utf\0"}, "which Python does not know"),
    ],
    ids=repr,
)
def test_data_that_can_not_be_meant_is_a_settings_error(data, told):
    with pytest.raises(SettingsError) as caught:
        parse_data(data)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# ------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("compressed", COMPRESSORS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_each_row_of_a_file_is_a_document(workdir, suffix, compressed):
    Path(f"poems{suffix}{compressed}").write_bytes(COMPRESSORS[compressed](FORMATS[suffix]))
    assert documents(f"poems{suffix}{compressed}") == POEMS


@pytest.mark.parametrize("compressed", COMPRESSORS)
@pytest.mark.parametrize("suffix", [".txt", ".md", "", ".TXT"])
def test_text_file_is_one_document(workdir, suffix, compressed):
    text = "one\r\ntwo\rthree\n\n" + "从前" * 100_000
    Path(f"poems{suffix}{compressed}").write_bytes(COMPRESSORS[compressed](text.encode()))
    assert documents(f"poems{suffix}{compressed}") == [text]


def test_rows_of_a_parquet_file_are_documents(workdir):
    Path("poems.parquet").write_bytes(parquet(POEMS * 700))
    report = ReadingReport()
    assert documents("poems.parquet", report) == POEMS * 700
    content = Path("poems.parquet").read_bytes()
    assert report.files[0]["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("compressed", COMPRESSORS)
def test_text_that_hardly_compresses_is_read_to_its_end(workdir, compressed):
    import random

    letters = random.Random(5).choices([chr(code) for code in range(0x4E00, 0x9FFF)], k=300_000)
    text = "".join(letters)
    Path(f"x.txt{compressed}").write_bytes(COMPRESSORS[compressed](text.encode()))
    assert documents(f"x.txt{compressed}") == [text]


@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("compressed", [".gz", ".zst"])
def test_compressed_files_joined_end_to_end_are_one(workdir, monkeypatch, compressed, read_bytes):
    monkeypatch.setattr(reader, "READ_BYTES", read_bytes)
    pack = COMPRESSORS[compressed]
    Path(f"x.txt{compressed}").write_bytes(pack("从前".encode()) + pack(b"") + pack(b" end"))
    assert documents(f"x.txt{compressed}") == ["从前 end"]


def test_gzip_file_may_be_padded_with_zeros(workdir):
    Path("x.txt.gz").write_bytes(gzip.compress(b"one") + bytes(512))
    assert documents("x.txt.gz") == ["one"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", json_lines([{"text": "no", "body": text} for text in POEMS])),
        ("x.json", json.dumps([{"text": "no", "body": text} for text in POEMS]).encode()),
        ("x.csv", table(POEMS, ",").replace(b"text", b"body")),
    ],
)
def test_field_is_the_one_that_is_named(workdir, name, content):
    Path(name).write_bytes(content)
    assert documents({"path": name, "field": "body"}) == POEMS


def test_column_of_a_parquet_file_is_the_one_that_is_named(workdir):
    Path("x.parquet").write_bytes(parquet(POEMS, "body"))
    assert documents({"path": "x.parquet", "field": "body"}) == POEMS
    assert 'no column "text" (has: id, body)' in refusal("x.parquet")


def test_documents_without_text_are_counted_and_left_out(workdir):
    Path("x.jsonl").write_bytes(json_lines(["", "one", " \n\t", {"text": ""}, "two"]) + b"\n\n")
    report = ReadingReport()
    assert documents("x.jsonl", report) == ["one", "two"]
    assert (report.documents, report.empty_documents) == (2, 3)


@pytest.mark.parametrize("content", [b"", b" \r\n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_text_without_a_word_is_an_empty_document(workdir, content):
    Path("x.txt").write_bytes(content)
    report = ReadingReport()
    assert documents("x.txt", report) == []
    assert report.empty_documents == 1


def test_white_space_around_a_text_is_kept(workdir, monkeypatch):
    monkeypatch.setattr(reader, "READ_BYTES", 4)
    Path("x.txt").write_bytes(b"\n" * 50 + b"one" + b" " * 50)
    assert documents("x.txt") == ["\n" * 50 + "one" + " " * 50]


def test_report_has_names_sizes_and_hashes(workdir):
    Path("texts").mkdir()
    contents = {
        "a.jsonl": FORMATS[".jsonl"],
        "b.txt.gz": gzip.compress(b"one") + bytes(9),
        "c.json": b'["one"]  \n',
    }
    for name, content in contents.items():
        Path("texts", name).write_bytes(content)
    report = ReadingReport()
    documents("texts", report)
    assert report.files == [
        {
            "name": name,
            "path": str(Path("texts", name)),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "documents": {"a.jsonl": 3}.get(name, 1),
        }
        for name, content in contents.items()
    ]
    assert report.bytes_read == sum(map(len, contents.values()))
    assert reader.file_sha256(Path("texts/a.jsonl")) == report.files[0]["sha256"]


# -------------------------------------------------------------------------- folders and patterns


@pytest.fixture
def library(workdir) -> Path:
    """A folder with texts, named by their contents, and with what is no text."""
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/deep/d.jsonl", ".git/e.txt", ".hidden.txt"):
        path = Path("library", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json_lines([name]) if name.endswith("jsonl") else name.encode())
    Path("library/picture.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00")
    Path("library/F.TXT.GZ").write_bytes(gzip.compress(b"F.TXT.GZ", mtime=0))
    Path("library/wide.txt").write_bytes("wide.txt".encode("utf-16"))
    return Path("library")


def passed_over(report: ReadingReport) -> dict[str, str]:
    return {Path(entry["name"]).name: entry["reason"] for entry in report.passed_over}


def test_folder_is_read_in_order_and_what_is_no_text_is_told(library):
    report = ReadingReport()
    names = ["F.TXT.GZ", "a.md", "b.txt", "wide.txt", "sub/c.txt", "sub/deep/d.jsonl"]
    assert documents("library", report) == names
    assert [entry["name"] for entry in report.files] == [str(Path(name)) for name in names]
    assert passed_over(report) == {
        ".git": "hidden",
        ".hidden.txt": "hidden",
        "picture.jpg": "binary",
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_links_and_pipes_of_a_folder_are_passed_over_and_told(library):
    os.mkfifo("library/pipe")
    Path("library/sub/loop").symlink_to("..")
    Path("library/nowhere.txt").symlink_to("missing.txt")
    report = ReadingReport()
    assert len(documents("library", report)) == 6
    assert passed_over(report)["pipe"] == "no regular file"
    assert passed_over(report)["nowhere.txt"] == "no regular file"
    assert passed_over(report)["loop"] == "link to a folder"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("library/*.txt", ["b.txt", "wide.txt"]),
        ("library/**/*.txt", ["b.txt", "sub/c.txt", "wide.txt"]),
        ("library/**/**/[cd]*", ["sub/c.txt", "sub/deep/d.jsonl"]),
        ("library/?.md", ["a.md"]),
        ("library/sub/**", ["sub/c.txt", "sub/deep/d.jsonl"]),
        ("library/**b.txt", ["b.txt"]),
        ("library/.git/*", [".git/e.txt"]),
        ("library/*/*.txt", ["sub/c.txt"]),
    ],
)
def test_pattern_is_read_in_order_and_each_file_once(library, pattern, names):
    Path("library/sub/deep/loop").symlink_to(Path("..", ".."))
    assert documents(pattern) == names
    assert documents(str(library.absolute().parent / pattern)) == names


def test_hidden_files_of_a_pattern_are_passed_over_and_told(library):
    report = ReadingReport()
    assert documents("library/**/*", report)[0] == "F.TXT.GZ"
    assert passed_over(report) == {
        ".git": "hidden",
        ".hidden.txt": "hidden",
        "picture.jpg": "binary",
    }


def test_file_whose_name_has_brackets_is_no_pattern(workdir):
    Path("poems [1].txt").write_text("one")
    assert documents("poems [1].txt") == ["one"]


def test_list_is_read_in_the_order_given(library):
    names = ["library/sub", "library/b.txt", "library/*.md"]
    assert documents(names) == ["sub/c.txt", "sub/deep/d.jsonl", "b.txt", "a.md"]


def test_folder_without_a_text_is_refused_with_what_was_passed_over(workdir):
    Path("pictures").mkdir()
    assert refusal("pictures") == "pictures holds no text: there is no file in it."
    for number in range(5):
        Path("pictures", f"{number}.jpg").write_bytes(b"\0")
    message = refusal("pictures")
    assert "0.jpg (binary)" in message and message.endswith("and 2 more.")
    assert "*.txt holds no text" in refusal("pictures/*.txt")


def test_folder_that_can_not_be_listed_is_refused(library, monkeypatch):
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"can't read {library / 'sub'}: Permission denied" in refusal("library")


def test_file_of_a_folder_that_can_not_be_opened_is_refused(library, monkeypatch):
    opened = Path.open

    def open_(path, *arguments, **keywords):
        if path.name == "c.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", open_)
    assert f"can't read {library / 'sub' / 'c.txt'}: Permission denied" in refusal("library")


# --------------------------------------------------------------------------- names and odd files


def test_missing_file_is_refused_with_where_it_was_looked_for(workdir):
    message = refusal("poems.txt")
    assert "there is no file poems.txt" in message
    assert str(workdir) in message
    assert all(name in message for name in CORPORA)


@pytest.mark.parametrize("name", ["C:\new", "C:\\\texts", "x\ty/z.txt"])
def test_missing_file_whose_name_holds_signs_of_python_is_refused_with_how_to_write_it(name):
    said = refusal(name)
    assert repr(name) in said and r'write "C:/texts" or r"C:\texts"' in said


def test_missing_windows_path_is_no_corpus_name(workdir):
    assert "DATA takes a path" in refusal(r"C:\texts")


@pytest.mark.parametrize("name", ["the-verdct", "The-Verdict", "the-verdict2"])
def test_mistyped_name_is_refused_with_the_nearest(workdir, name):
    assert 'did you mean "the-verdict"?' in refusal(name)


def test_name_like_no_other_is_refused_with_all(workdir):
    message = refusal("epoch")  # near "epochs", which is a setting and no text
    assert "did you mean" not in message
    assert all(name in message for name in CORPORA)


def test_path_may_be_relative_absolute_or_from_home(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.setenv("USERPROFILE", str(workdir))
    (workdir / "春 1.txt").write_text("one", encoding="utf-8")
    for path in ("春 1.txt", str(workdir / "春 1.txt"), "~/春 1.txt"):
        assert documents(path) == ["one"]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x.txt", "x.txt/y.txt"])
def test_path_that_leads_nowhere_is_refused_as_missing(workdir, name):
    Path("x.txt").write_text("one")
    assert "there is no file" in refusal(name)


@pytest.mark.parametrize("data", ["a\0b.txt", "x" * 5000], ids=["NUL", "too long"])
def test_path_that_no_file_can_have_is_refused(workdir, data):
    assert "can't read " in refusal(data)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_is_refused_without_waiting_for_a_writer(workdir):
    os.mkfifo("pipe")
    assert refusal("pipe").startswith("pipe is no regular file.\n")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no /dev/zero here")
def test_device_is_refused_without_being_read(workdir):
    assert refusal("/dev/zero").startswith("/dev/zero is no regular file.\n")


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no sockets with names here")
def test_socket_is_refused(workdir):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        assert refusal("socket").startswith("socket is no regular file.\n")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "x.txt",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "a git-lfs pointer, not the file itself. Run: git lfs pull",
        ),
        ("x.txt", b"\n <!DOCTYPE html><title>Log in</title>", "a web page, not the text"),
        ("x.jsonl", b"\xef\xbb\xbf<HTML><body>", "a web page, not the text"),
        ("x.txt.gz", gzip.compress(b"<html>", mtime=0), "a web page, not the text"),
        ("x.csv", b"PK\x03\x04\x14\x00", "a zip archive. Unpack it"),
        (
            "x.txt",
            gzip.compress(b"one", mtime=0),
            "compressed with gzip. Give it a name that ends in .gz",
        ),
        ("x.txt", b"\x28\xb5\x2f\xfd\x00", "compressed with zstd. Give it a name that ends in .z"),
    ],
)
@pytest.mark.parametrize("read_bytes", [1, 1 << 20])
def test_what_is_saved_in_place_of_a_text_is_told(
    workdir, monkeypatch, name, content, told, read_bytes
):
    monkeypatch.setattr(reader, "READ_BYTES", read_bytes)
    Path(name).write_bytes(content)
    assert refusal(name).startswith(f"{name} is {told}")


def test_web_page_is_a_text_where_its_name_says_so(workdir):
    Path("x.html").write_bytes(b"<html>one</html>")
    assert documents("x.html") == ["<html>one</html>"]


# ----------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfone", "one"),
        (b"one\r\ntwo\rthree\n", "one\r\ntwo\rthree\n"),
        (b"a\x00b\x1a\x0c", "a\x00b\x1a\x0c"),
        (b"\xef\xbb\xbf\xef\xbb\xbfone\xef\xbb\xbf", "\ufeffone\ufeff"),
        ("𠮷\u2028春".encode(), "𠮷\u2028春"),
        ("\ufeff春\n𠮷".encode("utf-16-le"), "春\n𠮷"),
        ("\ufeff春\n𠮷".encode("utf-16-be"), "春\n𠮷"),
        ("\ufeff春\n𠮷".encode("utf-32-le"), "春\n𠮷"),
    ],
    ids=["UTF-8 mark", "line ends", "control", "more marks", "chinese", "LE", "BE", "UTF-32"],
)
@pytest.mark.parametrize("read_bytes", [1, 3, 1 << 20])
def test_text_is_read_exactly_but_for_one_byte_order_mark(
    workdir, monkeypatch, content, text, read_bytes
):
    monkeypatch.setattr(reader, "READ_BYTES", read_bytes)
    Path("x.txt").write_bytes(content)
    assert documents("x.txt") == [text]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("gb18030", "春江潮水𠮷\n"), ("big5", "春江潮水"), ("latin-1", "né à"), ("utf-16-be", "春")],
)
def test_other_encodings_are_read_where_they_are_named(workdir, monkeypatch, encoding, text):
    monkeypatch.setattr(reader, "READ_BYTES", 3)
    Path("x.txt").write_bytes(text.encode(encoding))
    report = ReadingReport()
    assert documents({"path": "x.txt", "encoding": encoding}, report) == [text]
    assert report.notes == [f"x.txt: read as {encoding}, as set"]


@pytest.mark.parametrize("read_bytes", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "encoding", "place"),
    [
        (b"\xff", None, "UTF-8: byte 0, in line 1, is 0xff"),
        (b"one\ntwo\xe9\n", None, "UTF-8: byte 7, in line 2, is 0xe9"),
        (b"one\r\ntwo\r\n\x80", None, "UTF-8: byte 10, in line 3, is 0x80"),
        (b"\xef\xbb\xbfone\ntw\xff", None, "UTF-8: byte 9, in line 2, is 0xff"),
        ("春江".encode("gbk"), None, "UTF-8: byte 0, in line 1, is 0xb4"),
        ("x\n春".encode()[:-1], None, "UTF-8: byte 2, in line 2, is 0xe6"),
        (b"\xed\xa0\x80", None, "UTF-8: byte 0, in line 1, is 0xed"),
        ("\n春\n".encode("gb18030") + b"\xff", "gb18030", "GB18030: byte 4, in line 3, is 0xff"),
        (
            "\ufeffĊ\nਊ".encode("utf-16-le") + b"\x00\xdc",
            None,
            "UTF-16-LE: byte 8, in line 2, is 0x00",
        ),
    ],
    ids=ascii,
)
def test_bytes_that_do_not_fit_are_refused_with_offset_and_line(
    workdir, monkeypatch, content, encoding, place, read_bytes
):
    monkeypatch.setattr(reader, "READ_BYTES", read_bytes)
    Path("x.txt").write_bytes(content)
    message = refusal({"path": "x.txt", "encoding": encoding} if encoding else "x.txt")
    assert message.upper().startswith(f"x.txt is not {place}.".upper())
    assert '"encoding"' in message


@pytest.mark.parametrize("read_bytes", [1, 4, 1 << 20])
def test_crlf_is_kept_and_noted_once(workdir, monkeypatch, read_bytes):
    monkeypatch.setattr(reader, "READ_BYTES", read_bytes)
    Path("x.txt").write_bytes(b"one\r\ntwo\r\n")
    report = ReadingReport()
    assert documents("x.txt", report) == ["one\r\ntwo\r\n"]
    assert report.notes == ["x.txt: lines end in CRLF; kept as they are"]


LETTERS = st.text(st.sampled_from("ab \t\r\n\"',春𠮷é\ufeff\u2028\x85"), max_size=30)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(LETTERS, max_size=4), mark=st.booleans(), eol=st.sampled_from(["\n", "\r\n"]))
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_documents_do_not_depend_on_how_much_is_read_at_a_time(workdir, suffix, texts, mark, eol):
    if suffix == ".txt":
        content = eol.join(texts)
        expected = [content]
    elif suffix == ".jsonl":
        content = "".join(json.dumps({"text": t}, ensure_ascii=False) + eol for t in texts)
        expected = texts
    elif suffix == ".json":
        content = json.dumps(texts, ensure_ascii=False, indent=2).replace("\n", eol)
        expected = texts
    else:
        file = io.StringIO()
        rows = csv.writer(
            file,
            delimiter="," if suffix == ".csv" else "\t",
            lineterminator=eol,
            quoting=csv.QUOTE_ALL,
        )
        rows.writerows([["id", "text"], *enumerate(texts)])
        content, expected = file.getvalue(), texts
    content = content.encode()
    if mark or content.startswith(b"\xef\xbb\xbf"):
        content = b"\xef\xbb\xbf" + content
    Path(f"x{suffix}").write_bytes(content)
    for read_bytes in (1, 7, 64, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reader, "READ_BYTES", read_bytes)
            report = ReadingReport()
            assert documents(f"x{suffix}", report) == [t for t in expected if t.strip()]
            assert report.empty_documents == sum(not t.strip() for t in expected)


# ---------------------------------------------------------------------------------- broken rows


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": "on', "not valid JSON: column 13: "),
        (b"poem", "not valid JSON: column 1"),
        (b'{"text": "a"} {}', "not valid JSON: column 15: Extra data"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"body": "a", "id": 1}', 'no "text" field (has: body, id)'),
        (b"{}", 'no "text" field (has: no field at all)'),
        (b'{"a\\nb\\nc\\nd": 1}', 'no "text" field'),
        (b'{"%s": 1}' % (b"x" * 100_000), 'no "text" field'),
        (b'{"text": 7}', '"text" is int, not text'),
        (b'{"text": null}', '"text" is NoneType, not text'),
        (b'{"text": {"text": "a"}}', '"text" is dict, not text'),
        (b'["a"]', '"text" is list, not text'),
    ],
    ids=range(12),
)
def test_broken_line_is_refused_with_its_number(workdir, line, told):
    Path("x.jsonl").write_bytes(b'{"text": "one"}\n\n"two"\n' + line + b'\n"five"\n')
    message = refusal("x.jsonl")
    assert message.startswith("x.jsonl line 4")
    assert told in message
    assert len(message) < 1000
    assert len(message.splitlines()) > 1  # what to do


def test_half_characters_become_replacement_characters_and_are_noted(workdir):
    Path("x.jsonl").write_bytes(b'{"text": "a\\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    report = ReadingReport()
    assert documents("x.jsonl", report) == ["a\ufffd b", "😀"]
    assert report.notes == ["x.jsonl: half characters (lone surrogates) became U+FFFD"]


@pytest.mark.parametrize("read_bytes", [1, 64, 1 << 20])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no JSON array"),
        (b'{"text": "one"}', "no JSON array"),
        (b'"one"', "no JSON array"),
        (b'["one", "two"', "element 2"),
        (b'["one", "tw', "element 2"),
        (b'["one", two]', "element 2"),
        (b'["one", {"text": 1}]', 'element 2: "text" is int, not text'),
        (b'["one", {"body": "a"}]', 'element 2: no "text" field (has: body)'),
        (b'["one", 12]', 'element 2: "text" is int, not text'),
        (b'["one" "two"]', "element 2"),
        (b'["one",, "two"]', "element 2"),
        (b'["one"]\n["two"]', "after the array"),
        (b"[" * 20_000, "element 1"),
    ],
    ids=range(13),
)
def test_json_that_is_no_array_of_texts_is_refused(workdir, monkeypatch, content, told, read_bytes):
    monkeypatch.setattr(reader, "READ_BYTES", read_bytes)
    Path("x.json").write_bytes(content)
    message = refusal("x.json")
    assert message.startswith("x.json ")
    assert told in message


@pytest.mark.parametrize("content", [b"[]", b" [ ] \n", b"\n\n[\n]"])
def test_empty_json_array_has_no_documents(workdir, content):
    Path("x.json").write_bytes(content)
    assert documents("x.json") == []


def test_json_elements_may_be_longer_than_what_is_read_at_a_time(workdir, monkeypatch):
    monkeypatch.setattr(reader, "READ_BYTES", 64)
    texts = ["春" * 5000, "a", "b\n" * 3000]
    Path("x.json").write_text(json.dumps([{"id": [1, {}], "text": t} for t in texts]))
    assert documents("x.json") == texts


def test_broken_json_element_is_found_without_reading_on(workdir):
    Path("x.json").write_bytes(b'["one", oops, ' + b'"word", ' * 4_000_000 + b'"end"]')
    report = ReadingReport()
    with pytest.raises(DataError, match="element 2"):
        documents("x.json", report)
    assert report.bytes_read <= 2 * reader.READ_BYTES


def test_json_array_of_many_elements_takes_time_in_proportion(workdir):
    Path("x.json").write_text(json.dumps(["word " * 16] * 60_000))
    started_at = time.process_time()
    assert len(documents("x.json")) == 60_000
    assert time.process_time() - started_at < 1.0


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.csv", b"id,body\n1,one\n", 'no column "text" (has: id, body)'),
        ("x.csv", b"", 'no column "text" (has: nothing)'),
        ("x.csv", b"%s,1\n" % (b"word " * 50_000), 'no column "text"'),
        ("x.csv", b'"a\nb\nc\nd\ne",1\n', 'no column "text"'),
        ("x.csv", b'id,text\n1,"a\nb"\n2\n', "line 4: the row has 1 columns, the header 2"),
        ("x.csv", b'id,text\n1,"a" b\n', "line 2"),
        ("x.csv", b'id,text\n1,one\n2,"two\n', "line 3"),
        ("x.tsv", b"id,text\n1,one\n", 'no column "text" (has: id,text)'),
    ],
    ids=range(8),
)
def test_broken_table_is_refused_with_its_line(workdir, name, content, told):
    Path(name).write_bytes(content)
    message = refusal(name)
    assert message.startswith(f"{name} ")
    assert told in message
    assert len(message) < 1000
    assert len(message.splitlines()) > 1  # what to do


def test_quoted_newlines_and_blank_rows_of_a_table_are_no_rows(workdir):
    Path("x.csv").write_bytes(b'text,id\r\n"a\r\nb",1\r\n\r\n"c ""d"", e",2\r\nf,3,4')
    assert documents("x.csv") == ["a\r\nb", 'c "d", e', "f"]


@pytest.mark.parametrize(
    ("texts", "told"), [(["one", None], '"text" is NoneType'), ([1, 2], '"text" is int')]
)
def test_parquet_rows_that_are_no_text_are_refused_with_their_number(workdir, texts, told):
    Path("x.parquet").write_bytes(parquet(texts))
    message = refusal("x.parquet")
    assert message.startswith(f"x.parquet row {len([t for t in texts if t == 'one']) + 1}: {told}")


@pytest.mark.parametrize("content", [b"", b"one two three", b"PAR1" * 5, None], ids=str)
def test_damaged_parquet_file_is_refused(workdir, content):
    whole = parquet(POEMS)
    Path("x.parquet").write_bytes(whole[:-9] if content is None else content)
    assert refusal("x.parquet").startswith("x.parquet is no intact parquet file")


# ------------------------------------------------------------------------------ damaged archives


@pytest.mark.parametrize("compressed", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_cut_archive_is_refused_as_cut(workdir, compressed, kept):
    whole = COMPRESSORS[compressed](os.urandom(100_000).hex().encode())
    Path(f"x.txt{compressed}").write_bytes(whole[: int(kept * len(whole))])
    message = refusal(f"x.txt{compressed}")
    assert f"x.txt{compressed} ends in the middle: {int(kept * len(whole)):,} bytes" in message
    assert "get it anew" in message


@pytest.mark.parametrize("compressed", [".gz", ".zst"])
@pytest.mark.parametrize("content", ["text", "flipped"])
def test_archive_that_is_none_is_refused(workdir, compressed, content):
    damaged = b"one two three"
    if content == "flipped":
        whole = bytearray(COMPRESSORS[compressed](os.urandom(3000).hex().encode()))
        whole[2] ^= 0xFF
        damaged = bytes(whole)
    Path(f"x.txt{compressed}").write_bytes(damaged)
    message = refusal(f"x.txt{compressed}")
    assert f"x.txt{compressed} is no intact {compressed} file" in message
    assert "Get it anew." in message


@pytest.mark.parametrize("compressed", [".gz", ".zst"])
def test_decompression_bomb_is_stopped_early(workdir, monkeypatch, compressed):
    monkeypatch.setattr(reader, "BOMB_BYTES", 16 << 20)
    content = bytes((64 if compressed == ".gz" else 256) << 20)
    Path(f"x.txt{compressed}").write_bytes(COMPRESSORS[compressed](content))
    del content
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="expands to more than 300 times its size"):
            documents(f"x.txt{compressed}")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50 << 20


# --------------------------------------------------------------------------------------- memory


def peak_mib(data) -> float:
    """The most memory that Python held while the documents of DATA were read piece by piece."""
    spec, report = parse_data(data), ReadingReport()
    parts = find_parts(spec.train, Path("cache"), report)
    tracemalloc.start()
    try:
        for _ in read_documents(parts, spec, report):
            pass
        return tracemalloc.get_traced_memory()[1] / (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compressed", COMPRESSORS)
def test_long_line_of_a_text_is_never_in_memory_as_a_whole(workdir, compressed):
    content = b"word " * 10_000_000
    pack = COMPRESSORS[compressed]
    # a part that can't be shrunk keeps it from being taken for a bomb
    noise = os.urandom(200_000).hex().encode()
    Path(f"x.txt{compressed}").write_bytes(pack(noise) + pack(content))
    assert peak_mib(f"x.txt{compressed}") < 40


def test_long_line_of_json_takes_a_few_times_its_size(workdir):
    Path("x.jsonl").write_bytes(b'{"text": "' + b"word " * 10_000_000 + b'"}\n')
    assert peak_mib("x.jsonl") < 5 * 50


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_million_empty_lines_take_little_memory(workdir, suffix):
    Path(f"x{suffix}").write_bytes(b"text\n" * (suffix == ".csv") + b"\n" * 1_000_000)
    assert peak_mib(f"x{suffix}") < 32


# ----------------------------------------------------------------------------- optional libraries


@pytest.mark.parametrize(
    ("data", "library", "command"),
    [
        ("x.txt.zst", "zstandard", "pip install zstandard"),
        ("x.parquet", "pyarrow", "pip install pyarrow"),
        ("hf:poems/of-nobody", "datasets", "pip install -r requirements.txt datasets"),
    ],
)
def test_missing_library_is_told_with_how_to_get_it(workdir, monkeypatch, data, library, command):
    monkeypatch.setitem(sys.modules, library, None)
    if not data.startswith("hf:"):
        Path(data).write_bytes(b"one")
    message = refusal(data, SettingsError)
    assert data in message
    assert message.endswith(command)


# ------------------------------------------------------------------------------ Hugging Face


@pytest.fixture
def hub_folder(workdir, monkeypatch) -> Path:
    """A data set in a folder, with a split to train on and one to validate on."""
    pytest.importorskip("datasets", reason="datasets is optional")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workdir / "hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    reader._load_splits.cache_clear()
    folder = workdir / "poems"
    folder.mkdir()
    rows = [{"text": text, "id": i} for i, text in enumerate([*POEMS, ""])]
    (folder / "train.jsonl").write_bytes(json_lines(rows))
    (folder / "validation.jsonl").write_bytes(json_lines([{"text": "held out", "id": 0}]))
    yield folder
    reader._load_splits.cache_clear()


def test_data_set_is_read_with_its_validation_split(hub_folder):
    spec, report = parse_data(f"hf:{hub_folder}"), ReadingReport()
    assert documents(f"hf:{hub_folder}", report) == POEMS
    assert report.empty_documents == 1
    (entry,) = report.files
    assert entry["name"] == f"hf:{hub_folder} (train)"
    train = find_parts(spec.train, Path("cache"), ReadingReport())
    assert entry["sha256"] == reader.dataset_fingerprint(train[0])
    (val,) = reader.validation_parts(train)
    texts = [piece for piece, _ in read_documents([val], spec, ReadingReport())]
    assert texts == ["held out"]
    assert 'train row 1: no "body" field (has: text, id)' in refusal(
        {"path": f"hf:{hub_folder}", "field": "body"}
    )


def test_data_set_beside_a_file_has_no_validation_of_its_own(hub_folder):
    Path("x.txt").write_text("one")
    parts = find_parts([f"hf:{hub_folder}", "x.txt"], Path("cache"), ReadingReport())
    assert reader.validation_parts(parts) == []


def test_data_set_that_is_not_there_is_refused_with_what_to_do(hub_folder):
    message = refusal(f"hf:{hub_folder}-of-nobody")
    assert "can't be had" in message
    assert "download it elsewhere and set DATA to its files" in message
