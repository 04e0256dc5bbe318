"""Training the 124M model, compared with transformers' Trainer and litgpt: speed, loss and memory.

Run by python -m benchmarks.train --peers (both) or --memory (memory alone).

The peers have their own environment, cache/peers-venv, made from requirements-peers.txt and
requirements-peers-no-deps.txt.
Each contender is a process that trains on the same tokens in the same shapes with the same
optimizer settings; they take turns. transformers starts from our weights, and its row is void if
its losses at steps 1, 10 and 50 differ from ours. litgpt trains its closest model, so it is
compared in 6N + 12LHDT a second, and its loss must fall.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.peer_job import Job
from benchmarks.report import machine, write_results
from benchmarks.steps import fresh_model, multiply_rate, own_products_rate
from engine.console import say
from engine.precision import DTYPES, choose_precision
from environment import pick_device, usable_cache
from exchange.huggingface import their_settings, their_tensors
from model import GPTConfig, GPTModel
from planning.plan import MODELS_FILE, read_models
from storage.checkpoint import safetensors_chunks, weights_of
from storage.files import NewFile, write_atomically, write_json
from text.tokenizer import GPT2Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = Path(__file__).resolve().parent / "requirements-peers.txt"
WITHOUT_DEPENDENCIES = REQUIREMENTS.with_name("requirements-peers-no-deps.txt")
TEXTS = tuple(REPOSITORY / "corpus" / name for name in ("sample-en.txt", "sample-zh.txt"))
LOSS_STEPS = (1, 10, 50)
LOSS_TOLERANCE = 2e-2
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Contender:
    """A row: the module that trains, its precision, and the check of its losses."""

    name: str
    module: str
    precision: str = "auto"
    starts_from_our_weights: bool = True


OURS = Contender("ours", "benchmarks.peer_ours")
# the reference for losses in fp32, since bf16's error is as large as the tolerance
OURS_FP32 = Contender("ours-fp32", "benchmarks.peer_ours", "fp32")
PEERS = (
    Contender("transformers", "benchmarks.peer_transformers", "fp32"),
    Contender("transformers-bf16", "benchmarks.peer_transformers", "bf16"),
    Contender("litgpt", "benchmarks.peer_litgpt", starts_from_our_weights=False),
)
MEMORY_PEER = PEERS[1]


@dataclass(frozen=True)
class Race:
    """The model, the batch and the steps of all contenders."""

    config: GPTConfig
    batch_size: int
    rounds: int = 3
    steps: int = 8  # in a round
    warm_up: int = 3  # of them, not timed
    checked_steps: int = LOSS_STEPS[-1]  # in the run that checks the losses


def main(rounds: int, only: list[str] | None) -> None:
    """Compare the speed in `rounds` rounds (0: skip it), then the memory; write the results.

    only names the contenders to run besides ours, None for all.
    """
    known = [peer.name for peer in PEERS]
    if unknown := [name for name in only or () if name not in known]:
        sys.exit(f"unknown: {', '.join(unknown)}; known are: {', '.join(known)}")
    peers = [peer for peer in PEERS if only is None or peer.name in only]
    device = pick_device(None)
    models, _ = read_models(MODELS_FILE)
    shape = models["gpt2-124m"] | {"vocab_size": GPT2Tokenizer().vocab_size, "drop_rate": 0.0}
    if rounds > 0:
        race = Race(GPTConfig(**shape | {"context_length": 256}), batch_size=4, rounds=rounds)
        with tempfile.TemporaryDirectory() as folder:
            results = compare_speed(race, peers, device, Path(folder))
        results = {"machine": machine(device)} | results
        say(f"written to {write_results('peers', device, results)}")
    if MEMORY_PEER in peers:
        # two steps, since the optimizer allocates its moments in the first
        race = Race(GPTConfig(**shape | {"context_length": 1024}), batch_size=8, steps=2)
        with tempfile.TemporaryDirectory() as folder:
            results = compare_memory(race, device, Path(folder))
        results = {"machine": machine(device)} | results
        say(f"written to {write_results('peers-memory', device, results)}")


def compare_speed(race: Race, peers: list[Contender], device: torch.device, folder: Path) -> dict:
    """Run every contender once for its losses and then in rounds; print and return the rows."""
    contenders = [OURS, *peers]
    write_inputs(race, folder)
    checks = {}
    needs_fp32 = any(peer.precision == "fp32" for peer in peers)
    for contender in [*contenders, OURS_FP32] if needs_fp32 else contenders:
        say(f"{contender.name}: losses of {race.checked_steps} steps")
        checks[contender.name] = run(contender, race, race.checked_steps, device, folder, True)
    reports: dict[str, list[dict]] = {contender.name: [] for contender in contenders}
    calibrations, loads = [], []
    for number in range(race.rounds):
        loads.append(os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
        calibrations.append(calibrate(race, device))
        say(f"round {number + 1} of {race.rounds}")
        for contender in contenders:
            if "failed" not in checks[contender.name]:
                done = run(contender, race, race.steps, device, folder, False)
                reports[contender.name].append(done)
    rates = {
        name: statistics.median(rates[name] for rates in calibrations) for name in calibrations[0]
    }
    rows = [make_row(contender, race, checks, reports, rates) for contender in contenders]
    print_rows(rows, rates)
    return {
        "batch": [race.batch_size, race.config.context_length],
        "rounds": race.rounds,
        "rates": rates,
        "load_averages": loads,
        "rows": rows,
    }


def calibrate(race: Race, device: torch.device) -> dict[str, float]:
    """This machine's rates in the precision it trains in, in floating point operations a second:
    of the best large matrix product, and of the model's own products."""
    n_tokens = race.batch_size * race.config.context_length
    dtype = DTYPES[choose_precision("auto", device).name]
    return {
        "large_products": multiply_rate(dtype, device),
        "own_products": own_products_rate(race.config, n_tokens, dtype, device),
    }


