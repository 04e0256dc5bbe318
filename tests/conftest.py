"""What the tests share: the real texts beside the project, a place to run in, and the processor.

GPT_PRETEND_CPU is the bf16 unit that torch is to report: avx512_bf16, amx_bf16, or none. Every
choice by the processor then goes that way, in this process and its forks; the arithmetic stays
right on any processor, but is slow in bf16 without such a unit.
"""

import contextlib
import gc
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
BF16_UNITS = ("avx512_bf16", "amx_bf16")
LETTERS = ("abcd efgh hgfe " * 200)[:3000]


def pytest_configure(config: pytest.Config) -> None:
    """Begin on one thread, with the bf16 units that GPT_PRETEND_CPU names where it is set."""
    torch.set_num_threads(1)  # as in one_thread(), for what a whole file's tests share
    pretended = os.environ.get("GPT_PRETEND_CPU")
    if not pretended:
        return
    if pretended not in (*BF16_UNITS, "none"):
        raise pytest.UsageError(
            f"GPT_PRETEND_CPU is {pretended!r}; it must be {', '.join(BF16_UNITS)} or none"
        )
    units = {unit: unit == pretended for unit in BF16_UNITS}
    real = getattr(torch.cpu, "get_capabilities", dict)
    torch.cpu.get_capabilities = lambda: real() | units


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector from what is imported here: all of it stays to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


class HostReads(TorchDispatchMode):
    """Counts the operations that read a number from the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def train_in(folder: Path, settings: str) -> Path:
    """Train with settings, whose RUN_NAME is "tiny", in a folder, in silence and without a picture,
    which takes longer; the run's path."""
    import main
    import storage.cache

    (folder / "settings.py").write_text(settings, encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        patch.setattr(storage.cache, "CACHE", folder / "cache")
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert main.main(["settings.py"]) == 0
    torch.set_num_threads(threads)
    return folder / "runs" / "tiny"


def train_on_letters(folder: Path, **params: Any) -> Path:
    """Train on LETTERS with custom_params, as train_in()."""
    (folder / "text.txt").write_text(LETTERS, encoding="utf-8")
    names = "DATA, TOKENIZER, CUSTOM_MODE, RUN_NAME, PRECISION"
    values = '"text.txt", "char", True, "tiny", "fp32"'
    return train_in(folder, f"{names} = {values}\ncustom_params = {params!r}\n")


@pytest.fixture
def shared_data() -> Path:
    """The folder of real texts; a test that needs it skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real texts at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """An empty working directory and an empty cache, with the settings as they are shipped."""
    import storage.cache

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage.cache, "CACHE", tmp_path / "cache")
    monkeypatch.delitem(sys.modules, "config_run", raising=False)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    """As without matplotlib: drawing takes longer than all the rest of a run."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def kernel(monkeypatch):
    """As in a notebook's kernel without widgets."""
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", ipython)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other over tensors this small, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)  # a prepared run sets it, and hypothesis minds


@pytest.fixture(autouse=True)
def time_for_all(monkeypatch):
    """No line, picture or sample is left out because the machine is slow or the test is fast."""
    from engine import console
    from training import spacing

    monkeypatch.setattr(console, "SPARE_LINES", 1_000_000)
    monkeypatch.setattr(spacing, "EXTRAS_GRACE_S", 1e9)
