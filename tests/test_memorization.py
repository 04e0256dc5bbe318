"""The by-heart meter on models that have a text by heart, and on one that does not."""

import numpy as np
import pytest
import torch

import storage.cache
from engine.errors import DataError
from exchange.saved_run import load_run
from insight import memorization
from insight.copies import CopyIndex
from insight.memorization import Copying, measure_answers, measure_by_heart, measure_copying
from insight.run_text import Answer, open_run_text, to_bytes
from model import GPTConfig
from tests import by_heart
from tests.texts import ENGLISH
from text.tokenizer import CharTokenizer


def letters_at_random(n_tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 8, n_tokens).astype(np.uint16)


class Tokens(CharTokenizer):
    """Eight letters."""

    def __init__(self) -> None:
        super().__init__("abcdefgh")


@pytest.mark.slow
def test_a_model_overfitted_on_purpose_is_extracted_and_one_of_another_text_is_not(
    tmp_path_factory, monkeypatch
):
    run = load_run(by_heart.tiny_run(tmp_path_factory), weights="fp32", device="cpu")
    monkeypatch.setattr(storage.cache, "CACHE", run.path.parent.parent / "cache")
    text = open_run_text(run.path)
    index = CopyIndex.of(to_bytes(text.train, text.tokenizer))
    found = measure_by_heart(
        run.model,
        run.tokenizer,
        text.train,
        text.val,
        index,
        samples=[by_heart.STORY[:80]],
        n_prompts=50,
    )
    assert found.extraction_rate > 0.5
    assert found.train.share > 0.5 and found.train.longest > 100
    assert found.samples.share == 1 and found.samples.longest == len(by_heart.STORY[:80].encode())
    # to the same model this text is a strange one
    strange = np.array(text.tokenizer.encode(ENGLISH), dtype=np.uint16)
    of_strange = CopyIndex.of(to_bytes(strange, text.tokenizer))
    found = measure_by_heart(run.model, run.tokenizer, strange, strange, of_strange, n_prompts=50)
    assert found.extraction_rate < 0.01
    assert found.train.share < 0.01
    assert found.chance.share == 1


def test_the_share_is_that_of_all_spans_of_50_bytes_looked_for_one_by_one():
    text = ENGLISH[:8000].encode()
    texts = [text[100:190] + b"#" + text[300:420], ENGLISH[9000:9100].encode(), b"short", b""]
    texts += [text[500:560] + b"\0" + text[560:640]]  # two documents
    pieces = [piece for written in texts for piece in written.split(b"\0")]
    spans = [piece[i : i + 50] for piece in pieces for i in range(len(piece) - 49)]
    found = measure_copying(CopyIndex.of(text), texts)
    assert found == Copying(sum(map(len, pieces)), 120, sum(s in text for s in spans), len(spans))
    assert 0 < found.share < 1
    assert measure_copying(CopyIndex.of(text), []).share == 0


class ByRote(torch.nn.Module):
    """Stands in for generate(): goes on as a text does wherever it has the prompt."""

    def __init__(self, text: np.ndarray, context_length: int) -> None:
        super().__init__()
        self.text = "".join(map(chr, text.tolist()))
        self.config = GPTConfig(300, context_length, emb_dim=8, n_heads=1, n_layers=1)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.prompts: list[tuple[int, ...]] = []

    def generate(self, model, ids, *, max_new_tokens, temperature):
        assert model is self and temperature == 0
        rows = []
        for prompt in ids:
            self.prompts.append(tuple(prompt))
            at = self.text.find("".join(map(chr, prompt)))
            following = self.text[at + len(prompt) if at >= 0 else 0 :] + self.text
            rows.append(prompt + [ord(token) for token in following[:max_new_tokens]])
        return rows


@pytest.fixture
def by_rote(monkeypatch):
    """A model that has a text by heart, whose context is as long as asked for."""

    def make(text: np.ndarray, context_length: int = 64) -> ByRote:
        model = ByRote(text, context_length)
        monkeypatch.setattr(memorization, "generate", model.generate)
        return model

    return make


