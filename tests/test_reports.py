"""What users of comparable programs have reported: each fault tried, and the right behaviour."""

import json
from pathlib import Path

import numpy as np
import pytest

import environment
import main
from tests.programs import write_settings
from text.documents import DataSpec
from text.split import split_documents
from text.token_cache import tokenize
from text.tokenizer_file import END_OF_TEXT
from training import journal


def corpora() -> list[tuple[np.ndarray, np.ndarray]]:
    """40 corpora of 20 to 500 documents, their lengths from equal to Pareto with a heavy tail."""
    random, made = np.random.default_rng(5), []
    for number in range(40):
        count = int(random.integers(20, 501))
        # at 0 all are equal; 1.05 is heavier than any real collection
        tail = np.linspace(8, 1.05, 40)[number]
        sizes = np.full(count, 100) if number == 0 else 10 + 90 * random.pareto(tail, count)
        made.append((random.integers(0, 2**64, count, dtype=np.uint64), sizes.astype(np.int64)))
    return made


@pytest.mark.parametrize("train_ratio", [0.5, 0.8, 0.9, 0.95])
def test_the_share_that_validates_is_the_one_asked_for_whatever_the_lengths(train_ratio):
    for digests, sizes in corpora():
        split = split_documents(digests, sizes, train_ratio)
        validates = sizes[split.is_val].sum() + split.n_cut
        assert abs(validates / sizes.sum() - (1 - train_ratio)) < 0.02
        if sizes.max() < 0.5 * (1 - train_ratio) * sizes.sum():
            assert split.cut is None  # whole documents can make it


def write_rows(path: Path, texts: list[str]) -> Path:
    rows = (json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text("".join(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("novel", [0, 12, 24])
def test_notes_and_a_novel_train_and_validate_on_both_and_the_cut_is_told(tmp_path, novel):
    texts = [f"Note {i}: the lamp is in the {i * 7 % 12}th drawer." * 3 for i in range(24)]
    texts.insert(novel, "".join(f"Chapter {i}. The ship went on and on. " for i in range(1000)))
    data = DataSpec((str(write_rows(tmp_path / "a.jsonl", texts)),))
    text = tokenize(data, "char", 0.9, tmp_path / "cache")
    tokens = np.fromfile(text.path, dtype=text.dtype)
    train, val = (
        text.tokenizer.decode(ids).split(END_OF_TEXT)
        for ids in (tokens[: text.n_train], tokens[text.n_train :])
    )
    assert abs(1 - text.n_train / text.n_tokens - 0.1) < 0.02
    [head], [tail] = ([t for t in side if t not in texts] for side in (train, val))
    assert head + tail == texts[novel]
    whole = [t for t in train + val if t in texts]
    assert sorted(whole) == sorted(t for t in texts if t != texts[novel])
    assert len(train) > 10 and len(val) > 2
    [note] = text.report["notes"]
    assert note.startswith(f"the longest document is cut: its last {len(tail):,} of ")
    assert text.report["documents_on_both_sides"] == 1


def test_twenty_equal_rows_are_divided_as_asked(tmp_path):
    data = DataSpec((str(write_rows(tmp_path / "a.jsonl", [f"row {i:02}" for i in range(20)])),))
    text = tokenize(data, "char", 0.9, tmp_path / "cache")
    assert (text.n_train, text.n_tokens, text.report["notes"]) == (18 * 7 - 1, 20 * 7 - 2, [])


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Start the program with settings; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(journal, "render_losses", lambda **_: None)  # most of the time otherwise

    def run(text: str | None = "river bell " * 50, **settings) -> tuple[int, str]:
        sampling = {"sampling_params": {"max_new_tokens": 2}}
        write_settings(tmp_path, text, **sampling | settings)
        code = main.main(["settings.py"])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    return run


def test_finite_divergence_is_no_success_and_the_best_weights_are_used(start, tmp_path):
    wild = {"learning_rate": 10, "warmup_steps": 0, "max_grad_norm": 0, "eval_freq": 1}
    code, said = start(RUN_NAME="one", max_steps=3, schedule="constant", **wild)
    assert code == 5 and "finished successfully" not in said
    summary = json.loads((tmp_path / "runs/one/summary.json").read_bytes())
    best = summary["best_step"]
    assert summary["weights_of_step"] == best
    assert f"the best weights, of step {best}, are used" in said
    assert "NumericsError: training diverged: the training loss rose from " in said
    assert "begin a run with a third of it" in said


@pytest.mark.parametrize(
    ("first", "last", "diverged"),
    [
        (5.8, 945.0, True),
        (5.8, 5.85, False),
        (5.8, 6.0, False),
        (5.8, 6.2, True),
        (0.2, 0.25, False),
    ],
)
def test_a_rise_within_noise_is_no_divergence(first, last, diverged):
    assert journal.History(train_losses=[first, 1.0, last]).has_diverged == diverged
