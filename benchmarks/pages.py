"""The pages with tables that are written from records, between markers: the README and the documentation's.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what is between is replaced.
"""

import re
from collections.abc import Callable

from whisper_meft.errors import UserError

from . import record, summary, tables

PAGES = tuple(record.ROOT / page for page in ("README.md", "docs/benchmarks.md", "docs/results.md"))
TABLES: dict[str, Callable[[list[dict]], list[str]]] = {**tables.TABLES, "summary": summary.summary}
_MARKED = re.compile(
    r"^(?P<indent> *)<!-- table: (?P<name>\S+) -->\n(?P<old>.*?)^ *<!-- end of table -->$",
    re.MULTILINE | re.DOTALL,
)


def filled(text: str, records: list[dict]) -> str:
    """``text`` with the content of every marked table written from the records.

    Raises:
        UserError: an unknown table, or a marker without its end.
    """

    def table(match: re.Match) -> str:
        name, indent = match["name"], match["indent"]
        if name not in TABLES:
            raise UserError(f"table must be one of {', '.join(TABLES)}, got {name!r}")
        content = "\n\n".join(TABLES[name](records)) or "(no results yet)"
        lines = [f"<!-- table: {name} -->", *content.split("\n"), "<!-- end of table -->"]
        return "\n".join(f"{indent}{line}".rstrip() for line in lines)

    result = _MARKED.sub(table, text)
    if result.count("<!-- table:") != result.count("<!-- end of table -->"):
        raise UserError("every <!-- table: NAME --> must be followed by <!-- end of table -->")
    return result
