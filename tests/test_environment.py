"""Building a run: device, settings read at call time, everything on one device."""

import itertools
import os
import tempfile
from types import SimpleNamespace

import pytest
import torch

import planning.machine
from engine.errors import ResourceError, SettingsError
from engine.optim import build_adamw
from environment import check_devices, pick_device, prepare_environment
from model import GPTConfig, GPTModel
from planning import trial
from storage import tracking

TEXT = "The ferry crosses the river at dawn, and the bell rings twice for bread. " * 12
SETTINGS = """
DATA = "text.txt"
TOKENIZER = "char"
CUSTOM_MODE = True
custom_params = {
    "num_epochs": 2, "batch_size": 2, "max_length": 16, "eval_freq": 4, "eval_iter": 1,
    "model_overrides": {"emb_dim": 16, "n_heads": 2, "n_layers": 1},
}
"""


@pytest.fixture
def settings_file(workdir):
    """A small custom run on a text of one's own."""
    (workdir / "text.txt").write_text(TEXT, encoding="utf-8")
    (workdir / "settings.py").write_text(SETTINGS, encoding="utf-8")
    return workdir / "settings.py"


def tiny_model() -> GPTModel:
    return GPTModel(GPTConfig(vocab_size=11, context_length=8, emb_dim=8, n_heads=2, n_layers=1))


def after_a_step(model):
    optimizer = build_adamw(model, learning_rate=1e-3, weight_decay=0.1)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("there", "expected"),
    [(("mps", "cuda"), "mps"), (("cuda", "xpu"), "cuda"), (("xpu",), "xpu"), ((), "cpu")],
)
def test_the_best_device_is_taken_in_the_order_mps_cuda_xpu_cpu(monkeypatch, there, expected):
    counts = {"cpu": 1} | {kind: int(kind in there) for kind in ("mps", "cuda", "xpu")}
    monkeypatch.setattr(planning.machine, "_count_devices", lambda: counts)
    monkeypatch.setattr(planning.machine, "_ready", lambda device: device)
    assert pick_device(None).type == expected


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "xpu"])
def test_a_device_that_is_not_there_is_never_replaced(monkeypatch, name):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match=r"(?s)no such device.*Available here: cpu;"):
        pick_device(name)


def test_a_model_on_one_device_is_consistent():
    model = tiny_model()
    optimizer = after_a_step(model)
    check_devices(model, optimizer, [torch.zeros(1, 4)], torch.device("cpu"))


@pytest.mark.parametrize("stray", ["parameter", "buffer", "optimizer state", "batch"])
def test_one_tensor_on_another_device_is_found(stray):
    model = tiny_model()
    optimizer = after_a_step(model)
    batch = [torch.zeros(1, 4, dtype=torch.long)] * 2
    elsewhere = torch.zeros(3, device="meta")
    if stray == "parameter":
        model.final_norm.bias = torch.nn.Parameter(elsewhere)
    elif stray == "buffer":
        model.register_buffer("table", elsewhere)
    elif stray == "optimizer state":
        next(iter(optimizer.state.values()))["exp_avg"] = elsewhere
    else:
        batch[1] = elsewhere
    with pytest.raises(ResourceError, match=f"{stray}.* is on meta"):
        check_devices(model, optimizer, batch, torch.device("cpu"))


def test_attributes_set_on_config_run_before_the_call_are_used(workdir, capsys):
    import config_run

    (workdir / "text.txt").write_text(TEXT, encoding="utf-8")
    config_run.DATA = "text.txt"
    config_run.CUSTOM_MODE = True
    config_run.custom_params = {"batch_size": 3, "max_length": 10, "n_embd": 32, "n_heads": 2}
    env = prepare_environment()
    ids, targets = next(iter(env.train_loader))
    assert ids.shape == targets.shape == (3, 10)
    assert env.model(ids).shape == (3, 10, 50257)
    assert env.model.config.emb_dim == 32
    assert env.train_config.stride == 10
    assert env.optimizer.param_groups[0]["lr"] == env.train_config.learning_rate
    assert 'custom_params["n_embd"] is read as emb_dim' in capsys.readouterr().out


def test_preparing_writes_nothing_but_the_cache(settings_file):
    prepare_environment(settings_file)
    left = {path.name for path in settings_file.parent.iterdir()}
    assert left == {"cache", "settings.py", "text.txt"}


