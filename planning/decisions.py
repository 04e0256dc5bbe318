"""The decisions of a run: the typed record that settings.json is written from and read into."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import WindowPlan
from engine.attention import ATTENTIONS
from engine.errors import CheckpointError, SettingsError
from engine.optim import default_eval_freq, default_learning_rate, default_warmup_steps
from engine.settings import check, find_problems, from_json, names_on_resume, setting, shown
from engine.words import Words
from generation import SamplingConfig
from model import GPTConfig
from planning.fine_tuning import MOST_CHAT_PASSES, MOST_PASSES, fine_tuning
from planning.plan import (
    SETTING_NAMES,
    Asked,
    Chat,
    RecipeChoice,
    RunPlan,
    RunSettings,
    Start,
    with_every_field,
)
from planning.recipe import (
    ENOUGH_SHARE,
    Fixed,
    MachineFacts,
    Recipe,
    choose_recipe,
    choose_tokenizer,
)
from storage.files import SETTINGS
from text.facts import TextFacts
from training.spacing import Spacing
from training_utils import TrainingConfig

MOST_SETTINGS_BYTES = 1 << 24
# of full mode on a GPU: the tokens of a step, where an epoch of a short text still has these steps
GPU_STEP_TOKENS, LEAST_STEPS = 32_768, 32


@dataclass(frozen=True)
class KeptPrecision:
    """The precision of a run, and why."""

    name: str
    reason: str

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of settings.json; SettingsError with every wrong value."""

    run_id: str  # in the run's checkpoints
    started: str
    changes: list[Any]  # of each later start that changed something: name -> [then, now]
    mode: str
    settings: dict[str, Any]  # RunSettings as given, DATA as JSON
    asked: Asked
    model_name: str
    model: GPTConfig
    training: TrainingConfig
    choice: RecipeChoice | None  # with MINUTES, from random weights
    start: Start | None  # the weights that it began from
    chat: Chat | None = None  # the conversations that it learns
    sampling: SamplingConfig
    # decided at each start
    device: str = setting(on_resume="numeric")
    ranks: int = setting(on_resume="numeric", minimum=1)
    parallel: str = setting(on_resume="numeric")
    precision: KeptPrecision
    threads: int = setting(on_resume="numeric", minimum=1)
    micro_batch: int = setting(on_resume="numeric", minimum=1)
    attention: str = setting(on_resume="numeric", choices=ATTENTIONS)
    compiled: bool = setting(on_resume="numeric")
    why_compiled: str
    tokenizer: str  # its fingerprint
    stood_in: bool  # a sample text replaced one that could not be downloaded
    steps_per_epoch: int = setting(minimum=1)
    total_steps: int = setting(on_resume="free", minimum=1)
    origins: dict[str, Any]  # Words
    adapted: list[Any]  # notices of what differs from the settings
    torch: str = setting(on_resume="numeric")

    def __post_init__(self) -> None:
        check(self)
        origins = {name: Words.of(origin) for name, origin in self.origins.items()}
        object.__setattr__(self, "origins", origins)  # JSON knows no Words

    @staticmethod
    def conflicts(values: dict[str, Any]) -> list[str]:
        """A choice without minutes, or wrong names and types in settings; other rules may depend on
        the machine."""
        settings, asked, start = values["settings"], values["asked"], values["start"]
        if (values["choice"] is None) != (asked.minutes is None or start is not None):
            return ["choice must be there where minutes are asked for without a start"]
        if start is not None and asked.init_from is None:
            return ["start must be there where init_from is asked for"]
        if lacking := [name for name in SETTING_NAMES if name not in settings]:
            return [f"settings lacks {', '.join(lacking)}"]
        known = {name: settings[name] for name in SETTING_NAMES}
        return find_problems(RunSettings, known, 'settings["{}"]'.format, joined=False)

    @property
    def keeps_last(self) -> bool:
        """Whether the run ends with its last weights, and has no best ones: it is to learn a few
        conversations by heart, which a validation loss does not tell."""
        return self.chat is not None and self.chat.is_small and self.training.patience is None

    @property
    def recipe(self) -> Recipe | None:
        """What was chosen for the run's MINUTES."""
        return None if self.choice is None else self.choice.recipe

    def to_json(self) -> dict[str, Any]:
        """The content of settings.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # Words are lists there


def read_record(run: Path) -> RunRecord:
    """The record of the run in a folder; CheckpointError if there is none or it is damaged."""
    file = run / SETTINGS
    try:
        is_there = file.is_file()
    except OSError as error:  # a name that is too long, a folder that is not ours to read
        raise CheckpointError(f"{run} can't be read: {error.strerror or error}") from None
    if not is_there:
        raise CheckpointError(
            f"{run} is no run (looked for {file}).\n"
            "A run is a folder that training leaves, such as those in OUTPUT_DIR."
        )
    value = read_run_file(file, MOST_SETTINGS_BYTES)
    try:
        return from_json(RunRecord, value, file.name)
    except SettingsError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file} was not written by this version of the program: {reason}"
        ) from None


def read_run_file(file: Path, most_bytes: int | None = None) -> dict[str, Any]:
    """A JSON object in a run's folder; CheckpointError if it is damaged or too long."""
    try:
        if most_bytes is not None and file.stat().st_size > most_bytes:
            raise ValueError("it is too long")
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} was not written by this version of the program")
    return value


