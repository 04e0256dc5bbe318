"""Checkpoints: exact when whole, refused and named when not, and never more than was asked for."""

import ast
import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from engine.errors import CheckpointError, NumericsError, ResourceError, SettingsError
from engine.optim import build_adamw, build_muon
from model import GPTConfig, GPTModel
from storage import checkpoint
from storage import files as storage
from storage.checkpoint import (
    BestWeights,
    CheckpointStore,
    SaveClock,
    assign_weights,
    copy_weights,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    read_safetensors,
    read_weights,
    safetensors_chunks,
    weights_of,
)
from tests.conftest import REPOSITORY

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
CONFIG = GPTConfig(
    vocab_size=11,
    context_length=6,
    emb_dim=4,
    n_heads=2,
    n_layers=1,
    tie_embeddings=False,
)


# what is left of a state that is long enough to be damaged in many places
STATE = {"words": [f"word {number} 春" for number in range(40)]}


def build(seed: int = 0) -> tuple[GPTModel, torch.optim.Optimizer]:
    """A tiny model that no optimizer step has changed yet."""
    torch.manual_seed(seed)
    model = GPTModel(CONFIG)
    return model, build_adamw(model, 1e-2, 0.1)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.randint(CONFIG.vocab_size, (2, CONFIG.context_length))
    model(ids).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Saved:
    """A run folder with checkpoints of the steps 1 to 3, the best weights being those of step 2."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder
        self.store = CheckpointStore(folder, "run-a", keep)
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        model, optimizer = build()
        best = None
        for step in (1, 2, 3):
            take_step(model, optimizer)
            self.weights[step] = copy_weights(model)
            best = BestWeights(2, self.weights[2]) if step >= 2 else None
            self.store.save(step, model, optimizer, STATE | {"of_step": step}, best)

    def path(self, step: int = 3) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"

    def restore(self, run_id: str = "run-a"):
        """Load into fresh weights; returns the state, the best weights and the model."""
        model, optimizer = build(seed=99)
        store = CheckpointStore(self.folder, run_id, 3)
        state, best = store.restore(model, optimizer)
        return state, best, model

    def reseal(self, **facts) -> None:
        """Write the manifest that fits the files, with these facts: a forger can do that too."""
        path = self.path()
        files = {
            name: {"bytes": (path / name).stat().st_size, "sha256": sha256(path / name)}
            for name in FILES[:3]
        }
        content = {"format": 1, "run_id": "run-a", "step": 3, "files": files} | facts
        (path / "manifest.json").write_bytes(storage._seal(content))

    def refused(self, capsys, named: str, used: int = 2) -> None:
        """The newest checkpoint is refused by name and set aside, and step `used` is loaded."""
        capsys.readouterr()
        state, best, model = self.restore()
        said = capsys.readouterr().out
        assert named in said, said
        assert str(self.path()) in said
        assert f"set aside as .bad-{self.path().name}" in said
        assert not os.path.lexists(self.path())
        assert os.path.lexists(self.path().with_name(f".bad-{self.path().name}"))
        assert state == STATE | {"of_step": used, "best_step": 2 if used >= 2 else None}
        assert same(weights_of(model), self.weights[used])
        if used >= 2:
            assert best.step == 2
            assert same(best.weights, self.weights[2])


@pytest.fixture
def saved(tmp_path, quick_disk) -> Saved:
    return Saved(tmp_path / "run")


@pytest.fixture
def quick_disk(monkeypatch):
    """No fsync: these tests damage files, and do not cut the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two groups of tensors are the same to the last bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].contiguous().flatten().view(torch.uint8).tolist()
        == other[name].contiguous().flatten().view(torch.uint8).tolist()
        for name in one
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------------------- whole ones


def test_what_is_loaded_is_what_was_saved_and_saves_to_the_same_bytes(tmp_path, quick_disk):
    one = Saved(tmp_path / "one")
    model, optimizer = build(seed=99)
    state, best = one.store.restore(model, optimizer)
    assert same(weights_of(model), one.weights[3])
    assert (best.step, state["best_step"]) == (2, 2)
    other = CheckpointStore(tmp_path / "other", "run-a", 3)
    other.save(3, model, optimizer, state, best)
    again = contents(tmp_path / "other" / "checkpoints" / "step-00000003")
    assert again == contents(one.path())
    assert again.keys() == set(FILES)
    assert contents(tmp_path / "other" / "best") == contents(one.folder / "best")


def test_a_loaded_optimizer_takes_the_same_next_steps(saved):
    model, optimizer = build()
    for _ in range(3):
        take_step(model, optimizer)
    loaded, its_optimizer = build(seed=99)
    saved.store.restore(loaded, its_optimizer)
    before = optimizer_tensors(model, optimizer)
    assert len(before) == 3 * len(weights_of(model))
    assert same(optimizer_tensors(loaded, its_optimizer), before)
    for seed in (5, 6):
        for each in ((model, optimizer), (loaded, its_optimizer)):
            torch.manual_seed(seed)
            take_step(*each)
    assert same(weights_of(loaded), weights_of(model))


