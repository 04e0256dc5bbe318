"""Fit the law by which MINUTES chooses, and compare its choices with others.

    python -m benchmarks.recipe [--texts A.txt B.txt ...] [--workers 2] [--results FILE]
    python -m benchmarks.recipe --only-fit | --rules | --vocabularies | --verify
    python -m benchmarks.recipe --auto 1.67 5 [--seeds 3]

Short runs of the real program: sizes and times, passes through small parts, tokenizers, seeds.
Budgets are in tokens, those of a reference machine, so that other load changes no loss. A later
call goes on from the results that are there. Then the law's numbers are fitted, also without each
text for the error there; --only-fit fits them to what is there already. --rules trains with each
of the recipe's rules and without it, --vocabularies with several vocabularies on code. --verify
trains what the law chooses against what else could be chosen, on texts that the fit has not seen,
and prints the regret. --auto trains its choice alone, for some minutes of the reference machine,
and prints the median of some seeds. --workers trains several models at once, each on one thread.
--rehearse does it with a few steps.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import RESULTS, machine
from engine.console import say, use_utf8
from planning.law import COEFFICIENTS, Candidates, expected_bits, layer_sizes, turning_passes
from planning.recipe import REFERENCE, Fixed, Recipe, choose_recipe
from storage.cache import usable_cache
from storage.files import write_json
from text.documents import DataSpec
from text.facts import TextFacts, find_facts
from training_utils import TrainingConfig

REPOSITORY = RESULTS.parent.parent
TEXTS = REPOSITORY.parent / "shared" / "data"
OF_FIT = ("tinyshakespeare.txt", "ci.txt")
OF_RULES, OF_VERIFYING = (*OF_FIT, "wikitext-2/valid.txt"), ("wikitext-2/valid.txt", "python:email")
OF_CODE = ("python:idlelib", "python:multiprocessing")
# where the fit begins and what PRIOR holds it to: evidence from elsewhere, and a few older runs
START = {
    "size": 22.2,
    "size_power": 0.35,
    "bytes": 112.0,
    "bytes_power": 0.55,
    "token_share": 0.41,
    "repeats": 4.3,
    "heart": 0.02,
    "batch_loss": 0.004,
    "few_steps": 0.02,
    "thin_loss": 0.004,
    "rare_loss": 0.006,
    "split_loss": 0.06,
    "context": 0.01,
    "entropy": 0.7,  # the mean of the texts, of which each has its own
}
FITTED = tuple(START)[:-1]  # shared by all texts
PART_OF = ", its first bytes: "
COVERED = 0.8  # of the runs that a fit has not seen: the share that the interval is to hold
TRIES, HUBER, PRIOR = 30, 0.03, 0.02
SIZES = ((3, 96), (4, 128), (4, 192), (5, 256), (6, 320))
# nanoGPT's run on a CPU by its README, but for the same time in place of 2,000 steps
NANOGPT = Fixed(
    "char",
    {"architecture": "gpt2", "n_layers": 4, "n_heads": 4, "emb_dim": 128, "drop_rate": 0.0,
     "context_length": 64},
    {"batch_size": 12, "optimizer": "adamw", "learning_rate": 1e-3, "schedule": "cosine",
     "warmup_steps": 100, "weight_decay": 0.1, "beta2": 0.99, "final_rate": 0.1},
)  # fmt: skip


OFF_ANCHOR = ((3, 96), (5, 256))  # models of other widths than the rates are set at
PART = 50_000  # bytes that a run of a third of a minute reads several times
# what stood in place of each rule of the recipe, by name: in runs on PART of a text, and on all
OF_PASSES: dict[str, dict[str, Any]] = {
    "weight decay by passes": {"weight_decay": 0.1},
    "dropout by passes": {"drop_rate": 0.0},
    "windows moved each pass": {"shift_windows": False},
    "embeddings decay, too": {"decay_embeddings": False},
}
OF_STEPS: dict[str, dict[str, Any]] = {
    "decay over 55 %": {"decay_share": 0.2},
    "an end at 10 %": {"final_rate": 0.03},
    "beta2 by its half-life": {"beta2": 0.95},
    "warm-up of 3 %": {"warmup_steps": 100},
}


@dataclass(frozen=True)
class Run:
    """A run on a text, or on its first bytes: a recipe of its minutes around what is set.

    A part is read for all the minutes, also where the recipe would end before. changed replaces
    some of the recipe's values and moves no others.
    """

    text: str
    minutes: float  # of REFERENCE
    fixed: Fixed
    first_bytes: int | None = None
    seed: int = 1
    changed: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells a run from others, as JSON."""
        return json.dumps(asdict(self), sort_keys=True)


