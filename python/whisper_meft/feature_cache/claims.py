"""Which process computes which clips, where several fill one cache at once."""

import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# A process that has not got on for so long has stopped: its clips are free again.
_STALLED_SECONDS = 600

_TOUCH_SECONDS = 1


class Claims:
    """A process's part in filling a folder; a context manager, inside which it counts as filling it.

    Its claims are in a file ``.claim-*.json`` that it holds a lock on for as long as it lives, so that
    those of a killed process are free at once; where the file system has no locks, after ten minutes.

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.path = self.folder / f".claim-{uuid.uuid4().hex}.json"
        self._file: BinaryIO | None = None
        self._touched = 0.0

    def __enter__(self) -> "Claims":
        # A folder that cannot be written may hold all that is needed; else writing the first shard says so.
        with suppress(OSError), self.locked():
            self._file = open(self.path, "xb", buffering=0)
            _lock(self._file, wait=False)
            self._file.write(b"[]")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self.path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process is in here at the same time.

        Raises:
            OSError: there is no cache in the folder.
        """
        place = self.folder / "cache.json"  # which is never replaced
        with open(place, "r+b" if os.access(place, os.W_OK) else "rb") as file:
            _lock(file, wait=True)
            yield

    def of_others(self) -> list[set[str]]:
        """What each other process that fills the folder has claimed. To be called in :meth:`locked`, before
        looking for what is there: who gives a claim back has written its shard."""
        found = []
        for path in self.folder.glob(".claim-*.json"):
            if path == self.path:
                continue
            try:
                age = time.time() - path.stat().st_mtime
                with open(path, "rb") as file:
                    held = _is_locked(file)
                    if held is False or (held is None and age > _STALLED_SECONDS):
                        path.unlink()  # its process was killed
                        continue
                    found.append(set(json.load(file)) if age <= _STALLED_SECONDS else set())
            except (OSError, ValueError):  # just given up
                continue
        return found

    def claim(self, clips: Iterable[str]) -> None:
        """Replaces what this process has claimed. To be called in :meth:`locked`."""
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(list(clips)).encode())

    def touch(self) -> None:
        """Shows that this process gets on."""
        if self._file is not None and time.monotonic() - self._touched > _TOUCH_SECONDS:
            self._touched = time.monotonic()
            with suppress(OSError):
                os.utime(self.path)


def _lock(file: BinaryIO, wait: bool) -> None:
    """Locks a file until it is closed, where that is possible."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _is_locked(file: BinaryIO) -> bool | None:
    """Whether another process holds a lock on the file; None where that cannot be known."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
