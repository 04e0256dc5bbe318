"""Tokens to batches: sliding windows over a training and a validation text."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from distributed.parallel import ALONE, Parallel
from distributed.signals import defer_to_owner
from engine.console import say
from engine.devices import free_memory
from engine.errors import DataError
from engine.metrics import TokenSize
from text.packing import Packing, Pieces
from text.tokenizer import ByteTokens, GPT2Tokenizer, Tokenizer, encode_from_start

MIN_TOKENS = 4  # an input and its target to train on, and as many to validate on
# of a text that are counted at once, so that it need not fit into memory
COUNTED_TOKENS, COUNTED_PARTS, COUNTED_PIECES = 1 << 14, 1 << 6, 1 << 8
LONGEST_TRAIN_SHARE = 0.95  # the most of a short text that is trained on, so that a window fits
IGNORED = -100  # the target of a position that does not count


@dataclass
class TokenSlice:
    """Part of a token file; pickling it for a loader's worker copies no tokens."""

    path: Path
    dtype: str
    start: int
    stop: int
    _mapped: np.ndarray | None = field(default=None, init=False, compare=False)

    def __len__(self) -> int:
        return self.stop - self.start

    def array(self) -> np.ndarray:
        """The tokens, mapped into memory at first use."""
        if self._mapped is None:
            file = np.memmap(self.path, dtype=self.dtype, mode="r")
            self._mapped = file[self.start : self.stop]
        return self._mapped

    def __getitem__(self, part: slice) -> "TokenSlice":
        start, stop, _ = part.indices(len(self))
        return replace(self, start=self.start + start, stop=self.start + stop)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_mapped": None}


class Packed(NamedTuple):
    """Windows of conversations, each of which attends to itself alone: GPTModel's arguments."""

    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), IGNORED where none counts
    starts: torch.Tensor | None  # (B, T), where a token's conversation begins; None: all at 0
    counted: torch.Tensor  # (K,), the targets that count, by their places in all B x T

    @classmethod
    def of(cls, ids: torch.Tensor, targets: torch.Tensor, starts: torch.Tensor | None) -> "Packed":
        """A batch on the CPU, where its targets are counted without a synchronization."""
        if starts is not None and not starts.any():
            starts = None
        return cls(ids, targets, starts, (targets.flatten() != IGNORED).nonzero()[:, 0])


Tokens = np.ndarray | TokenSlice
Pair = tuple[torch.Tensor, torch.Tensor]  # ids and targets, (B, T) each
Batch = Pair | Packed


def as_array(tokens: Tokens) -> np.ndarray:
    """Tokens in memory or mapped into it."""
    return tokens.array() if isinstance(tokens, TokenSlice) else tokens


