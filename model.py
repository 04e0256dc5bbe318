"""The GPT: a causal pre-norm transformer with GPT-2's or Llama's architecture.

"gpt2" (Radford et al. 2019) has LayerNorm, learned positions, biases and a two-layer MLP; "llama"
(Touvron et al. 2023) RMSNorm, rotary positions, a gated MLP and no biases, with qk_norm it is
Qwen3 (Yang et al. 2025). The weights fit transformers' classes of these names.

Tensor letters: B batch, T positions, C emb_dim, H heads, K key-value heads, D head_dim, F ff_dim,
V vocabulary.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from engine.attention import Parts, attend_within, find_parts, usual_attention
from engine.compiling import free_steps, is_compiled
from engine.linear import Linear
from engine.loss import next_token_loss
from engine.norm import RMSNorm
from engine.precision import DTYPES, Precision
from engine.rotary import RotaryTable, rotate
from engine.settings import check, setting, shown

ACTIVATIONS = {
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "gelu_exact": nn.GELU,
    "relu": nn.ReLU,
}
# of each architecture; the first is the default
POSITIONS = {"gpt2": ("learned", "sinusoidal"), "llama": ("rope",)}
MLP_KINDS = {"gpt2": tuple(ACTIVATIONS), "llama": ("swiglu",)}
NORM_EPS = {"gpt2": 1e-5, "llama": 1e-6}
# of each kind of rope_scaling, the numbers that it has beside its name
ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
INIT_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; None is the architecture's default. Rates are dropout probabilities.

    Raises SettingsError with every wrong value.
    """

    vocab_size: int = setting(minimum=1)
    context_length: int = setting(minimum=1, maximum=1_000_000)
    emb_dim: int = setting(minimum=1, maximum=65_536)
    n_heads: int = setting(minimum=1, maximum=1024)
    n_layers: int = setting(minimum=1, maximum=1024)
    ff_dim: int | None = setting(None, minimum=1, maximum=1_000_000)
    drop_rate: float = setting(0.0, minimum=0, below=1)
    # of attention's probabilities; above 0 it turns off the CPU's flash attention
    attention_drop_rate: float = setting(0.0, minimum=0, below=1)
    qkv_bias: bool = setting(False)
    activation: str | None = setting(None, choices=(*ACTIVATIONS, "swiglu"))
    positions: str | None = setting(None, choices=("learned", "sinusoidal", "rope"))
    tie_embeddings: bool = setting(True)
    architecture: str = setting("gpt2", choices=tuple(POSITIONS))
    # the next three are for "llama"
    n_kv_heads: int | None = setting(None, minimum=1, maximum=1024)
    qk_norm: bool = setting(False)
    rope_theta: float = setting(10_000.0, above=1)
    # each block starts as the identity, which speeds up the first steps
    zero_init: bool = setting(False)
    # the next ones are what models from elsewhere have
    head_dim: int | None = setting(None, minimum=1, maximum=65_536)  # None: emb_dim / n_heads
    norm_eps: float | None = setting(None, above=0, maximum=1)
    # of attention's output and of the MLP; None: True for "gpt2", False for "llama"
    out_bias: bool | None = setting(None)
    mlp_bias: bool | None = setting(None)
    # of rotary positions, in transformers' words: {"rope_type": "llama3", "factor": 8.0, ...}
    rope_scaling: dict[str, Any] | None = setting(None)

    def __post_init__(self) -> None:
        check(self)
        ff_dim = 4 * self.emb_dim
        if self.architecture == "llama":
            ff_dim = -(-8 * self.emb_dim // (3 * 64)) * 64  # as many weights as an ungated 4 x
        own = {
            "ff_dim": ff_dim,
            "activation": MLP_KINDS[self.architecture][0],
            "positions": POSITIONS[self.architecture][0],
            "n_kv_heads": self.n_heads,
            "head_dim": self.emb_dim // self.n_heads,
            "norm_eps": NORM_EPS[self.architecture],
            "out_bias": self.architecture == "gpt2",
            "mlp_bias": self.architecture == "gpt2",
        }
        for name, value in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @staticmethod
    def conflicts(values: dict[str, Any]) -> list[str]:
        """The problems between two fields; values has every field, None where not given."""
        problems = []
        architecture, emb_dim, n_heads = (values[n] for n in ("architecture", "emb_dim", "n_heads"))
        where = f'where architecture is "{architecture}" it must be'
        head_dim, ratio = values["head_dim"], f"emb_dim ({emb_dim}) / n_heads ({n_heads})"
        if head_dim:
            ratio = f"head_dim ({head_dim})"
        elif emb_dim and n_heads and emb_dim % n_heads:
            problems.append(f"emb_dim ({emb_dim}) must be a multiple of n_heads ({n_heads})")
        elif emb_dim and n_heads:
            head_dim = emb_dim // n_heads
        if emb_dim and emb_dim % 2 and not n_heads and not head_dim and architecture == "llama":
            problems.append(f"emb_dim ({emb_dim}) must be even: rotary positions turn pairs")
        if head_dim and head_dim % 2 and architecture == "llama":
            problems.append(f"{ratio} must be even: rotary positions turn pairs")
        if emb_dim and emb_dim % 2 and values["positions"] == "sinusoidal":
            problems.append(f'emb_dim ({emb_dim}) must be even where positions is "sinusoidal"')
        for name, kinds in (("positions", POSITIONS), ("activation", MLP_KINDS)):
            if values[name] not in (None, *kinds[architecture]):
                listed = " or ".join(f'"{kind}"' for kind in kinds[architecture])
                problems.append(f'{name} is "{values[name]}"; {where} {listed}')
        if architecture == "llama":
            shared = values["n_kv_heads"]
            if n_heads and shared and n_heads % shared:
                problems.append(f"n_heads ({n_heads}) must be a multiple of n_kv_heads ({shared})")
            return problems + find_rope_faults(values["rope_scaling"])
        defaults = {"n_kv_heads": (None, n_heads), "qk_norm": (False,), "rope_theta": (10_000.0,)}
        defaults["rope_scaling"] = (None,)
        return problems + [
            f'{name} is {values[name]}; it may be set where architecture is "llama" only'
            for name, usual in defaults.items()
            if values[name] not in usual
        ]


def find_rope_faults(scaling: dict[str, Any] | None) -> list[str]:
    """The problem of a rope_scaling, if it has one: an unknown kind, or a missing or odd number."""
    if scaling is None:
        return []
    kinds = " or ".join(f'"{kind}"' for kind in ROPE_SCALINGS)
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        return [f'rope_scaling["rope_type"] is {shown(kind)}; it must be {kinds}']
    names = ROPE_SCALINGS[kind]
    if scaling.keys() != {"rope_type", *names}:
        listed = ", ".join(f'"{name}"' for name in names)
        return [f'rope_scaling of "{kind}" must have "rope_type", {listed}, and nothing else']
    for name in names:
        value = scaling[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            return [f'rope_scaling["{name}"] is {shown(value)}; it must be a number above 0']
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        return ['rope_scaling["low_freq_factor"] must be below its "high_freq_factor"']
    return []


# what a user may set: the tokenizer gives vocab_size, and context_length is called max_length
MODEL_SETTINGS = tuple(
    field.name for field in fields(GPTConfig) if field.name not in ("vocab_size", "context_length")
)


class KVCache:
    """The keys and values of the positions that a batch of texts has so far.

    Texts are padded in front, so that all end in the same column. A fixed cache is attended to in
    full, its empty columns masked, so that shapes never change (CUDA graphs, torch.compile).
    """

    def __init__(
        self, lengths: list[int], capacity: int, device: torch.device, *, fixed: bool = False
    ) -> None:
        self.capacity, self.fixed, self.device = capacity, fixed, device
        self.filled = 0
        self.layers: list[tuple[Tensor, Tensor]] = []  # (B, K, capacity, D) each
        starts = [max(lengths) - length for length in lengths]
        self.starts = torch.tensor(starts, device=device) if any(starts) else None  # (B,)

    def repeat(self, copies: int) -> None:
        """Repeat each row `copies` times, its copies next to each other."""
        self.layers = [
            (keys.repeat_interleave(copies, dim=0), values.repeat_interleave(copies, dim=0))
            for keys, values in self.layers
        ]
        if self.starts is not None:
            self.starts = self.starts.repeat_interleave(copies)

    def take_over(self, other: "KVCache") -> None:
        """Become a copy of another cache of as many rows, which is emptied. Memory stays in place.

        The other one has padding if this one had it before.
        """
        self.filled = other.filled
        if self.starts is not None and other.starts is not None:
            self.starts.copy_(other.starts)
        else:
            self.starts = other.starts
        for layer in range(len(other.layers)):
            k, v = other.layers.pop(0)  # so that its memory serves the next layer
            if layer == len(self.layers):
                shape = (*k.shape[:2], self.capacity, k.shape[3])
                self.layers.append((k.new_empty(shape), v.new_empty(shape)))
            for part, new in zip(self.layers[layer], (k, v), strict=True):
                part[:, :, : self.filled] = new
                part[:, :, self.filled :] = 0  # masked columns must not be nan

    def advance(self, n_columns: int) -> "Newest":
        """The next n_columns, which each layer must fill with extend()."""
        columns = torch.arange(self.filled, self.filled + n_columns, device=self.device)
        self.filled += n_columns
        return Newest(self, columns, self.capacity if self.fixed else self.filled)

    def at(self, columns: Tensor) -> "Newest":
        """The given columns of a fixed cache, (T,), which may be on the device."""
        return Newest(self, columns, self.capacity)


class Newest:
    """The newest columns of a KVCache, with their positions and their attention mask."""

    def __init__(self, cache: KVCache, columns: Tensor, n_seen: int) -> None:
        self.cache, self.columns, self.n_seen = cache, columns, n_seen
        self.positions, starts = columns, cache.starts  # (T,)
        masked = cache.fixed or starts is not None or n_seen > len(columns) > 1
        self.is_causal = len(columns) > 1 and not masked
        self.mask = None  # True where attended to
        if masked:
            seen = torch.arange(n_seen, device=columns.device)
            self.mask = (seen <= columns[:, None])[None, None]  # (1, 1, T, n_seen)
        if starts is not None:
            self.positions = (columns - starts[:, None]).clamp(min=0)  # (B, T)
            # padding attends to itself: the softmax of a fully masked row is nan
            in_text = (seen >= starts[:, None, None, None]) | (seen == columns[:, None])
            self.mask = self.mask & in_text  # (B, 1, T, n_seen)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, (B, K, T, D); returns all, (B, K, n_seen, D)."""
        layers = self.cache.layers
        if layer == len(layers):
            shape, dtype = (*k.shape[:2], self.cache.capacity, k.shape[3]), k.dtype
            # a CPU's fp32 takes a third of bf16's time; but autocast would cast it at each step
            if k.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
                dtype = torch.float32
            # zeros, since masked columns must not be nan
            layers.append((k.new_zeros(shape, dtype=dtype), k.new_zeros(shape, dtype=dtype)))
        keys, values = layers[layer]
        keys.index_copy_(2, self.columns, k.to(keys.dtype))
        values.index_copy_(2, self.columns, v.to(values.dtype))
        return keys[:, :, : self.n_seen], values[:, :, : self.n_seen]


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention, with grouped queries (Ainslie et al. 2023) where configured."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        assert config.n_kv_heads and config.head_dim and config.norm_eps, "GPTConfig has them"
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = config.n_heads, config.n_kv_heads, config.n_kv_heads
        self.drop_rate = config.attention_drop_rate
        # one of ATTENTIONS; None is the usual one of the dtype
        self.kernel: str | None = None
        # queries, keys and values are one product
        self.qkv_rows = [heads * self.head_dim for heads in self.heads]
        self.qkv = Linear(config.emb_dim, sum(self.qkv_rows), bias=config.qkv_bias)
        self.out_proj = Linear(self.qkv_rows[0], config.emb_dim, bias=bool(config.out_bias))
        self.qk_norm = config.qk_norm  # Dehghani et al. 2023
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        newest: Newest | None = None,
        parts: Parts | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); angles are a RotaryTable's, None without rotary positions.

        With newest, x is the newest positions of a KVCache and attends to the earlier ones too.
        With parts, each attends to itself alone.
        """
        B, T = x.shape[:2]
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)
        q, k, v = qkv.split(self.heads, dim=2)  # (B, T, H, D), then (B, T, K, D) twice
        if self.qk_norm:
            # autocast gives bf16, on which a norm with fp32 weights is slow, and torch warns
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if angles is not None:
            q, k = rotate(q, *angles).to(v.dtype), rotate(k, *angles).to(v.dtype)
        dropout = self.drop_rate if self.training else 0.0
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, T, D)
        if newest is None:
            kernel = self.kernel or usual_attention(q.dtype)
            x = attend_within(parts, q, k, v, dropout, is_plain=kernel == "plain")
        else:
            k, v = newest.extend(self.layer, k, v)
            x = F.scaled_dot_product_attention(
                q.to(k.dtype),
                k,
                v,
                attn_mask=newest.mask,
                is_causal=newest.is_causal,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return self.out_proj(x.transpose(1, 2).flatten(2))


def attention_kernel(config: GPTConfig, precision: Precision, device: torch.device) -> str:
    """The kernel that torch chooses for attention: "flash attention", "math", ... or "unknown"."""
    choice = getattr(torch, "_fused_sdp_choice", None)  # torch has no public name for it
    if choice is None:
        return "unknown"
    dtype = DTYPES[precision.name]
    assert config.head_dim, "GPTConfig has replaced it"
    shape = (1, config.n_heads, config.context_length, config.head_dim)
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    name = SDPBackend(choice(q, q, q, dropout_p=config.attention_drop_rate, is_causal=True)).name
    return name.lower().replace("_", " ")


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): the product of SiLU(gate) and up, projected down.

    The backward pass computes the product again, so that only gate and up are kept for it.
    """

    def __init__(self, emb_dim: int, ff_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up = Linear(emb_dim, 2 * ff_dim, bias=bias)  # both are one product
        self.down = Linear(ff_dim, emb_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate_up = self.gate_up(x)  # (B, T, 2 F)
        # a compiler decides itself what to compute again; Metal before macOS 15 does not write into
        # halves of a tensor
        is_plain = torch.compiler.is_compiling() or gate_up.device.type == "mps"
        if is_plain or not gate_up.requires_grad:
            return self.down(gated(gate_up))
        product = _Gated.apply(gate_up)
        with _computed_again(product):
            return self.down(product)


def gated(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up: (..., 2 F) -> (..., F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _Gated(torch.autograd.Function):
    """gated() that keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_product: Tensor) -> Tensor:
        gate_up = _input_of(ctx)
        del ctx.gate_up
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(d_product, up, out=d_up)  # as room for it: d_up itself is computed last
        torch.ops.aten.silu_backward.grad_input(d_up, gate, grad_input=d_gate)
        torch.mul(d_product, F.silu(gate), out=d_up)
        return d_gate_up


def _input_of(node: Any) -> Tensor:
    """What a node of _Gated has kept. With activation checkpointing, asking for it computes it, and
    may be done only once."""
    if not hasattr(node, "gate_up"):
        (node.gate_up,) = node.saved_tensors
    return node.gate_up


def _computed_again(product: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
    """A context whose operations don't keep _Gated's product, but compute it in their backward
    pass."""
    node, address = product.grad_fn, product.data_ptr()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        is_product = tensor.data_ptr() == address and tensor.numel() > 0
        return tensor.shape if is_product else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else gated(_input_of(node)).view(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Block(nn.Module):
    """Attention, then an MLP, each after a norm and added to a residual path."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        assert config.ff_dim and config.activation, "GPTConfig has replaced them"
        bias = bool(config.mlp_bias)
        self.attention_norm = build_norm(config)
        self.attention = CausalSelfAttention(config, layer)
        self.mlp_norm = build_norm(config)
        if config.activation == "swiglu":
            self.mlp = GatedMLP(config.emb_dim, config.ff_dim, bias=bias)
        else:
            self.mlp = nn.Sequential(
                Linear(config.emb_dim, config.ff_dim, bias=bias),
                ACTIVATIONS[config.activation](),
                Linear(config.ff_dim, config.emb_dim, bias=bias),
            )
        self.dropout = Dropout(config.drop_rate)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        newest: Newest | None = None,
        parts: Parts | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); angles, newest and parts as in CausalSelfAttention."""
        x = x + self.dropout(self.attention(self.attention_norm(x), angles, newest, parts))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def residual_projections(self) -> tuple[nn.Linear, nn.Linear]:
        """The two layers whose outputs are added to the residual path."""
        is_gated = isinstance(self.mlp, GatedMLP)
        return self.attention.out_proj, self.mlp.down if is_gated else self.mlp[-1]


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014); on CPUs the rate is a multiple of 1 / 65,536."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # torch's own is fast there
            return F.dropout(x, self.rate)
        # torch draws a random number for each element; here one of 64 bits serves four
        n_dropped = min(round(self.rate * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
        kept = (bits >= n_dropped - 2**15).to(x.dtype)
        return x * kept.mul_(2**16 / (2**16 - n_dropped))


def build_norm(config: GPTConfig) -> nn.Module:
    """The architecture's norm over the last dimension."""
    assert config.norm_eps is not None, "GPTConfig has replaced it"
    norm = RMSNorm if config.architecture == "llama" else nn.LayerNorm
    return norm(config.emb_dim, eps=config.norm_eps)


class Embedding(nn.Embedding):
    """torch's, which draws no weights on the "meta" device (see GPTModel.initialize())."""

    def reset_parameters(self) -> None:
        """As in nn.Embedding."""
        if not self.weight.is_meta:
            super().reset_parameters()


class GPTModel(nn.Module):
    """The model: token ids to logits. activation_checkpointing may be set at any time."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        # True: recompute blocks in the backward pass, with less memory and a third more time
        self.activation_checkpointing = False
        # on a CPU, True: products of one row are oneDNN's, not torch's own
        self.decodes_by_onednn = False
        self.token_embedding = Embedding(config.vocab_size, config.emb_dim)
        if config.positions == "learned":
            self.position_embedding = Embedding(config.context_length, config.emb_dim)
        elif config.positions == "sinusoidal":
            table = sinusoidal_positions(config.context_length, config.emb_dim)
            self.register_buffer("position_table", table, persistent=False)
        else:
            assert config.head_dim, "GPTConfig has replaced it"
            self.rotary = RotaryTable(
                config.context_length, config.head_dim, config.rope_theta, config.rope_scaling
            )
        self.dropout = Dropout(config.drop_rate)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = build_norm(config)
        self.head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        self.initialize()
        self.tie_head()

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module. Training mode frees the memory of recorded decoding steps."""
        if mode:
            free_steps(self)
        return super().train(mode)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As in nn.Module. Frees the memory of recorded decoding steps."""
        free_steps(self)
        return super().to(*args, **kwargs)

    def tie_head(self) -> None:
        """Share the embedding's weights with the head if config.tie_embeddings."""
        if self.config.tie_embeddings:
            self.head.weight = self.token_embedding.weight

    def initialize(self) -> None:
        """N(0, 0.02) as in GPT-2, residual projections / sqrt(2 n_layers), or 0 with zero_init.

        Nothing on the "meta" device, where normal_() imports sympy, which takes seconds.
        """
        if self.head.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layers)
        for block in self.blocks:
            for projection in block.residual_projections():
                if self.config.zero_init:
                    nn.init.zeros_(projection.weight)
                else:
                    nn.init.normal_(projection.weight, std=residual_std)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        n_targets: float | None = None,
        starts: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits of each position's next token.

        With targets, (B, T) or those of the first rows or the last positions, next_token_loss(),
        without ever holding all logits; counted as there. starts as in hidden().
        """
        hidden = self.hidden(ids, starts=starts)
        if targets is None:
            return self.head(hidden)
        if targets.shape != ids.shape:  # the backward pass of a slice copies
            hidden = hidden[: len(targets), -targets.shape[1] :]
        return next_token_loss(hidden, self.head.weight, targets, n_targets, counted)

    def hidden(
        self, ids: Tensor, newest: Newest | None = None, *, starts: Tensor | None = None
    ) -> Tensor:
        """(B, T) token ids, of all positions or the newest, -> (B, T, C), the head's input.

        With starts, (B, T), a window has several texts: each begins at a position that is its own
        start, is numbered from there and attends to itself alone.

        Raises ValueError for a T above config.context_length.
        """
        T, limit = ids.shape[1], self.config.context_length
        if limit < T:
            raise ValueError(f"{T} token ids, but the model's context_length is {limit}")
        positions: slice | Tensor = slice(T) if newest is None else newest.positions
        parts = None
        if starts is not None:
            positions = torch.arange(T, device=ids.device) - starts
            parts = find_parts(starts, as_mask=ids.device.type != "cpu" or is_compiled(self))
        x = self.token_embedding(ids)  # (B, T, C)
        angles = None
        if self.config.positions == "rope":
            angles = self.rotary(positions)
        elif self.config.positions == "learned":
            table = self.position_embedding
            x = x + (table.weight[positions] if starts is None else table(positions))
        else:
            # sines of 1 would swamp embeddings of 0.02 (Vaswani et al. 2017, 3.4)
            x = x * math.sqrt(self.config.emb_dim) + self.position_table[positions]
        x = self.dropout(x)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, angles, None, parts, use_reentrant=False)
            else:
                x = block(x, angles, newest, parts)
        return self.final_norm(x)

    def decode(self, ids: Tensor, cache: KVCache, columns: Tensor) -> Tensor:
        """A decoding step with a fixed cache: (B, 1) ids in column (1,) -> (B, V) logits."""
        return self.head(self.hidden(ids, cache.at(columns))[:, -1])

    def hidden_matrices(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """The weights of the blocks' products, each with the rows of the matrices merged in it."""
        found = []
        for block in self.blocks:
            merged = {block.attention.qkv: tuple(block.attention.qkv_rows)}
            if isinstance(block.mlp, GatedMLP):
                merged[block.mlp.gate_up] = (block.mlp.down.in_features,) * 2
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    found.append((layer.weight, merged.get(layer, (layer.out_features,))))
        return found

    def flop_per_token(self) -> int:
        """A training step's operations for each token: 6N + 12LHDT (Chowdhery et al. 2022)."""
        config = self.config  # attention counts in full, not as causal
        assert config.head_dim, "GPTConfig has replaced it"
        width = config.n_heads * config.head_dim
        attention = 12 * config.n_layers * width * config.context_length
        return 6 * self.parameters_in_products() + attention

    def parameters_in_products(self) -> int:
        """The parameters but those that are only looked up: N of flop_per_token()."""
        count = self.count_parameters()
        if self.config.positions == "learned":
            count -= self.position_embedding.weight.numel()
        if not self.config.tie_embeddings:
            count -= self.token_embedding.weight.numel()
        return count

    def count_parameters(self) -> int:
        """The number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())


def sinusoidal_positions(length: int, emb_dim: int) -> Tensor:
    """(length, emb_dim) sines and cosines of geometric wavelengths (Vaswani et al. 2017, 3.5)."""
    positions = torch.arange(length, dtype=torch.float32, device="cpu")[:, None]
    pairs = torch.arange(0, emb_dim, 2, device="cpu")
    frequencies = torch.exp(pairs * (-math.log(10_000) / emb_dim))
    angles = positions * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
