"""The file of rows that were measured on one device: its place, reading it, writing it."""

import datetime
import functools
import importlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import torch

from .row import FAMILIES, Row, architecture_of


def path_of(device_name: str) -> Path:
    """Where the rows measured on a device are kept: in ``MEFT_KERNELS_TUNING_DIR``, else a user folder."""
    folder = os.environ.get("MEFT_KERNELS_TUNING_DIR")
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "meft_kernels" / "tuning"
    return Path(folder) / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name).strip('-').lower()}.json"


def _triton_version() -> str:
    return importlib.import_module("triton").__version__


@functools.cache
def read(device_name: str) -> tuple[Row, ...]:
    """The rows measured on a device, none where there is no file. None either, and a warning, where another
    Triton measured them: its compiler gives other registers and spills.

    Raises:
        ValueError: the file is there and cannot be used; its name is in the message.
    """
    path = path_of(device_name)
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, version = tuple(_row(each) for each in content["rows"]), content["triton"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no usable block sizes, remove it or tune again: {error}") from error
    if version != _triton_version():
        warnings.warn(
            f"{path} was measured with Triton {version} and is not used with {_triton_version()}; "
            "python -m meft_kernels.tune measures again",
            stacklevel=2,
        )
        return ()
    return rows


def _row(given: dict, **changes: str) -> Row:
    """A row as JSON holds it."""
    return Row(**{**given, "widths": tuple(given["widths"]), **changes})


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system into an OSError that says in one line what could not be written."""
    try:
        yield
    except OSError as error:
        is_file = isinstance(error, FileExistsError)
        reason = f"{path.parent} is not a folder" if is_file else error.strerror or error
        hint = "MEFT_KERNELS_TUNING_DIR names the folder"
        raise OSError(f"cannot write {path}: {reason} ({hint})") from error


def _measured_before() -> tuple[Row, ...]:
    """The current device's rows; none from a damaged file, which is set aside for a new one to replace it."""
    name = torch.cuda.get_device_name()
    try:
        return read(name)
    except ValueError as error:
        path = path_of(name)
        aside = path.with_suffix(".damaged")
        with _writing(path):
            os.replace(path, aside)
        print(f"replacing {path}, which is now {aside.name}: {error.__cause__}", flush=True)
        return ()


def prepare() -> None:
    """Finds out before a search that the current device's file can be written, and sets a damaged one aside.

    Raises:
        OSError: it cannot be written; the message names the file and the reason.
    """
    path = path_of(torch.cuda.get_device_name())
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OSError("it is a folder")
        with tempfile.NamedTemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(2**16))  # more than a search writes
    _measured_before()


def write(rows: Sequence[Row]) -> Path:
    """Merges rows into the current device's file, which is replaced in one step.

    Raises:
        OSError: it cannot be written; the old file is as it was and nothing is left beside it.
    """
    name = torch.cuda.get_device_name()
    path = path_of(name)
    keys = {(row.kernel, row.widths) for row in rows}
    kept = [row for row in _measured_before() if (row.kernel, row.widths) not in keys]
    content = {
        "device": name,
        "architecture": architecture_of(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "date": datetime.date.today().isoformat(),
        "rows": [asdict(row) for row in (*kept, *rows)],
    }
    temporary = None
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                temporary = Path(file.name)
                json.dump(content, file, indent=2)
            os.replace(temporary, path)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
    read.cache_clear()
    return path


def table_lines(path: Path) -> list[str]:
    """The rows of a file that :func:`write` wrote, as Python in the form of the table: sizes on one line,
    the reason on the next, and by name what is not the usual.

    Raises:
        ValueError: the file cannot be read or is of another kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, family = content["device"], FAMILIES[content["architecture"]]
        rows = [_row(each, family=family) for each in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no rows that a search wrote: {error}") from error
    lines = []
    for row in rows:
        kernel, blocks, reason = map(json.dumps, (row.kernel, row.blocks, f"{name}: {row.reason}"))
        lines.append(f"    Row({kernel}, {row.widths}, {blocks}, {row.num_warps}, {row.num_stages},")
        unusual = (field.name for field in fields(row) if field.default is not MISSING)
        named = [
            f"{each}={getattr(row, each)!r}".replace("'", '"')
            for each in unusual
            if getattr(row, each) != getattr(Row, each)
        ]
        lines.append(f"        {', '.join([reason, *named])}),")
    return lines