def make_row(
    contender: Contender,
    race: Race,
    checks: dict[str, dict],
    reports: dict[str, list[dict]],
    rates: dict[str, float],
) -> dict:
    """The results of a contender: medians over the rounds, with minimum and maximum.

    "void" is why a row does not count, None where it does. "ratio" is how many times as fast ours
    is, in tokens a second, or for another model in operations a second.
    """
    check, done = checks[contender.name], reports[contender.name]
    failures = [report["failed"] for report in (check, *done) if "failed" in report]
    if failures:
        return {"name": contender.name, "void": failures[0]}
    if contender.starts_from_our_weights:
        reference = OURS_FP32 if contender.precision == "fp32" else OURS
        void = disagreement(checks[reference.name]["losses"], check["losses"])
    else:
        void = not_falling(check["losses"])
    n_tokens = race.batch_size * race.config.context_length
    speeds = [n_tokens / median_step(report, race) for report in done]
    flop = done[0]["flop_per_token"]
    row = {
        "name": contender.name,
        "void": void,
        "precision": check["precision"],
        "parameters": check["parameters"],
        "flop_per_token": flop,
        "tokens_per_second": spread(speeds),
        "flop_per_second": flop * statistics.median(speeds),
        "losses": {str(n): check["losses"][n - 1] for n in LOSS_STEPS if n <= len(check["losses"])},
        "first_step_s": statistics.median(report["start_s"] for report in done),
        "peak_bytes": max(report["peak_bytes"] or 0 for report in done) or None,
        "versions": check["versions"],
    }
    row["share_of_large_products"] = row["flop_per_second"] / rates["large_products"]
    row["share_of_own_products"] = row["flop_per_second"] / rates["own_products"]
    if contender is not OURS:
        our_reports = reports[OURS.name]
        factor = 1.0
        if not contender.starts_from_our_weights:
            factor = our_reports[0]["flop_per_token"] / flop
        row["ratio"] = spread(
            factor * median_step(theirs, race) / median_step(ours, race)
            for ours, theirs in zip(our_reports, done, strict=True)
        )
    return row


def median_step(report: dict, race: Race) -> float:
    """The median time of a round's steps after the warm-up, in seconds."""
    return statistics.median(report["step_s"][race.warm_up :])


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def disagreement(ours: list[float], theirs: list[float]) -> str | None:
    """Why the losses of two runs, one a step, differ; None where they agree."""
    for step in LOSS_STEPS:
        if min(len(ours), len(theirs)) < step:
            return f"no loss of step {step} to compare"
        mine, other = ours[step - 1], theirs[step - 1]
        if not abs(mine - other) <= LOSS_TOLERANCE:  # nan does not agree
            return f"its loss of step {step} is {other:.3f}, ours {mine:.3f}"
    return None


def not_falling(losses: list[float]) -> str | None:
    """Why a run's loss does not fall; None where it does."""
    if len(losses) < LOSS_STEPS[-1]:
        return f"no loss of step {LOSS_STEPS[-1]}"
    first, last = losses[0], losses[LOSS_STEPS[-1] - 1]
    return None if last < first else f"its loss goes from {first:.3f} to {last:.3f}"


def print_rows(rows: list[dict], rates: dict[str, float]) -> None:
    """Print the comparison as a table."""
    say(
        f"products: {rates['large_products'] / 1e9:,.0f} GFLOP/s at best, "
        f"{rates['own_products'] / 1e9:,.0f} over the model's own"
    )
    for row in rows:
        if "tokens_per_second" in row:
            speed = row["tokens_per_second"]
            say(
                f"{row['name']:18} {row['precision']:10} {speed['median']:8,.0f} tokens/s "
                f"({speed['min']:,.0f} to {speed['max']:,.0f})  "
                f"{row['flop_per_second'] / 1e9:6,.0f} GFLOP/s, "
                f"{row['share_of_large_products']:.0%} of the best products, "
                f"{row['share_of_own_products']:.0%} of its own"
            )
            say(f"{'':18} losses {', '.join(f'{loss:.3f}' for loss in row['losses'].values())}")
        if row["void"] is not None:
            say(f"{row['name']:18} void: {row['void']}")
        elif "ratio" in row:
            ratio = row["ratio"]
            say(
                f"{'':18} ours is {ratio['median']:.2f} times as fast "
                f"({ratio['min']:.2f} to {ratio['max']:.2f})"
            )


