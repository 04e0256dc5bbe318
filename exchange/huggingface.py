"""transformers' folders, both ways: GPT2LMHeadModel, LlamaForCausalLM and Qwen3ForCausalLM.

Names of settings and tensors: github.com/huggingface/transformers, src/transformers/models.
"""

import json
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from engine.errors import (
    CheckpointError,
    DataError,
    SettingsError,
    first_line,
)
from engine.precision import DTYPES
from engine.settings import find_problems, raise_if_any, shown
from exchange.pretrained import Pretrained, fingerprint_of, require_memory
from model import ROPE_SCALINGS, GPTConfig
from storage.checkpoint import Tensors, map_safetensors, safetensors_chunks
from storage.files import NewFolder, make_folder, require_space, to_json
from text.tokenizer import (
    ENDS_TEXT,
    TURN_ENDS,
    ForeignTokenizer,
    Tokenizer,
    begin_texts_with,
    begin_token_of,
    read_tokenizer,
)
from text.tokenizer_file import END_OF_TEXT, begin_with, special_token, vocabulary_json

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
PICKLED = "pytorch_model.bin"
MOST_JSON_BYTES = 1 << 22  # Llama 3's longest, an index or tokenizer_config.json, has 50 KB
# Gemma's has 17 MB, with 1.4 million values: more would fill memory as Python's objects
MOST_TOKENIZER_BYTES, MOST_VALUES, MOST_OBJECTS = 1 << 25, 2_500_000, 200_000
MOST_CONTEXT = 1_000_000  # GPTConfig's; a longer one is cut, which changes nothing before
FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# beside the weights, in files of older versions: masks and rotary frequencies
BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "merges.txt", "*.safetensors"]


@dataclass(frozen=True)
class Form:
    """A class of transformers: how its config.json says what GPTConfig says."""

    name: str
    model_type: str
    fixed: dict[str, Any]  # of GPTConfig, for all models of the class
    sizes: dict[str, str]  # their name -> ours: must be there
    others: dict[str, tuple[str, Any]]  # their name -> ours, and their default
    only: dict[str, Any]  # what no other value of can be represented
    prefix: str  # what may stand before the names of its tensors


_LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "emb_dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "ff_dim",
}
_LLAMA_OTHERS: dict[str, tuple[str, Any]] = {
    "num_key_value_heads": ("n_kv_heads", None),
    "head_dim": ("head_dim", None),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "attention_bias": ("qkv_bias", False),
    "attention_dropout": ("attention_drop_rate", 0.0),
    "tie_word_embeddings": ("tie_embeddings", False),
}
_LLAMA_ONLY = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "rope_interleaved": False}
FORMS = (
    Form(
        "GPT2LMHeadModel",
        "gpt2",
        fixed={"architecture": "gpt2", "qkv_bias": True},
        sizes={
            "vocab_size": "vocab_size",
            "n_positions": "context_length",
            "n_embd": "emb_dim",
            "n_head": "n_heads",
            "n_layer": "n_layers",
        },
        others={
            "n_inner": ("ff_dim", None),
            "activation_function": ("activation", "gelu_new"),
            "layer_norm_epsilon": ("norm_eps", 1e-5),
            "resid_pdrop": ("drop_rate", 0.1),
            "attn_pdrop": ("attention_drop_rate", 0.1),
            "tie_word_embeddings": ("tie_embeddings", True),
        },
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        prefix="transformer.",
    ),
    Form(
        "LlamaForCausalLM",
        "llama",
        fixed={"architecture": "llama"},
        sizes=_LLAMA_SIZES,
        others=_LLAMA_OTHERS | {"mlp_bias": ("mlp_bias", False)},
        only=_LLAMA_ONLY,
        prefix="",
    ),
    Form(
        "Qwen3ForCausalLM",
        "qwen3",
        fixed={"architecture": "llama", "qk_norm": True},
        sizes=_LLAMA_SIZES,
        others=_LLAMA_OTHERS | {"head_dim": ("head_dim", 128)},
        only=_LLAMA_ONLY | {"use_sliding_window": False},
        prefix="",
    ),
)
# transformers' names of an activation, the one that is written first, by ours
GPT2_ACTIVATIONS = {
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "gelu_exact": ("gelu", "gelu_python"),
    "relu": ("relu",),
}


