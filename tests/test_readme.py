"""What the READMEs and docs/ say is so: commands run, settings are listed, files exist."""

import csv
import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from environment import read_given_settings
from generation import SamplingConfig
from model import MODEL_SETTINGS
from planning.plan import RunSettings, resolve_settings
from tests.conftest import REPOSITORY
from tests.launching import Program
from tests.programs import OFFLINE
from text.chat import form_of
from training_utils import TrainingConfig

READMES = ["README.md", "README.zh-CN.md"]
PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (REPOSITORY / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if not page.endswith(".zh-CN.md")]
# whose commands run as they stand, in this order: writing needs a finished run
TRIED = [
    "README.md",
    "docs/settings.md",
    "docs/use.md",
    "docs/insight.md",
    "docs/export.md",
    "docs/python.md",
    "docs/benchmarks.md",
]
SETTINGS = (RunSettings, TrainingConfig, SamplingConfig)
# those that take long, or until they are stopped
LONG = {"python -m pytest", "python -m scripts.serve", "python -m benchmarks.train --peers"}
LONG |= {f"python -m benchmarks.{name}" for name in ("train", "generate", "learn", "startup")}
LONG |= {f"python -m benchmarks.{name}" for name in ("data", "data --any", "saving", "scale")}
LONG |= {f"python -m benchmarks.{name}" for name in ("survival", "budget", "facts", "packing")}
LONG |= {f"python -m benchmarks.{name}" for name in ("recipe", "overhead")}
LONG |= {"python -m scripts.watch", "python -m scripts.selfcheck"}
LONG |= {f"python -m benchmarks.finetune --{part}" for part in ("memory", "peers", "gain docs")}

PRINTED_IN_ORDER = r"""
======================================================================
GPT Model Training Pipeline
======================================================================
Device: CPU
✓ Text loaded from sample-en\.txt
✓ Tokenizer initialized \(GPT-2\)
✓ Using small model configuration \(for testing\)
Model Configuration
\s*Vocab size: 50,257
\s*Context length: 128
\s*Embedding dim: 64
\s*Num heads: 4
\s*Num layers: 2
\s*Total params: 6,540,800
✓ Using quick training config \(1 epoch, for testing\)
✓ Data loaders ready
✓ Device consistency verified \(using cpu\)
TRAINING START
Before training: .+
Ep 1 \(End Epoch\): Train loss \d+\.\d{3}, Val loss \d+\.\d{3}
Greedy: .+
Top-k \(50\): .+
Top-p \(0\.9\): .+
✓ Saved training loss plot to training_losses\.png
TRAINING COMPLETE
Training Summary:
\s*Final train loss: \d+\.\d{4}
\s*Final val loss: \d+\.\d{4}.*
\s*Best val loss: \d+\.\d{4} \(at step \d+\)
✓ Training pipeline finished successfully!
"""


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def written(name: str) -> dict:
    """What a benchmark wrote."""
    return json.loads(read(f"benchmarks/results/{name}.json"))


def twin(page: str) -> str:
    """The Chinese page of an English one."""
    return page.removesuffix(".md") + ".zh-CN.md"


