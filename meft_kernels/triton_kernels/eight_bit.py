"""8-bit copies of hidden states; see ``reference.eight_bit`` for the maths.

x is read twice: for each channel's sum and extremes, as partial results of groups of rows that torch adds up,
and for the code. fp32 copies of x are never written. Both kinds of codes are bytes to the kernels. The
conversion from and to e4m3 works on the bits of fp32 and fp16, the same on every architecture: Triton has no
e4m3 below sm_89.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import eight_bit as reference
from ..tune.row import Row
from .blocks import load_statistic, load_tile, store_tile
from .host import (
    ACTIVATION,
    aligned,
    ceil_div,
    compile_arguments,
    flat,
    launch,
    on_device,
    pointer_types,
    row_for,
)

# Programs work through STEPS tiles of BLOCK_M rows, one tile of BLOCK_N columns wide. They count column tiles
# first, so that programs that run side by side read whole rows.


@triton.jit
def to_e4m3(x):
    """The codes of fp32 values, as uint32: rounded to nearest even, saturated at 448; NaN stays NaN."""
    size = tl.minimum(tl.abs(x), 448.0)
    # The power of two at or below the size, 2^-6 at least: below that the steps shrink no further.
    power = tl.maximum(size, 2.0**-6).to(tl.uint32, bitcast=True) & 0x7F800000
    # At 2^20 times that, the last bit of fp32 is worth a step, 1/8 of the power: the sum is rounded to steps.
    anchor = (power + (20 << 23)).to(tl.float32, bitcast=True)
    steps = (size + anchor).to(tl.uint32, bitcast=True) & 31
    # The exponent's bias is 127 in fp32 and 7 in e4m3, and 8 steps are the leading one, which is not stored.
    code = (power >> 20) + steps - (120 * 8 + 8)
    code = tl.where(x != x, 127, code)
    return code | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)


@triton.jit
def from_e4m3(code):
    """The fp32 values of codes in uint8. e4m3 is fp16 with one bit of exponent less: 2^8 times too small."""
    code = code.to(tl.uint16)
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def to_root(x):
    """The signed square roots of fp32 values, rounded to integers up to 127, of which a byte keeps the lowest
    bits; NaN is 0."""
    root = tl.sqrt(tl.minimum(tl.abs(tl.where(x != x, 0.0, x)), 127.0 * 127.0))
    size = (root + 0.5).to(tl.int32)
    return tl.where(x < 0, -size, size)


@triton.jit
def from_root(code):
    """The squares of codes in uint8, with their signs, in fp32."""
    root = code.to(tl.int8, bitcast=True).to(tl.float32)
    return root * tl.abs(root)


@triton.jit
def normed_tile(x_ptr, mean_ptr, rstd_ptr, row, rows, column, D: tl.constexpr):
    """n = (x - mean) * rstd in fp32; 0 in rows outside the matrix."""
    x = load_tile(x_ptr, row, rows, column, D).to(tl.float32)
    return (x - load_statistic(mean_ptr, row, rows)) * load_statistic(rstd_ptr, row, rows)


@triton.jit(do_not_specialize=["rows"])
def eight_bit_channels_kernel(
    x_ptr,  # (rows, D)
    mean_ptr,  # (rows,) fp32
    rstd_ptr,  # (rows,) fp32
    part_ptr,  # (groups of rows, 3, D) fp32
    rows,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
):
    # parts: sum n, max n, max -n
    tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    group = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    high = tl.full([BLOCK_M, BLOCK_N], -float("inf"), tl.float32)
    low = tl.full([BLOCK_M, BLOCK_N], float("inf"), tl.float32)
    for step in tl.range(0, STEPS):
        row = (group * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = normed_tile(x_ptr, mean_ptr, rstd_ptr, row, rows, column, D)
        total += n
        # A maximum may drop a NaN; the sum keeps it.
        high = tl.maximum(high, tl.where((row < rows)[:, None], n, -float("inf")))
        low = tl.minimum(low, tl.where((row < rows)[:, None], n, float("inf")))
    part = part_ptr + group * 3 * D + column
    tl.store(part, tl.sum(total, 0), mask=column < D)
    tl.store(part + D, tl.max(high, 0), mask=column < D)
    tl.store(part + 2 * D, tl.max(-low, 0), mask=column < D)


@triton.jit(do_not_specialize=["rows"])
def eight_bit_encode_kernel(
    x_ptr,  # (rows, D)
    mean_ptr,  # (rows,) fp32
    rstd_ptr,  # (rows,) fp32
    total_ptr,  # (D,) fp32: sum n
    extreme_ptr,  # (2, D) fp32: max n, max -n
    code_ptr,  # (rows, D) uint8
    scale_ptr,  # (D,) fp32
    shift_ptr,  # (D,) fp32
    rows,
    D: tl.constexpr,
    LARGEST: tl.constexpr,
    ROOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
):
    # shift = sum n / rows;  scale = max |n - shift| / LARGEST;  code = c((n - shift) / scale)
    tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    group = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    within = column < D
    shift = tl.load(total_ptr + column, mask=within, other=0.0) / rows
    high = tl.load(extreme_ptr + column, mask=within, other=0.0)
    minus_low = tl.load(extreme_ptr + D + column, mask=within, other=0.0)
    scale = tl.maximum(high - shift, minus_low + shift) / LARGEST
    # A channel that never changes, or by less than a scale with a finite reciprocal can tell.
    scale = tl.where(scale < 2.0**-126, 1.0, scale)
    inverse = 1.0 / scale
    writes = column < tl.where(group == 0, D, 0)  # the first group's programs
    tl.store(scale_ptr + column, scale, mask=writes)
    tl.store(shift_ptr + column, shift, mask=writes)
    for step in tl.range(0, STEPS):
        row = (group * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = normed_tile(x_ptr, mean_ptr, rstd_ptr, row, rows, column, D)
        exact = (n - shift[None, :]) * inverse[None, :]
        code = to_root(exact) if ROOTS else to_e4m3(exact)
        store_tile(code_ptr, row, rows, column, code, D)


@triton.jit(do_not_specialize=["rows"])
def eight_bit_decode_kernel(
    code_ptr,  # (rows, D) uint8
    scale_ptr,  # (D,) fp32
    shift_ptr,  # (D,) fp32
    mean_ptr,  # (rows,) fp32, only read if OF_X
    rstd_ptr,  # (rows,) fp32, only read if OF_X
    out_ptr,  # (rows, D)
    rows,
    D: tl.constexpr,
    ROOTS: tl.constexpr,
    OF_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
):
    # n = v(code) * scale + shift;  x = n / rstd + mean
    tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    group = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + column, mask=column < D, other=0.0)[None, :]
    shift = tl.load(shift_ptr + column, mask=column < D, other=0.0)[None, :]
    for step in tl.range(0, STEPS):
        row = (group * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        code = load_tile(code_ptr, row, rows, column, D)
        out = (from_root(code) if ROOTS else from_e4m3(code)) * scale + shift
        if OF_X:
            std = 1.0 / load_statistic(rstd_ptr, row, rows)
            out = out * std + load_statistic(mean_ptr, row, rows)
        store_tile(out_ptr, row, rows, column, out, D)


def _grid(row: Row, rows: int, width: int) -> tuple[int, int]:
    """Groups of rows, and programs in all."""
    groups = ceil_div(rows, row.blocks["BLOCK_M"] * row.blocks["STEPS"])
    return groups, groups * ceil_div(width, row.blocks["BLOCK_N"])


def _are_fp32(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


def encode(x: Tensor, mean: Tensor, rstd: Tensor, kind: str = "fp8") -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.eight_bit.encode``: x (..., D) and its row statistics (...) -> code (..., D), scale and
    shift (D,)."""
    width = x.shape[-1]
    first, second = (row_for(f"eight_bit_{kernel}", x, width) for kernel in ("channels", "encode"))
    if first is None or second is None or x.numel() == 0 or not _are_fp32(mean, rstd):
        return reference.encode(x, mean, rstd, kind)
    rows = aligned(x, width)
    mean, rstd = flat(mean, rstd)
    groups, programs = _grid(first, rows.shape[0], width)
    parts = torch.empty(groups, 3, width, dtype=torch.float32, device=x.device)
    code = torch.empty(rows.shape, dtype=torch.uint8, device=x.device)
    scale, shift = (torch.empty(width, dtype=torch.float32, device=x.device) for _ in range(2))
    given = rows, mean, rstd
    with on_device(x):
        launch(
            eight_bit_channels_kernel,
            (programs,),
            *given,
            parts,
            rows.shape[0],
            D=width,
            **first.blocks_and_options,
        )
        channels = parts[:, 0].sum(0), parts[:, 1:].amax(0)
        launch(
            eight_bit_encode_kernel,
            (_grid(second, rows.shape[0], width)[1],),
            *given,
            *channels,
            code,
            scale,
            shift,
            rows.shape[0],
            D=width,
            LARGEST=reference.LARGEST[kind],
            ROOTS=kind == "int8",
            **second.blocks_and_options,
        )
    return code.view(reference.CODE_DTYPES[kind]).view(x.shape), scale, shift


