"""What a machine can do at most: bytes copied, and operations of a large matrix product, each per second."""

import statistics
import time
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Ceilings:
    """``copy_bandwidth`` in bytes a second, read and written together, of a copy of ``copy_bytes``;
    ``matmul_rate`` in floating-point operations a second, a multiply-add being two, of a square product of
    ``matmul_size`` in ``dtype``. On a CPU a second is one of process-CPU time: both are per core."""

    copy_bandwidth: float
    copy_bytes: int
    matmul_rate: float
    matmul_size: int
    dtype: str

    def floor(self, bytes_moved: int, flops: int) -> tuple[float, str]:
        """Seconds that no implementation gets below, and ``"memory"`` or ``"compute"``, which bounds it."""
        memory, compute = bytes_moved / self.copy_bandwidth, flops / self.matmul_rate
        return max(memory, compute), "compute" if compute > memory else "memory"

    def as_dict(self) -> dict:
        return asdict(self)


def measure(dtype: torch.dtype, device: torch.device, quick: bool = False) -> Ceilings:
    """Medians over several repeats on random data, in the precision settings that are in force.

    Args:
        dtype: of the matrix product, on a CPU also fp32 if that is faster; the copy is of fp32.
        quick: smaller sizes, for trying things out on a CPU.
    """
    on_gpu = device.type == "cuda"
    elements = 2**28 if on_gpu else (2**25 if quick else 2**26)
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device)
    size = 8192 if on_gpu else (1024 if quick else 1536)
    # A CPU may be slower in half precision, and then nothing keeps a kernel from widening.
    kinds = {dtype} if on_gpu else {dtype, torch.float32}
    product, fastest = min(((_product(size, kind, device), kind) for kind in kinds), key=lambda pair: pair[0])
    return Ceilings(
        copy_bandwidth=2 * source.nbytes / copy,
        copy_bytes=source.nbytes,
        matmul_rate=2 * size**3 / product,
        matmul_size=size,
        dtype=str(fastest).removeprefix("torch."),
    )


def _product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return _seconds(lambda: left @ right, device)


def _seconds(run, device: torch.device, repeats: int = 7) -> float:
    def once() -> float:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        start = time.process_time()
        run()
        return time.process_time() - start

    for _ in range(2):
        once()
    return statistics.median(once() for _ in range(repeats))
