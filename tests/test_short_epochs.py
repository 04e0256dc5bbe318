"""Short texts take the time they should: what is spaced by steps and by time, not by epochs."""

import itertools
import math
import re
import time
import tracemalloc

import pytest
import torch

import main
import train
from data import EvaluationBatches, evaluation_loader
from distributed.parallel import ALONE
from engine import console
from engine.console import begin_report, report, track
from engine.optim import EVALUATIONS, LONGEST_EVAL_FREQ, default_eval_freq
from planning.trial import Budget, Costs
from tests.letters import Letters, loader_of_13_windows, new_trainer, tiny_loaders, tiny_model
from tests.resuming import Bench, check_stops, use_steady_clock
from training import spacing
from training.learner import steps_between
from training.spacing import EVALUATION_SHARE, Allowance, Spacing, allowed_seconds
from training_utils import TrainingConfig


@pytest.mark.parametrize("steps_per_epoch", [1, 2, 7, 50, 100, 333, 5000])
def test_the_evaluations_of_a_run_are_counted_and_few_however_short_the_epochs(steps_per_epoch):
    for total, freq in itertools.product((1, 9, 60, 1500, 4999), (1, 3, 100, None)):
        run = Spacing(total, steps_per_epoch, freq or default_eval_freq(total))
        due = [step for step in range(total + 1) if run.is_due(step)]
        assert due[0] == 0 and due[-1] == total
        assert run.count() == len(due)
        if freq is None:
            longest = max(total / LONGEST_EVAL_FREQ, 2 * EVALUATIONS)
            assert len(due) <= 2 * longest + 2
        ends = [step for step in range(1, total + 1) if run.ends_epoch(step)]
        assert ends[-1] == total
        if not run.has_long_epochs:
            assert ends == [total]


def test_epochs_of_one_step_share_a_bar_evaluations_and_batches(capsys, monkeypatch):
    made = []
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 1)
    loader, val = tiny_loaders(1)
    real = type(loader).__iter__
    monkeypatch.setattr(type(loader), "__iter__", lambda self: made.append(self) or real(self))
    monkeypatch.setattr(train, "SAMPLE_EVERY", 10)
    trainer = new_trainer(40, eval_freq=4)
    train.training_loop(trainer, loader, val)
    history, printed = trainer.journal.history, capsys.readouterr()
    assert history.steps == list(range(0, 41, 4))
    assert [sample.step for sample in history.samples] == [0, 12, 24, 36, 40]
    assert re.fullmatch(r"Steps: 100%\|.*\| 40/40\n", printed.err)
    assert printed.out.count("(End Epoch)") == 1
    assert len([one for one in made if one is loader]) == 1


@pytest.mark.parametrize("sampling", ["windows", "random"])
def test_steps_through_several_epochs_are_those_of_each(sampling):
    def ids(first: int, last: int) -> list[list]:
        loader = loader_of_13_windows(4, sampling)
        steps = steps_between(loader, first, last)
        return [[batch[0].tolist() for batch in step.batches] for step in steps]

    each = [ids(epoch * 3, epoch * 3 + 3) for epoch in range(4)]
    assert ids(0, 12) == list(itertools.chain(*each))
    assert ids(2, 8) == list(itertools.chain(*each))[2:8]
    assert each[0] != each[1]


def test_pictures_and_samples_take_a_share_of_the_run_or_little(monkeypatch):
    monkeypatch.setattr(spacing, "EXTRAS_GRACE_S", 0.3)
    for cost in (0.01, 0.1, 1.0, 10.0):
        allowance, elapsed_s = Allowance(), 0.0
        for _ in range(10_000):
            elapsed_s += 0.1
            if allowance.allows(elapsed_s):
                allowance.spend(cost)
                elapsed_s += cost
        assert allowance.spent_s >= 0.5 * allowed_seconds(elapsed_s) - cost
        assert allowance.spent_s <= max(allowed_seconds(elapsed_s), cost)


