"""The one place where a run is built and wired: settings in, RuntimeEnv out."""

import dataclasses
import gc
import json
import os
import sys
import tempfile
import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from data import TokenSlice, WindowPlan, make_loaders, measure_tokens, plan_windows
from distributed.parallel import ALONE, Parallel, join
from engine.console import in_kernel, say
from engine.errors import DataError, ResourceError
from engine.memory import as_bytes
from engine.metrics import TokenSize
from engine.optim import (
    Schedule,
    build_optimizer,
    default_eval_freq,
    default_learning_rate,
    default_warmup_steps,
    make_schedule,
)
from engine.precision import Precision
from engine.processor import prepare_processor
from exchange.saved_run import LoadedRun, load_run  # noqa: F401  users know them by this room
from generation import SamplingConfig
from model import GPTConfig, GPTModel
from planning.decisions import KeptPrecision, RunRecord, keep_identity
from planning.machine import (
    check_arithmetic,
    check_devices,
    decide_micro_batch,
    decide_precision,
    decide_threads,
    decide_workers,
    fit_into_memory,
    fresh_model,
    pick_device,
    share_of_a_batch,
)
from planning.plan import RunPlan, resolve_settings
from planning.preflight import (
    show_machine,
    show_model,
    show_text,
    show_training,
    show_windows,
)
from planning.runs import Candidates, SettledRun, find_candidates, settle_run
from planning.settings_file import read_given_settings
from planning.trial import (
    Compiled,
    Trial,
    count_steps,
    try_out,
)
from storage.files import make_folder, write_atomically
from storage.tracking import check_trackers
from text.sources import parse_data
from text.token_cache import TokenizedText, tokenize
from text.tokenizer import Tokenizer
from training.learner import Learner
from training.run_folder import RunFolder
from training_utils import TrainingConfig

