"""Conversations as tokens: encoded by a chat template, with what a report says of them."""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import DataError
from engine.words import Words
from text.chat import Conversation
from text.chat_template import (
    CHATML,
    CHATML_WITH_BEGIN,
    TURN_END,
    TURN_START,
    ChatTemplate,
    Message,
    Written,
    template_of,
)
from text.tokenizer import Tokenizer, add_special_tokens

PROBE = (Message("user", "?"), Message("assistant", "!"))
BATCH = 64  # conversations to encode in one task, which no Ctrl-C can end


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation's tokens, (N,), and which of them are targets; hashes tell equal ones."""

    ids: np.ndarray
    is_target: np.ndarray  # (N,) bool
    digest: int
    prompt_digest: int  # of Conversation.prompt
    n_turns: int
    n_answers: int
    other_characters: int  # of messages that are no answers


def chat_template_for(source: str, tokenizer: Tokenizer) -> tuple[ChatTemplate, Tokenizer]:
    """A chat template for a tokenizer, which gets ChatML's tokens if it is the one for others.

    That one writes the token that begins each text, if the tokenizer has one.
    """
    if source == CHATML.source:
        tokenizer = add_special_tokens(tokenizer, [TURN_START, TURN_END])
        source = CHATML_WITH_BEGIN if tokenizer.begin_ids else source
    return template_of(source, tokenizer), tokenizer


def require_answers(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Raise DataError if a model can learn no conversation by the template, whatever it says."""
    try:
        template.write(PROBE, tokenizer)
    except DataError as error:
        raise DataError(
            f"{error}\nNo conversation can be learned or scored by it: choose a model with another "
            "chat template."
        ) from None


def writer_of(template: ChatTemplate, tokenizer: Tokenizer) -> Callable[[Conversation], Written]:
    """What writes conversations down by a template; DataError for one that it refuses."""
    return lambda conversation: template.write(conversation.messages, tokenizer)


def encode_conversations(
    conversations: Iterable[Conversation], pool: ThreadPoolExecutor
) -> Iterator[list[EncodedConversation]]:
    """Encode conversations, which are written down, in parallel, in order, in batches of at most
    BATCH."""
    pending: collections.deque[Future[list[EncodedConversation]]] = collections.deque()
    remaining = iter(conversations)
    while batch := list(itertools.islice(remaining, BATCH)):
        pending.append(pool.submit(_encode_batch, batch))
        if len(pending) > 2 * (os.cpu_count() or 1):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _encode_batch(batch: list[Conversation]) -> list[EncodedConversation]:
    return [_encode(conversation) for conversation in batch]


def _encode(conversation: Conversation) -> EncodedConversation:
    assert conversation.written is not None, "each_document() has written it down"
    ids, targets = conversation.written.encode()
    messages, (digest, prompt_digest) = conversation.messages, digests_of(conversation)
    return EncodedConversation(
        np.array(ids),
        np.array(targets, dtype=bool),
        digest=digest,
        prompt_digest=prompt_digest,
        n_turns=sum(message.role != "system" for message in messages),
        n_answers=len(conversation.written.answers),
        other_characters=sum(len(m.content) for m in messages if m.role != "assistant"),
    )


def digests_of(conversation: Conversation) -> tuple[int, int]:
    """The hashes of a conversation, and of its prompt."""
    return _digest(conversation.messages), _digest(conversation.prompt)


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
    answers: int = 0
    other_characters: int = 0  # of messages that are no answers

    def add(self, encoded: EncodedConversation) -> None:
        """Count a conversation."""
        self.conversations += 1
        self.turns += encoded.n_turns
        self.tokens += len(encoded.ids)
        self.target_tokens += int(encoded.is_target.sum())
        self.answers += encoded.n_answers
        self.other_characters += encoded.other_characters

    @property
    def other_tokens(self) -> int:
        """Those of no answer's text: of questions, of the template, and the ends of turns."""
        return self.tokens - self.target_tokens + self.answers

    def words(self) -> Words:
        """The report in words."""
        share = f"{self.target_tokens / max(1, self.tokens):.0%}"
        return Words(
            f"{self.conversations:,} conversation{'s' * (self.conversations != 1)}, "
            f"{self.turns:,} turns: the loss counts {self.target_tokens:,} of {self.tokens:,} "
            f"tokens ({share}), those of the answers",
            f"{self.conversations:,} 段对话，{self.turns:,} 轮：损失只计 {self.tokens:,} 个 token "
            f"中回答的 {self.target_tokens:,} 个（{share}）",
        )

    def facts(self, shared_prompts: int) -> dict[str, Any]:
        """The report for data.json."""
        counted = ("conversations", "turns", "tokens", "target_tokens")
        facts = {name: getattr(self, name) for name in counted}
        return facts | {"prompts_on_both_sides": shared_prompts}
