"""Validation loss as a function of training time and tokens, on two texts.

    python -m benchmarks.learn [shakespeare] [shakespeare-30s] [ci]

On tiny-shakespeare two sides train for the same time: GPT-2's architecture with AdamW, and Llama's
with QK-norm and Muon. Each first tries the same number of learning rates, a factor of two apart,
for a share of the time, then trains at the best one with three seeds. For 30 s, and on ci, only
the second side trains, at one rate.
Runs use the trainer itself, from a settings file to train(); losses and bits a byte are those of
its summary: over the full validation text, each token with half a window or more before it.
Training time excludes import, evaluation and compiling, which are printed.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import RESULTS, machine, write_results
from engine.console import say, use_utf8
from engine.metrics import bits_per_character
from environment import pick_device, prepare_environment
from train import train

TEXTS = Path(__file__).resolve().parents[2] / "shared" / "data"
SEEDS = (1, 2, 3)
SWEEP_SHARE = 0.15  # of the time, for each learning rate of the sweep
# the trainer plans a run's steps from a few timed ones: a margin for slower ones
BUDGET_SHARE = 0.95
MUON_RATES = (3e-3, 6e-3, 1.2e-2)
ADAMW_RATES = (1.5e-3, 3e-3, 6e-3)
SETTINGS = """
DATA = {data!r}
TOKENIZER = {tokenizer!r}
CUSTOM_MODE = True
MODEL = {model!r}
custom_params = {custom_params!r}
SEED = {seed}
COMPILE = {compile!r}
OUTPUT_DIR = {folder!r}
RESUME = False
"""


@dataclass(frozen=True)
class Side:
    """A model with its settings, and the learning rates of its sweep."""

    name: str
    model: str  # of config.json
    custom_params: dict
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """A text, a training time, and the loss to reach in it."""

    name: str
    text: str  # a file of TEXTS
    tokenizer: str
    seconds: float
    goal: float
    in_bits: bool  # the goal is in bits a character, else in nats a token
    sides: tuple[Side, ...]


def cases() -> dict[str, Case]:
    """The recipes of docs/recipes.md, and GPT-2's architecture at the same size."""
    batch = {"batch_size": 16, "sampling": "random", "eval_iter": 5, "schedule": "wsd"}
    small = {"n_layers": 6, "n_heads": 3, "emb_dim": 192, "tie_embeddings": True}

    def sides(model: str, shape: dict, max_length: int) -> tuple[Side, Side]:
        common = batch | {"max_length": max_length}
        return (
            Side("llama, Muon", model, common | {"optimizer": "muon"}, MUON_RATES),
            Side("gpt2, AdamW", "small", common | {"model_overrides": shape}, ADAMW_RATES),
        )

    both = sides("llama-mini", small, 256)
    # in a short run evaluations are costly, and more, smaller steps learn more
    short = both[0].custom_params | {"max_length": 128, "eval_iter": 2, "eval_freq": 100}
    alone = Side(both[0].name, both[0].model, short, (6e-3,))
    # four epochs of a text overfit without dropout
    shallow = short | {"model_overrides": {"n_layers": 4, "drop_rate": 0.1}}
    poems = Side(alone.name, alone.model, shallow, (1.2e-2,))
    listed = (
        Case("shakespeare", "tinyshakespeare.txt", "char", 100, 1.56, False, both),
        Case("shakespeare-30s", "tinyshakespeare.txt", "char", 30, 1.886, False, (alone,)),
        Case("ci", "ci.txt", "bpe:4096", 100, 6.7, True, (poems,)),
    )
    return {case.name: case for case in listed}


@dataclass(frozen=True)
class Outcome:
    """The results of a run; seconds, tokens and losses are the points of its curve."""

    seed: int
    rate: float
    loss: float  # over all validation text, in the case's unit
    bits_per_byte: float  # of the same
    train_seconds: float
    other_seconds: float  # evaluation, compiling, preparing
    steps: int
    seconds: list[float]
    tokens: list[int]
    losses: list[float]  # each over part of the validation text


def main(names: list[str]) -> None:
    """Run the named cases (all by default), print a table, write results and curves."""
    use_utf8()
    known = cases()
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"unknown: {', '.join(unknown)}; known are: {', '.join(known)}")
    device = pick_device(None)
    for case in (known[name] for name in names or known):
        row = measure(case)
        draw(case, row, RESULTS / f"learn-{case.name}-{device.type}.png")
        results = {"machine": machine(device), "row": row}
        say(f"written to {write_results(f'learn-{case.name}', device, results)}")


