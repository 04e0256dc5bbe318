"""Other people's files are read right, or refused with what to do; none becomes garbage."""

import gzip
import io
import json
import random
import re
import sys
import zipfile
from pathlib import Path

import pytest

from engine.errors import DataError, SettingsError
from tests.reading import documents, json_lines, parquet, read, refusal, save, table
from text import documents as reader
from text.documents import ReadingReport
from text.separators import LOOKED_AT
from text.sources import parse_data
from text.token_cache import tokenize

# by language, with what only its encodings have
TEXTS = json.loads((Path(__file__).parent / "languages.json").read_text(encoding="utf-8"))
TRADITIONAL = TEXTS.pop("Traditional Chinese")
WRITTEN_IN = {  # the ten encodings, and the texts that people have in them
    "utf-8": list(TEXTS.values()),
    "utf-16-le": list(TEXTS.values()),
    "utf-16-be": list(TEXTS.values()),
    "cp1252": [TEXTS[name] for name in ("English", "German", "French", "Spanish")],
    "latin-1": [TEXTS["German"], TEXTS["Spanish"]],
    "cp1251": [TEXTS["Russian"]],
    "gb18030": [TEXTS["Chinese"]],
    "big5": [TRADITIONAL],
    "shift_jis": [TEXTS["Japanese"]],
    "euc-kr": [TEXTS["Korean"]],
}


