"""Chat templates: a conversation as one text, and as tokens with those of its answers marked.

A template is a program in the language Jinja, as models from elsewhere have it. ChatML, and the
templates that are ChatML with a system prompt of their own, are rendered here without Jinja.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engine.errors import DataError
from text.template_language import compile_template
from text.tokenizer import TURN_ENDS, ForeignTokenizer, Tokenizer, begin_token_of

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # ChatML's tokens
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# ChatML as models have it, without the blanks that mean nothing; many put a system prompt of their
# own before a conversation that has none
_CHATML_FORM = re.compile(
    r"(?P<begins>\{\{bos_token\}\})?\{%for message in messages%\}"
    r"(?:\{%if loop\.first and messages\[0\]\['role'\] != 'system'%\}"
    r"\{\{'<\|im_start\|>system(?:\\n|\n)(?P<system>[^'\\+{}%]*)<\|im_end\|>(?:\\n|\n)'\}\}"
    r"\{%endif%\})?"
    r"\{\{'<\|im_start\|>'\+message\['role'\]\+'(?:\\n|\n)'\+message\['content'\]"
    r"\+'<\|im_end\|>'\+'(?:\\n|\n)'\}\}\{%endfor%\}"
    r"\{%if add_generation_prompt%\}\{\{'<\|im_start\|>assistant(?:\\n|\n)'\}\}\{%endif%\}"
)
_FREE_BLANKS = re.compile(r"(?<=\{[{%])\s+|\s+(?=[%}]\})|(?<=%\})\n|\s+(?=\+)|(?<=\+)\s+")
_MARKS = [chr(code) for code in range(0xE000, 0xF8FF)]  # characters without a meaning


@dataclass(frozen=True)
class Message:
    """A turn of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """How a model's conversations are written down; template_of() makes one for a tokenizer."""

    source: str  # in Jinja
    begin: str = ""  # what the template calls bos_token
    end: str = ""  # eos_token

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a conversation, by the rules of transformers' apply_chat_template.

        With add_generation_prompt, an answer follows it; with continue_final_message, the rest of
        its last message. Raises DataError for what the template refuses, SettingsError without
        jinja2 where the template needs it.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt begins an answer, and no last message goes on")
        if not continue_final_message:
            return self._render(messages, add_generation_prompt)
        if not messages:
            raise DataError("there is no message to continue.")
        *before, last = messages
        tag = _unused_mark([self.source, *(m.role + m.content for m in messages)])
        # the blank tells whether the template has stripped the message
        tagged = self._render([*before, Message(last.role, last.content + tag + " ")], False)
        if tag not in tagged or last.content.strip() not in tagged:
            raise DataError("the chat template drops the last message, which is to be continued.")
        kept, _, rest = tagged.rpartition(tag)
        return kept if rest.startswith(" ") else kept.rstrip()

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The ids of render()'s text; the template's special tokens are single ids.

        In a message such a token's name is text. An answer's tokens don't depend on the text
        before it, so that an answer has the ids here that a model gives out. Raises as render()
        does.
        """
        text = _MarkedText(self, messages, tokenizer)
        whole = text.render(
            len(messages), add_generation_prompt, continue_final_message=continue_final_message
        )
        cuts = [place for _, place in text.starts(whole)]
        return [token for ids, _, _ in text.encoded(whole, cuts) for token in ids]

    def encode_with_targets(
        self, messages: Sequence[Message], tokenizer: Tokenizer
    ) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and which of them a model is to learn: those of each answer
        and of the token that ends its turn.

        Raises as write() does.
        """
        return self.write(messages, tokenizer).encode()

    def write(self, messages: Sequence[Message], tokenizer: Tokenizer) -> "Written":
        """A conversation to learn from, written down: all but its tokens.

        Raises as render() does, DataError too where the answers can't be told from the rest.
        """
        text = _MarkedText(self, messages, tokenizer)
        whole = text.render(len(messages))
        return Written(text, whole, tuple(self._answers(text, whole)))

    def end_of_turn(self, tokenizer: Tokenizer) -> str | None:
        """The special token that ends an assistant's turn; None if the template has none."""
        return _end_of_turn(self, tuple(tokenizer.special_tokens))

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end an answer: the turn's end, and the end of a text."""
        end = self.end_of_turn(tokenizer)
        ends = [] if end is None else [tokenizer.special_tokens[end]]
        return tuple(dict.fromkeys([*ends, tokenizer.end_of_text_id]))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return _renderer(self.source)(messages, add_generation_prompt, self.begin, self.end)

    def _answers(self, text: "_MarkedText", whole: str) -> Iterator[tuple[int, int]]:
        """Where each answer begins and ends, the end of its turn included."""
        end = self.end_of_turn(text.tokenizer)
        if end is None:
            raise DataError(
                "the chat template ends an assistant's turn with no special token, so that a model "
                "can't learn where to stop."
            )
        n_answers = sum(message.role == "assistant" for message in text.messages)
        stop = 0
        for number, first in text.starts(whole):
            found = whole.find(end, first)
            content = text.messages[number].content.strip()
            if first < stop or found < 0 or content not in text.unmarked(whole[first:found]):
                break
            stop = found + len(end)
            yield first, stop
            n_answers -= 1
        if n_answers:
            raise DataError(
                "the chat template does not write an assistant's turn where its own prompt for an "
                "answer ends, so that answers can't be told from the rest."
            )


