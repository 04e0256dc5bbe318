"""Durable writes: whole or not at all, in the right order, and readable by others."""

import builtins
import errno
import json
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import REPOSITORY

from engine import storage
from engine.errors import ResourceError
from engine.storage import (
    NewFile,
    append_json_lines,
    make_folder,
    make_new_folder,
    rename_folder,
    to_json,
    write_atomically,
    write_json,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


real_open = builtins.open


class HalfWritten:
    """A file that takes half of what it is given and then says that the disk is full."""

    def __init__(self, *arguments, **keywords):
        self.file = real_open(*arguments, **keywords)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        raise FULL


@pytest.fixture
def fail_at(monkeypatch):
    """Let the n-th use of one step of a write, and those after it, raise OSError."""

    def install(step: str, nth: int = 1) -> None:
        uses = 0
        real = real_open if step == "open" else getattr(os, step, None)

        def failing(*arguments, **keywords):
            nonlocal uses
            uses += 1
            if uses >= nth:
                raise FULL
            return real(*arguments, **keywords)

        if step in ("open", "write"):
            fake = failing if step == "open" else HalfWritten
            monkeypatch.setattr(storage, "open", fake, raising=False)
        else:
            monkeypatch.setattr(os, step, failing)

    return install


# --------------------------------------------------------------------------- write_atomically


@pytest.mark.parametrize("content", [b"", b"one", b"\r\n\x00\xff" * 100_000], ids=len)
def test_written_content_is_read_back(tmp_path, content):
    path = tmp_path / "file"
    write_atomically(path, content)
    assert path.read_bytes() == content
    write_atomically(str(path), content + b"more")
    assert path.read_bytes() == content + b"more"
    assert os.listdir(tmp_path) == ["file"]


BEFORE_THE_RENAME = [("open", 1), ("write", 1), ("fsync", 1), ("replace", 1)]


@pytest.mark.parametrize(("step", "nth"), BEFORE_THE_RENAME)
def test_write_that_fails_leaves_the_old_content_and_no_rest(tmp_path, fail_at, step, nth):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    fail_at(step, nth)
    with pytest.raises(ResourceError) as caught:
        write_atomically(path, b"new content")
    assert str(path) in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("step", "nth"), BEFORE_THE_RENAME)
def test_first_write_that_fails_leaves_nothing(tmp_path, fail_at, step, nth):
    fail_at(step, nth)
    with pytest.raises(ResourceError):
        write_atomically(tmp_path / "file", b"new content")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fsync for folders")
def test_rename_that_may_not_last_is_reported_with_the_new_content_whole(tmp_path, fail_at):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    fail_at("fsync", nth=2)  # the folder's
    with pytest.raises(ResourceError):
        write_atomically(path, b"new content")
    assert path.read_bytes() == b"new content"
    assert os.listdir(tmp_path) == ["file"]


