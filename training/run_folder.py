"""The folder that a run leaves: which one it is, whether it goes on or begins, and its lock.

A run may go on where everything that its numbers depend on is as it was: model, training, seed,
precision, tokenizer and text. What may change, and is recorded, is how long it is, how it is
watched and which machine it uses.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BusyError, CheckpointError, ResourceError, RunFinished
from engine.settings import shown
from storage.files import (
    FolderLock,
    make_folder,
    make_new_folder,
    remove_file,
    remove_orphans,
    write_atomically,
    write_json,
)
from training_utils import TrainingConfig

SETTINGS, DATA, SUMMARY = "settings.json", "data.json", "summary.json"
MOST_SETTINGS_BYTES = 1 << 24
# the hyper-parameters that a run's numbers depend on
FIXED = (
    "time_budget_minutes",
    "batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "stride",
    "sampling",
    "train_ratio",
)
# those that may change on the way; num_epochs and max_steps only for more
CHANGEABLE = (
    "num_epochs",
    "max_steps",
    "eval_freq",
    "eval_iter",
    "patience",
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "start_context",
    "num_workers",
    "activation_checkpointing",
)
SETTINGS_CHANGEABLE = (
    "DEVICE",
    "COMPILE",
    "PARALLEL",
    "LOG_EVERY",
    "TRACKING",
    "NIGHT_MODE",
    "sampling_params",
)
# what is worked out at each start, and changes the last digits of the numbers
NUMERIC = ("device", "ranks", "parallel", "threads", "micro_batch", "compiled", "torch")


@dataclass
class RunFolder:
    """A run's place on the disk; opened() makes or continues it, and nothing is there before."""

    path: Path
    named: bool  # the user chose the folder
    saved: dict[str, Any] | None = None  # settings.json of the run that goes on
    notes: list[str] = field(default_factory=list)  # to be said when training begins
    settings: dict[str, Any] = field(default_factory=dict)  # settings.json of this run
    data: dict[str, Any] = field(default_factory=dict)  # the report on the text
    tokenizer_file: Path | None = None
    new_name: str = ""  # of the folder where a run that was found is passed over
    # more that were found: they go on where the text is theirs and not the first one's
    others: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    _is_there: bool = False  # opened() has been here before
    _lock: FolderLock | None = None

    @property
    def run_id(self) -> str:
        """What the run's checkpoints are known by."""
        return self.settings["run_id"]

    def describe(
        self, settings: dict[str, Any], data: dict[str, Any], tokenizer_file: Path
    ) -> None:
        """Take what the folder is to tell of the run; a run that goes on keeps its identity."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        identity = {"run_id": secrets.token_hex(8), "started": now, "changes": []}
        if self.saved is not None:
            identity = {name: self.saved[name] for name in identity}
            changed = _changes(self.saved, settings)
            if changed:
                identity["changes"] = [*identity["changes"], {"at": now} | changed]
            self.notes += [
                f"{name} was {shown(changed[name][0])} and is {shown(changed[name][1])}: from here "
                "on the numbers are not bit for bit those of an undisturbed run"
                for name in NUMERIC
                if name in changed
            ]
        self.settings = identity | settings
        self.data, self.tokenizer_file = data, tokenizer_file

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder's lock, within another opened() too; makes the folder where it is new.

        Raises BusyError where another program holds it, ResourceError where the disk won't have
        it.
        """
        if self._lock is not None:
            yield
            return
        is_new = self.saved is None and not self._is_there
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
            self._write()
            self._lock, self._is_there = lock, True
            try:
                yield
            finally:
                self._lock = None

    def note_micro_batch(self, n_windows: int) -> None:
        """Keep in settings.json how many windows at a time there is memory for.

        It is kept at once and not with the next checkpoint: the steps since the last one would
        run out of memory again.
        """
        change = {
            "at": time.strftime("%Y-%m-%d %H:%M:%S"),
            "micro_batch": [self.settings["micro_batch"], n_windows],
        }
        changes = [*self.settings["changes"], change]
        self.settings = self.settings | {"micro_batch": n_windows, "changes": changes}
        write_json(self.path / SETTINGS, self.settings)

    def _write(self) -> None:
        # the settings come last: a folder that has them has everything
        write_atomically(self.path / "tokenizer.json", self.tokenizer_file.read_bytes())
        write_json(self.path / DATA, self.data)
        remove_file(self.path / SUMMARY)
        write_json(self.path / SETTINGS, self.settings)

    def check_text(self, tokenizer_id: str, tokens_sha256: str) -> None:
        """Compare the text and tokenizer of a run that goes on with those at hand.

        Where they differ, a run that was named raises CheckpointError, and one that was found
        is passed over: for another that was found, or for a new folder.
        """
        if self.saved is None:
            return
        now = {"tokenizer": tokenizer_id, "text": tokens_sha256}
        if self.named:
            if differing := _text_differences(self.path, now):
                raise _differs(self.path, differing)
            return
        passed_over = []
        for path, saved in [(self.path, self.saved), *self.others]:
            try:
                differing = _text_differences(path, now)
            except CheckpointError as error:
                differing = [str(error)]
            if not differing:
                self.path, self.saved = path, saved
                return
            passed_over.append(_passed_over(path, differing))
        self.notes += passed_over[:1]
        self.path, self.saved = self.path.with_name(self.new_name), None


