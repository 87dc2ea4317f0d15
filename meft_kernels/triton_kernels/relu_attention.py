"""UniPT's ReLU attention in Triton; see ``reference.relu_attention`` for the maths.

Forward, one program holds a block of queries and walks through all layers and their keys, which are loaded
once and are the values too; scores live in registers. Backward, one kernel over blocks of queries gives dA
and two numbers per query and layer (delta and C_l / R), a second one over blocks of keys gives dF from them;
in between lies the softmax over layers, a few numbers per clip. Nothing is kept from the forward.

The layers are walked through at run time, so that their features have to lie in one slab (n, B, T, r):
``torch.stack`` copies them, twice their bytes over the memory bus in each direction (0.26 ms at 3.35 TB/s for
12 layers of 128 clips of 1500 frames of 96 half-precision columns; the products of the forward alone need
1.3 ms). With autograd (``ops.autograd``) that slab is what is kept, and nothing is copied again. Blocks of
keys beyond a clip's length are not visited; where tiles come through descriptors, which know no clip's end,
lengths cost a second copy of the slab with padding zeroed.

Keys that are means of POOL frames are made first, a slab of their own, POOL times smaller. Scores are weighed
by m / POOL for a key of m frames. A frame's gradient is its key's without that weight, over POOL: the kernel
of the keys hands it on to all frames of each.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference import relu_attention as reference
from ..reference import stand_in
from ..reference.common import ATTENTION_EPS, softmax_bwd
from ..tune.row import TORCH_TYPES, Row, once_per_row
from .blocks import (
    accumulate,
    add,
    cast,
    chunks,
    contract,
    keep_rows,
    load_parameter,
    load_rows,
    multiply,
    pair_constants,
    relu,
    scale,
    store_rows,
    store_sums,
    zero_rows,
)
from .host import (
    ACTIVATION,
    aligned,
    ceil_div,
    compile_arguments,
    launch,
    on_device,
    pointer_types,
    row_for,
    stacked,
)

FP32_WIDTH = 192  # widest rows of the kernels in fp32
SUM_PROGRAMS = 36  # of the sums over a clip's frames: 3 waves for 10 clips, with a multiprocessor each

# A clip's rows are R columns wide, in tiles of SIZES columns (see ``blocks``). Programs count blocks of a
# clip's rows first, so that its features stay in the L2 cache.


@triton.jit
def _block(
    first,  # descriptors of (clips, rows, R) with tiles (1, COUNT, SIZES[0]) and, if there are two SIZES,
    second,  # (1, COUNT, SIZES[1]); or None
    ptr,  # where there is none, the clip's rows
    clip,
    start,
    rows,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    COUNT: tl.constexpr,
):
    """COUNT rows of a clip, zero beyond the last. Descriptors spare the registers of pointers and masks."""
    if first is None:
        return load_rows(ptr, start + tl.arange(0, COUNT), rows, R, SIZES)
    else:
        x = (first.load([clip, start, 0]).reshape([COUNT, SIZES[0]]),)
        if second is not None:
            x += (second.load([clip, start, SIZES[0]]).reshape([COUNT, SIZES[1]]),)
        return x


@triton.jit(do_not_specialize=["batch", "frames", "size"])
def relu_attention_sum_kernel(
    features_ptr,  # (layers, batch, frames, R)
    factor_ptr,  # (batch, frames, R) or None
    lengths_ptr,  # (batch,) int32, 0 ... frames; None: all frames
    sums_ptr,  # (parts, layers, batch, R) fp32
    batch,
    frames,
    size,  # frames of a part, a multiple of BLOCK_M
    R: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # sums over frames, of F_l or F_l * factor, in an order that the other clips have no part in
    pair = tl.program_id(0).to(tl.int64)  # layer and clip
    part = tl.program_id(1)
    clip = pair % batch
    rows = frames
    if lengths_ptr is not None:
        rows = tl.load(lengths_ptr + clip)
    sums = zero_rows(BLOCK_M, SIZES)
    for start in tl.range(part * size, tl.minimum(rows, (part + 1) * size), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        f = cast(load_rows(features_ptr + pair * frames * R, row, rows, R, SIZES), tl.float32)
        if factor_ptr is not None:
            factor = load_rows(factor_ptr + clip * frames * R, row, rows, R, SIZES)
            f = multiply(f, cast(factor, tl.float32))
        sums = add(sums, f)
    pairs = tl.num_programs(0).to(tl.int64)
    store_sums(sums_ptr + (part * pairs + pair) * R, sums, R, SIZES)


@triton.jit(do_not_specialize=["batch", "frames", "groups"])
def relu_attention_pool_kernel(
    features_ptr,  # (layers, batch, frames, R)
    lengths_ptr,  # (batch,) int32, 0 ... frames
    keys_ptr,  # (layers, batch, groups, R)
    batch,
    frames,
    groups,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,  # keys
):
    # means over the valid frames of each group, zero where there is none
    pair = tl.program_id(0).to(tl.int64)  # layer and clip
    valid = tl.load(lengths_ptr + pair % batch)
    key = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums = zero_rows(BLOCK_M, SIZES)
    for index in tl.range(0, POOL):
        f = load_rows(features_ptr + pair * frames * R, key * POOL + index, valid, R, SIZES)
        sums = add(sums, cast(f, tl.float32))
    members = tl.minimum(tl.maximum(valid - key * POOL, 1), POOL).to(tl.float32)
    store_rows(keys_ptr + pair * groups * R, key, groups, scale((1.0 / members)[:, None], sums), R, SIZES)


@triton.jit
def _weights(key, valid, POOL: tl.constexpr):
    """m / POOL of keys, m the valid frames of each."""
    return tl.minimum(tl.maximum(valid - key * POOL, 0), POOL).to(tl.float32) / POOL


@triton.jit(do_not_specialize=["layers", "batch", "frames", "groups"])
def relu_attention_fwd_kernel(
    anchor_ptr,  # (batch, frames, R)
    features_ptr,  # (layers, batch, frames, R)
    keys_ptr,  # (layers, batch, groups, R): those, or their means over POOL frames
    keys0,  # descriptors of (layers * batch, groups, R): keys, zero beyond each clip's length; or None
    keys1,
    gates_ptr,  # (batch, layers) fp32
    lengths_ptr,  # (batch,) int32, 0 ... frames
    out_ptr,  # (batch, frames, R)
    layers,
    batch,
    frames,
    groups,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    EPS: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
):
    # out = sum_l C_l (relu(A K_l^T) K_l / R_l + F_l)
    tiles = tl.cdiv(frames, BLOCK_M)
    clip = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = tl.load(lengths_ptr + clip)
    keys = tl.cdiv(valid, POOL)
    start_of_clip = clip.to(tl.int64) * frames * R
    q = load_rows(anchor_ptr + start_of_clip, row, frames, R, SIZES)
    out = zero_rows(BLOCK_M, SIZES)
    feature_ptr = features_ptr + start_of_clip
    key_ptr = keys_ptr + clip.to(tl.int64) * groups * R
    pair = clip
    for layer in tl.range(0, layers):
        y = zero_rows(BLOCK_M, SIZES)
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, keys, BLOCK_N):
            f = _block(keys0, keys1, key_ptr, pair, start, keys, R, SIZES, BLOCK_N)
            p = relu(contract(q, f))
            if POOL > 1:
                p *= _weights(start + tl.arange(0, BLOCK_N), valid, POOL)[None, :]
            total += tl.sum(p, 1)
            y = accumulate(p.to(f[0].dtype), f, y)
        gate = tl.load(gates_ptr + clip * layers + layer)
        attended = scale((gate / (total + EPS / POOL))[:, None], y)
        f = cast(load_rows(feature_ptr, row, frames, R, SIZES), tl.float32)
        out = add(out, add(attended, scale(gate, f)))
        feature_ptr += batch.to(tl.int64) * frames * R
        key_ptr += batch.to(tl.int64) * groups * R
        pair += batch
    store_rows(out_ptr + start_of_clip, row, frames, out, R, SIZES)


@triton.jit(do_not_specialize=["boost", "layers", "batch", "frames", "groups"])
def relu_attention_bwd_anchor_kernel(
    grad_ptr,  # (batch, frames, R)
    anchor_ptr,  # (batch, frames, R)
    keys_ptr,  # (layers, batch, groups, R)
    keys0,  # descriptors as above, or None
    keys1,
    gates_ptr,  # (batch, layers) fp32
    lengths_ptr,  # (batch,) int32
    grad_anchor_ptr,  # (batch, frames, R) fp32, without the gates' share
    delta_ptr,  # (layers, batch, frames) fp32: delta
    scale_ptr,  # (layers, batch, frames) fp32: boost * POOL * C_l / R_l
    boost,  # a power of two, see reference.relu_attention.boost
    layers,
    batch,
    frames,
    groups,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    EPS: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
):
    # dA = sum_l (k m 1[S > 0] * (E - delta)) K_l,  k = C_l / R_l,  E = dM K_l^T,
    # delta = rowsum(m relu(S) * E) / R_l;
    # delta comes from a sweep of its own: E - delta cancels and must be rounded after the difference.
    # Where E hardly varies over the keys that count, as where there is but one, delta's own rounding would
    # be much of that. So delta is centre + rest: E's mean over the last tile that outweighed those before it,
    # and the mean of E - centre. What is added to the row sum is a key like the others, with E = 0.
    tiles = tl.cdiv(frames, BLOCK_M)
    clip = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = tl.load(lengths_ptr + clip)
    keys = tl.cdiv(valid, POOL)
    start_of_clip = clip.to(tl.int64) * frames * R
    q = load_rows(anchor_ptr + start_of_clip, row, frames, R, SIZES)
    g = load_rows(grad_ptr + start_of_clip, row, frames, R, SIZES)
    out = zero_rows(BLOCK_M, SIZES)
    key_ptr = keys_ptr + clip.to(tl.int64) * groups * R
    statistic = clip.to(tl.int64) * frames + row
    pair = clip
    for layer in tl.range(0, layers):
        total = tl.zeros([BLOCK_M], tl.float32) + EPS / POOL
        centre = tl.zeros([BLOCK_M], tl.float32)
        rest = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, keys, BLOCK_N):
            f = _block(keys0, keys1, key_ptr, pair, start, keys, R, SIZES, BLOCK_N)
            p = relu(contract(q, f))
            if POOL > 1:
                p *= _weights(start + tl.arange(0, BLOCK_N), valid, POOL)[None, :]
            e = contract(g, f)
            weight = tl.sum(p, 1)
            if tl.max(weight - total, 0) > 0:
                outweighs = weight > total
                mean = tl.where(outweighs, tl.sum(p * e, 1), centre) / tl.where(outweighs, weight, 1.0)
                rest += total * (centre - mean)
                centre = mean
            rest += tl.sum(p * (e - centre[:, None]), 1)
            total += weight
        rest /= total
        k = boost * tl.load(gates_ptr + clip * layers + layer) / total
        tl.store(delta_ptr + statistic, centre + rest, mask=row < frames)
        tl.store(scale_ptr + statistic, k, mask=row < frames)
        rest *= -k
        for start in tl.range(0, keys, BLOCK_N):
            f = _block(keys0, keys1, key_ptr, pair, start, keys, R, SIZES, BLOCK_N)
            s = contract(q, f)
            e = contract(g, f)
            x = tl.where(s > 0, tl.fma(k[:, None], e - centre[:, None], rest[:, None]), 0.0)
            if POOL > 1:
                x *= _weights(start + tl.arange(0, BLOCK_N), valid, POOL)[None, :]
            out = accumulate(x.to(f[0].dtype), f, out)
        key_ptr += batch.to(tl.int64) * groups * R
        pair += batch
        statistic += batch.to(tl.int64) * frames
    out = scale(tl.div_rn(1.0, boost), out)
    store_rows(grad_anchor_ptr + start_of_clip, row, frames, out, R, SIZES)


@triton.jit
def _store_frames(y, frame, gate, share, valid, grad_ptr, grad_features_ptr, frames, R, SIZES):
    """Gradients of frames: y and share where they are valid, and C_l dM."""
    g = cast(load_rows(grad_ptr, frame, frames, R, SIZES), tl.float32)
    y = add(keep_rows(frame < valid, y), scale(gate, g))
    store_rows(grad_features_ptr, frame, frames, add(y, keep_rows(frame < valid, share)), R, SIZES)


@triton.jit(do_not_specialize=["boost", "layers", "batch", "frames", "groups"])
def relu_attention_bwd_features_kernel(
    grad_ptr,  # (batch, frames, R)
    anchor_ptr,  # (batch, frames, R)
    keys_ptr,  # (layers, batch, groups, R)
    queries0,  # descriptors of (batch, frames, R): anchor; or None
    queries1,
    grads0,  # likewise: grad
    grads1,
    gates_ptr,  # (batch, layers) fp32
    lengths_ptr,  # (batch,) int32
    delta_ptr,  # (layers, batch, frames) fp32
    scale_ptr,  # (layers, batch, frames) fp32: boost * POOL * C_l / R_l
    boost,
    share_ptr,  # (batch, layers, R) fp32: what the gates give to each valid frame
    grad_features_ptr,  # (layers, batch, frames, R)
    layers,
    batch,
    frames,
    groups,
    R: tl.constexpr,
    SIZES: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys
):
    # dF_l = (k 1[S > 0] * (E - delta))^T A + (k relu(S))^T dM + C_l dM + share,  k = C_l / R_l
    # Scores are transposed, keys by queries, so that the products take them from registers.
    tiles = tl.cdiv(groups, BLOCK_N)
    pair = tl.program_id(0) // tiles  # layer and clip
    layer = pair // batch
    clip = pair % batch
    first = tl.program_id(0) % tiles * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    valid = tl.load(lengths_ptr + clip)
    keys = tl.cdiv(valid, POOL)
    start_of_clip = clip.to(tl.int64) * frames * R
    start_of_pair = pair.to(tl.int64) * frames
    f = load_rows(keys_ptr + pair.to(tl.int64) * groups * R, key, keys, R, SIZES)
    y = zero_rows(BLOCK_N, SIZES)
    queries = tl.where(first < keys, frames, 0)  # a block beyond the clip's length gets no attention
    for start in tl.range(0, queries, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q = _block(queries0, queries1, anchor_ptr + start_of_clip, clip, start, frames, R, SIZES, BLOCK_M)
        g = _block(grads0, grads1, grad_ptr + start_of_clip, clip, start, frames, R, SIZES, BLOCK_M)
        delta = tl.load(delta_ptr + start_of_pair + row, mask=row < frames, other=0.0)[None, :]
        k = tl.load(scale_ptr + start_of_pair + row, mask=row < frames, other=0.0)[None, :]
        s = contract(f, q)
        e = contract(f, g)
        x = tl.where(s > 0, k * (e - delta), 0.0)
        y = accumulate(x.to(q[0].dtype), q, y)
        p = k * relu(s)
        y = accumulate(p.to(g[0].dtype), g, y)
    y = scale(tl.div_rn(1.0, boost * POOL), y)
    gate = tl.load(gates_ptr + clip * layers + layer)
    share = load_parameter(share_ptr + (clip.to(tl.int64) * layers + layer) * R, R, SIZES)
    g_ptr = grad_ptr + start_of_clip
    target_ptr = grad_features_ptr + start_of_pair * R
    if POOL == 1:
        _store_frames(y, key, gate, share, valid, g_ptr, target_ptr, frames, R, SIZES)
    else:
        for index in tl.range(0, POOL):
            frame = key * POOL + index
            _store_frames(y, frame, gate, share, valid, g_ptr, target_ptr, frames, R, SIZES)


def _row(kernel: str, x: Tensor) -> Row | None:
    """The row for a kernel, or None where the reference has to serve."""
    row = row_for(f"relu_attention_{kernel}", x, x.shape[-1])
    return None if row is None else _for_type(row, x.dtype, x.shape[-1])


@once_per_row
def _for_type(row: Row, dtype: torch.dtype, width: int) -> Row | None:
    """fp32 has no matrix instructions and twice the bytes: larger tiles than 16 x 16 spill kilobytes, and
    wide rows are better off with the vendor library."""
    if dtype != torch.float32:
        return row
    small = replace(row, blocks=dict.fromkeys(row.blocks, 16), num_stages=1, descriptors=False)
    return small if width <= FP32_WIDTH else None


@once_per_row
def _constants(row: Row, width: int) -> dict:
    constants = pair_constants(row, width)
    divides = row.kernel in ("relu_attention_fwd", "relu_attention_bwd_anchor")
    return {**constants, "EPS": ATTENTION_EPS} if divides else constants


def _uses_descriptors(row: Row, width: int, dtype: torch.dtype) -> bool:
    """Whether a row asks for the copy engine, and rows of x start at multiples of 16 bytes, as it wants."""
    return row.descriptors and width * dtype.itemsize % 16 == 0


def _descriptors(x: Tensor, row: Row, size: int) -> tuple:
    """Descriptors of (clips, rows, R) in tiles of ``size`` rows by one or two widths; (None, None) where
    the kernel has to load through pointers."""
    width = x.shape[-1]
    if not _uses_descriptors(row, width, x.dtype) or stand_in.active():
        return None, None
    found = [TensorDescriptor.from_tensor(x, [1, size, columns]) for columns in chunks(width)]
    return found[0], found[1] if len(found) > 1 else None


def _keys(slab: Tensor, lengths: Tensor | None, row: Row) -> tuple:
    """Descriptors of the keys. The copy engine knows the slab's end and no clip's, so that with lengths it
    reads a copy with padding zeroed."""
    layers, batch, frames, width = slab.shape
    if lengths is not None and _uses_descriptors(row, width, slab.dtype):
        padding = torch.arange(frames, device=slab.device) >= lengths[:, None]
        slab = slab.masked_fill(padding[..., None], 0)
    return _descriptors(slab.view(layers * batch, frames, width), row, row.blocks["BLOCK_N"])


def _pooled(slab: Tensor, counts: Tensor, pool: int, row: Row) -> Tensor:
    """The keys (n, B, K, r) of features (n, B, T, r): those themselves, or their means over ``pool`` frames,
    zero beyond a clip's end. ``row``: that of the sums."""
    if pool == 1:
        return slab
    layers, batch, frames, width = slab.shape
    groups = ceil_div(frames, pool)
    keys = slab.new_empty(layers, batch, groups, width)
    grid = (layers * batch, ceil_div(groups, row.blocks["BLOCK_M"]))
    options = {**_constants(row, width), **row.options, "POOL": pool}
    launch(relu_attention_pool_kernel, grid, slab, counts, keys, batch, frames, groups, **options)
    return keys


