"""A model from elsewhere, opened: what it is, checked before its weights are read."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import ResourceError
from engine.memory import as_bytes, available_memory
from model import GPTConfig
from text.tokenizer import Tokenizer

SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Pretrained:
    """A model from elsewhere: what it is, opened; its weights are read when asked for."""

    source: str  # in words, for the log and the record: 'SmolLM2-135M-Instruct (gguf, Q4_1)'
    config: GPTConfig  # of the weights, with their own context_length and vocab_size
    tokenizer: Tokenizer
    weights: Callable[
        [], dict[str, torch.Tensor]
    ]  # by GPTModel's parameter names, fp32, on the CPU
    fingerprint: str  # sha256 that tells these weights from others: what a resumed run compares
    chat_template: str | None = None

    def fitted(self, config: GPTConfig) -> dict[str, torch.Tensor]:
        """The weights for a model of fewer positions, or of other tokens beyond the tokenizer's."""
        return fitted(self.weights(), config, self.tokenizer.vocab_size)


def require_memory(path: Path, n_numbers: int) -> None:
    """Raise ResourceError where a file's weights, in fp32, don't fit into memory."""
    needed, room = 4 * n_numbers, available_memory(torch.device("cpu"))
    if room is not None and needed > room:
        raise ResourceError(
            f"the weights in {path} take {as_bytes(needed)} of memory, and {as_bytes(room)} are "
            "free."
        )


def fingerprint_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """A sha256 of tensors that may be mapped from a file: names, formats, shapes, and both ends.

    Training changes every tensor, so that the ends tell weights apart; they are read in
    milliseconds, however large the file.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        for end in (flat[:SAMPLE_BYTES], flat[-SAMPLE_BYTES:]):
            digest.update(end.numpy())
    return digest.hexdigest()


def fitted(
    weights: dict[str, torch.Tensor], config: GPTConfig, n_known: int
) -> dict[str, torch.Tensor]:
    """Weights cut to a model's positions and tokens; those from n_known on get a mean row.

    The mean of the known ones (Hewitt 2021) leaves their probabilities about as they were. Rows
    that only pad a vocabulary are of no token, and nobody has trained them.
    """
    kept = dict(weights)
    if (positions := kept.get("position_embedding.weight")) is not None:
        kept["position_embedding.weight"] = positions[: config.context_length]
    for name in {"token_embedding.weight", "head.weight"} & kept.keys():
        known = kept[name][: min(n_known, config.vocab_size)]
        if (n_new := config.vocab_size - len(known)) > 0:
            known = torch.cat([known, known.mean(0, keepdim=True).expand(n_new, -1)])
        kept[name] = known
    return kept
