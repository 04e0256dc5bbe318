"""The loss beside the one that computes full logits, and against that one in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import engine.loss
from engine.loss import next_token_loss

# rows, width, vocabulary, spread of the head, rows at a time (None: as many as are its own choice)
CASES = [
    (1, 16, 29, 1.0, None),
    (7, 16, 1, 1.0, None),
    (15, 16, 29, 2.0, 15),
    (15, 16, 29, 2.0, 4),
    (120, 16, 65, 0.02, 20),
    (128, 16, 257, 0.3, 33),
    (60, 32, 9001, 0.02, None),
]
Figures = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # loss, both gradients


def random_case(rows: int, width: int, vocabulary: int, spread: float) -> tuple[torch.Tensor, ...]:
    """Hidden states (1, rows, width), a head and targets."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(1, rows, width, generator=generator)
    weight = spread * torch.randn(vocabulary, width, generator=generator)
    return hidden, weight, torch.randint(vocabulary, (1, rows), generator=generator)


def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss with full logits and torch's own gradients."""
    logits = F.linear(hidden, weight).flatten(0, -2)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets.flatten())


def figures(loss_of, case, dtype=torch.float32, autocast=False) -> Figures:
    """What a loss comes to on a case: its value and the gradients of hidden states and head."""
    hidden, weight = (part.detach().clone().to(dtype).requires_grad_() for part in case[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = loss_of(hidden, weight, case[2])
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def errors(found: Figures, exact: Figures) -> list[float]:
    """How far each figure is from the exact one, by norm, in fp64."""
    return [(a.double() - b).norm().item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize(("rows", "width", "vocabulary", "spread", "rows_at_a_time"), CASES)
def test_loss_and_gradients_equal_the_plain_ones_and_in_bf16_err_no_more(
    rows, width, vocabulary, spread, rows_at_a_time, monkeypatch
):
    if rows_at_a_time is not None:
        monkeypatch.setattr(engine.loss, "chunk_rows", lambda hidden, vocab_size: rows_at_a_time)
    case = random_case(rows, width, vocabulary, spread)
    exact = figures(plain_loss, case, torch.float64)
    found = figures(next_token_loss, case)
    assert [part.dtype for part in found] == [torch.float32] * 3
    for error, value in zip(errors(found, exact), exact, strict=True):
        assert error <= 1e-6 * value.norm().item()
    ours = errors(figures(next_token_loss, case, autocast=True), exact)
    plain = errors(figures(plain_loss, case, autocast=True), exact)
    for mine, theirs, value in zip(ours, plain, exact, strict=True):
        assert mine <= 1.1 * theirs + 1e-6 * value.norm().item()


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 model"])
def test_in_bf16_only_the_product_loses_precision(autocast):
    hidden, weight, targets = random_case(15, 16, 29, 2.0)
    if not autocast:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = next_token_loss(hidden, weight, targets)
        logits = F.linear(hidden, weight)
    assert (logits.dtype, loss.dtype, loss.shape) == (torch.bfloat16, torch.float32, ())
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_where_probabilities_vanish_the_gradients_are_those_of_the_plain_loss(autocast, scale):
    # the first target is the likeliest token by far, the second as unlikely as can be
    hidden = torch.eye(2)[None]
    weight = scale * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]])
    case = hidden, weight, torch.tensor([[0, 0]])
    loss, *gradients = figures(next_token_loss, case, autocast=autocast)
    exact = figures(plain_loss, case, torch.float64)
    assert loss.item() == pytest.approx(scale / 2, rel=0.01)
    for found, expected in zip(gradients, exact[1:], strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=1e-30)


def test_logits_that_are_not_finite_give_a_loss_that_is_not_and_a_factor_reaches_the_gradients():
    case = random_case(20, 8, 11, 1.0)
    once = figures(next_token_loss, case)
    for factor in (65536.0, 3.0, 0.0):
        scaled = figures(lambda *case, by=factor: by * next_token_loss(*case), case)
        torch.testing.assert_close(scaled[1:], tuple(factor * part for part in once[1:]))
    case[0][0, 4, 0] = float("nan")
    loss, hidden_grad, _ = figures(next_token_loss, case)
    assert loss.isnan()
    assert hidden_grad[0, 4].isnan().all() and hidden_grad[0, :4].isfinite().all()


