"""Bottleneck adapter with its own LayerNorm and no residual (LST's rungs, UniPT's projection).

    y = W2 gelu(W1 LN(x) + b1) + b2,    x (..., r), W1 (a, r), W2 (r, a) -> y (..., r)

The backward recomputes n = LNhat(x), m = gamma n + beta, p = W1 m + b1 from x:

    dp = (dy W2) * gelu'(p);   dW2 = dy^T gelu(p);   dW1 = dp^T m;   dm = dp W1
    dgamma = sum dm * n;   dbeta = sum dm;   dx = standardize_bwd(dm * gamma)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    NORM_EPS,
    accumulation_dtype,
    gelu_bwd,
    matmul,
    row_blocks,
    standardize,
    standardize_bwd,
)


def definition(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """What the op means: ``(..., r) -> (..., r)`` in the type of ``x``, accumulated in fp32 or float64."""
    wide = accumulation_dtype(x.dtype)
    norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2 = (
        t.to(wide) for t in (norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    )
    normed = F.layer_norm(x.to(wide), x.shape[-1:], norm_weight, norm_bias, NORM_EPS)
    hidden = F.gelu(F.linear(normed, weight_1, bias_1))
    return F.linear(hidden, weight_2, bias_2).to(x.dtype)


def bottleneck(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The adapter of rows x (N, r) in the accumulation type; products take operands of ``dtype``."""
    normed, _ = standardize(x)
    hidden = F.gelu(matmul(normed * norm_weight + norm_bias, weight_1.T, dtype) + bias_1)
    return matmul(hidden, weight_2.T, dtype) + bias_2


def bottleneck_bwd(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Gradients of ``bottleneck`` for x and its six parameters, in their order."""
    normed, rstd = standardize(x)
    affine = normed * norm_weight + norm_bias
    hidden = matmul(affine, weight_1.T, dtype) + bias_1
    grad_hidden = gelu_bwd(matmul(grad, weight_2, dtype), hidden)
    grad_weight_2 = matmul(grad.T, F.gelu(hidden), dtype)
    grad_affine = matmul(grad_hidden, weight_1, dtype)
    return (
        standardize_bwd(grad_affine * norm_weight, normed, rstd),
        (grad_affine * normed).sum(0),
        grad_affine.sum(0),
        matmul(grad_hidden.T, affine, dtype),
        grad_hidden.sum(0),
        grad_weight_2,
        grad.sum(0),
    )


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """x (..., r) -> (..., r) in the type of x."""
    wide = accumulation_dtype(x.dtype)
    params = [t.to(wide) for t in (norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)]
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape)
    for block in row_blocks(rows.shape[0], weight_1.shape[0], x.device):
        out[block] = bottleneck(rows[block].to(wide), *params, dtype=x.dtype)
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
    """Gradients of x (empty unless ``need_x``) and of the six parameters."""
    wide = accumulation_dtype(x.dtype)
    given = (norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    params = [t.to(wide) for t in given]
    rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    grad_x = rows.new_empty(rows.shape if need_x else 0)
    sums = [torch.zeros_like(t) for t in params]
    for block in row_blocks(rows.shape[0], weight_1.shape[0], x.device):
        block_x, *block_sums = bottleneck_bwd(
            grad[block].to(wide), rows[block].to(wide), *params, dtype=x.dtype
        )
        for total, part in zip(sums, block_sums, strict=True):
            total += part
        if need_x:
            grad_x[block] = block_x
    grads = [total.to(t.dtype) for total, t in zip(sums, given, strict=True)]
    return [grad_x.view(x.shape) if need_x else grad_x, *grads]
