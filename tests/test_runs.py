"""Which run goes on: what its record and the text at hand decide, without a run."""

import dataclasses
import json
from pathlib import Path

import pytest

from engine.errors import CheckpointError, SettingsError
from engine.settings import from_json, names_on_resume
from planning.decisions import RunRecord, keep_identity, read_record
from planning.plan import RunSettings, resolve_settings
from planning.runs import Candidate, Candidates, settle_run
from tests.records import record_of
from training_utils import TrainingConfig

PLAN = resolve_settings({"CUSTOM_MODE": True, "TOKENIZER": "char"}, "config_run.py")
RECORD = record_of(PLAN)
NEW = Path("runs/new")


def candidate(name: str, text: str = "a" * 64, tokenizer: str = "char-1", **more) -> Candidate:
    return Candidate(Path(f"runs/{name}"), RECORD, tokenizer, text, **more)


def candidates(*runs: Candidate, named: bool = False, notes: tuple = ()) -> Candidates:
    return Candidates(NEW, named, "fedcba9876543210", "2026-02-03 04:05:06", runs, notes)


# ------------------------------------------------------------------------------- the settled run


def test_the_first_candidate_with_this_text_goes_on_and_nothing_is_said_of_others():
    found = candidates(candidate("a", "b" * 64), candidate("b"), candidate("c"), notes=("x",))
    run = settle_run(found, "char-1", "a" * 64)
    assert (run.path, run.before, run.notes) == (Path("runs/b"), RECORD, ("x",))
    assert found.likeliest is RECORD


def test_without_a_run_of_this_text_a_new_one_begins_and_the_newest_is_named():
    found = candidates(candidate("a", "b" * 64, "char-2"), candidate("b", "c" * 64), notes=("x",))
    run = settle_run(found, "char-1", "a" * 64)
    assert (run.path, run.named, run.before) == (NEW, False, None)
    assert run.notes == (
        "x",
        "runs/a is unfinished, but differs (tokenizer: sha256 char-2... then, char-1... now, and "
        "1 more): a new run begins",
    )


def test_without_candidates_a_new_run_begins():
    found = candidates()
    assert found.likeliest is None
    assert settle_run(found, "char-1", "a" * 64).before is None


def test_a_candidate_whose_report_on_the_text_is_damaged_is_passed_over_by_name():
    found = candidates(candidate("a", fault="runs/a/data.json can't be read"), candidate("b"))
    assert settle_run(found, "char-1", "a" * 64).path == Path("runs/b")
    [note] = settle_run(found, "char-1", "b" * 64).notes
    assert "runs/a is unfinished, but differs (runs/a/data.json can't be read)" in note


def test_a_named_run_of_another_text_is_refused_with_every_difference():
    found = candidates(candidate("a", "b" * 64, "char-2"), named=True)
    with pytest.raises(CheckpointError) as caught:
        settle_run(found, "char-1", "a" * 64)
    assert str(caught.value).splitlines()[1:3] == [
        "  tokenizer: sha256 char-2... then, char-1... now",
        f"  text: sha256 {'b' * 12}... then, {'a' * 12}... now",
    ]


# ------------------------------------------------------------------------------------- the record


def test_a_run_that_goes_on_keeps_its_identity_and_records_what_changed():
    training = dataclasses.replace(PLAN.training, eval_freq=7)
    now = dataclasses.replace(
        RECORD, run_id="fe", started="later", threads=2, torch="3.0", training=training
    )
    record, notes = keep_identity(now, RECORD)
    assert (record.run_id, record.started) == (RECORD.run_id, RECORD.started)
    changed = {"at": "later", "eval_freq": [None, 7], "threads": [1, 2]}
    assert record.changes == [changed | {"torch": ["2.13.0", "3.0"]}]
    assert notes == [
        f"{said}: from here on the numbers are not bit for bit those of an undisturbed run"
        for said in ("threads was 1 and is 2", "torch was '2.13.0' and is '3.0'")
    ]
    again, notes = keep_identity(dataclasses.replace(now, started="latest"), record)
    assert (again.changes, notes) == (record.changes, [])


