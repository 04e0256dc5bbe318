"""Builds a run: settings in, RuntimeEnv out."""

import dataclasses
import gc
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from data import (
    Conversations,
    TokenSlice,
    WindowPlan,
    make_loaders,
    measure_tokens,
    plan_packed,
    plan_windows,
    to_device,
)
from distributed.parallel import Parallel, join
from engine.console import in_kernel, say
from engine.memory import as_bytes
from engine.metrics import TokenSize
from engine.optim import Rules, build_optimizer
from engine.precision import Precision
from engine.processor import prepare_processor
from exchange.beginning import Beginning, begin_with, find_beginning
from exchange.saved_run import LoadedModel, load_run  # noqa: F401  users import them from here
from model import GPTModel
from planning.chat import (
    Question,
    about_chat,
    check_adapter,
    count_ids,
    find_chat,
    find_context,
    find_questions,
    pack_conversations,
)
from planning.decisions import decide_recipe, decide_tokenizer, decide_training, find_deadline
from planning.dry_run import end_dry_run
from planning.fine_tuning import decide_start
from planning.machine import (
    Machine,
    check_arithmetic,
    check_devices,
    decide_machine,
    find_machine,
    fit_into_memory,
    fresh_model,
    pick_device,  # noqa: F401  scripts import it from here
    set_attention,
)
from planning.outcome import make_folder_of, make_record
from planning.plan import RunPlan, resolve_settings
from planning.preflight import (
    show_all,
    show_card,
    show_machine,
    show_model,
    show_text,
    show_tokenizer,
)
from planning.prompt import fit_prompt
from planning.recipe import MachineFacts
from planning.runs import Candidates, candidates_of, settle_run
from planning.settings_file import read_given_settings
from planning.speed import measure_speed
from planning.trial import Trial, try_out
from planning.yardstick import measure_start
from storage.cache import usable_cache
from storage.tracking import check_trackers
from text.facts import TextFacts, find_facts
from text.sources import parse_data
from text.token_cache import TokenizedText, tokenize
from text.tokenizer import Tokenizer
from training.learner import Learner
from training.run_folder import RunFolder
from training_utils import TrainingConfig

_earlier_models: weakref.WeakSet[GPTModel] = weakref.WeakSet()  # of this process


@dataclass
class RuntimeEnv:
    """All that a run needs, as prepare_environment() returns it; run.record has the decisions."""

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
    prompts: list[str] | list[Question]  # of samples

    @property
    def parallel(self) -> Parallel:
        """The ranks that train the run."""
        return self.learner.parallel

    @property
    def precision(self) -> Precision:
        """The precision of the run."""
        return self.learner.precision


def prepare_environment(
    settings: str | Path | None = None, *, began_at: float | None = None
) -> RuntimeEnv:
    """Build a run from config_run.py, or from another settings file of the same shape.

    Reads config_run when called, so a script may set its attributes first. Writes only downloads
    and tokens, into cache/, and prints the decisions. The model of a resumed run has initial
    weights until train() loads the checkpoint. Under torchrun every process calls it and gets its
    share of the batches. Raises SettingsError with every wrong setting, DataError for the text,
    ResourceError for the device, CheckpointError if a named run can't be resumed, RunFinished if
    nothing is left to do or DRY_RUN is set. MINUTES count from began_at, by time.perf_counter();
    None: from this call.
    """
    began_at = time.perf_counter() if began_at is None else began_at
    _free_earlier_runs()
    prepare_processor()
    parallel = join()
    with parallel.watched():
        env = _prepare(settings, parallel, began_at)
    _earlier_models.add(env.model)
    return env


