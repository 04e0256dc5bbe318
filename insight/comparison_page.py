"""A comparison of runs in words: as a table, a picture, and a page of its own."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

from engine.metrics import as_duration
from engine.words import Words
from insight.compare import Comparison, Standing
from insight.markup import both, page, section, table
from insight.paired import CONFIDENCE

LONGEST_VALUE = 40  # characters of a setting


def verdict_of(comparison: Comparison) -> Words:
    """The sentence that matters first."""
    best, *others = comparison.standings
    if comparison.why_none is not None:
        why = comparison.why_none
        return Words(f"No verdict: {why.en}.", f"没有结论：{why.zh}。")
    name = best.run.name
    worse, alike = (
        [other.run.name for other in others if _is_worse(other) is wanted]
        for wanted in (True, False)
    )
    if not alike:
        than = Words("all the others", "其他运行")
        if len(others) == 1:
            than = Words("the other one", "另一次运行")
        nearest = f"{min(_share_of(other) for other in others):.1%}"
        return Words(
            f"{name} is better than {than.en}, by {nearest} or more: that is more than noise.",
            f"{name} 比{than.zh}好，至少好 {nearest}：这超出了噪声。",
        )
    if not worse:
        return Words(
            f"{name} has the fewest bits a byte, but that is no more than noise: no run is shown "
            "to be better than another.",
            f"{name} 的每字节比特最少，但没有超出噪声：不能证明哪次运行更好。",
        )
    return Words(
        f"{name} is better than {_listed(worse)}; its difference to {_listed(alike)} is no more "
        "than noise.",
        f"{name} 比 {'、'.join(worse)} 好；与 {'、'.join(alike)} 的差别没有超出噪声。",
    )


def how_judged(comparison: Comparison) -> Words | None:
    """What the verdict rests on; None without one."""
    spread = comparison.spread
    if spread is None:
        return None
    source = Words(
        "the usual one, as no two runs here have the same settings and different seeds",
        "取通常的值，因为这里没有两次设置相同、种子不同的运行",
    )
    if spread.measured:
        freedom = f"{spread.measured} degree{'s' * (spread.measured != 1)} of freedom"
        source = Words(
            f"measured on the runs here that differ in the seed alone ({freedom}, weighed with the "
            "usual 0.65%)",
            f"由这里只有种子不同的运行测得（自由度 {spread.measured}，并以通常的 0.65% 加权）",
        )
    n_runs, chosen = len(comparison.standings), Words("", "")
    if n_runs > 2:
        pairs = math.comb(n_runs, 2)
        chosen = Words(
            f" The best of {n_runs} runs was chosen by these figures, so the intervals are wide "
            f"enough to hold for all {pairs} pairs at once (Bonferroni).",
            f"最好的一次是按这些数字从 {n_runs} 次运行中选出的，所以区间取得足够宽，对全部 {pairs} "
            "对同时成立（Bonferroni）。",
        )
    scored, sure, share = f"{comparison.scored_bytes:,}", f"{CONFIDENCE:.0%}", f"{spread.share:.2%}"
    return Words(
        f"The best weights of each run are scored on the same {scored} bytes of validation text. "
        f"The intervals ({sure}) count the spread over the parts of the text, and that between "
        f"seeds: {share} a run, {source.en}.{chosen.en}",
        f"每次运行的最好权重都在同样的 {scored} 字节验证文本上评分。区间（{sure}）计入文本各部分"
        f"之间的差异和种子之间的差异：每次运行 {share}，{source.zh}。{chosen.zh}",
    )


def standings_table(comparison: Comparison) -> list[list[Words]]:
    """A header and a row for each run, the best one first."""
    tokens, time = _rounded(comparison.tokens), as_duration(comparison.seconds)
    rows = [
        [
            Words("run", "运行"),
            Words("steps", "步数"),
            Words("bits/byte", "比特/字节"),
            Words("difference", "差别"),
            Words(f"at {tokens} tokens", f"{tokens} 个 token 时"),
            Words(f"at {time}", f"{time} 时"),
            Words("at its end", "结束时"),
        ]
    ]
    for standing in comparison.standings:
        score = standing.bits_per_byte
        figures = (standing.at_tokens, standing.at_seconds, standing.at_end)
        rows.append(
            [
                Words.of(standing.run.name),
                Words.of(f"{standing.run.curve.steps[-1]:,.0f}"),
                Words.of("" if score is None else f"{score:.4f}"),
                _difference(standing),
                *(Words.of(f"{value:.4f}") for value in figures),
            ]
        )
    return rows


def settings_table(comparison: Comparison) -> list[list[Words]]:
    """A header and a row for each setting that differs; empty if none does."""
    if not comparison.differing:
        return []
    names = [Words.of(standing.run.name) for standing in comparison.standings]
    rows = [
        [Words.of(name), *(Words.of(_shortened(value)) for value in values)]
        for name, values in comparison.differing.items()
    ]
    return [[Words("setting", "设置"), *names], *rows]


def as_text(rows: Sequence[Sequence[Words]]) -> str:
    """A table in columns, the first one to the left."""
    cells = [[cell.en for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        line = [first.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(line).rstrip() + "\n")
    return "".join(lines)


def draw(comparison: Comparison) -> bytes | None:
    """The curves as a PNG, by tokens and by time; None if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    for number, standing in enumerate(comparison.standings, start=1):
        curve, name = standing.run.curve, standing.run.name
        # matplotlib's font lacks Chinese, and a "$" would begin a formula
        label = f"{number}: {name}".replace("$", r"\$") if name.isascii() else f"run {number}"
        style = {"label": label, "marker": "o", "markersize": 3}
        by_tokens.plot(curve.tokens, curve.bits_per_byte, **style)
        by_time.plot(curve.seconds / 60, curve.bits_per_byte, **style)
    by_tokens.set_xlabel("tokens trained on")
    by_tokens.set_ylabel("bits a byte of validation text")
    by_time.set_xlabel("minutes of training")
    by_tokens.xaxis.set_major_formatter("{x:,.0f}")
    for axes, title in ((by_tokens, "At equal tokens"), (by_time, "At equal time")):
        axes.set_title(title)
        axes.grid(alpha=0.25)
        axes.tick_params(labelleft=True)
    by_time.legend(loc="best", fontsize=9, framealpha=0.9)
    png = io.BytesIO()
    canvas.print_png(png)
    return png.getvalue()


