"""What simple models and compressors make of a validation text: the figures to be better than."""

import bz2
import lzma
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from insight.run_text import DIVIDER, sample_tokens, to_bytes
from text.tokenizer import Tokenizer

ORDER = 5  # of the Kneser-Ney model: it predicts a token from the four before it
MOST_TOKENS = 12_000_000  # of the training text that it counts: half a gigabyte of memory
MOST_XZ_BYTES = 16 << 20  # of the training text that xz keeps: 200 MB of memory
MOST_VAL_TOKENS = 1_000_000
PROBE = 1 << 14  # tokens that are measured in any case
MARGIN = 0.7  # of the time left, for a measurement whose time is known from a smaller one
# the discounts where the counts are too few for an estimate, as in KenLM
USUAL_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Baselines:
    """Bits a byte of a validation text, by what knows ever more of it.

    The shares are those of the training text that was counted, for lack of time or memory.
    """

    uniform: float  # every token is as likely as any other
    unigram: float  # the tokens' frequencies in the training text
    ngram: float  # an interpolated modified Kneser-Ney 5-gram of the training text
    bz2: float  # the validation text compressed by itself
    xz: float  # compressed behind the training text: finds whatever is copied from there
    ngram_share: float
    xz_share: float
    bytes_per_token: float  # of the validation text
    took_s: float

    def in_nats(self) -> dict[str, float]:
        """Each of them as a loss in nats a token, by its name."""
        nats = math.log(2) * self.bytes_per_token
        names = ("uniform", "unigram", "ngram", "bz2", "xz")
        return {name: getattr(self, name) * nats for name in names}


def find_baselines(
    train: np.ndarray, val: np.ndarray, tokenizer: Tokenizer, *, limit_s: float = 30.0
) -> Baselines:
    """The Baselines of tokens, (N,) each, of which `val` has two or more.

    Of a large text an evenly spread sample is counted, as much as the time limit and a bounded
    memory allow; a first, small one takes some 0.1 s in any case. An end of text has no bytes. The
    first token is not scored: no model scores it.
    """
    began_at = time.perf_counter()
    ends_at = began_at + limit_s
    scored = sample_tokens(val, MOST_VAL_TOKENS)
    size = _size_of(scored[1:], tokenizer) / (len(scored) - 1)
    bits = math.log(2) * size  # nats a token of one bit a byte
    counts = np.bincount(sample_tokens(train, MOST_TOKENS), minlength=tokenizer.vocab_size)
    # one is added to every count, for the tokens that do not occur
    rates = np.log((counts + 1) / (counts.sum() + tokenizer.vocab_size))

    def ngram(n_tokens: int) -> float:
        part = sample_tokens(val, _val_share(n_tokens))
        nats = kneser_ney_nats(sample_tokens(train, n_tokens), part, tokenizer.vocab_size)
        return nats.sum().item() / math.log(2) / _size_of(part[1:], tokenizer)

    def xz(n_tokens: int) -> float:
        before = to_bytes(sample_tokens(train, n_tokens), tokenizer)
        part = sample_tokens(val, _val_share(n_tokens))
        packed = xz_bytes_behind(before, to_bytes(part, tokenizer))
        return 8 * packed / _size_of(part, tokenizer)

    most_of_xz = max(PROBE, int(MOST_XZ_BYTES / size))
    most = (min(len(train), MOST_TOKENS), min(len(train), most_of_xz))
    bz2_bits = _bz2_bits(val, tokenizer, limit_s)
    of_ngram, n_counted = _largest(ngram, most[0], (ends_at - time.perf_counter()) / 2)
    of_xz, n_kept = _largest(xz, most[1], ends_at - time.perf_counter())
    return Baselines(
        uniform=math.log(tokenizer.vocab_size) / bits,
        unigram=-rates[scored[1:]].mean().item() / bits,
        ngram=of_ngram,
        bz2=bz2_bits,
        xz=of_xz,
        ngram_share=n_counted / len(train),
        xz_share=n_kept / len(train),
        bytes_per_token=size,
        took_s=time.perf_counter() - began_at,
    )


