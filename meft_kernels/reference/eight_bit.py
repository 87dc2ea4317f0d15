"""Hidden states kept for the backward in 8 bits: ``saved_activations="fp8"``.

    n = (x - mean) * rstd,   code = e4m3((n - shift) / scale);    n ~ code * scale + shift

mean and rstd are the row's, shift and scale the channel's: its mean over all rows, and its largest distance
from that over e4m3's largest value. Whisper's hidden states have channels that are large and almost constant;
without the shift those would spend the 3 bits of mantissa on the constant. What is left is an unbiased
rounding of about 2.6 % of each deviation, which averages out in a weight gradient, a sum over all frames. The
conversion is part of PyTorch on every device: no card or CPU needs 8-bit arithmetic for it.
"""

import torch
from torch import Tensor

from .common import accumulation_dtype, row_blocks

CODE_DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(CODE_DTYPE).max


def encode(x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., D) and its row statistics (...) -> code (..., D) in e4m3, scale and shift (D,)."""
    rows, mean, rstd = x.reshape(-1, x.shape[-1]), mean.reshape(-1, 1), rstd.reshape(-1, 1)
    width, wide = rows.shape[1], accumulation_dtype(x.dtype)
    blocks = list(row_blocks(rows.shape[0], width, x.device))

    def normed(block: slice) -> Tensor:
        return torch.sub(rows[block], mean[block]).mul_(rstd[block])  # in the type of mean

    total = torch.zeros(width, dtype=wide, device=x.device)
    low, high = torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf)
    for block in blocks:
        values = normed(block)
        total += values.sum(0)
        low, high = torch.minimum(low, values.amin(0)), torch.maximum(high, values.amax(0))
        del values
    shift = total / max(rows.shape[0], 1)
    scale = torch.maximum(high - shift, shift - low) / LARGEST
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a channel that never changes
    code = torch.empty(rows.shape, dtype=CODE_DTYPE, device=x.device)
    for block in blocks:
        code[block].copy_(normed(block).sub_(shift).div_(scale))
    return code.view(x.shape), scale, shift


def decode(
    code: Tensor,
    scale: Tensor,
    shift: Tensor,
    like: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> Tensor:
    """What ``encode`` was given, but for its rounding, in the type of ``like``, which is empty: the
    normalised rows, or with their statistics mean and rstd (...) the rows x themselves."""
    rows = code.reshape(-1, code.shape[-1])
    out = torch.empty(rows.shape, dtype=like.dtype, device=code.device)
    if mean is not None:
        mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    for block in row_blocks(rows.shape[0], rows.shape[1], code.device):
        values = rows[block].to(scale.dtype).mul_(scale).add_(shift)
        out[block] = values if mean is None else values.div_(rstd[block]).add_(mean[block])
        del values
    return out.view(code.shape)
