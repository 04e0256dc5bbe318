"""Fine-tuning: what a run that begins from given weights trains with, and whether one should.

Pure functions of settings, weights and text: nothing here reads a file, a clock or a device.
"""

import dataclasses
from typing import Any

from engine.memory import as_bytes
from engine.optim import default_learning_rate
from engine.settings import raise_if_any, shown
from engine.words import Words
from planning.plan import RunPlan, Start
from planning.recipe import Fixed, Recipe, is_noise
from text.facts import TextFacts
from training_utils import TrainingConfig

MOST_CONTEXT = 512  # tokens, unless max_length is set: longer ones take memory, and add little
RATE_SHARE = 0.1  # of the learning rate from random weights: what is known is not forgotten
LORA_RATE_SHARE = 1.0  # an adapter wants ten times the rate (Schulman et al. 2025)
STEP_TOKENS = 2048  # a step
PATIENCE = 3  # evaluations
MOST_PASSES = 4  # through the training text with MINUTES: later ones learn it by heart
MOST_CHAT_PASSES = 10  # through a few conversations, which are to be learned so
LARGE = 50_000_000  # parameters, from which one window keeps a CPU busy
NO_DROPOUT = {"drop_rate": 0.0, "attention_drop_rate": 0.0}  # the weights were trained without
SMOLLM2 = "smollm2-135m"  # what INIT_FROM = "auto" looks for: English, from a package index
# of a token in a language that the weights know: SmolLM2-135M's on English prose
TOKEN_BITS = 5.5
# of memory for each parameter: weights, gradients, AdamW's averages and activations; with lora_rank
TRAINING_BYTES, LORA_BYTES = 20, 8


def begin_from(plan: RunPlan, start: Start, tokenizer: str) -> RunPlan:
    """The plan of a run that begins from weights: their model, and TOKENIZER's value for theirs.

    Raises SettingsError with every setting that contradicts them.
    """
    fixed = plan.fixed
    assert fixed is not None, "resolve_settings() sets it where INIT_FROM is set"
    raise_if_any(contradictions(fixed, start), f"INIT_FROM = {shown(plan.run.INIT_FROM)}")
    own = dataclasses.asdict(start.config) | NO_DROPOUT
    own["context_length"] = min(own["context_length"], MOST_CONTEXT)
    del own["vocab_size"]  # the tokenizer's
    origins = {}
    if plan.mode != "custom":
        origins["training"] = Words("fine-tuning's own", "微调自带")
    if "context_length" not in fixed.model:
        origins["max_length"] = Words(
            f"the weights' own, at most {MOST_CONTEXT}", f"权重自带，至多 {MOST_CONTEXT}"
        )
    return dataclasses.replace(
        plan,
        model_name=start.source,
        model=own | fixed.model,
        tokenizer=tokenizer,
        origins=plan.origins | origins,
        start=start,
    )


def contradictions(fixed: Fixed, start: Start) -> list[str]:
    """What is set and differs from the weights, a line each."""
    own, problems = dataclasses.asdict(start.config), []
    if fixed.tokenizer is not None:
        problems.append(
            f"TOKENIZER is {shown(fixed.tokenizer)}, and {start.source} has its own; set TOKENIZER "
            "to None"
        )
    for name, value in fixed.model.items():
        if name == "context_length" and value > own[name]:
            problems.append(
                f'custom_params["max_length"] is {value:,}, and {start.source} knows {own[name]:,} '
                "positions; set at most so many"
            )
        elif name not in ("context_length", *NO_DROPOUT) and value != own[name]:
            problems.append(
                f'model_overrides["{name}"] is {shown(value)}, and {start.source} has '
                f"{shown(own[name])}; leave it out"
            )
    return problems


