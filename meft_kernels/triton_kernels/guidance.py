"""SHERL's redundancy-guided merge of the shallow layers in one pass over the frames; see
``reference.guidance`` for the maths.

A program takes one frame per warp and one slot per shallow layer. A first sweep over the width gathers
every sum over it: the Gram matrix of the layers, the logits and, backward, their products with the upstream
gradient. What remains is a (SLOTS, SLOTS) problem per frame in registers; a second sweep, whose reads hit the
cache, writes the width again. The features come as a tuple of pointers, so that nothing is stacked: a stack
would cost a copy of all of them and 2 * (K + 1) * N * r * 2 bytes of traffic in half precision, about as much
as the forward itself reads.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import guidance as reference
from ..reference.common import GUIDANCE_EPS, GUIDANCE_SHORT
from ..tune.row import TORCH_TYPES, Row, once_per_row
from .blocks import relu
from .host import POINTERS, aligned, ceil_div, compile_arguments, launch, on_device, row_for, split

RESIDENT = 4  # programs of the backward on a multiprocessor, at K = 10
MAX_SLOTS = 32  # shallow layers, one slot each; more go to the reference

# Rows are frames of all utterances; K shallow layers, deep last; D is the side width r of the other files.


@triton.jit
def _addresses(tensors, slot, SLOTS: tl.constexpr):
    """The tuple's pointers as a vector (SLOTS,), null beyond its end."""
    addresses = tl.zeros([SLOTS], tl.int64)
    for i in tl.static_range(len(tensors)):
        addresses = tl.where(slot == i, tensors[i].to(tl.int64), addresses)
    return addresses


@triton.jit
def _merge_weights(gram, logits, SLOTS: tl.constexpr, EPS: tl.constexpr, SHORT: tl.constexpr):
    """alpha, e, 1/rho (0 where rho is), sum of e plus epsilon, the Gram matrix and norms, these two zero for
    vectors that are taken for zero.

    gram: (BLOCK_T, SLOTS, SLOTS). logits: (BLOCK_T, SLOTS). An empty slot has a zero vector, so rho = 0
    and e = 0.
    """
    slot = tl.arange(0, SLOTS)
    diagonal = (slot[:, None] == slot[None, :])[None, :, :]
    norm = tl.sqrt(tl.sum(tl.where(diagonal, gram, 0.0), 2))
    short = norm < SHORT  # false of NaN, which must not vanish
    norm = tl.where(short, 0.0, norm)
    gram = tl.where(short[:, :, None] | short[:, None, :], 0.0, gram)
    scale = norm + EPS
    cosine = gram / (scale[:, :, None] * scale[:, None, :])
    redundancy = tl.sum(relu(cosine), 2)
    dead = redundancy == 0
    inverse = tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, redundancy))
    scores = relu(logits) * inverse
    total = tl.sum(scores, 1) + EPS
    return scores / total[:, None], scores, inverse, total, gram, norm


