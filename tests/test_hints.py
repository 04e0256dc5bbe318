"""What a user is told who is nearly right, or whose text or prompt has an unusual size."""

import os
from types import SimpleNamespace

import pytest

from data import WindowPlan
from engine.errors import CheckpointError, PipelineError, SettingsError
from exchange.opening import open_pretrained
from exchange.saved_run import load_run
from planning.preflight import show_windows
from scripts import inference
from storage.files import SETTINGS
from text.tokenizer import CharTokenizer


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["river"], 'to go on from it give --prompt "river"'),
        (["the", "river"], 'to go on from it give --prompt "the river"'),
        (["--prompt", "the", "river"], "text with blanks needs quotes around it"),
    ],
)
def test_a_word_without_a_flag_names_the_flag(given, hint):
    with pytest.raises(SettingsError) as caught:
        inference._parser().parse_args(given)
    assert str(caught.value).splitlines()[0].endswith(f" is no option; {hint}")


@pytest.mark.parametrize("inside", ["best", "checkpoints/step-00000004/model.safetensors"])
def test_a_path_inside_of_a_run_names_the_run(tmp_path, inside):
    run = tmp_path / "one"
    (run / inside).mkdir(parents=True)
    (run / SETTINGS).write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        load_run(run / inside)
    assert f"is no run, but lies in the run {run}: name that one." in str(caught.value)


@pytest.mark.parametrize(
    ("where", "hint"),
    [
        ("", "'' is no model: there is no such folder"),
        ("one", 'For the run of this name, write "runs/one".'),
        ("owner/name", 'write "hf:owner/name".'),
        ("SmolLM2-135M", 'write "smollm2-135m".'),
        ("runs/one/best", "runs/one/best is no run, but lies in the run runs/one: name that one."),
    ],
)
def test_a_name_that_opens_nothing_says_what_to_write(workdir, where, hint):
    (workdir / "runs/one/best").mkdir(parents=True)
    (workdir / "runs/one" / SETTINGS).write_text("{}", encoding="utf-8")
    with pytest.raises(PipelineError) as caught:
        open_pretrained(where)
    assert hint.replace("/", os.sep) in str(caught.value).replace("/", os.sep)


def test_a_prompt_beyond_the_context_is_said_with_what_is_read_of_it(capsys):
    model = SimpleNamespace(config=SimpleNamespace(context_length=8))
    run = SimpleNamespace(model=model, tokenizer=CharTokenizer("abc"))
    inference.say_if_cut(run, "abcabcab")
    assert capsys.readouterr() == ("", "")
    inference.say_if_cut(run, "abcabcabc")
    assert capsys.readouterr().err == (
        "Note: the prompt 'abcabcabc'... has 9 tokens and the model's context 8: it reads the "
        "last 4\n"
    )


@pytest.mark.parametrize("n_val", [3, 32])
def test_a_handful_of_validation_tokens_is_remarked_on(capsys, n_val):
    report = {"files": [{}], "documents": 1, "bytes": 9, "characters": 9, "passed_over": []}
    report |= {"empty_documents": 0, "duplicate_documents": 0, "documents_on_both_sides": 0}
    report |= {"tokens_per_character": 1.0, "vocabulary_used": 3, "vocabulary": 9}
    plan = WindowPlan(100 + n_val, 100, max_length=4, stride=4, batch_size=2)
    model = SimpleNamespace(count_parameters=lambda: 1000)
    show_windows(
        SimpleNamespace(recipe=None, choice=None, chat=None),
        SimpleNamespace(report=report),
        plan,
        model,
    )
    remark = f"Note: {n_val} tokens to validate on say little"
    assert (remark in capsys.readouterr().out) == (n_val < 32)


def test_duplicates_are_told_beside_a_card_too_and_so_are_questions_on_both_sides(capsys):
    report = {"files": [{}], "documents": 4, "passed_over": [], "empty_documents": 0}
    report |= {"duplicate_documents": 2, "documents_on_both_sides": 0}
    plan = WindowPlan(200, 100, max_length=4, stride=4, batch_size=2)
    with_card = SimpleNamespace(recipe="any", choice=None, chat=None)
    for shared, told in ((0, False), (1, True)):
        chat = {"chat": {"prompts_on_both_sides": shared}}
        show_windows(with_card, SimpleNamespace(report=report | chat), plan, None)
        said = capsys.readouterr().out
        assert "2 duplicates (data.json" in said and "50% of the documents repeat others" in said
        assert ("1 of the questions to validate on is trained on too" in said) == told
