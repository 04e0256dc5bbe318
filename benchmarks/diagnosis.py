"""Make runs with a known fault, and count how often the diagnosis names it.

    python -m benchmarks.diagnosis [--make N] [--only KINDS] [--apply]

Trains small models in ways that go wrong, five runs for each of 15 faults, and 30 healthy runs: a
few seconds of one core each, half an hour in all. A later call goes on from the runs that are
there; --make 0 trains none. The diagnosis is tuned on three of five runs; the others are kept out
of that. --apply makes the runs again with the line that the diagnosis says to change, and looks
whether the finding is gone. The histories are kept in the results, where the tests read them; those
of runs that are not there stay as they are.
"""

import argparse
import ast
import contextlib
import io
import itertools
import json
import math
import os
import random
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import training.journal
from benchmarks.report import RESULTS
from engine.console import say, use_utf8
from engine.processor import using_threads
from insight.curves import Curves
from insight.diagnosis import NOTE, Facts, diagnose
from insight.run_files import read_run
from insight.verdict import change_lines
from planning.plan import SECTIONS
from storage.cache import usable_cache
from storage.files import discard, make_folder, to_json, write_atomically, write_json
from text.spans import measure_repeats
from training.learner import Learner

REPOSITORY = RESULTS.parent.parent
HISTORIES = RESULTS / "diagnosis-cpu.json"
SHARED = REPOSITORY.parent / "shared" / "data"
PER_KIND, HEALTHY, TUNED_ON = 5, 30, 3  # of each five, so many are tuned on
KEPT = ("settings.json", "data.json", "metrics.jsonl", "samples.md", "insight.json")
COMMON = {"max_steps": 200, "batch_size": 8, "max_length": 32, "train_ratio": 0.9}
SHAPE = {"n_layers": 1, "emb_dim": 32, "n_heads": 2}
DIGITS = 4  # of a number in the results
FALL = 4  # of the speed of a starved run, half-way


@dataclass(frozen=True)
class Labelled:
    """A run to make, and what is wrong with it."""

    kind: str  # the finding that must come first, or "healthy"
    number: int
    text: str  # a name in TEXTS
    seed: int = 1
    params: dict[str, Any] = field(default_factory=dict)  # custom_params beside COMMON
    shape: dict[str, Any] = field(default_factory=dict)  # model_overrides beside SHAPE
    sampling: dict[str, Any] = field(default_factory=dict)
    above: dict[str, Any] = field(default_factory=dict)  # names beside the dicts
    n_bytes: int = 60_000  # of the text
    validation: str | None = None  # a name in TEXTS, or "a part of it": validates
    copies: int = 1  # of the training text
    plant: str | None = None  # a fault in the machine: "nan" or "slow"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.kind}-{self.number}"

    @property
    def is_kept_out(self) -> bool:
        """Whether the diagnosis is not tuned on it."""
        return self.number % PER_KIND >= TUNED_ON


# ------------------------------------------------------------------------------------- texts


def _sentences(seed: int) -> Iterator[str]:
    """Sentences of words that are drawn once, in an order that a grammar allows."""
    draw = random.Random(seed)
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]

    def words(count: int, ending: str) -> list[str]:
        lengths = [draw.choice((1, 2, 2, 3)) for _ in range(count)]
        return ["".join(draw.choices(syllables, k=n)) + ending for n in lengths]

    nouns, verbs, adjectives = words(16, "n"), words(8, "s"), words(8, "ly")
    while True:
        subject, verb, thing = draw.choice(nouns), draw.choice(verbs), draw.choice(nouns)
        kind = draw.choice(adjectives) + " " if draw.random() < 0.5 else ""
        yield f"The {kind}{subject} {verb} a {thing}. " + "\n" * (draw.random() < 0.3)


