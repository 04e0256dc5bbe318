"""The efficiency of several processes: their tokens a second divided by one process's.

    python -m benchmarks.scale [--ranks N] [--rounds N] [--kinds ddp fsdp]

main.py trains a 10.9M character model with gradient accumulation 4 and the same batch each time:
on one process with all cores, and on N ranks that share them (default 2), in turn. Efficiency is
the ranks' tokens a second divided by one process's, round by round; on GPUs, where each rank has
its own, by N times that. A run's speed is the mean of its evaluations after the warm-up, each of
which covers the steps since the one before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import machine, write_results
from engine.console import say, use_utf8
from environment import pick_device

REPOSITORY = Path(__file__).resolve().parent.parent
ACCUMULATION, STEPS, WARM_UP = 4, 9, 3
SETTINGS = """
DATA = {text!r}
TOKENIZER = "char"
CUSTOM_MODE = True
MODEL = "mini"
COMPILE = False
PARALLEL = {kind!r}
RUN_NAME = {name!r}
custom_params = {{
    "max_steps": {steps},
    "batch_size": 16,
    "gradient_accumulation_steps": {accumulation},
    "stride": 1,
    "eval_freq": {warm_up},
    "eval_iter": 1,
    "save_every": 1000,
    "model_overrides": {{"drop_rate": 0.0}},
}}
"""


def main(arguments: list[str]) -> None:
    """Measure every contender in turn, print the efficiencies and write the results."""
    use_utf8()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--ranks", type=int, default=2, help="processes beside one")
    parser.add_argument("--rounds", type=int, default=5, help="times that each one runs")
    parser.add_argument("--kinds", nargs="+", default=["ddp", "fsdp"], choices=("ddp", "fsdp"))
    asked = parser.parse_args(arguments)
    device = pick_device(None)
    speeds: dict[str, list[float]] = {name: [] for name in ("one", *asked.kinds)}
    for number in range(asked.rounds):
        for name, found in speeds.items():
            settings = train(name, 1 if name == "one" else asked.ranks, found)
            say(f"round {number + 1}: {name:4} {found[-1]:9,.0f} tokens/s")
    times_one = asked.ranks if device.type == "cuda" else 1
    rows = [
        describe(kind, asked.ranks, speeds[kind], speeds["one"], times_one) for kind in asked.kinds
    ]
    results = {
        "machine": machine(device),
        "precision": settings["precision"]["name"],
        "batch": [ACCUMULATION, settings["training"]["batch_size"]],
        "max_length": settings["training"]["max_length"],
        "tokens_per_s_of_one": speeds["one"],
        "rows": rows,
    }
    say(f"written to {write_results('scale', device, results)}")


def train(name: str, ranks: int, speeds: list[float]) -> dict:
    """Train once in a temporary folder, and append its tokens a second; returns settings.json."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "settings.py")
        kind = "auto" if name == "one" else name
        text = str(REPOSITORY / "corpus" / "sample-en.txt")
        counts = {"steps": STEPS, "accumulation": ACCUMULATION, "warm_up": WARM_UP}
        settings = SETTINGS.format(text=text, kind=kind, name=name, **counts)
        file.write_text(settings, encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        main_py = str(REPOSITORY / "main.py")
        command = [sys.executable, *(launcher if ranks > 1 else []), main_py, str(file)]
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        done = subprocess.run(
            command,
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name not in threads},
            capture_output=True,
            encoding="utf-8",
        )
        if done.returncode != 0:
            sys.exit(done.stderr)
        run = Path(folder, "runs", name)
        rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        measured = [json.loads(row) for row in rows if "train/tok_per_sec" in row]
        assert [row["step"] for row in measured] == [WARM_UP, 2 * WARM_UP, STEPS]
        # the mean, since the slowest and the fastest are chance
        speeds.append(statistics.mean(row["train/tok_per_sec"] for row in measured[1:]))
        return json.loads((run / "settings.json").read_text(encoding="utf-8"))


def describe(
    kind: str, ranks: int, speeds: list[float], of_one: list[float], times_one: int
) -> dict:
    """Print and return a contender's tokens a second and efficiency, round by round."""
    by_round = [own / (times_one * one) for own, one in zip(speeds, of_one, strict=True)]
    efficiency = statistics.median(by_round)
    say(
        f"{kind}: {ranks} processes {statistics.median(speeds):,.0f} tokens/s, one "
        f"{statistics.median(of_one):,.0f}: efficiency {efficiency:.2f} "
        f"({min(by_round):.2f} to {max(by_round):.2f})"
    )
    return {
        "kind": kind,
        "ranks": ranks,
        "tokens_per_s": speeds,
        "efficiency_by_round": by_round,
        "efficiency": efficiency,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
