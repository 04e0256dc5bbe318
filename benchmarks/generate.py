"""Generation: tokens a second and time to the first token, compared with transformers.

    python -m benchmarks.generate [rounds [batch ...]]

A 124M model with fresh weights continues 64 tokens by 128, greedily, in batches of one and eight
unless others are given; the contenders take turns in one process. The limit is the rate at which
memory could deliver the weights of the matrix products once for each token; its bandwidth is
measured in the same round. The exit code is 1 if our fp32 tokens differ from transformers', or
bf16's logits are too far from fp32's.
"""

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks.peers import sample_tokens, save_for_transformers
from benchmarks.report import machine, write_results
from engine.console import say, track, use_utf8
from engine.precision import DTYPES
from engine.processor import prepare_processor
from engine.weights import OneRowProducts, convert_weights
from environment import pick_device
from exchange.saved_run import fastest_reader
from generation import stream
from model import GPTConfig, GPTModel, KVCache
from planning.plan import MODELS_FILE, read_models

N_PROMPT, N_NEW = 64, 128
BATCHES = (1, 8)
N_READ = 1 << 28  # fp32 numbers, more than any processor's cache holds
N_COMPARED = 1024  # positions whose logits are compared with fp32's
MOST_DIFFERENCE = 0.02  # of bf16's logits, in standard deviations of fp32's
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}

# (prompts of equal length, number of new tokens) -> the new ids of each
Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclass
class Contender:
    """A way to generate and its measurements: by batch size, the seconds of each round."""

    name: str
    weights: str
    generate: Generate
    first_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    all_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    cold_first_s: float = 0.0  # of its very first token; ours runs before transformers

    def measure(self, prompts: list[list[int]]) -> None:
        """Time a first token, and a generation of N_NEW tokens."""
        for count, kept in ((1, self.first_s), (N_NEW, self.all_s)):
            began_at = time.perf_counter()
            self.generate(prompts, count)
            kept[len(prompts)].append(time.perf_counter() - began_at)


def main(rounds: int = 5, *batches: int) -> None:
    """Print a row for each contender and batch, and write the results."""
    use_utf8()
    prepare_processor()
    batches = batches or BATCHES
    device = pick_device(None)
    models, _ = read_models(MODELS_FILE)
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**models["gpt2-124m"] | {"vocab_size": 50257})).eval()
    prompts = sample_tokens(max(batches) * N_PROMPT).reshape(-1, N_PROMPT).tolist()
    bandwidths = []
    with tempfile.TemporaryDirectory() as folder:
        contenders = [*theirs(model, Path(folder), device), *ours(model, device)]
        for contender in reversed(contenders):
            began_at = time.perf_counter()
            contender.generate(prompts[:1], 1)
            contender.cold_first_s = time.perf_counter() - began_at
        for _ in track(range(rounds), rounds, "rounds"):
            bandwidths.append(memory_bandwidth(device))
            for batch in batches:
                for contender in contenders:
                    contender.measure(prompts[:batch])
    agreement = compare(model, device)
    plain = next(c for c in contenders if c.name == "ours, fp32")
    same = all(
        plain.generate(prompts[:batch], N_NEW) == contenders[0].generate(prompts[:batch], N_NEW)
        for batch in batches
    )
    n_weights = model.parameters_in_products()
    reads = [bandwidth / n_weights for bandwidth in bandwidths]
    rows = [row_of(c, contenders[0], batch, reads) for c in contenders for batch in batches]
    report(rows, bandwidths, agreement, same)
    results = {
        "machine": machine(device),
        "tokens_in": N_PROMPT,
        "tokens_out": N_NEW,
        "parameters_in_products": n_weights,
        "bytes_per_s": bandwidths,
        "rows": rows,
        "fp32_tokens_are_transformers": same,
        "from_fp32": agreement,
    }
    say(f"written to {write_results('generate', device, results)}")
    bf16 = agreement["bf16"]
    if not same or bf16["mean_difference_by_std"] > MOST_DIFFERENCE:
        sys.exit(1)


def theirs(model: GPTModel, folder: Path, device: torch.device) -> Iterator[Contender]:
    """transformers' GPT-2 with our weights, in fp32 (its default) and in bf16."""
    from transformers import GPT2LMHeadModel

    save_for_transformers(model, folder)

    def contender(kind: str, dtype: torch.dtype) -> Contender:
        their_model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device).eval()

        def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
            ids = torch.tensor(prompts, device=device)
            added = their_model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            )
            return added[:, len(prompts[0]) :].tolist()

        return Contender(f"transformers, {kind}", kind, generate)

    for kind in ("fp32", "bf16"):
        yield contender(kind, DTYPES[kind])


def ours(model: GPTModel, device: torch.device) -> Iterator[Contender]:
    """Our model with each kind of weights that the device supports."""

    def contender(requested: str) -> Contender:
        our_model = converted(model, requested, device)

        def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
            steps = stream(our_model, prompts, max_new_tokens=count, temperature=0.0)
            return [[token.id for token in row] for row in zip(*steps, strict=True)]

        kind = fastest_reader(requested, device, model)[0]
        return Contender(f"ours, {requested}", kind, generate)

    for requested in (*kinds_on(device), "auto"):
        yield contender(requested)


