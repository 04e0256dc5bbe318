"""Durable writes: whole or not at all, in the right order, and readable by others."""

import builtins
import errno
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from engine.errors import BusyError, CheckpointError, ResourceError
from storage import files as storage
from storage.files import (
    MANIFEST,
    FolderLock,
    NewFile,
    NewFolder,
    append_json_lines,
    fsync_file,
    is_portable_name,
    make_folder,
    make_new_folder,
    remove_file,
    remove_folder,
    remove_orphans,
    rename_file,
    rename_folder,
    require_space,
    set_aside,
    to_json,
    verify_folder,
    write_atomically,
    write_json,
)
from tests.conftest import REPOSITORY

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
from storage.files import write_atomically
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


def test_folder_that_a_killed_process_made_is_made_durable_by_the_next(tmp_path, monkeypatch):
    fsynced = []
    monkeypatch.setattr(storage, "_fsync_folder", fsynced.append)
    (tmp_path / "a").mkdir()
    make_folder(tmp_path / "a")
    assert fsynced == [tmp_path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fsync for folders")
def test_folder_that_is_there_will_do_where_the_one_above_cannot_be_fsynced(tmp_path, fail_at):
    (tmp_path / "a").mkdir()
    fail_at("fsync")
    make_folder(tmp_path / "a")


# ------------------------------------------------------------------------------ sealed folders

FILES = {"model": bytes(range(256)) * 40, "empty": b"", "state.json": b'{"a": 1}\n'}
FACTS = {"step": 5, "run_id": "abc", "\u6b65": [1.5, None]}


@pytest.fixture
def sealed(tmp_path):
    """A folder step-5 of three files."""
    with NewFolder(tmp_path / "step-5", FACTS) as folder:
        for name, content in FILES.items():
            folder.write(name, [content[:1000], memoryview(content)[1000:]])
    return tmp_path / "step-5"


def test_sealed_folder_has_its_files_and_gives_its_facts_back(sealed):
    assert verify_folder(sealed) == FACTS
    assert {name: (sealed / name).read_bytes() for name in FILES} == FILES
    assert sorted(os.listdir(sealed)) == sorted([*FILES, MANIFEST])
    assert os.listdir(sealed.parent) == ["step-5"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=repr)
def test_folder_left_by_an_error_never_appears(tmp_path, error):
    with pytest.raises(type(error)) as caught, NewFolder(tmp_path / "step-5", FACTS) as folder:
        folder.write("model", [b"x"])
        assert not (tmp_path / "step-5").exists()
        raise error
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_folder_whose_chunks_fail_never_appears(tmp_path):
    def chunks():
        yield b"half"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), NewFolder(tmp_path / "step-5", FACTS) as folder:
        folder.write("model", chunks())
    assert os.listdir(tmp_path) == []


def test_sealed_folder_that_is_there_is_not_written_over(sealed):
    with pytest.raises(ResourceError), NewFolder(sealed, {"step": 6}) as folder:
        folder.write("model", [b"new"])
    assert verify_folder(sealed) == FACTS
    assert os.listdir(sealed.parent) == ["step-5"]


def damage(path, how):
    """Do to a file what disks, copies and people do."""
    content = path.read_bytes()
    half = len(content) // 2
    if how == "missing":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "a link":
        path.rename(path.parent.parent / "elsewhere")
        path.symlink_to(path.parent.parent / "elsewhere")
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes(
            {
                "cut off": content[:half],
                "one byte short": content[:-1],
                "one byte more": content + b"\0",
                "empty": b"",
                "zeros at the end": content[:half] + bytes(len(content) - half),
                "zeros": bytes(len(content)),
            }[how]
        )


DAMAGES = (
    "missing",
    "a folder",
    "a link",
    "a pipe",
    "cut off",
    "one byte short",
    "one byte more",
    "empty",
    "zeros at the end",
    "zeros",
)


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["model", "state.json", MANIFEST])
def test_damaged_folder_is_refused_and_the_file_named(sealed, name, how):
    damage(sealed / name, how)
    with pytest.raises(CheckpointError, match=name):
        verify_folder(sealed)


def test_file_of_another_length_is_refused_with_both_lengths(sealed):
    damage(sealed / "model", "one byte short")
    with pytest.raises(CheckpointError, match="model has 10,239 bytes instead of 10,240"):
        verify_folder(sealed)


