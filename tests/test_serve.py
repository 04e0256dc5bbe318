"""The server, as a process on loopback: OpenAI's own client, raw sockets, and bad company."""

import asyncio
import contextlib
import gc
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import openai
import pytest
import requests
import torch

import environment
from engine.errors import ResourceError, SettingsError
from generation import stream_text
from scripts import serve
from scripts.serving import guard
from scripts.serving.guard import HEADERS, Guard, Refused, own_names
from scripts.serving.writer import Writer
from tests.conftest import REPOSITORY, train_in

ON_POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

STORY = "The ferry crossed the river at dawn. Its bell rang twice, and nobody came.\n"
SETTINGS = """
CUSTOM_MODE = True
DATA = "text.txt"
TOKENIZER = "char"
custom_params = {
    "max_steps": %d,
    "batch_size": 8,
    "max_length": 64,
    "learning_rate": 0.01,
    "eval_freq": 50,
    "eval_iter": 1,
    "start_context": "The",
    "model_overrides": {"n_heads": 2, "n_layers": 2, "emb_dim": 32, "drop_rate": 0.0},
}
sampling_params = {"max_new_tokens": 20, "temperature": 0.7}
DEVICE = "cpu"
COMPILE = False
RUN_NAME = "tiny"
"""


def train_by_heart(folder: Path, text: str, steps: int) -> Path:
    """Train a tiny model on a text over and over; returns its run."""
    (folder / "text.txt").write_text(text * (40_000 // len(text)), encoding="utf-8")
    return train_in(folder, SETTINGS % steps)


class Server:
    """python -m scripts.serve as a process of its own, on a port that was free."""

    def __init__(self, run: Path, *options: str, before: str = "", **environment: str) -> None:
        command = [sys.executable, "-m", "scripts.serve"]
        if before:  # what is to be otherwise in the process
            code = f"{before}\nfrom scripts import options, serve\noptions.run_program(serve.main)"
            command = [sys.executable, "-c", code]
        command += ["--run", str(run), "--port", "0", "--weights", "fp32", "--device", "cpu"]
        self.process = subprocess.Popen(
            [*command, *options],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GPT_SERVE_TOKEN": ""} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self.greeting = self.process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)/ serves tiny, step \d+, ", self.greeting)
        assert found, self.greeting + self.process.stderr.read()
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> tuple[int, str]:
        """Ctrl-C; returns the exit code and all that was printed but the greeting."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out + err

    def client(self, token: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0)

    def post(self, what: str = "completions", **body) -> requests.Response:
        return requests.post(f"{self.url}/v1/{what}", json={"model": "tiny"} | body, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def raw(self, request: bytes) -> bytes:
        """What comes back on a connection of its own, up to its end or a second of silence."""
        with self.connect() as connection:
            connection.sendall(request)
            connection.settimeout(1)
            return read_all(connection)

    def ask(self, what: str, *headers: str, body: bytes = b"") -> bytes:
        """The whole answer to a request with no headers but these."""
        lines = [f"{what} HTTP/1.1", "Connection: close", f"Content-Length: {len(body)}"]
        return self.raw("\r\n".join([*lines, *headers]).encode() + b"\r\n\r\n" + body)

    def ask_completion(self, body: bytes) -> bytes:
        return self.ask("POST /v1/completions", f"Host: 127.0.0.1:{self.port}", body=body)

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def is_cut_off(connection: socket.socket) -> bool:
    """Whether the other side ends a connection, without a word, before the time is up."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train_by_heart(tmp_path_factory.mktemp("serve"), STORY, steps=120)


@pytest.fixture(scope="module")
def model(run):
    return environment.load_run(run, weights="fp32", device="cpu")


@pytest.fixture(scope="module")
def server(run):
    # an answer of 100,000 tokens takes a minute, so that what ends at once was cancelled
    with Server(run, "--queue-limit", "2", "--answer-limit", "100000") as server:
        yield server


def continued(model, prompt: str, **options) -> str:
    """What the model writes, without a server."""
    greedy = {"temperature": 0.0, "max_new_tokens": 20} | options
    return "".join(p.text for p in stream_text(model.model, model.tokenizer, [prompt], **greedy))


def error_of(response: bytes) -> tuple[int, dict]:
    """The status of a raw answer and the error in its body."""
    head, _, body = response.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


def is_alive(server: Server) -> bool:
    return requests.get(f"{server.url}/v1/models", timeout=10).status_code == 200


# --------------------------------------------------------------------- OpenAI's own client


def test_the_client_lists_the_run_as_a_model_and_finds_it_by_name(server):
    client = server.client()
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist; this server has"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_what_the_model_writes(server, model):
    answer = server.client().completions.create(
        model="tiny", prompt="The ferry", temperature=0, max_tokens=20
    )
    (choice,) = answer.choices
    assert choice.text == continued(model, "The ferry")
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 20)
    assert answer.usage.total_tokens == 29


def test_several_prompts_and_samples_come_in_order(server, model):
    prompts = ["The ferry", "Its bell rang"]
    answer = server.client().completions.create(
        model="tiny", prompt=prompts, temperature=0, n=2, max_tokens=10
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    expected = [continued(model, prompt, max_new_tokens=10) for prompt in prompts]
    assert [c.text for c in answer.choices] == [expected[0]] * 2 + [expected[1]] * 2
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    assert answer.usage.completion_tokens == 40


@pytest.mark.parametrize("as_list", [False, True])
def test_token_ids_are_a_prompt_too(server, model, as_list):
    ids = model.tokenizer.encode("The ferry")
    prompt = [ids, ids[:3]] if as_list else ids
    answer = server.client().completions.create(model="tiny", prompt=prompt, temperature=0)
    assert answer.choices[0].text == continued(model, "The ferry")
    assert len(answer.choices) == 1 + as_list


def test_an_empty_prompt_begins_a_document(server, model):
    answer = server.client().completions.create(model="tiny", prompt="", temperature=0)
    assert answer.choices[0].text == continued(model, "")


def test_a_conversation_is_its_contents_joined_with_blank_lines(server, model):
    parts = [{"type": "text", "text": "Its bell"}, {"type": "text", "text": "rang"}]
    answer = server.client().chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "The ferry"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": ""},
        ],
        temperature=0,
        max_completion_tokens=20,
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == continued(model, "The ferry\n\nIts bell\n\nrang")


def test_a_streamed_completion_comes_in_pieces_that_make_the_whole(server, model):
    stream = server.client().completions.create(
        model="tiny", prompt="The ferry", temperature=0, max_tokens=20, stream=True
    )
    chunks = list(stream)
    assert len(chunks) == 20
    assert "".join(c.choices[0].text for c in chunks) == continued(model, "The ferry")
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 19 + ["length"]
    assert all(c.usage is None for c in chunks)
    assert len({c.id for c in chunks}) == 1


def test_a_streamed_conversation_says_who_speaks_and_what_it_took(server, model):
    stream = server.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "The ferry"}],
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *chunks, last = stream
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    text = "".join(c.choices[0].delta.content for c in chunks)
    assert text == continued(model, "The ferry")
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (9, 20)


