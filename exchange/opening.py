"""Open a model by where it is."""

import os
from pathlib import Path

from engine.errors import SettingsError
from engine.settings import shown
from exchange.pretrained import Pretrained
from exchange.saved_run import is_run, open_run


def open_pretrained(where: str) -> Pretrained:
    """A run, of which it opens the best weights.

    A relative path is taken from the working directory. Raises SettingsError for a name that can't
    be, CheckpointError for damaged files.
    """
    path = Path(os.path.expanduser(where))
    if is_run(path):
        return open_run(path)
    raise SettingsError(f"{shown(where)} is no model: it is no run's folder.")