# ------------------------------------------------------------------------------- the tensors


@dataclass(frozen=True)
class Part:
    """A tensor of transformers, as rows of one of ours."""

    theirs: str
    ours: str
    shape: tuple[int, ...]  # in our orientation
    first_row: int = 0
    total_rows: int | None = None  # of ours; None: the part is all of it
    is_transposed: bool = False  # theirs is (inputs, outputs)
    is_held: bool = True  # False: a bias that ours lacks, which theirs has as zeros

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape that theirs has in a file."""
        return self.shape[::-1] if self.is_transposed else self.shape


def layout(config: GPTConfig) -> Iterator[Part]:
    """Where each tensor of the class that fits a config lies in a GPTModel's weights."""
    V, C = config.vocab_size, config.emb_dim
    is_llama = config.architecture == "llama"
    names = ("model.embed_tokens", "model.norm") if is_llama else ("wte", "ln_f")
    yield Part(f"{names[0]}.weight", "token_embedding.weight", (V, C))
    if not is_llama:
        yield Part("wpe.weight", "position_embedding.weight", (config.context_length, C))
    yield from _norm(config, names[1], "final_norm")
    if not config.tie_embeddings:
        yield Part("lm_head.weight", "head.weight", (V, C))
    for layer in range(config.n_layers):
        block = _llama_block if is_llama else _gpt2_block
        yield from block(config, layer)


def _norm(config: GPTConfig, theirs: str, ours: str) -> Iterator[Part]:
    kinds = ("weight",) if config.architecture == "llama" else ("weight", "bias")
    for kind in kinds:
        yield Part(f"{theirs}.{kind}", f"{ours}.{kind}", (config.emb_dim,))


def _gpt2_block(config: GPTConfig, layer: int) -> Iterator[Part]:
    assert config.ff_dim, "GPTConfig has replaced it"
    C, F = config.emb_dim, config.ff_dim
    theirs, ours = f"h.{layer}", f"blocks.{layer}"
    yield from _norm(config, f"{theirs}.ln_1", f"{ours}.attention_norm")
    yield from _norm(config, f"{theirs}.ln_2", f"{ours}.mlp_norm")
    for name, own, shape, has_bias in (
        ("attn.c_attn", "attention.qkv", (3 * C, C), config.qkv_bias),
        ("attn.c_proj", "attention.out_proj", (C, C), config.out_bias),
        ("mlp.c_fc", "mlp.0", (F, C), config.mlp_bias),
        ("mlp.c_proj", "mlp.2", (C, F), config.mlp_bias),
    ):
        weight, bias = f"{theirs}.{name}.weight", f"{theirs}.{name}.bias"
        yield Part(weight, f"{ours}.{own}.weight", shape, is_transposed=True)
        yield Part(bias, f"{ours}.{own}.bias", shape[:1], is_held=bool(has_bias))


