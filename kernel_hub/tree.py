"""The folder of a kernel: a project for kernel-builder, and with it what ``kernels`` loads.

::

    build.toml  flake.nix  CARD.md  LICENSE  tests/     kernel-builder's, from project/
    torch-ext/meft_kernels/                             the sources, from which it builds
    build/torch-<backend>/                              built: the sources, the ops' namespace, metadata.json

A pure Python kernel is built by copying, so the second half is made here too, as kernel-builder makes it.
Only the namespace differs between backends and versions: it ends in a digest of the sources.
"""

import ast
import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
import tomllib
from pathlib import Path, PurePosixPath

from .python39 import STRICT_ZIP, lowered

HERE = Path(__file__).parent
PROJECT = HERE / "project"
PACKAGE = HERE.parent / "meft_kernels"
LICENSE = HERE.parent / "LICENSE"
NAMESPACE = "_ops.py"  # kernel-builder writes it, and so does `namespace`
SAMPLE_REPO = "OWNER/NAME"  # in project/


def sources(package: Path = PACKAGE) -> dict[str, str]:
    """The kernel's Python files by their place in it: what its ``__init__`` imports, directly or not, and the
    Triton kernels, which the ops import by name when they first run.

    Raises:
        ValueError: one of them cannot be written for Python 3.9; it names the file and the line.
    """
    wanted = ["__init__.py", *(f"triton_kernels/{path.name}" for path in package.glob("triton_kernels/*.py"))]
    found: dict[str, str] = {}
    while wanted:
        name = wanted.pop()
        if name in found or name == NAMESPACE:
            continue
        try:
            source = (package / name).read_text(encoding="utf-8")
            found[name] = lowered(source, depth=name.count("/"))
        except SyntaxError as error:
            raise ValueError(f"{name}, line {error.lineno}: {error.msg}") from None
        except ValueError as error:
            raise ValueError(f"{name}, {error}") from None
        wanted += _imported(source, name, package)
    found[STRICT_ZIP] = (HERE / STRICT_ZIP).read_text(encoding="utf-8")
    return dict(sorted(found.items()))


def _imported(source: str, name: str, package: Path) -> list[str]:
    """The files of the package that one of them imports, and the ``__init__`` of their folders."""
    files = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = PurePosixPath(name).parents[node.level - 1]
        base = folder.joinpath(*(node.module or "").split("."))
        candidates = [base, *(base / alias.name for alias in node.names)]
        for each in candidates:
            files += [str(each.with_suffix(".py"))] if each.name else []
            files += [str(folder / "__init__.py") for folder in (each, *each.parents)]
    return [file for file in dict.fromkeys(files) if (package / file).is_file()]


def digest(files: dict[str, str]) -> str:
    """What tells one version's namespace from another's: 12 digits of the sources' SHA-256."""
    found = hashlib.sha256()
    for name, source in sorted(files.items()):
        found.update(f"{name} {len(source.encode())}\n".encode() + source.encode())
    return found.hexdigest()[:12]


def namespace(name: str) -> str:
    """The module that names the ops' namespace, with what kernel-builder's has."""
    return f'''"""The namespace of this build's ops under ``torch.ops``."""

import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    """An op by its full name."""
    return f"{name}::{{op_name}}"
'''


def write(out: Path, repo_id: str, package: Path = PACKAGE) -> list[Path]:
    """Writes the kernel's folder, in one step.

    Args:
        out: a folder that does not exist yet or is empty, or a link to one; not the current folder.
        repo_id: the kernel's name on the hub, such as ``"owner/meft-kernels"``.
        package: the sources of ``meft_kernels``.

    Returns:
        The built variants' folders.

    Raises:
        ValueError: ``repo_id`` has another form, ``out`` holds something or is the current folder, or the
            sources cannot be written for Python 3.9. OSError: it cannot be written.
    """
    _check_repo_id(repo_id)
    # A link stays, and what it points to is written.
    place = Path(os.path.realpath(out))
    if place.is_dir() and place.samefile(os.curdir):  # replaced, the shell would stand in a deleted one
        raise ValueError(f"the output folder must not be the current one, got {out}")
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise ValueError(f"the output folder must be new or empty, got {out}")
    files = sources(package)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".kernel-hub-", dir=place.parent) as folder:
            made = Path(folder, "kernel")
            backends = _fill(made, repo_id, files)
            os.replace(made, place)
    except OSError as error:  # of a temporary folder, of which nobody knows
        raise OSError(f"cannot write the output folder {out}: {error.strerror or error}") from error
    return [out / "build" / f"torch-{backend}" for backend in backends]


def _check_repo_id(repo_id: str) -> None:
    """Raises ValueError where the hub has no such name: by its own function if it is installed, whose rules
    of today stand here too."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII):
        raise ValueError(f"repo_id must be OWNER/NAME, got {repo_id!r}")
    ends_well = re.fullmatch(r"([\w.-]{0,95}\w)/([\w.-]{0,95}\w)", repo_id, re.ASCII)
    taken = ends_well and not re.search(r"--|\.\.|\.git$", repo_id)
    if taken:
        try:
            from huggingface_hub.utils import validate_repo_id
        except ImportError:
            return
        try:
            validate_repo_id(repo_id)
        except ValueError:
            taken = False
    if not taken:
        raise ValueError(
            "OWNER and NAME of repo_id must have at most 96 characters each, end in neither '-' nor '.', and "
            f"hold no '--' or '..' and no '.git' at the end, got {repo_id!r}"
        )


def _fill(made: Path, repo_id: str, files: dict[str, str]) -> list[str]:
    """Writes everything into a new folder; the backends that it was built for."""
    own = [path for path in PROJECT.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    texts = {str(path.relative_to(PROJECT)): path.read_text(encoding="utf-8") for path in own}
    _write_files(made, {name: text.replace(SAMPLE_REPO, repo_id) for name, text in texts.items()})
    general = tomllib.loads((made / "build.toml").read_text(encoding="utf-8"))["general"]
    shutil.copy(LICENSE, made)
    module = general["name"].replace("-", "_")
    _write_files(made / "torch-ext" / module, files)
    for backend in general["backends"]:
        variant, name = made / "build" / f"torch-{backend}", f"_{module}_{backend}_{digest(files)}"
        built = files | {NAMESPACE: namespace(name)}
        _write_files(variant, built)
        about = {
            "name": general["name"],
            "id": name,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": _hashes(built)},
        }
        (variant / "metadata.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return general["backends"]


def _write_files(folder: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8", newline="\n")


def _hashes(files: dict[str, str]) -> dict[str, str]:
    hashes = {name: hashlib.sha256(source.encode()).digest() for name, source in sorted(files.items())}
    return {name: base64.b64encode(found).decode() for name, found in hashes.items()}
