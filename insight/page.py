"""A run as a page: one file that opens offline, with nothing in it that a text can break out of."""

import math
import shlex
from dataclasses import asdict
from typing import Any

from engine.memory import as_bytes
from engine.metrics import as_duration
from engine.settings import shown
from engine.words import Words
from insight.curves import buckets
from insight.diagnosis import Finding
from insight.markup import MOST_VALUE, both, clean, code, embedded, escaped, page, section, table
from insight.run_files import RunFiles, divide_remark
from insight.verdict import change_lines, headline
from planning.card import card_rows
from training.pace import BY_HEART

MOST_POINTS = 500  # of a curve; no screen has more columns for it
MOST_WRITTEN = 600_000  # bytes of samples
MOST_TEXTS, MOST_TEXT = 16, 5_000  # of a moment; characters of each
MOST_FILES, MOST_NOTES = 40, 60  # files and notes of the data report
DIGITS = 5  # of a number in a curve

TITLES = {  # of the curves
    "loss": Words("Loss, nats a token", "损失（每 token 奈特）"),
    "rate": Words("Learning rate", "学习率"),
    "norm": Words("Gradient norm, before clipping", "裁剪前的梯度范数"),
    "speed": Words("Tokens a second", "每秒 token 数"),
}
SEVERITY = {
    "problem": Words("problem", "问题"),
    "warning": Words("warning", "警告"),
    "note": Words("note", "提示"),
}
BASELINES = {
    "uniform": Words("uniform guess", "均匀猜测"),
    "unigram": Words("token frequencies", "token 频率"),
    "ngram": Words("5-gram", "5 元模型"),
    "bz2": Words("bz2", "bz2"),
    "xz": Words("xz with the training text", "xz（带训练文本）"),
}


def render_page(run: RunFiles, findings: list[Finding]) -> bytes:
    """The report on a run as HTML; at most 1 MB, whatever the run has written."""
    data = _data(run)
    sections = [
        _verdict(run, findings),
        _findings(run, findings),
        _curves(is_chat=run.record.chat is not None),
        _written(run, len(data["moments"])),
        _card(run),
        _text_report(run),
        _settings(run),
        _how_to_use(run),
    ]
    made = page(run.path.name, "".join(sections), scripts=["report.js"], data=embedded(data))
    return made.encode("utf-8")


# --------------------------------------------------------------------------------- sections


def _verdict(run: RunFiles, findings: list[Finding]) -> str:
    record, curves, model = run.record, run.curves, run.record.model
    step = f"{curves.steps[-1] if curves.steps else 0:,}"
    tokens = f"{curves.tokens[-1] if curves.tokens else 0:,}"
    took = (run.summary or {}).get("elapsed_s")
    time = Words("", "")
    if isinstance(took, int | float):
        time = Words(f", {as_duration(took)}", f"，{as_duration(took)}")
    total, parameters = f"{record.total_steps:,}", f"{run.facts.parameters:,}"
    seen = Words(f"{tokens} tokens", f"{tokens} 个 token")
    if record.chat is not None:
        seen = Words(f"{tokens} tokens of answers", f"答案的 {tokens} 个 token")
    about = Words(
        f"{step} of {total} steps, {seen.en}{time.en}; {parameters} parameters, "
        f"{model.n_layers} x {model.emb_dim}, {record.mode} mode, {record.precision.name} on "
        f"{record.device}; begun {record.started}",
        f"{step}/{total} 步，{seen.zh}{time.zh}；{parameters} 个参数，{model.n_layers} x "
        f"{model.emb_dim}，{record.mode} 模式，{record.precision.name}，{record.device}；开始于 "
        f"{record.started}",
    )
    sentence, quiet = both(headline(run, findings)), both(about)
    return f'<section id="verdict"><p>{sentence}</p>\n<p class="quiet">{quiet}</p></section>\n'


