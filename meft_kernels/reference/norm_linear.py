"""LayerNorm followed by a projection, without ever storing the normalised tensor (LST, UniPT).

    z = W LN(x) + b,    x (..., D), W (r, D) -> z (..., r)

LayerNorm's affine part and its centring fold into the weight, its scale moves behind the product:

    W' = W * gamma;   Wc = W' - rowmean(W');   b' = b + W beta         (``fold``, differentiated by autograd)
    z  = rstd * (x Wc^T - mean * c) + b',   c = rowsum(Wc)             (``forward``)

c is zero before Wc is rounded to half precision; keeping it restores the accuracy that rows with a large mean
would lose. The backward reads the raw x:

    dzr = rstd * dz;   dWc = dzr^T x - (sum_t dzr_t mean_t) 1^T;   db' = sum_t dz_t
    dx  = standardize_bwd(dz Wc)                                          (only on request)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import NORM_EPS, accumulation_dtype, matmul, row_blocks, standardize_bwd


def definition(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the op means: ``(..., D) -> (..., r)`` in the type of ``x``, accumulated in fp32 or float64."""
    wide = accumulation_dtype(x.dtype)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), NORM_EPS)
    return F.linear(normed, weight.to(wide), bias.to(wide)).to(x.dtype)


def fold(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Centred weight (r, D) and bias (r,) of the folded projection, in at least fp32; or of n projections at
    once, each argument with n in front."""
    wide = accumulation_dtype(weight.dtype)
    weight, norm_weight, norm_bias = (
        t.to(wide) for t in (weight, norm_weight[..., None, :], norm_bias[..., None, :])
    )
    scaled = weight * norm_weight
    # A sum of products and not a matrix product, so that autocast leaves it in full precision.
    return scaled - scaled.mean(-1, keepdim=True), bias.to(wide) + (weight * norm_bias).sum(-1)


def project(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The folded projection of rows: x (N, D), mean and rstd (N,) -> (N, r) in the accumulation type."""
    weight = weight.to(x.dtype)
    raw = matmul(x, weight.T, x.dtype)
    column_sum = weight.to(raw.dtype).sum(-1)
    return rstd[:, None] * (raw - mean[:, None] * column_sum) + bias.to(raw.dtype)


def project_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_x: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``project`` for weight, bias and, on request, x; ``grad`` (N, r)."""
    # Rounded before both terms, since the product may take it rounded: a large mean then still cancels.
    scaled = (rstd[:, None] * grad).to(x.dtype)
    grad_weight = matmul(scaled.T, x, x.dtype) - (scaled.to(grad.dtype) * mean[:, None]).sum(0)[:, None]
    grad_x = None
    if need_x:
        normed = (x.to(grad.dtype) - mean[:, None]) * rstd[:, None]
        grad_x = standardize_bwd(matmul(grad, weight, x.dtype), normed, rstd[:, None])
    return grad_weight, grad.sum(0), grad_x


def forward(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """x (..., D), folded weight (r, D) and bias (r,), row statistics (...) -> (..., r) in the type of x."""
    rows, mean, rstd = x.reshape(-1, x.shape[-1]), mean.reshape(-1), rstd.reshape(-1)
    out = x.new_empty(rows.shape[0], weight.shape[0])
    for block in row_blocks(rows.shape[0], rows.shape[1], x.device):
        out[block] = project(rows[block], weight, bias, mean[block], rstd[block])
    return out.view(*x.shape[:-1], weight.shape[0])


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, need_x: bool
) -> list[Tensor]:
    """Gradients of x (empty unless ``need_x``, and with the path through mean and rstd), weight and bias."""
    wide = accumulation_dtype(x.dtype)
    rows, mean, rstd = x.reshape(-1, x.shape[-1]), mean.reshape(-1), rstd.reshape(-1)
    grad = grad.reshape(-1, weight.shape[0])
    grad_x = torch.empty_like(rows) if need_x else x.new_empty(0)
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device)
    grad_bias = torch.zeros(bias.shape, dtype=wide, device=x.device)
    for block in row_blocks(rows.shape[0], rows.shape[1], x.device):
        g = grad[block].to(wide)
        block_weight, block_bias, block_x = project_bwd(
            g, rows[block], weight, mean[block], rstd[block], need_x
        )
        grad_weight += block_weight
        grad_bias += block_bias
        if need_x:
            grad_x[block] = block_x
    return [
        grad_x.view(x.shape) if need_x else grad_x,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    ]