def choose_run(
    asked: dict[str, Any],
    *,
    output_dir: Path,
    run_name: str | None,
    resume: str | bool,
    new_name: str,
    data: object,
) -> RunFolder:
    """The folder that a run with these settings goes to, by RESUME and RUN_NAME.

    asked has what settings.json will have under "asked", data what it will have of DATA. Raises
    CheckpointError with what differs where a named run can't go on, RunFinished where it has
    nothing left to do.
    """
    if isinstance(resume, str) and resume != "auto":
        path = Path(resume).expanduser()
        if path.is_file():
            raise CheckpointError(
                f"RESUME = {shown(resume)} is a file; runs are folders, with {SETTINGS} in them.\n"
                "Files such as .pt can run code when they are opened, so this one was not."
            )
        if not (path / SETTINGS).is_file():
            raise CheckpointError(
                f"RESUME = {shown(resume)}: there is no run (looked for {path / SETTINGS}).\n"
                'Set RESUME to a run\'s folder, such as those in OUTPUT_DIR, or to "auto".'
            )
        return _continue_named(path, asked)
    if run_name is not None:
        path = output_dir / run_name
        if not _is_taken(path):
            return RunFolder(path, named=True)
        holds_a_run = (path / SETTINGS).is_file()
        if resume is False or not holds_a_run:
            why = "RESUME is False" if holds_a_run else "it holds no run"
            raise CheckpointError(
                f"the folder {path} is already there, and {why}.\n"
                "Choose another RUN_NAME, or move the folder away."
            )
        return _continue_named(path, asked)
    if resume == "auto":
        return _find_unfinished(output_dir, asked, data, new_name)
    return RunFolder(output_dir / new_name, named=False)


def read_run_settings(path: Path) -> dict[str, Any]:
    """The settings.json of a run; CheckpointError where there is none, or a damaged one."""
    try:
        is_there = (path / SETTINGS).is_file()
    except OSError as error:  # a name that is too long, a folder that is not ours to read
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    if not is_there:
        raise CheckpointError(
            f"{path} is no run (looked for {path / SETTINGS}).\n"
            "A run is a folder that training leaves, such as those in OUTPUT_DIR."
        )
    return _read_json(path / SETTINGS)


