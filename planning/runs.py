"""Which run is resumed: candidates by their settings, then settled by the text that is read."""

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.parallel import Parallel
from engine.errors import CheckpointError, DataError, ResourceError, RunFinished, first_line
from engine.settings import shown
from planning.decisions import (
    RunRecord,
    differences,
    free_differences,
    read_record,
    read_run_file,
    total_steps,
)
from planning.plan import Asked, RunPlan
from storage.files import DATA, SETTINGS, SUMMARY, FolderLock


@dataclass(frozen=True)
class Candidate:
    """A run that is resumed if it has this text."""

    path: Path
    record: RunRecord
    tokenizer: str | None  # its fingerprint, from data.json
    text: str | None  # sha256 of its tokens
    fault: str | None = None  # why data.json can't be read
    is_finished: bool = False  # and nothing more is asked of it

    def differences(self, tokenizer: str, text: str) -> list[str]:
        """How tokenizer and text differ, a line each."""
        if self.fault is not None:
            return [self.fault]
        pairs = {"tokenizer": (self.tokenizer, tokenizer), "text": (self.text, text)}
        return [
            f"{name}: sha256 {str(was)[:12]}... then, {now[:12]}... now"
            for name, (was, now) in pairs.items()
            if was != now
        ]


@dataclass(frozen=True)
class Candidates:
    """The runs that may be resumed, the likeliest first, and the folder of a new one."""

    folder: Path  # of a new run
    named: bool  # the user chose the folder, or the run
    run_id: str  # of a new run
    now: str
    runs: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()  # to print when training begins

    @property
    def likeliest_run(self) -> Candidate | None:
        """The run that is resumed unless the text differs; None: a new run."""
        return next((run for run in self.runs if run.fault is None), None)

    @property
    def likeliest(self) -> RunRecord | None:
        """The record of that run."""
        run = self.likeliest_run
        return None if run is None else run.record

    def stand_in(self, data: object) -> bool | None:
        """Whether the likeliest run read a stand-in for this DATA; None where nothing is known."""
        before = self.likeliest
        return before.stood_in if before and before.settings["DATA"] == data else None

    @contextlib.contextmanager
    def naming_the_run(self, data: object) -> Iterator[None]:
        """Add to an error about the text of this DATA which run was to go on with it."""
        try:
            yield
        except DataError as error:
            if self.runs and self.runs[0].is_finished:
                raise differs(self.runs[0], [f"text: {first_line(error)}"]) from error
            if self.stand_in(data) is None:
                raise
            raise DataError(
                f"{error}\nThe unfinished run {self.runs[0].path} goes on with this text only; "
                "RESUME = False begins a new one."
            ) from error

    def with_text(self, fingerprint: str) -> "Candidates":
        """Those with the likeliest run's recipe, if that was chosen for this text.

        Raises CheckpointError if a named run's was not.
        """

        def text_of(run: Candidate) -> str:
            assert run.record.choice is not None, "these runs have MINUTES"
            return run.record.choice.text.fingerprint

        fitting, notes = self._with("text", text_of, fingerprint)
        chosen = next((run.record.choice for run in fitting if run.fault is None), None)
        same = (run for run in fitting if run.fault is not None or run.record.choice == chosen)
        return dataclasses.replace(self, runs=tuple(same), notes=notes)

    def from_weights(self, fingerprint: str) -> "Candidates":
        """Those that began from these weights; CheckpointError if a named run did not."""

        def weights_of(run: Candidate) -> str:
            assert run.record.start is not None, "these runs have INIT_FROM"
            return run.record.start.fingerprint

        fitting, notes = self._with("the weights of INIT_FROM", weights_of, fingerprint)
        return dataclasses.replace(self, runs=tuple(fitting), notes=notes)

    def of_one_start(self, data: object) -> "Candidates":
        """For INIT_FROM = "auto": those that began as the likeliest one with this DATA did."""
        if self.named:
            return self
        runs = [run for run in self.runs if run.record.settings["DATA"] == data]
        first = next((run.record.start for run in runs if run.fault is None), None)
        same = [run for run in runs if (run.record.start is None) == (first is None)]
        return dataclasses.replace(self, runs=tuple(same))

    def _with(
        self, what: str, of: Callable[[Candidate], str], fingerprint: str
    ) -> tuple[list[Candidate], tuple[str, ...]]:
        """The runs of which something has this fingerprint, and the notes with one on the others.

        Raises CheckpointError if a named run has another one.
        """
        fitting = [run for run in self.runs if of(run) == fingerprint]
        others = [run for run in self.runs if of(run) != fingerprint]
        if not others or fitting:
            return fitting, self.notes
        run, was = others[0], of(others[0])
        differing = [f"{what}: sha256 {was[:12]}... then, {fingerprint[:12]}... now"]
        if self.named:
            raise differs(run, differing)
        return [], (*self.notes, _passed_over(run.path, differing))


