"""Tokenizers that put a token before each text elsewhere: here it begins documents and prompts too.

The oracle is the library that defines the files, and transformers.
"""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import processors

import main
from data import create_dataloader_v1
from environment import load_run, prepare_environment
from exchange.gguf import modelfile
from exchange.gguf_file import GGUFFile, read_header
from exchange.gguf_tokenizer import tokenizer_of
from exchange.huggingface import open_folder, write_folder
from generation import SamplingConfig, generate, stream_text, text_to_token_ids, token_ids_to_text
from insight.run_text import count_bytes, to_bytes
from planning.prompt import fit_prompt
from scripts import evaluate
from scripts.options import run_program
from scripts.serving.protocol import Answer, Served, read_order
from scripts.serving.writer import Job, Writer
from storage.checkpoint import weights_of
from tests.gguf_models import model_of, sentence_piece, texts, written
from tests.letters import model_for
from tests.texts import CHINESE, ENGLISH, train_in_the_library
from text import token_cache
from text.chat_template import CHATML, CHATML_WITH_BEGIN, ChatTemplate, Message, template_of
from text.chat_tokens import chat_template_for
from text.documents import DataSpec
from text.token_cache import tokenize
from text.tokenizer import (
    CharTokenizer,
    ForeignTokenizer,
    begin_texts_with,
    encode_from_start,
    read_tokenizer,
    restore_tokenizer,
)
from train import continue_prompts
from training_utils import TrainingConfig

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"  # Llama 3's, with the ids 0 and 1
CONTEXT = 48
CHAT = [Message("user", f"Is {BEGIN} text?"), Message("assistant", "Yes.")]


@pytest.fixture(scope="module")
def trained() -> str:
    """A tokenizer.json that puts nothing before a text."""
    return train_in_the_library(ENGLISH[:9000] + CHINESE[:3000], 400, BEGIN, END).to_str()


@pytest.fixture(scope="module")
def library(trained) -> tokenizers.Tokenizer:
    return framed(trained, f"{BEGIN} $A")


@pytest.fixture(scope="module")
def tokenizer(library) -> ForeignTokenizer:
    return read(library)


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_for(tokenizer, 0.3, emb_dim=16, n_heads=2, context_length=CONTEXT)


def framed(trained: str, single: str) -> tokenizers.Tokenizer:
    """The tokenizer with special tokens around a text, behind a post-processor as Llama 3 has."""
    made = tokenizers.Tokenizer.from_str(trained)
    template = processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=[(BEGIN, 0), (END, 1)]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return made


def read(library: tokenizers.Tokenizer) -> ForeignTokenizer:
    return read_tokenizer(library.to_str().encode(), Path("llama/tokenizer.json"))


def changed(file: GGUFFile, changes: dict) -> GGUFFile:
    """The header of a file with other metadata of its tokenizer (None: without them)."""
    metadata = file.metadata | {f"tokenizer.ggml.{key}": v for key, v in changes.items()}
    return replace(file, metadata={key: v for key, v in metadata.items() if v is not None})


def folder_of(path: Path, model, tokenizer, **options) -> Path:
    weights = weights_of(model)
    write_folder(path, model.config, weights, tokenizer, card="A test's.", **options)
    return path


# ------------------------------------------------------------------------------- what a file says


@pytest.mark.parametrize(
    ("single", "begin_ids", "frame"),
    [
        (f"{BEGIN} $A", (0,), []),
        (f"{BEGIN} $A {END}", (0,), [END]),
        (f"$A {END}", (), [END]),
        (f"{BEGIN} {END} $A", (), [BEGIN, END]),
        ("$A", (), []),
    ],
)
def test_one_token_before_a_text_begins_it_and_no_other_is_put_around_it(
    trained, single, begin_ids, frame
):
    made = framed(trained, single)
    tokenizer = read(made)
    assert (tokenizer.begin_ids, tokenizer.frame()) == (begin_ids, frame)
    assert 0 not in tokenizer.encode("The ferry") and 1 not in tokenizer.encode("The ferry")
    if not frame:
        assert encode_from_start(tokenizer, "The ferry") == made.encode("The ferry").ids
    kept = restore_tokenizer("foreign", tokenizer.to_json().encode())  # as from a run's folder
    assert (kept.begin_ids, kept.fingerprint) == (begin_ids, tokenizer.fingerprint)
    assert kept.adding(["<new>"]).begin_ids == begin_ids


