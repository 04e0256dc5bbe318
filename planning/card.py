"""The cards: what a run is expected to bring and to need, or what given weights begin with; a
recipe's with its reasons."""

import json
import textwrap

from engine.memory import as_bytes
from engine.metrics import as_duration
from engine.words import AS_SET, Words
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
    why_start: Words | None = None,
) -> list[str]:
    """The card as it is printed, a list of lines of at most 100 characters."""
    rows = card_rows(recipe, text, machine, minutes, why_start)
    return _laid_out([(label.en, words.en) for label, words in rows])


def card_rows(
    recipe: Recipe,
    text: TextFacts,
    machine: MachineFacts,
    minutes: float,
    why_start: Words | None = None,
) -> list[tuple[Words, Words]]:
    """The card, rows of a label and words: facts, forecast, choices, warnings.

    Each choice ends with the line that sets it. why_start is why "auto" takes random weights.
    """
    if why_start is None and is_better_known(recipe, text):
        why_start = Words(
            f'random weights; INIT_FROM = "{SMOLLM2}" begins from ones that know English '
            "(docs/fine-tuning.md)",
            f'随机权重；INIT_FROM = "{SMOLLM2}" 可从懂英语的权重开始（docs/fine-tuning.zh-CN.md）',
        )
    memory, disk = as_bytes(recipe.memory), as_bytes(recipe.disk)
    of_texts = [  # which say nothing of answers
        (Words("By heart", "背诵"), _by_heart(recipe)),
        (Words("Runner-up", "次优方案"), Words.of(recipe.runner_up)),
    ]
    return [
        (Words("Your text", "你的文本"), _about_text(text)),
        (Words(f"In {minutes:g} min", f"{minutes:g} 分钟内"), _expected(recipe, text)),
        (Words("Machine", "机器"), _about_machine(recipe, machine)),
        (Words("Model", "模型"), _about_model(recipe, text)),
        (Words("Tokens", "分词"), about_tokens(recipe.tokenizer, text)),
        (Words("Training", "训练"), _about_training(recipe, text)),
        (
            Words("Memory", "内存"),
            Words(f"some {memory}; on disk up to {disk}", f"约 {memory}；磁盘最多 {disk}"),
        ),
        *([] if text.is_chat else of_texts),
        *([] if why_start is None else [(Words("Start", "起点"), why_start)]),
        *((Words("Note", "注意"), warning) for warning in recipe.warnings),
        (Words("To change", "如何更改"), _how_to_set(recipe)),
    ]


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
        *([] if why is None else [("Start", why.en)]),
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


def _about_text(text: TextFacts) -> Words:
    size, letters = as_bytes(text.train_bytes + text.val_bytes), f"{text.n_characters:,}"
    distinct, entropy = f"{text.distinct_characters:,}", f"{text.entropies[0]:.2f}"
    words = Words(
        f"{size}, {letters} characters, {distinct} different ones",
        f"{size}，{letters} 个字符，其中不同的有 {distinct} 个",
    )
    if text.is_chat:
        return words
    return Words(
        f"{words.en}; bz2 needs {text.bz2_bits:.2f} bits a byte, byte frequencies {entropy}",
        f"{words.zh}；bz2 每字节需要 {text.bz2_bits:.2f} 比特，字节频率 {entropy}",
    )


def _expected(recipe: Recipe, text: TextFacts) -> Words:
    if text.is_chat:
        return Words(
            "no forecast: the answers alone are scored, and forecasts are of whole texts",
            "没有预测：只有答案计分，而预测针对整篇文本",
        )
    bits, low, high = (f"{n:.2f}" for n in (recipe.bits_per_byte, recipe.low, recipe.high))
    words = Words(
        f"about {bits} bits a byte on the validation text (roughly {low} to {high})",
        f"验证文本约每字节 {bits} 比特（大致 {low} 到 {high}）",
    )
    if text.bytes_per_character < 1.2:
        return words
    of_characters = f"{recipe.bits_per_byte * text.bytes_per_character:.2f}"
    return Words(
        f"{words.en}, or {of_characters} bits a character",
        f"{words.zh}，即每字符 {of_characters} 比特",
    )


def _about_machine(recipe: Recipe, machine: MachineFacts) -> Words:
    speed, tokens = in_digits(machine.flops / 1e9, 3), f"{recipe.tokens_per_s:,.0f}"
    return Words(
        f"{speed} GFLOP/s in training steps, so about {tokens} tokens a second with this model",
        f"训练步中 {speed} GFLOP/s，用这个模型约每秒 {tokens} 个 token",
    )


