"""Building a run: device, settings read at call time, everything on one device."""

import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import environment
import main
import planning.machine
from engine.errors import ResourceError, SettingsError
from engine.optim import build_adamw
from environment import RuntimeEnv, check_devices, pick_device, prepare_environment
from model import GPTConfig, GPTModel
from planning import trial
from storage import tracking
from storage.cache import usable_cache
from tests.programs import everything_in, write_settings
from tests.records import MACHINE
from text.tokenizer import GPT2Tokenizer

TEXT = "The ferry crosses the river at dawn, and the bell rings twice for bread. " * 12


@pytest.fixture(autouse=True)
def text(workdir):
    """A text of one's own in the working directory."""
    (workdir / "text.txt").write_text(TEXT, encoding="utf-8")


def prepare(**changes: Any) -> RuntimeEnv:
    """A small custom run with changes."""
    write_settings(Path(), None, **{"num_epochs": 2, "eval_freq": 4} | changes)
    return prepare_environment("settings.py")


def prepare_quick() -> RuntimeEnv:
    Path("settings.py").write_text('DATA = "text.txt"\nTOKENIZER = "char"\n', encoding="utf-8")
    return prepare_environment("settings.py")


def begin_run(**changes: Any) -> RuntimeEnv:
    """A run that was stopped at once."""
    env = prepare(**changes)
    with env.run.opened():
        pass
    return env


@pytest.mark.slow
def test_the_length_of_samples_may_follow_from_the_texts_characters():
    sampling = {"sampling_params": {"max_new_tokens": None}}
    for name, characters in (("char", 1), ("gpt2", len(TEXT) / len(GPT2Tokenizer().encode(TEXT)))):
        env = prepare(TOKENIZER=name, train_ratio=0.5, **sampling)
        length = env.run.record.sampling.max_new_tokens
        assert length == pytest.approx(300 / characters, rel=0.05)
        assert length == round(300 / env.token_size.characters)


def test_the_best_device_is_taken_in_the_order_mps_cuda_xpu_cpu(monkeypatch):
    monkeypatch.setattr(planning.machine, "_ready", lambda device: device)
    for there in (["mps", "cuda"], ["cuda", "xpu"], ["xpu"], []):
        counts = {"cpu": 1} | {kind: int(kind in there) for kind in ("mps", "cuda", "xpu")}
        monkeypatch.setattr(planning.machine, "_count_devices", lambda counts=counts: counts)
        assert pick_device(None).type == (there or ["cpu"])[0]


