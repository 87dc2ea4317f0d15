"""SHERL's passage through the frozen last encoder layer, with gradient to its input alone.

What the layer keeps for its backward would outweigh the side network, so that of a large batch it is computed
again there, some clips at a time. Its weights are frozen, so a derivation by hand needs few products and
little memory (``meft_kernels.ops.gated_up`` makes x of the side network's y and of h_{L-1}):

    n = LN(x);   o = attention(n);   m = x + Wo o + bo;   u = W1 LN(m) + b1;   out = m + W2 gelu(u) + b2
    dout = LN_encoder's backward of the pooled gradient, which is the same for all frames of a clip
    dm = dout + LN's backward of ((dout W2) * gelu'(u)) W1
    dx = dm + LN's backward of (dq Wq + dk Wk + dv Wv);   dq, dk and dv by attention's own backward of dm Wo
"""

import functools
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from meft_kernels.recomputing import recomputed
from meft_kernels.reference.stand_in import device_type

from . import layer as frozen_layer
from .frozen import FrozenEncoder
from .pooling import mean_over_time, past_end, sum_over_time
from .quantization import is_quantized

# Parts of the feed-forward block's inner width that its activation and its gradient are computed in, where
# that block holds more than the attention's backward.
_INNER_PARTS = {"cpu": 1}

_DEFAULT_INNER_PARTS = 2


def pooled_through_last_layer(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    deepest: Tensor,
    merged: Tensor,
    lengths: Tensor | None,
    part: int,
    backward_part: int | None,
    frugal: bool = False,
) -> Tensor:
    """Mean over time of what the last layer and the final LayerNorm make of a SHERL's output.

    Args:
        side_network: a SHERL. deepest, merged: what its ``merge`` gave. lengths: (B,) valid frames, or None.
        part: clips that go through the layer at a time.
        backward_part: clips at a time in the backward, where the layer is computed again; None: what it
            keeps is kept.
        frugal: queries, keys and values are computed twice again rather than held.

    Returns:
        (B, D), in at least float32.
    """

    def last(deepest: Tensor, merged: Tensor, lengths: Tensor | None) -> Tensor:
        return mean_over_time(encoder.last_layer(side_network.widen(deepest, merged), lengths), lengths)

    trains = torch.is_grad_enabled()
    if backward_part is None and trains:
        return last(deepest, merged, lengths)
    if not trains:
        return torch.cat([last(*given) for given in _parts(part, deepest, merged, lengths)])
    if torch.compiler.is_compiling() or not _is_derived(encoder, deepest):
        given = _parts(backward_part, deepest, merged, lengths)
        return torch.cat([recomputed(last, *each) for each in given])
    again = _LayerAgain(encoder, lengths, frugal)

    def run(states: Tensor, clips: slice) -> Tensor:
        of_clips = None if lengths is None else lengths[clips]
        return sum_over_time(encoder.last_layer(states, of_clips), of_clips)

    total = side_network.widen_into(deepest, merged, run, again.backward, (part, backward_part))
    return total / (deepest.shape[1] if lengths is None else lengths[:, None].to(total.dtype))


def states_through_last_layer(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    deepest: Tensor,
    merged: Tensor,
    lengths: Tensor | None,
    part: int | None,
) -> Tensor:
    """What the last layer and the final LayerNorm make of a SHERL's output, (B, T, D); arguments as for
    :func:`pooled_through_last_layer`, ``part``: clips at a time that are computed again in the backward, or
    None: what the layer keeps is kept."""

    def last(deepest: Tensor, merged: Tensor, lengths: Tensor | None) -> Tensor:
        return encoder.last_layer(side_network.widen(deepest, merged), lengths)

    if part is None:
        return last(deepest, merged, lengths)
    return torch.cat([recomputed(last, *each) for each in _parts(part, deepest, merged, lengths)])


