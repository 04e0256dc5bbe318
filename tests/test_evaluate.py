"""Texts scored from the command line: the figures against loops and summaries, and the table."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import environment
from scripts import evaluate
from scripts.options import run_program
from tests import by_heart
from tests.by_heart import CONTEXT, STORY, Done
from tests.conversing import END, chat_model, ids_of
from tests.texts import CHINESE, ENGLISH

TEXTS = [STORY[:20], ENGLISH[:90], "a", CHINESE[:30]]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    return by_heart.tiny_run(tmp_path_factory)


@pytest.fixture
def score(tiny_run, workdir, monkeypatch, capsys):
    """Run the program in this process and an empty folder, on the tiny run."""

    def call(*arguments: str, run: Path | None = tiny_run) -> Done:
        where = [] if run is None else ["--run", str(run)]
        options = [*where, "--precision", "fp32", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["evaluate", *options, *arguments])
        with pytest.raises(SystemExit) as exit:
            run_program(evaluate.main)
        return Done(exit.value.code, *capsys.readouterr())

    (workdir / "four.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8"
    )
    return call


@torch.no_grad()
def nats_of(model, ids: list[int], context: int) -> list[float]:
    """The loss of each token but the first, with as much before it as the context holds."""
    nats = []
    for at in range(1, len(ids)):
        logits = model(torch.tensor([ids[max(0, at - context) : at]]))[0, -1]
        nats.append(-logits.log_softmax(0)[ids[at]].item())
    return nats


def test_a_runs_validation_text_has_the_figures_of_its_summary(score, tiny_run):
    done = score(str(tiny_run.parent.parent / "val.jsonl"), "--json")
    (row,) = done.samples
    summary = json.loads((tiny_run / "summary.json").read_text(encoding="utf-8"))
    assert row["loss"] == pytest.approx(summary["final_val_loss"], rel=1e-5)
    for name in ("perplexity", "bits_per_character", "bits_per_byte"):
        assert row[name] == pytest.approx(summary[f"final_val_{name}"], rel=1e-5), name
    assert (done.code, row["context"], row["document"]) == (0, CONTEXT, None)
    assert done.err.startswith(f"{tiny_run}, step 180, fp32 weights on cpu\n")


def test_each_document_by_itself_is_a_loop_over_its_tokens_behind_an_end_of_text(score, tiny_run):
    run = environment.load_run(tiny_run, weights="fp32", device="cpu")
    rows = score("four.jsonl", "--documents", "--json").samples
    all_bits = all_tokens = 0
    for row, text in zip(rows, TEXTS, strict=False):
        ids = run.tokenizer.encode(text)
        if len(ids) < CONTEXT:  # all of it is seen
            nats = nats_of(run.model, [run.tokenizer.end_of_text_id, *ids], CONTEXT)
            assert row["loss"] == pytest.approx(sum(nats) / len(ids), rel=1e-5)
            assert row["perplexity"] == pytest.approx(math.exp(sum(nats) / len(ids)), rel=1e-4)
        bits = row["loss"] * len(ids) / math.log(2)
        assert row["tokens"] == len(ids)
        assert row["bits_per_byte"] * len(text.encode()) == pytest.approx(bits)
        assert row["bits_per_character"] * len(text) == pytest.approx(bits)
        all_bits, all_tokens = all_bits + bits, all_tokens + len(ids)
    assert [row["document"] for row in rows] == [1, 2, 3, 4, None]
    assert rows[-1]["tokens"] == all_tokens
    assert rows[-1]["bits_per_byte"] * len("".join(TEXTS).encode()) == pytest.approx(all_bits)
    assert rows[-1]["bits_per_character"] * len("".join(TEXTS)) == pytest.approx(all_bits)
    assert rows[-1]["loss"] == pytest.approx(all_bits * math.log(2) / all_tokens)
    # with the others before it a document has other figures, and an end-of-text between each two
    (together,) = score("four.jsonl", "--json").samples
    assert together["tokens"] == all_tokens + 3 - 1
    assert together["loss"] != pytest.approx(rows[-1]["loss"], rel=1e-3)


def test_several_models_and_texts_are_a_table_and_a_shorter_context_costs_bits(score, tiny_run):
    Path("story.txt").write_text(STORY * 3, encoding="utf-8")
    done = score("story.txt", "four.jsonl", "--run", str(tiny_run), "--which", "last")
    header, *rows = done.out.splitlines()
    figures = ["tokens", "loss", "perplexity", "bits/character", "bits/byte"]
    assert header.split() == ["model", "text", *figures]
    assert [row.split()[:2] for row in rows] == [
        [str(tiny_run), text] for text in ("story.txt", "four.jsonl") * 2
    ]
    assert {len(line) for line in done.out.splitlines()} == {len(header)}
    assert rows[0].split()[2] == f"{3 * len(STORY) - 1}"
    (usual,) = score("story.txt", "--json").samples
    (short,) = score("story.txt", "--json", "--context", "1").samples
    assert usual["bits_per_byte"] + 0.2 < short["bits_per_byte"]
    assert f"{usual['loss']:.4f}" == rows[0].split()[3]


def test_of_conversations_the_answers_are_scored_by_the_models_template(score, monkeypatch):
    model = chat_model()
    monkeypatch.setattr(evaluate, "open_model", lambda *_, **__: model)
    turns = [[("The bell?", "It rang.")], [("Who came?", "Nobody."), ("At dawn?", "The ferry, 春")]]
    rows, expected = [], []
    for pairs in turns:
        messages, said, nats = [], [], []
        for question, answer in pairs:
            messages += [{"role": "user", "content": question}]
            messages += [{"role": "assistant", "content": answer}]
            before = ids_of(model.tokenizer, *said, f"user\n{question}")
            ids = [*model.tokenizer.encode(answer), model.tokenizer.special_tokens[END]]
            nats += nats_of(model.model, before + ids, 256)[len(before) - 1 :]
            said += [f"user\n{question}", f"assistant\n{answer}"]
        rows.append(json.dumps({"messages": messages}) + "\n")
        expected.append(nats)
    Path("chat.jsonl").write_text("".join(rows), encoding="utf-8")
    every = [nats for one in expected for nats in one]
    *each, whole = score("chat.jsonl", "--json", "--documents", run=None).samples
    for row, nats in zip([*each, whole], [*expected, every], strict=True):
        assert row["tokens"] == len(nats)
        assert row["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    bits = sum(every) / math.log(2)
    n_bytes = len("".join(answer for pairs in turns for _, answer in pairs).encode())
    assert whole["bits_per_byte"] * n_bytes == pytest.approx(bits, rel=1e-5)
    (together,) = score("chat.jsonl", "--json", run=None).samples
    assert together["tokens"] == whole["tokens"]
    assert together["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    done = score("chat.jsonl", "--context", "8", run=None)
    assert (done.code, "no answer in chat.jsonl ends within 8 tokens" in done.err) == (3, True)
    monkeypatch.setattr(model, "chat_template", None)
    done = score("chat.jsonl", run=None)
    assert done.code == 3 and "has no chat template" in done.err and "--field answer" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.txt"], 3, "there is no file nowhere.txt"),
        (["empty.txt"], 3, "empty.txt is empty"),
        (["a.txt"], 3, "a.txt is a single token"),
        ([], 2, "the following arguments are required: TEXT"),
        (["four.jsonl", "--context", "0"], 2, "--context is 0; it must be 1 or more"),
        (["four.jsonl", "--context", "4000"], 2, "--context is 4,000; the context of "),
        (["four.jsonl", "--device", "gpu"], 2, "--device is 'gpu'"),
        (["four.jsonl", "--field", "body"], 3, '"body"'),
    ],
)
def test_what_cannot_be_scored_is_said(score, arguments, code, said):
    Path("empty.txt").write_text("\n", encoding="utf-8")
    Path("a.txt").write_text("a", encoding="utf-8")
    done = score(*arguments)
    assert (done.code, done.out.splitlines()[1:]) == (code, [])
    assert said in done.err
