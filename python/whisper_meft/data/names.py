"""Names in any script: when two of them are the same."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable


def composed(text: str) -> str:
    """``text`` with its letters composed (NFC); file systems and spreadsheets differ in that unseen."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def folded(text: str) -> str:
    """``text`` without what is a matter of writing: case, width, composed or not (NFKC and casefold), what
    cannot be seen (a zero-width space, a byte-order mark), and how much white space is between words."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = "".join(each for each in text if unicodedata.category(each) != "Cf")
    return " ".join(text.lower().split())


def whole_number(text: str) -> int | None:
    """The whole number that a field holds, also as a float, as tools write a column with empty fields."""
    digits = re.sub(r"\.0+$", "", text)
    return int(digits) if digits.isdecimal() else None


def normal(name: str) -> str:
    """A column name as it is compared: :func:`folded`, with "_" for what is no letter, mark or digit."""
    text = folded(name)
    kinds = [(each, unicodedata.category(each)) for each in text]
    words = "".join(each if kind[0] in "LMN" else " " for each, kind in kinds if kind != "Cf").split()
    return "_".join(words) or text


def alike(names: Iterable[str]) -> list[list[str]]:
    """Those of the distinct ``names`` that are the same but for how they are written, in groups."""
    groups = defaultdict(list)
    for name in sorted(set(names)):
        groups[folded(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]
