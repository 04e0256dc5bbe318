"""How settings become a plan: names, spellings, types, ranges, precedence; config.json as well."""

import ast
import dataclasses
import functools
import json
import math
import random
import runpy
import string
import types
import typing

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import SettingsError
from engine.settings import (
    ALIASES,
    ELSEWHERE,
    MODEL_SETTINGS,
    names_on_resume,
    read_json_object,
    shown,
)
from generation import SamplingConfig
from model import GPTConfig
from planning.decisions import differences
from planning.plan import MODELS_FILE, RunSettings, resolve_settings
from tests.conftest import REPOSITORY
from tests.records import record_of
from tests.test_architecture import sources
from training_utils import CustomTrainingConfig, TrainingConfig

# a right value of each setting that is not the default
TRAINING_EXAMPLES = {
    "num_epochs": 5,
    "max_steps": 7,
    "time_budget_minutes": 2.5,
    "batch_size": 2,
    "gradient_accumulation_steps": 4,
    "optimizer": "muon",
    "learning_rate": 0.002,
    "schedule": "wsd",
    "warmup_steps": 3,
    "weight_decay": 0.2,
    "max_grad_norm": 0.5,
    "max_length": 32,
    "stride": 16,
    "sampling": "random",
    "train_ratio": 0.8,
    "eval_freq": 11,
    "eval_iter": 4,
    "patience": 3,
    "save_every": 6,
    "save_minutes": 0.5,
    "keep_checkpoints": 3,
    "start_context": ["Once", "春江"],
    "num_workers": 1,
    "activation_checkpointing": True,
}
MODEL_EXAMPLES = {
    "emb_dim": 32,
    "n_heads": 8,
    "n_layers": 3,
    "ff_dim": 100,
    "drop_rate": 0.2,
    "attention_drop_rate": 0.1,
    "qkv_bias": True,
    "activation": "relu",
    "positions": "sinusoidal",
    "tie_embeddings": True,
    "architecture": "llama",
    "n_kv_heads": 2,
    "qk_norm": True,
    "rope_theta": 500_000.0,
    "zero_init": True,
}
# what a field of the model may stand beside only
BESIDE = {name: {"architecture": "llama"} for name in ("n_kv_heads", "qk_norm", "rope_theta")}
EXAMPLES = TRAINING_EXAMPLES | MODEL_EXAMPLES
# what a class needs beside the field that is looked at
COMPLETED_BY = {
    TrainingConfig: {},
    RunSettings: {},
    SamplingConfig: {},
    GPTConfig: {
        "vocab_size": 10,
        "context_length": 8,
        "emb_dim": 64,
        "n_heads": 4,
        "n_layers": 1,
    },
}
MODEL_ENTRY = {"context_length": 16, "emb_dim": 64, "n_heads": 4, "n_layers": 1}


def plan_of(**given):
    return resolve_settings(given, "config_run.py")


def custom_plan(**custom_params):
    return plan_of(CUSTOM_MODE=True, custom_params=custom_params)


def build(cls, **values):
    return cls(**COMPLETED_BY[cls] | values)


def problems_in(call, *args, **kwargs) -> list[str]:
    """The lines of the one SettingsError that a call raises, without the header."""
    with pytest.raises(SettingsError) as caught:
        call(*args, **kwargs)
    header, *problems = str(caught.value).split("\n")
    counted = "1 problem " if len(problems) == 1 else f"{len(problems)} problems "
    assert header.startswith(counted)
    return [problem.strip() for problem in problems]


def base_and_optional(hint) -> tuple[type, bool]:
    """(int, True) for int | None, (int, False) for int; the first of several types."""
    if isinstance(hint, types.UnionType):
        base, *_ = typing.get_args(hint)
        return base, type(None) in typing.get_args(hint)
    return hint, False


def all_fields():
    return [(cls, field) for cls in COMPLETED_BY for field in typing.get_type_hints(cls).items()]


# ------------------------------------------------------------------------------------ names


def test_the_examples_of_these_tests_cover_every_setting():
    fields = {f.name for f in dataclasses.fields(TrainingConfig)}
    assert set(TRAINING_EXAMPLES) == fields - {"model_overrides"}
    assert set(MODEL_EXAMPLES) == set(MODEL_SETTINGS)


def test_the_model_settings_are_the_fields_of_gptconfig_that_a_user_may_set():
    fields = {f.name for f in dataclasses.fields(GPTConfig)}
    assert set(MODEL_SETTINGS) == fields - {"vocab_size", "context_length"}
    assert len(set(MODEL_SETTINGS)) == len(MODEL_SETTINGS)


def misspellings(name: str) -> list[str]:
    """The name with one letter replaced, at each place in turn."""
    letters = random.Random(name)
    found = []
    for i, old in enumerate(name):
        new = letters.choice([c for c in string.ascii_lowercase if c != old.lower()])
        found.append(name[:i] + (new.upper() if old.isupper() else new) + name[i + 1 :])
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_unknown_setting_is_refused_with_the_nearest_name(name):
    for misspelt in misspellings(name):
        [problem] = problems_in(custom_plan, **{misspelt: EXAMPLES[name]})
        assert problem == f'custom_params["{misspelt}"] is unknown; did you mean "{name}"?'


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(RunSettings)])
def test_unknown_name_in_config_run_is_refused_with_the_nearest_name(name):
    for misspelt in misspellings(name):
        [problem] = problems_in(plan_of, **{misspelt: 1})
        assert problem == f'{misspelt} is unknown; did you mean "{name}"?'


def test_misspelt_alias_is_answered_with_this_projects_name():
    [problem] = problems_in(custom_plan, n_embdd=32)
    assert problem.endswith('did you mean "emb_dim"?')


