"""Windows, batches and plans against slices of the tokens made naively."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from data import (
    TokenSlice,
    WindowBatches,
    WindowDataset,
    as_batch,
    create_dataloader_v1,
    evaluation_loader,
    make_loaders,
    measure_tokens,
    plan_windows,
    to_array,
)
from engine.errors import DataError
from engine.metrics import TokenSize
from planning.preflight import describe_text
from tests.conftest import REPOSITORY
from text.tokenizer import CharTokenizer, GPT2Tokenizer, load_tokenizer


class NumberTokenizer:
    """ "7 8 9" is [7, 8, 9]: every token of a text can be told from every other."""

    name = fingerprint = "numbers"
    vocab_size = 100_000

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(token) for token in ids)


def numbers(count: int) -> str:
    return " ".join(str(i) for i in range(count))


def naive_windows(tokens, max_length: int, stride: int) -> list[tuple[list[int], list[int]]]:
    tokens = list(tokens)
    return [
        (tokens[start : start + max_length], tokens[start + 1 : start + 1 + max_length])
        for start in range(0, len(tokens), stride)
        if start + 1 + max_length <= len(tokens)
    ]


def plan(n_tokens: int, *, max_length=8, stride=8, batch_size=4, train_ratio=0.8, n_train=None):
    return plan_windows(
        n_tokens,
        max_length=max_length,
        stride=stride,
        batch_size=batch_size,
        train_ratio=train_ratio,
        n_train=n_train,
    )


def loaders(
    n_tokens: int,
    *,
    seed=5,
    num_workers=0,
    sampling="windows",
    accumulation=1,
    micro_batch=None,
    **changes,
) -> tuple[DataLoader, DataLoader]:
    """Loaders over the tokens 0, 1, 2, ..., so that a window's first token is where it starts."""
    windows, _ = plan(n_tokens, **changes)
    tokens = np.arange(n_tokens, dtype=np.uint16)
    return make_loaders(
        tokens,
        windows,
        seed=seed,
        num_workers=num_workers,
        device=torch.device("cpu"),
        sampling=sampling,
        accumulation=accumulation,
        micro_batch=micro_batch,
    )


def epoch_starts(loader: DataLoader, epoch: int) -> list[list[int]]:
    """Where the windows of each batch of an epoch start."""
    loader.batch_sampler.start_at(epoch)
    return [ids[:, 0].tolist() for ids, _ in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [start for batch in batches for start in batch]


# ------------------------------------------------------------------ windows


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 25))
def test_windows_equal_slices_of_the_tokens(n_tokens, max_length, stride):
    tokens = np.arange(n_tokens, dtype=np.uint16) * 3
    dataset = WindowDataset(tokens, max_length, stride)
    expected = naive_windows(tokens.tolist(), max_length, stride)
    found = [(ids.tolist(), targets.tolist()) for ids, targets in dataset]
    assert found == expected
    assert len(dataset) == len(expected)
    if expected:
        ids, targets = dataset.__getitems__(list(range(len(dataset))))
        assert list(zip(ids.tolist(), targets.tolist(), strict=True)) == expected
        assert ids.dtype == targets.dtype == torch.int64


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(2, 60), st.integers(1, 20))
def test_with_the_tail_every_target_is_scored_exactly_once(n_tokens, max_length):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    dataset = WindowDataset(tokens, max_length, max_length, keep_tail=True)
    windows = [(ids.tolist(), targets.tolist()) for ids, targets in dataset]
    assert [t for _, targets in windows for t in targets] == list(range(1, n_tokens))
    assert [t for ids, _ in windows for t in ids] == list(range(n_tokens - 1))
    assert {len(ids) for ids, _ in windows[:-1]} <= {max_length}


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_the_windows_is_an_index_error(index):
    dataset = WindowDataset(np.arange(25, dtype=np.uint16), 8, 8)
    assert len(dataset) == 3
    with pytest.raises(IndexError):
        dataset[index]


def test_the_largest_token_of_uint32_survives():
    tokens = to_array([0, 70_000, 4_000_000_000], vocab_size=2**32)
    ids, targets = WindowDataset(tokens, 2, 2)[0]
    assert ids.tolist() == [0, 70_000]
    assert targets.tolist() == [70_000, 4_000_000_000]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, np.uint16), (50_257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)],
)
def test_tokens_take_two_bytes_where_the_vocabulary_allows(vocab_size, dtype):
    array = to_array([0, vocab_size - 1], vocab_size)
    assert array.dtype == dtype
    assert array.tolist() == [0, vocab_size - 1]


