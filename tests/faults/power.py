"""Power cuts: a file system in memory that forgets what was not fsynced, cut at every place."""

import copy
import hashlib
import os
import random
import shutil
from pathlib import Path
from typing import Any

from tests.faults.disk import Disk
from tests.faults.saving import Tree, observed, read_tree, session, write_tree

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
        self._root = _Node({})

    def apply(self, entry: tuple) -> bool:
        """Do what an entry of a Disk's log says; False where that changes nothing."""
        what, path, *rest = entry
        if what == "acknowledged":
            return False
        if what == "fsync":
            return self._find(path).fsync()
        parent, name = self._find(os.path.dirname(path)), os.path.basename(path)
        if what == "mkdir":
            parent.now[name] = _Node({})
        elif what == "create":
            parent.now.setdefault(name, _Node(b"")).now = b""
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

    def left(self, model: str = "kept", chance: random.Random | None = None) -> Tree:
        """What programs see while there is power, or what a cut leaves, by one of MODELS."""
        return self._root.left(model, chance)

    def _find(self, path: str) -> Any:
        node = self._root
        for name in Path(path).parts:
            node = node.now[name]
        return node


class _Node:
    """A file (bytes) or a folder (nodes by name): as programs see it, and as the disk has it."""

    def __init__(self, content: Any) -> None:
        self.now, self.synced = content, copy.copy(content)

    def fsync(self) -> bool:
        before, self.synced = self.synced, copy.copy(self.now)
        return before != self.synced

    def left(self, model: str, chance: random.Random | None) -> Any:
        is_folder = isinstance(self.now, dict)
        is_kept = model == "kept" or (is_folder and model in ("empty", "zeroed"))
        if model == "mixed" and chance:
            is_kept = chance.random() < 0.5
        content = self.now if is_kept else self.synced
        if is_folder:
            return {name: node.left(model, chance) for name, node in sorted(content.items())}
        return bytes(len(self.now)) if model == "zeroed" and self.now != content else content


def record_session(base: Path, n_saves: int) -> list[tuple]:
    """The log of a session in a folder, with what it acknowledged."""
    disk = Disk(base)
    with disk.in_use():
        session(base, n_saves, lambda *what: disk.log.append(("acknowledged", *what)))
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
                left = self._observe(replay.left(model, chance))
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
            self._seen[key] = observed(base)
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
    if whole.left() != read_tree(folder / "recorded"):
        failures.append("power: the log is not all that was done")
    failures += filter(None, [loss.first_failure(log, seed=seed)])
    killed = Replay()
    for place, entry in enumerate(log[: log.index(("acknowledged", "step", 2))], start=1):
        killed.apply(entry)
        write_tree(killed.left(), folder / "killed")
        both = log[:place] + record_session(folder / "killed", 1)
        shutil.rmtree(folder / "killed")
        if found := loss.first_failure(both, seed=seed, since=place):
            failures.append(f"killed after entry {place} {entry[:2]}, then {found}")
    # one that finds nothing to do is there for what a killed process left
    fsyncs = [i for i, entry in enumerate(log) if entry[0] == "fsync" and changing[i]]
    failures += [
        f"power: nothing is lost without entry {place} {log[place]}"
        for place in fsyncs
        if loss.first_failure(log, without=place, seed=seed) is None
    ]
    counts = {"entries": len(log), "fsyncs": len(fsyncs), "cuts": loss.cuts}
    return counts | {"failures": failures}
