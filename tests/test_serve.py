"""The server on loopback: OpenAI's own client, raw sockets, and bad company."""

import asyncio
import contextlib
import gc
import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch

import environment
import generation
from engine.errors import NumericsError, ResourceError, SettingsError
from generation import SamplingConfig
from scripts import serve
from scripts.serving import guard
from scripts.serving.guard import HEADERS, Refused
from scripts.serving.protocol import Served, read_order
from scripts.serving.writer import Writer
from tests import by_heart
from tests.by_heart import CONTEXT, ENDLESS, ON_POSIX, POEM
from tests.conftest import REPOSITORY
from tests.launching import Program, wait_until
from tests.serving import GREETING, LONG, Client, Server, continued, options_of


def is_cut_off(connection: socket.socket) -> bool:
    """Whether the other side has ended a connection, or does so soon."""
    connection.settimeout(60)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return by_heart.tiny_run(tmp_path_factory)


@pytest.fixture(scope="module")
def model(run):
    return environment.load_run(run, weights="fp32", device="cpu")


@pytest.fixture(scope="module")
def server(run):
    with Server(run, "--queue-limit", "2") as server:
        yield server


@pytest.fixture(scope="module")
def served(model) -> Served:
    sampling = vars(SamplingConfig(max_new_tokens=20))
    return Served("tiny", (), 0, "", model.tokenizer, sampling, None, LONG)


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def test_the_client_lists_the_run_as_a_model_and_finds_it_by_name(server):
    openai, client = pytest.importorskip("openai"), server.openai
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match='"gpt-4" does not exist; this server has'):
        client.models.retrieve("gpt-4")


def test_a_completion_is_what_the_model_writes_for_each_prompt_in_order(server, model):
    ferry = "The ferry cr"
    ids = model.tokenizer.encode(ferry)
    for prompt, n, texts in (
        (ferry, 2, [ferry]),
        ([ferry, POEM[:3]], 2, [ferry, POEM[:3]]),
        (ids, 1, [ferry]),
        ([ids, ids[:10]], 1, [ferry, ferry[:10]]),
        ("", 1, [""]),
    ):
        answer = server.openai.completions.create(
            model="tiny", prompt=prompt, temperature=0, n=n, max_tokens=8
        )
        written = [continued(model, text, max_new_tokens=8) for text in texts for _ in range(n)]
        assert [choice.text for choice in answer.choices] == written
        assert [choice.index for choice in answer.choices] == list(range(len(written)))
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        usage, read = answer.usage, sum(len(text) or 1 for text in texts)
        assert (usage.prompt_tokens, usage.completion_tokens) == (read, 8 * len(written))
        assert usage.total_tokens == read + 8 * len(written)


def test_messages_are_joined_with_blank_lines_and_their_parts_with_line_ends(server, model):
    parts = [{"type": "text", "text": "Its bell"}, {"type": "text", "text": "rang"}]
    messages = [
        {"role": "system", "content": "The ferry"},
        {"role": "assistant", "content": None},
        *user(parts),
        {"role": "assistant", "content": ""},
    ]
    options = {"temperature": 0, "max_completion_tokens": 20}
    answer = server.openai.chat.completions.create(model="tiny", messages=messages, **options)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == continued(model, "The ferry\n\nIts bell\nrang")