# ------------------------------------------------------------------ training and validation


def test_the_verdict_gives_36_windows_in_9_batches(shared_data):
    text = (shared_data / "the-verdict.txt").read_text(encoding="utf-8")
    tokenizer = load_tokenizer("gpt2")
    tokens = to_array(tokenizer.encode(text), tokenizer.vocab_size)
    assert len(tokens) == 5145
    windows, notices = plan(len(tokens), max_length=128, stride=128, batch_size=4, train_ratio=0.9)
    assert notices == []
    assert (windows.n_train, windows.n_val, windows.n_windows) == (4630, 515, 36)
    assert windows.n_unused == 4630 - (36 * 128 + 1)
    train, val = make_loaders(tokens, windows, seed=1, num_workers=0, device=torch.device("cpu"))
    assert len(train) == 9
    assert [tuple(ids.shape) for ids, _ in train] == [(4, 128)] * 9
    # 514 targets: four whole windows and a tail of two
    assert len(val) == 2
    assert [tuple(targets.shape) for _, targets in val] == [(4, 128), (1, 2)]


def test_no_token_is_shared_by_training_and_validation():
    train, val = loaders(203, stride=3)
    seen = [
        {token for pair in loader for part in pair for token in part.flatten().tolist()}
        for loader in (train, val)
    ]
    assert min(seen[0]) == 0
    assert max(seen[0]) < 162 <= min(seen[1])
    assert seen[1] == set(range(162, 203))


