"""The one place where a run is built and wired: settings in, RuntimeEnv out."""

import dataclasses
import gc
import sys
import tempfile
import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from data import TokenSlice, WindowPlan, make_loaders, measure_tokens, plan_windows
from distributed.parallel import Parallel, join
from engine.console import in_kernel, say
from engine.errors import DataError, ResourceError
from engine.memory import as_bytes
from engine.metrics import TokenSize
from engine.optim import build_optimizer, default_learning_rate
from engine.precision import Precision
from engine.processor import prepare_processor
from exchange.saved_run import LoadedRun, load_run  # noqa: F401  users know them by this room
from model import GPTModel
from planning.decisions import KeptPrecision, RunRecord, decide_training, keep_identity
from planning.machine import (
    Machine,
    check_arithmetic,
    check_devices,
    decide_machine,
    find_machine,
    fit_into_memory,
    fresh_model,
    pick_device,  # noqa: F401  scripts know it by this room
)
from planning.plan import RunPlan, resolve_settings
from planning.preflight import show_machine, show_model, show_text, show_training, show_windows
from planning.runs import Candidates, SettledRun, find_candidates, settle_run
from planning.settings_file import read_given_settings
from planning.trial import Compiled, Trial, try_out
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
    """Everything that a run needs, built and wired; what prepare_environment() returns.

    What was decided on the way is in run.record.
    """

    device: torch.device
    model: GPTModel
    train_loader: DataLoader
    val_loader: DataLoader
    optimizer: torch.optim.Optimizer
    train_config: TrainingConfig
    tokenizer: Tokenizer
    learner: Learner
    run: RunFolder
    token_size: TokenSize

    @property
    def parallel(self) -> Parallel:
        """The processes that train the run together."""
        return self.learner.parallel

    @property
    def precision(self) -> Precision:
        """The format that the run computes in."""
        return self.learner.precision


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
    parallel.require_same(**plan.as_words())
    parallel.choose_kind(plan.run.PARALLEL)
    candidates = parallel.broadcast(parallel.on_main(lambda: _find_candidates(plan, parallel)))
    machine = find_machine(plan, parallel)
    show_machine(machine, plan)

    text = _read_text(plan, candidates, parallel)
    run = settle_run(candidates, text.tokenizer.fingerprint, text.sha256)
    asked = decide_training(plan.training, run.before)
    windows, about_windows = _cut(text, plan, asked)
    machine = decide_machine(machine, plan, asked, windows, run.before)

    model = fresh_model(plan, asked, windows, text.tokenizer.vocab_size, machine)
    show_model(plan.model_name, model)
    machine = fit_into_memory(machine, model, asked, windows)
    train_loader, val_loader = _make_loaders(text, plan, asked, windows, machine)
    machine = check_arithmetic(machine, model, train_loader)
    rate = asked.learning_rate or default_learning_rate(model.config.emb_dim, asked.optimizer)
    asked = dataclasses.replace(asked, learning_rate=rate)
    optimizer = build_optimizer(asked.optimizer, model, rate, asked.weight_decay)

    trial = Trial.of(machine, model, optimizer, train_loader)
    compiled, training, about_trial = try_out(plan, asked, windows, trial, run.before)
    adapted = [*about_windows, *machine.notices, *about_trial]
    record = _make_record(
        plan, candidates, text, trial, training, compiled=compiled, adapted=adapted
    )

    show_training(record)
    show_windows(text, windows, model)
    batch = [part.to(machine.device) for part in train_loader.dataset.__getitems__([0])]
    check_devices(model, optimizer, batch, machine.device)
    say(f"✓ Device consistency verified (using {machine.device})")
    return RuntimeEnv(
        device=machine.device,
        model=model,
        train_loader=train_loader,
        val_loader=val_loader,
        optimizer=optimizer,
        train_config=training,
        tokenizer=text.tokenizer,
        learner=trial.learner_of_the_run(),
        run=_run_folder(run, record, text, windows),
        token_size=measure_tokens(val_loader.dataset.tokens, text.tokenizer),
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


def _cut(text: TokenizedText, plan: RunPlan, asked: TrainingConfig) -> tuple[WindowPlan, list[str]]:
    return plan_windows(
        text.n_tokens,
        max_length=plan.model["context_length"],
        stride=asked.stride,
        batch_size=asked.batch_size,
        train_ratio=asked.train_ratio,
        n_train=text.n_train,
    )


def _make_loaders(
    text: TokenizedText,
    plan: RunPlan,
    asked: TrainingConfig,
    windows: WindowPlan,
    machine: Machine,
) -> tuple[DataLoader, DataLoader]:
    return make_loaders(
        TokenSlice(text.path, text.dtype, 0, text.n_tokens),
        windows,
        seed=plan.run.SEED,
        num_workers=machine.workers,
        device=machine.device,
        sampling=asked.sampling,
        accumulation=asked.gradient_accumulation_steps,
        micro_batch=machine.micro_batch,
        parallel=machine.parallel,
    )


def _make_record(
    plan: RunPlan,
    candidates: Candidates,
    text: TokenizedText,
    trial: Trial,
    training: TrainingConfig,
    *,
    compiled: Compiled,
    adapted: list[str],
) -> RunRecord:
    """All that was decided; adapted are the notices of it."""
    learner, parallel = trial.learner, trial.parallel
    return RunRecord(
        run_id=candidates.run_id,
        started=candidates.now,
        changes=[],
        mode=plan.mode,
        settings=dataclasses.asdict(plan.run) | {"DATA": plan.data},
        asked=plan.asked(),
        model_name=plan.model_name,
        model=learner.model.config,
        training=training,
        sampling=plan.sampling,
        device=learner.device.type if parallel.world > 1 else str(learner.device),
        ranks=parallel.world,
        parallel=parallel.kind,
        precision=KeptPrecision(learner.precision.name, learner.precision.reason),
        threads=trial.threads,
        micro_batch=learner.micro_batch,
        compiled=compiled.on,
        why_compiled=compiled.reason,
        tokenizer=text.tokenizer.fingerprint,
        stood_in=text.stood_in,
        steps_per_epoch=trial.steps_per_epoch,
        total_steps=plan.count_steps(training, trial.steps_per_epoch),
        origins=plan.origins,
        adapted=adapted,
        torch=torch.__version__,
    )


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
        data=plan.data,
    )


def _read_text(plan: RunPlan, candidates: Candidates, parallel: Parallel) -> TokenizedText:
    """The text as tokens; a run that goes on gets the one it was begun with, or none."""
    spec = parse_data(plan.run.DATA)
    before = candidates.likeliest
    same_data = before is not None and before.settings["DATA"] == plan.data

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
