"""Survival: what is left after kills, failing disks, power cuts and two owners of one folder.

    python -m benchmarks.survival --kills 10000 --runs 20 --seed 0

storm     processes that save through storage/files.py, killed at random moments (--kills)
calls     every single call to the system failed once, and from there on (SQLite's method)
power     the recorded writes cut off at every place, with what was not fsynced lost
locks     the lock on a run folder under kills, forks and a crowd
training  whole runs of main.py, killed and started again until they are done (--runs kills), held
          against an undisturbed run, bit by bit

--only names a part, --folder a disk to work on. Every failure is printed with the seed that chose
it; the exit code is then 1. The figures go to benchmarks/results/ where all parts ran. Needs
os.fork, so Linux or macOS.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import json
import mmap
import os
import random
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.console import say, use_utf8
from engine.errors import BusyError, CheckpointError, ResourceError
from storage import files as storage
from storage.files import (
    FolderLock,
    NewFolder,
    make_folder,
    remove_folder,
    remove_orphans,
    verify_folder,
    write_json,
)

REPOSITORY = Path(__file__).resolve().parent.parent
KEEP = 2  # folders, as many as checkpoints are kept
SIZES = {"model": 60_000, "optimizer": 120_000, "state": 400}  # bytes
TINY = {"model": 24, "optimizer": 40, "state": 8}
Tree = dict[str, Any]  # name -> bytes of a file, or the Tree of a folder


# ------------------------------------------------------------------ saving, as a run does it


def save(
    folder: Path,
    step: int,
    acknowledge: Callable[[int], None] = lambda step: None,
    sizes: dict[str, int] = SIZES,
) -> None:
    """Commit a folder and remove the ones before the last KEEP, as storage/checkpoint.py does."""
    with NewFolder(folder / f"step-{step:08d}", {"step": step}) as new:
        for name, size in sizes.items():
            content = random.Random(f"{step} {name}").randbytes(size)
            new.write(name, [content[: size // 2], memoryview(content)[size // 2 :]])
    acknowledge(step)
    for path in step_folders(folder)[:-KEEP]:
        remove_folder(path)


def session(base: Path, n_saves: int, acknowledge: Callable[[str, int], None]) -> None:
    """What a run writes from its start on: its folder, its settings and n_saves folders more."""
    run = base / "run"
    make_folder(run)
    remove_orphans(run)
    number = 1 + (settings_number(run) or 0)
    write_json(run / "settings.json", {"number": number})
    acknowledge("settings", number)
    make_folder(run / "checkpoints")
    remove_orphans(run / "checkpoints")
    for _ in range(n_saves):
        step = newest_whole(run / "checkpoints") + 1
        save(run / "checkpoints", step, lambda step: acknowledge("step", step), TINY)


def step_folders(folder: Path) -> list[Path]:
    """All that has a final name, oldest first."""
    return sorted(folder.glob("step-*"))


def newest_whole(folder: Path) -> int:
    """The step of the newest folder that can be verified, 0 where none can."""
    for path in reversed(step_folders(folder)):
        with contextlib.suppress(CheckpointError):
            facts = verify_folder(path)
            if path.name == f"step-{facts['step']:08d}":
                return facts["step"]
    return 0


def damaged(folder: Path) -> list[str]:
    """What is wrong with folders under a final name."""
    faults = []
    for path in step_folders(folder):
        try:
            verify_folder(path)
        except CheckpointError as error:
            faults.append(str(error))
    return faults


def settings_number(run: Path) -> int | None:
    """The number in settings.json; None where the file is not there, ValueError where damaged."""
    try:
        return json.loads((run / "settings.json").read_bytes())["number"]
    except FileNotFoundError:
        return None


def leftovers(folder: Path) -> list[str]:
    """Everything half written or half removed below a folder."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob(".*")
        if path.name.startswith((".tmp-", ".del-"))
    ]


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A temporary folder for what needs no disk, in memory where the system has a place there."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def forked(work: Callable[[], None]) -> int:
    """Do work in a forked process, which ends with it; returns the process's id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


# ------------------------------------------------------------------------------------ storm


def kill_storm(kills: int, seed: int, folder: Path, most_s: float = 0.04) -> dict[str, Any]:
    """Kill processes that save into one folder, at random within most_s seconds.

    The seconds count from the start for every other kill, and from the first folder that was
    acknowledged for those between, which is when an old one is removed.
    Counts what the kills left half done, and the failures: a folder under its final name that is
    not whole, or an acknowledged one that is lost.
    """
    chance = random.Random(seed)
    counts = {"kills": 0, "acknowledged": 0, "half_written": 0, "half_removed": 0}
    counts |= {"corrupt": 0, "lost": 0}
    failures: list[str] = []
    started_at = time.perf_counter()
    make_folder(folder)
    acknowledged = 0
    for number in range(1, kills + 1):
        saves_first = number % 2 == 0
        # what is removed is gone in no time
        delay_s = most_s * chance.random() ** (3 if saves_first else 1)
        steps, ended_itself = _save_until_killed(folder, delay_s, saves_first)
        where = f"storm: seed {seed}, kill {number}"
        if ended_itself:
            failures.append(f"{where}: the process ended before it was killed")
            break
        acknowledged = max([acknowledged, *steps])
        counts["kills"] += 1
        counts["acknowledged"] += len(steps)
        counts["half_written"] += any(name.startswith(".tmp-") for name in leftovers(folder))
        counts["half_removed"] += any(name.startswith(".del-") for name in leftovers(folder))
        faults, newest = damaged(folder), newest_whole(folder)
        counts["corrupt"] += bool(faults)
        counts["lost"] += newest < acknowledged
        failures += [f"{where}: {fault}" for fault in faults]
        if newest < acknowledged:
            failures.append(f"{where}: step {acknowledged} is lost, the newest is {newest}")
    remove_orphans(folder)
    if leftovers(folder):
        failures.append(f"storm: seed {seed}: {leftovers(folder)} are still there")
    seconds = time.perf_counter() - started_at
    return counts | {"kills_per_s": round(kills / seconds, 1), "failures": failures}


def _save_until_killed(folder: Path, delay_s: float, saves_first: bool) -> tuple[list[int], bool]:
    """The steps that a process acknowledged before it was killed; whether it ended by itself."""
    readable, writable = os.pipe()

    def work() -> None:
        os.close(readable)
        remove_orphans(folder)
        step = newest_whole(folder)
        while True:
            step += 1
            save(folder, step, lambda step: os.write(writable, step.to_bytes(8, "little")))

    pid = forked(work)
    os.close(writable)
    if saves_first:
        select.select([readable], [], [], 30)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with open(readable, "rb") as pipe:
        content = pipe.read()
    steps = [int.from_bytes(content[i : i + 8], "little") for i in range(0, len(content), 8)]
    return steps, not os.WIFSIGNALED(status)


# ------------------------------------------------------------- the system's calls, in our hands


class Disk:
    """The os module as storage/files.py sees it while this is in use: calls fail or are logged.

    fails says by a call's number, from 1, whether it is to fail. The log has tuples: what, path
    below root, and for a write where and what, for a rename the new path. Nothing is really
    fsynced, for that would only cost time.
    """

    def __init__(
        self,
        root: Path,
        fails: Callable[[int], bool] = lambda number: False,
        error: int = errno.EIO,
    ) -> None:
        self.root = root
        self.calls = 0
        self.failed = 0
        self.log: list[tuple] = []
        self._fails = fails
        self._error = error
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

    def acknowledge(self, what: str, number: int) -> None:
        """Note in the log that something counts as saved from here on."""
        self.log.append(("acknowledged", what, number))

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

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self.count()
        os.unlink(path, dir_fd=dir_fd)
        self.log.append(("remove", self.place(path, dir_fd)))

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self.count()
        os.rmdir(path, dir_fd=dir_fd)
        self.log.append(("remove", self.place(path, dir_fd)))

    def scandir(self, path: Any) -> Iterator[os.DirEntry]:
        self.count()
        return os.scandir(path)

    def lstat(self, path: Any, *, dir_fd: int | None = None) -> os.stat_result:
        self.count()
        return os.lstat(path, dir_fd=dir_fd)

    def open_file(self, path: Any, mode: str = "r", buffering: int = -1, **text: Any) -> Any:
        """What open() is for storage/files.py."""
        raw_mode = mode.replace("b", "")
        if raw_mode == "r":
            return open(path, mode, buffering, **text)
        self.count()
        raw = _WatchedFile(path, raw_mode, self)
        self._open[raw.fileno()] = self.place(path)
        if raw_mode in ("w", "a"):
            self.log.append(("create", self.place(path), raw_mode == "w"))
        if buffering == 0:
            return raw
        file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return file if "b" in mode else io.TextIOWrapper(file, **text)


class _WatchedFile(io.FileIO):
    """A file whose every write and close the disk is asked about; a failing write writes half."""

    def __init__(self, path: Any, mode: str, disk: Disk) -> None:
        super().__init__(path, mode)
        self._disk, self._place = disk, disk.place(path)
        self._appends = "a" in mode

    def write(self, content: Any) -> int:
        content = bytes(content)
        try:
            self._disk.count()
        except OSError:
            super().write(content[: len(content) // 2])
            raise
        start = os.fstat(self.fileno()).st_size if self._appends else self.tell()
        done = super().write(content[:300])  # a disk may take less than all
        self._disk.log.append(("write", self._place, start, content[:done]))
        return done

    def close(self) -> None:
        if not self.closed:
            self._disk._open.pop(self.fileno(), None)
            super().close()
            self._disk.count()


# ------------------------------------------------------------------------------------ calls


STARTS = ("empty", "a run")
FAILING = {  # whether a call fails where the k-th is the first that does
    "once": lambda k, number: number == k,
    "from there on": lambda k, number: number >= k,
    "now and then": lambda k, number: (
        number == k or (number > k and random.Random(f"{k} {number}").random() < 0.5)
    ),
}


def fail_every_call(folder: Path) -> dict[str, Any]:
    """Fail the k-th call of a session, for every k until none fails, in each of FAILING's ways.

    Tried on an empty disk and on one with a run, rests of a killed one beside it. Afterwards the
    old or the new is there and nothing else, the failure was a ResourceError or none, and the
    next session saves and cleans up.
    """
    counts, failures = {"sessions": 0, "calls": 0}, []
    for start in STARTS:
        for mode in FAILING:
            for error in (errno.EIO, errno.ENOSPC):
                faults, n_calls = fail_each_call(folder, start, mode, error)
                counts["sessions"] += n_calls + 1
                counts["calls"] = max(counts["calls"], n_calls)
                failures += faults
    return counts | {"failures": failures}


def fail_each_call(folder: Path, start: str, mode: str, error: int) -> tuple[list[str], int]:
    """fail_every_call() for one of STARTS, one of FAILING and an errno; also how many calls."""
    prepared, now = folder / "prepared", folder / "now"
    _prepare(prepared, with_run=start == "a run")
    failures: list[str] = []
    disk, k = None, 0
    while disk is None or disk.failed:
        k += 1
        shutil.copytree(prepared, now)
        before, raised = _observed(now), None
        disk = Disk(now, functools.partial(FAILING[mode], k), error)
        try:
            with disk.in_use():
                session(now, 1, lambda what, number: None)
        except Exception as caught:
            raised = caught
        where = f"calls: {start}, {mode}, {errno.errorcode[error]}, call {k}"
        failures += [f"{where}: {fault}" for fault in _faults_after(now, before, raised)]
        shutil.rmtree(now)
    shutil.rmtree(prepared)
    return failures, k - 1


def _prepare(base: Path, with_run: bool) -> None:
    base.mkdir(parents=True)
    if not with_run:
        return
    session(base, KEEP, lambda what, number: None)
    for name in (".tmp-1-step-00000007", ".del-1-step-00000001"):
        (base / "run" / "checkpoints" / name).mkdir()
        (base / "run" / "checkpoints" / name / "model").write_bytes(b"half")
    (base / "run" / ".tmp-1-settings.json").write_bytes(b"{")


def _observed(base: Path) -> dict[str, int | None]:
    """What of a session can be read; a file that can't be is -1."""
    try:
        number = settings_number(base / "run")
    except (ValueError, KeyError):
        number = -1
    return {"settings": number, "step": newest_whole(base / "run" / "checkpoints")}