def test_setting_like_no_other_is_refused_with_the_list_of_all():
    [problem] = problems_in(custom_plan, zzzzzz=1)
    assert all(name in problem for name in EXAMPLES)


@pytest.mark.parametrize(
    "given", [{"sampling_params": {"lr": 1e-3}}, {"epochs": 3}], ids=["sampling", "top level"]
)
def test_a_suggested_name_is_one_that_its_place_knows(given):
    [problem] = problems_in(plan_of, **given)
    assert "did you mean" not in problem
    assert "known are: " in problem


def test_name_with_a_line_break_still_takes_one_line():
    assert len(problems_in(plan_of, **{"a\nb": 1}, custom_params={"c\nd": 1})) == 2


def test_key_that_is_no_text_is_refused():
    [problem] = problems_in(plan_of, custom_params={5: 1})
    assert "5" in problem and "unknown" in problem


@pytest.mark.parametrize("alias", ALIASES)
def test_other_systems_spelling_is_accepted_with_a_notice(alias):
    name = ALIASES[alias]
    plan = custom_plan(**{alias: EXAMPLES[name]})
    section = plan.model if name in MODEL_EXAMPLES else plan.training.to_dict()
    assert section[name] == EXAMPLES[name]
    assert plan.notices == [f'custom_params["{alias}"] is read as {name}']


@pytest.mark.parametrize("alias", [a for a in ALIASES if ALIASES[a] in MODEL_SETTINGS])
def test_other_systems_spelling_of_a_model_field_is_accepted_in_model_overrides(alias):
    name = ALIASES[alias]
    plan = custom_plan(model_overrides={alias: EXAMPLES[name]})
    assert plan.model[name] == EXAMPLES[name]
    [notice] = plan.notices
    assert notice == f'custom_params["model_overrides"]["{alias}"] is read as {name}'


@pytest.mark.parametrize("name", MODEL_SETTINGS)
def test_model_field_counts_the_same_at_top_level_and_in_model_overrides(name):
    value = MODEL_EXAMPLES[name]
    given = BESIDE.get(name, {}) | {name: value}
    on_top, below = custom_plan(**given), custom_plan(model_overrides=given)
    assert (on_top.training, on_top.model) == (below.training, below.model)
    assert on_top.model[name] == value
    assert on_top.notices == []


@pytest.mark.parametrize(
    ("name", "pointer"),
    [
        ("use_amp", "PRECISION"),
        ("resume_from", "RESUME"),
        ("auto_resume", 'RESUME = "auto"'),
        ("checkpoint_every", '"save_every"'),
        ("save_on_interrupt", "always on"),
        ("train_file", "DATA"),
        ("test_file", '"val"'),
        ("tokenizer_path", "TOKENIZER"),
        ("model_save_dir", "OUTPUT_DIR"),
        ("vocab_size", "the tokenizer"),
    ],
)
def test_setting_that_lives_elsewhere_is_refused_with_a_pointer(name, pointer):
    for custom_params in ({name: 1}, {"model_overrides": {name: 1}}):
        [problem] = problems_in(custom_plan, **custom_params)
        assert f'"{name}"] is not set here' in problem
        assert pointer in problem


def test_every_name_that_lives_elsewhere_has_its_pointer_tested():
    [mark] = test_setting_that_lives_elsewhere_is_refused_with_a_pointer.pytestmark
    assert {name for name, _ in mark.args[1]} == set(ELSEWHERE)


@pytest.mark.parametrize(
    ("custom_params", "labels"),
    [
        ({"lr": 1e-3, "learning_rate": 2e-3}, ['["lr"] = 0.001', '["learning_rate"] = 0.002']),
        ({"n_embd": 32, "d_model": 64}, ['["n_embd"] = 32', '["d_model"] = 64']),
        (
            {"n_layers": 2, "model_overrides": {"n_layer": 3}},
            ['custom_params["n_layers"] = 2', '["model_overrides"]["n_layer"] = 3'],
        ),
        ({"num_epochs": 1, "epochs": True}, ['["num_epochs"] = 1', '["epochs"] = True']),
    ],
)
def test_two_spellings_with_different_values_are_an_error_that_names_both(custom_params, labels):
    problems = problems_in(custom_plan, **custom_params)
    assert all(label in problems[0] for label in labels)


@pytest.mark.parametrize(
    "custom_params",
    [
        {"lr": 1e-3, "learning_rate": 1e-3},
        {"dropout": 0, "drop_rate": 0.0},
        {"n_layers": 2, "model_overrides": {"n_layer": 2}},
    ],
)
def test_two_spellings_with_equal_values_are_accepted(custom_params):
    custom_plan(**custom_params)


# ---------------------------------------------------------------------------- types, ranges

WRONG_TYPES = {
    int: ["8", 8.5, True, [8], {}, 8j],
    float: ["0.5", True, [0.5], {}, 1j],
    bool: [1, 0, "True", 1.0, []],
    str: [8, True, ["cpu"], {}, b"cpu"],
    dict: ["{}", 1, True, [("a", 1)]],
    list: ["wandb", 1, True, {}, ("wandb",)],
}


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        pytest.param(cls, name, value, id=f"{cls.__name__}.{name}={value!r}")
        for cls, (name, hint) in all_fields()
        for base, optional in [base_and_optional(hint)]
        for value in WRONG_TYPES[typing.get_origin(base) or base] + ([] if optional else [None])
        if not (name == "DATA" and isinstance(value, dict | list))  # which it may be
        and not (name == "start_context" and isinstance(value, list))  # so may this
        # False is right, so the type is
        and not (name in ("RESUME", "COMPILE") and value is True)
    ],
)
def test_wrong_type_is_refused_with_name_value_and_type(cls, name, value):
    [problem] = problems_in(build, cls, **{name: value})
    assert problem.startswith(f"{name} is {value!r} ({type(value).__name__}); it must be ")


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls, (name, hint) in all_fields() if base_and_optional(hint)[1]],
)
def test_none_is_accepted_where_a_value_is_worked_out(cls, name):
    build(cls, **{name: None})


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, n) for cls, (n, hint) in all_fields() if base_and_optional(hint)[0] in (int, float)],
)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1, pytest.param(10**400, id="10**400")]
)
def test_number_that_is_negative_or_not_finite_is_refused(cls, name, value):
    [problem] = problems_in(build, cls, **{name: value})
    assert problem.startswith(f"{name} is {shown(value)}")


