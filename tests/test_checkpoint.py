"""Checkpoints: exact when whole, refused and named when not, and never more than was asked for."""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import types
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from engine.errors import CheckpointError, NumericsError, ResourceError
from engine.optim import build_adamw, build_muon
from engine.settings import shown
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
from tests.faults.saving import forked
from tests.hostile import HOSTILE_TENSORS, Canary, file_of, mutated

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
SIZES = {"vocab_size": 11, "context_length": 6, "emb_dim": 4, "n_heads": 2, "n_layers": 1}
CONFIG = GPTConfig(**SIZES, tie_embeddings=False)
STATE = {"words": ["春", "word"] * 40}


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

    def __init__(self, folder: Path, original: "Saved | None" = None) -> None:
        self.folder, self.original = folder, original
        if original:
            shutil.copytree(original.folder, folder)
        self.store = CheckpointStore(folder, "run-a", 3)
        self.weights = original.weights if original else self.train()

    def train(self) -> dict[int, dict[str, torch.Tensor]]:
        """Save the three; returns the weights of each."""
        model, optimizer = build()
        weights = {}
        for step in (1, 2, 3):
            take_step(model, optimizer)
            weights[step] = copy_weights(model)
            best = BestWeights(2, weights[2]) if step >= 2 else None
            self.store.save(step, model, optimizer, STATE | {"of_step": step}, best)
        return weights

    def path(self, step: int = 3) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"

    def restore(self):
        """Load into fresh weights; returns the state, the best weights and the model."""
        model, optimizer = build(seed=99)
        state, best = CheckpointStore(self.folder, "run-a", 3).restore(model, optimizer)
        return state, best, model

    def reseal(self, **facts) -> None:
        """Write the manifest that fits the files, with these facts: a forger can do that too."""
        files = {name: (self.path() / name).read_bytes() for name in FILES[:3]}
        sealed = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        }
        content = {"format": 1, "run_id": "run-a", "step": 3, "files": sealed} | facts
        (self.path() / "manifest.json").write_bytes(storage._seal(content))

    def refused(self, capsys, named: str) -> None:
        """The newest checkpoint is refused by name and set aside, and the one before is loaded."""
        capsys.readouterr()
        state, best, model = self.restore()
        said = capsys.readouterr().out
        assert named in said, said
        assert len(said) < 1000
        assert str(self.path()) in said
        assert f"set aside as .bad-{self.path().name}" in said
        assert not os.path.lexists(self.path())
        assert os.path.lexists(self.path().with_name(f".bad-{self.path().name}"))
        assert state == STATE | {"of_step": 2, "best_step": 2}
        assert same(weights_of(model), self.weights[2])
        assert best.step == 2
        assert same(best.weights, self.weights[2])

    def renew(self) -> None:
        """Put the newest checkpoint back as it was."""
        aside = self.path().with_name(f".bad-{self.path().name}")
        for path in (aside, self.path()):
            if path.exists():
                shutil.rmtree(path)
        shutil.copytree(self.original.path(), self.path())


