"""SHERL's gated down-projection; see ``reference.gated_down`` for the maths.

The product V1 h reads a hidden state once and is the vendor library's. Its fp32 result is worked off in
blocks of rows, few enough that what is held for them is bounded (``BLOCK_BYTES``). The kernel behind it does
bias, ReLU, the two r x r products over one read of p, the residual and the gate, and on request the bits that
say where p > 0. Backward, of half precision and where a row of the table holds the whole width, one kernel
recomputes these and gives p, dy, dg and dp; at other widths, and in fp32, whose products have to be cut
smaller, a second one makes dp of dy and dg. The weights' gradients are products with the frames split in
groups (``host.split_product``), since nothing is left to fuse into them; dy and dg lie side by side, so that
V2's and V3's are one.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import gated_down as reference
from ..reference import stand_in
from ..reference.common import matmul
from ..tune.row import Row, once_per_row
from .blocks import load_tile, load_vector, relu, store_tile
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
    split_product,
)

BLOCK_BYTES = 2**28  # that a block of rows may hold for the backward: V1 h in fp32, p, dy, dg and dp

# Rows are frames of all utterances. R is the side width; programs count tiles of columns first. Bits are 1
# where p > 0, the first unit's in the lowest place of a byte; a row of them takes ceil(R / 8) bytes.


@triton.jit
def _active(active_ptr, row, rows, column, R: tl.constexpr):
    """The bits of a tile as numbers, 0 or 1."""
    inside = (row < rows)[:, None] & (column < R)[None, :]
    stride: tl.constexpr = (R + 7) // 8
    byte = tl.load(active_ptr + row[:, None] * stride + (column // 8)[None, :], mask=inside, other=0)
    return ((byte >> (column % 8)[None, :]) & 1).to(tl.float32)


@triton.jit
def _store_active(active_ptr, hidden, row, rows, start, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The bits of a tile of p whose first column is ``start``, a multiple of 8."""
    place = tl.arange(0, 8)[None, None, :]
    bits = tl.reshape((hidden > 0).to(tl.int32), [M, N // 8, 8]) << place
    column = start // 8 + tl.arange(0, N // 8)
    store_tile(active_ptr, row, rows, column, tl.sum(bits, 2), (R + 7) // 8)


@triton.jit
def _hidden(pre_ptr, bias_1_ptr, active_ptr, row, rows, column, R: tl.constexpr, ACTIVE: tl.constexpr):
    """relu(pre + bias) of a tile in fp32, 0 in columns beyond R; with ACTIVE, where the bits say so."""
    hidden = load_tile(pre_ptr, row, rows, column, R) + load_vector(bias_1_ptr, column, R)[None, :]
    if ACTIVE:
        hidden = hidden * _active(active_ptr, row, rows, column, R)
    else:
        hidden = relu(hidden)
    return hidden


@triton.jit
def _value_and_gate(
    pre_ptr,
    active_ptr,
    bias_1_ptr,
    weight_2_ptr,
    bias_2_ptr,
    weight_3_ptr,
    bias_3_ptr,
    row,
    rows,
    column,
    R: tl.constexpr,
    ACTIVE: tl.constexpr,
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
        p = _hidden(pre_ptr, bias_1_ptr, active_ptr, row, rows, k, R, ACTIVE)
        p = p.to(weight_2_ptr.dtype.element_ty)
        weight_2 = load_tile(weight_2_ptr, column, R, k, R)
        weight_3 = load_tile(weight_3_ptr, column, R, k, R)
        value = tl.dot(p, weight_2.T, value, input_precision=PRECISION)
        gate = tl.dot(p, weight_3.T, gate, input_precision=PRECISION)
    hidden = _hidden(pre_ptr, bias_1_ptr, active_ptr, row, rows, column, R, ACTIVE)
    value += load_vector(bias_2_ptr, column, R)[None, :] + hidden
    return hidden, value, tl.sigmoid(gate + load_vector(bias_3_ptr, column, R)[None, :])


@triton.jit
def _gates(
    grad_ptr,
    hidden,
    value,
    gate,
    hidden_ptr,
    gates_ptr,
    part_ptr,  # of the tile of rows: (2, R)
    row,
    rows,
    column,
    R: tl.constexpr,
):
    """dy = dz * g and dg = dz * y * g (1 - g) in fp32, stored with p and with their sums over the rows."""
    store_tile(hidden_ptr, row, rows, column, hidden, R)
    grad_value = load_tile(grad_ptr, row, rows, column, R).to(tl.float32) * gate
    grad_gate = grad_value * value * (1 - gate)
    store_tile(gates_ptr, row, rows, column, grad_value, R, STRIDE=2 * R)
    store_tile(gates_ptr + R, row, rows, column, grad_gate, R, STRIDE=2 * R)
    tl.store(part_ptr + column, tl.sum(grad_value, 0), mask=column < R)
    tl.store(part_ptr + R + column, tl.sum(grad_gate, 0), mask=column < R)
    return grad_value, grad_gate


@triton.jit(do_not_specialize=["rows"])
def gated_down_fwd_kernel(
    pre_ptr,  # (rows, R) fp32: V1 h
    bias_1_ptr,  # (R,)
    weight_2_ptr,  # (R, R), in the type of the output
    bias_2_ptr,  # (R,)
    weight_3_ptr,  # (R, R)
    bias_3_ptr,  # (R,)
    out_ptr,  # (rows, R)
    active_ptr,  # (rows, ceil(R / 8)) uint8, only written if ACTIVE
    rows,
    R: tl.constexpr,
    ACTIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # z = (V2 p + a2 + p) * sigmoid(V3 p + a3),  p = relu(pre + a1)
    tiles: tl.constexpr = (R + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden, value, gate = _value_and_gate(
        pre_ptr,
        active_ptr,
        bias_1_ptr,
        weight_2_ptr,
        bias_2_ptr,
        weight_3_ptr,
        bias_3_ptr,
        row,
        rows,
        column,
        R,
        False,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    store_tile(out_ptr, row, rows, column, value * gate, R)
    if ACTIVE:
        start = tl.program_id(0) % tiles * BLOCK_N
        _store_active(active_ptr, hidden, row, rows, start, R, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["rows"])
def gated_down_bwd_gate_kernel(
    grad_ptr,  # (rows, R)
    pre_ptr,  # (rows, R) fp32
    active_ptr,  # (rows, ceil(R / 8)) uint8, only read if ACTIVE
    bias_1_ptr,  # (R,)
    weight_2_ptr,  # (R, R), in the type of grad
    bias_2_ptr,  # (R,)
    weight_3_ptr,  # (R, R)
    bias_3_ptr,  # (R,)
    hidden_ptr,  # (rows, R): p
    gates_ptr,  # (rows, 2, R): dy and dg
    part_ptr,  # (row tiles, 2, R) fp32: partial sums of dy and dg
    rows,
    R: tl.constexpr,
    ACTIVE: tl.constexpr,
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
        active_ptr,
        bias_1_ptr,
        weight_2_ptr,
        bias_2_ptr,
        weight_3_ptr,
        bias_3_ptr,
        row,
        rows,
        column,
        R,
        ACTIVE,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    part_ptr += tile * 2 * R
    _gates(grad_ptr, hidden, value, gate, hidden_ptr, gates_ptr, part_ptr, row, rows, column, R)


@triton.jit(do_not_specialize=["rows"])
def gated_down_bwd_hidden_kernel(
    hidden_ptr,  # (rows, R): p
    active_ptr,  # (rows, ceil(R / 8)) uint8, only read if ACTIVE
    gates_ptr,  # (rows, 2, R): dy and dg
    weight_2_ptr,  # (R, R), in the type of p
    weight_3_ptr,  # (R, R)
    grad_hidden_ptr,  # (rows, R): dp
    part_ptr,  # (row tiles, R) fp32: partial sums of dp
    rows,
    R: tl.constexpr,
    ACTIVE: tl.constexpr,
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
        grad_value = load_tile(gates_ptr, row, rows, k, R, STRIDE=2 * R)
        grad_gate = load_tile(gates_ptr + R, row, rows, k, R, STRIDE=2 * R)
        weight_2 = load_tile(weight_2_ptr, k, R, column, R)
        weight_3 = load_tile(weight_3_ptr, k, R, column, R)
        total = tl.dot(grad_value, weight_2, total, input_precision=PRECISION)
        total = tl.dot(grad_gate, weight_3, total, input_precision=PRECISION)
    total += load_tile(gates_ptr, row, rows, column, R, STRIDE=2 * R).to(tl.float32)
    if ACTIVE:
        total = total * _active(active_ptr, row, rows, column, R)
    else:
        hidden = load_tile(hidden_ptr, row, rows, column, R).to(tl.float32)
        total = total * (hidden > 0).to(tl.float32)
    store_tile(grad_hidden_ptr, row, rows, column, total, R)
    tl.store(part_ptr + tile * R + column, tl.sum(total, 0), mask=column < R)


@triton.jit(do_not_specialize=["rows"])
def gated_down_bwd_kernel(
    grad_ptr,  # (rows, R)
    pre_ptr,  # (rows, R) fp32
    active_ptr,  # (rows, ceil(R / 8)) uint8, only read if ACTIVE
    bias_1_ptr,  # (R,)
    weight_2_ptr,  # (R, R), in the type of grad
    bias_2_ptr,  # (R,)
    weight_3_ptr,  # (R, R)
    bias_3_ptr,  # (R,)
    hidden_ptr,  # (rows, R): p
    gates_ptr,  # (rows, 2, R): dy and dg
    grad_hidden_ptr,  # (rows, R): dp
    part_ptr,  # (row tiles, 3, R) fp32: partial sums of dy, dg and dp
    rows,
    R: tl.constexpr,
    ACTIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least R
    BLOCK_K: tl.constexpr,
):
    # dy = dz * g;  dg = dz * y * g (1 - g);  dp = (dy V2 + dy + dg V3) * 1[p > 0]
    tile = tl.program_id(0).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    hidden, value, gate = _value_and_gate(
        pre_ptr,
        active_ptr,
        bias_1_ptr,
        weight_2_ptr,
        bias_2_ptr,
        weight_3_ptr,
        bias_3_ptr,
        row,
        rows,
        column,
        R,
        ACTIVE,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    part_ptr += tile * 3 * R
    grad_value, grad_gate = _gates(
        grad_ptr, hidden, value, gate, hidden_ptr, gates_ptr, part_ptr, row, rows, column, R
    )
    kind = grad_ptr.dtype.element_ty
    weight_2 = load_tile(weight_2_ptr, column, R, column, R)
    total = tl.dot(grad_value.to(kind), weight_2, grad_value, input_precision=PRECISION)
    weight_3 = load_tile(weight_3_ptr, column, R, column, R)
    total = tl.dot(grad_gate.to(kind), weight_3, total, input_precision=PRECISION)
    if ACTIVE:
        total = total * _active(active_ptr, row, rows, column, R)
    else:
        total = total * (hidden > 0).to(tl.float32)
    store_tile(grad_hidden_ptr, row, rows, column, total, R)
    tl.store(part_ptr + 2 * R + column, tl.sum(total, 0), mask=column < R)


def _launch(kernel, row: Row, width: int, rows: int, *arguments: Tensor, active: bool) -> None:
    """Runs a kernel over all tiles of a (rows, width) matrix."""
    programs = ceil_div(rows, row.blocks["BLOCK_M"]) * ceil_div(width, row.blocks["BLOCK_N"])
    launch(
        kernel,
        (programs,),
        *arguments,
        rows,
        **_constants(row, width, active),
        **row.options,
    )


@once_per_row
def _constants(row: Row, width: int, active: bool = False) -> dict:
    return {"R": width, "ACTIVE": active, "PRECISION": "ieee", **row.blocks}


def _blocks(rows: int, width: int, itemsize: int) -> Iterator[slice | None]:
    """Blocks of rows of nearly one length, of which the backward holds ``BLOCK_BYTES`` at most; None: all."""
    count = ceil_div(rows * width * (4 + 4 * itemsize), BLOCK_BYTES)
    size = ceil_div(rows, max(count, 1) * 64) * 64
    if 0 < rows <= size:
        yield None
        return
    for start in range(0, rows, max(size, 1)):
        yield slice(start, start + size)


def _take(x: Tensor, block: slice | None) -> Tensor:
    return x if block is None else x[block]


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return once_per_step(weight, dtype, "cast", lambda: weight.to(dtype).contiguous())


def _parameters(x: Tensor, weight_1: Tensor, *given: Tensor) -> list[Tensor]:
    """The parameters as the kernels take them, weights in the type of x; V1 in the type in which the library
    multiplies it (``matmul``)."""
    if stand_in.device_type(x.device) == "cuda":
        weight_1 = _cast(weight_1, x.dtype)
    return [weight_1, *(_cast(each, x.dtype) if each.ndim == 2 else each.contiguous() for each in given)]


def _run(x: Tensor, given: tuple[Tensor, ...], keep_active: bool) -> tuple[Tensor, Tensor | None]:
    """The output, and the bits if they are asked for."""
    width = given[0].shape[0]
    row = row_for("gated_down_fwd", x, width)
    if row is None:
        return reference.forward(x, *given), reference.active_bits(x, *given[:2]) if keep_active else None
    rows = aligned(x, x.shape[-1])
    weight_1, *parameters = _parameters(x, *given)
    out = x.new_empty(rows.shape[0], width)
    active = x.new_empty(rows.shape[0], ceil_div(width, 8), dtype=torch.uint8) if keep_active else None
    with on_device(x):
        for block in _blocks(rows.shape[0], width, x.itemsize):
            pre = matmul(_take(rows, block), weight_1.T, x.dtype)
            target = _take(out, block)
            bits = target if active is None else _take(active, block)  # any pointer, when it is not written
            arguments = (pre, *parameters, target, bits)
            _launch(gated_down_fwd_kernel, row, width, pre.shape[0], *arguments, active=keep_active)
    return out.view(*x.shape[:-1], width), active


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
    return _run(x, (weight_1, bias_1, weight_2, bias_2, weight_3, bias_3), False)[0]


def forward_active(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
) -> tuple[Tensor, Tensor]:
    """``forward``, and ``reference.gated_down.active_bits``."""
    return _run(x, (weight_1, bias_1, weight_2, bias_2, weight_3, bias_3), True)


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
    """Gradients of x (empty unless ``need_x``) and of the six parameters; ``active``: ``active_bits`` of the
    exact x, where x is not exact."""
    given = (weight_1, bias_1, weight_2, bias_2, weight_3, bias_3)
    width = weight_1.shape[0]
    names = ("gated_down_bwd_gate", "gated_down_bwd_hidden")
    gate_row, hidden_row = (row_for(name, x, width) for name in names)
    whole_row = None if x.dtype == torch.float32 else row_for("gated_down_bwd", x, width)
    if whole_row is None and (gate_row is None or hidden_row is None):
        return reference.backward(grad, x, *given, need_x, active)
    rows, grad = aligned(x, x.shape[-1]), aligned(grad, width)
    projection, *parameters = _parameters(x, *given)
    weights = parameters[1], parameters[3]
    grad_x = rows.new_empty(rows.shape if need_x else 0)
    sums: list[Tensor] = []
    flag = {"active": active is not None}
    with on_device(x):
        for block in _blocks(rows.shape[0], width, x.itemsize):
            g, states = _take(grad, block), _take(rows, block)
            count = g.shape[0]
            pre = matmul(states, projection.T, x.dtype)
            bits = pre if active is None else _take(active, block)  # any pointer, when it is not read
            hidden, grad_hidden, gates = (
                torch.empty_like(g),
                torch.empty_like(g),
                g.new_empty(count, 2, width),
            )
            given_here = (g, pre, bits, *parameters, hidden, gates)

            def parts(row: Row, *shape: int, like: Tensor = pre) -> Tensor:
                return like.new_empty(ceil_div(like.shape[0], row.blocks["BLOCK_M"]), *shape, width)

            if whole_row is not None:
                part = parts(whole_row, 3)
                arguments = (*given_here, grad_hidden, part)
                _launch(gated_down_bwd_kernel, whole_row, width, count, *arguments, **flag)
                value_sum, gate_sum, hidden_sum = part.sum(0).unbind(0)
            else:
                part, hidden_part = parts(gate_row, 2), parts(hidden_row)
                _launch(gated_down_bwd_gate_kernel, gate_row, width, count, *given_here, part, **flag)
                known = hidden if active is None else bits
                arguments = (hidden, known, gates, *weights, grad_hidden, hidden_part)
                _launch(gated_down_bwd_hidden_kernel, hidden_row, width, count, *arguments, **flag)
                (value_sum, gate_sum), hidden_sum = part.sum(0), hidden_part.sum(0)
            del pre, bits, given_here, arguments
            by_gate = split_product(gates.flatten(1), hidden, x.dtype)
            of_hidden = split_product(grad_hidden, states, x.dtype)
            gradients = (of_hidden, hidden_sum, by_gate[:width], value_sum, by_gate[width:], gate_sum)
            sums = [total + more for total, more in zip(sums, gradients, strict=True)] if sums else gradients
            if need_x:
                _take(grad_x, block).copy_(matmul(grad_hidden, projection, x.dtype))
    sums = sums or [torch.zeros(t.shape, device=x.device) for t in given]  # of no rows
    grads = [total.to(t.dtype) for total, t in zip(sums, given, strict=True)]
    return [grad_x.view(x.shape) if need_x else grad_x, *grads]


_HIDDEN = {"pre_ptr": "*fp32", "active_ptr": "*u8", "bias_1_ptr": "*fp32"}
_WEIGHTS = {
    **{"weight_2_ptr": ACTIVATION, "bias_2_ptr": "*fp32"},
    **{"weight_3_ptr": ACTIVATION, "bias_3_ptr": "*fp32"},
}
_GATES = {"hidden_ptr": ACTIVATION, "gates_ptr": ACTIVATION}
_PART = {"part_ptr": "*fp32", "rows": "i32"}
_TYPES = {
    gated_down_fwd_kernel: {**_HIDDEN, **_WEIGHTS, "out_ptr": ACTIVATION, "rows": "i32"},
    gated_down_bwd_kernel: {
        **{"grad_ptr": ACTIVATION, **_HIDDEN, **_WEIGHTS, **_GATES},
        **{"grad_hidden_ptr": ACTIVATION, **_PART},
    },
    gated_down_bwd_gate_kernel: {"grad_ptr": ACTIVATION, **_HIDDEN, **_WEIGHTS, **_GATES, **_PART},
    gated_down_bwd_hidden_kernel: {
        **{**_GATES, "active_ptr": "*u8", "weight_2_ptr": ACTIVATION, "weight_3_ptr": ACTIVATION},
        **{"grad_hidden_ptr": ACTIVATION, **_PART},
    },
}


def static_launches(row: Row, dtype: str, width: int) -> Iterator[tuple]:
    """The row's kernel, that with bits: function, signature, constexprs and attributes, as
    ``triton.compile`` takes them."""
    if row.kernel == "gated_down_bwd" and dtype == "fp32":
        return  # it serves half precision
    function = next(kernel for kernel in _TYPES if kernel.__name__ == f"{row.kernel}_kernel")
    yield compile_arguments(function, pointer_types(_TYPES[function], dtype), _constants(row, width, True))
