"""Files made to do harm, for tests of everything that reads a file of a stranger's."""

import ast
import functools
import hashlib
import json
import pickle
import random
from pathlib import Path

from storage import files as storage
from tests.conftest import REPOSITORY


def reseal(folder: Path, **facts) -> None:
    """Write the manifest that fits a folder's files, with other facts: any forger can do that."""
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())["content"]
    for name in content["files"]:
        data = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_bytes(storage._seal(content | facts))


class Canary:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "executed"))


def status_of_this_process(name: str) -> int:
    """Bytes by Linux's name."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


@functools.cache
def project_trees() -> dict[str, ast.Module]:
    """Every module of the project but its tests, parsed, by its path."""
    found = {}
    for path in REPOSITORY.rglob("*.py"):
        parts = path.relative_to(REPOSITORY).parts
        others = {"tests", "cache", "runs"} & set(parts)
        if not others and not any(part.startswith((".", "venv")) for part in parts):
            found["/".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def file_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return size.to_bytes(8, "little") + header + data


def entry(dtype: object = "F32", shape: object = (11, 4), offsets: object = (0, 176)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def tensor_file(n_bytes: int = 176, **told) -> bytes:
    """A file of one tensor that is told in this way."""
    return file_of(json.dumps({"head.weight": entry(**told)}).encode(), bytes(n_bytes))


TENSOR = json.dumps({"head.weight": entry()}).encode()
HOSTILE_TENSORS = {
    "a pickle": pickle.dumps({"head.weight": [0.5]}),
    "nothing": b"",
    "a header of 16 EB": file_of(b"{}", length=2**64 - 1),
    "a header longer than the file": file_of(b"{}", length=10_000),
    "a header of blanks": file_of(b"{" + b" " * 10_000_000 + b"}"),
    "no object": file_of(b"[1, 2]"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "deep": file_of(b"[" * 100_000 + b"]" * 100_000),
    "one name twice": file_of(TENSOR[:-1] + b", " + TENSOR[1:], bytes(176)),
    "negative offsets": tensor_file(offsets=(-176, 0)),
    "offsets past the end": tensor_file(offsets=(0, 10**15)),
    "offsets backwards": tensor_file(offsets=(176, 0)),
    "a long shape": tensor_file(shape=(2**63, 2**63)),
    "a shape that overflows to 0": tensor_file(0, shape=(2**32, 2**32), offsets=(0, 0)),
    "a negative shape": tensor_file(shape=(-11, -4)),
    "a shape of words": tensor_file(shape="eleven"),
    "half of a byte": tensor_file(dtype="F4", shape=(11, 32)),
    "complex numbers": tensor_file(dtype="C64", shape=(22,)),
    "bytes after the end": tensor_file(1000),
    "no tensors": file_of(b"{}"),
    "one tensor of many": tensor_file(),
}


def hostile_json(count: int) -> dict[str, bytes]:
    """JSON documents, and what is none; the long ones have this many parts."""
    deep = b"[" * 100_000 + b"]" * 100_000
    keys = json.dumps({f"key {i}": i for i in range(count)}).encode()
    return {
        "nothing": b"",
        "deep": deep,
        "deep vocabulary": b'{"model": {"vocab": ' + deep + b"}}",
        "many keys": keys,
        "many tokens": b'{"model": {"vocab": ' + keys + b"}}",
        "many merges": b'{"model": {"vocab": {}, "merges": [' + b"0," * count + b"0]}}",
        "many lists": b"[" + b"[]," * count + b"[]]",
        "a long number": b'{"model": ' + b"9" * 100_000 + b"}",
        "a long fraction": b'{"model": 1e' + b"9" * 100_000 + b"}",
        "not UTF-8": b'{"model": "\xff\xfe"}',
        "UTF-16": '{"model": {}}'.encode("utf-16"),
        "zeros": bytes(100_000),
        "2 MB": b" " * (2 << 20),
        "NaN": b'{"model": NaN, "vocab": -Infinity}',
        "null": b"null",
        "an empty object": b"{}",
    }


PIECES = [b"-", b"9" * 30, b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"1e999", b"\\u"]
PIECES += [b"true", b"0", b"-1", b"1.5", b"[]", b"{}", b'""', b"\x1b[2J", b"\xff", b"65536"]


def mutated(content: bytes, chooser: random.Random) -> bytes:
    """Some bytes of a file changed, cut out, doubled, or numbers and words replaced."""
    changed = bytearray(content)
    for _ in range(chooser.randrange(1, 4)):
        place, length = chooser.randrange(len(changed) + 1), chooser.randrange(1, 12)
        way = chooser.random()
        if way < 0.25 and place < len(changed):
            changed[place] = chooser.randrange(256)
        elif way < 0.7:
            changed[place : place + length] = chooser.choice(PIECES)
        elif way < 0.85:
            changed[place:place] = changed[place : place + length]
        else:
            del changed[place : place + length]
    return bytes(changed)
