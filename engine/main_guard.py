"""The guard that a script needs before it starts processes, where those run the script again."""

import ast
import multiprocessing
import sys
from pathlib import Path
from types import FrameType

from engine.errors import SettingsError


def require_main_guard(num_workers: int, method: str | None = None) -> None:
    """Raise SettingsError if a script without a main guard would start num_workers processes.

    Processes that the system spawns, as on Windows and macOS, begin by importing the script, and
    without the guard they would train too. Nothing is asked where they are forked, or of a
    notebook, which is no file. method is how they are started; None: as multiprocessing is set.
    """
    method = method or multiprocessing.get_start_method(allow_none=True)
    method = method or multiprocessing.get_all_start_methods()[0]  # the system's own
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", "")
    file = getattr(main, "__file__", None)
    # a package's __main__ is never imported again
    if num_workers == 0 or method == "fork" or file is None or name.endswith("__main__"):
        return
    line = _line_of(vars(main))
    if line is None:
        return
    try:
        source = Path(file).read_text("utf-8")
        unguarded = _unguarded(ast.parse(source), line)
    except (OSError, ValueError, SyntaxError):  # no Python source, such as a frozen program
        return
    if unguarded is not None:
        first = source.splitlines()[unguarded - 1]
        raise SettingsError(
            f"num_workers is {num_workers}, and each of these processes runs {Path(file).name} "
            f"again: line {unguarded} needs a main guard.\n"
            "Move that line and those after it below the guard, or set num_workers to 0:\n"
            f'    if __name__ == "__main__":\n        {first}'
        )


def _line_of(names: dict[str, object]) -> int | None:
    """The line of the main module that is being run in this thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals is names and frame.f_code.co_name == "<module>":
            return frame.f_lineno
        frame = frame.f_back
    return None


def _unguarded(module: ast.Module, line: int) -> int | None:
    """The first line of the statement at a line, if no `if` around it asks for __name__."""
    for statement in module.body:
        if statement.lineno <= line <= (statement.end_lineno or line):
            asked = [
                ast.unparse(part.test)
                for part in ast.walk(statement)
                if isinstance(part, ast.If) and part.lineno <= line <= (part.end_lineno or line)
            ]
            guarded = any("__name__" in test for test in asked)
            return None if guarded else statement.lineno
    return None
