"""A conversation as a chat model reads it: rendered by its template, cut to its context."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import DataError
from exchange.saved_run import LoadedModel
from text.chat_template import ChatTemplate, Message, template_of
from text.tokenizer import Tokenizer

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
MOST_MESSAGES = 500  # that are read of a conversation: a template's time grows with their square


class TooLongError(DataError):
    """The newest turn of a conversation can't be read as a whole."""


@dataclass(frozen=True)
class Prompt:
    """What the model reads before its answer."""

    ids: list[int]
    most_new_tokens: int  # until the context is full
    n_dropped: int  # the oldest messages, which do not fit


@dataclass(frozen=True)
class Converser:
    """Turns messages into the prompt of a chat model; converser_of() makes one."""

    template: ChatTemplate
    tokenizer: Tokenizer
    context_length: int
    stop_ids: tuple[int, ...]  # tokens that end an answer

    def prompt(self, messages: Sequence[Message], max_new_tokens: int) -> Prompt:
        """The prompt of the next answer; an assistant's message at the end is continued.

        The oldest turns are dropped until the rest, of MOST_MESSAGES at most, fits beside
        max_new_tokens, for which half of the context is kept at most. The system messages at the
        beginning are joined, and stay. Raises TooLongError if the newest turn alone is more,
        DataError for messages that the template refuses.
        """
        n_head = next((i for i, m in enumerate(messages) if m.role != SYSTEM), len(messages))
        # many templates take one system message and no more
        system = "\n\n".join(message.content for message in messages[:n_head] if message.content)
        head = [Message(SYSTEM, system)] if n_head else []
        # the conversation may begin where it does, or with any of the user's turns
        starts = [n_head]
        starts += [i for i, m in enumerate(messages) if m.role == USER and i > n_head]
        n_newest = len(messages) - starts[-1]
        if n_newest > MOST_MESSAGES:
            raise TooLongError(
                f"{n_newest:,} messages from the user's last one on are more than the "
                f"{MOST_MESSAGES} that are read: leave out the oldest."
            )
        starts = [start for start in starts if len(messages) - start <= MOST_MESSAGES]
        room = self.context_length - min(max_new_tokens, self.context_length // 2)
        first, ids = self._newest(head, messages, starts, room)
        left = self.context_length - len(ids)
        if left < 1:
            raise TooLongError(
                f"the newest message and the system prompt take {len(ids):,} tokens, and the "
                f"model's context has {self.context_length:,}: shorten one of them."
            )
        return Prompt(ids, min(max_new_tokens, left), first - n_head)

    def _newest(
        self, head: list[Message], messages: Sequence[Message], starts: list[int], room: int
    ) -> tuple[int, list[int]]:
        """The first of the starts from which the tokens fit, or the last one; and the tokens.

        It goes back from the last one in growing strides: of thousands of turns a few may fit, and
        encoding all of them again and again would take minutes.
        """

        def encode(start: int) -> list[int]:
            part = [*head, *messages[start:]]
            is_open = part[-1].role == ASSISTANT
            return self.template.encode(
                part,
                self.tokenizer,
                add_generation_prompt=not is_open,
                continue_final_message=is_open,
            )

        fits, misses, stride = len(starts) - 1, -1, 1  # the last one is taken in any case
        ids = encode(starts[fits])
        while fits - misses > 1:
            tried = max(fits - stride, (fits + misses) // 2)
            longer = encode(starts[tried])
            if len(longer) <= room:
                fits, ids, stride = tried, longer, 2 * stride
            else:
                misses, stride = tried, 1
        return starts[fits], ids


def converser_of(run: LoadedModel) -> Converser | None:
    """What converses with a model; None for a base model, which has no chat template.

    Raises DataError for a template that can't be used, SettingsError without a library it needs.
    """
    if run.chat_template is None:
        return None
    template = template_of(run.chat_template, run.tokenizer)
    stop_ids = template.stop_ids(run.tokenizer)  # renders, so that errors come now
    return Converser(template, run.tokenizer, run.model.config.context_length, stop_ids)