def test_the_same_seed_gives_the_same_model_and_batches(settings_file):
    one, other = prepare_environment(settings_file), prepare_environment(settings_file)
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(one.train_loader, other.train_loader, strict=True)
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("data = 'text.txt'", 'data is unknown; did you mean "DATA"?'),
        ("Seed = 4", 'Seed is unknown; did you mean "SEED"?'),
        ("import sys; sys.exit(3)", "settings.py line 2 fails: SystemExit: 3"),
        ("steps = 4", "settings.py sets nothing; it may set: DATA"),
        ("DATA = 'x'; assert False", "settings.py line 2 fails: AssertionError"),
        ("QUIK_MODE = True", 'QUIK_MODE is unknown; did you mean "QUICK_MODE"?'),
        ("costom_params = {}", 'costom_params is unknown; did you mean "custom_params"?'),
        ("QUICK_MODE = true", "settings.py line 2 fails: NameError: name 'true' is not defined"),
        ("LOG_EVERY = (1", "settings.py line 2 is not Python"),
        (r"DATA = 'C:\Users'", '\nWrite a path as "C:/Users" or r"C:\\Users".'),
        (
            "import nowhere_to_be_found",
            "settings.py line 2 fails: ModuleNotFoundError: No module named",
        ),
    ],
)
def test_a_mistake_in_a_settings_file_is_named_with_its_place(workdir, line, said):
    (workdir / "settings.py").write_text(f'"""Mine."""\n{line}\n', encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        prepare_environment("settings.py")
    assert said in str(caught.value)


def test_helpers_in_a_settings_file_are_the_users_own(settings_file):
    own = "import math\nfrom pathlib import Path\nsteps = 3\ndef half(n):\n    return n // 2\n"
    settings_file.write_text(own + SETTINGS, encoding="utf-8")
    assert prepare_environment(settings_file).train_config.num_epochs == 2


def test_a_missing_settings_file_is_named(workdir):
    with pytest.raises(SettingsError, match=r"there is no settings file nowhere\.py"):
        prepare_environment("nowhere.py")


def test_tokens_are_never_more_than_the_model_has_positions(settings_file):
    env = prepare_environment(settings_file)
    assert env.model.config.context_length == env.train_config.max_length == 16


def test_a_warm_up_longer_than_the_run_is_shortened_and_said(settings_file, capsys):
    text = settings_file.read_text(encoding="utf-8").replace(
        '"num_epochs": 2', '"num_epochs": 1, "warmup_steps": 5000'
    )
    settings_file.write_text(text, encoding="utf-8")
    env = prepare_environment(settings_file)
    assert env.train_config.warmup_steps == env.run.record.total_steps - 1
    assert "warmup_steps is lowered from 5000" in capsys.readouterr().out


def test_quick_mode_ends_after_200_steps_of_a_long_text(workdir):
    (workdir / "text.txt").write_text("a b c d e f g h " * 20_000, encoding="utf-8")
    (workdir / "settings.py").write_text('DATA = "text.txt"\n', encoding="utf-8")
    env = prepare_environment("settings.py")
    assert len(env.train_loader) > 200
    assert env.run.record.total_steps == 200


def test_max_steps_alone_ends_a_custom_run(settings_file):
    text = settings_file.read_text(encoding="utf-8").replace(
        '"num_epochs": 2', '"num_epochs": 1, "max_steps": 70'
    )
    settings_file.write_text(text, encoding="utf-8")
    env = prepare_environment(settings_file)
    assert len(env.train_loader) < 70 == env.run.record.total_steps


def test_a_model_that_memory_cannot_hold_is_an_error_that_says_what_to_change(monkeypatch):
    def refuse(config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(planning.machine, "GPTModel", refuse)
    with pytest.raises(ResourceError, match=r"(?s)does not fit.*n_layers or emb_dim"):
        planning.machine.build_model(None, torch.device("cpu"))


def test_numbers_of_other_libraries_are_accepted(settings_file):
    text = settings_file.read_text(encoding="utf-8").replace('"num_epochs": 2', '"num_epochs": TWO')
    own = "import numpy as np\nfrom fractions import Fraction\n"
    own += "SEED = np.int64(5)\ntwo = np.int32(2)\n"
    text = own + text.replace("TWO", 'two, "learning_rate": Fraction(1, 100)')
    settings_file.write_text(text, encoding="utf-8")
    env = prepare_environment(settings_file)
    seed, rate = env.run.record.asked.seed, env.train_config.learning_rate
    assert (seed, env.train_config.num_epochs, rate) == (5, 2, 0.01)
    assert [type(seed), type(rate)] == [int, float]


def test_more_workers_than_cores_are_capped_and_said(settings_file, capsys):
    text = settings_file.read_text(encoding="utf-8").replace(
        '"num_epochs": 2', '"num_epochs": 2, "num_workers": 1000'
    )
    settings_file.write_text(text, encoding="utf-8")
    assert prepare_environment(settings_file).train_loader.num_workers == os.cpu_count()
    assert "num_workers is lowered from 1000" in capsys.readouterr().out


def test_where_the_cache_cannot_be_written_another_serves(settings_file, capsys, monkeypatch):
    (settings_file.parent / "cache").write_text("a file in the way", encoding="utf-8")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(settings_file.parent / "temporary"))
    env = prepare_environment(settings_file)
    assert env.train_loader.dataset.tokens.path.is_relative_to(settings_file.parent / "temporary")
    assert "serves as cache" in capsys.readouterr().out


def test_the_stride_that_was_left_out_follows_a_shortened_window(workdir, capsys):
    (workdir / "text.txt").write_text("one two three four five six seven", encoding="utf-8")
    (workdir / "settings.py").write_text(
        'DATA = "text.txt"\nCUSTOM_MODE = True\n', encoding="utf-8"
    )
    env = prepare_environment("settings.py")
    assert env.train_config.stride == env.train_config.max_length < 10
    assert "stride" not in capsys.readouterr().out


def test_the_run_is_evaluated_about_ten_times_where_nothing_is_set(workdir):
    (workdir / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    (workdir / "settings.py").write_text(
        'DATA = "text.txt"\nCUSTOM_MODE = True\ncustom_params = {"max_steps": 50}\n',
        encoding="utf-8",
    )
    assert prepare_environment("settings.py").train_config.eval_freq == 5


# --------------------------------------------------------------------- accumulation, night mode


def change(settings_file, custom: str = "", lines: str = "") -> None:
    """Add to custom_params, and lines to the file."""
    text = settings_file.read_text(encoding="utf-8")
    changed = text.replace('"num_epochs": 2,', f'"num_epochs": 2, {custom}') + lines
    settings_file.write_text(changed, encoding="utf-8")


def test_a_step_takes_so_many_batches(settings_file, capsys):
    plain = prepare_environment(settings_file)
    n_windows = len(plain.train_loader.dataset)
    change(settings_file, '"gradient_accumulation_steps": 3,')
    env = prepare_environment(settings_file)
    batches = env.train_loader.batch_sampler
    assert (batches.batch_size, batches.per_step, batches.step_size) == (2, 3, 6)
    assert batches.n_steps == -(-n_windows // 6) < plain.train_loader.batch_sampler.n_steps
    total_steps = env.run.record.total_steps
    assert total_steps == 2 * batches.n_steps
    assert env.run.settings["steps_per_epoch"] == batches.n_steps
    assert f"{total_steps} steps of 3 x 2 x 16 tokens" in capsys.readouterr().out
    # the windows of a step are those that three times the batch would have
    starts = [ids[:, 0].tolist() for ids, _ in env.train_loader]
    whole = settings_file.read_text(encoding="utf-8").replace(
        '"gradient_accumulation_steps": 3, "batch_size": 2', '"batch_size": 6'
    )
    settings_file.write_text(whole, encoding="utf-8")
    expected = [ids[:, 0].tolist() for ids, _ in prepare_environment(settings_file).train_loader]
    steps = [itertools.chain(*starts[i : i + 3]) for i in range(0, len(starts), 3)]
    assert [list(step) for step in steps] == expected


@pytest.fixture
def threads(monkeypatch):
    """Set how many threads suit the machine, with nothing said from outside."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(planning.machine, "default_threads", lambda _: torch.get_num_threads())
    return torch.set_num_threads  # the fixture one_thread sets it back


@pytest.mark.parametrize(("there", "left"), [(1, 1), (3, 1), (4, 2)])
def test_night_mode_leaves_half_of_the_threads_to_others_and_says_so(
    settings_file, capsys, threads, there, left
):
    threads(there)
    assert prepare_environment(settings_file).run.record.threads == there
    assert "night mode" not in capsys.readouterr().out
    change(settings_file, lines="NIGHT_MODE = True\n")
    env = prepare_environment(settings_file)
    assert env.run.record.threads == left
    assert f"Note: night mode: {left} of {there} threads" in capsys.readouterr().out
    assert torch.get_num_threads() == there  # it is training that is to be slow
    batches = env.train_loader.batch_sampler
    assert (batches.batch_size, batches.per_step) == (2, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_night_mode_on_a_gpu_takes_half_of_the_memory_and_of_the_batch(settings_file, capsys):
    change(settings_file, lines="NIGHT_MODE = True\nDEVICE = 'cuda'\n")
    try:
        env = prepare_environment(settings_file)
        batches = env.train_loader.batch_sampler
        assert (batches.batch_size, batches.per_step, batches.step_size) == (1, 2, 2)
        assert "half of the memory, 1 windows at a time instead of 2" in capsys.readouterr().out
        total = torch.cuda.get_device_properties(0).total_memory
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(total * 0.6), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ------------------------------------------------------------------ compiling, a time budget


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that does nothing."""
    monkeypatch.setattr(trial, "what_prevents_compiling", lambda device: None)
    monkeypatch.setattr(trial, "compile_model", lambda *_, **__: None)


@pytest.fixture
def step_seconds(monkeypatch):
    """Set how long a tried step takes; a text in place of seconds is an error."""

    def use(seconds):
        monkeypatch.setattr(trial.Trial, "step_seconds", lambda self: seconds / 1)

    use("a run for which nothing needs to be tried")
    return use


def test_quick_and_small_runs_stay_uncompiled_with_nothing_tried(
    settings_file, step_seconds, compiler, capsys
):
    env = prepare_environment(settings_file)
    assert env.run.record.compiled is False
    settings_file.write_text('DATA = "text.txt"\n', encoding="utf-8")
    env = prepare_environment(settings_file)
    assert env.run.settings["mode"] == "quick" and not env.run.record.compiled
    said = "Compile: off (a run this short would not repay it)"
    assert capsys.readouterr().out.count(said) == 2


def test_compile_true_that_cannot_be_had_is_noticed_and_the_run_begins(
    settings_file, monkeypatch, capsys
):
    monkeypatch.setattr(trial, "what_prevents_compiling", lambda device: "no compiler here")
    change(settings_file, lines="COMPILE = True\n")
    env = prepare_environment(settings_file)
    assert not env.run.record.compiled and env.run.settings["why_compiled"] == "no compiler here"
    assert "Note: the model is not compiled: no compiler here" in capsys.readouterr().out


@pytest.mark.parametrize("compiled", [True, False])
def test_a_run_that_goes_on_keeps_what_auto_came_to(settings_file, compiler, capsys, compiled):
    change(settings_file, lines=f"COMPILE = {compiled}\n")
    begin_run(settings_file)
    capsys.readouterr()
    change(settings_file, lines='COMPILE = "auto"\n')
    env = prepare_environment(settings_file)
    assert env.run.goes_on and env.run.notes == []
    assert env.run.record.compiled == compiled
    said = f"Compile: {'on' if compiled else 'off'} (as when this run began)"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("compiled", [True, False])
def test_a_run_that_goes_on_with_another_compile_says_that_the_numbers_change(
    settings_file, compiler, compiled
):
    change(settings_file, lines=f"COMPILE = {compiled}\n")
    begin_run(settings_file)
    change(settings_file, lines=f"COMPILE = {not compiled}\n")
    env = prepare_environment(settings_file)
    assert env.run.goes_on and env.run.record.compiled != compiled
    [note] = env.run.notes
    assert note.startswith(f"compiled was {compiled} and is {not compiled}: from here on the ")
    [changed] = env.run.settings["changes"]
    assert changed["compiled"] == changed["COMPILE"] == [compiled, not compiled]


def test_a_time_budget_becomes_the_steps_of_the_run_and_of_its_schedule(
    settings_file, step_seconds, capsys
):
    step_seconds(0.5)
    change(settings_file, '"time_budget_minutes": 2,')
    env = prepare_environment(settings_file)
    # every four steps two batches are evaluated, at a third of a step's time each
    expected = int(120 / (0.5 + 2 * 0.5 / 3 / 4))
    assert (
        env.run.record.total_steps == env.train_config.max_steps == expected > len(env.train_loader)
    )
    printed = capsys.readouterr().out
    assert f"Note: {expected} steps are expected to take 2 minutes" in printed
    assert f"custom training config ({expected} steps)" in printed


def test_max_steps_wins_over_a_time_budget_and_that_is_said(settings_file, step_seconds, capsys):
    change(settings_file, '"time_budget_minutes": 2, "max_steps": 9,')
    assert prepare_environment(settings_file).run.record.total_steps == 9
    said = "Note: time_budget_minutes is not used: max_steps, where set, alone ends the run"
    assert said in capsys.readouterr().out


def test_a_run_that_goes_on_keeps_the_steps_of_its_time_budget(settings_file, step_seconds, capsys):
    change(settings_file, '"time_budget_minutes": 2,')
    step_seconds(0.5)
    begin_run(settings_file)
    before = prepare_environment(settings_file)
    step_seconds("nothing is to be tried again")
    capsys.readouterr()
    env = prepare_environment(settings_file)
    assert env.run.goes_on and env.run.notes == []
    assert env.run.record.total_steps == before.run.record.total_steps
    assert env.train_config == before.train_config
    assert "are expected to take" not in capsys.readouterr().out


def test_a_run_whose_steps_are_tried_is_the_run_that_it_would_be(settings_file, compiler):
    plain = prepare_environment(settings_file)
    state = torch.get_rng_state()
    change(settings_file, lines="COMPILE = True\n")
    tried = prepare_environment(settings_file)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(plain.model.parameters(), tried.model.parameters(), strict=True):
        assert torch.equal(one, other) and other.grad is None
    assert tried.optimizer.state_dict() == plain.optimizer.state_dict()
    for one, other in zip(plain.train_loader, tried.train_loader, strict=True):
        assert torch.equal(one[0], other[0])


# --------------------------------------------------------------------------- an unfinished run


def everything_in(folder) -> dict[str, tuple]:
    """Each file and folder but the cache's, with content and time of change."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.is_file() and path.read_bytes(),
        )
        for path in folder.rglob("*")
        if "cache" not in path.relative_to(folder).parts
    }


def begin_run(settings_file):
    """Let a run begin and be stopped at once; returns its folder."""
    env = prepare_environment(settings_file)
    with env.run.opened():
        pass
    assert (env.run.path / "settings.json").is_file()
    return env.run.path


def test_preparing_writes_nothing_where_an_equal_run_is_unfinished(settings_file):
    folder = begin_run(settings_file)
    (folder / ".tmp-1-orphan").write_bytes(b"x")
    before = everything_in(settings_file.parent)
    env = prepare_environment(settings_file)
    assert env.run.path == folder and env.run.goes_on
    assert everything_in(settings_file.parent) == before


def test_preparing_writes_nothing_where_another_run_is_unfinished(settings_file):
    begin_run(settings_file)
    change(settings_file, lines="SEED = 5\n")
    before = everything_in(settings_file.parent)
    env = prepare_environment(settings_file)
    assert not env.run.goes_on
    [note] = env.run.notes
    assert "is unfinished, but differs (seed: 123 then, 5 now): a new run begins" in note
    assert everything_in(settings_file.parent) == before


def test_a_run_that_goes_on_keeps_its_threads_unless_they_are_set_from_outside(
    settings_file, threads, monkeypatch
):
    threads(3)
    begin_run(settings_file)
    threads(2)
    assert prepare_environment(settings_file).run.record.threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    env = prepare_environment(settings_file)
    assert env.run.record.threads == 2
    [note] = env.run.notes
    assert note.startswith("threads was 3 and is 2: from here on the numbers are not bit for bit")
    monkeypatch.delenv("OMP_NUM_THREADS")
    change(settings_file, lines="NIGHT_MODE = True\n")
    env = prepare_environment(settings_file)
    assert env.run.goes_on
    assert env.run.record.threads == 1


def test_a_run_goes_on_with_what_was_worked_out_when_it_began(settings_file):
    change(settings_file, '"max_steps": 40,')
    begin_run(settings_file)
    before = prepare_environment(settings_file).train_config
    text = settings_file.read_text(encoding="utf-8").replace('"max_steps": 40', '"max_steps": 400')
    settings_file.write_text(text, encoding="utf-8")
    env = prepare_environment(settings_file)
    assert env.run.goes_on and env.run.record.total_steps == 400
    # a run of 400 steps would warm up for 40 and evaluate every 40
    assert env.train_config.warmup_steps == before.warmup_steps == 4
    assert env.train_config.eval_freq == before.eval_freq == 4
    assert env.train_config.learning_rate == before.learning_rate


def test_fp16_on_the_cpu_is_an_error_before_anything_is_read(settings_file):
    change(settings_file, lines="PRECISION = 'fp16'\nDEVICE = 'cpu'\nDATA = 'not-there.txt'\n")
    with pytest.raises(SettingsError, match=r'(?s)needs a CUDA GPU.*PRECISION = "auto"') as caught:
        prepare_environment(settings_file)
    assert caught.value.exit_code == 2


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_read(
    settings_file, monkeypatch
):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    change(settings_file, lines="TRACKING = ['wandb']\nDATA = 'not-there.txt'\n")
    with pytest.raises(SettingsError, match=r"pip install -r requirements\.txt wandb"):
        prepare_environment(settings_file)
