"""Fit the law by which MINUTES chooses, and compare its choices with others.

    python -m benchmarks.recipe [--texts A.txt B.txt ...] [--verify] [--rehearse] [--results FILE]

Short runs of the real program on each text: sizes and times, passes through small parts, tokenizers
and seeds. A run's budget is in tokens, those of a reference machine, so that other load changes no
loss. Each result is written at once, and a later call goes on from there. Then the law's numbers
are fitted, and the error for each text by a fit without it: the source of the card's interval.
--verify trains, on texts that the fit has not seen, what the law chooses against what else could be
chosen, and prints the regret. --rehearse does it all with runs of a few steps, in some minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import RESULTS, machine
from engine.console import say, use_utf8
from planning.recipe import (
    COEFFICIENTS,
    Candidates,
    Fixed,
    MachineFacts,
    Recipe,
    choose_recipe,
    expected_bits,
    turning_passes,
)
from storage.cache import usable_cache
from storage.files import write_json
from text.documents import DataSpec
from text.facts import TextFacts, find_facts

REPOSITORY = Path(__file__).resolve().parent.parent
TEXTS = REPOSITORY.parent / "shared" / "data"
FIT_TEXTS = ("tinyshakespeare.txt", "ci.txt")
REFERENCE = MachineFacts("cpu", 6e11, 15e-6, 1e-9, 8 * 10**9)  # two cores with fast bf16
FITTED = ("size", "size_power", "bytes", "bytes_power", "token_share", "repeats", "heart")
FITTED += ("turn_muon", "context")  # shared by all texts; each text's part of "entropy" is free
TRIES, HUBER = 4000, 0.03
SIZES = ((3, 96), (4, 128), (4, 192), (5, 256), (6, 320))
NANOGPT = Fixed(  # its README's run on a CPU, at the same time instead of 2,000 steps
    "char",
    {
        "architecture": "gpt2", "n_layers": 4, "n_heads": 4, "emb_dim": 128, "drop_rate": 0.0,
        "context_length": 64,
    },
    {
        "batch_size": 12, "optimizer": "adamw", "learning_rate": 1e-3, "schedule": "cosine",
        "warmup_steps": 100, "weight_decay": 0.1, "beta2": 0.99, "final_rate": 0.1,
    },
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
        for name in ("char", "bpe:512", "bpe:2048", "bpe:4096"):
            runs.append(Run(text, 1.0, Fixed(name, {}, {})))
        for first_bytes in (100_000, 300_000):
            for minutes in (0.5, 1.5, 4.0):
                for dropout, decay in ((0.0, 0.1), (0.2, 1.0)):
                    fixed = Fixed(None, {"drop_rate": dropout}, {"weight_decay": decay})
                    runs.append(Run(text, minutes, fixed, first_bytes))
        runs += [Run(text, 1.0, Fixed(None, {}, {}), seed=seed) for seed in (2, 3)]
    return runs


def rivals(text: str, facts: TextFacts, minutes: float) -> dict[str, Run]:
    """The law's choice, its neighbors and nanoGPT's recipe, by name."""
    own = choose_recipe(facts, REFERENCE, minutes, Fixed(None, {}, {}))
    model, training = own.model, own.training
    shape = {"n_layers": model["n_layers"], "emb_dim": model["emb_dim"]}
    fixed = {"auto": Fixed(None, {}, {}), "nanoGPT": NANOGPT}
    for layers, width in SIZES:
        if shape != {"n_layers": layers, "emb_dim": width}:
            name = f"{layers} x {width}"
            fixed[name] = Fixed(None, {"n_layers": layers, "emb_dim": width}, {})
    for name in ("char", "bpe:1024", "bpe:4096"):
        if name != own.tokenizer and name in facts.bytes_per_token:
            fixed[name] = Fixed(name, {}, {})
    for name, factor in (("batch x 2", 2.0), ("batch / 2", 0.5)):
        windows = max(1, int(factor * training["batch_size"]))
        fixed[name] = Fixed(own.tokenizer, shape, {"batch_size": windows})
    for name, factor in (("rate x 2", 2.0), ("rate / 2", 0.5)):
        rate = factor * training["learning_rate"]
        fixed[name] = Fixed(own.tokenizer, shape, {"learning_rate": rate})
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
        settings = {
            "DATA": str(path), "TOKENIZER": recipe.tokenizer, "CUSTOM_MODE": True,
            "MODEL": "llama-mini", "custom_params": chosen, "SEED": run.seed, "RUN_NAME": "run",
        }  # fmt: skip
        lines = [f"{key} = {value!r}\n" for key, value in settings.items()]
        (folder / "settings.py").write_text("".join(lines), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "main.py"), "settings.py"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        if done.returncode != 0:
            raise RuntimeError(f"{run} ended with {done.returncode}:\n{done.stdout[-2000:]}")
        summary = json.loads((folder / "runs" / "run" / "summary.json").read_bytes())
    bits = summary["final_val_bits_per_byte"]
    return {"facts": asdict(facts), "recipe": asdict(recipe), "steps": steps, "bits": bits}


def train_all(runs: list[Run], results: dict[str, Any], file: Path, most: int | None) -> None:
    """Train what has no result yet; each result is in the file before the next run begins."""
    for number, run in enumerate(runs, start=1):
        if run.key not in results["runs"]:
            results["runs"][run.key] = train(run, most)
            write_json(file, results)
        found = results["runs"][run.key]
        recipe = Recipe(**found["recipe"])
        say(
            f"{number}/{len(runs)} {run.text} {run.minutes:.3g} min, {recipe.tokenizer}, "
            f"{recipe.model['n_layers']} x {recipe.model['emb_dim']}, {found['steps']} steps: "
            f"{found['bits']:.4f} bits a byte, {recipe.bits_per_byte:.4f} expected"
        )


def predicted(found: dict[str, Any], k: dict[str, float]) -> float:
    """What the law says of a run, with some coefficients."""
    facts, recipe = TextFacts(**found["facts"]), Recipe(**found["recipe"])
    fixed = json.loads(found["key"])["fixed"]
    training, model = recipe.training | fixed["training"], recipe.model
    windows = training["batch_size"] * training["gradient_accumulation_steps"]
    name = recipe.tokenizer
    values = (model["n_layers"], model["emb_dim"], facts.vocabularies[name])
    values += (facts.bytes_per_token[name], model["context_length"], windows)
    c = Candidates([name], *(np.array([[float(value)]]) for value in values))
    dropout, decay = (np.array([[v]]) for v in (model["drop_rate"], training["weight_decay"]))
    turn = turning_passes(facts, c, dropout, decay, k=k)
    return float(expected_bits(facts, c, np.array([[float(found["steps"])]]), turn, k=k)[0, 0])


def fit(runs: list[dict[str, Any]], tries: int) -> tuple[dict[str, float], dict[str, float]]:
    """The coefficients that meet some runs best, and each text's part of "entropy"."""
    generator = np.random.default_rng(0)
    texts = sorted({json.loads(run["key"])["text"] for run in runs})
    values = {name: COEFFICIENTS[name] for name in FITTED} | dict.fromkeys(texts, 1.0)

    def error(values: dict[str, float]) -> float:
        total = 0.0
        for run in runs:
            part = values[json.loads(run["key"])["text"]]
            shared = {name: values[name] for name in FITTED}
            k = COEFFICIENTS | shared | {"entropy": COEFFICIENTS["entropy"] * part}
            off = abs(float(np.log(predicted(run, k) / run["bits"])))
            total += off**2 if off < HUBER else HUBER * (2 * off - HUBER)
        # what the runs can't tell stays where it is
        return total + 1e-3 * sum(np.log(values[n] / COEFFICIENTS[n]) ** 2 for n in FITTED)

    least = error(values)
    for number in range(tries):
        scale = 0.2 * 0.1 ** (number / tries)
        other = {n: v * float(np.exp(scale * generator.normal())) for n, v in values.items()}
        if (found := error(other)) < least:
            values, least = other, found
    return {n: values[n] for n in FITTED}, {text: values[text] for text in texts}


