"""Which run goes on, which one begins and which is refused, by RESUME, RUN_NAME and the settings.

Runs are stopped by real signals; each start is a main.main() of its own.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import os
import pickle
import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import environment
import main
import train
from engine.compiling import what_prevents_compiling
from engine.errors import Stopped
from engine.settings import names_on_resume
from planning.plan import RunSettings
from storage.files import FolderLock
from tests.conftest import REPOSITORY
from text.corpora import CORPORA
from training import journal, learner
from training.run_folder import RunFolder
from training_utils import TrainingConfig

TEXT = "the river carries the bell and the bell carries the river " * 12
STEPS, STOPPED_AT = 8, 3
PARAMS = {
    "max_steps": STEPS,
    "batch_size": 2,
    "max_length": 16,
    "eval_freq": 4,
    "eval_iter": 1,
    "start_context": "the",
    "model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1},
}
SETTINGS = {
    "DATA": "text.txt",
    "TOKENIZER": "char",
    "CUSTOM_MODE": True,
    "sampling_params": {"max_new_tokens": 3},
}
OWN = {field.name for field in dataclasses.fields(RunSettings)}  # the rest is custom_params'


@dataclass
class Outcome:
    """What a start came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def start(workdir, monkeypatch, capsys):
    """Start the program, and stop it by Ctrl-C after some steps where asked.

    What is no setting of its own goes into custom_params; None takes a setting out.
    """
    monkeypatch.setattr(journal, "render_losses", lambda **_: None)  # most of the time otherwise
    (workdir / "text.txt").write_text(TEXT, encoding="utf-8")

    def run(stop_after: int | None = None, **settings) -> Outcome:
        ours = {name: value for name, value in settings.items() if name in OWN}
        params = {name: value for name, value in settings.items() if name not in OWN}
        values = SETTINGS | {"custom_params": PARAMS | params} | ours
        lines = [f"{name} = {value!r}\n" for name, value in values.items() if value is not None]
        (workdir / "settings.py").write_text("".join(lines), encoding="utf-8")
        done = 0

        def step(*arguments, **options):
            nonlocal done
            done += 1
            result = take_step(*arguments, **options)
            if done == stop_after:
                os.kill(os.getpid(), signal.SIGINT)
            return result

        take_step = train.Trainer.step  # of the run: a trial's steps before it don't count
        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "step", step)
            code = main.main(["settings.py"])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Outcome(code, printed.out, printed.err)

    return run


@pytest.fixture
def begun(start, workdir) -> Path:
    """A run named "one", stopped after a few of its steps."""
    assert start(STOPPED_AT, RUN_NAME="one").code == 130
    return workdir / "runs" / "one"


def runs(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "runs").iterdir())


def read(run: Path, name: str = "settings.json") -> dict:
    return json.loads((run / name).read_text(encoding="utf-8"))


def one_byte_changed(workdir: Path) -> None:
    text = (workdir / "text.txt").read_bytes()
    (workdir / "text.txt").write_bytes(text.replace(b"bell", b"ball", 1))


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's content and time."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_goes_on(outcome: Outcome, run: str, done: int = STOPPED_AT, of: int = STEPS) -> None:
    assert outcome.code == 0, outcome.err
    assert f"Resuming runs/{run}: {done} of {of} steps are done" in outcome.out


def assert_refused(outcome: Outcome, run: Path, line: str) -> None:
    assert outcome.code == 4, outcome.out
    assert f"the run in {run.relative_to(Path.cwd())} can't go on with other settings" in (
        outcome.err
    )
    assert f"\n  {line}" in outcome.err
    assert "TRAINING START" not in outcome.out


# ---------------------------------------------------------------------------- RESUME = "auto"


def test_auto_goes_on_with_the_newest_unfinished_run_and_then_with_the_one_before(start, workdir):
    assert start(1).code == 130
    assert start(2, RESUME=False).code == 130
    older, newer = runs(workdir)  # the same second gives the second one a number
    assert_goes_on(start(), newer, done=2)
    assert_goes_on(start(), older, done=1)
    again = start()
    assert (again.code, len(runs(workdir))) == (0, 3), "finished runs are left alone"
    assert "Resuming" not in again.out and "unfinished" not in again.out


