"""Ctrl-C at random moments of preparing: each ends soon, and leaves nothing half-written."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.launching import Program, launching

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="POSIX signals")]
WITHIN_S, AT_MOST_S = 2.0, 10.0  # from the signal to the end; on a busy machine, of a few
TRIALS = 20


def entries_of(cache: Path) -> list[Path]:
    """The entries of the token cache, all of them whole; beside them hidden and empty folders.

    One is left by a signal that comes as it is made; a later run removes it.
    """
    tokens = [*(cache / "tokens").glob("*"), *(cache / "tokens").glob(".*")]
    hidden = [path for path in tokens if path.name.startswith(".tmp-")]
    assert not [left for path in hidden for left in path.iterdir()]
    folders = [p for p in tokens if not p.name.startswith("found-") and p not in hidden]
    for folder in folders:
        files = {path.name for path in folder.iterdir()}
        assert files == {"tokens.bin", "tokenizer.json", "entry.json"}, folder
    return folders


def test_twenty_random_ctrl_cs_while_it_prepares_end_it_within_two_seconds(tmp_path):
    chance = random.Random(4)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 9))) for _ in range(4000)]
    text = " ".join(chance.choices(words, k=60_000))

    def begun(program: Program) -> float:
        program.until(lambda: "GPT Model Training Pipeline" in program.out)
        return time.monotonic()

    with launching(tmp_path) as launch:
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        settings = {"TOKENIZER": "bpe:300", "max_steps": 100_000, "step_s": 0.02}  # never done
        undisturbed = launch(**settings)
        began_at = begun(undisturbed)
        undisturbed.until(lambda: "Data loaders ready" in undisturbed.out)
        prepared_s = time.monotonic() - began_at
        undisturbed.send(signal.SIGINT)
        undisturbed.ends_with(130)
        [whole] = entries_of(tmp_path / "cache")
        tokens = (whole / "tokens.bin").read_bytes()
        ended_s, was_complete = [], 0
        for trial in range(TRIALS):
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
            program = launch(**settings)
            begun(program)
            # one in each twentieth of the time
            time.sleep(prepared_s * (trial + chance.random()) / TRIALS)
            sent_at = time.monotonic()
            program.send(signal.SIGINT)
            program.ends_with(130)
            ended_s.append(time.monotonic() - sent_at)
            for entry in entries_of(tmp_path / "cache"):  # made just before the signal came
                assert (entry / "tokens.bin").read_bytes() == tokens
                was_complete += 1
            if "Data loaders ready" not in program.out:
                assert not (tmp_path / "runs").exists()
        assert sorted(ended_s)[-4] < WITHIN_S and max(ended_s) < AT_MOST_S, ended_s
        assert was_complete < TRIALS  # not all came after the text was read
