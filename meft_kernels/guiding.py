"""SHERL's guidance of features that nobody else holds: their gradients are written over them."""

import torch
from torch import Tensor

from .disposing import may_dispose
from .ops import backends
from .ops.second_derivative import refuses_second_derivative
from .reference import stand_in


class GuidanceOfOwn(torch.autograd.Function):
    """``ops.guidance`` of features in one type, whose gradients take no memory of their own on a GPU: they
    take the features' place, unless the graph is kept and the features may be needed again."""

    @staticmethod
    def forward(weight: Tensor, bias: Tensor, *features: Tensor) -> Tensor:
        return backends.kernel("guidance")(weight, bias, list(features))

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.backend = backends.current()
        ctx.save_for_backward(*inputs)

    @staticmethod
    @refuses_second_derivative
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        weight, bias, *features = ctx.saved_tensors
        # The C++ kernels of a CPU write to memory of their own.
        own = stand_in.device_type(grad.device) != "cpu" and all(ctx.needs_input_grad)
        if not own or not may_dispose():
            return tuple(backends.kernel("guidance_bwd", ctx.backend)(grad, weight, bias, features))
        features = [feature.detach() for feature in features]
        grads = backends.kernel("guidance_bwd_", ctx.backend)(grad, weight, bias, features)
        torch.autograd.graph.increment_version(features)  # whoever still reads them is told
        return *grads, *features
