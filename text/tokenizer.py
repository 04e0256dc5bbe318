"""Text to token ids and back: GPT-2's BPE, characters, a BPE of one's own, files from elsewhere."""

import codecs
import errno
import hashlib
import itertools
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from engine.errors import DataError, SettingsError
from text.tokenizer_file import (
    END_OF_TEXT,
    _byte_level_json,
    _check_tokenizer_tree,
    _ranks_of,
    _read_ranks,
    _tokenizer_json,
    byte_symbols,
)

ASSETS = Path(__file__).resolve().parent.parent / "assets"
GPT2_FILE = ASSETS / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_FINGERPRINT = "bpe-120d137cc5382960"
# what files from elsewhere call the token that ends a document
END_NAMES = (
    END_OF_TEXT,
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|im_end|>",
    "[SEP]",
    "<eot>",
)

MAX_TRAINED_VOCABULARY = 100_000
TRAINING_CHARACTERS = 64_000_000  # a trained BPE looks at so many; more change it no further
MAX_TOKENIZER_FILE = 128 << 20
MOST_MERGE_STEPS = 50_000_000  # for finding what tokens were merged from; GPT-2's take 3 million

# \s of the GPT-2 pattern; Python's own \s has four control characters more
_BLANK = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# tried once a run and without stepping back: the search stays linear
_LONG_BLANKS = re.compile(f"(?<![{_BLANK}])[{_BLANK}]{{100000,}}+(?=.)", re.DOTALL)


class Tokenizer(Protocol):
    """What the other rooms use of a tokenizer."""

    name: str
    vocab_size: int
    end_of_text_id: int
    kind: str  # "gpt2", "bpe", "char" or "foreign", for restore_tokenizer
    fingerprint: str  # equal for tokenizers that give the same ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text; nothing in a text is a control token."""

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as an integer array; threads may call it at once."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; incomplete characters become U+FFFD."""

    def decoder(self) -> "Decoder":
        """A decoder for ids that come in one by one."""

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json, which other libraries read."""


class Decoder(Protocol):
    """Turns ids into text as they come in; a character is shown when it is whole, never half."""

    def add(self, token: int) -> str:
        """The characters that this token completes."""

    def finish(self) -> str:
        """What is left at the end, as decode() shows it."""


class ByteTokens:
    """A tokenizer whose every token stands for some bytes: decoding, whole and in a stream."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; incomplete characters become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", "replace")

    def decoder(self) -> "ByteDecoder":
        """A decoder for ids that come in one by one."""
        return ByteDecoder(self.token_bytes)


class ByteDecoder:
    """The Decoder of tokens that stand for bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The characters that this token completes."""
        return self._characters.decode(self._token_bytes(token))

    def finish(self) -> str:
        """What is left at the end, as decode() shows it."""
        return self._characters.decode(b"", final=True)


