"""The server, as a process on loopback: OpenAI's own client, raw sockets, and bad company."""

import asyncio
import contextlib
import gc
import http.client
import itertools
import json
import os
import re
import shutil
import socket
import struct
import sys
import threading
import time
import weakref
from pathlib import Path

import httpx
import openai
import pytest
import requests
import torch

import environment
import generation
from engine.errors import NumericsError, ResourceError, SettingsError
from generation import SamplingConfig, stream_text
from scripts import serve
from scripts.serving import guard
from scripts.serving.app import Application
from scripts.serving.guard import HEADERS, Guard, Refused
from scripts.serving.protocol import Served, read_order
from scripts.serving.writer import Writer
from tests.conftest import REPOSITORY
from tests.serving import LONG, Server, continued, train_story

ON_POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


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
    return train_story(tmp_path_factory.mktemp("serve"), draws=False)


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


def error_of(response: bytes) -> tuple[int, dict]:
    """The status of a raw answer and the error in its body."""
    head, _, body = response.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


# --------------------------------------------------------------------- OpenAI's own client


def test_the_client_lists_the_run_as_a_model_and_finds_it_by_name(server):
    client = server.client()
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist; this server has"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_what_the_model_writes_for_each_prompt_in_order(server, model):
    ids = model.tokenizer.encode("The ferry")
    for prompt, texts in (
        ("The ferry", ["The ferry"]),
        (["The ferry", "Its bell rang"], ["The ferry", "Its bell rang"]),
        (ids, ["The ferry"]),
        ([ids, ids[:3]], ["The ferry", "The"]),
        ("", [""]),
    ):
        for n in (1, 2):
            answer = server.client().completions.create(
                model="tiny", prompt=prompt, temperature=0, n=n, max_tokens=12
            )
            written = [
                continued(model, text, max_new_tokens=12) for text in texts for _ in range(n)
            ]
            assert [choice.text for choice in answer.choices] == written
            assert [choice.index for choice in answer.choices] == list(range(len(written)))
            assert {choice.finish_reason for choice in answer.choices} == {"length"}
            usage, read = answer.usage, sum(len(text) or 1 for text in texts)
            assert (usage.prompt_tokens, usage.completion_tokens) == (read, 12 * len(written))
            assert usage.total_tokens == read + 12 * len(written)


def test_a_conversation_is_its_contents_joined_with_blank_lines(server, model):
    parts = [{"type": "text", "text": "Its bell"}, {"type": "text", "text": "rang"}]
    answer = server.client().chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "The ferry"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": ""},
        ],
        temperature=0,
        max_completion_tokens=20,
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == continued(model, "The ferry\n\nIts bell\n\nrang")


