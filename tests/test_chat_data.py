"""Rows of conversations: every form read, the answers marked token by token, and kept on disk."""

import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.errors import DataError, SettingsError
from tests.reading import json_lines, save
from tests.test_chat_template import BRACKETS, HEADERS, NAMES, with_tokens
from tests.test_token_cache import never_read, no_fsync  # noqa: F401
from tests.texts import ENGLISH
from text import token_cache
from text.arrangement import Side, times_seen
from text.chat import Conversation, content_text
from text.chat_template import CHATML, Message, template_of
from text.chat_tokens import ChatReport
from text.documents import DataSpec, ReadingReport, each_document, read_documents
from text.sources import find_parts, parse_data
from text.split import split_by_position, split_whole
from text.token_cache import TokenizedText, tokenize
from text.tokenizer import CharTokenizer, Tokenizer
from text.tokenizer_file import END_OF_TEXT


def message(role: str, content) -> dict:
    return {"role": role, "content": content}


USER, ANSWER = message("user", "Hi"), message("assistant", "Yo")
# a template that writes nothing for no messages, not even the prompt for an answer
LATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}"
    "{% if loop.last and add_generation_prompt %}{{ '[assistant]' }}{% endif %}{% endfor %}"
)

# Rows of every form, and their text by three templates. ⟦ ⟧ are around what the loss counts; ‹ ›
# are < > where a message has typed a special token's name, which is text.
TABLE = [
    (
        {"messages": [USER, ANSWER]},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n",
        "<|begin_of_text|><|start|>user<|end|>\n\nHi<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦Yo<|eot_id|>⟧",
        "<s>[INST] Hi [/INST]⟦ Yo</s>⟧",
    ),
    (
        {
            "messages": [
                *(message("user", "a"), message("assistant", "b\n\nc"), message("user", "d")),
                message("assistant", "e"),
            ]
        },
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b\n\nc<|im_end|>⟧\n"
        "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n⟦e<|im_end|>⟧\n",
        "<|begin_of_text|><|start|>user<|end|>\n\na<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦b\n\nc<|eot_id|>⟧"
        "<|start|>user<|end|>\n\nd<|eot_id|><|start|>assistant<|end|>\n\n⟦e<|eot_id|>⟧",
        "<s>[INST] a [/INST]⟦ b\n\nc</s>⟧[INST] d [/INST]⟦ e</s>⟧",
    ),
    (
        {"messages": [message("system", "S"), USER, ANSWER, message("user", "Bye")]},
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n",
        "<|begin_of_text|><|start|>system<|end|>\n\nS<|eot_id|>"
        "<|start|>user<|end|>\n\nHi<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦Yo<|eot_id|>⟧<|start|>user<|end|>\n\nBye<|eot_id|>",
        "there is no role system",
    ),
    (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "春"}]},
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦春<|im_end|>⟧\n",
        "<|begin_of_text|><|start|>user<|end|>\n\nQ<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦春<|eot_id|>⟧",
        "<s>[INST] Q [/INST]⟦ 春</s>⟧",
    ),
    (
        {"instruction": "Add", "input": "1+1", "output": "2"},
        "<|im_start|>user\nAdd\n\n1+1<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n",
        "<|begin_of_text|><|start|>user<|end|>\n\nAdd\n\n1+1<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦2<|eot_id|>⟧",
        "<s>[INST] Add\n\n1+1 [/INST]⟦ 2</s>⟧",
    ),
    (
        {"instruction": "Sing", "input": "", "output": " la \n"},
        "<|im_start|>user\nSing<|im_end|>\n<|im_start|>assistant\n⟦ la \n<|im_end|>⟧\n",
        "<|begin_of_text|><|start|>user<|end|>\n\nSing<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦la<|eot_id|>⟧",
        "<s>[INST] Sing [/INST]⟦  la \n</s>⟧",
    ),
    (
        {"prompt": "‹|im_end|› ‹|eot_id|›", "response": "‹/s›‹|im_end|›"},
        "<|im_start|>user\n‹|im_end|› ‹|eot_id|›<|im_end|>\n"
        "<|im_start|>assistant\n⟦‹/s›‹|im_end|›<|im_end|>⟧\n",
        "<|begin_of_text|><|start|>user<|end|>\n\n‹|im_end|› ‹|eot_id|›<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦‹/s›‹|im_end|›<|eot_id|>⟧",
        "<s>[INST] ‹|im_end|› ‹|eot_id|› [/INST]⟦ ‹/s›‹|im_end|›</s>⟧",
    ),
    (
        {"prompt": [USER, ANSWER, message("user", "p")], "completion": [message("assistant", "c")]},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n"
        "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n⟦c<|im_end|>⟧\n",
        "<|begin_of_text|><|start|>user<|end|>\n\nHi<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦Yo<|eot_id|>⟧<|start|>user<|end|>\n\np<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦c<|eot_id|>⟧",
        "<s>[INST] Hi [/INST]⟦ Yo</s>⟧[INST] p [/INST]⟦ c</s>⟧",
    ),
    (
        {"question": "why", "answer": "so", "system": ""},
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n⟦so<|im_end|>⟧\n",
        "<|begin_of_text|><|start|>user<|end|>\n\nwhy<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦so<|eot_id|>⟧",
        "<s>[INST] why [/INST]⟦ so</s>⟧",
    ),
    (
        {
            "messages": [
                message("user", [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]),
                message("assistant", "z"),
            ]
        },
        "<|im_start|>user\nx\ny<|im_end|>\n<|im_start|>assistant\n⟦z<|im_end|>⟧\n",
        "<|begin_of_text|><|start|>user<|end|>\n\nx\ny<|eot_id|>"
        "<|start|>assistant<|end|>\n\n⟦z<|eot_id|>⟧",
        "<s>[INST] x\ny [/INST]⟦ z</s>⟧",
    ),
]


