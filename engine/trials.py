"""Timed trials of small computations, to choose the one that is faster on this machine."""

import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from engine.devices import synchronize
from engine.precision import Precision

ROUNDS = 3
# rows, and inner and outer features: a transformer's MLP, small enough for milliseconds
MLP_SHAPE = (256, 512, 2048)


def time_each(
    candidates: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, float]:
    """The seconds of each candidate: the least of some rounds in turn, after one to warm up."""
    least = dict.fromkeys(candidates, float("inf"))
    for number in range(1 + ROUNDS):
        for name, run in candidates.items():
            started_at = time.perf_counter()
            run()
            synchronize(device)
            if number > 0:
                least[name] = min(least[name], time.perf_counter() - started_at)
    return least


def mlp_step(
    precision: Precision, device: torch.device, *, frozen: torch.dtype | None = None
) -> Callable[[], object]:
    """A forward and a backward pass of an MLP in a precision; with weights in the dtype `frozen`,
    only to its inputs."""
    rows, inner, outer = MLP_SHAPE
    # constants: a trial must not draw on the generators that the run's seed has set
    x = torch.full((rows, inner), 0.5, device=device, requires_grad=True)
    options = {"device": device, "requires_grad": frozen is None, "dtype": frozen}
    up = torch.full((outer, inner), 0.01, **options)
    down = torch.full((inner, outer), 0.01, **options)

    def run() -> object:
        with precision.autocast():
            loss = F.linear(F.gelu(F.linear(x, up)), down).float().sum()
        return torch.autograd.grad(loss, (x, up, down) if frozen is None else x)

    return run
