"""How settings become a plan: names, spellings, types, ranges, precedence; config.json as well."""

import ast
import dataclasses
import itertools
import json
import math
import runpy
import types
import typing

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import SettingsError
from engine.settings import ALIASES, ELSEWHERE, names_on_resume, read_json_object, shown
from generation import SamplingConfig
from model import MODEL_SETTINGS, GPTConfig
from planning.decisions import differences
from planning.plan import MODELS_FILE, RECIPE_CHOOSES, RunSettings, resolve_settings
from planning.recipe import Fixed
from tests.conftest import REPOSITORY
from tests.hostile import project_trees
from tests.records import record_of
from training_utils import CustomTrainingConfig, TrainingConfig

# what a field of the model may stand beside only
BESIDE = {
    name: {"architecture": "llama"}
    for name in ("n_kv_heads", "qk_norm", "rope_theta", "rope_scaling")
}
MODEL_ENTRY = {"context_length": 16, "emb_dim": 64, "n_heads": 4, "n_layers": 1}
# the classes of settings, and what each needs beside the field that is looked at
COMPLETED_BY = {TrainingConfig: {}, RunSettings: {}, SamplingConfig: {}}
COMPLETED_BY[GPTConfig] = MODEL_ENTRY | {"vocab_size": 10}

FROM_ONE_ON = ("num_epochs", "max_steps", "batch_size", "stride", "eval_freq", "eval_iter")
FROM_ONE_ON += ("final_iter", "patience", "save_every")
LIMITS = {  # of each class -> of each name: what is refused, what is taken; the last is no default
    TrainingConfig: {
        **dict.fromkeys(FROM_ONE_ON, ([0], [1, 7])),
        "time_budget_minutes": ([0, 0.0, 1_000_001], [1e-9, 1_000_000, 2.5]),
        "lora_rank": ([0, 1025], [1, 1024, 8]),
        "gradient_accumulation_steps": ([0, 1_000_001], [1, 1_000_000, 4]),
        "optimizer": (["sgd", "AdamW", ""], ["adamw", "muon"]),
        "learning_rate": ([0, 0.0, 10.1, 1e308], [1e-12, 1, 10, 0.002]),
        "schedule": (["linear", "Cosine", ""], ["cosine", "constant", "wsd"]),
        "warmup_steps": ([], [0, 1, 3]),
        "embedding_rate": ([0, 0.0, 10.1], [1e-12, 10, 0.02]),
        "decay_share": ([0, 0.0, 1.01], [1e-9, 1, 0.55]),
        "final_rate": ([-1e-9, 1.01], [0, 1, 0.03]),
        "beta2": ([0, 0.0, 1, 1.0], [1e-9, 0.9999, 0.99]),
        "weight_decay": ([-1e-9, 10.1], [0, 10, 0.2]),
        "decay_embeddings": ([], [False, True]),
        "max_grad_norm": ([-1e-9], [0, 1e308, 2, 0.5]),
        "max_length": ([0, 1_000_001], [1, 1_000_000, 32]),
        "sampling": (["shuffle", ""], ["random"]),
        "shift_windows": ([], [False, True]),
        "train_ratio": ([0, 0.0, 1, 1.0], [0.001, 0.999, 0.8]),
        "save_minutes": ([0, 0.0], [1e-9, 600, 0.5]),
        "keep_checkpoints": ([0, 1, 1001], [2, 1000, 3]),
        "start_context": (["", " \n", [], ["a"] * 17], ["春", ["a"] * 16, ["Once", "春江"]]),
        "num_workers": ([], [0, 1]),
        "activation_checkpointing": ([], [False, True]),
    },
    GPTConfig: {
        "vocab_size": ([0], [1]),
        "context_length": ([0, 1_000_001], [1]),
        "emb_dim": ([0, 65_540], [4, 65_536, 32]),
        "n_heads": ([0, 1025], [1, 8]),
        "n_layers": ([0, 1025], [1, 3]),
        "ff_dim": ([0, 1_000_001], [1, 100]),
        "drop_rate": ([1, 1.0], [0, 0.999, 0.2]),
        "attention_drop_rate": ([1, 1.0], [0, 0.999, 0.1]),
        "activation": (["swish", ""], ["gelu", "gelu_exact", "relu"]),
        "positions": (["rotary"], ["learned", "sinusoidal"]),
        "architecture": (["llama3", "GPT2", ""], ["gpt2", "llama"]),
        "n_kv_heads": ([0, 1025], [4, 2]),
        "rope_theta": ([0, 1, 1.0], [10_000, 500_000.0]),
        **dict.fromkeys(
            ["qkv_bias", "tie_embeddings", "qk_norm", "zero_init"], ([], [False, True])
        ),
        **dict.fromkeys(["out_bias", "mlp_bias"], ([], [True, False])),
        "head_dim": ([0, 65_537], [1, 64]),
        "norm_eps": ([0, 1.1], [1, 1e-3]),
        "rope_scaling": ([], [{"rope_type": "linear", "factor": 2.0}]),
    },
    RunSettings: {
        "DATA": (["", " "], ["no-such-file.txt"]),
        "TOKENIZER": (["gpt3", "GPT2", ""], ["gpt2"]),
        "DEVICE": (["gpu", "CPU", "cuda:", "cuda:x", ""], ["cpu", "mps", "cuda:1"]),
        "PRECISION": (["fp8", "BF16", ""], ["auto", "bf16", "fp32", "fp16"]),
        "COMPILE": (["on", "Auto", "True", ""], ["auto", True, False]),
        "RESUME": ([True, "", " "], ["auto", False, "runs/no such run yet"]),
        "TRACKING": ([], [[], ["wandb"], ["tensorboard", "wandb"]]),
        "NIGHT_MODE": ([], [True, False]),
        "DRY_RUN": ([], [True, False]),
        "MINUTES": ([0, 0.24, 10_000.1, 20_000], [0.25, 10, 10_000]),
        "SEED": ([2**32], [0, 2**32 - 1]),
        "LOG_EVERY": ([], [0, 1]),
    },
    SamplingConfig: {
        "max_new_tokens": ([0, 100_001], [1, 100_000]),
        "temperature": ([-1e-9], [0, 2.5]),
        "top_k": ([0], [1]),
        "top_p": ([-1e-9, 1.1], [0, 1]),
        "min_p": ([-1e-9, 1.1], [0, 1]),
        "repetition_penalty": ([0, 0.009, 100.1], [0.01, 0.9, 1, 100]),
        "repetition_window": ([0, 100_001], [1, 100_000]),
    },
}
EXAMPLES = {
    name: right[-1]
    for cls in (TrainingConfig, GPTConfig)
    for name, (_, right) in LIMITS[cls].items()
    if name not in ("vocab_size", "context_length")
}


