"""A trained run, loaded for use: the right weights, exactly, wherever it is and whoever made it."""

import contextlib
import dataclasses
import functools
import gc
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

import environment
import exchange.saved_run
import main
from engine.errors import CheckpointError, DataError, PipelineError, ResourceError, SettingsError
from engine.linear import Linear
from engine.weights import Bf16Linear, Int8Linear, choose_weights
from exchange.saved_run import load_run
from generation import SamplingConfig
from model import GPTConfig, GPTModel
from planning.decisions import MOST_SETTINGS_BYTES, read_record
from planning.runs import newest_finished_run
from storage import cache, files
from storage.checkpoint import CheckpointStore, weights_of
from tests.conftest import REPOSITORY
from tests.faults.saving import forked
from tests.hostile import (
    HOSTILE_TENSORS,
    Canary,
    hostile_json,
    mutated,
    project_trees,
    reseal,
    status_of_this_process,
)
from tests.programs import everything_in, write_settings
from text.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from text.tokenizer_file import END_OF_TEXT
from training import journal

BEST, NEWEST = "best/step-00000004", "checkpoints/step-00000004"
PLANTED = {"OPENAI_API_KEY": "sk-s3cr3t-one", "HF_TOKEN": "hf_s3cr3t-two"}
PLANTED |= {"AWS_SECRET_ACCESS_KEY": "s3cr3t/three", "MY_PASSWORD": "s3cr3t four"}
PLANTED |= dict.fromkeys(("USER", "LOGNAME", "USERNAME"), "somebody-by-name")
TEXT = "the river carries the bell and the bell carries the river. 钟声 " * 12
SETTINGS = {
    "max_steps": 4,
    "eval_freq": 2,
    "save_every": 1,
    "keep_checkpoints": 3,
    "start_context": "the",
}
SETTINGS |= {"sampling_params": {"max_new_tokens": 3, "temperature": 0.5}}


@dataclass
class Trained:
    """A run's folder, and the model as training left it."""

    path: Path
    model: torch.nn.Module
    tokenizer: Tokenizer


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_settings(run: Path, **changes) -> None:
    """Change settings.json; None takes a name out."""
    settings = read(run / "settings.json") | changes
    settings = {n: value for n, value in settings.items() if changes.get(n, 0) is not None}
    (run / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


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


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Trained:
    """The finished run "one" of four steps, trained beside secrets; nobody changes it."""
    home = tmp_path_factory.mktemp("home-of-somebody")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        for name, value in (PLANTED | {"HOME": str(home), "USERPROFILE": str(home)}).items():
            patch.setenv(name, value)
        patch.chdir(home)
        patch.setattr(cache, "CACHE", home / "cache")
        patch.setattr(journal, "render_losses", lambda **_: None)  # most of the time otherwise
        patch.setattr(os, "fsync", lambda handle: None)  # nobody cuts the power here
        write_settings(home, TEXT, RUN_NAME="one", COMPILE=False, **SETTINGS)
        env = environment.prepare_environment("settings.py")
        main.run_pipeline(env)
        run = env.run.path.resolve()
    (home / "printed").write_text(said.getvalue(), encoding="utf-8")
    return Trained(run, env.model.eval(), env.tokenizer)


@pytest.fixture
def trained(original, workdir) -> Trained:
    """A copy of that run in the working directory's runs, where load_run() looks."""
    shutil.copytree(original.path, workdir / "runs" / "one")
    return Trained(workdir / "runs" / "one", original.model, original.tokenizer)


@pytest.fixture
def run(trained) -> Path:
    """The folder of such a copy, with a single set of weights each: no other can stand in."""
    for folder in trained.path.glob("*/step-*"):
        if folder.name != "step-00000004":
            shutil.rmtree(folder)
    return trained.path


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """(2, T, V) logits of ids that a seed draws, as long as the context."""
    config = model.config
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(config.vocab_size, (2, config.context_length), generator=generator)
    with torch.no_grad():
        return model(ids)


def assert_has(model: torch.nn.Module, file: Path) -> None:
    """A model has the weights of a file, to the last bit."""
    saved = safetensors.torch.load_file(file)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert safetensors.torch.save(weights_of(model)) == safetensors.torch.save(saved)


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
    ("kind", "layer"), [("fp32", Linear), ("bf16", Bf16Linear), ("int8", Int8Linear)]
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


def test_what_cannot_be_had_is_refused_with_what_can(original):
    cases = [
        ({"which": "first"}, SettingsError, 'which is \'first\'; it must be "best" or "last"'),
        ({"weights": "int4"}, SettingsError, 'weights is "int4"; it must be one of "auto"'),
        *(({"device": odd}, SettingsError, repr(odd)) for odd in ("gpu", "meta", "")),
        ({"device": "cuda:77"}, ResourceError, "no such device"),
        ({"device": "cuda:256"}, ResourceError, "no such device"),  # torch takes it for cuda:0
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            load_run(original.path, **wrong)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
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


def test_a_run_is_named_by_its_path_or_its_name_in_output_dir_wherever_it_was_moved(
    trained, workdir, monkeypatch
):
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
    shutil.move(workdir / "elsewhere" / "one", workdir / "钟 renamed")
    monkeypatch.chdir(workdir / "elsewhere")
    run = load_run("../钟 renamed", which="last", weights="fp32")
    assert torch.equal(logits_of(run.model), logits_of(trained.model))


@functools.cache
def audit_events() -> deque:
    """What this process opens and changes, as (event, arguments); a hook can't be taken out."""
    events: deque = deque(maxlen=10_000)
    changes = ("mkdir", "rename", "remove", "rmdir", "truncate", "utime", "chmod")
    watched = {"open", *(f"os.{change}" for change in changes)}
    sys.addaudithook(lambda *event: events.append(event) if event[0] in watched else None)
    return events


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_reading_changes_nothing_on_the_disk(trained, workdir, damaged, capsys):
    if damaged:  # training would set it aside
        newest = max(trained.path.glob("checkpoints/step-*")) / "model.safetensors"
        newest.write_bytes(newest.read_bytes()[:-1] + b"?")
        (trained.path / "checkpoints" / ".tmp-1-step-00000009").mkdir()  # a save in progress
        (trained.path / "best" / ".del-1-step-00000001").mkdir()
    before = everything_in(workdir)
    audit_events().clear()
    for which in ("best", "last"):
        load_run("one", which=which)
    events = list(audit_events())
    assert everything_in(workdir) == before
    assert {event for event, _ in events} == {"open"}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    opened = [arguments for _, arguments in events]
    assert not [path for path, _, flags in opened if isinstance(flags, int) and flags & writing]
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("Note: ")]) == damaged, said


