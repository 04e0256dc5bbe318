"""Records of runs, for tests of what goes on and with which decisions."""

import dataclasses
import json

from engine.settings import from_json
from model import GPTConfig
from planning.decisions import KeptPrecision, RunRecord, decide_recipe
from planning.plan import RunPlan, resolve_settings
from planning.recipe import MachineFacts
from text.facts import measure_text

MACHINE = MachineFacts("cpu", 1e11, 1e-5, 1e-9, 8_000_000_000)
TEXT_FACTS = measure_text([("The ferry crosses the river at dawn. " * 40, True)], 0.9)


def plan_in_minutes(**given) -> RunPlan:
    """A plan with the recipe of its MINUTES, for a short text on a usual machine."""
    plan = resolve_settings({"MINUTES": 1.0} | given, "config_run.py")
    return decide_recipe(plan, TEXT_FACTS, lambda: MACHINE, None)


def record_of(plan: RunPlan, **changes) -> RunRecord:
    """What settings.json has of a run of three epochs, a step each, as JSON gives it back."""
    record = RunRecord(
        run_id="0123456789abcdef",
        started="2026-01-02 03:04:05",
        changes=[],
        mode=plan.mode,
        settings=dataclasses.asdict(plan.run),
        asked=plan.asked(),
        model_name=plan.model_name,
        model=GPTConfig(**plan.model, vocab_size=10),
        training=plan.training,
        choice=plan.choice,
        start=plan.start,
        sampling=plan.sampling,
        device="cpu",
        ranks=1,
        parallel="none",
        precision=KeptPrecision("fp32", "as set"),
        threads=1,
        micro_batch=1,
        attention="fused",
        compiled=False,
        why_compiled="as set",
        tokenizer="char-0",
        stood_in=False,
        steps_per_epoch=1,
        total_steps=3,
        origins=plan.origins,
        adapted=[],
        torch="2.13.0",
    )
    record = dataclasses.replace(record, **changes)
    return from_json(RunRecord, json.loads(json.dumps(record.to_json())), "settings.json")
