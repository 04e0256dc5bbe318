"""What is decided before the first tensor, on machines that are pretended; torch's Python is real.

Runs on them are in test_pretended_runs.py.
"""

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import main
from engine.devices import free_memory, limit_memory
from engine.errors import ResourceError
from engine.precision import choose_precision
from planning.machine import pick_device
from tests.pretend.machines import (
    ARCHITECTURES,
    CARDS,
    CPU_BUILD_BESIDE_A_GPU,
    GB,
    XPU_MACHINE,
    Machine,
    cuda_machine,
    mac,
    pretended,
)

# what each capability trains in, with the builds of torch that have kernels for it
PRECISIONS = {
    (6, 0): ("fp32", ["12.6"]),
    (6, 1): ("fp32", ["12.6"]),
    (7, 0): ("fp16", ["12.6"]),
    (7, 5): ("fp16", ["12.6", "13.0"]),
    (8, 0): ("bf16", ["12.6", "13.0"]),
    (8, 6): ("bf16", ["12.6", "13.0"]),
    (8, 9): ("bf16", ["12.6", "13.0"]),
    (9, 0): ("bf16", ["12.6", "13.0"]),
    (10, 0): ("bf16", ["13.0"]),
    (12, 0): ("bf16", ["13.0"]),
}
DRIVER_TOO_OLD = cuda_machine((8, 6), cuda="13.0", driver_too_old=True)


@pytest.fixture
def pretend(tmp_path) -> Iterator:
    """Makes this process one of a machine, until the test is over."""
    with contextlib.ExitStack() as undo:
        yield lambda machine: undo.enter_context(pretended(machine, tmp_path))


def run_main(folder: Path, settings: str = "") -> tuple[int, str]:
    """The exit code and the output of main.py, with a text that ends it where it would be read."""
    (folder / "settings.py").write_text(f'DATA = "no-such-file.txt"\n{settings}\n')
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main.main(["settings.py"])
    return code, said.getvalue()


NO_TEXT = 3  # the exit code of run_main where a device was found


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("cuda", ARCHITECTURES)
def test_a_cuda_gpu_is_used_where_the_build_has_kernels_for_it(
    capability, cuda, pretend, workdir, recwarn
):
    pretend(cuda_machine(capability, cuda=cuda))
    code, said = run_main(workdir)
    expected, builds = PRECISIONS[capability]
    if cuda in builds:
        assert code == NO_TEXT
        assert f"GPU: {CARDS[capability].name}\n" in said
        assert f"Precision: {expected} (" in said
        return
    assert code == 6
    error = said[said.index("ResourceError") :]
    assert len(error.splitlines()) <= 4
    assert CARDS[capability].name in error
    serves = {"12.6": "cu126", "13.0": "cu130"}[builds[0]]
    assert "pip install " in error and f"/{serves}" in error


@pytest.mark.parametrize("capability", [(8, 6), (6, 1)])
def test_a_build_without_cuda_beside_a_gpu_names_the_one_that_serves_it(
    capability, pretend, workdir
):
    pretend(Machine("cpu", (CARDS[capability],), has_nvidia_smi=True))
    serves = "cu126" if capability < (7, 5) else "cu130"
    code, said = run_main(workdir)
    assert code == NO_TEXT
    assert "Device: CPU" in said
    assert CARDS[capability].name in said and f"/{serves}" in said
    code, said = run_main(workdir, 'DEVICE = "cuda"')
    assert code == 6
    assert f"/{serves}" in said


def test_a_driver_too_old_for_the_build_is_named(pretend, workdir, recwarn):
    pretend(DRIVER_TOO_OLD)
    assert not torch.cuda.is_available()
    code, said = run_main(workdir)
    assert code == NO_TEXT
    assert "Device: CPU" in said
    assert "driver" in said
    code, said = run_main(workdir, 'DEVICE = "cuda"')
    assert code == 6
    assert "driver" in said
    assert len(said[said.index("ResourceError") :].splitlines()) <= 4


def test_no_gpu_is_made_up_where_there_is_none(pretend, workdir):
    pretend(Machine("cpu"))
    code, said = run_main(workdir)
    assert code == NO_TEXT
    assert "nvidia" not in said.lower() and "pip install" not in said


def test_of_two_gpus_each_has_its_own_memory_and_index(pretend):
    pretend(cuda_machine((7, 5), (9, 0), cuda="13.0"))
    assert pick_device(None) == torch.device("cuda:0")
    assert choose_precision("auto", torch.device("cuda:0")).name == "fp16"
    second = pick_device("cuda:1")
    assert second == torch.device("cuda:1")
    assert choose_precision("auto", second).name == "bf16"
    assert pick_device("cuda") == second  # it is the current one by now
    assert [free_memory(torch.device("cuda", i)) for i in (0, 1)] == [16 * GB, 80 * GB]
    assert limit_memory(second, 0.5)
    assert [free_memory(torch.device("cuda", i)) for i in (0, 1)] == [16 * GB, 40 * GB]
    with pytest.raises(ResourceError, match="cuda:0, cuda:1"):
        pick_device("cuda:2")


def test_one_of_two_gpus_is_used_and_said_to_be(pretend, workdir):
    pretend(cuda_machine((8, 0), (9, 0)))
    assert "one of 2 GPUs is used" in run_main(workdir)[1]
    assert f"GPU: {CARDS[9, 0].name}" in run_main(workdir, 'DEVICE = "cuda:1"')[1]


@pytest.mark.parametrize("macos", [14, 15])
def test_a_mac_is_used_with_its_gpu(macos, pretend, workdir):
    pretend(mac(macos))
    code, said = run_main(workdir)
    assert code == NO_TEXT
    assert "Device: MPS\nGPU: Apple Silicon\n" in said
    device = pick_device("mps")
    assert free_memory(device) == 16 * GB


def test_an_intel_gpu_is_used(pretend, workdir):
    pretend(XPU_MACHINE)
    code, said = run_main(workdir)
    assert code == NO_TEXT
    assert f"GPU: {XPU_MACHINE.cards[0].name}\n" in said
    assert pick_device("xpu") == torch.device("xpu:0")
    assert free_memory(torch.device("xpu:0")) == 16 * GB


@pytest.mark.parametrize(
    "machine",
    [cuda_machine((7, 5)), DRIVER_TOO_OLD, mac(15), XPU_MACHINE, CPU_BUILD_BESIDE_A_GPU],
    ids=str,
)
def test_nothing_is_left_of_a_pretended_machine(machine, tmp_path, workdir, recwarn):
    def facts() -> list:
        modules = ["_C", "cuda", "cuda.graphs", "mps", "backends.mps", "xpu", "version"]
        return [dict(vars(sys.modules[f"torch.{name}"])) for name in modules]

    with pretended(Machine("cpu"), tmp_path):  # what torch imports at first use is there by now
        run_main(workdir)
    before = facts()
    with pretended(machine, tmp_path):
        run_main(workdir)
    after = facts()
    for module_before, module_after in zip(before, after, strict=True):
        assert module_before.keys() == module_after.keys()
        changed = [n for n, value in module_before.items() if module_after[n] is not value]
        assert changed == []
