"""Checkpoints: exact when whole, refused and named when not, and never more than was asked for."""

import contextlib
import dataclasses
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

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
from tests.faults.saving import Tree, read_tree, write_tree
from tests.hostile import HOSTILE_TENSORS, reseal

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
MODEL, OPTIMIZER, STATE_FILE, MANIFEST = FILES
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


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two groups of tensors are the same to the last bit, as the library writes them."""
    first, second = (
        safetensors.torch.save({name: value.contiguous() for name, value in group.items()})
        for group in (one, other)
    )
    return first == second


class Saved:
    """A run folder with checkpoints of the steps 1 to 3, the best weights being those of step 2."""

    def __init__(self, folder: Path, weights: dict[int, dict], files: Tree) -> None:
        self.folder, self.weights, self.files = folder, weights, files
        write_tree(files, folder)
        self.store = CheckpointStore(folder, "run-a", 3)

    def path(self, step: int = 3) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"

    def restore(self):
        """Load into fresh weights; returns the state, the best weights and the model."""
        model, optimizer = build(seed=99)
        return *CheckpointStore(self.folder, "run-a", 3).restore(model, optimizer), model

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
        self.renew()

    def renew(self) -> None:
        """Put everything back as it was."""
        shutil.rmtree(self.folder)
        write_tree(self.files, self.folder)


@pytest.fixture
def quick_disk(monkeypatch):
    """No fsync, for these tests do not cut the power, and no threads for files this small."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    serial = contextlib.nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(storage, "ThreadPoolExecutor", lambda n_threads: serial)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[dict[int, dict], Tree]:
    """The weights of each step, and the files of such a run."""
    folder = tmp_path_factory.mktemp("original")
    (model, optimizer), weights = build(), {}
    for step in (1, 2, 3):
        take_step(model, optimizer)
        weights[step] = copy_weights(model)
        best = BestWeights(2, weights[2]) if step >= 2 else None
        state = STATE | {"of_step": step}
        CheckpointStore(folder, "run-a", 3).save(step, model, optimizer, state, best)
    return weights, read_tree(folder)


@pytest.fixture
def saved(original, tmp_path, quick_disk) -> Saved:
    return Saved(tmp_path / "run", *original)


