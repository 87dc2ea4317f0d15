"""Backwards that say so when they are differentiated themselves."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def in_transform() -> bool:
    """Whether the call is inside a transform of ``torch.func``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def refuses_second_derivative(backward: Callable) -> Callable:
    """A backward whose gradients raise when they are differentiated themselves.

    ``once_differentiable`` sees to that where the upstream gradient requires a gradient. Where it is
    constant, as after ``out.sum()``, the second derivative runs through the saved arguments alone, and would
    be lost without a word.
    """
    once = once_differentiable(backward)

    def run(ctx, *upstream: Tensor):
        grads = once(ctx, *upstream)
        # Under a transform nothing can be marked.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform():
            return grads
        present = [grad.detach().requires_grad_() for grad in grads if grad is not None]
        message = "trying to differentiate twice: the ops of meft_kernels have no second derivative"
        marked = iter(torch._C._functions.DelayedError(message.encode(), len(present))(*present))
        return tuple(None if grad is None else next(marked) for grad in grads)

    return run
