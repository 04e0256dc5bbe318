"""What the tests share: the real texts beside the project, and a place to run in."""

import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real texts; a test that needs it skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real texts at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """An empty working directory and an empty cache, with the settings as they are shipped."""
    import environment

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "CACHE", tmp_path / "cache")
    monkeypatch.delitem(sys.modules, "config_run", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only wait for each other over tensors this small, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)  # a prepared run sets it, and hypothesis minds
