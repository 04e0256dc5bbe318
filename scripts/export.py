"""Take a model elsewhere:  python -m scripts.export --run one --to hf my-model

The folder must not exist. It appears when what was written has been read back and compared with
the model: weights, logits, and the tokens of 200 texts; by transformers too, where it is installed.
"""

import argparse
import os
from pathlib import Path

from engine.starting import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

import torch

from engine.console import tell
from engine.errors import SettingsError
from engine.memory import as_bytes
from exchange.adapter import write_adapter
from exchange.gguf import modelfile, write_gguf
from exchange.huggingface import reader_notes, write_folder
from exchange.model_card import model_card
from exchange.opening import frame_of
from exchange.saved_run import LoadedModel
from exchange.verification import verify, verify_adapter
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
from storage.files import discard, make_folder, rename_folder, write_atomically

# what --to takes, and the formats of the weights; the first is the default
GGUF_DTYPES = ("fp16", "q8_0", "bf16", "fp32")
TARGETS = {
    "hf": ("fp32", "bf16", "fp16"),
    "gguf": GGUF_DTYPES,
    "ollama": GGUF_DTYPES,
    "peft": ("fp32",),
}


def main() -> int:
    """Read the options, load the model, write it, compare, and name the folder; returns 0."""
    arguments = _parser().parse_args()
    folder = Path(os.path.abspath(os.path.expanduser(arguments.folder)))
    dtypes = TARGETS[arguments.to]
    dtype = arguments.dtype or dtypes[0]
    if dtype not in dtypes:
        listed = ", ".join(dtypes)
        raise SettingsError(f"--dtype is {dtype}; with --to {arguments.to} it is one of {listed}.")
    if os.path.lexists(folder):
        raise _taken(folder)
    if arguments.to in ("gguf", "ollama") and folder.suffix == ".gguf":
        named = os.path.splitext(arguments.folder)[0]
        raise SettingsError(
            f"{arguments.folder} is to be a folder, with the file in it: name it {named}, and the "
            f"file is {os.path.join(named, folder.name)}."
        )
    model = open_model(one_model(arguments), arguments, weights="fp32")
    tell(describe(model))
    make_folder(folder.parent)
    beside = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    try:
        if arguments.to == "peft":
            write_adapter_of(model, beside, arguments.which or "best")
            checks = verify_adapter(model, beside, arguments.which or "best")
        else:
            written = write_as(arguments.to, beside, folder.name, model, dtype)
            checks = verify(model, written, dtype)
        with torch.no_grad():
            for line in checks:
                tell(line)
        size = sum(file.stat().st_size for file in beside.iterdir())
        if not rename_folder(beside, folder):
            raise _taken(folder)
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
        help="hf: a folder that transformers, vLLM and lm-eval read; gguf: a file for llama.cpp; "
        "ollama: that file, and a Modelfile; peft: what a run with lora_rank has trained",
    )
    group.add_argument(
        "--dtype",
        choices=sorted({dtype for dtypes in TARGETS.values() for dtype in dtypes}),
        help="the format of the weights ("
        + "; ".join(f"{name}: {dtypes[0]}" for name, dtypes in TARGETS.items())
        + ")",
    )
    return parser


def _taken(folder: Path) -> SettingsError:
    return SettingsError(f"{folder} exists; name a folder that does not.")


def write_adapter_of(model: LoadedModel, folder: Path, which: str) -> None:
    """Write the adapter that a run has trained as PEFT's folder."""
    if model.path is None:
        raise SettingsError("--to peft writes what a run has trained; name one by --run.")
    write_adapter(folder, model.path, which)


def write_as(target: str, folder: Path, name: str, model: LoadedModel, dtype: str) -> Path:
    """Write a model into a new folder for one of TARGETS; returns the file or folder to open.

    What only some readers can't do with it is told.
    """
    config, weights, template = model.model.config, weights_of(model.model), model.chat_template
    if frame := frame_of(model.tokenizer):
        tell(f"Note: its tokenizer puts {frame} around a text elsewhere; not here, nor as written")
    if target == "hf":
        card = model_card(model, dtype)
        write_folder(
            folder, config, weights, model.tokenizer, card=card, dtype=dtype, chat_template=template
        )
        for note in reader_notes(config):
            tell(f"Note: {note}")
        return folder
    make_folder(folder)
    file = folder / f"{name}.gguf"
    write_gguf(
        file, config, weights, model.tokenizer, name=name, dtype=dtype, chat_template=template
    )
    if target == "ollama":
        lines = modelfile(file.name, config, template)
        write_atomically(folder / "Modelfile", lines.encode())
    return file


if __name__ == "__main__":
    run_program(main, "Close other programs, or take another machine.")
