"""SHERL's output through a frozen function, such as an encoder layer, in parts of which nothing is kept."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from . import ops
from .disposing import may_dispose
from .ops import backends
from .ops.second_derivative import refuses_second_derivative
from .reference import stand_in
from .reference.common import in_autocast


def parts(clips: int, size: int) -> Iterator[slice]:
    """Slices of so many clips at a time or, to be of nearly one length, fewer; of no clips one."""
    size = -(-clips // max(-(-clips // max(size, 1)), 1))
    for start in range(0, max(clips, 1), max(size, 1)):
        yield slice(start, start + size)


class WidenInto(torch.autograd.Function):
    """``run(gated_up(x, y, ...), part)`` of each part, one behind the other. y is held by this alone: its
    gradient takes its place.

    Args:
        run: of the widened (b, T, D) of a slice of clips, gives (b, ...). backward: of the same and the
            gradient of what ``run`` gave, the gradient (b, T, D); both are called without autograd.
        sizes: clips at a time, forward and backward. x: (B, T, D), without gradient. y: (B, T, r).
        weight, bias, gate: of ``ops.gated_up``.
    """

    @staticmethod
    def forward(
        run: Callable[[Tensor, slice], Tensor],
        backward: Callable[[Tensor, Tensor, slice], Tensor],
        sizes: tuple[int, int],
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor,
    ) -> Tensor:
        results = []
        for part in parts(len(x), sizes[0]):
            results.append(run(ops.gated_up(x[part], y[part], weight, bias, gate), part))
        return torch.cat(results)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, ctx.run_backward, (_, ctx.size), *given = inputs
        ctx.backend = backends.current()
        ctx.save_for_backward(*given)

    @staticmethod
    @refuses_second_derivative
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, gate = ctx.saved_tensors
        if may_dispose():
            grad_y = y.detach()
            torch.autograd.graph.increment_version(grad_y)  # whoever still reads y is told
        else:
            grad_y = y.clone()
        parameters = (weight, bias, gate)
        found: list[list[Tensor]] = []
        off = torch.autocast(grad.device.type, enabled=False) if in_autocast(grad.device) else nullcontext()
        with torch.no_grad(), off, backends.assume_backend(ctx.backend):
            widen = backends.kernel("gated_up")
            for part in parts(len(x), ctx.size):
                states, of_part = x[part], grad_y[part]
                wide = widen(states, of_part, *parameters)
                upstream = ctx.run_backward(wide, grad[part], part)
                del wide
                found.append(_of_part(upstream, states, of_part, parameters))
                del upstream
            summed = [torch.stack(of_parts).sum(0) for of_parts in zip(*found)]
            grads = summed if len(summed) == len(parameters) else ops.gated_up_gradients(*summed, *parameters)
            return None, None, None, None, grad_y, *grads


def _of_part(grad: Tensor, x: Tensor, y: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """Writes the gradient of y over y, and gives what ``ops.gated_up_gradients`` takes or, of the C++ kernels
    of a CPU, the gradients of the parameters."""
    if stand_in.device_type(grad.device) != "cpu":
        return ops.gated_up_sums_(grad, x, y, parameters[0])
    _, grad_y, *grads = backends.kernel("gated_up_bwd")(grad, x, y, *parameters, False)
    y.copy_(grad_y)
    return grads
