"""A disk that is full for a while, in the middle of a run and at its end: the run ends well."""

import re

import pytest

from storage.files import verify_folder
from tests.launching import launching, needs_mounts, on_a_small_disk

pytestmark = [pytest.mark.slow, needs_mounts]
# a thread fills the disk after the first checkpoint, and frees it FULL_S after the first refusal;
# the waits between two tries are SCALE times as long
FILLING = """
import threading, types
from storage import checkpoint
checkpoint.RETRY_S *= SCALE
scaled = types.SimpleNamespace(**vars(time))
scaled.sleep = lambda seconds: time.sleep(seconds * SCALE)
train.time = scaled
refused = threading.Event()
failing = checkpoint.SaveClock.failed

def failed(clock):
    refused.set()
    return failing(clock)

checkpoint.SaveClock.failed = failed

def fill():
    while not Path("disk/one/checkpoints/step-00000005").exists():
        time.sleep(0.005)
    with open("disk/ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(1 << 16))
        except OSError:
            pass
    refused.wait()
    time.sleep(FULL_S)
    os.remove("disk/ballast")

threading.Thread(target=fill, daemon=True).start()
"""
MODEL = {"emb_dim": 128, "n_heads": 2, "n_layers": 2}  # 1.6 MB of weights


@pytest.mark.parametrize(
    ("full_s", "scale", "max_steps", "said"),
    [
        # three seconds, while there is more to train, three times as fast
        (3 / 3, 1 / 3, 60, "Training goes on; the next try is in 2 s"),
        # three minutes at the end, a hundred times as fast
        (180 / 100, 1 / 100, 10, "Trying again in 64 s"),
    ],
    ids=["3 s", "3 minutes"],
)
def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, full_s, scale, max_steps, said):
    filling = FILLING.replace("FULL_S", str(full_s)).replace("SCALE", str(scale))
    settings = {"save_every": 5, "max_steps": max_steps, "model_overrides": MODEL}
    with launching(tmp_path) as launch:
        more = on_a_small_disk("32m") + filling
        program = launch(more, step_s=0.06, OUTPUT_DIR="disk", **settings)
        program.ends_with(0)
    assert re.search(rf"the checkpoint of step \d+ takes .*{re.escape(said)}", program.out), (
        program.out
    )
    left = tmp_path / "left" / "one"
    assert (left / "summary.json").exists()
    [newest] = (left / "checkpoints").iterdir()
    assert newest.name == f"step-{max_steps:08d}"
    for folder in left.glob("*/step-*"):
        verify_folder(folder)
    assert not [path for path in left.rglob("*") if path.name.startswith((".tmp", ".del"))]
