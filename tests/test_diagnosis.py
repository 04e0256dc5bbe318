"""The diagnosis: right on runs with a known fault, silent on healthy ones, in both languages."""

import dataclasses
import functools
import json
import math
import re
import time

import numpy as np
import pytest

from benchmarks.diagnosis import HISTORIES, count_right, labelled_runs, read_history
from insight.curves import Curves
from insight.diagnosis import NOTE, Facts, Finding, diagnose, repetition
from insight.verdict import change_lines
from planning.plan import resolve_settings
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


def test_every_change_is_a_line_of_the_settings_file_that_the_program_accepts():
    seen = set()
    for facts, finding in all_findings():
        names = {"params": {}, "sampling": {}, "above": {}}
        for name, value in finding.changes.items():
            if name.isupper():
                names["above"][name] = value
            elif name in ("temperature", "repetition_penalty"):
                names["sampling"][name] = value
            else:
                names["params"][name] = value
        seen |= finding.changes.keys()
        settings = {"CUSTOM_MODE": True, "TOKENIZER": "char", "custom_params": names["params"]}
        settings |= {"sampling_params": names["sampling"]} | names["above"]
        resolve_settings(settings, "config_run.py")
        lines = change_lines(finding.changes, facts.mode)
        assert len(lines) == len(finding.changes)
        assert "CUSTOM_MODE = True" in change_lines({"max_steps": 5}, "quick")
    assert {"max_steps", "learning_rate", "batch_size", "DATA", "model_overrides"} <= seen


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