def test_auto_begins_a_new_run_for_other_settings_and_says_why_in_one_line(start, workdir):
    assert start(STOPPED_AT).code == 130
    (old,) = runs(workdir)
    before = everything_in(workdir / "runs" / old)
    new = start(SEED=5, learning_rate=0.01)
    assert new.code == 0
    told = [line for line in new.out.splitlines() if "unfinished" in line]
    assert told == [
        f"Note: runs/{old} is unfinished, but differs (seed: 123 then, 5 now, and 1 more): "
        "a new run begins"
    ]
    assert len(runs(workdir)) == 2
    assert everything_in(workdir / "runs" / old) == before
    assert_goes_on(start(), old)


def test_resume_false_begins_anew_beside_an_unfinished_run(start, workdir):
    assert start(STOPPED_AT).code == 130
    new = start(RESUME=False)
    assert (new.code, len(runs(workdir))) == (0, 2)
    assert "Resuming" not in new.out and "unfinished" not in new.out


def test_auto_finds_the_run_of_each_text_again(start, workdir):
    (workdir / "other.txt").write_text(TEXT.replace("bell", "boat"), encoding="utf-8")
    assert start(1, DATA="text.txt").code == 130
    assert start(2, DATA="other.txt").code == 130
    first, second = runs(workdir)
    assert_goes_on(start(DATA="text.txt"), first, done=1)
    assert_goes_on(start(DATA="other.txt"), second, done=2)
    assert len(runs(workdir)) == 2


def test_auto_finds_the_run_of_each_state_of_a_text_again(start, workdir):
    assert start(1).code == 130
    one_byte_changed(workdir)
    assert start(2).code == 130
    (workdir / "text.txt").write_text(TEXT, encoding="utf-8")
    first, second = runs(workdir)
    on = start()
    assert_goes_on(on, first, done=1)
    assert "differs" not in on.out
    one_byte_changed(workdir)
    assert_goes_on(start(), second, done=2)


def test_a_text_that_was_only_moved_is_the_same(start, workdir, begun):
    shutil.move("text.txt", "moved.txt")
    assert_goes_on(start(DATA="moved.txt", RUN_NAME="one"), "one")


def test_data_may_name_paths_in_every_form(start, workdir):
    for data in ({"path": "text.txt"}, ["text.txt"], {"path": ("text.txt",)}):
        name = f"run-{len(str(data))}"
        assert start(1, DATA=data, RUN_NAME=name).code == 130
        assert_goes_on(start(DATA=data, RUN_NAME=name), name, done=1)


# ------------------------------------------------------------------------ text and tokenizer


def test_a_text_with_one_other_byte_is_refused_by_a_named_run(start, workdir, begun):
    one_byte_changed(workdir)
    before = everything_in(begun)
    for settings in ({"RUN_NAME": "one"}, {"RESUME": "runs/one"}):
        outcome = start(**settings)
        assert_refused(outcome, begun, "text: sha256 ")
        assert "tokenizer: " not in outcome.err  # the new text has no new character
    assert everything_in(begun) == before


def test_a_text_with_one_other_byte_lets_auto_begin_a_new_run_and_say_so(start, workdir):
    assert start(STOPPED_AT).code == 130
    (old,) = runs(workdir)
    one_byte_changed(workdir)
    new = start()
    assert new.code == 0
    assert f"Note: runs/{old} is unfinished, but differs (text: sha256 " in new.out
    assert "Resuming" not in new.out
    assert len(runs(workdir)) == 2


def make_tokenizer_file(start, workdir, name: str, text: str) -> Path:
    """A BPE of 300 tokens that was learnt from a text."""
    (workdir / "learn.txt").write_text(text, encoding="utf-8")
    assert start(1, DATA="learn.txt", TOKENIZER="bpe:300", RUN_NAME=name).code == 130
    shutil.move(workdir / "runs" / name, workdir / name)
    return workdir / name / "tokenizer.json"


