"""What users of comparable programs have reported: each fault tried, and the right behaviour."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import main
from data import plan_windows
from engine.errors import DataError, SettingsError
from planning.plan import resolve_settings
from planning.prompt import _beginning_if_not_latin
from planning.settings_file import read_given_settings
from tests.letters import tiny_loaders
from tests.programs import write_settings
from tests.reading import documents, json_lines, read, save
from tests.texts import CHINESE
from text.documents import DataSpec
from text.split import split_documents
from text.token_cache import tokenize
from text.tokenizer import GPT2Tokenizer
from text.tokenizer_file import END_OF_TEXT
from training import journal, learner
from training.learner import steps_between


def corpora() -> list[tuple[np.ndarray, np.ndarray]]:
    """40 corpora of 20 to 500 documents, their lengths from equal to Pareto with a heavy tail."""
    random, made = np.random.default_rng(5), []
    for number in range(40):
        count = int(random.integers(20, 501))
        # at 0 all are equal; 1.05 is heavier than any real collection
        tail = np.linspace(8, 1.05, 40)[number]
        sizes = np.full(count, 100) if number == 0 else 10 + 90 * random.pareto(tail, count)
        made.append((random.integers(0, 2**64, count, dtype=np.uint64), sizes.astype(np.int64)))
    return made


@pytest.mark.parametrize("train_ratio", [0.5, 0.8, 0.9, 0.95])
def test_the_share_that_validates_is_the_one_asked_for_whatever_the_lengths(train_ratio):
    for digests, sizes in corpora():
        split = split_documents(digests, sizes, train_ratio)
        validates = sizes[split.is_val].sum() + split.n_cut
        assert abs(validates / sizes.sum() - (1 - train_ratio)) < 0.02
        if sizes.max() < 0.5 * (1 - train_ratio) * sizes.sum():
            assert split.cut is None  # whole documents can make it


def write_rows(path: Path, texts: list[str]) -> Path:
    rows = (json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text("".join(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("novel", [0, 12, 24])
def test_notes_and_a_novel_train_and_validate_on_both_and_the_cut_is_told(tmp_path, novel):
    texts = [f"Note {i}: the lamp is in the {i * 7 % 12}th drawer." * 3 for i in range(24)]
    texts.insert(novel, "".join(f"Chapter {i}. The ship went on and on. " for i in range(1000)))
    data = DataSpec((str(write_rows(tmp_path / "a.jsonl", texts)),))
    text = tokenize(data, "char", 0.9, tmp_path / "cache")
    tokens = np.fromfile(text.path, dtype=text.dtype)
    train, val = (
        text.tokenizer.decode(ids).split(END_OF_TEXT)
        for ids in (tokens[: text.n_train], tokens[text.n_train :])
    )
    assert abs(1 - text.n_train / text.n_tokens - 0.1) < 0.02
    [head], [tail] = ([t for t in side if t not in texts] for side in (train, val))
    assert head + tail == texts[novel]
    whole = [t for t in train + val if t in texts]
    assert sorted(whole) == sorted(t for t in texts if t != texts[novel])
    assert len(train) > 10 and len(val) > 2
    [(note, _)] = text.report["notes"]
    assert note.startswith(f"the longest document is cut: its last {len(tail):,} of ")
    assert text.report["documents_on_both_sides"] == 1


def test_twenty_equal_rows_are_divided_as_asked(tmp_path):
    data = DataSpec((str(write_rows(tmp_path / "a.jsonl", [f"row {i:02}" for i in range(20)])),))
    text = tokenize(data, "char", 0.9, tmp_path / "cache")
    assert (text.n_train, text.n_tokens, text.report["notes"]) == (18 * 7 - 1, 20 * 7 - 2, [])


@pytest.mark.slow
def test_finite_divergence_is_no_success_and_the_best_weights_are_used(
    workdir, no_pictures, capsys
):
    wild = {"learning_rate": 10, "warmup_steps": 0, "max_grad_norm": 0, "eval_freq": 1}
    write_settings(workdir, RUN_NAME="one", max_steps=3, schedule="constant", **wild)
    assert main.main(["settings.py"]) == 5
    said = "".join(capsys.readouterr())
    assert "finished successfully" not in said and "Traceback" not in said
    summary = json.loads((workdir / "runs/one/summary.json").read_bytes())
    best = summary["best_step"]
    assert summary["weights_of_step"] == best
    assert f"the best weights, of step {best}, are used" in said
    assert "NumericsError: training diverged: the training loss rose from " in said
    assert "begin a run with a third of it" in said


@pytest.mark.parametrize(
    ("first", "last", "diverged"),
    [
        (5.8, 945.0, True),
        (5.8, 5.85, False),
        (5.8, 6.0, False),
        (5.8, 6.2, True),
        (0.2, 0.25, False),
    ],
)
def test_a_rise_within_noise_is_no_divergence(first, last, diverged):
    assert journal.History(train_losses=[first, 1.0, last]).has_diverged == diverged


def test_settings_at_the_wrong_level_are_named_with_their_place(tmp_path):
    file = tmp_path / "s.py"
    misplaced = ("num_epochs = 1", "lr = 0.1", "emb_dim = 16", "temperature = 0.0", "dropout = 0.1")
    file.write_text("\n".join(["DATA = 'x.txt'", "words = 7", *misplaced]), encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        resolve_settings(*read_given_settings(file))
    said = str(caught.value).splitlines()
    places = ["custom_params"] * 3 + ["sampling_params", "custom_params"]
    for line, given, place in zip(said[1:], misplaced, places, strict=True):
        name, value = given.split(" = ")
        assert line.strip().startswith(
            f'{name} belongs into {place}: {place} = {{"{name}": {value}'
        )
    # what is in the dict, too, is a helper of the file; another value is not
    file.write_text("batch_size = 4\ncustom_params = {'batch_size': batch_size}", encoding="utf-8")
    assert "batch_size" not in read_given_settings(file)[0]
    file.write_text("batch_size = 4\ncustom_params = {'batch_size': 8}", encoding="utf-8")
    assert read_given_settings(file)[0]["batch_size"] == 4


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        (r'DATA = "C:\Users\me"', 'Write a path as "C:/Users" or r"C:\\Users".'),
        ("QUICK_MODE = true", "Write True in place of true."),
        ("RUN_NAME = null", "Write None in place of null."),
        ("DATA = “my.txt”", 'Write " in place of “'),
        ("DATA ＝ 'x'", "Write = in place of ＝"),
        ("custom_params = {'batch_size'：8}", "Write : in place of ："),
        ("custom_params = {'batch_size': 8，}", "Write , in place of ，"),
        ("DATA =\u200b 'x'", "Remove the sign U+200B"),
        ("DATA = '中文.txt'", "Save GBK.py as UTF-8"),
    ],
)
def test_the_faults_of_beginners_get_one_line_of_remedy(tmp_path, monkeypatch, line, remedy):
    monkeypatch.chdir(tmp_path)
    file = Path("GBK.py" if "GBK" in remedy else "s.py")
    file.write_bytes(line.encode("gbk" if "GBK" in remedy else "utf-8"))
    with pytest.raises(SettingsError) as caught:
        read_given_settings(file)
    assert f"{file} line 1 " in str(caught.value) and remedy in str(caught.value)


def test_unknown_tokens_are_told_and_refused_above_half(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "lamp": 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "words.json").write_text(made.to_str(), encoding="utf-8")

    def report_of(words: str):
        (tmp_path / "a.txt").write_text(words, encoding="utf-8")
        data = DataSpec((str(tmp_path / "a.txt"),))
        return tokenize(data, str(tmp_path / "words.json"), 0.9, tmp_path / "cache").report

    assert report_of("lamp " * 20) | {"notes": [], "unknown_tokens": 0} == report_of("lamp " * 20)
    report = report_of("lamp lamp lamp 渡口 " * 5)
    assert report["unknown_tokens"] == 5
    [(note, _)] = report["notes"]
    assert note.startswith("25.0% of the tokens stand for what the tokenizer (")
    with pytest.raises(DataError, match=r"^75\.0% of .* does not know; at most half may"):
        report_of("lamp river quiet 渡口 " * 5)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (CHINESE, CHINESE.split("，")[0].split("\n")[0][:16]),
        (
            "\n\n渡口的老船工每天清早起来先看水色再看天色才把缆绳解开",
            "渡口的老船工每天清早起来先看水色",
        ),
        ("Ранним утром старик вышел к реке и долго смотрел на воду", "Ранним утром"),
        ("1 + 1 = 2\n2 + 2 = 4\n", "1 + 1 = 2"),
        ("河 river and more words in English than in Chinese", None),
        (" \n", None),
    ],
)
def test_the_default_prompt_is_the_texts_beginning_where_that_is_not_latin(text, prompt):
    assert _beginning_if_not_latin(text) == prompt


@pytest.mark.slow
def test_a_chinese_text_in_gpt2s_tokens_names_the_better_tokenizer_and_begins_with_its_own_words(
    workdir, no_pictures, capsys
):
    chinese = CHINESE[:1500]
    write_settings(workdir, chinese, RUN_NAME="one", max_steps=1)
    [(note, _)] = tokenize(DataSpec(("text.txt",)), "gpt2", 0.9, workdir / "cache").report["notes"]
    rate = len(GPT2Tokenizer().encode(chinese)) / len(chinese)
    assert f"needs {rate:.2f} tokens a character here" in note
    assert 'TOKENIZER = "char" needs 1.00' in note
    for _ in range(2):  # the prompt of the run stays its own
        assert main.main(["settings.py"]) == 0
        record = json.loads((workdir / "runs/one/settings.json").read_bytes())
        prompt = record["training"]["start_context"]
        assert chinese.lstrip().startswith(prompt)
    assert f"samples go on from {prompt!r}" in capsys.readouterr().out


def test_a_tokenizer_made_of_the_text_is_not_called_one_for_other_texts(workdir):
    pytest.importorskip("tokenizers")
    (workdir / "text.txt").write_text(CHINESE[:1500], encoding="utf-8")
    made = tokenize(DataSpec(("text.txt",)), "bpe:300", 0.9, workdir / "cache")
    assert made.report["tokens_per_character"] > 1.05 and made.report["notes"] == []


def test_numbers_that_are_hardly_meant_get_a_notice_each():
    def notices(**params) -> list[str]:
        given = {"CUSTOM_MODE": True, "custom_params": params}
        return resolve_settings(given, "config_run.py").notices

    assert notices() == notices(emb_dim=64, n_layers=8, learning_rate=0.1) == []
    shape, rate = notices(n_layers=48, emb_dim=64, learning_rate=5.0)
    assert shape.startswith("48 layers of width 64 are deep") and "n_layers to 2" in shape
    assert rate.startswith("learning_rate (5) is far above the usual")
    with pytest.raises(SettingsError, match=r"learning_rate.* is 50; it must be .* at most 10"):
        notices(learning_rate=50)


@pytest.mark.parametrize("count", [10, 19, 20, 21])
def test_a_table_of_some_twenty_rows_is_divided_by_documents_or_by_position(tmp_path, count):
    rows = "".join(f"{i},row {i:02}\n" for i in range(count))
    (tmp_path / "a.csv").write_text("id,text\n" + rows, encoding="utf-8")
    text = tokenize(DataSpec((str(tmp_path / "a.csv"),)), "char", 0.9, tmp_path / "cache")
    assert text.report["documents"] == count
    assert (text.n_train is None) == (count < 20)
    windows, _ = plan_windows(
        text.n_tokens, max_length=4, stride=4, batch_size=2, train_ratio=0.9, n_train=text.n_train
    )
    assert abs(windows.n_val / text.n_tokens - 0.1) < 0.03 and windows.n_windows > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "max_length", "said"),
    [
        ("random", 512, "max_length is lowered from 512 to 106"),
        ("windows", 71, "batch_size is low"),
    ],
)
def test_short_rows_train_whatever_the_context_and_the_batch(
    workdir, no_pictures, monkeypatch, capsys, sampling, max_length, said
):
    bars = []
    monkeypatch.setattr(learner, "count_off", lambda items, *bar: bars.append(bar) or items)
    write_rows(workdir / "rows.jsonl", [f"row {i % 10}" for i in range(18)])  # 107 tokens
    (workdir / "val.txt").write_text("row", encoding="utf-8")
    data = {"path": "rows.jsonl", "val": "val.txt"}
    step = {"batch_size": 8, "gradient_accumulation_steps": 4, "max_steps": 3}
    write_settings(workdir, None, DATA=data, sampling=sampling, max_length=max_length, **step)
    assert main.main(["settings.py"]) == 0
    printed = capsys.readouterr().out
    assert said in printed and "Note: 3 tokens to validate on say little" in printed
    [run] = (workdir / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_bytes())
    assert bars == [(1, "Evaluating")]  # of the evaluation after training
    assert summary["steps"] == 3 and math.isfinite(summary["final_val_loss"])


def test_a_folder_of_very_many_one_line_files_is_read_whole(workdir):
    for number in range(600):
        path = Path("texts", f"{number % 7}", f"{number}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"tweet {number}", encoding="utf-8")
    Path("texts/a.txt").mkdir()  # a folder with a file's name
    for name in ("a.txt/b.txt", "empty.txt", "notes.txt.bak"):
        Path("texts", name).write_text("" if name == "empty.txt" else name, encoding="utf-8")
    found, report = read("texts")
    assert sorted(found) == sorted(
        ["a.txt/b.txt", "notes.txt.bak", *(f"tweet {n}" for n in range(600))]
    )
    assert (report.empty_documents, report.passed_over) == (1, [])


def test_files_without_text_are_told_and_the_case_of_a_suffix_does_not_matter(workdir):
    Path("texts").mkdir()
    for number in range(3):
        Path(f"texts/{number}.txt").touch()
    with pytest.raises(DataError, match=r"^texts is empty\.\nSet DATA to"):
        tokenize(DataSpec(("texts",)), "char", 0.9, workdir / "cache")
    rows = json_lines([{"text": "one"}, {"text": "two"}])
    assert documents(save("a.JSONL", rows)) == documents(save("b.Json", rows)) == ["one", "two"]


def test_a_step_far_into_a_run_is_taken_without_those_before_it(monkeypatch):
    loader, _ = tiny_loaders(50)
    reads, real = [], type(loader.dataset).__getitems__
    monkeypatch.setattr(
        type(loader.dataset), "__getitems__", lambda *args: reads.append(1) or real(*args)
    )
    [step] = steps_between(loader, 10**6, 10**6 + 1)
    assert len(reads) == len(step.batches) == 1
