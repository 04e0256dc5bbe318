"""The GGUF container: read from files of strangers, and written.

A header has metadata (keys with values) and, of each tensor, its name, shape, kind and place; the
tensors' bytes follow. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import errno
import itertools
import math
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from engine.errors import CheckpointError, SettingsError, first_line
from engine.settings import shown
from exchange.pretrained import fingerprint_of

T = TypeVar("T")

LIBRARY = "gguf==0.19.0"  # it is needed for the kinds that store numbers in blocks
VERSIONS = (2, 3)  # they differ in the byte order alone, which is little-endian here
MOST_HEADER_BYTES = 32 << 20  # Llama 3's header has 8 MB
MOST_KEYS, MOST_TENSORS, MOST_ITEMS = 4096, 20_000, 600_000  # items: of all lists together
MOST_DIMENSIONS = 4
ALIGNMENT = 32  # of each tensor's first byte, where the metadata don't say otherwise
# the kinds of tensors: their number in the format, and a block's numbers and bytes
KINDS = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "BF16": (30, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {number: name for name, (number, _, _) in KINDS.items()}
# the types of metadata: NumPy's dtype of each number in the format
_NUMBERS = {
    0: "B",
    1: "b",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in a file, and how it is stored."""

    shape: tuple[int, ...]  # as torch has it: the last dimension is contiguous
    kind: str  # of KINDS
    start: int  # its first byte in the file
    n_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A file whose header has been read and checked; no tensor has been read."""

    path: Path
    metadata: dict[str, Any]  # numbers, strings, and lists of either
    tensors: dict[str, StoredTensor]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A value of the metadata; CheckpointError if it is of another kind, or missing."""
        value = self.metadata.get(key, default)
        if value is None:
            raise unusable(self.path, f"it lacks {key}")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise unusable(self.path, f"its {key} is {shown(value)}")
        return value

    def items(self, key: str, kind: type[T], default: list[T] | None = None) -> list[T]:
        """A list of the metadata; CheckpointError if it is missing or has items of another kind."""
        values = self.get(key, list, default)
        if not all(isinstance(value, kind) for value in values):
            raise unusable(self.path, f"its {key} is {shown(values[:3])}")
        return values

    def read(self, name: str) -> torch.Tensor:
        """A tensor in fp32.

        Raises CheckpointError if its bytes can't be read, or are no finite numbers; SettingsError
        without the library that its kind needs.
        """
        stored = self.tensors[name]
        try:
            raw = np.fromfile(self.path, np.uint8, count=stored.n_bytes, offset=stored.start)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if len(raw) < stored.n_bytes:
            raise unusable(self.path, f"it ends within {name}")
        values = _decode(torch.from_numpy(raw), stored)
        if not torch.isfinite(torch.stack(torch.aminmax(values))).all():  # nan is in both
            raise unusable(self.path, f"{name} has numbers that are not finite")
        return values

    def fingerprint(self) -> str:
        """What tells these weights from others."""
        try:
            content = torch.from_numpy(np.memmap(self.path, np.uint8, mode="c"))
        except (OSError, ValueError) as error:
            raise unusable(self.path, first_line(error)) from error
        return fingerprint_of(
            {
                f"{name} {stored.kind}": content[stored.start : stored.start + stored.n_bytes]
                for name, stored in self.tensors.items()
            }
        )


