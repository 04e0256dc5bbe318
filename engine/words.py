"""What the pages say in English and in Chinese; the console says it in English."""

from typing import Any, NamedTuple


class Words(NamedTuple):
    """A sentence, or a part of one, in both languages."""

    en: str
    zh: str

    @classmethod
    def of(cls, value: Any) -> "Words":
        """Words as JSON gives them back, a pair; anything else is the same in both languages."""
        if isinstance(value, list | tuple) and len(value) == 2:
            return cls(*map(str, value))
        return cls(str(value), str(value))


AS_SET = Words("as set", "已设定")
