"""A run on conversations: how they are packed, what is said of it, and what it is asked."""

from dataclasses import dataclass

import numpy as np

from data import Conversations, PackedWindows, TokenSlice, as_array
from engine.errors import DataError, SettingsError
from planning.fine_tuning import SMOLLM2, is_better_known
from planning.plan import SMALL_CHAT, Chat, RunPlan
from text.chat_template import ChatTemplate, Message, template_of
from text.packing import cut_pieces, pack
from text.token_cache import TokenizedText
from text.tokenizer import Tokenizer, encode_from_start
from training_utils import TrainingConfig

MOST_CONTEXT = 512  # tokens that a recipe's context is raised to for long conversations
N_QUESTIONS = 3  # that are answered before, during and after training
_MARK = "\ue000"  # a character that no template writes


@dataclass(frozen=True)
class Question:
    """A conversation up to where an answer begins."""

    text: str  # what the user says last
    ids: list[int]
    ends: tuple[int, ...]  # the tokens that end an answer


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
    (starts, is_text, is_target), _ = _sides(text)
    pieces = cut_pieces(starts, is_target.array(), MOST_CONTEXT, is_text=is_text)
    of_conversations = pieces.lengths[np.isin(pieces.starts, starts[~is_text])]
    return max(context, int(of_conversations.max(initial=0)))


def _sides(text: TokenizedText) -> list[tuple[np.ndarray, np.ndarray, TokenSlice]]:
    """Where the documents to train on begin, which of them are texts, and which of their tokens
    count; and of those to validate on."""
    chat, n_train = text.chat, text.n_train
    assert chat is not None, "the text has conversations"
    assert n_train is not None, "conversations are never divided by position"
    return [
        (chat.train_starts, chat.train_is_text, TokenSlice(chat.targets, "uint8", 0, n_train)),
        (
            chat.val_starts,
            chat.val_is_text,
            TokenSlice(chat.targets, "uint8", n_train, text.n_tokens),
        ),
    ]


def check_adapter(asked: TrainingConfig, text: TokenizedText) -> None:
    """Raise SettingsError where an adapter is to learn tokens that the frozen weights lack.

    Their rows are all the mean of the others and would stay so: a model could end no answer.
    """
    if asked.lora_rank is None or text.chat is None or not text.chat.added:
        return
    raise SettingsError(
        f"lora_rank is {asked.lora_rank}, and the model that INIT_FROM names has no tokens "
        f"{' and '.join(text.chat.added)}, which conversations need: beside frozen weights they "
        "can't be learned, and no answer would end.\nSet lora_rank to None, which trains all "
        "weights, or INIT_FROM to a chat model, such as a run that has been trained so."
    )


def pack_conversations(text: TokenizedText, most: int, seed: int) -> Conversations | None:
    """The conversations of a text in windows of at most `most` tokens; None if it has none.

    Raises DataError where none fits, to train or to validate on.
    """
    if text.chat is None:
        return None
    sides = []
    for name, side in zip(("train", "validate"), _sides(text), strict=True):
        starts, is_text, is_target = side
        pieces = cut_pieces(starts, is_target.array(), most, is_text=is_text)
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
        named = f'INIT_FROM = "{SMOLLM2}", or another chat model'
        if plan.choice is not None and not is_better_known(plan.choice.recipe, plan.choice.text):
            named = "INIT_FROM, for which docs/fine-tuning.md lists some"  # SMOLLM2 knows English
        notices.append(
            "a model that begins from random weights will imitate the form of these answers, and "
            "know nothing but what they say; to answer, let it begin from weights that know the "
            f"language: {named}"
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
    """The first conversations to validate on up to their first answers to a user, of those that fit
    into a window with that answer; texts among them are none."""
    chat, found = text.chat, list[Question]()
    assert chat is not None, "the text has conversations"
    template = template_of(chat.template, text.tokenizer)
    ends = template.stop_ids(text.tokenizer)
    around = _around_question(template, text.tokenizer)
    pieces, is_target = tokens.val.pieces, as_array(tokens.val.is_target).view(bool)
    is_chat = np.isin(pieces.starts, chat.val_starts[~chat.val_is_text])
    places = np.column_stack((pieces.starts, pieces.lengths))[is_chat]
    for first, length in places.tolist():
        counts = is_target[first : first + length + 1]  # it ends with a target
        for n_before in np.flatnonzero(counts & ~np.append(False, counts[:-1])).tolist():
            ids = as_array(tokens.val.tokens)[first : first + n_before].tolist()
            asked = _asked_last(text.tokenizer.decode(ids), *around)
            if asked is not None:
                found.append(Question(asked, ids, ends))
                break
        if len(found) == N_QUESTIONS:
            break
    return found


def count_ids(prompts: list[str] | list[Question], tokenizer: Tokenizer) -> list[int]:
    """The tokens of each prompt of a sample."""
    return [
        len(prompt.ids if isinstance(prompt, Question) else encode_from_start(tokenizer, prompt))
        or 1
        for prompt in prompts
    ]


def _asked_last(whole: str, opening: str, closing: str) -> str | None:
    """The user's last message in the text of a prompt, None if there is none; all of the text where
    the opening is unknown."""
    if opening not in whole:
        return None
    if not opening or not whole.endswith(closing):
        return whole.strip()
    return whole.removesuffix(closing).rpartition(opening)[2].strip()


def _around_question(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[str, str]:
    """What a template writes before each message of a user, "" if that is unknown, and what comes
    between it and an answer."""
    question = Message("user", _MARK)
    try:
        before, _, after = template.render([question], add_generation_prompt=True).partition(_MARK)
        later = template.render([question, Message("assistant", _MARK), question]).split(_MARK)[2]
        ids = template.encode([question], tokenizer, add_generation_prompt=True)
    except (DataError, IndexError):  # a template with rules of its own
        return "", ""
    # the same before the first message and the later ones
    n_same = next(
        (n for n in range(min(len(before), len(later))) if before[-1 - n] != later[-1 - n]),
        min(len(before), len(later)),
    )
    opening = before[len(before) - n_same :]
    # some tokenizers decode to a text with other blanks
    return (opening, after) if opening in tokenizer.decode(ids) else ("", "")
