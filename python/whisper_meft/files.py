"""Writing files so that nobody ever sees half of one.

Everything is written beside its destination and renamed over it: the rename is atomic, so a reader finds
either the old content or the new one, also after a crash.
"""

import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError


def _temporary_beside(path: Path) -> Path:
    """A new empty file in the folder of ``path``, which is made as needed."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder, a file name is needed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.stem[:100]}-"
        descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
    except FileExistsError as error:
        raise UserError(f"cannot write {path}: {path.parent} is not a folder") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    os.close(descriptor)
    return Path(name)


def check_writable(path: str | os.PathLike) -> None:
    """Finds out before the work is done whether a file could be written at ``path``. Leaves nothing behind.

    Raises:
        UserError: ``path`` is a folder, or nothing can be written in its folder or in the one where that
            would be made.
    """
    path = Path(path)
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot write {path}: {folder} is not a folder")
    try:
        # A name of its own, as any other may be there.
        _temporary_beside(path if folder == path.parent else folder / uuid.uuid4().hex).unlink()
    except UserError as error:
        raise UserError(f"cannot write {path}: {str(error).partition(': ')[2]}") from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path`` and renames it to ``path`` on success.

    The suffix is kept, so writers that choose a format by name work. Folders are made as needed. On an
    exception the temporary file is removed and ``path`` stays as it was.

    Raises:
        UserError: the folder cannot be made or written, ``path`` is a folder, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        # mkstemp makes files private; give the result the permissions an ordinary open() would.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically.

    What UTF-8 cannot hold (bytes of a file name in another encoding) is written as JSON escapes of lone
    surrogates, which JSON reads back as it was.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes ``value`` as indented UTF-8 JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON file, whose names come once each."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


def lines_of(text: str) -> list[str]:
    """The lines of a text: at line feeds and carriage returns alone. What else ``str.splitlines`` splits at,
    such as U+2028, may stand within a transcript."""
    return re.split(r"\r\n|\n|\r", text)


def read_json(path: str | os.PathLike, once: bool = False) -> Any:
    """Reads a JSON file, with or without a byte-order mark; of a name that comes twice in an object the last
    value, or none with ``once``.

    Raises:
        UserError: the file is missing, unreadable, or not JSON; a name comes twice, with ``once``.
    """
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=_once if once else None)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
