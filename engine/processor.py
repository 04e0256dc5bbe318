"""What suits this machine's processor: threads, small numbers, and memory that is kept."""

import ctypes
import os
import sys
from pathlib import Path

import torch

TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")
# of mallopt() in glibc's malloc.h
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def prepare_processor() -> None:
    """Set this process up for steps that all need the same memory; takes no time, more than once.

    A step's large tensors would be handed back to the system when freed, and come as new zeroed
    pages in the next: a third of a step's time where that was measured. glibc keeps them from
    here on, and torch asks for pages of 2 MB. Numbers too small to count become zero: they take
    the processor many times as long.
    """
    torch.set_flush_denormal(True)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first large tensor
    if sys.platform == "linux":
        malloc_option = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if malloc_option is not None:
            malloc_option(MMAP_MAX, 0)
            malloc_option(TRIM_THRESHOLD, 2**31 - 1)


def default_threads(processes: int = 1) -> int:
    """Threads for arithmetic: torch's own choice, at most one a physical core of this process.

    A second thread on a core shares its units for products and only waits for them; a container's
    share of a large machine is less than the cores that it shows. So many processes, which
    torchrun started, share them. A number set from outside stands.
    """
    if threads_are_set(processes):
        return torch.get_num_threads()
    # torchrun has told torch to take one
    own = torch.get_num_threads() if processes == 1 else os.cpu_count()
    limits = [own, physical_cores(TOPOLOGY), quota_cores(CGROUP)]
    return max(1, min(limit for limit in limits if limit) // processes)


def threads_are_set(processes: int = 1) -> bool:
    """Whether somebody has set the number from outside, whose wish it then is.

    A 1 is torchrun's own, where it has started several processes.
    """
    numbers = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    return any(number and (processes == 1 or number != "1") for number in numbers)


def physical_cores(topology: Path) -> int | None:
    """The physical cores that this process may run on; None where Linux does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        try:
            listed = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
        except OSError:
            return None
        siblings.add(listed.strip())
    return len(siblings)


def quota_cores(cgroup: Path) -> int | None:
    """The whole cores' worth of time that a container allows, at least 1; None for no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text("ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))
