"""The one place where a run is built and wired: settings in, RuntimeEnv out."""

import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from data import (
    TokenSlice,
    WindowPlan,
    describe_text,
    make_loaders,
    measure_tokens,
    plan_windows,
)
from engine.checkpoint import assign_weights, read_weights
from engine.compiling import compile_decoding
from engine.console import in_kernel, say
from engine.devices import device_count, device_name, limit_memory
from engine.errors import CheckpointError, DataError, ResourceError, SettingsError
from engine.memory import (
    ADVICE,
    as_bytes,
    available_memory,
    estimate_memory,
    halved,
    is_out_of_memory,
)
from engine.metrics import TokenSize
from engine.optim import (
    Schedule,
    build_optimizer,
    default_eval_freq,
    default_learning_rate,
    default_warmup_steps,
    make_schedule,
)
from engine.parallel import ALONE, Parallel, join
from engine.precision import Precision, choose_precision, keep_precision
from engine.processor import default_threads, prepare_processor, threads_are_set
from engine.settings import shown
from engine.sharding import build_in_parts, whole
from engine.storage import make_folder, write_atomically
from engine.tracking import check_trackers
from engine.weights import choose_weights, convert_weights
from generation import SamplingConfig
from model import GPTConfig, GPTModel, attention_kernel
from planning.machine import check_devices, pick_device, why_no_gpu
from planning.settings_file import read_given_settings
from run_folder import (
    SETTINGS,
    RunFolder,
    choose_run,
    newest_finished_run,
    read_run_settings,
)
from run_plan import RunPlan, resolve_settings
from text.sources import DataSpec, parse_data
from text.token_cache import TokenizedText, tokenize
from text.tokenizer import GPT2_FINGERPRINT, Tokenizer, load_tokenizer
from training_utils import TrainingConfig
from trial import Compiled, Trial, decide_compiling, precision_that_agrees, steps_in

CACHE = Path(__file__).resolve().parent / "cache"
HOW_MANY = "torchrun --nproc-per-node 2 main.py uses two"
# the mark by which backup programs know a cache (bford.info/cachedir)
CACHE_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n"
_earlier_models = weakref.WeakSet()  # of this process, as far as anything still holds them


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
    parallel: Parallel
    compiled: Compiled
    schedule: Schedule
    total_steps: int
    sampling: SamplingConfig
    run: RunFolder
    text: TokenizedText
    token_size: TokenSize
    threads: int
    tracking: list[str]
    seed: int
    log_every: int


def prepare_environment(settings: str | Path | None = None) -> RuntimeEnv:
    """Build a run from config_run.py, or from another settings file of the same shape.

    config_run is read at this call, so a script may set its attributes first. Writes nothing but
    downloads and tokens into cache/, and prints what was decided. Where a run goes on, its model
    has fresh weights until train() loads the checkpoint. Raises SettingsError with every wrong
    setting, DataError for the text, ResourceError for the device, CheckpointError where a run
    that is named can't go on, RunFinished where it has nothing left to do.

    Under torchrun every process calls it, and gets its share of the batches.
    """
    _let_go_of_earlier_runs()
    prepare_processor()
    parallel = join()
    with parallel.watched():
        env = _prepare(settings, parallel)
    _earlier_models.add(env.model)
    return env


