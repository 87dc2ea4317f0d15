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
    x: Tensor, padding: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """n (B, T, r), LNhat(x) (B, T, r) and its rstd (B, T, 1) in the type of the weights; padding frames
    (B, T) count as zeros."""
    x = x.to(norm_weight.dtype).contiguous()
    normed, rstd = standardize(x if padding is None else x.masked_fill(padding[..., None], 0))
    affine = torch.addcmul(norm_bias, normed, norm_weight)
    return affine.relu_() if relu else affine, normed, rstd


def _inverse_std(n: Tensor, product: Tensor, cross: Tensor, square: Tensor, width: int) -> Tensor:
    """s_t, (B, T); ``product`` is M n_t + m, ``square`` |bc|^2."""
    square = torch.addmv(square, n.view(-1, n.shape[-1]), cross).view(n.shape[:-1])
    square += (product * n).sum(-1)
    return square.div_(width).clamp_(min=0).add_(NORM_EPS).rsqrt_()


def _product(n: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """M n_t + m, (B, T, r)."""
    return torch.addmm(cross, n.view(-1, n.shape[-1]), gram).view(n.shape)


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
    gram, cross, square = weight.T @ weight, bias @ weight, bias @ bias
    share = frame_weights(lengths, batch, frames, x)
    padding = None if lengths is None else share == 0
    pooled, scale_sum = share.new_empty(batch, width), share.new_empty(batch)
    for clips in row_blocks(batch, frames * width, x.device):
        of_part = None if padding is None else padding[clips]
        n, _, _ = _features(x[clips], of_part, norm_weight, norm_bias, relu)
        product = _product(n, gram, cross)
        scale = _inverse_std(n, product, cross, square, weight.shape[0]).mul_(share[clips])
        torch.bmm(scale[:, None], n, out=pooled[clips, None])
        torch.sum(scale, -1, out=scale_sum[clips])
    up = torch.addmm(scale_sum[:, None] * bias, pooled, weight.T)
    return torch.addcmul(out_norm_bias, out_norm_weight, up).to(x.dtype)


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
    gram, cross, square = weight.T @ weight, bias @ weight, bias @ bias
    share = frame_weights(lengths, batch, frames, x)
    padding = None if lengths is None else share == 0
    grad = grad.to(wide)
    e = out_norm_weight * grad
    grad_pooled, grad_scale_sum = e @ weight, e @ bias
    pooled, scale_sum = share.new_empty(batch, width), share.new_empty(batch)
    grad_x = x.new_empty(x.shape if need_x else 0)
    second, first, zeroth, grad_norm_weight, grad_norm_bias = (
        torch.zeros(shape, dtype=wide, device=x.device) for shape in ((width, width), width, (), width, width)
    )
    for clips in row_blocks(batch, frames * width, x.device):
        p, of_part = share[clips], None if padding is None else padding[clips]
        n, normed, rstd = _features(x[clips], of_part, norm_weight, norm_bias, relu)
        grad_n = _product(n, gram, cross)  # which it becomes
        inverse = _inverse_std(n, grad_n, cross, square, size)
        scale = p * inverse
        torch.bmm(scale[:, None], n, out=pooled[clips, None])
        torch.sum(scale, -1, out=scale_sum[clips])
        grad_inverse = (n @ grad_pooled[clips, :, None]).squeeze(-1).add_(grad_scale_sum[clips, None])
        q = inverse.pow_(3).mul_(grad_inverse).mul_(p).mul_(-0.5 / size)  # (b, T)
        weighted = (q[..., None] * n).view(-1, width)
        second.addmm_(weighted.T, n.view(-1, width))
        first += weighted.sum(0)
        zeroth += q.sum()
        del weighted
        grad_n.mul_(q.mul_(2)[..., None]).addcmul_(scale[..., None], grad_pooled[clips, None])
        if relu:
            grad_n.mul_(n > 0)
        del n
        grad_norm_weight += (grad_n * normed).sum((0, 1))
        grad_norm_bias += grad_n.sum((0, 1))
        if need_x:
            grad_x[clips] = standardize_bwd(grad_n.mul_(norm_weight), normed, rstd)
    grad_weight = torch.addmm(2 * (weight @ second + bias[:, None] * first), e.T, pooled)
    grad_bias = scale_sum @ e + 2 * (weight @ first + bias * zeroth)
    up = torch.addmm(scale_sum[:, None] * bias, pooled, weight.T)
    grads = (
        grad_norm_weight,
        grad_norm_bias,
        *_centred(grad_weight, grad_bias),
        (grad * up).sum(0),
        grad.sum(0),
    )
    return [grad_x, *(total.to(t.dtype) for total, t in zip(grads, given, strict=True))]