def _faults_after(base: Path, before: dict[str, Any], raised: Exception | None) -> Iterator[str]:
    """What is not as it must be after a session that may have failed."""
    checkpoints, after = base / "run" / "checkpoints", _observed(base)
    if raised is not None and not isinstance(raised, ResourceError):
        yield f"it raised {raised!r}"
    old = {"settings": before["settings"], "step": before["step"]}
    new = {"settings": 1 + (before["settings"] or 0), "step": before["step"] + 1}
    for what, value in after.items():
        if value != new[what] and (raised is None or value != old[what]):
            yield f"{what} is {value} after {raised!r}"
    yield from damaged(checkpoints)
    expected = {"run", "checkpoints", "settings.json", "manifest.json", *TINY}
    for path in base.rglob("*"):
        below = path.relative_to(base).parts
        if not any(part.startswith((".tmp-", ".del-", "step-")) for part in below) and (
            path.name not in expected
        ):
            yield f"{path} has appeared"
    with Disk(base).in_use():  # which is well again
        session(base, 1, lambda what, number: None)
    if _observed(base)["step"] != after["step"] + 1 or leftovers(base):
        yield f"the next save left {_observed(base)} and {leftovers(base)}"
    if len(step_folders(checkpoints)) > KEEP or damaged(checkpoints):
        yield f"the next save left {[path.name for path in step_folders(checkpoints)]}"