def test_what_is_no_run_is_refused_by_name(trained):
    names = ["two", "runs/two", "runs", ".", "", "runs/one/settings.json", "runs/one/checkpoints"]
    names += ["../../etc/passwd", "~nobody-of-this-name/run", "x" * 300, "x/" * 3000, "a\0b", "*"]
    for given in (*names, "one\n"):
        with pytest.raises(CheckpointError) as caught:
            load_run(given)
        assert len(str(caught.value).splitlines()) <= 4, given


def test_settings_that_do_not_describe_the_weights_are_refused(trained):
    settings = read(trained.path / "settings.json")
    model, size = settings["model"], settings["model"]["vocab_size"]
    changes = [{"n_experts": 4}, {"n_heads": 3}, {"n_layers": 2}, {"context_length": 17}]
    changes += [{"emb_dim": size} for size in ("8", 8.0, 16)]
    changes += [{"architecture": "llama"}, {"vocab_size": size + 1}]
    wrong = {
        "model": [None, [1], {}, {"vocab_size": size}, *(model | change for change in changes)],
        "sampling": [None, "greedy", {"temperature": -1}, {"beams": 4}],
        "run_id": ["0" * 16, None, 5],
        "tokenizer": [None, ["char"], "char-0000000000000000"],
    }
    for name, values in wrong.items():
        for value in values:
            edit_settings(trained.path, **{name: value})
            with pytest.raises(CheckpointError, match="one"):
                load_run("one")
            (trained.path / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    assert load_run("one").step == 4


def test_the_newest_run_is_the_one_that_was_finished_last(tmp_path, monkeypatch):
    times = {"zebra": 1500, "2026-11-08_poems": 1000, "longer": 2000, "unfinished": None}
    for name, finished_at in (times | {"other program's": 3000}).items():
        (tmp_path / name).mkdir()
        if name in times:
            (tmp_path / name / "settings.json").write_text("{}")
        if finished_at:
            (tmp_path / name / "summary.json").write_text("{}")
            os.utime(tmp_path / name / "summary.json", (finished_at, finished_at))
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "zz.txt").write_text("no folder")
    assert newest_finished_run(tmp_path) == tmp_path / "longer"
    glob = Path.glob

    def then_gone(self, pattern):
        """A run that is made longer loses its summary, between two looks at it too."""
        found = list(glob(self, pattern))
        (tmp_path / "longer" / "summary.json").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "glob", then_gone)
    assert newest_finished_run(tmp_path) == tmp_path / "zebra"


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