def fit_runs(texts: Iterable[str]) -> list[Run]:
    """The runs that the law is fitted to, the most telling first, text by text in turn."""
    free, short = Fixed(None, {}, {}), 1 / 3
    shapes = [Fixed(None, {"n_layers": layers, "emb_dim": width}, {}) for layers, width in SIZES]
    parts = [
        (minutes, n_bytes, Fixed(None, {"drop_rate": dropout}, {"weight_decay": decay}))
        for minutes, n_bytes in ((short, 30_000), (2 / 3, 30_000), (2 / 3, 120_000))
        for dropout, decay in ((0.0, 0.1), (0.2, 1.0))
    ]
    # with the recipe's own dropout and decay, past the pass from which a model learns by heart
    parts += [(1.0, 120_000, shapes[1]), (1.0, 120_000, shapes[3]), (2.0, 120_000, shapes[1])]
    of_text = [
        *((short, None, shape, 1) for shape in shapes),
        *((minutes, n_bytes, fixed, 1) for minutes, n_bytes, fixed in parts),
        *((1.0, None, shape, 1) for shape in shapes[::2]),
        *((short, None, Fixed(f"bpe:{n}", {}, {}), 1) for n in (512, 2048, 4096)),
        *((1.0, None, shape, 1) for shape in shapes[1::2]),
        *((short, None, free, seed) for seed in (1, 2, 3)),
        *((3.0, None, shape, 1) for shape in shapes[2:]),
    ]
    return [
        Run(text, minutes, fixed, n_bytes, seed)
        for minutes, n_bytes, fixed, seed in of_text
        for text in texts
    ]


def rule_runs(text: str, seeds: Iterable[int]) -> dict[str, list[tuple[Run, Run]]]:
    """By the names of the recipe's rules, a run with each and one without it for each seed."""
    runs: dict[str, list[tuple[Run, Run]]] = {}
    for seed in seeds:
        own = Run(text, 1 / 3, Fixed(None, {}, {}), seed=seed)
        facts = facts_of(own, Path())[0]
        pairs: dict[str, tuple[Run, dict[str, Any]]] = {}
        for layers, width in OFF_ANCHOR:
            fixed = Fixed(None, {"n_layers": layers, "emb_dim": width}, {})
            rate = choose_recipe(facts, REFERENCE, 1 / 3, fixed).training["embedding_rate"]
            changed = {"learning_rate": rate}
            pairs[f"rate by width, at {width}"] = replace(own, fixed=fixed), changed
        pairs |= {name: (own, changed) for name, changed in OF_STEPS.items()}
        part = replace(own, first_bytes=PART)
        pairs |= {name: (part, changed) for name, changed in OF_PASSES.items()}
        for name, (run, changed) in pairs.items():
            runs.setdefault(name, []).append((run, replace(run, changed=changed)))
    return runs


def vocabulary_runs(text: str) -> list[Run]:
    """Runs of a third of a minute with vocabularies of several sizes."""
    return [Run(text, 1 / 3, Fixed(f"bpe:{n}", {}, {})) for n in (512, 1024, 2048, 4096)]


def by_hand(facts: TextFacts) -> Fixed:
    """The recipe of docs/recipes.md for a text; what it leaves open is as in TrainingConfig."""
    usual = ("decay_share", "final_rate", "beta2", "shift_windows", "decay_embeddings")
    training = {name: getattr(TrainingConfig(), name) for name in usual}
    training |= {"optimizer": "muon", "schedule": "wsd", "batch_size": 16, "weight_decay": 0.1}
    layers, context, dropout, rate, tokenizer = 6, 256, 0.0, 6e-3, "char"
    if facts.bytes_per_character > 1.2:
        layers, context, dropout, rate, tokenizer = 4, 128, 0.1, 1.2e-2, "bpe:4096"
    model = {"n_layers": layers, "emb_dim": 192, "context_length": context, "drop_rate": dropout}
    return Fixed(tokenizer, model, training | {"learning_rate": rate, "embedding_rate": rate})


