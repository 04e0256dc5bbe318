"""Files that are no plain text, recognised by their content: read where that is possible."""

import codecs
import html.parser
import re
import xml.etree.ElementTree
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any
from urllib.parse import unquote

from engine.errors import DataError, SettingsError, first_line

SNIFFED_BYTES = 8192
MOST_XML_BYTES = 256 << 20  # of one unpacked member of a zip; novels have 2 MB
_LFS = b"version https://git-lfs.github.com/spec/"
_PAGE_NAMES = (".html", ".htm", ".xhtml", ".xht", ".php", ".aspx", "")
_SAVE = "Save it as plain text (.txt) or .docx, and set DATA to that"
_UNPACK = "Unpack it and set DATA to what is inside"
_SIGNATURES = (  # how a file begins, what it is, what to do
    (_LFS, "a git-lfs pointer, not the file itself", "Run: git lfs pull"),
    (rb"{\rtf", "rich text (RTF), which is mostly markup", _SAVE),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file (.doc, .xls, .ppt)", _SAVE),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"\xfd7zXZ\x00", "compressed with xz", "Decompress it: unxz"),
    (b"\x1f\x8b", "compressed with gzip", "Give it a name that ends in .gz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "Give it a name that ends in .zst"),
)
_BINARY = (  # how a file begins, and what it is: nothing that a text could be had from
    (b"\x89PNG\r\n", "an image (PNG)"),
    (b"\xff\xd8\xff", "an image (JPEG)"),
    (b"BZh", "compressed with bzip2 (bunzip2 decompresses it)"),
    (b"GIF8", "an image (GIF)"),
    (b"II*\x00", "an image (TIFF)"),
    (b"MM\x00*", "an image (TIFF)"),
    (b"RIFF", "an image, a sound or a video (RIFF)"),
    (b"OggS", "a sound (Ogg)"),
    (b"fLaC", "a sound (FLAC)"),
    (b"ID3", "a sound (MP3)"),
    (b"\x7fELF", "a program"),
    (b"MZ\x90\x00", "a program"),
    (b"SQLite format 3\x00", "a database (SQLite)"),
    (b"\x93NUMPY", "an array (NumPy)"),
    (b"GGUF", "a model (GGUF)"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
)
_BLANK_AROUND = re.compile(
    "p|h[1-6]|blockquote|pre|ul|ol|dl|table|section|article|header|footer|hr"
)
_LINE_AROUND = re.compile("br|div|li|tr|dt|dd|caption|figcaption|title|option")
_UNREAD = re.compile("script|style|noscript|template|svg|math|rt|rp|iframe|object")
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f]")
_SECTION = re.compile(r"<!\[[^>]*>")  # of Word's pages, at which the parser may give up
_CHARSET = re.compile(
    rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?([\w-]+)", re.I
)


def kind_of(start: bytes, suffix: str) -> str:
    """ "text", "html", "pdf", "zip", "parquet" or "binary", by the first SNIFFED_BYTES of a file.

    A web page counts as HTML under a name that may hold one; elsewhere, it is what a server sent
    in place of a file. "binary" is what can't be read; refusal_of() tells why.
    """
    if start.startswith(b"%PDF-"):
        return "pdf"
    if start.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if is_page(start):
        return "html" if suffix in _PAGE_NAMES else "binary"
    return "binary" if refusal_of(start, "") else "text"


def reads_as_text(start: bytes) -> bool:
    """Whether a file begins as a text in UTF-8 without control characters; not if it is empty."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return bool(start) and not _CONTROL.search(start)


def is_page(start: bytes) -> bool:
    """Whether a file begins like a web page."""
    lead = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if lead.startswith(b"<?xml"):
        lead = lead[:1024].partition(b"?>")[2].lstrip()
    return lead.startswith((b"<!doctype html", b"<html"))


def refusal_of(start: bytes, name: str) -> str | None:
    """Why a file with this start is no text, and what to do; None if it may be one."""
    for signature, what, remedy in _SIGNATURES:
        if start.startswith(signature):
            return f"{name} is {what}. {remedy}."
    for signature, what in _BINARY:
        if start.startswith(signature) and not reads_as_text(start):  # which may begin so, too
            return f"{name} is {what}, not text.\nSet DATA to a text."
    if is_page(start):
        return (
            f'{name} is a web page, not the text. Download the file itself (the "raw" link),\n'
            "or let its name end in .html to read the page's own text."
        )
    return None


class _PageText(html.parser.HTMLParser):
    """Collects the text of a page as it is seen: a line for a line, a blank line for a block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._unread: list[str] = []
        self._in_pre = 0

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if self._unread or _UNREAD.fullmatch(tag):
            if _UNREAD.fullmatch(tag):
                self._unread.append(tag)
            return
        self._in_pre += tag == "pre"
        self._break_at(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        if not self._unread and not _UNREAD.fullmatch(tag):
            self._break_at(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._unread:
            del self._unread[self._unread.index(tag) :]
        elif not self._unread:
            self._in_pre = max(0, self._in_pre - (tag == "pre"))
            self._break_at(tag)

    def handle_data(self, data: str) -> None:
        if not self._unread:
            if self._in_pre:  # NULs hold its blanks, which nothing is to join
                self._parts.append(data.replace(" ", "\0"))
            else:
                self._parts.append(re.sub(r"[ \t\r\n\f]+", " ", data))

    def _break_at(self, tag: str) -> None:
        if _BLANK_AROUND.fullmatch(tag):
            self._parts.append("\n\n")
        elif _LINE_AROUND.fullmatch(tag):
            self._parts.append("\n")
        elif tag in ("td", "th"):
            self._parts.append("\t")

    def text(self) -> str:
        """What was seen so far."""
        joined = re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", "".join(self._parts)))
        return re.sub(r"\n{3,}", "\n\n", joined).strip().replace("\0", " ")


def page_text(pieces: Iterable[str]) -> str:
    """The text of an HTML page, without its markup, scripts and styles."""
    parser = _PageText()
    parser.feed(_SECTION.sub("", "".join(pieces)))
    parser.close()
    return parser.text()


def page_encoding(start: bytes) -> str | None:
    """The encoding that a page or an XML file says it has, if Python knows it."""
    found = _CHARSET.search(start[:2048])
    if found is None:
        return None
    name = found[1].decode("ascii").lower()
    name = {"gb2312": "gb18030", "gbk": "gb18030", "iso-8859-1": "cp1252"}.get(name, name)
    try:
        "".encode(name)
    except (LookupError, ValueError):
        return None
    return name


def zip_text(path: Path, name: str) -> Iterator[str]:
    """The text of an EPUB or a Word document (.docx), in pieces.

    Raises DataError for any other zip archive, and for a damaged, encrypted or oversized one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            if "word/document.xml" in members:
                yield _word_text(archive, name)
            elif "META-INF/container.xml" in members:
                yield from _epub_text(archive, name)
            else:
                raise DataError(_about_zip(members, name))
    except RecursionError:
        raise DataError(f"{name} is nested too deeply.\n{_SAVE}.") from None
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        raise DataError(
            f"{name} is a zip archive. {_UNPACK}.\nIt can't be opened here: {first_line(error)}"
        ) from None
    except xml.etree.ElementTree.ParseError as error:
        raise DataError(f"{name} is damaged: its XML breaks off ({error}).\nGet it anew.") from None
    except RuntimeError:  # the library's word for a password
        raise DataError(f"{name} is encrypted.\nSave it without a password.") from None


def zip_is_readable(path: Path) -> bool:
    """Whether a zip archive is one that zip_text() takes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError):
        return False
    return "word/document.xml" in members or "META-INF/container.xml" in members


def _about_zip(members: set[str], name: str) -> str:
    for sign, what, remedy in (
        ("content.xml", "an OpenDocument file", _SAVE),
        ("xl/workbook.xml", "a spreadsheet", "Save it as .csv, and set DATA to that"),
        ("ppt/presentation.xml", "a presentation", _SAVE),
    ):
        if sign in members:
            return f"{name} is {what}. {remedy}."
    return f"{name} is a zip archive. {_UNPACK}."


def _member(archive: zipfile.ZipFile, member: str, name: str) -> bytes:
    """A member's content, unless it expands to more than any text has."""
    if archive.getinfo(member).file_size > MOST_XML_BYTES:
        raise DataError(
            f"{name}: {member} in it expands to more than {MOST_XML_BYTES >> 20} MiB.\n"
            "Unpack it yourself if you trust it, and set DATA to the result."
        )
    return archive.read(member)


def _xml(content: bytes, name: str) -> xml.etree.ElementTree.Element:
    if b"<!ENTITY" in content:  # which may expand without bound
        raise DataError(f"{name} defines XML entities, which is not read.\n{_SAVE}.")
    return xml.etree.ElementTree.fromstring(content)


def _word_text(archive: zipfile.ZipFile, name: str) -> str:
    parts: list[str] = []

    def walk(element: xml.etree.ElementTree.Element) -> None:
        tag = element.tag.rpartition("}")[2]
        if tag == "Fallback":  # repeats the text box beside it for older readers
            return
        if tag == "t":
            parts.append(element.text or "")
        elif tag in ("tab", "br", "cr"):
            parts.append("\t" if tag == "tab" else "\n")
        for child in element:
            if tag != "pPr":  # whose tabs are tab stops
                walk(child)
        if tag == "p":
            parts.append("\n")

    walk(_xml(_member(archive, "word/document.xml", name), name))
    return "".join(parts)


def _epub_text(archive: zipfile.ZipFile, name: str) -> Iterator[str]:
    """The chapters in the order of the book's spine."""
    container = _xml(_member(archive, "META-INF/container.xml", name), name)
    packages = [element.attrib.get("full-path") for element in container.iter()]
    package = next(filter(None, packages), "")
    root = _xml(_member(archive, package, name), name)
    hrefs, spine = {}, []
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]
        if tag == "item":
            hrefs[element.attrib["id"]] = element.attrib["href"]
        elif tag == "itemref":
            spine.append(element.attrib["idref"])
    paths = [normpath(join(dirname(package), unquote(hrefs[each]))) for each in spine]
    if "META-INF/encryption.xml" in archive.namelist():
        locked = archive.read("META-INF/encryption.xml").decode("utf-8", "replace")
        if any(path in locked for path in paths):
            raise DataError(f"{name} is protected (DRM).\nSet DATA to a copy that is not.")
    for number, path in enumerate(paths):
        content = _member(archive, path, name)
        codec = page_encoding(content) or "utf-8"
        chapter = page_text([content.decode(codec, "replace").removeprefix("\ufeff")])
        yield "\n\n" * (number > 0) + chapter


def pdf_text(path: Path, name: str) -> Iterator[str]:
    """The text of a PDF in pieces, one for each page, through the optional library pypdf.

    Raises SettingsError if the library is missing, DataError for a damaged, locked or scanned file.
    """
    try:
        import pypdf
    except ImportError:
        raise SettingsError(f"{name} is a PDF, which needs a library: pip install pypdf") from None
    has_text = False
    try:
        reader = pypdf.PdfReader(path)
        for page in reader.pages:
            text = page.extract_text().encode("utf-8", "replace").decode("utf-8")
            has_text = has_text or bool(text.strip())
            yield text + "\n\n"
    except Exception as error:  # the library raises anything
        raise DataError(
            f"{name} is a PDF that can't be read: {first_line(error)}\n"
            "Save it anew without a password, or copy its text into a .txt file."
        ) from error
    if not has_text:
        raise DataError(
            f"{name} is a PDF without text: its pages are pictures.\n"
            "Have the text recognised (OCR), and set DATA to the result."
        )


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {"zip": zip_text, "pdf": pdf_text}