def plan_of(**given):
    return resolve_settings(given, "config_run.py")


def custom_plan(**custom_params):
    return plan_of(CUSTOM_MODE=True, custom_params=custom_params)


def build(cls, **values):
    return cls(**COMPLETED_BY[cls] | values)


@pytest.fixture
def plan_with_models(tmp_path):
    """Resolve with a config.json of the given content."""

    def resolve(content, **given):
        content = json.dumps(content) if isinstance(content, dict) else content
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / "config.json").write_bytes(content)
        return resolve_settings(given, "config_run.py", tmp_path / "config.json")

    return resolve


def problems_in(call, *args, **kwargs) -> list[str]:
    """The lines of the one SettingsError that a call raises, without the header."""
    with pytest.raises(SettingsError) as caught:
        call(*args, **kwargs)
    assert caught.value.exit_code == 2
    header, *problems = str(caught.value).split("\n")
    counted = "1 problem " if len(problems) == 1 else f"{len(problems)} problems "
    assert header.startswith(counted)
    return [problem.strip() for problem in problems]


def field_names(cls) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def test_the_examples_of_these_tests_cover_every_setting():
    assert {*LIMITS[TrainingConfig], "model_overrides"} == set(field_names(TrainingConfig))
    assert set(LIMITS[GPTConfig]) == set(field_names(GPTConfig))
    assert {*MODEL_SETTINGS, "vocab_size", "context_length"} == set(LIMITS[GPTConfig])


def test_unknown_name_is_refused_with_the_nearest():
    for name, value in EXAMPLES.items():
        wrong = f"{name[0]}{name}"
        [problem] = problems_in(custom_plan, **{wrong: value})
        assert problem == f'custom_params["{wrong}"] is unknown; did you mean "{name}"?'
    for name in field_names(RunSettings):
        wrong = f"{name[:-1]}~"
        assert problems_in(plan_of, **{wrong: 1}) == [f'{wrong} is unknown; did you mean "{name}"?']
    [problem] = problems_in(custom_plan, n_embdd=32)  # an alias is answered with our own name
    assert problem.endswith('did you mean "emb_dim"?')


def test_name_like_no_other_of_its_place_is_refused_with_the_list_of_all():
    [problem] = problems_in(custom_plan, zzzzzz=1)
    assert all(name in problem for name in EXAMPLES)
    for elsewhere in ({"sampling_params": {"lr": 1e-3}}, {"zzz": 3}):
        [problem] = problems_in(plan_of, **elsewhere)
        assert "did you mean" not in problem and "known are: " in problem
    assert len(problems_in(plan_of, **{"a\nb": 1}, custom_params={"c\nd": 1})) == 2
    [problem] = problems_in(plan_of, custom_params={5: 1})
    assert "5" in problem and "unknown" in problem
    assert len(problems_in(plan_of, custom_params=[])) == 1