def test_the_bytes_of_a_stream_are_server_sent_events_that_end_with_done(server):
    response = server.post(prompt="The", max_tokens=2, stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.content.endswith(b"\n\ndata: [DONE]\n\n")
    *events, done, rest = response.content.split(b"\n\n")
    assert all(event.startswith(b"data: {") for event in events)
    assert (done, rest) == (b"data: [DONE]", b"")


def test_the_same_seed_writes_the_same_text_streamed_or_not_and_none_another(server, model):
    client, options = server.client(), {"model": "tiny", "prompt": "The", "temperature": 1.5}
    options |= {"max_tokens": 40, "extra_body": {"top_k": None}, "top_p": None}

    def written(**more) -> str:
        return client.completions.create(**options, **more).choices[0].text

    assert written(seed=5) == written(seed=5) != written(seed=6)
    chunks = client.completions.create(**options, seed=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == written(seed=5)
    assert len({written() for _ in range(3)}) == 3
    generator = torch.Generator().manual_seed(5)
    free = {"temperature": 1.5, "top_k": None, "top_p": None, "max_new_tokens": 40}
    assert written(seed=5) == continued(model, "The", generator=generator, **free)


@pytest.mark.parametrize("stop", ["bell", ["nobody", "bell"]])
def test_a_stop_string_ends_the_text_before_it(server, model, stop):
    whole = continued(model, "The ferry", max_new_tokens=80)
    answer = server.client().completions.create(
        model="tiny", prompt="The ferry", temperature=0, max_tokens=80, stop=stop
    )
    assert answer.choices[0].text == whole[: whole.index("bell")]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_drawn_tokens(server, model):
    pieces = list(
        stream_text(model.model, model.tokenizer, ["The ferry"], temperature=0.0, max_new_tokens=5)
    )
    expected = pytest.approx([piece.token.logprob for piece in pieces], abs=1e-6)
    client, options = server.client(), {"model": "tiny", "temperature": 0, "max_tokens": 5}
    given = client.completions.create(prompt="The ferry", logprobs=0, **options).choices[0]
    assert given.logprobs.token_logprobs == expected
    assert "".join(given.logprobs.tokens) == given.text
    assert given.logprobs.text_offset == [0, 1, 2, 3, 4]
    messages = [{"role": "user", "content": "The ferry"}]
    given = client.chat.completions.create(messages=messages, logprobs=True, **options).choices[0]
    assert [entry.logprob for entry in given.logprobs.content] == expected
    assert bytes(b for entry in given.logprobs.content for b in entry.bytes).decode() == "".join(
        piece.text for piece in pieces
    )


# -------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"max_tokens": 10**9}, "max_tokens", "from 1 to 100000"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to 100000"),
        ({"max_tokens": "5"}, "max_tokens", "is '5'"),
        ({"max_tokens": True}, "max_tokens", "is True"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"temperature": 1e300}, "temperature", "at most"),
        ({"top_p": 1.5}, "top_p", "at most 1"),
        ({"top_k": -2}, "top_k", "at least 1"),
        ({"min_p": 2}, "min_p", "at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "at least 0.01"),
        ({"n": 17}, "n", "from 1 to 16"),
        ({"n": 2, "prompt": ["a"] * 9}, "prompt", "too many"),
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": []}, "prompt", "must be text"),
        ({"prompt": 7}, "prompt", "must be text"),
        ({"prompt": ["a", 7]}, "prompt", "must be text"),
        ({"prompt": [10**6]}, "prompt", "token ids from 0"),
        ({"prompt": [-1]}, "prompt", "token ids from 0"),
        ({"prompt": [True]}, "prompt", "token ids from 0"),
        ({"prompt": [[1], []]}, "prompt", "token ids from 0"),
        ({"prompt": "\ud800"}, "prompt", r"'\ud800'"),
        ({"stop": "a" * 1001}, "stop", "at most 1000 characters"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": [1]}, "stop", "at most 1000 characters"),
        ({"seed": 2**63}, "seed", "64 bits"),
        ({"seed": 1.5}, "seed", "64 bits"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": 1}}, "stream_options", "true or false"),
        ({"logprobs": 5}, "logprobs", "0"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "does not support"),
        ({"presence_penalty": -1}, "presence_penalty", "does not support"),
        ({"echo": True}, "echo", "does not support"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "does not support"),
        ({"best_of": 2}, "best_of", "does not support"),
        ({"temprature": 1}, "temprature", 'did you mean "temperature"?'),
        ({"\ud800": 1}, "\ud800", "unknown"),
        ({"model": None}, "model", "must be text, such as 'tiny'"),
        ({"model": ["tiny"]}, "model", "must be text"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(server, body, param, said):
    response = server.post(**{"prompt": "The"} | body)
    status, error = error_of(b"HTTP/1.1 %d\r\n\r\n" % response.status_code + response.content)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "missing"),
        ([], "one or more messages"),
        ("The ferry", "one or more messages"),
        ([{"role": "tool", "content": "x"}], '"role" is one of'),
        (["The ferry"], '"role" is one of'),
        ([{"role": "user"}], "messages[0].content is None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], '"type": "text"'),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], '"type": "text"'),
    ],
)
def test_a_wrong_conversation_is_refused(server, messages, said):
    response = server.post("chat/completions", messages=messages)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert said in response.json()["error"]["message"]


def test_all_mistakes_are_told_at_once(server):
    error = server.post(prompt=1, temperature=-1, seed="x", unheard_of=1).json()["error"]
    for name in ("prompt", "temperature", "seed", "unheard_of"):
        assert name in error["message"]


def test_parameters_that_say_nothing_are_accepted(server):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "best_of": 1, "echo": False}
    neutral |= {"suffix": None, "logit_bias": {}, "user": "me", "stop": None, "seed": None}
    neutral |= {"temperature": None, "max_tokens": None, "stream": None, "n": None, "stop": []}
    assert server.post(prompt="The", **neutral).status_code == 200
    chat = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    messages = [{"role": "user", "content": "The"}]
    response = server.post("chat/completions", messages=messages, top_logprobs=0, **chat)
    assert response.status_code == 200


def test_an_unknown_model_is_not_found(server):
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().completions.create(model="gpt-4", prompt="The")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b'{"model": "tiny", "prompt": "The', "line 1 column 29"),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 12)"),
        (b'"The"', "must be an object"),
        (b"[" * 900_000, "nested too deeply"),
        (b'{"a":' * 150_000, "nested too deeply"),
        (b'{"temperature": NaN}', "not finite"),
        (b'{"seed": ' + b"9" * 100_000 + b"}", "too long"),
    ],
)
def test_a_body_that_is_no_object_in_json_is_refused(server, body, said):
    status, error = error_of(server.ask_completion(body))
    assert status == 400
    assert said in error["message"]
    assert is_alive(server)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("GET", "/etc/passwd", 404), ("POST", "/v1/models", 405)],
)
def test_other_paths_and_methods_are_refused_in_the_same_shape(server, method, path, status):
    assert error_of(server.ask(f"{method} {path}", f"Host: localhost:{server.port}"))[0] == status


