"""From config_run.py and config.json to one plan: the rules of precedence."""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.parallel import KINDS
from engine.devices import find_device_fault
from engine.errors import SettingsError
from engine.precision import PRECISIONS
from engine.settings import (
    ALIASES,
    check,
    find_problems,
    raise_if_any,
    read_json_object,
    setting,
    shown,
    translate_names,
    unknown_name,
)
from engine.words import Words
from generation import SamplingConfig
from model import MODEL_SETTINGS, GPTConfig
from planning.recipe import Fixed, MachineFacts, Recipe
from storage.files import RESERVED, is_portable_name
from storage.tracking import TRACKERS
from text.facts import TextFacts
from text.sources import parse_data
from text.tokenizer import find_tokenizer_fault
from training_utils import QUICK_MODE_STEPS, TrainingConfig, read_custom_params, with_defaults

MODELS_FILE = Path(__file__).resolve().parent.parent / "config.json"
LEAST_WIDTH_A_LAYER = 4  # of emb_dim; fewer are hardly ever meant
HIGH_RATE = 0.1
SMALL_MODEL, DEFAULT_MODEL = "small", "gpt2-124m"  # that MODEL "auto" chooses from
OPEN_MODEL = "auto"  # the name of a model that the recipe or the weights of INIT_FROM decide
AUTO_START = "auto"  # INIT_FROM: the recipe chooses between random weights and given ones
SMALL_CHAT = 2000  # conversations; a run on fewer keeps its last weights and not the best ones
RECIPE_BASE = {"architecture": "llama"}  # of such models, unless the user sets another
DEFAULT_TOKENIZER = "gpt2"  # where no recipe chooses one
# TrainingConfig's names that a recipe chooses; config_run.py ships them as None
RECIPE_CHOOSES = (
    "batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "learning_rate",
    "embedding_rate",
    "sampling",
    "schedule",
    "decay_share",
    "final_rate",
    "warmup_steps",
    "weight_decay",
    "decay_embeddings",
    "beta2",
    "shift_windows",
)


@dataclass(frozen=True)
class RunSettings:
    """The names of config_run.py and their defaults."""

    DATA: str | dict[str, Any] | list[Any] = setting("the-verdict")
    TOKENIZER: str | None = setting(None, on_resume="fixed")
    MINUTES: float | None = setting(None, minimum=0.25, maximum=10_000)
    INIT_FROM: str | None = setting(None)
    QUICK_MODE: bool = setting(True)
    CUSTOM_MODE: bool = setting(False)
    MODEL: str = setting("auto")
    USE_SMALL: bool = setting(True)
    USE_DEFAULT: bool = setting(False)
    custom_params: dict[str, Any] = setting({})
    sampling_params: dict[str, Any] = setting({}, on_resume="free")
    DEVICE: str | None = setting(None, on_resume="free")
    PRECISION: str = setting("auto", on_resume="fixed", choices=PRECISIONS)
    COMPILE: str | bool = setting("auto", on_resume="free")
    PARALLEL: str = setting("auto", on_resume="free", choices=KINDS)
    SEED: int = setting(123, on_resume="fixed", minimum=0, maximum=2**32 - 1)
    LOG_EVERY: int = setting(0, on_resume="free", minimum=0)
    OUTPUT_DIR: str = setting("runs")
    RUN_NAME: str | None = setting(None)
    RESUME: str | bool = setting("auto")
    TRACKING: list[Any] = setting([], on_resume="free")
    NIGHT_MODE: bool = setting(False, on_resume="free")
    DRY_RUN: bool = setting(False)

    def __post_init__(self) -> None:
        check(self)

    @property
    def names_weights(self) -> bool:
        """Whether INIT_FROM names the weights that a run begins from."""
        return self.INIT_FROM not in (None, AUTO_START)

    @staticmethod
    def conflicts(values: dict[str, Any]) -> list[str]:
        """Rules beyond type and range; values is complete."""
        problems = []
        try:
            parse_data(values["DATA"])
        except SettingsError as error:
            problems.append(str(error))
        tokenizer = values["TOKENIZER"]
        if tokenizer is not None and (fault := find_tokenizer_fault(tokenizer)):
            problems.append(f"TOKENIZER {fault}")
        problems += _about_start(values)
        if values["COMPILE"] not in ("auto", True, False):
            problems.append(
                f'COMPILE is {shown(values["COMPILE"])}; it must be "auto", True or False'
            )
        if values["RESUME"] is True:
            problems.append('RESUME is True; it must be "auto", False or the folder of a run')
        if values["RESUME"] not in ("auto", False) and values["RUN_NAME"] is not None:
            problems.append(
                f"RESUME ({shown(values['RESUME'])}) and RUN_NAME ({shown(values['RUN_NAME'])}) "
                "both name a run; set one of them"
            )
        problems += [
            f"TRACKING names {shown(name)}; it may name: {', '.join(TRACKERS)}"
            for name in values["TRACKING"]
            if not isinstance(name, str) or name not in TRACKERS
        ]
        problems += [
            f"TRACKING names {shown(name)} twice"
            for name in TRACKERS
            if values["TRACKING"].count(name) > 1
        ]
        problems += [
            f"{name} ({shown(values[name])}) can't be a folder's path on this machine"
            for name in ("OUTPUT_DIR", "RESUME")
            if isinstance(values[name], str) and not _can_be_a_path(values[name])
        ]
        if fault := find_device_fault(values["DEVICE"]):
            problems.append(f"DEVICE is {shown(values['DEVICE'])}; it {fault}, or None")
        if values["RUN_NAME"] is not None and (fault := _find_name_fault(values["RUN_NAME"])):
            problems.append(fault)
        return problems