def _findings(run: RunFiles, findings: list[Finding]) -> str:
    title = Words("Diagnosis", "诊断")
    if not findings:
        nothing = Words(
            "Nothing stands out: the losses fall as they should.", "没有异常：损失正常下降。"
        )
        return section("diagnosis", title, f'<p class="good">{both(nothing)}</p>')
    parts = []
    for finding in findings:
        sure = Words(f"{finding.confidence:.0%} sure", f"把握 {finding.confidence:.0%}")
        badge = (
            f'<span class="severity {finding.severity}">{both(SEVERITY[finding.severity])}</span>'
        )
        lines = change_lines(finding.changes, run.facts)
        parts.append(
            f'<div class="finding"><h3>{badge}{both(finding.title)} '
            f'<span class="quiet">{both(sure)}</span></h3>\n<p>{both(finding.evidence)}</p>\n'
            f"<p>{both(finding.advice)}</p>\n{code(lines) if lines else ''}</div>\n"
        )
    return section("diagnosis", title, "".join(parts))


def _titles(*, is_chat: bool) -> dict[str, Words]:
    of_answers = Words("Tokens of the answers a second", "每秒答案的 token 数")
    return TITLES | ({"speed": of_answers} if is_chat else {})


def _curves(*, is_chat: bool) -> str:
    titles = _titles(is_chat=is_chat)

    def chart(name: str) -> str:
        head = f"<h3>{both(titles[name])}</h3>"
        if name == "loss":
            whole = Words("from the first step", "从第一步起")
            head += f'<button type="button" id="whole" aria-pressed="false">{both(whole)}</button>'
        return f'<div class="chart" data-chart="{name}">{head}<div class="legend"></div></div>\n'

    no_script = Words("The curves need JavaScript.", "显示曲线需要 JavaScript。")
    first, *others = titles
    content = f'{chart(first)}<div class="small">{"".join(map(chart, others))}</div>\n'
    content += f"<noscript><p>{both(no_script)}</p></noscript>"
    return section("curves", Words("Curves", "曲线"), content)


def _written(run: RunFiles, n_moments: int) -> str:
    if not n_moments:
        return ""
    last = n_moments - 1
    label = Words("moment", "时刻")
    content = (
        f'<div class="moment"><label for="moment">{both(label)}</label>'
        f'<input type="range" id="moment" min="0" max="{last}" value="{last}">'
        '<output id="when" for="moment"></output></div>\n<div id="texts"></div>'
    )
    meter = run.insight.get("by_heart")
    if isinstance(meter, dict):
        content += _about_copies(meter, is_chat=run.record.chat is not None)
    return section("written", Words("What it wrote over time", "它先后写出的文字"), content)


def _card(run: RunFiles) -> str:
    choice = run.record.choice
    if choice is None or run.record.asked.minutes is None:
        return ""
    rows = card_rows(
        choice.recipe, choice.text, choice.machine, run.record.asked.minutes,
        run.record.origins.get("start"),
    )  # fmt: skip
    title = Words("The card, and what came of it", "预报卡与结果")
    head = (Words("", ""), Words("forecast", "预测"), Words("came out", "结果"))
    card = table([both(label), both(words)] for label, words in rows)
    return section("card", title, table(_outcomes(run), head) + card)


def _outcomes(run: RunFiles) -> list[list[str]]:
    choice, curves, summary = run.record.choice, run.curves, run.summary or {}
    assert choice is not None, "_card() has looked"
    recipe, rows = choice.recipe, []
    bits = summary.get("final_val_bits_per_byte")
    is_in = isinstance(bits, float) and recipe.low <= bits <= recipe.high
    hit = Words("within the range", "在区间内") if is_in else Words("outside the range", "在区间外")
    if choice.text.is_chat:
        of_answers = both(Words("bits a byte of the answers", "答案的每字节比特"))
        rows.append([of_answers, "–", f"{bits:.3f}" if isinstance(bits, float) else "–"])
    else:
        rows.append(
            [
                both(Words("bits a byte", "每字节比特")),
                f"{recipe.bits_per_byte:.2f} ({recipe.low:.2f}–{recipe.high:.2f})",
                f"{bits:.3f} · {both(hit)}" if isinstance(bits, float) else "–",
            ]
        )
    if curves.forecast is not None:
        least, expected, most = map(curves.as_bits, curves.forecast)
        where = Words(
            "bits a byte, as seen where the decay began", "每字节比特（衰减开始时的预测）"
        )
        rows.append(
            [
                both(where),
                f"{expected:.3f} ({least:.3f}–{most:.3f})",
                f"{bits:.3f}" if isinstance(bits, float) else "–",
            ]
        )
    took = summary.get("elapsed_s")
    rows.append(
        [
            both(Words("time", "时间")),
            as_duration(60 * (run.record.asked.minutes or 0)),
            as_duration(took) if isinstance(took, int | float) else "–",
        ]
    )
    done = curves.steps[-1] if curves.steps else 0
    rows.append([both(Words("steps", "步数")), f"{recipe.steps:,}", f"{done:,}"])
    return rows