def _is_derived(encoder: FrozenEncoder, states: Tensor) -> bool:
    """Whether the last layer is what the derivation takes it for: frozen modules as Whisper has them, with
    PyTorch's attention, in the type of the states, and no hooks may change what they give. What is not is
    left to autograd."""
    layer = encoder.layers[-1]
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    linears = (*projections, layer.fc1, layer.fc2)
    norms = (layer.self_attn_layer_norm, layer.final_layer_norm, encoder.layer_norm)
    return (
        encoder._runs_alone(states, layer)
        and states.dtype == encoder.dtype
        and attention.config._attn_implementation == "sdpa"
        and getattr(layer.activation_fn, "act", None) is F.gelu
        and all(type(linear) is nn.Linear and not is_quantized(linear) for linear in linears)
        and all(type(norm) is nn.LayerNorm for norm in norms)
        and not any(p.requires_grad for module in (layer, encoder.layer_norm) for p in module.parameters())
        and not frozen_layer.has_hooks((*layer.modules(), encoder.layer_norm))
    )


def _parts(size: int, *given: Tensor | None) -> Iterator[list[Tensor | None]]:
    """The arguments of so many clips at a time; of no clips one part."""
    for start in range(0, max(len(given[0]), 1), max(size, 1)):
        yield [None if each is None else each[start : start + size] for each in given]