def _about_start(values: dict[str, Any]) -> list[str]:
    """What contradicts INIT_FROM, whose weights bring their own model and tokenizer."""
    where = values["INIT_FROM"]
    if where is None:
        return []
    if where == AUTO_START:
        if values["MINUTES"] is not None:
            return []
        return [
            f'INIT_FROM is "{AUTO_START}", which leaves the start to the recipe of MINUTES, and '
            "MINUTES is None; set MINUTES, or name the weights"
        ]
    return [
        f"INIT_FROM ({shown(where)}) and {name} ({shown(values[name])}) both set the {what}; "
        f"set {name} to {shown(open_)}"
        for name, what, open_ in (("MODEL", "model", OPEN_MODEL), ("TOKENIZER", "tokenizer", None))
        if values[name] not in (open_, "auto")
    ]


def _find_name_fault(run_name: str) -> str | None:
    """The line that says why a folder can't have this name, or None."""
    if len(run_name) > 80 or run_name.startswith(".") or RESERVED.search(run_name):
        return (
            f"RUN_NAME is {shown(run_name)}; it must be a folder's plain name: up to 80 "
            'characters, none of / \\ < > : " | ? * and no dot in front'
        )
    if not is_portable_name(run_name):
        return (
            f"RUN_NAME is {shown(run_name)}; Windows can't have such a folder: it must not end "
            'with a dot or a blank, nor be the name of a device, such as "con" or "nul.1"'
        )
    if not _can_be_a_path(f"./{run_name}"):
        return f"RUN_NAME ({shown(run_name)}) can't be a folder's name here"
    return None


def _can_be_a_path(text: str) -> bool:
    """Whether the system accepts a text as a path, existing or not."""
    try:
        os.lstat(Path(text).expanduser() if text.startswith("~") else text)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return True
    except (RuntimeError, ValueError, OSError):  # unknown home; bad characters or too many
        return False
    return True


SETTING_NAMES = tuple(f.name for f in dataclasses.fields(RunSettings))
# the dicts of a settings file, and the names that belong into each
SECTIONS = {
    "custom_params": [*(f.name for f in dataclasses.fields(TrainingConfig)), *MODEL_SETTINGS],
    "sampling_params": [f.name for f in dataclasses.fields(SamplingConfig)],
}


def section_of(name: str) -> str | None:
    """The dict that a setting belongs into, also under another system's name; or None."""
    ours = ALIASES.get(name, name)
    return next((section for section, names in SECTIONS.items() if ours in names), None)


def _about_unknown(name: str, value: Any) -> str:
    """What is wrong with a name of a settings file that is no setting."""
    section = section_of(name)
    if section is None:
        return unknown_name(name, name, SETTING_NAMES)
    return (
        f'{name} belongs into {section}: {section} = {{"{name}": {shown(value)}, ...}} '
        f"(a name that only helps the file may be called _{name})"
    )