def test_model_field_and_other_systems_spellings_count_on_top_and_in_model_overrides():
    for spelling, name in ALIASES.items() | {name: name for name in MODEL_SETTINGS}.items():
        params = BESIDE.get(name, {}) | {spelling: EXAMPLES[name]}
        plan = custom_plan(**params)
        is_alias = spelling != name
        assert (plan.model | plan.training.to_dict())[name] == EXAMPLES[name]
        assert plan.notices == [f'custom_params["{spelling}"] is read as {name}'] * is_alias
        if name in MODEL_SETTINGS:
            below = custom_plan(model_overrides=params)
            assert (below.training, below.model) == (plan.training, plan.model)
            where = f'custom_params["model_overrides"]["{spelling}"]'
            assert below.notices == [f"{where} is read as {name}"] * is_alias


def test_setting_that_lives_elsewhere_is_refused_with_a_pointer():
    for name, pointer in ELSEWHERE.items():
        for custom_params in ({name: 1}, {"model_overrides": {name: 1}}):
            [problem] = problems_in(custom_plan, **custom_params)
            assert problem.endswith(f'"{name}"] is not set here: {pointer}')


def test_two_spellings_must_have_equal_values():
    for custom_params, *labels in (
        ({"lr": 1e-3, "learning_rate": 2e-3}, '["lr"] = 0.001', '["learning_rate"] = 0.002'),
        ({"n_embd": 32, "d_model": 64}, '["n_embd"] = 32', '["d_model"] = 64'),
        (
            {"n_layers": 2, "model_overrides": {"n_layer": 3}},
            'custom_params["n_layers"] = 2',
            '["model_overrides"]["n_layer"] = 3',
        ),
        ({"num_epochs": 1, "epochs": True}, '["num_epochs"] = 1', '["epochs"] = True'),
    ):
        problem, *_ = problems_in(custom_plan, **custom_params)
        assert all(label in problem for label in labels)
    custom_plan(lr=1e-3, learning_rate=1e-3)
    custom_plan(dropout=0, drop_rate=0.0)
    custom_plan(n_layers=2, model_overrides={"n_layer": 2})


WRONG_TYPES = {
    int: ["8", 8.5, True, [8], {}, 8j],
    float: ["0.5", True, [0.5], {}, 1j],
    bool: [1, 0, "True", 1.0, []],
    str: [8, True, ["cpu"], {}, b"cpu"],
    dict: ["{}", 1, True, [("a", 1)]],
    list: ["wandb", 1, True, {}, ("wandb",)],
}
TAKEN_TOO = {"DATA": (dict, list), "start_context": (list,), "RESUME": (bool,), "COMPILE": (bool,)}


@pytest.mark.parametrize("cls", COMPLETED_BY)
def test_value_of_a_wrong_type_or_no_finite_number_is_refused(cls):
    for name, hint in typing.get_type_hints(cls).items():
        base, *others = typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint]
        for value in WRONG_TYPES[typing.get_origin(base) or base]:
            if not isinstance(value, TAKEN_TOO.get(name, ())):
                [problem] = problems_in(build, cls, **{name: value})
                assert problem.startswith(f"{name} is {value!r} ({type(value).__name__}); it must ")
        if type(None) in others:  # where a value is worked out
            build(cls, **{name: None})
        else:
            [problem] = problems_in(build, cls, **{name: None})
            assert problem.startswith(f"{name} is None (NoneType); it must be ")
        if base in (int, float):
            for value in (math.nan, math.inf, -math.inf, -1, 10**400):
                [problem] = problems_in(build, cls, **{name: value})
                assert problem.startswith(f"{name} is {shown(value)}")


@pytest.mark.parametrize("cls", LIMITS)
def test_limits_are_where_they_are_said_to_be(cls):
    for name, (wrong, right) in LIMITS[cls].items():
        for value in wrong:
            [problem] = problems_in(build, cls, **BESIDE.get(name, {}), **{name: value})
            assert problem.startswith(f"{name} is ")
        for value in right:
            assert getattr(build(cls, **BESIDE.get(name, {}), **{name: value}), name) == value


