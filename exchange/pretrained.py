"""A model from elsewhere, opened: what it is, checked before its weights are read."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

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
