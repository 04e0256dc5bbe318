"""Text to ids and back: GPT-2's tokens against tiktoken's own, all kinds against the libraries."""

import hashlib
import json
import os
import random
import subprocess
import sys

import pytest
import tiktoken
import tokenizers
from conftest import REPOSITORY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken import registry
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.errors import DataError, SettingsError
from text import tokenizer as tokenizer_module
from text import tokenizer_file
from text.tokenizer import (
    END_NAMES,
    GPT2_FILE,
    GPT2_FINGERPRINT,
    GPT2_SHA256,
    MAX_TRAINED_VOCABULARY,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    choose_tokenizer,
    find_tokenizer_fault,
    load_tokenizer,
    make_tokenizer,
    restore_tokenizer,
    train_bpe,
)
from text.tokenizer_file import END_OF_TEXT, byte_symbols, merge_pairs

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
MIXED = "".join(
    TEXTS[name] for name in ("chinese", "emoji", "arabic", "code", "line ends", "control")
)
SAMPLES = [
    (REPOSITORY / "corpus" / f"sample-{code}.txt").read_bytes().decode() for code in ("en", "zh")
]
LEARNT = "\n".join(sample[: len(sample) // 2] for sample in SAMPLES)
HELD_OUT = "\n".join(sample[len(sample) // 2 :] for sample in SAMPLES)
KINDS = ("gpt2", "bpe", "char", "foreign")
text_by_name = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())


@pytest.fixture(scope="module")
def ours() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def foreign_file(tmp_path_factory):
    """A byte-level BPE as others train it: its special tokens first, cut at a word of its own."""
    trainable = tokenizers.Tokenizer(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainable.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(byte_symbols()),
        show_progress=False,
    )
    trainable.train_from_iterator([LEARNT], trainer)
    path = tmp_path_factory.mktemp("elsewhere") / "tokenizer.json"
    trainable.save(str(path))  # indented, unlike what we write
    return path


@pytest.fixture(scope="module")
def by_kind(ours, foreign_file) -> dict:
    return {
        "gpt2": ours,
        "bpe": train_bpe([LEARNT], 700),
        "char": CharTokenizer(LEARNT),
        "foreign": load_tokenizer(foreign_file),
    }


@pytest.fixture(params=KINDS)
def tokenizer(request, by_kind):
    """A tokenizer of each kind in turn; all but GPT-2's know the first halves of the samples."""
    assert by_kind[request.param].kind == request.param
    return by_kind[request.param]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> tiktoken.Encoding:
    """tiktoken.get_encoding("gpt2"), its two files made from the one in this repository."""
    ranks = tokenizer_module.read_ranks(GPT2_FILE, GPT2_SHA256)
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


def test_fingerprint_of_gpt2_is_the_one_that_its_files_are_known_by(ours):
    assert ours.fingerprint == GPT2_FINGERPRINT
    assert hashlib.sha256(GPT2_FILE.read_bytes()).hexdigest() == GPT2_SHA256


def test_byte_symbols_are_256_different_printable_characters():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    assert all(symbol.isprintable() and not symbol.isspace() for symbol in symbols)
    assert symbols[ord("A")] == "A"
    assert symbols[ord(" ")] == "Ġ"
    assert symbols[ord("\n")] == "Ċ"


# ------------------------------------------------------------------------------ every kind


@text_by_name
def test_every_kind_brings_a_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def pieces_of(tokenizer, ids):
    """The text as ids come in, without the steps that complete no character."""
    decoder = tokenizer.decoder()
    yield from filter(None, map(decoder.add, ids))
    yield from filter(None, [decoder.finish()])


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(PIECES).map("".join)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(KINDS), ANY_TEXT)
@example("bpe", "\ufeff\ufffd")
@example("foreign", "\ufffd\ufffd a")
def test_every_kind_brings_any_text_back_whole_and_in_a_stream(by_kind, kind, text):
    tokenizer = by_kind[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.decode(ids) == text
    shown = list(pieces_of(tokenizer, ids))
    assert "".join(shown) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


def test_a_stream_shows_each_character_as_soon_as_it_is_whole(tokenizer):
    text = MIXED + "𠮷" * 30 + HELD_OUT[-300:]
    ids = tokenizer.encode(text)
    given_so_far: list[int] = []

    def feed():
        for token in ids:
            given_so_far.append(token)
            yield token

    shown = ""
    for piece in pieces_of(tokenizer, feed()):
        shown += piece
        assert shown == text[: len(shown)]
        assert tokenizer.decode(given_so_far).rstrip("\ufffd") == shown
    assert shown == text


def test_a_stream_that_ends_inside_a_character_ends_as_decode_does(tokenizer):
    ids = tokenizer.encode("ab𠮷")
    for stop in range(len(ids) + 1):
        assert "".join(pieces_of(tokenizer, ids[:stop])) == tokenizer.decode(ids[:stop])


def test_a_stream_of_any_ids_joins_to_what_decode_gives(tokenizer):
    chooser = random.Random(7)
    for _ in range(20):
        ids = [chooser.randrange(tokenizer.vocab_size) for _ in range(chooser.randrange(1, 200))]
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("special", [END_OF_TEXT, "<eos>", "<pad>"])
def test_the_name_of_a_control_token_in_a_text_is_text(tokenizer, special):
    text = f"a{special}b {special}"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text_id not in ids
    assert len(ids) > len(tokenizer.encode("ab "))


@pytest.mark.parametrize("name", ["gpt2", "bpe", "char"])
def test_end_of_text_is_the_last_id_and_is_shown_by_its_name(by_kind, name):
    tokenizer = by_kind[name]
    assert tokenizer.end_of_text_id == tokenizer.vocab_size - 1
    assert tokenizer.decode([tokenizer.end_of_text_id]) == END_OF_TEXT


def test_ids_equal_those_of_transformers_for_the_file_that_was_saved(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert len(theirs) == tokenizer.vocab_size
    for text in [HELD_OUT, MIXED, *(text for name, text in TEXTS.items() if name != "end of text")]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(["bpe", "char"]), ANY_TEXT.filter(lambda text: END_OF_TEXT not in text))
def test_ids_of_any_text_equal_those_of_the_library_tokenizers(by_kind, library, kind, text):
    assert library[kind].encode(text).ids == by_kind[kind].encode(text)


@pytest.fixture(scope="module")
def library(by_kind) -> dict:
    return {
        kind: tokenizers.Tokenizer.from_str(tokenizer.to_json())
        for kind, tokenizer in by_kind.items()
    }


def test_ids_of_a_trained_bpe_equal_those_of_the_library_that_trained_it(by_kind):
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=699, initial_alphabet=sorted(byte_symbols()), show_progress=False
    )
    trained.train_from_iterator([LEARNT], trainer)
    assert by_kind["bpe"].vocab_size == 700
    for text in (LEARNT, HELD_OUT, MIXED):
        assert by_kind["bpe"].encode(text) == trained.encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_file_gives_the_same_kind_ids_and_fingerprint(by_kind, tmp_path, kind):
    tokenizer = by_kind[kind]
    path = tmp_path / "tokenizer.json"
    content = tokenizer.to_json()
    path.write_text(content, encoding="utf-8")
    assert load_tokenizer(path).to_json() == content
    for again in (load_tokenizer(path), restore_tokenizer(kind, path.read_bytes())):
        assert again.kind == kind
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.vocab_size == tokenizer.vocab_size
        assert again.end_of_text_id == tokenizer.end_of_text_id
        assert again.encode(HELD_OUT + MIXED) == tokenizer.encode(HELD_OUT + MIXED)


def test_fingerprints_tell_tokenizers_apart(by_kind):
    others = [train_bpe([LEARNT], 701), train_bpe([HELD_OUT], 700), CharTokenizer(LEARNT + "𡃁")]
    fingerprints = [tokenizer.fingerprint for tokenizer in [*by_kind.values(), *others]]
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
@pytest.mark.parametrize("blank", [" ", "\n", "\t", "\u3000"], ids=ascii)
def test_a_million_blanks_have_the_ids_of_the_runs_parts(by_kind, kind, blank):
    encode = by_kind[kind].encode
    run = blank * 1_000_000
    # the pattern leaves the run's last blank to the word behind it
    assert encode(f"a{run}b") == encode("a") + encode(run[:-1]) + encode(f"{blank}b")
    assert by_kind[kind].encode_array(f"a{run}b").tolist() == encode(f"a{run}b")


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char"])
@pytest.mark.parametrize("text", ["\n" * 2_000_000, "a" + " " * 2_000_000], ids=["lines", "blanks"])
def test_two_million_blanks_at_the_end_of_a_text_come_back(by_kind, kind, text):
    ids = by_kind[kind].encode_array(text)
    assert by_kind[kind].decode(ids.tolist()) == text
    # a run at the very end is one word: as the same run is elsewhere, by parts of equal length
    assert len(set(ids[-100_000:-10].tolist())) == 1


# ------------------------------------------------------------------------------ characters


def test_characters_are_numbered_in_code_point_order():
    tokenizer = CharTokenizer("hello, 世界")
    assert tokenizer.chars == [" ", ",", "e", "h", "l", "o", "世", "界"]
    assert tokenizer.stoi == {char: i for i, char in enumerate(tokenizer.chars)}
    assert tokenizer.itos == {i: char for char, i in tokenizer.stoi.items()}
    assert tokenizer.vocab_size == 8 + 256 + 1
    assert tokenizer.encode("hello") == [3, 2, 4, 4, 5]
    assert tokenizer.decode([6, 7]) == "世界"


@pytest.mark.parametrize("chars", ["", "abc世"])
@pytest.mark.parametrize("unseen", ["z", "é", "界", "𠮷", "👩‍👩", "\x00"], ids=ascii)
def test_an_unseen_character_goes_as_its_bytes(chars, unseen):
    tokenizer = CharTokenizer(chars)
    expected = [tokenizer.first_byte_id + byte for byte in unseen.encode("utf-8")]
    assert tokenizer.encode(unseen) == expected
    assert tokenizer.decode(expected) == unseen
    seen = [tokenizer.stoi[char] for char in chars]
    assert tokenizer.encode(chars + unseen + chars) == seen + expected + seen


def test_half_a_character_is_encoded_as_a_question_mark():
    tokenizer = CharTokenizer("ab")
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


# ------------------------------------------------------------------------------ training


def test_training_gives_the_same_tokenizer_in_every_process(by_kind):
    program = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from text.tokenizer import train_bpe
text = sys.stdin.buffer.read().decode("utf-8")
print(train_bpe([text], 700).fingerprint)
"""
    assert train_bpe([LEARNT], 700).to_json() == by_kind["bpe"].to_json()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=LEARNT.encode("utf-8"),
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        assert done.stdout.decode().strip() == by_kind["bpe"].fingerprint


def test_training_does_not_depend_on_where_a_text_is_cut(by_kind):
    lines = LEARNT.splitlines(keepends=True)
    assert train_bpe([LEARNT], 500).fingerprint != train_bpe([LEARNT[:2000]], 500).fingerprint
    at_words = [line for line in lines if line.strip()]
    assert train_bpe(iter(at_words), 500).to_json() == train_bpe(at_words, 500).to_json()


@pytest.mark.parametrize("text", ["", "a", "ab ab"])
def test_a_text_too_small_for_the_vocabulary_yields_a_smaller_one(text):
    tokenizer = train_bpe([text], 4096)
    assert 257 <= tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED


def test_training_looks_at_no_more_text_than_the_limit(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TRAINING_CHARACTERS", 1000)
    texts = iter([LEARNT[:600], LEARNT[600:2000], "never read"])
    limited = train_bpe(texts, 400)
    assert next(texts) == "never read"
    assert limited.fingerprint == train_bpe([LEARNT[:600], LEARNT[600:1000]], 400).fingerprint


def test_training_without_the_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SettingsError, match=r'"bpe:500" needs a library: pip install tokenizers'):
        train_bpe([LEARNT], 500)


def test_a_foreign_file_without_the_library_says_how_to_get_it(foreign_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SettingsError, match="needs a library: pip install tokenizers"):
        load_tokenizer(foreign_file)


# ------------------------------------------------------------------------------ which tokenizer


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("auto", None),
        ("gpt2", None),
        ("char", None),
        ("bpe:300", None),
        ("bpe:4096", None),
        (f"bpe:{MAX_TRAINED_VOCABULARY}", None),
        ("some/tokenizer.json", None),
        ("bpe:299", "must be 300 to"),
        (f"bpe:{MAX_TRAINED_VOCABULARY + 1}", "must be 300 to"),
        ("bpe:0", "must be 300 to"),
        ("bpe", '"bpe:4096"'),
        ("bpe:", '"bpe:4096"'),
        ("bpe:-500", '"bpe:4096"'),
        ("bpe:4096 ", '"bpe:4096"'),
        ("bpe:9999999999", '"bpe:4096"'),
        ("GPT2", '"gpt2"'),
        ("", "tokenizer.json"),
        ("some/tokenizer.model", "tokenizer.json"),
    ],
)
def test_a_value_of_tokenizer_is_taken_or_its_fault_is_named(name, fault):
    found = find_tokenizer_fault(name)
    if fault is None:
        assert found is None
    else:
        assert f'is "{name}"; ' in found
        assert fault in found


CHINESE = SAMPLES[1][:2000]


@pytest.mark.parametrize(
    ("texts", "expected", "why"),
    [
        ([SAMPLES[0]], "gpt2", "GPT-2's needs 0."),
        ([], "gpt2", "GPT-2's needs 0.00"),
        ([CHINESE], "char", "too short to train one on"),
        ([CHINESE] * 99, "char", "too short to train one on"),
        ([CHINESE] * 100, "bpe:4096", "GPT-2's would need"),
        ([CHINESE * 1000, SAMPLES[0] * 1000], "bpe:4096", "GPT-2's would need"),
    ],
    ids=["english", "nothing", "short chinese", "still short", "long enough", "only the start"],
)
def test_the_tokenizer_is_chosen_by_what_gpt2_would_need(texts, expected, why):
    name, reason = choose_tokenizer(texts)
    assert name == expected
    assert why in reason


def test_the_rate_that_is_named_is_tokens_a_character(ours):
    _, reason = choose_tokenizer([CHINESE, SAMPLES[0][:500]])
    n_tokens = len(ours.encode(CHINESE)) + len(ours.encode(SAMPLES[0][:500]))
    assert f"{n_tokens / 2500:.2f} tokens a character" in reason


def test_without_the_library_a_long_chinese_text_goes_by_characters(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    name, reason = choose_tokenizer([CHINESE] * 100)
    assert name == "char"
    assert "pip install tokenizers" in reason


def test_choosing_reads_gpt2s_file_once_however_many_texts_there_are(monkeypatch):
    made = []

    class Counted(GPT2Tokenizer):
        def __init__(self):
            made.append(self)
            super().__init__()

    monkeypatch.setattr(tokenizer_module, "GPT2Tokenizer", Counted)
    assert choose_tokenizer(["Every effort moves you."] * 50)[0] == "gpt2"
    assert len(made) == 1


@pytest.mark.parametrize(
    ("name", "kind", "description"),
    [
        ("gpt2", "gpt2", "GPT-2"),
        ("char", "char", "{characters} characters"),
        ("bpe:400", "bpe", "BPE of 400 tokens"),
        ("auto", "char", "{characters} characters; chosen because GPT-2's would need"),
    ],
)
def test_the_tokenizer_that_is_named_is_made_from_the_text_and_described(name, kind, description):
    tokenizer, told = make_tokenizer(name, lambda: [CHINESE[:900], CHINESE[900:]])
    assert tokenizer.kind == kind
    assert told.startswith(description.format(characters=len(set(CHINESE))))
    if kind == "char":
        assert tokenizer.chars == sorted(set(CHINESE))


# ------------------------------------------------------------------------- files from elsewhere


def word_piece() -> tokenizers.Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat", "."]
    made = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def unigram() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "</s>", "▁the", "▁cat", "s", "▁sat", "▁", ".", *"aceht"]
    made = tokenizers.Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def saved(made: tokenizers.Tokenizer, folder):
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.mark.parametrize(
    ("make", "end", "words"),
    [(word_piece, 2, [3, 4, 5, 6, 7]), (unigram, 1, [2, 3, 4, 5, 7])],
)
def test_a_file_of_another_model_gives_its_own_ids_and_none_around_them(tmp_path, make, end, words):
    made = make()
    tokenizer = load_tokenizer(saved(made, tmp_path))
    assert tokenizer.kind == "foreign"
    assert tokenizer.vocab_size == made.get_vocab_size()
    assert tokenizer.end_of_text_id == end
    assert tokenizer.encode("the cats sat.") == words
    assert (
        tokenizer.encode("the cats sat.")
        == made.encode("the cats sat.", add_special_tokens=False).ids
    )
    assert tokenizer.decode(words) == "the cats sat."
    assert "".join(pieces_of(tokenizer, words * 50)) == tokenizer.decode(words * 50)


@pytest.mark.parametrize("make", [word_piece, unigram])
def test_a_file_that_cuts_or_fills_up_what_it_encodes_does_neither_here(tmp_path, make):
    made = make()
    expected = load_tokenizer(saved(made, tmp_path)).encode("the cats sat." * 20)
    made.enable_truncation(max_length=5)
    made.enable_padding(length=8)
    tokenizer = load_tokenizer(saved(made, tmp_path))
    assert tokenizer.encode("the cats sat." * 20) == expected
    assert tokenizer.encode("the") == expected[:1]


def test_the_fingerprint_of_a_foreign_file_is_not_that_of_its_spaces(foreign_file, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(foreign_file.read_bytes())))
    assert path.read_bytes() != foreign_file.read_bytes()
    assert load_tokenizer(path).fingerprint == load_tokenizer(foreign_file).fingerprint


@pytest.mark.parametrize(
    ("specials", "end"),
    [
        ([], None),
        (["<s>", "<pad>"], None),
        *(([name], name) for name in END_NAMES),
        (["[SEP]", "<eos>", "</s>"], "</s>"),
        (["</s>", END_OF_TEXT], END_OF_TEXT),
    ],
    ids=str,
)
def test_the_token_that_ends_a_text_is_found_by_its_name_or_added(tmp_path, specials, end):
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    made.add_special_tokens(specials)
    tokenizer = load_tokenizer(saved(made, tmp_path))
    count = 2 + len(specials)
    if end is None:
        assert (tokenizer.end_of_text_id, tokenizer.vocab_size) == (count, count + 1)
        assert tokenizer.decode([1, tokenizer.end_of_text_id]) == "b"
    else:
        assert tokenizer.end_of_text_id == made.token_to_id(end)
        assert tokenizer.vocab_size == count


def damaged(change) -> bytes:
    tree = json.loads(word_piece().to_str())
    change(tree, tree["model"], tree["model"]["vocab"])
    return json.dumps(tree).encode()


DAMAGES = {
    "nothing": (b"", "not valid JSON"),
    "no JSON": (b"\x00\x01\x02", "not valid JSON"),
    "no UTF-8": (b'{"model": "\xff"}', "not valid JSON"),
    "cut": (damaged(lambda *_: None)[:200], "not valid JSON"),
    "deeply nested": (b"[" * 100_000, "not valid JSON"),
    "a list": (b"[1, 2]", 'no "model"'),
    "a number": (b"1", 'no "model"'),
    "no model": (damaged(lambda tree, *_: tree.pop("model")), 'no "model"'),
    "no vocabulary": (damaged(lambda _, model, __: model.pop("vocab")), 'no "model"'),
    "vocabulary a number": (damaged(lambda _, model, __: model.update(vocab=5)), 'no "model"'),
    "two of an id": (damaged(lambda _, __, v: v.update(cat=3)), "id 3 stands for several tokens"),
    "id too high": (damaged(lambda _, __, v: v.update(cat=8)), "id 8 is outside of its vocabulary"),
    "id below zero": (damaged(lambda _, __, v: v.update(cat=-1)), "is no whole number"),
    "id a fraction": (damaged(lambda _, __, v: v.update(cat=4.0)), "is no whole number"),
    "id a text": (damaged(lambda _, __, v: v.update(cat="4")), "is no whole number"),
    "id true": (damaged(lambda _, __, v: v.update(cat=True)), "is no whole number"),
    "id null": (damaged(lambda _, __, v: v.update(cat=None)), "is no whole number"),
    "added a number": (damaged(lambda tree, *_: tree.update(added_tokens=5)), "added_tokens"),
    "added no dict": (damaged(lambda tree, *_: tree.update(added_tokens=[5])), "added_tokens"),
    "added without id": (
        damaged(lambda tree, *_: tree["added_tokens"][0].update(id=[1])),
        "added_tokens",
    ),
    "merges a number": (damaged(lambda _, model, __: model.update(merges=5)), "merges"),
    "unknown model": (damaged(lambda _, model, __: model.update(type="Magic")), "can't be used"),
    "no list of pieces": (damaged(lambda _, model, __: model.update(vocab=[])), "can't be used"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_refused_with_its_path_and_what_is_wrong(tmp_path, content, reason):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


@pytest.mark.parametrize("name", ["missing.json", "folder", "file/tokenizer.json"])
def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="can't read the tokenizer") as caught:
        load_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("limit", ["MAX_TOKENIZER_FILE", "MAX_MERGES"])
def test_a_file_above_the_limits_is_refused_for_its_size(by_kind, tmp_path, monkeypatch, limit):
    path = tmp_path / "tokenizer.json"
    path.write_text(by_kind["bpe"].to_json(), encoding="utf-8")
    count = path.stat().st_size if limit == "MAX_TOKENIZER_FILE" else 700 - 257
    room = tokenizer_module if limit == "MAX_TOKENIZER_FILE" else tokenizer_file
    monkeypatch.setattr(room, limit, count)
    assert load_tokenizer(path).kind == "bpe"
    monkeypatch.setattr(room, limit, count - 1)
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert f"{count - 1:,}" in str(caught.value)
    assert "JSON:" not in str(caught.value)


def test_a_byte_level_file_that_lacks_a_byte_is_not_run_as_our_own(by_kind, tmp_path):
    tree = json.loads(by_kind["bpe"].to_json())
    ranks = list(tree["model"]["vocab"])[:256]
    ranks[0] = '""'  # in the place of one of the 256 bytes
    vocabulary = {token: i for i, token in enumerate([*ranks, END_OF_TEXT])}
    tree["added_tokens"][0]["id"] = 256
    tree["model"] |= {"vocab": vocabulary, "merges": [['"', '"']]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    assert load_tokenizer(path).kind == "foreign"


@pytest.mark.parametrize("chars", ["abc", "0123456789ABCDEFx<>"])
def test_characters_that_all_stand_for_bytes_are_still_characters(tmp_path, chars):
    path = tmp_path / "tokenizer.json"
    path.write_text(CharTokenizer(chars).to_json(), encoding="utf-8")
    loaded = load_tokenizer(path)
    assert isinstance(loaded, CharTokenizer)
    assert loaded.chars == sorted(chars)


def test_a_changed_merge_makes_a_file_foreign(by_kind, tmp_path):
    tree = json.loads(by_kind["bpe"].to_json())
    merges = tree["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    loaded = load_tokenizer(path)
    assert not isinstance(loaded, BPETokenizer)
    assert loaded.encode(HELD_OUT) == tokenizers.Tokenizer.from_file(str(path)).encode(HELD_OUT).ids
