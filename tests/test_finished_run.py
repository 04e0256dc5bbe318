"""What a finished run keeps on the disk, and that it can still be made longer."""

import os
from pathlib import Path

import pytest
import torch

from model import GPTConfig, GPTModel
from storage import files
from storage.checkpoint import BestWeights, CheckpointStore, copy_weights, read_weights
from storage.files import verify_folder

CONFIG = GPTConfig(vocab_size=11, context_length=4, emb_dim=4, n_heads=2, n_layers=1)
MODEL = "model.safetensors"


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nobody cuts the power here


class Run:
    """Three steps, each saved before its evaluation; the weights of each step."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.store = folder, CheckpointStore(folder, "run-a", keep)
        self.model = GPTModel(CONFIG)
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.weights = {}
        best = None
        for step in (1, 2, 3):
            with torch.no_grad():
                self.model.head.weight += step
            self.store.save(step, self.model, self.optimizer, {"of_step": step}, best)
            self.weights[step] = copy_weights(self.model)
            best = BestWeights(step, self.weights[step])

    def kept(self) -> dict[str, list[int]]:
        """The steps of its checkpoints and best weights, all of them whole."""
        found = {}
        for place in ("checkpoints", "best"):
            folders = sorted((self.folder / place).iterdir())
            for folder in folders:
                verify_folder(folder)
            found[place] = [int(folder.name.removeprefix("step-")) for folder in folders]
        return found

    def restored(self) -> tuple[dict, BestWeights | None]:
        model = GPTModel(CONFIG)
        return self.store.restore(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize(
    ("best", "kept", "restored"),
    [
        # the last evaluation, which comes after the last save, found the best weights
        (3, {"checkpoints": [3], "best": [3]}, None),
        (2, {"checkpoints": [3], "best": [2]}, 2),
    ],
)
def test_a_finished_run_keeps_one_checkpoint_and_the_best_weights(
    tmp_path, capsys, best, kept, restored
):
    run = Run(tmp_path, keep=2)
    assert run.kept() == {"checkpoints": [2, 3], "best": [1, 2]}
    for _ in range(2):  # a start of the finished run does it again
        run.store.save_best(BestWeights(best, run.weights[best]))
        assert run.kept() == kept
    step, weights = read_weights(tmp_path, "run-a")
    assert step == best
    assert all(torch.equal(weights[name], value) for name, value in run.weights[best].items())
    found = run.restored()
    assert found[0]["of_step"] == 3
    assert (found[1] and found[1].step) == restored
    assert capsys.readouterr() == ("", "")


def test_more_checkpoints_than_a_spare_one_are_kept_as_asked(tmp_path):
    run = Run(tmp_path, keep=3)
    run.store.save_best(BestWeights(3, run.weights[3]))
    assert run.kept() == {"checkpoints": [1, 2, 3], "best": [1, 2, 3]}
    assert run.restored()[1].step == 2


@pytest.mark.parametrize("case", ["shared", "other weights", "damaged", "no links"])
def test_equal_weights_share_one_file_and_others_never_do(tmp_path, monkeypatch, case):
    run = Run(tmp_path, keep=2)
    last = tmp_path / "checkpoints" / "step-00000003" / MODEL
    best = tmp_path / "best" / "step-00000003" / MODEL
    weights = run.weights[2 if case == "other weights" else 3]
    if case == "damaged":
        last.write_bytes(last.read_bytes()[:-1] + b"?")
    if case == "no links":

        def refuse(*_):
            raise OSError("this file system has no links")

        monkeypatch.setattr(files.os, "link", refuse)
    run.store.save_best(BestWeights(3, weights))
    assert best.samefile(last) == (case == "shared")
    verify_folder(best.parent)
    assert all(
        torch.equal(value, weights[name])
        for name, value in read_weights(tmp_path, "run-a")[1].items()
    )