@pytest.mark.parametrize("path", ["/../scripts/serve.py", "/..%2f..%2fetc/passwd", "/page.js/"])
def test_no_path_leads_to_another_file(server, path):
    assert error_of(server.ask(f"GET {path}", f"Host: localhost:{server.port}"))[0] == 404


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 100_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"\r\n\r\n\r\n \xff\xfe",
    ],
)
def test_what_is_no_http_is_answered_400_or_cut_off(server, request_bytes):
    response = server.raw(request_bytes)
    assert response == b"" or response.startswith(b"HTTP/1.1 400 ")
    assert is_alive(server)


# -------------------------------------------------------------------------- who may ask


def test_only_requests_for_this_host_and_from_its_own_pages_are_answered(server):
    def status(*headers: str) -> int:
        return int(server.ask("GET /v1/models", *headers).split()[1])

    port = server.port
    for host in ("localhost", "127.0.0.1", "[::1]", "LocalHost"):
        assert status(f"Host: {host}:{port}") == 200
        assert status(f"Host: {host}:{port}", f"Origin: http://{host}:{port}") == 200
    for host in ("evil.example", f"evil.example:{port}", "localhost", f"localhost:{port + 1}", ""):
        assert status(f"Host: {host}") == 403
    assert status(f"Host: localhost.evil.example:{port}") == 403
    for origin in (
        "http://evil.example",
        "null",
        "",
        f"https://localhost:{port}",
        "http://localhost",
    ):
        assert status(f"Host: localhost:{port}", f"Origin: {origin}") == 403


