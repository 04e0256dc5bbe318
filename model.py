"""The GPT: a causal pre-norm transformer, in GPT-2's form or in Llama's.

"gpt2" (Radford et al. 2019) has LayerNorm, learned positions, biases and a two-layer MLP. "llama"
(Touvron et al. 2023) has RMSNorm, rotary positions, a gated MLP and no biases; with qk_norm it is
Qwen3's form (Yang et al. 2025). Its weights fit transformers' classes of these names.

Tensor letters: B batch, T positions, C emb_dim, H heads, K key-value heads, D = C / H, F ff_dim,
V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from engine.loss import next_token_loss
from engine.precision import DTYPES, Precision
from engine.settings import check, setting

ACTIVATIONS = {"gelu": lambda: nn.GELU(approximate="tanh"), "relu": nn.ReLU}
# what each architecture is made of: the first choice stands where nothing is set
POSITIONS = {"gpt2": ("learned", "sinusoidal"), "llama": ("rope",)}
MLP_KINDS = {"gpt2": tuple(ACTIVATIONS), "llama": ("swiglu",)}
INIT_STD = 0.02
RMS_NORM_EPS = 1e-6
SHORT_CONTEXT = 512


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Raises SettingsError with every wrong value.

    None stands for the architecture's own: ff_dim 4 x emb_dim, or for "llama" 8/3 of it, up to
    the next multiple of 64; n_kv_heads as many as n_heads. Rates are dropout probabilities.
    """

    vocab_size: int = setting(minimum=1)
    context_length: int = setting(minimum=1, maximum=1_000_000)
    emb_dim: int = setting(minimum=1, maximum=65_536)
    n_heads: int = setting(minimum=1, maximum=1024)
    n_layers: int = setting(minimum=1, maximum=1024)
    ff_dim: int | None = setting(None, minimum=1, maximum=1_000_000)
    drop_rate: float = setting(0.0, minimum=0, below=1)
    # attention's own dropout; any at all turns off the fast attention kernel of the CPU
    attention_drop_rate: float = setting(0.0, minimum=0, below=1)
    qkv_bias: bool = setting(False)
    activation: str | None = setting(None, choices=(*ACTIVATIONS, "swiglu"))
    positions: str | None = setting(None, choices=("learned", "sinusoidal", "rope"))
    tie_embeddings: bool = setting(True)
    architecture: str = setting("gpt2", choices=tuple(POSITIONS))
    # "llama" alone has these three
    n_kv_heads: int | None = setting(None, minimum=1, maximum=1024)
    qk_norm: bool = setting(False)
    rope_theta: float = setting(10_000.0, above=1)
    # each block begins as the identity, which makes the first steps count for more
    zero_init: bool = setting(False)

    def __post_init__(self) -> None:
        check(self)
        ff_dim = 4 * self.emb_dim
        if self.architecture == "llama":
            ff_dim = -(-8 * self.emb_dim // (3 * 64)) * 64  # as many weights as 4 x ungated
        own = {
            "ff_dim": ff_dim,
            "activation": MLP_KINDS[self.architecture][0],
            "positions": POSITIONS[self.architecture][0],
            "n_kv_heads": self.n_heads,
        }
        for name, value in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @staticmethod
    def conflicts(values: dict[str, Any]) -> list[str]:
        """Rules that join two fields; values is complete, None where a field is not given."""
        problems = []
        architecture, emb_dim, n_heads = (values[n] for n in ("architecture", "emb_dim", "n_heads"))
        if emb_dim and n_heads and emb_dim % n_heads:
            problems.append(f"emb_dim ({emb_dim}) must be a multiple of n_heads ({n_heads})")
        elif emb_dim and n_heads and architecture == "llama" and emb_dim // n_heads % 2:
            problems.append(
                f"emb_dim ({emb_dim}) / n_heads ({n_heads}) must be even: rotary positions turn "
                "pairs"
            )
        if emb_dim and emb_dim % 2 and values["positions"] == "sinusoidal":
            problems.append(f'emb_dim ({emb_dim}) must be even where positions is "sinusoidal"')
        for name, allowed in (("positions", POSITIONS), ("activation", MLP_KINDS)):
            if values[name] not in (None, *allowed[architecture]):
                listed = " or ".join(f'"{choice}"' for choice in allowed[architecture])
                problems.append(
                    f'{name} is "{values[name]}"; where architecture is "{architecture}" it must '
                    f"be {listed}"
                )
        if architecture == "llama":
            n_kv_heads = values["n_kv_heads"]
            if n_heads and n_kv_heads and n_heads % n_kv_heads:
                problems.append(
                    f"n_heads ({n_heads}) must be a multiple of n_kv_heads ({n_kv_heads})"
                )
            if values["qkv_bias"]:
                problems.append('qkv_bias is True; where architecture is "llama" it must be False')
            return problems
        own = {"n_kv_heads": (None, n_heads), "qk_norm": (False,), "rope_theta": (10_000.0,)}
        problems += [
            f'{name} is {values[name]}; it may be set where architecture is "llama" only'
            for name, usual in own.items()
            if values[name] not in usual
        ]
        return problems


class RotaryTable(nn.Module):
    """The angles by which rotary positions turn queries and keys (Su et al. 2021).

    Called with positions it gives cosines and sines, (..., D / 2) each; position p turns the
    pair of features i and i + D / 2 by p * theta ** (-2 i / D).
    """

    def __init__(self, length: int, head_dim: int, theta: float) -> None:
        super().__init__()
        # on the CPU even where the weights are to come later and are "meta" until then
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        positions = torch.arange(length, dtype=torch.float32, device="cpu")
        angles = positions[:, None] * theta ** (-pairs / head_dim)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, positions: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The angles' cosines and sines of some positions."""
        return self.cos[positions], self.sin[positions]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn (B, T, heads, D) by the angles of its positions, (T, D / 2) or (B, T, D / 2) each.

    Keeps x's format.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for every head
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class KVCache:
    """The keys and values of the positions that a batch of texts has so far.

    Texts of unequal lengths end in the same column: shorter ones begin later. A fixed cache is
    seen whole, its empty columns masked, so that every step has the same shapes, as a recorded or
    compiled one needs them; else a step sees the columns that are filled.
    """

    def __init__(
        self, lengths: list[int], capacity: int, device: torch.device, *, fixed: bool = False
    ) -> None:
        self.capacity, self.fixed, self.device = capacity, fixed, device
        self.filled = 0
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # (B, K, capacity, D) each
        starts = [max(lengths) - length for length in lengths]
        self.starts = torch.tensor(starts, device=device) if any(starts) else None  # (B,)

    def repeat(self, copies: int) -> None:
        """Make each row `copies` rows, side by side."""
        self.layers = [
            tuple(part.repeat_interleave(copies, dim=0) for part in layer) for layer in self.layers
        ]
        if self.starts is not None:
            self.starts = self.starts.repeat_interleave(copies)

    def advance(self, n_columns: int) -> "Newest":
        """The next n_columns, which each layer is to extend the cache by."""
        columns = torch.arange(self.filled, self.filled + n_columns, device=self.device)
        self.filled += n_columns
        return Newest(self, columns, self.capacity if self.fixed else self.filled)

    def at(self, columns: torch.Tensor) -> "Newest":
        """These columns of a fixed cache, (T,), wherever they stand."""
        return Newest(self, columns, self.capacity)


class Newest:
    """The newest columns of a KVCache: where they stand in their texts, and what they see."""

    def __init__(self, cache: KVCache, columns: torch.Tensor, n_seen: int) -> None:
        self.cache, self.columns, self.n_seen = cache, columns, n_seen
        self.positions, starts = columns, cache.starts  # (T,)
        masked = cache.fixed or starts is not None or n_seen > len(columns) > 1
        self.is_causal = len(columns) > 1 and not masked
        self.mask = None  # True where seen
        if masked:
            seen = torch.arange(n_seen, device=columns.device)
            self.mask = (seen <= columns[:, None])[None, None]  # (1, 1, T, n_seen)
        if starts is not None:
            self.positions = (columns - starts[:, None]).clamp(min=0)  # (B, T)
            # padding sees itself: a row of a mask without anything has no softmax
            in_text = (seen >= starts[:, None, None, None]) | (seen == columns[:, None])
            self.mask = self.mask & in_text  # (B, 1, T, n_seen)

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a layer's new keys and values, (B, K, T, D); returns all, (B, K, n_seen, D).

        On a CPU they are fp32, whose kernel takes a third of bf16's time; autocast would turn
        them into bf16 again at each step.
        """
        layers = self.cache.layers
        if layer == len(layers):
            B, K, _, D = k.shape
            shape, dtype = (B, K, self.cache.capacity, D), k.dtype
            if k.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
                dtype = torch.float32
            # zeros: what is masked must be a number
            layers.append(tuple(k.new_zeros(shape, dtype=dtype) for _ in range(2)))
        keys, values = layers[layer]
        keys.index_copy_(2, self.columns, k.to(keys.dtype))
        values.index_copy_(2, self.columns, v.to(values.dtype))
        return keys[:, :, : self.n_seen], values[:, :, : self.n_seen]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no position sees a later one.

    Heads may share keys and values (grouped-query attention, Ainslie et al. 2023), and queries
    and keys may be normalised (Dehghani et al. 2023).
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.emb_dim // config.n_heads
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.drop_rate = config.attention_drop_rate
        self.is_short = config.context_length <= SHORT_CONTEXT
        # queries, keys and values are one product
        self.qkv_rows = [heads * self.head_dim for heads in self._heads()]
        self.qkv = nn.Linear(config.emb_dim, sum(self.qkv_rows), bias=config.qkv_bias)
        self.out_proj = nn.Linear(
            config.emb_dim, config.emb_dim, bias=config.architecture == "gpt2"
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=RMS_NORM_EPS)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=RMS_NORM_EPS)

    def _heads(self) -> tuple[int, int, int]:
        return self.n_heads, self.n_kv_heads, self.n_kv_heads

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        newest: Newest | None = None,
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); angles are a RotaryTable's, None without rotary positions.

        newest makes x the newest positions of a KVCache, which see those before them too.
        """
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)
        q, k, v = qkv.split(self._heads(), dim=2)  # (B, T, H, D), then (B, T, K, D) twice
        if self.q_norm is not None:
            # under autocast they come as bf16, beside weights in fp32: torch warns, and is slower
            q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if angles is not None:
            q, k = rotate(q, *angles).to(v.dtype), rotate(k, *angles).to(v.dtype)
        dropout = self.drop_rate if self.training else 0.0
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, T, D)
        if newest is None:
            x = attend(q, k, v, dropout, is_short=self.is_short)
        else:
            k, v = newest.extend(self.layer, k, v)
            x = F.scaled_dot_product_attention(
                q.to(k.dtype),
                k,
                v,
                attn_mask=newest.mask,
                is_causal=newest.is_causal,
                enable_gqa=self.n_heads != self.n_kv_heads,
            )
        return self.out_proj(x.transpose(1, 2).reshape(B, T, C))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, *, is_short: bool
) -> torch.Tensor:
    """Causal attention of (B, H, T, D) queries over (B, K, T, D) keys and values: (B, H, T, D).

    The CPU's kernel for it has a slow way back: its products are not bf16's fast ones. Plain
    products take half the time or less there, but keep T x T probabilities of every head, so they
    are for models of a short context.
    """
    T, D = q.shape[2:]
    has_slow_kernel = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if not (has_slow_kernel and is_short and torch.is_grad_enabled() and dropout == 0):
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
    if q.shape[1] != k.shape[1]:
        shared_by = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(shared_by, dim=1) for tensor in (k, v))
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=D**-0.5)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(q.shape)  # softmax is fp32 within


