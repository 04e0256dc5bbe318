"""Runs side by side: their curves, what differs in their settings, which one is better."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError
from engine.precision import choose_precision
from engine.settings import names_on_resume
from engine.words import Words
from exchange.saved_run import load_run
from insight.curves import MetricsReader
from insight.paired import (
    LONGEST_CONTEXT,
    Blocks,
    Difference,
    Spread,
    find_difference,
    find_spread,
    plan_blocks,
    score_blocks,
)
from insight.run_text import DIVIDER, RunText, open_run_text, to_byte_pieces, to_bytes
from planning.decisions import RunRecord, read_record, read_run_file
from storage.files import DATA
from text.tokenizer import Tokenizer
from training_utils import TrainingConfig

LEAST_SHARED = 0.5  # of the longest validation text: what all runs must have at its end
LEAST_BLOCKS = 16  # of a text, for an interval
ENDING = 4  # times the bytes that are scored: the end of a text that they are taken from
# what may change on the way and still changes what is learnt
LENGTHS = ("num_epochs", "max_steps", "patience")
# what follows from the time that a run with MINUTES had
FROM_TIME = ("max_steps", "warmup_steps", "time_budget_minutes")


@dataclass(frozen=True)
class Curve:
    """A run's evaluations after its first step: arrays of one length."""

    steps: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray  # of training, without evaluations, samples and saves
    bits_per_byte: np.ndarray

    def at(self, of: str, value: float) -> float:
        """The bits a byte at a number of "tokens" or "seconds", between two evaluations."""
        return float(np.interp(value, getattr(self, of), self.bits_per_byte))


@dataclass(frozen=True)
class ComparedRun:
    """What the folder of a run has for a comparison."""

    path: Path
    name: str
    record: RunRecord
    facts: dict[str, Any]  # its data.json
    curve: Curve

    def settings(self) -> dict[str, Any]:
        """All that may make a difference, by its name."""
        record = self.record
        given = {name: record.settings[name] for name in ("SEED", "DATA", "MINUTES", "INIT_FROM")}
        decided = {
            "mode": record.mode,
            "tokenizer": self.facts.get("tokenizer", record.tokenizer),
            "model": record.model_name,
            "precision": record.precision.name,
            "device": record.device,
            "processes": record.ranks,
            "total_steps": record.total_steps,
            "conversations": None if record.chat is None else record.chat.rows,
            "chat_template": None if record.chat is None else record.chat.template,
        }
        model, training = dataclasses.asdict(record.model), record.training.to_dict()
        del training["model_overrides"]  # which the model's own fields are
        return given | decided | model | training

    def kind(self) -> str:
        """Equal for runs that differ in nothing but the seed, and what does not change numbers."""
        free = set(names_on_resume(TrainingConfig, "free")) - set(LENGTHS)
        left_out = free | {"SEED", "device", "processes", "model", "total_steps"}
        if self.record.settings["MINUTES"] is not None:
            left_out |= set(FROM_TIME)
        kept = {name: value for name, value in self.settings().items() if name not in left_out}
        text = self.facts.get("tokens_sha256")
        return json.dumps([kept, text, self.record.tokenizer], sort_keys=True, default=str)


@dataclass(frozen=True)
class Standing:
    """A run's place in a comparison."""

    run: ComparedRun
    bits_per_byte: float | None  # of the text that all are scored on; None: there is no such text
    difference: Difference | None  # to the best one; None: it is the best one, or no verdict
    at_tokens: float  # bits a byte by its own evaluations: at the same tokens, time, and the end
    at_seconds: float
    at_end: float


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, the best one first."""

    standings: list[Standing]
    tokens: float  # that each has trained on at least: where at_tokens is
    seconds: float
    differing: dict[str, list[Any]]  # settings that differ: name -> the value of each standing
    scored_bytes: int  # of validation text that all were scored on; 0: no verdict
    spread: Spread | None
    why_none: Words | None  # there is no verdict


def read_compared(path: Path) -> ComparedRun:
    """A run for a comparison; CheckpointError for no run, DataError if it has no evaluation."""
    record, facts = read_record(path), read_run_file(path / DATA)
    curve = read_curve(path / "metrics.jsonl")
    if not len(curve.steps):
        raise DataError(
            f"{path} has no evaluation after its first step, so there is nothing to compare.\n"
            "Train it further, or leave it out."
        )
    return ComparedRun(path, path.resolve().name, record, facts, curve)


def read_curve(file: Path) -> Curve:
    """The evaluations in a metrics.jsonl; lines that are damaged count as missing."""
    points, tokens, counted, seconds = [], 0, 0, 0.0
    _, rows = MetricsReader(file).read()
    for row in rows:
        try:
            tokens = row.get("train/tokens", tokens)
            if "val/bits_per_byte" not in row or row["step"] == 0:
                continue
            seconds += (tokens - counted) / max(1e-9, row["train/tok_per_sec"])
            counted = tokens
            points.append((int(row["step"]), tokens, seconds, float(row["val/bits_per_byte"])))
        except (ValueError, KeyError, TypeError):
            continue
    columns = np.array(points, dtype=np.float64).reshape(-1, 4).T
    return Curve(*columns)


def compare(
    runs: Sequence[ComparedRun], *, device: str | None, most_bytes: int, progress: Any = iter
) -> Comparison:
    """Compare two or more runs; `progress` passes on the runs as they are scored.

    Each is scored with its best weights on the same blocks of validation text. Runs whose
    validation texts differ, are gone, or hold conversations get no verdict, and the order of
    their last evaluations. Raises what load_run() raises.
    """
    blocks, texts, why_none = _shared_blocks(runs, most_bytes)
    bits: list[np.ndarray] = []
    if blocks is not None:
        for run, text in zip(progress(runs), texts, strict=True):
            bits.append(_score(run, text, blocks, device))
    n_bytes = 0 if blocks is None else _count_scored(texts[0], blocks)
    scores = [of_run.sum().item() / n_bytes for of_run in bits]
    tokens = min(run.curve.tokens[-1] for run in runs).item()
    seconds = min(run.curve.seconds[-1] for run in runs).item()
    key = scores or [run.curve.bits_per_byte[-1].item() for run in runs]
    order = sorted(range(len(runs)), key=key.__getitem__)
    spread = _spread_of(runs, scores) if scores else None

    def difference(number: int) -> Difference | None:
        if spread is None or number == order[0]:
            return None
        return find_difference(bits[number], bits[order[0]], spread, n_models=len(runs))

    standings = [
        Standing(
            runs[number],
            scores[number] if scores else None,
            difference(number),
            runs[number].curve.at("tokens", tokens),
            runs[number].curve.at("seconds", seconds),
            runs[number].curve.bits_per_byte[-1].item(),
        )
        for number in order
    ]
    differing = find_differing([standing.run.settings() for standing in standings])
    return Comparison(standings, tokens, seconds, differing, n_bytes, spread, why_none)


def find_differing(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all, with the value of each; None where it lacks."""
    names = dict.fromkeys(name for of_run in settings for name in of_run)
    values = {name: [of_run.get(name) for of_run in settings] for name in names}
    return {
        name: of_runs
        for name, of_runs in values.items()
        if any(value != of_runs[0] for value in of_runs)
    }