# what strangers may put into a run folder runs no code, fills no memory and tells no secret


def refused(load: Callable, kind: type[PipelineError] = CheckpointError) -> str:
    """What is said against a file or a run; it must not be said at any length."""
    with pytest.raises(kind) as caught:
        load()
    assert len(str(caught.value)) < 2000, "nobody reads that"
    return str(caught.value)


def cost_of(work: Callable) -> float:
    """The processor's seconds that work takes, whatever it ends with; the least of three tries."""
    gc.disable()  # which looks at all that other tests have left
    costs = []
    for _ in range(3):
        started_at = time.process_time()
        with contextlib.suppress(Exception):
            work()
        costs.append(time.process_time() - started_at)
    gc.enable()
    return min(costs)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_under_any_name_in_a_run_folder_is_never_run(run, tmp_path, writer):
    canary = Canary(tmp_path / "canary")
    torch.save({"model": canary}, tmp_path / "bomb")
    content = pickle.dumps({"model": canary})
    if writer == "torch":
        content = (tmp_path / "bomb").read_bytes()
    unread = ["data.json", "summary.json", "metrics.jsonl", "pytorch_model.bin", "best/model.pt"]
    unread += [f"{NEWEST}/optimizer.safetensors", f"{NEWEST}/state.json", "checkpoints/.metadata"]
    # the last weights stand in for these
    for name in (*unread, f"{BEST}/model.safetensors", f"{BEST}/manifest.json"):
        (run / name).write_bytes(content)
    reseal(run / NEWEST)
    load_run("one")
    needed = ["settings.json", "tokenizer.json", f"{NEWEST}/model.safetensors"]
    for name in (*needed, f"{NEWEST}/manifest.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(content)
        if name == needed[-1]:
            reseal(run / NEWEST)
        refused(lambda: load_run("one", which="last"))
        (run / name).write_bytes(before)
    assert not canary.path.exists()
    pickle.loads(pickle.dumps(canary))
    assert canary.path.exists()  # it would have been seen


DANGER = re.compile(
    r"""(?<![.\w])(?<!def\ )(eval|exec|compile|__import__)\(
    |^[ \t]*(import|from)\ (c?pickle|_pickle|dill|cloudpickle|joblib|shelve|marshal)\b
    |distributed(\.|\ import\ )checkpoint
    |torch(\.|\ import\ )(load|save|package)\b(?!\([^()]*weights_only=True\))
    |hub\.load|load_state_dict_from_url
    |\b(load_checkpoint|read_pickle)\b|yaml\.(unsafe_)?load\b|os\.(system|popen)\b
    |\b(trust_remote_code|allow_pickle)\s*=|\bweights_only\s*=(?!True\b)
    |\bshell\s*=\s*(?!False\b)""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
DANGEROUS = """load(name, trust_remote_code=True)
load(name, weights_only=False)
run(line, shell=True)
run(line, shell=flag)
os.system(line)
from torch.distributed import checkpoint
import torch.distributed.checkpoint as dcp
from torch import load
torch.load(path)
import pickle
from joblib import load
numpy.load(path, allow_pickle=True)
torch.hub.load_state_dict_from_url
pandas.read_pickle(path)
eval(text)"""


def test_nothing_in_the_project_makes_code_or_commands_of_data():
    assert all(map(DANGER.search, DANGEROUS.splitlines()))
    harmless = ("model.eval()", "re.compile(x)", "run(x, shell=False)")
    harmless += ("torch.load(path, mmap=True, weights_only=True)",)
    assert not any(map(DANGER.search, harmless))
    assert {"environment.py", "engine/settings.py", "text/tokenizer.py"} <= set(project_trees())
    for name in project_trees():
        assert DANGER.findall((REPOSITORY / name).read_text(encoding="utf-8")) == [], name


HUGE = {"emb_dim": 65_536, "n_heads": 1, "n_layers": 1024, "context_length": 1_000_000}
# each way to say so; test_checkpoint has all the kinds there are
KINDS_OF_TENSORS = ["a header of 16 EB", "a header of blanks", "a long shape", "deep"]
KINDS_OF_TENSORS += ["one name twice", "half of a byte", "one tensor of many"]
HUGE_MODELS = [
    HUGE,
    HUGE | {"positions": "sinusoidal"},
    HUGE | {"architecture": "llama", "positions": "rope", "activation": "swiglu"},
    {"n_layers": 1024},
    {"emb_dim": 65_536, "ff_dim": 1_000_000},
    {"context_length": 1_000_000},
]


def test_positions_that_no_memory_holds_are_refused(run, monkeypatch):
    """Sines and angles are in no file, so a small one may ask for any number of them."""
    remade(run, load_tokenizer(run / "tokenizer.json"), positions="sinusoidal")
    assert load_run("one", which="last").step == 9
    monkeypatch.setattr("exchange.saved_run.available_memory", lambda device: 10_000_000)
    model = read(run / "settings.json")["model"] | {"context_length": 1_000_000}
    edit_settings(run, model=model)
    assert "memory" in refused(lambda: load_run("one", which="last"), ResourceError)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["settings.json", "tokenizer.json"])
def test_hostile_json_is_refused_in_words_at_little_cost(run, name):
    reader, kind = {
        "settings.json": (functools.partial(read_record, run), CheckpointError),
        "tokenizer.json": (functools.partial(load_tokenizer, run / name), DataError),
    }[name]
    reader()
    usual = cost_of(reader)
    for what, content in hostile_json(20_000).items():
        (run / name).write_bytes(content)
        assert name in refused(reader, kind), what
        parsing = cost_of(lambda content=content: json.loads(content))
        assert cost_of(reader) < 30 * (parsing + usual), what
    assert name in refused(lambda: load_run("one"))  # no DataError: at fault is the run


def test_settings_of_any_length_are_refused_briefly_or_not_read(run):
    model = read(run / "settings.json")["model"]
    for longer in ({"y" * 100_000: 1}, {"activation": "z" * 100_000}):
        edit_settings(run, model=model | longer)
        refused(lambda: read_record(run))
    edit_settings(run, model=model)
    with open(run / "settings.json", "ab") as file:
        file.write(b" " * MOST_SETTINGS_BYTES)
    assert "settings.json can't be read: it is too long" in refused(lambda: read_record(run))
    os.truncate(run / "settings.json", MOST_SETTINGS_BYTES)
    read_record(run)


def test_a_token_of_any_length_is_read_in_no_time(tmp_path):
    """Which merges made a token is worked out pair by pair, and again after each of them."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"aa": 256, b"aaaa": 257}
    tree = json.loads(BPETokenizer("small", ranks).to_json())
    costs = []
    for length in (8, 20_000):
        vocabulary = tree["model"]["vocab"] | {"a" * length: 258, END_OF_TEXT: 259}
        added = [tree["added_tokens"][0] | {"id": 259}]
        changed = {"model": tree["model"] | {"vocab": vocabulary}, "added_tokens": added}
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree | changed), encoding="utf-8")
        costs.append(cost_of(lambda: load_tokenizer(tmp_path / "tokenizer.json")))
    assert costs[1] < 20 * costs[0]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells the peak")