def test_a_stream_comes_in_pieces_that_make_the_whole_and_says_who_speaks(server, model):
    client, options = server.client(), {"model": "tiny", "temperature": 0, "max_tokens": 20}
    chunks = list(client.completions.create(prompt="The ferry", stream=True, **options))
    whole = continued(model, "The ferry")
    assert "".join(c.choices[0].text for c in chunks) == whole
    assert [c.choices[0].finish_reason for c in chunks] == [None] * 19 + ["length"]
    assert all(c.usage is None for c in chunks)
    assert len({c.id for c in chunks}) == 1

    first, *chunks, last = client.chat.completions.create(
        messages=[{"role": "user", "content": "The ferry"}],
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
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


def test_the_same_seed_writes_the_same_text_streamed_or_not_and_none_another(server, model):
    client, options = server.client(), {"model": "tiny", "prompt": "The", "temperature": 1.5}
    options |= {"max_tokens": 40, "extra_body": {"top_k": None}, "top_p": None}

    def written(**more) -> str:
        return client.completions.create(**options, **more).choices[0].text

    five = written(seed=5)
    assert five != written(seed=6)
    chunks = client.completions.create(**options, seed=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == five
    assert len({written() for _ in range(3)}) == 3
    generator = torch.Generator().manual_seed(5)
    free = {"temperature": 1.5, "top_k": None, "top_p": None, "max_new_tokens": 40}
    assert five == continued(model, "The", generator=generator, **free)


def test_a_stop_string_ends_the_text_before_it(server, model):
    whole = continued(model, "The ferry", max_new_tokens=80)
    string = whole[30:34]
    for stop in (string, ["\x00", string]):
        answer = server.client().completions.create(
            model="tiny", prompt="The ferry", temperature=0, max_tokens=80, stop=stop
        )
        assert answer.choices[0].text == whole[: whole.index(string)]
        assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_drawn_tokens(server, model):
    greedy = {"temperature": 0.0, "max_new_tokens": 5}
    pieces = list(stream_text(model.model, model.tokenizer, ["The ferry"], **greedy))
    expected = pytest.approx([piece.token.logprob for piece in pieces], abs=1e-6)
    client, options = server.client(), {"model": "tiny", "temperature": 0, "max_tokens": 5}
    given = client.completions.create(prompt="The ferry", logprobs=0, **options).choices[0]
    assert given.logprobs.token_logprobs == expected
    assert "".join(given.logprobs.tokens) == given.text
    assert given.logprobs.text_offset == [0, 1, 2, 3, 4]
    messages = [{"role": "user", "content": "The ferry"}]
    given = client.chat.completions.create(messages=messages, logprobs=True, **options).choices[0]
    assert [entry.logprob for entry in given.logprobs.content] == expected
    as_bytes = bytes(b for entry in given.logprobs.content for b in entry.bytes)
    assert as_bytes.decode() == "".join(piece.text for piece in pieces)


# -------------------------------------------------------------------------- wrong requests


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


NO = "does not support"
WRONG = {  # parameter: what is said of which values
    "max_tokens": {"from 0; this server writes 100000": [-1, "5", True], "is '5'": ["5"]},
    "temperature": {"at least 0": [-1], "a number": ["hot"], "at most": [1e300]},
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
        r"'\ud800'": ["\ud800"],
    },
    "stop": {"at most 1000 characters": ["a" * 1001, [1]], "at most 16": [["a"] * 17]},
    "seed": {"64 bits": [2**63, 1.5]},
    "stream": {"true or false": ["yes"]},
    "stream_options": {"true or false": [{"include_usage": 1}]},
    "logprobs": {"a whole number to 20": [21, -1, True]},
    "frequency_penalty": {"from -2 to 2": [2.5, "1", True]},
    "presence_penalty": {"from -2 to 2": [-3]},
    "echo": {"true or false": [1]},
    "logit_bias": {NO: [{"1": 5}]},
    "best_of": {NO: [2]},
    "model": {"must be text, as 'tiny'": [5, ["tiny"]]},
    "messages": {
        "missing": [None],
        "one or more messages": [[], "The ferry"],
        '"role" is one of': [[{"role": "tool", "content": "x"}], ["The ferry"]],
        "messages[0].content is None": [user(None)],
        '"type": "text"': [user([{"type": "image_url"}]), user([{"type": "text", "text": 5}])],
    },
}


@pytest.mark.parametrize("param", WRONG, ids=ascii)
def test_a_wrong_value_is_named_with_what_is_allowed(served, param):
    is_chat = param == "messages"
    right = {"model": "tiny"} if is_chat else {"model": "tiny", "prompt": "The"}
    for said, values in WRONG[param].items():
        for value in values:
            with pytest.raises(Refused, match=re.escape(said)) as caught:
                read_order(json.dumps(right | {param: value}).encode(), served, is_chat=is_chat)
            assert (caught.value.status, caught.value.param) == (400, param)


def test_mistakes_that_only_two_values_make_together_are_told_too(served):
    for body, said in (
        ({"max_tokens": 5, "max_completion_tokens": 6}, "differ"),
        ({"prompt": ["a"] * 513, "n": 2}, "513 prompts with n = 2 are too many"),
    ):
        with pytest.raises(Refused, match=said):
            text = json.dumps({"model": "tiny", "prompt": "The"} | body)
            read_order(text.encode(), served, is_chat=False)


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
    messages = [{"role": "user", "content": "The"}]
    response = server.post("chat/completions", messages=messages, top_logprobs=0, **chat)
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
        with pytest.raises(Refused, match=re.escape(said)) as caught:
            read_order(body, served, is_chat=False)
        assert caught.value.status == 400


def test_a_request_that_is_wrong_in_thousands_of_places_gets_a_short_answer_soon(served):
    for body in (
        {"messages": [1] * 300_000},
        {"messages": [{"role": "user"}] * 50_000},
        {"messages": [1]} | {f"key{i}": 1 for i in range(60_000)},
    ):
        text = json.dumps({"model": "tiny"} | body).encode()
        started_at = time.process_time()
        json.loads(text)
        reading_s = time.process_time() - started_at
        with pytest.raises(Refused) as caught:
            read_order(text, served, is_chat=True)
        # a name held against all known ones takes a millisecond: of all of them, minutes
        assert time.process_time() - started_at - reading_s < 300 * reading_s
        assert len(str(caught.value)) < 5000


def test_what_the_server_refuses_has_one_shape_and_leaves_it_alive(server):
    mistakes = {"model": "tiny", "prompt": 1, "temperature": -1, "seed": "x", "best_of": 7}
    for what, body, status in (
        ("POST /v1/completions", json.dumps(mistakes).encode(), 400),
        ("POST /v1/completions", b"[" * 900_000, 400),
        ("GET /v1/completions", b"", 405),
        ("POST /v1/models", b"", 405),
        ("GET /etc/passwd", b"", 404),
        ("GET /../scripts/serve.py", b"", 404),
        ("GET /..%2f..%2fetc/passwd", b"", 404),
        ("GET /page.js/", b"", 404),
    ):
        found, error = error_of(server.ask(what, body=body))
        assert (found, error["type"]) == (status, "invalid_request_error"), what
        if b"best_of" in body:  # all at once
            assert all(name in error["message"] for name in mistakes if name != "model")
            assert error["param"] == "prompt"
    status, error = error_of(server.ask("POST /v1/completions", host="evil.example"))
    assert status == 403
    assert "evil.example" in error["message"]
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


# -------------------------------------------------------------------------- who may ask

FOREIGN = ("evil.example", "evil.example:8000", "localhost:8001", "localhost.evil.example:8000", "")
LOCAL = ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LocalHost:8000")
ADDRESSES = ("192.168.1.5:8000", "[fe80::1]:8000")


@pytest.mark.parametrize(
    ("at", "right", "wrong"),
    [
        (("127.0.0.1", 8000), LOCAL, (*FOREIGN, *ADDRESSES, "localhost")),
        (("FE80::1", 8000), (*LOCAL, "[fe80::1]:8000"), (*FOREIGN, "192.168.1.5:8000")),
        (
            ("0.0.0.0", 8000),  # by any of its addresses, but by no foreign name
            (*LOCAL, *ADDRESSES),
            (*FOREIGN, "192.168.1.5:8001", "192.168.1.5.evil.example:8000", "192.168.1.5"),
        ),
        (
            ("0.0.0.0", 80),
            ("localhost", "localhost:80", "192.168.1.5", "192.168.1.5:80", "[fd00::5]"),
            ("example.org", "192.168.1.5:8000"),
        ),
        (("127.0.0.1", 80), ("localhost", "localhost:80", "[::1]"), ("192.168.1.5",)),
    ],
)
def test_only_requests_for_this_host_and_from_its_own_pages_are_answered(at, right, wrong):
    gate = Guard(None, host=at[0], port=at[1], token=None)

    def check(host: str, origin: str | None = None) -> None:
        origins = {} if origin is None else {b"origin": origin}
        gate.check_place({b"host": host} | origins)

    for host in right:
        check(host)
        check(host, f"http://{host}")
        for origin in ("http://evil.example", "null", "", f"https://{host}", f"http://{host}1"):
            with pytest.raises(Refused, match="Origin"):
                check(host, origin)
    for host in wrong:
        with pytest.raises(Refused, match="Host"):
            check(host)


def test_a_host_is_known_by_the_name_that_was_asked_for():
    for asked, expected in (("localhost", "localhost"), ("0", "0.0.0.0"), ("", "0.0.0.0")):
        with serve.listen(asked, 0) as listener:
            assert serve.known_as(asked, listener) == expected


def test_every_answer_has_the_headers_that_keep_pages_apart(server):
    for method, path in (
        *(("GET", path) for path in ("/", "/page.js", "/run.json", "/nothing")),
        ("HEAD", "/"),
        ("OPTIONS", "/"),
    ):
        headers = requests.request(method, server.url + path, timeout=30).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS, path
        assert "'unsafe-inline'" not in headers["content-security-policy"]
        assert not [name for name in headers if name.lower().startswith("access-control")]
        assert "server" not in headers


def in_process(model, served: Served, *asked: tuple, token: str | None = None) -> list:
    """The answers of the server's application to (method, path, options of httpx), in turn."""

    async def answers() -> list[httpx.Response]:
        writer = Writer(model, queue_limit=1)
        app = Application(model, served, writer).guarded(host="", port=8000, token=token)
        transport, found = httpx.ASGITransport(app), []
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost:8000"
        ) as client:
            for method, path, options in asked:
                found.append(await client.request(method, path, **options))
        await asyncio.to_thread(writer.close)
        return found

    return asyncio.run(answers())


