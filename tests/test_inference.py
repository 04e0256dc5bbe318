"""Continuing texts from the command line: what is printed, what is drawn, how it fails."""

import contextlib
import dataclasses
import functools
import io
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from exchange.saved_run import load_run
from generation import SamplingConfig, stream_text
from scripts import inference
from scripts.options import run_program
from tests import by_heart
from tests.by_heart import ENDLESS, ON_POSIX, POEM, SHOWN, STORY, Done, Terminal
from tests.launching import Program


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    return by_heart.tiny_run(tmp_path_factory)


@pytest.fixture(scope="module")
def load_once():
    """load_run(), which reads a run with the same options once: test_load_run has the loading."""
    return functools.cache(load_run)


@pytest.fixture
def infer(tiny_run, load_once, monkeypatch, capsys):
    """Run the program in this process, on the tiny run where no other is named."""
    monkeypatch.setattr("scripts.options.load_run", load_once)

    def call(
        *arguments: str,
        run: Path | str | None = tiny_run,
        stdin: bytes | io.TextIOWrapper | None = b"",
    ) -> Done:
        where = [] if run is None else ["--run", str(run)]
        monkeypatch.setattr(sys, "argv", ["inference", *where, *arguments])
        if isinstance(stdin, bytes):
            stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii")
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as exit:
            run_program(inference.main)
        return Done(exit.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def batches(monkeypatch) -> list[tuple[list[str], dict]]:
    """The prompts and options that go to the model, batch by batch."""
    calls = []

    def spy(model, tokenizer, prompts, **options):
        calls.append((list(prompts), options))
        return stream_text(model, tokenizer, prompts, **options)

    monkeypatch.setattr(inference, "stream_text", spy)
    return calls


def test_prompt_and_continuation_are_all_of_standard_output(infer, tiny_run, monkeypatch):
    done = infer("--prompt", "The ferry")
    assert (done.code, done.out) == (0, SHOWN + "\n")
    assert re.fullmatch(
        rf"{re.escape(str(tiny_run))}, step 180, (bf16|fp32) weights on cpu, seed \d+\n", done.err
    )
    monkeypatch.chdir(tiny_run.parent.parent)  # by its name, or the newest finished one
    for run in ("tiny", None):
        assert infer("--prompt", "The ferry", run=run).out == SHOWN + "\n"


def test_control_characters_reach_no_terminal_and_are_escaped_in_json(infer):
    done = infer("--prompt", "\x1b]0;title\x07The ferry\r\tcrossed\x9b.\x7f")
    assert done.code == 0
    assert done.out.startswith("]0;titleThe ferry\tcrossed.")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.out)
    done = infer("--prompt", "The\u2028 fe\x85rry\ud83d", "--prompt", "The ferry", "--json")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", done.out)
    assert len(done.out.splitlines()) == 2
    first, second = done.samples
    assert first["prompt"] == "The\u2028 fe\x85rry\ufffd"
    assert second["prompt"] + second["text"] == STORY


def test_json_tells_finish_tokens_seed_run_and_step(infer, tiny_run):
    (sample,) = infer("--prompt", "The ferry", "--json", "--seed", "7").samples
    assert list(sample) == ["prompt", "text", "finish_reason", "tokens", "seed", "run", "step"]
    assert sample["finish_reason"] == "stop"
    assert (sample["seed"], sample["run"], sample["step"]) == (7, str(tiny_run), 180)
    assert "".join(token["text"] or "" for token in sample["tokens"]) == sample["text"]
    assert sample["tokens"][-1]["text"] is None  # the end of the text
    assert all(0.6 < token["probability"] <= 1 for token in sample["tokens"])
    (sample,) = infer("--prompt", "The ferry", "--json", "--max-new-tokens", "5").samples
    assert (sample["text"], sample["finish_reason"]) == (" cros", "length")
    (sample,) = infer("--prompt=The ferry", "--stop", "海上", "--stop", "水连", "--json").samples
    assert (sample["text"], sample["finish_reason"]) == (" crossed.\n春江潮", "stop")


def test_a_token_has_text_where_its_bytes_complete_a_character(infer):
    free = ("--json", "--seed=2", "--weights=fp32", "--top-k=none", "--top-p=none")
    (sample,) = infer("--prompt=春", "--temperature=1e9", "--max-new-tokens=100", *free).samples
    texts = [token["text"] for token in sample["tokens"]]
    assert "".join(text or "" for text in texts) == sample["text"]
    assert None in texts[:-1]  # bytes that begin a character
    assert "\ufffd" in sample["text"]