def with_twins(*pages: str) -> list[str]:
    return [name for page in pages for name in (page, twin(page))]


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The shell commands of a page, but installs and those listed as long."""
    lines = [line for block in fences(text, "bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if not part.startswith("pip install") and part not in LONG]


def check_first_run(printed: str, folder: Path) -> None:
    """Everything is printed and left, and quick mode has learnt three nats."""
    assert "corpus/sample-en.txt stands in for it" in printed
    lines = iter(printed.splitlines())
    for pattern in PRINTED_IN_ORDER.strip().splitlines():
        assert any(re.fullmatch(pattern, line) for line in lines), f"missing or late: {pattern}"
    assert printed.count("✓ Saved training loss plot") == 1
    (run,) = (folder / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-quick", run.name)
    written = "settings.json data.json tokenizer.json metrics.jsonl samples.md summary.json "
    written += "training_losses.png report.html checkpoints best .lock .lock-owner.json"
    # the text is measured where that takes little of the run's time
    assert {file.name for file in run.iterdir()} - {"insight.json"} == set(written.split())
    (checkpoint,) = (run / "checkpoints").iterdir()
    weights = {"model.safetensors", "manifest.json"}
    names = {file.name for file in checkpoint.iterdir()}
    assert names == weights | {"optimizer.safetensors", "state.json"}
    for best in (run / "best").iterdir():
        assert {file.name for file in best.iterdir()} == weights
    assert (folder / "training_losses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["parameters"] == 6_540_800
    assert summary["uniform_loss"] - summary["final_val_loss"] >= 3.0
    assert f"(at step {summary['best_step']})" in printed
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == [*range(1, summary["steps"] + 1)]


# a command in a process that has imported torch already
COMMAND = """
import runpy, sys
from pathlib import Path
import environment, storage.cache, text.corpora
storage.cache.CACHE, text.corpora.REPOSITORY = Path("cache").resolve(), Path.cwd()
sys.stdin, sys.argv = open(0), {arguments!r}  # a fork's old stdin is partly read
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_commands_run_as_written(tmp_path):  # those of the Chinese pages are the same
    copy = tmp_path / "repository"
    skipped = shutil.ignore_patterns(".git", "runs", "cache", "__pycache__", ".venv", "venv")
    shutil.copytree(REPOSITORY, copy, ignore=skipped)
    text = "\n".join(map(read, TRIED))
    for block in fences(text, "python"):
        named = re.match(r"# file: (\S+)\n", block)
        if named:
            assert not (copy / named[1]).exists(), named[1]
            (copy / named[1]).write_text(block, encoding="utf-8")
    first, *others = dict.fromkeys(commands(text))
    assert first == "python main.py"
    done = subprocess.run(
        [sys.executable, "main.py"],
        cwd=copy,
        # a console that can't show a tick
        env=os.environ | OFFLINE | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    check_first_run(done.stdout, copy)
    sample = copy / "corpus" / "sample-en.txt"  # a part of it is enough for the others
    sample.write_text(sample.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    for number, command in enumerate(others):
        program, *arguments = shlex.split(command)
        assert program in ("python", "torchrun"), command
        if program == "torchrun":
            arguments = ["-m", "torch.distributed.run", *arguments]
        process = Program(copy, number, COMMAND.format(arguments=arguments), env=OFFLINE)
        assert process.process.wait(600) == 0, f"{command}\n{process.err}"


@pytest.mark.parametrize("page", with_twins("docs/settings.md"))
def test_the_tables_list_every_setting_with_its_default_and_no_other_name(page):
    text, known = read(page), set(MODEL_SETTINGS)
    for field in itertools.chain(*map(dataclasses.fields, SETTINGS)):
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default
        shown = f'"{default}"' if isinstance(default, str) else repr(default)
        assert f"| `{field.name}` | `{shown}` |" in text
        known.add(field.name)
    # rows of three columns whose first is one name in code style
    assert set(re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", text, re.MULTILINE)) == known


@pytest.mark.parametrize("page", with_twins(*PAGES))
def test_every_file_that_is_named_exists(page):
    text, folder = read(page), (REPOSITORY / page).parent
    for target in re.findall(r"\]\(([^):]+)\)", text):
        path, _, heading = target.partition("#")
        linked = folder / path if path else REPOSITORY / page
        assert linked.exists(), target
        assert not heading or heading in anchors(linked.read_text(encoding="utf-8")), target
    named = re.findall(r"\b((?:\w+/)+\w+\.py)\b", text)
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def anchors(text: str) -> list[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("readme", READMES)
def test_a_readme_links_every_page_and_is_short(readme):
    text = read(readme)
    pages = [page if readme == READMES[0] else twin(page) for page in PAGES[1:]]
    assert [page for page in pages if f"]({page})" not in text] == []
    assert len(text.splitlines()) <= 180


@pytest.mark.parametrize("page", with_twins(*PAGES))
def test_what_a_page_installs_has_the_versions_that_the_tests_have(page):
    pins = map(read, ("requirements.txt", "requirements-dev.txt", ".ci/run"))
    pinned = set(re.findall(r"[\w-]+==[\w.]+", "\n".join(pins)))
    for line in re.findall(r"pip install ([^`\n&]+)", read(page)):
        words = shlex.split(re.sub(r"--?\w\S* \S+", "", line))  # without options and their values
        assert {word.partition("+")[0] for word in words} <= pinned, line


@pytest.mark.parametrize("page", with_twins("docs/benchmarks.md"))
def test_the_figures_are_those_that_the_benchmarks_wrote(page):
    train, startup, data = (written(f"{name}-cpu") for name in ("train", "startup", "data"))
    generation, scale = written("generate-cpu"), written("scale-cpu")
    saving, survival = written("saving-cpu"), written("survival-cpu")
    texts = written("any-text-cpu-amd-epyc-avx2")["rows"]
    second = "秒" if page.endswith(".zh-CN.md") else "s"
    shown = [
        f"{train['multiply_rates']['bf16'] / 1e9:,.0f} GFLOP/s",
        f" {startup['beyond_s']:.1f} ",
        f"{data['prepared_mb_per_s']:.1f} MB/s",
        f" {data['ratio']:.0%}",
        f" {data['peak_mb_above_torch']:.0f} MB",
        f" {data['found_again_s']:.2f} {second}",
        f" {max(row['factor'] for row in texts):.2f} ",
        *(f" {max(row[n] for row in texts):.0f} MB" for n in ("peak_mb", "peak_mb_training")),
        f"{statistics.median(generation['bytes_per_s']) / 1e9:.0f} GB/s",
        f" {' x '.join(map(str, [*scale['batch'], scale['max_length']]))} ",
        *(f" {row['efficiency']:.2f} " for row in scale["rows"]),
        f" {statistics.median(saving['save_s']):.1f} {second}",
        f" {saving['share_of_time']:.1%}",
        f" {statistics.median(saving['sigterm_s']):.1f} {second}",
        f" {survival['storm']['kills']:,} ",
        f" {survival['storm']['acknowledged']:,} ",
        f" {survival['power']['cuts']:,} ",
        f" {survival['training']['kills']} ",
    ]
    for row in train["rows"]:
        name = f"| {row['name']} | {row['parameters']:,} | {' x '.join(map(str, row['batch']))} "
        speed = f"| {row['tokens_per_second']:,.0f} | {row['share_of_bf16_rate']:.0%} "
        shown.append(f"{name}{speed}| {row['share_of_own_products']:.0%} |")
    rows = {(row["name"], row["batch"]): row for row in generation["rows"]}
    for name in dict.fromkeys(name for name, _ in rows):
        one, eight = rows[name, 1], rows[name, 8]
        alone = f"| {one['tokens_per_s']:.0f} | {one['times_transformers']:.1f} "
        shown.append(f"{alone}| {one['share_of_limit']:.0%} | {eight['tokens_per_s']:.0f} |")
    for seen in generation["from_fp32"].values():
        shown += [f"{seen['mean_difference_by_std']:.1%}", f"{seen['same_greedy_token']:.1%}"]
    assert [figure for figure in shown if figure not in read(page)] == []
    assert generation["fp32_tokens_are_transformers"] is True
    assert [(row["kind"], row["ranks"]) for row in scale["rows"]] == [("ddp", 2), ("fsdp", 2)]
    assert survival["storm"]["corrupt"] == survival["storm"]["lost"] == 0
    assert not any(survival[part]["failures"] for part in ("storm", "calls", "power", "training"))


@pytest.mark.parametrize("page", with_twins("README.md", "docs/benchmarks.md"))
def test_the_peers_rows_are_those_that_the_benchmark_wrote(page):
    text, memory = read(page), written("peers-memory-cpu")
    for row in written("peers-cpu")["rows"]:
        assert row["void"] is None, row["name"]
        ratio = f" {row['ratio']['median']:.2f} " if "ratio" in row else "  "
        assert f"| {row['tokens_per_second']['median']:,.0f} |{ratio}|" in text
    for name in ("ours_peak_bytes", "transformers_bf16_peak_bytes"):
        assert page in READMES or f" {memory[name] / 1e9:.1f} GB" in text


@pytest.mark.parametrize("recipes", with_twins("docs/recipes.md"))
def test_the_recipes_are_settings_and_their_figures_those_of_the_benchmark(recipes, tmp_path):
    text = read(recipes)
    (block,) = fences(text, "python")
    (tmp_path / "recipe.py").write_text(block, encoding="utf-8")
    assert resolve_settings(*read_given_settings(tmp_path / "recipe.py")).mode == "custom"
    for name in ("shakespeare", "shakespeare-30s", "ci"):
        for side in written(f"learn-{name}-cpu")["row"]["sides"]:
            assert f"{side['median_loss']:.3f}" in text


@pytest.mark.parametrize("page", with_twins("docs/assistant.md"))
def test_the_assistants_table_is_one_of_chat_rows_and_its_settings_resolve(page, tmp_path):
    text = read(page)
    (table,) = (block for block in fences(text, "") if block.startswith("question,answer"))
    rows = list(csv.DictReader(table.splitlines()))
    form = form_of(rows[0])
    roles = [[message.role for message in form.messages(row)] for row in rows]
    assert roles == [["user", "assistant"]] * 6
    for row in re.findall(r"^\| (`\w+`.*?) \|", text, re.MULTILINE):
        assert form_of(re.findall(r"`(\w+)`", row)) is not None, row
    (block,) = fences(text, "python")
    (tmp_path / "assistant.py").write_text(block, encoding="utf-8")
    plan = resolve_settings(*read_given_settings(tmp_path / "assistant.py"))
    assert (plan.mode, plan.run.INIT_FROM, plan.run.MINUTES) == ("auto", "smollm2-135m", 10)


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_commands_code_and_output(page):
    english, chinese = read(page), read(twin(page))
    assert fences(english, "bash") == fences(chinese, "bash")
    assert fences(english, "python") == fences(chinese, "python")
    beginnings = r"^(?:\*\*(?=\w)|\| |- |\d+\. |<{7}|={7}|>{7})"  # with what a merge may leave
    for pattern in (r"^#+ ", beginnings, r"^```\nDevice: [^`]*^```$"):
        found, other = (re.findall(pattern, text, re.MULTILINE) for text in (english, chinese))
        assert found == other
    assert page != "README.md" or found
    # no blank after Chinese punctuation
    assert re.findall(r".{0,8}[，。；：！？、] [^|]", chinese) == []
