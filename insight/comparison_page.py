"""A comparison of runs in words: as a table, a picture, and a page of its own."""

import base64
import hashlib
import html
import io
import math
from collections.abc import Sequence
from typing import Any

from engine.metrics import as_duration
from insight.compare import Comparison, Standing
from insight.paired import CONFIDENCE

LONGEST_VALUE = 40  # characters of a setting
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.3; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap; }
tr { border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: #fff; }
"""


def verdict_of(comparison: Comparison) -> str:
    """The sentence that matters first."""
    best, *others = comparison.standings
    if comparison.why_none is not None:
        return f"No verdict: {comparison.why_none}."
    name = best.run.name
    worse, alike = (
        [other.run.name for other in others if _is_worse(other) is wanted]
        for wanted in (True, False)
    )
    if not alike:
        than = "the other one" if len(others) == 1 else "all the others"
        nearest = min(_share_of(other) for other in others)
        return f"{name} is better than {than}, by {nearest:.1%} or more: that is more than noise."
    if not worse:
        return (
            f"{name} has the fewest bits a byte, but that is no more than noise: no run is shown "
            "to be better than another."
        )
    return (
        f"{name} is better than {_listed(worse)}; its difference to {_listed(alike)} is no more "
        "than noise."
    )


def how_judged(comparison: Comparison) -> str:
    """What the verdict rests on."""
    spread = comparison.spread
    if spread is None:
        return ""
    source = "the usual one, as no two runs here have the same settings and different seeds"
    if spread.measured:
        source = (
            f"measured on the runs here that differ in the seed alone ({spread.measured} degree"
        )
        source += f"{'s' * (spread.measured != 1)} of freedom, weighed with the usual 0.65%)"
    n_runs, chosen = len(comparison.standings), ""
    if n_runs > 2:
        chosen = (
            f" The best of {n_runs} runs was chosen by these figures, so the intervals are wide "
            f"enough to hold for all {math.comb(n_runs, 2)} pairs at once (Bonferroni)."
        )
    return (
        f"The best weights of each run are scored on the same {comparison.scored_bytes:,} bytes of "
        f"validation text. The intervals ({CONFIDENCE:.0%}) count the spread over the parts of the "
        f"text, and that between seeds: {spread.share:.2%} a run, {source}.{chosen}"
    )


def standings_table(comparison: Comparison) -> list[list[str]]:
    """A header and a row for each run, the best one first."""
    at_tokens = f"at {_rounded(comparison.tokens)} tokens"
    at_seconds = f"at {as_duration(comparison.seconds)}"
    rows = [["run", "steps", "bits/byte", "difference", at_tokens, at_seconds, "at its end"]]
    for standing in comparison.standings:
        score = standing.bits_per_byte
        rows.append(
            [
                standing.run.name,
                f"{standing.run.curve.steps[-1]:,.0f}",
                "" if score is None else f"{score:.4f}",
                _difference(standing),
                *(
                    f"{value:.4f}"
                    for value in (standing.at_tokens, standing.at_seconds, standing.at_end)
                ),
            ]
        )
    return rows


def settings_table(comparison: Comparison) -> list[list[str]]:
    """A header and a row for each setting that differs; empty if none does."""
    if not comparison.differing:
        return []
    header = ["setting", *(standing.run.name for standing in comparison.standings)]
    rows = [
        [name, *(_shortened(value) for value in values)]
        for name, values in comparison.differing.items()
    ]
    return [header, *rows]


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """A table in columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip() + "\n")
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
    allowed = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{allowed}'"
    parts = [f"<h1>{html.escape(verdict_of(comparison))}</h1>"]
    parts += [_paragraph(how_judged(comparison)), _as_html(standings_table(comparison))]
    if png is not None:
        image = base64.b64encode(png).decode()
        alt = "Bits a byte of each run, by tokens on the left and by minutes on the right"
        parts.append(f'<img alt="{alt}" src="data:image/png;base64,{image}">')
    settings = settings_table(comparison)
    parts.append("<h2>What differs in their settings</h2>")
    parts.append(_as_html(settings) if settings else _paragraph("Nothing."))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Runs compared</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        "</body>\n</html>\n"
    )


def _is_worse(standing: Standing) -> bool:
    return standing.difference is not None and standing.difference.is_real


def _share_of(standing: Standing) -> float:
    return math.inf if standing.difference is None else standing.difference.share


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _difference(standing: Standing) -> str:
    found = standing.difference
    if found is None:
        return "" if standing.bits_per_byte is None else "best"
    word = "worse" if found.is_real else "noise"
    return f"{found.share:+.1%} ({found.low:+.1%} to {found.high:+.1%}) {word}"


def _rounded(count: float) -> str:
    """A number of tokens in three digits or so."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{name}"
    return f"{count:.0f}"


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>" if text else ""


def _as_html(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row))
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