def test_hostile_files_and_huge_models_are_refused_and_take_little_memory(run):
    def take_all() -> None:
        gc.freeze()  # what other tests have left
        files = [run / folder / "model.safetensors" for folder in (BEST, NEWEST)]
        cases = [(files, HOSTILE_TENSORS[kind]) for kind in KINDS_OF_TENSORS]
        for name in ("tokenizer.json", "settings.json"):
            cases += [([run / name], content) for content in hostile_json(50_000).values()]
        record = read(run / "settings.json")
        for values in HUGE_MODELS:
            model = record["model"] | {"n_kv_heads": None} | values
            cases.append(([run / "settings.json"], json.dumps(record | {"model": model}).encode()))
        for paths, content in cases:
            before = [path.read_bytes() for path in paths]
            for path in paths:
                path.write_bytes(content)
                if path.name == "model.safetensors":
                    reseal(path.parent)
            Path("/proc/self/clear_refs").write_text("5")
            before_it = status_of_this_process("VmHWM")
            refused(lambda: load_run("one"))
            # "[]," is an object of 56 bytes and its place in a list; any loading takes 30 MB
            taken = status_of_this_process("VmHWM") - before_it
            assert taken < 30e6 + 25 * len(content), content[:100]
            for path, old in zip(paths, before, strict=True):
                path.write_bytes(old)

    load_run("one")
    assert os.waitpid(forked(take_all), 0)[1] == 0  # where no other test's memory is free


