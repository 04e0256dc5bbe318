"""The cache folder: what a later run need not download, prepare or measure again."""

import tempfile
from pathlib import Path

from engine.console import say
from engine.errors import ResourceError, first_line
from storage.files import make_folder, write_atomically

CACHE = Path(__file__).resolve().parent.parent / "cache"
# tells backup programs that a folder is a cache (bford.info/cachedir)
CACHE_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n"


def usable_cache() -> Path:
    """The cache folder, or a temporary one if that can't be written (in a read-only checkout)."""
    try:
        make_folder(CACHE)
        write_atomically(CACHE / "CACHEDIR.TAG", CACHE_TAG)
    except ResourceError as error:
        instead = Path(tempfile.gettempdir()) / "gpt-trainer-cache"
        say(f"Note: {first_line(error)} {instead} serves as cache")
        make_folder(instead)
        return instead
    return CACHE
