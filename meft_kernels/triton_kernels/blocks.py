"""Device code that the row-wise kernels share: tiles of rows, LayerNorm, and the adapter's hidden chunks.

A row of R columns lives in registers as two tiles, R0 columns and then R1 (0: one tile), each a power of
two: 96 columns padded to 128 would cost a third more registers, products and reads. The functions named
``*_pair`` work on both tiles; with R1 = 0 the second repeats the first and never counts, so that the compiler
drops it. Rows and columns outside the matrix read as zero.
"""

import triton
import triton.language as tl

from ..tune.row import Row


def chunks(width: int) -> tuple[int, int]:
    """The powers of two (R0, R1) that hold a row of ``width`` columns, each at least 16, as dots need."""
    whole = max(16, 1 << (width.bit_length() - 1))
    rest = width - whole
    if rest <= 0:
        return whole, 0
    tail = max(16, triton.next_power_of_2(rest))
    return (2 * whole, 0) if tail >= whole else (whole, tail)


def pair_constants(row: Row, width: int) -> dict:
    """The constexpr arguments of a kernel on rows of ``width`` columns."""
    whole, tail = chunks(width)
    return {"R": width, "R0": whole, "R1": tail, **row.blocks}


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # unlike tl.maximum on a GPU this keeps NaN


