"""What is left of ``relu_attention`` where every frame attends to all alike: the control of studies of it.

    M_l = mean_t F_l + F_l;   out = sum_l C_l M_l,  C_l as in ``relu_attention``

It is a sum and two means: plain PyTorch on every device, of which autograd keeps the features alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import accumulation_dtype, frame_mask


def definition(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    features: Sequence[Tensor],
) -> Tensor:
    """What it means, in the type of ``anchor``, accumulated in fp32 or float64.

    Args:
        anchor: (B, T, r). gate_weight: (1, r). gate_bias: (1,). lengths: (B,) valid frames, or None for all.
        features: at least one tensor (B, T, r).

    Returns:
        (B, T, r).
    """
    wide, frames = accumulation_dtype(anchor.dtype), anchor.shape[1]
    count = frames if lengths is None else lengths.clamp(1, frames).to(wide)[:, None]

    def mean(x: Tensor) -> Tensor:
        if lengths is not None:
            x = x.masked_fill(~frame_mask(lengths, frames)[..., None], 0)
        return x.sum(1, dtype=wide) / count

    anchor_mean, means = mean(anchor), torch.stack([mean(feature) for feature in features], 1)
    # A softmax does not see a shift: the bias gets a gradient that is zero, and not rounding noise.
    confidences = (anchor_mean[:, None] * means * gate_weight.to(wide)).sum(-1) + 0 * gate_bias.to(wide)
    gates = torch.softmax(confidences, -1)
    out = (gates[..., None] * means).sum(1)[:, None]  # (B, 1, r)
    for index, feature in enumerate(features):
        out = out + feature * gates[:, index, None, None]
    return out.to(anchor.dtype)