def _prepare(settings: str | Path | None, parallel: Parallel, began_at: float) -> RuntimeEnv:
    plan = resolve_settings(*read_given_settings(settings))
    check_trackers(plan.run.TRACKING)
    parallel.require_same(**plan.as_words())
    parallel.choose_kind(plan.run.PARALLEL)
    candidates = parallel.from_main(lambda: candidates_of(plan, parallel))
    plan, candidates, weights = find_beginning(plan, candidates, cache := usable_cache(), parallel)
    machine = find_machine(plan, cache, parallel)
    show_machine(machine, plan)
    plan, candidates = _choose_recipe(plan, candidates, weights, machine, cache)

    plan, text = _read_text(plan, candidates, cache, parallel)
    run = settle_run(candidates, text.tokenizer.fingerprint, text.sha256)
    asked = decide_training(plan, machine.device, text.n_tokens, run.before, parallel.world)
    deadline = find_deadline(plan, asked, began_at)
    asked, about_prompt = fit_prompt(asked, text)
    tokens, windows, prompts, about_windows = _cut(text, plan, asked)
    machine = decide_machine(machine, plan, asked, windows, run.before)
    model = fresh_model(plan, asked, windows, text.tokenizer.vocab_size, machine)
    show_model(plan, model)
    begin_with(weights, plan, model, run, machine, lora_rank=asked.lora_rank)
    set_attention(model, machine, plan, asked, windows, run.before)
    machine = fit_into_memory(machine, model, asked, windows)
    train_loader, val_loader = _make_loaders(tokens, plan, asked, windows, machine)
    token_size = measure_tokens(val_loader.dataset.scored_tokens(), text.tokenizer)
    plan = dataclasses.replace(plan, sampling=plan.sampling.fitted(token_size))
    machine = check_arithmetic(machine, model, train_loader)
    notices = [*about_prompt, *about_windows, *machine.notices]
    optimizer = _build_optimizer(model, asked)
    trial = Trial.of(machine, model, optimizer, train_loader, count_ids(prompts, text.tokenizer))
    plan = measure_start(plan, run.before, trial, val_loader, text.tokenizer)
    if plan.run.DRY_RUN:
        raise end_dry_run(run, plan, asked, windows, trial, machine=machine, notices=notices)
    plan, compiled, training, more = try_out(plan, asked, windows, trial, run.before, deadline)
    record = make_record(plan, candidates, text, trial, training, (compiled, notices + more))
    show_all(plan, record, text, windows, model)
    _verify_devices(model, optimizer, train_loader, machine.device)
    return RuntimeEnv(
        device=machine.device,
        model=model,
        train_loader=train_loader,
        val_loader=val_loader,
        optimizer=optimizer,
        train_config=training,
        tokenizer=text.tokenizer,
        learner=trial.learner_of_the_run(),
        run=make_folder_of(run, record, text, windows, deadline),
        token_size=token_size,
        prompts=prompts,
    )


def _free_earlier_runs() -> None:
    """Free the memory that earlier runs still hold in a notebook's kernel."""
    if not in_kernel():
        return
    errors = [getattr(sys, "last_value", None)] if _earlier_models else []
    for error in errors:  # a failed cell keeps its functions' frames, and they their closures
        if error is not None and error.__traceback__ is not None:
            error.__traceback__.tb_next = None  # the kernel too holds the first entry, its own
            error.__traceback__ = None
            errors += [e for e in (error.__cause__, error.__context__) if e not in errors]
    if "torch._inductor.compile_fx" in sys.modules:
        torch.compiler.reset()  # compiled steps hold memory
    gc.collect()
    if _earlier_models:
        n_bytes = sum(p.nbytes for model in _earlier_models for p in model.parameters())
        say(
            f"Note: an earlier model is still in memory ({as_bytes(n_bytes)}, and more for its "
            "optimizer):  del env  (or what its name is) before you prepare another frees it"
        )


def _cut(
    text: TokenizedText, plan: RunPlan, asked: TrainingConfig
) -> tuple[TokenSlice | Conversations, WindowPlan, list[str] | list[Question], list[str]]:
    """The text's tokens, or its conversations packed, how they are divided, the prompts of samples,
    and notices."""
    check_adapter(asked, text)
    sizes = {"max_length": find_context(text, plan), "batch_size": asked.batch_size}
    if packed := pack_conversations(text, sizes["max_length"], plan.run.SEED):
        assert text.n_train is not None, "conversations are never divided by position"
        windows, notices = plan_packed(packed, text.n_tokens, text.n_train, **sizes)
        prompts = find_questions(text, packed) or asked.prompts
        notices = about_chat(plan, asked, packed, windows.max_length) + notices
        return packed, windows, prompts, notices
    windows, notices = plan_windows(
        text.n_tokens,
        stride=asked.stride,
        train_ratio=asked.train_ratio,
        n_train=text.n_train,
        # "random" windows begin anywhere in any case
        shift_windows=asked.shift_windows and asked.sampling == "windows",
        **sizes,
    )
    tokens = TokenSlice(text.path, text.dtype, 0, text.n_tokens)
    return tokens, windows, asked.prompts, notices