@dataclass(frozen=True)
class Length:
    """The limits of a run's length; the first that is reached ends it. None is no limit."""

    num_epochs: int | None
    max_steps: int | None
    at_most: int | None  # steps of the mode

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Asked:
    """The settings before anything is worked out; a run can be resumed if they are the same."""

    mode: str
    seed: int
    precision: str
    minutes: float | None
    init_from: str | None
    tokenizer: str | None  # None: the recipe's, or that of init_from
    # GPTConfig's arguments but vocab_size; with minutes or init_from, those that were set
    model: dict[str, Any]
    training: TrainingConfig
    left_open: list[Any]  # TrainingConfig's names that the recipe or fine-tuning may choose
    length: Length

    def __post_init__(self) -> None:
        check(self)

    def training_value(self, name: str) -> Any:
        """The value of a training setting; None for one that is left to the recipe."""
        return None if name in self.left_open else getattr(self.training, name)


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe, and what it was chosen from."""

    recipe: Recipe
    text: TextFacts
    machine: MachineFacts

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Start:
    """The weights that a run begins from, as settings.json keeps them."""

    source: str  # in words
    fingerprint: str  # tells these weights from others
    config: GPTConfig
    chat_template: str | None = None
    # of the validation text before the first step; None until it is measured
    bits_per_byte: float | None = setting(None, minimum=0)
    measured_share: float = setting(1.0, minimum=0, maximum=1)  # of the validation text

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Chat:
    """The conversations that a run learns, as settings.json keeps them."""

    template: str  # that they are written down by, in Jinja
    rows: int = setting(minimum=0)  # different conversations to train on; 0: only texts are

    def __post_init__(self) -> None:
        check(self)

    @property
    def is_small(self) -> bool:
        """Whether they are so few that the model is to learn them by heart."""
        return 0 < self.rows < SMALL_CHAT


@dataclass(frozen=True)
class RunPlan:
    """All settings of a run after every rule of precedence, and the reason of each result."""

    run: RunSettings
    mode: str  # "quick", "full", "auto" or "custom"
    model_name: str
    # GPTConfig's arguments but vocab_size; those that are set until begin_from() or the recipe
    # have added the others
    model: dict[str, Any]
    tokenizer: str | None  # None until then, "auto" until decide_tokenizer() has chosen
    training: TrainingConfig  # as asked; decide_training() adds what is chosen
    sampling: SamplingConfig
    origins: dict[str, Words]
    notices: list[str]
    fixed: Fixed | None = None  # with MINUTES or INIT_FROM: what the user has set
    choice: RecipeChoice | None = None
    start: Start | None = None  # the weights to begin from; None: random ones
    chat: Chat | None = None  # known once the text is read; None: a text without conversations

    @property
    def most_steps(self) -> int | None:
        """The most optimizer steps that the mode allows."""
        is_preset = self.mode == "quick" and self.run.INIT_FROM is None
        return QUICK_MODE_STEPS if is_preset else None

    @property
    def sample_length_is_open(self) -> bool:
        """Whether the tokens of a sample are worked out, as no number is set."""
        return _read_sampling(self.run.sampling_params)[0].get("max_new_tokens") is None

    @property
    def recipe(self) -> Recipe | None:
        """What is chosen for MINUTES."""
        return None if self.choice is None else self.choice.recipe

    @property
    def data(self) -> Any:
        """DATA as in settings.json: paths as text, tuples as lists."""
        return json.loads(json.dumps(self.run.DATA, default=os.fspath))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of config_run.py as in settings.json."""
        return dataclasses.asdict(self.run) | {"DATA": self.data}

    def as_words(self) -> dict[str, str]:
        """The settings that must be the same on all ranks, each as JSON."""
        settings = dataclasses.asdict(self.asked()) | {"DATA": self.data}
        settings |= {
            n: getattr(self.run, n)
            for n in ("DEVICE", "PARALLEL", "COMPILE", "NIGHT_MODE", "DRY_RUN")
        }
        return {name: json.dumps(value, sort_keys=True) for name, value in settings.items()}

    def count_steps(self, training: TrainingConfig, steps_per_epoch: int) -> int:
        """The optimizer steps of a run with these hyper-parameters."""
        total_steps = training.max_steps or training.num_epochs * steps_per_epoch
        return min(total_steps, self.most_steps or total_steps)

    def asked(self) -> Asked:
        """What decides whether an earlier run can be resumed."""
        training, fixed, left_open = self.training, self.fixed, []
        if fixed is not None:
            left_open = [name for name in RECIPE_CHOOSES if name not in fixed.training]
        if self.run.MINUTES is not None:
            left_open.append("time_budget_minutes")
        return Asked(
            mode=self.mode,
            seed=self.run.SEED,
            precision=self.run.PRECISION,
            minutes=self.run.MINUTES,
            init_from=self.run.INIT_FROM,
            tokenizer=_tokenizer_of(self.run) if fixed is None else fixed.tokenizer,
            model=self.model if fixed is None else fixed.model,
            training=training,
            left_open=left_open,
            length=Length(
                num_epochs=None if training.time_budget_minutes else training.num_epochs,
                max_steps=training.max_steps,
                at_most=self.most_steps,
            ),
        )


