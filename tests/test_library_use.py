"""A script of one's own, in another folder, with the repository on PYTHONPATH."""

import pytest

from tests.conftest import REPOSITORY
from tests.launching import Program

SCRIPT = """
import config_run
from data import create_dataloader_v1

config_run.CUSTOM_MODE = True
config_run.DATA, config_run.TOKENIZER = "story.txt", "char"
config_run.custom_params = {
    "num_epochs": 2,
    "batch_size": 4,
    "learning_rate": 5e-3,
    "weight_decay": 0.1,
    "eval_freq": 20,
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

    text = open("story.txt", encoding="utf-8").read()
    loader = create_dataloader_v1(text, batch_size=2, max_length=16, stride=8, shuffle=False)
    ids, targets = next(iter(loader))
    assert ids.shape == targets.shape == (2, 16)
    assert (ids[:, 1:] == targets[:, :-1]).all()
    assert (ids[1, :8] == ids[0, 8:]).all()
    print(len(loader), "batches")
"""


@pytest.mark.slow
def test_a_script_sets_config_run_prepares_and_trains_and_makes_a_loader_of_a_string(tmp_path):
    story = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="utf-8")
    (tmp_path / "story.txt").write_text(story[:4000], encoding="utf-8")
    (tmp_path / "mine.py").write_text(SCRIPT, encoding="utf-8")
    code = "import runpy\nrunpy.run_path('mine.py', run_name='__main__')"
    script = Program(tmp_path, 1, code, env={"PYTHONPATH": str(REPOSITORY)})
    assert script.process.wait(600) == 0, script.err
    assert script.out.endswith("batches\n")
    for prompt in ("prompt 1: The ferry", "prompt 2: A bell"):
        assert f"\nAfter epoch 2, {prompt}" in script.out
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"mine.py", "story.txt", "out-1", "err-1"}
