"""What DATA names, as files and splits to read: files, folders, URLs, corpora, datasets."""

import dataclasses
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import DataError, SettingsError
from engine.settings import unknown_name
from text.corpora import CORPORA, corpus_path, fetch_address
from text.documents import DataSpec, Part, ReadingReport
from text.encodings import codec_of
from text.formats import SNIFFED_BYTES, kind_of, refusal_of, zip_is_readable

MOST_WEIGHT = 100
INVALID_NAME = 123  # Windows' error code for a path with a reserved character, such as *
_PATH_ALIASES = ("file", "files", "filename", "folder", "dir", "url", "source", "name", "data")
WIKITEXT_2 = "hf:Salesforce/wikitext:wikitext-2-raw-v1"


def parse_data(data: Any) -> DataSpec:
    """The DataSpec of DATA: a name, a list of names, or a dict with the fields of a DataSpec.

    A name in the list may be a dict with "path" and "weight". Raises SettingsError.
    """
    if not isinstance(data, dict):
        return _weighted(data, "DATA")
    _check_keys(data, ("path", "val", "field", "encoding", "separator", "bad_rows", "weight"))
    if "weight" in data:
        only = {"path": data["path"], "weight": data["weight"]}
        data = {key: value for key, value in data.items() if key != "weight"} | {"path": [only]}
    for key in ("field", "encoding", "separator"):
        if not isinstance(data.get(key, "x"), str) or not data.get(key, "x"):
            raise SettingsError(f'DATA["{key}"] is {data[key]!r}; it must be text in quotes')
    encoding = data.get("encoding")
    try:
        "".encode(encoding or "utf-8")  # unlike codecs.lookup, it refuses codecs that are not text
    except (LookupError, ValueError):
        raise SettingsError(
            f'DATA["encoding"] is {encoding!r}, which Python does not know; '
            'usual ones are "utf-8", "gb18030", "big5", "latin-1", "utf-16"'
        ) from None
    if (bad_rows := data.get("bad_rows", "refuse")) not in ("refuse", "skip"):
        raise SettingsError(f'DATA["bad_rows"] is {bad_rows!r}; it must be "refuse" or "skip"')
    return dataclasses.replace(
        _weighted(data["path"], 'DATA["path"]'),
        val=_names(data["val"], 'DATA["val"]') if "val" in data else (),
        field=data.get("field", "text"),
        encoding=encoding,
        separator=data.get("separator"),
        bad_rows=bad_rows,
    )