def _prepare(settings: str | Path | None, parallel: Parallel) -> RuntimeEnv:
    plan = resolve_settings(*read_given_settings(settings))
    check_trackers(plan.run.TRACKING)
    parallel.require_same(**_as_words(plan))
    if not parallel.is_alone:
        parallel.kind = "ddp" if plan.run.PARALLEL == "auto" else plan.run.PARALLEL
    run = parallel.broadcast(parallel.on_main(lambda: _choose_run(plan, parallel)))
    device = pick_device(plan.run.DEVICE, parallel)
    precision = _decide_precision(plan, run.saved, device)
    _show_machine(device, precision, plan, parallel)

    parallel.require_same(device=device.type)
    text = _read_text(plan, run, parallel)
    parallel.on_main(lambda: run.check_text(text.tokenizer.fingerprint, text.sha256))
    run = parallel.broadcast(run)
    precision = _decide_precision(plan, run.saved, device)  # by then another run may begin
    parallel.require_same(precision=precision.name)
    tokenizer = text.tokenizer
    asked = _with_decisions(plan.training, run.saved)
    windows, notices = plan_windows(
        text.n_tokens,
        max_length=plan.model["context_length"],
        stride=asked.stride,
        batch_size=asked.batch_size,
        train_ratio=asked.train_ratio,
        n_train=text.n_train,
    )
    micro_batch = _share_of_a_batch(asked, windows, parallel)
    threads, micro_batch = _share_the_machine(
        plan, run.saved, device, micro_batch, parallel, notices
    )

    config = GPTConfig(
        **plan.model | {"context_length": windows.max_length, "vocab_size": tokenizer.vocab_size}
    )
    model = _fresh_model(plan, asked, config, device, precision, parallel)
    micro_batch = _fit_into_memory(
        model, asked, windows, precision, device, micro_batch, parallel, notices
    )

    train_loader, val_loader = make_loaders(
        TokenSlice(text.path, text.dtype, 0, text.n_tokens),
        windows,
        seed=plan.run.SEED,
        num_workers=_cap_workers(asked.num_workers, parallel.local_world, notices),
        device=device,
        sampling=asked.sampling,
        accumulation=asked.gradient_accumulation_steps,
        micro_batch=micro_batch,
        parallel=parallel,
    )
    precision = _check_arithmetic(model, train_loader, precision, notices)
    rate = asked.learning_rate or default_learning_rate(model.config.emb_dim, asked.optimizer)
    asked = dataclasses.replace(asked, learning_rate=rate)
    optimizer = build_optimizer(asked.optimizer, model, rate, asked.weight_decay)
    steps_per_epoch = train_loader.batch_sampler.n_steps
    trial = Trial(model, optimizer, train_loader, precision, device, threads, parallel)
    compiled, asked = _try_out(plan, run.saved, asked, trial, steps_per_epoch, notices)
    total_steps = _count_steps(plan, asked, steps_per_epoch)
    training = _complete_training(asked, windows, total_steps, notices)
    _show_training(plan.mode, training, total_steps, notices)
    _show_windows(text, windows, model)
    batch = [part.to(device) for part in train_loader.dataset.__getitems__([0])]
    check_devices(model, optimizer, batch, device)
    say(f"✓ Device consistency verified (using {device})")
    env = RuntimeEnv(
        device=device,
        model=model,
        train_loader=train_loader,
        val_loader=val_loader,
        optimizer=optimizer,
        train_config=training,
        tokenizer=tokenizer,
        model_config=model.config,
        precision=precision,
        parallel=parallel,
        compiled=compiled,
        schedule=make_schedule(
            training.schedule, training.learning_rate, training.warmup_steps, total_steps
        ),
        total_steps=total_steps,
        sampling=plan.sampling,
        run=run,
        text=text,
        token_size=measure_tokens(val_loader.dataset.tokens, tokenizer),
        threads=threads,
        tracking=plan.run.TRACKING,
        seed=plan.run.SEED,
        log_every=plan.run.LOG_EVERY,
    )
    _describe_run(env, plan, windows, steps_per_epoch, notices)
    env.run = parallel.broadcast(env.run)
    return env


