"""Small models in GGUF files, tokenizers of other kinds, and texts that they differ on."""

import json
import random
from pathlib import Path

import tokenizers
import torch

from exchange.gguf import open_gguf, write_gguf
from exchange.gguf_file import GGUFFile, gguf_chunks, read_header
from exchange.gguf_tokenizer import BYTE, CONTROL, NORMAL, RULES, SPACE, UNKNOWN
from model import GPTConfig, GPTModel
from storage.checkpoint import assign_weights, weights_of
from tests.conftest import REPOSITORY
from tests.texts import CHINESE, ENGLISH, train_in_the_library
from text.tokenizer import CharTokenizer, Tokenizer, read_tokenizer
from text.tokenizer_file import END_OF_TEXT

LETTERS = CharTokenizer("abcdefgh ,.\n")
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LLAMA = {"architecture": "llama", "emb_dim": 64, "n_heads": 4, "n_kv_heads": 2, "ff_dim": 80}
MODELS = {
    "gpt2": {"emb_dim": 64, "n_heads": 4, "ff_dim": 80, "tie_embeddings": False},
    "llama": LLAMA | {"norm_eps": 1e-3, "rope_theta": 500},  # whole, as in many a config.json
    "qwen3": LLAMA | {"qk_norm": True, "head_dim": 32, "tie_embeddings": False},
    "biases": LLAMA | {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_dim": 48},
    "llama3": LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    "linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


def model_of(kind: str, tokenizer: Tokenizer = LETTERS) -> GPTModel:
    """A small model with seeded random weights, norms and biases included, of distinct logits."""
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": 64, "n_layers": 2}
    model = GPTModel(GPTConfig(**sizes | MODELS[kind])).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_((0.5 if parameter.ndim == 1 else 0.15) * torch.randn_like(parameter))
    return model


def written(path: Path, model: GPTModel, tokenizer: Tokenizer = LETTERS, **options) -> Path:
    write_gguf(path, model.config, weights_of(model), tokenizer, name="A test's", **options)
    return path


def opened_model(path: Path) -> GPTModel:
    pretrained = open_gguf(path)
    with torch.device("meta"):
        model = GPTModel(pretrained.config)
    assign_weights(model, pretrained.weights(), path)
    return model.eval().requires_grad_(False)


PIECES = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'LL",
    "I'm",
    "123",
    "4567890",
    "²",
    "½",
    "٣",
    "don't",
]
PIECES += [
    "_x",
    "://",
    END_OF_TEXT,
    "é",
    "e\u0301",
    "👨‍👩‍👧",
    "中文",
    "!!!",
    "…",
    "\u00a0",
    "\u3000",
]
PIECES += [
    "\x01",
    "\x7f",
    "\u200b",
    "ß",
    "İ",
    "word",
    "CamelCase",
    "<|im_start|>",
    "日本語",
    "한국어",
]


def texts(count: int) -> list[str]:
    """Parts of samples and of code, odd pieces side by side, and any characters."""
    chooser = random.Random(0)
    pools = (ENGLISH, CHINESE, (REPOSITORY / "model.py").read_text(encoding="utf-8"))
    blocks = ((0x20, 0x7F), (0xA0, 0x590), (0x900, 0xE00), (0x2000, 0x2C00), (0x3040, 0x9FFF))
    blocks += ((0xAC00, 0xD7A4), (0x1F300, 0x1FAFF), (1, 0x20), (0x10000, 0x10200))
    found = []
    for i in range(count):
        pool = chooser.choice(pools)
        start = chooser.randrange(len(pool))
        some = (chr(chooser.randrange(*chooser.choice(blocks))) for _ in range(i % 40 + 1))
        odd = "".join(chooser.choices(PIECES, k=i % 12 + 1))
        text = (pool[start : start + i % 150 + 1], odd, "".join(some))[i % 3]
        found.append(text.replace(SPACE, ""))  # which llama.cpp takes for a space
    return found


def foreign(rule: str) -> Tokenizer:
    """A byte-level BPE of the kind that llama.cpp has a name for, its special tokens first."""
    special = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
    tree = json.loads(train_in_the_library(ENGLISH + CHINESE, 700, *special).to_str())
    tree |= {"pre_tokenizer": RULES[rule].pre_tokenizer, "normalizer": RULES[rule].normalizer}
    tree["model"]["ignore_merges"] = RULES[rule].ignore_merges
    return read_tokenizer(json.dumps(tree).encode(), Path("tokenizer.json"))


def sentence_piece(path: Path, **metadata) -> Path:
    """A file with a SentencePiece vocabulary, and a model for it."""
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False)
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator([ENGLISH], trainer)
    learnt = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(learnt)
    scores = [0.0] * 259 + [-float(i) for i in range(len(learnt))]
    holder = CharTokenizer(map(chr, range(0x4E00, 0x4E00 + len(tokens) - 257)))
    file = read_header(written(path, model_of("llama", holder), holder))
    changed = {"tokens": tokens, "token_type": types, "scores": scores, "bos_token_id": 1}
    changed |= {"eos_token_id": 2, "unknown_token_id": 0, "add_space_prefix": True} | metadata
    return rewritten(file, {f"tokenizer.ggml.{key}": value for key, value in changed.items()})


def rewritten(file: GGUFFile, metadata: dict) -> Path:
    """The file with other metadata (None: without them), and its tensors in fp32."""
    metadata = {k: v for k, v in (file.metadata | metadata).items() if v is not None}
    tensors = {name: file.read(name) for name in file.tensors}
    chunks = gguf_chunks(metadata, tensors, dict.fromkeys(tensors, "F32"))
    file.path.write_bytes(b"".join(chunks))
    return file.path
