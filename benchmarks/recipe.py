"""Fit the law by which MINUTES chooses, and compare its choices with others.

    python -m benchmarks.recipe [--texts A.txt B.txt ...] [--verify] [--rehearse] [--results FILE]
    python -m benchmarks.recipe --auto 1.67 5 [--seeds 3]

Short runs of the real program: sizes and times, passes through small parts, tokenizers, seeds.
Budgets are in tokens, those of a reference machine, so that other load changes no loss. A later
call goes on from the results that are there. Then the law's numbers are fitted, also without each
text for the error there. --verify trains what the law chooses against what else could be chosen,
on texts that the fit has not seen, and prints the regret. --auto trains its choice alone, for some
minutes of the reference machine, and prints the median of some seeds. --rehearse does it with a few
steps.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import RESULTS, machine
from engine.console import say, use_utf8
from planning.recipe import (
    COEFFICIENTS,
    REFERENCE,
    Candidates,
    Fixed,
    Recipe,
    choose_recipe,
    expected_bits,
    turning_passes,
)
from storage.cache import usable_cache
from storage.files import write_json
from text.documents import DataSpec
from text.facts import TextFacts, find_facts

REPOSITORY = RESULTS.parent.parent
TEXTS = REPOSITORY.parent / "shared" / "data"
# shared by all texts; each text's part of "entropy" is free
FITTED = (*tuple(COEFFICIENTS)[:7], "turn_muon", "context")
TRIES, HUBER, PRIOR = 30, 0.03, 0.01
SIZES = ((3, 96), (4, 128), (4, 192), (5, 256), (6, 320))
# nanoGPT's run on a CPU by its README, but for the same time in place of 2,000 steps
NANOGPT = Fixed(
    "char",
    {"architecture": "gpt2", "n_layers": 4, "n_heads": 4, "emb_dim": 128, "drop_rate": 0.0,
     "context_length": 64},
    {"batch_size": 12, "optimizer": "adamw", "learning_rate": 1e-3, "schedule": "cosine",
     "warmup_steps": 100, "weight_decay": 0.1, "beta2": 0.99, "final_rate": 0.1},
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run on a text, or on its first bytes: a recipe of its minutes around what is set."""

    text: str
    minutes: float  # of REFERENCE
    fixed: Fixed
    first_bytes: int | None = None
    seed: int = 1

    @property
    def key(self) -> str:
        """What tells a run from others, as JSON."""
        return json.dumps(asdict(self), sort_keys=True)


def fit_runs(texts: Iterable[str]) -> list[Run]:
    """The runs that the law is fitted to, the most telling first."""
    runs = []
    for text in texts:
        for layers, width in SIZES:
            shape = Fixed(None, {"n_layers": layers, "emb_dim": width}, {})
            runs += [Run(text, minutes, shape) for minutes in (1 / 3, 1.0, 3.0)]
        runs += [Run(text, 1.0, Fixed(f"bpe:{n}", {}, {})) for n in (512, 2048, 4096)]
        for dropout, decay in ((0.0, 0.1), (0.2, 1.0)):
            fixed = Fixed(None, {"drop_rate": dropout}, {"weight_decay": decay})
            parts = itertools.product((0.5, 1.5, 4.0), (100_000, 300_000))
            runs += [Run(text, minutes, fixed, first_bytes) for minutes, first_bytes in parts]
        runs += [Run(text, 1.0, Fixed(None, {}, {}), seed=seed) for seed in (2, 3)]
    return runs


def rivals(text: str, facts: TextFacts, minutes: float) -> dict[str, Run]:
    """The law's choice, its neighbors and nanoGPT's recipe, by name."""
    own = choose_recipe(facts, REFERENCE, minutes, Fixed(None, {}, {}))
    shape = {name: own.model[name] for name in ("n_layers", "emb_dim")}
    shapes = [{"n_layers": layers, "emb_dim": width} for layers, width in SIZES]
    names = {"char", "bpe:1024", "bpe:4096"} & facts.bytes_per_token.keys() - {own.tokenizer}
    fixed = {"auto": Fixed(None, {}, {}), "nanoGPT": NANOGPT}
    fixed |= {str(other): Fixed(None, other, {}) for other in shapes if other != shape}
    fixed |= {name: Fixed(name, {}, {}) for name in sorted(names)}
    for factor in (2.0, 0.5):
        windows = max(1, int(factor * own.training["batch_size"]))
        rate = factor * own.training["learning_rate"]
        fixed[f"batch x {factor}"] = Fixed(own.tokenizer, shape, {"batch_size": windows})
        fixed[f"rate x {factor}"] = Fixed(own.tokenizer, shape, {"learning_rate": rate})
    return {name: Run(text, minutes, values) for name, values in fixed.items()}


