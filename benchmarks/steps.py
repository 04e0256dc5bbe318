"""Training steps to time, and the matrix-product rates to compare them with."""

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from engine.compiling import compile_model
from engine.optim import build_adamw
from engine.precision import Precision
from engine.processor import prepare_processor
from model import GPTConfig, GPTModel
from training.learner import take_step

MULTIPLY_SHAPES = ((1024, 768, 3072), (1024, 3072, 768), (2048, 2048, 2048))  # rows, inner, columns
# dense bf16 FLOP/s with fp32 accumulation, by NVIDIA's data sheets; the first name that matches
BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1
# ids and targets of a batch, (B, T) each -> its loss, a 0-d tensor on the device
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def fresh_model(config: GPTConfig, device: torch.device) -> GPTModel:
    """A model with the weights of seed 0, equal in every process."""
    torch.manual_seed(0)
    return GPTModel(config).to(device)


def prepare_step(
    config: GPTConfig,
    device: torch.device,
    precision: Precision,
    *,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = WEIGHT_DECAY,
    compiled: bool = False,
) -> tuple[GPTModel, Step]:
    """A fresh model and the trainer's step for it, compiled or not."""
    prepare_processor()
    model = fresh_model(config, device)
    optimizer = build_adamw(model, learning_rate, weight_decay)
    if compiled:
        compile_model(model, device, micro_batches=1)

    def step(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        batch = (ids.to(device), targets.to(device))
        loss, _ = take_step(model, [batch], optimizer, precision, 1.0)
        return loss

    return model, step


def prepare_full_logits_step(
    config: GPTConfig, device: torch.device, precision: Precision
) -> tuple[GPTModel, Step]:
    """The same with a plain step and nn.CrossEntropyLoss on all logits, under autocast."""
    model = fresh_model(config, device)
    optimizer = build_adamw(model, LEARNING_RATE, WEIGHT_DECAY)
    criterion = nn.CrossEntropyLoss()

    def step(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with precision.autocast():
            loss = criterion(model(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, step


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a function after two warm-up calls."""
    return median_seconds_in_turn([work], device, repeats)[0]


def median_seconds_in_turn(
    pieces: list[Callable[[], object]], device: torch.device, repeats: int
) -> list[float]:
    """The median time of each function after two warm-up calls; they take turns."""
    times: list[list[float]] = [[] for _ in pieces]
    for _ in range(repeats + 2):
        for work, taken in zip(pieces, times, strict=True):
            started_at = time.perf_counter()
            work()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            taken.append(time.perf_counter() - started_at)
    return [statistics.median(taken[2:]) for taken in times]


def multiply_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The best rate of a large matrix product, in floating point operations a second."""
    shapes = [*MULTIPLY_SHAPES]
    if device.type == "cuda":
        shapes.append((8192, 8192, 8192))
    return max(product_rate(*shape, dtype, device) for shape in shapes)


def product_rate(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> float:
    """The rate of one matrix product, in floating point operations a second."""
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    seconds = median_seconds(lambda: left @ right, device, repeats=15)
    return 2 * rows * inner * columns / seconds


def own_products_rate(
    config: GPTConfig, n_tokens: int, dtype: torch.dtype, device: torch.device
) -> float:
    """The rate of a model's own products, each alone, in floating point operations a second:
    every Linear's forward and two backward products on a batch of n_tokens."""
    with torch.device("meta"):
        layers = [m for m in GPTModel(config).modules() if isinstance(m, nn.Linear)]
    shapes = Counter((layer.out_features, layer.in_features) for layer in layers)
    operations = seconds = 0.0
    for (columns, inner), count in sorted(shapes.items()):
        operations += count * 3 * 2 * n_tokens * columns * inner
        seconds += count * linear_seconds(columns, inner, n_tokens, dtype, device)
    return operations / seconds


def linear_seconds(
    columns: int, inner: int, n_tokens: int, dtype: torch.dtype, device: torch.device
) -> float:
    """The time of a Linear's three products: its output and both gradients."""
    x, weight, gradient = (
        torch.randn(*shape, device=device, dtype=dtype)
        for shape in ((n_tokens, inner), (columns, inner), (n_tokens, columns))
    )
    products = (lambda: x @ weight.T, lambda: gradient @ weight, lambda: gradient.T @ x)
    return sum(median_seconds(product, device, repeats=7) for product in products)


def bf16_peak(name: str) -> float | None:
    """The dense bf16 peak of a GPU in floating point operations a second, None if unknown."""
    words = name.replace("-", " ")
    found = (peak for key, peak in BF16_PEAKS.items() if re.search(rf"\b{key}\b", words))
    return next(found, None)
