"""What is decided before the first tensor, on machines that are pretended; torch's Python is real.

Runs on them are in test_pretended_runs.py.
"""

import contextlib
import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed

import main
import planning.machine
from distributed import parallel
from distributed.parallel import Parallel
from engine.devices import free_memory, limit_memory
from engine.errors import ResourceError, SettingsError
from engine.precision import choose_precision
from planning.machine import pick_device
from tests.pretend.machines import (
    ARCHITECTURES,
    CARDS,
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
NO_TEXT, NO_DEVICE = 3, 6  # the exit codes of run_main where a device was found, and was not


@pytest.fixture
def pretend(tmp_path) -> Iterator:
    """Makes this process one of a machine, until the test is over."""
    with contextlib.ExitStack() as undo:
        yield lambda machine: undo.enter_context(pretended(machine, tmp_path))


def run_main(folder: Path, device: str | None = None) -> tuple[int, str]:
    """The exit code and the output of main.py, with a text that ends it where it would be read."""
    (folder / "settings.py").write_text(f'DATA = "no-such-file.txt"\nDEVICE = {device!r}\n')
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        # these machines compute nothing, so that no trial can compare bf16 with fp32
        patch.setattr(planning.machine, "_faster_precision", lambda precision, choices: precision)
        code = main.main(["settings.py"])
    return code, said.getvalue()


def cuda_cases() -> Iterator[tuple]:
    for capability, cuda in itertools.product(PRECISIONS, ARCHITECTURES):
        machine, name = cuda_machine(capability, cuda=cuda), CARDS[capability].name
        precision, builds = PRECISIONS[capability]
        if cuda in builds:
            yield machine, None, NO_TEXT, [f"GPU: {name}\n", f"Precision: {precision} ("]
        else:
            serves = {"12.6": "/cu126", "13.0": "/cu130"}[builds[0]]
            yield machine, None, NO_DEVICE, [name, "pip install ", serves]


def cases_without_cuda() -> Iterator[tuple]:
    """Builds of torch without CUDA beside a GPU, each with the build that serves it."""
    for capability, serves in (((8, 6), "/cu130"), ((6, 1), "/cu126")):
        machine = Machine("cpu", (CARDS[capability],), has_nvidia_smi=True)
        yield machine, None, NO_TEXT, ["Device: CPU", CARDS[capability].name, serves]
        yield machine, "cuda", NO_DEVICE, [serves]


CASES = [
    *cuda_cases(),
    *cases_without_cuda(),
    (DRIVER_TOO_OLD, None, NO_TEXT, ["Device: CPU", "driver"]),
    (DRIVER_TOO_OLD, "cuda", NO_DEVICE, ["driver"]),
    (cuda_machine((8, 0), (9, 0)), None, NO_TEXT, ["one of 2 GPUs is used"]),
    (cuda_machine((8, 0), (9, 0)), "cuda:1", NO_TEXT, [f"GPU: {CARDS[9, 0].name}\n"]),
    (mac(14), None, NO_TEXT, ["Device: MPS\nGPU: Apple Silicon\n"]),
    (mac(15), None, NO_TEXT, ["Device: MPS\nGPU: Apple Silicon\n"]),
    (XPU_MACHINE, None, NO_TEXT, [f"GPU: {XPU_MACHINE.cards[0].name}\n"]),
]


@pytest.mark.parametrize(("machine", "device", "code", "words"), CASES, ids=str)
def test_the_program_uses_the_gpu_or_says_in_four_lines_what_serves_it(
    machine, device, code, words, pretend, workdir, recwarn
):
    pretend(machine)
    assert torch.cuda.is_available() == (machine.kind == "cuda" and not machine.driver_too_old)
    ended_with, said = run_main(workdir, device)
    assert ended_with == code, said
    if code == NO_DEVICE:
        said = said[said.index("ResourceError") :]
        assert len(said.splitlines()) <= 4
    assert [word for word in words if word not in said] == []


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
    assert limit_memory(second, 1.0)
    assert free_memory(second) == 80 * GB
    with pytest.raises(ResourceError, match="cuda:0, cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize(("machine", "name"), [(mac(15), "mps"), (XPU_MACHINE, "xpu:0")])
def test_the_memory_of_other_gpus_is_known_too(machine, name, pretend):
    pretend(machine)
    assert pick_device(None) == pick_device(name[:3]) == torch.device(name)
    assert free_memory(torch.device(name)) == 16 * GB
    assert limit_memory(torch.device(name), 0.5)
    assert free_memory(torch.device(name)) == 8 * GB
    assert limit_memory(torch.device(name), 1.0)
    assert free_memory(torch.device(name)) == 16 * GB


def test_nothing_is_left_of_a_pretended_machine(tmp_path, workdir, recwarn):
    names = ["_C", "cuda", "cuda.graphs", "mps", "backends.mps", "xpu", "version"]
    modules = [sys.modules[f"torch.{name}"] for name in names]
    for module in modules:  # Python's own, which it makes at a module's first warning
        vars(module).setdefault("__warningregistry__", {})

    def facts() -> list:
        return [dict(vars(module)) for module in modules]

    with pretended(Machine("cpu"), tmp_path):  # what torch imports at first use is there by now
        run_main(workdir)
    before = facts()
    beside_a_gpu = Machine("cpu", (CARDS[8, 6],), has_nvidia_smi=True)
    for machine in (cuda_machine((7, 5)), DRIVER_TOO_OLD, mac(15), XPU_MACHINE, beside_a_gpu):
        with pretended(machine, tmp_path):
            run_main(workdir)
        for module_before, module_after in zip(before, facts(), strict=True):
            assert module_before.keys() == module_after.keys()
            changed = [n for n, value in module_before.items() if module_after[n] is not value]
            assert changed == [], machine


# ----------------------------------------------------------------------------- several ranks


@pytest.mark.parametrize("requested", [None, "cuda"])
def test_each_rank_of_a_machine_takes_its_own_gpu(pretend, requested):
    pretend(cuda_machine(*[(9, 0)] * 4))
    for i in range(4):  # the second machine of two
        rank = Parallel(4 + i, 8, local_rank=i, local_world=4)
        assert pick_device(requested, rank) == torch.device("cuda", i)
        assert torch.cuda.current_device() == i


def test_ranks_without_gpus_of_their_own_train_on_the_cpu_or_are_told_why_not(pretend):
    of_two = Parallel(1, 2, 1, 2)
    pretend(cuda_machine((9, 0), (9, 0)))
    assert pick_device("cpu", of_two) == torch.device("cpu")
    assert torch.cuda.current_device() == 0  # left alone
    for requested in ("mps", "cuda:1"):  # one device for several ranks
        with pytest.raises(SettingsError, match=r'started 2 processes.\nSet DEVICE to "cuda"'):
            pick_device(requested, of_two)
    with pytest.raises(ResourceError, match="started 3 processes here, and there are 2 GPUs"):
        pick_device(None, Parallel(2, 3, 2, 3))
    pretend(mac(15))
    assert pick_device(None, of_two) == torch.device("cpu")
    with pytest.raises(ResourceError, match="no such device"):
        pick_device("cuda", of_two)


def test_ranks_meet_over_gloo_where_torch_has_no_nccl(pretend, monkeypatch):
    pretend(cuda_machine((8, 6)))  # as on Windows: a GPU, and no NCCL for any
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")  # any that is free
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: False)
    store, _, group = parallel._meet(0, 1, timeout_s=60)
    try:
        ranks = Parallel(0, 2, store=store, group=group)
        assert ranks.sum(torch.ones(2)).tolist() == [1, 1]
        assert ranks.highest(3) == [3]
        assert distributed.get_backend() == "gloo"
    finally:
        distributed.destroy_process_group()
