"""Tokens to batches: sliding windows over a text, cut into training and validation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from distributed.parallel import ALONE, Parallel
from distributed.signals import defer_to_owner
from engine.console import say
from engine.devices import free_memory
from engine.errors import DataError
from engine.metrics import TokenSize
from text.tokenizer import GPT2Tokenizer, Tokenizer

MIN_TOKENS = 4  # two to train on, a token and the one to guess, and two to validate on
MEASURED_TOKENS = 1_000_000  # of the validation text, for characters and bytes a token
LONGEST_TRAIN_SHARE = 0.95  # of a short text, so that a window fits


@dataclass
class TokenSlice:
    """A stretch of a token file; a loader's worker processes get its place, not its content."""

    path: Path
    dtype: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        self._mapped: np.ndarray | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def array(self) -> np.ndarray:
        """The tokens, mapped into memory at first use."""
        if self._mapped is None:
            whole = np.memmap(self.path, dtype=self.dtype, mode="r")
            self._mapped = whole[self.start : self.stop]
        return self._mapped

    def __getstate__(self) -> dict:
        return vars(self) | {"_mapped": None}


class WindowDataset(Dataset):
    """The windows of max_length tokens that start at 0, stride, 2 stride, ... of some tokens.

    A window's targets are its tokens moved by one, so each takes max_length + 1 tokens. With
    keep_tail the tokens after the last whole window form a last, shorter one.
    """

    def __init__(
        self,
        tokens: np.ndarray | TokenSlice,
        max_length: int,
        stride: int,
        *,
        keep_tail: bool = False,
    ) -> None:
        self.tokens = tokens
        self.max_length = max_length
        self.stride = stride
        self.n_whole = max(0, (len(tokens) - 1 - max_length) // stride + 1)
        self.tail_start = self.n_whole * stride
        self.has_tail = keep_tail and self.tail_start < len(tokens) - 1
        self._resident: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.n_whole + self.has_tail

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The window's ids and targets, each (T,)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids, targets = self.__getitems__([index])
        return ids[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch by one gather: ids and targets, each (B, T) int64.

        The tail has a length of its own, so it comes alone.
        """
        starts = np.asarray(indices, dtype=np.int64)[:, None] * self.stride  # (B, 1)
        length = self.max_length + 1
        if self.has_tail and self.n_whole in indices:
            assert len(indices) == 1, "the tail is a batch of its own"
            length = len(self.tokens) - self.tail_start
        if self._resident is not None:
            device = self._resident.device
            # only the starts travel: for a copy of more than 64 KB the host waits for the GPU
            starts = torch.from_numpy(starts).to(device, non_blocking=True)
            window = self._resident[starts + torch.arange(length, device=device)].long()
        else:
            window = torch.from_numpy(self.array()[starts + np.arange(length)].astype(np.int64))
        return window[:, :-1], window[:, 1:]

    def array(self) -> np.ndarray:
        """All tokens."""
        return self.tokens.array() if isinstance(self.tokens, TokenSlice) else self.tokens

    def without_overlap(self) -> "WindowDataset":
        """Windows of the same tokens with the same length, none overlapping another."""
        if self.stride >= self.max_length:
            return self
        apart = WindowDataset(self.tokens, self.max_length, self.max_length)
        apart._resident = self._resident
        return apart

    def move_to(self, device: torch.device) -> None:
        """Keep the tokens on a device (4 bytes each) and gather batches there."""
        self._resident = torch.from_numpy(self.array().astype(np.int32)).to(device)


class WindowBatches(Sampler):
    """Which windows each batch holds: a pure function of (seed, epoch, step).

    A step takes step_size windows (batch_size where None), of which each rank of parallel has an
    equal share, and hands them out in parts of at most micro_batch (batch_size where None); an
    epoch's last step may have fewer, and shares that differ by one. Iterating gives epoch 0, then
    1, ...; start_at() chooses what comes next. With seed None the windows stay in order, and a
    tail comes alone. With n_steps each step draws at random from all windows, whatever the others
    hold.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        batch_size: int,
        seed: int | None,
        n_steps: int | None = None,
        step_size: int | None = None,
        micro_batch: int | None = None,
        *,
        parallel: Parallel = ALONE,
    ) -> None:
        self._rank, self._world = parallel.rank, parallel.world
        self.dataset = dataset
        self.batch_size = batch_size
        self.micro_batch = micro_batch or batch_size
        self.step_size = step_size or batch_size
        self.seed = seed
        self._is_random = n_steps is not None
        self.n_steps = n_steps or -(-dataset.n_whole // self.step_size)
        self._next_epoch = self._next_step = 0

    @property
    def per_step(self) -> int:
        """The parts of a rank's share of a step; the last one of an epoch may have fewer."""
        return -(-self.step_size // self._world // self.micro_batch)

    def count_windows(self, step: int) -> int:
        """The windows of an epoch's step, counted from 0, of all ranks together."""
        if self._is_random:
            return self.step_size
        return min(self.step_size, self.dataset.n_whole - step * self.step_size)

    def count_own(self, step: int) -> int:
        """The windows of this rank's share of a step."""
        return len(self._share(range(self.count_windows(step))))

    def count_largest(self, step: int) -> int:
        """The windows of the largest share of a step."""
        return -(-self.count_windows(step) // self._world)

    def _share(self, windows: Sequence[int]) -> Sequence[int]:
        n = len(windows)
        return windows[n * self._rank // self._world : n * (self._rank + 1) // self._world]

    def __len__(self) -> int:
        if self.n_steps == 0:
            return int(self.dataset.has_tail)
        in_last = -(-self.count_own(self.n_steps - 1) // self.micro_batch)
        return (self.n_steps - 1) * self.per_step + in_last + self.dataset.has_tail

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = self._next_epoch, self._next_step
        self._next_epoch, self._next_step = epoch + 1, 0
        size = self.micro_batch
        order = None if self._is_random else self._order(epoch)
        for step in range(first, self.n_steps):
            if order is None:
                chooser = np.random.default_rng((self.seed, epoch, step))
                windows = chooser.integers(self.dataset.n_whole, size=self.step_size)
            else:
                windows = order[step * self.step_size : (step + 1) * self.step_size]
            windows = self._share(windows)
            for start in range(0, len(windows), size):
                yield windows[start : start + size].tolist()
        if self.dataset.has_tail:
            yield [self.dataset.n_whole]

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration be that of this epoch from this step on, counted from 0."""
        self._next_epoch, self._next_step = epoch, step

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.dataset.n_whole)
        # 4 bytes a window, as a rule: every rank holds an epoch's order
        n_whole = self.dataset.n_whole
        order = np.arange(n_whole, dtype=np.uint32 if n_whole < 2**32 else np.int64)
        np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order


@dataclass(frozen=True)
class WindowPlan:
    """How a text of n_tokens is cut: training tokens come first, validation tokens after."""

    n_tokens: int
    n_train: int
    max_length: int
    stride: int
    batch_size: int

    @property
    def n_val(self) -> int:
        """Tokens of the validation text."""
        return self.n_tokens - self.n_train

    @property
    def n_windows(self) -> int:
        """Training windows of an epoch."""
        return max(0, (self.n_train - 1 - self.max_length) // self.stride + 1)

    @property
    def n_unused(self) -> int:
        """Training tokens after the last whole window, which no window reaches."""
        return self.n_train - ((self.n_windows - 1) * self.stride + self.max_length + 1)


def plan_windows(
    n_tokens: int,
    *,
    max_length: int,
    stride: int | None,
    batch_size: int,
    train_ratio: float,
    n_train: int | None = None,
) -> tuple[WindowPlan, list[str]]:
    """Cut a text so that there is at least one training and one validation batch.

    stride None stands for max_length, whatever that becomes. n_train is given where documents or
    a source of its own set the split; else train_ratio does.
    Where the text is too short for what was asked, batch, stride, split and, last, max_length are
    fitted to it, and a notice says so. Raises DataError where not even two training and two
    validation tokens can be had.
    """
    if n_tokens < MIN_TOKENS:
        raise DataError(
            f"the text has {n_tokens} token{'s' * (n_tokens != 1)}; at least {MIN_TOKENS} are "
            "needed, 2 to train on and 2 to validate on.\nSet DATA to a longer text."
        )
    notices = []
    if n_train is not None and not 2 <= n_train <= n_tokens - 2:
        raise DataError(
            f"the training text has {n_train} tokens and the validation text "
            f"{n_tokens - n_train}; each needs at least 2.\nSet DATA to longer texts."
        )
    if n_train is None:
        asked = int(n_tokens * train_ratio)
        n_train = min(max(asked, 2), n_tokens - 2)
        # a whole window is worth more than a long validation text, up to a point
        if n_train <= max_length < min(n_tokens - 2, int(n_tokens * LONGEST_TRAIN_SHARE)):
            n_train = max_length + 1
        if n_train != asked:
            notices.append(
                f"the split is moved from {asked} to {n_train} of {n_tokens} tokens, so that "
                "there is a window to train on and something to validate on"
            )
    plan = WindowPlan(n_tokens, n_train, max_length, stride or max_length, batch_size)
    if plan.n_windows == 0:
        plan = replace(plan, max_length=n_train - 1, stride=min(plan.stride, n_train - 1))
        notices.append(
            f"max_length is lowered from {max_length} to {plan.max_length}: the training text has "
            f"only {n_train} tokens"
        )
        if stride is not None and plan.stride != stride:
            notices.append(f"stride is lowered from {stride} to {plan.stride}, with max_length")
    if plan.n_windows < batch_size:
        plan = replace(plan, batch_size=plan.n_windows)
        notices.append(
            f"batch_size is lowered from {batch_size} to {plan.batch_size}: there are no more "
            "training windows"
        )
    if plan.stride > plan.max_length:
        notices.append(
            f"stride ({plan.stride}) is above max_length ({plan.max_length}): the tokens between "
            "two windows are never trained on"
        )
    return plan, notices


def make_loaders(
    tokens: np.ndarray | TokenSlice,
    plan: WindowPlan,
    *,
    seed: int,
    num_workers: int,
    device: torch.device,
    sampling: str = "windows",
    accumulation: int = 1,
    micro_batch: int | None = None,
    parallel: Parallel = ALONE,
) -> tuple[DataLoader, DataLoader]:
    """Training windows in a new order each epoch; validation windows in order, without overlap.

    Batches are (ids, targets), each (B, T) int64. Every validation token but the first is a
    target exactly once, so the last batch of validation may be a single shorter window. With
    sampling "random" the training windows may start anywhere; an epoch has as many steps. A step
    takes plan.batch_size * accumulation windows, in parts of micro_batch (None: plan.batch_size);
    of several ranks each gets its share of them, and all of the validation windows.
    On CUDA the tokens stay on the device where they take less than a tenth of its free memory,
    and are pinned otherwise.
    """
    if isinstance(tokens, TokenSlice):
        cut = tokens.start + plan.n_train
        train_tokens, val_tokens = replace(tokens, stop=cut), replace(tokens, start=cut)
    else:
        train_tokens, val_tokens = tokens[: plan.n_train], tokens[plan.n_train :]
    stride = 1 if sampling == "random" else plan.stride
    train = WindowDataset(train_tokens, plan.max_length, stride)
    val = WindowDataset(val_tokens, plan.max_length, plan.max_length, keep_tail=True)
    step_size = plan.batch_size * accumulation
    n_steps = -(-plan.n_windows // step_size) if sampling == "random" else None
    pin_memory = device.type == "cuda"
    if pin_memory and num_workers == 0 and 4 * plan.n_tokens < free_memory(device) / 10:
        train.move_to(device)
        val.move_to(device)
        pin_memory = False
    own = (n_steps, step_size, micro_batch)
    return tuple(
        DataLoader(
            batches.dataset,
            batch_sampler=batches,
            collate_fn=as_batch,
            num_workers=num_workers,
            worker_init_fn=defer_to_owner,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),  # else each epoch draws on torch's own
        )
        for batches in (
            WindowBatches(train, plan.batch_size, seed, *own, parallel=parallel),
            WindowBatches(val, plan.batch_size, None, micro_batch=micro_batch),
        )
    )


def create_dataloader_v1(
    text: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    tokenizer: Tokenizer | None = None,
) -> DataLoader:
    """A DataLoader over the sliding windows of a text of your own; the tokenizer is GPT-2's
    where none is given.

    Batches are (ids, targets), each (B, T) int64. The loader is never empty: for a short text the
    window and the batch are made smaller, with a notice. shuffle draws on torch's global
    generator. Raises DataError for a text of fewer than two tokens.
    """
    tokenizer = tokenizer or GPT2Tokenizer()
    tokens = to_array(tokenizer.encode(text), tokenizer.vocab_size)
    if len(tokens) < 2:
        raise DataError(f"the text has {len(tokens)} tokens; a window needs at least 2")
    if len(tokens) <= max_length:
        say(f"Note: max_length is lowered from {max_length} to {len(tokens) - 1}: a short text")
        max_length = len(tokens) - 1
    dataset = WindowDataset(tokens, max_length, stride)
    if drop_last and len(dataset) < batch_size:
        say(f"Note: batch_size is lowered from {batch_size} to {len(dataset)}: a short text")
        batch_size = len(dataset)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        collate_fn=as_batch,
    )


def measure_tokens(tokens: np.ndarray | TokenSlice, tokenizer: Tokenizer) -> TokenSize:
    """How many characters and bytes a token stands for, by the first million of some tokens.

    The end of a text is a token that has to be guessed, and stands for no character.
    """
    array = tokens.array() if isinstance(tokens, TokenSlice) else tokens
    ids = array[:MEASURED_TOKENS]
    text = tokenizer.decode(ids[ids != tokenizer.end_of_text_id].tolist())
    n_bytes = len(text.encode("utf-8", "replace"))
    return TokenSize(max(1, len(text)) / len(ids), max(1, n_bytes) / len(ids))


def in_parts(
    batches: list[tuple[torch.Tensor, torch.Tensor]], size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The windows of a step's micro-batches in parts of at most size windows.

    They are cut as WindowBatches with that micro_batch would. All are of one length, (B, T) each.
    """
    if all(len(ids) <= size for ids, _ in batches):
        return batches
    ids, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return list(zip(ids.split(size), targets.split(size), strict=True))


def as_batch(items):
    """Collate: a WindowDataset gives batches already; another dataset's items are stacked."""
    return items if isinstance(items, tuple) else default_collate(items)


def to_array(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Token ids in the smallest of uint16 and uint32 that holds the vocabulary."""
    return np.array(ids, dtype=np.uint16 if vocab_size <= 2**16 else np.uint32)


def evaluation_loader(
    loader: DataLoader,
    max_batches: int | None = None,
    parallel: Parallel = ALONE,
    micro_batch: int | None = None,
) -> DataLoader:
    """A loader over the same windows in order: all of them, or max_batches evenly spaced batches.

    It gives the same batches each time, in parts of at most micro_batch windows (None: as the
    loader does), and leaves every random generator alone. Several ranks get a part of them each.
    """
    dataset = loader.dataset
    batch_size = loader.batch_size or loader.batch_sampler.batch_size
    n_whole, n_items = len(dataset), len(dataset)
    if isinstance(dataset, WindowDataset):
        dataset = dataset.without_overlap()
        n_whole, n_items = dataset.n_whole, len(dataset)
    batches = [range(i, min(i + batch_size, n_whole)) for i in range(0, n_whole, batch_size)]
    batches += [range(i, i + 1) for i in range(n_whole, n_items)]  # a tail comes alone
    if max_batches is not None and max_batches < len(batches):
        chosen = np.linspace(0, len(batches) - 1, max_batches).round().astype(int)
        batches = [batches[i] for i in chosen]
    size = micro_batch or getattr(loader.batch_sampler, "micro_batch", batch_size)
    parts = [batch[i : i + size] for batch in batches for i in range(0, len(batch), size)]
    return DataLoader(
        dataset,
        batch_sampler=parallel.share_of(parts),
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=torch.Generator(),
    )
