"""What insight costs a run: training with the report, what it measures and the stop file, and
without them, side by side.

    python -m benchmarks.overhead [--rounds 5] [--minutes 1]

Each run is the real program in a process of its own, of the same steps. The two of a pair train at
the same time, each with one thread, on a core of its own where the system lets it choose, and
change cores from pair to pair: what slows the machine slows both. Wall-clock and CPU time count
from the end of start-up to the end. The time within insight's own calls is measured, too.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.report import machine, write_results
from engine.console import say, use_utf8

N_BYTES = 1_000_000
REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS = """
DATA, TOKENIZER, CUSTOM_MODE, RESUME = "text.txt", "bpe:512", True, False
custom_params = {{{length}}}
"""
# the real program, timed from the end of its start-up
TIMED = """
import os
if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[{place} % len(cores):][:1])
import json, sys, time
import main, train
from insight.report import Report

spent = 0.0

def timed(call):
    def run(*arguments):
        global spent
        began_at = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            spent += time.perf_counter() - began_at
    return run

if {without}:
    Report.follow, Report.finish = lambda self, elapsed_s: {{}}, lambda self: []
    train.StopSignals = lambda parallel, requested: main.StopSignals(parallel)
else:
    Report.follow, Report.finish = timed(Report.follow), timed(Report.finish)
    train.StopSignals = lambda parallel, asked: main.StopSignals(parallel, timed(asked))
run_pipeline = main.run_pipeline

def run(env):
    wall, cpu = time.perf_counter(), time.process_time()
    run_pipeline(env)
    times = [time.perf_counter() - wall, time.process_time() - cpu, spent]
    print(json.dumps([env.run.record.total_steps, times]))

main.run_pipeline = run
sys.exit(main.main(["settings.py"]))
"""


@dataclass(frozen=True)
class Took:
    """The seconds of a run: wall-clock and CPU time, and wall-clock time in insight's calls."""

    wall_s: float
    cpu_s: float
    insight_s: float


def train(length: str, place: int = 0, *, without: bool = False) -> tuple[int, Took]:
    """Train for some minutes or steps on the core at a place; the steps, and what they took."""
    english = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        text = (english * (N_BYTES // len(english) + 1))[:N_BYTES]
        Path(folder, "text.txt").write_text(text, encoding="utf-8")
        Path(folder, "settings.py").write_text(SETTINGS.format(length=length), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", TIMED.format(place=place, without=without)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
        )
        if done.returncode != 0:
            raise RuntimeError(f"the run ended with {done.returncode}:\n{done.stderr[-2000:]}")
        assert any(Path(folder, "runs").glob("*/report.html")) != without
    steps, times = json.loads(done.stdout.splitlines()[-1])
    return steps, Took(*times)


def main() -> None:
    """Print the ratios and the share, and write what each run took."""
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (5)")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each run (1)")
    asked = parser.parse_args()
    steps, _ = train(f'"time_budget_minutes": {asked.minutes}')  # warms up
    took: dict[str, list[Took]] = {"with": [], "without": []}
    for number in range(asked.rounds):
        places = number % 2, 1 - number % 2
        with ThreadPoolExecutor() as pool:
            runs = {
                name: pool.submit(train, f'"max_steps": {steps}', place, without=name == "without")
                for name, place in zip(took, places, strict=True)
            }
        for name, run in runs.items():
            took[name].append(run.result()[1])
        last = took["with"][-1]
        told = ", ".join(f"{name} {of[-1].wall_s:.1f} s" for name, of in took.items())
        say(f"{steps} steps: {told}; {last.insight_s / last.wall_s:.2%} in insight's calls")
    pairs = list(zip(took["with"], took["without"], strict=True))
    for kind in ("wall_s", "cpu_s"):
        logs = [math.log(getattr(own, kind) / getattr(other, kind)) for own, other in pairs]
        error = statistics.stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else math.nan
        say(f"{kind}: {math.expm1(statistics.mean(logs)):+.1%} +- {error:.1%} with insight")
    shares = [one.insight_s / one.wall_s for one in took["with"]]
    say(f"in insight's calls: {statistics.median(shares):.2%} of a run (at most {max(shares):.2%})")
    device = torch.device("cpu")
    found = {name: [asdict(one) for one in of] for name, of in took.items()}
    results = {"machine": machine(device), "steps": steps, "runs": found}
    say(f"written to {write_results('overhead', device, results)}")


if __name__ == "__main__":
    main()