def test_muon_too_goes_on_from_a_checkpoint_with_the_same_steps(tmp_path, quick_disk):
    models = [GPTModel(CONFIG) for _ in range(2)]
    optimizers = [build_muon(model, 1e-2, 0.1) for model in models]
    for _ in range(3):
        take_step(models[0], optimizers[0])
    store = CheckpointStore(tmp_path, "run-a", 2)
    store.save(3, models[0], optimizers[0], {}, None)
    path = tmp_path / "checkpoints" / "step-00000003" / "optimizer.safetensors"
    saved = safetensors.torch.load_file(path)
    assert saved["momentum_buffer.blocks.0.attention.qkv.weight"].shape == (12, 4)
    assert saved["step.head.weight"].item() == 3
    assert len(saved) == 4 + 3 * (len(weights_of(models[0])) - 4)
    assert store.restore(models[1], optimizers[1]) is not None
    assert same(optimizer_tensors(models[1], optimizers[1]), saved)
    for seed in (5, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(seed)
            take_step(model, optimizer)
    assert same(weights_of(models[1]), weights_of(models[0]))


def test_loading_leaves_the_random_generator_alone(saved):
    model, optimizer = build(seed=99)
    before = torch.get_rng_state()
    saved.store.restore(model, optimizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_programs_read_the_files(saved):
    model = safetensors.torch.load_file(saved.path() / "model.safetensors")
    assert same(model, saved.weights[3])
    moments = safetensors.torch.load_file(saved.path() / "optimizer.safetensors")
    kinds = {name.split(".")[0] for name in moments}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}
    assert moments["step.head.weight"].item() == 3
    best = safetensors.torch.load_file(
        saved.folder / "best" / "step-00000002" / "model.safetensors"
    )
    assert same(best, saved.weights[2])


def test_a_file_in_chunks_is_one_that_the_library_reads(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "fp32": torch.randn(3, 5),
        "transposed": torch.randn(4, 7).T,
        "every other": torch.randn(10)[::2],
        "fp16": torch.randn(5).half(),
        "bf16": torch.randn(3, 3).bfloat16(),
        "bf16 scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "int64": torch.arange(-3, 4),
        "int32": torch.arange(3, dtype=torch.int32),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "nothing": torch.empty(0, dtype=torch.int64),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        'name "quoted" 春\n': torch.ones(1),
    }
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"".join(safetensors_chunks(tensors)))
    assert same(safetensors.torch.load_file(path), tensors)
    assert same(read_safetensors(path), tensors)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, place in json.loads(content[8 : 8 + length]).items():
        assert place["data_offsets"][0] % tensors[name].itemsize == 0  # readers may map the file
    path.write_bytes(b"".join(safetensors_chunks({})))
    assert safetensors.torch.load_file(path) == {}


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"".join(safetensors_chunks({"a": torch.ones(1000)})))
    read = read_safetensors(path)["a"]
    with open(path, "rb+") as file:
        file.seek(200)
        file.write(b"\xff" * 2000)
    assert torch.equal(read, torch.ones(1000))


def test_a_model_compiled_in_place_has_plain_names(tmp_path, quick_disk):
    model, optimizer = build()
    take_step(model, optimizer)
    plain = weights_of(model).keys()
    model.compile()
    for block in model.blocks:
        block.compile()
    store = CheckpointStore(tmp_path, "run-a", 2)
    store.save(1, model, optimizer, {}, BestWeights(1, copy_weights(model)))
    folder = tmp_path / "checkpoints" / "step-00000001"
    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    moments = safetensors.torch.load_file(folder / "optimizer.safetensors").keys()
    assert names == plain
    assert not [name for name in (*names, *moments) if "_orig_mod" in name]
    assert store.restore(*build(seed=99)) is not None


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path, quick_disk):
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    models = [GPTModel(tied), GPTModel(tied)]
    optimizers = [build_adamw(model, 1e-2, 0.1) for model in models]
    take_step(models[0], optimizers[0])
    store = CheckpointStore(tmp_path, "run-a", 2)
    store.save(1, models[0], optimizers[0], {}, None)
    store.restore(models[1], optimizers[1])
    assert models[1].head.weight is models[1].token_embedding.weight
    assert same(models[1].state_dict(), models[0].state_dict())


# --------------------------------------------------------------------------- damaged ones


def damages(content: bytes, kind: str, count: int, chooser: random.Random):
    """As many damaged versions of a file, none like the whole one."""
    size = len(content)
    if kind == "flip":
        for bit in chooser.sample(range(8 * size), count):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            yield bytes(flipped)
    else:
        # a tail that is of zeros already is no damage
        last = len(content.rstrip(b"\0")) if kind == "zero tail" else size
        for end in chooser.sample(range(last), count):
            yield content[:end] + bytes(size - end) * (kind == "zero tail")


