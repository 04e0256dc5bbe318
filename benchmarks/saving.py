"""The time to save a checkpoint of the 124M model, and from SIGTERM to a saved run's exit.

    python -m benchmarks.saving [rounds]

The first is timed in this process, as a share of the default interval between checkpoints; the
second in runs of main.py (batches of 4 x 256 tokens), each stopped at another moment.
"""

import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import machine, write_results
from engine.console import say, use_utf8
from engine.optim import build_adamw
from engine.precision import choose_precision
from environment import pick_device
from model import GPTConfig, GPTModel
from planning.plan import MODELS_FILE, read_models
from storage.checkpoint import BestWeights, CheckpointStore, copy_weights
from storage.files import verify_folder
from training.learner import take_step
from training_utils import TrainingConfig

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS = """
DATA = "dummy"
CUSTOM_MODE = True
MODEL = "gpt2-124m"
RUN_NAME = "stopped"
custom_params = {"batch_size": 4, "max_length": 256, "eval_iter": 1, "start_context": "a"}
"""


def main(rounds: int = 5) -> None:
    """Print both times and write the results."""
    use_utf8()
    device = pick_device(None)
    with tempfile.TemporaryDirectory() as folder:
        saves, n_bytes = time_saves(Path(folder), device, rounds)
        stops = [time_stop(Path(folder, f"run-{seed}"), seed) for seed in range(rounds)]
    save_s = statistics.median(saves)
    interval_s = 60 * TrainingConfig().save_minutes
    share = save_s / (interval_s + save_s)
    say(
        f"a checkpoint of the 124M model, {n_bytes / 1e9:.2f} GB with the best weights: "
        f"{save_s:.1f} s (median of {rounds}), {share:.1%} of the time at one every "
        f"{interval_s:.0f} s"
    )
    say(f"SIGTERM to saved and ended: {', '.join(f'{s:.1f}' for s in sorted(stops))} s")
    results = {
        "machine": machine(device),
        "save_s": saves,
        "bytes": n_bytes,
        "share_of_time": share,
        "sigterm_s": stops,
    }
    say(f"written to {write_results('saving', device, results)}")


def time_saves(folder: Path, device: torch.device, rounds: int) -> tuple[list[float], int]:
    """The seconds of each save of a 124M model with new best weights, and the bytes of one."""
    models, _ = read_models(MODELS_FILE)
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50257, **models["gpt2-124m"] | {"context_length": 256})
    model = GPTModel(config).to(device)
    optimizer = build_adamw(model, learning_rate=1e-4, weight_decay=0.1)
    ids, targets = torch.randint(50257, (2, 1, 8), device=device)
    take_step(model, [(ids, targets)], optimizer, choose_precision("auto", device), 1.0)
    store = CheckpointStore(folder, "benchmark", keep=2)
    seconds = []
    for step in range(1, rounds + 1):
        best = BestWeights(step, copy_weights(model))
        began_at = time.perf_counter()
        store.save(step, model, optimizer, {"step": step}, best)
        seconds.append(time.perf_counter() - began_at)
    newest = store.newest()
    assert newest is not None, "it has just been saved"
    files = [*newest.iterdir(), *folder.glob(f"best/*{rounds}/*")]
    n_bytes = sum(path.stat().st_size for path in files)
    return seconds, n_bytes


def time_stop(folder: Path, seed: int) -> float:
    """The seconds from SIGTERM, at a random moment of training, to the exit of the saved run."""
    folder.mkdir()
    (folder / "settings.py").write_text(SETTINGS, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "main.py"), "settings.py"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    assert process.stdout is not None, "it is a pipe"
    for line in process.stdout:
        if line.startswith("Before training: a"):  # the sample just before the first step
            break
    time.sleep(random.Random(seed).uniform(4, 12))
    began_at = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    seconds = time.perf_counter() - began_at
    assert process.returncode == 143, process.returncode
    (newest,) = (folder / "runs" / "stopped" / "checkpoints").glob("step-*")
    verify_folder(newest)
    return seconds


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
