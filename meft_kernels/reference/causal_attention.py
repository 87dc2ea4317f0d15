"""UniPT's interaction of all layers with the anchor where time runs one way: a decoder's tokens.

    R_i,tk = relu(A_t . F_i,k), k <= t;   M_i,t = sum_k R_i,tk / (sum_k R_i,tk + 1e-7) F_i,k + F_i,t
    c_i,t = w . (A_t * F_i,t) + b;   G_t = sum_i softmax_i(c_i,t) M_i,t

As ``relu_attention``, but that a token looks at none behind it, and that the confidence is each token's own:
a mean over time would hand on what is still to come. Tokens are few: plain PyTorch on every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import ATTENTION_EPS, accumulation_dtype


def definition(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    features: Sequence[Tensor],
    keys: Sequence[Tensor] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """What it means, in the type of ``anchor``, accumulated in fp32 or float64.

    Args:
        anchor: (B, U, r). gate_weight: (1, r). gate_bias: (1,). features: at least one tensor (B, U, r).
        keys: for each feature (B, K, r) of all tokens so far, its own last; None: its own alone.
        valid: (B, K), true for tokens that may be looked at; None: all.

    Returns:
        (B, U, r).
    """
    wide = accumulation_dtype(anchor.dtype)
    keys = features if keys is None else keys
    tokens, seen = anchor.shape[1], keys[0].shape[1]
    reach = torch.arange(seen - tokens, seen, device=anchor.device)
    hidden = (torch.arange(seen, device=anchor.device) > reach[:, None])[None]
    if valid is not None:
        hidden = hidden | ~valid[:, None, :]
    query, weight, bias = (tensor.to(wide) for tensor in (anchor, gate_weight, gate_bias))
    merged, confidence = [], []
    for feature, key in zip(features, keys, strict=True):
        feature, key = feature.to(wide), key.to(wide)
        scores = torch.relu(query @ key.transpose(1, 2)).masked_fill(hidden, 0)
        merged.append((scores / (scores.sum(-1, keepdim=True) + ATTENTION_EPS)) @ key + feature)
        confidence.append((query * feature * weight).sum(-1) + bias)
    shares = torch.stack(confidence).softmax(0)
    return (shares[..., None] * torch.stack(merged)).sum(0).to(anchor.dtype)