@pytest.mark.parametrize("stride", [3, 8, 11])
def test_an_epoch_shows_every_training_window_once_with_its_targets(stride):
    train, _ = loaders(300, stride=stride)
    expected = naive_windows(range(240), 8, stride)
    found = [
        (row.tolist(), target_row.tolist())
        for ids, targets in train
        for row, target_row in zip(ids, targets, strict=True)
    ]
    assert sorted(found) == expected
    assert found != expected  # shuffled
    assert len(train) == -(-len(expected) // 4)


def test_batches_are_a_function_of_seed_and_epoch_alone():
    first, _ = loaders(400)
    second, _ = loaders(400)
    other_seed, _ = loaders(400, seed=6)
    in_turn = [epoch_starts(first, epoch) for epoch in range(3)]
    jumped = [epoch_starts(second, epoch) for epoch in (2, 0, 1)]
    assert jumped == [in_turn[2], in_turn[0], in_turn[1]]
    assert len({str(epoch) for epoch in in_turn}) == 3
    assert epoch_starts(other_seed, 0) != in_turn[0]
    assert sorted(flat(epoch_starts(other_seed, 0))) == sorted(flat(in_turn[0]))


def test_iterating_again_goes_on_to_the_next_epoch():
    train, _ = loaders(400)
    expected = [epoch_starts(train, epoch) for epoch in range(3)]
    fresh, _ = loaders(400)
    assert [[ids[:, 0].tolist() for ids, _ in fresh] for _ in range(3)] == expected


def test_an_epoch_left_early_does_not_change_the_next():
    train, _ = loaders(400)
    expected = epoch_starts(train, 1)
    train.batch_sampler.start_at(0)
    next(iter(train))
    assert [ids[:, 0].tolist() for ids, _ in train] == expected


def test_worker_processes_give_the_same_batches():
    alone, alone_val = loaders(400)
    helped, helped_val = loaders(400, num_workers=2)
    for epoch in (0, 1):
        assert epoch_starts(helped, epoch) == epoch_starts(alone, epoch)
    for found, expected in zip(helped_val, alone_val, strict=True):
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_neither_heed_nor_touch_the_global_generator(num_workers):
    train, val = loaders(400, num_workers=num_workers)
    expected, _ = loaders(400)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert epoch_starts(train, 0) == epoch_starts(expected, 0)
    assert sum(len(ids) for ids, _ in val) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_comes_in_order_and_alike_each_time():
    _, val = loaders(400, max_length=8, batch_size=4)
    for _ in range(2):
        targets = [t for _, batch in val for t in batch.flatten().tolist()]
        assert targets == list(range(321, 400))


# ------------------------------------------------------------------ plans


@pytest.mark.parametrize("train_ratio", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("stride", "batch_size"), [(8, 4), (3, 1), (12, 50)])
def test_a_text_of_any_length_is_cut_into_both_kinds_of_batches(train_ratio, stride, batch_size):
    context = 8
    for n_tokens in range(4, 3 * context + 1):
        windows, notices = plan(
            n_tokens,
            max_length=context,
            stride=stride,
            batch_size=batch_size,
            train_ratio=train_ratio,
        )
        tokens = np.arange(n_tokens, dtype=np.uint16)
        train, val = make_loaders(
            tokens, windows, seed=0, num_workers=0, device=torch.device("cpu")
        )
        case = f"{n_tokens} tokens: {windows}"

        shown = [ids for ids, _ in train]
        assert len(shown) == len(train) >= 1, case
        assert all(len(ids) <= windows.batch_size <= batch_size for ids in shown), case
        assert len(shown[0]) == windows.batch_size, case
        starts = sorted(token for ids in shown for token in ids[:, 0].tolist())
        assert starts == [windows.stride * i for i in range(windows.n_windows)], case
        last_used = max(targets.max().item() for _, targets in train)
        assert windows.n_train - 1 - last_used == windows.n_unused >= 0, case
        scored = [t for _, targets in val for t in targets.flatten().tolist()]
        assert scored == list(range(windows.n_train + 1, n_tokens)), case
        assert len(scored) == windows.n_val - 1 >= 1, case

        text = "\n".join(notices)
        moved = windows.n_train != int(n_tokens * train_ratio)
        assert ("the split is moved" in text) == moved, case
        assert ("max_length is lowered from 8" in text) == (windows.max_length != 8), case
        assert ("batch_size is lowered" in text) == (windows.batch_size != batch_size), case
        assert ("stride is lowered" in text) == (windows.stride != stride), case
        assert ("stride (12) is above" in text) == (windows.stride > windows.max_length), case
        assert windows.stride == min(stride, windows.max_length) or windows.max_length == 8, case


def test_a_text_long_enough_is_cut_as_asked():
    windows, notices = plan(1000, max_length=16, stride=10, batch_size=5, train_ratio=0.75)
    assert notices == []
    assert (windows.n_train, windows.n_val) == (750, 250)
    assert (windows.max_length, windows.stride, windows.batch_size) == (16, 10, 5)
    assert windows.n_windows == len(naive_windows(range(750), 16, 10))


@pytest.mark.parametrize("n_tokens", range(4))
def test_fewer_than_four_tokens_are_an_error_that_names_the_minimum(n_tokens):
    with pytest.raises(DataError, match="at least 4 are needed") as caught:
        plan(n_tokens)
    assert f"the text has {n_tokens} token" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_batch_larger_than_all_windows_is_lowered_with_a_notice():
    windows, notices = plan(100, max_length=8, stride=8, batch_size=64)
    assert windows.batch_size == windows.n_windows == 9
    assert len(notices) == 1
    assert "batch_size is lowered from 64 to 9" in notices[0]


def test_a_stride_above_max_length_is_kept_with_a_notice():
    windows, notices = plan(500, max_length=8, stride=9)
    assert windows.stride == 9
    assert len(notices) == 1
    assert "stride (9) is above max_length (8)" in notices[0]


@pytest.mark.parametrize(("batch_size", "context", "stride"), [(32, 512, 256), (4, 1024, 1024)])
def test_a_story_of_5145_tokens_trains_with_large_batches_and_contexts(batch_size, context, stride):
    windows, _ = plan(
        5145, max_length=context, stride=stride, batch_size=batch_size, train_ratio=0.9
    )
    train, val = make_loaders(
        np.zeros(5145, np.uint16), windows, seed=0, num_workers=0, device=torch.device("cpu")
    )
    assert windows.max_length == context
    assert len(train) >= 1
    assert sum(targets.numel() for _, targets in val) == windows.n_val - 1


def test_the_split_is_moved_so_that_a_whole_window_fits():
    windows, notices = plan(1100, max_length=1024, stride=1024, train_ratio=0.9)
    assert (windows.n_train, windows.max_length) == (1025, 1024)
    assert "the split is moved from 990 to 1025" in notices[0]


def test_a_split_that_documents_set_is_kept():
    windows, notices = plan(1100, max_length=1024, stride=1024, n_train=600)
    assert (windows.n_train, windows.max_length) == (600, 599)
    assert "max_length is lowered from 1024 to 599" in notices[0]


@pytest.mark.parametrize(("n_train", "n_batches"), [(2, 1), (98, 3)])
def test_a_split_with_two_tokens_on_a_side_gives_batches_of_both(n_train, n_batches):
    train, val = loaders(100, n_train=n_train)
    assert sum(targets.numel() for _, targets in val) == 100 - n_train - 1
    assert len(epoch_starts(train, 0)) == n_batches


@pytest.mark.parametrize(("n_tokens", "expected"), [(500, 8), (8, 5)])
def test_a_stride_that_is_not_given_is_the_window_whatever_that_becomes(n_tokens, expected):
    windows, notices = plan(n_tokens, stride=None, batch_size=1)
    assert windows.stride == windows.max_length == expected
    assert not any("stride" in notice for notice in notices)


@pytest.mark.parametrize("n_train", [0, 1, 99, 100])
def test_a_split_with_a_side_too_short_is_refused_with_both_sizes(n_train):
    with pytest.raises(DataError, match=f"has {n_train} tokens and the validation text"):
        plan(100, n_train=n_train)


# ------------------------------------------------------------------ random crops


def test_random_crops_are_a_function_of_seed_epoch_and_batch():
    one, _ = loaders(200, sampling="random")
    other, _ = loaders(200, sampling="random")
    windows, _ = loaders(200)
    assert epoch_starts(one, 3) == epoch_starts(other, 3) != epoch_starts(one, 4)
    assert epoch_starts(loaders(200, sampling="random", seed=6)[0], 3) != epoch_starts(one, 3)
    assert len(one) == len(windows) == len(epoch_starts(one, 0))
    assert len({str(batch) for batch in epoch_starts(one, 0)}) == len(one)


def test_random_crops_are_the_same_with_workers():
    assert epoch_starts(loaders(200, sampling="random", num_workers=2)[0], 1) == epoch_starts(
        loaders(200, sampling="random")[0], 1
    )


def test_random_crops_start_anywhere_from_the_first_to_the_last_place():
    train, _ = loaders(40, sampling="random", train_ratio=0.5)
    starts = {
        start for epoch in range(60) for batch in epoch_starts(train, epoch) for start in batch
    }
    assert starts == set(range(20 - 8))


def test_random_crops_are_whole_windows_of_training_tokens_with_their_targets():
    train, val = loaders(203, sampling="random", stride=3)
    for ids, targets in train:
        assert ids.shape == (4, 8)
        assert torch.equal(ids, ids[:, :1] + torch.arange(8))
        assert torch.equal(targets, ids + 1)
        assert targets.max() < 162
    assert [t for _, targets in val for t in targets.flatten().tolist()] == list(range(163, 203))


def test_a_batch_of_random_crops_does_not_depend_on_those_before_it():
    train, _ = loaders(400, sampling="random")
    expected = epoch_starts(train, 1)
    short = WindowBatches(train.dataset, 4, seed=5, n_steps=2)
    short.start_at(1)
    assert list(short) == expected[:2]
    train.batch_sampler.start_at(0)
    next(iter(train))
    assert [ids[:, 0].tolist() for ids, _ in train] == expected


# ------------------------------------------------------------------ steps and micro-batches

BOTH_KINDS = pytest.mark.parametrize("sampling", ["windows", "random"])


def steps_of(loader: DataLoader, epoch: int) -> list[list[int]]:
    """Where the windows of each step of an epoch start: its micro-batches, joined."""
    batches = epoch_starts(loader, epoch)
    per_step = loader.batch_sampler.per_step
    return [flat(batches[i : i + per_step]) for i in range(0, len(batches), per_step)]


@BOTH_KINDS
@pytest.mark.parametrize(("accumulation", "micro_batch"), [(1, None), (1, 3), (3, None), (2, 5)])
def test_starting_at_a_step_equals_skipping_those_before_it(sampling, accumulation, micro_batch):
    options = {"sampling": sampling, "accumulation": accumulation, "micro_batch": micro_batch}
    whole, _ = loaders(500, **options)
    jumped, _ = loaders(500, **options)
    per_step, n_steps = whole.batch_sampler.per_step, whole.batch_sampler.n_steps
    in_turn = [epoch_starts(whole, epoch) for epoch in range(3)]
    for epoch in (2, 0, 1):
        for step in range(n_steps + 1):
            jumped.batch_sampler.start_at(epoch, step)
            found = [ids[:, 0].tolist() for ids, _ in jumped]
            assert found == in_turn[epoch][step * per_step :]
    jumped.batch_sampler.start_at(0, 2)
    list(jumped)
    assert [ids[:, 0].tolist() for ids, _ in jumped] == in_turn[1]  # from its first step on


@BOTH_KINDS
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 7, 8, 12, 100])
def test_a_step_has_the_same_windows_whatever_the_size_of_its_parts(sampling, micro_batch):
    whole, _ = loaders(900, sampling=sampling, batch_size=12)
    parts, _ = loaders(900, sampling=sampling, batch_size=12, micro_batch=micro_batch)
    gathered, _ = loaders(900, sampling=sampling, batch_size=4, accumulation=3)
    assert whole.batch_sampler.n_steps == parts.batch_sampler.n_steps == 8
    for epoch in (0, 1):
        expected = epoch_starts(whole, epoch)
        assert steps_of(parts, epoch) == steps_of(gathered, epoch) == expected
        assert len(expected) == 8
        assert len(expected[-1]) == (12 if sampling == "random" else 89 - 7 * 12)


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(
    n_windows=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    step_size=st.integers(1, 30),
    tail_or_steps=st.sampled_from([(False, None), (True, None)])
    | st.integers(1, 9).map(lambda n: (False, n)),
)
def test_the_length_is_the_number_of_batches_that_come(
    n_windows, batch_size, step_size, tail_or_steps
):
    tail, n_steps = tail_or_steps
    tokens = np.arange(2 * n_windows + 1 + tail, dtype=np.uint16)
    dataset = WindowDataset(tokens, 2, 2, keep_tail=True)
    assert (dataset.n_whole, dataset.has_tail) == (n_windows, tail)
    batches = WindowBatches(dataset, batch_size, 3, n_steps, step_size)
    found = list(batches)
    assert len(found) == len(batches)
    if tail:
        assert found.pop() == [n_windows]
    per_step = batches.per_step
    steps = [found[i : i + per_step] for i in range(0, len(found), per_step)]
    assert len(steps) == batches.n_steps == (n_steps or -(-n_windows // step_size))
    sizes = [sum(map(len, step)) for step in steps]
    assert sizes[:-1] == [step_size] * (len(steps) - 1)
    assert all(len(batch) <= batch_size for batch in found)
    assert all(len(batch) == batch_size for step in steps for batch in step[:-1])
    if n_steps is None:
        assert sorted(flat(found)) == list(range(n_windows))
    else:
        assert sizes[-1] == step_size and 0 <= min(flat(found)) <= max(flat(found)) < n_windows


@BOTH_KINDS
def test_a_loader_has_as_many_batches_as_it_says(sampling):
    for options in ({"batch_size": 4}, {"accumulation": 3}, {"accumulation": 2, "micro_batch": 3}):
        train, val = loaders(500, sampling=sampling, **options)
        assert len(train) == len(list(train)) > 0
        assert len(val) == len(list(val)) > 0
    # 99 validation targets: twelve windows of 8, six at a time in parts of five, a tail of 3
    train, val = loaders(500, sampling=sampling, batch_size=6, accumulation=5, micro_batch=5)
    assert [tuple(targets.shape) for _, targets in val] == [(5, 8), (1, 8), (5, 8), (1, 8), (1, 3)]
    assert train.batch_sampler.per_step == 6


@BOTH_KINDS
def test_worker_processes_give_the_same_micro_batches_from_any_step_on(sampling):
    options = {"sampling": sampling, "accumulation": 3, "micro_batch": 3}
    alone, _ = loaders(500, **options)
    helped, _ = loaders(500, num_workers=2, **options)
    for loader in (alone, helped):
        loader.batch_sampler.start_at(1, 2)
    expected = [(ids.tolist(), targets.tolist()) for ids, targets in alone]
    assert [(ids.tolist(), targets.tolist()) for ids, targets in helped] == expected
    assert epoch_starts(helped, 2) == epoch_starts(alone, 2)


# ------------------------------------------------------------------ tokens in a file, on a device


@pytest.fixture
def token_slice(tmp_path) -> TokenSlice:
    np.arange(5000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    return TokenSlice(tmp_path / "tokens.bin", "uint16", 100, 4100)


def test_a_slice_of_a_token_file_gives_what_an_array_does(token_slice):
    array = np.arange(100, 4100, dtype=np.uint16)
    windows, _ = plan(4000)
    both = [
        make_loaders(tokens, windows, seed=1, num_workers=0, device=torch.device("cpu"))
        for tokens in (token_slice, array)
    ]
    for one, other in zip(*both, strict=True):
        for (ids, targets), (same_ids, same_targets) in zip(one, other, strict=True):
            assert torch.equal(ids, same_ids)
            assert torch.equal(targets, same_targets)


def test_a_worker_process_gets_the_place_of_the_tokens_and_not_the_tokens(token_slice):
    dataset = WindowDataset(token_slice, max_length=8, stride=8)
    before = dataset[3]
    packed = pickle.dumps(dataset)
    assert len(packed) < 2000
    assert torch.equal(pickle.loads(packed)[3][0], before[0])
    assert len(pickle.dumps(token_slice)) < 1000
    assert pickle.loads(pickle.dumps(token_slice)).array().tolist() == list(range(100, 4100))


def test_a_worker_that_shares_no_memory_gives_the_same_batches(token_slice):
    windows, _ = plan(4000, batch_size=32)
    train, _ = make_loaders(token_slice, windows, seed=1, num_workers=0, device=torch.device("cpu"))
    helped = DataLoader(
        train.dataset,
        batch_sampler=train.batch_sampler,
        collate_fn=as_batch,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    assert epoch_starts(helped, 2) == epoch_starts(train, 2)


def test_tokens_kept_on_a_device_give_the_same_batches(token_slice):
    dataset = WindowDataset(token_slice, max_length=8, stride=8, keep_tail=True)
    assert dataset.has_tail
    batches = [[0, 5, 7], [dataset.n_whole - 1], [dataset.n_whole]]
    before = [dataset.__getitems__(batch) for batch in batches]
    dataset.move_to(torch.device("cpu"))
    after = [dataset.__getitems__(batch) for batch in batches]
    for (ids, targets), (same_ids, same_targets) in zip(before, after, strict=True):
        assert torch.equal(ids, same_ids)
        assert torch.equal(targets, same_targets)
        assert ids.dtype == same_ids.dtype == torch.int64


@pytest.mark.parametrize("is_resident", [False, True])
def test_without_overlap_each_token_is_shown_at_most_once(is_resident):
    dataset = WindowDataset(np.arange(100, dtype=np.uint16), max_length=8, stride=3)
    if is_resident:
        dataset.move_to(torch.device("cpu"))
    apart = dataset.without_overlap()
    found = [(ids.tolist(), targets.tolist()) for ids, targets in apart]
    assert found == naive_windows(range(100), 8, 8)
    assert len(dataset) == len(naive_windows(range(100), 8, 3))  # the other stays as it is


def test_without_overlap_the_tokens_stay_where_they_were_moved():
    dataset = WindowDataset(np.arange(100, dtype=np.uint16), max_length=8, stride=3)
    dataset.move_to(torch.device("meta"))
    ids, targets = dataset.without_overlap().__getitems__([0, 1])
    assert ids.device.type == targets.device.type == "meta"
    assert ids.shape == (2, 8)


@pytest.mark.parametrize("stride", [8, 9])
def test_windows_that_do_not_overlap_are_taken_as_they_are(stride):
    dataset = WindowDataset(np.arange(100, dtype=np.uint16), 8, stride, keep_tail=True)
    assert dataset.without_overlap() is dataset


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_small_texts_stay_on_the_device():
    windows, _ = plan(4000)
    train, val = make_loaders(
        np.arange(4000, dtype=np.uint16),
        windows,
        seed=1,
        num_workers=0,
        device=torch.device("cuda"),
    )
    assert {ids.device.type for loader in (train, val) for ids, _ in loader} == {"cuda"}


def test_overlapping_windows_are_evaluated_apart():
    train, _ = loaders(200, stride=1)
    view = evaluation_loader(train)
    starts = [start for ids, _ in view for start in ids[:, 0].tolist()]
    assert starts == list(range(0, starts[-1] + 1, 8))


# ------------------------------------------------------------------ the report on the text


@pytest.mark.parametrize(
    ("n_parameters", "word"), [(10**6, "by heart"), (100, "a few epochs"), (10, "enough to learn")]
)
def test_the_report_says_whether_the_text_will_do(n_parameters, word):
    report = {
        "files": [{}, {}],
        "documents": 3,
        "bytes": 1234,
        "characters": 1200,
        "passed_over": [{}],
        "empty_documents": 0,
        "duplicate_documents": 2,
        "documents_on_both_sides": 1,
        "tokens_per_character": 0.25,
        "vocabulary": 200,
        "vocabulary_used": 50,
    }
    windows, _ = plan(1000)
    lines = describe_text(report, windows, n_parameters)
    assert lines[0] == "3 documents in 2 files: 1,234 bytes, 1,200 characters"
    assert lines[1].startswith(
        "1 passed over, 2 duplicates, 1 in both training and validation text ("
    )
    assert lines[2] == "1,000 tokens, 0.25 a character, 25% of the vocabulary in use"
    assert word in lines[3]
    assert lines[3].startswith(f"{800 / n_parameters:.3g} training tokens a parameter: ")
    assert len(lines) == 4


def test_the_report_on_one_whole_file_is_three_lines():
    report = {
        "files": [{}],
        "documents": 1,
        "bytes": 12,
        "characters": 12,
        "passed_over": [],
        "empty_documents": 0,
        "duplicate_documents": 0,
        "documents_on_both_sides": 0,
        "tokens_per_character": 1.0,
        "vocabulary": 270,
        "vocabulary_used": 270,
    }
    assert describe_text(report, plan(1000)[0], 800) == [
        "1 document in 1 file: 12 bytes, 12 characters",
        "1,000 tokens, 1.00 a character, 100% of the vocabulary in use",
        "1 training tokens a parameter: a few epochs are safe",
    ]


# ------------------------------------------------------------------ a text of your own


def test_create_dataloader_v1_has_the_defaults_it_is_known_for():
    # starts at 0, 128, ..., 1152: ten windows, so two batches of 4 and a rest that is dropped
    loader = create_dataloader_v1(numbers(1450), tokenizer=NumberTokenizer())
    torch.manual_seed(0)
    batches = list(loader)
    assert [tuple(ids.shape) for ids, _ in batches] == [(4, 256), (4, 256)]
    starts = [start for ids, _ in batches for start in ids[:, 0].tolist()]
    assert len(set(starts)) == 8
    assert set(starts) <= set(range(0, 1153, 128))
    assert starts != sorted(starts)
    for ids, targets in batches:
        assert torch.equal(targets, ids + 1)


def test_create_dataloader_v1_takes_gpt2_where_no_tokenizer_is_given():
    text = "Every effort moves you. " * 3
    (ids, targets), *rest = create_dataloader_v1(
        text, batch_size=1, max_length=4, stride=4, shuffle=False
    )
    assert ids.tolist() == [[6109, 3626, 6100, 345]]
    assert targets.tolist() == [[3626, 6100, 345, 13]]
    assert rest


@pytest.mark.parametrize("num_workers", [0, 1])
def test_create_dataloader_v1_keeps_order_and_rest_where_asked(num_workers):
    loader = create_dataloader_v1(
        numbers(60),
        batch_size=4,
        max_length=8,
        stride=5,
        shuffle=False,
        drop_last=False,
        num_workers=num_workers,
        tokenizer=NumberTokenizer(),
    )
    found = [
        (row.tolist(), target_row.tolist())
        for ids, targets in loader
        for row, target_row in zip(ids, targets, strict=True)
    ]
    assert found == naive_windows(range(60), 8, 5)
    assert len(found) % 4  # there is a rest to keep


def test_create_dataloader_v1_shuffles_by_the_global_generator():
    loader = create_dataloader_v1(numbers(500), max_length=8, stride=8, tokenizer=NumberTokenizer())

    def order(seed):
        torch.manual_seed(seed)
        return [ids[:, 0].tolist() for ids, _ in loader]

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("n_tokens", [2, 3, 8])
@pytest.mark.parametrize("drop_last", [True, False])
def test_create_dataloader_v1_fits_itself_to_a_short_text_and_says_so(n_tokens, drop_last, capsys):
    loader = create_dataloader_v1(
        numbers(n_tokens), max_length=8, stride=8, drop_last=drop_last, tokenizer=NumberTokenizer()
    )
    batches = [(ids.tolist(), targets.tolist()) for ids, targets in loader]
    assert batches == [([list(range(n_tokens - 1))], [list(range(1, n_tokens))])]
    printed = capsys.readouterr().out
    assert f"Note: max_length is lowered from 8 to {n_tokens - 1}" in printed
    assert ("Note: batch_size is lowered from 4 to 1" in printed) == drop_last


def test_create_dataloader_v1_says_nothing_of_a_text_that_fits(capsys):
    loader = create_dataloader_v1(numbers(33), max_length=8, stride=8, tokenizer=NumberTokenizer())
    assert len(loader) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["", "7"])
def test_create_dataloader_v1_refuses_fewer_than_two_tokens(text):
    with pytest.raises(DataError, match="a window needs at least 2"):
        create_dataloader_v1(text, tokenizer=NumberTokenizer())


# ------------------------------------------------------------------ evaluation


def test_an_evaluation_shows_evenly_spaced_batches_in_order():
    train, _ = loaders(420, batch_size=2)  # 41 windows, so 21 batches
    assert len(train) == 21
    in_order = [[16 * i, 16 * i + 8] for i in range(20)] + [[320]]
    for max_batches, expected in [
        (None, in_order),
        (21, in_order),
        (100, in_order),
        (1, [in_order[0]]),
        (2, [in_order[0], in_order[20]]),
        (5, [in_order[i] for i in (0, 5, 10, 15, 20)]),
    ]:
        view = evaluation_loader(train, max_batches)
        for _ in range(2):
            assert [ids[:, 0].tolist() for ids, _ in view] == expected
        assert len(view) == len(expected)


def test_an_evaluation_of_all_batches_keeps_the_tail():
    _, val = loaders(400, max_length=8)
    targets = [t for _, batch in evaluation_loader(val) for t in batch.flatten().tolist()]
    assert targets == list(range(321, 400))


def test_an_evaluation_leaves_generator_and_training_order_alone():
    train, _ = loaders(400)
    expected = epoch_starts(train, 1)
    train.batch_sampler.start_at(1)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert len(list(evaluation_loader(train))) == len(train)
    assert torch.equal(torch.get_rng_state(), state)
    assert [ids[:, 0].tolist() for ids, _ in train] == expected


def test_an_evaluation_works_on_any_loader_of_pairs():
    pairs = TensorDataset(torch.arange(20).reshape(10, 2), torch.arange(20).reshape(10, 2) + 1)
    loader = DataLoader(pairs, batch_size=3, shuffle=True, drop_last=True)
    view = evaluation_loader(loader)
    for _ in range(2):
        assert [ids[:, 0].tolist() for ids, _ in view] == [
            [0, 2, 4],
            [6, 8, 10],
            [12, 14, 16],
            [18],
        ]
    assert [ids[:, 0].tolist() for ids, _ in evaluation_loader(loader, 2)] == [[0, 2, 4], [18]]


def test_an_evaluation_of_a_shuffled_dataloader_v1_is_in_order():
    loader = create_dataloader_v1(
        numbers(100), batch_size=5, max_length=8, stride=8, tokenizer=NumberTokenizer()
    )
    starts = [start for ids, _ in evaluation_loader(loader) for start in ids[:, 0].tolist()]
    assert starts == list(range(0, 89, 8))


# ------------------------------------------------------------------ characters and bytes a token

CHINESE = (REPOSITORY / "corpus" / "sample-zh.txt").read_text(encoding="utf-8")[:3000]
ENGLISH = (REPOSITORY / "corpus" / "sample-en.txt").read_text(encoding="utf-8")[:3000]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, "ab\n春" * 50], ids=["en", "zh", "both"])
@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_a_token_stands_for_its_share_of_characters_and_bytes(text, kind):
    tokenizer = GPT2Tokenizer() if kind == "gpt2" else CharTokenizer(text)
    tokens = to_array(tokenizer.encode(text), tokenizer.vocab_size)
    size = measure_tokens(tokens, tokenizer)
    assert size == TokenSize(len(text) / len(tokens), len(text.encode("utf-8")) / len(tokens))
    if kind == "char":
        assert size.characters == 1
    elif text is CHINESE:
        assert size.characters < 0.6  # two tokens a character, as a rule
    else:
        assert size.characters >= 1


@pytest.mark.parametrize("kind", ["gpt2", "char"])
def test_the_end_of_a_text_is_a_token_without_characters(kind):
    poems = ["春江潮水连海平", "海上明月共潮生"] * 20
    tokenizer = GPT2Tokenizer() if kind == "gpt2" else CharTokenizer("".join(poems))
    ids = []
    for poem in poems:
        ids += [*tokenizer.encode(poem), tokenizer.end_of_text_id]
    size = measure_tokens(to_array(ids, tokenizer.vocab_size), tokenizer)
    assert size == TokenSize(40 * 7 / len(ids), 40 * 21 / len(ids))
    nothing = to_array([tokenizer.end_of_text_id] * 3, tokenizer.vocab_size)
    assert measure_tokens(nothing, tokenizer).characters > 0  # what is divided by it stays finite


def test_a_slice_of_a_token_file_is_measured_without_what_is_around_it(tmp_path):
    tokenizer = CharTokenizer("ab春")
    ids = tokenizer.encode("春" * 50 + "ab" * 30 + "春" * 20)
    to_array(ids, tokenizer.vocab_size).tofile(tmp_path / "tokens.bin")
    tokens = TokenSlice(tmp_path / "tokens.bin", "uint16", 50, 110)
    assert measure_tokens(tokens, tokenizer) == TokenSize(1, 1)
