"""What a run's folder tells of it, while it trains and afterwards."""

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.optim import default_learning_rate
from engine.words import Words
from insight.curves import Curves, CurvesFile
from insight.diagnosis import Facts
from planning.decisions import RunRecord, read_record, read_run_file
from storage.files import DATA, SUMMARY
from text.facts import LEAST_MEASURED
from training.journal import BLANK, ENDED

INSIGHT = "insight.json"  # what was measured about the run, beside its training
GREEDY = "Greedy"
ANSWER = "\n-> "  # stands between a question and its answer in a sample
_HEADING = re.compile(r"## (.*)")
_STEP = re.compile(r"Step (\d{1,15})(?:, validation loss ([\d.]+))?")
_PROMPT = re.compile(r"Prompt (\d+):")


@dataclass(frozen=True)
class Sample:
    """What the model wrote at one moment of a run."""

    label: str
    step: int
    texts: list[str]  # one for each prompt

    @property
    def label_words(self) -> Words:
        """The label in both languages; samples.md has it in English."""
        kind, _, number = self.label.rpartition(" ")
        known = {
            "Before training": "训练前",
            GREEDY: "贪心",
            "After epoch": f"第 {number} 轮之后",
            "After step": f"第 {number} 步之后",
        }
        return Words(self.label, known.get(self.label) or known.get(kind) or self.label)


def divide_remark(text: str) -> tuple[str, Words | None]:
    """A text of a sample without the remark that the model wrote nothing, if it ends with one."""
    for remark in (ENDED, BLANK):
        if text.endswith(remark.en):
            return text.removesuffix(remark.en), remark
    return text, None


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, read."""

    path: Path
    record: RunRecord
    data: dict[str, Any]  # the report on the text
    curves: Curves
    samples: list[Sample]
    summary: dict[str, Any] | None  # None: it is not finished
    insight: dict[str, Any] = field(default_factory=dict)  # baselines, by_heart, repeated, leaked

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be trained."""
        return self.summary is not None

    @property
    def final_bits(self) -> float:
        """The bits a byte of a finished run; of another one those of its last evaluation."""
        found = (self.summary or {}).get("final_val_bits_per_byte")
        if isinstance(found, float):  # where it is of a part of the text, by the part's own bytes
            return found
        return self.curves.as_bits(self.final_loss)

    @property
    def final_loss(self) -> float:
        """The validation loss of a finished run; of another one that of its last evaluation."""
        found = (self.summary or {}).get("final_val_loss")
        return float(found) if isinstance(found, int | float) else self.curves.val_losses[-1]

    def begin_of_written(self, text: str) -> int:
        """Where, in a sample, the model's own words begin: behind the prompt or the question."""
        if self.record.chat is not None:
            place = text.find(ANSWER)
            return 0 if place < 0 else place + len(ANSWER)
        prompts = self.record.training.prompts
        return max((len(p) for p in prompts if text.startswith(p)), default=0)

    @functools.cached_property
    def facts(self) -> Facts:
        """What a diagnosis needs to know."""
        return _facts_of(self)


def _facts_of(run: RunFiles) -> Facts:
    record, curves, insight, summary = run.record, run.curves, run.insight, run.summary or {}
    training, model, choice = record.training, record.model, record.choice
    split = run.data.get("split", {})
    baselines = dict(insight.get("baselines", {}))
    repeated, leaked = insight.get("repeated"), insight.get("leaked")
    if record.chat is not None:
        # only its answers are scored, and those figures are of whole conversations
        baselines, repeated, leaked = {}, None, None
    elif choice is not None:
        if choice.text.val_bytes >= LEAST_MEASURED:  # else it is of training text too
            baselines.setdefault("bz2", choice.text.bz2_bits)
        repeated = choice.text.repeated if repeated is None else repeated
        leaked = choice.text.leaked if leaked is None else leaked
    n_train = int(split.get("train_tokens", 0))
    if record.chat is not None:
        n_train = round(n_train * _share_of_answers(run.data.get("chat")))
    drawn = [sample for sample in run.samples if not sample.label.startswith(GREEDY)]
    windows = training.batch_size * training.gradient_accumulation_steps
    own = dict(record.settings["custom_params"])
    if not isinstance(own.get("model_overrides"), dict):
        own.pop("model_overrides", None)
    rate = training.learning_rate or default_learning_rate(model.emb_dim, training.optimizer)
    return Facts(
        mode=record.mode,
        total_steps=record.total_steps,
        steps_per_epoch=record.steps_per_epoch,
        tokens_a_step=windows * model.context_length,
        batch_size=training.batch_size,
        warmup_steps=training.warmup_steps or 0,
        learning_rate=rate,
        usual_rate=default_learning_rate(model.emb_dim, training.optimizer),
        max_grad_norm=training.max_grad_norm,
        precision=record.precision.name,
        parameters=summary.get("parameters") or count_parameters(record),
        n_layers=model.n_layers,
        emb_dim=model.emb_dim,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads or model.n_heads,
        train_tokens=n_train,
        temperature=record.sampling.temperature,
        model_name=record.model_name,
        custom_params=own,
        minutes=record.asked.minutes,
        begins_from_weights=record.start is not None,
        has_own_validation=_names_validation(record.settings.get("DATA")),
        is_over=run.is_over,
        keeps_last=record.keeps_last,
        skipped=count_skipped(curves, record.precision.name),
        repeated=repeated,
        leaked=leaked,
        baselines=baselines,
        samples=tuple(drawn[-1].texts) if drawn else (),
    )


