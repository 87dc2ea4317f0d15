"""Time and memory of one call and its gradient, as a training step makes them.

CPU: process-CPU time, which other load hardly changes, and the allocator's record as torch's profiler gives
it. CUDA: events behind a short wait of the device, so that the host's launches are not timed, and the
allocator's counters. This file knows tensors and callables alone: nothing of any op.
"""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MEBIBYTE = 2**20
_CYCLES_PER_SECOND = 2e9  # of a GPU's clock, or somewhat more
DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Step:
    """A call ready to be measured: ``call()`` gives a tensor, which is differentiated for ``leaves`` (nothing
    where there are none) against ``upstream``."""

    call: Callable[[], Tensor]
    leaves: list[Tensor]
    upstream: Tensor | None

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(bool(self.leaves)):
            return self.call()

    def backward(self, out: Tensor) -> None:
        if self.leaves:
            torch.autograd.grad(out, self.leaves, self.upstream, allow_unused=True)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def time_step(step: Step, device: torch.device, wait: float = 1e-3) -> dict[str, float]:
    """Seconds of one forward, backward and both; of the forward alone where nothing is differentiated.

    On a CPU these are seconds of the process on all its threads. On CUDA they are the device's, and ``host``
    is the wall time that the host took to launch the work; the device first waits ``wait`` seconds, so that
    with a ``wait`` beyond ``host`` it never waits for the host in between.
    """
    with _no_collection():
        if device.type == "cuda":
            start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            torch.cuda.synchronize(device)
            torch.cuda._sleep(int(wait * _CYCLES_PER_SECOND))
            began = time.perf_counter()
            start.record()
            out = step.forward()
            middle.record()
            step.backward(out)
            end.record()
            host = time.perf_counter() - began
            end.synchronize()
            seconds = {
                "forward": start.elapsed_time(middle) / 1e3,
                "backward": middle.elapsed_time(end) / 1e3,
                "both": start.elapsed_time(end) / 1e3,
                "host": host,
            }
        else:
            start = time.process_time()
            out = step.forward()
            middle = time.process_time()
            step.backward(out)
            end = time.process_time()
            seconds = {"forward": middle - start, "backward": end - middle, "both": end - start}
        del out
    return seconds if step.leaves else {k: v for k, v in seconds.items() if k in ("forward", "host")}


def rotations(bytes_per_set: int, device: torch.device, most: int = 8) -> int:
    """How many sets of inputs to go round, so that none is still cached when its turn comes."""
    cache = 64 * _MEBIBYTE
    if device.type == "cuda":
        cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(most, 1 + -(-cache // max(1, bytes_per_set))))


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 20th and 80th percentile."""
    if len(seconds) == 1:
        low = high = seconds[0]
    else:
        low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "p20": low, "p80": high}


def measure_memory(step: Step, device: torch.device, known: Sequence[Tensor]) -> dict[str, int]:
    """Bytes that one forward and backward take beside their inputs ``known``.

    Returns:
        forward_peak, peak: most at any moment of the forward, and of both, over what was there before (CUDA:
            the allocator's counters; CPU: its record of every allocation). Output and gradients count.
        kept: what the forward saves for the backward beside ``known``, counted over storages.
    """
    peaks = _cuda_peaks(step, device) if device.type == "cuda" else _cpu_peaks(step)
    return {**peaks, "kept": _kept(step, known)}


def _cuda_peaks(step: Step, device: torch.device) -> dict[str, int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = step.forward()
    forward_peak = torch.cuda.max_memory_allocated(device) - before
    step.backward(out)
    return {"forward_peak": forward_peak, "peak": torch.cuda.max_memory_allocated(device) - before}


def _cpu_peaks(step: Step) -> dict[str, int]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes would stand between the rows of the table

    def peak(run: Callable[[], object]) -> int:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
            run()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            highest = max(highest, live)
        return highest

    return {"forward_peak": peak(step.forward), "peak": peak(lambda: step.backward(step.forward()))}


def _kept(step: Step, known: Sequence[Tensor]) -> int:
    if not step.leaves:
        return 0
    addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address returns
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = step.forward()
    del out
    return sum(size for size, _ in saved.values())
