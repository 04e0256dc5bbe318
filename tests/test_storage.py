"""Durable writes: whole or not at all, in the right order, and readable by others."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

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
from tests.faults.locks import owner_of
from tests.faults.saving import read_tree, write_tree
from tests.hostile import hostile_json


@pytest.fixture
def fail_at(monkeypatch):
    """Let a call of os's fail as on a full disk; test_survival fails each call of a session."""
    full = OSError(errno.ENOSPC, "No space left on device")
    return lambda call: monkeypatch.setattr(os, call, Mock(side_effect=full))


@pytest.mark.parametrize("durable", [True, False])
def test_file_written_in_parts_appears_whole_when_the_block_ends(tmp_path, monkeypatch, durable):
    path, fsynced = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", fsynced.append)
    for content in (b"old", b"", b"\r\n\x00\xff" * 100_000, b"old"):
        write_atomically(str(path), content)
        assert path.read_bytes() == content
    fsynced.clear()
    with NewFile(path, durable=durable) as file:
        for part in (b"one ", memoryview(b"two "), b"", np.arange(3, dtype=np.uint8).data):
            file.write(part)
            assert path.read_bytes() == b"old"
    assert read_tree(tmp_path) == {"file": b"one two \x00\x01\x02"}
    assert bool(fsynced) == durable


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_that_fails_leaves_what_was_there_and_no_rest(tmp_path, fail_at, step):
    (tmp_path / "old").write_bytes(b"old")
    fail_at(step)
    for path in (tmp_path / "old", tmp_path / "new"):
        with pytest.raises(ResourceError, match=f"{path.name}: No space left on device"):
            write_atomically(path, b"new content")
    assert read_tree(tmp_path) == {"old": b"old"}


def test_write_into_a_missing_folder_or_over_one_is_a_resource_error(tmp_path):
    path = tmp_path / "missing" / "file"
    for write, value in ((write_atomically, b"x"), (write_json, {}), (append_json_lines, [{}])):
        with pytest.raises(ResourceError, match=re.escape(str(path))) as caught:
            write(path, value)
        assert caught.value.exit_code == 6
        assert len(str(caught.value).splitlines()) <= 4
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(ResourceError):
        write_atomically(tmp_path / "file", b"x")
    assert read_tree(tmp_path) == {"file": {"inside": {}}}


@pytest.mark.parametrize("error", [None, ValueError("mine"), KeyboardInterrupt()], ids=repr)
def test_file_discarded_or_left_by_an_error_never_appears(tmp_path, error):
    (tmp_path / "old").write_bytes(b"old")
    for name in ("old", "new"):
        raised = pytest.raises(type(error)) if error else contextlib.nullcontext()
        with raised as caught, NewFile(tmp_path / name) as file:
            file.write(b"new" * 100_000)
            if error:
                raise error
            file.discard()
        assert error is None or caught.value is error
    assert read_tree(tmp_path) == {"old": b"old"}


def test_threads_that_write_the_same_file_leave_the_whole_content_of_one(tmp_path):
    barrier = threading.Barrier(4)

    def write(letter: bytes) -> None:
        for _ in range(20):
            with NewFile(tmp_path / "file", durable=False) as file:
                for _ in range(2):
                    barrier.wait(timeout=60)
                    file.write(letter * 50_000)

    letters = [b"A", b"B", b"C", b"D"]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, letters)) == [None] * 4
    assert read_tree(tmp_path) in [{"file": letter * 100_000} for letter in letters]


def test_json_comes_back_as_it_was_readable_and_in_utf8(tmp_path):
    odd = [{}, [], None, True, 0, -1.5, 2**70, '\x00\u2028"\\', "\udcff.txt", {"a": [{"b": False}]}]
    for value in odd:
        write_json(tmp_path / "x.json", value)
        assert json.loads((tmp_path / "x.json").read_bytes()) == value
    write_json(tmp_path / "x.json", {"题": "春江潮水连海平\n"})
    assert (tmp_path / "x.json").read_bytes() == ('{\n  "题": "春江潮水连海平\\n"\n}\n'.encode())
    rows = [{"step": 1, "loss": None}, *({"row": value, "text": "a\nb 春"} for value in odd)]
    for some in (rows[:2], [], rows[2:]):
        append_json_lines(tmp_path / "x.jsonl", some)
    content = (tmp_path / "x.jsonl").read_bytes()
    assert content.endswith(b"}\n") and b"\r" not in content and "春".encode() in content
    assert [json.loads(line) for line in content.split(b"\n")[:-1]] == rows


