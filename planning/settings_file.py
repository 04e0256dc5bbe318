"""Reads a settings file: config_run.py, or another Python file with the same names."""

import difflib
import importlib
import re
import runpy
import sys
import traceback
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.console import in_kernel, say
from engine.errors import SettingsError
from engine.settings import ALIASES
from planning.plan import SETTING_NAMES, section_of

# other languages' words, and Python's
WORDS = {
    "true": "True",
    "TRUE": "True",
    "false": "False",
    "FALSE": "False",
    "null": "None",
    "NULL": "None",
    "none": "None",
    "undefined": "None",
}
# typographic signs, and what Python takes
CURLED = {
    "“": '"',
    "”": '"',
    "„": '"',
    "«": '"',
    "»": '"',
    "‘": "'",
    "’": "'",
    "，": ",",
    "、": ",",
    "。": ".",
    "【": "[",
    "】": "]",
    "—": "-",
    "–": "-",
    "−": "-",
}


def read_given_settings(path: str | Path | None) -> tuple[dict[str, Any], str]:
    """The settings in a file, config_run.py for None, and its name for messages; SettingsError if
    it is missing or does not run, with the line at fault."""
    place = "config_run.py" if path is None else str(path)
    if path is not None and not Path(path).is_file():
        raise SettingsError(
            f"there is no settings file {place} (looked for in {Path.cwd()}).\n"
            "Name a Python file of config_run.py's shape, or none for config_run.py itself."
        )
    try:
        given = _config_run() if path is None else _settings_among(runpy.run_path(str(path)))
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise SettingsError(_about_settings_file(place, error)) from error
    if not given:
        raise SettingsError(f"{place} sets nothing; it may set: {', '.join(SETTING_NAMES)}")
    return given, place


def _config_run() -> dict[str, Any]:
    """The settings in config_run's file as it is now, and those that a program has set on it."""
    was_imported = "config_run" in sys.modules
    module = importlib.import_module("config_run")
    file = Path(getattr(module, "__file__", None) or "config_run.py")
    if not file.is_file():
        say("Note: config_run.py is gone: its settings count as they were read before")
        return _settings_among(vars(module))
    source, earlier = file.read_bytes(), getattr(module, "_as_read", None)
    if earlier is None and not was_imported:
        earlier = vars(module)["_as_read"] = source, _shown_settings(vars(module))
    if earlier is None or earlier[0] != source:
        now = _settings_among(runpy.run_path(str(file)))
        # after an import by others, what differs from the file counts as set by a program
        before = _shown_settings(now) if earlier is None else earlier[1]
        _take_over(module, before, now, tell=earlier is not None or in_kernel())
        vars(module)["_as_read"] = source, _shown_settings(now)
    return _settings_among(vars(module))


def _take_over(
    module: ModuleType, before: dict[str, str], now: dict[str, Any], *, tell: bool
) -> None:
    """Set a module's settings to a file's, but keep those that differ from what it had before."""
    held, in_file = _shown_settings(vars(module)), _shown_settings(now)
    names = sorted(before.keys() | now.keys() | held.keys())
    by_hand = [name for name in names if held.get(name) != before.get(name)]
    for name in set(names).difference(by_hand):
        if name in now:
            setattr(module, name, now[name])
        else:
            delattr(module, name)
    differing = [name for name in by_hand if held.get(name) != in_file.get(name)]
    if differing and tell:
        say(f"Note: as this program has set them, not as config_run.py: {', '.join(differing)}")


def _shown_settings(names: dict[str, Any]) -> dict[str, str]:
    """Settings as text, which shows changes inside a value."""
    return {name: repr(value) for name, value in _settings_among(names).items()}


def _settings_among(names: dict[str, Any]) -> dict[str, Any]:
    """The names that are settings, or misspelt ones; others are helpers of the file."""
    return {
        name: value
        for name, value in names.items()
        if name in SETTING_NAMES
        or (name.isupper() and not name.startswith("_") and not isinstance(value, ModuleType))
        or _resembles_setting(name)
        or _is_misplaced(name, value, names)
    }


def _is_misplaced(name: str, value: Any, names: dict[str, Any]) -> bool:
    """Whether a name belongs into a dict of the file, and does not just hold what is in it."""
    section = section_of(name)
    if section is None or callable(value) or isinstance(value, ModuleType):
        return False
    given = names.get(section)
    overrides = given.get("model_overrides") if isinstance(given, dict) else None
    held = [
        repr(item)
        for dict_ in (given, overrides)
        if isinstance(dict_, dict)
        for key, item in dict_.items()
        if ALIASES.get(key, key) == ALIASES.get(name, name)
    ]
    return repr(value) not in held


def _about_settings_file(place: str, error: BaseException) -> str:
    """What is wrong with a settings file that does not run, and in which line."""
    if isinstance(error, SyntaxError):
        where = f"{error.filename or place} line {error.lineno}"
        if "codec can't decode" in error.msg and "unicodeescape" not in error.msg:
            return (
                f"{where} is not UTF-8.\nSave {place} as UTF-8 (in Notepad: Save as, Encoding), or "
                "name its encoding in its first line, such as  # coding: gb18030"
            )
        line = f"\n    {error.text.strip()}" if error.text else ""
        return f"{where} is not Python: {error.msg}{line}{_remedy(error.msg)}"
    reason, advice = f"{type(error).__name__}: {error}", ""
    if isinstance(error, NameError) and error.name in WORDS:
        advice = f"\nWrite {WORDS[error.name]} in place of {error.name}."
    if isinstance(error, ModuleNotFoundError) and error.name == "config_run":
        return "config_run.py is missing; restore it from the repository"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).name == Path(place).name]
    if not inside:
        return f"{place} can't be read: {reason}"
    return f"{place} line {inside[-1].lineno} fails: {reason}\n    {inside[-1].line}{advice}"


def _remedy(fault: str) -> str:
    """A line that says what to write instead, for the faults of beginners; or nothing."""
    if "unicodeescape" in fault:  # "C:\\Users" begins a Unicode escape
        return '\nWrite a path as "C:/Users" or r"C:\\Users".'
    found = re.search(r"invalid (?:non-printable )?character '?(.?)'? ?\(?U\+([0-9A-F]+)", fault)
    if not found:
        return ""
    sign = chr(int(found[2], 16))
    plain = unicodedata.normalize("NFKC", CURLED.get(sign, sign))
    if plain != sign and plain.isascii() and plain.strip():
        return f"\nWrite {plain} in place of {sign} (Python takes the plain signs only)."
    return f"\nRemove the sign U+{found[2]}, or put the text around it in plain quotes."


def _resembles_setting(name: str) -> bool:
    known = [name.lower() for name in SETTING_NAMES]
    return name[0] != "_" and bool(difflib.get_close_matches(name.lower(), known, cutoff=0.85))
