"""Durable writes: every one of the project goes through this file.

A file is written to a temporary name beside its target, fsynced and renamed over it. A folder is
written the same way, with a manifest that has the sha256 of each file. The rename is the only
commit: whatever stops the program, a reader finds the old content or the new, never a mixture.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import numbers
import os
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import BusyError, CheckpointError, ResourceError

MANIFEST = "manifest.json"
SETTINGS, DATA, SUMMARY = "settings.json", "data.json", "summary.json"  # of a run's folder
STOP = "stop"  # a file of this name in the folder of a run that trains asks it to stop
_LONGEST_MANIFEST = 1 << 20  # bytes; this file writes none that is longer
_HASHING_THREADS = 4
_LOOK_S = 0.05  # longer than is_held() and require_free() hold a lock to find out
_LONE_SURROGATES = "backslashreplace"  # the error handler: its result is JSON's own escape

PATIENCE_S = 5.0  # how long to retry a rename or removal while another program holds a file open
TIDY_S = 0.5  # the same for temporary files: a later start removes them
# Windows' error codes: access denied, sharing violation, lock violation, folder not empty (yet)
HELD_OPEN = (5, 32, 33, 145)
RESERVED = re.compile(r'[/\\<>:"|?*\x00-\x1f]')  # characters that Windows allows in no file name
# names that Windows takes for a device, whatever follows the dot
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³]) *(\..*)?", re.I | re.S)
StrPath = str | os.PathLike[str]


@contextlib.contextmanager
def _writing(path: StrPath) -> Iterator[None]:
    """Raise ResourceError, naming path, in place of an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from error


class NewFile:
    """A file that appears under its name complete and durable, or not at all.

    Use it as `with NewFile(path) as file: file.write(...)`. An error in the block, or discard(),
    leaves the old file as it is. Raises ResourceError if the disk is full, read-only or gone, or
    if another program holds the old file open for longer than patience_s. The old file is then
    intact; if only the fsync of the folder failed, a power cut may undo the rename.
    """

    def __init__(
        self, path: StrPath, *, durable: bool = True, patience_s: float = PATIENCE_S
    ) -> None:
        self.path = Path(path)
        self._durable = durable
        self._patience_s = patience_s
        # several threads may write the same file
        owner = f"{os.getpid()}-{threading.get_ident()}"
        self._beside = self.path.with_name(f".tmp-{owner}-{self.path.name}")
        self._keep = True

    def __enter__(self) -> "NewFile":
        with _writing(self.path):
            self._file = open(self._beside, "wb")
        return self

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        with _writing(self.path):
            self._file.write(content)

    def discard(self) -> None:
        """Leave the old file as it is."""
        self._keep = False

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None and self._keep:
                with _writing(self.path):
                    self._file.flush()
                    if self._durable:
                        os.fsync(self._file.fileno())
                    self._file.close()
                    _patiently(os.replace, self._beside, self.path, patience_s=self._patience_s)
                    if self._durable:
                        _fsync_folder(self.path.parent)
        finally:
            with contextlib.suppress(OSError):  # on a full disk even close() fails
                self._file.close()
            discard(self._beside)  # after the rename it no longer exists


def write_atomically(path: StrPath, content: bytes, *, patience_s: float = PATIENCE_S) -> None:
    """Replace the file at path by content, as NewFile does."""
    with NewFile(path, patience_s=patience_s) as file:
        file.write(content)


def write_json(path: StrPath, value: object) -> None:
    """Write value as indented UTF-8 JSON, atomically; NaN and infinities become null."""
    write_atomically(path, (to_json(value, indent=2) + "\n").encode("utf-8", _LONE_SURROGATES))


def append_json_lines(path: StrPath, rows: list[dict[str, Any]]) -> None:
    """Append one JSON object per line to a log, in place; ResourceError if the disk refuses."""
    with (
        _writing(path),
        open(path, "a", encoding="utf-8", errors=_LONE_SURROGATES, newline="\n") as file,
    ):
        file.write("".join(to_json(row) + "\n" for row in rows))


