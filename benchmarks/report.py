"""The results files: one JSON file for each benchmark and processor, side by side."""

import os
import platform
import re
from pathlib import Path

import torch

from engine.devices import device_name
from planning.choices import processor_name
from storage.files import make_folder, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def machine(device: torch.device) -> dict:
    """What results depend on: device, cores, threads and versions."""
    return {
        "device": device.type,
        "name": device_name(device) or processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_results(benchmark: str, device: torch.device, results: dict) -> Path:
    """Write a benchmark's results under benchmarks/results/ and return the file's path."""
    make_folder(RESULTS)
    name = re.sub("[^a-z0-9]+", "-", machine(device)["name"].lower()).strip("-")
    path = RESULTS / f"{benchmark}-{device.type}-{name}.json"
    write_json(path, results)
    return path