def typed(text: str) -> str:
    return text.replace("‹", "<").replace("›", ">")


def as_written(text: str, kind: str, tokenizer: Tokenizer) -> list[tuple[int, bool]]:
    """A text of the table as tokens, special ones and characters, and which of them count."""
    found, counts = [], False
    for part in re.split("(⟦|⟧|" + "|".join(map(re.escape, NAMES[kind])) + ")", text):
        if part in ("⟦", "⟧"):
            counts = part == "⟦"
        elif part in NAMES[kind]:
            found.append((tokenizer.special_tokens[part], counts))
        else:
            found += [(token, counts) for c in typed(part) for token in tokenizer.encode(c)]
    return found


def conversations_of(data) -> list[Conversation]:
    spec, report = parse_data(data), ReadingReport()
    found = list(each_document(find_parts(spec.train, Path("cache"), report), spec, report))
    assert all(isinstance(each, Conversation) for each in found)
    return found


def told_of(data) -> str:
    with pytest.raises(DataError) as caught:
        conversations_of(data)
    return str(caught.value)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_mask_of_every_form_by_three_templates_is_the_one_written_here():
    rows = [json.loads(typed(json.dumps(row, ensure_ascii=False))) for row, *_ in TABLE]
    save("rows.jsonl", json_lines(rows))
    found = conversations_of("rows.jsonl")
    for number, kind in enumerate(("chatml", "headers", "brackets"), start=1):
        template, tokenizer = with_tokens(kind, CharTokenizer("abc"))
        if kind == "brackets":
            template = dataclasses.replace(template, end="</s>")
        for conversation, row in zip(found, TABLE, strict=True):
            if row[number].startswith("there is no role"):
                with pytest.raises(DataError, match=row[number]):
                    template.encode_with_targets(conversation.messages, tokenizer)
                continue
            ids, targets = template.encode_with_targets(conversation.messages, tokenizer)
            assert list(zip(ids, targets, strict=True)) == as_written(row[number], kind, tokenizer)


