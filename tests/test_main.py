"""The main job, as its user runs it: what it prints, what it leaves, how it fails."""

import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch

import main
import train
import training.learner
from data import create_dataloader_v1
from engine.errors import ResourceError
from engine.metrics import Score, TokenSize
from tests.conftest import REPOSITORY
from tests.forking import CAN_FORK, fork
from tests.letters import Letters
from tests.programs import write_settings
from tests.resuming import rows_of
from training.journal import History
from training_utils import TrainingConfig

CHECKPOINT_FILES = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def summary_in(folder: Path) -> dict:
    return json.loads((only_run(folder) / "summary.json").read_text(encoding="utf-8"))


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def start(workdir, capsys, no_pictures):
    """Run a tiny program with settings of a test's own; what it printed."""

    def run(code: int = 0, **settings):
        write_settings(workdir, **settings)
        assert main.main(["settings.py"]) == code
        return capsys.readouterr()

    return run


@pytest.mark.slow
def test_the_verdict_is_nine_batches_in_which_quick_mode_learns_three_nats(
    shared_data, workdir, capsys, no_pictures
):
    settings = f"DATA = {str(shared_data / 'the-verdict.txt')!r}\nSEED = 1\n"
    settings += "sampling_params = {'max_new_tokens': 1}\n"
    (workdir / "settings.py").write_text(settings, encoding="utf-8")
    assert main.main(["settings.py"]) == 0
    assert re.search(r"^Epoch 1: 100%\|.*\| 9/9$", capsys.readouterr().err, re.MULTILINE)
    summary = summary_in(workdir)
    assert summary["uniform_loss"] - summary["final_val_loss"] >= 3.0


def test_a_run_on_chinese_text_writes_readable_samples_of_each_prompt(workdir, start):
    text = (REPOSITORY / "corpus" / "sample-zh.txt").read_text(encoding="utf-8")[:800]
    (workdir / "val.txt").write_text(text[:200], encoding="utf-8")
    prompts = ["春江", "往事"]
    printed = start(
        text=text,
        start_context=prompts,
        sampling="random",
        RUN_NAME="春江 one",
        DATA={"path": "text.txt", "val": "val.txt"},
        sampling_params={"max_new_tokens": 30, "temperature": 1.0},
    ).out
    run = only_run(workdir)
    assert run.name == "春江 one"
    moments = ("Before training", "After epoch 1", "Greedy", "Top-k (50)", "Top-p (0.9)")
    _, *sections = (run / "samples.md").read_text(encoding="utf-8").split("\n## ")
    for moment, section in zip(moments, sections, strict=True):
        for number, prompt in enumerate(prompts, start=1):
            assert f"\n{moment}, prompt {number}: {prompt}" in printed
        assert re.fullmatch(
            rf"{re.escape(moment)}\n\nStep \d+, validation loss \d+\.\d{{3}}\n\n"
            "Prompt 1:\n\n    春江.*\n\nPrompt 2:\n\n    往事.*",
            section,
            re.DOTALL,
        )
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    assert settings["training"]["start_context"] == prompts
    assert len(re.findall("[\u4e00-\u9fff，。]", sections[3])) > len("春江往事") + 10
    split = json.loads((run / "data.json").read_text(encoding="utf-8"))["split"]
    assert (split["train_tokens"], split["validation_tokens"]) == (800, 200)
    summary = summary_in(workdir)  # of crops at random places
    assert summary["final_val_loss"] < summary["initial_val_loss"]
    # a token is a character, and the first one is not scored
    bits = summary["final_val_loss"] / math.log(2)
    per_byte = bits * 199 / len(text[1:200].encode("utf-8"))
    assert summary["final_val_bits_per_character"] == pytest.approx(bits)
    assert summary["final_val_bits_per_byte"] == pytest.approx(per_byte)
    last = f"Bits a byte: {per_byte:.3f} ({bits:.3f} a character, perplexity "
    assert last in printed and "over all validation text)\nDiagnosis: " in printed