ODD = [None, True, -1, 0, 1, 3.5, 1e308, 10**30, "", "x", [], {}, [1], {"a": 1}, "llama", 65536]


def mutate_value(value: object, chooser: random.Random) -> object:
    """A JSON value with one value in it replaced, at any depth, or a name taken out."""
    if isinstance(value, dict) and value and chooser.random() < 0.95:
        name = chooser.choice(list(value))
        rest = {key: kept for key, kept in value.items() if key != name}
        is_left_out = chooser.random() < 0.1
        return rest if is_left_out else value | {name: mutate_value(value[name], chooser)}
    if isinstance(value, list) and value and chooser.random() < 0.9:
        place = chooser.randrange(len(value))
        return [*value[:place], mutate_value(value[place], chooser), *value[place + 1 :]]
    return chooser.choice(ODD)


@pytest.mark.parametrize(
    "name", ["settings.json", "tokenizer.json", "foreign", "model.safetensors", "manifest.json"]
)
def test_mutations_are_loaded_or_refused_and_end_in_no_other_way(run, name):
    chooser, count = random.Random(name), 25
    file = run / name if name.startswith(("settings", "tokenizer")) else run / BEST / name
    if name == "foreign":  # the same tokenizer as the library itself has to read it
        file = run / "tokenizer.json"
        file.write_text(json.dumps(read(file) | {"normalizer": {"type": "NFC"}}), encoding="utf-8")
    elif file.parent.name == Path(BEST).name:
        shutil.rmtree(run / "checkpoints")  # the last weights would stand in
    good, loaded = file.read_bytes(), 0
    for number in range(count):
        if number == 0:  # so that what is refused later is refused for its change
            changed = good
        elif file.suffix == ".json" and chooser.random() < 0.6:
            tree = mutate_value(json.loads(good), chooser)
            is_sealed = name == "manifest.json" and isinstance(tree, dict) and "content" in tree
            changed = files._seal(tree["content"]) if is_sealed else json.dumps(tree).encode()
        else:
            cut = chooser.choice((2000, len(good)))  # the numbers of a tensor file, too
            changed = mutated(good[:cut], chooser) + good[cut:]
        file.write_bytes(changed)
        if name == "model.safetensors":
            reseal(file.parent)
        try:
            if file.name == "tokenizer.json":  # a forger names the one that is there
                edit_settings(run, tokenizer=load_tokenizer(file).fingerprint)
            load_run("one", weights="fp32")
            loaded += 1
        except PipelineError as error:
            assert len(str(error)) < 4000
    assert 0 < loaded < 0.9 * count, "these mutations show little"


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
@pytest.mark.parametrize("name", ["settings.json", "tokenizer.json"])
def test_what_a_link_leads_to_is_not_told(run, workdir, name):
    (workdir / "secret").write_text("the-s3cr3t: hunter2\n" * 3, encoding="utf-8")
    (run / name).unlink()
    (run / name).symlink_to(workdir / "secret")
    said = refused(lambda: load_run("one"))
    assert name in said and "s3cr3t" not in said and "hunter2" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="pipes and devices of Linux")
def test_what_never_ends_is_not_read(run):
    import resource  # which Windows lacks

    def read_all() -> None:
        signal.alarm(600)  # who opens a pipe waits for ever
        taken = status_of_this_process("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), taken + (1 << 30)))
        for name in ("settings.json", "tokenizer.json"):
            content = (run / name).read_bytes()
            for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
                (run / name).unlink()
                make(run / name)
                assert str(Path("one", name)) in refused(lambda: load_run("one"))
                (run / name).rmdir() if (run / name).is_dir() else (run / name).unlink()
                (run / name).write_bytes(content)

    assert os.waitpid(forked(read_all), 0)[1] == 0


def test_no_secret_of_the_environment_is_in_what_a_run_leaves(original):
    path = original.path
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    left = {"settings.json", "data.json", "checkpoints", "best", "samples.md", "metrics.jsonl"}
    assert left <= {file.relative_to(path).parts[0] for file in files}
    printed = files["what is printed"] = (path.parent.parent / "printed").read_bytes()
    assert printed
    files["what is loaded"] = json.dumps(load_run(path).settings).encode()
    for secret in (*PLANTED, *PLANTED.values(), "s3cr3t", "home-of-somebody", os.environ["PATH"]):
        for file, content in files.items():
            assert secret.encode() not in content, f"{secret} is in {file}"
