"""Whole programs that begin, stop, go on and are refused, by their settings, texts and folders.

Runs are stopped by real signals; each start is a main.main() of its own. The rules by which a run
goes on have their tables in test_runs and test_settings.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import environment
import main
import train
from engine.errors import Stopped
from storage.files import FolderLock
from tests.conftest import REPOSITORY
from tests.programs import everything_in, write_settings
from text import corpora
from text.corpora import CORPORA
from text.tokenizer import train_bpe
from training import journal, learner

TEXT = "the river carries the bell and the bell carries the river " * 12
STEPS, STOPPED_AT = 8, 3
SETTINGS = {"max_steps": STEPS, "eval_freq": 4, "start_context": "the"}
SETTINGS |= {"sampling_params": {"max_new_tokens": 3}}


class Outcome(NamedTuple):
    """What a start came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def start(workdir, monkeypatch, capsys):
    """Start the program with settings, and stop it by Ctrl-C after some steps where asked."""
    monkeypatch.setattr(journal, "render_losses", lambda **_: None)  # most of the time otherwise
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 3)
    (workdir / "text.txt").write_text(TEXT, encoding="utf-8")

    def run(stop_after: int | None = None, **settings) -> Outcome:
        write_settings(workdir, None, **SETTINGS | settings)
        done = 0

        def step(*arguments, **options):
            nonlocal done
            done += 1
            result = take_step(*arguments, **options)
            if done == stop_after:
                signal.raise_signal(signal.SIGINT)
            return result

        take_step = train.Trainer.step  # of the run: a trial's steps before it don't count
        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "step", step)
            code = main.main(["settings.py"])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Outcome(code, printed.out, printed.err)

    return run


def runs() -> list[str]:
    return sorted(path.name for path in Path("runs").iterdir())


def read(run: str, name: str = "settings.json") -> dict:
    return json.loads(Path("runs", run, name).read_text(encoding="utf-8"))


def assert_goes_on(outcome: Outcome, run: str, done: int = STOPPED_AT, of: int = STEPS) -> None:
    assert outcome.code == 0, outcome.err
    assert f"Resuming runs/{run}: {done} of {of} steps are done" in outcome.out


def assert_begins(outcome: Outcome, because: str = "") -> None:
    assert outcome.code == 0 and "Resuming" not in outcome.out
    told = [line for line in outcome.out.splitlines() if "unfinished" in line]
    assert len(told) == bool(because) and because in "".join(told)


def assert_refused(outcome: Outcome, run: str, line: str) -> None:
    assert outcome.code == 4, outcome.out
    assert f"the run in runs/{run} can't go on with other settings" in outcome.err
    assert f"\n  {line}" in outcome.err
    assert "TRAINING START" not in outcome.out


def test_auto_goes_on_with_the_newest_unfinished_run_of_these_settings_and_this_text(start):
    assert start(1).code == 130
    assert start(2, RESUME=False).code == 130
    older, newer = runs()  # the same second gives the second one a number
    Path("text.txt").write_text(TEXT.replace("bell", "ball", 1), encoding="utf-8")
    before = everything_in("runs")
    assert_begins(start(), f"runs/{newer} is unfinished, but differs (text: sha256 ")
    assert before.items() <= everything_in("runs").items()
    shutil.move("text.txt", "moved.txt")
    Path("moved.txt").write_text(TEXT, encoding="utf-8")  # only the text itself counts
    assert_goes_on(start(DATA={"path": ("moved.txt",)}), newer, done=2)
    assert_goes_on(start(DATA="moved.txt"), older, done=1)
    assert len(runs()) == 3


