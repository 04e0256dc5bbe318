"""How things reach the disk: every durable write of the project goes through this file."""

import contextlib
import errno
import json
import math
import numbers
import os
import threading
from pathlib import Path

from engine.errors import ResourceError

_LONE_SURROGATES = "backslashreplace"  # in a file's name, say; the result is JSON's own escape


class NewFile:
    """A file that appears under its name whole and durable, or not at all.

    Use it as `with NewFile(path) as file: file.write(...)`. The bytes go to a temporary file
    beside the target, are fsynced, and then renamed over it; an error in the block, or discard(),
    leaves what was there. Raises ResourceError where the disk is full, read-only or gone: the old
    file is then intact, or, where only the folder's own fsync failed, the new one may not outlast
    a power cut.
    """

    def __init__(self, path: str | os.PathLike, *, durable: bool = True) -> None:
        self.path = Path(path)
        self._durable = durable
        # threads, too, may write the same file at once
        owner = f"{os.getpid()}-{threading.get_ident()}"
        self._beside = self.path.with_name(f".tmp-{owner}-{self.path.name}")
        self._keep = True

    def __enter__(self) -> "NewFile":
        try:
            self._file = open(self._beside, "wb")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        return self

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        try:
            self._file.write(content)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def discard(self) -> None:
        """Leave the file that was there as it is."""
        self._keep = False

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None and self._keep:
                self._file.flush()
                if self._durable:
                    os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._beside, self.path)
                if self._durable:
                    _fsync_folder(self.path.parent)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            with contextlib.suppress(OSError):  # on a full disk even closing fails
                self._file.close()
            with contextlib.suppress(OSError):  # renamed, or in a folder that has gone
                os.unlink(self._beside)


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Replace the file at path by content, as NewFile does."""
    with NewFile(path) as file:
        file.write(content)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write value as indented UTF-8 JSON, atomically; numbers that are not finite become null."""
    write_atomically(path, (to_json(value, indent=2) + "\n").encode("utf-8", _LONE_SURROGATES))


def append_json_lines(path: str | os.PathLike, rows: list[dict]) -> None:
    """Append one JSON object a line to a log; only a log may grow in place.

    Raises ResourceError where the disk can't take it.
    """
    try:
        with open(path, "a", encoding="utf-8", errors=_LONE_SURROGATES, newline="\n") as file:
            file.write("".join(to_json(row) + "\n" for row in rows))
    except OSError as error:
        raise _cannot_write(path, error) from error


def make_folder(path: str | os.PathLike) -> None:
    """Make the folder and its parents where they are missing; ResourceError where it can't be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def make_new_folder(path: str | os.PathLike) -> bool:
    """Make the folder and its parents; False where it is already there.

    Raises ResourceError where the disk won't have it.
    """
    make_folder(Path(path).parent)
    try:
        Path(path).mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise _cannot_write(path, error) from error
    return True


def rename_folder(source: str | os.PathLike, target: str | os.PathLike) -> bool:
    """Give a finished folder its name; False where another process has made that one first.

    The files in it must be durable already. Raises ResourceError where the disk won't have it.
    """
    try:
        os.rename(source, target)
    except OSError as error:
        if Path(target).is_dir():
            return False
        raise _cannot_write(target, error) from error
    try:
        _fsync_folder(Path(target).parent)
    except OSError as error:
        raise _cannot_write(target, error) from error
    return True


def to_json(value: object, indent: int | None = None) -> str:
    """JSON text that every reader takes: UTF-8 kept readable, NaN and infinities as null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: object) -> object:
    if isinstance(value, numbers.Real) and not isinstance(value, int):  # NumPy's too
        if isinstance(value, numbers.Integral):
            return int(value)
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows can't open a folder, and has no fsync for one
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: str | os.PathLike, error: OSError) -> ResourceError:
    advice = "Choose another folder, or make this one such that it can be written."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Free some space there, or choose another folder."
    return ResourceError(f"can't write {path}: {error.strerror or error}.\n{advice}")
