"""Scripts that start processes where these run the script again, as on Windows and macOS."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import train
from engine.errors import SettingsError
from tests.conftest import REPOSITORY
from tests.letters import CPU, Letters, tiny_model
from tests.programs import OFFLINE, TINY

ASK = "require_main_guard(2)"
START = "multiprocessing.Process(target=abs, args=(1,)).start()"
BEGIN = """
import multiprocessing, sys
from engine.main_guard import require_main_guard

multiprocessing.set_start_method("{method}", force=True)
"""


def run_script(folder: Path, source: str, *options: str) -> tuple[int, str]:
    """Run a script as a user does; returns its exit code and standard error."""
    (folder / "my_script.py").write_text(textwrap.dedent(source), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *(options or ["my_script.py"])],
        cwd=folder,
        env=os.environ | OFFLINE | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}"},
        capture_output=True,
        encoding="utf-8",
    )
    return done.returncode, done.stderr


def error_of(said: str) -> list[str]:
    """The lines of the only error that was said."""
    assert said.count("Traceback") == 1, said
    return said.partition("SettingsError: ")[2].splitlines()


@pytest.mark.parametrize(
    ("method", "body", "unguarded"),
    [
        ("spawn", f"\n{ASK}\n", 7),
        ("spawn", f"def train():\n    {ASK}\nfor _ in range(1):\n    train()\n", 8),
        ("spawn", f"if __name__ == '__main__':\n    {ASK}\n", None),
        ("spawn", f"if multiprocessing.parent_process() is None:\n    {ASK}\n", 6),
        ("fork", f"{ASK}\n", None),
    ],
)
def test_a_script_that_its_processes_would_run_again_is_shown_the_guard(
    tmp_path, method, body, unguarded
):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    source = BEGIN.format(method=method) + body
    _, said = run_script(tmp_path, source.replace(ASK, START))
    assert ("before the\n        current process has finished its boot" in said) == bool(unguarded)
    code, said = run_script(tmp_path, source)
    assert code == bool(unguarded)
    if not unguarded:
        assert said == ""
        return
    assert error_of(said) == [
        "num_workers is 2, and each of these processes runs my_script.py again: "
        f"line {unguarded} needs a main guard.",
        "Move that line and those after it below the guard, or set num_workers to 0:",
        '    if __name__ == "__main__":',
        "        " + source.splitlines()[unguarded - 1],
    ]


def test_without_processes_nothing_is_asked(tmp_path):
    source = BEGIN.format(method="spawn") + "require_main_guard(0)\n"
    assert run_script(tmp_path, source) == (0, "")


@pytest.mark.parametrize("given", [["-m", "my_script"], ["-c", BEGIN.format(method="spawn") + ASK]])
def test_a_module_is_run_again_and_a_command_line_is_not(tmp_path, given):
    code, said = run_script(tmp_path, BEGIN.format(method="spawn") + ASK, *given)
    assert code == (given[0] == "-m")
    assert said == "" or error_of(said)[3].strip() == ASK


@pytest.mark.parametrize("context", [None, "spawn"])
def test_a_loader_of_ones_own_is_asked_about_with_the_way_it_starts_its_processes(
    monkeypatch, context
):
    asked = []

    def ask(*arguments):
        asked.append(arguments)
        raise SettingsError("no guard")

    monkeypatch.setattr(train, "require_main_guard", ask)
    model = tiny_model()
    loader = DataLoader(range(9), num_workers=2, multiprocessing_context=context)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(SettingsError, match="no guard"):
        train.train_model_simple(model, loader, loader, optimizer, CPU, 1, 1, 1, "abc", Letters())
    assert asked == [(2, context)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_way_that_is_given_counts_before_that_of_the_program(tmp_path, method):
    other = "spawn" if method == "fork" else "fork"
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    source = BEGIN.format(method=other) + f"require_main_guard(2, {method!r})\n"
    code, _ = run_script(tmp_path, source)
    assert code == (method == "spawn")


@pytest.mark.slow
def test_a_run_that_would_start_such_processes_ends_before_it_leaves_anything(tmp_path):
    (tmp_path / "text.txt").write_text("river bell " * 50, encoding="utf-8")
    source = f"""
    import multiprocessing
    from pathlib import Path
    import config_run, storage.cache
    from environment import prepare_environment

    multiprocessing.set_start_method("spawn", force=True)
    storage.cache.CACHE = Path("cache").resolve()
    config_run.DATA, config_run.TOKENIZER, config_run.CUSTOM_MODE = "text.txt", "char", True
    config_run.custom_params = {TINY | {"num_workers": 1}}
    env = prepare_environment()
    """
    code, said = run_script(tmp_path, source)
    assert code == 1
    assert error_of(said)[2:] == [
        '    if __name__ == "__main__":',
        "        env = prepare_environment()",
    ]
    assert not (tmp_path / "runs").exists()
