"""Texts by name and by address: fetched whole and right, or not at all."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import lzma
import re
import shutil
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import DataError, ResourceError
from storage.files import is_portable_name
from tests.conftest import REPOSITORY
from text import corpora
from text.corpora import CORPORA, Corpus, corpus_path, fetch_address

SAMPLE = REPOSITORY / "corpus" / "sample-en.txt"
GOOD = "Once upon a time, 从前。\r\n".encode() * 5000
WITH_STAND_IN, WITHOUT = "the-verdict", "no-stand-in"


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of its answers, the last one again and again."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = []
        self.requests = 0
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/text.txt"


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


def without_length(handler):
    """The text, which ends where the connection does."""
    handler.send(200, GOOD)


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


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.closing.set()
        running.shutdown()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that a download would have slept."""
    waited = []
    monkeypatch.setattr(corpora.time, "sleep", waited.append)
    return waited


@pytest.fixture
def from_url(monkeypatch):
    """Let two named texts, one with a stand-in and one without, lie at an address."""

    def install(url: str) -> None:
        sha256 = hashlib.sha256(GOOD).hexdigest()
        known = dataclasses.replace(CORPORA[WITH_STAND_IN], url=url, sha256=sha256)
        monkeypatch.setitem(CORPORA, WITH_STAND_IN, known)
        monkeypatch.setitem(CORPORA, WITHOUT, Corpus("another.txt", url, sha256))

    return install


@pytest.fixture
def serve(server, from_url) -> Server:
    """Let those names lie at the server, which gives these answers."""

    def install(*answers) -> Server:
        from_url(server.url)
        server.answers = answers
        return server

    return install


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def reason_for_the_stand_in(cache: Path) -> str:
    """Try both names: the stand-in takes the place of one, the other is an error, both alike.

    Returns what the user is told.
    """
    path, notice = corpus_path(WITH_STAND_IN, cache)
    assert path == SAMPLE
    assert len(notice.splitlines()) == 1
    assert WITH_STAND_IN in notice and "sample-en.txt stands in" in notice
    for name, stand_in in ((WITHOUT, None), (WITH_STAND_IN, False)):
        with pytest.raises(DataError) as caught:
            corpus_path(name, cache, stand_in)
        assert caught.value.exit_code == 3
        first, second, third = str(caught.value).splitlines()
        reason = first.removeprefix(f"{name} can't be had: ")[:-1]
        assert f"can't be had ({reason})" in notice
        assert second == f"Without a network, download {CORPORA[name].url}"
        path = cache / "corpora" / CORPORA[name].file_name
        assert third == f"elsewhere and save it as {path}."
    assert files_in(cache) == []
    return reason


# ----------------------------------------------------------------------------------- downloads


@pytest.mark.parametrize("name", [WITH_STAND_IN, WITHOUT])
def test_download_is_kept_and_asked_for_once(tmp_path, serve, name):
    server = serve(OK)
    for stand_in in (None, False, None):
        path, notice = corpus_path(name, tmp_path, stand_in)
        assert (path, notice) == (tmp_path / "corpora" / CORPORA[name].file_name, None)
        assert path.read_bytes() == GOOD
    assert server.requests == 1
    assert files_in(tmp_path) == [str(Path("corpora") / CORPORA[name].file_name)]
    # a stand-in that is asked for is given without a request, to a text that has one
    path, notice = corpus_path(name, tmp_path, True)
    assert (path == SAMPLE) == (name == WITH_STAND_IN) == bool(notice)
    if notice:
        assert notice == "corpus/sample-en.txt stands in for the-verdict, as when this run began"
    assert server.requests == 1


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
SLOW = {"DOWNLOAD_DEADLINE_S": 0.2, "SLOWEST_BYTES": 1 << 40}
FAILURES = {  # what is told, after how many requests, of which answers; and other limits
    "wrong bytes": ("another file", 1, [answer(200, GOOD[:-1])], {}),
    "nothing": ("another file", 1, [answer(200, b"")], {}),
    "web page": ("127.0.0.1 sent a web page, not the text", 1, [PAGE], {}),
    "404": ("127.0.0.1 answered 404", 1, [answer(404, b"no such page")], {}),
    "403": ("127.0.0.1 answered 403", 1, [answer(403, GOOD)], {}),
    "503": ("127.0.0.1 answered 503", corpora.TRIES, [answer(503, b"busy")], {}),
    "breaks off": ("127.0.0.1", 1, [answer(200, GOOD, length=len(GOOD) + 1)], {}),
    "slow": ("127.0.0.1 is too slow", 1, [without_end(0.02, b"x" * 65536)], SLOW),
    "never answers": (
        "127.0.0.1 does not answer",
        1,
        [lambda handler: handler.server.closing.wait()],
        {"ANSWER_DEADLINE_S": 0.3},
    ),
    "circle": (
        "127.0.0.1 redirects in a circle",
        corpora.MAX_REDIRECTS,
        [redirect("/text.txt")],
        {},
    ),
}