def _llama_block(config: GPTConfig, layer: int) -> Iterator[Part]:
    assert config.ff_dim and config.head_dim and config.n_kv_heads, "GPTConfig has replaced them"
    C, F, D = config.emb_dim, config.ff_dim, config.head_dim
    q_rows, kv_rows = config.n_heads * D, config.n_kv_heads * D
    theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
    yield from _norm(config, f"{theirs}.input_layernorm", f"{ours}.attention_norm")
    yield from _norm(config, f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm")
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            part = f"{theirs}.self_attn.{name}.weight", f"{ours}.attention.{name}.weight"
            yield Part(*part, (D,))
    in_attention = config.qkv_bias or bool(config.out_bias)  # one setting of theirs for both
    products = (
        ("attention.qkv", C, {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}),
        ("attention.out_proj", q_rows, {"o_proj": C}),
        ("mlp.gate_up", C, {"gate_proj": F, "up_proj": F}),
        ("mlp.down", F, {"down_proj": C}),
    )
    held = (config.qkv_bias, config.out_bias, config.mlp_bias, config.mlp_bias)
    for (own, inputs, parts), is_held in zip(products, held, strict=True):
        place, first, total = own.split(".")[0], 0, sum(parts.values())
        within = "self_attn" if place == "attention" else "mlp"
        for name, rows in parts.items():
            prefix, at = f"{theirs}.{within}.{name}", (first, total)
            yield Part(f"{prefix}.weight", f"{ours}.{own}.weight", (rows, inputs), *at)
            if in_attention if place == "attention" else config.mlp_bias:
                bias = f"{prefix}.bias", f"{ours}.{own}.bias"
                yield Part(*bias, (rows,), *at, is_held=bool(is_held))
            first += rows


# ------------------------------------------------------------------------------- reading


def open_folder(path: Path, name: str | None = None) -> Pretrained:
    """A folder as transformers writes it: a config, weights, a tokenizer; its weights stay unread.

    name is what the log calls it, the folder's own by default. Raises CheckpointError for what is
    damaged, of a class that is not in FORMS, or has settings that GPTConfig can't express.
    """
    settings = _read_json(path / CONFIG)
    form = _form_of(settings, path / CONFIG)
    config, stored = _map_model(path, form, _read_config(settings, form, path / CONFIG))
    formats = sorted({FORMATS[tensor.dtype] for tensor in stored.values()})
    return Pretrained(
        source=f"{name or path.resolve().name} ({form.name}, {' and '.join(formats)})",
        config=config,
        tokenizer=_read_tokenizer(path, form, config, settings),
        weights=partial(_read_weights, path, form, config),
        fingerprint=fingerprint_of(stored),
        chat_template=_read_template(path),
    )


def _read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """A JSON object; CheckpointError if it is damaged or too long."""
    try:
        value = json.loads(_read_bytes(path, most_bytes))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {first_line(error)}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object ({{...}}), not {type(value).__name__}.")
    return value


def _read_bytes(path: Path, most_bytes: int) -> bytes:
    _require_file(path, most_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}.") from None


def _require_file(path: Path, most_bytes: int | None = None) -> None:
    """Raise CheckpointError for what is no regular file, which may never end, or a too long one."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} can't be read: {reason}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no regular file.")
    if most_bytes is not None and found.st_size > most_bytes:
        raise CheckpointError(
            f"{path} has {found.st_size:,} bytes; no such file needs more than {most_bytes:,}."
        )


def _form_of(settings: dict[str, Any], path: Path) -> Form:
    """The class that a config.json names; CheckpointError if it is not in FORMS."""
    named = settings.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    kind = settings.get("model_type")
    for form in FORMS:
        if name == form.name or (name is None and kind == form.model_type):
            return form
    what = "no class" if name is None and kind is None else shown(name or kind)
    raise CheckpointError(
        f"{path} is of {what}, which can't be opened.\n"
        f"Models of {', '.join(form.name for form in FORMS)} can."
    )


def _read_config(settings: dict[str, Any], form: Form, path: Path) -> GPTConfig:
    """The GPTConfig of a config.json; CheckpointError with every setting that it can't express."""
    lacking = [name for name in form.sizes if settings.get(name) is None]
    if lacking:
        raise CheckpointError(f"{path} lacks {', '.join(lacking)}.")
    values = form.fixed | {ours: settings[name] for name, ours in form.sizes.items()}
    labels = {ours: name for name, ours in form.sizes.items()}
    for name, (ours, default) in form.others.items():
        given = settings.get(name)
        values[ours] = default if given is None else given
        labels[ours] = name
    problems = [
        f"{name} is {shown(settings[name])}; only {shown(allowed)} can be expressed"
        for name, allowed in form.only.items()
        if settings.get(name) not in (None, allowed)
    ]
    if settings.get("quantization_config") is not None:
        problems.append("its weights are quantized; fp32, bf16 and fp16 can be read")
    kinds = settings.get("layer_types")
    if isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds):
        problems.append('layer_types has others than "full_attention"')
    if form.model_type == "gpt2":
        problems += _name_activation(values)
    else:
        values["out_bias"] = values["qkv_bias"]
        if isinstance(values["context_length"], int):
            values["context_length"] = min(values["context_length"], MOST_CONTEXT)
        problems += _add_rope(values, settings)
    problems += find_problems(GPTConfig, values, lambda name: labels.get(name, name))
    if problems:
        raise CheckpointError("\n  ".join([f"{path} can't be opened:", *problems[:3]]))
    return GPTConfig(**values)


