"""What our programs do on Windows, shown on a pretended one: whole runs, locks, signals, files."""

import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from distributed import signals as stopping
from engine.errors import BusyError, CheckpointError, DataError, ResourceError, Stopped
from storage import files as storage
from storage.checkpoint import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    CheckpointStore,
    safetensors_chunks,
    weights_of,
)
from storage.files import FolderLock, NewFolder, rename_file
from tests.faults.locks import owner_of
from tests.launching import launching
from tests.pretend.windows import CAN_PRETEND, SIGBREAK, windows
from text.documents import DataSpec, ReadingReport
from text.sources import find_parts
from text.token_cache import tokenize

pytestmark = pytest.mark.skipif(not CAN_PRETEND, reason="needs Linux to pretend")


@pytest.fixture
def calm():
    """A pretended Windows on which nothing but this process holds files open."""
    with windows(fresh_s=0, refused_share=0) as files:
        yield files


@pytest.fixture
def hurry(monkeypatch):
    """Let what is held open be waited for without taking time."""

    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, strftime=time.strftime)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(storage, "time", clock)
    return clock


# ----------------------------------------------------------------------------- the pretence


def test_a_pretended_windows_refuses_what_is_open_and_lacks_what_windows_lacks(tmp_path, calm):
    (tmp_path / "folder").mkdir()
    path, free = tmp_path / "folder" / "file", tmp_path / "free"
    path.write_bytes(b"12345678")
    free.write_bytes(b"x")
    acts = {
        "rename": lambda: os.rename(path, tmp_path / "other"),
        "replace": lambda: os.replace(free, path),
        "unlink": path.unlink,
        "folder": lambda: os.rename(path.parent, tmp_path / "elsewhere"),
    }
    for hold in (lambda: path.open("rb"), lambda: np.memmap(path, dtype=np.uint8, mode="r")):
        held = hold()
        for act in acts.values():
            with pytest.raises(PermissionError) as caught:
                act()
            assert caught.value.winerror in storage.HELD_OPEN
        del held
    with pytest.raises(FileExistsError):
        os.rename(free, path)
    for act in list(acts.values())[1:]:
        act()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"again")
        free.write_bytes(b"x")
    assert (storage.os.name, stopping.sys.platform) == ("nt", "win32")
    assert not hasattr(stopping.signal, "SIGHUP")
    with pytest.raises(ImportError):
        import fcntl  # noqa: F401


def test_a_pretended_windows_refuses_fresh_files_and_a_share_of_the_others(tmp_path):
    with windows(fresh_s=3600, refused_share=0) as files:
        (tmp_path / "file").write_bytes(b"x")
        with pytest.raises(PermissionError):
            os.rename(tmp_path / "file", tmp_path / "other")
        os.utime(tmp_path / "file", (0, 0))  # written long ago
        os.rename(tmp_path / "file", tmp_path / "other")
        assert files.refused == [("rename", str(tmp_path / "file"))]
    with windows(fresh_s=0, refused_share=0.5, seed=1) as files:
        for number in range(16):
            rename_file(tmp_path / "other", tmp_path / f"{number}")
            rename_file(tmp_path / f"{number}", tmp_path / "other")
        assert 8 < len(files.refused) < 24
    assert storage.os is os


# ---------------------------------------------------------------------------- parts of a run


def test_a_checkpoint_that_cannot_be_read_is_not_held_open_and_set_aside(tmp_path, calm, capsys):
    model = nn.Linear(4, 3)
    store = CheckpointStore(tmp_path, "id", keep=2)
    with NewFolder(store.checkpoints / "step-00000002", store._facts(2)) as folder:
        folder.write(WEIGHTS, safetensors_chunks(weights_of(model)))
        folder.write(OPTIMIZER, [b"sealed, but no such file"])
        folder.write(STATE, [b'{"best_step": null}'])
    with pytest.raises(CheckpointError, match="can be used"):
        store.restore(model, None)
    assert "it is set aside as .bad-step-00000002" in capsys.readouterr().out
    assert calm.refused == []


