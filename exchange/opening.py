"""Open a model by where it is: a run, a folder or file of a known format, or its name."""

import os
from pathlib import Path

from engine.errors import SettingsError
from engine.settings import shown
from exchange.gguf import find_smollm2, open_gguf
from exchange.huggingface import download, open_folder
from exchange.pretrained import Pretrained
from exchange.saved_run import is_run, open_run
from planning.fine_tuning import SMOLLM2

HUB = "hf:"


def open_pretrained(where: str) -> Pretrained:
    """A run (its best weights), a folder of transformers' files, a .gguf file, "hf:owner/name" or
    "smollm2-135m".

    A relative path is taken from the working directory. Raises SettingsError for a name that can't
    be or a missing library, CheckpointError for damaged files and models of another kind.
    """
    if where.startswith(HUB):
        name = where.removeprefix(HUB)
        return open_folder(download(name), name)
    if where == SMOLLM2:
        return open_gguf(find_smollm2())
    path = Path(os.path.expanduser(where))
    if is_run(path):
        return open_run(path)
    if os.path.isdir(path):  # unlike Path's methods, it accepts any text
        return open_folder(path)
    if path.suffix == ".gguf" and os.path.exists(path):
        return open_gguf(path)
    raise SettingsError(
        f"{shown(where)} is no model: there is no such folder or .gguf file.\n"
        "It may be a run's folder, a folder of transformers' files (config.json, "
        f'model.safetensors, tokenizer.json), a .gguf file, "hf:owner/name" or "{SMOLLM2}".'
    )
