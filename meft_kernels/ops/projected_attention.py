"""UniPT's projections and the attention over them where a fused kernel reads the features of all layers from
one slab.

Op by op the features would be there twice while they are stacked, and their gradients beside them in the
backward. Here each projection goes into its place in the slab, of which nobody else knows, so that the
backward may write the gradients over it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import backends, shapes
from .autograd import FUNCTIONS, activation, how_to_keep, is_fused
from .second_derivative import edges as edges_of
from .second_derivative import in_forward_mode, in_transform, refuses_second_derivative


def serves(x: Tensor, side_size: int) -> bool:
    """Whether the fused attention serves, for projections of hidden states (B, T, D) to that width."""
    if torch.compiler.is_compiling() or in_transform() or in_forward_mode():
        return False
    return is_fused("relu_attention", backends.current(), activation(x[:0, :, :side_size]))


class FeatureSlab:
    """The features of ``layers`` hidden states, which come one by one."""

    def __init__(self, layers: int):
        self._layers = layers
        self._slab: Tensor | None = None
        self._added = 0
        self._edges: dict[int, Tensor] = {}  # by the layer's place, of those that take a gradient

    def add(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: tuple[Tensor, Tensor] | None = None,
        saved_activations: str = "exact",
        again: Callable[[], Tensor] | None = None,
    ) -> None:
        """Projects a hidden state (B, T, D) into its place; arguments as of ``ops.folded_linear``."""
        keep, backend = how_to_keep(x, saved_activations, again), backends.current()
        x = activation(x)
        statistics = statistics or backends.kernel("row_statistics")(x.detach())
        shapes.check("norm_linear", x, weight, bias, *statistics)
        with torch.no_grad():
            features = backends.kernel("norm_linear")(x, weight, bias, *statistics)
            if self._slab is None:
                self._slab = features.new_empty(self._layers, *features.shape)
            self._slab[self._added] = features
            del features
        if torch.is_grad_enabled() and any(given.requires_grad for given in (x, weight, bias)):
            edge = _Projection.apply(backend, keep, x, weight, bias, *statistics)
            self._edges[self._added] = edge
        self._added += 1

    def attend(
        self,
        anchor: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        lengths: Tensor | None = None,
        pool: int = 1,
    ) -> Tensor:
        """What ``ops.relu_attention`` gives of an anchor (B, T, r) and the features. Once."""
        slab, edges, backend = self._slab, self._edges, backends.current()
        self._slab, self._edges = None, {}
        anchor = anchor.to(slab.dtype)
        pool = max(1, min(pool, anchor.shape[1]))
        given = (anchor, gate_weight, gate_bias, lengths)
        shapes.check("relu_attention", *given, pool, slab[0])
        return _Attention.apply(backend, slab, pool, tuple(edges), *given, *edges.values())


class _Projection(FUNCTIONS["norm_linear"]):
    """An op's place in the graph, whose result lies in a slab."""

    @staticmethod
    def forward(backend, keep, x, weight, *others):
        """Of the result's shape and next to no memory."""
        return x.new_empty(1).expand(*x.shape[:-1], weight.shape[0])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, slab, pool, places, anchor, gate_weight, gate_bias, lengths, *edges):
        ctx.backend, ctx.pool, ctx.places = backend, pool, places
        ctx.save_for_backward(slab, anchor, gate_weight, gate_bias, lengths, *edges_of(edges))
        return backends.kernel("relu_attention", backend)(
            anchor, gate_weight, gate_bias, lengths, list(slab.unbind(0)), pool
        )

    @staticmethod
    @refuses_second_derivative
    def backward(ctx, grad):
        slab, *given = ctx.saved_tensors[:5]
        if _may_write():
            grads = backends.kernel("relu_attention_bwd_", ctx.backend)(grad, *given, slab, ctx.pool)
            grads = [*grads, *slab.unbind(0)]
        else:
            features = list(slab.unbind(0))
            grads = backends.kernel("relu_attention_bwd", ctx.backend)(grad, *given, features, ctx.pool)
        return None, None, None, None, *grads[:3], None, *(grads[3 + place] for place in ctx.places)


def _may_write() -> bool:
    """Whether nobody goes through this part of the graph again, as with ``retain_graph=True``."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is not None and not keeps_graph()