def _let_go_of_earlier_runs() -> None:
    """Free what earlier runs have left in a notebook's kernel: the next one needs the room."""
    if not in_kernel():
        return
    errors = [getattr(sys, "last_value", None)] if _earlier_models else []
    for error in errors:  # a cell that failed keeps all that its functions had in use
        if error is not None and error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__)
            for frame, _ in traceback.walk_tb(error.__traceback__):
                len(frame.f_locals)  # up to Python 3.12 a copy, which reading it renews
            errors += [e for e in (error.__cause__, error.__context__) if e not in errors]
    if "torch._inductor.compile_fx" in sys.modules:
        torch.compiler.reset()  # compiled steps hold the memory that they ran in
    gc.collect()
    if _earlier_models:
        n_bytes = sum(p.nbytes for model in _earlier_models for p in model.parameters())
        say(
            f"Note: an earlier model is still in memory ({as_bytes(n_bytes)}, and more for its "
            "optimizer):  del env  (or what its name is) before you prepare another frees it"
        )


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
    settings = read_run_settings(path)
    chosen = pick_device(device)
    kind = choose_weights(weights, chosen)
    config, sampling = _described(path, settings)
    tokenizer = _tokenizer_of(path, settings, config)
    step, model = _trained_model(path, settings["run_id"], which, config)
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
        sampling=sampling,
        settings=settings,
    )


def _described(path: Path, settings: dict[str, Any]) -> tuple[GPTConfig, SamplingConfig]:
    """What a run's settings say of its model and its samples; CheckpointError where they don't."""
    try:
        return GPTConfig(**settings["model"]), SamplingConfig(**settings["sampling"])
    except (LookupError, TypeError, SettingsError) as error:
        raise CheckpointError(
            f"{path / SETTINGS} does not describe a model: {str(error)[:500]}"
        ) from None


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


def _tokenizer_of(path: Path, settings: dict[str, Any], config: GPTConfig) -> Tokenizer:
    """The tokenizer that a run was trained with; CheckpointError where it is another by now."""
    is_gpt2 = settings.get("tokenizer") == GPT2_FINGERPRINT
    file = path / "tokenizer.json"
    try:
        # reading GPT-2's from JSON takes half a second
        tokenizer = load_tokenizer("gpt2" if is_gpt2 else file)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if tokenizer.fingerprint != settings.get("tokenizer"):
        raise CheckpointError(f"{file} is not the tokenizer that this run was trained with.")
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{path / SETTINGS} has a vocab_size of {config.vocab_size}, and the run's tokenizer "
            f"{tokenizer.vocab_size} tokens: they don't belong together."
        )
    return tokenizer


# -------------------------------------------------------------------------------- building


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


def _fresh_model(
    plan: RunPlan,
    asked: TrainingConfig,
    config: GPTConfig,
    device: torch.device,
    precision: Precision,
    parallel: Parallel,
) -> GPTModel:
    """The run's model with the weights of its seed; ResourceError where it can't be trained."""
    torch.manual_seed(plan.run.SEED)
    if parallel.kind == "fsdp":
        _require_memory_for(config, device, parallel.world, precision)
        model = build_in_parts(lambda: GPTModel(config), parallel, precision, device)
    else:
        _require_memory_for(config, device)
        model = build_model(config, device)
    parallel.seed_apart(plan.run.SEED)
    model.activation_checkpointing = asked.activation_checkpointing
    _show_model(plan.model_name, model)
    return model


def _require_memory_for(
    config: GPTConfig,
    device: torch.device,
    parts: int = 1,
    precision: Precision | None = None,
) -> None:
    """Raise ResourceError where not even the model's matrices can be trained on a device.

    A system that promises more memory than it has would end the process instead of refusing. Of a
    model in parts an evaluation gathers all weights, in the precision of their products.
    """
    n_matrices = 1 if config.tie_embeddings else 2
    least = n_matrices * config.vocab_size * config.emb_dim
    least += config.n_layers * 2 * config.emb_dim * (config.emb_dim + config.ff_dim)
    needed = least * 4 * 3 // parts  # weights, gradients and one moment of each
    if parts > 1:
        needed += least * (4 if precision.name == "fp32" else 2)
    room = available_memory(device)
    if room is not None and needed > room:
        raise ResourceError(
            f"training this model takes more than {as_bytes(needed)} of memory, and {device} has "
            f"{as_bytes(room)} free.\nSet a smaller n_layers or emb_dim, or another MODEL."
        )