def measure(case: Case) -> dict:
    """Sweep the rates of both sides, then train each with every seed; returns all outcomes."""
    unit = "bits a character" if case.in_bits else "nats a token"
    say(f"{case.name}: {case.seconds:g} s of training, the goal is {case.goal} {unit}")
    sides = []
    for side in case.sides:
        swept = []
        if len(side.rates) > 1:
            swept = [run(case, side, rate, SEEDS[0], SWEEP_SHARE) for rate in side.rates]
        for outcome in swept:
            say(
                f"  {side.name}, rate {outcome.rate:g}, {SWEEP_SHARE:.0%} of the time: "
                f"{outcome.loss:.4f}"
            )
        best = min(swept, key=lambda outcome: outcome.loss).rate if swept else side.rates[0]
        outcomes = [run(case, side, best, seed, 1.0) for seed in SEEDS]
        for o in outcomes:
            say(
                f"  {side.name}, rate {best:g}, seed {o.seed}: {o.loss:.4f}, {o.bits_per_byte:.4f} "
                f"bits a byte, after {o.steps:,} steps in {o.train_seconds:.1f} s (and "
                f"{o.other_seconds:.1f} s for the rest)"
            )
        losses = [outcome.loss for outcome in outcomes]
        sides.append(
            {
                "name": side.name,
                "model": side.model,
                "custom_params": side.custom_params,
                "rates": {f"{outcome.rate:g}": outcome.loss for outcome in swept},
                "rate": best,
                "median_loss": statistics.median(losses),
                "median_bits_per_byte": statistics.median(o.bits_per_byte for o in outcomes),
                "worst_loss": max(losses),
                "most_seconds": max(outcome.train_seconds for outcome in outcomes),
                "runs": [vars(outcome) for outcome in outcomes],
            }
        )
        say(
            f"{case.name}: {side.name}: {sides[-1]['median_loss']:.4f} {unit}, "
            f"{sides[-1]['median_bits_per_byte']:.4f} bits a byte (medians)"
        )
    return {
        "name": case.name,
        "text": case.text,
        "tokenizer": case.tokenizer,
        "seconds": case.seconds,
        "goal": case.goal,
        "unit": unit,
        "sides": sides,
    }


def run(case: Case, side: Side, rate: float, seed: int, share: float) -> Outcome:
    """Train once, for a share of the case's time, in a temporary folder."""
    params = side.custom_params | {
        "learning_rate": rate,
        "time_budget_minutes": BUDGET_SHARE * share * case.seconds / 60,
    }
    started_at = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        settings = SETTINGS.format(
            data=str(TEXTS / case.text),
            tokenizer=case.tokenizer,
            model=side.model,
            custom_params=params,
            seed=seed,
            compile=True,
            folder=folder,
        )
        Path("settings.py").write_text(settings, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            env = prepare_environment("settings.py")
            history = train(env).history
        rows = (env.run.path / "metrics.jsonl").read_text("utf-8").splitlines()
    speeds = {
        row["step"]: row["train/tok_per_sec"]
        for row in map(json.loads, rows)
        if "train/tok_per_sec" in row
    }
    seconds = [0.0]
    for before, after, step in zip(
        history.tokens_seen, history.tokens_seen[1:], history.steps[1:], strict=False
    ):
        seconds.append(seconds[-1] + (after - before) / speeds[step])
    took = time.perf_counter() - started_at
    score = env.learner.score(env.val_loader, env.tokenizer)

    def in_unit(nats: float) -> float:
        return bits_per_character(nats, env.token_size) if case.in_bits else nats

    return Outcome(
        seed=seed,
        rate=rate,
        loss=score.bits_per_character if case.in_bits else score.loss,
        bits_per_byte=score.bits_per_byte,
        train_seconds=seconds[-1],
        other_seconds=took - seconds[-1],
        steps=history.steps[-1],
        seconds=seconds,
        tokens=history.tokens_seen,
        losses=[in_unit(nats) for nats in history.val_losses],
    )


def draw(case: Case, row: dict, path: Path) -> None:
    """Plot the curves of all sides and seeds over seconds and over tokens, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, quantity in zip(axes, ("seconds", "tokens"), strict=True):
        for number, side in enumerate(row["sides"]):
            for outcome in side["runs"]:
                label = f"{side['name']}, rate {side['rate']:g}" if outcome["seed"] == 1 else None
                axis.plot(
                    outcome[quantity][1:], outcome["losses"][1:], color=f"C{number}", label=label
                )
        axis.axhline(case.goal, color="grey", linestyle=":", label=f"goal: {case.goal}")
        axis.set_xlabel("seconds of training" if quantity == "seconds" else "tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"validation loss, {row['unit']}")
    axes[0].legend()
    figure.suptitle(f"{case.name}: {case.text}, tokenizer {case.tokenizer}")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
