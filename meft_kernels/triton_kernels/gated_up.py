"""SHERL's way back to the backbone's width; see ``reference.gated_up`` for the maths.

The inner width r is small, so that the product costs less than moving its fp32 result of the backbone's width
would: it is computed here, with ReLU on the way in and bias and gated residual on the way out, and each
large tensor crosses the memory bus once. Backward, one kernel reads the upstream gradient and h once for dy,
the bias, the gate and, on request, dh; the weight's gradient is a product with the frames split in groups
(``host.split_product``).
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import gated_up as reference
from ..reference.common import GATE_TEMPERATURE, matmul
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

# Rows are frames of all utterances, R the side width, D the backbone's. Programs count column tiles first.


@triton.jit(do_not_specialize=["rows"])
def gated_up_fwd_kernel(
    x_ptr,  # (rows, D)
    y_ptr,  # (rows, R)
    weight_ptr,  # (D, R), in the type of x
    bias_ptr,  # (D,)
    keep_ptr,  # (1,) fp32: tanh(gate / temperature)
    out_ptr,  # (rows, D)
    rows,
    D: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # out = W relu(y) + b + keep * h
    tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, R, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        y = load_tile(y_ptr, row, rows, k, R)
        weight = load_tile(weight_ptr, column, D, k, R)
        out = tl.dot(relu(y).to(weight.dtype), weight.T, out, input_precision=PRECISION)
    x = load_tile(x_ptr, row, rows, column, D).to(tl.float32)
    out += load_vector(bias_ptr, column, D)[None, :] + tl.load(keep_ptr) * x
    store_tile(out_ptr, row, rows, column, out, D)


@triton.jit(do_not_specialize=["rows"])
def gated_up_bwd_kernel(
    grad_ptr,  # (rows, D)
    x_ptr,  # (rows, D)
    y_ptr,  # (rows, R)
    weight_ptr,  # (D, R), in the type of x
    keep_ptr,  # (1,) fp32
    grad_x_ptr,  # (rows, D), only written if NEED_X
    grad_y_ptr,  # (rows, R), which may be y_ptr
    active_ptr,  # (rows, R): relu(y), for the weight's gradient
    part_ptr,  # (row tiles, 2, D) fp32: partial sums of grad, and of grad * x
    rows,
    D: tl.constexpr,
    R: tl.constexpr,
    NEED_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # dy = (dout W) * 1[y > 0];  db = sum dout;  dgate ~ sum dout * h;  dh = keep * dout
    tiles: tl.constexpr = (R + BLOCK_N - 1) // BLOCK_N
    tile = (tl.program_id(0) // tiles).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    # Of the programs on these rows the first one does the sums and dh: the others get no rows and no width.
    first = tl.program_id(0) % tiles == 0
    summed = tl.where(first, rows, 0)
    width = tl.where(first, D, 0)
    keep = tl.load(keep_ptr)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        grad = load_tile(grad_ptr, row, rows, k, D)
        x = load_tile(x_ptr, row, summed, k, D).to(tl.float32)
        weight = load_tile(weight_ptr, k, D, column, R)
        total = tl.dot(grad, weight, total, input_precision=PRECISION)
        wide = grad.to(tl.float32)
        part = part_ptr + tile * 2 * D + k
        tl.store(part, tl.sum(wide, 0), mask=k < width)
        tl.store(part + D, tl.sum(wide * x, 0), mask=k < width)
        if NEED_X:
            store_tile(grad_x_ptr, row, summed, k, keep * wide, D)
    y = load_tile(y_ptr, row, rows, column, R)
    store_tile(active_ptr, row, rows, column, relu(y), R)
    total = total * (y > 0).to(tl.float32)
    tl.debug_barrier()  # all threads have read y, where it is written over
    store_tile(grad_y_ptr, row, rows, column, total, R)


@once_per_row
def _constants(row: Row, backbone: int, side: int, need_x: bool | None = None) -> dict:
    flag = {} if need_x is None else {"NEED_X": need_x}  # the backward's
    return {"D": backbone, "R": side, "PRECISION": "ieee", **flag, **row.blocks}


def _keep(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """tanh(gate / temperature), fp32, left on the device. ``dtype``: of the activations."""
    return once_per_step(gate, dtype, "keep", lambda: torch.tanh(gate.float() / GATE_TEMPERATURE))


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return once_per_step(weight, dtype, "cast", lambda: weight.to(dtype).contiguous())


def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """x (..., D), y (..., r), weight (D, r), bias (D,), gate (1,) -> (..., D)."""
    backbone, side = weight.shape
    row = row_for("gated_up_fwd", x, side)
    if row is None:
        return reference.forward(x, y, weight, bias, gate)
    rows, y = aligned(x, backbone), aligned(y, side)
    out = torch.empty_like(rows)
    programs = ceil_div(rows.shape[0], row.blocks["BLOCK_M"]) * ceil_div(backbone, row.blocks["BLOCK_N"])
    if programs:
        with on_device(x):
            launch(
                gated_up_fwd_kernel,
                (programs,),
                rows,
                y,
                _cast(weight, x.dtype),
                bias.contiguous(),
                _keep(gate, x.dtype),
                out,
                rows.shape[0],
                **_constants(row, backbone, side),
                **row.options,
            )
    return out.view(x.shape)


def _run(
    row: Row,
    grad: Tensor,
    x: Tensor,
    side_rows: Tensor,
    grad_y: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    product: Callable,
) -> list[Tensor]:
    """Gradient of x, empty without ``keep``, and what ``sums_`` gives. ``side_rows``: y, (rows, r);
    ``grad_y``: where its gradient goes, which may be the same. ``product``: of grad and relu(y)."""
    backbone, side = weight.shape
    rows, grad = aligned(x, backbone), aligned(grad, backbone)
    need_x = keep is not None
    grad_x = torch.empty_like(rows) if need_x else rows.new_empty(0)
    active = torch.empty_like(side_rows)
    tiles = ceil_div(rows.shape[0], row.blocks["BLOCK_M"])
    parts = torch.empty(tiles, 2, backbone, dtype=torch.float32, device=x.device)
    if tiles:
        with on_device(x):
            launch(
                gated_up_bwd_kernel,
                (tiles * ceil_div(side, row.blocks["BLOCK_N"]),),
                grad,
                rows,
                side_rows,
                _cast(weight, x.dtype),
                keep if need_x else parts,  # any pointers of their types, when they do not count
                grad_x if need_x else grad,
                grad_y,
                active,
                parts,
                rows.shape[0],
                **_constants(row, backbone, side, need_x),
                **row.options,
            )
    grad_x = grad_x.view(x.shape) if need_x else grad_x
    return [grad_x, product(grad, active, x.dtype), parts.sum(0)]


def sums_(grad: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """Writes the gradient of y over y, and gives what those of the parameters are made of, see
    ``reference.gated_up``. The rows are so few that the library's own split of a product fills the GPU."""
    row = row_for("gated_up_bwd", x, weight.shape[1])
    if row is None:
        return reference.sums_(grad, x, y, weight)
    rows = aligned(y, weight.shape[1])
    summed = _run(row, grad, x, rows, rows, weight, None, lambda a, b, dtype: matmul(a.T, b, dtype))[1:]
    if rows.untyped_storage()._cdata != y.untyped_storage()._cdata:  # y lies otherwise
        y.copy_(rows.view(y.shape))
    return summed


