"""What tried steps tell, and that they leave no trace."""

import copy
import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import engine.loss
import model
from distributed.parallel import Parallel
from engine.errors import ResourceError
from engine.memory import OutOfStepMemory
from engine.metrics import TokenSize
from engine.optim import build_optimizer
from engine.precision import Precision
from planning import agreement, trial
from planning.choices import WORTH_A_TRIAL, Choices
from planning.plan import resolve_settings
from planning.trial import Budget, Compiled, Costs, Trial, decide_compiling, shorten_samples
from tests.letters import BATCH, CONTEXT, FP32, tiny_loaders, tiny_model
from tests.resuming import Bench, of_steps, use_steady_clock
from training import learner
from training.learner import Learner, steps_between, take_step
from training.spacing import Spacing

BF16 = Precision("bf16", "as set", "cpu")


def new_trial(optimizer: str = "adamw", precision: Precision = FP32, **model) -> Trial:
    model = tiny_model(**model)
    optimizer = build_optimizer(optimizer, model, 1e-2, 0.1)
    return Trial(Learner(model, optimizer, precision, micro_batch=BATCH), tiny_loaders()[0], 1)


def state(tried: Trial) -> dict:
    """All that training starts from."""
    return copy.deepcopy(
        {
            "weights": tried.learner.model.state_dict(),
            "gradients": [p.grad for p in tried.learner.model.parameters()],
            "mode": [module.training for module in tried.learner.model.modules()],
            "optimizer": tried.learner.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "threads": torch.get_num_threads(),
            "next": (tried.loader.batch_sampler._next_epoch, tried.loader.batch_sampler._next_step),
        }
    )


def assert_same(one: dict, other: dict) -> None:
    torch.testing.assert_close(one.pop("weights"), other.pop("weights"), rtol=0, atol=0)
    assert torch.equal(one.pop("random"), other.pop("random"))
    assert one == other


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("adamw", FP32), ("muon", BF16)], ids=["adamw", "muon in bf16"]
)
def test_a_trial_changes_nothing_nor_the_training_after_it(optimizer, precision):
    def trained(with_trial: bool) -> dict:
        tried = new_trial(optimizer, precision, drop_rate=0.3, attention_drop_rate=0.3)
        torch.manual_seed(3)
        if with_trial:
            before = state(tried)
            assert tried.step_seconds() > 0
            assert_same(state(tried), before)
        for batches in itertools.islice(iter(tried.loader), 2):
            take_step(tried.learner.model, [batches], tried.learner.optimizer, precision, 1.0)
        return state(tried)

    one, other = trained(True), trained(False)
    moments = [after["optimizer"].pop("state") for after in (one, other)]
    torch.testing.assert_close(*moments, rtol=0, atol=0)
    assert all(value.any() for value in moments[0][0].values())
    assert_same(one, other)


def test_a_trial_goes_through_fewer_windows_until_they_fit_and_else_changes_nothing(
    monkeypatch, capsys
):
    sizes, most = [], 1

    def step(model, batches, *arguments, **options):
        sizes.append(max(len(ids) for ids, _ in batches))
        found = take_step(model, batches, *arguments, **options)
        if sizes[-1] > most:
            raise OutOfStepMemory(MemoryError("not enough"), sizes[-1])
        return found

    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all imports it takes longer than the test
    monkeypatch.setattr(learner, "take_step", step)
    tried = new_trial(drop_rate=0.3)
    assert tried.step_seconds() > 0
    assert sizes == [BATCH] + [1] * 4
    assert tried.learner.micro_batch == 1
    assert "1 windows at a time" in capsys.readouterr().out
    most, before = 0, state(tried)
    with pytest.raises(OutOfStepMemory):
        tried.step_seconds()
    assert_same(state(tried), before)


def test_the_time_of_a_step_is_the_median_without_the_first(monkeypatch):
    durations, now, seen = iter([60.0, 1.0, 9.0, 2.0]), 0.0, []

    def step(model, batches, *arguments, **options):
        nonlocal now
        now += next(durations)  # time passes in steps only
        seen.append(batches)

    monkeypatch.setattr(learner, "take_step", step)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    tried = new_trial()
    assert tried.step_seconds() == 2.0
    [[[first, *_], *_]] = steps_between(tried.loader, 0, 1)
    assert len(seen) == 4
    assert all(torch.equal(batches[0][0], first[0]) for batches in seen)


