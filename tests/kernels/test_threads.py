"""The choice of a backend where threads choose each for itself."""

import threading
from collections.abc import Callable

import torch

from meft_kernels import LadderDecoder, ops, use_backend
from meft_kernels.ops import backends


def in_thread(run: Callable) -> object:
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def test_a_choice_ends_with_its_block_whatever_other_threads_do():
    """Blocks of two threads that overlap: neither sees the other's choice, and none is left behind."""
    turns = threading.Barrier(2, timeout=10)
    seen = {}

    def first():
        with use_backend("reference"):
            turns.wait()  # 1: the other enters
            turns.wait()
            seen["first"] = backends.current()
        turns.wait()  # 2: the other leaves
        turns.wait()

    def second():
        turns.wait()
        with ops.assume_backend("triton"):
            turns.wait()
            turns.wait()
            seen["second"] = backends.current()
        turns.wait()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "reference", "second": "triton"}
    assert backends.current() == "auto" and in_thread(backends.current) == "auto"


def test_what_the_main_thread_chose_holds_in_threads_that_chose_nothing():
    def own():
        with ops.assume_backend("triton"):
            inside = backends.current(), in_thread(backends.current)
        return *inside, backends.current()

    with use_backend("reference"):
        assert in_thread(backends.current) == "reference"
        assert in_thread(own) == ("triton", "reference", "reference")
        assert backends.current() == "reference"
    assert in_thread(backends.current) == "auto"


def test_compiled_code_follows_the_choice_of_its_thread():
    torch._dynamo.reset()
    table = {name: float(place) for place, name in enumerate(backends.BACKENDS)}

    @torch.compile(fullgraph=True, backend="eager")
    def number(x):
        outside = x + table[backends.current()]
        with ops.assume_backend("native"):
            return outside + 10 * table[backends.current()]

    def numbers():
        found = [number(torch.zeros(1)).item()]
        with ops.assume_backend("reference"):
            found.append(number(torch.zeros(1)).item())
        return [*found, number(torch.zeros(1)).item()]

    for run in (numbers, lambda: in_thread(numbers), numbers):
        assert run() == [20.0, 21.0, 20.0]
    with ops.assume_backend("reference"):
        assert in_thread(numbers) == [21.0, 21.0, 21.0]


def test_what_a_backward_computes_again_follows_the_forward(monkeypatch):
    side, called, kernel = LadderDecoder(16, 2, 2), set(), backends.kernel

    def recording(name, backend=None):
        called.add(backend or backends.current())
        return kernel(name, backend)

    monkeypatch.setattr(backends, "kernel", recording)
    with use_backend("reference"):
        out = side.state([torch.randn(1, 3, 16) for _ in range(3)], None, torch.randn(1, 4, 8))
    out.sum().backward()
    assert called == {"reference"}
