"""The settings file: config_run.py as it is now, or another of its shape, as names and values."""

import dataclasses
import difflib
import importlib
import runpy
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.console import in_kernel, say
from engine.errors import SettingsError
from planning.plan import RunSettings


def read_given_settings(path: str | Path | None) -> tuple[dict[str, Any], str]:
    """The names that a settings file sets, and what messages call it; None reads config_run.

    Raises SettingsError where there is no such file or it does not run, with the line at fault.
    """
    place = "config_run.py" if path is None else str(path)
    if path is not None and not Path(path).is_file():
        raise SettingsError(
            f"there is no settings file {place} (looked for in {Path.cwd()}).\n"
            "Name a Python file of config_run.py's shape, or none for config_run.py itself."
        )
    try:
        given = _config_run() if path is None else _settings_among(runpy.run_path(str(path)))
    except (Exception, SystemExit) as error:  # whatever a line of the user's own may raise
        raise SettingsError(_about_settings_file(place, error)) from error
    if not given:
        known = [f.name for f in dataclasses.fields(RunSettings)]
        raise SettingsError(f"{place} sets nothing; it may set: {', '.join(known)}")
    return given, place


def _config_run() -> dict[str, Any]:
    """The settings of config_run: its file as it is now, but what a program has set on it stays.

    Python imports a module once, and a notebook's kernel lives while its user edits the file.
    """
    was_imported = "config_run" in sys.modules
    module = importlib.import_module("config_run")
    file = Path(getattr(module, "__file__", None) or "config_run.py")
    if not file.is_file():
        say("Note: config_run.py is gone: its settings count as they were read before")
        return _settings_among(vars(module))
    source, earlier = file.read_bytes(), getattr(module, "_as_read", None)
    if earlier is None and not was_imported:
        earlier = module._as_read = source, _shown_settings(vars(module))
    if earlier is None or earlier[0] != source:
        now = _settings_among(runpy.run_path(str(file)))
        # of an import that nobody has seen, what differs from the file counts as a program's
        before = _shown_settings(now) if earlier is None else earlier[1]
        _take_over(module, before, now, tell=earlier is not None or in_kernel())
        module._as_read = source, _shown_settings(now)
    return _settings_among(vars(module))


def _take_over(
    module: ModuleType, before: dict[str, str], now: dict[str, Any], *, tell: bool
) -> None:
    """Give a module a file's settings, but not where its value isn't what the file had before."""
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
    """Settings as text: what is changed inside of a value shows, too."""
    return {name: repr(value) for name, value in _settings_among(names).items()}


def _settings_among(names: dict[str, Any]) -> dict[str, Any]:
    """What of a file's names are settings, or are meant to be.

    It may have helpers of its own: lower-case names, functions, modules.
    """
    known = [f.name for f in dataclasses.fields(RunSettings)]
    return {
        name: value
        for name, value in names.items()
        if name in known
        or (name.isupper() and not name.startswith("_") and not isinstance(value, ModuleType))
        or _resembles(name, known)
    }


def _about_settings_file(place: str, error: BaseException) -> str:
    """What is wrong with a settings file that does not run, and in which line."""
    if isinstance(error, SyntaxError):
        where = f"{error.filename or place} line {error.lineno}"
        line = f"\n    {error.text.strip()}" if error.text else ""
        advice = ""
        if "unicodeescape" in error.msg:  # "C:\Users": the first letters of a sign's number
            advice = '\nWrite a path as "C:/Users" or r"C:\\Users".'
        return f"{where} is not Python: {error.msg}{line}{advice}"
    if isinstance(error, ModuleNotFoundError) and error.name == "config_run":
        return "config_run.py is missing; restore it from the repository"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).name == Path(place).name]
    reason = f"{type(error).__name__}: {error}"
    if not inside:
        return f"{place} can't be read: {reason}"
    return f"{place} line {inside[-1].lineno} fails: {reason}\n    {inside[-1].line}"


def _resembles(name: str, known: Iterable[str]) -> bool:
    """Whether a lower-case name is likely to mean one of the settings."""
    return not name.startswith("_") and bool(
        difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.85)
    )
