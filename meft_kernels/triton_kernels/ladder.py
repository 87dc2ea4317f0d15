"""One rung of LST: epilogue of the projection, gate, LayerNorm, GELU adapter and residual in one kernel; see
``reference.ladder``.

The projection's product is the vendor library's (``norm_linear``). The backward keeps x and state alone: it
repeats that product, and one kernel recomputes z, v and n to write the gradient of the state and the operand
of the projection's weight gradient. At side widths where that kernel would not fit in registers, the
backward of ``adapter`` takes v, between a kernel that mixes and one that splits the gradient.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import ladder as reference
from ..reference.common import GATE_TEMPERATURE, NORM_EPS
from ..tune.row import TORCH_TYPES, Row
from .adapter import (
    NORM,
    WEIGHTS,
    constants,
    fitted,
    gradients,
    norm_gradient,
    packed,
    weight_gradients,
)
from .blocks import (
    add,
    affine,
    cast,
    load_parameter,
    load_rows,
    mlp,
    mlp_bwd,
    multiply,
    pair_constants,
    scale,
    standardize,
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
    pointer_types,
    row_for,
)
from .norm_linear import folded_gradients, projected, store_scaled, unfold


@triton.jit
def _gate(gate_ptr, TEMPERATURE: tl.constexpr):
    """u = sigmoid(gate / temperature) and 1 - u, neither by subtraction."""
    gate = tl.load(gate_ptr).to(tl.float32) / TEMPERATURE
    return 1.0 / (1.0 + tl.exp(-gate)), 1.0 / (1.0 + tl.exp(gate))


@triton.jit
def _down_and_state(
    raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, row, rows,
    R: tl.constexpr, SIZES: tl.constexpr, AGAIN: tl.constexpr = False,
):  # fmt: skip
    """z and state in fp32."""
    raw = load_rows(raw_ptr, row, rows, R, SIZES, AGAIN)
    z = unfold(raw, row, rows, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, R, SIZES)
    return z, cast(load_rows(state_ptr, row, rows, R, SIZES, AGAIN), tl.float32)


@triton.jit
def _mixed(
    raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, gate_ptr, row, rows,
    R: tl.constexpr, SIZES: tl.constexpr, TEMPERATURE: tl.constexpr, AGAIN: tl.constexpr = False,
):  # fmt: skip
    """v = u * state + (1 - u) * z."""
    z, s = _down_and_state(
        raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, row, rows, R, SIZES, AGAIN
    )
    keep, take = _gate(gate_ptr, TEMPERATURE)
    return add(scale(keep, s), scale(take, z))


@triton.jit(do_not_specialize=["rows"])
def ladder_fwd_kernel(
    raw_ptr,  # (rows, R) fp32, the product of x and the folded weight
    mean_ptr,  # (rows,) fp32
    rstd_ptr,  # (rows,) fp32
    centre_ptr,  # (R,) fp32, sums of the folded weight's rows
    down_bias_ptr,  # (R,)
    state_ptr,  # (rows, R)
    gate_ptr,  # (1,)
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
    TEMPERATURE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # z = rstd * (raw - mean * c) + b;  v = u s + (1 - u) z;  out = v + W2 gelu(W1 LN(v) + b1) + b2
    kind = weight_1_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = _mixed(
        raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, gate_ptr, row, rows,
        R, SIZES, TEMPERATURE,
    )  # fmt: skip
    n, _ = standardize(v, R, SIZES, EPS)
    m = affine(n, norm_weight_ptr, norm_bias_ptr, R, SIZES)
    y = mlp(cast(m, kind), weight_1_ptr, bias_1_ptr, weight_2_ptr, BLOCK_M, SIZES, HIDDEN, BLOCK_H)
    out = add(add(v, y), load_parameter(bias_2_ptr, R, SIZES))
    store_rows(out_ptr, row, rows, out, R, SIZES)


@triton.jit
def _store_gradients(
    dv, raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, gate_ptr,
    grad_state_ptr, scaled_ptr, part_ptr, row, rows,
    R: tl.constexpr, SIZES: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """ds = u dv and rstd dz, dz = (1 - u) dv; parts (3, R): sum dz, sum rstd dz mean, sum dv (s - z)."""
    keep, take = _gate(gate_ptr, TEMPERATURE)
    store_rows(grad_state_ptr, row, rows, scale(keep, dv), R, SIZES)
    z, s = _down_and_state(
        raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, row, rows, R, SIZES
    )
    store_sums(part_ptr + 2 * R, multiply(dv, subtract(s, z)), R, SIZES)
    dz = scale(take, dv)
    store_sums(part_ptr, dz, R, SIZES)
    store_scaled(scaled_ptr, part_ptr + R, dz, row, rows, mean_ptr, rstd_ptr, R, SIZES)


@triton.jit(do_not_specialize=["rows"])
def ladder_bwd_kernel(
    grad_ptr,  # (rows, R)
    raw_ptr,  # this and the next eleven as in ladder_fwd_kernel
    mean_ptr,
    rstd_ptr,
    centre_ptr,
    down_bias_ptr,
    state_ptr,
    gate_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_1_ptr,
    bias_1_ptr,
    weight_2_ptr,
    affine_ptr,  # (rows, R)
    grad_state_ptr,  # (rows, R)
    scaled_ptr,  # (rows, R)
    part_ptr,  # (programs, 6, R) fp32
    rows,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # m = gamma n + beta;  dm = ((g W2) * gelu'(W1 m + b1)) W1;  dv = g + standardize_bwd(dm gamma)
    # ds = u dv;  dz = (1 - u) dv;  parts: sum dm n, sum dm, sum g, sum dz, sum rstd dz mean, sum dv (s - z)
    kind = weight_1_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    part = part_ptr + pid * 6 * R
    v = _mixed(
        raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, gate_ptr, row, rows,
        R, SIZES, TEMPERATURE,
    )  # fmt: skip
    n, _ = standardize(v, R, SIZES, EPS)
    m = affine(n, norm_weight_ptr, norm_bias_ptr, R, SIZES)
    store_rows(affine_ptr, row, rows, m, R, SIZES)
    g = load_rows(grad_ptr, row, rows, R, SIZES)
    d = mlp_bwd(
        cast(g, kind), cast(m, kind),
        weight_1_ptr, bias_1_ptr, weight_2_ptr, BLOCK_M, SIZES, HIDDEN, BLOCK_H,
    )  # fmt: skip
    # Loaded again: what lives through the loop above costs registers there.
    v = _mixed(
        raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, gate_ptr, row, rows,
        R, SIZES, TEMPERATURE, True,
    )  # fmt: skip
    dv = norm_gradient(d, v, norm_weight_ptr, part, R, SIZES, EPS)
    g = cast(load_rows(grad_ptr, row, rows, R, SIZES, True), tl.float32)
    store_sums(part + 2 * R, g, R, SIZES)
    _store_gradients(
        add(dv, g), raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, gate_ptr,
        grad_state_ptr, scaled_ptr, part + 3 * R, row, rows, R, SIZES, TEMPERATURE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def ladder_bwd_mixed_kernel(
    raw_ptr,  # as in ladder_fwd_kernel
    mean_ptr,
    rstd_ptr,
    centre_ptr,
    down_bias_ptr,
    state_ptr,
    gate_ptr,
    mixed_ptr,  # (rows, R) fp32
    rows,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # v = u s + (1 - u) z
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = _mixed(
        raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, gate_ptr, row, rows,
        R, SIZES, TEMPERATURE,
    )  # fmt: skip
    store_rows(mixed_ptr, row, rows, v, R, SIZES)


@triton.jit(do_not_specialize=["rows"])
def ladder_bwd_split_kernel(
    grad_ptr,  # (rows, R)
    grad_mixed_ptr,  # (rows, R) fp32, dv without the residual's part
    raw_ptr,  # this and the next six as in ladder_fwd_kernel
    mean_ptr,
    rstd_ptr,
    centre_ptr,
    down_bias_ptr,
    state_ptr,
    gate_ptr,
    grad_state_ptr,  # (rows, R)
    scaled_ptr,  # (rows, R)
    part_ptr,  # (programs, 3, R) fp32
    rows,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # dv += g;  ds = u dv;  dz = (1 - u) dv;  parts: sum dz, sum rstd dz mean, sum dv (s - z)
    pid = tl.program_id(0).to(tl.int64)
    row = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    g = cast(load_rows(grad_ptr, row, rows, R, SIZES), tl.float32)
    dv = load_rows(grad_mixed_ptr, row, rows, R, SIZES)
    _store_gradients(
        add(dv, g), raw_ptr, mean_ptr, rstd_ptr, centre_ptr, down_bias_ptr, state_ptr, gate_ptr,
        grad_state_ptr, scaled_ptr, part_ptr + pid * 3 * R, row, rows, R, SIZES, TEMPERATURE,
    )  # fmt: skip


def forward(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """As ``reference.ladder.forward``."""
    width = state.shape[-1]
    row = row_for("ladder_fwd", x, width)
    if row is None:
        parameters = (weight_1, bias_1, weight_2, bias_2)
        return reference.forward(
            x, state, weight, bias, mean, rstd, gate, norm_weight, norm_bias, *parameters
        )
    row = fitted(row, x.dtype, width)
    rows, below = aligned(x, x.shape[-1]), aligned(state, width)
    out = torch.empty(below.shape, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        raw, centre = projected(rows, weight)
        weights = packed(weight_1, bias_1, weight_2, x.dtype, row.blocks["BLOCK_H"])
        vectors = (gate, norm_weight, norm_bias)
        with on_device(x):
            launch(ladder_fwd_kernel, (ceil_div(rows.shape[0], row.blocks["BLOCK_M"]),),
                raw, *flat(mean, rstd), centre, bias.contiguous(),
                below, *(t.contiguous() for t in vectors), *weights, bias_2.contiguous(), out, rows.shape[0],
                EPS=NORM_EPS, TEMPERATURE=GATE_TEMPERATURE,
                **constants(row, width, weights[0].shape[0]), **row.options,
            )  # fmt: skip
    return out.view(state.shape)


def backward(
    grad: Tensor,
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    need_x: bool,
) -> list[Tensor]:
    """As ``reference.ladder.backward``."""
    given = (weight, bias, gate, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    width = state.shape[-1]
    if row_for("ladder_bwd_mixed", x, width) is None or x.numel() == 0:
        return reference.backward(grad, x, state, weight, bias, mean, rstd, *given[2:], need_x)
    rows, below, upstream = aligned(x, x.shape[-1]), aligned(state, width), aligned(grad.to(x.dtype), width)
    mean, rstd = flat(mean, rstd)
    raw, centre = projected(rows, weight)
    inputs = (raw, mean, rstd, centre, bias.contiguous(), below, gate)
    grad_state, scaled = torch.empty_like(below), torch.empty_like(upstream)
    adapter_given = (norm_weight, norm_bias, weight_1, bias_1, weight_2)
    fused = row_for("ladder_bwd", x, width)
    compute = _split_gradients if fused is None else _fused_gradients
    sums, adapter_grads = compute(upstream, inputs, adapter_given, grad_state, scaled)
    grad_bias, mean_sum, gate_sum = sums
    grad_x, grad_weight = folded_gradients(scaled, mean_sum, rows, weight, mean, rstd, need_x)
    # u (1 - u) = 1 / (2 cosh(gate / 2T))^2, without a difference.
    slope = torch.cosh(gate.float() * (0.5 / GATE_TEMPERATURE)).square_().mul_(4 * GATE_TEMPERATURE)
    grad_gate = gate_sum.sum() / slope
    grads = (grad_weight, grad_bias, grad_gate, *adapter_grads)
    return [
        grad_x.view(x.shape) if need_x else grad_x,
        grad_state.view(state.shape),
        *(total.to(t.dtype).contiguous() for total, t in zip(grads, given, strict=True)),
    ]


def _fused_gradients(
    grad: Tensor, inputs: tuple, parameters: tuple, grad_state: Tensor, scaled: Tensor
) -> tuple[Tensor, tuple]:
    """Fills grad_state and scaled (rstd dz); returns the sums of dz, rstd dz mean and dv (s - z) over rows,
    (3, R), and the gradients of the adapter's six parameters.

    inputs: the kernels' arguments from raw to gate. parameters: the adapter's, without its last bias.
    """
    norm_weight, norm_bias, *linear = parameters
    count, width = grad.shape
    row = fitted(row_for("ladder_bwd", grad, width), grad.dtype, width)
    weights = packed(*linear, grad.dtype, row.blocks["BLOCK_H"])
    programs = ceil_div(count, row.blocks["BLOCK_M"])
    affine = torch.empty_like(grad)
    parts = torch.empty(programs, 6, width, dtype=torch.float32, device=grad.device)
    with on_device(grad):
        launch(ladder_bwd_kernel, (programs,),
            grad, *inputs, norm_weight.contiguous(), norm_bias.contiguous(), *weights,
            affine, grad_state, scaled, parts, count, EPS=NORM_EPS, TEMPERATURE=GATE_TEMPERATURE,
            **constants(row, width, weights[0].shape[0]), **row.options,
        )  # fmt: skip
    sums = parts.sum(0)
    inner = weight_gradients(grad, affine, *linear)
    return sums[3:], (sums[0], sums[1], *inner, sums[2])


def _split_gradients(
    grad: Tensor, inputs: tuple, parameters: tuple, grad_state: Tensor, scaled: Tensor
) -> tuple[Tensor, tuple]:
    """As ``_fused_gradients``, by way of v and dv."""
    count, width = grad.shape
    mixed = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    row = row_for("ladder_bwd_mixed", grad, width)
    with on_device(grad):
        launch(
            ladder_bwd_mixed_kernel,
            (ceil_div(count, row.blocks["BLOCK_M"]),),
            *inputs,
            mixed,
            count,
            TEMPERATURE=GATE_TEMPERATURE,
            **pair_constants(row, width),
            **row.options,
        )
    grad_mixed, *adapter_grads = gradients(grad, mixed, *parameters)
    row = row_for("ladder_bwd_split", grad, width)
    programs = ceil_div(count, row.blocks["BLOCK_M"])
    parts = torch.empty(programs, 3, width, dtype=torch.float32, device=grad.device)
    with on_device(grad):
        launch(ladder_bwd_split_kernel, (programs,),
            grad, grad_mixed, *inputs, grad_state, scaled, parts, count,
            TEMPERATURE=GATE_TEMPERATURE, **pair_constants(row, width), **row.options,
        )  # fmt: skip
    return parts.sum(0), tuple(adapter_grads)


_MIXED = {
    **{"raw_ptr": "*fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "centre_ptr": "*fp32"},
    **{"down_bias_ptr": "*fp32", "state_ptr": ACTIVATION, "gate_ptr": "*fp32"},
}
_GRADIENTS = {"grad_state_ptr": ACTIVATION, "scaled_ptr": ACTIVATION, "part_ptr": "*fp32", "rows": "i32"}
_TYPES = {
    ladder_fwd_kernel: {
        **{**_MIXED, **NORM, **WEIGHTS},
        **{"bias_2_ptr": "*fp32", "out_ptr": ACTIVATION, "rows": "i32"},
    },
    ladder_bwd_kernel: {
        **{"grad_ptr": ACTIVATION, **_MIXED, **NORM, **WEIGHTS},
        **{"affine_ptr": ACTIVATION, **_GRADIENTS},
    },
    ladder_bwd_mixed_kernel: {**_MIXED, "mixed_ptr": "*fp32", "rows": "i32"},
    ladder_bwd_split_kernel: {"grad_ptr": ACTIVATION, "grad_mixed_ptr": "*fp32", **_MIXED, **_GRADIENTS},
}


def static_launches(row: Row, dtype: str, width: int) -> Iterator[tuple]:
    """The row's kernel as ``triton.compile`` takes it, for side width ``width`` and 256 hidden columns."""
    row = fitted(row, TORCH_TYPES[dtype], width)
    function = next(kernel for kernel in _TYPES if kernel.__name__ == f"{row.kernel}_kernel")
    if "BLOCK_H" in row.blocks:
        values = {**constants(row, width, 256), "EPS": NORM_EPS}
    else:
        values = pair_constants(row, width)
    types = pointer_types(_TYPES[function], dtype)
    yield compile_arguments(function, types, {**values, "TEMPERATURE": GATE_TEMPERATURE})
