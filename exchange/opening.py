"""Open a model by where it is: a run, a folder or file of a known format, or its name."""

import os
from dataclasses import replace
from pathlib import Path

from engine.errors import SettingsError
from engine.settings import shown
from exchange.gguf import find_smollm2, open_gguf
from exchange.huggingface import CONFIG, HUB_NAME, download, open_folder
from exchange.pretrained import Pretrained
from exchange.saved_run import (
    LoadedModel,
    inference_device,
    is_run,
    load_run,
    make_ready,
    open_run,
    refuse_part_of_run,
    runs_folder,
)
from generation import SamplingConfig
from planning.fine_tuning import SMOLLM2
from text.tokenizer import ForeignTokenizer, Tokenizer

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
    if where and is_run(path):
        return open_run(path)
    if where and os.path.isdir(path):  # unlike Path's methods, it accepts any text
        if not os.path.exists(path / CONFIG):
            refuse_part_of_run(path, "Its best weights are taken.")
        return open_folder(path)
    if path.suffix == ".gguf" and os.path.exists(path):
        return open_gguf(path)
    raise SettingsError(
        f"{shown(where)} is no model: there is no such folder or .gguf file.{_hint(where)}\n"
        "It may be a run's folder, a folder of transformers' files (config.json, "
        f'model.safetensors, tokenizer.json), a .gguf file, "hf:owner/name" or "{SMOLLM2}".'
    )


def _hint(where: str) -> str:
    """What to write for a name that is known elsewhere, as a line; "" if it is not."""
    run = runs_folder() / where
    if where and is_run(run):
        return f'\nFor the run of this name, write "{run}".'
    if where.lower().startswith(SMOLLM2.partition("-")[0]):
        return f'\nFor the model that a package holds, write "{SMOLLM2}".'
    if HUB_NAME.fullmatch(where):
        return f'\nFor a model of the Hugging Face Hub, write "{HUB}{where}".'
    return ""


def frame_of(tokenizer: Tokenizer) -> str:
    """The special tokens that a tokenizer puts around a text elsewhere, in words; "" for none."""
    return " and ".join(tokenizer.frame()) if isinstance(tokenizer, ForeignTokenizer) else ""


def load_model(
    where: str, *, weights: str = "auto", device: str | None = None, compiled: bool = False
) -> LoadedModel:
    """Load a model for inference: whatever open_pretrained() opens; options as in load_run().

    Raises what open_pretrained() and load_run() raise.
    """
    path = Path(os.path.expanduser(where))
    if is_run(path):  # which knows its sampling and its step
        return load_run(path, weights=weights, device=device, compiled=compiled)
    chosen = inference_device(device, weights)
    found = open_pretrained(where)
    # rows for the tokenizer's tokens: a padded vocabulary has more, an end of its own needs one
    config = replace(found.config, vocab_size=found.tokenizer.vocab_size)
    return make_ready(
        config,
        found.fitted(config),
        chosen,
        weights,
        compiled=compiled,
        name=where.removeprefix(HUB) if where.startswith(HUB) else path.resolve().name,
        version=found.fingerprint[:12],
        source=found.source,
        tokenizer=found.tokenizer,
        sampling=SamplingConfig(),
        chat_template=found.chat_template,
    )
