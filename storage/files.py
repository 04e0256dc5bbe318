"""How things reach the disk: every durable write of the project goes through this file.

A file is written beside its place, fsynced and renamed over it; a folder likewise, sealed by a
manifest with the sha256 of each file. The rename is the only commit, so whatever stops the
program, what was there before or what is new can be read, and nothing in between.
"""

import contextlib
import errno
import hashlib
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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from engine.errors import BusyError, CheckpointError, ResourceError

MANIFEST = "manifest.json"
SETTINGS, DATA, SUMMARY = "settings.json", "data.json", "summary.json"  # of a run's folder
_LONGEST_MANIFEST = 1 << 20  # bytes; what is longer was not written here
_BLOCK = 4 << 20  # bytes that are hashed at a time
_HASHING_THREADS = 4
_LONE_SURROGATES = "backslashreplace"  # in a file's name, say; the result is JSON's own escape

PATIENCE_S = 5.0  # how long Windows may refuse to rename or remove what another program holds open
TIDY_S = 0.5  # the same for what nobody misses: a later start removes it
# Windows' numbers for it: access denied, sharing violation, lock violation, folder not empty (yet)
HELD_OPEN = (5, 32, 33, 145)
# what Windows takes for a device, whatever follows a dot
RESERVED = re.compile(r'[/\\<>:"|?*\x00-\x1f]')  # signs that Windows allows in no name
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9¹²³]) *(\..*)?", re.I | re.S)
T = TypeVar("T")


class NewFile:
    """A file that appears under its name whole and durable, or not at all.

    Use it as `with NewFile(path) as file: file.write(...)`. The bytes go to a temporary file
    beside the target, are fsynced, and then renamed over it; an error in the block, or discard(),
    leaves what was there. Raises ResourceError where the disk is full, read-only or gone, or
    where another program holds the old file open for longer than patience_s: the old file is then
    intact, or, where only the folder's own fsync failed, the new one may not outlast a power cut.
    """

    def __init__(
        self, path: str | os.PathLike, *, durable: bool = True, patience_s: float = PATIENCE_S
    ) -> None:
        self.path = Path(path)
        self._durable = durable
        self._patience_s = patience_s
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
                _patiently(_move, os.replace, self._beside, self.path, patience_s=self._patience_s)
                if self._durable:
                    _fsync_folder(self.path.parent)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            with contextlib.suppress(OSError):  # on a full disk even closing fails
                self._file.close()
            discard(self._beside)  # nothing where it was renamed