def kinds_on(device: torch.device) -> list[str]:
    """The kinds of weights that load_run() supports on a device."""
    return [kind for kind in BYTES if kind != "int8" or device.type == "cpu"]


def converted(model: GPTModel, requested: str, device: torch.device) -> GPTModel:
    """A copy of a model with such weights, as load_run() makes it."""
    copy = deepcopy(model)
    kind, copy.decodes_by_onednn, _ = fastest_reader(requested, device, copy)
    convert_weights(copy, kind)
    return copy.to(device).eval()


def memory_bandwidth(device: torch.device) -> float:
    """The bytes a second at which a gigabyte is read, by the faster of two reductions."""
    memory = torch.ones(N_READ, device=device)
    best = 0.0
    for read in (memory.sum, memory.amax):
        for _ in range(3):
            began_at = time.perf_counter()
            read().item()
            best = max(best, memory.nbytes / (time.perf_counter() - began_at))
    return best


def compare(model: GPTModel, device: torch.device) -> dict[str, dict[str, float]]:
    """By kind of weights, the difference of decoding steps' logits from fp32's on one text."""
    ids = sample_tokens(N_COMPARED).tolist()
    exact = logits_of(converted(model, "fp32", device), ids)
    found = {}
    for kind in kinds_on(device)[1:]:
        logits = logits_of(converted(model, kind, device), ids)
        found[kind] = {
            "mean_difference_by_std": ((logits - exact).abs().mean() / exact.std()).item(),
            "same_greedy_token": (logits.argmax(-1) == exact.argmax(-1)).float().mean().item(),
        }
    return found


@torch.no_grad()
def logits_of(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """(T, V) logits after each token of a text, by decoding steps of one position."""
    device = model.token_embedding.weight.device
    cache = KVCache([1], len(ids), device)
    rows = []
    for token in ids:
        with OneRowProducts():
            hidden = model.hidden(torch.tensor([[token]], device=device), cache.advance(1))
            rows.append(model.head(hidden[:, -1]).float().cpu())
    return torch.cat(rows)


def row_of(contender: Contender, base: Contender, batch: int, reads: list[float]) -> dict:
    """A row of the report; reads is the bandwidth in bytes of each weight a second, by round."""
    seconds = contender.all_s[batch]
    limits = [batch * per_s / BYTES[contender.weights] for per_s in reads]
    speeds = [batch * N_NEW / taken for taken in seconds]
    shares = [speed / limit for speed, limit in zip(speeds, limits, strict=True)]
    ratios = [theirs / own for theirs, own in zip(base.all_s[batch], seconds, strict=True)]
    return {
        "name": contender.name,
        "batch": batch,
        "tokens_per_s": statistics.median(speeds),
        "seconds": seconds,
        "times_transformers": statistics.median(ratios),
        "ratios": ratios,
        "share_of_limit": statistics.median(shares),
        "shares": shares,
        "first_token_s": statistics.median(contender.first_s[batch]),
        "cold_first_token_s": contender.cold_first_s,
    }


def report(rows: list[dict], bandwidths: list[float], agreement: dict, same: bool) -> None:
    """Print the measurements."""
    rates = ", ".join(f"{bandwidth / 1e9:.1f}" for bandwidth in bandwidths)
    say(f"memory is read at {rates} GB/s; {N_PROMPT} tokens in, {N_NEW} out")
    for row in rows:
        say(
            f"{row['name']:20} batch {row['batch']}: {row['tokens_per_s']:7.1f} tokens/s, "
            f"{row['times_transformers']:.2f} x transformers, {row['share_of_limit']:.0%} of the "
            f"limit ({min(row['shares']):.0%} to {max(row['shares']):.0%}), first token "
            f"{row['first_token_s']:.3f} s (in its first generation "
            f"{row['cold_first_token_s']:.3f} s)"
        )
    for kind, seen in agreement.items():
        say(
            f"{kind}: logits {seen['mean_difference_by_std']:.2%} of their standard deviation from "
            f"fp32's, the same greedy token at {seen['same_greedy_token']:.1%}"
        )
    alone = {row["name"]: row["tokens_per_s"] for row in rows if row["batch"] == 1}
    auto = alone["ours, auto"]
    exact = max(speed for name, speed in alone.items() if name in ("ours, fp32", "ours, bf16"))
    theirs = max(speed for name, speed in alone.items() if name.startswith("transformers"))
    say(f"auto: {auto / exact:.2f} of our faster exact kind, {auto / theirs:.2f} of their faster")
    say(f"fp32 gives transformers' tokens: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    if not all(argument.isdecimal() and int(argument) for argument in sys.argv[1:]):
        sys.exit(__doc__)
    main(*map(int, sys.argv[1:]))