def test_a_stream_comes_in_pieces_that_make_the_whole_and_says_who_speaks(server, model):
    options = {"model": "tiny", "temperature": 0, "max_tokens": 20, "stream": True}
    chunks = list(server.openai.completions.create(prompt="The ferry", **options))
    whole = continued(model, "The ferry")
    assert "".join(c.choices[0].text for c in chunks) == whole
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 19 + ["length"]
    assert all(c.usage is None for c in chunks) and len({c.id for c in chunks}) == 1
    options |= {"stream_options": {"include_usage": True}, "messages": user("The ferry")}
    first, *chunks, last = server.openai.chat.completions.create(**options)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(c.choices[0].delta.content for c in chunks) == whole
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (9, 20)

    response = server.post(prompt="The", max_tokens=2, stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert {name: response.headers[name] for name in HEADERS} == HEADERS
    *events, done, rest = response.content.split(b"\n\n")
    assert all(event.startswith(b"data: {") for event in events)
    assert (done, rest) == (b"data: [DONE]", b"")


@pytest.mark.slow
def test_the_official_client_converses_with_a_chat_model(run, model):
    joined = "{% for message in messages %}{{ message.content }}{% endfor %}"
    story = continued(model, "The ferry", max_new_tokens=10)
    with Server(run, chat_template=joined) as server:
        create = server.openai.chat.completions.create
        turns = [{"role": "system", "content": "The"}, *user(" ferry")]
        options = {"model": "tiny", "messages": turns, "temperature": 0, "max_tokens": 10}
        answer = create(**options)
        assert answer.choices[0].message.content == story
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 10)
        chunks = list(create(**options, stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == story
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage == answer.usage
        begun = [*turns, {"role": "assistant", "content": story[:4]}]
        more = create(**options | {"messages": begun, "max_tokens": 6})
        assert story[:4] + more.choices[0].message.content == story
        refusal = sys.modules["openai"].BadRequestError
        tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
        too_long = [*turns, *user("x" * CONTEXT)]
        for body, said in (
            ({"tools": [tool]}, "tools is"),
            ({"messages": too_long}, "context has"),
        ):
            with pytest.raises(refusal, match=said):
                create(**options | body)
        assert server.get("/run.json").json()["converses"] is True


def test_the_same_seed_writes_the_same_text_streamed_or_not_and_none_another(server, model):
    client, free = server.openai, {"temperature": 5, "top_p": None}
    options = free | {"model": "tiny", "prompt": "The", "max_tokens": 20}
    options["extra_body"] = {"top_k": None}

    def written(**more) -> str:
        return client.completions.create(**options, **more).choices[0].text

    five = written(seed=5)
    assert five != written(seed=6)
    chunks = client.completions.create(**options, seed=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == five
    # three others, also where two are empty: one in a hundred ends at once
    assert len({written() for _ in range(5)}) >= 3
    generator = torch.Generator().manual_seed(5)
    assert five == continued(model, "The", generator=generator, top_k=None, **free)


def test_a_stop_string_ends_the_text_before_it(server, model):
    whole = continued(model, "The ferry", max_new_tokens=40)
    string = whole[30:34]
    for stop in (string, ["\x00", string]):
        answer = server.openai.completions.create(
            model="tiny", prompt="The ferry", temperature=0, max_tokens=40, stop=stop
        )
        assert answer.choices[0].text == whole[: whole.index(string)]
        assert answer.choices[0].finish_reason == "stop"


WRONG = {  # parameter: what is said of which values
    "max_tokens": {"from 0; this server writes 100000": [-1, "5", True], 'is "5"': ["5"]},
    "temperature": {
        "at least 0": [-1],
        'temperature is "hot"; it must be a number': ["hot"],
        "temperature is true; it must be a number": [True],
        "at most": [1e300],
    },
    "top_p": {"at most 1": [1.5]},
    "top_k": {"at least 1": [-2]},
    "min_p": {"at most 1": [2]},
    "repetition_penalty": {"at least 0.01": [0]},
    "n": {"from 1 to 16": [17]},
    "prompt": {
        "too many": [["a"] * 1025],
        "missing": [None],
        "must be text": [[], 7, ["a", 7]],
        "token ids from 0": [[10**6], [-1], [True], [[1], []]],
        r'"\ud800"': ["\ud800"],
    },
    "stop": {"at most 1000 characters": ["a" * 1001, [1]], "at most 16": [["a"] * 17]},
    "seed": {"64 bits": [2**63, 1.5]},
    "stream": {"true or false": ["yes"]},
    "stream_options": {"true or false": [{"include_usage": 1}]},
    "logprobs": {"a whole number to 20": [21, -1, True]},
    "frequency_penalty": {"from -2 to 2": [2.5, "1", True]},
    "presence_penalty": {"from -2 to 2": [-3]},
    "echo": {"true or false": [1]},
    "logit_bias": {'is {"1": 5}; it must be {} or [] or left out': [{"1": 5}]},
    "best_of": {"does not support": [2]},
    "model": {'must be text, as "tiny"': [5, ["tiny"]]},
    "messages": {
        "missing": [None],
        "one or more messages": [[], "The ferry"],
        '"role" is one of': [["The ferry"]],
        'role is "tool"; it must be one of system, developer, user, assistant: this server runs': [
            [{"role": "tool", "content": "x"}]
        ],
        "role is null; it must be one of": [[{"content": "x"}]],
        "messages[0].content is null": [user(None)],
        '"type": "text"': [user([{"type": "image_url"}]), user([{"type": "text", "text": 5}])],
    },
}


def refused(served: Served, body: bytes | dict, said: str, *, is_chat: bool = False) -> Refused:
    if isinstance(body, dict):
        body = json.dumps({"model": "tiny"} | body).encode()
    with pytest.raises(Refused, match=re.escape(said)) as caught:
        read_order(body, served, is_chat=is_chat)
    assert caught.value.status == 400
    return caught.value


def test_a_wrong_value_is_named_with_what_is_allowed(served):
    for param, cases in WRONG.items():
        is_chat = param == "messages"
        right = {} if is_chat else {"prompt": "The"}
        for said, value in ((said, value) for said, values in cases.items() for value in values):
            assert refused(served, right | {param: value}, said, is_chat=is_chat).param == param
    both = {"max_tokens": 5, "max_completion_tokens": 6}
    refused(served, {"prompt": "The"} | both, "differ")
    refused(served, {"prompt": ["a"] * 513, "n": 2}, "513 prompts with n = 2 are too many")


def test_parameters_that_say_nothing_and_those_of_other_clients_are_accepted(server, served):
    nothing = {"frequency_penalty": 0, "presence_penalty": 0.0, "best_of": 1, "echo": False}
    nothing |= {"suffix": None, "logit_bias": {}, "user": "me", "stop": None, "seed": None}
    nothing |= {"temperature": None, "max_tokens": None, "stream": None, "n": None}
    for body in (
        nothing,
        {"top_k": 0, "stop": "", "logprobs": False, "max_tokens": 3},
        {"top_k": -1, "stop": [""], "reasoning_effort": "low", "max_completion_tokens": 3},
        {"tools": None, "logit_bias": None, "prediction": None, "verbosity": "low", "n": 1},
    ):
        text = json.dumps({"model": "tiny", "prompt": "The"} | body)
        order = read_order(text.encode(), served, is_chat=False)
        length = 3 if "top_k" in body else 20
        top_k = None if "top_k" in body else served.sampling["top_k"]
        assert order.sampling == served.sampling | {"max_new_tokens": length, "top_k": top_k}
        assert (order.stop, order.n, order.logprobs, order.ignored) == ([], 1, None, [])
    chat = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    response = server.post("chat/completions", messages=user("The"), top_logprobs=0, **chat)
    assert response.status_code == 200


def test_a_body_that_is_no_object_in_json_is_refused(served):
    for body, said in (
        (b"", "not JSON"),
        (b'{"model": "tiny", "prompt": "The', "line 1 column 29"),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 12)"),
        (b'"The"', "must be an object"),
        (b"[" * 900_000, "nested too deeply"),
        (b'{"a":' * 150_000, "nested too deeply"),
        (b'{"temperature": NaN}', "not finite"),
        (b'{"seed": ' + b"9" * 100_000 + b"}", "too long"),
    ):
        refused(served, body, said)


def test_a_request_that_is_wrong_in_thousands_of_places_gets_a_short_answer_soon(served):
    for body, said in (
        ({"messages": [1] * 300_000}, "messages[0] must be"),
        ({"messages": [{"role": "user"}] * 50_000}, "messages[0].content is"),
        ({"messages": [1]} | {f"key{i}": 1 for i in range(60_000)}, "messages[0] must be"),
    ):
        text = json.dumps({"model": "tiny"} | body).encode()
        started_at = time.thread_time()
        json.loads(text)
        read_at = time.thread_time()
        assert len(str(refused(served, text, said, is_chat=True))) < 5000
        # a name held against all known ones takes a millisecond: of all of them, minutes
        assert time.thread_time() - read_at < 300 * (read_at - started_at)


def test_what_the_server_refuses_has_one_shape_and_leaves_it_alive(server):
    mistakes = {"model": "tiny", "prompt": 1, "temperature": -1, "seed": "x", "best_of": 7}
    ask, foreign = "POST /v1/completions", {"host": "evil.example"}
    for what, options, status, named in (
        (ask, {"body": json.dumps(mistakes).encode()}, 400, list(mistakes)[1:]),  # all at once
        (ask, {"body": b"[" * 900_000}, 400, []),
        (ask, foreign, 403, ["evil.example"]),
        ("GET /v1/completions", {}, 405, []),
        ("POST /v1/models", {}, 405, []),
        ("GET /etc/passwd", {}, 404, []),
        ("GET /../scripts/serve.py", {}, 404, []),
        ("GET /..%2f..%2fetc/passwd", {}, 404, []),
        ("GET /page.js/", {}, 404, []),
    ):
        head, _, body = server.ask(what, **options).partition(b"\r\n\r\n")
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (int(head.split()[1]), error["type"]) == (status, "invalid_request_error"), what
        assert all(name in error["message"] for name in named)
        assert error["param"] == ("prompt" if len(named) > 1 else None)
    for what in (  # no HTTP
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 100_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"\r\n\r\n\r\n \xff\xfe",
    ):
        response = server.raw(what)
        assert response == b"" or response.startswith(b"HTTP/1.1 400 ")
    assert server.is_alive()


def test_every_answer_has_the_headers_that_keep_pages_apart(server):
    paths = ("/", "/page.js", "/run.json", "/nothing")
    for method, path in (*(("GET", path) for path in paths), ("HEAD", "/"), ("OPTIONS", "/")):
        headers = requests.request(method, server.url + path, timeout=60).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS, path
        assert "'unsafe-inline'" not in headers["content-security-policy"]
        assert not [name for name in headers if name.lower().startswith("access-control")]
        assert "server" not in headers


def test_with_a_token_nothing_but_the_page_is_shown_without_it(run, tmp_path):
    """And of options: what a request leaves out is as they have it; here of a run without files."""
    copy, token = tmp_path / "tiny", "open-sesame"
    left_out = shutil.ignore_patterns("summary.json", "data.json", "training_losses.png")
    shutil.copytree(run, copy, ignore=left_out)
    with Server(copy, "--token", token, "--temperature=5", "--seed=3", token=token) as server:

        def status(path: str, authorization: str | None, **body) -> int:
            headers = {} if authorization is None else {"Authorization": authorization}
            options = {"headers": headers, "json": body, "timeout": 60}
            answer = requests.request("POST" if body else "GET", server.url + path, **options)
            if answer.status_code == 401:
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
            return answer.status_code

        for path in ("/", "/page.css", "/page.js", "/icon.svg"):
            assert status(path, None) == 200
        wrong = ["", "Bearer", f"Basic {token}", "Bearer wrong", f"Bearer {token}x"]
        for path in ("/v1/models", "/run.json", "/training_losses.png", "/nothing", "/docs"):
            assert {status(path, given) for given in (None, *wrong)} == {401}
        assert status("/v1/completions", None, model="tiny", prompt="The") == 401

        assert server.get("/training_losses.png").status_code == 404
        facts = server.get("/run.json").json()
        assert (facts["final_val_loss"], facts["text"]) == (None, [])
        assert (facts["sampling"]["temperature"], facts["seed"]) == (5, 3)
        usage = server.post(prompt=ENDLESS, temperature=0).json()["usage"]
        assert usage["completion_tokens"] == 100
        seeds = ({}, {}, {"seed": 4}, {"seed": 4, "temperature": 5})
        answers = [server.post(prompt="The", max_tokens=20, **seed).json() for seed in seeds]
        three, again, four, same = (answer["choices"] for answer in answers)
        assert three == again != four == same


def test_a_failure_of_the_model_is_an_error_of_the_request_alone(server, monkeypatch, capsys):
    real, failures = generation.choose_next, []

    def choose_next(*arguments, **options):
        if failures:
            raise failures.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(generation, "choose_next", choose_next)
    assert server.is_alive()  # where this test is the first, its server says where it is
    capsys.readouterr()
    for failure, told, printed in (
        (NumericsError("the logits are not finite"), "the logits are not finite", ""),
        (ZeroDivisionError("a-planted-prompt"), "(ZeroDivisionError)", "ZeroDivisionError in "),
    ):
        for stream in (False, True):
            failures.append(failure)
            response = server.post(prompt="The", stream=stream)
            assert response.status_code == (200 if stream else 500)
            error = json.loads(response.text.removeprefix("data: "))["error"]
            assert error["type"] == "server_error"
            assert told in error["message"]
            assert server.is_alive()  # and has printed what it had to
            output = "".join(capsys.readouterr())
            assert printed in output and bool(printed) == bool(output)
            assert "planted" not in response.text + output
        assert server.post(prompt="The").json()["choices"][0]["text"]


def test_a_body_is_refused_as_soon_as_it_is_known_to_be_too_long(server):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\n"
    chunk = b"186a0\r\n" + b" " * 100_000 + b"\r\n"
    for header, parts in (
        ("Content-Length: 1000001", []),
        ("Transfer-Encoding: chunked", [chunk] * 11),
    ):
        with server.connect() as connection:
            connection.sendall(f"{head}{header}\r\n\r\n".encode())
            for part in parts:
                connection.sendall(part)
            assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    response = server.post(prompt="The ferry crossed. " * 52_000, max_tokens=3)  # nearly
    assert response.json()["usage"]["prompt_tokens"] == 19 * 52_000


@pytest.mark.parametrize("way", ["politely", "rudely", "without a stream"])
def test_a_client_that_goes_ends_its_generation(server, way):
    if way == "without a stream":
        connection, before = http.client.HTTPConnection("127.0.0.1", server.port), server.n_drawn
        body = {"model": "tiny", "prompt": ENDLESS, "max_tokens": LONG}
        connection.request("POST", "/v1/completions", json.dumps(body))
        wait_until(lambda: server.n_drawn > before)
    else:
        response = server.open_stream()
        connection = response.connection
        if way == "rudely":  # as where a program is killed
            linger_no_longer = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_no_longer)
            connection.sock.close()
        response.close()
    connection.close()
    assert server.has_cancelled()


def test_orders_that_were_abandoned_while_they_waited_are_not_kept():
    class Anything:
        pass

    async def abandon() -> list:
        writer, hold = Writer(None, queue_limit=5), threading.Event()
        writer._thread.submit(hold.wait)  # the text that is being written
        seen = []
        for _ in range(10):
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
    first = server.open_stream()
    waiting = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(2)]
    body = json.dumps({"model": "tiny", "prompt": "The", "max_tokens": 2})
    for connection in waiting:
        connection.request("POST", "/v1/completions", body)
    wait_until(lambda: len(server.writer._jobs) == 3)
    refused = server.post(prompt="The", max_tokens=1)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    # the server answers all else meanwhile, and the first goes on
    assert server.is_alive()
    assert first.readline() == b"\n"
    assert first.readline().startswith(b"data: {")
    # one that waits and goes makes room for another
    waiting.pop().close()
    wait_until(lambda: len(server.writer._jobs) == 2)
    later: list[int] = []
    asking = threading.Thread(target=lambda: later.append(server.post(prompt="The").status_code))
    asking.start()
    wait_until(lambda: len(server.writer._jobs) == 3)
    assert later == []
    first.close()
    first.connection.close()
    assert waiting[0].getresponse().status == 200
    asking.join(timeout=60)
    assert later == [200]