def test_numbers_that_are_not_finite_become_null_and_numpys_become_numbers():
    value = {"loss": math.nan, "rows": [1.5, -math.inf, (math.inf, {"x": math.nan})], "n": 2}
    expected = {"loss": None, "rows": [1.5, None, [None, {"x": None}]], "n": 2}
    assert json.loads(to_json(value)) == expected
    assert math.isnan(value["loss"])
    numbers = [np.int64(3), np.float32(0.5), np.float64("nan")]
    assert [to_json(number) for number in numbers] == ["3", "0.5", "null"]


def test_folder_is_made_with_its_parents_and_told_from_one_that_was_there(tmp_path, monkeypatch):
    assert make_new_folder(tmp_path / "a" / "b") is True
    assert make_new_folder(tmp_path / "a" / "b") is False
    for _ in range(2):
        make_folder(tmp_path / "c" / "d")
    (tmp_path / "file").write_bytes(b"x")
    for make in (make_folder, make_new_folder):
        with pytest.raises(ResourceError, match="can't write"):
            make(tmp_path / "file" / "below")
    assert read_tree(tmp_path) == {"a": {"b": {}}, "c": {"d": {}}, "file": b"x"}
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    monkeypatch.setattr(os, "mkdir", Mock(side_effect=missing))
    monkeypatch.setattr(storage.Path, "is_dir", lambda path: False)  # nor is the root above it
    with pytest.raises(ResourceError, match="No such file"):
        make_folder(tmp_path / "missing drive")


def test_finished_folder_gets_its_name_unless_another_was_first(tmp_path):
    for name in ("source", "second"):
        write_tree({"inside": {"file": name.encode()}}, tmp_path / name)
    (tmp_path / "file").write_bytes(b"x")
    assert rename_folder(tmp_path / "source", tmp_path / "target") is True
    assert rename_folder(tmp_path / "second", tmp_path / "target") is False
    for source, target in (("second", "file"), ("second", "file/below"), ("missing", "other")):
        with pytest.raises(ResourceError, match=re.escape(str(tmp_path / target))):
            rename_folder(tmp_path / source, tmp_path / target)
    source, second = ({"inside": {"file": content}} for content in (b"source", b"second"))
    assert read_tree(tmp_path) == {"file": b"x", "second": second, "target": source}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fsync for folders")
def test_folder_that_a_killed_process_made_is_made_durable_if_it_can_be(
    tmp_path, monkeypatch, fail_at
):
    fsynced = []
    (tmp_path / "a").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: fsynced.append(os.fstat(handle).st_ino))
        make_folder(tmp_path / "a")
    assert fsynced == [tmp_path.stat().st_ino]
    fail_at("fsync")
    make_folder(tmp_path / "a")


FILES = {"model": bytes(range(256)) * 40, "empty": b"", "state.json": b'{"a": 1}\n'}
FACTS = {"step": 5, "run_id": "abc", "\u6b65": [1.5, None]}


@pytest.fixture
def sealed(tmp_path):
    """A folder step-5 of three files."""
    with NewFolder(tmp_path / "step-5", FACTS) as folder:
        for name, content in FILES.items():
            folder.write(name, [content[:1000], memoryview(content)[1000:]])
    return tmp_path / "step-5"


def test_sealed_folder_has_its_files_gives_its_facts_back_and_is_not_written_over(sealed):
    assert verify_folder(sealed) == FACTS
    with pytest.raises(ResourceError), NewFolder(sealed, {"step": 6}) as folder:
        folder.write("model", [b"new"])
    assert verify_folder(sealed) == FACTS
    manifest = (sealed / MANIFEST).read_bytes()
    assert read_tree(sealed.parent) == {"step-5": {**FILES, MANIFEST: manifest}}


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=repr)
def test_folder_left_by_an_error_never_appears(tmp_path, error):
    def chunks():
        yield b"half"
        raise error

    with pytest.raises(type(error)) as caught, NewFolder(tmp_path / "step-5", FACTS) as folder:
        folder.write("whole", [b"x"])
        assert not (tmp_path / "step-5").exists()
        folder.write("model", chunks())
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def link(path, content):
    elsewhere = path.parent / "elsewhere"[: len(content)]  # as long as the file, too
    elsewhere.write_bytes(content)
    path.symlink_to(elsewhere.name)