def write_atomically(
    path: str | os.PathLike, content: bytes, *, patience_s: float = PATIENCE_S
) -> None:
    """Replace the file at path by content, as NewFile does."""
    with NewFile(path, patience_s=patience_s) as file:
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
    """Make the folder and its parents, durably; ResourceError where it can't be."""
    path = Path(path)
    try:
        if path.is_dir():
            with contextlib.suppress(OSError):  # whoever made it may have been killed before this
                _fsync_folder(path.parent)
            return
        if path.parent != path:  # a drive that is not there has none
            make_folder(path.parent)
        with contextlib.suppress(FileExistsError):  # another process was quicker, or a file
            os.mkdir(path)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _fsync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def make_new_folder(path: str | os.PathLike) -> bool:
    """Make the folder and its parents, durably; False where it is already there.

    Raises ResourceError where the disk won't have it.
    """
    make_folder(Path(path).parent)
    try:
        os.mkdir(path)
        _fsync_folder(Path(path).parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise _cannot_write(path, error) from error
    return True


def fsync_file(path: str | os.PathLike) -> None:
    """Bring what was appended to a file onto the disk; ResourceError where that fails."""
    try:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


def rename_folder(source: str | os.PathLike, target: str | os.PathLike) -> bool:
    """Give a finished folder its name; False where another process has made that one first.

    The files in it must be durable already. Raises ResourceError where the disk won't have it.
    """
    try:
        _patiently(_move, os.rename, source, target)
    except OSError as error:
        if Path(target).is_dir():
            return False
        raise _cannot_write(target, error) from error
    try:
        _fsync_folder(Path(target).parent)
    except OSError as error:
        raise _cannot_write(target, error) from error
    return True


def rename_file(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Give a file another name, that of a file too, at once but not durably.

    Raises ResourceError where the disk won't have it.
    """
    try:
        _patiently(_move, os.replace, source, target)
    except OSError as error:
        raise _cannot_write(target, error) from error


# ------------------------------------------------------------------------- sealed folders


class NewFolder:
    """A folder of files that appears under its name whole, durable and sealed, or not at all.

    Use it as `with NewFolder(path, facts) as folder: folder.write(name, chunks)`. The files go to
    a temporary folder beside the target; at the end of the block a manifest with the facts and
    each file's size and sha256 joins them, and the folder is renamed. path's parent must be there
    and path itself not. An error in the block leaves nothing behind. Raises ResourceError where
    the disk won't take it.
    """

    def __init__(self, path: str | os.PathLike, facts: dict[str, Any]) -> None:
        self.path = Path(path)
        self._facts = facts
        self._files: dict[str, dict[str, Any]] = {}
        self._beside = self.path.with_name(f".tmp-{os.getpid()}-{self.path.name}")

    def __enter__(self) -> "NewFolder":
        try:
            os.mkdir(self._beside)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        return self

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file of the folder and fsync it."""
        digest, size = hashlib.sha256(), 0
        try:
            # unbuffered: the chunks of a checkpoint are whole tensors
            with open(self._beside / name, "wb", buffering=0) as file:
                for chunk in chunks:
                    rest = memoryview(chunk)
                    digest.update(rest)
                    size += len(rest)
                    while rest:
                        rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self.path / name, error) from error
        self._files[name] = {"bytes": size, "sha256": digest.hexdigest()}

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.write(MANIFEST, [_seal(self._facts | {"files": self._files})])
                _fsync_folder(self._beside)
                _patiently(_move, os.rename, self._beside, self.path)
                _fsync_folder(self.path.parent)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            discard(self._beside)  # nothing where it was renamed


def verify_folder(
    path: str | os.PathLike, required: Iterable[str] = (), *, others: bool = True
) -> dict[str, Any]:
    """The facts of a folder that NewFolder made, after every file was held against its sha256.

    Raises CheckpointError that names the first file at fault and what is wrong with it; a
    required file must be among those that were sealed. others=False leaves out the rest of them.
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
    """A manifest: its content, and the sha256 of that."""
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
        intact = content == _seal(facts)  # every byte of it, blanks too
        for file in facts["files"].values():
            intact &= isinstance(file["bytes"], int) and isinstance(file["sha256"], str)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged")
    if not all(_is_plain(name) for name in names):
        raise CheckpointError(f"{path} names files outside of its folder")
    return facts


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not any(c in "/\\:\x00" for c in name)


def _verify_file(path: Path, expected: dict[str, Any]) -> None:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is no regular file")
        if found.st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path} has {found.st_size:,} bytes instead of {expected['bytes']:,}"
            )
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    if digest.hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged (its sha256 is not the manifest's)")


def set_aside(path: str | os.PathLike) -> Path:
    """Rename something damaged to .bad-..., where nothing will read it; returns its new path."""
    path = Path(path)
    aside, count = path.with_name(f".bad-{path.name}"), 1
    while os.path.lexists(aside):
        count += 1
        aside = path.with_name(f".bad-{path.name}-{count}")
    try:
        _patiently(_move, os.rename, path, aside)
        _fsync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return aside


def remove_folder(path: str | os.PathLike) -> bool:
    """Remove a folder: first its name, so that no half of it is ever seen under that.

    False where the disk refuses that, or another program holds a file in it open: it is then
    whole. Where it refuses the rest, that waits for remove_orphans().
    """
    doomed = Path(path).with_name(f".del-{os.getpid()}-{Path(path).name}")
    try:
        _patiently(_move, os.rename, path, doomed)
    except FileNotFoundError:  # another was quicker
        return True
    except OSError:
        return False
    discard(doomed)
    return True


def remove_file(path: str | os.PathLike) -> None:
    """Remove a file where it is there; ResourceError where the disk refuses."""
    try:
        _patiently(Path(path).unlink, True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def discard(path: str | os.PathLike) -> None:
    """Remove a file or folder that nobody misses; what the disk refuses of it stays."""
    is_folder = os.path.isdir(path) and not os.path.islink(path)
    with contextlib.suppress(OSError):  # it is gone; or the next start tries again
        _patiently(shutil.rmtree if is_folder else os.unlink, path, patience_s=TIDY_S)


def remove_orphans(folder: str | os.PathLike) -> None:
    """Remove what killed programs left half written or half removed; the caller has the lock."""
    for pattern in (".tmp-*", ".del-*"):
        for orphan in sorted(Path(folder).glob(pattern)):
            discard(orphan)


def require_space(folder: str | os.PathLike, n_bytes: int, what: str) -> None:
    """Raise ResourceError where the disk that holds a folder has less than n_bytes free."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if free < n_bytes:
        raise ResourceError(
            f"{what} takes {n_bytes / 1e6:,.1f} MB, but the disk of {folder} has "
            f"{free / 1e6:,.1f} MB free.\nFree some space there, or set OUTPUT_DIR to another disk."
        )


# ------------------------------------------------------------------------------- the lock

_LOCKED: set[Path] = set()  # by this process; the system's lock knows processes only


class FolderLock:
    """An exclusive lock on a folder, which ends with its process however that ends.

    Use it as `with FolderLock(folder):`. The lock is the system's own, on the file .lock; who
    holds it is told in a second file. Raises BusyError that names the holder, ResourceError where
    the disk won't have the files.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).resolve()
        self._owner_path = self.folder / ".lock-owner.json"

    def __enter__(self) -> "FolderLock":
        if self.folder in _LOCKED:
            raise self._busy()
        try:
            self._file = open(self.folder / ".lock", "ab")
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        try:
            self._take(self._file)
        except BaseException:
            self._file.close()
            raise
        _LOCKED.add(self.folder)
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            write_json(self._owner_path, owner)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _LOCKED.discard(self.folder)
        self._file.close()  # which ends the lock

    def require_free(self) -> None:
        """Raise BusyError where somebody holds the lock at this moment; writes nothing."""
        if self.folder in _LOCKED:
            raise self._busy()
        with contextlib.suppress(OSError), open(self.folder / ".lock", "r+b") as file:
            self._take(file)

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

    lockf and not flock: a forked loader worker would inherit the latter and outlive its owner.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --------------------------------------------------------------------- Windows' own ways


def _patiently(call: Callable[..., T], *arguments: Any, patience_s: float = PATIENCE_S) -> T:
    """Make a call again for as long as Windows refuses it because a program holds a file open.

    There a file that is open can be neither renamed nor replaced nor removed, nor a folder that
    it is in. Virus scanners and indexers hold each fresh file for milliseconds, a viewer its file
    for hours. What is refused for longer than patience_s is raised, and any other error at once.
    """
    until, pause_s = time.monotonic() + patience_s, 0.01
    while True:
        try:
            return call(*arguments)
        except OSError as error:
            left_s = until - time.monotonic()
            if not _is_held_open(error) or left_s <= 0:
                raise
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, 0.1)


def _is_held_open(error: OSError) -> bool:
    return getattr(error, "winerror", None) in HELD_OPEN  # no other system sets it


def _move(move: Callable[[Any, Any], None], source: Any, target: Any) -> None:
    """os.rename or os.replace; Windows calls a folder in the way of a file "access denied"."""
    try:
        move(source, target)
    except OSError as error:
        if _is_held_open(error) and os.path.isdir(target):  # no waiting helps
            reason = os.strerror(errno.EISDIR)
            raise IsADirectoryError(errno.EISDIR, reason, str(target)) from error
        raise


def is_portable_name(name: str) -> bool:
    """Whether a file or folder of this name can be made on every system.

    Windows takes some names for devices ("con", "nul.txt"), has signs of its own use, and drops
    dots and blanks at a name's end.
    """
    return (
        not RESERVED.search(name)
        and name[-1:] not in ("", ".", " ")
        and not _DEVICES.fullmatch(name)
    )


# ----------------------------------------------------------------------------------- JSON


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
    reason = str(error.strerror or error).removesuffix(".")
    if _is_held_open(error):
        reason += " (another program may have it open)"
        advice = (
            "Close what may have it open, such as a viewer; let virus scanners and cloud drives "
            "leave\nthe folder out, or choose another one. Then start again."
        )
    return ResourceError(f"can't write {path}: {reason}.\n{advice}")
