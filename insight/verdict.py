"""The sentence that matters first, and what a run prints of its diagnosis."""

import json
import math
from itertools import starmap
from typing import Any

from engine.settings import ALIASES
from engine.words import Words
from insight.diagnosis import NOTE, PROBLEM, Facts, Finding, measure
from insight.run_files import RunFiles
from training_utils import TrainingConfig

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_window")
TOP_LEVEL = ("DATA", "MINUTES", "PRECISION", "NIGHT_MODE", "TOKENIZER")
FIRST_MINUTES = 5  # after a quick run
LEAST_GAIN = 0.005  # of more time, that is worth a word
ROUND_S = tuple(n * unit for unit in (1, 60, 3600) for n in (1, 2, 5, 10, 20, 30))
# shares from which a model copies: of what it writes, beyond what new text has by chance, and of
# the passages that it continues word for word
COPIED, EXTRACTED = 0.05, 0.01
WIDE_GAP = 1.0  # of the validation loss over the training loss, as a share, from which it is told


def headline(run: RunFiles, findings: list[Finding]) -> Words:
    """How good the run is, in one sentence: its figure, copying, and what more time would give."""
    curves, facts = run.curves, run.facts
    if not curves.val_losses:
        return Words("Nothing was evaluated yet.", "还没有评估结果。")
    worst = findings[0] if findings else None
    measured = measure(curves, facts)
    is_measured = measured is not None
    bits = run.final_bits
    parts_en, parts_zh = [], []
    if bits == bits:
        of = Words("", "") if run.record.chat is None else Words(" of the answers", "答案")
        parts_en.append(f"{bits:.2f} bits a byte{of.en}")
        parts_zh.append(f"{of.zh}每字节 {bits:.2f} 比特")
        if known := facts.baselines.get("bz2"):
            share = bits / known - 1
            parts_en.append(f"{abs(share):.0%} {'below' if share < 0 else 'above'} bz2")
            parts_zh.append(f"比 bz2 {'低' if share < 0 else '高'} {abs(share):.0%}")
    else:
        parts_en.append(f"validation loss {run.final_loss:.3f}")
        parts_zh.append(f"验证损失 {run.final_loss:.3f}")
    about = Words("", "")
    if measured is not None:
        meter, tried = run.insight.get("by_heart"), Words("passages", "段落")
        if run.record.chat is not None:
            tried = Words("answers", "答案")
        about = _about_copying(
            meter, findings, tried, keeps_last=facts.keeps_last, gap=measured.gap
        )
    parts_en.append(about.en)
    parts_zh.append(about.zh)
    more = Words("", "") if worst and worst.severity == PROBLEM else _about_more(run, facts)
    opening = Words("Too early to say", "为时尚早")
    if is_measured or worst is not None:
        opening = _opening(worst, bits, facts.baselines.get("bz2"), is_over=run.is_over)
    return Words(
        f"{opening.en}: {', '.join(part for part in parts_en if part)}{more.en}.",
        f"{opening.zh}：{'，'.join(part for part in parts_zh if part)}{more.zh}。",
    )


def _opening(worst: Finding | None, bits: float, of_bz2: float | None, *, is_over: bool) -> Words:
    """A word for the run: good is only what is known to be better than a compressor."""
    if worst is None or worst.severity == NOTE:
        if of_bz2 is None or not math.isfinite(bits):
            word = Words("Sound", "正常")
        elif bits >= of_bz2:
            word = Words("Sound, but not yet better than a compressor", "正常，但还不如压缩程序")
        else:
            word = Words("Good", "良好")
    elif worst.severity == PROBLEM:
        word = Words(worst.title.en, worst.title.zh)
    else:
        word = Words(
            f"Could be better ({_lowered(worst.title.en)})", f"还可以更好（{worst.title.zh}）"
        )
    return word if is_over else Words(f"So far: {_lowered(word.en)}", f"到目前为止：{word.zh}")


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _about_copying(
    meter: Any, findings: list[Finding], tried: Words, *, keeps_last: bool, gap: float
) -> Words:
    """Whether it copies: by the meter, where it has measured, else by the curves."""
    if isinstance(meter, dict):
        known, written, chance = (
            float(meter.get(name) or 0.0)
            for name in ("extraction_rate", "samples_share", "chance_share")
        )
        if known >= EXTRACTED:
            return Words(
                f"{known:.0%} of tried {tried.en} are known by heart",
                f"试过的{tried.zh}有 {known:.0%} 能背出",
            )
        if written - chance >= COPIED:
            return Words(
                f"{written:.0%} of what it writes is copied", f"它写的文字有 {written:.0%} 是照抄"
            )
        return Words("no sign of copying", "没有照抄的迹象")
    kinds = {finding.kind for finding in findings}
    if kinds & {"by-heart", "model-large", "duplicates", "leak"} or keeps_last:
        return Words("", "")
    if gap > WIDE_GAP:
        return Words(
            "its training text known far better than other text", "训练文本记得远比别的文本好"
        )
    return Words("no sign of learning by heart", "没有背诵的迹象")