class _LayerAgain:
    """The last layer, the encoder's final LayerNorm and the sum over time, run again, and back.

    Args:
        lengths: (B,) of the whole batch. frugal: see ``pooled_through_last_layer``.
    """

    def __init__(self, encoder: FrozenEncoder, lengths: Tensor | None, frugal: bool):
        self.encoder, self.lengths, self.frugal = encoder, lengths, frugal
        self.layer = encoder.layers[-1]
        self.attention = self.layer.self_attn
        self.scaling = self.attention.scaling
        # Looked up once for all parts: a module takes the host as long for that as a tensor for a view.
        self.project = _parameters(self.attention.out_proj)
        self.inner, (outer, self.outer_bias) = _parameters(self.layer.fc1), _parameters(self.layer.fc2)
        parts = _INNER_PARTS.get(device_type(outer.device), _DEFAULT_INNER_PARTS)
        self.outer = outer.chunk(1 if frugal else parts, 1)
        norms = (self.layer.self_attn_layer_norm, self.layer.final_layer_norm, encoder.layer_norm)
        self.first_norm, self.second_norm, self.final_norm = map(_FixedNorm, norms)
        self.head_sizes = self.attention.num_heads, self.attention.head_dim

    @functools.cached_property
    def projections(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The weights that make queries, keys and values, one by one and all in one, and their bias."""
        projections = [getattr(self.attention, f"{name}_proj") for name in "qkv"]
        weights = [projection.weight.detach() for projection in projections]
        missing = weights[0].new_zeros(len(weights[0]))
        biases = [missing if each.bias is None else each.bias.detach() for each in projections]
        return weights, torch.cat(weights), torch.cat(biases)

    def backward(self, x: Tensor, grad: Tensor, clips: slice) -> Tensor:
        """Gradient of the layer's input x (b, T, D) from that of the sum (b, D) of these clips."""
        lengths = None if self.lengths is None else self.lengths[clips]
        mask = self.encoder._attention_mask(lengths, x.shape[1])
        mixed, heads, statistics = self._attend(x, mask)
        states = F.linear(_rows(mixed.detach()), *self.project).view(x.shape).add_(x)
        upstream = self._feed_forward(states, grad, lengths)
        del states
        grad_mixed = upstream.view(-1, x.shape[2]).mm(self.project[0])
        grad_mixed = grad_mixed.view(*x.shape[:2], *self.head_sizes).transpose(1, 2)
        grads = torch.autograd.grad(mixed, heads, grad_mixed)
        del mixed, grad_mixed
        grad_normed = None
        for rows, weight in zip(map(_rows, grads), self.projections[0]):
            grad_normed = rows.mm(weight) if grad_normed is None else grad_normed.addmm_(rows, weight)
        return upstream.add_(self.first_norm.backward(grad_normed.view(x.shape), x, *statistics))

    def heads(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Queries, keys and values (B, H, T, d), views of one tensor, and the row statistics of x."""
        normed, *statistics = self.first_norm(x)
        projected = F.linear(normed, weight, bias).view(*x.shape[:2], 3, *self.head_sizes)
        return projected.transpose(1, 3).unbind(2), statistics

    def _attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list, list[Tensor]]:
        """What the heads make of x (B, H, T, d), the edges at which autograd gives the gradients of queries,
        keys and values, and the row statistics of x. The kernel is whichever PyTorch takes, so its backward
        is left to autograd; where memory is dear, what that keeps of the heads is computed again for it."""
        _, weight, bias = self.projections
        places: list[int] = []
        again: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor | tuple:
            if tensor.untyped_storage()._cdata not in places:
                return tensor
            return tensor.shape, tensor.stride(), tensor.storage_offset()

        def unpack(packed: Tensor | tuple) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            if not again:
                again.append(self.heads(x, weight, bias)[0][0])
            return again[0].as_strided(*packed)

        hooks = nullcontext()
        with torch.enable_grad():
            # A gradient to the bias alone: autograd then keeps nothing of the product.
            heads, statistics = self.heads(x, weight, bias.detach().requires_grad_())
            if self.frugal:
                places.append(heads[0].untyped_storage()._cdata)
                hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
            with hooks:
                mixed = frozen_layer.self_attention(*heads, mask, scale=self.scaling)
        return mixed, [get_gradient_edge(each) for each in heads], statistics

    def _feed_forward(self, states: Tensor, grad: Tensor, lengths: Tensor | None) -> Tensor:
        """Gradient of what the attention block gave, ``states``, from that of the sum over time."""
        normed, *statistics = self.second_norm(states)
        width = normed.shape[-1]
        inner = F.linear(normed.view(-1, width), *self.inner)
        del normed
        (first, *others), (weight, *weights) = inner.chunk(len(self.outer), 1), self.outer
        out = F.linear(F.gelu(first), weight, self.outer_bias)
        for part, weight in zip(others, weights):
            out.addmm_(F.gelu(part), weight.T)
        out = out.view(states.shape).add_(states)
        before = out.clone() if out.dtype == torch.float16 else None
        out = frozen_layer.clamp_half(out)
        final_statistics = self.final_norm(out)[1:]
        grad = self.final_norm.backward(_of_frames(grad, lengths, out), out, *final_statistics)
        if before is not None:
            grad.masked_fill_(before != out, 0)
        del out, before
        for part, weight in zip((first, *others), self.outer):  # over the inner states
            grad_active = grad.view(-1, width).mm(weight)
            torch.ops.aten.gelu_backward(grad_active, part, grad_input=part)
            del grad_active
        grad_normed = inner.mm(self.inner[0]).view(states.shape)
        del inner, first, others, part
        return grad.add_(self.second_norm.backward(grad_normed, states, *statistics))


def _rows(heads: Tensor) -> Tensor:
    """(B, H, T, d) to (B T, H d), a copy only where it has to be."""
    batch, number, frames, size = heads.shape
    return heads.transpose(1, 2).reshape(batch * frames, number * size)


def _of_frames(grad: Tensor, lengths: Tensor | None, like: Tensor) -> Tensor:
    """(B, D) to all valid frames, 0 for the others: (B, T, D) in the type of ``like``, which is as large."""
    grad_out = torch.empty_like(like).copy_(grad[:, None])
    return grad_out if lengths is None else grad_out.masked_fill_(past_end(lengths, like)[..., None], 0)


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    return module.weight, module.bias


class _FixedNorm:
    """A frozen LayerNorm."""

    def __init__(self, norm: nn.LayerNorm):
        self.shape, self.parameters, self.eps = norm.normalized_shape, _parameters(norm), norm.eps

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normed x and its row statistics."""
        return torch.native_layer_norm(x, self.shape, *self.parameters, self.eps)

    def backward(self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """Gradient of x alone."""
        arguments = (grad, x, self.shape, mean, rstd, *self.parameters, [True, False, False])
        return _layer_norm_backward(*arguments)[0]


_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
