"""The cache of tokens stays within a limit: what no run has used for long goes first."""

import os
import time

import pytest

import storage.cache
from storage.cache import UNUSED_S
from text.documents import DataSpec
from text.token_cache import tokenize

DAY = 24 * 3600


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Tokenize a text of a name; returns the folder of its tokens."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nobody cuts the power here

    def tokens_of(name: str):
        (tmp_path / name).write_text(f"{name} tells of the river and the bell. " * 40, "utf-8")
        data = DataSpec((str(tmp_path / name),))
        return tokenize(data, "char", 0.9, tmp_path / "cache").path.parent

    return tokens_of


def test_texts_unused_for_long_are_removed_beyond_the_limit_the_oldest_first(
    make, monkeypatch, capsys
):
    texts = [make(name) for name in ("a", "b", "c", "d")]
    size = sum(file.stat().st_size for file in texts[0].iterdir())
    ages = {0: UNUSED_S + 3 * DAY, 1: UNUSED_S + 9 * DAY, 2: UNUSED_S + DAY, 3: UNUSED_S - DAY}
    for number, age in ages.items():
        os.utime(texts[number], (time.time() - age,) * 2)
    make("a")  # in use again
    new = make("e")
    assert all(folder.is_dir() for folder in [*texts, new])  # below the limit nothing goes
    monkeypatch.setattr(storage.cache, "MOST_BYTES", int(4.5 * size))
    newer = make("f")  # of six texts two are too many
    assert [folder.is_dir() for folder in texts] == [True, False, False, True]
    assert new.is_dir() and newer.is_dir()
    said = capsys.readouterr().out
    assert said.count("Note: ") == 1 and "2 texts not used for a month removed (" in said
    monkeypatch.setattr(storage.cache, "MOST_BYTES", 0)
    newest = make("g")  # what is younger stays, whatever the limit
    assert all(folder.is_dir() for folder in (texts[0], texts[3], new, newer, newest))
    assert make("b") == texts[1] and texts[1].is_dir()  # made anew


def test_the_limit_is_a_tenth_of_a_small_disk(make, monkeypatch):
    old = make("a")
    os.utime(old, (0, 0))
    total = 10 * sum(file.stat().st_size for file in old.iterdir())
    usage = storage.cache.shutil._ntuple_diskusage(total, 0, total)
    monkeypatch.setattr(storage.cache.shutil, "disk_usage", lambda path: usage)
    make("b")
    assert not old.exists()
