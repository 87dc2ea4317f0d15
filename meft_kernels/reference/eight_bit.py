"""Hidden states kept for the backward in 8 bits: ``saved_activations="int8"`` and ``"fp8"``.

    n = (x - mean) * rstd,   code = c((n - shift) / scale);    n ~ v(code) * scale + shift

    int8:  c(d) = sign(d) round(sqrt|d|),   v(c) = c |c|
    fp8:   c(d) = e4m3(d),                  v(c) = c

mean and rstd are the row's, shift and scale the channel's: its mean over all rows, and its largest distance
from that over the largest v, 127^2 or 448. Whisper's hidden states have channels that are large and almost
constant; without the shift those would spend the bits on the constant. What is left is an unbiased rounding,
which averages out in a weight gradient, a sum over all frames: with fp8 of about 2.6 % of each deviation.
e4m3 spends half of its bits on 18 powers of two; a channel needs far fewer. The squares of integers lie
closest around the shift, where most deviations are, and at 1.6 % of the largest deviation far from it: on
Whisper's hidden states the error is 0.7 % of the deviations, padded or not. Neither needs 8-bit arithmetic of
a card or CPU.
"""

import torch
from torch import Tensor

from .common import accumulation_dtype, row_blocks

CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0**2, "fp8": torch.finfo(torch.float8_e4m3fn).max}  # values of codes


def values(code: Tensor, dtype: torch.dtype) -> Tensor:
    """v(code), a new tensor of a floating-point ``dtype``."""
    wide = code.to(dtype)
    return wide.mul_(wide.abs()) if code.dtype == torch.int8 else wide


def encode(x: Tensor, mean: Tensor, rstd: Tensor, kind: str = "fp8") -> tuple[Tensor, Tensor, Tensor]:
    """x (..., D) and its row statistics (...) -> code (..., D) of ``CODE_DTYPES[kind]``, scale and shift
    (D,)."""
    rows, mean, rstd = x.reshape(-1, x.shape[-1]), mean.reshape(-1, 1), rstd.reshape(-1, 1)
    width, wide = rows.shape[1], accumulation_dtype(x.dtype)
    blocks = list(row_blocks(rows.shape[0], width, x.device))

    def normed(block: slice) -> Tensor:
        return torch.sub(rows[block], mean[block]).mul_(rstd[block])  # in the type of mean

    total = torch.zeros(width, dtype=wide, device=x.device)
    low, high = torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf)
    for block in blocks:
        part = normed(block)
        total += part.sum(0)
        low, high = torch.minimum(low, part.amin(0)), torch.maximum(high, part.amax(0))
        del part
    shift = total / max(rows.shape[0], 1)
    scale = torch.maximum(high - shift, shift - low) / LARGEST[kind]
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a channel that never changes
    code = torch.empty(rows.shape, dtype=CODE_DTYPES[kind], device=x.device)
    for block in blocks:
        exact = normed(block).sub_(shift).div_(scale)
        if kind == "int8":
            root = exact.abs().sqrt_().add_(0.5).floor_()
            exact = torch.copysign(root, exact, out=root)
        code[block].copy_(exact)
        del exact
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
        normed = values(rows[block], scale.dtype).mul_(scale).add_(shift)
        out[block] = normed if mean is None else normed.div_(rstd[block]).add_(mean[block])
        del normed
    return out.view(code.shape)
