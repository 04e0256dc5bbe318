"""Fine-tuning SmolLM2-135M: its memory, its speed beside transformers and PEFT, and what it gains.

    python -m benchmarks.finetune --memory
    python -m benchmarks.finetune --peers [--rounds 3] [--steps 8] [--layers 30] [--length 512]
    python -m benchmarks.finetune --gain TEXT... [--folder runs-gain] [--tokens 300000]

--memory is the peak resident memory of main.py that trains all weights, or an adapter of rank 8,
with windows of 512 tokens. --peers times the steps of this trainer beside those of transformers'
Trainer, and with PEFT beside an adapter, each in a process of its own, in turn, from the same
random weights of SmolLM2's shape; a row is void where the first losses differ. --gain writes the
paragraphs of all .md files of some folders in a shuffled order, trains on the first 90 %
of them, and compares the bits a byte of the rest before and after, and of a model from random
weights that has as many operations. A --gain that was stopped goes on.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.finetune_job import FineTuning
from benchmarks.peers import LOSS_TOLERANCE, fresh_model, save_for_transformers, spread
from benchmarks.report import machine, write_results
from benchmarks.steps import multiply_rate
from engine.console import say, use_utf8
from engine.memory import as_bytes
from engine.precision import DTYPES, choose_precision
from engine.starting import end_at_ctrl_c
from model import GPTConfig, GPTModel
from planning.fine_tuning import SMOLLM2
from storage.files import make_folder, write_json

REPOSITORY = Path(__file__).resolve().parent.parent
SHAPE: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 49_152,
    "emb_dim": 576,
    "n_heads": 9,
    "n_kv_heads": 3,
    "ff_dim": 1536,
    "norm_eps": 1e-5,
    "rope_theta": 1e5,
}
RANK, LENGTH, LAYERS = 8, 512, 30
# a run of five minutes on two cores whose products reach this rate
MINUTES, REFERENCE = 5, 800e9
TRAIN_SHARE, SEED = 0.9, 1
# the real program, which tells its peak when it ends
PROGRAM = """
import sys
import main
from benchmarks.peer_job import peak_bytes
code = main.main(["settings.py"])
print("peak", peak_bytes())
sys.exit(code)
"""


def main() -> None:
    """Run the parts that are asked for."""
    end_at_ctrl_c()
    use_utf8()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true", help="the program's peak memory")
    parser.add_argument("--peers", action="store_true", help="speed and memory beside others")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of --peers (3)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="in a round (8)")
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N", help=f"({LAYERS})")
    parser.add_argument("--length", type=int, default=LENGTH, metavar="N", help=f"({LENGTH})")
    parser.add_argument("--gain", nargs="+", type=Path, metavar="TEXT", help="folders of texts")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs-gain"), metavar="DIR", help="of --gain's runs"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="to train on, in --gain")
    asked = parser.parse_args()
    if not (asked.memory or asked.peers or asked.gain):
        parser.error("name what to measure: --memory, --peers or --gain")
    if min(asked.rounds, asked.layers, asked.length, asked.tokens or 1) < 1 or asked.steps < 2:
        parser.error("--rounds, --layers, --length and --tokens are at least 1, --steps at least 2")
    device = torch.device("cpu")
    parts: dict[str, Any] = {}
    if asked.memory:
        parts["memory"] = measure_memory()
    if asked.peers:
        parts["peers"] = compare(asked.rounds, asked.steps, asked.layers, asked.length)
    if asked.gain:
        parts["gain"] = measure_gain(asked.gain, asked.folder, asked.tokens)
    for name, found in parts.items():
        path = write_results(f"finetune-{name}", device, {"machine": machine(device), **found})
        say(f"written to {path}")


def measure_memory() -> dict[str, Any]:
    """The peaks of two runs of the program, all weights and an adapter, and the weights' bytes."""
    weights = 4 * sum(p.numel() for p in fresh_meta_model().parameters())
    found: dict[str, Any] = {"weights_bytes": weights}
    for name, params in (("all", {}), ("adapter", {"lora_rank": RANK})):
        fixed = {"max_steps": 10, "eval_freq": 5, "eval_iter": 1, "final_iter": 1}
        params = fixed | {"max_length": LENGTH} | params
        settings = {
            "DATA": "sample-en",
            "INIT_FROM": SMOLLM2,
            "CUSTOM_MODE": True,
            "COMPILE": False,
            "RESUME": False,
            "custom_params": params,
            "sampling_params": {"max_new_tokens": 1},
        }
        with tempfile.TemporaryDirectory() as folder:
            printed = run_program(Path(folder), settings)
        peak = int(printed.rpartition("peak ")[2])
        found[f"{name}_peak_bytes"] = peak
        say(f"{name:8} {as_bytes(peak)} at its peak, {as_bytes(peak - weights)} beyond the weights")
    return found