def _sums(slab: Tensor, factor: Tensor | None, counts: Tensor | None, row: Row) -> Tensor:
    """Sums over frames of slab or slab * factor, (n, B, T, r) and (B, T, r) -> (n, B, r) fp32.

    Frames are cut into parts by their number and the layers', never by the clips', whose sums would then
    depend on each other. Partial sums take 4 SUM_PROGRAMS r bytes a clip, written and read.
    """
    layers, batch, frames, width = slab.shape
    blocks = ceil_div(frames, row.blocks["BLOCK_M"])
    steps = ceil_div(blocks, ceil_div(SUM_PROGRAMS, layers))
    parts = ceil_div(blocks, steps)
    sums = torch.empty(parts, layers, batch, width, dtype=torch.float32, device=slab.device)
    launch(
        relu_attention_sum_kernel,
        (layers * batch, parts),
        slab,
        factor,
        counts,
        sums,
        batch,
        frames,
        steps * row.blocks["BLOCK_M"],
        **_constants(row, width),
        **row.options,
    )
    return sums[0] if parts == 1 else sums.sum(0)


def _prepare(
    anchor: Tensor, weight: Tensor, lengths: Tensor | None, slab: Tensor, row: Row
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Valid frames (B,) int32, what divides their sums (B,), softmax gates (B, n), and the means (B, r) and
    (B, n, r) behind them. The bias of the confidences shifts them all and does not count."""
    batch, frames, _ = anchor.shape
    if lengths is None:
        lengths = torch.full((batch,), frames, dtype=torch.int32, device=anchor.device)
    counts = lengths.clamp(0, frames).to(torch.int32)
    divisor = lengths.clamp(min=1).float()
    anchor_mean = _sums(anchor[None], None, counts, row)[0] / divisor[:, None]
    feature_means = _sums(slab, None, counts, row).transpose(0, 1) / divisor[:, None, None]
    # A matrix product would round by the number of clips.
    confidences = (anchor_mean[:, None] * feature_means * weight.float()).sum(-1)
    return counts, divisor, torch.softmax(confidences, -1), anchor_mean, feature_means


def forward(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    features: list[Tensor],
    pool: int = 1,
) -> Tensor:
    """anchor and each feature (B, T, r), gate (1, r) and (1,), lengths (B,) or None -> (B, T, r)."""
    batch, frames, width = anchor.shape
    sum_row = _row("sum", anchor)
    row = _row("fwd", anchor)
    if sum_row is None or row is None:
        return reference.forward(anchor, gate_weight, gate_bias, lengths, features, pool)
    anchor = aligned(anchor, width).view(anchor.shape)
    out = torch.empty_like(anchor)
    if out.numel():
        slab = stacked(features)
        with on_device(anchor):
            counts, _, gates, _, _ = _prepare(anchor, gate_weight, lengths, slab, sum_row)
            keys = _pooled(slab, counts, pool, sum_row)
            launch(
                relu_attention_fwd_kernel,
                (batch * ceil_div(frames, row.blocks["BLOCK_M"]),),
                anchor,
                slab,
                keys,
                *_keys(keys, lengths if pool == 1 else None, row),
                gates,
                counts,
                out,
                len(features),
                batch,
                frames,
                keys.shape[2],
                POOL=pool,
                **_constants(row, width),
                **row.options,
            )
    return out


def backward(
    grad: Tensor,
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    features: list[Tensor],
    pool: int = 1,
) -> list[Tensor]:
    """Gradients of anchor, gate_weight, gate_bias (zero) and of each feature (slices of one slab)."""
    rows = _backward_rows(anchor)
    if rows is None:
        return reference.backward(grad, anchor, gate_weight, gate_bias, lengths, features, pool)
    slab = stacked(features)
    grad_slab = torch.empty_like(slab)
    others = _gradients(rows, grad, anchor, gate_weight, gate_bias, lengths, slab, grad_slab, pool)
    return [*others, *grad_slab.unbind(0)]


def backward_in_place(
    grad: Tensor,
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    slab: Tensor,
    pool: int = 1,
) -> list[Tensor]:
    """As ``reference.relu_attention.backward_in_place``."""
    rows = _backward_rows(anchor)
    if rows is None or not slab.is_contiguous():
        return reference.backward_in_place(grad, anchor, gate_weight, gate_bias, lengths, slab, pool)
    return _gradients(rows, grad, anchor, gate_weight, gate_bias, lengths, slab, slab, pool)


def _backward_rows(anchor: Tensor) -> tuple[Row, Row, Row] | None:
    """The rows of the three kernels of a backward, or None where the reference has to serve."""
    rows = tuple(_row(kernel, anchor) for kernel in ("sum", "bwd_anchor", "bwd_features"))
    return None if None in rows or not anchor.numel() else rows


def _gradients(
    rows: tuple[Row, Row, Row],
    grad: Tensor,
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    lengths: Tensor | None,
    slab: Tensor,
    grad_slab: Tensor,
    pool: int,
) -> list[Tensor]:
    """Fills grad_slab (n, B, T, r), which may be the slab of the features: of those the last kernel reads
    what it writes. Returns the gradients of anchor, gate_weight and gate_bias."""
    sum_row, anchor_row, features_row = rows
    batch, frames, width = anchor.shape
    layers = slab.shape[0]
    grad, anchor = (aligned(x, width).view(anchor.shape) for x in (grad, anchor))
    grad_anchor = torch.empty(anchor.shape, dtype=torch.float32, device=anchor.device)
    groups = ceil_div(frames, pool)
    sizes, boost = (layers, batch, frames, groups), reference.boost(groups)
    # Two allocations: a slice would start at 16 bytes or not, and each case compiles a kernel of its own.
    delta, scale = (torch.empty(sizes[:3], dtype=torch.float32, device=anchor.device) for _ in range(2))
    with on_device(anchor):
        counts, divisor, gates, anchor_mean, feature_means = _prepare(
            anchor, gate_weight, lengths, slab, sum_row
        )
        keys = _pooled(slab, counts, pool, sum_row)
        inputs, gated = (grad, anchor, keys), (gates, counts)
        launch(
            relu_attention_bwd_anchor_kernel,
            (batch * ceil_div(frames, anchor_row.blocks["BLOCK_M"]),),
            *inputs,
            *_keys(keys, lengths if pool == 1 else None, anchor_row),
            *gated,
            grad_anchor,
            delta,
            scale,
            boost,
            *sizes,
            POOL=pool,
            **_constants(anchor_row, width),
            **anchor_row.options,
        )
        gate_grads = (delta.sum(-1) + _sums(slab, grad, None, sum_row).sum(-1)).T  # (B, n)
        confidence_grads = softmax_bwd(gate_grads, gates)
        weight = gate_weight.float().squeeze(0)
        per_frame = (confidence_grads / divisor[:, None])[..., None]  # a mean gives each frame an equal share
        shares = per_frame * (weight * anchor_mean)[:, None]
        tiles = ceil_div(groups, features_row.blocks["BLOCK_N"])
        launch(
            relu_attention_bwd_features_kernel,
            (layers * batch * tiles,),
            *inputs,
            *_descriptors(anchor, features_row, features_row.blocks["BLOCK_M"]),
            *_descriptors(grad, features_row, features_row.blocks["BLOCK_M"]),
            *gated,
            delta,
            scale,
            boost,
            shares,
            grad_slab,
            *sizes,
            POOL=pool,
            **_constants(features_row, width),
            **features_row.options,
        )
    anchor_share = (per_frame * feature_means).sum(1) * weight
    valid = torch.arange(frames, device=anchor.device) < counts[:, None]
    grad_anchor.addcmul_(valid[..., None].float(), anchor_share[:, None])
    grad_weight = (confidence_grads[..., None] * anchor_mean[:, None] * feature_means).sum((0, 1))
    return [
        grad_anchor.to(anchor.dtype),
        grad_weight[None].to(gate_weight.dtype),
        torch.zeros_like(gate_bias),
    ]


# Types of the kernels' arguments. A name in _TILES is two descriptors or none, of tiles with so many rows.
_SIZES = dict.fromkeys(("layers", "batch", "frames", "groups"), "i32")
_GATED = {"gates_ptr": "*fp32", "lengths_ptr": "*i32"}
_INPUTS = dict.fromkeys(("grad_ptr", "anchor_ptr", "keys_ptr"), ACTIVATION)
_STATISTICS = {"delta_ptr": "*fp32", "scale_ptr": "*fp32", "boost": "fp32"}
_TYPES = {
    relu_attention_sum_kernel: {
        **{"features_ptr": ACTIVATION, "lengths_ptr": "*i32", "sums_ptr": "*fp32"},
        **dict.fromkeys(("batch", "frames", "size"), "i32"),
    },
    relu_attention_fwd_kernel: {
        **dict.fromkeys(("anchor_ptr", "features_ptr", "keys_ptr", "out_ptr"), ACTIVATION),
        **_GATED,
        **_SIZES,
    },
    relu_attention_bwd_anchor_kernel: {
        **_INPUTS,
        **_GATED,
        **_STATISTICS,
        "grad_anchor_ptr": "*fp32",
        **_SIZES,
    },
    relu_attention_bwd_features_kernel: {
        **{**_INPUTS, **_GATED, **_STATISTICS, **_SIZES},
        **{"share_ptr": "*fp32", "grad_features_ptr": ACTIVATION},
    },
}
_TILES = {
    relu_attention_sum_kernel: {},
    relu_attention_fwd_kernel: {"keys": "BLOCK_N"},
    relu_attention_bwd_anchor_kernel: {"keys": "BLOCK_N"},
    relu_attention_bwd_features_kernel: {"queries": "BLOCK_M", "grads": "BLOCK_M"},
}


_POOL_TYPES = {
    **dict.fromkeys(("features_ptr", "keys_ptr"), ACTIVATION),
    "lengths_ptr": "*i32",
    **dict.fromkeys(("batch", "frames", "groups"), "i32"),
}


def static_launches(row: Row, dtype: str, width: int, pool: int = 1) -> Iterator[tuple]:
    """The row's kernel: function, signature, constexprs and attributes, as ``triton.compile`` takes them; of
    ``pool`` above 1 with it the one that makes the keys, which has the row of the sums."""
    row = _for_type(row, TORCH_TYPES[dtype], width)
    if row is None:
        return
    function = next(kernel for kernel in _TYPES if kernel.__name__ == f"{row.kernel}_kernel")
    constants = dict(_constants(row, width))
    types = pointer_types(_TYPES[function], dtype)
    if function is relu_attention_sum_kernel:
        if pool > 1:
            given = pointer_types(_POOL_TYPES, dtype)
            yield compile_arguments(relu_attention_pool_kernel, given, {**constants, "POOL": pool})
        constants["factor_ptr"] = None
    else:
        constants["POOL"] = pool
    for name, rows in _TILES[function].items():
        constants |= {f"{name}0": None, f"{name}1": None}
        for index, columns in enumerate(chunks(width)):
            if _uses_descriptors(row, width, TORCH_TYPES[dtype]):
                del constants[f"{name}{index}"]
                types[f"{name}{index}"] = f"tensordesc<{dtype}[1, {row.blocks[rows]}, {columns}]>"
    yield compile_arguments(function, types, constants)
