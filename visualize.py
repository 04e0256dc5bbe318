"""training_losses.png: the losses of a run."""

import io
import math
from collections.abc import Mapping, Sequence

from engine.metrics import perplexity

MAX_BATCH_POINTS = 2000  # the picture has no more columns
HALF_LIFE = 20  # points of the running mean; of a short run, a fortieth of its points
USUAL_FONT = "DejaVu Sans"  # matplotlib's own, which lacks Chinese
# that have Chinese, on Linux, Windows and macOS
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC"),
    *("Hiragino Sans GB", "Heiti SC", "Arial Unicode MS"),
)
BASELINES = {"unigram": "token frequencies", "ngram": "5-gram", "bz2": "bz2", "xz": "xz"}
PERPLEXITY_TICKS = [base * 10**power for power in range(6) for base in (1, 2, 5)]


def render_losses(
    *,
    steps: Sequence[int],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
    best: int,
    batch_losses: Sequence[float],
    vocab_size: int,
    title: str,
    baselines: Mapping[str, float] | None = None,
) -> bytes | None:
    """Draw the losses (nats per token) of a run; returns a PNG, None if matplotlib is missing.

    Left: the evaluations at `steps`, with a star at index `best`, and those `baselines`, losses on
    the validation text by name, that lie among them. Right: every batch from step 1. The title is
    left out if no font has its characters.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if fonts := _fonts_with(title):
        # a "$" in a folder's name is no formula
        figure.suptitle(title, parse_math=False, fontfamily=fonts)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_evaluations(left, steps, train_losses, val_losses, best)
    _draw_batches(right, batch_losses)
    for axes in (left, right):
        axes.axhline(math.log(vocab_size), color="0.5", linestyle=":", zorder=1)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.tick_params(labelleft=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(left, math.log(vocab_size), f"uniform guess: ln({vocab_size:,})")
    _draw_baselines(left, baselines or {})
    _add_perplexity(right, vocab_size)
    png = io.BytesIO()
    canvas.print_png(png)
    return png.getvalue()


def _draw_evaluations(axes, steps, train_losses, val_losses, best) -> None:
    axes.plot(steps, train_losses, color="tab:blue", marker="o", markersize=4, label="training")
    axes.plot(steps, val_losses, color="tab:orange", marker="o", markersize=4, label="validation")
    axes.plot(
        steps[best],
        val_losses[best],
        marker="*",
        markersize=16,
        color="tab:red",
        linestyle="none",
        zorder=3,
        label=f"best validation: {val_losses[best]:.3f} at step {steps[best]}\n"
        f"(perplexity {perplexity(val_losses[best]):,.1f})",
    )
    axes.set_title("Training and validation loss")
    axes.set_ylabel("loss (nats a token)")
    axes.legend(loc="best", fontsize=9, framealpha=0.9)


def _draw_batches(axes, batch_losses) -> None:
    every = max(1, math.ceil(len(batch_losses) / MAX_BATCH_POINTS))
    steps, points = range(1, len(batch_losses) + 1, every), batch_losses[::every]
    axes.plot(steps, points, color="tab:green", alpha=0.35, linewidth=1)
    label = "each batch" if every == 1 else f"one batch in {every}"
    if len(points) >= 20:
        axes.plot(steps, _smooth(points), color="tab:green", linewidth=2)
        label += ", and their running mean"
    else:
        axes.plot(steps, points, "o", color="tab:green", markersize=4)
    axes.set_title(f"Batch loss ({label})")
    axes.set_xlim(left=0)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean around each point, in which a point HALF_LIFE away counts half; NaN stays NaN.

    It looks both ways, so that it does not lag behind a falling loss.
    """
    keep = 0.5 ** (1 / min(HALF_LIFE, max(2.0, len(values) / 40)))
    before, after = _decaying_sums(values, keep), _decaying_sums(values[::-1], keep)[::-1]
    smoothed = []
    for value, (sum_before, n_before), (sum_after, n_after) in zip(
        values, before, after, strict=True
    ):
        # the point itself is in both
        is_known = math.isfinite(value)
        mean = (sum_before + sum_after - value) / (n_before + n_after - 1) if is_known else math.nan
        smoothed.append(mean)
    return smoothed


def _decaying_sums(values: Sequence[float], keep: float) -> list[tuple[float, float]]:
    """For each point the sum of it and those before, each worth `keep` less; and of the weights."""
    total = weight = 0.0
    sums = []
    for value in values:
        is_known = math.isfinite(value)
        total = keep * total + (value if is_known else 0.0)
        weight = keep * weight + is_known
        sums.append((total, weight))
    return sums


def _draw_baselines(axes, baselines: Mapping[str, float]) -> None:
    """Thin lines for the baselines within the axes; names that would overlap are left out."""
    low, high = axes.get_ylim()
    last = math.inf
    within = {n: loss for n, loss in baselines.items() if n in BASELINES and low < loss < high}
    for name, loss in sorted(within.items(), key=lambda item: -item[1]):
        axes.axhline(loss, color="tab:purple", linestyle="--", linewidth=0.8, alpha=0.7, zorder=1)
        if last - loss > 0.04 * (high - low):
            _label(axes, loss, BASELINES[name])
            last = loss
    axes.set_ylim(low, high)


def _label(axes, loss: float, name: str) -> None:
    """A line's name and loss above its right end."""
    axes.annotate(
        f"{name} = {loss:.2f}",
        (1.0, loss),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(-6, 3),
        ha="right",
        color="0.4",
        fontsize=9,
    )


def _fonts_with(text: str) -> list[str]:
    """The fonts to write a text with; none if the fonts of this machine lack its characters."""
    if text.isascii():
        return [USUAL_FONT]
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    missing, fonts = set(map(ord, text)), []
    files = {font.name: font.fname for font in fontManager.ttflist}
    for name in (USUAL_FONT, *CJK_FONTS):
        if (
            missing
            and name in files
            and (found := missing & FT2Font(files[name]).get_charmap().keys())
        ):
            fonts.append(name)
            missing -= found
    return [] if missing else fonts


def _add_perplexity(axes, vocab_size: int) -> None:
    """Add a right-hand axis of perplexities, up to twice the vocabulary's size."""
    scale = axes.secondary_yaxis("right")
    scale.set_ylabel("perplexity (tokens it hesitates between)")
    low, high = axes.get_ylim()
    high = min(high, math.log(2 * vocab_size))
    ticks = [tick for tick in PERPLEXITY_TICKS if low <= math.log(tick) <= high]
    ticks = ticks[:: max(1, math.ceil(len(ticks) / 12))]
    scale.set_yticks([math.log(tick) for tick in ticks], [f"{tick:,}" for tick in ticks])
