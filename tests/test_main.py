"""The main job, as its user runs it: what it prints, what it leaves, how it fails."""

import gc
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch

import main
import train
import training.learner
from engine.errors import ResourceError
from tests.conftest import REPOSITORY
from tests.programs import TINY, run_main, write_settings

CHECKPOINT_FILES = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
CHAR = {"TOKENIZER": "char", "PRECISION": "fp32"}

PRINTED_IN_ORDER = [
    "=" * 70,
    "GPT Model Training Pipeline",
    "=" * 70,
    r"Device: CPU",
    r"✓ Text loaded from {text}",
    r"✓ Tokenizer initialized \(GPT-2\)",
    r"✓ Using small model configuration \(for testing\)",
    r"Model Configuration",
    r"\s*Vocab size: 50,257",
    r"\s*Context length: 128",
    r"\s*Embedding dim: 64",
    r"\s*Num heads: 4",
    r"\s*Num layers: 2",
    r"\s*Total params: 6,540,800",
    r"✓ Using quick training config \(1 epoch, for testing\)",
    r"✓ Data loaders ready",
    r"✓ Device consistency verified \(using cpu\)",
    r"TRAINING START",
    r"Before training: .+",
    r"Ep 1 \(End Epoch\): Train loss \d+\.\d{{3}}, Val loss \d+\.\d{{3}}",
    r"Greedy: .+",
    r"Top-k \(50\): .+",
    r"Top-p \(0\.9\): .+",
    r"✓ Saved training loss plot to training_losses\.png",
    r"TRAINING COMPLETE",
    r"Training Summary:",
    r"\s*Final train loss: \d+\.\d{{4}}",
    r"\s*Final val loss: \d+\.\d{{4}}.*",
    r"\s*Best val loss: \d+\.\d{{4}} \(at step \d+\)",
    r"✓ Training pipeline finished successfully!",
]


def assert_in_order(printed: str, text: str) -> None:
    lines = iter(printed.splitlines())
    for pattern in (pattern.format(text=text) for pattern in PRINTED_IN_ORDER):
        assert any(re.fullmatch(pattern, line) for line in lines), f"missing or late: {pattern}"


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def summary_in(folder: Path) -> dict:
    return json.loads((only_run(folder) / "summary.json").read_text(encoding="utf-8"))