@pytest.mark.parametrize(
    "count", [25, pytest.param(500, marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.parametrize("kind", ["flip", "truncate", "zero tail"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    saved, capsys, name, kind, count
):
    path = saved.path() / name
    content = path.read_bytes()
    for damaged in damages(content, kind, count, random.Random(f"{name} {kind}")):
        assert damaged != content
        path.write_bytes(damaged)
        saved.refused(capsys, name)
        saved.path().with_name(f".bad-{saved.path().name}").rename(saved.path())
    path.write_bytes(content)
    assert saved.restore()[0]["of_step"] == 3


def swap(saved: Saved, one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def replace_by_symlink(path: Path) -> None:
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"not a folder")


def take_that_of_another_step(saved: Saved) -> None:
    shutil.rmtree(saved.path(3))
    saved.path(1).rename(saved.path(3))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


WAYS = {
    "two files swapped": (
        lambda s: swap(s, s.path() / "model.safetensors", s.path() / "optimizer.safetensors"),
        "model.safetensors",
    ),
    "weights of another step": (
        lambda s: shutil.copy(s.path(2) / FILES[0], s.path() / FILES[0]),
        "model.safetensors",
    ),
    "moments of another step": (
        lambda s: shutil.copy(s.path(2) / FILES[1], s.path() / FILES[1]),
        "optimizer.safetensors",
    ),
    "manifest of another step": (
        lambda s: shutil.copy(s.path(2) / FILES[3], s.path() / FILES[3]),
        "is damaged",
    ),
    "no weights": (lambda s: (s.path() / FILES[0]).unlink(), "model.safetensors is missing"),
    "no state": (lambda s: (s.path() / FILES[2]).unlink(), "state.json is missing"),
    "no manifest": (lambda s: (s.path() / FILES[3]).unlink(), "has no manifest.json"),
    "folder of another step": (take_that_of_another_step, "holds step 1"),
    "another run": (lambda s: s.reseal(run_id="run-b"), "belongs to another run"),
    "empty folder": (lambda s: empty(s.path()), "has no manifest.json"),
    "a file, not a folder": (lambda s: replace_by_file(s.path()), "step-00000003"),
    "a folder, not a file": (
        lambda s: ((s.path() / FILES[0]).unlink(), (s.path() / FILES[0]).mkdir()),
        "model.safetensors",
    ),
    "a huge manifest": (
        lambda s: (s.path() / FILES[3]).write_bytes(b" " * (2 << 20)),
        "manifest.json",
    ),
    "a deep manifest": (
        lambda s: (s.path() / FILES[3]).write_bytes(b"[" * 200_000),
        "manifest.json",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_that_is_not_what_it_should_be_is_set_aside(saved, capsys, way):
    spoil, named = WAYS[way]
    spoil(saved)
    saved.refused(capsys, named)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", [replace_by_symlink, replace_by_pipe])
def test_a_link_or_a_pipe_in_place_of_a_file_is_refused(saved, capsys, way, name):
    way(saved.path() / name)
    saved.refused(capsys, name)


@pytest.mark.parametrize(
    "name",
    ["../canary", "../../../canary", "/etc/hostname", "..\\canary", "C:\\canary", "a/b", "..", ""],
)
def test_a_manifest_that_names_files_elsewhere_is_refused_and_touches_nothing(
    saved, capsys, tmp_path, name
):
    for folder in (tmp_path, saved.folder, saved.path().parent, saved.path()):
        (folder / "canary").write_bytes(b"alive")
    (saved.path() / "..\\canary").write_bytes(b"alive")
    before = contents(tmp_path)
    canary = {"bytes": 5, "sha256": sha256(tmp_path / "canary")}
    saved.reseal(files={name: canary})
    saved.refused(capsys, "names files outside of its folder")
    after = contents(tmp_path)
    moved = saved.path().with_name(f".bad-{saved.path().name}")
    moved.rename(saved.path())
    saved.reseal()
    (saved.path() / "manifest.json").write_bytes(
        before["run/checkpoints/step-00000003/manifest.json"]
    )
    assert contents(tmp_path) == before
    assert len(after) == len(before)


def test_a_folder_with_another_name_is_left_alone_and_mentioned_once(saved, capsys):
    for name in ("step-abc", "step-3", "notes", "step-00000004.old"):
        (saved.path().parent / name).mkdir()
    (saved.path().parent / ".DS_Store").write_bytes(b"")
    capsys.readouterr()
    assert saved.restore()[0]["of_step"] == 3
    said = capsys.readouterr().out
    for name in ("step-abc", "step-3", "notes", "step-00000004.old"):
        assert said.count(f"{saved.path().parent / name} is no checkpoint; it is left alone") == 1
        assert (saved.path().parent / name).is_dir()
    assert ".DS_Store" not in said


def test_several_damaged_checkpoints_lead_to_the_last_whole_one(saved, capsys):
    (saved.path(3) / "state.json").write_bytes(b"{}")
    (saved.path(2) / "model.safetensors").unlink()
    saved.refused(capsys, "state.json", used=1)
    names = sorted(path.name for path in saved.path().parent.iterdir())
    assert names == [".bad-step-00000002", ".bad-step-00000003", "step-00000001"]


def test_where_all_are_bad_the_run_ends_with_the_list_and_never_begins_anew(saved):
    for step in (1, 2, 3):
        (saved.path(step) / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError) as caught:
        saved.restore()
    assert caught.value.exit_code == 4
    for step in (1, 2, 3):
        assert f"{saved.path(step)}/model.safetensors has 7 bytes" in str(caught.value)
    assert "Another RUN_NAME, or none and RESUME = False" in str(caught.value)
    for _ in range(2):  # nor at the next start
        with pytest.raises(CheckpointError) as caught:
            saved.restore()
        assert caught.value.exit_code == 4
        for step in (1, 2, 3):
            assert f".bad-step-{step:08d} was set aside before" in str(caught.value)


def test_where_none_was_ever_made_there_is_none(tmp_path):
    model, optimizer = build()
    before = copy_weights(model)
    assert CheckpointStore(tmp_path, "run-a", 2).restore(model, optimizer) is None
    assert same(weights_of(model), before)


@pytest.mark.parametrize("number", [2, 0, None])
def test_a_checkpoint_of_another_version_ends_the_run_and_stays_as_it_is(saved, number):
    saved.reseal(format=number)
    before = contents(saved.folder)
    with pytest.raises(CheckpointError, match="another version of this program") as caught:
        saved.restore()
    assert f"{saved.path()} has format {number}" in str(caught.value)
    assert contents(saved.folder) == before


def test_a_checkpoint_of_another_model_ends_the_run(saved):
    model = GPTModel(dataclasses.replace(CONFIG, vocab_size=12))
    with pytest.raises(CheckpointError, match="does not fit the model") as caught:
        saved.store.restore(model, build_adamw(model, 1e-2, 0.1))
    assert str(saved.path()) in str(caught.value)
    assert saved.path().is_dir()


# ------------------------------------------------------------------------ the best weights


@pytest.mark.parametrize("way", ["flip", "missing", "no folder", "empty", "another step"])
def test_lost_best_weights_are_said_and_training_goes_on_without(saved, capsys, way):
    best = saved.folder / "best" / "step-00000002"
    if way == "flip":
        content = bytearray((best / FILES[0]).read_bytes())
        content[-1] ^= 1
        (best / FILES[0]).write_bytes(content)
    elif way == "missing":
        (best / FILES[0]).unlink()
    elif way == "no folder":
        shutil.rmtree(best)
    elif way == "empty":
        empty(best)
    else:
        shutil.rmtree(best)
        shutil.copytree(saved.path(3), best)
    capsys.readouterr()
    state, found, model = saved.restore()
    assert found is None
    assert state["of_step"] == 3
    assert same(weights_of(model), saved.weights[3])
    said = capsys.readouterr().out
    assert "the best weights are lost" in said
    assert str(best) in said
    assert not best.exists()
    aside = (saved.folder / "best" / ".bad-step-00000002").is_dir()
    assert aside == (way != "no folder")
    assert ("set aside as .bad-step-00000002" in said) == aside


def test_best_weights_of_a_time_that_was_undone_do_not_stay(saved, capsys):
    # step 3 was the best; then its checkpoint is lost, and step 3 is done again, elsewhere say
    model, optimizer = build(seed=99)
    saved.store.save_best(BestWeights(3, saved.weights[3]))
    (saved.path() / "state.json").unlink()
    saved.store.restore(model, optimizer)
    take_step(model, optimizer)
    anew = copy_weights(model)
    assert not same(anew, saved.weights[3])
    saved.store.save(3, model, optimizer, {"of_step": 3}, BestWeights(3, anew))
    _, best, _ = saved.restore()
    assert same(best.weights, anew)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_never_saved(saved, value):
    model, optimizer = build()
    take_step(model, optimizer)
    with torch.no_grad():
        model.blocks[0].mlp[0].weight[1, 2] = value
    before = contents(saved.folder)
    with pytest.raises(NumericsError, match=r"after step 4 .*blocks\.0\.mlp\.0\.weight"):
        saved.store.save(4, model, optimizer, {}, BestWeights(4, copy_weights(model)))
    assert contents(saved.folder) == before


# ------------------------------------------------------------------------------ read for use


def read_for_use(saved: Saved, which: str, capsys) -> tuple[int, dict, list[str]]:
    """What read_weights() gives and says; it must leave everything as it is."""
    before = contents(saved.folder)
    capsys.readouterr()
    step, weights = read_weights(saved.folder, "run-a", which)
    assert contents(saved.folder) == before
    return step, weights, capsys.readouterr().err.splitlines()


def test_the_best_weights_and_the_last_are_read_with_their_steps(saved, capsys):
    for which, expected in (("best", 2), ("last", 3)):
        step, weights, said = read_for_use(saved, which, capsys)
        assert (step, said) == (expected, [])
        assert same(weights, saved.weights[expected])
    # what the last evaluation found after the last checkpoint had been saved
    model, _ = build(seed=7)
    saved.store.save_best(BestWeights(3, copy_weights(model)))
    step, weights, said = read_for_use(saved, "best", capsys)
    assert (step, said) == (3, [])
    assert same(weights, copy_weights(model))


def test_before_the_first_evaluation_the_best_weights_are_the_last(saved, capsys):
    shutil.rmtree(saved.folder / "best" / "step-00000002")
    for found in ([3, []], [2, []], [1, []]):
        step, weights, said = read_for_use(saved, "best", capsys)
        assert [step, said] == found
        assert same(weights, saved.weights[step])
        shutil.rmtree(saved.path(step))
    for which in ("best", "last"):
        with pytest.raises(CheckpointError, match="holds no checkpoint: the run has saved none"):
            read_weights(saved.folder, "run-a", which)
    with pytest.raises(CheckpointError, match="holds no checkpoint: the run has saved none"):
        read_weights(saved.folder / "nowhere", "run-a")


# state and moments are not read for use, so what is wrong with them does no harm there
READABLE = ("two files swapped", "moments of another step", "no state")


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_that_is_not_what_it_should_be_is_passed_over_in_one_line(saved, capsys, way):
    spoil, named = WAYS[way]
    spoil(saved)
    step, weights, said = read_for_use(saved, "last", capsys)
    if way in READABLE[1:]:
        assert (step, said) == (3, [])
    else:
        assert step == 2
        (line,) = said
        assert line.startswith("Note: ")
        assert line.endswith("; what was saved before serves instead")
        assert named in line
        assert str(saved.path()) in line
    assert same(weights, saved.weights[step])


@pytest.mark.parametrize("way", ["flip", "missing", "empty", "another step", "another run"])
def test_damaged_best_weights_are_said_in_one_line_and_others_serve(saved, capsys, way):
    saved.store.save_best(BestWeights(3, saved.weights[1]))  # beside those of step 2
    path = saved.folder / "best" / "step-00000003"
    if way == "flip":
        content = bytearray((path / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (path / "model.safetensors").write_bytes(content)
    elif way == "missing":
        (path / "model.safetensors").unlink()
    elif way == "empty":
        empty(path)
    elif way == "another step":
        shutil.rmtree(path)
        shutil.copytree(path.with_name("step-00000002"), path)
    else:
        shutil.rmtree(path)
        CheckpointStore(saved.folder, "run-b", 3).save_best(BestWeights(3, saved.weights[3]))
    step, weights, said = read_for_use(saved, "best", capsys)
    assert (step, len(said)) == (2, 1)
    assert str(path) in said[0]
    assert same(weights, saved.weights[2])
    (path.with_name("step-00000002") / "model.safetensors").write_bytes(b"rubbish")
    step, weights, said = read_for_use(saved, "best", capsys)  # none are left: the last then
    assert (step, len(said)) == (3, 2)
    assert same(weights, saved.weights[3])


def test_where_nothing_can_be_used_every_file_is_named(saved):
    files = [saved.path(step) / "model.safetensors" for step in (1, 2, 3)]
    files.append(saved.folder / "best" / "step-00000002" / "model.safetensors")
    for file in files:
        file.write_bytes(b"rubbish")
    before = contents(saved.folder)
    for which, named in (("best", files), ("last", files[:3])):
        with pytest.raises(CheckpointError) as caught:
            read_weights(saved.folder, "run-a", which)
        lines = str(caught.value).splitlines()
        assert lines[0] == f"no weights in {saved.folder} can be used:"
        assert len(lines) == 1 + len(named)
        for file in named:
            assert f"{file} has 7 bytes instead of" in str(caught.value)
    assert contents(saved.folder) == before


@pytest.mark.parametrize("number", [2, 0, None, "x" * 100_000])
def test_weights_of_another_version_are_refused_for_use_too(saved, number):
    saved.reseal(format=number)
    with pytest.raises(CheckpointError, match="another version of this program") as caught:
        read_weights(saved.folder, "run-a", "last")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("which", ["first", "", None, "Best", 3, ["last"]])
def test_only_the_best_and_the_last_weights_can_be_asked_for(saved, which):
    with pytest.raises(SettingsError, match='it must be "best" or "last"'):
        read_weights(saved.folder, "run-a", which)


LOOKS = (
    (Path, "glob"),
    (storage, "_read_manifest"),
    (storage, "_verify_file"),
    (checkpoint, "safe_open"),
)


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("place", LOOKS, ids=lambda look: look[1])
def test_what_is_removed_while_it_is_read_gives_way_to_what_is_newer(
    saved, monkeypatch, capsys, place, which
):
    """A save comes just before a look at the disk, and keeps nothing that was there."""
    model, optimizer = build(seed=7)
    store = CheckpointStore(saved.folder, "run-a", 1)
    owner, name = place
    look, saves = getattr(owner, name), 0

    def look_too_late(*arguments, **options):
        nonlocal saves
        saves += 1
        if saves == 1:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, look)
                store.save(4, model, optimizer, STATE, BestWeights(4, copy_weights(model)))
        return look(*arguments, **options)

    monkeypatch.setattr(owner, name, look_too_late)
    step, weights = read_weights(saved.folder, "run-a", which)
    assert (step, capsys.readouterr().err) == (4, "")
    assert same(weights, copy_weights(model))
    assert saves > 1 or name == "glob"


def test_a_file_that_goes_while_the_library_opens_it_is_a_missing_one(saved, monkeypatch):
    def opened_twice(path, **_):
        shutil.rmtree(path.parent)
        raise RuntimeError(f"unable to open file <{path}> in read-only mode")  # so torch says it

    monkeypatch.setattr(checkpoint, "safe_open", opened_twice)
    with pytest.raises(FileNotFoundError):
        read_safetensors(saved.path() / "model.safetensors")

    def out_of_memory(path, **_):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(checkpoint, "safe_open", out_of_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        read_weights(saved.folder, "run-a", "last")


SAVER = """
import os, sys, torch
from pathlib import Path
from torch import nn
from storage.checkpoint import BestWeights, CheckpointStore, copy_weights

torch.set_num_threads(1)
os.fsync = lambda handle: None  # as fast as it can
model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 50, bias=False))
optimizer = torch.optim.SGD(model.parameters(), 0.0)
store = CheckpointStore(Path(sys.argv[1]), "run-a", keep=1)
best, step = None, 0
while True:
    step += 1
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(step)
    if step % 3 == 1:
        best = BestWeights(step, copy_weights(model))
    store.save(step, model, optimizer, {}, best)
    if step == 1:
        print("saving", flush=True)
"""


@pytest.mark.parametrize(
    "reads", [50, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_beside_a_program_that_saves_every_read_is_of_one_step_and_none_goes_back(tmp_path, reads):
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
    )
    try:
        assert saver.stdout.readline() == b"saving\n"
        seen: dict[str, list[int]] = {"best": [], "last": []}
        for _ in range(reads):
            for which, steps in seen.items():
                step, weights = read_weights(tmp_path, "run-a", which)
                assert sorted(weights) == ["0.bias", "0.weight", "1.weight"]
                assert {
                    number for value in weights.values() for number in value.unique().tolist()
                } == {step}
                steps.append(step)
        assert saver.poll() is None, "it was to save all the time"
    finally:
        saver.kill()
        saver.wait()
        saver.stdout.close()
    for which, steps in seen.items():
        assert steps == sorted(steps), which
        assert len(set(steps)) > reads / 10, "too few saves between the reads to show anything"
    assert {step % 3 for step in seen["best"]} == {1}


# --------------------------------------------------------------------------------- hostile


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.write_text, (self.canary, "executed"))


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_with_a_right_manifest_is_refused_and_not_run(
    saved, capsys, tmp_path, name, writer
):
    canary = tmp_path / "canary"
    bomb = {"model": Bomb(canary)}
    if writer == "pickle":
        (saved.path() / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, saved.path() / name)
    saved.reseal()
    saved.refused(capsys, "can't be read")
    assert not canary.exists()
    pickle.loads(pickle.dumps(bomb))
    assert canary.exists()  # it would have been seen


def file_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return size.to_bytes(8, "little") + header + data


def entry(dtype: str = "F32", shape: object = (11, 4), offsets: object = (0, 176)) -> bytes:
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps({"head.weight": tensor}).encode()


HEADER_99_MB = "a header of 99 MB, all blanks"
HOSTILE = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header of 16 EB": file_of(b"{}", length=2**64 - 1),
    "a header longer than the file": file_of(b"{}", length=10_000),
    HEADER_99_MB: file_of(b"{" + b" " * 99_000_000 + b"}"),
    "a header of blanks": file_of(b" " * 64),
    "no object": file_of(b"[1, 2]"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "deep": file_of(b"[" * 100_000 + b"]" * 100_000),
    "deep values": file_of(b'{"a": ' * 100_000 + b"1" + b"}" * 100_000),
    "one name twice": file_of(entry()[:-1] + b", " + entry()[1:], bytes(176)),
    "negative offsets": file_of(entry(offsets=(-176, 0)), bytes(176)),
    "offsets past the end": file_of(entry(offsets=(0, 10**15)), bytes(176)),
    "offsets backwards": file_of(entry(offsets=(176, 0)), bytes(176)),
    "offsets that begin late": file_of(entry(offsets=(4, 180)), bytes(180)),
    "a shape of 2 ** 63": file_of(entry(shape=(2**63, 2**63)), bytes(176)),
    "a shape that overflows to 0": file_of(entry(shape=(2**32, 2**32), offsets=(0, 0))),
    "a negative shape": file_of(entry(shape=(-11, -4)), bytes(176)),
    "a shape in fractions": file_of(entry(shape=(11.0, 4.0)), bytes(176)),
    "a shape of words": file_of(entry(shape="eleven"), bytes(176)),
    "an unknown type": file_of(entry(dtype="F31"), bytes(176)),
    "a type that is no name": file_of(entry(dtype=["F32"]), bytes(176)),
    "half of a byte": file_of(entry(dtype="F4", shape=(11, 32)), bytes(176)),
    "complex numbers": file_of(entry(dtype="C64", shape=(22,)), bytes(176)),
    "bytes after the end": file_of(entry(), bytes(1000)),
    "metadata of numbers": file_of(b'{"__metadata__": {"a": 1}}'),
    "no tensors": file_of(b"{}"),
    "one tensor of many": file_of(entry(), bytes(176)),
    "overlapping": file_of(
        json.dumps(
            {
                name: {"dtype": "F32", "shape": [11, 4], "data_offsets": [0, 176]}
                for name in ("head.weight", "token_embedding.weight")
            }
        ).encode(),
        bytes(176),
    ),
}


def is_refused(saved: Saved) -> bool:
    """Whether step 3 was not loaded, in one of the two ways there are to say so."""
    try:
        return saved.restore()[0].get("of_step") == 2
    except CheckpointError as error:
        assert str(saved.path()) in str(error)
        return True


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model.safetensors", kind) for kind in HOSTILE]
    # an optimizer that has left out each of its steps has no state, and may have no tensors
    + [
        ("optimizer.safetensors", kind)
        for kind in HOSTILE
        if kind not in ("no tensors", HEADER_99_MB)
    ],
)
def test_a_hostile_tensor_file_with_a_right_manifest_is_refused(saved, name, kind):
    (saved.path() / name).write_bytes(HOSTILE[kind])
    saved.reseal()
    assert is_refused(saved)


@pytest.mark.parametrize(
    "count", [50, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.parametrize("name", FILES[:3])
def test_mutations_with_a_right_manifest_end_in_no_other_way(saved, name, count):
    chooser = random.Random(name)
    good = (saved.path() / name).read_bytes()
    aside = saved.path().with_name(f".bad-{saved.path().name}")
    header = 8 + int.from_bytes(good[:8], "little") if name != "state.json" else len(good)
    pieces = [b"-", b"9" * 30, b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"1e999", b"\\u"]
    refused = 0
    for _ in range(count):
        content = bytearray(good)
        for _ in range(chooser.randrange(1, 4)):
            place = chooser.randrange(header - 12)
            if chooser.random() < 0.5:
                content[place] = chooser.randrange(256)
            else:
                content[place : place + chooser.randrange(4)] = chooser.choice(pieces)
        (saved.path() / name).write_bytes(content)
        saved.reseal()
        refused += is_refused(saved)
        if aside.exists():
            aside.rename(saved.path())
    assert refused > count / 3


@pytest.mark.parametrize(
    "facts",
    [
        {"step": None},
        {"step": "3"},
        {"step": 3.5},
        {"step": -3},
        {"step": 10**40},
        {"step": [3]},
        {"step": 2},
        {"run_id": None},
        {"files": {}},
    ],
    ids=str,
)
def test_a_manifest_with_odd_facts_and_a_right_seal_is_refused(saved, capsys, facts):
    saved.reseal(**facts)
    saved.refused(capsys, "step-00000003")


@pytest.mark.parametrize(
    "state",
    [b"[]", b"null", b"{}", b"{", b'"x"', b"[" * 100_000, b'{"best_step": ' + b"9" * 5000 + b"}"]
    + [b'{"best_step": %s}' % step for step in (b'"x"', b'"../x"', b"1.5", b"[]")],
    ids=range(11),
)
def test_a_state_that_is_none_with_a_right_manifest_is_refused(saved, capsys, state):
    (saved.path() / "state.json").write_bytes(state)
    saved.reseal()
    saved.refused(capsys, "step-00000003")


def test_nothing_in_the_project_can_load_a_pickle():
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = []
    sources = [
        path
        for path in REPOSITORY.rglob("*.py")
        if not {"tests", "cache", "runs"} & set(path.relative_to(REPOSITORY).parts)
        and not any(part.startswith((".", "venv")) for part in path.relative_to(REPOSITORY).parts)
    ]
    assert len(sources) > 20
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names} & banned
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]} & banned
                if (node.module or "").split(".")[0] == "torch":
                    names |= {alias.name for alias in node.names} & {"load", "save"}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "torch" and node.attr in ("load", "save", "package"):
                    names = {f"torch.{node.attr}"}
                if node.attr in ("load_checkpoint", "load_state_dict_from_url", "read_pickle"):
                    names = {node.attr}
            elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                names = {node.arg}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id} & {"eval", "exec"}
            found += [f"{path.relative_to(REPOSITORY)}: {name}" for name in names]
    assert found == []


# ------------------------------------------------------------------------- what is kept


class Weight(nn.Module):
    """The smallest model there is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def follow_a_random_history(folder: Path, chooser: random.Random) -> None:
    """Save, evaluate and start again at random; what is on the disk is what the rule says."""
    keep = chooser.randrange(2, 5)
    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    store = CheckpointStore(folder, "run-a", keep)
    step, best, kept = 0, None, []  # kept: (step, step of the best weights then)
    for _ in range(chooser.randrange(3, 12)):
        action = chooser.choice(("better", "worse", "save", "save", "reopen"))
        if action != "reopen":
            step += chooser.randrange(1, 3)
            model.weight.data.fill_(step)
        if action == "better":
            best = BestWeights(step, copy_weights(model))
        elif action == "save":
            store.save(step, model, optimizer, {}, best)
            kept = [*kept, (step, best.step if best else None)][-keep:]
        elif action == "reopen":
            store = CheckpointStore(folder, "run-a", keep)
            found = store.restore(model, optimizer)
            assert (found is None) == (not kept)
            step, best_step = kept[-1] if kept else (0, None)
            best = found[1] if found else None
            assert (best.step if best else None) == best_step
            assert best is None or best.weights["weight"].item() == best_step
            assert not kept or model.weight.item() == step
        assert sorted(os.listdir(store.checkpoints)) == [f"step-{s:08d}" for s, _ in kept]
        named = sorted({f"step-{b:08d}" for _, b in kept if b is not None})
        assert sorted(os.listdir(store.best)) == named


@pytest.mark.parametrize(
    "count", [50, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_the_last_checkpoints_and_their_best_weights_are_kept_and_nothing_else(
    tmp_path, quick_disk, count
):
    for number in range(count):
        follow_a_random_history(tmp_path / str(number), random.Random(number))


def test_a_saved_checkpoint_leaves_what_it_did_not_make(saved):
    for name in ("notes.txt", "step-abc"):
        (saved.path().parent / name).write_text("mine")
    model, optimizer = build()
    for step in (4, 5, 6, 7):
        take_step(model, optimizer)
        saved.store.save(step, model, optimizer, {}, None)
    left = sorted(path.name for path in saved.path().parent.iterdir())
    assert left == ["notes.txt", "step-00000005", "step-00000006", "step-00000007", "step-abc"]


def test_what_a_killed_program_left_is_removed_at_the_next_start(saved):
    for parent in (saved.path().parent, saved.folder / "best"):
        for name in (".tmp-1-step-00000004", ".del-1-step-00000001"):
            (parent / name).mkdir()
            (parent / name / "model.safetensors").write_bytes(b"half")
    before = contents(saved.path())
    CheckpointStore(saved.folder, "run-a", 3)
    assert not list(saved.folder.rglob(".*"))
    assert contents(saved.path()) == before


# ---------------------------------------------------------------------------- when to save


class Clock:
    """A clock that goes on only when it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        fake = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(checkpoint, "time", fake)

    def save(self, clock: SaveClock, seconds: float) -> None:
        began_at = self.now
        self.now += seconds
        clock.note(began_at)


@pytest.mark.parametrize("every", [1, 3, 10])
def test_a_checkpoint_is_due_every_so_many_steps(monkeypatch, every):
    time = Clock(monkeypatch)
    clock = SaveClock(every, minutes=1e-9)
    due = []
    for step in range(1, 31):
        time.now += 1000
        if clock.is_due(step):
            due.append(step)
            time.save(clock, 500)  # however long that takes
    assert due == list(range(every, 31, every))


@pytest.mark.parametrize("minutes", [0.5, 5])
def test_by_time_a_checkpoint_is_due_every_so_many_minutes(monkeypatch, minutes):
    time = Clock(monkeypatch)
    clock = SaveClock(None, minutes)
    saves = []
    while time.now < 1000 + 100 * 60 * minutes:
        time.now += 1
        if clock.is_due(1):
            saves.append(time.now)
            time.save(clock, 0.1)
    between = [late - early for early, late in zip([1000.0, *saves], saves, strict=False)]
    assert len(saves) >= 98
    assert min(between) >= 60 * minutes
    assert max(between) <= 60 * minutes + 1.2


@pytest.mark.parametrize("cost", [1.0, 7.0, 30.0])
def test_saving_by_time_never_takes_more_than_its_share(monkeypatch, cost):
    time = Clock(monkeypatch)
    clock = SaveClock(None, minutes=1)
    spent, saves = 0.0, 0
    while time.now < 1000 + 50_000:
        time.now += 1
        if clock.is_due(1):
            time.save(clock, cost)
            spent, saves = spent + cost, saves + 1
            # the first one's cost is not known before
            assert saves == 1 or spent <= 0.02 * (time.now - 1000)
    assert saves >= 0.8 * min(50_000 / (60 + cost), 0.02 * 50_000 / cost)


# ------------------------------------------------------------------------------- the disk


def test_a_save_that_the_disk_has_no_room_for_is_refused_before_it_begins(saved, monkeypatch):
    model, optimizer = build()
    take_step(model, optimizer)
    usage = namedtuple("usage", "total used free")
    free = 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))
    before = contents(saved.folder)
    for best in (None, BestWeights(4, copy_weights(model))):
        with pytest.raises(ResourceError) as caught:
            saved.store.save(4, model, optimizer, {}, best)
        assert "the checkpoint of step 4 takes 0.0 MB" in str(caught.value)
        assert "0 MB free" in str(caught.value)
        assert caught.value.exit_code == 6
        assert contents(saved.folder) == before
    free = 10**6
    saved.store.save(4, model, optimizer, {}, None)


def test_room_for_the_best_weights_is_asked_for_too(saved, monkeypatch):
    model, optimizer = build()
    take_step(model, optimizer)
    size = sum(value.nbytes for value in weights_of(model).values())
    moments = sum(value.nbytes for value in optimizer_tensors(model, optimizer).values())
    usage = namedtuple("usage", "total used free")
    free = size + moments + size // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free))
    before = contents(saved.folder)
    with pytest.raises(ResourceError):
        saved.store.save(4, model, optimizer, {}, BestWeights(4, copy_weights(model)))
    assert contents(saved.folder) == before
    saved.store.save(4, model, optimizer, {}, BestWeights(2, saved.weights[2]))  # it is there


def test_a_run_asks_for_room_for_all_it_will_keep(tmp_path, monkeypatch):
    model = nn.Linear(1000, 1000, bias=False)  # 4 MB
    usage = namedtuple("usage", "total used free")
    free = 47_999_999
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free))
    store = CheckpointStore(tmp_path, "run-a", 2)
    with pytest.raises(ResourceError) as caught:
        store.require_room(model)
    assert "keeping 2 checkpoints and a new one takes 48.0 MB" in str(caught.value)
    assert str(tmp_path / "checkpoints") in str(caught.value)
    free = 48_000_000
    store.require_room(model)


# --------------------------------------------------------------------- tensors of others


def test_weights_that_do_not_fit_are_refused_by_name():
    model, _ = build()
    good = copy_weights(model)
    for bad in (
        {name: value for name, value in good.items() if name != "head.weight"},
        good | {"head.bias": torch.zeros(11)},
        good | {"head.weight": torch.zeros(4, 11)},
        good | {"head.weight": torch.zeros(11, 4, dtype=torch.bfloat16)},
        good | {"head.weight": torch.zeros(11, 4, dtype=torch.float64)},
        good | {"head.weight": torch.zeros(11, 4, dtype=torch.complex64)},
        good | {"head.weight": torch.zeros(11, 4, dtype=torch.float8_e5m2)},
    ):
        with pytest.raises(CheckpointError, match=r"^a place does not fit the model: head\."):
            load_weights(model, bad, "a place")
        assert same(weights_of(model), good)
        with torch.device("meta"):
            empty = GPTModel(CONFIG)
        with pytest.raises(CheckpointError, match=r"^a place does not fit the model: head\."):
            assign_weights(empty, bad, "a place")
        assert all(value.device.type == "meta" for value in empty.parameters())


def test_names_of_any_length_make_no_message_of_any_length():
    model, optimizer = build()
    long = {"x" * 100_000: torch.zeros(1)}
    for load in (load_weights, assign_weights):
        with pytest.raises(CheckpointError, match=r"x{80}") as caught:
            load(model, copy_weights(model) | long, "a place")
        assert len(str(caught.value)) < 300
    with pytest.raises(CheckpointError, match=r"x{80}") as caught:
        load_optimizer(model, optimizer, long, "a place")
    assert len(str(caught.value)) < 300


def test_moments_that_do_not_fit_are_refused_by_name():
    model, optimizer = build()
    take_step(model, optimizer)
    good = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    for name, value in (
        ("exp_avg.head.bias", torch.zeros(11)),
        ("exp_avg.head.weight", torch.zeros(4, 11)),
        ("exp_avg.head.weight", torch.zeros(())),
        ("step.head.weight", torch.zeros(11, 4)),
        ("nonsense", torch.zeros(())),
    ):
        with pytest.raises(CheckpointError, match=rf"^a place does not fit the model: {name}"):
            load_optimizer(model, optimizer, good | {name: value}, "a place")
        assert same(optimizer_tensors(model, optimizer), good)


@pytest.mark.parametrize(
    ("build_optimizer", "left_out"),
    [
        (build_adamw, "step.head.weight"),
        (build_adamw, ".head.weight"),
        (build_adamw, "exp_avg_sq.final_norm"),
        (build_muon, "step.head.weight"),
        (build_muon, ".head.weight"),
        (build_muon, "momentum_buffer.blocks.0.mlp.0.weight"),
        (build_muon, "momentum_buffer."),
    ],
)
def test_moments_of_some_parameters_only_are_refused(build_optimizer, left_out):
    model = GPTModel(CONFIG)
    optimizer = build_optimizer(model, 1e-2, 0.1)
    take_step(model, optimizer)
    good = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    some = {name: value for name, value in good.items() if left_out not in name}
    assert 0 < len(some) < len(good)
    with pytest.raises(CheckpointError, match="it lacks state of a parameter"):
        load_optimizer(model, optimizer, some, "a place")
    assert same(optimizer_tensors(model, optimizer), good)