def test_of_too_many_connections_the_one_longest_silent_makes_room(server, monkeypatch):
    monkeypatch.setattr(guard, "MOST_CONNECTIONS", 20)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(20)]
        assert server.is_alive()
        assert is_cut_off(idle[0])
        idle[-1].sendall(f"GET / HTTP/1.1\r\nHost: localhost:{server.port}\r\n\r\n".encode())
        assert not is_cut_off(idle[-1])


def test_senders_and_readers_have_a_time_but_not_long_answers_and_kept_connections(server):
    kept, response = http.client.HTTPConnection("127.0.0.1", server.port), server.open_stream()
    (long,) = (c for c in server.connections if c.cycle and not c.cycle.response_complete)
    for _ in range(5):
        kept.request("GET", "/v1/models")
        assert kept.getresponse().read()
        sock = kept.sock
        server.let_pass(guard.REQUEST_SECONDS / 4)
    assert kept.sock is sock
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{server.port}\r\n".encode()
    body = head + b"Content-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        slow = [sock, *(stack.enter_context(server.connect()) for _ in range(20))]
        for i, connection in enumerate(slow):  # half send their head bit by bit, half their body
            connection.sendall(body if i % 2 else head)
        server.let_pass(guard.REQUEST_SECONDS - 5)
        assert len(server.connections) >= len(slow)
        for i, connection in enumerate(slow):
            connection.sendall(b" " if i % 2 else b"X")
        server.let_pass(6)
        assert all(map(is_cut_off, slow))
    assert response.readline() and not long.transport.is_closing()  # which goes on meanwhile
    response.close()
    response.connection.close()
    unread, before = server.open_stream(n=16), server.n_drawn
    small = (socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # else the system holds megabytes
    for connection in server.connections:
        connection.transport.get_extra_info("socket").setsockopt(*small)
    wait_until(lambda: server.let_pass(guard.STALLED_SECONDS + 1) or len(server.writer._jobs) == 0)
    assert server.n_drawn - before < 16 * LONG // 2
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        unread.read()


def test_the_page_and_the_facts_of_the_run_are_there(server, run):
    page = server.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<textarea" in page.text
    facts = server.get("/run.json").json()
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert facts["parameters"] == summary["parameters"]
    assert facts["final_val_loss"] == summary["final_val_loss"]
    assert facts["text"] == ["train.jsonl", "val.jsonl"]
    assert (facts["name"], facts["step"], facts["sampling"]["max_new_tokens"]) == ("tiny", 180, 100)
    assert str(run.parent) not in json.dumps(facts)
    picture = server.get("/training_losses.png")
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == (run / "training_losses.png").read_bytes()


def test_both_languages_have_every_string_that_the_page_shows():
    script = (REPOSITORY / "scripts" / "serving" / "page.js").read_text(encoding="utf-8")
    markup = (REPOSITORY / "scripts" / "serving" / "page.html").read_text(encoding="utf-8")
    english, chinese = re.findall(r"\n  (?:en|zh): \{\n(.*?)\n  \},", script, re.DOTALL)
    names = re.findall(r"^    (\w+):", english, re.MULTILINE)
    assert names == re.findall(r"^    (\w+):", chinese, re.MULTILINE)
    used = set(re.findall(r'data-(?:text|label|alt|placeholder)="(\w+)"', markup))
    used |= set(re.findall(r"strings\.(\w+)", script)) | {"user", "assistant"}
    assert used == set(names)


def test_wrong_options_are_told_before_anything_listens(monkeypatch):
    monkeypatch.setattr(serve, "listen", lambda *_: pytest.fail("it listened"))
    for options, said in (
        (["--host", "0.0.0.0"], "needs --token"),
        (["--host", "192.168.1.5"], "needs --token"),
        (["--token", "short"], "8 or more"),
        (["--token", "with a blank in it"], "8 or more"),
        (["--allow-host", "mybox.lan"], "--allow-host lets others in, so it needs --token"),
        (["--allow-origin", "http://a.example"], "--allow-origin lets others in"),
        (["--token", "open-sesame", "--allow-host", "mybox.lan:80"], "without a port"),
        (["--token", "open-sesame", "--allow-host", "*"], "--allow-host is '*'"),
        (["--token", "open-sesame", "--allow-origin", "*"], "such as http://localhost:3000"),
        (["--token", "open-sesame", "--allow-origin", "http://a/"], "--allow-origin is"),
        (["--port", "65536"], "--port is '65536'; it must be a whole number from 0 to 65535"),
        (["--port", "-1"], "--port is '-1'"),
        (["--queue-limit", "many"], "--queue-limit is 'many'"),
        (["--answer-limit", "0"], "--answer-limit is '0'"),
        (["--tokn", "x"], "--token"),
    ):
        monkeypatch.setattr(sys, "argv", ["serve", *options])
        with pytest.raises(SettingsError, match=re.escape(said)) as caught:
            serve.main()
        assert "with a blank" not in str(caught.value)


def test_a_default_above_the_limit_and_a_missing_library_are_errors(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve", *options_of(run, "--answer-limit=99")])
    with pytest.raises(SettingsError, match="is 100, more than --answer-limit 99 allows"):
        serve.main()
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=re.escape(serve.INSTALL)):
        serve.main()
    for name in ("README.md", "README.zh-CN.md"):
        assert serve.INSTALL in (REPOSITORY / name).read_text(encoding="utf-8")


def test_a_place_that_cant_be_listened_on_is_an_error_and_a_port_in_use_names_a_free_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} is in use") as caught:
            serve.listen("127.0.0.1", port)
    free = int(re.search(r"Try --port (\d+)\.", str(caught.value))[1])
    with serve.listen("127.0.0.1", free):
        assert free != port
    for asked, expected in (("localhost", "localhost"), ("0", "0.0.0.0"), ("", "0.0.0.0")):
        with serve.listen(asked, 0) as listener:
            assert serve.known_as(asked, listener) == expected
    for host in ("256.1.1.1", "203.0.113.7", "2001:db8::1"):
        with pytest.raises(ResourceError, match="can't listen on"):
            serve.listen(host, 0)


