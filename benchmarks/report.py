"""The results files: one JSON file for each benchmark and type of device."""

import os
import platform
from pathlib import Path

import torch

from storage.files import make_folder, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def machine(device: torch.device) -> dict:
    """What results depend on: device, cores, threads and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": device.type,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_results(benchmark: str, device: torch.device, results: dict) -> Path:
    """Write a benchmark's results under benchmarks/results/ and return the file's path."""
    make_folder(RESULTS)
    path = RESULTS / f"{benchmark}-{device.type}.json"
    write_json(path, results)
    return path
