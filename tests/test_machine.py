"""Which device a run gets, and what is said where the installed torch can't use the GPU."""

import dataclasses
import os
import re
import sys

import pytest
import torch

from data import plan_windows
from distributed.parallel import ALONE, Parallel
from engine.precision import choose_precision
from planning import machine
from planning.decisions import KeptPrecision, RunRecord
from planning.plan import resolve_settings
from tests.conftest import REPOSITORY
from tests.records import record_of

# what torch.cuda.get_arch_list() gives for the builds that people have
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def test_a_gpu_needs_machine_code_of_its_major_version_or_older_ptx():
    for capability in ((5, 2), (6, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)):
        assert machine.has_kernels(capability, CU126)
        assert machine.has_kernels(capability, CU130) == (capability >= (7, 5))
    for capability in ((10, 0), (10, 3), (12, 0), (12, 1), (13, 0)):  # the last by compiling PTX
        assert machine.has_kernels(capability, CU130) and not machine.has_kernels(capability, CU126)
    # architectures of one GPU alone, and unknown ones
    assert machine.has_kernels((9, 0), ["sm_90a"]) and machine.has_kernels((10, 3), ["sm_100f"])
    assert not machine.has_kernels((9, 0), ["gfx942", "sm_100"])
    assert machine.has_kernels((9, 0), [])  # a build that does not tell is not refused


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program nvidia-smi on the path, which tells of a GPU: name, driver, capability."""

    def install(name: str, driver: str, capability: str | None, version: str | None) -> None:
        # a driver before 510 does not know the third field
        answer = {"name,driver_version": f"{name}, {driver}"}
        if capability is not None:
            answer["name,driver_version,compute_cap"] = f"{name}, {driver}, {capability}"
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!{sys.executable} -IS\nimport sys\nanswer = {answer!r}\n"
            "asked = sys.argv[1].removeprefix('--query-gpu=')\n"
            "print(answer.get(asked, 'not a valid field'))\nsys.exit(asked not in answer)\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.version, "cuda", version)

    return install


pytestmark = pytest.mark.skipif(os.name == "nt", reason="the pretended nvidia-smi is for POSIX")


@pytest.mark.parametrize(
    ("gpu", "version", "said"),
    [
        # a build for CPUs, as Windows gets it from PyPI
        (("RTX 3060", "581.29", "8.6"), None, rf"RTX 3060 is here.*no CUDA.*{{{machine.CU130}}}"),
        (("RTX 3060", "555.42.06", "8.6"), None, "no CUDA.*{cu126}"),
        (("GTX 1080", "581.29", "6.1"), None, "no CUDA.*{cu126}"),
        (("RTX 5090", "570.86", "12.0"), None, "Update the driver to 580 or newer.*{cu130}"),
        (("Tesla K80", "470.1", "3.7"), None, "No recent torch serves a GPU this old"),
        (("Quadro", "450.80", None), None, "Update the driver to 525 or newer.*{cu126}"),
        # a driver that is too old for the build
        (("T4", "535.104.05", "7.5"), "13.0", "driver 535.104.05.*needs 580.*{cu126}"),
        (("T4", "470.82.01", "7.5"), "12.6", "470.82.01.*needs 525.*Update the driver.*{cu126}"),
    ],
)
def test_what_makes_the_gpu_usable_is_one_pip_line(nvidia_smi, gpu, version, said):
    nvidia_smi(*gpu, version)
    for build in (machine.CU126, machine.CU130):
        said = said.replace(f"{{{build}}}", re.escape(machine.pip_line(build)))
    found = machine.why_no_gpu()
    assert re.search(said, found), found
    assert found.count("pip install") == said.count("pip")


def test_where_cuda_does_not_start_for_another_reason_torch_is_quoted(nvidia_smi, monkeypatch):
    nvidia_smi("T4", "580.65.06", "7.5", "13.0")

    def fail():
        raise RuntimeError("CUDA error 802: system not yet initialized\nand a page more")

    monkeypatch.setattr(torch.cuda, "init", fail)
    assert machine.why_no_gpu() == (
        "T4 is here, but CUDA does not start: CUDA error 802: system not yet initialized"
    )


def test_nothing_is_said_without_a_gpu_or_where_it_is_hidden(nvidia_smi, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.why_no_gpu() is None
    nvidia_smi("T4", "580.65.06", "7.5", None)
    assert machine.why_no_gpu() is not None
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert machine.why_no_gpu() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text(f"#!{sys.executable}\nraise SystemExit(9)\n")
    assert machine.why_no_gpu() is None


def test_the_pip_lines_are_of_the_version_that_is_pinned_and_those_of_the_documents():
    assert f"torch=={machine.TORCH}\n" in (REPOSITORY / "requirements.txt").read_text("utf-8")
    for name in ("install.md", "install.zh-CN.md"):
        text = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
        lines = set(re.findall(r"pip install [^`\n|]*", text))
        assert {machine.pip_line(build) for build in (machine.CU126, machine.CU130)} <= lines
        for line in lines:
            if "torch==" in line and "--index-url" in line:
                build = line.rpartition("/")[2]
                assert line == machine.pip_line(build), line


RECORD = record_of(resolve_settings({"CUSTOM_MODE": True}, "config_run.py"), threads=3)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def kept(night: bool = False, **changes) -> RunRecord:
    """The record of a run that goes on."""
    settings = RECORD.settings | {"NIGHT_MODE": night}
    return dataclasses.replace(RECORD, settings=settings, **changes)


@pytest.fixture
def cores(monkeypatch):
    """A machine of eight cores, four threads of which are usual, none set from outside."""
    monkeypatch.setattr(machine, "default_threads", lambda _: 4)
    monkeypatch.setattr(machine, "threads_are_set", lambda _: False)
    monkeypatch.setattr(machine, "limit_memory", lambda device, share: True)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return monkeypatch


def test_threads_are_the_usual_ones_half_at_night_or_those_of_the_run_that_goes_on(cores):
    for night, device, before, expected in (
        (False, CPU, None, 4),
        (True, CPU, None, 2),
        (True, GPU, None, 4),
        (False, CPU, kept(), 3),
        (True, CPU, kept(), 2),  # it began by day
        (False, CPU, kept(night=True), 4),
        (True, CPU, kept(night=True), 3),
        (False, CPU, kept(ranks=2), 4),
        (False, CPU, kept(threads=99), 8),
    ):
        halved = night and device == CPU
        notices = [f"night mode: {expected} of 4 threads"] * halved
        assert machine.decide_threads(night, device, ALONE, before) == (expected, notices)
        with cores.context() as patch:
            patch.setattr(machine, "threads_are_set", lambda _: True)
            assert machine.decide_threads(night, device, ALONE, before)[0] == (2 if halved else 4)


def test_the_micro_batch_is_the_whole_half_at_night_or_that_of_the_run_that_goes_on(cores):
    said = "night mode: half of the memory, 4 windows at a time instead of 8"
    for night, device, before, expected in (
        (False, CPU, None, 8),
        (True, CPU, None, 8),
        (True, GPU, None, 4),
        (False, GPU, kept(micro_batch=3), 3),
        (False, GPU, kept(micro_batch=99), 8),
        (True, GPU, kept(micro_batch=3), 4),
        (True, GPU, kept(night=True, micro_batch=3), 3),
        (False, GPU, kept(micro_batch=3, ranks=2), 8),
    ):
        notices = [said] * (night and device == GPU)
        found = machine.decide_micro_batch(night, device, 8, ALONE, before)
        assert found == (expected, notices)


def test_a_micro_batch_that_failed_before_torchrun_started_again_is_not_tried_again(cores):
    parallel = Parallel(0, 1)
    cores.setattr(parallel, "noted", lambda name: "2" if name == "micro_batch" else None)
    assert machine.decide_micro_batch(False, CPU, 8, parallel, None) == (2, [])
    assert machine.decide_micro_batch(False, CPU, 1, parallel, None) == (1, [])


def test_a_loader_has_no_more_workers_than_cores(cores):
    said = "num_workers is lowered from {} to {}: so many cores are there"
    for asked, processes, expected in ((0, 1, 0), (8, 1, 8), (9, 1, 8), (5, 2, 4), (3, 99, 1)):
        notices = [said.format(asked, expected)] * (expected < asked)
        assert machine.decide_workers(asked, processes) == (expected, notices)


def test_auto_keeps_the_precision_of_a_run_that_goes_on(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    for requested, had, expected, notices in (
        ("auto", None, "bf16", ()),
        ("auto", "bf16", "bf16", ()),
        ("auto", "fp32", "fp32", ("precision is fp32: as when this run began",)),
        ("fp32", "bf16", "fp32", ()),
    ):
        before = had and dataclasses.replace(RECORD, precision=KeptPrecision(had, "x"))
        found = machine.Machine(CPU, ALONE, choose_precision(requested, CPU))
        decided = machine.decide_precision(found, requested, before)
        assert (decided.precision.name, decided.notices) == (expected, notices)


def test_ranks_compare_the_precision_that_the_run_goes_on_in_not_that_of_a_new_one(
    monkeypatch, tmp_path
):
    """Processors of two kinds may go on together with a run that began in fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    parallel, compared = Parallel(), []
    monkeypatch.setattr(parallel, "require_same", lambda **values: compared.append(values))
    plan = resolve_settings({"DEVICE": "cpu"}, "config_run.py")
    before = dataclasses.replace(RECORD, precision=KeptPrecision("fp32", "x"))
    windows, _ = plan_windows(999, max_length=8, stride=8, batch_size=4, train_ratio=0.9)
    found = machine.find_machine(plan, tmp_path, parallel)
    assert found.precision.name == "bf16"
    decided = machine.decide_machine(found, plan, plan.training, windows, before)
    assert decided.precision.name == "fp32"
    assert compared == [{"device": "cpu"}, {"precision": "fp32"}]