def test_every_kind_of_file_holds_conversations_and_says_in_which_form():
    pairs = [("Who?", "Me, you"), ('Say "no"', "no\n\nNo")]
    table = 'Answer;Question \n"Me, you";Who?\n"no\n\nNo";"Say ""no"""\n'
    messages = [[message("user", q), message("assistant", a)] for q, a in pairs]
    rows = [{"question": q, "answer": a, "id": 1} for q, a in pairs]
    files = {
        "a.jsonl": (json_lines(rows), "question, answer"),
        "b.json": (json.dumps(rows).encode(), "question, answer"),
        "c.csv": (table.encode(), "Question , Answer"),
        "d.json": (json.dumps({"data": [{"Messages": m} for m in messages]}).encode(), "Messages"),
        "e.json": (json.dumps(messages).encode(), "a list of messages"),
        "f.jsonl": (json_lines([{"messages": json.dumps(m)} for m in messages]), "messages"),
        "g.json": (
            "\n".join(json.dumps({"messages": m}, indent=1) for m in messages).encode(),
            "messages",
        ),
    }
    try:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"messages": messages, "n": [1, 2]}), "h.parquet")
        files["h.parquet"] = (Path("h.parquet").read_bytes(), "messages")
    except ImportError:
        pass
    expected = [(Message("user", q), Message("assistant", a)) for q, a in pairs]
    for name, (content, form) in files.items():
        save(name, content)
        spec, report = parse_data(name), ReadingReport()
        found = list(each_document(find_parts([name], Path("cache"), report), spec, report))
        assert [each.messages for each in found] == expected, name
        assert f"{name}: chat rows: {form}" in [note.en for note in report.notes]


def test_other_roles_and_fields_that_are_there_are_read():
    def read(row: dict) -> list[tuple[str, str]]:
        save("one.jsonl", json.dumps(row).encode())
        [found] = conversations_of("one.jsonl")
        return [(m.role, m.content) for m in found.messages]

    turn = {"from": "user", "value": "a"}, {"from": "chatgpt", "value": "b"}
    pair = [("user", "a"), ("assistant", "b")]
    assert read({"conversation": list(turn), "system": "S"}) == [("system", "S"), *pair]
    assert read({"instruction": "a", "context": "c", "response": "b"}) == [
        ("user", "a\n\nc"),
        ("assistant", "b"),
    ]
    own = message("developer", "D")
    assert read({"messages": [own, USER, ANSWER], "system": "S"})[0] == ("system", "D")
    assert read({"question": "a\ud83d", "answer": "b"}) == [("user", "a\ufffd"), ("assistant", "b")]


def test_a_text_field_is_text_and_a_field_that_is_set_is_the_one_that_is_read():
    row = {"text": "T", "messages": [USER, ANSWER]}
    save("both.jsonl", json_lines([row]))
    spec, report = parse_data("both.jsonl"), ReadingReport()
    parts = find_parts(spec.train, Path("cache"), report)
    assert list(read_documents(parts, spec, report)) == [("T", True)]
    save("body.jsonl", json_lines([{"question": "q", "answer": "a"}] * 2))
    assert 'no "body" field' in told_of({"path": "body.jsonl", "field": "body"})
    [found] = conversations_of({"path": "both.jsonl", "field": "messages"})
    assert found.messages == (Message("user", "Hi"), Message("assistant", "Yo"))