def test_what_is_frozen_gets_no_gradient_and_the_other_its_own():
    for frozen in (0, 1):  # the hidden states, the head
        *parts, targets = random_case(20, 8, 11, 1.0)
        exact = figures(plain_loss, (*parts, targets), torch.float64)
        parts[1 - frozen].requires_grad_()
        next_token_loss(*parts, targets).backward()
        assert parts[frozen].grad is None
        expected = exact[1 + (1 - frozen)]
        torch.testing.assert_close(parts[1 - frozen].grad.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_without_gradients_the_loss_is_the_same_and_nothing_is_kept(autocast, monkeypatch):
    monkeypatch.setattr(engine.loss, "chunk_rows", lambda hidden, vocab_size: 7)
    case = random_case(20, 8, 11, 1.0)
    trained, *_ = figures(next_token_loss, case, autocast=autocast)
    hidden, weight = case[0].requires_grad_(), case[1].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            evaluated = next_token_loss(hidden, weight, case[2])
        frozen = next_token_loss(hidden.detach(), weight.detach(), case[2])
    assert torch.equal(evaluated, trained) and torch.equal(frozen, trained)
    assert not evaluated.requires_grad and not frozen.requires_grad


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = result if isinstance(result, list | tuple) else [result]
        sizes = [part.numel() for part in given if isinstance(part, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("gradients", [True, False])
def test_full_logits_never_exist(gradients):
    hidden, weight, targets = random_case(1500, 2, 4000, 1.0)
    with torch.set_grad_enabled(gradients), LargestTensor() as plain:
        plain_loss(hidden.requires_grad_(), weight, targets)
    assert plain.elements == 1500 * 4000
    with torch.set_grad_enabled(gradients), LargestTensor() as ours:
        next_token_loss(hidden.requires_grad_(), weight, targets)
    assert 500 * 4000 <= ours.elements <= 1100 * 4000


# of the logits: flat and peaked distributions
@pytest.mark.parametrize(("spread", "n_targets"), [(0.05, 2048), (0.05, 524_288), (1.5, 524_288)])
def test_fp16_holds_the_gradient_of_every_class_of_token_however_many_targets_a_step_has(
    spread, n_targets
):
    V = 4096
    hidden, weight, targets = random_case(256, 16, V, spread)
    targets %= V // 4  # the others are never a target
    found = {}
    for dtype in (torch.float32, torch.float16):
        parts = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.float16):
            loss = next_token_loss(*parts, targets, n_targets)
        (loss * 2.0**16).backward()  # as GradScaler does at first
        found[dtype] = [part.grad for part in parts]
    is_target = torch.zeros(V, dtype=torch.bool).index_fill_(0, targets.flatten(), True)
    probability = (hidden @ weight.T).softmax(-1).flatten(0, -2).mean(0)
    classes = {"targets": is_target}
    for decade in range(-7, 0):
        is_in = (probability >= 10.0**decade) & (probability < 10.0 ** (decade + 1))
        classes[f"others of 1e{decade}"] = is_in & ~is_target
    (d_hidden, d_weight), (d_hidden_16, d_weight_16) = found.values()
    assert (d_hidden_16 - d_hidden).norm() < 0.01 * d_hidden.norm()
    checked = [name for name, of_class in classes.items() if of_class.sum() > 20]
    assert len(checked) >= 2
    for name in checked:
        exact = d_weight[classes[name]]
        assert (d_weight_16[classes[name]] - exact).norm() < 0.01 * exact.norm(), name


@pytest.mark.parametrize(
    ("memory", "vocab_size", "rows"),
    [(140e9, 50257, 8192), (4e9, 50257, 1243), (4e9, 151_936, 411), (1e9, 151_936, 256)],
)
def test_a_chunk_fits_into_a_small_gpu(monkeypatch, memory, vocab_size, rows):
    monkeypatch.setattr(engine.loss, "total_memory", lambda device: int(memory))
    hidden = torch.empty(2, 4, device="meta")
    assert engine.loss.chunk_rows(hidden, vocab_size) == rows