CACHE = Path(__file__).resolve().parent / "cache"
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
    learner: Learner
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
    candidates = parallel.broadcast(parallel.on_main(lambda: _find_candidates(plan, parallel)))
    device = pick_device(plan.run.DEVICE, parallel)
    likely = decide_precision(plan.run.PRECISION, device, candidates.likeliest)
    show_machine(device, likely, plan, parallel)

    parallel.require_same(device=device.type)
    text = _read_text(plan, candidates, parallel)
    tokenizer = text.tokenizer
    run = settle_run(candidates, tokenizer.fingerprint, text.sha256)
    precision = decide_precision(plan.run.PRECISION, device, run.before)
    if precision != likely:  # another run goes on than was to be expected, or none
        say(f"Precision: {precision.name} ({precision.reason})")
    parallel.require_same(precision=precision.name)
    asked = _with_decisions(plan.training, run.before)
    windows, notices = plan_windows(
        text.n_tokens,
        max_length=plan.model["context_length"],
        stride=asked.stride,
        batch_size=asked.batch_size,
        train_ratio=asked.train_ratio,
        n_train=text.n_train,
    )
    most = share_of_a_batch(asked, windows, parallel)
    night = plan.run.NIGHT_MODE
    micro_batch, about_memory = decide_micro_batch(night, device, most, parallel, run.before)
    threads, about_threads = decide_threads(night, device, parallel, run.before)

    config = GPTConfig(
        **plan.model | {"context_length": windows.max_length, "vocab_size": tokenizer.vocab_size}
    )
    model = fresh_model(plan, asked, config, device, precision, parallel)
    show_model(plan.model_name, model)
    micro_batch, about_fit = fit_into_memory(
        model, asked, windows, precision, device, micro_batch, parallel
    )
    workers, about_workers = decide_workers(asked.num_workers, parallel.local_world)
    train_loader, val_loader = make_loaders(
        TokenSlice(text.path, text.dtype, 0, text.n_tokens),
        windows,
        seed=plan.run.SEED,
        num_workers=workers,
        device=device,
        sampling=asked.sampling,
        accumulation=asked.gradient_accumulation_steps,
        micro_batch=micro_batch,
        parallel=parallel,
    )
    precision, about_arithmetic = check_arithmetic(model, train_loader, precision)
    notices += about_memory + about_threads + about_fit + about_workers + about_arithmetic
    rate = asked.learning_rate or default_learning_rate(model.config.emb_dim, asked.optimizer)
    asked = dataclasses.replace(asked, learning_rate=rate)
    optimizer = build_optimizer(asked.optimizer, model, rate, asked.weight_decay)
    steps_per_epoch = train_loader.batch_sampler.n_steps
    # a rank that has the whole model tries its steps without the others
    others = parallel if parallel.kind == "fsdp" else ALONE
    tried = Learner(model, optimizer, precision, others, micro_batch=micro_batch)
    trial = Trial(tried, train_loader, threads, parallel)
    compiled, asked = try_out(plan, run.before, asked, trial, steps_per_epoch, notices)
    total_steps = count_steps(plan, asked, steps_per_epoch)
    training, about_warmup = _complete_training(asked, windows, total_steps)
    notices += about_warmup
    show_training(plan.mode, training, total_steps, notices)
    show_windows(text, windows, model)
    batch = [part.to(device) for part in train_loader.dataset.__getitems__([0])]
    check_devices(model, optimizer, batch, device)
    say(f"✓ Device consistency verified (using {device})")
    record = RunRecord(
        run_id=candidates.run_id,
        started=candidates.now,
        changes=[],
        mode=plan.mode,
        settings=dataclasses.asdict(plan.run) | {"DATA": _data_as_json(plan)},
        asked=plan.asked(),
        model_name=plan.model_name,
        model=model.config,
        training=training,
        sampling=plan.sampling,
        device=device.type if parallel.world > 1 else str(device),
        ranks=parallel.world,
        parallel=parallel.kind,
        precision=KeptPrecision(precision.name, precision.reason),
        threads=threads,
        micro_batch=tried.micro_batch,
        compiled=compiled.on,
        why_compiled=compiled.reason,
        tokenizer=tokenizer.fingerprint,
        stood_in=text.stood_in,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        origins=plan.origins,
        adapted=notices,
        torch=torch.__version__,
    )
    return RuntimeEnv(
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
        learner=Learner(model, optimizer, precision, parallel, micro_batch=tried.micro_batch),
        compiled=compiled,
        schedule=make_schedule(
            training.schedule, training.learning_rate, training.warmup_steps, total_steps
        ),
        total_steps=total_steps,
        sampling=plan.sampling,
        run=_run_folder(run, record, text, windows),
        text=text,
        token_size=measure_tokens(val_loader.dataset.tokens, tokenizer),
        threads=threads,
        tracking=plan.run.TRACKING,
        seed=plan.run.SEED,
        log_every=plan.run.LOG_EVERY,
    )


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


# -------------------------------------------------------------------------------- building


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


def _with_decisions(asked: TrainingConfig, before: RunRecord | None) -> TrainingConfig:
    """The hyper-parameters with what was worked out when the run began, where it goes on."""
    if before is None:
        return asked
    then = before.asked.training.to_dict()
    became = before.training.to_dict()
    decided = {n: became[n] for n, value in asked.to_dict().items() if then[n] == value}
    return dataclasses.replace(asked, **decided)


def _complete_training(
    asked: TrainingConfig, windows: WindowPlan, total_steps: int
) -> tuple[TrainingConfig, list[str]]:
    """Fill in every value that was left to be worked out; returns notices, too."""
    warmup_steps, notices = asked.warmup_steps, []
    if warmup_steps is None:
        warmup_steps = default_warmup_steps(total_steps)
    elif warmup_steps >= total_steps:
        warmup_steps = total_steps - 1
        notices.append(
            f"warmup_steps is lowered from {asked.warmup_steps} to {warmup_steps}: the run has "
            f"{total_steps} steps"
        )
    complete = dataclasses.replace(
        asked,
        eval_freq=asked.eval_freq or default_eval_freq(total_steps),
        batch_size=windows.batch_size,
        max_length=windows.max_length,
        stride=windows.stride,
        warmup_steps=warmup_steps,
    )
    return complete, notices