def _fit_into_memory(
    model: GPTModel,
    asked: TrainingConfig,
    windows: WindowPlan,
    precision: Precision,
    device: torch.device,
    micro_batch: int,
    parallel: Parallel,
    notices: list[str],
) -> int:
    """How many windows at a time there is memory for, at most micro_batch; shows the estimate.

    Raises ResourceError where there is none for a single one.
    """
    parts = parallel.world if parallel.kind == "fsdp" else 1
    share = windows.batch_size * asked.gradient_accumulation_steps // parallel.world
    for accumulates in (micro_batch < share, True):
        with whole(model, parallel):
            estimate = estimate_memory(
                model,
                n_tokens=windows.max_length,
                n_windows=micro_batch,
                precision=precision,
                device=device,
                optimizer=asked.optimizer,
                keeps_best=device.type != "cuda" and parallel.is_main,
                parts=parts,
                accumulates=accumulates,
            )
        room = available_memory(device)
        if room is not None:
            if device.type != "cuda":
                room //= parallel.local_world  # the others are about to take as much
            room += sum(p.nbytes for p in model.parameters()) // parts  # they are there already
        fitting = estimate.largest_fit(micro_batch, room)
        if parallel.lowest(fitting) == micro_batch:  # else a step has more of them
            break
    told, there = estimate.described(max(1, fitting)), "" if room is None else as_bytes(room)
    if fitting == 0:
        raise ResourceError(
            f"a step with a single window of {windows.max_length:,} tokens at a time takes about "
            f"{as_bytes(estimate.total(1))} of memory, and {device} has {there} free:\n"
            f"{told}.\n{ADVICE}"
        )
    fitting = parallel.lowest(fitting)
    needed = estimate.total(fitting)
    of_room = f" of {there} free" if there else ""
    say(f"Memory: about {as_bytes(needed)}{of_room}" + f" ({told})" * (needed > 1e9))
    if fitting < micro_batch:
        notices.append(
            f"memory: {fitting} windows at a time instead of {micro_batch}, which would take "
            f"{as_bytes(estimate.total(micro_batch))}; the batch stays the same"
        )
    return fitting


def _check_arithmetic(
    model: GPTModel, loader: DataLoader, precision: Precision, notices: list[str]
) -> Precision:
    """The precision to train in, after a look at what the GPU does with the model.

    Apple's GPUs have been wrong before, so what they compute is held against the CPU. On CUDA the
    attention kernel is named, because a wrong library on the path makes it a slow one.
    """
    device = next(model.parameters()).device
    if device.type == "mps":
        ids, targets = (part.to(device) for part in loader.dataset.__getitems__([0]))
        agreed = precision_that_agrees(model, ids, targets, precision)
        if agreed != precision:
            notices.append(f"precision is {agreed.name}: {agreed.reason}")
        return agreed
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for products that stay in fp32
        kernel = attention_kernel(model.config, precision, device)
        say(f"Attention: {kernel}")
        if kernel == "math" and precision.name != "fp32":
            notices.append("torch has no fused attention kernel for this GPU: training is slow")
    return precision


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