def test_with_a_token_nothing_but_the_page_is_shown_without_it(model, served):
    token, body = "open-sesame", {"model": "tiny", "prompt": "The"}
    wrong = ({}, *({"Authorization": given} for given in ("", "Bearer", f"Basic {token}")))
    wrong = (*wrong, *({"Authorization": f"Bearer {given}"} for given in ("wrong", f"{token}x")))
    public = [("GET", path, {}) for path in ("/", "/page.css", "/page.js", "/icon.svg")]
    paths = ("/v1/models", "/run.json", "/training_losses.png", "/nothing", "/docs")
    secret = [("GET", path, {"headers": headers}) for path in paths for headers in wrong]
    secret.append(("POST", "/v1/completions", {"json": body}))
    right = {"json": body, "headers": {"Authorization": f"Bearer {token}"}}
    last = ("POST", "/v1/completions", right)
    found = in_process(model, served, *public, *secret, last, token=token)
    assert [response.status_code for response in found[:4]] == [200] * 4
    for response in found[4:-1]:
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert found[-1].json()["choices"][0]["text"]


@pytest.mark.parametrize(
    ("failure", "told", "printed"),
    [
        (NumericsError("the logits are not finite"), "the logits are not finite", ""),
        (ZeroDivisionError("a-planted-prompt"), "(ZeroDivisionError)", "ZeroDivisionError in "),
    ],
)
def test_a_failure_of_the_model_is_an_error_of_the_request_alone(
    model, served, monkeypatch, capsys, failure, told, printed
):
    real, count = generation.choose_next, itertools.count()

    def choose_next(*arguments, **options):
        if next(count) < 2:
            raise failure
        return real(*arguments, **options)

    monkeypatch.setattr(generation, "choose_next", choose_next)
    bodies = [{"model": "tiny", "prompt": "The", "stream": it} for it in (False, True, False)]
    asked = (("POST", "/v1/completions", {"json": body}) for body in bodies)
    *failed, last = in_process(model, served, *asked)
    assert [response.status_code for response in (*failed, last)] == [500, 200, 200]
    for response in failed:
        error = json.loads(response.text.removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert told in error["message"]
        assert "planted" not in response.text
    assert last.json()["choices"][0]["text"]
    output = "".join(capsys.readouterr())
    assert printed in output
    assert bool(printed) == bool(output)
    assert "planted" not in output


# ------------------------------------------------------------------- how much, how many


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
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = {"model": "tiny", "prompt": "The", "max_tokens": LONG}
        connection.request("POST", "/v1/completions", json.dumps(body))
        time.sleep(0.3)  # it is being written now
    else:
        response = server.open_stream()
        connection = response.connection
        if way == "rudely":  # as where a program is killed
            linger_no_longer = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_no_longer)
            connection.sock.close()
        response.close()
    connection.close()
    assert server.is_idle_soon()


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
    first = server.open_stream()
    waiting = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(2)]
    body = json.dumps({"model": "tiny", "prompt": "The", "max_tokens": 2})
    for connection in waiting:
        connection.request("POST", "/v1/completions", body)
    time.sleep(0.3)
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
    later: list[int] = []
    asking = threading.Thread(target=lambda: later.append(server.post(prompt="The").status_code))
    time.sleep(0.3)
    asking.start()
    time.sleep(0.3)
    assert later == []
    first.close()
    first.connection.close()
    assert waiting[0].getresponse().status == 200
    asking.join(timeout=60)
    assert later == [200]