def make_folder(path: StrPath) -> None:
    """Make the folder and its parents, durably; ResourceError if the disk refuses."""
    path = Path(path)
    with _writing(path):
        if path.is_dir():
            with contextlib.suppress(OSError):  # its maker may have been killed before the fsync
                _fsync_folder(path.parent)
            return
        if path.parent != path:  # the root of a missing drive has no parent
            make_folder(path.parent)
        with contextlib.suppress(FileExistsError):  # another process was faster, or it is a file
            os.mkdir(path)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _fsync_folder(path.parent)


def make_new_folder(path: StrPath) -> bool:
    """Make the folder and its parents, durably; False if it already exists.

    Raises ResourceError if the disk refuses.
    """
    make_folder(Path(path).parent)
    with _writing(path):
        try:
            os.mkdir(path)
        except FileExistsError:
            return False
        _fsync_folder(Path(path).parent)
    return True


def fsync_file(path: StrPath) -> None:
    """Flush what was appended to a file to the disk; ResourceError if that fails."""
    with _writing(path), open(path, "rb+") as file:
        os.fsync(file.fileno())


def rename_folder(source: StrPath, target: StrPath) -> bool:
    """Rename a finished folder, durably; False if another process made the target first.

    The files in it must be durable already. Raises ResourceError if the disk refuses.
    """
    with _writing(target):
        try:
            _patiently(os.rename, source, target)
        except OSError:
            if Path(target).is_dir():
                return False
            raise
        _fsync_folder(Path(target).parent)
    return True


def rename_file(source: StrPath, target: StrPath) -> None:
    """Rename a file over another, atomically but not durably; ResourceError if the disk refuses."""
    with _writing(target):
        _patiently(os.replace, source, target)


# ------------------------------------------------------------------------- sealed folders


class NewFolder:
    """A folder of files that appears under its name complete and durable, or not at all.

    Use it as `with NewFolder(path, facts) as folder: folder.write(name, chunks)`. The end of the
    block adds a manifest with the facts and each file's size and sha256, but none where facts is
    None. path's parent must exist, and path must not. An error in the block leaves nothing behind.
    Raises ResourceError if the disk refuses.
    """

    def __init__(self, path: StrPath, facts: dict[str, Any] | None) -> None:
        self.path = Path(path)
        self._facts = facts
        self._files: dict[str, dict[str, Any]] = {}
        self._beside = self.path.with_name(f".tmp-{os.getpid()}-{self.path.name}")

    def __enter__(self) -> "NewFolder":
        with _writing(self.path):
            os.mkdir(self._beside)
        return self

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file of the folder and fsync it."""
        digest, size = hashlib.sha256(), 0
        # unbuffered: a chunk of a checkpoint is an entire tensor
        with _writing(self.path / name), open(self._beside / name, "wb", buffering=0) as file:
            for chunk in chunks:
                rest = memoryview(chunk)
                digest.update(rest)
                size += len(rest)
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        self._files[name] = {"bytes": size, "sha256": digest.hexdigest()}

    def link(self, name: str, other: StrPath, chunks: Iterable[bytes | memoryview]) -> bool:
        """Share a file of another such folder that has these contents, as a hard link.

        Returns False, with nothing done, if it has others, is damaged, or can't be linked.
        """
        digest, size = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
        expected = {"bytes": size, "sha256": digest.hexdigest()}
        try:
            _verify_file(Path(other, name), expected)
            os.link(Path(other, name), self._beside / name)
        except (CheckpointError, OSError):  # some file systems have no links
            return False
        self._files[name] = expected
        return True

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                if self._facts is not None:
                    self.write(MANIFEST, [_seal(self._facts | {"files": self._files})])
                with _writing(self.path):
                    _fsync_folder(self._beside)
                    _patiently(os.rename, self._beside, self.path)
                    _fsync_folder(self.path.parent)
        finally:
            discard(self._beside)  # after the rename it no longer exists


def verify_folder(
    path: StrPath, required: Iterable[str] = (), *, others: bool = True
) -> dict[str, Any]:
    """Check a NewFolder's files against their sha256, and return its facts.

    Raises CheckpointError that names the first bad file and its fault, or a required file that the
    manifest lacks. others=False checks the required files only.
    """
    facts = _read_manifest(Path(path))
    files = facts.pop("files")
    if absent := [name for name in required if name not in files]:
        raise CheckpointError(f"{Path(path, MANIFEST)} does not name {absent[0]}")
    if not others:
        files = {name: files[name] for name in required}
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        list(pool.map(lambda name: _verify_file(Path(path, name), files[name]), files))
    return facts


def _seal(content: dict[str, Any]) -> bytes:
    """A manifest's bytes: its content, and the sha256 of that content."""
    digest = hashlib.sha256(to_json(content).encode()).hexdigest()
    return (to_json({"sha256": digest, "content": content}, indent=2) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LONGEST_MANIFEST:
            raise CheckpointError(f"{path} is not a manifest")
        content = path.read_bytes()
        facts = json.loads(content)["content"]
        names = list(facts["files"])
        intact = content == _seal(facts)  # every byte, including white space
        for file in facts["files"].values():
            intact &= isinstance(file["bytes"], int) and isinstance(file["sha256"], str)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged")
    if any(name in ("", ".", "..") or set(name) & set("/\\:\0") for name in names):
        raise CheckpointError(f"{path} names files outside of its folder")
    return facts


def _verify_file(path: Path, expected: dict[str, Any]) -> None:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is no regular file")
        if found.st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path} has {found.st_size:,} bytes instead of {expected['bytes']:,}"
            )
        with open(path, "rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    if digest.hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged (its sha256 is not the manifest's)")