@pytest.fixture
def quick_disk(monkeypatch):
    """No fsync: these tests damage files, and do not cut the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Saved:
    """What each test has a copy of."""
    return Saved(tmp_path_factory.mktemp("original") / "run")


@pytest.fixture
def saved(original, tmp_path, quick_disk) -> Saved:
    return Saved(tmp_path / "run", original)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two groups of tensors are the same to the last bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].contiguous().flatten().view(torch.uint8).tolist()
        == other[name].contiguous().flatten().view(torch.uint8).tolist()
        for name in one
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---------------------------------------------------------------------------- whole ones


def test_what_is_loaded_is_what_was_saved_and_saves_to_the_same_bytes(saved, tmp_path):
    model, optimizer = build(seed=99)
    before = torch.get_rng_state()
    state, best = saved.store.restore(model, optimizer)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(weights_of(model), saved.weights[3])
    assert (best.step, state["best_step"]) == (2, 2)
    other = CheckpointStore(tmp_path / "other", "run-a", 3)
    other.save(3, model, optimizer, state, best)
    again = contents(tmp_path / "other" / "checkpoints" / "step-00000003")
    assert again == contents(saved.path())
    assert again.keys() == set(FILES)
    assert contents(tmp_path / "other" / "best") == contents(saved.folder / "best")
    # other programs read the files
    assert same(safetensors.torch.load_file(saved.path() / FILES[0]), saved.weights[3])
    moments = safetensors.torch.load_file(saved.path() / FILES[1])
    assert {name.split(".")[0] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert moments["step.head.weight"].item() == 3
    best_file = saved.folder / "best" / "step-00000002" / FILES[0]
    assert same(safetensors.torch.load_file(best_file), saved.weights[2])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("build_optimizer", [build_adamw, build_muon])
def test_a_loaded_optimizer_takes_the_same_next_steps(tmp_path, quick_disk, build_optimizer, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    models = [GPTModel(config) for _ in range(2)]
    optimizers = [build_optimizer(model, 1e-2, 0.1) for model in models]
    for _ in range(3):
        take_step(models[0], optimizers[0])
    store = CheckpointStore(tmp_path, "run-a", 2)
    store.save(3, models[0], optimizers[0], {}, None)
    path = tmp_path / "checkpoints" / "step-00000003"
    before = safetensors.torch.load_file(path / "optimizer.safetensors")
    assert same(optimizer_tensors(models[0], optimizers[0]), before)
    n_weights = len(safetensors.torch.load_file(path / "model.safetensors"))
    assert n_weights == len(list(models[0].parameters()))  # those that are tied once
    # Muon has one buffer for each matrix of the blocks
    assert len(before) == 3 * n_weights - 8 * (build_optimizer is build_muon)
    assert store.restore(models[1], optimizers[1]) is not None
    assert same(optimizer_tensors(models[1], optimizers[1]), before)
    for seed in (5, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(seed)
            take_step(model, optimizer)
    assert same(models[1].state_dict(), models[0].state_dict())
    assert (models[1].head.weight is models[1].token_embedding.weight) == tied


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
    read = read_safetensors(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, place in json.loads(content[8 : 8 + length]).items():
        assert place["data_offsets"][0] % tensors[name].itemsize == 0  # readers may map the file
    path.write_bytes(b"\xff" * len(content))
    assert same(read, tensors)  # what was read does not change with the file
    path.write_bytes(b"".join(safetensors_chunks({})))
    assert safetensors.torch.load_file(path) == {}


def test_a_model_compiled_in_place_has_plain_names():
    model, _ = build()
    plain = weights_of(model).keys()
    model.compile(backend="eager")
    model.blocks[0].compile(backend="eager")
    assert weights_of(model).keys() == plain
    assert not [name for name in plain if "_orig_mod" in name]


# --------------------------------------------------------------------------- damaged ones


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 4]) + content[-4:]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(saved, capsys, name):
    """test_storage flips a bit of each byte."""
    content = (saved.path() / name).read_bytes()
    for damaged in (flipped(content), content[:-1], content[:20] + bytes(len(content) - 20)):
        (saved.path() / name).write_bytes(damaged)
        saved.refused(capsys, name)
        saved.renew()
    assert saved.restore()[0]["of_step"] == 3


def replace_by_symlink(path: Path) -> None:
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_folder(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir()


def name_a_file_elsewhere(saved: Saved) -> None:
    (saved.folder / "canary").write_bytes(b"alive")
    canary = {"bytes": 5, "sha256": hashlib.sha256(b"alive").hexdigest()}
    saved.reseal(files={"../../canary": canary})


MODEL, OPTIMIZER, STATE_FILE, MANIFEST = FILES
WAYS = {
    "weights of another step": (lambda s: shutil.copy(s.path(2) / MODEL, s.path()), MODEL),
    "moments of another step": (lambda s: shutil.copy(s.path(2) / OPTIMIZER, s.path()), OPTIMIZER),
    "manifest of another step": (lambda s: shutil.copy(s.path(2) / MANIFEST, s.path()), "damaged"),
    "no weights": (lambda s: (s.path() / MODEL).unlink(), f"{MODEL} is missing"),
    "no state": (lambda s: (s.path() / STATE_FILE).unlink(), f"{STATE_FILE} is missing"),
    "no manifest": (lambda s: (s.path() / MANIFEST).unlink(), f"has no {MANIFEST}"),
    "a huge manifest": (lambda s: (s.path() / MANIFEST).write_bytes(b" " * (2 << 20)), MANIFEST),
    "folder of another step": (
        lambda s: (shutil.rmtree(s.path()), s.path(1).rename(s.path())),
        "holds step 1",
    ),
    "empty folder": (lambda s: replace_by_folder(s.path()), f"has no {MANIFEST}"),
    "a file, not a folder": (
        lambda s: (shutil.rmtree(s.path()), s.path().write_bytes(b"no folder")),
        "step-00000003",
    ),
    "a folder, not a file": (lambda s: replace_by_folder(s.path() / MODEL), MODEL),
    "a link": (lambda s: replace_by_symlink(s.path() / MODEL), MODEL),
    "a file elsewhere": (name_a_file_elsewhere, "names files outside of its folder"),
    "another run": (lambda s: s.reseal(run_id="run-b"), "belongs to another run"),
    "no run": (lambda s: s.reseal(run_id=None), "belongs to another run"),
    "no files": (lambda s: s.reseal(files={}), f"does not name {MODEL}"),
}
for step in (2, None, "3", 3.5, -3, 10**40, [3], "9" * 100_000):
    forge = functools.partial(Saved.reseal, step=step)
    WAYS[f"step {step!r}"[:20]] = forge, f"holds step {step!r}"[:20]
# state and moments are not read for use, so what is wrong with them does no harm there
HARMLESS_FOR_USE = ("moments of another step", "no state")


def read_for_use(saved: Saved, which: str, capsys) -> tuple[int, dict, list[str]]:
    """What read_weights() gives and says; it must leave everything as it is."""
    before = contents(saved.folder)
    capsys.readouterr()
    step, weights = read_weights(saved.folder, "run-a", which)
    assert contents(saved.folder) == before
    return step, weights, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_that_is_not_what_it_should_be_is_passed_over_or_set_aside(saved, capsys, way):
    if way == "a link" and os.name == "nt":
        pytest.skip("links of POSIX")
    spoil, named = WAYS[way]
    spoil(saved)
    step, weights, said = read_for_use(saved, "last", capsys)
    assert same(weights, saved.weights[step])
    if way in HARMLESS_FOR_USE:
        assert (step, said) == (3, [])
    else:
        assert step == 2
        (line,) = said
        assert line.startswith("Note: ")
        assert line.endswith("; what was saved before serves instead")
        assert named in line
        assert str(saved.path()) in line
        assert len(line) < 1000
    saved.refused(capsys, named)


def test_a_folder_with_another_name_is_left_alone_and_mentioned_once(saved, capsys):
    names = ("step-abc", "step-3", "notes", "step-00000004.old")
    for name in names:
        (saved.path().parent / name).mkdir()
    (saved.path().parent / ".DS_Store").write_bytes(b"")
    capsys.readouterr()
    assert saved.restore()[0]["of_step"] == 3
    said = capsys.readouterr().out
    for name in names:
        assert said.count(f"{saved.path().parent / name} is no checkpoint; it is left alone") == 1
        assert (saved.path().parent / name).is_dir()
    assert ".DS_Store" not in said


def test_several_damaged_checkpoints_lead_to_the_last_whole_one_but_never_to_a_new_run(saved):
    (saved.path(3) / "state.json").write_bytes(b"{}")
    (saved.path(2) / "model.safetensors").unlink()
    state, best, model = saved.restore()
    assert (state, best) == (STATE | {"of_step": 1, "best_step": None}, None)
    assert same(weights_of(model), saved.weights[1])
    names = sorted(path.name for path in saved.path().parent.iterdir())
    assert names == [".bad-step-00000002", ".bad-step-00000003", "step-00000001"]
    (saved.path(1) / "model.safetensors").write_bytes(b"rubbish")
    for start in range(3):
        with pytest.raises(CheckpointError) as caught:
            saved.restore()
        assert caught.value.exit_code == 4
        assert "Another RUN_NAME, or none and RESUME = False" in str(caught.value)
        for step in (1, 2, 3):
            is_new = (start, step) == (0, 1)
            later = f".bad-step-{step:08d} was set aside before"
            named = f"{saved.path(1)}/model.safetensors has 7 bytes" if is_new else later
            assert named in str(caught.value)


@pytest.mark.parametrize("number", [2, 0, None, "x" * 100_000], ids=lambda n: str(n)[:9])
def test_a_checkpoint_of_another_version_ends_the_run_and_stays_as_it_is(saved, number):
    saved.reseal(format=number)
    before = contents(saved.folder)
    for read in (saved.restore, lambda: read_weights(saved.folder, "run-a", "last")):
        with pytest.raises(CheckpointError, match="another version of this program") as caught:
            read()
        assert f"{saved.path()} has format {shown(number)}" in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert contents(saved.folder) == before


def test_a_checkpoint_of_another_model_ends_the_run(saved, tmp_path):
    model = GPTModel(dataclasses.replace(CONFIG, vocab_size=12))
    optimizer, before = build_adamw(model, 1e-2, 0.1), copy_weights(model)
    with pytest.raises(CheckpointError, match=f"{saved.path()} does not fit the model"):
        saved.store.restore(model, optimizer)
    assert saved.path().is_dir()
    # where none was ever made there is none
    assert CheckpointStore(tmp_path / "new", "run-a", 2).restore(model, optimizer) is None
    assert same(weights_of(model), before)


# ------------------------------------------------------------------------ the best weights


def take_another(best: Path, other: Path) -> None:
    shutil.rmtree(best)
    shutil.copytree(other, best)


def of_another_run(saved: Saved, best: Path) -> None:
    shutil.rmtree(best)
    CheckpointStore(saved.folder, "run-b", 3).save_best(BestWeights(2, saved.weights[2]))


BEST_WAYS = {
    "flip": lambda s, best: (best / MODEL).write_bytes(flipped((best / MODEL).read_bytes())),
    "missing": lambda s, best: (best / MODEL).unlink(),
    "empty": lambda s, best: replace_by_folder(best),
    "another step": lambda s, best: take_another(best, s.path(3)),
    "another run": of_another_run,
    "no folder": lambda s, best: shutil.rmtree(best),
}


@pytest.mark.parametrize("way", BEST_WAYS)
def test_lost_best_weights_are_said_and_training_goes_on_without(saved, capsys, way):
    best = saved.folder / "best" / "step-00000002"
    BEST_WAYS[way](saved, best)
    is_there = way != "no folder"
    step, weights, said = read_for_use(saved, "best", capsys)  # the last serve then
    assert (step, len(said)) == (3, is_there)
    assert str(best) in "".join(said) or not is_there
    assert same(weights, saved.weights[3])
    state, found, model = saved.restore()
    assert found is None
    assert state["of_step"] == 3
    assert same(weights_of(model), saved.weights[3])
    said = capsys.readouterr().out
    assert "the best weights are lost" in said
    assert str(best) in said
    assert not best.exists()
    assert (saved.folder / "best" / ".bad-step-00000002").is_dir() == is_there
    assert ("set aside as .bad-step-00000002" in said) == is_there


def test_best_weights_of_a_time_that_was_undone_do_not_stay(saved):
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


def test_a_weight_that_is_not_finite_is_never_saved(saved):
    model, optimizer = build()
    take_step(model, optimizer)
    before = contents(saved.folder)
    for value in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            model.blocks[0].mlp[0].weight[1, 2] = value
        with pytest.raises(NumericsError, match=r"after step 4 .*blocks\.0\.mlp\.0\.weight"):
            saved.store.save(4, model, optimizer, {}, BestWeights(4, copy_weights(model)))
        assert contents(saved.folder) == before


# ------------------------------------------------------------------------------ read for use


def test_the_best_weights_and_the_last_are_read_with_their_steps(saved, capsys):
    def expect(which: str, step: int, of_step: int, named: str = "") -> None:
        found, weights, said = read_for_use(saved, which, capsys)
        assert (found, len(said)) == (step, bool(named))
        assert named in "".join(said)
        assert same(weights, saved.weights[of_step])

    expect("best", 2, 2)
    expect("last", 3, 3)
    # what the last evaluation found after the last checkpoint had been saved
    saved.store.save_best(BestWeights(3, saved.weights[1]))
    expect("best", 3, 1)
    newest = saved.folder / "best" / "step-00000003"
    (newest / MODEL).unlink()  # older ones serve where the newest are damaged
    expect("best", 2, 2, named=str(newest))
    shutil.rmtree(saved.folder / "best")
    for step in (3, 2, 1):  # before the first evaluation the best are the last
        expect("best", step, step)
        shutil.rmtree(saved.path(step))
    for folder in (saved.folder, saved.folder / "nowhere"):
        for which in ("best", "last"):
            with pytest.raises(CheckpointError, match="holds no checkpoint: the run has saved non"):
                read_weights(folder, "run-a", which)


def test_where_nothing_can_be_used_every_file_is_named(saved):
    files = [saved.path(step) / "model.safetensors" for step in (1, 2, 3)]
    files.append(saved.folder / "best" / "step-00000002" / "model.safetensors")
    for file in files:
        file.write_bytes(b"rubbish")
    for which, named in (("best", files), ("last", files[:3])):
        with pytest.raises(CheckpointError) as caught:
            read_weights(saved.folder, "run-a", which)
        lines = str(caught.value).splitlines()
        assert lines[0] == f"no weights in {saved.folder} can be used:"
        assert len(lines) == 1 + len(named)
        for file in named:
            assert f"{file} has 7 bytes instead of" in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
@pytest.mark.parametrize("name", ["best", "checkpoints", "best/step-00000002"])
def test_a_link_in_place_of_a_folder_gives_the_same_weights(saved, tmp_path, capsys, name):
    """Somebody may keep checkpoints on another disk; what is read must be sealed all the same."""
    shutil.move(saved.folder / name, tmp_path / "elsewhere")
    (saved.folder / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for which, expected in (("best", 2), ("last", 3)):
        step, weights, said = read_for_use(saved, which, capsys)
        assert (step, said) == (expected, [])
        assert same(weights, saved.weights[expected])
    for file in (tmp_path / "elsewhere").rglob(MODEL):
        file.write_bytes(flipped(file.read_bytes()))
    if name == "checkpoints":
        with pytest.raises(CheckpointError, match="can be used"):
            read_weights(saved.folder, "run-a", "last")
    else:
        step, _, said = read_for_use(saved, "best", capsys)
        assert (step, len(said)) == (3, 1)


MANIFESTS, FILES_OF_IT = (storage, "_read_manifest"), (storage, "_verify_file")
LOOKS = ((Path, "glob"), MANIFESTS, FILES_OF_IT, (checkpoint, "safe_open"))


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize(("owner", "name"), LOOKS)
def test_what_is_removed_while_it_is_read_gives_way_to_what_is_newer(
    saved, monkeypatch, capsys, owner, name, which
):
    """A save comes just before a look at the disk, and keeps nothing that was there."""
    model, optimizer = build(seed=7)
    store = CheckpointStore(saved.folder, "run-a", 1)
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


def save_for_ever(folder: Path) -> None:
    """Save weights that are all the step's number, every third time as the best."""
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 50, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    store = CheckpointStore(folder, "run-a", 1)
    best, step = None, 0
    while True:
        step += 1
        with torch.no_grad():
            for value in model.parameters():
                value.fill_(step)
        if step % 3 == 1:
            best = BestWeights(step, copy_weights(model))
        store.save(step, model, optimizer, {}, best)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_beside_a_program_that_saves_every_read_is_of_one_step_and_none_goes_back(
    tmp_path, quick_disk
):
    saver = forked(lambda: save_for_ever(tmp_path))
    try:
        while not list(tmp_path.glob("checkpoints/step-*")):
            assert os.waitpid(saver, os.WNOHANG) == (0, 0)
        seen: dict[str, list[int]] = {"best": [], "last": []}
        while any(len(set(steps)) < 30 for steps in seen.values()):
            assert os.waitpid(saver, os.WNOHANG) == (0, 0), "it was to save all the time"
            for which, steps in seen.items():
                step, weights = read_weights(tmp_path, "run-a", which)
                assert sorted(weights) == ["0.bias", "0.weight", "1.weight"]
                assert {n for value in weights.values() for n in value.unique().tolist()} == {step}
                steps.append(step)
    finally:
        os.kill(saver, signal.SIGKILL)
        os.waitpid(saver, 0)
    for which, steps in seen.items():
        assert steps == sorted(steps), which
    assert {step % 3 for step in seen["best"]} == {1}


