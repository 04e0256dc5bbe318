"""A loss as perplexity or bits, and a run's time."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenSize:
    """The mean length of a token of a text."""

    characters: float
    bytes: float  # of UTF-8


@dataclass(frozen=True)
class Score:
    """What a model scores on a text, or on some of its batches."""

    loss: float  # nats a token
    size: TokenSize  # of the tokens that were scored
    n_batches: int
    of_batches: int  # those of the whole text

    @property
    def perplexity(self) -> float:
        """perplexity() of the loss."""
        return perplexity(self.loss)

    @property
    def bits_per_character(self) -> float:
        """bits_per_character() of the loss."""
        return bits_per_character(self.loss, self.size)

    @property
    def bits_per_byte(self) -> float:
        """bits_per_byte() of the loss."""
        return bits_per_byte(self.loss, self.size)


def perplexity(loss: float) -> float:
    """exp of a loss (nats a token); inf from 700 on, where it would overflow."""
    return math.inf if loss >= 700 else math.exp(loss)


def bits_per_character(loss: float, size: TokenSize) -> float:
    """A loss (nats a token) in bits a character: comparable over tokenizers."""
    return loss / math.log(2) / size.characters


def bits_per_byte(loss: float, size: TokenSize) -> float:
    """A loss (nats a token) in bits a byte of UTF-8: comparable over tokenizers and scripts."""
    return loss / math.log(2) / size.bytes


def as_duration(seconds: float) -> str:
    """Seconds as text: "0m 15.8s", "12m 3.0s", "3h 25m"."""
    minutes, rest = divmod(round(max(0.0, seconds), 1), 60)
    if minutes >= 60:
        return f"{int(minutes // 60)}h {int(minutes % 60)}m"
    return f"{int(minutes)}m {rest:.1f}s"


def seconds_left(steps_done: int, total_steps: int, elapsed_s: float) -> float | None:
    """The seconds that a run still takes at its mean speed; None before the first step."""
    return elapsed_s / steps_done * (total_steps - steps_done) if steps_done else None
