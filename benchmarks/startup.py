"""Start-up: seconds from process start to the first optimizer step, and to `import torch` alone.

    python -m benchmarks.startup [rounds]

Both are measured in turn, each in its own process; the text is in the repository.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import machine, write_results
from engine.console import say, use_utf8

REPOSITORY = Path(__file__).resolve().parent.parent
BARE = "import torch, time; print('at', time.time())"
# the real program, which a hook ends after the first optimizer step
FIRST_STEP = """
import os, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
def stop(*_):
    print("at", time.time(), flush=True)
    os._exit(0)
register_optimizer_step_post_hook(stop)
import main
sys.exit(main.main(["settings.py"]))
"""


def main(rounds: int = 5) -> None:
    """Print both medians and their difference, and write the results."""
    use_utf8()
    bare, first_step = [], []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "settings.py").write_text('DATA = "sample-en"\n', encoding="utf-8")
        for _ in range(rounds):
            bare.append(seconds_to_line(BARE, folder))
            first_step.append(seconds_to_line(FIRST_STEP, folder))
    beyond = statistics.median(first_step) - statistics.median(bare)
    for label, times in (("import torch", bare), ("first optimizer step", first_step)):
        say(f"{label:21} {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")
    say(f"{'beyond import torch':21} {beyond:.2f} s")
    device = torch.device("cpu")
    results = {"import_torch_s": bare, "first_step_s": first_step, "beyond_s": beyond}
    path = write_results("startup", device, {"machine": machine(device), **results})
    say(f"written to {path}")


def seconds_to_line(code: str, folder: str) -> float:
    """Run Python code in a new process; returns the seconds until it prints the line "at TIME"."""
    started_at = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("at ")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"the measured process failed:\n{done.stdout}\n{done.stderr}")
    return float(lines[0].split()[1]) - started_at


if __name__ == "__main__":
    if not all(argument.isdecimal() and int(argument) for argument in sys.argv[1:2]):
        sys.exit(__doc__)
    main(*map(int, sys.argv[1:2]))
