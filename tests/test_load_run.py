"""A trained run, loaded for use: the right weights, exactly, from wherever its folder is."""

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

import environment
import exchange.saved_run
import main
import text.tokenizer
from engine.errors import CheckpointError, ResourceError, SettingsError
from engine.weights import Bf16Linear, Int8Linear, choose_weights
from environment import prepare_environment
from exchange.saved_run import load_run
from generation import SamplingConfig
from planning.runs import newest_finished_run
from storage.checkpoint import weights_of
from tests.conftest import REPOSITORY
from tests.test_run_folder import Canary
from training import journal

TEXT = "the river carries the bell and the bell carries the river. 钟声 " * 12
PARAMS = {
    "max_steps": 4,
    "batch_size": 2,
    "max_length": 16,
    "eval_freq": 2,
    "eval_iter": 1,
    "save_every": 1,
    "start_context": "the",
    "model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1},
}
SETTINGS = {
    "DATA": "text.txt",
    "TOKENIZER": "char",
    "CUSTOM_MODE": True,
    "PRECISION": "fp32",
    "COMPILE": False,
    "sampling_params": {"max_new_tokens": 3, "temperature": 0.5},
}
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.utime", "os.chmod")
HOOK: dict[str, list | None] = {"events": None}  # an audit hook can't be taken out again


@dataclass
class Trained:
    """A run's folder, and the model as training left it."""

    path: Path
    model: torch.nn.Module
    tokenizer: object


