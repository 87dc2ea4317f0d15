"""The ``torch.autograd.Function`` of every op, and the call of an op with or without it.

Each op saves its inputs for the backward and nothing else: what the forward computed is recomputed. Only the
C++ kernels keep, of fp32 activations, the projection (..., r) of a hidden state as well: that is most of what
there is to recompute (``native.keeps_projection``). With ``saved_activations="int8"`` or ``"fp8"`` the
leading input x, a hidden state, is kept as an 8-bit normalised copy instead; one that is cheap to make again
is not kept at all. ``linear_cross_entropy`` of a frozen head keeps the gradient itself.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import native, reference
from ..reference import SAVED_ACTIVATIONS, stand_in
from ..reference.common import in_autocast
from . import backends, schemas, shapes
from .second_derivative import edges, in_forward_mode, in_nested_transforms, refuses_second_derivative

EIGHT_BIT = reference.eight_bit.CODE_DTYPES
# How a Function keeps x: as it is, as an 8-bit copy, or not, but by what makes it again.
Keep = str | Callable[[], Tensor]


def _pack(name: str, arguments: Sequence) -> tuple:
    """Arguments as the op takes them: a list was passed on one tensor at a time, behind all others."""
    names = schemas.ARGUMENT_NAMES[name]
    if "features" not in names:
        return tuple(arguments)
    place, fixed = names.index("features"), len(names) - 1
    return (*arguments[:place], list(arguments[fixed:]), *arguments[place:fixed])


def make_function(name: str) -> type[torch.autograd.Function]:
    """The autograd Function of an op; its first arguments are the backend and how x is kept (``Keep``)."""
    names = [each for each in schemas.ARGUMENT_NAMES[name] if each not in schemas.FLAGS]
    has_flag = len(names) < len(schemas.ARGUMENT_NAMES[name])  # no tensor
    fixed = [each for each in schemas.ARGUMENT_NAMES[name] if each != "features"]
    flag_at = len(fixed) - 1
    takes_need_x = names[0] == "x"
    differentiable = [argument not in schemas.CONSTANT for argument in fixed]

    class OpFunction(torch.autograd.Function):
        @staticmethod
        def forward(backend: str, keep: Keep, *arguments):
            if name == "relu_attention" and is_fused(name, backend, arguments[0]):
                # The features are kept as the slab that the kernel reads, and copied into it once.
                slab = torch.stack(arguments[len(fixed) :])
                packed = _pack(name, (*arguments[: len(fixed)], *slab.unbind(0)))
                return backends.kernel(name, backend)(*packed), slab
            if keep in EIGHT_BIT and name == "gated_down" and is_fused(name, backend, arguments[0]):
                return backends.kernel("gated_down_active", backend)(*arguments)
            if backend in ("auto", "native") and keep == "exact" and native.keeps_projection(name, arguments):
                return native.kernel(f"{name}_keeping")(*arguments)
            return backends.kernel(name, backend)(*_pack(name, arguments))

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            ctx.backend, ctx.keep = inputs[:2]
            arguments = list(inputs[2:])  # unpacked by a star, torch 2.11's dynamo takes it for a tuple
            ctx.slab = False
            if has_flag:
                ctx.flag = arguments.pop(flag_at)
            ctx.keeping, active = isinstance(output, tuple), None
            if ctx.keeping and ctx.keep in EIGHT_BIT:  # of gated_down: where p > 0
                active, ctx.keeping = output[1], False
                ctx.mark_non_differentiable(active)
                ctx.set_materialize_grads(False)
            arguments = kept(ctx.backend, names, ctx.keep, arguments, active)
            if ctx.keeping and name == "relu_attention":
                slab = output[1]
                ctx.mark_non_differentiable(slab)
                ctx.set_materialize_grads(False)
                ctx.keeping, ctx.slab, count = False, True, len(names) - 1
                arguments = [*arguments[:count], slab, *edges(arguments[count:])]
            elif ctx.keeping:
                projection = output[1]
                ctx.mark_non_differentiable(projection)
                ctx.set_materialize_grads(False)  # not a tensor of zeros for the projection
                arguments = [*arguments, projection]
            ctx.save_for_backward(*arguments)

        @staticmethod
        @refuses_second_derivative
        def backward(ctx, grad, *_):
            arguments = ctx.saved_tensors
            if ctx.slab:
                *arguments, slab = arguments[: len(names)]
                arguments = [*arguments, *slab.unbind(0)]
                del slab
            extra = ()
            kernel = backends.kernel(f"{name}_bwd", ctx.backend)
            if ctx.keeping:
                *arguments, projection = arguments
                extra, kernel = (projection,), native.kernel(f"{name}_keeping_bwd")
            arguments, more = restored(ctx.backend, names, ctx.keep, arguments, grad)
            extra = (*extra, *more)
            if has_flag:
                arguments = (*arguments[:flag_at], ctx.flag, *arguments[flag_at:])
            packed = _pack(name, arguments)
            if takes_need_x:
                packed = (*packed, ctx.needs_input_grad[2], *extra)
            computed = list(kernel(grad, *packed))
            if takes_need_x and not ctx.needs_input_grad[2]:
                computed[0] = None
            grads = [None, None]
            for is_differentiable in differentiable:
                grads.append(computed.pop(0) if is_differentiable else None)
            return (*grads, *computed)

    OpFunction.__name__ = OpFunction.__qualname__ = f"{name.title().replace('_', '')}Function"
    return OpFunction


def is_fused(name: str, backend: str, first: Tensor) -> bool:
    """Whether Triton's kernels are those that serve an op whose first activation is ``first``; that of
    ``relu_attention`` reads its features from one slab."""
    return backend == "triton" or (
        backend == "auto"
        and stand_in.device_type(first.device) == "cuda"
        and not backends.library_is_faster(name, (first,))
    )


def kept(backend: str, names: list[str], keep: Keep, arguments: list, active: Tensor | None = None) -> list:
    """What a Function saves of the arguments of an op that begins with x, for ``restored``; ``active``:
    ``gated_down``'s bits, where they are known."""
    if keep == "exact":
        return arguments
    return _encoded(backend, names, keep, arguments, active) if keep in EIGHT_BIT else [None, *arguments[1:]]


