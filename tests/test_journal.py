"""What a journal counts, prints and keeps, and how it comes back from a checkpoint."""

import itertools
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

import visualize
from engine import console
from engine.errors import NumericsError, ResourceError
from engine.metrics import TokenSize
from storage.files import PATIENCE_S
from storage.tracking import Trackers
from tests.resuming import rows_of
from training.journal import FETCH_EVERY, LAST_MOMENTS, MOST_MOMENTS, PICTURE, History, Journal

GOOD, NAN, INF = 1.0, math.nan, math.inf


@pytest.fixture(autouse=True)
def drawn(tmp_path, monkeypatch):
    """What pictures were made of; drawing them takes longer than all the rest."""
    monkeypatch.chdir(tmp_path)  # the picture goes into the working directory too
    drawn = []
    monkeypatch.setattr(
        "training.journal.render_losses", lambda **run: drawn.append(run) or b"a picture"
    )
    return drawn


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


def come_back(journal: Journal, **fields) -> Journal:
    """A journal that goes on from the state of another, as JSON gives it back."""
    state = json.loads(json.dumps(journal.state(), allow_nan=False))
    again = new_journal(journal.folder, **fields)
    again.restore(state)
    return again


def speeds_of(folder) -> list[float]:
    return [row["train/tok_per_sec"] for row in rows_of(folder) if "train/tok_per_sec" in row]


def test_losses_are_fetched_together_and_returned_once(tmp_path):
    journal = new_journal(tmp_path)
    for number in range(1, FETCH_EVERY):
        assert journal.step(number, torch.tensor(1.0), torch.tensor(0.5), 16, 0.1) == []
    assert journal.history.batch_losses == []
    assert not (tmp_path / "metrics.jsonl").exists()
    loss = torch.tensor(2.0, dtype=torch.bfloat16)
    rows = journal.step(FETCH_EVERY, loss, torch.tensor(0.25), 8, 0.2)
    step(journal, 8.0)
    rows += journal.pause() + journal.fetch()
    assert journal.history.batch_losses == [*[1.0] * (FETCH_EVERY - 1), 2.0, 8.0]
    names = ("step", "train/loss", "train/grad_norm", "train/lr", "train/tokens")
    expected = [(n, 1.0, 0.5, 0.1, 16 * n) for n in range(1, FETCH_EVERY)]
    expected += [(FETCH_EVERY, 2.0, 0.25, 0.2, 16 * FETCH_EVERY - 8)]
    expected += [(FETCH_EVERY + 1, 8.0, 1.0, 0.01, 16 * FETCH_EVERY + 8)]
    assert rows == rows_of(tmp_path) == [dict(zip(names, row, strict=True)) for row in expected]


def test_log_every_prints_loss_pace_and_time_left_of_every_nth_step_by_this_process(clock, capsys):
    for log_every, logged in ((0, []), (1, [1, 2, 3]), (2, [2]), (4, [])):
        journal = new_journal(total_steps=10, log_every=log_every)
        for number in (1, 2, 3):
            clock.now += 0.5
            step(journal, 1 / number, n_tokens=640)
        left = {1: "0m 4.5s", 2: "0m 4.0s", 3: "0m 3.5s"}
        assert capsys.readouterr().out.splitlines() == [
            f"step {number}: batch loss {1 / number:.4f}, 1,280 tokens/s, {left[number]} left"
            for number in logged
        ]
    again = come_back(journal, total_steps=10, log_every=1)
    clock.now += 2
    step(again)
    assert capsys.readouterr().out.endswith("0m 12.0s left\n")  # 6 steps of 2 s


def test_bad_numbers_are_null_in_the_log_and_bad_evaluations_stop_the_run(tmp_path, drawn):
    journal = new_journal(tmp_path, log_every=2)
    pairs = [(GOOD, GOOD), (NAN, NAN), (INF, NAN), (-INF, GOOD), (GOOD, INF), (GOOD, NAN)]
    for loss, norm in pairs:
        step(journal, loss, norm)
    names = ("step", "train/loss", "train/grad_norm")
    assert [[row[name] for name in names] for row in rows_of(tmp_path)] == [
        [number, *(x if math.isfinite(x) else None for x in pair)]
        for number, pair in enumerate(pairs, start=1)
    ]
    for train_loss, val_loss in ((NAN, GOOD), (GOOD, NAN), (GOOD, INF)):
        journal = new_journal(tmp_path)
        step(journal)
        with pytest.raises(NumericsError, match=f"after step 1 the training loss is {train_loss}"):
            evaluate(journal, train_loss, val_loss)
        assert journal.history.steps == drawn == []
        row = rows_of(tmp_path)[-1]  # for the report
        assert (row["step"], row["val/loss"]) == (1, val_loss if val_loss == GOOD else None)


