"""A GPU whose kernels run on the CPU: torch.Tensors that are on "cuda:0", with real numbers.

`start(machine)` is called before torch is imported. It loads guard.cpp's library, which makes
tensors of a device, and gives torch._C the calls that a GPU build has. Every operation on such a
tensor then comes to `Kernels`, which runs it on the CPU and watches for what a real GPU would
refuse, get wrong, or wait for.
"""

import contextlib
import ctypes
import functools
import importlib.abc
import math
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pretend.machines import Calls, Machine, forget


class _Torch:
    """torch, imported where it is used for the first time: start() comes before."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("torch"), name)


torch = _Torch()
# a copy from memory that is not pinned is staged behind the work of the stream above this size
MOST_STAGED = 64 * 1024
KEYS = {"cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}
# the outputs of these depend on the values of their inputs, so the host waits for them
READ_BY_THE_HOST = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")


class DeviceFault(RuntimeError):
    """What a real device refuses, or computes wrongly."""


@dataclass(frozen=True)
class Wait:
    """A moment in which the host waits for the device."""

    what: str  # "read" of a value, or a "copy" to the device
    operation: str
    stack: tuple[str, ...]  # functions of the project, the outermost first


class Kernels:
    """Every operation on tensors of one kind of device, run on the CPU."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.waits: list[Wait] = []
        self.operations: set[str] = set()
        self.recording: list[tuple] | None = None  # what a CUDA graph is being made of
        self.overwritten: list[tuple] = []  # by recording, which on a real GPU computes nothing

    @property
    def machine(self) -> Machine:
        """The machine that this process is one of now."""
        return self._calls.machine

    def become(self, machine: Machine) -> None:
        """Let torch find another machine of this kind, and forget what it has seen."""
        assert machine.kind == self.machine.kind
        self._calls.install(machine)
        forget(contextlib.ExitStack())
        sys.modules["torch.version"].cuda = machine.cuda
        for index, card in enumerate(machine.visible):
            self.ops.set_limit(index, card.memory)
        self.waits.clear()

    def register(self) -> None:
        """Make these torch's kernels for the machine's kind of device."""
        self.ops = torch.ops.pretended
        key = KEYS[self.machine.kind]
        # a Library takes back what it has registered when it is gone
        self._libraries = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        self._libraries[0].fallback(self.run, key)
        self._libraries[1].impl("copy_", self.copy_, key)
        self._libraries[1].impl("_fused_sdp_choice", self.attention_kernel, key)
        if self.machine.kind != "cuda":
            # its C++ would ask a table for a kernel, in which a CPU build has no place for these
            for place in (key, f"Autograd{key}"):
                self._libraries[1].impl("scaled_dot_product_attention", _attention, place)

    def run(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """An operation: on the CPU, in the memory of its tensors, with its device's generator."""
        name = op._schema.name.removeprefix("aten::")
        self.operations.add(name)
        if name in READ_BY_THE_HOST:
            self.note_wait("read", name)
        call = _HostCall(self, op, args, kwargs)
        if self.recording is not None:
            self.keep_overwritten(*call.written())
        with torch._C._AutoDispatchBelowAutograd():
            result = call.run()
        if self.recording is not None:
            self.recording.append((call, result))
        return result

    def copy_(self, to: Any, source: Any, non_blocking: bool = False) -> Any:
        """Between two devices of any kinds, or within one."""
        pair = [to, source]
        if source.device.type == "cpu" and to.device.type != "cpu":
            waits = not (non_blocking and source.is_pinned())
            if source.nbytes > MOST_STAGED and waits:
                self.note_wait("copy", f"copy_ of {source.nbytes:,} bytes")
        elif to.device.type == "cpu" and source.device.type != "cpu":
            self.note_wait("read", "copy_")
        with torch._C._AutoDispatchBelowAutograd():
            if self.recording is not None:
                self.keep_overwritten(self.on_host(to))
            call = lambda: torch.ops.aten.copy_(*(self.on_host(x) for x in pair))  # noqa: E731
            call()
        if self.recording is not None:
            self.recording.append((call, None))
        return to

    def keep_overwritten(self, *tensors: Any) -> None:
        """Note the host's tensors that an operation is about to change."""
        self.overwritten += [(tensor, tensor.clone()) for tensor in tensors if tensor.numel()]

    def end_recording(self) -> None:
        """Leave memory as it was before a graph was recorded."""
        self.recording = None
        while self.overwritten:
            tensor, before = self.overwritten.pop()
            tensor.copy_(before)

    def attention_kernel(self, query: Any, *args: Any, **kwargs: Any) -> int:
        """The SDPBackend that torch would take: flash from capability 8.0 in half precision."""
        from torch.nn.attention import SDPBackend

        if self.machine.kind != "cuda":
            return SDPBackend.MATH.value
        is_half = query.dtype in (torch.float16, torch.bfloat16)
        has_flash = self.machine.cards[query.device.index].capability >= (8, 0) and is_half
        return (SDPBackend.FLASH_ATTENTION if has_flash else SDPBackend.EFFICIENT_ATTENTION).value

    def on_host(self, tensor: Any) -> Any:
        """A CPU tensor over the memory of a device's; a CPU's own as it is."""
        return tensor if tensor.device.type == "cpu" else self.ops.on_host(tensor)

    def note_wait(self, what: str, operation: str) -> None:
        """Keep where the project makes the host wait. While a graph is recorded it must not."""
        if self.recording is not None:
            raise DeviceFault(f"{operation} waits for the device while a graph is recorded")
        codes = [frame.f_code for frame, _ in traceback.walk_stack(None)][::-1]
        ours = [code for code in codes if _is_the_projects(code.co_filename)]
        stack = tuple(code.co_qualname for code in ours)
        self.waits.append(Wait(what, operation, stack))


@functools.cache
def _is_the_projects(file: str) -> bool:
    here = Path(__file__).resolve().parent
    path = Path(file)
    return path.is_relative_to(here.parents[1]) and not path.is_relative_to(here)


class _HostCall:
    """An operation with the host's stand-ins for its arguments."""

    def __init__(self, kernels: Kernels, op: Any, args: tuple, kwargs: dict) -> None:
        self.kernels, self.op, self.name = kernels, op, op._schema.name.removeprefix("aten::")
        self.device: Any = None
        self.given: dict[int, Any] = {}  # id of a host's tensor -> the device's
        self.generator: Any = None
        self.resized: list[tuple[Any, Any]] = []  # empty out= tensors, and what the host fills
        self.out_names = _out_names(op)
        # a number beside a tensor comes as a number, also where the operation takes tensors alone
        numbers_become_tensors = not torch._C._should_allow_numbers_as_tensors(self.name)
        self.tensor_names = _tensor_names(op) if numbers_become_tensors else frozenset()
        names = [argument.name for argument in op._schema.arguments]
        self.args = tuple(map(self._to_host, args, names))
        self.kwargs = {name: self._to_host(arg, name) for name, arg in kwargs.items()}

    def written(self) -> list[Any]:
        """The host's tensors that the operation changes."""
        import torch

        names = [argument.name for argument in self.op._schema.arguments]
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        changed = [value for name, value in given.items() if name in _written_names(self.op)]
        return [value for value in changed if isinstance(value, torch.Tensor)]

    def _to_host(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor_to_host(value, name)
        if isinstance(value, list | tuple):
            return type(value)(self._to_host(item, name) for item in value)
        if isinstance(value, torch.Generator):
            self.generator = value
            return None
        if isinstance(value, torch.device):
            self._require_one(value)
            return torch.device("cpu")
        is_number = isinstance(value, int | float)
        return torch.tensor(value) if is_number and name in self.tensor_names else value

    def _tensor_to_host(self, tensor: Any, name: str) -> Any:
        if tensor.device.type == "cpu":
            if tensor.dim() > 0:
                raise DeviceFault(
                    f"{self.name} mixes devices: a tensor of shape {tuple(tensor.shape)} is on the "
                    "CPU"
                )
            return tensor
        self._require_one(tensor.device)
        host = self.kernels.on_host(tensor)
        if name in self.out_names:
            if not any(tensor is given for given in self.given.values()):  # not in place
                self._require_plain(tensor)
            if tensor.numel() == 0:  # it may become as large as the result
                host = torch.empty(0, dtype=tensor.dtype)
                self.resized.append((tensor, host))
        self.given[id(host)] = tensor
        return host

    def _require_one(self, device: Any) -> None:
        if self.device is not None and device != self.device:
            raise DeviceFault(f"{self.name} mixes devices: {self.device} and {device}")
        self.device = device

    def _require_plain(self, out: Any) -> None:
        """Before macOS 15 Metal's graphs write to a part of a tensor as if it were all of it.

        What torch makes for a result itself is a storage of its own, whatever the strides.
        """
        macos = self.kernels.machine.macos
        if macos is None or macos >= (15, 0) or out.untyped_storage().nbytes() == out.nbytes:
            return
        if not out.is_contiguous() or out.storage_offset() > 0:
            raise DeviceFault(f"{self.name}: out= is a part of a tensor: wrong before macOS 15")

    def run(self) -> Any:
        """The operation's results, on the device."""
        if self.device is None:
            raise DeviceFault(f"{self.name} has no tensor of a device")
        result = self()
        for tensor, host in self.resized:
            self.kernels.on_host(tensor.resize_(host.shape)).copy_(host)
        return self._to_device(result)

    def __call__(self) -> Any:
        """The operation on the host; again with the same tensors where it is replayed."""
        if torch.Tag.nondeterministic_seeded not in self.op.tags:
            return self.op(*self.args, **self.kwargs)
        own = self.generator or _default_generator(self.device)
        before = torch.get_rng_state()
        torch.set_rng_state(own.get_state())
        try:
            return self.op(*self.args, **self.kwargs)
        finally:
            own.set_state(torch.get_rng_state())
            torch.set_rng_state(before)

    def _to_device(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in self.given:
                return self.given[id(value)]
            places = {
                tensor.untyped_storage().data_ptr(): tensor
                for tensor in self.given.values()
                if tensor.numel()
            }
            if value.numel() and value.untyped_storage().data_ptr() in places:
                raise NotImplementedError(f"{self.name} gives a view: register it in guard.cpp")
            return self.kernels.ops.on_device(value, self.device.index or 0)
        if isinstance(value, list | tuple):
            return type(value)(self._to_device(item) for item in value)
        return value


def _attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -math.inf)
    attention = torch.ops.aten._scaled_dot_product_attention_math
    return attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[
        0
    ]


@functools.cache
def _written_names(op: Any) -> frozenset[str]:
    written = (
        a for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    )
    return frozenset(argument.name for argument in written)


@functools.cache
def _out_names(op: Any) -> frozenset[str]:
    keywords = {a.name for a in op._schema.arguments if a.kwarg_only}
    return _written_names(op) & keywords


@functools.cache
def _tensor_names(op: Any) -> frozenset[str]:
    return frozenset(a.name for a in op._schema.arguments if str(a.type) == "Tensor")


def _default_generator(device: Any) -> Any:
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    module = getattr(torch, device.type)
    module.init()
    return module.default_generators[device.index]


# ------------------------------------------------------------------------ streams and graphs


def _stream_calls(kernels: Kernels) -> dict[str, Any]:
    """torch._C's streams, events and graphs of CUDA. All work is done at once, in order."""

    class StreamBase:
        def __new__(cls, priority=0, stream_id=0, device_index=0, device_type=1, **kwargs):
            self = super().__new__(cls)
            self.stream_id, self.device_index, self.device_type = stream_id, device_index, 1
            self.device, self.cuda_stream = torch.device("cuda", device_index), stream_id
            return self

        def query(self):
            return True

        def synchronize(self):
            kernels.note_wait("read", "Stream.synchronize")

        def __eq__(self, other):
            return self.stream_id == other.stream_id

    class EventBase:
        cuda_event = 1

        def __new__(cls, **kwargs):
            return super().__new__(cls)

        def record(self, stream):
            pass

        def wait(self, stream):
            pass

        def query(self):
            return True

        def synchronize(self):
            kernels.note_wait("read", "Event.synchronize")

    class Graph:
        def __new__(cls, keep_graph=False):
            return super().__new__(cls)

        def capture_begin(self, pool=None, capture_error_mode="global"):
            kernels.recording = self.calls = []

        def capture_end(self):
            import torch

            with torch._C._AutoDispatchBelowAutograd():
                kernels.end_recording()

        def replay(self):
            with torch._C._AutoDispatchBelowAutograd():
                for call, results in self.calls:
                    _copy_into(results, call(), kernels)

        def reset(self):
            self.calls = []

        def pool(self):
            return (0, 0)

    streams = {"current": 0}

    def set_stream(stream_id, device_index, device_type):
        streams["current"] = stream_id

    return {
        "_CudaStreamBase": StreamBase,
        "_CudaEventBase": EventBase,
        "_CUDAGraph": Graph,
        "_graph_pool_handle": lambda: (0, 0),
        "_cuda_isCurrentStreamCapturing": lambda: kernels.recording is not None,
        "_cuda_getCurrentStream": lambda index: (streams["current"], index, 1),
        "_cuda_getDefaultStream": lambda index: (0, index, 1),
        "_cuda_setStream": set_stream,
    }


def _copy_into(results: Any, new: Any, kernels: Kernels) -> None:
    """Put new numbers where a recorded operation has left its results; in-place ones are there."""
    if isinstance(results, torch.Tensor):
        place = kernels.on_host(results)
        if place.data_ptr() != new.data_ptr():
            place.copy_(new)
    elif isinstance(results, list | tuple):
        for result, value in zip(results, new, strict=True):
            _copy_into(result, value, kernels)


# ------------------------------------------------------------------------------------- start


class _BeforeTorchCuda(importlib.abc.MetaPathFinder):
    """Sets torch._C's calls when torch.cuda is about to be imported: it looks for them then."""

    def __init__(self, names: dict[str, Any], cuda: str | None) -> None:
        self._names, self._cuda = names, cuda

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "torch.cuda":
            sys.meta_path.remove(self)
            for call, value in self._names.items():
                setattr(sys.modules["torch._C"], call, value)
            import torch.version

            torch.version.cuda = self._cuda


def start(machines: tuple[Machine, ...], library: Path) -> Kernels:
    """Turn this process, in which torch is not imported yet, into the first of some machines.

    All are of one kind; Kernels.become() makes it another of them.
    """
    assert "torch" not in sys.modules, "torch has looked for devices already"
    first = machines[0]
    n_devices = max(len(machine.cards) for machine in machines)
    os.environ["PRETENDED_DEVICES"] = f"{first.kind}:{n_devices}"
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    calls = _CallsWithDevices(first)
    kernels = Kernels(calls)
    names = calls.names | (_stream_calls(kernels) if first.kind == "cuda" else {})
    sys.meta_path.insert(0, _BeforeTorchCuda(names, first.cuda))
    kernels.register()
    return kernels


class _CallsWithDevices(Calls):
    """The C calls of a machine whose devices are there, as guard.cpp has them."""

    def allocated(self, index: int) -> int:
        return torch.ops.pretended.allocated(index)

    def peak(self, index: int) -> int:
        return torch.ops.pretended.peak(index)

    def reset_peak(self, index: int) -> None:
        torch.ops.pretended.reset_peak(index)

    def set_fraction(self, fraction: float, index: int) -> None:
        super().set_fraction(fraction, index)
        size = self.machine.visible[index].memory
        torch.ops.pretended.set_limit(index, int(fraction * size))

    def make_generator(self, index: int) -> Any:
        return torch.Generator(torch.device(self.machine.kind, index))

    def get_device(self) -> int:
        return torch.accelerator.current_device_index()

    def set_device(self, index: int) -> None:
        torch.accelerator.set_device_index(index)


@contextlib.contextmanager
def watching(kernels: Kernels) -> Iterator[list[Wait]]:
    """The waits of a stretch of a program, filled when it is over."""
    seen: list[Wait] = []
    first = len(kernels.waits)
    yield seen
    seen += kernels.waits[first:]
