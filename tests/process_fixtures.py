"""Python processes for tests that need several of them, or one that they can kill.

To import PyTorch and Transformers costs a process several times what a test wants of it. These processes
are forked from a server that has imported both and computed nothing; what is under test they import
themselves. How the package starts (imports, environment variables, the launcher) is for real interpreters.
"""

import contextlib
import gc
import multiprocessing
import os
import runpy
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch.distributed", "transformers.trainer", "transformers.models.whisper.modeling_whisper"]
)


class Running:
    """A process that does what ``python`` does with these arguments: a file or ``-m`` and a module, and more.

    Args:
        environment: added to that of the tests. What a package reads of it at its import has been read.
    """

    def __init__(self, *arguments: object, **environment: str):
        self._folder = tempfile.TemporaryDirectory(prefix="process-")
        self._output = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        # The server's own is of the moment when it was started.
        started = (list(map(str, arguments)), {**os.environ, **environment}, self._output)
        self._process = _CONTEXT.Process(target=_become, args=started)
        self._process.start()
        self.sentinel = self._process.sentinel  # ready as soon as it has ended

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def runs(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wait(self, timeout: float = 300) -> int:
        """Its exit status, or minus the signal that killed it; a process that takes longer is killed."""
        self._process.join(timeout)
        if self.runs:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.stderr[-3000:]}")
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        return self._output[0].read_text() if self._output[0].exists() else ""

    @property
    def stderr(self) -> str:
        return self._output[1].read_text() if self._output[1].exists() else ""


def _become(arguments: Sequence[str], environment: dict[str, str], output: Sequence[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in ((sys.stdout, output[0]), (sys.stderr, output[1])):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    gc.freeze()
    # What it starts itself, it starts as any process would; workers of a server outlive one that is killed.
    multiprocessing.set_start_method(None, force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, os.path.dirname(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


def two_processes(*arguments: object, timeout: float = 300) -> list[Running]:
    """Two processes of one training run, told what ``torchrun --nproc_per_node 2`` tells; both have ended.

    Raises:
        AssertionError: one failed; the other is killed then, for it may wait for the first forever.
    """
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
    with contextlib.ExitStack() as killed_at_the_end:
        ranks = [
            killed_at_the_end.enter_context(Running(*arguments, RANK=rank, LOCAL_RANK=rank, **world))
            for rank in "01"
        ]
        left = {each.sentinel: each for each in ranks}
        while left:
            ended = wait(left, timeout)
            assert ended, f"still running after {timeout} s:\n" + ranks[0].stderr[-3000:]
            for sentinel in ended:
                one = left.pop(sentinel)
                assert one.wait() == 0, one.stderr[-3000:]
    return ranks


def _port() -> str:
    """A port that is free, and not of those that connections get for themselves in the meantime."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return str(port)