# ------------------------------------------------------------------------------------ power

# what a power cut leaves of everything that was not fsynced:
MODELS = (
    "dropped",  # nothing
    "empty",  # names, but no content
    "zeroed",  # names and lengths, but zeros for content
    "mixed",  # for each file and each folder by chance: all, or nothing
)


class Replay:
    """A file system in memory that knows for each file and folder what of it is on the disk."""

    def __init__(self) -> None:
        self._root = _Folder()

    def apply(self, entry: tuple) -> bool:
        """Do what an entry of a Disk's log says; False where that changes nothing."""
        what, path, *rest = entry
        if what == "acknowledged":
            return False
        if what == "fsync":
            return self._find(path).fsync()
        parent, name = self._find(os.path.dirname(path)), os.path.basename(path)
        if what == "mkdir":
            parent.now[name] = _Folder()
        elif what == "create":
            file = parent.now.setdefault(name, _File())
            file.now = b"" if rest[0] else file.now
        elif what == "write":
            start, content = rest
            file = parent.now[name]
            file.now = file.now[:start] + content + file.now[start + len(content) :]
        elif what == "remove":
            del parent.now[name]
        elif what == "rename":
            (target,) = rest
            moved = parent.now.pop(name)
            self._find(os.path.dirname(target)).now[os.path.basename(target)] = moved
        else:
            raise ValueError(f"the log has {what}")
        return True

    def tree(self) -> Tree:
        """All files as programs see them while there is power."""
        return self._root.left("kept", random.Random(0))

    def after_power_loss(self, model: str, chance: random.Random) -> Tree:
        """What a power cut leaves, by one of MODELS."""
        return self._root.left(model, chance)

    def _find(self, path: str) -> Any:
        node = self._root
        for name in Path(path).parts:
            node = node.now[name]
        return node


