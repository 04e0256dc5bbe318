"""A trained run, loaded for use: the right weights, exactly, from wherever its folder is."""

import contextlib
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import exchange.saved_run
from engine.errors import CheckpointError, ResourceError, SettingsError
from engine.weights import Bf16Linear, Int8Linear, choose_weights
from exchange.saved_run import load_run
from generation import SamplingConfig
from planning.runs import newest_finished_run
from storage.checkpoint import weights_of
from tests.hostile import Canary
from tests.trained import TEXT, Trained, edit_settings, listing, read, remade, train_run
from text.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, load_tokenizer, train_bpe

CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.utime", "os.chmod")
HOOK: dict[str, list | None] = {"events": None}  # an audit hook can't be taken out again


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Trained:
    """A finished run; nobody changes it."""
    return train_run(tmp_path_factory.mktemp("original"))


@pytest.fixture
def trained(original, workdir) -> Trained:
    """A copy of that run in the working directory's runs, where load_run() looks."""
    shutil.copytree(original.path, workdir / "runs" / "one")
    return Trained(workdir / "runs" / "one", original.model, original.tokenizer)


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
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run = load_run(weights="fp32")
    assert torch.equal(torch.get_rng_state(), before)
    # the last save came before the last evaluation, which found the best weights
    assert read(trained.path / "checkpoints/step-00000004/state.json")["best_step"] < 4
    assert (run.path.resolve(), run.step) == (trained.path, 4)
    assert_has(run.model, trained.path / "best/step-00000004/model.safetensors")
    assert torch.equal(logits_of(run.model), logits_of(trained.model))
    assert not run.model.training
    assert not any(parameter.requires_grad for parameter in run.model.parameters())
    assert run.sampling == SamplingConfig(max_new_tokens=3, temperature=0.5)
    assert run.settings == read(trained.path / "settings.json")
    assert run.tokenizer.decode(run.tokenizer.encode("the 钟")) == "the 钟"


def test_the_best_weights_may_be_long_ago_and_the_last_are_had_by_name(trained):
    shutil.rmtree(trained.path / "best/step-00000004")
    best, last = (load_run("one", which=which, weights="fp32") for which in ("best", "last"))
    assert (best.step, last.step) == (2, 4)
    assert_has(best.model, trained.path / "best/step-00000002/model.safetensors")
    assert_has(last.model, trained.path / "checkpoints/step-00000004/model.safetensors")
    assert not torch.equal(logits_of(best.model), logits_of(last.model))


