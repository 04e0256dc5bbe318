"""Settings for this machine's processor: threads, denormal numbers and freed memory."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")
OWN_SHARE = 0.8  # of the time, that a thread works which nothing holds up
# of mallopt() in glibc's malloc.h
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
LARGE_BLOCK = 1_000_000  # bytes, which return_large_blocks() is for


def prepare_processor() -> None:
    """Keep freed memory for the next step, and flush denormals to zero. Safe to call again.

    glibc returns large freed tensors to the system, and the next step waits for new zeroed pages:
    a third of its time where measured. Arithmetic on denormals is many times as slow.
    """
    torch.set_flush_denormal(True)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first large tensor
    _set_malloc({MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1})


def return_large_blocks() -> None:
    """Return freed memory to the system: all of now, and later on blocks from LARGE_BLOCK on, until
    prepare_processor().

    For a large model's steps, which take seconds. Gradients do not fit between the activations that
    the backward pass has freed: kept, these take a tenth of the memory in vain. New pages take a
    small part of such a step.
    """
    _set_malloc({MMAP_MAX: 65_536, MMAP_THRESHOLD: LARGE_BLOCK})
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _set_malloc(options: dict[int, int]) -> None:
    """Set options of glibc's malloc(); does nothing with another one."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def default_threads(processes: int = 1) -> int:
    """Threads for arithmetic: torch's own choice, at most one for each physical core.

    A container's quota may be less, and torchrun's processes on this machine share the cores. A
    number set in the environment stands.
    """
    if threads_are_set(processes):
        return torch.get_num_threads()
    # torchrun sets torch's number to 1
    own = torch.get_num_threads() if processes == 1 else os.cpu_count()
    limits = [own, physical_cores(TOPOLOGY), quota_cores(CGROUP)]
    return max(1, min(limit for limit in limits if limit) // processes)


def is_held_up(cpu_s: float, wall_s: float) -> bool:
    """Whether other work held up arithmetic that took cpu_s seconds of its thread's own time.

    cpu_s is the calling thread's (time.thread_time), as it works in the one-thread parts too: the
    share of all threads falls on an idle machine the more of them there are.
    """
    return cpu_s < OWN_SHARE * wall_s


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads in here."""
    before = torch.get_num_threads()
    if count != before:  # setting even the same number makes a new thread pool
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def threads_are_set(processes: int = 1) -> bool:
    """Whether the environment sets the number of threads; torchrun's own 1 does not count."""
    numbers = [os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    return any(number and (processes == 1 or number != "1") for number in numbers)


def physical_cores(topology: Path) -> int | None:
    """The physical cores that this process may run on; None where the system does not tell."""
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
    """The container's CPU quota in whole cores, at least 1; None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text("ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))