class _File:
    def __init__(self) -> None:
        self.now = self.synced = b""

    def fsync(self) -> bool:
        before, self.synced = self.synced, self.now
        return before != self.synced

    def left(self, model: str, chance: random.Random) -> bytes:
        if model == "kept" or (model == "mixed" and chance.random() < 0.5):
            return self.now
        if model == "zeroed" and self.now != self.synced:
            return bytes(len(self.now))
        return self.synced


class _Folder:
    def __init__(self) -> None:
        self.now: dict[str, _File | _Folder] = {}
        self.synced: dict[str, _File | _Folder] = {}

    def fsync(self) -> bool:
        before, self.synced = self.synced, dict(self.now)
        return before != self.synced

    def left(self, model: str, chance: random.Random) -> Tree:
        lost = model == "dropped" or (model == "mixed" and chance.random() < 0.5)
        entries = self.synced if lost else self.now
        return {name: node.left(model, chance) for name, node in sorted(entries.items())}


def write_tree(tree: Tree, folder: Path) -> None:
    """Write a tree into a new folder."""
    folder.mkdir(parents=True)
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def read_tree(folder: Path) -> Tree:
    """A folder's files as a tree."""
    return {
        path.name: read_tree(path) if path.is_dir() else path.read_bytes()
        for path in sorted(folder.iterdir())
    }


def record_session(base: Path, n_saves: int) -> list[tuple]:
    """The log of a session in a folder, with what it acknowledged."""
    disk = Disk(base)
    with disk.in_use():
        session(base, n_saves, disk.acknowledge)
    return disk.log


