"""The prompt of samples: the shipped one, or the text's own beginning where that does not fit."""

import dataclasses
import re
import unicodedata

import numpy as np

from engine.settings import shown
from text.token_cache import TokenizedText
from training_utils import TrainingConfig

SEEN_TOKENS = 20_000  # of the training text, to see its script
LEAST_LATIN = 0.2  # of the letters, for the shipped English prompt
MOST_CHARACTERS = 16  # of a prompt from the text


def fit_prompt(asked: TrainingConfig, text: TokenizedText) -> tuple[TrainingConfig, list[str]]:
    """The hyper-parameters with a start_context in the text's script, and a notice if it is new.

    Only the default is replaced, by the beginning of the text. A run on conversations has questions
    of them as prompts.
    """
    if text.chat is not None or asked.start_context != TrainingConfig().start_context:
        return asked, []
    ids = np.fromfile(text.path, dtype=text.dtype, count=min(SEEN_TOKENS, text.n_tokens))
    ids = ids[~np.isin(ids, text.tokenizer.begin_ids)]
    prompt = _beginning_if_not_latin(text.tokenizer.decode(ids.tolist()))
    if prompt is None:
        return asked, []
    notice = (
        f"samples go on from {shown(prompt)}, the beginning of the text, as the default prompt is "
        'English; custom_params["start_context"] sets another'
    )
    return dataclasses.replace(asked, start_context=prompt), [notice]


def _beginning_if_not_latin(sample: str) -> str | None:
    """The first words of a text whose letters are hardly ever Latin; None for another text."""
    letters = [sign for sign in sample if sign.isalpha()]
    latin = sum(unicodedata.name(sign, "").startswith("LATIN") for sign in letters)
    if letters and latin >= LEAST_LATIN * len(letters):
        return None
    for line in sample.splitlines():
        words = " ".join(line.split()).strip("\ufeff\ufffd")
        clause = re.split(r"[，。！？；：、,.!?;:।۔]", words)[0] or words
        if len(clause) > MOST_CHARACTERS:
            cut = clause[: MOST_CHARACTERS + 1]
            clause = cut.rpartition(" ")[0] or cut[:-1]
        if clause.strip():
            return clause
    return None
