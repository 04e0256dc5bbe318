"""One optimizer step and one evaluation: the parts of the training loop."""

import contextlib
import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from data import (
    Batch,
    PackedWindows,
    WindowBatches,
    count_targets,
    evaluation_loader,
    in_parts,
    measure_tokens,
    to_device,
)
from distributed.parallel import ALONE, Parallel
from distributed.sharding import flush_gradients, full, replica, summing_up, whole
from distributed.signals import StopSignals
from engine.compiling import compile_again, is_compiled
from engine.console import count_off, say
from engine.devices import release_memory
from engine.errors import DataError, SettingsError, Stopped, is_out_of_memory
from engine.linear import HalfGradients, half_gradients
from engine.memory import OutOfStepMemory, halved
from engine.metrics import Score
from engine.precision import Precision
from engine.randomness import random_state, set_random_state
from generation import evaluating
from text.tokenizer import Tokenizer

T = TypeVar("T")


class Step(NamedTuple):
    """The windows of an optimizer step."""

    batches: list[Batch]  # this rank's; one of (0, T) where it has no window
    n_targets: int  # of all ranks, that count
    n_windows: int  # of the rank that has most


@dataclass(eq=False)
class Learner:
    """Makes optimizer steps and evaluations of a model, in micro-batches that fit into memory.

    micro_batch is the most windows of a forward pass; 0 takes batches as they come. It is halved
    when memory runs out, which changes results only by rounding.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    parallel: Parallel = ALONE
    _: KW_ONLY
    device: torch.device = None  # the model's
    micro_batch: int = 0
    on_smaller: Callable[[int], None] | None = None  # called with a halved micro-batch

    def __post_init__(self) -> None:
        self.device = self.device or next(self.model.parameters()).device
        self.scaler = self.precision.scaler()

    @functools.cached_property
    def _replica(self) -> nn.Module:
        """The model as a step calls it. Collective at a rank's first step."""
        return replica(self.model, self.parallel)

    def step(
        self,
        step: Step,
        max_grad_norm: float,
        stop: StopSignals | None = None,
        label: str = "a step",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step, named `label` in messages; returns and raises as take_step() does,
        but OutOfStepMemory only where the micro-batch can't be halved."""
        return self.in_smaller_parts(lambda: self.try_step(step, max_grad_norm, stop), label)

    def try_step(
        self, step: Step, max_grad_norm: float, stop: StopSignals | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """step(), but not repeated when memory runs out."""
        return take_step(
            self._replica,
            micro_batches(step, self.micro_batch, self.device),
            self.optimizer,
            self.precision,
            max_grad_norm,
            scaler=self.scaler,
            stop=stop,
            parallel=self.parallel,
            n_targets=step.n_targets,
        )

    def evaluate(
        self,
        loader: DataLoader,
        max_batches: int | None = None,
        stop: StopSignals | None = None,
        *,
        overlapping: bool = True,
        label: str | None = None,
    ) -> float:
        """The mean loss over a loader's text, or over max_batches of windows evenly spread over it.

        Each token is scored once with at least half a window before it; only those of the first
        half window have less. With overlapping False the windows lie side by side, as in training.
        Raises as mean_loss() does. With a label it draws a bar. Collective.
        """

        def attempt() -> float:
            parts = evaluation_loader(
                loader, max_batches, self.parallel, self.micro_batch, overlapping=overlapping
            )
            if label is not None:
                parts = count_off(parts, len(parts), label)
            return mean_loss(self.model, parts, self.device, self.precision, stop, self.parallel)

        return self.in_smaller_parts(attempt, "an evaluation")

    def score(
        self,
        loader: DataLoader,
        tokenizer: Tokenizer,
        max_batches: int | None = None,
        stop: StopSignals | None = None,
        *,
        label: str | None = None,
    ) -> Score:
        """The Score of a loader's text by evaluate(). Collective."""
        loss = self.evaluate(loader, max_batches, stop, label=label)
        of_all_ranks = evaluation_loader(loader, max_batches)
        windows, batches = of_all_ranks.dataset, of_all_ranks.batch_sampler
        chosen = (number for batch in batches.windows() for number in batch)
        parts: Iterable[tuple[int, int]] = [(1, len(windows.tokens))]  # none comes before the first
        if isinstance(windows, PackedWindows):
            size = measure_tokens(windows.scored_tokens(chosen), tokenizer)
        else:
            if batches.n_batches < batches.of_batches:
                parts = map(windows.scored, chosen)
            size = measure_tokens(windows.tokens, tokenizer, parts)
        return Score(loss, size, batches.n_batches, batches.of_batches)

    def in_smaller_parts(self, attempt: Callable[[], T], label: str) -> T:
        """The result of an attempt, repeated with half the micro-batch whenever memory runs out.

        Raises OutOfStepMemory if a single window does not fit, or with several ranks: a restart of
        the job then begins with the smaller micro-batch.
        """
        while True:
            try:
                return attempt()
            except OutOfStepMemory as error:
                before = error.n_windows
                if not self.parallel.is_alone:
                    self.parallel.note("micro_batch", str(halved(before)))
                if before == 1 or not self.parallel.is_alone:
                    raise
            # only here: until its handler ends, the error keeps the attempt's tensors alive
            gc.collect()
            release_memory(self.device)
            self.micro_batch = halved(before)
            if self.on_smaller is not None:
                self.on_smaller(self.micro_batch)
            if is_compiled(self.model):
                compile_again(self.model, self.device, micro_batches=2)
            say(
                f"Note: {label} ran out of memory: {self.micro_batch} windows at a time instead of "
                f"{before} from here on, the batch stays the same"
            )


def micro_batches(step: Step, size: int, device: torch.device) -> list[Batch]:
    """A step's windows on a device, in micro-batches of at most `size` windows; 0: as they come.

    Micro-batches without targets make their number the same on all ranks.
    """
    size = size or max(len(ids) for ids, *_ in step.batches)
    parts = [to_device(part, device) for part in in_parts(step.batches, size) if len(part[0]) > 0]
    length = step.batches[0][0].shape[1]
    nothing = torch.zeros(1, length, dtype=torch.long, device=device)
    return parts + [(nothing, nothing[:0])] * (-(-step.n_windows // size) - len(parts))


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
    """One optimizer step with gradient accumulation; its loss and gradient norm, 0-d tensors.

    The loss is the mean over n_targets targets, by default those of the batches. With several ranks
    model is a replica() and n_targets counts all ranks' targets. A step without targets, and one
    whose loss or gradient is not finite, leaves weights and moments unchanged; fused optimizers
    check the latter without a sync. Raises
    Stopped after a signal if the rest of the step would take long, and OutOfStepMemory, both with
    the state from before the step.
    """
    scaler = scaler or precision.scaler()
    if n_targets is None:
        n_targets = sum(map(count_targets, batches))
    device = batches[0][0].device
    if n_targets == 0:  # nothing to learn from: not even weights decay
        return torch.zeros((), device=device), torch.zeros((), device=device)
    adds_up = len(batches) > 1 or not parallel.is_alone
    half = half_gradients(model, optimizer, precision, adds_up=adds_up)
    random_before = random_state(device)
    started_at = time.perf_counter()
    total = torch.zeros((), device=device)
    try:
        half.make_moments(optimizer)
        # one for all, which caches the casts of the weights, also for a backward pass that computes
        # again; else a batch's own ends before its backward pass, which frees each cast once used
        is_shared = len(batches) > 1 or getattr(model, "activation_checkpointing", False)
        with precision.autocast() if is_shared else contextlib.nullcontext(), half.taken():
            for number, batch in enumerate(batches):
                if number > 0 and stop is not None:
                    stop.check_within_step(started_at, number / len(batches))
                is_last = number == len(batches) - 1
                with summing_up(model, parallel, now=is_last):
                    # the all-reduce averages gradients over the ranks
                    loss = batch_loss(model, batch, precision, n_targets / parallel.world)
                    with torch.autocast(device.type, enabled=False):
                        scaler.scale(loss).backward()
                total += loss.detach()
        total = parallel.sum(total) / parallel.world
    except (Stopped, MemoryError, RuntimeError) as error:
        if isinstance(error, Stopped):  # on all ranks; after other errors the process ends
            flush_gradients(model, parallel, precision)
        optimizer.zero_grad()
        set_random_state(random_before, device)
        if is_out_of_memory(error):
            raise OutOfStepMemory(error, max(len(ids) for ids, *_ in batches)) from error
        raise
    # An out-of-memory error below this line ends the run without a checkpoint: weights may have
    # changed, and smaller micro-batches don't help, for the activations are already freed.
    return total, _update_weights(model, optimizer, scaler, max_grad_norm, total, half)


def _update_weights(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    loss: torch.Tensor,
    half: HalfGradients,
) -> torch.Tensor:
    """Clip the gradients and step, unless they or the loss are not finite; returns their norm."""
    scaler.unscale_(optimizer)  # first: clipping must see true gradients
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if half:
        norm = torch.linalg.vector_norm(torch.stack([norm, *half.norms]))
    if max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    norm = full(norm)
    if scaler.is_enabled():  # it checks for infinities itself
        scaler.step(optimizer)
        scaler.update()
    # Metal's fused kernels ignore found_inf
    elif not half and loss.device.type != "mps" and _skips_infinities(optimizer):
        optimizer.found_inf = (~(loss.isfinite() & norm.isfinite())).float()
        optimizer.step()
        del optimizer.found_inf  # else the optimizer's next step would be skipped too
    elif loss.isfinite() and norm.isfinite():
        # as clip_grads_with_norm_ clips the others
        factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if max_grad_norm > 0 else 1.0
        half.update(optimizer, factor)
    optimizer.zero_grad()
    return norm


def _skips_infinities(optimizer: torch.optim.Optimizer) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def batch_loss(
    model: nn.Module, batch: Batch, precision: Precision, n_targets: float | None = None
) -> torch.Tensor:
    """The loss of a batch, a 0-d fp32 tensor: the sum over n_targets or the mean."""
    ids, targets, *packing = batch
    with precision.autocast():
        return model(ids, targets, n_targets, *packing)


def count_steps(loader: DataLoader) -> int:
    """The optimizer steps of an epoch, at least 1 with WindowBatches.

    Raises SettingsError for a loader of other batches that has none, or can't count them.
    """
    batches = loader.batch_sampler
    if isinstance(batches, WindowBatches):
        return max(1, batches.n_steps)
    try:
        n_batches = len(loader)
    except TypeError as error:
        raise SettingsError(
            f"the loader's {type(loader.dataset).__name__} has no length, so that its steps can't "
            "be counted; give it a __len__ and a __getitem__."
        ) from error
    if n_batches == 0:
        raise SettingsError(
            f"the loader has no batch: {len(loader.dataset):,} items, batch_size "
            f"{loader.batch_size}, drop_last {loader.drop_last}. A smaller batch_size or "
            "drop_last=False gives it one."
        )
    return n_batches


def steps_between(loader: DataLoader, first: int, last: int) -> Iterator[Step]:
    """The steps first to last - 1 of a run, counted from 0, by one iterator over all epochs."""
    batches, per_epoch = loader.batch_sampler, count_steps(loader)
    if not isinstance(batches, WindowBatches):
        while first < last:
            steps = min(last, (first // per_epoch + 1) * per_epoch) - first
            for batch in itertools.islice(iter(loader), steps):
                yield Step([batch], count_targets(batch), len(batch[0]))
            first += steps
        return
    batches.start_at(*divmod(first, per_epoch), last - first)
    length = batches.dataset.max_length
    nothing = torch.zeros(0, length, dtype=torch.long)
    parts = iter(loader)
    for epoch, step in (divmod(number, per_epoch) for number in range(first, last)):
        own = -(-batches.count_own(step) // batches.micro_batch)
        yield Step(
            list(itertools.islice(parts, own)) or [(nothing, nothing)],
            batches.count_targets(epoch, step),
            batches.count_largest(step),
        )


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    loader: Iterable[Batch],
    device: torch.device,
    precision: Precision,
    stop: StopSignals | None = None,
    parallel: Parallel = ALONE,
) -> float:
    """The mean loss in nats over every target of the ranks' loaders. Collective.

    Raises Stopped after a signal, OutOfStepMemory, and DataError for empty loaders.
    """
    total, count, n_windows = torch.zeros((), device=device), 0, 1
    try:
        with evaluating(model), whole(model, parallel):
            for batch in loader:
                if stop is not None and stop.has_come:
                    break  # raised below, where all ranks agree
                n_windows, n_targets = len(batch[0]), count_targets(batch)
                total += n_targets * batch_loss(model, to_device(batch, device), precision)
                count += n_targets
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfStepMemory(error, n_windows, "an evaluation") from error
        raise
    if stop is not None:
        stop.agree()
        stop.check()
    count = parallel.sum(torch.tensor(count)).item()
    if count == 0:
        raise DataError("there is nothing to evaluate on: the loader has no batches")
    return parallel.sum(total).item() / count
