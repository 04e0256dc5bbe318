"""A run loaded for inference: weights, tokenizer and settings, without the trainer."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.compiling import compile_decoding
from engine.errors import CheckpointError, DataError, ResourceError, SettingsError
from engine.memory import as_bytes, available_memory
from engine.processor import default_threads, prepare_processor, using_threads
from engine.settings import shown
from engine.weights import (
    READERS,
    TRIAL_WEIGHTS,
    choose_weights,
    convert_weights,
    reading_trials,
)
from exchange.pretrained import Pretrained
from generation import SamplingConfig
from model import GPTConfig, GPTModel
from planning.choices import Choices
from planning.decisions import RunRecord, read_record
from planning.machine import pick_device
from planning.runs import newest_finished_run
from planning.settings_file import read_given_settings
from storage.cache import usable_cache
from storage.checkpoint import assign_weights, newest_weights, read_weights
from storage.files import SETTINGS
from text.tokenizer import GPT2_FINGERPRINT, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model to use: a run's, as load_run() returns it, or one from elsewhere (load_model())."""

    name: str  # of the run's folder, or short for what it is
    version: str  # that tells its weights from others of this name: "step 180"
    source: str  # where it is from, in words
    device: torch.device
    model: GPTModel
    weights: str  # their format: "fp32", "bf16" or "int8"
    why_weights: str | None  # what was measured to choose it; None if nothing was
    n_parameters: int
    tokenizer: Tokenizer
    sampling: SamplingConfig  # the run's own, or the defaults
    chat_template: str | None = None
    path: Path | None = None  # the run's folder; None for a model from elsewhere, as below
    step: int | None = None  # whose weights these are
    settings: dict[str, Any] = field(default_factory=dict)  # of the run's settings.json


def load_run(
    folder: str | Path | None = None,
    *,
    which: str = "best",
    weights: str = "auto",
    device: str | None = None,
    compiled: bool = False,
) -> LoadedModel:
    """Load the model of a run for inference; the run may be training meanwhile.

    folder is a path, or a name in OUTPUT_DIR; None is the run that finished last. which is "best"
    (validation loss) or "last". weights "auto" is bf16, or fp32 on GPUs without it; for a large
    model on a CPU it is what a trial finds faster, which the cache keeps. "int8" is faster on CPUs
    and less exact. compiled (CUDA only) makes tokens faster, after half a minute
    for each batch size. Raises CheckpointError without a sound run, SettingsError, ResourceError.
    """
    path = find_run(folder)
    record = read_record(path)
    chosen = inference_device(device, weights)
    tokenizer = _tokenizer_of(path, record)
    step, tensors = read_weights(path, record.run_id, which)
    return make_ready(
        record.model,
        tensors,
        chosen,
        weights,
        compiled=compiled,
        name=path.resolve().name,
        version=f"step {step}",
        source=f"{path}, step {step}",
        tokenizer=tokenizer,
        sampling=record.sampling,
        chat_template=_chat_template_of(record),
        path=path,
        step=step,
        settings=record.to_json(),
    )


def inference_device(requested: str | None, weights: str) -> torch.device:
    """The device for inference with these weights; raises early for what can't be."""
    prepare_processor()
    device = pick_device(requested)
    choose_weights(weights, device)
    return device


