"""What a journal counts, prints and keeps, and how it comes back from a checkpoint."""

import errno
import itertools
import json
import math
import os
import shutil
import sys
import time

import pytest
import torch
from matplotlib import image

from engine import console
from engine.errors import NumericsError
from engine.metrics import TokenSize
from storage.files import PATIENCE_S
from storage.tracking import Trackers
from training.journal import (
    FETCH_EVERY,
    LAST_MOMENTS,
    MOST_MOMENTS,
    PICTURE,
    History,
    Journal,
    Moment,
)

GOOD, NAN, INF = 1.0, math.nan, math.inf


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """The picture goes into the working directory too."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(Journal, "draw", lambda self: False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand: clock.now = 15.8."""

    class Clock:
        now = 100.0  # no clock starts at 0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


def new_journal(folder=None, **fields) -> Journal:
    return Journal(**({"vocab_size": 8, "total_steps": 1000, "folder": folder} | fields))


def step(journal: Journal, loss: float = GOOD, norm: float = GOOD, n_tokens: int = 16) -> None:
    number = journal.steps + 1
    journal.step(number, torch.tensor(loss), torch.tensor(norm), n_tokens, 0.01)


def evaluate(journal: Journal, train_loss=2.0, val_loss=2.5, epoch: int | None = None) -> None:
    journal.pause()
    journal.evaluation(epoch, train_loss, val_loss)


def rows_of(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def speeds_of(folder) -> list[float]:
    return [row["train/tok_per_sec"] for row in rows_of(folder) if "train/tok_per_sec" in row]


# ------------------------------------------------------------------ single steps


def test_losses_are_fetched_together(tmp_path):
    journal = new_journal(tmp_path)
    for number in range(FETCH_EVERY - 1):
        step(journal, float(number))
    assert journal.history.batch_losses == []
    assert not (tmp_path / "metrics.jsonl").exists()
    assert journal.steps == FETCH_EVERY - 1
    step(journal, 7.0)
    assert journal.history.batch_losses == [*range(FETCH_EVERY - 1), 7.0]
    step(journal, 8.0)
    journal.fetch()
    journal.fetch()
    assert journal.history.batch_losses[-2:] == [7.0, 8.0]
    assert journal.steps == len(journal.history.batch_losses) == FETCH_EVERY + 1
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, FETCH_EVERY + 2))


def test_each_steps_row_has_its_own_numbers(tmp_path):
    journal = new_journal(tmp_path)
    journal.step(1, torch.tensor(3.0), torch.tensor(0.5), 16, 0.1)
    journal.step(2, torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor(0.25), 8, 0.2)
    journal.fetch()
    names = ("step", "train/loss", "train/grad_norm", "train/lr", "train/tokens")
    expected = [(1, 3.0, 0.5, 0.1, 16), (2, 2.0, 0.25, 0.2, 24)]
    assert rows_of(tmp_path) == [dict(zip(names, row, strict=True)) for row in expected]


@pytest.mark.parametrize(("log_every", "logged"), [(0, []), (1, [1, 2, 3]), (2, [2]), (4, [])])
def test_log_every_prints_loss_pace_and_time_left_of_every_nth_step(
    log_every, logged, clock, capsys
):
    journal = new_journal(total_steps=10, log_every=log_every)
    for number in (1, 2, 3):
        clock.now += 0.5
        step(journal, 1 / number, n_tokens=640)
    left = {1: "0m 4.5s", 2: "0m 4.0s", 3: "0m 3.5s"}
    assert capsys.readouterr().out.splitlines() == [
        f"step {number}: batch loss {1 / number:.4f}, 1,280 tokens/s, {left[number]} left"
        for number in logged
    ]


# ------------------------------------------------------------------ numbers gone bad


@pytest.mark.parametrize(
    ("loss", "norm"), [(NAN, NAN), (INF, NAN), (-INF, GOOD), (GOOD, INF), (GOOD, NAN)]
)
def test_a_bad_number_is_null_in_the_log(loss, norm, tmp_path):
    journal = new_journal(tmp_path, log_every=2)
    step(journal)
    step(journal, loss, norm)
    step(journal)
    journal.fetch()
    row = rows_of(tmp_path)[1]
    shown = (row["train/loss"], row["train/grad_norm"])
    assert shown == tuple(x if math.isfinite(x) else None for x in (loss, norm))
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_the_numbers_of_each_step_are_returned_once_when_they_are_read():
    journal, read = new_journal(log_every=3), []
    for number in range(1, 6):
        rows = journal.step(number, torch.tensor(float(number)), torch.tensor(GOOD), 16, 0.01)
        read.append([row["step"] for row in rows])
    read += [[row["step"] for row in rows] for rows in (journal.pause(), journal.fetch())]
    assert read == [[], [], [1, 2, 3], [], [], [4, 5], []]


