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
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY

from engine.errors import DataError, ResourceError
from storage.files import is_portable_name
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


def answer(status: int, body: bytes, length: int | None = None):
    """An answer whose Content-Length may be a lie."""

    def send(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return send


def without_length(handler):
    """The text, which ends where the connection does."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(GOOD)


def redirect(target: str):
    """Send to another address, or to another path of the same server."""

    def send(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return send


def without_end(pause_s: float, piece: bytes):
    """A text that goes on for as long as somebody reads it."""

    def send(handler):
        handler.send_response(200)
        handler.end_headers()
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
    with pytest.raises(DataError) as caught:
        corpus_path(WITHOUT, cache)
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) <= 4
    reason = str(caught.value).splitlines()[0].removeprefix(f"{WITHOUT} can't be had: ")[:-1]
    assert f"can't be had ({reason})" in notice
    assert files_in(cache) == []
    return notice


# ----------------------------------------------------------------------------------- downloads


@pytest.mark.parametrize("name", [WITH_STAND_IN, WITHOUT])
def test_download_is_kept_and_asked_for_once(tmp_path, server, from_url, name):
    from_url(server.url)
    server.answers = [OK]
    first = corpus_path(name, tmp_path)
    assert first == (tmp_path / "corpora" / CORPORA[name].file_name, None)
    assert first[0].read_bytes() == GOOD
    assert corpus_path(name, tmp_path) == first
    assert server.requests == 1
    assert files_in(tmp_path) == [str(Path("corpora") / CORPORA[name].file_name)]


def test_text_without_a_content_length_is_taken_by_its_hash(tmp_path, server, from_url):
    from_url(server.url)
    server.answers = [without_length]
    path, notice = corpus_path(WITHOUT, tmp_path)
    assert (path.read_bytes(), notice) == (GOOD, None)


@pytest.mark.parametrize("damaged", [b"", GOOD[:-1], b"<html>", GOOD + b"x"], ids=len)
def test_damaged_file_in_the_cache_is_fetched_anew(tmp_path, server, from_url, damaged):
    from_url(server.url)
    server.answers = [OK]
    path = tmp_path / "corpora" / "the-verdict.txt"
    path.parent.mkdir()
    path.write_bytes(damaged)
    assert corpus_path(WITH_STAND_IN, tmp_path) == (path, None)
    assert path.read_bytes() == GOOD
    assert server.requests == 1


def test_folder_in_the_place_of_the_cached_file_is_a_resource_error(tmp_path, server, from_url):
    from_url(server.url)
    server.answers = [OK]
    (tmp_path / "corpora" / "the-verdict.txt").mkdir(parents=True)
    with pytest.raises(ResourceError, match=r"can't write .*the-verdict\.txt"):
        corpus_path(WITH_STAND_IN, tmp_path)


@pytest.mark.parametrize(
    ("send", "told"),
    [
        (answer(200, GOOD[:-1]), "another file"),
        (answer(200, b""), "another file"),
        (answer(200, b"\n<!DOCTYPE html><title>Log in</title>"), "a web page"),
        (answer(404, b"no such page"), "answered 404"),
        (answer(403, GOOD), "answered 403"),
    ],
    ids=["wrong bytes", "nothing", "web page", "404", "403"],
)
def test_answer_that_is_not_the_text_is_not_used(tmp_path, server, from_url, waits, send, told):
    from_url(server.url)
    server.answers = [send]
    assert told in reason_for_the_stand_in(tmp_path)
    assert server.requests == 2  # once for each name: asking again would not help
    assert waits == []


def test_wrong_text_is_told_with_both_hashes(tmp_path, server, from_url):
    from_url(server.url)
    server.answers = [answer(200, b"wrong")]
    told = reason_for_the_stand_in(tmp_path)
    assert hashlib.sha256(b"wrong").hexdigest() in told
    assert hashlib.sha256(GOOD).hexdigest() in told


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_asked_again_after_longer_and_longer_waits(
    tmp_path, server, from_url, waits, status
):
    from_url(server.url)
    server.answers = [answer(status, b"busy"), answer(status, b"busy"), OK]
    path, notice = corpus_path(WITH_STAND_IN, tmp_path)
    assert (path.read_bytes(), notice) == (GOOD, None)
    assert server.requests == 3
    assert len(waits) == 2 and 0 < waits[0] < waits[1]


def test_server_that_stays_busy_is_given_up_on(tmp_path, server, from_url, waits):
    from_url(server.url)
    server.answers = [answer(503, b"busy")]
    assert "answered 503" in reason_for_the_stand_in(tmp_path)
    assert server.requests == 2 * corpora.TRIES
    assert sum(waits) < 2 * 6


def test_body_that_breaks_off_is_not_used(tmp_path, server, from_url):
    from_url(server.url)
    server.answers = [answer(200, GOOD, length=len(GOOD) + 1)]
    assert "127.0.0.1" in reason_for_the_stand_in(tmp_path)


def test_body_without_end_stops_before_the_disk_is_full(tmp_path, server, from_url, monkeypatch):
    free = 1 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    from_url(server.url)
    server.answers = [without_end(0.001, b"x" * 65536)]
    assert "127.0.0.1 sends more than the disk can take" in reason_for_the_stand_in(tmp_path)


def test_body_that_comes_too_slowly_is_given_up_on(tmp_path, server, from_url, monkeypatch):
    monkeypatch.setattr(corpora, "DOWNLOAD_DEADLINE_S", 0.2)
    monkeypatch.setattr(corpora, "SLOWEST_BYTES", 1 << 40)
    from_url(server.url)
    server.answers = [without_end(0.02, b"x" * 65536)]
    assert "127.0.0.1 is too slow" in reason_for_the_stand_in(tmp_path)


def test_body_that_trickles_is_given_up_on(tmp_path, server, from_url, monkeypatch):
    monkeypatch.setattr(corpora, "DOWNLOAD_DEADLINE_S", 0.3)
    from_url(server.url)
    server.answers = [without_end(0.05, b"x")]
    started_at = time.monotonic()
    with pytest.raises(DataError, match=r"127\.0\.0\.1 does not answer"):
        corpus_path(WITHOUT, tmp_path)
    assert time.monotonic() - started_at < 3
    assert not (tmp_path / "corpora" / "another.txt").exists()


# ----------------------------------------------------------------------------------- redirects


def test_redirect_is_followed_to_the_text(tmp_path, server, from_url):
    from_url(server.url)
    server.answers = [redirect("/moved/text.txt"), redirect(server.url), OK]
    assert corpus_path(WITHOUT, tmp_path)[0].read_bytes() == GOOD
    assert server.requests == 3


def test_redirects_in_a_circle_are_given_up_on(tmp_path, server, from_url, waits):
    from_url(server.url)
    server.answers = [redirect("/text.txt")]
    assert "127.0.0.1 redirects in a circle" in reason_for_the_stand_in(tmp_path)
    assert server.requests == 2 * corpora.MAX_REDIRECTS
    assert waits == []


def test_redirect_to_a_file_of_this_machine_is_not_followed(tmp_path, server, from_url):
    secret = tmp_path.parent / "secret.txt"
    secret.write_bytes(GOOD)
    from_url(server.url)
    server.answers = [redirect(secret.as_uri())]
    assert "redirects to file://, which is not followed" in reason_for_the_stand_in(tmp_path)


PUBLIC = "https://texts.example.org/a/poems.txt"


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("http://texts.example.org/a/poems.txt", "to http://texts.example.org, which is not"),
        ("file:///etc/passwd", "to file://, which is not followed"),
        ("ftp://example.org/poems.txt", "to ftp://example.org, which is not followed"),
        ("https://127.0.0.1/poems.txt", "to https://127.0.0.1, an address of this machine"),
        ("https://[::1]/poems.txt", "to https://::1, an address of this machine"),
        ("//localhost:8080/poems.txt", "to https://localhost, an address of this machine"),
        ("https://10.1.2.3/poems.txt", "to https://10.1.2.3, an address of this machine"),
        ("https://169.254.169.254/latest", "to https://169.254.169.254, an address of this"),
    ],
)
def test_redirect_that_a_page_must_not_ask_for_is_refused(location, told):
    with pytest.raises(DataError) as caught:
        corpora._redirected(PUBLIC, location)
    assert str(caught.value).startswith("texts.example.org redirects")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("url", "location", "target"),
    [
        (PUBLIC, "b.txt", "https://texts.example.org/a/b.txt"),
        (PUBLIC, "/b.txt", "https://texts.example.org/b.txt"),
        (PUBLIC, "https://cdn.example.net/b.txt", "https://cdn.example.net/b.txt"),
        ("http://example.org/", "https://example.org/", "https://example.org/"),
        ("http://127.0.0.1:1/a", "http://localhost:2/b", "http://localhost:2/b"),
    ],
)
def test_redirect_leads_where_a_browser_would_go(url, location, target):
    assert corpora._redirected(url, location) == target


# ----------------------------------------------------------------------------------- addresses


def test_address_is_fetched_once_and_kept_with_where_it_came_from(tmp_path, server):
    server.answers = [OK]
    path = fetch_address(server.url, tmp_path)
    assert path.name == "text.txt"
    assert path.read_bytes() == GOOD
    assert fetch_address(server.url, tmp_path) == path
    assert server.requests == 1
    (sidecar,) = (p for p in tmp_path.rglob("*") if p.is_file() and p != path)
    assert json.loads(sidecar.read_text(encoding="utf-8")) == {
        "url": server.url,
        "sha256": hashlib.sha256(GOOD).hexdigest(),
        "bytes": len(GOOD),
    }


def test_addresses_that_end_alike_are_kept_apart(tmp_path, server):
    server.answers = [answer(200, b"one"), answer(200, b"two")]
    first = fetch_address(server.url + "?page=1", tmp_path)
    second = fetch_address(server.url + "?page=2", tmp_path)
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")


@pytest.mark.parametrize(
    "last",
    ["", "a.json", "..", "a%20b.txt", "春.txt", "nul.txt", "a:b.txt", "a.", "x" * 300 + ".txt"],
)
def test_address_of_any_last_part_is_kept_as_it_came(tmp_path, server, last):
    server.answers = [OK]
    url = server.url.replace("text.txt", f"texts/{last}")
    path = fetch_address(url, tmp_path)
    assert path.read_bytes() == GOOD
    assert tmp_path.resolve() in path.resolve().parents
    assert is_portable_name(path.name)
    assert path.suffix == (".txt" if last.endswith(".txt") else Path(last).suffix)
    assert fetch_address(url, tmp_path) == path


def message_without_the_file(url: str, cache: Path) -> str:
    """What fetch_address says of an address that it can't have; nothing may be kept."""
    with pytest.raises(DataError) as caught:
        fetch_address(url, cache)
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) <= 4
    assert files_in(cache) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("status", "requests"), [(404, 1), (403, 1), (429, corpora.TRIES), (500, corpora.TRIES)]
)
def test_refused_address_is_told_with_its_status(tmp_path, server, waits, status, requests):
    server.answers = [answer(status, GOOD)]
    message = message_without_the_file(server.url, tmp_path)
    assert message.startswith(f"{server.url} can't be had: 127.0.0.1 answered {status}.\n")
    assert server.requests == requests
    assert len(waits) == requests - 1


