"""Talk with a trained model, or write a text in turns, in a terminal:  python -m scripts.chat

A model with a chat template answers. A base model continues text: it goes on from your words
directly, and your next words begin behind a blank line. Either reads the newest turns that fit into
its context beside max_new_tokens, for which half of the context is kept at most; older turns are
left out whole. Of a turn that is too long by itself a base model reads the newest part. Standard
output gets the answers alone, without control characters.
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

from engine.starting import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

import torch

from engine.console import printable, tell
from engine.errors import PipelineError, SettingsError
from engine.settings import unknown_name
from exchange.saved_run import LoadedModel
from generation import Piece, stream_text
from scripts.conversation import ASSISTANT, SYSTEM, USER, Converser, converser_of
from scripts.options import (
    add_run_options,
    add_sampling_options,
    add_stop_option,
    answer_length_of,
    describe,
    load,
    new_parser,
    read_sampling,
    run_program,
    sampling_of,
    seed_of,
    whole,
    write,
)
from storage.files import write_atomically
from text.chat_template import Message
from text.tokenizer import encode_from_start

GAP = "\n\n"  # between turns
HELP = """\
/retry                  draw the last answer again, with another seed
/reset                  forget all that was said
/set temperature=0.8    change how tokens are drawn, several at a time; /set alone shows it all
/save FILE              write the conversation to a file (chat-DATE.md)
/help                   show this
/quit                   end, as Ctrl-D does; Ctrl-C ends an answer
A line that begins with a blank is text, whatever follows it."""
HELP_WITH_CHAT_MODELS = """\
/system TEXT            give the model a system prompt; alone it shows it, "none" removes it
/undo                   take back your last words and the answer to them
"""
COMMANDS = "/retry /reset /set temperature=0.8 /save FILE /help /quit; Ctrl-C ends an answer"


def main() -> int:
    """Read the options, load the run and hold the conversation; returns 0 when it ends."""
    parser = new_parser(__doc__)
    add_run_options(parser)
    add_sampling_options(parser)
    add_stop_option(parser)
    parser.add_argument(
        "--system", metavar="TEXT", type=whole, help="the system prompt of a chat model (none)"
    )
    arguments = parser.parse_args()
    run = load(arguments)
    seed, sampling, converser = seed_of(arguments), sampling_of(arguments, run), converser_of(run)
    if converser is not None:
        sampling["max_new_tokens"] = answer_length_of(arguments, run)
    elif arguments.system is not None:
        raise SettingsError("--system is for chat models, and this is a base model.")
    chat = Chat(run, sampling, arguments.stop, seed, converser, arguments.system)
    context = run.model.config.context_length
    kind = (
        "This is a base model and no assistant: it continues the text that you begin,\n"
        f"and reads the newest {context:,} tokens of it.\n{COMMANDS}"
        if converser is None
        else "This is a chat model: it answers, right or wrong, and reads the newest turns\n"
        f"that fit into its {context:,} tokens.\n/system TEXT /undo {COMMANDS}"
    )
    tell(f"{describe(run)}, seed {seed}\n{kind}")
    for line in read_lines():
        if not chat.take(line):
            break
    return 0


@dataclass
class Turn:
    """What the user wrote, and the model's answer."""

    words: str
    answer: str = ""


