"""The loss's Triton kernel, run by Triton's interpreter, beside the plain one and fp64."""

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import engine.loss
from engine.loss import next_token_loss
from engine.memory import head_bytes
from engine.precision import Precision
from tests.pretend.child import on_pretended
from tests.pretend.device import Kernels, watching
from tests.pretend.machines import cuda_machine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (pip install triton)"
)
BLOCK = 128  # the smallest, so that rows of a few hundred logits take several
# rows, width, vocabulary, spread of the head, rows at a time
CASES = [
    (1, 16, 29, 1.0, 8),
    (3, 16, 1, 1.0, 8),
    (5, 16, 128, 0.3, 8),
    (5, 16, 129, 2.0, 2),
    (4, 32, 300, 0.02, 3),
]


@contextlib.contextmanager
def loaded(*, interpreted: bool) -> Iterator[ModuleType]:
    """engine/loss_kernel.py with a Triton of its own, which may interpret its kernels on the CPU.

    Triton decides that when it is imported, and torch's compiler may have imported it.
    """
    kept = {name: m for name, m in sys.modules.items() if is_of_the_kernel(name)}
    before = kept.get("engine.loss_kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        for name in kept:
            del sys.modules[name]
        if before is not None:
            before._LIBRARY._destroy()  # an operator is defined only once
        module = importlib.import_module("engine.loss_kernel")
        try:
            yield module
        finally:
            module._LIBRARY._destroy()
            for name in list(filter(is_of_the_kernel, sys.modules)):
                del sys.modules[name]
            sys.modules.update(kept)
            sys.modules.pop("engine.loss_kernel", None)  # its operator is gone


def is_of_the_kernel(name: str) -> bool:
    """Whether a module is the kernel's or Triton's, but for its C++, which is loaded once."""
    is_triton = name.split(".")[0] == "triton" and not name.startswith("triton._C")
    return is_triton or name == "engine.loss_kernel"


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[bool], ModuleType]]:
    """Gives engine/loss_kernel.py with an interpreting Triton or a compiling one."""
    found: dict[bool, ModuleType] = {}
    with contextlib.ExitStack() as undo:

        def load(is_interpreted: bool) -> ModuleType:
            if is_interpreted not in found:
                undo.close()
                found.clear()
                found[is_interpreted] = undo.enter_context(loaded(interpreted=is_interpreted))
            return found[is_interpreted]

        yield load


@pytest.fixture
def interpreted(load, monkeypatch) -> ModuleType:
    """engine/loss_kernel.py as Triton's interpreter runs it."""
    module = load(True)
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def rounded(data, source, target, rounding):
        if str(target) != "bf16":
            return convert(data, source, target, rounding)
        return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()

    # its own truncates to bf16, and GPUs round
    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(module, "_BLOCK", BLOCK)
    return module


@pytest.fixture
def compiled(load) -> ModuleType:
    """engine/loss_kernel.py as Triton compiles it."""
    return load(False)


@pytest.fixture
def by_kernel(interpreted, monkeypatch):
    """Lets the loss take the interpreted kernel or not, in chunks of so many rows."""

    def use(is_used: bool, rows: int = 8) -> None:
        monkeypatch.setattr(engine.loss, "_has_kernel", lambda device: is_used)
        monkeypatch.setattr(engine.loss, "chunk_rows", lambda hidden, vocab_size: rows)

    return use


def figures(loss_of, case: tuple[Tensor, ...], dtype=torch.float32, autocast=None) -> list[Tensor]:
    """What a loss comes to on a case: its value and the gradients of hidden states and head."""
    hidden, weight = (part.detach().clone().to(dtype).requires_grad_() for part in case[:2])
    with torch.autocast(hidden.device.type, dtype=autocast, enabled=autocast is not None):
        loss = loss_of(hidden, weight, case[2])
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]


def exact_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), targets.flatten())