def _about_model(recipe: Recipe, text: TextFacts) -> Words:
    model = recipe.model
    # the passes are those through a text without templates
    names = ["n_layers"] if text.is_chat else ["n_layers", "emb_dim"]
    n_layers, both = model["n_layers"], [recipe.reasons[name] for name in names]
    why = [reason for reason in both if reason != AS_SET] or [AS_SET]
    width, context, kind = model["emb_dim"], model["context_length"], model["architecture"]
    return Words(
        f"{n_layers} layer{'s' * (n_layers != 1)}, {width} wide, {recipe.parameters:,} parameters "
        f"({kind}): {', '.join(reason.en for reason in why)}; context {context}",
        f"{n_layers} 层，宽 {width}，{recipe.parameters:,} 个参数（{kind}）："
        f"{'，'.join(reason.zh for reason in why)}；上下文 {context}",
    )


def about_tokens(name: str, text: TextFacts) -> Words:
    """A tokenizer and the length of its tokens in a text, beside those that need no learning."""
    others = {
        other: rate
        for other, rate in text.bytes_per_token.items()
        if other in ("char", "gpt2") and other != name
    }
    compared = ", ".join(f"{other} {rate:.2f}" for other, rate in others.items())
    rate = f"{text.bytes_per_token[name]:.2f}"
    own = Words(f"{name}, {rate} bytes each", f"{name}，每个 {rate} 字节")
    return Words(f"{own.en} ({compared})", f"{own.zh}（{compared}）") if compared else own


def _about_training(recipe: Recipe, text: TextFacts) -> Words:
    """The main hyper-parameters, those the user has set by name alone."""
    training, context = recipe.training, recipe.model["context_length"]
    parts = []
    if "batch_size" in training:
        batch = Words(f"batch {training['batch_size']}", f"批次 {training['batch_size']}")
        if accumulated := training.get("gradient_accumulation_steps"):
            tokens = f"{training['batch_size'] * accumulated * context:,}"
            batch = Words(f"{batch.en} ({tokens} tokens)", f"{batch.zh}（{tokens} 个 token）")
        parts.append(batch)
    passes = in_digits(recipe.passes, 2)
    parts.append(Words(f"{recipe.steps:,} steps", f"{recipe.steps:,} 步"))
    if not text.is_chat:
        parts.append(Words(f"{passes} passes through the text", f"读文本 {passes} 遍"))
    if "optimizer" in training:
        parts.append(Words.of(training["optimizer"]))
    shown = {
        "learning_rate": Words("rate", "学习率"),
        "embedding_rate": Words("embeddings", "嵌入"),
        "weight_decay": Words("decay", "权重衰减"),
    }
    for name, word in shown.items():
        if name in training:
            value = in_digits(training[name], 3)
            parts.append(Words(f"{word.en} {value}", f"{word.zh} {value}"))
    if "decay_share" in training:
        share = f"{training['decay_share']:.0%}"
        parts.append(Words(f"falling over the last {share}", f"在最后 {share} 的步数里下降"))
    dropout = f"dropout {recipe.model['drop_rate']:g}"
    parts.append(Words(dropout, dropout))
    if as_set := ", ".join(name for name, why in recipe.reasons.items() if why == AS_SET):
        parts.append(Words(f"as set: {as_set}", f"已设定：{as_set}"))
    return Words(" · ".join(part.en for part in parts), "，".join(part.zh for part in parts))


def _by_heart(recipe: Recipe) -> Words:
    if recipe.by_heart_minute is None:
        return Words(
            "never in practice: the text is too large for this model",
            "实际上不会：文本对这个模型来说太大",
        )
    ends = Words("within this run", "在这次训练之内")
    if recipe.by_heart_minute > recipe.minutes:
        ends = Words("this run ends before", "这次训练在此之前结束")
    minute = f"{recipe.by_heart_minute:g}"
    return Words(f"from about minute {minute} on; {ends.en}", f"约从第 {minute} 分钟起；{ends.zh}")


def _how_to_set(recipe: Recipe) -> Words:
    """The lines that set what was chosen, in the form of config_run.py."""
    model = recipe.model
    chosen = {"n_layers": model["n_layers"], "emb_dim": model["emb_dim"]}
    chosen |= {"n_heads": model["n_heads"], "max_length": model["context_length"]}
    chosen |= {"drop_rate": model["drop_rate"]}
    chosen |= {name: recipe.training[name] for name in TO_SET if name in recipe.training}
    values = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in chosen.items())
    least, tokenizer = f"{LEAST_MINUTES:g}", json.dumps(recipe.tokenizer)
    return Words(
        f"MINUTES (from {least}), TOKENIZER = {tokenizer}, and with CUSTOM_MODE = True any of "
        f"custom_params = {{{values}}}",
        f"MINUTES（不小于 {least}），TOKENIZER = {tokenizer}；CUSTOM_MODE = True 时还有 "
        f"custom_params = {{{values}}} 中的任何一项",
    )