@dataclass(frozen=True)
class SettledRun:
    """The folder of a run, and the record of the one that is resumed there."""

    path: Path
    named: bool
    before: RunRecord | None
    notes: tuple[str, ...]


def find_candidates(
    asked: Asked,
    *,
    output_dir: Path,
    run_name: str | None,
    resume: str | bool,
    mode: str,
    settings: dict[str, Any],
) -> Candidates:
    """The runs that these settings may resume; settings is that of settings.json.

    For a named run, raises CheckpointError with what differs, or BusyError.
    """
    now, run_id = time.strftime("%Y-%m-%d %H:%M:%S"), secrets.token_hex(8)
    if isinstance(resume, str) and resume != "auto":
        path = _existing_run(resume, output_dir)
    elif run_name is not None:
        path = output_dir / run_name
        if not _is_taken(path):
            return Candidates(path, True, run_id, now)
        holds_a_run = (path / SETTINGS).is_file()
        if resume is False or not holds_a_run:
            why = "RESUME is False" if holds_a_run else "it holds no run"
            raise CheckpointError(
                f"the folder {path} is already there, and {why}.\n"
                "Choose another RUN_NAME, or move the folder away."
            )
    else:
        is_auto, data = resume == "auto", settings["DATA"]
        runs, notes = _find_unfinished(output_dir, asked, data) if is_auto else ([], [])
        path = output_dir / f"{now.replace(' ', '_').replace(':', '-')}-{mode}"
        return Candidates(path, False, run_id, now, tuple(runs), tuple(notes))
    return Candidates(path, True, run_id, now, (_continue_named(path, asked, settings),))