def test_a_tokenizer_of_the_same_size_with_other_merges_is_refused(start, workdir):
    sample = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="utf-8")
    first = make_tokenizer_file(start, workdir, "a", sample[:3000])
    second = make_tokenizer_file(start, workdir, "b", sample[3000:6000])
    sizes = [read(path.parent)["model"]["vocab_size"] for path in (first, second)]
    assert sizes[0] == sizes[1]
    shutil.copy(first, "mine.json")
    assert start(STOPPED_AT, TOKENIZER="mine.json", RUN_NAME="one").code == 130
    shutil.copy(second, "mine.json")
    refused = start(TOKENIZER="mine.json", RUN_NAME="one")
    assert_refused(refused, workdir / "runs" / "one", "tokenizer: sha256 bpe-")
    passed_over = start(TOKENIZER="mine.json")
    assert "runs/one is unfinished, but differs (tokenizer: sha256 bpe-" in passed_over.out
    shutil.copy(first, "mine.json")
    assert_goes_on(start(TOKENIZER="mine.json", RUN_NAME="one"), "one")


@pytest.fixture
def network(workdir, monkeypatch):
    """the-verdict on a server of this machine; called with False, the network is cut."""
    folder = workdir / "served"
    folder.mkdir()
    content = TEXT.upper().encode()
    (folder / "verdict.txt").write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    address = ("127.0.0.1", 0)
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(address, handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def connect(is_up: bool) -> None:
            port = server.server_address[1] if is_up else 9
            known = dataclasses.replace(
                CORPORA["the-verdict"],
                url=f"http://127.0.0.1:{port}/verdict.txt",
                sha256=hashlib.sha256(content).hexdigest(),
            )
            monkeypatch.setitem(CORPORA, "the-verdict", known)

        connect(True)
        yield connect
        server.shutdown()


@pytest.mark.parametrize("named", [{}, {"RUN_NAME": "one"}], ids=["auto", "named"])
def test_a_run_begun_with_the_stand_in_goes_on_with_it_when_the_network_is_back(
    start, workdir, network, named
):
    network(False)
    begun = start(STOPPED_AT, DATA="the-verdict", **named)
    assert begun.code == 130
    assert "sample-en.txt stands in for it" in begun.out
    (run,) = runs(workdir)
    if not named:  # a newer one, with all the settings but DATA
        assert start(1).code == 130
    network(True)
    on = start(DATA="the-verdict", **named)
    assert_goes_on(on, run)
    assert "sample-en.txt stands in for the-verdict, as when this run began" in on.out
    assert read(workdir / "runs" / run)["stood_in"] is True
    fresh = start(DATA="the-verdict", RUN_NAME="two")
    assert fresh.code == 0 and "stands in" not in fresh.out
    assert read(workdir / "runs" / "two")["stood_in"] is False


@pytest.mark.parametrize("named", [{}, {"RUN_NAME": "one"}], ids=["auto", "named"])
def test_a_run_whose_text_cannot_be_had_any_more_ends_with_3_and_is_named(
    start, workdir, network, named
):
    assert start(STOPPED_AT, DATA="the-verdict", **named).code == 130
    (run,) = runs(workdir)
    network(False)
    shutil.rmtree(workdir / "cache")
    before = everything_in(workdir / "runs")
    lost = start(DATA="the-verdict", **named)
    assert lost.code == 3
    assert f"The unfinished run runs/{run} goes on with this text only" in lost.err
    assert "Traceback" not in lost.err
    assert everything_in(workdir / "runs") == before, "no new run, and the old one as it was"
    network(True)
    assert_goes_on(start(DATA="the-verdict", **named), run)


def test_a_run_with_the_text_in_the_cache_goes_on_without_a_network(start, workdir, network):
    assert start(STOPPED_AT, DATA="the-verdict").code == 130
    (run,) = runs(workdir)
    network(False)
    on = start(DATA="the-verdict")
    assert_goes_on(on, run)
    assert "stands in" not in on.out


@pytest.mark.parametrize("named", [{}, {"RUN_NAME": "one"}], ids=["auto", "named"])
def test_a_run_whose_file_is_gone_ends_with_3_and_is_named(start, workdir, named):
    assert start(STOPPED_AT, **named).code == 130
    (run,) = runs(workdir)
    (workdir / "text.txt").unlink()
    lost = start(**named)
    assert lost.code == 3
    assert "there is no file text.txt" in lost.err
    assert f"The unfinished run runs/{run} goes on with this text only" in lost.err
    assert runs(workdir) == [run]


# ----------------------------------------------------------------------------------- RUN_NAME


def test_a_named_run_begins_goes_on_and_is_finished(start, workdir):
    assert "Resuming" not in start(STOPPED_AT, RUN_NAME="one").out
    assert_goes_on(start(RUN_NAME="one"), "one")
    before = everything_in(workdir)
    for settings in ({"RUN_NAME": "one"}, {"RESUME": "runs/one"}, {"RUN_NAME": "one", "SEED": 7}):
        finished = start(**settings)
        assert finished.code == 0
        assert "✓ The run in runs/one is finished" in finished.out
        assert finished.err == ""
        after = everything_in(workdir)
        del after[str(workdir / "settings.py")], before[str(workdir / "settings.py")]
        assert after == before
        before = everything_in(workdir)
    assert "seed: 123 then, 7 now" in finished.out
    assert runs(workdir) == ["one"]


def test_a_named_run_with_other_settings_is_refused_with_every_difference(start, begun):
    before = everything_in(begun)
    refused = start(RUN_NAME="one", SEED=7, learning_rate=0.01, train_ratio=0.8)
    assert refused.code == 4
    for line in (
        "seed: 123 then, 7 now",
        "learning_rate: None then, 0.01 now",
        "train_ratio: 0.9 then, 0.8 now",
    ):
        assert_refused(refused, begun, line + "\n")
    assert everything_in(begun) == before


@pytest.mark.parametrize("name", [None, "one"])
def test_a_script_that_was_stopped_trains_the_same_environment_to_its_end(
    start, begun, workdir, monkeypatch, name
):
    shutil.rmtree(begun)
    with open(workdir / "settings.py", "a", encoding="utf-8") as file:
        file.write(f"RUN_NAME = {name!r}\n")
    env = environment.prepare_environment("settings.py")
    real, done = learner.take_step, []

    def step(*arguments, **options):
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(learner, "take_step", step)
    with pytest.raises(Stopped):
        train.train(env)
    journal = train.train(env)
    assert journal.steps == len(done) == env.run.record.total_steps
    assert runs(workdir) == [env.run.path.name]


def test_a_named_run_that_another_program_trains_is_refused_before_the_text_is_read(start, begun):
    before = everything_in(begun)
    (Path.cwd() / "text.txt").write_text("too short", encoding="utf-8")
    with FolderLock(begun):
        for settings in ({"RUN_NAME": "one"}, {"RESUME": "runs/one"}):
            busy = start(**settings)
            assert busy.code == 7 and "is in use by process" in busy.err
            assert "Text loaded" not in busy.out
    (begun / ".lock-owner.json").unlink()
    del before[str(begun / ".lock-owner.json")]
    assert everything_in(begun) == before


def test_resume_false_never_writes_over_a_folder(start, begun):
    before = everything_in(begun)
    refused = start(RUN_NAME="one", RESUME=False)
    assert refused.code == 4
    assert "the folder runs/one is already there, and RESUME is False" in refused.err
    assert everything_in(begun) == before


@pytest.mark.parametrize("content", ["thesis.doc", "checkpoints/step-00000001/model.safetensors"])
def test_a_folder_that_holds_something_else_is_refused(start, workdir, content):
    path = workdir / "runs" / "one" / content
    path.parent.mkdir(parents=True)
    path.write_bytes(b"years of work")
    before = everything_in(workdir / "runs")
    refused = start(RUN_NAME="one")
    assert refused.code == 4
    assert "the folder runs/one is already there, and it holds no run" in refused.err
    assert everything_in(workdir / "runs") == before


def test_what_a_start_left_that_was_killed_at_once_is_begun_anew(start, workdir):
    folder = workdir / "runs" / "one"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "data.json", ".lock", ".tmp-77-7-settings.json"):
        (folder / name).write_bytes(b"{")
    assert start(RUN_NAME="one").code == 0
    assert (folder / "summary.json").exists()
    assert not list(folder.glob(".tmp-*"))


