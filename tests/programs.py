"""The settings of a tiny run of main.py, and what a folder has in it."""

from pathlib import Path

# a proxy on a closed port is the quickest way to be without a network
OFFLINE = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
TINY = {"num_epochs": 1, "batch_size": 2, "max_length": 16, "eval_freq": 5, "eval_iter": 1}
TINY |= {"model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1}}


def write_settings(folder: Path, text: str | None = "river bell " * 50, **settings) -> None:
    """Write a tiny custom run on a text; names in lower case go into custom_params."""
    if text is not None:
        (folder / "text.txt").write_text(text, encoding="utf-8")
    params = {name: value for name, value in settings.items() if name.islower()}
    values = {"DATA": "text.txt", "TOKENIZER": "char", "PRECISION": "fp32", "CUSTOM_MODE": True}
    values |= {name: value for name, value in settings.items() if name not in params}
    values["sampling_params"] = params.pop("sampling_params", {})
    values["custom_params"] = TINY | params
    lines = [f"{name} = {value!r}\n" for name, value in values.items()]
    (folder / "settings.py").write_text("".join(lines), encoding="utf-8")


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