class PowerLoss:
    """Cuts the power at places of a log and looks at what is left, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[bytes, dict[str, Any]] = {}  # many places leave the same
        self.cuts = 0

    def first_failure(
        self, log: list[tuple], *, without: int | None = None, seed: int = 0, since: int = 0
    ) -> str | None:
        """Where a cut after more than `since` entries loses what was acknowledged, None if nowhere.

        The entry with the number `without` is taken for not done.
        """
        replay, chance = Replay(), random.Random(seed)
        acknowledged: dict[str, int] = {}
        for place, entry in enumerate([("acknowledged", "nothing", 0), *log]):
            if entry[0] == "acknowledged":
                acknowledged[entry[1]] = entry[2]
            elif place - 1 != without:
                replay.apply(entry)
            if place <= since:
                continue
            for model in MODELS:
                left = self._observe(replay.after_power_loss(model, chance))
                for what, found in left.items():
                    if (found or 0) < acknowledged.get(what, 0):
                        return (
                            f"power: seed {seed}, {model}, cut after entry {place} {entry[:2]}: "
                            f"{what} {acknowledged.get(what, 0)} was acknowledged, {found} is left"
                        )
        return None

    def _observe(self, tree: Tree) -> dict[str, Any]:
        self.cuts += 1
        key = hashlib.sha256(repr(tree).encode()).digest()
        if key not in self._seen:
            base = self._folder / "left"
            write_tree(tree, base)
            self._seen[key] = _observed(base)
            shutil.rmtree(base)
        return self._seen[key]


def lose_power(seed: int, folder: Path, n_saves: int = 4) -> dict[str, Any]:
    """Cut the power everywhere in a session; in a second one after a kill; without each fsync.

    The last must lose something each time: an fsync that can be left out, or a replay that sees
    nothing, is a failure too.
    """
    failures = []
    (folder / "recorded").mkdir(parents=True)
    log, loss = record_session(folder / "recorded", n_saves), PowerLoss(folder)
    whole = Replay()
    changing = [whole.apply(entry) for entry in log]
    if whole.tree() != read_tree(folder / "recorded"):
        failures.append("power: the log is not all that was done")
    failures += filter(None, [loss.first_failure(log, seed=seed)])
    first = log[: log.index(("acknowledged", "step", 2))]
    failures += failures_after_kills(first, loss, folder, seed)
    # one that finds nothing to do is there for what a killed process left
    fsyncs = [i for i, entry in enumerate(log) if entry[0] == "fsync" and changing[i]]
    failures += [
        f"power: nothing is lost without entry {place} {log[place]}"
        for place in fsyncs
        if loss.first_failure(log, without=place, seed=seed) is None
    ]
    counts = {"entries": len(log), "fsyncs": len(fsyncs), "cuts": loss.cuts}
    return counts | {"failures": failures}


def failures_after_kills(
    log: list[tuple], loss: PowerLoss, folder: Path, seed: int = 0
) -> list[str]:
    """Kill a session after each entry of its log, let a second one save, and cut its power."""
    failures = []
    replay = Replay()
    for place, entry in enumerate(log, start=1):
        replay.apply(entry)
        base = folder / "killed"
        write_tree(replay.tree(), base)
        both = log[:place] + record_session(base, 1)
        shutil.rmtree(base)
        found = loss.first_failure(both, seed=seed, since=place)
        failures += [f"killed after entry {place} {entry[:2]}, then {found}"] if found else []
    return failures


# ------------------------------------------------------------------------------------ locks


class Rival:
    """A process that tries to take a folder's lock whenever it is asked to.

    It is to be started before the process that asks holds the lock itself.
    """

    def __init__(self, folder: Path) -> None:
        asked, self._ask = os.pipe()
        self._answer, answered = os.pipe()

        def work() -> None:
            os.close(self._ask)
            while os.read(asked, 1):
                os.write(answered, (_try_to_lock(folder) + "\n").encode())

        self.pid = forked(work)
        os.close(asked)
        os.close(answered)
        self._answers = open(self._answer, encoding="utf-8")  # noqa: SIM115

    def refusal(self) -> str:
        """The message of the BusyError that it met, or "" where it got the lock."""
        os.write(self._ask, b"?")
        return json.loads(self._answers.readline())

    def __enter__(self) -> "Rival":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._ask)
        self._answers.close()
        os.waitpid(self.pid, 0)


def _try_to_lock(folder: Path) -> str:
    try:
        with FolderLock(folder):
            return json.dumps("")
    except BusyError as error:
        assert error.exit_code == 7
        return json.dumps(str(error))


@contextlib.contextmanager
def owner_of(folder: Path, n_workers: int = 0) -> Iterator[tuple[int, list[int]]]:
    """A process that holds the lock, with forked children that sleep; yields their ids.

    At the end all are killed, the owner too where it is still there.
    """
    readable, writable = os.pipe()

    def work() -> None:
        with FolderLock(folder):
            workers = [forked(lambda: time.sleep(600)) for _ in range(n_workers)]
            os.write(writable, (json.dumps(workers) + "\n").encode())
            time.sleep(600)

    owner = forked(work)
    os.close(writable)
    with open(readable, encoding="utf-8") as pipe:
        workers = json.loads(pipe.readline())
    try:
        yield owner, workers
    finally:
        for pid in (*workers, owner):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(owner, 0)


def second_owner_is_told_of_the_first(folder: Path) -> bool:
    """Whether a folder in use is refused with the process and the machine that use it."""
    with Rival(folder) as rival, owner_of(folder) as (owner, _):
        return f"process {owner} on {socket.gethostname()}" in rival.refusal()


def dead_owner_holds_nothing(folder: Path) -> bool:
    """Whether the lock is free at once when its owner was killed."""
    with Rival(folder) as rival, owner_of(folder) as (owner, _):
        held = rival.refusal() != ""
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        return held and rival.refusal() == ""


def workers_neither_hold_nor_end_the_lock(folder: Path) -> bool:
    """Whether two forked children matter neither when one ends first nor when they outlive it."""
    with Rival(folder) as rival, owner_of(folder, n_workers=2) as (owner, workers):
        os.kill(workers.pop(), signal.SIGTERM)
        time.sleep(0.05)
        held = rival.refusal() != ""
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        os.kill(workers[0], 0)  # it is still there
        return held and rival.refusal() == ""


def second_lock_in_a_process_leaves_the_first(folder: Path) -> bool:
    """Whether a process is refused a lock that it holds, and holds it still."""
    with Rival(folder) as rival:
        with FolderLock(folder):
            refused = _try_to_lock(folder) != json.dumps("")
            held = str(os.getpid()) in rival.refusal()
        return refused and held and rival.refusal() == ""


def exactly_one_of_a_crowd_wins(folder: Path, n: int = 50) -> bool:
    """Whether of n processes that start at once one gets the lock and all others are refused."""
    gate, opened = os.pipe()
    results, result = os.pipe()
    done, finish = os.pipe()

    def work() -> None:
        for handle in (opened, finish):
            os.close(handle)
        os.read(gate, 1)  # until the gate's other end is closed everywhere
        try:
            with FolderLock(folder):
                os.write(result, b"1")
                os.read(done, 1)
        except BusyError:
            os.write(result, b"0")

    crowd = [forked(work) for _ in range(n)]
    os.close(opened)
    answers = b""
    while len(answers) < n and select.select([results], [], [], 30)[0]:
        answers += os.read(results, n)
    os.close(finish)
    codes = [os.waitpid(pid, 0)[1] for pid in crowd]
    for handle in (gate, results, result, done):
        os.close(handle)
    return answers.count(b"1") == 1 and answers.count(b"0") == n - 1 and not any(codes)


LOCK_CHECKS = (
    second_owner_is_told_of_the_first,
    dead_owner_holds_nothing,
    workers_neither_hold_nor_end_the_lock,
    second_lock_in_a_process_leaves_the_first,
    exactly_one_of_a_crowd_wins,
)


def contend_for_locks(folder: Path) -> dict[str, Any]:
    """All checks of the lock, each in a folder of its own."""
    failures = []
    for check in LOCK_CHECKS:
        make_folder(folder / check.__name__)
        if not check(folder / check.__name__):
            failures.append(f"locks: {check.__name__.replace('_', ' ')}: no")
    return {"checks": len(LOCK_CHECKS), "failures": failures}


# --------------------------------------------------------------------------------- training

PHASES = ("other", "step", "save", "evaluation", "sampling")
MOST_KILLS_OF_A_RUN = 5
# how often a phase must have been entered in a process before the kill; 40 steps have 9 saves
LATEST = {"step": 12, "save": 3, "evaluation": 4, "sampling": 2}
SETTINGS = {
    "DATA": "text.txt",
    "TOKENIZER": "char",
    "CUSTOM_MODE": True,
    "custom_params": {
        "max_steps": 40,
        "batch_size": 4,
        "max_length": 32,
        "eval_freq": 7,
        "eval_iter": 2,
        "save_every": 5,
        "learning_rate": 0.2,  # far too high: the best weights come early, and must be kept
        "schedule": "constant",
        "start_context": "the ",
        "model_overrides": {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1},
    },
    "sampling_params": {"max_new_tokens": 20},
    "DEVICE": "cpu",
    "PRECISION": "fp32",
    "SEED": 1,
    "OUTPUT_DIR": ".",
    "RUN_NAME": "run",
}


class PhaseBoard:
    """Memory shared with a forked run: the phase that it is in, and how often and long in each."""

    def __init__(self) -> None:
        memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
        self._now = memory[:8].cast("q")
        self._counts = memory[64:128].cast("q")
        self._seconds = memory[128:192].cast("d")

    def clear(self) -> None:
        """Begin anew, for another process."""
        self._now[0] = 0
        for i in range(len(PHASES)):
            self._counts[i], self._seconds[i] = 0, 0.0

    @property
    def phase(self) -> str:
        """The phase that the process is in, or was in when it ended."""
        return PHASES[self._now[0]]

    def count(self, phase: str) -> int:
        """How often the process has entered a phase."""
        return self._counts[PHASES.index(phase)]

    def mean_s(self, phase: str) -> float:
        """How long the process was in a phase each time, on average."""
        return self._seconds[PHASES.index(phase)] / max(1, self.count(phase))

    def marking(self, phase: str, function: Callable) -> Callable:
        """The function, with its phase marked while it runs."""
        index = PHASES.index(phase)

        @functools.wraps(function)
        def marked(*arguments: Any, **options: Any) -> Any:
            self._now[0] = index
            self._counts[index] += 1
            entered_at = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._seconds[index] += time.perf_counter() - entered_at
                self._now[0] = 0

        return marked


def kill_training(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill runs of main.py in every phase, start them again until done, compare with one left
    alone."""
    import_what_runs_need()
    text = (REPOSITORY / "corpus" / "sample-en.txt").read_bytes()[:3000]
    board = PhaseBoard()
    cache = folder / "cache"

    def new_run(name: str) -> Path:
        work = folder / name
        work.mkdir(parents=True)
        (work / "text.txt").write_bytes(text)
        lines = [f"{key} = {value!r}\n" for key, value in SETTINGS.items()]
        (work / "settings.py").write_text("".join(lines), encoding="utf-8")
        return work

    undisturbed = new_run("undisturbed")
    began_at = time.perf_counter()
    code = run_to_its_end(undisturbed, cache, board)
    whole_s = time.perf_counter() - began_at
    if code != 0:
        tail = (undisturbed / "log.txt").read_text(encoding="utf-8")[-2000:]
        return {"failures": [f"training: the undisturbed run ended with {code}: {tail}"]}
    expected = outcome(undisturbed / "run")
    mean_s = {phase: board.mean_s(phase) for phase in LATEST}

    chance = random.Random(seed)
    hits, told, failures, n_runs = dict.fromkeys(PHASES, 0), [], [], 0
    while len(told) < kills and not failures:
        n_runs += 1
        work, killed_here, code = new_run(f"run-{n_runs}"), 0, None
        while code is None:
            aim = min(PHASES, key=lambda phase: (hits[phase], chance.random()))
            if len(told) == kills or killed_here == MOST_KILLS_OF_A_RUN:
                code = run_to_its_end(work, cache, board)
                break
            nth = chance.randint(1, LATEST.get(aim, 1))
            delay_s = chance.random() * mean_s.get(aim, whole_s)
            code = run_and_kill(work, cache, board, aim, nth, delay_s)
            if code is None:
                killed_here += 1
                hits[board.phase] += 1
                _plant_orphans(work / "run")
                told.append(f"run {n_runs}: {board.phase}")
        where = f"training: seed {seed}, run {n_runs}, {len(told)} kills so far"
        failures += [f"{where}: {fault}" for fault in _faults_of(work, code, expected)]
    counts = {"kills": len(told), "runs": n_runs, "phases": hits, "each_kill": told}
    return counts | {"undisturbed_s": round(whole_s, 2), "failures": failures}


