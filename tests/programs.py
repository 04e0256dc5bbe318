"""The settings of a tiny run of main.py, and what a folder has in it."""

from pathlib import Path

# a proxy on a closed port is the quickest way to be without a network
OFFLINE = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
TINY = {"num_epochs": 1, "batch_size": 2, "max_length": 16, "eval_freq": 5, "eval_iter": 1}
TINY |= {"model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1}}


def write_settings(folder: Path, text: str = "river bell " * 50, **settings) -> str:
    """A tiny custom run on a text, and settings of the caller's own."""
    (folder / "text.txt").write_text(text, encoding="utf-8")
    values = {"DATA": "text.txt", "TOKENIZER": "char", "PRECISION": "fp32", "CUSTOM_MODE": True}
    values |= {"custom_params": TINY} | settings
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