def test_the_last_samples_heed_every_limit_and_end_where_the_model_ends_its_text(
    start, monkeypatch
):
    drawn, real = [], train.generate

    def generate(model, ids, *, end_of_text_id, **options):
        rows = real(model, ids, end_of_text_id=end_of_text_id, **options)
        drawn.append(options | {"n_drawn": len(rows[0]) - len("river")})
        return [[*row[:5], *row[:3], end_of_text_id] for row in rows]

    monkeypatch.setattr(train, "generate", generate)
    sampling = {"max_new_tokens": 8, "temperature": 1.5, "min_p": 0.1, "top_k": 3, "top_p": None}
    sampling |= {"repetition_penalty": 2.0, "repetition_window": 7}
    printed = start(start_context="river", sampling_params=sampling).out
    samples = re.findall(r"^(Greedy|Top-. \(.+\)): (.*)$", printed, re.MULTILINE)
    assert samples == [(label, "riverriv") for label in ("Greedy", "Top-k (3)", "Top-p (all)")]
    same = {name: value for name, value in sampling.items() if not name.startswith("top_")}
    limits = ({"temperature": 0.0}, {"top_k": 3}, {"top_p": None})
    for options, limit in zip(drawn[-3:], limits, strict=True):
        del options["generator"], options["on_step"]
        assert options == same | limit | {"n_drawn": 8}


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"DATA": "nowhere.txt"}, 3, "there is no file nowhere.txt"),
        ({"DATA": "the-verdikt"}, 3, 'did you mean "the-verdict"'),
        ({"DATA": "three.txt"}, 3, "at least 4 are needed"),
        ({"DEVICE": "cuda:99"}, 6, "this machine has no such device"),
        ({"DEVICE": "gpu"}, 2, 'it must be "cpu", "cuda", "cuda:1", "mps" or'),
        ({"SEED": "x", "LOG_EVERY": -1}, 2, "2 problems in settings.py"),
        ({"RUN_NAME": "taken"}, 4, "is already there"),
        ({"OUTPUT_DIR": "text.txt"}, 6, "is a file"),
    ],
)
def test_bad_input_ends_with_its_exit_code_and_help(workdir, start, settings, code, said):
    (workdir / "three.txt").write_text("a b", encoding="utf-8")
    (workdir / "runs" / "taken").mkdir(parents=True)
    (workdir / "runs" / "taken" / "thesis.txt").write_bytes(b"years of work")
    printed = start(code, **settings)
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) <= 4
    assert code == 3 or "Text loaded" not in printed.out  # which takes long
    assert names_in(workdir / "runs" / "taken") == {"thesis.txt"}


def test_a_text_shorter_than_a_window_and_a_batch_is_trained_on_and_said(workdir, start):
    printed = start(batch_size=64, text="rivers bell ").out
    for name, had in ("batch_size", 64), ("max_length", 16):
        assert f"Note: {name} is lowered from {had}" in printed
    assert summary_in(workdir)["steps"] == 1
    assert summary_in(workdir)["final_val_loss"] > 0


def test_arguments_and_settings_files_that_are_none_are_refused_at_once(
    workdir, capsys, monkeypatch
):
    assert main.main(["--epochs", "3"]) == 2
    assert "edit config_run.py" in capsys.readouterr().err
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
    for name in ("nowhere.py", ".", "pipe"):
        assert main.main([name]) == 2
        assert f"there is no settings file {name}" in capsys.readouterr().err
    (workdir / "config_run.py").write_text('DATA = "x"\nQUICK_MODE = Tru e\n', encoding="utf-8")
    monkeypatch.syspath_prepend(str(workdir))
    assert main.main([]) == 2
    message = capsys.readouterr().err
    assert "config_run.py line 2" in message and "QUICK_MODE = Tru e" in message


def test_a_traceback_is_shown_where_it_is_asked_for_or_nobody_expected_the_error(
    start, monkeypatch
):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(training.learner, "take_step", broken)
    with pytest.raises(ZeroDivisionError):
        start()
    monkeypatch.setenv("GPT_DEBUG", "1")
    with pytest.raises(main.PipelineError):
        start(DATA="nowhere.txt")


def spoil_losses(monkeypatch, is_spoilt) -> None:
    """Make the training loss NaN in the steps, counted from 1, for which is_spoilt says so."""
    real, count = training.learner.batch_loss, itertools.count(1)

    def batch_loss(model, *arguments):
        loss = real(model, *arguments)
        return loss * float("nan") if model.training and is_spoilt(next(count)) else loss

    monkeypatch.setattr(training.learner, "batch_loss", batch_loss)