def _name_activation(values: dict[str, Any]) -> list[str]:
    """Replace transformers' name of GPT-2's activation by ours; the problem if we have none."""
    given = values["activation"]
    for ours, theirs in GPT2_ACTIVATIONS.items():
        if given in theirs:
            values["activation"] = ours
            return []
    del values["activation"]
    known = ", ".join(shown(name) for names in GPT2_ACTIVATIONS.values() for name in names)
    return [f"activation_function is {shown(given)}; it can be {known}"]


def _add_rope(values: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Add the rotary positions, in the words of transformers 5 or older ones; their problems."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return [f"rope_parameters is {shown(rope)}; it must be an object"]
    theta = rope.get("rope_theta", settings.get("rope_theta"))
    values["rope_theta"] = 10_000.0 if theta is None else theta
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return ["partial_rotary_factor is not 1.0, which can't be expressed"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return []
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        listed = ", ".join(f'"{known}"' for known in ("default", *ROPE_SCALINGS))
        return [f"the rope_type {shown(kind)} can't be expressed; {listed} can"]
    names = [name for name in ROPE_SCALINGS[kind] if name in rope]
    values["rope_scaling"] = {"rope_type": kind} | {name: rope[name] for name in names}
    return []


def _map_model(path: Path, form: Form, config: GPTConfig) -> tuple[GPTConfig, Tensors]:
    """The tensors of a folder, mapped, and the config with the head tied only if it is.

    As in transformers, a head of its own counts, whatever the config says. Raises CheckpointError
    if the tensors are not those of the config.
    """
    stored: Tensors = {}
    for name, tensor in _map_files(path).items():
        name = name.removeprefix(form.prefix)
        if not BUFFERS.search(name):
            stored[name] = tensor
    head = stored.get("lm_head.weight")
    if config.tie_embeddings and head is not None:
        embedding = stored.get(next(layout(config)).theirs)
        if embedding is not None and torch.equal(head, embedding):
            del stored["lm_head.weight"]
        else:
            config = replace(config, tie_embeddings=False)
    _require_fit(config, stored, path)
    return config, stored


def _map_files(path: Path) -> Tensors:
    """All tensors of a folder, by the names in its files."""
    for name, read in ((WEIGHTS, _map_safetensors), (PICKLED, _map_pickled)):
        if os.path.lexists(path / name):
            return read(path / name)
        index = path / f"{name}.index.json"
        if not os.path.lexists(index):
            continue
        places = _read_json(index).get("weight_map")
        files = set(places.values()) if isinstance(places, dict) and _are_names(places) else set()
        if not files:
            raise CheckpointError(f"{index} has no weight_map of file names in its folder.")
        found: Tensors = {}
        for file in sorted(files):
            tensors = read(path / file)
            if tensors.keys() & found.keys():
                raise CheckpointError(f"{path / file} holds tensors that another file holds too.")
            found |= tensors
        return found
    raise CheckpointError(
        f"{path} has no weights: neither {WEIGHTS} nor {PICKLED}, nor an index of either."
    )


def _are_names(places: dict[str, Any]) -> bool:
    return all(isinstance(f, str) and re.fullmatch(r"\w[\w.-]*", f) for f in places.values())


def _map_safetensors(path: Path) -> Tensors:
    _require_file(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MOST_JSON_BYTES:
            raise ValueError(f"its header of {length:,} bytes is too long")
        return map_safetensors(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}.") from None


def _map_pickled(path: Path) -> Tensors:
    """The tensors of a .bin file: a pickle, of which only tensors are read and nothing is run."""
    _require_file(path)
    advice = "Save the model as safetensors: transformers' save_pretrained() does."
    try:
        with zipfile.ZipFile(path) as archive:
            # torch compresses nothing, and reads all but tensors as a whole
            for file in archive.infolist():
                is_tensor = "/data/" in file.filename
                if file.compress_type != zipfile.ZIP_STORED or (
                    file.file_size > MOST_JSON_BYTES and not is_tensor
                ):
                    raise ValueError("it has compressed parts, or long ones that are no tensors")
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path} is damaged, or in the format of torch before 1.6.\n{advice}"
        ) from None
    except Exception:  # torch raises many kinds, and advises to run what the file holds
        raise CheckpointError(f"{path} holds more than tensors, or is damaged.\n{advice}") from None
    is_sound = isinstance(found, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        for name, tensor in found.items()
    )
    if not is_sound:
        raise CheckpointError(f"{path} is no dictionary of contiguous tensors.\n{advice}")
    return found


def _require_fit(config: GPTConfig, stored: Tensors, path: Path) -> None:
    """Raise CheckpointError unless the tensors are those of the config, in a format to read."""
    n_known = 0
    for part in layout(config):
        tensor = stored.get(part.theirs)
        if tensor is None:
            raise CheckpointError(f"the weights in {path} lack {part.theirs}.")
        if tuple(tensor.shape) != part.their_shape:
            raise CheckpointError(
                f"in {path} {part.theirs} has the shape {tuple(tensor.shape)}; by {CONFIG} it is "
                f"{part.their_shape}."
            )
        if tensor.dtype not in FORMATS:
            raise CheckpointError(
                f"in {path} {part.theirs} is {tensor.dtype}; fp32, bf16 and fp16 can be read."
            )
        n_known += 1
    if n_known < len(stored):
        odd = sorted(stored.keys() - {part.theirs for part in layout(config)})
        listed = ", ".join(name[:80] for name in odd[:3])
        raise CheckpointError(f"the weights in {path} have what its class does not: {listed}.")


def _read_weights(path: Path, form: Form, config: GPTConfig) -> Tensors:
    """The weights by GPTModel's parameter names, in fp32; ResourceError if they don't fit."""
    _, stored = _map_model(path, form, config)
    require_memory(path, sum(tensor.numel() for tensor in stored.values()))
    weights: Tensors = {}
    for part in layout(config):
        rows = part.total_rows or part.shape[0]
        if part.ours not in weights:
            weights[part.ours] = torch.empty(rows, *part.shape[1:])
        tensor = stored[part.theirs]
        ours = weights[part.ours][part.first_row :][: part.shape[0]]
        ours.copy_(tensor.T if part.is_transposed else tensor)
    return weights


def _declared(kind: str, path: Path, settings: dict[str, Any]) -> list[str | int]:
    """What a folder's files call the beginning ("bos") or the end ("eos") of a text: a token's name
    first, then ids.
    """
    told = [settings]
    for name in (GENERATION_CONFIG, TOKENIZER_CONFIG):
        if os.path.lexists(path / name):
            told.insert(0, _read_json(path / name))
    found: list[Any] = []
    for key in (f"{kind}_token", f"{kind}_token_id"):
        for value in (file.get(key) for file in told):
            if isinstance(value, dict):  # the token with its flags
                value = value.get("content")
            found += value if isinstance(value, list) else [value]
    return [token for token in found if isinstance(token, str) or type(token) is int]


def _read_tokenizer(
    path: Path, form: Form, config: GPTConfig, settings: dict[str, Any]
) -> Tokenizer:
    """A folder's tokenizer; CheckpointError if it is none, or has tokens that the model lacks.

    It puts a token before each text if its tokenizer.json does, or TOKENIZER_CONFIG asks for that.
    """
    file, content = _tokenizer_file(path, form)
    try:
        tokenizer = read_tokenizer(content, file, _declared("eos", path, settings))
    except DataError as error:
        raise CheckpointError(str(error)) from None
    said = _read_json(path / TOKENIZER_CONFIG) if os.path.lexists(path / TOKENIZER_CONFIG) else {}
    if said.get("add_bos_token") is True:
        for begin in _declared("bos", path, settings)[:1]:
            tokenizer = begin_texts_with(tokenizer, begin)
    n_tokens = tokenizer.vocab_size
    if isinstance(tokenizer, ForeignTokenizer) and tokenizer.adds_end:
        n_tokens -= 1  # the model has no row for it, and no text has this token
    if n_tokens > config.vocab_size:
        raise CheckpointError(
            f"{file} has {n_tokens:,} tokens, and the model rows for {config.vocab_size:,}: they "
            "don't belong together."
        )
    return tokenizer


def _tokenizer_file(path: Path, form: Form) -> tuple[Path, bytes]:
    """The file that holds a folder's vocabulary, and the content of a tokenizer.json for it."""
    file, older = path / TOKENIZER, [path / "vocab.json", path / "merges.txt"]
    if os.path.lexists(file):
        return file, _read_vocabulary(file)
    if form.model_type != "gpt2" or not all(map(os.path.lexists, older)):
        raise CheckpointError(
            f"{path} has no {TOKENIZER}.\nMake it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        return older[0], json.dumps(vocabulary_json(*map(_read_vocabulary, older))).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{older[0]} and {older[1].name} are damaged: {first_line(error)}."
        ) from None


def _read_vocabulary(file: Path) -> bytes:
    content = _read_bytes(file, MOST_TOKENIZER_BYTES)
    if content.count(b",") > MOST_VALUES or content.count(b"{") > MOST_OBJECTS:
        raise CheckpointError(f"{file} has more in it than any tokenizer needs.")
    return content


def _read_template(path: Path) -> str | None:
    """The chat template in a folder, a text in the language Jinja; None if it has none."""
    if os.path.lexists(path / TEMPLATE):
        try:
            return _read_bytes(path / TEMPLATE, MOST_JSON_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{path / TEMPLATE} is not UTF-8.") from None
    if not os.path.lexists(path / TOKENIZER_CONFIG):
        return None
    template = _read_json(path / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list):  # several, each with a name
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def download(name: str) -> Path:
    """The folder of "owner/name" of the Hugging Face Hub: in the library's cache, or downloaded.

    Raises SettingsError for a name that can't be, without the library, and if it can't be had.
    """
    if not HUB_NAME.fullmatch(name):
        raise SettingsError(f'"hf:{name}" is no model of the Hub; write "hf:owner/name".')
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise SettingsError(f'"hf:{name}" needs a library: pip install huggingface_hub') from None
    try:
        # safetensors alone where there are any
        for extra in ([], ["*.bin"]):
            files = [*HUB_FILES, *extra]
            found = Path(snapshot_download(name, allow_patterns=files, ignore_patterns="*/*"))
            if any(found.glob("*.safetensors")):
                break
    except Exception as error:  # the library raises those of its network client too
        raise SettingsError(
            f'"hf:{name}" can\'t be had: {first_line(error)[:300]}\n'
            "Without a network, download it elsewhere and name its folder."
        ) from None
    return found


# ------------------------------------------------------------------------------- writing


def write_folder(
    path: Path,
    config: GPTConfig,
    weights: Tensors,
    tokenizer: Tokenizer,
    *,
    card: str,
    dtype: str = "fp32",
    chat_template: str | None = None,
) -> None:
    """Write a model as the folder that transformers reads, complete or not at all.

    weights are by GPTModel's parameter names; card is the README.md's text. Raises SettingsError
    for a model that no class of FORMS can hold, and for a path that exists; ResourceError if the
    disk refuses.
    """
    raise_if_any(find_obstacles(config), "a model that is to be exported")
    if os.path.lexists(path):
        raise SettingsError(f"{path} exists; name a folder that does not.")
    tensors = their_tensors(config, weights, DTYPES[dtype])
    tree = json.loads(tokenizer.to_json())
    _frame_as_here(tree, tokenizer)
    for entry in tree["added_tokens"]:
        entry.pop(ENDS_TEXT, None)  # TOKENIZER_CONFIG says it
    special = _special_tokens(tokenizer, tree, chat_template)
    settings = their_settings(config) | special.ids()
    settings |= dict.fromkeys(("dtype", "torch_dtype"), str(DTYPES[dtype]).removeprefix("torch."))
    tokenizer_settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special.begin,
        "eos_token": special.end,
        "model_max_length": config.context_length,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.begin_ids:
        tokenizer_settings["add_bos_token"] = True
    if chat_template is not None:
        tokenizer_settings["chat_template"] = chat_template
    make_folder(path.parent)
    require_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()), str(path))
    with NewFolder(path, None) as folder:
        folder.write(WEIGHTS, safetensors_chunks(tensors, {"format": "pt"}))
        for name, content in (
            (CONFIG, settings),
            (GENERATION_CONFIG, special.ids(all_ends=True)),
            (TOKENIZER_CONFIG, tokenizer_settings),
        ):
            folder.write(name, [(to_json(content, indent=2) + "\n").encode()])
        folder.write(TOKENIZER, [json.dumps(tree, ensure_ascii=False).encode()])
        folder.write("README.md", [card.encode()])