def fine_tuning(plan: RunPlan, device: str, ranks: int = 1) -> dict[str, Any]:
    """TrainingConfig's arguments that fine-tuning chooses, without those that the user has set.

    device is its type. On a CPU a large model makes a step after each window: gradients that wait
    for more would take as much memory as the weights do, beside the activations.
    """
    assert plan.start is not None and plan.fixed is not None, "begin_from() sets them"
    asked, set_here, config = plan.training, plan.fixed.training, plan.start.config
    optimizer = set_here.get("optimizer") or TrainingConfig().optimizer
    share = RATE_SHARE if asked.lora_rank is None else LORA_RATE_SHARE
    windows = max(1, STEP_TOKENS // plan.model["context_length"])
    if device == "cpu" and count_parameters(plan.start) >= LARGE:
        windows = 1
    accumulated = set_here.get("gradient_accumulation_steps")
    batch_size = set_here.get("batch_size") or max(1, windows // (accumulated or 1))
    accumulated = accumulated or max(1, windows // batch_size)
    if batch_size * accumulated % ranks and "batch_size" not in set_here:
        batch_size = -(-batch_size // ranks) * ranks
    chosen = {
        "learning_rate": share * default_learning_rate(config.emb_dim, optimizer),
        "batch_size": batch_size,
        "gradient_accumulation_steps": accumulated,
        "shift_windows": True,
    }
    chosen = {name: value for name, value in chosen.items() if name not in set_here}
    is_small_chat = plan.chat is not None and plan.chat.is_small
    if asked.patience is None and not is_small_chat:
        chosen["patience"] = PATIENCE
    return chosen


def count_parameters(start: Start) -> int:
    """About the parameters of a model: those of its matrices."""
    config = start.config
    assert config.ff_dim and config.head_dim and config.n_kv_heads, "GPTConfig has replaced them"
    queries, shared = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    mlp = (3 if config.activation == "swiglu" else 2) * config.ff_dim
    block = config.emb_dim * (2 * queries + 2 * shared + mlp)
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size
    tables += config.context_length if config.positions == "learned" else 0
    return config.n_layers * block + tables * config.emb_dim


def is_better_known(recipe: Recipe, text: TextFacts) -> bool:
    """Whether SMOLLM2 probably knows a text's language better than a recipe's model will.

    GPT-2's vocabulary, which was made for English too, stands in for its own.
    """
    rate = text.bytes_per_token.get("gpt2")
    is_better = rate is not None and TOKEN_BITS / rate < recipe.bits_per_byte
    return is_better and not is_noise(text)


def decide_start(
    plan: RunPlan, decided: RunPlan, start: Start | None, text: TextFacts | None
) -> RunPlan:
    """For INIT_FROM = "auto": the plan with the better start, and why in its origins.

    decided is the plan with a recipe for random weights, start what is at hand, and text has how
    long the tokens of its tokenizer are: one cuts a language that it was not made for into short
    ones.
    """
    assert plan.fixed is not None and decided.choice is not None, "MINUTES are set"
    if start is None or text is None:
        why = Words(f"{SMOLLM2} is not at hand", f"手头没有 {SMOLLM2}")
        return _with_random_weights(decided, why)
    if problems := contradictions(plan.fixed, start):
        why = Words(problems[0], f"设置与 {start.source} 不合（{problems[0]}）")
        return _with_random_weights(decided, why)
    needed = count_parameters(start) * (
        TRAINING_BYTES if plan.training.lora_rank is None else LORA_BYTES
    )
    if needed > (room := decided.choice.machine.memory):
        takes, has = as_bytes(needed), as_bytes(room)
        why = Words(
            f"{start.source} takes about {takes} to train, and {has} are free",
            f"训练 {start.source} 约需 {takes}，可用 {has}",
        )
        return _with_random_weights(decided, why)
    if is_noise(decided.choice.text):
        why = Words(
            "the order of the text's bytes tells almost nothing", "文本的字节顺序几乎不含信息"
        )
        return _with_random_weights(decided, why)
    ((tokenizer, rate),) = text.bytes_per_token.items()
    expected, alone = TOKEN_BITS / rate, decided.choice.recipe.bits_per_byte
    why = Words(
        f"{start.source} has {rate:.2f} bytes a token here, so that some {expected:.1f} bits a "
        f"byte are expected of it before the first step, and {alone:.2f} of random weights in this "
        "time",
        f"{start.source} 在这里每 token {rate:.2f} 字节，因此第一步之前预计约每字节 "
        f"{expected:.1f} 比特，而随机权重在这段时间内预计 {alone:.2f}",
    )
    if expected >= alone:
        return _with_random_weights(decided, why)
    return _with_reason(begin_from(plan, start, tokenizer), why)


def _with_random_weights(plan: RunPlan, why: Words) -> RunPlan:
    return _with_reason(plan, Words(f"random weights: {why.en}", f"随机权重：{why.zh}"))


def _with_reason(plan: RunPlan, why: Words) -> RunPlan:
    return dataclasses.replace(plan, origins=plan.origins | {"start": why})
