"""The GPU pack in an environment with the versions of a rented GPU, and without all that is missing there."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import record

PYTHON = "3.12"
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}
OTHERS = ("pytest",)
# Nor are the C++ kernels built.
MISSING = ("datasets", "soundfile", "soxr", "torchao", "peft", "accelerate", "matplotlib", "xdist")

ASK = """
import importlib.util, json, sys
from importlib import metadata
names, missing = json.loads(sys.argv[1])
def version(name):
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None
there = [name for name in missing if importlib.util.find_spec(name)]
python = ".".join(map(str, sys.version_info[:2]))
print(json.dumps([python, {name: version(name) for name in names}, there]))
"""


def asked(python: str) -> tuple[str, dict, list] | None:
    """Python's version, those of the packages, and what of MISSING is there; None without an interpreter."""
    question = json.dumps([list(VERSIONS), list(MISSING)])
    try:
        done = subprocess.run([python, "-c", ASK, question], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(json.loads(done.stdout))


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """The interpreter of an environment with exactly these versions, made as needed."""
    given = os.environ.get("MEFT_PYTHON") or f"python{PYTHON}"
    found = asked(given)
    if found is None or found[0] != PYTHON:
        pytest.skip(f"needs Python {PYTHON}, which MEFT_PYTHON may name, got {given}")
    if found[1:] == (VERSIONS, []):
        return given
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([given, "-m", "venv", str(folder)], check=True)
    made = str(folder / "bin" / "python")
    wanted = [f"{name}=={version}" for name, version in VERSIONS.items()]
    subprocess.run([made, "-m", "pip", "install", "--quiet", *wanted, *OTHERS], check=True)
    assert asked(made) == (PYTHON, VERSIONS, [])
    return made


def copy_of_the_tree(folder: Path) -> Path:
    """The tree without its repository and without anything built."""
    unwanted = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "results", ".*")
    for name in ("benchmarks", "meft_kernels", "python", "tests"):
        shutil.copytree(record.ROOT / name, folder / name, ignore=unwanted)
    shutil.copy(record.ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.slow
@pytest.mark.registry
def test_dry_run(python, tmp_path):
    tree, out = copy_of_the_tree(tmp_path / "tree"), tmp_path / "out"
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS") if name in os.environ
    }
    environment = kept | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'python'}"}

    def pack(*arguments: str) -> subprocess.CompletedProcess:
        command = [python, "-m", "benchmarks.gpu_pack", "--dry-run", *arguments]
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)

    done = pack("--out", str(out))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{(out / 'log.txt').read_text()}"
    (path,) = out.glob("gpu_pack-*.json")
    content = record.read(path)
    where = content["environment"]
    assert {name: where[name].partition("+")[0] for name in VERSIONS} == VERSIONS
    assert where["python"].startswith(f"{PYTHON}.") and where["commit"] is None
    assert {row["part"]: row["status"] for row in content["figures"]} == dict.fromkeys(
        [row["part"] for row in content["figures"]], "ok"
    )
    assert sum(each.is_file() for each in out.rglob("*")) <= 6
    again = pack("--resume", str(out))
    assert again.returncode == 0 and "have ended" in again.stdout
    (tree / "benchmarks" / "timing.py").open("a").write("\n# changed\n")
    refused = pack("--resume", str(out), "--parts", "ceilings")
    assert refused.returncode == 1 and "source files" in refused.stderr
