"""UniPT's parallel interaction: every layer's features seen through ReLU attention from the last layer's.

    R_l = relu(A F_l^T)   (no scaling, keys and values are both F_l)           l = 0..n-1
    M_l = (R_l / (rowsum(R_l) + 1e-7)) F_l + F_l
    C = softmax over l of  w . (mean_t A * mean_t F_l) + b;   out = sum_l C_l M_l

    A (B, T, r), n tensors F_l (B, T, r), w (1, r), b (1,) -> out (B, T, r)

With ``lengths`` the means, the scores and the row sums run over valid frames only. Scores exist for one block
of queries at a time, in both directions. Per query row, with M's gradient dM and k = C_l / R:

    E = dM F^T;   delta = rowsum(relu(S) * E) / R;   X = k * 1[S > 0] * (E - delta)
    dA += X F;    dF = X^T A + (k relu(S))^T dM + C_l dM;    dC_l = sum delta + sum dM . F
    ds = C (dC - sum C dC);  dw = sum ds (mean A * mean F);  the means' share goes evenly to the valid frames

b has an identically zero gradient, since softmax does not see a shift. A row without a positive score attends
to nothing and passes no gradient. X and k relu(S) are multiplied by ``boost`` before they are rounded, or
they would underflow in fp16.
"""

import torch
from torch import Tensor

from .common import (
    ATTENTION_EPS,
    accumulation_dtype,
    frame_mask,
    frame_weights,
    masked_mean,
    matmul,
    row_blocks,
    softmax_bwd,
)


def definition(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    features: list[Tensor],
) -> Tensor:
    """What the op means, with the (B, T, T) scores written out."""
    wide = accumulation_dtype(anchor.dtype)
    batch, frames, _ = anchor.shape
    valid = frame_weights(lengths, batch, frames, anchor)
    keys = None if lengths is None else frame_mask(lengths, frames)[..., None]
    query = anchor.to(wide)
    merged, confidences = [], []
    for feature in features:
        feature = feature.to(wide)
        value = feature if keys is None else feature.masked_fill(~keys, 0)
        scores = torch.relu(query @ value.mT)
        attention = scores / (scores.sum(-1, keepdim=True) + ATTENTION_EPS)
        merged.append(attention @ value + feature)
        means = masked_mean(query, valid) * masked_mean(feature, valid)
        confidences.append(means @ gate_weight.to(wide).squeeze(0) + gate_bias.to(wide))
    gates = torch.softmax(torch.stack(confidences, -1), -1)
    return torch.einsum("bl,lbtr->btr", gates, torch.stack(merged)).to(anchor.dtype)