# --------------------------------------------------------------------------------- hostile


def test_a_pickle_with_a_right_manifest_is_refused_and_not_run(saved, capsys, tmp_path):
    canary = Canary(tmp_path / "canary")
    torch.save({"model": canary}, tmp_path / "bomb")
    for content in (pickle.dumps({"model": canary}), (tmp_path / "bomb").read_bytes()):
        for name in FILES[:3]:
            (saved.path() / name).write_bytes(content)
            saved.reseal()
            saved.refused(capsys, "can't be read")
            saved.renew()
    assert not canary.path.exists()
    pickle.loads(pickle.dumps(canary))
    assert canary.path.exists()  # it would have been seen


def test_hostile_tensor_files_are_refused(tmp_path):
    model, optimizer = build()
    path = tmp_path / "model.safetensors"
    for kind, content in HOSTILE_TENSORS.items():
        path.write_bytes(content)
        with pytest.raises((SafetensorError, CheckpointError)):
            print(kind, load_weights(model, read_safetensors(path), path))
        # an optimizer that has left out each of its steps has no state, and may have no tensors
        if kind not in ("no tensors", "a header of blanks"):
            with pytest.raises((SafetensorError, CheckpointError)):
                print(kind, load_optimizer(model, optimizer, read_safetensors(path), path))


