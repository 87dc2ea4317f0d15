"""Makes reStructuredText of this project's docstrings before napoleon reads them.

They follow Google's style with three habits of their own: several arguments on one line, formulas in an
indented block, and the documentation of a dataclass' options in the metadata of its fields.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

# Of ours; napoleon knows more.
SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:")
_NAMES = r"[a-z_]\w*(?:(?:, | … )[a-z_]\w*)*"
_NEXT = re.compile(rf"(?<=[.)]) (?={_NAMES}: )")


def split_arguments(lines: Sequence[str]) -> list[str]:
    """``x: (B, T). weight, bias: (D,).`` on one line as one line for each, in Args and Attributes."""
    found, item, inside = [], None, False
    for line in lines:
        text, indent = line.lstrip(), len(line) - len(line.lstrip())
        if not indent and text:
            inside, item = text in ("Args:", "Attributes:"), None
        if inside and indent and text:
            item = indent if item is None else item
            if indent == item and re.match(rf"{_NAMES}: ", text):
                found += [" " * indent + part for part in _NEXT.split(text)]
                continue
        found.append(line)
    return found


def mark_formulas(lines: Sequence[str]) -> list[str]:
    """Indented blocks that stand alone, outside the sections, become literal blocks."""
    found: list[str] = []
    section = literal = False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            section, literal = line.strip() in SECTIONS, False
        elif indented and not section and not literal:
            if not found or not found[-1]:
                found += ["::", ""]
            literal = True
        found.append(line)
    return found


def options(cls: type) -> Iterator[str]:
    """The fields of a dataclass that are documented in their metadata, as lines of an Args section."""
    for each in dataclasses.fields(cls):
        if text := each.metadata.get("help"):
            made = each.default_factory is not dataclasses.MISSING
            default = each.default_factory() if made else each.default
            shown = "" if default is dataclasses.MISSING else f" Default: ``{default!r}``."
            yield f"    {each.name}: {text}{shown}"


def prepare(app: Any, what: str, name: str, thing: Any, settings: Any, lines: list[str]) -> None:
    """Sphinx' autodoc-process-docstring: changes ``lines`` in place."""
    changed = mark_formulas(split_arguments(lines))
    if what == "class" and dataclasses.is_dataclass(thing):
        described = list(options(thing))
        if described:
            start = next((i for i, line in enumerate(changed) if line in SECTIONS), len(changed))
            changed[start:start] = ["", "Args:", *described, ""]
    lines[:] = changed


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", prepare, priority=400)  # napoleon's is 500
    return {"parallel_read_safe": True}
