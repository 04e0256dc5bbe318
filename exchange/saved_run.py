"""A run as a model to use: its weights, tokenizer and settings, and nothing of the trainer."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.compiling import compile_decoding
from engine.errors import CheckpointError, DataError, ResourceError, SettingsError
from engine.memory import as_bytes, available_memory
from engine.processor import prepare_processor
from engine.settings import shown
from engine.weights import choose_weights, convert_weights
from generation import SamplingConfig
from model import GPTConfig, GPTModel
from planning.decisions import RunRecord, read_record
from planning.machine import pick_device
from planning.runs import newest_finished_run
from planning.settings_file import read_given_settings
from storage.checkpoint import assign_weights, read_weights
from storage.files import SETTINGS
from text.tokenizer import GPT2_FINGERPRINT, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what it needs to write; what load_run() returns."""

    path: Path
    step: int  # whose weights these are
    device: torch.device
    model: GPTModel
    weights: str  # what its products read: "fp32", "bf16" or "int8"
    n_parameters: int
    tokenizer: Tokenizer
    sampling: SamplingConfig  # the run's own
    settings: dict[str, Any]  # its settings.json


def load_run(
    folder: str | Path | None = None,
    *,
    which: str = "best",
    weights: str = "auto",
    device: str | None = None,
    compiled: bool = False,
) -> LoadedRun:
    """Load the model of a run for use, while it is being trained too; changes nothing.

    folder is a path, or a name in OUTPUT_DIR; None is the run that was finished last. which is
    "best", the weights of the lowest validation loss, or "last". weights "auto" is bf16, fp32
    on GPUs without it; "int8" is faster on CPUs, and a little less exact. compiled
    is for CUDA: for each number of texts the first token waits half a minute, the others come
    faster. Raises
    CheckpointError where there is no such run or it can't be read, SettingsError, ResourceError.
    """
    prepare_processor()
    path = _find_run(folder)
    record = read_record(path)
    chosen = pick_device(device)
    kind = choose_weights(weights, chosen)
    tokenizer = _tokenizer_of(path, record)
    step, model = _trained_model(path, record.run_id, which, record.model)
    n_parameters = model.count_parameters()
    convert_weights(model, kind)
    model.to(chosen).eval().requires_grad_(False)
    if compiled:
        compile_decoding(model, chosen)
    return LoadedRun(
        path=path,
        step=step,
        device=chosen,
        model=model,
        weights=kind,
        n_parameters=n_parameters,
        tokenizer=tokenizer,
        sampling=record.sampling,
        settings=record.to_json(),
    )


def _trained_model(path: Path, run_id: str, which: str, config: GPTConfig) -> tuple[int, GPTModel]:
    """A run's model in fp32 on the CPU, and the step whose weights it has."""
    step, tensors = read_weights(path, run_id, which)
    _require_fit(config, tensors, path)
    with torch.device("meta"):  # no weights are made that the run's would replace
        model = GPTModel(config)
    assign_weights(model, tensors, path)
    return step, model


def _require_fit(config: GPTConfig, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raise before a model is built that weights are not of, or whose positions fill the memory.

    A few numbers in a settings.json may ask for any amount of time and memory.
    """
    embedding = tensors.get("token_embedding.weight")
    is_wide = embedding is not None and embedding.shape == (config.vocab_size, config.emb_dim)
    if not is_wide or config.n_layers > len(tensors):
        raise CheckpointError(f"{path / SETTINGS} describes another model than the weights are of.")
    features = {
        "learned": 0,
        "sinusoidal": config.emb_dim,
        "rope": config.emb_dim // config.n_heads,
    }
    # in bytes: a table in fp32, and what it is made from
    needed = 10 * config.context_length * features[config.positions]
    room = available_memory(torch.device("cpu"))
    if room is not None and needed > room:
        raise ResourceError(
            f"the positions of {path} take {as_bytes(needed)} of memory, and {as_bytes(room)} are "
            "free."
        )


def _find_run(folder: str | Path | None) -> Path:
    """The folder of a run: the path itself, or what has this name in OUTPUT_DIR."""
    # unlike Path's, os.path's functions take whatever somebody may type
    path = None if folder is None else Path(os.path.expanduser(folder))
    if path is not None and os.path.isfile(path / SETTINGS):
        return path
    given, place = read_given_settings(None)
    output_dir = given.get("OUTPUT_DIR", "runs")
    if not isinstance(output_dir, str):
        raise SettingsError(f"OUTPUT_DIR is {shown(output_dir)} in {place}; it must be a string")
    output_dir = Path(output_dir).expanduser()
    if path is None:
        return newest_finished_run(output_dir)
    is_named = os.path.exists(output_dir / path) or not os.path.exists(path)
    return output_dir / path if is_named else path


def _tokenizer_of(path: Path, record: RunRecord) -> Tokenizer:
    """The tokenizer that a run was trained with; CheckpointError where it is another by now."""
    is_gpt2 = record.tokenizer == GPT2_FINGERPRINT
    file = path / "tokenizer.json"
    try:
        # reading GPT-2's from JSON takes half a second
        tokenizer = load_tokenizer("gpt2" if is_gpt2 else file)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if tokenizer.fingerprint != record.tokenizer:
        raise CheckpointError(f"{file} is not the tokenizer that this run was trained with.")
    if tokenizer.vocab_size != record.model.vocab_size:
        raise CheckpointError(
            f"{path / SETTINGS} has a vocab_size of {record.model.vocab_size}, and the run's "
            f"tokenizer {tokenizer.vocab_size} tokens: they don't belong together."
        )
    return tokenizer