def _find_candidates(plan: RunPlan, parallel: Parallel) -> Candidates:
    """Where the run may be kept; it is better to know that it can't be before a long wait."""
    output_dir = Path(plan.run.OUTPUT_DIR).expanduser()
    existing = next(parent for parent in (output_dir / "x").absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ResourceError(
            f"can't make the folder {output_dir}: {existing} is a file.\n"
            "Set OUTPUT_DIR to another folder."
        )
    return find_candidates(
        plan.asked(),
        output_dir=output_dir,
        run_name=plan.run.RUN_NAME,
        # what torchrun has begun before a failure is not begun anew
        resume=(plan.run.RESUME is False and parallel.noted("run")) or plan.run.RESUME,
        mode=plan.mode,
        data=_data_as_json(plan),
    )


def _data_as_json(plan: RunPlan) -> Any:
    """DATA as settings.json has it: text in place of paths, lists in place of tuples."""
    return json.loads(json.dumps(plan.run.DATA, default=os.fspath))


def _read_text(plan: RunPlan, candidates: Candidates, parallel: Parallel) -> TokenizedText:
    """The text as tokens; a run that goes on gets the one it was begun with, or none."""
    spec = parse_data(plan.run.DATA)
    before = candidates.likeliest
    same_data = before is not None and before.settings["DATA"] == _data_as_json(plan)

    def read(stand_in: bool | None) -> TokenizedText:
        ratio = plan.training.train_ratio
        return tokenize(spec, plan.run.TOKENIZER, ratio, usable_cache(), stand_in=stand_in)

    try:
        # the others find the tokens that the main one has made, as a rule
        first = parallel.on_main(lambda: read(before.stood_in if same_data else None))
        stood_in = parallel.broadcast(None if first is None else first.stood_in)
        text = parallel.local_first(lambda: first or read(stood_in))
    except DataError as error:
        if not same_data:
            raise
        raise DataError(
            f"{error}\nThe unfinished run {candidates.runs[0].path} goes on with this text only; "
            "RESUME = False begins a new one."
        ) from error
    show_text(text, spec)
    parallel.require_same(text=text.sha256, tokenizer=text.tokenizer.fingerprint)
    return text


def _as_words(plan: RunPlan) -> dict[str, str]:
    """The settings that have to be the same in all processes of a run, each as JSON."""
    settings = dataclasses.asdict(plan.asked()) | {
        name: getattr(plan.run, name)
        for name in ("DATA", "DEVICE", "PARALLEL", "COMPILE", "NIGHT_MODE")
    }
    return {
        name: json.dumps(value, default=os.fspath, sort_keys=True)
        for name, value in settings.items()
    }


def _run_folder(
    run: SettledRun, record: RunRecord, text: TokenizedText, windows: WindowPlan
) -> RunFolder:
    """Where the run will be kept, and what the folder is to tell of it."""
    notes = []
    if run.before is not None:
        record, notes = keep_identity(record, run.before)
    data = text.report | {
        "tokenizer_id": text.tokenizer.fingerprint,
        "tokens_sha256": text.sha256,
        "split": {
            "train_tokens": windows.n_train,
            "validation_tokens": windows.n_val,
            "train_windows": windows.n_windows,
            "tokens_left_over": windows.n_unused,
        },
        "notices": text.notices,
    }
    return RunFolder(
        path=run.path,
        named=run.named,
        goes_on=run.before is not None,
        record=record,
        data=data,
        tokenizer_file=text.tokenizer_file,
        notes=[*run.notes, *notes],
    )
