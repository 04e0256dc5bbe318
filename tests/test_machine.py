"""Which device a run gets, and what is said where the installed torch can't use the GPU."""

import os
import re
import stat
import sys

import pytest
import torch

from planning import machine
from planning.machine import has_kernels, pip_line, why_no_gpu
from tests.conftest import REPOSITORY

# what torch.cuda.get_arch_list() gives for the builds that people have
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "in_cu126", "in_cu130"),
    [
        ((5, 2), True, False),
        ((6, 0), True, False),
        ((6, 1), True, False),
        ((7, 0), True, False),
        ((7, 5), True, True),
        ((8, 0), True, True),
        ((8, 6), True, True),
        ((8, 9), True, True),
        ((9, 0), True, True),
        ((10, 0), False, True),
        ((10, 3), False, True),
        ((12, 0), False, True),
        ((12, 1), False, True),
        ((13, 0), False, True),  # by compiling PTX
    ],
)
def test_a_gpu_needs_machine_code_of_its_major_version_or_older_ptx(capability, in_cu126, in_cu130):
    assert has_kernels(capability, CU126) == in_cu126
    assert has_kernels(capability, CU130) == in_cu130


def test_architectures_of_one_gpu_alone_and_unknown_ones_are_read():
    assert has_kernels((9, 0), ["sm_90a"]) and has_kernels((10, 3), ["sm_100f"])
    assert not has_kernels((9, 0), ["gfx942", "sm_100"])
    assert has_kernels((9, 0), [])  # a build that does not tell is not refused


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
            f"#!{sys.executable}\nimport sys\nanswer = {answer!r}\n"
            "asked = sys.argv[1].removeprefix('--query-gpu=')\n"
            "print(answer.get(asked, 'not a valid field'))\nsys.exit(asked not in answer)\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.version, "cuda", version)

    return install


pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="the pretended nvidia-smi is a POSIX script"
)


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
        (
            ("T4", "470.82.01", "7.5"),
            "12.6",
            "driver 470.82.01.*needs 525.*Update the driver.*{cu126}",
        ),
    ],
)
def test_what_makes_the_gpu_usable_is_one_pip_line(nvidia_smi, gpu, version, said):
    nvidia_smi(*gpu, version)
    for build in (machine.CU126, machine.CU130):
        said = said.replace(f"{{{build}}}", re.escape(pip_line(build)))
    found = why_no_gpu()
    assert re.search(said, found), found
    assert found.count("pip install") == said.count("pip")


def test_where_cuda_does_not_start_for_another_reason_torch_is_quoted(nvidia_smi, monkeypatch):
    nvidia_smi("T4", "580.65.06", "7.5", "13.0")

    def fail():
        raise RuntimeError("CUDA error 802: system not yet initialized\nand a page more")

    monkeypatch.setattr(torch.cuda, "init", fail)
    assert why_no_gpu() == (
        "T4 is here, but CUDA does not start: CUDA error 802: system not yet initialized"
    )


def test_nothing_is_said_without_a_gpu_or_where_it_is_hidden(nvidia_smi, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_no_gpu() is None
    nvidia_smi("T4", "580.65.06", "7.5", None)
    assert why_no_gpu() is not None
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert why_no_gpu() is None


def test_an_nvidia_smi_that_fails_is_no_gpu(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!{sys.executable}\nraise SystemExit(9)\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_no_gpu() is None


def test_the_pip_lines_are_of_the_version_that_is_pinned_and_those_of_the_documents():
    assert f"torch=={machine.TORCH}\n" in (REPOSITORY / "requirements.txt").read_text("utf-8")
    for name in ("install.md", "install.zh-CN.md"):
        text = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
        lines = set(re.findall(r"pip install [^`\n|]*", text))
        assert {pip_line(build) for build in (machine.CU126, machine.CU130)} <= lines
        for line in lines:
            if "torch==" in line and "--index-url" in line:
                build = line.rpartition("/")[2]
                assert line == pip_line(build), line
