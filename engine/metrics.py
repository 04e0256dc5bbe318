"""What a loss means, and how fast a run goes: perplexity, bits, tokens a second, time left."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenSize:
    """How much text a token of the validation text stands for, on average."""

    characters: float
    bytes: float  # of UTF-8


def perplexity(loss: float) -> float:
    """The number of equally likely tokens that a loss (nats a token) amounts to; inf past e^700."""
    return math.inf if loss >= 700 else math.exp(loss)


def bits_per_character(loss: float, size: TokenSize) -> float:
    """A loss (nats a token) in bits a character: comparable over tokenizers."""
    return loss / math.log(2) / size.characters


def bits_per_byte(loss: float, size: TokenSize) -> float:
    """A loss (nats a token) in bits a byte of UTF-8: comparable over tokenizers and scripts."""
    return loss / math.log(2) / size.bytes


def as_duration(seconds: float) -> str:
    """Seconds as people read them: "0m 15.8s", "12m 3.0s", "3h 25m"."""
    minutes, rest = divmod(round(max(0.0, seconds), 1), 60)
    if minutes >= 60:
        return f"{int(minutes // 60)}h {int(minutes % 60)}m"
    return f"{int(minutes)}m {rest:.1f}s"


def seconds_left(steps_done: int, total_steps: int, elapsed_s: float) -> float | None:
    """The time that the rest of a run takes at its mean pace; None before the first step."""
    return elapsed_s / steps_done * (total_steps - steps_done) if steps_done else None
