"""main.py as a process of its own, and the settings of a tiny run."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

# a proxy on a closed port is the quickest way to be without a network
OFFLINE = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
TINY = {
    "num_epochs": 1,
    "batch_size": 2,
    "max_length": 16,
    "eval_freq": 5,
    "eval_iter": 1,
    "model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1},
}


def run_main(folder, *arguments, code=None, **environment) -> subprocess.CompletedProcess:
    """Run main.py in a process of its own, without a network; or other code that calls it."""
    program = [str(REPOSITORY / "main.py")] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env=os.environ | OFFLINE | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
    )


def write_settings(folder: Path, text: str, tokens: int = 300, **settings) -> str:
    """A tiny custom run on a text of so many words, and settings of the caller's own."""
    (folder / "text.txt").write_text(text or "river bell " * (tokens // 2), encoding="utf-8")
    values = {"DATA": "text.txt", "CUSTOM_MODE": True, "custom_params": TINY} | settings
    lines = [f"{name} = {value!r}\n" for name, value in values.items()]
    (folder / "settings.py").write_text("".join(lines), encoding="utf-8")
    return "settings.py"


def everything_in(folder: Path | str) -> dict[str, tuple[int, bytes | None]]:
    """Each file and folder below one but the cache and settings.py: time of change and content."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in Path(folder).rglob("*")
        if path.name != "settings.py" and "cache" not in path.relative_to(folder).parts
    }