@pytest.mark.skipif(os.name == "nt", reason="needs pwrite")
@pytest.mark.parametrize("name", ["state.json", MANIFEST])
def test_every_bit_that_flips_is_noticed(sealed, name):
    content = (sealed / name).read_bytes()
    with open(sealed / name, "r+b", buffering=0) as file:
        for place in range(8 * len(content)):
            byte = content[place // 8]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place // 8)
            with pytest.raises(CheckpointError, match=name):
                verify_folder(sealed)
            os.pwrite(file.fileno(), bytes([byte]), place // 8)
    assert verify_folder(sealed) == FACTS


def test_every_truncation_of_a_manifest_is_noticed(sealed):
    for length in reversed(range((sealed / MANIFEST).stat().st_size)):
        os.truncate(sealed / MANIFEST, length)
        with pytest.raises(CheckpointError, match=MANIFEST):
            verify_folder(sealed)


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
@pytest.mark.parametrize("how", DAMAGES)
def test_of_a_folder_only_the_files_that_are_required_may_be_verified(sealed, how):
    damage(sealed / "model", how)  # a pipe would be waited for if it were opened
    for required in ([], ["state.json"], ["state.json", "empty"]):
        assert verify_folder(sealed, required, others=False) == FACTS
    for required in (["model"], ["state.json", "model"]):
        with pytest.raises(CheckpointError, match="model"):
            verify_folder(sealed, required, others=False)
    with pytest.raises(CheckpointError, match="model"):
        verify_folder(sealed, ["state.json"])


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
def test_link_or_pipe_is_refused_though_its_length_is_right(sealed):
    content = FILES["state.json"]
    (sealed / "elsewhere"[: len(content)]).write_bytes(content)
    (sealed / "state.json").unlink()
    (sealed / "state.json").symlink_to("elsewhere"[: len(content)])
    assert (sealed / "state.json").lstat().st_size == len(content)
    with pytest.raises(CheckpointError, match=r"state\.json is no regular file"):
        verify_folder(sealed)
    (sealed / "empty").unlink()
    os.mkfifo(sealed / "empty")  # who opens it waits for ever
    with pytest.raises(CheckpointError, match="empty is no regular file"):
        verify_folder(sealed, ["empty"], others=False)


@pytest.mark.parametrize("others", [True, False])
def test_required_file_must_be_among_the_sealed_ones(sealed, others):
    (sealed / "added").write_bytes(b"later")
    with pytest.raises(CheckpointError, match=rf"{MANIFEST} does not name added"):
        verify_folder(sealed, ["model", "added"], others=others)


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
@pytest.mark.parametrize("how", DAMAGES)
def test_manifest_is_verified_whatever_else_is(sealed, how):
    damage(sealed / MANIFEST, how)
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify_folder(sealed, [], others=False)


FILE = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "content",
    [
        {"files": {"../outside": FILE}},
        {"files": {"/etc/passwd": FILE}},
        {"files": {"C:x": FILE}},
        {"files": {"..": FILE}},
        {"files": {"": FILE}},
        {"files": {"a\\b": FILE}},
        {"files": {"a\0": FILE}},
        {"files": ["model"]},
        {"files": {"model": None}},
        {"files": {"model": {}}},
        {"files": {"model": FILE | {"bytes": "1"}}},
        {"files": {"model": FILE | {"sha256": 5}}},
        {"files": None},
        {},
        [],
        None,
        "x",
    ],
    ids=repr,
)
def test_well_sealed_manifest_of_another_shape_is_refused(sealed, content):
    (sealed / MANIFEST).write_bytes(storage._seal(content))
    with pytest.raises(CheckpointError):
        verify_folder(sealed)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"content": ' * 20_000, b"\xff\xfe", b"{}", b" " * (2 << 20), b"null"],
    ids=["lists", "objects", "no text", "nothing in it", "2 MB", "null"],
)
def test_manifest_that_is_none_is_refused(sealed, content):
    (sealed / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify_folder(sealed)


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_set_aside_keeps_its_content_and_the_earlier_ones(tmp_path, is_folder):
    for number, expected in enumerate([".bad-step-5", ".bad-step-5-2", ".bad-step-5-3"]):
        path = tmp_path / "step-5"
        if is_folder:
            path.mkdir()
        (path / "file" if is_folder else path).write_text(f"{number}")
        aside = set_aside(path)
        assert aside == tmp_path / expected
        assert (aside / "file" if is_folder else aside).read_text() == f"{number}"
        assert not path.exists()
    assert (tmp_path / ".bad-step-5").exists()


def test_what_cannot_be_set_aside_is_a_resource_error_and_stays(sealed, fail_at):
    fail_at("rename")
    with pytest.raises(ResourceError, match="step-5"):
        set_aside(sealed)
    assert verify_folder(sealed) == FACTS


def test_removed_folder_is_gone_and_one_that_cannot_be_stays_whole(sealed, fail_at):
    shutil.copytree(sealed, sealed.with_name("step-4"))
    remove_folder(sealed.with_name("step-4"))
    remove_folder(sealed.with_name("step-3"))  # another was quicker
    assert os.listdir(sealed.parent) == ["step-5"]
    fail_at("rename")
    remove_folder(sealed)
    assert verify_folder(sealed) == FACTS


def test_folder_that_cannot_be_emptied_has_lost_its_name_and_goes_later(sealed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(FULL))
        remove_folder(sealed)
    assert not sealed.exists()
    assert os.listdir(sealed.parent) == [f".del-{os.getpid()}-step-5"]
    remove_orphans(sealed.parent)
    assert os.listdir(sealed.parent) == []


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_orphans_go_and_nothing_else(sealed):
    base, outside = sealed.parent, sealed.parent / "outside"
    outside.mkdir()
    (outside / "mine").write_text("x")
    for name in (".tmp-1-step-6", ".del-2-step-3"):
        shutil.copytree(sealed, base / name)
    (base / ".tmp-3-summary.json").write_text("{")
    (base / ".tmp-link").symlink_to(outside, target_is_directory=True)
    (base / ".bad-step-4").mkdir()
    (base / "tmp-notes").write_text("x")
    remove_orphans(base)
    assert sorted(os.listdir(base)) == [".bad-step-4", "outside", "step-5", "tmp-notes"]
    assert verify_folder(sealed) == FACTS
    assert (outside / "mine").read_text() == "x"
    remove_orphans(base / "missing")


def test_disk_that_is_too_small_is_a_resource_error_with_both_sizes(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, free // 2, "a checkpoint")
    with pytest.raises(ResourceError) as caught:
        require_space(tmp_path, 10 * free, "a checkpoint")
    message = str(caught.value)
    assert f"a checkpoint takes {10 * free / 1e6:,.1f} MB" in message and str(tmp_path) in message
    with pytest.raises(ResourceError, match="missing"):
        require_space(tmp_path / "missing", 1, "a checkpoint")


def test_file_that_is_fsynced_must_be_there(tmp_path, monkeypatch):
    fsynced = []
    monkeypatch.setattr(os, "fsync", lambda handle: fsynced.append(os.fstat(handle).st_size))
    (tmp_path / "log").write_bytes(b"12345")
    fsync_file(tmp_path / "log")
    assert fsynced == [5]
    assert (tmp_path / "log").read_bytes() == b"12345"
    with pytest.raises(ResourceError, match="missing"):
        fsync_file(tmp_path / "missing")


def test_storage_does_without_torch():
    code = "import sys, storage.files; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


# ---------------------------------------------------------------------- Windows' own ways


class Clock:
    """The time module as far as storage waits by it; a sleep takes no time."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def refused(monkeypatch):
    """Let Windows refuse a call of os's for some seconds of a clock that is set by sleeping."""
    clock = Clock()
    began_at = clock.now
    monkeypatch.setattr(storage, "time", clock)

    def install(call: str, for_s: float, winerror: int = 32) -> Clock:
        real = getattr(os, call)

        def refuse(*arguments, **keywords):
            if clock.now - began_at < for_s:
                error = PermissionError(errno.EACCES, "Access is denied", os.fspath(arguments[0]))
                error.winerror = winerror
                raise error
            return real(*arguments, **keywords)

        monkeypatch.setattr(os, call, refuse)
        return clock

    return install


def seal(path) -> None:
    with NewFolder(path, {}) as folder:
        folder.write("model", [b"new"])


# what is done, the call of os's that commits it, and what is left of "old" and "new" afterwards
COMMITS = {
    "replace a file": (lambda p: write_atomically(p / "old", b"new"), "replace", {"old": b"new"}),
    "rename a file": (lambda p: rename_file(p / "old", p / "new"), "replace", {"new": b"old"}),
    "remove a file": (lambda p: remove_file(p / "old"), "unlink", {}),
    "set a file aside": (lambda p: set_aside(p / "old"), "rename", {".bad-old": b"old"}),
    "seal a folder": (lambda p: seal(p / "new"), "rename", {"old": b"old", "new": None}),
    "rename a folder": (
        lambda p: rename_folder(p, p.with_name("elsewhere")),
        "rename",
        {"old": b"old"},
    ),
}


def content_of(folder) -> dict[str, bytes | None]:
    return {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}


@pytest.mark.parametrize("winerror", storage.HELD_OPEN)
@pytest.mark.parametrize("commit", COMMITS)
def test_what_another_program_holds_open_is_waited_for(tmp_path, refused, commit, winerror):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    act, call, after = COMMITS[commit]
    clock = refused(call, for_s=4.9, winerror=winerror)
    act(folder)
    assert 104.9 <= clock.now <= 105
    assert content_of(next(tmp_path.iterdir())) == after


@pytest.mark.parametrize("commit", COMMITS)
def test_what_stays_open_is_a_resource_error_after_5_s_that_says_so(tmp_path, refused, commit):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    act, call, _ = COMMITS[commit]
    clock = refused(call, for_s=math.inf)
    with pytest.raises(ResourceError) as caught:
        act(folder)
    assert 105 <= clock.now <= 105 + storage.TIDY_S
    message = str(caught.value)
    assert message.startswith(f"can't write {tmp_path}")
    assert "Access is denied (another program may have it open)." in message
    assert "Close what may have it open" in message
    assert len(message.splitlines()) <= 4
    if call != "unlink":  # which would have removed the temporary file, too
        assert content_of(folder) == {"old": b"old"}


def test_refusals_that_no_waiting_ends_are_raised_at_once(tmp_path, refused, fail_at):
    (tmp_path / "in the way" / "inside").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    clock = refused("replace", for_s=math.inf, winerror=5)  # so Windows tells of a folder, too
    with pytest.raises(ResourceError, match="Is a directory"):
        write_atomically(tmp_path / "in the way", b"x")
    refused("rename", for_s=math.inf, winerror=5)
    assert rename_folder(tmp_path / "other", tmp_path / "in the way") is False
    fail_at("replace")
    with pytest.raises(ResourceError, match="No space left"):
        write_atomically(tmp_path / "file", b"x")
    assert clock.now == 100


@pytest.mark.skipif(os.name == "nt", reason="a refusal there is always waited for")
def test_on_other_systems_nothing_is_waited_for(tmp_path, monkeypatch, refused):
    clock = refused("rename", for_s=0)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ResourceError, match=r"Permission denied\.\nChoose another folder"):
        write_atomically(tmp_path / "file", b"x")
    assert clock.now == 100


def test_how_long_a_file_is_waited_for_can_be_said(tmp_path, refused):
    clock = refused("replace", for_s=3)
    for patience_s, waited_s in ((0, 0), (1, 1), (2, 3)):
        if waited_s < 3:
            with pytest.raises(ResourceError):
                write_atomically(tmp_path / "file", b"x", patience_s=patience_s)
        else:
            write_atomically(tmp_path / "file", b"x", patience_s=patience_s)
        assert clock.now == pytest.approx(100 + waited_s)
    assert os.listdir(tmp_path) == ["file"]


def test_ctrl_c_ends_the_wait_and_leaves_the_old_content(tmp_path, refused):
    (tmp_path / "file").write_bytes(b"old")
    clock = refused("replace", for_s=math.inf)

    def interrupt(seconds):
        raise KeyboardInterrupt

    clock.sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert content_of(tmp_path) == {"file": b"old"}


def test_folder_that_stays_open_stays_whole_and_is_not_removed(sealed, refused):
    clock = refused("rename", for_s=math.inf)
    assert remove_folder(sealed) is False
    assert 105 <= clock.now < 105.1
    assert verify_folder(sealed) == FACTS


def test_folder_is_removed_though_its_files_are_open_for_a_moment(sealed, refused):
    refused("rename", for_s=4)
    refused("unlink", for_s=4.3)
    refused("rmdir", for_s=4.4, winerror=145)  # a file in it is still going
    assert remove_folder(sealed) is True
    assert os.listdir(sealed.parent) == []


def test_orphan_that_is_open_is_left_soon_and_the_others_go(tmp_path, refused):
    for name in (".tmp-1-a", ".tmp-2-b", ".del-3-c"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-2-b" / "open").write_bytes(b"x")
    clock = refused("unlink", for_s=math.inf)
    remove_orphans(tmp_path)
    assert os.listdir(tmp_path) == [".tmp-2-b"]
    assert 100.5 <= clock.now < 100.6


def test_drive_that_is_not_there_is_a_resource_error(tmp_path, monkeypatch):
    def missing(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "mkdir", missing)
    monkeypatch.setattr(storage.Path, "is_dir", lambda path: False)  # nor is the root above it
    with pytest.raises(ResourceError, match="No such file"):
        make_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["a", "run 1", "春.txt", "console", "com", "com10", "a.con", "nul-1", ".x", "v1.2"]
)
def test_name_that_every_system_takes(name):
    assert is_portable_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("con", "CON", "Nul.txt", "com1", "lpt¹.x", "aux ", "aux .x", "conin$", "prn."),
        *("", ".", "..", "a.", "a ", "a:b", "a/b", "a\\b", "a?", "a*", 'a"', "<a", "a|b", "a\tb"),
    ],
)
def test_name_that_windows_does_not_take_as_it_is(name):
    assert not is_portable_name(name)


