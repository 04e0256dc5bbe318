"""Named texts and addresses: what lies in this repository, and what is fetched once and checked."""

import hashlib
import ipaddress
import queue
import random
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from engine.errors import DataError, PipelineError
from storage.files import (
    RESERVED,
    NewFile,
    is_portable_name,
    make_folder,
    write_atomically,
    write_json,
)

REPOSITORY = Path(__file__).resolve().parent.parent
CONNECT_TIMEOUT_S = 3.0  # for one connection attempt
ANSWER_DEADLINE_S = 5.5  # name resolution, connection and the first bytes together
DOWNLOAD_DEADLINE_S = 60.0  # for the whole file, and a second more for each SLOWEST_BYTES of it
SLOWEST_BYTES = 50_000
TRIES = 3  # of a server that answers "busy"; an unreachable one is tried once
MAX_REDIRECTS = 5
LONGEST_NAME = 60  # characters of a file's; a system may allow 255 bytes, and 260 for a path
DISK_SHARE = 0.9  # of what is free: a file without end must not fill the disk


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
    "tiny-shakespeare": Corpus(
        file_name="tiny-shakespeare.txt",
        url=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
            "data/tinyshakespeare/input.txt"
        ),
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "sample-en": Corpus("sample-en.txt"),
    "sample-zh": Corpus("sample-zh.txt"),
    "dummy": Corpus("dummy.txt"),
}


class DownloadError(DataError):
    """A file that could not be fetched whole and right."""


def corpus_path(name: str, cache: Path, stand_in: bool | None = None) -> tuple[Path, str | None]:
    """The file of a named corpus, made or fetched into the cache folder at first use.

    Returns the path and, where its stand-in takes its place, the line that says so. With stand_in
    True it does, where there is one, with False never, with None where the text can't be had.
    Raises DataError where the text can't be had and nothing may stand in.
    """
    corpus = CORPORA[name]
    if stand_in and corpus.stand_in is not None:
        instead, _ = corpus_path(corpus.stand_in, cache)
        return instead, f"corpus/{instead.name} stands in for {name}, as when this run began"
    if name == "dummy":
        return _dummy(cache / "corpora" / corpus.file_name), None
    if corpus.url is None:
        return REPOSITORY / "corpus" / corpus.file_name, None
    path = cache / "corpora" / corpus.file_name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == corpus.sha256:
        return path, None
    try:
        download(corpus.url, path, corpus.sha256)
    except DownloadError as error:
        if corpus.stand_in is None or stand_in is False:
            raise DownloadError(
                f"{name} can't be had: {error}.\nWithout a network, download {corpus.url}\n"
                f"elsewhere and save it as {path}."
            ) from error
        instead, _ = corpus_path(corpus.stand_in, cache)
        return (
            instead,
            f"{name} can't be had ({error}): corpus/{instead.name} stands in for it",
        )
    return path, None


def fetch_address(url: str, cache: Path) -> Path:
    """The file at an http(s) address, fetched into the cache folder at first use.

    It is kept under a name of its own; delete that to fetch the address anew. Raises DataError.
    """
    folder = cache / "downloads" / hashlib.sha256(url.encode("utf-8")).hexdigest()[:16]
    sidecar = folder.with_suffix(".json")  # beside it: the file itself may have any name
    try:
        path = folder / _file_name(urlsplit(url).path)
        if path.is_file() and sidecar.is_file():
            return path
        sha256 = download(url, path)
    except (DownloadError, ValueError) as error:  # ValueError: urlsplit's, for what is no address
        raise DownloadError(
            f"{url} can't be had: {error}.\nWithout a network, download it elsewhere and set DATA "
            "to the file."
        ) from error
    write_json(sidecar, {"url": url, "sha256": sha256, "bytes": path.stat().st_size})
    return path


def _file_name(address: str) -> str:
    """The last part of an address's path, as a file may be called on every system."""
    last = RESERVED.sub("_", address.rpartition("/")[2]).rstrip(". ")
    last = last[-LONGEST_NAME:]  # its end tells what it is
    return last if is_portable_name(last) else f"index{last}"


def _dummy(path: Path) -> Path:
    """Random words, the same each time: for trying the machinery, not for learning anything."""
    if not path.is_file():
        chooser = random.Random(0)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(chooser.choices(letters, k=chooser.randint(2, 9))) for _ in range(1000)]
        lines = (" ".join(chooser.choices(words, k=12)) for _ in range(3000))
        make_folder(path.parent)
        write_atomically(path, ("\n".join(lines) + "\n").encode("ascii"))
    return path


# -------------------------------------------------------------------------------- downloads


def download(url: str, path: Path, sha256: str | None = None) -> str:
    """Fetch an address into a file, which appears whole, right and durable, or not at all.

    An unreachable server is given up on after one attempt, within 6 s with name resolution; one
    that answers 429 or 5xx is asked again, TRIES times in all. Returns the sha256 of what came;
    raises DownloadError, also where it is not the sha256 that was wanted.
    """
    make_folder(path.parent)
    for attempt in range(TRIES):
        status, found, target = _get(url, path, sha256)
        if not (status == 429 or status >= 500) or attempt == TRIES - 1:
            break
        time.sleep(2**attempt)
    host = urlsplit(target).hostname
    if status != 200:
        raise DownloadError(f"{host} answered {status}")
    if sha256 is not None and found != sha256:
        raise DownloadError(f"{host} sent another file: sha256 {found} in place of {sha256}")
    return found