def _plant_orphans(run: Path) -> None:
    """Leave in a run's folders what a kill may leave there, for few kills come so unluckily."""
    for folder in (run, run / "checkpoints", run / "best"):
        if folder.is_dir():
            (folder / ".tmp-1-planted").write_bytes(b"half")


def import_what_runs_need() -> None:
    """Import once what every run would; nothing here may start a thread before the forks."""
    import torch

    import environment  # noqa: F401

    with contextlib.suppress(ImportError):
        import torch._dynamo  # for a second, where the first optimizer is built
    with contextlib.suppress(ImportError):
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    torch.set_num_threads(1)


def start_run(work: Path, cache: Path, board: PhaseBoard) -> int:
    """Start main.py on work/settings.py in a process group of its own; returns its id."""
    board.clear()
    pid = forked(lambda: _be_a_run(work, cache, board))
    with contextlib.suppress(OSError):  # it does the same; whoever is first
        os.setpgid(pid, pid)
    return pid


def _be_a_run(work: Path, cache: Path, board: PhaseBoard) -> None:
    import environment
    import generation
    import train
    from storage.checkpoint import CheckpointStore
    from training import learner

    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    sys.stdout = sys.stderr = open(work / "log.txt", "a", encoding="utf-8")  # noqa: SIM115
    os.chdir(work)
    environment.CACHE = cache
    learner.take_step = board.marking("step", learner.take_step)
    learner.mean_loss = board.marking("evaluation", learner.mean_loss)
    CheckpointStore.save = board.marking("save", CheckpointStore.save)
    train.Trainer.sample = board.marking("sampling", train.Trainer.sample)
    # main.py, which takes it from there, has not been imported yet
    generation.generate = board.marking("sampling", generation.generate)
    sys.argv = ["main.py", "settings.py"]
    try:
        runpy.run_path(str(REPOSITORY / "main.py"), run_name="__main__")
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(ended.code or 0)


