"""Text to token ids and back: GPT-2's BPE, a trained BPE, characters, any tokenizer.json."""

import codecs
import collections
import errno
import functools
import hashlib
import importlib
import itertools
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from engine.errors import DataError, SettingsError
from text.learn_bpe import learn_bpe
from text.tokenizer_file import (
    END_OF_TEXT,
    SHORT_WORDS,
    begin_with,
    byte_level_json,
    check_tokenizer_tree,
    ranks_of,
    read_ranks,
    special_token,
    tokenizer_json,
)

GPT2_FILE = Path(__file__).resolve().parent.parent / "assets" / "gpt2.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_FINGERPRINT = "bpe-120d137cc5382960"
# what other tokenizers call the token that ends a document, where none is declared
END_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]", "<eot>", "<|im_end|>")
BEGIN_NAMES = ("<|begin_of_text|>", "<s>", "<bos>")  # the one that begins a document
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")  # those that end a turn
# of an added token in a tokenizer.json: it ends a document; other programs ignore it
ENDS_TEXT = "ends_text"

MAX_TRAINED_VOCABULARY = 100_000
TRAINING_CHARACTERS = 64_000_000  # to train a BPE on at most; more make no difference
MAX_TOKENIZER_FILE = 128 << 20
MOST_MERGE_STEPS = 50_000_000  # to find the merges of a vocabulary; GPT-2's takes 3 million

# \s of GPT-2's pattern; Python's \s has four more control characters
BLANK = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
KEPT_IDS = 16  # that a ForeignDecoder decodes again, so that the next one has neighbors
LONGEST_WORD = 1 << 14  # characters of a run that GPT-2's pattern can't cut; a multiple of 64
RUN = re.compile(rf"[^\W\d_]+|\d+|[{BLANK}]+|(?:[^\w{BLANK}]|_)+")  # letters, digits, blanks, marks
_IS_BLANK = re.compile(f"[{BLANK}]")
Ends = Sequence[str | int]  # tokens, by name or id


class ByteTokens:
    """What the tokenizers share whose tokens stand for bytes."""

    begin_ids: tuple[int, ...] = ()  # as ForeignTokenizer's

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; invalid and incomplete UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", "replace")

    def decoder(self, after: Sequence[int] = ()) -> "ByteDecoder":
        """A decoder for ids that arrive one by one, after others."""
        return ByteDecoder(self.token_bytes)

    def token_text(self, token: int) -> str:
        """The text of a token after others."""
        return self.decode([token])


class ByteDecoder:
    """Decodes bytes as they arrive, and returns complete characters only."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The characters that this token completes."""
        return self._characters.decode(self._token_bytes(token))

    def finish(self) -> str:
        """The incomplete rest, as decode() shows it."""
        return self._characters.decode(b"", final=True)


