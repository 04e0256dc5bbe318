"""report.html: all of a run in one page that nothing in it can break out of."""

import base64
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main
import train
from distributed.parallel import Parallel
from engine.errors import DataError, NumericsError, Stopped
from insight import measuring
from insight.copies import Copy
from insight.curves import CurvesFile, buckets
from insight.diagnosis import NOTE
from insight.measuring import COPIES_S, measure_in_run
from insight.page import render_page
from insight.report import Report
from insight.run_files import INSIGHT, read_run, read_samples
from insight.run_text import RunText
from insight.verdict import headline
from planning.plan import Chat
from scripts import report as program
from storage.files import write_json
from tests.conftest import LETTERS
from tests.letters import Letters
from tests.records import plan_in_minutes, record_of
from training.journal import Journal
from training.learner import take_step

HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>\u202e${'`'}&amp;"


def make_run(folder: Path, n_steps: int = 20, every: int = 5, texts=("The ferry",)) -> Path:
    """The folder of a run of some steps, without weights; its loss falls as 8 over the root."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", record_of(plan_in_minutes()).to_json())
    write_json(folder / "data.json", {"files": [], "split": {"train_tokens": 5000}})
    rows = []
    for step in range(n_steps + 1):
        loss = 8 / (step + 1) ** 0.5
        known = {"train/loss": loss, "train/grad_norm": 0.5, "train/lr": 1e-3}
        if step:
            rows.append({"step": step, "train/tokens": 64 * step} | known)
        if step % every == 0:
            scores = {"val/loss": loss, "val/bits_per_byte": loss / math.log(2) / 4}
            rows.append({"step": step, "eval/train_loss": loss, "train/tok_per_sec": 9.0} | scores)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    journal = Journal(8, n_steps, folder=folder)
    journal.note_sample("Before training", [*texts])
    journal.steps = n_steps
    journal.note_sample("Top-k (50)", [*texts])
    return folder


def page_of(folder: Path) -> str:
    Report(folder).draw()
    return (folder / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """The elements of a page, with their attributes, and the text of each script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.raw, self.open = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open = tag

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, data):
        if self.open in ("script", "style"):
            self.raw.append((*self.found[-1], data))


def embedded(page: str) -> dict:
    return next(json.loads(text) for _, attrs, text in Elements(page).raw if attrs.get("id"))


# ------------------------------------------------------------------------------- reading


def test_a_growing_file_is_read_piece_by_piece_and_a_half_written_line_when_it_is_whole(tmp_path):
    path = make_run(tmp_path / "run") / "metrics.jsonl"
    whole = path.read_bytes()
    expected = CurvesFile(path).read()
    assert expected.steps == [*range(1, 21)] and expected.eval_steps == [0, 5, 10, 15, 20]
    assert expected.bytes_a_token == pytest.approx(4)
    reader = CurvesFile(path)
    for end in range(0, len(whole) + 1, 97):
        path.write_bytes(whole[:end])
        found = reader.read()
        assert len(found.steps) + len(found.eval_steps) == whole[:end].count(b"\n")
    path.write_bytes(whole)
    assert asdict(reader.read()) == asdict(expected)
    path.write_bytes(whole[: whole.index(b"\n") + 1])  # a resumed run has cut it
    assert reader.read().steps == []
    path.write_bytes(whole)
    assert reader.read().steps == expected.steps
    # or another one has its place, and is longer than it was
    *kept, _ = whole.split(b"\n", 13)
    for loss, stop in ((0.5, 60), (0.25, 90)):
        again = [{"step": step, "train/loss": loss} for step in range(11, stop)]
        content = b"\n".join([*kept, *(json.dumps(row).encode() for row in again), b""])
        assert len(content) > path.stat().st_size
        if loss == 0.5:
            path.with_name("beside").write_bytes(content)
            os.replace(path.with_name("beside"), path)
        else:
            path.write_bytes(content)
        found = reader.read()
        assert found.steps == [*range(1, stop)] and found.eval_steps == [0, 5, 10]
        assert found.losses[:10] == expected.losses[:10] and set(found.losses[10:]) == {loss}


