"""What a loss means: perplexity, bits a character."""

import math


def perplexity(loss: float) -> float:
    """The number of equally likely tokens that a loss (nats a token) amounts to; inf past e^700."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_character(loss: float, tokens: int, characters: int) -> float:
    """The bits that a loss (nats a token) spends on a character of text.

    tokens and characters count the same text. Unlike the loss, this figure can be compared
    between tokenizers.
    """
    return loss / math.log(2) * tokens / characters