def test_the_lines_and_rows_of_evaluations_are_those_of_the_public_format(clock, capsys, tmp_path):
    journal = new_journal(tmp_path, token_size=TokenSize(characters=2.0, bytes=5.0))
    evaluate(journal, 2.0, 2.1)
    step(journal, n_tokens=1_658_544)
    for _ in range(99):
        step(journal, n_tokens=0)
    clock.now += 15.8
    evaluate(journal, 5.7529, 5.8782, epoch=3)
    assert capsys.readouterr().out.splitlines() == [
        "Before training: Train loss 2.000, Val loss 2.100",
        "step 100: train loss 5.7529, val loss 5.8782, speed: 104971.14 tokens/sec, time: 0m 15.8s",
        "Ep 3 (End Epoch): Train loss 5.753, Val loss 5.878",
    ]
    bits = 5.8782 / math.log(2)
    first, *_, last = rows_of(tmp_path)
    assert last == {
        "step": 100,
        "eval/train_loss": 5.7529,
        "val/loss": 5.8782,
        "val/perplexity": pytest.approx(math.exp(5.8782)),
        "val/bits_per_character": pytest.approx(bits / 2),
        "val/bits_per_byte": pytest.approx(bits / 5),
        "train/tok_per_sec": pytest.approx(104971.1392),
    }
    assert last.keys() - first.keys() == {"train/tok_per_sec"}
    rows = []
    tracker = SimpleNamespace(log=lambda step, values: rows.append({"step": step} | values))
    journal.trackers = Trackers([tracker])
    journal.token_size = None  # no text, so no bits
    step(journal)
    evaluate(journal)
    assert rows == rows_of(tmp_path)[-2:]
    assert not any("bits" in name for name in rows[-1])


def test_speed_leaves_out_the_time_of_evaluations_and_saves(clock, tmp_path):
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
    clock.now += 10
    step(journal, n_tokens=1000)
    again = come_back(journal)
    clock.now += 7  # loading, say
    evaluate(again)  # made up for: its speed is that of its own steps
    clock.now += 10
    step(again, n_tokens=500)
    evaluate(again)
    assert speeds_of(tmp_path)[2:] == pytest.approx([100.0, 50.0])


def test_a_step_in_which_the_machine_slept_is_no_time_of_the_run_but_slow_ones_are(clock):
    journal = new_journal()

    def take(step_s: float) -> float:
        clock.now += step_s
        step(journal)
        return journal.leave_out_pause()

    assert not any(map(take, (300.0, 1.0, 1.0, 1.0, 100.0, 1.0)))  # compiled first, waited for once
    clock.now += 500.0
    journal.spent.note("evaluation", 500.0)
    assert not any(map(take, [1.0] * 300))
    before_s = journal.elapsed_s
    assert take(36_000.0) == pytest.approx(36_000.0)
    assert not take(1.0) and take(3600.0) == pytest.approx(3600.0)
    assert before_s + 1 < journal.elapsed_s < before_s + 10
    # a machine that has become slow takes its time
    before_s = journal.elapsed_s
    assert [take(200.0) > 0 for _ in range(5)] == [False] * 5  # the pause was before
    assert journal.elapsed_s == pytest.approx(before_s + 1000.0)
    journal = come_back(journal)
    assert not take(200.0)
    journal = new_journal()
    taken = [take(step_s) > 0 for step_s in [1.0] * 9 + [200.0] * 5]
    assert taken == [False] * 9 + [True] + [False] * 4


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


def samples_in(folder) -> str:
    return (folder / "samples.md").read_bytes().decode("utf-8")