SEVERAL = "it must be text in quotes or a list of texts [...], 1 to 16 of them"
LONG, LONE = "\U0001f600" * 80, "x\udc00"
NO_NAMES = ["../x", "a/b", "a\\b", "..", ".", "/etc", "C:x", ".hidden"]
NO_NAMES += ["a\0b", "a\nb", "x" * 81, ""]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("start_context", [], f"is empty; {SEVERAL}"),
        ("start_context", ["a"] * 17, f"is a list of 17; {SEVERAL}"),
        ("start_context", ("a", "b"), f"is ('a', 'b') (tuple); {SEVERAL}"),
        ("start_context", ["a", "\t"], "has an empty text in place 2; each must be some text"),
        ("start_context", ["a", "b", 5], "has 5 (int) in place 3; each must be text in quotes"),
        ("schedule", "cosin", 'is \'cosin\'; it must be "cosine", "wsd" or "constant"; did you'),
        ("TRACKING", ["tensorbord"], "names 'tensorbord'; it may name: tensorboard, wandb"),
        ("TRACKING", ["wandb", ""], "names ''; it may name: tensorboard, wandb"),
        ("TRACKING", [["wandb"]], "names ['wandb']; it may name: tensorboard, wandb"),
        ("TRACKING", ["wandb", "tensorboard", "wandb"], "names 'wandb' twice"),
        ("RESUME", True, 'is True; it must be "auto", False or the folder of a run'),
        ("RESUME", LONG, f"({shown(LONG)}) can't be a folder's path"),
        ("OUTPUT_DIR", LONE, f"({shown(LONE)}) can't be a folder's path"),
        ("RUN_NAME", LONG, f"({shown(LONG)}) can't be a folder's name"),
        ("OUTPUT_DIR", "~no-such-user/runs", "('~no-such-user/runs') can't be a folder's path"),
        ("RUN_NAME", "con", "is 'con'; Windows can't have such a folder: "),
        ("RUN_NAME", "run.", "is 'run.'; Windows can't have such a folder: "),
        *(("RUN_NAME", name, "is ") for name in NO_NAMES),
    ],
    ids=lambda case: ascii(case)[:40],
)
def test_value_is_refused_with_what_is_wrong_in_it(name, value, problem):
    cls = TrainingConfig if name in EXAMPLES else RunSettings
    [found] = problems_in(cls, **{name: value})
    assert found.startswith(f"{name} {problem}")
    place = {"custom_params": {name: value}} if cls is TrainingConfig else {name: value}
    label = f'custom_params["{name}"]' if cls is TrainingConfig else name
    assert problems_in(plan_of, **place) == [f"{label}{found.removeprefix(name)}"]


def test_values_of_every_right_form_are_taken():
    for name in ("run 1", "春天", "v1.2", "a..b", "x" * 80, "~no-such-user"):
        plan_of(RUN_NAME=name)
    for name in ("OUTPUT_DIR", "RESUME"):
        plan_of(**{name: "~/runs"})
    assert TrainingConfig(start_context="春江").prompts == ["春江"]
    assert TrainingConfig(start_context=["春江", "往事"]).prompts == ["春江", "往事"]


def test_settings_that_conflict_are_refused_with_both_values():
    for params, problem in (
        ({"emb_dim": 100, "n_heads": 3}, "emb_dim (100) must be a multiple of n_heads (3)"),
        ({"n_heads": 5}, "emb_dim (64) must be a multiple of n_heads (5)"),
        ({"emb_dim": 65, "n_heads": 5, "positions": "sinusoidal"}, "emb_dim (65) must be even"),
        ({"warmup_steps": 10, "max_steps": 10}, "warmup_steps (10) must be below max_steps (10)"),
    ):
        [found] = problems_in(custom_plan, **params)
        assert problem in found
    custom_plan(warmup_steps=9, max_steps=10)
    [problem] = problems_in(plan_of, RESUME="runs/a", RUN_NAME="b")
    assert problem == "RESUME ('runs/a') and RUN_NAME ('b') both name a run; set one of them"
    for resume in ("auto", False):  # which name no run
        plan_of(RESUME=resume, RUN_NAME="b")


def test_all_problems_of_all_places_are_one_error(plan_with_models):
    given = {
        "DTAA": "x",
        "SEED": -1,
        "MODEL": 5,
        "custom_params": {"batch_size": "8", "learning_rat": 1, "emb_dim": 0, "use_amp": True},
        "sampling_params": {"top_p": 2, "topk": 1},
    }
    models = {"small": MODEL_ENTRY | {"n_heads": 0}}
    problems = problems_in(plan_with_models, models, **given)
    starts = "DTAA SEED MODEL custom_params[batch_size] custom_params[learning_rat] "
    starts += "model_overrides[emb_dim] custom_params[use_amp] "
    starts += "sampling_params[top_p] sampling_params[topk] config.json[small][n_heads]"
    found = [problem.split()[0].replace('"', "") for problem in problems]
    assert sorted(found) == sorted(starts.split())
    problems = problems_in(plan_of, MODEL="smal", custom_params={"batch_size": 0})
    assert [problem.split()[0] for problem in problems] == ['custom_params["batch_size"]', "there"]
    custom_params = {"batch_size": 0, "model_overrides": {"n_layers": "2"}}
    for quick in (True, False):  # which don't read them
        assert len(problems_in(plan_of, QUICK_MODE=quick, custom_params=custom_params)) == 2


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SIMPLE | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
NAMES = st.sampled_from([*EXAMPLES, *ALIASES, *ELSEWHERE, "top_k", "model_overrides"])
MODEL_NAMES = st.sampled_from([*MODEL_SETTINGS, *ALIASES])
ANY_SECTION = st.dictionaries(
    NAMES | st.text(max_size=5),
    ANYTHING | st.dictionaries(MODEL_NAMES, ANYTHING, max_size=3),
    max_size=3,
)
RUN_NAMES = st.sampled_from(field_names(RunSettings)) | st.text(max_size=5)


