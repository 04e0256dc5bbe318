"""Notices on a text: it repeats itself, or uses hardly any of the vocabulary."""

import os
from types import SimpleNamespace

import pytest

from planning.preflight import about_copies, show_windows
from tests.conftest import REPOSITORY
from text import token_cache
from text.documents import DataSpec
from text.repeats import Repeats
from text.token_cache import tokenize

BOOK = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="utf-8")
CHINESE = (REPOSITORY / "corpus" / "sample-zh.txt").read_text(encoding="utf-8")
ONE_LINE = " ".join(BOOK.split())


def share_of(*documents: str, size: int = 1000) -> float:
    repeats = Repeats()
    for document in documents:
        starts = range(0, len(document), size)
        for start in starts:
            repeats.add(document[start : start + size], start == starts[-1])
    return repeats.share


@pytest.mark.parametrize("book", [BOOK, CHINESE, ONE_LINE], ids=["lines", "chinese", "one line"])
def test_a_book_that_is_pasted_twice_is_half_copies_and_once_it_has_none(book):
    assert share_of(book) < 0.05
    assert 0.5 <= share_of(book + "\n" + book) < 0.55
    assert share_of(*[book + "\n"] * 4) < 0.05  # duplicates of documents are counted elsewhere
    assert 0.86 < share_of(book * 8) < 0.9
    pieces = {share_of(book + "\n" + book, size=size) for size in (7, 1000, len(book) * 3)}
    assert len(pieces) == 1  # how it is read makes no difference


def test_a_text_of_short_lines_is_not_judged_by_its_few_long_ones():
    assert share_of("".join(f"word {i}\n" for i in range(99)) + f"{BOOK[:300]}\n" * 2) == 0


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Tokenize a text; returns all that is said of it."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nobody cuts the power here

    def told(text: str | None, tokenizer: str, name: str = "a.txt") -> list[str]:
        if text is not None:
            (tmp_path / name).write_text(text, encoding="utf-8")
            name = str(tmp_path / name)
        found = tokenize(DataSpec((name,)), tokenizer, 0.9, tmp_path / "cache")
        notes = [note.en for note in (*found.notices, *found.report["notes"])]
        return notes + about_copies(found.report)

    return told


def test_a_text_that_repeats_itself_gets_one_notice_in_every_run(read):
    assert read(BOOK[:9000], "char") == []
    for _ in range(2):  # from the cache, too
        [note] = read(BOOK[:9000] * 3, "char")
        assert "of the text repeats what came before in the same document" in note


@pytest.mark.parametrize(("repeated", "told"), [(None, True), (0.1, True), (0.5, False)])
def test_what_the_card_told_of_repeats_is_not_told_again(repeated, told, capsys):
    """repeated: what a recipe's text facts say; None without a recipe."""
    choice = None if repeated is None else SimpleNamespace(text=SimpleNamespace(repeated=repeated))
    windows = SimpleNamespace(n_train=100, n_windows=10, n_unused=0, n_val=50)
    plan = SimpleNamespace(recipe="chosen", choice=choice, chat=None)
    report = {"copied": 0.66, "documents": 2, "passed_over": [], "empty_documents": 0}
    report |= {"duplicate_documents": 0, "documents_on_both_sides": 0}
    show_windows(plan, SimpleNamespace(report=report), windows, None)
    assert ("66% of the text repeats what came before" in capsys.readouterr().out) == told


def test_a_vocabulary_that_hardly_occurs_is_told_with_the_line_to_change(read, monkeypatch):
    assert read(BOOK[:4000], "char") == []
    monkeypatch.setattr(token_cache, "LEAST_USED", 0.9)  # the characters of any text are fewer
    assert read(BOOK[:4000], "char") == []  # a small vocabulary is mostly the 256 bytes
    monkeypatch.setattr(token_cache, "SMALL_VOCABULARY", 0)
    for _ in range(2):
        [note] = read(BOOK[:4000], "char")
    assert "tokens do not occur in this text" in note
    assert note.endswith('TOKENIZER = "char" or "bpe:1024"')
    assert read(None, "char", "sample-en") == []  # a named text is for trying out


@pytest.mark.parametrize(("used", "told"), [(600, "99% of the tokenizer's 50,257 "), (1600, None)])
def test_a_few_words_in_gpt2s_vocabulary_are_told(used, told):
    text = SimpleNamespace(report={"vocabulary": 50_257, "vocabulary_used": used})
    notices = token_cache._about_vocabulary(text, DataSpec(("a.txt",)))
    assert bool(notices) == bool(told)
    assert not told or notices[0].en.startswith(told)