def random_case(rows: int, width: int, vocabulary: int, spread: float) -> tuple[Tensor, ...]:
    """Hidden states (1, rows, width), a head and targets, the first and last token among them."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = torch.randn(1, rows, width, generator=generator)
    weight = spread * torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(vocabulary, (1, rows), generator=generator)
    targets[0, 0], targets[0, -1] = 0, vocabulary - 1
    return hidden, weight, targets


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """How far each figure is from the exact one, by norm."""
    return [(a.double() - b).norm().item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_the_kernel_gives_the_plain_loss_and_gradients_and_errs_no_more(shape, by_kernel):
    case = random_case(*shape[:-1])
    exact = figures(exact_loss, case, torch.float64)
    scales = [part.norm().item() + 1e-9 for part in exact]
    for autocast in (None, torch.bfloat16, torch.float16):
        by_kernel(False, shape[-1])
        plain = figures(next_token_loss, case, autocast=autocast)
        by_kernel(True, shape[-1])
        found = figures(next_token_loss, case, autocast=autocast)
        assert [part.dtype for part in found] == [torch.float32] * 3
        mine, theirs = errors(found, exact), errors(plain, exact)
        if autocast is None:
            to_plain = errors(found, [part.double() for part in plain])
            for error, apart, scale in zip(mine, to_plain, scales, strict=True):
                assert max(error, apart) <= 1e-6 * scale
        for error, other, scale in zip(mine, theirs, scales, strict=True):
            assert error <= 1.1 * other + 1e-6 * scale, autocast


def test_without_gradients_the_loss_is_the_same(by_kernel):
    by_kernel(True, rows=4)
    hidden, weight, targets = random_case(9, 16, 150, 1.0)
    trained = next_token_loss(hidden.requires_grad_(), weight, targets)
    with torch.no_grad():
        assert torch.equal(next_token_loss(hidden, weight, targets), trained)


V, W = 150, 192
EXTREME = {  # rows of logits, whose target is the first token
    "all equal": torch.full((V,), 3.0),
    "all -1e4": torch.full((V,), -1e4),
    "1e4 at the target": F.one_hot(torch.tensor(0), V) * 1e4,
    "-1e4 at the target": F.one_hot(torch.tensor(0), V) * -1e4,
    "1e4 elsewhere": F.one_hot(torch.tensor(7), V) * 1e4,
    "nearly sure": F.one_hot(torch.tensor(0), V) * 18.0,
    "a block of -inf": torch.where(torch.arange(V) < BLOCK, float("-inf"), 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_are_exact_and_padding_becomes_zero(dtype, interpreted):
    rows = torch.stack([row.float() for row in EXTREME.values()])
    rows = torch.cat([rows, rows[2:4].flip(1)])  # the last token as target of two more
    targets = torch.tensor([0] * len(EXTREME) + [V - 1] * 2)
    logits = F.pad(rows, (0, W - V), value=float("-inf")).to(dtype)
    wide = logits[:, :V].double()
    expected = wide.softmax(1)
    others = expected.scatter(1, targets[:, None], 0.0).sum(1)
    expected.scatter_(1, targets[:, None], -others[:, None])
    losses = interpreted.softmax_minus_target_(logits, targets, 64.0)
    torch.testing.assert_close(
        losses.double(), F.cross_entropy(wide, targets, reduction="none"), rtol=1e-6, atol=1e-7
    )
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    smallest = 6e-8 if dtype == torch.float16 else 1e-30  # fp16's subnormal numbers
    torch.testing.assert_close(
        logits[:, :V].double(), 64 * expected, rtol=1.01 * rounding, atol=smallest
    )
    assert not logits[:, V:].any()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_spoil_their_own_row_alone(wrong, interpreted):
    logits = torch.zeros(2, W)
    logits[1, 140] = wrong
    losses = interpreted.softmax_minus_target_(logits, torch.tensor([3, 3]), 1.0)
    assert losses[0].isfinite() and losses[1].isnan()
    assert logits[0].isfinite().all() and logits[1].isnan().all()


MOVE_NOTHING = ("empty", "new_empty", "empty_like", "detach", "device")


class BytesMoved(TorchDispatchMode):
    """Sums the bytes that each operation reads and writes, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = dict(zip((a.name for a in function._schema.arguments), args, strict=False))
        given |= kwargs or {}
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if not function.is_view and name not in MOVE_NOTHING:
            self.of[name] += self._count(function, name, given, result)
        return result

    def _count(self, function, name, given, result) -> int:
        if name in ("gather", "scatter_"):  # of the large tensor only what the index names
            return 2 * given["index"].numel() * 4 + given["index"].nbytes
        moved = 0
        for argument in function._schema.arguments:
            if isinstance(tensor := given.get(argument.name), Tensor):
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                is_read = not (argument.is_out or (is_written and name in ("copy_", "fill_")))
                passes = 2 if name == "softmax_minus_target_" and is_written else 1
                moved += tensor.nbytes * (is_written + is_read * passes)
        if not function._schema.is_mutable:  # else they are among the arguments
            moved += sum(part.nbytes for part in [result] if isinstance(part, Tensor))
        return moved