@pytest.mark.slow
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(st.dictionaries(RUN_NAMES, ANYTHING | ANY_SECTION, max_size=4))
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


@pytest.mark.parametrize("switched", [*itertools.product([False, True], repeat=4)], ids=str)
def test_precedence_of_modes_and_models(switched):
    custom, quick, use_small, use_default = switched
    small, large = "small", "gpt2-124m"
    mode = "custom" if custom else "quick" if quick else "full"
    of_custom = small if use_small else large if use_default else None
    model = {"custom": of_custom, "quick": small, "full": large}[mode]
    names = ("CUSTOM_MODE", "QUICK_MODE", "USE_SMALL", "USE_DEFAULT")
    switches = dict(zip(names, switched, strict=True))
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
    assert plan.origins["max_length"].en == "custom_params"
    plan = plan_of(CUSTOM_MODE=True, MODEL="mini")
    assert plan.model["context_length"] == 256
    assert "config.json" in plan.origins["max_length"].en


def test_custom_params_that_the_mode_does_not_read_and_much_dropout_are_noticed():
    [notice] = plan_of(QUICK_MODE=True, custom_params={"batch_size": 3}).notices
    assert "custom_params is not read in quick mode" in notice
    assert plan_of(QUICK_MODE=True, custom_params=TrainingConfig().to_dict()).notices == []
    for rate, noticed in ((0.5, False), (0.51, True)):
        notices = custom_plan(drop_rate=rate).notices
        assert any("drop_rate" in notice for notice in notices) == noticed


def test_none_of_a_hyper_parameter_means_its_default_and_of_a_model_field_the_named_models():
    nothing = dict.fromkeys([*TrainingConfig().to_dict(), *MODEL_SETTINGS])
    plan = custom_plan(**nothing)
    assert (plan.training, plan.model) == (TrainingConfig(), custom_plan().model)
    assert custom_plan(model_overrides=dict.fromkeys(MODEL_SETTINGS)).model == plan.model
    assert plan_of(QUICK_MODE=True, custom_params=nothing).notices == []
    config = CustomTrainingConfig.from_dict(nothing | {"batch_size": 2, "n_layers": 3})
    assert config == CustomTrainingConfig(batch_size=2, model_overrides={"n_layers": 3})
    config.update(batch_size=None, n_layers=None, learning_rate=0.1)
    assert config == CustomTrainingConfig(learning_rate=0.1)
    [problem] = problems_in(custom_plan, batch_sise=None)  # a wrong name is wrong all the same
    assert problem.endswith('did you mean "batch_size"?')


def test_without_minutes_no_tokenizer_means_gpt2s():
    for mode in ({}, {"QUICK_MODE": False}, {"CUSTOM_MODE": True}):
        assert plan_of(**mode).tokenizer == plan_of(**mode).asked().tokenizer == "gpt2"
        assert plan_of(**mode, TOKENIZER="gpt2").asked() == plan_of(**mode).asked()
        assert plan_of(**mode, TOKENIZER="auto").tokenizer == "auto"


AUTO = {"MINUTES": 10}
LEFT_OPEN = [*RECIPE_CHOOSES, "time_budget_minutes"]


@pytest.mark.parametrize("custom, quick", [*itertools.product([False, True], repeat=2)])
def test_minutes_win_over_quick_and_full_mode_and_custom_mode_over_minutes(custom, quick):
    plan = plan_of(**AUTO, CUSTOM_MODE=custom, QUICK_MODE=quick)
    assert (plan.mode, plan.model_name) == ("custom" if custom else "auto", "auto")
    assert ("QUICK_MODE" in plan.origins["mode"].en) == quick
    assert "MINUTES" in plan.origins["mode"].en
    assert plan.fixed == Fixed(None, {}, {})
    assert plan.training == TrainingConfig(time_budget_minutes=10.0)
    asked = plan.asked()
    assert (asked.minutes, asked.tokenizer, asked.model) == (10, None, {})
    assert asked.left_open == LEFT_OPEN and asked.length.num_epochs is None


