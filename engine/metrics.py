"""What a loss means: perplexity."""

import math


def perplexity(loss: float) -> float:
    """The number of equally likely tokens that a loss (nats a token) amounts to; inf past e^700."""
    return math.inf if loss >= 700 else math.exp(loss)
