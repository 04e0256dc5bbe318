"""The server's page in a real browser: a conversation, hostile text, the keyboard, a phone."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import environment
from tests.conftest import REPOSITORY
from tests.test_serve import Server, continued, seconds_until_idle, train_by_heart

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
# what the model has by heart
LINE = "Look: <img src=x onerror=alert(1)> </script><script>alert(2)</script> javascript:alert(3)\n"
CONTRAST = """
(selectors) => selectors.map((selector) => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const element = document.querySelector(selector);
  let behind = element;
  while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const light = (color) => {
    const [r, g, b] = numbers(color).map((c) => c / 255).map(
      (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const both = [light(getComputedStyle(element).color),
                light(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
  return (both[0] + 0.05) / (both[1] + 0.05);
})
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train_by_heart(tmp_path_factory.mktemp("page"), LINE, steps=250)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no chromium on this machine")
    with api.sync_playwright() as playwright:
        # the sandbox of a browser does not work for root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(run, browser) -> Iterator[Server]:
    with Server(run, "--answer-limit", "100000") as server:
        yield server


@pytest.fixture
def open_page(browser, server):
    """Opens the page; at the end nothing was asked of any other host, and nothing was wrong."""
    asked, wrong, contexts = [], [], []
    expected: list[str] = []  # what a test may find in the console

    def open_page(url: str = server.url, **options):
        options = {"locale": "en-US"} | options
        context = browser.new_context(**options)
        contexts.append(context)
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error(e.blockedURI))"
        )
        page = context.new_page()
        page.expected = expected
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked
    hosts = {re.sub(r"^(blob:)?(\w+://[^/]*).*", r"\2", url) for url in asked}
    assert all(re.fullmatch(r"http://127\.0\.0\.1:\d+", host) for host in hosts) and len(hosts) == 1
    assert [text for text in wrong if not any(part in text for part in expected)] == []


@pytest.fixture
def page(open_page):
    page = open_page()
    page.wait_for_selector("#facts dd")
    set_controls(page, temperature="0", max_tokens="100")
    return page


def set_controls(page, **values: str) -> None:
    for name, value in values.items():
        page.locator(f"#{name}").fill(value)


def say(page, text: str) -> None:
    said = page.locator(".user").count()
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    page.locator(".user").nth(said).wait_for()


def answers(page) -> list[str]:
    return page.locator(".assistant .text").all_text_contents()


def wait_until_written(page) -> None:
    page.wait_for_selector("#retry:visible")


# ------------------------------------------------------------------------ the conversation


@pytest.mark.slow
def test_a_conversation_goes_on_from_all_that_was_said(page, run):
    model = environment.load_run(run, weights="fp32", device="cpu")
    bodies = []
    page.on("request", lambda r: r.method == "POST" and bodies.append(json.loads(r.post_data)))
    say(page, "Look: <img")
    wait_until_written(page)
    first = continued(model, "Look: <img", max_new_tokens=100)
    assert answers(page) == [first]
    assert re.match(r"100 tokens · \d+ tokens/s", page.locator(".note").inner_text())
    say(page, "Look:")
    wait_until_written(page)
    whole = f"Look: <img\n\n{first}\n\nLook:"
    assert answers(page) == [first, continued(model, whole, max_new_tokens=100)]
    assert [m["role"] for m in bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert bodies[1]["messages"][1]["content"] == first


@pytest.mark.slow
def test_of_a_long_conversation_the_newest_part_is_sent(page):
    text = "😀" * 150_000 + "."  # the cut falls into the middle of a character
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, text)
    (message,) = json.loads(asked.value.post_data)["messages"]
    assert message["content"] == "😀" * 99_999 + "."
    wait_until_written(page)
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Look:")
    contents = [m["content"] for m in json.loads(asked.value.post_data)["messages"]]
    assert contents[1:] == [answers(page)[0], "Look:"]
    assert 199_998 < sum(len(c.encode("utf-16-le")) // 2 for c in contents) <= 200_000
    wait_until_written(page)
    assert page.locator(".problem").count() == 0


@pytest.mark.slow
def test_hostile_text_of_the_user_and_of_the_model_is_shown_as_text(page):
    say(page, "Look:")
    wait_until_written(page)
    say(page, LINE)
    wait_until_written(page)
    shown = page.locator("#log").inner_text()
    for part in ("<img src=x onerror=alert(1)>", "</script><script>", "javascript:alert(3)"):
        assert part in answers(page)[0]  # the model does say it
        assert shown.count(part) >= 2
    assert page.locator("#log img, #log script, #log a").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["Escape", "button"])
def test_an_answer_is_stopped_in_the_middle_and_what_was_written_stays(page, server, way):
    set_controls(page, max_tokens="100000")
    say(page, "Look:")
    while len("".join(answers(page))) <= 50:  # the page's policy bars playwright's own waiting
        time.sleep(0.02)
    if way == "Escape":
        page.keyboard.press("Escape")
    else:
        page.locator("#stop").click()
    page.wait_for_selector("#send:visible")
    assert seconds_until_idle(server) < 2
    (text,) = answers(page)
    assert 50 < len(text) < 100_000
    assert page.locator(".assistant .note").inner_text() == "stopped"
    time.sleep(0.3)
    assert answers(page) == [text]
    assert page.evaluate("document.activeElement.id") == "prompt"


@pytest.mark.slow
def test_retry_writes_anew_go_on_adds_and_clear_empties(page):
    set_controls(page, max_tokens="30")
    say(page, "Look:")
    wait_until_written(page)
    (first,) = answers(page)
    set_controls(page, max_tokens="10")
    page.locator("#retry").click()
    page.get_by_text("10 tokens").wait_for()
    (second,) = answers(page)
    assert (len(first), second) == (30, first[:10])
    page.locator("#more").click()
    page.locator(".text", has_text=f"Look:{first[:20]}".removeprefix("Look:")).wait_for()
    assert len(answers(page)[0]) <= 20
    page.locator("#clear").click()
    assert answers(page) == []
    assert page.locator("#welcome").is_visible()
    assert page.locator("#retry").is_hidden()


@pytest.mark.slow
def test_a_refusal_is_shown_and_so_is_a_server_that_has_gone(open_page, run):
    with Server(run, "--answer-limit", "200") as server:
        page = open_page(server.url)
        page.expected += ["400 (Bad Request)", "ERR_CONNECTION_REFUSED"]
        page.wait_for_selector("#facts dd")
        set_controls(page, max_tokens="201")
        say(page, "Look:")
        note = page.locator(".note.problem")
        note.wait_for()
        assert "from 1 to 200" in note.inner_text()
        server.process.kill()
        server.process.wait()
        page.locator("#retry").click()
        page.get_by_text("The server does not answer.").wait_for()


# ------------------------------------------------------------------- controls and facts


@pytest.mark.slow
def test_controls_begin_with_the_runs_values_and_are_what_is_asked_for(open_page):
    page = open_page()
    page.wait_for_selector("#facts dd")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed")
    begun = {name: page.locator(f"#{name}").input_value() for name in names}
    assert begun == {
        "temperature": "0.7",
        "top_k": "50",
        "top_p": "0.9",
        "min_p": "0",
        "repetition_penalty": "1",
        "max_tokens": "20",
        "seed": "",
    }
    chosen = {"temperature": "0.35", "top_k": "3", "top_p": "0.5", "min_p": "0.1"}
    chosen |= {"repetition_penalty": "1.2", "max_tokens": "7", "seed": "5"}
    set_controls(page, **chosen)
    assert page.locator("#temperature-shown").inner_text() == "0.35"
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Look:")
    wait_until_written(page)
    body = json.loads(asked.value.post_data)
    assert {name: body[name] for name in names} == {n: float(v) for n, v in chosen.items()}
    set_controls(page, top_k="")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Look:")
    assert json.loads(asked.value.post_data)["top_k"] is None
    page.locator("#reset").click()
    assert {name: page.locator(f"#{name}").input_value() for name in names} == begun


@pytest.mark.slow
def test_the_picture_and_the_facts_of_the_run_are_shown(page, run):
    picture = page.locator("#picture img")
    page.wait_for_selector("#picture img:visible")
    assert picture.evaluate("(img) => img.decode().then(() => img.naturalWidth)") > 100
    assert "loss" in picture.get_attribute("alt")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    shown = page.locator("#facts").inner_text()
    assert f"{summary['parameters']:,}" in shown
    assert f"{summary['final_val_loss']:.3f}" in shown
    assert "text.txt" in shown
    assert page.locator("#name").inner_text() == page.title() == "tiny"
    page.locator("#picture").click()
    assert page.locator("#large img").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#large").is_hidden()


@pytest.mark.slow
def test_a_server_with_a_token_asks_for_it(open_page, run):
    with Server(run, "--token", "open-sesame") as server:
        page = open_page(server.url)
        page.expected.append("401 (Unauthorized)")
        page.locator("#token").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("That is not the token.").wait_for()
        page.locator("#token").fill("open-sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#picture img:visible")
        assert page.locator("#ask").is_hidden()
        say(page, "Look:")
        wait_until_written(page)
        assert answers(page)[0]


# ------------------------------------------------------------------------------- for all


@pytest.mark.slow
def test_all_of_it_works_with_the_keyboard_alone(open_page):
    page = open_page()
    page.wait_for_selector("#picture img:visible")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("Look:")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("<img")
    assert page.locator("#prompt").input_value() == "Look:\n<img"
    assert answers(page) == []
    page.keyboard.press("Enter")
    wait_until_written(page)
    assert page.locator(".user .text").text_content() == "Look:\n<img"
    reached = {}
    for _ in range(25):
        page.keyboard.press("Tab")
        name, frame = page.evaluate(
            """() => {
              const focused = document.activeElement, style = getComputedStyle(focused);
              const composer = getComputedStyle(document.getElementById("composer"));
              const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
              return [focused.id, outlined || composer.boxShadow !== "none"];
            }"""
        )
        reached[name] = frame
    controls = page.locator("button:visible, input:visible, textarea:visible").all()
    assert {control.get_attribute("id") for control in controls} <= reached.keys()
    assert "log" in reached  # it scrolls
    assert all(frame for name, frame in reached.items() if name)
    page.locator("#retry").focus()
    page.keyboard.press("Enter")
    wait_until_written(page)
    assert page.evaluate("document.activeElement.id") == "prompt"


@pytest.mark.slow
def test_enter_takes_the_suggestion_of_an_input_method_and_does_not_send(page):
    page.locator("#prompt").fill("chun")
    # while composing; and WebKit's, which ends composing before the key that ended it
    for sign in ("isComposing: true", "keyCode: 229"):
        page.locator("#prompt").evaluate(
            f"""(prompt) => prompt.dispatchEvent(new KeyboardEvent("keydown",
             {{key: "Enter", {sign}, bubbles: true, cancelable: true}}))"""
        )
    assert page.locator("#prompt").input_value() == "chun"
    assert page.locator(".message").count() == 0


@pytest.mark.slow
def test_every_control_has_a_name_and_answers_are_announced(page):
    page.wait_for_selector("#picture img:visible")
    say(page, "Look:")
    wait_until_written(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, aside, [role=log], img")]
          .filter((e) => !e.ariaLabel && !e.labels?.length && !e.textContent.trim())
          .filter((e) => e.alt === undefined || (e.alt === "" && e.className !== "mark"))
          .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    log = page.locator("#log")
    assert (log.get_attribute("role"), log.get_attribute("aria-live")) == ("log", "polite")
    assert log.get_attribute("aria-busy") == "false"
    assert page.locator(".assistant").text_content().startswith("The model: ")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_both_readable(open_page, scheme):
    page = open_page(color_scheme=scheme)
    page.wait_for_selector("#facts dd")
    say(page, "Look:")
    wait_until_written(page)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")
    parts = ["#name", "#summary", ".user .text", ".assistant .text", ".note", "#keys", "#send"]
    parts += ["#retry", "#facts dt", "#facts dd", "label[for=top_k]", "#top_k", ".field output"]
    contrasts = dict(zip(parts, page.evaluate(CONTRAST, parts), strict=True))
    assert {part: contrast for part, contrast in contrasts.items() if contrast < 4.5} == {}


@pytest.mark.slow
def test_a_phone_scrolls_in_one_direction_only(open_page):
    page = open_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page.wait_for_selector("#facts dd", state="attached")
    wide = "() => document.scrollingElement.scrollWidth > innerWidth || scrollX > 0"
    assert not page.evaluate(wide)
    say(page, "W" * 300)
    wait_until_written(page)
    assert not page.evaluate(wide)
    assert page.locator("#log").evaluate("(log) => log.scrollWidth <= log.clientWidth")
    for button in ("#send", "#retry", "#more", "#clear", "#toggle"):
        box = page.locator(button).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 640
    assert page.locator("#temperature").is_hidden()
    page.locator("#toggle").tap()
    assert page.locator("#temperature").is_visible()
    assert page.locator("#toggle").get_attribute("aria-expanded") == "true"
    assert not page.evaluate(wide)
    assert page.locator("#panel").evaluate("(panel) => panel.scrollWidth <= panel.clientWidth")
    page.locator("#toggle").tap()
    assert page.locator("#prompt").is_visible()


@pytest.mark.slow
def test_a_chinese_browser_gets_a_chinese_page(open_page):
    page = open_page(locale="zh-CN")
    page.wait_for_selector("#facts dd")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.locator("#send").inner_text() == "发送"
    assert page.locator("#prompt").get_attribute("placeholder") == "写个开头……"
    assert page.locator("#log").get_attribute("aria-label") == "对话"
    assert page.get_by_text("续写").is_visible()
    say(page, "春江")
    page.get_by_text("20 个词元").wait_for()


@pytest.mark.slow
def test_the_page_says_that_the_model_continues_text_joined_with_blank_lines(page):
    assert page.get_by_text("This model continues text").is_visible()
    assert page.get_by_text("joined with blank lines").is_visible()


def test_both_languages_have_every_string_that_the_page_shows():
    script = (REPOSITORY / "scripts" / "serving" / "page.js").read_text(encoding="utf-8")
    markup = (REPOSITORY / "scripts" / "serving" / "page.html").read_text(encoding="utf-8")
    english, chinese = re.findall(r"\n  (?:en|zh): \{\n(.*?)\n  \},", script, re.DOTALL)
    names = re.findall(r"^    (\w+):", english, re.MULTILINE)
    assert names == re.findall(r"^    (\w+):", chinese, re.MULTILINE)
    used = set(re.findall(r'data-(?:text|label|alt|placeholder)="(\w+)"', markup))
    used |= set(re.findall(r"strings\.(\w+)", script)) | {"user", "assistant"}
    assert used == set(names)