def form_for(config: GPTConfig) -> Form:
    """The class of transformers that a model is written as."""
    kind = "gpt2"
    if config.architecture == "llama":
        kind = "qwen3" if config.qk_norm else "llama"
    return next(form for form in FORMS if form.model_type == kind)


def find_obstacles(config: GPTConfig) -> list[str]:
    """What transformers' class can't hold of a model, each with what can be done."""
    form, problems = form_for(config), []
    if config.positions == "sinusoidal":
        problems.append(f'{form.name} has no sinusoidal positions: train with positions "learned"')
    assert config.head_dim, "GPTConfig has replaced it"
    if form.model_type == "gpt2" and config.n_heads * config.head_dim != config.emb_dim:
        problems.append(
            f"{form.name} has heads of emb_dim / n_heads, not of {config.head_dim}: leave head_dim "
            'out, or train the architecture "llama"'
        )
    if form.model_type == "llama" and config.emb_dim % config.n_heads:
        problems.append(
            f"{form.name} wants an emb_dim ({config.emb_dim}) that is a multiple of n_heads "
            f"({config.n_heads}): change one, or train with qk_norm, which makes it a Qwen3"
        )
    if form.model_type == "qwen3" and config.mlp_bias:
        problems.append(f"{form.name} has no biases in its MLP: train with mlp_bias False")
    return problems


