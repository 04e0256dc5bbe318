"""The cards: what a run is expected to bring and to need, or what given weights begin with; a
recipe's with its reasons."""

import json
import textwrap

from engine.memory import as_bytes
from engine.metrics import as_duration
from planning.fine_tuning import SMOLLM2, is_better_known
from planning.plan import RunPlan
from planning.recipe import LEAST_MINUTES, MachineFacts, Recipe, in_digits
from planning.trial import Rehearsal
from text.facts import TextFacts
from training_utils import TrainingConfig

LABEL_WIDTH, WIDTH = 14, 100
# the hyper-parameters that the card shows, for "To change"
TO_SET = (
    "batch_size",
    "optimizer",
    "learning_rate",
    "embedding_rate",
    "weight_decay",
    "decay_share",
)


def card_lines(
    recipe: Recipe,
    text: TextFacts,
    machine: MachineFacts,
    minutes: float,
    why_start: str | None = None,
) -> list[str]:
    """The card, a list of lines of at most 100 characters: facts, forecast, choices, warnings.

    Each choice ends with the line that sets it. why_start is why "auto" takes random weights.
    """
    if why_start is None and is_better_known(recipe, text):
        why_start = (
            f'random weights; INIT_FROM = "{SMOLLM2}" begins from ones that know English '
            "(docs/fine-tuning.md)"
        )
    rows = [
        ("Your text", _about_text(text)),
        (f"In {_minutes(minutes)}", _expected(recipe, text)),
        ("Machine", _about_machine(recipe, machine)),
        ("Model", _about_model(recipe)),
        ("Tokens", about_tokens(recipe.tokenizer, text)),
        ("Training", _about_training(recipe)),
        ("Memory", f"some {as_bytes(recipe.memory)}; on disk up to {as_bytes(recipe.disk)}"),
        ("By heart", _by_heart(recipe)),
        ("Runner-up", recipe.runner_up),
        *([] if why_start is None else [("Start", why_start)]),
        *(("Note", warning) for warning in recipe.warnings),
        ("To change", _how_to_set(recipe)),
    ]
    return _laid_out(rows)


def run_lines(run: Rehearsal, memory: int, disk: int) -> list[str]:
    """The card of a run without a recipe, laid out like that of one; memory and disk are bytes."""
    rows = [
        (
            "Time",
            f"about {as_duration(run.seconds)} from the first step on: {run.total_steps:,} steps "
            f"of {in_digits(run.step_s, 2)} s, as timed here without compiling, with evaluations, "
            "samples and checkpoints",
        ),
        (
            "Tokens",
            f"{run.tokens:,} to learn from: {in_digits(run.passes, 2)} passes through the training "
            "text",
        ),
        ("Memory", f"some {as_bytes(memory)}; on disk up to {as_bytes(disk)}, for checkpoints"),
    ]
    return _laid_out(rows)


def start_lines(
    plan: RunPlan, training: TrainingConfig, total_steps: int, n_parameters: int
) -> list[str]:
    """The card of a run that begins from given weights, as card_lines()."""
    start = plan.start
    assert start is not None and start.bits_per_byte is not None, "measure_start() has set it"
    known = start.config.context_length
    context = f"{training.max_length:,}" + f" of {known:,}" * (training.max_length != known)
    share = "" if start.measured_share == 1 else f" (on {start.measured_share:.0%} of it)"
    why = plan.origins.get("start")
    scored = "the validation text" if plan.chat is None else "the answers that validate"
    rows = [
        ("Weights", f"{start.source}: {n_parameters:,} parameters, context {context}"),
        *([] if why is None else [("Start", why)]),
        (
            "Untuned",
            f"{start.bits_per_byte:.3f} bits a byte on {scored}{share}, before the first step",
        ),
        ("Training", _about_fine_tuning(plan, training, total_steps)),
        ("To change", _how_to_fine_tune(plan, training)),
    ]
    return _laid_out(rows)


def _about_fine_tuning(plan: RunPlan, training: TrainingConfig, total_steps: int) -> str:
    windows = training.batch_size * training.gradient_accumulation_steps
    parts = [
        f"{total_steps:,} steps of {windows} x {training.max_length:,} tokens",
        training.optimizer,
        f"rate {in_digits(training.learning_rate or 0, 3)}",
        f"dropout {plan.model['drop_rate']:g}",
    ]
    if training.patience is not None:
        parts.append(f"ends after {training.patience} evaluations in a row without a better one")
    return " · ".join(parts)


def _how_to_fine_tune(plan: RunPlan, training: TrainingConfig) -> str:
    names = ("num_epochs", "learning_rate", "batch_size", "max_length", "patience")
    chosen = {name: getattr(training, name) for name in names}
    if training.time_budget_minutes is not None:
        del chosen["num_epochs"]
    chosen["learning_rate"] = float(f"{chosen['learning_rate']:.3g}")
    values = ", ".join(f'"{name}": {value!r}' for name, value in chosen.items())
    return (
        "INIT_FROM = None trains from random weights; with CUSTOM_MODE = True any of "
        f"custom_params = {{{values}}}"
    )