def _sums(seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    while True:
        a, b = draw.randrange(10), draw.randrange(10)
        yield f"{a} and {b} make {a + b};\n"


def _letters(seed: int) -> Iterator[str]:
    """Letters of which each depends on nothing but the one before: little can be learnt."""
    draw = random.Random(seed)
    rows = {a: [draw.random() ** 3 for _ in "abcdefgh"] for a in "abcdefgh"}
    letter = "a"
    while True:
        (letter,) = draw.choices("abcdefgh", rows[letter])
        yield letter


def _chain(seed: int) -> Iterator[str]:
    """Letters of which each depends on the two before it."""
    draw = random.Random(seed)
    letters = "abcdef"
    rows = {a + b: [draw.random() ** 4 for _ in letters] for a in letters for b in letters}
    last = "ab"
    while True:
        (letter,) = draw.choices(letters, rows[last])
        last = last[1] + letter
        yield letter


def _cut(pieces: Iterator[str], n_bytes: int) -> str:
    parts, size = [], 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= n_bytes:
            return "".join(parts)
    raise AssertionError("the pieces never end")


def _file(path: Path) -> Callable[[int], str]:
    return lambda n_bytes: path.read_bytes()[:n_bytes].decode("utf-8", "ignore")


TEXTS: dict[str, Callable[[int], str]] = {
    "sentences": lambda n: _cut(_sentences(1), n),
    "sums": lambda n: _cut(_sums(2), n),
    "letters": lambda n: _cut(_letters(3), n),
    "chain": lambda n: _cut(_chain(4), n),
    "shakespeare": _file(SHARED / "tinyshakespeare.txt"),
    "wikipedia": _file(SHARED / "wikitext-2" / "valid.txt"),
    "english": _file(REPOSITORY / "corpus" / "sample-en.txt"),
    "chinese": _file(REPOSITORY / "corpus" / "sample-zh.txt"),
}
REAL = ("shakespeare", "wikipedia", "sentences", "shakespeare", "wikipedia")


def texts_of(run: Labelled) -> tuple[str, str | None]:
    """A run's training text, and its validation text if it has its own."""
    text, held_out = TEXTS[run.text](run.n_bytes), None
    if run.validation == "a part of it":
        held_out = text[len(text) // 4 :][: len(text) // 8]
    elif run.validation is not None:
        held_out = TEXTS[run.validation](2 * run.n_bytes)[-run.n_bytes // 8 :]
    elif run.copies > 1:  # else the copies are in both texts
        cut = int(COMMON["train_ratio"] * len(text))
        text, held_out = text[:cut], text[cut:]
    return text * run.copies, held_out


def write_texts(run: Labelled, folder: Path) -> dict[str, Any]:
    """Write a run's texts into a folder; returns its DATA."""
    text, held_out = texts_of(run)
    data = {"path": "train.txt"}
    write_atomically(folder / "train.txt", text.encode())
    if held_out is not None:
        data["val"] = "val.txt"
        write_atomically(folder / "val.txt", held_out.encode())
    return data


# -------------------------------------------------------------------------------------- runs


def _healthy() -> list[Labelled]:
    """Runs whose numbers are those that MINUTES or the defaults would choose, or near them."""
    texts = ("chain", "shakespeare", "wikipedia", "sums", "english")
    variants: list[dict[str, Any]] = [
        {},
        {"params": {"optimizer": "muon"}},
        {"params": {"schedule": "wsd"}, "shape": {"emb_dim": 48}},
        {"params": {"batch_size": 12}, "shape": {"architecture": "llama"}},
        {"params": {"max_steps": 260}, "shape": {"drop_rate": 0.05}},
        {"params": {"max_length": 48, "batch_size": 6}, "shape": {"emb_dim": 64}},
    ]
    pairs = list(itertools.product(variants, texts))
    return [
        Labelled("healthy", n, text, seed=n, **variant) for n, (variant, text) in enumerate(pairs)
    ]


def _faulty() -> list[Labelled]:
    """Five runs of each fault."""
    runs = []

    def add(kind: str, changes: Callable[[int], dict[str, Any]], texts=REAL) -> None:
        for number, text in enumerate(texts):
            runs.append(Labelled(kind, number, text, seed=number + 1, **changes(number)))

    small = ("english", "shakespeare", "chinese", "english", "wikipedia")
    add("unfinished", lambda n: {"params": {"max_steps": (24, 30, 36, 20, 30)[n]}})
    add(
        "by-heart",
        lambda n: {
            "n_bytes": 2500,
            "shape": {"emb_dim": 64},
            "params": {"max_steps": 400, "learning_rate": 0.01},
        },
        ("english", "shakespeare", "wikipedia", "english", "wikipedia"),
    )
    add("rate-high", lambda n: {"params": {"learning_rate": (0.2, 0.15, 0.3, 0.3, 0.2)[n]}})
    add("rate-low", lambda n: {"params": {"learning_rate": (2e-4, 1e-4, 2e-4, 1e-4, 3e-4)[n]}})
    schedules = ("constant", "cosine", "wsd", "constant", "cosine")
    add(
        "plateau",
        lambda n: {"params": {"max_steps": 300, "schedule": schedules[n]}},
        ("letters",) * PER_KIND,
    )
    add(
        "model-small",
        lambda n: {
            "shape": {"n_layers": 1, "emb_dim": (4, 6, 4, 4, 6)[n], "n_heads": 1},
            "params": {"max_steps": 1500},
        },
    )
    add(
        "model-large",
        lambda n: {
            "n_bytes": 2500,
            "shape": {"n_layers": 3, "emb_dim": 128},
            "params": {"max_steps": 60, "batch_size": 4},
        },
        small,
    )
    add("batch-small", lambda n: {"params": {"batch_size": 1, "max_length": (8, 12, 8, 12, 8)[n]}})
    add(
        "batch-large",
        lambda n: {"n_bytes": 12_000, "params": {"batch_size": 128, "max_steps": (16, 20)[n % 2]}},
    )
    others = ("chinese", "sums", "shakespeare", "sentences", "sums")
    add("unlike", lambda n: {"validation": others[n]})
    add("leak", lambda n: {"validation": "a part of it", "n_bytes": (40_000, 12_000)[n % 2]})
    add("duplicates", lambda n: {"copies": (8, 12, 5, 8, 6)[n], "n_bytes": 10_000})
    add("nan", lambda n: {"plant": "nan"})
    add("repeats", lambda n: {"sampling": {"temperature": (0.1, 0.05, 0.05, 0.1, 0.05)[n]}})
    add("starved", lambda n: {"plant": "slow"})
    return runs


def labelled_runs() -> list[Labelled]:
    """All of them, one of each kind before the second of any."""
    return sorted([*_healthy(), *_faulty()], key=lambda run: run.number)


def settings_of(run: Labelled, data: dict[str, Any]) -> dict[str, Any]:
    """The names of a run's settings file."""
    params = COMMON | {"start_context": "The ", "model_overrides": SHAPE | run.shape} | run.params
    usual = {
        "DATA": data,
        "TOKENIZER": "char",
        "CUSTOM_MODE": True,
        "custom_params": params,
        "sampling_params": {"max_new_tokens": 100} | run.sampling,
        "DEVICE": "cpu",
        "PRECISION": "fp32",
        "COMPILE": False,
        "SEED": run.seed,
        "RUN_NAME": "run",
        "RESUME": False,
    }
    return usual | run.above


@contextlib.contextmanager
def _planted(run: Labelled) -> Iterator[None]:
    """The clock of the processor, which other programs don't slow down; and the run's fault."""
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    steps = COMMON["max_steps"]
    counts = {"steps": 0}
    step, clock = Learner.step, training.journal.time
    slow_since = [0.0]

    def count(self: Learner, *args: Any, **options: Any) -> Any:
        counts["steps"] += 1
        if counts["steps"] == steps // 2:
            slow_since[0] = time.process_time()
        loss, norm = step(self, *args, **options)
        if run.plant == "nan" and counts["steps"] % 50 in (20, 21):
            loss = torch.full_like(loss, torch.nan)
        return loss, norm

    def now() -> float:
        seconds = time.process_time()
        if run.plant == "slow" and slow_since[0]:
            seconds += (FALL - 1) * (seconds - slow_since[0])
        return seconds

    Learner.step = count  # type: ignore[method-assign]
    training.journal.time = SimpleNamespace(perf_counter=now)  # type: ignore[assignment]
    try:
        yield
    finally:
        Learner.step = step  # type: ignore[method-assign]
        training.journal.time = clock


def make(run: Labelled, folder: Path) -> None:
    """Train a run; its folder has the files of KEPT then."""
    work = folder.with_name(f"{folder.name}-work")
    discard(work)
    make_folder(work)
    settings = settings_of(run, write_texts(run, work))
    lines = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
    write_atomically(work / "settings.py", lines.encode())
    before = Path.cwd()
    os.chdir(work)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, _planted(run), using_threads(1):
            code = runpy.run_path(str(REPOSITORY / "main.py"))["main"](["settings.py"])
    finally:
        os.chdir(before)
    if code >= 128:  # a signal, which the run has taken
        sys.exit(code)
    made = work / "runs" / "run"
    if not (made / "samples.md").is_file():
        raise RuntimeError(f"{run.name} was not made:\n{out.getvalue()[-2000:]}")
    make_folder(folder)
    for name in KEPT:
        if (made / name).is_file():
            write_atomically(folder / name, (made / name).read_bytes())
    write_json(folder / "label.json", asdict(run))
    discard(work)


# ------------------------------------------------------------------------- changes, applied


def put_into(settings: dict[str, Any], lines: list[str]) -> dict[str, Any]:
    """The names of a settings file after a user has put the lines of a finding into it."""
    settings = dict(settings)
    for line in lines:
        code, _, comment = line.rpartition("  # in ")
        if section := next((s for s in SECTIONS if comment.startswith(s)), None):
            settings[section] = settings.get(section, {}) | ast.literal_eval(f"{{{code}}}")
        else:
            name, _, value = line.partition(" = ")
            settings[name] = ast.literal_eval(value)
    return settings


def changed(run: Labelled, lines: list[str]) -> Labelled:
    """The same run with the lines of a finding in its settings file."""
    given = settings_of(run, {})
    settings = put_into(given, lines)
    if settings.pop("DATA"):  # which the lines can't name
        run = replace(run, validation=None, copies=1, n_bytes=run.n_bytes * run.copies)
    params, sampling = (settings.pop(section) for section in SECTIONS)
    above = {name: value for name, value in settings.items() if value != given.get(name)}
    return replace(run, params=params, sampling=sampling, above=above)


def apply(place: Path) -> dict[str, Any]:
    """For a run of each fault: whether the finding is gone once its line is changed.

    Runs whose fault was planted in the machine are left out: no setting mends it.
    """
    applied = {}
    for run in labelled_runs():
        folder, again = place / run.name, place / f"changed-{run.name}"
        is_asked = run.kind != "healthy" and run.plant is None and run.number == 0
        if not is_asked or not (folder / "label.json").is_file():
            continue
        curves, facts = read_history(history_of(run, folder))
        first = diagnose(curves, facts)[0]
        lines = [line.en for line in change_lines(first.changes, facts)]
        other = changed(run, lines)
        if not (again / "label.json").is_file():
            make(other, again)
        left = diagnose(*read_history(history_of(other, again)))
        loud = [finding.kind for finding in left if finding.severity != NOTE]
        is_gone = first.kind not in loud
        applied[run.name] = {"lines": lines, "is_gone": is_gone, "left": loud}
        say(f"{run.name}: {'; '.join(lines)}: {'gone' if is_gone else 'still there'}")
    return applied


# ------------------------------------------------------------------------------ the results


def history_of(run: Labelled, folder: Path) -> dict[str, Any]:
    """What the tests need of a run: its label, the facts and the curves, in few digits."""
    files = read_run(folder)
    facts, curves = replace(files.facts, is_over=True), files.curves  # no summary is kept
    if facts.leaked is None:
        facts = replace(facts, **_copies(run))
    known = asdict(curves)
    for name in ("losses", "grad_norms", "train_losses", "val_losses", "speeds"):
        known[name] = _short(known[name])
    for name in ("steps", "rates", "tokens", "forecast"):  # no rule reads them
        del known[name]
    label = {"name": run.name, "kind": run.kind, "kept_out": run.is_kept_out}
    return label | {"facts": asdict(facts), "curves": known}


def read_history(row: dict[str, Any]) -> tuple[Curves, Facts]:
    """The curves and the facts of a row of the results."""
    known: dict[str, Any] = {
        name: [math.nan if x is None else x for x in value] if isinstance(value, list) else value
        for name, value in row["curves"].items()
    }
    curves = Curves(**known)
    curves.steps = [*range(1, len(curves.losses) + 1)]
    return curves, Facts(**row["facts"] | {"samples": tuple(row["facts"]["samples"])})


def _copies(run: Labelled) -> dict[str, Any]:
    """What measuring a run's text finds, of a run that was too short for that."""
    text, held_out = texts_of(run)
    if held_out is None:
        cut = int(COMMON["train_ratio"] * len(text))
        text, held_out = text[:cut], text[cut:]
    repeated, leaked = measure_repeats(text.encode(), held_out.encode())
    return {"repeated": repeated, "leaked": leaked}


def _short(values: list[float]) -> list[float | None]:
    return [float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None for x in values]


def count_right(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many runs have the right finding first, and how many healthy ones any above a note."""
    right, faulty, alarmed, healthy, wrong = 0, 0, 0, 0, {}
    for row in rows:
        findings = diagnose(*read_history(row))
        loud = [finding.kind for finding in findings if finding.severity != NOTE]
        if row["kind"] == "healthy":
            healthy, alarmed = healthy + 1, alarmed + bool(loud)
            is_right = not loud
        else:
            is_right = bool(findings) and findings[0].kind == row["kind"]
            faulty, right = faulty + 1, right + is_right
        if not is_right:
            wrong[row["name"]] = [finding.kind for finding in findings]
    return {
        "faulty": faulty, "right": right, "healthy": healthy, "alarmed": alarmed, "wrong": wrong,
    }  # fmt: skip


def merge(kept: list[dict[str, Any]], made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are kept, each replaced by the one made now if there is one, and new ones; in
    the order of labelled_runs()."""
    rows = {row["name"]: row for row in [*kept, *made]}
    known = [rows.pop(run.name) for run in labelled_runs() if run.name in rows]
    return [*known, *rows.values()]


def write_histories(rows: list[dict[str, Any]], applied: dict[str, Any]) -> None:
    """Write the results, a line for each run."""
    summary = {
        name: count_right([row for row in rows if row["kept_out"] in which])
        for name, which in (("all", (True, False)), ("kept_out", (True,)))
    }
    lines = ",\n".join(to_json(row) for row in rows)
    head = f'"summary": {to_json(summary)},\n"applied": {to_json(applied)}'
    write_atomically(HISTORIES, f'{{{head},\n"runs": [\n{lines}\n]}}\n'.encode())
    say(f"{HISTORIES}: {to_json(summary)}")


def main() -> None:
    """Read the options, make runs, diagnose them and write the results."""
    use_utf8()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", type=int, default=10_000, metavar="N", help="the most to train")
    parser.add_argument("--only", help="of these kinds, divided by commas")
    parser.add_argument("--apply", action="store_true", help="make runs again, with the changes")
    options = parser.parse_args()
    place = usable_cache() / "diagnosis"
    missing = [run for run in labelled_runs() if not (place / run.name / "label.json").is_file()]
    if options.only:
        missing = [run for run in missing if run.kind in options.only.split(",")]
    torch.set_num_threads(1)
    for number, run in enumerate(missing[: options.make], start=1):
        if (place / run.name / "label.json").is_file():  # another process has made it
            continue
        began_at = time.process_time()
        make(run, place / run.name)
        say(f"{number} of {len(missing)}: {run.name}, {time.process_time() - began_at:.1f} s")
    made = [run for run in labelled_runs() if (place / run.name / "label.json").is_file()]
    kept: dict[str, Any] = {"runs": [], "applied": {}}
    if HISTORIES.is_file():
        kept = json.loads(HISTORIES.read_bytes())
    rows = merge(kept["runs"], [history_of(run, place / run.name) for run in made])
    say(f"{len(made)} runs are here, of {len(rows)} that the results have then")
    write_histories(rows, kept["applied"] | (apply(place) if options.apply else {}))


if __name__ == "__main__":
    main()
