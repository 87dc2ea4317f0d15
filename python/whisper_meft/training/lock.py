"""One run at a time in a folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

LOCK = ".lock"

# A process that is forked off (one that reads data) must not go on holding a lock after its parent has died.
_held: set[int] = set()


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path, main: bool = True) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made as needed, and removed again if it stays empty.

    The lock is the kernel's, on a file in the folder: it ends with the process, however that ends. Where the
    file system has no locks there is none.

    Args:
        folder: of the run. main: whether this is the process of the run that writes; the others hold nothing.

    Raises:
        UserError: another run holds the lock.
    """
    if not main:
        yield
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    descriptor = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder)
        yield
    finally:
        if descriptor is not None:
            (folder / LOCK).unlink(missing_ok=True)
            _held.discard(descriptor)
            os.close(descriptor)
        for each in made:
            try:
                each.rmdir()
            except OSError:  # something is in it
                break


def _acquire(folder: Path) -> int:
    """A descriptor that holds the lock."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(_refusal(folder, holder)) from error
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # no locks here
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(descriptor)  # its last holder has just removed it
    _held.add(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _refusal(folder: Path, holder: str) -> str:
    text = f"output_dir: another run is writing into {folder}"
    text += f" ({holder})" if holder else ""
    tasks = next((os.environ[n] for n in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE") if n in os.environ), "1")
    if tasks != "1" and "RANK" not in os.environ:
        text += f"; {tasks} tasks were started without torchrun, and each of them is a run of its own"
    return f"{text}; wait for its end or name another folder"