def left_out_errors(runs: list[dict[str, Any]], tries: int) -> dict[str, list[float]]:
    """Each text's relative errors by a fit to the other texts."""
    errors = {}
    for text in sorted({json.loads(run["key"])["text"] for run in runs}):
        own = [run for run in runs if json.loads(run["key"])["text"] == text]
        others = [run for run in runs if run not in own]
        k = COEFFICIENTS | (fit(others, tries)[0] if others else {})
        errors[text] = [round(predicted(run, k) / run["bits"] - 1, 4) for run in own]
    return errors


def main() -> None:
    """Train, fit, write the file; or with --verify print the regret."""
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", nargs="+", default=list(FIT_TEXTS), help="paths, or of shared/")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS / "recipe-cpu.json")
    asked = parser.parse_args()
    about: dict[str, Any] = {"machine": machine(torch.device("cpu")), "runs": {}}
    results = json.loads(asked.results.read_bytes()) if asked.results.is_file() else about
    most, tries = (8, 20) if asked.rehearse else (None, TRIES)
    if asked.verify:
        for text, minutes in ((t, m) for t in asked.texts for m in (1.0, 3.0)):
            named = rivals(text, facts_of(Run(text, minutes, NANOGPT), Path())[0], minutes)
            runs = list(named.values())[:2] if asked.rehearse else list(named.values())
            train_all(runs, results, asked.results, most)
            bits = {n: results["runs"][r.key]["bits"] for n, r in named.items() if r in runs}
            best = min(bits, key=bits.__getitem__)
            regret = bits["auto"] / bits[best] - 1
            say(f"{text} {minutes:g} min: auto {bits['auto']:.4f}, regret {regret:.2%} to {best}")
        return
    runs = fit_runs(asked.texts)
    train_all(runs[:: len(runs) // 3] if asked.rehearse else runs, results, asked.results, most)
    found = [run | {"key": key} for key, run in results["runs"].items()]
    results["coefficients"], results["texts"] = fit(found, tries)
    results["left_out"] = left_out_errors(found, tries)
    write_json(asked.results, results)
    say(json.dumps({n: float(f"{v:.3g}") for n, v in results["coefficients"].items()}))
    say(f"written to {asked.results}")


if __name__ == "__main__":
    main()
