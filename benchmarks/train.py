"""Training speed: tokens a second of three models, and their share of the matrix-product rate.

    python -m benchmarks.train [quick] [char-10m] [gpt2-124m]
    python -m benchmarks.train --peers [--rounds N] [--only NAME ...]
    python -m benchmarks.train --memory

The rate is measured in the same run, in fp32 and bf16, at the best of a few large shapes, and also
over the model's own matrix products, each alone. A token counts as 6N + 12LHDT floating point
operations (Chowdhery et al. 2022, appendix B), N with the head and without positions. The quick
model also trains with full logits, in turn with the usual loss, and the character model in fp32 in
turn with a step as nanoGPT takes it on a CPU. --peers and --memory compare the
124M model with transformers and litgpt; see benchmarks/peers.py.
"""

import argparse
import functools
import math
import sys
from dataclasses import dataclass

import torch

from benchmarks import peers
from benchmarks.peer_nanogpt import prepare_nanogpt_step
from benchmarks.report import machine, write_results
from benchmarks.steps import (
    bf16_peak,
    median_seconds_in_turn,
    multiply_rate,
    own_products_rate,
    prepare_full_logits_step,
    prepare_step,
)
from engine.compiling import what_prevents_compiling
from engine.console import say, use_utf8
from engine.precision import DTYPES, Precision, choose_precision
from environment import pick_device
from model import GPTConfig
from planning.plan import MODELS_FILE, read_models


@dataclass(frozen=True)
class Case:
    """A model and its batch."""

    name: str
    config: GPTConfig
    batch_size: int
    steps: int
    beside_full_logits: bool = False
    beside_nanogpt: bool = False


def cases(device: torch.device) -> list[Case]:
    """The three models, smallest first; a GPU trains the largest on 64 x 1024 tokens."""
    models, _ = read_models(MODELS_FILE)
    character_model = GPTConfig(
        vocab_size=65, context_length=256, emb_dim=384, n_heads=6, n_layers=6, tie_embeddings=True
    )
    large, batch_size = models["gpt2-124m"], 64
    if device.type != "cuda":
        large, batch_size = large | {"context_length": 256}, 4
    return [
        Case(
            "quick",
            GPTConfig(vocab_size=50257, **models["small"]),
            batch_size=4,
            steps=20,
            beside_full_logits=True,
        ),
        Case("char-10m", character_model, batch_size=16, steps=6, beside_nanogpt=True),
        Case("gpt2-124m", GPTConfig(vocab_size=50257, **large), batch_size=batch_size, steps=4),
    ]


def main(arguments: list[str]) -> None:
    """Run the benchmarks that the command line names."""
    use_utf8()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    parser.add_argument("cases", nargs="*", help="quick, char-10m, gpt2-124m; all without a name")
    parser.add_argument("--peers", action="store_true", help="speed and memory beside the peers")
    parser.add_argument("--memory", action="store_true", help="memory alone beside the peers")
    parser.add_argument("--rounds", type=int, default=3, help="speed rounds of --peers")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders of --peers, and ours")
    asked = parser.parse_args(arguments)
    if asked.peers or asked.memory:
        peers.main(asked.rounds if asked.peers else 0, asked.only)
    else:
        measure_cases(asked.cases)


def measure_cases(names: list[str]) -> None:
    """Measure the named cases (all by default), print a table and write the results."""
    device = pick_device(None)
    known = [case.name for case in cases(device)]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown: {', '.join(unknown)}; known are: {', '.join(known)}")
    precision = choose_precision("auto", device)
    # without units for bf16 its rate says nothing, and takes minutes to measure
    formats = dict.fromkeys(("fp32", precision.name))
    rates = {name: multiply_rate(DTYPES[name], device) for name in formats}
    for name, rate in rates.items():
        say(f"matrix multiply, {name}: {rate / 1e9:,.0f} GFLOP/s")
    rows = []
    for case in cases(device):
        if names and case.name not in names:
            continue
        row = measure(case, device, precision)
        for name, rate in rates.items():
            row[f"share_of_{name}_rate"] = row["flop_per_second"] / rate
        if device.type == "cuda" and (peak := bf16_peak(torch.cuda.get_device_name(device))):
            row["share_of_bf16_peak"] = row["flop_per_second"] / peak
        rows.append(row)
        describe(row)
    results = {"machine": machine(device), "multiply_rates": rates, "rows": rows}
    say(f"written to {write_results('train', device, results)}")


def describe(row: dict) -> None:
    """Print the results of a case."""
    share = row[f"share_of_{row['precision']}_rate"]
    batch_size, max_length = row["batch"]
    say(
        f"{row['name']:10} {row['parameters']:>11,} parameters  "
        f"{batch_size} x {max_length}  {row['precision']}  {row['faster'].replace('_', ' ')}  "
        f"{row['tokens_per_second']:>8,.0f} tokens/s  "
        f"{share:.0%} of {row['precision']} products, "
        f"{row['share_of_own_products']:.0%} of its own products alone"
    )
    if "share_of_bf16_peak" in row:
        say(f"{'':10} {row['share_of_bf16_peak']:.1%} of the device's dense bf16 peak")
    if "times_full_logits" in row:
        say(f"{'':10} {row['times_full_logits']:.2f} times as fast as with full logits")
    if "times_nanogpt" in row:
        say(f"{'':10} in fp32 {row['times_nanogpt']:.2f} times as fast as nanoGPT's step")


def measure(case: Case, device: torch.device, precision: Precision) -> dict:
    """Train a case on random tokens; returns its results."""
    model, step = prepare_step(case.config, device, precision)
    obstacle = what_prevents_compiling(device)
    shape = (case.batch_size, case.config.context_length)
    ids, targets = torch.randint(case.config.vocab_size, (2, *shape), device=device)
    steps = {"as_written": step}
    if obstacle is None:
        _, steps["compiled"] = prepare_step(case.config, device, precision, compiled=True)
    if case.beside_full_logits:
        _, steps["full_logits"] = prepare_full_logits_step(case.config, device, precision)
    if case.beside_nanogpt:
        fp32 = choose_precision("fp32", device)
        _, steps["fp32"] = prepare_step(case.config, device, fp32)
        steps["nanogpt"] = prepare_nanogpt_step(case.config, device)
    work = [functools.partial(step, ids, targets) for step in steps.values()]
    seconds = dict(zip(steps, median_seconds_in_turn([*work], device, case.steps), strict=True))
    tokens = ids.numel()
    best = min(("as_written", "compiled"), key=lambda name: seconds.get(name, math.inf))
    flop_per_second = tokens * model.flop_per_token() / seconds[best]
    row = {
        "name": case.name,
        "parameters": model.count_parameters(),
        "batch": list(shape),
        "precision": precision.name,
        "faster": best,
        "step_seconds": seconds[best],
        "seconds": seconds,
        "not_compiled_because": obstacle,
        "tokens_per_second": tokens / seconds[best],
        "flop_per_second": flop_per_second,
        "share_of_own_products": flop_per_second
        / own_products_rate(case.config, tokens, DTYPES[precision.name], device),
    }
    if case.beside_full_logits:
        # both uncompiled, so that only the loss differs
        row["times_full_logits"] = seconds["full_logits"] / seconds["as_written"]
    if case.beside_nanogpt:
        row["times_nanogpt"] = seconds["nanogpt"] / seconds["fp32"]
    return row


if __name__ == "__main__":
    main(sys.argv[1:])