def run_to_its_end(work: Path, cache: Path, board: PhaseBoard) -> int:
    """Run main.py and leave it alone; returns its exit code."""
    _, status = os.waitpid(start_run(work, cache, board), 0)
    return os.waitstatus_to_exitcode(status)


def run_and_kill(
    work: Path, cache: Path, board: PhaseBoard, aim: str, nth: int, delay_s: float
) -> int | None:
    """Run main.py and kill it delay_s after it entered a phase for the nth time.

    Aim "other" counts the delay from the start. Returns None where it was killed, its exit code
    where it ended before. Raises RuntimeError where it leaves a process behind.
    """
    pid = start_run(work, cache, board)
    while aim in LATEST and board.count(aim) < nth:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.0002)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, 0)
        raise RuntimeError(f"process group {pid} has outlived its run")
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def outcome(run: Path) -> dict[str, Any]:
    """All that a finished run leaves but for times and names, by file."""
    last = max((run / "checkpoints").glob("step-*"))
    state = json.loads((last / "state.json").read_bytes())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    for row in rows:
        row.pop("train/tok_per_sec", None)
    state["journal"]["history"].pop("elapsed_s")
    summary = json.loads((run / "summary.json").read_bytes())
    summary.pop("elapsed_s")
    steps = [row for row in rows if "train/loss" in row]
    weights = sorted(run.glob("*/step-*/*.safetensors"))
    return {
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
        "weights": {str(path.relative_to(run)): _sha256(path) for path in weights},
        "random": state.pop("random"),
        # json's floats are exact: repr and back; hex only shows it
        "losses": [(row["step"], row["train/loss"].hex()) for row in steps],
        "steps": steps,
        "evaluations": [row for row in rows if "val/loss" in row],
        "history": state["journal"]["history"],
        "counters": [state["steps"], state["journal"]["tokens"]],
        "plan": {name: state[name] for name in ("schedule", "total_steps", "scaler", "best_step")},
        "samples.md": (run / "samples.md").read_text(encoding="utf-8"),
        "summary.json": summary,
    }