def test_what_is_set_stays_and_the_recipe_chooses_the_rest():
    plan = plan_of(**AUTO, CUSTOM_MODE=True, custom_params={"lr": 0.01, "max_length": 64})
    assert plan.fixed == Fixed(None, {"context_length": 64}, {"learning_rate": 0.01})
    assert set(LEFT_OPEN) - set(plan.asked().left_open) == {"learning_rate"}
    params = {"batch_size": 8, "weight_decay": None, "n_layers": 3, "eval_iter": 2}  # 8: as if open
    plan = plan_of(**AUTO, CUSTOM_MODE=True, TOKENIZER="char", custom_params=params)
    assert plan.fixed == Fixed("char", {"n_layers": 3}, {"batch_size": 8})
    assert plan.training.eval_iter == 2
    plan = plan_of(**AUTO, TOKENIZER="auto", custom_params=params)  # which auto mode does not read
    assert plan.fixed == Fixed(None, {}, {}) and len(plan.notices) == 1
    # a named model has no open field, whichever its architecture has
    plan = plan_of(**AUTO, MODEL="mini")
    assert plan.fixed.model == plan.model and plan.model["emb_dim"] == 384
    assert {*plan.model, "vocab_size"} == set(field_names(GPTConfig))
    plan_of(**AUTO, CUSTOM_MODE=True, custom_params={"n_kv_heads": 1})  # of the recipe's Llama


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"MINUTES": "10"},
            "MINUTES is '10' (str); it must be a number at least 0.25 and at most ",
        ),
        (
            AUTO | {"CUSTOM_MODE": True, "custom_params": {"emb_dim": 97}},
            "emb_dim (97) must be even: rotary positions turn pairs",
        ),
        ({"MINUTES": True}, "MINUTES is True (bool); it must be a number at least 0.25"),
        ({"MINUTES": 0}, "MINUTES is 0; it must be a number at least 0.25 and at most 10 000 or N"),
        ({"MINUTES": 20_000}, "MINUTES is 20000; it must be a number at least 0.25"),
        ({"minutes": 10}, 'minutes is unknown; did you mean "MINUTES"?'),
        (
            AUTO | {"custom_params": {"time_budget_minutes": 5}},
            'MINUTES (10) and custom_params["time_budget_minutes"] (5) both set the length',
        ),
        (
            AUTO | {"CUSTOM_MODE": True, "custom_params": {"max_steps": 5}},
            'MINUTES (10) and custom_params["max_steps"] (5) both set the length of the run',
        ),
        (
            AUTO | {"CUSTOM_MODE": True, "custom_params": {"positions": "learned"}},
            'positions is "learned"; where architecture is "llama" it must be "rope"',
        ),
    ],
)
def test_wrong_minutes_are_refused_in_one_line(given, said):
    [problem] = problems_in(plan_of, **given)
    assert problem.startswith(said)


def test_config_run_ships_every_setting_with_its_default():
    shipped = runpy.run_path(str(REPOSITORY / "config_run.py"))
    shipped = {name: value for name, value in shipped.items() if not name.startswith("__")}
    custom = shipped.pop("custom_params")
    assert CustomTrainingConfig.from_dict(custom).to_dict() == TrainingConfig().to_dict()
    assert custom.keys() == TrainingConfig().to_dict().keys()
    # what is None is not set: MINUTES may choose it
    assert {custom[name] for name in RECIPE_CHOOSES if name in custom} == {None}
    assert shipped.pop("sampling_params") == dataclasses.asdict(SamplingConfig())
    defaults = dataclasses.asdict(RunSettings())
    assert (defaults.pop("custom_params"), defaults.pop("sampling_params")) == ({}, {})
    assert shipped == defaults


def test_sampling_params_reach_the_plan_and_what_is_left_out_has_its_default():
    assert plan_of(sampling_params={"top_k": 7}).sampling == SamplingConfig(top_k=7)
    # a file of an earlier version means what it meant
    earlier = {"max_new_tokens": None, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
    assert plan_of(sampling_params=earlier).sampling == SamplingConfig()


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
        ({"small": []}, '["small"] must be an object ({...}), not list'),
        ({"mine": MODEL_ENTRY}, 'there is no model "small" (quick mode\'s own)'),
    ],
)
def test_wrong_config_json_is_refused_with_its_place(plan_with_models, content, message):
    [problem] = problems_in(plan_with_models, content)
    assert "config.json" in problem and message in problem


