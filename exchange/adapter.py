"""A LoRA adapter as the folder that PEFT reads beside transformers' model.

Format: github.com/huggingface/peft, LoraConfig and its save_pretrained().
"""

import os
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError, SettingsError
from engine.lora import INPUTS, OUTPUTS, SCALE, merged
from engine.settings import raise_if_any, shown
from exchange.huggingface import CONFIG, find_obstacles, form_for, layout
from exchange.opening import HUB, open_pretrained
from model import GPTConfig, GPTModel
from planning.decisions import read_record
from storage.checkpoint import Tensors, assign_weights, read_adapter, safetensors_chunks
from storage.files import NewFolder, make_folder, to_json

GPT2_MODULES = ("c_attn", "c_proj", "c_fc")
LLAMA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(path: Path, run: Path, which: str = "best") -> None:
    """Write the adapter that a run has trained, complete or not at all; which as in load_run().

    Raises SettingsError if the run has trained none, if transformers has no such model, or if its
    tokenizer has tokens that the weights it began from lack; CheckpointError for a damaged run.
    """
    record = read_record(run)
    rank, start = record.training.lora_rank, record.start
    if rank is None or start is None:
        raise SettingsError(f"{run} has trained no adapter: it had no lora_rank. Export its model.")
    raise_if_any(find_obstacles(record.model), "a model that is to be exported")
    if record.model.vocab_size > start.config.vocab_size:  # fewer leave rows of theirs unused
        raise SettingsError(
            f"{run} has {record.model.vocab_size:,} tokens, and the weights it began from "
            f"{start.config.vocab_size:,}: PEFT can't load its adapter. Export the model."
        )
    if os.path.lexists(path):
        raise SettingsError(f"{path} exists; name a folder that does not.")
    tensors = their_adapter(record.model, read_adapter(run, record.run_id, which))
    settings = their_adapter_settings(record.model, rank, _base_of(record.settings["INIT_FROM"]))
    make_folder(path.parent)
    with NewFolder(path, None) as folder:
        folder.write("adapter_model.safetensors", safetensors_chunks(tensors, {"format": "pt"}))
        folder.write("adapter_config.json", [(to_json(settings, indent=2) + "\n").encode()])


def adapted(run: Path, which: str = "best") -> GPTModel:
    """What PEFT is to compute: the weights that INIT_FROM names, unrounded, and a run's adapter.

    The run itself may have kept them in half precision. Raises as open_pretrained() does, and
    CheckpointError if they are no longer those that the run began from.
    """
    record = read_record(run)
    assert record.start is not None, "write_adapter() has refused it"
    given = record.settings["INIT_FROM"]
    base = open_pretrained(given)
    if base.fingerprint != record.start.fingerprint:
        raise CheckpointError(
            f"INIT_FROM = {shown(given)} holds other weights than those that {run} began from: its "
            "adapter is not for them.\nExport the model, with --to hf."
        )
    weights = merged(base.fitted(record.model), read_adapter(run, record.run_id, which))
    with torch.device("meta"):  # assign_weights() provides the memory
        model = GPTModel(record.model)
    assign_weights(model, weights, base.source)
    return model.eval()


def _base_of(given: str) -> str:
    """What transformers opens the weights by that INIT_FROM names: a Hub name or a folder's path.

    Raises SettingsError for what it can't open.
    """
    if given.startswith(HUB):
        return given.removeprefix(HUB)
    path = os.path.abspath(os.path.expanduser(given))
    if os.path.isfile(os.path.join(path, CONFIG)):
        return path
    raise SettingsError(
        f"the adapter is for INIT_FROM = {shown(given)}, which is no folder of transformers' files "
        "here: PEFT can't load it.\nExport the model, with --to hf."
    )


def their_adapter(config: GPTConfig, adapter: Tensors) -> Tensors:
    """An adapter by PEFT's names. The parts of a merged matrix share its input side."""
    prefix = form_for(config).prefix
    tensors: Tensors = {}
    for part in layout(config):
        layer, _, kind = part.ours.rpartition(".")
        inputs = adapter.get(f"{layer}.{INPUTS}")
        if kind == "weight" and inputs is not None:
            outputs = adapter[f"{layer}.{OUTPUTS}"][part.first_row :][: part.shape[0]]
            theirs = f"base_model.model.{prefix}{part.theirs.removesuffix('.weight')}"
            tensors |= {f"{theirs}.lora_A.weight": inputs, f"{theirs}.lora_B.weight": outputs}
    return tensors


def their_adapter_settings(config: GPTConfig, rank: int, base: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter for the model that transformers finds at base."""
    is_gpt2 = config.architecture == "gpt2"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": SCALE * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(GPT2_MODULES if is_gpt2 else LLAMA_MODULES),
        "fan_in_fan_out": is_gpt2,  # its matrices are (inputs, outputs)
        "inference_mode": True,
    }
