"""Training speed: tokens a second of three models, and their share of the matrix-multiply rate.

    python -m benchmarks.train [quick] [char-10m] [gpt2-124m]

The rate is measured in the same run, in fp32 and bf16. Work is counted as 6N + 12LHDT floating
point operations a token (Chowdhery et al. 2022, appendix B), N with the head and without
positions.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.report import machine, write_results
from engine.console import say, use_utf8
from engine.optim import build_adamw
from engine.precision import Precision, choose_precision
from environment import pick_device
from model import GPTConfig, GPTModel
from run_plan import MODELS_FILE, read_models
from train import take_step

MULTIPLY_SHAPES = ((1024, 768, 3072), (1024, 3072, 768), (2048, 2048, 2048))  # rows, inner, columns


@dataclass(frozen=True)
class Case:
    """A model and the batch that it is trained on."""

    name: str
    config: GPTConfig
    batch_size: int
    steps: int


def cases() -> list[Case]:
    """The three models, smallest first."""
    models, _ = read_models(MODELS_FILE)
    character_model = GPTConfig(
        vocab_size=65, context_length=256, emb_dim=384, n_heads=6, n_layers=6, tie_embeddings=True
    )
    return [
        Case("quick", GPTConfig(vocab_size=50257, **models["small"]), batch_size=4, steps=20),
        Case("char-10m", character_model, batch_size=16, steps=6),
        Case(
            "gpt2-124m",
            GPTConfig(vocab_size=50257, **models["gpt2-124m"] | {"context_length": 256}),
            batch_size=4,
            steps=4,
        ),
    ]


def main(names: list[str]) -> None:
    """Measure the named cases (all without a name), print a table and write the results."""
    use_utf8()
    known = [case.name for case in cases()]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown: {', '.join(unknown)}; known are: {', '.join(known)}")
    device = pick_device(None)
    rates = {name: multiply_rate(dtype, device) for name, dtype in DTYPES.items()}
    for name, rate in rates.items():
        say(f"matrix multiply, {name}: {rate / 1e9:,.0f} GFLOP/s")
    rows = []
    for case in cases():
        if names and case.name not in names:
            continue
        row = measure(case, device, choose_precision("auto", device))
        for name, rate in rates.items():
            row[f"share_of_{name}_rate"] = row["flop_per_second"] / rate
        rows.append(row)
        say(
            f"{case.name:10} {row['parameters']:>11,} parameters  "
            f"{case.batch_size} x {case.config.context_length}  {row['precision']}  "
            f"{row['tokens_per_second']:>8,.0f} tokens/s  "
            f"{row['share_of_fp32_rate']:.0%} of fp32, {row['share_of_bf16_rate']:.0%} of bf16"
        )
    results = {"machine": machine(device), "multiply_rates": rates, "rows": rows}
    say(f"written to {write_results('train', device, results)}")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def multiply_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The best rate of a large matrix product, in floating point operations a second."""
    best = 0.0
    for rows, inner, columns in MULTIPLY_SHAPES:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        seconds = median_seconds(lambda a=left, b=right: a @ b, device, repeats=15)
        best = max(best, 2 * rows * inner * columns / seconds)
    return best


def measure(case: Case, device: torch.device, precision: Precision) -> dict:
    """Train a case on random tokens; returns its figures."""
    torch.manual_seed(0)
    model = GPTModel(case.config).to(device)
    optimizer = build_adamw(model, learning_rate=1e-4, weight_decay=0.1)
    shape = (case.batch_size, case.config.context_length)
    ids, targets = torch.randint(case.config.vocab_size, (2, *shape), device=device)
    seconds = median_seconds(
        lambda: take_step(model, [(ids, targets)], optimizer, precision, 1.0), device, case.steps
    )
    tokens = ids.numel()
    return {
        "name": case.name,
        "parameters": model.count_parameters(),
        "batch": list(shape),
        "precision": precision.name,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "flop_per_second": tokens * flop_per_token(model) / seconds,
    }


def flop_per_token(model: GPTModel) -> int:
    """Floating point operations of a training step for each token: 6N + 12LHDT."""
    config = model.config
    in_products = model.count_parameters()
    if config.positions == "learned":
        in_products -= model.position_embedding.weight.numel()
    if not config.tie_embeddings:
        in_products -= model.token_embedding.weight.numel()  # looked up, not multiplied
    return 6 * in_products + 12 * config.n_layers * config.emb_dim * config.context_length


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of a piece of work, after two runs that don't count."""
    times = []
    for _ in range(repeats + 2):
        started_at = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started_at)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main(sys.argv[1:])