@pytest.mark.slow
def test_a_diverging_run_ends_with_5_and_names_the_last_good_checkpoint(
    workdir, start, monkeypatch
):
    with monkeypatch.context() as patch:
        spoil_losses(patch, lambda step: True)
        assert "No checkpoint was made yet." in start(5, max_steps=30, RUN_NAME="one").err
    settings = {"RUN_NAME": "one", "max_steps": 30, "save_every": 2}
    with monkeypatch.context() as patch:
        spoil_losses(patch, lambda step: step > 6)
        error = start(5, **settings).err
    assert "training diverged" in error
    assert "begin a run with a third of it" in error
    named = workdir / re.search(r"The last good one: (\S+)", error)[1]
    assert names_in(named) == CHECKPOINT_FILES
    assert not (only_run(workdir) / "summary.json").exists()
    weights = safetensors.torch.load_file(named / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert "Resuming" in start(**settings).out


@pytest.mark.slow
def test_without_matplotlib_and_tqdm_a_run_trains_and_a_step_that_is_not_finite_is_skipped(
    workdir, start, monkeypatch
):
    for library in ("matplotlib", "tqdm"):
        monkeypatch.setitem(sys.modules, library, None)
    spoil_losses(monkeypatch, lambda step: step == 3)
    printed = start(max_steps=8)
    assert "matplotlib is not installed: no picture" in printed.out
    assert re.search(r"^Epoch 1: 8/\d+$", printed.err, re.MULTILINE)
    assert not (workdir / "training_losses.png").exists()
    assert "Note: step 3: the loss is nan" in printed.out
    assert "the step is skipped (1 so far)" in printed.out
    assert "Steps skipped: 1 (a loss or gradient was not finite)" in printed.out
    summary = summary_in(workdir)
    assert (summary["steps"], summary["steps_skipped"]) == (8, 1)
    losses = [row["train/loss"] for row in rows_of(only_run(workdir)) if "train/loss" in row]
    assert [loss is None for loss in losses] == [step == 3 for step in range(1, 9)]


@pytest.mark.slow
def test_memory_that_runs_out_is_said_with_what_to_change_and_the_checkpoint_is_kept(
    workdir, start, monkeypatch
):
    settings = {"max_steps": 8, "eval_freq": 4, "save_every": 2}
    real, count = training.learner.mean_loss, itertools.count(1)

    def run_out(*arguments, **options):
        if next(count) == 4:
            raise MemoryError  # Python's own has no message
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training.learner, "mean_loss", run_out)
        message = start(6, **settings).err
    assert "out of memory" in message
    assert "Set a smaller batch_size and, for the same step, more gradient_accumulation" in message
    assert "Traceback" not in message
    newest = max((only_run(workdir) / "checkpoints").iterdir())
    assert newest.name == "step-00000004"  # with an evaluation on the same step, the save is first
    assert names_in(newest) == CHECKPOINT_FILES
    assert "4 of 8 steps are done" in start(**settings).out


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("first", [RuntimeError, ConnectionResetError])
def test_a_second_lost_worker_does_not_spoil_the_report_on_the_first(start, monkeypatch, first):
    def lost(*_):
        raise RuntimeError("DataLoader worker (pid 2) is killed by signal: Killed. ")

    def train_with_workers(env):
        if first is RuntimeError:
            lost()
        loader = compile("raise ConnectionResetError(104, 'reset')", "dataloader.py", "exec")
        exec(loader)  # torch's file, as far as the traceback goes

    def complain(message):
        signal.raise_signal(signal.SIGCHLD)
        real(message)

    real = main.complain
    monkeypatch.setattr(main, "train", train_with_workers)
    monkeypatch.setattr(main, "complain", complain)
    before = signal.signal(signal.SIGCHLD, lost)  # as torch does
    try:
        assert "a process that prepares batches was ended from outside" in start(6).err
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_FORK, reason="needs a fork and /dev/full")
def test_output_that_nobody_can_take_does_not_end_a_run(tmp_path):
    write_settings(tmp_path)
    code = "import sys\nimport main\nsys.modules['matplotlib'] = None\n"
    code += "sys.exit(main.main(['settings.py']))"
    full = Path("/dev/full")
    assert fork(code, tmp_path, dict(os.environ), full, full).wait() == 0
    assert summary_in(tmp_path)


