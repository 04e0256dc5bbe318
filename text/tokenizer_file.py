"""Files of tokenizers: tokenizer.json written and checked, .tiktoken read."""

import binascii
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from engine.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pattern with words of at most 64 characters, and a blank before them
SHORT_WORDS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,64}| ?\p{N}{1,64}| ?[^\s\p{L}\p{N}]{1,64}"
    r"|\s{1,64}(?!\S)|\s"
)
MAX_MERGES = 2_000_000
# as a pre-tokenizer, GPT-2's pattern and the symbols of bytes; as a decoder, the way back
BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def check_tokenizer_tree(tree: Any, path: Path) -> None:
    """Raise DataError for a tokenizer.json without a vocabulary of distinct ids 0, 1, 2, ..."""
    fault = None
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        fault = 'it has no "model" with a "vocab"'
    elif not isinstance(added := tree.get("added_tokens") or [], list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("id"), int) for entry in added
    ):
        fault = 'its "added_tokens" are no list of tokens with ids'
    elif not isinstance(merges := model.get("merges") or [], list):
        fault = 'its "merges" are no list'
    elif len(merges) > MAX_MERGES:
        fault = f"it has more than {MAX_MERGES:,} merges"
    elif isinstance(model["vocab"], dict):
        ids = list(model["vocab"].values())
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            fault = "an id in its vocabulary is no whole number"
        elif len(set(ids)) < len(ids):
            twice = next(i for i, count in Counter(ids).items() if count > 1)
            tokens = [token for token, i in model["vocab"].items() if i == twice]
            fault = f"id {twice} stands for several tokens ({', '.join(map(repr, tokens[:3]))})"
        else:
            known = set(ids) | {entry["id"] for entry in added}
            if ids and max(ids) >= len(known):
                fault = f"id {max(ids)} is outside of its vocabulary of {len(known)} tokens"
    if fault:
        raise DataError(
            f"the tokenizer {path} can't be used: {fault}.\n"
            "TOKENIZER takes an intact tokenizer.json, as Hugging Face libraries write it."
        )


def ranks_of(vocabulary: dict[str, int]) -> dict[bytes, int]:
    """The ranks of a byte-level vocabulary by bytes, in order; ValueError if it is none."""
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    ranks = {
        bytes(byte_of[symbol] for symbol in token): rank
        for token, rank in sorted(vocabulary.items(), key=lambda item: item[1])
    }
    is_complete = all(bytes([byte]) in ranks for byte in range(256))
    if list(ranks.values()) != list(range(len(ranks))) or not is_complete:
        raise ValueError("not the ids of a byte-level BPE")
    return ranks


def byte_level_json(
    ranks: dict[bytes, int], special_tokens: dict[str, int], *, short_words: bool = False
) -> dict[str, Any]:
    """A tokenizer.json's content for a byte-level BPE; ranks are in order.

    Its words are those of GPT-2's pattern or, if short_words, of SHORT_WORDS.
    """
    symbols = dict(enumerate(byte_symbols()))
    shown = {token: token.decode("latin-1").translate(symbols) for token in ranks}
    vocabulary = {shown[token]: rank for token, rank in ranks.items()}
    merges = [[shown[left], shown[right]] for left, right in merge_pairs(ranks)]
    pre_tokenizer = split_words(SHORT_WORDS) if short_words else BYTE_LEVEL
    return tokenizer_json(
        vocabulary, merges, special_tokens, pre_tokenizer=pre_tokenizer, decoder=BYTE_LEVEL
    )


def split_words(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer of a byte-level BPE whose words are those of a regular expression."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    steps = [split | {"invert": False}, BYTE_LEVEL | {"use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def tokenizer_json(
    vocabulary: dict[str, int],
    merges: list[list[str]],
    special_tokens: dict[str, int] | None = None,
    *,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
) -> dict[str, Any]:
    """A tokenizer.json's content, in the format of Hugging Face tokenizers.

    The only special token is end-of-text if none are given; it is last unless the vocabulary has
    it. Without a pre-tokenizer, characters outside the vocabulary fall back to bytes.
    """
    if special_tokens is None:
        special_tokens = {END_OF_TEXT: vocabulary.get(END_OF_TEXT, len(vocabulary))}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(i, name) for name, i in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": pre_tokenizer is None,
            "ignore_merges": False,
            "vocab": vocabulary | special_tokens,
            "merges": merges,
        },
    }


def special_token(token_id: int, name: str) -> dict[str, Any]:
    """A special token as a tokenizer.json lists it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name} | flags | {"special": True}


def begin_with(name: str, token_id: int, after: dict[str, Any] | None) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that puts a token before each text, behind another
    one that is there.
    """
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {name: {"id": name, "ids": [token_id], "tokens": [name]}},
    }
    return template if after is None else {"type": "Sequence", "processors": [after, template]}


def vocabulary_json(vocabulary: bytes, merges: bytes) -> dict[str, Any]:
    """A tokenizer.json's content for GPT-2's older files, vocab.json and merges.txt.

    Raises ValueError if they are none.
    """
    ids = json.loads(vocabulary)
    lines = merges.decode("utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if not isinstance(ids, dict) or any(len(pair) != 2 for pair in pairs):
        raise ValueError("they are no vocabulary and no merges")
    return tokenizer_json(ids, pairs, pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL)


def merge_pairs(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that the tokens of two or more bytes were merged from, in the order of ranks.

    Encode a token by the tokens of lower rank: the last merge is the one that created it.
    """
    pairs = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        merged = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
        while len(parts) > 2:
            best = min(merged)
            assert best < rank, f"token {token!r} can't be built from lower ranks"
            i = merged.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            del merged[i]
            for j in (i - 1, i):  # only the pairs beside it have changed
                if 0 <= j < len(merged):
                    merged[j] = ranks.get(parts[j] + parts[j + 1], rank)
        pairs.append((parts[0], parts[1]))
    return pairs


def byte_symbols() -> list[str]:
    """The printable character for each byte in byte-level BPE files: GPT-2's table."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    shown += range(ord("®"), ord("ÿ") + 1)
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def read_ranks(path: Path, sha256: str) -> dict[bytes, int]:
    """Parse a .tiktoken file: a base64 token and its rank per line; DataError if altered."""
    restore = "Restore it from the repository (git checkout -- assets)."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"can't read the tokenizer file {path}: {error.strerror or error}.\n{restore}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(
            f"the tokenizer file {path} has been altered.\n"
            f"Its sha256 is {found},\nit must be {sha256}. {restore}"
        )
    pairs = (line.split() for line in content.splitlines())
    return {binascii.a2b_base64(token): int(rank) for token, rank in pairs}
