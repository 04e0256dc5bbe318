"""Where a run's numbers go: the log that no disk may end a run for, and the trackers."""

import errno
import importlib.util
import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from engine.errors import SettingsError
from storage import tracking
from storage.files import PATIENCE_S
from storage.tracking import MetricsFile, Trackers, check_trackers, open_trackers
from tests.conftest import REPOSITORY

ROWS = [{"step": i, "train/loss": i / 3, "note": "春"} for i in range(1, 7)]
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed"
)


@pytest.fixture
def metrics(tmp_path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl")


def rows_in(metrics: MetricsFile) -> list[dict]:
    return [json.loads(line) for line in metrics.path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_lines_and_a_cut_to_a_known_size_leaves_what_was_there_then(metrics, capsys):
    assert metrics.sync() == 0
    assert metrics.cut(100) == [] and not metrics.path.exists()
    metrics.append([{"step": 0, "train/loss": math.nan, "val/loss": -math.inf}, *ROWS[:2]])
    metrics.append([])
    first = [{"step": 0, "train/loss": None, "val/loss": None}, *ROWS[:2]]
    assert rows_in(metrics) == first
    size, before = metrics.sync(), metrics.path.read_bytes()
    assert size == len(before)
    metrics.append(ROWS[2:])
    again = MetricsFile(metrics.path)
    assert [json.loads(line) for line in again.cut(size)] == first
    assert metrics.path.read_bytes() == before
    again.append(ROWS[2:])
    assert rows_in(again) == first + ROWS[2:]
    assert capsys.readouterr().out == ""


def test_a_cut_anywhere_keeps_the_whole_lines_before_it(metrics):
    metrics.append(ROWS[:2])
    content = metrics.path.read_bytes()
    # a power cut, too, may have taken what comes after
    for at, left in [*((at, content) for at in range(len(content) + 3)), (10**9, content[:-4])]:
        metrics.path.write_bytes(left)
        expected = left[:at].count(b"\n")
        assert metrics.cut(at) == content.splitlines()[:expected]
        assert rows_in(metrics) == ROWS[:expected]
    metrics.append(ROWS[1:])
    assert rows_in(metrics) == ROWS


def test_what_the_disk_refuses_is_said_once_and_ends_nothing(metrics, capsys):
    metrics.path.mkdir()  # whatever is done with it as a file fails
    for _ in range(3):
        metrics.append(ROWS)
        assert metrics.sync() == 0
        assert metrics.cut(100) == []
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Note: can't write {metrics.path}: ")
    assert line.endswith(". Training goes on; the log has a gap")


def test_a_log_that_another_program_holds_open_is_waited_for_once(metrics, capsys, monkeypatch):
    slept, replace, is_open = [], os.replace, True

    def refuse(*arguments):
        if is_open:
            error = PermissionError(errno.EACCES, "Access is denied")
            error.winerror = 5  # as Windows says it
            raise error
        replace(*arguments)

    metrics.append(ROWS[:3])
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(time, "sleep", slept.append)
    assert metrics.cut(metrics.sync() - 1) == []
    metrics.append(ROWS[2:3])
    metrics.append(ROWS[2:3])
    assert rows_in(metrics) == ROWS[:3]
    assert sum(slept) == pytest.approx(PATIENCE_S)
    assert len(capsys.readouterr().out.splitlines()) == 1
    is_open = False
    metrics.append(ROWS[3:])  # the cut that is owed comes first
    assert rows_in(metrics) == ROWS[:2] + ROWS[3:]


def test_a_log_whose_fsync_fails_keeps_its_size(metrics, capsys, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    metrics.append(ROWS)
    monkeypatch.setattr(os, "fsync", fail)
    assert metrics.sync() == metrics.path.stat().st_size  # or a resume would empty the log
    assert "the log has a gap" in capsys.readouterr().out


FULL_DISK = f"""
import json, resource, signal, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from storage.tracking import MetricsFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
rows = json.loads(sys.argv[2])
metrics = MetricsFile(Path(sys.argv[1]))
metrics.append(rows[:2])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.sync() + 30, most))
metrics.append(rows[2:4])
torn = Path(sys.argv[1]).read_bytes()
metrics.append(rows[2:4])
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
metrics.append(rows[4:])
print(torn.endswith(b"\\n"), len(torn))
"""


def test_after_a_full_disk_the_log_has_a_gap_and_whole_lines(metrics):
    pytest.importorskip("resource")  # Windows has no limit of file sizes
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(metrics.path), json.dumps(ROWS)],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    said, torn = done.stdout.splitlines()
    assert said.startswith("Note: can't write ")
    assert torn.startswith("False ")  # half a line was taken
    assert rows_in(metrics) == [*ROWS[:2], *ROWS[4:]]


class Notebook:
    """A tracker that fails where it is told to."""

    def __init__(self, log_fails_at: int | None = None, close_fails: bool = False) -> None:
        self.seen: list[tuple[int, dict]] = []
        self.is_closed = False
        self._log_fails_at = log_fails_at
        self._close_fails = close_fails

    def log(self, step, values):
        if step == self._log_fails_at:
            raise RuntimeError("no more pages\nand much else")
        self.seen.append((step, values))

    def close(self):
        self.is_closed = True
        if self._close_fails:
            raise OSError("the cover is torn")


def test_every_tracker_gets_the_rows_but_one_that_fails_is_said_and_left(capsys):
    bad, torn, good = Notebook(log_fails_at=2), Notebook(close_fails=True), Notebook()
    trackers = Trackers([bad, torn, good])
    for row in ROWS:
        trackers.log(row)
    expected = [(row["step"], {n: x for n, x in row.items() if n != "step"}) for row in ROWS]
    assert torn.seen == good.seen == expected
    assert bad.seen == expected[:1]
    for _ in range(2):  # nothing is closed twice
        trackers.close()
    assert torn.is_closed and good.is_closed
    assert capsys.readouterr().out == (
        "Note: Notebook failed and is left out: no more pages\n"
        "Note: Notebook failed and is left out: the cover is torn\n"
    )


def test_a_tracker_that_cannot_be_opened_is_said_and_the_others_go_on(
    tmp_path, monkeypatch, capsys
):
    class Shut:
        def __init__(self, *_):
            raise ConnectionError("nobody is at home")

    monkeypatch.setattr(tracking, "_WeightsAndBiases", Shut)
    monkeypatch.setattr(tracking, "_TensorBoard", lambda *_: Notebook())
    trackers = open_trackers(["wandb", "tensorboard"], tmp_path, "id", {}, 0)
    assert len(trackers._trackers) == 1
    assert capsys.readouterr().out == "Note: Shut failed and is left out: nobody is at home\n"


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    """A Python that finds no module but its own, and those of a folder, which it returns."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for module in tracking.TRACKERS:
        monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_a_tracker_without_its_library_is_refused_with_the_install_command(nothing_installed, name):
    check_trackers([])
    folder = nothing_installed / name
    for is_there in (False, True):
        if is_there:
            folder.mkdir()  # as wandb makes where it is used: no library
        with pytest.raises(SettingsError) as caught:
            check_trackers([name])
        assert caught.value.exit_code == 2
        assert str(caught.value).splitlines() == [
            f'TRACKING names "{name}", whose library is not installed.',
            f"Install it with  pip install -r requirements.txt {name}",
        ]
    (folder / "__init__.py").touch()
    importlib.invalidate_caches()
    check_trackers([name])


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) of each curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def track_steps(folder, first: int, last: int, after: int) -> None:
    """A process of a run that goes on after step `after`, and logs from first to last."""
    trackers = open_trackers(["tensorboard"], folder, "id", {}, after)
    for step in range(first, last + 1):
        trackers.log({"step": step, "train/loss": step / 4, "train/lr": 0.5})
        if step % 4 == 0:
            trackers.log({"step": step, "val/loss": step * 2.0})
    trackers.close()


@needs_tensorboard
@pytest.mark.slow
def test_tensorboard_shows_each_value_once_at_its_step_after_a_resume_too(tmp_path):
    for saved_at in (0, 5):
        folder = tmp_path / str(saved_at)
        track_steps(folder, 1, 10, after=0)
        track_steps(folder, saved_at + 1, 12, after=saved_at)  # it was stopped after step 10
        assert curves(folder / "tensorboard") == {
            "train/loss": [(step, step / 4) for step in range(1, 13)],
            "train/lr": [(step, 0.5) for step in range(1, 13)],
            "val/loss": [(4, 8.0), (8, 16.0), (12, 24.0)],
        }


TRACK_WITH_WANDB = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from storage.tracking import open_trackers
folder = Path(sys.argv[1])
settings = {{"mode": "custom", "training": {{"batch_size": 4}}, "changes": []}}
trackers = open_trackers(["wandb"], folder, "0123456789abcdef", settings, 0)
for step in range(1, int(sys.argv[2]) + 1):
    trackers.log({{"step": step, "train/loss": step / 4}})
    if step % 2 == 0:
        row = {{"eval/train_loss": 0.5, "val/loss": step * 2.0, "train/tok_per_sec": 9.0}}
        trackers.log({{"step": step}} | row)
trackers.close()
print("went on")
"""


@pytest.fixture
def at_wandb(tmp_path):
    """A server in the place of wandb's, and environment variables of a user who has no account.

    The server notes each connection and answers none.
    """
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                connections.append(connection)
                connection.close()

        threading.Thread(target=accept, daemon=True).start()
        home = tmp_path / "home"
        home.mkdir()
        variables = {name: v for name, v in os.environ.items() if not name.startswith("WANDB_")}
        variables |= {"HOME": str(home), "NETRC": str(home / "netrc"), "NO_PROXY": "127.0.0.1"}
        variables["WANDB_BASE_URL"] = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield variables, connections


def track_with_wandb(folder, variables, last=6) -> str:
    """Log in a process of its own; returns what it printed, on both streams."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", TRACK_WITH_WANDB, str(folder), str(last)],
        env=variables,
        cwd=folder.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def records_of(folder) -> list:
    """The records of the one offline run in a folder.

    Its file is a LevelDB log with a header of 7 bytes: blocks of 32 KiB with chunks in them, each
    after its checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last).
    """
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert content.startswith(b":W&B")
    at, records, parts = 7, [], b""
    while at < len(content):
        room = 32_768 - at % 32_768
        if room < 7:  # too little for a chunk's head
            at += room
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


@needs_wandb
@pytest.mark.slow
def test_wandb_without_an_account_keeps_an_offline_run_and_sends_nothing(tmp_path, at_wandb):
    variables, connections = at_wandb
    folder = tmp_path / "my run"
    assert track_with_wandb(folder, variables) == "went on\n"
    assert connections == []
    records = records_of(folder)
    [run] = [record.run for record in records if record.HasField("run")]
    assert (run.run_id, run.display_name, run.project) == ("0123456789abcdef", "my run", "gpt")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["mode"] == "custom" and config["training"] == {"batch_size": 4}
    shown = {}
    for record in records:
        if record.HasField("history"):
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = items.get("_step", record.history.step.num)
            shown.setdefault(step, {}).update(
                {name: value for name, value in items.items() if "/" in name}
            )
    assert sorted(shown) == [1, 2, 3, 4, 5, 6]
    assert all(shown[step]["train/loss"] == step / 4 for step in shown)
    assert shown[4] == {
        "train/loss": 1.0,
        "eval/train_loss": 0.5,
        "val/loss": 8.0,
        "train/tok_per_sec": 9.0,
    }
    assert not (tmp_path / "wandb").exists()  # the run's folder has it all


@needs_wandb
@pytest.mark.slow
def test_wandb_with_an_account_goes_online_and_training_goes_on_without_an_answer(
    tmp_path, at_wandb
):
    variables, connections = at_wandb
    variables["WANDB_INIT_TIMEOUT"] = "3"
    host = variables["WANDB_BASE_URL"].removeprefix("http://")
    netrc = f"machine {host}\n  login user\n  password {'0' * 40}\n"
    (tmp_path / "home" / "netrc").write_text(netrc)
    printed = track_with_wandb(tmp_path / "run", variables).splitlines()
    assert connections != []
    assert printed[-1] == "went on"
    assert any(line.startswith("Note: WeightsAndBiases failed and is left out") for line in printed)


@needs_wandb
@pytest.mark.slow
def test_the_environment_wins_over_an_account_and_a_key_that_is_none_is_said(tmp_path, at_wandb):
    variables, connections = at_wandb
    folder, key = tmp_path / "offline", {"WANDB_API_KEY": "0" * 40}
    assert track_with_wandb(folder, variables | key | {"WANDB_MODE": "offline"}) == "went on\n"
    assert len(list(folder.glob("wandb/*run-*"))) == 1
    printed = track_with_wandb(tmp_path / "run", variables | {"WANDB_API_KEY": "short"})
    assert printed.endswith("went on\n")
    assert "WeightsAndBiases failed and is left out" in printed
    assert connections == []
