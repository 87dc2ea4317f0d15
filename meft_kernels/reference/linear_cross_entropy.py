"""Cross-entropy of a linear head without its logits (speech recognition: the frozen, tied embedding).

    z = x E^T;   lse = log sum_v exp z_v;   loss = lse - (1 - a) z_y - a mean_v z_v
    dz = softmax(z) - (1 - a) onehot(y) - a / V;   dx = dz E;   dE = dz^T x

x (..., D), E (V, D), y (...) token numbers, a the label smoothing; ``IGNORED`` tokens have loss and gradient
zero and are dropped before the first product. Each token's loss is its own, so its dx is known, up to the
upstream gradient, as soon as its logits are. For a frozen head ``forward_with_gradient`` computes it there
and keeps dx in place of everything else: two products in all, as many as with the logits kept (the idea of
Liger-Kernel, arXiv 2410.10989, and of Cut Cross-Entropy, arXiv 2411.09009). Where E trains, ``backward``
computes the logits again.

Tokens go through in chunks of at least ``LEAST_ROWS``, at most a ``SHARE``-th of them: one chunk's logits are
all there ever is. Exponentials stay unnormalised and the row's sum divides dx instead, so that probabilities
far below one survive half precision.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import stand_in
from .common import accumulation_dtype, matmul, row_blocks

IGNORED = -100  # the label of tokens that do not count

SHARE = 48  # one chunk's logits and the whole dx stay below a twentieth of all logits, up to D = V / 40

LEAST_ROWS = 96  # fewer would leave the products to the bandwidth of reading E


def definition(x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """What the op means: ``(..., D) -> (...)`` losses, in fp32 or float64."""
    wide = accumulation_dtype(x.dtype)
    logits = F.linear(x.to(wide), weight.to(wide)).to(wide).flatten(0, -2)
    options = {"reduction": "none", "ignore_index": IGNORED, "label_smoothing": label_smoothing}
    return F.cross_entropy(logits, labels.flatten().long(), **options).view(labels.shape)


def forward(x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """x (..., D), weight (V, D), labels (...) -> losses (...) in the accumulation type of x."""
    loss = x.new_zeros(labels.numel(), dtype=accumulation_dtype(x.dtype))
    for kept, rows, y in _chunks(x, labels):
        logits = _logits(rows, weight)
        loss[kept] = _loss(logits, y, label_smoothing, slopes=False)[0]
        del logits
    return loss.view(labels.shape)


def forward_with_gradient(
    x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """As ``forward``, and each token's dx (..., D), in the type of x, for an upstream gradient of one."""
    loss = x.new_zeros(labels.numel(), dtype=accumulation_dtype(x.dtype))
    grad_x = x.new_zeros(labels.numel(), x.shape[-1])
    for kept, rows, y in _chunks(x, labels):
        logits = _logits(rows, weight)
        loss[kept], total = _loss(logits, y, label_smoothing, slopes=True)
        grad_x[kept] = _back(logits, weight, x.dtype).div_(total[:, None]).to(x.dtype)
        del logits
    return loss.view(labels.shape), grad_x.view(x.shape)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, need_x: bool
) -> list[Tensor]:
    """Gradients of x (empty unless ``need_x``) and weight; computes the logits again."""
    wide = accumulation_dtype(x.dtype)
    grad = grad.reshape(-1).to(wide)
    grad_x = x.new_zeros(labels.numel(), x.shape[-1]) if need_x else x.new_empty(0)
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device)
    for kept, rows, y in _chunks(x, labels):
        logits = _logits(rows, weight)
        _, total = _loss(logits, y, label_smoothing, slopes=True)
        upstream = grad[kept][:, None]
        if need_x:  # rounded where the frozen head's is, so that it has the same bits
            of_one = _back(logits, weight, x.dtype).div_(total[:, None]).to(x.dtype)
            grad_x[kept] = (upstream * of_one).to(x.dtype)
        for part in _parts(weight, x.dtype):
            grad_weight[part] += matmul(logits[:, part].mul_(upstream / total[:, None]).T, rows, x.dtype)
        del logits
    return [grad_x.view(x.shape) if need_x else grad_x, grad_weight.to(weight.dtype)]


def _chunks(x: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Numbers of some of the tokens that count, their rows (n, D) and labels (n, 1)."""
    rows, y = x.reshape(-1, x.shape[-1]), labels.reshape(-1, 1).long()
    if stand_in.active():  # which have no values: all may count
        kept = torch.arange(y.shape[0], device=x.device)
    else:
        kept = (y.squeeze(1) != IGNORED).nonzero().squeeze(1)
    step = max(LEAST_ROWS, -(-kept.shape[0] // SHARE))
    starts = range(0, kept.shape[0], step)
    for start in starts[:2] if stand_in.active() else starts:  # more of the same take no more memory
        chunk = kept[start : start + step]
        yield chunk, rows[chunk], y[chunk]


def _parts(weight: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the vocabulary: all of it at once where the products take the weight as it is, else some that
    are cheap to hold in another type."""
    half = dtype in (torch.float16, torch.bfloat16) and stand_in.device_type(weight.device) == "cuda"
    if weight.dtype == (dtype if half else accumulation_dtype(dtype)):
        return iter((slice(None),))
    return row_blocks(*weight.shape, weight.device, every=True)  # together they make the logits


def _logits(rows: Tensor, weight: Tensor) -> Tensor:
    """(n, V) in the accumulation type."""
    parts = [matmul(rows, weight[part].T, rows.dtype) for part in _parts(weight, rows.dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _back(slopes: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, V) -> (n, D) in the accumulation type of ``dtype``, that of the activations."""
    out = None
    for part in _parts(weight, dtype):
        product = matmul(slopes[:, part], weight[part], dtype)
        out = product if out is None else out.add_(product)
    return out


def _loss(logits: Tensor, y: Tensor, label_smoothing: float, slopes: bool) -> tuple[Tensor, Tensor]:
    """Losses (n,) and sums (n,) of exponentials; overwrites the logits by dz times these sums (``slopes``),
    else by nothing of use."""
    loss, total = (logits.new_empty(logits.shape[0]) for _ in range(2))
    for block in row_blocks(*logits.shape, logits.device):
        z, label = logits[block], y[block]
        z -= z.amax(1, keepdim=True)
        picked = z.gather(1, label).squeeze(1)
        smooth = label_smoothing * z.mean(1) if label_smoothing else 0
        sums = z.exp_().sum(1)
        loss[block], total[block] = sums.log() - (1 - label_smoothing) * picked - smooth, sums
        if slopes:
            z.scatter_add_(1, label, (label_smoothing - 1) * sums[:, None])
            if label_smoothing:
                z -= (label_smoothing / z.shape[1]) * sums[:, None]
    return loss, total
