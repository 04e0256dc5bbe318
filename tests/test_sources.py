"""Whatever DATA names becomes documents: read exactly, or refused with place and remedy."""

import contextlib
import gzip
import hashlib
import json
import os
import random
import socket
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import DataError, SettingsError
from tests.reading import documents, json_lines, parquet, read, refusal, save, table, zstd
from text import documents as reader
from text.corpora import CORPORA
from text.documents import DataSpec, Part, ReadingReport, read_documents
from text.sources import find_parts, parse_data

POEMS = [
    "Once upon a time.\n",
    "从前，𠮷野家。",
    'He said "no",\nand\r\nleft.\t',
    "\x85\u2028é\ufeff",
]


FORMATS = {
    ".jsonl": json_lines([{"id": 1, "text": text} for text in POEMS]),
    ".ndjson": json_lines(POEMS),
    ".json": json.dumps([{"text": POEMS[0]}, *POEMS[1:]], indent=1).encode(),
    ".csv": table(POEMS, ","),
    ".tsv": table(POEMS, "\t"),
}
COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}
both_archives = pytest.mark.parametrize("compressed", [".gz", ".zst"])
MARK = b"\xef\xbb\xbf"
AMOUNTS = 1, 5, 1 << 20  # of bytes to read at a time


def test_forms_of_data_come_to_one():
    for data, spec in [
        ("sample-en", DataSpec(("sample-en",))),
        (Path("a.txt"), DataSpec(("a.txt",))),
        (["a.txt", Path("b")], DataSpec(("a.txt", "b"))),
        ({"path": "a.csv", "field": "body"}, DataSpec(("a.csv",), field="body")),
        ({"path": ["a", "b"], "val": "c"}, DataSpec(("a", "b"), ("c",))),
        ({"path": "a", "encoding": "gb18030"}, DataSpec(("a",), encoding="gb18030")),
    ]:
        assert parse_data(data) == spec


def test_data_that_can_not_be_meant_is_a_settings_error():
    for data, told in [
        (None, "DATA is None"),
        (["a.txt", " "], "DATA is empty"),
        ([], "DATA is []"),
        (["a.txt", 7], "DATA is ['a.txt', 7]"),
        ({}, 'without "path"'),
        ({"path": "a", "val": None}, 'DATA["val"] is None'),
        ({"path": "a", "feild": "body"}, 'did you mean "field"?'),
        ({"path": "a", "split": "test"}, "known are: bad_rows, encoding, field, path, separ"),
        ({"path": "a", "encoding": None}, 'DATA["encoding"] is None'),
        ({"path": "a", "field": 3}, 'DATA["field"] is 3'),
        ({"path": "a", "field": ""}, "DATA[\"field\"] is ''"),
        ({"path": "a", "encoding": "utf8mb4"}, "'utf8mb4', which Python does not know"),
        ({"path": "a", "encoding": "base64"}, "'base64', which Python does not know"),
        ({"path": "a", "encoding": "utf\0"}, "which Python does not know"),
    ]:
        with pytest.raises(SettingsError) as caught:
            parse_data(data)
        assert told in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("compressed", COMPRESSORS)
def test_each_row_of_a_file_is_a_document_and_a_text_file_is_one(workdir, monkeypatch, compressed):
    compress = COMPRESSORS[compressed]
    # which hardly compresses
    letters = random.Random(5).choices([chr(code) for code in range(0x4E00, 0x9FFF)], k=500)
    text = "one\r\ntwo\rthree\n\n" + "".join(letters)
    for amount in AMOUNTS:
        monkeypatch.setattr(reader, "READ_BYTES", amount)
        for suffix, content in FORMATS.items():
            for mark in (b"", MARK):
                save(f"x{suffix}{compressed}", compress(mark + content))
                assert documents(f"x{suffix}{compressed}") == POEMS
        for suffix in (".txt", ".md", "", ".TXT"):
            assert documents(save(f"x{suffix}{compressed}", compress(text.encode()))) == [text]
        # files joined end to end are one
        save(f"x.txt{compressed}", b"".join(map(compress, (b"one", b"", b" end"))))
        assert documents(f"x.txt{compressed}") == ["one end"]


