"""Whether models are compiled, what is compiled, and what happens where that fails."""

import contextlib
import gc
import importlib.util
import shutil
import sys
import sysconfig

import pytest
import torch

from engine import compiling
from engine.compiling import (
    compile_again,
    compile_decoding,
    compile_model,
    is_compiled,
    not_compiled,
    undo_compiling,
    what_prevents_compiling,
)
from engine.errors import SettingsError
from engine.memory import OutOfStepMemory
from generation import generate, stream
from model import GPTModel, KVCache
from tests.letters import CPU, FP32, tiny_loaders, tiny_model
from training import learner
from training.learner import mean_loss

CUDA = torch.device("cuda")
IDS = torch.zeros(1, 4, dtype=torch.long)
LLAMA = {"architecture": "llama", "n_kv_heads": 1, "qk_norm": True}
TOO_OLD = "Triton does not serve GPUs this old (compute capability below 7.0)"


@pytest.mark.parametrize(
    ("device", "platform", "names", "expected"),
    [
        ("mps", "darwin", "clang++ Python.h", "it is not dependable on Apple's GPUs"),
        ("cuda", "linux", "", "Triton is not installed"),
        ("cuda", "linux", "triton", None),
        ("old cuda", "linux", "triton", TOO_OLD),
        ("cpu", "win32", "", "there is no C++ compiler (cl) here"),
        ("cpu", "win32", "cl", None),
        ("cpu", "linux", "Python.h", "there is no C++ compiler (g++) here"),
        ("cpu", "linux", "g++", "Python's header files are not installed (python3-dev)"),
        ("cpu", "linux", "g++ Python.h", None),
        ("cpu", "linux", "/opt/g++-14 Python.h", None),  # as CXX names it
        ("cpu", "darwin", "clang++ Python.h", None),
    ],
)
def test_what_keeps_a_machine_from_compiling_is_named(
    monkeypatch, tmp_path, device, platform, names, expected
):
    there = names.split()
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(importlib.util, "find_spec", shutil.which)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"include": tmp_path}[name])
    monkeypatch.setenv("CXX", "/opt/g++-14") if "/" in names else monkeypatch.delenv("CXX", False)
    if "Python.h" in there:
        (tmp_path / "Python.h").touch()
    capability = (6, 1) if "old" in device else (7, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert what_prevents_compiling(torch.device(device.removeprefix("old "))) == expected


@pytest.fixture
def compile_with(monkeypatch):
    """Let torch.compile give its graphs to a backend of the test."""
    torchs_own = torch.compile

    def use(backend):
        def compile_with_it(function, **options):
            options.pop("mode", None)
            return torchs_own(function, **options, backend=backend)

        monkeypatch.setattr(torch, "compile", compile_with_it)

    yield use
    torch.compiler.reset()


@pytest.fixture
def compiled_calls(compile_with):
    """Let torch.compile note each compilation, and run the graphs as they are."""
    calls = []
    compile_with(lambda graph, example_inputs: calls.append(graph) or graph.forward)
    return calls


@pytest.fixture
def asked_of_torch(monkeypatch):
    """What torch.compile is asked for, with nothing compiled."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(options) or f)
    return asked


def test_on_a_cpu_each_block_is_compiled_and_the_weights_keep_their_names(asked_of_torch):
    model = tiny_model(n_layers=3)
    names = list(model.state_dict())
    compile_model(model, CPU, micro_batches=1)
    assert asked_of_torch == [{"dynamic": False}] * 3
    assert all("forward" in vars(block) for block in model.blocks)
    assert list(model.state_dict()) == names and is_compiled(model)
    undo_compiling(model)
    assert not any("forward" in vars(block) for block in model.blocks)
    assert not is_compiled(model)


@pytest.mark.parametrize(
    ("largest_small", "micro_batches", "mode"),
    [(10**9, 1, "reduce-overhead"), (10**9, 2, "default"), (1, 1, "default")],
)
def test_on_a_gpu_the_whole_is_compiled_and_a_small_model_with_one_micro_batch_runs_as_graphs(
    asked_of_torch, monkeypatch, largest_small, micro_batches, mode
):
    monkeypatch.setattr(compiling, "SMALL_MODEL", largest_small)
    model = tiny_model()
    names, written = list(model.state_dict()), model.hidden
    compile_model(model, CUDA, micro_batches=micro_batches)
    assert asked_of_torch == [{"dynamic": False, "mode": mode}]
    assert "hidden" in vars(model) and is_compiled(model)
    assert list(model.state_dict()) == names
    undo_compiling(model)
    assert "hidden" not in vars(model) and model.hidden == written
    assert not is_compiled(model)


def test_steps_compiled_again_keep_their_regions_and_leave_graphs_for_one_micro_batch(
    asked_of_torch,
):
    for is_alone, region in ((True, "hidden"), (False, "forward")):
        model = tiny_model()
        compile_model(model, CUDA, micro_batches=1, is_alone=is_alone)
        before = [name for module in model.modules() for name in vars(module) if name == region]
        compile_again(model, CUDA, micro_batches=2)
        after = [name for module in model.modules() for name in vars(module) if name == region]
        assert before == after == [region] * (1 if is_alone else len(model.blocks))
    modes = [options.get("mode") for options in asked_of_torch]
    assert modes == ["reduce-overhead", "default"] + [None] * 2 * len(model.blocks)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_steps_that_run_out_of_memory_are_compiled_again_where_they_were(monkeypatch, is_compiled):
    again = []
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all imports it takes longer than the test
    monkeypatch.setattr(learner, "compile_again", lambda *_, **options: again.append(options))
    monkeypatch.setattr(learner, "is_compiled", lambda model: is_compiled)
    refusals = iter([OutOfStepMemory(MemoryError(), 4), OutOfStepMemory(MemoryError(), 2)])

    def attempt() -> str:
        for refusal in refusals:
            raise refusal
        return "made"

    model = tiny_model()
    ours = learner.Learner(model, torch.optim.SGD(model.parameters()), FP32)
    assert ours.in_smaller_parts(attempt, "step 1") == "made"
    assert ours.micro_batch == 1
    assert again == [{"micro_batches": 2}] * 2 * is_compiled


@pytest.mark.slow
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)  # says only which part is compiled
def test_training_alone_runs_compiled(compiled_calls, device):
    model, (_, val_loader) = tiny_model(n_layers=2).train(), tiny_loaders()
    expected, prompts = model(IDS), [[1, 2], [3, 4, 5]]
    texts = generate(model, prompts, max_new_tokens=12, temperature=0.0)
    compile_model(model, device, micro_batches=1)
    mean_loss(model, val_loader, CPU, FP32)
    assert generate(model, prompts, max_new_tokens=12, temperature=0.0) == texts
    first, second = (stream(model, prompts, max_new_tokens=6) for _ in range(2))
    next(first), next(second)  # two texts drawn in turn
    first.close()
    list(second)
    with contextlib.suppress(SettingsError):
        generate(model, [[]], max_new_tokens=2)
    with pytest.raises(KeyError), not_compiled():
        model(IDS)
        raise KeyError
    assert compiled_calls == []
    torch.testing.assert_close(model(IDS), expected)
    assert len(compiled_calls) == 1  # blocks share their code
    undo_compiling(model)
    model(IDS[:, :3])
    assert len(compiled_calls) == 1


def test_where_nothing_is_compiled_torchs_compiler_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(torch.compiler, "set_stance", None)
    with not_compiled():
        pass
    assert "torch._dynamo" not in sys.modules


def small_model(**changes) -> GPTModel:
    return tiny_model(vocab_size=23, context_length=16, **changes).eval()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_steps_of_a_fixed_cache_give_the_same_and_serve_the_next_cache_too(compile_with):
    compile_with("aot_eager")
    model = small_model(**LLAMA)
    decode = torch.compile(model.decode, dynamic=False, fullgraph=True)

    def assert_logits_of_a_full_pass(ids: torch.Tensor) -> None:
        cache = KVCache([3, 3], 16, CPU, fixed=True)
        model.hidden(ids[:, :3], cache.advance(3))
        steps = [decode(ids[:, i : i + 1], cache, cache.advance(1).columns) for i in range(3, 14)]
        torch.testing.assert_close(torch.stack(steps, 1), model(ids)[:, 3:], rtol=0, atol=1e-5)

    ids = torch.randint(23, (2, 14), generator=torch.Generator().manual_seed(1))
    assert_logits_of_a_full_pass(ids)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_logits_of_a_full_pass(ids.flip(1))


def test_compiling_generation_is_refused_where_it_does_not_pay_and_compiles_no_training_steps(
    monkeypatch, asked_of_torch
):
    model = small_model()
    model.decode = torch.compile(model.decode)  # else generation would run it as it is written
    assert not is_compiled(model)
    with pytest.raises(SettingsError, match="on cpu a step is as fast as its weights are read"):
        compile_decoding(small_model(), CPU)
    monkeypatch.setattr(compiling, "what_prevents_compiling", lambda _: "Triton is not installed")
    with pytest.raises(SettingsError, match="Triton is not installed"):
        compile_decoding(small_model(), CUDA)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
def test_on_a_gpu_recorded_steps_give_the_tokens_of_a_cpu(changes, compiled):
    prompts = [[1, 2, 3], [4]]
    options = {"max_new_tokens": 40, "temperature": 0.0, "num_samples": 2}
    expected = generate(small_model(**changes), prompts, **options)
    model = small_model(**changes).to("cuda")
    if compiled:
        compile_decoding(model, CUDA)
    assert generate(model, prompts, **options) == expected
