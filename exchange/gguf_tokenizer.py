"""The tokenizer in a GGUF file's metadata: read as one of this project's, and written.

A byte-level BPE has its tokens, its merges and the name of its pre-tokenizer; a SentencePiece
vocabulary has tokens with scores. Each is read by the rule of the models that it comes from.
"""

import json
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError, DataError, SettingsError
from exchange.gguf_file import GGUFFile, unusable
from text.tokenizer import (
    MOST_MERGE_STEPS,
    TURN_ENDS,
    CharTokenizer,
    Tokenizer,
    begin_texts_with,
    begin_token_of,
    read_tokenizer,
)
from text.tokenizer_file import (
    BYTE_LEVEL,
    END_OF_TEXT,
    SHORT_WORDS,
    special_token,
    split_words,
    tokenizer_json,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
SPACE = "▁"  # SentencePiece's
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class Rule:
    """How a byte-level BPE cuts a text into words, in the terms of a tokenizer.json."""

    pre_tokenizer: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False  # a word that is a token is taken without merging


# by their names in tokenizer.ggml.pre
RULES = {
    "gpt-2": Rule(BYTE_LEVEL),
    "smollm": Rule({"type": "Sequence", "pretokenizers": [_DIGITS, BYTE_LEVEL]}),
    "llama-bpe": Rule(split_words(_LLAMA3_WORDS), ignore_merges=True),
    "qwen2": Rule(split_words(_LLAMA3_WORDS.replace("{1,3}", "")), {"type": "NFC"}),
}


def tokenizer_of(file: GGUFFile) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises CheckpointError for one that is damaged or of another kind, SettingsError without the
    library that it needs.
    """
    kind = file.get("tokenizer.ggml.model", str)
    tokens = file.items("tokenizer.ggml.tokens", str)
    types = file.items("tokenizer.ggml.token_type", int, [NORMAL] * len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if not len(tokens) == len(vocabulary) == len(types):
        raise unusable(file.path, "it has a token twice, or not a type for each token")
    if kind == "gpt2":
        tree = _byte_level_tree(file, vocabulary)
    elif kind == "llama":
        characters = CharTokenizer(
            (" " if t == SPACE else t for t in tokens if len(t) == 1),
            added=[t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL][1:],
        )
        if _character_tokens(characters) == tokens:
            return _with_begin(file, characters)
        tree = _sentence_piece_tree(file, vocabulary, types)
    else:
        raise unusable(file.path, f'its tokenizer.ggml.model is "{kind:.80}", not gpt2 or llama')
    tree["added_tokens"] = [
        special_token(i, token) | {"special": types[i] == CONTROL}
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    end = file.get("tokenizer.ggml.eos_token_id", int, -1)
    try:
        found = read_tokenizer(json.dumps(tree).encode(), file.path / "tokenizer.json", [end])
    except DataError as error:
        raise CheckpointError(str(error)) from None
    return _with_begin(file, found)


def _with_begin(file: GGUFFile, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the token that begins each text by the file, or by llama.cpp's rule where
    the file doesn't say.
    """
    is_sentence_piece = file.get("tokenizer.ggml.model", str) == "llama"
    begins = is_sentence_piece or file.get("tokenizer.ggml.pre", str, "") == "llama-bpe"
    if not file.get("tokenizer.ggml.add_bos_token", bool, begins):
        return tokenizer
    begin = file.get("tokenizer.ggml.bos_token_id", int, 1 if is_sentence_piece else -1)
    return begin_texts_with(tokenizer, begin)


def _byte_level_tree(file: GGUFFile, vocabulary: dict[str, int]) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE, but for its added tokens."""
    name = file.get("tokenizer.ggml.pre", str)
    if name not in RULES:
        known = ", ".join(RULES)
        raise unusable(file.path, f'its tokenizer.ggml.pre is "{name:.80}"; known are {known}')
    rule = RULES[name]
    merges = [merge.split(" ", 1) for merge in file.items("tokenizer.ggml.merges", str)]
    tree = tokenizer_json({}, merges, pre_tokenizer=rule.pre_tokenizer, decoder=BYTE_LEVEL)
    tree["model"] |= {"vocab": vocabulary, "ignore_merges": rule.ignore_merges}
    return tree | {"normalizer": rule.normalizer}


def _sentence_piece_tree(
    file: GGUFFile, vocabulary: dict[str, int], types: list[int]
) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece BPE, but for its added tokens.

    It merges the pair whose token has the highest score, so that the scores give the merges.
    """
    scores = file.items("tokenizer.ggml.scores", float)
    if len(scores) < len(vocabulary) or sum(len(t) ** 2 for t in vocabulary) > MOST_MERGE_STEPS:
        raise unusable(file.path, "its tokens lack scores, or are too long")
    merges = []
    for token in sorted(vocabulary, key=lambda token: -scores[vocabulary[token]]):
        if types[vocabulary[token]] == NORMAL:
            pairs = ([token[:at], token[at:]] for at in range(1, len(token)))
            merges += [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    unknown = next((token for token, i in vocabulary.items() if types[i] == UNKNOWN), None)
    spaces = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        spaces.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    decoder = {"type": "Sequence", "decoders": decoders}
    tree = tokenizer_json({}, merges, pre_tokenizer=None, decoder=decoder)
    tree["model"] |= {"vocab": vocabulary, "unk_token": unknown, "fuse_unk": True}
    return tree | {"normalizer": {"type": "Sequence", "normalizers": spaces}}


def tokenizer_metadata(
    tokenizer: Tokenizer, vocab_size: int, chat_template: str | None
) -> dict[str, Any]:
    """The metadata of a tokenizer, for a model with so many rows.

    llama.cpp has no name for a pre-tokenizer with short words: it cuts as GPT-2's does, which
    differs for words of more than 64 characters. With a vocabulary of characters it takes SPACE in
    a text for a space. Raises SettingsError for a tokenizer that it can't run.
    """
    end = tokenizer.end_of_text_id
    if isinstance(tokenizer, CharTokenizer):
        tokens = _character_tokens(tokenizer)
        if len(set(tokens)) < len(tokens):
            raise SettingsError(
                f"a GGUF file can't have this tokenizer: it has the characters {SPACE!r} and "
                "space, which are one in llama.cpp.\n"
                "Export to Hugging Face's format, or train on a text without that character."
            )
        types = [NORMAL] * tokenizer.first_byte_id + [BYTE] * 256
        types += [CONTROL] * len(tokenizer.special_tokens)
        kind: dict[str, Any] = {"tokenizer.ggml.model": "llama"}
        # none of these tokens is a merge of others: the scores choose nothing
        kind |= {"tokenizer.ggml.scores": [0.0] * len(tokens)}
        kind |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.unknown_token_id": end}
    else:
        tree = json.loads(tokenizer.to_json())
        kind = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _rule_name(tree)}
        merges = tree["model"]["merges"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
        kind |= {"tokenizer.ggml.merges": merges}
        tokens, types = _tokens_of(tree, max(vocab_size, tokenizer.vocab_size))
        if types[end] == UNUSED:  # the end-of-text that a tokenizer without one was given
            tokens[end], types[end] = END_OF_TEXT, CONTROL
    special = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL}
    turn_ends = (name for name in TURN_ENDS if name in special and name in (chat_template or ""))
    if chat_template is not None:
        kind["tokenizer.chat_template"] = chat_template
    return kind | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": tokenizer.special_tokens[begin_token_of(tokenizer)],
        "tokenizer.ggml.eos_token_id": next((special[n] for n in turn_ends), end),
        "tokenizer.ggml.padding_token_id": end,
        "tokenizer.ggml.add_bos_token": len(tokenizer.begin_ids) > 0,
        "tokenizer.ggml.add_eos_token": False,
    }