@pytest.mark.parametrize(("train_loss", "val_loss"), [(NAN, GOOD), (GOOD, NAN), (GOOD, INF)])
def test_an_evaluation_that_is_not_finite_stops_the_run(train_loss, val_loss, tmp_path):
    journal = new_journal(tmp_path)
    step(journal)
    with pytest.raises(NumericsError, match=f"after step 1 the training loss is {train_loss}"):
        evaluate(journal, train_loss, val_loss)
    assert journal.history.steps == []
    assert not (tmp_path / PICTURE).exists()


# ------------------------------------------------------------------ evaluations


def test_the_log_line_is_that_of_the_public_format(clock, capsys, tmp_path, no_pictures):
    journal = new_journal(tmp_path, token_size=TokenSize(characters=2.0, bytes=5.0))
    step(journal, n_tokens=1_658_544)
    for _ in range(99):
        step(journal, n_tokens=0)
    clock.now += 15.8
    evaluate(journal, 5.7529, 5.8782)
    assert capsys.readouterr().out.splitlines() == [
        "step 100: train loss 5.7529, val loss 5.8782, speed: 104971.14 tokens/sec, time: 0m 15.8s"
    ]
    bits = 5.8782 / math.log(2)
    assert rows_of(tmp_path)[-1] == {
        "step": 100,
        "eval/train_loss": 5.7529,
        "val/loss": 5.8782,
        "val/perplexity": pytest.approx(math.exp(5.8782)),
        "val/bits_per_character": pytest.approx(bits / 2),
        "val/bits_per_byte": pytest.approx(bits / 5),
        "train/tok_per_sec": pytest.approx(104971.1392),
    }


