"""What insight costs a run: training with the report, what it measures and the stop file, and
without them, in turn.

    python -m benchmarks.overhead [--rounds 5] [--minutes 1]

Each run is the real program in a process of its own, of the same steps. Its
wall-clock time counts from the end of its start-up to its end; its CPU time, of which other
programs take nothing, is that of all its threads in the same span.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
import json, sys, time
import main
from insight.report import Report

if {without}:
    import train
    Report.follow, Report.finish = lambda self, elapsed_s: {{}}, lambda self: []
    train.StopSignals = lambda parallel, requested: main.StopSignals(parallel)
run_pipeline = main.run_pipeline

def run(env):
    wall, cpu = time.perf_counter(), time.process_time()
    run_pipeline(env)
    times = [time.perf_counter() - wall, time.process_time() - cpu]
    print(json.dumps(times + [env.run.record.total_steps]))

main.run_pipeline = run
sys.exit(main.main(["settings.py"]))
"""


def train(length: str, *, without: bool) -> tuple[float, float, int]:
    """Train for some minutes or steps; the wall-clock and CPU seconds, and the steps."""
    english = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        text = (english * (N_BYTES // len(english) + 1))[:N_BYTES]
        Path(folder, "text.txt").write_text(text, encoding="utf-8")
        Path(folder, "settings.py").write_text(SETTINGS.format(length=length), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", TIMED.format(without=without)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            encoding="utf-8",
        )
        if done.returncode != 0:
            raise RuntimeError(f"the run ended with {done.returncode}:\n{done.stderr[-2000:]}")
        assert any(Path(folder, "runs").glob("*/report.html")) != without
    wall_s, cpu_s, steps = json.loads(done.stdout.splitlines()[-1])
    return wall_s, cpu_s, steps


def main() -> None:
    """Print the medians of the ratios, and write all of them."""
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (5)")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each run (1)")
    asked = parser.parse_args()
    *_, steps = train(f'"time_budget_minutes": {asked.minutes}', without=False)  # warms up
    seconds: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for number in range(asked.rounds):
        for name in sorted(seconds, reverse=number % 2 == 1):
            wall_s, cpu_s, _ = train(f'"max_steps": {steps}', without=name == "without")
            seconds[name].append((wall_s, cpu_s))
        told = ", ".join(f"{name} {of[-1][0]:.1f} s" for name, of in seconds.items())
        say(f"{steps} steps: {told}")
    pairs = list(zip(seconds["with"], seconds["without"], strict=True))
    ratios = {
        name: [own[place] / other[place] for own, other in pairs]
        for place, name in enumerate(("wall_clock", "cpu"))
    }
    for name, of_pairs in ratios.items():
        middle = statistics.median(of_pairs)
        say(
            f"{name} with insight: {middle - 1:+.1%} (pairs {min(of_pairs) - 1:+.1%} to "
            f"{max(of_pairs) - 1:+.1%})"
        )
    device = torch.device("cpu")
    results = {"machine": machine(device), "steps": steps, "seconds": seconds, "ratios": ratios}
    say(f"written to {write_results('overhead', device, results)}")


if __name__ == "__main__":
    main()
