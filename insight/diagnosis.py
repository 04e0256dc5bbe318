"""What is wrong with a run, if anything: findings from its curves, each with the line to change.

diagnose() is a pure function of what a run measured and of what is known about it. It works on a
run of a hundred steps as on one of a hundred thousand: whatever it measures is a share of the
run's own loss, steps or tokens. The thresholds are tuned on runs with a known fault
(benchmarks/diagnosis.py), which also counts how often the first finding is the right one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from engine.words import Words
from insight.curves import Curves
from planning.recipe import LEAST_MINUTES, MOST_MINUTES

PROBLEM, WARNING, NOTE = SEVERITIES = ("problem", "warning", "note")


@dataclass(frozen=True)
class Facts:
    """What is known of a run beside its curves. None: unknown; shares are from 0 to 1."""

    mode: str
    total_steps: int
    steps_per_epoch: int
    tokens_a_step: int
    batch_size: int
    warmup_steps: int
    learning_rate: float
    usual_rate: float  # for this width and optimizer
    max_grad_norm: float
    precision: str
    parameters: int
    n_layers: int
    emb_dim: int
    n_heads: int
    n_kv_heads: int
    train_tokens: int
    temperature: float
    model_name: str = ""
    # as in the settings file, whether the mode reads it or not
    custom_params: dict[str, Any] = field(default_factory=dict)
    minutes: float | None = None  # MINUTES
    begins_from_weights: bool = False
    has_own_validation: bool = False  # DATA names the text to validate on
    is_over: bool = True
    keeps_last: bool = False  # it is to learn a few conversations by heart
    skipped: int = 0  # steps whose loss or gradient was not finite
    repeated: float | None = None  # of the training text, that came before in it
    leaked: float | None = None  # of the validation text, that is in the training text
    # bits a byte of the validation text by simple means, by name
    baselines: dict[str, float] = field(default_factory=dict)
    samples: tuple[str, ...] = ()  # what the model wrote last, drawn and not greedy, of each prompt


@dataclass(frozen=True)
class Finding:
    """Something that a run shows, what shows it, and what to change."""

    kind: str
    severity: str  # "problem", "warning" or "note"
    confidence: float  # from 0 to 1
    title: Words
    evidence: Words
    advice: Words
    changes: dict[str, Any] = field(default_factory=dict)  # settings; those below custom_params too


class Measured(NamedTuple):
    """What the rules look at."""

    curves: Curves
    facts: Facts
    first: float  # the training loss before training
    best: int  # the index of the best evaluation
    passes: float  # through the training text
    gain: float  # share of the validation loss that twice the steps would take off
    late_gain: float  # share of it that the last third of the run took off
    rise: float  # share by which it rose since the best evaluation
    fall: float  # share by which the training loss fell since then
    gap: float  # validation over training loss at the end, as a share
    early_gap: float  # share of early progress that does not carry over to validation text
    noise: float  # of a step's loss, as a share of it
    spikes: int  # steps whose loss jumped up
    slowdown: float  # speed of the last third over that of the first


MOST_FINDINGS = 6
MOST_STEPS = 10**9
LEAST_TOKENS = 2000  # of a training text that a validation text may be unlike
LEAST_PASSES = 3  # through the text, before a model is too small for it
LITTLE_GAIN = 0.02  # of twice the steps
WIDTH = 16  # steps before one, with which its loss is compared


def diagnose(curves: Curves, facts: Facts) -> list[Finding]:
    """The findings of a run, worst first; empty before its second evaluation, or if all is well."""
    measured = measure(curves, facts)
    if measured is None:
        found = _not_finite(facts, curves)
        return [] if found is None else [found]
    results = [rule(measured) for rule in RULES]
    findings = [finding for finding in results if finding is not None]
    kinds = {finding.kind for finding in findings}
    findings = [f for f in findings if not EXPLAINED_BY.get(f.kind, set()) & kinds]
    # sorted() keeps the order of RULES among equals: causes before what they cause
    return sorted(findings, key=lambda f: SEVERITIES.index(f.severity))[:MOST_FINDINGS]


# ------------------------------------------------------------------------------- measuring


def measure(curves: Curves, facts: Facts) -> Measured | None:
    """What the rules look at; None before the second evaluation."""
    train, val = np.array(curves.train_losses), np.array(curves.val_losses)
    steps = np.array(curves.eval_steps)
    if len(steps) < 2 or not np.isfinite(train).all() or not np.isfinite(val).all():
        return None
    best = curves.best
    losses = np.array(curves.losses)
    losses = losses[np.isfinite(losses)]
    tokens = curves.eval_tokens[-1]
    return Measured(
        curves,
        facts,
        first=float(train[0]),
        best=best,
        passes=tokens / max(1, facts.train_tokens),
        gain=_gain_of_doubling(steps, val, facts),
        late_gain=_late_gain(steps, val),
        rise=float(val[-1] / val[best] - 1),
        fall=float(1 - train[-1] / train[best]),
        gap=float(val[-1] / train[-1] - 1),
        early_gap=_early_gap(train, val),
        noise=_noise(losses),
        spikes=_count_spikes(losses, facts.warmup_steps),
        slowdown=_slowdown(np.array(curves.speeds)),
    )


def _gain_of_doubling(steps: np.ndarray, losses: np.ndarray, facts: Facts) -> float:
    """The share of the loss that twice the steps would take off, by a power law of the step.

    It is fitted between warm-up and the end of the run, where the falling rate flattens the curve.
    """
    last = steps[-1]
    first = max(facts.warmup_steps, 0.2 * last)
    kept = (steps >= first) & (steps <= 0.85 * last)
    if np.count_nonzero(kept) < 3:
        kept = steps > 0
    if np.count_nonzero(kept) < 2:
        return 0.0
    slope = np.polyfit(np.log(steps[kept]), np.log(np.maximum(losses[kept], 1e-9)), 1)[0]
    return float(1 - 2**slope)


def _late_gain(steps: np.ndarray, losses: np.ndarray) -> float:
    """The share of the loss that the last third of the run took off its best before."""
    before = losses[steps <= 2 / 3 * steps[-1]]
    return float(1 - losses.min() / before.min()) if len(before) else 0.0


def _early_gap(train: np.ndarray, val: np.ndarray) -> float:
    """How much of the first half of the training loss's fall is missing on validation text."""
    fall = train[0] - train
    reached = np.flatnonzero(fall >= 0.5 * fall.max())
    if not len(reached) or fall.max() <= 0:
        return 0.0
    i = reached[0]
    return float(((val[i] - train[i]) - (val[0] - train[0])) / fall[i])