def test_a_run_with_a_time_budget_ends_with_its_schedule_and_goes_on_with_its_steps(
    workdir, monkeypatch, capsys
):
    bench = Bench(workdir, monkeypatch)
    use_steady_clock(monkeypatch, 0.25, 0.005, lambda: 0.19)
    bench.describe("run", max_steps=None, time_budget_minutes=0.1, eval_freq=None, eval_iter=1)
    bench.signal_at("take_step", 5)
    assert not bench.session()
    record = bench.env.run.record
    # evaluations of two batches, one a step of 0.25 s and one before, leave 5.76 s
    assert record.total_steps == record.training.max_steps == 23
    assert "Note: 23 steps are expected to take 0.1 minutes" in capsys.readouterr().out
    monkeypatch.setattr(Trial, "step_seconds", lambda self, **_: 0.01)  # as on a faster machine
    rows = of_steps(bench.finish()["rows"])
    printed = capsys.readouterr().out
    assert "5 of 23 steps are done" in printed
    # steps are faster than they were before the run: more of them fit into its 6 s
    assert "Note: after step 6 the run is planned anew: 31 steps instead of 23" in printed
    assert len(rows) == 31
    rates = [float.fromhex(row["train/lr"]) for row in rows]
    assert rates[-1] == pytest.approx(max(rates) / 10)  # the schedule ends with the run


@pytest.mark.parametrize(
    ("given", "token_s", "length"),
    [
        ({}, 0.001, 300),
        ({}, 0.01, 100),  # 60 s x 5 % for three samples
        ({}, 1.0, 50),
        ({"max_new_tokens": 300}, 1.0, 300),  # as set
    ],
)
def test_the_last_samples_take_a_small_part_of_a_time_budget(given, token_s, length):
    plan = resolve_settings({"sampling_params": given}, "config_run.py")
    plan = replace(plan, sampling=plan.sampling.fitted(TokenSize(1.0, 1.0)))
    assert plan.sampling.max_new_tokens == 300
    plan, notices = shorten_samples(plan, Costs(0.5, 0.1, token_s, 0.0), 60.0)
    assert plan.sampling.max_new_tokens == length
    assert [notice.startswith(f"samples have {length} tokens") for notice in notices] == [True] * (
        length < 300
    )


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that does nothing; notes what was asked of it."""
    calls = []
    monkeypatch.setattr(trial, "what_prevents_compiling", lambda device: None)
    monkeypatch.setattr(trial, "compile_model", lambda *_, **__: calls.append("compile"))
    monkeypatch.setattr(trial, "undo_compiling", lambda *_: calls.append("undo"))
    return calls


@pytest.mark.parametrize(("step_s", "n_steps", "n_batches"), [(5.0, 2, [1]), (0.1, 4, [1, 4])])
def test_what_takes_long_is_timed_once(monkeypatch, step_s, n_steps, n_batches):
    now, steps, batches, samples = 0.0, [], [], []

    def takes(seconds: float, into: list, what: object) -> None:
        nonlocal now
        now += seconds
        into.append(what)

    monkeypatch.setattr(trial.time, "perf_counter", lambda: now)
    monkeypatch.setattr(Learner, "try_step", lambda *_: takes(step_s, steps, None))
    monkeypatch.setattr(
        Learner, "evaluate", lambda _, loader, n, **__: takes(n * step_s / 2, batches, n)
    )

    def stream(_, rows: list[list[int]], *, max_new_tokens: int, **__) -> Iterator[None]:
        """A prompt's token takes a thousandth of a step, a new one a hundredth."""
        takes(step_s * sum(map(len, rows)) / 1000, samples, [len(row) for row in rows])
        for _ in range(max_new_tokens):
            takes(step_s / 100, [], None)
            yield

    monkeypatch.setattr(trial, "stream", stream)
    monkeypatch.setattr(trial, "_draw", lambda: None)
    tried = replace(new_trial(), prompt_lengths=[400, 7, 500])
    found = tried.costs(1.0)
    n_samples = 1 + (step_s < 2)
    assert (len(steps), batches, samples) == (n_steps, n_batches, n_samples * [[400, 7, 500]])
    expected = (step_s, step_s / 2, 0.917 * step_s, 0.01 * step_s)
    assert (found.step, found.batch, found.prompts, found.token) == pytest.approx(expected)


