"""Checks of settings: names, spellings, types and ranges, with all problems in one error.

A settings dataclass declares each field with `setting(...)` and calls `check(self)` in its
`__post_init__`. A method `conflicts(values) -> list[str]` checks fields against each other.
"""

import dataclasses
import difflib
import itertools
import json
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import SettingsError

T = TypeVar("T")

# other systems' names for our settings
ALIASES = {
    "epochs": "num_epochs",
    "max_iters": "max_steps",
    "eval_interval": "eval_freq",
    "eval_iters": "eval_iter",
    "d_model": "emb_dim",
    "n_embd": "emb_dim",
    "n_embed": "emb_dim",
    "num_heads": "n_heads",
    "n_head": "n_heads",
    "nhead": "n_heads",
    "num_layers": "n_layers",
    "n_layer": "n_layers",
    "block_size": "max_length",
    "max_seq_len": "max_length",
    "context_length": "max_length",
    "dropout": "drop_rate",
    "dim_feedforward": "ff_dim",
    "lr": "learning_rate",
    "grad_clip": "max_grad_norm",
    "accumulation_steps": "gradient_accumulation_steps",
    "warmup_iters": "warmup_steps",
    "tain_data_ratio": "train_ratio",
}

# settings of other systems, and how to set them here
ELSEWHERE = {
    "use_amp": 'set PRECISION = "auto", "bf16", "fp16" or "fp32" in config_run.py',
    "resume_from": "set RESUME in config_run.py to the run's folder",
    "auto_resume": 'set RESUME = "auto" in config_run.py, or False',
    "checkpoint_every": 'set custom_params["save_every"], in optimizer steps',
    "save_on_interrupt": "it is always on",
    "train_file": "set DATA in config_run.py to the text's path",
    "test_file": 'set DATA = {"path": ..., "val": ...} in config_run.py',
    "tokenizer_path": "set TOKENIZER in config_run.py",
    "model_save_dir": "set OUTPUT_DIR in config_run.py",
    "minutes": "set MINUTES in config_run.py, or time_budget_minutes here",
    "vocab_size": "it comes from the tokenizer and can't be set",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which values of its type a field accepts."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    most_items: int | None = None  # of a list, which must not be empty


def setting(
    default: Any = dataclasses.MISSING, *, on_resume: str | None = None, **rule: Any
) -> Any:
    """A dataclass field with a Rule; a mutable default is copied for each object.

    on_resume says what happens to another value in a resumed run: "fixed" refuses it, "free"
    accepts it, and "numeric" accepts it though it changes the last digits of the results. None: the
    field is compared elsewhere, or is not part of the run.
    """
    metadata = {"rule": Rule(**rule), "on_resume": on_resume}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def names_on_resume(cls: type, *kinds: str) -> tuple[str, ...]:
    """The names of the fields whose on_resume is one of these kinds."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.metadata.get("on_resume") in kinds)


def check(instance: Any) -> None:
    """Raise SettingsError with every problem of a settings object, one per line.

    Converts numbers of other libraries, such as NumPy's, to Python's, also those in lists and
    dicts, which it copies, so that nobody changes them after the check.
    """
    values = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}
    raise_if_any(find_problems(type(instance), values), type(instance).__name__)
    for name, value in values.items():
        object.__setattr__(instance, name, _owned(value))  # it is frozen


def _owned(value: Any) -> Any:
    """A value with Python's own numbers, and lists and dicts that nobody else has."""
    if isinstance(value, dict):
        return {name: _owned(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_owned(item) for item in value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def find_problems(
    cls: type, values: Mapping[str, Any], label: Callable[[str], str] = str, *, joined: bool = True
) -> list[str]:
    """Every type, range and cross-field problem of values, as lines that start with label(name).

    values may omit fields. If the fields have no problem of their own, and `joined`, cls.conflicts
    checks them against each other, with defaults for omitted ones.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    problems = []
    sound = {name: _default(field) for name, field in fields.items()}
    for name, value in values.items():
        fault = _fault(value, hints[name], fields[name].metadata.get("rule", Rule()))
        if fault:
            problems.append(f"{label(name)} {fault}")
        else:
            sound[name] = value
    if joined and not problems and hasattr(cls, "conflicts"):
        problems += cls.conflicts(sound)
    return problems


def from_json(cls: type[T], value: Any, place: str) -> T:
    """Rebuild a settings object, also a nested one, from the JSON of its dataclasses.asdict().

    Raises SettingsError, naming place, for missing, unknown and wrong fields.
    """
    if not isinstance(value, dict):
        raise_if_any([f"it is {shown(value)}; it must be {_KINDS[dict]}"], place)
    hints = typing.get_type_hints(cls)
    problems = [f'it lacks "{name}"' for name in hints if name not in value]
    unknown = (name for name in value if name not in hints)  # a damaged file may have millions
    problems += [f"{shown(name)} is unknown" for name in itertools.islice(unknown, 3)]
    raise_if_any(problems, place)
    nested = {
        name: from_json(kind, value[name], f'{place}["{name}"]')
        for name, hint in hints.items()
        for kind in typing.get_args(hint) or [hint]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        if value[name] is not None or kind is hint  # None where the hint allows it
    }
    return cls(**(value | nested))


def translate_names(
    given: Iterable[tuple[str, Mapping[str, Any]]], known: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str], list[str], list[str]]:
    """Translate dicts of settings, each with the name of its place, to this project's names.

    Returns the values by name, the label of each, the problems (unknown names, two values for one
    setting) and the notices (translated names).
    """
    known = list(known)
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    problems: list[str] = []
    notices: list[str] = []
    for place, settings in given:
        for spelling, value in settings.items():
            label = f'{place}["{spelling}"]' if place else str(spelling)
            name = ALIASES.get(spelling, spelling)
            if name in ELSEWHERE:
                problems.append(f"{label} is not set here: {ELSEWHERE[name]}")
            elif name not in known:
                problems.append(unknown_name(label, spelling, known))
            elif name in values and not _same(values[name], value):
                problems.append(
                    f"{labels[name]} = {shown(values[name])} and {label} = {shown(value)} set the "
                    "same thing to two values; keep one of them"
                )
            else:
                if name != spelling:
                    notices.append(f"{label} is read as {name}")
                values[name], labels[name] = value, label
    return values, labels, problems, notices


def unknown_name(label: str, name: Any, known: Iterable[str]) -> str:
    """The message for an unknown name, with the most similar known one."""
    known = sorted(known)
    aliases = [spelling for spelling in ALIASES if ALIASES[spelling] in known]
    names = {spelling.lower(): spelling for spelling in [*aliases, *known]}
    near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.6)
    if near:
        meant = names[near[0]]
        return f'{label} is unknown; did you mean "{ALIASES.get(meant, meant)}"?'
    return f"{label} is unknown; known are: {', '.join(known)}"


def raise_if_any(problems: list[str], where: str) -> None:
    """Raise one SettingsError for all problems: a header with the place, then one line each."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [problem.replace("\n", "\\n") for problem in problems]  # a name may contain one
        raise SettingsError("\n  ".join([f"{count} in {where}:", *lines]))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that a user edits; its top level must be an object.

    Accepts a byte-order mark. Raises SettingsError for an unreadable file, text that is not UTF-8,
    invalid JSON (with line and column) and duplicate keys.
    """
    try:
        text = path.read_text(encoding="utf-8").removeprefix("\ufeff")
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise SettingsError(f"{path} is missing; restore it from the repository") from None
    except OSError as error:
        raise SettingsError(f"can't read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise SettingsError(
            f"{path} is not valid JSON: line {error.lineno} column {error.colno}: {error.msg}"
        ) from None
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        raise SettingsError(
            f"{path} can't be read: nested too deeply, or a number is too long"
        ) from None
    except KeyError as error:
        raise SettingsError(f'{path} names "{error.args[0]}" twice; keep one of them') from None
    if not isinstance(value, dict):
        raise SettingsError(f"{path} must hold an object ({{...}}), not {type(value).__name__}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise KeyError(key)
        result[key] = value
    return result


def _fault(value: Any, hint: Any, rule: Rule) -> str | None:
    """What is wrong with a value, as the end of a sentence; None if it is valid."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    if not any(_is_a(value, kind) for kind in allowed):
        return f"is {shown(value)} ({type(value).__name__}); it must be {_describe(allowed, rule)}"
    is_number = isinstance(value, numbers.Number) and not isinstance(value, bool)
    if is_number and not (
        _is_finite(value) and all(holds(value, limit) for _, holds, limit in _limits(rule))
    ):
        return f"is {shown(value)}; it must be {_describe(allowed, rule)}"
    if rule.choices is not None and value not in rule.choices:
        near = difflib.get_close_matches(str(value).lower(), map(str, rule.choices), n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        return f"is {shown(value)}; it must be {_describe(allowed, rule)}{hint}"
    if isinstance(value, str) and not value.strip():
        return "is empty; it must be some text"
    if list[str] in allowed and isinstance(value, list):
        return _fault_in_texts(value, allowed, rule)
    return None


def _fault_in_texts(texts: list[Any], allowed: tuple[Any, ...], rule: Rule) -> str | None:
    """What is wrong with a list of texts, or with its first bad item."""
    if not texts or (rule.most_items is not None and len(texts) > rule.most_items):
        count = "empty" if not texts else f"a list of {len(texts):,}"
        return f"is {count}; it must be {_describe(allowed, rule)}"
    for place, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            kind = type(text).__name__
            return f"has {shown(text)} ({kind}) in place {place}; each must be {_KINDS[str]}"
        if not text.strip():
            return f"has an empty text in place {place}; each must be some text"
    return None


def shown(value: Any) -> str:
    """A value as an error message shows it, on one line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a very long number"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _is_a(value: Any, kind: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    numeric = {int: numbers.Integral, float: numbers.Real}
    return isinstance(value, numeric.get(kind) or typing.get_origin(kind) or kind)


def _limits(rule: Rule) -> list[tuple[str, Callable[[Any, Any], bool], float]]:
    """The limits of a rule: how a message says it, and what holds for the value and the limit."""
    limits = (
        ("at least", operator.ge, rule.minimum),
        ("above", operator.gt, rule.above),
        ("at most", operator.le, rule.maximum),
        ("below", operator.lt, rule.below),
    )
    return [(words, holds, limit) for words, holds, limit in limits if limit is not None]


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text in quotes",
    dict: "a dict {...}",
    list: "a list [...]",
    list[str]: "a list of texts [...]",
    type(None): "None",
}


def _describe(allowed: tuple[Any, ...], rule: Rule) -> str:
    if rule.choices is not None:
        words = [f'"{choice}"' for choice in rule.choices]
    else:
        limits = [f"{said} {_plain(limit)}" for said, _, limit in _limits(rule)]
        kinds = [kind for kind in allowed if kind is not type(None)]
        kind = " or ".join(_KINDS.get(kind) or _KINDS[typing.get_origin(kind)] for kind in kinds)
        if rule.most_items is not None:
            kind += f", 1 to {rule.most_items} of them"
        words = [f"{kind} {' and '.join(limits)}".strip()]
    if type(None) in allowed:
        words.append("None")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _plain(limit: float) -> str:
    return f"{limit:,}".replace(",", " ") if isinstance(limit, int) and limit > 9999 else f"{limit}"


def _same(one: Any, other: Any) -> bool:
    try:
        return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
    except ValueError:  # arrays
        return False