def _spread_of(runs: Sequence[ComparedRun], scores: Sequence[float]) -> Spread:
    """The spread between seeds; of several runs with one seed, which tell nothing of it, one."""
    groups: dict[str, dict[int, float]] = {}
    for run, score in zip(runs, scores, strict=True):
        groups.setdefault(run.kind(), {}).setdefault(run.record.settings["SEED"], score)
    return find_spread([list(group.values()) for group in groups.values()])


def _shared_blocks(
    runs: Sequence[ComparedRun], most_bytes: int
) -> tuple[Blocks | None, list[RunText], Words | None]:
    """Blocks of the validation text that all runs have; their texts; and why there are none.

    Where tokenizers differ, a text that is split by position may be cut at another character: then
    the end that all have counts.
    """
    if chats := [run.name for run in runs if run.record.chat is not None]:
        why = Words(
            f"{chats[0]} learned conversations, of which the answers alone count, but parts of a "
            "text have the questions too. The runs are in the order of their last evaluations",
            f"{chats[0]} 学的是对话，只有回答计分，而文本的片段里也有问题。各次运行按最后一次评估"
            "排列",
        )
        return None, [], why
    texts = []
    for run in runs:
        try:
            texts.append(open_run_text(run.path))
        except DataError as error:
            said = " ".join(str(error).split())
            return None, [], Words(said, f"{run.name} 的文本已改变或无法读取（{said}）")
    sizes = [_size_of(text.val, text.tokenizer) for text in texts]
    shared, longest = min(sizes), max(sizes)
    if (
        shared < LEAST_SHARED * longest
        or len({_digest(text, size - shared) for text, size in zip(texts, sizes, strict=True)}) > 1
    ):
        return None, [], Words("the runs have different validation texts", "各次运行的验证文本不同")
    n_bytes = min(shared, ENDING * most_bytes)
    blocks = plan_blocks(n_bytes, most_bytes)
    if len(blocks.numbers) < LEAST_BLOCKS:
        return (
            None,
            [],
            Words(
                f"a validation text of {shared:,} bytes is too short for a verdict",
                f"{shared:,} 字节的验证文本太短，得不出结论",
            ),
        )
    return blocks, [_end_of(text, n_bytes) for text in texts], None


def _size_of(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """The bytes of some tokens, of which one piece after the other is in memory."""
    return sum(map(len, to_byte_pieces(tokens, tokenizer)))


def _digest(text: RunText, start: int) -> bytes:
    """A hash of the validation text without its first `start` bytes."""
    digest = hashlib.sha256()
    for piece in to_byte_pieces(text.val, text.tokenizer):
        digest.update(piece[start:])
        start = max(0, start - len(piece))
    return digest.digest()


def _end_of(text: RunText, n_bytes: int) -> RunText:
    """The text with the end of its validation tokens alone: n_bytes, and a context before them."""
    size = max(1, n_bytes // 8)
    while size < len(text.val) and _size_of(text.val[-size:], text.tokenizer) < n_bytes:
        size *= 2
    return dataclasses.replace(text, val=text.val[-(size + LONGEST_CONTEXT) :])


def _count_scored(text: RunText, blocks: Blocks) -> int:
    """The bytes of the blocks, without those that divide documents."""
    content = to_bytes(text.val, text.tokenizer)[-blocks.n_bytes :]
    starts = (blocks.numbers * blocks.size).tolist()
    parts = [content[start : start + blocks.size] for start in starts]
    return sum(len(part) - part.count(DIVIDER) for part in parts)


def _score(run: ComparedRun, text: RunText, blocks: Blocks, device: str | None) -> np.ndarray:
    """The bits of each block with the run's best weights."""
    loaded = load_run(run.path, weights="fp32", device=device)
    precision = choose_precision("auto", loaded.device)
    bits = score_blocks(loaded.model, loaded.tokenizer, text.val, blocks, loaded.device, precision)
    if not np.isfinite(bits).all():
        raise DataError(f"the losses of {run.path} on its validation text are not finite.")
    return bits
