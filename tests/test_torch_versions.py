"""The oldest torch that serves is 2.7: no newer and no private name of it is relied upon."""

import ast
import importlib
import json
from collections.abc import Iterator

import pytest
import torch
from safetensors import SafetensorError

from engine.attention import attend
from engine.optim import for_each
from engine.precision import Precision, choose_precision
from engine.weights import WEIGHTS, Int8Linear
from exchange.saved_run import load_run
from generation import generate
from model import GPTConfig, attention_kernel
from storage.checkpoint import read_safetensors
from tests.conftest import train_in
from tests.hostile import project_trees
from tests.programs import write_settings

CPU = torch.device("cpu")
# what torch 2.13 has and 2.7 has not, of the modules that are used or may come to be
NEWER = {
    "torch": "AcceleratorError float4_e2m1fn_x2 thread_safe_generator",
    "torch.accelerator": "Graph get_device_capability empty_cache empty_host_cache "
    "get_memory_info max_memory_allocated max_memory_reserved memory_allocated memory_reserved "
    "memory_stats reset_accumulated_memory_stats reset_peak_memory_stats",
    "torch.backends.cuda": "cublas_workspace_size cublaslt_workspace_size is_ck_sdpa_available",
    "torch.backends.mps": "get_core_count get_name",
    "torch.compiler": "get_default_backend load_compiled_function nested_compile_region "
    "set_default_backend set_enable_guard_collectives",
    "torch.cpu": "get_capabilities is_initialized",
    "torch.cuda": "GreenContext caching_allocator_disabled",
    "torch.distributed": "all_gather_single reduce_scatter_single shrink_group",
    "torch.distributed.fsdp": "DataParallelMeshDims share_comm_ctx",
    "torch.nn": "LinearCrossEntropyLoss",
    "torch.nn.attention": "activate_flash_attention_impl register_flash_attention_impl "
    "restore_flash_attention_impl",
    "torch.nn.functional": "grouped_mm linear_cross_entropy scaled_grouped_mm",
    "torch.optim": "Muon swap_in_optimizer_params_and_state",
    "torch.xpu": "XPUGraph get_per_process_memory_fraction graph is_tf32_supported "
    "make_graphed_callables memory_snapshot memory_usage set_per_process_memory_fraction "
    "utilization",
}
NEWER_NAMES = {f"{module}.{name}" for module, names in NEWER.items() for name in names.split()}
# what the code asks for by getattr(), and does without
PRIVATE = {
    "torch": "_fused_sdp_choice _softmax_backward_data _weight_int8pack_mm",
    "torch.cpu": "_is_amx_tile_supported _is_avx512_bf16_supported",
}
# a module whose import is tried: an `except ImportError`, or its like, is around it
TRIED = {"torch._dynamo"}
# of nn.Module, Optimizer and Tensor, under whatever name the code has one
OF_OBJECTS = ("_apply", "_call_impl", "_compiled_call_impl", "_parameters", "_buffers", "_modules")


