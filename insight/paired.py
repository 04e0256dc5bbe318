"""Whether two models differ by more than noise: their losses on the same parts of a text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from data import OverlappingWindows, WindowDataset
from engine.loss import token_losses
from engine.precision import Precision
from insight.run_text import count_bytes
from model import GPTModel
from text.tokenizer import Tokenizer

CONFIDENCE = 0.95
USUAL_SPREAD = 0.0065  # of the bits a byte of runs that differ in nothing but the seed: their
# standard deviation as a share of the mean
USUAL_WEIGHT = 4  # where it is measured: the degrees of freedom that the usual one counts for
LEAST_BLOCK, MOST_BLOCK = 64, 4096  # bytes
BLOCKS = 128  # of a text that is long enough
LONGEST_CONTEXT = 2048  # attention takes ever longer
TOKENS_AT_ONCE = 8192  # of a forward pass


@dataclass(frozen=True)
class Blocks:
    """Parts of a text on which models are compared, equally long; positions in bytes from the end
    of the text count, for the texts may begin at different places."""

    n_bytes: int  # of the text that all have
    size: int
    numbers: np.ndarray  # of the blocks that are scored

    @property
    def scored_bytes(self) -> int:
        """The bytes of all blocks that are scored."""
        return self.size * len(self.numbers)


def plan_blocks(n_bytes: int, most_bytes: int) -> Blocks:
    """Blocks of a text of n_bytes, at most most_bytes of them, spread evenly.

    The first one is left out: a text's first token is not scored.
    """
    size = min(MOST_BLOCK, max(LEAST_BLOCK, n_bytes // BLOCKS))
    n_blocks = max(0, n_bytes // size - 1)
    count = min(n_blocks, max(2, most_bytes // size))
    return Blocks(n_bytes, size, 1 + (np.arange(count) * n_blocks) // max(1, count))


def score_blocks(
    model: GPTModel,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    blocks: Blocks,
    device: torch.device,
    precision: Precision,
) -> np.ndarray:
    """The bits that a model takes for each block of a text, (N,) float64, tokens being the text's.

    A token belongs to the block that it begins in. Each is predicted with at least half a context
    before it, as in a run's evaluations.
    """
    lengths = count_bytes(tokens, tokenizer)
    starts = np.cumsum(lengths) - lengths - (lengths.sum() - blocks.n_bytes)
    places = np.full(max(0, blocks.n_bytes // blocks.size) + 1, -1)
    places[blocks.numbers] = np.arange(len(blocks.numbers))
    place = np.where(starts >= 0, places[np.maximum(starts, 0) // blocks.size], -1)
    nats = score_tokens(model, tokens, place >= 0, device, precision)
    chosen = place >= 0
    bits = nats[chosen] / math.log(2)
    return np.bincount(place[chosen], bits, minlength=len(blocks.numbers))


@torch.no_grad()
def score_tokens(
    model: GPTModel,
    tokens: np.ndarray,
    wanted: np.ndarray,
    device: torch.device,
    precision: Precision,
) -> np.ndarray:
    """The loss of at least the wanted tokens, (N,) float64 in nats, of a text; of others NaN."""
    context = min(model.config.context_length, LONGEST_CONTEXT)
    windows = OverlappingWindows(WindowDataset(tokens, context, context))
    ranges = np.array([windows.scored(number) for number in range(len(windows))]).reshape(-1, 2)
    before = np.concatenate(([0], np.cumsum(wanted)))
    numbers = np.flatnonzero(before[ranges[:, 1]] > before[ranges[:, 0]]).tolist()
    whole = [number for number in numbers if number < windows.n_whole]
    at_once = max(1, TOKENS_AT_ONCE // context)
    batches = [whole[start : start + at_once] for start in range(0, len(whole), at_once)]
    batches += [[number] for number in numbers if number >= windows.n_whole]
    nats = np.full(len(tokens), np.nan)
    for batch in batches:
        ids, targets = (part.to(device) for part in windows.__getitems__(batch))
        with precision.autocast():
            hidden = model.hidden(ids)[:, -targets.shape[1] :]
            losses = token_losses(hidden, model.head.weight, targets)
        for number, row in zip(batch, losses.double().cpu().numpy(), strict=True):
            first, stop = windows.scored(number)
            nats[first:stop] = row
    return nats


@dataclass(frozen=True)
class Spread:
    """The standard deviation between runs that differ in the seed alone, as a share of the mean."""

    share: float
    measured: int  # its degrees of freedom that were measured; 0: the usual one


def find_spread(groups: Sequence[Sequence[float]]) -> Spread:
    """The spread of runs with the same settings, from the bits a byte of each group of them.

    With no two of them it is the usual one. It weighs USUAL_WEIGHT degrees of freedom otherwise, as
    two runs alone tell little.
    """
    squares, measured = 0.0, 0
    for group in groups:
        logs = np.log(group)
        squares += float(((logs - logs.mean()) ** 2).sum())
        measured += len(group) - 1
    if measured == 0:
        return Spread(USUAL_SPREAD, 0)
    variance = (USUAL_WEIGHT * USUAL_SPREAD**2 + squares) / (USUAL_WEIGHT + measured)
    return Spread(math.sqrt(variance), measured)


@dataclass(frozen=True)
class Difference:
    """How much more bits a byte one model takes than another, as a share, with its interval."""

    share: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether it is more than noise."""
        return self.low > 0 or self.high < 0


def find_difference(
    bits: np.ndarray, of_other: np.ndarray, spread: Spread, *, n_models: int = 2
) -> Difference:
    """The Difference of a model to another one, by the bits of each for the same blocks, (N,).

    The interval, of CONFIDENCE, has two parts: what another text of this kind might have shown (a
    paired t interval of a ratio over the blocks) and what another seed might have (the spread of
    both runs). Their degrees of freedom combine as Welch and Satterthwaite's. Of more models the
    intervals of all pairs hold at once (Bonferroni): it may be the best one that is compared with.
    """
    n_blocks, total = len(bits), of_other.sum()
    share = (bits.sum() / total - 1).item()
    rest = bits - (1 + share) * of_other
    of_text = (rest**2).sum().item() * n_blocks / max(1, n_blocks - 1) / total.item() ** 2
    of_seeds = 2 * spread.share**2
    freedom = math.inf if spread.measured == 0 else USUAL_WEIGHT + spread.measured
    variance = of_text + of_seeds
    parts = of_text**2 / max(1, n_blocks - 1) + of_seeds**2 / freedom
    freedom = variance**2 / parts if parts else math.inf
    reach = t_quantile(freedom, math.comb(n_models, 2)) * math.sqrt(variance)
    return Difference(share, share - reach, share + reach)


def t_quantile(freedom: float, n_intervals: int = 1) -> float:
    """How many standard errors t intervals reach to each side that hold all at once in CONFIDENCE
    of cases (Bonferroni), to 1 % for 5 or more degrees of freedom and up to 28 intervals
    (Abramowitz & Stegun 1964, 26.7.5)."""
    z = -NormalDist().inv_cdf((1 - CONFIDENCE) / (2 * n_intervals))
    n = max(1.0, freedom)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
