"""A run as a page: one file that opens offline, with nothing in it that a text can break out of."""

import base64
import functools
import hashlib
import html
import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.memory import as_bytes
from engine.metrics import as_duration
from engine.settings import shown
from insight.curves import buckets
from insight.diagnosis import Finding, Words
from insight.run_files import RunFiles
from insight.verdict import change_lines, headline
from planning.card import card_lines

HERE = Path(__file__).resolve().parent
MOST_POINTS = 500  # of a curve; no screen has more columns for it
MOST_WRITTEN = 600_000  # bytes of samples
MOST_TEXTS, MOST_TEXT = 16, 5_000  # of a moment; characters of each
MOST_FILES, MOST_NOTES, MOST_VALUE = 40, 60, 400  # files and notes of the data report; characters
DIGITS = 5  # of a number in a curve
# characters that change the writing direction, or that no page may contain
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

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
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash_of(style)}'; script-src '{_hash_of(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    name, data = _text(run.path.name), _data(run)
    sections = [
        _verdict(run, findings),
        _findings(run, findings),
        _curves(),
        _written(run, len(data["moments"])),
        _card(run),
        _text_report(run),
        _settings(run),
        _how_to_use(run),
    ]
    page = f"""<!doctype html>
<html lang="en" data-language="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<div><button type="button" data-speaks="en">English</button>
<button type="button" data-speaks="zh" lang="zh">中文</button></div>
</header>
<main>
{"".join(sections)}
</main>
<script type="application/json" id="data">{_embedded(data)}</script>
<script>{script}</script>
</body>
</html>
"""
    return page.encode("utf-8")


# ------------------------------------------------------------------------------ small parts


@functools.cache
def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash_of(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _embedded(value: Any) -> str:
    """A value as JSON that can't end the script element it stands in."""
    content = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return content.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _clean(text: str) -> str:
    return _CONTROLS.sub("\ufffd", text)


def _text(value: object, most: int = MOST_VALUE) -> str:
    """Any value as text of a page, at most so many characters of it."""
    text = _clean(str(value))
    return html.escape(text if len(text) <= most else f"{text[:most]}…")


def _both(words: Words) -> str:
    """Words in both languages, of which the page shows one."""
    en, zh = html.escape(_clean(words.en)), html.escape(_clean(words.zh))
    return f'<span class="en" lang="en">{en}</span><span class="zh" lang="zh">{zh}</span>'


def _section(name: str, title: Words, content: str) -> str:
    return f'<section id="{name}">\n<h2>{_both(title)}</h2>\n{content}\n</section>\n'


def _table(rows: Iterable[Sequence[str]], head: Sequence[Words] = ()) -> str:
    """Rows of cells that are HTML already."""
    top = "".join(f"<th>{_both(words)}</th>" for words in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="table"><table>{f"<tr>{top}</tr>" if top else ""}\n{body}</table></div>'


def _code(lines: Iterable[str]) -> str:
    return f"<pre><code>{_text(chr(10).join(lines), 20_000)}</code></pre>"


# --------------------------------------------------------------------------------- sections


def _verdict(run: RunFiles, findings: list[Finding]) -> str:
    record, curves = run.record, run.curves
    step = curves.steps[-1] if curves.steps else 0
    tokens = curves.tokens[-1] if curves.tokens else 0
    took = (run.summary or {}).get("elapsed_s")
    time = f", {as_duration(took)}" if isinstance(took, int | float) else ""
    parameters = run.facts.parameters
    about = Words(
        f"{step:,} of {record.total_steps:,} steps, {tokens:,} tokens{time}; {parameters:,} "
        f"parameters, {record.model.n_layers} x {record.model.emb_dim}, {record.mode} mode, "
        f"{record.precision.name} on {record.device}; begun {record.started}",
        f"{step:,}/{record.total_steps:,} 步，{tokens:,} 个 token{time}；{parameters:,} 个参数，"
        f"{record.model.n_layers} 层 x {record.model.emb_dim}，{record.mode} 模式，"
        f"{record.precision.name}，{record.device}；开始于 {record.started}",
    )
    sentence, quiet = _both(headline(run, findings)), _both(about)
    return f'<section id="verdict"><p>{sentence}</p>\n<p class="quiet">{quiet}</p></section>\n'


def _findings(run: RunFiles, findings: list[Finding]) -> str:
    title = Words("Diagnosis", "诊断")
    if not findings:
        nothing = Words(
            "Nothing stands out: the losses fall as they should.", "没有异常：损失正常下降。"
        )
        return _section("diagnosis", title, f'<p class="good">{_both(nothing)}</p>')
    parts = []
    for finding in findings:
        sure = Words(f"{finding.confidence:.0%} sure", f"把握 {finding.confidence:.0%}")
        badge = (
            f'<span class="severity {finding.severity}">{_both(SEVERITY[finding.severity])}</span>'
        )
        lines = change_lines(finding.changes, run.facts)
        parts.append(
            f'<div class="finding"><h3>{badge}{_both(finding.title)} '
            f'<span class="quiet">{_both(sure)}</span></h3>\n<p>{_both(finding.evidence)}</p>\n'
            f"<p>{_both(finding.advice)}</p>\n{_code(lines) if lines else ''}</div>\n"
        )
    return _section("diagnosis", title, "".join(parts))


def _curves() -> str:
    def chart(name: str, title: Words) -> str:
        head = f"<h3>{_both(title)}</h3>"
        if name == "loss":
            whole = Words("from the first step", "从第一步起")
            head += f'<button type="button" id="whole" aria-pressed="false">{_both(whole)}</button>'
        return f'<div class="chart" data-chart="{name}">{head}<div class="legend"></div></div>\n'

    no_script = Words("The curves need JavaScript.", "显示曲线需要 JavaScript。")
    small = "".join(
        chart(name, words)
        for name, words in (
            ("rate", Words("Learning rate", "学习率")),
            ("norm", Words("Gradient norm, before clipping", "裁剪前的梯度范数")),
            ("speed", Words("Tokens a second", "每秒 token 数")),
        )
    )
    content = chart("loss", Words("Loss, nats a token", "损失（每 token 奈特）"))
    content += f'<div class="small">{small}</div>\n<noscript><p>{_both(no_script)}</p></noscript>'
    return _section("curves", Words("Curves", "曲线"), content)


def _written(run: RunFiles, n_moments: int) -> str:
    if not n_moments:
        return ""
    last = n_moments - 1
    label = Words("moment", "时刻")
    content = (
        f'<div class="moment"><label for="moment">{_both(label)}</label>'
        f'<input type="range" id="moment" min="0" max="{last}" value="{last}">'
        '<output id="when" for="moment"></output></div>\n<div id="texts"></div>'
    )
    meter = run.insight.get("by_heart")
    if isinstance(meter, dict):
        content += _about_copies(meter)
    return _section("written", Words("What it wrote over time", "它先后写出的文字"), content)


def _card(run: RunFiles) -> str:
    choice = run.record.choice
    if choice is None or run.record.asked.minutes is None:
        return ""
    lines = card_lines(
        choice.recipe, choice.text, choice.machine, run.record.asked.minutes,
        run.record.origins.get("start"),
    )  # fmt: skip
    title = Words("The card, and what came of it", "卡片与结果")
    head = (Words("", ""), Words("forecast", "预测"), Words("came out", "结果"))
    return _section("card", title, _table(_outcomes(run), head) + _code(lines))


def _outcomes(run: RunFiles) -> list[list[str]]:
    choice, curves, summary = run.record.choice, run.curves, run.summary or {}
    assert choice is not None, "_card() has looked"
    recipe, rows = choice.recipe, []
    bits = summary.get("final_val_bits_per_byte")
    is_in = isinstance(bits, float) and recipe.low <= bits <= recipe.high
    hit = Words("within the range", "在区间内") if is_in else Words("outside the range", "在区间外")
    rows.append(
        [
            _both(Words("bits a byte", "每字节比特")),
            f"{recipe.bits_per_byte:.2f} ({recipe.low:.2f}–{recipe.high:.2f})",
            f"{bits:.3f} · {_both(hit)}" if isinstance(bits, float) else "–",
        ]
    )
    if curves.forecast is not None:
        least, expected, most = map(curves.as_bits, curves.forecast)
        where = Words(
            "bits a byte, as seen where the decay began", "每字节比特（衰减开始时的预测）"
        )
        rows.append(
            [
                _both(where),
                f"{expected:.3f} ({least:.3f}–{most:.3f})",
                f"{bits:.3f}" if isinstance(bits, float) else "–",
            ]
        )
    took = summary.get("elapsed_s")
    rows.append(
        [
            _both(Words("time", "时间")),
            as_duration(60 * (run.record.asked.minutes or 0)),
            as_duration(took) if isinstance(took, int | float) else "–",
        ]
    )
    done = curves.steps[-1] if curves.steps else 0
    rows.append([_both(Words("steps", "步数")), f"{recipe.steps:,}", f"{done:,}"])
    return rows


def _text_report(run: RunFiles) -> str:
    data = run.data
    rows = []

    def add(words: Words, value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool):
            rows.append([_both(words), f"{value:,}"])

    files = [file for file in data.get("files") or [] if isinstance(file, dict)]
    for file in files[:MOST_FILES]:
        size = file.get("bytes")
        rows.append([_text(file.get("name")), as_bytes(size) if isinstance(size, int) else "–"])
    if len(files) > MOST_FILES:
        rows.append([_both(Words("more files", "其余文件")), f"{len(files) - MOST_FILES:,}"])
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
    rows.append([_both(Words("tokenizer", "分词器")), _text(data.get("tokenizer"))])
    rows += _baseline_rows(run)
    notes = [*(data.get("notices") or []), *(data.get("notes") or [])][:MOST_NOTES]
    listed = "".join(f"<li>{_text(note, 1000)}</li>" for note in notes)
    content = _table(rows) + (f'<ul class="quiet" lang="en">{listed}</ul>' if listed else "")
    return _section("text", Words("The text", "文本"), content)


def _baseline_rows(run: RunFiles) -> list[list[str]]:
    """Bits a byte of the validation text: the model's, and those of simpler means."""
    known = run.facts.baselines
    if not known or not run.curves.val_losses:
        return []
    bits = (run.summary or {}).get("final_val_bits_per_byte")
    rows = [(run.curves.as_bits(run.curves.val_losses[-1]), Words("this model", "这个模型"))]
    if isinstance(bits, float):
        rows = [(bits, rows[0][1])]
    rows += [(value, BASELINES[name]) for name, value in known.items() if name in BASELINES]
    unit = Words(" bits a byte", " 比特/字节")
    return [
        [
            _both(words) + _both(Words(": validation text", "：验证文本")),
            f"{value:.3f}{_both(unit)}",
        ]
        for value, words in sorted(rows, key=lambda row: row[0])
    ]


def _settings(run: RunFiles) -> str:
    record = run.record
    head = (Words("setting", "设置"), Words("value", "值"), Words("origin", "来源"))
    names = {**record.settings, "mode": record.mode, "model": record.model_name}
    rows = [
        (name, value, record.origins.get(name, ""))
        for name, value in names.items()
        if name not in ("custom_params", "sampling_params")
    ]
    given = record.settings.get("custom_params")
    given = given if isinstance(given, dict) and record.mode == "custom" else {}
    asked = asdict(record.asked.training)
    reasons = record.recipe.reasons if record.recipe is not None else {}
    chosen = record.recipe.training if record.recipe is not None else {}

    def origin(name: str) -> str:
        if name in record.origins:
            return str(record.origins[name])
        if given.get(name) is not None:
            return "custom_params"
        if name in reasons or name in chosen:
            return f"MINUTES: {reasons[name]}" if name in reasons else "MINUTES"
        return "worked out" if name in asked and asked[name] is None else ""

    for part in (record.training, record.model, record.sampling):
        rows += [(name, value, origin(name)) for name, value in asdict(part).items()]
    body = [[_text(n), _text(shown(value)), _text(why)] for n, value, why in rows]
    changes = [_text(shown(change), 1000) for change in record.changes[-MOST_NOTES:]]
    listed = "".join(f"<li>{change}</li>" for change in changes)
    title = Words("Settings and where they are from", "设置及其来源")
    changed = Words("Changed on the way", "途中更改")
    more = f"<p>{_both(changed)}</p><ul>{listed}</ul>" if listed else ""
    details = f"<summary>{_both(title)}</summary>\n{_table(body, head)}{more}"
    return f'<section id="settings"><details>{details}</details></section>\n'


def _how_to_use(run: RunFiles) -> str:
    name = shlex.quote(_clean(str(run.path)))
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
    content = "".join(f"<p>{_both(words)}</p>{_code([command])}" for words, command in uses)
    return _section("use", Words("How to use it", "如何使用"), content)


# ------------------------------------------------------------------------------------- data


def _data(run: RunFiles) -> dict[str, Any]:
    """What the script draws."""
    curves = run.curves
    words = {
        "step": Words("step", "步"),
        "bits": Words("bits a byte", "比特/字节"),
        "prompt": Words("prompt", "提示"),
    }
    has_bytes = math.isfinite(curves.bytes_a_token)
    return {
        "charts": {
            "loss": {
                "tall": True,
                "lines": _lines(run),
                "curves": [
                    _curve("batch", Words("batch", "批次"), curves.steps, curves.losses, band=True),
                    _curve(
                        "train", Words("training", "训练"), curves.eval_steps, curves.train_losses
                    ),
                    _curve(
                        "val", Words("validation", "验证"), curves.eval_steps, curves.val_losses
                    ),
                ],
            },
            "rate": {
                "zero": True,
                "curves": [_curve("train", Words("rate", "学习率"), curves.steps, curves.rates)],
            },
            "norm": {
                "zero": True,
                "curves": [
                    _curve(
                        "batch", Words("norm", "范数"), curves.steps, curves.grad_norms, band=True
                    )
                ],
            },
            "speed": {
                "zero": True,
                "curves": [
                    _curve("speed", Words("tokens/s", "token/秒"), curves.eval_steps, curves.speeds)
                ],
            },
        },
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
            "label": _clean(sample.label[:MOST_VALUE]),
            "step": sample.step,
            "texts": [
                _pieces(text[:MOST_TEXT], copied.get(text)) for text in sample.texts[:MOST_TEXTS]
            ],
        }
        room -= len(_embedded(moment).encode("utf-8"))
        if room < 0:
            break
        kept.append(moment)
    return kept[:1] + kept[:0:-1]


def _about_copies(meter: dict[str, Any]) -> str:
    """What the by-heart meter found, in a sentence."""

    def share(name: str) -> str:
        value = meter.get(name)
        return f"{value:.1%}" if isinstance(value, int | float) else "–"

    words = Words(
        f"By heart: of {meter.get('prompts', 0)} passages of the training text it continues "
        f"{share('extraction_rate')} word for word, and {share('guess_rate')} of the validation "
        f"text. Of what it wrote {share('samples_share')} is copied (spans of 50 bytes); of new "
        f"text {share('chance_share')} is in the training text by chance. Copies are marked.",
        f"背诵情况：训练文本的 {meter.get('prompts', 0)} 个段落中，它能逐字续写 "
        f"{share('extraction_rate')}；验证文本为 {share('guess_rate')}。它写的文字中 "
        f"{share('samples_share')} 是照抄（按 50 字节片段计）；新文本本来就有 "
        f"{share('chance_share')} 碰巧出现在训练文本中。照抄处已标出。",
    )
    return f'<p class="quiet">{_both(words)}</p>'


def _pieces(text: str, copied: Any) -> list[list[Any]]:
    """A text in pieces, each with whether it is copied."""
    pieces: list[tuple[str, bool]] = []
    end = 0
    for start, stop in sorted(copied) if isinstance(copied, list) else []:
        start = max(start, end)
        if stop > start:
            pieces += [(text[end:start], False), (text[start:stop], True)]
            end = stop
    pieces.append((text[end:], False))
    return [[_clean(part), is_copied] for part, is_copied in pieces if part]
