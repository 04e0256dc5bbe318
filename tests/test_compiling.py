"""Whether models are compiled, what is compiled, and what happens where that fails."""

import importlib.util
import json
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
    is_repaid,
    not_compiled,
    undo_compiling,
    what_prevents_compiling,
)
from engine.errors import SettingsError
from engine.memory import OutOfStepMemory
from generation import generate
from model import GPTConfig, GPTModel, KVCache
from tests.test_main import run_main, write_settings
from tests.test_train import CPU, FP32, tiny_loaders, tiny_model
from training import learner
from training.learner import mean_loss

CUDA = torch.device("cuda")

# ------------------------------------------------------------------ whether it can work, and pays


@pytest.fixture
def there(monkeypatch, tmp_path):
    """Say what is on the machine: programs, packages, Python's header, platform."""
    monkeypatch.delenv("CXX", raising=False)

    def use(*names: str, platform: str = "linux") -> None:
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(shutil, "which", lambda name: name if name in names else None)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: name if name in names else None
        )
        monkeypatch.setattr(sysconfig, "get_path", lambda name: {"include": tmp_path}[name])
        (tmp_path / "Python.h").unlink(missing_ok=True)
        if "Python.h" in names:
            (tmp_path / "Python.h").touch()

    return use


@pytest.mark.parametrize(
    ("device", "platform", "names", "expected"),
    [
        ("mps", "darwin", ["clang++", "Python.h"], "it is not dependable on Apple's GPUs"),
        ("cuda", "linux", [], "Triton is not installed"),
        ("cuda", "linux", ["triton"], None),
        ("cpu", "win32", [], "there is no C++ compiler (cl) here"),
        ("cpu", "win32", ["cl"], None),
        ("cpu", "linux", ["Python.h"], "there is no C++ compiler (g++) here"),
        (
            "cpu",
            "linux",
            ["g++"],
            "Python's header files are not installed (python3-dev)",
        ),
        ("cpu", "linux", ["g++", "Python.h"], None),
        ("cpu", "darwin", ["clang++", "Python.h"], None),
    ],
)
def test_what_keeps_a_machine_from_compiling_is_named(
    there, monkeypatch, device, platform, names, expected
):
    there(*names, platform=platform)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert what_prevents_compiling(torch.device(device)) == expected


def test_triton_does_not_serve_gpus_before_volta(there, monkeypatch):
    there("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "below 7.0" in what_prevents_compiling(CUDA)


def test_the_compiler_that_cxx_names_counts(there, monkeypatch):
    there("/opt/g++-14", "Python.h")
    assert what_prevents_compiling(CPU) is not None
    monkeypatch.setenv("CXX", "/opt/g++-14")
    assert what_prevents_compiling(CPU) is None


@pytest.mark.parametrize(
    ("device", "step_s", "steps", "expected"),
    [
        # 15 % of 400 s are 60 s, twice what compiling takes on a CPU
        (CPU, 1.0, 400, False),
        (CPU, 1.0, 401, True),
        (CPU, 0.001, 400_001, True),
        (CPU, 0.0, 10**9, False),
        # three tenths of 400 s are 120 s, twice what it takes on a GPU
        (CUDA, 1.0, 400, False),
        (CUDA, 1.0, 401, True),
    ],
)
def test_compiling_is_repaid_where_twice_its_cost_is_saved(device, step_s, steps, expected):
    assert is_repaid(step_s, steps, device) == expected


# ------------------------------------------------------------------ what is compiled


@pytest.fixture
def compiled_calls(monkeypatch):
    """Let torch.compile note each compilation, and run the graphs as they are."""
    calls, torchs_own = [], torch.compile

    def noting(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    def compile_noting(function, **options):
        options.pop("mode", None)
        return torchs_own(function, **options, backend=noting)

    monkeypatch.setattr(torch, "compile", compile_noting)
    yield calls
    torch.compiler.reset()


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
    assert list(model.state_dict()) == names
    undo_compiling(model)
    assert not any("forward" in vars(block) for block in model.blocks)


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
    assert "hidden" in vars(model)
    assert list(model.state_dict()) == names
    undo_compiling(model)
    assert "hidden" not in vars(model) and model.hidden == written


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


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_training_alone_runs_compiled(compiled_calls, device):
    model, (_, val_loader) = tiny_model().train(), tiny_loaders()
    ids = torch.zeros(1, 4, dtype=torch.long)
    expected = model(ids)
    compile_model(model, device, micro_batches=1)  # "cuda" says only which part of the model
    mean_loss(model, val_loader, CPU, FP32)
    generate(model, ids, max_new_tokens=3)
    with not_compiled():
        model(ids)
    assert compiled_calls == []
    torch.testing.assert_close(model(ids), expected)
    assert len(compiled_calls) == 1
    undo_compiling(model)
    model(ids[:, :3])
    assert len(compiled_calls) == 1


def test_compiled_blocks_share_their_code(compiled_calls):
    model = tiny_model(n_layers=4).train()
    compile_model(model, CPU, micro_batches=1)
    model(torch.zeros(2, 4, dtype=torch.long)).sum().backward()
    assert len(compiled_calls) == 1


def test_where_nothing_is_compiled_torchs_compiler_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(torch.compiler, "set_stance", None)
    with not_compiled():
        pass
    assert "torch._dynamo" not in sys.modules


def test_after_an_error_compiled_models_run_compiled_again(compiled_calls):
    model = tiny_model().train()
    compile_model(model, CPU, micro_batches=1)
    with pytest.raises(KeyError), not_compiled():
        raise KeyError
    model(torch.zeros(1, 4, dtype=torch.long))
    assert len(compiled_calls) == 1


# ------------------------------------------------------------------ with a real compiler

PARAMS = {
    "max_steps": 8,
    "batch_size": 4,
    "max_length": 16,
    "eval_freq": 4,
    "eval_iter": 1,
    "start_context": "river",
}
FORMS = {
    "gpt2": {},
    "qwen3": {"architecture": "llama", "n_kv_heads": 1, "qk_norm": True},
}


def losses(folder) -> list[float]:
    """Each step's loss, as a run noted them."""
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row]


def train_twice(folder, form: str, first: dict, second: dict, **environment):
    """Two runs of one model, "first" and "second"; what the second printed."""
    model = FORMS[form] | {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0}
    printed = ""
    for name, settings in (("first", first), ("second", second)):
        file = write_settings(
            folder,
            "the river carries the bell and the bell carries the river " * 20,
            TOKENIZER="char",
            RUN_NAME=name,
            custom_params=PARAMS | {"model_overrides": model},
            **settings,
        )
        done = run_main(
            folder, file, TORCHINDUCTOR_CACHE_DIR=str(folder / "compiled"), **environment
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        printed = done.stdout
    return printed


@pytest.mark.slow
@pytest.mark.skipif(what_prevents_compiling(CPU) is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("form", "precision", "tolerance"), [("gpt2", "fp32", 1e-4), ("qwen3", "bf16", 2e-2)]
)
def test_a_compiled_run_learns_what_an_uncompiled_one_does(tmp_path, form, precision, tolerance):
    precision = {"PRECISION": precision}
    printed = train_twice(
        tmp_path, form, precision | {"COMPILE": False}, precision | {"COMPILE": True}
    )
    assert "✓ Compiled in" in printed and "Compile: on (as set)" in printed
    assert any((tmp_path / "compiled").rglob("*.so")), "nothing was compiled"
    plain, compiled = (losses(tmp_path / "runs" / name) for name in ("first", "second"))
    assert len(compiled) == PARAMS["max_steps"]
    assert compiled == pytest.approx(plain, abs=tolerance)
    assert compiled[-1] < compiled[0]


@pytest.mark.slow
def test_a_run_trains_on_where_the_compiler_fails_and_says_why(tmp_path):
    # a compiler that can be found, and fails
    compiler = tmp_path / "failing-compiler"
    compiler.write_text("#!/bin/sh\nexit 1\n", encoding="ascii")
    compiler.chmod(0o755)
    settings = {"COMPILE": False}, {"COMPILE": True}
    printed = train_twice(tmp_path, "gpt2", *settings, CXX=str(compiler))
    assert "Note: the model is not compiled: " in printed
    assert "Compile: off (" in printed
    assert "✓ Training pipeline finished successfully!" in printed
    plain, after_failure = (losses(tmp_path / "runs" / name) for name in ("first", "second"))
    assert after_failure == plain  # the attempt left no trace


# ------------------------------------------------------------------ generation


SHAPE = {"vocab_size": 23, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2}
LLAMA = {"architecture": "llama", "n_kv_heads": 1, "qk_norm": True}


def small_model(**changes) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**SHAPE | changes)).eval()