def reader_notes(config: GPTConfig) -> list[str]:
    """Which programs besides transformers can't read a model that transformers can, and why."""
    assert config.head_dim and config.ff_dim, "GPTConfig has replaced them"
    notes = []
    if config.head_dim < 32:
        notes.append(
            f"vLLM's attention wants heads of at least 32, and these have {config.head_dim}"
        )
    if config.architecture == "gpt2":
        if config.ff_dim != 4 * config.emb_dim:
            notes.append("mlx-lm and llama.cpp want GPT-2's ff_dim to be 4 x emb_dim")
        if config.activation != "gelu":
            notes.append(
                f"llama.cpp and mlx-lm have GPT-2 with gelu alone, not {config.activation}"
            )
        if not config.tie_embeddings:
            notes.append("mlx-lm has GPT-2 with a tied head alone")
    return notes


def their_settings(config: GPTConfig) -> dict[str, Any]:
    """The config.json of a model, but for its special tokens and its dtype."""
    form = form_for(config)
    names = form.sizes | {name: ours for name, (ours, _) in form.others.items()}
    settings: dict[str, Any] = {"architectures": [form.name], "model_type": form.model_type}
    settings |= {name: getattr(config, ours) for name, ours in names.items()}
    if form.model_type == "gpt2":
        activation = GPT2_ACTIVATIONS[str(config.activation)][0]
        # llama.cpp and mlx-lm read n_ctx
        more = {"n_ctx": config.context_length, "embd_pdrop": config.drop_rate}
        return settings | more | {"activation_function": activation}
    scaling = config.rope_scaling or {"rope_type": "default"}
    settings |= {
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias or bool(config.out_bias),
        # transformers 5 reads the first; older ones, Ollama and mlx-lm read rope_theta
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
    }
    return settings


