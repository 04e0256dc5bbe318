"""The GPT: a causal transformer in GPT-2's form (Radford et al. 2019), pre-norm.

Tensor letters: B batch, T positions, C emb_dim, H heads, D = C / H, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.settings import check, setting

ACTIVATIONS = {"gelu": lambda: nn.GELU(approximate="tanh"), "relu": nn.ReLU}
INIT_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. Raises SettingsError with every wrong value.

    ff_dim None stands for 4 x emb_dim. Rates are dropout probabilities.
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
    activation: str = setting("gelu", choices=tuple(ACTIVATIONS))
    positions: str = setting("learned", choices=("learned", "sinusoidal"))
    tie_embeddings: bool = setting(True)

    def __post_init__(self) -> None:
        check(self)
        if self.ff_dim is None:
            object.__setattr__(self, "ff_dim", 4 * self.emb_dim)

    @staticmethod
    def conflicts(values: dict[str, Any]) -> list[str]:
        """Rules that join two fields; values is complete, None where a field is not given."""
        problems = []
        emb_dim, n_heads = values["emb_dim"], values["n_heads"]
        if emb_dim and n_heads and emb_dim % n_heads:
            problems.append(f"emb_dim ({emb_dim}) must be a multiple of n_heads ({n_heads})")
        if emb_dim and emb_dim % 2 and values["positions"] == "sinusoidal":
            problems.append(f'emb_dim ({emb_dim}) must be even where positions is "sinusoidal"')
        return problems


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which no position sees a later one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.attention_drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        dropout = self.drop_rate if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Attention, then a two-layer MLP, each behind a norm and beside a residual path."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.emb_dim)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.emb_dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.emb_dim, config.ff_dim),
            ACTIVATIONS[config.activation](),
            nn.Linear(config.ff_dim, config.emb_dim),
        )
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPTModel(nn.Module):
    """Token ids in, logits out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.emb_dim)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.emb_dim)
        else:
            table = sinusoidal_positions(config.context_length, config.emb_dim)
            self.register_buffer("position_table", table, persistent=False)
        self.dropout = nn.Dropout(config.drop_rate)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.emb_dim)
        self.head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        self.initialize()
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight

    def initialize(self) -> None:
        """GPT-2's initial weights: N(0, 0.02), residual projections divided by sqrt(2 n_layers)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layers)
        for block in self.blocks:
            nn.init.normal_(block.attention.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp[-1].weight, std=residual_std)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids -> (B, T, V) logits of each position's next token."""
        return self.head(self.hidden(ids))

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids -> (B, T, C), what the head turns into logits.

        T is at most config.context_length, else ValueError.
        """
        T, limit = ids.shape[1], self.config.context_length
        if limit < T:
            raise ValueError(f"{T} token ids, but the model's context_length is {limit}")
        x = self.token_embedding(ids)  # (B, T, C)
        if self.config.positions == "learned":
            x = x + self.position_embedding.weight[:T]
        else:
            # embeddings start at 0.02 and would drown in sines of 1 (Vaswani et al. 2017, 3.4)
            x = x * math.sqrt(self.config.emb_dim) + self.position_table[:T]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def count_parameters(self) -> int:
        """The number of trained parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())


def sinusoidal_positions(length: int, emb_dim: int) -> torch.Tensor:
    """(length, emb_dim) sines and cosines of geometric wavelengths (Vaswani et al. 2017, 3.5)."""
    positions = torch.arange(length, dtype=torch.float32)[:, None]
    frequencies = torch.exp(torch.arange(0, emb_dim, 2) * (-math.log(10_000) / emb_dim))
    angles = positions * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