def rivals(text: str, facts: TextFacts, minutes: float) -> dict[str, Run]:
    """The law's choice, its neighbors, and the recipes of nanoGPT and of the docs, by name."""
    own = choose_recipe(facts, REFERENCE, minutes, Fixed(None, {}, {}))
    shape = {name: own.model[name] for name in ("n_layers", "emb_dim")}
    shapes = [{"n_layers": layers, "emb_dim": width} for layers, width in SIZES]
    shapes = sorted((other for other in shapes if other != shape), key=partial(_apart, shape))[:2]
    names = {"char", "bpe:1024", "bpe:4096"} & facts.bytes_per_token.keys() - {own.tokenizer}
    fixed = {"auto": Fixed(None, {}, {}), "nanoGPT": NANOGPT, "docs/recipes.md": by_hand(facts)}
    fixed |= {str(other): Fixed(None, other, {}) for other in shapes}
    fixed |= {name: Fixed(name, {}, {}) for name in sorted(names)}
    for factor in (2.0, 0.5):
        windows = max(1, int(factor * own.training["batch_size"]))
        rate = factor * own.training["learning_rate"]
        fixed[f"batch x {factor}"] = Fixed(own.tokenizer, shape, {"batch_size": windows})
        fixed[f"rate x {factor}"] = Fixed(own.tokenizer, shape, {"learning_rate": rate})
    return {name: Run(text, minutes, values) for name, values in fixed.items()}


def _apart(one: dict[str, int], other: dict[str, int]) -> float:
    """How far apart the numbers of two shapes' weights are, as a logarithm."""
    sizes = [shape["n_layers"] * shape["emb_dim"] ** 2 for shape in (one, other)]
    return abs(math.log(sizes[0] / sizes[1]))


def _path_of(text: str) -> Path:
    """A file of TEXTS, or the folder of one of Python's packages by "python:" and its name."""
    package = text.removeprefix("python:")
    return TEXTS / text if package == text else Path(sysconfig.get_path("stdlib")) / package


def facts_of(run: Run, folder: Path) -> tuple[TextFacts, Path]:
    """The facts of a run's text, and the file to train on."""
    path = _path_of(run.text)
    if run.first_bytes is not None:
        content = path.read_bytes()[: run.first_bytes].decode("utf-8", "ignore")
        path = folder / path.name
        path.write_text(content, encoding="utf-8")
    return find_facts(DataSpec(train=(str(path),)), 0.9, usable_cache()), path


