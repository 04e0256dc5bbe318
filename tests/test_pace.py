"""A run's plan that is made anew on its way: by the time that is left, or where it only learns its
text by heart; and that a stopped run repeats it."""

import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

import environment
import train
from distributed.parallel import ALONE
from engine import clock
from engine.errors import ResourceError, SettingsError
from engine.optim import Schedule, learning_rate_at, make_schedule
from planning import trial
from planning.trial import Budget, Costs
from tests.conftest import REPOSITORY
from tests.letters import new_trainer
from tests.resuming import Bench, compare, of_steps, use_steady_clock
from training.journal import Journal
from training.pace import (
    BY_HEART,
    TIME,
    NewPlan,
    Spent,
    first_review,
    forecast_loss,
    learns_by_heart,
    plan_for_time,
    plan_to_end,
    recorded_plans,
)
from training.run_folder import RunFolder
from training.spacing import Spacing

WSD = Schedule("wsd", 1.0, 10, 400, 80)


def rates(schedule: Schedule) -> list[float]:
    return [learning_rate_at(step, schedule) for step in range(schedule.total_steps)]


@pytest.mark.parametrize(
    ("now", "decay"), [(500, 100), (401, 80), (399, 80), (300, 60), (110, 10), (101, 1)]
)
def test_a_run_with_more_or_less_time_keeps_its_rates_so_far_and_the_share_of_its_decay(now, decay):
    new = plan_for_time(100, 400, now, WSD)
    assert new == NewPlan(100, TIME, 400, now, decay)
    planned = new.apply(WSD)
    assert rates(planned)[:100] == rates(WSD)[:100]
    assert rates(planned)[-1] == pytest.approx(rates(WSD)[-1])
    assert sum(rate == 1.0 for rate in rates(planned)) == now - 10 - decay


def test_a_decay_that_has_begun_ends_earlier_or_later():
    assert plan_for_time(320, 400, 500, WSD) == NewPlan(320, TIME, 400, 500, 100)
    for now, decay in ((500, 180), (401, 81), (350, 30), (341, 21)):
        new = plan_for_time(340, 400, now, WSD)
        assert new == NewPlan(340, TIME, 400, now, decay)
        assert rates(new.apply(WSD))[:320] == rates(WSD)[:320]
        assert rates(new.apply(WSD))[-1] == pytest.approx(0.1)


def test_other_schedules_follow_the_new_length_and_a_run_without_one_has_none():
    for kind in ("cosine", "constant"):
        planned = plan_for_time(100, 400, 300, make_schedule(kind, 1.0, 10, 400)).apply(
            make_schedule(kind, 1.0, 10, 400)
        )
        assert planned == make_schedule(kind, 1.0, 10, 300)
    assert plan_for_time(100, 400, 300, WSD).apply(None) is None


@pytest.mark.parametrize(
    ("step", "total", "decay"),
    # of 320 flat steps the last is done at 320: until then a short decay begins, later none
    [(100, 125, 25), (12, 15, 3), (320, 400, 80), (300, 375, 75), (321, 321, 80), (399, 399, 80)],
)
def test_a_run_that_is_to_end_decays_first_unless_it_does_already(step, total, decay):
    new = plan_to_end(step, WSD)
    assert new == NewPlan(step, BY_HEART, 400, total, decay)
    if total > step:
        planned = new.apply(WSD)
        assert rates(planned)[:step] == rates(WSD)[:step]
        assert rates(planned)[-1] == pytest.approx(0.1)
        assert sorted(rates(planned)[step:], reverse=True) == rates(planned)[step:]
    cosine = make_schedule("cosine", 1.0, 10, 400)
    assert plan_to_end(step, cosine).total_steps == step


@pytest.mark.parametrize(
    ("total", "schedule", "step"),
    [
        (7, None, None),
        (8, None, 2),
        (400, WSD, 100),
        (400, replace(WSD, decay_steps=360), 40),
        (400, replace(WSD, decay_steps=400), 1),
        (400, make_schedule("cosine", 1.0, 10, 400), 100),
    ],
)
def test_a_run_is_planned_anew_at_a_quarter_and_before_it_decays(total, schedule, step):
    assert first_review(total, schedule) == step


