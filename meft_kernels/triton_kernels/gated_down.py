"""SHERL's gated down-projection; see ``reference.gated_down`` for the maths.

The product V1 h reads a hidden state once and is the vendor library's. Its fp32 result is worked off in
blocks of ``BLOCK_ROWS`` frames, so that it is small and mostly still in the L2 cache when the kernel behind
it reads it: bias, ReLU, the two r x r products over one read of p, the residual and the gate. Backward, one
kernel recomputes these and gives dy, dg and p, a second one dp from dy and dg; the weights' gradients are
products with the frames split in groups (``host.split_product``), since nothing is left to fuse into them.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import gated_down as reference
from ..reference.common import matmul
from ..tune.row import Row
from .blocks import relu
from .host import POINTERS, aligned, compile_arguments, launch, on_device, row_for, split_product

BLOCK_ROWS = 2**17

# Rows are frames of all utterances. R is the side width; programs count tiles of columns first.


@triton.jit
def _hidden(pre_ptr, bias_1_ptr, row, rows, column, R: tl.constexpr):
    """relu(pre + bias) of a tile in fp32, 0 in columns beyond R."""
    inside = (row < rows)[:, None] & (column < R)[None, :]
    pre = tl.load(pre_ptr + row[:, None] * R + column[None, :], mask=inside, other=0.0)
    bias = tl.load(bias_1_ptr + column, mask=column < R, other=0.0).to(tl.float32)
    return relu(pre + bias[None, :])


@triton.jit
def _value_and_gate(
    pre_ptr,
    bias_1_ptr,
    weight_2_ptr,
    bias_2_ptr,
    weight_3_ptr,
    bias_3_ptr,
    row,
    rows,
    column,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """p, V2 p + a2 + p and sigmoid(V3 p + a3) of a tile, fp32."""
    value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, R, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        p = _hidden(pre_ptr, bias_1_ptr, row, rows, k, R).to(weight_2_ptr.dtype.element_ty)
        inside = (k < R)[:, None] & (column < R)[None, :]
        offset = column[None, :] * R + k[:, None]
        weight_2 = tl.load(weight_2_ptr + offset, mask=inside, other=0.0)
        weight_3 = tl.load(weight_3_ptr + offset, mask=inside, other=0.0)
        value = tl.dot(p, weight_2, value, input_precision=PRECISION)
        gate = tl.dot(p, weight_3, gate, input_precision=PRECISION)
    bias_2 = tl.load(bias_2_ptr + column, mask=column < R, other=0.0).to(tl.float32)
    bias_3 = tl.load(bias_3_ptr + column, mask=column < R, other=0.0).to(tl.float32)
    hidden = _hidden(pre_ptr, bias_1_ptr, row, rows, column, R)
    return hidden, value + bias_2[None, :] + hidden, tl.sigmoid(gate + bias_3[None, :])


@triton.jit(do_not_specialize=["rows"])
def gated_down_fwd_kernel(
    pre_ptr,  # (rows, R) fp32: V1 h
    bias_1_ptr,  # (R,)
    weight_2_ptr,  # (R, R), in the type of the output
    bias_2_ptr,  # (R,)
    weight_3_ptr,  # (R, R)
    bias_3_ptr,  # (R,)
    out_ptr,  # (rows, R)
    rows,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # z = (V2 p + a2 + p) * sigmoid(V3 p + a3),  p = relu(pre + a1)
    tiles: tl.constexpr = (R + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    _, value, gate = _value_and_gate(
        pre_ptr,
        bias_1_ptr,
        weight_2_ptr,
        bias_2_ptr,
        weight_3_ptr,
        bias_3_ptr,
        row,
        rows,
        column,
        R,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    inside = (row < rows)[:, None] & (column < R)[None, :]
    out = (value * gate).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * R + column[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gated_down_bwd_gate_kernel(
    grad_ptr,  # (rows, R)
    pre_ptr,  # (rows, R) fp32
    bias_1_ptr,  # (R,)
    weight_2_ptr,  # (R, R), in the type of grad
    bias_2_ptr,  # (R,)
    weight_3_ptr,  # (R, R)
    bias_3_ptr,  # (R,)
    hidden_ptr,  # (rows, R): p
    grad_value_ptr,  # (rows, R): dy
    grad_gate_ptr,  # (rows, R): dg
    value_part_ptr,  # (row tiles, R) fp32: partial sums of dy
    gate_part_ptr,  # (row tiles, R) fp32: partial sums of dg
    rows,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # dy = dz * g;  dg = dz * y * g (1 - g)
    tiles: tl.constexpr = (R + BLOCK_N - 1) // BLOCK_N
    tile = (tl.program_id(0) // tiles).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden, value, gate = _value_and_gate(
        pre_ptr,
        bias_1_ptr,
        weight_2_ptr,
        bias_2_ptr,
        weight_3_ptr,
        bias_3_ptr,
        row,
        rows,
        column,
        R,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    inside = (row < rows)[:, None] & (column < R)[None, :]
    offset = row[:, None] * R + column[None, :]
    kind = grad_ptr.dtype.element_ty
    tl.store(hidden_ptr + offset, hidden.to(kind), mask=inside)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad_value = grad * gate
    tl.store(grad_value_ptr + offset, grad_value.to(kind), mask=inside)
    tl.store(value_part_ptr + tile * R + column, tl.sum(grad_value, 0), mask=column < R)
    grad_gate = grad_value * value * (1 - gate)
    tl.store(grad_gate_ptr + offset, grad_gate.to(kind), mask=inside)
    tl.store(gate_part_ptr + tile * R + column, tl.sum(grad_gate, 0), mask=column < R)


@triton.jit(do_not_specialize=["rows"])
def gated_down_bwd_hidden_kernel(
    hidden_ptr,  # (rows, R): p
    grad_value_ptr,  # (rows, R): dy
    grad_gate_ptr,  # (rows, R): dg
    weight_2_ptr,  # (R, R), in the type of p
    weight_3_ptr,  # (R, R)
    grad_hidden_ptr,  # (rows, R): dp
    hidden_part_ptr,  # (row tiles, R) fp32: partial sums of dp
    rows,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # dp = (dy V2 + dy + dg V3) * 1[p > 0]
    tiles: tl.constexpr = (R + BLOCK_N - 1) // BLOCK_N
    tile = (tl.program_id(0) // tiles).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, R, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (k < R)[None, :]
        offset = row[:, None] * R + k[None, :]
        grad_value = tl.load(grad_value_ptr + offset, mask=inside, other=0.0)
        grad_gate = tl.load(grad_gate_ptr + offset, mask=inside, other=0.0)
        inside = (k < R)[:, None] & (column < R)[None, :]
        offset = k[:, None] * R + column[None, :]
        weight_2 = tl.load(weight_2_ptr + offset, mask=inside, other=0.0)
        weight_3 = tl.load(weight_3_ptr + offset, mask=inside, other=0.0)
        total = tl.dot(grad_value, weight_2, total, input_precision=PRECISION)
        total = tl.dot(grad_gate, weight_3, total, input_precision=PRECISION)
    inside = (row < rows)[:, None] & (column < R)[None, :]
    offset = row[:, None] * R + column[None, :]
    total += tl.load(grad_value_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(hidden_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    total = total * (hidden > 0).to(tl.float32)
    tl.store(grad_hidden_ptr + offset, total.to(grad_hidden_ptr.dtype.element_ty), mask=inside)
    tl.store(hidden_part_ptr + tile * R + column, tl.sum(total, 0), mask=column < R)


def _launch(kernel, row: Row, width: int, rows: int, *arguments: Tensor) -> None:
    """Runs a kernel over all tiles of a (rows, width) matrix."""
    programs = triton.cdiv(rows, row.blocks["BLOCK_M"]) * triton.cdiv(width, row.blocks["BLOCK_N"])
    launch(
        kernel,
        (programs,),
        *arguments,
        rows,
        **_constants(row, width),
        **row.options,
    )


def _constants(row: Row, width: int) -> dict:
    return {"R": width, "PRECISION": "ieee", **row.blocks}


def forward(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
) -> Tensor:
    """x (..., D), V1 (r, D), V2 and V3 (r, r), biases (r,) -> (..., r) in the type of x."""
    width = weight_1.shape[0]
    row = row_for("gated_down_fwd", x, width)
    if row is None:
        return reference.forward(x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3)
    rows = aligned(x, x.shape[-1])
    weight_2, weight_3 = (weight.to(x.dtype).contiguous() for weight in (weight_2, weight_3))
    bias_1, bias_2, bias_3 = (bias.contiguous() for bias in (bias_1, bias_2, bias_3))
    out = x.new_empty(rows.shape[0], width)
    with on_device(x):
        for start in range(0, rows.shape[0], BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS]
            pre = matmul(block, weight_1.T, x.dtype)
            parameters = (bias_1, weight_2, bias_2, weight_3, bias_3)
            target = out[start : start + BLOCK_ROWS]
            _launch(gated_down_fwd_kernel, row, width, block.shape[0], pre, *parameters, target)
    return out.view(*x.shape[:-1], width)


def backward(
    grad: Tensor,
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
    need_x: bool,
    active: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of x (empty unless ``need_x``) and of the six parameters. With ``active``, for 8-bit copies,
    the reference serves."""
    given = (weight_1, bias_1, weight_2, bias_2, weight_3, bias_3)
    width = weight_1.shape[0]
    gate_row, hidden_row = (
        row_for(name, x, width) for name in ("gated_down_bwd_gate", "gated_down_bwd_hidden")
    )
    if gate_row is None or hidden_row is None or active is not None:
        return reference.backward(grad, x, *given, need_x, active)
    rows = aligned(x, x.shape[-1])
    weight_2, weight_3 = (weight.to(x.dtype).contiguous() for weight in (weight_2, weight_3))
    bias_1, bias_2, bias_3 = (bias.contiguous() for bias in (bias_1, bias_2, bias_3))
    grad = aligned(grad, width)
    grad_x = rows.new_empty(rows.shape if need_x else 0)
    sums: list[Tensor] = []
    with on_device(x):
        for start in range(0, rows.shape[0], BLOCK_ROWS):
            block, g = rows[start : start + BLOCK_ROWS], grad[start : start + BLOCK_ROWS]
            count = block.shape[0]
            pre = matmul(block, weight_1.T, x.dtype)
            hidden, grad_value, grad_gate, grad_hidden = (torch.empty_like(g) for _ in range(4))
            value_part, gate_part, hidden_part = (
                pre.new_empty(triton.cdiv(count, row.blocks["BLOCK_M"]), width)
                for row in (gate_row, gate_row, hidden_row)
            )
            parameters = (bias_1, weight_2, bias_2, weight_3, bias_3)
            saved = (hidden, grad_value, grad_gate)
            parts = (value_part, gate_part)
            kernel = gated_down_bwd_gate_kernel
            _launch(kernel, gate_row, width, count, g, pre, *parameters, *saved, *parts)
            results = (grad_hidden, hidden_part)
            kernel = gated_down_bwd_hidden_kernel
            _launch(kernel, hidden_row, width, count, *saved, weight_2, weight_3, *results)
            gradients = (
                split_product(grad_hidden, block, x.dtype),
                hidden_part.sum(0),
                split_product(grad_value, hidden, x.dtype),
                value_part.sum(0),
                split_product(grad_gate, hidden, x.dtype),
                gate_part.sum(0),
            )
            sums = [total + more for total, more in zip(sums, gradients, strict=True)] if sums else gradients
            if need_x:
                grad_x[start : start + BLOCK_ROWS] = matmul(grad_hidden, weight_1, x.dtype)
    sums = sums or [torch.zeros(t.shape, device=x.device) for t in given]  # of no rows
    grads = [total.to(t.dtype) for total, t in zip(sums, given, strict=True)]
    return [grad_x.view(x.shape) if need_x else grad_x, *grads]


def static_launches(row: Row, dtype: str, width: int) -> Iterator[tuple]:
    """The row's kernel: function, signature, constexprs and attributes, as ``triton.compile`` takes them."""
    function = {
        "gated_down_fwd": gated_down_fwd_kernel,
        "gated_down_bwd_gate": gated_down_bwd_gate_kernel,
        "gated_down_bwd_hidden": gated_down_bwd_hidden_kernel,
    }[row.kernel]
    constants = _constants(row, width)
    types = {name: POINTERS[dtype] for name in function.arg_names if name not in constants}
    for name in types:
        if name == "pre_ptr" or name.startswith("bias") or name.endswith("part_ptr"):
            types[name] = "*fp32"
    yield compile_arguments(function, {**types, "rows": "i32"}, constants)