def test_web_page_in_place_of_a_text_is_refused(tmp_path, server):
    server.answers = [answer(200, b"\n <!DOCTYPE html><title>Log in</title>")]
    assert "sent a web page, not the text" in message_without_the_file(server.url, tmp_path)


def test_web_page_is_a_text_where_its_address_says_so(tmp_path, server):
    server.answers = [answer(200, b"<html>poems</html>")]
    path = fetch_address(server.url.replace("text.txt", "poems.html"), tmp_path)
    assert path.read_bytes() == b"<html>poems</html>"


def test_unreachable_address_is_told_with_what_to_do(tmp_path, closed_port):
    url = f"http://127.0.0.1:{closed_port}/text.txt"
    message = message_without_the_file(url, tmp_path)
    assert message.startswith(f"{url} can't be had: no connection to 127.0.0.1.\n")
    assert "download it elsewhere and set DATA to the file" in message


@pytest.mark.parametrize("url", ["http://[::1/x.txt", "http://", "https:///x.txt", "http://a b/"])
def test_address_that_is_none_is_refused(tmp_path, url):
    assert message_without_the_file(url, tmp_path).startswith(f"{url} can't be had: ")


def test_threads_that_fetch_the_same_address_all_get_it_whole(tmp_path, server):
    everyone = threading.Barrier(4, timeout=10)

    def together(handler):
        everyone.wait()
        OK(handler)

    server.answers = [together]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch_address(server.url, tmp_path), range(4)))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == GOOD
    assert len(files_in(tmp_path)) == 2  # the text and where it came from


