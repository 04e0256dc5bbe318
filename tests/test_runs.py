"""Which run goes on, which one begins and which is refused: by RESUME, RUN_NAME and the settings.

A run's folder is made by hand here; test_run_folder has programs that make and continue theirs.
"""

import dataclasses
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import BusyError, CheckpointError, ResourceError, RunFinished, SettingsError
from engine.settings import from_json, names_on_resume
from planning.decisions import (
    RunRecord,
    decide_recipe,
    decide_training,
    differences,
    find_deadline,
    keep_identity,
    most_steps_of,
    read_record,
)
from planning.plan import RunPlan, RunSettings, resolve_settings
from planning.runs import Candidate, Candidates, find_candidates, settle_run
from storage.files import FolderLock
from tests.hostile import Canary
from tests.records import MACHINE, TEXT_FACTS, plan_in_minutes, record_of
from training_utils import TrainingConfig


def plan_of(**settings) -> RunPlan:
    """The plan of a custom run; lower-case names are custom_params."""
    params = {name: value for name, value in settings.items() if name.islower()}
    ours = {name: value for name, value in settings.items() if name.isupper()}
    given = {"CUSTOM_MODE": True, "TOKENIZER": "char", "custom_params": params} | ours
    return resolve_settings(given, "config_run.py")


PLAN = plan_of()
RECORD = record_of(PLAN)
NEW = Path("runs/new")
TEXT, TOKENIZER = "a" * 64, "char-1"


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def keep(name: str, steps: int | None = None, plan: RunPlan = PLAN, **changes) -> Path:
    """A run in a folder, its name and the fields of its record; finished where it made steps."""
    run = Path("runs", name)
    (run / "checkpoints").mkdir(parents=True)
    files = {
        "settings": record_of(plan, **{"started": name} | changes).to_json(),
        "data": {"tokenizer_id": TOKENIZER, "tokens_sha256": TEXT},
    }
    for file, content in files.items():
        (run / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    if steps is not None:
        (run / "summary.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")
    return run


def find(
    run_name: str | None = None, resume: str | bool = "auto", data: str = "the-verdict", **settings
) -> Candidates:
    plan = plan_of(**settings) if settings else PLAN
    return find_candidates(
        plan.asked(),
        output_dir=Path("runs"),
        run_name=run_name,
        resume=resume,
        mode="custom",
        settings=dataclasses.asdict(plan.run) | {"DATA": data},
    )


def found(**arguments) -> list[str]:
    return [run.path.name for run in find(**arguments).runs]


def test_auto_finds_unfinished_runs_the_newest_first_but_those_with_this_data_before_all():
    for name in ("2026-01-01", "2026-01-03"):
        keep(name)
    keep("2026-01-02", settings={**RECORD.settings, "DATA": "my.txt"})
    keep("2026-01-04", steps=3)
    keep("2026-01-05", plan=plan_of(SEED=1))
    Path("runs/other-program").mkdir()
    Path("runs/other-program/settings.json").write_text('{"editor": "vim"}', encoding="utf-8")
    assert found() == ["2026-01-03", "2026-01-01", "2026-01-02"]
    assert found(data="my.txt") == ["2026-01-02", "2026-01-03", "2026-01-01"]
    assert find().notes == () and not find().named and find().folder.name.endswith("-custom")
    assert found(resume=False) == []
    # where none fits, one line says what differs in the newest
    [note] = find(SEED=5, learning_rate=0.01).notes
    assert note == (
        "runs/2026-01-05 is unfinished, but differs (seed: 1 then, 5 now, and 1 more): a new run "
        "begins"
    )
    assert find(resume=False, SEED=5).notes == ()


DAMAGED = [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:3]))
def test_damaged_files_of_a_run_are_named_and_auto_passes_over_it(content):
    (keep("one") / "settings.json").write_bytes(content)
    [note] = find().notes
    assert note.startswith("runs/one/settings.json ") and note.endswith("that run is passed over")
    for arguments in ({"run_name": "one"}, {"resume": "runs/one"}):
        with pytest.raises(CheckpointError, match=r"^runs/one/settings\.json "):
            find(**arguments)
    (keep("two") / "data.json").write_bytes(content)
    if content != b"{}":
        assert find().runs[0].fault.startswith("runs/two/data.json ")
        with pytest.raises(CheckpointError, match=r"^runs/two/data\.json "):
            find("two")


