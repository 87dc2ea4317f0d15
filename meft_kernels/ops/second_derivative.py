"""Derivatives that the ops do not have: a second one, and forward mode. Whoever asks for one is told."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_MESSAGE = "trying to differentiate twice: the ops of meft_kernels have no second derivative"


def in_transform() -> bool:
    """Whether the call is inside a transform of ``torch.func``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_nested_transforms() -> bool:
    """Whether it is inside of one that is inside of another: ``requires_grad`` tells of the inner alone."""
    if torch.compiler.is_compiling():
        return False
    inner = torch._C._functorch.peek_interpreter_stack()
    return inner is not None and inner.level() > 1


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents, as in ``torch.func.jvp``. A kernel called without a Function would
    lose them without a word; with one, torch raises."""
    return forward_ad._current_level >= 0


class _Edge(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(_MESSAGE)


def edges(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """What a Function saves in place of arguments that it does not keep: tensors without memory that have
    the arguments' places in the graph."""
    if torch.compiler.is_compiling():
        return []
    with torch.enable_grad():
        return [
            _Edge.apply(each)
            for each in tensors
            if each is not None and (each.requires_grad or in_transform())
        ]


class _Refusal(torch.autograd.Function):
    """The first ``count`` tensors, which depend on all others and cannot be differentiated, at any level of
    nested transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raise RuntimeError(_MESSAGE)


class _Unpacked:
    """A Function's ctx that unpacks what was saved once: checkpointing gives it a single time."""

    def __init__(self, ctx):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str):
        return getattr(self._ctx, name)


def refuses_second_derivative(backward: Callable) -> Callable:
    """A backward, computed without autograd, whose gradients raise when they are differentiated themselves.

    They depend on the upstream gradient and on what was saved, and the marked gradients hang on all of it: so
    a derivative raises to whatever it is taken, also where ``torch.autograd.grad`` visits those nodes alone
    that lead there. Of arguments that a Function does not save it has to save the ``edges``.

    Where no gradient comes from above, as with ``set_materialize_grads(False)``, none goes on.
    """

    def run(ctx, *upstream: Tensor | None):
        if upstream[0] is None:  # of the only output that can be differentiated
            return (None,) * len(ctx.needs_input_grad)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            with torch.no_grad():
                return backward(ctx, *upstream)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        grads = grads if isinstance(grads, tuple) else (grads,)
        present = [grad.detach() for grad in grads if grad is not None]
        origins = [tensor for tensor in (*ctx.saved_tensors, *upstream) if tensor is not None]
        if in_transform():
            marked = _Refusal.apply(len(present), *present, *origins)
        else:  # whose results are no views: gradients are changed in place
            origins = [tensor for tensor in origins if tensor.requires_grad]
            if not origins:
                return grads
            count = len(present) + len(origins)
            marked = torch._C._functions.DelayedError(_MESSAGE.encode(), count)(*present, *origins)
        marked = iter(marked)
        return tuple(None if grad is None else next(marked) for grad in grads)

    return run
