"""Where a run's numbers go: the log that no disk may end a run for, and the trackers."""

import contextlib
import errno
import importlib
import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import SettingsError
from storage import tracking
from storage.files import PATIENCE_S
from storage.tracking import MetricsFile, Trackers, check_trackers, open_trackers
from tests.conftest import REPOSITORY

ROWS = [{"step": i, "train/loss": i / 3, "note": "春"} for i in range(1, 7)]


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


def test_what_the_disk_refuses_is_said_once_and_ends_nothing(metrics, capsys, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    metrics.append(ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert metrics.sync() == metrics.path.stat().st_size  # or a resume would empty the log
    metrics.path.unlink()
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


FULL_DISK = """
import json, resource, signal, sys
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
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
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
        self.is_closed, self._fails_at, self._close_fails = False, log_fails_at, close_fails

    def log(self, step, values):
        if step == self._fails_at:
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


def test_a_tracker_that_cannot_be_opened_is_said_and_the_others_go_on(monkeypatch, capsys):
    def shut(*_):
        raise ConnectionError("nobody is at home")

    shut.__name__ = "_Shut"
    monkeypatch.setattr(tracking, "_WeightsAndBiases", shut)
    monkeypatch.setattr(tracking, "_TensorBoard", lambda *_: Notebook())
    trackers = open_trackers(["wandb", "tensorboard"], Path(), "id", {}, 0)
    assert len(trackers._trackers) == 1
    assert capsys.readouterr().out == "Note: Shut failed and is left out: nobody is at home\n"


@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_a_tracker_without_its_library_is_refused_with_the_install_command(
    tmp_path, monkeypatch, name
):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # no module is found anywhere else
    for module in tracking.TRACKERS:
        monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.invalidate_caches()
    check_trackers([])
    for is_there in (False, True):
        if is_there:
            (tmp_path / name).mkdir()  # as wandb makes where it is used: no library
        with pytest.raises(SettingsError) as caught:
            check_trackers([name])
        assert caught.value.exit_code == 2
        assert str(caught.value).splitlines() == [
            f'TRACKING names "{name}", whose library is not installed.',
            f"Install it with  pip install -r requirements.txt {name}",
        ]
    (tmp_path / name / "__init__.py").touch()
    importlib.invalidate_caches()
    check_trackers([name])


def test_tensorboard_shows_each_value_once_at_its_step_after_a_resume_too(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for saved_at in (0, 5):
        folder = tmp_path / str(saved_at)
        # it was stopped after step 10, and goes on from its last save
        for first, last, after in ((1, 10, 0), (saved_at + 1, 12, saved_at)):
            trackers = open_trackers(["tensorboard"], folder, "id", {}, after)
            for step in range(first, last + 1):
                trackers.log({"step": step, "train/loss": step / 4, "train/lr": 0.5})
                if step % 4 == 0:
                    trackers.log({"step": step, "val/loss": step * 2.0})
            trackers.close()
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        curves = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }
        assert curves == {
            "train/loss": [(step, step / 4) for step in range(1, 13)],
            "train/lr": [(step, 0.5) for step in range(1, 13)],
            "val/loss": [(4, 8.0), (8, 16.0), (12, 24.0)],
        }


TRACK_WITH_WANDB = """
import json, os, sys
from pathlib import Path
from storage.tracking import open_trackers
settings = {"mode": "custom", "training": {"batch_size": 4}, "changes": []}
for name, variables in json.loads(sys.argv[1]).items():
    os.environ.update(variables)
    Path(name).mkdir()
    trackers = open_trackers(["wandb"], Path(name), "0123456789abcdef", settings, 0)
    for step in range(1, 7):
        trackers.log({"step": step, "train/loss": step / 4})
        if step % 2 == 0:
            row = {"eval/train_loss": 0.5, "val/loss": step * 2.0, "train/tok_per_sec": 9.0}
            trackers.log({"step": step} | row)
    trackers.close()
    print(name, "went on", flush=True)
    sys.modules["wandb"].teardown()
"""


@contextlib.contextmanager
def pretended_wandb() -> Iterator[tuple[str, list]]:
    """The address of a server that answers no connection, and the connections it got."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    connections.append(connection)
                    connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}", connections


def track_with_wandb(folder: Path, sessions: dict[str, dict]) -> list[str]:
    """Log in runs of given names and environment variables; the lines printed on both streams."""
    variables = {name: value for name, value in os.environ.items() if "WANDB_" not in name}
    variables |= {"HOME": str(folder), "NETRC": str(folder / "none"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", TRACK_WITH_WANDB, json.dumps(sessions)],
        env=variables | {"PYTHONPATH": str(REPOSITORY)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


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


def shown_by_wandb(records: list) -> dict[int, dict]:
    """The values of each step."""
    shown = {}
    for history in (record.history for record in records if record.HasField("history")):
        items = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in history.item
        }
        values = shown.setdefault(items.get("_step", history.step.num), {})
        values |= {name: value for name, value in items.items() if "/" in name}
    return shown


@pytest.mark.slow
def test_wandb_goes_online_with_an_account_alone_and_training_goes_on_whatever_it_does(tmp_path):
    pytest.importorskip("wandb")
    key, failed = {"WANDB_API_KEY": "0" * 40}, "Note: WeightsAndBiases failed and is left out"
    with pretended_wandb() as (address, connections):
        sessions = {"my run": {"WANDB_BASE_URL": f"http://{address}"}}
        sessions["forced"] = key | {"WANDB_MODE": "offline"}
        sessions["short key"] = {"WANDB_API_KEY": "short", "WANDB_MODE": ""}
        printed = track_with_wandb(tmp_path, sessions)
    assert printed[:2] == ["my run went on", "forced went on"]
    assert printed[2].startswith(failed) and printed[-1] == "short key went on"
    assert connections == []
    assert len(list(tmp_path.glob("forced/wandb/*run-*"))) == 1
    records = records_of(tmp_path / "my run")
    [run] = [record.run for record in records if record.HasField("run")]
    assert (run.run_id, run.display_name, run.project) == ("0123456789abcdef", "my run", "gpt")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["mode"] == "custom" and config["training"] == {"batch_size": 4}
    expected = {step: {"train/loss": step / 4} for step in range(1, 7)}
    for step in (2, 4, 6):
        values = {"eval/train_loss": 0.5, "val/loss": step * 2.0, "train/tok_per_sec": 9.0}
        expected[step] |= values
    assert shown_by_wandb(records) == expected
    assert not (tmp_path / "wandb").exists()  # the run's folder has it all

    # an account, but a server that hangs up, and one that never answers: offline, and said
    with (
        pretended_wandb() as (address, connections),
        socket.create_server(("127.0.0.1", 0)) as mute,
    ):
        hosts = {"hangs up": address, "is mute": f"127.0.0.1:{mute.getsockname()[1]}"}
        lines = [
            f"machine {host}\n  login user\n  password {'0' * 40}\n" for host in hosts.values()
        ]
        (tmp_path / "netrc").write_text("".join(lines))
        account = {"NETRC": str(tmp_path / "netrc")}
        sessions = {
            name: account | {"WANDB_BASE_URL": f"http://{host}"} for name, host in hosts.items()
        }
        sessions["is mute"]["WANDB_INIT_TIMEOUT"] = "0.5"
        printed = track_with_wandb(tmp_path, sessions)
    assert connections != []
    faults = ("can't be reached", "does not answer within 0.5 s")
    expected = []
    for name, fault in zip(sessions, faults, strict=True):
        sync = f"wandb sync {Path(name, 'wandb')}/offline-run-*  sends the curves later"
        note = f"Note: 127.0.0.1 {fault}: Weights & Biases stays offline;  {sync}"
        expected += [note, f"{name} went on"]
    assert printed == expected
    assert {6: {"train/loss": 1.5}}.items() <= {
        step: {"train/loss": values["train/loss"]}
        for step, values in shown_by_wandb(records_of(tmp_path / "is mute")).items()
    }.items()
