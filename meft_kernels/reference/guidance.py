"""SHERL's redundancy-guided merge of the shallow layers, frame by frame.

    shallow x_j = features[:-1] (K of them), deep q = features[-1], all (..., r)
    n_j = x_j / (|x_j| + 1e-6);   rho_j = sum_k relu(n_j . n_k)   (self included)
    t_j = w . (x_j * q) + b;      e_j = relu(t_j) / rho_j         (0 where rho_j = 0)
    alpha_j = e_j / (sum_k e_k + 1e-6);   out = sum_j alpha_j x_j + q

With dA the upstream gradient, c = n n^T (K, K), s = sum e + 1e-6 and m_j = |x_j| + 1e-6:

    dalpha_j = dA . x_j;   de_j = (dalpha_j - sum alpha dalpha) / s
    dt_j = de_j / rho_j * 1[t_j > 0];   drho_j = -de_j e_j / rho_j
    G_ij = (drho_i + drho_j) 1[c_ij > 0]
    dx_i = alpha_i dA + dt_i w * q + sum_j G_ij x_j / (m_i m_j) - x_i (sum_j G_ij c_ij) / (|x_i| m_i)
    dq   = dA + w * sum_i dt_i x_i;   dw = sum dt_i x_i * q;   db = sum dt_i

A zero vector x_i has no direction, and one shorter than 1e-14, whose 1/rho^2 leaves float32, is taken
for one: n_i and with it rho_i and e_i are zero, and its last two terms are.
"""

import torch
from torch import Tensor

from .common import GUIDANCE_EPS, GUIDANCE_SHORT, accumulation_dtype, row_blocks


def definition(weight: Tensor, bias: Tensor, features: list[Tensor]) -> Tensor:
    """What the op means, in autograd-friendly PyTorch."""
    wide = accumulation_dtype(features[0].dtype)
    deep = features[-1].to(wide)
    if len(features) == 1:
        return features[-1].clone()
    shallow = torch.stack([feature.to(wide) for feature in features[:-1]], -2)
    norms = torch.linalg.vector_norm(shallow, dim=-1, keepdim=True)
    direction = torch.where(norms < GUIDANCE_SHORT, 0, shallow / (norms + GUIDANCE_EPS))
    redundancy = torch.relu(direction @ direction.mT).sum(-1)
    alive = redundancy > 0
    scores = torch.relu((shallow * deep[..., None, :]) @ weight.to(wide).squeeze(0) + bias.to(wide))
    scores = torch.where(alive, scores / torch.where(alive, redundancy, 1), 0)
    alpha = scores / (scores.sum(-1, keepdim=True) + GUIDANCE_EPS)
    return (torch.einsum("...k,...kr->...r", alpha, shallow) + deep).to(features[0].dtype)


