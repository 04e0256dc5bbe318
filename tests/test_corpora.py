"""Texts by name and by address: fetched whole and right, or not at all."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import itertools
import json
import lzma
import os
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import DataError, ResourceError
from storage.files import is_portable_name
from tests.conftest import REPOSITORY
from text import corpora
from text.corpora import CORPORA, Corpus, corpus_path, download, fetch_address

SAMPLE = REPOSITORY / "corpus" / "sample-en.txt"
GOOD = "Once upon a time, 从前。\r\n".encode() * 5000
SHA256 = hashlib.sha256(GOOD).hexdigest()
WITH_STAND_IN, WITHOUT = "the-verdict", "no-stand-in"


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of its answers, the last one again and again."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.closing = [], 0, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/text.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answer = self.server.answers[min(self.server.requests, len(self.server.answers) - 1)]
        self.server.requests += 1
        answer(self)

    def log_message(self, *arguments):
        pass

    def send(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)


def answer(status: int, body: bytes, length: int | None = None):
    """An answer whose Content-Length may be a lie."""
    length = len(body) if length is None else length
    return lambda handler: handler.send(status, body, Content_Length=length)


def redirect(target: str):
    """Send to another address, or to another path of the same server."""
    return lambda handler: handler.send(302, Location=target, Content_Length=0)


def without_end(pause_s: float, piece: bytes):
    """A text that goes on for as long as somebody reads it."""

    def send(handler):
        handler.send(200)
        with contextlib.suppress(ConnectionError):
            while not handler.server.closing.wait(pause_s):
                handler.wfile.write(piece)

    return send


OK = answer(200, GOOD)
CLOSED = "http://127.0.0.1:1/text.txt"  # where nobody listens


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.closing.set()
        running.shutdown()


@pytest.fixture(autouse=True)
def nothing_between(monkeypatch):
    """No proxy, and no waiting for the disk: no test cuts the power."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that a download would have slept."""
    waited = []
    clock = SimpleNamespace(sleep=waited.append, monotonic=time.monotonic)
    monkeypatch.setattr(corpora, "time", clock)
    return waited


@pytest.fixture
def serve(server, monkeypatch):
    """Let two named texts, with a stand-in and without, lie at a server with these answers."""
    known = dataclasses.replace(CORPORA[WITH_STAND_IN], url=server.url, sha256=SHA256)
    monkeypatch.setitem(CORPORA, WITH_STAND_IN, known)
    monkeypatch.setitem(CORPORA, WITHOUT, Corpus("another.txt", server.url, SHA256))

    def install(*answers) -> Server:
        server.answers, server.requests = answers, 0
        return server

    return install


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def failure(url: str, folder: Path) -> str:
    """Why a download fails, which leaves no file."""
    with pytest.raises(DataError) as caught:
        download(url, folder / "text.txt", SHA256)
    assert files_in(folder) == []
    return str(caught.value)


def test_download_is_kept_and_asked_for_once(tmp_path, serve):
    server = serve(OK)
    for n_fetched, name in enumerate((WITH_STAND_IN, WITHOUT), start=1):
        file = tmp_path / "corpora" / CORPORA[name].file_name
        for stand_in in (None, False, None):
            assert corpus_path(name, tmp_path, stand_in) == (file, None)
            assert file.read_bytes() == GOOD
        assert server.requests == len(files_in(tmp_path)) == n_fetched
    # a stand-in that is asked for is given without a request, to a text that has one
    notice = "corpus/sample-en.txt stands in for the-verdict, as when this run began"
    path, said = corpus_path(WITH_STAND_IN, tmp_path, True)
    assert (path, said.en) == (SAMPLE, notice)
    assert corpus_path(WITHOUT, tmp_path, True) == (file, None)
    assert server.requests == 2