class BPETokenizer(ByteTokens):
    """Byte-level BPE with GPT-2's pre-tokenizer, run by tiktoken; ids are ranks, then the end."""

    kind = "bpe"

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        self.name = name
        self._ranks = ranks
        self.end_of_text_id = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.fingerprint = _fingerprint(
            "bpe", b"".join(b"%d %b " % (r, t) for t, r in ranks.items())
        )
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text_id},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text; "<|endoftext|>" inside it is text like any other."""
        return [
            token
            for part in _cut_long_blanks(text)
            for token in self._encoding.encode_ordinary(part)
        ]

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as an array; the work is done without Python's lock."""
        parts = [
            self._encoding.encode_to_numpy(part, disallowed_special=())
            for part in _cut_long_blanks(text)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        return self._encoding.decode_single_token_bytes(token)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json (half a second for GPT-2's)."""
        return json.dumps(_byte_level_json(self._ranks), ensure_ascii=False)


class CharTokenizer(ByteTokens):
    """A token for each character of a text; any other character goes as its UTF-8 bytes.

    Ids: the characters in code point order, then the 256 bytes, then end-of-text.
    """

    kind = "char"

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = sorted(set(chars))
        self.name = f"{len(self.chars):,} characters"
        self.first_byte_id = len(self.chars)
        self.end_of_text_id = self.first_byte_id + 256
        self.vocab_size = self.end_of_text_id + 1
        self.stoi = {char: i for i, char in enumerate(self.chars)}
        self.itos = dict(enumerate(self.chars))
        self.fingerprint = _fingerprint("char", "".join(self.chars).encode("utf-8"))
        self._id_of_code = np.full(0x110000, -1, dtype=np.int32)
        self._id_of_code[[ord(char) for char in self.chars]] = np.arange(len(self.chars))

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as an int32 array."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = self._id_of_code[codes]
        unseen = np.flatnonzero(ids < 0)
        if not len(unseen):
            return ids
        parts, start = [], 0
        for at in unseen.tolist():
            encoded = text[at].encode("utf-8", "replace")  # half of a character becomes "?"
            parts += [
                ids[start:at],
                np.frombuffer(encoded, np.uint8) + np.int32(self.first_byte_id),
            ]
            start = at + 1
        return np.concatenate([*parts, ids[start:]])

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        if token < self.first_byte_id:
            return self.itos[token].encode("utf-8")
        if token < self.end_of_text_id:
            return bytes([token - self.first_byte_id])
        if token == self.end_of_text_id:
            return END_OF_TEXT.encode()
        raise KeyError(token)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json: a BPE without merges, with bytes to
        fall back on."""
        vocabulary = self.stoi | {
            f"<0x{byte:02X}>": self.first_byte_id + byte for byte in range(256)
        }
        decoder = {
            "type": "Sequence",
            "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}],
        }
        return json.dumps(
            _tokenizer_json(
                vocabulary,
                merges=[],
                byte_fallback=True,
                pre_tokenizer=None,
                decoder=decoder,
            ),
            ensure_ascii=False,
        )


class ForeignTokenizer:
    """A tokenizer.json from elsewhere, run by the library that defines the format."""

    kind = "foreign"

    def __init__(self, tokenizer: Any, name: str, fingerprint: str) -> None:
        self._tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        self.vocab_size = tokenizer.get_vocab_size()
        ends = (tokenizer.token_to_id(name) for name in END_NAMES)
        self.end_of_text_id = next((end for end in ends if end is not None), None)
        if self.end_of_text_id is None:  # it gets one of its own, behind all others
            self.end_of_text_id = self.vocab_size
            self.vocab_size += 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without tokens that the file would add around it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        """The same ids as an array."""
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; incomplete characters become U+FFFD."""
        known = [int(i) for i in ids if i < self._tokenizer.get_vocab_size()]
        return self._tokenizer.decode(known, skip_special_tokens=False)

    def decoder(self) -> "ForeignDecoder":
        """A decoder for ids that come in one by one."""
        return ForeignDecoder(self.decode)

    def to_json(self) -> str:
        """The file, as the library writes it."""
        return self._tokenizer.to_str()


class ForeignDecoder:
    """The Decoder of tokens that may be joined: the newest ones are decoded again each time."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = ""  # what of the window's text was given out

    def add(self, token: int) -> str:
        """The characters that this token completes."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._shown) :]
        if len(self._window) > 64:
            self._window = self._window[-16:]
            text = self._decode(self._window)
        self._shown = text
        return new

    def finish(self) -> str:
        """What is left at the end, as decode() shows it."""
        return self._decode(self._window)[len(self._shown) :]


# ---------------------------------------------------------------------------------- building


def _fingerprint(kind: str, content: bytes) -> str:
    return f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}"


def _cut_long_blanks(text: str) -> list[str]:
    """Cut very long runs of blanks before their last one: the ids stay what they are.

    GPT-2's pattern takes a run's last blank with the word behind it, and tiktoken's matcher runs
    out of stack when it steps back from a million blanks.
    """
    cuts = [match.end() - 1 for match in _LONG_BLANKS.finditer(text)]
    return [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]


def find_tokenizer_fault(name: str) -> str | None:
    """What is wrong with a value of TOKENIZER, as the end of a sentence, or None."""
    if name in ("gpt2", "char", "auto") or name.endswith(".json"):
        return None
    if trained := re.fullmatch(r"bpe:(\d{1,9})", name):
        size = int(trained[1])
        if 300 <= size <= MAX_TRAINED_VOCABULARY:
            return None
        return f'is "{name}"; its vocabulary must be 300 to {MAX_TRAINED_VOCABULARY:,} tokens'
    return (
        f'is "{name}"; it must be "auto", "gpt2", "char", "bpe:4096" (or another size) or the path '
        "of a tokenizer.json"
    )


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's tokenizer (50,257 tokens), token for token as tiktoken's own "gpt2".

    Raises DataError where its file is missing or altered.
    """

    kind = "gpt2"

    def __init__(self) -> None:
        super().__init__("GPT-2", _read_ranks(GPT2_FILE, GPT2_SHA256))


def make_tokenizer(name: str, texts: Callable[[], Iterable[str]]) -> tuple[Tokenizer, str]:
    """The tokenizer that TOKENIZER names; texts() gives the text that it may be made from.

    Returns it with a few words on what it is. Raises DataError and SettingsError.
    """
    if name == "auto":
        name, why = choose_tokenizer(texts())
        tokenizer, _ = make_tokenizer(name, texts)
        return tokenizer, f"{tokenizer.name}; chosen because {why}"
    if name == "gpt2":
        tokenizer = GPT2Tokenizer()
    elif name == "char":
        tokenizer = CharTokenizer(set().union(*map(set, texts())))
    elif name.endswith(".json"):
        tokenizer = load_tokenizer(name)
    else:
        tokenizer = train_bpe(texts(), int(name.removeprefix("bpe:")))
    return tokenizer, tokenizer.name


def choose_tokenizer(texts: Iterable[str]) -> tuple[str, str]:
    """For "auto": the TOKENIZER that suits a text, and why."""
    sample, characters = [], 0
    for text in texts:
        sample.append(text[: 1_000_000 - characters])
        characters += len(sample[-1])
        if characters >= 1_000_000:
            break
    gpt2 = GPT2Tokenizer()
    rate = sum(len(gpt2.encode_array(text)) for text in sample) / max(1, characters)
    if rate <= 0.5:
        return "gpt2", f"GPT-2's needs {rate:.2f} tokens a character here"
    why = f"GPT-2's would need {rate:.2f} tokens a character"
    if characters < 200_000:
        return "char", f"{why}, and the text is too short to train one on"
    try:
        import tokenizers  # noqa: F401 (asked for here, used in train_bpe)
    except ImportError:
        return "char", f"{why} (pip install tokenizers for one trained on the text)"
    return "bpe:4096", why


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenizer; the same text gives the same ranks.

    vocab_size counts the 256 bytes and end-of-text; a small text may yield fewer. Raises
    SettingsError where the library tokenizers is missing.
    """
    try:
        from tokenizers import Tokenizer as Trainable
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError:
        raise SettingsError(
            f'TOKENIZER = "bpe:{vocab_size}" needs a library: pip install tokenizers'
        ) from None
    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(byte_symbols()),
        show_progress=False,
    )
    trainable.train_from_iterator(_at_most(texts, TRAINING_CHARACTERS), trainer)
    trained = json.loads(trainable.to_str())["model"]
    return BPETokenizer(f"BPE of {len(trained['vocab']) + 1:,} tokens", _ranks_of(trained["vocab"]))