@pytest.mark.parametrize(
    ("cls", "name", "wrong", "right"),
    [
        (TrainingConfig, "num_epochs", [0], [1]),
        (TrainingConfig, "max_steps", [0], [1]),
        (TrainingConfig, "time_budget_minutes", [0, 0.0, 1_000_001], [1e-9, 1_000_000]),
        (TrainingConfig, "batch_size", [0], [1]),
        (TrainingConfig, "gradient_accumulation_steps", [0, 1_000_001], [1, 1_000_000]),
        (TrainingConfig, "optimizer", ["sgd", "AdamW", ""], ["adamw", "muon"]),
        (TrainingConfig, "learning_rate", [0, 0.0, 10.1, 1e308], [1e-12, 1, 10]),
        (TrainingConfig, "schedule", ["linear", "Cosine", ""], ["cosine", "wsd", "constant"]),
        (TrainingConfig, "warmup_steps", [], [0, 1]),
        (TrainingConfig, "weight_decay", [-1e-9, 1, 1.0], [0, 0.999]),
        (TrainingConfig, "max_grad_norm", [-1e-9], [0, 1e308]),
        (TrainingConfig, "max_length", [0, 1_000_001], [1, 1_000_000]),
        (TrainingConfig, "stride", [0], [1]),
        (TrainingConfig, "train_ratio", [0, 0.0, 1, 1.0], [0.001, 0.999]),
        (TrainingConfig, "eval_freq", [0], [1]),
        (TrainingConfig, "eval_iter", [0], [1]),
        (TrainingConfig, "patience", [0], [1]),
        (TrainingConfig, "save_every", [0], [1]),
        (TrainingConfig, "save_minutes", [0, 0.0], [1e-9, 600]),
        (TrainingConfig, "keep_checkpoints", [0, 1, 1001], [2, 1000]),
        (
            TrainingConfig,
            "start_context",
            ["", " \n", [], ["a"] * 17],
            ["春", ["春"], ["a b", "a b"], ["a"] * 16],
        ),
        (TrainingConfig, "num_workers", [], [0]),
        (RunSettings, "DATA", ["", " "], ["no-such-file.txt"]),
        (RunSettings, "TOKENIZER", ["gpt3", "GPT2", ""], ["gpt2"]),
        (RunSettings, "DEVICE", ["gpu", "CPU", "cuda:", "cuda:x", ""], ["cpu", "mps", "cuda:1"]),
        (RunSettings, "PRECISION", ["fp8", "BF16", ""], ["auto", "bf16", "fp32", "fp16"]),
        (RunSettings, "COMPILE", ["on", "Auto", "True", ""], ["auto", True, False]),
        (RunSettings, "RESUME", [True, "", " "], ["auto", False, "runs/no such run yet"]),
        (RunSettings, "TRACKING", [], [[], ["wandb"], ["tensorboard", "wandb"]]),
        (RunSettings, "NIGHT_MODE", [], [True, False]),
        (RunSettings, "SEED", [2**32], [0, 2**32 - 1]),
        (RunSettings, "LOG_EVERY", [], [0, 1]),
        (SamplingConfig, "max_new_tokens", [0, 100_001], [1, 100_000]),
        (SamplingConfig, "temperature", [-1e-9], [0, 2.5]),
        (SamplingConfig, "top_k", [0], [1]),
        (SamplingConfig, "top_p", [-1e-9, 1.1], [0, 1]),
        (SamplingConfig, "min_p", [-1e-9, 1.1], [0, 1]),
        (SamplingConfig, "repetition_penalty", [0, 0.009, 100.1], [0.01, 0.9, 1, 100]),
        (SamplingConfig, "repetition_window", [0, 100_001], [1, 100_000]),
        (GPTConfig, "vocab_size", [0], [1]),
        (GPTConfig, "context_length", [0, 1_000_001], [1]),
        (GPTConfig, "emb_dim", [0, 65_540], [4, 65_536]),
        (GPTConfig, "n_heads", [0, 1025], [1]),
        (GPTConfig, "n_layers", [0, 1025], [1]),
        (GPTConfig, "ff_dim", [0, 1_000_001], [1]),
        (GPTConfig, "drop_rate", [1, 1.0], [0, 0.999]),
        (GPTConfig, "attention_drop_rate", [1, 1.0], [0, 0.999]),
        (GPTConfig, "activation", ["swish", ""], ["gelu", "relu"]),
        (GPTConfig, "positions", ["rotary"], ["learned", "sinusoidal"]),
        (GPTConfig, "architecture", ["llama3", "GPT2", ""], ["gpt2", "llama"]),
        (GPTConfig, "n_kv_heads", [0, 1025], [4]),
        (GPTConfig, "rope_theta", [0, 1, 1.0], [10_000]),
        (GPTConfig, "zero_init", [], [True, False]),
    ],
)
def test_limits_are_where_they_are_said_to_be(cls, name, wrong, right):
    for value in wrong:
        [problem] = problems_in(build, cls, **{name: value})
        assert problem.startswith(f"{name} is ")
    for value in right:
        assert getattr(build(cls, **{name: value}), name) == value


