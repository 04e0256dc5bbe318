"""Texts by name or URL: from this repository, or downloaded once and verified."""

import hashlib
import ipaddress
import queue
import random
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from engine.errors import DataError, PipelineError
from engine.words import Words
from storage.files import (
    RESERVED,
    NewFile,
    is_portable_name,
    make_folder,
    write_atomically,
    write_json,
)

GITHUB = "https://raw.githubusercontent.com/"
REPOSITORY = Path(__file__).resolve().parent.parent
CONNECT_TIMEOUT_S = 3.0  # of one connection attempt
ANSWER_DEADLINE_S = 5.5  # for name resolution, connection and the first bytes
DOWNLOAD_DEADLINE_S = 60.0  # for a file, and one second more for every SLOWEST_BYTES of it
SLOWEST_BYTES = 50_000
TRIES = 3  # if a server answers that it is busy; an unreachable one is tried once
MAX_REDIRECTS = 5
LONGEST_NAME = 60  # characters; systems allow 255 bytes for a name, or 260 for a path
DISK_SHARE = 0.9  # of the free space that a download may fill


@dataclass(frozen=True)
class Corpus:
    """A text by name: a file in corpus/, or a URL with the sha256 of its content."""

    file_name: str
    url: str | None = None
    sha256: str | None = None
    stand_in: str | None = None  # the corpus to use if the download fails


CORPORA = {
    "the-verdict": Corpus(
        file_name="the-verdict.txt",
        url=GITHUB + "rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
        sha256="b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        stand_in="sample-en",
    ),
    "tiny-shakespeare": Corpus(
        file_name="tiny-shakespeare.txt",
        url=GITHUB + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "sample-en": Corpus("sample-en.txt"),
    "sample-zh": Corpus("sample-zh.txt"),
    "dummy": Corpus("dummy.txt"),
}


class DownloadError(DataError):
    """A download that failed, or gave another file."""


def corpus_path(name: str, cache: Path, stand_in: bool | None = None) -> tuple[Path, Words | None]:
    """The file of a named corpus, made or downloaded into the cache folder at first use.

    Returns the path and, if it is that of the corpus's stand-in, a notice. stand_in True takes the
    stand-in if there is one, False never does, None does if the download fails. Raises DataError
    if the download fails and no stand-in may be used.
    """
    corpus = CORPORA[name]
    if stand_in and corpus.stand_in is not None:
        instead, _ = corpus_path(corpus.stand_in, cache)
        return instead, Words(
            f"corpus/{instead.name} stands in for {name}, as when this run began",
            f"corpus/{instead.name} 代替 {name}，与本次运行开始时一样",
        )
    path = cache / "corpora" / corpus.file_name
    if name == "dummy":
        return _dummy(path), None
    if corpus.url is None:
        return REPOSITORY / "corpus" / corpus.file_name, None
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
        return instead, Words(
            f"{name} can't be had ({error}): corpus/{instead.name} stands in for it",
            f"无法下载 {name}：用 corpus/{instead.name} 代替",
        )
    return path, None


def fetch_address(url: str, cache: Path) -> Path:
    """The file at an http(s) URL, downloaded into the cache folder at first use.

    Delete the cached file to download it again. Raises DataError.
    """
    folder = cache / "downloads" / hashlib.sha256(url.encode("utf-8")).hexdigest()[:16]
    sidecar = folder.with_suffix(".json")  # not in the folder: the file may have any name
    try:
        path = folder / _file_name(urlsplit(url).path)
        if path.is_file() and sidecar.is_file():
            return path
        sha256 = download(url, path)
    except (DownloadError, ValueError) as error:  # ValueError: urlsplit's, for an invalid URL
        raise DownloadError(
            f"{url} can't be had: {error}.\nWithout a network, download it elsewhere and set DATA "
            "to the file."
        ) from error
    write_json(sidecar, {"url": url, "sha256": sha256, "bytes": path.stat().st_size})
    return path


def _file_name(address: str) -> str:
    """A file name from the path of a URL, valid on every system."""
    last = RESERVED.sub("_", address.rpartition("/")[2]).rstrip(". ")
    last = last[-LONGEST_NAME:]  # keeps the suffix
    return last if is_portable_name(last) else f"index{last}"


def _dummy(path: Path) -> Path:
    """A file of random words, the same each time, for quick trials."""
    if not path.is_file():
        chooser = random.Random(0)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(chooser.choices(letters, k=chooser.randint(2, 9))) for _ in range(1000)]
        lines = (" ".join(chooser.choices(words, k=12)) for _ in range(3000))
        make_folder(path.parent)
        write_atomically(path, ("\n".join(lines) + "\n").encode("ascii"))
    return path


