"""Scripts of one's own, in another folder, with the repository on PYTHONPATH."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

TRAIN_SCRIPT = """
import config_run
config_run.CUSTOM_MODE = True
config_run.DATA = "story.txt"
config_run.custom_params = {
    "num_epochs": 2,
    "batch_size": 4,
    "learning_rate": 5e-3,
    "weight_decay": 0.1,
    "eval_freq": 5,
    "eval_iter": 2,
    "max_length": 32,
    "stride": 32,
    "start_context": ["The ferry", "A bell"],
    "num_workers": 0,
    "model_overrides": {
        "n_heads": 2, "n_layers": 1, "emb_dim": 32, "drop_rate": 0.1, "qkv_bias": False
    },
}

from environment import prepare_environment
from train import train_model_simple

if __name__ == "__main__":
    env = prepare_environment()
    train_losses, val_losses, tokens_seen = train_model_simple(
        env.model,
        env.train_loader,
        env.val_loader,
        env.optimizer,
        env.device,
        num_epochs=env.train_config.num_epochs,
        eval_freq=env.train_config.eval_freq,
        eval_iter=env.train_config.eval_iter,
        start_context=env.train_config.start_context,
        tokenizer=env.tokenizer,
    )
    assert len(train_losses) == len(val_losses) == len(tokens_seen) > 2
    assert tokens_seen[-1] == 2 * sum(ids.numel() for ids, _ in env.train_loader)
    assert train_losses[-1] < train_losses[0] - 0.5
    print("learnt")
"""

LOADER_SCRIPT = """
from data import create_dataloader_v1

text = open("story.txt", encoding="utf-8").read()
loader = create_dataloader_v1(text, batch_size=2, max_length=16, stride=8, shuffle=False)
ids, targets = next(iter(loader))
assert ids.shape == targets.shape == (2, 16)
assert (ids[:, 1:] == targets[:, :-1]).all()
assert (ids[1, :8] == ids[0, 8:]).all()
print(len(loader), "batches")
"""


def run_script(folder, script, **environment):
    story = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="utf-8")
    (folder / "story.txt").write_text(story[:8000], encoding="utf-8")
    (folder / "mine.py").write_text(script, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "mine.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        encoding="utf-8",
    )


@pytest.mark.slow
def test_a_script_sets_config_run_prepares_and_trains(tmp_path):
    done = run_script(tmp_path, TRAIN_SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("learnt\n")
    assert "\nAfter epoch 2, prompt 1: The ferry" in done.stdout
    assert "\nAfter epoch 2, prompt 2: A bell" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "story.txt"]


def test_a_script_makes_a_loader_from_its_own_string(tmp_path):
    done = run_script(tmp_path, LOADER_SCRIPT, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("batches\n")
