"""Run folders from strangers: whatever is in them, it runs no code, fills no memory and tells no
secret; they are used or refused in words."""

import ast
import contextlib
import functools
import gc
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError, DataError, PipelineError, ResourceError
from exchange.saved_run import load_run
from planning.decisions import MOST_SETTINGS_BYTES, read_record
from storage import files as storage
from tests.faults.saving import forked
from tests.hostile import HOSTILE_TENSORS, Canary, file_of, hostile_json, mutated, project_trees
from tests.trained import edit_settings, read, remade, train_run
from text.tokenizer import BPETokenizer, load_tokenizer
from text.tokenizer_file import END_OF_TEXT

BEST, NEWEST = "best/step-00000004", "checkpoints/step-00000004"
PLANTED = {
    "OPENAI_API_KEY": "sk-s3cr3t-one",
    "HF_TOKEN": "hf_s3cr3t-two",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t/three",
    "MY_PASSWORD": "s3cr3t four",
    "USER": "somebody-by-name",
    "LOGNAME": "somebody-by-name",
    "USERNAME": "somebody-by-name",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Path, str]:
    """A finished run of four steps, trained beside secrets, and what it printed."""
    home = tmp_path_factory.mktemp("home-of-somebody")
    (home / "project").mkdir()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        for name, value in (PLANTED | {"HOME": str(home), "USERPROFILE": str(home)}).items():
            patch.setenv(name, value)
        path = train_run(home / "project").path
    for folder in [*path.glob("best/step-*"), *path.glob("checkpoints/step-*")]:
        if folder.name != "step-00000004":
            shutil.rmtree(folder)
    return path, said.getvalue()


@pytest.fixture
def run(original, workdir) -> Path:
    """A copy of that run in the working directory's runs, with a single set of weights each."""
    shutil.copytree(original[0], workdir / "runs" / "one")
    return workdir / "runs" / "one"


def reseal(folder: Path) -> None:
    """Write the manifest that fits a folder's files, as any forger can."""
    content = read(folder / "manifest.json")["content"]
    for name in content["files"]:
        data = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_bytes(storage._seal(content))


def refused(load: Callable, kind: type[PipelineError] = CheckpointError) -> str:
    """What is said against a file or a run; it must not be said at any length."""
    with pytest.raises(kind) as caught:
        load()
    assert len(str(caught.value)) < 2000, "nobody reads that"
    return str(caught.value)


def status_of_this_process(name: str) -> int:
    """Bytes by Linux's name."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def cost_of(work: Callable) -> float:
    """The processor's seconds that work takes, whatever it ends with."""
    gc.disable()  # which looks at all that other tests have left
    started_at = time.process_time()
    with contextlib.suppress(Exception):
        work()
    cost = time.process_time() - started_at
    gc.enable()
    return cost


# ------------------------------------------------------------------------------- no code runs


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_under_any_name_in_a_run_folder_is_never_run(run, tmp_path, writer):
    canary = Canary(tmp_path / "canary")
    torch.save({"model": canary}, tmp_path / "bomb")
    bomb = tmp_path / "bomb"
    content = pickle.dumps({"model": canary}) if writer == "pickle" else bomb.read_bytes()
    needed = ["settings.json", "tokenizer.json"]
    needed += [f"{NEWEST}/model.safetensors", f"{NEWEST}/manifest.json"]
    unread = ["data.json", "summary.json", "metrics.jsonl", "pytorch_model.bin", "best/model.pt"]
    unread += [f"{NEWEST}/optimizer.safetensors", f"{NEWEST}/state.json", "checkpoints/.metadata"]
    # the last weights stand in for these
    unread += [f"{BEST}/model.safetensors", f"{BEST}/manifest.json"]
    for name in needed + unread:
        file = run / name
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        is_sealed = file.parent.name == "step-00000004" and file.name != "manifest.json"
        if is_sealed:
            reseal(file.parent)
        if name in needed:
            refused(lambda: load_run("one", which="last"))
        else:
            load_run("one")
        file.unlink() if before is None else file.write_bytes(before)
        if is_sealed:
            reseal(file.parent)
    assert not canary.path.exists()
    pickle.loads(pickle.dumps(canary))
    assert canary.path.exists()  # it would have been seen


PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
BANNED_ARGUMENTS = ("trust_remote_code", "weights_only", "allow_pickle")
BANNED_NAMES = ("eval", "exec", "compile", "__import__")
BANNED_ATTRIBUTES = ("torch.load", "torch.save", "torch.package", "os.system", "os.popen")
BANNED_ATTRIBUTES += ("yaml.load", "yaml.unsafe_load", "hub.load")
BANNED_METHODS = ("load_checkpoint", "load_state_dict_from_url", "read_pickle")


def dangers(tree: ast.Module) -> Iterator[str]:
    """Calls and imports by which data can become code or a command."""
    for node in ast.walk(tree):
        found = False
        if isinstance(node, ast.keyword) and node.arg == "shell":
            found = not (isinstance(node.value, ast.Constant) and node.value.value is False)
        elif isinstance(node, ast.keyword):
            found = node.arg in BANNED_ARGUMENTS
        elif isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
            found = f"{owner}.{node.attr}" in BANNED_ATTRIBUTES or node.attr in BANNED_METHODS
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [f"{module}.{a.name}" if module else a.name for a in node.names]
            found = any(
                name.split(".")[0] in PICKLES
                or name in BANNED_ATTRIBUTES
                or "distributed.checkpoint" in name
                for name in names
            )
        elif isinstance(node, ast.Name):
            found = node.id in BANNED_NAMES
        if found:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def test_nothing_in_the_project_makes_code_or_commands_of_data():
    trees = project_trees()
    assert {"environment.py", "model.py", "engine/settings.py", "text/tokenizer.py"} <= set(trees)
    found = {name: list(dangers(tree)) for name, tree in trees.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    for code in (
        "load(name, trust_remote_code=True)",
        "load(name, weights_only=False)",
        "run(line, shell=True)",
        "run(line, shell=flag)",
        "os.system(line)",
        "from torch.distributed import checkpoint",
        "import torch.distributed.checkpoint as dcp",
        "from torch import load",
        "torch.load(path)",
        "import pickle",
        "from joblib import load",
        "numpy.load(path, allow_pickle=True)",
        "torch.hub.load_state_dict_from_url",
        "pandas.read_pickle(path)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
    ):
        assert len(list(dangers(ast.parse(code)))) == 1, code


# ---------------------------------------------------------------------- files made to do harm


@pytest.mark.parametrize("kind", ["deep", "one name twice", "half of a byte", "one tensor of many"])
def test_a_hostile_tensor_file_with_a_right_manifest_is_refused(run, kind):
    """Each way to say so; test_checkpoint has all the kinds there are."""
    for folder in (BEST, NEWEST):
        (run / folder / "model.safetensors").write_bytes(HOSTILE_TENSORS[kind])
        reseal(run / folder)
    refused(lambda: load_run("one"))


HUGE = {"emb_dim": 65_536, "n_heads": 1, "n_layers": 1024, "context_length": 1_000_000}
HUGE_MODELS = [
    HUGE,
    HUGE | {"positions": "sinusoidal"},
    HUGE | {"architecture": "llama", "positions": "rope", "activation": "swiglu"},
    {"n_layers": 1024},
    {"emb_dim": 65_536, "ff_dim": 1_000_000},
    {"context_length": 1_000_000},
]


def test_settings_of_a_huge_model_are_refused_before_it_is_built(run):
    model = read(run / "settings.json")["model"]
    for values in HUGE_MODELS:
        edit_settings(run, model=model | {"n_kv_heads": None} | values)
        assert "runs" in refused(lambda: load_run("one"))


def test_positions_that_no_memory_holds_are_refused(run, monkeypatch):
    """Sines and angles are in no file, so a small one may ask for any number of them."""
    remade(run, load_tokenizer(run / "tokenizer.json"), positions="sinusoidal")
    assert load_run("one", which="last").step == 9
    monkeypatch.setattr("exchange.saved_run.available_memory", lambda device: 10_000_000)
    model = read(run / "settings.json")["model"] | {"context_length": 1_000_000}
    edit_settings(run, model=model)
    assert "memory" in refused(lambda: load_run("one", which="last"), ResourceError)


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
    with pytest.raises(CheckpointError) as caught:  # no DataError: at fault is the run
        load_run("one")
    assert name in str(caught.value)
    assert not isinstance(caught.value, DataError)


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


def test_hostile_files_take_little_memory(run):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux tells the peak")

    def peak() -> int:
        return status_of_this_process("VmHWM")

    def take_all() -> None:
        gc.freeze()  # what other tests have left
        files = [run / folder / "model.safetensors" for folder in (BEST, NEWEST)]
        cases = [(files, file_of(b"{" + b" " * 20_000_000 + b"}"))]
        cases += [(files, HOSTILE_TENSORS[kind]) for kind in ("a header of 16 EB", "a long shape")]
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
            taken = peak()
            refused(lambda: load_run("one"))
            # "[]," is an object of 56 bytes and its place in a list; any loading takes 30 MB
            assert peak() - taken < 30e6 + 25 * len(content), content[:100]
            for path, old in zip(paths, before, strict=True):
                path.write_bytes(old)

    load_run("one")
    _, status = os.waitpid(forked(take_all), 0)  # where no other test's memory is free
    assert status == 0


# ------------------------------------------------------------------------- random mutations

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


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    ["settings.json", "tokenizer.json", "foreign", "model.safetensors", "manifest.json"],
)
def test_mutations_are_loaded_or_refused_and_end_in_no_other_way(run, name, count):
    chooser = random.Random(name)
    file = run / name if name.startswith(("settings", "tokenizer")) else run / BEST / name
    if name == "foreign":  # the same tokenizer as the library itself has to read it
        file = run / "tokenizer.json"
        file.write_text(json.dumps(read(file) | {"normalizer": {"type": "NFC"}}), encoding="utf-8")
    elif file.parent.name == Path(BEST).name:
        shutil.rmtree(run / "checkpoints")  # the last weights would stand in
    good, loaded = file.read_bytes(), 0
    for _ in range(count):
        if file.suffix == ".json" and chooser.random() < 0.6:
            tree = mutate_value(json.loads(good), chooser)
            is_sealed = name == "manifest.json" and isinstance(tree, dict) and "content" in tree
            changed = storage._seal(tree["content"]) if is_sealed else json.dumps(tree).encode()
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