@pytest.mark.parametrize(
    ("told", "requests", "answers", "limits"), FAILURES.values(), ids=FAILURES.keys()
)
def test_answer_that_is_not_the_text_is_not_used(
    tmp_path, serve, waits, monkeypatch, told, requests, answers, limits
):
    for name, value in limits.items():
        monkeypatch.setattr(corpora, name, value)
    server = serve(*answers)
    reason = reason_for_the_stand_in(tmp_path)
    assert told in reason
    assert server.requests == 3 * requests
    assert len(waits) == (3 * (requests - 1) if "503" in told else 0)  # else it would not help
    assert sum(waits) < 3 * 6
    if told == "another file":
        assert re.search(r"sha256 [0-9a-f]{64} in place of " + CORPORA[WITHOUT].sha256, reason)


def test_body_that_trickles_is_given_up_on(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(corpora, "DOWNLOAD_DEADLINE_S", 0.3)
    serve(without_end(0.05, b"x"))
    with pytest.raises(DataError, match=r"127\.0\.0\.1 does not answer"):
        corpus_path(WITHOUT, tmp_path)
    assert not (tmp_path / "corpora" / "another.txt").exists()


def test_body_without_end_stops_before_the_disk_is_full(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    serve(without_end(0.001, b"x" * 65536))
    assert "127.0.0.1 sends more than the disk can take" in reason_for_the_stand_in(tmp_path)


def test_busy_server_is_asked_again_after_longer_and_longer_waits(tmp_path, serve, waits):
    server = serve(answer(429, b"busy"), answer(500, b"busy"), without_length)
    path, notice = corpus_path(WITH_STAND_IN, tmp_path)
    assert (path.read_bytes(), notice) == (GOOD, None)
    assert server.requests == 3
    assert len(waits) == 2 and 0 < waits[0] < waits[1]


# ----------------------------------------------------------------------------------- redirects


def test_redirect_is_followed_but_not_to_a_file_of_this_machine(tmp_path, serve):
    server = serve(redirect("/moved/text.txt"), redirect("/text.txt"), OK)
    assert corpus_path(WITHOUT, tmp_path / "cache")[0].read_bytes() == GOOD
    assert server.requests == 3
    secret = tmp_path / "secret.txt"
    secret.write_bytes(GOOD)
    serve(redirect(secret.as_uri()))
    told = reason_for_the_stand_in(tmp_path / "other cache")
    assert "redirects to file://, which is not followed" in told


PUBLIC = "https://texts.example.org/a/poems.txt"


NOT_FOLLOWED, INSIDE = ", which is not followed", ", an address of this machine's own network"
REDIRECTS = [
    ("http://texts.example.org/a/poems.txt", f"http://texts.example.org{NOT_FOLLOWED}"),
    ("file:///etc/passwd", f"file://{NOT_FOLLOWED}"),
    ("ftp://example.org/poems.txt", f"ftp://example.org{NOT_FOLLOWED}"),
    ("https://127.0.0.1/poems.txt", f"https://127.0.0.1{INSIDE}"),
    ("https://[::1]/poems.txt", f"https://::1{INSIDE}"),
    ("//localhost:8080/poems.txt", f"https://localhost{INSIDE}"),
    ("https://10.1.2.3/poems.txt", f"https://10.1.2.3{INSIDE}"),
    ("https://169.254.169.254/latest", f"https://169.254.169.254{INSIDE}"),
]


def test_redirect_leads_where_a_browser_would_go_but_not_inside():
    for location, told in REDIRECTS:
        with pytest.raises(DataError) as caught:
            corpora._redirected(PUBLIC, location)
        assert str(caught.value) == f"texts.example.org redirects to {told}"
    for url, location, target in [
        (PUBLIC, "b.txt", "https://texts.example.org/a/b.txt"),
        (PUBLIC, "/b.txt", "https://texts.example.org/b.txt"),
        (PUBLIC, "https://cdn.example.net/b.txt", "https://cdn.example.net/b.txt"),
        ("http://example.org/", "https://example.org/", "https://example.org/"),
        ("http://127.0.0.1:1/a", "http://localhost:2/b", "http://localhost:2/b"),
    ]:
        assert corpora._redirected(url, location) == target


# ----------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "last",
    ["", "a.json", "..", "a%20b.txt", "春.txt", "nul.txt", "a:b.txt", "a.", "x" * 300 + ".txt"],
)
def test_address_is_fetched_once_and_kept_with_where_it_came_from(tmp_path, server, last):
    server.answers = [OK]
    url = server.url.replace("text.txt", f"texts/{last}")
    path = fetch_address(url, tmp_path)
    assert path.read_bytes() == GOOD
    assert tmp_path.resolve() in path.resolve().parents
    assert is_portable_name(path.name)
    assert path.suffix == (".txt" if last.endswith(".txt") else Path(last).suffix)
    assert fetch_address(url, tmp_path) == path
    assert server.requests == 1
    (sidecar,) = (p for p in tmp_path.rglob("*") if p.is_file() and p != path)
    sha256 = hashlib.sha256(GOOD).hexdigest()
    expected = {"url": url, "sha256": sha256, "bytes": len(GOOD)}
    assert json.loads(sidecar.read_text(encoding="utf-8")) == expected


def test_addresses_that_end_alike_are_kept_apart(tmp_path, server):
    server.answers = [answer(200, b"one"), answer(200, b"two")]
    first = fetch_address(server.url + "?page=1", tmp_path)
    second = fetch_address(server.url + "?page=2", tmp_path)
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")


def test_address_that_can_not_be_had_is_told_with_what_to_do(tmp_path, server, closed_port):
    server.answers = [PAGE]
    closed = f"http://127.0.0.1:{closed_port}/text.txt"
    for url, reason in [
        (closed, "no connection to 127.0.0.1.\n"),
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


# ---------------------------------------------------------------------------------- no network


def test_refused_connection_is_given_up_on_at_once(tmp_path, from_url, waits, closed_port):
    from_url(f"http://127.0.0.1:{closed_port}/text.txt")
    assert "no connection to 127.0.0.1" in reason_for_the_stand_in(tmp_path)
    assert waits == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_is_not_there_is_named(tmp_path, from_url, monkeypatch, closed_port, scheme):
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://127.0.0.1:{closed_port}")
    from_url(f"{scheme}://corpus.invalid/text.txt")
    told = reason_for_the_stand_in(tmp_path)
    assert f"the proxy set in {scheme.upper()}_PROXY does not let corpus.invalid through" in told


@pytest.mark.parametrize("hangs", [False, True])
def test_name_that_does_not_resolve_is_given_up_on(tmp_path, from_url, monkeypatch, hangs):
    ended = threading.Event()

    def unknown(*arguments, **keywords):
        if hangs:
            ended.wait(60)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert corpora.ANSWER_DEADLINE_S < 6
    if hangs:
        monkeypatch.setattr(corpora, "ANSWER_DEADLINE_S", 0.3)
    from_url("https://corpus.invalid/text.txt")
    told = "corpus.invalid does not answer" if hangs else "no connection to corpus.invalid"
    assert told in reason_for_the_stand_in(tmp_path)
    ended.set()


# --------------------------------------------------------------------------------- known texts


def test_every_address_is_https_and_has_its_hash():
    for corpus in CORPORA.values():
        assert corpus.url is None or corpus.url.startswith("https://")
        assert corpus.url is None or re.fullmatch("[0-9a-f]{64}", corpus.sha256)
    assert [name for name, corpus in CORPORA.items() if corpus.stand_in] == ["the-verdict"]


def test_known_hash_is_that_of_the_verdict(shared_data):
    content = (shared_data / "the-verdict.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == CORPORA["the-verdict"].sha256


@pytest.mark.parametrize(("name", "smallest"), [("sample-en", 20_000), ("sample-zh", 10_000)])
def test_sample_texts_need_no_network_and_are_rich(tmp_path, monkeypatch, name, smallest):
    monkeypatch.setattr(corpora, "_get", None)
    for stand_in in (True, False, None):
        path, notice = corpus_path(name, tmp_path, stand_in)
        assert (path, notice) == (REPOSITORY / "corpus" / f"{name}.txt", None)
    content = path.read_bytes()
    text = content.decode("utf-8")
    assert smallest <= len(content) <= 30_000
    assert text.endswith("\n")
    assert b"\r" not in content and b"\xef\xbb\xbf" not in content
    assert len(lzma.compress(content, preset=9)) >= 0.35 * len(content)
    if name == "sample-zh":
        assert len(re.findall(r"[\u4e00-\u9fff]", text)) > 0.7 * len(text)
    else:
        sentences = re.split(r"(?<=[.!?])[\"'”’)]*\s+", text)
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