def test_processes_that_fetch_the_same_address_all_get_it_whole(tmp_path, server):
    everyone = threading.Barrier(2, timeout=20)

    def together(handler):
        everyone.wait()
        OK(handler)

    server.answers = [together]
    program = (
        "import sys; from pathlib import Path; from text.corpora import fetch_address\n"
        "print(fetch_address(sys.argv[1], Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, server.url, str(tmp_path)]
    running = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=30)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == GOOD
    assert len(files_in(tmp_path)) == 2


# ---------------------------------------------------------------------------------- no network


@pytest.fixture
def silent_url():
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/text.txt"


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture
def hanging_resolver(monkeypatch):
    """Name resolution that takes until the end of the test."""
    ended = threading.Event()

    def hang(*arguments, **keywords):
        ended.wait(60)
        raise socket.gaierror("the test has ended")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    yield
    ended.set()


def test_refused_connection_is_given_up_on_at_once(tmp_path, from_url, waits, closed_port):
    from_url(f"http://127.0.0.1:{closed_port}/text.txt")
    started_at = time.monotonic()
    assert "no connection to 127.0.0.1" in reason_for_the_stand_in(tmp_path)
    assert time.monotonic() - started_at < 2
    assert waits == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_is_not_there_is_named(tmp_path, from_url, monkeypatch, closed_port, scheme):
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://127.0.0.1:{closed_port}")
    from_url(f"{scheme}://corpus.invalid/text.txt")
    told = reason_for_the_stand_in(tmp_path)
    assert f"the proxy set in {scheme.upper()}_PROXY does not let corpus.invalid through" in told


