"""Packed conversations against each one by itself, and their windows against naive slices."""

import functools
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from data import (
    IGNORED,
    Conversations,
    Packed,
    PackedWindows,
    count_targets,
    in_parts,
    make_loaders,
    plan_packed,
)
from distributed.parallel import ALONE, Parallel
from engine.loss import next_token_loss
from engine.optim import build_adamw
from generation import evaluating
from model import GPTConfig, GPTModel
from tests.letters import CPU, FP32, Letters, assert_the_same, everything
from text import packing as packing_file
from text.packing import Packing, Pieces, cut_pieces, pack
from training.learner import Learner, mean_loss, steps_between, take_step

WINDOW = 32
KINDS = {
    "learned positions": {},
    "sines": {"positions": "sinusoidal"},
    "rotary positions": {"architecture": "llama", "n_kv_heads": 1, "qk_norm": True},
}


def conversations(count: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random letters, which of them count, and where each of the conversations begins."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(4, 20, count)
    boundaries = np.append(0, np.cumsum(sizes))[:-1]
    is_target = draw.random(sizes.sum()) < 0.5
    is_target[boundaries], is_target[boundaries + 2] = False, True
    return draw.integers(0, 8, sizes.sum()).astype(np.uint16), is_target, boundaries


def packed_windows(count: int = 12, seed: int = 0, most: int = WINDOW) -> PackedWindows:
    tokens, is_target, boundaries = conversations(count, seed)
    pieces = cut_pieces(boundaries, is_target, most)
    return PackedWindows(tokens, is_target, pieces, pack(pieces.lengths, most, seed))


def each_alone(windows: PackedWindows) -> list[Packed]:
    """Each piece of some windows as a window of its own, sliced from the tokens."""
    found = []
    tokens, counts = torch.from_numpy(windows.tokens.astype(np.int64)), windows.is_target
    for start, length in zip(windows.pieces.starts, windows.pieces.lengths, strict=True):
        stop = start + length
        targets = tokens[start + 1 : stop + 1].clone()
        targets[~torch.from_numpy(counts[start + 1 : stop + 1])] = IGNORED
        found.append(Packed.of(tokens[None, start:stop], targets[None], None))
    return found


@functools.cache
def new_model(kind: str = "rotary positions") -> GPTModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 8, "context_length": WINDOW, "emb_dim": 16, "n_heads": 2, "n_layers": 2}
    model = GPTModel(GPTConfig(**shape, **KINDS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model: GPTModel, batches: list[Packed]) -> tuple[float, list[torch.Tensor]]:
    """The loss of some batches together, and its gradients."""
    n_targets = sum(map(count_targets, batches))
    model.zero_grad()
    losses = [
        model(b.ids, b.targets, n_targets, starts=b.starts, counted=b.counted) for b in batches
    ]
    sum(losses).backward()
    return sum(losses).item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
def test_a_piece_ends_with_its_last_answer_that_fits_and_a_text_is_cut_into_windows(
    block, monkeypatch
):
    monkeypatch.setattr(packing_file, "BLOCK", block)
    rows = [
        ("..xx.", 3),  # what follows the last answer trains nothing
        ("..xx..xx..xx", 7),  # too long: up to the end of the second answer
        ("......xxxxxx", None),  # its only answer does not fit
        (".....", None),  # nobody answers
        (".xxxxxxxx", 8),  # as long as may be
        ("xxx", 2),
        ("xx..xx..xx", 5),  # begins with an answer, and is no text for that
    ]
    is_target = np.array([sign == "x" for row, _ in rows for sign in row])
    sizes = [len(row) for row, _ in rows]
    boundaries = np.append(0, np.cumsum(sizes))[:-1]
    pieces = cut_pieces(boundaries, is_target, 8)
    expected = [(b, n) for b, (_, n) in zip(boundaries, rows, strict=True) if n is not None]
    assert list(zip(pieces.starts, pieces.lengths, strict=True)) == expected
    assert (pieces.n_cut, pieces.n_left_out) == (2, 1)
    # a text: each token but the first is the target of one piece
    text = cut_pieces(np.array([0, 20]), np.ones(23, bool), 8, is_text=np.ones(2, bool))
    scored = [
        list(range(start + 1, start + 1 + length))
        for start, length in zip(text.starts, text.lengths, strict=True)
    ]
    assert [token for piece in scored for token in piece] == [*range(1, 20), 21, 22]
    assert max(map(len, scored)) == 8
    assert (text.n_cut, text.n_left_out) == (0, 0)


def test_marks_that_need_not_fit_into_memory_are_searched_and_counted_in_blocks():
    n = 4 << 20
    is_target, boundaries = np.ones(n, np.uint8), np.arange(0, n // 2 + 1, 64)
    is_text = boundaries == boundaries[-1]
    tracemalloc.start()
    try:
        pieces = cut_pieces(boundaries, is_target, 512, is_text=is_text)
        assert tracemalloc.get_traced_memory()[1] < 3 * n
        packing = pack(pieces.lengths, 512, 0)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        windows = PackedWindows(is_target, is_target, pieces, packing)
        assert tracemalloc.get_traced_memory()[1] - before < 3 * n
    finally:
        tracemalloc.stop()
    assert windows.count_targets(range(len(windows))) == pieces.lengths.sum()


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(0, 3))
def test_every_piece_is_in_one_window_in_which_it_fits(lengths, seed):
    lengths = np.array(lengths)
    packing = pack(lengths, 30, seed)
    windows = [packing.window(number).tolist() for number in range(len(packing))]
    assert sorted(itertools.chain(*windows)) == list(range(len(lengths)))
    fills = [lengths[window].sum() for window in windows]
    assert max(fills) <= 30
    # no two windows would fit into one
    assert len(fills) == 1 or sum(sorted(fills)[:2]) > 30
    again = pack(lengths, 30, seed)
    assert np.array_equal(again.order, packing.order)
    assert np.array_equal(again.ends, packing.ends)


def test_rows_of_20_to_300_tokens_fill_windows_of_512_almost_entirely():
    lengths = np.random.default_rng(0).integers(20, 301, 3000)
    packing = pack(lengths, 512, 0)
    assert lengths.sum() / (512 * len(packing)) > 0.99
    assert not np.array_equal(pack(lengths, 512, 1).order, packing.order)


def test_a_window_has_the_tokens_of_its_pieces_and_counts_the_targets_that_are_marked():
    windows = packed_windows()
    alone = each_alone(windows)
    batch = windows.__getitems__(range(len(windows)))
    for row in range(len(windows)):
        at = 0
        for piece in windows.packing.window(row):
            stop = at + windows.pieces.lengths[piece]
            assert batch.ids[row, at:stop].equal(alone[piece].ids[0])
            assert batch.targets[row, at:stop].equal(alone[piece].targets[0])
            assert (batch.starts[row, at:stop] == at).all()
            at = stop
        assert (batch.targets[row, at:] == IGNORED).all()
        assert windows.count_targets([row]) == (batch.targets[row] != IGNORED).sum()
    assert batch.targets.flatten()[batch.counted].tolist() == windows.scored_tokens().tolist()
    assert len(batch.counted) == sum(map(count_targets, alone))
    assert windows.max_length == max(
        windows.pieces.lengths[windows.packing.window(n)].sum() for n in range(len(windows))
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_conversations_have_the_loss_and_gradients_of_each_one_by_itself(
    kind, checkpointing, monkeypatch
):
    model, windows = new_model(kind), packed_windows()
    batch = windows.__getitems__(range(len(windows)))
    assert batch.starts is not None
    loss, expected = gradients(model, each_alone(windows))
    monkeypatch.setattr(model, "activation_checkpointing", checkpointing)
    for as_mask in (False, True):  # as eager CPUs and as GPUs and compiled models do it
        monkeypatch.setattr(model_file, "is_compiled", lambda _, as_mask=as_mask: as_mask)
        found, packed = gradients(model, [batch])
        assert found == pytest.approx(loss, abs=1e-6)
        for one, other in zip(packed, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_plain_attention_keeps_conversations_apart_too(monkeypatch):
    model, windows = new_model("learned positions"), packed_windows()
    for block in model.blocks:
        monkeypatch.setattr(block.attention, "kernel", "plain")
    loss, expected = gradients(model, each_alone(windows))
    found, packed = gradients(model, [windows.__getitems__(range(len(windows)))])
    assert found == pytest.approx(loss, abs=1e-6)
    for one, other in zip(packed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_windows_of_one_conversation_each_need_no_mask(monkeypatch):
    monkeypatch.setattr(model_file, "find_parts", None)
    tokens, is_target, boundaries = conversations(5)
    pieces = cut_pieces(boundaries, is_target, WINDOW)
    apart = Packing(np.arange(5), np.arange(1, 6))
    windows = PackedWindows(tokens, is_target, pieces, apart)
    batch = windows.__getitems__(range(5))
    assert batch.starts is None
    loss, expected = gradients(new_model(), each_alone(windows))
    found, padded = gradients(new_model(), [batch])
    assert found == pytest.approx(loss, abs=1e-6)
    for one, other in zip(padded, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compiled_blocks_keep_conversations_apart_and_are_compiled_once_for_all_packings():
    model, batches = GPTModel(new_model().config), []
    model.load_state_dict(new_model().state_dict())
    for seed in range(3):
        windows = packed_windows(seed=seed)
        batch = windows.__getitems__([0, 1])
        assert batch.starts is not None
        batches.append([t[:, :24] for t in batch[:3]])  # of one shape, but for what is counted
    expected, compiled = [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    for place in (None, backend):
        for block in model.blocks if place else ():
            block.forward = torch.compile(block.forward, dynamic=False, backend=place)
        for ids, targets, starts in batches:
            batch = Packed.of(ids, targets, starts)
            expected.append(gradients(model, [batch]))
    for (loss, exact), (found, mine) in zip(expected[:3], expected[3:], strict=True):
        assert found == pytest.approx(loss, abs=1e-6)
        for one, other in zip(mine, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert len(compiled) == 1  # the blocks share it


class ProductRows(TorchDispatchMode):
    """The rows of all matrix products with a matrix of so many columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.out and args[1].shape[1] == self.columns:
            self.rows += len(args[0])
        return function(*args, **(kwargs or {}))


def test_the_head_computes_only_the_targets_that_count():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 10, 6, generator=generator, requires_grad=True)
    weight = torch.randn(9, 6, generator=generator, requires_grad=True)
    targets = torch.randint(9, (2, 10), generator=generator)
    targets[torch.rand(2, 10, generator=generator) < 0.6] = IGNORED
    counted = (targets.flatten() != IGNORED).nonzero()[:, 0]
    expected = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(expected, (hidden, weight))
    with ProductRows(9) as seen:
        loss = next_token_loss(hidden, weight, targets, counted=counted)
    assert seen.rows == len(counted) < 10
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    for one, other in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    with torch.no_grad():
        loss = next_token_loss(hidden, weight, targets, counted=counted)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


def test_a_batch_without_any_target_has_no_loss_and_changes_nothing():
    model = GPTModel(new_model().config)
    optimizer = build_adamw(model, learning_rate=0.1, weight_decay=0.5)
    ids = torch.zeros(1, 4, dtype=torch.long)
    nothing = Packed.of(ids, torch.full((1, 4), IGNORED), None)
    loss = model(ids, nothing.targets, counted=nothing.counted)
    assert loss.item() == 0
    before = everything(model, optimizer)
    loss, norm = take_step(model, [nothing], optimizer, FP32, 1.0)
    assert (loss.item(), norm.item()) == (0, 0)
    assert_the_same(everything(model, optimizer), before)
    # beside a batch with targets it changes nothing either
    batch = packed_windows(3).__getitems__([0])
    twin = GPTModel(new_model().config)
    twin.load_state_dict(model.state_dict())
    take_step(twin, [batch], build_adamw(twin, learning_rate=0.1, weight_decay=0.5), FP32, 1.0)
    take_step(model, [nothing, batch], optimizer, FP32, 1.0)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def packed_loaders(parallel: Parallel = ALONE, **options):
    both = Conversations(packed_windows(60), packed_windows(15, seed=1))
    plan, notices = plan_packed(both, 900, 700, max_length=WINDOW, batch_size=3)
    assert (plan.n_windows, notices) == (len(both.train), [])
    given = {"seed": 3, "num_workers": 0, "device": CPU, "accumulation": 2, "parallel": parallel}
    return make_loaders(both, plan, **given | options)


def test_a_step_takes_the_same_windows_and_counts_the_same_targets_on_any_ranks():
    n_windows = len(packed_windows(60))
    expected = list(steps_between(packed_loaders()[0], 0, 9))
    for step in expected:
        assert step.n_targets == sum(map(count_targets, step.batches))
    per_epoch = -(-n_windows // 6)
    epoch = [batch.ids for step in expected[:per_epoch] for batch in step.batches]
    every = packed_windows(60).__getitems__(range(n_windows)).ids
    assert sorted(torch.cat(epoch).tolist()) == sorted(every.tolist())
    cases = itertools.product((1, 2, 3), (1, 2, 3), (0, per_epoch + 1))
    for world, micro_batch, first in cases:
        ranks = [
            steps_between(packed_loaders(p, micro_batch=micro_batch)[0], first, 9)
            for p in ([ALONE] if world == 1 else [Parallel(r, world) for r in range(world)])
        ]
        for steps, whole in zip(zip(*ranks, strict=True), expected[first:], strict=True):
            assert {step.n_targets for step in steps} == {whole.n_targets}
            found = [batch[0] for step in steps for batch in step.batches]
            assert torch.cat(found).equal(torch.cat([batch.ids for batch in whole.batches]))


def test_micro_batches_of_any_size_make_the_same_step():
    [step] = steps_between(packed_loaders()[0], 0, 1)
    parts = in_parts(step.batches, 1)
    assert len(parts) == 6
    assert any(part.starts is None for part in [*parts, *each_alone(packed_windows(2))])
    model = new_model()
    loss, expected = gradients(model, step.batches)
    found, in_small = gradients(model, parts)
    assert found == pytest.approx(loss, abs=1e-6)
    for one, other in zip(in_small, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_evaluation_is_the_mean_over_all_targets_that_count_and_its_size_is_theirs():
    model, (_, val) = new_model(), packed_loaders()
    alone = each_alone(val.dataset)
    with evaluating(model):
        losses = [model(b.ids, b.targets, 1, counted=b.counted).item() for b in alone]
    expected = sum(losses) / sum(map(count_targets, alone))
    assert mean_loss(model, val, CPU, FP32) == pytest.approx(expected, abs=1e-6)
    learner = Learner(model, build_adamw(model, 0.1, 0.1), FP32)
    score = learner.score(val, Letters())
    assert score.loss == pytest.approx(expected, abs=1e-6)
    assert (score.size.bytes, score.n_batches) == (1.0, score.of_batches)


def test_pieces_without_any_target_of_the_tokens_make_no_window():
    none = np.zeros(0, np.int64)
    windows = PackedWindows(none, none.astype(bool), Pieces(none, none), pack(none, 8, 0))
    assert (len(windows), len(windows.scored_tokens())) == (0, 0)
