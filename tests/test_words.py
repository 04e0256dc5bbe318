"""All that the program writes into its pages has its Chinese, without a slip of typography."""

import re
from html.parser import HTMLParser

import pytest

from engine.words import Words
from insight.compare import Comparison
from insight.comparison_page import as_page, how_judged, standings_table, verdict_of
from insight.paired import Difference, Spread
from insight.report import Report
from insight.run_files import INSIGHT
from planning.card import card_rows
from planning.recipe import Fixed, choose_recipe
from storage.files import write_json
from tests.records import plan_in_minutes, record_of
from tests.test_chinese_documents import BLANKS, HALF_WIDTH, HAN
from tests.test_compare import standing
from tests.test_recipe import CPU, english
from tests.test_report import make_run
from training.journal import ENDED
from training.pace import BY_HEART, TIME

ENGLISH = re.compile(r"\b[A-Za-z][a-z]+(?:,? [a-z]{2,}){2,}")  # three words in a row
FOLLOWS = {"after_step": 3, "steps_before": 9, "total_steps": 6, "decay_steps": 2}


class Chinese(HTMLParser):
    """The texts of a page that it shows in Chinese, without code and the values of settings."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts, self.path = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "input", "img", "wbr"):
            self.path.append((tag, dict(attributes).get("class")))

    def handle_endtag(self, tag):
        assert self.path.pop()[0] == tag

    def handle_data(self, data):
        hidden = {"style", "script", "pre", "title", "h1", "button"}
        if not any(tag in hidden or kind == "en" for tag, kind in self.path):
            self.texts.append(data)


def require_sound(*all_words: Words) -> None:
    for words in all_words:
        if words.en != words.zh:
            assert not HAN.search(words.en) and HAN.search(words.zh), words
        assert not ENGLISH.search(words.zh), words.zh
        assert not BLANKS.search(words.zh) and not HALF_WIDTH.search(words.zh), words.zh


@pytest.mark.parametrize(
    ("fixed", "size", "minutes"),
    [
        (Fixed(None, {}, {}), 200_000, 5),
        (Fixed("char", {"n_layers": 3, "emb_dim": 64, "n_heads": 4}, {}), 9_000, 0.25),
        (Fixed(None, {}, {"optimizer": "adamw"}), 10**8, 600),
    ],
)
def test_every_row_of_the_card_and_every_reason_has_its_chinese(fixed, size, minutes):
    text = english(size)
    recipe = choose_recipe(text, CPU, minutes, fixed)
    rows = card_rows(recipe, text, CPU, minutes)
    require_sound(*(words for row in rows for words in row), *recipe.reasons.values())
    assert all(label.zh != label.en for label, _ in rows)


def test_a_report_in_chinese_says_nothing_in_english(tmp_path):
    run = make_run(tmp_path / "run", texts=[f"渡口 {ENDED.en}"])
    changes = [
        {"at": "2026-01-02", "why": why} | FOLLOWS | {"total_steps": total}
        for why, total in ((TIME, 6), (BY_HEART, 6), (TIME, 9))
    ]
    record = record_of(plan_in_minutes(), changes=changes)
    write_json(run / "settings.json", record.to_json())
    note = Words("a.txt: lines end in CRLF; kept as they are", "a.txt：行尾是 CRLF，照原样保留")
    data = {"files": [], "notes": [note], "notices": [note], "tokenizer": "61 characters"}
    write_json(run / "data.json", data | {"split": {"train_tokens": 5000}})
    write_json(run / "summary.json", {"elapsed_s": 61.0, "final_val_bits_per_byte": 0.125})
    write_json(run / INSIGHT, {"by_heart": {"prompts": 200, "extraction_rate": 0.5}})
    report = Report(run)
    report.draw()
    page = (run / "report.html").read_text(encoding="utf-8")
    found = Chinese(page).texts
    own = repr(record.training.start_context)  # the user's, as are the values of other settings
    assert [text for text in found if ENGLISH.search(text) and text.strip() != own] == []
    said = "".join(found)
    for part in (
        "预报卡与结果",
        "如何更改",
        "行尾是 CRLF",
        "61 个字符",
        "重新计划：6 步",
        "开始背诵",
    ):
        assert part in said
    assert "9 步，而不是 9 步" not in said  # a plan that changed nothing
    assert f'[["渡口 ",false],[["{ENDED.en}","{ENDED.zh}"],false]]' in page
    assert '"label":["Before training","训练前"]' in page


def test_a_comparison_has_its_chinese_whatever_came_out():
    noise, real = Difference(0.01, -0.01, 0.03), Difference(0.1, 0.08, 0.12)
    none = Words("the runs have different validation texts", "各次运行的验证文本不同")
    for differences in ([noise], [real], [real, real], [noise, real]):
        runs = [standing("a", None), *(standing("b", found) for found in differences)]
        for spread, why_none in ((Spread(0.01, 0), None), (Spread(0.01, 2), None), (None, none)):
            comparison = Comparison(runs, 1e6, 60.0, {"SEED": [1, 2, 3]}, 1000, spread, why_none)
            require_sound(verdict_of(comparison), *filter(None, [how_judged(comparison)]))
            require_sound(*(cell for row in standings_table(comparison) for cell in row))
            found = Chinese(as_page(comparison, b"png")).texts
            assert [text for text in found if ENGLISH.search(text)] == []
