"""Named texts: those in this repository, and those fetched once and checked by their sha256."""

import hashlib
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from engine.errors import DataError
from engine.storage import make_folder, write_atomically

REPOSITORY = Path(__file__).resolve().parent.parent
CONNECT_TIMEOUT_S = 3.0  # for one connection attempt
ANSWER_DEADLINE_S = 5.5  # name resolution, connection and the first bytes together
DOWNLOAD_DEADLINE_S = 60.0
TRIES = 3  # of a server that answers "busy"; an unreachable one is tried once
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Corpus:
    """A text by name: a file in corpus/, or an address with the sha256 of what lies there."""

    file_name: str
    url: str | None = None
    sha256: str | None = None
    stand_in: str | None = None  # the corpus to use where the address can't be reached


CORPORA = {
    "the-verdict": Corpus(
        file_name="the-verdict.txt",
        url=(
            "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
            "ch02/01_main-chapter-code/the-verdict.txt"
        ),
        sha256="b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        stand_in="sample-en",
    ),
    "sample-en": Corpus("sample-en.txt"),
    "sample-zh": Corpus("sample-zh.txt"),
}


class DownloadError(DataError):
    """A file that could not be fetched whole and right."""


def corpus_path(name: str, cache: Path) -> tuple[Path, str | None]:
    """The file of a named corpus, fetched into the cache folder at first use.

    Returns the path and, where a stand-in had to take its place, the line that says so. Raises
    DataError where the text can't be had and nothing may stand in.
    """
    corpus = CORPORA[name]
    if corpus.url is None:
        return REPOSITORY / "corpus" / corpus.file_name, None
    path = cache / "corpora" / corpus.file_name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == corpus.sha256:
        return path, None
    try:
        content = download(corpus.url, corpus.sha256)
    except DownloadError as error:
        if corpus.stand_in is None:
            raise
        instead, _ = corpus_path(corpus.stand_in, cache)
        return instead, f"{name} can't be had ({error}): corpus/{instead.name} stands in for it"
    make_folder(path.parent)
    write_atomically(path, content)
    return path, None


def download(url: str, sha256: str) -> bytes:
    """Fetch an address and check what came; nothing is written.

    An unreachable server is given up on after one attempt, within 6 s with name resolution; one
    that answers 429 or 5xx is asked again, TRIES times in all. Raises DownloadError.
    """
    give_up_at = time.monotonic() + DOWNLOAD_DEADLINE_S
    for attempt in range(TRIES):
        status, content = _get(url, give_up_at)
        busy = status == 429 or status >= 500
        if not busy or attempt == TRIES - 1:
            break
        time.sleep(2**attempt)
    host = urlsplit(url).hostname
    if status != 200:
        raise DownloadError(f"{host} answered {status}")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        what = "a web page" if content.lstrip()[:1] == b"<" else "another file"
        raise DownloadError(
            f"{host} sent {what}, not the text: sha256 {found} in place of {sha256}"
        )
    return content


def _get(url: str, give_up_at: float) -> tuple[int, bytes]:
    """One request, in a thread: name resolution has no time limit of its own to set."""
    answers: queue.Queue = queue.Queue()
    stop = threading.Event()
    thread = threading.Thread(target=_fetch, args=(url, give_up_at, answers, stop), daemon=True)
    thread.start()
    host = urlsplit(url).hostname
    try:
        answer = answers.get(timeout=ANSWER_DEADLINE_S)
        if answer == "connected":
            answer = answers.get(timeout=max(0.0, give_up_at - time.monotonic()))
    except queue.Empty:
        raise DownloadError(f"{host} does not answer") from None
    finally:
        stop.set()
    if isinstance(answer, Exception):
        raise DownloadError(_reason(url, answer)) from answer
    return answer


def _fetch(url: str, give_up_at: float, answers: queue.Queue, stop: threading.Event) -> None:
    """Put "connected", then (status, body) or an exception into answers."""
    import requests  # 0.06 s that only a download needs to spend

    try:
        with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT_S, 5.0)) as response:
            answers.put("connected")
            body = bytearray()
            for chunk in response.iter_content(64 * 1024):
                body += chunk
                if stop.is_set() or time.monotonic() > give_up_at or len(body) > MAX_BYTES:
                    raise requests.ConnectionError("too slow or too large")
            answers.put((response.status_code, bytes(body)))
    except (requests.RequestException, OSError) as error:
        answers.put(error)


def _reason(url: str, error: Exception) -> str:
    """Why a request failed, in a few words."""
    import requests

    host = urlsplit(url).hostname
    if isinstance(error, requests.exceptions.ProxyError):
        return f"the proxy set in {urlsplit(url).scheme.upper()}_PROXY does not let {host} through"
    if isinstance(error, requests.exceptions.SSLError):
        return f"the certificate of {host} is not trusted; see REQUESTS_CA_BUNDLE"
    if isinstance(error, requests.exceptions.ConnectTimeout | requests.exceptions.ReadTimeout):
        return f"{host} does not answer"
    if isinstance(error, requests.exceptions.ConnectionError):
        return f"no connection to {host}"
    return f"{host}: {type(error).__name__}"