def candidates_of(plan: RunPlan, parallel: Parallel) -> Candidates:
    """The runs that a plan may resume; ResourceError, early, if OUTPUT_DIR can't be a folder."""
    output_dir = Path(plan.run.OUTPUT_DIR).expanduser()
    existing = next(parent for parent in (output_dir / "x").absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ResourceError(
            f"can't make the folder {output_dir}: {existing} is a file.\n"
            "Set OUTPUT_DIR to another folder."
        )
    return find_candidates(
        plan.asked(),
        output_dir=output_dir,
        run_name=plan.run.RUN_NAME,
        # a restart by torchrun resumes what the job began
        resume=(plan.run.RESUME is False and parallel.noted("run")) or plan.run.RESUME,
        mode=plan.mode,
        settings=plan.settings,
    )


def settle_run(candidates: Candidates, tokenizer: str, text: str) -> SettledRun:
    """The first candidate with this tokenizer and text, or a new run.

    Raises CheckpointError if a named run has another text, RunFinished if it has nothing to do.
    """
    passed_over = []
    for run in candidates.runs:
        differing = run.differences(tokenizer, text)
        if not differing and run.is_finished:
            raise RunFinished(
                f"The run in {run.path} is finished, with these settings and this text: nothing to "
                f"do. Another RUN_NAME begins a new one{_how_longer(run)}."
            )
        if not differing:
            return SettledRun(run.path, candidates.named, run.record, candidates.notes)
        if candidates.named:
            raise differs(run, differing)
        passed_over.append(_passed_over(run.path, differing))
    notes = (*candidates.notes, *passed_over[:1])
    return SettledRun(candidates.folder, candidates.named, None, notes)


def newest_finished_run(output_dir: Path) -> Path:
    """The folder of the run that finished last; CheckpointError if there is none."""
    if finished := finished_runs(output_dir):
        return finished[0]
    begun = sorted(path.parent for path in output_dir.glob(f"*/{SETTINGS}"))
    hint = f"{begun[-1]} is unfinished, but can be named." if begun else "Train a model first."
    raise CheckpointError(f"there is no finished run in {output_dir.absolute()}.\n{hint}")


def finished_runs(output_dir: Path) -> list[Path]:
    """The folders of all finished runs, the newest first."""
    finished = []
    for summary in output_dir.glob(f"*/{SUMMARY}"):
        if (summary.parent / SETTINGS).is_file():  # else it is no run
            with contextlib.suppress(FileNotFoundError):  # it is being made longer
                finished.append((summary.stat().st_mtime_ns, summary.parent))
    return [path for _, path in sorted(finished, reverse=True)]


def _existing_run(resume: str, output_dir: Path) -> Path:
    """The folder that RESUME names, by its path or its name; CheckpointError if it is no run."""
    path = Path(resume).expanduser()
    if path.is_file():
        raise CheckpointError(
            f"RESUME = {shown(resume)} is a file; runs are folders, with {SETTINGS} in them.\n"
            "Files such as .pt can run code when they are opened, so this one was not."
        )
    for folder in (path, output_dir / resume):
        if (folder / SETTINGS).is_file():
            return folder
    above = next((folder for folder in path.parents if (folder / SETTINGS).is_file()), None)
    hint = (
        f"It lies in the run {above}: set RESUME to that."
        if above
        else ('Set RESUME to a run\'s folder, such as those in OUTPUT_DIR, or to "auto".')
    )
    raise CheckpointError(
        f"RESUME = {shown(resume)}: there is no run (looked for {path / SETTINGS}).\n{hint}"
    )


def _continue_named(path: Path, asked: Asked, settings: dict[str, Any]) -> Candidate:
    record = read_record(path)
    differing = differences(record, asked)
    is_finished = (path / SUMMARY).exists() and not (
        not differing and _has_more_to_do(path, record, asked)
    )
    if is_finished:
        differing += [d for d in free_differences(record, asked, settings) if d not in differing]
    candidate = _candidate(path, record, is_finished=is_finished)
    if differing:
        raise differs(candidate, differing)
    if not is_finished:
        FolderLock(path).require_free()
    return candidate


def _candidate(path: Path, record: RunRecord, *, is_finished: bool = False) -> Candidate:
    """A run and what its data.json says of the text; CheckpointError if that is damaged."""
    data = read_run_file(path / DATA)
    ids = data.get("tokenizer_id"), data.get("tokens_sha256")
    return Candidate(path, record, *ids, is_finished=is_finished)


def _has_more_to_do(path: Path, before: RunRecord, asked: Asked) -> bool:
    """Whether a finished run gets more steps, or more patience if that ended it."""
    patience, had = asked.training.patience, before.training.patience
    is_other = patience != before.asked.training.patience  # fine-tuning may have chosen what it had
    is_more_patient = is_other and had is not None and (patience is None or patience > had)
    ended_early = read_run_file(path / SUMMARY).get("steps", 0) < before.total_steps
    is_longer = total_steps(before, asked) > before.total_steps
    return is_more_patient if ended_early else is_longer


def _find_unfinished(
    output_dir: Path, asked: Asked, data: object
) -> tuple[list[Candidate], list[str]]:
    """The unfinished runs with these settings, newest first, and notes on others."""
    found, notes = [], []
    for file in output_dir.glob(f"*/{SETTINGS}"):
        if (file.parent / SUMMARY).exists():
            continue
        try:
            found.append((file.parent, read_record(file.parent)))
        except CheckpointError as error:
            if (file.parent / "checkpoints").is_dir():  # else it is no run
                notes.append(f"{error}: that run is passed over")
    found.sort(key=lambda run: (run[1].started, run[0].name), reverse=True)
    fitting = [(path, record) for path, record in found if not differences(record, asked)]
    if not fitting:
        notes += [_passed_over(path, differences(record, asked)) for path, record in found[:1]]
    # stable sort: runs with this DATA come first, the newest before all
    fitting.sort(key=lambda run: run[1].settings["DATA"] != data)
    candidates = []
    for path, record in fitting:
        try:
            candidates.append(_candidate(path, record))
        except CheckpointError as error:
            candidates.append(Candidate(path, record, None, None, fault=str(error)))
    return candidates, notes


def _passed_over(path: Path, differing: list[str]) -> str:
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"{path} is unfinished, but differs ({differing[0]}{more}): a new run begins"


def differs(run: Candidate, differing: list[str]) -> CheckpointError:
    """The error for a named run that differs from what is asked for, a line per difference."""
    how, more = "can't go on with other settings", ""
    if run.is_finished:
        how = "is finished, with other settings"
        if longer := _how_longer(run):
            more = f"\nWith the others as they were{longer.replace(';', ',')}."
    listed = "\n  ".join(differing)
    return CheckpointError(
        f"the run in {run.path} {how}:\n  {listed}\n"
        f"Set them back, or choose another RUN_NAME for a new run.{more}"
    )


def _how_longer(run: Candidate) -> str:
    """What makes a finished run longer, to be added to a sentence; one with MINUTES can't be."""
    if run.record.asked.minutes is not None:
        return ""
    return "; more num_epochs, max_steps or, where that ended it, patience goes on with it"


def _is_taken(path: Path) -> bool:
    """Whether a folder holds more than the remains of a start that was killed at once."""
    try:
        return path.exists() and any(
            not entry.name.startswith(".") and entry.name not in (DATA, "tokenizer.json")
            for entry in path.iterdir()
        )
    except NotADirectoryError:
        raise ResourceError(
            f"can't make the folder {path}: it is a file.\nChoose another RUN_NAME."
        ) from None