def test_stand_in_takes_the_place_of_a_text_that_can_not_be_had_where_it_may(tmp_path, serve):
    server = serve(answer(404, b"no such page"))
    path, notice = corpus_path(WITH_STAND_IN, tmp_path)
    assert path == SAMPLE
    reason = "can't be had (127.0.0.1 answered 404)"
    assert notice.en == f"{WITH_STAND_IN} {reason}: corpus/sample-en.txt stands in for it"
    for name, stand_in in ((WITHOUT, None), (WITH_STAND_IN, False)):
        with pytest.raises(DataError) as caught:
            corpus_path(name, tmp_path, stand_in)
        assert caught.value.exit_code == 3
        path = tmp_path / "corpora" / CORPORA[name].file_name
        assert str(caught.value).splitlines() == [
            f"{name} can't be had: 127.0.0.1 answered 404.",
            f"Without a network, download {server.url}",
            f"elsewhere and save it as {path}.",
        ]
    assert files_in(tmp_path) == []


def test_damaged_file_in_the_cache_is_fetched_anew(tmp_path, serve):
    server = serve(OK)
    path = tmp_path / "corpora" / "another.txt"
    path.parent.mkdir()
    path.write_bytes(GOOD)  # saved by hand, where the message says
    assert corpus_path(WITHOUT, tmp_path) == (path, None)
    assert server.requests == 0
    for damaged in (b"", GOOD[:-1], b"<html>", GOOD + b"x"):
        path.write_bytes(damaged)
        assert corpus_path(WITHOUT, tmp_path) == (path, None)
        assert path.read_bytes() == GOOD
    assert server.requests == 4
    path.unlink()
    path.mkdir()
    with pytest.raises(ResourceError, match=r"can't write .*another\.txt"):
        corpus_path(WITHOUT, tmp_path)


PAGE = answer(200, b"\n<!DOCTYPE html><title>Log in</title>")
FAILURES = [  # what is told, after how many requests, of which answer
    ("sent another file: sha256 ", 1, answer(200, GOOD[:-1])),
    (f" in place of {SHA256}", 1, answer(200, b"")),
    ("sent a web page, not the text", 1, PAGE),
    ("answered 404", 1, answer(404, b"no such page")),
    ("answered 403", 1, answer(403, GOOD)),
    ("answered 503", corpora.TRIES, answer(503, b"busy")),
    ("127.0.0.1", 1, answer(200, GOOD, length=len(GOOD) + 1)),  # which breaks off
    ("redirects in a circle", corpora.MAX_REDIRECTS, redirect("/text.txt")),
]


def test_answer_that_is_not_the_text_is_not_used(tmp_path, server, waits):
    for told, requests, wrong in FAILURES:
        server.answers, server.requests = [wrong], 0
        reason = failure(server.url, tmp_path)
        assert reason.startswith("127.0.0.1 ") and told in reason
        assert "sha256" not in reason or re.search("sha256 [0-9a-f]{64} ", reason)
        assert server.requests == requests
        assert len(waits) == (requests - 1 if "503" in told else 0)  # else it would not help
        assert sum(waits) < 6
        waits.clear()


def test_server_that_does_not_answer_never_ends_or_trickles_is_given_up_on(
    tmp_path, server, monkeypatch
):
    def failure_with(name: str, value: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(corpora, name, value)
            return failure(server.url, tmp_path)

    server.answers = [lambda handler: handler.server.closing.wait()]
    assert failure_with("ANSWER_DEADLINE_S", 0.1) == "127.0.0.1 does not answer"
    server.answers = [without_end(0.001, b"x" * 65536)]
    late = SimpleNamespace(monotonic=itertools.count(0, 100).__next__)
    assert failure_with("time", late) == "127.0.0.1 is too slow"
    full = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1 << 20))
    assert failure_with("shutil", full) == "127.0.0.1 sends more than the disk can take"
    server.answers = [without_end(0.05, b"x")]
    monkeypatch.setattr(corpora, "DOWNLOAD_DEADLINE_S", 0.1)
    with pytest.raises(DataError, match=r"127\.0\.0\.1 does not answer"):
        download(server.url, tmp_path / "text.txt")
    assert not (tmp_path / "text.txt").exists()