def resolve_settings(given: dict[str, Any], place: str, models_file: Path = MODELS_FILE) -> RunPlan:
    """Check the settings `given` in `place` and apply the rules of precedence.

    Raises one SettingsError with every problem, including those of config.json.
    """
    known = {name: value for name, value in given.items() if name in SETTING_NAMES}
    problems = [
        _about_unknown(name, value) for name, value in given.items() if name not in SETTING_NAMES
    ]
    run_problems = find_problems(RunSettings, known)
    # one that is no dict is among run_problems
    sections = [known.get(name) for name in ("custom_params", "sampling_params")]
    given_custom, given_sampling = (s if isinstance(s, dict) else {} for s in sections)
    custom, custom_problems, notices = read_custom_params(given_custom, "custom_params")
    sampling, sampling_problems = _read_sampling(given_sampling)
    models, model_problems = read_models(models_file)
    problems += run_problems + custom_problems + sampling_problems + model_problems
    overrides = with_defaults(custom)["model_overrides"]
    problems += find_problems(GPTConfig, overrides, 'model_overrides["{}"]'.format, joined=False)
    if run_problems + model_problems:
        raise_if_any(problems, place)
    run = RunSettings(**known)
    mode, why_mode = _choose_mode(run)
    model_name, why_model = _choose_model(run, mode)
    if model_name not in (OPEN_MODEL, *models):
        problems.append(_about_missing_model(model_name, why_model.en, models))
    problems += _about_two_lengths(run, mode, custom)
    if mode == "custom" and custom.get("lora_rank") is not None and not run.names_weights:
        problems.append(
            f'custom_params["lora_rank"] is {shown(custom["lora_rank"])}, and INIT_FROM is '
            f"{shown(run.INIT_FROM)}: an adapter needs weights that INIT_FROM names"
        )
    raise_if_any(problems, place)

    training = _choose_training(run, mode, custom)
    entry = models.get(model_name, {})  # none of the recipe's
    model, origins = _join_model(model_name, entry, training, mode)
    if not run.names_weights:  # begin_from() compares with theirs
        _require_sound(model, model_name, training, place)
    origins |= {"mode": why_mode, "model": why_model}
    if mode != "custom" and TrainingConfig(**with_defaults(custom)) != TrainingConfig():
        notices.append(f"custom_params is not read in {mode} mode; CUSTOM_MODE = True uses it")
    if run.MINUTES is not None and training.num_epochs != TrainingConfig().num_epochs:
        notices.append("num_epochs is not read: MINUTES set the length of the run")
    notices += _about_odd_numbers(model, training)
    plan = RunPlan(
        run=run,
        mode=mode,
        model_name=model_name,
        model=model,
        tokenizer=run.TOKENIZER,
        training=training,
        sampling=SamplingConfig(**sampling),
        origins=origins,
        notices=notices,
    )
    if run.MINUTES is not None or run.names_weights:
        return _leave_open(plan, custom if mode == "custom" else {})
    return dataclasses.replace(plan, tokenizer=_tokenizer_of(run))


def _tokenizer_of(run: RunSettings) -> str:
    """The TOKENIZER of a run that no recipe chooses it for."""
    return run.TOKENIZER or DEFAULT_TOKENIZER