@triton.jit(do_not_specialize=["rows"])
def guidance_fwd_kernel(
    shallow,  # K pointers to (rows, D)
    deep_ptr,  # (rows, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (1,)
    out_ptr,  # (rows, D)
    rows,
    D: tl.constexpr,
    SLOTS: tl.constexpr,  # K rounded up to a power of two, at least 16
    EPS: tl.constexpr,
    SHORT: tl.constexpr,  # norm below which a vector is taken for zero
    PRECISION: tl.constexpr,  # of the Gram matrix
    BLOCK_T: tl.constexpr,  # frames
    BLOCK_D: tl.constexpr,
):
    # alpha_j = e_j / (sum_k e_k + eps);  out = sum_j alpha_j x_j + q
    K: tl.constexpr = len(shallow)
    pointer: tl.constexpr = deep_ptr.dtype
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.arange(0, SLOTS)
    column = tl.arange(0, BLOCK_D)
    addresses = _addresses(shallow, slot, SLOTS)
    sources = tl.multiple_of(addresses.to(pointer), 16)[None, :, None]
    bias = tl.load(bias_ptr).to(tl.float32)
    used = (row < rows)[:, None, None] & (slot < K)[None, :, None]
    gram = tl.zeros([BLOCK_T, SLOTS, SLOTS], tl.float32)
    logits = tl.zeros([BLOCK_T, SLOTS], tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        d = start + column
        inside = (row < rows)[:, None] & (d < D)[None, :]
        offset = row[:, None] * D + d[None, :]
        x = tl.load(sources + offset[:, None, :], mask=used & (d < D)[None, None, :], other=0.0)
        q = tl.load(deep_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        gram = tl.dot(x, tl.permute(x, 0, 2, 1), gram, input_precision=PRECISION)
        logits += tl.sum(x.to(tl.float32) * (w[None, :] * q)[:, None, :], 2)
    alpha, scores, inverse, total, gram, norm = _merge_weights(gram, logits + bias, SLOTS, EPS, SHORT)
    for start in tl.range(0, D, BLOCK_D):
        d = start + column
        inside = (row < rows)[:, None] & (d < D)[None, :]
        offset = row[:, None] * D + d[None, :]
        x = tl.load(sources + offset[:, None, :], mask=used & (d < D)[None, None, :], other=0.0)
        q = tl.load(deep_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        out = tl.sum(alpha[:, :, None] * x.to(tl.float32), 1) + q
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "groups"])
def guidance_bwd_kernel(
    shallow,  # K pointers to (rows, D)
    grad_shallow,  # K pointers to (rows, D), which may be the same, as grad_deep_ptr may be deep_ptr
    deep_ptr,  # (rows, D)
    grad_deep_ptr,  # (rows, D)
    grad_ptr,  # (rows, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (1,)
    weight_part_ptr,  # (programs, D) fp32
    bias_part_ptr,  # (programs, SLOTS) fp32
    rows,
    groups,  # tiles of frames per program
    D: tl.constexpr,
    CHUNKS: tl.constexpr,  # ceil(D / BLOCK_D) rounded up to a power of two
    SLOTS: tl.constexpr,
    EPS: tl.constexpr,
    SHORT: tl.constexpr,
    PRECISION: tl.constexpr,
    MIX_PRECISION: tl.constexpr,  # of mixing (fp32) times features
    IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr,  # frames
    BLOCK_D: tl.constexpr,
):
    # dx_i = alpha_i dA + dt_i w * q + sum_j M_ij x_j;  dq = dA + w * sum_i dt_i x_i
    K: tl.constexpr = len(shallow)
    pointer: tl.constexpr = deep_ptr.dtype
    slot = tl.arange(0, SLOTS)
    column = tl.arange(0, BLOCK_D)
    chunk = tl.arange(0, CHUNKS)
    addresses = _addresses(shallow, slot, SLOTS)
    sources = tl.multiple_of(addresses.to(pointer), 16)[None, :, None]
    addresses = _addresses(grad_shallow, slot, SLOTS)
    targets = tl.multiple_of(addresses.to(pointer), 16)[None, :, None]
    diagonal = (slot[:, None] == slot[None, :])[None, :, :]
    bias = tl.load(bias_ptr).to(tl.float32)
    weight_sum = tl.zeros([CHUNKS, BLOCK_D], tl.float32)
    bias_sum = tl.zeros([BLOCK_T, SLOTS], tl.float32)
    for group in tl.range(0, groups):
        row = (tl.program_id(0).to(tl.int64) * groups + group) * BLOCK_T + tl.arange(0, BLOCK_T)
        used = (row < rows)[:, None, None] & (slot < K)[None, :, None]
        gram = tl.zeros([BLOCK_T, SLOTS, SLOTS], tl.float32)
        logits = tl.zeros([BLOCK_T, SLOTS], tl.float32)
        grad_alpha = tl.zeros([BLOCK_T, SLOTS], tl.float32)
        for start in tl.range(0, D, BLOCK_D):
            d = start + column
            inside = (row < rows)[:, None] & (d < D)[None, :]
            offset = row[:, None] * D + d[None, :]
            x = tl.load(sources + offset[:, None, :], mask=used & (d < D)[None, None, :], other=0.0)
            q = tl.load(deep_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            gram = tl.dot(x, tl.permute(x, 0, 2, 1), gram, input_precision=PRECISION)
            wide = x.to(tl.float32)
            logits += tl.sum(wide * (w[None, :] * q)[:, None, :], 2)
            grad_alpha += tl.sum(wide * g[:, None, :], 2)
        alpha, scores, inverse, total, gram, norm = _merge_weights(gram, logits + bias, SLOTS, EPS, SHORT)
        # dalpha_j - sum_k alpha_k dalpha_k, with sum_k alpha_k = 1 - eps / total: taken pair by pair, since
        # the difference of the sums would be rounding alone where a single layer has all the weight.
        spread = alpha[:, None, :] * (grad_alpha[:, :, None] - grad_alpha[:, None, :])
        centred = tl.sum(spread, 2) + grad_alpha * (EPS / total)[:, None]
        # Scores and their sum may be huge, their quotients are not: centred / total alone could vanish.
        grad_logits = centred * (inverse / total[:, None]) * (scores > 0).to(tl.float32)
        grad_redundancy = -centred * alpha * inverse
        pull = grad_redundancy[:, :, None] + grad_redundancy[:, None, :]
        scale = norm + EPS
        mixing = tl.where(gram > 0, pull, 0.0) / (scale[:, :, None] * scale[:, None, :])
        still = norm == 0
        length = tl.sum(mixing * gram, 2) / tl.where(still, 1.0, norm * scale)
        mixing = tl.where(diagonal, mixing - tl.where(still, 0.0, length)[:, :, None], mixing)
        bias_sum += tl.where((row < rows)[:, None], grad_logits, 0.0)
        for start in tl.range(0, D, BLOCK_D):
            d = start + column
            inside = (row < rows)[:, None] & (d < D)[None, :]
            offset = row[:, None] * D + d[None, :]
            stored = used & (d < D)[None, None, :]
            x = tl.load(sources + offset[:, None, :], mask=stored, other=0.0).to(tl.float32)
            q = tl.load(deep_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            grad_x = (
                alpha[:, :, None] * g[:, None, :] + grad_logits[:, :, None] * (w[None, :] * q)[:, None, :]
            )
            grad_x = tl.dot(mixing, x, grad_x, input_precision=MIX_PRECISION)
            if IN_PLACE:
                tl.debug_barrier()  # all threads have read what is written over
            tl.store(targets + offset[:, None, :], grad_x.to(deep_ptr.dtype.element_ty), mask=stored)
            weighted = tl.sum(grad_logits[:, :, None] * x, 1)
            grad_q = g + w[None, :] * weighted
            tl.store(grad_deep_ptr + offset, grad_q.to(deep_ptr.dtype.element_ty), mask=inside)
            part = tl.sum(weighted * q, 0)
            weight_sum += tl.where((chunk == start // BLOCK_D)[:, None], part[None, :], 0.0)
    program = tl.program_id(0).to(tl.int64)
    d = chunk[:, None] * BLOCK_D + column[None, :]
    tl.store(weight_part_ptr + program * D + d, weight_sum, mask=d < D)
    tl.store(bias_part_ptr + program * SLOTS + slot, tl.sum(bias_sum, 0))


def _most_layers(width: int) -> int:
    """Of the backward: more than 16 in a width below every encoder's would spill, since its sweeps are no
    loops there and their loads are begun together."""
    return MAX_SLOTS if width >= 24 else 16


def _slots(layers: int) -> int:
    return max(16, triton.next_power_of_2(layers))  # tl.dot needs 16


@once_per_row
def _constants(row: Row, dtype: torch.dtype, width: int, layers: int, in_place: bool = False) -> dict:
    """The constexpr arguments of a row's kernel for K ``layers``."""
    wide = dtype == torch.float32
    constants = {"D": width, "SLOTS": _slots(layers), "EPS": GUIDANCE_EPS, "SHORT": GUIDANCE_SHORT}
    constants |= {"PRECISION": "ieee", **row.blocks}
    if row.kernel == "guidance_bwd":
        chunks = ceil_div(width, row.blocks["BLOCK_D"])
        constants["CHUNKS"] = triton.next_power_of_2(chunks)
        # Mixing is fp32 and its row sums cancel where layers are alike: half precision would lose them, and
        # overflow in fp16 for short vectors. Three tf32 products keep 21 bits on the tensor cores; AMD's
        # have fp32.
        constants["MIX_PRECISION"] = "ieee" if wide else row.precision
        constants["IN_PLACE"] = in_place
    return constants


def forward(weight: Tensor, bias: Tensor, features: list[Tensor]) -> Tensor:
    """weight (1, r), bias (1,), K + 1 features (..., r) -> (..., r) in the features' type."""
    last, layers = features[-1], len(features) - 1
    if layers == 0:
        return last.clone()
    width = last.shape[-1]
    row = row_for("guidance_fwd", last, width)
    if row is None or layers > MAX_SLOTS:
        return reference.forward(weight, bias, features)
    *shallow, deep = (aligned(feature, width) for feature in features)
    out = torch.empty_like(deep)
    if out.numel():
        with on_device(deep):
            launch(
                guidance_fwd_kernel,
                (ceil_div(deep.shape[0], row.blocks["BLOCK_T"]),),
                tuple(shallow),
                deep,
                weight.contiguous(),
                bias,
                out,
                deep.shape[0],
                **_constants(row, deep.dtype, width, layers),
                **row.options,
            )
    return out.view(last.shape)


def _row(last: Tensor, layers: int) -> Row | None:
    """The backward's row, or None where the reference has to serve."""
    width = last.shape[-1]
    served = 0 < layers <= _most_layers(width)
    return row_for("guidance_bwd", last, width) if served else None


def _run(
    row: Row,
    grad: Tensor,
    weight: Tensor,
    bias: Tensor,
    features: list[Tensor],
    targets: list[Tensor],
    in_place: bool,
) -> list[Tensor]:
    """Gradients of weight and bias; those of the features (rows, r) go to ``targets``."""
    *shallow, deep = features
    *grad_shallow, grad_deep = targets
    width = deep.shape[-1]
    groups, programs = split(ceil_div(deep.shape[0], row.blocks["BLOCK_T"]), resident=RESIDENT)
    weight_parts = torch.empty(programs, width, dtype=torch.float32, device=deep.device)
    bias_parts = torch.empty(programs, _slots(len(shallow)), dtype=torch.float32, device=deep.device)
    if deep.numel():
        with on_device(deep):
            launch(
                guidance_bwd_kernel,
                (programs,),
                tuple(shallow),
                tuple(grad_shallow),
                deep,
                grad_deep,
                aligned(grad, width),
                weight.contiguous(),
                bias,
                weight_parts,
                bias_parts,
                deep.shape[0],
                groups,
                **_constants(row, deep.dtype, width, len(shallow), in_place),
                **row.options,
            )
    return [
        weight_parts.sum(0)[None].to(weight.dtype),
        bias_parts.sum().reshape(bias.shape).to(bias.dtype),
    ]


def backward(grad: Tensor, weight: Tensor, bias: Tensor, features: list[Tensor]) -> list[Tensor]:
    """Gradients of weight, bias and of each feature."""
    last = features[-1]
    row = _row(last, len(features) - 1)
    if row is None:
        return reference.backward(grad, weight, bias, features)
    rows = [aligned(feature, last.shape[-1]) for feature in features]
    targets = [torch.empty_like(each) for each in rows]
    gradients = _run(row, grad, weight, bias, rows, targets, False)
    return [*gradients, *(target.view(last.shape) for target in targets)]


def backward_(grad: Tensor, weight: Tensor, bias: Tensor, features: list[Tensor]) -> list[Tensor]:
    """Gradients of weight and bias; those of the features are written over them."""
    last = features[-1]
    row = _row(last, len(features) - 1)
    rows = [aligned(feature, last.shape[-1]) for feature in features]
    own = all(a.untyped_storage()._cdata == b.untyped_storage()._cdata for a, b in zip(rows, features))
    if row is None or not own:  # of another layout
        grad_weight, grad_bias, *grads = backward(grad, weight, bias, features)
        for feature, each in zip(features, grads, strict=True):
            feature.copy_(each)
        return [grad_weight, grad_bias]
    return _run(row, grad, weight, bias, rows, rows, True)


def static_launches(row: Row, dtype: str, width: int) -> Iterator[tuple]:
    """The row's kernel at the layer counts of whisper-small (K = 10) and whisper-large (K = 30), where it
    serves them: function, signature, constexprs and attributes, as ``triton.compile`` takes them."""
    kind = POINTERS[dtype]
    for layers in (10, 30):
        if row.kernel == "guidance_bwd" and layers > _most_layers(width):
            continue
        constants = _constants(row, TORCH_TYPES[dtype], width, layers, True)
        if row.kernel == "guidance_fwd":
            function, names = guidance_fwd_kernel, {"shallow": (kind,) * layers}
            names |= {"deep_ptr": kind, "weight_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": kind}
        else:
            function, names = (
                guidance_bwd_kernel,
                dict.fromkeys(("shallow", "grad_shallow"), (kind,) * layers),
            )
            names |= dict.fromkeys(("deep_ptr", "grad_deep_ptr", "grad_ptr"), kind)
            names |= dict.fromkeys(("weight_ptr", "bias_ptr", "weight_part_ptr", "bias_part_ptr"), "*fp32")
            names["groups"] = "i32"
        yield compile_arguments(function, {**names, "rows": "i32"}, constants)
