"""Gradients in bf16 until the update: the same steps in less memory."""

import copy

import pytest
import torch

from engine import linear
from engine.memory import estimate_memory
from engine.optim import build_adamw, build_muon
from engine.precision import Precision
from model import GPTConfig, GPTModel
from tests.letters import CPU, FP32
from training.learner import take_step

BF16 = Precision("bf16", "as set", "cpu")
SHAPE = {"vocab_size": 50, "context_length": 16, "emb_dim": 32, "n_heads": 2, "n_layers": 3}


def new_model(**changes) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**SHAPE, **changes))


def batches(count: int = 1) -> list:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (count, 2, 17), generator=generator)
    return [(part[:, :-1], part[:, 1:]) for part in ids]


def trained(model: GPTModel, most_norm: float, build=build_adamw, parts=None, precision=BF16):
    """The parameters and moments after three steps, the first step's gradients as the optimizer
    reads them, and the steps' losses and norms."""
    model, parts, read = copy.deepcopy(model), parts or batches(), {}
    optimizer = build(model, 1e-2, 0.1)
    names = {p: name for name, p in model.named_parameters()}

    def read_gradients(*_) -> None:
        for p, name in names.items():
            if p.grad is not None:
                read.setdefault(name, p.grad.clone())

    optimizer.register_step_pre_hook(read_gradients)
    found = [take_step(model, parts, optimizer, precision, most_norm) for _ in range(3)]
    after = dict(model.named_parameters())
    for p, name in names.items():
        after |= {f"{name}, {key}": value for key, value in optimizer.state[p].items()}
    return after, read, found


@pytest.fixture
def kept(monkeypatch) -> list[int]:
    """Of each update with bf16 gradients the number kept; all weights of the blocks are large, and
    two are updated at a time."""
    numbers, update = [], linear.HalfGradients.update

    def counted(self, *arguments):
        numbers.append(len(self._kept))
        update(self, *arguments)

    monkeypatch.setattr(linear, "LEAST", 1)
    monkeypatch.setattr(linear, "AT_ONCE", 2000)
    monkeypatch.setattr(linear.HalfGradients, "update", counted)
    return numbers


@pytest.mark.parametrize("changes", [{}, {"architecture": "llama", "qk_norm": True}])
@pytest.mark.parametrize("recomputes", [False, True])
def test_steps_are_the_same_to_the_last_bit(kept, monkeypatch, changes, recomputes):
    model = new_model(**changes)
    model.activation_checkpointing = recomputes
    halves = trained(model, 0.0), trained(model, 0.01)
    assert kept == [len(model.hidden_matrices())] * 6
    monkeypatch.setattr(linear, "LEAST", 10**9)
    wholes = trained(model, 0.0), trained(model, 0.01)
    assert kept[6:] == []
    for half, whole in zip(halves[0][:2], wholes[0][:2], strict=True):
        assert half.keys() == whole.keys() >= dict(model.named_parameters()).keys()
        assert all(torch.equal(half[name], whole[name]) for name in whole)
    # the norm, by which gradients are clipped, adds up in another order
    torch.testing.assert_close(halves[1][1], wholes[1][1], rtol=1e-5, atol=0)
    clipped = torch.nn.utils.get_total_norm(halves[1][1].values())
    assert float(clipped) == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(halves[0][2], wholes[0][2], rtol=1e-6, atol=0)


def test_only_adamw_on_one_backward_pass_in_bf16_keeps_them(kept):
    trained(new_model(), 1.0, parts=batches(2))
    trained(new_model(), 1.0, precision=FP32)
    trained(new_model(), 1.0, build_muon)
    assert kept == []


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does(kept):
    model = new_model()
    before = copy.deepcopy(list(model.parameters()))
    optimizer = build_adamw(model, 1e-2, 0.1)
    hook = model.blocks[0].mlp.register_full_backward_hook(
        lambda m, grads, _: (grads[0] * torch.nan,)
    )
    _, norm = take_step(model, batches(), optimizer, BF16, 1.0)
    hook.remove()
    assert norm.isnan() and kept == [] and all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))
    take_step(model, batches(), optimizer, BF16, 1.0)
    assert kept == [len(model.hidden_matrices())]


def test_the_estimate_counts_them(kept):
    options = {"n_tokens": 16, "n_windows": 1, "precision": BF16, "device": CPU}
    model = new_model()
    sizes = [
        estimate_memory(model, **options, optimizer=optimizer, accumulates=accumulates).gradients
        for optimizer, accumulates in [("adamw", False), ("adamw", True), ("muon", False)]
    ]
    hidden = sum(weight.numel() for weight, _ in model.hidden_matrices())
    assert sizes[1] - sizes[0] == 2 * hidden and sizes[1] == sizes[2]
