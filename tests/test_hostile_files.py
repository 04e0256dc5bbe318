"""Run folders from strangers: whatever is in them, it runs no code, fills no memory and tells no
secret; they are used or refused in words."""

import ast
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError, DataError, PipelineError, ResourceError
from exchange.saved_run import load_run
from planning.decisions import MOST_SETTINGS_BYTES
from storage import files as storage
from tests.conftest import REPOSITORY
from tests.test_checkpoint import HOSTILE, file_of
from tests.test_load_run import Trained, edit_settings, listing, read, train_run
from tests.test_run_folder import Canary
from text.tokenizer import BPETokenizer, load_tokenizer
from text.tokenizer_file import END_OF_TEXT

ALLOWED_S = 4.0  # for a refusal that takes a second, on a machine that is busy
ALLOWED_S_PER_MB = 0.3  # for files that are made of nothing but JSON's brackets
UNSEALED = ("settings.json", "tokenizer.json", "data.json", "summary.json", "metrics.jsonl")
BEST, NEWEST = "best/step-00000004", "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Trained:
    """A finished run of four steps, the last its best; nobody changes it."""
    return train_run(tmp_path_factory.mktemp("original"), RUN_NAME="one")


@pytest.fixture
def run(original, workdir) -> Path:
    """A copy of that run in the working directory's runs, with a single set of weights each."""
    path = workdir / "runs" / "one"
    shutil.copytree(original.path, path)
    for folder in [*path.glob("best/step-*"), *path.glob("checkpoints/step-*")]:
        if folder.name != "step-00000004":
            shutil.rmtree(folder)
    assert load_run("one", which="best").step == load_run("one", which="last").step == 4
    return path


def reseal(folder: Path, **facts) -> None:
    """Write the manifest that fits a folder's files, as any forger can."""
    content = read(folder / "manifest.json")["content"] | facts
    for name in content["files"]:
        data = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_bytes(storage._seal(content))


def refused(which: str = "best", kinds: tuple = (CheckpointError,), n_bytes: int = 0) -> str:
    """What load_run() says against the run; it must say so soon, and not at any length."""
    started_at = time.monotonic()
    with pytest.raises(kinds) as caught:
        load_run("one", which=which)
    assert time.monotonic() - started_at < ALLOWED_S + ALLOWED_S_PER_MB * n_bytes / 1e6
    assert len(str(caught.value)) < 2000, "nobody reads that"
    return str(caught.value)


# ------------------------------------------------------------------------------- no code runs


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_under_any_name_in_a_run_folder_is_never_run(run, tmp_path, writer):
    canary = tmp_path / "canary"
    if writer == "pickle":
        content = pickle.dumps({"model": Canary(canary)})
    else:
        torch.save({"model": Canary(canary)}, tmp_path / "bomb")
        content = (tmp_path / "bomb").read_bytes()
    sealed = [f"{BEST}/{name}" for name in os.listdir(run / BEST)]
    sealed += [f"{NEWEST}/{name}" for name in os.listdir(run / NEWEST)]
    beside = ("pytorch_model.bin", "model.pt", "best/model.pt", "checkpoints/.metadata", "rng.pth")
    needed = {"settings.json", "tokenizer.json"}
    needed |= {name for name in sealed if name.endswith(("model.safetensors", "manifest.json"))}
    for name in (*UNSEALED, *sealed, *beside):
        before = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).write_bytes(content)
        if name in sealed and not name.endswith("manifest.json"):
            reseal((run / name).parent)
        for which in ("best", "last"):
            if name in needed - {f"{BEST}/model.safetensors", f"{BEST}/manifest.json"} and (
                which == "last" or not name.startswith("checkpoints")
            ):
                refused(which)
            else:  # nobody reads it for use, or the last weights stand in for the best
                load_run("one", which=which)
        if before is None:
            (run / name).unlink()
        else:
            (run / name).write_bytes(before)
            if name in sealed and not name.endswith("manifest.json"):
                reseal((run / name).parent)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # it would have been seen