class Chat:
    """A conversation: its turns, and the sampling of the next answer.

    With a converser, that of a chat model, it may have a system prompt.
    """

    def __init__(
        self,
        run: LoadedModel,
        sampling: dict[str, Any],
        stop: list[str],
        seed: int,
        converser: Converser | None = None,
        system: str | None = None,
    ):
        self.turns: list[Turn] = []
        self.sampling = sampling
        self.system = system
        self._run, self._stop, self._seed, self._converser = run, stop, seed, converser
        self._has_dropped = False  # turns, which is told once
        self._commands: dict[str, Callable[[str], str]] = {
            "/retry": lambda _: "there is no answer yet",
            "/reset": self._reset,
            "/set": self._set,
            "/save": self._save,
            "/help": lambda _: HELP if converser is None else HELP_WITH_CHAT_MODELS + HELP,
        }
        if converser is not None:
            self._commands |= {"/system": self._set_system, "/undo": self._undo}

    def take(self, line: str) -> bool:
        """Answer a line or run its command; returns whether the conversation continues."""
        name, _, rest = line.rstrip().partition(" ")
        if name == "/quit":
            return False
        if name == "/retry" and self.turns:
            self.answer()
        elif name in self._commands:
            try:
                tell(self._commands[name](printable(rest).strip()))
            except PipelineError as error:
                tell(str(error))
        elif name.startswith("/"):
            tell(unknown_name(name, name, [*self._commands, "/quit"]))
        elif line.strip():
            self.turns.append(Turn(line))
            self.answer()
        return True

    def answer(self) -> None:
        """Draw the last turn's answer and stream it; Ctrl-C ends it.

        A turn that a chat model can't read is told, and taken back.
        """
        turn, run = self.turns[-1], self._run
        turn.answer = ""
        try:
            prompt, limits = self.prompt()
        except PipelineError as error:
            self.turns.pop()
            tell(str(error))
            return
        generator = torch.Generator(device=run.device).manual_seed(self._seed)
        self._seed += 1
        options = self.sampling | {"stop": self._stop, "generator": generator} | limits
        finish = None
        try:
            stream = stream_text(run.model, run.tokenizer, [prompt], **options)
            with contextlib.closing(cast(Generator[Piece, None, None], stream)) as pieces:
                for piece in pieces:
                    turn.answer += piece.text
                    finish = piece.finish
                    write(piece.text)
        except KeyboardInterrupt:
            tell("\n(stopped)")
        else:
            if not turn.answer:
                tell("(the model ends the text here; /retry draws again)")
        write("\n")
        if self._converser is not None and finish == "length":
            n, most = options["max_new_tokens"], self.sampling["max_new_tokens"]
            why = "the context is full" if n < most else f"/set max_new_tokens={2 * n} allows more"
            tell(f"(cut off after {n:,} tokens: {why})")

    def prompt(self) -> tuple[str | list[int], dict[str, Any]]:
        """The prompt of the next answer, and the options that come with it.

        It has the last turn, and the turns before it that fit. Raises PipelineError for what a chat
        model can't read.
        """
        if self._converser is not None:
            return self._conversation(self._converser)
        context = self._run.model.config.context_length
        most = context - min(self.sampling["max_new_tokens"], context // 2)
        text = self.turns[-1].words
        for turn in reversed(self.turns[:-1]):
            longer = f"{turn.words}{turn.answer}".rstrip() + GAP + text
            if len(encode_from_start(self._run.tokenizer, longer)) > most:
                break
            text = longer
        return text, {}

    def _conversation(self, converser: Converser) -> tuple[list[int], dict[str, Any]]:
        messages = [] if self.system is None else [Message(SYSTEM, self.system)]
        for turn in self.turns:
            messages += [Message(USER, turn.words), Message(ASSISTANT, turn.answer)]
        prompt = converser.prompt(messages[:-1], self.sampling["max_new_tokens"])
        if prompt.n_dropped and not self._has_dropped:
            self._has_dropped = True
            tell("(from here on the oldest turns don't fit into the context, and are left out)")
        return prompt.ids, {
            "max_new_tokens": prompt.most_new_tokens,
            "stop_ids": converser.stop_ids,
        }

    def _set_system(self, text: str) -> str:
        if text:
            self.system = None if text == "none" else text
        return "no system prompt" if self.system is None else f"system prompt: {self.system}"

    def _undo(self, _: str) -> str:
        if not self.turns:
            return "there is nothing to take back"
        return f"taken back: {self.turns.pop().words}"

    def _reset(self, _: str) -> str:
        self.turns.clear()
        self._has_dropped = False
        return "forgotten"

    def _set(self, values: str) -> str:
        """Change the sampling by "name=value name=value", or nothing if one is wrong."""
        pairs = [pair.partition("=") for pair in re.sub(r"\s*=\s*", "=", values).split()]
        changes = read_sampling({name.replace("-", "_"): value for name, _, value in pairs})
        self.sampling |= changes
        shown = changes or self.sampling
        return "\n".join(
            f"{name} = {value}".replace("None", "none") for name, value in shown.items()
        )

    def _save(self, name: str) -> str:
        """Write the conversation as Markdown, with the user's turns as quotations."""
        path = os.path.expanduser(name or time.strftime("chat-%Y-%m-%d_%H-%M-%S.md"))
        if not self.turns:
            raise SettingsError("there is nothing to save yet")
        if os.path.lexists(path):
            raise SettingsError(f"{path} is there already; name another file")
        parts = [f"# {self._run.name}, {self._run.version}"]
        if self.system is not None:
            parts.append(f"*{self.system}*")
        for turn in self.turns:
            parts += [f"> {turn.words}", turn.answer.strip("\n")]
        write_atomically(path, (printable(GAP.join(parts)) + "\n").encode("utf-8", "replace"))
        return f"saved to {path}"


def read_lines() -> Iterator[str]:
    """The lines of standard input, until its end or two Ctrl-C in a row.

    A terminal gets a prompt mark, and line editing if Python has readline.
    """
    if sys.stdin is None:
        return
    is_terminal = sys.stdin.isatty()
    stdin: Any = sys.stdin  # a TextIOWrapper, though its declared type is TextIO
    stdin.reconfigure(encoding=None if is_terminal else "utf-8", errors="replace")
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows' terminal has line editing of its own
            import readline  # noqa: F401
    mark = "> " if is_terminal and sys.stdout is not None and sys.stdout.isatty() else ""
    n_interrupts = 0
    while True:
        try:
            line = input(mark)
        except EOFError:
            if mark:
                write("\n")
            return
        except KeyboardInterrupt:
            n_interrupts += 1
            if n_interrupts == 2:
                return
            tell("\n(Ctrl-C once more, or /quit, ends the conversation)")
            continue
        n_interrupts = 0
        yield whole(line)


if __name__ == "__main__":
    run_program(main)