def _choose_training(run: RunSettings, mode: str, custom: dict[str, Any]) -> TrainingConfig:
    """The hyper-parameters as asked; MINUTES is their time budget, INIT_FROM takes no preset."""
    budget = {} if run.MINUTES is None else {"time_budget_minutes": float(run.MINUTES)}
    if mode == "quick" and not run.names_weights:
        return TrainingConfig.get_quick_test_config()
    if mode == "full" and not run.names_weights:
        return TrainingConfig.get_full_training_config()
    return TrainingConfig(**(with_defaults(custom) if mode == "custom" else {}) | budget)


def _join_model(
    model_name: str, entry: dict[str, Any], training: TrainingConfig, mode: str
) -> tuple[dict[str, Any], dict[str, Words]]:
    """The model's fields that are set, and where its context and the training come from."""
    recipe = Words("the recipe", "配方")
    sources = {"custom": Words.of("custom_params"), "auto": recipe}
    source = sources.get(mode, Words(f"the {mode} preset", f"{mode} 预设"))
    model = entry | training.model_overrides
    origins = {"training": source, "max_length": source}
    if training.max_length is not None:
        model["context_length"] = training.max_length
    elif model_name == OPEN_MODEL:
        origins["max_length"] = recipe
    else:
        origins["max_length"] = Words(
            f'context_length of "{model_name}" in config.json',
            f'config.json 中 "{model_name}" 的 context_length',
        )
    return model, origins


def _require_sound(
    model: dict[str, Any], model_name: str, training: TrainingConfig, place: str
) -> None:
    """Raise SettingsError, naming place, unless the fields of a model fit together."""

    def label(name: str) -> str:  # where the value of a model field comes from
        if name == "context_length" and training.max_length is not None:
            return 'custom_params["max_length"]'
        if name in training.model_overrides:
            return f'model_overrides["{name}"]'
        return f'config.json["{model_name}"]["{name}"]'

    checked = RECIPE_BASE | model if model_name == OPEN_MODEL else model
    raise_if_any(find_problems(GPTConfig, checked, label), place)


def _leave_open(plan: RunPlan, custom: dict[str, Any]) -> RunPlan:
    """The plan of a run with MINUTES or INIT_FROM: what is set stays, the rest is chosen later."""
    model = plan.model
    if plan.model_name != OPEN_MODEL:  # then no field is open, also those of its architecture
        model = with_every_field(model)
    set_here = {n: v for n, v in custom.items() if v is not None}
    tokenizer = None if plan.tokenizer == "auto" else plan.tokenizer
    training = {n: set_here[n] for n in RECIPE_CHOOSES if n in set_here}
    return dataclasses.replace(
        plan, tokenizer=tokenizer, model=model, fixed=Fixed(tokenizer, model, training)
    )


