"""The public function of every op, with what each takes and gives.

Under autocast, fp32 activations are cast on entry; parameters stay fp32 masters and are cast inside.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import reference
from . import backends, shapes
from .autograd import activation, call


def eight_bit(x: Tensor, kind: str = "fp8") -> Tensor:
    """What a backward reads in place of x where ``saved_activations`` is ``kind``, without gradient: the
    normalised rows, in 8 bits and back; see ``reference.eight_bit``.

    Args:
        x: (..., D).
        kind: ``"int8"`` or ``"fp8"``.

    Returns:
        (..., D) in the type of x.

    Raises:
        ValueError: another ``kind``.
    """
    if kind not in reference.eight_bit.CODE_DTYPES:
        raise ValueError(f"kind must be 'int8' or 'fp8', got {kind!r}")
    x = x.detach()
    encoded = backends.kernel("encode")(x, *row_statistics(x), kind)
    return backends.kernel("decode")(*encoded, x.new_empty(0))


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each row, as LayerNorm needs them, without gradient.

    Args:
        x: (..., D).

    Returns:
        Two tensors (...), fp32 for half precision and fp32, float64 for float64.
    """
    return backends.kernel("row_statistics")(x.detach())


def fold(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm's affine part and centring folded into a projection: one weight and bias for any number of
    calls of ``folded_linear`` or ``folded_ladder``; see ``reference.norm_linear``.

    Args:
        norm_weight, norm_bias: (D,). weight: (r, D). bias: (r,). Or those of n projections, stacked.

    Returns:
        Weight (r, D) and bias (r,), with gradient to all four; of n projections (n, r, D) and (n, r).

    Raises:
        ValueError: shapes that do not fit each other.
    """
    shapes.check("fold", norm_weight, norm_bias, weight, bias)
    return reference.norm_linear.fold(norm_weight, norm_bias, weight, bias)


def norm_linear(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``Linear(LayerNorm(x))`` that keeps x and never a normalised copy; see ``reference.norm_linear``.

    Args:
        x: (..., D). norm_weight, norm_bias: (D,). weight: (r, D). bias: (r,).

    Returns:
        (..., r) in the type of x.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    return folded_linear(x, *fold(norm_weight, norm_bias, weight, bias))


def folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor, Tensor] | None = None,
    saved_activations: str = "exact",
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """``norm_linear`` with parameters that ``fold`` gave.

    Args:
        x: (..., D). weight: (r, D). bias: (r,).
        statistics: what ``row_statistics(x)`` would give, where it is known already.
        saved_activations: ``"exact"`` keeps x for the backward, ``"int8"`` and ``"fp8"`` an 8-bit copy of
            the normalised x.
        again: makes x again, so that neither x nor a copy is kept.

    Returns:
        (..., r) in the type of x.

    Raises:
        ValueError: shapes that do not fit each other, or another ``saved_activations``.
    """
    x, statistics = activation(x), statistics or row_statistics(x)
    options = {"saved_activations": saved_activations, "again": again}
    return call("norm_linear", x, weight, bias, *statistics, **options)


def adapter(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """``Linear_2(gelu(Linear_1(LayerNorm(x))))`` without the residual; see ``reference.adapter``.

    Args:
        x: (..., r). norm_weight, norm_bias, bias_2: (r,). weight_1: (a, r). bias_1: (a,). weight_2: (r, a).

    Returns:
        (..., r) in the type of x.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    parameters = (norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    return call("adapter", activation(x), *parameters)


def ladder(
    x: Tensor,
    state: Tensor,
    down_norm_weight: Tensor,
    down_norm_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
) -> Tensor:
    """One rung of LST: project x, gate it with the state below, adapt; see ``reference.ladder``.

    Args:
        x: hidden state (..., D). state: side state (..., r), taken in the type of x.
        down_norm_weight, down_norm_bias: (D,). down_weight: (r, D). down_bias: (r,).
        gate: (1,), before the sigmoid and its temperature.
        norm_weight … bias_2: the adapter's, as in ``adapter``.

    Returns:
        The next side state, (..., r) in the type of x.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    folded = fold(down_norm_weight, down_norm_bias, down_weight, down_bias)
    parameters = (gate, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    return folded_ladder(x, state, *folded, *parameters)


def folded_ladder(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    statistics: tuple[Tensor, Tensor] | None = None,
    saved_activations: str = "exact",
) -> Tensor:
    """``ladder`` with a projection that ``fold`` gave.

    Args:
        x, state, gate, norm_weight … bias_2: as in ``ladder``. weight: (r, D). bias: (r,).
        statistics, saved_activations: as in ``folded_linear``.

    Returns:
        The next side state, (..., r) in the type of x.

    Raises:
        ValueError: shapes that do not fit each other, or another ``saved_activations``.
    """
    x, statistics = activation(x), statistics or row_statistics(x)
    parameters = (gate, norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2)
    arguments = (x, state.to(x.dtype), weight, bias, *statistics, *parameters)
    return call("ladder", *arguments, saved_activations=saved_activations)


def pooled_upsample(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    lengths: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Mean over time of ``LayerNorm(Linear(f(LayerNorm(x))))``, never writing the (B, T, D) tensor inside.

    See ``reference.pooled_upsample``.

    Args:
        x: (B, T, r). norm_weight, norm_bias: (r,). weight: (D, r).
        bias, out_norm_weight, out_norm_bias: (D,).
        lengths: (B,) valid frames, or None for all T.
        relu: whether f is ReLU (UniPT) or the identity (LST).

    Returns:
        (B, D) in the type of x.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    parameters = (norm_weight, norm_bias, weight, bias, out_norm_weight, out_norm_bias)
    return call("pooled_upsample", activation(x), *parameters, lengths, relu)


def relu_attention(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    features: Sequence[Tensor],
    lengths: Tensor | None = None,
    pool: int = 1,
) -> Tensor:
    """UniPT's parallel interaction of all layers with the anchor, without T x T memory; see
    ``reference.relu_attention``.

    Args:
        anchor: (B, T, r). gate_weight: (1, r). gate_bias: (1,). features: at least one tensor (B, T, r).
        lengths: (B,) valid frames, or None for all T.
        pool: neighbouring frames whose mean is one key; 1 as published.

    Returns:
        (B, T, r) in the type of anchor.

    Raises:
        ValueError: shapes that do not fit each other, no features, or ``pool`` is not a positive integer.
    """
    _check_features(features)
    if isinstance(pool, bool) or not isinstance(pool, int) or pool < 1:
        raise ValueError(f"pool must be a positive integer, got {pool!r}")
    anchor = activation(anchor)
    pool = max(1, min(pool, anchor.shape[1]))  # one key for all frames is the most that there is to pool
    features = [feature.to(anchor.dtype) for feature in features]
    return call("relu_attention", anchor, gate_weight, gate_bias, lengths, pool, *features)


def linear_attention(
    anchor: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    features: Sequence[Tensor],
    lengths: Tensor | None = None,
) -> Tensor:
    """``relu_attention`` with its ReLU before the product, linear in the length; see
    ``reference.linear_attention``.

    Args:
        anchor: (B, T, r). gate_weight: (1, r). gate_bias: (1,). features: at least one tensor (B, T, r).
        lengths: (B,) valid frames, or None for all T.

    Returns:
        (B, T, r) in the type of anchor.

    Raises:
        ValueError: shapes that do not fit each other, or no features.
    """
    _check_features(features)
    anchor = activation(anchor)
    features = [feature.to(anchor.dtype) for feature in features]
    return call("linear_attention", anchor, gate_weight, gate_bias, lengths, *features)


def gated_down(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    weight_3: Tensor,
    bias_3: Tensor,
    saved_activations: str = "exact",
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """SHERL's gated down-projection of one hidden state; see ``reference.gated_down``.

    Args:
        x: (..., D). weight_1: (r, D). weight_2, weight_3: (r, r). bias_1, bias_2, bias_3: (r,).
        saved_activations, again: as in ``folded_linear``.

    Returns:
        (..., r) in the type of x.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    parameters = (weight_1, bias_1, weight_2, bias_2, weight_3, bias_3)
    return call("gated_down", activation(x), *parameters, saved_activations=saved_activations, again=again)


def guidance(weight: Tensor, bias: Tensor, features: Sequence[Tensor]) -> Tensor:
    """SHERL's redundancy-guided merge of shallow layers into the deepest; see ``reference.guidance``.

    Args:
        weight: (1, r). bias: (1,). features: the shallow layers' and last the deep
            one, each (..., r), taken in the type of the last.

    Returns:
        (..., r) in the type of the last feature.

    Raises:
        ValueError: shapes that do not fit each other, or no features.
    """
    _check_features(features)
    deep = activation(features[-1])
    features = [*(feature.to(deep.dtype) for feature in features[:-1]), deep]
    return call("guidance", weight, bias, *features)


def gated_up(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    """``Linear(relu(y)) + tanh(gate / 0.1) * x``, SHERL's input to the last encoder layer; see
    ``reference.gated_up``.

    Args:
        x: hidden state (..., D). y: (..., r), taken in the type of x. weight: (D, r). bias: (D,). gate: (1,).

    Returns:
        (..., D) in the type of x.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    x = activation(x)
    return call("gated_up", x, y.to(x.dtype), weight, bias, gate)


def gated_up_sums_(grad: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """The backward of ``gated_up`` over some of its rows, without gradient to x, in sums that whoever goes
    over the rows in parts adds up; ``gated_up_gradients`` makes the gradients of them. The gradient of y is
    written over y.

    Args:
        grad: (..., D), of the output. x, y, weight: as in ``gated_up``.

    Returns:
        In fp32, or float64, what the gradient of the weight is made of (D, r) and what those of bias and gate
        are made of (2, D).

    Raises:
        ValueError: shapes that do not fit each other.
    """
    shapes.check("gated_up_sums_", grad, x, y, weight)
    return backends.kernel("gated_up_sums_")(grad, x, y, weight)


gated_up_gradients = reference.gated_up.gradients


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Every token's ``cross_entropy(x @ weight.T, labels)``, with one chunk's logits in memory at a time; see
    ``reference.linear_cross_entropy``.

    Where ``weight`` needs no gradient, a frozen head, that of x is computed in the forward, and nothing but
    it is kept; else the backward computes the logits again. How many tokens count is read from the device.

    Args:
        x: (..., D). weight: (V, D), no bias. labels: (...) token numbers, int32 or int64; tokens labelled
            -100 have loss and gradient zero and are never computed.
        label_smoothing: share of the target that is spread over all tokens, from 0 to below 1.

    Returns:
        (...), in fp32, float64 for float64: divide its sum by the number of tokens that count, or whatever
        else the mean is over.

    Raises:
        TypeError: labels are not integers, or x is not floating point.
        ValueError: a shape that does not fit, another ``label_smoothing``, or (seen on the CPU alone) a label
            outside the vocabulary.
    """
    _check_head(x, weight, labels, label_smoothing)
    return call("linear_cross_entropy", activation(x), weight, labels, float(label_smoothing))


def _check_head(x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float) -> None:
    if not x.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f"x and weight must be floating point, got {x.dtype} and {weight.dtype}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels must be int32 or int64 token numbers, got {labels.dtype}")
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have shape (..., D) and weight (V, D), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(x.shape[:-1])}, got {tuple(labels.shape)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be from 0 to below 1, got {label_smoothing!r}")
    # Looking at values would stall a GPU; fake tensors have none.
    readable = type(labels) is Tensor and labels.device.type == "cpu"
    if readable and not torch.compiler.is_compiling() and labels.numel():
        counted = labels[labels != reference.linear_cross_entropy.IGNORED]
        low, high = (int(counted.min()), int(counted.max())) if counted.numel() else (0, 0)
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"labels must lie in 0..{weight.shape[0] - 1} or be -100, got {low if low < 0 else high}"
            )


def _check_features(features: Sequence[Tensor]) -> None:
    if not features:
        raise ValueError("features must hold at least one tensor, got none")
