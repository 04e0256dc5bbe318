"""When a program began: a run of so many minutes counts them from there."""

import os
import time
from pathlib import Path

STAT = Path("/proc/self/stat")
START_TIME = 19  # its field, counted from 0 behind the process's name
MOST_S = 5.0  # for Python to start: a shell that becomes Python by exec keeps its own age


def process_began_at() -> float:
    """The time.perf_counter() at which Python began in this process; to be asked first of all.

    Linux keeps it. Elsewhere the processor time stands for the time since then, which is less where
    the process has waited, as for a disk from which it is read.
    """
    return time.perf_counter() - min(MOST_S, max(time.process_time(), _age_s()))


def _age_s() -> float:
    """The seconds since this process began; 0 where the system doesn't tell."""
    try:
        fields = STAT.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        began_s = int(fields[START_TIME]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s
    except (OSError, LookupError, ValueError, AttributeError):
        return 0.0