TYPES = {"F64": 8, "I64": 8, "U8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "C64": 8, "F8_E4M3": 1}


def test_weights_of_another_type_are_refused(tmp_path):
    model, _ = build()
    path = tmp_path / "model.safetensors"
    for dtype in (*TYPES, "F4"):
        header, start = {}, 0
        for name, value in model.named_parameters():
            shape, n_bytes = list(value.shape), value.numel() * TYPES.get(dtype, 1)
            if dtype == "F4":  # two in a byte, which torch counts as one
                shape[-1] *= 2
            offsets = [start, start + n_bytes]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            start += n_bytes
        path.write_bytes(file_of(json.dumps(header).encode(), bytes(start)))
        with pytest.raises((SafetensorError, CheckpointError), match="not fp32"):
            load_weights(model, read_safetensors(path), path)


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_mutations_with_a_right_manifest_end_in_no_other_way(saved, name, count):
    chooser = random.Random(name)
    good = (saved.path() / name).read_bytes()
    header = 8 + int.from_bytes(good[:8], "little") if name != "state.json" else len(good)
    refused = 0
    for _ in range(count):
        (saved.path() / name).write_bytes(mutated(good[:header], chooser) + good[header:])
        saved.reseal()
        try:
            refused += saved.restore()[0].get("of_step") == 2
        except CheckpointError as error:
            assert str(saved.path()) in str(error)
            refused += 1
        saved.renew()
    assert count / 3 < refused


def test_a_state_that_is_none_with_a_right_manifest_is_refused(saved, capsys):
    states = [b"[]", b"null", b"{}", b"{", b'"x"', b"[" * 100_000]
    steps = [b"9" * 5000, b'"x"', b'"../x"', b"1.5", b"[]"]
    for state in [*states, *(b'{"best_step": %s}' % step for step in steps)]:
        (saved.path() / "state.json").write_bytes(state)
        saved.reseal()
        saved.refused(capsys, "step-00000003")
        saved.renew()


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


def test_the_last_checkpoints_and_their_best_weights_are_kept_and_nothing_else(
    tmp_path, quick_disk
):
    for number in range(40):
        follow_a_random_history(tmp_path / str(number), random.Random(number))


def test_only_what_a_killed_program_left_is_removed_at_the_next_start(saved):
    for parent in (saved.path().parent, saved.folder / "best"):
        for name in (".tmp-1-step-00000004", ".del-1-step-00000001"):
            (parent / name).mkdir()
            (parent / name / "model.safetensors").write_bytes(b"half")
    (saved.path().parent / "step-abc").write_text("mine")
    before = contents(saved.path())
    store = CheckpointStore(saved.folder, "run-a", 3)
    assert not list(saved.folder.rglob(".*"))
    assert contents(saved.path()) == before
    model, optimizer = build()
    for step in (4, 5, 6, 7):
        store.save(step, model, optimizer, {}, None)
    left = sorted(path.name for path in saved.path().parent.iterdir())
    assert left == ["step-00000005", "step-00000006", "step-00000007", "step-abc"]


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


@pytest.mark.parametrize(("minutes", "cost"), [(0.5, 0.1), (5, 0.1), (1, 1.0), (1, 7.0), (1, 30.0)])
def test_by_time_a_checkpoint_is_due_when_it_is_time_and_takes_its_share(
    monkeypatch, minutes, cost
):
    time = Clock(monkeypatch)
    clock = SaveClock(None, minutes)
    last_at, saves, late = time.now, 0, []
    while time.now < 1000 + 30_000:
        time.now += 1
        if clock.is_due(1):
            late.append(time.now - last_at - 60 * minutes)
            time.save(clock, cost)
            last_at, saves = time.now, saves + 1
            # the first one's cost is not known before
            assert saves == 1 or saves * cost <= 0.02 * (time.now - 1000)
    assert min(late) >= 0
    assert cost > 0.1 or max(late) <= 1.1
    assert saves >= 0.8 * min(30_000 / (60 * minutes + cost), 0.02 * 30_000 / cost)


# ------------------------------------------------------------------------------- the disk


@pytest.fixture
def disk(monkeypatch) -> types.SimpleNamespace:
    """A disk with as many bytes free as its attribute says."""
    usage = namedtuple("usage", "total used free")
    disk = types.SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, disk.free))
    return disk