def rows_in(folder: Path) -> list[dict]:
    lines = (only_run(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------------------- the main job


@pytest.mark.slow
def test_without_a_network_the_sample_stands_in_and_everything_is_printed_and_left(tmp_path):
    done = run_main(tmp_path, PYTHONIOENCODING="ascii")  # a console that can't show a tick
    assert done.returncode == 0, done.stderr
    assert "corpus/sample-en.txt stands in for it" in done.stdout
    assert_in_order(done.stdout, r"sample-en\.txt")
    assert done.stdout.count("✓ Saved training loss plot") == 1
    run = only_run(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-quick", run.name)
    written = ["settings.json", "data.json", "tokenizer.json", "metrics.jsonl", "samples.md"]
    written += ["training_losses.png", "summary.json", "checkpoints", "best"]
    written += [".lock", ".lock-owner.json"]
    assert {file.name for file in run.iterdir()} == set(written)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert {file.name for file in checkpoint.iterdir()} == CHECKPOINT_FILES
    for best in (run / "best").iterdir():
        assert {file.name for file in best.iterdir()} == {"model.safetensors", "manifest.json"}
    assert (tmp_path / "training_losses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    summary = summary_in(tmp_path)
    assert summary["parameters"] == 6_540_800
    assert summary["uniform_loss"] - summary["final_val_loss"] >= 3.0
    assert f"(at step {summary['best_step']})" in done.stdout
    steps = [row["step"] for row in rows_in(tmp_path) if "train/loss" in row]
    assert steps == list(range(1, summary["steps"] + 1))


@pytest.mark.slow
def test_the_verdict_is_nine_batches_in_which_quick_mode_learns_three_nats(
    shared_data, workdir, capsys
):
    settings = f"DATA = {str(shared_data / 'the-verdict.txt')!r}\nSEED = 1\n"
    (workdir / "settings.py").write_text(settings, encoding="utf-8")
    assert main.main(["settings.py"]) == 0
    printed = capsys.readouterr()
    assert_in_order(printed.out, r"the-verdict\.txt")
    assert re.search(r"^Epoch 1: 100%\|.*\| 9/9$", printed.err, re.MULTILINE)
    summary = summary_in(workdir)
    assert summary["uniform_loss"] - summary["final_val_loss"] >= 3.0


@pytest.mark.usefixtures("no_pictures")
def test_a_run_on_chinese_text_writes_readable_samples_of_each_prompt(workdir, capsys):
    params = TINY | {"start_context": ["春江", "往事"], "sampling": "random"}
    text = (REPOSITORY / "corpus" / "sample-zh.txt").read_text(encoding="utf-8")[:800]
    sampling = {"max_new_tokens": 60, "temperature": 1.0}
    (workdir / "val.txt").write_text(text[:200], encoding="utf-8")
    data = {"path": "text.txt", "val": "val.txt"}
    given = CHAR | {"RUN_NAME": "春江 one", "DATA": data, "sampling_params": sampling}
    write_settings(workdir, text, custom_params=params, **given)
    assert main.main(["settings.py"]) == 0
    run = only_run(workdir)
    assert run.name == "春江 one"
    moments = ("Before training", "After epoch 1", "Greedy", "Top-k (50)", "Top-p (0.9)")
    printed = capsys.readouterr().out
    _, *sections = (run / "samples.md").read_text(encoding="utf-8").split("\n## ")
    for moment, section in zip(moments, sections, strict=True):
        for number, prompt in enumerate(params["start_context"], start=1):
            assert f"\n{moment}, prompt {number}: {prompt}" in printed
        assert re.fullmatch(
            rf"{re.escape(moment)}\n\nStep \d+, validation loss \d+\.\d{{3}}\n\n"
            "Prompt 1:\n\n    春江.*\n\nPrompt 2:\n\n    往事.*",
            section,
            re.DOTALL,
        )
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    assert settings["training"]["start_context"] == ["春江", "往事"]
    assert len(re.findall("[\u4e00-\u9fff，。]", sections[3])) > len("春江往事") + 10
    split = json.loads((run / "data.json").read_text(encoding="utf-8"))["split"]
    assert (split["train_tokens"], split["validation_tokens"]) == (800, 200)
    summary = summary_in(workdir)  # of crops at random places
    assert summary["final_val_loss"] < summary["initial_val_loss"]


@pytest.mark.usefixtures("no_pictures")
def test_the_last_samples_heed_every_limit_and_end_where_the_model_ends_its_text(
    workdir, capsys, monkeypatch
):
    drawn, real = [], train.generate

    def generate(model, ids, *, end_of_text_id, **options):
        rows = real(model, ids, end_of_text_id=end_of_text_id, **options)
        drawn.append(options | {"n_drawn": len(rows[0]) - len("river")})
        return [[*row[:5], *row[:3], end_of_text_id] for row in rows]

    monkeypatch.setattr(train, "generate", generate)
    params = TINY | {"max_steps": 20, "start_context": "river"}
    sampling = {"max_new_tokens": 8, "temperature": 1.5, "min_p": 0.1, "top_k": 3, "top_p": None}
    sampling |= {"repetition_penalty": 2.0, "repetition_window": 7}
    write_settings(workdir, "", custom_params=params, sampling_params=sampling, **CHAR)
    assert main.main(["settings.py"]) == 0
    samples = re.findall(r"^(Greedy|Top-. \(.+\)): (.*)$", capsys.readouterr().out, re.MULTILINE)
    labels = ("Greedy", "Top-k (3)", "Top-p (all)")
    assert samples == [(label, "riverriv") for label in labels]
    same = {name: value for name, value in sampling.items() if not name.startswith("top_")}
    limits = ({"temperature": 0.0}, {"top_k": 3}, {"top_p": None})
    for options, limit in zip(drawn[-3:], limits, strict=True):
        options.pop("generator")
        assert options == same | limit | {"n_drawn": 8}


@pytest.mark.usefixtures("no_pictures")
def test_without_matplotlib_and_tqdm_it_trains_and_says_what_is_missing(
    workdir, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    write_settings(workdir, "", **CHAR)
    assert main.main(["settings.py"]) == 0
    printed = capsys.readouterr()
    assert "matplotlib is not installed: no picture" in printed.out
    assert re.search(r"^Epoch 1: (\d+)/\1$", printed.err, re.MULTILINE)
    assert not (workdir / "training_losses.png").exists()


# ------------------------------------------------------------------------------ how it fails


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
def test_bad_input_ends_with_its_exit_code_and_help(workdir, capsys, settings, code, said):
    (workdir / "three.txt").write_text("a b c", encoding="utf-8")
    (workdir / "runs" / "taken").mkdir(parents=True)
    (workdir / "runs" / "taken" / "thesis.txt").write_bytes(b"years of work")
    write_settings(workdir, "", **settings)
    assert main.main(["settings.py"]) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) <= 4
    assert code == 3 or "Text loaded" not in printed.out  # which takes long
    assert [file.name for file in (workdir / "runs" / "taken").iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("n_words", [1, 9])
def test_a_text_shorter_than_a_window_or_a_batch_is_trained_on_and_said(workdir, capsys, n_words):
    params = TINY | {"batch_size": 64}
    write_settings(workdir, "rivers bell " * n_words, custom_params=params, **CHAR)
    assert main.main(["settings.py"]) == 0
    printed = capsys.readouterr().out
    assert "Note: batch_size is lowered from 64" in printed
    assert ("Note: max_length is lowered from 16" in printed) == (n_words == 1)
    assert summary_in(workdir)["steps"] == 1
    assert summary_in(workdir)["final_val_loss"] > 0


def test_a_syntax_error_in_config_run_shows_the_line(workdir, capsys, monkeypatch):
    (workdir / "config_run.py").write_text('DATA = "x"\nQUICK_MODE = Tru e\n', encoding="utf-8")
    monkeypatch.syspath_prepend(str(workdir))
    assert main.main([]) == 2
    message = capsys.readouterr().err
    assert "config_run.py line 2" in message
    assert "QUICK_MODE = Tru e" in message


def test_arguments_that_are_no_settings_file_are_refused_at_once(workdir, capsys):
    assert main.main(["--epochs", "3"]) == 2
    assert "edit config_run.py" in capsys.readouterr().err
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
    for name in ("nowhere.py", ".", "pipe"):
        assert main.main([name]) == 2
        assert f"there is no settings file {name}" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_a_traceback_is_shown_where_it_is_asked_for_or_nobody_expected_the_error(
    workdir, monkeypatch
):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(training.learner, "take_step", broken)
    write_settings(workdir, "", **CHAR)
    with pytest.raises(ZeroDivisionError):
        main.main(["settings.py"])
    monkeypatch.setenv("GPT_DEBUG", "1")
    write_settings(workdir, "", DATA="nowhere.txt")
    with pytest.raises(main.PipelineError):
        main.main(["settings.py"])


def spoil_losses(monkeypatch, is_spoilt) -> None:
    """Make the training loss NaN in the steps, counted from 1, for which is_spoilt says so."""
    real, count = training.learner.batch_loss, itertools.count(1)

    def batch_loss(model, *arguments):
        loss = real(model, *arguments)
        return loss * float("nan") if model.training and is_spoilt(next(count)) else loss

    monkeypatch.setattr(training.learner, "batch_loss", batch_loss)


@pytest.mark.usefixtures("no_pictures")
def test_a_diverging_run_ends_with_5_and_names_the_last_good_checkpoint(
    workdir, capsys, monkeypatch
):
    params = TINY | {"max_steps": 30, "save_every": 2}
    write_settings(workdir, "", TOKENIZER="char", custom_params=params)
    with monkeypatch.context() as patch:
        spoil_losses(patch, lambda step: step > 6)
        assert main.main(["settings.py"]) == 5
    error = capsys.readouterr().err
    assert "training diverged" in error
    assert "begin a run with a third of it" in error
    named = workdir / re.search(r"The last good one: (\S+)", error)[1]
    assert {file.name for file in named.iterdir()} == CHECKPOINT_FILES
    assert not (only_run(workdir) / "summary.json").exists()
    weights = safetensors.torch.load_file(named / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    assert main.main(["settings.py"]) == 0
    assert "Resuming" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_diverges_before_its_first_checkpoint_says_so(workdir, capsys, monkeypatch):
    write_settings(workdir, "", custom_params=TINY | {"max_steps": 30}, **CHAR)
    spoil_losses(monkeypatch, lambda step: True)
    assert main.main(["settings.py"]) == 5
    assert "No checkpoint was made yet." in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_one_step_that_is_not_finite_is_skipped_counted_and_said(workdir, capsys, monkeypatch):
    write_settings(workdir, "", TOKENIZER="char", custom_params=TINY | {"max_steps": 8})
    spoil_losses(monkeypatch, lambda step: step == 3)
    assert main.main(["settings.py"]) == 0
    printed = capsys.readouterr().out
    assert "Note: step 3: the loss is nan" in printed
    assert "the step is skipped (1 so far)" in printed
    assert "Steps skipped: 1 (a loss or gradient was not finite)" in printed
    summary = summary_in(workdir)
    assert (summary["steps"], summary["steps_skipped"]) == (8, 1)
    losses = [row["train/loss"] for row in rows_in(workdir) if "train/loss" in row]
    assert [loss is None for loss in losses] == [step == 3 for step in range(1, 9)]


@pytest.mark.usefixtures("no_pictures")
def test_bf16_or_fp32_is_chosen_by_the_hardware_and_printed(workdir, capsys, monkeypatch):
    for has_it, expected in ((True, "bf16 (this CPU has avx512_bf16)"), (False, "fp32 (")):
        found = {"avx512_bf16": has_it}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        params = TINY | {"max_steps": 1}
        write_settings(
            workdir, "", TOKENIZER="char", RUN_NAME=f"run-{has_it}", custom_params=params
        )
        assert main.main(["settings.py"]) == 0
        assert f"Precision: {expected}" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("error", "where", "calls"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 PB"), "take_step", 5),
        (MemoryError(), "mean_loss", 4),  # Python's own has no message
    ],
)
def test_memory_that_runs_out_is_said_with_what_to_change_and_the_checkpoint_is_kept(
    workdir, capsys, monkeypatch, error, where, calls
):
    params = TINY | {"max_steps": 8, "eval_freq": 4, "save_every": 2}
    write_settings(workdir, "", TOKENIZER="char", custom_params=params)
    real, count = getattr(training.learner, where), itertools.count(1)

    def run_out(*arguments, **options):
        if next(count) == calls:
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training.learner, where, run_out)
        assert main.main(["settings.py"]) == 6
    message = capsys.readouterr().err
    assert "out of memory" in message
    assert "Set a smaller batch_size and, for the same step, more gradient_accumulation" in message
    assert "Traceback" not in message
    newest = max((only_run(workdir) / "checkpoints").iterdir())
    assert newest.name == "step-00000004"  # with an evaluation on the same step, the save is first
    assert {file.name for file in newest.iterdir()} == CHECKPOINT_FILES
    assert main.main(["settings.py"]) == 0
    assert "4 of 8 steps are done" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("first", [RuntimeError, ConnectionResetError])
def test_a_second_lost_worker_does_not_spoil_the_report_on_the_first(
    workdir, capsys, monkeypatch, first
):
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
    write_settings(workdir, "", TOKENIZER="char")
    before = signal.signal(signal.SIGCHLD, lost)  # as torch does
    try:
        assert main.main(["settings.py"]) == 6
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert "a process that prepares batches was ended from outside" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_nobody_can_take_does_not_end_a_run(tmp_path):
    command = [sys.executable, str(REPOSITORY / "main.py"), write_settings(tmp_path, "", **CHAR)]
    with open("/dev/full", "w") as full:
        assert subprocess.call(command, cwd=tmp_path, stdout=full, stderr=full) == 0
    assert summary_in(tmp_path)


@pytest.mark.usefixtures("no_pictures")
def test_a_disk_without_room_is_told_before_training_each_time(workdir, capsys, monkeypatch):
    write_settings(workdir, "", RUN_NAME="one", **CHAR)
    usage = shutil.disk_usage(workdir)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for _ in range(2):
        assert main.main(["settings.py"]) == 6
        printed = capsys.readouterr()
        assert "keeping 2 checkpoints and a new one takes" in printed.err
        assert "Before training" not in printed.out


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_patience_ended_goes_on_with_more_patience(workdir, capsys):
    impatient = TINY | {"max_steps": 12, "eval_freq": 1, "learning_rate": 5.0, "patience": 1}

    def go_on(**changes) -> dict:
        write_settings(workdir, "", custom_params=impatient | changes, RUN_NAME="one", **CHAR)
        assert main.main(["settings.py"]) == 0
        return summary_in(workdir)

    before = go_on()
    assert before["steps"] < 12
    (loss,) = (
        row["eval/train_loss"]
        for row in rows_in(workdir)
        if row.get("val/loss") is not None and row["step"] == before["weights_of_step"]
    )
    assert before["final_train_loss"] == loss
    go_on(max_steps=15)
    assert "patience goes on with it" in capsys.readouterr().out
    assert go_on(patience=None)["steps"] == 12


# -------------------------------------------------------------------- in a process that lives on


@pytest.mark.usefixtures("no_pictures")
def test_what_a_run_had_in_memory_is_free_once_main_returns(workdir, monkeypatch):
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

    write_settings(workdir, "", TOKENIZER="char", custom_params=TINY | {"max_steps": 3})
    before = signal.getsignal(signal.SIGINT)
    for error, code in ((ResourceError, 6), (signal.SIGINT, 130), (None, 0)):
        monkeypatch.setattr(training.learner, "take_step", ending_by(error))
        assert main.main(["settings.py"]) == code
        gc.collect()
        assert models and not any(model() for model in models)
        assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupt_in_another_thread_than_the_main_one_ends_with_130_too(
    workdir, monkeypatch, capsys
):
    codes, steps, real = [], itertools.count(1), training.learner.take_step

    def take_step(*arguments, **options):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    params = TINY | {"max_steps": 5, "save_every": 1}
    write_settings(workdir, "", TOKENIZER="char", custom_params=params)
    monkeypatch.setattr(training.learner, "take_step", take_step)
    for _ in range(2):
        thread = threading.Thread(target=lambda: codes.append(main.main(["settings.py"])))
        thread.start()
        thread.join()
    assert codes == [130, 0]
    assert "2 of 5 steps are done" in capsys.readouterr().out
