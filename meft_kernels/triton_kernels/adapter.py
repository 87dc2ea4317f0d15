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
from ..tune.row import TORCH_TYPES, Row
from .blocks import (
    adapter_pair,
    adapter_pair_bwd,
    affine_pair,
    chunks,
    gelu_with_slope,
    load_pair,
    load_weights,
    pair_constants,
    standardize_pair,
    standardize_pair_bwd,
    store_pair,
    store_sums,
    vector_pair,
)
from .host import (
    POINTERS,
    aligned,
    compile_arguments,
    launch,
    on_device,
    once_per_step,
    row_for,
    split,
    split_product,
)


@triton.jit(do_not_specialize=["rows"])
def adapter_fwd_kernel(
    x_ptr,  # (rows, R)
    norm_weight_ptr,  # (R,)
    norm_bias_ptr,  # (R,)
    weight_1_ptr,  # (HIDDEN, R0 + R1), zero outside the real one
    bias_1_ptr,  # (HIDDEN,)
    weight_2_ptr,  # (HIDDEN, R0 + R1), transposed
    bias_2_ptr,  # (R,)
    out_ptr,  # (rows, R)
    rows,
    R: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # y = W2 gelu(W1 (gamma n + beta) + b1) + b2,  n = standardize(x)
    kind = weight_1_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x0, x1 = load_pair(x_ptr, row, rows, R, R0, R1)
    n0, n1, _ = standardize_pair(x0.to(tl.float32), x1.to(tl.float32), R, R0, R1, EPS)
    m0, m1 = affine_pair(n0, n1, norm_weight_ptr, norm_bias_ptr, R, R0, R1)
    y0, y1 = adapter_pair(
        m0.to(kind), m1.to(kind), weight_1_ptr, bias_1_ptr, weight_2_ptr, BLOCK_M, R0, R1, HIDDEN, BLOCK_H
    )
    b0, b1 = vector_pair(bias_2_ptr, R, R0, R1)
    store_pair(out_ptr, row, rows, y0 + b0, y1 + b1, R, R0, R1)


@triton.jit
def norm_gradient_pair(
    d0, d1, v0, v1, norm_weight_ptr, part_ptr,
    R: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """dv of m = gamma standardize(v) + beta from dm; sum dm n and sum dm go to part_ptr (2, R)."""
    n0, n1, rstd = standardize_pair(v0, v1, R, R0, R1, EPS)
    store_sums(part_ptr, d0 * n0, d1 * n1, R, R0, R1)
    store_sums(part_ptr + R, d0, d1, R, R0, R1)
    w0, w1 = vector_pair(norm_weight_ptr, R, R0, R1)
    return standardize_pair_bwd(d0 * w0, d1 * w1, n0, n1, rstd, R, R1)


@triton.jit(do_not_specialize=["rows"])
def adapter_bwd_kernel(
    grad_ptr,  # (rows, R)
    x_ptr,  # (rows, R)
    norm_weight_ptr,  # (R,)
    norm_bias_ptr,  # (R,)
    weight_1_ptr,  # (HIDDEN, R0 + R1) as in adapter_fwd_kernel
    bias_1_ptr,  # (HIDDEN,)
    weight_2_ptr,  # (HIDDEN, R0 + R1)
    affine_ptr,  # (rows, R)
    grad_x_ptr,  # (rows, R)
    part_ptr,  # (programs, 3, R) fp32
    rows,
    R: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
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
    x0, x1 = load_pair(x_ptr, row, rows, R, R0, R1)
    n0, n1, _ = standardize_pair(x0.to(tl.float32), x1.to(tl.float32), R, R0, R1, EPS)
    m0, m1 = affine_pair(n0, n1, norm_weight_ptr, norm_bias_ptr, R, R0, R1)
    store_pair(affine_ptr, row, rows, m0, m1, R, R0, R1)
    g0, g1 = load_pair(grad_ptr, row, rows, R, R0, R1)
    d0, d1 = adapter_pair_bwd(
        g0.to(kind), g1.to(kind), m0.to(kind), m1.to(kind),
        weight_1_ptr, bias_1_ptr, weight_2_ptr, BLOCK_M, R0, R1, HIDDEN, BLOCK_H,
    )  # fmt: skip
    # Loaded again: what lives through the loop above costs registers there.
    g0, g1 = load_pair(grad_ptr, row, rows, R, R0, R1, True)
    store_sums(part + 2 * R, g0.to(tl.float32), g1.to(tl.float32), R, R0, R1)
    x0, x1 = load_pair(x_ptr, row, rows, R, R0, R1, True)
    dx0, dx1 = norm_gradient_pair(
        d0, d1, x0.to(tl.float32), x1.to(tl.float32), norm_weight_ptr, part, R, R0, R1, EPS
    )
    store_pair(grad_x_ptr, row, rows, dx0, dx1, R, R0, R1)


@triton.jit(do_not_specialize=["rows", "steps"])
def adapter_bwd_weight_kernel(
    grad_ptr,  # (rows, R)
    affine_ptr,  # (rows, R), m
    weight_1_ptr,  # (HIDDEN, R0 + R1)
    bias_1_ptr,  # (HIDDEN,)
    weight_2_ptr,  # (HIDDEN, R0 + R1)
    part_ptr,  # (splits, 2, HIDDEN, R0 + R1) fp32
    bias_part_ptr,  # (splits, HIDDEN) fp32
    rows,
    steps,  # blocks of rows per split
    R: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # p^T = W1 m^T + b1;  dp^T = (W2^T g^T) * gelu'(p^T);  parts: dp^T m, gelu(p^T) g, sum dp
    kind = weight_1_ptr.dtype.element_ty
    start = tl.program_id(0) * BLOCK_H
    split = tl.program_id(1).to(tl.int64)
    hidden = start + tl.arange(0, BLOCK_H)
    w0, w1 = load_weights(weight_1_ptr, start, BLOCK_H, R0, R1)
    v0, v1 = load_weights(weight_2_ptr, start, BLOCK_H, R0, R1)
    bias = tl.load(bias_1_ptr + hidden).to(tl.float32)[:, None]
    dw0 = tl.zeros([BLOCK_H, R0], tl.float32)
    dw1 = tl.zeros([BLOCK_H, R1 if R1 > 0 else R0], tl.float32)
    dv0 = tl.zeros([BLOCK_H, R0], tl.float32)
    dv1 = tl.zeros([BLOCK_H, R1 if R1 > 0 else R0], tl.float32)
    db = tl.zeros([BLOCK_H], tl.float32)
    for step in tl.range(0, steps):
        row = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        m0, m1 = load_pair(affine_ptr, row, rows, R, R0, R1)
        g0, g1 = load_pair(grad_ptr, row, rows, R, R0, R1)
        p = tl.dot(w0, m0.T, input_precision="ieee")
        da = tl.dot(v0, g0.T, input_precision="ieee")
        if R1 > 0:
            p = tl.dot(w1, m1.T, p, input_precision="ieee")
            da = tl.dot(v1, g1.T, da, input_precision="ieee")
        a, slope = gelu_with_slope(p + bias)
        dp = da * slope  # zero beyond the last row, as g is
        db += tl.sum(dp, 1)
        dw0 = tl.dot(dp.to(kind), m0, dw0, input_precision="ieee")
        dv0 = tl.dot(a.to(kind), g0, dv0, input_precision="ieee")
        if R1 > 0:
            dw1 = tl.dot(dp.to(kind), m1, dw1, input_precision="ieee")
            dv1 = tl.dot(a.to(kind), g1, dv1, input_precision="ieee")
    WIDTH: tl.constexpr = R0 + R1
    part = part_ptr + split * 2 * HIDDEN * WIDTH + hidden[:, None] * WIDTH
    column = tl.arange(0, R0)[None, :]
    tl.store(part + column, dw0)
    tl.store(part + HIDDEN * WIDTH + column, dv0)
    if R1 > 0:
        column = R0 + tl.arange(0, R1)[None, :]
        tl.store(part + column, dw1)
        tl.store(part + HIDDEN * WIDTH + column, dv1)
    tl.store(bias_part_ptr + split * HIDDEN + hidden, db)


@triton.jit(do_not_specialize=["rows"])
def adapter_bwd_normed_kernel(
    x_ptr,  # (rows, R)
    norm_weight_ptr,  # (R,)
    norm_bias_ptr,  # (R,)
    affine_ptr,  # (rows, R)
    rows,
    R: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # m = gamma standardize(x) + beta
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x0, x1 = load_pair(x_ptr, row, rows, R, R0, R1)
    n0, n1, _ = standardize_pair(x0.to(tl.float32), x1.to(tl.float32), R, R0, R1, EPS)
    m0, m1 = affine_pair(n0, n1, norm_weight_ptr, norm_bias_ptr, R, R0, R1)
    store_pair(affine_ptr, row, rows, m0, m1, R, R0, R1)


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
    R0: tl.constexpr,
    R1: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # dx = standardize_bwd(dm gamma);  parts: sum dm n, sum dm, sum g
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    part = part_ptr + pid * 3 * R
    g0, g1 = load_pair(grad_ptr, row, rows, R, R0, R1)
    store_sums(part + 2 * R, g0.to(tl.float32), g1.to(tl.float32), R, R0, R1)
    x0, x1 = load_pair(x_ptr, row, rows, R, R0, R1)
    d0, d1 = load_pair(grad_affine_ptr, row, rows, R, R0, R1)
    dx0, dx1 = norm_gradient_pair(
        d0, d1, x0.to(tl.float32), x1.to(tl.float32), norm_weight_ptr, part, R, R0, R1, EPS
    )
    store_pair(grad_x_ptr, row, rows, dx0, dx1, R, R0, R1)


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
    inside = (row < rows)[:, None] & (column < H)[None, :]
    offset = row[:, None] * H + column[None, :]
    p = tl.load(hidden_ptr + offset, mask=inside, other=0.0)
    da = tl.load(grad_hidden_ptr + offset, mask=inside, other=0.0)
    bias = tl.load(bias_1_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    a, slope = gelu_with_slope(p + bias[None, :])
    dp = da * slope
    tl.store(active_ptr + offset, a.to(active_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_ptr + offset, dp.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(part_ptr + pid * H + column, tl.sum(dp, 0), mask=column < H)


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
    """W1 (H, R0 + R1), b1 (H,) and W2 transposed (H, R0 + R1) as the kernels read them: weights in ``dtype``,
    H rounded up to ``block`` hidden columns, zeros outside."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        hidden, width = weight_1.shape
        pad = (0, sum(chunks(width)) - width, 0, -hidden % block)
        pair, bias = (weight_1.to(dtype), weight_2.T.to(dtype)), bias_1
        if any(pad):
            pair = (F.pad(weight, pad) for weight in pair)
            bias = F.pad(bias_1, pad[2:])
        first, second = (weight.contiguous() for weight in pair)
        return first, bias.contiguous(), second

    return once_per_step(weight_1, dtype, block, make)


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
    tiles = triton.cdiv(affine.shape[0], row.blocks["BLOCK_M"])
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
        grid = (triton.cdiv(raw.shape[0], row.blocks["BLOCK_M"]), triton.cdiv(hidden, row.blocks["BLOCK_N"]))
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
        programs = triton.cdiv(count, row.blocks["BLOCK_M"])
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
            launch(adapter_bwd_normed_kernel, (triton.cdiv(count, row.blocks["BLOCK_M"]),),
                x, norm_weight, norm_bias, affine, count,
                EPS=NORM_EPS, **pair_constants(row, width), **row.options,
            )  # fmt: skip
        grad_affine, *inner = library_gradients(grad, affine, weight_1, bias_1, weight_2)
        row = row_for("adapter_bwd_input", grad, width)
        programs = triton.cdiv(count, row.blocks["BLOCK_M"])
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
        grid = (triton.cdiv(rows.shape[0], row.blocks["BLOCK_M"]),)
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


_FLOAT = ("norm_weight_ptr", "norm_bias_ptr", "bias_1_ptr", "bias_2_ptr", "part_ptr", "bias_part_ptr")


def pointer_types(function, dtype: str, wide: tuple[str, ...] = ()) -> dict[str, str]:
    """Types of a jit function's arguments: pointers to ``dtype``, but fp32 for those named in ``wide``,
    partial sums and parameters that are not weights; numbers int32."""
    found = {}
    for parameter in function.params:
        if parameter.name.endswith("_ptr"):
            found[parameter.name] = "*fp32" if parameter.name in (*wide, *_FLOAT) else POINTERS[dtype]
        elif not parameter.is_constexpr:
            found[parameter.name] = "i32"
    return found


def static_launches(row: Row, dtype: str, width: int) -> Iterator[tuple]:
    """The row's kernel as ``triton.compile`` takes it: UniPT's adapter of a backbone 8 times as wide as its
    side ``width``; the width of ``adapter_bwd_hidden`` is the hidden one."""
    row = fitted(row, TORCH_TYPES[dtype], width)
    function = globals()[f"{row.kernel}_kernel"]
    if function is adapter_bwd_hidden_kernel:
        types = pointer_types(function, dtype, ("hidden_ptr", "grad_hidden_ptr"))
        yield compile_arguments(function, types, {"H": width, **row.blocks})
        return
    block = row.blocks.get("BLOCK_H", 0)
    hidden = triton.cdiv(min(8 * width, 1280), block) * block if block else 0
    values = constants(row, width, hidden) if block else pair_constants(row, width)
    if function is not adapter_bwd_weight_kernel:
        values["EPS"] = NORM_EPS
    types = pointer_types(function, dtype, ("grad_affine_ptr",))
    yield compile_arguments(function, types, values)