def their_tensors(
    config: GPTConfig, weights: Tensors, dtype: torch.dtype = torch.float32
) -> Tensors:
    """A model's tensors by transformers' names; SettingsError where fp16 has no such numbers."""
    tensors: Tensors = {}
    for part in layout(config):
        if part.is_held:
            value = weights[part.ours].detach()[part.first_row :][: part.shape[0]].to(dtype)
        else:
            value = torch.zeros(part.shape, dtype=dtype)
        if dtype == torch.float16 and not value.isfinite().all():
            raise SettingsError(f"{part.ours} has weights beyond fp16's range: write bf16 or fp32.")
        tensors[part.theirs] = value.T if part.is_transposed else value
    return tensors


@dataclass(frozen=True)
class _SpecialTokens:
    """The tokens that begin and end a text, and those that end a turn in a chat."""

    begin: str
    end: str  # of a turn, where there is one: generation stops there
    id_of: dict[str, int]
    all_ends: list[str]

    def ids(self, *, all_ends: bool = False) -> dict[str, Any]:
        """Their settings in config.json or, with all_ends, in generation_config.json."""
        ends = [self.id_of[name] for name in self.all_ends]
        end = ends if all_ends and len(ends) > 1 else ends[0]
        return {"bos_token_id": self.id_of[self.begin], "eos_token_id": end}