def dangers(tree: ast.Module) -> Iterator[str]:
    """Calls by which data can become code or a command, beside those that test_checkpoint bans."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only"):
            yield f"{node.arg} in line {node.value.lineno}"
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"shell in line {node.value.lineno}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "hub.load"):
                yield f"{name} in line {node.lineno}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None) or ""
            if any("distributed.checkpoint" in f"{module}.{name}" for name in names):
                yield f"distributed.checkpoint in line {node.lineno}"
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
            yield f"{node.id} in line {node.lineno}"


def test_nothing_in_the_project_makes_code_or_commands_of_data():
    files = [
        path
        for path in REPOSITORY.rglob("*.py")
        if not {"tests", "cache", "runs"} & set(path.relative_to(REPOSITORY).parts)
        and not any(part.startswith((".", "venv")) for part in path.relative_to(REPOSITORY).parts)
    ]
    assert {"environment.py", "main.py", "model.py"} <= {path.name for path in files}
    assert {"engine", "text", "benchmarks"} <= {path.parent.name for path in files}
    found = [
        f"{path.relative_to(REPOSITORY)}: {danger}"
        for path in files
        for danger in dangers(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "load(name, trust_remote_code=True)",
        "load(name, weights_only=False)",
        "run(line, shell=True)",
        "run(line, shell=flag)",
        "os.system(line)",
        "from torch.distributed import checkpoint",
        "import torch.distributed.checkpoint as dcp",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
    ],
)
def test_a_call_that_makes_code_or_commands_of_data_is_found(code):
    assert len(list(dangers(ast.parse(code)))) == 1


# ---------------------------------------------------------------------- files made to do harm


def with_slow(kinds: dict, slow: tuple) -> list:
    """The names of cases, those that take long marked as slow."""
    return [pytest.param(k, marks=pytest.mark.slow) if k in slow else k for k in kinds]


@pytest.mark.parametrize("kind", with_slow(HOSTILE, ("a header of 99 MB, all blanks",)))
def test_a_hostile_tensor_file_with_a_right_manifest_is_refused(run, kind):
    for folder in (BEST, NEWEST):
        (run / folder / "model.safetensors").write_bytes(HOSTILE[kind])
        reseal(run / folder)
    refused("best")
    refused("last")


TYPES = {"F64": 8, "I64": 8, "U8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "C64": 8, "F8_E4M3": 1}


@pytest.mark.parametrize("dtype", [*TYPES, "F4"])
def test_weights_of_another_type_are_refused(run, dtype):
    model = load_run("one", weights="fp32").model
    header, start = {}, 0
    for name, value in model.named_parameters():
        shape = list(value.shape)
        if dtype == "F4":  # two in a byte, which torch counts as one
            n_bytes, shape[-1] = value.numel(), 2 * shape[-1]
        else:
            n_bytes = value.numel() * TYPES[dtype]
        offsets = [start, start + n_bytes]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        start += n_bytes
    content = file_of(json.dumps(header).encode(), bytes(start))
    for folder in (BEST, NEWEST):
        (run / folder / "model.safetensors").write_bytes(content)
        reseal(run / folder)
    assert "not fp32" in refused("best")


def test_names_of_any_length_make_no_message_of_any_length(run):
    header = {"x" * 100_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    for folder in (BEST, NEWEST):
        (run / folder / "model.safetensors").write_bytes(
            file_of(json.dumps(header).encode(), bytes(4))
        )
        reseal(run / folder)
    refused("best")
    reseal(run / NEWEST, step="9" * 100_000)
    refused("last")
    reseal(run / NEWEST, format="9" * 100_000)
    refused("last")
    model = read(run / "settings.json")["model"]
    edit_settings(run, model=model | {"y" * 100_000: 1})
    refused("best")
    edit_settings(run, model=model | {"activation": "z" * 100_000})
    refused("best")


HUGE = {"emb_dim": 65_536, "n_heads": 1, "n_layers": 1024, "context_length": 1_000_000}
HUGE_MODELS = {
    "gpt2": HUGE,
    "sinusoidal": HUGE | {"positions": "sinusoidal"},
    "llama": HUGE | {"architecture": "llama", "positions": "rope", "activation": "swiglu"},
    "deep": {"n_layers": 1024},
    "wide": {"emb_dim": 65_536, "ff_dim": 1_000_000},
    "long": {"context_length": 1_000_000},
}


@pytest.mark.parametrize("kind", HUGE_MODELS)
def test_settings_of_a_huge_model_are_refused_before_it_is_built(run, kind):
    model = read(run / "settings.json")["model"]
    own = {"n_kv_heads": None} if kind in ("gpt2", "sinusoidal", "llama") else {}
    edit_settings(run, model=model | own | HUGE_MODELS[kind])
    assert "runs" in refused("best")


def test_positions_that_no_memory_holds_are_refused(run, monkeypatch):
    """Sines and angles are in no file, so a small one may ask for any number of them."""
    model = read(run / "settings.json")["model"]
    weights = run / BEST / "model.safetensors"
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    gone = header.pop("position_embedding.weight")["data_offsets"]
    assert gone is not None
    data, start, kept = content[8 + length :], 0, b""
    for entry in header.values():
        first, last = entry["data_offsets"]
        kept += data[first:last]
        entry["data_offsets"] = [start, start + last - first]
        start += last - first
    weights.write_bytes(file_of(json.dumps(header).encode(), kept))
    reseal(run / BEST)
    edit_settings(run, model=model | {"positions": "sinusoidal"})
    assert load_run("one").step == 4
    monkeypatch.setattr("exchange.saved_run.available_memory", lambda device: 10_000_000)
    edit_settings(run, model=model | {"positions": "sinusoidal", "context_length": 1_000_000})
    assert "memory" in refused("best", (ResourceError,))


DEEP = b"[" * 100_000 + b"]" * 100_000
MANY_KEYS = json.dumps({f"key {i}": i for i in range(1_000_000)}).encode()
HOSTILE_JSON = {
    "nothing": b"",
    "deep": DEEP,
    "deep objects": b'{"model":' * 100_000 + b"1" + b"}" * 100_000,
    "deep vocabulary": b'{"model": {"vocab": ' + DEEP + b"}}",
    "a million keys": MANY_KEYS,
    "a million tokens": b'{"model": {"vocab": ' + MANY_KEYS + b"}}",
    "a million merges": b'{"model": {"vocab": {}, "merges": [' + b"0," * 3_000_000 + b"0]}}",
    "12 MB of lists": b"[" + b"[]," * (12_000_000 // 3) + b"[]]",
    "a long number": b'{"model": ' + b"9" * 100_000 + b"}",
    "a long fraction": b'{"model": 1e' + b"9" * 100_000 + b"}",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": {}}'.encode("utf-16"),
    "zeros": bytes(100_000),
    "NaN": b'{"model": NaN, "vocab": -Infinity}',
    "a list": b"[1, 2]",
    "a number": b"5",
    "null": b"null",
    "two documents": b"{}{}",
}


LARGE = ("a million keys", "a million tokens", "a million merges", "12 MB of lists")


@pytest.mark.parametrize("kind", with_slow(HOSTILE_JSON, LARGE))
@pytest.mark.parametrize("name", ["settings.json", "tokenizer.json"])
def test_hostile_json_is_refused(run, name, kind):
    (run / name).write_bytes(HOSTILE_JSON[kind])
    assert name in refused("best", n_bytes=len(HOSTILE_JSON[kind]))


def test_settings_longer_than_any_run_leaves_are_not_read(run):
    with open(run / "settings.json", "ab") as file:
        file.write(b" " * MOST_SETTINGS_BYTES)
    assert "settings.json can't be read: it is too long" in refused("best")
    os.truncate(run / "settings.json", MOST_SETTINGS_BYTES)
    assert load_run("one").step == 4


@pytest.mark.parametrize("kind", with_slow(HOSTILE_JSON, LARGE))
def test_hostile_json_that_is_not_read_for_use_does_no_harm(run, kind):
    for name in ("data.json", "summary.json", "metrics.jsonl", f"{NEWEST}/state.json"):
        (run / name).write_bytes(HOSTILE_JSON[kind])
    reseal(run / NEWEST)
    for which in ("best", "last"):
        started_at = time.monotonic()
        assert load_run("one", which=which).step == 4
        assert time.monotonic() - started_at < ALLOWED_S


@pytest.mark.parametrize("kind", with_slow(HOSTILE_JSON, LARGE))
def test_a_hostile_manifest_is_refused(run, kind):
    for folder in (BEST, NEWEST):
        (run / folder / "manifest.json").write_bytes(HOSTILE_JSON[kind])
    assert "manifest.json" in refused("best")


def test_a_token_of_any_length_is_read_in_no_time(run):
    """Which merges made a token is worked out pair by pair, and again after each of them."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"aa": 256, b"aaaa": 257}
    tree = json.loads(BPETokenizer("small", ranks).to_json())
    tree["model"]["vocab"] |= {"a" * 20_000: 258, END_OF_TEXT: 259}
    tree["added_tokens"][0]["id"] = 259
    (run / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    refused("best")


# --------------------------------------------------------------------------- memory, measured

MEASURE = """
import json, sys, time
from pathlib import Path
from engine.errors import PipelineError
from environment import load_run

def peak():  # in bytes, since the last reset
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

load_run(sys.argv[1])
for case in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")
    before, started_at = peak(), time.monotonic()
    try:
        load_run(case)
        said = "loaded"
    except PipelineError as error:
        said = type(error).__name__
    except BaseException as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
    print(json.dumps([said, peak() - before, time.monotonic() - started_at]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_hostile_files_take_little_memory_and_time(run):
    cases = {}

    def case(name: str) -> Path:
        path = run.with_name(name.replace(" ", "-"))
        shutil.copytree(run, path)
        cases[path] = name
        return path

    sizes = {}
    for kind in ("a header of 99 MB, all blanks", "a header of 16 EB", "a shape of 2 ** 63"):
        path = case(kind.replace("*", "x"))
        for folder in (BEST, NEWEST):
            (path / folder / "model.safetensors").write_bytes(HOSTILE[kind])
            reseal(path / folder)
        sizes[path] = len(HOSTILE[kind])
    for name in ("settings.json", "tokenizer.json"):
        for kind, content in HOSTILE_JSON.items():
            path = case(f"{name} {kind}")
            (path / name).write_bytes(content)
            sizes[path] = len(content)
    for kind, values in HUGE_MODELS.items():
        path = case(f"huge {kind}")
        model = read(path / "settings.json")["model"] | {"n_kv_heads": None} | values
        edit_settings(path, model=model)
        sizes[path] = 0
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "one", *map(str, cases)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        encoding="utf-8",
    )
    lines = done.stdout.splitlines()
    results = [json.loads(line) for line in lines if line.startswith("[")]
    assert len(results) == len(cases), done.stderr
    for (path, name), (said, peak, seconds) in zip(cases.items(), results, strict=True):
        assert said in ("CheckpointError", "ResourceError"), (name, said)
        # "[]," is an object of 56 bytes and its place in a list; 30 MB is what any loading takes
        assert peak < 30e6 + 25 * sizes[path], (name, peak)
        assert seconds < ALLOWED_S + ALLOWED_S_PER_MB * sizes[path] / 1e6, (name, seconds)


# ------------------------------------------------------------------------- random mutations

PIECES = [b"-", b"9" * 30, b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"1e999", b"\\u"]
PIECES += [b"true", b"0", b"-1", b"1.5", b"[]", b"{}", b'""', b"\x1b[2J", b"\xff", b"65536"]


def mutated(content: bytes, chooser: random.Random) -> bytes:
    """Some bytes of a file changed, cut out, doubled, or numbers and words replaced."""
    changed = bytearray(content)
    for _ in range(chooser.randrange(1, 4)):
        place, length = chooser.randrange(len(changed) + 1), chooser.randrange(1, 12)
        way = chooser.random()
        if way < 0.25 and place < len(changed):
            changed[place] = chooser.randrange(256)
        elif way < 0.7:
            changed[place : place + length] = chooser.choice(PIECES)
        elif way < 0.85:
            changed[place:place] = changed[place : place + length]
        else:
            del changed[place : place + length]
    return bytes(changed)


def mutate_value(value: object, chooser: random.Random) -> object:
    """A JSON value with one value in it replaced, at any depth, or a name taken out."""
    odd = [None, True, -1, 0, 1, 3.5, 1e308, 10**30, "", "x", [], {}, [1], {"a": 1}, "llama", 65536]
    if isinstance(value, dict) and value and chooser.random() < 0.95:
        name = chooser.choice(list(value))
        rest = {key: kept for key, kept in value.items() if key != name}
        return (
            rest if chooser.random() < 0.1 else value | {name: mutate_value(value[name], chooser)}
        )
    if isinstance(value, list) and value and chooser.random() < 0.9:
        place = chooser.randrange(len(value))
        return [*value[:place], mutate_value(value[place], chooser), *value[place + 1 :]]
    return chooser.choice(odd)


def foreign_to(tree: dict) -> dict:
    """The same tokenizer as a file from elsewhere, which the library itself has to read."""
    return tree | {"normalizer": {"type": "NFC"}}


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    ["settings.json", "tokenizer.json", "foreign", "model.safetensors", "manifest.json"],
)
def test_mutations_are_loaded_or_refused_and_end_in_no_other_way(run, name, count):
    chooser = random.Random(name)
    file = run / name if name.startswith(("settings", "tokenizer")) else run / BEST / name
    if name == "foreign":
        file = run / "tokenizer.json"
        file.write_text(json.dumps(foreign_to(read(file))), encoding="utf-8")
        edit_settings(run, tokenizer=load_tokenizer(file).fingerprint)
    elif file.parent.name == Path(BEST).name:
        shutil.rmtree(run / "checkpoints")  # the last weights would stand in
    good, loaded = file.read_bytes(), 0
    settings = (run / "settings.json").read_bytes()
    for _ in range(count):
        is_tree = file.suffix == ".json" and chooser.random() < 0.6
        if is_tree:
            tree = mutate_value(json.loads(good), chooser)
            file.write_bytes(
                storage._seal(tree["content"])
                if name == "manifest.json" and isinstance(tree, dict) and "content" in tree
                else json.dumps(tree).encode()
            )
        else:
            cut = chooser.choice((2000, len(good)))  # the numbers of a tensor file, too
            file.write_bytes(mutated(good[:cut], chooser) + good[cut:])
        if name == "model.safetensors":
            reseal(file.parent)
        try:
            if file.name == "tokenizer.json":  # a forger names the one that is there
                edit_settings(run, tokenizer=load_tokenizer(file).fingerprint)
            load_run("one", which=chooser.choice(("best", "last")), weights="fp32")
            loaded += 1
        except PipelineError as error:
            assert len(str(error)) < 4000
        (run / "settings.json").write_bytes(settings) if file.name == "tokenizer.json" else None
    assert 0 < loaded < 0.9 * count, "these mutations show little"


# ------------------------------------------------------------------------------ paths elsewhere


@pytest.mark.parametrize(
    "name",
    [
        "../canary",
        "../../../canary",
        "/etc/hostname",
        "..\\canary",
        "C:\\canary",
        "a/b",
        "..",
        "\0",
    ],
)
def test_a_manifest_that_names_files_elsewhere_is_refused_and_touches_nothing(run, workdir, name):
    for folder in (workdir, run, run / "best", run / BEST):
        (folder / "canary").write_bytes(b"alive")
    canary = {"bytes": 5, "sha256": hashlib.sha256(b"alive").hexdigest()}
    for folder in (BEST, NEWEST):
        content = read(run / folder / "manifest.json")["content"]
        content["files"][name] = canary
        (run / folder / "manifest.json").write_bytes(storage._seal(content))
    before = listing(workdir)
    assert "names files outside of its folder" in refused("best")
    assert "names files outside of its folder" in refused("last")
    assert listing(workdir) == before


LINKED = ("model.safetensors", "manifest.json")


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
@pytest.mark.parametrize("name", LINKED)
def test_a_link_in_place_of_a_sealed_file_is_refused(run, workdir, name):
    for folder in (BEST, NEWEST):
        elsewhere = workdir / f"{folder.split('/')[0]}-{name}"
        (run / folder / name).rename(elsewhere)
        (run / folder / name).symlink_to(elsewhere)
    before = listing(workdir)
    assert name in refused("best")
    assert name in refused("last")
    assert listing(workdir) == before


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
@pytest.mark.parametrize("name", ["best", "checkpoints", BEST, NEWEST])
def test_a_link_in_place_of_a_folder_gives_the_same_weights_and_changes_nothing(run, workdir, name):
    """Somebody may keep checkpoints on another disk; what is read must be sealed all the same."""
    shutil.move(run / name, workdir / "elsewhere")
    (run / name).symlink_to(workdir / "elsewhere", target_is_directory=True)
    before = listing(workdir)
    for which in ("best", "last"):
        assert load_run("one", which=which).step == 4
    assert listing(workdir) == before
    for file in (workdir / "elsewhere").rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    which = "best" if name.startswith("best") else "last"
    if which == "best":
        shutil.rmtree(run / "checkpoints")
    refused(which)


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_what_a_link_leads_to_is_not_told(run, workdir):
    (workdir / "secret").write_text("the-s3cr3t: hunter2\n" * 3, encoding="utf-8")
    for name in ("settings.json", "tokenizer.json"):
        content = (run / name).read_bytes()
        (run / name).unlink()
        (run / name).symlink_to(workdir / "secret")
        said = refused("best")
        assert name in said
        assert "s3cr3t" not in said
        assert "hunter2" not in said
        (run / name).unlink()
        (run / name).write_bytes(content)


READ_ALL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from engine.errors import CheckpointError
from environment import load_run
for folder in sys.argv[1:]:
    try:
        load_run(folder)
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="pipes and devices of POSIX")
def test_what_never_ends_is_not_read(run):
    folders = []
    for name in ("settings.json", "tokenizer.json"):
        for kind in ("pipe", "zeros", "folder"):
            folders.append(run.with_name(f"{kind}-{name}"))
            shutil.copytree(run, folders[-1])
            (folders[-1] / name).unlink()
            if kind == "pipe":
                os.mkfifo(folders[-1] / name)  # who opens it waits for ever
            elif kind == "zeros":
                (folders[-1] / name).symlink_to("/dev/zero")
            else:
                (folders[-1] / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *map(str, folders)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    for folder in folders:
        assert f"{folder.name}{os.sep}{folder.name.partition('-')[2]}" in done.stdout, done.stderr


# ----------------------------------------------------------------------------------- secrets


def test_no_secret_of_the_environment_is_in_what_a_run_leaves(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home-of-somebody"
    (home / "project").mkdir(parents=True)
    planted = {
        "OPENAI_API_KEY": "sk-s3cr3t-one",
        "WANDB_API_KEY": "s3cr3t-two",
        "HF_TOKEN": "hf_s3cr3t-three",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t/four",
        "MY_PASSWORD": "s3cr3t five",
        "USER": "somebody-by-name",
        "LOGNAME": "somebody-by-name",
        "USERNAME": "somebody-by-name",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    path = train_run(home / "project", RUN_NAME="one").path
    run = load_run(path)
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    names = {file.relative_to(path).parts[0] for file in files}
    assert {"settings.json", "data.json", "checkpoints", "best", "samples.md", "metrics.jsonl"} <= (
        names
    )
    files["what is printed"] = "".join(capsys.readouterr()).encode()
    files["what is loaded"] = json.dumps(run.settings).encode()
    for secret in (*planted, *planted.values(), "s3cr3t", "home-of-somebody", os.environ["PATH"]):
        for file, content in files.items():
            assert secret.encode() not in content, f"{secret} is in {file}"


def test_a_data_error_of_a_tokenizer_is_one_of_the_run(run):
    """Whoever loads a run named no tokenizer: the run is at fault, and not the text's."""
    (run / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError) as caught:
        load_run("one")
    assert not isinstance(caught.value, DataError)