ONE_OR_SEVERAL = "text in quotes or a list of texts [...], 1 to 16 of them"


@pytest.mark.parametrize(
    ("start_context", "problem"),
    [
        ([], f"is empty; it must be {ONE_OR_SEVERAL}"),
        (["a"] * 17, f"is a list of 17; it must be {ONE_OR_SEVERAL}"),
        (("a", "b"), f"is ('a', 'b') (tuple); it must be {ONE_OR_SEVERAL}"),
        (["a", ""], "has an empty text in place 2; each must be some text"),
        (["\t", "a"], "has an empty text in place 1; each must be some text"),
        (["a", "b", 5], "has 5 (int) in place 3; each must be text in quotes"),
        (["a", None], "has None (NoneType) in place 2; each must be text in quotes"),
        ([["a"]], "has ['a'] (list) in place 1; each must be text in quotes"),
    ],
    ids=ascii,
)
def test_list_of_prompts_is_refused_with_what_is_wrong_in_it(start_context, problem):
    assert problems_in(TrainingConfig, start_context=start_context) == [f"start_context {problem}"]
    found = problems_in(custom_plan, start_context=start_context)
    assert found == [f'custom_params["start_context"] {problem}']


def test_prompts_are_the_start_context_as_a_list():
    assert TrainingConfig(start_context="春江").prompts == ["春江"]
    assert TrainingConfig(start_context=["春江", "往事"]).prompts == ["春江", "往事"]


def test_whole_number_is_accepted_where_a_fraction_may_stand():
    assert TrainingConfig(max_grad_norm=2, learning_rate=1).max_grad_norm == 2


def test_mistyped_choice_is_refused_with_the_nearest():
    [problem] = problems_in(TrainingConfig, schedule="cosin")
    assert problem.endswith('it must be "cosine", "wsd" or "constant"; did you mean "cosine"?')


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b", "a\\b", "..", ".", "/etc", "C:x", ".hidden", "a\0b", "a\nb", "x" * 81, "", " "],
)
def test_run_name_that_is_no_plain_folder_name_is_refused(name):
    [problem] = problems_in(RunSettings, RUN_NAME=name)
    assert problem.startswith("RUN_NAME is ")


@pytest.mark.parametrize("name", ["con", "Nul.1", "run.", "run "])
def test_run_name_that_windows_cannot_have_is_refused_everywhere(name):
    [problem] = problems_in(RunSettings, RUN_NAME=name)
    assert problem.startswith(f"RUN_NAME is {shown(name)}; Windows can't have such a folder: ")


@pytest.mark.parametrize("name", ["run 1", "春天", "v1.2", "a..b", "x" * 80])
def test_plain_run_name_is_accepted(name):
    plan_of(RUN_NAME=name)


@pytest.mark.parametrize("name", ["OUTPUT_DIR", "RUN_NAME", "RESUME"])
@pytest.mark.parametrize("path", ["\U0001f600" * 80, "x\udc00"], ids=ascii)
def test_path_that_the_system_refuses_is_refused_with_its_name(name, path):
    [problem] = problems_in(RunSettings, **{name: path})
    assert problem.startswith(f"{name} ({shown(path)}) can't be a folder's ")


@pytest.mark.parametrize("name", ["OUTPUT_DIR", "RESUME"])
def test_home_of_nobody_is_no_place_for_a_run(name):
    [problem] = problems_in(RunSettings, **{name: "~no-such-user/runs"})
    assert problem == f"{name} ('~no-such-user/runs') can't be a folder's path on this machine"
    plan_of(**{name: "~/runs"})
    plan_of(RUN_NAME="~no-such-user")  # a name is no path


@pytest.mark.parametrize(
    ("trackers", "problem"),
    [
        (["tensorbord"], "TRACKING names 'tensorbord'; it may name: tensorboard, wandb"),
        (["wandb", ""], "TRACKING names ''; it may name: tensorboard, wandb"),
        ([["wandb"]], "TRACKING names ['wandb']; it may name: tensorboard, wandb"),
        ([None], "TRACKING names None; it may name: tensorboard, wandb"),
        (["wandb", "tensorboard", "wandb"], "TRACKING names 'wandb' twice"),
    ],
    ids=str,
)
def test_tracker_that_is_unknown_or_named_twice_is_refused(trackers, problem):
    assert problems_in(RunSettings, TRACKING=trackers) == [problem]


# --------------------------------------------------------------------- settings that conflict


def test_resume_true_is_refused_with_what_it_may_be():
    expected = 'RESUME is True; it must be "auto", False or the folder of a run'
    assert problems_in(RunSettings, RESUME=True) == [expected]


def test_two_settings_that_each_name_a_run_are_refused():
    for resume in ("auto", False):  # which name none
        plan_of(RESUME=resume, RUN_NAME="b")
    [problem] = problems_in(plan_of, RESUME="runs/a", RUN_NAME="b")
    assert problem == "RESUME ('runs/a') and RUN_NAME ('b') both name a run; set one of them"


def test_width_that_heads_do_not_divide_is_refused_with_both_numbers():
    expected = "emb_dim (100) must be a multiple of n_heads (3)"
    assert problems_in(build, GPTConfig, emb_dim=100, n_heads=3) == [expected]
    assert problems_in(custom_plan, emb_dim=100, n_heads=3) == [expected]