def fresh_meta_model() -> GPTModel:
    """SmolLM2-135M's shape without memory."""
    with torch.device("meta"):
        return fresh_model(config_of(LAYERS, LENGTH), torch.device("meta"))


def config_of(layers: int, length: int) -> GPTConfig:
    """SmolLM2's shape, with other sizes."""
    return GPTConfig(**SHAPE | {"n_layers": layers, "context_length": length})


def run_program(folder: Path, settings: dict[str, Any]) -> str:
    """Run main.py with some settings in a folder; what it prints. RuntimeError where it fails."""
    lines = [f"{name} = {value!r}\n" for name, value in settings.items()]
    (folder / "settings.py").write_text("".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode != 0:
        raise RuntimeError(f"the program failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def compare(rounds: int, steps: int, layers: int, length: int) -> dict[str, Any]:
    """Rows of all weights and of an adapter: tokens a second and peaks of both, and ratios."""
    config, rows = config_of(layers, length), []
    precision = choose_precision("auto", torch.device("cpu")).name
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        draws = np.random.default_rng(SEED)
        np.save(folder / "tokens.npy", draws.integers(0, config.vocab_size, steps * length + 1))
        save_for_transformers(fresh_model(config, torch.device("cpu")), folder / "weights")
        for rank in (None, RANK):
            job = FineTuning(
                folder=str(folder),
                model=asdict(config),
                length=length,
                steps=steps,
                lora_rank=rank,
                bf16=precision == "bf16",
            )
            pairs = [(run_job("ours", job), run_job("theirs", job)) for _ in range(rounds)]
            rows.append(make_row(job, pairs))
            print_row(rows[-1])
    shape = {"layers": layers, "length": length, "rounds": rounds, "steps": steps}
    return {"precision": precision, **shape, "rows": rows}


def run_job(who: str, job: FineTuning) -> dict[str, Any]:
    """Train as "ours" or "theirs" in a process of its own; its report."""
    path = Path(job.folder) / "job.json"
    write_json(path, asdict(job))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.finetune_job", who, str(path)],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        raise RuntimeError(f"{who} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads((Path(job.folder) / "report.json").read_bytes())


def make_row(job: FineTuning, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """The row of one kind of fine-tuning: medians over the rounds, and ratios within each."""

    def rate(report: dict[str, Any]) -> float:
        return job.length / statistics.median(report["step_s"][1:])

    ours, theirs = pairs[0]
    apart = abs(ours["first_loss"] - theirs["first_loss"])
    void = None
    if not apart <= LOSS_TOLERANCE:
        void = f"the first losses are {ours['first_loss']:.3f} and {theirs['first_loss']:.3f}"
    return {
        "lora_rank": job.lora_rank,
        "void": void,
        "ours_tokens_per_second": spread(rate(one) for one, _ in pairs),
        "theirs_tokens_per_second": spread(rate(two) for _, two in pairs),
        "times_as_fast": spread(rate(one) / rate(two) for one, two in pairs),
        "ours_peak_bytes": max(one["peak_bytes"] for one, _ in pairs),
        "theirs_peak_bytes": max(two["peak_bytes"] for _, two in pairs),
        "memory_ratio": spread(one["peak_bytes"] / two["peak_bytes"] for one, two in pairs),
        "versions": theirs["versions"],
    }


def print_row(row: dict[str, Any]) -> None:
    """Print a comparison."""
    name = "all weights" if row["lora_rank"] is None else f"an adapter of rank {row['lora_rank']}"
    if row["void"] is not None:
        say(f"{name}: void: {row['void']}")
    ratio, memory = row["times_as_fast"], row["memory_ratio"]
    say(
        f"{name}: {row['ours_tokens_per_second']['median']:,.1f} tokens/s, transformers "
        f"{row['theirs_tokens_per_second']['median']:,.1f}: {ratio['median']:.2f} times as fast "
        f"({ratio['min']:.2f} to {ratio['max']:.2f}); {as_bytes(row['ours_peak_bytes'])} at its "
        f"peak, transformers {as_bytes(row['theirs_peak_bytes'])}: {memory['median']:.2f} of it"
    )


def measure_gain(texts: list[Path], folder: Path, tokens: int | None) -> dict[str, Any]:
    """The bits a byte of unseen paragraphs before and after fine-tuning, and from scratch."""
    make_folder(folder)
    folder = folder.resolve()
    write_paragraphs([path.resolve() for path in texts], folder)
    flop = fresh_meta_model().flop_per_token()
    budget = tokens or int(60 * MINUTES * REFERENCE / flop)
    steps = max(1, budget // LENGTH)
    common = {"DATA": {"path": "train.md", "val": "val.md"}, "COMPILE": False, "SEED": SEED}
    params = {"max_steps": steps, "max_length": LENGTH, "save_minutes": 5, "eval_iter": 4}
    tuned = common | {"INIT_FROM": SMOLLM2, "CUSTOM_MODE": True, "RUN_NAME": f"tuned-{steps}"}
    found: dict[str, Any] = {"steps": steps, "tokens": steps * LENGTH}
    after = final_figures(folder, tuned | {"custom_params": params})
    found |= {"before": after["initial_val_bits_per_byte"], "after": after[FINAL]}
    found |= {"steps_taken": after["steps"], "weights_of_step": after["weights_of_step"]}
    cpu = torch.device("cpu")
    rate = multiply_rate(DTYPES[choose_precision("auto", cpu).name], cpu)
    minutes = round(steps * LENGTH * flop / rate / 60, 2)
    scratch = common | {"MINUTES": minutes, "RUN_NAME": f"scratch-{steps}"}
    found |= {"scratch_minutes": minutes, "scratch": final_figures(folder, scratch)[FINAL]}
    found["gain"] = 1 - found["after"] / found["before"]
    found["gain_over_scratch"] = 1 - found["after"] / found["scratch"]
    say(
        f"{found['before']:.3f} bits a byte before, {found['after']:.3f} after "
        f"{after['steps']:,} of {steps:,} steps: {found['gain']:.1%} less; "
        f"{found['scratch']:.3f} from scratch in {minutes:g} min of this machine: "
        f"{found['gain_over_scratch']:.1%} less"
    )
    return found


FINAL = "final_val_bits_per_byte"


def write_paragraphs(texts: list[Path], folder: Path) -> None:
    """Write train.md and val.md, of the shuffled paragraphs of all texts in some folders."""
    files = [file for text in texts for file in sorted(text.rglob("*")) if file.suffix == ".md"]
    content = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    paragraphs = [part.strip() for part in content.split("\n\n") if part.strip()]
    if not paragraphs:
        sys.exit(f"there is no .md file in {', '.join(map(str, texts))}")
    random.Random(SEED).shuffle(paragraphs)
    n_train = round(TRAIN_SHARE * len(paragraphs))
    for name, part in (("train.md", paragraphs[:n_train]), ("val.md", paragraphs[n_train:])):
        (folder / name).write_text("\n\n".join(part) + "\n", encoding="utf-8")


def final_figures(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run with these settings, which goes on if it was stopped."""
    summary = folder / "runs" / settings["RUN_NAME"] / "summary.json"
    if not summary.exists():
        run_program(folder, settings)
    return json.loads(summary.read_bytes())


if __name__ == "__main__":
    main()
