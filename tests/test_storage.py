"""Durable writes: whole or not at all, in the right order, and readable by others."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import socket
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
from tests.faults.locks import owner_of
from tests.faults.saving import forked
from tests.hostile import hostile_json

FULL = OSError(errno.ENOSPC, "No space left on device")


def content_of(folder) -> dict[str, bytes | None]:
    """The files of a folder; None for a folder in it."""
    return {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}


@pytest.fixture
def fail_at(monkeypatch):
    """Let a call of os's fail as on a full disk; test_survival fails each call of a session."""

    def fail(*_, **__):
        raise FULL

    return lambda call: monkeypatch.setattr(os, call, fail)


# --------------------------------------------------------------------------- write_atomically


def test_written_content_is_read_back(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"one", b"\r\n\x00\xff" * 100_000):
        write_atomically(str(path), content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("old", [b"old", None], ids=["over a file", "over nothing"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_that_fails_leaves_what_was_there_and_no_rest(tmp_path, fail_at, step, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    fail_at(step)
    with pytest.raises(ResourceError) as caught:
        write_atomically(path, b"new content")
    assert str(path) in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert content_of(tmp_path) == ({} if old is None else {"file": old})


def test_write_into_a_missing_folder_or_over_one_is_a_resource_error(tmp_path):
    path = tmp_path / "missing" / "file"
    for write in (
        lambda: write_atomically(path, b"x"),
        lambda: write_json(path, {}),
        lambda: append_json_lines(path, [{}]),
    ):
        with pytest.raises(ResourceError) as caught:
            write()
        assert str(path) in str(caught.value)
        assert caught.value.exit_code == 6
        assert len(str(caught.value).splitlines()) <= 4
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
    assert content_of(tmp_path) == {"old": b"old"}


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on the size of files")
def test_file_that_the_system_stops_growing_leaves_the_old_content_and_no_rest(tmp_path):
    import resource  # which Windows lacks

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for size in (2_000, 5_000_000):  # below and above the buffer of a file
            with pytest.raises(ResourceError, match="can't write"):
                write_atomically(tmp_path / "file", b"x" * size)

    (tmp_path / "file").write_bytes(b"old")
    _, status = os.waitpid(forked(write), 0)
    assert status == 0
    assert content_of(tmp_path) == {"file": b"old"}


# --------------------------------------------------------------------------------------- JSON


def test_json_comes_back_as_it_was_readable_and_in_utf8(tmp_path):
    odd = [{}, [], None, True, 0, -1.5, 2**70, '\x00\u2028"\\', "\udcff.txt", {"a": [{"b": False}]}]
    for value in odd:
        write_json(tmp_path / "x.json", value)
        (tmp_path / "x.jsonl").unlink(missing_ok=True)
        append_json_lines(tmp_path / "x.jsonl", [{"row": value}])
        assert json.loads((tmp_path / "x.json").read_bytes()) == value
        assert json.loads((tmp_path / "x.jsonl").read_bytes()) == {"row": value}
    write_json(tmp_path / "x.json", {"题": "春江潮水连海平\n"})
    assert (tmp_path / "x.json").read_bytes() == ('{\n  "题": "春江潮水连海平\\n"\n}\n'.encode())


def test_numbers_that_are_not_finite_become_null_and_numpys_become_numbers():
    value = {"loss": math.nan, "rows": [1.5, -math.inf, (math.inf, {"x": math.nan})], "n": 2}
    expected = {"loss": None, "rows": [1.5, None, [None, {"x": None}]], "n": 2}
    assert json.loads(to_json(value)) == expected
    assert math.isnan(value["loss"])
    numbers = [np.int64(3), np.float32(0.5), np.float64("nan")]
    assert [to_json(number) for number in numbers] == ["3", "0.5", "null"]


def test_rows_are_appended_one_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"step": 1, "loss": None}, {"step": 2, "text": "a\nb\u2028 春"}, {"step": 3}]
    for some in (rows[:2], [], rows[2:]):
        append_json_lines(path, some)
    content = path.read_bytes()
    assert content.endswith(b"}\n") and b"\r" not in content and "春".encode() in content
    assert [json.loads(line) for line in content.split(b"\n")[:-1]] == rows


# ------------------------------------------------------------------------------------ folders


def test_folder_is_made_with_its_parents_and_told_from_one_that_was_there(tmp_path):
    path = tmp_path / "a" / "b"
    assert make_new_folder(path) is True
    assert path.is_dir()
    assert make_new_folder(path) is False
    for _ in range(2):
        make_folder(tmp_path / "c" / "d")
        assert (tmp_path / "c" / "d").is_dir()
    (tmp_path / "file").write_text("x")
    for make in (make_folder, make_new_folder):
        with pytest.raises(ResourceError, match="can't write"):
            make(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"


def test_finished_folder_gets_its_name_unless_another_was_first(tmp_path):
    for name in ("source", "second"):
        (tmp_path / name / "inside").mkdir(parents=True)
        (tmp_path / name / "inside" / "file").write_text(name)
    assert rename_folder(tmp_path / "source", tmp_path / "target") is True
    assert rename_folder(tmp_path / "second", tmp_path / "target") is False
    assert (tmp_path / "target" / "inside" / "file").read_text() == "source"
    assert (tmp_path / "second" / "inside" / "file").read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == ["second", "target"]


def test_folder_that_cannot_get_its_name_is_a_resource_error(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "file").write_text("x")
    for source, target in (("source", "file"), ("source", "file/below"), ("missing", "target")):
        with pytest.raises(ResourceError) as caught:
            rename_folder(tmp_path / source, tmp_path / target)
        assert str(tmp_path / target) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "source"]


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
    def chunks():
        yield b"half"
        raise error

    with pytest.raises(type(error)) as caught, NewFolder(tmp_path / "step-5", FACTS) as folder:
        folder.write("whole", [b"x"])
        assert not (tmp_path / "step-5").exists()
        folder.write("model", chunks())
    assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_sealed_folder_that_is_there_is_not_written_over(sealed):
    with pytest.raises(ResourceError), NewFolder(sealed, {"step": 6}) as folder:
        folder.write("model", [b"new"])
    assert verify_folder(sealed) == FACTS
    assert os.listdir(sealed.parent) == ["step-5"]


def replace_by(make):
    """Put something else in a file's place."""

    def damage(path):
        content = path.read_bytes()
        path.unlink()
        make(path, content)

    return damage


def link(path, content):
    elsewhere = path.parent / "elsewhere"[: len(content)]  # as long as the file, too
    elsewhere.write_bytes(content)
    path.symlink_to(elsewhere.name)


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


# what disks, copies and people do
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "a folder": replace_by(lambda path, _: path.mkdir()),
    "a link": replace_by(link),
    "a pipe": replace_by(lambda path, _: os.mkfifo(path)),  # who opens it waits for ever
    "cut off": rewrite(lambda content: content[: len(content) // 2]),
    "one byte short": rewrite(lambda content: content[:-1]),
    "one byte more": rewrite(lambda content: content + b"\0"),
    "empty": rewrite(lambda content: b""),
    "zeros at the end": rewrite(lambda content: content[:4] + bytes(len(content) - 4)),
    "zeros": rewrite(lambda content: bytes(len(content))),
}


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and links")
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["model", "state.json", MANIFEST])
def test_damaged_folder_is_refused_and_the_file_named(sealed, name, how):
    DAMAGES[how](sealed / name)
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
        assert verify_folder(sealed, [], others=False) == FACTS
        assert verify_folder(sealed, others, others=False) == FACTS
        with pytest.raises(CheckpointError, match=name):
            verify_folder(sealed, ["state.json", "model"], others=False)


@pytest.mark.skipif(os.name == "nt", reason="needs pwrite")
@pytest.mark.parametrize("name", ["state.json", MANIFEST])
def test_a_bit_of_any_byte_that_flips_is_noticed(sealed, name):
    content = (sealed / name).read_bytes()
    with open(sealed / name, "r+b", buffering=0) as file:
        for place, byte in enumerate(content):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)
            with pytest.raises(CheckpointError, match=name):
                verify_folder(sealed)
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert verify_folder(sealed) == FACTS


def test_every_truncation_of_a_manifest_is_noticed(sealed):
    for length in reversed(range((sealed / MANIFEST).stat().st_size)):
        os.truncate(sealed / MANIFEST, length)
        with pytest.raises(CheckpointError, match=MANIFEST):
            verify_folder(sealed)


def test_required_file_must_be_among_the_sealed_ones(sealed):
    (sealed / "added").write_bytes(b"later")
    for others in (True, False):
        with pytest.raises(CheckpointError, match=rf"{MANIFEST} does not name added"):
            verify_folder(sealed, ["model", "added"], others=others)


FILE = {"bytes": 1, "sha256": "0" * 64}
ELSEWHERE = ("../outside", "/etc/passwd", "C:x", "..", "", "a\\b", "a/b", "a\0")
SHAPELESS = [
    *({"files": files} for files in (["model"], None, {"model": None}, {"model": {}})),
    {"files": {"model": FILE | {"bytes": "1"}}},
    {"files": {"model": FILE | {"sha256": 5}}},
    {},
    [],
    None,
    "x",
]


def test_well_sealed_manifest_of_another_shape_is_refused(sealed):
    for name in ELSEWHERE:
        (sealed / MANIFEST).write_bytes(storage._seal({"files": {name: FILE}}))
        with pytest.raises(CheckpointError, match="names files outside of its folder"):
            verify_folder(sealed)
    for content in SHAPELESS:
        (sealed / MANIFEST).write_bytes(storage._seal(content))
        with pytest.raises(CheckpointError):
            verify_folder(sealed)


def test_manifest_that_is_none_is_refused(sealed):
    for content in hostile_json(1000).values():
        (sealed / MANIFEST).write_bytes(content)
        with pytest.raises(CheckpointError, match=MANIFEST):
            verify_folder(sealed)


def test_what_is_set_aside_keeps_its_content_and_the_earlier_ones(tmp_path):
    path = tmp_path / "step-5"
    for number, expected in enumerate([".bad-step-5", ".bad-step-5-2", ".bad-step-5-3"]):
        if number == 1:  # a folder
            path.mkdir()
        (path / "file" if number == 1 else path).write_text(expected)
        assert set_aside(path) == tmp_path / expected
        assert not path.exists()
    found = [file.read_text() for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    assert found == [".bad-step-5", ".bad-step-5-2", ".bad-step-5-3"]


def test_removed_folder_is_gone_and_what_cannot_be_moved_stays_whole(sealed, fail_at):
    shutil.copytree(sealed, sealed.with_name("step-4"))
    remove_folder(sealed.with_name("step-4"))
    remove_folder(sealed.with_name("step-3"))  # another was quicker
    assert os.listdir(sealed.parent) == ["step-5"]
    fail_at("rename")
    remove_folder(sealed)
    with pytest.raises(ResourceError, match="step-5"):
        set_aside(sealed)
    assert verify_folder(sealed) == FACTS


def test_folder_that_cannot_be_emptied_has_lost_its_name_and_goes_later(
    sealed, monkeypatch, fail_at
):
    fail_at("unlink")
    remove_folder(sealed)
    monkeypatch.undo()
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
    assert content_of(folder) == {"old": b"old"}
    act(folder)
    assert 109.9 <= clock.now <= 110
    assert content_of(next(tmp_path.iterdir())) == after


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
    refusal = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(refusal))
    with pytest.raises(ResourceError, match=r"Permission denied\.\nChoose another folder"):
        write_atomically(tmp_path / "file", b"x")
    assert clock.now == 100


def test_how_long_a_file_is_waited_for_can_be_said(tmp_path, refused):
    clock = refused("replace", for_s=3)
    for patience_s in (0, 1):
        with pytest.raises(ResourceError):
            write_atomically(tmp_path / "file", b"x", patience_s=patience_s)
        assert clock.now == pytest.approx(100 + patience_s)
    write_atomically(tmp_path / "file", b"x", patience_s=2)
    assert clock.now == pytest.approx(103)
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


def test_names_that_every_system_takes_are_told_from_those_that_windows_does_not():
    for name in ("a", "run 1", "春.txt", "console", "com", "com10", "a.con", "nul-1", ".x", "v1.2"):
        assert is_portable_name(name), name
    devices = ("con", "CON", "Nul.txt", "com1", "lpt¹.x", "aux ", "aux .x", "conin$", "prn.")
    signs = ("a:b", "a/b", "a\\b", "a?", "a*", 'a"', "<a", "a|b", "a\tb")
    for name in (*devices, *signs, "", ".", "..", "a.", "a "):
        assert not is_portable_name(name), name


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs another process that holds it")
def test_asking_whether_a_folder_is_free_makes_nothing_and_takes_nothing(tmp_path):
    FolderLock(tmp_path).require_free()
    assert list(tmp_path.iterdir()) == []
    with owner_of(tmp_path) as (owner, _):
        for _ in range(2):
            with pytest.raises(BusyError, match=f"in use by process {owner} on "):
                FolderLock(tmp_path).require_free()
    FolderLock(tmp_path).require_free()
    with FolderLock(tmp_path):
        with pytest.raises(BusyError):
            FolderLock(tmp_path).require_free()
        with pytest.raises(BusyError), FolderLock(tmp_path):
            pass


def test_lock_is_refused_whatever_its_second_file_says(tmp_path):
    with FolderLock(tmp_path):
        for owner in (b"", b"{", b"[]", b"{}", b"\xff", None):
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
