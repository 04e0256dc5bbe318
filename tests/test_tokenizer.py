"""Text to ids and back: GPT-2's tokens against tiktoken's own, all kinds against the libraries."""

import hashlib
import json
import os
import random
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

from engine.errors import DataError, SettingsError
from tests.conftest import REPOSITORY
from tests.texts import CHINESE, ENGLISH, train_in_the_library
from text import tokenizer as tokenizer_module
from text import tokenizer_file
from text.tokenizer import (
    END_NAMES,
    GPT2_FILE,
    GPT2_FINGERPRINT,
    GPT2_SHA256,
    MAX_TRAINED_VOCABULARY,
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


@pytest.fixture(params=KINDS)
def tokenizer(request, by_kind):
    return by_kind[request.param]


@pytest.fixture(scope="module")
def files(by_kind, tmp_path_factory) -> dict:
    """Their tokenizer.json's."""
    folder = tmp_path_factory.mktemp("saved")
    for kind, tokenizer in by_kind.items():
        (folder / f"{kind}.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return {kind: folder / f"{kind}.json" for kind in by_kind}


@pytest.fixture(scope="module")
def theirs(files) -> dict:
    """Those files as transformers reads them."""
    from transformers import PreTrainedTokenizerFast

    return {kind: PreTrainedTokenizerFast(tokenizer_file=str(path)) for kind, path in files.items()}


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


# ------------------------------------------------------------------------------ GPT-2's


def test_vocabulary_equals_tiktokens(ours, oracle):
    assert ours.vocab_size == oracle.n_vocab == 50257
    assert ours.end_of_text_id == oracle.eot_token == 50256
    expected = [oracle.decode_single_token_bytes(token) for token in range(50257)]
    assert [ours.token_bytes(token) for token in range(50257)] == expected


PIECES = st.sampled_from(
    [*" \n\t\r'’.,0aZé春\x00\u3000", "\r\n", "'ll", "  ", "<|endoftext|>", "👍🏽"]
)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.text() | st.lists(PIECES | st.characters(exclude_categories=["Cs"])).map("".join))
@example("\ufeff")
def test_any_text_has_tiktokens_ids(ours, oracle, text):
    assert ours.encode(text) == oracle.encode(text, disallowed_special=())


@pytest.mark.parametrize(
    "name", ["the-verdict.txt", "ci.txt", "wikitext-2/valid.txt", "tinyshakespeare.txt"]
)
def test_real_texts_have_tiktokens_ids(ours, oracle, shared_data, name):
    text = (shared_data / name).read_bytes().decode("utf-8")[:100_000]
    ids = ours.encode(text)
    assert ids == oracle.encode(text, disallowed_special=())
    assert ours.decode(ids) == text
    assert name != "the-verdict.txt" or len(ids) == 5145


def test_texts_have_tiktokens_ids_and_halves_of_characters_are_replaced(ours, oracle):
    for text in TEXTS.values():
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


# ------------------------------------------------------------------------------ every kind


def pieces_of(tokenizer, ids):
    """The text as ids come in, without the steps that complete no character."""
    decoder = tokenizer.decoder()
    yield from filter(None, map(decoder.add, ids))
    yield from filter(None, [decoder.finish()])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back_and_have_the_ids_of_transformers_for_the_saved_file(by_kind, theirs, kind):
    tokenizer, their = by_kind[kind], theirs[kind]
    assert len(their) == tokenizer.vocab_size
    for text in [HELD_OUT, MIXED, *TEXTS.values()]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_array(text).tolist() == ids
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        if END_OF_TEXT not in text:
            assert their.encode(text, add_special_tokens=False) == ids
            assert their.decode(ids, clean_up_tokenization_spaces=False) == text
    if kind != "foreign":
        a, end = tokenizer.encode("a"), tokenizer.end_of_text_id
        assert end == tokenizer.vocab_size - 1
        assert tokenizer.decode([end]) == END_OF_TEXT
        assert their.encode("a<|endoftext|>", add_special_tokens=False) == [*a, end]
        assert their.decode([*a, end], skip_special_tokens=True) == "a"


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(PIECES).map("".join)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(KINDS), ANY_TEXT)
@example("bpe", "\ufeff\ufffd")
@example("foreign", "\ufffd\ufffd a")
def test_any_text_has_the_librarys_ids_and_comes_back_whole_and_in_a_stream(
    by_kind, theirs, kind, text
):
    tokenizer = by_kind[kind]
    ids = tokenizer.encode(text)
    if END_OF_TEXT not in text:
        assert theirs[kind].backend_tokenizer.encode(text).ids == ids
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.decode(ids) == text
    shown = list(pieces_of(tokenizer, ids))
    assert "".join(shown) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in shown)


def test_a_stream_shows_each_character_as_soon_as_it_is_whole(tokenizer):
    text = MIXED + "𠮷" * 30 + HELD_OUT[-300:]
    ids = tokenizer.encode(text)
    decoder, shown = tokenizer.decoder(), ""
    for n, token in enumerate(ids, start=1):
        if piece := decoder.add(token):
            shown += piece
            assert tokenizer.decode(ids[:n]).rstrip("\ufffd") == shown == text[: len(shown)]
    assert shown + decoder.finish() == text