CHATML = ChatTemplate(_CHATML)
CHATML_WITH_BEGIN = "{{ bos_token }}" + _CHATML


def template_of(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A model's chat template with the names that it may ask its tokenizer for."""
    names = tokenizer.special_tokens
    last = next(name for name, i in names.items() if i == tokenizer.end_of_text_id)
    end = next((name for name in TURN_ENDS if name in names and name in source), last)
    return ChatTemplate(source, begin_token_of(tokenizer), end)


@dataclass(frozen=True)
class Written:
    """A conversation as a template writes it down, and where its answers begin and end."""

    text: "_MarkedText"
    whole: str
    answers: tuple[tuple[int, int], ...]

    def encode(self) -> tuple[list[int], list[bool]]:
        """Its ids, and which of them are targets, as encode_with_targets() says."""
        cuts = [place for span in self.answers for place in span]
        ids: list[int] = []
        targets: list[bool] = []
        for part, start, stop in self.text.encoded(self.whole, cuts):
            is_answer = any(first <= start and stop <= last for first, last in self.answers)
            ids += part
            targets += [is_answer] * len(part)
        return ids, targets


class _MarkedText:
    """A conversation in which the names of special tokens in messages are marked as text.

    Each has a character inserted that occurs nowhere else; encoded() removes it.
    """

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], tokenizer: Tokenizer
    ) -> None:
        self.messages, self.tokenizer = messages, tokenizer
        self._template, self._special = template, _names(tuple(tokenizer.special_tokens))
        self._mark = _unused_mark([template.source, *(m.role + m.content for m in messages)])
        self._marked = [
            Message(self._hidden(message.role), self._hidden(message.content))
            for message in messages
        ]
        self._is_plain = self._marked == list(messages)

    def _hidden(self, text: str) -> str:
        return self._special.sub(lambda name: name[0][0] + self._mark + name[0][1:], text)

    def render(
        self,
        count: int,
        add_generation_prompt: bool = False,
        *,
        continue_final_message: bool = False,
    ) -> str:
        """The text of the first `count` messages; DataError if the marks change it."""
        render = functools.partial(
            self._template.render,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        marked = render(self._marked[:count])
        if not self._is_plain and self.unmarked(marked) != render(self.messages[:count]):
            raise DataError(
                "a message holds the name of a special token, which the chat template treats in "
                "a way of its own."
            )
        return marked

    def unmarked(self, text: str) -> str:
        """A text without the marks."""
        return text.replace(self._mark, "")

    def starts(self, whole: str) -> Iterator[tuple[int, int]]:
        """The assistant's messages by number, each with where whole's prompt for it ends.

        A message whose prompt is not in whole is left out.
        """
        numbers = [i for i, message in enumerate(self.messages) if message.role == "assistant"]
        if numbers and (places := self._prompt_ends(whole, numbers)) is not None:
            yield from zip(numbers, places, strict=True)
            return
        for number in numbers:
            if (place := self._prompt_end(whole, number)) is not None:
                yield number, place

    def _prompt_end(self, whole: str, number: int) -> int | None:
        """Where the prompt for a message ends, if whole begins with it."""
        asks = _asks(self._template)
        try:
            prompt = self.render(number, True)
            # some write no prompt for an answer before the first message
            if not prompt.endswith(asks) and prompt == self.render(number):
                prompt += asks
        except DataError:  # some templates refuse to begin with an answer
            return None
        return len(prompt) if whole.startswith(prompt) else None

    def _prompt_ends(self, whole: str, numbers: Sequence[int]) -> list[int] | None:
        """Where the prompts for all answers end, by the text that stands before each answer.

        A render for each answer takes quadratic time. None if that text may be in messages, or is
        not as often in whole as there are answers.
        """
        asks = _asks(self._template)
        if not self._special.search(asks):
            return None
        places = [found.end() for found in re.finditer(re.escape(asks), whole)]
        if len(places) == len(numbers) + 1 and places[-1] == len(whole):  # for the next answer
            places.pop()
        is_last = len(places) == len(numbers) and self._prompt_end(whole, numbers[-1]) == places[-1]
        return places if is_last else None

    def encoded(self, whole: str, cuts: Sequence[int]) -> Iterator[tuple[list[int], int, int]]:
        """The ids of a marked text in parts, with each part's place in it.

        Special tokens are parts, and what is between them is divided at the cuts.
        """
        edges = sorted({0, len(whole), *cuts})
        before = 0
        for found in itertools.chain(self._special.finditer(whole), [None]):
            stop = len(whole) if found is None else found.start()
            places = [before, *(edge for edge in edges if before < edge < stop), stop]
            for start, end in itertools.pairwise(places):
                if start < end:
                    yield self._ids(whole[before:start], whole[start:end]), start, end
            if found is not None:
                yield [self.tokenizer.special_tokens[found[0]]], found.start(), found.end()
                before = found.end()

    def _ids(self, before: str, text: str) -> list[int]:
        text = self.unmarked(text)
        if isinstance(self.tokenizer, ForeignTokenizer):  # some put a blank before a text
            return self.tokenizer.encode_part(self.unmarked(before), text, "").tolist()
        return self.tokenizer.encode(text)


def _unused_mark(texts: Sequence[str]) -> str:
    used = set().union(*texts)
    return next(mark for mark in _MARKS if mark not in used)


@functools.lru_cache(maxsize=8)
def _names(names: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@functools.lru_cache(maxsize=8)
def _asks(template: ChatTemplate) -> str:
    """What a template adds to a conversation that an answer is to follow."""
    asked = [Message("user", "?")]
    try:
        before, prompt = (
            template.render(asked, add_generation_prompt=flag) for flag in (False, True)
        )
    except DataError:
        return ""
    return prompt.removeprefix(before) if prompt.startswith(before) else ""


@functools.lru_cache(maxsize=8)
def _end_of_turn(template: ChatTemplate, names: tuple[str, ...]) -> str | None:
    answer = _unused_mark([template.source])
    try:
        whole = template.render([Message("user", "?"), Message("assistant", answer)])
    except DataError:
        return None
    found = _names(names).search(whole.rpartition(answer)[2])
    return None if found is None else found[0]


_Render = Callable[[Sequence[Message], bool, str, str], str]


@functools.lru_cache(maxsize=8)
def _renderer(source: str) -> _Render:
    found = _CHATML_FORM.fullmatch(_FREE_BLANKS.sub("", source))
    if found is not None:
        return _chatml_renderer(found["system"], begins=found["begins"] is not None)
    render_source = compile_template(source)

    def render(
        messages: Sequence[Message], add_generation_prompt: bool, begin: str, end: str
    ) -> str:
        return render_source(
            messages=[{"role": m.role, "content": m.content} for m in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=begin,
            eos_token=end,
        )

    return render


def _chatml_renderer(system: str | None, *, begins: bool) -> _Render:
    """Render ChatML, with `begins` behind bos_token; system is what a conversation without a system
    message begins with.
    """

    def render(
        messages: Sequence[Message], add_generation_prompt: bool, begin: str, end: str
    ) -> str:
        turns = [(message.role, message.content) for message in messages]
        if system is not None and turns and turns[0][0] != "system":
            turns.insert(0, ("system", system))
        text = "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in turns)
        return begin * begins + text + f"{TURN_START}assistant\n" * add_generation_prompt

    return render
