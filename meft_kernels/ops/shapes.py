"""Whether the shapes of an op's tensors fit each other: a fused kernel reads what its pointers say.

Each function below gives the shapes that an op's tensors must have by those that they have, in the order of
its arguments with a list behind all others. Sizes are tuples of one number, or of none where an axis is
missing.
"""

from collections.abc import Callable

from torch import Tensor

from .schemas import ARGUMENT_NAMES, FLAGS


def _fold(norm_weight: tuple, norm_bias: tuple, weight: tuple, bias: tuple) -> tuple:
    of_norm = weight[:-2] + weight[-1:]
    return of_norm, of_norm, weight if len(weight) > 1 else ("r", "D"), weight[:-1]


def _norm_linear(x: tuple, weight: tuple, *_: tuple) -> tuple:
    rows, side = x[:-1], weight[:1]
    return x or ("...", "D"), side + x[-1:], side, rows, rows


def _mlp(side: tuple, weight_1: tuple) -> tuple:
    hidden = weight_1[:1]
    return side, side, hidden + side, hidden, side + hidden, side


def _adapter(x: tuple, norm_weight: tuple, norm_bias: tuple, weight_1: tuple, *_: tuple) -> tuple:
    return x or ("...", "r"), *_mlp(x[-1:], weight_1)


def _ladder(x: tuple, state: tuple, weight: tuple, *others: tuple) -> tuple:
    side = weight[:1]
    x, *projection = _norm_linear(x, weight)
    return x, x[:-1] + side, *projection, (1,), *_mlp(side, others[6])


def _pooled_upsample(x: tuple, norm_weight: tuple, norm_bias: tuple, weight: tuple, *others) -> tuple:
    side, size, lengths = x[-1:], weight[:1], others[-1]
    frames = x if len(x) == 3 else ("B", "T", "r")
    return frames, side, side, size + side, size, size, size, lengths if lengths is None else x[:1]


def _attention(anchor: tuple, gate_weight: tuple, gate_bias: tuple, lengths, *features: tuple) -> tuple:
    frames = anchor if len(anchor) == 3 else ("B", "T", "r")
    lengths = lengths if lengths is None else anchor[:1]
    return frames, (1, *anchor[-1:]), (1,), lengths, *[anchor] * len(features)


def _gated_down(x: tuple, weight_1: tuple, *_: tuple) -> tuple:
    side = weight_1[:1]
    inner = side + side
    return x or ("...", "D"), side + x[-1:], side, inner, side, inner, side


def _guidance(weight: tuple, bias: tuple, *features: tuple) -> tuple:
    deep = features[-1] or ("...", "r")
    return (1, *deep[-1:]), (1,), *[deep] * len(features)


def _gated_up(x: tuple, y: tuple, *_: tuple) -> tuple:
    size, side = x[-1:], y[-1:]
    return x or ("...", "D"), x[:-1] + side, size + side, size, (1,)


def _gated_up_sums(grad: tuple, x: tuple, y: tuple, weight: tuple) -> tuple:
    return x, *_gated_up(x, y)[:3]


_WANTED: dict[str, Callable[..., tuple]] = {
    "fold": _fold,
    "norm_linear": _norm_linear,
    "adapter": _adapter,
    "ladder": _ladder,
    "pooled_upsample": _pooled_upsample,
    "relu_attention": _attention,
    "linear_attention": _attention,
    "gated_down": _gated_down,
    "guidance": _guidance,
    "gated_up": _gated_up,
    "gated_up_sums_": _gated_up_sums,
}
_NAMES = {
    "fold": ["norm_weight", "norm_bias", "weight", "bias"],
    "gated_up_sums_": ["grad", "x", "y", "weight"],
    **{name: [n for n in names if n not in {*FLAGS, "features"}] for name, names in ARGUMENT_NAMES.items()},
}
_FLAG_AT = {"pooled_upsample": 8, "relu_attention": 4}


def check(name: str, *arguments: Tensor | None) -> None:
    """Checks the arguments of an op as its autograd Function takes them, before a kernel is called.

    Raises:
        ValueError: a tensor has a shape that does not fit those of the others.
    """
    if (flag := _FLAG_AT.get(name)) is not None:
        arguments = (*arguments[:flag], *arguments[flag + 1 :])
    given = tuple([None if each is None else each.shape for each in arguments])
    wanted = _WANTED[name](*given)
    if given == wanted:
        return
    names = _NAMES[name] + ["every feature"] * (len(given) - len(_NAMES[name]))
    for each, shape, fitting in zip(names, given, wanted, strict=True):
        if shape != fitting:
            sizes = ", ".join(map(str, fitting)) + "," * (len(fitting) == 1)
            found = None if shape is None else tuple(shape)
            raise ValueError(f"{each} must have shape ({sizes}), got {found}")
