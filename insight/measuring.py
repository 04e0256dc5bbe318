"""What is measured about a run beside its training: its text, and on request its model."""

import math
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from engine.console import say
from engine.errors import DataError, first_line
from exchange.saved_run import load_run
from insight.baselines import find_baselines
from insight.copies import CopyIndex, find_copies, open_index
from insight.memorization import ByHeart, measure_answers, measure_by_heart
from insight.run_files import GREEDY, RunFiles
from insight.run_text import RunText, find_answers, sample_tokens, to_bytes
from storage.cache import usable_cache
from text.chat_template import template_of
from text.facts import bz2_bits
from text.spans import measure_repeats

MOST_TRAIN, MOST_VAL = 16_000_000, 2_000_000  # bytes in which copies are looked for
# seconds of looking for copies in a byte, and of compressing one, on a slow processor
COPIES_S, BZ2_S = 2e-7, 2e-7
BZ2_BYTES = 3_600_000  # that a compressor reads at most
PROBE = 1 << 14  # tokens whose bytes are counted
LEAST_S = 0.5  # for more baselines than a compressor's
N_QUESTIONS = 200  # to train on that a chat model is asked, and as many to validate on
MOST_MARKED = 200  # texts of samples in which copied spans are marked


def measure_in_run(text: RunText, limit_s: float) -> dict[str, Any]:
    """What there is time for, of copies in the text and of baselines; empty where for nothing."""
    began_at = time.perf_counter()
    facts: dict[str, Any] = {}
    if COPIES_S * min(len(text.train), MOST_TRAIN) > limit_s:  # a token has a byte at least
        return facts
    size = _bytes_a_token(text)
    n_train = min(len(text.train), int(MOST_TRAIN / size))
    n_val = min(len(text.val), int(MOST_VAL / size))
    if COPIES_S * size * (n_train + n_val) > limit_s:
        return facts
    train = to_bytes(np.asarray(text.train[:n_train]), text.tokenizer)
    val = to_bytes(sample_tokens(text.val, n_val), text.tokenizer)
    facts["repeated"], facts["leaked"] = measure_repeats(train, val)
    left_s = limit_s - (time.perf_counter() - began_at)
    if BZ2_S * min(BZ2_BYTES, 2 * len(train) + 2 * len(val)) <= left_s:
        facts["baselines"] = {"bz2": bz2_bits(train, val)}
        left_s = limit_s - (time.perf_counter() - began_at)
        if LEAST_S <= left_s < math.inf:
            facts["baselines"] = _baselines(text, left_s) | facts["baselines"]
    return facts


def _bytes_a_token(text: RunText) -> float:
    """The mean bytes of a token, from some of the training text; at least 1."""
    probe = sample_tokens(text.train, PROBE)
    return max(1.0, len(to_bytes(probe, text.tokenizer)) / max(1, len(probe)))


def measure_text(text: RunText, limit_s: float) -> dict[str, Any]:
    """Copies in the text, and all baselines, of a sample where limit_s is not enough."""
    facts = measure_in_run(text, math.inf)
    return facts | {"baselines": _baselines(text, limit_s) | facts["baselines"]}


def measure_model(run: RunFiles, text: RunText) -> dict[str, Any]:
    """What a run's model has by heart, and where its samples are copied, prompts left out.

    Raises what load_run() raises.
    """
    index = open_index(text, usable_cache())
    facts: dict[str, Any] = {}
    drawn = [sample for sample in run.samples if not sample.label.startswith(GREEDY)]
    shown = [text for sample in run.samples for text in sample.texts]
    facts["copied"] = {}
    for sample_text in dict.fromkeys(shown[-MOST_MARKED:]):
        begin = run.begin_of_written(sample_text)
        if found := find_copies(index, sample_text[begin:]):
            spans = [[begin + copy.start, begin + copy.stop] for copy in found]
            facts["copied"][sample_text] = spans
    samples = [t[run.begin_of_written(t) :] for s in drawn[-2:] for t in s.texts]
    try:
        facts["by_heart"] = _as_facts(_measure_by_heart(run, text, index, samples))
    except DataError as error:  # the text is too short for a prompt
        say(f"Note: {first_line(error)}")
    return facts


def _measure_by_heart(
    run: RunFiles, text: RunText, index: CopyIndex, samples: list[str]
) -> ByHeart:
    """What a run's model has by heart: passages, or the answers of conversations."""
    model, chat = load_run(run.path).model, run.record.chat
    if chat is None or text.chat is None:
        return measure_by_heart(model, text.tokenizer, text.train, text.val, index, samples=samples)
    answers = find_answers(text, N_QUESTIONS, model.config.context_length)
    ends = template_of(chat.template, text.tokenizer).stop_ids(text.tokenizer)
    return measure_answers(model, text.tokenizer, answers, ends, index, samples=samples)


def _baselines(text: RunText, limit_s: float) -> dict[str, float]:
    if len(text.val) < 2:
        return {}
    found = find_baselines(text.train, text.val, text.tokenizer, limit_s=limit_s)
    names = ("uniform", "unigram", "ngram", "xz")
    return {name: round(getattr(found, name), 4) for name in names}


def _as_facts(meter: ByHeart) -> dict[str, Any]:
    rates = {"extraction_rate": meter.extraction_rate, "guess_rate": meter.guess_rate}
    shares = {
        f"{name}_share": getattr(meter, name).share
        for name in ("samples", "train", "val", "chance")
    }
    return asdict(meter) | rates | shares
