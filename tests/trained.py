"""A tiny trained run for tests of what reads one, and what they change in its folder."""

import contextlib
import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import environment
import main
import storage.cache
from model import GPTConfig, GPTModel
from storage.checkpoint import CheckpointStore
from text.tokenizer import Tokenizer
from training import journal

TEXT = "the river carries the bell and the bell carries the river. 钟声 " * 12
SETTINGS = {
    "RUN_NAME": "one",
    "DATA": "text.txt",
    "TOKENIZER": "char",
    "CUSTOM_MODE": True,
    "PRECISION": "fp32",
    "COMPILE": False,
    "sampling_params": {"max_new_tokens": 3, "temperature": 0.5},
    "custom_params": {
        "max_steps": 4,
        "batch_size": 2,
        "max_length": 16,
        "eval_freq": 2,
        "eval_iter": 1,
        "save_every": 1,
        "keep_checkpoints": 3,  # more than a spare one: a finished run keeps them all
        "start_context": "the",
        "model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1},
    },
}


@dataclass
class Trained:
    """A run's folder, and the model as training left it."""

    path: Path
    model: torch.nn.Module
    tokenizer: Tokenizer


def train_run(folder: Path, **settings) -> Trained:
    """Train the run "one" of four steps in this process, the last its best, in folder/runs."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    lines = [f"{name} = {value!r}\n" for name, value in (SETTINGS | settings).items()]
    (folder / "settings.py").write_text("".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(storage.cache, "CACHE", folder / "cache")
        patch.setattr(journal, "render_losses", lambda **_: None)  # most of the time otherwise
        patch.setattr(os, "fsync", lambda handle: None)  # nobody cuts the power here
        env = environment.prepare_environment("settings.py")
        main.run_pipeline(env)
        return Trained(env.run.path.resolve(), env.model.eval(), env.tokenizer)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_settings(run: Path, **changes) -> None:
    """Change settings.json; None takes a name out."""
    settings = read(run / "settings.json") | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    (run / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


def listing(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: kind, size, time and sha256 of each entry."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        entry = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (entry.st_mode, entry.st_size, entry.st_mtime_ns, content)
    return found


def remade(run: Path, tokenizer: Tokenizer, **overrides) -> GPTModel:
    """Give a run's folder other weights, as those of step 9, and the tokenizer they are for."""
    record = read(run / "settings.json")
    sizes = {name: record["model"][name] for name in ("context_length", "emb_dim", "n_heads")}
    config = GPTConfig(**sizes, n_layers=1, vocab_size=tokenizer.vocab_size, **overrides)
    model = GPTModel(config).eval()
    optimizer = torch.optim.SGD(model.parameters())
    CheckpointStore(run, record["run_id"], 2).save(9, model, optimizer, {}, None)
    edit_settings(run, model=dataclasses.asdict(config), tokenizer=tokenizer.fingerprint)
    if tokenizer.kind != "gpt2":  # which needs no file
        (run / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return model