# ---------------------------------------------------------------------------- RESUME = a path


@pytest.mark.parametrize("form", ["runs/one", "runs/one/", "./runs/../runs/one", "absolute", "~"])
def test_a_path_goes_on_with_that_run_wherever_new_ones_go(
    start, workdir, begun, monkeypatch, form
):
    monkeypatch.setenv("HOME", str(workdir))
    path = {"absolute": str(begun), "~": "~/runs/one"}.get(form, form)
    on = start(RESUME=path, OUTPUT_DIR="elsewhere")
    assert on.code == 0
    assert f"one: {STOPPED_AT} of {STEPS} steps are done" in on.out
    assert (begun / "summary.json").exists()
    assert not (workdir / "elsewhere").exists()


def test_a_path_with_other_settings_is_refused_with_the_difference(start, begun):
    assert_refused(start(RESUME="runs/one", SEED=7), begun, "seed: 123 then, 7 now")


@pytest.mark.parametrize(
    "path", ["runs/two", "runs", "runs/one/checkpoints", "runs/one/checkpoints/step-00000003", "."]
)
def test_a_path_that_is_no_run_is_refused_with_what_was_looked_for(start, begun, path):
    refused = start(RESUME=path)
    assert refused.code == 4
    assert f"there is no run (looked for {Path(path) / 'settings.json'})" in refused.err


