"""In a notebook: settings that are edited while its kernel lives, and the notebooks themselves."""

import asyncio
import io
import json
import os
import shutil
import sys
import threading
import time
import tokenize
from pathlib import Path

import pytest

from engine.errors import SettingsError
from environment import read_given_settings
from tests.conftest import REPOSITORY
from tests.programs import OFFLINE

NOTEBOOKS = ["train_on_your_text.ipynb", "train_on_your_text.zh-CN.ipynb"]


@pytest.fixture
def config_file(workdir, monkeypatch):
    """The path of a config_run.py that the program imports; none is there yet."""
    monkeypatch.syspath_prepend(str(workdir))
    yield workdir / "config_run.py"
    sys.modules.pop("config_run", None)


def given() -> dict:
    return read_given_settings(None)[0]


def test_an_edited_config_run_counts_at_the_next_reading_a_mistake_until_it_is_mended(
    config_file, capsys
):
    config_file.write_text("SEED = 1\nRUN_NAME = 'one'\n", encoding="utf-8")
    assert given() == {"SEED": 1, "RUN_NAME": "one"}
    config_file.write_text("SEED = 2\nLOG_EVERY = 5\n", encoding="utf-8")  # of the same size
    for _ in range(2):
        assert given() == {"SEED": 2, "LOG_EVERY": 5}
    config_file.write_text("LOG_EVERY = 2\nSEED = 1 +\n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(SettingsError, match=r"config_run\.py line 2 is not Python"):
            given()
    config_file.write_text("LOG_EVERY = 2\nSEED = 3\n", encoding="utf-8")
    assert given() == {"SEED": 3, "LOG_EVERY": 2}
    assert capsys.readouterr().out == ""
    config_file.unlink()
    assert given() == {"SEED": 3, "LOG_EVERY": 2}
    assert "Note: config_run.py is gone" in capsys.readouterr().out


@pytest.mark.parametrize("is_read_before", [True, False])
def test_what_a_program_has_set_wins_over_an_edited_file_and_is_told(
    config_file, capsys, is_read_before
):
    def edit(text: str) -> None:
        config_file.write_text(text, encoding="utf-8")

    edit("SEED = 1\nDATA = 'a'\ncustom_params = {}\n")
    import config_run

    if is_read_before:
        given()
    config_run.SEED = 5
    config_run.custom_params["batch_size"] = 3  # the object stays the same
    assert given() == {"SEED": 5, "DATA": "a", "custom_params": {"batch_size": 3}}
    assert capsys.readouterr().out == ""
    edit("SEED = 9\nDATA = 'b'\ncustom_params = {}\n")
    assert given() == {"SEED": 5, "DATA": "b", "custom_params": {"batch_size": 3}}
    note = "Note: as this program has set them, not as config_run.py: "
    assert capsys.readouterr().out == f"{note}SEED, custom_params\n"
    edit("SEED = 5\nDATA = 'b'\n")
    assert given() == {"SEED": 5, "DATA": "b", "custom_params": {"batch_size": 3}}
    edit("SEED = 6\nDATA = 'b'\n")
    assert given()["SEED"] == 6  # the program's value was the file's own by then
    assert capsys.readouterr().out == f"{note}custom_params\n" * 2


def test_in_a_kernel_it_is_told_where_nobody_knows_which_file_was_imported(
    config_file, capsys, kernel
):
    config_file.write_text("SEED = 1\nDATA = 'a'\n", encoding="utf-8")
    import config_run  # noqa: F401

    config_file.write_text("SEED = 2\nDATA = 'a'\n", encoding="utf-8")
    assert given() == {"SEED": 1, "DATA": "a"}
    note = "Note: as this program has set them, not as config_run.py: SEED\n"
    assert note in capsys.readouterr().out


def code_without_comments(source: str) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return " ".join(token.string for token in tokens if token.type != tokenize.COMMENT)


def test_both_notebooks_have_the_same_code_and_no_outputs():
    english, chinese = (
        json.loads((REPOSITORY / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
        for name in NOTEBOOKS
    )
    for one, other in zip(english, chinese, strict=True):
        assert (one["cell_type"], one["id"]) == (other["cell_type"], other["id"])
        if one["cell_type"] == "code":
            assert one["outputs"] == other["outputs"] == []
            assert one["execution_count"] is other["execution_count"] is None
            sources = ["".join(cell["source"]) for cell in (one, other)]
            assert len({code_without_comments(source) for source in sources}) == 1


class Page:
    """A notebook that is executed cell by cell, in one kernel."""

    def __init__(self, client) -> None:
        self.client = client

    def run(self, cell) -> str:
        """Execute a cell; what it printed."""
        self.client.execute_cell(cell, self.client.nb.cells.index(cell))
        return "".join(
            output.get("text", "") + output.get("evalue", "") + output.get("ename", "")
            for output in cell.get("outputs", [])
        )

    def run_code(self, source: str, *, interrupt_when=None, allow_errors: bool = False) -> str:
        """Execute some code; the kernel is interrupted once a condition holds."""
        from nbformat import v4

        self.client.allow_errors = allow_errors
        cell = v4.new_code_cell(source)
        self.client.nb.cells.append(cell)
        if interrupt_when is None:
            return self.run(cell)

        def interrupt() -> None:
            while not interrupt_when():
                time.sleep(0.05)
            asyncio.run(self.client.km.interrupt_kernel())

        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        printed = self.run(cell)
        thread.join(60)
        return printed


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The English notebook in a kernel of its own, in a fresh copy of the repository."""
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    copy = tmp_path / "clone"
    skipped = shutil.ignore_patterns(".git", "runs", "cache", "__pycache__", ".venv", "venv")
    shutil.copytree(REPOSITORY, copy, ignore=skipped)
    sample = copy / "corpus" / "sample-en.txt"  # a part of it is enough
    sample.write_text(sample.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    notebook = nbformat.read(copy / "notebooks" / NOTEBOOKS[0], as_version=4)
    resources = {"metadata": {"path": str(copy / "notebooks")}}
    client = nbclient.NotebookClient(notebook, timeout=300, resources=resources)
    with client.setup_kernel(env=os.environ | OFFLINE | {"OMP_NUM_THREADS": "1"}):
        yield Page(client)


TINY_RUN = """
config_run.DATA, config_run.TOKENIZER, config_run.CUSTOM_MODE = "sample-en", "char", True
config_run.custom_params = {
    "max_steps": 1_000_000, "max_length": 16, "eval_iter": 1, "start_context": "A",
    "model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1},
}
"""


def is_training(run: Path) -> bool:
    file = run / "metrics.jsonl"
    return file.exists() and '"train/loss"' in file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_notebook_runs_as_it_is_and_its_kernel_lives_on(page):
    cells = {cell["id"]: cell for cell in page.client.nb.cells if cell["cell_type"] == "code"}
    printed = {name: page.run(cell) for name, cell in cells.items()}
    clone = Path(page.client.resources["metadata"]["path"]).parent

    assert printed["find"] == f"The program is in {clone}\n"
    assert "nothing, all of it was here" in printed["install"]
    pictures = [
        name
        for name, cell in cells.items()
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert pictures == ["train"]
    for label in ("Before training: ", "Greedy: ", "Top-k (50): ", "Top-p (0.9): "):
        assert f"\n{label}" in printed["train"]
    assert "Training pipeline finished successfully" in printed["train"]
    assert "IProgress" not in printed["train"]
    assert printed["write"].startswith("Every effort moves you")
    assert str(clone / "runs") in printed["keep"]

    # an edit counts, an interrupt saves, the handler is the kernel's own again
    with open(clone / "config_run.py", "a", encoding="utf-8") as file:
        file.write('\nRUN_NAME = "edited"\nDATA = "nowhere.txt"\n')
    run = clone / "runs" / "edited"
    stopped = page.run_code(
        f"{TINY_RUN}import signal\nhandler = signal.getsignal(signal.SIGINT)\n"
        "print(main.main([]), signal.getsignal(signal.SIGINT) is handler)",
        interrupt_when=lambda: is_training(run),
    )
    assert "Note: as this program has set them, not as config_run.py: " in stopped
    assert f"saved in runs/edited{os.sep}checkpoints" in stopped
    assert "130 True" in stopped
    assert list((run / "checkpoints").iterdir())

    # what the runs had is free again, but for the model that load_run() gave
    freed = page.run_code(
        "import gc, model\ngc.collect()\n"
        "held = [o for o in gc.get_objects() if type(o) is model.GPTModel]\n"
        "print(len(held), held[0] is run.model)\ndel held"
    )
    assert freed == "1 True\n"

    # a run of one's own: the interrupt is an exception, which holds nothing once its name is free
    seen = len((run / "metrics.jsonl").read_bytes())
    stopped = page.run_code(
        "import weakref\nfrom environment import prepare_environment\nfrom train import train\n"
        "env = prepare_environment()\nfirst = weakref.ref(env.model)\ntrain(env)",
        interrupt_when=lambda: len((run / "metrics.jsonl").read_bytes()) > seen,
        allow_errors=True,
    )
    assert "Resuming runs/edited" in stopped.replace(os.sep, "/")
    assert "Stopped after step" in stopped
    kept = page.run_code("second = prepare_environment()\nprint(first() is None)")
    assert "Note: an earlier model is still in memory" in kept
    assert kept.endswith("False\n")
    freed = page.run_code("del env, second\nenv = prepare_environment()\nprint(first() is None)")
    assert "earlier model" not in freed
    assert freed.endswith("True\n")
