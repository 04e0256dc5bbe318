"""A model, loaders and a trainer of eight letters, so small that every number can be checked."""

from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from data import make_loaders, plan_windows
from engine.optim import build_adamw
from engine.precision import Precision
from model import GPTConfig, GPTModel
from train import LoopPlan, Trainer
from training.journal import Journal
from training.learner import Learner

CPU = torch.device("cpu")
FP32 = Precision("fp32", "as set", "cpu")
CONTEXT = 8
BATCH = 2


class Letters:
    """The tokenizer of the eight letters a to h."""

    name = fingerprint = "letters"
    vocab_size = 8
    end_of_text_id = 8  # which is none of the letters
    special_tokens: ClassVar[dict[str, int]] = {}
    begin_ids = ()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def model_for(tokenizer, spread: float, **shape) -> GPTModel:
    """A tiny model of a tokenizer's vocabulary, its weights random with this deviation added."""
    torch.manual_seed(0)
    shape = {"emb_dim": 8, "n_heads": 1, "n_layers": 1, "context_length": 8} | shape
    model = GPTModel(GPTConfig(vocab_size=tokenizer.vocab_size, tie_embeddings=False, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


def tiny_model(**changes) -> GPTModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 8, "context_length": CONTEXT, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
    return GPTModel(GPTConfig(**(shape | changes)))


def _loaders(tokens: np.ndarray, n_train: int, batch_size: int, **options):
    windows, notices = plan_windows(
        len(tokens),
        max_length=CONTEXT,
        stride=CONTEXT,
        batch_size=batch_size,
        train_ratio=0.5,
        n_train=n_train,
    )
    assert (windows.n_train, notices) == (n_train, [])
    return make_loaders(tokens, windows, seed=1, num_workers=0, device=CPU, **options)


def tiny_loaders(n_batches: int = 5) -> tuple[DataLoader, DataLoader]:
    """n_batches training batches of letters that count to seven, each with a coin toss on top."""
    n_train = n_batches * BATCH * CONTEXT + 1
    n_tokens = n_train + 21  # validation: two whole windows, then a tail of four targets
    noise = np.random.default_rng(0).integers(0, 2, n_tokens)
    tokens = (np.arange(n_tokens) % 7 + noise).astype(np.uint16)
    train, val = _loaders(tokens, n_train, BATCH)
    assert len(train) == n_batches
    return train, val


def loader_of_13_windows(micro_batch: int | None, sampling: str = "windows") -> DataLoader:
    """Thirteen windows of letters in steps of 2 x 3, so that an epoch's last step has one."""
    n_train = 13 * CONTEXT + 1
    tokens = np.random.default_rng(0).integers(0, 8, n_train + 21).astype(np.uint16)
    options = {"sampling": sampling, "accumulation": 2, "micro_batch": micro_batch}
    return _loaders(tokens, n_train, 3, **options)[0]


def new_plan(total_steps: int, **changes) -> LoopPlan:
    defaults = {"eval_freq": 100, "eval_iter": 2, "max_grad_norm": 1.0, "schedule": None}
    return LoopPlan(total_steps=total_steps, **(defaults | {"prompts": ["abc"]} | changes))


def new_trainer(
    total_steps: int,
    *,
    model=None,
    optimizer=None,
    folder=None,
    log_every=0,
    kind=Trainer,
    **plan,
) -> Trainer:
    """A trainer of a tiny model that saves nothing."""
    model = model or tiny_model()
    optimizer = optimizer or build_adamw(model, learning_rate=1e-2, weight_decay=0.1)
    journal = Journal(8, total_steps, log_every, folder)
    learner = Learner(model, optimizer, FP32)
    return kind(learner, journal, Letters(), new_plan(total_steps, **plan))


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of all weights and all that the optimizer keeps of them."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        state = optimizer.state.get(p, {})
        kept |= {f"{kind} {name}": torch.as_tensor(x).clone() for kind, x in state.items()}
    return kept


def assert_the_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
