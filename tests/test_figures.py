"""Figures that are promised for real texts."""

import itertools

import pytest
import torch

from engine.optim import build_optimizer, learning_rate_at, make_schedule, set_learning_rate
from engine.precision import choose_precision
from model import GPTConfig, GPTModel
from tests.conftest import REPOSITORY
from text.tokenizer import BPETokenizer, GPT2Tokenizer, train_bpe
from training.learner import batch_loss, take_step

CPU = torch.device("cpu")


@pytest.mark.slow
def test_a_trained_bpe_takes_less_than_a_token_a_chinese_character(shared_data):
    tokenizers = pytest.importorskip("tokenizers")
    text = (shared_data / "ci.txt").read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    larger, held_out = train_bpe([text[: cut // 3]], 8192), text[cut:]  # a third is enough
    # of a BPE the first tokens are those of a smaller one
    smaller = BPETokenizer("bpe", dict(itertools.islice(larger._ranks.items(), 4095)))
    for tokenizer, vocab_size, most in ((smaller, 4096, 0.95), (larger, 8192, 0.87)):
        ids = tokenizer.encode(held_out)
        assert tokenizer.vocab_size == vocab_size
        assert len(ids) / len(held_out) <= most
        assert tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode(held_out).ids == ids
    assert len(GPT2Tokenizer().encode(held_out)) / len(held_out) > 2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_bf16_loses_nothing(architecture):
    """Validation losses after equal steps, mean of three seeds: within 0.2 % of fp32's.

    At three times the rate the loss of fp32 itself moves by 1 % with the rounding of a norm.
    """
    if choose_precision("auto", CPU).name != "bf16":
        pytest.skip("this processor has no bf16")
    text = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="utf-8")
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    tokens = torch.tensor([letters[letter] for letter in text])
    held_out = len(tokens) // 10

    shape = {"context_length": 64, "emb_dim": 96, "n_heads": 3, "n_layers": 3}
    config = GPTConfig(vocab_size=len(letters), architecture=architecture, **shape)

    def loss_after_training(name: str, seed: int) -> float:
        torch.manual_seed(seed)
        model, precision = GPTModel(config), choose_precision(name, CPU)
        optimizer = build_optimizer("adamw", model, 1e-3, 0.1)
        schedule = make_schedule("cosine", 1e-3, 10, 150)
        for step in range(150):
            set_learning_rate(optimizer, learning_rate_at(step, schedule))
            starts = torch.randint(len(tokens) - held_out - 64, (16,))[:, None]
            windows = tokens[starts + torch.arange(65)]
            take_step(model, [(windows[:, :-1], windows[:, 1:])], optimizer, precision, 1.0)
        whole = tokens[-held_out:][: (held_out - 1) // 64 * 64 + 1]
        ids, targets = whole[:-1].view(-1, 64), whole[1:].view(-1, 64)
        with torch.no_grad():
            return batch_loss(model.eval(), (ids, targets), precision).item()

    bf16, fp32 = (
        sum(loss_after_training(name, seed) for seed in (1, 2, 3)) / 3 for name in ("bf16", "fp32")
    )
    assert fp32 < 2.6  # it has learnt something
    assert bf16 == pytest.approx(fp32, rel=0.002)