def test_rows_of_a_parquet_file_are_documents_where_it_is_intact_and_text(workdir):
    whole = parquet(POEMS * 400)
    texts, report = read(save("x.parquet", whole))
    assert texts == POEMS * 400
    assert report.files[0]["sha256"] == hashlib.sha256(whole).hexdigest()
    save("x.parquet", parquet(POEMS, "body"))
    assert documents({"path": "x.parquet", "field": "body"}) == POEMS
    for content, told in [
        (parquet(POEMS, "body"), 'has no column "text" (has: id, body)'),
        (parquet(["one", *[None] * 4]), 'row 2: "text" is null'),
        (parquet([1]), 'row 1: "text" is int'),
        *((broken, "is no intact parquet file") for broken in (b"", b"PAR1" * 5, whole[:-9])),
    ]:
        assert refusal(save("x.parquet", content)).startswith(f"x.parquet {told}")


def test_documents_without_text_are_counted_and_left_out(workdir):
    lines = json_lines(["", "one", " \n\t", {"text": ""}, "two"]) + b"\n\n"
    texts, report = read(save("x.jsonl", lines))
    assert (texts, report.empty_documents) == (["one", "two"], 3)
    for content in (b"", b" \r\n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"):
        texts, report = read(save("x.txt", content))
        assert (texts, report.empty_documents) == ([], 1)