def _at_most(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def load_tokenizer(name: str | Path) -> Tokenizer:
    """GPT-2's tokenizer for "gpt2", else the one in a tokenizer.json: a run's, or from elsewhere.

    Raises DataError where the file is missing, damaged or contradicts itself.
    """
    if name == "gpt2":
        return GPT2Tokenizer()
    path = Path(name).expanduser()
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or device may never end
            raise OSError(errno.EINVAL, "it is no regular file")
        size = found.st_size
        content = path.read_bytes() if size <= MAX_TOKENIZER_FILE else b""
    except OSError as error:
        raise DataError(
            f"can't read the tokenizer {path}: {error.strerror or error}.\n"
            "TOKENIZER names it in the settings."
        ) from error
    if size > MAX_TOKENIZER_FILE:
        raise DataError(
            f"{path} is too large to be a tokenizer.json: {size:,} bytes, "
            f"at most {MAX_TOKENIZER_FILE:,}."
        )
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the tokenizer {path} is not valid JSON: {error}.") from error
    _check_tokenizer_tree(tree, path)
    # in time that grows with the square of a token's length, which a hostile file may choose
    n_steps = sum(len(token) ** 2 for token in tree["model"]["vocab"] if isinstance(token, str))
    for kind in ("bpe", "char") if n_steps <= MOST_MERGE_STEPS else ("char",):
        try:
            own = restore_tokenizer(kind, content)
            same = json.loads(own.to_json()) == tree
        except (AttributeError, KeyError, TypeError, ValueError, AssertionError):  # made otherwise
            continue
        if same:
            return GPT2Tokenizer() if own.fingerprint == GPT2_FINGERPRINT else own
    return restore_tokenizer("foreign", content, path)


def restore_tokenizer(kind: str, content: bytes, path: Path | None = None) -> Tokenizer:
    """The tokenizer of this kind (Tokenizer.kind) whose to_json() the bytes are.

    Only a file from elsewhere, "foreign", may come from a user, at the path named in messages.
    """
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "foreign":
        return _load_foreign(content, path)
    vocabulary = json.loads(content)["model"]["vocab"]
    vocabulary = {token: i for token, i in vocabulary.items() if token != END_OF_TEXT}
    if kind == "char":
        return CharTokenizer([token for token in vocabulary if len(token) == 1])
    return BPETokenizer(f"BPE of {len(vocabulary) + 1:,} tokens", _ranks_of(vocabulary))


def _load_foreign(content: bytes, path: Path | None) -> ForeignTokenizer:
    try:
        import tokenizers
    except ImportError:
        raise SettingsError(f"{path} needs a library: pip install tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception for whatever is wrong
        raise DataError(f"the tokenizer {path} can't be used: {error}.") from error
    tokenizer.no_truncation()  # some files cut or fill up whatever they encode
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # in a text they are text
    name = path.parent.name or path.stem if path else "tokenizer.json"
    return ForeignTokenizer(
        tokenizer,
        f"{name}, {tokenizer.get_vocab_size():,} tokens",
        _fingerprint("json", tokenizer.to_str().encode("utf-8")),
    )


# --------------------------------------------------------------------------------- byte level