def test_a_free_name_begins_a_run_and_one_that_is_taken_goes_on_unless_it_is_in_use():
    assert (find("one").folder, find("one").named, find("one").runs) == (Path("runs/one"), True, ())
    run = keep("one")
    for arguments in ({"run_name": "one"}, {"resume": "runs/one"}):
        assert find(**arguments).folder == find(**arguments).runs[0].path == run
        with FolderLock(run), pytest.raises(BusyError, match="is in use by process"):
            find(**arguments)
    with pytest.raises(CheckpointError, match="runs/one is already there, and RESUME is False"):
        find("one", resume=False)


def test_a_folder_that_holds_something_else_is_refused_but_not_what_a_kill_may_leave():
    folder = Path("runs/one")
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "data.json", ".lock", ".tmp-77-7-settings.json"):
        (folder / name).write_bytes(b"{")
    assert find("one").runs == ()
    for content in ("thesis.doc", "checkpoints/step-00000001/model.safetensors"):
        Path("runs", content[0], content).parent.mkdir(parents=True)
        Path("runs", content[0], content).write_bytes(b"years of work")
        with pytest.raises(CheckpointError, match=f"runs/{content[0]} .* and it holds no run"):
            find(content[0])
    Path("runs/file").touch()
    with pytest.raises(ResourceError, match="it is a file"):
        find("file")


def minutes_differ(then: dict, now: dict) -> list[str]:
    """What keeps a custom run with MINUTES from going on, its recipe chosen then."""

    def given(params: dict) -> dict:
        ours = {name: value for name, value in params.items() if name.isupper()}
        own = {name: value for name, value in params.items() if name.islower()}
        return {"MINUTES": 2, "CUSTOM_MODE": True, "custom_params": own} | ours

    plan = plan_in_minutes(**given(then))
    record = record_of(plan, training=decide_training(plan, torch.device("cpu"), 1000, None))
    return differences(record, resolve_settings(given(now), "config_run.py").asked())


def test_a_run_with_minutes_goes_on_if_what_was_asked_is_the_same_whatever_was_chosen():
    chosen = plan_in_minutes(MINUTES=2, CUSTOM_MODE=True).recipe
    windows, rate = chosen.training["batch_size"], chosen.training["learning_rate"]
    for then, now, lines in (
        ({}, {}, []),
        ({}, {"batch_size": windows, "TOKENIZER": chosen.tokenizer}, []),  # as it was chosen
        ({"TOKENIZER": "auto"}, {}, []),
        ({}, {"batch_size": 3}, ["batch_size: None then, 3 now"]),
        ({"batch_size": 8}, {}, ["batch_size: 8 then, None now"]),  # 8 is the default, too
        ({}, {"n_layers": 9}, ["n_layers: None then, 9 now"]),
        ({}, {"MINUTES": 3}, ["minutes: 2 then, 3 now"]),
        ({"MINUTES": 2.0}, {"learning_rate": rate}, []),
        ({}, {"TOKENIZER": "gpt2"}, ["tokenizer: None then, 'gpt2' now"]),
        ({}, {"time_budget_minutes": 2, "MINUTES": None}, ["minutes: 2 then, None now"]),
        ({}, {"num_epochs": 5, "eval_iter": 3}, []),
    ):
        assert minutes_differ(then, now)[: max(1, len(lines))] == lines