def cut_texts(texts: list[str], count: int, chooser: random.Random) -> list[str]:
    """Pieces of 40 to 120 characters, as the lines of a small file are."""
    pieces = []
    for number in range(count):
        text = texts[number % len(texts)] * 2
        start = chooser.randrange(len(text) // 2)
        pieces.append(text[start : start + chooser.randint(40, 120)])
    return pieces


def as_read_or_hinted(content: bytes) -> str:
    """The text as it is read, else as the first encoding that the refusal names gives it."""
    try:
        return "".join(reader.decode([content], None, "x.txt", ReadingReport()))
    except DataError as error:
        named = re.search(r'"encoding": "([\w-]+)"', str(error))
        return content.decode(named[1], "replace") if named else ""


def test_first_encoding_that_a_hint_names_is_nearly_always_right():
    chooser = random.Random(0)
    wrong, count = [], 0
    for encoding, texts in WRITTEN_IN.items():
        for text in cut_texts(texts, 20, chooser):
            count += 1
            if as_read_or_hinted(text.encode(encoding)) != text:
                wrong.append((encoding, text))
    assert count == 200 and len(WRITTEN_IN) == 10 and len(TEXTS) == 8
    assert len(wrong) <= 10, wrong


def test_an_encoding_that_is_set_is_doubted_where_the_file_looks_like_another():
    def told(content: bytes, encoding: str) -> list[str]:
        report = ReadingReport()
        "".join(reader.decode([content], encoding, "x.txt", report))
        assert report.notes[0].en == f"x.txt: read as {encoding}, as set"
        return [
            name
            for note in report.notes[1:]
            for name in re.findall(r'looks like "([^"]+)', note.en)
        ]

    chooser = random.Random(1)
    found, expected = [], []
    for encoding in ("utf-8", "gb18030", "big5", "shift_jis", "euc-kr"):
        for text in cut_texts(WRITTEN_IN[encoding], 20, chooser):
            if not text.isascii():
                found += told(("word\n" * 9 + text).encode(encoding), "latin-1") or ["none"]
                expected.append(encoding)
    assert len(expected) > 90
    right = [one == other for one, other in zip(found, expected, strict=True)]
    assert sum(right) >= 0.95 * len(right)
    for encoding in ("latin-1", "cp1252", "cp1251"):
        for text in cut_texts(WRITTEN_IN[encoding], 20, chooser):
            assert told(text.encode(encoding), encoding) == []
    assert told(TEXTS["Russian"].encode("cp1251"), "latin-1") == ["cp1251"]
    assert told(b"plain words", "cp1252") == told(TEXTS["Chinese"].encode("gbk"), "gbk") == []


# --------------------------------------------------------------------------- other people's files


def zipped(members: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def word_document(*paragraphs: str) -> bytes:
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    body = "".join(f"<w:p><w:pPr/><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    return zipped(
        {
            "[Content_Types].xml": "<Types/>",
            "word/document.xml": f"<w:document {space}><w:body>{body}</w:body></w:document>",
        }
    )


def book(*chapters: str, locked: bool = False) -> bytes:
    names = [f"text/c {number}.xhtml" for number in range(len(chapters))]
    items = "".join(f'<item id="i{name}" href="{name.replace(" ", "%20")}"/>' for name in names)
    spine = "".join(f'<itemref idref="i{name}"/>' for name in names)
    members = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container><rootfile full-path="OEBPS/b.opf"/></container>',
        "OEBPS/b.opf": f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>",
    }
    for name, chapter in zip(reversed(names), reversed(chapters), strict=True):
        page = f"<html><head><style>p {{}}</style></head><body><p>{chapter}</p></body></html>"
        members[f"OEBPS/{name}"] = f'<?xml version="1.0" encoding="utf-8"?>{page}'
    if locked:
        members["META-INF/encryption.xml"] = f"<e>OEBPS/{names[0]}</e>"
    return zipped(members)


def pdf(text: str) -> bytes:
    """A file with one page, and no table of where its objects are, as many are damaged."""
    stream = f"BT /F1 12 Tf 20 20 Td ({text}) Tj ET" if text else ""
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>"
        ">>>>",
        f"<</Length {len(stream)}>>stream\n{stream}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    body = "".join(f"{number} 0 obj{each}endobj\n" for number, each in enumerate(objects, 1))
    return f"%PDF-1.4\n{body}trailer<</Root 1 0 R/Size 6>>\nstartxref\n0\n%%EOF".encode()


ONE, TWO = "A lamp stood in the window.", "The river was quiet."
PAGE = f"<!DOCTYPE html><title>T</title><script>x < 1</script><p>{ONE}</p><p>{TWO}<br>é</p>"
PAGE_TEXT = f"T\n\n{ONE}\n\n{TWO}\né"
ROWS = [{"id": 1, "text": ONE}, {"id": 2, "text": TWO}]
MARK, PLAIN = "<|endoftext|>", f"{ONE}\n{TWO}\n"
MENTION = f'GPT-2 writes "{MARK}" at the end; {MARK} is a token, and `{MARK}` its name.\n' * 3
READ_RIGHT = {  # a file's name and content, and its documents
    # encodings
    "bom8.txt": (PLAIN.encode("utf-8-sig"), [PLAIN]),
    "bom16.txt": (PLAIN.encode("utf-16"), [PLAIN]),
    "le16.txt": (PLAIN.encode("utf-16-le"), [PLAIN]),
    "be16.txt": (PLAIN.encode("utf-16-be"), [PLAIN]),
    "russian16.txt": (TEXTS["Russian"].encode("utf-16-le"), [TEXTS["Russian"]]),
    "le16.csv": ("id,text\r\n1,né\r\n".encode("utf-16-le"), ["né"]),
    "crlf.txt": (PLAIN.replace("\n", "\r\n").encode(), [PLAIN.replace("\n", "\r\n")]),
    "sounds.txt": (b"RIFF is a format, and so is GGUF.\n", ["RIFF is a format, and so is GGUF.\n"]),
    "word.htm": (b"<html><![if !x]><p>a</p><![endif]><![x y]>b", ["a\n\nb"]),
    "noname": (PLAIN.encode(), [PLAIN]),
    # markup and books
    "page.html": (PAGE.encode(), [PAGE_TEXT]),
    "page.htm": (b" \n" + PAGE.encode(), [PAGE_TEXT]),
    "old.html": (
        f"<html><meta charset=gb2312>{TEXTS['Chinese']}".encode("gbk"),
        [TEXTS["Chinese"]],
    ),
    "xhtml.xhtml": (b'<?xml version="1.0"?>\n<html><p>a<i>b</i></p></html>', ["ab"]),
    "pre.html": (b"<html><pre>a\n  b</pre><ruby>c<rt>d</rt></ruby>", ["a\n  b\n\nc"]),
    "a.docx": (word_document(ONE, "", TWO), [f"{ONE}\n\n{TWO}\n"]),
    "wrong.txt": (word_document(ONE), [f"{ONE}\n"]),
    "b.epub": (book(ONE, TWO), [f"{ONE}\n\n{TWO}"]),
    # markers
    "alone.txt": (f"{ONE}\n{MARK}\n{TWO}\n{MARK}\n".encode(), [ONE, TWO]),
    "alone-crlf.txt": (f"{ONE}\r\n{MARK}\r\n{TWO}".encode(), [ONE, TWO]),
    "within.txt": (f"{ONE}{MARK}{TWO}{MARK}{ONE}{MARK}".encode(), [ONE, TWO, ONE]),
    "start.txt": (
        f"<|startoftext|>{ONE}{MARK}\n<|startoftext|>{TWO}{MARK}\n".encode() * 2,
        [ONE, TWO] * 2,
    ),
    "s.txt": (f"<s>{ONE}</s>\n<s>{TWO}</s>\n<s>{ONE}</s>\n".encode(), [ONE, TWO, ONE]),
    "s-lines.txt": (f"{ONE}\n</s>\n{TWO}".encode(), [ONE, TWO]),
    "llama.txt": (f"{ONE}\n<|end_of_text|>\n{TWO}".encode(), [ONE, TWO]),
    "mention.txt": (MENTION.encode(), [MENTION]),
    "struck.md": (b"This is <s>old</s> new. " * 5, ["This is <s>old</s> new. " * 5]),
    # rows
    "a.jsonl": (json_lines(ROWS), [ONE, TWO]),
    "a.json": (json.dumps(ROWS).encode(), [ONE, TWO]),
    "lines.json": (json_lines(ROWS), [ONE, TWO]),
    "one.json": (json_lines(ROWS[:1]), [ONE]),
    "array.jsonl": (json.dumps(ROWS).encode(), [ONE, TWO]),
    "pretty.json": (json.dumps(ROWS, indent=2).encode(), [ONE, TWO]),
    "pretty.jsonl": ("\n".join(json.dumps(row, indent=2) for row in ROWS).encode(), [ONE, TWO]),
    "data.json": (json.dumps({"n": [1, 2], "v": {"a": 1}, "data": ROWS}).encode(), [ONE, TWO]),
    "data2.json": (json.dumps({"data": ROWS}, indent=1).encode(), [ONE, TWO]),
    "upper.jsonl": (json_lines([{"Text": ONE}]), [ONE]),
    "a.csv": (table([ONE, TWO], ","), [ONE, TWO]),
    "semicolon.csv": (table([ONE, TWO], ";"), [ONE, TWO]),
    "tab.csv": (table([ONE, TWO], "\t"), [ONE, TWO]),
    "pipe.csv": (table([ONE, TWO], "|"), [ONE, TWO]),
    "upper.csv": (b"id, Text\n1," + ONE.encode(), [ONE]),
    "cut.jsonl": (json_lines(ROWS) + b'{"text": "The lam', [ONE, TWO]),
    "null.jsonl": (json_lines([*ROWS, {"text": None}, {"text": 3}, {}]), [ONE, TWO]),
    "short.csv": (table([ONE, TWO], ",") + b"3\n", [ONE, TWO]),
    # archives
    "a.txt.gz": (gzip.compress(PLAIN.encode()), [PLAIN]),
    "plain.txt.gz": (PLAIN.encode(), [PLAIN]),
    "plain.jsonl.gz": (json_lines(ROWS), [ONE, TWO]),
}
REFUSED = {  # a file's name and content, and what is said of it
    "nul.txt": (b"a lamp\0 stood\nin the\0\0 window", "line 1 holds a NUL"),
    "tokens.bin": (bytes(range(256)) * 40, "is it a text at all?"),
    "late.txt": (b"word\n" * 9_000 + b"\0", "line 9001 holds a NUL"),
    "photo.txt": (b"\x89PNG\r\n\x1a\n\0", "an image (PNG)"),
    "photo.md": (b"\xff\xd8\xff\xe0\0", "an image (JPEG)"),
    "song.txt": (b"ID3\x03\0", "a sound (MP3)"),
    "a.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0", "Save it as plain text (.txt) or .docx"),
    "a.rtf": (rb"{\rtf1\ansi lamp}", "Save it as plain text (.txt) or .docx"),
    "texts.zip": (zipped({"a.txt": ONE}), "is a zip archive. Unpack it"),
    "sheet.xlsx": (zipped({"xl/workbook.xml": ""}), "Save it as .csv"),
    "a.odt": (zipped({"content.xml": ""}), "is an OpenDocument file. Save it as"),
    "half.docx": (word_document(ONE)[:-30], "is a zip archive. Unpack it"),
    "broken.docx": (zipped({"word/document.xml": "<a>"}), "is damaged"),
    "bomb.docx": (zipped({"word/document.xml": "<!DOCTYPE a [<!ENTITY b 'c'>]><a/>"}), "entities"),
    "empty.epub": (zipped({"META-INF/container.xml": "<a/>"}), "can't be opened here"),
    "deep.docx": (zipped({"word/document.xml": "<a>" * 2000 + "</a>" * 2000}), "nested too deeply"),
    "locked.epub": (book(ONE, locked=True), "is protected (DRM)"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
    "a.bz2": (b"BZh91AY&SY\xff\x00", "(bunzip2 decompresses it)"),
    "model.gguf": (b"GGUF\3\0\0\0", "a model (GGUF)"),
    "login.csv": (PAGE.encode(), "is a web page, not the text"),
    "gbk.txt": (TEXTS["Chinese"].encode("gbk"), '"encoding": "gb18030"'),
    "big5.txt": (TRADITIONAL.encode("big5"), '"encoding": "big5"'),
    "sjis.txt": (TEXTS["Japanese"].encode("shift_jis"), '"encoding": "shift_jis"'),
    "word.txt": (TEXTS["English"].encode("cp1252"), '"encoding": "cp1252"'),
    "cut.txt": (TEXTS["French"].encode() + "é".encode()[:1], "cut off"),
    "mixed.txt": (
        (TEXTS["German"] * 3).encode() + "é ".encode("cp1252"),
        "Nearly all of it is UTF-8",
    ),
    "chinese16.txt": ("渡口的老船工每天清早起来".encode("utf-16-le"), '"encoding": "utf-16-le"'),
    "no-field.jsonl": (json_lines([{"id": "7", "body": ONE}]), '"field": "body"'),
    "no-array.json": (b'{"body": {"a": 1}}', "is no JSON array but one object (has: body)"),
    "no-column.csv": (b"id;body\n1;a\n", 'no column "text" (has: id, body)'),
    "quote.csv": (table([ONE, TWO], ",") + b'3,"open\n' + b"4,lost\n" * 9, "Bad are 10 of 12"),
}


def test_each_of_sixty_files_is_read_right_or_refused_with_what_to_do(workdir):
    assert len(READ_RIGHT) + len(REFUSED) >= 60
    read = {name: documents(save(name, content)) for name, (content, _) in READ_RIGHT.items()}
    assert read == {name: texts for name, (_, texts) in READ_RIGHT.items()}
    said = {name: refusal(save(name, content)) for name, (content, _) in REFUSED.items()}
    missing = {name: said[name] for name, (_, told) in REFUSED.items() if told not in said[name]}
    assert not missing
    assert all(text.startswith(name) and len(text) < 1000 for name, text in said.items())
    assert all(". " in text or ".\n" in text for text in said.values())  # what to do comes second


def test_folder_takes_what_can_be_read_and_names_what_can_not(workdir):
    for name, (content, _) in READ_RIGHT.items():
        save(name, content)
    binary = ["nul.txt", "photo.txt", "song.txt", "a.doc", "a.rtf", "texts.zip", "model.gguf"]
    for name in binary:
        save(name, REFUSED[name][0])
    found, report = read(".")
    assert sorted(found) == sorted(text for _, texts in READ_RIGHT.values() for text in texts)
    reasons = {entry["name"]: entry["reason"] for entry in report.passed_over}
    assert set(reasons) == set(binary)
    assert reasons["nul.txt"] == reasons["photo.txt"] == "binary"
    assert "RTF" in reasons["a.rtf"] and reasons["texts.zip"] == "zip archive"


def test_pdf_is_read_through_pypdf_or_refused_with_how_to_get_it(workdir, monkeypatch):
    pytest.importorskip("pypdf", reason="pypdf is optional")
    assert documents(save("a.pdf", pdf(ONE))) == [f"{ONE}\n\n"]
    assert documents(save("a.txt", pdf(TWO))) == [f"{TWO}\n\n"]
    assert "its pages are pictures" in refusal(save("scan.pdf", pdf("")))
    assert "can't be read" in refusal(save("half.pdf", b"%PDF-1.4\n1 0 obj"))
    monkeypatch.setitem(sys.modules, "pypdf", None)
    assert refusal("a.pdf", SettingsError).endswith("pip install pypdf")


# ------------------------------------------------------------------------------------- separators


@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("eol", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("separator", "content", "texts"),
    [
        ("line", "one\ntwo\n  three", ["one", "two", "  three"]),
        ("blank-line", "one\n1\n\ntwo\n \t\n\n\n 3\n\n", ["one\n1", "two", " 3"]),
        ("---", "one\n---\n  two\n---\n", ["one", "  two"]),
        ("\n***\n", "one\n***\n***two\n", ["one", "***two\n"]),
        ("file", f"one\n{MARK}\ntwo", [f"one\n{MARK}\ntwo"]),
    ],
)
def test_separator_divides_a_text_into_documents(
    workdir, monkeypatch, read_bytes, eol, separator, content, texts
):
    monkeypatch.setattr(reader, "READ_BYTES", read_bytes)
    monkeypatch.setattr(reader, "SNIFFED_BYTES", 1)
    save("x.txt", content.replace("\n", eol).encode())
    found = documents({"path": "x.txt", "separator": separator})
    assert found == [text.replace("\n", eol) for text in texts]


def test_many_documents_are_divided_in_linear_work_and_a_note_says_how_to_keep_the_text(workdir):
    stories = [f"Story {number}." + " It ended well." * 20 for number in range(4_000)]
    save("x.txt", f"\n{MARK}\n".join(stories).encode())
    found, report = read("x.txt")
    assert found == stories
    [(note, _)] = report.notes
    assert f'divided into documents at "{MARK}"' in note and '"separator": "file"' in note
    novel = "a" * (LOOKED_AT + 1000) + f"\n{MARK}\n"  # the first marker is too far in
    save("x.txt", (novel * 2).encode())
    found, report = read("x.txt")
    assert found == [novel * 2]
    assert report.notes[0].en.startswith(f'x.txt: "{MARK}" is in it 2 times, as text')


# --------------------------------------------------------------------------------------- bad rows


def ten_thousand_rows(bad: int) -> bytes:
    """Rows of which every so many is bad, of five kinds in turn; the last row is a bad one."""
    kinds = [b'{"text": null}', b'{"text": "on', b'{"body": "one"}', b"[1]", b'{"text": 7}']
    step = 10_000 // bad
    lines = [
        kinds[number // step % 5] if number % step == 0 else b'{"text": "row %d"}' % number
        for number in range(1, 10_001)
    ]
    return b"\n".join(lines) + b"\n"


def test_a_few_bad_rows_are_counted_and_the_first_ones_named(workdir):
    save("x.jsonl", ten_thousand_rows(40))
    found, report = read("x.jsonl")
    assert len(found) == 9_960
    [(note, _)] = report.notes
    assert note.startswith("x.jsonl: 40 bad rows passed over (0.40%): line 250: not valid JSON")
    assert note.count("line ") == 3 and 'line 500: no "text" field (has: body)' in note


def test_more_bad_rows_are_refused_unless_they_are_to_be_skipped(workdir):
    save("x.jsonl", ten_thousand_rows(200))
    message = refusal("x.jsonl")
    assert message.startswith("x.jsonl line 50: not valid JSON")
    assert "Bad are 200 of 10,000 rows (2.0%" in message and '"bad_rows": "skip"' in message
    assert len(documents({"path": "x.jsonl", "bad_rows": "skip"})) == 9_800
    save("x.csv", table(["one"] * 300, ",") + b"2\n" * 4)
    assert "line 302: the row has 1 columns" in refusal("x.csv")
    save("x.jsonl", b'{"body": "one"}\n' * 200_000)  # a field that no row has: not read to the end
    assert "Bad are 100 of 100 rows" in refusal("x.jsonl")


def test_bad_rows_at_the_end_of_a_text_are_told_before_a_tokenizer_is_trained(workdir, monkeypatch):
    pytest.importorskip("tokenizers", reason="tokenizers is optional")
    monkeypatch.setattr("text.tokenizer.TRAINING_CHARACTERS", 1000)
    # which takes what a training gives
    monkeypatch.setattr("text.tokenizer.ranks_of", lambda vocabulary: pytest.fail("was trained"))
    save("x.jsonl", b'{"text": "word"}\n' * 3000 + b"{\n" * 40)
    with pytest.raises(DataError, match=r"^x\.jsonl line 3001: not valid JSON: column 2"):
        tokenize(parse_data("x.jsonl"), "bpe:300", 0.9, Path("cache"))


def test_bad_rows_of_a_parquet_file_are_passed_over(workdir):
    found, report = read(save("x.parquet", parquet(["one"] * 9 + [None])))
    assert found == ["one"] * 9
    assert [note.en for note in report.notes] == [
        'x.parquet: 1 bad row passed over (10.00%): row 10: "text" is null, not text'
    ]
    assert documents(save("x.bin", parquet(["two"]))) == ["two"]


@pytest.mark.parametrize("key", ["file", "folder", "data"])
def test_setting_that_means_the_path_is_told_so(key):
    with pytest.raises(SettingsError, match=r'the text is named in DATA\["path"\]'):
        parse_data({key: "a.txt"})
    for wrong in ({"bad_rows": "drop"}, {"separator": ""}, {"separator": 3}):
        with pytest.raises(SettingsError, match="must be"):
            parse_data({"path": "a.txt", **wrong})
