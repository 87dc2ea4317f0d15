"""Imports run one way, as the tables of CONTRIBUTING.md say; read with ``ast``, so nothing is imported."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "meft_kernels"
WHISPER = ROOT / "python" / "whisper_meft"


def table(name: str) -> list[list[str]]:
    """The rows, as lists of cells, of the table of CONTRIBUTING.md behind the comment ``name``."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.search(rf"<!-- {name} -->\n(.*?)<!-- end of ", text, re.S).group(1).splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def allowed() -> dict[str, set[str]]:
    """Which parts of meft_kernels each part imports."""
    rows = table("parts: meft_kernels")
    return {part.strip("`/"): set(re.findall(r"`([^`]+)`", imports)) for part, imports, _ in rows}


ALLOWED = allowed()


def part_of(names: list[str]) -> str:
    """The part of meft_kernels that a dotted name inside it, split at its dots, belongs to."""
    first = names[0]
    candidates = ("/".join(names[:2]), first, f"{first}/__init__", "__init__")
    return next(part for part in candidates if part in ALLOWED)


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports anywhere, relative imports resolved."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    if package[:1] == ["python"]:
        package = package[1:]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"no Python files under {folder}"
    return found


@pytest.mark.parametrize("path", files(KERNELS), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_layers(path):
    names = list(path.relative_to(KERNELS).with_suffix("").parts)
    part = part_of(names)
    known = part == names[0] or part == "/".join(names)
    assert known, f"{path.name} is a new part: say in CONTRIBUTING.md what it may import"
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {
        "whisper_meft",
        "transformers",
        "datasets",
        "peft",
        "accelerate",
        "tests",
        "benchmarks",
    }
    own = {part_of(name.split(".")[1:]) for name in imported(path) if name.startswith("meft_kernels.")}
    assert own <= ALLOWED[part] | {part}, f"{path.name} imports {own - ALLOWED[part]}"


def test_kernels_need_torch_alone():
    third_party = {name.split(".")[0] for path in files(KERNELS) for name in imported(path)}
    import sys

    third_party -= set(sys.stdlib_module_names) | {"meft_kernels"}
    assert third_party <= {"torch", "triton"}


@pytest.mark.parametrize("path", files(WHISPER), ids=lambda p: str(p.relative_to(ROOT)))
def test_whisper_uses_public_kernel_names_only(path):
    names = imported(path)
    roots = {name.split(".")[0] for name in names}
    assert not roots & {"tests", "benchmarks", "examples"}
    private = {name for name in names if name.startswith("meft_kernels.") and "._" in name}
    internal = {
        name for name in names if name.startswith(("meft_kernels.ops", "meft_kernels.triton_kernels"))
    }
    assert not private | internal


def floors() -> dict[str, int]:
    """The floor of each room of whisper_meft."""
    return {room.strip("`/"): int(floor) for floor, room, _ in table("floors: whisper_meft")}


def module_of(path: Path, top: Path) -> str:
    parts = path.relative_to(top.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Which of the modules ``known`` a file imports."""
    names = imported(path)
    return {name if name in known else name.rpartition(".")[0] for name in names} & known


def test_every_room_has_a_floor():
    rooms = {path.relative_to(WHISPER).with_suffix("").parts[0] for path in files(WHISPER)} - {"__init__"}
    assert rooms == set(floors())


@pytest.mark.parametrize("path", files(WHISPER), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_from_below(path):
    known = {module_of(each, WHISPER) for each in files(WHISPER)}
    room = path.relative_to(WHISPER).with_suffix("").parts[0]
    if room == "__init__":
        return
    floor = floors()
    for name in imported_modules(path, known) - {"whisper_meft"}:
        other = name.split(".")[1]
        assert other == room or floor[other] < floor[room], f"{path.name} imports {name}, not below {room}"


@pytest.mark.parametrize("top", [KERNELS, WHISPER], ids=lambda top: top.name)
def test_no_imports_in_a_circle(top):
    known = {module_of(path, top) for path in files(top)}
    graph = {}
    for path in files(top):
        own = module_of(path, top)
        # A package's own __init__ gathers the names of its files; these may name one another through it.
        graph[own] = {name for name in imported_modules(path, known) if not own.startswith(f"{name}.")}
        graph[own] -= {own}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' -> '.join(error.args[1])}")


def test_a_file_does_not_repeat_the_name_of_its_room():
    for path in files(WHISPER):
        room = path.relative_to(WHISPER).parts[0]
        assert room not in path.stem.split("_"), f"{path.relative_to(WHISPER)} says {room} twice"