def test_name_that_does_not_resolve_is_no_connection(tmp_path, from_url, monkeypatch):
    def unknown(*arguments, **keywords):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    from_url("https://corpus.invalid/text.txt")
    assert "no connection to corpus.invalid" in reason_for_the_stand_in(tmp_path)


def test_server_that_never_answers_is_given_up_on(tmp_path, from_url, monkeypatch, silent_url):
    monkeypatch.setattr(corpora, "ANSWER_DEADLINE_S", 0.3)
    from_url(silent_url)
    started_at = time.monotonic()
    assert "127.0.0.1 does not answer" in reason_for_the_stand_in(tmp_path)
    assert time.monotonic() - started_at < 2 * 0.3 + 2


def test_name_resolution_that_hangs_is_given_up_on(
    tmp_path, from_url, monkeypatch, hanging_resolver
):
    monkeypatch.setattr(corpora, "ANSWER_DEADLINE_S", 0.3)
    from_url("https://corpus.invalid/text.txt")
    started_at = time.monotonic()
    assert "corpus.invalid does not answer" in reason_for_the_stand_in(tmp_path)
    assert time.monotonic() - started_at < 2 * 0.3 + 2


@pytest.mark.slow
def test_stand_in_comes_within_six_seconds_of_a_server_that_never_answers(
    tmp_path, from_url, silent_url
):
    from_url(silent_url)
    started_at = time.monotonic()
    assert corpus_path(WITH_STAND_IN, tmp_path)[0] == SAMPLE
    assert time.monotonic() - started_at < 6


@pytest.mark.slow
def test_stand_in_comes_within_six_seconds_of_a_hanging_name_resolution(
    tmp_path, from_url, hanging_resolver
):
    from_url("https://corpus.invalid/text.txt")
    started_at = time.monotonic()
    assert corpus_path(WITH_STAND_IN, tmp_path)[0] == SAMPLE
    assert time.monotonic() - started_at < 6


def test_unreachable_text_without_stand_in_is_told_with_what_to_do(tmp_path, from_url, closed_port):
    url = f"http://127.0.0.1:{closed_port}/text.txt"
    from_url(url)
    with pytest.raises(DataError) as caught:
        corpus_path(WITHOUT, tmp_path)
    assert caught.value.exit_code == 3
    first, second, third = str(caught.value).splitlines()
    assert first == f"{WITHOUT} can't be had: no connection to 127.0.0.1."
    assert second == f"Without a network, download {url}"
    assert third == f"elsewhere and save it as {tmp_path / 'corpora' / 'another.txt'}."


def test_text_saved_where_the_message_says_is_used_without_a_request(tmp_path, server, from_url):
    from_url(server.url)
    path = tmp_path / "corpora" / "another.txt"
    path.parent.mkdir()
    path.write_bytes(GOOD)
    assert corpus_path(WITHOUT, tmp_path) == (path, None)
    assert server.requests == 0


def test_only_the_default_text_has_a_stand_in():
    assert [name for name, corpus in CORPORA.items() if corpus.stand_in] == ["the-verdict"]


def test_stand_in_that_is_asked_for_is_given_without_a_request(tmp_path, server, from_url):
    from_url(server.url)
    server.answers = [OK]
    corpus_path(WITH_STAND_IN, tmp_path)  # the text itself is there now
    path, notice = corpus_path(WITH_STAND_IN, tmp_path, True)
    assert path == SAMPLE
    assert notice == "corpus/sample-en.txt stands in for the-verdict, as when this run began"
    assert server.requests == 1