def differences(before: RunRecord, asked: Asked) -> list[str]:
    """Why a run can't be resumed with these settings, a line per difference."""
    lines = []

    def compare(name: str, was: Any, now: Any, became: Any) -> None:
        if now not in (was, became):  # asked for then, or worked out from it
            lines.append(f"{name}: {shown(was)} then, {shown(now)} now")

    then = before.asked
    for name in ("mode", "seed", "minutes", "init_from"):
        compare(name, getattr(then, name), getattr(asked, name), getattr(then, name))
    chosen = then.tokenizer if before.recipe is None else before.recipe.tokenizer
    compare("tokenizer", then.tokenizer, asked.tokenizer, chosen)
    compare("precision", then.precision, asked.precision, before.precision.name)
    model = dataclasses.asdict(before.model)
    for name in sorted(then.model.keys() | asked.model.keys()):
        compare(name, then.model.get(name), asked.model.get(name), model.get(name))
    for name in names_on_resume(TrainingConfig, "fixed"):
        values = (then.training_value(name), asked.training_value(name))
        compare(name, *values, getattr(before.training, name))
    total = total_steps(before, asked)
    if total < before.total_steps:
        lines.append(
            f"total steps: {before.total_steps:,} then, {total:,} now (more is possible, less "
            "is not)"
        )
    return lines


def free_differences(before: RunRecord, asked: Asked, settings: dict[str, Any]) -> list[str]:
    """What differs of the settings that a resumed run may change, a line per difference.

    settings is that of settings.json.
    """
    then = before.asked.training
    pairs = {
        name: (getattr(then, name), getattr(asked.training, name))
        for name in names_on_resume(TrainingConfig, "free")
    }
    pairs |= {
        name: (before.settings[name], settings[name])
        for name in names_on_resume(RunSettings, "free")
    }
    return [
        f"{name}: {shown(was)} then, {shown(now)} now"
        for name, (was, now) in pairs.items()
        if was != now
    ]


def total_steps(before: RunRecord, asked: Asked) -> int:
    """The optimizer steps of a resumed run by the settings of now."""
    length = asked.length
    total = length.max_steps or (length.num_epochs or 0) * before.steps_per_epoch
    if not total or length == before.asked.length:  # 0: limited by time
        return before.total_steps
    return min(total, length.at_most or total)


