"""Saves as a run makes them, what can be read of them afterwards, and a storm of kills."""

import contextlib
import itertools
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from storage.files import (
    NewFolder,
    make_folder,
    remove_folder,
    remove_orphans,
    verify_folder,
    write_json,
)

KEEP = 2  # folders, as many as checkpoints are kept
SIZES = {"model": 60_000, "optimizer": 120_000, "state": 400}  # bytes
Tree = dict[str, Any]  # name -> bytes of a file, or the Tree of a folder
TINY = {"model": 24, "optimizer": 40, "state": 8}


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


def session(
    base: Path, n_saves: int, acknowledge: Callable[[str, int], None] = lambda what, number: None
) -> None:
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


def write_tree(tree: Tree, folder: Path) -> None:
    """Write a tree into a folder, which may be there."""
    folder.mkdir(parents=True, exist_ok=True)
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


def step_folders(folder: Path) -> list[Path]:
    """All that has a final name, oldest first."""
    return sorted(folder.glob("step-*"))


def fault_of(path: Path) -> str | None:
    """What is wrong with a folder under a final name, None where it is whole."""
    try:
        facts = verify_folder(path)
    except CheckpointError as error:
        return str(error)
    return None if path.name == f"step-{facts['step']:08d}" else f"{path} holds {facts}"


def damaged(folder: Path) -> list[str]:
    """What is wrong with folders under a final name."""
    return [fault for path in step_folders(folder) if (fault := fault_of(path))]


def newest_whole(folder: Path) -> int:
    """The step of the newest folder that can be verified, 0 where none can."""
    newest_first = reversed(step_folders(folder))
    return next((int(path.name[5:]) for path in newest_first if not fault_of(path)), 0)


def settings_number(run: Path) -> int | None:
    """The number in settings.json; None where the file is not there, ValueError where damaged."""
    try:
        return json.loads((run / "settings.json").read_bytes())["number"]
    except FileNotFoundError:
        return None


def observed(base: Path) -> dict[str, int | None]:
    """What of a session can be read; a file that can't be is -1."""
    try:
        number = settings_number(base / "run")
    except (ValueError, KeyError):
        number = -1
    return {"settings": number, "step": newest_whole(base / "run" / "checkpoints")}


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
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def kill_storm(kills: int, seed: int, folder: Path, most_s: float = 0.04) -> dict[str, Any]:
    """Kill processes that save into one folder, at random within most_s seconds.

    The seconds count from the start for every other kill, and from the first folder that was
    acknowledged for those between, which is when an old one is removed.
    Counts what the kills left half done, and the failures: a folder under its final name that is
    not whole, or an acknowledged one that is lost.
    """
    chance = random.Random(seed)
    names = ("kills", "acknowledged", "half_written", "half_removed", "corrupt", "lost")
    counts = dict.fromkeys(names, 0)
    failures: list[str] = []
    started_at = time.perf_counter()
    make_folder(folder)
    acknowledged = 0
    for number in range(1, kills + 1):
        saves_first = number % 2 == 0
        # what is removed is gone in no time
        delay_s = most_s * chance.random() ** (3 if saves_first else 1)
        where = f"storm: seed {seed}, kill {number}"
        steps, ended_itself = _save_until_killed(folder, delay_s, saves_first)
        if ended_itself:
            failures.append(f"{where}: the process ended before it was killed")
            break
        acknowledged = max([acknowledged, *steps])
        left, faults, newest = leftovers(folder), damaged(folder), newest_whole(folder)
        failures += [f"{where}: {fault}" for fault in faults]
        if newest < acknowledged:
            failures.append(f"{where}: step {acknowledged} is lost, the newest is {newest}")
        counts["kills"] += 1
        counts["acknowledged"] += len(steps)
        counts["half_written"] += any(name.startswith(".tmp-") for name in left)
        counts["half_removed"] += any(name.startswith(".del-") for name in left)
        counts["corrupt"] += bool(faults)
        counts["lost"] += newest < acknowledged
    remove_orphans(folder)
    if left := leftovers(folder):
        failures.append(f"storm: seed {seed}: {left} are still there")
    seconds = time.perf_counter() - started_at
    return counts | {"kills_per_s": round(kills / seconds, 1), "failures": failures}


def _save_until_killed(folder: Path, delay_s: float, saves_first: bool) -> tuple[list[int], bool]:
    """The steps that a process acknowledged before it was killed; whether it ended by itself."""
    readable, writable = os.pipe()

    def work() -> None:
        os.close(readable)
        remove_orphans(folder)
        for step in itertools.count(newest_whole(folder) + 1):
            save(folder, step, lambda step: os.write(writable, step.to_bytes(8, "little")))

    pid = forked(work)
    os.close(writable)
    if saves_first:
        select.select([readable], [], [], 120)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with open(readable, "rb") as pipe:
        steps = [int.from_bytes(number, "little") for number in iter(lambda: pipe.read(8), b"")]
    return steps, not os.WIFSIGNALED(status)
