"""The server in a thread of the tests, as a client sees it and from within."""

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import json
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests

from generation import stream_text
from scripts import options as scripts_options
from scripts import serve
from scripts.serving import app
from scripts.serving.app import Application
from scripts.serving.protocol import Served
from scripts.serving.writer import Writer
from tests.by_heart import ENDLESS

LONG = 100_000  # tokens of an answer that takes a minute, so that what ends soon was cancelled
GREETING = r"http://127\.0\.0\.1:(\d+)/ serves tiny, step 180, fp32 weights \(Ctrl-C ends it\)\n"


def options_of(run: Path, *options: str) -> list[str]:
    always = ["--port=0", "--weights=fp32", "--device=cpu", f"--answer-limit={LONG}"]
    return ["--run", str(run), *always, *options]


class Client:
    """What asks a server on this machine."""

    def __init__(self, port: int, token: str = "none") -> None:
        self.port, self.url, self.token = port, f"http://127.0.0.1:{port}", token
        self.headers = {"Authorization": f"Bearer {token}"}

    @functools.cached_property
    def openai(self):
        import openai  # takes seconds

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.token, max_retries=0)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, headers=self.headers, timeout=60)

    def post(self, what: str = "completions", **body) -> requests.Response:
        url, body = f"{self.url}/v1/{what}", {"model": "tiny"} | body
        return requests.post(url, json=body, headers=self.headers, timeout=60)

    def is_alive(self) -> bool:
        return self.get("/v1/models").status_code == 200

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def raw(self, request: bytes, *, ends: bool = True) -> bytes:
        """What comes back on a connection of its own, which ends behind the request, or not."""
        received = b""
        with self.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(request)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                received += part
        return received

    def ask(self, what: str, *, host: str | None = None, body: bytes = b"") -> bytes:
        """The whole answer to a request with no headers but these."""
        lines = [f"{what} HTTP/1.1", "Connection: close", f"Content-Length: {len(body)}"]
        lines.append(f"Host: {host or f'localhost:{self.port}'}")
        return self.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body, ends=False)

    def open_stream(self, **body) -> http.client.HTTPResponse:
        """A stream of an answer that takes a minute, after its first event."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"model": "tiny", "prompt": ENDLESS, "max_tokens": LONG, "stream": True} | body
        connection.request("POST", "/v1/completions", json.dumps(body), self.headers)
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: {")
        response.connection = connection
        return response


class Server(Client):
    """scripts.serve in a thread, on a port that was free; with a template, of a chat model."""

    def __init__(
        self, run: Path, *options: str, token: str = "none", chat_template: str | None = None
    ) -> None:
        self.n_drawn = 0  # tokens, of all answers
        self._seconds_passed = 0.0
        started, real, found = threading.Event(), app.Server, []

        def note(application, writer, greeting):
            loop, parts, self.writer = asyncio.get_running_loop(), writer._parts, writer
            loop.time = lambda: time.monotonic() + self._seconds_passed

            def counted(job):
                for part in parts(job):
                    self.n_drawn += 1
                    yield part

            writer._parts = counted
            self._uvicorn = real(application, writer, greeting)
            self.connections = self._uvicorn.server_state.connections
            found.append(int(re.fullmatch(GREETING, f"{greeting}\n")[1]))
            started.set()
            return self._uvicorn

        def load_it(arguments):
            return dataclasses.replace(load(arguments), chat_template=chat_template)

        load = serve.load
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serve, "load", load_it)
            patch.setattr(sys, "argv", ["serve", *options_of(run, *options)])
            patch.setattr(scripts_options, "default_threads", lambda: 1)
            patch.setattr(app, "Server", note)
            self._thread = threading.Thread(target=serve.main, daemon=True)
            self._thread.start()
            assert started.wait(60)
        super().__init__(found[0], token)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def let_pass(self, seconds: float) -> None:
        """Turn the server's clock forward, between what it has done before and is asked next."""
        assert self.is_alive()
        self._seconds_passed += seconds
        assert self.is_alive()

    def has_cancelled(self) -> bool:
        """Whether a short answer comes before the long ones that were begun are whole."""
        before = self.n_drawn
        assert self.post(prompt="The", max_tokens=1).status_code == 200
        return self.n_drawn - before < LONG // 2


def continued(model, prompt: str, **options) -> str:
    """What the model writes, without a server."""
    greedy = {"temperature": 0.0, "max_new_tokens": 20} | options
    return "".join(p.text for p in stream_text(model.model, model.tokenizer, [prompt], **greedy))


def sent(run, served: Served, *asked: tuple[str, Any], token: str) -> list[httpx.Response]:
    """The answers of the server's application, without a socket, to bodies one after another."""

    async def answers() -> list[httpx.Response]:
        queue = Writer(run, queue_limit=1)
        guard = Application(run, served, queue).guarded(host="127.0.0.1", port=8000, token=token)
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(
            transport=transport,
            base_url="http://host.docker.internal:8000",
            headers={"Authorization": f"Bearer {token}"},
        ) as client:
            found = [
                await client.get(f"/v1/{what}")
                if body is None
                else await client.post(f"/v1/{what}", json=body)
                for what, body in asked
            ]
        await asyncio.to_thread(queue.close)
        return found

    return asyncio.run(answers())


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a streamed answer that ended as it should."""
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), answer.text
    return [json.loads(event.removeprefix("data: ")) for event in events]