def attention_kernel(config: GPTConfig, precision: Precision, device: torch.device) -> str:
    """The kernel that torch chooses for this model's attention: "flash attention", "math", ...

    A torch that can't be asked has an "unknown" one.
    """
    choice = getattr(torch, "_fused_sdp_choice", None)  # torch has no public name for it
    if choice is None:
        return "unknown"
    dtype = DTYPES[precision.name]
    shape = (1, config.n_heads, config.context_length, config.emb_dim // config.n_heads)
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    dropout = config.attention_drop_rate
    name = SDPBackend(choice(q, q, q, dropout_p=dropout, is_causal=True)).name
    return name.lower().replace("_", " ")


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): SiLU of one projection times another, and back."""

    def __init__(self, emb_dim: int, ff_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(emb_dim, 2 * ff_dim, bias=False)  # both are one product
        self.down = nn.Linear(ff_dim, emb_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and beside a residual path."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = CausalSelfAttention(config, layer)
        self.mlp_norm = build_norm(config)
        if config.activation == "swiglu":
            self.mlp = GatedMLP(config.emb_dim, config.ff_dim)
        else:
            self.mlp = nn.Sequential(
                nn.Linear(config.emb_dim, config.ff_dim),
                ACTIVATIONS[config.activation](),
                nn.Linear(config.ff_dim, config.emb_dim),
            )
        self.dropout = Dropout(config.drop_rate)

    def forward(
        self,
        x: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        newest: Newest | None = None,
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C); angles and newest as in CausalSelfAttention."""
        x = x + self.dropout(self.attention(self.attention_norm(x), angles, newest))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def residual_projections(self) -> tuple[nn.Linear, nn.Linear]:
        """The two layers whose outputs are added to the residual path."""
        gated = isinstance(self.mlp, GatedMLP)
        return self.attention.out_proj, self.mlp.down if gated else self.mlp[-1]


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` in training, and scales up the rest (Srivastava et
    al. 2014).

    On a CPU torch's own takes a random number an element, which is the slowest small thing in a
    step. Here one of 64 bits serves four: the probability is rounded to 1 / 65,536.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape, and the same out."""
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # these have fast generators
            return F.dropout(x, self.rate)
        n_dropped = min(round(self.rate * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
        kept = (bits >= n_dropped - 2**15).to(x.dtype)
        return x * kept.mul_(2**16 / (2**16 - n_dropped))


def build_norm(config: GPTConfig) -> nn.Module:
    """The architecture's norm over the last dimension."""
    if config.architecture == "llama":
        return nn.RMSNorm(config.emb_dim, eps=RMS_NORM_EPS)
    return nn.LayerNorm(config.emb_dim)


class GPTModel(nn.Module):
    """Token ids in, logits out.

    Where activation_checkpointing is True, training keeps only what goes into each block and
    computes the rest a second time for the gradients: less memory, about a third more time.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.token_embedding = nn.Embedding(config.vocab_size, config.emb_dim)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.emb_dim)
        elif config.positions == "sinusoidal":
            table = sinusoidal_positions(config.context_length, config.emb_dim)
            self.register_buffer("position_table", table, persistent=False)
        else:
            head_dim = config.emb_dim // config.n_heads
            self.rotary = RotaryTable(config.context_length, head_dim, config.rope_theta)
        self.dropout = Dropout(config.drop_rate)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = build_norm(config)
        self.head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        self.initialize()
        self.tie_head()

    def tie_head(self) -> None:
        """Let the head share the embedding's weights, where the config says so."""
        if self.config.tie_embeddings:
            self.head.weight = self.token_embedding.weight

    def initialize(self) -> None:
        """GPT-2's initial weights: N(0, 0.02), residual projections divided by sqrt(2 n_layers).

        With zero_init those projections are zero instead.
        """
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
        ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        n_targets: float | None = None,
    ) -> torch.Tensor:
        """(B, T) token ids -> (B, T, V) logits of each position's next token.

        With targets, (B, T) or for the first rows of the batch only, their mean loss in nats
        instead, a 0-d fp32 tensor, and never all logits at once; n_targets is what the sum is
        divided by, where these are a part of a larger batch.
        """
        hidden = self.hidden(ids)
        if targets is None:
            return self.head(hidden)
        if len(targets) < len(ids):
            hidden = hidden[: len(targets)]
        return next_token_loss(hidden, self.head.weight, targets, n_targets)

    def hidden(self, ids: torch.Tensor, newest: Newest | None = None) -> torch.Tensor:
        """(B, T) token ids -> (B, T, C), what the head turns into logits.

        newest makes the ids the newest positions of a KVCache. T is at most
        config.context_length, else ValueError.
        """
        T, limit = ids.shape[1], self.config.context_length
        if limit < T:
            raise ValueError(f"{T} token ids, but the model's context_length is {limit}")
        positions = slice(T) if newest is None else newest.positions
        x = self.token_embedding(ids)  # (B, T, C)
        angles = None
        if self.config.positions == "rope":
            angles = self.rotary(positions)
        elif self.config.positions == "learned":
            x = x + self.position_embedding.weight[positions]
        else:
            # embeddings start at 0.02 and would drown in sines of 1 (Vaswani et al. 2017, 3.4)
            x = x * math.sqrt(self.config.emb_dim) + self.position_table[positions]
        x = self.dropout(x)
        saves_memory = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if saves_memory:
                x = checkpoint(block, x, angles, use_reentrant=False)
            else:
                x = block(x, angles, newest)
        return self.final_norm(x)

    def decode(self, ids: torch.Tensor, cache: KVCache, columns: torch.Tensor) -> torch.Tensor:
        """A step of one position with a fixed cache: (B, 1) ids of column (1,) -> (B, V) logits."""
        return self.head(self.hidden(ids, cache.at(columns))[:, -1])

    def hidden_matrices(self) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
        """The weights of the blocks' products, each with the rows of the matrices merged in it."""
        found = []
        for block in self.blocks:
            found.append((block.attention.qkv.weight, tuple(block.attention.qkv_rows)))
            found.append((block.attention.out_proj.weight, (self.config.emb_dim,)))
            for layer in block.mlp.children():
                if isinstance(layer, nn.Linear):
                    rows = layer.weight.shape[0]
                    merged = isinstance(block.mlp, GatedMLP) and layer is block.mlp.gate_up
                    found.append((layer.weight, (rows // 2,) * 2 if merged else (rows,)))
        return found

    def flop_per_token(self) -> int:
        """Floating point operations of a training step for each token: 6N + 12LHDT.

        Attention counts as if it were not causal (Chowdhery et al. 2022, appendix B).
        """
        config = self.config
        attention = 12 * config.n_layers * config.emb_dim * config.context_length
        return 6 * self.parameters_in_products() + attention

    def parameters_in_products(self) -> int:
        """The parameters without those that are only looked up: N of flop_per_token()."""
        count = self.count_parameters()
        if self.config.positions == "learned":
            count -= self.position_embedding.weight.numel()
        if not self.config.tie_embeddings:
            count -= self.token_embedding.weight.numel()
        return count

    def count_parameters(self) -> int:
        """The number of trained parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())


def sinusoidal_positions(length: int, emb_dim: int) -> torch.Tensor:
    """(length, emb_dim) sines and cosines of geometric wavelengths (Vaswani et al. 2017, 3.5)."""
    positions = torch.arange(length, dtype=torch.float32, device="cpu")[:, None]
    pairs = torch.arange(0, emb_dim, 2, device="cpu")
    frequencies = torch.exp(pairs * (-math.log(10_000) / emb_dim))
    angles = positions * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
