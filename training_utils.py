"""The hyper-parameters of a run: the presets of quick and full mode, and your own."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from engine.optim import BETA2, DECAY_SHARE, FINAL_RATE, OPTIMIZERS, SCHEDULES
from engine.settings import (
    check,
    find_problems,
    raise_if_any,
    setting,
    shown,
    translate_names,
)
from model import MODEL_SETTINGS

QUICK_MODE_STEPS = 200  # the most steps of quick mode's epoch


@dataclass(frozen=True)
class TrainingConfig:
    """The hyper-parameters of a run; the defaults are custom mode's.

    None is worked out from the model or the text when the run is prepared, but means "never" for
    max_steps, patience and save_every; time_budget_minutes becomes max_steps. Lengths are in
    tokens; eval_freq, save_every, warmup_steps and max_steps in optimizer steps; patience in
    evaluations. Raises SettingsError with every wrong value.
    """

    num_epochs: int = setting(3, on_resume="free", minimum=1, maximum=1_000_000_000)
    max_steps: int | None = setting(None, on_resume="free", minimum=1, maximum=1_000_000_000)
    time_budget_minutes: float | None = setting(None, on_resume="fixed", above=0, maximum=1_000_000)
    batch_size: int = setting(8, on_resume="fixed", minimum=1, maximum=1_000_000)
    gradient_accumulation_steps: int = setting(1, on_resume="fixed", minimum=1, maximum=1_000_000)
    optimizer: str = setting("adamw", on_resume="fixed", choices=OPTIMIZERS)
    learning_rate: float | None = setting(None, on_resume="fixed", above=0, maximum=10)
    embedding_rate: float | None = setting(None, on_resume="fixed", above=0, maximum=10)
    schedule: str = setting("cosine", on_resume="fixed", choices=SCHEDULES)
    warmup_steps: int | None = setting(None, on_resume="fixed", minimum=0)
    decay_share: float = setting(DECAY_SHARE, on_resume="fixed", above=0, maximum=1)
    final_rate: float = setting(FINAL_RATE, on_resume="fixed", minimum=0, maximum=1)
    beta2: float = setting(BETA2, on_resume="fixed", above=0, below=1)
    lora_rank: int | None = setting(None, on_resume="fixed", minimum=1, maximum=1024)
    weight_decay: float = setting(0.1, on_resume="fixed", minimum=0, maximum=10)
    decay_embeddings: bool = setting(False, on_resume="fixed")
    max_grad_norm: float = setting(1.0, on_resume="fixed", minimum=0)
    max_length: int | None = setting(None, minimum=1, maximum=1_000_000)
    stride: int | None = setting(None, on_resume="fixed", minimum=1, maximum=1_000_000_000)
    sampling: str = setting("windows", on_resume="fixed", choices=("windows", "random"))
    shift_windows: bool = setting(False, on_resume="fixed")
    train_ratio: float = setting(0.9, on_resume="fixed", above=0, below=1)
    eval_freq: int | None = setting(None, on_resume="free", minimum=1)
    eval_iter: int = setting(10, on_resume="free", minimum=1)
    final_iter: int | None = setting(None, on_resume="free", minimum=1)
    patience: int | None = setting(None, on_resume="free", minimum=1)
    save_every: int | None = setting(None, on_resume="free", minimum=1)
    save_minutes: float = setting(5.0, on_resume="free", above=0)
    keep_checkpoints: int = setting(2, on_resume="free", minimum=2, maximum=1000)
    start_context: str | list[str] = setting(
        "Every effort moves you", on_resume="free", most_items=16
    )
    num_workers: int = setting(0, on_resume="free", minimum=0, maximum=1024)
    activation_checkpointing: bool = setting(False, on_resume="free")
    model_overrides: dict = setting({})

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def conflicts(values: dict[str, Any]) -> list[str]:
        """Rules on several settings; values is complete."""
        problems = []
        steps, warmup = values["max_steps"], values["warmup_steps"]
        if steps is not None and warmup is not None and warmup >= steps:
            problems.append(
                f"warmup_steps ({warmup}) must be below max_steps ({steps}), "
                "or the learning rate never reaches its peak"
            )
        if values["lora_rank"] is not None and values["optimizer"] == "muon":
            problems.append('lora_rank needs optimizer "adamw": Muon is for entire matrices')
        return problems + [
            f'model_overrides["{name}"] is unknown; known are: {", ".join(MODEL_SETTINGS)}'
            for name in values["model_overrides"]
            if name not in MODEL_SETTINGS
        ]

    @classmethod
    def get_quick_test_config(cls) -> Self:
        """Quick mode: one epoch in seconds, with a rate at which nine steps show learning."""
        return cls(
            num_epochs=1,
            batch_size=4,
            learning_rate=1.5e-2,
            warmup_steps=2,
            max_length=128,
            stride=128,
            eval_freq=3,
            eval_iter=3,
        )

    @classmethod
    def get_full_training_config(cls) -> Self:
        """Full mode: ten epochs for the 124M model."""
        return cls(
            num_epochs=10,
            batch_size=4,
            learning_rate=6e-4,
            max_length=256,
            stride=256,
            eval_freq=20,
            eval_iter=5,
        )

    @property
    def prompts(self) -> list[str]:
        """The prompts of samples."""
        return as_prompts(self.start_context)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class CustomTrainingConfig(TrainingConfig):
    """A TrainingConfig from a dict, which update() changes if the result is valid."""

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Self:
        """Build from a dict like config_run.custom_params; SettingsError with every problem."""
        if not isinstance(given, dict):
            raise_if_any([f"it is {shown(given)}; it must be a dict {{...}}"], "custom_params")
        arguments, problems, _ = read_custom_params(given, "custom_params")
        raise_if_any(problems, "custom_params")
        return cls(**with_defaults(arguments))

    def update(self, **changes: Any) -> None:
        """Change settings, or none and raise SettingsError; model fields add to model_overrides.

        None sets the default.
        """
        arguments, problems, _ = read_custom_params(changes, "")
        raise_if_any(problems, type(self).__name__)
        arguments["model_overrides"] = self.model_overrides | arguments["model_overrides"]
        changed = type(self)(**with_defaults(self.to_dict() | arguments))
        for name, value in vars(changed).items():
            object.__setattr__(self, name, value)  # frozen against everything but this


def as_prompts(start_context: str | list[str]) -> list[str]:
    """A start_context as a list of prompts."""
    return [start_context] if isinstance(start_context, str) else list(start_context)


def read_custom_params(
    given: dict[str, Any], place: str
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Translate a dict, which messages call `place`, to TrainingConfig's arguments.

    Model fields go into model_overrides. Returns the arguments, in which None stands for what is
    not set, every problem and every notice.
    """
    given = dict(given)
    overrides = given.pop("model_overrides", None)
    overrides = {} if overrides is None else overrides
    overrides_place = f'{place}["model_overrides"]' if place else "model_overrides"
    misplaced = []
    if not isinstance(overrides, dict):
        misplaced = [f"{overrides_place} is {shown(overrides)}; it must be a dict {{...}}"]
        overrides = {}
    training = [f.name for f in dataclasses.fields(TrainingConfig) if f.name != "model_overrides"]
    values, labels, problems, notices = translate_names(
        [(place, given), (overrides_place, overrides)], [*training, *MODEL_SETTINGS]
    )
    arguments = {name: value for name, value in values.items() if name in training}
    filled = with_defaults(arguments)
    problems += find_problems(TrainingConfig, filled, lambda name: labels.get(name, name))
    arguments["model_overrides"] = {n: v for n, v in values.items() if n in MODEL_SETTINGS}
    return arguments, misplaced + problems, notices


def with_defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    """TrainingConfig's arguments, its default in place of each None; model fields of None go."""
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(TrainingConfig)}
    filled = {name: defaults[name] if v is None else v for name, v in arguments.items()}
    if overrides := arguments.get("model_overrides"):
        set_here = {name: value for name, value in overrides.items() if value is not None}
        filled["model_overrides"] = set_here
    return filled
