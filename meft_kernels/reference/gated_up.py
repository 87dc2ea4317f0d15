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


def sums_(grad: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """Writes the gradient of y over y, and gives what those of the parameters are made of (``gradients``),
    summed over the rows given, in the accumulation type: dout^T relu(y) (D, r); sum dout and sum dout * h
    (2, D)."""
    grad_y, *summed = _sums(grad, x, y, weight)
    y.copy_(grad_y)
    return summed


def _sums(grad: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    wide, dtype = accumulation_dtype(x.dtype), x.dtype
    rows, side = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    grad = grad.reshape(rows.shape)
    grad_y = torch.empty_like(side)
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device)
    totals = torch.zeros(2, weight.shape[0], dtype=wide, device=x.device)
    for block in row_blocks(rows.shape[0], rows.shape[1], x.device):
        g = grad[block].to(wide)
        grad_weight += matmul(g.T, torch.relu(side[block]), dtype)
        totals[0] += g.sum(0)
        totals[1] += (g * rows[block]).sum(0)
        grad_y[block] = matmul(g, weight, dtype) * (side[block] > 0)
    return [grad_y.view(y.shape), grad_weight, totals]


def gradients(
    grad_weight: Tensor, totals: Tensor, weight: Tensor, bias: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and gate from what ``sums_`` gives of all rows."""
    keep = torch.tanh(gate.to(totals.dtype) / GATE_TEMPERATURE)
    grad_gate = torch.ops.aten.tanh_backward(totals[1].sum() / GATE_TEMPERATURE, keep)
    return grad_weight.to(weight.dtype), totals[0].to(bias.dtype), grad_gate.to(gate.dtype)


def backward(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, need_x: bool
) -> list[Tensor]:
    """Gradients of x (empty unless ``need_x``), y, weight, bias and gate."""
    grad_y, *summed = _sums(grad, x, y, weight)
    grad_x = x.new_empty(0)
    if need_x:
        keep = torch.tanh(gate.to(accumulation_dtype(x.dtype)) / GATE_TEMPERATURE)
        grad_x = (keep * grad).to(x.dtype)
    return [grad_x, grad_y, *gradients(*summed, weight, bias, gate)]