def test_override_that_does_not_suit_the_named_model_is_refused():
    assert problems_in(custom_plan, n_heads=5) == ["emb_dim (64) must be a multiple of n_heads (5)"]


def test_odd_width_with_sinusoidal_positions_is_refused():
    [problem] = problems_in(custom_plan, emb_dim=65, n_heads=5, positions="sinusoidal")
    assert "emb_dim (65) must be even" in problem


@pytest.mark.parametrize("warmup", [10, 11])
def test_warmup_as_long_as_the_run_is_refused_with_both_numbers(warmup):
    [problem] = problems_in(custom_plan, warmup_steps=warmup, max_steps=10)
    assert f"warmup_steps ({warmup}) must be below max_steps (10)" in problem
    custom_plan(warmup_steps=9, max_steps=10)


# ------------------------------------------------------------------- all problems, in one error


def test_all_problems_of_all_places_are_one_error(tmp_path):
    models = tmp_path / "config.json"
    models.write_text(json.dumps({"small": MODEL_ENTRY | {"n_heads": 0}}))
    given = {
        "DTAA": "x",
        "SEED": -1,
        "MODEL": 5,
        "custom_params": {"batch_size": "8", "learning_rat": 1, "emb_dim": 0, "use_amp": True},
        "sampling_params": {"top_p": 2, "topk": 1},
    }
    problems = problems_in(resolve_settings, given, "config_run.py", models)
    starts = [
        "DTAA is unknown",
        "SEED is -1",
        "MODEL is 5",
        'custom_params["batch_size"]',
        'custom_params["learning_rat"]',
        'model_overrides["emb_dim"]',
        'custom_params["use_amp"]',
        'sampling_params["top_p"]',
        'sampling_params["topk"]',
        'config.json["small"]["n_heads"]',
    ]
    for start in starts:
        assert sum(problem.startswith(start) for problem in problems) == 1, start
    assert len(problems) == len(starts)


def test_unknown_model_is_reported_beside_other_problems():
    problems = problems_in(plan_of, MODEL="smal", custom_params={"batch_size": 0})
    assert [problem.split()[0] for problem in problems] == ['custom_params["batch_size"]', "there"]


@pytest.mark.parametrize("mode", [{"QUICK_MODE": True}, {"QUICK_MODE": False}])
def test_custom_params_are_checked_in_modes_that_do_not_read_them(mode):
    custom_params = {"batch_size": 0, "model_overrides": {"n_layers": "2"}}
    assert len(problems_in(plan_of, **mode, custom_params=custom_params)) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"DATA": 5},
        {"DTA": "x"},
        {"RUN_NAME": "../../etc"},
        {"DEVICE": "gpu"},
        {"COMPILE": "on"},
        {"RESUME": True},
        {"RESUME": "runs/a", "RUN_NAME": "b"},
        {"TRACKING": ["mlflow"]},
        {"MODEL": "gpt5"},
        {"CUSTOM_MODE": True, "USE_SMALL": False},
        {"custom_params": []},
        {"custom_params": {"zzzzzz": 1}},
        {"custom_params": {"lr": 1, "learning_rate": 2}},
        {"custom_params": {"vocab_size": 100}},
        {"custom_params": {"model_overrides": 7}},
        {"custom_params": {"warmup_steps": 5, "max_steps": 5}},
        {"sampling_params": {"top_p": "0.9"}},
        {"CUSTOM_MODE": True, "custom_params": {"n_heads": 7}},
    ],
    ids=str,
)
def test_one_mistake_is_one_error_of_at_most_four_lines(given):
    with pytest.raises(SettingsError) as caught:
        plan_of(**given)
    assert caught.value.exit_code == 2
    lines = str(caught.value).split("\n")
    assert lines[0] == "1 problem in config_run.py:"
    assert 2 <= len(lines) <= 4


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "cpu", "small", 10**400]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
ANY_SECTION = st.dictionaries(
    st.sampled_from([*EXAMPLES, *ALIASES, *ELSEWHERE, "top_k", "model_overrides"])
    | st.text(max_size=5),
    ANYTHING | st.dictionaries(st.sampled_from([*MODEL_SETTINGS, *ALIASES]), ANYTHING, max_size=3),
    max_size=3,
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(RunSettings)]) | st.text(max_size=5),
        ANYTHING | ANY_SECTION,
        max_size=4,
    )
)
@example({})
def test_whatever_is_set_gives_a_plan_or_a_settings_error(given):
    before = repr(given)
    try:
        plan = resolve_settings(given, "config_run.py")
    except SettingsError as error:
        assert str(error).startswith(("1 problem", f"{str(error).count(chr(10))} problems"))
    else:
        GPTConfig(vocab_size=10, **plan.model)
    assert repr(given) == before


# ------------------------------------------------------------------------------- precedence

SMALL, LARGE = "small", "gpt2-124m"


