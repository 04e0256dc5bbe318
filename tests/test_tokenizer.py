"""GPT-2's tokens, with tiktoken's own "gpt2" as the oracle, without a network."""

import hashlib
import json

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken import registry

from engine.errors import DataError
from text import tokenizer as tokenizer_module
from text.tokenizer import (
    GPT2_FILE,
    GPT2_SHA256,
    TOKENIZERS,
    GPT2Tokenizer,
    byte_symbols,
    load_tokenizer,
    merge_pairs,
)

# what tiktoken fetches for "gpt2": the name in its cache (sha1 of the address) and the sha256
VOCAB_BPE = (
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)
ENCODER_JSON = (
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)

TEXTS = {
    "empty": "",
    "english": "Every effort moves you. I'd've said: we'll DON'T 'Tis  1234567 times!",
    "chinese": "春江潮水连海平，海上明月共潮生。滟滟随波千万里，何处春江无月明！𠮷𡃁",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☺️",
    "arabic": "السَّلامُ عَلَيْكُم ورحمةُ الله ٠١٢٣",
    "combining": "e\u0301 ñ n\u0303 ﬁ ǆ \u200b\ufeff İıſ",
    "code": "def f(x):\n\tif x  >=  0:\n        return {'a': x**2}  # \\n\n\n\n",
    "line ends": "one\r\ntwo\r\n\r\n three\rfour \n",
    "spaces": "   a    b\t\t c\u00a0\u3000d\x85e \x1c\x1f f     ",
    "control": "\x00\x01\x7f\x80\x9f\x00",
    "end of text": "a<|endoftext|>b <|endoftext|><|endoftext|",
    "repeated": "a" * 5000 + "春" * 2000 + " " * 5000 + "\n" * 3000 + "x",
}
text_by_name = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())