def test_an_epochs_end_has_a_line_of_its_own_and_the_start_only_one(capsys, tmp_path, no_pictures):
    journal = new_journal(tmp_path)
    evaluate(journal, 2.0, 2.1)
    step(journal)
    evaluate(journal, 1.2344, 1.5, epoch=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Before training: Train loss 2.000, Val loss 2.100"
    assert lines[1].startswith("step 1: train loss 1.2344, val loss 1.5000, speed: ")
    assert lines[2] == "Ep 3 (End Epoch): Train loss 1.234, Val loss 1.500"
    assert len(lines) == 3
    first, _, last = rows_of(tmp_path)
    assert first.keys() == {"step", "eval/train_loss", "val/loss", "val/perplexity"}
    assert last.keys() == first.keys() | {"train/tok_per_sec"}  # no text, so no bits


def test_speed_leaves_out_the_time_of_evaluations_and_saves(clock, tmp_path, no_pictures):
    journal = new_journal(tmp_path)
    clock.now += 2
    evaluate(journal)
    clock.now += 10
    step(journal, n_tokens=1000)
    journal.pause()
    clock.now += 1000  # the evaluation itself
    journal.evaluation(None, 1.0, 1.0)
    clock.now += 4
    step(journal, n_tokens=300)
    clock.now += 50
    journal.leave_out(50)  # a checkpoint
    clock.now += 2
    step(journal, n_tokens=300)
    evaluate(journal)
    assert speeds_of(tmp_path) == pytest.approx([100.0, 100.0])
    assert journal.history.elapsed_s == pytest.approx(1068.0)


def test_has_evaluated_tells_whether_the_model_has_changed_since():
    journal = new_journal()
    assert not journal.has_evaluated()
    evaluate(journal)
    assert journal.has_evaluated()
    step(journal)
    assert not journal.has_evaluated()


@pytest.mark.parametrize(
    ("val_losses", "best", "since_best"),
    [
        ([3.0], 0, 0),
        ([1.0, 3.0], 1, 0),  # fresh weights are no result, however lucky
        ([1.0, 3.0, 2.0, 2.5, 2.0], 2, 2),  # as good is not better
        ([9.0, 3.0, 2.0, 1.0], 3, 0),
        ([9.0, 1.0, 2.0, 3.0, 4.0], 1, 3),
    ],
)
def test_the_best_evaluation_is_the_first_of_the_lowest_after_step_0(val_losses, best, since_best):
    history = History(steps=[4 * i for i in range(len(val_losses))], val_losses=val_losses)
    assert (history.best, history.since_best) == (best, since_best)


def test_trackers_get_the_rows_of_the_file(tmp_path, no_pictures):
    rows = []

    class Tracker:
        def log(self, step: int, values: dict) -> None:
            rows.append({"step": step} | values)

    journal = new_journal(tmp_path, trackers=Trackers([Tracker()]))
    evaluate(journal)
    step(journal)
    evaluate(journal)
    assert rows == rows_of(tmp_path)
    assert len(rows) == 3


# ------------------------------------------------------------------ samples and the picture


def test_control_characters_never_reach_the_screen(capsys, tmp_path):
    journal = new_journal(tmp_path)
    text = "a\x1b[31mb\r\n\nc\x00\x07\x9b\u202ed\u2028e\tf  春"
    journal.note_sample("After epoch 1", [text])
    assert capsys.readouterr().out == "After epoch 1: a [31mb c d e f 春\n"
    assert journal.history.samples == [Moment("After epoch 1", 0, [text])]


def test_control_characters_in_samples_md_move_no_cursor_and_turn_no_line(tmp_path):
    journal = new_journal(tmp_path)
    text = "a\x1b[31m\tb\r\nc\x00\x07\x9b\u202e\u2067d\u2028e\x7f\u3000f"
    journal.note_sample("After epoch 1", [text])
    assert samples_in(tmp_path).splitlines()[6:] == [
        "    a\ufffd[31m\tb",
        "    c\ufffd\ufffd\ufffd\ufffd\ufffdd",
        "    e\ufffd\u3000f",
    ]


def samples_in(folder) -> str:
    return (folder / "samples.md").read_bytes().decode("utf-8")


def test_samples_md_has_a_section_a_moment_with_its_step_and_a_quote_a_prompt(
    tmp_path, capsys, no_pictures
):
    journal = new_journal(tmp_path)
    evaluate(journal, val_loss=7.0)
    journal.note_sample("Before training", ["# no\n\n<b>heading</b>", "往事"])
    step(journal)
    evaluate(journal, val_loss=6.25)
    capsys.readouterr()
    journal.note_sample(
        "After epoch 1", ["春江\ud800", "往\n事"]
    )  # half a pair, as bytes may decode
    assert capsys.readouterr().out == (
        "After epoch 1, prompt 1: 春江\nAfter epoch 1, prompt 2: 往 事\n"
    )
    assert samples_in(tmp_path) == (
        "# What the model writes\n\n"
        "## Before training\n\nStep 0, validation loss 7.000\n\n"
        "Prompt 1:\n\n    # no\n    \n    <b>heading</b>\n\nPrompt 2:\n\n    往事\n\n"
        "## After epoch 1\n\nStep 1, validation loss 6.250\n\n"
        "Prompt 1:\n\n    春江?\n\nPrompt 2:\n\n    往\n    事\n"
    )


def test_samples_of_the_best_weights_tell_their_step(tmp_path, no_pictures):
    journal = new_journal(tmp_path)
    step(journal)
    evaluate(journal, val_loss=3.0)
    step(journal)
    evaluate(journal, val_loss=4.0)
    journal.weights_of_step = 1
    journal.note_sample("Greedy", ["abc"])
    assert samples_in(tmp_path) == (
        "# What the model writes\n\n## Greedy\n\nStep 1, validation loss 3.000\n\n    abc\n"
    )


def note_epochs(journal: Journal, first: int, last: int) -> None:
    for epoch in range(first, last + 1):
        step(journal)
        journal.note_sample(f"After epoch {epoch}", [f"text {epoch}"])


def test_of_many_moments_the_first_the_last_and_evenly_spread_ones_are_kept(tmp_path):
    journal = new_journal(tmp_path)
    journal.note_sample("Before training", ["text 0"])
    note_epochs(journal, 1, 1000)
    kept = [moment.step for moment in journal.history.samples]
    assert len(kept) == MOST_MOMENTS
    assert kept[0] == 0
    assert kept[-LAST_MOMENTS:] == list(range(1001 - LAST_MOMENTS, 1001))
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    even = kept[-LAST_MOMENTS] / (MOST_MOMENTS - LAST_MOMENTS)
    assert max(gaps) <= 2 * even
    assert min(gaps) > 0
    assert samples_in(tmp_path).count("\n## ") == MOST_MOMENTS
    assert len(json.dumps(journal.state()["history"]["samples"])) < 60 * MOST_MOMENTS


@pytest.mark.parametrize("stop", [1, MOST_MOMENTS - 1, MOST_MOMENTS, 137])
def test_a_journal_that_goes_on_ends_with_the_samples_of_an_undisturbed_one(tmp_path, stop):
    (whole := tmp_path / "whole").mkdir()
    (stopped := tmp_path / "stopped").mkdir()
    note_epochs(new_journal(whole), 1, 200)
    first = new_journal(stopped)
    note_epochs(first, 1, stop)
    state = json.loads(json.dumps(first.state()))
    note_epochs(first, stop + 1, stop + 3)  # which no checkpoint has
    again = new_journal(stopped)
    again.restore(state)
    note_epochs(again, stop + 1, 200)
    assert samples_in(stopped) == samples_in(whole)


def test_steps_since_a_sample_are_counted_from_the_last_one():
    journal = new_journal()
    assert journal.steps_since_sample == 0
    step(journal)
    assert journal.steps_since_sample == 1
    journal.note_sample("After epoch 1", ["a"])
    assert journal.steps_since_sample == 0
    step(journal)
    step(journal)
    assert journal.steps_since_sample == 2


def test_an_evaluation_draws_the_picture_into_the_folder_and_the_working_directory(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    journal = new_journal(folder)
    evaluate(journal)
    assert not (folder / PICTURE).exists()  # one point is no curve
    step(journal)
    evaluate(journal)
    assert image.imread(folder / PICTURE).shape[1] > 500
    assert (folder / PICTURE).read_bytes() == (tmp_path / PICTURE).read_bytes()


def test_a_journal_without_a_folder_writes_nothing(tmp_path):
    journal = new_journal()
    step(journal)
    evaluate(journal)
    journal.note_sample("After epoch 1", ["abc"])
    assert journal.state()["metrics_bytes"] == 0
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ what the disk refuses


def two_rounds(journal: Journal) -> None:
    for _ in range(2):
        step(journal)
        evaluate(journal)
        journal.note_sample("After epoch 1", ["abc"])
        journal.state()  # as for a checkpoint


def notes_in(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("Note")]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.md", PICTURE])
def test_a_file_that_the_disk_refuses_is_said_once_and_the_others_are_written(
    name, tmp_path, capsys
):
    folder = tmp_path / "run"
    (folder / name).mkdir(parents=True)
    journal = new_journal(folder)
    two_rounds(journal)
    (note,) = notes_in(capsys.readouterr().out)
    assert name in note
    assert "Training goes on" in note
    assert journal.history.steps == [1, 2]
    for other in {"metrics.jsonl", "samples.md", PICTURE} - {name}:
        assert (folder / other).stat().st_size > 50
    assert (tmp_path / PICTURE).is_file()


def test_a_picture_that_a_viewer_holds_open_is_waited_for_once(tmp_path, capsys, monkeypatch):
    slept, viewers = [], [tmp_path / PICTURE]
    replace = os.replace

    def refuse_what_is_viewed(source, target):
        if target in [path.relative_to(tmp_path) for path in viewers]:
            error = PermissionError(errno.EACCES, "Access is denied")
            error.winerror = 5  # as Windows says it
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_what_is_viewed)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(time, "sleep", slept.append)
    folder = tmp_path / "run"
    folder.mkdir()
    journal = new_journal(folder)
    monkeypatch.setattr("training.journal.render_losses", lambda **_: b"a picture")
    for _ in range(3):
        step(journal)
        evaluate(journal)
    assert (folder / PICTURE).read_bytes() == b"a picture"
    assert sum(slept) == pytest.approx(PATIENCE_S)
    (note,) = notes_in(capsys.readouterr().out)
    assert note == (
        f"Note: can't write {PICTURE}: Access is denied (another program may have it open). "
        "Training goes on"
    )
    viewers.clear()
    assert journal.draw() and (tmp_path / PICTURE).read_bytes() == b"a picture"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", PICTURE]


def test_a_folder_that_is_gone_is_said_once_a_file(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    journal = new_journal(folder)
    step(journal)
    evaluate(journal)
    shutil.rmtree(folder)
    two_rounds(journal)
    notes = notes_in(capsys.readouterr().out)
    assert len(notes) == 3
    assert all(
        any(name in note for note in notes) for name in ("metrics.jsonl", "samples.md", PICTURE)
    )
    assert journal.history.batch_losses == [GOOD] * 3


def test_that_matplotlib_is_missing_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    journal = new_journal(tmp_path)
    two_rounds(journal)
    assert not journal.draw()
    assert notes_in(capsys.readouterr().out) == [
        "Note: matplotlib is not installed: no picture (pip install matplotlib)"
    ]


def test_the_star_of_the_picture_is_at_the_best_evaluation_of_a_trained_model(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr("training.journal.render_losses", lambda **run: drawn.append(run))
    journal = new_journal(tmp_path)
    journal.history = History(
        steps=[0, 4, 8], train_losses=[1.0] * 3, val_losses=[1.0, 3.0, 2.0], tokens_seen=[0, 1, 2]
    )
    journal.draw()
    assert drawn[0]["best"] == 2


def test_a_working_directory_that_refuses_the_picture_is_said_once(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / PICTURE).mkdir()
    journal = new_journal(folder)
    two_rounds(journal)
    assert len(notes_in(capsys.readouterr().out)) == 1
    assert (folder / PICTURE).is_file()
    assert journal.draw()


# ------------------------------------------------------------------ leaving and coming back


def long_history(folder) -> Journal:
    """A journal of five steps, one of them skipped, with evaluations and samples."""
    journal = new_journal(folder, token_size=TokenSize(1.5, 3.0))
    evaluate(journal, 2.0794, 0.1 + 0.2)  # a number that no short text holds
    journal.note_sample("Before training", ["春\n江", "往事"])
    for loss in (1 / 3, 2.0, NAN, 0.1, 5e-324):
        step(journal, loss, n_tokens=7)
    evaluate(journal, 1 / 7, 1.0, epoch=1)
    return journal


def test_a_journal_comes_back_from_its_state_as_it_was(tmp_path, clock, no_pictures):
    journal = long_history(tmp_path)
    clock.now += 30
    state = json.dumps(journal.state(), allow_nan=False)
    again = new_journal(tmp_path)
    again.restore(json.loads(state))
    assert [loss.hex() for loss in again.history.batch_losses] == [
        loss.hex() for loss in journal.history.batch_losses
    ]
    again.history.batch_losses = journal.history.batch_losses  # NaN equals nothing
    journal.history.elapsed_s = 30.0
    assert again.history == journal.history
    assert (again.steps, again.has_evaluated()) == (5, True)
    clock.now += 5
    assert again.elapsed_s == pytest.approx(35.0)
    step(again, n_tokens=7)
    again.fetch()
    assert rows_of(tmp_path)[-1]["step"] == 6
    assert rows_of(tmp_path)[-1]["train/tokens"] == 42


def test_what_came_after_the_checkpoint_leaves_the_log_and_no_step_is_in_it_twice(
    tmp_path, no_pictures
):
    journal = new_journal(tmp_path)
    for _ in range(4):
        step(journal)
    evaluate(journal)
    state = json.loads(json.dumps(journal.state()))
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    for _ in range(3):
        step(journal)
    evaluate(journal)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "train/lo')  # killed in the middle of a line
    again = new_journal(tmp_path)
    again.restore(state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept
    for _ in range(3):
        step(again)
    evaluate(again)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 4, 5, 6, 7, 7]


def test_a_run_that_begins_anew_has_an_empty_log(tmp_path):
    step(journal := new_journal(tmp_path))
    journal.fetch()
    again = new_journal(tmp_path)
    again.restore(None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    step(again)
    again.fetch()
    assert [row["step"] for row in rows_of(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("damage", "known"),
    [
        ("gone", []),
        ("empty", []),
        ("a line short", [1, 2]),
        ("half a line short", [1, 2]),
        ("a line is no JSON", [1, 3]),
        ("a line is other JSON", [1, 3]),
        ("a line names no such step", [1, 3]),
    ],
)
def test_losses_that_the_log_has_lost_are_nan_and_the_run_goes_on(
    damage, known, tmp_path, no_pictures, capsys
):
    journal = new_journal(tmp_path)
    for loss in (1.0, 2.0, 3.0):
        step(journal, loss)
    state = json.loads(json.dumps(journal.state()))
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "a line short": first + second,
                "half a line short": first + second + third[:-9],
                "a line is no JSON": first + b"\xff{" + b"x" * (len(second) - 3) + b"\n" + third,
                "a line is other JSON": first + b"[7]".ljust(len(second) - 1) + b"\n" + third,
                "a line names no such step": first + second.replace(b": 2,", b": 9,") + third,
            }[damage]
        )
    again = new_journal(tmp_path)
    again.restore(state)
    assert again.steps == 3
    for number, loss in enumerate(again.history.batch_losses, start=1):
        assert loss == number if number in known else math.isnan(loss)
    step(again)
    evaluate(again)
    assert rows_of_what_can_be_read(path)[-2:] == [4, 4]
    assert notes_in(capsys.readouterr().out) == []


@pytest.mark.parametrize("log_is_gone", [True, False])
def test_a_picture_is_drawn_where_losses_are_missing(log_is_gone, tmp_path):
    journal = new_journal(tmp_path)
    for loss in (1.0, NAN, INF, 2.0) * 6:
        step(journal, loss)
    state = json.loads(json.dumps(journal.state()))
    if log_is_gone:
        (tmp_path / "metrics.jsonl").unlink()
    again = new_journal(tmp_path)
    again.restore(state)
    evaluate(again)
    assert image.imread(tmp_path / PICTURE).shape[1] > 500


def rows_of_what_can_be_read(path) -> list[int]:
    steps = []
    for line in path.read_bytes().splitlines():
        try:
            steps.append(json.loads(line)["step"])
        except (ValueError, TypeError):
            steps.append(None)
    return steps


def test_an_evaluation_made_up_for_tells_the_speed_of_its_own_steps(tmp_path, clock, no_pictures):
    journal = new_journal(tmp_path)
    clock.now += 10
    step(journal, n_tokens=1000)
    state = json.loads(json.dumps(journal.state()))
    again = new_journal(tmp_path)
    again.restore(state)
    clock.now += 7  # loading, say
    evaluate(again)
    clock.now += 10
    step(again, n_tokens=500)
    evaluate(again)
    assert speeds_of(tmp_path) == pytest.approx([100.0, 50.0])


def test_the_time_left_is_by_the_pace_of_this_process(clock, capsys):
    journal = new_journal(total_steps=100, log_every=1)
    for _ in range(10):
        clock.now += 60
        step(journal)
    state = json.loads(json.dumps(journal.state()))
    again = new_journal(total_steps=100, log_every=1)
    again.restore(state)
    capsys.readouterr()
    clock.now += 1
    step(again)
    assert capsys.readouterr().out.endswith("1m 29.0s left\n")


def test_a_notebook_gets_the_ends_of_a_run_and_whole_moments_between(
    kernel, monkeypatch, capsys, no_pictures
):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(console, "_next_report_at", 0.0)
    journal = new_journal(total_steps=40, log_every=1)

    def note_moment(name: str, epoch: int | None) -> None:
        evaluate(journal, epoch=epoch)
        journal.note_sample(name, ["a b"])

    note_moment("Before training", None)
    for epoch in range(1, 41):
        now += 0.5
        step(journal)
        note_moment(f"After epoch {epoch}", epoch)
    journal.note_sample("Greedy", ["c"], is_last=True)
    journal.close()
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().out.splitlines()]
    lines = [line for line in lines if line.strip() and "Steps" not in line]
    assert lines[0].startswith("Before training: Train loss")
    assert lines[1] == "Before training: a b"
    assert lines[-4].startswith("step 40: train loss")
    assert lines[-3].startswith("Ep 40 (End Epoch)")
    assert lines[-2:] == ["After epoch 40: a b", "Greedy: c"]
    assert len(lines) <= 20 / 2 + 6  # 20 s, and what is kept
    for number, line in enumerate(lines):  # with an epoch's losses comes what the model wrote
        if line.startswith("Ep "):
            assert lines[number + 1].startswith(f"After epoch {line.split()[1]}: ")