def _cap_workers(asked: int, processes: int, notices: list[str]) -> int:
    cores = max(1, (os.cpu_count() or 1) // processes)
    if asked > cores:
        notices.append(f"num_workers is lowered from {asked} to {cores}: so many cores are there")
    return min(asked, cores)


def _decide_precision(
    plan: RunPlan, saved: dict[str, Any] | None, device: torch.device
) -> Precision:
    """PRECISION, or what "auto" came to when the run began that goes on."""
    if saved is None or plan.run.PRECISION != "auto":
        return choose_precision(plan.run.PRECISION, device)
    return keep_precision(saved["precision"]["name"], device)


def _with_decisions(asked: TrainingConfig, saved: dict[str, Any] | None) -> TrainingConfig:
    """The hyper-parameters with what was worked out when the run began, where it goes on."""
    if saved is None:
        return asked
    before = saved["asked"]["training"]
    decided = {
        name: saved["training"][name]
        for name, value in asked.to_dict().items()
        if name in before and before[name] == value and name in saved["training"]
    }
    return dataclasses.replace(asked, **decided)


def _share_the_machine(
    plan: RunPlan,
    saved: dict[str, Any] | None,
    device: torch.device,
    most: int,
    parallel: Parallel,
    notices: list[str],
) -> tuple[int, int]:
    """How many threads to use and how many windows at a time, at most so many; a run that goes on
    keeps its own.

    NIGHT_MODE leaves half of the cores, or half of the GPU's memory, to others: a step then goes
    through its windows in smaller parts, with the same sum up to rounding.
    """
    night, micro_batch = plan.run.NIGHT_MODE, most
    threads = usual_threads = default_threads(parallel.local_world)
    if night and device.type == "cpu":
        threads = max(1, threads // 2)
    if night and device.type != "cpu":
        micro_batch = halved(most)
        memory = "half of the memory, " if limit_memory(device, 0.5) else ""
        notices.append(f"night mode: {memory}{micro_batch} windows at a time instead of {most}")
    if saved is not None and saved["settings"]["NIGHT_MODE"] == night:
        same_ranks = saved.get("ranks", 1) == parallel.world
        # a number set from outside is somebody's wish
        if same_ranks and not threads_are_set(parallel.local_world):
            threads = min(saved["threads"], os.cpu_count() or 1)
        before = saved.get("micro_batch")  # earlier versions kept none
        if same_ranks and isinstance(before, int) and before > 0:
            micro_batch = min(before, most)
    if noted := parallel.noted("micro_batch"):  # what a failure of this job has shown
        micro_batch = min(micro_batch, int(noted))
    if night and device.type == "cpu":
        notices.append(f"night mode: {threads} of {usual_threads} threads")
    return threads, micro_batch


def _count_steps(plan: RunPlan, training: TrainingConfig, steps_per_epoch: int) -> int:
    total_steps = training.max_steps or training.num_epochs * steps_per_epoch
    return min(total_steps, plan.most_steps or total_steps)


def _try_out(
    plan: RunPlan,
    saved: dict[str, Any] | None,
    asked: TrainingConfig,
    trial: Trial,
    steps_per_epoch: int,
    notices: list[str],
) -> tuple[Compiled, TrainingConfig]:
    """What only a tried step tells: whether to compile, and the steps of a time budget.

    A run that goes on keeps both.
    """
    requested, why = plan.run.COMPILE, None
    if requested == "auto" and saved is not None and isinstance(saved.get("compiled"), bool):
        requested, why = saved["compiled"], "as when this run began"
    has_budget = asked.time_budget_minutes is not None and asked.max_steps is None
    if asked.time_budget_minutes is not None and plan.training.max_steps is not None:
        notices.append("time_budget_minutes is not used: max_steps, where set, alone ends the run")
    budget_s = 60 * asked.time_budget_minutes if has_budget else None
    total_steps = None if has_budget else _count_steps(plan, asked, steps_per_epoch)
    compiled = decide_compiling(requested, trial, total_steps, budget_s)
    if why is not None and compiled.on == requested:
        compiled = Compiled(compiled.on, why)
    elif requested is True and not compiled.on:
        notices.append(f"the model is not compiled: {compiled.reason}")
    say(f"Compile: {'on' if compiled.on else 'off'} ({compiled.reason})")
    if has_budget:
        max_steps = steps_in(budget_s, trial, asked)
        minutes = asked.time_budget_minutes
        notices.append(f"{max_steps:,} steps are expected to take {minutes:g} minutes")
        asked = dataclasses.replace(asked, max_steps=max_steps)
    return compiled, asked


def _complete_training(
    asked: TrainingConfig,
    windows: WindowPlan,
    total_steps: int,
    notices: list[str],
) -> TrainingConfig:
    """Fill in every value that was left to be worked out; adds to the notices."""
    warmup_steps = asked.warmup_steps
    if warmup_steps is None:
        warmup_steps = default_warmup_steps(total_steps)
    elif warmup_steps >= total_steps:
        warmup_steps = total_steps - 1
        notices.append(
            f"warmup_steps is lowered from {asked.warmup_steps} to {warmup_steps}: the run has "
            f"{total_steps} steps"
        )
    return dataclasses.replace(
        asked,
        eval_freq=asked.eval_freq or default_eval_freq(total_steps),
        batch_size=windows.batch_size,
        max_length=windows.max_length,
        stride=windows.stride,
        warmup_steps=warmup_steps,
    )


def _choose_run(plan: RunPlan, parallel: Parallel) -> RunFolder:
    """Where the run will be kept; it is better to know that it can't be before a long wait."""
    output_dir = Path(plan.run.OUTPUT_DIR).expanduser()
    existing = next(parent for parent in (output_dir / "x").absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ResourceError(
            f"can't make the folder {output_dir}: {existing} is a file.\n"
            "Set OUTPUT_DIR to another folder."
        )
    return choose_run(
        plan.asked(),
        output_dir=output_dir,
        run_name=plan.run.RUN_NAME,
        # what torchrun has begun before a failure is not begun anew
        resume=(plan.run.RESUME is False and parallel.noted("run")) or plan.run.RESUME,
        new_name=f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{plan.mode}",
        data=_data_as_json(plan),
    )


def _data_as_json(plan: RunPlan) -> Any:
    """DATA as settings.json has it: text in place of paths, lists in place of tuples."""
    return json.loads(json.dumps(plan.run.DATA, default=os.fspath))


def _read_text(plan: RunPlan, run: RunFolder, parallel: Parallel) -> TokenizedText:
    """The text as tokens; a run that goes on gets the one it was begun with, or none."""
    spec = parse_data(plan.run.DATA)
    same_data = run.saved is not None and run.saved["settings"]["DATA"] == _data_as_json(plan)

    def read(stand_in: bool | None) -> TokenizedText:
        ratio = plan.training.train_ratio
        return tokenize(spec, plan.run.TOKENIZER, ratio, usable_cache(), stand_in=stand_in)

    try:
        # the others find the tokens that the main one has made, as a rule
        first = parallel.on_main(lambda: read(run.saved["stood_in"] if same_data else None))
        stood_in = parallel.broadcast(None if first is None else first.stood_in)
        text = parallel.local_first(lambda: first or read(stood_in))
    except DataError as error:
        if not same_data:
            raise
        raise DataError(
            f"{error}\nThe unfinished run {run.path} goes on with this text only; RESUME = False "
            "begins a new one."
        ) from error
    _show_text(text, spec)
    parallel.require_same(text=text.sha256, tokenizer=text.tokenizer.fingerprint)
    return text


def _as_words(plan: RunPlan) -> dict[str, str]:
    """The settings that have to be the same in all processes of a run, each as JSON."""
    settings = plan.asked() | {
        name: getattr(plan.run, name)
        for name in ("DATA", "DEVICE", "PARALLEL", "COMPILE", "NIGHT_MODE")
    }
    return {
        name: json.dumps(value, default=os.fspath, sort_keys=True)
        for name, value in settings.items()
    }


def _share_of_a_batch(asked: TrainingConfig, windows: WindowPlan, parallel: Parallel) -> int:
    """How many windows a rank goes through at a time, at most batch_size of its share of a step.

    Raises SettingsError where ranks can't have equal shares.
    """
    accumulation, world = asked.gradient_accumulation_steps, parallel.world
    step_size = windows.batch_size * accumulation
    if step_size % world:
        below, above = step_size // world * world, -(-step_size // world) * world
        nearest = f"{below} or {above}" if below else f"{above}"
        raise SettingsError(
            f"a step of {step_size} windows (batch_size {windows.batch_size} x "
            f"gradient_accumulation_steps {accumulation}) can't be divided among {world} "
            f"processes.\nThe nearest sizes that can: {nearest}. Set custom_params so, or start "
            "as many processes as divide it."
        )
    return min(windows.batch_size, step_size // world)


def _describe_run(
    env: RuntimeEnv,
    plan: RunPlan,
    windows: WindowPlan,
    steps_per_epoch: int,
    adapted: list[str],
) -> None:
    settings = {
        "mode": plan.mode,
        "settings": dataclasses.asdict(plan.run) | {"DATA": _data_as_json(plan)},
        "asked": plan.asked(),
        "model_name": plan.model_name,
        "model": dataclasses.asdict(env.model_config),
        "training": env.train_config.to_dict(),
        "sampling": dataclasses.asdict(plan.sampling),
        "device": env.device.type if env.parallel.world > 1 else str(env.device),
        "ranks": env.parallel.world,
        "parallel": env.parallel.kind,
        "precision": {"name": env.precision.name, "reason": env.precision.reason},
        "threads": env.threads,
        "compiled": env.compiled.on,
        "why_compiled": env.compiled.reason,
        "micro_batch": env.train_loader.batch_sampler.micro_batch,
        "tokenizer": env.tokenizer.fingerprint,
        "stood_in": env.text.stood_in,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": env.total_steps,
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
    data = env.text.report | {
        "tokenizer_id": env.tokenizer.fingerprint,
        "tokens_sha256": env.text.sha256,
        "split": split,
        "notices": env.text.notices,
    }
    env.run.describe(settings, data, env.text.tokenizer_file)


# --------------------------------------------------------------------------------- showing


def _show_machine(
    device: torch.device, precision: Precision, plan: RunPlan, parallel: Parallel = ALONE
) -> None:
    say(f"Device: {device.type.upper()}")
    if not parallel.is_alone:
        name = {"ddp": "DDP, the model whole on each", "fsdp": "FSDP2, the model in parts"}
        say(f"Parallel: {parallel.world} processes ({name[parallel.kind]})")
    elif plan.run.PARALLEL != "auto":
        say(f"Note: PARALLEL is for torchrun's processes, and this one is alone ({HOW_MANY})")
    elif device.type == "cuda" and (count := device_count("cuda")) > 1:
        say(f"Note: one of {count} GPUs is used ({HOW_MANY})")
    if device.type != "cpu":
        say(f"GPU: {device_name(device)}")
    elif plan.run.DEVICE is None and parallel.is_main and (reason := why_no_gpu()):
        say(f"Note: {reason}")
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
    total_steps: int,
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
        f"  {total_steps:,} steps of {_batch_shown(training)} x {training.max_length} "
        f"tokens, learning rate {training.learning_rate:.3g} ({training.schedule}, "
        f"{training.warmup_steps} warm-up steps)"
    )
    say("✓ Data loaders ready")


def _show_windows(text: TokenizedText, windows: WindowPlan, model: GPTModel) -> None:
    for line in describe_text(text.report, windows, model.count_parameters()):
        say(f"  {line}")
    say(
        f"  {windows.n_train:,} tokens to train on in {windows.n_windows:,} windows "
        f"({windows.n_unused} left over), {windows.n_val:,} to validate on"
    )


def _batch_shown(training: TrainingConfig) -> str:
    accumulation = training.gradient_accumulation_steps
    return (
        f"{training.batch_size}" if accumulation == 1 else f"{accumulation} x {training.batch_size}"
    )