def test_of_too_many_connections_the_one_that_has_sent_nothing_longest_makes_room(server):
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.connect()) for _ in range(guard.MOST_CONNECTIONS)]
        assert server.is_alive()
        idle[0].settimeout(30)
        assert is_cut_off(idle[0])
        idle[-1].settimeout(0.2)
        assert not is_cut_off(idle[-1])


# ----------------------------------------------------------------------- the page's facts


def test_the_page_and_the_facts_of_the_run_are_there(server, run, model):
    page = server.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<textarea" in page.text
    facts = server.get("/run.json").json()
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert facts["parameters"] == summary["parameters"]
    assert facts["final_val_loss"] == summary["final_val_loss"]
    assert (facts["name"], facts["text"], facts["step"]) == ("tiny", ["text.txt"], model.step)
    assert facts["sampling"]["temperature"] == 0.7
    assert str(run.parent) not in json.dumps(facts)
    picture = server.get("/training_losses.png")
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == (run / "training_losses.png").read_bytes()


def test_the_page_names_no_other_host_and_never_makes_markup_of_text():
    for name in ("page.html", "page.css", "page.js", "icon.svg"):
        text = (REPOSITORY / "scripts" / "serving" / name).read_text(encoding="utf-8")
        text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), name
        banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=|style="
        assert not re.search(banned, text), name