def test_a_token_that_is_declared_begins_texts_as_one_in_the_file(trained, library):
    bare = read_tokenizer(trained.encode(), Path("llama/tokenizer.json"))
    for begin in (BEGIN, 0):
        tokenizer = begin_texts_with(bare, begin)
        expected = library.encode("The ferry").ids
        assert (
            tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode("The ferry").ids == expected
        )
        assert encode_from_start(tokenizer, "The ferry") == expected
        assert (tokenizer.name, tokenizer.end_of_text) == (bare.name, END)
    assert begin_texts_with(tokenizer, END) is tokenizer  # which has one already
    assert begin_texts_with(bare, "no token") is begin_texts_with(bare, 399) is bare
    own = CharTokenizer("abc").adding(["<s>"])
    begun = begin_texts_with(own, "<s>")
    assert encode_from_start(begun, "cab!") == [own.special_tokens["<s>"], *own.encode("cab!")]
    assert begun.end_of_text_id == own.end_of_text_id


def test_a_gguf_file_says_it_or_llama_cpps_rule_does(tokenizer, tmp_path):
    path = written(tmp_path / "a.gguf", model_of("llama", tokenizer), tokenizer)
    file = read_header(path)
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    assert file.metadata["tokenizer.ggml.bos_token_id"] == 0
    for changes, begin_ids in [
        ({}, (0,)),
        ({"add_bos_token": False}, ()),
        ({"add_bos_token": None}, ()),  # as for a byte-level BPE
        ({"add_bos_token": None, "pre": "llama-bpe"}, (0,)),
        ({"bos_token_id": 1}, (1,)),
        ({"bos_token_id": 399}, ()),  # a token of text
    ]:
        found = tokenizer_of(changed(file, changes))
        assert found.begin_ids == begin_ids, changes
        assert found.encode("The ferry") == tokenizer.encode("The ferry") or "pre" in changes
    file = read_header(sentence_piece(path))
    for says, begin_ids in ({"add_bos_token": None}, (1,)), ({"add_bos_token": False}, ()):
        assert tokenizer_of(changed(file, says)).begin_ids == begin_ids


def test_a_folder_says_it_in_either_file(trained, library, model, tmp_path):
    folder = folder_of(tmp_path / "a", model, read(library))
    said = json.loads((folder / "tokenizer_config.json").read_bytes())
    assert (said["bos_token"], said["add_bos_token"]) == (BEGIN, True)
    for content, changes, begin_ids in [
        (library.to_str(), {}, (0,)),
        (library.to_str(), {"add_bos_token": False}, (0,)),  # as transformers 5 reads it
        (trained, {}, (0,)),
        (trained, {"bos_token": {"content": BEGIN}}, (0,)),
        (trained, {"add_bos_token": False}, ()),
        (trained, {"bos_token": "no token"}, ()),
    ]:
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(said | changes), encoding="utf-8")
        assert open_folder(folder).tokenizer.begin_ids == begin_ids, changes
    plain = folder_of(tmp_path / "b", model, read_tokenizer(trained.encode(), Path("b/c.json")))
    assert "add_bos_token" not in json.loads((plain / "tokenizer_config.json").read_bytes())