def _val_share(n_train: int) -> int:
    """How many validation tokens are scored where so many of the training text are counted."""
    return min(MOST_VAL_TOKENS, max(PROBE, n_train // 4))


def _size_of(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """The bytes of tokens without those that divide documents; at least 1."""
    n_ends = np.count_nonzero(tokens == tokenizer.end_of_text_id)
    return max(1, len(to_bytes(tokens, tokenizer)) - int(n_ends) * len(DIVIDER))


def _bz2_bits(val: np.ndarray, tokenizer: Tokenizer, limit_s: float) -> float:
    part = sample_tokens(val, MOST_VAL_TOKENS if limit_s > 1 else PROBE)
    packed = len(bz2.compress(to_bytes(part, tokenizer)))
    return 8 * packed / _size_of(part, tokenizer)


def _largest(measure: Callable[[int], float], most: int, limit_s: float) -> tuple[float, int]:
    """A measurement of as many tokens as the time allows, at most `most`; and how many."""
    ends_at = time.perf_counter() + limit_s
    size = min(most, PROBE) if math.isfinite(limit_s) else most
    while True:
        began_at = time.perf_counter()
        value = measure(size)
        ended_at = time.perf_counter()
        fitting = size * MARGIN * max(0.0, ends_at - ended_at) / (ended_at - began_at)
        # a small part tells little of the speed of one that outgrows the processor's cache
        larger = int(min(most, fitting, 32 * size))
        if size == most or larger < min(most, 2 * size):
            return value, size
        size = larger


# -------------------------------------------------------------------------- the 5-gram


def kneser_ney_nats(
    train: np.ndarray, val: np.ndarray, vocab_size: int, order: int = ORDER
) -> np.ndarray:
    """The loss of each token of `val` but the first, (N - 1,), in nats, by the n-grams of `train`.

    Interpolated modified Kneser-Ney (Chen & Goodman 1999, 3.1 and 4): the longest n-grams count how
    often they occur, shorter ones how many different tokens precede them. Each order has its own
    three discounts, and below the first one every token is equally likely.
    """
    probability = np.full(len(val), 1 / vocab_size)
    # the number of the n-gram that begins at each place; -1 in val: train does not have it
    ids, of_val = train.astype(np.int32), val.astype(np.int32)
    context_of = np.zeros(vocab_size, dtype=np.int32)  # the number of each n-gram without its last
    of_val_before = np.zeros(len(val) + 1, dtype=np.int32)
    n_contexts = 1
    for n in range(1, min(order, len(train), len(val)) + 1):
        n_grams = len(context_of)
        is_longest = n == min(order, len(train))
        if is_longest:
            counts = np.bincount(ids, minlength=n_grams)
        else:
            keys = ids[:-1].astype(np.int64) * vocab_size + train[n:]
            longer, found, places = _number(keys, n_grams * vocab_size)
            counts = np.bincount(ids[places + 1], minlength=n_grams)
        discounts = find_discounts(counts)[np.minimum(counts, 3)]
        totals = np.bincount(context_of, counts, n_contexts)
        held = np.bincount(context_of, discounts, n_contexts)  # what the shorter n-grams get

        gram, context = of_val, of_val_before[: len(of_val)]
        of_gram = np.where(gram >= 0, np.maximum(counts - discounts, 0)[gram], 0.0)
        known = (context >= 0) & (totals[context] > 0)
        shorter = probability[n - 1 :]
        mixed = of_gram + held[context] * shorter
        probability[n - 1 :] = np.where(known, mixed / np.maximum(totals[context], 1), shorter)
        if is_longest:
            break
        of_val_before, of_val = of_val, _look_up(of_val[:-1], val[n:], found, vocab_size)
        context_of, n_contexts = (found // vocab_size).astype(np.int32), n_grams
        ids = longer
    return -np.log(probability[1:])


def find_discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken off a count of 0, 1, 2, and 3 or more, (4,), by the numbers of n-grams that
    have a count of 1 to 4 (Chen & Goodman 1999, equation 26)."""
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
    if 0 in (n1, n2, n3):
        return np.array([0.0, *USUAL_DISCOUNTS])
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    if not all(0 <= discount <= k for k, discount in enumerate(found, start=1)):
        return np.array([0.0, *USUAL_DISCOUNTS])
    return np.array([0.0, *found])


def _number(keys: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of each key below a limit, (N,) int32, among the distinct ones in order, (U,);
    those; and a place of each."""
    n_bits = max(1, (len(keys) - 1).bit_length())
    if limit << n_bits <= 1 << 64:  # sorting both together is faster than an argsort
        packed = keys.astype(np.uint64) << np.uint64(n_bits)
        packed |= np.arange(len(keys), dtype=np.uint64)
        packed.sort()
        order = (packed & np.uint64((1 << n_bits) - 1)).astype(np.int64)
        ordered = (packed >> np.uint64(n_bits)).astype(np.int64)
        del packed
    else:
        order = np.argsort(keys)
        ordered = keys[order]
    is_new = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    numbers = np.empty(len(keys), dtype=np.int32)
    numbers[order] = np.cumsum(is_new, dtype=np.int32) - np.int32(1)
    return numbers, ordered[is_new], order[is_new]


def _look_up(ids: np.ndarray, last: np.ndarray, found: np.ndarray, vocab_size: int) -> np.ndarray:
    """The numbers, (N,), of n-grams that go on with a last token; -1 where there is none."""
    keys = ids.astype(np.int64) * vocab_size + last  # negative where the beginning is unknown
    places = np.minimum(np.searchsorted(found, keys), len(found) - 1)
    return np.where(found[places] == keys, places, -1).astype(np.int32)


# ---------------------------------------------------------------------------------- xz


def xz_bytes_behind(before: bytes, text: bytes) -> int:
    """The bytes that LZMA takes for a text behind another one, whose content it may refer to."""
    size = max(1 << 16, len(before) + len(text))
    dictionary = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": size}

    def packed(content: bytes) -> int:
        return len(lzma.compress(content, lzma.FORMAT_RAW, filters=[dictionary]))

    with ThreadPoolExecutor(2) as pool:  # LZMA releases Python's global lock
        both, alone = pool.map(packed, (before + text, before))
    return both - alone