def test_a_damaged_cache_that_another_run_reads_is_told_and_made_anew_when_it_has_ended(
    tmp_path, calm, hurry, capsys
):
    (tmp_path / "text.txt").write_text("the river carries the bell " * 40, encoding="utf-8")
    spec, cache = DataSpec((str(tmp_path / "text.txt"),)), tmp_path / "cache"
    made = tokenize(spec, "char", 0.9, cache)
    (made.path.parent / "entry.json").write_bytes(b"{}")
    other_run = np.memmap(made.path, dtype=made.dtype, mode="r")
    with pytest.raises(ResourceError, match="End the programs that have a file in it open"):
        tokenize(spec, "char", 0.9, cache)
    assert hurry.now >= storage.PATIENCE_S
    assert sorted(path.name for path in made.path.parent.iterdir()) == [
        "entry.json",
        "tokenizer.json",
        "tokens.bin",
    ]
    del other_run
    assert tokenize(spec, "char", 0.9, cache).sha256 == made.sha256


def test_a_pattern_is_no_name_there_and_finds_its_files(tmp_path, calm):
    for name in ("b.txt", "a.txt", "a.md"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    parts = find_parts([str(tmp_path / "*.txt")], tmp_path / "cache", ReadingReport())
    assert [part.name for part in parts] == ["a.txt", "b.txt"]
    with pytest.raises(DataError, match=r"there is no file 'C:\\new'"):
        find_parts(["C:\new"], tmp_path / "cache", ReadingReport())


def test_the_lock_of_another_process_is_seen_and_ends_with_it(tmp_path, calm):
    with (
        owner_of(tmp_path) as (owner, _),
        pytest.raises(BusyError, match=f"process {owner} on "),
        FolderLock(tmp_path),
    ):
        pass
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("number", [2, 15, SIGBREAK])  # Ctrl-C, os.kill's, Ctrl-Break
def test_what_stops_a_program_there_is_noted_and_granted(calm, number):
    with stopping.StopSignals() as stop:
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as caught:
            stop.check()
    assert caught.value.exit_code == 128 + number


# ------------------------------------------------------------------------------- a whole run

ON_WINDOWS = """
import atexit
from tests.pretend.windows import windows

pretended = windows(seed={seed})
files = pretended.__enter__()
atexit.register(lambda: Path("refused").write_text(str(len(files.refused)), encoding="ascii"))
"""
UNTIL_KILLED = """
calls = []
def stuck_step(*arguments, **options):
    calls.append(1)
    time.sleep(10**6 * (len(calls) > {steps}))
    return slow_step(*arguments, **options)
learner.take_step = stuck_step
"""
STEPS = 5
RUN = {"max_steps": STEPS, "save_every": 1}


def state_of(folder: Path) -> dict[str, bytes]:
    last = folder / "runs" / "one" / "checkpoints" / f"step-{STEPS:08d}"
    return {name: (last / name).read_bytes() for name in (WEIGHTS, OPTIMIZER)}


@pytest.mark.slow
def test_a_run_killed_at_a_random_step_and_started_again_ends_as_an_undisturbed_one_on_linux(
    tmp_path,
):
    for name in ("linux", "windows"):
        (tmp_path / name).mkdir()
    chooser = random.Random(14)
    killed_at = chooser.randrange(1, STEPS - 1)
    with launching(tmp_path / "linux") as start_on_linux, launching(tmp_path / "windows") as start:
        undisturbed = start_on_linux(**RUN)
        killed = start(ON_WINDOWS.format(seed=1) + UNTIL_KILLED.format(steps=killed_at + 1), **RUN)
        checkpoints = tmp_path / "windows" / "runs" / "one" / "checkpoints"
        killed.until((checkpoints / f"step-{killed_at:08d}").exists)
        time.sleep(chooser.uniform(0, 0.2))
        killed.send(9)  # as TerminateProcess ends one
        assert killed.process.wait() == -9
        resumed = start(ON_WINDOWS.format(seed=2), **RUN)
        resumed.ends_with(0)
        undisturbed.ends_with(0)
    assert "Resuming runs/one: " in resumed.out
    assert state_of(tmp_path / "windows") == state_of(tmp_path / "linux")
    n_refused = int((tmp_path / "windows" / "refused").read_text(encoding="ascii"))
    # each checkpoint was fresh; killed_at + 1 may be there by then
    assert n_refused >= STEPS - killed_at - 1
    left = [path.name for path in (tmp_path / "windows").rglob(".*")]
    assert not [name for name in left if name.startswith((".tmp-", ".del-"))]
