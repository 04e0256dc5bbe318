"""The one place where a run is built and wired: settings in, RuntimeEnv out."""

import dataclasses
import difflib
import importlib
import os
import runpy
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader

from data import TokenSlice, WindowPlan, describe_text, make_loaders, plan_windows
from engine.console import say
from engine.errors import CheckpointError, ResourceError, SettingsError
from engine.optim import (
    Schedule,
    build_adamw,
    default_eval_freq,
    default_learning_rate,
    default_warmup_steps,
)
from engine.precision import Precision, choose_precision
from engine.storage import make_folder, make_new_folder, write_atomically, write_json
from generation import SamplingConfig
from model import GPTConfig, GPTModel
from run_plan import RunPlan, RunSettings, resolve_settings
from text.sources import DataSpec, parse_data
from text.token_cache import TokenizedText, tokenize
from text.tokenizer import Tokenizer
from training_utils import QUICK_MODE_STEPS, TrainingConfig

CACHE = Path(__file__).resolve().parent / "cache"
# the mark by which backup programs know a cache (bford.info/cachedir)
CACHE_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n"


@dataclass
class RunFolder:
    """The folder that a run leaves behind; nothing is on the disk before create()."""

    path: Path
    named: bool  # the user chose the name
    settings: dict[str, Any]
    data: dict[str, Any]  # the report on the text
    tokenizer_file: Path

    def create(self) -> None:
        """Make the folder with settings.json, data.json and tokenizer.json.

        Raises CheckpointError where the user named a folder that is already there, ResourceError
        where the disk won't have it.
        """
        wanted, count = self.path, 1
        while not make_new_folder(self.path):
            if self.named:
                raise _folder_is_taken(self.path)
            count += 1  # another run began in the same second
            self.path = wanted.with_name(f"{wanted.name}-{count}")
        write_json(self.path / "settings.json", self.settings)
        write_json(self.path / "data.json", self.data)
        write_atomically(self.path / "tokenizer.json", self.tokenizer_file.read_bytes())


@dataclass
class RuntimeEnv:
    """Everything that a run needs, built and wired; what prepare_environment() returns."""

    device: torch.device
    model: GPTModel
    train_loader: DataLoader
    val_loader: DataLoader
    optimizer: torch.optim.Optimizer
    train_config: TrainingConfig
    tokenizer: Tokenizer
    model_config: GPTConfig
    precision: Precision
    schedule: Schedule
    sampling: SamplingConfig
    run: RunFolder
    text: TokenizedText
    seed: int
    log_every: int


def prepare_environment(settings: str | Path | None = None) -> RuntimeEnv:
    """Build a run from config_run.py, or from another settings file of the same shape.

    config_run is read at this call, so a script may set its attributes first. Writes nothing but
    downloads and tokens into cache/, and prints what was decided. Raises SettingsError with
    every wrong setting, DataError for the text, ResourceError for the device.
    """
    plan = resolve_settings(*read_given_settings(settings))
    folder = _run_folder(plan)
    device = pick_device(plan.run.DEVICE)
    precision = choose_precision(plan.run.PRECISION, device)
    _show_machine(device, precision, plan)

    spec = parse_data(plan.run.DATA)
    text = tokenize(spec, plan.run.TOKENIZER, plan.training.train_ratio, usable_cache())
    tokenizer = text.tokenizer
    _show_text(text, spec)
    windows, notices = plan_windows(
        text.n_tokens,
        max_length=plan.model["context_length"],
        stride=plan.training.stride,
        batch_size=plan.training.batch_size,
        train_ratio=plan.training.train_ratio,
        n_train=text.n_train,
    )

    model_config = GPTConfig(
        **plan.model | {"context_length": windows.max_length, "vocab_size": tokenizer.vocab_size}
    )
    torch.manual_seed(plan.run.SEED)
    model = build_model(model_config, device)
    _show_model(plan.model_name, model)

    train_loader, val_loader = make_loaders(
        TokenSlice(text.path, text.dtype, 0, text.n_tokens),
        windows,
        seed=plan.run.SEED,
        num_workers=_cap_workers(plan.training.num_workers, notices),
        device=device,
        sampling=plan.training.sampling,
    )
    training, schedule = _complete_training(
        plan, windows, model_config.emb_dim, len(train_loader), notices
    )
    _show_training(plan.mode, training, schedule, notices)
    for line in describe_text(text.report, windows, model.count_parameters()):
        say(f"  {line}")
    say(
        f"  {windows.n_train:,} tokens to train on in {windows.n_windows:,} windows "
        f"({windows.n_unused} left over), {windows.n_val:,} to validate on"
    )
    optimizer = build_adamw(model, training.learning_rate, training.weight_decay)
    batch = [part.to(device) for part in train_loader.dataset.__getitems__([0])]
    check_devices(model, optimizer, batch, device)
    say(f"✓ Device consistency verified (using {device})")
    run = _describe_run(
        plan,
        folder,
        device,
        precision,
        text,
        windows,
        training,
        model_config,
        schedule,
        notices,
    )
    return RuntimeEnv(
        device=device,
        model=model,
        train_loader=train_loader,
        val_loader=val_loader,
        optimizer=optimizer,
        train_config=training,
        tokenizer=tokenizer,
        model_config=model_config,
        precision=precision,
        schedule=schedule,
        sampling=plan.sampling,
        run=run,
        text=text,
        seed=plan.run.SEED,
        log_every=plan.run.LOG_EVERY,
    )


