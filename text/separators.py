"""Text files of many documents: where one ends and the next begins."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

FORMS = ("line", "blank-line", "file")  # what a separator may be, beside a text
LOOKED_AT = 1 << 20  # characters in which a file's own markers are looked for
SURE_MARKERS = ("<|endoftext|>", "<|end_of_text|>")
_ENDS = (*SURE_MARKERS, "<|eos|>", "<eos>", "</s>", "<s>")
_START = r"(?:<\|startoftext\|>|<\|begin_of_text\|>|<\|startofdoc\|>|<bos>|<s>)"
_BLANKS = r"(?:[ \t]{0,32}\r?\n){0,8}"  # bounded, so that a search takes linear time
_FEW = 3  # markers within lines, from which on they divide documents


@dataclass(frozen=True)
class Separator:
    """What stands between documents, and at most before the first."""

    between: re.Pattern[str]
    before: re.Pattern[str]
    longest: int  # characters by which a match may begin before, or grow with what follows
    name: str


def separator_of(asked: str) -> Separator | None:
    """The separator that DATA["separator"] names; None for "file", which divides nothing."""
    nothing = re.compile("")
    if asked == "file":
        return None
    if asked == "line":
        return Separator(re.compile(r"\r?\n"), nothing, 2, asked)
    if asked == "blank-line":
        return Separator(re.compile(r"\r?\n(?:[ \t]{0,32}\r?\n){1,32}"), nothing, 40, asked)
    text = r"\r?\n".join(map(re.escape, asked.replace("\r\n", "\n").split("\n")))
    if not asked.strip():
        return Separator(re.compile(text), nothing, 2 * len(asked), asked)
    return _marker(text, asked)


def _marker(text: str, name: str) -> Separator:
    """A marker with the line ends around it, and with what may begin a document after it."""
    between = re.compile(f"(?:\\r?\\n){{0,8}}[ \\t]{{0,32}}{text}{_BLANKS}(?:{_START}{_BLANKS})?")
    return Separator(between, re.compile(_START + _BLANKS), 2 * len(name) + 96, name)


def find_marker(start: str) -> Separator | None:
    """The marker that divides a text with this start into documents, if there is one.

    It stands alone on a line, or at least _FEW times where a document may end: at a line's end or
    after a full stop, and hardly anywhere else. A text that only mentions a marker has none.
    """
    for marker in _ENDS:
        count = start.count(marker)
        if not count:
            continue
        text = re.escape(marker)
        alone = len(re.findall(rf"^[ \t]*{text}[ \t]*\r?$", start, re.MULTILINE))
        # inside a line "</s>" strikes out in HTML, so it ends a document only at a line's end
        after = r"[.!?。！？…\"'”’」』)\n]" if marker.startswith("<|") else r"[^\n]"
        behind = r"(?![\"'`”’」』)])" if marker.startswith("<|") else r"[ \t]*\r?$"
        ends = len(re.findall(rf"(?<={after}){text}{behind}", start, re.MULTILINE))
        if (alone and alone >= 0.5 * count) or max(ends, alone) >= max(_FEW, 0.9 * count):
            return _marker(text, marker)
    return None


def divide(pieces: Iterable[str], separator: Separator) -> Iterator[Iterator[str]]:
    """The documents of a text in pieces, each as pieces; read each to its end before the next.

    Memory holds one piece and what may be the beginning of a separator.
    """
    stream = iter(pieces)
    buffer, more = next(stream, ""), True
    found = separator.before.match(buffer)
    at = found.end() if found else 0

    def extend(kept: int) -> bool:
        """Drop the buffer up to `kept` and add a piece; whether there is one."""
        nonlocal buffer, at, more
        piece = next(stream, None)
        more = piece is not None
        buffer, at = buffer[kept:] + (piece or ""), 0
        return more

    def document() -> Iterator[str]:
        nonlocal at
        while True:
            match = separator.between.search(buffer, at)
            if match and (match.end() + separator.longest <= len(buffer) or not more):
                yield buffer[at : match.start()]
                at = match.end()
                return
            # a separator may begin in this piece and end in the next
            kept = match.start() if match else max(at, len(buffer) - separator.longest)
            yield buffer[at:kept]
            if not more:
                yield buffer[kept:]
                at = len(buffer)
                return
            extend(kept)

    while at < len(buffer) or (more and extend(at)):
        yield document()