def test_a_step_of_65536_rows_moves_at_most_25_gb_beside_its_products(by_kernel, monkeypatch):
    monkeypatch.setattr(engine.loss, "softmax_rows", lambda *given: engine.loss.GPU_CHUNK_ROWS)
    moved = {}
    for is_used in (False, True):
        by_kernel(is_used, engine.loss.GPU_CHUNK_ROWS)
        with FakeTensorMode(), BytesMoved() as counted:
            hidden = torch.empty(64, 1024, 768, requires_grad=True)
            weight = torch.empty(50257, 768, requires_grad=True)
            targets = torch.empty(64, 1024, dtype=torch.long)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                next_token_loss(hidden, weight, targets)
        moved[is_used] = counted.of
    products = {is_used: of.pop("mm") for is_used, of in moved.items()}
    assert products[True] == products[False] > 3 * 64 * 1024 * 50257 * 2
    assert sum(moved[False].values()) > 92e9
    assert sum(moved[True].values()) < 25e9


def test_where_the_kernel_does_not_compile_the_loss_is_plain_and_says_so_once(
    interpreted, monkeypatch, capsys
):
    tried = []

    def fail(*given, **options):
        tried.append(given)
        raise RuntimeError("Failed to find C compiler.\nmore")

    case = random_case(9, 16, 150, 1.0)
    expected = figures(next_token_loss, case)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(engine.loss, "INDEXED", ("cpu",))
    monkeypatch.setattr(engine.loss, "what_prevents_compiling", lambda device: None)
    monkeypatch.setattr(engine.loss, "_kernel_failed", False)
    monkeypatch.setattr(interpreted, "softmax_minus_target_", fail)
    for _ in range(3):
        found = figures(next_token_loss, case)
        assert all(map(torch.equal, found, expected))
    [line] = capsys.readouterr().out.splitlines()
    assert "Triton" in line and line.endswith("RuntimeError: Failed to find C compiler.")
    assert len(tried) == 1