class BPETokenizer(ByteTokens):
    """Byte-level BPE with GPT-2's pre-tokenizer, run by tiktoken.

    The ids are the ranks, which ranks has in order, end-of-text, and the further special tokens
    that are added. With short_words, no word of the pre-tokenizer is longer than 64 characters, and
    a blank before them.
    """

    kind = "bpe"

    def __init__(
        self,
        name: str,
        ranks: dict[bytes, int],
        *,
        short_words: bool = False,
        added: Iterable[str] = (),
    ) -> None:
        self.name = name
        self._ranks, self.short_words = ranks, short_words
        self.special_tokens = _numbered([END_OF_TEXT, *added], len(ranks))
        self.end_of_text_id = len(ranks)
        self.vocab_size = len(ranks) + len(self.special_tokens)
        self.fingerprint = _fingerprint(
            "bpe",
            b"".join(b"%d %b " % (r, t) for t, r in ranks.items())
            + (SHORT_WORDS.encode() if short_words else b"")
            + _added_bytes(self.special_tokens),
        )
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=SHORT_WORDS if short_words else r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text; "<|endoftext|>" in it is text, and lone surrogates become U+FFFD."""
        parts = self._parts(text)
        return [token for part in parts for token in self._encoding.encode_ordinary(part)]

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text without lone surrogates as an array; releases Python's global lock."""
        parts = [
            self._encoding.encode_to_numpy(part, disallowed_special=())
            for part in self._parts(text)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _parts(self, text: str) -> list[str]:
        return [text] if self.short_words else cut_long_words(text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        return self._encoding.decode_single_token_bytes(token)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json (half a second for GPT-2's)."""
        tree = byte_level_json(self._ranks, self.special_tokens, short_words=self.short_words)
        return json.dumps(tree, ensure_ascii=False)

    def adding(self, names: Iterable[str]) -> "BPETokenizer":
        """This tokenizer with further special tokens."""
        added = _added(self.special_tokens, names)
        name = _bpe_name(self.end_of_text_id + 1 + len(added))
        return BPETokenizer(name, self._ranks, short_words=self.short_words, added=added)


class CharTokenizer(ByteTokens):
    """A token for each of some characters; all other characters are encoded as UTF-8 bytes.

    The ids are the characters in code point order, the 256 bytes, end-of-text, and the further
    special tokens that are added.
    """

    kind = "char"

    def __init__(self, chars: Iterable[str], *, added: Iterable[str] = ()) -> None:
        self.chars = sorted(set(chars))
        self.name = f"{len(self.chars):,} characters"
        self.first_byte_id = len(self.chars)
        self.end_of_text_id = self.first_byte_id + 256
        self.special_tokens = _numbered([END_OF_TEXT, *added], self.end_of_text_id)
        self.vocab_size = self.end_of_text_id + len(self.special_tokens)
        self.stoi = {char: i for i, char in enumerate(self.chars)}
        self.itos = dict(enumerate(self.chars))
        content = "".join(self.chars).encode("utf-8") + _added_bytes(self.special_tokens)
        self.fingerprint = _fingerprint("char", content)
        self._id_of_code = np.full(0x110000, -1, dtype=np.int32)
        self._id_of_code[[ord(char) for char in self.chars]] = np.arange(len(self.chars))

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text as an int32 array."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = self._id_of_code[codes]
        unseen = np.flatnonzero(ids < 0)
        if not len(unseen):
            return ids
        parts, start = [], 0
        for at in unseen.tolist():
            encoded = text[at].encode("utf-8", "replace")  # a lone surrogate becomes "?"
            byte_ids = np.frombuffer(encoded, np.uint8) + np.int32(self.first_byte_id)
            parts += [ids[start:at], byte_ids]
            start = at + 1
        return np.concatenate([*parts, ids[start:]])

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        if token < self.first_byte_id:
            return self.itos[token].encode("utf-8")
        if token < self.end_of_text_id:
            return bytes([token - self.first_byte_id])
        if token < self.vocab_size:
            return list(self.special_tokens)[token - self.end_of_text_id].encode()
        raise KeyError(token)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json: a BPE without merges."""
        bytes_ = {f"<0x{byte:02X}>": self.first_byte_id + byte for byte in range(256)}
        decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
        tree = tokenizer_json(
            self.stoi | bytes_, [], self.special_tokens, pre_tokenizer=None, decoder=decoder
        )
        return json.dumps(tree, ensure_ascii=False)

    def adding(self, names: Iterable[str]) -> "CharTokenizer":
        """This tokenizer with further special tokens."""
        return CharTokenizer(self.chars, added=_added(self.special_tokens, names))


class ForeignTokenizer:
    """Any other tokenizer.json, run by the library that defines the format.

    ends are the tokens that a model's files declare as its end; a special token among them that
    ends no turn ends a document. begin_ids has the token that the file puts before each text, if
    it is one: each document and each prompt begins with it, and encode() doesn't add it.
    """

    kind = "foreign"

    def __init__(self, tokenizer: Any, name: str, ends: Ends = ()) -> None:
        self._tokenizer = tokenizer
        self.name = name
        ids = tokenizer.get_vocab()  # an added token's id may be beyond their number
        self.vocab_size = max(ids.values(), default=-1) + 1
        added = tokenizer.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: i for i, token in added if token.special}
        guessed = next((name for name in END_NAMES if name in ids), None)
        end = _declared_end(self.special_tokens, ends, guessed)
        self._is_declared = end != guessed
        self.adds_end = end is None  # then the last id is an end-of-text of its own
        self.end_of_text = end or END_OF_TEXT
        self.end_of_text_id: int = ids.get(self.end_of_text, self.vocab_size)
        self.vocab_size += self.adds_end
        self.special_tokens[self.end_of_text] = self.end_of_text_id
        leading = _leading(tokenizer)
        self.begin_ids = tuple(leading.values()) if len(leading) == 1 else ()
        if self.begin_ids:
            self.special_tokens |= leading
        self.fingerprint = _fingerprint("json", self.to_json().encode("utf-8"))
        bytes_ = {ids.get(f"<0x{byte:02X}>"): byte for byte in range(256)}
        is_fallback = tokenizer.decode([i for i, byte in bytes_.items() if byte == ord("A")]) == "A"
        # the bytes of tokens that stand for one each, where the file decodes them so
        self.byte_of = {i: byte for i, byte in bytes_.items() if i is not None and is_fallback}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the special tokens that the file adds around it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text as an array; releases Python's global lock."""
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32)

    def encode_part(self, before: str, text: str, after: str) -> np.ndarray:
        """The ids that a part of a document has in the whole one, as an array.

        before and after are the text around it, from where no token depends on what is farther
        away. A part that begins or ends within a token is encoded by itself.
        """
        if not before and not after:
            return self.encode_array(text)
        first, end = len(before), len(before) + len(text)
        ids, starts, ends = self._spans(before + text + after)
        if any(((starts < place) & (ends > place)).any() for place in (first, end)):
            return self.encode_array(text)
        return ids[(starts >= first) & ((starts < end) | (not after))]

    def overhang(self, before: str, after: str) -> int:
        """How many characters of after belong to a token that begins in before."""
        _, starts, ends = self._spans(before + after)
        return max(0, ends[starts < len(before)].max(initial=0) - len(before))

    def _spans(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of a text, and where each begins and ends; releases Python's global lock."""
        [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=False)
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        return np.array(encoding.ids, dtype=np.uint32), starts, ends

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; invalid and incomplete UTF-8 becomes U+FFFD."""
        known, text = [int(i) for i in ids if i < self.vocab_size], ""
        if not self.byte_of:
            return self._tokenizer.decode(known, skip_special_tokens=False)
        # the library has U+FFFD for each of neighboring bytes where one is wrong
        for are_bytes, part in itertools.groupby(known, self.byte_of.__contains__):
            if are_bytes:
                text += bytes(map(self.byte_of.__getitem__, part)).decode("utf-8", "replace")
            elif not text:
                text = self._tokenizer.decode(list(part), skip_special_tokens=False)
            else:
                text += self._after_letter(part)
        return text

    def decoder(self, after: Sequence[int] = ()) -> "ForeignDecoder":
        """A decoder for ids that arrive one by one, after others.

        A text begins anew behind a special token, as it is encoded.
        """
        near, special = after[-KEPT_IDS:], self.special_tokens.values()
        start = next((i for i in range(len(near), 0, -1) if near[i - 1] in special), 0)
        return ForeignDecoder(self, near[start:])

    def token_text(self, token: int) -> str:
        """The text of a token after others: a blank before it is lost where it begins a text."""
        return self._after_letter([token])

    def _after_letter(self, ids: Iterable[int]) -> str:
        letter, shown = self.letter
        return self._tokenizer.decode([*letter, *ids], skip_special_tokens=False)[len(shown) :]

    @functools.cached_property
    def letter(self) -> tuple[list[int], str]:
        """Ids that no text is changed behind, and their own text; none where there is no letter."""
        try:
            ids = self.encode("a")
        except Exception:  # as in _leading()
            ids = []
        return ids, self._tokenizer.decode(ids)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json, as the library writes it.

        An end of a document that its name does not tell is marked by ENDS_TEXT.
        """
        content = self._tokenizer.to_str()
        if not self._is_declared:
            return content
        tree = json.loads(content)
        for entry in tree["added_tokens"]:
            if entry["content"] == self.end_of_text:
                entry[ENDS_TEXT] = True
        return json.dumps(tree, ensure_ascii=False)

    def frame(self) -> list[str]:
        """The special tokens that the file puts around a text, and that no text gets here."""
        encoding = self._tokenizer.encode("")
        pairs = zip(encoding.tokens, encoding.special_tokens_mask, strict=True)
        return [token for token, is_special in pairs if is_special][len(self.begin_ids) :]

    def adding(self, names: Iterable[str]) -> "ForeignTokenizer":
        """This tokenizer with further special tokens; an end-of-text of its own keeps its id."""
        names = [self.end_of_text] * self.adds_end + list(names)
        ids = self._tokenizer.get_vocab()
        new = [name for name in names if name not in ids]
        ids |= _numbered(new, self.vocab_size - self.adds_end)
        tree = json.loads(self.to_json())
        kept = [entry for entry in tree["added_tokens"] if entry["content"] not in names]
        tree["added_tokens"] = [*kept, *(special_token(ids[name], name) for name in names)]
        tree["added_tokens"].sort(key=lambda entry: entry["id"])
        found = _load_foreign(json.dumps(tree, ensure_ascii=False).encode("utf-8"), None)
        found.name = f"{self.name}, and {', '.join(names)}"
        return found


def _leading(tokenizer: Any) -> dict[str, int]:
    """The special tokens that a tokenizer of the library puts before a text."""
    try:
        encoding = tokenizer.encode("a")
    except Exception:  # the library raises that where its vocabulary has no such letter
        return {}
    if all(encoding.special_tokens_mask):  # the text is not there to tell before from after
        return {}
    n_before = encoding.special_tokens_mask.index(0)
    return dict(zip(encoding.tokens[:n_before], encoding.ids[:n_before], strict=True))


def _declared_end(special_tokens: dict[str, int], ends: Ends, guessed: str | None) -> str | None:
    """The special token that is declared to end a document, else the one that is guessed.

    A chat model may declare the end of a turn alone, which is that of a document only where
    nothing else is.
    """
    named = {i: name for name, i in special_tokens.items()}
    names = [named.get(end) if isinstance(end, int) else end for end in ends]
    known = [name for name in names if name is not None and name in special_tokens]
    of_text = (name for name in known if name not in TURN_ENDS)
    return next(of_text, guessed or next(iter(known), None))


class ForeignDecoder:
    """Decodes ids of a ForeignTokenizer as they arrive, and returns complete characters only.

    The text of a token may depend on its neighbors, so that the newest ones are decoded each time;
    tokens that are bytes are decoded by themselves: one that is wrong harms no other.
    """

    def __init__(self, tokenizer: ForeignTokenizer, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[int] = []
        self._shown = ""  # the text of the window that add() has returned
        for token in after:
            self.add(token)
        self._shown = tokenizer.decode(self._window)  # also a character that can't be completed

    def add(self, token: int) -> str:
        """The characters that this token completes."""
        if (byte := self._tokenizer.byte_of.get(token)) is not None:
            self._window, self._shown = self._tokenizer.letter
            return self._characters.decode(bytes([byte]))
        before = self._characters.decode(b"", final=True)
        self._window = [*self._window, token]
        text = self._tokenizer.decode(self._window)
        if text.endswith("\ufffd"):
            return before
        new = text[len(self._shown) :]
        if len(self._window) > 4 * KEPT_IDS:
            self._window = self._window[-KEPT_IDS:]
            text = self._tokenizer.decode(self._window)
        self._shown = text
        return before + new

    def finish(self) -> str:
        """The incomplete rest, as decode() shows it."""
        rest = self._tokenizer.decode(self._window)[len(self._shown) :]
        return self._characters.decode(b"", final=True) + rest


# kind is for restore_tokenizer(); fingerprint is equal for tokenizers that give the same ids
Tokenizer = BPETokenizer | CharTokenizer | ForeignTokenizer


def _fingerprint(kind: str, content: bytes) -> str:
    return f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}"


def _numbered(names: Iterable[str], first: int) -> dict[str, int]:
    return {name: i for i, name in enumerate(names, start=first)}


def _added(special_tokens: dict[str, int], names: Iterable[str]) -> list[str]:
    """The special tokens beside end-of-text, and further ones."""
    return [name for name in special_tokens if name != END_OF_TEXT] + list(names)


def _added_bytes(special_tokens: dict[str, int]) -> bytes:
    """What a fingerprint has of special tokens beside end-of-text."""
    return "".join(f"\n{name}" for name in _added(special_tokens, ())).encode()


def cut_long_words(text: str) -> list[str]:
    """Cut each run of more than LONGEST_WORD letters, digits, marks or blanks after every
    LONGEST_WORD of them, and one of blanks before its last, which GPT-2's pattern joins to the
    next word.

    tiktoken takes seconds for a word of a million letters, and its matcher overflows its stack
    when it backtracks over a million blanks.
    """
    step = LONGEST_WORD // 2  # a run of LONGEST_WORD contains all of [at, at + step) for some at
    cuts = [0]
    at = 0
    while at + step <= len(text):
        end = RUN.match(text, at).end()  # type: ignore[union-attr]
        if end - at < step:
            at += step
            continue
        before = text[max(0, at - step) : at + 1]
        start = at + 1 - RUN.match(before[::-1]).end()  # type: ignore[union-attr]
        cuts += range(start + LONGEST_WORD, end, LONGEST_WORD)
        if end < len(text) and _IS_BLANK.match(text, at) and end - 1 > cuts[-1]:
            cuts.append(end - 1)
        at = -(-end // step) * step
    return [text[i:j] for i, j in itertools.pairwise([*cuts, len(text)])]


def find_tokenizer_fault(name: str) -> str | None:
    """What is wrong with a value of TOKENIZER, as the end of a sentence; None if it is valid."""
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
    """GPT-2's tokenizer, with the 50,257 ids of tiktoken's "gpt2".

    Raises DataError if its file is missing or altered.
    """

    kind = "gpt2"

    def __init__(self) -> None:
        super().__init__("GPT-2", read_ranks(GPT2_FILE, GPT2_SHA256))


def make_tokenizer(name: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that TOKENIZER names; "auto" names none.

    texts() streams the text to make it from. Raises DataError and SettingsError.
    """
    if name == "char":
        chars: set[str] = set()
        for text in texts():
            chars.update(text)
        return CharTokenizer(chars)
    if name == "gpt2" or name.endswith(".json"):
        return load_tokenizer(name)
    return train_bpe(texts(), int(name.removeprefix("bpe:")))


def can_train() -> bool:
    """Whether train_bpe() has the library that it needs."""
    try:
        importlib.import_module("tokenizers")
    except ImportError:  # also of one that is there and broken
        return False
    return True


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE with short words; the same text gives the same ranks.

    vocab_size includes the 256 bytes and end-of-text; a small text may yield fewer tokens. Raises
    SettingsError if the library tokenizers is missing, ResourceError if training fails.
    """
    if not can_train():
        raise SettingsError(
            f'TOKENIZER = "bpe:{vocab_size}" needs a library: pip install tokenizers'
        )
    pieces = _at_most(texts, TRAINING_CHARACTERS)
    vocabulary = learn_bpe(pieces, vocab_size - 1, SHORT_WORDS)
    collections.deque(pieces, maxlen=0)  # errors of reading come before an hour of encoding
    name = _bpe_name(len(vocabulary) + 1)
    return BPETokenizer(name, ranks_of(vocabulary), short_words=True)


def _at_most(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The first characters of some texts; reads all of them, for the errors that reading raises."""
    for text in texts:
        if characters > 0:
            yield text[:characters]
        characters -= len(text)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """GPT-2's tokenizer for "gpt2", else that of a tokenizer.json, of a run or of other origin.

    Raises DataError if the file is missing, damaged or inconsistent.
    """
    if name == "gpt2":
        return GPT2Tokenizer()
    path = Path(name).expanduser()
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or device may never end
            raise OSError(errno.EINVAL, "it is no regular file")
        if found.st_size > MAX_TOKENIZER_FILE:
            raise DataError(
                f"{path} is too large to be a tokenizer.json: {found.st_size:,} bytes, "
                f"at most {MAX_TOKENIZER_FILE:,}."
            )
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"can't read the tokenizer {path}: {error.strerror or error}.\n"
            "TOKENIZER names it in the settings."
        ) from error
    return read_tokenizer(content, path)


def read_tokenizer(content: bytes, path: Path, ends: Ends = ()) -> Tokenizer:
    """The tokenizer of a tokenizer.json's content; path is what messages call it.

    ends are those of ForeignTokenizer; this project's own tokenizers have END_OF_TEXT.
    Raises DataError if it is damaged or inconsistent.
    """
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the tokenizer {path} is not valid JSON: {error}.") from error
    check_tokenizer_tree(tree, path)
    # a hostile file may choose long tokens, and the time grows with the square of their length
    n_steps = sum(len(token) ** 2 for token in tree["model"]["vocab"] if isinstance(token, str))
    for kind in ("bpe", "char") if n_steps <= MOST_MERGE_STEPS else ("char",):
        try:
            own = restore_tokenizer(kind, content)
            same = json.loads(own.to_json()) == tree
        except (AttributeError, KeyError, TypeError, ValueError, AssertionError):  # of another kind
            continue
        if same:
            return GPT2Tokenizer() if own.fingerprint == GPT2_FINGERPRINT else own
    return _load_foreign(content, path, ends)


def restore_tokenizer(kind: str, content: bytes, path: Path | None = None) -> Tokenizer:
    """The tokenizer of a kind ("gpt2", "bpe", "char" or "foreign") from its to_json() in UTF-8.

    path is what messages call a "foreign" one. Raises DataError and SettingsError for that one.
    """
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "foreign":
        return _load_foreign(content, path)
    tree = json.loads(content)
    special = [entry["content"] for entry in tree["added_tokens"]]
    vocabulary = tree["model"]["vocab"]
    vocabulary = {token: i for token, i in vocabulary.items() if token not in special}
    added = [token for token in special if token != END_OF_TEXT]
    if kind == "char":
        return CharTokenizer([token for token in vocabulary if len(token) == 1], added=added)
    short_words = tree["pre_tokenizer"]["type"] == "Sequence"
    name = _bpe_name(len(vocabulary) + 1 + len(added))
    return BPETokenizer(name, ranks_of(vocabulary), short_words=short_words, added=added)


def _bpe_name(vocab_size: int) -> str:
    return f"BPE of {vocab_size:,} tokens"


def add_special_tokens(tokenizer: Tokenizer, names: Iterable[str]) -> Tokenizer:
    """A tokenizer that has these special tokens too, after all ids that it has.

    Those that it has already keep their ids. A text that holds their names is encoded as before.
    """
    missing = [name for name in names if name not in tokenizer.special_tokens]
    return tokenizer.adding(missing) if missing else tokenizer


def begin_texts_with(tokenizer: Tokenizer, begin: str | int) -> Tokenizer:
    """A tokenizer that puts a special token, by name or id, before each text, as a tokenizer.json
    says that: by its post-processor. The same tokenizer if it has one already, or no such token.
    """
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    name = names.get(begin, "") if isinstance(begin, int) else begin
    if name not in tokenizer.special_tokens or tokenizer.begin_ids:
        return tokenizer
    tree = json.loads(tokenizer.to_json())
    tree["post_processor"] = begin_with(
        name, tokenizer.special_tokens[name], after=tree["post_processor"]
    )
    found = _load_foreign(json.dumps(tree, ensure_ascii=False).encode("utf-8"), None)
    found.name = tokenizer.name
    return found


def begin_token_of(tokenizer: Tokenizer) -> str:
    """The special token that templates and other programs call bos_token: the one that begins each
    text, else one that is known by its name, else the one that ends a text.
    """
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    if tokenizer.begin_ids:
        return names[tokenizer.begin_ids[0]]
    known = (name for name in BEGIN_NAMES if name in tokenizer.special_tokens)
    return next(known, names[tokenizer.end_of_text_id])


def encode_from_start(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a document or prompt from its first token on, that which begins each included."""
    return [*tokenizer.begin_ids, *tokenizer.encode(text)]


def _load_foreign(content: bytes, path: Path | None, ends: Ends = ()) -> ForeignTokenizer:
    try:
        import tokenizers
    except ImportError:
        raise SettingsError(f"{path} needs a library: pip install tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"the tokenizer {path} can't be used: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a special token's name in a text is text
    name = path.parent.name or path.stem if path else "tokenizer.json"
    if ENDS_TEXT.encode() in content:  # as to_json() has written it
        added = json.loads(content).get("added_tokens") or []
        ends = [entry["content"] for entry in added if entry.get(ENDS_TEXT) is True] or ends
    return ForeignTokenizer(tokenizer, f"{name}, {tokenizer.get_vocab_size():,} tokens", ends)