def test_a_stream_of_any_ids_joins_to_what_decode_gives(tokenizer):
    ids = tokenizer.encode("ab𠮷")
    cases = [ids[:stop] for stop in range(len(ids) + 1)]
    chooser = random.Random(7)
    for _ in range(20):
        cases.append(chooser.choices(range(tokenizer.vocab_size), k=chooser.randrange(1, 200)))
    for ids in cases:
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_the_name_of_a_control_token_in_a_text_is_text(tokenizer):
    for special in (END_OF_TEXT, "<eos>", "<pad>"):
        ids = tokenizer.encode(f"a{special}b {special}")
        assert tokenizer.decode(ids) == f"a{special}b {special}"
        assert tokenizer.end_of_text_id not in ids
        assert len(ids) > len(tokenizer.encode("ab "))


def test_ids_of_a_trained_bpe_equal_those_of_the_library_that_trained_it(by_kind):
    trained = train_in_the_library(LEARNT, 699)
    assert by_kind["bpe"].vocab_size == 700
    for text in (LEARNT, HELD_OUT, MIXED):
        assert by_kind["bpe"].encode(text) == trained.encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_file_gives_the_same_kind_ids_and_fingerprint(by_kind, files, kind):
    tokenizer, path = by_kind[kind], files[kind]
    for again in (load_tokenizer(path), restore_tokenizer(kind, path.read_bytes())):
        assert (again.kind, type(again)) == (kind, type(tokenizer))
        assert again.fingerprint == tokenizer.fingerprint
        assert again.vocab_size == tokenizer.vocab_size
        assert again.end_of_text_id == tokenizer.end_of_text_id
        assert again.encode(HELD_OUT + MIXED) == tokenizer.encode(HELD_OUT + MIXED)
        if kind != "gpt2":  # it takes half a second, and is restored without the file
            assert again.to_json() == path.read_text(encoding="utf-8")


def test_fingerprints_tell_tokenizers_apart(by_kind):
    others = [train_bpe([LEARNT], 701), train_bpe([HELD_OUT], 700), CharTokenizer(LEARNT + "𡃁")]
    fingerprints = [tokenizer.fingerprint for tokenizer in [*by_kind.values(), *others]]
    assert len(set(fingerprints)) == len(fingerprints)
    assert by_kind["gpt2"].fingerprint == GPT2_FINGERPRINT


@pytest.mark.parametrize("blank", [" ", "\n", "\t", "\u3000"], ids=ascii)
def test_a_million_blanks_have_the_ids_of_the_runs_parts(by_kind, blank):
    """tiktoken alone runs out of stack."""
    encode = by_kind["bpe"].encode_array
    run = blank * 1_000_000
    # the pattern leaves the run's last blank to the word behind it
    parts = [encode("a"), encode(run[:-1]), encode(f"{blank}b")]
    ids = encode(f"a{run}b")
    assert np.array_equal(ids, np.concatenate(parts))
    assert blank != "\n" or ids.tolist() == by_kind["bpe"].encode(f"a{run}b")
    # a run at the very end is one word: as the same run is elsewhere, by parts of equal length
    assert len(set(encode(f"a{run}")[-100_000:-10].tolist())) <= len(encode(blank))


# ------------------------------------------------------------------------------ characters


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


# ------------------------------------------------------------------------------ training


def test_training_gives_the_same_tokenizer_in_every_process(by_kind):
    program = """if True:
        import sys
        from text.tokenizer import train_bpe
        print(train_bpe([sys.stdin.buffer.read().decode("utf-8")], 700).fingerprint)
    """
    assert train_bpe([LEARNT], 700).to_json() == by_kind["bpe"].to_json()
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=LEARNT.encode("utf-8"),
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().strip() == by_kind["bpe"].fingerprint


def test_a_text_too_small_for_the_vocabulary_yields_a_smaller_one():
    for text in ("", "a", "ab ab"):
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
    name, reason = choose_tokenizer([SHORT] * 100)
    assert name == "char"
    assert "pip install tokenizers" in reason


# ------------------------------------------------------------------------------ which tokenizer

FAULTS = {
    "must be 300 to": ["bpe:299", f"bpe:{MAX_TRAINED_VOCABULARY + 1}", "bpe:0"],
    '"bpe:4096"': ["bpe", "bpe:", "bpe:-500", "bpe:4096 ", "bpe:9999999999"],
    '"gpt2"': ["GPT2"],
    "tokenizer.json": ["", "some/tokenizer.model"],
}


def test_a_value_of_tokenizer_is_taken_or_its_fault_is_named():
    largest = f"bpe:{MAX_TRAINED_VOCABULARY}"
    for name in ("auto", "gpt2", "char", "bpe:300", "bpe:4096", largest, "some/tokenizer.json"):
        assert find_tokenizer_fault(name) is None
    for fault, names in FAULTS.items():
        for name in names:
            found = find_tokenizer_fault(name)
            assert f'is "{name}"; ' in found and fault in found