def as_page(comparison: Comparison, png: bytes | None) -> str:
    """The comparison as a page that needs no other file; names and settings stay text in it."""
    quiet = '<p class="quiet">{}</p>'.format
    parts = [f'<section id="verdict"><p>{both(verdict_of(comparison))}</p>']
    if (judged := how_judged(comparison)) is not None:
        parts.append(quiet(both(judged)))
    parts.append(f"{_as_html(standings_table(comparison))}</section>")
    if png is not None:
        image = base64.b64encode(png).decode()
        about = Words(
            "Bits a byte of each run, by tokens on the left and by minutes on the right",
            "每次运行的每字节比特，左图按 token，右图按分钟",
        )
        parts.append(f'<section><img alt="" src="data:image/png;base64,{image}">')
        parts.append(f"{quiet(both(about))}</section>")
    settings, nothing = settings_table(comparison), both(Words("Nothing.", "没有。"))
    title = Words("What differs in their settings", "设置有何不同")
    content = _as_html(settings) if settings else f"<p>{nothing}</p>"
    parts.append(section("settings", title, content))
    return page("Runs compared · 运行比较", "\n".join(parts))


def _is_worse(standing: Standing) -> bool:
    return standing.difference is not None and standing.difference.is_real


def _share_of(standing: Standing) -> float:
    return math.inf if standing.difference is None else standing.difference.share


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _difference(standing: Standing) -> Words:
    found = standing.difference
    if found is None:
        return Words("", "") if standing.bits_per_byte is None else Words("best", "最好")
    word = Words("worse", "更差") if found.is_real else Words("noise", "噪声")
    share, low, high = (f"{value:+.1%}" for value in (found.share, found.low, found.high))
    return Words(f"{share} ({low} to {high}) {word.en}", f"{share}（{low} 到 {high}）{word.zh}")


def _rounded(count: float) -> str:
    """A number of tokens in three digits or so."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{name}"
    return f"{count:.0f}"


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _as_html(rows: Sequence[Sequence[Words]]) -> str:
    head, *others = rows
    return table([[both(cell) for cell in row] for row in others], head)
