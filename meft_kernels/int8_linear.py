"""Linear layers that are held in int8, of inputs that are rounded to 8 bits as they come: PyTorch's,
or on the CPU the faster C++ kernel of ``csrc/int8_linear.cpp``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, ops
from .reference import stand_in

# Rows are rounded so many values at a time on the CPU, of the wider of input and output, so that they stay in
# the cache.
_BLOCK_ELEMENTS = 2**20

_CUDA_ROWS = 17  # the fewest that cuBLAS multiplies in int8

_IN_CPP = native.has("int8_linear")  # asked once: torch.compile cannot trace the question


def int8_linear(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    totals: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """What linear layers make of the same rows, which are rounded once for all of them. Without gradient.

    Inputs k are in groups g of neighbours, with a step and a zero point for each row's:

        code_k = round(x_k / step_g) + zero_g,   step_g = (max x_k - min x_k) / 254 over the group and 0
        y_n = sum_g step_g (scale_gn sum_k code_k codes_nk - zero_g total_gn) + bias_n

    Zero has a code of its own, so values that are nearly all zero do not move the sum. Sums over k are exact
    where torch's products of int8 matrices are. A row's outputs do not depend on other rows, but where
    rounding takes a code to the next.

    Args:
        x: (N, K) in float32, bfloat16 or float16. codes: (M, K) in int8, of each layer. scales: (G, M) in
            float32; G divides K. totals: (G, M) in float32, ``scale_gn sum_k codes_nk``. biases: (M,) or
            None.

    Returns:
        (N, M) in the type of ``x`` for each layer. NaN for rows that hold one or an infinity.
    """
    if _is_served(x):
        return native.kernel("int8_linear")(x, codes, scales, totals, biases)
    layers = list(zip(codes, scales, totals, biases, strict=True))
    groups = scales[0].shape[0]
    if torch.compiler.is_compiling() or stand_in.device_type(x.device) != "cpu":
        rounded = _rounded(x, groups)
        return [_of_codes(*rounded, *layer).to(x.dtype) for layer in layers]
    size = max(1, _BLOCK_ELEMENTS // max(x.shape[1], *(each.shape[0] for each in codes)))
    found = [x.new_empty(x.shape[0], each.shape[0]) for each in codes]
    for start in range(0, x.shape[0], size):
        rounded = _rounded(x[start : start + size], groups)
        for layer, target in zip(layers, found):
            target[start : start + size] = _of_codes(*rounded, *layer)
    return found


def _is_served(x: Tensor) -> bool:
    """Whether the C++ kernel takes the call; whoever counts memory sees what PyTorch would take."""
    if stand_in.standing() or not ops.uses_native() or not _IN_CPP:
        return False
    return stand_in.device_type(x.device) == "cpu" and native.serves((x,))


def _rounded(rows: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N, K) in int8, (N, G, K / G), and the step and the zero point of each group, (N, G, 1) in
    float32."""
    rows = rows.unflatten(1, (groups, -1))
    # Two passes: aminmax is slower than both.
    low, high = rows.amin(-1, keepdim=True).float(), rows.amax(-1, keepdim=True).float()
    low, high = low.clamp(max=0), high.clamp(min=0)
    # 254 and not 255 steps, so that both ends stay in range however they are rounded.
    step = ((high - low) / 254).clamp_min(torch.finfo(torch.float32).tiny)
    inverse = 1 / step
    zero = torch.round(low * -inverse)
    # Cutting a positive number off is rounding it half a step before; flipping the top bit takes 128 from it.
    codes = (rows * inverse).add_(zero + 0.5).to(torch.uint8).view(torch.int8).bitwise_xor_(-128)
    return codes, step, zero - 128


def _of_codes(
    codes: Tensor,
    step: Tensor,
    zero: Tensor,
    weight: Tensor,
    scale: Tensor,
    total: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """(N, M) in float32, of what ``_rounded`` gives and one layer."""
    y = None
    for group, columns in enumerate(weight.unflatten(1, (scale.shape[0], -1)).unbind(1)):
        sums = _product(codes[:, group], columns)
        # In place, or it would be the time of the product once more.
        sums.mul_(scale[group]).addcmul_(zero[:, group], total[group], value=-1)
        y = sums.mul_(step[:, group]) if y is None else y.addcmul_(sums, step[:, group])
    return y if bias is None else y.add_(bias)


def _product(rows: Tensor, columns: Tensor) -> Tensor:
    """(N, K) by (M, K), both int8, -> (N, M) in float32."""
    count = rows.shape[0]
    if stand_in.device_type(rows.device) == "cuda" and count < _CUDA_ROWS:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, _CUDA_ROWS - count))
    # Of strides (1, 1), which the transpose of one column has, torch's sums are wrong.
    columns = columns.t() if columns.shape[1] > 1 else columns.reshape(1, -1)
    return torch._int_mm(rows, columns)[:count].float()