def facts_of(run: Run, folder: Path) -> tuple[TextFacts, Path]:
    """The facts of a run's text, and the file to train on."""
    path = TEXTS / run.text
    if run.first_bytes is not None:
        content = path.read_bytes()[: run.first_bytes].decode("utf-8", "ignore")
        path = folder / path.name
        path.write_text(content, encoding="utf-8")
    return find_facts(DataSpec(train=(str(path),)), 0.9, usable_cache()), path


def train(run: Run, most_steps: int | None) -> dict[str, Any]:
    """Train as the program does; its recipe, steps and final bits a byte."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts, path = facts_of(run, folder)
        recipe = choose_recipe(facts, REFERENCE, run.minutes, run.fixed)
        steps = min(recipe.steps, most_steps or recipe.steps)
        chosen = {**recipe.training, **run.fixed.training, "max_steps": steps}
        chosen["warmup_steps"] = min(chosen["warmup_steps"], steps // 4)
        model = {n: v for n, v in recipe.model.items() if n != "context_length"}
        chosen |= {"max_length": recipe.model["context_length"], "model_overrides": model}
        settings = (
            f"DATA, TOKENIZER, SEED = {str(path)!r}, {recipe.tokenizer!r}, {run.seed}\n"
            f"CUSTOM_MODE, MODEL, RUN_NAME = True, 'llama-mini', 'run'\ncustom_params = {chosen!r}"
        )
        (folder / "settings.py").write_text(settings, encoding="utf-8")
        command = [sys.executable, str(REPOSITORY / "main.py"), "settings.py"]
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
        if done.returncode != 0:
            raise RuntimeError(f"{run} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        summary = json.loads((folder / "runs" / "run" / "summary.json").read_bytes())
    found = {"facts": asdict(facts), "recipe": asdict(recipe), "steps": steps}
    return found | {"bits": summary["final_val_bits_per_byte"]}


def train_all(runs: list[Run], results: dict[str, Any], file: Path, most: int | None) -> None:
    """Train what has no result yet; each result is in the file before the next run begins."""
    for number, run in enumerate(runs, start=1):
        if run.key not in results["runs"]:
            results["runs"][run.key] = train(run, most)
            write_json(file, results)
        found = results["runs"][run.key]
        told = f"{found['bits']:.4f} bits a byte, {found['recipe']['bits_per_byte']:.4f} expected"
        say(f"{number}/{len(runs)} {run.text} {run.minutes:.3g} min, {run.fixed}: {told}")


def predicted(found: dict[str, Any], k: dict[str, float]) -> float:
    """What the law says of a run, with some coefficients."""
    facts, recipe = TextFacts(**found["facts"]), Recipe(**found["recipe"])
    model, fixed = recipe.model, json.loads(found["key"])["fixed"]
    training = recipe.training | fixed["training"]
    name, rate = recipe.tokenizer, facts.bytes_per_token[recipe.tokenizer]
    windows = training["batch_size"] * training["gradient_accumulation_steps"]
    shape = [model["n_layers"], model["emb_dim"], facts.vocabularies[name], rate]
    shape += [model["context_length"], windows]
    c = Candidates([name], *(np.array([[float(value)]]) for value in shape))
    dropout, decay = (np.array([[v]]) for v in (model["drop_rate"], training["weight_decay"]))
    turn = turning_passes(facts, c, dropout, decay, k=k)
    return float(expected_bits(facts, c, np.array([[float(found["steps"])]]), turn, k=k)[0, 0])


def fit(runs: list[dict[str, Any]], tries: int) -> tuple[dict[str, float], dict[str, float]]:
    """The coefficients that meet some runs best, by Levenberg and Marquardt's method with Huber's
    weights on the logarithms; and each text's part of "entropy"."""
    texts = sorted({json.loads(run["key"])["text"] for run in runs})
    places = [len(FITTED) + texts.index(json.loads(run["key"])["text"]) for run in runs]

    def coefficients(logs: np.ndarray, place: int) -> dict[str, float]:
        own = {n: COEFFICIENTS[n] * float(np.exp(logs[i])) for i, n in enumerate(FITTED)}
        return COEFFICIENTS | own | {"entropy": COEFFICIENTS["entropy"] * np.exp(logs[place])}

    def residuals(logs: np.ndarray) -> np.ndarray:
        found = zip(runs, places, strict=True)
        off = [np.log(predicted(run, coefficients(logs, at)) / run["bits"]) for run, at in found]
        weights = np.sqrt(np.minimum(1, HUBER / np.maximum(np.abs(off), 1e-9)))
        return np.concatenate([weights * off, PRIOR * logs])  # what runs can't tell stays

    logs, damping = np.zeros(len(FITTED) + len(texts)), 1e-3
    now = residuals(logs)
    for _ in range(tries):
        moved = [residuals(logs + 1e-4 * row) for row in np.eye(len(logs))]
        slopes = (np.array(moved).T - now[:, None]) / 1e-4
        normal = slopes.T @ slopes + damping * np.eye(len(logs))
        other = logs - np.clip(np.linalg.solve(normal, slopes.T @ now), -0.5, 0.5)
        better = (after := residuals(other)) @ after < now @ now
        logs, now = (other, after) if better else (logs, now)
        damping *= 0.3 if better else 5
    shared = {n: v for n, v in coefficients(logs, 0).items() if n in FITTED}
    return shared, {text: float(np.exp(logs[len(FITTED) + i])) for i, text in enumerate(texts)}