def test_reading_the_prompts_of_samples_is_a_part_of_a_runs_time():
    run = Spacing(100, steps_per_epoch=1000, eval_freq=25)  # evaluates at its ends, too
    seconds = [
        Budget(600.0, Costs(1.0, 0.0, 0.0, 0.0, prompts=prompts), 1000, (1, 1), 0).total_s(run, 1)
        for prompts in (0.0, 0.01)
    ]
    reads = run.count() + trial.N_SAMPLES  # a sample at each evaluation, and the last ones
    assert run.count() == 5
    assert seconds[1] - seconds[0] == pytest.approx(0.01 * reads)


def test_ranks_that_share_a_step_stop_timing_after_the_same_one(monkeypatch):
    """A rank whose time is over goes on, with a sharded model, until that of all is."""
    tried, votes, taken = new_trial(), [], []
    answers = iter([False] * 6 + [True])

    def lowest(number: int) -> int:
        votes.append(bool(number))
        return next(answers)

    parallel = Parallel(0, 1)
    monkeypatch.setattr(parallel, "lowest", lowest)
    tried.learner.parallel = parallel
    monkeypatch.setattr(Learner, "try_step", lambda self, step, norm: taken.append(step))
    assert tried._mean_step_seconds(0.0) >= 0
    assert votes == [False, False] + [True] * 5  # its own wish, at each step
    assert len(taken) == 1 + len(votes)


def large_steps(n: float) -> int:
    """Steps whose operations are n times as many as are worth a trial."""
    return int(n * WORTH_A_TRIAL / (BATCH * CONTEXT * tiny_model().flop_per_token()))


def test_where_the_answer_is_known_nothing_is_tried(compiler, monkeypatch):
    monkeypatch.setattr(Trial, "step_seconds", None)
    for requested, obstacle, steps, reason in (
        (False, None, 10**9, "as set"),
        ("auto", None, large_steps(0.99), "a run this short would not repay it"),
        ("auto", "no compiler", 10**9, "no compiler"),
        (True, "no compiler", 10**9, "no compiler"),
    ):
        monkeypatch.setattr(trial, "what_prevents_compiling", lambda device, x=obstacle: x)
        assert decide_compiling(requested, new_trial(), steps, None) == Compiled(False, reason)
    assert compiler == []


@pytest.mark.parametrize(
    ("total", "budget", "step_s", "compiled"),
    [
        # 15 % of a step's time are saved, and twice 30 s must be
        (1.01, None, 0.0, False),
        (1.01, None, 1.0, True),
        (None, 399.0, 1.0, False),
        (None, 402.0, 1.0, True),
        (None, 402.0, 0.01, True),
    ],
)
def test_auto_compiles_where_the_steps_repay_it(
    compiler, monkeypatch, capsys, total, budget, step_s, compiled
):
    measured = iter([step_s, 0.9 * step_s])
    monkeypatch.setattr(Trial, "step_seconds", lambda self, **_: next(measured))
    total = None if total is None else large_steps(total)
    found = decide_compiling("auto", new_trial(), total, budget)
    assert found.on == compiled
    assert found.reason.endswith(" repay it" if compiled else " would not repay it")
    steps = total if budget is None else round(budget / step_s)
    said = f"{steps:,} steps of "
    if budget is not None and not compiled:  # which is known before a step is timed
        said = f"a run of {budget:g} s "
        assert next(measured) == step_s
    assert found.reason.startswith(said)
    assert compiler == ["compile"] * compiled
    assert ("✓ Compiled in" in capsys.readouterr().out) == compiled


def test_auto_keeps_what_is_faster_and_true_compiles_however_short_the_run(
    compiler, monkeypatch, capsys
):
    assert decide_compiling(True, new_trial(), 1, None) == Compiled(True, "as set")
    assert "Compiling the model's blocks" in capsys.readouterr().out
    monkeypatch.setattr(Trial, "step_seconds", lambda self, **_: 1.0)
    found = decide_compiling("auto", new_trial(), None, 1000.0)
    assert found == Compiled(False, "compiled steps are no faster here: 1 s, 1 s without")
    assert compiler == ["compile", "compile", "undo"]