WATCH: dict[str, list | None] = {"opened": None}  # a hook can't be taken out again


@contextlib.contextmanager
def watching_opens():
    """The files that are opened meanwhile."""
    if "hook" not in WATCH:

        def hook(event, arguments):
            if event == "open" and WATCH["opened"] is not None:
                WATCH["opened"].append(str(arguments[0]))

        sys.addaudithook(hook)
        WATCH["hook"] = []
    WATCH["opened"] = opened = []
    yield opened
    WATCH["opened"] = None


class Canary:
    """What a pickle may do to whoever opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "torch", "pipe"])
@pytest.mark.parametrize("place", ["model.pt", "runs/one/checkpoints/step-00000099.pt"])
def test_a_pickle_is_refused_without_being_opened(start, workdir, begun, kind, place):
    canary, path = workdir / "canary", workdir / place
    if kind == "pipe":
        os.mkfifo(path)  # who opens it waits for ever
    elif kind == "torch":
        torch.save(Canary(canary), path)
    else:
        path.write_bytes(pickle.dumps(Canary(canary)))
    with watching_opens() as opened:
        refused = start(RESUME=place)
        goes_on = start(RUN_NAME="one")
    assert refused.code == 4
    if kind != "pipe":
        assert "is a file; runs are folders" in refused.err
        assert "Files such as .pt can run code when they are opened, so this one was not" in (
            refused.err
        )
    assert_goes_on(goes_on, "one")
    if place != "model.pt":
        assert f"{place} is no checkpoint; it is left alone" in goes_on.out
    assert any("settings.py" in name for name in opened), "the hook sees nothing"
    assert not [name for name in opened if name.endswith(".pt")]
    assert not canary.exists()


# ------------------------------------------------------------------------------- what may change

REFUSED = {  # another value for each
    "time_budget_minutes": 5,
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "optimizer": "muon",
    "learning_rate": 0.01,
    "schedule": "constant",
    "warmup_steps": 3,
    "weight_decay": 0.2,
    "max_grad_norm": 0.5,
    "max_length": 8,
    "stride": 8,
    "sampling": "random",
    "train_ratio": 0.8,
}
MODEL = {
    "emb_dim": 16,
    "n_heads": 4,
    "n_layers": 2,
    "ff_dim": 24,
    "drop_rate": 0.2,
    "attention_drop_rate": 0.1,
    "qkv_bias": True,
    "tie_embeddings": True,
    "architecture": "llama",
    "zero_init": True,
}


def test_every_fixed_hyper_parameter_has_its_case():
    assert set(REFUSED) == {*names_on_resume(TrainingConfig, "fixed"), "max_length"}


def test_each_fixed_setting_is_refused_on_its_own(start, begun):
    saved = read(begun)
    for name, now in REFUSED.items():
        then = PARAMS.get(name, saved["asked"]["training"][name])
        shown = "context_length" if name == "max_length" else name
        line = f"{shown}: {then!r} then, {now!r} now\n"
        assert_refused(start(RUN_NAME="one", **{name: now}), begun, line)
    for name, now in MODEL.items():
        overrides = PARAMS["model_overrides"] | {name: now}
        then = saved["asked"]["model"].get(name)
        line = f"{name}: {then!r} then, {now!r} now\n"
        assert_refused(start(RUN_NAME="one", model_overrides=overrides), begun, line)
    other = "fp32" if saved["precision"]["name"] == "bf16" else "bf16"
    for name, now, line in (
        ("SEED", 7, "seed: 123 then, 7 now\n"),
        ("PRECISION", other, f"precision: 'auto' then, '{other}' now\n"),
        ("TOKENIZER", "gpt2", "tokenizer: 'char' then, 'gpt2' now\n"),
        ("CUSTOM_MODE", False, "mode: 'custom' then, 'quick' now\n"),
    ):
        assert_refused(start(RUN_NAME="one", **{name: now}), begun, line)
    assert_goes_on(start(RUN_NAME="one"), "one")


CHANGED = {
    "max_steps": STEPS + 2,
    "eval_freq": 3,
    "eval_iter": 2,
    "patience": 50,
    "save_every": 2,
    "save_minutes": 7.0,
    "keep_checkpoints": 3,
    "start_context": ["bell", "river"],
    "activation_checkpointing": True,
    "COMPILE": False,
    "LOG_EVERY": 2,
    "NIGHT_MODE": True,
    "sampling_params": {"max_new_tokens": 4},
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_may_change_is_taken_over_and_recorded(start, begun, name):
    kind = "settings" if name in OWN else "training"
    assert name in names_on_resume(RunSettings if name in OWN else TrainingConfig, "free")
    before = read(begun)
    was, now = before[kind][name], CHANGED[name]
    on = start(RUN_NAME="one", **{name: now})
    assert on.code == 0, on.err
    saved = read(begun)
    assert saved[kind][name] == now
    (change,) = saved["changes"]
    assert change[name] == [was, now]
    assert {"run_id": saved["run_id"], "started": saved["started"]} == {
        name: before[name] for name in ("run_id", "started")
    }


def test_each_change_is_added_to_those_before(start, begun):
    assert start(1, RUN_NAME="one", eval_freq=3).code == 130
    assert start(1, RUN_NAME="one", eval_freq=3).code == 130
    assert start(RUN_NAME="one", eval_freq=2).code == 0
    assert [change["eval_freq"] for change in read(begun)["changes"]] == [[4, 3], [3, 2]]


# ------------------------------------------------------------------------------------ samples

# 307 steps an epoch: samples come at evaluations on the way
LONG_EPOCH = {
    "max_steps": 320,
    "batch_size": 1,
    "max_length": 2,
    "eval_freq": 40,
    "start_context": ["the", "a bell"],
}


def test_a_stopped_run_ends_with_the_samples_of_an_undisturbed_one(start, workdir):
    assert start(RUN_NAME="whole", **LONG_EPOCH).code == 0
    for stop_after in (119, 1, 130):  # before samples, right at them, and in between
        assert start(stop_after, RUN_NAME="one", **LONG_EPOCH).code == 130
    assert start(RUN_NAME="one", **LONG_EPOCH).code == 0
    whole, ours = (
        (workdir / "runs" / name / "samples.md").read_text(encoding="utf-8")
        for name in ("whole", "one")
    )
    assert ours == whole
    headings = [line[3:] for line in whole.splitlines() if line.startswith("## ")]
    assert headings[:5] == [
        "Before training",
        "After step 120",
        "After step 240",
        "After epoch 1",
        "After epoch 2",
    ]


# ------------------------------------------------------------------------------------- length


@pytest.mark.parametrize("stop_after", [STOPPED_AT, None], ids=["unfinished", "finished"])
@pytest.mark.parametrize("longer", [{"max_steps": 11}, {"max_steps": None, "num_epochs": 2}])
def test_a_run_may_be_made_longer(start, workdir, stop_after, longer):
    first = {"max_steps": 5} if "num_epochs" not in longer else {"max_steps": None, "num_epochs": 1}
    assert start(stop_after, RUN_NAME="one", **first).code == (130 if stop_after else 0)
    run = workdir / "runs" / "one"
    saved = read(run)
    done = stop_after or saved["total_steps"]
    end = longer["max_steps"] or 2 * saved["steps_per_epoch"]
    assert end > saved["total_steps"]
    assert_goes_on(start(RUN_NAME="one", **longer), "one", done, end)
    assert read(run, "summary.json")["steps"] == end
    assert read(run)["changes"][0]["total_steps"] == [saved["total_steps"], end]
    assert "is finished" in start(RUN_NAME="one", **longer).out


def test_a_longer_run_that_is_stopped_is_unfinished_again(start, workdir):
    assert start(RUN_NAME="one").code == 0
    assert start(1, RUN_NAME="one", max_steps=12).code == 130
    assert not (workdir / "runs" / "one" / "summary.json").exists()
    assert_goes_on(start(RUN_NAME="one", max_steps=12), "one", STEPS + 1, 12)


def test_a_shorter_length_is_refused(start, begun, workdir):
    assert_refused(start(RUN_NAME="one", max_steps=4), begun, "total steps: 8 then, 4 now")
    assert_goes_on(start(RUN_NAME="one"), "one")
    before = everything_in(begun)
    finished = start(RUN_NAME="one", max_steps=4)
    assert finished.code == 0 and "total steps: 8 then, 4 now" in finished.out
    assert everything_in(begun) == before


# ------------------------------------------------------------- what was worked out at the start


def test_what_was_worked_out_at_the_start_stays(start, workdir):
    free = {"eval_freq": None, "warmup_steps": None, "learning_rate": None, "max_steps": 40}
    assert start(STOPPED_AT, RUN_NAME="one", **free).code == 130
    run = workdir / "runs" / "one"
    before = read(run)
    on = start(1, RUN_NAME="one", **free | {"max_steps": 400})
    assert on.code == 130
    for name in ("eval_freq", "warmup_steps", "learning_rate", "stride"):
        assert before["training"][name] is not None
        assert read(run)["training"][name] == before["training"][name]
    assert start(1, RUN_NAME="new", **free | {"max_steps": 400}).code == 130
    assert (
        read(workdir / "runs" / "new")["training"]["eval_freq"] != before["training"]["eval_freq"]
    )
    # what it came to, said outright, is no change
    now = {name: before["training"][name] for name in ("warmup_steps", "learning_rate")}
    assert start(1, RUN_NAME="one", **free | now | {"max_steps": 400}).code == 130


def test_the_precision_stays_where_the_hardware_would_choose_another(start, begun, monkeypatch):
    before = read(begun)["precision"]["name"]
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx512_bf16": before == "fp32", "amx_bf16": False}
    )
    on = start(RUN_NAME="one")
    assert_goes_on(on, "one")
    assert f"precision is {before}" in on.out
    assert read(begun)["precision"]["name"] == before


@pytest.mark.parametrize("is_set", [False, True])
def test_threads_stay_as_they_were_unless_somebody_sets_them(start, begun, monkeypatch, is_set):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if is_set:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    on = start(RUN_NAME="one")
    assert_goes_on(on, "one")
    assert read(begun)["threads"] == (2 if is_set else 1)
    told = "Note: threads was 1 and is 2: from here on the numbers are not bit for bit those"
    assert (told in on.out) == is_set
    assert [change["threads"] for change in read(begun)["changes"]] == [[1, 2]] * is_set
    assert torch.get_num_threads() == 2, "whoever calls train() keeps the threads they had"


@pytest.mark.slow
@pytest.mark.skipif(what_prevents_compiling(torch.device("cpu")) is not None, reason="no compiler")
def test_a_compiled_run_that_was_stopped_ends_like_one_that_was_not(start, workdir, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(workdir / "compiled"))
    overrides = PARAMS["model_overrides"] | {"drop_rate": 0.2}
    settings = {"COMPILE": True, "model_overrides": overrides}
    for run, stops in (("whole", [None]), ("stopped", [STOPPED_AT, 2, None])):
        for stop in stops:
            torch.compiler.reset()  # as a process of its own would
            outcome = start(stop, RUN_NAME=run, **settings)
            assert outcome.code == (130 if stop else 0), outcome.err
            assert "Compile: on (as set)" in outcome.out
        assert read(workdir / "runs" / run)["changes"] == []
    last = f"checkpoints/step-{STEPS:08}/model.safetensors"
    whole, stopped = ((workdir / "runs" / run / last).read_bytes() for run in ("whole", "stopped"))
    assert whole == stopped


# -------------------------------------------------------------------------------- damaged runs


def paths_to_keys(value: dict, depth: int = 2) -> list[tuple[str, ...]]:
    """Every key of a JSON object and of the objects in it."""
    found = []
    for name, item in value.items():
        found.append((name,))
        if isinstance(item, dict) and depth > 1:
            found += [(name, *rest) for rest in paths_to_keys(item, depth - 1)]
    return found


@pytest.mark.slow
def test_settings_that_lack_anything_never_end_in_a_traceback(start, begun, monkeypatch):
    monkeypatch.setattr(RunFolder, "opened", lambda _: contextlib.nullcontext())
    whole = (begun / "settings.json").read_bytes()

    def trained(env):
        raise main.ResourceError("this far")

    monkeypatch.setattr(main, "train", trained)
    codes = set()
    for path in paths_to_keys(json.loads(whole)):
        for instead in (None, 17, {}):  # None: the key itself is gone
            damaged = holder = json.loads(whole)
            for name in path[:-1]:
                holder = holder[name]
            del holder[path[-1]]
            if instead is not None:
                holder[path[-1]] = instead
            (begun / "settings.json").write_text(json.dumps(damaged), encoding="utf-8")
            outcome = start(RUN_NAME="one")
            # 2: a hyper-parameter of a kind that is refused wherever it comes from
            assert outcome.code in (2, 4, 6), (path, instead)
            codes.add(outcome.code)
    assert {4, 6} <= codes


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_run_whose_settings_are_damaged_is_named_and_never_written_over(start, begun, content):
    (begun / "settings.json").write_bytes(content)
    before = everything_in(begun)
    for settings in ({"RUN_NAME": "one"}, {"RESUME": "runs/one"}):
        refused = start(**settings)
        assert refused.code == 4
        assert "runs/one/settings.json" in refused.err
    new = start()
    assert new.code == 0
    assert "Note: runs/one/settings.json" in new.out
    assert "that run is passed over" in new.out
    assert everything_in(begun) == before


def test_a_run_whose_report_on_the_text_is_damaged_is_named(start, begun, workdir):
    (begun / "data.json").write_bytes(b"{")
    assert start(RUN_NAME="one").code == 4
    new = start()
    assert new.code == 0
    assert "runs/one is unfinished, but differs (runs/one/data.json can't be read" in new.out
    assert len(runs(workdir)) == 2


def test_settings_of_other_programs_are_none_of_our_business(start, workdir):
    other = workdir / "runs" / "other"
    other.mkdir(parents=True)
    (other / "settings.json").write_text('{"editor": "vim"}', encoding="utf-8")
    new = start()
    assert new.code == 0
    assert "other" not in new.out


# ------------------------------------------------------------------------------------- secrets


def test_nothing_of_the_environment_is_in_a_run_folder(start, workdir, monkeypatch):
    home = workdir / "home-of-somebody"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MY_SECRET", "s3cr3t-t0k3n")
    monkeypatch.setenv("WANDB_API_KEY", "another-s3cr3t")
    assert start(STOPPED_AT, RUN_NAME="one").code == 130
    assert start(RUN_NAME="one").code == 0
    files = everything_in(workdir / "runs" / "one")
    assert len(files) > 8
    for name, (content, _) in files.items():
        for planted in ("MY_SECRET", "s3cr3t", "home-of-somebody", os.environ["PATH"]):
            assert planted.encode() not in content, f"{planted} is in {name}"
            assert planted not in name.removeprefix(str(workdir))
