"""How many threads suit a machine, by what Linux tells of it in files."""

import os
from ctypes import CDLL
from pathlib import Path

import pytest
import torch

from engine import processor
from engine.processor import default_threads, is_held_up, physical_cores, quota_cores
from tests.forking import CAN_FORK, run_fork


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine by its files: siblings of each processor in order, and a container's limit.

    All of its processors may be used, and nothing is set from outside.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processor, "TOPOLOGY", tmp_path / "cpu")
    monkeypatch.setattr(processor, "CGROUP", tmp_path)

    def build(siblings: list[str], cpu_max: str | None = None, torchs_own: int = 64) -> Path:
        for number, listed in enumerate(siblings):
            folder = tmp_path / "cpu" / f"cpu{number}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(f"{listed}\n", encoding="ascii")
        if cpu_max is not None:
            (tmp_path / "cpu.max").write_text(f"{cpu_max}\n", encoding="ascii")
        every = set(range(len(siblings)))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: every, raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: torchs_own)
        return tmp_path

    return build


TWO_A_CORE = ["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]
ONE_A_CORE = ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("siblings", "cpu_max", "torchs_own", "expected"),
    [
        (TWO_A_CORE, None, 64, 4),
        (TWO_A_CORE, "max 100000", 64, 4),
        (TWO_A_CORE, "200000 100000", 64, 2),
        (TWO_A_CORE, "250000 100000", 64, 2),  # a third thread would wait half of the time
        (TWO_A_CORE, "50000 100000", 64, 1),
        (TWO_A_CORE, "800000 100000", 64, 4),
        (TWO_A_CORE, None, 3, 3),
        (ONE_A_CORE, None, 64, 6),
        (ONE_A_CORE, "300000 50000", 64, 6),
        (["0-1", "0-1", "2-3", "2-3"], None, 64, 2),
        (["0"], "max 100000", 1, 1),
        ([], None, 5, 5),  # a machine that tells nothing
        (ONE_A_CORE, "?", 64, 6),
    ],
)
def test_threads_are_the_least_of_what_core_container_and_torch_allow(
    machine, siblings, cpu_max, torchs_own, expected
):
    machine(siblings, cpu_max, torchs_own)
    assert default_threads() == expected


def test_a_thread_is_held_up_that_waits_for_a_fifth_of_the_time_or_more():
    assert not is_held_up(1.0, 1.0) and not is_held_up(0.9, 1.0)
    assert is_held_up(0.7, 1.0) and is_held_up(0.25, 1.0)


def test_a_number_set_from_outside_stands(machine, monkeypatch):
    machine(TWO_A_CORE, "100000 100000", torchs_own=7)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        for value, expected in (("7", 7), ("", 1)):
            monkeypatch.setenv(name, value)
            assert default_threads() == expected


def test_processes_share_the_cores_and_torchruns_own_number_is_nobodys_wish(machine, monkeypatch):
    machine([str(number) for number in range(12)], torchs_own=5)
    monkeypatch.setattr(os, "cpu_count", lambda: 24)
    for processes, threads in ((1, 5), (2, 6), (5, 2), (99, 1)):  # alone: torch's own choice
        assert default_threads(processes) == threads
    # torch's number was made from one that is set
    for variable, processes, threads in (("1", 1, 5), ("1", 2, 6), ("3", 2, 5)):
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        assert default_threads(processes) == threads


def test_cores_that_the_process_may_not_use_do_not_count_or_tell_nothing(machine, monkeypatch):
    folder = machine(TWO_A_CORE, torchs_own=5) / "cpu"
    for allowed, expected in ((set(range(8)), 4), ({0, 4}, 1), ({0, 1, 2, 6}, 3), ({7}, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, found=allowed: found)
        assert physical_cores(folder) == expected
    with monkeypatch.context() as patch:
        patch.delattr(os, "sched_getaffinity")  # without Linux
        assert physical_cores(folder) is None
        assert quota_cores(folder / "nowhere") is None
        assert default_threads() == 5
    (folder / "cpu7" / "topology" / "thread_siblings_list").unlink()
    assert physical_cores(folder) is None


RETURNING = """
import torch
from engine.processor import prepare_processor, return_large_blocks

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

torch.set_num_threads(1)
prepare_processor()
for size in (2_000_000, 12_000_000):  # the later ones fit into nothing that the first have left
    before = held()
    blocks = [torch.ones(size) for _ in range(5)]
    del blocks
    print(held() - before)
    return_large_blocks()
"""


@pytest.mark.skipif(not CAN_FORK or not hasattr(CDLL(None), "mallopt"), reason="glibc's malloc")
def test_freed_blocks_are_kept_for_the_next_step_unless_they_are_to_be_returned(tmp_path):
    kept, returned = map(int, run_fork(RETURNING, tmp_path).split())
    assert kept > 0.9 * 5 * 8e6
    assert returned < 0.1 * 5 * 48e6
