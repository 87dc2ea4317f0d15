"""LayerNorm, Linear, GELU, Linear without ever writing the hidden tensor; see ``reference.adapter``.

Forward and data gradient hold a block of rows in registers and walk over the hidden width in chunks; the
weights' gradients have a kernel of their own, split over rows, with fp32 partial sums. At side widths that
the table has no such backward for, its products are the vendor library's, over blocks of rows, and only what
surrounds them are kernels. ``ladder`` uses the same pieces.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..reference import adapter as reference
from ..reference.common import NORM_EPS, matmul, row_blocks
from ..tune.row import TORCH_TYPES, Row, once_per_row
from .blocks import (
    accumulate,
    add,
    affine,
    cast,
    chunks,
    contract,
    gelu_with_slope,
    load_parameter,
    load_rows,
    load_tile,
    load_vector,
    load_weights,
    mlp,
    mlp_bwd,
    multiply,
    packed_width,
    pair_constants,
    standardize,
    standardize_bwd,
    store_rows,
    store_sums,
    store_tile,
    store_weights,
    zero_rows,
)
from .host import (
    ACTIVATION,
    aligned,
    ceil_div,
    compile_arguments,
    launch,
    on_device,
    once_per_step,
    pointer_types,
    row_for,
    split,
    split_product,
)


@triton.jit
def _affine_input(
    x_ptr, norm_weight_ptr, norm_bias_ptr, row, rows,
    R: tl.constexpr, SIZES: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """m = gamma standardize(x) + beta in fp32."""
    x = cast(load_rows(x_ptr, row, rows, R, SIZES), tl.float32)
    n, _ = standardize(x, R, SIZES, EPS)
    return affine(n, norm_weight_ptr, norm_bias_ptr, R, SIZES)


@triton.jit(do_not_specialize=["rows"])
def adapter_fwd_kernel(
    x_ptr,  # (rows, R)
    norm_weight_ptr,  # (R,)
    norm_bias_ptr,  # (R,)
    weight_1_ptr,  # (HIDDEN, sum(SIZES)), zero outside the real one
    bias_1_ptr,  # (HIDDEN,)
    weight_2_ptr,  # (HIDDEN, sum(SIZES)), transposed
    bias_2_ptr,  # (R,)
    out_ptr,  # (rows, R)
    rows,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # y = W2 gelu(W1 (gamma n + beta) + b1) + b2,  n = standardize(x)
    kind = weight_1_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = _affine_input(x_ptr, norm_weight_ptr, norm_bias_ptr, row, rows, R, SIZES, EPS)
    y = mlp(cast(m, kind), weight_1_ptr, bias_1_ptr, weight_2_ptr, BLOCK_M, SIZES, HIDDEN, BLOCK_H)
    store_rows(out_ptr, row, rows, add(y, load_parameter(bias_2_ptr, R, SIZES)), R, SIZES)


@triton.jit
def norm_gradient(d, v, norm_weight_ptr, part_ptr, R: tl.constexpr, SIZES: tl.constexpr, EPS: tl.constexpr):
    """dv of m = gamma standardize(v) + beta from dm; sum dm n and sum dm go to part_ptr (2, R)."""
    n, rstd = standardize(v, R, SIZES, EPS)
    store_sums(part_ptr, multiply(d, n), R, SIZES)
    store_sums(part_ptr + R, d, R, SIZES)
    return standardize_bwd(multiply(d, load_parameter(norm_weight_ptr, R, SIZES)), n, rstd, R)


@triton.jit(do_not_specialize=["rows"])
def adapter_bwd_kernel(
    grad_ptr,  # (rows, R)
    x_ptr,  # (rows, R)
    norm_weight_ptr,  # (R,)
    norm_bias_ptr,  # (R,)
    weight_1_ptr,  # (HIDDEN, sum(SIZES)) as in adapter_fwd_kernel
    bias_1_ptr,  # (HIDDEN,)
    weight_2_ptr,  # (HIDDEN, sum(SIZES))
    affine_ptr,  # (rows, R)
    grad_x_ptr,  # (rows, R)
    part_ptr,  # (programs, 3, R) fp32
    rows,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # m = gamma n + beta;  dm = ((g W2) * gelu'(W1 m + b1)) W1;  dx = standardize_bwd(dm gamma)
    # parts: sum dm n, sum dm, sum g
    kind = weight_1_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    part = part_ptr + pid * 3 * R
    m = _affine_input(x_ptr, norm_weight_ptr, norm_bias_ptr, row, rows, R, SIZES, EPS)
    store_rows(affine_ptr, row, rows, m, R, SIZES)
    g = load_rows(grad_ptr, row, rows, R, SIZES)
    d = mlp_bwd(
        cast(g, kind), cast(m, kind),
        weight_1_ptr, bias_1_ptr, weight_2_ptr, BLOCK_M, SIZES, HIDDEN, BLOCK_H,
    )  # fmt: skip
    # Loaded again: what lives through the loop above costs registers there.
    g = load_rows(grad_ptr, row, rows, R, SIZES, True)
    store_sums(part + 2 * R, cast(g, tl.float32), R, SIZES)
    x = cast(load_rows(x_ptr, row, rows, R, SIZES, True), tl.float32)
    dx = norm_gradient(d, x, norm_weight_ptr, part, R, SIZES, EPS)
    store_rows(grad_x_ptr, row, rows, dx, R, SIZES)


@triton.jit(do_not_specialize=["rows", "steps"])
def adapter_bwd_weight_kernel(
    grad_ptr,  # (rows, R)
    affine_ptr,  # (rows, R), m
    weight_1_ptr,  # (HIDDEN, sum(SIZES))
    bias_1_ptr,  # (HIDDEN,)
    weight_2_ptr,  # (HIDDEN, sum(SIZES))
    part_ptr,  # (splits, 2, HIDDEN, sum(SIZES)) fp32
    bias_part_ptr,  # (splits, HIDDEN) fp32
    rows,
    steps,  # blocks of rows per split
    R: tl.constexpr,
    SIZES: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # p^T = W1 m^T + b1;  dp^T = (W2^T g^T) * gelu'(p^T);  parts: dp^T m, gelu(p^T) g, sum dp
    kind = weight_1_ptr.dtype.element_ty
    start = tl.program_id(0) * BLOCK_H
    split = tl.program_id(1).to(tl.int64)
    hidden = start + tl.arange(0, BLOCK_H)
    weight_1 = load_weights(weight_1_ptr, start, BLOCK_H, SIZES)
    weight_2 = load_weights(weight_2_ptr, start, BLOCK_H, SIZES)
    bias = tl.load(bias_1_ptr + hidden).to(tl.float32)[:, None]
    grad_1 = zero_rows(BLOCK_H, SIZES)
    grad_2 = zero_rows(BLOCK_H, SIZES)
    grad_bias = tl.zeros([BLOCK_H], tl.float32)
    for step in tl.range(0, steps):
        row = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        m = load_rows(affine_ptr, row, rows, R, SIZES)
        g = load_rows(grad_ptr, row, rows, R, SIZES)
        p = contract(weight_1, m)
        da = contract(weight_2, g)
        a, slope = gelu_with_slope(p + bias)
        dp = da * slope  # zero beyond the last row, as g is
        grad_bias += tl.sum(dp, 1)
        grad_1 = accumulate(dp.to(kind), m, grad_1)
        grad_2 = accumulate(a.to(kind), g, grad_2)
    part_ptr += split * 2 * HIDDEN * packed_width(SIZES)
    store_weights(part_ptr, start, grad_1, BLOCK_H, SIZES)
    store_weights(part_ptr + HIDDEN * packed_width(SIZES), start, grad_2, BLOCK_H, SIZES)
    tl.store(bias_part_ptr + split * HIDDEN + hidden, grad_bias)


@triton.jit(do_not_specialize=["rows"])
def adapter_bwd_normed_kernel(
    x_ptr,  # (rows, R)
    norm_weight_ptr,  # (R,)
    norm_bias_ptr,  # (R,)
    affine_ptr,  # (rows, R)
    rows,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # m = gamma standardize(x) + beta
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = _affine_input(x_ptr, norm_weight_ptr, norm_bias_ptr, row, rows, R, SIZES, EPS)
    store_rows(affine_ptr, row, rows, m, R, SIZES)


@triton.jit(do_not_specialize=["rows"])
def adapter_bwd_input_kernel(
    grad_ptr,  # (rows, R)
    grad_affine_ptr,  # (rows, R) fp32, dm
    x_ptr,  # (rows, R)
    norm_weight_ptr,  # (R,)
    grad_x_ptr,  # (rows, R)
    part_ptr,  # (programs, 3, R) fp32
    rows,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # dx = standardize_bwd(dm gamma);  parts: sum dm n, sum dm, sum g
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    part = part_ptr + pid * 3 * R
    g = load_rows(grad_ptr, row, rows, R, SIZES)
    store_sums(part + 2 * R, cast(g, tl.float32), R, SIZES)
    x = cast(load_rows(x_ptr, row, rows, R, SIZES), tl.float32)
    d = load_rows(grad_affine_ptr, row, rows, R, SIZES)
    dx = norm_gradient(d, x, norm_weight_ptr, part, R, SIZES, EPS)
    store_rows(grad_x_ptr, row, rows, dx, R, SIZES)


@triton.jit(do_not_specialize=["rows"])
def adapter_bwd_hidden_kernel(
    hidden_ptr,  # (rows, H) fp32, the product W1 m
    grad_hidden_ptr,  # (rows, H) fp32, g W2
    bias_1_ptr,  # (H,)
    active_ptr,  # (rows, H)
    grad_ptr,  # (rows, H)
    part_ptr,  # (row blocks, H) fp32
    rows,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # a = gelu(p + b1);  dp = da * gelu'(p + b1);  part: sum dp
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = load_tile(hidden_ptr, row, rows, column, H)
    a, slope = gelu_with_slope(p + load_vector(bias_1_ptr, column, H)[None, :])
    dp = load_tile(grad_hidden_ptr, row, rows, column, H) * slope
    store_tile(active_ptr, row, rows, column, a, H)
    store_tile(grad_ptr, row, rows, column, dp, H)
    tl.store(part_ptr + pid * H + column, tl.sum(dp, 0), mask=column < H)


@once_per_row
def fitted(row: Row, dtype: torch.dtype, width: int) -> Row:
    """The row itself, or in fp32 blocks of at most 32 (above side width 128: 16) rows and hidden columns and
    no copies ahead: twice the bytes, and products of a kind that needs more registers."""
    if dtype != torch.float32:
        return row
    largest = 32 if width <= 128 else 16
    return replace(row, blocks={name: min(size, largest) for name, size in row.blocks.items()}, num_stages=1)


def packed(
    weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, dtype: torch.dtype, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """W1 (H, r), b1 (H,) and W2 transposed (H, r) as the kernels read them: weights in ``dtype``, H rounded
    up to ``block`` hidden columns and r to the sum of its ``chunks``, zeros outside."""
    hidden, width = weight_1.shape
    pad = (0, sum(chunks(width)) - width, 0, -hidden % block)

    def padded(weight: Tensor) -> Tensor:
        weight = weight.to(dtype)
        return (F.pad(weight, pad) if any(pad) else weight).contiguous()

    first = once_per_step(weight_1, dtype, ("adapter", block), lambda: padded(weight_1))
    second = once_per_step(weight_2, dtype, ("adapter, transposed", block), lambda: padded(weight_2.T))
    bias = F.pad(bias_1, pad[2:]) if pad[3] else bias_1
    return first, bias.contiguous(), second


@once_per_row
def constants(row: Row, width: int, hidden: int) -> dict:
    """The constexpr arguments of a kernel with products at side width ``width`` and packed hidden width."""
    return {**pair_constants(row, width), "HIDDEN": hidden}


def weight_gradients(
    grad: Tensor, affine: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W1 (H, R), b1 (H,) and W2 (R, H) in fp32, from g and m (N, R), by one kernel. Its partial
    sums take 8 R H bytes a split, written and read: at r = 96 and H = 256, 66 splits of 0.2 MB."""
    hidden, width = weight_1.shape
    row = fitted(row_for("adapter_bwd_weight", affine, width), affine.dtype, width)
    weights = packed(weight_1, bias_1, weight_2, affine.dtype, row.blocks["BLOCK_H"])
    padded_hidden, padded_width = weights[0].shape
    columns = padded_hidden // row.blocks["BLOCK_H"]
    tiles = ceil_div(affine.shape[0], row.blocks["BLOCK_M"])
    steps, splits = split(tiles, columns)
    parts = torch.empty(splits, 2, padded_hidden, padded_width, dtype=torch.float32, device=grad.device)
    bias_parts = torch.empty(splits, padded_hidden, dtype=torch.float32, device=grad.device)
    with on_device(grad):
        launch(adapter_bwd_weight_kernel, (columns, splits),
            grad, affine, *weights, parts, bias_parts, affine.shape[0], steps,
            **constants(row, width, padded_hidden), **row.options,
        )  # fmt: skip
    grad_1, grad_2 = parts.sum(0)[:, :hidden, :width]
    return grad_1, bias_parts.sum(0)[:hidden], grad_2.T