def _text_report(run: RunFiles) -> str:
    data = run.data
    rows = []

    def add(words: Words, value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            rows.append([both(words), f"{value:,}"])

    files = [file for file in data.get("files") or [] if isinstance(file, dict)]
    for file in files[:MOST_FILES]:
        size = file.get("bytes")
        rows.append([escaped(file.get("name")), as_bytes(size) if isinstance(size, int) else "–"])
    if len(files) > MOST_FILES:
        rows.append([both(Words("more files", "其余文件")), f"{len(files) - MOST_FILES:,}"])
    for name, words in (
        ("documents", Words("documents", "文档")),
        ("empty_documents", Words("empty documents", "空文档")),
        ("duplicate_documents", Words("documents that occur twice", "重复的文档")),
        ("documents_on_both_sides", Words("documents on both sides", "同时出现在两边的文档")),
        ("characters", Words("characters", "字符")),
        ("tokens", Words("tokens", "token")),
        ("vocabulary", Words("vocabulary", "词表")),
        ("vocabulary_used", Words("of it in use", "其中用到")),
        ("unknown_tokens", Words("unknown tokens", "未知 token")),
    ):
        add(words, data.get(name))
    split = data.get("split")
    for name, words in (
        ("train_tokens", Words("tokens to train on", "训练用 token")),
        ("validation_tokens", Words("tokens to validate on", "验证用 token")),
    ):
        add(words, split.get(name) if isinstance(split, dict) else None)
    rows.append([both(Words("tokenizer", "分词器")), both(_named(data.get("tokenizer")))])
    rows += _baseline_rows(run)
    notes = [*(data.get("notices") or []), *(data.get("notes") or [])][:MOST_NOTES]
    listed = "".join(f"<li>{both(Words.of(note), 1000)}</li>" for note in notes)
    content = table(rows) + (f'<ul class="quiet">{listed}</ul>' if listed else "")
    return section("text", Words("The text", "文本"), content)


def _named(tokenizer: Any) -> Words:
    """The name of a tokenizer, which may be a number of characters, and tokens of its own."""
    name = str(tokenizer)
    in_chinese = name.replace(" characters", " 个字符", 1).replace(", and ", "，以及 ", 1)
    return Words(name[:MOST_VALUE], in_chinese[:MOST_VALUE])


def _baseline_rows(run: RunFiles) -> list[list[str]]:
    """Bits a byte of the validation text: the model's, and those of simpler means."""
    known = run.facts.baselines
    if not known or not run.curves.val_losses:
        return []
    rows = [(run.final_bits, Words("this model", "这个模型"))]
    rows += [(value, BASELINES[name]) for name, value in known.items() if name in BASELINES]
    unit = Words(" bits a byte", " 比特/字节")
    return [
        [
            both(words) + both(Words(": validation text", "：验证文本")),
            f"{value:.3f}{both(unit)}",
        ]
        for value, words in sorted(rows, key=lambda row: row[0])
    ]


def _settings(run: RunFiles) -> str:
    record = run.record
    head = (Words("setting", "设置"), Words("value", "值"), Words("origin", "来源"))
    nothing, worked_out = Words("", ""), Words("worked out", "自动得出")
    names = {**record.settings, "mode": record.mode, "model": record.model_name}
    rows = [
        (name, value, record.origins.get(name, nothing))
        for name, value in names.items()
        if name not in ("custom_params", "sampling_params")
    ]
    given = record.settings.get("custom_params")
    given = given if isinstance(given, dict) and record.mode == "custom" else {}
    asked = asdict(record.asked.training)
    reasons = record.recipe.reasons if record.recipe is not None else {}
    chosen = record.recipe.training if record.recipe is not None else {}

    def origin(name: str) -> Words:
        if name in record.origins:
            return Words.of(record.origins[name])
        if given.get(name) is not None:
            return Words.of("custom_params")
        if name in reasons:
            return Words(f"MINUTES: {reasons[name].en}", f"MINUTES：{reasons[name].zh}")
        if name in chosen:
            return Words.of("MINUTES")
        return worked_out if name in asked and asked[name] is None else nothing

    for part in (record.training, record.model, record.sampling):
        rows += [(name, value, origin(name)) for name, value in asdict(part).items()]
    body = [
        [escaped(n).replace("_", "_<wbr>"), escaped(shown(value)), both(why)]
        for n, value, why in rows
    ]
    changes = filter(None, map(_about_change, record.changes[-MOST_NOTES:]))
    listed = "".join(f"<li>{both(change, 1000)}</li>" for change in changes)
    title = Words("Settings and where they are from", "设置及其来源")
    changed = Words("Changed on the way", "途中更改")
    more = f"<p>{both(changed)}</p><ul>{listed}</ul>" if listed else ""
    details = f"<summary>{both(title)}</summary>\n{table(body, head)}{more}"
    return f'<section id="settings"><details>{details}</details></section>\n'


def _about_change(change: Any) -> Words | None:
    """What a run's record has of a change on its way, in words; None where it changed nothing."""
    if not isinstance(change, dict):
        return Words.of(shown(change))
    at = str(change.get("at", ""))
    if "after_step" not in change:
        pairs = [(name, value) for name, value in change.items() if name != "at"]
        return Words.of(f"{at}: {', '.join(f'{name} {shown(value)}' for name, value in pairs)}")
    step, was, now = (
        shown(change.get(name)) for name in ("after_step", "steps_before", "total_steps")
    )
    if change.get("why") == BY_HEART:
        return Words(
            f"{at}: after step {step} the model began to learn by heart: {now} steps, not {was}",
            f"{at}：第 {step} 步之后模型开始背诵文本：{now} 步，而不是 {was} 步",
        )
    if was == now:
        return None
    return Words(
        f"{at}: planned anew after step {step}, by the time that steps took: {now} steps, not "
        f"{was}",
        f"{at}：第 {step} 步之后按每步所用的时间重新计划：{now} 步，而不是 {was} 步",
    )


def _how_to_use(run: RunFiles) -> str:
    name = shlex.quote(clean(str(run.path)))
    uses = (
        (Words("Write with it", "用它写作"), f"python -m scripts.inference --run {name}"),
        (Words("In the browser", "在浏览器中"), f"python -m scripts.serve --run {name}"),
        (
            Words("Measure more for this report", "为本报告测量更多"),
            f"python -m scripts.report {name}",
        ),
        (
            Words("For other programs", "供其他程序使用"),
            f"python -m scripts.export --run {name} --to hf exported",
        ),
    )
    content = "".join(f"<p>{both(words)}</p>{code([Words.of(command)])}" for words, command in uses)
    return section("use", Words("How to use it", "如何使用"), content)


# ------------------------------------------------------------------------------------- data


def _data(run: RunFiles) -> dict[str, Any]:
    """What the script draws."""
    curves = run.curves
    words = {
        "step": Words("step {}", "第 {} 步"),
        "bits": Words("bits a byte", "比特/字节"),
        "prompt": Words("prompt", "提示") if run.record.chat is None else Words("question", "问题"),
    }
    has_bytes = math.isfinite(curves.bytes_a_token)
    titles = _titles(is_chat=run.record.chat is not None)
    charts: dict[str, dict[str, Any]] = {
        "loss": {
            "tall": True,
            "lines": _lines(run),
            "curves": [
                _curve("batch", Words("batch", "批次"), curves.steps, curves.losses, band=True),
                _curve("train", Words("training", "训练"), curves.eval_steps, curves.train_losses),
                _curve("val", Words("validation", "验证"), curves.eval_steps, curves.val_losses),
            ],
        },
        "rate": {
            "zero": True,
            "curves": [_curve("train", Words("rate", "学习率"), curves.steps, curves.rates)],
        },
        "norm": {
            "zero": True,
            "curves": [
                _curve("batch", Words("norm", "范数"), curves.steps, curves.grad_norms, band=True)
            ],
        },
        "speed": {
            "zero": True,
            "curves": [
                _curve("speed", Words("tokens/s", "token/秒"), curves.eval_steps, curves.speeds)
            ],
        },
    }
    return {
        "charts": {name: chart | {"title": titles[name]} for name, chart in charts.items()},
        "bytes": _rounded(curves.bytes_a_token) if has_bytes else None,
        "words": words,
        "moments": _moments(run),
    }


def _lines(run: RunFiles) -> list[dict[str, Any]]:
    """The baselines as losses in nats a token."""
    lines = [
        {"name": BASELINES["uniform"], "value": _rounded(math.log(run.record.model.vocab_size))}
    ]
    nats = math.log(2) * run.curves.bytes_a_token
    for name, bits in run.facts.baselines.items():
        if name in BASELINES and name != "uniform" and math.isfinite(nats):
            lines.append({"name": BASELINES[name], "value": _rounded(bits * nats)})
    return lines


def _curve(
    kind: str, name: Words, steps: list[int], values: list[float], *, band: bool = False
) -> dict[str, Any]:
    points = [
        [b.step, *(_rounded(v) for v in ((b.mean, b.least, b.most) if band else (b.mean,)))]
        for b in buckets(steps, values, MOST_POINTS)
    ]
    return {"kind": kind, "name": name, "points": points}


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _moments(run: RunFiles) -> list[dict[str, Any]]:
    """As many moments as fit into MOST_WRITTEN bytes of the page: the first, and the last ones."""
    copied = run.insight.get("copied") or {}
    room = MOST_WRITTEN
    kept: list[dict[str, Any]] = []
    for sample in [*run.samples[:1], *reversed(run.samples[1:])]:
        moment = {
            "label": [clean(part[:MOST_VALUE]) for part in sample.label_words],
            "step": sample.step,
            "texts": [
                _pieces(text[:MOST_TEXT], copied.get(text)) for text in sample.texts[:MOST_TEXTS]
            ],
        }
        room -= len(embedded(moment).encode("utf-8"))
        if room < 0:
            break
        kept.append(moment)
    return kept[:1] + kept[:0:-1]


def _about_copies(meter: dict[str, Any], *, is_chat: bool) -> str:
    """What the by-heart meter found, in a sentence."""

    def share(name: str) -> str:
        value = meter.get(name)
        return f"{value:.1%}" if isinstance(value, int | float) else "–"

    known, guessed = share("extraction_rate"), share("guess_rate")
    copied, chance = share("samples_share"), share("chance_share")
    tried = Words(
        f"of {meter.get('prompts', 0)} passages of the training text it continues {known} word for "
        f"word, and {guessed} of the validation text.",
        f"训练文本的 {meter.get('prompts', 0)} 个段落中，它能逐字续写 {known}；验证文本为 "
        f"{guessed}。",
    )
    if is_chat:
        tried = Words(
            f"of {meter.get('prompts', 0)} questions that it learned it answers {known} word for "
            f"word as they were answered, and {guessed} of {meter.get('val_prompts', 0)} that "
            "validate.",
            f"学过的 {meter.get('prompts', 0)} 个问题中，有 {known} 答得与原答案逐字相同；"
            f"验证用的 {meter.get('val_prompts', 0)} 个问题为 {guessed}。",
        )
    words = Words(
        f"By heart: {tried.en} Of what it wrote {copied} is copied (spans of 50 bytes); of new "
        f"text {chance} is in the training text by chance. Copies are marked.",
        f"背诵情况：{tried.zh}它写的文字中 {copied} 是照抄（按 50 字节片段计）；新文本本来就有 "
        f"{chance} 碰巧出现在训练文本中。照抄处已标出。",
    )
    return f'<p class="quiet">{both(words)}</p>'


def _pieces(text: str, copied: Any) -> list[list[Any]]:
    """A text in pieces, each with whether it is copied; a remark on it is a pair of words."""
    text, remark = divide_remark(text)
    pieces: list[tuple[str, bool]] = []
    end = 0
    for start, stop in sorted(copied) if isinstance(copied, list) else []:
        start = max(start, end)
        if stop > start:
            pieces += [(text[end:start], False), (text[start:stop], True)]
            end = stop
    pieces.append((text[end:], False))
    found: list[list[Any]] = [[clean(part), is_copied] for part, is_copied in pieces if part]
    return found if remark is None else [*found, [remark, False]]
