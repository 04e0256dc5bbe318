"""Conversations as tokens: encoded by a chat template, with what a report says of them."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import DataError
from text.chat import Conversation
from text.chat_template import CHATML, TURN_END, TURN_START, ChatTemplate, Message, template_of
from text.tokenizer import Tokenizer, add_special_tokens

BATCH = 256  # conversations whose tokens are written at once


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation's tokens, (N,), and which of them are targets; hashes tell equal ones."""

    ids: np.ndarray
    is_target: np.ndarray  # (N,) bool
    digest: int
    prompt_digest: int  # of what comes before the first answer
    n_turns: int


def chat_template_for(source: str, tokenizer: Tokenizer) -> tuple[ChatTemplate, Tokenizer]:
    """A chat template for a tokenizer, which gets ChatML's tokens if it is the one for others."""
    if source == CHATML.source:
        tokenizer = add_special_tokens(tokenizer, [TURN_START, TURN_END])
    return template_of(source, tokenizer), tokenizer


def encode_conversations(
    conversations: Iterable[Conversation], template: ChatTemplate, tokenizer: Tokenizer
) -> Iterator[list[EncodedConversation]]:
    """Encode conversations in batches of at most BATCH.

    Raises DataError for one that the template refuses, with its row.
    """
    remaining = iter(conversations)
    while batch := [
        _encode(conversation, template, tokenizer)
        for conversation in itertools.islice(remaining, BATCH)
    ]:
        yield batch


def _encode(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> EncodedConversation:
    try:
        ids, targets = template.encode_with_targets(conversation.messages, tokenizer)
    except DataError as error:
        raise DataError(f"{conversation.where}: {error}\nMend that row, or leave it out.") from None
    return EncodedConversation(
        np.array(ids),
        np.array(targets, dtype=bool),
        _digest(conversation.messages),
        _digest(conversation.prompt),
        sum(message.role != "system" for message in conversation.messages),
    )


def _digest(messages: Sequence[Message]) -> int:
    content = json.dumps([dataclasses.astuple(message) for message in messages]).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


@dataclass
class ChatReport:
    """What is told of the conversations of a text; counted while they are encoded."""

    conversations: int = 0
    turns: int = 0  # of a user or the assistant
    tokens: int = 0
    target_tokens: int = 0  # those that the loss counts

    def add(self, encoded: EncodedConversation) -> None:
        """Count a conversation."""
        self.conversations += 1
        self.turns += encoded.n_turns
        self.tokens += len(encoded.ids)
        self.target_tokens += int(encoded.is_target.sum())

    def line(self) -> str:
        """The report in words."""
        return (
            f"{self.conversations:,} conversation{'s' * (self.conversations != 1)}, "
            f"{self.turns:,} turns: the loss counts {self.target_tokens:,} of {self.tokens:,} "
            f"tokens ({self.target_tokens / max(1, self.tokens):.0%}), those of the answers"
        )

    def facts(self, shared_prompts: int) -> dict[str, Any]:
        """The report for data.json."""
        return dataclasses.asdict(self) | {"prompts_on_both_sides": shared_prompts}