def dotted(node: ast.AST) -> str:
    """The name a.b.c of an expression; "" where it is none."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def torch_names(tree: ast.Module) -> Iterator[str]:
    """Every name of torch that a file uses, as torch.cuda.graph, whatever it is imported as."""
    known, nodes = {}, list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in (alias for alias in node.names if alias.name.partition(".")[0] == "torch"):
                known[name.asname or "torch"] = name.name if name.asname else "torch"
                yield name.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            for name in node.names:
                known[name.asname or name.name] = f"{node.module}.{name.name}"
                yield f"{node.module}.{name.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            if first in known:
                yield f"{known[first]}.{rest}"
            if node.attr in OF_OBJECTS:
                yield f"torch.nn.Module.{node.attr}"


def is_relied_upon_in_vain(name: str) -> bool:
    """Whether another torch may lack a name: it is newer than 2.7, or private."""
    parts = name.removesuffix(".__version__").split(".")
    prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return bool(prefixes & NEWER_NAMES) or any(part.startswith("_") for part in parts)


def test_no_file_relies_on_a_newer_or_private_name_of_torch():
    for source, names in (
        ("import torch\ntorch.cpu.get_capabilities()", ["torch.cpu.get_capabilities"]),
        ("import torch as t\nt._foreach_add_([], 1)", ["torch._foreach_add_"]),
        ("from torch import optim\noptim.Muon", ["torch.optim.Muon"]),
        ("from torch.optim import Muon as M", ["torch.optim.Muon"]),
        ("from torch import cpu as c\nc.get_capabilities", ["torch.cpu.get_capabilities"]),
        ("import torch.nn.functional as F\nF.grouped_mm", ["torch.nn.functional.grouped_mm"]),
        ("model._apply(f)", ["torch.nn.Module._apply"]),
        ("import torch\ntorch.__version__\ntorch.compile(f).x", []),
        ('import torch\ngetattr(torch, "_foreach_add_", None)', []),
    ):
        used = torch_names(ast.parse(source))
        assert sorted({n for n in used if is_relied_upon_in_vain(n)}) == names
    found = {
        f"{path}: {name}"
        for path, tree in project_trees().items()
        for name in torch_names(tree)
        if is_relied_upon_in_vain(name) and name not in TRIED
    }
    assert not found, "ask for it by getattr(), and do without; then name it in PRIVATE"


@pytest.fixture
def oldest_torch(monkeypatch):
    """Take the newer and the private names from torch, as if it had never had them."""
    import torch._dynamo  # noqa: F401 (torch itself needs some of them to import it)

    for module, names in [*NEWER.items(), *PRIVATE.items()]:
        for name in names.split():
            monkeypatch.delattr(importlib.import_module(module), name, raising=False)


def test_the_oldest_torch_trains_saves_loads_and_generates(oldest_torch, no_pictures, tmp_path):
    settings = {"max_steps": 2, "eval_freq": 2, "optimizer": "muon", "start_context": "river"}
    settings["model_overrides"] = {"n_heads": 1, "n_layers": 1, "emb_dim": 64, "drop_rate": 0.1}
    settings |= {"DEVICE": "cpu", "PRECISION": "auto", "COMPILE": False, "RUN_NAME": "tiny"}
    settings |= {"sampling_params": {"max_new_tokens": 3}}
    write_settings(tmp_path, "the river carries the bell " * 20, **settings)
    run = train_in(tmp_path, (tmp_path / "settings.py").read_text(encoding="utf-8"))
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"] == 2
    for kind in WEIGHTS:
        loaded = load_run(run, weights=kind)
        ids = loaded.tokenizer.encode("the river")
        assert len(generate(loaded.model, [ids], max_new_tokens=3)[0]) == len(ids) + 3


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("lerp", ([3.0, 4.0], 0.95), {}),
        ("lerp_", ([3.0, 4.0], 0.05), {}),
        ("mul_", (torch.tensor(0.3),), {}),
        ("div_", (torch.tensor(3.0),), {}),
        ("add_", ((5.0, 6.0),), {"alpha": -0.1}),
    ],
)
def test_without_one_call_for_all_each_tensor_gets_its_own(monkeypatch, name, arguments, options):
    def result() -> list[torch.Tensor]:
        tensors = [torch.tensor([1.0, 2.0]), torch.tensor([[0.3]])]
        given = [
            [torch.full_like(*pair) for pair in zip(tensors, argument, strict=True)]
            if isinstance(argument, list | tuple)
            else argument
            for argument in arguments
        ]
        made = for_each(name, tensors, *given, **options)
        return tensors if name.endswith("_") else list(made)

    at_once = result()
    monkeypatch.delattr(torch, f"_foreach_{name}")
    assert all(map(torch.equal, result(), at_once))
    assert not torch.equal(at_once[0], torch.tensor([1.0, 2.0]))


def test_numbers_of_a_format_that_an_older_torch_has_not_are_no_weights(oldest_torch, tmp_path):
    header = b'{"x": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}'
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(SafetensorError, match="not fp32, and this torch has no float4_e2m1fn_x2"):
        read_safetensors(file)


def test_what_an_older_torch_does_not_tell_is_taken_for_usual(oldest_torch):
    assert choose_precision("auto", CPU).name == "fp32"
    config = GPTConfig(vocab_size=9, context_length=8, emb_dim=8, n_heads=1, n_layers=1)
    assert attention_kernel(config, Precision("bf16", "as set", "cpu"), CPU) == "unknown"


def test_without_the_softmaxs_operation_attention_has_the_same_gradients(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))

    def result() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v, 0.0, is_plain=True).square().sum(), (q, k, v))

    by_operation = result()
    monkeypatch.delattr(torch, "_softmax_backward_data")
    for found, expected in zip(result(), by_operation, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n_rows", [1, 5])
def test_without_the_int8_kernel_a_product_is_the_same_but_for_rounding(monkeypatch, n_rows):
    torch.manual_seed(0)
    layer, x = Int8Linear(torch.nn.Linear(64, 24)), torch.randn(n_rows, 64)
    by_kernel = layer(x).float()
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    torch.testing.assert_close(layer(x).float(), by_kernel, rtol=0.02, atol=0.02)
