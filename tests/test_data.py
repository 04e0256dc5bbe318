"""Windows, batches and plans against slices of the tokens made naively."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from data import (
    TokenSlice,
    WindowBatches,
    WindowDataset,
    create_dataloader_v1,
    evaluation_loader,
    make_loaders,
    measure_tokens,
    plan_windows,
    to_array,
)
from distributed.parallel import Parallel
from engine.errors import DataError
from engine.metrics import TokenSize
from planning.preflight import describe_text
from tests.texts import CHINESE, ENGLISH
from text.tokenizer import CharTokenizer, GPT2Tokenizer

CPU = torch.device("cpu")


class NumberTokenizer:
    """ "7 8 9" is [7, 8, 9]: every token of a text can be told from every other."""

    name = fingerprint = "numbers"
    vocab_size = 100_000
    begin_ids = ()

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def numbers(count: int) -> str:
    return " ".join(str(i) for i in range(count))


def naive_windows(tokens, max_length: int, stride: int) -> list[tuple[list[int], list[int]]]:
    tokens = list(tokens)
    return [
        (tokens[start : start + max_length], tokens[start + 1 : start + 1 + max_length])
        for start in range(0, len(tokens), stride)
        if start + 1 + max_length <= len(tokens)
    ]


def plan(n_tokens: int, **changes):
    given = {"max_length": 8, "stride": 8, "batch_size": 4, "train_ratio": 0.8}
    return plan_windows(n_tokens, **given | changes)


def loaders(text, *, device=CPU, changes: dict | None = None, **options):
    """Loaders over a text, or over so many tokens 0, 1, 2, ...: a window starts at its first."""
    tokens = np.arange(text, dtype=np.uint16) if isinstance(text, int) else text
    windows, _ = plan(len(tokens), **changes or {})
    given = {"seed": 5, "num_workers": 0, "device": device}
    return make_loaders(tokens, windows, **given | options)


def pairs_of(batches) -> list[tuple[list[int], list[int]]]:
    """Each window with its targets."""
    return [
        (row.tolist(), target_row.tolist())
        for ids, targets in batches
        for row, target_row in zip(ids, targets, strict=True)
    ]


def starts_of(loader: DataLoader) -> list[list[int]]:
    """Where the windows of each batch start."""
    return [ids[:, 0].tolist() for ids, _ in loader]


def epoch_starts(loader: DataLoader, epoch: int, step: int = 0) -> list[list[int]]:
    loader.batch_sampler.start_at(epoch, step)
    return starts_of(loader)


def targets_of(loader: DataLoader) -> list[int]:
    return [token for _, targets in loader for token in targets.flatten().tolist()]


def flat(batches: list[list[int]]) -> list[int]:
    return [start for batch in batches for start in batch]


@settings(derandomize=True, deadline=None, max_examples=80, database=None)
@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 25))
def test_windows_equal_slices_and_with_the_tail_every_target_is_scored_once(
    n_tokens, max_length, stride
):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    dataset = WindowDataset(tokens, max_length, stride)
    expected = naive_windows(tokens, max_length, stride)
    assert [(ids.tolist(), targets.tolist()) for ids, targets in dataset] == expected
    assert len(dataset) == len(expected)
    for outside in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[outside]
    if expected:
        ids, targets = dataset.__getitems__(list(range(len(dataset))))
        assert pairs_of([(ids, targets)]) == expected
        assert ids.dtype == targets.dtype == torch.int64
    if n_tokens >= 2:
        windows = list(WindowDataset(tokens, max_length, max_length, keep_tail=True))
        assert [token for _, targets in windows for token in targets] == list(range(1, n_tokens))
        assert [token for ids, _ in windows for token in ids] == list(range(n_tokens - 1))
        assert {len(ids) for ids, _ in windows[:-1]} <= {max_length}


def test_tokens_take_two_bytes_where_the_vocabulary_allows():
    for vocab_size in (1, 50_257, 2**16, 2**16 + 1, 2**32):
        array = to_array([0, vocab_size - 1], vocab_size)
        assert array.dtype == ("uint16" if vocab_size <= 2**16 else "uint32")
        assert WindowDataset(array, 1, 1)[0][1].tolist() == [vocab_size - 1]


def test_an_epoch_shows_every_training_window_once_with_its_targets():
    for stride in (3, 8, 11):
        train, val = loaders(203, changes={"stride": stride})
        expected, found = naive_windows(range(162), 8, stride), pairs_of(train)
        assert sorted(found) == expected != found  # shuffled
        for _ in range(2):  # validation in order and alike each time
            assert targets_of(val) == list(range(163, 203))


def test_batches_are_a_function_of_seed_and_epoch_alone():
    first, other_seed = loaders(400)[0], loaders(400, seed=6)[0]
    in_turn = [epoch_starts(first, epoch) for epoch in range(3)]
    assert len({str(epoch) for epoch in in_turn}) == 3
    assert epoch_starts(other_seed, 0) != in_turn[0]
    assert sorted(flat(epoch_starts(other_seed, 0))) == sorted(flat(in_turn[0]))
    second, _ = loaders(400)
    assert [starts_of(second) for _ in range(3)] == in_turn  # iterating again goes on
    second.batch_sampler.start_at(0)
    next(iter(second))  # an epoch left early does not change the next
    assert starts_of(second) == in_turn[1]


def test_worker_processes_and_the_global_generator_change_nothing():
    state = torch.manual_seed(99).get_state()
    for sampling in ("windows", "random"):
        options = {"sampling": sampling, "accumulation": 3, "micro_batch": 3}
        alone, alone_val = loaders(500, **options)
        expected = epoch_starts(alone, 1, 2)
        assert torch.equal(torch.get_rng_state(), state)
    helped, helped_val = loaders(500, num_workers=2, **options)
    torch.manual_seed(98)
    assert epoch_starts(helped, 1, 2) == expected
    assert pairs_of(helped_val) == pairs_of(alone_val)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(98).get_state())


@pytest.mark.parametrize("train_ratio", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("stride", "batch_size"), [(8, 4), (3, 1), (12, 50)])
def test_a_text_of_any_length_is_cut_into_both_kinds_of_batches(train_ratio, stride, batch_size):
    for n_tokens in range(4, 25):
        asked = {"stride": stride, "batch_size": batch_size, "train_ratio": train_ratio}
        windows, notices = plan(n_tokens, **asked)
        train, val = loaders(n_tokens, changes=asked)

        batches = starts_of(train)
        assert len(batches) == len(train) >= 1
        assert len(batches[0]) == windows.batch_size == max(map(len, batches)) <= batch_size
        expected = [windows.stride * i for i in range(windows.n_windows)]
        assert sorted(flat(batches)) == expected
        assert windows.n_train - 1 - max(targets_of(train)) == windows.n_unused >= 0
        scored = targets_of(val)
        assert scored == list(range(windows.n_train + 1, n_tokens))
        assert len(scored) == windows.n_val - 1 >= 1

        for words, is_said in {
            "the split is moved": windows.n_train != int(n_tokens * train_ratio),
            "max_length is lowered from 8": windows.max_length != 8,
            "batch_size is lowered": windows.batch_size != batch_size,
            "stride is lowered": windows.stride != stride,
            "stride (12) is above": windows.stride > windows.max_length,
        }.items():
            assert (words in "\n".join(notices)) == is_said
        assert windows.stride == min(stride, windows.max_length) or windows.max_length == 8


def test_a_text_is_cut_as_asked_or_with_a_notice():
    long = {"max_length": 1024, "stride": None, "batch_size": 1}
    for n_tokens, asked, expected, notice in [
        (1000, {"stride": 5, "train_ratio": 0.75}, (750, 8, 5, 4, 149), None),
        (5145, {"max_length": 128, "stride": None}, (4116, 128, 128, 4, 32), None),
        (100, {"batch_size": 64}, (80, 8, 8, 9, 9), "batch_size is lowered from 64 to 9"),
        (500, {"stride": 9}, (400, 8, 9, 4, 44), "stride (9) is above max_length (8)"),
        (8, {"stride": None, "batch_size": 1}, (6, 5, 5, 1, 1), "max_length is lowered from 8"),
        # moved so that a whole window fits, but not where documents set it
        (1100, long, (1025, 1024, 1024, 1, 1), "the split is moved from 880 to 1025"),
        (1100, long | {"n_train": 600}, (600, 599, 599, 1, 1), "lowered from 1024 to 599"),
        (100, {"n_train": 98}, (98, 8, 8, 4, 12), None),
    ]:
        windows, notices = plan(n_tokens, **asked)
        found = (windows.n_train, windows.max_length, windows.stride, windows.batch_size)
        assert (*found, windows.n_windows) == expected
        assert len(notices) == (notice is not None)
        assert notice is None or notice in notices[0]


def test_too_few_tokens_are_an_error_that_names_the_minimum():
    for n_tokens in range(4):
        with pytest.raises(DataError, match="at least 4 are needed") as caught:
            plan(n_tokens)
        assert f"the text has {n_tokens} token" in str(caught.value)
        assert caught.value.exit_code == 3
    for n_train in (0, 1, 99, 100):
        with pytest.raises(DataError, match=f"has {n_train} tokens and the validation text"):
            plan(100, n_train=n_train)


def test_random_crops_are_a_function_of_seed_epoch_and_step_and_start_anywhere():
    train, _ = loaders(400, sampling="random")
    expected = epoch_starts(train, 1)
    assert len({str(batch) for batch in expected}) == len(expected) == len(loaders(400)[0])
    assert epoch_starts(train, 2) != expected
    assert epoch_starts(loaders(400, sampling="random", seed=6)[0], 1) != expected
    assert starts_of(train) != epoch_starts(train, 1) == expected
    short = WindowBatches(train.dataset, 4, seed=5, n_steps=2)
    short.start_at(1)
    assert list(short) == expected[:2]  # whatever the others hold
    # windows of training tokens from the first to the last place
    train, val = loaders(40, sampling="random", changes={"train_ratio": 0.5, "stride": 3})
    found = [pair for _ in range(60) for pair in pairs_of(train)]
    assert len(found) == 60 * 4
    assert sorted({str(pair) for pair in found}) == sorted(map(str, naive_windows(range(20), 8, 1)))
    assert targets_of(val) == list(range(21, 40))


def shifting(n_tokens: int, stride: int = 8, batch_size: int = 4, **options) -> DataLoader:
    """Training windows of 8 tokens that begin elsewhere each epoch."""
    changes = {"stride": stride, "batch_size": batch_size, "shift_windows": True}
    return loaders(n_tokens, changes=changes | {"train_ratio": 0.5}, **options)[0]


@pytest.mark.parametrize("stride", [1, 3, 8, 11, 12])
def test_shifted_windows_begin_at_every_offset_once_before_one_comes_again(stride):
    for n_train in (9, 10, 8 + stride, 8 + 3 * stride, 9 + 3 * stride, 7 + 9 * stride):
        loader, places = shifting(2 * n_train, stride, 2), n_train - 8
        windows, _ = plan(2 * n_train, stride=stride, train_ratio=0.5, shift_windows=True)
        # as many as fit at the largest offset, or one that may be anywhere
        n_windows = max(1, places // stride)
        assert windows.n_windows == n_windows
        offsets = []
        for epoch in range(2 * min(stride, places)):
            starts = sorted(flat(epoch_starts(loader, epoch)))
            assert starts == [starts[0] + stride * i for i in range(n_windows)]
            offsets.append(starts[0])
        once = offsets[: len(offsets) // 2]
        assert once[0] == 0 and sorted(once) == list(range(min(stride, places)))
        assert once * 2 == offsets


def test_the_offsets_of_a_few_epochs_lie_far_apart():
    sampler = shifting(4000, stride=256).batch_sampler
    for n_epochs in (2, 4, 8, 16):
        offsets = sorted(map(sampler.offset, range(n_epochs)))
        gaps = [after - before for before, after in zip(offsets, [*offsets[1:], 256], strict=True)]
        assert min(gaps) > 0.4 * 256 / n_epochs


def test_shifted_windows_have_their_targets_and_the_order_of_unshifted_ones():
    shifted, plain = shifting(400), loaders(400, changes={"train_ratio": 0.5})[0]
    assert len(naive_windows(range(200), 8, 8)) == len(plain.dataset) == 24 == 192 / 8
    for epoch in (0, 1, 5):
        offset = shifted.batch_sampler.offset(epoch)
        expected = [[start + offset for start in batch] for batch in epoch_starts(plain, epoch)]
        assert epoch_starts(shifted, epoch) == expected
        assert (offset > 0) == (epoch > 0)
        shifted.batch_sampler.start_at(epoch)
        assert sorted(pairs_of(shifted)) == naive_windows(range(offset, 200), 8, 8)[:24]
    # the loss on the training text is over the same windows as ever
    first, second = (pairs_of(evaluation_loader(loader)) for loader in (shifted, plain))
    assert first == second and len(first) > 2 * 24 - 2


def test_shifted_steps_are_the_same_in_any_parts_by_workers_and_from_a_device():
    whole = shifting(900, batch_size=5, accumulation=2, micro_batch=10)
    steps = [epoch_starts(whole, epoch) for epoch in range(3)]
    parts = shifting(900, batch_size=5, accumulation=2, micro_batch=4)
    halves = [
        shifting(900, batch_size=5, accumulation=2, micro_batch=10, parallel=Parallel(rank, 2))
        for rank in range(2)
    ]
    for epoch, first in ((0, 0), (1, 2), (2, 5)):
        expected = flat(steps[epoch][first:])
        assert flat(epoch_starts(parts, epoch, first)) == expected
        of_ranks = [epoch_starts(half, epoch, first) for half in halves]
        assert flat(map(flat, zip(*of_ranks, strict=True))) == expected
    parts.dataset.move_to(CPU)
    parts.batch_sampler.start_at(1, 2, 8)  # through two epochs' ends
    expected = (steps[1] + steps[2])[2:10]
    assert flat(starts_of(parts)) == flat(expected)
    helped = shifting(900, batch_size=5, accumulation=2, micro_batch=10, num_workers=1)
    helped.batch_sampler.start_at(1, 2, 8)
    assert starts_of(helped) == expected


@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@given(
    n_windows=st.integers(1, 40),
    step_size=st.integers(1, 30),
    micro_batch=st.integers(1, 12),
    tail=st.booleans(),
    n_steps=st.none() | st.integers(1, 9),
    epoch=st.integers(0, 2),
)
def test_a_step_has_the_same_windows_in_parts_of_any_size_from_any_step_on(
    n_windows, step_size, micro_batch, tail, n_steps, epoch
):
    tokens = np.arange(2 * n_windows + 1 + tail, dtype=np.uint16)
    dataset = WindowDataset(tokens, 2, 2, keep_tail=True)
    assert (dataset.n_whole, dataset.has_tail) == (n_windows, tail)
    at_the_end = [[n_windows]] * tail  # a tail comes alone
    whole = WindowBatches(dataset, 4, 3, n_steps, step_size, step_size)
    whole.start_at(epoch)
    steps, next_steps = list(whole), list(whole)
    assert len(steps) == len(whole) == whole.n_steps + tail
    steps, next_steps = steps[: whole.n_steps], next_steps[: whole.n_steps]
    assert len(steps) == (n_steps or -(-n_windows // step_size))
    assert all(len(step) == step_size for step in steps[:-1])
    if n_steps is None:
        assert sorted(flat(steps)) == list(range(n_windows))
    else:
        assert len(steps[-1]) == step_size and set(flat(steps)) <= set(range(n_windows))

    def in_parts(steps: list[list[int]]) -> list[list[int]]:
        starts = range(0, step_size, micro_batch)
        return [part for step in steps for i in starts if (part := step[i : i + micro_batch])]

    parts = WindowBatches(dataset, 4, 3, n_steps, step_size, micro_batch)
    assert len(parts) == len(in_parts(steps) + at_the_end)
    assert parts.per_step == -(-step_size // micro_batch)
    for first in range(len(steps) + 1):
        parts.start_at(epoch, first)
        assert list(parts) == in_parts(steps[first:]) + at_the_end
    assert list(parts) == in_parts(next_steps) + at_the_end  # from its first step on


def test_loaders_give_steps_and_validation_in_parts():
    # 99 targets: twelve windows of 8, six at a time in parts of five, a tail of 3
    train, val = loaders(500, changes={"batch_size": 6}, accumulation=5, micro_batch=5)
    assert [tuple(targets.shape) for _, targets in val] == [(5, 8), (1, 8), (5, 8), (1, 8), (1, 3)]
    assert len(val) == 5
    assert train.batch_sampler.per_step == 6
    assert len(train) == len(list(train))
    twelve, _ = loaders(900, changes={"batch_size": 12})
    gathered, _ = loaders(900, accumulation=3, micro_batch=12)
    assert epoch_starts(gathered, 1) == epoch_starts(twelve, 1)


def test_a_slice_of_a_token_file_gives_what_an_array_does_and_is_pickled_as_its_place(tmp_path):
    tokens = np.arange(5000, dtype=np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    token_slice = TokenSlice(tmp_path / "tokens.bin", "uint16", 100, 4100)
    of_slice, of_array = loaders(token_slice), loaders(tokens[100:4100])
    for one, other in zip(of_slice, of_array, strict=True):
        assert pairs_of(one) == pairs_of(other)
    # as where a worker shares no memory
    train, _ = of_slice
    packed = pickle.dumps((train.dataset, train.collate_fn, train.worker_init_fn))
    assert len(packed) < 2000
    assert torch.equal(pickle.loads(packed)[0][3][0], train.dataset[3][0])


def test_tokens_kept_on_a_device_give_the_same_batches():
    dataset = WindowDataset(np.arange(100, dtype=np.uint16), 8, 8, keep_tail=True)
    assert dataset.has_tail
    batches = [[0, 5, 7], [dataset.n_whole - 1], [dataset.n_whole]]
    before = [dataset.__getitems__(batch) for batch in batches]
    dataset.move_to(CPU)
    for pair, batch in zip(before, batches, strict=True):
        for tensor, same in zip(pair, dataset.__getitems__(batch), strict=True):
            assert torch.equal(tensor, same)
            assert tensor.dtype == same.dtype == torch.int64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_small_texts_stay_on_the_device():
    both = loaders(4000, device=torch.device("cuda"))
    assert {ids.device.type for loader in both for ids, _ in loader} == {"cuda"}


def test_the_report_says_whether_the_text_will_do():
    counts = ("empty_documents", "duplicate_documents", "documents_on_both_sides")
    report = dict.fromkeys(counts, 0) | {"passed_over": [], "files": [{}]}
    report |= {"documents": 1, "bytes": 12, "characters": 12, "tokens_per_character": 1.0}
    report |= {"vocabulary": 270, "vocabulary_used": 270}
    windows, _ = plan(1000)
    for n_parameters, word in [(10**6, "by heart"), (100, "few epochs"), (10, "enough to learn")]:
        first, second, third = describe_text(report, windows, n_parameters)
        assert first == "1 document in 1 file: 12 bytes, 12 characters"
        assert second == "1,000 tokens, 1.00 a character, 100% of the vocabulary in use"
        assert third.startswith(f"{800 / n_parameters:.3g} training tokens a parameter: ")
        assert word in third
    third = describe_text(report, windows, 10**6, by_heart=True)[2]
    assert "as it is to" in third and "watch" not in third
    report |= {"files": [{}, {}], "documents": 3, "bytes": 1234, "characters": 1200}
    report |= {"passed_over": [{}], "duplicate_documents": 2, "documents_on_both_sides": 1}
    report |= {"tokens_per_character": 0.25, "vocabulary": 200, "vocabulary_used": 50}
    first, second, third, fourth, _ = describe_text(report, windows, n_parameters)
    assert first == "3 documents in 2 files: 1,234 bytes, 1,200 characters"
    assert second.startswith(
        "1 passed over, 2 duplicates, 1 in both training and validation text ("
    )
    assert third.startswith("Note: 67% of the documents repeat others")
    assert fourth == "1,000 tokens, 0.25 a character, 25% of the vocabulary in use"


def test_create_dataloader_v1_has_the_defaults_it_is_known_for():
    # starts at 0, 128, ..., 1152: ten windows, so two batches of 4 and a rest that is dropped
    loader = create_dataloader_v1(numbers(1450), tokenizer=NumberTokenizer())

    def order(seed):
        torch.manual_seed(seed)
        return starts_of(loader)

    assert order(1) == order(1) != order(2)  # shuffled by the global generator
    assert list(map(len, order(1))) == [4, 4]
    assert len(set(flat(order(1)))) == 8
    for pair in pairs_of(loader):
        assert pair in naive_windows(range(1450), 256, 128)
    in_order = [*range(0, 1153, 128), 0, 1280]
    assert flat(starts_of(evaluation_loader(loader))) == in_order
    loader = create_dataloader_v1("Every effort moves you.", batch_size=1, max_length=4)  # GPT-2's
    assert pairs_of(loader) == [([6109, 3626, 6100, 345], [3626, 6100, 345, 13])]


def test_create_dataloader_v1_keeps_order_and_rest_where_asked(capsys):
    options = {"batch_size": 4, "max_length": 8, "stride": 5, "num_workers": 1}
    options |= {"shuffle": False, "drop_last": False, "tokenizer": NumberTokenizer()}
    loader = create_dataloader_v1(numbers(60), **options)
    assert loader.num_workers == 1
    loader.num_workers = 0
    assert pairs_of(loader) == naive_windows(range(60), 8, 5)
    assert len(loader.dataset) % 4  # there is a rest to keep
    assert capsys.readouterr().out == ""


def test_create_dataloader_v1_fits_itself_to_a_short_text_and_says_so(capsys):
    options = {"max_length": 8, "stride": 8, "tokenizer": NumberTokenizer()}
    for n_tokens in (2, 3, 8):
        for drop_last in (True, False):
            loader = create_dataloader_v1(numbers(n_tokens), drop_last=drop_last, **options)
            assert pairs_of(loader) == [(list(range(n_tokens - 1)), list(range(1, n_tokens)))]
            printed = capsys.readouterr().out
            assert f"Note: max_length is lowered from 8 to {n_tokens - 1}" in printed
            assert ("Note: batch_size is lowered from 4 to 1" in printed) == drop_last
    for text in ("", "7"):
        with pytest.raises(DataError, match="a window needs at least 2"):
            create_dataloader_v1(text, **options)


def test_an_evaluation_shows_all_windows_or_evenly_spread_ones_in_order():
    train, _ = loaders(420, changes={"batch_size": 2})  # 41 windows, so 21 batches
    training = epoch_starts(train, 1)
    train.batch_sampler.start_at(1)
    in_order = [[8 * i, 8 * i + 4] for i in range(41)] + [[0], [328]]  # they overlap by half
    state = torch.manual_seed(3).get_state()
    for max_batches, expected in [
        (None, in_order),
        (41, in_order),
        (100, in_order),
        # the middles of as many parts of the 82 windows
        (1, [[4 * 20, 4 * 61]]),
        (2, [[4 * 10, 4 * 30], [4 * 51, 4 * 71]]),
        (40, [[4 * (82 * (4 * i + 1) // 160), 4 * (82 * (4 * i + 3) // 160)] for i in range(40)]),
    ]:
        view = evaluation_loader(train, max_batches)
        assert starts_of(view) == starts_of(view) == expected
        assert len(view) == len(expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert starts_of(train) == training  # its order is left alone
    # every token is scored once, whatever the stride of training
    train, val = loaders(400, changes={"stride": 1})
    assert sorted(targets_of(evaluation_loader(train))) == list(range(1, 320))
    assert sorted(targets_of(evaluation_loader(val))) == list(range(321, 400))
    # the shorter windows of both ends are in no part
    assert starts_of(evaluation_loader(val, 2)) == [[324, 332, 340, 348], [360, 368, 376, 384]]


def test_an_evaluation_works_on_any_loader_of_pairs():
    pairs = TensorDataset(torch.arange(20).reshape(10, 2), torch.arange(20).reshape(10, 2) + 1)
    loader = DataLoader(pairs, batch_size=3, shuffle=True, drop_last=True)
    view = evaluation_loader(loader)
    assert starts_of(view) == starts_of(view) == [[0, 2, 4], [6, 8, 10], [12, 14, 16], [18]]
    assert starts_of(evaluation_loader(loader, 2)) == [[0, 4, 8], [10, 14, 18]]
    split = DataLoader(pairs, batch_size=2, sampler=SubsetRandomSampler([7, 1, 4]))
    assert starts_of(evaluation_loader(split)) == [[14, 2], [8]]


def test_a_token_stands_for_its_share_of_characters_and_bytes(tmp_path):
    gpt2 = GPT2Tokenizer()
    for text in (ENGLISH[:3000], CHINESE[:3000], "ab\n春" * 50):
        for tokenizer in (gpt2, CharTokenizer(text)):
            ids, end = tokenizer.encode(text), tokenizer.end_of_text_id
            n_bytes = len(text.encode("utf-8"))
            expected = TokenSize(len(text) / len(ids), n_bytes / len(ids))
            assert measure_tokens(to_array(ids, tokenizer.vocab_size), tokenizer) == expected
            # a slice of a token file, without what is around it
            around = to_array([*ids[:50], *ids, *ids[:9]], tokenizer.vocab_size)
            around.tofile(tmp_path / "tokens.bin")
            tokens = TokenSlice(tmp_path / "tokens.bin", "uint16", 50, 50 + len(ids))
            assert measure_tokens(tokens, tokenizer) == expected
            # the end of a text is a token without characters
            tokens = to_array([*ids, end, *ids, end], tokenizer.vocab_size)
            expected = TokenSize(2 * len(text) / len(tokens), 2 * n_bytes / len(tokens))
            assert measure_tokens(tokens, tokenizer) == expected
            # what is divided by it stays finite
            nothing = to_array([end] * 3, tokenizer.vocab_size)
            assert measure_tokens(nothing, tokenizer).characters > 0
