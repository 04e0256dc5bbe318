"""The one place where a run is built and wired: settings in, RuntimeEnv out."""

import dataclasses
import difflib
import importlib
import runpy
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader

from data import WindowPlan, make_loaders, plan_windows, to_array
from engine.console import say
from engine.errors import CheckpointError, ResourceError, SettingsError
from engine.optim import Schedule, build_adamw, default_learning_rate, default_warmup_steps
from engine.precision import Precision, choose_precision
from engine.storage import make_folder, make_new_folder, write_atomically, write_json
from generation import SamplingConfig
from model import GPTConfig, GPTModel
from run_plan import RunPlan, RunSettings, resolve_settings
from text.sources import Text, load_text
from text.tokenizer import Tokenizer, load_tokenizer
from training_utils import QUICK_MODE_STEPS, TrainingConfig

CACHE = Path(__file__).resolve().parent / "cache"


@dataclass
class RunFolder:
    """The folder that a run leaves behind; nothing is on the disk before create()."""

    path: Path
    named: bool  # the user chose the name
    settings: dict[str, Any]

    def create(self, tokenizer: Tokenizer) -> None:
        """Make the folder with settings.json and tokenizer.json.

        Raises CheckpointError where the user named a folder that is already there, ResourceError
        where the disk won't have it.
        """
        wanted, count = self.path, 1
        while not make_new_folder(self.path):
            if self.named:
                raise CheckpointError(
                    f"the run folder {self.path} is already there.\n"
                    "Choose another RUN_NAME, or move the folder away."
                )
            count += 1  # another run began in the same second
            self.path = wanted.with_name(f"{wanted.name}-{count}")
        write_json(self.path / "settings.json", self.settings)
        write_atomically(self.path / "tokenizer.json", _tokenizer_json(tokenizer))


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
    text: Text
    seed: int
    log_every: int


def prepare_environment(settings: str | Path | None = None) -> RuntimeEnv:
    """Build a run from config_run.py, or from another settings file of the same shape.

    config_run is read at this call, so a script may set its attributes first. Writes nothing but
    downloads into cache/, and prints what was decided. Raises SettingsError with every wrong
    setting, DataError for the text, ResourceError for the device.
    """
    plan = resolve_settings(*read_given_settings(settings))
    device = pick_device(plan.run.DEVICE)
    precision = choose_precision(plan.run.PRECISION, device)
    _show_machine(device, precision, plan)

    text = load_text(plan.run.DATA, CACHE)
    if text.notice:
        say(f"Note: {text.notice}")
    say(f"✓ Text loaded from {text.name}")
    tokenizer = load_tokenizer(plan.run.TOKENIZER)
    say(f"✓ Tokenizer initialized ({tokenizer.name})")
    tokens = to_array(tokenizer.encode(text.content), tokenizer.vocab_size)
    windows, notices = plan_windows(
        len(tokens),
        max_length=plan.model["context_length"],
        stride=plan.training.stride or plan.model["context_length"],
        batch_size=plan.training.batch_size,
        train_ratio=plan.training.train_ratio,
    )

    model_config = GPTConfig(
        **plan.model | {"context_length": windows.max_length, "vocab_size": tokenizer.vocab_size}
    )
    torch.manual_seed(plan.run.SEED)
    model = build_model(model_config, device)
    _show_model(plan.model_name, model)

    train_loader, val_loader = make_loaders(
        tokens,
        windows,
        seed=plan.run.SEED,
        num_workers=plan.training.num_workers,
        pin_memory=device.type == "cuda",
    )
    training, schedule = _complete_training(
        plan, windows, model_config.emb_dim, len(train_loader), notices
    )
    _show_training(plan.mode, training, schedule, windows, notices)
    optimizer = build_adamw(model, training.learning_rate, training.weight_decay)
    batch = [part.to(device) for part in train_loader.dataset.__getitems__([0])]
    check_devices(model, optimizer, batch, device)
    say(f"✓ Device consistency verified (using {device})")
    run = _plan_folder(plan, device, precision, text, training, model_config, schedule, notices)
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
    try:
        if path is None:
            names = vars(importlib.import_module("config_run"))
        else:
            names = runpy.run_path(str(path))
    except OSError as error:
        raise SettingsError(f"can't read {place}: {error.strerror or error}") from error
    except SyntaxError as error:
        shown = f"\n    {error.text.strip()}" if error.text else ""
        raise SettingsError(
            f"{place} line {error.lineno} is not Python: {error.msg}{shown}"
        ) from error
    except Exception as error:  # whatever a line of the user's own may raise
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise SettingsError(
            f"{place} line {line.lineno} fails: {error}\n    {line.line}"
        ) from error
    lower_case = {f.name for f in dataclasses.fields(RunSettings) if f.name.islower()}
    return {
        name: value
        for name, value in names.items()
        # a settings file may have helpers of its own: lower-case names, functions, modules
        if name in lower_case
        or (name.isupper() and not name.startswith("_") and not isinstance(value, ModuleType))
        or _resembles(name, lower_case)
    }, place


