"""Numerical pieces that every reference op shares: constants, precision rules, LayerNorm and GELU with their
derivatives. Symbols: N rows (tokens), D backbone width, r side width."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import stand_in

NORM_EPS = 1e-5  # added to the variance in every LayerNorm
GATE_TEMPERATURE = 0.1  # LST's sigmoid and SHERL's tanh gates divide their parameter by this
ATTENTION_EPS = 1e-7  # added to UniPT's row sums of ReLU scores
GUIDANCE_EPS = 1e-6  # added to SHERL's norms and to its sum of weights
GUIDANCE_SHORT = 1e-14  # a vector shorter than this is taken for zero by SHERL's guidance

# Rows are worked through in blocks of about this many elements, so that fp32 intermediates stay small: in
# cache on a CPU, a fraction of an activation on a GPU.
BLOCK_ELEMENTS = {"cpu": 2**19}
DEFAULT_BLOCK_ELEMENTS = 2**23


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precision and fp32, float64 for float64 (so that gradcheck is possible)."""
    return torch.promote_types(dtype, torch.float32)


def in_autocast(device: torch.device) -> bool:
    """Whether autocast is on for tensors of a device; meta, which computes nothing, knows none."""
    # torch 2.11 cannot trace torch.amp.is_autocast_available, and a step is compiled as one graph.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def row_blocks(rows: int, width: int, device: torch.device, every: bool = False) -> Iterator[slice]:
    """Slices that cover ``range(rows)``, each at most about ``BLOCK_ELEMENTS`` elements of rows ``width``
    wide and nearly as long as the others: an allocator then has the memory of one for the next. For counting
    some of them do, unless ``every`` one is needed."""
    elements = BLOCK_ELEMENTS.get(stand_in.device_type(device), DEFAULT_BLOCK_ELEMENTS)
    step = max(1, elements // max(1, width))
    step = max(1, -(-rows // max(1, -(-rows // step))))
    starts = range(0, rows, step)
    if stand_in.active() and len(starts) > 3 and not every:
        # The second runs beside what the first left behind; those between it and the last only repeat it.
        starts = (starts[0], starts[1], starts[-1])
    for start in starts:
        yield slice(start, min(start + step, rows))


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` for two matrices or two equal batches of them, in the accumulation type of ``dtype``.

    ``dtype`` is the activations' type. On CUDA half-precision products run on the tensor cores with the
    result left in fp32; elsewhere the operands are widened.
    """
    if stand_in.device_type(a.device) == "cuda" and dtype in (torch.float16, torch.bfloat16) and a.numel():
        multiply = torch.mm if a.ndim == 2 else torch.bmm
        return multiply(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    wide = accumulation_dtype(dtype)
    return a.to(wide) @ b.to(wide)


def _centre(x: Tensor) -> tuple[Tensor, Tensor]:
    # Not var_mean: on a CPU its Welford update costs several times these vectorised passes.
    mean = x.mean(-1, keepdim=True)
    return x - mean, mean


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation over the last axis, ``(..., D) -> (...), (...)``, in the
    accumulation type. The variance is biased and computed around the mean."""
    rows = x.reshape(-1, x.shape[-1])
    wide = accumulation_dtype(x.dtype)
    mean = torch.empty(rows.shape[0], dtype=wide, device=x.device)
    rstd = torch.empty_like(mean)
    for block in row_blocks(rows.shape[0], rows.shape[1], x.device):
        centred, block_mean = _centre(rows[block].to(wide))
        mean[block] = block_mean.squeeze(-1)
        rstd[block] = torch.rsqrt(centred.square().mean(-1) + NORM_EPS)
    return mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def standardize(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(x - mean) * rstd`` over the last axis and ``rstd`` (..., 1): LayerNorm without its affine part."""
    centred, _ = _centre(x)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
    return centred * rstd, rstd


def standardize_bwd(grad: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of ``standardize``: rstd * (g - mean(g) - n * mean(g * n))."""
    mean_grad = grad.mean(-1, keepdim=True)
    return rstd * (grad - mean_grad - normed * (grad * normed).mean(-1, keepdim=True))


def softmax_bwd(grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of softmax over the last axis from its result: w_i * (g_i - sum_j w_j g_j), as a sum of
    differences w_j (g_i - g_j), in which nothing cancels where one weight is nearly one."""
    differences = grad[..., :, None] - grad[..., None, :]
    return weights * (weights[..., None, :] * differences).sum(-1)


def gelu_bwd(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the exact GELU: g * (Phi(x) + x * phi(x)), in one pass."""
    return torch.ops.aten.gelu_backward(grad, x)


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """(B,) valid lengths to a boolean mask (B, T), true where a frame is valid."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def frame_weights(lengths: Tensor | None, batch: int, frames: int, like: Tensor) -> Tensor:
    """Weights (B, T) whose weighted sum over frames is the mean over each utterance's valid frames, in the
    accumulation type of ``like``. A length of zero gives all-zero weights."""
    dtype = accumulation_dtype(like.dtype)
    if lengths is None:
        return torch.full((batch, frames), 1 / max(frames, 1), dtype=dtype, device=like.device)
    return frame_mask(lengths, frames).to(dtype) / lengths.clamp(min=1).to(dtype)[:, None]


def masked_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over frames, (B, T, C) with weights (B, T) -> (B, C), in the type of ``weights``.

    Frames of weight zero do not count even when they hold NaN or infinity.
    """
    x = x.to(weights.dtype)
    return torch.einsum("bt,btc->bc", weights, x.masked_fill((weights == 0)[..., None], 0))
