"""Texts without a blank: their words are cut, so that time and memory stay in proportion."""

import random
import signal
import string
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from engine.errors import ResourceError
from tests.texts import CHINESE, ENGLISH
from text import learn_bpe as learn_module
from text import token_cache
from text import tokenizer as tokenizer_module
from text.documents import DataSpec
from text.token_cache import cut_into_chunks, tokenize
from text.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    cut_long_words,
    train_bpe,
)

CHOOSER = random.Random(0)
ALPHABETS = {
    "dna": "ACGT",
    "base64": f"{string.ascii_letters}{string.digits}+/",
    "letter": "a",
    "digit": "7",
    "mark": "-",
    "thai": "กขคงจชซณดตถทนบปผพมยรลวสหอะาิีึืุู่้เแโใไ",
    "chinese": "".join(sorted({char for char in CHINESE if char.isalpha()})),
    "printable": string.printable[:94],
    "blanks": " \n",
}
TEXTS = {kind: "".join(CHOOSER.choices(chars, k=5000)) for kind, chars in ALPHABETS.items()}
TEXTS["mixed"] = "".join(f"{text[:300]} 'tis {text[:65]}'s" for text in TEXTS.values())


@pytest.fixture(scope="module")
def trained():
    return train_bpe([ENGLISH[:5000], *TEXTS.values()], 700)


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer()


def test_long_words_of_a_trained_tokenizer_have_the_same_ids_in_the_library(trained):
    library = tokenizers.Tokenizer.from_str(trained.to_json())
    for text in TEXTS.values():
        expected = library.encode(text).ids
        assert trained.encode(text) == expected
        assert trained.decode(expected) == text


def test_no_trained_token_is_longer_than_a_word_and_its_blank():
    tokenizer = train_bpe([" " + "a" * 100_000, "b" * 100_000], 400)
    longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size - 1))
    assert 64 <= longest <= 65


@pytest.mark.parametrize("kind", TEXTS)
def test_chunks_of_a_text_without_a_place_to_cut_have_the_tokens_of_the_whole(
    trained, kind, monkeypatch
):
    monkeypatch.setattr(token_cache, "CHUNK", 500)
    monkeypatch.setattr(token_cache, "MOST_UNCUT", 500)
    monkeypatch.setattr(token_cache, "LONGEST_WORD", 64)
    text = TEXTS[kind]
    whole = [part for part, _ in cut_into_chunks(iter([(text, True)]))]
    pieces = [(text[i : i + 77], i + 77 >= len(text)) for i in range(0, len(text), 77)]
    assert [part for part, _ in cut_into_chunks(iter(pieces))] == whole
    assert "".join(whole) == text
    assert max(map(len, whole)) <= 500
    for tokenizer in (trained, CharTokenizer("ACGTa")):
        ids = [token for part in whole for token in tokenizer.encode(part)]
        assert ids == tokenizer.encode(text)


@pytest.mark.parametrize("kind", TEXTS)
def test_long_runs_are_cut_for_gpt2_and_only_they(gpt2, kind, monkeypatch):
    text = TEXTS[kind]
    assert cut_long_words(text) == [text]
    monkeypatch.setattr(tokenizer_module, "LONGEST_WORD", 128)
    parts = cut_long_words(f"one {text}two {text}")
    assert "".join(parts) == f"one {text}two {text}"
    longest_run = max(
        len(run.group()) for part in parts for run in tokenizer_module.RUN.finditer(part)
    )
    assert longest_run <= 128
    if kind in ("base64", "printable"):
        assert len(parts) == 1
    ids = [token for part in parts for token in gpt2._encoding.encode_ordinary(part)]
    assert gpt2.encode(f"one {text}two {text}") == ids
    assert np.array_equal(gpt2.encode_array(f"one {text}two {text}"), ids)


def test_training_takes_texts_until_their_different_words_are_many(monkeypatch):
    monkeypatch.setattr(learn_module, "MOST_DISTINCT", 1000)
    same = ["the same words "] * 500
    assert list(learn_module.until_distinct(same)) == same
    others = ("".join(CHOOSER.choices("ACGT", k=100)) for _ in range(500))
    assert len(list(learn_module.until_distinct(others))) == 10


class Interrupted(subprocess.Popen):
    """A child whose parent gets a Ctrl-C while it waits for it."""

    made: list[subprocess.Popen] = []  # noqa: RUF012 (of the one test that uses it)

    def wait(self, timeout=None):
        if not self.made:
            self.made.append(self)
            signal.raise_signal(signal.SIGINT)
        return super().wait(timeout)


def test_ctrl_c_while_a_tokenizer_is_trained_ends_the_child_and_leaves_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    (tmp_path / "dna.txt").write_text(TEXTS["dna"] * 20)
    spec = DataSpec((str(tmp_path / "dna.txt"),))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tokenize(spec, "bpe:4096", 0.9, tmp_path / "cache")
    finally:
        signal.signal(signal.SIGINT, before)
    assert Interrupted.made[0].returncode is not None
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_child_that_fails_is_told_and_one_without_its_parent_ends(monkeypatch):
    with pytest.raises(ResourceError, match="trains the tokenizer failed"):
        learn_module.learn_bpe(["text"], 300, "(no pattern")
    command = [sys.executable, "-c", learn_module.PROGRAM, "300", "."]
    cut_off = subprocess.run(
        command, cwd=learn_module.REPOSITORY, input=b"2\nab", capture_output=True
    )
    assert (cut_off.returncode, cut_off.stdout) == (1, b"")


def test_auto_chooses_anew_once_the_library_is_installed(tmp_path, trained, monkeypatch):
    letters = ALPHABETS["chinese"][:200]
    text = "".join(CHOOSER.choices(letters, k=200_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    spec = DataSpec((str(tmp_path / "a.txt"),))
    monkeypatch.setattr(tokenizer_module, "train_bpe", lambda texts, size: trained)
    kinds = []
    for is_installed in (False, True, False):
        with monkeypatch.context() as patch:
            if not is_installed:
                patch.setitem(sys.modules, "tokenizers", None)
            kinds.append(tokenize(spec, "auto", 0.9, tmp_path / "cache").tokenizer.kind)
    assert kinds == ["char", "bpe", "char"]
