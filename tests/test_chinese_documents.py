"""What a machine can see of good Chinese typography, in every Chinese document."""

import re
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for place in (".", "docs")
    for path in (REPOSITORY / place).glob("*.zh-CN.md")
)
FULL_WIDTH = "，。；：！？、（）《》“”"
# "|" divides the cells of a table, and may have blanks around it
BLANKS = re.compile(rf"[{FULL_WIDTH}] +(?=[^\s|])|[^\s|>*#-] +[{FULL_WIDTH}]")
HAN = re.compile("[\u4e00-\u9fff]")
HALF_WIDTH = re.compile(r"[\u4e00-\u9fff][,;!?](?=[\u4e00-\u9fff\s]|$)")
UNITS = re.compile(r"\d ?(s|ms|min|h|GiB)\b|\d(秒|毫秒|分钟|GB|MB)")


def prose(page: str) -> str:
    """A page without code, and without what a program printed; diagrams stay."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = re.compile(r"^ *```(\w*).*?^ *```", re.M | re.S)
    text = blocks.sub(lambda m: m[0] if HAN.search(m[0]) and not m[1] else "", text)
    return re.sub(r"`[^`\n]+`", "`x`", text)


def faults_in(text: str) -> Iterator[str]:
    """Each fault with the words around it."""
    for line in text.splitlines():
        for pattern in (BLANKS, HALF_WIDTH, UNITS):
            for found in pattern.finditer(line):
                yield line[max(0, found.start() - 10) : found.end() + 10]
    # "token" outside of an identifier; 词元 introduces it, once
    words = re.findall(r"词元(?:（token）)?|(?<![\w./-])[Tt]okens?(?![\w-])", text)
    if words and words[0] != "词元（token）":
        yield f"begins with {words[0]}"
    yield from [word for word in words[1:] if word.startswith("词元")]


@pytest.mark.parametrize("page", PAGES)
def test_punctuation_units_and_the_word_for_token(page):
    assert len(PAGES) > 10
    assert list(faults_in(prose(page))) == []


@pytest.mark.parametrize(
    "text",
    ["好， 是", "好 ，是", "是,否", "用了 5 s。", "用了 5秒", "一个 token", "词元（token）和词元"],
)
def test_each_fault_is_found(text):
    assert len(list(faults_in(text))) == 1