def test_wrong_model_in_config_json_is_refused_with_its_place(plan_with_models):
    for change, message in (
        ({"n_hedas": 4}, '["n_hedas"] is unknown; did you mean'),
        ({"vocab_size": 9}, '["vocab_size"] is not set here'),
        ({"n_layers": 2.0}, '["n_layers"] is 2.0 (float)'),
        ({"drop_rate": math.nan}, '["drop_rate"] is nan'),
        ({"drop_rate": None}, '["drop_rate"] is None'),
        ({"context_length": 0}, '["context_length"] is 0'),
        ({"block_size": 8}, '["block_size"] = 8 set the same thing'),
        ({"n_heads": 5}, ": emb_dim (64) must be a multiple"),
    ):
        [problem] = problems_in(plan_with_models, {"small": MODEL_ENTRY | change})
        assert f'config.json["small"]{message}' in problem
    for name in MODEL_ENTRY:
        entry = {other: value for other, value in MODEL_ENTRY.items() if other != name}
        [problem] = problems_in(plan_with_models, {"small": entry})
        assert f'config.json["small"] lacks "{name}"' in problem


def test_config_json_that_cannot_be_read_is_refused(tmp_path):
    [problem] = problems_in(resolve_settings, {}, "config_run.py", tmp_path / "config.json")
    assert f"{tmp_path / 'config.json'} is missing" in problem
    with pytest.raises(SettingsError, match="can't read"):
        read_json_object(tmp_path)


def test_config_json_may_have_a_byte_order_mark_and_other_systems_spellings(plan_with_models):
    content = b"\xef\xbb\xbf" + json.dumps({"small": MODEL_ENTRY}).encode("utf-8")
    assert plan_with_models(content).model_name == "small"
    entry = {"block_size": 16, "n_embd": 64, "n_head": 4, "n_layer": 1}
    assert plan_with_models({"small": entry}, CUSTOM_MODE=True).model == MODEL_ENTRY
    assert plan_with_models({"mine": MODEL_ENTRY}, MODEL="mine").model["emb_dim"] == 64


def test_unknown_model_is_refused_with_the_nearest_and_with_all():
    nearest = {"smal": "small", "gpt2-124": "gpt2-124m", "GPT2-124M": "gpt2-124m"}
    for name, meant in nearest.items():
        [problem] = problems_in(plan_of, MODEL=name)
        assert f'there is no model "{name}"' in problem
        assert problem.endswith(f'did you mean "{meant}"?')
        assert all(model in problem for model in ("small", "mini", "gpt2-124m"))


def test_a_dict_of_some_or_all_settings_becomes_a_config_and_a_dict_again():
    config = CustomTrainingConfig.from_dict({"batch_size": 2, "n_embd": 32})
    expected = TrainingConfig().to_dict() | {"batch_size": 2, "model_overrides": {"emb_dim": 32}}
    assert config.to_dict() == expected
    assert CustomTrainingConfig.from_dict({}).to_dict() == TrainingConfig().to_dict()
    overrides = {name: EXAMPLES[name] for name in MODEL_SETTINGS}
    everything = {name: EXAMPLES[name] for name in EXAMPLES if name not in overrides}
    everything |= {"model_overrides": overrides, "lora_rank": None}  # which Muon excludes
    config = CustomTrainingConfig.from_dict(everything)
    assert config.to_dict() == everything
    assert CustomTrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert CustomTrainingConfig(**everything) == config
    given = {"batch_size": 0, "epoch": 3, "model_overrides": []}
    assert len(problems_in(CustomTrainingConfig.from_dict, given)) == 3
    [problem] = problems_in(TrainingConfig, model_overrides={"n_layer": 1})
    assert 'model_overrides["n_layer"] is unknown' in problem


def test_update_changes_what_is_named_or_with_a_problem_nothing():
    config = CustomTrainingConfig(warmup_steps=5, model_overrides={"n_layers": 1})
    before = config.to_dict()
    for wrong in (
        {"num_epochs": 0},
        {"learning_rat": 1},
        {"max_steps": 3},  # below the warm-up that is there
        {"model_overrides": {"n_layer": 2, "zzz": 1}},
    ):
        problems_in(config.update, batch_size=4, **wrong)
        assert config.to_dict() == before
    config.update(lr=0.01, n_heads=2, model_overrides={"drop_rate": 0.1})
    overrides = {"n_layers": 1, "n_heads": 2, "drop_rate": 0.1}
    assert config.to_dict() == before | {"learning_rate": 0.01, "model_overrides": overrides}


def test_numbers_of_other_libraries_become_pythons_wherever_they_are(workdir):
    params = {"num_epochs": np.int64(2), "emb_dim": np.int64(32), "learning_rate": np.float32(0.5)}
    params["model_overrides"] = {"n_layers": np.int64(1)}
    given = {"CUSTOM_MODE": True, "SEED": np.int64(3), "custom_params": params}
    plan = resolve_settings(given, "settings.py")
    kept = json.loads(json.dumps([plan.settings, plan.model, plan.as_words()]))
    assert kept[0]["custom_params"]["emb_dim"] == plan.model["emb_dim"] == 32
    assert plan.model["n_layers"] == 1


