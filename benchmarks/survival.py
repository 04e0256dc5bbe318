"""Survival of kills, disk errors, power cuts and two owners of one folder.

    python -m benchmarks.survival --kills 10000 --runs 20 --seed 0

storm     processes that save through storage/files.py, killed at random moments (--kills)
calls     each system call fails once, or from then on (SQLite's method)
power     the recorded writes, cut off at every point, without what was not fsynced
locks     the lock on a run folder with kills, forks and many processes
training  runs of main.py, killed and restarted until they are done (--runs kills), compared
          bit by bit with an undisturbed run

--only names a part, --folder a disk to work on. Every failure is printed with its seed, and the
exit code is then 1. If all parts ran, the results go to benchmarks/results/. It needs os.fork, so
Linux or macOS. The faults are in tests/faults/, which the tests use too.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.console import say, use_utf8
from tests.faults.disk import fail_every_call
from tests.faults.locks import contend_for_locks
from tests.faults.power import lose_power
from tests.faults.runs import (
    LATEST,
    PHASES,
    PhaseBoard,
    import_what_runs_need,
    run_and_kill,
    run_to_its_end,
)
from tests.faults.saving import folder_in_memory, kill_storm, leftovers

REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = ("storm", "calls", "power", "locks", "training")
MOST_KILLS_OF_A_RUN = 5
SETTINGS = {
    "DATA": "text.txt",
    "TOKENIZER": "char",
    "CUSTOM_MODE": True,
    # a learning rate far too high: the best weights come early and must be kept
    "custom_params": {"max_steps": 40, "learning_rate": 0.2, "schedule": "constant"}
    | {"batch_size": 4, "max_length": 32, "eval_freq": 7, "eval_iter": 2, "save_every": 5}
    | {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1, "start_context": "the "},
    "sampling_params": {"max_new_tokens": 20},
} | {"DEVICE": "cpu", "PRECISION": "fp32", "SEED": 1, "OUTPUT_DIR": ".", "RUN_NAME": "run"}


def kill_training(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill runs of main.py in every phase, restart them until they are done, and compare them with
    an undisturbed run."""
    import_what_runs_need()
    text = (REPOSITORY / "corpus" / "sample-en.txt").read_bytes()[:3000]
    board = PhaseBoard()
    cache = folder / "cache"

    def new_run(name: str) -> Path:
        work = folder / name
        work.mkdir(parents=True)
        (work / "text.txt").write_bytes(text)
        lines = [f"{key} = {value!r}\n" for key, value in SETTINGS.items()]
        (work / "settings.py").write_text("".join(lines), encoding="utf-8")
        return work

    undisturbed = new_run("undisturbed")
    began_at = time.perf_counter()
    code = run_to_its_end(undisturbed, cache, board)
    whole_s = time.perf_counter() - began_at
    if code != 0:
        tail = (undisturbed / "log.txt").read_text(encoding="utf-8")[-2000:]
        return {"failures": [f"training: the undisturbed run ended with {code}: {tail}"]}
    expected = outcome(undisturbed / "run")
    mean_s = {phase: board.mean_s(phase) for phase in LATEST}

    chance = random.Random(seed)
    hits, n_runs = dict.fromkeys(PHASES, 0), 0
    told: list[str] = []
    failures: list[str] = []
    while len(told) < kills and not failures:
        n_runs += 1
        work, killed_here = new_run(f"run-{n_runs}"), 0
        while True:
            aim = min(PHASES, key=lambda phase: (hits[phase], chance.random()))
            if len(told) == kills or killed_here == MOST_KILLS_OF_A_RUN:
                code = run_to_its_end(work, cache, board)
                break
            nth = chance.randint(1, LATEST.get(aim, 1))
            delay_s = chance.random() * mean_s.get(aim, whole_s)
            code = run_and_kill(work, cache, board, aim, nth, delay_s)
            if code is not None:
                break
            killed_here += 1
            hits[board.phase] += 1
            for place in ("run", "run/checkpoints", "run/best"):
                if (work / place).is_dir():  # few kills leave a partly written file there
                    (work / place / ".tmp-1-planted").write_bytes(b"half")
            told.append(f"run {n_runs}: {board.phase}")
        where = f"training: seed {seed}, run {n_runs}, {len(told)} kills so far"
        failures += [f"{where}: {fault}" for fault in _faults_of(work, code, expected)]
    counts = {"kills": len(told), "runs": n_runs, "phases": hits, "each_kill": told}
    return counts | {"undisturbed_s": round(whole_s, 2), "failures": failures}


