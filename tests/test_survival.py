"""Kills, failing calls, power cuts and crowds: what was acknowledged is there, and whole."""

import contextlib
import errno
import fnmatch
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks import survival
from storage import files as storage
from storage.files import NewFolder
from tests.conftest import REPOSITORY
from tests.faults import saving
from tests.faults.disk import FAILING, STARTS, Disk, fail_each_call
from tests.faults.locks import LOCK_CHECKS
from tests.faults.power import (
    PowerLoss,
    Replay,
    failures_after_kills,
    lose_power,
    read_tree,
    record_session,
    write_tree,
)
from tests.faults.saving import folder_in_memory, kill_storm

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture
def memory():
    """A folder that other programs' use of the disk does not slow down."""
    with folder_in_memory() as folder:
        yield folder


# ------------------------------------------------------------------------------------ storm


def test_kills_leave_every_folder_whole_and_lose_no_acknowledged_one(memory):
    kills, half_done = 40, Counter()
    for seed in range(1, 31):  # until kills have come at moments that matter
        result = kill_storm(kills, seed, memory / f"storm-{seed}", most_s=0.01)
        assert result["failures"] == []
        assert (result["kills"], result["corrupt"], result["lost"]) == (kills, 0, 0)
        assert result["acknowledged"] >= kills / 2
        half_done.update({name: result[name] for name in ("half_written", "half_removed")})
        if all(half_done.values()):
            break
    assert half_done["half_written"] > 0 and half_done["half_removed"] > 0


class InPlace(NewFolder):
    """Writes under the final name, as careless programs do."""

    def __enter__(self):
        self._beside = self.path
        return super().__enter__()

    def __exit__(self, *_):
        self.write(storage.MANIFEST, [storage._seal(self._facts | {"files": self._files})])


def test_the_storm_finds_a_writer_that_is_not_atomic(memory, monkeypatch):
    monkeypatch.setattr(saving, "NewFolder", InPlace)
    result = kill_storm(20, 1, memory / "storm", most_s=0.01)
    assert result["corrupt"] > 0
    assert re.match(r"storm: seed 1, kill \d+: .*step-\d{8}", result["failures"][0])


def test_the_storm_finds_what_was_acknowledged_too_early(memory, monkeypatch):
    def save(folder, step, acknowledge):
        acknowledge(step)
        real_save(folder, step)

    real_save = saving.save
    monkeypatch.setattr(saving, "save", save)
    result = kill_storm(20, 1, memory / "storm", most_s=0.01)
    assert result["lost"] > 0


# ------------------------------------------------------------------------------------ calls


@pytest.mark.parametrize("mode", FAILING)
@pytest.mark.parametrize("start", STARTS)
def test_whichever_call_fails_the_old_or_the_new_is_whole(memory, start, mode):
    error = errno.EIO if start == "empty" else errno.ENOSPC
    failures, n_calls = fail_each_call(memory, start, mode, error)
    assert failures == []
    assert n_calls > 40


def test_a_rename_that_fails_unnoticed_is_found(memory, monkeypatch):
    def rename(disk, *paths):
        with contextlib.suppress(OSError):
            real_rename(disk, *paths)

    real_rename = Disk.rename
    monkeypatch.setattr(Disk, "rename", rename)
    failures, _ = fail_each_call(memory, "a run", "once", errno.EIO)
    assert any("step is 2 after None" in failure for failure in failures)
    assert any("settings is 1 after None" in failure for failure in failures)


# ------------------------------------------------------------------------------------ power

COMMIT = "run/checkpoints/.tmp-*-step-00000002"
FSYNCS = {  # what a session fsyncs -> its place in the log, and which time it is
    "the folder of a new run": (".", 1),
    "the settings": ("run/.tmp-*-settings.json", 1),
    "the folder of the settings": ("run", 1),
    "the run's folder after checkpoints/ was made": ("run", 2),
    "weights": (f"{COMMIT}/model", 1),
    "optimizer": (f"{COMMIT}/optimizer", 1),
    "state": (f"{COMMIT}/state", 1),
    "manifest": (f"{COMMIT}/manifest.json", 1),
    "the temporary folder": (COMMIT, 1),
    "the folder of the renamed one": ("run/checkpoints", 2),
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """What a session with four commits did."""
    return record_session(tmp_path_factory.mktemp("recorded"), 4)


def test_a_power_cut_anywhere_leaves_what_was_acknowledged(memory, log):
    assert ("acknowledged", "step", 4) in log
    assert sum(entry[0] == "rename" for entry in log) == 4 + 2 + 1  # commits, removals, settings
    assert PowerLoss(memory).first_failure(log, seed=0) is None


@pytest.mark.parametrize("what", FSYNCS)
def test_without_any_one_fsync_a_power_cut_loses_something(memory, log, what):
    pattern, nth = FSYNCS[what]
    places = [
        place
        for place, entry in enumerate(log)
        if entry[0] == "fsync"
        and fnmatch.fnmatchcase(entry[1], pattern)
        # "*" takes slashes too
        and entry[1].count("/") == pattern.count("/")
    ]
    assert PowerLoss(memory).first_failure(log, without=places[nth - 1]) is not None


def test_a_power_cut_after_a_kill_leaves_what_the_next_session_acknowledged(memory, log):
    first = log[: log.index(("acknowledged", "step", 3))]
    assert failures_after_kills(first, PowerLoss(memory), memory) == []


def test_all_parts_of_the_power_cuts_agree(memory):
    result = lose_power(0, memory, n_saves=2)
    assert result["failures"] == []
    assert result["fsyncs"] == 4 + 2 * 6  # the folders and settings; files, manifest, folders
    assert result["cuts"] > 2000


DONE = [("mkdir", "a"), ("fsync", ".")]
FILE = [*DONE, ("create", "a/f", True), ("write", "a/f", 0, b"12")]
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
        ([*SYNCED, ("create", "a/f", True)], F12, F12, {"a": {"f": b""}}),
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
    found = [replay.after_power_loss(m, random.Random(0)) for m in ("dropped", "empty", "zeroed")]
    assert found == [dropped, empty, zeroed]


def test_the_log_is_all_that_was_done(memory):
    log = record_session(memory, 4)
    replay = Replay()
    for entry in log:
        replay.apply(entry)
    assert replay.tree() == read_tree(memory)
    write_tree(replay.tree(), memory / "again")
    assert read_tree(memory / "again") == replay.tree()


# ------------------------------------------------------------------------------------ locks


@pytest.mark.parametrize("check", LOCK_CHECKS, ids=lambda check: check.__name__)
def test_lock(tmp_path, check):
    assert check(tmp_path)


# --------------------------------------------------------------------------------- the program


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
def test_runs_killed_in_every_phase_end_as_the_undisturbed_one(tmp_path):
    # in a process of its own: forks of this one may lack threads that torch has begun
    options = ("--only", "training", "--runs", "12", "--seed", "3", "--folder", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.survival", *options],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("training  ok: kills 12")
    phases = re.findall(r"kill \d+ of run \d+: (\w+)", done.stdout)
    assert len(phases) == 12 and {"step", "save", "evaluation", "sampling"} <= set(phases)