# ---------------------------------------------------------------------- beginning and end


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


def test_a_missing_library_is_named_with_the_command_that_installs_what_is_tested(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["serve"])
        patch.setattr(serve, "find_spec", lambda name: None)
        with pytest.raises(SettingsError, match=re.escape(serve.INSTALL)):
            serve.main()
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


def test_a_place_that_cant_be_listened_on_is_an_error_and_a_port_in_use_names_a_free_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} is in use") as caught:
            serve.listen("127.0.0.1", port)
    free = int(re.search(r"Try --port (\d+)\.", str(caught.value))[1])
    with serve.listen("127.0.0.1", free):
        assert free != port
    for host in ("256.1.1.1", "203.0.113.7", "2001:db8::1"):
        with pytest.raises(ResourceError, match="can't listen on"):
            serve.listen(host, 0)


@pytest.mark.slow
@ON_POSIX
def test_ctrl_c_in_mid_stream_ends_it_cleanly_and_no_prompt_or_token_was_ever_printed(run):
    secret, token = "a-planted-prompt", "a-planted-token"
    with Server(run, GPT_SERVE_TOKEN=token) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert server.client(token).models.list().data[0].id == "tiny"
        headers = {"Authorization": f"Bearer {token}"}
        url = f"{server.url}/v1/completions?{secret}"
        for body in (
            {"prompt": secret},
            {"prompt": secret, "stream": True},
            {"prompt": [secret, 1]},
            {"prompt": secret, "num_ctx": secret},
        ):
            body = {"model": "tiny"} | body
            assert requests.post(url, json=body, headers=headers, timeout=60).status_code < 500
        server.raw(f"{secret} / HTTP/9\r\n\r\n".encode())
        server.ask("POST /v1/completions", body=secret.encode())
        response = server.open_stream(headers, prompt=secret)
        code, printed = server.stop()
        last = response.read().rstrip().split(b"\n\n")[-1].removeprefix(b"data: ")
        assert json.loads(last)["error"]["message"] == "the server is being stopped"
    assert code == 130
    assert server.greeting.endswith("fp32 weights (Ctrl-C ends it)\n")
    noted = "Note: requests have 'num_ctx', which this server does not know: ignored"
    assert [line for line in printed.splitlines() if line] == [noted, "Stopped."]