def test_a_rebound_name_gets_no_text_either(server):
    status, error = error_of(server.ask("POST /v1/completions", "Host: evil.example"))
    assert status == 403
    assert "evil.example" in error["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/page.js"),
        ("GET", "/run.json"),
        ("GET", "/nothing"),
        ("HEAD", "/"),
        ("OPTIONS", "/"),
    ],
)
def test_every_answer_has_the_headers_that_keep_pages_apart(server, method, path):
    headers = requests.request(method, server.url + path, timeout=10).headers
    assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "'unsafe-inline'" not in headers["content-security-policy"]
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert "server" not in headers


def test_a_stream_has_them_too(server):
    headers = server.post(prompt="The", stream=True).headers
    assert {name: headers[name] for name in HEADERS} == HEADERS


def test_the_names_of_a_server_are_its_addresses_with_the_port():
    assert own_names("127.0.0.1", 8000) == {"localhost:8000", "127.0.0.1:8000", "[::1]:8000"}
    assert "[fe80::1]:8000" in own_names("FE80::1", 8000)
    assert own_names("127.0.0.1", 80) >= {"localhost", "localhost:80"}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("0", "0.0.0.0"), ("", "0.0.0.0")],
)
def test_a_host_is_known_by_the_name_that_was_asked_for(asked, expected):
    with serve.listen(asked, 0) as listener:
        host = serve.known_as(asked, listener)
        assert host == expected
        gate = Guard(None, host=host, port=8000, token="12345678")
        named = {"localhost": "localhost:8000"}.get(asked, "127.0.0.1:8000")
        scope = {"path": "/", "headers": [(b"host", named.encode())]}
        gate.check(scope)
        foreign = {"path": "/", "headers": [(b"host", b"example.org:8000")]}
        with pytest.raises(Refused):
            gate.check(foreign)


@pytest.mark.parametrize("address", ["192.168.1.5", "[fd00::5]"])
@pytest.mark.parametrize("shown", ["", ":80"])
def test_on_port_80_an_address_may_come_without_it(address, shown):
    gate = Guard(None, host="0.0.0.0", port=80, token="12345678")
    gate.check({"path": "/", "headers": [(b"host", f"{address}{shown}".encode())]})
    with pytest.raises(Refused):
        gate.check({"path": "/", "headers": [(b"host", b"example.org")]})


