"""What a source distribution holds, and that an install goes on without the C++ kernels where it has to."""

import fcntl
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "
BACKEND = "from setuptools import build_meta; print(build_meta.build_{kind}({folder!r}))"


def build(source: Path, kind: str, folder: Path, prelude: str = "", **environment: str):
    """Runs the build backend in ``source``; the file that it made and what it said."""
    code = prelude + BACKEND.format(kind=kind, folder=str(folder))
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return folder / found.stdout.strip().splitlines()[-1], found.stdout + found.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The unpacked source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    # It is made in the checkout: processes of pytest-xdist that each have some of the tests take turns.
    with open(ROOT / "setup.py") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        archive, _ = build(ROOT, "sdist", folder, MEFT_KERNELS_NATIVE="0")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


def test_source_distribution_is_complete(source):
    for pattern in ("csrc/*", "meft_kernels/**/*.py", "python/whisper_meft/**/*", "setup.py", "README.md"):
        wanted = {p.relative_to(ROOT) for p in ROOT.glob(pattern) if p.is_file() and p.suffix != ".pyc"}
        assert wanted and all((source / path).is_file() for path in wanted), pattern


@pytest.mark.parametrize(
    ("prelude", "environment", "says"),
    [
        (WITHOUT_TORCH, {}, "torch cannot be imported"),
        ("", {"CC": "/bin/false", "CXX": "/bin/false"}, "C++ CPU kernels"),
        ("", {"MEFT_KERNELS_NATIVE": "0"}, None),
    ],
    ids=["no torch", "no compiler", "left out"],
)
def test_wheel_without_the_kernels(source, tmp_path, prelude, environment, says):
    wheel, output = build(source, "wheel", tmp_path, prelude, **environment)
    lines = [line for line in output.splitlines() if line.startswith("meft_kernels: ")]
    assert len(lines) == (says is not None) and (says is None or says in lines[0]), output
    names = zipfile.ZipFile(wheel).namelist()
    for top in (ROOT, ROOT / "python"):
        package = top / ("meft_kernels" if top == ROOT else "whisper_meft")
        wanted = {str(path.relative_to(top)) for path in package.rglob("*.py")}
        assert wanted and wanted <= set(names)
    assert not [name for name in names if name.endswith(".so")]
