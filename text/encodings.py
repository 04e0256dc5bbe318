"""Which encoding a text is in: by its mark, by its NULs, or by trial."""

import codecs
import re

from engine.words import AS_SET, Words

SAMPLE_BYTES = 1 << 14  # enough to tell one encoding from another
FAR_LIKELIER = 0.4  # of plausibilities: right ones are less than this below the best, others more
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is its prefix
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# the commonest letters of what each encoding is used for, which a wrong reading hardly gives
_SIMPLIFIED = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
)
_TRADITIONAL = (
    "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡"
    "用道行所然家種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實"
)
_JAPANESE = "".join(map(chr, range(0x3041, 0x3097))) + "アイクスタトドラリルレロンーッ、。"
_KOREAN = (
    "이다는의에가을고하지로도한은를기사리그나서어들자있아시대일인스라만보해여정부수장전으것과게면오"
    "제상구주았었니러각생물성내원동무공소비마조"
)
_WESTERN = "äöüßéèêàâçñáíóúîôûùëïãõåøæœÄÖÜÉÈÀÇÑÁÍÓÚÅØÆ’‘“”„–—…«»¿¡€°§·ºª"
_CYRILLIC = "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъёіїєґ«»—–…№"
_COMMON = {
    "utf-16-le": _SIMPLIFIED + _TRADITIONAL + _JAPANESE + _KOREAN + _CYRILLIC,
    "utf-16-be": _SIMPLIFIED + _TRADITIONAL + _JAPANESE + _KOREAN + _CYRILLIC,
    "gb18030": _SIMPLIFIED + "，。、“”",
    "big5": _TRADITIONAL + "，。、「」",
    "shift_jis": _JAPANESE,
    "euc-kr": _KOREAN,
    "cp1252": _WESTERN,
    "cp1251": _CYRILLIC,
    "latin-1": _WESTERN,
}
_EAST_ASIAN = ("gb18030", "big5", "shift_jis", "euc-kr", "utf-16-le", "utf-16-be")
_LETTERS = re.compile(
    r"[\t\n\r -~\xa0-\u052f\u0590-\u06ff\u0900-\u0e7f\u2010-\u2027\u2030-\u205e\u20a0-\u20bf"
    r"\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uff5e]"
)
_ODD = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ue000-\uf8ff\ufffd\uff61-\uff9f]")
_CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1f]")
_BETWEEN_LATIN = re.compile(r"[A-Za-z][^\x00-\x7f][A-Za-z]")
_TWO_WESTERN = re.compile(r"[\xc0-\xff](?=[\xc0-\xff])")


def codec_of(start: bytes, encoding: str | None) -> tuple[str, int, Words | None]:
    """The codec of a text with this start, the length of its byte-order mark, and why, if it is
    not the usual one."""
    for mark, codec in _MARKS:
        if start.startswith(mark):
            return codec, len(mark), Words("by its byte-order mark", "依据字节顺序标记")
    if encoding:
        return encoding, 0, AS_SET
    if wide := _wide_codec(start):
        return wide, 0, Words("by where its NULs are", "依据 NUL 的位置")
    return "utf-8", 0, None


def _wide_codec(start: bytes) -> str | None:
    """ "utf-16-le" or "utf-16-be" if NULs are where only one of these has them."""
    start = start[:SAMPLE_BYTES]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if (not even and not odd) or min(even, odd) > 0.01 * max(even, odd):
        return None
    # text with a stray NUL: what is not ASCII has bytes in UTF-16 that are control characters
    is_ascii = start.isascii() and not _CONTROL.search(start)
    if is_ascii and 3 * max(even, odd) < len(start) // 2:
        return None
    codec = "utf-16-le" if odd > even else "utf-16-be"
    try:
        text = start[: len(start) // 2 * 2].decode(codec)
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # no character that goes on behind the sample
            return None
        text = start[: error.start].decode(codec)
    # binary numbers, too, have NULs at every other byte, but give signs of all scripts
    return codec if len(_LETTERS.findall(text)) >= max(2, 0.95 * len(text)) else None


def likely_encodings(sample: bytes) -> list[str]:
    """The encodings that decode a sample into plausible text, best first; none for binary data.

    The sample begins where a character does. It may end within one.
    """
    scores = _scores_of(sample)
    return sorted((name for name, score in scores.items() if score > 0.1), key=lambda n: -scores[n])


def likelier_encoding(sample: bytes, encoding: str) -> str | None:
    """The encoding that a sample is far likelier in than the one that is set, if there is one.

    Only encodings of one byte a character are doubted: they decode anything, and the others fail.
    """
    doubted = {"iso8859-1": "latin-1", "cp1252": "cp1252", "cp1251": "cp1251"}
    as_set = doubted.get(codecs.lookup(encoding).name)
    if as_set is None:
        return None
    scores = _scores_of(sample)
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] - scores.get(as_set, 0.0) > FAR_LIKELIER else None


def _scores_of(sample: bytes) -> dict[str, float]:
    """How plausible a sample is in each of the encodings that decode it, at most 1."""
    damaged = sample.decode("utf-8", "replace")
    wide = sum(ord(letter) > 127 for letter in damaged)
    if wide and damaged.count("\ufffd") <= 0.2 * wide:  # other encodings give hardly any UTF-8
        return {"utf-8": 1.0}
    decoded = ((encoding, _decoded(sample, encoding)) for encoding in _COMMON)
    return {name: _plausibility(text, name) for name, text in decoded if text is not None}


def _decoded(sample: bytes, encoding: str) -> str | None:
    """The sample as text, but for a character at its end; None if it is not in this encoding."""
    codec = {"shift_jis": "cp932", "euc-kr": "cp949"}.get(encoding, encoding)  # their supersets
    if encoding.startswith("utf-16") and len(sample) % 2:
        sample = sample[:-1]
    try:
        return sample.decode(codec)
    except UnicodeDecodeError as error:
        if error.start < len(sample) - 4:
            return None
        return sample[: error.start].decode(codec)


def _plausibility(text: str, encoding: str) -> float:
    """How much of a text's non-ASCII part is what the encoding is used for: at most 1."""
    common = _COMMON[encoding]
    foreign = [letter for letter in text if letter > "\x7f"]
    if not foreign:
        return 0.0
    points = float(sum(letter in common for letter in foreign))
    if encoding in _EAST_ASIAN:  # a hundred letters are half of what is written there
        points *= 2
        points = min(points, len(foreign))
    odd = len(_ODD.findall(text))
    mixed = 0
    if encoding in ("cp1252", "latin-1"):
        mixed = len(_TWO_WESTERN.findall(text))
    elif not encoding.startswith("utf-16"):
        mixed = len(_BETWEEN_LATIN.findall(text))
    return (points - 2 * odd - mixed) / len(foreign)
