"""A disk whose calls fail or are logged, and what a session leaves when each call fails in turn."""

import contextlib
import errno
import functools
import io
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import ResourceError
from storage import files as storage
from tests.faults.saving import KEEP, damaged, leftovers, observed, session, write_tree

STARTS = ("empty", "a run")
FAILING = {  # whether a call fails where the k-th is the first that does
    "once": lambda k, number: number == k,
    "from there on": lambda k, number: number >= k,
    "now and then": lambda k, number: (
        number == k or (number > k and random.Random(f"{k} {number}").random() < 0.5)
    ),
}


class Disk:
    """The os module as storage/files.py sees it while this is in use: calls fail or are logged.

    fails says by a call's number, from 1, whether it is to fail. The log has tuples: what, path
    below root, and for a write where and what, for a rename the new path. Nothing is really
    fsynced, for that would only cost time.
    """

    def __init__(
        self, root: Path, fails: Callable[[int], bool] = lambda n: False, error: int = errno.EIO
    ) -> None:
        self.root, self._fails, self._error = root, fails, error
        self.calls = self.failed = 0
        self.log: list[tuple] = []
        self._open: dict[int, str] = {}  # handle -> path

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)  # what changes nothing on a disk

    @contextlib.contextmanager
    def in_use(self) -> Iterator["Disk"]:
        """Put this in the place of what storage.files and shutil's removal call."""
        storage.os, storage.open, shutil.os = self, self.open_file, self
        try:
            yield self
        finally:
            storage.os, shutil.os = os, os
            del storage.open

    def count(self) -> None:
        """Count a call; raises OSError where it is to fail."""
        self.calls += 1
        if self._fails(self.calls):
            self.failed += 1
            raise OSError(self._error, os.strerror(self._error))

    def place(self, path: Any, dir_fd: int | None = None) -> str:
        """A path as the log has it."""
        if dir_fd is not None:
            return os.path.normpath(os.path.join(self._open[dir_fd], path))
        return os.path.relpath(path, self.root)

    # the calls, under the names that the os module gives them

    def mkdir(self, path: Any, *rest: Any) -> None:
        self.count()
        os.mkdir(path, *rest)
        self.log.append(("mkdir", self.place(path)))

    def open(self, path: Any, flags: int, *rest: Any, dir_fd: int | None = None) -> int:
        self.count()
        handle = os.open(path, flags, *rest, dir_fd=dir_fd)
        self._open[handle] = self.place(path, dir_fd)
        return handle

    def close(self, handle: int) -> None:
        os.close(handle)  # also where it fails, as Linux does
        self._open.pop(handle, None)
        self.count()

    def fsync(self, handle: int) -> None:
        self.count()
        if not self._open[handle].startswith(".."):  # the folder above root
            self.log.append(("fsync", self._open[handle]))

    def rename(self, source: Any, target: Any) -> None:
        self.count()
        os.rename(source, target)
        self.log.append(("rename", self.place(source), self.place(target)))

    def replace(self, source: Any, target: Any) -> None:
        self.rename(source, target)

    def unlink(self, path: Any, *, dir_fd: int | None = None, remove: Callable = os.unlink) -> None:
        self.count()
        remove(path, dir_fd=dir_fd)
        self.log.append(("remove", self.place(path, dir_fd)))

    rmdir = functools.partialmethod(unlink, remove=os.rmdir)

    def scandir(self, path: Any) -> Iterator[os.DirEntry]:
        self.count()
        return os.scandir(path)

    def lstat(self, path: Any, *, dir_fd: int | None = None) -> os.stat_result:
        self.count()
        return os.lstat(path, dir_fd=dir_fd)

    def open_file(self, path: Any, mode: str = "r", buffering: int = -1) -> Any:
        """What open() is for storage/files.py."""
        if mode in ("r", "rb"):
            return open(path, mode, buffering)
        assert mode == "wb"  # no session has another
        self.count()
        raw = _WatchedFile(path, self)
        self.log.append(("create", self.place(path)))
        return raw if buffering == 0 else io.BufferedWriter(raw)


