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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n (B, T, r), and of the LayerNorm before it x (B, T, r), mean and rstd (B, T, 1), in the type of the
    weights; padding frames (B, T) count as zeros."""
    x = x.to(norm_weight.dtype).contiguous()
    x = x if padding is None else x.masked_fill(padding[..., None], 0)
    n, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, NORM_EPS)
    return n.relu_() if relu else n, x, mean, rstd


def _inverse_std(square: Tensor, width: int) -> Tensor:
    """s_t in the place of D var_t, (B, T)."""
    return square.clamp_(min=0).div_(width).add_(NORM_EPS).rsqrt_()


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
    gram, twice_cross, square = weight.T @ weight, 2 * (bias @ weight), bias @ bias
    share = frame_weights(lengths, batch, frames, x)
    padding = None if lengths is None else share == 0
    pooled, scale_sum = share.new_empty(batch, width), share.new_empty(batch)
    for clips in row_blocks(batch, frames * width, x.device):
        n = _features(x[clips], None if padding is None else padding[clips], norm_weight, norm_bias, relu)[0]
        quadratic = _product(n, gram, twice_cross).mul_(n).sum(-1).add_(square)
        scale = _inverse_std(quadratic, weight.shape[0]).mul_(share[clips])
        torch.bmm(scale[:, None], n, out=pooled[clips, None])
        torch.sum(scale, -1, out=scale_sum[clips])
        del n
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
    share_of_variance = share * (-1 / size)
    grad = grad.to(wide)
    e = out_norm_weight * grad
    grad_pooled, grad_scale_sum = e @ weight, e @ bias
    pooled, scale_sum, zeroth = share.new_empty(batch, width), share.new_empty(batch), share.new_empty(batch)
    grad_x = x.new_empty(x.shape if need_x else 0)
    second, first, grad_norm = (
        torch.zeros(shape, dtype=wide, device=x.device) for shape in ((width, width), width, (2, width))
    )
    for clips in row_blocks(batch, frames * width, x.device):
        p, of_part = share[clips], None if padding is None else padding[clips]
        n, given_x, mean, rstd = _features(x[clips], of_part, norm_weight, norm_bias, relu)
        rows = n.view(-1, width)
        grad_n = _product(n, gram, cross)  # which it becomes
        quadratic = torch.addmv(square, rows, cross).view(p.shape).add_((grad_n * n).sum(-1))
        inverse = _inverse_std(quadratic, size)
        scale = p * inverse
        torch.bmm(scale[:, None], n, out=pooled[clips, None])
        torch.sum(scale, -1, out=scale_sum[clips])
        grad_inverse = torch.baddbmm(grad_scale_sum[clips, None, None], n, grad_pooled[clips, :, None])
        twice_q = inverse.pow_(3).mul_(grad_inverse.squeeze(-1)).mul_(share_of_variance[clips])  # (b, T)
        second.addmm_((twice_q[..., None] * n).view(-1, width).T, rows)
        first.addmv_(rows.T, twice_q.view(-1))
        torch.sum(twice_q, -1, out=zeroth[clips])
        grad_n.mul_(twice_q[..., None]).addcmul_(scale[..., None], grad_pooled[clips, None])
        if relu:
            grad_n.mul_(n > 0)
        del n, rows
        grad_given, *of_norm = torch.ops.aten.native_layer_norm_backward(
            grad_n, given_x, (width,), mean, rstd, norm_weight, norm_bias, [need_x, True, True]
        )
        del grad_n, given_x
        grad_norm += torch.stack(of_norm)
        if need_x:
            grad_x[clips] = grad_given
        del grad_given
    grad_weight = torch.addmm(weight @ second + bias[:, None] * first, e.T, pooled)
    grad_bias = scale_sum @ e + weight @ first + bias * zeroth.sum()
    up = torch.addmm(scale_sum[:, None] * bias, pooled, weight.T)
    grads = (
        *grad_norm,
        *_centred(grad_weight, grad_bias),
        (grad * up).sum(0),
        grad.sum(0),
    )
    return [grad_x, *(total.to(t.dtype) for total, t in zip(grads, given, strict=True))]
