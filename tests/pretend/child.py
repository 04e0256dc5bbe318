"""Run a test in a process of its own whose torch finds a pretended GPU."""

import functools
import hashlib
import importlib
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pretend.machines import Machine

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("guard.cpp")
BUILD_SECONDS, TEST_SECONDS = 300, 300


def on_pretended(*machines: Machine) -> Callable[[Callable], Callable]:
    """Make a test one that runs once on each of these machines, all of one kind, in one process.

    It is given the Kernels and an empty folder, the working directory, and is slow: it is skipped
    where there is no C++ compiler for guard.cpp.
    """

    def decorate(test: Callable) -> Callable:
        @pytest.mark.slow
        @functools.wraps(test)
        def in_child(tmp_path, pytestconfig):
            keeps = hasattr(pytestconfig, "cache")  # not with -p no:cacheprovider
            cache = Path(pytestconfig.cache.mkdir("pretended")) if keeps else tmp_path
            library = build_guard(cache)
            place = f"tests.{Path(test.__code__.co_filename).stem}:{test.__qualname__}"
            paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
            environment["OMP_NUM_THREADS"] = "1"  # threads only wait for each other over so little
            if sys.dont_write_bytecode:  # compiling torch's Python takes longer than the tests
                environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache)}
            done = subprocess.run(
                [sys.executable, "-m", "tests.pretend.child", place, str(library)],
                input=pickle.dumps(machines),
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TEST_SECONDS,
            )
            assert done.returncode == 0, done.stdout.decode("utf-8", "replace")[-12_000:]

        del in_child.__wrapped__  # pytest would ask for the arguments of what it wraps
        in_child.body = test
        return in_child

    return decorate


def build_guard(folder: Path) -> Path:
    """guard.cpp's library, compiled once for this source and this torch, in a folder.

    Skips the test where it can't be: without a compiler, or beside kernels of a real GPU.
    """
    import torch
    from torch.utils import cpp_extension

    if sys.platform != "linux":
        pytest.skip("the pretended GPU's library is built on Linux")
    if torch.version.cuda or torch.version.hip or torch._C._has_xpu:
        pytest.skip(
            "a GPU is pretended in a CPU build of torch, and this one has kernels of its own"
        )
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler (g++) for the pretended GPU")
    import fcntl

    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"guard-{key}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's other worker may be at it
        if library.exists():
            return library
        partial = folder / "partial.so"
        [libraries] = cpp_extension.library_paths()
        command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O0", str(SOURCE), "-o"]
        command += [str(partial), f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
        command += [f"-I{path}" for path in cpp_extension.include_paths()]
        command += ["-ltorch_cpu", "-lc10"]
        built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        assert built.returncode == 0, built.stderr[-6000:]
        os.replace(partial, library)
    return library


def run_here(place: str, library: Path, machines: tuple[Machine, ...]) -> None:
    """The child's whole life: pretend, then call the test's body for each machine."""
    from tests.pretend import device

    kernels = device.start(machines, library)  # before torch is imported by the test's module
    module, _, name = place.partition(":")
    body = getattr(importlib.import_module(module), name).body
    start = Path.cwd()
    for number, machine in enumerate(machines):
        kernels.become(machine)
        print(f"--- {name} on {machine}", flush=True)
        folder = start / str(number)
        folder.mkdir()
        os.chdir(folder)
        body(kernels, folder)


if __name__ == "__main__":
    run_here(sys.argv[1], Path(sys.argv[2]), pickle.load(sys.stdin.buffer))
    sys.stdout.flush()
    os._exit(0)  # autograd's threads for the pretended GPUs can abort Python's end
