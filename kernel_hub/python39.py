"""Sources in the syntax of Python 3.9, the oldest that the Kernel Hub serves.

The package is written for a later one. What differs is little: unions of types with ``|``, which an
annotation evaluates and which become strings, and ``zip(strict=True)``, which ``_python39`` has for all.
A union or a ``strict`` anywhere else is refused. Whatever else a later Python brings is for the tests to
find.
"""

import ast
import builtins
import re
from pathlib import Path

STRICT_ZIP = "_python39.py"


def lowered(source: str, depth: int) -> str:
    """A module's source, written for Python 3.9.

    Args:
        source: of a module.
        depth: how many folders below the package's it stands in.

    Raises:
        ValueError: a name's value may be a union of types or a number, or the source holds a union of types
            or a ``strict`` that cannot be written for 3.9; it begins with the line.
    """
    tree = ast.parse(source)
    # As `ast` counts them: str.splitlines breaks at a form feed and at U+2028 too.
    lines = [line.encode() for line in re.split(r"(?<=\n)|(?<=\r)(?!\n)", source)]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    text = source.encode()

    def place(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    unions = _unions(tree)
    zips = [node.func for node in ast.walk(tree) if _is_strict_zip(node)]
    _refuse_what_is_left(tree, {*unions, *zips})
    edits = []
    for node in unions:
        start, end = place(node)
        # Over several lines it may hold comments.
        written = text[start:end].decode() if node.lineno == node.end_lineno else ast.unparse(node)
        edits.append((start, end, repr(written) if '"' in written else f'"{written}"'))
    for name in zips:
        start, end = place(name)
        if text[start:end] != b"zip":  # before Python 3.12, places within an f-string may be wrong
            raise _refusal(name, "'zip' cannot be replaced within an f-string")
        edits.append((start, end, "strict_zip"))
    if zips:
        newline = "\r\n" if "\r\n" in source else "\n"
        head, after = _head(tree)
        line = f"from {'.' * (depth + 1)}{Path(STRICT_ZIP).stem} import strict_zip"
        end, start = place(head[-1])[1] if head else 0, place(after)[0]
        if head and re.fullmatch(rb"[ \t\f]*;(?:[ \t\f]|\\\r?\n)*", text[end:start]):
            edits.append((start, start, f"{line}; "))
        else:
            at = starts[head[-1].end_lineno] if head else 0
            edits.append((at, at, f"{newline if head else ''}{line}{newline}"))
    for start, end, written in sorted(edits, reverse=True):
        text = text[:start] + written.encode() + text[end:]
    return text.decode()


def _head(tree: ast.Module) -> tuple[list[ast.stmt], ast.stmt]:
    """The docstring and imports from ``__future__``, before which no import may stand, and what follows."""
    count = int(ast.get_docstring(tree, clean=False) is not None)
    while isinstance(tree.body[count], ast.ImportFrom) and tree.body[count].module == "__future__":
        count += 1
    return tree.body[:count], tree.body[count]


def _unions(tree: ast.Module) -> list[ast.expr]:
    """Annotations that hold a union, and values of a module's or a class's names that are one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
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


def _members(value: ast.expr) -> list[ast.expr]:
    """What the ``|`` of an expression stand between."""
    return [*_members(value.left), *_members(value.right)] if _is_union(value) else [value]


def _is_alias(value: ast.expr) -> bool:
    """Whether the value of a name is a union of types and not of bits.

    Raises:
        ValueError: it may be either.
    """
    if not _is_union(value):
        return False
    members = _members(value)
    if any(map(_is_type, members)):
        return True
    if all(isinstance(each, ast.BinOp | ast.UnaryOp | ast.Constant) for each in members):
        return False
    raise _refusal(value, f"cannot tell whether {ast.unparse(value)!r} is a union of types or a number")


def _is_type(node: ast.expr) -> bool:
    """Whether it is surely a type: None, a builtin one, or one of them or of another module in brackets."""
    if isinstance(node, ast.Name):
        return isinstance(getattr(builtins, node.id, None), type)
    if isinstance(node, ast.Subscript):
        return _is_type(node.value) or _is_called_like_a_class(node.value)
    return isinstance(node, ast.Constant) and node.value is None


def _is_called_like_a_class(node: ast.expr) -> bool:
    """``Tensor`` and ``torch.Tensor``, but no constant such as ``re.A`` or ``SIGN_BIT``."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    name = name.lstrip("_")
    return name[:1].isupper() and not name.isupper()


def _refuse_what_is_left(tree: ast.Module, lowered: set[ast.expr]) -> None:
    """Looks for what Python 3.9 cannot run, outside of what is lowered.

    A ``|`` is one of types if one of its members is a type or is called like one, if all of them are classes
    or imported names, which may be in capitals, or if ``isinstance`` asks for it, which takes no name either
    that has become a string. ``strict`` is an argument of ``load_state_dict`` too, which has always had it.
    """
    nodes, pending = [], [tree]
    while pending:
        node = pending.pop()
        nodes.append(node)
        # Of a zip nothing but its name is replaced, which holds nothing.
        pending += [each for each in ast.iter_child_nodes(node) if each not in lowered]
    known, strings, asked = set(), set(), set()
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and node.value in lowered:
            strings |= {_name(target) for target in node.targets} - {None}
        elif isinstance(node, ast.Call) and _name(node.func) in ("isinstance", "issubclass"):
            asked |= {each for given in node.args[1:] for each in ast.walk(given)}
    for node in sorted((node for node in nodes if hasattr(node, "lineno")), key=lambda node: node.lineno):
        if _is_union(node):
            members = _members(node)
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr):
            members = [node.target, *_members(node.value)]
        else:
            members = []
        of_types = any(_is_type(each) or _is_called_like_a_class(each) for each in members)
        if members and (of_types or node in asked or {_name(each) for each in members} <= known):
            raise _refusal(node, f"Python 3.9 has no union of types such as {ast.unparse(node)!r}")
        if node in asked and _name(node) in strings:
            raise _refusal(node, f"{node.id!r} is a union of types, of which Python 3.9 has none")
        if isinstance(node, ast.Call) and not _takes_strict(node, lowered):
            raise _refusal(node, f"Python 3.9 may not know the argument 'strict' of {ast.unparse(node)!r}")


def _takes_strict(call: ast.Call, lowered: set[ast.expr]) -> bool:
    """Whether a call runs on Python 3.9, as far as an argument ``strict`` is concerned."""
    given = {keyword.arg for keyword in call.keywords}
    if call.func in lowered or _name(call.func) == "strict_zip":
        return True
    if isinstance(call.func, ast.Attribute) and call.func.attr == "load_state_dict":
        return True
    return "strict" not in given and not (None in given and _name(call.func) == "zip")


def _name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _refusal(node: ast.AST, why: str) -> ValueError:
    return ValueError(f"line {node.lineno}: {why}")


def _is_strict_zip(node: ast.AST) -> bool:
    is_zip = isinstance(node, ast.Call) and _name(node.func) == "zip"
    return is_zip and any(keyword.arg == "strict" for keyword in node.keywords)
