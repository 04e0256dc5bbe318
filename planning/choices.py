"""What is faster on this machine: measured once, kept in the cache, and taken from there later."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.console import say
from engine.devices import device_name
from engine.errors import ResourceError, first_line
from engine.trials import time_each
from storage.files import make_folder, write_json

# floating point operations of a run, 40 s on a slow machine, below which no trial can pay
WORTH_A_TRIAL = 4e12
# the share of the first candidate's time that another must stay below to be chosen: what is about
# equally fast stays the same on the next machine of this kind
CLEARLY_FASTER = 0.9
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Choice:
    """The fastest of some candidates, and the seconds that each took when it was measured."""

    name: str
    seconds: dict[str, float]

    @property
    def reason(self) -> str:
        """The measurements in words, such as "bf16 12 ms, fp32 25 ms"."""
        return ", ".join(f"{name} {1000 * s:.3g} ms" for name, s in self.seconds.items())


@dataclass(frozen=True)
class Choices:
    """The choices that were measured on a device, by processor, torch's version and threads."""

    folder: Path
    device: torch.device
    threads: int

    def fastest(self, question: str, candidates: Mapping[str, Callable[[], object]]) -> Choice:
        """The fastest candidate; the first unless another is faster by a tenth.

        Measures them only where the cache has no answer to this question.
        """
        known = self.known(question)
        if known is not None and known.keys() == candidates.keys():
            return _choice(known)
        seconds = time_each(candidates, self.device)
        self.keep(question, seconds)
        return _choice(seconds)

    def known(self, question: str) -> dict[str, float] | None:
        """The figures that were kept for a question, by name; None if there are none."""
        try:
            content = json.loads(self._file(question).read_bytes())
            figures = {str(name): float(value) for name, value in content["figures"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None  # a damaged file is like none: the next measurement replaces it
        return figures if all(0 <= value < float("inf") for value in figures.values()) else None

    def keep(self, question: str, figures: dict[str, float]) -> None:
        """Keep figures for a question; prints a note where the cache can't be written."""
        file = self._file(question)
        try:
            make_folder(file.parent)
            write_json(file, self._key(question) | {"figures": figures})
        except ResourceError as error:
            say(f"Note: {first_line(error)} What is faster here is measured again next time")

    def _key(self, question: str) -> dict[str, Any]:
        return {
            "question": question,
            "processor": device_name(self.device) or processor_name(),
            "device": self.device.type,
            "torch": torch.__version__,
            "threads": self.threads,
        }

    def _file(self, question: str) -> Path:
        key = json.dumps(self._key(question), sort_keys=True)
        return self.folder / "choices" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _choice(seconds: dict[str, float]) -> Choice:
    name = min(seconds, key=seconds.__getitem__)
    first = next(iter(seconds))
    return Choice(name if seconds[name] < CLEARLY_FASTER * seconds[first] else first, seconds)


def processor_name() -> str:
    """The CPU's name, and the instruction set that torch uses on it."""
    name = platform.processor() or platform.machine()
    if CPU_INFO.is_file():
        lines = CPU_INFO.read_text("utf-8", errors="replace").splitlines()
        name = next((li.partition(":")[2] for li in lines if li.startswith("model name")), name)
    return f"{name.strip()} ({torch.backends.cpu.get_cpu_capability()})"
