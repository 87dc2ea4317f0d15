"""UniPT's parallel interaction: every layer's features seen through ReLU attention from the last layer's.

    R_l = relu(A K_l^T) * m   (no scaling, keys and values are both K_l)       l = 0..n-1
    M_l = (R_l / (rowsum(R_l) + 1e-7)) K_l + F_l
    C = softmax over l of  w . (mean_t A * mean_t F_l) + b;   out = sum_l C_l M_l

    A (B, T, r), n tensors F_l (B, T, r), w (1, r), b (1,) -> out (B, T, r)

As published ``pool`` is 1: the keys K_l are the features F_l, each of weight m = 1. Else a key is the mean of
``pool`` neighbouring frames, those from a multiple of ``pool`` on, and counts as often as it has frames: m is
``pool``, and what is left for the last. Where features are constant over each such group nothing changes.

With ``lengths`` the means, the scores and the row sums run over valid frames only. Scores exist for one block
of queries at a time, in both directions. Per query row, with M's gradient dM, k = C_l / R, and K for F where
they are pooled (X times m; a frame's gradient is its group's, dK, over m, and C_l dM):

    E = dM F^T;   delta = rowsum(relu(S) * E) / R;   X = k * 1[S > 0] * (E - delta)
    dA += X F;    dF = X^T A + (k relu(S))^T dM + C_l dM;    dC_l = sum delta + sum dM . F
    ds = C (dC - sum C dC);  dw = sum ds (mean A * mean F);  the means' share goes evenly to the valid frames

b has an identically zero gradient, since softmax does not see a shift. A row without a positive score attends
to nothing and passes no gradient. X and k relu(S) are multiplied by ``boost`` before they are rounded, or
they would underflow in fp16. Where E hardly varies over the keys that count, as where there is but one,
E - delta cancels; it is taken in two steps, of e = E - delta as it was rounded:

    E - delta = e - (rowsum(relu(S) * e) - 1e-7 delta) / R
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
    pool: int = 1,
) -> Tensor:
    """What the op means, with the (B, T, T / pool) scores written out."""
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
        if pool > 1:
            members = group_sizes(lengths, batch, frames, pool, anchor)
            value = _group_sums(value, pool) / members.clamp(min=1)[..., None]
            scores = torch.relu(query @ value.mT) * members[:, None]
        attention = scores / (scores.sum(-1, keepdim=True) + ATTENTION_EPS)
        merged.append(attention @ value + feature)
        means = masked_mean(query, valid) * masked_mean(feature, valid)
        confidences.append(means @ gate_weight.to(wide).squeeze(0) + gate_bias.to(wide))
    gates = torch.softmax(torch.stack(confidences, -1), -1)
    return torch.einsum("bl,lbtr->btr", gates, torch.stack(merged)).to(anchor.dtype)


def group_sizes(lengths: Tensor | None, batch: int, frames: int, pool: int, like: Tensor) -> Tensor:
    """m (B, K): how many valid frames each of the K = ceil(T / pool) groups has, in the accumulation type of
    ``like``."""
    starts = torch.arange(0, frames, pool, device=like.device)
    ends = torch.full((batch,), frames, device=like.device) if lengths is None else lengths.clamp(0, frames)
    return (ends[:, None] - starts).clamp(0, pool).to(accumulation_dtype(like.dtype))


def _group_sums(x: Tensor, pool: int) -> Tensor:
    """Sums over groups of ``pool`` frames, the last of which may have fewer: (B, T, r) -> (B, K, r)."""
    batch, frames, width = x.shape
    whole = frames - frames % pool
    sums = x[:, :whole].reshape(batch, whole // pool, pool, width).sum(2)
    return sums if whole == frames else torch.cat([sums, x[:, whole:].sum(1, keepdim=True)], 1)


class _Keys:
    """The keys of some clips, and the gradients of features from theirs.

    Args:
        lengths: (B,) or None. batch, frames: B and T. pool: frames of a key. like: for its type and device.
    """

    def __init__(self, lengths: Tensor | None, batch: int, frames: int, pool: int, like: Tensor):
        self._frames, self._pool = frames, pool
        self._valid = frame_weights(lengths, batch, frames, like) > 0
        self._wide = accumulation_dtype(like.dtype)
        self._sizes = None if pool == 1 else group_sizes(lengths, batch, frames, pool, like)
        self.count = -(-frames // pool)
        self.eps = ATTENTION_EPS / pool  # weights are m / pool, so that scores stay in half precision's range

    def of(self, feature: Tensor, clips: slice) -> Tensor:
        """Keys (b, K, r) of the clips' features (b, T, r), zero where no valid frame is: a zero key scores
        zero and so attends to nothing."""
        feature = feature.masked_fill(~self._valid[clips][..., None], 0)
        if self._sizes is None:
            return feature
        sums = _group_sums(feature.to(self._wide), self._pool)
        return sums / self._sizes[clips].clamp(min=1)[..., None]

    def weigh(self, scores: Tensor, clips: slice) -> Tensor:
        """Scores (b, rows, K), or what else has one entry for each key, times m / pool."""
        if self._sizes is None:
            return scores
        return scores * (self._sizes[clips] / self._pool)[:, None]

    def spread(self, key_grad: Tensor, clips: slice) -> Tensor:
        """The gradient (b, T, r) of features from that of their keys (b, K, r)."""
        if self._sizes is not None:
            key_grad = key_grad / self._sizes[clips].clamp(min=1)[..., None]
            key_grad = key_grad.repeat_interleave(self._pool, 1)[:, : self._frames]
        return key_grad.masked_fill(~self._valid[clips][..., None], 0)


class Gates:
    """The softmax over layers that weights them, and the way back through it.

    Args:
        anchor: (B, T, r). weight: (1, r). bias: (1,). valid: (B, T) of ``frame_weights``. features: n of
            (B, T, r).

    Attributes:
        values: (B, n).
    """

    def __init__(
        self, anchor: Tensor, weight: Tensor, bias: Tensor, valid: Tensor, features: list[Tensor]
    ) -> None:
        self._anchor_mean = masked_mean(anchor, valid)
        self._feature_means = torch.stack([masked_mean(feature, valid) for feature in features], 1)
        self._weight, self._valid = weight.to(valid.dtype).squeeze(0), valid
        confidences = (self._anchor_mean[:, None] * self._feature_means) @ self._weight
        self.values = torch.softmax(confidences + bias.to(valid.dtype), -1)

    def backward(self, grads: Tensor, clips: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
        """From the gates' gradients (b, n) of some clips those of the weight (r,), and the means' parts of
        the anchor's (b, T, r) and of each feature's."""
        anchor_mean, feature_means = self._anchor_mean[clips], self._feature_means[clips]
        confidence_grads = softmax_bwd(grads, self.values[clips])
        weight_grad = torch.einsum("bn,bnr->r", confidence_grads, anchor_mean[:, None] * feature_means)
        share = self._valid[clips, :, None]
        anchor_share = torch.einsum("bn,bnr->br", confidence_grads, feature_means) * self._weight
        feature_shares = confidence_grads[..., None] * (self._weight * anchor_mean)[:, None]
        return (
            weight_grad,
            share * anchor_share[:, None],
            [share * each[:, None] for each in feature_shares.unbind(1)],
        )


def forward(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    features: list[Tensor],
    pool: int = 1,
) -> Tensor:
    """anchor and each feature (B, T, r), gate (1, r) and (1,), lengths (B,) or None -> (B, T, r)."""
    batch, frames, _ = anchor.shape
    valid = frame_weights(lengths, batch, frames, anchor)
    gates = Gates(anchor, gate_weight, gate_bias, valid, features).values
    pooled = _Keys(lengths, batch, frames, pool, anchor)
    out = anchor.new_empty(anchor.shape)
    for clips in row_blocks(batch, frames * pooled.count, anchor.device):
        keys = [pooled.of(feature[clips], clips) for feature in features]
        for rows in row_blocks(frames, (clips.stop - clips.start) * pooled.count, anchor.device):
            query = anchor[clips, rows]
            total = None
            for index, (feature, key) in enumerate(zip(features, keys, strict=True)):
                scores = pooled.weigh(torch.relu(matmul(query, key.mT, anchor.dtype)), clips)
                row_sum = scores.sum(-1, keepdim=True) + pooled.eps
                attended = matmul(scores, key, anchor.dtype) / row_sum
                part = gates[clips, index, None, None] * (attended + feature[clips, rows])
                total = part if total is None else total + part
            out[clips, rows] = total
    return out


def boost(keys: int) -> float:
    """The power of two, at least the number of keys, that X and k relu(S) are multiplied by before they are
    rounded to the activations' type, and their fp32 products divided by. k is 1 / T of something near 1:
    times a gradient it falls where fp16 has few bits left or none. What overflows instead shows, and lowers
    the loss scale."""
    return float(1 << max(keys - 1, 0).bit_length())


def backward(
    grad: Tensor,
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    features: list[Tensor],
    pool: int = 1,
) -> list[Tensor]:
    """Gradients of anchor, gate_weight, gate_bias (zero) and of each feature."""
    dtype, wide = anchor.dtype, accumulation_dtype(anchor.dtype)
    batch, frames, _ = anchor.shape
    valid = frame_weights(lengths, batch, frames, anchor)
    gates = Gates(anchor, gate_weight, gate_bias, valid, features)
    pooled = _Keys(lengths, batch, frames, pool, anchor)
    grad_anchor = anchor.new_empty(anchor.shape)
    grad_features = [feature.new_empty(feature.shape) for feature in features]
    grad_weight = torch.zeros(gate_weight.shape, dtype=wide, device=anchor.device)
    raised = boost(pooled.count)
    for clips in row_blocks(batch, frames * pooled.count, anchor.device):
        upstream, query = grad[clips].to(wide), anchor[clips]
        gate_grads, query_grad, feature_grads = [], torch.zeros_like(upstream), []
        for index, feature in enumerate(features):
            key = pooled.of(feature[clips], clips)
            gate = gates.values[clips, index, None, None]
            key_grad = upstream.new_zeros(key.shape)
            gate_grad = (upstream * feature[clips]).sum((1, 2))
            for rows in row_blocks(frames, upstream.shape[0] * pooled.count, anchor.device):
                scores = pooled.weigh(torch.relu(matmul(query[:, rows], key.mT, dtype)), clips)
                row_sum = scores.sum(-1, keepdim=True) + pooled.eps
                score_grad = matmul(upstream[:, rows], key.mT, dtype)
                delta = (scores * score_grad).sum(-1, keepdim=True) / row_sum
                gate_grad += delta.sum((1, 2))
                score_grad -= delta
                score_grad -= ((scores * score_grad).sum(-1, keepdim=True) - pooled.eps * delta) / row_sum
                factor = raised * gate / row_sum
                flow = pooled.weigh(factor * score_grad * (scores > 0), clips)
                query_grad[:, rows] += matmul(flow, key, dtype)
                key_grad += matmul(flow.mT, query[:, rows], dtype)
                key_grad += matmul((scores * factor).mT, upstream[:, rows], dtype)
            gate_grads.append(gate_grad)
            feature_grads.append(pooled.spread(key_grad.div_(raised), clips) + gate * upstream)
        weight_grad, anchor_share, feature_shares = gates.backward(torch.stack(gate_grads, -1), clips)
        grad_weight += weight_grad
        grad_anchor[clips] = query_grad.div_(raised) + anchor_share
        for target, feature_grad, share in zip(grad_features, feature_grads, feature_shares, strict=True):
            target[clips] = feature_grad + share
    return [grad_anchor, grad_weight.to(gate_weight.dtype), torch.zeros_like(gate_bias), *grad_features]


def backward_in_place(
    grad: Tensor,
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    slab: Tensor,
    pool: int = 1,
) -> list[Tensor]:
    """As ``backward`` of the features in a slab (n, B, T, r), over which their gradients are written; returns
    the other three."""
    features = list(slab.unbind(0))
    computed = backward(grad, anchor, gate_weight, gate_bias, lengths, features, pool)
    for feature, feature_grad in zip(features, computed[3:], strict=True):
        feature.copy_(feature_grad)
    return computed[:3]