# ------------------------------------------------------------------------------ paths elsewhere


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
@pytest.mark.parametrize("name", ["settings.json", "tokenizer.json"])
def test_what_a_link_leads_to_is_not_told(run, workdir, name):
    (workdir / "secret").write_text("the-s3cr3t: hunter2\n" * 3, encoding="utf-8")
    (run / name).unlink()
    (run / name).symlink_to(workdir / "secret")
    said = refused(lambda: load_run("one"))
    assert name in said
    assert "s3cr3t" not in said
    assert "hunter2" not in said


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

    _, status = os.waitpid(forked(read_all), 0)
    assert status == 0


# ----------------------------------------------------------------------------------- secrets


def test_no_secret_of_the_environment_is_in_what_a_run_leaves(original):
    path, printed = original
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    names = {file.relative_to(path).parts[0] for file in files}
    left = {"settings.json", "data.json", "checkpoints", "best", "samples.md", "metrics.jsonl"}
    assert left <= names
    assert printed
    files["what is printed"] = printed.encode()
    files["what is loaded"] = json.dumps(load_run(path).settings).encode()
    for secret in (*PLANTED, *PLANTED.values(), "s3cr3t", "home-of-somebody", os.environ["PATH"]):
        for file, content in files.items():
            assert secret.encode() not in content, f"{secret} is in {file}"