def newest_finished_run(output_dir: Path) -> Path:
    """The folder of the run that was finished last; CheckpointError where there is none."""
    finished = []
    for summary in output_dir.glob(f"*/{SUMMARY}"):
        if (summary.parent / SETTINGS).is_file():  # else it is no run of this program
            with contextlib.suppress(FileNotFoundError):  # made longer, it is unfinished again
                finished.append((summary.stat().st_mtime_ns, summary.parent))
    if not finished:
        begun = sorted(path.parent for path in output_dir.glob(f"*/{SETTINGS}"))
        hint = f"{begun[-1]} is unfinished, but can be named." if begun else "Train a model first."
        raise CheckpointError(f"there is no finished run in {output_dir.absolute()}.\n{hint}")
    return max(finished)[1]


def _continue_named(path: Path, asked: dict[str, Any]) -> RunFolder:
    saved = _read_json(path / SETTINGS)
    differing = differences(saved, asked)
    if (path / SUMMARY).exists() and (differing or not _has_more_to_do(path, saved, asked)):
        hint = f" (with other settings: {'; '.join(differing)})" if differing else ""
        raise RunFinished(
            f"The run in {path} is finished{hint}: nothing to do. Another RUN_NAME begins a new "
            "one; more num_epochs, max_steps or, where that ended it, patience goes on with it."
        )
    if differing:
        raise _differs(path, differing)
    return RunFolder(path, named=True, saved=saved)