def _resembles(name: str, known: Iterable[str]) -> bool:
    return bool(difflib.get_close_matches(name, known, n=1, cutoff=0.8))


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
        if not isinstance(error, MemoryError) and "alloc" not in str(error).lower():
            raise
        raise ResourceError(
            f"the model does not fit into the memory of {device}.\n"
            "Set smaller n_layers or emb_dim in model_overrides, or another MODEL."
        ) from error


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
    plan: RunPlan, windows: WindowPlan, emb_dim: int, steps_per_epoch: int, notices: list[str]
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


def _plan_folder(
    plan: RunPlan,
    device: torch.device,
    precision: Precision,
    text: Text,
    training: TrainingConfig,
    model_config: GPTConfig,
    schedule: Schedule,
    adapted: list[str],
) -> RunFolder:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    name = plan.run.RUN_NAME or f"{stamp}-{plan.mode}"
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
        "text": {"name": text.name, "path": str(text.path), "notice": text.notice},
        "total_steps": schedule.total_steps,
        "origins": plan.origins,
        "adapted": adapted,
        "torch": torch.__version__,
    }
    return RunFolder(
        Path(plan.run.OUTPUT_DIR).expanduser() / name, plan.run.RUN_NAME is not None, settings
    )


def _tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The tokenizer.json of a run, kept in the cache: making it takes half a second."""
    path = CACHE / "tokenizers" / f"{tokenizer.fingerprint}.json"
    if not path.exists():
        make_folder(path.parent)
        write_atomically(path, tokenizer.to_json().encode("utf-8"))
    return path.read_bytes()


# --------------------------------------------------------------------------------- showing


def _show_machine(device: torch.device, precision: Precision, plan: RunPlan) -> None:
    say(f"Device: {device.type.upper()}")
    if device.type == "cuda":
        say(f"GPU: {torch.cuda.get_device_name(device)}")
    if device.type == "mps":
        say("GPU: Apple Silicon")
    say(f"Precision: {precision.name} ({precision.reason})")
    say(f"Mode: {plan.mode} ({plan.origins['mode']})")
    for notice in plan.notices:
        say(f"Note: {notice}")


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
    windows: WindowPlan,
    notices: list[str],
) -> None:
    for notice in notices:
        say(f"Note: {notice}")
    purpose = ", for testing" if mode == "quick" else ""
    epochs = f"{training.num_epochs} epoch{'s' * (training.num_epochs != 1)}"
    say(f"✓ Using {mode} training config ({epochs}{purpose})")
    say(
        f"  {schedule.total_steps:,} steps of {training.batch_size} x {training.max_length} "
        f"tokens, learning rate {training.learning_rate:.3g} ({training.schedule}, "
        f"{training.warmup_steps} warm-up steps)"
    )
    say("✓ Data loaders ready")
    say(
        f"  {windows.n_train:,} tokens to train on in {windows.n_windows:,} windows "
        f"({windows.n_unused} left over), {windows.n_val:,} to validate on"
    )