def outcome(run: Path) -> dict[str, Any]:
    """All that a finished run leaves, but for times and names, by file."""
    last = max((run / "checkpoints").glob("step-*"))
    state = json.loads((last / "state.json").read_bytes())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    for row in rows:
        row.pop("train/tok_per_sec", None)
    state["journal"]["history"].pop("elapsed_s")
    summary = json.loads((run / "summary.json").read_bytes())
    summary.pop("elapsed_s")
    steps = [row for row in rows if "train/loss" in row]
    weights = sorted(run.glob("*/step-*/*.safetensors"))
    return {
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
        "weights": {
            str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in weights
        },
        "random": state.pop("random"),
        # exact, since JSON's floats are repr; hex only shows it
        "losses": [(row["step"], row["train/loss"].hex()) for row in steps],
        "steps": steps,
        "evaluations": [row for row in rows if "val/loss" in row],
        "history": state["journal"]["history"],
        "counters": [state["steps"], state["journal"]["tokens"]],
        "plan": {name: state[name] for name in ("schedule", "total_steps", "scaler", "best_step")},
        "samples.md": (run / "samples.md").read_text(encoding="utf-8"),
        "summary.json": summary,
    }


def _faults_of(work: Path, code: int, expected: dict[str, Any]) -> Iterator[str]:
    if code != 0:
        tail = (work / "log.txt").read_text(encoding="utf-8")[-2000:]
        yield f"it ended with {code}: {tail}"
        return
    found = outcome(work / "run")
    for what, value in expected.items():
        if found[what] != value:
            yield f"{what} differ: {found[what]!r:.300} instead of {value!r:.300}"
    if [step for step, _ in found["losses"]] != list(range(1, len(found["losses"]) + 1)):
        yield f"steps are missing or twice: {[step for step, _ in found['losses']]}"
    if leftovers(work / "run"):
        yield f"{leftovers(work / 'run')} are still there"


def main(arguments: list[str] | None = None) -> int:
    """Run all parts, or the one that --only names; returns 1 where anything failed."""
    use_utf8()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survival", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kills", type=int, default=1000, help="of the storm")
    parser.add_argument("--runs", type=int, default=20, help="kills of whole training runs")
    parser.add_argument("--seed", type=int, default=0, help="of every moment that is chosen")
    parser.add_argument("--only", choices=PARTS, help="one part; no figures are written")
    parser.add_argument("--folder", help="where to work; none: the system's temporary folder")
    options = parser.parse_args(arguments)
    if not hasattr(os, "fork"):
        say("benchmarks.survival needs os.fork: Linux or macOS")
        return 1
    results: dict[str, Any] = {"seed": options.seed}
    on_disk = tempfile.TemporaryDirectory(dir=options.folder)
    with on_disk as name, folder_in_memory() as memory:
        folder = Path(name)
        # training imports torch and comes last: a process forks faster without it
        parts = {
            "storm": lambda: kill_storm(options.kills, options.seed, folder / "storm"),
            "calls": lambda: fail_every_call(memory / "calls"),
            "power": lambda: lose_power(options.seed, memory / "power"),
            "locks": lambda: contend_for_locks(folder / "locks"),
            "training": lambda: kill_training(options.runs, options.seed, folder / "training"),
        }
        for part in parts if options.only is None else [options.only]:
            began_at = time.perf_counter()
            results[part] = parts[part]() | {"seconds": round(time.perf_counter() - began_at, 1)}
            _show(part, results[part])
    if options.only is None:
        import torch

        from benchmarks.report import machine, write_results

        device = torch.device("cpu")
        path = write_results("survival", device, {"machine": machine(device)} | results)
        say(f"written to {path}")
    return int(any(result["failures"] for name, result in results.items() if name != "seed"))


def _show(part: str, result: dict[str, Any]) -> None:
    shown = {name: value for name, value in result.items() if name not in ("failures", "each_kill")}
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
    say(f"{part:9} {'FAILED' if result['failures'] else 'ok'}: {said}")
    for number, where in enumerate(result.get("each_kill", []), start=1):
        say(f"{'':10}kill {number} of {where}")
    for failure in result["failures"]:
        say(f"{'':10}{failure}")


if __name__ == "__main__":
    sys.exit(main())
