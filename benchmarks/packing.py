"""Packed conversations beside padded ones: useful tokens a second of training.

    python -m benchmarks.packing [--rounds 3]

Both train the same model on the same rows of 20 to 300 tokens, in turn. Packed rows fill windows in
which each attends to itself alone; a padded row is a row of its batch, which is as long as the
longest of them. The later half of each row counts in the loss, as an answer does, and the head
computes nothing else in either. The tokens of rows are useful, padding is not.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from benchmarks.report import machine, write_results
from data import Packed, PackedWindows, to_device
from engine.console import say, use_utf8
from engine.optim import build_adamw
from engine.precision import choose_precision
from engine.processor import prepare_processor
from engine.starting import end_at_ctrl_c
from model import GPTConfig, GPTModel
from planning.machine import pick_device
from text.packing import Packing, cut_pieces, pack
from training.learner import take_step

SHORTEST, LONGEST, N_ROWS = 20, 300, 128
WINDOW, WINDOWS_A_STEP = 512, 5
ROWS_A_STEP = 2 * WINDOW * WINDOWS_A_STEP // (SHORTEST + LONGEST)  # as many useful tokens
VOCABULARY = 8192


def make_batches() -> tuple[list[Packed], list[Packed]]:
    """The batches of a pass over random rows: packed, and padded."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(SHORTEST, LONGEST + 1, N_ROWS)
    boundaries = np.concatenate(([0], np.cumsum(lengths + 1)[:-1]))  # a token before the targets
    tokens = draw.integers(0, VOCABULARY, (lengths + 1).sum()).astype(np.uint16)
    places = np.arange(len(tokens)) - np.repeat(boundaries, lengths + 1)
    is_target = (2 * places > np.repeat(lengths, lengths + 1)).astype(np.uint8)
    pieces = cut_pieces(boundaries, is_target, WINDOW)
    apart = Packing(np.arange(N_ROWS), np.arange(1, N_ROWS + 1))
    packed = PackedWindows(tokens, is_target, pieces, pack(pieces.lengths, WINDOW, 0))
    padded = PackedWindows(tokens, is_target, pieces, apart)
    return (
        [packed.__getitems__(part) for part in _parts(len(packed), WINDOWS_A_STEP)],
        [
            _cut(padded.__getitems__(part), pieces.lengths[part].max())
            for part in _parts(N_ROWS, ROWS_A_STEP)
        ],
    )


def count_useful() -> int:
    """The tokens of all rows."""
    return int(np.random.default_rng(0).integers(SHORTEST, LONGEST + 1, N_ROWS).sum())


def _parts(count: int, size: int) -> list[list[int]]:
    return [list(range(at, min(at + size, count))) for at in range(0, count, size)]


def _cut(batch: Packed, length: int) -> Packed:
    """A batch with rows of this length."""
    return Packed.of(batch.ids[:, :length], batch.targets[:, :length], None)


def time_passes(n_rounds: int, device: torch.device) -> dict[str, list[float]]:
    """The useful tokens a second of each pass over all rows, packed and padded in turn."""
    prepare_processor()
    precision = choose_precision("auto", device)
    torch.manual_seed(0)
    config = GPTConfig(  # a sixth of SmolLM2-135M's layers and tokens
        vocab_size=VOCABULARY,
        context_length=WINDOW,
        emb_dim=576,
        n_heads=9,
        n_kv_heads=3,
        ff_dim=1536,
        n_layers=5,
        architecture="llama",
    )
    model = GPTModel(config).to(device)
    optimizer = build_adamw(model, learning_rate=1e-4, weight_decay=0.1)
    packed, padded = make_batches()
    contenders = {"packed": packed, "padded": padded}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for batches in contenders.values():  # warms up
        take_step(model, [to_device(batches[0], device)], optimizer, precision, 1.0)
    for _ in range(n_rounds):
        for name, batches in contenders.items():
            began_at = time.perf_counter()
            for batch in batches:
                loss, _ = take_step(model, [to_device(batch, device)], optimizer, precision, 1.0)
            loss.item()  # waits for the device
            seconds = time.perf_counter() - began_at
            found[name].append(count_useful() / seconds)
    return found


def main() -> None:
    """Print the medians and their ratio, and write them."""
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="passes of each (3)")
    asked = parser.parse_args()
    device = pick_device(None)
    found = time_passes(asked.rounds, device)
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    ratio = statistics.median(map(float.__truediv__, *found.values()))
    for name, batches in zip(medians, make_batches(), strict=True):
        used = count_useful() / sum(batch.ids.numel() for batch in batches)
        say(f"{name}: {medians[name]:,.0f} useful tokens/s ({used:.1%} of all are useful)")
    say(f"packed is {ratio:.2f} times as fast as padded")
    results = {"machine": machine(device), "useful_tokens_per_s": found, "ratio": ratio}
    say(f"written to {write_results('packing', device, results)}")


if __name__ == "__main__":
    end_at_ctrl_c()
    main()
