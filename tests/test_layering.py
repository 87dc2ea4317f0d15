"""Imports run one way, as the design says; read with ``ast``, so nothing has to be importable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "meft_kernels"
WHISPER = ROOT / "python" / "whisper_meft"

# Which of meft_kernels' own parts each part may import; "" is the package itself (its public names).
ALLOWED = {
    "reference": {"reference"},
    "tuning": set(),
    "triton_kernels": {"reference", "triton_kernels", "tuning"},
    "self_check": {"reference"},
    "schemas": {"reference"},
    "native": {"reference", "schemas"},
    "ops": {
        "native",
        "reference",
        "schemas",
        "second_derivative",
        "self_check",
    },  # and triton_kernels, by name when they are first called
    "second_derivative": set(),
    "self_attention": {"native", "ops", "reference", "second_derivative"},
    "static_check": {"tuning"},
    "tune": {"ops", "static_check", "testing", "tuning"},
    "modules": {"ops", "reference"},
    "testing": {"ops", "reference", "modules"},
    "counting": {"ops", "reference"},
    "__init__": {"ops", "reference", "modules"},
    "__main__": {"ops", ""},
}


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
    part = path.relative_to(KERNELS).with_suffix("").parts[0]
    assert part in ALLOWED, f"{path.name} is a new part: say in ALLOWED what it may import"
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
    own = {name.split(".")[1] for name in imported(path) if name.startswith("meft_kernels.")}
    own = {name if name in ALLOWED else "" for name in own}
    assert own <= ALLOWED[part], f"{path.name} imports {own - ALLOWED[part]}"


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