SHORT = CHINESE[:2000]


def test_the_tokenizer_is_chosen_by_what_gpt2_would_need(ours):
    rate = len(ours.encode(SHORT)) / len(SHORT)  # tokens a character
    too_short = f"would need {rate:.2f} tokens a character, and the text is too short to train one"
    for texts, expected, why in [
        ([ENGLISH], "gpt2", "GPT-2's needs 0."),
        ([], "gpt2", "GPT-2's needs 0.00"),
        ([SHORT] * 99, "char", too_short),
        ([SHORT] * 100, "bpe:4096", f"GPT-2's would need {rate:.2f} tokens a character"),
        ([SHORT * 500, ENGLISH * 1000], "bpe:4096", f"GPT-2's would need {rate:.2f}"),
    ]:
        name, reason = choose_tokenizer(texts)
        assert name == expected
        assert why in reason


def test_the_tokenizer_that_is_named_is_made_from_the_text_and_described():
    chars = f"{len(set(SHORT))} characters"
    for name, kind, description in [
        ("gpt2", "gpt2", "GPT-2"),
        ("char", "char", chars),
        ("bpe:400", "bpe", "BPE of 400 tokens"),
        ("auto", "char", f"{chars}; chosen because GPT-2's would need"),
    ]:
        tokenizer, told = make_tokenizer(name, lambda: [SHORT[:900], SHORT[900:]])
        assert tokenizer.kind == kind
        assert told.startswith(description)
        assert kind != "char" or tokenizer.chars == sorted(set(SHORT))


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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.json"


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
    # a file that cuts or fills up what it encodes does neither here
    made.enable_truncation(max_length=5)
    made.enable_padding(length=8)
    made.save(str(path))
    for text in ("the cats sat." * 20, "the"):
        assert load_tokenizer(path).encode(text) == tokenizer.encode(text)


def test_the_fingerprint_of_a_foreign_file_is_not_that_of_its_spaces(foreign_file, path):
    path.write_text(json.dumps(json.loads(foreign_file.read_bytes())))
    assert path.read_bytes() != foreign_file.read_bytes()
    assert load_tokenizer(path).fingerprint == load_tokenizer(foreign_file).fingerprint


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


def damaged(change) -> bytes:
    tree = json.loads(word_piece().to_str())
    change(tree, tree["model"])
    return json.dumps(tree).encode()


def with_id(cat) -> bytes:
    return damaged(lambda _, model: model["vocab"].update(cat=cat))


def with_model(**changes) -> bytes:
    return damaged(lambda _, model: model.update(changes))


NO_NUMBER = "is no whole number"
DAMAGES = {
    "nothing": (b"", "not valid JSON"),
    "no JSON": (b"\x00\x01\x02", "not valid JSON"),
    "no UTF-8": (b'{"model": "\xff"}', "not valid JSON"),
    "cut": (with_model()[:200], "not valid JSON"),
    "deeply nested": (b"[" * 100_000, "not valid JSON"),
    "a list": (b"[1, 2]", 'no "model"'),
    "a number": (b"1", 'no "model"'),
    "no model": (damaged(lambda tree, _: tree.pop("model")), 'no "model"'),
    "no vocabulary": (damaged(lambda _, model: model.pop("vocab")), 'no "model"'),
    "vocabulary a number": (with_model(vocab=5), 'no "model"'),
    "two of an id": (with_id(3), "id 3 stands for several tokens"),
    "id too high": (with_id(8), "id 8 is outside of its vocabulary"),
    **{f"id {cat!r}": (with_id(cat), NO_NUMBER) for cat in (-1, 4.0, "4", True, None)},
    "added a number": (damaged(lambda tree, _: tree.update(added_tokens=5)), "added_tokens"),
    "added no dict": (damaged(lambda tree, _: tree.update(added_tokens=[5])), "added_tokens"),
    "added without id": (
        damaged(lambda tree, _: tree["added_tokens"][0].update(id=[1])),
        "added_tokens",
    ),
    "merges a number": (with_model(merges=5), "merges"),
    "unknown model": (with_model(type="Magic"), "can't be used"),
    "no list of pieces": (with_model(vocab=[]), "can't be used"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_refused_with_its_path_and_what_is_wrong(path, content, reason):
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("missing.json", "folder", "file/tokenizer.json"):
        with pytest.raises(DataError, match="can't read the tokenizer") as caught:
            load_tokenizer(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("limit", ["MAX_TOKENIZER_FILE", "MAX_MERGES"])
def test_a_file_above_the_limits_is_refused_for_its_size(files, monkeypatch, limit):
    path = files["bpe"]
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


def test_characters_that_all_stand_for_bytes_are_still_characters(path):
    for chars in ("abc", "0123456789ABCDEFx<>"):
        path.write_text(CharTokenizer(chars).to_json(), encoding="utf-8")
        loaded = load_tokenizer(path)
        assert loaded.kind == "char"
        assert loaded.chars == sorted(chars)


def test_a_file_almost_like_our_own_is_run_as_a_foreign_one(files, path):
    tree = json.loads(files["bpe"].read_bytes())
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
