"""The mean over time of a side network's output, without writing the (B, T, D) output (LST, UniPT).

    n_t = LN_in(x_t), or relu(LN_in(x_t));   u_t = W n_t + b;   out = mean_t LN_out(u_t)
    x (B, T, r), W (D, r) -> out (B, D)

u_t is needed only through its centred squared norm, a quadratic form in n_t. With Wc = W - colmean(W),
bc = b - mean(b), M = Wc^T Wc (r, r), m = Wc^T bc and p_t the weight of frame t in the mean:

    var_t = (n_t^T M n_t + 2 m . n_t + |bc|^2) / D;   s_t = rsqrt(var_t + eps)
    nb = sum_t p_t s_t n_t;   sb = sum_t p_t s_t;   out = gamma * (Wc nb + sb bc) + beta

Backward, with e = gamma * dout:

    dnb = Wc^T e;  dsb = bc . e;  ds_t = p_t (n_t . dnb + dsb);  q_t = -s_t^3 ds_t / (2 D)
    dn_t = p_t s_t dnb + 2 q_t (M n_t + m)
    dWc = sum_b e nb^T + 2 (Wc N2 + bc n1^T);   dbc = sum_b e sb + 2 (Wc n1 + bc n0)
    N2 = sum q n n^T, n1 = sum q n, n0 = sum q;   dW = dWc - colmean(dWc);   db = dbc - mean(dbc)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    NORM_EPS,
    accumulation_dtype,
    frame_weights,
    masked_mean,
    row_blocks,
    standardize,
    standardize_bwd,
)


def definition(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    lengths: Tensor | None,
    relu: bool,
) -> Tensor:
    """What the op means, with the (B, T, D) output written out."""
    wide = accumulation_dtype(x.dtype)
    batch, frames, _ = x.shape
    normed = F.layer_norm(x.to(wide), x.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), NORM_EPS)
    up = F.linear(torch.relu(normed) if relu else normed, weight.to(wide), bias.to(wide))
    out = F.layer_norm(up, up.shape[-1:], out_norm_weight.to(wide), out_norm_bias.to(wide), NORM_EPS)
    return masked_mean(out, frame_weights(lengths, batch, frames, x)).to(x.dtype)


def _centred(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight - weight.mean(0), bias - bias.mean()


def _features(
    x: Tensor, share: Tensor, norm_weight: Tensor, norm_bias: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """n (B, T, r), LNhat(x) (B, T, r) and its rstd (B, T, 1); padding frames count as zeros."""
    normed, rstd = standardize(x.to(share.dtype).masked_fill((share == 0)[..., None], 0))
    affine = normed * norm_weight + norm_bias
    return torch.relu(affine) if relu else affine, normed, rstd


def _inverse_std(n: Tensor, gram: Tensor, cross: Tensor, bias: Tensor, width: int) -> Tensor:
    """s_t, (B, T)."""
    square = ((n @ gram + 2 * cross) * n).sum(-1) + bias @ bias
    return torch.rsqrt((square / width).clamp(min=0) + NORM_EPS)


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    lengths: Tensor | None,
    relu: bool,
) -> Tensor:
    """x (B, T, r), LN_in (r,), W (D, r), b (D,), LN_out (D,), lengths (B,) or None -> (B, D)."""
    wide = accumulation_dtype(x.dtype)
    norm_weight, norm_bias, weight, bias, out_norm_weight, out_norm_bias = (
        t.to(wide) for t in (norm_weight, norm_bias, weight, bias, out_norm_weight, out_norm_bias)
    )
    batch, frames, width = x.shape
    weight, bias = _centred(weight, bias)
    gram, cross = weight.T @ weight, bias @ weight
    share = frame_weights(lengths, batch, frames, x)
    out = x.new_empty(batch, weight.shape[0])
    for clips in row_blocks(batch, frames * width, x.device):
        n, _, _ = _features(x[clips], share[clips], norm_weight, norm_bias, relu)
        scale = share[clips] * _inverse_std(n, gram, cross, bias, weight.shape[0])
        pooled = (scale[:, None] @ n).squeeze(1)
        up = pooled @ weight.T + scale.sum(-1, keepdim=True) * bias
        out[clips] = out_norm_weight * up + out_norm_bias
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    lengths: Tensor | None,
    relu: bool,
    need_x: bool,
) -> list[Tensor]:
    """Gradients of x (empty unless ``need_x``) and of the six parameters."""
    wide = accumulation_dtype(x.dtype)
    given = (norm_weight, norm_bias, weight, bias, out_norm_weight, out_norm_bias)
    norm_weight, norm_bias, weight, bias, out_norm_weight, out_norm_bias = (t.to(wide) for t in given)
    batch, frames, width = x.shape
    size = weight.shape[0]
    weight, bias = _centred(weight, bias)
    gram, cross = weight.T @ weight, bias @ weight
    share = frame_weights(lengths, batch, frames, x)
    grad_x = x.new_empty(x.shape if need_x else 0)
    sums = [torch.zeros(t.shape, dtype=wide, device=x.device) for t in given]
    for clips in row_blocks(batch, frames * width, x.device):
        g, p = grad[clips].to(wide), share[clips]
        n, normed, rstd = _features(x[clips], p, norm_weight, norm_bias, relu)
        inverse = _inverse_std(n, gram, cross, bias, size)
        scale = p * inverse
        pooled, scale_sum = (scale[:, None] @ n).squeeze(1), scale.sum(-1)
        e = out_norm_weight * g
        grad_pooled, grad_scale_sum = e @ weight, e @ bias
        grad_inverse = p * ((n @ grad_pooled[..., None]).squeeze(-1) + grad_scale_sum[:, None])
        q = inverse**3 * grad_inverse * (-0.5 / size)  # (b, T)
        weighted = q[..., None] * n
        second = torch.einsum("bti,btj->ij", weighted, n)
        first, zeroth = weighted.sum((0, 1)), q.sum()
        grad_n = scale[..., None] * grad_pooled[:, None] + 2 * q[..., None] * (n @ gram + cross)
        grad_affine = grad_n * (n > 0) if relu else grad_n
        grad_weight = e.T @ pooled + 2 * (weight @ second + bias[:, None] * first)
        grad_bias = scale_sum @ e + 2 * (weight @ first + bias * zeroth)
        parts = (
            (grad_affine * normed).sum((0, 1)),
            grad_affine.sum((0, 1)),
            *_centred(grad_weight, grad_bias),
            (g * (pooled @ weight.T + scale_sum[:, None] * bias)).sum(0),
            g.sum(0),
        )
        for total, part in zip(sums, parts, strict=True):
            total += part
        if need_x:
            grad_x[clips] = standardize_bwd(grad_affine * norm_weight, normed, rstd)
    return [grad_x, *(total.to(t.dtype) for total, t in zip(sums, given, strict=True))]
