"""The search for better block sizes: a row's neighbours that compile, timed on the GPU at hand."""

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from .. import ops
from ..testing import Case, flat_tensors
from . import choice, static_check
from .row import TORCH_TYPES, Architecture, Row, architecture_of
from .static_check import SPILL_LIMIT


def candidates(row: Row) -> Iterator[Row]:
    """The row itself, then its neighbours: each block size halved, kept or doubled, other warps, stages."""
    yield row
    names = list(row.blocks)
    sizes = [sorted({max(16, size // 2), size, size * 2}) for size in row.blocks.values()]
    for blocks in itertools.product(*sizes):
        for warps, stages in itertools.product((4, 8), (1, 2, 3)):
            neighbour = replace(row, blocks=dict(zip(names, blocks)), num_warps=warps, num_stages=stages)
            if neighbour != row:
                yield neighbour


def checked(row: Row, arch: Architecture, width: int, dtype: str) -> Iterator[tuple[Row, str]]:
    """The candidates of a row as they are compiled for an architecture, each with its problem or ""."""
    for candidate in candidates(row):
        results = list(static_check.check_row(candidate, arch, width, dtype))
        spills = max((r.spill_stores + r.spill_loads for r in results), default=0)
        problems = [r.problem for r in results if r.problem]
        if spills > SPILL_LIMIT:
            problems.append(f"spills {spills} bytes")
        yield candidate, next(iter(problems), "")


def passing(row: Row, arch: Architecture, width: int, dtype: str) -> Iterator[Row]:
    """The candidates of a row that compile on an architecture without spilling."""
    return (candidate for candidate, problem in checked(row, arch, width, dtype) if not problem)


def input_sets(case: Case, dtype: torch.dtype, backward: bool) -> list[dict]:
    """Inputs of an op on the current CUDA device, as many sets as it takes to leave the L2 cache."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    size = max(1, case.batch * case.frames * case.width * torch.finfo(dtype).bits // 8)
    sets = [case.inputs(dtype, "cuda", seed) for seed in range(min(8, 2 + 2 * l2 // size))]
    for inputs in sets:
        for tensor in flat_tensors(inputs).values():
            tensor.requires_grad_(backward)
    return sets


def time_case(case: Case, sets: list[dict], backward: bool, repeats: int = 20) -> float:
    """Median milliseconds of an op on the current CUDA device, going round its :func:`input_sets`."""
    upstream = torch.randn_like(case.function()(**sets[0]))

    def run(inputs: dict) -> float:
        out = case.function()(**inputs) if backward else None
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if backward:
            out.backward(upstream)
        else:
            case.function()(**inputs)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    for inputs in sets:
        run(inputs)
    return statistics.median(run(sets[i % len(sets)]) for i in range(repeats))


def case_for(row: Row, width: int, batch: int, frames: int) -> Case:
    """A case of the shared table that runs a row's kernel at a width, in the sense that the row gives it."""
    shape = {"batch": batch, "frames": frames, "adapter_dim": 256, "layers": 12}
    if row.kernel == "row_statistics":  # its width is the backbone's, and norm_linear calls it
        return Case(op="norm_linear", width=width, side=max(1, width // 8), **shape)
    if row.kernel.startswith("eight_bit"):  # of a hidden state, too
        return Case(op="eight_bit", width=width, **shape)
    if row.kernel == "adapter_bwd_hidden":  # its width is the adapter's, and wide sides call it
        return Case(op="adapter", side=256, **{**shape, "adapter_dim": width})
    return Case(op=static_check.module_name(row.kernel), width=8 * width, side=width, **shape)


def fastest(
    row: Row, width: int, dtype: str, batch: int, frames: int, seconds: float = float("inf")
) -> Row | None:
    """The fastest passing candidate of a row at one width on the current CUDA device, of those tried within
    so many seconds; the row itself is tried first. None, with the reason printed, where none passes, or where
    the row's kernel does not run at this width."""
    from triton.errors import TritonError

    from ..triton_kernels import host

    case, backward = case_for(row, width, batch, frames), "bwd" in row.kernel
    sets = input_sets(case, TORCH_TYPES[dtype], backward)
    best, best_time, start, before = None, float("inf"), time.monotonic(), ""
    for candidate in passing(row, architecture_of(), width, dtype):
        if best is not None and time.monotonic() - start > seconds:
            print(f"  stopped after {seconds:g} s", flush=True)
            break
        with choice.trial(candidate), ops.use_backend("triton"), host.launched() as launched:
            try:
                elapsed = time_case(case, sets, backward)
            except (RuntimeError, TritonError) as error:
                # Out of resources on this device: not a candidate here.
                print(f"  {candidate.blocks}: {(str(error).splitlines() or [repr(error)])[0]}", flush=True)
                continue
        if f"{row.kernel}_kernel" not in launched:  # others do its work at this width
            print("  never runs at this width, so it keeps its row", flush=True)
            return None
        launch = f"{candidate.num_warps}w {candidate.num_stages}s"
        print(f"  {elapsed:9.3f} ms  {candidate.blocks} {launch}", flush=True)
        if candidate == row:
            before = f", {elapsed:.3f} before"
        if elapsed < best_time:
            best, best_time = candidate, elapsed
    if best is None:
        print("  no candidate passes, so it keeps its row", flush=True)
        return None
    reason = f"{best_time:.3f} ms at batch {batch}, {frames} frames, {dtype}{before}"
    return replace(best, widths=(width, width), family="any", reason=reason)