@triton.jit
def _place(row, rows, R: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    """Offsets of a tile in a (rows, R) matrix, and which of it lie inside: without padding, by rows alone."""
    column = START + tl.arange(0, SIZE)
    inside = (row < rows)[:, None]
    if START + SIZE > R:
        inside = inside & (column < R)[None, :]
    return row[:, None] * R + column[None, :], inside


@triton.jit
def load_tile(
    ptr, row, rows, R: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, AGAIN: tl.constexpr = False
):
    offset, inside = _place(row, rows, R, START, SIZE)
    return tl.load(ptr + offset, mask=inside, other=0.0, eviction_policy="evict_first" if AGAIN else "")


@triton.jit
def load_pair(
    ptr, row, rows, R: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, AGAIN: tl.constexpr = False
):
    """Rows of a (rows, R) matrix. A second load with another AGAIN is not merged with the first, so that the
    tile need not stay in registers in between."""
    x0 = load_tile(ptr, row, rows, R, 0, R0, AGAIN)
    x1 = x0
    if R1 > 0:
        x1 = load_tile(ptr, row, rows, R, R0, R1, AGAIN)
    return x0, x1


@triton.jit
def store_tile(ptr, row, rows, x, R: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    offset, inside = _place(row, rows, R, START, SIZE)
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_pair(ptr, row, rows, x0, x1, R: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    store_tile(ptr, row, rows, x0, R, 0, R0)
    if R1 > 0:
        store_tile(ptr, row, rows, x1, R, R0, R1)


@triton.jit
def load_vector(ptr, R: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr):
    column = START + tl.arange(0, SIZE)
    return tl.load(ptr + column, mask=column < R, other=0.0).to(tl.float32)[None, :]


@triton.jit
def vector_pair(ptr, R: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    """A parameter (R,) as fp32, (1, R0) and (1, R1)."""
    x0 = load_vector(ptr, R, 0, R0)
    x1 = x0
    if R1 > 0:
        x1 = load_vector(ptr, R, R0, R1)
    return x0, x1


@triton.jit
def store_sums(ptr, x0, x1, R: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    """Sums over the tile's rows to (R,) fp32 at ptr."""
    column = tl.arange(0, R0)
    tl.store(ptr + column, tl.sum(x0, 0), mask=column < R)
    if R1 > 0:
        column = R0 + tl.arange(0, R1)
        tl.store(ptr + column, tl.sum(x1, 0), mask=column < R)


@triton.jit
def mean_of_rows(x0, x1, R: tl.constexpr, R1: tl.constexpr):
    total = tl.sum(x0, 1)
    if R1 > 0:
        total += tl.sum(x1, 1)
    return (total / R)[:, None]


@triton.jit
def standardize_pair(x0, x1, R: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm without its affine part, and the reciprocal standard deviation (rows, 1)."""
    mean = mean_of_rows(x0, x1, R, R1)
    # Masked lanes would hold -mean and count in the variance.
    n0 = tl.where((tl.arange(0, R0) < R)[None, :], x0 - mean, 0.0)
    n1 = n0
    if R1 > 0:
        n1 = tl.where((R0 + tl.arange(0, R1) < R)[None, :], x1 - mean, 0.0)
    rstd = tl.rsqrt(mean_of_rows(n0 * n0, n1 * n1, R, R1) + EPS)
    return n0 * rstd, n1 * rstd, rstd


@triton.jit
def standardize_pair_bwd(g0, g1, n0, n1, rstd, R: tl.constexpr, R1: tl.constexpr):
    """rstd * (g - mean(g) - n * mean(g * n)); columns beyond R hold rubbish."""
    mean_grad = mean_of_rows(g0, g1, R, R1)
    mean_product = mean_of_rows(g0 * n0, g1 * n1, R, R1)
    return rstd * (g0 - mean_grad - n0 * mean_product), rstd * (g1 - mean_grad - n1 * mean_product)


@triton.jit
def affine_pair(n0, n1, weight_ptr, bias_ptr, R: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    """LayerNorm's weight * n + bias; zero beyond R."""
    w0, w1 = vector_pair(weight_ptr, R, R0, R1)
    b0, b1 = vector_pair(bias_ptr, R, R0, R1)
    return n0 * w0 + b0, n1 * w1 + b1


@triton.jit
def gelu_with_slope(x):
    """x Phi(x) and Phi(x) + x phi(x)."""
    probability = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * probability, probability + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def load_weights(ptr, start, SIZE: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr):
    """SIZE rows of a packed weight (HIDDEN, R0 + R1), which is zero outside the real one."""
    row = start + tl.arange(0, SIZE)[:, None]
    w0 = tl.load(ptr + row * (R0 + R1) + tl.arange(0, R0)[None, :])
    w1 = w0
    if R1 > 0:
        w1 = tl.load(ptr + row * (R0 + R1) + (R0 + tl.arange(0, R1))[None, :])
    return w0, w1


@triton.jit
def adapter_pair(
    m0,  # (BM, R0) in the type of the weights, as m1
    m1,
    weight_1_ptr,  # (HIDDEN, R0 + R1)
    bias_1_ptr,  # (HIDDEN,)
    weight_2_ptr,  # (HIDDEN, R0 + R1), transposed
    BM: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    HIDDEN: tl.constexpr,
    BH: tl.constexpr,
):
    """gelu(m W1^T + b1) W2^T in fp32, a chunk of BH hidden columns at a time."""
    y0 = tl.zeros([BM, R0], tl.float32)
    y1 = tl.zeros([BM, R1 if R1 > 0 else R0], tl.float32)
    for start in tl.range(0, HIDDEN, BH):
        w0, w1 = load_weights(weight_1_ptr, start, BH, R0, R1)
        v0, v1 = load_weights(weight_2_ptr, start, BH, R0, R1)
        p = tl.dot(m0, w0.T, input_precision="ieee")
        if R1 > 0:
            p = tl.dot(m1, w1.T, p, input_precision="ieee")
        p += tl.load(bias_1_ptr + start + tl.arange(0, BH)).to(tl.float32)[None, :]
        a, _ = gelu_with_slope(p)
        a = a.to(weight_2_ptr.dtype.element_ty)
        y0 = tl.dot(a, v0, y0, input_precision="ieee")
        if R1 > 0:
            y1 = tl.dot(a, v1, y1, input_precision="ieee")
    return y0, y1


@triton.jit
def adapter_pair_bwd(
    g0,  # (BM, R0) upstream gradient in the type of the weights, as g1
    g1,
    m0,
    m1,
    weight_1_ptr,  # as in adapter_pair
    bias_1_ptr,
    weight_2_ptr,
    BM: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    HIDDEN: tl.constexpr,
    BH: tl.constexpr,
):
    """dm = ((g W2) * gelu'(m W1^T + b1)) W1 in fp32."""
    d0 = tl.zeros([BM, R0], tl.float32)
    d1 = tl.zeros([BM, R1 if R1 > 0 else R0], tl.float32)
    for start in tl.range(0, HIDDEN, BH):
        w0, w1 = load_weights(weight_1_ptr, start, BH, R0, R1)
        v0, v1 = load_weights(weight_2_ptr, start, BH, R0, R1)
        p = tl.dot(m0, w0.T, input_precision="ieee")
        da = tl.dot(g0, v0.T, input_precision="ieee")
        if R1 > 0:
            p = tl.dot(m1, w1.T, p, input_precision="ieee")
            da = tl.dot(g1, v1.T, da, input_precision="ieee")
        p += tl.load(bias_1_ptr + start + tl.arange(0, BH)).to(tl.float32)[None, :]
        _, slope = gelu_with_slope(p)
        dp = (da * slope).to(weight_1_ptr.dtype.element_ty)
        d0 = tl.dot(dp, w0, d0, input_precision="ieee")
        if R1 > 0:
            d1 = tl.dot(dp, w1, d1, input_precision="ieee")
    return d0, d1
