"""Device code that the kernels share: tiles of matrices, rows as tuples of tiles, LayerNorm, and the
adapter's hidden chunks.

A tile is a part of a matrix in registers. Kernels that need whole rows of R columns hold them as a tuple of
one or two tiles, whose widths SIZES are powers of two: 96 columns padded to 128 would cost a third more
registers, products and reads than 64 and 32. ``x`` and ``y`` below are such tuples, and what is done to them
is done tile by tile when the kernel is compiled. Rows and columns outside the matrix read as zero.
"""

import triton
import triton.language as tl

from ..tune.row import Row, once_per_row


def chunks(width: int) -> tuple[int, ...]:
    """The one or two powers of two that hold a row of ``width`` columns, each at least 16, as dots need."""
    whole = max(16, 1 << (width.bit_length() - 1))
    rest = width - whole
    if rest <= 0:
        return (whole,)
    tail = max(16, triton.next_power_of_2(rest))
    return (2 * whole,) if tail >= whole else (whole, tail)


@once_per_row
def pair_constants(row: Row, width: int) -> dict:
    """The constexpr arguments of a kernel on rows of ``width`` columns: the row's block sizes, and the tiles,
    of which the row may ask for two halves in the place of one that is wider than "TILE"."""
    sizes, blocks = chunks(width), dict(row.blocks)
    if len(sizes) == 1 and sizes[0] > blocks.pop("TILE", sizes[0]):
        sizes = (sizes[0] // 2,) * 2
    return {"R": width, "SIZES": sizes, **blocks}


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # unlike tl.maximum on a GPU this keeps NaN


@triton.jit
def gelu_with_slope(x):
    """x Phi(x) and Phi(x) + x phi(x)."""
    probability = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * probability, probability + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


# --- tiles --------------------------------------------------------------------------------------------------


@triton.jit
def _inside(row, rows, column, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Which entries of a tile lie inside a (rows, WIDTH) matrix: by rows alone if WHOLE."""
    inside = (row < rows)[:, None]
    if not WHOLE:
        inside = inside & (column < WIDTH)[None, :]
    return inside


@triton.jit
def _place(ptr, row, column, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """The addresses of a tile of a (rows, WIDTH) matrix; STRIDE: entries from row to row, 0 for WIDTH."""
    return ptr + row[:, None] * (STRIDE if STRIDE > 0 else WIDTH) + column[None, :]  # columns need no 64 bits


@triton.jit
def load_tile(
    ptr,
    row,
    rows,
    column,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr = False,
    AGAIN: tl.constexpr = False,
    STRIDE: tl.constexpr = 0,
):
    """The tile of a (rows, WIDTH) matrix at ``row`` and ``column``, two vectors.

    row: 64 bits wide where offsets may pass 2^31. WHOLE: all columns lie inside. A second load with another
    AGAIN is not merged with the first, so that the tile need not stay in registers in between."""
    place = _place(ptr, row, column, WIDTH, STRIDE)
    inside = _inside(row, rows, column, WIDTH, WHOLE)
    return tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first" if AGAIN else "")


@triton.jit
def store_tile(
    ptr, row, rows, column, x, WIDTH: tl.constexpr, WHOLE: tl.constexpr = False, STRIDE: tl.constexpr = 0
):
    """x to its tile, see ``load_tile``, in the type of the matrix."""
    place = _place(ptr, row, column, WIDTH, STRIDE)
    tl.store(place, x.to(ptr.dtype.element_ty), mask=_inside(row, rows, column, WIDTH, WHOLE))


@triton.jit
def load_vector(ptr, column, WIDTH: tl.constexpr):
    """Entries of a vector (WIDTH,) as fp32, zero outside."""
    return tl.load(ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def load_statistic(ptr, row, rows):
    """An fp32 number of each row, as a column."""
    return tl.load(ptr + row, mask=row < rows, other=0.0)[:, None]


# --- rows as tuples of tiles --------------------------------------------------------------------------------


@triton.jit
def _columns(SIZES: tl.constexpr, INDEX: tl.constexpr):
    return INDEX * SIZES[0] + tl.arange(0, SIZES[INDEX])


@triton.jit
def load_rows(ptr, row, rows, R: tl.constexpr, SIZES: tl.constexpr, AGAIN: tl.constexpr = False):
    """Rows of a (rows, R) matrix."""
    x = ()
    for i in tl.static_range(len(SIZES)):
        x += (load_tile(ptr, row, rows, _columns(SIZES, i), R, i * SIZES[0] + SIZES[i] <= R, AGAIN),)
    return x


@triton.jit
def store_rows(ptr, row, rows, x, R: tl.constexpr, SIZES: tl.constexpr):
    for i in tl.static_range(len(SIZES)):
        store_tile(ptr, row, rows, _columns(SIZES, i), x[i], R, i * SIZES[0] + SIZES[i] <= R)


@triton.jit
def load_parameter(ptr, R: tl.constexpr, SIZES: tl.constexpr):
    """A parameter (R,) as a row of fp32."""
    x = ()
    for i in tl.static_range(len(SIZES)):
        x += (load_vector(ptr, _columns(SIZES, i), R)[None, :],)
    return x


@triton.jit
def store_sums(ptr, x, R: tl.constexpr, SIZES: tl.constexpr):
    """Sums over rows to (R,) fp32 at ptr."""
    for i in tl.static_range(len(SIZES)):
        column = _columns(SIZES, i)
        tl.store(ptr + column, tl.sum(x[i], 0), mask=column < R)


@triton.jit
def zero_tile(COUNT: tl.constexpr, SIZE: tl.constexpr):
    return tl.zeros([COUNT, SIZE], tl.float32)


@triton.jit
def zero_rows(COUNT: tl.constexpr, SIZES: tl.constexpr):
    """fp32 zeros."""
    x = ()
    for i in tl.static_range(len(SIZES)):
        x += (zero_tile(COUNT, SIZES[i]),)
    return x


@triton.jit
def cast(x, TYPE: tl.constexpr):
    y = ()
    for i in tl.static_range(len(x)):
        y += (x[i].to(TYPE),)
    return y


@triton.jit
def add(x, y):
    z = ()
    for i in tl.static_range(len(x)):
        z += (x[i] + y[i],)
    return z


@triton.jit
def subtract(x, y):
    z = ()
    for i in tl.static_range(len(x)):
        z += (x[i] - y[i],)
    return z


@triton.jit
def multiply(x, y):
    z = ()
    for i in tl.static_range(len(x)):
        z += (x[i] * y[i],)
    return z


@triton.jit
def scale(factor, x):
    """By a number, or by one for each row."""
    y = ()
    for i in tl.static_range(len(x)):
        y += (factor * x[i],)
    return y


@triton.jit
def keep_rows(inside, x):
    """x, one row or many, in rows that are inside; zero in others."""
    y = ()
    for i in tl.static_range(len(x)):
        y += (tl.where(inside[:, None], x[i], 0.0),)
    return y


@triton.jit
def contract(x, y):
    """x y^T in fp32."""
    z = tl.dot(x[0], y[0].T, input_precision="ieee")
    for i in tl.static_range(1, len(x)):
        z = tl.dot(x[i], y[i].T, z, input_precision="ieee")
    return z


@triton.jit
def accumulate(a, x, total):
    """total + a x in fp32, for a tile a."""
    y = ()
    for i in tl.static_range(len(x)):
        y += (tl.dot(a, x[i], total[i], input_precision="ieee"),)
    return y


# --- LayerNorm and adapter ----------------------------------------------------------------------------------


@triton.jit
def mean_of_rows(x, R: tl.constexpr):
    total = tl.sum(x[0], 1)
    for i in tl.static_range(1, len(x)):
        total += tl.sum(x[i], 1)
    return (total / R)[:, None]


@triton.jit
def standardize(x, R: tl.constexpr, SIZES: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm without its affine part, and the reciprocal standard deviation (rows, 1)."""
    mean = mean_of_rows(x, R)
    n = ()
    for i in tl.static_range(len(x)):
        # Masked lanes would hold -mean and count in the variance.
        n += (tl.where((_columns(SIZES, i) < R)[None, :], x[i] - mean, 0.0),)
    rstd = tl.rsqrt(mean_of_rows(multiply(n, n), R) + EPS)
    return scale(rstd, n), rstd


@triton.jit
def standardize_bwd(g, n, rstd, R: tl.constexpr):
    """rstd * (g - mean(g) - n * mean(g * n)); columns beyond R hold rubbish."""
    mean_grad = mean_of_rows(g, R)
    mean_product = mean_of_rows(multiply(g, n), R)
    d = ()
    for i in tl.static_range(len(g)):
        d += (rstd * (g[i] - mean_grad - n[i] * mean_product),)
    return d


@triton.jit
def affine(n, weight_ptr, bias_ptr, R: tl.constexpr, SIZES: tl.constexpr):
    """LayerNorm's n * weight + bias; zero beyond R."""
    return add(multiply(n, load_parameter(weight_ptr, R, SIZES)), load_parameter(bias_ptr, R, SIZES))


@triton.jit
def packed_width(SIZES: tl.constexpr):
    return SIZES[0] + (SIZES[1] if len(SIZES) > 1 else 0)


@triton.jit
def load_weights(ptr, start, COUNT: tl.constexpr, SIZES: tl.constexpr):
    """COUNT rows of a packed weight (HIDDEN, sum(SIZES)), which is zero outside the real one."""
    row = start + tl.arange(0, COUNT)[:, None]
    x = ()
    for i in tl.static_range(len(SIZES)):
        x += (tl.load(ptr + row * packed_width(SIZES) + _columns(SIZES, i)[None, :]),)
    return x


@triton.jit
def store_weights(ptr, start, x, COUNT: tl.constexpr, SIZES: tl.constexpr):
    """COUNT rows of a packed gradient, in fp32."""
    row = start + tl.arange(0, COUNT)[:, None]
    for i in tl.static_range(len(SIZES)):
        tl.store(ptr + row * packed_width(SIZES) + _columns(SIZES, i)[None, :], x[i])


@triton.jit
def mlp(
    m,  # (BM, R) in the type of the weights
    weight_1_ptr,  # (HIDDEN, sum(SIZES))
    bias_1_ptr,  # (HIDDEN,)
    weight_2_ptr,  # (HIDDEN, sum(SIZES)), transposed
    BM: tl.constexpr,
    SIZES: tl.constexpr,
    HIDDEN: tl.constexpr,
    BH: tl.constexpr,
):
    """gelu(m W1^T + b1) W2^T in fp32, a chunk of BH hidden columns at a time."""
    y = zero_rows(BM, SIZES)
    for start in tl.range(0, HIDDEN, BH):
        weight_1 = load_weights(weight_1_ptr, start, BH, SIZES)
        weight_2 = load_weights(weight_2_ptr, start, BH, SIZES)
        p = contract(m, weight_1)
        p += tl.load(bias_1_ptr + start + tl.arange(0, BH)).to(tl.float32)[None, :]
        a, _ = gelu_with_slope(p)
        y = accumulate(a.to(weight_2_ptr.dtype.element_ty), weight_2, y)
    return y


@triton.jit
def mlp_bwd(
    g,  # (BM, R) upstream gradient in the type of the weights
    m,
    weight_1_ptr,  # as in mlp
    bias_1_ptr,
    weight_2_ptr,
    BM: tl.constexpr,
    SIZES: tl.constexpr,
    HIDDEN: tl.constexpr,
    BH: tl.constexpr,
):
    """dm = ((g W2) * gelu'(m W1^T + b1)) W1 in fp32."""
    d = zero_rows(BM, SIZES)
    for start in tl.range(0, HIDDEN, BH):
        weight_1 = load_weights(weight_1_ptr, start, BH, SIZES)
        weight_2 = load_weights(weight_2_ptr, start, BH, SIZES)
        p = contract(m, weight_1)
        da = contract(g, weight_2)
        p += tl.load(bias_1_ptr + start + tl.arange(0, BH)).to(tl.float32)[None, :]
        _, slope = gelu_with_slope(p)
        d = accumulate((da * slope).to(weight_1_ptr.dtype.element_ty), weight_1, d)
    return d
