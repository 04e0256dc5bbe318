"""From a model to text: greedy, temperature, top-k and top-p sampling; ids in, ids out."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from engine.compiling import not_compiled
from engine.errors import SettingsError
from engine.settings import check, raise_if_any, setting, shown
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingConfig:
    """How the samples after training are drawn. Raises SettingsError with every wrong value."""

    max_new_tokens: int = setting(50, minimum=1, maximum=100_000)
    temperature: float = setting(0.8, minimum=0, maximum=1e9)
    top_k: int = setting(50, minimum=1)
    top_p: float = setting(0.9, minimum=0, maximum=1)

    def __post_init__(self) -> None:
        check(self)


@torch.no_grad()
def generate(
    model: nn.Module,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Continue (B, T) token ids, T at least 1, by max_new_tokens; returns (B, T + max_new_tokens).

    Whenever the text outgrows the model's context, its newest half is kept and goes on.
    Temperature 0 takes the likeliest token each time. The generator, on the model's device, makes
    a draw repeatable. Raises SettingsError for a value that makes no sense.
    """
    problems = [
        f"{name} is {shown(value)}; it must be {allowed}"
        for name, value, is_right, allowed in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
            ("temperature", temperature, temperature >= 0, "0 or more"),
            ("top_k", top_k, top_k is None or top_k >= 1, "1 or more, or None"),
            ("top_p", top_p, top_p is None or 0 <= top_p <= 1, "between 0 and 1, or None"),
            (
                "ids",
                tuple(ids.shape),
                ids.dim() == 2 and ids.shape[1] > 0,
                "of shape (B, T), T > 0",
            ),
        )
        if not is_right
    ]
    raise_if_any(problems, "generate()")
    keep = max(1, model.config.context_length // 2)
    window = ids
    with evaluating(model):
        for _ in range(max_new_tokens):
            if window.shape[1] > model.config.context_length:
                window = window[:, -keep:]
            logits = model.head(model.hidden(window)[:, -1]).float()  # (B, V)
            chosen = choose_next(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            window = torch.cat((window, chosen), dim=1)
            ids = torch.cat((ids, chosen), dim=1)
    return ids


def choose_next(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw one token a row from (B, V) logits; returns (B, 1).

    top_k keeps the k likeliest tokens, all where k is above V. top_p then keeps the smallest set
    of likeliest tokens whose probabilities sum to at least p, never fewer than one (nucleus
    sampling, Holtzman et al. 2019). Both filter the distribution at this temperature.
    """
    if temperature < torch.finfo(torch.float32).tiny or top_k == 1:  # fp32 may divide by it as 0
        return logits.argmax(dim=-1, keepdim=True)
    # the largest logit becomes 0 before the division, so that no temperature overflows
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits, tokens = logits.topk(top_k, dim=-1)  # both (B, k), likeliest first
    elif top_p is not None:
        logits, tokens = logits.sort(dim=-1, descending=True)
    else:
        tokens = None
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities  # what likelier tokens sum to
        before[:, 0] = -1.0  # the likeliest token stays even at top_p 0
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, num_samples=1, generator=generator)
    return drawn if tokens is None else tokens.gather(-1, drawn)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, uncompiled, and leave it in the mode it had."""
    was_training = model.training
    model.eval()
    try:
        with not_compiled():
            yield
    finally:
        model.train(was_training)


def text_to_token_ids(text: str, tokenizer: Tokenizer) -> torch.Tensor:
    """The token ids of a text as a batch of one, (1, T); SettingsError for an empty text."""
    ids = tokenizer.encode(text)
    if not ids:
        raise SettingsError("the text to go on from is empty; give the model a word to start with")
    return torch.tensor([ids], dtype=torch.long)


def token_ids_to_text(ids: torch.Tensor, tokenizer: Tokenizer) -> str:
    """The text of (T,) or (1, T) token ids; incomplete characters become U+FFFD."""
    return tokenizer.decode(ids.flatten().tolist())