@pytest.mark.parametrize(
    ("custom", "quick", "use_small", "use_default", "mode", "model"),
    [
        (False, False, False, False, "full", LARGE),
        (False, False, False, True, "full", LARGE),
        (False, False, True, False, "full", LARGE),
        (False, False, True, True, "full", LARGE),
        (False, True, False, False, "quick", SMALL),
        (False, True, False, True, "quick", SMALL),
        (False, True, True, False, "quick", SMALL),
        (False, True, True, True, "quick", SMALL),
        (True, False, False, False, "custom", None),
        (True, False, False, True, "custom", LARGE),
        (True, False, True, False, "custom", SMALL),
        (True, False, True, True, "custom", SMALL),
        (True, True, False, False, "custom", None),
        (True, True, False, True, "custom", LARGE),
        (True, True, True, False, "custom", SMALL),
        (True, True, True, True, "custom", SMALL),
    ],
)
def test_precedence_of_modes_and_models(custom, quick, use_small, use_default, mode, model):
    switches = {
        "CUSTOM_MODE": custom,
        "QUICK_MODE": quick,
        "USE_SMALL": use_small,
        "USE_DEFAULT": use_default,
    }
    if model is None:
        [problem] = problems_in(plan_of, **switches)
        assert "USE_SMALL and USE_DEFAULT are False" in problem and "MODEL" in problem
    else:
        plan = plan_of(**switches)
        assert (plan.mode, plan.model_name) == (mode, model)
        assert all(plan.origins.values())
    named = plan_of(**switches, MODEL="mini")  # a name wins over every switch
    assert (named.mode, named.model_name, named.model["emb_dim"]) == (mode, "mini", 384)


def test_presets_are_the_training_of_quick_and_full_mode():
    quick, full = plan_of(QUICK_MODE=True), plan_of(QUICK_MODE=False)
    assert quick.training == TrainingConfig.get_quick_test_config()
    assert (quick.training.num_epochs, quick.training.batch_size) == (1, 4)
    assert (quick.training.stride, quick.model["context_length"]) == (128, 128)
    assert full.training == TrainingConfig.get_full_training_config()
    assert (full.training.num_epochs, full.model["context_length"]) == (10, 256)


def test_override_wins_over_the_named_model_and_max_length_over_its_context():
    plan = plan_of(CUSTOM_MODE=True, MODEL="mini", custom_params={"n_layers": 1, "max_length": 40})
    mini = json.loads(MODELS_FILE.read_text(encoding="utf-8"))["mini"]
    assert plan.model == mini | {"n_layers": 1, "context_length": 40}
    assert plan.origins["max_length"] == "custom_params"


def test_context_of_the_named_model_serves_where_max_length_is_not_set():
    plan = plan_of(CUSTOM_MODE=True, MODEL="mini")
    assert plan.model["context_length"] == 256
    assert "config.json" in plan.origins["max_length"]


def test_custom_params_that_the_mode_does_not_read_are_noticed():
    [notice] = plan_of(QUICK_MODE=True, custom_params={"batch_size": 3}).notices
    assert "custom_params is not read in quick mode" in notice
    assert plan_of(QUICK_MODE=True, custom_params=TrainingConfig().to_dict()).notices == []


@pytest.mark.parametrize(("rate", "noticed"), [(0.5, False), (0.51, True)])
def test_dropout_above_a_half_is_noticed(rate, noticed):
    notices = custom_plan(drop_rate=rate).notices
    assert any("drop_rate" in notice for notice in notices) == noticed


# ------------------------------------------------------------------------------ config_run.py


def test_config_run_ships_every_setting_with_its_default():
    shipped = {
        name: value
        for name, value in runpy.run_path(str(REPOSITORY / "config_run.py")).items()
        if not name.startswith("__")
    }
    assert shipped.pop("custom_params") == TrainingConfig().to_dict()
    assert shipped.pop("sampling_params") == dataclasses.asdict(SamplingConfig())
    defaults = dataclasses.asdict(RunSettings())
    assert (defaults.pop("custom_params"), defaults.pop("sampling_params")) == ({}, {})
    assert shipped == defaults


def test_settings_file_of_an_earlier_version_means_what_it_meant():
    earlier = {"max_new_tokens": 50, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
    assert plan_of(sampling_params=earlier).sampling == SamplingConfig()


def test_sampling_params_reach_the_plan_and_what_is_left_out_has_its_default():
    plan = plan_of(sampling_params={"top_k": 7})
    assert plan.sampling == SamplingConfig(top_k=7)


# -------------------------------------------------------------------------------- config.json


@pytest.fixture
def plan_with_models(tmp_path):
    """Resolve with a config.json of the given content."""

    def resolve(content, **given):
        path = tmp_path / "config.json"
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return resolve_settings(given, "config_run.py", path)

    return resolve


def test_missing_config_json_is_refused(tmp_path):
    [problem] = problems_in(resolve_settings, {}, "config_run.py", tmp_path / "config.json")
    assert f"{tmp_path / 'config.json'} is missing" in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 column 1"),
        ('{\n  "small": {,}\n}', "line 2 column 13"),
        ('{"small": {}} x', "line 1 column 15"),
        ('{"a": {}, "a": {}}', 'names "a" twice'),
        ('{"a": {"n_heads": 1, "n_heads": 2}}', 'names "n_heads" twice'),
        ("[]", "must hold an object ({...}), not list"),
        ('"small"', "must hold an object ({...}), not str"),
        pytest.param("[" * 100_000, "nested too deeply", id="deep"),
        pytest.param(f'{{"a": {"1" * 5000}}}', "a number is too long", id="long number"),
        ("{}".encode("utf-16"), "not UTF-8 (byte 0)"),
        (b'{"a\xff', "not UTF-8 (byte 3)"),
        (b'\xef\xbb\xbf{"a\xff', "not UTF-8 (byte 6)"),
    ],
)
def test_config_json_that_is_no_json_object_is_refused_with_its_place(
    plan_with_models, content, message
):
    [problem] = problems_in(plan_with_models, content)
    assert "config.json" in problem
    assert message in problem


def test_folder_in_place_of_config_json_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="can't read"):
        read_json_object(tmp_path)