def _make_loaders(
    tokens: TokenSlice | Conversations,
    plan: RunPlan,
    asked: TrainingConfig,
    windows: WindowPlan,
    machine: Machine,
) -> tuple[DataLoader, DataLoader]:
    return make_loaders(
        tokens,
        windows,
        seed=plan.run.SEED,
        num_workers=machine.workers,
        device=machine.device,
        sampling=asked.sampling,
        accumulation=asked.gradient_accumulation_steps,
        micro_batch=machine.micro_batch,
        parallel=machine.parallel,
    )


def _build_optimizer(model: GPTModel, asked: TrainingConfig) -> torch.optim.Optimizer:
    assert asked.learning_rate is not None, "decide_training() sets it"
    rules = Rules(asked.embedding_rate, asked.decay_embeddings, asked.beta2)
    return build_optimizer(asked.optimizer, model, asked.learning_rate, asked.weight_decay, rules)


def _verify_devices(
    model: GPTModel, optimizer: torch.optim.Optimizer, loader: DataLoader, device: torch.device
) -> None:
    batch = to_device(loader.dataset.__getitems__([0]), device)
    check_devices(model, optimizer, batch, device)
    say(f"✓ Device consistency verified (using {device})")


def _choose_recipe(
    plan: RunPlan,
    candidates: Candidates,
    weights: Beginning | None,
    machine: Machine,
    cache: Path,
) -> tuple[RunPlan, Candidates]:
    """The plan with what its text decides: with MINUTES the recipe, and those candidates whose text
    is this one; else the tokenizer, where that is "auto".

    A run from weights that INIT_FROM names has no recipe; with "auto" a new run takes the better of
    both.
    """
    fixed, minutes, parallel = plan.fixed, plan.run.MINUTES, machine.parallel
    if plan.start is not None or (minutes is None and plan.tokenizer != "auto"):
        return plan, candidates
    spec, ratio = parse_data(plan.run.DATA), plan.training.train_ratio
    stand_in, wanted = candidates.stand_in(plan.data), None if fixed is None else fixed.tokenizer

    def find(tokenizer: str | None) -> TextFacts:
        return find_facts(spec, ratio, cache, tokenizer=tokenizer, stand_in=stand_in)

    with candidates.naming_the_run(plan.data):
        facts = parallel.from_main(lambda: find(wanted))
    if minutes is None:
        plan = decide_tokenizer(plan, facts)
        show_tokenizer(plan, facts)
        return plan, candidates
    candidates = candidates.with_text(facts.fingerprint)
    before, ranks = candidates.likeliest, parallel.world

    def measure() -> MachineFacts:
        return measure_speed(machine, minutes)

    decided = parallel.from_main(lambda: decide_recipe(plan, facts, measure, before, ranks))
    if plan.run.INIT_FROM is not None and before is None:
        start = known = None
        if weights is not None:
            start, tokenizer = weights.start, weights.tokenizer
            known = parallel.from_main(lambda: find(tokenizer))
        decided = decide_start(plan, decided, start, known)
    if decided.start is None:
        show_card(decided)
    return decided, candidates


def _read_text(
    plan: RunPlan, candidates: Candidates, cache: Path, parallel: Parallel
) -> tuple[RunPlan, TokenizedText]:
    """The text as tokens, with the DATA of the likeliest candidate only that run's own text; and
    the plan with what it says of conversations."""
    spec, tokenizer, ratio = parse_data(plan.run.DATA), plan.tokenizer, plan.training.train_ratio
    stand_in = candidates.stand_in(plan.data)
    assert tokenizer is not None, "decide_recipe() sets it"

    def read(stand_in: bool | None) -> TokenizedText:
        start = plan.start
        return tokenize(
            spec,
            tokenizer,
            ratio,
            cache,
            stand_in=stand_in,
            is_free=start is None,
            chat_template=None if start is None else start.chat_template,
        )

    with candidates.naming_the_run(plan.data):
        # other ranks usually find the main rank's tokens in the cache
        first = parallel.on_main(lambda: read(stand_in))
        stood_in = parallel.broadcast(None if first is None else first.stood_in)
        text = parallel.local_first(lambda: first or read(stood_in))
    show_text(text, spec)
    parallel.require_same(text=text.sha256, tokenizer=text.tokenizer.fingerprint)
    return dataclasses.replace(plan, chat=find_chat(text)), text