def _check_keys(data: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key in _PATH_ALIASES:
            raise SettingsError(f'DATA["{key}"] is unknown; the text is named in DATA["path"]')
        if key not in known:
            raise SettingsError(unknown_name(f'DATA["{key}"]', key, known))
    if "path" not in data:
        raise SettingsError('DATA is a dict without "path"; name the text there')


def _weighted(value: Any, label: str) -> DataSpec:
    """The names to train on, each with its weight."""
    entries = list(value) if isinstance(value, list | tuple) else [value]
    if not any(isinstance(entry, dict) for entry in entries):
        return DataSpec(train=_names(value, label))
    names, weights = list[str](), list[float]()
    for entry in entries:
        if not isinstance(entry, dict):
            entry = {"path": entry}
        _check_keys(entry, ("path", "weight"))
        weight = entry.get("weight", 1)
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight <= MOST_WEIGHT:
            raise SettingsError(
                f'the "weight" of {entry["path"]!r} in DATA is {weight!r}; it must be a number '
                f"above 0, and at most {MOST_WEIGHT}: how often it is seen in an epoch"
            )
        found = _names(entry["path"], f'{label}["path"]')
        names += found
        weights += [float(weight)] * len(found)
    return DataSpec(train=tuple(names), weights=tuple(weights))


def _names(value: Any, label: str) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not names or any(not isinstance(name, str | os.PathLike) for name in names):
        raise SettingsError(
            f"{label} is {value!r}; it must be a path or name in quotes, or a list of them"
        )
    names = tuple(os.fspath(name) for name in names)
    if any(not name.strip() for name in names):
        raise SettingsError(f"{label} is empty; it must be a path or name in quotes")
    return names


def find_parts(
    names: Iterable[str], cache: Path, report: ReadingReport, weights: Iterable[float] = ()
) -> list[Part]:
    """The files and splits to read, in a fixed order; downloads what is not on this machine.

    A name is a corpus, a URL, "hf:dataset:configuration", a file, a folder or a pattern with *, and
    its parts have its weight. report.passed_over lists the hidden and binary files of folders and
    patterns. Raises DataError for a name that matches nothing.
    """
    parts: list[Part] = []
    for name, weight in itertools.zip_longest(names, weights, fillvalue=1.0):
        assert isinstance(name, str), "there are no more weights than names"
        found = _parts_of(name, cache, report)
        if not found:
            raise DataError(f"{name} holds no text: {_why_nothing(report)}.")
        parts += [dataclasses.replace(part, weight=weight) for part in found]
    return parts


def _parts_of(name: str, cache: Path, report: ReadingReport) -> list[Part]:
    if name == "wikitext-2":
        name = WIKITEXT_2
    if name.startswith("hf:"):
        dataset, _, configuration = name[3:].partition(":")
        return [Part(name, None, dataset, configuration or None)]
    if name in CORPORA:
        path, notice = corpus_path(name, cache, report.stand_in)
        if notice:
            report.notices.append(notice)
            report.stood_in = True
        return [Part(path.name, path)]
    if name.startswith(("http://", "https://")):
        return [Part(name, fetch_address(name, cache))]
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, it ignores unknown users
    kind = _kind(path)
    if kind == "missing" and any(letter in name for letter in "*?["):
        return _readable(_matches(path, report), path.parent, report)
    if kind == "missing":
        raise DataError(_about_missing(path, name))
    if kind == "folder":
        return _readable(_walk(path, report), path, report)
    if kind == "other":  # a pipe or a device may never end
        raise DataError(f"{path} is no regular file.\nDATA takes files, folders and addresses.")
    return [Part(path.name, path)]


def _kind(path: Path) -> str:
    """ "file", "folder", "missing" or "other" (a pipe, a device)."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if getattr(error, "winerror", None) == INVALID_NAME:
            return "missing"
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"can't read {path}: {reason}.\nDATA names it in the settings.") from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def _matches(pattern: Path, report: ReadingReport) -> list[Path]:
    """The files that a pattern matches, sorted; hidden folders are reported instead."""
    parts = pattern.parts
    fixed = next(i for i, part in enumerate(parts) if any(letter in part for letter in "*?["))
    rest = [part if part == "**" else re.sub(r"\*+", "*", part) for part in parts[fixed:]]
    if rest[-1] == "**":
        rest.append("*")  # before Python 3.13, ** itself matches folders only
    found, hidden = [], set()
    for path in Path(*parts[:fixed]).glob("/".join(rest)):
        folders = [i for i, part in enumerate(path.parts[:-1]) if i >= fixed and part[0] == "."]
        if folders:
            hidden.add(str(Path(*path.parts[: folders[0] + 1])))
        elif not path.is_dir():
            found.append(path)
    report.passed_over += [{"name": name, "reason": "hidden"} for name in sorted(hidden)]
    return sorted(found)


def _walk(folder: Path, report: ReadingReport) -> Iterator[Path]:
    """The files below a folder, sorted; hidden folders and links to folders are reported."""

    def refuse(error: OSError) -> None:
        raise DataError(f"can't read {error.filename}: {error.strerror or error}.") from error

    for root, folders, files in os.walk(folder, onerror=refuse):
        entered = []
        for name in sorted(folders):
            path = Path(root, name)
            if name.startswith("."):
                report.passed_over.append({"name": str(path), "reason": "hidden"})
            elif path.is_symlink():  # it may form a cycle
                report.passed_over.append({"name": str(path), "reason": "link to a folder"})
            else:
                entered.append(name)
        folders[:] = entered
        yield from (Path(root, name) for name in sorted(files))


def _readable(paths: Iterable[Path], base: Path, report: ReadingReport) -> list[Part]:
    """The text files among some paths; the others are reported."""
    parts = []
    for path in paths:
        if path.name.startswith("."):
            reason = "hidden"
        elif _kind(path) != "file":
            reason = "no regular file"
        elif refused := _why_unreadable(path):
            reason = refused
        else:
            name = str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
            parts.append(Part(name, path))
            continue
        report.passed_over.append({"name": str(path), "reason": reason})
    return parts


def _why_unreadable(path: Path) -> str | None:
    """Why a file of a folder is passed over, by its content; None if it is to be read."""
    if path.suffix.lower() in (".gz", ".zst", ".parquet"):
        return None
    try:
        with path.open("rb") as file:
            start = file.read(SNIFFED_BYTES)
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}.") from error
    kind = kind_of(start, path.suffix.lower())
    if kind == "zip":
        return None if zip_is_readable(path) else "zip archive"
    if kind == "binary":
        why = (refusal_of(start, "") or "").removeprefix(" is ").partition(".")[0]
        return "binary" if why.endswith("not text") else why
    is_wide = not codec_of(start, None)[0].startswith("utf-8")
    return "binary" if kind == "text" and b"\0" in start and not is_wide else None


def _why_nothing(report: ReadingReport) -> str:
    passed = [f"{entry['name']} ({entry['reason']})" for entry in report.passed_over]
    if not passed:
        return "there is no file in it"
    more = f" and {len(passed) - 3} more" if len(passed) > 3 else ""
    return f"passed over were {', '.join(passed[:3])}{more}"


def _about_missing(path: Path, name: str) -> str:
    message = f"there is no file {path} (looked for in {Path.cwd()})."
    if not name.isprintable():  # such as "C:\new\texts", with a line feed and a tab
        return (
            f"there is no file {name!r}.\n"
            r'In Python "\" and a letter may be a sign of its own: write "C:/texts" or r"C:\texts".'
        )
    if not any(sign in name for sign in "/\\."):
        return f"{message}\n{unknown_name('The corpus name ' + repr(name), name, CORPORA)}"
    return f"{message}\nDATA takes a path, a pattern, an address or one of: {', '.join(CORPORA)}."