FALLING = [4.0, 3.5, 3.1, 2.8, 2.6, 2.4, 2.2, 2.0, 1.8, 1.6, 1.4, 1.2]


@pytest.mark.parametrize(
    ("train_losses", "val_losses", "since", "expected"),
    [
        (FALLING, [x + 0.1 for x in FALLING], 0, False),  # it learns
        (FALLING, [3.0, 2.9, 2.8, 2.85, 2.9, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 3.6], 0, True),
        # a gain of less than 0.2 % is none, one of more is
        (FALLING[:6], [3.0, 2.9, 2.9, 2.899, 2.897, 2.896], 0, True),
        (FALLING[:6], [3.0, 2.9, 2.9, 2.899, 2.897, 2.89], 0, False),
        ([2.0] * 6, [3.0, 2.9, 3.0, 3.0, 3.0, 3.0], 0, False),  # it learns nothing at all
        (FALLING[:5], [3.0, 2.9, 3.0, 3.0, 3.0], 0, False),  # too few
        ([], [], 0, False),
        # in a long run a quarter of it must pass without a gain
        (FALLING[:6] + [2.0] * 18, [3.0] * 19 + [2.9] * 5, 0, False),
        ([2 - n / 100 for n in range(24)], [3.0] * 18 + [2.8] + [2.9] * 5, 0, False),
        ([2 - n / 100 for n in range(24)], [3.0] * 17 + [2.8] + [2.9] * 6, 0, True),
        # those from before a decay began tell nothing of it
        (FALLING, [3.0] * 12, 8, True),
        (FALLING, [3.0] * 12, 9, False),
    ],
)
def test_by_heart_is_where_validation_gains_nothing_while_training_does(
    train_losses, val_losses, since, expected
):
    assert learns_by_heart(train_losses, val_losses, since) == expected


def test_plans_are_read_back_up_to_where_the_run_was_made_longer():
    plans = [NewPlan(100, TIME, 400, 350, 70), NewPlan(200, BY_HEART, 350, 250, 50)]
    changes = [{"at": "noon"} | new.to_json() for new in plans]
    other = {"at": "two", "threads": [1, 2]}
    kept = json.loads(json.dumps([other, *changes, other]))
    assert recorded_plans(kept, 250) == plans
    assert recorded_plans(kept, 900) == []  # max_steps was set since
    assert recorded_plans([other], 400) == []
    longer = [changes[0], {"at": "one", "total_steps": [350, 500]}]
    again = NewPlan(400, BY_HEART, 500, 450, 50)
    assert recorded_plans([*longer, again.to_json()], 450) == [again]
    for damage in ({"total_steps": "many"}, {"why": "so"}, {"more": 1}):
        with pytest.raises(SettingsError):
            recorded_plans([again.to_json() | damage], 450)