def train_run(folder: Path, *, finish: bool = True, **settings) -> Trained:
    """Train a tiny run in this process, in folder/runs; what has a small name is custom_params'.

    finish=False trains to the end, and leaves out the summary that makes a run a finished one.
    """
    ours = {name: value for name, value in settings.items() if name.isupper()}
    params = {name: value for name, value in settings.items() if not name.isupper()}
    values = SETTINGS | {"custom_params": PARAMS | params} | ours
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text.txt").exists():
        (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    lines = [f"{name} = {value!r}\n" for name, value in values.items()]
    (folder / "settings.py").write_text("".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(environment, "CACHE", folder / "cache")
        patch.setattr(journal, "render_losses", lambda **_: None)  # most of the time otherwise
        patch.setattr(os, "fsync", lambda handle: None)  # nobody cuts the power here
        if not finish:
            patch.setattr(main, "sum_up", lambda *_: None)
        env = prepare_environment("settings.py")
        main.run_pipeline(env)
        return Trained(env.run.path.resolve(), env.model.eval(), env.tokenizer)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Trained:
    """A finished run of four steps; nobody changes it."""
    return train_run(tmp_path_factory.mktemp("original"), RUN_NAME="one")


@pytest.fixture
def trained(original, workdir) -> Trained:
    """A copy of that run in the working directory's runs, where load_run() looks."""
    shutil.copytree(original.path, workdir / "runs" / "one")
    return Trained(workdir / "runs" / "one", original.model, original.tokenizer)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_settings(run: Path, **changes) -> None:
    """Change settings.json; None takes a name out."""
    settings = read(run / "settings.json") | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    (run / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """(2, T, V) logits of ids that a seed draws, as long as the context."""
    config = model.config
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(config.vocab_size, (2, config.context_length), generator=generator)
    with torch.no_grad():
        return model(ids)


def assert_has(model: torch.nn.Module, file: Path) -> None:
    """A model has the weights of a file, to the last bit."""
    weights, saved = weights_of(model), safetensors.torch.load_file(file)
    assert weights.keys() == saved.keys()
    for name, value in saved.items():
        assert weights[name].dtype == value.dtype == torch.float32
        assert torch.equal(weights[name].view(torch.int32), value.view(torch.int32)), name


# ------------------------------------------------------------------------- the right weights


def test_without_arguments_the_finished_run_is_loaded_with_its_best_weights(trained):
    run = load_run(weights="fp32")
    best_step = read(trained.path / "summary.json")["best_step"]
    assert (run.path.resolve(), run.step) == (trained.path, best_step)
    assert_has(run.model, trained.path / f"best/step-{best_step:08d}/model.safetensors")
    assert not run.model.training
    assert not any(parameter.requires_grad for parameter in run.model.parameters())
    assert run.sampling == SamplingConfig(max_new_tokens=3, temperature=0.5)
    assert run.settings == read(trained.path / "settings.json")
    assert run.tokenizer.decode(run.tokenizer.encode("the 钟")) == "the 钟"


def test_the_best_weights_may_be_newer_than_what_the_last_checkpoint_says_of_them(trained):
    """The last save comes before the last evaluation, which finds the best weights as a rule."""
    state = trained.path / "checkpoints/step-00000004/state.json"
    assert read(state)["best_step"] < 4
    assert read(trained.path / "summary.json")["best_step"] == 4
    assert load_run("one").step == 4


def test_the_best_weights_may_be_long_ago_and_the_last_are_had_by_name(tmp_path):
    text, other = "the river carries the bell " * 20, "xyz xxy zzx yzy " * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    (tmp_path / "val.txt").write_text(other, encoding="utf-8")  # learning the one unlearns this
    data = {"path": "text.txt", "val": "val.txt"}
    trained = train_run(tmp_path, DATA=data, max_steps=40, eval_freq=4, learning_rate=0.05)
    best_step = read(trained.path / "summary.json")["best_step"]
    assert best_step < 40  # else this shows nothing
    best, last = (load_run(trained.path, which=which, weights="fp32") for which in ("best", "last"))
    assert (best.step, last.step) == (best_step, 40)
    assert_has(best.model, trained.path / f"best/step-{best_step:08d}/model.safetensors")
    assert_has(last.model, trained.path / "checkpoints/step-00000040/model.safetensors")
    assert not torch.equal(logits_of(best.model), logits_of(last.model))


MODELS = {
    "gpt2 tied": {"tie_embeddings": True},
    "gpt2 untied": {"tie_embeddings": False, "qkv_bias": True, "drop_rate": 0.1},
    "sinusoidal": {"positions": "sinusoidal"},
    "llama tied": {"architecture": "llama", "n_kv_heads": 1, "qk_norm": True},
    "llama untied": {"architecture": "llama", "tie_embeddings": False, "rope_theta": 500.0},
}


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_model_that_was_trained(tmp_path, kind):
    overrides = PARAMS["model_overrides"] | MODELS[kind]
    trained = train_run(tmp_path, finish=False, model_overrides=overrides)
    run = load_run(trained.path, which="last", weights="fp32")
    assert torch.equal(logits_of(run.model), logits_of(trained.model))
    assert run.model.config == trained.model.config
    buffers = dict(trained.model.named_buffers())
    assert buffers.keys() == dict(run.model.named_buffers()).keys()
    for name, value in run.model.named_buffers():  # angles and sines are in no file
        assert torch.equal(value, buffers[name]), name
    for name, value in [*run.model.named_parameters(), *run.model.named_buffers()]:
        assert value.device.type == "cpu", name
        assert torch.isfinite(value).all(), name
    shared = run.model.head.weight is run.model.token_embedding.weight
    assert shared == run.model.config.tie_embeddings


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_products_read_the_weights_that_were_asked_for(trained, kind):
    run = load_run("one", which="last", weights=kind)
    layers = {"fp32": torch.nn.Linear, "bf16": Bf16Linear, "int8": Int8Linear}
    assert run.weights == kind
    assert type(run.model.blocks[0].attention.qkv) is layers[kind]
    assert torch.equal(run.model.token_embedding.weight, trained.model.token_embedding.weight)
    exact = logits_of(trained.model)
    deviation = (logits_of(run.model) - exact).abs().mean() / exact.std()
    assert deviation == 0 if kind == "fp32" else 0 < deviation < 0.03


def test_auto_is_bf16_where_the_device_is_fast_with_it(trained, monkeypatch):
    assert load_run("one").weights == choose_weights("auto", torch.device("cpu"))
    for kind in ("bf16", "fp32"):
        monkeypatch.setattr(exchange.saved_run, "choose_weights", lambda *_, k=kind: k)
        assert load_run("one").weights == kind


def test_loading_leaves_the_random_generator_alone(trained):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_run("one")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"which": "first"}, SettingsError, 'which is \'first\'; it must be "best" or "last"'),
        ({"which": None}, SettingsError, 'which is None; it must be "best" or "last"'),
        ({"weights": "int4"}, SettingsError, 'weights is "int4"; it must be one of "auto"'),
        (
            {"device": "mps" if sys.platform != "darwin" else "cuda"},
            ResourceError,
            "no such device",
        ),
        ({"device": "cuda:77"}, ResourceError, "no such device"),
        ({"device": "cuda:256"}, ResourceError, "no such device"),  # torch takes it for cuda:0
        ({"device": "gpu"}, SettingsError, "'gpu'"),
        ({"device": "meta"}, SettingsError, "'meta'"),
        ({"device": ""}, SettingsError, "''"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused_with_what_can(trained, wrong, error, message):
    with pytest.raises(error, match=message):
        load_run("one", **wrong)


# ----------------------------------------------------------------------------- the tokenizer


def foreign_tokenizer() -> str:
    """A tokenizer.json that is none of this project's: words, and one token for all others."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["the", "river", "carries", "bell", "and", "[UNK]", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made.to_str()


@pytest.mark.parametrize("kind", ["gpt2", "char", "bpe:300", "foreign"])
def test_the_tokenizer_is_the_one_of_the_training(tmp_path, kind):
    given = kind
    if kind == "foreign":
        (tmp_path / "theirs.json").write_text(foreign_tokenizer(), encoding="utf-8")
        given = str(tmp_path / "theirs.json")
    elif kind == "bpe:300":
        pytest.importorskip("tokenizers")
    trained = train_run(tmp_path, finish=False, TOKENIZER=given)
    if kind == "foreign":
        (tmp_path / "theirs.json").unlink()  # the run has its own
    run = load_run(trained.path)
    assert run.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert run.tokenizer.vocab_size == run.model.config.vocab_size
    for words in (TEXT[:80], "Unseen: ß 🙂 <|endoftext|>", ""):
        ids = trained.tokenizer.encode(words)
        assert run.tokenizer.encode(words) == ids
        assert run.tokenizer.decode(ids) == trained.tokenizer.decode(ids)


def swap(run: Path) -> None:
    """Another tokenizer of as many tokens: two characters change places."""
    other = text.tokenizer.CharTokenizer(set(TEXT) - {"t"} | {"T"})
    (run / "tokenizer.json").write_text(other.to_json(), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        swap,
        lambda run: (run / "tokenizer.json").write_text(foreign_tokenizer(), encoding="utf-8"),
        lambda run: (run / "tokenizer.json").write_bytes(b"{"),
        lambda run: (run / "tokenizer.json").unlink(),
        lambda run: edit_settings(run, tokenizer="char-0000000000000000"),
    ],
    ids=["swapped", "foreign", "damaged", "gone", "another"],
)
def test_a_tokenizer_of_another_run_is_refused(trained, change):
    load_run("one")
    change(trained.path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_run("one")


def test_a_tokenizer_and_a_model_of_different_sizes_are_refused(trained):
    model = read(trained.path / "settings.json")["model"]
    edit_settings(trained.path, model=model | {"vocab_size": model["vocab_size"] + 1})
    with pytest.raises(CheckpointError, match="they don't belong together"):
        load_run("one")


# -------------------------------------------------------------------------------- the folder


def test_a_run_is_named_by_its_path_or_its_name_in_output_dir(trained, workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.setenv("USERPROFILE", str(workdir))
    for given in (
        "one",
        "runs/one",
        Path("runs/one"),
        "./runs/../runs/one/",
        trained.path,
        str(trained.path),
        "~/runs/one",
    ):
        assert load_run(given).path.resolve() == trained.path, given


def test_names_are_looked_up_where_output_dir_says(trained, workdir, monkeypatch):
    (workdir / "runs").rename(workdir / "elsewhere")
    (workdir / "config_run.py").write_text('OUTPUT_DIR = "~/elsewhere"\n', encoding="utf-8")
    monkeypatch.syspath_prepend(workdir)
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.setenv("USERPROFILE", str(workdir))
    assert load_run("one").path == load_run().path == workdir / "elsewhere" / "one"


def test_a_folder_of_the_same_name_that_is_no_run_does_not_stand_in_its_way(trained, workdir):
    (workdir / "one").mkdir()  # the texts of that run, say
    assert load_run("one").path.resolve() == trained.path


def test_a_run_that_was_moved_is_used_from_anywhere(trained, workdir, monkeypatch):
    (workdir / "far" / "away").mkdir(parents=True)
    shutil.move(trained.path, workdir / "far" / "钟 renamed")
    monkeypatch.chdir(workdir / "far" / "away")
    (workdir / "text.txt").unlink(missing_ok=True)
    run = load_run("../钟 renamed", which="last", weights="fp32")
    assert torch.equal(logits_of(run.model), logits_of(trained.model))


@pytest.mark.slow
def test_a_run_is_used_in_a_process_of_its_own_on_a_folder_that_cannot_be_written(trained, workdir):
    for path in [trained.path, *trained.path.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = "from environment import load_run; run = load_run('one'); print(run.step, run.path)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workdir,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        encoding="utf-8",
    )
    for path in [trained.path, *trained.path.rglob("*")]:
        path.chmod(0o755)
    assert done.stdout.split() == ["4", str(Path("runs/one"))], done.stderr


@contextlib.contextmanager
def watching():
    """The audit events meanwhile, as (name, arguments)."""
    if "installed" not in HOOK:

        def hook(event, arguments):
            if HOOK["events"] is not None and (event == "open" or event in CHANGING):
                HOOK["events"].append((event, arguments))

        sys.addaudithook(hook)
        HOOK["installed"] = []
    HOOK["events"] = events = []
    try:
        yield events
    finally:
        HOOK["events"] = None


def writes(events: list) -> list:
    """Those of the events that change something on the disk."""
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    return [
        event
        for event in events
        if event[0] != "open" or (isinstance(event[1][2], int) and event[1][2] & flags)
    ]


def listing(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: kind, size, time and sha256 of each entry."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        entry = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (entry.st_mode, entry.st_size, entry.st_mtime_ns, content)
    return found


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_reading_changes_nothing_on_the_disk(trained, workdir, damaged, capsys):
    if damaged:  # training would set it aside
        newest = max(trained.path.glob("checkpoints/step-*")) / "model.safetensors"
        newest.write_bytes(newest.read_bytes()[:-1] + b"?")
        (trained.path / "checkpoints" / ".tmp-1-step-00000009").mkdir()  # a save in progress
        (trained.path / "best" / ".del-1-step-00000001").mkdir()
    before = listing(workdir)
    with watching() as events:
        for which in ("best", "last"):
            load_run("one", which=which)
    assert listing(workdir) == before
    assert events, "the hook sees nothing"
    assert writes(events) == []
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("Note: ")]) == damaged, said


@pytest.mark.parametrize("kind", ["pickle", "torch", "pipe"])
def test_a_pickle_is_refused_without_being_opened(trained, workdir, kind):
    canary, path = workdir / "canary", workdir / "model.pt"
    if kind == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("pipes of POSIX")
        os.mkfifo(path)  # who opens it waits for ever
    elif kind == "torch":
        torch.save(Canary(canary), path)
    else:
        path.write_bytes(pickle.dumps(Canary(canary)))
    with watching() as events, pytest.raises(CheckpointError, match=r"model\.pt is no run"):
        load_run("model.pt")
    assert not [arguments for _, arguments in events if str(arguments[0]).endswith("model.pt")]
    assert not canary.exists()


@pytest.mark.parametrize(
    "given",
    [
        "two",
        "runs/two",
        "runs",
        ".",
        "",
        "runs/one/settings.json",
        "runs/one/checkpoints",
        "../../etc/passwd",
        "~nobody-of-this-name/run",
        "x" * 300,
        "x/" * 3000,
        "a\0b",
        "*",
        "one\n",
    ],
    ids=lambda given: repr(given[:30]),
)
def test_what_is_no_run_is_refused_by_name(trained, given):
    with pytest.raises(CheckpointError) as caught:
        load_run(given)
    assert len(str(caught.value).splitlines()) <= 4


def test_a_run_that_has_saved_nothing_yet_says_so(trained):
    shutil.rmtree(trained.path / "checkpoints")
    shutil.rmtree(trained.path / "best")
    for which in ("best", "last"):
        with pytest.raises(CheckpointError, match="holds no checkpoint: the run has saved none"):
            load_run("one", which=which)


WRONG_SETTINGS = {
    "no model": {"model": None},
    "a model of another kind": {"model": [1]},
    "an empty model": {"model": {}},
    "an unknown name": {"model": lambda model: model | {"n_experts": 4}},
    "a name too few": {"model": lambda model: {"vocab_size": model["vocab_size"]}},
    "a width of no heads": {"model": lambda model: model | {"n_heads": 3}},
    "a width in words": {"model": lambda model: model | {"emb_dim": "8"}},
    "a width of fractions": {"model": lambda model: model | {"emb_dim": 8.0}},
    "another width": {"model": lambda model: model | {"emb_dim": 16}},
    "another depth": {"model": lambda model: model | {"n_layers": 2}},
    "another length": {"model": lambda model: model | {"context_length": 17}},
    "another architecture": {"model": lambda model: model | {"architecture": "llama"}},
    "no sampling": {"sampling": None},
    "a sampling of another kind": {"sampling": "greedy"},
    "a sampling that is none": {"sampling": {"temperature": -1}},
    "another program's sampling": {"sampling": {"beams": 4}},
    "another run": {"run_id": "0" * 16},
    "no run": {"run_id": None},
    "a run of another kind": {"run_id": 5},
    "no tokenizer": {"tokenizer": None},
    "a tokenizer of another kind": {"tokenizer": ["char"]},
}


@pytest.mark.parametrize("kind", WRONG_SETTINGS)
def test_settings_that_do_not_describe_the_weights_are_refused(trained, kind):
    ((name, value),) = WRONG_SETTINGS[kind].items()
    if callable(value):
        value = value(read(trained.path / "settings.json")[name])
    edit_settings(trained.path, **{name: value})
    with pytest.raises(CheckpointError, match="one"):
        load_run("one")


# ------------------------------------------------------------------- the run finished last


def make_run(folder: Path, *, finished_at: int | None, settings: bool = True) -> Path:
    """What newest_finished_run looks at; finished_at is in seconds."""
    folder.mkdir(parents=True)
    if settings:
        (folder / "settings.json").write_text("{}", encoding="utf-8")
    if finished_at is not None:
        (folder / "summary.json").write_text("{}", encoding="utf-8")
        os.utime(folder / "summary.json", (finished_at, finished_at))
    return folder


def test_the_newest_run_is_the_one_that_was_finished_last_whatever_its_name(tmp_path):
    chooser = random.Random(4)
    names = [f"2026-11-{day:02d}_poems" for day in range(1, 9)] + ["zebra", "aardvark"]
    for times in [chooser.sample(range(1000, 2000), len(names)) for _ in range(5)]:
        folder = tmp_path / str(times[0])
        pairs = zip(times, names, strict=True)
        made = {at: make_run(folder / name, finished_at=at) for at, name in pairs}
        assert newest_finished_run(folder) == made[max(times)]


def test_a_run_that_is_unfinished_or_of_another_program_is_passed_over(tmp_path):
    old = make_run(tmp_path / "old", finished_at=1000)
    make_run(tmp_path / "unfinished", finished_at=None)
    make_run(tmp_path / "other", finished_at=3000, settings=False)
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    (tmp_path / "zz.txt").write_text("no folder", encoding="utf-8")
    assert newest_finished_run(tmp_path) == old


def test_a_run_that_goes_on_meanwhile_is_unfinished_again(tmp_path, monkeypatch):
    """A run that is made longer loses its summary, between two looks at it too."""
    old = make_run(tmp_path / "old", finished_at=1000)
    longer = make_run(tmp_path / "longer", finished_at=2000) / "summary.json"
    assert newest_finished_run(tmp_path) == longer.parent
    glob = Path.glob

    def then_gone(self, pattern):
        found = list(glob(self, pattern))
        longer.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "glob", then_gone)
    assert newest_finished_run(tmp_path) == old


def test_where_none_is_finished_an_unfinished_one_is_named(workdir):
    with pytest.raises(CheckpointError, match=r"(?s)no finished run in .*Train a model first"):
        load_run()
    for name in ("a", "b"):
        make_run(workdir / "runs" / name, finished_at=None)
    with pytest.raises(CheckpointError, match="b is unfinished, but can be named"):
        load_run()
    (workdir / "runs").rename(workdir / "moved")
    (workdir / "runs").write_text("a file", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no finished run"):
        load_run()


def test_an_unfinished_run_is_used_by_its_name(trained):
    (trained.path / "summary.json").unlink()
    assert load_run("one").step == 4
    with pytest.raises(CheckpointError, match="one is unfinished, but can be named"):
        load_run()


def test_a_wrong_output_dir_is_a_settings_error(workdir, monkeypatch):
    (workdir / "config_run.py").write_text("OUTPUT_DIR = 5\n", encoding="utf-8")
    monkeypatch.syspath_prepend(workdir)
    with pytest.raises(SettingsError, match=r"OUTPUT_DIR is 5 in config_run\.py"):
        load_run("one")
