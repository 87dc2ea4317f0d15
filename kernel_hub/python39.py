"""Sources in the syntax of Python 3.9, the oldest that the Kernel Hub serves.

The package is written for a later one. What differs is little: unions of types with ``|``, which an
annotation evaluates and which become strings, and ``zip(strict=True)``, which ``_python39`` has for all.
Whatever else a later Python brings is for the tests to find.
"""

import ast
import builtins
from pathlib import Path

STRICT_ZIP = "_python39.py"


def lowered(source: str, depth: int) -> str:
    """A module's source, written for Python 3.9.

    Args:
        source: of a module.
        depth: how many folders below the package's it stands in.

    Raises:
        ValueError: a name's value may be a union of types or a number.
    """
    tree = ast.parse(source)
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    text = b"".join(lines)

    def place(node: ast.expr) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    edits = []
    for node in _unions(tree):
        start, end = place(node)
        written = " ".join(text[start:end].decode().split())
        edits.append((start, end, repr(written) if '"' in written else f'"{written}"'))
    zips = [node.func for node in ast.walk(tree) if _is_strict_zip(node)]
    edits += [(*place(name), "strict_zip") for name in zips]
    for start, end, written in sorted(edits, reverse=True):
        text = text[:start] + written.encode() + text[end:]
    if not zips:
        return text.decode()
    return _with_import(text.decode(), f"from {'.' * (depth + 1)}{Path(STRICT_ZIP).stem} import strict_zip")


def _unions(tree: ast.Module) -> list[ast.expr]:
    """Annotations that hold a union, and values of a module's or a class's names that are one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            found.append(node.returns)
        elif isinstance(node, ast.AnnAssign):
            found.append(node.annotation)
        elif isinstance(node, ast.Module | ast.ClassDef):
            found += [
                each.value for each in node.body if isinstance(each, ast.Assign) and _is_alias(each.value)
            ]
    return [node for node in found if node is not None and any(map(_is_union, ast.walk(node)))]


def _is_union(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)


def _is_alias(value: ast.expr) -> bool:
    """Whether the value of a name is a union of types and not of bits.

    Raises:
        ValueError: it may be either.
    """
    if not _is_union(value):
        return False
    members, pending = [], [value]
    while pending:
        node = pending.pop()
        if _is_union(node):
            pending += [node.left, node.right]
        else:
            members.append(node)
    if any(map(_is_type, members)):
        return True
    if all(isinstance(each, ast.BinOp | ast.UnaryOp | ast.Constant) for each in members):
        return False
    raise ValueError(f"cannot tell whether {ast.unparse(value)!r} is a union of types or a number")


def _is_type(node: ast.expr) -> bool:
    if isinstance(node, ast.Name):
        return isinstance(getattr(builtins, node.id, None), type)
    return isinstance(node, ast.Subscript) or (isinstance(node, ast.Constant) and node.value is None)


def _is_strict_zip(node: ast.AST) -> bool:
    is_zip = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip"
    return is_zip and any(keyword.arg == "strict" for keyword in node.keywords)


def _with_import(source: str, line: str) -> str:
    """``source`` with an import behind its docstring."""
    first = ast.parse(source).body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    lines = source.splitlines(keepends=True)
    at = first.end_lineno if has_docstring else 0
    return "".join([*lines[:at], "\n" * has_docstring, f"{line}\n", *lines[at:]])
