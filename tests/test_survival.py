"""Kills, failing calls, power cuts and crowds: what was acknowledged is there, and whole."""

import contextlib
import errno
import fnmatch
import json
import os
import random
import re
import subprocess
import sys

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


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_leave_every_folder_whole_and_lose_no_acknowledged_one(memory, kills):
    result = kill_storm(kills, 1, memory / "storm", most_s=0.01)
    assert result["failures"] == []
    assert (result["corrupt"], result["lost"]) == (0, 0)
    # the kills came at moments that matter
    assert result["kills"] == kills
    assert result["acknowledged"] >= kills / 2
    assert result["half_written"] > kills / 20
    assert result["half_removed"] > kills / 40


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
    for seed in range(3):
        assert PowerLoss(memory).first_failure(log, seed=seed) is None


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


@pytest.mark.parametrize(
    ("log", "dropped", "empty", "zeroed"),
    [
        (DONE[:1], {}, {"a": {}}, {"a": {}}),
        (DONE, {"a": {}}, {"a": {}}, {"a": {}}),
        (FILE, {"a": {}}, {"a": {"f": b""}}, {"a": {"f": b"\0\0"}}),
        ([*FILE, ("fsync", "a")], {"a": {"f": b""}}, {"a": {"f": b""}}, {"a": {"f": b"\0\0"}}),
        ([*FILE, ("fsync", "a/f")], {"a": {}}, {"a": {"f": b"12"}}, {"a": {"f": b"12"}}),
        (SYNCED, *[{"a": {"f": b"12"}}] * 3),
        (
            [*SYNCED, ("write", "a/f", 2, b"3")],
            {"a": {"f": b"12"}},
            {"a": {"f": b"12"}},
            {"a": {"f": b"\0\0\0"}},
        ),
        (
            [*SYNCED, ("create", "a/f", True)],
            {"a": {"f": b"12"}},
            {"a": {"f": b"12"}},
            {"a": {"f": b""}},
        ),
        (
            [*SYNCED, ("rename", "a/f", "a/g")],
            {"a": {"f": b"12"}},
            {"a": {"g": b"12"}},
            {"a": {"g": b"12"}},
        ),
        ([*SYNCED, ("rename", "a/f", "a/g"), ("fsync", "a")], *[{"a": {"g": b"12"}}] * 3),
        ([*SYNCED, ("remove", "a/f")], {"a": {"f": b"12"}}, {"a": {}}, {"a": {}}),
        ([*SYNCED, ("rename", "a", "b")], {"a": {"f": b"12"}}, *[{"b": {"f": b"12"}}] * 2),
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


# --------------------------------------------------------------------------------- training


def run_survival(folder, *options):
    """The program in a process of its own, its figures into a folder."""
    code = f"""
import sys, pathlib, benchmarks.survival
if "--only" not in sys.argv:
    import benchmarks.report
    benchmarks.report.RESULTS = pathlib.Path({str(folder)!r})
code = benchmarks.survival.main(sys.argv[1:])
print("torch" in sys.modules)
sys.exit(code)
"""
    return subprocess.run(
        [sys.executable, "-c", code, "--folder", str(folder), *options],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
    )


def test_one_part_runs_by_itself_and_without_torch(tmp_path):
    done = run_survival(tmp_path, "--only", "storm", "--kills", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("storm     ok: kills 5, acknowledged ")
    assert done.stdout.endswith("False\n")
    assert os.listdir(tmp_path) == []


def test_a_failure_is_said_and_ends_the_program_with_1(monkeypatch, capsys):
    told = {"checks": 1, "failures": ["locks: seed 0, mine: no"]}
    monkeypatch.setattr(survival, "contend_for_locks", lambda folder: told)
    assert survival.main(["--only", "locks"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("locks     FAILED: checks 1")
    assert "locks: seed 0, mine: no" in printed


@pytest.mark.slow
def test_runs_killed_in_every_phase_end_as_the_undisturbed_one(tmp_path):
    done = run_survival(tmp_path, "--kills", "20", "--runs", "20", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)  # the phase of each kill
    results = json.loads((tmp_path / "survival-cpu.json").read_bytes())
    training = results["training"]
    assert training["failures"] == []
    assert training["kills"] == len(training["each_kill"]) == 20
    assert re.search(r"kill 20 of run \d+: \w+", done.stdout)
    assert all(training["phases"][name] >= 2 for name in ("step", "save", "evaluation", "sampling"))