def test_a_run_with_minutes_goes_on_with_its_own_recipe_or_with_another_text_not_at_all():
    plan = plan_in_minutes()
    record = record_of(plan)
    fresh = resolve_settings({"MINUTES": 1.0}, "config_run.py")
    assert (record.recipe, record.choice) == (plan.recipe, plan.choice)
    assert decide_recipe(fresh, TEXT_FACTS, lambda: 1 / 0, record) == plan  # nothing is measured
    assert record.asked == fresh.asked()
    windows = plan.recipe.training["batch_size"]
    for ranks in (1, 3, windows + 1):  # which share each step equally
        shared = decide_recipe(fresh, TEXT_FACTS, lambda: MACHINE, None, ranks)
        found = shared.recipe.training["batch_size"]
        assert found % ranks == 0 and abs(found - windows) < ranks
        assert shared.recipe.model == plan.recipe.model
    training = decide_training(plan, torch.device("cpu"), 1000, None)
    for name, value in plan.recipe.training.items():
        assert getattr(training, name) == value
    became = dataclasses.replace(training, max_steps=77, warmup_steps=5)
    again = dataclasses.replace(record, training=became)
    assert decide_training(plan, torch.device("cpu"), 1000, again) == became

    runs = [dataclasses.replace(candidate(name), record=record) for name in "ab"]
    other = dataclasses.replace(TEXT_FACTS, fingerprint="f" * 24)
    elsewhere = dataclasses.replace(record, choice=dataclasses.replace(plan.choice, text=other))
    runs[0] = dataclasses.replace(runs[0], record=elsewhere)
    assert candidates(*runs).with_text(TEXT_FACTS.fingerprint).runs == (runs[1],)
    # one whose text can't be told decides no recipe, and a run with another recipe is left alone
    damaged = dataclasses.replace(runs[1], fault="data.json can't be read")
    recipe = dataclasses.replace(plan.recipe, steps=1)
    changed = dataclasses.replace(record, choice=dataclasses.replace(plan.choice, recipe=recipe))
    damaged = dataclasses.replace(damaged, record=changed)
    found = candidates(damaged, runs[1], dataclasses.replace(runs[1], record=changed))
    assert found.likeliest == record
    assert found.with_text(TEXT_FACTS.fingerprint).runs == (damaged, runs[1])
    left = candidates(runs[0], notes=("x",)).with_text(TEXT_FACTS.fingerprint)
    differs = f"text: sha256 {'f' * 12}... then, {TEXT_FACTS.fingerprint[:12]}... now"
    said = f"runs/a is unfinished, but differs ({differs}): a new run begins"
    assert (left.runs, left.notes, left.folder) == ((), ("x", said), NEW)
    with pytest.raises(CheckpointError, match="can't go on with other settings:\n  text: sha256 f"):
        candidates(runs[0], named=True).with_text(TEXT_FACTS.fingerprint)


def test_a_run_ends_by_its_minutes_or_after_the_steps_of_a_recipe_for_which_fewer_are_enough():
    plan = plan_in_minutes(MINUTES=10)
    training = decide_training(plan, torch.device("cpu"), 1000, None)
    assert training.time_budget_minutes == 10
    assert find_deadline(plan, training, 100.0) == 100 + 60 * 10
    for worth, most in ((10.0, None), (8.5, None), (7.5, 40)):  # the card tells of the last
        recipe = dataclasses.replace(plan.recipe, minutes=worth, steps=40)
        assert most_steps_of(recipe, 10.0, 30, from_weights=False) == most
    assert most_steps_of(None, 10.0, 30, from_weights=False) is None
    assert most_steps_of(None, 10.0, 30, from_weights=True) == 120
    budget = plan_of(time_budget_minutes=5.0)  # which counts from the end of the start-up
    assert find_deadline(budget, budget.training, 100.0) is None