def test_what_is_loaded_is_what_was_saved_and_saves_to_the_same_bytes(saved, tmp_path):
    model, optimizer = build(seed=99)
    before = torch.get_rng_state()
    state, best = saved.store.restore(model, optimizer)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(weights_of(model), saved.weights[3])
    assert (best.step, state["best_step"]) == (2, 2)
    other = CheckpointStore(tmp_path / "other", "run-a", 3)
    other.save(3, model, optimizer, state, best)
    again = read_tree(tmp_path / "other" / "checkpoints" / "step-00000003")
    assert again == read_tree(saved.path())
    assert again.keys() == set(FILES)
    assert read_tree(tmp_path / "other" / "best") == read_tree(saved.folder / "best")
    # other programs read the files
    assert same(safetensors.torch.load_file(saved.path() / MODEL), saved.weights[3])
    best_file = saved.folder / "best" / "step-00000002" / MODEL
    assert same(safetensors.torch.load_file(best_file), saved.weights[2])
    moments = safetensors.torch.load_file(saved.path() / OPTIMIZER)
    assert {name.split(".")[0] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert moments["step.head.weight"].item() == 3


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
    before = safetensors.torch.load_file(path / OPTIMIZER)
    assert same(optimizer_tensors(models[0], optimizers[0]), before)
    n_weights = len(safetensors.torch.load_file(path / MODEL))
    assert n_weights == len(list(models[0].parameters()))  # those that are tied once
    # Muon has one buffer for each matrix of the blocks
    assert len(before) == 3 * n_weights - 8 * (build_optimizer is build_muon)
    assert store.restore(models[1], optimizers[1]) is not None
    assert same(optimizer_tensors(models[1], optimizers[1]), before)
    for seed in (5, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(seed)
            take_step(model, optimizer)
    assert same(weights_of(models[1]), weights_of(models[0]))
    assert (models[1].head.weight is models[1].token_embedding.weight) == tied


def test_a_file_in_chunks_is_one_that_the_library_reads(tmp_path):
    torch.manual_seed(0)
    bf16 = [torch.randn(3, 3).bfloat16(), torch.tensor(2.5, dtype=torch.bfloat16)]
    integers = [torch.arange(-3, 4, dtype=dtype) for dtype in (torch.int64, torch.int32)]
    integers.append(torch.arange(7, dtype=torch.uint8))
    fp32 = [torch.randn(3, 5), torch.randn(4, 7).T, torch.randn(10)[::2], torch.tensor(3.5)]
    odd = [torch.empty(0, 4), torch.empty(0, dtype=torch.int64), torch.randn(5).half()]
    odd.append(torch.tensor([float("nan"), float("inf"), -0.0]))
    tensors = {str(i): value for i, value in enumerate(bf16 + integers + fp32 + odd)}
    tensors['name "quoted" 春\n'] = torch.ones(1)
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


@pytest.mark.slow
def test_a_model_compiled_in_place_has_plain_names():
    model, _ = build()
    plain = weights_of(model).keys()
    model.compile(backend="eager")
    model.blocks[0].compile(backend="eager")
    assert weights_of(model).keys() == plain
    assert not [name for name in plain if "_orig_mod" in name]


def flip(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])


def replace_by(other: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder) if other.is_dir() else shutil.copy(other, folder)


# what happens to the newest checkpoint and its folder, and what is said then
WAYS = {  # test_storage has all that may be wrong with files and manifests themselves
    "manifest of another step": (lambda s, p: shutil.copy(s.path(2) / MANIFEST, p), "damaged"),
    "no weights": (lambda s, p: (p / MODEL).unlink(), f"{MODEL} is missing"),
    "no manifest": (lambda s, p: (p / MANIFEST).unlink(), f"has no {MANIFEST}"),
    "folder of another step": (lambda s, p: replace_by(s.path(1), p), "holds step 1"),
    "a file, not a folder": (lambda s, p: replace_by(s.path(2) / MODEL, p), "step-00000003"),
    "another run": (lambda s, p: reseal(p, run_id="run-b"), "belongs to another run"),
    "no run": (lambda s, p: reseal(p, run_id=None), "belongs to another run"),
    "no files": (lambda s, p: reseal(p, files={}), f"does not name {MODEL}"),
} | {f"{name} flipped": (lambda s, p, name=name: flip(p / name), name) for name in FILES}
for step in (2, None, "3", 3.5, -3, 10**40, [3], "9" * 100_000):
    forge = lambda s, p, step=step: reseal(p, step=step)  # noqa: E731
    WAYS[f"step {step!r}"[:20]] = forge, f"holds step {step!r}"[:20]


def read_for_use(saved: Saved, which: str, capsys) -> tuple[int, dict, list[str]]:
    """What read_weights() gives and says; it must leave everything as it is."""
    before = read_tree(saved.folder)
    capsys.readouterr()
    step, weights = read_weights(saved.folder, "run-a", which)
    assert read_tree(saved.folder) == before
    return step, weights, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_that_is_not_what_it_should_be_is_passed_over_or_set_aside(saved, capsys, way):
    spoil, named = WAYS[way]
    spoil(saved, saved.path())
    step, weights, said = read_for_use(saved, "last", capsys)
    assert same(weights, saved.weights[step])
    if named.startswith((OPTIMIZER, STATE_FILE)):  # which are not read for use
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
    others = [saved.path().with_name(name) for name in ("step-abc", "step-3", "step-00000004.old")]
    for other in others:
        other.mkdir()
    (saved.path().parent / ".DS_Store").write_bytes(b"")
    capsys.readouterr()
    assert saved.restore()[0]["of_step"] == 3
    said = capsys.readouterr().out
    for other in others:
        assert said.count(f"{other} is no checkpoint; it is left alone") == 1
        assert other.is_dir()
    assert ".DS_Store" not in said


def test_several_damaged_checkpoints_lead_to_the_last_whole_one_but_never_to_a_new_run(saved):
    (saved.path(3) / STATE_FILE).write_bytes(b"{}")
    (saved.path(2) / MODEL).unlink()
    state, best, model = saved.restore()
    assert (state, best) == (STATE | {"of_step": 1, "best_step": None}, None)
    assert same(weights_of(model), saved.weights[1])
    names = sorted(path.name for path in saved.path().parent.iterdir())
    assert names == [".bad-step-00000002", ".bad-step-00000003", "step-00000001"]
    (saved.path(1) / MODEL).write_bytes(b"rubbish")
    for start in range(3):
        with pytest.raises(CheckpointError) as caught:
            saved.restore()
        assert caught.value.exit_code == 4
        assert "Another RUN_NAME, or none and RESUME = False" in str(caught.value)
        told = [f".bad-step-{step:08d} was set aside before" for step in (3, 2, 1)]
        if start == 0:
            told[2] = f"{saved.path(1)}/{MODEL} has 7 bytes"
        assert all(said in str(caught.value) for said in told)


def test_a_checkpoint_of_another_version_ends_the_run_and_stays_as_it_is(saved):
    for number in (2, 0, None, "x" * 100_000):
        reseal(saved.path(), format=number)
        before = read_tree(saved.folder)
        for read in (saved.restore, lambda: read_weights(saved.folder, "run-a", "last")):
            with pytest.raises(CheckpointError, match="another version of this program") as caught:
                read()
            assert f"{saved.path()} has format {shown(number)}" in str(caught.value)
            assert len(str(caught.value)) < 1000
            assert read_tree(saved.folder) == before


def test_a_checkpoint_of_another_model_ends_the_run(saved, tmp_path):
    model = GPTModel(dataclasses.replace(CONFIG, vocab_size=12))
    optimizer, before = build_adamw(model, 1e-2, 0.1), copy_weights(model)
    with pytest.raises(CheckpointError, match=f"{saved.path()} does not fit the model"):
        saved.store.restore(model, optimizer)
    assert saved.path().is_dir()
    # where none was ever made there is none
    assert CheckpointStore(tmp_path / "new", "run-a", 2).restore(model, optimizer) is None
    assert same(weights_of(model), before)


BEST_WAYS = {
    "flip": lambda s, best: flip(best / MODEL),
    "another step": lambda s, best: replace_by(s.path(3), best),
    "another run": lambda s, best: reseal(best, run_id="run-b"),
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
    (saved.path() / STATE_FILE).unlink()
    saved.store.restore(model, optimizer)
    take_step(model, optimizer)
    anew = copy_weights(model)
    assert not same(anew, saved.weights[3])
    saved.store.save(3, model, optimizer, {"of_step": 3}, BestWeights(3, anew))
    _, best, _ = saved.restore()
    assert same(best.weights, anew)


def test_best_weights_on_the_disk_take_no_memory_and_are_read_where_they_are_used(saved, capsys):
    store = CheckpointStore(saved.folder, "run-a", 3, best_on_disk=True)
    model, optimizer = build(seed=99)
    state, best = store.restore(model, optimizer)
    assert (best, state["best_step"]) == (BestWeights(2, None), 2)
    assert same(store.weights_of_best(best, model), saved.weights[2])
    take_step(model, optimizer)
    best = store.keep_best(4, model)
    assert best == BestWeights(4, None)
    expected = copy_weights(model)
    take_step(model, optimizer)
    assert same(store.weights_of_best(best, model), expected)
    store.save(5, model, optimizer, {}, best)
    _, kept, _ = saved.restore()  # the checkpoint names them
    assert kept.step == 4
    assert same(kept.weights, expected)
    for step in (6, 7):  # the better one replaces what no checkpoint names
        store.keep_best(step, model)
    left = {path.name for path in (saved.folder / "best").iterdir()}
    assert left >= {"step-00000004", "step-00000007"} and "step-00000006" not in left
    (saved.folder / "best" / "step-00000004" / MODEL).unlink()
    assert store.weights_of_best(best, model) is None
    assert "the best weights are lost" in capsys.readouterr().out


def test_a_weight_that_is_not_finite_is_never_saved(saved):
    model, optimizer = build()
    take_step(model, optimizer)
    before = read_tree(saved.folder)
    for value in (float("nan"), float("inf"), -float("inf")):
        model.blocks[0].mlp[0].weight.data[1, 2] = value
        with pytest.raises(NumericsError, match=r"after step 4 .*blocks\.0\.mlp\.0\.weight"):
            saved.store.save(4, model, optimizer, {}, BestWeights(4, copy_weights(model)))
        assert read_tree(saved.folder) == before


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
    files = [saved.path(step) / MODEL for step in (1, 2, 3)]
    files.append(saved.folder / "best" / "step-00000002" / MODEL)
    for file in files:
        file.write_bytes(b"rubbish")
    for which, named in (("best", files), ("last", files[:3])):
        with pytest.raises(CheckpointError) as caught:
            read_weights(saved.folder, "run-a", which)
        head, *lines = str(caught.value).splitlines()
        assert head == f"no weights in {saved.folder} can be used:"
        told = [line.partition(" has 7 bytes instead of ")[0].strip() for line in lines]
        assert sorted(told) == sorted(map(str, named))


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_a_link_in_place_of_a_folder_gives_the_same_weights(saved, tmp_path, capsys):
    """Somebody may keep checkpoints on another disk."""
    for name in ("best/step-00000002", "best", "checkpoints"):
        shutil.move(saved.folder / name, tmp_path / name.replace("/", "-"))
        (saved.folder / name).symlink_to(tmp_path / name.replace("/", "-"))
        for which, expected in (("best", 2), ("last", 3)):
            step, weights, said = read_for_use(saved, which, capsys)
            assert (step, said) == (expected, [])
            assert same(weights, saved.weights[expected])


LOOKS = [(Path, "glob"), (storage, "_read_manifest"), (storage, "_verify_file")]
LOOKS.append((checkpoint, "safe_open"))


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
    failing = Mock(side_effect=RuntimeError("unable to open file"))  # so torch says it
    monkeypatch.setattr(checkpoint, "safe_open", failing)
    with pytest.raises(RuntimeError, match="unable to open"):  # out of memory, say
        read_weights(saved.folder, "run-a", "last")
    (saved.path() / MODEL).unlink()
    with pytest.raises(FileNotFoundError):
        read_safetensors(saved.path() / MODEL)


def test_hostile_tensor_files_are_refused(tmp_path):
    model, optimizer = build()
    path = tmp_path / MODEL
    for kind, content in HOSTILE_TENSORS.items():
        path.write_bytes(content)
        with pytest.raises((SafetensorError, CheckpointError)):
            print(kind, load_weights(model, read_safetensors(path), path))
        # an optimizer that has left out each of its steps has no state, and may have no tensors
        if kind not in ("no tensors", "a header of blanks"):
            with pytest.raises((SafetensorError, CheckpointError)):
                print(kind, load_optimizer(model, optimizer, read_safetensors(path), path))


def test_a_state_that_is_none_with_a_right_manifest_is_refused(saved, capsys):
    states = [b"[]", b"null", b"{}", b"{", b'"x"', b"[" * 100_000, pickle.dumps({"best_step": 1})]
    steps = [b"9" * 5000, b'"x"', b'"../x"', b"1.5", b"[]"]
    for state in [*states, *(b'{"best_step": %s}' % step for step in steps)]:
        (saved.path() / STATE_FILE).write_bytes(state)
        reseal(saved.path())
        saved.refused(capsys, "step-00000003")


def test_the_last_checkpoints_and_their_best_weights_are_kept_and_nothing_else(
    tmp_path, quick_disk
):
    for number in range(15):
        follow_a_random_history(tmp_path / str(number), random.Random(number))


def follow_a_random_history(folder: Path, chooser: random.Random) -> None:
    """Save, evaluate and start again at random; what is on the disk is what the rule says."""
    keep = chooser.randrange(2, 5)
    model = nn.Linear(1, 1, bias=False)  # the smallest there is
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


def test_only_what_a_killed_program_left_is_removed_at_the_next_start(saved):
    before = read_tree(saved.folder)
    half = {".tmp-1-step-00000004": {MODEL: b"half"}, ".del-1-step-00000001": {MODEL: b"half"}}
    write_tree({"checkpoints": half, "best": half}, saved.folder)
    store = CheckpointStore(saved.folder, "run-a", 3)
    assert read_tree(saved.folder) == before
    (saved.path().parent / "step-abc").write_text("mine")
    model, optimizer = build()
    for step in (4, 5, 6, 7):
        store.save(step, model, optimizer, {}, None)
    left = sorted(path.name for path in saved.path().parent.iterdir())
    assert left == ["step-00000005", "step-00000006", "step-00000007", "step-abc"]


@pytest.fixture
def time(monkeypatch) -> SimpleNamespace:
    """A clock that goes on only when its `now` is set."""
    time = SimpleNamespace(now=1000.0, monotonic=lambda: time.now)
    monkeypatch.setattr(checkpoint, "time", time)
    return time


def test_a_checkpoint_is_due_every_so_many_steps_however_long_it_takes(time):
    for every in (1, 3, 10):
        clock, due = SaveClock(every, minutes=1e-9), []
        for step in range(1, 31):
            time.now += 1000
            if clock.is_due(step):
                due.append(step)
                clock.note(time.now - 500)
        assert due == list(range(every, 31, every))


@pytest.mark.parametrize(("minutes", "cost"), [(0.5, 0.1), (5, 0.1), (1, 1.0), (1, 7.0), (1, 30.0)])
def test_by_time_a_checkpoint_is_due_when_it_is_time_and_takes_its_share(time, minutes, cost):
    clock = SaveClock(None, minutes)
    last_at, saves, late = time.now, 0, []
    while time.now < 1000 + 30_000:
        time.now += 1
        if clock.is_due(1):
            late.append(time.now - last_at - 60 * minutes)
            time.now += cost
            clock.note(time.now - cost)
            last_at, saves = time.now, saves + 1
            # the first one's cost is not known before
            assert saves == 1 or saves * cost <= 0.02 * (time.now - 1000)
    assert min(late) >= 0
    assert cost > 0.1 or max(late) <= 1.1
    assert saves >= 0.8 * min(30_000 / (60 * minutes + cost), 0.02 * 30_000 / cost)


def test_what_the_disk_has_no_room_for_is_refused_before_it_begins(saved, monkeypatch):
    disk = SimpleNamespace()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    model, optimizer = build()
    take_step(model, optimizer)
    size = sum(value.nbytes for value in weights_of(model).values())
    moments = sum(value.nbytes for value in optimizer_tensors(model, optimizer).values())
    before = read_tree(saved.folder)
    new_best = BestWeights(4, copy_weights(model))
    match = r"the checkpoint of step 4 takes 0\.0 MB.* 0\.0 MB free"
    for disk.free, best in ((1000, None), (1000, new_best), (size + moments + size // 2, new_best)):
        with pytest.raises(ResourceError, match=match) as caught:
            saved.store.save(4, model, optimizer, {}, best)
        assert caught.value.exit_code == 6
        assert read_tree(saved.folder) == before
    saved.store.save(4, model, optimizer, {}, BestWeights(2, saved.weights[2]))  # it is there
    # a new run asks for all that it will keep
    store = CheckpointStore(saved.folder / "new", "run-b", 2)
    model, disk.free = nn.Linear(1000, 1000, bias=False), 47_999_999  # 4 MB
    with pytest.raises(ResourceError, match=r"keeping 2 checkpoints and a new one takes 48\.0 MB"):
        store.require_room(model, saves=9)
    disk.free = 48_000_000
    store.require_room(model, saves=9)
    generous = CheckpointStore(saved.folder / "new", "run-b", 1000)
    generous.require_room(model, saves=2)  # it can't keep more than it saves
    with pytest.raises(ResourceError, match=r"keeping 9 checkpoints.*keep_checkpoints may be 2\)"):
        generous.require_room(model, saves=9)


OTHER_TYPES = [torch.float64, torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16]
OTHER_TYPES += [torch.complex64, torch.float8_e4m3fn]


def test_weights_that_do_not_fit_are_refused_by_name():
    model, _ = build()
    good = copy_weights(model)
    for bad in (
        {name: value for name, value in good.items() if name != "head.weight"},
        good | {"head.bias": torch.zeros(11)},
        good | {"head.weight": torch.zeros(4, 11)},
        *(good | {"head.weight": torch.zeros(11, 4, dtype=dtype)} for dtype in OTHER_TYPES),
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


SHARED = ("step.head.weight", ".head.weight")
LEFT_OUT = {
    build_adamw: (*SHARED, "exp_avg_sq.final_norm"),
    build_muon: (*SHARED, "momentum_buffer.blocks.0.mlp.0.weight", "momentum_buffer."),
}


@pytest.mark.parametrize("maker", LEFT_OUT)
def test_moments_that_do_not_fit_are_refused_and_change_nothing(maker):
    model = GPTModel(CONFIG)
    optimizer = maker(model, 1e-2, 0.1)
    take_step(model, optimizer)
    good = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    cases = []
    for name, shape in (
        ("exp_avg.head.bias", (11,)),
        ("exp_avg.head.weight", (4, 11)),
        ("exp_avg.head.weight", ()),
        ("step.head.weight", (11, 4)),
        ("nonsense", ()),
        ("x" * 100_000, ()),
    ):
        cases.append((good | {name: torch.zeros(shape)}, name[:80]))
    for left_out in LEFT_OUT[maker]:
        some = {name: value for name, value in good.items() if left_out not in name}
        assert 0 < len(some) < len(good)
        cases.append((some, "it lacks state of a parameter"))
    for tensors, said in cases:
        match = f"^a place does not fit the model: {said}"
        with pytest.raises(CheckpointError, match=match) as caught:
            load_optimizer(model, optimizer, tensors, "a place")
        assert len(str(caught.value)) < 300
        assert same(optimizer_tensors(model, optimizer), good)
