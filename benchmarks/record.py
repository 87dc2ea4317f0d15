"""The record of a benchmark run: one JSON file that says where, when and by which command it was measured.

A record holds no host name, user name or folder, so that it can be published as it is. Tables and figures are
drawn from these files and from nothing else.
"""

import datetime
import functools
import math
import os
import platform
import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from whisper_meft import files
from whisper_meft.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# A copy of the tree without its repository cannot tell its commit: whoever makes the copy names it here.
COMMIT_VARIABLE = "MEFT_COMMIT"

PACK = "gpu_pack"  # a record of this name holds other records

_KEYS = {"name", "command", "shapes", "environment", "figures"}


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the source tree and whether files differ from it, results left aside."""
    if os.environ.get(COMMIT_VARIABLE):
        return os.environ[COMMIT_VARIABLE], None
    git = functools.partial(_output, "git", "-C", str(ROOT))
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return commit, None if changes is None else bool(changes)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: str | torch.device | None = None) -> dict[str, Any]:
    """What a figure depends on beside the code that was run.

    Args:
        device: where the run computes; default the GPU where there is one.

    Returns:
        commit (None where unknown), dirty (whether files differ from it; None where unknown), date (UTC, ISO
        8601), device (name of the GPU, or the CPU's model), device_type (``"cpu"`` or ``"cuda"``),
        device_memory (bytes) and driver (both None without a GPU), cpu, cores (those this process may use),
        threads (of torch), python, torch, cuda, triton and transformers versions (None where not installed).
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    commit, dirty = _commit()
    on_gpu = kind == "cuda"
    smi = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_model(),
        "device_type": kind,
        "device_memory": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "driver": smi.splitlines()[0].strip() if smi else None,
        "cpu": _cpu_model(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
    }


def _without_folders(command: str) -> str:
    """The command with every absolute path cut down to its last part."""

    def cut(word: str) -> str:
        option, equals, value = word.rpartition("=")
        return f"{option}{equals}{os.path.basename(value.rstrip('/'))}" if os.path.isabs(value) else word

    return shlex.join(cut(word) for word in shlex.split(command))


def _plain(value: Any) -> Any:
    """``value`` in JSON's types; numbers that are not finite become None, since JSON has none."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):  # a compiler's message, say, names files
        return re.sub(r"(?<![\w.])(?:/[\w.@+-]+)+/([\w.@+-]+)", r"\1", value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise TypeError(f"a figure must be a number, text, None, list or dictionary, got {type(value).__name__}")


def write(
    name: str,
    figures: list[dict] | dict,
    *,
    command: str,
    shapes: dict,
    directory: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    path: str | os.PathLike | None = None,
) -> Path:
    """Writes one run's record to ``<directory>/<name>-<device>-<date>[-n].json``, atomically.

    Args:
        name: what was measured, in lower-case letters, digits, ``-`` and ``_``.
        figures: the measurements: numbers, text, None, lists and dictionaries. Numbers that are not finite
            are written as null.
        command: the line that measures it again. Folders in it are left out.
        shapes: the sizes that all figures share.
        directory: default ``benchmarks/results``.
        device: where the run computed; default the GPU where there is one.
        path: the file that this run wrote before, to be replaced by one that holds more figures.

    Returns:
        The file written, never one that existed before unless it is ``path``.

    Raises:
        ValueError: ``name`` holds other characters.
        TypeError: a figure of another kind.
        UserError: the file cannot be written.
    """
    if not re.fullmatch(r"[a-z0-9_-]+", name):
        raise ValueError(f"name must be lower-case letters, digits, '-' and '_', got {name!r}")
    where = environment(device)
    content = {
        "name": name,
        "command": _without_folders(command),
        "shapes": _plain(shapes),
        "environment": where,
        "figures": _plain(figures),
    }
    if path is None:
        slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", where["device"].lower())).strip("-")
        stem = f"{name}-{slug}-{where['date'][:10]}"
        folder = Path(directory) if directory is not None else RESULTS
        path, count = folder / f"{stem}.json", 1
        while path.exists():
            count += 1
            path = folder / f"{stem}-{count}.json"
    files.write_json(path, content)
    return Path(path)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Reads one record: name, command, shapes, environment, figures.

    Raises:
        UserError: the file is missing, unreadable, not JSON or not a record.
    """
    content = files.read_json(path)
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        missing = ", ".join(sorted(_KEYS - set(content))) if isinstance(content, dict) else "all keys"
        raise UserError(f"{path} is not a benchmark record: it lacks {missing}")
    return content


def load_all(directory: str | os.PathLike | None = None) -> list[dict[str, Any]]:
    """All records of a folder (default ``benchmarks/results``), oldest first, each with its ``file`` name;
    those inside a pack's too.

    Raises:
        UserError: a JSON file in the folder is not a record.
    """
    folder = Path(directory) if directory is not None else RESULTS
    records = []
    for path in sorted(folder.glob("*.json")):
        found = read(path)
        inside = [r for row in found["figures"] for r in row["records"]] if found["name"] == PACK else []
        records += [{**each, "file": path.name} for each in (found, *inside)]
    return sorted(records, key=lambda record: record["environment"]["date"])