def _weights(
    shallow: Tensor, deep: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """alpha, e, 1/rho (0 where rho is), sum of e plus epsilon, cosines and norms of rows (N, K, r)."""
    norms = torch.linalg.vector_norm(shallow, dim=-1)
    direction = shallow / (norms + GUIDANCE_EPS)[..., None]
    direction = torch.where((norms < GUIDANCE_SHORT)[..., None], 0, direction)
    cosine = direction @ direction.mT
    redundancy = torch.relu(cosine).sum(-1)
    inverse = torch.where(redundancy > 0, 1 / redundancy, 0)
    inverse = torch.where(redundancy.isnan(), redundancy, inverse)  # NaN must not vanish
    scores = torch.relu((shallow * deep[:, None]) @ weight + bias) * inverse
    total = scores.sum(-1, keepdim=True) + GUIDANCE_EPS
    return scores / total, scores, inverse, total, cosine, norms


def forward(weight: Tensor, bias: Tensor, features: list[Tensor]) -> Tensor:
    """weight (1, r), bias (1,), K + 1 features (..., r) -> (..., r) in the features' type."""
    last = features[-1]
    if len(features) == 1:
        return last.clone()
    wide, width = accumulation_dtype(last.dtype), last.shape[-1]
    rows = [feature.reshape(-1, width) for feature in features]
    weight, bias = weight.to(wide).squeeze(0), bias.to(wide)
    out = last.new_empty(rows[0].shape)
    for block in row_blocks(rows[0].shape[0], width * len(rows), last.device):
        shallow = torch.stack([row[block].to(wide) for row in rows[:-1]], 1)
        deep = rows[-1][block].to(wide)
        alpha = _weights(shallow, deep, weight, bias)[0]
        out[block] = (alpha[:, None] @ shallow).squeeze(1) + deep
    return out.view(last.shape)


def backward(grad: Tensor, weight: Tensor, bias: Tensor, features: list[Tensor]) -> list[Tensor]:
    """Gradients of weight, bias and of each feature."""
    last = features[-1]
    if len(features) == 1:
        return [torch.zeros_like(weight), torch.zeros_like(bias), grad.clone()]
    wide, width = accumulation_dtype(last.dtype), last.shape[-1]
    rows = [feature.reshape(-1, width) for feature in features]
    grad = grad.reshape(-1, width)
    wide_weight, wide_bias = weight.to(wide).squeeze(0), bias.to(wide)
    grad_features = [torch.empty_like(row) for row in rows]
    grad_weight, grad_bias = torch.zeros_like(wide_weight), torch.zeros_like(wide_bias)
    for block in row_blocks(rows[0].shape[0], width * len(rows), last.device):
        shallow = torch.stack([row[block].to(wide) for row in rows[:-1]], 1)  # (N, K, r)
        deep, g = rows[-1][block].to(wide), grad[block].to(wide)
        alpha, scores, inverse, total, cosine, norms = _weights(shallow, deep, wide_weight, wide_bias)
        grad_alpha = (shallow @ g[..., None]).squeeze(-1)
        # dalpha_j - sum alpha dalpha as a sum of differences, 1 - sum alpha being epsilon / s: where
        # one score is nearly all there is, nothing cancels.
        spread = grad_alpha[:, :, None] - grad_alpha[:, None]  # (N, K, K)
        centred = (alpha[:, None] * spread).sum(-1) + grad_alpha * (GUIDANCE_EPS / total)
        # Scores and their sum may be huge, their quotients are not: de = centred / s alone could vanish.
        grad_logits = centred * (inverse / total) * (scores > 0)
        grad_redundancy = -centred * alpha * inverse
        pull = (grad_redundancy[:, :, None] + grad_redundancy[:, None]) * (cosine > 0)
        scale = norms + GUIDANCE_EPS
        mixing = pull / (scale[:, :, None] * scale[:, None])
        # x / |x| first: the product of two tiny numbers below it would be zero, and zero by zero NaN.
        unit = shallow / torch.where(norms > 0, norms, 1)[..., None]
        shortening = unit * ((pull * cosine).sum(-1) / scale)[..., None]
        weighted = (grad_logits[:, None] @ shallow).squeeze(1)  # sum_i dt_i x_i
        gated = (wide_weight * deep)[:, None]
        grad_shallow = alpha[..., None] * g[:, None] + grad_logits[..., None] * gated
        grad_shallow += mixing @ shallow - shortening
        for target, part in zip(grad_features, (*grad_shallow.unbind(1), g + wide_weight * weighted)):
            target[block] = part
        grad_weight += (weighted * deep).sum(0)
        grad_bias += grad_logits.sum()
    return [
        grad_weight[None].to(weight.dtype),
        grad_bias.to(bias.dtype),
        *(target.view(last.shape) for target in grad_features),
    ]


def backward_(grad: Tensor, weight: Tensor, bias: Tensor, features: list[Tensor]) -> list[Tensor]:
    """Gradients of weight and bias; those of the features are written over them."""
    grad_weight, grad_bias, *grads = backward(grad, weight, bias, features)
    for feature, each in zip(features, grads, strict=True):
        feature.copy_(each)
    return [grad_weight, grad_bias]