def test_damaged_lines_and_numbers_that_are_none_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert CurvesFile(path).read().steps == []
    rows = ["{", "[]", '"x"', '{"step": "1", "train/loss": 2}', "\x00\ufffd", "[" * 9999]
    rows += ['{"step": 1, "train/loss": null, "train/tokens": null, "train/lr": "x"}']
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    curves = CurvesFile(path).read()
    assert curves.steps == [1] and curves.tokens == [0]
    assert math.isnan(curves.losses[0]) and math.isnan(curves.rates[0])


def test_buckets_are_the_mean_and_the_extremes_of_neighbors():
    steps = [*range(1, 8)]
    values = [1.0, 3.0, math.nan, 2.0, math.nan, math.nan, 9.0]
    found = buckets(steps, values, 4)
    assert [b[0] for b in found] == [2, 4, 6, 7]
    assert found[0] == (2, 2.0, 1.0, 3.0) and found[1] == (4, 2.0, 2.0, 2.0)
    assert all(math.isnan(x) for x in found[2][1:]) and found[3] == (7, 9.0, 9.0, 9.0)
    assert [b.mean for b in buckets(steps[:2], values[:2], 10)] == [1, 3]
    assert buckets([], [], 5) == []


def test_samples_are_read_back_as_the_journal_writes_them(tmp_path):
    texts = ["## Not a heading\n\nPrompt 2:\n    indented", "Step 7", "一"]
    run = make_run(tmp_path / "run", texts=texts)
    first, last = read_samples(run / "samples.md")
    assert (first.label, first.step, first.texts) == ("Before training", 0, texts)
    assert (last.label, last.step, last.texts) == ("Top-k (50)", 20, texts)
    assert read_samples(tmp_path / "none.md") == []


# ---------------------------------------------------------------------------------- page


def test_hostile_text_in_names_samples_settings_and_notes_stays_text(tmp_path):
    run = make_run(tmp_path / "<img src=x onerror=alert(3)>", texts=[HOSTILE])
    record = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    record["settings"]["DATA"] = record["origins"]["mode"] = HOSTILE
    write_json(run / "settings.json", record)
    files = [{"name": HOSTILE, "bytes": HOSTILE}, "no file"]
    write_json(run / "data.json", {"files": files, "notes": [HOSTILE], "tokenizer": HOSTILE})
    page = page_of(run)
    elements = Elements(page)
    allowed = "html head meta title link style body header h1 h2 h3 div button main section p span "
    allowed += (
        "wbr pre code table tr th td ul li label input output noscript script details summary"
    )
    assert {tag for tag, _ in elements.found} <= {*allowed.split()}
    assert not [
        a for _, attrs in elements.found for a in attrs if a.startswith("on") or a == "style"
    ]
    assert [tag for tag, _, _ in elements.raw] == ["style", "script", "script"]
    (text,) = embedded(page)["moments"][0]["texts"]
    assert "".join(piece for piece, _ in text) == HOSTILE.replace("\u202e", "\ufffd")
    assert "alert(2)" in page and "\u202e" not in page