def backward(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, need_x: bool
) -> list[Tensor]:
    """Gradients of x (empty unless ``need_x``), y, weight, bias and gate."""
    row = row_for("gated_up_bwd", x, weight.shape[1])
    if row is None:
        return reference.backward(grad, x, y, weight, bias, gate, need_x)
    rows, keep = aligned(y, weight.shape[1]), _keep(gate, x.dtype) if need_x else None
    grad_y = torch.empty_like(rows)
    grad_x, *summed = _run(row, grad, x, rows, grad_y, weight, keep, split_product)
    return [grad_x, grad_y.view(y.shape), *reference.gradients(*summed, weight, bias, gate)]


_TYPES = {
    gated_up_fwd_kernel: {
        **{"x_ptr": ACTIVATION, "y_ptr": ACTIVATION, "weight_ptr": ACTIVATION, "bias_ptr": "*fp32"},
        **{"keep_ptr": "*fp32", "out_ptr": ACTIVATION, "rows": "i32"},
    },
    gated_up_bwd_kernel: {
        **{"grad_ptr": ACTIVATION, "x_ptr": ACTIVATION, "y_ptr": ACTIVATION, "weight_ptr": ACTIVATION},
        **{"keep_ptr": "*fp32", "grad_x_ptr": ACTIVATION, "grad_y_ptr": ACTIVATION},
        **{"active_ptr": ACTIVATION, "part_ptr": "*fp32", "rows": "i32"},
    },
}


def static_launches(row: Row, dtype: str, width: int) -> Iterator[tuple]:
    """The row's kernel, the backward with dh, in front of a backbone 8 times as wide: function, signature,
    constexprs and attributes, as ``triton.compile`` takes them."""
    if row.kernel == "gated_up_fwd":
        function, constants = gated_up_fwd_kernel, _constants(row, 8 * width, width)
    else:
        function, constants = gated_up_bwd_kernel, _constants(row, 8 * width, width, True)
    yield compile_arguments(function, pointer_types(_TYPES[function], dtype), constants)