def test_busy_server_is_asked_again_after_longer_and_longer_waits_and_a_redirect_followed(
    tmp_path, server, waits
):
    server.answers = [
        answer(429, b"busy"),
        answer(500, b"busy"),
        redirect("/moved/text.txt"),
        lambda handler: handler.send(200, GOOD),  # which ends where the connection does
    ]
    assert download(server.url, tmp_path / "text.txt") == SHA256
    assert (tmp_path / "text.txt").read_bytes() == GOOD
    assert server.requests == 4
    assert len(waits) == 2 and 0 < waits[0] < waits[1]


def test_redirect_leads_where_a_browser_would_go_but_not_inside():
    public = "https://texts.example.org/a/poems.txt"
    not_followed, inside = ", which is not followed", ", an address of this machine's own network"
    for location, told in [
        ("http://texts.example.org/a/poems.txt", f"http://texts.example.org{not_followed}"),
        ("file:///etc/passwd", f"file://{not_followed}"),
        ("ftp://example.org/poems.txt", f"ftp://example.org{not_followed}"),
        ("https://127.0.0.1/poems.txt", f"https://127.0.0.1{inside}"),
        ("https://[::1]/poems.txt", f"https://::1{inside}"),
        ("//localhost:8080/poems.txt", f"https://localhost{inside}"),
        ("https://10.1.2.3/poems.txt", f"https://10.1.2.3{inside}"),
        ("https://169.254.169.254/latest", f"https://169.254.169.254{inside}"),
    ]:
        with pytest.raises(DataError) as caught:
            corpora._redirected(public, location)
        assert str(caught.value) == f"texts.example.org redirects to {told}"
    for url, location, target in [
        (public, "b.txt", "https://texts.example.org/a/b.txt"),
        (public, "/b.txt", "https://texts.example.org/b.txt"),
        (public, "https://cdn.example.net/b.txt", "https://cdn.example.net/b.txt"),
        ("http://example.org/", "https://example.org/", "https://example.org/"),
        ("http://127.0.0.1:1/a", "http://localhost:2/b", "http://localhost:2/b"),
    ]:
        assert corpora._redirected(url, location) == target


def test_address_is_fetched_once_and_kept_with_where_it_came_from(tmp_path, server):
    server.answers = [OK]
    ends = ["", "a.json", "..", "a%20b.txt", "春.txt", "nul.txt", "a:b.txt", "a."]
    for n_fetched, last in enumerate([*ends, "x" * 300 + ".txt"], start=1):
        url, cache = server.url.replace("text.txt", f"texts/{last}"), tmp_path / str(n_fetched)
        path = fetch_address(url, cache)
        assert path.read_bytes() == GOOD
        assert cache.resolve() in path.resolve().parents
        assert is_portable_name(path.name)
        assert path.suffix == (".txt" if last.endswith(".txt") else Path(last).suffix)
        assert fetch_address(url, cache) == path
        assert server.requests == n_fetched
        (sidecar,) = (p for p in cache.rglob("*") if p.is_file() and p != path)
        expected = {"url": url, "sha256": SHA256, "bytes": len(GOOD)}
        assert json.loads(sidecar.read_text(encoding="utf-8")) == expected
    # which ends alike
    assert fetch_address(server.url + "?page=1", tmp_path) != fetch_address(server.url, tmp_path)


def test_address_that_can_not_be_had_is_told_with_what_to_do(tmp_path, server):
    server.answers = [PAGE]
    for url, reason in [
        (CLOSED, "no connection to 127.0.0.1.\n"),
        (server.url, "127.0.0.1 sent a web page, not the text.\n"),
        *((url, "") for url in ("http://[::1/x.txt", "http://", "https:///x.txt", "http://a b/")),
    ]:
        with pytest.raises(DataError) as caught:
            fetch_address(url, tmp_path)
        assert str(caught.value).startswith(f"{url} can't be had: {reason}")
        assert "download it elsewhere and set DATA to the file" in str(caught.value)
        assert caught.value.exit_code == 3
        assert len(str(caught.value).splitlines()) <= 4
        assert files_in(tmp_path) == []
    # a page is a text where its address says so
    path = fetch_address(server.url.replace("text.txt", "poems.html"), tmp_path)
    assert path.read_bytes().startswith(b"\n<!DOCTYPE html>")


