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
import time
import weakref
from pathlib import Path

import pytest
import safetensors.torch

import main
import train
import training.learner
from engine.errors import ResourceError
from tests.conftest import REPOSITORY

# a proxy on a closed port is the quickest way to be without a network
OFFLINE = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}

CHECKPOINT_FILES = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
SLOW = pytest.mark.slow  # where one case stands for the others in the default suite

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


def run_main(folder, *arguments, code=None, **environment):
    """Run main.py in a process of its own, without a network; or other code that calls it."""
    program = [str(REPOSITORY / "main.py")] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env=os.environ | OFFLINE | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
    )


def write_settings(folder: Path, text: str, tokens: int = 300, **settings) -> str:
    """A tiny custom run on a text of so many words, and settings of the caller's own."""
    (folder / "text.txt").write_text(text or "river bell " * (tokens // 2), encoding="utf-8")
    values = {"DATA": "text.txt", "CUSTOM_MODE": True, "custom_params": TINY} | settings
    lines = [f"{name} = {value!r}\n" for name, value in values.items()]
    (folder / "settings.py").write_text("".join(lines), encoding="utf-8")
    return "settings.py"


TINY = {
    "num_epochs": 1,
    "batch_size": 2,
    "max_length": 16,
    "eval_freq": 5,
    "eval_iter": 1,
    "model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1},
}


def assert_in_order(printed: str, patterns: list[str]) -> None:
    lines = iter(printed.splitlines())
    for pattern in patterns:
        assert any(re.fullmatch(pattern, line) for line in lines), f"missing or late: {pattern}"


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


# ---------------------------------------------------------------------------- the main job


@pytest.mark.slow
def test_without_a_network_the_sample_stands_in_and_everything_is_printed_and_left(tmp_path):
    times = [time.monotonic()]
    done = run_main(tmp_path)
    times.append(time.monotonic())
    assert done.returncode == 0, done.stderr
    # seconds, of which a slow or busy machine takes more for its imports too
    imports = "import torch, torch._dynamo, matplotlib.figure, tiktoken"
    subprocess.run([sys.executable, "-c", imports], check=True)
    times.append(time.monotonic())
    assert times[1] - times[0] < 5 * (times[2] - times[1])
    assert "corpus/sample-en.txt stands in for it" in done.stdout
    patterns = [p.format(text=r"sample-en\.txt") for p in PRINTED_IN_ORDER]
    assert_in_order(done.stdout, patterns)
    assert done.stdout.count("✓ Saved training loss plot") == 1
    run = only_run(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-quick", run.name)
    left = {file.name for file in run.iterdir()}
    assert left == {
        "settings.json",
        "data.json",
        "tokenizer.json",
        "metrics.jsonl",
        "training_losses.png",
        "samples.md",
        "summary.json",
        "checkpoints",
        "best",
        ".lock",
        ".lock-owner.json",
    }
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert {file.name for file in checkpoint.iterdir()} == CHECKPOINT_FILES
    for best in (run / "best").iterdir():
        assert {file.name for file in best.iterdir()} == {"model.safetensors", "manifest.json"}
    assert (tmp_path / "training_losses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["parameters"] == 6_540_800
    assert summary["uniform_loss"] - summary["final_val_loss"] >= 3.0
    assert f"(at step {summary['best_step']})" in done.stdout
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(row)["step"] for row in rows if "train/loss" in json.loads(row)]
    assert steps == list(range(1, summary["steps"] + 1))


@pytest.mark.slow
def test_the_verdict_is_nine_batches(shared_data, tmp_path):
    (tmp_path / "settings.py").write_text(f"DATA = {str(shared_data / 'the-verdict.txt')!r}\n")
    done = run_main(tmp_path, "settings.py")
    assert done.returncode == 0, done.stderr
    assert_in_order(done.stdout, [p.format(text=r"the-verdict\.txt") for p in PRINTED_IN_ORDER])
    assert re.search(r"^Epoch 1: 100%\|.*\| 9/9$", done.stderr, re.MULTILINE)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
@pytest.mark.parametrize("text", ["the-verdict.txt", "sample-en"])
@pytest.mark.parametrize("seed", [1, 2, 123])
def test_quick_mode_learns_three_nats_in_its_epoch(shared_data, workdir, text, seed):
    data = str(shared_data / text) if text.endswith(".txt") else text
    settings = f"DATA = {data!r}\nSEED = {seed}\n"
    (workdir / "settings.py").write_text(settings, encoding="utf-8")
    assert main.main(["settings.py"]) == 0
    summary = json.loads((only_run(workdir) / "summary.json").read_text(encoding="utf-8"))
    assert summary["uniform_loss"] - summary["final_val_loss"] >= 3.0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
def test_a_run_on_chinese_text_writes_readable_samples_of_each_prompt(workdir, capsys):
    params = TINY | {"start_context": ["春江", "往事"]}
    text = (REPOSITORY / "corpus" / "sample-zh.txt").read_text(encoding="utf-8")[:800]
    write_settings(workdir, text, custom_params=params, RUN_NAME="春江 one")
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


SAMPLE_LINES = re.compile(r"^(Greedy|Top-k \(.+\)|Top-p \(.+\)): river(.*)$", re.MULTILINE)


def last_samples(workdir: Path, capsys, **sampling) -> dict[str, str]:
    """What a character model writes behind "river" when it is trained, by label."""
    shutil.rmtree(workdir / "runs", ignore_errors=True)
    write_settings(
        workdir,
        "",
        TOKENIZER="char",
        PRECISION="fp32",
        custom_params=TINY | {"max_steps": 20, "start_context": "river"},
        sampling_params={"max_new_tokens": 8} | sampling,
    )
    assert main.main(["settings.py"]) == 0
    found = dict(SAMPLE_LINES.findall(capsys.readouterr().out))
    assert len(found) == 3
    return found


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
def test_without_a_limit_the_samples_say_that_they_draw_from_all_tokens(workdir, capsys):
    found = last_samples(workdir, capsys, top_k=None, top_p=None)
    assert list(found) == ["Greedy", "Top-k (all)", "Top-p (all)"]
    limited = last_samples(workdir, capsys, top_k=1, top_p=0.0)
    assert list(limited) == ["Greedy", "Top-k (1)", "Top-p (0.0)"]
    assert len(set(limited.values())) == 1  # the likeliest token, three times over
    assert found["Greedy"] == limited["Greedy"] != found["Top-k (all)"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
def test_each_of_the_last_samples_heeds_min_p_and_the_repetition_penalty(workdir, capsys):
    free = last_samples(workdir, capsys, temperature=1.0)
    sure = last_samples(workdir, capsys, temperature=1.0, min_p=1.0)
    assert len(set(sure.values())) == 1  # min_p 1 leaves the likeliest token alone
    assert set(sure.values()) == {free["Greedy"]}
    assert set(free.values()) != set(sure.values())
    varied = last_samples(workdir, capsys, temperature=0.0, repetition_penalty=100.0)
    assert all(text != sure["Greedy"] for text in varied.values())
    short = last_samples(
        workdir, capsys, temperature=0.0, repetition_penalty=100.0, repetition_window=1
    )
    assert all(text != varied["Greedy"] for text in short.values())


@pytest.mark.usefixtures("no_pictures")
def test_a_sample_ends_where_the_model_ends_its_text(workdir, capsys, monkeypatch):
    drawn = last_samples(workdir, capsys)["Greedy"]

    def generate(model, ids, *, end_of_text_id, **options):
        rows = real(model, ids, end_of_text_id=end_of_text_id, **options)
        return [[*row[: len("river") + 3], end_of_text_id] for row in rows]

    real = train.generate
    monkeypatch.setattr(train, "generate", generate)
    assert last_samples(workdir, capsys)["Greedy"] == drawn[:3].rstrip()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_cannot_show_a_tick_crashes_nothing(tmp_path, encoding):
    settings = write_settings(tmp_path, "")
    done = run_main(tmp_path, settings, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "✓ Training pipeline finished successfully!" in done.stdout


@pytest.mark.slow
def test_without_matplotlib_and_tqdm_it_trains_and_says_what_is_missing(tmp_path):
    settings = write_settings(tmp_path, "")
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = sys.modules['tqdm'] = None\n"
        f"import main\nsys.exit(main.main([{settings!r}]))"
    )
    done = run_main(tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    assert "matplotlib is not installed: no picture" in done.stdout
    assert re.search(r"^Epoch 1: (\d+)/\1$", done.stderr, re.MULTILINE)
    assert not (tmp_path / "training_losses.png").exists()


# ------------------------------------------------------------------------------ how it fails


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"DATA": "nowhere.txt"}, 3, "there is no file nowhere.txt"),
        ({"DATA": "the-verdikt"}, 3, 'did you mean "the-verdict"'),
        ({"DATA": "empty.txt"}, 3, "empty.txt is empty"),
        ({"DATA": "folder"}, 3, "folder holds no text: there is no file in it"),
        ({"DATA": "latin1.txt"}, 3, "byte 3, in line 1, is 0xe9"),
        ({"DATA": "three.txt"}, 3, "at least 4 are needed"),
        ({"DATA": ""}, 2, "DATA is empty"),
        ({"DEVICE": "cuda:99"}, 6, "this machine has no such device"),
        (
            {"DEVICE": "gpu"},
            2,
            'DEVICE is \'gpu\'; it must be "cpu", "cuda", "cuda:1", "mps" or "xpu", or None',
        ),
        ({"custom_params": {"lerning_rate": 1e-3}}, 2, 'did you mean "learning_rate"?'),
        ({"custom_params": {"stride": 0}}, 2, "it must be a whole number at least 1 and at most"),
        ({"custom_params": {"start_context": ""}}, 2, 'custom_params["start_context"] is empty'),
        ({"custom_params": {"start_context": ["a", ""]}}, 2, "has an empty text in place 2"),
        ({"SEED": "x", "LOG_EVERY": -1}, 2, "2 problems in settings.py"),
        ({"RUN_NAME": "../elsewhere"}, 2, "it must be a folder's plain name"),
        ({"RUN_NAME": "taken"}, 4, "is already there"),
        ({"OUTPUT_DIR": "text.txt"}, 6, "is a file"),
        ({"MODEL": "gpt2-125m"}, 2, 'did you mean "gpt2-124m"?'),
    ],
)
def test_bad_input_ends_with_its_exit_code_and_help(workdir, capsys, settings, code, said):
    (workdir / "empty.txt").write_bytes(b"")
    (workdir / "folder").mkdir()
    (workdir / "latin1.txt").write_bytes("café".encode("latin-1"))
    (workdir / "three.txt").write_text("a b c", encoding="utf-8")
    (workdir / "runs" / "taken").mkdir(parents=True)
    (workdir / "runs" / "taken" / "thesis.txt").write_bytes(b"years of work")
    write_settings(workdir, "", **settings)
    assert main.main(["settings.py"]) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) <= 4
    assert [file.name for file in (workdir / "runs" / "taken").iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("n_words", [4, *(pytest.param(n, marks=SLOW) for n in (6, 12, 40))])
def test_a_text_shorter_than_a_window_is_trained_on_and_said(workdir, capsys, n_words):
    write_settings(workdir, "river " * n_words, custom_params=TINY | {"batch_size": 64})
    assert main.main(["settings.py"]) == 0
    printed = capsys.readouterr().out
    assert "Note: batch_size is lowered from 64" in printed
    assert ("Note: max_length is lowered from 16" in printed) == (n_words < 16)
    summary = json.loads((only_run(workdir) / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 1
    assert summary["final_val_loss"] > 0


def test_a_syntax_error_in_config_run_shows_the_line(workdir, capsys, monkeypatch):
    (workdir / "config_run.py").write_text('DATA = "x"\nQUICK_MODE = Tru e\n', encoding="utf-8")
    monkeypatch.syspath_prepend(str(workdir))
    assert main.main([]) == 2
    message = capsys.readouterr().err
    assert "config_run.py line 2" in message
    assert "QUICK_MODE = Tru e" in message


def test_several_mistakes_are_one_message_with_a_line_each(workdir, capsys):
    write_settings(
        workdir,
        "",
        SEED=1.5,
        custom_params={"batchsize": 4, "learning_rate": "fast", "train_ratio": 1.0},
        sampling_params={"topk": 3},
    )
    assert main.main(["settings.py"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].endswith("5 problems in settings.py:")
    for line, said in zip(
        lines[1:],
        [
            "SEED is 1.5 (float); it must be a whole number",
            'custom_params["batchsize"] is unknown; did you mean "batch_size"?',
            "custom_params[\"learning_rate\"] is 'fast' (str); it must be a number",
            'custom_params["train_ratio"] is 1.0; it must be a number above 0 and below 1',
            'sampling_params["topk"] is unknown; did you mean "top_k"?',
        ],
        strict=True,
    ):
        assert said in line


def test_an_option_is_refused_with_what_to_do_instead(capsys):
    assert main.main(["--epochs", "3"]) == 2
    assert "edit config_run.py" in capsys.readouterr().err


def test_a_traceback_is_shown_where_it_is_asked_for(workdir, monkeypatch):
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


def test_a_run_that_diverges_before_its_first_checkpoint_says_so(workdir, capsys, monkeypatch):
    params = TINY | {"max_steps": 30}
    write_settings(workdir, "", TOKENIZER="char", custom_params=params)
    spoil_losses(monkeypatch, lambda step: True)
    assert main.main(["settings.py"]) == 5
    assert "No checkpoint was made yet." in capsys.readouterr().err


def test_one_step_that_is_not_finite_is_skipped_counted_and_said(workdir, capsys, monkeypatch):
    write_settings(workdir, "", TOKENIZER="char", custom_params=TINY | {"max_steps": 8})
    spoil_losses(monkeypatch, lambda step: step == 3)
    assert main.main(["settings.py"]) == 0
    printed = capsys.readouterr().out
    assert "Note: step 3: the loss is nan" in printed
    assert "the step is skipped (1 so far)" in printed
    assert "Steps skipped: 1 (a loss or gradient was not finite)" in printed
    summary = json.loads((only_run(workdir) / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["steps_skipped"]) == (8, 1)
    rows = (only_run(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row]
    assert [loss is None for loss in losses] == [step == 3 for step in range(1, 9)]


def test_an_unexpected_failure_keeps_its_traceback(workdir, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(training.learner, "take_step", broken)
    write_settings(workdir, "")
    with pytest.raises(ZeroDivisionError):
        main.main(["settings.py"])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_in_training_ends_with_130_and_no_traceback(tmp_path):
    settings = write_settings(tmp_path, "", custom_params=TINY | {"max_steps": 100_000})
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "main.py"), settings],
        cwd=tmp_path,
        env=os.environ | OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    for line in process.stdout:
        if line.startswith("After epoch 1"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Stopped" in errors
    assert "Traceback" not in errors
    assert (only_run(tmp_path) / "training_losses.png").exists()


@pytest.mark.usefixtures("no_pictures")
def test_bf16_or_fp32_is_chosen_by_the_hardware_and_printed(workdir, capsys, monkeypatch):
    import torch

    for capability, expected in ((True, "bf16 (this CPU has avx512_bf16)"), (False, "fp32 (")):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda found=capability: {"avx512_bf16": found}
        )
        write_settings(workdir, "", RUN_NAME=f"run-{capability}")
        assert main.main(["settings.py"]) == 0
        assert f"Precision: {expected}" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 PB"),
        MemoryError(),  # Python's own has no message
    ],
)
@pytest.mark.parametrize(("where", "calls"), [("take_step", 5), ("mean_loss", 4)])
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


def test_a_picture_that_cannot_be_written_beside_the_run_is_a_note(workdir, capsys):
    (workdir / "training_losses.png").mkdir()
    write_settings(workdir, "")
    assert main.main(["settings.py"]) == 0
    assert "Note: can't write training_losses.png" in capsys.readouterr().out
    assert (only_run(workdir) / "training_losses.png").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_nobody_can_take_does_not_end_a_run(tmp_path, stream):
    settings = write_settings(tmp_path, "")
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: full}
        code = subprocess.call(
            [sys.executable, str(REPOSITORY / "main.py"), settings], cwd=tmp_path, **streams
        )
    assert code == 0
    assert (only_run(tmp_path) / "summary.json").exists()


@pytest.mark.parametrize("name", ["nowhere.py", ".", "pipe"])
def test_a_settings_file_that_is_none_is_refused_at_once(workdir, capsys, name):
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
    assert main.main([name]) == 2
    assert f"there is no settings file {name}" in capsys.readouterr().err


def test_a_named_folder_that_is_taken_is_told_before_the_text_is_read(workdir, capsys):
    (workdir / "runs" / "taken" / "mine").mkdir(parents=True)
    write_settings(workdir, "", RUN_NAME="taken")
    assert main.main(["settings.py"]) == 4
    assert "Text loaded" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "tokenizer", ["char", *(pytest.param(name, marks=SLOW) for name in ("auto", "bpe:600"))]
)
def test_chinese_poems_train_and_are_continued_in_chinese(shared_data, workdir, capsys, tokenizer):
    params = TINY | {"max_steps": 12, "start_context": "春江", "max_length": 32}
    write_settings(
        workdir,
        "",
        DATA=str(shared_data / "ci.jsonl"),
        TOKENIZER=tokenizer,
        custom_params=params,
        sampling_params={"max_new_tokens": 60},
    )
    assert main.main(["settings.py"]) == 0
    sample = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Top-k"))
    assert len(re.findall("[\u4e00-\u9fff，。]", sample)) >= 10
    data = json.loads((only_run(workdir) / "data.json").read_text(encoding="utf-8"))
    assert data["documents"] == 6000
    assert data["duplicate_documents"] == 6


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
def test_a_validation_text_of_its_own_is_used(shared_data, workdir):
    folder = shared_data / "wikitext-2"
    data = {"path": str(folder / "valid.txt"), "val": str(folder / "test.txt")}
    params = TINY | {"max_steps": 3, "max_length": 128, "batch_size": 128}
    write_settings(workdir, "", DATA=data, TOKENIZER="char", custom_params=params)
    assert main.main(["settings.py"]) == 0
    split = json.loads((only_run(workdir) / "data.json").read_text(encoding="utf-8"))["split"]
    sizes = [len((folder / name).read_text(encoding="utf-8")) for name in ("valid.txt", "test.txt")]
    # characters that only the validation text has take several tokens
    assert split["train_tokens"] == sizes[0]
    assert sizes[1] <= split["validation_tokens"] < sizes[1] * 1.01


@pytest.mark.usefixtures("no_pictures")
def test_random_crops_train(workdir):
    write_settings(workdir, "", custom_params=TINY | {"sampling": "random"})
    assert main.main(["settings.py"]) == 0
    summary = json.loads((only_run(workdir) / "summary.json").read_text(encoding="utf-8"))
    assert summary["final_val_loss"] < summary["initial_val_loss"]


def test_a_disk_without_room_is_told_before_training_each_time(workdir, capsys, monkeypatch):
    write_settings(workdir, "", RUN_NAME="one")
    usage = shutil.disk_usage(workdir)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for _ in range(2):
        assert main.main(["settings.py"]) == 6
        printed = capsys.readouterr()
        assert "keeping 2 checkpoints and a new one takes" in printed.err
        assert "Before training" not in printed.out


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
def test_a_run_that_patience_ended_goes_on_with_more_patience(workdir, capsys):
    impatient = TINY | {"max_steps": 40, "eval_freq": 1, "learning_rate": 5.0, "patience": 1}
    write_settings(workdir, "", RUN_NAME="one", custom_params=impatient)
    assert main.main(["settings.py"]) == 0
    before = json.loads((workdir / "runs" / "one" / "summary.json").read_text(encoding="utf-8"))
    assert before["steps"] < 40
    losses = [
        row
        for row in map(
            json.loads,
            (workdir / "runs" / "one" / "metrics.jsonl").read_text(encoding="utf-8").splitlines(),
        )
        if row.get("val/loss") is not None and row["step"] == before["weights_of_step"]
    ]
    assert before["final_train_loss"] == losses[0]["eval/train_loss"]
    write_settings(workdir, "", RUN_NAME="one", custom_params=impatient | {"max_steps": 60})
    assert main.main(["settings.py"]) == 0
    assert "patience goes on with it" in capsys.readouterr().out
    write_settings(workdir, "", RUN_NAME="one", custom_params=impatient | {"patience": None})
    assert main.main(["settings.py"]) == 0
    after = json.loads((workdir / "runs" / "one" / "summary.json").read_text(encoding="utf-8"))
    assert after["steps"] == 40


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