# what disks, copies and people put in a file's place
DAMAGES = {
    "missing": lambda path, content: None,
    "a folder": lambda path, content: path.mkdir(),
    "a link": link,
    "a pipe": lambda path, content: os.mkfifo(path),  # who opens it waits for ever
    "cut off": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "one byte short": lambda path, content: path.write_bytes(content[:-1]),
    "one byte more": lambda path, content: path.write_bytes(content + b"\0"),
    "zeros at the end": lambda path, content: path.write_bytes(
        content[:4].ljust(len(content), b"\0")
    ),
    "zeros": lambda path, content: path.write_bytes(bytes(len(content))),
}


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["model", "state.json", MANIFEST])
def test_damaged_folder_is_refused_and_the_file_named(sealed, name, how):
    content = (sealed / name).read_bytes()
    (sealed / name).unlink()
    DAMAGES[how](sealed / name, content)
    others = [other for other in FILES if other != name]
    for required in ([], ["state.json", "model"], others):
        with pytest.raises(CheckpointError, match=name) as caught:
            verify_folder(sealed, required)
    if (how, name) == ("one byte short", "model"):
        assert "model has 10,239 bytes instead of 10,240" in str(caught.value)
    if name == MANIFEST:  # which is verified whatever else is
        with pytest.raises(CheckpointError, match=MANIFEST):
            verify_folder(sealed, [], others=False)
    else:  # of the files only those that are required may be
        assert verify_folder(sealed, others, others=False) == FACTS
        with pytest.raises(CheckpointError, match=name):
            verify_folder(sealed, ["state.json", "model"], others=False)


@pytest.mark.skipif(os.name == "nt", reason="needs pwrite")
@pytest.mark.parametrize("name", ["state.json", MANIFEST])
def test_a_bit_of_any_byte_that_flips_and_a_file_that_ends_anywhere_are_noticed(sealed, name):
    content = (sealed / name).read_bytes()
    with open(sealed / name, "r+b", buffering=0) as file:
        for place, byte in enumerate(content):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)
            with pytest.raises(CheckpointError, match=name):
                verify_folder(sealed)
            os.pwrite(file.fileno(), bytes([byte]), place)
        assert verify_folder(sealed) == FACTS
        for length in reversed(range(len(content))):
            file.truncate(length)
            with pytest.raises(CheckpointError, match=name):
                verify_folder(sealed)


def test_required_file_must_be_among_the_sealed_ones(sealed):
    (sealed / "added").write_bytes(b"later")
    for others in (True, False):
        with pytest.raises(CheckpointError, match=rf"{MANIFEST} does not name added"):
            verify_folder(sealed, ["model", "added"], others=others)


FILE = {"bytes": 1, "sha256": "0" * 64}
ELSEWHERE = ("../outside", "/etc/passwd", "C:x", "..", "", "a\\b", "a/b", "a\0")
ODD_FILES = (["model"], None, *({"model": file} for file in (None, {}, FILE | {"bytes": "1"})))
SHAPELESS = [{"files": files} for files in (*ODD_FILES, {"model": FILE | {"sha256": 5}})]


def test_manifest_that_is_none_or_of_another_shape_is_refused(sealed):
    cases = [(storage._seal(content), "") for content in (*SHAPELESS, {}, [], None, "x")]
    for name in ELSEWHERE:
        content = storage._seal({"files": {name: FILE}})
        cases.append((content, "names files outside of its folder"))
    for content, said in cases + [(content, "") for content in hostile_json(1000).values()]:
        (sealed / MANIFEST).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{MANIFEST}.*{said}"):
            verify_folder(sealed)


def test_what_is_set_aside_keeps_its_content_and_the_earlier_ones(tmp_path):
    (tmp_path / "step-5").write_bytes(b"first")
    assert set_aside(tmp_path / "step-5") == tmp_path / ".bad-step-5"
    for number in (2, 3):
        write_tree({"file": b"later"}, tmp_path / "step-5")
        assert set_aside(tmp_path / "step-5") == tmp_path / f".bad-step-5-{number}"
    later = {".bad-step-5-2": {"file": b"later"}, ".bad-step-5-3": {"file": b"later"}}
    assert read_tree(tmp_path) == {".bad-step-5": b"first"} | later


