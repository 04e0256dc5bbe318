"""The diagnosis: right on runs with a known fault, silent on healthy ones, in both languages."""

import dataclasses
import functools
import json
import math
import re
import time

import numpy as np
import pytest

from benchmarks import diagnosis as benchmark
from benchmarks.diagnosis import HISTORIES, count_right, labelled_runs, put_into, read_history
from insight.curves import Curves
from insight.diagnosis import NOTE, Facts, Finding, diagnose, measure, repetition
from insight.verdict import change_lines
from planning.plan import RunPlan, resolve_settings
from storage.files import write_json
from tests.test_chinese_documents import BLANKS, HALF_WIDTH, HAN


@functools.cache
def histories() -> list[dict]:
    return json.loads(HISTORIES.read_bytes())["runs"]


def of(name: str) -> tuple[Curves, Facts]:
    return read_history(next(row for row in histories() if row["name"] == name))


@functools.cache
def all_findings() -> list[tuple[Facts, Finding]]:
    pairs = [read_history(row) for row in histories()]
    return [(facts, found) for curves, facts in pairs for found in diagnose(curves, facts)]


def kinds(curves: Curves, facts: Facts) -> list[str]:
    return [finding.kind for finding in diagnose(curves, facts)]


def test_nine_of_ten_runs_have_the_right_finding_first_and_hardly_any_healthy_one_an_alarm():
    rows = histories()
    counts = {row["kind"]: 0 for row in rows}
    for row in rows:
        counts[row["kind"]] += 1
    assert counts.pop("healthy") == 30
    assert len(counts) >= 12 and sum(counts.values()) >= 60
    assert {row["name"] for row in rows} == {run.name for run in labelled_runs()}
    kept_out = [row for row in rows if row["kept_out"]]
    assert len(kept_out) >= len(rows) / 3
    for part in (rows, kept_out):
        found = count_right(part)
        assert found["right"] >= 0.9 * found["faulty"], found["wrong"]
        assert found["alarmed"] <= 0.05 * found["healthy"], found["wrong"]


def stretched(curves: Curves, times: int) -> Curves:
    """The curves of a run of so many times the steps, each of which learns as much less."""

    def long(values: list) -> list:
        return np.repeat(values, times).tolist()

    return dataclasses.replace(
        curves,
        steps=[*range(1, times * len(curves.steps) + 1)],
        losses=long(curves.losses),
        grad_norms=long(curves.grad_norms),
        eval_steps=[times * step for step in curves.eval_steps],
    )


@pytest.mark.parametrize("kind", ["by-heart", "plateau", "rate-high", "unlike", "nan"])
def test_a_run_of_100000_steps_is_judged_as_one_of_some_hundreds_in_a_second(kind):
    curves, facts = of(f"{kind}-0")
    long = stretched(curves, -(-100_000 // len(curves.steps)))
    facts = dataclasses.replace(facts, total_steps=len(long.steps))
    began_at = time.process_time()
    assert kinds(long, facts)[0] == kind
    assert time.process_time() - began_at < 2


def test_a_run_that_has_hardly_begun_has_no_finding():
    _, facts = of("by-heart-0")
    assert diagnose(Curves(), facts) == []
    begun = Curves(eval_steps=[0], train_losses=[5.0], val_losses=[5.0], eval_tokens=[0])
    assert diagnose(begun, facts) == []
    assert [f.kind for f in diagnose(begun, dataclasses.replace(facts, skipped=3))] == ["nan"]


def test_an_evaluation_that_is_not_finite_is_a_finding_with_its_step():
    curves, facts = of("healthy-1")
    assert "nan" not in kinds(curves, facts)
    curves.add({"step": 900, "eval/train_loss": None, "val/loss": None})
    (finding,) = diagnose(curves, facts)
    assert finding.kind == "nan" and "The evaluation at step 900 gave" in finding.evidence.en


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"leaked": 0.4}, "leak"),
        ({"repeated": 0.8}, "duplicates"),
        ({"repeated": 0.8, "leaked": 0.9}, "duplicates"),  # copies are why they are in both
        ({"skipped": 2}, "nan"),
        ({"samples": ("over and over and over and over and over and over and over",)}, "repeats"),
    ],
)
def test_what_is_known_of_a_run_makes_a_finding_of_its_own(changes, kind):
    curves, facts = of("healthy-1")
    assert kind not in kinds(curves, facts)
    assert kinds(curves, dataclasses.replace(facts, **changes))[0] == kind


def test_a_run_on_given_weights_is_not_told_that_its_rate_is_low_or_its_model_large():
    for name in ("rate-low-0", "model-large-0"):
        curves, facts = of(name)
        tuned = kinds(curves, dataclasses.replace(facts, begins_from_weights=True))
        assert not {"rate-low", "model-large"} & {*tuned}