def train(run: Run, most_steps: int | None, workers: int) -> dict[str, Any]:
    """Train as the program does; its recipe, steps and final bits a byte."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts, path = facts_of(run, folder)
        recipe = choose_recipe(facts, REFERENCE, run.minutes, run.fixed)
        steps = recipe.steps
        if run.first_bytes is not None:
            steps = round(steps * run.minutes / recipe.minutes)
        steps = min(steps, most_steps or steps)
        chosen = {**recipe.training, **run.fixed.training, "max_steps": steps}
        model = {n: v for n, v in recipe.model.items() if n != "context_length"}
        model |= {name: value for name, value in run.changed.items() if name in model}
        chosen |= {name: value for name, value in run.changed.items() if name not in model}
        chosen["warmup_steps"] = min(chosen["warmup_steps"], steps // 4)
        chosen |= {"max_length": recipe.model["context_length"], "model_overrides": model}
        settings = (
            f"DATA, TOKENIZER, SEED = {str(path)!r}, {recipe.tokenizer!r}, {run.seed}\n"
            f"CUSTOM_MODE, MODEL, RUN_NAME = True, 'llama-mini', 'run'\ncustom_params = {chosen!r}"
        )
        (folder / "settings.py").write_text(settings, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "main.py"), "settings.py"],
            cwd=folder,
            env=os.environ | ({"OMP_NUM_THREADS": "1"} if workers > 1 else {}),
            capture_output=True,
            encoding="utf-8",
        )
        if done.returncode != 0:
            raise RuntimeError(f"{run} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        summary = json.loads((folder / "runs" / "run" / "summary.json").read_bytes())
    found = {"facts": asdict(facts), "recipe": asdict(recipe), "steps": steps}
    return found | {"bits": summary["final_val_bits_per_byte"]}


def train_all(
    runs: Iterable[Run], results: dict[str, Any], file: Path, most: int | None, workers: int
) -> None:
    """Train what has no result of today's recipe; each is in the file as soon as it is there."""
    missing = {}
    for run in runs:
        if (known := _known(run, results["runs"])) is None:
            missing[run.key] = run
        else:
            results["runs"][run.key] = known
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(train, run, most, workers): run for run in missing.values()}
        try:
            for number, done in enumerate(concurrent.futures.as_completed(waiting), start=1):
                run = waiting[done]
                results["runs"][run.key] = found = done.result()
                write_json(file, results)
                told = f"{found['bits']:.4f} bits a byte, {found['recipe']['bits_per_byte']:.4f}"
                of = f"{number}/{len(waiting)} {run.text} {run.first_bytes or 'all'}"
                say(f"{of} {run.minutes:.3g} min, {run.fixed} {run.changed}: {told} expected")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _known(run: Run, runs: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a run with the recipe that is chosen today, or of one that trains the same."""
    wanted: dict[str, Any] = {"fixed": run.fixed}
    if run.first_bytes is None:  # a part is read for all the minutes
        wanted["minutes"] = run.minutes
    alike = [
        (json.loads(key), runs[key])
        for key in sorted(runs, key=lambda key: key != run.key)  # its own first
        if Run(**json.loads(key) | wanted) == run
    ]
    if not alike:
        return None
    facts = TextFacts(**alike[0][1]["facts"])
    own = _trained(choose_recipe(facts, REFERENCE, run.minutes, run.fixed), run.fixed.training)
    for other, found in alike:
        if _trained(Recipe(**found["recipe"]), other["fixed"]["training"]) == own:
            return found
    return None


def _trained(recipe: Recipe, fixed: dict[str, Any]) -> tuple[Any, ...]:
    """What a run with a recipe, and some of its training set, trains."""
    return recipe.tokenizer, recipe.model, recipe.training | fixed, recipe.steps


def predicted(found: dict[str, Any], k: dict[str, float]) -> float:
    """What the law says of a run, with some coefficients."""
    facts, recipe = TextFacts(**found["facts"]), Recipe(**found["recipe"])
    run = json.loads(found["key"])
    model = recipe.model
    training = recipe.training | run["fixed"]["training"]
    name, rate = recipe.tokenizer, facts.bytes_per_token[recipe.tokenizer]
    windows = training["batch_size"] * training["gradient_accumulation_steps"]
    shape = [model["n_layers"], model["emb_dim"], *layer_sizes(model["emb_dim"], model)]
    shape += [facts.vocabularies[name], rate, model["context_length"], windows]
    c = Candidates([name], *(np.array([[float(value)]]) for value in shape))
    dropout, decay = (np.array([[v]]) for v in (model["drop_rate"], training["weight_decay"]))
    is_adamw, is_gpt2 = training["optimizer"] == "adamw", model["architecture"] == "gpt2"
    steps = np.array([[float(found["steps"])]])
    turn = turning_passes(facts, c, dropout, decay, is_adamw=is_adamw, k=k)
    bits = expected_bits(facts, c, steps, turn, is_adamw=is_adamw, is_gpt2=is_gpt2, k=k)
    return float(bits[0, 0])


def text_of(found: dict[str, Any]) -> str:
    """The text of a run; a part is one of its own, which validates on other sentences."""
    run = json.loads(found["key"])
    return f"{run['text']}{PART_OF}{run['first_bytes']}" if run["first_bytes"] else run["text"]


def fit(runs: list[dict[str, Any]], tries: int) -> tuple[dict[str, float], dict[str, float]]:
    """The coefficients that meet some runs best, by Levenberg and Marquardt's method with Huber's
    weights on the logarithms; and each text's "entropy", of which the first have the mean."""
    texts = sorted({text_of(run) for run in runs})
    places = [len(FITTED) + texts.index(text_of(run)) for run in runs]

    def coefficients(logs: np.ndarray, place: int) -> dict[str, float]:
        own = {n: START[n] * float(np.exp(logs[i])) for i, n in enumerate(FITTED)}
        return COEFFICIENTS | own | {"entropy": START["entropy"] * float(np.exp(logs[place]))}

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
    of_texts = logs[len(FITTED) :]
    wholes = [log for text, log in zip(texts, of_texts, strict=True) if PART_OF not in text]
    mean = coefficients(np.append(logs, np.mean(wholes or of_texts)), len(logs))
    own = {texts[i]: coefficients(logs, len(FITTED) + i)["entropy"] for i in range(len(texts))}
    return {name: mean[name] for name in START}, own


def left_out_errors(runs: list[dict[str, Any]], tries: int) -> dict[str, list[float]]:
    """Each text's relative errors by a fit to the other texts."""
    texts, errors = [json.loads(run["key"])["text"] for run in runs], {}
    for text in sorted(set(texts)):
        own = [run for run, its in zip(runs, texts, strict=True) if its == text]
        others = [run for run, its in zip(runs, texts, strict=True) if its != text]
        k = COEFFICIENTS | (fit(others, tries)[0] if others else {})
        errors[text] = [round(predicted(run, k) / run["bits"] - 1, 4) for run in own]
    return errors


def covering(errors: Iterable[float]) -> float:
    """Half of the interval that holds COVERED of some relative errors."""
    return float(np.quantile(np.abs(list(errors)), COVERED))


def say_errors(left_out: dict[str, list[float]]) -> None:
    """Say how far off each text is by a fit to the others, and how often it is in the interval
    that the others' errors give."""
    for text, errors in left_out.items():
        others = [error for other in left_out if other != text for error in left_out[other]]
        within = covering(others or errors)
        share = np.mean(np.abs(errors) <= within)
        say(
            f"{text}: {len(errors)} runs, off by {np.median(np.abs(errors)):.1%} in the median; "
            f"{share:.0%} within {within:.1%}, which holds {COVERED:.0%} of the other texts' runs"
        )


def verify(
    text: str, train_some: Callable[[Iterable[Run]], None], bits: Callable[[Run], float], few: bool
) -> None:
    """Train what the law chooses and its rivals for one and three minutes, the best with three
    seeds, and for ten minutes the best of three; prints each regret, and its standard error where
    there are several seeds."""
    winner = Fixed(None, {}, {})
    facts = facts_of(Run(text, 1.0, NANOGPT), Path())[0]
    for minutes in (1.0, 3.0, 10.0):
        if minutes < 10:
            named = rivals(text, facts, minutes)
            named = dict(list(named.items())[: 2 if few else None])
        else:
            fixed = {"auto": Fixed(None, {}, {}), "the best of 3 min": winner}
            named = {name: Run(text, minutes, values) for name, values in fixed.items()}
        seeds = (1,) if few or minutes == 10 else (1, 2, 3)
        train_some(named.values())
        say(f"{text} {minutes:g} min: { ({name: bits(run) for name, run in named.items()}) }")
        best = sorted(named.keys() - {"auto"}, key=lambda name: bits(named[name]))[:2]
        of_seeds = {n: [replace(named[n], seed=seed) for seed in seeds] for n in ("auto", *best)}
        train_some(run for runs in of_seeds.values() for run in runs)
        reached = {name: [bits(run) for run in runs] for name, runs in of_seeds.items()}
        first = min(reached, key=lambda name: statistics.mean(reached[name]))
        regret = statistics.mean(reached["auto"]) / statistics.mean(reached[first]) - 1
        told = f"{text} {minutes:g} min: regret {regret:.2%}"
        if len(seeds) > 1:
            spread = math.hypot(*(statistics.stdev(reached[name]) for name in ("auto", first)))
            told += f" +- {spread / len(seeds) ** 0.5 / statistics.mean(reached[first]):.2%}"
        say(f"{told} against {first}")
        winner = named[first].fixed


def gains_of_rules(
    texts: Iterable[str], seeds: range, bits: Callable[[Run], float]
) -> dict[str, dict[str, list[float]]]:
    """By text and rule, what the rule gains with each seed; says the means and standard errors."""
    gains: dict[str, dict[str, list[float]]] = {}
    for text in texts:
        for name, pairs in rule_runs(text, seeds).items():
            own = [bits(without) / bits(run) - 1 for run, without in pairs]
            gains.setdefault(text, {})[name] = [round(gain, 5) for gain in own]
            error = statistics.stdev(own) / len(own) ** 0.5 if len(own) > 1 else math.nan
            say(f"{text} {name}: gains {statistics.mean(own):+.2%} +- {error:.2%}")
    return gains


def main() -> None:
    """Train, and fit and write the file or print what was asked for."""
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", nargs="+", help='files, or "python:" and a package\'s name')
    for name in ("--rules", "--vocabularies", "--verify", "--only-fit", "--rehearse"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--auto", nargs="+", type=float, metavar="MINUTES", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS / "recipe-cpu.json")
    asked = parser.parse_args()
    usual = OF_RULES if asked.rules else OF_VERIFYING if asked.verify else OF_FIT
    usual = OF_CODE if asked.vocabularies else usual
    texts = asked.texts or usual
    results: dict[str, Any] = {"machine": machine(torch.device("cpu")), "runs": {}}
    results |= json.loads(asked.results.read_bytes()) if asked.results.is_file() else {}
    most, tries = (8, 2) if asked.rehearse else (None, TRIES)
    seeds = range(1, asked.seeds + 1)

    def train_some(runs: Iterable[Run]) -> None:
        train_all(runs, results, asked.results, most, asked.workers)

    def bits(run: Run) -> float:
        return results["runs"][run.key]["bits"]

    if asked.auto:
        autos = [Run(t, m, Fixed(None, {}, {})) for t in texts for m in asked.auto]
        train_some(replace(auto, seed=seed) for auto in autos for seed in seeds)
        for auto in autos:
            median = statistics.median(bits(replace(auto, seed=seed)) for seed in seeds)
            say(f"{auto.text} {auto.minutes:g} min: {median:.4f} bits a byte, {len(seeds)} seeds")
    elif asked.rules:
        of_rules = [pairs for text in texts for pairs in rule_runs(text, seeds).values()]
        train_some(run for pairs in zip(*of_rules, strict=True) for pair in pairs for run in pair)
        results["gains"] = gains_of_rules(texts, seeds, bits)
        write_json(asked.results, results)
    elif asked.vocabularies:
        of_text = [vocabulary_runs(text) for text in texts]
        train_some(run for runs in of_text for run in runs)
        for run in itertools.chain.from_iterable(of_text):
            found = results["runs"][run.key] | {"key": run.key}
            expected = predicted(found, COEFFICIENTS)
            say(f"{run.text} {run.fixed.tokenizer}: {bits(run):.4f}, {expected:.4f} expected")
    elif asked.verify:
        for text in texts:
            verify(text, train_some, bits, asked.rehearse)
    else:
        if not asked.only_fit:
            runs = fit_runs(texts)
            train_some(runs[:1] if asked.rehearse else runs)
        own = [run | {"key": key} for key, run in results["runs"].items()]
        own = [run for run in own if _is_of_law(json.loads(run["key"]), texts)]
        results["coefficients"], results["texts"] = fit(own, tries)
        results["left_out"] = left_out_errors(own, tries)
        every = itertools.chain.from_iterable(results["left_out"].values())
        results["coefficients"]["interval"] = covering(every)
        write_json(asked.results, results)
        say(json.dumps(results["coefficients"]))
        say_errors(results["left_out"])


def _is_of_law(run: dict[str, Any], texts: Iterable[str]) -> bool:
    """Whether a run tells about the law: one of the recipe's own on a text of the fit."""
    return (
        run["text"] in texts and not run["changed"] and "optimizer" not in run["fixed"]["training"]
    )


if __name__ == "__main__":
    main()