# ------------------------------------------------------------------------------------ the lock


def test_lock_tells_who_holds_it(tmp_path):
    with FolderLock(tmp_path):
        owner = json.loads((tmp_path / ".lock-owner.json").read_bytes())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        with pytest.raises(BusyError) as caught, FolderLock(tmp_path):
            pass
    assert caught.value.exit_code == 7
    for part in (str(tmp_path), str(owner["pid"]), owner["host"], owner["since"]):
        assert part in str(caught.value)


def test_asking_whether_a_folder_is_free_makes_nothing_and_takes_nothing(tmp_path):
    FolderLock(tmp_path).require_free()
    assert list(tmp_path.iterdir()) == []
    code = (
        "import sys; from storage.files import FolderLock\n"
        f"with FolderLock({str(tmp_path)!r}): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        for _ in range(2):
            with pytest.raises(BusyError, match=f"in use by process {holder.pid} on "):
                FolderLock(tmp_path).require_free()
        holder.stdin.close()
    FolderLock(tmp_path).require_free()
    with FolderLock(tmp_path):
        with pytest.raises(BusyError):
            FolderLock(tmp_path).require_free()
        with pytest.raises(BusyError), FolderLock(tmp_path):
            pass


@pytest.mark.parametrize("owner", [b"", b"{", b"[]", b"{}", b"\xff", None], ids=repr)
def test_lock_is_refused_whatever_its_second_file_says(tmp_path, owner):
    with FolderLock(tmp_path):
        path = tmp_path / ".lock-owner.json"
        path.unlink() if owner is None else path.write_bytes(owner)
        with pytest.raises(BusyError, match="another process"), FolderLock(tmp_path):
            pass


def test_two_folders_are_locked_apart_and_two_names_of_one_are_not(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    again = FolderLock(tmp_path / "b" / ".." / "a")
    with FolderLock(tmp_path / "a"), FolderLock(tmp_path / "b"), pytest.raises(BusyError), again:
        pass
    with FolderLock(tmp_path / "a"), FolderLock(tmp_path / "b"):
        pass


def test_folder_that_cannot_be_locked_is_a_resource_error_and_not_held(tmp_path):
    with pytest.raises(ResourceError, match="missing"), FolderLock(tmp_path / "missing"):
        pass
    (tmp_path / ".lock-owner.json" / "in the way").mkdir(parents=True)
    with pytest.raises(ResourceError, match="lock-owner"), FolderLock(tmp_path):
        pass
    shutil.rmtree(tmp_path / ".lock-owner.json")
    with FolderLock(tmp_path):
        pass
