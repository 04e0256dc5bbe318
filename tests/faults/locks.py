"""Checks of the lock on a run folder that need other processes: rivals, owners and a crowd."""

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import BusyError
from storage import files as storage
from storage.files import FolderLock, make_folder
from tests.faults.saving import forked


def refusal(folder: Path) -> str:
    """The message of the BusyError that another process meets, "" where it gets the lock."""
    readable, writable = os.pipe()

    def work() -> None:
        storage._LOCKED.clear()  # what this process holds is not the other's
        try:
            with FolderLock(folder):
                pass
        except BusyError as error:
            assert error.exit_code == 7
            os.write(writable, str(error).encode())

    pid = forked(work)
    os.close(writable)
    with open(readable, encoding="utf-8") as pipe:
        message = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return message


@contextlib.contextmanager
def owner_of(folder: Path) -> Iterator[tuple[int, int]]:
    """A process that holds the lock, and its forked child that sleeps; yields their ids.

    Another child has ended already. The two are killed at the end where they are still there.
    """
    readable, writable = os.pipe()

    def work() -> None:
        with FolderLock(folder):
            os.waitpid(forked(lambda: None), 0)
            worker = forked(lambda: time.sleep(600))
            os.write(writable, worker.to_bytes(8, "little"))
            time.sleep(600)

    owner = forked(work)
    os.close(writable)
    worker = int.from_bytes(os.read(readable, 8), "little")
    os.close(readable)
    try:
        yield owner, worker
    finally:
        os.kill(worker, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            _kill(owner)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def owner_is_named_and_holds_nothing_once_killed(folder: Path) -> bool:
    """Whether a folder in use is refused with its process and machine, and free without them.

    The owner's forked children matter neither when they end before it nor when they outlive it.
    """
    with owner_of(folder) as (owner, worker):
        held = f"process {owner} on {socket.gethostname()}" in refusal(folder)
        _kill(owner)
        os.kill(worker, 0)  # it is still there
        return held and refusal(folder) == ""


def second_lock_in_a_process_leaves_the_first(folder: Path) -> bool:
    """Whether a process is refused a lock that it holds, and holds it still."""
    with FolderLock(folder):
        refused = False
        try:
            FolderLock(folder).__enter__()
        except BusyError:
            refused = True
        held = str(os.getpid()) in refusal(folder)
    return refused and held and refusal(folder) == ""


def exactly_one_of_a_crowd_wins(folder: Path, n: int = 12) -> bool:
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
    while len(answers) < n and select.select([results], [], [], 120)[0]:
        answers += os.read(results, n)
    os.close(finish)
    codes = [os.waitpid(pid, 0)[1] for pid in crowd]
    for handle in (gate, results, result, done):
        os.close(handle)
    return answers.count(b"1") == 1 and answers.count(b"0") == n - 1 and not any(codes)


def contend_for_locks(folder: Path) -> dict[str, Any]:
    """All checks of the lock, each in a folder of its own."""
    checks = (
        owner_is_named_and_holds_nothing_once_killed,
        second_lock_in_a_process_leaves_the_first,
        exactly_one_of_a_crowd_wins,
    )
    failures = []
    for check in checks:
        make_folder(folder / check.__name__)
        if not check(folder / check.__name__):
            failures.append(f"locks: {check.__name__.replace('_', ' ')}: no")
    return {"checks": len(checks), "failures": failures}
