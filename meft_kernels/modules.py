"""LST, UniPT and SHERL on the ops: drop-in replacements for the modules of ``meft_kernels.reference``.

Constructors, parameters and ``state_dict`` keys are the reference's; these compute the same function through
``ops``, keeping for the backward one small state per layer beside the hidden states.
"""

from collections.abc import Iterable

from torch import Tensor

from . import ops, reference
from .reference.modules import (
    adapter_params,
    gated_down_params,
    norm_linear_params,
)


class LST(reference.LST):
    __doc__ = reference.LST.__doc__

    def state(self, hidden_states: Iterable[Tensor], lengths: Tensor | None) -> Tensor:
        stream = self.read(hidden_states)
        first = next(stream)
        self.check_lengths(lengths, first)
        state = ops.norm_linear(first, *norm_linear_params(self.down[0]))
        for hidden_state, down, rung in zip(stream, self.down[1:], self.rungs):
            state = ops.ladder(
                hidden_state, state, *norm_linear_params(down), rung.gate, *adapter_params(rung)
            )
        return state

    def pooled(self, hidden_states: Iterable[Tensor], lengths: Tensor | None = None) -> Tensor:
        return ops.pooled_upsample(self.state(hidden_states, lengths), *self.pool_params(), lengths)

    pooled.__doc__ = reference.LST.pooled.__doc__


class UniPT(reference.UniPT):
    __doc__ = reference.UniPT.__doc__

    def state(self, hidden_states: Iterable[Tensor], lengths: Tensor | None) -> Tensor:
        features = []
        for down, hidden_state in zip(self.down, self.read(hidden_states), strict=True):
            features.append(ops.norm_linear(hidden_state, *norm_linear_params(down)))
        *features, anchor = features
        self.check_lengths(lengths, anchor)
        merged = ops.relu_attention(anchor, self.gate.weight, self.gate.bias, features, lengths)
        return anchor + ops.adapter(merged, *adapter_params(self.adapter))

    def pooled(self, hidden_states: Iterable[Tensor], lengths: Tensor | None = None) -> Tensor:
        state = self.state(hidden_states, lengths)
        return ops.pooled_upsample(state, *self.pool_params(), lengths, relu=True)

    pooled.__doc__ = reference.UniPT.pooled.__doc__


class SHERL(reference.SHERL):
    __doc__ = reference.SHERL.__doc__

    def forward(self, hidden_states: Iterable[Tensor], lengths: Tensor | None = None) -> Tensor:
        features = []
        for down, hidden_state in zip(self.down, self.read(hidden_states), strict=True):
            features.append(ops.gated_down(hidden_state, *gated_down_params(down)))
        self.check_lengths(lengths, hidden_state)
        merged = ops.guidance(self.guide.weight, self.guide.bias, features)
        return ops.gated_up(hidden_state, merged, self.out.weight, self.out.bias, self.gate)

    forward.__doc__ = reference.SHERL.forward.__doc__
