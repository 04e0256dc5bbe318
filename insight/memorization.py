"""What a model has by heart: how much of what it writes is copied from its training text."""

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from engine.errors import DataError
from generation import generate
from insight.copies import CopyIndex
from insight.run_text import DIVIDER, sample_tokens, to_bytes
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
    text: what no learning by heart explains. Of `prompts` prompts of each text the model goes on
    with the very next CONTINUATION tokens of the training text in `extracted` cases, and of the
    validation text in `guessed`.
    """

    samples: Copying
    train: Copying
    val: Copying
    chance: Copying
    prompts: int
    extracted: int
    guessed: int

    @property
    def extraction_rate(self) -> float:
        """The share of training text that can be extracted (Carlini et al. 2023, section 3)."""
        return self.extracted / self.prompts

    @property
    def guess_rate(self) -> float:
        """The same of the validation text, which the model has not seen."""
        return self.guessed / self.prompts


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
    ends_at = time.perf_counter() + limit_s
    known = min(PROMPT, max(1, model.config.context_length // 2))
    probe = sample_tokens(val, 1 << 14)
    size = max(1, len(to_bytes(probe, tokenizer))) / len(probe)
    n_new = max(CONTINUATION, math.ceil(WRITTEN / size))
    generator = np.random.default_rng(seed)
    stretches = [
        _stretches(tokens, known + n_new, n_prompts, tokenizer.end_of_text_id, generator)
        for tokens in (train, val)
    ]
    real: list[list[np.ndarray]] = [[], []]
    written: list[list[np.ndarray]] = [[], []]
    for first in range(0, n_prompts, BATCH):
        for side, of_text in enumerate(stretches):
            part = of_text[first : first + BATCH]
            real[side].append(part[:, known:])
            written[side].append(_continue(model, part[:, :known], n_new))
        if time.perf_counter() >= ends_at:
            break
    (real_train, real_val), (from_train, from_val) = (
        [np.concatenate(parts) for parts in of_both] for of_both in (real, written)
    )

    def copying(rows: np.ndarray) -> Copying:
        return measure_copying(index, (to_bytes(row, tokenizer) for row in rows))

    return ByHeart(
        samples=measure_copying(index, (text.encode("utf-8", "replace") for text in samples)),
        train=copying(from_train),
        val=copying(from_val),
        chance=copying(real_val),
        prompts=len(from_train),
        extracted=_count_equal(from_train, real_train),
        guessed=_count_equal(from_val, real_val),
    )


def _count_equal(written: np.ndarray, real: np.ndarray) -> int:
    """The rows whose first CONTINUATION tokens are the same."""
    return int((written == real)[:, :CONTINUATION].all(axis=1).sum())


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


def _continue(model: GPTModel, prompts: np.ndarray, n_new: int) -> np.ndarray:
    """The likeliest continuations, (B, n_new), of prompts, (B, T)."""
    device = next(model.parameters()).device
    ids = torch.from_numpy(prompts).to(device)
    rows = generate(model, ids, max_new_tokens=n_new, temperature=0.0)
    assert isinstance(rows, torch.Tensor)
    return rows[:, prompts.shape[1] :].cpu().numpy()