@torch.no_grad()
def decoded(model, decode, lengths: list[int], ids: torch.Tensor) -> torch.Tensor:
    """(B, steps, V) logits of a fixed cache: three ids are read, the others stepped through."""
    cache = KVCache(lengths, 16, ids.device, fixed=True)
    model.hidden(ids[:, :3], cache.advance(3))
    steps = range(3, ids.shape[1])
    logits = [decode(ids[:, i : i + 1], cache, cache.advance(1).columns).clone() for i in steps]
    return torch.stack(logits, dim=1)


def assert_as_alone(model, found: torch.Tensor, lengths: list[int], ids: torch.Tensor) -> None:
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 3 - length :])[:, length:]
        torch.testing.assert_close(found[row : row + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [[3, 3], [3, 1]], ids=str)
@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_steps_of_a_fixed_cache_give_the_logits_of_a_full_pass(changes, lengths):
    model = small_model(**changes)
    ids = torch.randint(23, (2, 14), generator=torch.Generator().manual_seed(1))
    assert_as_alone(model, decoded(model, model.decode, lengths, ids), lengths, ids)


@pytest.mark.slow
@pytest.mark.skipif(what_prevents_compiling(CPU) is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_compiled_steps_give_the_same_and_serve_the_next_cache_too(changes):
    model = small_model(**changes)
    ids = torch.randint(23, (2, 14), generator=torch.Generator().manual_seed(1))
    decode = torch.compile(model.decode, dynamic=False, fullgraph=True)
    assert_as_alone(model, decoded(model, decode, [3, 3], ids), [3, 3], ids)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = decoded(model, decode, [3, 3], ids.flip(1))
    assert_as_alone(model, again, [3, 3], ids.flip(1))


def test_compiling_generation_is_refused_where_it_does_not_pay(monkeypatch):
    with pytest.raises(SettingsError, match="on cpu a step is as fast as its weights are read"):
        compile_decoding(small_model(), CPU)
    monkeypatch.setattr(compiling, "what_prevents_compiling", lambda _: "Triton is not installed")
    with pytest.raises(SettingsError, match="Triton is not installed"):
        compile_decoding(small_model(), CUDA)


def test_a_model_with_compiled_steps_counts_as_uncompiled(compiled_calls):
    model = small_model()
    assert not is_compiled(model)
    model.decode = torch.compile(model.decode)  # else generation would run it as it is written
    assert not is_compiled(model)
    for device in (CPU, CUDA):
        compile_model(model, device, micro_batches=1)
        assert is_compiled(model)
        undo_compiling(model)
        assert not is_compiled(model)


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
