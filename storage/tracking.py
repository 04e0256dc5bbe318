"""Where a run's metrics go: metrics.jsonl always, TensorBoard and Weights & Biases if asked.

Metrics are named group/name; a step is an optimizer step.
"""

import importlib.util
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.console import say
from engine.errors import ResourceError, SettingsError, first_line
from storage.files import PATIENCE_S, append_json_lines, fsync_file, write_atomically

TRACKERS = ("tensorboard", "wandb")  # the names in TRACKING are those of the packages
ANSWER_S = 5.0  # that wandb's server has to answer; wandb itself waits for 90


class MetricsFile:
    """metrics.jsonl, with one JSON object per line.

    A log must never end a run: no method raises if the disk refuses. The rows are then lost, and
    the first failure is reported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._said = False
        self._keep: int | None = None  # the bytes to keep of the file, if it is still to be cut

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""
        try:
            if self._keep is not None:
                self._cut()
            append_json_lines(self.path, rows)
        except (ResourceError, OSError) as error:
            if self._keep is None:
                self._keep = sys.maxsize  # the last line may be incomplete
            self._say_once(error)

    def sync(self) -> int:
        """Flush the file to the disk; returns its size in bytes."""
        try:
            if not self.path.is_file():
                return 0
            fsync_file(self.path)
        except (ResourceError, OSError) as error:
            self._say_once(error)
        return self.path.stat().st_size if self.path.is_file() else 0

    def cut(self, n_bytes: int) -> list[bytes]:
        """Cut the file after the last complete line of its first n_bytes; returns its lines."""
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
                # each append tries again, so only the first try is patient
                write_atomically(self.path, kept, patience_s=0.0 if self._said else PATIENCE_S)
        self._keep = None
        return kept.splitlines()

    def _say_once(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            say(f"Note: {first_line(error)} Training goes on; the log has a gap")


def check_trackers(names: Iterable[str]) -> None:
    """Raise SettingsError with the install command if a tracker's library is missing."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # it is a folder, such as wandb makes
            raise SettingsError(
                f'TRACKING names "{name}", whose library is not installed.\n'
                f"Install it with  pip install -r requirements.txt {name}"
            )


def open_trackers(
    names: Iterable[str], folder: Path, run_id: str, settings: dict[str, Any], step: int
) -> "Trackers":
    """The named trackers of a run that starts or resumes after optimizer step `step`.

    One that can't be opened is reported and left out.
    """
    makers: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
    opened = []
    for name in names:
        try:
            opened.append(makers[name](folder, run_id, settings, step))
        except Exception as error:  # the libraries raise anything
            _say_left_out(makers[name], error)
    return Trackers(opened)


def _say_left_out(kind: type, error: Exception) -> None:
    say(f"Note: {kind.__name__.strip('_')} failed and is left out: {first_line(error)}")


class Trackers:
    """Several trackers as one; one that fails is reported and left out from then on."""

    def __init__(self, trackers: "list[Tracker]") -> None:
        self._trackers = trackers

    def log(self, row: dict[str, Any]) -> None:
        """Record a row of metrics.jsonl."""
        values = {name: value for name, value in row.items() if name != "step"}
        self._each(lambda tracker: tracker.log(row["step"], values))

    def flush(self) -> None:
        """Write what the trackers buffer."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.close())
        self._trackers = []

    def _each(self, act: "Callable[[Tracker], None]") -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                _say_left_out(type(tracker), error)


class _TensorBoard:
    """Event files in the run's folder, for `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, run_id: str, settings: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = step + 1 if step else 0  # hide what a stopped run wrote after its checkpoint
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Online if this machine has an account and wandb's server answers, else in the run's folder.

    WANDB_MODE overrides that.
    """

    def __init__(self, folder: Path, run_id: str, settings: dict[str, Any], step: int) -> None:
        # read at import; without it wandb sends crash reports, even offline
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        wandb.setup(wandb.Settings(silent=True, console="off"))
        mode: Any = os.environ.get("WANDB_MODE")
        mode = mode or ("online" if _has_account(wandb) else "offline")
        if mode == "online" and (fault := _why_unreachable(wandb.setup().settings)):
            mode = "offline"
            say(
                f"Note: {fault}: Weights & Biases stays offline;  wandb sync "
                f"{folder / 'wandb'}/offline-run-*  sends the curves later"
            )
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
        """Do nothing: wandb's own process writes continuously."""

    def close(self) -> None:
        self._run.finish()


Tracker = _TensorBoard | _WeightsAndBiases


def _has_account(wandb: Any) -> bool:
    """Whether WANDB_API_KEY or `wandb login` has set a key; sends nothing and asks nobody."""
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # before 0.31, login() always asks
        return bool(wandb.api.api_key)


def _why_unreachable(settings: Any) -> str | None:
    """Why wandb's server can't be reached; None if it answers, whatever it says.

    It has ANSWER_S seconds, or those of WANDB_INIT_TIMEOUT.
    """
    import requests

    seconds = float(os.environ.get("WANDB_INIT_TIMEOUT") or ANSWER_S)
    proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
    answers: queue.Queue[str | None] = queue.Queue()

    def ask() -> None:
        try:
            requests.head(settings.base_url, timeout=seconds, proxies=proxies).close()
        except requests.exceptions.SSLError:  # wandb may know certificates that requests does not
            answers.put(None)
        except (requests.exceptions.RequestException, OSError) as error:
            slow = isinstance(error, requests.exceptions.Timeout)
            answers.put(late if slow else f"{host} can't be reached")
        else:
            answers.put(None)

    host = urlsplit(settings.base_url).hostname
    late = f"{host} does not answer within {seconds:g} s"
    # in a thread, for name resolution has no timeout
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return late
