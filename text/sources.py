"""Anything that DATA names, turned into text."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from engine.errors import DataError
from engine.settings import unknown_name
from text.corpora import CORPORA, corpus_path


@dataclass(frozen=True)
class Text:
    """A text and where it comes from."""

    name: str  # the file's name
    path: Path
    content: str
    notice: str | None  # what the user must know of how it was had


def load_text(data: str, cache: Path) -> Text:
    """Read what DATA names: a corpus by name, or the path of a UTF-8 text file.

    Raises DataError where there is no such text, it is not UTF-8, or it is empty.
    """
    notice = None
    if data in CORPORA:
        path, notice = corpus_path(data, cache)
    else:
        path = Path(os.path.expanduser(data))  # unlike Path's own, takes a "~nobody" as it is
    content = _decode(_read(path, data), path)
    if not content.strip():
        raise DataError(f"{path} is empty.\nDATA takes a text of at least a few sentences.")
    return Text(path.name, path, content, notice)


def _read(path: Path, data: str) -> bytes:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise DataError(_about_folder(path))
        if not stat.S_ISREG(mode):  # reading a pipe or a device might never end
            raise DataError(f"{path} is no regular file.\nDATA takes the path of a text file.")
        return path.read_bytes()
    except DataError:  # a ValueError too
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_about_missing(path, data)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"can't read {path}: {reason}.\nDATA names it in the settings.") from None


def _decode(content: bytes, path: Path) -> str:
    """The text of UTF-8 bytes, with or without a byte-order mark, line ends as they are."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not UTF-8: byte {error.start}, in line {line}, "
            f"is 0x{content[error.start]:02x}.\n"
            "DATA takes UTF-8 text; save the file as UTF-8 in your editor."
        ) from None


def _about_folder(path: Path) -> str:
    texts = sorted(p.name for p in path.iterdir() if p.suffix in (".txt", ".md"))
    if not texts:
        return f"{path} is a folder without a text file.\nDATA takes the path of a text file."
    listed = ", ".join(texts[:5]) + (", ..." if len(texts) > 5 else "")
    return f"{path} is a folder.\nDATA takes one text file; in this folder are: {listed}"


def _about_missing(path: Path, data: str) -> str:
    message = f"there is no file {path} (looked for in {Path.cwd()})."
    if "/" not in data and "." not in data:
        return f"{message}\n{unknown_name('The corpus name ' + repr(data), data, CORPORA)}"
    return f"{message}\nDATA takes a path or one of: {', '.join(CORPORA)}."
