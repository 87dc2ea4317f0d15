"""SHERL's gated down-projection of one hidden state.

    p = relu(V1 h + a1);   z = (V2 p + a2 + p) * sigmoid(V3 p + a3),    h (..., D) -> z (..., r)

The backward keeps h alone and recomputes p, y = V2 p + a2 + p and g = sigmoid(V3 p + a3):

    dy = dz * g;   dg = dz * y * g (1 - g);   dp = (dy V2 + dy + dg V3) * 1[p > 0]
    dV1 = dp^T h;  dV2 = dy^T p;  dV3 = dg^T p;  biases are the row sums;  dh = dp V1 (only on request)

Where h is an 8-bit copy, 1[p > 0] is kept from the forward, one bit each (``active_bits``): the rounding
would flip half a per cent of them, and the gradients of those do not average out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import accumulation_dtype, matmul, row_blocks


def definition(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
) -> Tensor:
    """What the op means: ``(..., D) -> (..., r)`` in the type of ``x``, accumulated in fp32 or float64."""
    wide = accumulation_dtype(x.dtype)
    hidden = torch.relu(F.linear(x.to(wide), weight_1.to(wide), bias_1.to(wide)))
    value = F.linear(hidden, weight_2.to(wide), bias_2.to(wide)) + hidden
    return (value * torch.sigmoid(F.linear(hidden, weight_3.to(wide), bias_3.to(wide)))).to(x.dtype)


def active_bits(x: Tensor, weight_1: Tensor, bias_1: Tensor) -> Tensor:
    """Where p > 0, for x (..., D): (N, ceil(r / 8)) bytes, the first unit in the lowest bit."""
    wide = accumulation_dtype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    active = matmul(rows, weight_1.to(wide).T, x.dtype) + bias_1.to(wide) > 0
    active = F.pad(active, (0, -active.shape[1] % 8)).unflatten(1, (-1, 8))
    return (active * (2 ** torch.arange(8, device=x.device))).sum(-1).to(torch.uint8)


def _unpacked(bits: Tensor, width: int) -> Tensor:
    """The booleans (N, r) that ``active_bits`` packed."""
    return (bits[:, :, None] & 2 ** torch.arange(8, device=bits.device) > 0).flatten(1)[:, :width]


def _parts(
    rows: Tensor, params: list[Tensor], dtype: torch.dtype, active: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """p, y and g of rows (N, D); ``active`` where p > 0 is known."""
    weight_1, bias_1, weight_2, bias_2, weight_3, bias_3 = params
    hidden = matmul(rows, weight_1.T, dtype) + bias_1
    hidden = torch.relu(hidden) if active is None else hidden * active
    value = matmul(hidden, weight_2.T, dtype) + bias_2 + hidden
    return hidden, value, torch.sigmoid(matmul(hidden, weight_3.T, dtype) + bias_3)


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
    wide = accumulation_dtype(x.dtype)
    params = [t.to(wide) for t in (weight_1, bias_1, weight_2, bias_2, weight_3, bias_3)]
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(rows.shape[0], weight_1.shape[0])
    for block in row_blocks(rows.shape[0], rows.shape[1], x.device):
        _, value, gate = _parts(rows[block], params, x.dtype)
        out[block] = value * gate
    return out.view(*x.shape[:-1], weight_1.shape[0])


def forward_active(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
) -> tuple[Tensor, Tensor]:
    """``forward``, and ``active_bits``."""
    out = forward(x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3)
    return out, active_bits(x, weight_1, bias_1)


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
    wide = accumulation_dtype(x.dtype)
    given = (weight_1, bias_1, weight_2, bias_2, weight_3, bias_3)
    params = [t.to(wide) for t in given]
    rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, weight_1.shape[0])
    grad_x = rows.new_empty(rows.shape if need_x else 0)
    sums = [torch.zeros_like(t) for t in params]
    for block in row_blocks(rows.shape[0], rows.shape[1], x.device):
        is_active = None if active is None else _unpacked(active[block], weight_1.shape[0])
        hidden, value, gate = _parts(rows[block], params, x.dtype, is_active)
        is_active = hidden > 0 if is_active is None else is_active
        g = grad[block].to(wide)
        grad_value = g * gate
        grad_gate = g * value * gate * (1 - gate)
        grad_hidden = (
            matmul(grad_value, params[2], x.dtype) + grad_value + matmul(grad_gate, params[4], x.dtype)
        ) * is_active
        parts = (
            matmul(grad_hidden.T, rows[block], x.dtype),
            grad_hidden.sum(0),
            matmul(grad_value.T, hidden, x.dtype),
            grad_value.sum(0),
            matmul(grad_gate.T, hidden, x.dtype),
            grad_gate.sum(0),
        )
        for total, part in zip(sums, parts, strict=True):
            total += part
        if need_x:
            grad_x[block] = matmul(grad_hidden, params[0], x.dtype)
    grads = [total.to(t.dtype) for total, t in zip(sums, given, strict=True)]
    return [grad_x.view(x.shape) if need_x else grad_x, *grads]
