"""When this process began, by the clock that runs are timed with."""

import os
import time
from pathlib import Path

STAT, UPTIME = Path("/proc/self/stat"), Path("/proc/uptime")
START_FIELD = 19  # of STAT, after the process's name: clock ticks from the machine's start on


def process_began_at() -> float:
    """The time.perf_counter() at which this process began.

    Where the system does not tell, as long ago as the CPU time that the process has used.
    """
    now, used_s = time.perf_counter(), time.process_time()
    try:
        ticks = int(STAT.read_text().rpartition(")")[2].split()[START_FIELD])
        uptime_s = float(UPTIME.read_text().split()[0])
        age_s = uptime_s - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        return now - used_s
    return now - max(0.0, age_s)