def test_rows_that_are_no_conversation_are_refused_by_what_they_hold():
    call = message("assistant", None) | {"tool_calls": [{"id": "1"}]}
    for row, told in [
        ({"messages": [USER, call]}, 'message 2 has "tool_calls": tool calls are not trained on'),
        ({"messages": [USER, message("tool", "4")]}, 'message 2 is of the role "tool"'),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, 'it has "tools"'),
        ({"conversations": [{"from": "observation"}]}, 'message 1 is of the role "observation"'),
        ({"messages": [message("king", "x")]}, "message 1 has the role 'king'; it must be"),
        ({"messages": [{"content": "x"}]}, 'message 1 has no "role"'),
        ({"messages": []}, '"messages" is no list of messages'),
        ({"messages": "Hi"}, '"messages" is a text, and not JSON'),
        ({"messages": [message("user", 7)]}, "message 1: it is int, not text"),
        ({"messages": [message("user", None)]}, "message 1: it is null, not text"),
        (
            {"messages": [message("user", [{"type": "image_url", "image_url": "x"}])]},
            'message 1: a part of it is of the type "image_url", and only text is read',
        ),
        ({"question": "q", "answer": ["a"]}, '"answer": a part of it is of the type "str"'),
        ({"question": None, "answer": "a"}, '"question": it is null, not text'),
    ]:
        save("bad.jsonl", json_lines([row]))
        assert f"bad.jsonl line 1: {told}" in told_of("bad.jsonl")
    with pytest.raises(ValueError, match="it is dict, not text"):
        content_text({})


def test_a_file_holds_conversations_or_texts_and_not_both():
    pair = {"question": "q", "answer": "a"}
    save("mixed.jsonl", json_lines([pair, {"text": "T"}, pair, {"other": 1}] * 3))
    told = told_of("mixed.jsonl")
    assert "line 2: a text, and the rows before it are conversations" in told
    assert "line 4: no conversation in its fields (has: other)" in told
    save("mixed.jsonl", json_lines([{"text": "T"}, pair] * 4))
    spec = parse_data("mixed.jsonl")
    with pytest.raises(DataError, match="line 2: a conversation, and the rows before it are texts"):
        list(
            read_documents(
                find_parts(spec.train, Path("c"), ReadingReport()), spec, ReadingReport()
            )
        )


def test_a_conversation_reads_as_what_its_messages_say():
    save("qa.jsonl", json_lines(rows(1)))
    spec, report = parse_data("qa.jsonl"), ReadingReport()
    parts = find_parts(spec.train, Path("cache"), report)
    assert list(read_documents(parts, spec, report)) == [("q0?\nIt is 0.", True)]
    assert (report.documents, report.characters) == (1, len("q0?It is 0."))
    # the tokens of a template are of no character, and make no tokenizer look like a wrong one:
    # of 30 there are 10 in the answers and 2 that end them
    told = ChatReport(tokens=30, target_tokens=12, answers=2, other_characters=10)
    sides, tokenizer = [Side(np.array([30.0]))], SimpleNamespace(kind="gpt2")
    assert token_cache._about_rate(tokenizer, sides, 20, told) == []
    assert "1.11 tokens a character" in token_cache._about_rate(tokenizer, sides, 19, told)[0].en


def rows(count: int, name: str = "q") -> list[dict]:
    return [{"question": f"{name}{i}?", "answer": f"It is {i}."} for i in range(count)]


def build(data, name: str = "char", **options) -> TokenizedText:
    return tokenize(parse_data(data), name, 0.9, Path("cache"), **options)


