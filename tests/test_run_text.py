"""The text of a run found again, and copies shown in what it writes."""

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import storage.cache
from engine.errors import CheckpointError, DataError
from insight.run_text import open_run_text, to_bytes
from planning.chat import find_chat
from planning.decisions import read_record
from scripts import inference
from scripts.options import run_program
from storage.files import write_json
from tests import by_heart
from tests.by_heart import ENDLESS, POEM, STORY, Done
from text.sources import parse_data
from text.token_cache import find_tokens, tokenize

# a chat template that is not ChatML's
OTHER = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    return by_heart.tiny_run(tmp_path_factory)


@pytest.fixture
def place(tiny_run, tmp_path, monkeypatch) -> Path:
    """A folder with a copy of the run's settings and of its text, and with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage.cache, "CACHE", tmp_path / "cache")
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(tiny_run.parent.parent / name, tmp_path)
    (tmp_path / "run").mkdir()
    for name in ("settings.json", "data.json", "tokenizer.json"):
        shutil.copy(tiny_run / name, tmp_path / "run")
    return tmp_path


def test_a_runs_text_is_found_in_the_cache_and_read_again_where_that_is_gone(
    place, tiny_run, monkeypatch
):
    rows = Path("train.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(row)["text"] for row in rows]
    validation = json.loads(Path("val.jsonl").read_text(encoding="utf-8"))["text"]
    again = open_run_text(place / "run")  # from DATA
    Path("train.jsonl").unlink()
    monkeypatch.setattr(storage.cache, "CACHE", tiny_run.parent.parent / "cache")
    cached = open_run_text(place / "run")  # which needs no DATA
    for text in (again, cached):
        assert to_bytes(text.train, text.tokenizer) == "\0".join(documents).encode()
        assert to_bytes(text.val, text.tokenizer) == validation.encode()
        assert text.train.base is not None  # it is mapped from the disk
    assert again.fingerprint == cached.fingerprint
    assert np.array_equal(again.train, cached.train)


def test_conversations_are_read_again_by_the_runs_own_template(place):
    pytest.importorskip("jinja2")
    row = [{"role": role, "content": "a man"} for role in ("user", "assistant")]
    lines = "".join(json.dumps({"messages": [*row] * n}) + "\n" for n in range(1, 9))
    Path("rows.jsonl").write_text(lines, encoding="utf-8")
    text = tokenize(parse_data("rows.jsonl"), "char", 0.5, place / "once", chat_template=OTHER)
    run, record = place / "run", read_record(place / "run")
    record = dataclasses.replace(
        record,
        tokenizer=text.tokenizer.fingerprint,
        settings=record.settings | {"DATA": "rows.jsonl"},
        training=dataclasses.replace(record.training, train_ratio=0.5),
        chat=find_chat(text),
    )
    write_json(run / "settings.json", record.to_json())
    split = {"train_tokens": text.n_train}
    write_json(run / "data.json", {"tokens_sha256": text.sha256, "split": split})
    shutil.copy(text.tokenizer_file, run)
    assert open_run_text(run).chat.template == OTHER


def test_a_text_that_has_changed_or_is_gone_is_an_error(place):
    with Path("train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(DataError, match="text that run was trained on has changed"):
        open_run_text(place / "run")
    Path("train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl"):
        open_run_text(place / "run")
    with pytest.raises(CheckpointError, match="is no run"):
        open_run_text(place)
    (place / "run" / "data.json").write_text('{"split": 3}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="not written by this version"):
        open_run_text(place / "run")


def test_damaged_entries_of_the_token_cache_are_passed_over(place, capsys):
    sha256 = json.loads((place / "run" / "data.json").read_text("utf-8"))["tokens_sha256"]
    (place / "cache" / "tokens" / "x").mkdir(parents=True)
    (place / "cache" / "tokens" / "x" / "entry.json").write_text("{", encoding="utf-8")
    assert find_tokens(place / "cache", sha256) is None
    open_run_text(place / "run")
    found = find_tokens(place / "cache", sha256)
    assert found is not None and found.sha256 == sha256
    assert find_tokens(place / "cache", "0" * 64) is None
    found.path.write_bytes(b"\1" * found.path.stat().st_size)
    assert find_tokens(place / "cache", sha256) is None
    assert "is damaged" in capsys.readouterr().out


@pytest.fixture
def infer(tiny_run, monkeypatch, capsys):
    """Continue texts with the tiny run in this process, its text in the cache."""
    monkeypatch.setattr(storage.cache, "CACHE", tiny_run.parent.parent / "cache")

    def call(*arguments: str) -> Done:
        where = ["--run", str(tiny_run), "--weights", "fp32", "--show-copies"]
        monkeypatch.setattr(sys, "argv", ["inference", *where, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as exit:
            run_program(inference.main)
        return Done(exit.value.code, *capsys.readouterr())

    return call


def test_copies_are_marked_and_listed_with_their_place(infer):
    done = infer("--prompt", "The ferry", "--prompt", f"{ENDLESS[:12]}", "--max-new-tokens", "60")
    assert done.code == 0, done.err
    first, second = done.out.split("--- prompt 2 of 2 ---\n")
    lines = first.strip().splitlines()
    assert lines[1].startswith("The ferry⟦ crossed.")
    n_written = min(60, len(STORY) - len("The ferry"))
    assert lines[-2] == f"copied: {n_written} of {n_written} characters"
    source = len(b"The ferry")
    assert lines[-1].startswith(f'  "crossed. {POEM} ')
    assert lines[-1].endswith(
        f'{n_written} characters: in the training text at byte {source}, behind "The ferry"'
    )
    assert second.startswith(f"{ENDLESS[:12]}⟦") and "⟧\ncopied: 60 of 60 characters\n" in second


def test_copies_in_json_have_their_place_in_both_texts(infer):
    (sample,) = infer("--prompt", "The ferry", "--json").samples
    (copy,) = sample["copies"]
    assert copy == {
        "start": 0,
        "stop": len(sample["text"]),
        "text": sample["text"],
        "source": 9,
        "before": "The ferry",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stream"], "--stream and --show-copies don't go together"),
        (["--model", "smollm2-135m"], "--show-copies is for runs, whose training text is known"),
    ],
)
def test_what_copies_are_not_shown_for_is_said(infer, arguments, said):
    done = infer("--prompt", "x", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