@pytest.mark.slow
def test_transformers_has_the_same_ids_of_what_came_and_of_what_leaves(
    trained, library, tokenizer, model, tmp_path
):
    from transformers import AutoTokenizer

    came = folder_of(tmp_path / "came", model, tokenizer)
    (came / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    declared = begin_texts_with(read_tokenizer(trained.encode(), Path("a/b.json")), BEGIN)
    left = folder_of(tmp_path / "left", model, declared, chat_template=CHATML_WITH_BEGIN)
    for folder in (came, left):
        theirs, ours = AutoTokenizer.from_pretrained(folder), open_folder(folder).tokenizer
        for text in texts(200):
            assert theirs(text).input_ids == encode_from_start(ours, text)
    said = [{"role": message.role, "content": "a"} for message in CHAT]
    ids = theirs.apply_chat_template(said, return_dict=False)
    messages = [Message(message.role, "a") for message in CHAT]
    assert ids[0] == 0 and ids.count(0) == 1
    assert [i for i in ids if i in (0, 1)] == [
        i for i in template_of(CHATML_WITH_BEGIN, ours).encode(messages, ours) if i in (0, 1)
    ]


# ------------------------------------------------------------------------------- what is trained


def test_each_document_begins_with_it_once_and_has_no_text_for_it(
    library, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(token_cache, "CHUNK", 300)  # documents of several chunks among them
    monkeypatch.setattr(token_cache, "NEIGHBORHOOD", 60)
    documents = [CHINESE[i * 50 : i * 50 + n] for i, n in enumerate((20, 900, 3, 400, 1, 60) * 6)]
    documents = [f"{i}{text}。" for i, text in enumerate(documents)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    library.save(str(tmp_path / "tokenizer.json"))
    spec = DataSpec((str(tmp_path / "a.jsonl"),), ())
    text = tokenize(spec, str(tmp_path / "tokenizer.json"), 0.8, tmp_path / "cache")
    assert text.tokenizer.fingerprint == tokenizer.fingerprint
    ids = np.fromfile(text.path, text.dtype)
    found = []
    for side in (ids[: text.n_train].tolist(), ids[text.n_train :].tolist()):
        for is_end, part in itertools.groupby(side, lambda token: token == 1):
            if not is_end:
                found.append(list(part))
    # the longest document may be cut: its end validates, and is no beginning
    assert sorted(map(tuple, found)) == sorted(tuple(library.encode(d).ids) for d in documents)
    content = to_bytes(ids, tokenizer)
    assert content.decode().replace("\0", "").count("begin_of_text") == 0
    assert count_bytes(ids, tokenizer).sum() == len(content)
    config, _ = fit_prompt(TrainingConfig(), text)
    assert BEGIN not in config.start_context and config.start_context[0] in CHINESE + "0123456789"


def test_conversations_begin_with_it_where_their_template_writes_it(
    library, tokenizer, model, tmp_path
):
    rows = [{"question": f"What is {i}?", "answer": f"{i}."} for i in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    library.save(str(tmp_path / "tokenizer.json"))
    spec = DataSpec((str(tmp_path / "a.jsonl"),), ())
    text = tokenize(spec, str(tmp_path / "tokenizer.json"), 0.8, tmp_path / "cache")
    ids = np.fromfile(text.path, text.dtype)
    starts = [*text.chat.train_starts, *(text.chat.val_starts + text.n_train)]
    assert text.chat.template == CHATML_WITH_BEGIN
    assert np.flatnonzero(ids == 0).tolist() == starts

    template, larger = chat_template_for(CHATML.source, tokenizer)
    plain = template_of(CHATML.source, larger).encode(CHAT, larger)
    assert template.encode(CHAT, larger) == [0, *plain]
    assert template.render(CHAT) == BEGIN + CHATML.render(CHAT)
    bare = CharTokenizer("abc")
    assert chat_template_for(CHATML.source, bare)[0].source == CHATML.source
    assert "<|im_start|>" in modelfile("a.gguf", model.config, CHATML_WITH_BEGIN)
    pytest.importorskip("jinja2")
    slow = "{% if true %}{{ bos_token }}{% endif %}" + CHATML.source  # as Jinja renders it
    assert ChatTemplate(slow, BEGIN, END).render(CHAT) == template.render(CHAT)


# ------------------------------------------------------------------------------- what is asked


def test_a_prompt_begins_with_it_and_token_ids_are_as_they_are(model, tokenizer):
    ids = [0, *tokenizer.encode("The ferry")]
    greedy = {"max_new_tokens": 6, "temperature": 0.0}
    expected = generate(model, [ids], **greedy)[0][len(ids) :]
    assert generate(model, [ids[1:]], **greedy)[0][len(ids) - 1 :] != expected

    def drawn(prompt) -> list[int]:
        return [piece.token.id for piece in stream_text(model, tokenizer, [prompt], **greedy)]

    assert drawn("The ferry") == drawn(ids) == expected
    assert drawn("") == drawn([0]) != drawn([1])
    row = text_to_token_ids("The ferry", tokenizer)
    assert row.tolist() == [ids]
    assert token_ids_to_text(row, tokenizer) == token_ids_to_text(row[:, 1:], tokenizer)
    windows = create_dataloader_v1("The ferry", 1, 2, shuffle=False, tokenizer=tokenizer)
    assert next(iter(windows))[0].tolist() == [ids[:2]]
    [sample] = continue_prompts(model, tokenizer, ["The ferry"], **greedy)
    assert sample.startswith("The ferry") and sample == tokenizer.decode(ids[1:] + expected)


def test_an_echo_has_the_tokens_of_its_text_with_the_probabilities_behind_it(model, tokenizer):
    sampling = vars(SamplingConfig(max_new_tokens=4))
    served = Served("tiny", (), 0, "", tokenizer, sampling, None, 100)
    run = SimpleNamespace(model=model, tokenizer=tokenizer, device=torch.device("cpu"))
    ids = [0, *tokenizer.encode("The ferry")]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
    known = logprobs[range(len(ids) - 1), ids[1:]].tolist()

    def asked(prompt) -> dict:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
        order = read_order(json.dumps(body).encode(), served, is_chat=False)
        job, answer, writer = Job(order), Answer(order, served), Writer(run, 1)
        for part in writer._parts(job):
            answer.add(part)
        writer.close()
        return answer.whole(job.n_prompt_tokens)

    reply = asked("The ferry")
    [choice] = reply["choices"]
    assert choice["text"] == "The ferry" == "".join(choice["logprobs"]["tokens"])
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(known, abs=1e-5)
    assert choice["logprobs"]["text_offset"][:2] == [0, len(choice["logprobs"]["tokens"][0])]
    assert reply["usage"]["prompt_tokens"] == len(ids)
    [choice] = asked(ids)["choices"]
    assert choice["text"] == BEGIN + "The ferry"
    first, *rest = choice["logprobs"]["token_logprobs"]
    assert (first, rest) == (None, pytest.approx(known, abs=1e-5))


def test_a_document_by_itself_is_scored_behind_it(model, tokenizer, tmp_path, monkeypatch, capsys):
    documents = ["The ferry", "crossed the river.", "春"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    folder = folder_of(tmp_path / "a", model, tokenizer)
    options = ["--documents", "--json", "--precision=fp32", "--device=cpu"]
    arguments = [str(tmp_path / "a.jsonl"), "--model", str(folder), *options]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with pytest.raises(SystemExit):
        run_program(evaluate.main)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, text in zip(rows, documents, strict=False):
        ids = [0, *tokenizer.encode(text)]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
        nats = -logprobs[range(len(ids) - 1), ids[1:]].sum().item()
        assert row["tokens"] == len(ids) - 1
        assert row["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-4)
        bits = nats / math.log(2) / len(text.encode())
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert len(rows) == 4


@pytest.mark.slow
def test_a_run_from_such_weights_keeps_it_and_goes_on_with_it(
    model, tokenizer, workdir, no_pictures
):
    folder_of(workdir / "base", model, tokenizer)
    documents = "".join(json.dumps({"text": text}) + "\n" for text in ENGLISH.split("\n\n") * 2)
    (workdir / "a.jsonl").write_text(documents, encoding="utf-8")

    def settings(steps: int) -> str:
        params = {"max_steps": steps, "eval_freq": 1, "max_length": 32, "batch_size": 2}
        lines = "DATA, INIT_FROM, RUN_NAME, CUSTOM_MODE = 'a.jsonl', 'base', 'mine', True\n"
        (workdir / "settings.py").write_text(lines + f"custom_params = {params}\n")
        return "settings.py"

    assert main.main([settings(1)]) == 0
    run = load_run("runs/mine", weights="fp32", device="cpu")
    assert (run.tokenizer.begin_ids, run.tokenizer.fingerprint) == ((0,), tokenizer.fingerprint)
    assert BEGIN not in Path("runs/mine/samples.md").read_text(encoding="utf-8")
    env = prepare_environment(settings(2))
    assert next(iter(env.val_loader))[0][0, 0] == 0
    assert main.main(["settings.py"]) == 0
    summary = json.loads(Path("runs/mine/summary.json").read_bytes())
    assert summary["steps"] == 2
    assert load_run("runs/mine", weights="fp32", device="cpu").tokenizer.begin_ids == (0,)