def test_what_was_checked_is_what_is_kept():
    for config in (CustomTrainingConfig(), TrainingConfig(), RunSettings(), SamplingConfig()):
        name = field_names(config)[0]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, getattr(config, name))
    prompts, overrides = ["a"], {"n_layers": 1}
    config = CustomTrainingConfig(start_context=prompts, model_overrides=overrides)
    config.prompts.append("b")
    config.to_dict()["start_context"].append("b")
    config.to_dict()["model_overrides"].clear()
    prompts.append("")
    overrides["n_layers"] = 0
    assert (config.start_context, config.model_overrides) == (["a"], {"n_layers": 1})
    config.update(start_context=prompts[:1] * 2)
    assert config.start_context == ["a", "a"]
    TrainingConfig().model_overrides["n_layers"] = 1
    assert TrainingConfig().model_overrides == {}


# RunSettings that are compared in another way, or say where a run is; DATA by its tokens, which
# may lie elsewhere
COMPARED = {"QUICK_MODE", "CUSTOM_MODE", "MODEL", "USE_SMALL", "USE_DEFAULT", "custom_params"}
COMPARED |= {"SEED", "PRECISION", "TOKENIZER", "MINUTES", "INIT_FROM"}
COMPARED |= {"DATA", "OUTPUT_DIR", "RUN_NAME", "RESUME", "DRY_RUN"}
# those that the model is compared by
FIXED = (*names_on_resume(TrainingConfig, "fixed"), "max_length")
CHANGEABLE = names_on_resume(TrainingConfig, "free")


def test_each_setting_is_either_compared_or_changeable():
    names = [*FIXED, *CHANGEABLE, "model_overrides"]
    assert sorted(names) == sorted(field_names(TrainingConfig))
    names = [*COMPARED, *names_on_resume(RunSettings, "free")]
    assert sorted(names) == sorted(field_names(RunSettings))


def differing(before: dict, now: dict) -> list[str]:
    """What keeps a custom run from going on."""
    record = record_of(plan_of(CUSTOM_MODE=True, **before))
    return differences(record, plan_of(**{"CUSTOM_MODE": True} | now).asked())


def test_run_with_another_fixed_setting_may_not_go_on():
    for name in {*FIXED, *MODEL_SETTINGS} - {"lora_rank"}:
        beside, value = BESIDE.get(name, {}), EXAMPLES[name]
        lines = differing({"custom_params": beside}, {"custom_params": beside | {name: value}})
        said = "context_length" if name == "max_length" else name
        assert [line.split(":")[0] for line in lines] == [said]
        assert f"{value!r} now" in lines[0]
    plan = plan_of(CUSTOM_MODE=True)
    asked = plan.asked()
    adapted = dataclasses.replace(asked.training, lora_rank=8)  # which needs INIT_FROM
    [line] = differences(record_of(plan), dataclasses.replace(asked, training=adapted))
    assert line == "lora_rank: None then, 8 now"
    for name, value in (("SEED", 5), ("PRECISION", "bf16"), ("TOKENIZER", "char")):
        [line] = differing({}, {name: value})
        assert line.startswith(f"{name.lower()}: ") and line.endswith(f" then, {value!r} now")
    for choice in ({"QUICK_MODE": False, "CUSTOM_MODE": False}, {"MODEL": "mini"}):
        assert differing({}, choice) != []
    assert differing({"PRECISION": "fp32"}, {"PRECISION": "auto"}) != []
    for fewer in ({"num_epochs": 2}, {"max_steps": 2}):
        [line] = differing({}, {"custom_params": fewer})
        assert line == "total steps: 3 then, 2 now (more is possible, less is not)"


def test_run_with_another_changeable_setting_may_go_on():
    for name in CHANGEABLE:
        assert differing({}, {"custom_params": {name: EXAMPLES[name]}}) == []
    watched = {"DEVICE": "cpu", "COMPILE": True, "LOG_EVERY": 3, "TRACKING": ["wandb"]}
    kept = {"NIGHT_MODE": True, "sampling_params": {"top_k": 3}, "OUTPUT_DIR": "elsewhere"}
    worked_out = {"PRECISION": "fp32"}  # which the run had anyway
    for name, value in (watched | kept | worked_out).items():
        assert differing({}, {name: value}) == []


def test_every_setting_has_a_reader():
    # these two are read as sections, by name, before the object is made
    read = {"custom_params", "sampling_params"}
    for node in (node for tree in project_trees().values() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            read.add(node.attr)
        elif isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "settings":
            read.add(getattr(node.slice, "value", None))  # of a run's record
    for cls in COMPLETED_BY:
        assert set(field_names(cls)) <= read