def read_given_settings(path: str | Path | None) -> tuple[dict[str, Any], str]:
    """The names that a settings file sets, and what messages call it; None reads config_run.

    Raises SettingsError where there is no such file or it does not run, with the line at fault.
    """
    place = "config_run.py" if path is None else str(path)
    if path is not None and not Path(path).is_file():
        raise SettingsError(
            f"there is no settings file {place} (looked for in {Path.cwd()}).\n"
            "Name a Python file of config_run.py's shape, or none for config_run.py itself."
        )
    try:
        if path is None:
            names = vars(importlib.import_module("config_run"))
        else:
            names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # whatever a line of the user's own may raise
        raise SettingsError(_about_settings_file(place, error)) from error
    known = [f.name for f in dataclasses.fields(RunSettings)]
    given = {
        name: value
        for name, value in names.items()
        # a settings file may have helpers of its own: lower-case names, functions, modules
        if name in known
        or (name.isupper() and not name.startswith("_") and not isinstance(value, ModuleType))
        or _resembles(name, known)
    }
    if not given:
        raise SettingsError(f"{place} sets nothing; it may set: {', '.join(known)}")
    return given, place


def _about_settings_file(place: str, error: BaseException) -> str:
    """What is wrong with a settings file that does not run, and in which line."""
    if isinstance(error, SyntaxError):
        where = f"{error.filename or place} line {error.lineno}"
        line = f"\n    {error.text.strip()}" if error.text else ""
        return f"{where} is not Python: {error.msg}{line}"
    if isinstance(error, ModuleNotFoundError) and error.name == "config_run":
        return "config_run.py is missing; restore it from the repository"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).name == Path(place).name]
    reason = f"{type(error).__name__}: {error}"
    if not inside:
        return f"{place} can't be read: {reason}"
    return f"{place} line {inside[-1].lineno} fails: {reason}\n    {inside[-1].line}"


def _resembles(name: str, known: Iterable[str]) -> bool:
    """Whether a lower-case name is likely to mean one of the settings."""
    return not name.startswith("_") and bool(
        difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.85)
    )


# -------------------------------------------------------------------------------- building


def pick_device(requested: str | None) -> torch.device:
    """The device that DEVICE names, or the best of this machine: MPS, then CUDA, then CPU.

    Raises ResourceError where the named one is not there.
    """
    has_mps, has_cuda = torch.backends.mps.is_available(), torch.cuda.is_available()
    if requested is None:
        return torch.device("mps" if has_mps else "cuda" if has_cuda else "cpu")
    device = torch.device(requested)
    there = {
        "cpu": True,
        "mps": has_mps,
        "cuda": has_cuda and (device.index or 0) < torch.cuda.device_count(),
    }[device.type]
    if not there:
        available = ["cpu"] + ["mps"] * has_mps
        available += [f"cuda:{i}" for i in range(torch.cuda.device_count())] if has_cuda else []
        raise ResourceError(
            f'DEVICE = "{requested}", but this machine has no such device.\n'
            f"Available here: {', '.join(available)}; DEVICE = None takes the best."
        )
    return device


