"""What the pages are made of: text that stays text, words in two languages, a file that needs no
other one."""

import base64
import functools
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.words import Words

HERE = Path(__file__).resolve().parent
MOST_VALUE = 400  # characters of a value
# characters that change the writing direction, or that no page may contain
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def page(name: str, main: str, *, scripts: Sequence[str] = (), data: Any = None) -> str:
    """A page with a title, a main part that is HTML already, and buttons for its language.

    scripts are names of files, of which language.js, the last one, begins; data is what they read.
    """
    style, script = asset("report.css"), "\n".join(map(asset, (*scripts, "language.js")))
    policy = (
        f"default-src 'none'; style-src '{_hash_of(style)}'; script-src '{_hash_of(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    held = "" if data is None else f'<script type="application/json" id="data">{data}</script>\n'
    return f"""<!doctype html>
<html lang="en" data-language="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(name)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{escaped(name)}</h1>
<div><button type="button" data-speaks="en">English</button>
<button type="button" data-speaks="zh" lang="zh">中文</button></div>
</header>
<main>
{main}
</main>
{held}<script>{script}</script>
</body>
</html>
"""


@functools.cache
def asset(name: str) -> str:
    """The content of a file beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


def _hash_of(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def embedded(value: Any) -> str:
    """A value as JSON that can't end the script element it stands in."""
    content = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return content.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def clean(value: str) -> str:
    """A text without characters that no page may contain."""
    return _CONTROLS.sub("\ufffd", value)


def escaped(value: object, most: int = MOST_VALUE) -> str:
    """Any value as text of a page, at most so many characters of it."""
    content = clean(str(value))
    return html.escape(content if len(content) <= most else f"{content[:most]}…")


def both(words: Words, most: int = 20_000) -> str:
    """Words in both languages, of which the page shows one."""
    if words.en == words.zh:
        return escaped(words.en, most)
    en, zh = escaped(words.en, most), escaped(words.zh, most)
    return f'<span class="en" lang="en">{en}</span><span class="zh" lang="zh">{zh}</span>'


def section(name: str, title: Words, content: str) -> str:
    """A part of a page under a heading."""
    return f'<section id="{name}">\n<h2>{both(title)}</h2>\n{content}\n</section>\n'


def table(rows: Iterable[Sequence[str]], head: Sequence[Words] = ()) -> str:
    """Rows of cells that are HTML already."""
    top = "".join(f"<th>{both(words)}</th>" for words in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="table"><table>{f"<tr>{top}</tr>" if top else ""}\n{body}</table></div>'


def code(lines: Iterable[Words]) -> str:
    """Lines as they are."""
    whole = Words(*map("\n".join, zip(*lines, strict=True)))
    return f"<pre><code>{both(whole)}</code></pre>"
