"""training_losses.png: the losses of a run."""

import io
import math
from collections.abc import Sequence

from engine.metrics import perplexity

MAX_BATCH_POINTS = 2000  # the picture has no more columns
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
) -> bytes | None:
    """Draw the losses (nats per token) of a run; returns a PNG, None if matplotlib is missing.

    Left: the evaluations at `steps`, with a star at index `best`. Right: every batch from step 1.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if title.isascii():  # matplotlib's font lacks Chinese
        figure.suptitle(title, parse_math=False)  # a "$" in a folder's name is no formula
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_evaluations(left, steps, train_losses, val_losses, best)
    _draw_batches(right, batch_losses)
    for axes in (left, right):
        axes.axhline(math.log(vocab_size), color="0.5", linestyle=":", zorder=1)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.tick_params(labelleft=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.annotate(
        f"uniform guess: ln({vocab_size:,}) = {math.log(vocab_size):.2f}",
        (1.0, math.log(vocab_size)),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(-6, 4),
        ha="right",
        color="0.4",
        fontsize=9,
    )
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
    label = "each batch" if every == 1 else f"every {every}th batch"
    if len(points) >= 20:
        axes.plot(steps, _smooth(points), color="tab:green", linewidth=2)
        label += ", and their running mean"
    else:
        axes.plot(steps, points, "o", color="tab:green", markersize=4)
    axes.set_title(f"Batch loss ({label})")
    axes.set_xlim(left=0)


def _smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """The exponential moving average, bias-corrected; NaN where a value is not finite."""
    mean, count, smoothed = 0.0, 0, []
    for value in values:
        if math.isfinite(value):
            count += 1
            mean = keep * mean + (1 - keep) * value
        smoothed.append(mean / (1 - keep**count) if math.isfinite(value) else math.nan)
    return smoothed


def _add_perplexity(axes, vocab_size: int) -> None:
    """Add a right-hand axis of perplexities, up to twice the vocabulary's size."""
    scale = axes.secondary_yaxis("right")
    scale.set_ylabel("perplexity (tokens it hesitates between)")
    low, high = axes.get_ylim()
    high = min(high, math.log(2 * vocab_size))
    ticks = [tick for tick in PERPLEXITY_TICKS if low <= math.log(tick) <= high]
    ticks = ticks[:: max(1, math.ceil(len(ticks) / 12))]
    scale.set_yticks([math.log(tick) for tick in ticks], [f"{tick:,}" for tick in ticks])
