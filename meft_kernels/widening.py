"""SHERL's output through a frozen function, such as an encoder layer, in parts of which nothing is kept."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import ops
from .ops.second_derivative import refuses_second_derivative


def parts(clips: int, size: int) -> Iterator[slice]:
    """Slices of so many clips at a time; of no clips one."""
    for start in range(0, max(clips, 1), max(size, 1)):
        yield slice(start, start + size)


class WidenInto(torch.autograd.Function):
    """``run(gated_up(x, y, ...), part)`` of each part, one behind the other.

    Args:
        run: of the widened (b, T, D) of a slice of clips, gives (b, ...). backward: of the same and the
            gradient of what ``run`` gave, the gradient (b, T, D); both are called without autograd.
        sizes: clips at a time, forward and backward. x: (B, T, D), without gradient. y: (B, T, r).
        weight, bias, gate: of ``ops.gated_up``.
    """

    @staticmethod
    def forward(
        ctx,
        run: Callable[[Tensor, slice], Tensor],
        backward: Callable[[Tensor, Tensor, slice], Tensor],
        sizes: tuple[int, int],
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor,
    ) -> Tensor:
        ctx.run_backward, ctx.size = backward, sizes[1]
        ctx.save_for_backward(x, y, weight, bias, gate)
        results = []
        for part in parts(len(x), sizes[0]):
            results.append(run(ops.gated_up(x[part], y[part], weight, bias, gate), part))
        return torch.cat(results)

    @staticmethod
    @refuses_second_derivative
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, gate = ctx.saved_tensors
        found: tuple[list[Tensor], ...] = ([], [], [])
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            for part in parts(len(x), ctx.size):
                wide = ops.gated_up(x[part], y[part], weight, bias, gate)
                upstream = ctx.run_backward(wide, grad[part], part)
                del wide
                for of_parts, each in zip(found, ops.gated_up_sums(upstream, x[part], y[part], weight)):
                    of_parts.append(each)
                del upstream, each
            grad_y, *summed = found
            summed = (
                of_parts[0] if len(of_parts) == 1 else torch.stack(of_parts).sum(0) for of_parts in summed
            )
            grads = ops.gated_up_gradients(*summed, weight, bias, gate)
            return None, None, None, None, torch.cat(grad_y), *grads