def read_header(path: Path) -> GGUFFile:
    """Read and check the header of a GGUF file.

    Raises CheckpointError if it can't be read, is damaged or has tensors of a kind not in KINDS.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or device may never end
            raise OSError(errno.EINVAL, "it is no regular file")
        with open(path, "rb") as file:
            content = file.read(MOST_HEADER_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        metadata, tensors = _Header(content).parse(found.st_size)
    except ValueError as error:  # also of text that is not UTF-8
        raise unusable(path, first_line(error)) from None
    return GGUFFile(path, metadata, tensors)


class _Header:
    """A header while it is parsed; each method raises ValueError for what can't be."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0
        self._n_items = 0

    def parse(self, file_bytes: int) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        """The metadata, and the tensors of a file of so many bytes."""
        if self._take(4) != b"GGUF":
            raise ValueError('its first bytes are not "GGUF"')
        version = self._number(_UINT32)
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version}, and {VERSIONS} are known")
        n_tensors = self._count(MOST_TENSORS, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(MOST_KEYS, "metadata keys")):
            key = self._string()
            if key in metadata:
                raise ValueError(f"its metadata have {key[:80]!r} twice")
            metadata[key] = self._value(self._number(_UINT32))
        infos: dict[str, tuple[tuple[int, ...], str, int]] = {}
        for _ in range(n_tensors):
            name = self._string()
            if name in infos:
                raise ValueError(f"it has a tensor {name[:80]!r} twice")
            infos[name] = self._tensor(name)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment not in (8, 16, 32, 64, 128, 256, 4096):
            raise ValueError(f"its alignment is {alignment!r:.80}")
        first = -(-self._at // alignment) * alignment
        return metadata, _placed(infos, first, alignment, file_bytes)

    def _take(self, n_bytes: int) -> bytes:
        end = self._at + n_bytes
        if end > len(self._content):
            is_cut = len(self._content) == MOST_HEADER_BYTES
            limit = f"its header is longer than {MOST_HEADER_BYTES:,} bytes"
            raise ValueError(limit if is_cut else "it ends within its header")
        taken = self._content[self._at : end]
        self._at = end
        return taken

    def _number(self, kind: int) -> Any:
        dtype = np.dtype(_NUMBERS[kind])
        value = np.frombuffer(self._take(dtype.itemsize), dtype)[0]
        return float(str(value)) if kind == _FLOAT32 else value.item()  # 1e-05, not 9.99999975e-06

    def _length(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def _count(self, most: int, what: str) -> int:
        count = self._length()
        if count > most:
            raise ValueError(f"it claims {count:,} {what}, and {most:,} are the most")
        return count

    def _string(self) -> str:
        return self._take(self._length()).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(kind)
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"its metadata have a value of type {kind}")
        kind = self._number(_UINT32)
        count = self._count(MOST_ITEMS - self._n_items, "items in its lists")
        self._n_items += count
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        if kind not in _NUMBERS:  # a list of lists may nest without end
            raise ValueError(f"its metadata have a list of values of type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _tensor(self, name: str) -> tuple[tuple[int, ...], str, int]:
        """A tensor's shape, kind and offset from the first one."""
        n_dimensions = self._number(_UINT32)
        if not 1 <= n_dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{name[:80]!r} has {n_dimensions} dimensions")
        shape = tuple(self._length() for _ in range(n_dimensions))[::-1]
        number = self._number(_UINT32)
        if number not in _NAMES:
            known = ", ".join(KINDS)
            raise ValueError(f"{name[:80]!r} is of kind {number}, and known are {known}")
        return shape, _NAMES[number], self._length()


def _placed(
    infos: dict[str, tuple[tuple[int, ...], str, int]], first: int, alignment: int, file_bytes: int
) -> dict[str, StoredTensor]:
    """The tensors, none of which may overlap another or go beyond the file; else ValueError."""
    placed = {}
    for name, (shape, kind, offset) in infos.items():
        _, in_block, block_bytes = KINDS[kind]
        n_blocks, rest = divmod(math.prod(shape), in_block)
        n_bytes = n_blocks * block_bytes
        if not n_bytes or rest or shape[-1] % in_block or offset % alignment:
            raise ValueError(f"{name[:80]!r} can't be {kind} of shape {shape} at {offset}")
        if first + offset + n_bytes > file_bytes:
            raise ValueError(f"it ends before the end of {name[:80]!r}")
        placed[name] = StoredTensor(shape, kind, first + offset, n_bytes)
    in_order = sorted(placed.values(), key=lambda stored: stored.start)
    if any(a.start + a.n_bytes > b.start for a, b in itertools.pairwise(in_order)):
        raise ValueError("its tensors overlap")
    return placed


def gguf_chunks(
    metadata: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], kinds: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """A GGUF file in chunks: its header, then each tensor, converted when its turn comes.

    Metadata are strings, bools, whole numbers (written as uint32), floats (float32), and lists of
    strings or numbers (int32, float32). kinds has each tensor's, of KINDS. Raises SettingsError
    without the library that a kind needs.
    """
    header = [b"GGUF", struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_text(key), _encode_value(value)]
    offset = 0
    for name, value in tensors.items():
        number, in_block, block_bytes = KINDS[kinds[name]]
        shape = value.shape[::-1]
        header += [_text(name), struct.pack(f"<I{len(shape)}QI", len(shape), *shape, number)]
        header.append(struct.pack("<Q", offset))
        offset += _aligned(value.numel() // in_block * block_bytes)
    text = b"".join(header)
    yield text.ljust(_aligned(len(text)), b"\0")
    for name, value in tensors.items():
        encoded = memoryview(_encode(value, kinds[name]).data)
        yield encoded
        yield bytes(_aligned(len(encoded)) - len(encoded))


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _encode_value(value: Any) -> bytes:
    """A value of the metadata, its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    kind = _INT32 if all(isinstance(item, int) for item in value) else _FLOAT32
    numbers = np.array(value, _NUMBERS[kind]).tobytes()
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + numbers


def _decode(raw: torch.Tensor, stored: StoredTensor) -> torch.Tensor:
    """A tensor's bytes as fp32."""
    if stored.kind in _DTYPES:
        return raw.view(_DTYPES[stored.kind]).to(torch.float32).view(stored.shape)
    rows = raw.view(-1, stored.n_bytes // math.prod(stored.shape[:-1])).numpy()
    quants, kind = _library(stored.kind)
    return torch.from_numpy(quants.dequantize(rows, kind)).view(stored.shape)


def _encode(tensor: torch.Tensor, kind: str) -> np.ndarray:
    """The bytes of a tensor stored as one of KINDS."""
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    if kind in _DTYPES:
        stored = values.to(_DTYPES[kind])
        if not torch.isfinite(stored).all():
            raise SettingsError(f"a weight is beyond {kind}'s range: export to bf16 or fp32.")
        return stored.view(torch.uint8).flatten().numpy()
    quants, number = _library(kind)
    return quants.quantize(values.numpy(), number).reshape(-1)


def require_library(kinds: Iterable[str]) -> None:
    """Raise SettingsError if one of these kinds of tensors needs a library that is missing."""
    for kind in kinds:
        if kind not in _DTYPES:
            _library(kind)


def _library(kind: str) -> tuple[Any, Any]:
    """The module that converts blocks, and what it calls a kind; SettingsError if it is missing."""
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise SettingsError(f"weights in {kind} need a library: pip install {LIBRARY}") from None
    return quants, GGMLQuantizationType[kind]


def unusable(path: Path, fault: str) -> CheckpointError:
    """The error for a file that is damaged, or of a kind that can't be used."""
    return CheckpointError(
        f"can't use {path}: {fault}.\n"
        f"It may be an intact GGUF file of a llama, qwen3 or gpt2 model, in {', '.join(KINDS)}."
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"can't read {path}: {error.strerror or error}.")