def test_config_json_with_a_byte_order_mark_is_read(plan_with_models):
    content = b"\xef\xbb\xbf" + json.dumps({"small": MODEL_ENTRY}).encode("utf-8")
    assert plan_with_models(content).model_name == "small"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (MODEL_ENTRY | {"n_hedas": 4}, 'config.json["small"]["n_hedas"] is unknown'),
        (MODEL_ENTRY | {"n_hedas": 4}, 'did you mean "n_heads"?'),
        (MODEL_ENTRY | {"vocab_size": 100}, 'config.json["small"]["vocab_size"] is not set here'),
        (MODEL_ENTRY | {"n_layers": 2.0}, 'config.json["small"]["n_layers"] is 2.0 (float)'),
        (MODEL_ENTRY | {"qkv_bias": 1}, 'config.json["small"]["qkv_bias"] is 1 (int)'),
        (MODEL_ENTRY | {"drop_rate": math.nan}, 'config.json["small"]["drop_rate"] is nan'),
        (MODEL_ENTRY | {"drop_rate": None}, 'config.json["small"]["drop_rate"] is None'),
        (MODEL_ENTRY | {"context_length": 0}, 'config.json["small"]["context_length"] is 0'),
        (MODEL_ENTRY | {"block_size": 8}, '["block_size"] = 8 set the same thing'),
        (MODEL_ENTRY | {"n_heads": 5}, 'config.json["small"]: emb_dim (64) must be a multiple'),
        ([], 'config.json["small"] must be an object ({...}), not list'),
    ],
)
def test_wrong_model_in_config_json_is_refused_with_its_place(plan_with_models, entry, message):
    [problem] = problems_in(plan_with_models, {"small": entry})
    assert message in problem


@pytest.mark.parametrize("field", MODEL_ENTRY)
def test_model_that_lacks_a_field_is_refused(plan_with_models, field):
    entry = {name: value for name, value in MODEL_ENTRY.items() if name != field}
    [problem] = problems_in(plan_with_models, {"small": entry})
    assert problem == f'config.json["small"] lacks "{field}"'


def test_config_json_takes_other_systems_spellings(plan_with_models):
    entry = {"block_size": 16, "n_embd": 64, "n_head": 4, "n_layer": 1}
    assert plan_with_models({"small": entry}, CUSTOM_MODE=True).model == MODEL_ENTRY


@pytest.mark.parametrize(
    ("name", "meant"), [("smal", "small"), ("gpt2-124", "gpt2-124m"), ("GPT2-124M", "gpt2-124m")]
)
def test_unknown_model_is_refused_with_the_nearest_and_with_all(name, meant):
    [problem] = problems_in(plan_of, MODEL=name)
    assert f'there is no model "{name}"' in problem
    assert problem.endswith(f'did you mean "{meant}"?')
    assert all(model in problem for model in ("small", "mini", "gpt2-124m"))


def test_config_json_without_the_mode_s_own_model_is_refused(plan_with_models):
    [problem] = problems_in(plan_with_models, {"mine": MODEL_ENTRY})
    assert 'there is no model "small" (quick mode\'s own)' in problem
    assert plan_with_models({"mine": MODEL_ENTRY}, MODEL="mine").model["emb_dim"] == 64


# ----------------------------------------------------------------------- CustomTrainingConfig


def test_partial_dict_takes_defaults_for_the_rest():
    config = CustomTrainingConfig.from_dict({"batch_size": 2, "n_embd": 32})
    expected = TrainingConfig().to_dict() | {"batch_size": 2, "model_overrides": {"emb_dim": 32}}
    assert config.to_dict() == expected
    assert CustomTrainingConfig.from_dict({}).to_dict() == TrainingConfig().to_dict()


def test_dict_of_every_setting_survives_there_and_back():
    everything = TRAINING_EXAMPLES | {"model_overrides": MODEL_EXAMPLES}
    config = CustomTrainingConfig.from_dict(everything)
    assert config.to_dict() == everything
    assert CustomTrainingConfig.from_dict(config.to_dict()) == config
    assert CustomTrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert CustomTrainingConfig(**everything) == config


def test_from_dict_refuses_every_problem_at_once():
    given = {"batch_size": 0, "epoch": 3, "model_overrides": []}
    assert len(problems_in(CustomTrainingConfig.from_dict, given)) == 3


def test_update_changes_what_is_named_and_nothing_else():
    config = CustomTrainingConfig(batch_size=2, model_overrides={"n_layers": 1})
    config.update(lr=0.01, n_heads=2, model_overrides={"drop_rate": 0.1})
    changed = {
        "batch_size": 2,
        "learning_rate": 0.01,
        "model_overrides": {"n_layers": 1, "n_heads": 2, "drop_rate": 0.1},
    }
    assert config.to_dict() == TrainingConfig().to_dict() | changed


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 4, "num_epochs": 0},
        {"batch_size": 4, "learning_rat": 1},
        {"batch_size": 4, "max_steps": 3},  # below the warm-up that is there
        {"batch_size": 4, "model_overrides": {"n_layer": 2, "zzz": 1}},
        {"batch_size": 4, "start_context": ["a", ""]},
    ],
)
def test_update_with_a_problem_changes_nothing(changes):
    config = CustomTrainingConfig(warmup_steps=5, model_overrides={"n_layers": 1})
    before = config.to_dict()
    problems_in(config.update, **changes)
    assert config.to_dict() == before


def test_settings_cannot_be_assigned_to():
    for config in (CustomTrainingConfig(), TrainingConfig(), RunSettings(), SamplingConfig()):
        name = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, getattr(config, name))


def test_each_object_has_a_model_overrides_of_its_own():
    one, other = TrainingConfig(), TrainingConfig()
    one.model_overrides["n_layers"] = 1
    assert other.model_overrides == {}
    copied = one.to_dict()
    copied["model_overrides"].clear()
    assert one.model_overrides == {"n_layers": 1}