def set_aside(path: StrPath) -> Path:
    """Rename a damaged file or folder to .bad-..., which nothing reads; returns its new path."""
    path = Path(path)
    names = (f".bad-{path.name}" + f"-{count}" * (count > 1) for count in itertools.count(1))
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.parent / name))
    with _writing(path):
        _patiently(os.rename, path, aside)
        _fsync_folder(path.parent)
    return aside


def remove_folder(path: StrPath) -> bool:
    """Rename a folder, then remove it, so that nobody sees it half removed.

    Returns False if the rename fails, say because another program holds a file in it open: the
    folder is then complete. If the removal fails, remove_orphans() finishes it.
    """
    doomed = Path(path).with_name(f".del-{os.getpid()}-{Path(path).name}")
    try:
        _patiently(os.rename, path, doomed)
    except FileNotFoundError:  # another process was faster
        return True
    except OSError:
        return False
    discard(doomed)
    return True


def remove_file(path: StrPath) -> None:
    """Remove a file if it exists; ResourceError if the disk refuses."""
    with _writing(path):
        _patiently(lambda file: Path(file).unlink(missing_ok=True), path)


def discard(path: StrPath) -> None:
    """Remove a temporary file or folder; leave what the disk refuses to remove."""
    is_folder = os.path.isdir(path) and not os.path.islink(path)
    with contextlib.suppress(OSError):  # it is gone, or the next start tries again
        _patiently(shutil.rmtree if is_folder else os.unlink, path, patience_s=TIDY_S)


def remove_orphans(folder: StrPath) -> None:
    """Remove what killed programs left half written or half removed; the caller holds the lock."""
    for pattern in (".tmp-*", ".del-*"):
        for orphan in sorted(Path(folder).glob(pattern)):
            discard(orphan)


def require_space(folder: StrPath, n_bytes: int, what: str) -> None:
    """Raise ResourceError if the disk that holds a folder has less than n_bytes free."""
    with _writing(folder):
        free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ResourceError(
            f"{what} takes {n_bytes / 1e6:,.1f} MB, but the disk of {folder} has "
            f"{free / 1e6:,.1f} MB free.\nFree some space there, or set OUTPUT_DIR to another disk."
        )


# ------------------------------------------------------------------------------- the lock

_LOCKED: set[Path] = set()  # by this process: the system's lock does not exclude its own process