@pytest.fixture(scope="module")
def ours() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> tiktoken.Encoding:
    """tiktoken.get_encoding("gpt2"), its two files made from the one in this repository."""
    ranks = tokenizer_module._read_ranks(GPT2_FILE, GPT2_SHA256)
    symbol = byte_symbols()

    def shown(token: bytes) -> str:
        return "".join(symbol[byte] for byte in token)

    merges = [f"{shown(left)} {shown(right)}\n" for left, right in merge_pairs(ranks)]
    tokens = {shown(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    contents = {
        VOCAB_BPE: "#version: 0.2\n" + "".join(merges),
        ENCODER_JSON: json.dumps(tokens | {"<|endoftext|>": 50256}),
    }
    cache = tmp_path_factory.mktemp("tiktoken")
    for (name, sha256), content in contents.items():
        encoded = content.encode("utf-8")
        assert hashlib.sha256(encoded).hexdigest() == sha256
        (cache / name).write_bytes(encoded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        patch.setattr(registry, "ENCODINGS", {})
        return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def rebuilt(ours, tmp_path_factory):
    """Our tokenizer.json as transformers reads it."""
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("rebuilt") / "tokenizer.json"
    path.write_text(ours.to_json(), encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def test_vocabulary_equals_tiktokens(ours, oracle):
    assert ours.vocab_size == oracle.n_vocab == 50257
    assert ours.end_of_text_id == oracle.eot_token == 50256
    for token in range(50257):
        assert ours._encoding.decode_single_token_bytes(token) == (
            oracle.decode_single_token_bytes(token)
        )


@text_by_name
def test_ids_equal_tiktokens_and_come_back_as_the_text(ours, oracle, text):
    ids = ours.encode(text)
    assert ids == oracle.encode(text, disallowed_special=())
    assert ours.decode(ids) == text


PIECES = st.sampled_from(
    [*" \n\t\r'’.,0aZé春\x00\u3000", "\r\n", "'ll", "  ", "<|endoftext|>", "👍🏽"]
)


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(st.text() | st.lists(PIECES | st.characters(exclude_categories=["Cs"])).map("".join))
@example("\ufeff")
def test_any_text_has_tiktokens_ids_and_comes_back(ours, oracle, text):
    ids = ours.encode(text)
    assert ids == oracle.encode(text, disallowed_special=())
    assert ours.decode(ids) == text


@pytest.mark.parametrize(
    "name", ["the-verdict.txt", "ci.txt", "wikitext-2/valid.txt", "tinyshakespeare.txt"]
)
def test_real_texts_have_tiktokens_ids(ours, oracle, shared_data, name):
    text = (shared_data / name).read_bytes().decode("utf-8")[:300_000]
    ids = ours.encode(text)
    assert ids == oracle.encode(text, disallowed_special=())
    assert ours.decode(ids) == text
    if name == "the-verdict.txt":
        assert len(ids) == 5145


def test_end_of_text_inside_a_text_is_text(ours):
    ids = ours.encode("<|endoftext|>")
    assert len(ids) > 1
    assert ours.end_of_text_id not in ids
    assert ours.decode([ours.end_of_text_id]) == "<|endoftext|>"


def test_incomplete_character_becomes_the_replacement_character(ours):
    ids = ours.encode("𠮷")
    assert len(ids) > 1
    assert ours.decode(ids[:1]) == "\ufffd"


def test_lone_surrogate_is_encoded_as_the_replacement_character(ours):
    assert ours.decode(ours.encode("a\ud800b")) == "a\ufffdb"


# ------------------------------------------------------------------------------ tokenizer.json


@pytest.mark.parametrize(
    "text", [t for n, t in TEXTS.items() if n != "end of text"], ids=lambda text: ascii(text[:12])
)
def test_tokenizer_json_gives_the_same_ids_in_transformers(ours, rebuilt, text):
    ids = ours.encode(text)
    assert rebuilt.encode(text) == ids
    assert rebuilt.decode(ids, clean_up_tokenization_spaces=False) == text


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.text().filter(lambda text: "<|endoftext|>" not in text))
def test_tokenizer_json_gives_the_same_ids_for_any_text(ours, rebuilt, text):
    assert rebuilt.encode(text) == ours.encode(text)


def test_tokenizer_json_knows_the_end_of_text(ours, rebuilt):
    assert len(rebuilt) == ours.vocab_size
    assert rebuilt.encode("a<|endoftext|>") == [*ours.encode("a"), ours.end_of_text_id]
    assert rebuilt.decode([64, ours.end_of_text_id], skip_special_tokens=True) == "a"


# ------------------------------------------------------------------------------ the file itself


@pytest.mark.parametrize(
    "alter",
    [
        lambda content: content[:-1],
        lambda content: content.replace(b"IQ== 0\n", b"Ig== 0\n", 1),
        lambda content: content + b"\n",
        lambda content: b"",
        lambda content: b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=["cut", "changed", "longer", "empty", "lfs pointer"],
)
def test_altered_vocabulary_is_refused_with_file_and_sha256(tmp_path, monkeypatch, alter):
    path = tmp_path / "gpt2.tiktoken"
    content = alter(GPT2_FILE.read_bytes())
    path.write_bytes(content)
    monkeypatch.setattr(tokenizer_module, "GPT2_FILE", path)
    with pytest.raises(DataError) as caught:
        load_tokenizer("gpt2")
    for part in (str(path), hashlib.sha256(content).hexdigest(), GPT2_SHA256, "git checkout"):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_missing_vocabulary_is_refused_with_file_and_remedy(tmp_path, monkeypatch):
    path = tmp_path / "gpt2.tiktoken"
    monkeypatch.setattr(tokenizer_module, "GPT2_FILE", path)
    with pytest.raises(DataError) as caught:
        load_tokenizer("gpt2")
    assert str(path) in str(caught.value) and "git checkout" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_that_settings_take_can_be_loaded(name):
    loaded = load_tokenizer(name)
    assert loaded.decode(loaded.encode("Every effort moves you")) == "Every effort moves you"
    assert max(loaded.encode("Every effort moves you")) < loaded.vocab_size


def test_fingerprint_names_the_vocabulary(ours):
    assert GPT2_SHA256.startswith(ours.fingerprint.removeprefix("gpt2-"))
    assert hashlib.sha256(GPT2_FILE.read_bytes()).hexdigest() == GPT2_SHA256


def test_byte_symbols_are_256_different_printable_characters():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert all(symbol.isprintable() and not symbol.isspace() for symbol in symbols)
    assert symbols[ord("A")] == "A"
    assert symbols[ord(" ")] == "Ġ"
    assert symbols[ord("\n")] == "Ċ"
