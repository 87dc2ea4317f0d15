"""What every op takes and gives back: its schema, and the shapes of its results (the fake kernels, which
tracing and fake tensors use). ``registration`` registers both."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference

_PROJECTION = "Tensor weight, Tensor bias, Tensor mean, Tensor rstd"
_ADAPTER = (
    "Tensor norm_weight, Tensor norm_bias, Tensor weight_1, Tensor bias_1, Tensor weight_2, Tensor bias_2"
)
_GATED = "Tensor anchor, Tensor gate_weight, Tensor gate_bias, Tensor? lengths, Tensor[] features"

# Arguments of each op; the public functions say what they mean. A backward op takes the upstream
# gradient first and, where the leading input may be frozen and large, ``need_x`` last. It returns the
# gradients of the differentiable arguments in order, and last those of a list of tensors one by one.
ARGUMENTS = {
    "norm_linear": f"Tensor x, {_PROJECTION}",
    "adapter": f"Tensor x, {_ADAPTER}",
    "ladder": f"Tensor x, Tensor state, {_PROJECTION}, Tensor gate, {_ADAPTER}",
    "pooled_upsample": "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, "
    "Tensor out_norm_weight, Tensor out_norm_bias, Tensor? lengths, bool relu",
    "relu_attention": f"{_GATED}, int pool=1",
    "linear_attention": _GATED,
    "gated_down": "Tensor x, Tensor weight_1, Tensor bias_1, Tensor weight_2, Tensor bias_2, "
    "Tensor weight_3, Tensor bias_3",
    "guidance": "Tensor weight, Tensor bias, Tensor[] features",
    "gated_up": "Tensor x, Tensor y, Tensor weight, Tensor bias, Tensor gate",
    "linear_cross_entropy": "Tensor x, Tensor weight, Tensor labels, float label_smoothing",
}
OP_NAMES = ("row_statistics", *ARGUMENTS)
FLAGS = {"relu", "label_smoothing", "pool"}  # arguments that are no tensors
CONSTANT = {"mean", "rstd", "lengths", "labels", *FLAGS}  # arguments that take no gradient

# Ops whose forward computes a projection (..., r) of x, by far the most of it, that their C++ kernels can
# hand on to the backward: what reference/<op>.py calls it.
PROJECTION_KEPT = {"ladder": "down", "gated_down": "hidden"}

ARGUMENT_NAMES = {
    name: [argument.split()[-1].split("=")[0] for argument in arguments.split(", ")]
    for name, arguments in ARGUMENTS.items()
}


def _fake_row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(x.dtype)
    return x.new_empty(x.shape[:-1], dtype=dtype), x.new_empty(x.shape[:-1], dtype=dtype)


def _fake_encode(x: Tensor, mean: Tensor, rstd: Tensor, kind: str = "fp8") -> tuple[Tensor, Tensor, Tensor]:
    code = x.new_empty(x.shape, dtype=reference.eight_bit.CODE_DTYPES[kind])
    return code, mean.new_empty(x.shape[-1]), mean.new_empty(x.shape[-1])


def _fake_decode(code: Tensor, scale: Tensor, shift: Tensor, like: Tensor, *statistics) -> Tensor:
    return like.new_empty(code.shape)


def _fake_gated_up_sums(grad: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    wide = reference.accumulation_dtype(x.dtype)
    grad_weight = x.new_empty(weight.shape, dtype=wide)
    return [grad_weight, x.new_empty(2, x.shape[-1], dtype=wide)]


def _resized(x: Tensor, weight: Tensor) -> Tensor:
    """Shape of a projection of x by a weight (out, in)."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_gated_down_active(x: Tensor, weight: Tensor, *_) -> tuple[Tensor, Tensor]:
    rows, width = x.numel() // max(x.shape[-1], 1), weight.shape[0]
    return _resized(x, weight), x.new_empty(rows, (width + 7) // 8, dtype=torch.uint8)


_FAKES: dict[str, Callable[..., Tensor]] = {
    "norm_linear": lambda x, weight, *_: _resized(x, weight),
    "adapter": lambda x, *_: x.new_empty(x.shape),
    "ladder": lambda x, state, *_: x.new_empty(state.shape),
    "pooled_upsample": lambda x, norm_weight, norm_bias, weight, *_: _resized(x[:, 0], weight),
    "relu_attention": lambda anchor, *_: anchor.new_empty(anchor.shape),
    "linear_attention": lambda anchor, *_: anchor.new_empty(anchor.shape),
    "gated_down": lambda x, weight, *_: _resized(x, weight),
    "guidance": lambda weight, bias, features: features[-1].new_empty(features[-1].shape),
    "gated_up": lambda x, *_: x.new_empty(x.shape),
    "linear_cross_entropy": lambda x, *_: x.new_empty(
        x.shape[:-1], dtype=reference.accumulation_dtype(x.dtype)
    ),
}


def _fake_backward(name: str) -> Callable[..., list[Tensor]]:
    """The gradients' shapes are the arguments', but x's, which is empty unless it is needed."""
    names = ARGUMENT_NAMES[name]

    def fake(grad: Tensor, *arguments) -> list[Tensor]:
        grads = []
        for argument_name, argument in zip(names, arguments):
            if argument_name == "x" and not arguments[len(names)]:
                grads.append(argument.new_empty(0))
            elif argument_name == "features":
                grads.extend(feature.new_empty(feature.shape) for feature in argument)
            elif argument_name not in CONSTANT:
                grads.append(argument.new_empty(argument.shape))
        return grads

    return fake


def _fake_relu_attention_backward_in_place(grad: Tensor, *given: Tensor) -> list[Tensor]:
    """Of anchor, gate_weight and gate_bias; the features' gradients go into the slab."""
    return [argument.new_empty(argument.shape) for argument in given[:3]]


class Registered(NamedTuple):
    """One operator: its schema, the op whose files hold its kernels, its function there, and its fake."""

    schema: str
    op: str
    function: str
    fake: Callable

    @property
    def name(self) -> str:
        return self.schema.split("(")[0]


def _registered() -> list[Registered]:
    decode = (
        "decode(Tensor code, Tensor scale, Tensor shift, Tensor like, "
        "Tensor? mean=None, Tensor? rstd=None) -> Tensor"
    )
    rows = [
        Registered(
            "row_statistics(Tensor x) -> (Tensor, Tensor)", "row_statistics", "forward", _fake_row_statistics
        ),
        Registered(
            "encode(Tensor x, Tensor mean, Tensor rstd, str kind='fp8') -> (Tensor, Tensor, Tensor)",
            "eight_bit",
            "encode",
            _fake_encode,
        ),
        Registered(decode, "eight_bit", "decode", _fake_decode),
        Registered(
            f"gated_down_active({ARGUMENTS['gated_down']}) -> (Tensor, Tensor)",
            "gated_down",
            "forward_active",
            _fake_gated_down_active,
        ),
        Registered(
            "guidance_bwd_(Tensor grad, Tensor weight, Tensor bias, Tensor(a!)[] features) -> Tensor[]",
            "guidance",
            "backward_",
            lambda grad, weight, bias, features: [torch.empty_like(weight), torch.empty_like(bias)],
        ),
        Registered(
            "gated_up_sums_(Tensor grad, Tensor x, Tensor(a!) y, Tensor weight) -> Tensor[]",
            "gated_up",
            "sums_",
            _fake_gated_up_sums,
        ),
    ]
    for name, arguments in ARGUMENTS.items():
        flag = ", bool need_x" if arguments.startswith("Tensor x,") else ""
        flag += ", Tensor? active=None" if name == "gated_down" else ""
        backward = f"{name}_bwd(Tensor grad, {arguments}{flag}) -> Tensor[]"
        rows.append(Registered(f"{name}({arguments}) -> Tensor", name, "forward", _FAKES[name]))
        rows.append(Registered(backward, name, "backward", _fake_backward(name)))
    in_place = (
        "relu_attention_bwd_(Tensor grad, Tensor anchor, Tensor gate_weight, Tensor gate_bias, "
        "Tensor? lengths, Tensor(a!) slab, int pool=1) -> Tensor[]"
    )
    rows.append(
        Registered(in_place, "relu_attention", "backward_in_place", _fake_relu_attention_backward_in_place)
    )
    arguments = ARGUMENTS["linear_cross_entropy"]
    both = f"linear_cross_entropy_with_gradient({arguments}) -> (Tensor, Tensor)"
    rows.append(Registered(both, "linear_cross_entropy", "forward_with_gradient", _fake_with_gradient))
    return rows


def _fake_with_gradient(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    return _FAKES["linear_cross_entropy"](x, *arguments), x.new_empty(x.shape)


REGISTERED = _registered()


def _registered_keeping() -> list[Registered]:
    rows = []
    for name, kept in PROJECTION_KEPT.items():
        arguments, fake = ARGUMENTS[name], _FAKES[name]
        forward = f"{name}_keeping({arguments}) -> (Tensor, Tensor)"
        backward = f"{name}_keeping_bwd(Tensor grad, {arguments}, bool need_x, Tensor {kept}) -> Tensor[]"
        rows.append(Registered(forward, name, "forward", _fake_keeping(fake)))
        rows.append(Registered(backward, name, "backward", _fake_backward(name)))
    return rows


def _fake_keeping(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def fake(*arguments) -> tuple[Tensor, Tensor]:
        out = forward(*arguments)
        return out, out.new_empty(out.shape, dtype=torch.float32)

    return fake


def _empty_heads(tensor: Tensor) -> Tensor:
    """(B, H, T, d), in memory (B, T, H, d)."""
    return tensor.transpose(1, 2).new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)


def _fake_self_attention(query: Tensor, *_) -> tuple[Tensor, Tensor]:
    return _empty_heads(query), query.new_empty(query.shape[:-1])


def _fake_self_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_) -> tuple:
    return _empty_heads(query), _empty_heads(key), _empty_heads(value)


def _registered_self_attention() -> list[Registered]:
    given, options = "Tensor query, Tensor key, Tensor value", "Tensor? mask, float scale"
    forward = f"self_attention({given}, {options}) -> (Tensor, Tensor)"
    backward = (
        f"self_attention_bwd(Tensor grad, {given}, Tensor out, Tensor logsumexp, {options}) "
        "-> (Tensor, Tensor, Tensor)"
    )
    return [
        Registered(forward, "self_attention", "forward", _fake_self_attention),
        Registered(backward, "self_attention", "backward", _fake_self_attention_backward),
    ]


def _registered_pooled() -> list[Registered]:
    """``relu_attention`` by pooled keys: kernels of their own names, so that a library built before they were
    there still serves what it served."""
    forward = f"relu_attention_pooled({_GATED}, int pool) -> Tensor"
    backward = f"relu_attention_pooled_bwd(Tensor grad, {_GATED}, int pool) -> Tensor[]"
    return [
        Registered(forward, "relu_attention", "forward", _FAKES["relu_attention"]),
        Registered(backward, "relu_attention", "backward", _fake_backward("relu_attention")),
    ]


def _registered_int8_linear() -> Registered:
    given = "Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] totals, Tensor?[] biases"
    fake = lambda x, codes, *_: [x.new_empty(x.shape[0], each.shape[0]) for each in codes]  # noqa: E731
    return Registered(f"int8_linear({given}) -> Tensor[]", "int8_linear", "forward", fake)


# C++ kernels alone; and what those of ``relu_attention`` itself do not take.
REGISTERED_NATIVE = [
    *_registered_keeping(),
    *_registered_pooled(),
    *_registered_self_attention(),
    _registered_int8_linear(),
]
NOT_NATIVE = ", int pool=1"