def _faults_of(work: Path, code: int, expected: dict[str, Any]) -> Iterator[str]:
    if code != 0:
        tail = (work / "log.txt").read_text(encoding="utf-8")[-2000:]
        yield f"it ended with {code}: {tail}"
        return
    found = outcome(work / "run")
    for what, value in expected.items():
        if found[what] != value:
            yield f"{what} differ: {found[what]!r:.300} instead of {value!r:.300}"
    if [step for step, _ in found["losses"]] != list(range(1, len(found["losses"]) + 1)):
        yield f"steps are missing or twice: {[step for step, _ in found['losses']]}"
    if leftovers(work / "run"):
        yield f"{leftovers(work / 'run')} are still there"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------- together


def main(arguments: list[str] | None = None) -> int:
    """Run all parts, or the one that --only names; returns 1 where anything failed."""
    use_utf8()
    options = _options(arguments)
    if not hasattr(os, "fork"):
        say("benchmarks.survival needs os.fork: Linux or macOS")
        return 1
    results: dict[str, Any] = {"seed": options.seed}
    on_disk = tempfile.TemporaryDirectory(dir=options.folder)
    with on_disk as name, folder_in_memory() as memory:
        folder = Path(name)
        # what imports torch comes last: a process is forked faster without it
        parts = {
            "storm": lambda: kill_storm(options.kills, options.seed, folder / "storm"),
            "calls": lambda: fail_every_call(memory / "calls"),
            "power": lambda: lose_power(options.seed, memory / "power"),
            "locks": lambda: contend_for_locks(folder / "locks"),
            "training": lambda: kill_training(options.runs, options.seed, folder / "training"),
        }
        for part in parts if options.only is None else [options.only]:
            began_at = time.perf_counter()
            results[part] = parts[part]() | {"seconds": round(time.perf_counter() - began_at, 1)}
            _show(part, results[part])
    if options.only is None:
        _write(results)
    return int(any(result["failures"] for name, result in results.items() if name != "seed"))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survival", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kills", type=int, default=1000, help="of the storm")
    parser.add_argument("--runs", type=int, default=20, help="kills of whole training runs")
    parser.add_argument("--seed", type=int, default=0, help="of every moment that is chosen")
    parts = ("storm", "calls", "power", "locks", "training")
    parser.add_argument("--only", choices=parts, help="one part; no figures are written")
    parser.add_argument("--folder", help="where to work; none: the system's temporary folder")
    return parser.parse_args(arguments)


def _show(part: str, result: dict[str, Any]) -> None:
    shown = {name: value for name, value in result.items() if name not in ("failures", "each_kill")}
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
    say(f"{part:9} {'FAILED' if result['failures'] else 'ok'}: {said}")
    for number, where in enumerate(result.get("each_kill", []), start=1):
        say(f"{'':10}kill {number} of {where}")
    for failure in result["failures"]:
        say(f"{'':10}{failure}")


def _write(results: dict[str, Any]) -> None:
    import torch

    from benchmarks.report import machine, write_results

    device = torch.device("cpu")
    say(f"written to {write_results('survival', device, {'machine': machine(device)} | results)}")


if __name__ == "__main__":
    sys.exit(main())