@pytest.mark.parametrize(
    ("host", "is_right"),
    [
        ("192.168.1.5:8000", True),
        ("[fe80::1]:8000", True),
        ("192.168.1.5:8001", False),
        ("evil.example:8000", False),
        ("192.168.1.5.evil.example:8000", False),
        ("", False),
    ],
)
def test_a_server_for_all_addresses_is_known_by_any_of_them_but_by_no_foreign_name(host, is_right):
    gate = Guard(None, host="0.0.0.0", port=8000, token="12345678")
    scope = {"path": "/", "headers": [(b"host", host.encode())]}
    with contextlib.nullcontext() if is_right else pytest.raises(Refused, match="Host"):
        gate.check(scope)


@pytest.mark.slow
def test_with_a_token_nothing_but_the_page_is_shown_without_it(run):
    token = "open-sesame"
    with Server(run, "--token", token) as server:
        for path in ("/", "/page.css", "/page.js", "/icon.svg"):
            assert requests.get(server.url + path, timeout=10).status_code == 200
        for path in ("/v1/models", "/run.json", "/training_losses.png", "/nothing", "/docs"):
            for header in (
                None,
                "",
                "Bearer",
                "Bearer wrong",
                f"Basic {token}",
                f"Bearer {token}x",
            ):
                headers = {} if header is None else {"Authorization": header}
                response = requests.get(server.url + path, headers=headers, timeout=10)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
        assert server.post(prompt="The").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        client = server.client(token)
        assert client.models.list().data[0].id == "tiny"
        assert client.completions.create(model="tiny", prompt="The").choices[0].text


@pytest.mark.slow
@ON_POSIX
def test_ctrl_c_in_mid_stream_ends_it_cleanly_and_no_prompt_or_token_was_ever_printed(run):
    secret, token = "a-planted-prompt", "a-planted-token"
    options = ("--answer-limit", "100000")
    with Server(run, *options, GPT_SERVE_TOKEN=token) as server:
        headers = {"Authorization": f"Bearer {token}"}
        url = f"{server.url}/v1/completions?{secret}"
        for body in (
            {"prompt": secret},
            {"prompt": secret, "stream": True},
            {"prompt": [secret, 1]},
            {secret: 1},
        ):
            body = {"model": "tiny"} | body
            assert requests.post(url, json=body, headers=headers, timeout=30).status_code < 500
        server.raw(f"{secret} / HTTP/9\r\n\r\n".encode())
        server.ask_completion(secret.encode())
        response = open_stream(server, headers, prompt=secret)
        started_at = time.monotonic()
        code, printed = server.stop()
        assert time.monotonic() - started_at < 10
        last = response.read().rstrip().split(b"\n\n")[-1].removeprefix(b"data: ")
        assert json.loads(last)["error"]["message"] == "the server is being stopped"
    assert code == 130
    assert server.greeting.endswith("fp32 weights (Ctrl-C ends it)\n")
    assert printed.split() == ["Stopped."]


# ------------------------------------------------------------------- how much, how many