NUMERIC = {
    "device": "cuda:0",
    "ranks": 2,
    "parallel": "ddp",
    "threads": 2,
    "micro_batch": 3,
    "compiled": True,
    "torch": "3.0",
}


@pytest.mark.parametrize("name", names_on_resume(RunRecord, "numeric"))
def test_each_change_of_the_last_digits_is_recorded_and_said(name):
    record, [note] = keep_identity(record_of(PLAN, **{name: NUMERIC[name]}), RECORD)
    assert record.changes[0][name] == [getattr(RECORD, name), NUMERIC[name]]
    assert note.startswith(f"{name} was {getattr(RECORD, name)!r} and is {NUMERIC[name]!r}: ")


SETTINGS = {
    "sampling_params": {"top_k": 3},
    "DEVICE": "cpu",
    "COMPILE": True,
    "PARALLEL": "fsdp",
    "LOG_EVERY": 3,
    "TRACKING": ["wandb"],
    "NIGHT_MODE": True,
}


def test_each_setting_that_may_change_is_recorded_and_not_said():
    assert SETTINGS.keys() == set(names_on_resume(RunSettings, "free"))
    now = dataclasses.replace(RECORD, total_steps=5, settings=RECORD.settings | SETTINGS)
    record, notes = keep_identity(now, RECORD)
    assert notes == []
    [change] = record.changes
    assert change.pop("at") == now.started
    assert change.pop("total_steps") == [3, 5]
    assert change == {name: [RECORD.settings[name], SETTINGS[name]] for name in SETTINGS}


def paths_to_keys(value: dict, above: tuple = ()) -> list[tuple[str, ...]]:
    """Every key of a record, and of the objects in it that have names of their own."""
    free = ("origins", "custom_params", "sampling_params", "model_overrides")
    found = []
    for name, item in value.items():
        found.append((*above, name))
        if isinstance(item, dict) and name not in free and (*above, name) != ("asked", "model"):
            found += paths_to_keys(item, (*above, name))
    return found


def test_a_record_that_lacks_anything_or_has_a_value_of_another_kind_is_refused(tmp_path):
    whole = json.dumps(RECORD.to_json())
    (tmp_path / "settings.json").write_text(whole, encoding="utf-8")
    assert read_record(tmp_path) == RECORD
    for path in paths_to_keys(json.loads(whole)):
        for instead in (None, object):  # None: the key itself is gone
            damaged = holder = json.loads(whole)
            for name in path[:-1]:
                holder = holder[name]
            del holder[path[-1]]
            if instead is not None:
                holder[path[-1]] = [[17]]
            if instead is not None and path[-1] in ("changes", "adapted", "DATA", "TRACKING"):
                continue  # lists, whose items are not looked at
            (tmp_path / "settings.json").write_text(json.dumps(damaged), encoding="utf-8")
            with pytest.raises(CheckpointError, match=r"settings\.json was not written by this"):
                read_record(tmp_path)


def test_names_that_no_record_has_are_refused_in_one_line(tmp_path):
    more = {f"name {i}": i for i in range(100_000)}
    (tmp_path / "settings.json").write_text(json.dumps(RECORD.to_json() | more), encoding="utf-8")
    with pytest.raises(CheckpointError, match="'name 0' is unknown") as caught:
        read_record(tmp_path)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_settings_of_another_machine_are_not_judged_by_this_one():
    value = json.loads(json.dumps(RECORD.to_json()))
    value["settings"] |= {"OUTPUT_DIR": "~nobody-of-this-name/runs", "DEVICE": "cuda:7"}
    assert from_json(RunRecord, value, "it").settings["DEVICE"] == "cuda:7"


def test_a_value_that_is_no_object_is_refused():
    with pytest.raises(SettingsError, match=r"in it:\n  it is \[1\]; it must be a dict"):
        from_json(TrainingConfig, [1], "it")