def build_model(config: GPTConfig, device: torch.device) -> GPTModel:
    """A model with fresh weights on a device; ResourceError where it does not fit."""
    try:
        return GPTModel(config).to(device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"the model does not fit into the memory of {device}.\n"
            "Set smaller n_layers or emb_dim in model_overrides, or another MODEL."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate" in str(error)
    )


def usable_cache() -> Path:
    """The cache folder, or one of the system's for temporary files where the first can't be
    written (a read-only checkout, say)."""
    try:
        make_folder(CACHE)
        write_atomically(CACHE / "CACHEDIR.TAG", CACHE_TAG)
    except ResourceError as error:
        instead = Path(tempfile.gettempdir()) / "gpt-trainer-cache"
        reason = str(error).splitlines()[0]
        say(f"Note: {reason} {instead} serves as cache")
        make_folder(instead)
        return instead
    return CACHE


def _cap_workers(asked: int, notices: list[str]) -> int:
    cores = os.cpu_count() or 1
    if asked > cores:
        notices.append(f"num_workers is lowered from {asked} to {cores}: so many cores are there")
    return min(asked, cores)


def check_devices(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Iterable[torch.Tensor],
    device: torch.device,
) -> None:
    """Raise ResourceError unless parameters, buffers, optimizer state and a batch are on device."""
    tensors = [(f"parameter {name}", tensor) for name, tensor in model.named_parameters()]
    tensors += [(f"buffer {name}", tensor) for name, tensor in model.named_buffers()]
    tensors += [
        (f"optimizer state {name}", value)
        for state in optimizer.state.values()
        for name, value in state.items()
        # AdamW keeps its 0-d step counters on the CPU where it is not fused
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    tensors += [(f"batch part {i}", tensor) for i, tensor in enumerate(batch)]
    strays = [f"{name} is on {t.device}" for name, t in tensors if not _is_on(t, device)]
    if strays:
        more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        raise ResourceError(
            f"not everything is on {device}: {'; '.join(strays[:3])}{more}.\n"
            "Move the model to the device before its optimizer is built."
        )


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    # "cuda" without an index means the current one
    same_index = device.index is None or tensor.device.index == device.index
    return tensor.device.type == device.type and same_index


def _complete_training(
    plan: RunPlan,
    windows: WindowPlan,
    emb_dim: int,
    steps_per_epoch: int,
    notices: list[str],
) -> tuple[TrainingConfig, Schedule]:
    """Fill in every value that was left to be worked out; adds to the notices."""
    asked = plan.training
    total_steps = asked.max_steps or asked.num_epochs * steps_per_epoch
    if plan.mode == "quick":
        total_steps = min(total_steps, QUICK_MODE_STEPS)
    warmup_steps = asked.warmup_steps
    if warmup_steps is None:
        warmup_steps = default_warmup_steps(total_steps)
    elif warmup_steps >= total_steps:
        warmup_steps = total_steps - 1
        notices.append(
            f"warmup_steps is lowered from {asked.warmup_steps} to {warmup_steps}: the run has "
            f"{total_steps} steps"
        )
    training = dataclasses.replace(
        asked,
        eval_freq=asked.eval_freq or default_eval_freq(total_steps),
        batch_size=windows.batch_size,
        max_length=windows.max_length,
        stride=windows.stride,
        learning_rate=asked.learning_rate or default_learning_rate(emb_dim),
        warmup_steps=warmup_steps,
    )
    schedule = Schedule(
        training.schedule, training.learning_rate, training.warmup_steps, total_steps
    )
    return training, schedule


def _run_folder(plan: RunPlan) -> Path:
    """Where the run will be kept; it is better to know that it can't be before a long wait."""
    name = plan.run.RUN_NAME or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{plan.mode}"
    folder = Path(plan.run.OUTPUT_DIR).expanduser() / name
    if plan.run.RUN_NAME and folder.exists():
        raise _folder_is_taken(folder)
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ResourceError(
            f"can't make the folder {folder}: {existing} is a file.\n"
            "Set OUTPUT_DIR to another folder."
        )
    return folder


def _folder_is_taken(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"the run folder {folder} is already there.\n"
        "Choose another RUN_NAME, or move the folder away."
    )


def _describe_run(
    plan: RunPlan,
    folder: Path,
    device: torch.device,
    precision: Precision,
    text: TokenizedText,
    windows: WindowPlan,
    training: TrainingConfig,
    model_config: GPTConfig,
    schedule: Schedule,
    adapted: list[str],
) -> RunFolder:
    settings = {
        "mode": plan.mode,
        "settings": dataclasses.asdict(plan.run),
        "model_name": plan.model_name,
        "model": dataclasses.asdict(model_config),
        "training": training.to_dict(),
        "sampling": dataclasses.asdict(plan.sampling),
        "device": str(device),
        "precision": {"name": precision.name, "reason": precision.reason},
        "threads": torch.get_num_threads(),
        "tokenizer": text.tokenizer.fingerprint,
        "total_steps": schedule.total_steps,
        "origins": plan.origins,
        "adapted": adapted,
        "torch": torch.__version__,
    }
    split = {
        "train_tokens": windows.n_train,
        "validation_tokens": windows.n_val,
        "train_windows": windows.n_windows,
        "tokens_left_over": windows.n_unused,
    }
    return RunFolder(
        path=folder,
        named=plan.run.RUN_NAME is not None,
        settings=settings,
        data=text.report | {"split": split, "notices": text.notices},
        tokenizer_file=text.tokenizer_file,
    )


# --------------------------------------------------------------------------------- showing


def _show_machine(device: torch.device, precision: Precision, plan: RunPlan) -> None:
    say(f"Device: {device.type.upper()}")
    if device.type == "cuda":
        say(f"GPU: {torch.cuda.get_device_name(device)}")
    if device.type == "mps":
        say("GPU: Apple Silicon")
    say(f"Precision: {precision.name} ({precision.reason})")
    say(f"Mode: {plan.mode} ({plan.origins['mode']})")
    say(f"Model: {plan.model_name} ({plan.origins['model']})")
    for notice in plan.notices:
        say(f"Note: {notice}")


def _show_text(text: TokenizedText, spec: DataSpec) -> None:
    for notice in text.notices:
        say(f"Note: {notice}")
    files = text.report["files"]
    name = files[0]["name"] if len(files) == 1 else ", ".join(spec.train + spec.val)
    say(f"✓ Text loaded from {name}")
    for note in text.report["notes"]:
        say(f"  {note}")
    say(f"✓ Tokenizer initialized ({text.report['tokenizer']})")


def _show_model(name: str, model: GPTModel) -> None:
    config = model.config
    purpose = " (for testing)" if name == "small" else ""
    say(f"✓ Using {name} model configuration{purpose}")
    say("Model Configuration")
    say(f"  Vocab size: {config.vocab_size:,}")
    say(f"  Context length: {config.context_length:,}")
    say(f"  Embedding dim: {config.emb_dim:,}")
    say(f"  Num heads: {config.n_heads}")
    say(f"  Num layers: {config.n_layers}")
    say(f"  Total params: {model.count_parameters():,}")


def _show_training(
    mode: str,
    training: TrainingConfig,
    schedule: Schedule,
    notices: list[str],
) -> None:
    for notice in notices:
        say(f"Note: {notice}")
    purpose = ", for testing" if mode == "quick" else ""
    epochs = f"{training.num_epochs} epoch{'s' * (training.num_epochs != 1)}"
    if training.max_steps is not None:
        epochs = f"{training.max_steps} steps"
    say(f"✓ Using {mode} training config ({epochs}{purpose})")
    say(
        f"  {schedule.total_steps:,} steps of {training.batch_size} x {training.max_length} "
        f"tokens, learning rate {training.learning_rate:.3g} ({training.schedule}, "
        f"{training.warmup_steps} warm-up steps)"
    )
    say("✓ Data loaders ready")
