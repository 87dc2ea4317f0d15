"""Writing a model's folder so that nobody ever sees the files of two models in it."""

import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .weights import WEIGHT_FILES

# What belongs to a saved model and goes with it; everything else in a folder is somebody's own.
_OF_A_MODEL = {"config.json", "README.md", "preprocessor_config.json", "processor_config.json", "backbone"}
_SHARD = re.compile(r"(pytorch_)?model-\d+-of-\d+\.(safetensors|bin)")

_AT_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def is_of_a_model(name: str) -> bool:
    """Whether a file or folder of this name belongs to a saved model."""
    return name in _OF_A_MODEL or name in WEIGHT_FILES or _SHARD.fullmatch(name) is not None


@contextmanager
def whole_folder(folder: str | os.PathLike, goes: Callable[[str], bool] = is_of_a_model) -> Iterator[Path]:
    """Yields an empty folder beside ``folder`` that takes its place when all is written.

    Of what ``folder`` holds, the files of a model are gone afterwards, or those of whose names ``goes`` says
    so, and all others are kept. On an exception and when the process is killed ``folder`` stays as it was.

    Raises:
        UserError: the folder cannot be made or replaced.
    """
    folder = Path(os.path.realpath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o777 & ~umask)
        if folder.exists():
            _keep_the_rest(folder, beside, goes)
            _exchange(beside, folder)
        else:
            os.rename(beside, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _keep_the_rest(old: Path, new: Path, goes: Callable[[str], bool]) -> None:
    """Puts what does not go into ``new`` too, as links where the file system has them."""
    for entry in old.iterdir():
        if goes(entry.name) or os.path.lexists(new / entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        elif entry.is_symlink():
            os.symlink(os.readlink(entry), new / entry.name)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders, in one step where the system can."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    paths = os.fsencode(one), os.fsencode(other)
    if swap is not None and not swap(_AT_WORKING_FOLDER, paths[0], _AT_WORKING_FOLDER, paths[1], _EXCHANGE):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{other.name[:100]}-", dir=other.parent))
    os.rename(other, aside)  # over an empty folder
    try:
        os.rename(one, other)
    except OSError:
        os.rename(aside, other)
        raise
    os.rename(aside, one)
