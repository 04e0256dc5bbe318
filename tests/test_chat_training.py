"""Runs on conversations: what they keep, how they resume, and what uses them knows of them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from benchmarks import facts
from benchmarks.facts import make_facts, write_rows
from engine.errors import DataError
from exchange.opening import open_pretrained
from exchange.saved_run import load_run
from generation import generate
from insight.measuring import measure_model
from insight.report import Report
from insight.run_files import read_run
from insight.run_text import RunText, find_answers, open_run_text
from planning.chat import (
    Question,
    about_chat,
    find_chat,
    find_context,
    find_questions,
    pack_conversations,
)
from planning.decisions import decide_training, most_steps_of, read_record
from planning.fine_tuning import MOST_CHAT_PASSES, MOST_PASSES, PATIENCE
from planning.plan import SMALL_CHAT, Chat, Start, resolve_settings
from planning.trial import Trial
from tests.conftest import train_in
from tests.records import plan_in_minutes, record_of
from tests.resuming import Bench, compare, uninterrupted
from tests.test_parallel import LOSSES, alone, furthest, settings_of, together
from text.chat_template import CHATML, Message, template_of
from text.sources import parse_data
from text.token_cache import TokenizedText, tokenize
from text.tokenizer import CharTokenizer

SHAPE = {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "architecture": "llama"}
# a template that is not ChatML's, with rules of its own
OTHER = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def write_rows_of_numbers(folder: Path, n_rows: int = 40) -> str:
    """Rows that ask which number comes next; the file's path."""
    rows = [{"question": f"After {n}?", "answer": f"{n + 1}."} for n in range(n_rows)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    return str(folder / "rows.jsonl")


def conversation(*turns: str) -> dict:
    """A row of turns, of which the user has the first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def tokenized(folder: Path, rows: list[dict], among: Sequence = (), **options) -> TokenizedText:
    """Rows as tokens, beside other files of the folder."""
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(content, encoding="utf-8")
    data = [str(folder / name) for name in ("rows.jsonl", *among)]
    return tokenize(parse_data(data), "char", 0.5, folder, **options)


@pytest.fixture
def bench(workdir, monkeypatch) -> Bench:
    return Bench(workdir, monkeypatch)


def test_a_run_on_conversations_resumes_exactly_and_is_used_with_its_last_weights(
    bench, capsys, monkeypatch
):
    lengths, of = [], Trial.of
    monkeypatch.setattr(Trial, "of", lambda *given: lengths.append(given[-1]) or of(*given))
    rows = write_rows_of_numbers(bench.folder)
    chat = {"DATA": [rows, "text.txt"], "max_length": 48, "model_overrides": SHAPE}
    chat |= {"gradient_accumulation_steps": 2, "batch_size": 2, "max_steps": 9, "eval_freq": 4}
    expected = uninterrupted(bench, **chat)
    bench.describe("run", **chat)
    bench.signal_at("take_step", 1, 4, 8, after=True)
    compare(bench.finish(), expected)
    assert bench.stopped_at == [1, 4, 8]
    assert lengths[-1] == [len(question.ids) for question in bench.env.prompts]
    said = capsys.readouterr().out
    assert "from random weights will imitate the form of these answers, and know nothing" in said
    assert "the run ends with its last weights and is used with them" in said

    record = read_record(bench.run)
    assert record.chat == Chat(CHATML.source, 36)  # and a text besides
    assert not list((bench.run / "best").iterdir())
    loaded = load_run(bench.run, weights="fp32")
    assert (loaded.step, loaded.chat_template) == (9, CHATML.source)
    for name, weights in loaded.model.state_dict().items():
        assert torch.equal(weights, bench.env.model.state_dict()[name]), name
    assert open_pretrained(str(bench.run)).chat_template == CHATML.source
    assert "<|im_end|>" in loaded.tokenizer.special_tokens

    moments = (bench.run / "samples.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert [moment.partition("\n")[0] for moment in moments] == ["Before training", "After epoch 1"]
    for moment in moments:
        assert moment.count("    After ") == moment.count("\n    -> ") == 3


def test_a_run_on_few_conversations_keeps_best_weights_only_where_patience_is_set():
    record = record_of(resolve_settings({}, "config_run.py"))
    for rows, patience, keeps_last in (
        (SMALL_CHAT - 1, None, True),
        (SMALL_CHAT - 1, 5, False),
        (SMALL_CHAT, None, False),
        (0, None, False),  # texts alone, and conversations to validate on
    ):
        training = dataclasses.replace(record.training, patience=patience)
        found = dataclasses.replace(record, chat=Chat("ChatML", rows), training=training)
        assert found.keeps_last == keeps_last
    assert not record.keeps_last


def test_fine_tuning_on_few_conversations_takes_more_passes_and_no_patience_of_its_own():
    plan = resolve_settings({"INIT_FROM": "runs/x", "MINUTES": 5}, "config_run.py")
    config = record_of(resolve_settings({}, "config_run.py")).model
    plan = dataclasses.replace(
        plan,
        start=Start("x", "0", config),
        model={"context_length": 64, "emb_dim": config.emb_dim},
    )
    for rows, passes, patience in (
        (SMALL_CHAT - 1, MOST_CHAT_PASSES, None),
        (SMALL_CHAT, MOST_PASSES, PATIENCE),
    ):
        chat = Chat("ChatML", rows)
        of_chat = dataclasses.replace(plan, chat=chat)
        assert decide_training(of_chat, torch.device("cpu"), 9999, None).patience == patience
        assert most_steps_of(None, 5, 7, from_weights=True, chat=chat) == 7 * passes


def test_conversations_beyond_max_length_are_cut_or_left_out_and_told(tmp_path):
    rows = [conversation(str(n), "x") for n in range(9)]
    rows += [conversation("a" * 90, "b"), conversation("c", "d", "e" * 90, "f")]
    text = tokenized(tmp_path, rows)
    found = pack_conversations(text, 64, 1)
    for name in ("n_cut", "n_left_out"):
        assert sum(getattr(windows.pieces, name) for windows in found) == 1
    plan = dataclasses.replace(resolve_settings({}, "config_run.py"), chat=Chat("ChatML", 5))
    training = dataclasses.replace(plan.training, stride=3)
    said = "\n".join(about_chat(plan, training, found, 64))
    assert "are longer than max_length: each is cut behind the last answer that fits" in said
    assert "are left out: no answer of theirs ends within max_length" in said
    assert "stride is for texts, and not used" in said
    # SmolLM2 is named where a recipe expects less of random weights, or there is no recipe
    assert 'INIT_FROM = "smollm2-135m"' in said
    in_minutes = dataclasses.replace(plan_in_minutes(), chat=plan.chat)
    for bits, is_named in ((0.1, False), (4.0, True)):
        recipe = dataclasses.replace(in_minutes.recipe, bits_per_byte=bits)
        choice = dataclasses.replace(in_minutes.choice, recipe=recipe)
        told = about_chat(dataclasses.replace(in_minutes, choice=choice), training, found, 64)
        assert ("smollm2" in "".join(told)) == is_named
        assert ("docs/fine-tuning.md" in "".join(told)) != is_named
    with pytest.raises(DataError, match=r"has an answer that ends within max_length \(8\)"):
        pack_conversations(text, 8, 1)


def test_a_recipes_context_is_raised_to_the_longest_conversation_unless_it_is_set(tmp_path):
    (tmp_path / "long.txt").write_text("A longer text. " * 200, encoding="utf-8")
    rows = [conversation("a" * n, "b" * 9) for n in (5, 5, 60, 60)]
    text = tokenized(tmp_path, rows, among=["long.txt"])
    # user's turn, "\n", the answer's opening and the answer; the end of its turn is a target only
    expected = (1 + len("user\n") + 60 + 1) + 1 + (1 + len("assistant\n")) + 9
    for context, fixed, found in ((16, {}, expected), (300, {}, 300), (16, {"max_length": 16}, 16)):
        plan = plan_in_minutes(CUSTOM_MODE=True, MODEL="auto", custom_params=fixed)
        plan = dataclasses.replace(plan, model=plan.model | {"context_length": context})
        assert find_context(text, plan) == found


def test_a_runs_conversations_are_counted_without_texts_and_without_repeats(tmp_path):
    rows = [conversation(str(n), "x") for n in range(12)]
    (tmp_path / "text.txt").write_text("A text of its own. " * 9, encoding="utf-8")
    tokenized(tmp_path, [*rows, *rows])
    files = [str(tmp_path / name) for name in ("rows.jsonl", "text.txt")]
    for data, n_rows in (
        ({"path": files[0], "val": files[0]}, 12),
        ({"path": [{"path": name, "weight": 10} for name in files], "val": files[0]}, 12),
        ({"path": [{"path": files[0], "weight": 0.5}], "val": files[0]}, 6),
        ({"path": files[1], "val": files[0]}, 0),
    ):
        text = tokenize(parse_data(data), "char", 0.5, tmp_path)
        assert find_chat(text) == Chat(CHATML.source, n_rows)


@pytest.mark.parametrize("template", [None, OTHER], ids=["ChatML", "another"])
def test_questions_are_what_the_user_says_last_before_the_first_answer(template, tmp_path):
    if template == OTHER:
        pytest.importorskip("jinja2")
    rows = [conversation(f"Is {n} odd?\nOr even?", "It is.", "Sure?", "Yes.") for n in range(8)]
    text = tokenized(tmp_path, rows, chat_template=template)
    tokens = pack_conversations(text, 200, 1)
    questions = find_questions(text, tokens)
    assert len(questions) == 3
    made = template_of(text.chat.template, text.tokenizer)
    for question in questions:
        assert question.text.startswith("Is ") and question.text.endswith(" odd?\nOr even?")
        asked = [Message("user", question.text)]
        assert question.ids == made.encode(asked, text.tokenizer, add_generation_prompt=True)
        assert question.ends == made.stop_ids(text.tokenizer)


def test_questions_are_found_behind_texts_in_one_pass_and_fit_into_a_window(tmp_path, monkeypatch):
    tokenized(tmp_path, [conversation(f"Is {n} odd?", "Yes.") for n in range(8)])
    texts = [{"text": "a text of its own " * 20} for _ in range(60)]
    rows = [conversation("too long " * 20, "x"), *(conversation(f"{n}?", "Yes.") for n in range(4))]
    for name, lines in (("texts", texts), ("val", rows)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(content, encoding="utf-8")
    path, *val = (str(tmp_path / f"{name}.jsonl") for name in ("rows", "texts", "val"))
    text = tokenize(parse_data({"path": path, "val": val}), "char", 0.5, tmp_path)
    tokens = pack_conversations(text, 64, 1)
    assert tokens.val.pieces.n_left_out == 1
    decoded, decode = [], type(text.tokenizer).decode
    monkeypatch.setattr(
        type(text.tokenizer), "decode", lambda self, ids: decoded.append(ids) or decode(self, ids)
    )
    questions = find_questions(text, tokens)
    assert [question.text for question in questions] == ["0?", "1?", "2?"]
    assert decoded[1:] == [question.ids for question in questions]  # the template's own first


def test_questions_are_shown_behind_a_greeting_and_a_piece_begins_where_its_conversation_does(
    tmp_path,
):
    greeting = {"role": "assistant", "content": "Hello, and good day"}
    rows = [{"messages": [greeting, *conversation(f"{n}?", "Yes.")["messages"]]} for n in range(8)]
    (tmp_path / "text.txt").write_text("A longer text. " * 200, encoding="utf-8")
    text = tokenized(tmp_path, rows, among=["text.txt"])
    assert (text.chat.train_is_text.sum(), text.chat.val_is_text.sum()) == (1, 1)
    made = template_of(text.chat.template, text.tokenizer)
    for most, shown in ((200, 3), (40, 0)):  # the greeting alone fits
        tokens = pack_conversations(text, most, 1)
        chats = text.chat.train_starts[~text.chat.train_is_text]
        texts = text.chat.train_starts[text.chat.train_is_text]
        starts = tokens.train.pieces.starts
        assert {*chats.tolist()} <= {*starts.tolist()}
        others = np.setdiff1d(starts, chats)
        assert len(others) > 1 and others.min() == texts.min()
        assert ((others - texts.min()) % most == 0).all()
        questions = find_questions(text, tokens)
        assert len(questions) == shown
        for question in questions:
            asked = [Message("assistant", greeting["content"]), Message("user", question.text)]
            assert question.text[1:] == "?"
            assert question.ids == made.encode(asked, text.tokenizer, add_generation_prompt=True)


def test_an_answer_during_training_ends_with_its_turn_or_with_the_text(monkeypatch):
    tokenizer, asked = CharTokenizer("ab?").adding(["<|im_end|>"]), {}
    ends = (tokenizer.special_tokens["<|im_end|>"], tokenizer.end_of_text_id)
    questions = [Question("a?", tokenizer.encode("a?"), ends)] * 2

    def generate(model, prompts, **options):
        asked.update(options)
        return [[*ids, *tokenizer.encode("b"), end] for ids, end in zip(prompts, ends, strict=True)]

    monkeypatch.setattr(train, "generate", generate)
    assert train.continue_prompts(None, tokenizer, questions) == ["a?\n-> b"] * 2
    assert asked["stop_ids"] == ends


def test_made_up_facts_are_distinct_and_the_fourth_phrasing_is_not_trained_on(tmp_path):
    facts = make_facts(200)
    names = [fact.name for fact in facts]
    assert len(set(names)) == len(facts)
    assert all(name in fact.answer for name, fact in zip(names, facts, strict=True))
    assert not any(name in q for name in names for fact in facts for q in fact.questions)
    write_rows(tmp_path, facts)
    train_rows, val_rows = (
        [json.loads(line)["question"] for line in (tmp_path / f"{name}.jsonl").open("rb")]
        for name in ("train", "val")
    )
    assert (len(set(train_rows)), len(set(val_rows))) == (600, 200)
    assert not set(train_rows) & set(val_rows)


def test_facts_that_were_measured_for_other_arguments_are_measured_again(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(facts, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(facts, "count_right", lambda *given: counted.append(given) or 0)
    monkeypatch.setattr(facts, "bits_per_byte", lambda *_: 1.0)
    for asked, n_counted in (({"tokens": 5}, 2), ({"tokens": 5}, 2), ({"tokens": 6}, 4)):
        found = facts.measure(tmp_path, "full", "somewhere", make_facts(3), asked)
        assert (found["asked"], len(counted)) == (asked, n_counted)
    monkeypatch.setattr(facts.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    kept = tmp_path / "runs" / "full" / "kept"
    for settings, is_kept in (("# 3 facts", False), ("# 3 facts", True), ("# 4 facts", False)):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.touch()
        facts.train(tmp_path, "full", settings)
        assert kept.exists() == is_kept


def test_answers_are_drawn_with_all_that_comes_before_them_and_fit(tmp_path):
    turns = ("One?", "1!", "And two?", "2!")
    rows = [conversation(*(f"{n} {turn}" for turn in turns)) for n in range(40)]
    rows.append(conversation("Long?" * 100, "Yes."))
    (tmp_path / "text.txt").write_text("A text among them.", encoding="utf-8")
    text = tokenized(tmp_path, rows, ["text.txt"])
    tokens = np.fromfile(text.path, text.dtype)
    sides = tokens[: text.n_train], tokens[text.n_train :]
    run_text = RunText(*sides, text.tokenizer, "", text.chat)
    found = find_answers(run_text, 500, 120)
    assert sum(map(len, found)) == 40  # one of each conversation that fits
    template = template_of(text.chat.template, text.tokenizer)
    for answer in [*found[0], *found[1]]:
        own, before = (text.tokenizer.decode(ids) for ids in (answer.own[:-1], answer.prompt))
        assert answer.own[-1] in template.stop_ids(text.tokenizer)
        number, said = own.split()
        asked = [Message("user", f"{number} One?")]
        if said == "2!":
            asked += [Message("assistant", f"{number} 1!"), Message("user", f"{number} And two?")]
        assert answer.prompt == template.encode(asked, text.tokenizer, add_generation_prompt=True)
        assert before.count("?") == int(said[0]) and len(answer.prompt + answer.own) <= 120
    assert len({answer.own[-2] for answer in found[0]}) == 1  # "!": both answers are among them
    assert len({answer.own[-3] for answer in found[0]}) == 2
    assert find_answers(run_text, 500, 120) == found
    assert [len(side) for side in find_answers(run_text, 3, 120)] == [3, 3]


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """The folder of a run that has learned to count from conversations alone."""
    folder = tmp_path_factory.mktemp("learned")
    rows = write_rows_of_numbers(folder, 24)
    shape = SHAPE | {"emb_dim": 32, "n_layers": 2}
    params = {"max_steps": 400, "max_length": 64, "batch_size": 4, "learning_rate": 1e-2}
    params |= {"eval_freq": 400, "model_overrides": shape}
    return train_in(
        folder,
        f"DATA = {{'path': {rows!r}, 'val': {rows!r}}}\n"
        'TOKENIZER, CUSTOM_MODE, RUN_NAME, PRECISION = "char", True, "tiny", "fp32"\n'
        f"custom_params = {params!r}\n",
    )


@pytest.mark.slow
def test_a_model_answers_what_it_has_learned_and_ends_its_turn(learned):
    loaded = load_run(learned, weights="fp32")
    template = template_of(loaded.chat_template, loaded.tokenizer)
    asked = [[Message("user", f"After {n}?")] for n in range(24)]
    ids = [template.encode(m, loaded.tokenizer, add_generation_prompt=True) for m in asked]
    end = template.stop_ids(loaded.tokenizer)[0]
    rows = generate(loaded.model, ids, max_new_tokens=8, temperature=0.0, end_of_text_id=end)
    for n, prompt, row in zip(range(24), ids, rows, strict=True):
        assert row[-1] == end
        assert loaded.tokenizer.decode(row[len(prompt) : -1]) == f"{n + 1}."


@pytest.mark.slow
def test_answers_learned_by_heart_are_found_in_the_report(learned):
    facts = measure_model(read_run(learned), open_run_text(learned))["by_heart"]
    assert (facts["prompts"], facts["val_prompts"]) == (24, 24)
    known = facts["extraction_rate"]
    assert known == facts["guess_rate"] > 0.5  # the same rows validate
    report = Report(learned)
    report.note({"by_heart": facts})
    report.draw()
    page = (learned / "report.html").read_text(encoding="utf-8")
    assert f"of 24 questions that it learned it answers {known:.1%} word for word" in page
    assert f"{known:.0%} of tried answers are known by heart" in page


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_run_that_begins_from_a_chat_model_keeps_its_template_and_resumes_exactly(
    lora_rank, bench, learned
):
    rows = write_rows_of_numbers(bench.folder, 12)
    chat = {"DATA": rows, "INIT_FROM": str(learned), "TOKENIZER": None, "model_overrides": {}}
    chat |= {"max_length": None, "max_steps": 4, "warmup_steps": 1, "eval_freq": 2}
    chat |= {"lora_rank": lora_rank}
    expected = uninterrupted(bench, **chat)
    bench.describe("run", **chat)
    bench.signal_at("take_step", 2, after=True)
    compare(bench.finish(), expected)
    record = read_record(bench.run)
    assert record.start.chat_template == record.chat.template == CHATML.source
    assert record.model.vocab_size == read_record(learned).model.vocab_size
    assert load_run(bench.run).chat_template == CHATML.source


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one_on_conversations(tmp_path):
    rows = write_rows_of_numbers(tmp_path)
    chat = {"DATA": rows, "max_length": 40, "model_overrides": SHAPE, "max_steps": 6}
    files = [settings_of(tmp_path, name, **chat) for name in ("one", "two")]
    alone(tmp_path, [files[0]])
    together(tmp_path, 2, [files[1]])
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    assert [read_record(run).ranks for run in runs] == [1, 2]
    assert furthest(*runs, *LOSSES) < 2e-5
