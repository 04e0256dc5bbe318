"""lm-eval scores a text by the task of docs/export.md as scripts.evaluate does."""

import json
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from exchange.huggingface import write_folder
from scripts import evaluate, export
from scripts.options import run_program
from storage.checkpoint import weights_of
from tests import by_heart
from tests.by_heart import CONTEXT, POEM
from tests.conftest import REPOSITORY
from tests.letters import model_for
from tests.texts import CHINESE, ENGLISH
from text.tokenizer import CharTokenizer, begin_texts_with

pytestmark = [
    pytest.mark.slow,  # lm-eval takes 10 s to import
    pytest.mark.skipif(
        find_spec("lm_eval") is None,
        reason='lm-eval is not installed (pip install "lm_eval[hf]")',
    ),
]
# each fits into the context in bytes: a longer one lm-eval cuts at other places
DOCUMENTS = [POEM, "The", CHINESE[:12], *textwrap.wrap(ENGLISH[:600], CONTEXT)]


@pytest.fixture
def call(workdir, monkeypatch, capsys):
    """Run a program in this process; what it prints."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # lm-eval's libraries read it when imported
    monkeypatch.setenv("HF_HOME", str(workdir / "huggingface"))

    def called(program, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_program(program.main)
        printed = capsys.readouterr()
        assert exit.value.code == 0, printed.err
        return printed.out

    return called


def test_bits_a_byte_of_short_documents_are_the_same_there(call, tmp_path_factory):
    run = by_heart.tiny_run(tmp_path_factory)
    call(export, "--run", run, "--to", "hf", "plain")
    tokenizer = begin_texts_with(CharTokenizer(ENGLISH + CHINESE).adding(["<s>"]), "<s>")
    model = model_for(tokenizer, 0.3, emb_dim=32, n_heads=2, context_length=CONTEXT)
    write_folder(Path("begun"), model.config, weights_of(model), tokenizer, card="A test's.")

    assert all(len(text.encode()) <= CONTEXT for text in DOCUMENTS)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    Path("docs.jsonl").write_text(lines, encoding="utf-8")
    page = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    task = page.partition("```yaml\n")[2].partition("```")[0]
    Path("tasks").mkdir()
    Path("tasks", "my_text.yaml").write_text(task, encoding="utf-8")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for folder, options in (("plain", ""), ("begun", ",add_bos_token=False")):
        found = simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder},dtype=float32{options}",
            tasks=["my_text"],
            task_manager=TaskManager(include_path="tasks"),
            device="cpu",
        )
        theirs = found["results"]["my_text"]["bits_per_byte,none"]
        asked = ["docs.jsonl", "--documents", "--json", "--precision=fp32", "--device=cpu"]
        *_, whole = map(json.loads, call(evaluate, *asked, "--model", folder).splitlines())
        assert whole["bits_per_byte"] == pytest.approx(theirs, rel=1e-4), folder