def test_samples_md_has_a_section_a_moment_with_its_step_and_a_quote_a_prompt(tmp_path, capsys):
    journal = new_journal(tmp_path)
    evaluate(journal, val_loss=7.0)
    journal.note_sample("Before training", ["# no\n\n<b>heading</b>", "往事"])
    step(journal)
    evaluate(journal, val_loss=6.25)
    capsys.readouterr()
    # the first ends in half a pair, as bytes may decode
    texts = ["春江\ud800", "a\x1b[31m\tb\r\n\nc\x00\x07\x9b\u202e\u2067d\u2028e\x7f\u3000f  春"]
    journal.note_sample("After epoch 1", texts)
    assert capsys.readouterr().out == (
        "After epoch 1, prompt 1: 春江\nAfter epoch 1, prompt 2: a [31m b c d e f 春\n"
    )
    assert journal.history.samples[-1] == ("After epoch 1", 1, texts)
    assert samples_in(tmp_path) == (
        "# What the model writes\n\n"
        "## Before training\n\nStep 0, validation loss 7.000\n\n"
        "Prompt 1:\n\n    # no\n    \n    <b>heading</b>\n\nPrompt 2:\n\n    往事\n\n"
        "## After epoch 1\n\nStep 1, validation loss 6.250\n\n"
        "Prompt 1:\n\n    春江?\n\nPrompt 2:\n\n    a\ufffd[31m\tb\n    \n"
        "    c\ufffd\ufffd\ufffd\ufffd\ufffdd\n    e\ufffd\u3000f  春\n"
    )
    journal.weights_of_step = 0  # those of the best weights
    journal.note_sample("Greedy", ["abc"])
    assert samples_in(tmp_path).endswith("## Greedy\n\nStep 0, validation loss 7.000\n\n    abc\n")


def note_epochs(journal: Journal, first: int, last: int) -> None:
    for epoch in range(first, last + 1):
        step(journal)
        journal.note_sample(f"After epoch {epoch}", [f"text {epoch}"])


def test_of_many_moments_the_first_the_last_and_evenly_spread_ones_are_kept(tmp_path):
    journal = new_journal()
    journal.note_sample("Before training", ["text 0"])
    note_epochs(journal, 1, 999)
    journal.folder = tmp_path
    note_epochs(journal, 1000, 1000)
    kept = [moment.step for moment in journal.history.samples]
    assert len(kept) == samples_in(tmp_path).count("\n## ") == MOST_MOMENTS
    assert kept[0] == 0
    assert kept[-LAST_MOMENTS:] == list(range(1001 - LAST_MOMENTS, 1001))
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert min(gaps) > 0 and max(gaps) <= 2 * kept[-LAST_MOMENTS] / (MOST_MOMENTS - LAST_MOMENTS)
    assert len(json.dumps(journal.state()["history"]["samples"])) < 60 * MOST_MOMENTS
    for stop in (1, MOST_MOMENTS - 1, MOST_MOMENTS, 137):
        whole, stopped = new_journal(), new_journal()
        note_epochs(whole, 1, 200)
        note_epochs(stopped, 1, stop)
        again = come_back(stopped)
        note_epochs(again, stop + 1, 200)
        assert again.history.samples == whole.history.samples


def test_an_evaluation_draws_the_picture_of_all_losses_with_a_star_at_the_best_one(
    tmp_path, monkeypatch, drawn
):
    (folder := tmp_path / "run").mkdir()
    journal = new_journal(folder)
    evaluate(journal, val_loss=0.1)
    assert drawn == []  # one point is no curve
    for val_loss in (2.5, 3.0):
        step(journal)
        evaluate(journal, val_loss=val_loss)
    assert drawn[-1]["best"] == 1  # fresh weights are no result, however lucky
    monkeypatch.setattr("training.journal.render_losses", visualize.render_losses)
    for losses in ([2.0, NAN, INF, 1.0] * 6, [NAN] * 24):  # those that the log has lost, too
        journal.history.batch_losses = losses
        assert journal.draw()
        assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert (folder / PICTURE).read_bytes() == (tmp_path / PICTURE).read_bytes()


def test_a_journal_without_a_folder_writes_nothing_and_knows_what_came_since(tmp_path):
    journal = new_journal()
    assert (journal.has_evaluated(), journal.steps_since_sample) == (False, 0)
    evaluate(journal)
    assert journal.has_evaluated()
    step(journal)
    assert (journal.has_evaluated(), journal.steps_since_sample) == (False, 1)
    journal.note_sample("After epoch 1", ["a"])
    assert journal.steps_since_sample == 0
    step(journal)
    step(journal)
    assert journal.steps_since_sample == 2
    assert journal.state()["metrics_bytes"] == 0
    assert list(tmp_path.iterdir()) == []


