"""The folder of a run: its files and its lock."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.console import say
from engine.errors import BusyError, CheckpointError, ResourceError, SettingsError, first_line
from storage.files import (
    DATA,
    SETTINGS,
    STOP,
    SUMMARY,
    FolderLock,
    make_folder,
    make_new_folder,
    remove_file,
    remove_orphans,
    write_atomically,
    write_json,
)
from training.pace import NewPlan, recorded_plans

if TYPE_CHECKING:
    from planning.decisions import RunRecord


@dataclass
class RunFolder:
    """A run's place on the disk; opened() creates it."""

    path: Path
    named: bool  # the user chose the folder
    goes_on: bool  # an earlier process began the run
    record: "RunRecord"
    data: dict[str, Any]  # the report on the text
    tokenizer_file: Path
    notes: list[str]  # to print when training begins
    # the time.perf_counter() at which this process is to end, of a run of so many minutes
    deadline: float | None = None
    _idle_since: float = field(default_factory=time.perf_counter)
    _is_there: bool = False  # opened() has created it
    _lock: FolderLock | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What settings.json holds."""
        return self.record.to_json()

    @property
    def new_plans(self) -> list[NewPlan]:
        """What has changed the steps of the run on its way; CheckpointError if it is damaged."""
        try:
            return recorded_plans(self.record.changes, self.record.total_steps)
        except SettingsError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self.path / SETTINGS} is damaged: {reason}") from None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """What a script or a notebook does between preparing and training is no time of the run."""
        if self.deadline is not None:
            self.deadline += time.perf_counter() - self._idle_since
        try:
            yield
        finally:
            self._idle_since = time.perf_counter()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder's lock, after creating a new folder; may be nested. Raises BusyError."""
        if self._lock is not None:
            yield
            return
        is_new = not self.goes_on and not self._is_there
        if is_new and not self.named:
            wanted, count = self.path, 1
            while not make_new_folder(self.path):
                count += 1  # another run began in the same second
                self.path = wanted.with_name(f"{wanted.name}-{count}")
        make_folder(self.path)
        with FolderLock(self.path) as lock:
            if is_new and (self.path / SETTINGS).exists():
                raise BusyError(
                    f"another program began a run in {self.path} a moment ago.\n"
                    "Start again to go on with it."
                )
            remove_orphans(self.path)
            # the settings come last: a folder that has them is complete
            write_atomically(self.path / "tokenizer.json", self.tokenizer_file.read_bytes())
            write_json(self.path / DATA, self.data)
            remove_file(self.path / SUMMARY)
            self.take_stop_request()  # one that came too late for the process before
            write_json(self.path / SETTINGS, self.settings)
            self._lock, self._is_there = lock, True
            try:
                yield
            finally:
                self._lock = None

    def take_stop_request(self) -> bool:
        """Whether the folder has a file STOP; removes it, so that it stops no later process."""
        if not os.path.isfile(self.path / STOP):
            return False
        with contextlib.suppress(ResourceError):  # the next process removes it
            remove_file(self.path / STOP)
        return True

    def note_micro_batch(self, n_windows: int) -> None:
        """Write a smaller micro-batch to settings.json, so that a resumed run begins with it."""
        change = {"micro_batch": [self.record.micro_batch, n_windows]}
        self.record = self._changed(change, micro_batch=n_windows)
        try:
            write_json(self.path / SETTINGS, self.settings)
        except ResourceError as error:  # it only saves a resumed run the search
            say(f"Note: {first_line(error)} Training goes on")

    def note_plan(self, plan: NewPlan, write: Callable[[Callable[[], None]], object]) -> None:
        """Write a new plan to settings.json, so that a resumed run repeats it.

        `write` makes the main rank write. If the disk refuses, raises ResourceError and changes
        nothing.
        """
        total = plan.total_steps
        training = dataclasses.replace(self.record.training, max_steps=total)
        record = self._changed(plan.to_json(), total_steps=total, training=training)
        write(lambda: write_json(self.path / SETTINGS, record.to_json()))
        self.record = record

    def _changed(self, change: dict[str, Any], **values: Any) -> "RunRecord":
        """The record with other values, and a change of this moment that says so."""
        change = {"at": time.strftime("%Y-%m-%d %H:%M:%S")} | change
        return dataclasses.replace(self.record, changes=[*self.record.changes, change], **values)