def test_a_save_that_the_disk_has_no_room_for_is_refused_before_it_begins(saved, disk):
    model, optimizer = build()
    take_step(model, optimizer)
    size = sum(value.nbytes for value in weights_of(model).values())
    moments = sum(value.nbytes for value in optimizer_tensors(model, optimizer).values())
    before = contents(saved.folder)
    new_best = BestWeights(4, copy_weights(model))
    for free, best in ((1000, None), (1000, new_best), (size + moments + size // 2, new_best)):
        disk.free = free
        with pytest.raises(
            ResourceError, match=r"the checkpoint of step 4 takes 0\.0 MB"
        ) as caught:
            saved.store.save(4, model, optimizer, {}, best)
        assert "0 MB free" in str(caught.value)
        assert caught.value.exit_code == 6
        assert contents(saved.folder) == before
    saved.store.save(4, model, optimizer, {}, BestWeights(2, saved.weights[2]))  # it is there


def test_a_run_asks_for_room_for_all_it_will_keep(tmp_path, disk):
    model = nn.Linear(1000, 1000, bias=False)  # 4 MB
    disk.free = 47_999_999
    store = CheckpointStore(tmp_path, "run-a", 2)
    with pytest.raises(ResourceError) as caught:
        store.require_room(model)
    assert "keeping 2 checkpoints and a new one takes 48.0 MB" in str(caught.value)
    assert str(tmp_path / "checkpoints") in str(caught.value)
    disk.free = 48_000_000
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
        good | {"head." + "x" * 100_000: torch.zeros(1)},
    ):
        with torch.device("meta"):
            empty = GPTModel(CONFIG)
        for load, target in ((load_weights, model), (assign_weights, empty)):
            match = r"^a place does not fit the model: head\."
            with pytest.raises(CheckpointError, match=match) as caught:
                load(target, bad, "a place")
            assert len(str(caught.value)) < 300
        assert same(weights_of(model), good)
        assert all(value.device.type == "meta" for value in empty.parameters())


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
        ("x" * 100_000, torch.zeros(())),
    ):
        match = f"^a place does not fit the model: {name[:80]}"
        with pytest.raises(CheckpointError, match=match) as caught:
            load_optimizer(model, optimizer, good | {name: value}, "a place")
        assert len(str(caught.value)) < 300
        assert same(optimizer_tensors(model, optimizer), good)


SHARED = ("step.head.weight", ".head.weight")
LEFT_OUT = {build_adamw: (*SHARED, "exp_avg_sq.final_norm")}
LEFT_OUT[build_muon] = (*SHARED, "momentum_buffer.blocks.0.mlp.0.weight", "momentum_buffer.")


@pytest.mark.parametrize(
    ("maker", "left_out"), [(maker, name) for maker, names in LEFT_OUT.items() for name in names]
)
def test_moments_of_some_parameters_only_are_refused(maker, left_out):
    model = GPTModel(CONFIG)
    optimizer = maker(model, 1e-2, 0.1)
    take_step(model, optimizer)
    good = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    some = {name: value for name, value in good.items() if left_out not in name}
    assert 0 < len(some) < len(good)
    with pytest.raises(CheckpointError, match="it lacks state of a parameter"):
        load_optimizer(model, optimizer, some, "a place")
    assert same(optimizer_tensors(model, optimizer), good)
