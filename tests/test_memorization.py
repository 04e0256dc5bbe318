"""The by-heart meter on models that have a text by heart, and on one that does not."""

import numpy as np
import pytest
import torch

from engine.errors import DataError
from engine.optim import build_adamw
from engine.precision import Precision
from insight import memorization
from insight.copies import CopyIndex
from insight.memorization import Copying, measure_by_heart, measure_copying
from insight.run_text import to_bytes
from model import GPTConfig, GPTModel
from tests.texts import ENGLISH
from text.tokenizer import CharTokenizer
from training.learner import take_step

FP32 = Precision("fp32", "", "cpu")


def letters_at_random(n_tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 8, n_tokens).astype(np.uint16)


class Tokens(CharTokenizer):
    """Eight letters."""

    def __init__(self) -> None:
        super().__init__("abcdefgh")


def overfitted(tokens: np.ndarray, tokenizer: CharTokenizer, steps: int) -> GPTModel:
    """A tiny model trained on random windows of a text, on purpose for too long."""
    torch.manual_seed(0)
    shape = {"context_length": 128, "emb_dim": 64, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0}
    model = GPTModel(GPTConfig(vocab_size=tokenizer.vocab_size, architecture="llama", **shape))
    optimizer = build_adamw(model, learning_rate=3e-3, weight_decay=0.0)
    text, generator = torch.from_numpy(tokens.astype(np.int64)), torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(text) - 128, (8, 1), generator=generator)
        windows = text[starts + torch.arange(129)]
        take_step(model, [(windows[:, :-1], windows[:, 1:])], optimizer, FP32, 1.0)
    return model.eval()


@pytest.mark.slow
def test_a_model_overfitted_on_purpose_is_extracted_and_one_of_another_text_is_not():
    tokenizer = Tokens()
    train, other, val = (letters_at_random(n, seed) for n, seed in ((600, 1), (600, 2), (400, 3)))
    model = overfitted(train, tokenizer, 220)
    index, of_other = (CopyIndex.of(to_bytes(tokens, tokenizer)) for tokens in (train, other))
    found = measure_by_heart(model, tokenizer, train, val, index, n_prompts=100)
    assert found.extraction_rate > 0.5
    assert found.train.share > 0.5 and found.train.longest > 50
    assert found.guess_rate == 0 and found.chance == Copying(100 * 150, 0, 0, 100 * 101)
    strange = measure_by_heart(model, tokenizer, other, val, of_other, n_prompts=100)
    assert strange.extraction_rate < 0.01
    assert strange.train.share < 0.01


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
        for prompt in ids.tolist():
            self.prompts.append(tuple(prompt))
            at = self.text.find("".join(map(chr, prompt)))
            following = self.text[at + len(prompt) if at >= 0 else 0 :] + self.text
            rows.append(prompt + [ord(token) for token in following[:max_new_tokens]])
        return torch.tensor(rows)


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
