"""Checks of the lock on a run folder that need other processes: rivals, owners and a crowd."""

import contextlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import BusyError
from storage.files import FolderLock, make_folder
from tests.faults.saving import forked


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