def test_lines_that_come_too_fast_are_dropped_and_those_that_matter_kept(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(console, "SPARE_LINES", 5)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for run in range(2):
        begin_report()
        for number in range(6000):
            now += 0.01
            report(f"{run} {number}")
            list(track("a", 1, f"Epoch {number}"))
        assert report("the end", keep=True)
        assert all(report("asked", asked=True) for _ in range(50))
        printed = capsys.readouterr()
        n_lines = printed.out.count("\n") + printed.err.count("\n") - 51
        assert 60 / 10 <= n_lines <= 60 / 10 + 7
    with pytest.raises(ZeroDivisionError):
        list(track((1 / n for n in (1, 0)), 2, "Epoch 1"))
    assert "Epoch 1:  50%" in capsys.readouterr().err  # where it stopped is always said


@pytest.mark.parametrize("seconds", [15.0, 60.0, 3600.0])
@pytest.mark.parametrize(
    ("step_s", "steps_per_epoch", "batches"),
    [
        (0.002, 1, (1, 1)),
        (0.01, 2, (2, 1)),
        (0.02, 18, (18, 2)),
        (0.05, 180, (180, 20)),
        (0.2, 1800, (1800, 200)),
        (0.5, 10**6, (10**6, 10**5)),
    ],
)
def test_a_budget_holds_steps_evaluations_samples_and_pictures(
    monkeypatch, seconds, step_s, steps_per_epoch, batches
):
    monkeypatch.setattr(spacing, "EXTRAS_GRACE_S", 0.3)
    costs = Costs(step_s, step_s / 3, 0.004, 0.2)
    budget = Budget(seconds, costs, steps_per_epoch, batches, last_tokens=150)
    for eval_iter in (10, 1, 1000, None):
        planned = budget.plan(TrainingConfig(eval_iter=eval_iter))
        run = Spacing(planned.max_steps, steps_per_epoch, planned.eval_freq)
        assert planned.eval_iter <= (eval_iter or batches[1])
        assert run.count() >= 5
        is_least = run.count() == 5 and planned.eval_iter == 1
        assert is_least or (
            budget.evaluation_s(run, planned.eval_iter) <= EVALUATION_SHARE * seconds
        )
        spent = budget.total_s(run, planned.eval_iter)
        assert seconds - 3 * step_s - 0.1 * seconds <= spent <= seconds
        assert planned.max_steps * step_s >= 0.7 * seconds


@pytest.mark.parametrize(
    ("total_steps", "n_val_batches", "accumulation", "eval_iter"),
    [
        (9, 2, 1, 2),  # a short text is read in any case
        (1000, 40, 1, 10),  # eleven evaluations of both texts for 150 of 3000 forward passes
        (1000, 40, 4, 27),
        (10_000, 40, 1, 10),  # 101 evaluations
        (10_000, 40, 4, 29),
        (10_000, 40, 8, 40),
    ],
)
def test_evaluations_read_the_validation_text_where_a_twentieth_of_the_run_is_enough(
    total_steps, n_val_batches, accumulation, eval_iter
):
    run = Spacing(total_steps, 10**9, default_eval_freq(total_steps))
    assert run.default_eval_iter(n_val_batches, accumulation) == eval_iter
    passes = 2 * eval_iter * run.count()
    assert eval_iter <= 10 or passes <= EVALUATION_SHARE * 3 * total_steps * accumulation


def test_a_budget_heeds_eval_freq_and_is_one_step_at_least():
    costs = Costs(1.0, 0.5, 0.0, 0.0)
    budget = Budget(120.5, costs, 10**6, (100, 100), last_tokens=0)
    planned = budget.plan(TrainingConfig(eval_freq=7, eval_iter=3))
    assert (planned.eval_freq, planned.eval_iter) == (7, 1)
    assert Budget(0.1, costs, 1, (1, 1), 0).plan(TrainingConfig()).max_steps == 1
    enough = Budget(600.0, costs, 10**6, (100, 100), last_tokens=0, most_steps=40)
    assert enough.plan(TrainingConfig()).max_steps == enough.steps_after(10, 5, 1) == 40


def test_warm_up_is_shorter_than_the_run_that_fits_and_at_most_the_share_it_may_have():
    budget = Budget(100.0, Costs(1.0, 0.0, 0.0, 0.0), 10**6, (100, 100), last_tokens=0)
    steps = budget.plan(TrainingConfig()).max_steps
    assert 90 < steps <= 100
    for asked, share, got in (
        (None, 0.25, None),
        (20, 1.0, 20),
        (500, 1.0, steps - 1),
        (500, 0.25, steps // 4),
        (20, 0.25, 20),
    ):
        planned = budget.plan(TrainingConfig(warmup_steps=asked), most_warmup=share)
        assert (planned.warmup_steps, planned.max_steps) == (got, steps)


def test_a_budgets_run_resumes_with_the_evaluations_that_were_planned(workdir, monkeypatch):
    settings = {"max_steps": None, "time_budget_minutes": 0.02, "eval_freq": None, "eval_iter": 8}
    bench = Bench(workdir, monkeypatch)
    use_steady_clock(monkeypatch, 0.05, 0.01, lambda: 0.04)
    check_stops(bench, [3], **settings)
    assert bench.env.train_config.eval_iter < 8


def test_the_last_evaluation_is_part_of_a_budget(workdir, monkeypatch, capsys, no_pictures):
    use_steady_clock(monkeypatch, 0.05, 0.01, lambda: 0.05)
    (workdir / "text.txt").write_text("the sea is calm tonight. " * 400, encoding="utf-8")
    params = {"time_budget_minutes": 0.01, "batch_size": 1, "max_length": 8}
    params |= {"emb_dim": 8, "n_heads": 1, "n_layers": 1}
    settings = (
        f'DATA = "text.txt"\nTOKENIZER = "char"\nCUSTOM_MODE = True\ncustom_params = {params}'
    )
    settings += "\nsampling_params = {'max_new_tokens': 1}\n"
    (workdir / "settings.py").write_text(settings, encoding="utf-8")
    assert main.main(["settings.py"]) == 0
    found = re.search(r"over (\d+) of (\d+) batches of the validation", capsys.readouterr().out)
    assert 2 <= int(found[1]) < int(found[2]) == 250  # they overlap by half


def test_samples_on_the_way_are_drawn_alike_and_leave_the_runs_generator_alone(monkeypatch):
    trainer = new_trainer(0, prompts=["abc", "h"])
    before = torch.get_rng_state()
    options = {}
    real = train.generate
    monkeypatch.setattr(train, "generate", lambda *a, **o: options.update(o) or real(*a, **o))
    for _ in range(2):
        trainer.sample("After step 1")
    one, two = trainer.journal.history.samples
    assert one.texts == two.texts
    assert (options["temperature"], options["top_k"]) == (0.8, 50)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_text_to_which_the_model_adds_nothing_visible_says_so(monkeypatch):
    end, blank = Letters.end_of_text_id, ord(" ") - ord("a")
    rows = [[0, 1, end], [0, 1, blank, end], [0, 1, blank, blank], [7, 3, end], [7, blank, 3]]
    monkeypatch.setattr(train, "generate", lambda model, ids, **options: rows)
    texts = train.continue_prompts(tiny_model(), Letters(), ["ab", "ab", "ab", "h", "h"])
    ended, goes_on = " [the model ends the text here]", " [the model goes on with blanks]"
    assert texts == ["ab" + ended, "ab " + ended, "ab  " + goes_on, "hd", "h d"]


class Huge:
    """A text of 34 million windows and a tail, of which nothing is kept."""

    n_whole = 34_000_000

    def __len__(self) -> int:
        return self.n_whole + 1


def test_an_evaluation_of_a_huge_text_lists_nothing():
    tracemalloc.start()
    some = EvaluationBatches(Huge(), 8, 3, 5, ALONE)
    assert len(some) == len(list(some)) == 5 * 3
    whole = EvaluationBatches(Huge(), 8, 3, None, ALONE)
    assert len(whole) == Huge.n_whole // 8 * 3 + 1
    assert list(itertools.islice(whole, 4)) == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9, 10]]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_the_ranks_shares_of_an_evaluation_are_all_of_it():
    class Rank:
        def __init__(self, rank: int) -> None:
            self.rank, self.world = rank, 3

    _, val = tiny_loaders()
    for most, size in itertools.product((None, 1, 2, 9), (1, 2, 5)):
        whole = list(evaluation_loader(val, most, micro_batch=size).batch_sampler)
        shares = [evaluation_loader(val, most, Rank(n), size).batch_sampler for n in range(3)]
        assert [len(share) for share in shares] == [len(list(share)) for share in shares]
        found = sorted((part for share in shares for part in share), key=lambda p: p[0])
        assert found == whole
        assert math.ceil(len(whole) / 3) == len(shares[0])
