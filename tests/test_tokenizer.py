"""Text to ids and back: GPT-2's tokens against tiktoken's own, all kinds against the libraries."""

import hashlib
import json
import os
import random
import signal
import string
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken import registry
from tokenizers import decoders, models, pre_tokenizers

from engine.errors import DataError, ResourceError, SettingsError
from tests.conftest import REPOSITORY
from tests.texts import CHINESE, ENGLISH, train_in_the_library
from text import learn_bpe, token_cache, tokenizer_file
from text import tokenizer as tokenizer_module
from text.documents import DataSpec
from text.token_cache import cut_into_chunks, tokenize
from text.tokenizer import (
    END_NAMES,
    ENDS_TEXT,
    GPT2_FILE,
    GPT2_FINGERPRINT,
    GPT2_SHA256,
    MAX_TRAINED_VOCABULARY,
    CharTokenizer,
    GPT2Tokenizer,
    cut_long_words,
    find_tokenizer_fault,
    load_tokenizer,
    make_tokenizer,
    read_tokenizer,
    restore_tokenizer,
    train_bpe,
)
from text.tokenizer_file import END_OF_TEXT

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
    "end of text": "a<|endoftext|>b <eos><pad> <|endoftext|>x<|endoftext|",
    "repeated": "a" * 5000 + "春" * 2000 + " " * 5000 + "\n" * 3000 + "x",
}
MIXED = "".join(
    TEXTS[name] for name in ("chinese", "emoji", "arabic", "code", "line ends", "control")
)
SAMPLES = (ENGLISH, CHINESE)
LEARNT = "\n".join(sample[: len(sample) // 2] for sample in SAMPLES)
HELD_OUT = "\n".join(sample[len(sample) // 2 :] for sample in SAMPLES)
KINDS = ("gpt2", "bpe", "char", "foreign")


@pytest.fixture(scope="module")
def ours() -> GPT2Tokenizer:
    return GPT2Tokenizer()


@pytest.fixture(scope="module")
def foreign_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("elsewhere") / "tokenizer.json"
    train_in_the_library(LEARNT, 600, "<pad>", "<eos>").save(str(path))  # indented, unlike ours
    return path


@pytest.fixture(scope="module")
def by_kind(ours, foreign_file) -> dict:
    """A tokenizer of each kind; all but GPT-2's know the first halves of the samples."""
    made = {
        "gpt2": ours,
        "bpe": train_bpe([LEARNT], 700),
        "char": CharTokenizer(LEARNT),
        "foreign": load_tokenizer(foreign_file),
    }
    assert all(tokenizer.kind == kind for kind, tokenizer in made.items())
    return made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.json"


@pytest.fixture(params=KINDS)
def tokenizer(request, by_kind):
    return by_kind[request.param]


@pytest.fixture(scope="module")
def saved(by_kind) -> dict[str, str]:
    """Their tokenizer.json's; GPT-2's takes a second to make."""
    return {kind: tokenizer.to_json() for kind, tokenizer in by_kind.items()}


@pytest.fixture(scope="module")
def theirs(saved) -> dict:
    """Those with a small vocabulary, as the library reads them."""
    kinds = ("bpe", "char", "foreign")
    return {kind: tokenizers.Tokenizer.from_str(saved[kind]) for kind in kinds}


@pytest.fixture(scope="module")
def oracle(saved, tmp_path_factory) -> tiktoken.Encoding:
    """tiktoken.get_encoding("gpt2"), the two files that it fetches made from ours."""
    model = json.loads(saved["gpt2"])["model"]
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    cache = tmp_path_factory.mktemp("tiktoken")
    for name, sha256, content in [  # the name is the sha1 of the address
        (
            "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            f"#version: 0.2\n{merges}",
        ),
        (
            "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            json.dumps(model["vocab"]),
        ),
    ]:
        assert hashlib.sha256(content.encode()).hexdigest() == sha256
        (cache / name).write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        patch.setattr(registry, "ENCODINGS", {})
        return tiktoken.get_encoding("gpt2")


@pytest.mark.slow
def test_vocabulary_and_ids_equal_tiktokens_and_halves_of_characters_are_replaced(ours, oracle):
    assert ours.vocab_size == oracle.n_vocab == 50257
    assert ours.end_of_text_id == oracle.eot_token == 50256
    expected = [oracle.decode_single_token_bytes(token) for token in range(50257)]
    assert [ours.token_bytes(token) for token in range(50257)] == expected
    for text in (*TEXTS.values(), *SAMPLES):
        assert ours.encode(text) == oracle.encode(text, disallowed_special=())
    assert ours.decode(ours.encode("𠮷")[:1]) == "\ufffd"
    assert ours.decode(ours.encode("a\ud800b")) == "a\ufffdb"


def test_an_altered_or_missing_vocabulary_is_refused_with_the_remedy(tmp_path, monkeypatch):
    path = tmp_path / "gpt2.tiktoken"
    monkeypatch.setattr(tokenizer_module, "GPT2_FILE", path)
    with pytest.raises(DataError) as caught:
        load_tokenizer("gpt2")
    assert str(path) in str(caught.value) and "git checkout" in str(caught.value)
    assert caught.value.exit_code == 3
    content = GPT2_FILE.read_bytes()
    changed = content.replace(b"IQ== 0\n", b"Ig== 0\n", 1)
    for altered in (content[:-1], changed, content + b"\n", b"", b"version https://git-lfs\n"):
        path.write_bytes(altered)
        with pytest.raises(DataError) as caught:
            load_tokenizer("gpt2")
        for part in (str(path), hashlib.sha256(altered).hexdigest(), GPT2_SHA256, "git checkout"):
            assert part in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 4


def pieces_of(tokenizer, ids):
    """The text as ids come in, without the steps that complete no character."""
    decoder = tokenizer.decoder()
    yield from filter(None, map(decoder.add, ids))
    yield from filter(None, [decoder.finish()])


@pytest.mark.slow  # transformers takes seconds to import
def test_texts_come_back_from_saved_files_and_have_the_ids_of_transformers(
    by_kind, saved, path, monkeypatch
):
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(GPT2Tokenizer, "to_json", lambda self: saved["gpt2"])
    for kind, tokenizer in by_kind.items():
        path.write_text(saved[kind], encoding="utf-8")
        for again in (load_tokenizer(path), restore_tokenizer(kind, path.read_bytes())):
            assert (again.kind, type(again)) == (kind, type(tokenizer))
            assert again.fingerprint == tokenizer.fingerprint
            assert again.vocab_size == tokenizer.vocab_size
            assert again.end_of_text_id == tokenizer.end_of_text_id
            assert again.encode(HELD_OUT + MIXED) == tokenizer.encode(HELD_OUT + MIXED)
            assert again.to_json() == saved[kind]
        their = PreTrainedTokenizerFast(tokenizer_file=str(path))
        assert len(their) == tokenizer.vocab_size
        for text in [HELD_OUT, MIXED, *TEXTS.values()]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.encode_array(text).tolist() == ids
            assert all(0 <= token < tokenizer.vocab_size for token in ids)
            assert tokenizer.end_of_text_id not in ids  # a control token's name is text
            if END_OF_TEXT not in text:
                assert their.encode(text, add_special_tokens=False) == ids
                assert their.decode(ids, clean_up_tokenization_spaces=False) == text
        if kind != "foreign":
            a, end = tokenizer.encode("a"), tokenizer.end_of_text_id
            assert end == tokenizer.vocab_size - 1
            assert tokenizer.decode([end]) == END_OF_TEXT
            assert their.encode("a<|endoftext|>", add_special_tokens=False) == [*a, end]
            assert their.decode([*a, end], skip_special_tokens=True) == "a"


PIECES = st.sampled_from(
    [*" \n\t\r'’.,0aZé春\x00\u3000", "\r\n", "'ll", "  ", "<|endoftext|>", "👍🏽"]
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(PIECES).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(text=ANY_TEXT)
@example("\ufeff\ufffd")
@example("\ufffd\ufffd a")
def test_any_text_has_the_librarys_ids_and_comes_back_whole_and_in_a_stream(
    by_kind, theirs, oracle, kind, text
):
    tokenizer = by_kind[kind]
    ids = tokenizer.encode(text)
    if kind == "gpt2":
        assert ids == oracle.encode(text, disallowed_special=())
    elif END_OF_TEXT not in text:
        assert theirs[kind].encode(text).ids == ids
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.decode(ids) == text
    shown = list(pieces_of(tokenizer, ids))
    assert "".join(shown) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in shown)


def test_a_stream_shows_each_character_as_soon_as_it_is_whole_and_joins_to_what_decode_gives(
    tokenizer,
):
    text = MIXED + "𠮷" * 30 + HELD_OUT[-300:]
    ids = tokenizer.encode(text)
    decoder, shown = tokenizer.decoder(), ""
    for n, token in enumerate(ids, start=1):
        if piece := decoder.add(token):
            shown += piece
            assert tokenizer.decode(ids[:n]).rstrip("\ufffd") == shown == text[: len(shown)]
    assert shown + decoder.finish() == text
    ids = tokenizer.encode("ab𠮷")
    cases = [ids[:stop] for stop in range(len(ids) + 1)]
    chooser = random.Random(7)
    for _ in range(20):
        cases.append(chooser.choices(range(tokenizer.vocab_size), k=chooser.randrange(1, 200)))
    for ids in cases:
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_ids_of_a_trained_bpe_equal_those_of_the_library_that_trained_it(by_kind):
    trained = train_in_the_library(LEARNT, 699)
    assert by_kind["bpe"].vocab_size == 700
    for text in (LEARNT, HELD_OUT, MIXED):
        assert by_kind["bpe"].encode(text) == trained.encode(text).ids


def test_fingerprints_tell_tokenizers_apart(by_kind):
    others = [train_bpe([HELD_OUT], 700), CharTokenizer(LEARNT + "𡃁")]
    fingerprints = [tokenizer.fingerprint for tokenizer in [*by_kind.values(), *others]]
    assert len(set(fingerprints)) == len(fingerprints)
    assert by_kind["gpt2"].fingerprint == GPT2_FINGERPRINT


def test_a_million_blanks_have_the_ids_of_the_runs_parts(by_kind):
    """tiktoken alone runs out of stack."""
    encode = by_kind["bpe"].encode_array
    for blank, count in ((" ", 1_000_000), ("\n", 150_000), ("\t", 150_000), ("\u3000", 150_000)):
        run = blank * count
        # the pattern leaves the run's last blank to the word behind it
        parts = [encode("a"), encode(run[:-1]), encode(f"{blank}b")]
        ids = encode(f"a{run}b")
        assert np.array_equal(ids, np.concatenate(parts))
        assert blank != "\n" or ids.tolist() == by_kind["bpe"].encode(f"a{run}b")
        # a run at the very end is one word: as the same run is elsewhere, by parts of equal length
        assert len(set(encode(f"a{run}")[-100_000:-10].tolist())) <= len(encode(blank))


def test_characters_are_numbered_in_code_point_order_and_others_go_as_bytes():
    tokenizer = CharTokenizer("hello, 世界")
    assert tokenizer.chars == [" ", ",", "e", "h", "l", "o", "世", "界"]
    assert tokenizer.stoi == {char: i for i, char in enumerate(tokenizer.chars)}
    assert tokenizer.itos == {i: char for char, i in tokenizer.stoi.items()}
    assert tokenizer.vocab_size == 8 + 256 + 1
    assert tokenizer.encode("hello") == [3, 2, 4, 4, 5]
    assert tokenizer.decode([6, 7]) == "世界"
    for chars in ("", "abc世"):
        tokenizer = CharTokenizer(chars)
        seen = [tokenizer.stoi[char] for char in chars]
        for unseen in ("z", "é", "界", "𠮷", "👩‍👩", "\x00"):
            expected = [tokenizer.first_byte_id + byte for byte in unseen.encode("utf-8")]
            assert tokenizer.encode(chars + unseen + chars) == seen + expected + seen
            assert tokenizer.decode(expected) == unseen
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_training_gives_the_same_tokenizer_in_every_process(by_kind):
    program = "import sys; from text.tokenizer import train_bpe; "
    program += "print(train_bpe([sys.stdin.read()], 700).fingerprint)"
    environment = {"PYTHONHASHSEED": "1", "PYTHONUTF8": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=LEARNT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    assert done.stdout == f"{by_kind['bpe'].fingerprint}\n"


def test_a_text_too_small_for_the_vocabulary_yields_a_smaller_one():
    for text in ("", "ab ab"):
        tokenizer = train_bpe([text], 4096)
        assert 257 <= tokenizer.vocab_size < 270
        assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED


def test_training_looks_at_no_more_text_than_the_limit(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TRAINING_CHARACTERS", 1000)
    texts = iter([LEARNT[:600], LEARNT[600:2000], "read for its errors, not looked at"])
    limited = train_bpe(texts, 400)
    assert next(texts, None) is None
    assert limited.fingerprint == train_bpe([LEARNT[:600], LEARNT[600:1000]], 400).fingerprint


def test_without_the_library_one_is_told_how_to_get_it(foreign_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SettingsError, match=r'"bpe:500" needs a library: pip install tokenizers'):
        train_bpe([LEARNT], 500)
    with pytest.raises(SettingsError, match="needs a library: pip install tokenizers"):
        load_tokenizer(foreign_file)


def test_a_value_of_tokenizer_is_taken_or_its_fault_is_named():
    largest = f"bpe:{MAX_TRAINED_VOCABULARY}"
    for name in ("auto", "gpt2", "char", "bpe:300", "bpe:4096", largest, "some/tokenizer.json"):
        assert find_tokenizer_fault(name) is None
    for fault, names in {
        "must be 300 to": ["bpe:299", f"bpe:{MAX_TRAINED_VOCABULARY + 1}", "bpe:0"],
        '"bpe:4096"': ["bpe", "bpe:", "bpe:-500", "bpe:4096 ", "bpe:9999999999"],
        '"gpt2"': ["GPT2"],
        "tokenizer.json": ["", "some/tokenizer.model"],
    }.items():
        for name in names:
            found = find_tokenizer_fault(name)
            assert f'is "{name}"; ' in found and fault in found


SHORT = CHINESE[:2000]


def test_the_tokenizer_that_is_named_is_made_from_the_text_and_described():
    for name, kind, described in [
        ("gpt2", "gpt2", "GPT-2"),
        ("char", "char", f"{len(set(SHORT))} characters"),
        ("bpe:400", "bpe", "BPE of 400 tokens"),
    ]:
        tokenizer = make_tokenizer(name, lambda: [SHORT[:900], SHORT[900:]])
        assert tokenizer.kind == kind
        assert tokenizer.name.startswith(described)
        assert kind != "char" or tokenizer.chars == sorted(set(SHORT))


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


@pytest.mark.parametrize(
    ("make", "end", "words"),
    [(word_piece, 2, [3, 4, 5, 6, 7]), (unigram, 1, [2, 3, 4, 5, 7])],
)
def test_a_file_of_another_model_gives_its_own_ids_and_none_around_them(path, make, end, words):
    made = make()
    made.save(str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.kind == "foreign"
    assert tokenizer.vocab_size == made.get_vocab_size()
    assert tokenizer.end_of_text_id == end
    theirs = made.encode("the cats sat.", add_special_tokens=False).ids
    assert tokenizer.encode("the cats sat.") == words == theirs
    assert tokenizer.decode(words) == "the cats sat."
    assert "".join(pieces_of(tokenizer, words * 50)) == tokenizer.decode(words * 50)
    # the file's spaces and line ends make no difference
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=8))
    assert load_tokenizer(path).fingerprint == tokenizer.fingerprint
    # a file that cuts or fills up what it encodes does neither here
    made.enable_truncation(max_length=5)
    made.enable_padding(length=8)
    made.save(str(path))
    for text in ("the cats sat." * 20, "the"):
        assert load_tokenizer(path).encode(text) == tokenizer.encode(text)


def test_the_token_that_ends_a_text_is_found_by_its_name_or_added(path):
    for specials, end in [
        ([], None),
        (["<s>", "<pad>"], None),
        *(([name], name) for name in END_NAMES),
        (["[SEP]", "<eos>", "</s>"], "</s>"),
        (["</s>", END_OF_TEXT], END_OF_TEXT),
    ]:
        made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        made.add_special_tokens(specials)
        made.save(str(path))
        tokenizer = load_tokenizer(path)
        count = 2 + len(specials)
        expected = (count, count + 1) if end is None else (made.token_to_id(end), count)
        assert (tokenizer.end_of_text_id, tokenizer.vocab_size) == expected
        assert end or tokenizer.decode([1, tokenizer.end_of_text_id]) == "b"


def test_a_declared_end_counts_before_the_names_and_is_kept_in_the_file(path):
    for specials, ends, end in [
        ([END_OF_TEXT, "<done>"], ["<done>"], "<done>"),
        ([END_OF_TEXT, "<done>"], [-1, 9, "no token", 3], "<done>"),
        ([END_OF_TEXT, "<|im_end|>"], ["<|im_end|>"], END_OF_TEXT),  # that of a turn
        ([END_OF_TEXT, "<|im_end|>", "<done>"], ["<|im_end|>", 4], "<done>"),
        (["<|eot_id|>"], ["<|eot_id|>"], "<|eot_id|>"),
        ([END_OF_TEXT], ["a"], END_OF_TEXT),  # a word ends nothing
    ]:
        made = tokenizers.Tokenizer(models.WordLevel({"a": 0, ENDS_TEXT: 1}, unk_token="a"))
        made.add_special_tokens(specials)
        made.save(str(path))
        tokenizer = read_tokenizer(path.read_bytes(), path, ends)
        assert (tokenizer.end_of_text, tokenizer.end_of_text_id) == (end, made.token_to_id(end))
        guessed = load_tokenizer(path)
        same_end = guessed.end_of_text == end
        assert (guessed.fingerprint == tokenizer.fingerprint) == same_end
        path.write_text(tokenizer.to_json(), encoding="utf-8")
        again = load_tokenizer(path)
        assert (again.end_of_text, again.fingerprint) == (end, tokenizer.fingerprint)
        assert again.adding(["<new>"]).end_of_text == end
        tokenizers.Tokenizer.from_file(str(path))  # other programs read it still


def test_a_damaged_file_is_refused_with_its_path_and_what_is_wrong(path):
    made = word_piece().to_str()
    words = json.loads(made)["model"]["vocab"]

    def changed(part: str | None = None, **changes) -> bytes:
        tree = json.loads(made)
        (tree[part] if part else tree).update(changes)
        return json.dumps(tree).encode()

    ids = [changed("model", vocab=words | {"cat": cat}) for cat in (-1, 4.0, "4", True, None)]
    for reason, contents in {
        "not valid JSON": [
            *(b"", b"\x00\x01\x02", b'{"model": "\xff"}', made[:200].encode(), b"[" * 100_000)
        ],
        'no "model"': [
            *(b"[1, 2]", b"1", changed(model=None)),
            *(changed("model", vocab=vocabulary) for vocabulary in (None, 5)),
        ],
        "id 3 stands for several tokens": [changed("model", vocab=words | {"cat": 3})],
        "id 8 is outside of its vocabulary": [changed("model", vocab=words | {"cat": 8})],
        "is no whole number": ids,
        "added_tokens": [changed(added_tokens=added) for added in (5, [5], [{"id": [1]}])],
        "merges": [changed("model", merges=5)],
        "can't be used": [changed("model", type="Magic"), changed("model", vocab=[])],
    }.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(DataError) as caught:
                load_tokenizer(path)
            assert str(path) in str(caught.value)
            assert reason in str(caught.value)
            assert len(str(caught.value).splitlines()) <= 4
    for unreadable in (path / "tokenizer.json", path.parent / "missing.json", path.parent):
        with pytest.raises(DataError, match="can't read the tokenizer") as caught:
            load_tokenizer(unreadable)
        assert str(unreadable) in str(caught.value)


def test_a_file_above_the_limits_is_refused_for_its_size(saved, path, monkeypatch):
    path.write_text(saved["bpe"], encoding="utf-8")
    for room, limit, count in [
        (tokenizer_module, "MAX_TOKENIZER_FILE", path.stat().st_size),
        (tokenizer_file, "MAX_MERGES", 700 - 257),
    ]:
        monkeypatch.setattr(room, limit, count)
        assert load_tokenizer(path).kind == "bpe"
        monkeypatch.setattr(room, limit, count - 1)
        with pytest.raises(DataError) as caught:
            load_tokenizer(path)
        monkeypatch.undo()
        assert str(path) in str(caught.value)
        assert f"{count - 1:,}" in str(caught.value)
        assert "JSON:" not in str(caught.value)


def test_characters_that_all_stand_for_bytes_are_still_characters(path):
    for chars in ("abc", "0123456789ABCDEFx<>"):
        path.write_text(CharTokenizer(chars).to_json(), encoding="utf-8")
        loaded = load_tokenizer(path)
        assert loaded.kind == "char"
        assert loaded.chars == sorted(chars)


def test_a_file_almost_like_our_own_is_run_as_a_foreign_one(saved, path):
    tree = json.loads(saved["bpe"])
    merges = tree["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    path.write_text(json.dumps(tree), encoding="utf-8")
    loaded = load_tokenizer(path)
    assert loaded.kind == "foreign"
    assert loaded.encode(HELD_OUT) == tokenizers.Tokenizer.from_file(str(path)).encode(HELD_OUT).ids
    ranks = list(tree["model"]["vocab"])[:256]
    ranks[0] = '""'  # in the place of one of the 256 bytes
    vocabulary = {token: i for i, token in enumerate([*ranks, END_OF_TEXT])}
    tree["added_tokens"][0]["id"] = 256
    tree["model"] |= {"vocab": vocabulary, "merges": [['"', '"']]}
    path.write_text(json.dumps(tree), encoding="utf-8")
    assert load_tokenizer(path).kind == "foreign"


# texts without a blank: their words are cut, so that time and memory stay in proportion

CHOOSER = random.Random(0)
ALPHABETS = {
    "dna": "ACGT",
    "base64": f"{string.ascii_letters}{string.digits}+/",
    "letter": "a",
    "digit": "7",
    "mark": "-",
    "thai": "กขคงจชซณดตถทนบปผพมยรลวสหอะาิีึืุู่้เแโใไ",
    "chinese": "".join(sorted({char for char in CHINESE if char.isalpha()})),
    "printable": string.printable[:94],
    "blanks": " \n",
}
UNCUT = {kind: "".join(CHOOSER.choices(chars, k=5000)) for kind, chars in ALPHABETS.items()}
UNCUT["mixed"] = "".join(f"{text[:300]} 'tis {text[:65]}'s" for text in UNCUT.values())


@pytest.fixture(scope="module")
def trained():
    return train_bpe([ENGLISH[:5000], *UNCUT.values()], 700)


def test_long_words_of_a_trained_tokenizer_have_the_same_ids_in_the_library(trained):
    library = tokenizers.Tokenizer.from_str(trained.to_json())
    for text in UNCUT.values():
        expected = library.encode(text).ids
        assert trained.encode(text) == expected
        assert trained.decode(expected) == text


def test_no_trained_token_is_longer_than_a_word_and_its_blank():
    tokenizer = train_bpe([" " + "a" * 100_000, "b" * 100_000], 400)
    longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size - 1))
    assert 64 <= longest <= 65


@pytest.mark.parametrize("kind", UNCUT)
def test_chunks_of_a_text_without_a_place_to_cut_have_the_tokens_of_the_whole(
    trained, kind, monkeypatch
):
    monkeypatch.setattr(token_cache, "CHUNK", 500)
    monkeypatch.setattr(token_cache, "MOST_UNCUT", 500)
    monkeypatch.setattr(token_cache, "LONGEST_WORD", 64)
    text = UNCUT[kind]
    whole = [part for part, _ in cut_into_chunks(iter([(text, True)]))]
    pieces = [(text[i : i + 77], i + 77 >= len(text)) for i in range(0, len(text), 77)]
    assert [part for part, _ in cut_into_chunks(iter(pieces))] == whole
    assert "".join(whole) == text
    assert max(map(len, whole)) <= 500
    for tokenizer in (trained, CharTokenizer("ACGTa")):
        ids = [token for part in whole for token in tokenizer.encode(part)]
        assert ids == tokenizer.encode(text)


@pytest.mark.parametrize("kind", UNCUT)
def test_long_runs_are_cut_for_gpt2_and_only_they(ours, kind, monkeypatch):
    text = UNCUT[kind]
    assert cut_long_words(text) == [text]
    monkeypatch.setattr(tokenizer_module, "LONGEST_WORD", 128)
    parts = cut_long_words(f"one {text}two {text}")
    assert "".join(parts) == f"one {text}two {text}"
    longest_run = max(
        len(run.group()) for part in parts for run in tokenizer_module.RUN.finditer(part)
    )
    assert longest_run <= 128
    if kind in ("base64", "printable"):
        assert len(parts) == 1
    ids = [token for part in parts for token in ours._encoding.encode_ordinary(part)]
    assert ours.encode(f"one {text}two {text}") == ids
    assert np.array_equal(ours.encode_array(f"one {text}two {text}"), ids)


def test_training_takes_texts_until_their_different_words_are_many(monkeypatch):
    monkeypatch.setattr(learn_bpe, "MOST_DISTINCT", 1000)
    same = ["the same words "] * 500
    assert list(learn_bpe.until_distinct(same)) == same
    others = ("".join(CHOOSER.choices("ACGT", k=100)) for _ in range(500))
    assert len(list(learn_bpe.until_distinct(others))) == 10


class Interrupted(subprocess.Popen):
    """A child whose parent gets a Ctrl-C while it waits for it."""

    made: list[subprocess.Popen] = []  # noqa: RUF012 (of the one test that uses it)

    def wait(self, timeout=None):
        if not self.made:
            self.made.append(self)
            signal.raise_signal(signal.SIGINT)
        return super().wait(timeout)


def test_ctrl_c_while_a_tokenizer_is_trained_ends_the_child_and_leaves_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    (tmp_path / "dna.txt").write_text(UNCUT["dna"] * 20)
    spec = DataSpec((str(tmp_path / "dna.txt"),))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            tokenize(spec, "bpe:4096", 0.9, tmp_path / "cache")
    finally:
        signal.signal(signal.SIGINT, before)
    assert Interrupted.made[0].returncode is not None
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_child_that_fails_is_told_and_one_without_its_parent_ends(monkeypatch):
    with pytest.raises(ResourceError, match="trains the tokenizer failed"):
        learn_bpe.learn_bpe(["text"], 300, "(no pattern")
    command = [sys.executable, "-c", learn_bpe.PROGRAM, "300", "."]
    cut_off = subprocess.run(command, cwd=learn_bpe.REPOSITORY, input=b"2\nab", capture_output=True)
    assert (cut_off.returncode, cut_off.stdout) == (1, b"")