def compare_memory(race: Race, device: torch.device, folder: Path) -> dict:
    """The peak memory of our steps and of transformers' Trainer in bf16."""
    write_inputs(race, folder)
    ours, theirs = (
        run(contender, race, race.steps, device, folder, True) for contender in (OURS, MEMORY_PEER)
    )
    if "failed" in theirs:
        say(f"memory: void: {theirs['failed']}")
        return {"void": theirs["failed"]}
    void = None
    if not abs(ours["losses"][0] - theirs["losses"][0]) <= LOSS_TOLERANCE:
        void = f"the first loss is {theirs['losses'][0]:.3f}, ours {ours['losses'][0]:.3f}"
    peaks = ours["peak_bytes"], theirs["peak_bytes"]
    ratio = peaks[0] / peaks[1] if None not in peaks else None
    results = {
        "batch": [race.batch_size, race.config.context_length],
        "void": void,
        "ours_peak_bytes": peaks[0],
        "transformers_bf16_peak_bytes": peaks[1],
        "ratio": ratio,
        "versions": theirs["versions"],
    }
    if ratio is None:
        say("memory: this system does not tell the peak of a process")
    else:
        say(
            f"memory of {race.batch_size} x {race.config.context_length}: {peaks[0] / 1e9:.2f} GB, "
            f"{MEMORY_PEER.name} {peaks[1] / 1e9:.2f} GB: {ratio:.2f} of it"
        )
    if void is not None:
        say(f"memory: void: {void}")
    return results


def peers_python() -> Path:
    """The Python of the peers' environment, which is created if missing or out of date."""
    place = usable_cache() / "peers-venv"
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    marker = place / "requirements.sha256"
    files = (REQUIREMENTS, WITHOUT_DEPENDENCIES)
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    if not marker.exists() or marker.read_text(encoding="ascii") != wanted:
        say(f"making {place} from {REQUIREMENTS.name}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "-r", str(REQUIREMENTS)], check=True)
        subprocess.run([*install, "--no-deps", "-r", str(WITHOUT_DEPENDENCIES)], check=True)
        write_atomically(marker, wanted.encode("ascii"))
    return python


def run(
    contender: Contender,
    race: Race,
    steps: int,
    device: torch.device,
    folder: Path,
    keep_losses: bool,
) -> dict:
    """Train with a contender in its own process; returns its report.

    It is {"failed": reason} where a peer fails. Raises RuntimeError where ours fails.
    """
    result = folder / "report.json"
    job = Job(
        tokens=str(folder / "tokens.npy"),
        weights=str(folder / "weights"),
        model=dataclasses.asdict(race.config),
        batch_size=race.batch_size,
        steps=steps,
        device=device.type,
        learning_rate=LEARNING_RATE,
        precision=contender.precision,
        keep_losses=keep_losses,
        report=str(result),
    )
    write_json(folder / "job.json", dataclasses.asdict(job))
    result.unlink(missing_ok=True)
    python = sys.executable if contender.module == OURS.module else peers_python()
    began_at = time.time()
    done = subprocess.run(
        [str(python), "-m", contender.module, str(folder / "job.json")],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        if contender.module == OURS.module:
            raise RuntimeError(done.stdout)
        say(done.stdout)
        return {"failed": (done.stdout.strip().splitlines() or ["no output"])[-1]}
    report = json.loads(result.read_text(encoding="utf-8"))
    return report | {"start_s": report["first_step_at"] - began_at}


def write_inputs(race: Race, folder: Path) -> None:
    """Write the contenders' inputs: the tokens, and our fresh weights for transformers."""
    most_steps = max(race.steps, race.checked_steps) + 1
    n_tokens = most_steps * race.batch_size * race.config.context_length + 1
    np.save(folder / "tokens.npy", sample_tokens(n_tokens))
    save_for_transformers(fresh_model(race.config, torch.device("cpu")), folder / "weights")


def sample_tokens(count: int) -> np.ndarray:
    """`count` GPT-2 tokens of the repository's texts, repeated, as uint16."""
    tokenizer = GPT2Tokenizer()
    ids = [token for path in TEXTS for token in tokenizer.encode(path.read_text(encoding="utf-8"))]
    return np.fromiter(itertools.islice(itertools.cycle(ids), count), np.uint16, count)


def save_for_transformers(model: GPTModel, folder: Path) -> None:
    """Write a model as a folder that transformers reads, without a tokenizer."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", their_settings(model.config))
    tensors = their_tensors(model.config, weights_of(model))
    with NewFile(folder / "model.safetensors") as file:
        for chunk in safetensors_chunks(tensors, {"format": "pt"}):
            file.write(chunk)
