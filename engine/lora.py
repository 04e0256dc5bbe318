"""LoRA (Hu et al. 2021): weights stay frozen, and each matrix gets a trained product of low rank.

A merged matrix, such as that of queries, keys and values, has one input side for all its parts.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

SCALE = 2.0  # alpha / rank of the paper: what the product is multiplied by
INPUTS, OUTPUTS = "lora_a", "lora_b"


class LoRALinear(nn.Linear):
    """A linear layer with frozen weights W, and (out, rank) B and (rank, in) A: W + SCALE B A.

    W is kept in the dtype `frozen`, A and B in fp32.
    """

    def __init__(
        self, linear: nn.Linear, rank: int, generator: torch.Generator, frozen: torch.dtype
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach().to(frozen)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), linear.bias
        bound = 1 / math.sqrt(linear.in_features)
        inputs = torch.empty(rank, linear.in_features, device="cpu")
        inputs.uniform_(-bound, bound, generator=generator)
        device = linear.weight.device
        self.lora_a = nn.Parameter(inputs.to(device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        # autocast casts the weight itself, and keeps one that has its dtype
        is_cast = torch.is_autocast_enabled(x.device.type)
        weight = self.weight if is_cast else self.weight.to(x.dtype)
        y = F.linear(x, weight, self.bias)
        return y.add_(F.linear(SCALE * F.linear(x, self.lora_a), self.lora_b))


def add_lora(model: nn.Module, rank: int, seed: int, frozen: torch.dtype = torch.float32) -> None:
    """Freeze a model, and add a trained product of this rank to each linear layer of its blocks.

    The products are 0 until they are trained: the model's outputs stay the same. The weights of
    these layers are kept in the dtype `frozen`: with that of autocast its products are the same.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, LoRALinear(child, rank, generator, frozen))


def adapter_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a model's parameters by name that add_lora() added."""
    return {n: value for n, value in tensors.items() if n.endswith((f".{INPUTS}", f".{OUTPUTS}"))}


def merged(
    frozen: dict[str, torch.Tensor], adapter: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a model without LoRA that computes the same; frozen's memory is used.

    Raises KeyError or RuntimeError if the adapter is not one of these weights.
    """
    for name, inputs in adapter.items():
        layer, _, kind = name.rpartition(".")
        if kind == INPUTS:
            frozen[f"{layer}.weight"].addmm_(adapter[f"{layer}.{OUTPUTS}"], inputs, alpha=SCALE)
    return frozen
