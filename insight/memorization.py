"""What a model has by heart: how much of what it writes is copied from its training text."""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import DataError
from generation import generate
from insight.copies import CopyIndex
from insight.run_text import DIVIDER, Answer, sample_tokens, to_bytes
from model import GPTModel
from text.tokenizer import Tokenizer

PROMPT = CONTINUATION = 50  # tokens, as Carlini et al. 2023 have them
SPAN = 50  # bytes that count as copied if the training text has them word for word
WRITTEN = 150  # bytes of a continuation at least, so that there are enough spans of SPAN bytes
BATCH = 25  # prompts that are continued at once
TRIES = 20  # random places for each prompt: one without an end of text is taken


@dataclass(frozen=True)
class Copying:
    """How much of some text is copied."""

    n_bytes: int
    longest: int  # bytes of the longest copied span; 0 below copies.LEAST, which are not looked for
    copied: int  # spans of SPAN bytes that the training text has
    spans: int  # of SPAN bytes

    @property
    def share(self) -> float:
        """The share of the spans of SPAN bytes that is copied; 0 where there are none."""
        return self.copied / self.spans if self.spans else 0.0


@dataclass(frozen=True)
class ByHeart:
    """What a model writes by itself (`samples`), and after prompts from both texts.

    `chance` is how much of the real continuations of the validation prompts is in the training
    text: what no learning by heart explains. Of `prompts` prompts of the training text the model
    goes on with its very next CONTINUATION tokens in `extracted` cases, and of `val_prompts` ones
    of the validation text in `guessed`. An answer to a question may be shorter, and ends then with
    its turn.
    """

    samples: Copying
    train: Copying
    val: Copying
    chance: Copying
    prompts: int
    val_prompts: int
    extracted: int
    guessed: int

    @property
    def extraction_rate(self) -> float:
        """The share of training text that can be extracted (Carlini et al. 2023, section 3)."""
        return self.extracted / self.prompts

    @property
    def guess_rate(self) -> float:
        """The same of the validation text, which the model has not seen."""
        return self.guessed / self.val_prompts


def measure_copying(index: CopyIndex, texts: Iterable[bytes]) -> Copying:
    """How much of some texts is copied; none of their spans crosses the end of a document."""
    n_bytes = longest = copied = spans = 0
    for text in itertools.chain.from_iterable(text.split(DIVIDER) for text in texts):
        n_bytes += len(text)
        begins_copy = np.zeros(max(0, len(text) - SPAN + 1), dtype=bool)
        for span in index.spans(text):
            longest = max(longest, span.length)
            if span.length >= SPAN:
                begins_copy[span.start : span.stop - SPAN + 1] = True
        copied += int(begins_copy.sum())
        spans += len(begins_copy)
    return Copying(n_bytes, longest, copied, spans)