@pytest.mark.slow
def test_a_named_run_begins_goes_on_is_finished_changed_and_finished_again(start):
    folder = Path("runs/one")
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "data.json", ".lock", ".tmp-77-7-settings.json"):
        (folder / name).write_bytes(b"{")  # as a start that was killed at once may leave them
    begun = start(STOPPED_AT, RUN_NAME="one")
    assert begun.code == 130 and "Resuming" not in begun.out
    assert not list(folder.glob(".tmp-*"))
    before, record = everything_in(folder), read("one")
    assert_refused(start(RUN_NAME="one", SEED=7), "one", "seed: 123 then, 7 now\n")
    assert start(RUN_NAME="one", RESUME=False).code == 4
    assert everything_in(folder) == before
    assert_goes_on(start(RUN_NAME="one"), "one")
    before = everything_in(".")
    for settings in ({"RUN_NAME": "one"}, {"RESUME": "one"}):
        finished = start(**settings)
        assert (finished.code, finished.err) == (0, "")
        assert "✓ The run in runs/one is finished" in finished.out
        assert everything_in(".") == before
    others = {"SEED": 7}, {"DATA": "dummy"}, {"DATA": "gone.txt"}, {"eval_freq": 3}
    for other, what in zip(
        others, ("seed: 123", "text: sha", "text: there", "eval_freq: 4"), strict=True
    ):
        refused = start(RUN_NAME="one", **other)
        assert refused.code == 4
        assert "runs/one is finished, with other settings:" in refused.err
        assert f"\n  {what}" in refused.err
        assert everything_in(".") == before

    # longer, and with all that may change
    training = {"max_steps": 12, "eval_freq": 3, "patience": 50, "start_context": ["bell", "river"]}
    training |= {"activation_checkpointing": True}
    settings = {"COMPILE": False, "sampling_params": {"max_new_tokens": 4}}
    changed = {"RUN_NAME": "one", **training, **settings}
    assert start(1, **changed).code == 130
    assert not (folder / "summary.json").exists()
    [change] = read("one")["changes"]
    for kind, values in (("training", training), ("settings", settings)):
        for name, value in values.items():
            assert read("one")[kind][name] == value
            assert change[name] == [record[kind][name], value]
    # what was worked out, said outright, is no change
    changed |= {name: record["training"][name] for name in ("warmup_steps", "learning_rate")}
    assert_goes_on(start(**changed), "one", STEPS + 1, 12)
    assert read("one", "summary.json")["steps"] == 12
    assert change["total_steps"] == [STEPS, 12] and read("one")["changes"] == [change]
    for name in ("run_id", "started"):
        assert read("one")[name] == record[name]
    assert "is finished" in start(**changed).out
    assert runs() == ["one"]


class Killed(BaseException):
    """The end of a program that no handler catches."""


def test_a_run_killed_between_its_last_save_and_the_summary_finishes_with_nothing_twice(
    start, monkeypatch
):
    def is_at_the_end(trainer, *_):
        return trainer.journal.steps == STEPS

    assert start(RUN_NAME="whole").code == 0
    for place, name, is_time in (
        (train.Trainer, "evaluate", is_at_the_end),
        (train.Trainer, "sample", is_at_the_end),
        (journal.Journal, "note_sample", lambda _, label, *__: "Top-k" in label),
        (journal.Journal, "draw", lambda kept: "Top-p" in kept.history.samples[-1].label),
        (main, "write_json", lambda *_: True),
    ):
        real = getattr(place, name)

        def killed(*arguments, real=real, is_time=is_time, **options):
            if is_time(*arguments):
                raise Killed
            return real(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, name, killed)
            start(RUN_NAME="one")
        assert not Path("runs/one/summary.json").exists()
    assert_goes_on(start(RUN_NAME="one"), "one", STEPS)
    for name in ("samples.md", "metrics.jsonl"):
        ours, whole = (
            re.sub(r'"train/tok_per_sec": [\d.]+', "", Path("runs", run, name).read_text("utf-8"))
            for run in ("one", "whole")
        )
        assert ours == whole


@pytest.mark.parametrize("name", [None, "one"])
def test_a_script_that_was_stopped_trains_the_same_environment_to_its_end(start, monkeypatch, name):
    write_settings(Path(), None, **SETTINGS, RUN_NAME=name)
    env = environment.prepare_environment("settings.py")
    real, done = learner.take_step, []

    def step(*arguments, **options):
        done.append(1)
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(learner, "take_step", step)
    with pytest.raises(Stopped):
        train.train(env)
    torch.set_num_threads(2)
    journal = train.train(env)
    assert torch.get_num_threads() == 2, "whoever calls train() keeps the threads they had"
    assert journal.steps == len(done) == STEPS
    assert runs() == [env.run.path.name]


