"""The loss against fp64 arithmetic by hand, and its gradients against plain cross-entropy."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.loss import next_token_loss


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (3, 5, 16), a head (29, 16) whose logits spread widely, and targets (3, 5)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 16, generator=generator)
    weight = 2 * torch.randn(29, 16, generator=generator)
    return hidden, weight, torch.randint(29, (3, 5), generator=generator)


def by_hand(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean of -log softmax(logits)[target], in fp64."""
    losses = []
    for row, target in zip(
        logits.double().flatten(0, 1).numpy(), targets.flatten().tolist(), strict=True
    ):
        top = row.max()
        losses.append(top + np.log(np.exp(row - top).sum()) - row[target])
    return float(np.mean(losses))


def test_loss_equals_an_fp64_computation_by_hand():
    hidden, weight, targets = example()
    loss = next_token_loss(hidden, weight, targets)
    assert loss.shape == ()
    expected = by_hand(hidden.double() @ weight.double().T, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_logits_of_a_thousand_do_not_overflow():
    hidden, weight, targets = example()
    loss = next_token_loss(1000 * hidden, weight, targets)
    expected = by_hand((1000 * hidden).double() @ weight.double().T, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_under_bf16_autocast_only_the_product_loses_precision():
    hidden, weight, targets = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = next_token_loss(hidden, weight, targets)
        logits = F.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(logits, targets), rel=1e-6)


def test_the_loss_of_a_bf16_model_is_fp32():
    hidden, weight, targets = example()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    loss = next_token_loss(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(F.linear(hidden, weight), targets), rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_gradients_equal_those_of_plain_cross_entropy(autocast):
    def gradients(loss_of, dtype, context):
        hidden, weight, targets = example()
        hidden = hidden.to(dtype).requires_grad_()
        weight = weight.to(dtype).requires_grad_()
        with context:
            loss = loss_of(hidden, weight, targets)
        loss.backward()
        return hidden.grad, weight.grad

    def plain(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())

    context = contextlib.nullcontext()
    if autocast:
        context = torch.autocast("cpu", dtype=torch.bfloat16)
    found = gradients(next_token_loss, torch.float32, context)
    expected = gradients(plain, torch.float64, contextlib.nullcontext())
    tolerance = 0.02 if autocast else 1e-6
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)
