"""The cache folder: what a later run need not download, prepare or measure again."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from engine.console import say
from engine.errors import ResourceError, first_line
from storage.files import make_folder, remove_folder, write_atomically

# of the entries together: the smaller of these bytes and this share of the disk
MOST_BYTES, DISK_SHARE = 20 * 10**9, 0.1
UNUSED_S = 30 * 24 * 3600  # a run that began since then may still read its entry
CACHE = Path(__file__).resolve().parent.parent / "cache"
# tells backup programs that a folder is a cache (bford.info/cachedir)
CACHE_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n"


def usable_cache() -> Path:
    """The cache folder, or a temporary one if that can't be written (in a read-only checkout)."""
    try:
        make_folder(CACHE)
        write_atomically(CACHE / "CACHEDIR.TAG", CACHE_TAG)
    except ResourceError as error:
        instead = _temporary_cache()
        say(f"Note: {first_line(error)} {instead} serves as cache")
        return instead
    return CACHE


def _temporary_cache() -> Path:
    """A temporary folder that is this user's alone: the same one each time, or a new one where
    another user has taken its name."""
    user = os.getuid() if hasattr(os, "getuid") else ""  # Windows has a folder for each user
    folder = Path(tempfile.gettempdir()) / f"gpt-trainer-cache-{user}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if user in ("", folder.lstat().st_uid):
            return folder
    return Path(tempfile.mkdtemp(prefix="gpt-trainer-cache-"))


def note_use(entry: Path) -> None:
    """Note that a folder of the cache is used now; on a disk that refuses, it counts as old."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def keep_within_limit(entries: Iterable[Path], in_use: Path) -> None:
    """Remove folders of the cache that were not used for UNUSED_S, if all exceed the limit.

    The least recently used go first, and in_use stays. A line says how many.
    """
    sizes, used_at = {}, {}
    for entry in entries:
        with contextlib.suppress(OSError):  # another process was faster
            sizes[entry] = sum(file.stat().st_size for file in entry.iterdir())
            used_at[entry] = entry.stat().st_mtime
    total = sum(sizes.values())
    limit = min(MOST_BYTES, int(DISK_SHARE * shutil.disk_usage(in_use).total))
    removed = []
    for entry in sorted(used_at, key=used_at.__getitem__):
        if total <= limit or time.time() - used_at[entry] < UNUSED_S:
            break
        if entry != in_use and remove_folder(entry):  # False: a program has it open, on Windows
            removed.append(entry)
            total -= sizes[entry]
    if removed:
        freed = sum(sizes[entry] for entry in removed)
        say(
            f"Note: {in_use.parent} has outgrown {limit / 1e9:.3g} GB: {len(removed)} "
            f"text{'s' * (len(removed) != 1)} not used for a month removed ({freed / 1e9:.3g} GB)"
        )