def test_removed_folder_is_gone_and_what_cannot_be_moved_or_emptied_goes_later(
    sealed, monkeypatch, fail_at
):
    shutil.copytree(sealed, sealed.with_name("step-4"))
    remove_folder(sealed.with_name("step-4"))
    remove_folder(sealed.with_name("step-3"))  # another was quicker
    assert os.listdir(sealed.parent) == ["step-5"]
    fail_at("rename")
    remove_folder(sealed)
    with pytest.raises(ResourceError, match="step-5"):
        set_aside(sealed)
    assert verify_folder(sealed) == FACTS
    monkeypatch.undo()
    fail_at("unlink")
    remove_folder(sealed)
    monkeypatch.undo()
    assert os.listdir(sealed.parent) == [f".del-{os.getpid()}-step-5"]  # it has lost its name
    remove_orphans(sealed.parent)
    assert os.listdir(sealed.parent) == []


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_orphans_go_and_nothing_else(tmp_path):
    base, files = tmp_path / "run", {"file": b"x"}
    kept = {".bad-step-4": files, "step-5": files, "tmp-notes": b"x"}
    write_tree(
        kept | {".tmp-1-step-6": files, ".del-2-step-3": {}, ".tmp-3-summary.json": b"{"}, base
    )
    write_tree(files, tmp_path / "outside")
    (base / ".tmp-link").symlink_to(tmp_path / "outside", target_is_directory=True)
    remove_orphans(base)
    assert read_tree(tmp_path) == {"outside": files, "run": kept}
    remove_orphans(base / "missing")


