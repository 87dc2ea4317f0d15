"""SHERL's way back to the backbone's width: the input of the last encoder layer.

out = W relu(y) + b + tanh(gate / 0.1) * h,    y (..., r), h (..., D) -> out (..., D)

dW = dout^T relu(y);   db = sum dout;   dy = (dout W) 1[y > 0]
dgate = (1 - tanh^2) / 0.1 * sum dout * h;   dh = tanh(gate / 0.1) * dout (only on request)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import GATE_TEMPERATURE, accumulation_dtype, matmul, row_blocks


def definition(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """What the op means, in the type of ``x``."""
    wide = accumulation_dtype(x.dtype)
    up = F.linear(torch.relu(y.to(wide)), weight.to(wide), bias.to(wide))
    return (up + torch.tanh(gate.to(wide) / GATE_TEMPERATURE) * x.to(wide)).to(x.dtype)


def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """x (..., D), y (..., r), weight (D, r), bias (D,), gate (1,) -> (..., D)."""
    wide, dtype = accumulation_dtype(x.dtype), x.dtype
    rows, side = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    weight, bias = weight.to(wide), bias.to(wide)
    keep = torch.tanh(gate.to(wide) / GATE_TEMPERATURE)
    out = rows.new_empty(rows.shape)
    for block in row_blocks(rows.shape[0], rows.shape[1], x.device):
        up = matmul(torch.relu(side[block]), weight.T, dtype) + bias
        out[block] = up + keep * rows[block]
    return out.view(x.shape)


def backward(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, need_x: bool
) -> list[Tensor]:
    """Gradients of x (empty unless ``need_x``), y, weight, bias and gate."""
    wide, dtype = accumulation_dtype(x.dtype), x.dtype
    rows, side = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    grad = grad.reshape(rows.shape)
    keep = torch.tanh(gate.to(wide) / GATE_TEMPERATURE)
    grad_x = rows.new_empty(rows.shape if need_x else 0)
    grad_y = torch.empty_like(side)
    grad_weight, grad_bias, grad_keep = (
        torch.zeros(t.shape, dtype=wide, device=t.device) for t in (weight, bias, gate)
    )
    for block in row_blocks(rows.shape[0], rows.shape[1], x.device):
        g = grad[block].to(wide)
        grad_weight += matmul(g.T, torch.relu(side[block]), dtype)
        grad_bias += g.sum(0)
        grad_keep += (g * rows[block]).sum()
        grad_y[block] = matmul(g, weight, dtype) * (side[block] > 0)
        if need_x:
            grad_x[block] = keep * g
    return [
        grad_x.view(x.shape) if need_x else grad_x,
        grad_y.view(y.shape),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
        ((1 - keep * keep) / GATE_TEMPERATURE * grad_keep).to(gate.dtype),
    ]
