"""Rows of conversations, in the forms that data sets of questions and answers have."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from text.chat_template import Message, Written

# the fields of one question and its answer: to ask, to add to it if there is one, to answer
_PAIRS = (
    (("instruction",), ("input", "context"), ("output", "response")),
    (("prompt",), (), ("response", "completion")),
    (("question",), ("context",), ("answer",)),
)
_LISTS = ("messages", "conversations", "conversation")  # fields of several turns
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}
_TOOLS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")


@dataclass(frozen=True)
class Conversation:
    """The messages of a row; written is how a chat template writes them down, once one has."""

    messages: tuple[Message, ...]
    written: Written | None = None

    @property
    def has_answer(self) -> bool:
        """Whether the assistant says anything in it."""
        return any(m.role == "assistant" and m.content.strip() for m in self.messages)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the first answer to a user; all, if no user is answered."""
        roles = [message.role for message in self.messages]
        asked = roles.index("user") if "user" in roles else len(roles)
        answered = "assistant" in roles[asked:]
        return self.messages[: roles.index("assistant", asked) if answered else None]


@dataclass(frozen=True)
class ChatForm:
    """The fields that make a row a conversation, by the names that they have in it."""

    turns: str | None  # several turns; or else these:
    asked: str = ""
    added: str | None = None
    answer: str = ""
    system: str | None = None

    @property
    def names(self) -> list[str]:
        """The fields, in the order of a conversation."""
        fields = (self.system, self.turns, self.asked, self.added, self.answer)
        return [name for name in fields if name]

    def messages(self, row: Mapping[str, Any]) -> tuple[Message, ...]:
        """The messages of a row; ValueError, whose text says why, where it is none."""
        _refuse_tools(row, "it")
        if self.turns is not None:
            messages = messages_of(row.get(self.turns), self.turns)
        else:
            asked = _side_of(row, self.asked, "user")
            if self.added is not None and (added := content_text(row.get(self.added) or "")):
                asked[-1] = Message(asked[-1].role, f"{asked[-1].content}\n\n{added}")
            messages = (*asked, *_side_of(row, self.answer, "assistant"))
        system = content_text(row.get(self.system) or "") if self.system else ""
        if system and messages[0].role != "system":
            return (Message("system", system), *messages)
        return messages


def form_of(names: Iterable[str]) -> ChatForm | None:
    """The form of conversations that rows with these fields have; None if they have none."""
    known = {name.strip().casefold(): name for name in reversed(list(names))}

    def first(choices: tuple[str, ...]) -> str | None:
        return next((known[name] for name in choices if name in known), None)

    system = first(("system",))
    if turns := first(_LISTS):
        return ChatForm(turns, system=system)
    for asked, added, answer in _PAIRS:
        if (question := first(asked)) and (reply := first(answer)):
            return ChatForm(None, question, first(added), reply, system)
    return None


def is_turn(value: Any) -> bool:
    """Whether a value of JSON is a message of a conversation."""
    return isinstance(value, dict) and bool(value.keys() & {"role", "from"})


def messages_of(turns: Any, name: str) -> tuple[Message, ...]:
    """The messages of a field, which may be JSON in a text; ValueError, which says why not."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise ValueError(f'"{name}" is a text, and not JSON') from None
    if not isinstance(turns, list | tuple) or not turns:
        raise ValueError(f'"{name}" is no list of messages')
    return tuple(_message(turn, f"message {number}") for number, turn in enumerate(turns, start=1))


def _message(turn: Any, where: str) -> Message:
    if not is_turn(turn):
        raise ValueError(f'{where} has no "role"')
    found = turn.get("role", turn.get("from"))
    if found in ("tool", "function", "function_call", "observation", "ipython"):
        raise ValueError(f'{where} is of the role "{found}": tool calls are not trained on')
    _refuse_tools(turn, where)
    role = _ROLES.get(found) if isinstance(found, str) else None
    if role is None:
        allowed = '"system", "user" or "assistant"'
        raise ValueError(f"{where} has the role {str(found)[:40]!r}; it must be {allowed}")
    content = turn.get("content", turn.get("value"))
    try:
        return Message(role, content_text(content))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _refuse_tools(values: Mapping[str, Any], where: str) -> None:
    used = next((name for name in _TOOLS if values.get(name)), None)
    if used is not None:
        raise ValueError(f'{where} has "{used}": tool calls are not trained on')


def _side_of(row: Mapping[str, Any], field: str, role: str) -> list[Message]:
    """The messages of one side of a pair, which is a text or a list of messages."""
    value = row.get(field)
    if isinstance(value, list) and value and is_turn(value[0]):
        return list(messages_of(value, field))
    try:
        return [Message(role, content_text(value))]
    except ValueError as error:
        raise ValueError(f'"{field}": {error}') from None


def content_text(content: Any) -> str:
    """The text of a message's content: a text, or parts of type text, joined by line ends.

    Raises ValueError, which says why, for any other content.
    """
    if isinstance(content, list):
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f'a part of it is of the type "{kind}", and only text is read')
            parts.append(part["text"])
        content = "\n".join(parts)
    if not isinstance(content, str):
        kind = "null" if content is None else type(content).__name__
        raise ValueError(f"it is {kind}, not text")
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