def test_what_is_done_to_a_list_or_dict_after_it_was_given_changes_no_settings():
    prompts, overrides = ["a"], {"n_layers": 1}
    config = CustomTrainingConfig(start_context=prompts, model_overrides=overrides)
    config.prompts.append("b")
    config.to_dict()["start_context"].append("b")
    prompts.append("")
    overrides["n_layers"] = 0
    assert (config.start_context, config.model_overrides) == (["a"], {"n_layers": 1})
    config.update(start_context=prompts[:1] * 2)
    assert config.start_context == ["a", "a"]
    config.update(start_context="b")
    assert config.start_context == "b"


def test_model_overrides_of_an_unknown_name_are_refused():
    [problem] = problems_in(TrainingConfig, model_overrides={"n_layer": 1})
    assert 'model_overrides["n_layer"] is unknown' in problem


# ----------------------------------------------------------------- what a run may go on with

# RunSettings that choose what is compared under another name, or say where a run is
CHOOSES_MODE_OR_MODEL = {"QUICK_MODE", "CUSTOM_MODE", "MODEL", "USE_SMALL", "USE_DEFAULT"}
COMPARED_FIELD_BY_FIELD = {"custom_params"}
COMPARED_BY_NAME = {"SEED", "PRECISION", "TOKENIZER"}
COMPARED_BY_ITS_TOKENS = {"DATA"}  # the same text may lie elsewhere
SAYS_WHERE_THE_RUN_IS = {"OUTPUT_DIR", "RUN_NAME", "RESUME"}


# those that the model is compared by
FIXED = (*names_on_resume(TrainingConfig, "fixed"), "max_length")
CHANGEABLE = names_on_resume(TrainingConfig, "free")
SETTINGS_CHANGEABLE = names_on_resume(RunSettings, "free")


def test_each_hyper_parameter_is_either_fixed_or_changeable():
    names = [*FIXED, *CHANGEABLE, "model_overrides"]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(TrainingConfig))


def test_each_run_setting_is_compared_or_changeable_or_no_part_of_a_run():
    groups = [
        CHOOSES_MODE_OR_MODEL,
        COMPARED_FIELD_BY_FIELD,
        COMPARED_BY_NAME,
        COMPARED_BY_ITS_TOKENS,
        SAYS_WHERE_THE_RUN_IS,
        SETTINGS_CHANGEABLE,
    ]
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(RunSettings))


def differing(before: dict, now: dict) -> list[str]:
    """What keeps a custom run from going on."""
    record = record_of(plan_of(CUSTOM_MODE=True, **before))
    return differences(record, plan_of(CUSTOM_MODE=True, **now).asked())


@pytest.mark.parametrize("name", [*FIXED, *MODEL_SETTINGS])
def test_run_with_another_fixed_setting_may_not_go_on(name):
    beside = BESIDE.get(name, {})
    lines = differing({"custom_params": beside}, {"custom_params": beside | {name: EXAMPLES[name]}})
    said = "context_length" if name == "max_length" else name
    assert [line.split(":")[0] for line in lines] == [said]
    assert f"{EXAMPLES[name]!r} now" in lines[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEED", 5),
        ("PRECISION", "bf16"),
        ("TOKENIZER", "char"),
    ],
)
def test_run_with_another_seed_precision_or_tokenizer_may_not_go_on(name, value):
    [line] = differing({}, {name: value})
    assert line.startswith(f"{name.lower()}: ") and line.endswith(f" then, {value!r} now")


@pytest.mark.parametrize("choice", [{"QUICK_MODE": False, "CUSTOM_MODE": False}, {"MODEL": "mini"}])
def test_run_of_another_mode_or_model_may_not_go_on(choice):
    before = record_of(plan_of(CUSTOM_MODE=True))
    assert differences(before, plan_of(**{"CUSTOM_MODE": True} | choice).asked()) != []


@pytest.mark.parametrize("name", CHANGEABLE)
def test_run_with_another_changeable_setting_may_go_on(name):
    assert differing({}, {"custom_params": {name: TRAINING_EXAMPLES[name]}}) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEVICE", "cpu"),
        ("COMPILE", True),
        ("LOG_EVERY", 3),
        ("TRACKING", ["wandb"]),
        ("NIGHT_MODE", True),
        ("sampling_params", {"top_k": 3}),
        ("OUTPUT_DIR", "elsewhere"),
    ],
)
def test_run_that_is_watched_or_kept_in_another_way_may_go_on(name, value):
    assert differing({}, {name: value}) == []


@pytest.mark.parametrize("fewer", [{"num_epochs": 2}, {"max_steps": 2}])
def test_run_may_not_go_on_for_fewer_steps(fewer):
    [line] = differing({}, {"custom_params": fewer})
    assert line == "total steps: 3 then, 2 now (more is possible, less is not)"


def test_a_value_that_was_worked_out_may_be_given_now_in_words():
    assert differing({}, {"PRECISION": "fp32"}) == []
    assert differing({"PRECISION": "fp32"}, {"PRECISION": "auto"}) != []


# ------------------------------------------------------------------------- no dead settings


@functools.cache
def attributes_read() -> frozenset[str]:
    """The attributes that the project's modules read."""
    return frozenset(
        node.attr
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    )


@pytest.mark.parametrize("cls", [TrainingConfig, RunSettings, SamplingConfig, GPTConfig])
def test_every_setting_has_a_reader(cls):
    read = attributes_read()
    # these two are read as sections, by name, before the object is made
    sections = {"custom_params", "sampling_params"}
    unread = {f.name for f in dataclasses.fields(cls)} - read - sections
    assert unread == set()
