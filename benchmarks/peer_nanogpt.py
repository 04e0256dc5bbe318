"""A training step as nanoGPT takes it on a CPU: torch's own layers, fp32, nothing of ours."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.steps import LEARNING_RATE, WEIGHT_DECAY, Step
from model import GPTConfig


class Norm(nn.Module):
    """A LayerNorm without a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return F.layer_norm(x, self.weight.shape, self.weight)


class Block(nn.Module):
    """Attention and an MLP of exact GELU, each added to its input; no biases, no dropout."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norms = nn.ModuleList(Norm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        merged = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in merged.unbind(2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class PlainGPT(nn.Module):
    """GPT-2's shape with learned positions and a tied head; returns the mean cross-entropy."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.emb_dim)
        self.positions = nn.Embedding(config.context_length, config.emb_dim)
        blocks = (Block(config.emb_dim, config.n_heads) for _ in range(config.n_layers))
        self.blocks = nn.Sequential(*blocks, Norm(config.emb_dim))
        self.criterion = nn.CrossEntropyLoss()
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """(B, T) ids and targets -> a 0-d loss."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        logits = F.linear(self.blocks(x), self.tokens.weight)
        return self.criterion(logits.flatten(0, 1), targets.flatten())


def prepare_nanogpt_step(config: GPTConfig, device: torch.device) -> Step:
    """A fresh model of this shape and its step in fp32: loss, clipped gradients, AdamW."""
    torch.manual_seed(0)
    model = PlainGPT(config).to(device)
    decayed = [weight for weight in model.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
        fused=device.type == "cuda",  # as nanoGPT chooses it
    )

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        loss = model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
