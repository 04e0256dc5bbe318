"""Text to token ids and back: GPT-2's byte-level BPE, built from a file in this repository."""

import binascii
import hashlib
import itertools
import json
from pathlib import Path
from typing import Protocol

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from engine.errors import DataError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
GPT2_FILE = ASSETS / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = "<|endoftext|>"

TOKENIZERS = ("gpt2",)


class Tokenizer(Protocol):
    """What the other rooms use of a tokenizer."""

    name: str
    vocab_size: int
    fingerprint: str  # equal for tokenizers that give the same ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing in a text is a control token."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids; incomplete characters become U+FFFD."""

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json, which other libraries read."""


class GPT2Tokenizer:
    """GPT-2's tokenizer (50,257 tokens), token for token as tiktoken's own "gpt2"."""

    name = "GPT-2"
    fingerprint = f"gpt2-{GPT2_SHA256[:16]}"

    def __init__(self) -> None:
        """Load the vocabulary; raises DataError where the file is missing or altered."""
        self._ranks = _read_ranks(GPT2_FILE, GPT2_SHA256)
        self.end_of_text_id = len(self._ranks)
        self.vocab_size = len(self._ranks) + 1
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=self._ranks,
            special_tokens={END_OF_TEXT: self.end_of_text_id},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text; "<|endoftext|>" inside it is text like any other."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; incomplete characters become U+FFFD."""
        return self._encoding.decode(ids)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json (about 0.4 s)."""
        return json.dumps(byte_level_bpe(self._ranks, END_OF_TEXT), ensure_ascii=False)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that TOKENIZER names."""
    assert name in TOKENIZERS, name
    return GPT2Tokenizer()


def byte_level_bpe(ranks: dict[bytes, int], end_of_text: str) -> dict:
    """A tokenizer.json's content, in the format of Hugging Face tokenizers, from ranked tokens."""
    symbol = byte_symbols()
    vocabulary = {
        "".join(symbol[byte] for byte in token): rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    }
    merges = [
        ["".join(symbol[byte] for byte in part) for part in pair] for pair in merge_pairs(ranks)
    ]
    special = {
        "id": len(ranks),
        "content": end_of_text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary | {end_of_text: len(ranks)},
            "merges": merges,
        },
    }


def merge_pairs(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts that each token of more than a byte was merged from, by rank.

    The last merge that byte-pair encoding makes inside a token, using tokens of lower rank only,
    is the one that created it.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            candidates = [
                (ranks.get(left + right, rank), i)
                for i, (left, right) in enumerate(itertools.pairwise(parts))
            ]
            best, i = min(candidates)
            assert best < rank, f"token {token!r} can't be built from lower ranks"
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs


def byte_symbols() -> list[str]:
    """The printable character by which byte-level BPE files write each byte (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    shown += range(ord("®"), ord("ÿ") + 1)
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def _read_ranks(path: Path, sha256: str) -> dict[bytes, int]:
    """Parse a .tiktoken file (a base64 token and its rank a line) whose hash is known."""
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
