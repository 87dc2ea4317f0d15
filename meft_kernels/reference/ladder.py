"""One rung of LST's ladder: project the hidden state, gate it with the side state below, adapt.

    z = folded projection of x (see norm_linear);   u = sigmoid(gate / 0.1)
    v = u * state + (1 - u) * z;   out = v + adapter(v)

    x (..., D), state (..., r) -> out (..., r)

The gate multiplies the previous side state. The backward keeps x and state alone and recomputes z and v:

    dv = dout + adapter_bwd(dout);   dstate = u dv;   dz = (1 - u) dv
    dgate = u (1 - u) / 0.1 * sum dv * (state - z)
"""

import torch
from torch import Tensor

from . import adapter, norm_linear
from .common import GATE_TEMPERATURE, accumulation_dtype, row_blocks


def definition(
    x: Tensor,
    state: Tensor,
    down_norm_weight: Tensor,
    down_norm_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """What the op means, with the projection's LayerNorm and Linear unfolded."""
    wide = accumulation_dtype(x.dtype)
    down = norm_linear.definition(x.to(wide), down_norm_weight, down_norm_bias, down_weight, down_bias)
    keep = torch.sigmoid(gate.to(wide) / GATE_TEMPERATURE)
    mixed = keep * state.to(wide) + (1 - keep) * down
    adapted = adapter.definition(mixed, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    return (mixed + adapted).to(x.dtype)


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
    """x (..., D), state (..., r), folded weight (r, D) and bias (r,), row statistics of x (...), gate (1,),
    adapter parameters -> (..., r) in the type of x."""
    wide = accumulation_dtype(x.dtype)
    params = [t.to(wide) for t in (norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)]
    rows, mean, rstd = x.reshape(-1, x.shape[-1]), mean.reshape(-1), rstd.reshape(-1)
    below = state.reshape(-1, state.shape[-1])
    keep = torch.sigmoid(gate.to(wide) / GATE_TEMPERATURE)
    out = x.new_empty(below.shape)
    for block in row_blocks(rows.shape[0], rows.shape[1], x.device):
        down = norm_linear.project(rows[block], weight, bias, mean[block], rstd[block])
        mixed = keep * below[block].to(wide) + (1 - keep) * down
        out[block] = mixed + adapter.bottleneck(mixed, *params, dtype=x.dtype)
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
    """Gradients of x (empty unless ``need_x``), state, weight, bias, gate and the six adapter parameters."""
    wide = accumulation_dtype(x.dtype)
    given = (weight, bias, gate, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    params = [t.to(wide) for t in given[3:]]
    rows, mean, rstd = x.reshape(-1, x.shape[-1]), mean.reshape(-1), rstd.reshape(-1)
    below, grad = state.reshape(-1, state.shape[-1]), grad.reshape(-1, state.shape[-1])
    keep = torch.sigmoid(gate.to(wide) / GATE_TEMPERATURE)
    grad_x = rows.new_empty(rows.shape if need_x else 0)
    grad_state = torch.empty_like(below)
    sums = [torch.zeros(t.shape, dtype=wide, device=x.device) for t in given]
    for block in row_blocks(rows.shape[0], rows.shape[1], x.device):
        g, s = grad[block].to(wide), below[block].to(wide)
        down = norm_linear.project(rows[block], weight, bias, mean[block], rstd[block])
        mixed = keep * s + (1 - keep) * down
        block_mixed, *block_params = adapter.bottleneck_bwd(g, mixed, *params, dtype=x.dtype)
        grad_mixed = g + block_mixed
        grad_state[block] = keep * grad_mixed
        block_weight, block_bias, block_x = norm_linear.project_bwd(
            (1 - keep) * grad_mixed, rows[block], weight, mean[block], rstd[block], need_x
        )
        block_gate = (keep * (1 - keep) / GATE_TEMPERATURE) * (grad_mixed * (s - down)).sum()
        for total, part in zip(sums, (block_weight, block_bias, block_gate, *block_params), strict=True):
            total += part
        if need_x:
            grad_x[block] = block_x
    return [
        grad_x.view(x.shape) if need_x else grad_x,
        grad_state.view(state.shape),
        *(total.to(t.dtype) for total, t in zip(sums, given, strict=True)),
    ]