def _character_tokens(tokenizer: CharTokenizer) -> list[str]:
    """The tokens of a character tokenizer in SentencePiece's spelling."""
    characters = [SPACE if char == " " else char for char in tokenizer.chars]
    bytes_ = (f"<0x{byte:02X}>" for byte in range(256))
    return [*characters, *bytes_, *tokenizer.special_tokens]


def _tokens_of(tree: dict[str, Any], count: int) -> tuple[list[str], list[int]]:
    """The tokens of a tokenizer.json with their types, and unused ones up to `count`."""
    tokens, types = [f"[PAD{i}]" for i in range(count)], [UNUSED] * count
    for token, i in tree["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for entry in tree["added_tokens"]:
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    return tokens, types


def _rule_name(tree: dict[str, Any]) -> str:
    """The name that llama.cpp has for a tokenizer.json's pre-tokenizer; SettingsError if none."""
    found = _essence([tree["pre_tokenizer"], tree["normalizer"]])
    for name, rule in (*RULES.items(), ("gpt-2", Rule(split_words(SHORT_WORDS)))):
        is_same = found in (
            _essence([rule.pre_tokenizer, rule.normalizer]),
            _essence([rule.pre_tokenizer, None]),
        )
        model = tree["model"]
        if is_same and model.get("ignore_merges", False) == rule.ignore_merges:
            return name
    raise SettingsError(
        "a GGUF file can't have this tokenizer: llama.cpp has no name for how its tokenizer.json "
        f"cuts words.\nIt may cut as the byte-level BPEs {', '.join(RULES)} do, or be "
        '"gpt2", "char" or "bpe:4096".'
    )


def _essence(tree: Any) -> Any:
    """A tokenizer.json's tree without what changes no id."""
    if isinstance(tree, dict):
        return {key: _essence(value) for key, value in tree.items() if key != "trim_offsets"}
    return [_essence(item) for item in tree] if isinstance(tree, list) else tree