def test_several_samples_and_prompts_have_headlines(infer):
    done = infer("--prompt", "The ferry", "--prompt", POEM[:4], "--num-samples", "2")
    headlines = [f"--- prompt {p} of 2, sample {s} of 2 ---" for p in (1, 2) for s in (1, 2)]
    texts = [SHOWN, SHOWN, *[SHOWN[SHOWN.index(POEM) :]] * 2]
    parts = [f"{line}\n{text}\n" for line, text in zip(headlines, texts, strict=True)]
    assert done.out == "\n".join(parts)
    short = ("--prompt", "a", "--max-new-tokens", "1")
    assert infer(*short, "--num-samples", "2").out.startswith("--- sample 1 of 2 ---\n")
    assert infer(*short, "--prompt", "b").out.startswith("--- prompt 1 of 2 ---\n")


def test_help_names_every_option_and_ends_with_0(infer):
    done = infer("--help")
    assert done.code == 0
    options = [field.name for field in dataclasses.fields(SamplingConfig)]
    options += ["run", "which", "weights", "device", "num-samples", "stream", "stop", "json"]
    options += ["prompt", "prompt-file", "lines", "seed"]
    for option in options:
        assert re.search(rf"^  --{option.replace('_', '-')}\b", done.out, re.MULTILINE), option


def test_one_seed_draws_one_text_and_another_another(infer):
    hot = ("--prompt=The", "--json", "--temperature=5", "--max-new-tokens=20")
    first, again, other = (infer(*hot, "--num-samples=2", f"--seed={n}").samples for n in (1, 1, 2))
    assert first == again
    assert [s["text"] for s in first] != [s["text"] for s in other]
    assert first[0]["text"] != first[1]["text"]
    (first,), (other,) = infer(*hot).samples, infer(*hot).samples  # one that was drawn is told
    assert first["seed"] != other["seed"]
    assert infer(*hot, "--seed", str(first["seed"])).samples == [first]


def test_every_sampling_option_reaches_the_model(infer, batches):
    given = {
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": None,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "repetition_window": 9,
    }
    assert given.keys() == {field.name for field in dataclasses.fields(SamplingConfig)}
    infer("--prompt", "a", *(f"--{name}={str(value).lower()}" for name, value in given.items()))
    infer("--prompt", "a")
    changed, unchanged = ({name: call[name] for name in given} for _, call in batches)
    assert changed == given
    assert unchanged == dataclasses.asdict(SamplingConfig(max_new_tokens=100, temperature=0.0))


def test_no_more_than_eight_texts_of_prompts_are_drawn_at_once(infer, batches):
    prompts = [f"prompt {i}" for i in range(11)]
    flags = [*(f"--prompt={prompt}" for prompt in prompts), "--json", "--max-new-tokens=1"]
    for samples, sizes in (1, [8, 3]), (3, [2, 2, 2, 2, 2, 1]), (20, [1] * 11):
        batches.clear()
        done = infer(*flags, "--num-samples", str(samples))
        assert [len(batch) for batch, _ in batches] == sizes
        assert [s["prompt"] for s in done.samples] == [p for p in prompts for _ in range(samples)]


def test_any_prompt_is_gone_on_from(infer, batches):
    prompts = ["", "<|endoftext|>", "한국어 ✈ unseen", "\udce9 byte", "half \ud83d", "\ufffe\x00"]
    samples = infer(*(f"--prompt={prompt}" for prompt in prompts), "--json").samples
    for prompt, sample in zip(prompts, samples, strict=True):
        assert sample["prompt"] == re.sub("[\ud800-\udfff]", "\ufffd", prompt)
        assert sample["tokens"]
    assert batches[0][0] == [sample["prompt"] for sample in samples]
    # the greedy beginning of a document is that of the story or of the other text
    assert samples[0]["text"][:6] in (STORY[:6], "啦la 啦l")


def test_prompts_are_flags_whole_files_without_their_last_line_end_or_each_line(infer, tmp_path):
    whole = "\ufeffThe ferry\r\n\r\ncrossed\r\n".encode()
    lines = "T\r\n\n  \nA\u2028B\n 春江".encode()
    file = tmp_path / "prompt.txt"
    file.write_bytes(whole)
    for flags, stdin, prompts in (
        (["--prompt-file", str(file)], b"other", ["The ferry\r\n\r\ncrossed"]),
        (["--prompt-file", "-"], whole, ["The ferry\r\n\r\ncrossed"]),
        ([], whole, ["The ferry\r\n\r\ncrossed"]),
        (["--lines"], lines, ["T", "A\u2028B", " 春江"]),
        (["--lines", "--prompt=1", "--prompt-file=-"], lines, ["1", "T", "A\u2028B", " 春江"]),
    ):
        done = infer(*flags, "--json", "--max-new-tokens", "1", stdin=stdin)
        assert [s["prompt"] for s in done.samples] == prompts
    stdin = io.TextIOWrapper(io.BytesIO(b"more"))  # which is left alone where a prompt is given
    for stream in (stdin, None):
        assert infer("--prompt", "The ferry", stdin=stream).out == SHOWN + "\n"
    assert stdin.read() == "more"
    for stream in (Terminal(), None):
        done = infer(stdin=stream)
        assert (done.code, done.out) == (2, "")
        assert "--prompt-file FILE" in done.err


