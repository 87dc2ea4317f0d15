"""SHERL's way back to the backbone's width: the input of the last encoder layer.

out = W relu(y) + b + tanh(gate / 0.1) * h,    y (..., r), h (..., D) -> out (..., D)

dW = dout^T relu(y);   db = sum dout;   dy = (dout W) 1[y > 0]
dgate = (1 - tanh^2) / 0.1 * sum dout * h;   dh = tanh(gate / 0.1) * dout (only on request)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import GATE_TEMPERATURE, accumulation_dtype, matmul, row_blocks


def definition(residual: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """What the op means, in the type of ``residual``."""
    wide = accumulation_dtype(residual.dtype)
    up = F.linear(torch.relu(y.to(wide)), weight.to(wide), bias.to(wide))
    return (up + torch.tanh(gate.to(wide) / GATE_TEMPERATURE) * residual.to(wide)).to(residual.dtype)


def forward(residual: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """residual (..., D), y (..., r), weight (D, r), bias (D,), gate (1,) -> (..., D)."""
    wide, dtype = accumulation_dtype(residual.dtype), residual.dtype
    rows, side = residual.reshape(-1, residual.shape[-1]), y.reshape(-1, y.shape[-1])
    weight, bias = weight.to(wide), bias.to(wide)
    keep = torch.tanh(gate.to(wide) / GATE_TEMPERATURE)
    out = rows.new_empty(rows.shape)
    for block in row_blocks(rows.shape[0], rows.shape[1], residual.device):
        up = matmul(torch.relu(side[block]), weight.T, dtype) + bias
        out[block] = up + keep * rows[block]
    return out.view(residual.shape)


def backward(
    grad: Tensor, residual: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, need_x: bool
) -> list[Tensor]:
    """Gradients of residual (empty unless ``need_x``), y, weight, bias and gate."""
    wide, dtype = accumulation_dtype(residual.dtype), residual.dtype
    rows, side = residual.reshape(-1, residual.shape[-1]), y.reshape(-1, y.shape[-1])
    grad = grad.reshape(rows.shape)
    keep = torch.tanh(gate.to(wide) / GATE_TEMPERATURE)
    grad_residual = rows.new_empty(rows.shape if need_x else 0)
    grad_y = torch.empty_like(side)
    grad_weight, grad_bias, grad_keep = (
        torch.zeros(t.shape, dtype=wide, device=t.device) for t in (weight, bias, gate)
    )
    for block in row_blocks(rows.shape[0], rows.shape[1], residual.device):
        g = grad[block].to(wide)
        grad_weight += matmul(g.T, torch.relu(side[block]), dtype)
        grad_bias += g.sum(0)
        grad_keep += (g * rows[block]).sum()
        grad_y[block] = matmul(g, weight, dtype) * (side[block] > 0)
        if need_x:
            grad_residual[block] = keep * g
    return [
        grad_residual.view(residual.shape) if need_x else grad_residual,
        grad_y.view(y.shape),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
        ((1 - keep * keep) / GATE_TEMPERATURE * grad_keep).to(gate.dtype),
    ]
