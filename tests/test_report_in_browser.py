"""report.html in a real browser: offline, on a phone, in the dark, in Chinese, with a pointer."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from insight.report import Report
from storage.files import write_json
from tests.test_page import CONTRAST, HOSTILE, browser
from tests.test_report import make_run

pytestmark = pytest.mark.slow
__all__ = ["browser"]  # a fixture


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    run = make_run(tmp_path_factory.mktemp("report") / "<b>run", 40, texts=[HOSTILE, "The ferry"])
    known = {"bz2": 0.5, "ngram": 0.4}
    write_json(run / "insight.json", {"baselines": known, "copied": {"The ferry": [[4, 9]]}})
    Report(run).draw()
    return run / "report.html"


@pytest.fixture
def open_page(browser, report) -> Iterator:
    """Opens the report; at the end nothing else was asked for, and nothing was wrong."""
    asked, wrong, contexts = [], [], []

    def open_page(path: Path = report, **options):
        context = browser.new_context(**{"locale": "en-US", "offline": True} | options)
        contexts.append(context)
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error(e.blockedURI))"
        )
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked and all(url.startswith("file:") and "report.html" in url for url in asked)
    assert wrong == []


def test_curves_are_read_with_the_pointer_and_with_the_keyboard(open_page):
    page = open_page()
    chart = page.locator("[data-chart=loss]")
    legend = chart.locator(".legend")
    assert "step 40" in legend.inner_text()
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    step = int(re.search(r"step (\d+)", legend.inner_text())[1])
    assert 15 <= step <= 25
    loss = 8 / (step + 1) ** 0.5
    assert f"batch {loss:.3f}".rstrip("0") in legend.inner_text()
    assert chart.locator(".cursor").count() == 1
    chart.locator("svg").press("Home")
    assert re.search(r"step [01]\b", legend.inner_text())
    chart.locator("svg").press("ArrowRight")
    assert re.search(r"step [12]\b", legend.inner_text())
    assert "bz2" in chart.locator("svg").text_content()
    before = chart.locator("polyline").first.get_attribute("points")
    page.locator("#whole").click()
    assert chart.locator("polyline").first.get_attribute("points") != before


def test_the_text_over_time_is_on_a_slider_and_stays_text(open_page):
    page = open_page()
    assert "step 40" in page.locator("#when").inner_text()
    page.locator("#moment").press("Home")
    assert page.locator("#when").inner_text() == "Before training · step 0"
    assert page.locator("#texts .written").all_text_contents() == [HOSTILE, "The ferry"]
    assert page.locator("#texts mark").all_text_contents() == ["ferry"]
    assert page.locator("h1").inner_text() == page.title() == "<b>run"
    assert page.locator("main img, main b, main a").count() == 0


def test_the_page_speaks_both_languages(open_page):
    page = open_page()
    assert page.locator("#verdict").inner_text().startswith("So far")
    page.locator("[data-speaks=zh]").click()
    assert page.locator("#verdict").inner_text().startswith("到目前为止")
    assert "第 40 步" in page.locator("[data-chart=loss] .legend").inner_text()
    assert page.get_by_text("Learning rate").is_hidden()
    chinese = open_page(locale="zh-CN")
    assert chinese.evaluate("document.documentElement.lang") == "zh"
    chinese.locator("[data-speaks=en]").click()
    assert chinese.get_by_text("Learning rate").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_legible_in_light_and_dark_and_fits_a_phone(open_page, scheme):
    page = open_page(color_scheme=scheme, viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    colors = ["h1", "#verdict p", ".quiet", ".key.train", ".key.val", ".key.batch", ".severity"]
    assert min(page.evaluate(CONTRAST, colors)) >= 3  # colors of curves; text has more
    assert min(page.evaluate(CONTRAST, ["h1", "#verdict p", ".quiet", ".severity"])) >= 4.5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    assert dark == (scheme == "dark")


def test_a_run_of_100000_steps_opens_in_a_second(open_page, tmp_path):
    run = make_run(tmp_path / "long", 100_000, every=100)
    Report(run).draw()
    page = open_page(run / "report.html")
    # what the page's own work took, on a machine that may be busy with other things too
    took = page.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
    assert page.locator("[data-chart=loss] polyline").count() == 3
    assert took < 1000 * max(1, os.getloadavg()[0])