def two_rounds(journal: Journal) -> None:
    for _ in range(2):
        step(journal)
        evaluate(journal)
        journal.note_sample("After epoch 1", ["abc"])
        journal.state()  # as for a checkpoint


def notes_in(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("Note")]


FILES = ("metrics.jsonl", "samples.md", PICTURE, f"../{PICTURE}")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_disk_refuses_is_said_once_and_the_others_are_written(
    name, tmp_path, capsys
):
    (folder := tmp_path / "run").mkdir()
    (folder / name).mkdir()
    journal = new_journal(folder)
    two_rounds(journal)
    (note,) = notes_in(capsys.readouterr().out)
    assert name.rpartition("/")[2] in note
    assert "Training goes on" in note
    assert journal.history.steps == [1, 2]
    assert all((folder / other).is_file() for other in FILES if other != name)
    assert journal.draw()  # one place is enough


def test_a_picture_that_is_refused_is_waited_for_once_and_none_said_once(
    tmp_path, monkeypatch, capsys
):
    waited = []

    def refuse(path, content, patience_s) -> None:
        waited.append(patience_s)
        raise ResourceError("a viewer has it open.\nClose it.")

    journal = new_journal(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("training.journal.write_atomically", refuse)
        for _ in range(3):
            step(journal)
            evaluate(journal)
        assert not journal.draw()
    assert waited == [PATIENCE_S] * 2 + [0.0] * 6  # in the folder, and in the working directory
    assert notes_in(capsys.readouterr().out) == ["Note: a viewer has it open. Training goes on"]
    assert journal.draw()
    monkeypatch.setattr("training.journal.render_losses", lambda **_: None)
    assert not journal.draw() and not journal.draw()
    assert notes_in(capsys.readouterr().out) == [
        "Note: matplotlib is not installed: no picture (pip install matplotlib)"
    ]


def test_a_journal_comes_back_from_its_state_as_it_was(tmp_path, clock):
    journal = new_journal(tmp_path, token_size=TokenSize(1.5, 3.0))
    evaluate(journal, 2.0794, 0.1 + 0.2)  # a number that no short text holds
    journal.note_sample("Before training", ["春\n江", "往事"])
    for loss in (1 / 3, 2.0, NAN, 0.1, 5e-324):
        step(journal, loss, n_tokens=7)
    evaluate(journal, 1 / 7, 1.0, epoch=1)
    clock.now += 30
    again = come_back(journal)
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
    last = rows_of(tmp_path)[-1]
    assert (last["step"], last["train/tokens"]) == (6, 42)


DAMAGE = {  # of the log of three steps -> those whose losses are still known
    "gone": (lambda *_: None, []),
    "empty": (lambda *_: b"", []),
    "a line short": (lambda a, b, c: a + b, [1, 2]),
    "half a line short": (lambda a, b, c: a + b + c[:-9], [1, 2]),
    "no JSON": (lambda a, b, c: a + b"\xff{".ljust(len(b) - 1) + b"\n" + c, [1, 3]),
    "other JSON": (lambda a, b, c: a + b"[7]".ljust(len(b) - 1) + b"\n" + c, [1, 3]),
    "no such step": (lambda a, b, c: a + b.replace(b": 2,", b": 9,") + c, [1, 3]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_losses_that_the_log_has_lost_are_nan_and_the_run_goes_on(damage, tmp_path, capsys):
    path, (spoil, known) = tmp_path / "metrics.jsonl", DAMAGE[damage]
    journal = new_journal(tmp_path)
    for loss in (1.0, 2.0, 3.0):
        step(journal, loss)
    state = json.loads(json.dumps(journal.state()))
    content = spoil(*path.read_bytes().splitlines(keepends=True))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    again = new_journal(tmp_path)
    again.restore(state)
    assert again.steps == 3
    for number, loss in enumerate(again.history.batch_losses, start=1):
        assert loss == number if number in known else math.isnan(loss)
    step(again)
    evaluate(again)
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()[-2:]] == [4, 4]
    assert notes_in(capsys.readouterr().out) == []


def test_a_notebook_gets_the_ends_of_a_run_and_whole_moments_between(kernel, monkeypatch, capsys):
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