def test_text_whose_stand_in_is_ruled_out_is_an_error_where_it_cannot_be_had(
    tmp_path, from_url, closed_port
):
    url = f"http://127.0.0.1:{closed_port}/text.txt"
    from_url(url)
    with pytest.raises(DataError) as caught:
        corpus_path(WITH_STAND_IN, tmp_path, False)
    assert caught.value.exit_code == 3
    first, second, third = str(caught.value).splitlines()
    assert first == f"{WITH_STAND_IN} can't be had: no connection to 127.0.0.1."
    assert second == f"Without a network, download {url}"
    assert third == f"elsewhere and save it as {tmp_path / 'corpora' / 'the-verdict.txt'}."
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("stand_in", [False, None])
def test_text_that_can_be_had_is_taken_where_no_stand_in_is_asked_for(
    tmp_path, server, from_url, stand_in
):
    from_url(server.url)
    server.answers = [OK]
    path, notice = corpus_path(WITH_STAND_IN, tmp_path, stand_in)
    assert (path.read_bytes(), notice) == (GOOD, None)


@pytest.mark.parametrize("stand_in", [True, False, None])
def test_text_without_a_stand_in_is_itself_whatever_is_asked_for(
    tmp_path, server, from_url, stand_in
):
    from_url(server.url)
    server.answers = [OK]
    path, notice = corpus_path(WITHOUT, tmp_path, stand_in)
    assert (path.read_bytes(), notice) == (GOOD, None)
    assert corpus_path("sample-en", tmp_path, stand_in) == (SAMPLE, None)
    dummy, notice = corpus_path("dummy", tmp_path, stand_in)
    assert (dummy.name, notice) == ("dummy.txt", None)


@pytest.mark.parametrize("name", [name for name, corpus in CORPORA.items() if corpus.url])
def test_every_address_is_https_and_has_its_hash(name):
    assert CORPORA[name].url.startswith("https://")
    assert re.fullmatch("[0-9a-f]{64}", CORPORA[name].sha256)


def test_known_hash_is_that_of_the_verdict(shared_data):
    content = (shared_data / "the-verdict.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == CORPORA["the-verdict"].sha256


# --------------------------------------------------------------------------------- sample texts


@pytest.mark.parametrize(
    ("name", "smallest", "largest"), [("sample-en", 20_000, 30_000), ("sample-zh", 10_000, 30_000)]
)
def test_sample_texts_need_no_network_and_have_their_size(
    tmp_path, monkeypatch, name, smallest, largest
):
    monkeypatch.setattr(corpora, "_get", None)
    path, notice = corpus_path(name, tmp_path)
    content = path.read_bytes()
    assert smallest <= len(content) <= largest
    assert content.decode("utf-8").endswith("\n")
    assert b"\r" not in content and b"\xef\xbb\xbf" not in content
    assert notice is None


def test_dummy_text_is_the_same_each_time_and_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_get", None)
    first, _ = corpus_path("dummy", tmp_path / "a")
    second, _ = corpus_path("dummy", tmp_path / "b")
    assert corpus_path("dummy", tmp_path / "a") == (first, None)
    assert first.read_bytes() == second.read_bytes()
    assert re.fullmatch(r"(([a-z]{2,9} ){11}[a-z]{2,9}\n){3000}", first.read_text())


def test_english_sample_repeats_no_sentence():
    sentences = re.split(r"(?<=[.!?])[\"'”’)]*\s+", SAMPLE.read_text(encoding="utf-8"))
    words = [tuple(re.findall(r"[\w'’]+", sentence.lower())) for sentence in sentences]
    counts = Counter(sentence for sentence in words if len(sentence) >= 4)
    assert len(counts) > 100
    assert [" ".join(sentence) for sentence, n in counts.items() if n > 1] == []


@pytest.mark.parametrize("name", ["sample-en.txt", "sample-zh.txt"])
def test_samples_are_too_rich_to_be_compressed_far(name):
    content = (REPOSITORY / "corpus" / name).read_bytes()
    assert len(lzma.compress(content, preset=9)) >= 0.35 * len(content)


def test_chinese_sample_is_chinese():
    text = (REPOSITORY / "corpus" / "sample-zh.txt").read_text(encoding="utf-8")
    assert len(re.findall(r"[\u4e00-\u9fff]", text)) > 0.7 * len(text)
