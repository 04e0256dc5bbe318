"""Take a model elsewhere:  python -m scripts.export --run one --to hf my-model

The folder must not exist. It appears when what was written has been read back and compared with
the model: weights, logits, and the tokens of 200 texts; by transformers too, where it is installed.
"""

import argparse
import os
from pathlib import Path

import torch

from engine.console import tell
from engine.errors import SettingsError
from engine.memory import as_bytes
from exchange.huggingface import reader_notes, write_folder
from exchange.model_card import model_card
from exchange.saved_run import LoadedModel
from exchange.verification import verify
from scripts.options import (
    add_model_options,
    describe,
    new_parser,
    one_model,
    open_model,
    run_program,
    write,
)
from storage.checkpoint import weights_of
from storage.files import discard, make_folder, rename_folder

# what --to takes, and the formats of the weights; the first is the default
TARGETS = {"hf": ("fp32", "bf16", "fp16")}


def main() -> int:
    """Read the options, load the model, write it, compare, and name the folder; returns 0."""
    arguments = _parser().parse_args()
    folder = Path(os.path.abspath(os.path.expanduser(arguments.folder)))
    dtypes = TARGETS[arguments.to]
    dtype = arguments.dtype or dtypes[0]
    if dtype not in dtypes:
        listed = ", ".join(dtypes)
        raise SettingsError(f"--dtype is {dtype}; with --to {arguments.to} it is one of {listed}.")
    _require_new(folder)
    model = open_model(one_model(arguments), arguments, weights="fp32")
    tell(describe(model))
    make_folder(folder.parent)
    beside = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    try:
        write_as(arguments.to, beside, model, dtype)
        with torch.no_grad():
            for line in verify(model, beside, dtype):
                tell(line)
        size = sum(file.stat().st_size for file in beside.iterdir())
        if not rename_folder(beside, folder):
            _require_new(folder)
    finally:
        discard(beside)
    write(f"✓ {arguments.folder}: {as_bytes(size)}, {dtype}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="where to write; it must not exist")
    add_model_options(parser.add_argument_group("the model"))
    parser.set_defaults(device="cpu")
    group = parser.add_argument_group("what is written")
    group.add_argument(
        "--to",
        choices=TARGETS,
        required=True,
        help="hf: what transformers, vLLM and lm-eval read",
    )
    group.add_argument(
        "--dtype",
        choices=sorted({dtype for dtypes in TARGETS.values() for dtype in dtypes}),
        help="the format of the weights ("
        + "; ".join(f"{name}: {dtypes[0]}" for name, dtypes in TARGETS.items())
        + ")",
    )
    return parser


def _require_new(folder: Path) -> None:
    if os.path.lexists(folder):
        raise SettingsError(f"{folder} exists; name a folder that does not.")


def write_as(target: str, folder: Path, model: LoadedModel, dtype: str) -> None:
    """Write a model as a folder of one of TARGETS, with its notes on standard error."""
    config = model.model.config
    write_folder(
        folder,
        config,
        weights_of(model.model),
        model.tokenizer,
        card=model_card(model, dtype),
        dtype=dtype,
        chat_template=model.chat_template,
    )
    for note in reader_notes(config):
        tell(f"Note: {note}")


if __name__ == "__main__":
    run_program(main, "Close other programs, or take another machine.")
