"""Time budgets: what texts of 90 bytes and more make of 15 s and of a minute.

    python -m benchmarks.budget [--seconds 15 60] [--bytes 90 2000 20000 200000 2000000]
    python -m benchmarks.budget --minutes 0.5 2 [--bytes 2000 ... 50000000] [--busy]

Each run is the real program in a process of its own. Its seconds count from the end of its
start-up to its end; lines are those of both streams that are not empty. With --minutes the runs
are those of MINUTES and their seconds all that the process takes; --busy starts another process,
which keeps a core busy, when a tenth of the time is over.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine, write_results
from engine.console import say, use_utf8

REPOSITORY = Path(__file__).resolve().parent.parent
SIZES, BUDGETS = [90, 2_000, 20_000, 200_000, 2_000_000], [15.0, 60.0]
SIZES_OF_MINUTES = [2_000, 20_000, 200_000, 2_000_000, 50_000_000]
BUSY = "while True: sum(range(10**6))"  # another process's program
MINUTES_SETTINGS = """
DATA, MINUTES, QUICK_MODE, RUN_NAME = "text.txt", {minutes}, False, "run"
"""
SETTINGS = """
DATA, TOKENIZER, CUSTOM_MODE, RESUME = "text.txt", "char", True, False
custom_params = {{"time_budget_minutes": {minutes}}}
"""
# the real program, whose evaluations are timed after its start-up
TIMED = """
import json, sys, time
import main
from training.learner import Learner

of_evaluations, evaluate, run_pipeline = [], Learner.evaluate, main.run_pipeline

def timed(*arguments, **options):
    began_at = time.perf_counter()
    loss = evaluate(*arguments, **options)
    of_evaluations.append(time.perf_counter() - began_at)
    return loss

def run(env):
    Learner.evaluate, began_at = timed, time.perf_counter()
    run_pipeline(env)
    seconds = time.perf_counter() - began_at
    found = {"seconds": seconds, "evaluations": len(of_evaluations) // 2}
    found |= {"evaluations_s": sum(of_evaluations), "steps": env.run.record.total_steps}
    print(json.dumps(found))

main.run_pipeline = run
sys.exit(main.main(["settings.py"]))
"""


def measure(n_bytes: int, seconds: float) -> dict[str, float]:
    """Train for some seconds on a text of so many bytes; what the run took."""
    english = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="ascii", errors="ignore")
    with tempfile.TemporaryDirectory() as folder:
        text = (english * (n_bytes // len(english) + 1))[:n_bytes]
        Path(folder, "text.txt").write_text(text, encoding="utf-8")
        settings = SETTINGS.format(minutes=seconds / 60)
        Path(folder, "settings.py").write_text(settings, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", TIMED],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
    if done.returncode != 0:
        raise RuntimeError(f"the run ended with {done.returncode}:\n{done.stdout[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    found = next(line for line in lines if line.startswith('{"seconds"'))
    return {"bytes": n_bytes, "budget_s": seconds, **json.loads(found), "lines": len(lines) - 1}


def measure_minutes(n_bytes: int, minutes: float, *, busy: bool) -> dict[str, Any]:
    """Train with MINUTES on random words, so many bytes of them; what the whole process took."""
    sample = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="utf-8")
    words, draw = sample.split(), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        text = " ".join(draw.choices(words, k=n_bytes // 4)).encode()[:n_bytes]
        Path(folder, "text.txt").write_text(text.decode(errors="ignore"), encoding="utf-8")
        settings = MINUTES_SETTINGS.format(minutes=minutes)
        Path(folder, "settings.py").write_text(settings, encoding="utf-8")
        others: list[subprocess.Popen[bytes]] = []
        start = threading.Timer(
            6 * minutes, lambda: others.append(subprocess.Popen([sys.executable, "-c", BUSY]))
        )
        began_at = time.perf_counter()
        if busy:
            start.start()
        try:
            done = subprocess.run(
                [sys.executable, str(REPOSITORY / "main.py"), "settings.py"],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
            )
            seconds = time.perf_counter() - began_at
        finally:
            start.cancel()
            for other in others:
                other.kill()
                other.wait()
        if done.returncode != 0:
            raise RuntimeError(f"the run ended with {done.returncode}:\n{done.stdout[-2000:]}")
        run = Path(folder, "runs", "run")
        record, summary = (
            json.loads((run / name).read_text(encoding="utf-8"))
            for name in ("settings.json", "summary.json")
        )
    plans = [change for change in record["changes"] if "after_step" in change]
    found = {"bytes": n_bytes, "minutes": minutes, "busy": busy, "seconds": seconds}
    return found | {"share": seconds / (60 * minutes), "steps": summary["steps"], "plans": plans}


def time_minutes(asked: argparse.Namespace) -> None:
    """Print a line a run of MINUTES, and write the results where all sizes were run."""
    runs = []
    for minutes in asked.minutes:
        for n_bytes in asked.bytes or SIZES_OF_MINUTES:
            runs.append(run := measure_minutes(n_bytes, minutes, busy=asked.busy))
            planned = ", ".join(
                f"{plan['why']} after {plan['after_step']:,}: {plan['total_steps']:,} of "
                f"{plan['steps_before']:,} steps"
                for plan in run["plans"]
            )
            say(
                f"{n_bytes:10,} bytes in {minutes:g} minutes: {run['seconds']:6.1f} s "
                f"({run['share']:.1%}), {run['steps']:,} steps ({planned or 'as planned'})"
            )
    if asked.bytes is None:
        device = torch.device("cpu")
        name = "minutes-busy" if asked.busy else "minutes"
        path = write_results(name, device, {"machine": machine(device), "runs": runs})
        say(f"written to {path}")


def main() -> None:
    """Print a line a run, and write the results where all of them were made."""
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--bytes", type=int, nargs="+")
    parser.add_argument("--minutes", type=float, nargs="+")
    parser.add_argument("--busy", action="store_true")
    asked = parser.parse_args()
    if asked.minutes:
        time_minutes(asked)
        return
    runs, sizes = [], asked.bytes or SIZES
    for seconds in asked.seconds:
        for n_bytes in sizes:
            runs.append(run := measure(n_bytes, seconds))
            share = run["evaluations_s"] / run["seconds"]
            say(
                f"{n_bytes:9,} bytes in {seconds:g} s: {run['seconds']:5.1f} s, {run['steps']:,} "
                f"steps, {run['evaluations']} evaluations ({share:.1%}), {run['lines']} lines"
            )
    if (asked.seconds, sizes) == (BUDGETS, SIZES):
        device = torch.device("cpu")
        path = write_results("budget", device, {"machine": machine(device), "runs": runs})
        say(f"written to {path}")


if __name__ == "__main__":
    main()