def test_what_a_trial_found_is_taken_by_later_runs_on_the_machine(compiler, monkeypatch, tmp_path):
    def decide(budget_s: float, *seconds: float) -> Compiled:
        tried, measured = new_trial(), iter(seconds)
        tried.choices = Choices(tmp_path, torch.device("cpu"), 1)
        monkeypatch.setattr(Trial, "step_seconds", lambda self, **_: next(measured))
        return decide_compiling("auto", tried, None, budget_s)

    assert decide(1000.0, 1.0, 0.5).on
    found = decide(1000.0, 9.9)  # no step is timed as it is written, nor compared
    assert found == Compiled(True, "as a trial on this machine found")
    # compiling took no time here and saved a half, so that it is tried for shorter runs, too
    assert not decide(0.0, 1.0).on
    assert decide(2.0, 1.0, 0.5).on
    assert not decide(3.0, 1.0, 1.0).on  # once as fast without: never tried again for this length
    assert decide(3.0) == Compiled(False, "a trial on this machine found that it would not pay")
    assert compiler == ["compile"] * 4 + ["undo"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("no such kernel\nand more"), r"KeyError: 'no such kernel\nand more'"),
        (RuntimeError(f"{'x' * 999}\nand a page more"), f"RuntimeError: {'x' * 200}"),
        (OutOfStepMemory(MemoryError(), BATCH), "compiled steps ran out of memory"),
    ],
)
def test_what_fails_to_compile_runs_as_it_is_written_with_its_micro_batch(
    compiler, monkeypatch, error, reason
):
    def fail(*arguments, **options):
        raise error

    tried = new_trial()
    before, micro_batch = state(tried), tried.learner.micro_batch
    monkeypatch.setattr(learner, "take_step", fail)
    assert decide_compiling(True, tried, 10**9, None) == Compiled(False, reason)
    assert compiler == ["compile", "undo"]
    assert tried.learner.micro_batch == micro_batch
    assert_same(state(tried), before)
    error = KeyboardInterrupt()  # Ctrl-C ends the program
    with pytest.raises(KeyboardInterrupt):
        tried.compile(None)


def agreeing(name: str, spoil=None) -> Precision:
    """What is found of a model whose block, under autocast, gives what `spoil` makes of it."""
    model = tiny_model()
    if spoil is not None:
        model.blocks[0].mlp.register_forward_hook(
            lambda module, inputs, x: spoil(x) if torch.is_autocast_enabled("cpu") else None
        )
    ids, targets = torch.randint(model.config.vocab_size, (2, 1, model.config.context_length))
    precision = Precision(name, "as set", "cpu")
    return agreement.precision_that_agrees(model, ids, targets, precision)


def test_right_arithmetic_agrees_with_the_cpu_and_where_bf16_is_wrong_fp32_is_used():
    for name in ("fp32", "bf16"):
        assert agreeing(name) == Precision(name, "as set", "cpu")
    for spoil in (lambda x: 30 * x + 3, lambda x: x * float("nan")):
        agreed = agreeing("bf16", spoil)
        assert (agreed.name, agreed.reason) == ("fp32", "bf16 gives wrong numbers here")


def test_wrong_gradients_or_a_wrong_cached_step_are_found_where_logits_are_right(monkeypatch):
    """As Metal's product that leaves its output unwritten does, or a cache that is not filled."""
    real_loss, real_extend = engine.loss._loss_and_gradients, model.Newest.extend

    def without_head_gradient(*arguments, **options):
        loss, d_hidden, d_weight = real_loss(*arguments, **options)
        return loss, d_hidden, d_weight * (not torch.is_autocast_enabled("cpu"))

    def stale(self, layer, k, v):
        keys, values = real_extend(self, layer, k, v)
        is_wrong = k.shape[2] == 1 and torch.is_autocast_enabled("cpu")
        return keys, values + 9.0 * is_wrong

    for target, name, wrong in (
        (engine.loss, "_loss_and_gradients", without_head_gradient),
        (model.Newest, "extend", stale),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, wrong)
            assert agreeing("bf16").name == "fp32"
    assert agreeing("bf16").name == "bf16"


def test_a_device_that_is_wrong_in_every_precision_is_refused(monkeypatch):
    monkeypatch.setattr(agreement, "disagreements", lambda *arguments: {"loss": float("nan")})
    with pytest.raises(ResourceError, match=r'(?s)loss nan.*set DEVICE = "cpu"'):
        agreeing("bf16")