def test_other_settings_refuse_a_named_run_with_every_difference():
    keep("one")
    for arguments in ({"run_name": "one"}, {"resume": "runs/one"}):
        with pytest.raises(CheckpointError) as caught:
            find(**arguments, SEED=7, learning_rate=0.01, train_ratio=0.8, max_steps=2)
        assert str(caught.value).splitlines()[:-1] == [
            "the run in runs/one can't go on with other settings:",
            "  seed: 123 then, 7 now",
            "  learning_rate: None then, 0.01 now",
            "  train_ratio: 0.9 then, 0.8 now",
            "  total steps: 3 then, 2 now (more is possible, less is not)",
        ]


@pytest.mark.parametrize(
    ("had", "steps", "asked", "goes_on"),
    [
        ({}, 3, {}, False),
        ({}, 3, {"max_steps": 2}, False),
        ({}, 3, {"max_steps": 4, "SEED": 7}, False),
        ({}, 3, {"max_steps": 4}, True),
        ({}, 3, {"num_epochs": 4}, True),
        ({"patience": 2}, 2, {"patience": 2}, False),
        ({"patience": 2}, 2, {"patience": 2, "max_steps": 9}, False),  # patience ended it
        ({"patience": 2}, 2, {"patience": 3}, True),
        ({"patience": 2}, 2, {}, True),
        ({"patience": 2}, 3, {"patience": 3}, False),
        ({"time_budget_minutes": 5.0}, 3, {"time_budget_minutes": 5.0, "num_epochs": 9}, False),
    ],
)
def test_a_finished_run_goes_on_where_it_has_more_to_do(had, steps, asked, goes_on):
    keep("one", steps=steps, plan=plan_of(**had))
    assert found(**asked) == []  # auto leaves it alone
    if goes_on:
        assert found(run_name="one", **asked) == ["one"]
        return
    if asked == had:
        with pytest.raises(RunFinished, match=r"^The run in runs/one is finished"):
            settle_run(find("one", **asked), TOKENIZER, TEXT)
        with pytest.raises(
            CheckpointError, match=r"is finished, with other settings:\n  text: sha"
        ):
            settle_run(find("one", **asked), TOKENIZER, "b" * 64)
        return
    with pytest.raises(CheckpointError, match=r"^the run in runs/one is finished, with") as caught:
        find("one", **asked)
    assert ("total steps: 3 then, 2 now" in str(caught.value)) == (asked == {"max_steps": 2})
    assert ("seed: 123 then, 7 now" in str(caught.value)) == ("SEED" in asked)


def test_a_run_that_ended_by_a_patience_chosen_for_it_is_finished():
    """As of one that began from given weights: the settings ask for no more patience."""
    keep("one", steps=2, training=dataclasses.replace(PLAN.training, patience=3))
    with pytest.raises(RunFinished):
        settle_run(find("one"), TOKENIZER, TEXT)
    assert found(run_name="one", patience=5) == ["one"]