@pytest.mark.parametrize("per_epoch", [1, 7, 100, 333])
def test_the_evaluations_that_are_left_are_counted(per_epoch):
    for total, freq in itertools.product((9, 60, 1500), (1, 7, 100)):
        run = Spacing(total, per_epoch, freq)
        due = [step for step in range(total + 1) if run.is_due(step)]
        for done in (0, 1, total // 3, total - 1):
            assert run.count(done) == sum(step > done for step in due)


@pytest.mark.parametrize("step_s", [0.01, 0.1, 2.0])
def test_what_is_left_of_a_budget_is_filled_with_steps(step_s):
    costs = Costs(step_s, step_s / 3, 0.004, 0.2, 0.5)
    budget = Budget(600.0, costs, 500, (500, 50), last_tokens=150, save_minutes=5.0)
    for total, done in ((2000, 500), (300, 75), (100, 99)):
        left_s = budget.total_s(Spacing(total, 500, 50), 10, done)
        left = replace(budget, seconds=left_s)
        found = left.steps_after(done, 50, 10)
        assert left.total_s(Spacing(found, 500, 50), 10, done) <= left_s + 1e-6
        assert left.total_s(Spacing(found + 1, 500, 50), 10, done) > left_s
        assert replace(left, seconds=left_s + 100 * step_s).steps_after(done, 50, 10) > found
    for seconds in (0.0, -60.0):  # the time is over
        assert replace(budget, seconds=seconds).steps_after(7, 50, 10) == 8
    assert budget.total_s(Spacing(100, 500, 50), 10) > budget.total_s(Spacing(100, 500, 50), 10, 1)


def test_checkpoints_every_so_many_steps_are_planned_for():
    budget = Budget(600.0, Costs(1.0, 0.5, 0.0, 0.0, save=3.0), 500, (500, 50), last_tokens=0)
    often = replace(budget, save_every=20)
    run = Spacing(100, 500, 50)
    for done, n_saves in ((0, 5), (19, 5), (20, 4), (90, 1)):
        by_time = budget.total_s(run, 4, done) - 3.0  # after the last step
        assert often.total_s(run, 4, done) == pytest.approx(by_time + 3.0 * n_saves)


def test_best_weights_on_the_disk_are_planned_for_at_each_evaluation_and_only_there(monkeypatch):
    budget = Budget(600.0, Costs(1.0, 0.5, 0.0, 0.0), 500, (500, 50), last_tokens=0)
    on_disk = replace(budget, costs=replace(budget.costs, best=10.0))
    run = Spacing(100, 500, 50)
    assert on_disk.total_s(run, 4) == budget.total_s(run, 4) + 10 * run.count()
    assert on_disk.final_batches == budget.final_batches
    # a plan made anew has what both took so far
    planned = []
    monkeypatch.setattr(Budget, "steps_after", lambda left, *_: planned.append(left.costs) or 90)
    monkeypatch.setattr(Journal, "step_s", 1.0)
    schedule = make_schedule("cosine", 1e-3, 1, 100)
    trainer = new_trainer(100, schedule=schedule, budget=budget, eval_iter=4)
    trainer.steps = 50
    trainer.journal.spent.note("evaluation", 4.0)
    trainer.journal.spent.note("best", 6.0)
    trainer.plan_anew_where_due()
    assert (planned[0].batch, planned[0].best) == (4.0 / 8, 6.0)


def test_a_forecast_continues_the_later_half_of_the_flat_phase_and_adds_what_the_decay_gains():
    steps = list(range(10, 101, 10))
    losses = [5 * step**-0.1 if step >= 50 else 9.0 for step in steps]
    schedule = Schedule("wsd", 1.0, 5, 300, 200, final_rate=0.0)  # 100 flat steps, 100 by area
    found = forecast_loss(steps, losses, schedule)
    at_end = 5 * 200**-0.1
    assert found == pytest.approx([(1 - gain) * at_end for gain in (0.055, 0.03, 0.005)])
    odd = [math.inf, *losses[1:7], math.nan, 0.0, losses[9]]  # as of a run that diverges
    assert forecast_loss(steps, odd, schedule)[1] == pytest.approx(found[1])
    rising = [3.0 + step / 1e4 for step in steps]
    assert forecast_loss(steps, rising, schedule)[1] == pytest.approx(0.97 * 3.001)
    # two are enough, but never tell of a steep fall; one is not
    assert forecast_loss([10, 60, 100], [4.0, 3.0, 2.9], schedule)[1] < 0.97 * 2.9
    steep = forecast_loss([10, 20], [4.0, 1.0], schedule)[1]
    assert steep > 0.9 * 2.0 * (15 / schedule.total_steps) ** 0.5
    assert forecast_loss([10], [4.0], schedule) is None
    assert forecast_loss([], [], schedule) is None


def test_what_parts_take_is_kept_apart_and_a_default_serves_where_nothing_was_seen():
    spent = Spent()
    spent.note("save", 2.0)
    for seconds in (5.0, 1.0, 3.0):  # the first one has loaded what it needs
        spent.note("sample", seconds)
    assert (spent.mean("sample"), spent.mean("save"), spent.mean("picture", 0.3)) == (2.0, 2.0, 0.3)
    again = Spent(**json.loads(json.dumps(vars(spent))))
    assert (again.total_s, again.mean("sample")) == (11.0, 2.0)


class TimedBench(Bench):
    """Runs that are to end in 5 s, of which each step takes step_s by a clock of its own."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.step_s = 0.25
        self.prepare_model = lambda model: setattr(self.env.run, "deadline", 0.0)
        patch = self.patch
        use_steady_clock(patch, 0.25, 0.005, lambda: self.step_s)
        # of what was left at the trial some more is gone when training begins
        patch.setattr(trial, "usable_seconds", lambda *_: 5.5)
        patch.setattr(train, "usable_seconds", lambda *_: 5.0)
        try_out = environment.try_out
        patch.setattr(environment, "try_out", lambda *given: try_out(*given[:5], 0.0))

    def describe(self, name: str, **settings) -> None:
        budget = {"max_steps": None, "time_budget_minutes": 0.1, "schedule": "wsd", "eval_freq": 2}
        super().describe(name, **(budget | {"eval_iter": 1, "warmup_steps": 2} | settings))


def test_what_is_left_until_a_deadline_leaves_room_for_python_to_end(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 1000.0)
    assert trial.usable_seconds(1060.0, 100.0, ALONE) == pytest.approx(60 - 0.8)
    assert trial.usable_seconds(990.0, 100.0, ALONE) == 10.0  # start-up took longer


def plans_of(bench: Bench) -> list[dict]:
    settings = json.loads((bench.run / "settings.json").read_text(encoding="utf-8"))
    assert settings["total_steps"] == settings["training"]["max_steps"]
    return [change for change in settings["changes"] if "after_step" in change]


def test_a_run_planned_anew_repeats_that_plan_wherever_it_is_stopped(workdir, monkeypatch, capsys):
    bench = TimedBench(workdir, monkeypatch)
    bench.step_s = 0.5
    bench.describe("whole")
    whole = bench.finish()
    [change] = plans_of(bench)
    # 21 steps of 0.25 s were planned: a quarter of them would be 5, but 4 took 35 % of the time
    assert change["after_step"] == 4
    assert (change["steps_before"], change["total_steps"]) == (21, 10)
    said = capsys.readouterr().out
    assert "21 steps are expected to take 0.0917 of 0.1 minutes" in said
    assert "after step 4 the run is planned anew: 10 steps instead of 21" in said
    assert len(of_steps(whole["rows"])) == 10
    assert bench.journal.history.forecast[1] < bench.journal.history.val_losses[-4]
    last = [float.fromhex(row["train/lr"]) for row in of_steps(whole["rows"])]
    assert last[-1] == pytest.approx(max(last) / 10)  # the decay has moved with the end

    bench.describe("run", save_every=4)
    with pytest.MonkeyPatch.context() as patch:
        bench.patch = patch
        bench.signal_at("take_step", 3, after=True)
        assert not bench.session()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train.Trainer, "step", killed_at(8))  # the newest checkpoint is of step 4
        bench.session()
    assert [dict(kept, at=0) for kept in plans_of(bench)] == [dict(change, at=0)]
    with pytest.MonkeyPatch.context() as patch:
        bench.patch = patch
        # as on a faster machine: step 4, where the plan is recorded, is not measured again
        faster = property(lambda journal: 0.01 if journal.steps <= 4 else 0.5)
        patch.setattr(Journal, "step_s", faster)
        bench.signal_at("take_step", 2, after=True)  # step 6, after which the plan is repeated
        assert not bench.session()
    found = bench.finish()
    assert [len(outcome["saved state"].pop("new_plans")) for outcome in (whole, found)] == [1, 1]
    compare(found, whole)
    assert len(plans_of(bench)) == 1


def test_a_machine_that_becomes_slower_moves_the_end_again_in_the_decay_too(workdir, monkeypatch):
    def elapsed_s(journal: Journal) -> float:
        return sum(
            0.05 if step < 60 else 0.1 if step < 80 else 0.07 for step in range(journal.steps)
        )

    bench = TimedBench(workdir, monkeypatch)
    monkeypatch.setattr(Journal, "elapsed_s", property(elapsed_s))
    bench.describe("whole")
    whole = bench.finish()
    changes = plans_of(bench)
    assert len(changes) > 2
    assert changes[0]["total_steps"] > 95  # of 0.05 s in 5 s
    last = changes[-1]
    assert last["after_step"] > last["steps_before"] - last["decay_steps"]  # in the decay
    assert 0.95 * 5 < elapsed_s(bench.journal) < 1.03 * 5
    rates = [float.fromhex(row["train/lr"]) for row in of_steps(whole["rows"])]
    assert rates[-1] == pytest.approx(max(rates) / 10)

    bench.describe("run")
    with pytest.MonkeyPatch.context() as patch:
        bench.patch = patch
        bench.signal_at("take_step", last["after_step"] + 1)
        assert not bench.session()
    found = bench.finish()
    assert [dict(change, at=0) for change in plans_of(bench)] == [
        dict(change, at=0) for change in changes
    ]
    compare(found, whole)


def test_a_plan_that_the_disk_refuses_is_not_followed(workdir, monkeypatch, capsys):
    def refuse(*arguments) -> None:
        raise ResourceError("the disk is full.\nFree some space.")

    monkeypatch.setattr(RunFolder, "note_plan", refuse)
    bench = TimedBench(workdir, monkeypatch)
    bench.step_s = 0.5
    bench.describe("run")
    assert bench.session()
    assert plans_of(bench) == []
    assert bench.journal.steps == 21
    assert capsys.readouterr().out.count("the disk is full. The run keeps its 21 steps") == 1


def test_a_pause_is_told_where_the_time_is_limited(monkeypatch, capsys):
    monkeypatch.setattr(Journal, "leave_out_pause", lambda journal: 36_000.0)
    limited = Budget(600.0, Costs(1.0, 0.5, 0.0, 0.0), 500, (500, 50), last_tokens=0)
    for budget, n_told in ((limited, 1), (None, 0)):
        new_trainer(100, budget=budget).save_where_due()
        told = capsys.readouterr().out.count("took 10h 0m: the pause is not counted")
        assert told == n_told


def test_a_process_knows_when_it_began(monkeypatch):
    def began_before_s() -> float:
        return time.perf_counter() - clock.process_began_at()

    with monkeypatch.context() as patch:
        patch.setattr(clock, "MOST_S", 86_400.0)
        assert time.process_time() - 0.1 < began_before_s() < 86_400
        patch.setattr(clock, "STAT", Path("nowhere"))  # as on other systems
        assert began_before_s() == pytest.approx(time.process_time(), abs=0.1)
    source = (REPOSITORY / "main.py").read_text(encoding="utf-8")  # torch takes seconds
    assert source.index("began_at = process_began_at()") < source.index("\nimport torch")
    # a shell that waited for an hour, and then became this process
    monkeypatch.setattr(clock, "_age_s", lambda: 3600.0)
    assert began_before_s() == pytest.approx(clock.MOST_S, abs=0.1)


def killed_at(step: int):
    """Trainer.step of a program that is killed in this step."""
    real = train.Trainer.step

    def killed(trainer, taken):
        if trainer.steps == step - 1:
            raise ZeroDivisionError
        return real(trainer, taken)

    return killed


def test_a_run_that_learns_by_heart_decays_ends_early_and_resumes_exactly(
    workdir, monkeypatch, capsys
):
    real = train._plan_loop
    monkeypatch.setattr(train, "_plan_loop", lambda env: replace(real(env), stops_by_heart=True))

    def evaluate(trainer, loader, **options) -> float:
        is_training = loader is bench.env.train_loader
        return 3.0 - trainer.steps / 20 if is_training else 3.0 + abs(trainer.steps - 4) / 20

    monkeypatch.setattr(train.Trainer, "evaluate", evaluate)
    bench = Bench(workdir, monkeypatch)
    settings = {"schedule": "wsd", "eval_freq": 2, "max_steps": 40}
    bench.describe("whole", **settings)
    whole = bench.finish()
    said = capsys.readouterr().out
    [change] = plans_of(bench)
    # evaluations of 2 and 4 come before the four that gain nothing
    assert change["after_step"] == 12 and change["why"] == BY_HEART
    assert (change["steps_before"], change["total_steps"]) == (40, 15)
    assert "the run ends after step 15 (best so far: step 4)" in said
    assert "the best weights, of step 4, are used from here on" in said
    assert bench.journal.weights_of_step == 4
    assert len(of_steps(whole["rows"])) == 15

    bench.describe("run", **settings)
    bench.signal_at("take_step", 11, 13, after=True)
    found = bench.finish()
    assert bench.stopped_at == [11, 13]
    compare(found, whole)
    assert math.isclose(float.fromhex(of_steps(found["rows"])[-1]["train/lr"]), 1e-3)