def download(url: str, path: Path, sha256: str | None = None) -> str:
    """Download a URL into a file, which appears complete and durable, or not at all.

    Gives up on an unreachable server within 6 s, and after TRIES answers of 429 or 5xx. Returns
    the sha256 of the content; raises DownloadError, also if it is not the expected sha256.
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
    """Make one request, in a thread: name resolution has no timeout.

    Returns the status, the body's sha256 and the URL after redirects.
    """
    answers: queue.Queue[Any] = queue.Queue()  # "alive", then _save()'s result or exception
    stop = threading.Event()

    def transfer() -> None:
        try:
            answers.put(_save(url, path, sha256, answers, stop))
        except Exception as error:  # _get() raises it
            answers.put(error)

    threading.Thread(target=transfer, daemon=True).start()
    host = urlsplit(url).hostname
    try:
        answer = answers.get(timeout=ANSWER_DEADLINE_S)
        while answer == "alive":  # _save() has a deadline of its own, and reads time out after 5 s
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


def _save(
    url: str, path: Path, sha256: str | None, answers: queue.Queue[Any], stop: threading.Event
) -> tuple[int, str, str]:
    """Download a URL into a file, with an "alive" into answers for every chunk."""
    import requests  # takes 0.06 s

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
    host = urlsplit(url).hostname
    digest, received = hashlib.sha256(), 0
    room = DISK_SHARE * shutil.disk_usage(path.parent).free
    with response, NewFile(path) as file:
        for chunk in response.iter_content(256 * 1024):
            answers.put("alive")
            digest.update(chunk)
            received += len(chunk)
            allowed_s = DOWNLOAD_DEADLINE_S + received / SLOWEST_BYTES
            if stop.is_set() or time.monotonic() - started_at > allowed_s:
                raise DownloadError(f"{host} is too slow")
            if received > room:
                raise DownloadError(f"{host} sends more than the disk can take")
            if response.status_code == 200:
                is_page = chunk[:64].lstrip().lower().startswith((b"<!doc", b"<html"))
                if is_page and received == len(chunk) and path.suffix not in (".html", ".htm"):
                    raise DownloadError(f"{host} sent a web page, not the text")
                file.write(chunk)
        if response.status_code != 200 or sha256 not in (None, digest.hexdigest()):
            file.discard()
    return response.status_code, digest.hexdigest(), url


def _redirected(url: str, location: str) -> str:
    """The target of a redirect; DownloadError if it is less secure or in the local network."""
    target = urljoin(url, location)
    before, after = urlsplit(url), urlsplit(target)
    refusal = f"{before.hostname} redirects to {after.scheme}://{after.hostname or ''}"
    if after.scheme not in ("http", "https") or (before.scheme, after.scheme) == ("https", "http"):
        raise DownloadError(f"{refusal}, which is not followed")
    if _is_inside(after.hostname) and not _is_inside(before.hostname):
        raise DownloadError(f"{refusal}, an address of this machine's own network")
    return target


def _is_inside(host: str | None) -> bool:
    """Whether a host is "localhost" or an IP address of this machine or its network."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return host == "localhost"
    return address.is_private or address.is_link_local or address.is_loopback


def _reason(url: str, error: Exception) -> str:
    """Why a request failed, in a few words."""
    import requests

    host = urlsplit(url).hostname
    proxy, kinds = f"{urlsplit(url).scheme.upper()}_PROXY", requests.exceptions
    reasons = (
        (kinds.ProxyError, f"the proxy set in {proxy} does not let {host} through"),
        (kinds.SSLError, f"the certificate of {host} is not trusted; see REQUESTS_CA_BUNDLE"),
        ((kinds.ConnectTimeout, kinds.ReadTimeout), f"{host} does not answer"),
        (kinds.ChunkedEncodingError, f"{host} broke off in the middle"),
        (kinds.ConnectionError, f"no connection to {host}"),
        (Exception, f"{host}: {type(error).__name__}: {error}"),
    )
    return next(reason for kind, reason in reasons if isinstance(error, kind))
