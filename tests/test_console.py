"""Lines and bars on consoles of every kind: narrow encodings, log files, terminals, no tqdm."""

import contextlib
import io
import os
import re
import sys
import time
from types import ModuleType

import pytest

from engine import console
from engine.console import Progress, RunBar, complain, count_off, report, say, tell, track


class Console(io.TextIOWrapper):
    """A strict text stream that remembers its bytes."""

    def __init__(self, encoding: str, *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def shown(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def consoles(monkeypatch):
    """Put consoles in the place of standard output and error."""

    def put(encoding: str, *, terminal: bool = False) -> tuple[Console, Console]:
        out, err = Console(encoding, terminal=terminal), Console(encoding, terminal=terminal)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return put


@pytest.fixture(params=[True, False], ids=["tqdm", "no tqdm"])
def with_tqdm(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setitem(sys.modules, "tqdm", None)  # importing it is an ImportError
    return request.param


def test_a_console_is_shown_what_it_has_a_code_for_and_no_control_character(
    with_tqdm, consoles, monkeypatch
):
    hostile = "a\x1b[2Jb\r\x07\x00\x7f\x9b3mc\td\ne\xa0é"
    plain = "a[2Jb3mc\td\ne\xa0é\n"  # newline and tab stay
    for terminal in (True, False):
        for encoding, shown in (
            ("ascii", "? caf? ?? a?b"),
            ("cp1252", "? café ?? a?b"),
            ("gbk", "? café 春江 a?b"),
            ("utf-8", "✓ café 春江 a?b"),
        ):
            out, _ = consoles(encoding, terminal=terminal)
            say("✓ café 春江 a\ud800b")
            say()
            assert out.shown() == f"{shown}\n\n"
        out, err = consoles("utf-8", terminal=terminal)
        say(hostile)
        assert out.shown() == plain
        tell(hostile)
        assert err.shown() == plain
        complain(hostile)
        assert err.shown() == f"{plain}\n{plain}"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # which has no encoding
    say("✓ 春江")
    assert sys.stdout.getvalue() == "✓ 春江\n"


def test_use_utf8_lets_every_character_through(consoles):
    out, err = consoles("ascii")
    console.use_utf8()
    print("✓ 春江")
    print("✓ 春江", file=sys.stderr)
    assert out.shown() == err.shown() == "✓ 春江\n"


def test_without_a_terminal_the_bar_is_drawn_once_at_the_end_and_without_tqdm_as_a_count(
    consoles, monkeypatch
):
    for encoding, full in (("utf-8", "█"), ("ascii", "#"), ("cp1252", "#")):
        out, err = consoles(encoding)
        for _ in track(range(9), 9, "Epoch 1"):
            assert err.shown() == ""
        assert err.shown() == f"Epoch 1: 100%|{full * 30}| 9/9\n"
        assert out.shown() == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for terminal, first in ((True, 0), (False, 0), (False, 6)):  # 6: of work that goes on
        out, err = consoles("ascii", terminal=terminal)
        assert list(track(iter("abc"), first + 3, "Epoch 1", first)) == ["a", "b", "c"]
        assert (out.shown(), err.shown()) == ("", f"Epoch 1: {first + 3}/{first + 3}\n")


def test_on_a_terminal_the_bar_moves_from_where_it_was_and_ends_full(consoles):
    for first, begun in ((0, r"   0%\|.*0/9"), (6, r"  67%\|.*6/9")):
        out, err = consoles("utf-8", terminal=True)
        seen = []
        for item in track(range(first, 9), 9, "Epoch 1", first):
            seen.append(err.shown())
            say(f"step {item}")
        assert re.search(f"Epoch 1:{begun}", seen[0])
        assert re.search(r"100%\|.*9/9", err.shown())
        assert out.shown() == "".join(f"step {item}\n" for item in range(first, 9))


def test_below_a_bar_lines_reach_a_pipe_at_once_and_a_closed_one_ends_nothing(
    consoles, monkeypatch
):
    _, err = consoles("utf-8", terminal=True)
    reader, writer = os.pipe()
    pipe = open(writer, "w", encoding="utf-8")  # noqa: SIM115  # as `main.py | tee` at a terminal
    monkeypatch.setattr(sys, "stdout", pipe)
    for item in track(range(3), 3, "Epoch 1"):
        say(f"step {item}")
        if item == 0:
            assert os.read(reader, 100) == b"step 0\n"
            os.close(reader)
    with contextlib.suppress(BrokenPipeError):
        pipe.close()
    assert re.search(r"100%\|.*3/3", err.shown())


@pytest.mark.parametrize("leave_by", ["break", "error in the loop", "error in the steps"])
@pytest.mark.parametrize("first", [0, 2])  # of work that goes on
def test_a_bar_left_early_shows_the_true_count(leave_by, first, with_tqdm, consoles):
    _, err = consoles("utf-8")

    def steps():
        for item in range(first, 9):
            if item == 4 and leave_by == "error in the steps":
                raise ValueError
            yield item

    with contextlib.suppress(ValueError):
        for item in track(steps(), 9, "Epoch 1", first):
            if item == 4 and leave_by == "break":
                break
            if item == 4:
                raise ValueError
    assert err.shown().endswith("4/9\n")
    assert ("44%" in err.shown()) == with_tqdm
    assert err.shown().count("\n") == 1


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand, and a notebook that has printed nothing yet."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(console, "_next_report_at", 0.0)
    return Clock


def test_a_program_and_a_terminals_ipython_are_no_kernel(monkeypatch, kernel):
    assert console.in_kernel()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: object())
    assert not console.in_kernel()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not console.in_kernel()


def test_a_notebook_gets_a_line_on_progress_every_two_seconds_on_average(kernel, clock, capsys):
    lines = 0
    for tenth in range(1000):
        clock.now = 100 + tenth / 10
        lines += 3 * report("a", "b", "c") + report("d")
    assert capsys.readouterr().out.count("\n") == lines
    assert 45 <= lines <= 53
    clock.now += 60
    assert report("a") and report("b", "c", keep=True)  # which make others wait longer
    clock.now += 5.9
    assert not report("d")
    clock.now += 0.2
    assert report("e")
    assert capsys.readouterr().out == "a\nb\nc\ne\n"


def test_outside_of_notebooks_every_line_is_printed_and_no_such_bar_drawn(clock, capsys, consoles):
    assert all(report(str(number)) for number in range(50))
    assert capsys.readouterr().out.count("\n") == 50
    for terminal in (True, False):
        out, err = consoles("utf-8", terminal=terminal)
        bar = RunBar(2)
        bar.show(1)
        bar.close()
        assert out.shown() == err.shown() == ""


def test_in_a_notebook_one_bar_with_the_time_left_stands_for_all_epochs(kernel, clock, consoles):
    out, err = consoles("utf-8")
    bar, done = RunBar(8), 3  # of a run that goes on
    for epoch in range(2):
        for _ in track(range(2), 2, f"Epoch {epoch + 1}"):
            done += 1
            bar.show(done)
        say(f"line {epoch}")
    bar.close()
    drawn = out.shown()
    assert err.shown() == "" and "Epoch" not in drawn
    assert re.search(r"Steps:  50%\|.*4/8 \[\d\d:\d\d<", drawn)
    assert re.search(r"7/8 \[\d\d:\d\d<\d\d:\d\d[^\n]*\n$", drawn)
    # nothing of a bar stays in front of a line
    shown = [line.rpartition("\r")[2] for line in drawn.split("\n")]
    assert shown[:2] == ["line 0", "line 1"]
    assert len(drawn.split("\r")) < 16


def test_a_notebooks_bar_goes_on_with_another_number_of_steps(kernel, clock, consoles):
    out, _ = consoles("utf-8")
    bar = RunBar(8)
    bar.change_total(9)
    bar.show(2)
    bar.change_total(4)
    bar.show(4)
    bar.close()
    drawn = out.shown()
    assert "2/9" in drawn and re.search(r"Steps: 100%\|[^\n]*4/4 [^\n]*\n$", drawn)


def test_without_tqdm_a_notebook_has_lines_and_no_bar(kernel, consoles, monkeypatch, clock):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    out, err = consoles("utf-8")
    bar = RunBar(2)
    bar.show(1)
    say("line")
    bar.close()
    with Progress("Reading", 10) as progress:
        progress.show(5)
    assert (out.shown(), err.shown()) == ("line\n", "")


def test_work_that_takes_long_has_a_bar_where_bars_move_alone(consoles, monkeypatch):
    from tqdm import tqdm

    # shown at once, not after a second
    monkeypatch.setattr(console, "_tqdm", lambda: lambda **options: tqdm(**options | {"delay": 0}))
    for terminal in (True, False):
        out, err = consoles("utf-8", terminal=terminal)
        seen = [err.shown() for _ in count_off("abc", 3, "Evaluating")]
        assert (len(seen), out.shown()) == (3, "")
        assert ("Evaluating:   0%" in seen[0]) == terminal == bool(err.shown())


def test_a_picture_is_shown_in_a_notebook_alone(kernel, monkeypatch, tmp_path):
    shown = []
    display = ModuleType("IPython.display")
    display.Image, display.display = (lambda data: data), shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    picture = tmp_path / "picture.png"
    console.show_picture(picture)  # none was drawn
    picture.write_bytes(b"PNG")
    console.show_picture(picture)
    monkeypatch.delitem(sys.modules, "IPython")
    console.show_picture(picture)
    assert shown == [b"PNG"]