def _about_more(run: RunFiles, facts: Facts) -> Words:
    """What more time would give: half as long again, in round numbers."""
    measured = measure(run.curves, facts)
    if measured is None or measured.gain <= 0 or facts.begins_from_weights or not run.is_over:
        return Words("", "")
    elapsed_s = (run.summary or {}).get("elapsed_s")
    if not isinstance(elapsed_s, int | float) or elapsed_s <= 0:
        return Words("", "")
    seconds = min(ROUND_S, key=lambda s: abs(s - elapsed_s / 2))
    gain = 1 - (1 - measured.gain) ** math.log2(1 + seconds / elapsed_s)
    if gain < LEAST_GAIN or measured.rise > 0.02 or measured.gap > WIDE_GAP:
        return Words("; more time would give little", "；再久一些也没有多少提高")
    time = _in_words(seconds)
    return Words(
        f"; {time.en} more would give some {gain:.0%}", f"；再训练{time.zh}约能再好 {gain:.0%}"
    )


def _in_words(seconds: int) -> Words:
    for unit, en, zh in ((3600, "hour", "小时"), (60, "minute", "分钟"), (1, "second", "秒")):
        if seconds >= unit:
            count = seconds // unit
            return Words(f"{count} {en}{'s' * (count != 1)}", f" {count} {zh}")
    raise AssertionError("ROUND_S begins with a second")


def change_lines(changes: dict[str, Any], facts: Facts) -> list[Words]:
    """The lines of the run's settings file that make some changes, and leave its other numbers;
    only their comments differ by language.

    Quick mode is only to show that all works: in place of its numbers, MINUTES chooses them.
    """
    above = {name: value for name, value in changes.items() if name in TOP_LEVEL}
    sampling = {name: value for name, value in changes.items() if name in SAMPLING}
    params = {n: v for n, v in changes.items() if n not in above and n not in sampling}
    first, kept = list[Words](), {}
    if params and facts.mode == "quick":
        chosen = Words("chooses all numbers for the text", "按文本选择所有数值")
        first, params = [_line(f"MINUTES = {FIRST_MINUTES}", chosen)], {}
    elif params and facts.mode != "custom":
        first = [_line("CUSTOM_MODE = True")]
        if facts.mode == "full" and not facts.begins_from_weights:
            first.append(_line(f"MODEL = {_shown(facts.model_name)}"))
            kept = {n: v for n, v in _numbers_of_full_mode().items() if n not in params}
    params, kept = (_in_custom_params(part, facts.custom_params) for part in (params, kept))
    inside = Words("in custom_params", "写在 custom_params 里")
    too = Words("in custom_params too", "也写在 custom_params 里")
    drawn = Words("in sampling_params", "写在 sampling_params 里")
    return [
        *first,
        *(_line(f"{name} = {_shown(value)}") for name, value in above.items()),
        *(_line(f"{_item(name, value)},", inside) for name, value in params.items()),
        *([_line(f"{', '.join(starmap(_item, kept.items()))},", too)] if kept else []),
        *(_line(f"{_item(name, value)},", drawn) for name, value in sampling.items()),
    ]


def _line(line: str, comment: Words | None = None) -> Words:
    if comment is None:
        return Words.of(line)
    return Words(f"{line}  # {comment.en}", f"{line}  # {comment.zh}")


def _numbers_of_full_mode() -> dict[str, Any]:
    """What full mode sets, and custom mode would work out otherwise."""
    usual = TrainingConfig().to_dict()
    full = TrainingConfig.get_full_training_config().to_dict()
    return {name: value for name, value in full.items() if value != usual[name]}


def _in_custom_params(changes: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Items of custom_params that make some changes, where its own are those given: a name keeps
    its place and spelling, and model_overrides what else they hold."""
    overrides = dict(own.get("model_overrides") or {})
    spelled = {ALIASES.get(name, name): name for name in own}
    inner = {ALIASES.get(name, name): name for name in overrides}
    items = {spelled.get(n, n): v for n, v in changes.items() if n != "model_overrides"}
    for name, value in changes.get("model_overrides", {}).items():
        if name in spelled and name not in inner:
            items[spelled[name]] = value
        else:
            overrides[inner.get(name, name)] = value
            items["model_overrides"] = overrides
    return items


def _item(name: str, value: Any) -> str:
    return f'"{name}": {_shown(value)}'


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def printed_lines(run: RunFiles, findings: list[Finding]) -> list[str]:
    """What a finished run prints: at most two lines."""
    lines = [f"Diagnosis: {headline(run, findings).en}"]
    told = [finding for finding in findings if finding.severity != NOTE]
    if told:
        change = "; ".join(line.en for line in change_lines(told[0].changes, run.facts))
        more = f" ({len(told) - 1} more in the report)" if len(told) > 1 else ""
        lines.append(f"  {told[0].evidence.en} To change: {change}{more}")
    return lines