def test_all_who_fetch_the_same_address_at_once_get_it_whole(tmp_path, server):
    everyone = threading.Barrier(4, timeout=60)

    def together(handler):
        everyone.wait()
        OK(handler)

    server.answers = [together]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch_address(server.url, tmp_path), range(4)))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == GOOD
    assert len(files_in(tmp_path)) == 2  # the text and where it came from


def test_connection_that_can_not_be_made_is_given_up_on_at_once(tmp_path, waits, monkeypatch):
    assert failure(CLOSED, tmp_path) == "no connection to 127.0.0.1"
    for scheme in ("http", "https"):
        proxy = f"{scheme.upper()}_PROXY"
        monkeypatch.setenv(proxy, "http://127.0.0.1:1")
        told = f"the proxy set in {proxy} does not let corpus.invalid through"
        assert failure(f"{scheme}://corpus.invalid/text.txt", tmp_path) == told
    assert waits == []


def test_name_that_does_not_resolve_is_given_up_on(tmp_path, monkeypatch):
    ended = threading.Event()

    def unknown(*arguments, hangs=False, **keywords):
        if hangs:
            ended.wait(60)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    url = "https://corpus.invalid/text.txt"
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert failure(url, tmp_path) == "no connection to corpus.invalid"
    monkeypatch.setattr(socket, "getaddrinfo", functools.partial(unknown, hangs=True))
    assert corpora.ANSWER_DEADLINE_S < 6
    monkeypatch.setattr(corpora, "ANSWER_DEADLINE_S", 0.1)
    assert failure(url, tmp_path) == "corpus.invalid does not answer"
    ended.set()


def test_every_address_is_https_and_has_its_hash():
    for corpus in CORPORA.values():
        assert corpus.url is None or corpus.url.startswith("https://")
        assert corpus.url is None or re.fullmatch("[0-9a-f]{64}", corpus.sha256)
    assert [name for name, corpus in CORPORA.items() if corpus.stand_in] == ["the-verdict"]


def test_known_hash_is_that_of_the_verdict(shared_data):
    content = (shared_data / "the-verdict.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == CORPORA["the-verdict"].sha256


def test_sample_texts_need_no_network_and_are_rich(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_get", None)
    texts = []
    for name, smallest in (("sample-en", 20_000), ("sample-zh", 10_000)):
        for stand_in in (True, False, None):
            path, notice = corpus_path(name, tmp_path, stand_in)
            assert (path, notice) == (REPOSITORY / "corpus" / f"{name}.txt", None)
        content = path.read_bytes()
        assert smallest <= len(content) <= 30_000
        assert content.endswith(b"\n")
        assert b"\r" not in content and b"\xef\xbb\xbf" not in content
        assert len(lzma.compress(content)) >= 0.35 * len(content)
        texts.append(content.decode("utf-8"))
    english, chinese = texts
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 0.7 * len(chinese)
    sentences = re.split(r"(?<=[.!?])[\"'”’)]*\s+", english)
    words = [tuple(re.findall(r"[\w'’]+", sentence.lower())) for sentence in sentences]
    counts = Counter(sentence for sentence in words if len(sentence) >= 4)
    assert len(counts) > 100
    assert [" ".join(sentence) for sentence, n in counts.items() if n > 1] == []


def test_dummy_text_is_the_same_each_time_and_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_get", None)
    first, _ = corpus_path("dummy", tmp_path / "a")
    second, _ = corpus_path("dummy", tmp_path / "b")
    assert corpus_path("dummy", tmp_path / "a") == (first, None)
    assert first.read_bytes() == second.read_bytes()
    assert re.fullmatch(r"(([a-z]{2,9} ){11}[a-z]{2,9}\n){3000}", first.read_text())
