"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if asked.

Names have the form group/name; the step is the optimizer step.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from engine.console import say
from engine.errors import ResourceError, SettingsError, first_line
from storage.files import PATIENCE_S, append_json_lines, fsync_file, write_atomically

TRACKERS = {  # name in TRACKING: (module, what to install)
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
}


class MetricsFile:
    """metrics.jsonl: a JSON object a line. What the disk refuses is said once and left out.

    A log must never end a run, so no method raises for the disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._said = False
        self._keep: int | None = None  # the bytes that a cut still owed is to keep

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows at the end."""
        try:
            if self._keep is not None:
                self._cut()
            append_json_lines(self.path, rows)
        except (ResourceError, OSError) as error:
            if self._keep is None:
                self._keep = sys.maxsize  # a full disk may have taken half a line
            self._say_once(error)

    def sync(self) -> int:
        """Bring what was appended onto the disk; returns the file's size in bytes."""
        try:
            if not self.path.is_file():
                return 0
            fsync_file(self.path)
        except (ResourceError, OSError) as error:
            self._say_once(error)
        return self.path.stat().st_size if self.path.is_file() else 0

    def cut(self, n_bytes: int) -> list[bytes]:
        """Keep the whole lines among the first n_bytes and return them: the rest is done anew."""
        self._keep = n_bytes
        try:
            return self._cut()
        except (ResourceError, OSError) as error:
            self._say_once(error)
            return []

    def _cut(self) -> list[bytes]:
        kept = b""
        if self.path.is_file():
            content = self.path.read_bytes()
            kept = content[: self._keep]
            kept = kept[: kept.rfind(b"\n") + 1]
            if kept != content:
                # each append tries it again: what was refused once is not waited for any more
                write_atomically(self.path, kept, patience_s=0.0 if self._said else PATIENCE_S)
        self._keep = None
        return kept.splitlines()

    def _say_once(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            say(f"Note: {first_line(error)} Training goes on; the log has a gap")


class Tracker(Protocol):
    """A service that draws curves."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Note numbers of a step."""

    def flush(self) -> None:
        """Write what is held in memory."""

    def close(self) -> None:
        """Bring everything to its end."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise SettingsError with the install command where a tracker's library is missing."""
    for name in names:
        module, package = TRACKERS[name]
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:  # a folder of that name, such as wandb makes
            raise SettingsError(
                f'TRACKING names "{name}", whose library is not installed.\n'
                f"Install it with  pip install -r requirements.txt {package}"
            )


def open_trackers(
    names: Iterable[str], folder: Path, run_id: str, settings: dict[str, Any], step: int
) -> "Trackers":
    """The named trackers of a run that begins, or goes on, after optimizer step `step`.

    One that can't be opened is said and left out.
    """
    makers = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(makers[name](folder, run_id, settings, step))
        except Exception as error:  # a library's own, of whatever kind
            _say_left_out(makers[name], error)
    return Trackers(opened)


def _say_left_out(kind: type, error: Exception) -> None:
    say(f"Note: {kind.__name__.strip('_')} failed and is left out: {first_line(error)}")


class Trackers:
    """Several trackers as one; one that fails is said and left, for training is worth more."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, row: dict[str, Any]) -> None:
        """Pass on a row of metrics.jsonl."""
        values = {name: value for name, value in row.items() if name != "step"}
        self._each(lambda tracker: tracker.log(row["step"], values))

    def flush(self) -> None:
        """Let every tracker write what it holds, as a checkpoint is made."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Bring every tracker to its end."""
        self._each(lambda tracker: tracker.close())
        self._trackers = []

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                _say_left_out(type(tracker), error)


class _TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs` shows them."""

    def __init__(self, folder: Path, run_id: str, settings: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a stopped run wrote past its checkpoint, or before it had one, is not shown
        purge = step + 1 if step else 0
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Offline in the run's folder (`wandb sync` sends it) unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, run_id: str, settings: dict[str, Any], step: int) -> None:
        # read when it is imported; else it reports to its makers, offline too
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        wandb.setup(wandb.Settings(silent=True, console="off"))
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_account(wandb) else "offline")
        self._run = wandb.init(
            project="gpt",
            name=folder.name,
            id=run_id,
            dir=str(folder),
            config=settings,
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        """Its own process writes all the time."""

    def close(self) -> None:
        self._run.finish()


def _has_account(wandb: Any) -> bool:
    """Whether this machine has a key for wandb, in WANDB_API_KEY or from `wandb login`.

    Nothing is sent, and nobody is asked.
    """
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # before 0.31, login() always asks
        return bool(wandb.api.api_key)