def _share_of_answers(counted: Any) -> float:
    """The share of a run's tokens that answers have, which alone are counted in its curves."""
    known = counted if isinstance(counted, dict) else {}
    n_answers, n_all = known.get("target_tokens", 0), known.get("tokens", 0)
    return n_answers / n_all if _is_number(n_answers) and _is_number(n_all) else 1.0


def read_run(path: Path, curves: CurvesFile | None = None) -> RunFiles:
    """Read a run's folder; `curves`: its metrics.jsonl, of which some is read already.

    Raises CheckpointError if it is no run, or settings.json or data.json is damaged.
    """
    curves = curves or CurvesFile(path / "metrics.jsonl")
    record, data = read_record(path), read_run_file(path / DATA)
    return RunFiles(
        path,
        record,
        data,
        curves.read(),
        read_samples(path / "samples.md"),
        _read_if_there(path / SUMMARY),
        _sound(_read_if_there(path / INSIGHT) or {}),
    )


def _read_if_there(file: Path) -> dict[str, Any] | None:
    try:
        return read_run_file(file)
    except CheckpointError:
        return None


def _sound(insight: dict[str, Any]) -> dict[str, Any]:
    """What is of the right type in insight.json, a file that anyone may have changed."""
    kept = {
        name: insight[name]
        for name in ("repeated", "leaked")
        if isinstance(insight.get(name), int | float) and 0 <= insight[name] <= 1
    }
    baselines, copied = insight.get("baselines"), insight.get("copied")
    if isinstance(baselines, dict):
        kept["baselines"] = {name: bits for name, bits in baselines.items() if _is_number(bits)}
    if isinstance(insight.get("by_heart"), dict):
        kept["by_heart"] = {
            name: value
            for name, value in insight["by_heart"].items()
            if isinstance(value, int | float)
        }
    if isinstance(copied, dict):
        kept["copied"] = {
            text: [(start, stop) for start, stop in spans]
            for text, spans in copied.items()
            if isinstance(spans, list) and all(map(_is_span, spans))
        }
    return kept


def _is_span(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(isinstance(place, int) for place in value)


def read_samples(file: Path) -> list[Sample]:
    """The moments in samples.md, as the journal writes them; none if there is no such file.

    A line of a text is indented, so that no text can be taken for a heading.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    samples: list[Sample] = []
    texts: list[list[str]] = []

    def end() -> None:
        if samples and texts:
            samples[-1].texts.extend("\n".join(text) for text in texts)
        texts.clear()

    for line in lines:
        if heading := _HEADING.fullmatch(line):
            end()
            samples.append(Sample(heading[1], 0, []))
        elif samples and (step := _STEP.fullmatch(line)):
            samples[-1] = Sample(samples[-1].label, int(step[1]), [])
        elif _PROMPT.fullmatch(line):
            texts.append([])
        elif line.startswith("    "):
            if not texts:
                texts.append([])
            texts[-1].append(line[4:])
    end()
    return [sample for sample in samples if sample.texts]


def count_parameters(record: RunRecord) -> int:
    """About the parameters of a run's model: those of its matrices."""
    config = record.model
    assert config.ff_dim and config.head_dim and config.n_kv_heads, "GPTConfig has replaced them"
    queries, shared = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    mlp = (3 if config.activation == "swiglu" else 2) * config.ff_dim
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size
    tables += config.context_length if config.positions == "learned" else 0
    block = config.emb_dim * (2 * queries + 2 * shared + mlp)
    return config.n_layers * block + tables * config.emb_dim


def count_skipped(curves: Curves, precision: str) -> int:
    """The steps whose loss or gradient was not finite; with fp16 only those that lost the loss."""
    losses = sum(loss != loss for loss in curves.losses)
    if precision == "fp16":  # whose loss scale finds its value by overflowing gradients
        return losses
    pairs = zip(curves.losses, curves.grad_norms, strict=True)
    return sum(loss != loss or norm != norm for loss, norm in pairs)


def _names_validation(data: Any) -> bool:
    return isinstance(data, dict) and bool(data.get("val"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")