class _WatchedFile(io.FileIO):
    """A file whose every write and close the disk is asked about; a failing write writes half."""

    def __init__(self, path: Any, disk: Disk) -> None:
        super().__init__(path, "w")
        self._disk = disk
        self._place = disk._open[self.fileno()] = disk.place(path)

    def write(self, content: Any) -> int:
        content = bytes(content)
        try:
            self._disk.count()
        except OSError:
            super().write(content[: len(content) // 2])
            raise
        start = self.tell()
        done = super().write(content[:300])  # a disk may take less than all
        self._disk.log.append(("write", self._place, start, content[:done]))
        return done

    def close(self) -> None:
        if not self.closed:
            self._disk._open.pop(self.fileno(), None)
            super().close()
            self._disk.count()


def fail_every_call(folder: Path) -> dict[str, Any]:
    """Fail the k-th call of a session, for every k until none fails, in each of FAILING's ways.

    Tried on an empty disk and on one with a run, rests of a killed one beside it. Afterwards the
    old or the new is there and nothing else, the failure was a ResourceError or none, and the
    next session saves and cleans up.
    """
    counts, failures = {"sessions": 0, "calls": 0}, []
    for case in itertools.product(STARTS, FAILING, (errno.EIO, errno.ENOSPC)):
        faults, n_calls = fail_each_call(folder, *case)
        counts["sessions"] += n_calls + 1
        counts["calls"] = max(counts["calls"], n_calls)
        failures += faults
    return counts | {"failures": failures}


def fail_each_call(folder: Path, start: str, mode: str, error: int) -> tuple[list[str], int]:
    """fail_every_call() for one of STARTS, one of FAILING and an errno; also how many calls."""
    prepared, now = folder / "prepared", folder / "now"
    prepared.mkdir(parents=True)
    if start == "a run":
        session(prepared, KEEP)
        half = {"model": b"half"}  # which kills have left
        checkpoints = {".tmp-1-step-00000007": half, ".del-1-step-00000001": half}
        run = {"checkpoints": checkpoints, ".tmp-1-settings.json": b"{"}
        write_tree({"run": run}, prepared)
    before, failures = observed(prepared), []
    disk, k = None, 0
    while disk is None or disk.failed:
        k += 1
        shutil.copytree(prepared, now)
        raised = None
        disk = Disk(now, functools.partial(FAILING[mode], k), error)
        try:
            with disk.in_use():
                session(now, 1)
        except Exception as caught:
            raised = caught
        where = f"calls: {start}, {mode}, {errno.errorcode[error]}, call {k}"
        failures += [f"{where}: {fault}" for fault in _faults_after(now, before, raised)]
        shutil.rmtree(now)
    shutil.rmtree(prepared)
    return failures, k - 1


def _faults_after(base: Path, before: dict[str, Any], raised: Exception | None) -> Iterator[str]:
    """What is not as it must be after a session that may have failed."""
    checkpoints, after = base / "run" / "checkpoints", observed(base)
    if raised is not None and not isinstance(raised, ResourceError):
        yield f"it raised {raised!r}"
    new = {"settings": 1 + (before["settings"] or 0), "step": before["step"] + 1}
    for what, value in after.items():
        if value != new[what] and (raised is None or value != before[what]):
            yield f"{what} is {value} after {raised!r}"
    yield from damaged(checkpoints)
    for path in base.rglob("*"):
        below = path.relative_to(base).parts
        is_known = any(part.startswith((".tmp-", ".del-", "step-")) for part in below)
        if not is_known and path.name not in ("run", "checkpoints", "settings.json"):
            yield f"{path} has appeared"
    with Disk(base).in_use():  # which is well again
        session(base, 1)
    if observed(base)["step"] != after["step"] + 1 or leftovers(base):
        yield f"the next save left {observed(base)} and {leftovers(base)}"
    names = [path.name for path in checkpoints.glob("step-*")]
    if len(names) > KEEP or damaged(checkpoints):
        yield f"the next save left {names}"
