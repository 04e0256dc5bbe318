"""Decoding steps recorded as CUDA graphs, kept for the next request; one host read a token."""

import contextlib
import copy
import gc
import io
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.compiling
import generation
from engine.compiling import (
    MOST_KEPT,
    RecordedStep,
    compile_decoding,
    free_steps,
    keep_step,
    take_step,
    weight_addresses,
)
from engine.errors import NumericsError
from engine.weights import convert_weights
from generation import NUCLEUS, choose_next, generate, stream
from model import GPTConfig, GPTModel, KVCache
from tests.pretend.child import on_pretended
from tests.pretend.device import Kernels, watching
from tests.pretend.machines import cuda_machine

CPU, DEVICE = torch.device("cpu"), torch.device("cuda:0")
V, CONTEXT, N_NEW = 31, 6, 7
# one text; several; of unequal lengths; of which one is longer than the context
PROMPTS = ([[1, 2, 3]], [[1, 2, 3], [4, 5, 6]], [[7], [8, 9, 10, 11], list(range(11))])
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.5, "repetition_window": 4},
    {"temperature": 0.9, "repetition_penalty": 2.0},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    {"min_p": 0.05},
    {"top_k": 1},
)


def tiny_model(device: torch.device = CPU, seed: int = 0, **changes: Any) -> GPTModel:
    """A model with weights so large that its choices depend on all of its window."""
    torch.manual_seed(seed)
    shape = {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "tie_embeddings": False} | changes
    model = GPTModel(GPTConfig(vocab_size=V, context_length=CONTEXT, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.to(device).eval()


def seeded(seed: int, device: torch.device = CPU) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# ------------------------------------------------------------------ choosing without a host read


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_given_points_choose_as_the_generator_that_they_come_from(sampling):
    sampling = {k: value for k, value in sampling.items() if k != "repetition_window"}
    logits = 3 * torch.randn(50, NUCLEUS + 100, generator=seeded(1))
    recent = torch.randint(NUCLEUS, (50, 4), generator=seeded(2))
    points = torch.rand(50, 1, dtype=torch.float64, generator=seeded(3))
    expected = choose_next(logits, recent=recent, generator=seeded(3), **sampling)
    assert torch.equal(choose_next(logits, recent=recent, points=points, **sampling), expected)


def test_given_points_a_row_without_a_likeliest_token_gives_minus_one_and_others_a_token():
    bad = [[0.0, math.nan, 1.0], [math.nan] * 3, [-math.inf] * 3, [math.inf, 0.0, 0.0]]
    logits, points = torch.tensor([*bad, [0.0, 1.0, 50.0]]), torch.full((5, 1), 0.999999)
    filtered = ({"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0})
    for sampling in ({}, *filtered):
        chosen = choose_next(logits, points=points, **sampling)
        assert chosen.tolist() == [[-1]] * 4 + [[2]]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_seed_gives_the_tokens_that_its_generator_chooses_from_full_passes(sampling):
    model, prompt, one, other = tiny_model(), [1, 2], seeded(7), seeded(7)
    options = dict(sampling)
    window = options.pop("repetition_window", 64)
    text = list(prompt)
    with torch.no_grad():
        for _ in range(CONTEXT - len(prompt)):
            recent = torch.tensor([text[-window:]])
            logits = model(torch.tensor([text]))[:, -1]
            text.append(choose_next(logits, recent=recent, generator=one, **options).item())
    n_new = CONTEXT - len(prompt)
    assert generate(model, [prompt], max_new_tokens=n_new, generator=other, **sampling) == [text]
    assert torch.equal(one.get_state(), other.get_state())


# ------------------------------------------------------------------ what is kept, and for how long


def kept_by(model: GPTModel, n: int = 1) -> tuple:
    """The addresses of a model's weights, for which it has kept the steps 0 to n - 1 by now."""
    addresses = weight_addresses(model)
    for step in range(n):
        keep_step(model, addresses, f"key {step}", step + 1)
    return addresses


def test_a_kept_step_is_for_one_request_at_a_time_and_for_its_key():
    model = tiny_model()
    addresses = kept_by(model, 2)
    assert take_step(model, addresses, "key 1") == 2
    assert take_step(model, addresses, "key 1") is None
    assert take_step(model, addresses, "key 0") == 1
    keep_step(model, addresses, "key 0", 3), keep_step(model, addresses, "key 0", 4)
    assert {take_step(model, addresses, "key 0") for _ in range(3)} == {3, 4, None}
    assert take_step(tiny_model(), addresses, "key 0") is None


def test_the_newest_steps_are_kept_and_older_ones_freed():
    model = tiny_model()
    addresses = kept_by(model, MOST_KEPT + 2)
    kept = [take_step(model, addresses, f"key {n}") for n in range(MOST_KEPT + 2)]
    assert kept == [None, None, *range(3, MOST_KEPT + 3)]


def in_place(model: GPTModel) -> None:
    with torch.no_grad():
        model.head.weight.add_(1.0)
    model.load_state_dict(tiny_model(seed=1).state_dict())


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (in_place, True),
        (lambda model: model.eval(), True),
        (lambda model: copy.deepcopy(model), True),
        (lambda model: model.train(), False),
        (lambda model: model.to("cpu"), False),
        (lambda model: model.double(), False),
        (lambda model: model.load_state_dict(tiny_model().state_dict(), assign=True), False),
        (lambda model: convert_weights(model, "bf16"), False),
        (free_steps, False),
    ],
    ids=["in place", "eval", "deepcopy", "train", "to", "double", "assign", "convert", "free"],
)
def test_kept_steps_are_freed_where_the_weights_are_elsewhere_or_memory_is_for_training(
    change, stays
):
    model = tiny_model()
    kept_by(model)
    change(model)
    assert (take_step(model, weight_addresses(model), "key 0") is not None) == stays
    model.train()
    kept_by(model)
    assert take_step(model, weight_addresses(model), "key 0") is None


def test_a_model_whose_decoding_is_compiled_records_anew(monkeypatch):
    model = tiny_model()
    addresses = kept_by(model)
    monkeypatch.setattr(engine.compiling, "what_prevents_compiling", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compile_decoding(model, DEVICE)
    assert take_step(model, addresses, "key 0") is None


def test_kept_steps_do_not_keep_a_model():
    model, step = tiny_model(), torch.zeros(1)
    keep_step(model, weight_addresses(model), "key", step)
    gone = weakref.ref(model), weakref.ref(step)
    del model, step
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def filled(lengths: list[int], seed: int) -> KVCache:
    cache = KVCache(lengths, max(lengths), CPU)
    k, v = torch.randn(2, len(lengths), 2, max(lengths), 4, generator=seeded(seed))
    cache.advance(max(lengths)).extend(0, k, v)
    return cache


def test_a_cache_that_takes_over_another_keeps_its_memory_and_nothing_else():
    fixed = KVCache([0] * 2, 8, CPU, fixed=True)
    fixed.take_over(filled([6, 3], 0))
    places = [part.data_ptr() for part in (*fixed.layers[0], fixed.starts)]
    for part in fixed.layers[0]:
        part[:, :, 6:] = math.nan  # of a model whose numbers were bad
    expected, again = filled([2, 4], 1).layers[0], filled([2, 4], 1)
    again.layers *= 2  # of which one is there, as after an error between them
    fixed.take_over(again)
    assert fixed.filled == 4 and fixed.starts.tolist() == [2, 0] and len(fixed.layers) == 2
    for layer in fixed.layers:
        for part, whole in zip(layer, expected, strict=True):
            assert torch.equal(part, torch.cat((whole, torch.zeros(2, 2, 4, 4)), dim=2))
    assert [part.data_ptr() for part in (*fixed.layers[0], fixed.starts)] == places


# ------------------------------------------------------------------ on a pretended GPU


@contextlib.contextmanager
def counted() -> Iterator[list]:
    """The graphs that are recorded meanwhile."""
    found, record = [], RecordedStep._record

    def noting(self: RecordedStep, step: Callable) -> None:
        record(self, step)
        assert self._graph is not None, "a step was not recorded"
        found.append(self._graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedStep, "_record", noting)
        yield found


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Nothing is recorded, taken or kept: steps run as they are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedStep, "_record", lambda self, step: None)
        patch.setattr(generation, "take_step", lambda *request: None)
        patch.setattr(generation, "keep_step", lambda *request: None)
        yield


def drawn(model: GPTModel, prompts: list, seed: int = 0, n: int = N_NEW, **options: Any) -> list:
    """Tokens and logprobs, step by step, past the context's end."""
    generator = seeded(seed, DEVICE)
    return list(stream(model, prompts, max_new_tokens=n, generator=generator, **options))


def fresh(model: GPTModel, *arguments: Any, **options: Any) -> list:
    """What drawn() gives without a graph."""
    with eagerly():
        return drawn(model, *arguments, **options)


@on_pretended(cuda_machine((9, 0), cuda="13.0"))
def test_recorded_steps_on_a_gpu(kernels: Kernels, folder: Path):
    check_that_graphs_give_what_eager_steps_do()
    check_that_one_recording_serves_many_requests(kernels)
    check_streams_that_take_turns()
    check_that_other_weights_are_seen()
    check_that_a_stream_sees_other_weights()
    check_attention_and_reads_under_autocast(kernels)
    check_what_memory_is_for(kernels)
    check_that_bad_numbers_are_an_error_and_leave_nothing()
    check_a_recording_that_fails()


def check_that_graphs_give_what_eager_steps_do() -> None:
    """Bit for bit, whatever the option and the rows; a CPU's greedy and drawn tokens too."""
    llama = {"architecture": "llama", "n_kv_heads": 1, "qk_norm": True}
    models = [(tiny_model(DEVICE, **changes), tiny_model(**changes)) for changes in ({}, llama)]
    for number, sampling in enumerate(SAMPLINGS):
        model, on_cpu = models[number % 2]
        prompts = PROMPTS[number % 3]
        options = sampling | {"num_samples": 1 + (len(prompts) == 2)}
        with counted() as recorded:
            found = drawn(model, prompts, **options)
        assert recorded
        assert found == fresh(model, prompts, **options), (sampling, prompts)
        ids = [[token.id for token in step] for step in found]
        plain = stream(on_cpu, prompts, max_new_tokens=N_NEW, generator=seeded(0), **options)
        assert ids == [[token.id for token in step] for step in plain]


def check_that_one_recording_serves_many_requests(kernels: Kernels) -> None:
    """Prompts of one shape; and the host waits once for each token."""
    model, options = tiny_model(DEVICE), {"n": 4, "top_p": 0.9, "repetition_penalty": 1.2}
    with counted() as recorded, watching(kernels) as seen:
        for request in range(21):
            drawn(model, [[request, 1], [2] * (1 + request % 3)], request, **options)
    assert len(recorded) == 2  # with padding, and without
    assert [wait.what for wait in seen] == ["read"] * 21 * 4
    assert {wait.stack[-1] for wait in seen} == {"Rows.draw"}
    with counted() as recorded:
        for _ in range(2):
            generate(model, [[1, 2], [3]], max_new_tokens=5, temperature=0.0, num_samples=2)
        with torch.inference_mode():  # whose tensors can't be written outside it
            drawn(model, [[1, 2], [3]], n=3)
        drawn(model, [[1, 2], [3]], n=3)
    assert len(recorded) == 3


def check_streams_that_take_turns() -> None:
    """Two texts that are written at once have a cache each, also where both were kept."""
    model = tiny_model(DEVICE)
    expected = [fresh(model, [[n, 5]], n, top_k=7) for n in (1, 2)]
    for n_recordings in (2, 0):
        with counted() as recorded:
            streams = [
                stream(model, [[n, 5]], max_new_tokens=N_NEW, generator=seeded(n, DEVICE), top_k=7)
                for n in (1, 2)
            ]
            found = list(zip(*streams, strict=True))
        assert [list(steps) for steps in zip(*found, strict=True)] == expected
        assert len(recorded) == n_recordings


def check_that_other_weights_are_seen() -> None:
    """Changed in place: by the graph that is there; replaced: by another, in mid-text too."""
    model, others = tiny_model(DEVICE), tiny_model(DEVICE, seed=1).state_dict()
    first = drawn(model, [[1, 2]])
    changes = [
        (lambda: model.load_state_dict(others), 0),
        (lambda: model.load_state_dict(tiny_model(DEVICE, 2).state_dict(), assign=True), 1),
        (lambda: convert_weights(model, "bf16"), 1),
        (lambda: model.to("cpu").to(DEVICE), 1),
    ]
    for change, n_recordings in changes:
        change()
        with counted() as recorded:
            found = drawn(model, [[1, 2]])
        assert found == fresh(model, [[1, 2]]) != first
        assert len(recorded) == n_recordings


def check_that_a_stream_sees_other_weights() -> None:
    """Trained in place between two tokens, as an eager step would; replaced, with a new cache."""

    def continued(change: Callable[[GPTModel], object]) -> tuple[GPTModel, list[int]]:
        model = tiny_model(DEVICE)
        steps = stream(model, [[1, 2]], max_new_tokens=9, temperature=0.0)
        ids = [next(steps)[0].id for _ in range(4)]
        change(model)
        return model, ids + [tokens[0].id for tokens in steps]

    def trained(model: GPTModel) -> None:
        with torch.no_grad():
            model.train().head.weight.neg_()

    with eagerly():
        _, expected = continued(trained)
    model, found = continued(trained)
    assert found == expected != continued(lambda model: None)[1] and model.training
    others = tiny_model(DEVICE, seed=1).state_dict()
    model, found = continued(lambda model: model.load_state_dict(others, assign=True))
    ahead = fresh(model, [[1, 2, *found[:4]]], n=5, temperature=0.0)
    assert found[4:] == [tokens[0].id for tokens in ahead]


def check_attention_and_reads_under_autocast(kernels: Kernels) -> None:
    """Samples in training record nothing, read once for each token and never ask cuDNN."""
    model, asked = tiny_model(DEVICE).train(), set()
    hidden = model.hidden

    def noting(*arguments: Any) -> torch.Tensor:
        asked.add(torch.backends.cuda.cudnn_sdp_enabled())
        return hidden(*arguments)

    model.hidden = noting
    autocast = torch.autocast("cuda", dtype=torch.bfloat16)
    with autocast, counted() as recorded, watching(kernels) as seen:
        drawn(model, [[1, 2], [3]], top_p=0.9)
    assert [wait.what for wait in seen] == ["read"] * N_NEW
    assert recorded == [] and asked == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled() and model.training


def check_what_memory_is_for(kernels: Kernels) -> None:
    """Kept steps give way to training, and to a request that needs their memory."""
    model = tiny_model(DEVICE)
    gc.collect()
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    expected = drawn(model, [[1]] * 50)
    peak = torch.cuda.max_memory_allocated(0)
    kept = torch.cuda.memory_allocated(0) - before
    assert kept > 50 * CONTEXT * 16 * 4
    model.train()
    assert torch.cuda.memory_allocated(0) == before
    drawn(model.eval(), [[1]] * 49)
    kernels.ops.set_limit(0, peak + kept // 2)
    with counted() as recorded:
        assert drawn(model, [[1]] * 50) == expected
    assert len(recorded) == 1
    kernels.ops.set_limit(0, kernels.machine.cards[0].memory)


def check_that_bad_numbers_are_an_error_and_leave_nothing() -> None:
    """In a recorded step, after which the next request is as if it had not been."""
    model = tiny_model(DEVICE)
    expected = drawn(model, [[1, 2]])
    steps, norm = stream(model, [[1, 2]], max_new_tokens=20), model.final_norm.weight
    next(steps), next(steps)
    before = norm.detach().clone()
    norm.data.fill_(math.nan)
    with pytest.raises(NumericsError, match="not finite"):
        next(steps)
    norm.data.copy_(before)
    assert drawn(model, [[1, 2]]) == expected


def check_a_recording_that_fails() -> None:
    """One line says so, and texts are as they would be."""
    model, said = tiny_model(DEVICE), io.StringIO()
    expected = fresh(model, [[1, 2], [3]], top_k=5)

    def choose_and_look(logits: torch.Tensor, **options: Any) -> torch.Tensor:
        chosen = choose_next(logits, **options)
        assert chosen.min().item() >= 0  # which no graph can
        return chosen

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(generation, "choose_next", choose_and_look)
        for prompts in ([[1, 2], [3]], [[1, 2], [3]], [[4]]):
            found = drawn(model, prompts, top_k=5)
            assert found == (expected if len(prompts) == 2 else fresh(model, prompts, top_k=5))
    assert said.getvalue().count("generation is slower, without CUDA graphs: ") == 1
    assert len(said.getvalue().splitlines()) == 1