def test_what_is_written_is_held_against_the_real_next_50_tokens(by_rote):
    tokenizer = Tokens()
    train, val = letters_at_random(2000, 1), letters_at_random(900, 2)
    val[200:600] = train[500:900]  # a leak
    index = CopyIndex.of(to_bytes(train, tokenizer))
    found = measure_by_heart(by_rote(train), tokenizer, train, val, index, n_prompts=60)
    assert (found.prompts, found.extraction_rate) == (60, 1)
    assert found.train.share == found.val.share == 1  # it writes nothing else
    # prompts within the leak, whose next 50 tokens are in it too
    assert 0.1 < found.guess_rate < 0.6
    assert 0.1 < found.chance.share < 0.6 and 50 < found.chance.longest <= 182
    again = measure_by_heart(by_rote(train), tokenizer, train, val, index, n_prompts=60)
    assert again == found
    samples = ["".join("abcdefgh"[t] for t in train[:80]), "abc"]
    other = measure_by_heart(
        by_rote(val), tokenizer, train, val, index, samples=samples, n_prompts=60, seed=1
    )
    assert other.samples == Copying(83, 80, 31, 31)
    assert other.extraction_rate < 0.5 and other.guess_rate == 1


def test_an_answer_is_known_by_heart_if_it_is_word_for_word_the_real_one(monkeypatch):
    tokenizer, end = Tokens(), 7
    short, long = [1, 2, 3, end], [*range(1, 6)] * 16 + [end]
    said = {0: short, 1: [1, 2, end], 2: [*short[:3], 4, end], 3: [*long[:-1], 6], 4: long[:70]}
    real = [short, short, short, long, long]
    asked = []

    def generate(model, prompts, *, max_new_tokens, temperature, stop_ids):
        assert temperature == 0 and stop_ids == [end] and max_new_tokens == len(long)
        asked.append(prompts)
        return [prompt + said[len(prompt)] for prompt in prompts]

    monkeypatch.setattr(memorization, "generate", generate)
    answers = [Answer([0] * number, own) for number, own in enumerate(real)]
    index = CopyIndex.of(to_bytes(np.array(long[:-1]), tokenizer))
    found = measure_answers(None, tokenizer, (answers, answers[1:4]), [end], index)
    # of a long one the first 50 tokens
    assert (found.prompts, found.extracted, found.val_prompts, found.guessed) == (5, 3, 3, 1)
    assert asked == [[answer.prompt for answer in part] for part in (answers, answers[1:4])]
    # without the end of the turn, which no text has
    assert found.train.n_bytes == 3 + 2 + 4 + 81 + 70 and found.chance.share == 1
    with pytest.raises(DataError, match="no answer fits"):
        measure_answers(None, tokenizer, (answers, []), [end], index)


def test_prompts_are_short_for_a_short_context_and_contain_no_end_of_text(by_rote):
    tokenizer = Tokens()
    train = letters_at_random(3000, 1)
    train[::400] = tokenizer.end_of_text_id
    index = CopyIndex.of(to_bytes(train, tokenizer))
    model = by_rote(train, context_length=48)
    measure_by_heart(model, tokenizer, train, train, index, n_prompts=30)
    assert {len(prompt) for prompt in model.prompts} == {24}
    assert len(model.prompts) == 60
    assert not any(tokenizer.end_of_text_id in prompt for prompt in model.prompts)
    model = by_rote(train)
    found = measure_by_heart(model, tokenizer, train, train, index, n_prompts=90, limit_s=0)
    assert found.prompts == 25  # one batch in any case
    assert {len(prompt) for prompt in model.prompts} == {32}
    with pytest.raises(DataError, match="of 100 tokens is too short"):
        measure_by_heart(model, tokenizer, train[:100], train, index)