def test_a_source_of_prompts_that_cannot_be_read_is_named(infer, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "MOST_BYTES", 100)
    file = tmp_path / "prompt.txt"
    for content, said in (
        (b"caf\xe9 and more", r"prompt.txt is not UTF-8: byte 3 is 0xe9"),
        (b"cut \xe6\x98", r"prompt.txt is not UTF-8: byte 4"),
        ("春".encode("utf-16"), "prompt.txt is not UTF-8: byte 0 is 0xff"),
        (b"x" * 101, "prompt.txt has more than 0 MB"),
        (None, "can't read .*prompt.txt: No such file"),
    ):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        done = infer("--prompt-file", str(file))
        assert (done.code, done.out) == (3, "")
        assert done.err.startswith("\nDataError: ")
        assert re.search(said, done.err)
    for arguments, stdin, said in (
        ([], b"\xff", "standard input is not UTF-8: byte 0"),
        (["--lines"], b"\n \n", "standard input has no line with text"),
        (["--prompt-file", "-"], None, "closed"),
        (["--prompt-file", str(tmp_path)], b"", "directory|denied"),
    ):
        done = infer(*arguments, stdin=stdin)
        assert done.code == 3
        assert re.search(said, done.err)


def test_what_is_wrong_is_said_in_words_with_its_code_before_a_run_is_read(infer, monkeypatch):
    def fails(arguments: str, code: int, *said: str) -> None:
        done = infer("--prompt", "a", *arguments.split())
        assert (done.code, done.out) == (code, "")
        assert all(words in done.err for words in said), done.err
        assert "Traceback" not in done.err

    fails("--run no-such-run", 4, "no-such-run")
    fails("--device cuda:99", 6, "no such device")
    monkeypatch.setattr("scripts.options.load_run", lambda *_, **__: pytest.fail("read a run"))
    fails("--num-samples 101", 2, "--num-samples is 101; it must be 1 to 100")
    fails("--stop=", 2, "--stop", "empty")
    fails("--stream --num-samples 2", 2, "--stream shows a single text")
    fails("--stream --prompt b", 2, "--stream shows a single text")
    fails("--stream --json", 2, "--stream and --json")
    fails("--lines", 2, "--lines is for --prompt-file")
    three = ("3 problems", "--temperature is -1.0", "--top-k is 0", "--seed is '-1'")
    fails("--temperature -1 --top_k=0 --seed -1", 2, *three)
    fails("--which worst", 2, "--which", "best", "last")
    fails("--weights int4", 2, "--weights", "int8")
    fails("--device tpu", 2, "--device is 'tpu'", "cuda")
    fails("--promt b", 2, 'did you mean "--prompt"', "--help")
    fails("two words", 2, "'two'", "quotes")


def test_a_stream_shows_a_character_when_it_is_drawn_and_never_half_of_one(infer, monkeypatch):
    written = []
    monkeypatch.setattr(inference, "write", written.append)
    infer("--prompt", "The ferry", "--stream")
    assert "".join(written) == STORY + "\n"
    assert written[0] == "The ferry"
    assert all(len(piece) <= 1 for piece in written[1:])


@ON_POSIX
def test_closed_pipes_and_full_disks_end_it_with_their_code(infer, monkeypatch):
    def closed_pipe() -> io.TextIOBase:
        there, here = os.pipe()
        os.close(there)
        return open(here, "w", encoding="utf-8")

    streams = [("stdout", closed_pipe(), 0, "", ""), ("stderr", closed_pipe(), 0, SHOWN + "\n", "")]
    if os.path.exists("/dev/full"):  # only Linux has it
        full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
        streams.append(("stdout", full, 6, "", "No space left"))
    for name, stream, code, out, said in streams:
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, stream)
            done = infer("--prompt", "The ferry", "--weights", "fp32")
        assert (done.code, done.out) == (code, out)
        assert said in done.err and "Traceback" not in done.err
        # as at the end of an interpreter, where an error of standard output would be shown
        with contextlib.suppress(OSError) if name == "stderr" else contextlib.nullcontext():
            stream.close()


@pytest.mark.slow
@ON_POSIX
def test_ctrl_c_ends_a_stream_with_130_and_no_traceback(tiny_run, tmp_path):
    options = ("--weights", "fp32", "--prompt", ENDLESS, "--stream", "--max-new-tokens", "100000")
    code = by_heart.program("inference", "--run", str(tiny_run), *options)
    program = Program(tmp_path, 0, code)
    program.until(lambda: len(program.out) > 100)  # which is long before its end
    program.send(signal.SIGINT)
    program.ends_with(130)
    assert program.out.startswith(ENDLESS + "啦la 啦la")
    assert program.err.endswith("\nStopped.\n")
