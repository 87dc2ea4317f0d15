"""``relu_attention`` with its ReLU before the product, whose work then grows with the length and not with its
square: linear attention (arXiv 2006.16236) with ReLU as the feature map.

    S_l = relu(F_l)^T F_l (r, r);   u_l = rowsum(relu(F_l)^T) (r,)             l = 0..n-1
    M_l = relu(A) S_l / (relu(A) u_l + 1e-7) + F_l;   out = sum_l C_l M_l,  C_l as in ``relu_attention``

    A (B, T, r), n tensors F_l (B, T, r), w (1, r), b (1,) -> out (B, T, r)

Where A and F_l have no negative entry this is ``relu_attention`` itself, since relu(A F^T) is then
relu(A) relu(F)^T. With ``lengths`` the means and S_l and u_l run over valid frames only. Per query row, with
M's gradient dM, R = relu(A) u + 1e-7 and k = C_l / R:

    E = dM S^T;   delta = rowsum(relu(A) * E) / R;   dA += 1[A > 0] k (E - delta u^T)
    dS = (k relu(A))^T dM;   du = -(k relu(A))^T delta;   dC_l = sum delta + sum dM . F
    dF = relu(F) dS + 1[F > 0] (F dS^T + du^T) + C_l dM

S and u are divided by ``boost``, a power of two, before S is rounded to the activations' type, or they would
overflow in fp16; dS has that factor too much until the end.
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
)
from .relu_attention import Gates, boost


def definition(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    features: list[Tensor],
) -> Tensor:
    """What the op means, with all states kept."""
    wide = accumulation_dtype(anchor.dtype)
    batch, frames, _ = anchor.shape
    valid = frame_weights(lengths, batch, frames, anchor)
    keys = None if lengths is None else frame_mask(lengths, frames)[..., None]
    anchor_mean, query = masked_mean(anchor, valid), torch.relu(anchor.to(wide))
    merged, confidences = [], []
    for feature in features:
        feature = feature.to(wide)
        value = feature if keys is None else feature.masked_fill(~keys, 0)
        key = torch.relu(value)
        attended = query @ (key.mT @ value)
        merged.append(attended / (query @ key.sum(1)[..., None] + ATTENTION_EPS) + feature)
        means = anchor_mean * masked_mean(feature, valid)
        confidences.append(means @ gate_weight.to(wide).squeeze(0) + gate_bias.to(wide))
    gates = torch.softmax(torch.stack(confidences, -1), -1)
    return torch.einsum("bl,lbtr->btr", gates, torch.stack(merged)).to(anchor.dtype)


def _state(feature: Tensor, invalid: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of features (b, T, r): those of valid frames, their ReLU, and S (b, r, r) and u (b, 1, r), over scale.
    ``invalid``: (b, T, 1), or None."""
    value = feature if invalid is None else feature.masked_fill(invalid, 0)
    key = torch.relu(value)
    state = matmul(key.mT, value, feature.dtype).div_(scale)
    return value, key, state, key.sum(1, keepdim=True, dtype=state.dtype).div_(scale)


def _scales(lengths: Tensor | None, batch: int, frames: int, like: Tensor) -> Tensor:
    """(B, 1, 1): the power of two, at least each clip's number of valid frames, that its S and u are over."""
    wide = accumulation_dtype(like.dtype)
    if lengths is None:
        return torch.full((batch, 1, 1), boost(frames), dtype=wide, device=like.device)
    counts = lengths.clamp(1, max(frames, 1)).to(wide)
    return torch.exp2(torch.ceil(torch.log2(counts)))[:, None, None]


def _invalid(lengths: Tensor | None, frames: int) -> Tensor | None:
    return None if lengths is None else ~frame_mask(lengths, frames)[..., None]


def forward(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    features: list[Tensor],
) -> Tensor:
    """anchor and each feature (B, T, r), gate (1, r) and (1,), lengths (B,) or None -> (B, T, r)."""
    batch, frames, width = anchor.shape
    valid, invalid = frame_weights(lengths, batch, frames, anchor), _invalid(lengths, frames)
    gates = Gates(anchor, gate_weight, gate_bias, valid, features).values
    scale = _scales(lengths, batch, frames, anchor)
    eps = ATTENTION_EPS / scale
    out = anchor.new_empty(anchor.shape)
    for clips in row_blocks(batch, frames * width, anchor.device):
        query = torch.relu(anchor[clips])
        total = torch.zeros(query.shape, dtype=gates.dtype, device=anchor.device)
        for index, feature in enumerate(features):
            gate = gates[clips, index, None, None]
            masked = None if invalid is None else invalid[clips]
            _, _, state, sums = _state(feature[clips], masked, scale[clips])
            row_sum = query.to(gates.dtype) @ sums.mT + eps[clips]
            total.addcmul_(matmul(query, state, anchor.dtype), gate / row_sum)
            total.addcmul_(feature[clips].to(gates.dtype), gate)
        out[clips] = total
    return out


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
    batch, frames, width = anchor.shape
    valid, invalid = frame_weights(lengths, batch, frames, anchor), _invalid(lengths, frames)
    gates = Gates(anchor, gate_weight, gate_bias, valid, features)
    scale = _scales(lengths, batch, frames, anchor)
    eps = ATTENTION_EPS / scale
    grad_anchor = anchor.new_empty(anchor.shape)
    grad_features = [feature.new_empty(feature.shape) for feature in features]
    grad_weight = torch.zeros(gate_weight.shape, dtype=wide, device=anchor.device)
    for clips in row_blocks(batch, frames * width, anchor.device):
        upstream, query = grad[clips].to(wide), torch.relu(anchor[clips]).to(wide)
        query_grad, gate_grads = torch.zeros_like(query), []
        masked = None if invalid is None else invalid[clips]
        for index, feature in enumerate(features):
            gate = gates.values[clips, index, None, None]
            value, key, state, sums = _state(feature[clips], masked, scale[clips])
            row_sum = query @ sums.mT + eps[clips]
            flow = matmul(grad[clips], state.mT, dtype)
            delta = (query * flow).sum(-1, keepdim=True) / row_sum
            factor = gate / row_sum
            query_grad.addcmul_(flow, factor).sub_((factor * delta) * sums)
            # A channel that no key has gives nothing; in half precision it would overflow.
            weighed = (query * factor).masked_fill(sums == 0, 0)
            # S is over scale, and so is its gradient times scale squared here.
            state_grad = matmul(weighed.mT, grad[clips], dtype)
            sums_grad = (weighed.mT @ delta).mT.neg_()
            gate_grads.append((delta + (upstream * feature[clips]).sum(-1, keepdim=True)).sum((1, 2)))
            value_grad = matmul(value, state_grad.mT, dtype).add_(sums_grad).mul_(value > 0)
            value_grad.add_(matmul(key, state_grad, dtype)).div_(scale[clips])
            # In the activations' type at once: in a wide one all layers' would outweigh the features.
            grad_features[index][clips] = value_grad.addcmul_(upstream, gate)
        weight_grad, anchor_share, feature_shares = gates.backward(torch.stack(gate_grads, -1), clips)
        grad_weight += weight_grad
        grad_anchor[clips] = query_grad.mul_(query > 0) + anchor_share
        for target, share in zip(grad_features, feature_shares, strict=True):
            target[clips].add_(share)
    return [grad_anchor, grad_weight.to(gate_weight.dtype), torch.zeros_like(gate_bias), *grad_features]
