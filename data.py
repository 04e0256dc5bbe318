"""Tokens to batches: sliding windows over a text, cut into training and validation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from engine.console import say
from engine.errors import DataError
from text.tokenizer import Tokenizer, load_tokenizer

MIN_TOKENS = 4  # two to train on, a token and the one to guess, and two to validate on


class WindowDataset(Dataset):
    """The windows of max_length tokens that start at 0, stride, 2 stride, ... of an array.

    A window's targets are its tokens moved by one, so each takes max_length + 1 tokens. With
    keep_tail the tokens after the last whole window form a last, shorter one.
    """

    def __init__(
        self, tokens: np.ndarray, max_length: int, stride: int, *, keep_tail: bool = False
    ) -> None:
        self.tokens = tokens
        self.max_length = max_length
        self.stride = stride
        self.n_whole = max(0, (len(tokens) - 1 - max_length) // stride + 1)
        self.tail_start = self.n_whole * stride
        self.has_tail = keep_tail and self.tail_start < len(tokens) - 1

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
        if self.has_tail and self.n_whole in indices:
            assert len(indices) == 1, "the tail is a batch of its own"
            window = self.tokens[None, self.tail_start :]
        else:
            starts = np.asarray(indices, dtype=np.int64)[:, None] * self.stride
            window = self.tokens[starts + np.arange(self.max_length + 1)]  # (B, T + 1)
        window = torch.from_numpy(window.astype(np.int64))
        return window[:, :-1], window[:, 1:]


class WindowBatches(Sampler):
    """Which windows each batch holds: a pure function of (seed, epoch, batch number).

    Iterating gives epoch 0, then 1, ...; start_epoch(n) chooses the one that comes next. The last
    batch may be smaller. With seed None the windows stay in order, and a tail comes alone.
    """

    def __init__(self, dataset: WindowDataset, batch_size: int, seed: int | None) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self._next_epoch = 0

    def __len__(self) -> int:
        whole_batches = -(-self.dataset.n_whole // self.batch_size)
        return whole_batches + self.dataset.has_tail

    def __iter__(self) -> Iterator[list[int]]:
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        order = self._order(epoch)
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size].tolist()
        if self.dataset.has_tail:
            yield [self.dataset.n_whole]

    def start_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of this epoch, counted from 0."""
        self._next_epoch = epoch

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.dataset.n_whole)
        return np.random.default_rng((self.seed, epoch)).permutation(self.dataset.n_whole)


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
    n_tokens: int, *, max_length: int, stride: int, batch_size: int, train_ratio: float
) -> tuple[WindowPlan, list[str]]:
    """Cut a text so that there is at least one training and one validation batch.

    Where it is too short for what was asked, split, window and batch are fitted to it and a
    notice says so. Raises DataError where not even two training and two validation tokens can be
    had.
    """
    if n_tokens < MIN_TOKENS:
        raise DataError(
            f"the text has {n_tokens} token{'s' * (n_tokens != 1)}; at least {MIN_TOKENS} are "
            "needed, 2 to train on and 2 to validate on.\nSet DATA to a longer text."
        )
    notices = []
    asked = int(n_tokens * train_ratio)
    n_train = min(max(asked, 2), n_tokens - 2)
    if n_train != asked:
        notices.append(
            f"the split is moved from {asked} to {n_train} of {n_tokens} tokens, so that both "
            "sides have two"
        )
    plan = WindowPlan(n_tokens, n_train, max_length, stride, batch_size)
    if plan.n_windows == 0:
        plan = replace(plan, max_length=n_train - 1)
        notices.append(
            f"max_length is lowered from {max_length} to {plan.max_length}: the training text has "
            f"only {n_train} tokens"
        )
    if plan.n_windows < batch_size:
        plan = replace(plan, batch_size=plan.n_windows)
        notices.append(
            f"batch_size is lowered from {batch_size} to {plan.batch_size}: there are no more "
            "training windows"
        )
    if stride > plan.max_length:
        notices.append(
            f"stride ({stride}) is above max_length ({plan.max_length}): the tokens between two "
            "windows are never trained on"
        )
    return plan, notices


def make_loaders(
    tokens: np.ndarray, plan: WindowPlan, *, seed: int, num_workers: int, pin_memory: bool
) -> tuple[DataLoader, DataLoader]:
    """Training windows in a new order each epoch; validation windows in order, without overlap.

    Batches are (ids, targets), each (B, T) int64. Every validation token but the first is a
    target exactly once, so the last batch of validation may be a single shorter window.
    """
    train = WindowDataset(tokens[: plan.n_train], plan.max_length, plan.stride)
    val = WindowDataset(tokens[plan.n_train :], plan.max_length, plan.max_length, keep_tail=True)
    return tuple(
        DataLoader(
            dataset,
            batch_sampler=WindowBatches(dataset, plan.batch_size, batch_seed),
            collate_fn=as_batch,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),  # else each epoch draws on torch's own
        )
        for dataset, batch_seed in ((train, seed), (val, None))
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
    tokenizer = tokenizer or load_tokenizer("gpt2")
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


def as_batch(items):
    """Collate: a WindowDataset gives batches already; another dataset's items are stacked."""
    return items if isinstance(items, tuple) else default_collate(items)


def to_array(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Token ids in the smallest of uint16 and uint32 that holds the vocabulary."""
    return np.array(ids, dtype=np.uint16 if vocab_size <= 2**16 else np.uint32)


def evaluation_loader(loader: DataLoader, max_batches: int | None = None) -> DataLoader:
    """A loader over the same windows in order: all of them, or max_batches evenly spaced batches.

    It gives the same batches each time, and leaves every random generator alone.
    """
    dataset = loader.dataset
    batch_size = loader.batch_size or loader.batch_sampler.batch_size
    if isinstance(dataset, WindowDataset):
        batches = list(WindowBatches(dataset, batch_size, seed=None))
    else:
        indices = range(len(dataset))
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    if max_batches is not None and max_batches < len(batches):
        chosen = np.linspace(0, len(batches) - 1, max_batches).round().astype(int)
        batches = [batches[i] for i in chosen]
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=torch.Generator(),
    )