def measure_by_heart(
    model: GPTModel,
    tokenizer: Tokenizer,
    train: np.ndarray,
    val: np.ndarray,
    index: CopyIndex,
    *,
    samples: Iterable[str] = (),
    n_prompts: int = 200,
    seed: int = 0,
    limit_s: float = math.inf,
) -> ByHeart:
    """The ByHeart of a model, by greedy continuations of prompts from tokens, (N,) each.

    A prompt has PROMPT tokens, or half the context where that is less. The same seed takes the same
    prompts. After limit_s no further batch of prompts begins. Raises DataError for a text too short
    for a prompt and its continuation.
    """
    known = min(PROMPT, max(1, model.config.context_length // 2))
    n_new = _count_new(val, tokenizer)
    generator = np.random.default_rng(seed)
    sides = []
    for tokens in (train, val):
        stretches = _stretches(
            tokens, known + n_new, n_prompts, tokenizer.end_of_text_id, generator
        ).tolist()
        sides.append([Answer(row[:known], row[known:]) for row in stretches])

    def write(prompts: list[list[int]]) -> list[list[int]]:
        rows = generate(model, prompts, max_new_tokens=n_new, temperature=0.0)
        return [row[known:] for row in rows]

    return _measure(write, sides, tokenizer, index, samples, limit_s=limit_s)


def measure_answers(
    model: GPTModel,
    tokenizer: Tokenizer,
    answers: tuple[Sequence[Answer], Sequence[Answer]],
    ends: Collection[int],
    index: CopyIndex,
    *,
    samples: Iterable[str] = (),
    limit_s: float = math.inf,
) -> ByHeart:
    """The ByHeart of a chat model, by its likeliest answers to questions that it has learnt and to
    those that validate, as find_answers() draws them.

    An answer is known by heart if it is word for word the real one, at most its first CONTINUATION
    tokens. ends are the tokens that end one. After limit_s no further batch of questions begins.
    Raises DataError where no answer fits into the context.
    """
    if not all(answers):
        raise DataError(
            "no answer fits into the context with its question, so it is not measured what is "
            "known by heart."
        )
    real = [token for answer in answers[1] for token in answer.own]
    longest = max(len(answer.own) for side in answers for answer in side)
    n_new = min(longest, _count_new(np.array(real), tokenizer))

    def write(prompts: list[list[int]]) -> list[list[int]]:
        rows = generate(model, prompts, max_new_tokens=n_new, temperature=0.0, stop_ids=[*ends])
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]

    return _measure(write, answers, tokenizer, index, samples, limit_s=limit_s, ends=ends)


def _count_new(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """The tokens of a continuation: CONTINUATION, and those of WRITTEN bytes of this text."""
    probe = sample_tokens(tokens, 1 << 14)
    size = max(1, len(to_bytes(probe, tokenizer))) / len(probe)
    return max(CONTINUATION, math.ceil(WRITTEN / size))


def _measure(
    write: Callable[[list[list[int]]], list[list[int]]],
    sides: Sequence[Sequence[Answer]],
    tokenizer: Tokenizer,
    index: CopyIndex,
    samples: Iterable[str],
    *,
    limit_s: float,
    ends: Collection[int] = (),
) -> ByHeart:
    """What write() makes of prompts from both texts, BATCH at once, beside what is there really."""
    ends_at = time.perf_counter() + limit_s
    written: list[list[list[int]]] = [[], []]
    for first in range(0, max(map(len, sides)), BATCH):
        for answers, rows in zip(sides, written, strict=True):
            if part := answers[first : first + BATCH]:
                rows += write([answer.prompt for answer in part])
        if time.perf_counter() >= ends_at:
            break
    real = [
        [answer.own for answer in answers[: len(rows)]]
        for answers, rows in zip(sides, written, strict=True)
    ]

    def copying(rows: list[list[int]]) -> Copying:
        own = ([token for token in row if token not in ends] for row in rows)
        return measure_copying(index, (to_bytes(np.array(row), tokenizer) for row in own if row))

    def count_equal(side: int) -> int:
        pairs = zip(written[side], real[side], strict=True)
        return sum(row[:CONTINUATION] == own[:CONTINUATION] for row, own in pairs)

    return ByHeart(
        samples=measure_copying(index, (text.encode("utf-8", "replace") for text in samples)),
        train=copying(written[0]),
        val=copying(written[1]),
        chance=copying(real[1]),
        prompts=len(written[0]),
        val_prompts=len(written[1]),
        extracted=count_equal(0),
        guessed=count_equal(1),
    )


def _stretches(
    tokens: np.ndarray, length: int, count: int, end: int, generator: np.random.Generator
) -> np.ndarray:
    """Random stretches of a text, (count, length) int64, without an end of text if it has any."""
    if len(tokens) < length:
        raise DataError(
            f"a text of {len(tokens):,} tokens is too short to measure what is known by heart: "
            f"a prompt and its continuation take {length}."
        )
    starts = generator.integers(0, len(tokens) - length + 1, (TRIES, count))
    chosen = np.asarray(tokens)[starts[0][:, None] + np.arange(length)]
    for more in starts[1:]:
        has_end = np.flatnonzero((chosen == end).any(axis=1))
        chosen[has_end] = tokens[more[has_end][:, None] + np.arange(length)]
    return chosen.astype(np.int64)