def _frame_as_here(tree: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Change a tokenizer.json to put before a text what begins one here, and nothing else."""
    is_same = isinstance(tokenizer, ForeignTokenizer) and not tokenizer.frame()
    if tokenizer.begin_ids and is_same:
        return
    tree["post_processor"] = _without_frame(tree["post_processor"])
    for begin_id in tokenizer.begin_ids:
        name = begin_token_of(tokenizer)
        tree["post_processor"] = begin_with(name, begin_id, after=tree["post_processor"])


def _without_frame(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A tokenizer.json's post-processor that puts no special tokens around a text, as here."""
    kind = None if processor is None else processor["type"]
    if kind in ("TemplateProcessing", "BertProcessing", "RobertaProcessing"):
        return None
    if processor is None or kind != "Sequence":
        return processor
    kept = [part for part in map(_without_frame, processor["processors"]) if part is not None]
    return processor | {"processors": kept} if kept else None


def _special_tokens(
    tokenizer: Tokenizer, tree: dict[str, Any], chat_template: str | None
) -> _SpecialTokens:
    """The special tokens of a tokenizer; one that it added itself is added to its tree too."""
    end = END_OF_TEXT
    if isinstance(tokenizer, ForeignTokenizer):
        end = tokenizer.end_of_text
        if tokenizer.adds_end:
            tree["added_tokens"].append(special_token(tokenizer.end_of_text_id, end))
    id_of = {token["content"]: token["id"] for token in tree["added_tokens"]}
    id_of |= tokenizer.special_tokens
    turns = [name for name in TURN_ENDS if name in id_of and name in (chat_template or "")]
    ends = list(dict.fromkeys([*turns, end]))
    return _SpecialTokens(begin_token_of(tokenizer), ends[0], id_of, ends)