def library_gradients(
    grad: Tensor, affine: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dm (N, R) and the gradients of W1, b1 and W2 in fp32, from g and m (N, R), the products by the vendor
    library over blocks of rows."""
    hidden, dtype = weight_1.shape[0], affine.dtype
    row = row_for("adapter_bwd_hidden", affine, hidden)
    weight_1, weight_2, bias_1 = weight_1.to(dtype), weight_2.to(dtype), bias_1.contiguous()
    grad_affine = torch.empty(affine.shape, dtype=torch.float32, device=grad.device)
    sums = []
    for block in row_blocks(affine.shape[0], hidden, grad.device):
        raw = matmul(affine[block], weight_1.T, dtype)
        grad_raw = matmul(grad[block], weight_2, dtype)
        active, grad_hidden = (torch.empty(raw.shape, dtype=dtype, device=grad.device) for _ in range(2))
        grid = (ceil_div(raw.shape[0], row.blocks["BLOCK_M"]), ceil_div(hidden, row.blocks["BLOCK_N"]))
        parts = torch.empty(grid[0], hidden, dtype=torch.float32, device=grad.device)
        with on_device(grad):
            launch(adapter_bwd_hidden_kernel, grid,
                raw, grad_raw, bias_1, active, grad_hidden, parts, raw.shape[0],
                H=hidden, **row.blocks, **row.options,
            )  # fmt: skip
        grad_affine[block] = matmul(grad_hidden, weight_1, dtype)
        grad_1 = split_product(grad_hidden, affine[block], dtype)
        sums.append((grad_1, parts.sum(0), split_product(grad[block], active, dtype)))
    return grad_affine, *(sum(parts[1:], start=parts[0]) for parts in zip(*sums, strict=True))


def gradients(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x and, in fp32, of the six parameters.

    grad: (N, R) in the type of the products. x: (N, R) in that type or fp32. Both contiguous, N > 0.
    """
    norm_weight, norm_bias = norm_weight.contiguous(), norm_bias.contiguous()
    count, width = x.shape
    affine, grad_x = torch.empty_like(grad), torch.empty_like(x)
    row = row_for("adapter_bwd", grad, width)
    if row is not None:
        row = fitted(row, grad.dtype, width)
        programs = ceil_div(count, row.blocks["BLOCK_M"])
        parts = torch.empty(programs, 3, width, dtype=torch.float32, device=x.device)
        weights = packed(weight_1, bias_1, weight_2, grad.dtype, row.blocks["BLOCK_H"])
        with on_device(x):
            launch(adapter_bwd_kernel, (programs,),
                grad, x, norm_weight, norm_bias, *weights, affine, grad_x, parts, count,
                EPS=NORM_EPS, **constants(row, width, weights[0].shape[0]), **row.options,
            )  # fmt: skip
        inner = weight_gradients(grad, affine, weight_1, bias_1, weight_2)
    else:
        row = row_for("adapter_bwd_normed", grad, width)
        with on_device(x):
            launch(adapter_bwd_normed_kernel, (ceil_div(count, row.blocks["BLOCK_M"]),),
                x, norm_weight, norm_bias, affine, count,
                EPS=NORM_EPS, **pair_constants(row, width), **row.options,
            )  # fmt: skip
        grad_affine, *inner = library_gradients(grad, affine, weight_1, bias_1, weight_2)
        row = row_for("adapter_bwd_input", grad, width)
        programs = ceil_div(count, row.blocks["BLOCK_M"])
        parts = torch.empty(programs, 3, width, dtype=torch.float32, device=x.device)
        with on_device(x):
            launch(adapter_bwd_input_kernel, (programs,),
                grad, grad_affine, x, norm_weight, grad_x, parts, count,
                EPS=NORM_EPS, **pair_constants(row, width), **row.options,
            )  # fmt: skip
    grad_norm_weight, grad_norm_bias, grad_bias_2 = parts.sum(0)
    return grad_x, grad_norm_weight, grad_norm_bias, *inner, grad_bias_2


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """As ``reference.adapter.forward``."""
    width = x.shape[-1]
    row = row_for("adapter_fwd", x, width)
    if row is None:
        return reference.forward(x, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    row = fitted(row, x.dtype, width)
    rows = aligned(x, width)
    out = torch.empty_like(rows)
    if rows.numel():
        weights = packed(weight_1, bias_1, weight_2, x.dtype, row.blocks["BLOCK_H"])
        grid = (ceil_div(rows.shape[0], row.blocks["BLOCK_M"]),)
        norm = (norm_weight.contiguous(), norm_bias.contiguous())
        with on_device(x):
            launch(adapter_fwd_kernel, grid,
                rows, *norm, *weights, bias_2.contiguous(), out, rows.shape[0],
                EPS=NORM_EPS, **constants(row, width, weights[0].shape[0]), **row.options,
            )  # fmt: skip
    return out.view(x.shape)


def backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    need_x: bool,
) -> list[Tensor]:
    """As ``reference.adapter.backward``."""
    given = (norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    width = x.shape[-1]
    if row_for("adapter_bwd_normed", x, width) is None or x.numel() == 0:
        return reference.backward(grad, x, *given, need_x)
    grad_x, *grads = gradients(aligned(grad.to(x.dtype), width), aligned(x, width), *given[:-1])
    return [
        grad_x.view(x.shape) if need_x else x.new_empty(0),
        *(total.to(t.dtype).contiguous() for total, t in zip(grads, given, strict=True)),
    ]


NORM = {"norm_weight_ptr": "*fp32", "norm_bias_ptr": "*fp32"}
WEIGHTS = {"weight_1_ptr": ACTIVATION, "bias_1_ptr": "*fp32", "weight_2_ptr": ACTIVATION}
_TYPES = {
    adapter_fwd_kernel: {
        **{"x_ptr": ACTIVATION, **NORM, **WEIGHTS, "bias_2_ptr": "*fp32"},
        **{"out_ptr": ACTIVATION, "rows": "i32"},
    },
    adapter_bwd_kernel: {
        **{"grad_ptr": ACTIVATION, "x_ptr": ACTIVATION, **NORM, **WEIGHTS},
        **{"affine_ptr": ACTIVATION, "grad_x_ptr": ACTIVATION, "part_ptr": "*fp32", "rows": "i32"},
    },
    adapter_bwd_weight_kernel: {
        **{"grad_ptr": ACTIVATION, "affine_ptr": ACTIVATION, **WEIGHTS},
        **{"part_ptr": "*fp32", "bias_part_ptr": "*fp32", "rows": "i32", "steps": "i32"},
    },
    adapter_bwd_normed_kernel: {"x_ptr": ACTIVATION, **NORM, "affine_ptr": ACTIVATION, "rows": "i32"},
    adapter_bwd_input_kernel: {
        **{"grad_ptr": ACTIVATION, "grad_affine_ptr": "*fp32", "x_ptr": ACTIVATION},
        **{"norm_weight_ptr": "*fp32", "grad_x_ptr": ACTIVATION, "part_ptr": "*fp32", "rows": "i32"},
    },
    adapter_bwd_hidden_kernel: {
        **{"hidden_ptr": "*fp32", "grad_hidden_ptr": "*fp32", "bias_1_ptr": "*fp32"},
        **{"active_ptr": ACTIVATION, "grad_ptr": ACTIVATION, "part_ptr": "*fp32", "rows": "i32"},
    },
}


def static_launches(row: Row, dtype: str, width: int) -> Iterator[tuple]:
    """The row's kernel as ``triton.compile`` takes it: UniPT's adapter of a backbone 8 times as wide as its
    side ``width``; the width of ``adapter_bwd_hidden`` is the hidden one."""
    row = fitted(row, TORCH_TYPES[dtype], width)
    function = next(kernel for kernel in _TYPES if kernel.__name__ == f"{row.kernel}_kernel")
    types = pointer_types(_TYPES[function], dtype)
    if function is adapter_bwd_hidden_kernel:
        yield compile_arguments(function, types, {"H": width, **row.blocks})
        return
    block = row.blocks.get("BLOCK_H", 0)
    hidden = ceil_div(min(8 * width, 1280), block) * block if block else 0
    values = dict(constants(row, width, hidden) if block else pair_constants(row, width))
    if function is not adapter_bwd_weight_kernel:
        values["EPS"] = NORM_EPS
    yield compile_arguments(function, types, values)
