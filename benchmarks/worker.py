"""The process that measures another revision: ``python -m benchmarks.worker FOLDER``, started by
``benchmarks.revisions``.

It imports ``meft_kernels`` from FOLDER but the harness and the case table from the tree at hand, so that both
revisions are asked for the same cases. Requests and answers are JSON, one a line; an answer to a request that
failed is ``{"error": one line}``.
"""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def load_revision(folder: str) -> None:
    """Imports ``meft_kernels`` from ``folder`` and puts this tree's case table in the place of its own.

    Raises:
        ImportError: something else was imported.
    """
    sys.path.insert(0, folder)
    import meft_kernels

    if Path(folder) not in Path(meft_kernels.__file__).parents:
        raise ImportError("meft_kernels was not imported from the other revision")
    name = "meft_kernels.testing"
    spec = importlib.util.spec_from_file_location(name, ROOT / "meft_kernels" / "testing.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    meft_kernels.testing = module


class Worker:
    """Answers requests by the name of the method."""

    def __init__(self) -> None:
        self._contenders = {}  # by backend

    def prepare(self, case: dict, backend: str, dtype: str, device: str, threads: int, warm_up: int) -> dict:
        from . import contenders, peers

        torch.set_num_threads(threads)
        made, kind, where = contenders.case_from_dict(case), getattr(torch, dtype), torch.device(device)
        contenders.check(made, backend, kind, where)
        inputs = contenders.Inputs(made, kind, where)
        self._contenders[backend] = contenders.Local(peers.ours(made, backend), inputs, warm_up)
        return {}

    def round(self, backend: str, index: int) -> dict:
        return self._contenders[backend].round(index)

    def memory(self, backend: str) -> dict:
        return self._contenders[backend].memory()

    def drop(self) -> dict:
        self._contenders.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}


def main(folder: str) -> None:
    from whisper_meft.errors import one_line

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process by closing its input
    # What a library prints must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker, failed = Worker(), None
    try:
        load_revision(folder)
    except Exception as error:  # the parent says so and goes on without
        failed = one_line(error)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"error": failed} if failed else getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": one_line(error)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(sys.argv[1])
