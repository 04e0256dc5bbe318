"""Texts by name and by path: fetched whole or not at all, read exactly or refused."""

import dataclasses
import hashlib
import http.server
import lzma
import os
import re
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPOSITORY

from engine.errors import DataError, ResourceError
from text import corpora
from text.corpora import CORPORA, Corpus, corpus_path
from text.sources import load_text

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


def trickle(handler):
    """A byte now and then, without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(GOOD)))
    handler.end_headers()
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"x")


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
    assert str(caught.value) in notice
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


def test_downloaded_text_is_read_with_its_name_and_its_line_ends(tmp_path, server, from_url):
    from_url(server.url)
    server.answers = [OK]
    text = load_text(WITH_STAND_IN, tmp_path)
    assert (text.name, text.content, text.notice) == ("the-verdict.txt", GOOD.decode(), None)


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


def test_body_without_end_is_not_read_to_the_end(tmp_path, server, from_url, monkeypatch):
    from_url(server.url)
    monkeypatch.setattr(corpora, "MAX_BYTES", len(GOOD) - 1)
    server.answers = [OK]
    reason_for_the_stand_in(tmp_path)


def test_body_that_trickles_is_given_up_on(tmp_path, server, from_url, monkeypatch):
    from_url(server.url)
    monkeypatch.setattr(corpora, "DOWNLOAD_DEADLINE_S", 0.3)
    server.answers = [trickle]
    started_at = time.monotonic()
    assert "does not answer" in reason_for_the_stand_in(tmp_path)
    assert time.monotonic() - started_at < 3


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
    assert load_text(WITH_STAND_IN, tmp_path).name == "sample-en.txt"
    assert time.monotonic() - started_at < 6


@pytest.mark.slow
def test_stand_in_comes_within_six_seconds_of_a_hanging_name_resolution(
    tmp_path, from_url, hanging_resolver
):
    from_url("https://corpus.invalid/text.txt")
    started_at = time.monotonic()
    assert load_text(WITH_STAND_IN, tmp_path).name == "sample-en.txt"
    assert time.monotonic() - started_at < 6


def test_stand_in_is_read_with_the_notice(tmp_path, from_url, closed_port):
    from_url(f"http://127.0.0.1:{closed_port}/text.txt")
    text = load_text(WITH_STAND_IN, tmp_path)
    assert (text.name, text.path) == ("sample-en.txt", SAMPLE)
    assert text.content == SAMPLE.read_text(encoding="utf-8")
    assert "sample-en.txt stands in" in text.notice


def test_only_the_default_text_has_a_stand_in_and_every_address_its_hash():
    for name, corpus in CORPORA.items():
        assert (corpus.stand_in is not None) == (name == "the-verdict")
        assert (corpus.url is None) == (corpus.sha256 is None)


def test_known_hash_is_that_of_the_verdict(shared_data):
    content = (shared_data / "the-verdict.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == CORPORA["the-verdict"].sha256


# -------------------------------------------------------------------------------- texts by path


def message_of(data: str | Path, cache: Path) -> str:
    """What load_text says of a text that it refuses, which must not take long."""
    said = []

    def load():
        with pytest.raises(DataError) as caught:
            load_text(str(data), cache)
        said.append(str(caught.value))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert said, "load_text did not refuse in time"
    assert len(said[0].splitlines()) <= 4
    return said[0]


def test_missing_file_is_refused_with_where_it_was_looked_for(workdir):
    message = message_of("poems.txt", workdir)
    assert "there is no file poems.txt" in message
    assert str(workdir) in message
    assert all(name in message for name in CORPORA)


@pytest.mark.parametrize("name", ["the-verdct", "The-Verdict", "the-verdict2"])
def test_mistyped_name_is_refused_with_the_nearest(workdir, name):
    assert 'did you mean "the-verdict"?' in message_of(name, workdir)


def test_name_like_no_other_is_refused_with_all(workdir):
    message = message_of("epoch", workdir)  # near "epochs", which is a setting and no text
    assert "did you mean" not in message
    assert all(name in message for name in CORPORA)


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_text_without_a_word_is_refused_as_empty(workdir, content):
    Path("x.txt").write_bytes(content)
    assert message_of("x.txt", workdir).startswith("x.txt is empty")


def test_folder_is_refused_with_the_texts_in_it(workdir):
    Path("poems").mkdir()
    assert message_of("poems", workdir).startswith("poems is a folder without a text file.\n")
    for name in ("b.txt", "a.md", "c.jpg", *(f"x{i}.txt" for i in range(9))):
        Path("poems", name).write_text("x")
    message = message_of("poems", workdir)
    assert message.startswith("poems is a folder.\n")
    assert message.endswith("a.md, b.txt, x0.txt, x1.txt, x2.txt, ...")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"\xff", "byte 0, in line 1, is 0xff"),
        (b"one\ntwo\xe9\n", "byte 7, in line 2, is 0xe9"),
        (b"one\r\ntwo\r\n\x80", "byte 10, in line 3, is 0x80"),
        (b"\xef\xbb\xbfone\ntw\xff", "byte 9, in line 2, is 0xff"),
        ("one".encode("utf-16"), "byte 0, in line 1, is 0xff"),
        ("春江".encode("gbk"), "byte 0, in line 1, is 0xb4"),
        ("春".encode()[:2], "byte 0, in line 1, is 0xe6"),
        (b"\xed\xa0\x80", "byte 0, in line 1, is 0xed"),
    ],
    ids=ascii,
)
def test_text_that_is_not_utf8_is_refused_with_byte_and_line(workdir, content, place):
    Path("x.txt").write_bytes(content)
    message = message_of("x.txt", workdir)
    assert f"x.txt is not UTF-8: {place}." in message


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfone", "one"),
        (b"one\r\ntwo\rthree\n", "one\r\ntwo\rthree\n"),
        (b"a\x00b\x1a\x0c", "a\x00b\x1a\x0c"),
        (b"\xef\xbb\xbf\xef\xbb\xbfone\xef\xbb\xbf", "\ufeffone\ufeff"),
        ("𠮷\u2028春".encode(), "𠮷\u2028春"),
    ],
    ids=["byte-order mark", "line ends", "control characters", "more marks", "chinese"],
)
def test_text_is_read_exactly_but_for_one_byte_order_mark(workdir, content, text):
    Path("x.txt").write_bytes(content)
    assert load_text("x.txt", workdir).content == text


def test_path_may_be_relative_absolute_or_from_home(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.setenv("USERPROFILE", str(workdir))
    (workdir / "春 1.txt").write_text("one", encoding="utf-8")
    for path in ("春 1.txt", str(workdir / "春 1.txt"), "~/春 1.txt"):
        text = load_text(path, workdir)
        assert (text.name, text.content, text.notice) == ("春 1.txt", "one", None)


def test_home_of_nobody_is_refused_as_missing(workdir):
    assert "there is no file" in message_of("~nobody-of-this-name/x.txt", workdir)


def test_path_below_a_file_is_refused_as_missing(workdir):
    Path("x.txt").write_text("one")
    assert "there is no file" in message_of(Path("x.txt", "y.txt"), workdir)


@pytest.mark.parametrize("data", ["a\0b.txt", "x" * 5000], ids=["NUL", "too long"])
def test_path_that_no_file_can_have_is_refused(workdir, data):
    assert "can't read " in message_of(data, workdir)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_is_refused_without_waiting_for_a_writer(workdir):
    os.mkfifo("pipe")
    assert message_of("pipe", workdir).startswith("pipe is no regular file.\n")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no /dev/zero here")
def test_device_is_refused_without_being_read(workdir):
    assert message_of("/dev/zero", workdir).startswith("/dev/zero is no regular file.\n")


# --------------------------------------------------------------------------------- sample texts


@pytest.mark.parametrize(
    ("name", "smallest", "largest"), [("sample-en", 20_000, 30_000), ("sample-zh", 10_000, 30_000)]
)
def test_sample_texts_need_no_network_and_have_their_size(
    tmp_path, monkeypatch, name, smallest, largest
):
    monkeypatch.setattr(corpora, "_get", None)
    text = load_text(name, tmp_path)
    content = text.path.read_bytes()
    assert smallest <= len(content) <= largest
    assert content.decode("utf-8") == text.content
    assert b"\r" not in content and b"\xef\xbb\xbf" not in content
    assert text.notice is None


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