class WindowDataset(Dataset):
    """Windows of max_length tokens that start at 0, stride, 2 stride, ...; targets are one later.

    With keep_tail the tokens after the last full window form a last, shorter one.
    """

    def __init__(
        self, tokens: Tokens, max_length: int, stride: int, *, keep_tail: bool = False
    ) -> None:
        self.tokens, self.max_length, self.stride = tokens, max_length, stride
        self.n_whole = max(0, (len(tokens) - 1 - max_length) // stride + 1)
        self.tail_start = self.n_whole * stride
        self.has_tail = keep_tail and self.tail_start < len(tokens) - 1
        self._resident: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.n_whole + self.has_tail

    def __getitem__(self, index: int) -> Pair:
        """The window's ids and targets, each (T,)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids, targets = self.__getitems__([index])
        return ids[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Pair:
        """A batch by one gather: ids and targets, each (B, T) int64; the tail is its own batch."""
        starts = np.asarray(indices, dtype=np.int64)[:, None] * self.stride  # (B, 1)
        length = self.max_length + 1
        if self.has_tail and self.n_whole in indices:
            assert len(indices) == 1, "the tail is a batch of its own"
            length = len(self.tokens) - self.tail_start
        if self._resident is not None:
            device = self._resident.device
            # copies the starts only: a copy of more than 64 KB synchronizes with the GPU
            starts = torch.from_numpy(starts).to(device, non_blocking=True)
            window = self._resident[starts + torch.arange(length, device=device)].long()
        else:
            array = as_array(self.tokens)
            window = torch.from_numpy(array[starts + np.arange(length)].astype(np.int64))
        return window[:, :-1], window[:, 1:]

    def scored_tokens(self) -> Tokens:
        """The tokens of all windows."""
        return self.tokens

    def without_overlap(self) -> "WindowDataset":
        """Windows of the same tokens with the same length that do not overlap."""
        return self if self.stride >= self.max_length else self.with_stride(self.max_length)

    def with_stride(self, stride: int) -> "WindowDataset":
        """Windows of the same tokens with the same length, and this many tokens apart."""
        apart = WindowDataset(self.tokens, self.max_length, stride)
        apart._resident = self._resident
        return apart

    def span(self, start: int, stop: int) -> torch.Tensor:
        """The tokens from start to stop, (stop - start,) int64, where batches are gathered."""
        if self._resident is not None:
            return self._resident[start:stop].long()
        return torch.from_numpy(as_array(self.tokens)[start:stop].astype(np.int64))

    def move_to(self, device: torch.device) -> None:
        """Copy the tokens to a device (4 bytes each) and gather batches there."""
        self._resident = torch.from_numpy(as_array(self.tokens).astype(np.int32)).to(device)


class PackedWindows(Dataset):
    """Windows of whole conversations, as text/packing.py packs them; is_target marks the tokens
    that count. All windows are as long as the fullest one."""

    has_tail = False

    def __init__(self, tokens: Tokens, is_target: Tokens, pieces: Pieces, packing: Packing) -> None:
        self.tokens, self.is_target = tokens, is_target
        self.pieces, self.packing, self.n_whole = pieces, packing, len(packing)
        self.max_length = int(self._sums(pieces.lengths).max(initial=1))
        self._n_targets = self._sums(self._count_in_pieces())

    def _sums(self, numbers: np.ndarray) -> np.ndarray:
        """The sum of the pieces' numbers in each window, (windows,)."""
        firsts = np.append(0, self.packing.ends)[:-1]
        return np.add.reduceat(numbers[self.packing.order], firsts) if len(firsts) else firsts

    def _count_in_pieces(self) -> np.ndarray:
        """The targets of each piece that count, (N,)."""
        is_target, firsts = as_array(self.is_target), self.pieces.starts + 1
        places = np.column_stack((firsts, firsts + self.pieces.lengths))
        found = [firsts[:0]]
        # some pieces at once: reduceat() copies what it adds up, as int64
        for at in range(0, len(places), COUNTED_PIECES):
            part = places[at : at + COUNTED_PIECES]
            start, stop = part[0, 0], part[-1, 1]
            bounds = part.ravel()[:-1] - start
            found.append(np.add.reduceat(is_target[start:stop], bounds, dtype=np.int64)[::2])
        return np.concatenate(found)

    def __len__(self) -> int:
        return self.n_whole

    def count_targets(self, windows: Sequence[int] | np.ndarray) -> int:
        """The targets of some windows that count."""
        return int(self._n_targets[windows].sum())

    def _targets(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """The targets of a piece, and which of them count."""
        first = self.pieces.starts[piece] + 1
        following = slice(first, first + self.pieces.lengths[piece])
        return as_array(self.tokens)[following], as_array(self.is_target)[following].astype(bool)

    def __getitems__(self, indices: Sequence[int]) -> Packed:
        """A batch of windows; the end of a window that is not full belongs to its last piece."""
        shape = (len(indices), self.max_length)
        ids, starts = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        for row, number in enumerate(indices):
            at = 0
            for piece in self.packing.window(number):
                following, counts = self._targets(piece)
                stop = at + len(following)
                ids[row, at] = as_array(self.tokens)[self.pieces.starts[piece]]
                ids[row, at + 1 : stop] = following[:-1]
                targets[row, at:stop][counts] = following[counts]
                starts[row, at:] = at
                at = stop
        return Packed.of(*(torch.from_numpy(array) for array in (ids, targets, starts)))

    def scored_tokens(self, windows: Iterable[int] | None = None) -> np.ndarray:
        """The targets that count in some windows, or in all, (N,)."""
        numbers = range(self.n_whole) if windows is None else windows
        found = [as_array(self.tokens)[:0]]
        for number in numbers:
            found += [t[counts] for t, counts in map(self._targets, self.packing.window(number))]
        return np.concatenate(found)


class Conversations(NamedTuple):
    """Packed conversations, to train and to validate on."""

    train: PackedWindows
    val: PackedWindows


class WindowBatches(Sampler):
    """The windows of each micro-batch: a pure function of (seed, epoch, step).

    A step takes step_size windows (None: batch_size), divided among parallel's ranks and then into
    micro-batches of at most micro_batch windows (None: batch_size). An epoch's last step may have
    fewer. Each iteration is the next epoch, or what start_at() says. With seed None the windows are
    in order; with n_steps each step samples from all windows, with replacement. With a spacing
    above 1 an epoch takes every spacing-th window: the first epoch from window 0 on, each other
    from an offset of its own below spacing. All epochs take the same number of windows.
    """

    def __init__(
        self,
        dataset: WindowDataset | PackedWindows,
        batch_size: int,
        seed: int | None,
        n_steps: int | None = None,
        step_size: int | None = None,
        micro_batch: int | None = None,
        *,
        spacing: int = 1,
        parallel: Parallel = ALONE,
    ) -> None:
        self._rank, self._world = parallel.rank, parallel.world
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        assert spacing == 1 or not (dataset.has_tail or n_steps), "windows are spaced, or sampled"
        self._spacing = spacing
        self._n_windows = min(dataset.n_whole, max(1, dataset.n_whole // spacing))
        self.micro_batch = micro_batch or batch_size
        self.step_size = step_size or batch_size
        self._is_random = n_steps is not None
        self.n_steps = n_steps or -(-self._n_windows // self.step_size)
        self._order: tuple[int, np.ndarray] | None = None  # of the last epoch that was asked for
        self.start_at(0)

    @property
    def per_step(self) -> int:
        """A rank's micro-batches of a step; an epoch's last step may have fewer."""
        return -(-self.step_size // self._world // self.micro_batch)

    def count_windows(self, step: int) -> int:
        """The windows of an epoch's step, counted from 0, on all ranks."""
        if self._is_random:
            return self.step_size
        return min(self.step_size, self._n_windows - step * self.step_size)

    def count_own(self, step: int) -> int:
        """The windows of a step on this rank."""
        return len(range(self.count_windows(step))[self._share(step)])

    def count_largest(self, step: int) -> int:
        """The windows of a step on the rank that has the most."""
        return -(-self.count_windows(step) // self._world)

    def _share(self, step: int) -> slice:
        """This rank's share of a step's windows."""
        n = self.count_windows(step)
        return slice(n * self._rank // self._world, n * (self._rank + 1) // self._world)

    def __len__(self) -> int:
        if self.n_steps == 0:
            return int(self.dataset.has_tail)
        in_last = -(-self.count_own(self.n_steps - 1) // self.micro_batch)
        return (self.n_steps - 1) * self.per_step + in_last + self.dataset.has_tail

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first, left = self._next_epoch, self._next_step, self._steps
        self.start_at(epoch + 1)
        with_tail = left is None and self.dataset.has_tail
        left = self.n_steps - first if left is None else left
        while left > 0:
            last = min(self.n_steps, first + left)
            yield from self._batches(epoch, first, last)
            epoch, first, left = epoch + 1, 0, left - (last - first)
        if with_tail:
            yield [self.dataset.n_whole]

    def _batches(self, epoch: int, first: int, last: int) -> Iterator[list[int]]:
        """The micro-batches of an epoch's steps first to last - 1."""
        for step in range(first, last):
            windows = self._windows(epoch, step)[self._share(step)]
            for start in range(0, len(windows), self.micro_batch):
                yield windows[start : start + self.micro_batch].tolist()

    def count_targets(self, epoch: int, step: int) -> int:
        """The targets of a step, on all ranks."""
        if isinstance(self.dataset, WindowDataset):
            return self.count_windows(step) * self.dataset.max_length
        return self.dataset.count_targets(self._windows(epoch, step))

    def _windows(self, epoch: int, step: int) -> np.ndarray:
        """The windows of an epoch's step, of all ranks."""
        if self._is_random:
            assert self.seed is not None, "n_steps comes with a seed"
            generator = np.random.default_rng((self.seed, epoch, step))
            return generator.integers(self.dataset.n_whole, size=self.step_size)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._order_of(epoch)
        return self._order[1][step * self.step_size : (step + 1) * self.step_size]

    def _order_of(self, epoch: int) -> np.ndarray:
        """The windows of an epoch."""
        n_whole = self.dataset.n_whole
        dtype = np.uint32 if n_whole < 2**32 else np.int64  # every rank holds an epoch's order
        spaced = range(self.offset(epoch), n_whole, self._spacing)[: self._n_windows]
        order = np.arange(spaced.start, spaced.stop, spaced.step, dtype=dtype)
        if self.seed is not None:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order

    def offset(self, epoch: int) -> int:
        """The window that an epoch begins at; all possible offsets come before any comes again."""
        count = min(self._spacing, self.dataset.n_whole - (self._n_windows - 1) * self._spacing)
        # multiples of the golden ratio spread a few epochs evenly
        pace = next(n for n in itertools.count(round(0.618 * count)) if math.gcd(n, count) == 1)
        return epoch * pace % count

    def start_at(self, epoch: int, step: int = 0, steps: int | None = None) -> None:
        """Start the next iteration at this epoch and this step of it, counted from 0.

        It makes so many steps, through as many epochs as they take; None: to the epoch's end.
        """
        self._next_epoch, self._next_step, self._steps = epoch, step, steps


class OverlappingWindows(Dataset):
    """Windows of a text that score each token but the first once, with half a window before it.

    They are as long as those given, T, and begin every T // 2 tokens; an item is (ids, targets), of
    T and T // 2, the targets being of the ids' last positions. What these leave at the beginning
    and at the end of the text is scored by up to two shorter windows, which come last. The tokens
    of the first half window have only those before them.
    """

    def __init__(self, windows: WindowDataset) -> None:
        self.tokens, length = windows.tokens, windows.max_length
        self._n_scored = max(1, length // 2)
        self._lead = length - self._n_scored  # ids before the first one whose target is scored
        self._whole = windows.with_stride(self._n_scored)
        self.n_whole = self._whole.n_whole
        scored = 1 + self._lead + self.n_whole * self._n_scored  # tokens, with the first one
        ends = [(0, 1, min(1 + self._lead, len(self.tokens)))]
        ends += [(self.n_whole * self._n_scored, scored, len(self.tokens))]
        # of each shorter window the first id, the first target and the last one's end
        self._shorter = [end for end in ends if end[1] < end[2]]

    def __len__(self) -> int:
        return self.n_whole + len(self._shorter)

    def scored(self, number: int) -> tuple[int, int]:
        """The tokens that a window scores: the first and the end."""
        if number >= self.n_whole:
            return self._shorter[number - self.n_whole][1:]
        first = 1 + self._lead + number * self._n_scored
        return first, first + self._n_scored

    def __getitems__(self, indices: Sequence[int]) -> Pair:
        """A batch of long windows, or a shorter one: ids (B, T) and targets (B, T // 2) int64."""
        if indices[0] < self.n_whole:
            ids, targets = self._whole.__getitems__(indices)
            return ids, targets[:, self._lead :]
        start, first, stop = self._shorter[indices[0] - self.n_whole]
        window = self._whole.span(start, stop)[None]  # (1, T + 1)
        return window[:, :-1], window[:, first - start :]


class EvaluationBatches(Sampler):
    """The micro-batches of an evaluation_loader(), computed as they are asked for."""

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        micro_batch: int,
        max_batches: int | None,
        parallel: Parallel,
    ) -> None:
        self._rank, self._world = parallel.rank, parallel.world
        self._batch_size, self._micro_batch = batch_size, micro_batch
        self._n_whole = self._n_chosen = getattr(dataset, "n_whole", len(dataset))
        self._n_shorter = len(dataset) - self._n_whole  # each of which is a batch of its own
        n_full = -(-self._n_whole // batch_size)
        self.n_batches = self.of_batches = n_full + self._n_shorter
        if max_batches is not None and max_batches < n_full:
            self._n_chosen, self._n_shorter = max_batches * batch_size, 0
            self.n_batches = max_batches

    def _window(self, number: int) -> int:
        """One of the chosen windows, which are the middles of as many equal parts."""
        return (2 * number + 1) * self._n_whole // (2 * self._n_chosen)

    def windows(self) -> Iterator[list[int]]:
        """The windows of each batch, of all ranks."""
        for start in range(0, self._n_chosen, self._batch_size):
            numbers = range(start, min(start + self._batch_size, self._n_chosen))
            yield list(map(self._window, numbers))
        for number in range(self._n_shorter):
            yield [self._n_whole + number]

    def _all_ranks(self) -> Iterator[list[int]]:
        for batch in self.windows():
            for start in range(0, len(batch), self._micro_batch):
                yield batch[start : start + self._micro_batch]

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._all_ranks(), self._rank, None, self._world)

    def __len__(self) -> int:
        n_full, rest = divmod(self._n_chosen, self._batch_size)
        count = n_full * -(-self._batch_size // self._micro_batch) + -(-rest // self._micro_batch)
        return len(range(self._rank, count + self._n_shorter, self._world))


@dataclass(frozen=True)
class WindowPlan:
    """How a text of n_tokens is divided: training tokens first, then validation tokens.

    With shift_windows each epoch's windows begin at another token, below stride. packed counts the
    windows of conversations, to train and to validate on.
    """

    n_tokens: int
    n_train: int
    max_length: int
    stride: int
    batch_size: int
    shift_windows: bool = False
    packed: tuple[int, int] | None = None

    @property
    def n_val(self) -> int:
        """Tokens of the validation text."""
        return self.n_tokens - self.n_train

    @property
    def n_val_batches(self) -> int:
        """The batches that an evaluation over all of the validation text takes at most."""
        n_windows = -(-(self.n_val - 1) // max(1, self.max_length // 2))  # they overlap by half
        if self.packed is not None:
            n_windows = self.packed[1]
        return max(1, -(-n_windows // self.batch_size))

    @property
    def n_windows(self) -> int:
        """Training windows of an epoch: those that fit, with shift_windows at every shift."""
        if self.packed is not None:
            return self.packed[0]
        n_places = max(0, self.n_train - self.max_length)
        n_windows = -(-n_places // self.stride)
        return min(n_windows, max(1, n_places // self.stride)) if self.shift_windows else n_windows

    @property
    def n_unused(self) -> int:
        """Training tokens after the last window of the first epoch."""
        if self.packed is not None:
            return 0
        return self.n_train - ((self.n_windows - 1) * self.stride + self.max_length + 1)


def plan_windows(
    n_tokens: int,
    *,
    max_length: int,
    stride: int | None,
    batch_size: int,
    train_ratio: float,
    n_train: int | None = None,
    shift_windows: bool = False,
) -> tuple[WindowPlan, list[str]]:
    """Divide a text so that there is at least one training and one validation batch.

    stride None is the resulting max_length; n_train, if given, replaces train_ratio. A short text
    changes batch_size, stride, split and, last, max_length, with notices. Raises DataError where
    training or validation has fewer than two tokens.
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
        # rather a full window than a long validation text
        if n_train <= max_length < min(n_tokens - 2, int(n_tokens * LONGEST_TRAIN_SHARE)):
            n_train = max_length + 1
        if n_train != asked:
            notices.append(
                f"the split is moved from {asked} to {n_train} of {n_tokens} tokens, so that "
                "there is a window to train on and something to validate on"
            )
    asked_of_windows = (max_length, stride or max_length, batch_size, shift_windows)
    plan = WindowPlan(n_tokens, n_train, *asked_of_windows)
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


def plan_packed(
    conversations: Conversations, n_tokens: int, n_train: int, *, max_length: int, batch_size: int
) -> tuple[WindowPlan, list[str]]:
    """The plan of packed conversations; a notice where they make batch_size smaller."""
    packed, notices = (len(conversations.train), len(conversations.val)), []
    if packed[0] < batch_size:
        notices.append(
            f"batch_size is lowered from {batch_size} to {packed[0]}: there are no more windows "
            "of packed conversations"
        )
    batch_size = min(batch_size, packed[0])
    plan = WindowPlan(n_tokens, n_train, max_length, max_length, batch_size, packed=packed)
    return plan, notices


def make_loaders(
    tokens: Tokens | Conversations,
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
    """Loaders of (ids, targets), each (B, T) int64, or of Packed for training and for validation.

    Training windows have a new order each epoch, and with plan.shift_windows another offset; or,
    with sampling "random", they start anywhere. A step takes plan.batch_size * accumulation
    windows in micro-batches of micro_batch (None: plan.batch_size); each rank gets its share of
    them, and all validation windows. Those do not overlap, and the last one may be shorter. Packed
    conversations have windows of their own, which are never sampled.
    """
    is_random = sampling == "random" and not isinstance(tokens, Conversations)
    step_size = plan.batch_size * accumulation
    n_steps = -(-plan.n_windows // step_size) if is_random else None
    train, val = _windows_of(tokens, plan, is_random=is_random)
    pin_memory = device.type == "cuda"
    is_small = pin_memory and num_workers == 0 and 4 * plan.n_tokens < free_memory(device) / 10
    if is_small and isinstance(train, WindowDataset) and isinstance(val, WindowDataset):
        train.move_to(device)  # small texts stay on the GPU
        val.move_to(device)
        pin_memory = False

    def load(batches: WindowBatches) -> DataLoader:
        return DataLoader(
            batches.dataset,
            batch_sampler=batches,
            collate_fn=as_batch,
            num_workers=num_workers,
            worker_init_fn=defer_to_owner,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),  # else it draws on the global one
        )

    size = plan.batch_size
    batches = WindowBatches(
        train,
        size,
        seed,
        n_steps,
        step_size,
        micro_batch,
        spacing=plan.stride if plan.shift_windows else 1,
        parallel=parallel,
    )
    return load(batches), load(WindowBatches(val, size, None, micro_batch=micro_batch))


def _windows_of(
    tokens: Tokens | Conversations, plan: WindowPlan, *, is_random: bool
) -> tuple[WindowDataset | PackedWindows, WindowDataset | PackedWindows]:
    """The windows to train and to validate on."""
    if isinstance(tokens, Conversations):
        return tokens
    length = plan.max_length
    stride = 1 if is_random or plan.shift_windows else plan.stride
    return (
        WindowDataset(tokens[: plan.n_train], length, stride),
        WindowDataset(tokens[plan.n_train :], length, length, keep_tail=True),
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
    """A DataLoader over the sliding windows of a text; the default tokenizer is GPT-2's.

    Batches are (ids, targets), each (B, T) int64. A short text makes the window and the batch
    smaller, with a notice. Raises DataError for a text of fewer than two tokens.
    """
    tokenizer = tokenizer or GPT2Tokenizer()
    tokens = to_array(encode_from_start(tokenizer, text), tokenizer.vocab_size)
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


def _in_pieces(array: np.ndarray, parts: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Parts of an array, each between two places, in pieces of up to a million tokens."""
    short = (
        array[start : min(start + COUNTED_TOKENS, end)]
        for first, end in parts
        for start in range(first, end, COUNTED_TOKENS)
    )
    while some := list(itertools.islice(short, COUNTED_PARTS)):  # one by one takes long
        yield np.concatenate(some)


def measure_tokens(
    tokens: Tokens, tokenizer: Tokenizer, parts: Iterable[tuple[int, int]] | None = None
) -> TokenSize:
    """The mean characters and bytes of tokens, or of the parts between two places each.

    The mean is over all of them, and special tokens, such as an end of text, have none. It is exact
    where a token stands for bytes; tokens of another tokenizer are decoded, a million at once.
    """
    pieces = _in_pieces(as_array(tokens), [(0, len(tokens))] if parts is None else parts)
    n_tokens = characters = n_bytes = 0
    special = list(tokenizer.special_tokens.values())
    if isinstance(tokenizer, ByteTokens):
        counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for ids in pieces:
            counts += np.bincount(ids, minlength=len(counts))
        n_tokens, counts[special] = counts.sum().item(), 0
        for token in np.flatnonzero(counts).tolist():
            content, count = tokenizer.token_bytes(token), counts[token].item()
            n_bytes += count * len(content)
            # bytes that go on with a character are 10xxxxxx
            characters += count * sum(byte & 0xC0 != 0x80 for byte in content)
    else:
        for ids in pieces:
            is_text = ~np.isin(ids, special)
            # a token that begins a document may be shorter there than after others
            ends = is_text.cumsum()[ids == tokenizer.end_of_text_id]
            for document in np.split(ids[is_text], ends):
                text = tokenizer.decode(document.tolist())
                characters += len(text)
                n_bytes += len(text.encode("utf-8", "replace"))
            n_tokens += len(ids)
    return TokenSize(max(1, characters) / n_tokens, max(1, n_bytes) / n_tokens)


def in_parts(batches: list[Batch], size: int) -> list[Batch]:
    """A step's micro-batches, (B, T) each, cut as by WindowBatches with micro_batch=size."""
    if all(len(batch[0]) <= size for batch in batches):
        return batches
    ids, targets = (torch.cat([batch[i] for batch in batches]).split(size) for i in (0, 1))
    packed = [batch for batch in batches if isinstance(batch, Packed)]
    if not packed:
        return list(zip(ids, targets, strict=True))
    starts = [torch.zeros_like(b.ids) if b.starts is None else b.starts for b in packed]
    return list(map(Packed.of, ids, targets, torch.cat(starts).split(size)))


def count_targets(batch: Batch) -> int:
    """The targets of a batch that count."""
    return len(batch.counted) if isinstance(batch, Packed) else batch[1].numel()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device, asynchronously from pinned memory."""
    is_async = device.type == "cuda"
    parts = [None if t is None else t.to(device, non_blocking=is_async) for t in batch]
    return Packed(*parts) if isinstance(batch, Packed) else (parts[0], parts[1])


def as_batch(items: Any) -> Any:
    """Collate: a WindowDataset's items are a batch already; another dataset's are stacked."""
    return items if isinstance(items, tuple) else default_collate(items)


def to_array(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Token ids in the smallest of uint16 and uint32 that holds the vocabulary."""
    return np.array(ids, dtype=np.uint16 if vocab_size <= 2**16 else np.uint32)


def evaluation_loader(
    loader: DataLoader,
    max_batches: int | None = None,
    parallel: Parallel = ALONE,
    micro_batch: int | None = None,
    *,
    overlapping: bool = True,
) -> DataLoader:
    """A loader over a text's OverlappingWindows in order: all, or max_batches evenly spread.

    It gives the same micro-batches each time, of at most micro_batch windows (None: the loader's),
    and uses no random generator. Each rank gets a share of them. With overlapping False it has the
    windows side by side, as a model that learns them by heart knows them. A dataset that is no
    WindowDataset is read as it is; where the loader's sampler has indices, those alone.
    """
    dataset = loader.dataset
    indices = getattr(getattr(loader.batch_sampler, "sampler", None), "indices", None)
    if indices is not None:  # a SubsetRandomSampler, which splits a dataset
        dataset = Subset(dataset, list(indices))
    batch_size = loader.batch_size or loader.batch_sampler.batch_size
    if isinstance(dataset, WindowDataset):
        dataset = OverlappingWindows(dataset) if overlapping else dataset.without_overlap()
    size = micro_batch or getattr(loader.batch_sampler, "micro_batch", batch_size)
    return DataLoader(
        dataset,
        batch_sampler=EvaluationBatches(dataset, batch_size, size, max_batches, parallel),
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=torch.Generator(),
    )