TOKEN = "a-planted-token"


@pytest.fixture
def process(run, tmp_path) -> Iterator[Program]:
    """scripts.serve, with a token from its environment."""
    code = by_heart.program("serve", *options_of(run))
    program = Program(tmp_path, 0, code, env={"GPT_SERVE_TOKEN": TOKEN})
    program.until(lambda: re.fullmatch(GREETING, program.out))
    yield program
    with contextlib.suppress(ProcessLookupError):
        program.send(signal.SIGKILL)
    program.process.wait(60)


def client_of(process: Program) -> Client:
    return Client(int(re.match(GREETING, process.out)[1]), TOKEN)


@pytest.mark.slow
@ON_POSIX
def test_ctrl_c_in_mid_stream_ends_it_cleanly_and_no_prompt_or_token_was_ever_printed(process):
    secret, client = "a-planted-prompt", client_of(process)
    with pytest.raises(pytest.importorskip("openai").AuthenticationError):
        Client(client.port, "wrong").openai.models.list()
    assert client.openai.models.list().data[0].id == "tiny"
    for body in (
        {"prompt": secret},
        {"prompt": secret, "stream": True},
        {"prompt": [secret, 1]},
        {"prompt": secret, "num_ctx": secret},
    ):
        assert client.post(f"completions?{secret}", **body).status_code < 500
    client.raw(f"{secret} / HTTP/9\r\n\r\n".encode())
    client.ask("POST /v1/completions", body=secret.encode())
    response = client.open_stream(prompt=secret + ENDLESS)
    process.send(signal.SIGINT)
    process.ends_with(130)
    last = response.read().rstrip().split(b"\n\n")[-1].removeprefix(b"data: ")
    assert json.loads(last)["error"]["message"] == "the server is being stopped"
    assert re.fullmatch(GREETING, process.out)
    noted = "Note: requests have 'num_ctx', which this server does not know: ignored"
    assert [line for line in process.err.splitlines() if line] == [noted, "Stopped."]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_many_connections_long_bodies_and_dropped_streams_leave_its_memory_flat(process):
    client = client_of(process)

    def memory_after(streams: int, connections: int, megabytes: int) -> int:
        """In kB."""
        for _ in range(streams):
            response = client.open_stream()
            response.close()
            response.connection.close()
        assert client.post(prompt="The", max_tokens=1).status_code == 200  # behind them
        with contextlib.ExitStack() as stack:
            for n in range(connections):
                connection = stack.enter_context(client.connect())
                connection.sendall(b"GET / HTTP/1.1\r\nX-Slow: " + b"x" * (n % 100))
            assert client.is_alive()
        part = b"x" * 1_000_000
        for body in (part * megabytes, (part for _ in range(megabytes))):  # the second in chunks
            url = f"{client.url}/v1/completions"
            answer = requests.post(url, data=body, headers=client.headers, timeout=60)
            assert answer.status_code == 413
        assert requests.get(client.url, data=part * megabytes, timeout=60).status_code == 200
        text = Path(f"/proc/{process.pid}/status").read_text("ascii")
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1])

    before = memory_after(1, 1, 2)
    assert max(memory_after(10, 800, 50) for _ in range(2)) - before < 30_000
