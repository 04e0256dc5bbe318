"""The conversation in a terminal: turns, commands, Ctrl-C, and what reaches the screen."""

import dataclasses
import io
import os
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from generation import SamplingConfig, stream_text
from scripts import chat
from scripts.options import run_program
from tests import by_heart
from tests.by_heart import CONTEXT, ON_POSIX, SHOWN, Done, Terminal
from tests.launching import Program, wait_until

HOT = ("--temperature", "5", "--top-k", "none", "--top-p", "none", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return by_heart.tiny_run(tmp_path_factory)


@pytest.fixture
def talk(tiny_run, monkeypatch, capsys, tmp_path):
    """Hold a conversation in this process: what is typed, line by line, in an empty folder."""

    def call(*lines: str, options: tuple[str, ...] = (), stdin: io.TextIOBase | None = None):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["chat", "--run", str(tiny_run), *options])
        typed = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        stdin = stdin or io.TextIOWrapper(io.BytesIO(typed), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as exit:
            run_program(chat.main)
        return Done(exit.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def drawn(monkeypatch) -> list[dict]:
    """What goes to the model for each answer: the prompt, the options, the seed; and the answer."""
    calls = []

    def spy(model, tokenizer, prompts, **options):
        (prompt,) = prompts
        seed = options["generator"].initial_seed()
        calls.append(options | {"prompt": prompt, "seed": seed, "answer": ""})
        for piece in stream_text(model, tokenizer, prompts, **options):
            calls[-1]["answer"] += piece.text
            yield piece

    monkeypatch.setattr(chat, "stream_text", spy)
    return calls


def remarks(done: Done) -> list[str]:
    """The lines beside the answers, without the four of the beginning."""
    return done.err.splitlines()[4:]


@pytest.mark.slow
def test_answers_are_all_of_standard_output_below_what_tells_who_talks(talk, drawn, tiny_run):
    done = talk("The ferry", "", "   ", "啦la 啦la", options=("--max-new-tokens", "8", "--seed=5"))
    first, second = (call["answer"] for call in drawn)
    assert (done.code, done.out) == (0, f"{first}\n{second}\n")
    assert first == " crossed" and len(second) <= 8
    assert remarks(done) == []
    place, kind, length, commands = done.err.splitlines()
    assert re.fullmatch(rf"{re.escape(str(tiny_run))}, step 180, \w+ weights on cpu, seed 5", place)
    assert "a base model and no assistant: it continues the text" in kind
    assert f"{CONTEXT} tokens" in length
    assert all(command in commands for command in ("/retry", "/reset", "/set", "/save", "/help"))


def test_an_answer_ends_at_the_end_of_text_or_a_stop_string_and_may_have_no_text(talk):
    assert "The ferry" + talk("The ferry").out == SHOWN + "\n"
    done = talk("The ferry", options=("--stop", "海", "--stop", "平"))
    assert done.out == " crossed.\n春江潮水连\n"
    done = talk("The ferry", options=("--stop", " cross"))
    assert done.out == "\n"
    assert "/retry draws again" in done.err


def test_turns_are_joined_with_blank_lines_in_whole_characters(talk, drawn, monkeypatch):
    talk("The", "二", " /set is text", options=("--max-new-tokens", "2"))
    first, second, third = drawn
    assert first["prompt"] == "The"
    assert second["prompt"] == f"The{first['answer']}".rstrip() + "\n\n二"
    assert third["prompt"] == f"{second['prompt']}{second['answer']}".rstrip() + "\n\n /set is text"
    drawn.clear()
    one = ("--max-new-tokens", "1")
    talk("The ferry crossed.", "A", options=one)  # blank lines between turns stay single
    talk("caf\udce9", "春江", options=one)
    lines = iter(["a\ud83d", "/quit"])
    monkeypatch.setattr("builtins.input", lambda mark: next(lines))
    talk(stdin=Terminal(), options=one)  # from a console
    _, joined, latin, poem, half = (call["prompt"] for call in drawn)
    assert joined == "The ferry crossed.\n\nA"
    assert (latin, half) == ("caf\ufffd", "a\ufffd")
    assert poem.endswith("\n\n春江")


def test_the_oldest_turns_make_room_for_the_answer_up_to_half_of_the_context(talk, drawn):
    lines = [f"turn {i}" for i in range(9)]
    talk(*lines, options=("--max-new-tokens", "6", "--stop", "\x00"))
    turns = [f"{line}{call['answer']}".rstrip() for line, call in zip(lines, drawn, strict=True)]
    for i, call in enumerate(drawn):
        first = turns.index(call["prompt"].split("\n\n")[0]) if "\n\n" in call["prompt"] else i
        assert call["prompt"] == "\n\n".join([*turns[first:i], lines[i]])
        assert len(call["prompt"]) <= CONTEXT - 6
        assert first == 0 or len("\n\n".join([*turns[first - 1 : i], lines[i]])) > CONTEXT - 6
    assert 0 < len(drawn[-1]["prompt"].split("\n\n")) < 9
    drawn.clear()
    turn, fits = "The ferry crossed", "12345"
    assert len(f"{turn}\n\n{fits}") == CONTEXT // 2
    talk(turn, fits, "/reset", turn, fits + "6", options=("--max-new-tokens", "999", "--stop", "."))
    assert [call["prompt"] for call in drawn] == [turn, f"{turn}\n\n{fits}", turn, fits + "6"]


def test_a_turn_that_is_longer_than_the_context_is_answered(talk, drawn):
    # the model sees its newest half-context alone, which it has by heart
    done = talk("x" * 1000 + "啦la " * 9 + "啦", "short", options=("--max-new-tokens", "6"))
    assert len("啦la " * 9) >= CONTEXT // 2
    assert done.out.startswith("la 啦la\n")
    assert drawn[1]["prompt"] == "short"


def test_retry_draws_the_last_answer_again_with_another_seed(talk, drawn):
    lines = ("The", "A", "/retry", "B")
    done = talk(*lines, options=(*HOT, "--seed", "4"))
    _, second, again, third = drawn
    assert [call["seed"] for call in drawn] == [4, 5, 6, 7]
    assert second["prompt"] == again["prompt"]
    assert second["answer"] != again["answer"]
    assert f"A{again['answer']}".rstrip() in third["prompt"]
    assert f"A{second['answer']}".rstrip() not in third["prompt"]
    assert talk(*lines, options=(*HOT, "--seed", "4")).out == done.out
    assert talk(*lines, options=(*HOT, "--seed", "9")).out != done.out


def test_reset_forgets_all_that_was_said(talk, drawn):
    done = talk("The", "/reset", "A", "/reset", "/retry", options=("--max-new-tokens", "2"))
    assert [call["prompt"] for call in drawn] == ["The", "A"]
    assert remarks(done) == ["forgotten", "forgotten", "there is no answer yet"]


def test_set_changes_what_it_names_for_the_next_answer(talk, drawn):
    lines = ("A", "/set temperature=0.5 top_k=none max-new-tokens = 3", "B", "/set top_k = 7", "C")
    done = talk(*lines)
    before, after, last = drawn
    changed = {"temperature": 0.5, "top_k": None, "max_new_tokens": 3}
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    assert {n: after[n] for n in names} == {n: before[n] for n in names} | changed
    assert (last["temperature"], last["top_k"]) == (0.5, 7)
    assert remarks(done) == ["temperature = 0.5", "top_k = none", "max_new_tokens = 3", "top_k = 7"]


def test_a_wrong_set_is_told_and_changes_nothing(talk):
    wrong = {
        "temprature=1 top_k=5": 'temprature is unknown; did you mean "temperature"?',
        "top_k=0 temperature=warm": "temperature is 'warm'",
        "temperature=none top_k=5": "temperature is None",
        "max_new_tokens=2.5": "max_new_tokens is 2.5 (float); it must be a whole number",
        "top_k=5 temperature": "temperature is ''",
        "top_k=5 =3": "top_k is '5=3'",
        "top_k=5 run=x": "run is unknown",
    }
    done = talk(*(f"/set {values}" for values in wrong), "/set", options=("--top-p", "none"))
    errors, settings = "\n".join(remarks(done)[:-7]), dict.fromkeys(remarks(done)[-7:])
    assert all(said in errors for said in (*wrong.values(), "top_k is 0"))
    own = dataclasses.asdict(SamplingConfig(max_new_tokens=100, temperature=0.0, top_p=None))
    assert [*settings] == [f"{name} = {value}".lower() for name, value in own.items()]


def test_save_writes_the_conversation_as_it_was_and_never_over_a_file(talk, tmp_path):
    done = talk(
        *("/save early.md", "The ferry", "/save my talk.md", "二", "/save my talk.md", "/save"),
        *("/save no/such/folder/x.md", "/save ."),
        options=("--max-new-tokens", "6"),
    )
    (named,) = tmp_path.glob("chat-*.md")
    early, saved, again, by_date, nowhere, *_, folder = remarks(done)
    assert early == "there is nothing to save yet"
    assert saved == "saved to my talk.md"
    assert again == "my talk.md is there already; name another file"
    assert by_date == f"saved to {named.name}"
    assert nowhere.startswith("can't write")
    assert folder.startswith(". is there already")
    text = (tmp_path / "my talk.md").read_text(encoding="utf-8")
    assert text == "# tiny, step 180\n\n> The ferry\n\n cross\n"
    assert "\n\n> 二\n\n" in named.read_text(encoding="utf-8")
    assert not (tmp_path / "early.md").exists()
    talk("The ferry", "/save talk.md")  # without the control characters of the answer
    text = (tmp_path / "talk.md").read_text(encoding="utf-8")
    assert text == f"# tiny, step 180\n\n> The ferry\n\n{SHOWN.removeprefix('The ferry')}\n"


def test_help_tells_every_command_and_an_unknown_one_the_nearest(talk):
    done = talk("/help", "/rest", "/usr/bin", "/quit", "The ferry")
    *lines, near, unknown = remarks(done)
    for command in ("/retry", "/reset", "/set", "/save", "/help", "/quit"):
        assert any(line.startswith(f"{command} ") for line in lines)
    assert near == '/rest is unknown; did you mean "/reset"?'
    assert unknown.startswith("/usr/bin is unknown; known are: /help, /quit")
    assert (done.code, done.out) == (0, "")


def test_ctrl_c_ends_an_answer_whose_part_stays_in_the_history(talk, monkeypatch):
    prompts = []

    def interrupted(model, tokenizer, given, **options):
        prompts.append(given[0])
        for i, piece in enumerate(stream_text(model, tokenizer, given, **options)):
            if i == 5 and len(prompts) == 1:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(chat, "stream_text", interrupted)
    done = talk("The ferry", "on", options=("--max-new-tokens", "9"))
    assert done.code == 0
    assert done.out.startswith(" cros\n")
    assert remarks(done) == ["", "(stopped)"]
    assert prompts[1] == "The ferry cros\n\non"


@pytest.mark.parametrize(
    ("events", "answers", "hints"),
    [
        ([KeyboardInterrupt, KeyboardInterrupt, "The ferry"], 0, 1),
        ([KeyboardInterrupt, "The ferry", KeyboardInterrupt, "A", EOFError], 2, 2),
        (["The ferry", EOFError, "A"], 1, 0),
    ],
)
def test_two_ctrl_c_in_a_row_at_the_prompt_end_it_and_one_says_how(
    talk, drawn, monkeypatch, events, answers, hints
):
    coming = iter(events)

    def read(mark: str) -> str:
        event = next(coming)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("builtins.input", read)
    done = talk(stdin=Terminal(), options=("--max-new-tokens", "1"))
    assert (done.code, len(drawn)) == (0, answers)
    assert done.err.count("/quit, ends the conversation") == hints


class Screen:
    """The program in a terminal of its own, and what it has shown there."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._ours, self._theirs = os.openpty()
        first = f"os.login_tty(os.open({os.ttyname(self._theirs)!r}, os.O_RDWR))"
        code = by_heart.program("chat", *arguments, first=first)
        self.program = Program(folder, 0, code, env={"TERM": "dumb"})
        self._shown = b""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def press_ctrl_c_at_the_mark(self) -> None:
        self.wait_for("> ")
        self.type("x")  # readline shows the mark before it listens, and this when it does
        self.wait_for("x")
        if sys.platform == "linux":
            stat = Path(f"/proc/{self.program.pid}/stat")
            wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")
        else:
            time.sleep(0.2)
        self.type("\x03")

    def wait_for(self, text: str) -> str:
        """What was shown since the last call, up to this text and with it."""
        while text.encode() not in self._shown:
            ready, _, _ = select.select([self._ours], [], [], 60)
            assert ready, f"{text!r} did not come, but {self._shown!r}; {self.program.err}"
            self._shown += os.read(self._ours, 65536)
        before, _, self._shown = self._shown.partition(text.encode())
        return before.decode(errors="replace") + text

    def close(self) -> None:
        if self.program.process.poll() is None:
            self.program.send(signal.SIGKILL)
        os.close(self._ours)
        os.close(self._theirs)


@pytest.mark.slow
@ON_POSIX
def test_ctrl_c_in_a_real_terminal_ends_the_answer_and_then_the_program(tiny_run, tmp_path):
    options = ("--weights", "fp32", "--max-new-tokens", "100000")
    screen = Screen(tmp_path, "--run", str(tiny_run), *options)
    try:
        screen.wait_for("> ")
        screen.type("The ferry\n")
        shown = screen.wait_for(" end.").replace("\r\n", "\n")
        assert SHOWN.removeprefix("The ferry") in shown
        assert "\x1b[31m" not in shown
        screen.wait_for("> ")
        screen.type("啦la 啦la 啦la\n")  # which has no end
        screen.wait_for("啦la 啦la 啦la 啦la 啦la")
        screen.type("\x03")
        assert "�" not in screen.wait_for("(stopped)")
        screen.wait_for("> ")
        screen.type("/set top_k=3\n")
        screen.wait_for("top_k = 3\r\n")
        screen.press_ctrl_c_at_the_mark()
        screen.wait_for("/quit, ends the conversation)")
        screen.press_ctrl_c_at_the_mark()
        screen.program.ends_with(0)
    finally:
        screen.close()