def test_a_body_that_says_that_it_is_too_long_is_refused_before_it_comes(server):
    with server.connect() as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
        connection.sendall(f"{head}Content-Length: 1000001\r\n\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_in_chunks_is_refused_as_soon_as_it_is_too_long(server):
    with server.connect() as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(11):
            connection.sendall(b"186a0\r\n" + b" " * 100_000 + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_prompt_of_nearly_the_limit_is_read(server):
    started_at = time.monotonic()
    response = server.post(prompt="The ferry crossed. " * 52_000, max_tokens=3)
    assert response.status_code == 200
    assert response.json()["usage"]["prompt_tokens"] == 19 * 52_000
    assert time.monotonic() - started_at < 10


def open_stream(
    server: Server, headers: dict[str, str] | None = None, **body
) -> http.client.HTTPResponse:
    """A stream of an answer that takes a minute, after its first event."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = {"model": "tiny", "prompt": "The", "max_tokens": 100_000, "stream": True} | body
    connection.request("POST", "/v1/completions", json.dumps(body), headers or {})
    response = connection.getresponse()
    assert response.status == 200
    assert response.readline().startswith(b"data: {")
    response.connection = connection
    return response


def cut(connection: socket.socket | http.client.HTTPConnection) -> None:
    """End a connection at once, as where a program is killed."""
    connection = getattr(connection, "sock", connection)
    linger_no_longer = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_no_longer)
    connection.close()


def seconds_until_idle(server: Server) -> float:
    """How long a short answer takes, behind all that is still being written."""
    started_at = time.monotonic()
    assert server.post(prompt="The", max_tokens=1).status_code == 200
    return time.monotonic() - started_at


@pytest.mark.parametrize("rudely", [False, True])
def test_a_client_that_goes_in_mid_stream_ends_its_generation(server, rudely):
    response = open_stream(server)
    started_at = time.monotonic()
    if rudely:
        cut(response.connection)
    response.close()
    response.connection.close()
    assert seconds_until_idle(server) < 2
    assert time.monotonic() - started_at < 2


def test_a_client_that_goes_without_streaming_ends_its_generation_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"model": "tiny", "prompt": "The", "max_tokens": 100_000}
    connection.request("POST", "/v1/completions", json.dumps(body))
    time.sleep(0.3)  # it is being written now
    connection.close()
    assert seconds_until_idle(server) < 2


@pytest.mark.parametrize(
    "body",
    [
        {"top_k": 0, "stop": "", "logprobs": False, "max_tokens": 3},
        {"top_k": -1, "stop": [""], "reasoning_effort": "low", "max_completion_tokens": 3},
        {"tools": None, "logit_bias": None, "prediction": None, "verbosity": "low", "n": 1},
    ],
)
def test_what_other_clients_send_of_course_is_no_error(server, body):
    assert server.post(prompt="The", **body).status_code == 200


def test_an_assistant_that_said_nothing_is_left_out(server):
    messages = [{"role": "assistant", "content": None}, {"role": "user", "content": "The"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 3, "temperature": 0}
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=10)
    plain = server.post(prompt="The", max_tokens=3, temperature=0).json()["choices"][0]["text"]
    assert answer.json()["choices"][0]["message"]["content"] == plain


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [1] * 300_000},
        {"messages": [{"role": "user"}] * 50_000},
        {"messages": [{"role": "user", "content": "a"}]} | {f"key{i}": 1 for i in range(60_000)},
    ],
    ids=["numbers", "no contents", "unknown names"],
)
def test_a_request_that_is_wrong_in_thousands_of_places_gets_a_short_answer_soon(server, body):
    url = f"{server.url}/v1/chat/completions"
    # a name held against all known ones takes a millisecond: of all of them, minutes
    answer = requests.post(url, json={"model": "tiny"} | body, timeout=15)
    assert answer.status_code == 400
    assert len(answer.content) < 5000


def test_orders_that_were_abandoned_while_they_waited_are_not_kept():
    class Anything:
        pass

    async def abandon() -> list:
        writer, hold = Writer(None, queue_limit=5), threading.Event()
        writer._thread.submit(hold.wait)  # the text that is being written
        seen = []
        for _ in range(50):
            order = Anything()
            seen.append(weakref.ref(order))
            writer.cancel(writer.submit(order))
        del order
        gc.collect()
        kept = [order for order in seen if order() is not None]
        hold.set()
        writer.close()
        return kept

    assert asyncio.run(abandon()) == []


def test_one_text_is_written_at_a_time_and_beyond_the_queue_is_429(server):
    first = open_stream(server)
    waiting = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=30) for _ in range(2)]
    body = json.dumps({"model": "tiny", "prompt": "The", "max_tokens": 2})
    for connection in waiting:
        connection.request("POST", "/v1/completions", body)
    time.sleep(0.3)
    refused = server.post(prompt="The", max_tokens=1)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    # the server answers all else meanwhile, and the first goes on
    started_at = time.monotonic()
    assert is_alive(server)
    assert time.monotonic() - started_at < 1
    assert first.readline() == b"\n"
    assert first.readline().startswith(b"data: {")
    # one that waits and goes makes room for another
    waiting.pop().close()
    later: list[int] = []
    asking = threading.Thread(target=lambda: later.append(server.post(prompt="The").status_code))
    time.sleep(0.3)
    asking.start()
    time.sleep(0.3)
    assert later == []
    first.close()
    first.connection.close()
    assert waiting[0].getresponse().status == 200
    asking.join(timeout=10)
    assert later == [200]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "told", "printed"),
    [
        ("NumericsError('the logits are not finite')", "the logits are not finite", ""),
        ("ZeroDivisionError('a-planted-prompt')", "(ZeroDivisionError)", "ZeroDivisionError in "),
    ],
)
def test_a_failure_of_the_model_is_an_error_of_the_request_alone(run, failure, told, printed):
    before = (
        "import generation\nfrom engine.errors import NumericsError\n"
        f"def choose_next(*_, **__): raise {failure}\n"
        "generation.choose_next = choose_next"
    )
    with Server(run, before=before) as server:
        for stream in (False, True):
            response = server.post(prompt="The", stream=stream)
            assert response.status_code == (200 if stream else 500)
            error = json.loads(response.text.removeprefix("data: "))["error"]
            assert error["type"] == "server_error"
            assert told in error["message"]
            assert "planted" not in response.text
        assert is_alive(server)
        server.process.kill()
        output = "".join(server.process.communicate())
    assert printed in output
    assert bool(printed) == bool(output)
    assert "planted" not in output


@pytest.mark.slow
def test_a_long_answer_and_a_connection_that_is_used_again_are_not_taken_for_slow_senders(run):
    before = "from scripts.serving import guard\nguard.REQUEST_SECONDS = 1"
    with Server(run, "--answer-limit", "100000", before=before) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        for _ in range(5):
            connection.request("GET", "/v1/models")
            assert connection.getresponse().read()
            kept = connection.sock
            time.sleep(0.4)
        assert connection.sock is kept
        response = open_stream(server)
        started_at = time.monotonic()
        while time.monotonic() - started_at < 3:
            assert response.readline()
        slow = server.connect()
        slow.sendall(b"GET / HTTP/1.1\r\n")
        assert is_cut_off(slow)
        assert response.readline()


@pytest.mark.slow
def test_a_client_that_does_not_read_its_stream_is_cut_off(run):
    before = "from scripts.serving import guard\nguard.STALLED_SECONDS = 1"
    with Server(run, "--answer-limit", "100000", before=before) as server:
        response = open_stream(server, n=16)
        assert seconds_until_idle(server) < 30
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            response.read()


# ----------------------------------------------------------------------- the page's facts


def test_the_page_and_the_facts_of_the_run_are_there(server, run, model):
    page = requests.get(server.url, timeout=10)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<textarea" in page.text
    facts = requests.get(f"{server.url}/run.json", timeout=10).json()
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert facts["parameters"] == summary["parameters"]
    assert facts["final_val_loss"] == summary["final_val_loss"]
    assert (facts["name"], facts["text"], facts["step"]) == ("tiny", ["text.txt"], model.step)
    assert facts["sampling"]["temperature"] == 0.7
    assert str(run.parent) not in json.dumps(facts)
    picture = requests.get(f"{server.url}/training_losses.png", timeout=10)
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == (run / "training_losses.png").read_bytes()


def test_the_page_names_no_other_host_and_never_makes_markup_of_text():
    for name in ("page.html", "page.css", "page.js", "icon.svg"):
        text = (REPOSITORY / "scripts" / "serving" / name).read_text(encoding="utf-8")
        text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), name
        banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=|style="
        assert not re.search(banned, text), name


@pytest.mark.slow
def test_what_requests_leave_out_is_as_the_options_have_it_even_of_a_run_without_figures(
    run, tmp_path
):
    for path in run.rglob("*"):
        if path.is_file() and path.name not in ("training_losses.png", "summary.json"):
            copy = tmp_path / "tiny" / path.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    with Server(tmp_path / "tiny", "--temperature", "2", "--seed", "3") as server:
        assert requests.get(f"{server.url}/training_losses.png", timeout=10).status_code == 404
        facts = requests.get(f"{server.url}/run.json", timeout=10).json()
        assert (facts["final_val_loss"], facts["sampling"]["temperature"]) == (None, 2)
        answers = [server.post(prompt="The").json() for _ in range(2)]
        assert answers[0]["usage"]["completion_tokens"] == 20
        assert answers[0]["choices"] == answers[1]["choices"]
        other = server.post(prompt="The", seed=4).json()["choices"]
        assert other != answers[0]["choices"]
        assert other == server.post(prompt="The", seed=4, temperature=2).json()["choices"]


# ---------------------------------------------------------------------- beginning and end


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "needs --token"),
        (["--host", "192.168.1.5"], "needs --token"),
        (["--token", "short"], "8 or more"),
        (["--token", "with a blank in it"], "8 or more"),
        (["--port", "65536"], "--port is '65536'; it must be a whole number from 0 to 65535"),
        (["--port", "-1"], "--port is '-1'"),
        (["--queue-limit", "many"], "--queue-limit is 'many'"),
        (["--answer-limit", "0"], "--answer-limit is '0'"),
        (["--tokn", "x"], "--token"),
    ],
)
def test_wrong_options_are_told_before_anything_listens(monkeypatch, options, said):
    monkeypatch.setattr(sys, "argv", ["serve", *options])
    monkeypatch.setattr(serve, "listen", lambda *_: pytest.fail("it listened"))
    with pytest.raises(SettingsError, match=re.escape(said)) as caught:
        serve.main()
    assert "with a blank" not in str(caught.value)


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve"])
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=re.escape(serve.INSTALL)):
        serve.main()


def test_the_server_is_installed_in_the_versions_that_are_tested():
    tested = (REPOSITORY / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    assert set(serve.INSTALL.removeprefix("pip install ").split()) <= set(tested)
    for name in ("README.md", "README.zh-CN.md"):
        assert serve.INSTALL in (REPOSITORY / name).read_text(encoding="utf-8")


def test_more_tokens_by_default_than_the_limit_is_an_error(monkeypatch, run):
    options = ["--run", str(run), "--port", "0", "--answer-limit", "19", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["serve", *options])
    said = "max_new_tokens is 20, more than --answer-limit 19 allows"
    with pytest.raises(SettingsError, match=said):
        serve.main()


def test_a_port_in_use_is_an_error_that_names_a_free_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} is in use") as caught:
            serve.listen("127.0.0.1", port)
    free = int(re.search(r"Try --port (\d+)\.", str(caught.value))[1])
    with serve.listen("127.0.0.1", free):
        assert free != port


@pytest.mark.parametrize("host", ["256.1.1.1", "203.0.113.7", "2001:db8::1"])
def test_an_address_that_is_not_this_machines_is_an_error(host):
    with pytest.raises(ResourceError, match="can't listen on"):
        serve.listen(host, 0)


# ----------------------------------------------------------------------------- bad company


def test_of_too_many_connections_the_one_that_has_sent_nothing_longest_makes_room(server):
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(guard.MOST_CONNECTIONS)]
        assert is_alive(server)
        for connection in idle:
            connection.settimeout(0.2)
        assert is_cut_off(idle[0])
        assert not is_cut_off(idle[-1])


@pytest.mark.slow
@ON_LINUX
def test_a_thousand_connections_leave_it_alive_and_its_memory_flat(server):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        is_alive(server)
        before_mb = server.resident_mb()
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                for n in range(1000):
                    connection = stack.enter_context(server.connect())
                    connection.sendall(b"GET / HTTP/1.1\r\nX-Slow: " + b"x" * (n % 100))
                started_at = time.monotonic()
                assert is_alive(server)
                assert seconds_until_idle(server) < 5
                assert time.monotonic() - started_at < 5
        assert server.resident_mb() - before_mb < 30
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@ON_LINUX
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_mb_is_413_with_memory_flat(server, chunked):
    is_alive(server)
    before_mb = server.resident_mb()
    part = b"x" * 1_000_000

    def body():
        for _ in range(100):
            yield part

    for path in ("/v1/completions", "/v1/chat/completions"):
        given = body() if chunked else part * 100
        assert requests.post(server.url + path, data=given, timeout=60).status_code == 413
    assert requests.get(server.url, data=part * 50, timeout=60).status_code == 200
    assert server.resident_mb() - before_mb < 30
    assert is_alive(server)


@pytest.mark.slow
def test_slow_senders_are_cut_off_and_others_are_served_meanwhile(server):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\n".encode()
    whole = head + b"Content-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(200)]
        started_at = time.monotonic()
        ended: set[int] = set()
        while len(ended) < len(slow) and time.monotonic() - started_at < 30:
            for i, connection in enumerate(slow):
                if i in ended:
                    continue
                try:  # half of them send their head byte by byte, half their body
                    tick = int((time.monotonic() - started_at) / 0.5)
                    connection.sendall(head[tick : tick + 1] if i % 2 else (b" ", whole)[tick == 0])
                    connection.setblocking(False)
                    if connection.recv(1) == b"":
                        ended.add(i)
                except BlockingIOError:
                    connection.settimeout(30)
                except OSError:
                    ended.add(i)
            asked_at = time.monotonic()
            assert is_alive(server)
            assert time.monotonic() - asked_at < 2
            time.sleep(0.5)
    assert len(ended) == len(slow)
    assert time.monotonic() - started_at < guard.REQUEST_SECONDS + 8
    assert seconds_until_idle(server) < 2


@pytest.mark.slow
@ON_LINUX
def test_a_hundred_streams_that_are_dropped_leave_no_thread_and_no_memory(server):
    for _ in range(10):
        open_stream(server).connection.close()
    seconds_until_idle(server)
    before_mb = server.resident_mb()
    status = Path(f"/proc/{server.process.pid}/status")
    threads = re.search(r"Threads:\s+(\d+)", status.read_text("ascii"))[1]
    for _ in range(100):
        response = open_stream(server)
        response.close()
        response.connection.close()
        assert seconds_until_idle(server) < 2
    assert re.search(r"Threads:\s+(\d+)", status.read_text("ascii"))[1] == threads
    assert server.resident_mb() - before_mb < 20