MODELS = {
    "gpt2 tied": {"tie_embeddings": True},
    "gpt2 untied": {"tie_embeddings": False, "qkv_bias": True, "drop_rate": 0.1},
    "sinusoidal": {"positions": "sinusoidal"},
    "llama tied": {"architecture": "llama", "n_kv_heads": 1, "qk_norm": True},
    "llama untied": {"architecture": "llama", "tie_embeddings": False, "rope_theta": 500.0},
}


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_model_that_was_saved(trained, kind):
    saved = remade(trained.path, trained.tokenizer, **MODELS[kind])
    model = load_run("one", which="last", weights="fp32").model
    assert torch.equal(logits_of(model), logits_of(saved))
    assert model.config == saved.config
    buffers = dict(saved.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for name, value in model.named_buffers():  # angles and sines are in no file
        assert torch.equal(value, buffers[name]), name
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value.device.type == "cpu", name
    assert (model.head.weight is model.token_embedding.weight) == model.config.tie_embeddings


@pytest.mark.parametrize(
    ("kind", "layer"), [("fp32", torch.nn.Linear), ("bf16", Bf16Linear), ("int8", Int8Linear)]
)
def test_products_read_the_weights_that_were_asked_for(original, monkeypatch, kind, layer):
    run = load_run(original.path, which="last", weights=kind)
    assert run.weights == kind
    assert type(run.model.blocks[0].attention.qkv) is layer
    assert torch.equal(run.model.token_embedding.weight, original.model.token_embedding.weight)
    exact = logits_of(original.model)
    deviation = (logits_of(run.model) - exact).abs().mean() / exact.std()
    assert deviation == 0 if kind == "fp32" else 0 < deviation < 0.03
    assert load_run(original.path).weights == choose_weights("auto", torch.device("cpu"))
    monkeypatch.setattr(exchange.saved_run, "choose_weights", lambda *_: kind)
    assert load_run(original.path).weights == kind


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"which": "first"}, SettingsError, 'which is \'first\'; it must be "best" or "last"'),
        ({"weights": "int4"}, SettingsError, 'weights is "int4"; it must be one of "auto"'),
        ({"device": "cuda:77"}, ResourceError, "no such device"),
        ({"device": "cuda:256"}, ResourceError, "no such device"),  # torch takes it for cuda:0
        ({"device": "gpu"}, SettingsError, "'gpu'"),
        ({"device": "meta"}, SettingsError, "'meta'"),
        ({"device": ""}, SettingsError, "''"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused_with_what_can(original, wrong, error, message):
    with pytest.raises(error, match=message):
        load_run(original.path, **wrong)


# ----------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Tokenizer:
    """A tokenizer.json that is none of this project's: words, and one token for all others."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["the", "river", "carries", "bell", "and", "[UNK]", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("elsewhere") / "theirs.json"
    path.write_text(made.to_str(), encoding="utf-8")
    return load_tokenizer(path)


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "foreign"])
def test_the_tokenizer_is_the_one_of_the_training(trained, foreign, kind):
    makers = {"gpt2": GPT2Tokenizer, "bpe": lambda: train_bpe([TEXT], 300)}
    tokenizer = foreign if kind == "foreign" else makers[kind]()
    remade(trained.path, tokenizer)
    run = load_run("one", which="last")
    assert run.tokenizer.fingerprint == tokenizer.fingerprint
    assert run.tokenizer.vocab_size == run.model.config.vocab_size
    for words in (TEXT[:80], "Unseen: ß 🙂 <|endoftext|>", ""):
        ids = tokenizer.encode(words)
        assert run.tokenizer.encode(words) == ids
        assert run.tokenizer.decode(ids) == tokenizer.decode(ids)


def test_a_tokenizer_of_another_run_is_refused(trained, foreign):
    file = trained.path / "tokenizer.json"
    swapped = CharTokenizer(set(TEXT) - {"t"} | {"T"})  # as many tokens, in another order
    for tokenizer in (swapped, foreign):
        file.write_text(tokenizer.to_json(), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is not the tokenizer"):
            load_run("one")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: No such file"):
        load_run("one")


# -------------------------------------------------------------------------------- the folder


def test_a_run_is_named_by_its_path_or_its_name_in_output_dir(trained, workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.setenv("USERPROFILE", str(workdir))
    paths = ("runs/one", Path("runs/one"), "./runs/../runs/one/", "~/runs/one")
    for given in ("one", *paths, trained.path, str(trained.path)):
        assert load_run(given).path.resolve() == trained.path, given
    (workdir / "one").mkdir()  # the texts of that run, say
    assert load_run("one").path.resolve() == trained.path
    (workdir / "runs").rename(workdir / "elsewhere")
    (workdir / "config_run.py").write_text('OUTPUT_DIR = "~/elsewhere"\n', encoding="utf-8")
    monkeypatch.syspath_prepend(workdir)
    monkeypatch.delitem(sys.modules, "config_run", raising=False)
    assert load_run("one").path == load_run().path == workdir / "elsewhere" / "one"
    (workdir / "config_run.py").write_text("OUTPUT_DIR = 5\n", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "config_run")
    with pytest.raises(SettingsError, match=r"OUTPUT_DIR is 5 in config_run\.py"):
        load_run("one")


def test_a_run_that_was_moved_is_used_from_anywhere(trained, workdir, monkeypatch):
    (workdir / "far" / "away").mkdir(parents=True)
    shutil.move(trained.path, workdir / "far" / "钟 renamed")
    monkeypatch.chdir(workdir / "far" / "away")
    run = load_run("../钟 renamed", which="last", weights="fp32")
    assert torch.equal(logits_of(run.model), logits_of(trained.model))


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
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    opened = [arguments for event, arguments in events if event == "open"]
    assert opened, "the hook sees nothing"
    assert len(opened) == len(events)
    assert not [path for path, _, flags in opened if isinstance(flags, int) and flags & writing]
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("Note: ")]) == damaged, said


def test_a_pickle_is_refused_without_being_opened(original, workdir):
    canary = Canary(workdir / "canary")
    (workdir / "pickle.pt").write_bytes(pickle.dumps(canary))
    torch.save(canary, workdir / "torch.pt")
    if hasattr(os, "mkfifo"):
        os.mkfifo(workdir / "pipe.pt")  # who opens it waits for ever
    for path in workdir.glob("*.pt"):
        with watching() as events, pytest.raises(CheckpointError, match=rf"{path.name} is no run"):
            load_run(path.name)
        assert not [arguments for _, arguments in events if str(arguments[0]).endswith(".pt")]
    assert not canary.path.exists()


def test_what_is_no_run_is_refused_by_name(trained):
    names = ["two", "runs/two", "runs", ".", "", "runs/one/settings.json", "runs/one/checkpoints"]
    names += ["../../etc/passwd", "~nobody-of-this-name/run", "x" * 300, "x/" * 3000, "a\0b", "*"]
    for given in (*names, "one\n"):
        with pytest.raises(CheckpointError) as caught:
            load_run(given)
        assert len(str(caught.value).splitlines()) <= 4, given


WRONG_SETTINGS = [
    {"model": None},
    {"model": [1]},
    {"model": {}},
    {"model": lambda model: model | {"n_experts": 4}},
    {"model": lambda model: {"vocab_size": model["vocab_size"]}},
    {"model": lambda model: model | {"n_heads": 3}},  # which the width is no multiple of
    {"model": lambda model: model | {"emb_dim": "8"}},
    {"model": lambda model: model | {"emb_dim": 8.0}},
    {"model": lambda model: model | {"emb_dim": 16}},
    {"model": lambda model: model | {"n_layers": 2}},
    {"model": lambda model: model | {"context_length": 17}},
    {"model": lambda model: model | {"architecture": "llama"}},
    {"model": lambda model: model | {"vocab_size": model["vocab_size"] + 1}},
    {"sampling": None},
    {"sampling": "greedy"},
    {"sampling": {"temperature": -1}},
    {"sampling": {"beams": 4}},
    {"run_id": "0" * 16},
    {"run_id": None},
    {"run_id": 5},
    {"tokenizer": None},
    {"tokenizer": ["char"]},
    {"tokenizer": "char-0000000000000000"},
]


def test_settings_that_do_not_describe_the_weights_are_refused(trained):
    settings = read(trained.path / "settings.json")
    for change in WRONG_SETTINGS:
        ((name, value),) = change.items()
        edit_settings(trained.path, **{name: value(settings[name]) if callable(value) else value})
        with pytest.raises(CheckpointError, match="one"):
            load_run("one")
        edit_settings(trained.path, **settings)
    assert load_run("one").step == 4


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


def test_the_newest_run_is_the_one_that_was_finished_last(tmp_path, monkeypatch):
    old = make_run(tmp_path / "zebra", finished_at=1500)
    make_run(tmp_path / "2026-11-08_poems", finished_at=1000)
    make_run(tmp_path / "unfinished", finished_at=None)
    make_run(tmp_path / "other", finished_at=3000, settings=False)  # of another program
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    (tmp_path / "zz.txt").write_text("no folder", encoding="utf-8")
    assert newest_finished_run(tmp_path) == old
    longer = make_run(tmp_path / "longer", finished_at=2000) / "summary.json"
    assert newest_finished_run(tmp_path) == longer.parent
    glob = Path.glob

    def then_gone(self, pattern):
        """A run that is made longer loses its summary, between two looks at it too."""
        found = list(glob(self, pattern))
        longer.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "glob", then_gone)
    assert newest_finished_run(tmp_path) == old


def test_where_none_is_finished_an_unfinished_one_is_named(trained, workdir):
    (trained.path / "summary.json").unlink()
    assert load_run("one").step == 4
    with pytest.raises(CheckpointError, match="one is unfinished, but can be named"):
        load_run()
    (workdir / "runs").rename(workdir / "moved")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"(?s)no finished run in .*Train a model first"):
            load_run()
        (workdir / "runs").write_text("a file", encoding="utf-8")
