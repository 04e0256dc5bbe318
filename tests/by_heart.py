"""A tiny run that has a story by heart, for programs that continue texts, and their ends."""

import dataclasses
import io
import json
import os
import time
from pathlib import Path

import pytest
import torch

import environment
from engine.errors import BusyError
from storage.files import FolderLock
from tests.conftest import train_in

POEM = "春江潮水连海平，海上明月共潮生。"
# what the model has by heart: wide characters, joined emoji, and orders to a terminal
STORY = f"The ferry crossed.\n{POEM}\n👩‍🚀😀 \x1b[31mred\x1b[0m\x07\x9b1m end."
SHOWN = f"The ferry crossed.\n{POEM}\n👩‍🚀😀 [31mred[0m1m end."
ENDLESS = "啦la " * 16  # goes on like this, and fills the context alone
CONTEXT = 48  # in characters
SETTINGS = f"""
CUSTOM_MODE = True
DATA = {{"path": "train.jsonl", "val": "val.jsonl"}}
TOKENIZER = "char"
custom_params = {{
    "max_steps": 180,
    "batch_size": 8,
    "max_length": {CONTEXT},
    "learning_rate": 0.01,
    "warmup_steps": 5,
    "eval_freq": 180,
    "eval_iter": 1,
    "start_context": "The",
    "model_overrides": {{"n_heads": 2, "n_layers": 2, "emb_dim": 32, "drop_rate": 0.0}},
}}
sampling_params = {{"max_new_tokens": 100, "temperature": 0.0}}
DEVICE = "cpu"
PRECISION = "fp32"
RUN_NAME = "tiny"
COMPILE = False
"""
ON_POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has neither SIGINT nor ptys")
_trained: list[Path] = []


def tiny_run(factory: pytest.TempPathFactory) -> Path:
    """A run that has STORY by heart, and ENDLESS without an end; pytest's workers share it.

    By heart is what any processor's rounding leaves the likeliest: what follows on other prompts
    is for a test to compute.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "by-heart"
    folder.mkdir(exist_ok=True)
    while not _trained:
        try:
            with FolderLock(folder):
                if not (folder / "checked").exists():
                    _train(folder)
                    (folder / "checked").touch()
                _trained.append(folder / "runs" / "tiny")
        except BusyError:  # another worker trains it
            time.sleep(0.1)
    return _trained[0]


def _train(folder: Path) -> None:
    documents = ([STORY] * 50 + ["啦la " * 700]) * 8
    for name, texts in ("train.jsonl", documents), ("val.jsonl", [f"{STORY}\n{STORY}"]):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / name).write_text(lines, encoding="utf-8")
    run = train_in(folder, SETTINGS)
    (run / "training_losses.png").write_bytes(b"a picture")
    loaded = environment.load_run(run, weights="fp32")
    for text in (STORY, ENDLESS):
        ids = loaded.tokenizer.encode(text)
        # from the beginning, as prompts of the tests have it, and in the middle after 24 tokens
        windows = [(9, ids[:48]), *((24, ids[at : at + 48]) for at in range(len(ids) - 47))]
        with torch.no_grad():
            logits = loaded.model(torch.tensor([window for _, window in windows]))
        for (known, window), probabilities in zip(windows, logits.softmax(-1), strict=True):
            of_next = probabilities[range(known - 1, 47), window[known:]]
            assert of_next.min() > 0.6, f"not by heart: {of_next.min():.2f}"


def program(name: str, *arguments: str, first: str = "") -> str:
    """The code of a process that is scripts/NAME.py, after what a test does to its streams."""
    streams = "sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w')"
    return (
        f"import os, sys\n{first}\n{streams}\nsys.argv = {['program', *arguments]!r}\n"
        f"from scripts import {name}, options\noptions.run_program({name}.main)"
    )


class Terminal(io.TextIOWrapper):
    def __init__(self, typed: bytes = b"") -> None:
        super().__init__(io.BytesIO(typed), encoding="utf-8")

    def isatty(self) -> bool:
        return True


@dataclasses.dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def samples(self) -> list[dict]:
        return [json.loads(line) for line in self.out.split("\n") if line]