def test_a_device_that_is_not_there_is_never_replaced(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1", "mps", "xpu"):
        with pytest.raises(ResourceError, match=r"(?s)no such device.*Available here: cpu;"):
            pick_device(name)


@pytest.mark.parametrize("stray", [None, "parameter", "buffer", "optimizer state", "batch"])
def test_one_tensor_on_another_device_is_found(stray):
    sizes = {"vocab_size": 11, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 1}
    model = GPTModel(GPTConfig(**sizes))
    optimizer = build_adamw(model, learning_rate=1e-3, weight_decay=0.1)
    batch = [torch.zeros(1, 4, dtype=torch.long)] * 2
    model(batch[0]).sum().backward()
    optimizer.step()
    elsewhere = torch.zeros(3, device="meta")
    if stray == "parameter":
        model.final_norm.bias = torch.nn.Parameter(elsewhere)
    elif stray == "buffer":
        model.register_buffer("table", elsewhere)
    elif stray == "optimizer state":
        next(iter(optimizer.state.values()))["exp_avg"] = elsewhere
    elif stray == "batch":
        batch[1] = elsewhere
    wrong = pytest.raises(ResourceError, match=f"{stray}.* is on meta")
    with wrong if stray else contextlib.nullcontext():
        check_devices(model, optimizer, batch, torch.device("cpu"))


def test_a_model_that_memory_cannot_hold_is_an_error_that_says_what_to_change(monkeypatch):
    def refuse(config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(planning.machine, "GPTModel", refuse)
    with pytest.raises(ResourceError, match=r"(?s)does not fit.*n_layers or emb_dim"):
        planning.machine.build_model(None, torch.device("cpu"))


def test_attributes_set_on_config_run_before_the_call_are_used(capsys):
    import config_run

    config_run.DATA, config_run.TOKENIZER, config_run.CUSTOM_MODE = "text.txt", "char", True
    config_run.custom_params = {"batch_size": 3, "max_length": 10, "n_embd": 32, "n_heads": 2}
    env = prepare_environment()
    ids, targets = next(iter(env.train_loader))
    assert ids.shape == targets.shape == (3, 10)
    assert env.model(ids).shape == (3, 10, env.tokenizer.vocab_size)
    assert env.model.config.emb_dim == 32
    assert env.train_config.stride == 10
    assert env.optimizer.param_groups[0]["lr"] == env.train_config.learning_rate
    assert 'custom_params["n_embd"] is read as emb_dim' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("data = 'text.txt'", 'data is unknown; did you mean "DATA"?'),
        ("import sys; sys.exit(3)", "settings.py line 2 fails: SystemExit: 3"),
        ("steps = 4", "settings.py sets nothing; it may set: DATA"),
        ("DATA = 'x'; assert False", "settings.py line 2 fails: AssertionError"),
        ("QUIK_MODE = True", 'QUIK_MODE is unknown; did you mean "QUICK_MODE"?'),
        ("costom_params = {}", 'costom_params is unknown; did you mean "custom_params"?'),
        ("QUICK_MODE = true", "settings.py line 2 fails: NameError: name 'true' is not defined"),
        ("LOG_EVERY = (1", "settings.py line 2 is not Python"),
        (r"DATA = 'C:\Users'", '\nWrite a path as "C:/Users" or r"C:\\Users".'),
        ("import nowhere_to_be_found", "settings.py line 2 fails: ModuleNotFoundError: No module"),
        (None, "there is no settings file settings.py"),
    ],
)
def test_a_mistake_in_a_settings_file_is_named_with_its_place(workdir, line, said):
    if line is not None:
        (workdir / "settings.py").write_text(f'"""Mine."""\n{line}\n', encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        prepare_environment("settings.py")
    assert said in str(caught.value)


def test_a_settings_file_may_compute_and_takes_numbers_of_other_libraries():
    write_settings(Path(), None, num_epochs=2)
    text = "import math\nimport numpy as np\nfrom fractions import Fraction\n"
    text += "def half(n):\n    return n // 2\n" + Path("settings.py").read_text("utf-8")
    computed = "'num_epochs': half(np.int32(6)), 'learning_rate': Fraction(1, 100)"
    text = text.replace("'num_epochs': 2", computed) + "SEED = np.int64(5)\n"
    Path("settings.py").write_text(text, "utf-8")
    env = prepare_environment("settings.py")
    assert type(env.run.record.asked.seed) is int and env.run.record.asked.seed == 5
    assert (env.train_config.num_epochs, env.train_config.learning_rate) == (3, 0.01)


@pytest.mark.parametrize(
    "changes", [{"PRECISION": "fp16", "DEVICE": "cpu"}, {"TRACKING": ["wandb"]}], ids=str
)
def test_what_can_not_be_had_is_an_error_before_anything_is_read(monkeypatch, changes):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    said = r'(needs a CUDA GPU.*PRECISION = "auto"|pip install -r requirements\.txt wandb)'
    with pytest.raises(SettingsError, match=f"(?s){said}"):
        prepare(DATA="not-there.txt", **changes)


def test_what_is_not_as_it_was_asked_for_is_said(capsys):
    env = prepare(num_epochs=1, warmup_steps=5000, num_workers=1000)
    assert env.train_config.warmup_steps == env.run.record.total_steps - 1
    assert env.train_loader.num_workers == os.cpu_count()
    said = capsys.readouterr().out
    for notice in ("warmup_steps is lowered from 5000", "num_workers is lowered from 1000"):
        assert notice in said
        assert any(notice in kept for kept in env.run.record.adapted)


def test_the_length_of_a_run_is_that_of_its_mode_or_as_set(capsys):
    env = prepare(num_epochs=1, max_steps=70, time_budget_minutes=2, eval_freq=None)
    assert len(env.train_loader) < 70 == env.run.record.total_steps
    said = "Note: time_budget_minutes is not used: max_steps, where set, alone ends the run"
    assert said in capsys.readouterr().out
    assert env.train_config.eval_freq == 7  # about ten times a run
    Path("text.txt").write_text("one two three four five six seven", encoding="utf-8")
    env = prepare(max_length=None)
    assert env.train_config.stride == env.train_config.max_length < 34
    assert "stride" not in capsys.readouterr().out
    Path("text.txt").write_text("a b c d " * 15_000, encoding="utf-8")
    env = prepare_quick()
    assert len(env.train_loader) > 200 == env.run.record.total_steps


def test_where_the_cache_cannot_be_written_another_of_the_users_own_serves(
    workdir, capsys, monkeypatch
):
    (workdir / "cache").write_text("a file in the way", encoding="utf-8")
    temporary = workdir / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    env = prepare()
    assert env.train_loader.dataset.tokens.path.is_relative_to(temporary)
    assert "serves as cache" in capsys.readouterr().out
    [own] = temporary.iterdir()
    assert usable_cache() == own  # a later run finds it
    shutil.rmtree(own)
    own.write_text("another user's", encoding="utf-8")
    other = usable_cache()
    assert other.parent == temporary and other.is_dir() and other != own


def test_a_step_takes_so_many_batches(capsys):
    n_windows = len(prepare().train_loader.dataset)
    env = prepare(gradient_accumulation_steps=3)
    batches, record = env.train_loader.batch_sampler, env.run.record
    assert (batches.batch_size, batches.per_step, batches.step_size) == (2, 3, 6)
    assert record.steps_per_epoch == batches.n_steps == -(-n_windows // 6)
    assert record.total_steps == 2 * batches.n_steps
    assert f"{record.total_steps} steps of 3 x 2 x 16 tokens" in capsys.readouterr().out


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that does nothing."""
    monkeypatch.setattr(trial, "what_prevents_compiling", lambda device: None)
    monkeypatch.setattr(trial, "compile_model", lambda *_, **__: None)


def test_quick_and_small_runs_stay_uncompiled_with_nothing_tried(monkeypatch, compiler, capsys):
    monkeypatch.setattr(trial.Trial, "step_seconds", None)
    assert prepare().run.record.compiled is False
    record = prepare_quick().run.record
    assert record.mode == "quick" and not record.compiled
    said = "Compile: off (a run this short would not repay it)"
    assert capsys.readouterr().out.count(said) == 2


def test_compile_true_that_cannot_be_had_is_noticed_and_the_run_begins(monkeypatch, capsys):
    monkeypatch.setattr(trial, "what_prevents_compiling", lambda device: "no compiler here")
    record = prepare(COMPILE=True).run.record
    assert (record.compiled, record.why_compiled) == (False, "no compiler here")
    assert "Note: the model is not compiled: no compiler here" in capsys.readouterr().out


def test_a_run_that_goes_on_keeps_what_auto_came_to_or_records_the_change(compiler, capsys):
    begin_run(COMPILE=True)
    env = prepare(COMPILE="auto")
    assert env.run.goes_on and env.run.notes == [] and env.run.record.compiled
    assert "Compile: on (as when this run began)" in capsys.readouterr().out
    env = prepare(COMPILE=False)
    assert env.run.goes_on and not env.run.record.compiled
    [note] = env.run.notes
    assert note.startswith("compiled was True and is False: from here on the ")
    [changed] = env.run.record.changes
    assert changed["compiled"] == changed["COMPILE"] == [True, False]


def test_a_run_whose_steps_are_tried_is_the_run_that_it_would_be_and_is_not_written(
    workdir, compiler
):
    plain = prepare()
    state = torch.get_rng_state()
    tried = prepare(COMPILE=True)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(plain.model.parameters(), tried.model.parameters(), strict=True):
        assert torch.equal(one, other) and other.grad is None
    assert tried.optimizer.state_dict() == plain.optimizer.state_dict()
    for one, other in zip(plain.train_loader, tried.train_loader, strict=True):
        assert torch.equal(one[0], other[0])
    assert plain.model.config.context_length == plain.train_config.max_length == 16
    assert {path.name for path in workdir.iterdir()} == {"cache", "settings.py", "text.txt"}


def test_preparing_writes_nothing_where_a_run_is_unfinished(workdir):
    folder = begin_run().run.path
    (folder / ".tmp-1-orphan").write_bytes(b"x")
    before = everything_in(folder.parent)
    env = prepare()
    assert env.run.path == folder and env.run.goes_on
    other = prepare(SEED=5)
    [note] = other.run.notes
    assert "is unfinished, but differs (seed: 123 then, 5 now): a new run begins" in note
    assert not other.run.goes_on
    assert everything_in(folder.parent) == before


def test_night_mode_and_the_threads_that_a_run_had_reach_its_record(monkeypatch, capsys):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(planning.machine, "default_threads", lambda _: 4)
    assert begin_run(NIGHT_MODE=True).run.record.threads == 2
    assert "Note: night mode: 2 of 4 threads" in capsys.readouterr().out
    assert torch.get_num_threads() == 1  # it is training that is to be slow
    monkeypatch.setattr(planning.machine, "default_threads", lambda _: 6)
    env = prepare(NIGHT_MODE=True)
    assert env.run.goes_on and env.run.record.threads == 2
    [note] = prepare().run.notes
    assert note.startswith("threads was 2 and is 6: from here on the numbers are not bit for bit")


def test_a_run_goes_on_with_what_was_worked_out_when_it_began():
    before = begin_run(max_steps=40, eval_freq=None).train_config
    env = prepare(max_steps=400, eval_freq=None)
    assert env.run.goes_on and env.run.record.total_steps == 400
    # a run of 400 steps would warm up for 40 and evaluate every 40
    assert env.train_config.warmup_steps == before.warmup_steps == 4
    assert env.train_config.eval_freq == before.eval_freq == 4
    assert env.train_config.learning_rate == before.learning_rate


def test_auto_takes_the_recipes_tokenizer_which_no_length_of_the_run_changes(capsys):
    env = begin_run(TOKENIZER="auto")
    assert env.tokenizer.kind == "char" and env.run.record.asked.tokenizer == "auto"
    assert "\nTokenizer: char, 1.00 bytes each (gpt2 " in capsys.readouterr().out
    longer = prepare(TOKENIZER="auto", num_epochs=20)
    assert longer.run.goes_on and longer.tokenizer.fingerprint == env.tokenizer.fingerprint


@pytest.fixture
def in_minutes(monkeypatch):
    """Prepare a run with MINUTES on a machine whose speed is known, and whose steps take 3 s."""
    measured = []

    def measure(machine, minutes):
        measured.append(minutes)
        return MACHINE

    monkeypatch.setattr(environment, "measure_speed", measure)
    monkeypatch.setattr(trial.Trial, "step_seconds", lambda *_, **__: 3.0)
    monkeypatch.setattr(trial.Trial, "costs", lambda *_: trial.Costs(3.0, 0.1, 0.004, 0.0))
    monkeypatch.setattr(trial, "usable_seconds", lambda *_: 14.0)

    def write(**given: Any) -> list[float]:
        given = {"DATA": "text.txt", "MINUTES": 0.25} | given
        lines = [f"{name} = {value!r}" for name, value in given.items()]
        Path("settings.py").write_text("\n".join(lines), encoding="utf-8")
        return measured

    return write


def test_minutes_choose_a_run_which_goes_on_with_its_own_recipe(in_minutes, capsys):
    measured, began_at = in_minutes(), time.perf_counter()
    env = prepare_environment("settings.py")
    printed = capsys.readouterr().out
    record, recipe = env.run.record, env.run.record.recipe
    assert measured == [0.25] and record.mode == "auto"
    for label in ("Your text ", "In 0.25 min ", "Runner-up ", "✓ Text loaded from text.txt"):
        assert f"\n{label}" in printed
    assert "Model Configuration" not in printed and "of the vocabulary in use" not in printed
    assert env.tokenizer.kind == recipe.tokenizer == "char"
    for name, value in recipe.model.items():
        assert getattr(env.model.config, name) == value
    training = env.train_config.to_dict()
    adapted = {"batch_size", "warmup_steps", "gradient_accumulation_steps"}  # to a text this short
    for name, value in recipe.training.items():
        assert training[name] == value or name in adapted
    assert training["time_budget_minutes"] == 0.25 and 2 <= record.total_steps <= 5
    assert record.asked.length.num_epochs is None
    assert 0 < (ends_at := env.run.deadline) - began_at < 16
    env.run._idle_since -= 600  # the user reads the card, and runs the next cell then
    with env.run.training():
        assert 600 <= env.run.deadline - ends_at < 610

    in_minutes(DRY_RUN=True)
    assert main.main(["settings.py"]) == 0
    printed = capsys.readouterr().out
    assert "\nYour text " in printed and "\n  steps that fit, each of " in printed
    assert "training config (0.25 minutes)" in printed
    in_minutes(DRY_RUN=True, MINUTES=100)
    assert main.main(["settings.py"]) == 0
    printed = capsys.readouterr().out
    (n_steps,) = re.findall(r"\n  at most ([\d,]+) steps of ", printed)
    assert f" · {n_steps} steps · " in printed and "gains nothing more" in printed
    assert printed.endswith("nothing was trained or saved. DRY_RUN = False begins this run.\n")
    assert not Path("runs").exists()

    with env.run.opened():  # stopped at once
        pass
    measured.clear()
    in_minutes()
    again = prepare_environment("settings.py")
    assert again.run.goes_on and again.run.record.choice == record.choice and not measured
    assert again.train_config == env.train_config
    # 15 s x 5 % for three samples of 4 ms a token
    assert again.run.record.sampling.max_new_tokens == record.sampling.max_new_tokens == 62
    Path("text.txt").write_text(TEXT.replace("bell", "horn"), encoding="utf-8")
    other = prepare_environment("settings.py")
    assert not other.run.goes_on and measured == [0.25]
    assert "differs (text: sha256 " in other.run.notes[0]


@pytest.mark.parametrize(
    ("mode", "card"),
    [
        # two steps; two evaluations of two batches and one, and then one
        ("quick", "about 0m 1.7s from the first step on: 2 steps of 0.5 s"),
        # 50 steps; eleven evaluations of two batches, and then six
        ("custom", "about 0m 27.8s from the first step on: 50 steps of 0.5 s"),
    ],
)
def test_a_dry_run_prints_what_would_be_trained_and_leaves_nothing(
    workdir, capsys, monkeypatch, mode, card
):
    monkeypatch.setattr(trial.Trial, "costs", lambda *_: trial.Costs(0.5, 0.1, 0.0, 0.0))
    write_settings(Path(), None, num_epochs=2)
    settings = Path("settings.py").read_text("utf-8") + "\nDRY_RUN = True\n"
    if mode == "quick":
        settings = 'DATA, TOKENIZER, DRY_RUN = "text.txt", "char", True\n'
    Path("settings.py").write_text(settings, encoding="utf-8")
    assert main.main(["settings.py"]) == 0
    printed = capsys.readouterr().out
    assert f"\nTime          {card}" in printed and "passes through the training text" in printed
    assert "\nMemory        some " in printed and "on disk up to" in printed
    assert f"✓ Using {mode} training config" in printed and "learning rate" in printed
    assert "  Total params: " in printed and "Compile" not in printed
    assert {path.name for path in workdir.iterdir()} == {"cache", "settings.py", "text.txt"}
