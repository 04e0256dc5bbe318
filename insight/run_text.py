"""The text of a finished run, as tokens and as bytes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import TokenSlice
from engine.errors import CheckpointError, DataError
from planning.decisions import RunRecord, read_record, read_run_file
from storage.cache import usable_cache
from storage.files import DATA
from text.sources import parse_data
from text.token_cache import ChatTokens, TokenizedText, find_tokens, tokenize
from text.tokenizer import (
    GPT2_FINGERPRINT,
    BPETokenizer,
    ByteTokens,
    CharTokenizer,
    Tokenizer,
)

DIVIDER = b"\0"  # stands for an end of text, which has no bytes of its own
PIECE = 1 << 20  # tokens that become bytes at once
PIECES = 64  # that a sample of a text consists of


@dataclass(frozen=True)
class RunText:
    """The tokens that a run learns from and those that it is scored on, mapped from the disk."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str  # of text, tokens and split
    chat: ChatTokens | None = None  # of a text with conversations


@dataclass(frozen=True)
class Answer:
    """What the assistant says in a conversation, and all that comes before it, as tokens."""

    prompt: list[int]
    own: list[int]  # up to the end of its turn


def open_run_text(run: Path) -> RunText:
    """The text of the run in a folder: from the token cache, else read again from its DATA.

    Raises CheckpointError for a folder that is no run, DataError if the text has changed or is
    gone, and what reading raises.
    """
    record, facts = read_record(run), read_run_file(run / DATA)
    try:
        sha256, n_train = str(facts["tokens_sha256"]), int(facts["split"]["train_tokens"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{run / DATA} was not written by this version of the program"
        ) from None
    cache = usable_cache()
    text = find_tokens(cache, sha256) or _read_again(run, record, cache)
    if text.sha256 != sha256 or text.tokenizer.fingerprint != record.tokenizer:
        raise DataError(
            f"the text that {run.name} was trained on has changed: DATA = "
            f"{record.settings['DATA']!r}.\nPut back what it was, or train a new run."
        )
    tokens = TokenSlice(text.path, text.dtype, 0, text.n_tokens).array()
    sides = tokens[:n_train], tokens[n_train:]
    return RunText(*sides, text.tokenizer, f"{sha256}-{n_train}", text.chat)


def _read_again(run: Path, record: RunRecord, cache: Path) -> TokenizedText:
    """The text of a run that the token cache no longer has."""
    is_gpt2 = record.tokenizer == GPT2_FINGERPRINT
    tokenizer = "gpt2" if is_gpt2 else str(run / "tokenizer.json")
    spec, ratio = parse_data(record.settings["DATA"]), record.training.train_ratio
    template = None if record.chat is None else record.chat.template
    return tokenize(
        spec,
        tokenizer,
        ratio,
        cache,
        stand_in=record.stood_in,
        is_free=False,
        chat_template=template,
    )


def find_answers(
    text: RunText, count: int, most: int, seed: int = 0
) -> tuple[list[Answer], list[Answer]]:
    """An answer of each of `count` conversations to train on, and of as many to validate on.

    All conversations are taken where they are fewer. Of one the answer is drawn among those that
    end within `most` tokens of it; the same seed draws the same ones.
    """
    chat, generator = text.chat, np.random.default_rng(seed)
    assert chat is not None, "the text has conversations"
    is_target, n_train = np.fromfile(chat.targets, dtype=bool), len(text.train)
    sides = (
        (text.train, is_target[:n_train], chat.train_starts, chat.train_is_text),
        (text.val, is_target[n_train:], chat.val_starts, chat.val_is_text),
    )
    train, val = (
        list(itertools.islice(_draw_answers(*side, most, generator), count)) for side in sides
    )
    return train, val


def _draw_answers(
    tokens: np.ndarray,
    is_target: np.ndarray,
    starts: np.ndarray,
    is_text: np.ndarray,
    most: int,
    generator: np.random.Generator,
) -> Iterator[Answer]:
    """An answer of each conversation that has one which fits, in a drawn order."""
    stops = np.append(starts, len(tokens))[1:]
    for number in generator.permutation(np.flatnonzero(~is_text)).tolist():
        start, stop = int(starts[number]), int(stops[number])
        counts = np.concatenate(([False], is_target[start:stop], [False]))
        edges = np.flatnonzero(counts[1:] != counts[:-1])  # where answers begin and end, in turn
        pairs = [(begin, end) for begin, end in edges.reshape(-1, 2).tolist() if end <= most]
        if pairs:
            begin, end = pairs[int(generator.integers(len(pairs)))]
            ids = tokens[start : start + end].tolist()
            yield Answer(ids[:begin], ids[begin:])


def sample_tokens(tokens: np.ndarray, size: int) -> np.ndarray:
    """All of some tokens, or `size` of them in PIECES that are spread evenly over them."""
    if len(tokens) <= size:
        return np.asarray(tokens)
    length = max(1, size // PIECES)
    starts = np.linspace(0, len(tokens) - length, max(1, size // length)).astype(np.int64)
    return np.concatenate([tokens[start : start + length] for start in starts])


def to_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """The text of tokens in UTF-8, with a DIVIDER for each end of text."""
    return b"".join(to_byte_pieces(tokens, tokenizer))


def to_byte_pieces(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[bytes]:
    """to_bytes() in pieces of PIECE tokens."""
    for start in range(0, len(tokens), PIECE):
        ids = np.asarray(tokens[start : start + PIECE])
        if isinstance(tokenizer, ByteTokens):
            yield _join(ids, tokenizer)
        else:
            is_end = np.flatnonzero(ids == tokenizer.end_of_text_id)
            bare = (tokenizer.end_of_text_id, *tokenizer.begin_ids)
            documents = [part[~np.isin(part, bare)] for part in np.split(ids, is_end)]
            texts = (tokenizer.decode(part.tolist()) for part in documents)
            yield DIVIDER.join(text.encode("utf-8", "replace") for text in texts)


def count_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The bytes that each token adds to to_bytes(), (N,) int64."""
    if isinstance(tokenizer, ByteTokens):
        return _contents(tokens, tokenizer)[0][tokens]
    decoder, counts = tokenizer.decoder(), np.zeros(len(tokens), dtype=np.int64)
    for place, token in enumerate(np.asarray(tokens).tolist()):
        if token == tokenizer.end_of_text_id:
            rest, decoder = decoder.finish(), tokenizer.decoder()
            counts[place] = len(rest.encode("utf-8", "replace")) + len(DIVIDER)
        elif token not in tokenizer.begin_ids:
            counts[place] = len(decoder.add(token).encode("utf-8", "replace"))
    return counts


def _contents(
    ids: np.ndarray, tokenizer: BPETokenizer | CharTokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """The length of each token of the vocabulary that is among some ids, (V,) int64, else 0; and
    the bytes of all these tokens, one after the other, (N,) uint8."""
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    contents = []
    for token in np.flatnonzero(np.bincount(ids, minlength=len(lengths))).tolist():
        is_end = token == tokenizer.end_of_text_id
        contents.append(DIVIDER if is_end else tokenizer.token_bytes(token))
        lengths[token] = len(contents[-1])
    return lengths, np.frombuffer(b"".join(contents), dtype=np.uint8)


def _join(ids: np.ndarray, tokenizer: BPETokenizer | CharTokenizer) -> bytes:
    """to_bytes() of some tokens that stand for bytes."""
    table, content = _contents(ids, tokenizer)
    lengths, starts = table[ids], np.cumsum(table) - table
    before = np.cumsum(lengths) - lengths
    # of each byte the place among the contents: that of its token, and its own place in the token
    places = np.arange(lengths.sum()) + np.repeat(starts[ids] - before, lengths)
    return content[places].tobytes()
