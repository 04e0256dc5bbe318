"""One optimizer step and one evaluation: what the loop is made of."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import WindowBatches
from distributed.parallel import ALONE, Parallel
from distributed.sharding import flush_gradients, full, summing_up, whole
from distributed.signals import StopSignals
from engine.errors import DataError, Stopped
from engine.memory import OutOfStepMemory, is_out_of_memory
from engine.precision import Precision
from engine.randomness import random_state, set_random_state
from generation import evaluating

Batch = tuple[torch.Tensor, torch.Tensor]  # ids and targets, (B, T) each


class Step(NamedTuple):
    """What an optimizer step goes through."""

    batches: list[Batch]  # this rank's micro-batches; every rank has as many
    n_targets: int  # those of all ranks together


def take_step(
    model: nn.Module,
    batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    max_grad_norm: float,
    *,
    scaler: torch.amp.GradScaler | None = None,
    stop: StopSignals | None = None,
    parallel: Parallel = ALONE,
    n_targets: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on the micro-batches of a batch; its loss and gradient norm, 0-d tensors.

    The loss is the mean over all n_targets targets, None being those of the batches, whatever the
    sizes of the micro-batches. Where ranks share the step, model is what replica() gives, and
    n_targets counts those of all ranks. Where the loss or
    the gradient is not finite, weights and moments stay as they were: with a fused optimizer the
    device decides that, and nobody waits for it. Raises Stopped, with everything as it was before
    the step, where a signal has come and the rest of the step would take long; and OutOfStepMemory,
    just so, where a micro-batch does not fit.
    """
    scaler = scaler or precision.scaler()
    n_targets = n_targets or sum(targets.numel() for _, targets in batches)
    device = batches[0][0].device
    random_before = random_state(device)
    started_at = time.perf_counter()
    total = torch.zeros((), device=device)
    try:
        with precision.autocast():  # it keeps each weight's cast for all micro-batches
            for number, (ids, targets) in enumerate(batches):
                if number > 0 and stop is not None:
                    stop.check_within_step(started_at, number / len(batches))
                is_last = number == len(batches) - 1
                with summing_up(model, parallel, now=is_last):
                    # the ranks' gradients are summed up and divided by their number
                    loss = batch_loss(model, ids, targets, precision, n_targets / parallel.world)
                    with torch.autocast(device.type, enabled=False):
                        scaler.scale(loss).backward()
                total += loss.detach()
        total = parallel.sum(total) / parallel.world
    except (Stopped, MemoryError, RuntimeError) as error:
        if isinstance(error, Stopped):  # by all ranks; of others the process ends
            flush_gradients(model, parallel, precision)
        optimizer.zero_grad()
        set_random_state(random_before, device)
        if is_out_of_memory(error):
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise OutOfStepMemory(reason) from error
        raise
    # Where memory runs out below this line, smaller micro-batches are no help, for activations
    # are gone by now, and weights may have changed: the error ends the run, and nothing is saved.
    scaler.unscale_(optimizer)  # first: clipping must see true gradients
    parameters = [p for p in model.parameters() if p.grad is not None]
    if max_grad_norm > 0:
        norm = full(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    else:
        norm = full(nn.utils.get_total_norm([p.grad for p in parameters]))
    if scaler.is_enabled():  # it has looked for infinities itself
        scaler.step(optimizer)
        scaler.update()
    # Metal's fused kernels pay no heed to found_inf
    elif getattr(optimizer, "_step_supports_amp_scaling", False) and device.type != "mps":
        optimizer.found_inf = (~(total.isfinite() & norm.isfinite())).float()
        optimizer.step()
        del optimizer.found_inf  # else a caller's own next step would be skipped too
    elif total.isfinite() and norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return total, norm


def batch_loss(
    model: nn.Module,
    ids: torch.Tensor,
    targets: torch.Tensor,
    precision: Precision,
    n_targets: float | None = None,
) -> torch.Tensor:
    """The mean loss of a batch, (B, T) each, as a 0-d fp32 tensor; n_targets as in the loss."""
    with precision.autocast():
        return model(ids, targets, n_targets)


def count_steps(loader: DataLoader) -> int:
    """The optimizer steps of an epoch, at least 1."""
    batches = loader.batch_sampler
    return max(1, batches.n_steps if isinstance(batches, WindowBatches) else len(loader))


def steps_of_epoch(loader: DataLoader, epoch: int, first: int, last: int) -> Iterator[Step]:
    """Each step from first up to last of an epoch, all counted from 0.

    A rank whose share of an epoch's last step has fewer micro-batches than another's gets some
    without targets, for the ranks go through them together.
    """
    batches = loader.batch_sampler
    if not isinstance(batches, WindowBatches):
        for ids, targets in itertools.islice(iter(loader), last - first):
            yield Step([(ids, targets)], targets.numel())
        return
    batches.start_at(epoch, first)
    size, length = batches.micro_batch, batches.dataset.max_length  # a change counts from the next
    nothing = torch.zeros(1, length, dtype=torch.long)
    micro_batches = iter(loader)
    for step in range(first, last):
        own, most = (-(-n // size) for n in (batches.count_own(step), batches.count_largest(step)))
        parts = list(itertools.islice(micro_batches, own))
        parts += [(nothing, nothing[:0])] * (most - own)
        yield Step(parts, batches.count_windows(step) * length)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a batch without waiting for it where its memory is pinned."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    precision: Precision,
    stop: StopSignals | None = None,
    parallel: Parallel = ALONE,
) -> float:
    """The mean loss in nats over every target of the loader, each weighing the same.

    The loaders of several ranks are its parts, of any lengths. Raises Stopped where a signal has
    come meanwhile, DataError for an empty loader.
    """
    total, count = torch.zeros((), device=device), 0
    with evaluating(model), whole(model, parallel):
        for ids, targets in loader:
            if stop is not None and stop.has_come:
                break  # and not out of here: the other ranks wait below
            ids, targets = to_device(ids, device), to_device(targets, device)
            loss = batch_loss(model, ids, targets, precision)
            total += loss * targets.numel()
            count += targets.numel()
    if stop is not None:
        stop.agree()
        stop.check()
    count = parallel.sum(torch.tensor(count)).item()
    if count == 0:
        raise DataError("there is nothing to evaluate on: the loader has no batches")
    return parallel.sum(total).item() / count


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads, and then as many as before."""
    before = torch.get_num_threads()
    if count != before:  # setting it, even to what it is, costs a new pool
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)