def _laid_out(rows: list[tuple[str, str]]) -> list[str]:
    """Rows of a label and words, as lines of at most WIDTH characters."""
    lines = []
    for label, words in rows:
        first, *others = textwrap.wrap(words, WIDTH - LABEL_WIDTH, break_long_words=False)
        lines.append(f"{label:<{LABEL_WIDTH}}{first}")
        lines += [" " * LABEL_WIDTH + line for line in others]
    return lines


def _about_text(text: TextFacts) -> str:
    size = text.train_bytes + text.val_bytes
    return (
        f"{as_bytes(size)}, {text.n_characters:,} characters, {text.distinct_characters:,} "
        f"different ones; bz2 needs {text.bz2_bits:.2f} bits a byte, byte frequencies "
        f"{text.entropies[0]:.2f}"
    )


def _minutes(minutes: float) -> str:
    return f"{minutes:g} min"


def _expected(recipe: Recipe, text: TextFacts) -> str:
    words = (
        f"about {recipe.bits_per_byte:.2f} bits a byte on the validation text (roughly "
        f"{recipe.low:.2f} to {recipe.high:.2f})"
    )
    if text.bytes_per_character < 1.2:
        return words
    return f"{words}, or {recipe.bits_per_byte * text.bytes_per_character:.2f} bits a character"


def _about_machine(recipe: Recipe, machine: MachineFacts) -> str:
    return (
        f"{in_digits(machine.flops / 1e9, 3)} GFLOP/s in training steps, so about "
        f"{recipe.tokens_per_s:,.0f} tokens a second with this model"
    )


def _about_model(recipe: Recipe) -> str:
    model = recipe.model
    n_layers, both = model["n_layers"], (recipe.reasons["n_layers"], recipe.reasons["emb_dim"])
    why = ", ".join(reason for reason in both if reason != "as set") or "as set"
    return (
        f"{n_layers} layer{'s' * (n_layers != 1)}, {model['emb_dim']} wide, "
        f"{recipe.parameters:,} parameters ({model['architecture']}): {why}; context "
        f"{model['context_length']}"
    )


def about_tokens(name: str, text: TextFacts) -> str:
    """A tokenizer and the length of its tokens in a text, beside those that need no learning."""
    others = {
        other: rate
        for other, rate in text.bytes_per_token.items()
        if other in ("char", "gpt2") and other != name
    }
    compared = ", ".join(f"{other} {rate:.2f}" for other, rate in others.items())
    own = f"{name}, {text.bytes_per_token[name]:.2f} bytes each"
    return f"{own} ({compared})" if compared else own


def _about_training(recipe: Recipe) -> str:
    """The main hyper-parameters, those the user has set by name alone."""
    training, context = recipe.training, recipe.model["context_length"]
    parts = []
    if "batch_size" in training:
        windows = training["batch_size"] * training.get("gradient_accumulation_steps", 1)
        parts.append(f"batch {training['batch_size']} ({windows * context:,} tokens)")
    parts += [f"{recipe.steps:,} steps", f"{in_digits(recipe.passes, 2)} passes through the text"]
    if "optimizer" in training:
        parts.append(training["optimizer"])
    shown = {"learning_rate": "rate", "embedding_rate": "embeddings", "weight_decay": "decay"}
    parts += [f"{w} {in_digits(training[n], 3)}" for n, w in shown.items() if n in training]
    if "decay_share" in training:
        parts.append(f"falling over the last {training['decay_share']:.0%}")
    parts.append(f"dropout {recipe.model['drop_rate']:g}")
    as_set = [name for name, why in recipe.reasons.items() if why == "as set"]
    return " · ".join(parts) + (f" · as set: {', '.join(as_set)}" if as_set else "")


def _by_heart(recipe: Recipe) -> str:
    if recipe.by_heart_minute is None:
        return "never in practice: the text is too large for this model"
    ends = "this run ends before" if recipe.by_heart_minute > recipe.minutes else "within this run"
    return f"from about minute {recipe.by_heart_minute:g} on; {ends}"


def _how_to_set(recipe: Recipe) -> str:
    """The lines that set what was chosen, in the form of config_run.py."""
    model = recipe.model
    chosen = {"n_layers": model["n_layers"], "emb_dim": model["emb_dim"]}
    chosen |= {"n_heads": model["n_heads"], "max_length": model["context_length"]}
    chosen |= {"drop_rate": model["drop_rate"]}
    chosen |= {name: recipe.training[name] for name in TO_SET if name in recipe.training}
    values = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in chosen.items())
    return (
        f"MINUTES (from {LEAST_MINUTES:g}), TOKENIZER = {json.dumps(recipe.tokenizer)}, and with "
        f"CUSTOM_MODE = True any of custom_params = {{{values}}}"
    )