def test_a_path_goes_on_with_that_run_which_no_other_program_trains(start):
    assert start(STOPPED_AT, RUN_NAME="one").code == 130
    before = everything_in("runs")
    Path("text.txt").write_text("too short", encoding="utf-8")
    with FolderLock(Path("runs/one")):
        busy = start(RESUME="runs/one")
        assert busy.code == 7 and "is in use by process" in busy.err
        assert "Text loaded" not in busy.out
    after = everything_in("runs")
    for name in ("one", "one/.lock-owner.json"):
        del before[name], after[name]
    assert after == before
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    on = start(RESUME="runs/one", OUTPUT_DIR="elsewhere")
    assert_goes_on(on, "one")
    assert Path("runs/one/summary.json").exists()
    assert not Path("elsewhere").exists()


@pytest.mark.slow
def test_a_named_run_goes_on_with_its_own_text_and_tokenizer_only(start):
    pytest.importorskip("tokenizers")
    sample = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="utf-8")
    first, second = (train_bpe([sample[i : i + 3000]], 300) for i in (0, 3000))
    assert first.vocab_size == second.vocab_size  # of the same size, with other merges
    settings = {"TOKENIZER": "mine.json", "RUN_NAME": "one"}
    Path("mine.json").write_text(first.to_json(), encoding="utf-8")
    assert start(STOPPED_AT, **settings).code == 130
    before = everything_in("runs")
    Path("mine.json").write_text(second.to_json(), encoding="utf-8")
    assert_refused(start(**settings), "one", "tokenizer: sha256 bpe-")
    Path("mine.json").write_text(first.to_json(), encoding="utf-8")
    Path("text.txt").write_text(TEXT.replace("bell", "ball", 1), encoding="utf-8")
    refused = start(**settings)
    assert_refused(refused, "one", "text: sha256 ")
    assert "tokenizer: " not in refused.err
    Path("text.txt").unlink()
    lost = start(**settings)
    assert lost.code == 3 and "there is no file text.txt" in lost.err
    assert "The unfinished run runs/one goes on with this text only" in lost.err
    assert everything_in("runs") == before
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    assert_goes_on(start(**settings), "one")


@pytest.fixture
def network(monkeypatch):
    """the-verdict can be had; called with False, the network is cut."""
    content = TEXT.upper().encode()
    sha256 = hashlib.sha256(content).hexdigest()
    known = dataclasses.replace(CORPORA["the-verdict"], sha256=sha256)
    monkeypatch.setitem(CORPORA, "the-verdict", known)

    def connect(is_up: bool) -> None:
        def download(url: str, path: Path, expected: str) -> str:
            if not is_up:
                raise corpora.DownloadError("no connection")
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
            return expected

        monkeypatch.setattr(corpora, "download", download)

    return connect


def test_a_run_begun_with_the_stand_in_goes_on_with_it_when_the_network_is_back(start, network):
    network(False)
    begun = start(STOPPED_AT, DATA="the-verdict")
    assert begun.code == 130
    assert "sample-en.txt stands in for it" in begun.out
    (run,) = runs()
    assert start(1).code == 130  # a newer one, with all the settings but DATA
    network(True)
    on = start(DATA="the-verdict")
    assert_goes_on(on, run)
    assert "sample-en.txt stands in for the-verdict, as when this run began" in on.out
    assert read(run)["stood_in"] is True
    fresh = start(1, DATA="the-verdict", RUN_NAME="two")
    assert fresh.code == 130 and "stands in" not in fresh.out
    assert read("two")["stood_in"] is False


def test_a_run_goes_on_with_the_text_in_the_cache_or_ends_with_3_where_it_cannot_be_had(
    start, workdir, network
):
    network(True)
    assert start(1, DATA="the-verdict").code == 130
    (run,) = runs()
    network(False)
    on = start(1, DATA="the-verdict")  # from the cache
    assert on.code == 130 and f"Resuming runs/{run}" in on.out and "stands in" not in on.out
    shutil.rmtree(workdir / "cache")
    before = everything_in("runs")
    lost = start(DATA="the-verdict")
    assert lost.code == 3
    assert f"The unfinished run runs/{run} goes on with this text only" in lost.err
    assert everything_in("runs") == before, "no new run, and the old one as it was"
    network(True)
    assert_goes_on(start(DATA="the-verdict"), run, done=2)