def make_ready(
    config: GPTConfig,
    tensors: dict[str, torch.Tensor],
    device: torch.device,
    weights: str,
    *,
    compiled: bool,
    source: str,
    **facts: Any,
) -> LoadedModel:
    """The LoadedModel of weights in CPU memory, which it takes over; facts are its other fields."""
    _require_fit(config, tensors, source)
    with torch.device("meta"):  # assign_weights() provides the memory
        model = GPTModel(config)
    assign_weights(model, tensors, source)
    n_parameters = model.count_parameters()
    kind, model.decodes_by_onednn, why_weights = fastest_reader(weights, device, model)
    convert_weights(model, kind)
    model.to(device).eval().requires_grad_(False)
    if compiled:
        compile_decoding(model, device)
    return LoadedModel(
        source=source,
        device=device,
        model=model,
        weights=kind,
        why_weights=why_weights,
        n_parameters=n_parameters,
        **facts,
    )


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run; any text may be one."""
    return os.path.isfile(path / SETTINGS)  # unlike Path's methods, it accepts any text


def open_run(path: Path) -> Pretrained:
    """A run as a model to begin from: its best weights, or the last where it has no best ones.

    Raises CheckpointError without a sound run.
    """
    record = read_record(path)
    tokenizer = _tokenizer_of(path, record)
    step, fingerprint = newest_weights(path, record.run_id)
    source = f"{path.name} (run, step {step:,})"

    def weights() -> dict[str, torch.Tensor]:
        found, tensors = read_weights(path, record.run_id)
        if found != step:
            raise CheckpointError(
                f"{path} had its best weights at step {step}, and now has those of step {found}.\n"
                "It may be training: start again."
            )
        _require_fit(record.model, tensors, source)
        return tensors

    template = _chat_template_of(record)
    return Pretrained(source, record.model, tokenizer, weights, fingerprint, template)


def fastest_reader(
    requested: str, device: torch.device, model: GPTModel
) -> tuple[str, bool, str | None]:
    """The weights' kind, whether oneDNN multiplies one row by them, and what was measured."""
    kind = choose_weights(requested, device)
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    is_large = sum(math.prod(shape) for shape in shapes) >= TRIAL_WEIGHTS
    if device.type != "cpu" or kind != "bf16" or not is_large:
        return kind, False, None
    choices = Choices(usable_cache(), device, default_threads())
    trials = reading_trials(shapes, requested)
    distinct = ", ".join(f"{n} x {m}" for n, m in dict.fromkeys(shapes))
    with using_threads(choices.threads):
        choice = choices.fastest(f"one row by {distinct} ({', '.join(trials)})", trials)
    return *READERS[choice.name], choice.reason


def _require_fit(config: GPTConfig, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Raise before building a model that the weights don't fit or whose positions fill memory."""
    embedding = tensors.get("token_embedding.weight")
    is_wide = embedding is not None and embedding.shape == (config.vocab_size, config.emb_dim)
    if not is_wide or config.n_layers > len(tensors):
        raise CheckpointError(f"{source}: its configuration is not that of its weights.")
    features = {"sinusoidal": config.emb_dim, "rope": config.head_dim or 0}
    # bytes of an fp32 table and what it is computed from; learned positions are among the weights
    needed = 10 * config.context_length * features.get(str(config.positions), 0)
    room = available_memory(torch.device("cpu"))
    if room is not None and needed > room:
        raise ResourceError(
            f"the positions of {source} take {as_bytes(needed)} of memory, and {as_bytes(room)} "
            "are free."
        )


def runs_folder() -> Path:
    """The folder that OUTPUT_DIR names; SettingsError if it is no name."""
    given, place = read_given_settings(None)
    output_dir = given.get("OUTPUT_DIR", "runs")
    if not isinstance(output_dir, str):
        raise SettingsError(f"OUTPUT_DIR is {shown(output_dir)} in {place}; it must be a string")
    return Path(output_dir).expanduser()


def find_run(folder: str | Path | None) -> Path:
    """The folder of a run: the path itself, or this name in OUTPUT_DIR; None: the newest finished.

    Raises CheckpointError where there is none, and for a folder within a run.
    """
    path = None if folder is None else Path(os.path.expanduser(folder))
    if path is not None and is_run(path):
        return path
    output_dir = runs_folder()
    if path is None:
        return newest_finished_run(output_dir)
    is_named = os.path.exists(output_dir / path) or not os.path.exists(path)
    found = output_dir / path if is_named else path
    if not is_run(found):
        refuse_part_of_run(
            found, "--which best (the default) takes its best weights, --which last the last ones."
        )
    return found


def refuse_part_of_run(path: Path, advice: str) -> None:
    """Raise CheckpointError, with the advice, if a path that is no run lies in one."""
    for folder in path.parents:
        if is_run(folder):
            raise CheckpointError(
                f"{path} is no run, but lies in the run {folder}: name that one.\n{advice}"
            )


def _chat_template_of(record: RunRecord) -> str | None:
    """The chat template that a run learned, or that of the weights that it began from."""
    if record.chat is not None:
        return record.chat.template
    return None if record.start is None else record.start.chat_template


def _tokenizer_of(path: Path, record: RunRecord) -> Tokenizer:
    """The tokenizer that a run was trained with; CheckpointError if the file has another."""
    is_gpt2 = record.tokenizer == GPT2_FINGERPRINT
    file = path / "tokenizer.json"
    try:
        # reading GPT-2's tokenizer from JSON takes half a second
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
