"""When a process began, as MINUTES count it."""

import subprocess
import sys
import time

from engine import clock
from tests.conftest import REPOSITORY

AGE = (
    "import time; time.sleep(0.2)\n"
    "from engine.clock import process_began_at\n"
    "print(time.perf_counter() - process_began_at())"
)


def test_a_process_is_as_old_as_its_parent_sees_it():
    started_at = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", AGE], cwd=REPOSITORY, capture_output=True)
    waited_s, age_s = time.perf_counter() - started_at, float(done.stdout)
    least_s = 0.2 if clock.STAT.exists() else 0.0
    assert least_s <= age_s <= waited_s + 0.02  # the system counts hundredths of a second


def test_where_the_system_does_not_tell_it_is_as_old_as_the_cpu_time_it_has_used(monkeypatch):
    for name, path in (("STAT", clock.STAT / "none"), ("UPTIME", REPOSITORY / "README.md")):
        monkeypatch.setattr(clock, name, path)
        age_s = time.perf_counter() - clock.process_began_at()
        assert 0 < age_s <= time.process_time() + 0.5
        monkeypatch.undo()