def test_memory_that_runs_out_in_the_kernel_is_no_fault_of_the_kernel(
    by_kernel, interpreted, monkeypatch
):
    def fail(*given, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    by_kernel(True)
    monkeypatch.setattr(interpreted, "softmax_minus_target_", fail)
    with pytest.raises(torch.OutOfMemoryError):
        next_token_loss(*random_case(9, 16, 150, 1.0))
    assert not engine.loss._kernel_failed


def test_with_the_kernel_no_memory_is_planned_for_fp32_logits(by_kernel):
    weight, planned = nn.Parameter(torch.empty(50257, 8)), {}
    for is_used in (False, True):
        by_kernel(is_used, rows=4096)
        planned[is_used] = head_bytes(weight, 4096, Precision("bf16", "", "cpu"))
    fp32_rows = max(16, 2**20 // 50257)  # on a CPU
    assert planned[False] - planned[True] == fp32_rows * 50257 * 4


TARGETS = {"75": "fp16", "90": "bf16", "120": "fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
def test_the_kernel_compiles_for_gpus_and_moves_16_bytes_at_a_time(
    capability, compiled, tmp_path, monkeypatch
):
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = [f"*{TARGETS[capability]}", "*i64", "*fp32", "fp32", *["constexpr"] * 2]
    source = triton.compiler.ASTSource(
        compiled._softmax_kernel,
        dict(zip(compiled._softmax_kernel.arg_names, types, strict=True)),
        constexprs={(4,): 50304, (5,): 4096},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    target = GPUTarget("cuda", int(capability), 32)
    made = triton.compile(source, target=target, options={"num_warps": 8})
    assert made.asm["cubin"]
    assert ("cvt.rn.bf16" in made.asm["ptx"]) == (TARGETS[capability] == "bf16")
    loads, stores = (re.findall(rf"{op}\.global\.v4\.b32", made.asm["ptx"]) for op in ("ld", "st"))
    assert len(loads) == 2 * len(stores) >= 4
    assert re.search(r"arith\.muli .* : i64", made.asm["ttir"])  # offsets beyond 2^31


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_kernel_errs_no_more_than_the_plain_loss(autocast, compiled, monkeypatch):
    case = [part.cuda() for part in random_case(1000, 64, 50257, 0.3)]
    exact = figures(exact_loss, case, torch.float64)
    found = []
    for is_used in (False, True):
        monkeypatch.setattr(engine.loss, "_has_kernel", lambda device, is_used=is_used: is_used)
        found.append(errors(figures(next_token_loss, case, autocast=autocast), exact))
    assert not engine.loss._kernel_failed
    for plain, error, part in zip(*found, exact, strict=True):
        assert error <= 1.1 * plain + 1e-6 * part.norm().item()


class OnPretended:
    """A kernel that Triton interprets, on the memory of a pretended GPU, which must be current."""

    def __init__(self, kernel: Any, kernels: Kernels) -> None:
        self._kernel, self._kernels = kernel, kernels
        self.devices: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*given, **options) -> None:
            tensors = [arg for arg in given if isinstance(arg, Tensor)]
            assert {t.device for t in tensors} == {
                torch.device("cuda", torch.cuda.current_device())
            }
            self.devices.append(tensors[0].device.index)
            on_host = (self._kernels.on_host(a) if isinstance(a, Tensor) else a for a in given)
            self._kernel[grid](*on_host, **options)

        return launch


@on_pretended(cuda_machine((6, 1), (9, 0), (8, 0), cuda="12.6"))
def test_cuda_gpus_new_enough_take_the_kernel(kernels: Kernels, folder: Path):
    os.environ["TRITON_INTERPRET"] = "1"
    case = random_case(20, 16, 70, 1.0)
    expected = figures(next_token_loss, case)
    module = importlib.import_module("engine.loss_kernel")
    module._softmax_kernel = OnPretended(module._softmax_kernel, kernels)
    for index, precision in ((0, torch.float16), (1, torch.bfloat16), (2, torch.float32)):
        hidden, weight, targets = (part.to(f"cuda:{index}") for part in case)
        with watching(kernels) as seen:
            with torch.autocast("cuda", precision, enabled=precision != torch.float32):
                loss = next_token_loss(hidden.requires_grad_(), weight.requires_grad_(), targets)
            loss.backward()
        assert seen == []
        tolerance = 1e-6 if precision == torch.float32 else 0.02
        for part, value in zip((loss, hidden.grad, weight.grad), expected, strict=True):
            assert (part.detach().cpu() - value).norm() <= tolerance * value.norm()
    assert module._softmax_kernel.devices == [1, 2]  # Triton serves no GPU before 7.0
    assert torch.cuda.current_device() == 0