def _get(url: str, path: Path, sha256: str | None) -> tuple[int, str, str]:
    """One request, in a thread: name resolution has no time limit of its own to set.

    Returns status, sha256 of the body and the address that gave it, after redirects.
    """
    answers: queue.Queue = queue.Queue()
    stop = threading.Event()
    transfer = threading.Thread(
        target=_transfer, args=(url, path, sha256, answers, stop), daemon=True
    )
    transfer.start()
    host = urlsplit(url).hostname
    try:
        answer = answers.get(timeout=ANSWER_DEADLINE_S)
        while answer == "alive":  # the transfer keeps its own deadline, and reads stop after 5 s
            answer = answers.get(timeout=DOWNLOAD_DEADLINE_S)
    except queue.Empty:
        raise DownloadError(f"{host} does not answer") from None
    finally:
        stop.set()
    if isinstance(answer, PipelineError):
        raise answer
    if isinstance(answer, Exception):
        raise DownloadError(_reason(url, answer)) from answer
    return answer


def _transfer(
    url: str,
    path: Path,
    sha256: str | None,
    answers: queue.Queue,
    stop: threading.Event,
) -> None:
    """Put "alive" at each sign of life, then (status, sha256, address) or an exception."""
    try:
        answers.put(_save(url, path, sha256, answers, stop))
    except Exception as error:  # for the thread that waits; none is lost here
        answers.put(error)


def _save(
    url: str,
    path: Path,
    sha256: str | None,
    answers: queue.Queue,
    stop: threading.Event,
) -> tuple[int, str, str]:
    import requests  # 0.06 s that only a download needs to spend

    started_at = time.monotonic()
    for _ in range(MAX_REDIRECTS):
        response = requests.get(
            url, stream=True, timeout=(CONNECT_TIMEOUT_S, 5.0), allow_redirects=False
        )
        if not response.is_redirect:
            break
        response.close()
        url = _redirected(url, response.headers["location"])
    else:
        raise DownloadError(f"{urlsplit(url).hostname} redirects in a circle")
    answers.put("alive")
    digest, received = hashlib.sha256(), 0
    room = DISK_SHARE * shutil.disk_usage(path.parent).free
    with response, NewFile(path) as file:
        for chunk in response.iter_content(256 * 1024):
            answers.put("alive")
            digest.update(chunk)
            received += len(chunk)
            allowed_s = DOWNLOAD_DEADLINE_S + received / SLOWEST_BYTES
            if stop.is_set() or time.monotonic() - started_at > allowed_s:
                raise DownloadError(f"{urlsplit(url).hostname} is too slow")
            if received > room:
                raise DownloadError(f"{urlsplit(url).hostname} sends more than the disk can take")
            if response.status_code == 200:
                _refuse_web_page(received == len(chunk), chunk, path, url)
                file.write(chunk)
        wrong = sha256 is not None and digest.hexdigest() != sha256
        if response.status_code != 200 or wrong:
            file.discard()
    return response.status_code, digest.hexdigest(), url


def _refuse_web_page(is_first: bool, chunk: bytes, path: Path, url: str) -> None:
    lead = chunk[:64].lstrip().lower()
    if is_first and path.suffix not in (".html", ".htm") and lead.startswith((b"<!doc", b"<html")):
        raise DownloadError(f"{urlsplit(url).hostname} sent a web page, not the text")


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads; DownloadError where a page must not be able to send us there."""
    target = urljoin(url, location)
    before, after = urlsplit(url), urlsplit(target)
    refusal = f"{before.hostname} redirects to {after.scheme}://{after.hostname or ''}"
    if after.scheme not in ("http", "https") or (before.scheme, after.scheme) == (
        "https",
        "http",
    ):
        raise DownloadError(f"{refusal}, which is not followed")
    if _is_inside(after.hostname) and not _is_inside(before.hostname):
        raise DownloadError(f"{refusal}, an address of this machine's own network")
    return target


def _is_inside(host: str | None) -> bool:
    """Whether a host is given as an address of this machine or its network."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return host == "localhost"
    return address.is_private or address.is_link_local or address.is_loopback


def _reason(url: str, error: Exception) -> str:
    """Why a request failed, in a few words."""
    import requests

    host = urlsplit(url).hostname
    exceptions = requests.exceptions
    if isinstance(error, exceptions.ProxyError):
        return f"the proxy set in {urlsplit(url).scheme.upper()}_PROXY does not let {host} through"
    if isinstance(error, exceptions.SSLError):
        return f"the certificate of {host} is not trusted; see REQUESTS_CA_BUNDLE"
    if isinstance(error, exceptions.ConnectTimeout | exceptions.ReadTimeout):
        return f"{host} does not answer"
    if isinstance(error, exceptions.ChunkedEncodingError):
        return f"{host} broke off in the middle"
    if isinstance(error, exceptions.ConnectionError):
        return f"no connection to {host}"
    return f"{host}: {type(error).__name__}: {error}"