def test_every_finding_has_sentences_in_both_languages_without_a_slip_of_typography():
    assert {f.kind for _, f in all_findings()} >= {run.kind for run in labelled_runs()} - {
        "healthy"
    }
    for _, finding in all_findings():
        assert 0.5 <= finding.confidence <= 1
        for words in (finding.title, finding.evidence, finding.advice):
            assert words.en and not HAN.search(words.en)
            assert HAN.search(words.zh)
            assert not BLANKS.search(words.zh) and not HALF_WIDTH.search(words.zh), words.zh
            assert not re.search(r"\bnan\b|\binf\b|None", words.en + words.zh)


def test_histories_of_runs_that_are_not_there_stay_in_the_results(tmp_path, monkeypatch):
    kept = json.loads(HISTORIES.read_bytes())
    kept["runs"] = kept["runs"][:3]
    results = tmp_path / "results.json"
    write_json(results, kept)
    monkeypatch.setattr(benchmark, "HISTORIES", results)
    monkeypatch.setattr(benchmark, "usable_cache", lambda: tmp_path)
    monkeypatch.setattr(benchmark.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("sys.argv", ["diagnosis", "--make", "0"])
    benchmark.main()
    found = json.loads(results.read_bytes())
    assert (found["runs"], found["applied"]) == (kept["runs"], kept["applied"])
    assert found["summary"]["all"]["healthy"] + found["summary"]["all"]["faulty"] == 3
    # a run that is made anew takes its row's place, and one that is made first has its own
    first, *others = kept["runs"]
    assert benchmark.merge(others[1:], [others[0], first | {"facts": 1}]) == [
        first | {"facts": 1},
        *others,
    ]


MODES = {
    "quick": {},
    "full": {"QUICK_MODE": False},
    "custom": {"CUSTOM_MODE": True},
    "auto": {"MINUTES": 0.5},
    "custom in minutes": {"CUSTOM_MODE": True, "MINUTES": 9000},
}
# that a line may set on the way to what it changes
LEFT_OUT = {"CUSTOM_MODE", "MODEL", "custom_params", "sampling_params", "model_overrides"}
LLAMA = {"architecture": "llama", "n_embd": 384, "n_heads": 6, "n_kv_heads": 3, "zero_init": True}
# as the file is shipped, in another system's words, and with a model of one's own
CUSTOM_PARAMS = (
    {"num_epochs": 3, "max_steps": None, "learning_rate": None, "model_overrides": {}},
    {"lr": 0.01, "n_embd": 32, "num_heads": 2, "warmup_iters": 40, "model_overrides": None},
    {"max_length": 64, "model_overrides": LLAMA},
)


def resolve(settings: dict) -> RunPlan:
    return resolve_settings(settings, "config_run.py")


def facts_of(plan: RunPlan, facts: Facts) -> Facts:
    """The facts of a run of this plan that went as another one."""
    overrides = plan.training.model_overrides
    return dataclasses.replace(
        facts,
        mode=plan.mode,
        precision="bf16",
        minutes=plan.run.MINUTES,
        model_name=plan.model_name,
        custom_params=plan.run.custom_params,
        warmup_steps=plan.training.warmup_steps or facts.warmup_steps,
        emb_dim=overrides.get("emb_dim", facts.emb_dim),
        n_heads=(n_heads := overrides.get("n_heads", facts.n_heads)),
        n_kv_heads=overrides.get("n_kv_heads", n_heads),
    )


@pytest.mark.parametrize(
    ("mode", "own"),
    [
        *(("quick", 0), ("full", 0), ("full", 1), ("auto", 0)),
        *(("custom", 0), ("custom", 1), ("custom", 2), ("custom in minutes", 1)),
    ],
)
def test_the_lines_to_change_are_accepted_in_every_mode_and_keep_the_other_numbers(mode, own):
    before = MODES[mode] | {"custom_params": CUSTOM_PARAMS[own]}
    plan, seen = resolve(before), set()
    for name in {row["kind"]: row["name"] for row in histories()}.values():
        curves, facts = of(name)
        facts = facts_of(plan, facts)
        for finding in diagnose(curves, facts):
            changes = finding.changes
            lines = [line.en for line in change_lines(changes, facts)]
            seen |= changes.keys()
            after = resolve(put_into(before, lines))
            if lines[0].startswith("MINUTES"):
                assert before.get("MINUTES") != after.run.MINUTES
                continue  # which choose the other numbers
            for part in ("run", "training", "sampling"):
                wanted = dataclasses.asdict(getattr(plan, part)) | {"model_overrides": {}}
                wanted |= {n: v for n, v in changes.items() if n in wanted}
                for name, value in dataclasses.asdict(getattr(after, part)).items():
                    if name not in LEFT_OUT and (part != "training" or mode != "full" or own == 0):
                        assert value == wanted[name], (name, lines)
            if mode != "full" or own == 0:  # else numbers of one's own are read now
                assert after.model == plan.model | changes.get("model_overrides", {})
    lengths = {"MINUTES"} if "MINUTES" in before else {"max_steps"}
    assert seen >= {"learning_rate", "batch_size", "DATA", "model_overrides", "PRECISION"} | lengths
    assert not seen & ({"MINUTES", "max_steps"} - lengths)


@pytest.mark.parametrize(
    ("shape", "smaller", "wider"),
    [
        ({"emb_dim": 384, "n_heads": 6}, (96, 2, None), (768, 12, None)),
        ({"emb_dim": 768, "n_heads": 12, "n_kv_heads": 4}, (192, 3, 1), (1536, 24, 8)),
        ({"emb_dim": 4, "n_heads": 1}, (4, 1, None), (8, 2, None)),
        ({"emb_dim": 200, "n_heads": 5, "n_kv_heads": 1}, (48, 1, 1), (400, 10, 2)),
    ],
)
def test_another_width_comes_with_heads_that_fit(shape, smaller, wider):
    for name, expected in (("model-large-0", smaller), ("model-small-0", wider)):
        curves, facts = of(name)
        facts = dataclasses.replace(facts, n_kv_heads=shape["n_heads"])
        facts = dataclasses.replace(facts, n_layers=4, **shape)
        found = next(f for f in diagnose(curves, facts) if f.kind == name[:-2])
        overrides = found.changes["model_overrides"]
        assert tuple(overrides.get(n) for n in ("emb_dim", "n_heads", "n_kv_heads")) == expected
        assert overrides["n_layers"] == (2 if name == "model-large-0" else 5)


def test_a_quick_run_is_told_to_let_minutes_choose_and_a_full_one_keeps_its_own():
    facts = of("rate-high-0")[1]
    changes = {"learning_rate": 1e-4, "PRECISION": "fp32"}
    quick, full = (
        [
            line.en
            for line in change_lines(
                changes, dataclasses.replace(facts, mode=mode, model_name="mini")
            )
        ]
        for mode in ("quick", "full")
    )
    assert quick == ["MINUTES = 5  # chooses all numbers for the text", 'PRECISION = "fp32"']
    assert full[:3] == ["CUSTOM_MODE = True", 'MODEL = "mini"', 'PRECISION = "fp32"']
    assert full[3] == '"learning_rate": 0.0001,  # in custom_params'
    assert '"num_epochs": 10, "batch_size": 4' in full[4] and "learning_rate" not in full[4]
    given = dataclasses.replace(facts, mode="full", begins_from_weights=True)
    assert [line.en for line in change_lines(changes, given)] == [full[0], *full[2:4]]


def test_a_run_that_is_to_learn_a_few_conversations_by_heart_is_not_told_that_it_does():
    for name, kind in (("by-heart-0", "by-heart"), ("model-large-0", "model-large")):
        curves, facts = of(name)
        assert kind in kinds(curves, facts)
        found = kinds(curves, dataclasses.replace(facts, keeps_last=True))
        assert not {"by-heart", "model-large", "plateau"} & {*found}


def test_a_run_that_still_trains_is_not_told_that_it_is_unfinished_or_gains_nothing():
    for name in ("unfinished-0", "plateau-0"):
        curves, facts = of(name)
        assert kinds(curves, facts)[0] == name[:-2]
        assert name[:-2] not in kinds(curves, dataclasses.replace(facts, is_over=False))


def test_a_model_of_one_pass_through_a_large_text_is_not_too_small():
    """20 tokens a parameter, each seen once, as compute-optimal runs have."""
    steps = [*range(0, 19_001, 500)]
    losses = [2.9 + 7.9 * (1 + step / 60) ** -0.6 for step in steps]
    tokens = [131_072 * step for step in steps]
    curves = Curves(eval_steps=steps, train_losses=losses, val_losses=losses, eval_tokens=tokens)
    curves.speeds = [1e5] * len(steps)
    facts = dataclasses.replace(
        of("model-small-0")[1],
        total_steps=19_000,
        steps_per_epoch=19_000,
        parameters=124_000_000,
        train_tokens=tokens[-1],
    )
    assert "model-small" not in kinds(curves, facts)
    # nor one of many passes that still gains: it lacks time
    again = dataclasses.replace(facts, train_tokens=tokens[-1] // 8, parameters=4_000_000)
    assert measure(curves, again).passes == 8 and "model-small" not in kinds(curves, again)


def test_repetition_is_the_share_of_a_text_that_goes_round_in_a_loop():
    assert repetition("") == repetition("a") == 0
    assert repetition("the quick brown fox jumps over a lazy dog") == 0
    assert repetition("ab" * 50) == pytest.approx(98 / 100)
    assert repetition("x" * 30) == pytest.approx(29 / 30)
    start = "It was a bright cold day in April, and "
    looped = start + "the sea " * 20
    assert repetition(looped) == pytest.approx(
        (len(looped) - len(start) - 8) / len(looped), abs=0.02
    )


def test_a_healthy_run_gets_notes_at_most_and_numbers_that_are_not_known_alarm_nobody():
    curves, facts = of("healthy-2")
    assert {f.severity for f in diagnose(curves, facts)} <= {NOTE}
    blind = dataclasses.replace(
        curves,
        grad_norms=[math.nan] * len(curves.losses),
        speeds=[math.nan] * len(curves.speeds),
        bytes_a_token=math.nan,
    )
    facts = dataclasses.replace(facts, repeated=None, leaked=None, samples=())
    assert {f.severity for f in diagnose(blind, facts)} <= {NOTE}