def with_every_field(model: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments with all of GPTConfig's, but vocab_size."""
    complete = dataclasses.asdict(GPTConfig(**model, vocab_size=1))
    del complete["vocab_size"]
    return complete


def _about_two_lengths(run: RunSettings, mode: str, custom: dict[str, Any]) -> list[str]:
    """Problems of a run whose length is set by MINUTES and by custom_params too."""
    names = ("time_budget_minutes", "max_steps") if mode == "custom" else ("time_budget_minutes",)
    return [
        f'MINUTES ({shown(run.MINUTES)}) and custom_params["{name}"] ({shown(custom[name])}) both '
        "set the length of the run; set one of them"
        for name in names
        if run.MINUTES is not None and custom.get(name) is not None
    ]


def _about_odd_numbers(model: dict[str, Any], training: TrainingConfig) -> list[str]:
    """Notices on numbers that are allowed, but hardly ever meant, with what to set instead."""
    notices = []
    if model.get("drop_rate", 0) > 0.5:
        notices.append(f"drop_rate ({model['drop_rate']}) is above 0.5: the model learns slowly")
    width, depth = model.get("emb_dim"), model.get("n_layers")  # None: the recipe's
    if width and depth and width < LEAST_WIDTH_A_LAYER * depth:
        notices.append(
            f"{depth} layers of width {width} are deep and narrow, which learns slowly: set "
            f"n_layers to {max(1, width // 32)}, or a larger emb_dim (32 to 128 a layer are usual)"
        )
    if (training.learning_rate or 0) > HIGH_RATE:
        notices.append(
            f"learning_rate ({training.learning_rate:g}) is far above the usual 0.0001 to 0.01: "
            "training will probably diverge; None works one out"
        )
    return notices


def read_models(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The named models of a config.json, as GPTConfig's arguments; and every problem in it."""
    try:
        entries = read_json_object(path)
    except SettingsError as error:
        return {}, [str(error)]
    models: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name, entry in entries.items():
        place = f'{path.name}["{name}"]'
        if not isinstance(entry, dict):
            problems.append(f"{place} must be an object ({{...}}), not {type(entry).__name__}")
            continue
        known = [*MODEL_SETTINGS, "max_length"]
        values, labels, faults, _ = translate_names([(place, entry)], known)
        if "max_length" in values:  # its name outside of config.json
            values["context_length"] = values.pop("max_length")
            labels["context_length"] = labels.pop("max_length")
        faults += find_problems(GPTConfig, values, labels.__getitem__)
        required = ("context_length", "emb_dim", "n_heads", "n_layers")
        faults += [f'{place} lacks "{field}"' for field in required if field not in values]
        problems += [fault if place in fault else f"{place}: {fault}" for fault in faults]
        models[name] = values
    return models, problems


def _read_sampling(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    known, given_at = SECTIONS["sampling_params"], [("sampling_params", given)]
    values, labels, problems, _ = translate_names(given_at, known)
    return values, problems + find_problems(SamplingConfig, values, labels.__getitem__)


def _choose_mode(run: RunSettings) -> tuple[str, Words]:
    beaten = opened = Words("", "")
    if run.QUICK_MODE:
        beaten = Words(", which wins over QUICK_MODE", "，优先于 QUICK_MODE")
    if run.CUSTOM_MODE:
        if run.MINUTES is not None:
            opened = Words(
                f"; MINUTES ({run.MINUTES:g}) choose the rest",
                f"；其余由 MINUTES（{run.MINUTES:g}）选择",
            )
        return "custom", Words(
            f"CUSTOM_MODE is True{beaten.en}{opened.en}",
            f"CUSTOM_MODE 为 True{beaten.zh}{opened.zh}",
        )
    if run.MINUTES is not None:
        minutes = f"{run.MINUTES:g}"
        return "auto", Words(f"MINUTES is {minutes}{beaten.en}", f"MINUTES 为 {minutes}{beaten.zh}")
    if run.QUICK_MODE:
        return "quick", _is_true("QUICK_MODE")
    return "full", _are_false("QUICK_MODE", "CUSTOM_MODE")


def _is_true(name: str) -> Words:
    return Words(f"{name} is True", f"{name} 为 True")


def _are_false(first: str, second: str) -> Words:
    return Words(f"{first} and {second} are False", f"{first} 和 {second} 都为 False")


def _choose_model(run: RunSettings, mode: str) -> tuple[str, Words]:
    if run.MODEL != "auto":
        return run.MODEL, Words.of(f'MODEL = "{run.MODEL}"')
    if run.names_weights:
        return OPEN_MODEL, Words.of(f"INIT_FROM = {shown(run.INIT_FROM)}")
    if run.MINUTES is not None:
        why = Words("chosen for the text, this machine and MINUTES", "按文本、本机和 MINUTES 选择")
        return OPEN_MODEL, why
    if mode != "custom":
        why = Words(f"{mode} mode's own", f"{mode} 模式自带")
        return SMALL_MODEL if mode == "quick" else DEFAULT_MODEL, why
    if run.USE_SMALL:
        return SMALL_MODEL, _is_true("USE_SMALL")
    if run.USE_DEFAULT:
        return DEFAULT_MODEL, _is_true("USE_DEFAULT")
    return "", _are_false("USE_SMALL", "USE_DEFAULT")


def _about_missing_model(name: str, why: str, models: Iterable[str]) -> str:
    listed = ", ".join(models)
    if not name:
        return f"custom mode has no model: {why}; set one to True, or MODEL to one of: {listed}"
    lower = {model.lower(): model for model in models}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f'; did you mean "{lower[near[0]]}"?' if near else ""
    return f'there is no model "{name}" ({why}) in config.json, only: {listed}{hint}'
