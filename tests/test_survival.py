"""Kills, failing calls, power cuts and crowds: what was acknowledged is there, and whole."""

import contextlib
import errno
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import survival
from storage import files as storage
from storage.files import NewFolder
from tests.conftest import REPOSITORY
from tests.faults import saving
from tests.faults.disk import FAILING, Disk, fail_each_call
from tests.faults.locks import contend_for_locks
from tests.faults.power import Replay, lose_power
from tests.faults.saving import folder_in_memory, kill_storm

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture
def memory(monkeypatch):
    """A folder that nothing slows down: not the disk, and no threads for files this small."""
    serial = contextlib.nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(storage, "ThreadPoolExecutor", lambda n_threads: serial)
    with folder_in_memory() as folder:
        yield folder


def storm(folder: Path, *wanted: str) -> dict:
    """The sums of storms, until kills have come at moments that matter; with all failures."""
    total, failures = Counter(), []
    for seed in range(1, 100):
        result = kill_storm(8, seed, folder / f"storm-{seed}", most_s=0.01)
        failures += result.pop("failures")
        total.update(result)
        if all(total[what] for what in wanted):
            return total | {"failures": failures}
    return pytest.fail(f"no {wanted} in {total}")


@pytest.mark.slow
def test_kills_leave_every_folder_whole_and_lose_no_acknowledged_one(memory):
    result = storm(memory, "half_written", "half_removed")
    assert result["failures"] == []
    assert result["acknowledged"] >= result["kills"] / 2
    assert (result["corrupt"], result["lost"]) == (0, 0)


class InPlace(NewFolder):
    """Writes under the final name, as careless programs do."""

    def __enter__(self):
        self._beside = self.path
        return super().__enter__()

    def __exit__(self, *_):
        self.write(storage.MANIFEST, [storage._seal(self._facts | {"files": self._files})])


def test_the_storm_finds_a_writer_that_is_not_atomic(memory, monkeypatch):
    monkeypatch.setattr(saving, "NewFolder", InPlace)
    result = storm(memory, "corrupt")
    assert re.match(r"storm: seed \d+, kill \d+: .*step-\d{8}", result["failures"][0])


@pytest.mark.slow
def test_the_storm_finds_what_was_acknowledged_too_early(memory, monkeypatch):
    def save(folder, step, acknowledge):
        acknowledge(step)
        real_save(folder, step)

    real_save = saving.save
    monkeypatch.setattr(saving, "save", save)
    assert "is lost, the newest is" in "".join(storm(memory, "lost")["failures"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "mode"), [("empty", "once"), *(("a run", mode) for mode in FAILING)]
)
def test_whichever_call_fails_the_old_or_the_new_is_whole(memory, start, mode):
    error = errno.EIO if start == "empty" else errno.ENOSPC
    failures, n_calls = fail_each_call(memory, start, mode, error)
    assert failures == [] and n_calls > 40


def test_a_rename_that_fails_unnoticed_is_found(memory, monkeypatch):
    def rename(disk, *paths):
        with contextlib.suppress(OSError):
            real_rename(disk, *paths)

    real_rename = Disk.rename
    monkeypatch.setattr(Disk, "rename", rename)
    failures, _ = fail_each_call(memory, "empty", "once", errno.EIO)
    assert any("step is 0 after None" in failure for failure in failures)
    assert any("settings is None after None" in failure for failure in failures)


def test_a_power_cut_anywhere_loses_nothing_acknowledged_but_without_any_one_fsync(memory):
    result = lose_power(0, memory, n_saves=3)
    assert result["failures"] == []
    assert result["fsyncs"] == 4 + 3 * 6  # the folders and settings; files, manifest, folders
    assert result["cuts"] > 2000


DONE = [("mkdir", "a"), ("fsync", ".")]
FILE = [*DONE, ("create", "a/f"), ("write", "a/f", 0, b"12")]
SYNCED = [*FILE, ("fsync", "a/f"), ("fsync", "a")]
NOTHING, F12, G12 = {"a": {}}, {"a": {"f": b"12"}}, {"a": {"g": b"12"}}


@pytest.mark.parametrize(
    ("log", "dropped", "empty", "zeroed"),
    [
        (DONE[:1], {}, NOTHING, NOTHING),
        (DONE, NOTHING, NOTHING, NOTHING),
        (FILE, NOTHING, {"a": {"f": b""}}, {"a": {"f": b"\0\0"}}),
        ([*FILE, ("fsync", "a")], {"a": {"f": b""}}, {"a": {"f": b""}}, {"a": {"f": b"\0\0"}}),
        ([*FILE, ("fsync", "a/f")], NOTHING, F12, F12),
        (SYNCED, F12, F12, F12),
        ([*SYNCED, ("write", "a/f", 2, b"3")], F12, F12, {"a": {"f": b"\0\0\0"}}),
        ([*SYNCED, ("create", "a/f")], F12, F12, {"a": {"f": b""}}),
        ([*SYNCED, ("rename", "a/f", "a/g")], F12, G12, G12),
        ([*SYNCED, ("rename", "a/f", "a/g"), ("fsync", "a")], G12, G12, G12),
        ([*SYNCED, ("remove", "a/f")], F12, NOTHING, NOTHING),
        ([*SYNCED, ("rename", "a", "b")], F12, {"b": {"f": b"12"}}, {"b": {"f": b"12"}}),
    ],
)
def test_replay_loses_what_was_not_fsynced_and_nothing_else(log, dropped, empty, zeroed):
    replay = Replay()
    for entry in log:
        replay.apply(entry)
    found = [replay.left(m, random.Random(0)) for m in ("dropped", "empty", "zeroed")]
    assert found == [dropped, empty, zeroed]


@pytest.mark.slow
def test_a_lock_is_held_by_one_process_and_by_none_that_has_ended(tmp_path):
    assert contend_for_locks(tmp_path)["failures"] == []


def test_one_part_runs_by_itself_and_a_failure_ends_the_program_with_1(
    monkeypatch, capsys, tmp_path
):
    assert survival.main(["--only", "storm", "--kills", "5", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("storm     ok: kills 5, acknowledged ")
    assert list(tmp_path.iterdir()) == []
    told = {"checks": 1, "failures": ["locks: seed 0, mine: no"]}
    monkeypatch.setattr(survival, "contend_for_locks", lambda folder: told)
    assert survival.main(["--only", "locks"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("locks     FAILED: checks 1")
    assert "locks: seed 0, mine: no" in printed


@pytest.mark.slow
def test_runs_killed_in_their_phases_end_as_the_undisturbed_one(tmp_path):
    # in a process of its own, for forks of this one may lack threads that torch has begun; and
    # without pictures, whose drawing takes longer than all the rest of a run
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None; from benchmarks import survival\n"
        "sys.exit(survival.main(sys.argv[1:]))"
    )
    options = ("--only", "training", "--runs", "5", "--seed", "3", "--folder", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("training  ok: kills 5")
    phases = re.findall(r"kill \d+ of run \d+: (\w+)", done.stdout)
    assert len(phases) == 5 and {"step", "save", "evaluation", "sampling"} & set(phases)