def test_disk_that_is_too_small_is_a_resource_error_with_both_sizes(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, free // 2, "a checkpoint")
    with pytest.raises(ResourceError) as caught:
        require_space(tmp_path, 10 * free, "a checkpoint")
    assert f"a checkpoint takes {10 * free / 1e6:,.1f} MB" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
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


@pytest.fixture
def refused(monkeypatch):
    """Let Windows refuse a call of os's for some seconds of a clock that is set by sleeping."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(storage, "time", clock)

    def install(call: str, for_s: float, winerror: int | None = 32) -> SimpleNamespace:
        real = getattr(os, call)

        def refuse(*arguments, **keywords):
            if clock.now - 100 < for_s:
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
    "rename a folder": (lambda p: rename_folder(p, f"{p}-2"), "rename", {"old": b"old"}),
}


@pytest.mark.parametrize("winerror", storage.HELD_OPEN)
@pytest.mark.parametrize("commit", COMMITS)
def test_what_another_program_holds_open_is_waited_for_5_s(tmp_path, refused, commit, winerror):
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    act, call, after = COMMITS[commit]
    clock = refused(call, for_s=9.9, winerror=winerror)
    with pytest.raises(ResourceError) as caught:
        act(folder)
    assert 105 <= clock.now <= 105 + storage.TIDY_S
    message = str(caught.value)
    assert message.startswith(f"can't write {tmp_path}")
    assert "Access is denied (another program may have it open)." in message
    assert "Close what may have it open" in message
    assert len(message.splitlines()) <= 4
    assert read_tree(folder) == {"old": b"old"}
    act(folder)
    assert 109.9 <= clock.now <= 110
    left = read_tree(next(tmp_path.iterdir())).items()
    assert {name: kept if isinstance(kept, bytes) else None for name, kept in left} == after


def test_refusals_that_no_waiting_ends_are_raised_at_once(tmp_path, refused, fail_at):
    (tmp_path / "in the way" / "inside").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    clock = refused("replace", for_s=math.inf, winerror=None)  # as other systems do
    with pytest.raises(ResourceError, match=r"Access is denied\.\nChoose another folder"):
        write_atomically(tmp_path / "file", b"x")
    refused("replace", for_s=math.inf, winerror=5)  # so Windows tells of a folder, too
    with pytest.raises(ResourceError, match="Is a directory"):
        write_atomically(tmp_path / "in the way", b"x")
    refused("rename", for_s=math.inf, winerror=5)
    assert rename_folder(tmp_path / "other", tmp_path / "in the way") is False
    fail_at("replace")
    with pytest.raises(ResourceError, match="No space left"):
        write_atomically(tmp_path / "file", b"x")
    assert clock.now == 100


def test_how_long_a_file_is_waited_for_can_be_said_and_ctrl_c_ends_it(tmp_path, refused):
    (tmp_path / "file").write_bytes(b"old")
    clock = refused("replace", for_s=3)
    for patience_s in (0, 1):
        with pytest.raises(ResourceError):
            write_atomically(tmp_path / "file", b"new", patience_s=patience_s)
        assert clock.now == pytest.approx(100 + patience_s)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clock, "sleep", Mock(side_effect=KeyboardInterrupt))
        write_atomically(tmp_path / "file", b"new")
    assert read_tree(tmp_path) == {"file": b"old"}
    write_atomically(tmp_path / "file", b"new", patience_s=2)
    assert clock.now == pytest.approx(103)
    assert read_tree(tmp_path) == {"file": b"new"}


def test_folder_is_removed_once_it_is_not_open_and_stays_whole_until_then(sealed, refused):
    clock = refused("rename", for_s=7)
    assert remove_folder(sealed) is False
    assert 105 <= clock.now < 105.1
    assert verify_folder(sealed) == FACTS
    refused("unlink", for_s=7.3)
    refused("rmdir", for_s=7.4, winerror=145)  # a file in it is still going
    assert remove_folder(sealed) is True
    assert os.listdir(sealed.parent) == []


def test_orphan_that_is_open_is_left_soon_and_the_others_go(tmp_path, refused):
    write_tree({".tmp-1-a": {}, ".tmp-2-b": {"open": b"x"}, ".del-3-c": {}}, tmp_path / "run")
    clock = refused("unlink", for_s=math.inf)
    remove_orphans(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == [".tmp-2-b"]
    assert 100.5 <= clock.now < 100.6


def test_names_that_every_system_takes_are_told_from_those_that_windows_does_not():
    for name in ("a", "run 1", "春.txt", "console", "com", "com10", "a.con", "nul-1", ".x", "v1.2"):
        assert is_portable_name(name), name
    devices = ("con", "CON", "Nul.txt", "com1", "lpt¹.x", "aux ", "aux .x", "conin$", "prn.")
    signs = ("a:b", "a/b", "a\\b", "a?", "a*", 'a"', "<a", "a|b", "a\tb")
    for name in (*devices, *signs, "", ".", "..", "a.", "a "):
        assert not is_portable_name(name), name


def test_lock_tells_who_holds_it_and_is_refused_whatever_its_second_file_says(tmp_path):
    path = tmp_path / ".lock-owner.json"
    with FolderLock(tmp_path):
        owner = json.loads(path.read_bytes())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        with pytest.raises(BusyError) as caught, FolderLock(tmp_path):
            pass
        assert caught.value.exit_code == 7
        for part in (str(tmp_path), str(owner["pid"]), owner["host"], owner["since"]):
            assert part in str(caught.value)
        for content in (b"", b"{", b"[]", b"{}", b"\xff", None):
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(BusyError, match="another process"), FolderLock(tmp_path):
                pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs another process that holds it")
def test_asking_whether_a_folder_is_free_makes_nothing_and_takes_nothing(tmp_path):
    FolderLock(tmp_path).require_free()
    assert list(tmp_path.iterdir()) == []
    with owner_of(tmp_path) as (owner, _):
        for _ in range(2):
            with pytest.raises(BusyError, match=f"in use by process {owner} on "):
                FolderLock(tmp_path).require_free()
    FolderLock(tmp_path).require_free()
    with FolderLock(tmp_path), pytest.raises(BusyError):
        FolderLock(tmp_path).require_free()


def test_two_folders_are_locked_apart_and_two_names_of_one_are_not(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    again = FolderLock(tmp_path / "b" / ".." / "a")
    with FolderLock(tmp_path / "a"), FolderLock(tmp_path / "b"), pytest.raises(BusyError), again:
        pass


def test_folder_that_cannot_be_locked_is_a_resource_error_and_not_held(tmp_path):
    with pytest.raises(ResourceError, match="missing"), FolderLock(tmp_path / "missing"):
        pass
    (tmp_path / ".lock-owner.json").mkdir()
    with pytest.raises(ResourceError, match="lock-owner"), FolderLock(tmp_path):
        pass
    (tmp_path / ".lock-owner.json").rmdir()
    with FolderLock(tmp_path):
        pass