def sides(text: TokenizedText) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The conversations of training and of validation: their text, and what of it counts."""
    assert text.chat is not None and text.n_train is not None
    ids = np.fromfile(text.path, text.dtype)
    marks = np.fromfile(text.chat.targets, np.uint8)
    assert len(ids) == len(marks) == text.n_tokens
    decode, found = text.tokenizer.decode, []
    for starts, offset, end in [
        (text.chat.train_starts, 0, text.n_train),
        (text.chat.val_starts, text.n_train, text.n_tokens),
    ]:
        places = [*(starts + offset).tolist(), end]
        spans = [slice(a, b) for a, b in itertools.pairwise(places)]
        found.append([(decode(ids[s]), decode(ids[s][marks[s] == 1])) for s in spans])
    return found[0], found[1]


def as_chatml(row: dict) -> tuple[str, str]:
    question, answer = row["question"], row["answer"]
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    return text, f"{answer}<|im_end|>"


def test_conversations_are_on_disk_with_their_marks_and_starts_each_on_one_side(monkeypatch):
    save("qa.jsonl", json_lines(rows(60)))
    text = build("qa.jsonl")
    train, val = sides(text)
    assert sorted(train + val) == sorted(map(as_chatml, rows(60)))
    assert 0.08 < sum(len(t) for t, _ in val) / sum(len(t) for t, _ in train + val) < 0.12
    assert text.chat.template == CHATML.source
    n = text.tokenizer.vocab_size
    assert text.tokenizer.special_tokens == {
        END_OF_TEXT: n - 3,
        "<|im_start|>": n - 2,
        "<|im_end|>": n - 1,
    }
    counted = sum(len(text.tokenizer.encode(row["answer"])) + 1 for row in rows(60))
    assert text.report["chat"] == {
        "conversations": 60,
        "turns": 120,
        "tokens": text.n_tokens,
        "target_tokens": counted,
        "prompts_on_both_sides": 0,
    }
    characters = sum(len(row["question"] + row["answer"]) for row in rows(60))
    assert text.report["characters"] == characters
    share = f"{counted / text.n_tokens:.0%}"
    assert [note.en for note in text.report["notes"]] == [
        "qa.jsonl: chat rows: question, answer",
        f"60 conversations, 120 turns: the loss counts {counted:,} of {text.n_tokens:,} tokens "
        f"({share}), those of the answers",
    ]
    # found again, unread; the order of the rows changes no side
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "each_document", never_read)
        assert build("qa.jsonl").sha256 == text.sha256
    save("back.jsonl", json_lines(rows(60)[::-1]))
    assert set(sides(build("back.jsonl"))[1]) == set(val)


def test_a_template_of_the_weights_is_used_and_is_part_of_what_a_text_is():
    save("qa.jsonl", json_lines(rows(30)))
    _, tokenizer = with_tokens("headers", CharTokenizer("abc"))
    Path("own").mkdir()
    save("own/tokenizer.json", tokenizer.to_json().encode())
    text = build("qa.jsonl", "own/tokenizer.json", chat_template=HEADERS)
    assert (text.chat.template, text.tokenizer.fingerprint) == (HEADERS, tokenizer.fingerprint)
    template = template_of(HEADERS, tokenizer)
    shown, counted = sides(text)[1][0]
    question = re.search(r"q\d+\?", shown)[0]
    messages = [Message("user", question), Message("assistant", f"It is {question[1:-1]}.")]
    assert shown == template.render(messages) and counted == messages[1].content + "<|eot_id|>"
    # the same rows by another template, and those that it refuses
    assert build("qa.jsonl", "own/tokenizer.json").sha256 != text.sha256
    save("system.jsonl", json_lines([{"system": "S"} | row for row in rows(30)]))
    with pytest.raises(DataError) as caught:
        build("system.jsonl", "own/tokenizer.json", chat_template=BRACKETS)
    assert str(caught.value).startswith("system.jsonl line 1: the chat template refuses this: ")


def test_rows_that_the_template_refuses_are_bad_rows_and_its_own_faults_are_told_once():
    pytest.importorskip("jinja2")
    refused = [row | {"system": "S"} for row in rows(4, "s")]
    save("few.jsonl", json_lines([*refused[:3], *rows(30)]))
    text = build("few.jsonl", chat_template=BRACKETS)
    assert text.report["documents"] == text.report["chat"]["conversations"] == 30
    [note] = [en for en, _ in text.report["notes"] if "bad rows" in en]
    assert note.startswith("few.jsonl: 3 bad rows passed over (9.09%): line 1: the chat template")
    save("qa.jsonl", json_lines([*rows(30), *refused, {"question": 7, "answer": "a"}]))
    with pytest.raises(DataError) as caught:
        build("qa.jsonl", chat_template=BRACKETS)
    told = str(caught.value)
    assert "qa.jsonl line 31: the chat template refuses this: there is no role system; line" in told
    assert "Bad are 5 of 35 rows (14.3%" in told and '"bad_rows": "skip"' in told
    text = build({"path": "qa.jsonl", "bad_rows": "skip"}, chat_template=BRACKETS)
    assert sorted(t for side in sides(text) for t, _ in side) == sorted(
        f"{END_OF_TEXT}[INST] {row['question']} [/INST] {row['answer']}{END_OF_TEXT}"
        for row in rows(30)
    )
    with pytest.raises(DataError) as caught:
        build("qa.jsonl", chat_template=CHATML.source.replace("'<|im_end|>'", "''"))
    told = str(caught.value)
    assert told.startswith("the chat template ends an assistant's turn with no special token")
    assert "line" not in told


@pytest.mark.parametrize("template", [None, LATE], ids=["ChatML", "another"])
def test_a_conversation_may_begin_with_an_answer_and_is_divided_by_its_first_question(template):
    if template == LATE:
        pytest.importorskip("jinja2")
    greeting = message("assistant", "Hello")
    greeted = [
        {"messages": [greeting, message("user", q), message("assistant", f"It is {i}, {n}.")]}
        for n in range(2)
        for i in range(30)
        for q in [f"q{i}?"]
    ]
    save("greeted.jsonl", json_lines([*greeted, {"messages": [greeting]}]))
    last = conversations_of("greeted.jsonl")[-1]
    assert last.prompt == last.messages
    text = build("greeted.jsonl", chat_template=template)
    end = "<|im_end|>" if template is None else END_OF_TEXT
    for shown, counted in [pair for side in sides(text) for pair in side]:
        answers = re.findall("Hello|It is .*[.]", shown)
        assert counted == "".join(answer + end for answer in answers) and counted.strip(end)
    train, val = ({*re.findall(r"q\d+", str(side))} for side in sides(text))
    assert len(val) in (2, 3, 4) and len(train) == 30 - len(val) and not train & val


def test_damaged_marks_and_starts_are_noticed_and_made_anew(capsys):
    save("qa.jsonl", json_lines(rows(30)))
    text = build("qa.jsonl")
    for name in ("targets.bin", "starts.bin"):
        path = text.path.with_name(name)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert build("qa.jsonl").sha256 == text.sha256
        assert path.read_bytes() == content
        assert "is damaged; it is made anew" in capsys.readouterr().out
        path.unlink()
        assert build("qa.jsonl").sha256 == text.sha256 and path.read_bytes() == content


def test_one_question_is_on_one_side_and_what_has_no_answer_is_passed_over():
    twice = [row | {"answer": f"{k}"} for row in rows(40) for k in range(2)]
    save("qa.jsonl", json_lines([*twice, {"question": "x", "answer": "  "}, rows(1)[0]]))
    text = build("qa.jsonl")
    train, val = ({t.split("<|im_end|>")[0] for t, _ in side} for side in sides(text))
    assert train and val and not train & val
    assert text.report["chat"]["conversations"] == text.report["documents"] == 81
    assert "qa.jsonl: 1 row without an answer passed over" in [
        note.en for note in text.report["notes"]
    ]
    save("val.jsonl", json_lines(rows(3)))
    text = build({"path": "qa.jsonl", "val": "val.jsonl"})
    assert text.report["chat"]["prompts_on_both_sides"] == 3
    assert text.report["documents_on_both_sides"] == 1
    # one question alone: its answers are divided
    save("same.jsonl", json_lines([{"question": "q", "answer": f"{i}"} for i in range(30)]))
    train, val = sides(build("same.jsonl"))
    assert len(train) + len(val) == 30 and len(val) in (2, 3, 4)


def test_too_few_conversations_are_refused_by_what_is_missing():
    save("one.jsonl", json_lines(rows(1)))
    with pytest.raises(DataError, match="there is only one conversation"):
        build("one.jsonl")
    save("none.jsonl", json_lines([{"question": "q", "answer": ""}] * 3))
    with pytest.raises(DataError, match=r"none.jsonl has no row with an answer \(3 without\)"):
        build("none.jsonl")
    save("two.jsonl", json_lines(rows(2)))
    assert [len(side) for side in sides(build("two.jsonl"))] == [1, 1]
    text = build({"path": "one.jsonl", "val": "two.jsonl"})
    assert [len(side) for side in sides(text)] == [1, 2]


def test_texts_beside_rows_without_answers_are_texts_alone():
    save("story.txt", ENGLISH[:3000].encode())
    save("none.jsonl", json_lines([{"question": "q", "answer": ""}] * 3))
    text = build(["story.txt", "none.jsonl"])
    assert text.chat is None and "chat" not in text.report
    assert text.tokenizer.decode(np.fromfile(text.path, text.dtype)) == ENGLISH[:3000]
    assert "none.jsonl: 3 rows without an answer passed over" in [
        note.en for note in text.report["notes"]
    ]
    files = {path.name for path in text.path.parent.iterdir()}
    assert files == {"tokens.bin", "tokenizer.json", "entry.json"}
    assert build(["story.txt", "none.jsonl"]).sha256 == text.sha256  # found again
    save("qa.jsonl", json_lines(rows(2)))
    for data in (
        {"path": "story.txt", "val": "none.jsonl"},
        {"path": "qa.jsonl", "val": "none.jsonl"},
        {"path": "none.jsonl", "val": "qa.jsonl"},
    ):
        with pytest.raises(DataError, match=r"^none.jsonl has no row with an answer \(3 without\)"):
            build(data)


def test_texts_among_conversations_count_in_full_and_end_with_their_end():
    story = ENGLISH[:3000]
    save("story.txt", story.encode())
    save("lines.jsonl", json_lines([{"text": f"line {i}"} for i in range(30)]))
    save("qa.jsonl", json_lines(rows(50)))
    for names in (["story.txt", "qa.jsonl"], ["qa.jsonl", "lines.jsonl", "qa.jsonl", "story.txt"]):
        train, val = sides(build(names))
        chat = [pair for pair in train + val if pair[0].startswith("<|im_start|>")]
        texts = [pair for pair in train + val if pair not in chat]
        assert Counter(chat) == Counter(map(as_chatml, rows(50) * names.count("qa.jsonl")))
        assert all(shown == counted for shown, counted in texts)
        head, tail = (
            next(t for t, _ in side if t.strip(END_OF_TEXT) in story) for side in (train, val)
        )
        assert head + tail == story + END_OF_TEXT  # cut, as in a text alone
        if len(names) > 2:
            lines = {t for t, _ in texts} - {head, tail}
            assert lines == {f"line {i}{END_OF_TEXT}" for i in range(30)}


def test_a_weight_is_how_often_what_trains_is_seen_in_an_epoch():
    save("a.jsonl", json_lines(rows(40, "a")))
    save("b.jsonl", json_lines(rows(40, "b")))
    data = ["a.jsonl", {"path": "b.jsonl", "weight": 2.5}]
    text = build(data)
    train, val = sides(text)
    plain_train, plain_val = sides(build(["a.jsonl", "b.jsonl"]))
    assert val == plain_val and set(train) == set(plain_train)
    times = Counter(train)
    of_a, of_b = (
        [n for (shown, _), n in times.items() if shown.split("\n")[1].startswith(name)]
        for name in "ab"
    )
    n_more = round(len(of_b) / 2)
    assert set(of_a) == {1} and len(of_a + of_b + val) == 80
    assert Counter(of_b) == {2: len(of_b) - n_more, 3: n_more}
    note = (
        f"its weight is 2.5: {len(of_b)} documents to train on, seen {sum(of_b)} times in an epoch"
    )
    assert f"b.jsonl: {note}" in [note.en for note in text.report["notes"]]


def test_texts_have_weights_too_and_validate_once():
    save("a.txt", ("a" * 900).encode())
    save("b.txt", ("b" * 600).encode())
    text = build([{"path": "a.txt", "weight": 3}, "b.txt"])
    shown = text.tokenizer.decode(np.fromfile(text.path, text.dtype))
    # the last tenth validates
    expected = ["a" * 900, "b" * 450, "a" * 900, "a" * 900 + "b" * 150]
    assert shown.split(END_OF_TEXT) == expected
    assert text.n_tokens - text.n_train == 150
    assert text.report["tokens_per_character"] == pytest.approx(1.0, abs=0.01)
    save("c.jsonl", json_lines([{"text": f"{i:04}"} for i in range(100)]))
    save("v.txt", b"the end")
    text = build({"path": ["a.txt", {"path": "c.jsonl", "weight": 0.25}], "val": "v.txt"})
    ids = np.fromfile(text.path, text.dtype)
    assert len(text.tokenizer.decode(ids[: text.n_train]).split(END_OF_TEXT)) == 26
    assert text.tokenizer.decode(ids[text.n_train :]) == "the end"


def test_a_weight_that_leaves_nothing_to_train_on_is_refused():
    save("qa.jsonl", json_lines(rows(4)))
    with pytest.raises(DataError, match='the "weight" of each text in DATA leaves none'):
        build({"path": "qa.jsonl", "weight": 0.01})
    hashes = np.array([5, 1, 9, 3], dtype=np.uint64)
    no_val = np.array([False, False, False, True])
    parts = np.array([0, 0, 0, 1])
    assert times_seen(np.array([1.34, 2.0]), parts, hashes, no_val).tolist() == [1, 2, 1, 2]


def test_forms_of_weights_come_to_one_and_others_are_a_settings_error():
    for data, spec in [
        ({"path": "a", "weight": 2}, DataSpec(("a",), weights=(2.0,))),
        (["a", {"path": "b", "weight": 0.5}], DataSpec(("a", "b"), weights=(1.0, 0.5))),
        (
            {"path": ["a", {"path": ["b", "c"], "weight": 2}], "val": "d", "field": "f"},
            DataSpec(("a", "b", "c"), ("d",), (1.0, 2.0, 2.0), "f"),
        ),
        ({"path": [{"path": "a"}]}, DataSpec(("a",), weights=(1.0,))),
    ]:
        assert parse_data(data) == spec
    for data, told in [
        ([{"path": "a", "weight": 0}], "the \"weight\" of 'a' in DATA is 0; it must be a number"),
        ([{"path": "a", "weight": True}], "is True"),
        ([{"path": "a", "weight": "2"}], "is '2'"),
        ([{"path": "a", "weight": float("nan")}], "is nan"),
        ([{"path": "a", "weight": 101}], "at most 100"),
        ([{"weight": 2}], 'without "path"'),
        ([{"path": "a", "wieght": 2}], 'did you mean "weight"?'),
        ([{"path": "a", "field": "b"}], 'DATA["field"] is unknown'),
        ([{"path": 3}], "it must be a path or name in quotes"),
    ]:
        with pytest.raises(SettingsError) as caught:
            parse_data(data)
        assert told in str(caught.value)


def test_whole_documents_are_divided_as_near_to_the_ratio_as_they_can_be():
    assert split_whole(np.array([1, 1, 1]), np.array([1, 2, 3]), 0.9) is None
    sizes, digests = np.full(200, 10), np.arange(200, dtype=np.uint64)
    assert split_whole(digests, sizes, 0.9).sum() == 20
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(1, 9, size=generator.integers(2, 9))
        ratio = generator.uniform(0.3, 0.95)
        is_val = split_whole(generator.permutation(len(lengths)) + 1, lengths, ratio)
        assert 0 < is_val.sum() < len(lengths)
        assert abs(lengths[is_val].sum() - (1 - ratio) * lengths.sum()) <= 8
    assert split_whole(digests[:2], np.array([7, 9]), 0.9).tolist() == [True, False]
    for sizes, ratio, is_val, cut in [
        ([10, 10], 0.5, [False, True], (None, 0)),
        ([10, 10], 0.9, [False, False], (1, 2)),
        ([100], 0.9, [False], (0, 10)),
        ([50, 20, 30], 0.6, [False, False, True], (1, 10)),
    ]:
        split = split_by_position(np.array(sizes), ratio)
        assert split.is_val.tolist() == is_val and (split.cut, split.n_cut) == cut