def test_the_page_asks_for_nothing_and_its_policy_allows_its_own_script_and_style_alone(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    elements = Elements(page)
    (policy,) = (a["content"] for _, a in elements.found if "http-equiv" in a)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag, attributes, text in elements.raw:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        is_code = attributes.get("type") != "application/json"
        assert (rules[f"{tag}-src"] == f"'sha256-{digest}'") == is_code
    links = [v for _, a in elements.found for n, v in a.items() if n in ("src", "href")]
    assert links == ["data:,"]
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.slow
def test_a_run_of_100000_steps_and_long_samples_makes_less_than_a_megabyte(tmp_path):
    run = make_run(tmp_path / "run", 100_000, every=10)
    journal = Journal(8, 10**6, folder=run)
    for step in range(60):
        journal.steps = 1000 * step
        journal.note_sample(f"After step {step}", [f"{step} 春" + "</" * 499] * 16)
    page = page_of(run)
    assert len(page.encode()) < 1_000_000
    data = embedded(page)
    batch, train, val = (curve["points"] for curve in data["charts"]["loss"]["curves"])
    assert len(batch) <= 500 and len(train) == len(val) <= 500
    assert batch[-1][0] == val[-1][0] == 100_000
    at = 8 / np.sqrt(np.arange(2, 202))
    assert batch[0] == [200, *(pytest.approx(x, rel=1e-4) for x in (at.mean(), at.min(), at.max()))]
    moments = data["moments"]
    assert 3 < len(moments) < 60
    assert (moments[0]["step"], moments[-1]["step"]) == (0, 59_000)


@pytest.mark.parametrize(
    "text", ["春江潮水连海平。" * 400, "👩‍🚀" * 1000, "<&>" * 1000, "a" * 9999]
)
def test_samples_of_any_script_take_their_share_of_the_page(text, tmp_path):
    run = make_run(tmp_path / "run")
    moments = [f"## Moment {n}\n\nStep {n}\n\n    {n} {text}\n" for n in range(1, 301)]
    (run / "samples.md").write_text("\n".join(moments), encoding="utf-8")
    page = page_of(run)
    assert len(page.encode()) < 1_000_000
    shown = embedded(page)["moments"]
    assert len(shown) > 20  # and they are the first one, and the last ones
    assert [moment["step"] for moment in shown] == [1, *range(302 - len(shown), 301)]
    ((written, is_copied),) = shown[-1]["texts"][0]
    assert (written, is_copied) == (f"300 {text}"[:5000], False)


def test_the_sentence_that_matters_first_says_how_good_the_run_is(tmp_path):
    run = make_run(tmp_path / "run", 40)
    loss = 8 / math.sqrt(41)
    bits = loss / math.log(2) / 4

    def sentences() -> list[str]:
        verdict = re.search(r'<section id="verdict"><p>(.*?)</p>', page_of(run))[1]
        return re.findall(r">([^<]+)</span>", verdict)

    english, chinese = sentences()
    assert english.startswith("So far: ") and f"{bits:.2f} bits a byte" in english
    assert chinese.startswith("到目前为止：") and f"{bits:.2f} 比特" in chinese
    summary = {"elapsed_s": 600.0, "final_val_loss": loss, "parameters": 5000}
    write_json(run / "summary.json", summary | {"final_val_bits_per_byte": bits})
    by_heart = {"extraction_rate": 0.25, "prompts": 200}
    not_by_heart = {"extraction_rate": 0.0, "samples_share": 0.6}
    for by_mean, meter, said in (
        (2 * bits, {"extraction_rate": 0.0}, "50% below bz2, no sign of copying"),
        (2 * bits, not_by_heart | {"chance_share": 0.5}, "60% of what it writes is copied"),
        (2 * bits, not_by_heart | {"chance_share": 0.58}, "50% below bz2, no sign of copying"),
        (bits / 2, by_heart, "100% above bz2, 25% of tried passages are known by heart"),
    ):
        known = {"repeated": 0.0, "leaked": 0.0, "by_heart": meter}
        write_json(run / INSIGHT, known | {"baselines": {"bz2": by_mean}})
        english, chinese = sentences()
        assert said in english and "5 minutes more would give some" in english
        assert english.startswith("Good: " if by_mean > bits else "Sound, but not yet better")
    assert "25%" in chinese and "再训练 5 分钟" in chinese


def test_good_is_only_what_is_known_to_beat_a_compressor_and_nothing_is_after_one_evaluation(
    tmp_path,
):
    summary = {"elapsed_s": 60.0}
    for name, options, make, opening in (
        ("good", {}, make_run, "Good: "),
        ("answers", {}, make_chat_run, "Sound: "),  # no compressor compares
        ("first", {"n_steps": 4}, make_run, "Too early to say: "),
    ):
        run = make(tmp_path / name, **options)
        write_json(run / INSIGHT, {"baselines": {"bz2": 9.0}, "repeated": 0, "leaked": 0})
        if name != "first":
            write_json(run / "summary.json", summary)
        files, findings = Report(run).read()
        kept = [finding for finding in findings if finding.severity == NOTE]
        words = headline(files, kept)
        assert words.en.startswith(opening)
        # a few answers are to be learned by heart
        assert ("no sign of" in words.en) == (name == "good")
        if name == "good":
            losses = [loss / 3 for loss in files.curves.train_losses]
            curves = replace(files.curves, train_losses=losses)
            words = headline(replace(files, curves=curves), kept)
            assert "training text known far better than other text" in words.en
            assert words.en.endswith("; more time would give little.")


def test_the_card_is_shown_with_what_came_of_it_and_baselines_are_lines(tmp_path):
    run = make_run(tmp_path / "run")
    write_json(run / "summary.json", {"elapsed_s": 61.0, "final_val_bits_per_byte": 0.125})
    copied = {"The ferry": [[4, 9]]}
    write_json(run / INSIGHT, {"baselines": {"ngram": 0.5, "bz2": 0.25}, "copied": copied})
    page = page_of(run)
    assert "0.125 · " in page and "outside the range" in page and "Runner-up" in page
    assert "0.12 bits a byte, 50% below bz2" in page  # as the end measured it, in the headline too
    lines = {line["name"][0]: line["value"] for line in embedded(page)["charts"]["loss"]["lines"]}
    assert lines["5-gram"] == pytest.approx(0.5 * math.log(2) * 4, rel=1e-4)
    assert embedded(page)["moments"][-1]["texts"] == [[["The ", False], ["ferry", True]]]


@pytest.mark.parametrize("insight", ["{", "[]", '{"baselines": 3, "copied": {"x": [[1]]}}'])
def test_a_damaged_insight_file_is_as_none(insight, tmp_path):
    run = make_run(tmp_path / "run")
    expected = page_of(run)
    (run / INSIGHT).write_text(insight, encoding="utf-8")
    assert page_of(run) == expected


def make_chat_run(folder: Path, **options) -> Path:
    run = make_run(folder, **options)
    record = record_of(plan_in_minutes(), chat=Chat("{{ messages }}", 500))
    write_json(run / "settings.json", record.to_json())
    return run


def test_answers_are_not_compared_with_figures_of_whole_conversations(tmp_path):
    measured = {"repeated": 0.9, "leaked": 0.9, "baselines": {"bz2": 0.1, "ngram": 0.1}}
    found = {}
    for name, make in ("text", make_run), ("chat", make_chat_run):
        run = make(tmp_path / name)
        write_json(run / INSIGHT, measured)
        page = page_of(run)
        kinds = {finding.kind for finding in Report(run).read()[1]}
        lines = [line["name"][0] for line in embedded(page)["charts"]["loss"]["lines"]]
        found[name] = (read_run(run).facts.baselines, lines, kinds & {"leak", "duplicates"})
        assert (": validation text" in page) == (name == "text")
        assert ("bits a byte of the answers" in page) == (name == "chat")
    assert found["text"] == (
        measured["baselines"],
        ["uniform guess", "bz2", "5-gram"],
        {"leak", "duplicates"},
    )
    assert found["chat"] == ({}, ["uniform guess"], set())


def test_a_pass_through_conversations_is_one_through_their_answers(tmp_path):
    run = make_chat_run(tmp_path / "chat")
    counted = {"tokens": 10_000, "target_tokens": 4_000}
    write_json(run / "data.json", {"split": {"train_tokens": 5000}, "chat": counted})
    assert read_run(run).facts.train_tokens == 2000  # the curves count those alone
    assert "Tokens of the answers a second" in page_of(run)
    for damaged in ({}, [], {"tokens": 5}, {"tokens": 0, "target_tokens": "x"}):
        write_json(run / "data.json", {"split": {"train_tokens": 5000}, "chat": damaged})
        assert read_run(run).facts.train_tokens == 5000


def test_what_a_model_writes_begins_behind_the_prompt_or_the_question(tmp_path):
    answered = "Where is it?\nIn town?\n-> Here.\n-> There."
    run = read_run(make_chat_run(tmp_path / "chat"))
    assert answered[run.begin_of_written(answered) :] == "Here.\n-> There."
    assert run.begin_of_written("…the end of a long answer") == 0
    run = read_run(make_run(tmp_path / "run"))
    (prompt,) = run.record.training.prompts
    assert run.begin_of_written(f"{prompt} on") == len(prompt)
    assert run.begin_of_written(answered) == 0


def test_copies_are_looked_for_in_what_the_model_wrote_alone(tmp_path, monkeypatch):
    seen = []

    def note(*_, samples: list[str]) -> None:
        seen.extend(samples)
        raise DataError("too short.")

    copy = Copy(1, 4, "ere", 0, "")
    monkeypatch.setattr(measuring, "open_index", lambda *_: None)
    monkeypatch.setattr(measuring, "find_copies", lambda _, text: [copy] if text == "Here" else [])
    monkeypatch.setattr(measuring, "load_run", lambda _: SimpleNamespace(model=None))
    monkeypatch.setattr(measuring, "measure_by_heart", note)
    for make, begin in ((make_chat_run, "Where?\n-> "), (make_run, "Every effort moves you")):
        run = read_run(make(tmp_path / make.__name__, texts=[f"{begin}Here"]))
        facts = measuring.measure_model(run, text_of_letters())
        spans = [[len(begin) + 1, len(begin) + 4]]
        assert facts == {"copied": {f"{begin}Here": spans}}
    assert seen == 4 * ["Here"]


def test_runs_without_weights_are_drawn_with_a_note_each_and_the_text_is_measured(
    tmp_path, monkeypatch, capsys
):
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    monkeypatch.setattr(program, "open_run_text", lambda _: text_of_letters())
    monkeypatch.setattr(sys, "argv", ["report", "--seconds=1", *map(str, runs)])
    assert program.main() == 0
    told = capsys.readouterr()
    assert told.err.count("The report lacks what the model has by heart") == 2
    for run in runs:
        assert (run / "report.html").exists() and f"Report: {run / 'report.html'}" in told.out
        assert read_run(run).facts.leaked == 1


# ----------------------------------------------------------------------------- in a run


def test_a_report_that_fails_is_said_once_and_ends_no_run(tmp_path, capsys):
    report = Report(tmp_path)
    assert report.follow(1.0) == {} and report.finish() == []
    assert capsys.readouterr().out.count("Note: no report could be drawn") == 1


@pytest.mark.slow
@pytest.mark.parametrize("spoils", [True, False])
def test_a_run_that_diverges_or_is_stopped_draws_the_steps_since_its_last_evaluation(
    spoils, tmp_path, monkeypatch
):
    seen = 0

    def spoil(model, *arguments, **options):
        nonlocal seen
        seen += 1
        if seen == 14 and not spoils:
            os.kill(os.getpid(), signal.SIGTERM)
        if seen >= 14 and spoils:
            with torch.no_grad():
                model.final_norm.weight.fill_(math.nan)
        return take_step(model, *arguments, **options)

    monkeypatch.setattr("training.learner.take_step", spoil)
    monkeypatch.setattr("storage.cache.CACHE", tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    shape = {"n_layers": 1, "n_heads": 1, "emb_dim": 16}
    params = {"max_steps": 60, "eval_freq": 10, "max_length": 8, "model_overrides": shape}
    names = "DATA, TOKENIZER, CUSTOM_MODE, RUN_NAME, custom_params"
    values = f"'text.txt', 'char', True, 'tiny', {params!r}"
    Path("settings.py").write_text(f"{names} = {values}\n", encoding="utf-8")
    Path("text.txt").write_text(LETTERS, encoding="utf-8")
    error = NumericsError("") if spoils else Stopped(signal.SIGTERM, "")
    assert main.main(["settings.py"]) == error.exit_code
    run = Path("runs/tiny")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert ("Numbers that are not finite" in page) == spoils
    last = embedded(page)["charts"]["norm"]["curves"][0]["points"][-1][0]
    assert last == len(read_run(run).curves.steps) > 12


def test_the_text_is_measured_once_there_is_time_and_the_picture_gets_its_baselines(tmp_path):
    run = make_run(tmp_path / "run")
    tokens = np.random.default_rng(0).integers(0, 8, 3000).astype(np.uint16)
    text = RunText(np.concatenate([tokens, tokens]), tokens[:500], Letters(), "letters")
    report = Report(run, text)
    known = report.follow(1e-6)
    assert not (run / INSIGHT).exists()
    report = Report(run, text)
    known = report.follow(10.0)
    insight = json.loads((run / INSIGHT).read_text(encoding="utf-8"))
    assert insight["leaked"] == 1 and 0.4 < insight["repeated"] < 0.6
    assert known["bz2"] == pytest.approx(insight["baselines"]["bz2"] * math.log(2) * 4)
    assert read_run(run).facts.leaked == 1
    shutil.rmtree(run)
    assert report.follow(20.0) == {}


def text_of_letters() -> RunText:
    tokens = np.arange(1000).astype(np.uint16) % 8
    return RunText(tokens, tokens[:100], Letters(), "letters")


def test_measuring_the_text_of_a_long_run_takes_10_s_at_most_and_less_where_ranks_wait(
    tmp_path, monkeypatch
):
    run, limits = make_run(tmp_path / "run"), []
    monkeypatch.setattr(
        "insight.report.measure_in_run", lambda text, limit_s: limits.append(limit_s)
    )
    for report in (
        Report(run, text_of_letters()),
        Report(run, text_of_letters(), limit_s=2.5),
    ):
        for elapsed_s in (100.0, 1e6):
            report.follow(elapsed_s)
    assert limits == [1.0, 10.0, 1.0, 2.5]


def test_the_main_rank_of_several_measures_for_a_quarter_of_their_timeout(tmp_path):
    dataset = SimpleNamespace(tokens=text_of_letters().train)
    loader = SimpleNamespace(dataset=dataset)
    record = SimpleNamespace(chat=None, tokenizer="letters")
    env = SimpleNamespace(train_loader=loader, val_loader=loader, tokenizer=Letters())
    env.run = SimpleNamespace(path=tmp_path, record=record)
    for parallel, limit_s in ((Parallel(), 10), (Parallel(0, 2, timeout_s=20), 5)):
        env.parallel = parallel
        assert train._report_of(env)._limit_s == limit_s
    record.chat = Chat("{{ messages }}", 500)
    assert train._report_of(env)._text is None


def test_what_was_measured_before_stays_and_only_gaps_are_filled(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    found = {"repeated": 0.1, "leaked": 0.1, "baselines": {"bz2": 3.0, "xz": 3.0}}
    monkeypatch.setattr("insight.report.measure_in_run", lambda *_: found)
    for known, expected in (
        ({"repeated": 0.2, "baselines": {"bz2": 2.0}}, {"repeated": 0.2, "baselines": {"bz2": 2}}),
        ({"baselines": {"bz2": 2.0}}, found | {"baselines": {"bz2": 2.0, "xz": 3.0}}),
    ):
        write_json(run / INSIGHT, known)
        Report(run, text_of_letters()).follow(10.0)
        assert json.loads((run / INSIGHT).read_text(encoding="utf-8")) == expected


class LongTokens(Letters):
    """Each token is a letter eight times."""

    def decode(self, ids) -> str:
        return "".join(8 * letter for letter in super().decode(ids))


def test_the_time_that_measuring_takes_goes_by_the_bytes_of_a_token(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 7, 50_000).astype(np.uint16)
    limit_s = 2 * COPIES_S * (50_000 + 5_000)
    seen = []
    monkeypatch.setattr(
        measuring,
        "measure_repeats",
        lambda train, val: seen.append((len(train), len(val))) or (0, 0),
    )
    for tokenizer, factor in ((Letters(), 2), (LongTokens(), 2), (LongTokens(), 9)):
        text = RunText(tokens, tokens[:5000], tokenizer, "letters")
        measure_in_run(text, factor * limit_s / 2)
    assert seen == [(50_000, 5_000), (400_000, 40_000)]
    monkeypatch.setattr(measuring, "MOST_TRAIN", 160_000)
    monkeypatch.setattr(measuring, "MOST_VAL", 16_000)
    measure_in_run(text, math.inf)
    assert seen[-1] == (160_000, pytest.approx(16_000, rel=0.1))


def test_a_text_that_cannot_be_measured_is_tried_once_and_the_report_is_drawn(
    tmp_path, monkeypatch, capsys
):
    run, tries = make_run(tmp_path / "run"), []

    def fail(*_) -> None:
        tries.append(1)
        raise MemoryError

    monkeypatch.setattr("insight.report.measure_in_run", fail)
    report = Report(run, text_of_letters())
    for _ in range(2):
        report.follow(10.0)
    assert len(tries) == 1 and (run / "report.html").exists()
    assert capsys.readouterr().out.count("Note: the text could not be measured: Memory") == 1


def test_a_page_is_a_function_of_the_files_alone(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert render_page(run, []) == render_page(run, [])