def decide_recipe(
    plan: RunPlan,
    text: TextFacts,
    measure: Callable[[], MachineFacts],
    before: RunRecord | None,
    ranks: int = 1,
) -> RunPlan:
    """The plan with the recipe of its MINUTES, with batches that the ranks can share; a resumed run
    keeps its own."""
    if plan.fixed is None or plan.run.MINUTES is None:
        return plan
    choice = None if before is None else before.choice
    if choice is None:
        machine = measure()
        recipe = choose_recipe(text, machine, plan.run.MINUTES, plan.fixed)
        recipe = recipe.keeping(plan.training.keep_checkpoints)
        training = recipe.training
        if windows := training.get("batch_size"):
            training = training | {"batch_size": max(ranks, windows // ranks * ranks)}
        choice = RecipeChoice(dataclasses.replace(recipe, training=training), text, machine)
    recipe = choice.recipe
    return dataclasses.replace(plan, choice=choice, model=recipe.model, tokenizer=recipe.tokenizer)


def decide_tokenizer(plan: RunPlan, text: TextFacts) -> RunPlan:
    """The plan of a run without MINUTES with what TOKENIZER "auto" means for its text."""
    names = ("batch_size", "gradient_accumulation_steps", "optimizer", "weight_decay")
    training = {name: getattr(plan.training, name) for name in names}
    fixed = Fixed(None, with_every_field(plan.model), training)
    tokenizer = choose_tokenizer(text, fixed, plan.training.time_budget_minutes)
    return dataclasses.replace(plan, tokenizer=tokenizer)


def decide_training(
    plan: RunPlan,
    device: torch.device,
    n_tokens: int,
    before: RunRecord | None,
    ranks: int = 1,
) -> TrainingConfig:
    """The hyper-parameters as asked, with the values that a resumed run worked out at its start.

    In full mode a GPU's new run takes larger batches: with small ones it would wait for the host.
    """
    asked = _with_recipe(plan.training, plan.recipe)
    if before is not None:
        then = _with_recipe(before.asked.training, before.recipe).to_dict()
        became = before.training.to_dict()
        decided = {n: became[n] for n, value in asked.to_dict().items() if then[n] == value}
        asked = dataclasses.replace(asked, **decided)
    elif plan.start is not None:
        asked = dataclasses.replace(asked, **fine_tuning(plan, device.type, ranks))
    elif plan.mode == "full" and device.type != "cpu" and asked.max_length is not None:
        n_windows = n_tokens // asked.max_length
        largest = GPU_STEP_TOKENS // asked.max_length
        batch_size = max(asked.batch_size, min(largest, n_windows // LEAST_STEPS))
        asked = dataclasses.replace(asked, batch_size=batch_size)
    rate = asked.learning_rate or default_learning_rate(plan.model["emb_dim"], asked.optimizer)
    return dataclasses.replace(asked, learning_rate=rate)


def find_deadline(plan: RunPlan, asked: TrainingConfig, began_at: float) -> float | None:
    """When a run with MINUTES is to end that began at a time, by the same clock; None without."""
    if plan.run.MINUTES is None or asked.time_budget_minutes is None:
        return None
    return began_at + 60 * asked.time_budget_minutes


def _with_recipe(asked: TrainingConfig, recipe: Recipe | None) -> TrainingConfig:
    """The hyper-parameters with those of a recipe."""
    return asked if recipe is None else dataclasses.replace(asked, **recipe.training)


def most_steps_of(
    recipe: Recipe | None,
    minutes: float,
    steps_per_epoch: int,
    *,
    from_weights: bool,
    chat: Chat | None = None,
) -> int | None:
    """The most steps of a run of so many minutes: its recipe's, where fewer are enough for it, or
    with MINUTES those of MOST_PASSES through the text from given weights, of more through a few
    conversations."""
    if from_weights:
        passes = MOST_CHAT_PASSES if chat is not None and chat.is_small else MOST_PASSES
        return passes * steps_per_epoch
    if recipe is None or recipe.minutes >= ENOUGH_SHARE * minutes:
        return None
    return recipe.steps


def complete_training(
    training: TrainingConfig, windows: WindowPlan, total_steps: int | None
) -> tuple[TrainingConfig, list[str]]:
    """The hyper-parameters with the values that windows and total_steps decide; and notices.

    Where total_steps is not known yet, what it decides stays None.
    """
    warmup_steps, eval_freq, notices = training.warmup_steps, training.eval_freq, []
    eval_iter = training.eval_iter
    if total_steps is not None:
        eval_freq = eval_freq or default_eval_freq(total_steps)
        if warmup_steps is None:
            warmup_steps = default_warmup_steps(total_steps)
        elif warmup_steps >= total_steps:
            warmup_steps = total_steps - 1
            notices.append(
                f"warmup_steps is lowered from {training.warmup_steps} to {warmup_steps}: the run "
                f"has {total_steps} steps"
            )
        if eval_iter is None:
            accumulation = training.gradient_accumulation_steps
            steps_per_epoch = -(-windows.n_windows // (windows.batch_size * accumulation))
            run = Spacing(total_steps, steps_per_epoch, eval_freq)
            eval_iter = run.default_eval_iter(windows.n_val_batches, accumulation)
    complete = dataclasses.replace(
        training,
        eval_freq=eval_freq,
        eval_iter=eval_iter,
        batch_size=windows.batch_size,
        max_length=windows.max_length,
        stride=windows.stride,
        warmup_steps=warmup_steps,
    )
    return complete, notices


def keep_identity(record: RunRecord, before: RunRecord) -> tuple[RunRecord, list[str]]:
    """The record of a resumed run with the changes, at record.started; and notes on them."""
    parts = ((TrainingConfig, before.training, record.training), (RunRecord, before, record))
    pairs = {
        name: [getattr(was, name), getattr(now, name)]
        for cls, was, now in parts
        for name in names_on_resume(cls, "free", "numeric")
    }
    pairs |= {
        name: [before.settings[name], record.settings[name]]
        for name in names_on_resume(RunSettings, "free")
    }
    changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    notes = [
        f"{name} was {shown(changed[name][0])} and is {shown(changed[name][1])}: from here on the "
        "numbers are not bit for bit those of an undisturbed run"
        for name in names_on_resume(RunRecord, "numeric")
        if name in changed
    ]
    changes = [*before.changes, *([{"at": record.started} | changed] if changed else [])]
    kept = dataclasses.replace(
        record,
        run_id=before.run_id,
        started=before.started,
        changes=changes,
        start=before.start,
    )
    return kept, notes