class FolderLock:
    """An exclusive lock on a folder, which ends with its process however that ends.

    Use it as `with FolderLock(folder):`. It is the system's lock on the file .lock; a second file
    names the holder. Raises BusyError that names the holder, ResourceError if the disk refuses.
    """

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder).resolve()
        self._owner_path = self.folder / ".lock-owner.json"

    def __enter__(self) -> "FolderLock":
        if self.folder in _LOCKED:
            raise self._busy()
        with _writing(self.folder):
            self._file = open(self.folder / ".lock", "ab")
        try:
            try:
                self._take(self._file)
            except BusyError:  # or another program has just looked whether it is free
                time.sleep(_LOOK_S)
                self._take(self._file)
            _LOCKED.add(self.folder)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            write_json(self._owner_path, owner)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _LOCKED.discard(self.folder)
        self._file.close()  # which releases the lock

    def require_free(self) -> None:
        """Raise BusyError if somebody holds the lock at this moment; writes nothing."""
        if self.folder in _LOCKED:
            raise self._busy()
        with contextlib.suppress(OSError), open(self.folder / ".lock", "r+b") as file:
            self._take(file)

    def is_held(self) -> bool:
        """Whether somebody is known to hold the lock at this moment; writes nothing."""
        try:
            self.require_free()
        except BusyError:
            return True
        except ResourceError:  # a disk without locks
            return False
        return False

    def holder(self) -> int | None:
        """A number of the lock's last holder, which no other one has; None if there was none."""
        try:
            return self._owner_path.stat().st_mtime_ns
        except OSError:
            return None

    def _take(self, file: BinaryIO) -> None:
        try:
            _lock(file.fileno())
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise self._busy() from None
            raise _cannot_write(self.folder / ".lock", error) from error

    def _busy(self) -> BusyError:
        try:
            owner = json.loads(self._owner_path.read_bytes())
            holder = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            holder = "another process, which has only just begun"
        return BusyError(
            f"{self.folder} is in use by {holder}.\n"
            "Wait for its end. A run beside it needs another RUN_NAME, or none and RESUME = False."
        )


def _lock(handle: int) -> None:
    """Take the system's lock on an open file, or raise OSError at once.

    lockf and not flock: a forked loader worker inherits a flock, and may outlive its parent.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # Windows only
    else:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --------------------------------------------------------------- files that are held open


def _patiently(
    call: Callable[..., object], *paths: StrPath, patience_s: float = PATIENCE_S
) -> None:
    """Call os.rename or the like; retry for up to patience_s while Windows refuses.

    Windows neither renames, replaces nor removes an open file or a folder that holds one. Virus
    scanners and indexers open each new file for milliseconds, a viewer keeps its file for hours.
    Any other error is raised at once.
    """
    until, pause_s = time.monotonic() + patience_s, 0.01
    while True:
        try:
            call(*paths)
            return
        except OSError as error:
            if _is_held_open(error) and any(map(os.path.isdir, paths[1:])):  # retries can't help
                reason = os.strerror(errno.EISDIR)
                raise IsADirectoryError(errno.EISDIR, reason, str(paths[1])) from error
            left_s = until - time.monotonic()
            if not _is_held_open(error) or left_s <= 0:
                raise
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, 0.1)


def _is_held_open(error: OSError) -> bool:
    return getattr(error, "winerror", None) in HELD_OPEN  # no other system sets it


def is_portable_name(name: str) -> bool:
    """Whether every system can make a file or folder of this name.

    Windows takes some names for devices ("con", "nul.txt"), reserves some characters, and drops
    dots and spaces at the end of a name.
    """
    return (
        not RESERVED.search(name)
        and name[-1:] not in ("", ".", " ")
        and not _DEVICES.fullmatch(name)
    )


# ----------------------------------------------------------------------------------- JSON


def to_json(value: object, indent: int | None = None) -> str:
    """Standard JSON: non-ASCII characters as they are, NaN and infinities as null."""
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
    if os.name == "nt":  # Windows can't open a folder to fsync it
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: StrPath, error: OSError) -> ResourceError:
    advice = "Choose another folder, or make this one such that it can be written."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Free some space there, or choose another folder."
    reason = str(error.strerror or error).removesuffix(".")
    if _is_held_open(error):
        reason += " (another program may have it open)"
        advice = (
            "Close what may have it open, such as a viewer; let virus scanners and cloud drives "
            "leave\nthe folder out, or choose another one. Then start again."
        )
    return ResourceError(f"can't write {path}: {reason}.\n{advice}")