# ----------------------------------------------------------------------------- bad company


@pytest.fixture(scope="module")
def impatient(run, tmp_path_factory):
    """A server that waits a second for slow senders and readers; its run has no figures."""
    copy = tmp_path_factory.mktemp("impatient") / "tiny"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("training_losses.png", "summary.json"))
    before = "from scripts.serving import guard\nguard.REQUEST_SECONDS = guard.STALLED_SECONDS = 1"
    with Server(copy, "--temperature", "2", "--seed", "3", before=before) as server:
        yield server


@pytest.mark.slow
def test_what_requests_leave_out_is_as_the_options_have_it_even_of_a_run_without_figures(impatient):
    assert impatient.get("/training_losses.png").status_code == 404
    facts = impatient.get("/run.json").json()
    assert (facts["final_val_loss"], facts["sampling"]["temperature"]) == (None, 2)
    answers = [impatient.post(prompt="The").json() for _ in range(2)]
    assert answers[0]["usage"]["completion_tokens"] == 20
    assert answers[0]["choices"] == answers[1]["choices"]
    other = impatient.post(prompt="The", seed=4).json()["choices"]
    assert other != answers[0]["choices"]
    assert other == impatient.post(prompt="The", seed=4, temperature=2).json()["choices"]


@pytest.mark.slow
def test_long_answers_and_kept_connections_are_not_taken_for_slow_senders_or_readers(impatient):
    connection = http.client.HTTPConnection("127.0.0.1", impatient.port, timeout=60)
    for _ in range(5):
        connection.request("GET", "/v1/models")
        assert connection.getresponse().read()
        kept = connection.sock
        time.sleep(0.4)
    assert connection.sock is kept
    response = impatient.open_stream()
    started_at = time.monotonic()
    while time.monotonic() - started_at < 3:
        assert response.readline()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{impatient.port}\r\n".encode()
    whole = head + b"Content-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(impatient.connect()) for _ in range(100)]
        ended: set[int] = set()
        for tick in range(60):
            for i in set(range(len(slow))) - ended:
                try:  # half of them send their head byte by byte, half their body
                    slow[i].sendall(head[tick : tick + 1] if i % 2 else (b" ", whole)[tick == 0])
                    slow[i].settimeout(0.001)
                    if is_cut_off(slow[i]):
                        ended.add(i)
                except OSError:
                    ended.add(i)
            assert impatient.is_alive()
            if len(ended) == len(slow):
                break
            time.sleep(0.2)
        assert len(ended) == len(slow)
    assert response.readline()  # which goes on meanwhile
    response.close()
    response.connection.close()
    unread = impatient.open_stream(n=16)
    assert impatient.is_idle_soon()
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        unread.read()


@pytest.mark.slow
@ON_LINUX
def test_many_connections_long_bodies_and_dropped_streams_leave_it_alive_and_its_memory_flat(
    server,
):
    import resource

    server.open_stream().connection.close()
    assert server.is_idle_soon()
    before_kb, threads = server.status("VmRSS"), server.status("Threads")
    for _ in range(40):
        response = server.open_stream()
        response.close()
        response.connection.close()
    assert server.is_idle_soon()
    assert server.status("Threads") == threads
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                for n in range(1000):
                    connection = stack.enter_context(server.connect())
                    connection.sendall(b"GET / HTTP/1.1\r\nX-Slow: " + b"x" * (n % 100))
                assert server.is_alive()
                assert server.is_idle_soon()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    part = b"x" * 1_000_000
    for path in ("/v1/completions", "/v1/chat/completions"):
        for given in (part * 100, (part for _ in range(100))):  # the second comes in chunks
            assert requests.post(server.url + path, data=given, timeout=60).status_code == 413
    assert requests.get(server.url, data=part * 50, timeout=60).status_code == 200
    assert server.status("VmRSS") - before_kb < 30_000
    assert server.is_alive()