@pytest.fixture
def library(workdir) -> Path:
    """A folder with texts, named by their contents, and with what is no text."""
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/deep/d.jsonl", ".git/e.txt", ".hidden.txt"):
        path = Path("library", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(json_lines([name]) if name.endswith("jsonl") else name.encode())
    save("library/picture.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00")
    save("library/F.TXT.GZ", gzip.compress(b"F.TXT.GZ", mtime=0))
    save("library/wide.txt", "wide.txt".encode("utf-16"))
    return Path("library")


def passed_over(report: ReadingReport) -> dict[str, str]:
    return {Path(entry["name"]).name: entry["reason"] for entry in report.passed_over}


def test_folder_is_read_in_order_and_what_is_no_text_is_told(library):
    no_texts = {".git": "hidden", ".hidden.txt": "hidden", "picture.jpg": "binary"}
    names = ["F.TXT.GZ", "a.md", "b.txt", "wide.txt", "sub/c.txt", "sub/deep/d.jsonl"]
    texts, report = read("library")
    assert (texts, passed_over(report)) == (names, no_texts)
    assert [entry["name"] for entry in report.files] == [str(Path(name)) for name in names]
    texts, report = read("library/**/*")
    assert (texts[0], passed_over(report)) == ("F.TXT.GZ", no_texts)
    if hasattr(os, "mkfifo"):
        os.mkfifo("library/pipe")
        Path("library/sub/loop").symlink_to("..")
        Path("library/nowhere.txt").symlink_to("missing.txt")
        odd = dict.fromkeys(("pipe", "nowhere.txt"), "no regular file")
        texts, report = read("library")
        assert texts == names
        assert passed_over(report) == no_texts | odd | {"loop": "link to a folder"}


def test_pattern_is_read_in_order_and_each_file_once_and_a_list_as_given(library):
    Path("library/sub/deep/loop").symlink_to(Path("..", ".."))
    for pattern, names in [
        ("library/*.txt", ["b.txt", "wide.txt"]),
        ("library/**/*.txt", ["b.txt", "sub/c.txt", "wide.txt"]),
        ("library/**/**/[cd]*", ["sub/c.txt", "sub/deep/d.jsonl"]),
        ("library/?.md", ["a.md"]),
        ("library/sub/**", ["sub/c.txt", "sub/deep/d.jsonl"]),
        ("library/**b.txt", ["b.txt"]),
        ("library/.git/*", [".git/e.txt"]),
        ("library/*/*.txt", ["sub/c.txt"]),
    ]:
        assert documents(pattern) == names
        assert documents(str(library.absolute().parent / pattern)) == names
    save("poems [1].txt", b"one")  # no pattern
    given = ["library/sub", "poems [1].txt", "library/b.txt", "library/*.md"]
    assert documents(given) == ["sub/c.txt", "sub/deep/d.jsonl", "one", "b.txt", "a.md"]


def test_folder_without_a_text_is_refused_with_what_was_passed_over(workdir):
    Path("pictures").mkdir()
    assert refusal("pictures") == "pictures holds no text: there is no file in it."
    for number in range(5):
        save(f"pictures/{number}.jpg", b"\0")
    message = refusal("pictures")
    assert "0.jpg (binary)" in message and message.endswith("and 2 more.")
    assert "*.txt holds no text" in refusal("pictures/*.txt")


@pytest.mark.parametrize(
    ("owner", "call", "path"), [(os, "scandir", "library/sub"), (Path, "open", "library/sub/c.txt")]
)
def test_folder_or_file_of_it_that_may_not_be_read_is_refused(
    library, monkeypatch, owner, call, path
):
    real = getattr(owner, call)

    def denied(opened, *arguments, **keywords):
        if Path(opened) == Path(path):
            raise PermissionError(13, "Permission denied", str(opened))
        return real(opened, *arguments, **keywords)

    monkeypatch.setattr(owner, call, denied)
    assert f"can't read {Path(path)}: Permission denied" in refusal("library")


def test_missing_file_is_refused_with_where_it_was_looked_for_or_the_nearest_name(workdir):
    save("x.txt", b"one")
    for name in ("poems.txt", "~nobody-of-this-name/x.txt", "x.txt/y.txt"):
        message = refusal(name)
        assert f"there is no file {name}" in message
        assert str(workdir) in message
        assert all(name in message for name in CORPORA)
    assert "DATA takes a path" in refusal(r"C:\texts")
    for name in ("C:\new", "C:\\\texts", "x\ty/z.txt"):  # which hold signs of Python
        message = refusal(name)
        assert repr(name) in message and r'write "C:/texts" or r"C:\texts"' in message
    for name in ("a\0b.txt", "x" * 5000):
        assert "can't read " in refusal(name)
    for name in ("the-verdct", "The-Verdict", "the-verdict2"):
        assert 'did you mean "the-verdict"?' in refusal(name)
    message = refusal("epoch")  # near "epochs", which is a setting and no text
    assert "did you mean" not in message
    assert all(name in message for name in CORPORA)


def test_path_may_be_relative_absolute_or_from_home(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.setenv("USERPROFILE", str(workdir))
    save("春 1.txt", b"one")
    for path in ("春 1.txt", str(workdir / "春 1.txt"), "~/春 1.txt"):
        assert documents(path) == ["one"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_regular_file_is_refused_without_being_read(workdir, monkeypatch):
    monkeypatch.setattr(Path, "open", None)  # reading would never end
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name in ("pipe", "/dev/zero", "socket"):
            assert refusal(name).startswith(f"{name} is no regular file.\n")


def in_encoding(encoding: str) -> dict[str, str]:
    return {"path": "x.txt", "encoding": encoding}


def in_body(name: str) -> dict[str, str]:
    return {"path": name, "field": "body"}


def read_as(encoding: str, why: str = "as set") -> list[str]:
    return [f"x.txt: read as {encoding}, {why}"]


BY_MARK = "by its byte-order mark"
CRLF = ["x.txt: lines end in CRLF; kept as they are"]
PACKED = [gzip.compress(text.encode(), mtime=0) for text in ("从前", "", " end")]
READ = [  # DATA, a file's content, its documents and the notes on it
    ("x.txt", MARK + b"one", ["one"], read_as("utf-8", BY_MARK)),
    ("x.txt", b"one\r\ntwo\rthree\r\n", ["one\r\ntwo\rthree\r\n"], CRLF),
    ("x.txt", b"a\x01b\x1a\x0c", ["a\x01b\x1a\x0c"], []),
    ("x.txt", MARK + MARK + b"one" + MARK, ["\ufeffone\ufeff"], read_as("utf-8", BY_MARK)),
    ("x.txt", "𠮷\u2028春".encode(), ["𠮷\u2028春"], []),
    ("x.txt", "\ufeff春\n𠮷".encode("utf-16-le"), ["春\n𠮷"], read_as("utf-16-le", BY_MARK)),
    ("x.txt", "\ufeff春\n𠮷".encode("utf-16-be"), ["春\n𠮷"], read_as("utf-16-be", BY_MARK)),
    ("x.txt", "\ufeff春\n𠮷".encode("utf-32-le"), ["春\n𠮷"], read_as("utf-32-le", BY_MARK)),
    ("x.txt", b"\n" * 50 + b"one" + b" " * 50, ["\n" * 50 + "one" + " " * 50], []),
    (in_encoding("gb18030"), "春江𠮷\n".encode("gb18030"), ["春江𠮷\n"], read_as("gb18030")),
    (in_encoding("big5"), "春江潮水".encode("big5"), ["春江潮水"], read_as("big5")),
    (in_encoding("latin-1"), "né à".encode("latin-1"), ["né à"], read_as("latin-1")),
    (in_encoding("utf-16-be"), "春".encode("utf-16-be"), ["春"], read_as("utf-16-be")),
    ("x.html", b"<html>one", ["one"], ["x.html: read as a web page, without its markup"]),
    ("x.txt.gz", b"".join([*PACKED, bytes(512)]), ["从前 end"], []),  # padded, as on a tape
    ("x.csv", b'text,id\n"a\nb",1\n\n"c ""d"", e",2\nf,3,4', ["a\nb", 'c "d", e', "f"], []),
    (in_body("x.csv"), b"text,body\n1,one\n2,two\n", ["one", "two"], []),
    (in_body("x.jsonl"), json_lines([{"text": "no", "body": POEMS[1]}]), [POEMS[1]], []),
    (in_body("x.json"), b'[{"text": "no", "body": "one"}]  \n', ["one"], []),
    ("x.json", b"\n\n[\n] \n", [], []),
    (
        "x.jsonl",
        b'{"text": "a\\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n',
        ["a\ufffd b", "😀"],
        ["x.jsonl: half characters (lone surrogates) became U+FFFD"],
    ),
]


@pytest.mark.parametrize(("data", "content", "texts", "notes"), READ, ids=range(len(READ)))
def test_text_is_read_exactly_but_for_one_byte_order_mark(
    workdir, monkeypatch, data, content, texts, notes
):
    name = save(data, content)
    sha256 = hashlib.sha256(content).hexdigest()
    entry = {"name": name, "path": name, "bytes": len(content), "sha256": sha256}
    for amount in AMOUNTS:
        monkeypatch.setattr(reader, "READ_BYTES", amount)
        found, report = read(data)
        assert (found, [note.en for note in report.notes]) == (texts, notes)
        assert report.files == [entry | {"documents": len(texts)}]
        assert reader.file_sha256(Path(name)) == sha256


def fourth(line: bytes) -> bytes:
    return b'"one"\n\n"two"\n' + (line + b"\n") * 4 + b'"eight"\n'  # more than may be bad


REFUSED = [  # DATA, a file's content and what is said of it
    ("x.txt", b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer, not the"),
    ("x.txt", b"\n <!DOCTYPE html><title>Log in</title>", "is a web page, not the text"),
    ("x.jsonl", MARK + b"<HTML><body>", "is a web page, not the text"),
    ("x.txt.gz", gzip.compress(b"<html>", mtime=0), "is a web page, not the text"),
    ("x.csv", b"PK\x03\x04\x14\x00", "is a zip archive. Unpack it"),
    ("x.txt", PACKED[0], "is compressed with gzip. Give it a name that ends in .gz"),
    ("x.txt", b"\x28\xb5\x2f\xfd\x00", "is compressed with zstd. Give it a name that ends in .z"),
    # bytes that do not fit
    ("x.txt", b"\xff", "is not utf-8: byte 0, in line 1, is 0xff"),
    ("x.txt", b"one\ntwo\xe9\n", "is not utf-8: byte 7, in line 2, is 0xe9"),
    ("x.txt", b"one\r\ntwo\r\n\x80", "is not utf-8: byte 10, in line 3, is 0x80"),
    ("x.txt", MARK + b"one\ntw\xff", "is not utf-8: byte 9, in line 2, is 0xff"),
    ("x.txt", "x\n春".encode()[:-1], "is not utf-8: byte 2, in line 2, is 0xe6"),
    ("x.txt", b"\xed\xa0\x80", "is not utf-8: byte 0, in line 1, is 0xed"),
    (in_encoding("gb18030"), "\n春\n".encode("gb18030") + b"\xff", "byte 4, in line 3, is 0xff"),
    (
        "x.txt",
        "\ufeffĊ\nਊ".encode("utf-16-le") + b"\x00\xdc",
        "is not utf-16-le: byte 8, in line 2, is 0x00",
    ),
    # broken lines of JSON
    ("x.jsonl", fourth(b'{"text": "on'), "line 4: not valid JSON: column 10: "),
    ("x.jsonl", fourth(b'{"text": "a"} {}'), "line 4: not valid JSON: column 15: Extra data"),
    ("x.jsonl", fourth(b"[" * 100_000), "line 4: not valid JSON"),
    ("x.jsonl", fourth(b'{"body": "a", "id": 1}'), 'line 4: no "text" field (has: body, id)'),
    ("x.jsonl", fourth(b"{}"), 'line 4: no "text" field (has: no field at all)'),
    ("x.jsonl", fourth(b'{"a\\nb\\nc\\nd": 1}'), 'line 4: no "text" field'),
    ("x.jsonl", fourth(b'{"%s": 1}' % (b"x" * 10_000)), 'line 4: no "text" field'),
    ("x.jsonl", fourth(b'{"text": null}'), 'line 4: "text" is null, not text'),
    ("x.jsonl", fourth(b'{"text": {"text": "a"}}'), 'line 4: "text" is dict, not text'),
    ("x.jsonl", fourth(b'["a"]'), 'line 4: "text" is list, not text'),
    # broken arrays
    ("x.json", b"", "is no JSON array"),
    ("x.json", b'{"body": "one"}', "is no JSON array but one object (has: body)"),
    ("x.json", b'["one", "two"', "element 2"),
    ("x.json", b'["one", "tw', "element 2"),
    ("x.json", b'["one", two]', "element 2"),
    ("x.json", b'["one"' + b', {"text": 1}' * 4 + b"]", 'element 2: "text" is int, not text'),
    ("x.json", b'["one"' + b', {"body": "a"}' * 4 + b"]", 'element 2: no "text" field (has: body)'),
    ("x.json", b'["one"' + b", 12" * 4 + b"]", 'element 2: "text" is int, not text'),
    ("x.json", b'["one" "two"]', "element 2"),
    ("x.json", b'["one",, "two"]', "element 2"),
    ("x.json", b'["one"]\n["two"]', "goes on after the array"),
    ("x.json", b"[" * 20_000, "element 1"),
    # broken tables
    ("x.csv", b"id,body\n1,one\n", 'has no column "text" (has: id, body)'),
    ("x.csv", b"", 'has no column "text" (has: nothing)'),
    ("x.csv", b"%s,1\n" % (b"word " * 5_000), 'has no column "text"'),
    ("x.csv", b'"a\nb\nc\nd\ne",1\n', 'has no column "text"'),
    ("x.csv", b'id,text\n1,"a\nb"\n' + b"2\n" * 4, "line 4: the row has 1 columns, the header 2"),
    ("x.csv", b"id,text\n" + b'1,"a" b\n' * 4, "line 2: "),
    ("x.csv", b'id,text\n1,one\n2,"two\n' + b"3,a\n" * 3, "line 6: "),
    ("x.tsv", b"id,body\n1,one\n", 'has no column "text" (has: id, body)'),
    ("x.txt", b"one\na\x00b\x1a\x0c", "line 2 holds a NUL"),
]


@pytest.mark.parametrize(("data", "content", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_text_is_refused_with_place_and_remedy(
    workdir, monkeypatch, data, content, said
):
    name = save(data, content)
    for amount in AMOUNTS if len(content) < 10_000 else AMOUNTS[-1:]:
        monkeypatch.setattr(reader, "READ_BYTES", amount)
        message = refusal(data)
        assert message.startswith(f"{name} ")
        assert said in message
        assert len(message) < 1000
        assert "\n" in message or ". " in message  # what to do
        assert "byte " not in said or '"encoding"' in message


def test_json_elements_may_be_longer_than_what_is_read_at_a_time(workdir, monkeypatch):
    monkeypatch.setattr(reader, "READ_BYTES", 64)
    decodings = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, *arguments):
            decodings.append(1)
            return super().raw_decode(*arguments)

    monkeypatch.setattr(reader, "_DECODER", Counting())
    texts = ["春" * 5000, "a", "b\n" * 3000]
    save("x.json", json.dumps([{"id": [1, {}], "text": text} for text in texts]).encode())
    assert documents("x.json") == texts
    assert len(decodings) < 40  # not one for each of the pieces, which are hundreds
    # what is broken is found without reading on
    save("x.json", b'["one", oops, ' + b'"word", ' * 100_000 + b'"end"]')
    report = ReadingReport()
    with pytest.raises(DataError, match="element 2"):
        list(read_documents([Part("x.json", Path("x.json"))], DataSpec(()), report))
    assert report.bytes_read < 200_000  # of 800,000


def test_json_array_of_many_elements_takes_time_in_proportion(workdir, monkeypatch):
    monkeypatch.setattr(reader, "READ_BYTES", 1 << 30)

    def needed_s(count: int) -> float:
        save("x.json", json.dumps(["word " * 16] * count).encode())
        started_at = time.process_time()
        assert len(documents("x.json")) == count
        return time.process_time() - started_at

    assert needed_s(20_000) < 4 * 20 * max(needed_s(1000), 0.01)


@both_archives
def test_damaged_archive_is_refused_with_what_is_wrong(workdir, compressed):
    name = f"x.txt{compressed}"
    whole = COMPRESSORS[compressed](os.urandom(100_000).hex().encode())
    for kept in (0, len(whole) // 100, len(whole) // 2, len(whole) - 9):
        message = refusal(save(name, whole[:kept]))
        assert f"{name} ends in the middle: {kept:,} bytes" in message
        assert "get it anew" in message
    flipped = whole[:2] + bytes([whole[2] ^ 0xFF]) + whole[3:]
    for content in (b"\x01\x02 three", flipped):
        message = refusal(save(name, content))
        assert f"{name} is no intact {compressed} file" in message
        assert "Get it anew." in message


@contextlib.contextmanager
def at_most(mib: float) -> Iterator[None]:
    """See that Python holds no more memory inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] / (1 << 20) < mib
    finally:
        tracemalloc.stop()


@both_archives
def test_decompression_bomb_is_stopped_early(workdir, monkeypatch, compressed):
    monkeypatch.setattr(reader, "BOMB_BYTES", 1 << 20)
    monkeypatch.setattr(reader, "READ_BYTES", 1 << 16)
    name = save(f"x.txt{compressed}", COMPRESSORS[compressed](b"a" * (24 << 20)))
    with at_most(20), pytest.raises(DataError, match="expands to more than 300 times its size"):
        documents(name)


# a part that can't be shrunk keeps a long line from being taken for a bomb
NOISE, LONG = os.urandom(200_000).hex().encode(), b"word " * 400_000


@pytest.mark.parametrize(
    ("name", "make", "most_mib"),
    [
        ("x.txt", lambda: LONG * 4, 3),  # a million characters are searched for markers
        ("x.txt.gz", lambda: gzip.compress(NOISE) + gzip.compress(LONG * 4), 3),
        ("x.txt.zst", lambda: zstd(NOISE) + zstd(LONG * 25), 25),
        ("x.jsonl", lambda: b'{"text": "' + LONG + b'"}\n', 12),
        ("empty.txt", lambda: b"\n" * 30_000, 1),
        ("empty.jsonl", lambda: b"\n" * 30_000, 1),
        ("empty.csv", lambda: b"text\n" + b"\n" * 30_000, 1),
    ],
)
def test_long_lines_and_very_many_take_little_memory(workdir, monkeypatch, name, make, most_mib):
    monkeypatch.setattr(reader, "READ_BYTES", 1 << 12)
    save(name, make())
    parts = [Part(name, Path(name))]
    with at_most(most_mib):
        for _ in read_documents(parts, DataSpec(()), ReadingReport()):
            pass


def test_missing_library_is_told_with_how_to_get_it(workdir, monkeypatch):
    for data, library, command in [
        ("x.txt.zst", "zstandard", "pip install zstandard"),
        ("x.parquet", "pyarrow", "pip install pyarrow"),
        ("hf:poems/of-nobody", "datasets", "pip install -r requirements.txt datasets"),
    ]:
        monkeypatch.setitem(sys.modules, library, None)
        if not data.startswith("hf:"):
            save(data, zstd(b"one") if data.endswith(".zst") else b"one")
        message = refusal(data, SettingsError)
        assert data in message
        assert message.endswith(command)


@pytest.mark.slow
def test_data_set_is_read_with_its_validation_split(workdir, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is optional")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workdir / "hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    Path("poems").mkdir()
    save("poems/train.jsonl", json_lines([{"text": text, "id": 0} for text in [*POEMS, ""]]))
    save("poems/validation.jsonl", json_lines([{"text": "held out", "id": 0}]))
    name = f"hf:{workdir / 'poems'}"
    texts, report = read(name)
    assert (texts, report.empty_documents) == (POEMS, 1)
    train = find_parts([name], Path("cache"), ReadingReport())
    (entry,) = report.files
    assert entry["name"] == f"{name} (train)"
    assert entry["sha256"] == reader.dataset_fingerprint(train[0])
    (val,) = reader.validation_parts(train)
    assert list(read_documents([val], DataSpec(()), ReadingReport())) == [("held out", True)]
    told = 'train row 1: no "body" field (has: text, id)'
    assert told in refusal({"path": name, "field": "body"})
    # beside a file it has no validation of its own
    parts = find_parts([name, save("x.txt", b"one")], Path("cache"), ReadingReport())
    assert reader.validation_parts(parts) == []
    message = refusal(f"{name}-of-nobody")
    assert "can't be had" in message
    assert "download it elsewhere and set DATA to its files" in message