def test_interrupted_write_leaves_the_old_content_and_no_rest(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_content_is_on_the_disk_before_the_rename_and_the_rename_after(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle):
        is_folder = os.path.samestat(os.fstat(handle), os.stat(tmp_path))
        events.append("fsync folder" if is_folder else f"fsync {os.fstat(handle).st_size} bytes")
        real_fsync(handle)

    def replace(source, target):
        assert os.path.dirname(source) == str(tmp_path)  # a rename is atomic in one file system
        events.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "file", b"new content")
    folder = [] if os.name == "nt" else ["fsync folder"]
    assert events == ["fsync 11 bytes", "replace", *folder]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomically(path, b"x"),
        lambda path: write_json(path, {}),
        lambda path: append_json_lines(path, [{}]),
    ],
    ids=["write_atomically", "write_json", "append_json_lines"],
)
def test_write_into_a_missing_folder_is_a_resource_error(tmp_path, write):
    path = tmp_path / "missing" / "file"
    with pytest.raises(ResourceError) as caught:
        write(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 6
    assert len(str(caught.value).splitlines()) <= 4


def test_folder_in_the_way_is_a_resource_error_and_stays(tmp_path):
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(ResourceError):
        write_atomically(tmp_path / "file", b"x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "inside"]


# ------------------------------------------------------------------------------------ NewFile


def test_file_written_in_parts_appears_whole_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with NewFile(path) as file:
        for part in (b"one ", memoryview(b"two "), b"", np.arange(3, dtype=np.uint8).data):
            file.write(part)
            assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"one two \x00\x01\x02"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("old", [b"old", None], ids=["over a file", "over nothing"])
@pytest.mark.parametrize("error", [None, ValueError("mine"), KeyboardInterrupt()], ids=repr)
def test_file_discarded_or_left_by_an_error_never_appears(tmp_path, old, error):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def write():
        with NewFile(path) as file:
            file.write(b"new" * 100_000)
            if error is None:
                file.discard()
            else:
                raise error

    if error is None:
        write()
    else:
        with pytest.raises(type(error)) as caught:
            write()
        assert caught.value is error
    assert os.listdir(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_durable_file_is_fsynced(tmp_path, monkeypatch, durable):
    fsynced = []
    monkeypatch.setattr(os, "fsync", fsynced.append)
    with NewFile(tmp_path / "file", durable=durable) as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert bool(fsynced) == durable


def test_threads_that_write_the_same_file_leave_the_whole_content_of_one(tmp_path):
    path = tmp_path / "file"
    barrier = threading.Barrier(4)
    failed = []

    def write(letter: bytes) -> None:
        try:
            for _ in range(20):
                with NewFile(path, durable=False) as file:
                    barrier.wait(timeout=30)
                    file.write(letter * 50_000)
                    barrier.wait(timeout=30)
                    file.write(letter * 50_000)
        except Exception as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=write, args=(bytes([65 + i]),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    content = path.read_bytes()
    assert content in [bytes([65 + i]) * 100_000 for i in range(4)]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
@pytest.mark.parametrize("size", [2_000, 5_000_000])  # below and above the buffer of a file
def test_file_that_the_system_stops_growing_leaves_the_old_content_and_no_rest(tmp_path, size):
    (tmp_path / "file").write_bytes(b"old")
    program = f"""
import resource, signal
from engine.errors import ResourceError
from engine.storage import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically({str(tmp_path / "file")!r}, b"x" * {size})
except ResourceError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.startswith("refused: can't write"), done.stderr
    assert done.stderr == ""
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


# --------------------------------------------------------------------------------------- JSON


def test_numbers_that_are_not_finite_become_null(tmp_path):
    value = {"loss": math.nan, "rows": [1.5, -math.inf, (math.inf, {"x": math.nan})], "n": 2}
    write_json(tmp_path / "x.json", value)
    expected = {"loss": None, "rows": [1.5, None, [None, {"x": None}]], "n": 2}
    assert json.loads((tmp_path / "x.json").read_bytes()) == expected
    assert math.isnan(value["loss"])


def test_chinese_stays_readable_and_the_file_is_utf8_on_every_system(tmp_path):
    write_json(tmp_path / "x.json", {"题": "春江潮水连海平\n"})
    assert (tmp_path / "x.json").read_bytes() == ('{\n  "题": "春江潮水连海平\\n"\n}\n'.encode())


@pytest.mark.parametrize(
    "value",
    [{}, [], None, True, 0, -1.5, 2**70, '\x00\u2028"\\', "\udcff.txt", {"a": [{"b": False}]}],
    ids=ascii,
)
def test_json_comes_back_as_it_was(tmp_path, value):
    write_json(tmp_path / "x.json", value)
    append_json_lines(tmp_path / "x.jsonl", [{"row": value}])
    assert json.loads((tmp_path / "x.json").read_bytes()) == value
    assert json.loads((tmp_path / "x.jsonl").read_bytes()) == {"row": value}


@pytest.mark.parametrize(
    ("value", "text"),
    [(np.int64(3), "3"), (np.float32(0.5), "0.5"), (np.float64("nan"), "null")],
    ids=["int64", "float32", "nan"],
)
def test_numpy_numbers_are_written_as_numbers(value, text):
    assert to_json(value) == text


def test_rows_are_appended_one_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    append_json_lines(path, [{"step": 1, "loss": math.nan}, {"step": 2, "text": "a\nb\u2028 春"}])
    append_json_lines(path, [])
    append_json_lines(path, [{"step": 3}])
    content = path.read_bytes()
    assert content.endswith(b"}\n") and b"\r" not in content and "春".encode() in content
    assert [json.loads(line) for line in content.split(b"\n")[:-1]] == [
        {"step": 1, "loss": None},
        {"step": 2, "text": "a\nb\u2028 春"},
        {"step": 3},
    ]


@pytest.mark.parametrize("step", ["open", "write"])
def test_log_that_the_disk_cannot_take_is_a_resource_error(tmp_path, fail_at, step):
    path = tmp_path / "log.jsonl"
    append_json_lines(path, [{"step": 1}])
    fail_at(step)
    with pytest.raises(ResourceError, match=r"log\.jsonl: No space left on device"):
        append_json_lines(path, [{"step": 2}])
    assert path.read_bytes().startswith(b'{"step": 1}\n')


# ------------------------------------------------------------------------------------ folders


def test_new_folder_is_made_once_with_its_parents(tmp_path):
    path = tmp_path / "a" / "b"
    assert make_new_folder(path) is True
    assert path.is_dir()
    assert make_new_folder(path) is False


def test_folder_is_made_however_often_it_is_asked_for(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("make", [make_folder, make_new_folder])
def test_folder_below_a_file_is_a_resource_error(tmp_path, make):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="can't write"):
        make(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"


def test_finished_folder_gets_its_name_with_all_that_is_in_it(tmp_path):
    (tmp_path / "source" / "inside").mkdir(parents=True)
    (tmp_path / "source" / "inside" / "file").write_bytes(b"x")
    assert rename_folder(tmp_path / "source", tmp_path / "target") is True
    assert (tmp_path / "target" / "inside" / "file").read_bytes() == b"x"
    assert os.listdir(tmp_path) == ["target"]


def test_folder_that_another_made_first_stays_as_it_is(tmp_path):
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert rename_folder(tmp_path / "source", tmp_path / "target") is False
    assert (tmp_path / "target" / "file").read_text() == "target"
    assert (tmp_path / "source" / "file").read_text() == "source"


@pytest.mark.parametrize("in_the_way", ["target is a file", "parent is a file", "no source"])
def test_folder_that_cannot_get_its_name_is_a_resource_error(tmp_path, in_the_way):
    target = tmp_path / "target"
    if in_the_way == "parent is a file":
        target.write_text("x")
        target = target / "below"
    elif in_the_way == "target is a file":
        target.write_text("x")
    if in_the_way != "no source":
        (tmp_path / "source").mkdir()
    with pytest.raises(ResourceError) as caught:
        rename_folder(tmp_path / "source", target)
    assert str(target) in str(caught.value)
    assert (tmp_path / "source").is_dir() == (in_the_way != "no source")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fsync for folders")
def test_folder_whose_new_name_may_not_last_is_a_resource_error(tmp_path, fail_at):
    (tmp_path / "source").mkdir()
    fail_at("fsync")
    with pytest.raises(ResourceError):
        rename_folder(tmp_path / "source", tmp_path / "target")
    assert os.listdir(tmp_path) == ["target"]
