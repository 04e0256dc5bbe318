"""The server's page in a real browser: a conversation, hostile text, the keyboard, a phone."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import environment
from tests import by_heart
from tests.by_heart import ENDLESS, SHOWN
from tests.conftest import REPOSITORY
from tests.launching import wait_until
from tests.serving import LONG, Server, continued

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
HOSTILE = "<img src=x onerror=alert(1)> </script><script>alert(2)</script> javascript:alert(3)"
# the template of a model that has a story by heart, which it goes on with
JOINED = "{% for message in messages %}{{ message.content }}{% endfor %}"
MARKDOWN = """\
# Three *fruits*
Here are **three** of them,
with `code <b>` and <i>no</i> HTML:

1. Apple
2. 这是**重点**内容
   - ripe
   - 2*3*4 and snake_case_name
3. ***Cherry***

```python
if a < b:
    print("**no** bold")
```
# [link](javascript:alert(1)) ![](x) \\*star\\* **open
"""
SHOWN_AS = (
    "<h3>Three <em>fruits</em></h3>"
    "<p>Here are <strong>three</strong> of them,\nwith <code>code &lt;b&gt;</code> and "
    "&lt;i&gt;no&lt;/i&gt; HTML:</p>"
    "<div><ol><li>Apple</li><li>这是<strong>重点</strong>内容"
    "<ul><li>ripe</li><li>2*3*4 and snake_case_name</li></ul></li>"
    "<li><strong><em>Cherry</em></strong></li></ol></div>"
    '<div class="code"><div><span>python</span><button type="button">Copy</button></div>'
    '<pre tabindex="0"><code>if a &lt; b:\n    print("**no** bold")</code></pre></div>'
    "<h3>[link](javascript:alert(1)) ![](x) *star* **open</h3>"
)
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
    copy = tmp_path_factory.mktemp("page") / "tiny"
    shutil.copytree(by_heart.tiny_run(tmp_path_factory), copy)
    shutil.copy(REPOSITORY / "docs" / "training_losses.png", copy)
    return copy


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
    with Server(run) as server:
        yield server


@pytest.fixture
def open_page(browser, server):
    """Opens the page; at the end nothing was asked of any other host, and nothing was wrong."""
    asked, wrong, contexts = [], [], []

    def open_page(url: str = server.url, **options):
        context = browser.new_context(**{"locale": "en-US"} | options)
        contexts.append(context)
        context.set_default_timeout(120_000)
        context.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error(e.blockedURI))"
        )
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        if not expected:
            page.wait_for_selector("#picture img[src^=blob]", state="attached")
        return page

    expected = open_page.expected = []  # what a test may find in the console
    yield open_page
    for context in contexts:
        context.close()
    assert asked
    hosts = {re.sub(r"^(blob:)?(\w+://[^/]*).*", r"\2", url) for url in asked}
    assert all(re.fullmatch(r"http://127\.0\.0\.1:\d+", host) for host in hosts) and len(hosts) == 1
    assert [text for text in wrong if not any(part in text for part in expected)] == []


@pytest.fixture(scope="module")
def chat_server(run, browser) -> Iterator[Server]:
    with Server(run, chat_template=JOINED) as server:
        yield server


@pytest.fixture
def page(open_page):
    page = open_page()
    set_controls(page, max_tokens="20")
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


def click(page, button: str) -> None:
    """Click, and wait until what that asks for is written."""
    page.locator(button).click()
    page.wait_for_selector("#retry:visible")


def asked(page, text: str) -> dict:
    """Say something, and wait for its answer; the body of the request."""
    with page.expect_request("**/v1/chat/completions") as request:
        say(page, text)
    page.wait_for_selector("#retry:visible")
    return json.loads(request.value.post_data)


def test_a_conversation_goes_on_from_all_that_was_said_and_is_written_anew_or_cleared(page, run):
    model = environment.load_run(run, weights="fp32", device="cpu")
    asked(page, "The ferry")
    first = continued(model, "The ferry")
    assert answers(page) == [first]
    assert re.match(r"20 tokens · \d+ tokens/s", page.locator(".note").inner_text())
    messages = asked(page, ENDLESS)["messages"]
    whole = f"The ferry\n\n{first}\n\n{ENDLESS}"
    second = continued(model, whole)
    assert answers(page) == [first, second]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == first
    set_controls(page, max_tokens="10")
    click(page, "#retry")
    assert answers(page) == [first, second[:10]]
    click(page, "#more")
    more = continued(model, f"{whole}\n\n{second[:10]}", max_new_tokens=10)
    assert answers(page) == [first, second[:10] + more]
    page.locator("#clear").click()
    assert answers(page) == []
    assert page.locator("#welcome").is_visible()
    assert page.locator("#retry").is_hidden()
    # of a long conversation the newest part is sent; the cut falls into the middle of a character
    (message,) = asked(page, "😀" * 150_000 + ".")["messages"]
    assert message["content"] == "😀" * 99_999 + "."
    (answer,) = answers(page)
    contents = [m["content"] for m in asked(page, "Its bell")["messages"]]
    assert contents[1:] == [answer, "Its bell"]
    assert 199_998 < sum(len(c.encode("utf-16-le")) // 2 for c in contents) <= 200_000
    assert page.locator(".problem").count() == 0


def answer_with(page, *pieces: str) -> None:
    """Answer what the page asks for with a stream of these pieces."""
    chunks = [{"choices": [{"delta": {"content": p}, "finish_reason": None}]} for p in pieces]
    chunks += [{"choices": [{"delta": {"content": ""}, "finish_reason": "stop"}]}]
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    body = "".join([*events, "data: [DONE]\n\n"])
    headers = {"content-type": "text/event-stream; charset=utf-8"}
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, headers=headers))


def test_hostile_text_of_the_user_and_of_the_model_is_shown_as_text(page):
    answer_with(page, HOSTILE)
    asked(page, HOSTILE)
    assert answers(page) == [HOSTILE]
    assert page.locator("#log").inner_text().count(HOSTILE) == 2
    assert page.locator("#log img, #log script, #log a").count() == 0


def test_an_answer_is_stopped_in_the_middle_and_what_was_written_stays(page, server):
    set_controls(page, max_tokens=str(LONG))
    for n, way in enumerate(("Escape", "button")):
        say(page, ENDLESS)
        wait_until(lambda n=n: len("".join(answers(page)[n:])) > 50)
        if way == "Escape":
            page.keyboard.press("Escape")
        else:
            page.locator("#stop").click()
        page.wait_for_selector("#send:visible")
        assert server.has_cancelled()
        text = answers(page)[n]
        assert 50 < len(text) < LONG
        assert page.locator(".assistant .note").nth(n).inner_text() == "stopped"
        assert server.is_alive() and answers(page)[n] == text
        assert page.evaluate("document.activeElement.id") == "prompt"


def test_a_server_with_a_token_asks_for_it_and_a_refusal_or_a_lost_server_is_shown(open_page, run):
    token = "open-sesame"
    with Server(run, "--token", token, "--answer-limit", "200", token=token) as server:
        open_page.expected += ["401 (Unauth", "400 (Bad Request)", "ERR_CONNECTION_REFUSED"]
        page = open_page(server.url)
        page.locator("#token").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("That is not the token.").wait_for()
        page.locator("#token").fill(token)
        page.keyboard.press("Enter")
        page.wait_for_selector("#picture img:visible")
        assert page.locator("#ask").is_hidden()
        asked(page, "The ferry")
        assert answers(page)[0]
        set_controls(page, max_tokens="-1")
        say(page, "Its bell")
        note = page.locator(".note.problem")
        note.wait_for()
        assert "a whole number from 1; this server writes 200" in note.inner_text()
    page.locator("#retry").click()
    page.get_by_text("The server does not answer.").wait_for()


def test_the_run_is_shown_and_its_controls_are_what_is_asked_for(open_page, run):
    page = open_page()
    assert page.get_by_text("This model continues text").is_visible()
    assert page.get_by_text("joined with blank lines").is_visible()
    image = page.locator("#picture img")
    assert image.evaluate("(img) => img.decode().then(() => img.naturalWidth)") > 100
    assert "loss" in image.get_attribute("alt")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    shown = page.locator("#facts").inner_text()
    for fact in (f"{summary['parameters']:,}", f"{summary['final_val_loss']:.3f}", "train.jsonl"):
        assert fact in shown
    assert page.locator("#name").inner_text() == page.title() == "tiny"
    page.locator("#picture").click()
    assert page.locator("#large img").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#large").is_hidden()

    def controls() -> dict[str, str]:
        return {name: page.locator(f"#{name}").input_value() for name in begun}

    begun = {"temperature": "0", "top_k": "50", "top_p": "0.9", "min_p": "0", "seed": ""}
    begun |= {"repetition_penalty": "1", "max_tokens": "100"}
    assert controls() == begun
    chosen = {"temperature": "0.35", "top_k": "3", "top_p": "0.5", "min_p": "0.1", "seed": "5"}
    chosen |= {"repetition_penalty": "1.2", "max_tokens": "7"}
    set_controls(page, **chosen)
    assert page.locator("#temperature-shown").inner_text() == "0.35"
    body = asked(page, "The ferry")
    assert {name: body[name] for name in begun} == {n: float(v) for n, v in chosen.items()}
    set_controls(page, top_k="")
    assert asked(page, "The ferry")["top_k"] is None
    page.locator("#reset").click()
    assert controls() == begun


def test_all_of_it_works_with_the_keyboard_alone_and_has_names_that_are_read_out(open_page):
    page = open_page()
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("The")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("ferry")
    # Enter while composing takes a suggestion; WebKit ends composing before the key that ended it
    for sign in ("isComposing: true", "keyCode: 229"):
        page.locator("#prompt").evaluate(
            f"""(prompt) => prompt.dispatchEvent(new KeyboardEvent("keydown",
             {{key: "Enter", {sign}, bubbles: true, cancelable: true}}))"""
        )
    assert page.locator("#prompt").input_value() == "The\nferry"
    assert page.locator(".message").count() == 0
    page.keyboard.press("Enter")
    page.wait_for_selector("#retry:visible")
    assert page.locator(".user .text").text_content() == "The\nferry"
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
    page.wait_for_selector("#retry:visible")
    assert page.evaluate("document.activeElement.id") == "prompt"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, aside, [role=log], img")]
          .filter((e) => !e.ariaLabel && !e.labels?.length && !e.textContent.trim())
          .filter((e) => e.alt === undefined || (e.alt === "" && e.className !== "mark"))
          .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    log = page.locator("#log")
    attributes = [log.get_attribute(name) for name in ("role", "aria-live", "aria-busy")]
    assert attributes == ["log", "polite", "false"]
    assert page.locator(".assistant").text_content().startswith("The model: ")


def test_light_and_dark_are_both_readable(page):
    asked(page, "The ferry")
    parts = ["#name", "#summary", ".user .text", ".assistant .text", ".note", "#keys", "#send"]
    parts += ["#retry", "#facts dt", "#facts dd", "label[for=top_k]", "#top_k", ".field output"]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")
        contrasts = dict(zip(parts, page.evaluate(CONTRAST, parts), strict=True))
        assert {part: contrast for part, contrast in contrasts.items() if contrast < 4.5} == {}


def test_a_phone_gets_a_chinese_page_that_scrolls_in_one_direction_only(open_page):
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    page = open_page(locale="zh-CN", **phone)
    wide = "() => document.scrollingElement.scrollWidth > innerWidth || scrollX > 0"
    assert not page.evaluate(wide)
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.locator("#send").inner_text() == "发送"
    assert page.locator("#prompt").get_attribute("placeholder") == "写个开头……"
    assert page.locator("#log").get_attribute("aria-label") == "对话"
    assert page.get_by_text("续写").is_visible()
    asked(page, "W" * 300 + ENDLESS)
    assert page.get_by_text("100 个词元").is_visible()
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


# ------------------------------------------------------------------------------ a chat model


def test_a_chat_model_has_a_system_prompt_and_what_was_said_is_edited_and_continued(
    open_page, chat_server
):
    page = open_page(chat_server.url, permissions=["clipboard-read", "clipboard-write"])
    assert page.get_by_text("This model answers by what it has learnt").is_visible()
    assert page.get_by_text("This model continues text").is_hidden()
    assert page.locator("#prompt").get_attribute("placeholder") == "Ask something …"
    set_controls(page, system=" The ", max_tokens="5", temperature="0")
    assert asked(page, " ferry")["messages"] == [
        {"role": "system", "content": "The"},
        {"role": "user", "content": " ferry"},
    ]
    story = SHOWN.removeprefix("The ferry")
    assert answers(page) == [story[:5]]
    assert "cut off" in page.locator(".note").inner_text()
    with page.expect_request("**/v1/chat/completions") as request:
        click(page, "#more")
    sent = json.loads(request.value.post_data)["messages"]
    assert [m["role"] for m in sent] == ["system", "user", "assistant"]
    assert sent[-1]["content"] == story[:5]
    assert answers(page) == [story[:10].rstrip()]
    page.locator(".assistant .tools button").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == story[:10]
    # the second message is edited: the first stays, and what came after it goes
    asked(page, "!")
    page.locator(".user .tools button").nth(3).click()
    editor = page.locator(".user textarea")
    assert editor.input_value() == "!"
    editor.press("Escape")
    assert page.locator("textarea").count() == 2  # the system prompt and the next message
    assert page.evaluate("document.activeElement.textContent") == "Edit"
    page.keyboard.press("Enter")
    editor.fill("?")
    with page.expect_request("**/v1/chat/completions") as request:
        editor.press("Enter")
    page.wait_for_selector("#retry:visible")
    sent = json.loads(request.value.post_data)["messages"]
    assert [m["content"] for m in sent] == ["The", " ferry", story[:10], "?"]
    assert page.locator(".user .text").all_text_contents() == [" ferry", "?"]
    assert page.locator(".assistant").count() == 2
    page.locator(".user .tools button").nth(1).click()
    with page.expect_request("**/v1/chat/completions"):
        page.locator(".user form button.primary").click()
    page.wait_for_selector("#retry:visible")
    assert page.locator(".message").count() == 2
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_an_edit_in_the_middle_of_an_answer_stops_it(open_page, chat_server):
    page = open_page(chat_server.url)
    failed = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.route("**/v1/chat/completions", lambda route: None)  # which never answers
    say(page, "Its bell")
    page.locator(".user .tools button").nth(1).click()
    page.locator(".user textarea").fill("The ferry")
    answer_with(page, "crossed")
    page.locator(".user textarea").press("Enter")
    page.wait_for_selector("#retry:visible")
    assert len(failed) == 1
    assert page.locator(".user .text").all_text_contents() == ["The ferry"]
    assert answers(page) == ["crossed"]


def test_a_question_that_was_not_answered_is_not_sent_again_with_the_next(open_page, chat_server):
    page = open_page(chat_server.url)
    answer_with(page, "crossed")
    asked(page, "The ferry")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: None)  # which never answers
    say(page, "Its bell")
    page.wait_for_selector("#stop:visible")
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    answer_with(page, "rang")
    sent = asked(page, "Its horn")["messages"]
    assert [m["content"] for m in sent] == ["The ferry", "crossed", "Its horn"]


def test_markdown_is_shown_as_it_grows_and_all_else_as_text(open_page, chat_server):
    page = open_page(chat_server.url, permissions=["clipboard-read", "clipboard-write"])
    for pieces in ([MARKDOWN], list(MARKDOWN)):
        answer_with(page, *pieces)
        asked(page, "**no** markdown")
        assert page.locator(".assistant .text").last.inner_html() == SHOWN_AS
    assert page.locator(".user .text").last.text_content() == "**no** markdown"
    page.locator(".code button").last.click()
    page.get_by_text("Copied").wait_for()
    code = page.evaluate("navigator.clipboard.readText()")
    assert code == 'if a < b:\n    print("**no** bold")'
    # a page over plain HTTP from another machine has no such clipboard
    page.evaluate("delete Navigator.prototype.clipboard; document.oncopy = () => (copied = 1)")
    page.locator(".assistant .tools button").last.click()
    page.wait_for_function("window.copied === 1")
    hostile = f"# {HOSTILE}\n- {HOSTILE}\n**{HOSTILE}** [a](javascript:alert(4))\n> <b>\n| a |\n"
    answer_with(page, hostile)
    asked(page, HOSTILE)
    assert page.locator(".assistant .text").last.inner_text().count(HOSTILE) == 3
    assert page.locator("#log img, #log script, #log a, #log b, #log table").count() == 0


def test_no_markdown_takes_long_however_it_is_written(open_page, chat_server):
    page = open_page(chat_server.url)
    hostile = ["*a ", "**", "`a``b```", "_a_", "*_**__", "\n- a", "\n```\n", " #", "**a *b ", "\\*"]
    texts = [part * (200_000 // len(part)) for part in hostile]
    texts += ["```" + " " * 200_000 + "`x", "# a" + " " * 200_000 + "x", " " * 200_000 + "- x"]
    page.evaluate(
        """async (texts) => {
          const { rendererOf } = await import("/markdown.js");
          for (const text of texts) rendererOf(document.createElement("div"), () => "")(text);
        }""",
        texts,
    )  # a square of their length would be minutes, and the time of a page's test is limited


def test_a_chat_page_suits_the_keyboard_a_phone_light_and_dark(open_page, chat_server):
    page = open_page(chat_server.url, viewport={"width": 400, "height": 700})
    answer_with(page, MARKDOWN)
    asked(page, "W" * 200)
    wide = "() => document.scrollingElement.scrollWidth > innerWidth"
    assert not page.evaluate(wide)
    assert page.locator("#log").evaluate("(log) => log.scrollWidth <= log.clientWidth")
    page.locator(".user .tools button").last.click()
    assert not page.evaluate(wide)
    page.keyboard.press("Escape")
    page.locator("#toggle").click()
    assert page.locator("#system").is_visible()
    assert not page.evaluate(wide)
    page.locator("#toggle").click()
    page.set_viewport_size({"width": 1000, "height": 700})
    page.locator("#prompt").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        page.evaluate("document.activeElement.dataset.reached = 1")
    controls = page.locator("button:visible, input:visible, textarea:visible, pre:visible").all()
    assert [c.inner_html() for c in controls if c.get_attribute("data-reached") != "1"] == []
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, textarea")]
          .filter((e) => !e.ariaLabel && !e.labels?.length && !e.textContent.trim())
          .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    parts = [".text h3", ".text p code", ".text li", ".code span", ".code button", ".code pre"]
    parts += [".user .tools button", ".assistant .tools button", "#system", "#system-hint"]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        contrasts = dict(zip(parts, page.evaluate(CONTRAST, parts), strict=True))
        assert {part: contrast for part, contrast in contrasts.items() if contrast < 4.5} == {}