def _has_more_to_do(path: Path, saved: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a finished run is to be longer, or to have more patience than what ended it."""
    patience, before = asked["training"]["patience"], saved["training"].get("patience")
    is_more_patient = before is not None and (patience is None or patience > before)
    ended_early = _read_json(path / SUMMARY).get("steps", 0) < saved["total_steps"]
    is_longer = _total_steps(saved, asked) > saved["total_steps"]
    return is_more_patient if ended_early else is_longer


def _find_unfinished(
    output_dir: Path, asked: dict[str, Any], data: object, new_name: str
) -> RunFolder:
    """The newest unfinished run with these settings, or a new one that tells why there is none."""
    found, notes = [], []
    for path in output_dir.glob(f"*/{SETTINGS}"):
        if (path.parent / SUMMARY).exists():
            continue
        try:
            found.append((path.parent, _read_json(path)))
        except CheckpointError as error:
            if (path.parent / "checkpoints").is_dir():  # else it is no run of this program
                notes.append(f"{error}: that run is passed over")
    found.sort(key=lambda run: (run[1]["started"], run[0].name), reverse=True)
    fitting = [(path, saved) for path, saved in found if not differences(saved, asked)]
    if fitting:
        # stable: those that were begun with this DATA come first, the newest of them before all
        fitting.sort(key=lambda run: run[1]["settings"]["DATA"] != data)
        (path, saved), *others = fitting
        return RunFolder(
            path, named=False, saved=saved, notes=notes, new_name=new_name, others=others
        )
    notes += [_passed_over(path, differences(saved, asked)) for path, saved in found[:1]]
    return RunFolder(output_dir / new_name, named=False, notes=notes)


def _text_differences(path: Path, now: dict[str, str]) -> list[str]:
    """What of the tokenizer and the text is not as it was for the run in a folder."""
    saved = _read_json(path / DATA)
    before = {"tokenizer": saved.get("tokenizer_id"), "text": saved.get("tokens_sha256")}
    return [
        f"{name}: sha256 {str(before[name])[:12]}... then, {now[name][:12]}... now"
        for name in now
        if before[name] != now[name]
    ]


def _passed_over(path: Path, differing: list[str]) -> str:
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"{path} is unfinished, but differs ({differing[0]}{more}): a new run begins"


def _differs(path: Path, differing: list[str]) -> CheckpointError:
    listed = "\n  ".join(differing)
    return CheckpointError(
        f"the run in {path} can't go on with other settings:\n  {listed}\n"
        "Set them back, or choose another RUN_NAME for a new run."
    )


def differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """What keeps a saved run from going on with these settings, a line each.

    A value counts as the same where it was asked for before, or was what it had become.
    """
    before, lines = saved["asked"], []
    usual = TrainingConfig().to_dict()  # for what an earlier version did not have

    def compare(name: str, was: Any, now: Any, became: Any) -> None:
        if now not in (was, became):
            lines.append(f"{name}: {shown(was)} then, {shown(now)} now")

    for name in ("mode", "seed", "tokenizer"):
        compare(name, before[name], asked[name], before[name])
    compare("precision", before["precision"], asked["precision"], saved["precision"]["name"])
    for name in sorted(before["model"].keys() | asked["model"].keys()):
        compare(name, before["model"].get(name), asked["model"].get(name), saved["model"].get(name))
    for name in FIXED:
        if name != "max_length":  # the model's context_length says the same
            then, became = (kept["training"].get(name, usual[name]) for kept in (before, saved))
            compare(name, then, asked["training"][name], became)
    total = _total_steps(saved, asked)
    if total < saved["total_steps"]:
        lines.append(
            f"total steps: {saved['total_steps']:,} then, {total:,} now (more is possible, less "
            "is not)"
        )
    return lines


def _total_steps(saved: dict[str, Any], asked: dict[str, Any]) -> int:
    """The optimizer steps that a saved run has by the settings that are asked for now."""
    length = asked["length"]
    by_time = length["num_epochs"] is None and length["max_steps"] is None
    if by_time or length == saved["asked"]["length"]:
        return saved["total_steps"]
    total = length["max_steps"] or length["num_epochs"] * saved["steps_per_epoch"]
    return min(total, length["at_most"] or total)


def _changes(saved: dict[str, Any], settings: dict[str, Any]) -> dict[str, list]:
    """What of the changeable settings is not as it was: name -> [then, now]."""
    pairs = {
        name: (saved["training"].get(name), settings["training"].get(name)) for name in CHANGEABLE
    }
    pairs |= {
        name: (saved["settings"].get(name), settings["settings"].get(name))
        for name in SETTINGS_CHANGEABLE
    }
    pairs |= {
        name: (saved.get(name), settings.get(name))
        for name in ("device", "threads", "torch", "total_steps")
    }
    for name in ("micro_batch", "compiled"):
        if name in saved:  # earlier versions kept none
            pairs[name] = saved[name], settings.get(name)
    for name, alone in (("ranks", 1), ("parallel", "none")):  # which all were in those
        pairs[name] = saved.get(name, alone), settings.get(name, alone)
    return {name: [was, now] for name, (was, now) in pairs.items() if was != now}


def _is_taken(path: Path) -> bool:
    """Whether a folder holds anything but what a start that was killed at once may leave."""
    try:
        return path.exists() and any(
            not entry.name.startswith(".") and entry.name not in (DATA, "tokenizer.json")
            for entry in path.iterdir()
        )
    except NotADirectoryError:
        raise ResourceError(
            f"can't make the folder {path}: it is a file.\nChoose another RUN_NAME."
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run; CheckpointError where it is damaged or of another program."""
    try:
        if path.name == SETTINGS and path.stat().st_size > MOST_SETTINGS_BYTES:
            raise ValueError("it is too long")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not _has_shape(value, _SHAPE if path.name == SETTINGS else {}):
        raise CheckpointError(f"{path} was not written by this version of the program")
    return value


_SHAPE = {  # what is read from settings.json, whoever may have edited it
    "run_id": str,
    "started": str,
    "changes": list,
    "asked": {
        "mode": str,
        "seed": int,
        "precision": str,
        "tokenizer": str,
        "model": dict,
        "training": dict,
        "length": dict,
    },
    "settings": {"DATA": object, "NIGHT_MODE": bool},
    "model": dict,
    "training": dict,
    "precision": {"name": str},
    "threads": int,
    "stood_in": bool,
    "total_steps": int,
    "steps_per_epoch": int,
}


def _has_shape(value: object, shape: dict | type) -> bool:
    """Whether a JSON value has the names that a shape has, with values of their types."""
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    return isinstance(value, dict) and all(
        name in value and _has_shape(value[name], part) for name, part in shape.items()
    )