def _gates(
    anchor: Tensor, gate_weight: Tensor, gate_bias: Tensor, valid: Tensor, features: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax gates (B, n), the anchor's mean (B, r) and the features' means (B, n, r)."""
    anchor_mean = masked_mean(anchor, valid)
    feature_means = torch.stack([masked_mean(feature, valid) for feature in features], 1)
    weight = gate_weight.to(valid.dtype).squeeze(0)
    confidences = (anchor_mean[:, None] * feature_means) @ weight + gate_bias.to(valid.dtype)
    return torch.softmax(confidences, -1), anchor_mean, feature_means


def forward(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    features: list[Tensor],
) -> Tensor:
    """anchor and each feature (B, T, r), gate (1, r) and (1,), lengths (B,) or None -> (B, T, r)."""
    batch, frames, _ = anchor.shape
    valid = frame_weights(lengths, batch, frames, anchor)
    gates, _, _ = _gates(anchor, gate_weight, gate_bias, valid, features)
    out = anchor.new_empty(anchor.shape)
    for clips in row_blocks(batch, frames * frames, anchor.device):
        keys = [_keys(feature[clips], valid[clips]) for feature in features]
        for rows in row_blocks(frames, (clips.stop - clips.start) * frames, anchor.device):
            query = anchor[clips, rows]
            total = None
            for index, (feature, key) in enumerate(zip(features, keys, strict=True)):
                scores = torch.relu(matmul(query, key.mT, anchor.dtype))
                row_sum = scores.sum(-1, keepdim=True) + ATTENTION_EPS
                attended = matmul(scores, key, anchor.dtype) / row_sum
                part = gates[clips, index, None, None] * (attended + feature[clips, rows])
                total = part if total is None else total + part
            out[clips, rows] = total
    return out


def boost(frames: int) -> float:
    """The power of two, at least ``frames``, that X and k relu(S) are multiplied by before they are rounded
    to the activations' type, and their fp32 products divided by. k is 1 / T of something near 1: times a
    gradient it falls where fp16 has few bits left or none. What overflows instead shows, and lowers the loss
    scale."""
    return float(1 << max(frames - 1, 0).bit_length())


def _keys(feature: Tensor, valid: Tensor) -> Tensor:
    """Features with padding frames zeroed: a zero key scores zero and so attends to nothing."""
    return feature.masked_fill((valid == 0)[..., None], 0)


def backward(
    grad: Tensor,
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    features: list[Tensor],
) -> list[Tensor]:
    """Gradients of anchor, gate_weight, gate_bias (zero) and of each feature."""
    dtype, wide = anchor.dtype, accumulation_dtype(anchor.dtype)
    batch, frames, _ = anchor.shape
    valid = frame_weights(lengths, batch, frames, anchor)
    gates, anchor_mean, feature_means = _gates(anchor, gate_weight, gate_bias, valid, features)
    grad_anchor = anchor.new_empty(anchor.shape)
    grad_features = [feature.new_empty(feature.shape) for feature in features]
    grad_weight = torch.zeros(gate_weight.shape, dtype=wide, device=anchor.device)
    weight, raised = gate_weight.to(wide), boost(frames)
    for clips in row_blocks(batch, frames * frames, anchor.device):
        upstream, query = grad[clips].to(wide), anchor[clips]
        gate_grads, query_grad, feature_grads = [], torch.zeros_like(upstream), []
        for index, feature in enumerate(features):
            key = _keys(feature[clips], valid[clips])
            gate = gates[clips, index, None, None]
            key_grad = torch.zeros_like(upstream)
            gate_grad = (upstream * feature[clips]).sum((1, 2))
            for rows in row_blocks(frames, upstream.shape[0] * frames, anchor.device):
                scores = torch.relu(matmul(query[:, rows], key.mT, dtype))
                row_sum = scores.sum(-1, keepdim=True) + ATTENTION_EPS
                score_grad = matmul(upstream[:, rows], key.mT, dtype)
                delta = (scores * score_grad).sum(-1, keepdim=True) / row_sum
                factor = raised * gate / row_sum
                flow = factor * (score_grad - delta) * (scores > 0)
                query_grad[:, rows] += matmul(flow, key, dtype)
                key_grad += matmul(flow.mT, query[:, rows], dtype)
                key_grad += matmul((scores * factor).mT, upstream[:, rows], dtype)
                gate_grad += delta.sum((1, 2))
            gate_grads.append(gate_grad)
            feature_grads.append(_keys(key_grad.div_(raised), valid[clips]) + gate * upstream)
        gate_grads = torch.stack(gate_grads, -1)  # (b, n)
        confidence_grads = softmax_bwd(gate_grads, gates[clips])
        means = anchor_mean[clips, None] * feature_means[clips]
        grad_weight += torch.einsum("bn,bnr->r", confidence_grads, means)
        share = valid[clips, :, None]
        anchor_share = torch.einsum("bn,bnr->br", confidence_grads, feature_means[clips]) * weight
        grad_anchor[clips] = query_grad.div_(raised) + share * anchor_share[:, None]
        feature_shares = confidence_grads[..., None] * (weight * anchor_mean[clips])[:, None]
        for index, feature_grad in enumerate(feature_grads):
            grad_features[index][clips] = feature_grad + share * feature_shares[:, index, None]
    return [grad_anchor, grad_weight.to(gate_weight.dtype), torch.zeros_like(gate_bias), *grad_features]


def backward_in_place(
    grad: Tensor,
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    slab: Tensor,
) -> list[Tensor]:
    """As ``backward`` of the features in a slab (n, B, T, r), over which their gradients are written; returns
    the other three."""
    features = list(slab.unbind(0))
    computed = backward(grad, anchor, gate_weight, gate_bias, lengths, features)
    for feature, feature_grad in zip(features, computed[3:], strict=True):
        feature.copy_(feature_grad)
    return computed[:3]