def restored(backend: str, names: list[str], keep: Keep, saved: Sequence, grad: Tensor) -> tuple[list, tuple]:
    """The arguments that ``kept`` was given, or what stands for them, and what the backward takes after
    them; ``grad`` has the type of x."""
    if keep in EIGHT_BIT:
        return _decoded(backend, names, saved, grad)
    return list(saved) if keep == "exact" else [keep(), *saved[1:]], ()


def _encoded(backend: str, names: list[str], keep: str, arguments: list, active: Tensor | None) -> list:
    """Arguments with x as an 8-bit copy of the kind ``keep``, and at the end what the backward needs to make
    do with it; ``active``: ``gated_down``'s bits, where they are known."""
    x, *rest = arguments
    given = dict(zip(names, arguments))
    if "mean" in given:  # the backward takes the normalised x for x: its statistics are 0 and 1
        code, *channels = backends.kernel("encode", backend)(x, given["mean"], given["rstd"], keep)
        return [code, *(None if n in ("mean", "rstd") else t for n, t in zip(names[1:], rest)), *channels]
    mean, rstd = backends.kernel("row_statistics", backend)(x)
    code, *channels = backends.kernel("encode", backend)(x, mean, rstd, keep)
    if active is None:
        active = reference.gated_down.active_bits(x, given["weight_1"], given["bias_1"])
    return [code, *rest, *channels, mean, rstd, active]


def _decoded(backend: str, names: list[str], saved: Sequence, grad: Tensor) -> tuple[list, tuple]:
    """The arguments that ``_encoded`` was given, with x from its 8-bit copy, and what the backward takes
    after them; ``grad`` has the type of x."""
    code, *rest = saved
    count = len(names) - 1
    rest, (scale, shift, *more) = rest[:count], rest[count:]
    statistics, extra = more[:2], tuple(more[2:])
    x = backends.kernel("decode", backend)(code, scale, shift, grad.new_empty(0), *statistics)
    if not statistics:
        zero = scale.new_zeros(code.shape[:-1])
        standard = {"mean": zero, "rstd": torch.ones_like(zero)}
        rest = [standard.get(name, argument) for name, argument in zip(names[1:], rest)]
    return [x, *rest], extra


FUNCTIONS = {name: make_function(name) for name in schemas.ARGUMENTS}


class FrozenHeadFunction(torch.autograd.Function):
    """``linear_cross_entropy`` with a gradient to x alone, which the forward computes and keeps."""

    @staticmethod
    def forward(backend: str, *arguments):
        return backends.kernel("linear_cross_entropy_with_gradient", backend)(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        grad_x = output[1]
        ctx.mark_non_differentiable(grad_x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_x, *edges(inputs[1:2]))

    @staticmethod
    @refuses_second_derivative
    def backward(ctx, grad, _):
        grad_x = ctx.saved_tensors[0]
        # In the wide type: one token's share of a mean may be too small for half precision.
        return None, (grad[..., None] * grad_x).to(grad_x.dtype), None, None, None


def how_to_keep(x: Tensor, saved_activations: str, again: Callable[[], Tensor] | None = None) -> Keep:
    """How x is kept for a backward; where ``again`` makes it again, not at all.

    Raises:
        ValueError: ``saved_activations`` is another word.
    """
    if saved_activations not in SAVED_ACTIVATIONS:
        accepted = ", ".join(map(repr, SAVED_ACTIVATIONS))
        raise ValueError(f"saved_activations must be one of {accepted}, got {saved_activations!r}")
    if x.requires_grad or in_nested_transforms():  # a gradient to x itself would need the exact x
        return "exact"
    return saved_activations if again is None else again


def call(
    name: str, *arguments, saved_activations: str = "exact", again: Callable[[], Tensor] | None = None
) -> Tensor:
    """Runs an op with autograd where a gradient or a tangent is asked for, else its kernel alone.

    Raises:
        ValueError: shapes that do not fit each other, or another ``saved_activations``.
    """
    if name != "linear_cross_entropy":  # checked with its labels
        shapes.check(name, *arguments)
    keep = how_to_keep(arguments[0], saved_activations, again)
    needs_grad = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if needs_grad or in_forward_mode():
        if name == "linear_cross_entropy" and not arguments[1].requires_grad:
            return FrozenHeadFunction.apply(backends.current(), *arguments)[0]
        out = FUNCTIONS[name].apply(backends.current(), keep, *arguments)
        return out[0] if isinstance(out, tuple) else out
    return backends.kernel(name)(*_pack(name, arguments))


def activation(x: Tensor) -> Tensor:
    """Casts fp32 activations to autocast's type where autocast is on."""
    if x.dtype == torch.float32 and in_autocast(x.device):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