def test_a_path_in_every_form_names_a_run_wherever_new_ones_go(monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    run = keep("one").absolute()
    for path in ("runs/one", "runs/one/", "./runs/../runs/one", str(run), "~/runs/one", "one"):
        [candidate] = find(resume=path, run_name="ignored").runs
        assert candidate.path.resolve() == run
    for path in ("runs/two", "runs", "runs/one/checkpoints", "."):
        with pytest.raises(CheckpointError) as caught:
            find(resume=path)
        assert f"there is no run (looked for {Path(path) / 'settings.json'})" in str(caught.value)
        assert ("lies in the run runs/one" in str(caught.value)) == ("checkpoints" in path)


def test_a_pickle_is_refused_without_being_opened():
    canary = Canary(Path("canary").absolute())
    Path("pickle.pt").write_bytes(pickle.dumps(canary))
    torch.save(canary, "torch.pt")
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe.pt")  # who opens it waits for ever
    opened, is_watching = [], True  # the hook stays for good

    def note_opening(event: str, arguments: tuple) -> None:
        if is_watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(note_opening)
    for name in ("pickle", "torch"):
        with pytest.raises(CheckpointError, match="is a file; runs are folders") as caught:
            find(resume=f"{name}.pt")
        assert "can run code when they are opened, so this one was not" in str(caught.value)
    with pytest.raises(CheckpointError, match="there is no run"):
        find(resume="pipe.pt")
    Path("seen").touch()
    is_watching = False
    assert opened == ["seen"] and not Path("canary").exists()


def candidate(name: str, text: str = TEXT, tokenizer: str = TOKENIZER, **more) -> Candidate:
    return Candidate(Path(f"runs/{name}"), RECORD, tokenizer, text, **more)


def candidates(*runs: Candidate, named: bool = False, notes: tuple = ()) -> Candidates:
    return Candidates(NEW, named, "fedcba9876543210", "2026-02-03 04:05:06", runs, notes)


def test_the_first_candidate_with_this_text_goes_on_and_nothing_is_said_of_others():
    these = candidates(candidate("a", "b" * 64), candidate("b"), candidate("c"), notes=("x",))
    run = settle_run(these, TOKENIZER, TEXT)
    assert (run.path, run.before, run.notes) == (Path("runs/b"), RECORD, ("x",))
    assert these.likeliest is RECORD


def test_without_a_run_of_this_text_a_new_one_begins_and_the_newest_is_named():
    these = candidates(candidate("a", "b" * 64, "char-2"), candidate("b", "c" * 64), notes=("x",))
    run = settle_run(these, TOKENIZER, TEXT)
    assert (run.path, run.named, run.before) == (NEW, False, None)
    differs = "tokenizer: sha256 char-2... then, char-1... now, and 1 more"
    said = f"runs/a is unfinished, but differs ({differs}): a new run begins"
    assert run.notes == ("x", said)
    assert candidates().likeliest is None
    assert settle_run(candidates(), TOKENIZER, TEXT).before is None
    # the report on the text is damaged
    these = candidates(candidate("a", fault="runs/a/data.json can't be read"), candidate("b"))
    assert settle_run(these, TOKENIZER, TEXT).path == Path("runs/b")
    [note] = settle_run(these, TOKENIZER, "b" * 64).notes
    assert "runs/a is unfinished, but differs (runs/a/data.json can't be read)" in note


def test_a_named_run_of_another_text_is_refused_with_every_difference():
    these = candidates(candidate("a", "b" * 64, "char-2"), named=True)
    with pytest.raises(CheckpointError) as caught:
        settle_run(these, TOKENIZER, TEXT)
    assert str(caught.value).splitlines()[1:3] == [
        "  tokenizer: sha256 char-2... then, char-1... now",
        f"  text: sha256 {'b' * 12}... then, {'a' * 12}... now",
    ]


# another value of each setting that may change
NUMERIC = {"device": "cuda:0", "ranks": 2, "parallel": "ddp", "threads": 2, "micro_batch": 3}
NUMERIC |= {"attention": "plain", "compiled": True, "torch": "3.0"}
OF_RUN = {"sampling_params": {"top_k": 3}, "DEVICE": "cpu", "COMPILE": True, "PARALLEL": "fsdp"}
OF_RUN |= {"LOG_EVERY": 3, "TRACKING": ["wandb"], "NIGHT_MODE": True}
OF_TRAINING = {"num_epochs": 4, "max_steps": 9, "eval_freq": 7, "eval_iter": 2, "patience": 50}
OF_TRAINING |= {"save_every": 2, "save_minutes": 7.0, "keep_checkpoints": 3, "num_workers": 1}
OF_TRAINING |= {"start_context": ["bell", "river"], "activation_checkpointing": True}
OF_TRAINING |= {"final_iter": 6}


def test_a_run_that_goes_on_keeps_its_identity_and_records_each_change_and_says_the_numeric_ones():
    assert set(NUMERIC) == set(names_on_resume(RunRecord, "numeric"))
    assert set(OF_RUN) == set(names_on_resume(RunSettings, "free"))
    assert set(OF_TRAINING) == set(names_on_resume(TrainingConfig, "free"))
    now = dataclasses.replace(
        RECORD,
        run_id="fe",
        started="later",
        total_steps=5,
        training=dataclasses.replace(PLAN.training, **OF_TRAINING),
        settings=RECORD.settings | OF_RUN,
        **NUMERIC,
    )
    record, notes = keep_identity(now, RECORD)
    assert (record.run_id, record.started) == (RECORD.run_id, RECORD.started)
    before = dataclasses.asdict(RECORD)
    before |= before["settings"] | before["training"]
    expected = {"total_steps": 5, **NUMERIC, **OF_RUN, **OF_TRAINING}
    [change] = record.changes
    assert change == {"at": "later"} | {n: [before[n], value] for n, value in expected.items()}
    assert sorted(notes) == sorted(
        f"{name} was {before[name]!r} and is {value!r}: from here on the numbers are not bit for "
        "bit those of an undisturbed run"
        for name, value in NUMERIC.items()
    )
    again, notes = keep_identity(dataclasses.replace(now, started="latest"), record)
    assert (again.changes, notes) == (record.changes, [])
    longer, _ = keep_identity(dataclasses.replace(now, started="latest", total_steps=6), record)
    assert longer.changes == [change, {"at": "latest", "total_steps": [5, 6]}]


def paths_to_keys(value: dict, above: tuple = ()) -> list[tuple[str, ...]]:
    """Every key of a record, and of the objects in it that have names of their own."""
    free = ("origins", "custom_params", "sampling_params", "model_overrides")
    paths = []
    for name, item in value.items():
        paths.append((*above, name))
        if isinstance(item, dict) and name not in free and (*above, name) != ("asked", "model"):
            paths += paths_to_keys(item, (*above, name))
    return paths


@pytest.mark.slow
def test_a_record_that_lacks_anything_or_has_a_value_of_another_kind_is_refused():
    run = keep("one")
    whole = (run / "settings.json").read_text(encoding="utf-8")
    assert read_record(run) == dataclasses.replace(RECORD, started="one")
    for *above, last in paths_to_keys(json.loads(whole)):
        for instead in (None, [[17]], {}):  # None: the key itself is gone
            damaged = holder = json.loads(whole)
            for name in above:
                holder = holder[name]
            if instead == {} and isinstance(holder[last], str | int | float):
                continue  # no more than [[17]] tells
            del holder[last]
            if instead is not None:
                holder[last] = instead
            (run / "settings.json").write_text(json.dumps(damaged), encoding="utf-8")
            # of a list, its items are not looked at; {} may be of the right kind
            may_pass = last in ("changes", "adapted", "left_open", "DATA", "TRACKING")
            is_wrong = instead is None or (instead == [[17]] and not may_pass)
            try:
                find("one")  # with no error of ours
                assert not is_wrong
            except CheckpointError as error:
                assert not is_wrong or "settings.json was not written by" in str(error)


def test_names_that_no_record_has_are_refused_in_one_line():
    run = keep("one")
    more = RECORD.to_json() | {f"name {i}": i for i in range(1000)}
    (run / "settings.json").write_text(json.dumps(more), encoding="utf-8")
    with pytest.raises(CheckpointError, match="'name 0' is unknown") as caught:
        read_record(run)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_settings_of_another_machine_are_not_judged_by_this_one():
    value = json.loads(json.dumps(RECORD.to_json()))
    value["settings"] |= {"OUTPUT_DIR": "~nobody-of-this-name/runs", "DEVICE": "cuda:7"}
    assert from_json(RunRecord, value, "it").settings["DEVICE"] == "cuda:7"
    with pytest.raises(SettingsError, match=r"in it:\n  it is \[1\]; it must be a dict"):
        from_json(TrainingConfig, [1], "it")
