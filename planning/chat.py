"""A run on conversations: how they are packed, what is said of it, and what it is asked."""

from dataclasses import dataclass

import numpy as np

from data import Conversations, PackedWindows, TokenSlice, as_array
from engine.errors import DataError
from planning.fine_tuning import SMOLLM2
from planning.plan import SMALL_CHAT, Chat, RunPlan
from text.chat_template import ChatTemplate, Message, template_of
from text.packing import cut_pieces, pack
from text.token_cache import TokenizedText
from text.tokenizer import Tokenizer
from training_utils import TrainingConfig

MOST_CONTEXT = 512  # tokens that a recipe's context is raised to for long conversations
N_QUESTIONS = 3  # that are answered before, during and after training
_MARK = "\ue000"  # a character that no template writes


@dataclass(frozen=True)
class Question:
    """A conversation up to where an answer begins."""

    text: str  # what the user says last
    ids: list[int]
    end: int  # the token that ends an answer


def find_chat(text: TokenizedText) -> Chat | None:
    """What a run's record has of its conversations; None for a text without any."""
    if text.chat is None:
        return None
    return Chat(text.chat.template, text.chat.n_different)


def find_context(text: TokenizedText, plan: RunPlan) -> int:
    """The most tokens of a window: those of the plan. A recipe's context, which is for texts, is
    raised to the longest conversation, at most MOST_CONTEXT."""
    context: int = plan.model["context_length"]
    is_set = plan.fixed is not None and "context_length" in plan.fixed.model
    if text.chat is None or plan.recipe is None or is_set:
        return context
    (starts, tokens), _ = _sides(text)
    is_target = tokens.array().view(bool)
    pieces = cut_pieces(starts, is_target, MOST_CONTEXT)
    of_conversations = pieces.lengths[~is_target[pieces.starts]]  # a text counts from its first on
    return max(context, int(of_conversations.max(initial=0)))


def _sides(text: TokenizedText) -> list[tuple[np.ndarray, TokenSlice]]:
    """Where the conversations to train on begin, and which of their tokens count; and of those to
    validate on."""
    chat, n_train = text.chat, text.n_train
    assert chat is not None, "the text has conversations"
    assert n_train is not None, "conversations are never divided by position"
    return [
        (chat.train_starts, TokenSlice(chat.targets, "uint8", 0, n_train)),
        (chat.val_starts, TokenSlice(chat.targets, "uint8", n_train, text.n_tokens)),
    ]


def pack_conversations(text: TokenizedText, most: int, seed: int) -> Conversations | None:
    """The conversations of a text in windows of at most `most` tokens; None if it has none.

    Raises DataError where none fits, to train or to validate on.
    """
    if text.chat is None:
        return None
    sides = []
    for name, (starts, is_target) in zip(("train", "validate"), _sides(text), strict=True):
        pieces = cut_pieces(starts, is_target.array(), most)
        if not len(pieces):
            raise DataError(
                f"no conversation to {name} on has an answer that ends within max_length ({most}) "
                "tokens.\nSet a larger max_length, or shorten the conversations."
            )
        tokens = TokenSlice(text.path, text.dtype, is_target.start, is_target.stop)
        sides.append(PackedWindows(tokens, is_target, pieces, pack(pieces.lengths, most, seed)))
    return Conversations(*sides)


def about_chat(
    plan: RunPlan, asked: TrainingConfig, conversations: Conversations, max_length: int
) -> list[str]:
    """What is to be said of a run on conversations before it begins."""
    assert plan.chat is not None, "the text has conversations"
    notices = []
    if max_length != plan.model["context_length"]:
        notices.append(
            f"max_length is raised from {plan.model['context_length']} to {max_length}, for the "
            "longest conversation"
        )
    if plan.start is None:
        notices.append(
            "a model that begins from random weights will imitate the form of these answers, and "
            "know nothing but what they say; to answer, let it begin from weights that know the "
            f'language: INIT_FROM = "{SMOLLM2}", or another chat model'
        )
    if plan.chat.is_small and asked.patience is None:
        notices.append(
            f"{plan.chat.rows:,} conversations are below {SMALL_CHAT:,}: the run ends with its "
            "last weights and is used with them, not with those of the lowest validation loss; it "
            "stops early only where patience is set"
        )
    for name, windows in zip(("train", "validate"), conversations, strict=True):
        cut, left_out = windows.pieces.n_cut, windows.pieces.n_left_out
        if cut:
            notices.append(
                f"{cut:,} conversation{'s' * (cut != 1)} to {name} on are longer than max_length: "
                "each is cut behind the last answer that fits"
            )
        if left_out:
            notices.append(
                f"{left_out:,} conversation{'s' * (left_out != 1)} to {name} on are left out: no "
                "answer of theirs ends within max_length"
            )
    unused = {
        "stride": asked.stride is not None,
        'sampling "random"': asked.sampling == "random",
    }
    return notices + [
        f"{name} is for texts, and not used: conversations are packed in full"
        for name, is_set in unused.items()
        if is_set
    ]


def find_questions(text: TokenizedText, tokens: Conversations) -> list[Question]:
    """The first conversations to validate on up to their first answers, of those that fit into a
    window with that answer; texts among them are none."""
    assert text.chat is not None, "the text has conversations"
    template = template_of(text.chat.template, text.tokenizer)
    end = template.stop_ids(text.tokenizer)[0]
    found: list[Question] = []
    is_target, pieces = as_array(tokens.val.is_target).view(bool), tokens.val.pieces
    for first, length in zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True):
        if is_target[first]:  # a text
            continue
        n_before = int(np.argmax(is_target[first : first + length + 1]))  # it ends with a target
        ids = as_array(tokens.val.tokens)[first : first + n_before].tolist()
        found.append(Question(_asked_last(ids, template, text.tokenizer), ids, end))
        if len(found) == N_QUESTIONS:
            break
    return found


def count_ids(prompts: list[str] | list[Question], tokenizer: Tokenizer) -> list[int]:
    """The tokens of each prompt of a sample."""
    return [
        len(prompt.ids if isinstance(prompt, Question) else tokenizer.encode(prompt)) or 1
        for prompt in prompts
    ]


def _asked_last(ids: list[int], template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """The user's last message in the tokens of a prompt; all of its text where that is unknown."""
    whole = tokenizer.decode(ids)
    question = Message("user", _MARK)
    try:
        before, _, after = template.render([question], add_generation_prompt=True).partition(_MARK)
        later = template.render([question, Message("assistant", _MARK), question]).split(_MARK)[2]
    except (DataError, IndexError):  # a template with rules of its own
        return whole.strip()
    # what comes before every message of a user, the first one and the later ones
    n_same = next(
        (n for n in range(min(len(before), len(later))) if before[-1 - n] != later[-1 - n]),
        min(len(before), len(later)),
    )
    opening = before[len(before) - n_same :]
    if not opening or opening not in whole or not whole.endswith(after):
        return whole.strip()
    return whole.removesuffix(after).rpartition(opening)[2].strip()
