"""LayerNorm and projection with the LayerNorm folded behind the product; see ``reference.norm_linear``.

The product ``x Wc^T`` is the vendor library's: fusing it would save a few per cent of the time that reading x
takes. The kernels are what surrounds it.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import norm_linear as reference
from ..reference.common import matmul, row_blocks, standardize_bwd
from ..tune.row import Row
from .blocks import (
    add,
    cast,
    load_parameter,
    load_rows,
    load_statistic,
    pair_constants,
    scale,
    store_rows,
    store_sums,
    subtract,
)
from .host import (
    ACTIVATION,
    aligned,
    ceil_div,
    compile_arguments,
    flat,
    launch,
    on_device,
    once_per_step,
    pointer_types,
    row_for,
    split_product,
)


@triton.jit
def unfold(raw, row, rows, mean_ptr, rstd_ptr, centre_ptr, bias_ptr, R: tl.constexpr, SIZES: tl.constexpr):
    """z = rstd * (raw - mean * c) + b in fp32."""
    mean = load_statistic(mean_ptr, row, rows)
    rstd = load_statistic(rstd_ptr, row, rows)
    c = load_parameter(centre_ptr, R, SIZES)
    b = load_parameter(bias_ptr, R, SIZES)
    return add(scale(rstd, subtract(raw, scale(mean, c))), b)


@triton.jit(do_not_specialize=["rows"])
def norm_linear_fwd_kernel(
    raw_ptr,  # (rows, R) fp32, the product of x and the folded weight
    mean_ptr,  # (rows,) fp32
    rstd_ptr,  # (rows,) fp32
    centre_ptr,  # (R,) fp32, sums of the folded weight's rows
    bias_ptr,  # (R,)
    out_ptr,  # (rows, R)
    rows,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # z = rstd * (raw - mean * c) + b
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    raw = load_rows(raw_ptr, row, rows, R, SIZES)
    z = unfold(raw, row, rows, mean_ptr, rstd_ptr, centre_ptr, bias_ptr, R, SIZES)
    store_rows(out_ptr, row, rows, z, R, SIZES)


@triton.jit
def store_scaled(ptr, part_ptr, dz, row, rows, mean_ptr, rstd_ptr, R: tl.constexpr, SIZES: tl.constexpr):
    """dzr = rstd * dz to ptr, and sum dzr * mean (R,) to part_ptr: of the rounded dzr, as the product takes
    it, so that a large mean cancels."""
    mean = load_statistic(mean_ptr, row, rows)
    d = cast(scale(load_statistic(rstd_ptr, row, rows), dz), ptr.dtype.element_ty)
    store_rows(ptr, row, rows, d, R, SIZES)
    store_sums(part_ptr, scale(mean, cast(d, tl.float32)), R, SIZES)


@triton.jit(do_not_specialize=["rows"])
def norm_linear_bwd_kernel(
    grad_ptr,  # (rows, R)
    mean_ptr,  # (rows,) fp32
    rstd_ptr,  # (rows,) fp32
    scaled_ptr,  # (rows, R)
    part_ptr,  # (programs, 2, R) fp32
    rows,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # dzr = rstd * dz;  parts: sum dz, sum dzr * mean
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    g = cast(load_rows(grad_ptr, row, rows, R, SIZES), tl.float32)
    part = part_ptr + pid * 2 * R
    store_sums(part, g, R, SIZES)
    store_scaled(scaled_ptr, part + R, g, row, rows, mean_ptr, rstd_ptr, R, SIZES)


def projected(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Product of rows x (N, D) and the folded weight (r, D) -> (N, r), and its row sums (r,), both fp32."""

    def make() -> tuple[Tensor, Tensor]:
        rounded = weight.to(x.dtype)
        return rounded, rounded.sum(-1, dtype=torch.float32)

    rounded, centre = once_per_step(weight, x.dtype, "projected", make)
    return matmul(x, rounded.T, x.dtype), centre


def folded_gradients(
    scaled: Tensor, mean_sum: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_x: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, D), empty unless ``need_x``, and of the folded weight (r, D) in fp32.

    scaled: dzr (N, r). mean_sum: sum of dzr * mean (r,).
    """
    grad_weight = split_product(scaled, x, x.dtype) - mean_sum[:, None]
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    for block in row_blocks(x.shape[0], x.shape[1], x.device) if need_x else ():
        normed = (x[block].float() - mean[block, None]) * rstd[block, None]
        grad_normed = matmul(scaled[block], weight, x.dtype)  # already times rstd
        grad_x[block] = standardize_bwd(grad_normed, normed, torch.ones_like(rstd[block, None]))
    return grad_x, grad_weight


def forward(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """As ``reference.norm_linear.forward``."""
    width = weight.shape[0]
    row = row_for("norm_linear_fwd", x, width)
    if row is None:
        return reference.forward(x, weight, bias, mean, rstd)
    rows = aligned(x, x.shape[-1])
    out = x.new_empty(rows.shape[0], width)
    if rows.shape[0]:
        raw, centre = projected(rows, weight)
        constants = pair_constants(row, width)
        grid = (ceil_div(rows.shape[0], constants["BLOCK_M"]),)
        with on_device(x):
            launch(
                norm_linear_fwd_kernel,
                grid,
                raw,
                *flat(mean, rstd),
                centre,
                bias.contiguous(),
                out,
                rows.shape[0],
                **constants,
                **row.options,
            )
    return out.view(*x.shape[:-1], width)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, need_x: bool
) -> list[Tensor]:
    """As ``reference.norm_linear.backward``."""
    width = weight.shape[0]
    row = row_for("norm_linear_bwd", x, width)
    if row is None or x.numel() == 0:
        return reference.backward(grad, x, weight, bias, mean, rstd, need_x)
    rows, upstream = aligned(x, x.shape[-1]), aligned(grad, width)
    mean, rstd = flat(mean, rstd)
    constants = pair_constants(row, width)
    programs = ceil_div(rows.shape[0], constants["BLOCK_M"])
    scaled = x.new_empty(upstream.shape)
    parts = torch.empty(programs, 2, width, dtype=torch.float32, device=x.device)
    with on_device(x):
        launch(
            norm_linear_bwd_kernel,
            (programs,),
            upstream,
            mean,
            rstd,
            scaled,
            parts,
            rows.shape[0],
            **constants,
            **row.options,
        )
    grad_bias, mean_sum = parts.sum(0)
    grad_x, grad_weight = folded_gradients(scaled, mean_sum, rows, weight, mean, rstd, need_x)
    return [
        grad_x.view(x.shape) if need_x else grad_x,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    ]


_STATISTICS = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
_TYPES = {
    norm_linear_fwd_kernel: {
        **{"raw_ptr": "*fp32", **_STATISTICS, "centre_ptr": "*fp32", "bias_ptr": "*fp32"},
        **{"out_ptr": ACTIVATION, "rows": "i32"},
    },
    norm_linear_bwd_kernel: {
        **{"grad_ptr": ACTIVATION, **_STATISTICS, "scaled_ptr": ACTIVATION, "part_ptr": "*fp32"},
        **{"rows": "i32"},
    },
}


def static_launches(row: Row, dtype: str, width: int) -> Iterator[tuple]:
    """The row's kernel as ``triton.compile`` takes it, for side width ``width`` and fp32 parameters."""
    function = next(kernel for kernel in _TYPES if kernel.__name__ == f"{row.kernel}_kernel")
    yield compile_arguments(function, pointer_types(_TYPES[function], dtype), pair_constants(row, width))