def _noise(losses: np.ndarray) -> float:
    """The deviation of a step's loss in the last half of the run, as a share of the loss.

    It is that of differences between neighbors, to which the fall of the loss adds nothing.
    """
    late = losses[len(losses) // 2 :]
    if len(late) < 8:
        return 0.0
    return float(np.diff(late).std() / math.sqrt(2) / late.mean())


def _count_spikes(losses: np.ndarray, warmup_steps: int) -> int:
    """The steps whose loss is far above those before: by six deviations and a tenth."""
    first = max(warmup_steps, WIDTH)
    if len(losses) <= first:
        return 0
    before = np.lib.stride_tricks.sliding_window_view(losses[first - WIDTH : -1], WIDTH)
    middle = np.median(before, axis=1)
    deviation = 1.5 * np.median(np.abs(before - middle[:, None]), axis=1)
    jumps = losses[first:] > middle + np.maximum(6 * deviation, 0.1 * middle)
    return int(np.count_nonzero(jumps))


def _slowdown(speeds: np.ndarray) -> float:
    """The median speed of the run's last third over that of the first; 1 if it has too few."""
    known = speeds[np.isfinite(speeds) & (speeds > 0)]
    third = len(known) // 3
    if third < 2:
        return 1.0
    return float(np.median(known[-third:]) / np.median(known[:third]))


# ---------------------------------------------------------------------------------- rules


def _not_finite(facts: Facts, curves: Curves) -> Finding | None:
    """Of steps that were left out, and of an evaluation, which has ended the run."""
    of_steps = zip(curves.steps, curves.losses, curves.grad_norms, strict=True)
    evaluations = zip(curves.eval_steps, curves.train_losses, curves.val_losses, strict=True)
    first, evaluated = (
        next((step for step, a, b in numbers if not math.isfinite(a + b)), None)
        for numbers in (of_steps, evaluations)
    )
    en, zh = [], []
    if facts.skipped:
        en.append(
            f"In {_count(facts.skipped, 'step')} the loss or the gradient was infinite or not a "
            f"number{'' if first is None else f', first at step {first:,}'}; these steps were left "
            "out."
        )
        where = "" if first is None else f"，首次在第 {first:,} 步"
        zh.append(f"有 {facts.skipped:,} 步的损失或梯度是无穷大或非数{where}；这些步被跳过了。")
    if evaluated is not None:
        en.append(
            f"The evaluation at step {evaluated:,} gave a loss that is infinite or not a number, "
            "which ended the run."
        )
        zh.append(f"第 {evaluated:,} 步的评估得到无穷大或非数的损失，运行因此结束。")
    if not en:
        return None
    changes = _slower(facts, 3)
    if facts.max_grad_norm == 0:
        changes |= {"max_grad_norm": 1.0}
    elif facts.precision != "fp32":
        changes |= {"PRECISION": "fp32"}
    return Finding(
        "nan",
        PROBLEM,
        0.95,
        Words("Numbers that are not finite", "有些数值不是有限数"),
        Words(" ".join(en), "".join(zh)),
        Words("Lower the learning rate, and clip the gradients.", "降低学习率，并裁剪梯度。"),
        changes,
    )


def _nan(m: Measured) -> Finding | None:
    return _not_finite(m.facts, m.curves)


def _rate_high(m: Measured) -> Finding | None:
    train = m.curves.train_losses
    above = train[-1] / m.first - 1
    rate, usual = m.facts.learning_rate, m.facts.usual_rate
    norms = np.array(m.curves.grad_norms)
    norms = norms[np.isfinite(norms)]
    clipped = 0.0
    if len(norms) and m.facts.max_grad_norm:
        clipped = float((norms[len(norms) // 2 :] > 2 * m.facts.max_grad_norm).mean())
    worst = max(train[1:]) / m.first - 1
    is_rough = m.spikes >= max(3, 0.01 * len(m.curves.steps))
    is_high = rate > 4 * usual
    if not (above > 0.02 or worst > 0.05 or is_rough or (is_high and m.gain < 0.1)):
        return None
    if above <= 0.02 and worst <= 0.05 and not is_high and not clipped:
        return None
    parts_en, parts_zh = [], []
    if max(above, worst) > 0.02:
        parts_en.append(
            f"the training loss rose to {max(train[1:]):.2f}, above the {m.first:.2f} of the start"
        )
        parts_zh.append(f"训练损失升到 {max(train[1:]):.2f}，高于开始时的 {m.first:.2f}")
    if is_rough:
        parts_en.append(f"the loss jumped up in {_count(m.spikes, 'step')}")
        parts_zh.append(f"损失有 {m.spikes:,} 步突然升高")
    if clipped > 0.1:
        parts_en.append(
            f"{clipped:.0%} of the late gradients are more than twice as long as max_grad_norm"
        )
        parts_zh.append(f"后期有 {clipped:.0%} 的梯度超过 max_grad_norm 的两倍")
    if is_high:
        parts_en.append(
            f"the rate of {rate:.2g} is {rate / usual:.0f} times what is usual for this model"
        )
        parts_zh.append(f"学习率 {rate:.2g} 是这种模型常用值的 {rate / usual:.0f} 倍")
    factor = rate / usual if is_high else 3
    return Finding(
        "rate-high",
        PROBLEM if max(above, worst) > 0.02 or is_high else WARNING,
        0.9 if is_high else 0.7,
        Words("The learning rate is too high", "学习率太高"),
        Words(_sentence(parts_en), "；".join(parts_zh) + "。"),
        Words("Train with a lower rate.", "用更低的学习率训练。"),
        _slower(m.facts, factor),
    )


def _duplicates(m: Measured) -> Finding | None:
    share = m.facts.repeated
    if share is None or share < 0.3:
        return None
    return Finding(
        "duplicates",
        PROBLEM if share > 0.5 else WARNING,
        0.95,
        Words("The training text repeats itself", "训练文本有大量重复"),
        Words(
            f"{share:.0%} of the training text came before in it, word for word: of so much text "
            f"there is only {1 - share:.0%}.",
            f"训练文本有 {share:.0%} 与前文逐字相同：不重复的只有 {1 - share:.0%}。",
        ),
        Words(
            "Remove the copies, and name the text without them; sort -u removes equal lines.",
            "去掉重复的部分，再指定去重后的文本；sort -u 会去掉相同的行。",
        ),
        {"DATA": "text-without-copies.txt"},
    )


def _leak(m: Measured) -> Finding | None:
    share = m.facts.leaked
    if share is None or share < 0.1:
        return None
    baseline = m.facts.baselines.get("bz2")
    bits = m.curves.as_bits(m.curves.val_losses[-1])
    below_en = below_zh = ""
    if baseline is not None and bits < 0.7 * baseline:
        below_en = f" Its loss of {bits:.2f} bits a byte is {1 - bits / baseline:.0%} below bz2."
        below_zh = f"它的损失为每字节 {bits:.2f} 比特，比 bz2 低 {1 - bits / baseline:.0%}。"
    advice, data = (
        Words(
            "Leave the copies out of the text, or validate on another one.",
            "去掉文本里的重复内容，或者用另一份文本来验证。",
        ),
        "text-without-copies.txt",
    )
    if m.facts.has_own_validation:
        advice, data = (
            Words(
                'Validate on text that is not trained on; without "val" the program divides the '
                "text.",
                '用未参与训练的文本来验证；不写 "val" 时程序会自动划分文本。',
            ),
            "training-text.txt",
        )
    return Finding(
        "leak",
        PROBLEM,
        0.95,
        Words("The validation text is in the training text", "验证文本出现在训练文本中"),
        Words(
            f"{share:.0%} of the validation text is in the training text, word for word. The "
            f"validation loss tells nothing about new text.{below_en}",
            f"验证文本有 {share:.0%} 逐字出现在训练文本中，验证损失因此说明不了模型对新文本的"
            f"表现。{below_zh}",
        ),
        advice,
        {"DATA": data},
    )


def _unlike(m: Measured) -> Finding | None:
    if m.early_gap < 0.2 or m.gap < 0.1 or m.facts.train_tokens < LEAST_TOKENS:
        return None
    train, val = m.curves.train_losses, m.curves.val_losses
    return Finding(
        "unlike",
        PROBLEM if m.early_gap > 0.4 else WARNING,
        0.8,
        Words("The validation text is unlike the training text", "验证文本与训练文本不相像"),
        Words(
            f"From the beginning {m.early_gap:.0%} of what is learnt from the training text does "
            f"not help on the validation text; at the end the losses are {train[-1]:.2f} and "
            f"{val[-1]:.2f}.",
            f"从一开始，从训练文本学到的东西就有 {m.early_gap:.0%} 对验证文本没有帮助；最终两者"
            f"的损失为 {train[-1]:.2f} 和 {val[-1]:.2f}。",
        ),
        Words(
            'Validate on text of the same kind; without "val" the program divides the text.',
            '用同类文本来验证；不写 "val" 时程序会自动划分文本。',
        ),
        {"DATA": "training-text.txt"},
    )


def _learns_by_heart(m: Measured) -> bool:
    return m.rise > 0.02 and m.fall > 0.02


def _model_large(m: Measured) -> Finding | None:
    ratio = m.facts.parameters / max(1, m.facts.train_tokens)
    passes = m.passes * m.curves.eval_steps[m.best] / max(1, m.curves.eval_steps[-1])
    if m.facts.begins_from_weights or m.facts.keeps_last or m.passes < 1:
        return None
    if ratio < 100 and not (ratio >= 50 and _learns_by_heart(m) and passes < 5):
        return None
    width = min(m.facts.emb_dim, max(16, m.facts.emb_dim // 4 // 8 * 8))
    shape = _shape(m.facts, width, max(1, m.facts.n_layers // 2))
    return Finding(
        "model-large",
        WARNING,
        0.8,
        Words("The model is too large for the text", "模型相对文本太大"),
        Words(
            f"It has {ratio:,.0f} parameters for each token of the training text, and was at its "
            f"best after {passes:.1f} passes through it.",
            f"训练文本的每个 token 对应 {ratio:,.0f} 个参数，模型读了 {passes:.1f} 遍就已最好。",
        ),
        Words(
            "Take a smaller model with dropout, or more text.",
            "换更小的模型并加 dropout，或增加文本。",
        ),
        {"model_overrides": shape | {"drop_rate": 0.2}},
    )


def _by_heart(m: Measured) -> Finding | None:
    if not _learns_by_heart(m) or m.facts.keeps_last:
        return None
    steps, train, val = m.curves.eval_steps, m.curves.train_losses, m.curves.val_losses
    since = max(1, steps[m.best])
    return Finding(
        "by-heart",
        PROBLEM if m.rise > 0.1 else WARNING,
        0.9,
        Words(
            f"It learns the text by heart since step {since:,}",
            f"从第 {since:,} 步起，模型在背诵文本",
        ),
        Words(
            f"Since step {since:,} the training loss fell from {train[m.best]:.2f} to "
            f"{train[-1]:.2f}, while the validation loss rose from {val[m.best]:.2f} to "
            f"{val[-1]:.2f}; the run read the text {m.passes:.0f} times.",
            f"从第 {since:,} 步起，训练损失从 {train[m.best]:.2f} 降到 {train[-1]:.2f}，"
            f"验证损失却从 {val[m.best]:.2f} 升到 {val[-1]:.2f}；"
            f"这次训练把文本读了 {m.passes:.0f} 遍。",
        ),
        Words(
            "End the run where it was best, or train on more text. The best weights are kept.",
            "在最好的那一步结束，或增加文本。最好的权重已保存。",
        ),
        _length(m.facts, since),
    )


def _batch_large(m: Measured) -> Finding | None:
    if m.facts.total_steps >= 60 or m.facts.steps_per_epoch > 8 or m.passes < 1.5 or m.gain < 0.03:
        return None
    factor = 4 if m.facts.batch_size >= 16 else 2
    return Finding(
        "batch-large",
        WARNING,
        0.8,
        Words("The batch is too large: too few steps", "批次太大，步数太少"),
        Words(
            f"The run has {_count(m.facts.total_steps, 'step')}, {m.facts.steps_per_epoch:,} of "
            f"them for a pass through the text, and the loss is still falling: twice the steps "
            f"would take off some {m.gain:.0%}.",
            f"这次训练只有 {m.facts.total_steps:,} 步，读一遍文本 {m.facts.steps_per_epoch:,} 步，"
            f"损失仍在下降：步数加倍约能再降 {m.gain:.0%}。",
        ),
        Words(
            "Take a smaller batch: the same text then makes more steps.",
            "用更小的批次：同样的文本就有更多步。",
        ),
        _batches(m.facts, 1 / (factor * factor), longer=True),
    )


def _rate_low(m: Measured) -> Finding | None:
    rate, usual = m.facts.learning_rate, m.facts.usual_rate
    if m.facts.begins_from_weights or rate > usual / 8 or max(m.gain, m.late_gain) < 0.01:
        return None
    return Finding(
        "rate-low",
        WARNING,
        0.85,
        Words("The learning rate is too low", "学习率太低"),
        Words(
            f"The loss falls slowly and evenly, and is still falling; the rate of {rate:.2g} is a "
            f"{usual / rate:.0f}th of what is usual for this model.",
            f"损失下降得又慢又匀，而且仍在下降；学习率 {rate:.2g} 是这种模型常用值的 "
            f"{usual / rate:.0f} 分之一。",
        ),
        Words("Train with a higher rate.", "用更高的学习率训练。"),
        {"learning_rate": _rounded(usual)},
    )


def _batch_small(m: Measured) -> Finding | None:
    if m.noise < 0.12 or m.facts.tokens_a_step > 256:
        return None
    factor = min(64, 2 ** math.ceil(math.log2((m.noise / 0.06) ** 2)))
    return Finding(
        "batch-small",
        WARNING,
        0.85,
        Words("The batch is too small: noisy steps", "批次太小，步子有噪声"),
        Words(
            f"From one step to the next the loss differs by {m.noise:.0%} by chance alone: a step "
            f"sees only {m.facts.tokens_a_step:,} tokens.",
            f"相邻两步的损失仅因偶然就相差 {m.noise:.0%}：一步只看到 {m.facts.tokens_a_step:,} 个 "
            "token。",
        ),
        Words("Take a larger batch.", "用更大的批次。"),
        _batches(m.facts, factor),
    )


def _model_small(m: Measured) -> Finding | None:
    ratio = m.facts.train_tokens / max(1, m.facts.parameters)
    if m.facts.begins_from_weights or ratio < 10 or m.gap > 0.1:
        return None
    if m.passes < LEAST_PASSES or m.gain > LITTLE_GAIN:  # then more time is what it lacks
        return None
    shape = _shape(m.facts, 2 * m.facts.emb_dim, m.facts.n_layers + 1)
    return Finding(
        "model-small",
        WARNING,
        0.75,
        Words("The model is too small for the text", "模型相对文本太小"),
        Words(
            f"Each of its {m.facts.parameters:,} parameters has {ratio:,.0f} tokens to learn "
            f"from. It has read all of them {m.passes:.0f} times, more time would give little, and "
            f"the loss is {m.curves.val_losses[-1]:.2f} on both texts.",
            f"模型的 {m.facts.parameters:,} 个参数每个对应 {ratio:,.0f} 个 token；"
            f"它已把全部文本读了 {m.passes:.0f} 遍，再久一些也没有多少提高，"
            f"两种文本的损失都是 {m.curves.val_losses[-1]:.2f}。",
        ),
        Words("Take a wider model with more layers.", "换更宽、层数更多的模型。"),
        {"model_overrides": shape},
    )


def _plateau(m: Measured) -> Finding | None:
    steps, val = np.array(m.curves.eval_steps), np.array(m.curves.val_losses)
    if not m.facts.is_over or len(steps) < 6 or _learns_by_heart(m):
        return None
    reached = int(steps[np.flatnonzero(val <= 1.02 * val.min())[0]])
    if reached > 0.6 * steps[-1] or m.late_gain > 0.015 or m.gain > 0.025:
        return None
    return Finding(
        "plateau",
        WARNING,
        0.8,
        Words(
            f"Nothing was gained after step {reached:,}",
            f"第 {reached:,} 步之后没有任何进步",
        ),
        Words(
            f"The validation loss was {val[steps == reached][0]:.3f} at step {reached:,} of "
            f"{steps[-1]:,} and is {val[-1]:.3f} at the end.",
            f"验证损失在第 {reached:,} 步（共 {steps[-1]:,} 步）是 {val[steps == reached][0]:.3f}，"
            f"最终是 {val[-1]:.3f}。",
        ),
        Words(
            "End the run earlier; a larger model or other text may learn more.",
            "可以早些结束；更大的模型或别的文本也许能学到更多。",
        ),
        _length(m.facts, max(10, round(1.6 * reached))),
    )


def _unfinished(m: Measured) -> Finding | None:
    if not m.facts.is_over or m.facts.begins_from_weights or _learns_by_heart(m):
        return None
    if m.gain < LITTLE_GAIN:
        return None
    seen = m.curves.eval_tokens[-1] / max(1, m.facts.parameters)
    is_much = m.gain > 0.1 and seen < 0.5 and m.facts.mode != "quick"
    times = 8 if is_much and m.facts.minutes is None else 2
    return Finding(
        "unfinished",
        WARNING if is_much else NOTE,
        0.8,
        Words("It is not finished", "训练尚未完成")
        if is_much
        else Words("More time would help a little", "再多训练一些会略有帮助"),
        Words(
            f"The validation loss is still falling: twice the steps would take off some "
            f"{m.gain:.0%}; the run read {_passes(m.passes).en}.",
            f"验证损失仍在下降：步数加倍约能再降 {m.gain:.0%}；这次训练{_passes(m.passes).zh}。",
        ),
        Words("Train longer.", "训练得更久一些。"),
        _length(m.facts, times * m.facts.total_steps),
    )


def _repeats(m: Measured) -> Finding | None:
    shares = [repetition(sample) for sample in m.facts.samples]
    if not shares or (share := sorted(shares)[len(shares) // 2]) < 0.5:
        return None
    if m.facts.repeated is not None and m.facts.repeated > 0.3:
        return None
    return Finding(
        "repeats",
        WARNING,
        0.8,
        Words("What it writes repeats itself", "它写的文字在重复自己"),
        Words(
            f"{share:.0%} of the text that it writes came just before in it; the temperature is "
            f"{m.facts.temperature:g}.",
            f"它写的文字有 {share:.0%} 刚刚出现过；温度是 {m.facts.temperature:g}。",
        ),
        Words(
            "Draw with a higher temperature, or with a repetition penalty.",
            "提高采样温度，或使用重复惩罚。",
        ),
        {"temperature": 0.8, "repetition_penalty": 1.1}
        if m.facts.temperature >= 0.6
        else {"temperature": 0.8},
    )


def _starved(m: Measured) -> Finding | None:
    if m.slowdown > 0.7:
        return None
    return Finding(
        "starved",
        WARNING if m.slowdown < 0.5 else NOTE,
        0.7,
        Words("The machine became slower", "机器变慢了"),
        Words(
            f"In the last third of the run it made {m.slowdown:.0%} of the tokens a second of the "
            "first third: other programs, heat, or too little memory.",
            f"最后三分之一的速度只有最初三分之一的 {m.slowdown:.0%}："
            "可能是其他程序、过热或内存不足。",
        ),
        Words(
            "End other programs, or leave half of the cores to them from the start.",
            "关闭其他程序，或一开始就把一半核心留给它们。",
        ),
        {"NIGHT_MODE": True},
    )


# causes before what they cause
RULES: tuple[Callable[[Measured], Finding | None], ...] = (
    _nan, _rate_high, _duplicates, _leak, _unlike, _model_large, _by_heart, _batch_small,
    _batch_large, _rate_low, _model_small, _plateau, _unfinished, _repeats, _starved,
)  # fmt: skip
# a finding that goes without saying where one of these is there
EXPLAINED_BY = {
    "by-heart": {"model-large", "unlike"},
    "unfinished": {
        *("rate-low", "rate-high", "batch-large", "by-heart", "model-large", "model-small"),
        *("plateau", "duplicates", "leak"),
    },
    "plateau": {"rate-high", "model-small", "unlike", "leak", "duplicates"},
    "batch-small": {"rate-high", "by-heart"},
}


# ------------------------------------------------------------------------------- small parts


def repetition(text: str, least: int = 3) -> float:
    """The share of a text's characters that continue a loop: what came within 80 characters before.

    A run of at least 3 * `least` equal characters at one distance counts.
    """
    codes = np.array([ord(letter) for letter in text])
    looped = np.zeros(len(codes), dtype=bool)
    for distance in range(1, min(80, len(codes) - 1)):
        same = np.concatenate(([False], codes[distance:] == codes[:-distance], [False]))
        edges = np.flatnonzero(np.diff(same.astype(np.int8)))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            if stop - start >= max(3 * least, distance):
                looped[start + distance : stop + distance] = True
    return float(looped.mean()) if len(codes) else 0.0


def _slower(facts: Facts, factor: float) -> dict[str, Any]:
    return {"learning_rate": _rounded(facts.learning_rate / factor)}


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def _batches(facts: Facts, factor: float, *, longer: bool = False) -> dict[str, Any]:
    """The settings of a batch that is `factor` times as large; `longer`: over as many tokens."""
    windows = max(1, round(facts.batch_size * factor))
    changes: dict[str, Any] = {"batch_size": windows}
    if longer and facts.minutes is None:  # which set the length otherwise
        changes |= _length(facts, round(facts.total_steps * facts.batch_size / windows))
    return changes


def _length(facts: Facts, steps: int) -> dict[str, Any]:
    """The setting that makes a run about so many steps long."""
    if facts.minutes is None:
        # fewer steps than those of warm-up are refused
        return {"max_steps": min(MOST_STEPS, max(steps, facts.warmup_steps + 1))}
    minutes = facts.minutes * steps / facts.total_steps
    return {"MINUTES": _rounded(min(MOST_MINUTES, max(LEAST_MINUTES, minutes)))}


def _shape(facts: Facts, width: int, n_layers: int) -> dict[str, Any]:
    """The model_overrides of another width, with numbers of heads that fit: theirs stays nearly."""
    wanted = width * facts.n_heads / facts.emb_dim
    most = min(1024, width // 2)
    # an even width of a head, which rotary positions need
    fitting = [n for n in range(1, most + 1) if width % (2 * n) == 0] or [1]
    n_heads = min(fitting, key=lambda n: (abs(n - wanted), -n))
    shape = {"emb_dim": width, "n_heads": n_heads}
    overrides = facts.custom_params.get("model_overrides") or {}
    if facts.n_kv_heads != facts.n_heads or "n_kv_heads" in {*facts.custom_params, *overrides}:
        shared = max(1, n_heads * facts.n_kv_heads // facts.n_heads)
        shape["n_kv_heads"] = max(n for n in range(1, shared + 1) if n_heads % n == 0)
    return shape | {"n_layers": n_layers}


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _passes(passes: float) -> Words:
    if passes < 1:
        return Words(f"{passes:.0%} of the text", f"读了文本的 {passes:.0%}")
    if passes < 1.5:
        return Words("all of the text once", "把文本读了一遍")
    return Words(f"all of the text {passes:.0f} times", f"把文本读了 {passes:.0f} 遍")


def _sentence(parts: list[str]) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."
