"""The server as a process of its own on loopback, and a little run for it to serve."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import requests

from generation import stream_text
from tests.conftest import REPOSITORY, train_in

LONG = 100_000  # tokens of an answer that takes a minute, so that what ends soon was cancelled
SOON_S = 15.0
SETTINGS = """
CUSTOM_MODE = True
DATA = "text.txt"
TOKENIZER = "char"
custom_params = {
    "max_steps": 100,
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


def train_story(folder: Path, *, draws: bool) -> Path:
    """Train a tiny model on two sentences, over and over; returns its run, with its picture."""
    story = "The ferry crossed the river at dawn. Its bell rang twice, and nobody came.\n"
    (folder / "text.txt").write_text(story * 500, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        if not draws:
            patch.setitem(sys.modules, "matplotlib.figure", None)
        run = train_in(folder, SETTINGS)
    if not draws:
        (run / "training_losses.png").write_bytes(b"a picture")
    return run


class Server:
    """python -m scripts.serve as a process of its own, on a port that was free."""

    def __init__(self, run: Path, *options: str, before: str = "", **environment: str) -> None:
        command = [sys.executable, "-m", "scripts.serve"]
        if before:  # what is to be otherwise in the process
            code = f"{before}\nfrom scripts import options, serve\noptions.run_program(serve.main)"
            command = [sys.executable, "-c", code]
        command += ["--run", str(run), "--port", "0", "--weights", "fp32", "--device", "cpu"]
        self.process = subprocess.Popen(
            [*command, "--answer-limit", str(LONG), *options],
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
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out + err

    def client(self, token: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=60)

    def post(self, what: str = "completions", **body) -> requests.Response:
        return requests.post(f"{self.url}/v1/{what}", json={"model": "tiny"} | body, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def raw(self, request: bytes) -> bytes:
        """What comes back on a connection of its own, up to its end or a second of silence."""
        with self.connect() as connection:
            connection.sendall(request)
            connection.settimeout(1)
            received = b""
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while part := connection.recv(65536):
                    received += part
            return received

    def ask(self, what: str, *, host: str | None = None, body: bytes = b"") -> bytes:
        """The whole answer to a request with no headers but these."""
        lines = [f"{what} HTTP/1.1", "Connection: close", f"Content-Length: {len(body)}"]
        lines.append(f"Host: {host or f'localhost:{self.port}'}")
        return self.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def is_alive(self) -> bool:
        return self.get("/v1/models").status_code == 200

    def status(self, field: str) -> int:
        """A number of the process in /proc: VmRSS in kB, Threads."""
        text = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(re.search(rf"{field}:\s+(\d+)", text)[1])

    def open_stream(self, headers: dict | None = None, **body) -> http.client.HTTPResponse:
        """A stream of an answer that takes a minute, after its first event."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"model": "tiny", "prompt": "The", "max_tokens": LONG, "stream": True} | body
        connection.request("POST", "/v1/completions", json.dumps(body), headers or {})
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: {")
        response.connection = connection
        return response

    def is_idle_soon(self) -> bool:
        """Whether a short answer comes soon, behind all that is still being written."""
        started_at = time.monotonic()
        assert self.post(prompt="The", max_tokens=1).status_code == 200
        return time.monotonic() - started_at < SOON_S


def continued(model, prompt: str, **options) -> str:
    """What the model writes, without a server."""
    greedy = {"temperature": 0.0, "max_new_tokens": 20} | options
    return "".join(p.text for p in stream_text(model.model, model.tokenizer, [prompt], **greedy))