def test_a_disk_without_room_is_told_before_training_each_time(workdir, start, monkeypatch):
    usage = shutil.disk_usage(workdir)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for _ in range(2):
        printed = start(6, RUN_NAME="one")
        assert "keeping 2 checkpoints and a new one takes" in printed.err
        assert "Before training" not in printed.out


@pytest.mark.slow
def test_a_run_that_diverged_and_that_patience_ended_has_the_loss_of_its_best_weights(
    workdir, start
):
    start(5, max_steps=12, eval_freq=1, learning_rate=5.0, patience=1)
    summary = summary_in(workdir)
    assert summary["steps"] < 12
    rows = {row["step"]: row for row in rows_of(only_run(workdir)) if "val/loss" in row}
    assert summary["final_train_loss"] == rows[summary["weights_of_step"]]["eval/train_loss"]


def test_the_best_loss_is_the_final_one_or_says_what_it_compares_with():
    loader = create_dataloader_v1("abcdefgh" * 20, batch_size=2, max_length=8, tokenizer=Letters())
    score = Score(2.5, TokenSize(1.0, 1.0), 20, 20)
    history = History(steps=[0, 3, 6], train_losses=[3.0] * 3, val_losses=[4.0, 2.0, 2.2])

    def best(eval_iter: int, step: int) -> tuple[float, int, str]:
        config = TrainingConfig(eval_iter=eval_iter)
        env = SimpleNamespace(val_loader=loader, train_config=config)
        return main._best(env, history, step, score)

    assert best(1, 3) == (2.5, 3, "")  # of the weights that were scored
    assert best(100, 6) == (2.0, 3, "")  # of all the text
    assert best(4, 6) == (
        2.0, 3, "; on 4 of 21 batches of the validation text, on which step 6 has 2.2000"
    )  # fmt: skip


@pytest.mark.slow
def test_what_a_run_had_in_memory_is_free_once_main_returns(start, monkeypatch):
    models, real = [], training.learner.take_step

    def ending_by(error):
        def take_step(model, *arguments, **options):
            models.append(weakref.ref(model))
            if error is signal.SIGINT:
                signal.raise_signal(error)
            elif error is not None:
                raise error("no")  # an error that lives on would hold what its frames had
            return real(model, *arguments, **options)

        return take_step

    before = signal.getsignal(signal.SIGINT)
    for error, code in ((ResourceError, 6), (signal.SIGINT, 130), (None, 0)):
        monkeypatch.setattr(training.learner, "take_step", ending_by(error))
        start(code, max_steps=3)
        gc.collect()
        assert models and not any(model() for model in models)
        assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_the_samples_after_training_stops_at_the_token(start, monkeypatch):
    real, written = main.continue_prompts, []

    def continue_prompts(*arguments, on_step, **options):
        def step():
            written.append(1)
            if len(written) == 2:
                signal.raise_signal(signal.SIGINT)
            on_step()

        return real(*arguments, on_step=step, **options)

    monkeypatch.setattr(main, "continue_prompts", continue_prompts)
    settings = {"max_steps": 2, "RUN_NAME": "one", "sampling_params": {"max_new_tokens": 40}}
    printed = start(130, **settings)
    assert len(written) == 2 and "Greedy" not in printed.out
    assert "The training is done and saved; the same command finishes the rest" in printed.err
    assert "TRAINING COMPLETE" in start(**settings).out


@pytest.mark.slow
def test_an_interrupt_in_another_thread_than_the_main_one_ends_with_130_too(start, monkeypatch):
    printed, steps, real = [], itertools.count(1), training.learner.take_step

    def take_step(*arguments, **options):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(training.learner, "take_step", take_step)
    for code in (130, 0):
        run = threading.Thread(
            target=lambda code=code: printed.append(start(code, max_steps=5, save_every=1))
        )
        run.start()
        run.join()
    assert len(printed) == 2 and "2 of 5 steps are done" in printed[1].out
