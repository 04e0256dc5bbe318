"""What a recipe is: settings that are chosen for a text, a machine and a number of minutes."""

from dataclasses import dataclass
from typing import Any

from engine.settings import check


@dataclass(frozen=True)
class Fixed:
    """What the user has set, which a recipe keeps."""

    tokenizer: str | None  # a value of TOKENIZER; None: to be chosen
    model: dict[str, Any]  # of GPTConfig's arguments
    training: dict[str, Any]  # of TrainingConfig's arguments

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Recipe:
    """The chosen settings, the reasons, and what they are expected to reach."""

    tokenizer: str
    model: dict[str, Any]  # GPTConfig's arguments but vocab_size
    training: dict[str, Any]  # TrainingConfig's arguments that were chosen
    reasons: dict[str, str]
    runner_up: str
    bits_per_byte: float
    low: float
    high: float
    passes: float
    steps: int
    tokens_per_s: float
    by_heart_minute: float | None
    memory: int
    disk: int
    warnings: list[Any]

    def __post_init__(self) -> None:
        check(self)
