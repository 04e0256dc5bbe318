"""The weights that a run begins from: INIT_FROM opened, or what a resumed run has kept of it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distributed.parallel import Parallel
from engine.console import say
from engine.errors import CheckpointError, DataError, PipelineError, SettingsError, first_line
from engine.lora import add_lora
from engine.memory import count_trained
from engine.processor import return_large_blocks
from engine.words import Words
from exchange.opening import frame_of, open_pretrained
from model import GPTConfig, GPTModel
from planning.fine_tuning import LARGE, SMOLLM2, begin_from
from planning.machine import Machine, choose_frozen
from planning.plan import AUTO_START, RunPlan, Start
from planning.runs import Candidate, Candidates, SettledRun
from storage.checkpoint import has_checkpoint, load_weights, read_frozen
from storage.files import make_folder, write_atomically
from text.tokenizer import GPT2_FINGERPRINT

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Beginning:
    """Weights to begin from, TOKENIZER's value for their tokenizer, and how to read them."""

    start: Start
    tokenizer: str
    read: Callable[[GPTConfig], Tensors]  # fitted to a model; on the main rank


def find_beginning(
    plan: RunPlan, candidates: Candidates, cache: Path, parallel: Parallel
) -> tuple[RunPlan, Candidates, Beginning | None]:
    """What INIT_FROM names, or None; the plan with its model and tokenizer, but for "auto" of a new
    run; and the runs that may be resumed, which began from the same.

    A run with a checkpoint needs those weights no more: where they can't be opened, it goes on from
    its record. "auto" is what the likeliest run began from, or what is at hand. Raises as
    open_pretrained() does, SettingsError where a setting contradicts the weights, and
    CheckpointError if a named run began from others. Collective.
    """
    if plan.run.INIT_FROM is None:
        return plan, candidates, None
    found = parallel.on_main(lambda: _open(plan, candidates))
    opened = None if found is None else found[0]
    facts = None if opened is None else opened.facts
    facts, candidates = parallel.broadcast((facts, candidates if found is None else found[1]))
    if facts is None:
        return plan, candidates, None
    name = parallel.local_first(lambda: facts.keep_tokenizer(cache))
    read = _none if opened is None else opened.read  # only the main rank reads
    likeliest = candidates.likeliest_run
    if plan.run.names_weights:
        plan = begin_from(plan, facts.start, name)
    elif likeliest is not None and likeliest.record.start is not None:
        # also where its text turns out to be another now, and a new run begins
        why = Words(
            f"the weights that {likeliest.path} began from; RESUME = False chooses again",
            f"{likeliest.path} 当初的起始权重；RESUME = False 会重新选择",
        )
        plan = begin_from(plan, facts.start, name)
        plan = replace(plan, origins=plan.origins | {"start": why})
    return plan, candidates, Beginning(facts.start, name, read)


def begin_with(
    weights: Beginning | None,
    plan: RunPlan,
    model: GPTModel,
    run: SettledRun,
    machine: Machine,
    *,
    lora_rank: int | None = None,
) -> None:
    """Set the model of a run that begins from weights to these, fitted to its context and
    vocabulary, unless there is a checkpoint to restore. With lora_rank, freeze them and add an
    adapter; a checkpoint holds that alone, and the run's folder the weights. Collective."""
    if weights is None or plan.start is None:
        return
    parallel = machine.parallel
    if lora_rank is not None and parallel.kind == "fsdp":
        raise SettingsError(
            f'PARALLEL = "fsdp" can\'t train with lora_rank ({lora_rank}); set PARALLEL = "ddp"'
        )
    before = run.before
    goes_on = parallel.from_main(lambda: before is not None and has_checkpoint(run.path))
    # in half precision a step is faster, and its activations take half the memory
    is_slow = machine.device.type == "cpu" and machine.precision.name == "fp32"
    if is_slow and model.count_parameters() >= LARGE:
        return_large_blocks()
    if goes_on and lora_rank is None:
        return

    def read() -> Tensors:
        if goes_on and before is not None:
            return read_frozen(run.path, before.run_id)
        return weights.read(model.config)

    load_weights(model, parallel.on_main(read) or {}, weights.start.source, parallel)
    if lora_rank is not None:
        add_lora(model, lora_rank, plan.run.SEED, choose_frozen(machine))
        counts = f"{count_trained(model):,} of {model.count_parameters():,}"
        say(f"LoRA of rank {lora_rank}: {counts} parameters are trained")


def _none(config: GPTConfig) -> Tensors:
    return {}


@dataclass(frozen=True)
class _Facts:
    """What all ranks are told of weights."""

    start: Start
    tokenizer_id: str  # its fingerprint
    tokenizer_json: str

    def keep_tokenizer(self, cache: Path) -> str:
        """TOKENIZER's value for the tokenizer, which is kept in the cache by its source's name."""
        if self.tokenizer_id == GPT2_FINGERPRINT:
            return "gpt2"
        name = re.sub(r"[^\w.-]+", "-", self.start.source).strip(".-")[:60] or "tokenizer"
        file = cache / "tokenizers" / self.tokenizer_id / name / "tokenizer.json"
        content = self.tokenizer_json.encode("utf-8")
        if not file.is_file() or file.read_bytes() != content:
            make_folder(file.parent)
            write_atomically(file, content)
        return str(file)


@dataclass(frozen=True)
class _Opened:
    facts: _Facts
    read: Callable[[GPTConfig], Tensors]


def _open(plan: RunPlan, candidates: Candidates) -> tuple[_Opened | None, Candidates]:
    where, is_auto = str(plan.run.INIT_FROM), plan.run.INIT_FROM == AUTO_START
    if is_auto:
        candidates = candidates.of_one_start(plan.data)
    run = candidates.likeliest_run
    if run is not None and run.record.start is None:
        run = None  # with another text now, a new run chooses between both starts again
    try:
        found = open_pretrained(SMOLLM2 if is_auto else where)
    except (CheckpointError, DataError, SettingsError) as error:
        if run is not None and has_checkpoint(run.path):
            say(f"Note: {first_line(error)} {run.path} has weights of its own, and goes on")
            return _kept(run, error), candidates
        if is_auto and run is None:
            say(f'Note: INIT_FROM = "{AUTO_START}": {first_line(error)}')
            return None, candidates
        raise
    tokenizer = found.tokenizer
    if frame := frame_of(tokenizer):
        say(f"Note: {found.source}: its tokenizer puts {frame} around a text elsewhere; not here")
    start = Start(found.source, found.fingerprint, found.config, found.chat_template)
    facts = _Facts(start, tokenizer.fingerprint, tokenizer.to_json())
    if run is not None:
        candidates = candidates.from_weights(start.fingerprint)
    return _Opened(facts, found.fitted), candidates


def _kept(run: Candidate, error: PipelineError) -> _Opened:
    """What a run has kept of the weights that it began from, which can't be opened any more."""
    record, file = run.record, run.path / "tokenizer.json"
    assert record.start is not None

    # for a new run, where it turns out that the text has changed
    def read(config: GPTConfig) -> Tensors:
        raise error

    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise CheckpointError(f"{file} can't be read: {fault}") from None
    return _Opened(_Facts(record.start, record.tokenizer, content), read)