def left_out_errors(runs: list[dict[str, Any]], tries: int) -> dict[str, list[float]]:
    """Each text's relative errors by a fit to the other texts."""
    texts, errors = [json.loads(run["key"])["text"] for run in runs], {}
    for text in sorted(set(texts)):
        own = [run for run, its in zip(runs, texts, strict=True) if its == text]
        others = [run for run, its in zip(runs, texts, strict=True) if its != text]
        k = COEFFICIENTS | (fit(others, tries)[0] if others else {})
        errors[text] = [round(predicted(run, k) / run["bits"] - 1, 4) for run in own]
    return errors


def main() -> None:
    """Train, fit and write the file, or print the regret."""
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", nargs="+", default=["tinyshakespeare.txt", "ci.txt"])
    for name in ("--verify", "--rehearse"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--auto", nargs="+", type=float, metavar="MINUTES", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "recipe-cpu.json")
    asked = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(torch.device("cpu")), "runs": {}}
    results |= json.loads(asked.results.read_bytes()) if asked.results.is_file() else {}
    most, tries = (8, 2) if asked.rehearse else (None, TRIES)
    if asked.auto:
        for text, minutes in itertools.product(asked.texts, asked.auto):
            auto = Run(text, minutes, Fixed(None, {}, {}))
            runs = [replace(auto, seed=seed) for seed in range(1, asked.seeds + 1)]
            train_all(runs, results, asked.results, most)
            median = statistics.median(results["runs"][run.key]["bits"] for run in runs)
            say(f"{text} {minutes:g} min: {median:.4f} bits a byte, median of {len(runs)} seeds")
        return
    if asked.verify:
        for text, minutes in ((t, m) for t in asked.texts for m in (1.0, 3.0)):
            named = rivals(text, facts_of(Run(text, minutes, NANOGPT), Path())[0], minutes)
            runs = list(named.values())[: 2 if asked.rehearse else None]
            train_all(runs, results, asked.results, most)
            bits = {n: results["runs"][r.key]["bits"] for n, r in named.items() if r in runs}
            regret = bits["auto"] / min(bits.values()) - 1
            say(f"{text} {minutes:g} min: {bits}, regret {regret:.2%}")
        return
    runs = fit_runs(asked.texts)
    runs = [runs[0], runs[-1]] if asked.rehearse else runs
    train_all(runs, results, asked.results, most)
    found = [run | {"key": key} for key, run in results["runs"].items()]
    results["coefficients"], results["texts"] = fit(found, tries)
    results["left_out"] = left_out_errors(found, tries)
    write_json(asked.results, results)
    say(json.dumps(results["coefficients"]))


if __name__ == "__main__":
    main()