def decode(
    code: Tensor,
    scale: Tensor,
    shift: Tensor,
    like: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> Tensor:
    """As ``reference.eight_bit.decode``: (..., D) in the type of ``like``."""
    width = code.shape[-1]
    row = row_for("eight_bit_decode", like, width)
    if row is None or code.numel() == 0 or not _are_fp32(scale, shift, mean, rstd):
        return reference.decode(code, scale, shift, like, mean, rstd)
    rows = aligned(code, width).view(torch.uint8)
    out = torch.empty(rows.shape, dtype=like.dtype, device=code.device)
    statistics = (scale, scale)  # any pointers of the type, when they are not read
    if mean is not None:
        statistics = flat(mean, rstd)
    with on_device(code):
        launch(
            eight_bit_decode_kernel,
            (_grid(row, rows.shape[0], width)[1],),
            rows,
            scale.contiguous(),
            shift.contiguous(),
            *statistics,
            out,
            rows.shape[0],
            D=width,
            ROOTS=code.dtype == torch.int8,
            OF_X=mean is not None,
            **row.blocks_and_options,
        )
    return out.view(code.shape)


_STATISTICS = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
_CODES = {"code_ptr": "*u8", "scale_ptr": "*fp32", "shift_ptr": "*fp32"}
_TYPES = {
    eight_bit_channels_kernel: {"x_ptr": ACTIVATION, **_STATISTICS, "part_ptr": "*fp32", "rows": "i32"},
    eight_bit_encode_kernel: {
        **{"x_ptr": ACTIVATION, **_STATISTICS, "total_ptr": "*fp32", "extreme_ptr": "*fp32"},
        **{**_CODES, "rows": "i32"},
    },
    eight_bit_decode_kernel: {**_CODES, **_STATISTICS, "out_ptr": ACTIVATION, "rows": "i32"},
}


def static_launches(row: Row, dtype: str, width: int) -> Iterator[tuple]:
    """The row's kernel as ``triton.compile`` takes it, for rows ``width`` wide, of each kind of codes; the
    decoding one of x."""
    function = next(kernel for kernel in _TYPES if kernel.__name__ == f"{row.kernel}_kernel")
    for kind in [None] if function is eight_bit_channels_kernel else reference.CODE_DTYPES:
        flags = {} if kind is None else {"ROOTS": kind == "int8"}
        if function is eight_bit_encode_kernel:
            flags["LARGEST"] = reference.LARGEST[kind]
        elif function is eight_bit_decode_kernel:
            flags["OF_X"] = True
        constants = {"D": width, **flags, **row.blocks}
        yield compile_arguments(function, pointer_types(_TYPES[function], dtype), constants)
