"""Mean and reciprocal standard deviation of rows in one read; see ``reference.row_statistics``."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.common import NORM_EPS
from ..reference.common import row_statistics as reference
from ..tune.row import Row, once_per_row
from .blocks import load_tile
from .host import POINTERS, aligned, ceil_div, compile_arguments, launch, on_device, row_for


@triton.jit(do_not_specialize=["rows"])
def row_statistics_kernel(
    x_ptr,  # (rows, D)
    mean_ptr,  # (rows,) fp32
    rstd_ptr,  # (rows,) fp32
    rows,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # mean = sum(x) / D;  rstd = 1 / sqrt(sum((x - mean)^2) / D + eps)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, PADDED_D)
    x = load_tile(x_ptr, row, rows, column, D, D == PADDED_D).to(tl.float32)
    mean = tl.sum(x, 1) / D
    centred = tl.where((column < D)[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + EPS)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@once_per_row
def _constants(row: Row, width: int) -> dict:
    return {"D": width, "PADDED_D": triton.next_power_of_2(width), "EPS": NORM_EPS, **row.blocks}


def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.row_statistics``: x (..., D) -> mean (...) and rstd (...), fp32."""
    width = x.shape[-1]
    row = row_for("row_statistics", x, width)
    if row is None:
        return reference(x)
    rows = aligned(x, width)
    mean = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if rows.shape[0]:
        constants = _constants(row, width)
        grid = (ceil_div(rows.shape[0], constants["BLOCK_M"]),)
        with on_device(x):
            launch(row_statistics_kernel, grid, rows, mean, rstd, rows.shape[0], **constants, **row.options)
    return mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def static_launches(row: Row, dtype: str, width: int) -> Iterator[tuple]:
    """The kernel as ``triton.compile`` takes it, for rows ``width`` wide."""
    types = {"x_ptr": POINTERS[dtype], "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "rows": "i32"}
    yield compile_arguments(row_statistics_kernel, types, _constants(row, width))
