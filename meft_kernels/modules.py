"""LST, UniPT and SHERL on the ops: drop-in replacements for the modules of ``meft_kernels.reference``.

Constructors, parameters and ``state_dict`` keys are the reference's; these compute the same function through
``ops``, keeping for the backward one small state per layer beside the hidden states, and one more where the
C++ kernels compute in fp32.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from . import ops, reference
from .guiding import GuidanceOfOwn
from .ops.projected_attention import FeatureSlab, serves
from .recomputing import recomputed
from .reference import HiddenState
from .reference.modules import (
    adapter_params,
    gated_down_params,
    linear_params,
    norm_linear_params,
)
from .widening import WidenInto

# What UniPTDecoder holds at a time of the scores of tokens by frames.
_SCORES = 2**22


def _of_this_step(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """Weights as aliases of this step: what the kernels make of one is made once for forward and backward.
    Nothing is made of vectors."""
    return (each.view_as(each) if each.ndim > 1 else each for each in parameters)


class _Folded:
    """What the networks with a LayerNorm before each projection share."""

    def fold(self) -> list[tuple[Tensor, Tensor]]:
        """The projections with their LayerNorms folded in. Whoever runs a batch in parts folds once and hands
        the list to each part."""
        together = (torch.stack(each) for each in zip(*map(norm_linear_params, self.down)))
        return list(zip(*(each.unbind(0) for each in ops.fold(*together))))

    def folded(self, given: Sequence[tuple[Tensor, Tensor]] | None) -> Sequence[tuple[Tensor, Tensor]]:
        """What ``fold`` gave, if it was called before, or gives now.

        Raises:
            ValueError: not a pair for each projection.
        """
        if given is None:
            return self.fold()
        if len(given) != len(self.down):
            raise ValueError(f"folded must be the {len(self.down)} pairs that fold gives, got {len(given)}")
        return given

    def widen(self, state: Tensor) -> Tensor:
        """The output (B, T, D) from the side state (B, T, r)."""
        if self.correction:
            return ops.norm_linear(state, *norm_linear_params(self.up))
        return super().widen(state)

    def pooled(
        self,
        hidden_states: Iterable[Tensor | HiddenState],
        lengths: Tensor | None = None,
        folded: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The mean of ``forward`` over each utterance's valid frames, (B, D); arguments as there, and
        ``folded``: what ``fold`` gave, if it was called before.

        Raises:
            ValueError: another number of ``folded``, or of a ``correction``.
        """
        state = self.state(hidden_states, lengths, folded)
        return ops.pooled_upsample(state, *self.pool_params(), lengths, self.relu_before_up)


class LST(_Folded, reference.LST):
    __doc__ = reference.LST.__doc__

    def state(
        self,
        hidden_states: Iterable[Tensor | HiddenState],
        lengths: Tensor | None,
        folded: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """s_L, (B, T, r); ``folded``: what ``fold`` gave, if it was called before."""
        stream, keep = self.read(hidden_states), self.saved_activations
        first_fold, *folded = self.folded(folded)
        first = next(stream)
        self.check_lengths(lengths, first.values)
        again = first.again
        state = ops.folded_linear(first.values, *first_fold, first.statistics, keep, again)
        del first
        for hidden_state, projection, rung in zip(stream, folded, self.rungs):
            parameters = (*projection, rung.gate, *_of_this_step(adapter_params(rung)))
            if again is not None and rung is self.rungs[-1]:
                keep = "exact"  # in the place of the first
            state = ops.folded_ladder(hidden_state.values, state, *parameters, hidden_state.statistics, keep)
        return state


class LadderMemory(LST, reference.LadderMemory):
    __doc__ = reference.LadderMemory.__doc__


class LadderDecoder(reference.LadderDecoder):
    __doc__ = reference.LadderDecoder.__doc__

    def project(self, index: int, hidden_state: Tensor) -> Tensor:
        """D_i, (B, U, r)."""
        return ops.norm_linear(hidden_state, *norm_linear_params(self.down[index]))

    def climb(self, *given) -> Tensor:
        """As the reference's, and computed again in the backward where there is no cache: keys and values of
        all frames, kept for every rung, would outweigh the ladder beside the encoder."""
        *_, cache, _ = given
        if cache is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().climb(*given)
        return recomputed(super().climb, *given)

    def adapt(self, rung: torch.nn.Module, state: Tensor) -> Tensor:
        """W2 gelu(W1 LN(m) + b1) + b2, (B, U, r)."""
        return ops.adapter(state, *adapter_params(rung))


class UniPT(_Folded, reference.UniPT):
    __doc__ = reference.UniPT.__doc__

    def state(
        self,
        hidden_states: Iterable[Tensor | HiddenState],
        lengths: Tensor | None,
        folded: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Z, (B, T, r); ``folded``: what ``fold`` gave, if it was called before."""
        *folded, of_anchor = self.folded(folded)
        stream, keep = self.read(hidden_states), self.saved_activations
        first = next(stream)
        self.check_lengths(lengths, first.values)
        kind, pool = self._attention
        in_slab = kind == "relu" and serves(first.values, self.side_size)
        slab = FeatureSlab(len(folded)) if in_slab else None
        project = ops.folded_linear if slab is None else slab.add
        again = first.again
        features = [project(first.values, *folded[0], first.statistics, keep, again)]
        del first
        for projection, hidden_state in zip(folded[1:], stream):
            features.append(project(hidden_state.values, *projection, hidden_state.statistics, keep))
        hidden_state = next(stream)
        keep = keep if again is None else "exact"  # in the place of the first
        anchor = ops.folded_linear(hidden_state.values, *of_anchor, hidden_state.statistics, keep)
        del hidden_state  # which need not wait for the attention
        if slab is None:
            merged = self.merge(anchor, features, lengths)
        else:
            merged = slab.attend(anchor, *linear_params(self.gate), lengths, pool)
        return anchor + ops.adapter(merged, *adapter_params(self.adapter))

    def merge(self, anchor: Tensor, features: list[Tensor], lengths: Tensor | None) -> Tensor:
        """G (B, T, r) from A and F_0 .. F_{L-1}, by ``attention``."""
        kind, pool = self._attention
        gate = linear_params(self.gate)
        if kind == "relu":
            return ops.relu_attention(anchor, *gate, features, lengths, pool)
        if kind == "linear":
            return ops.linear_attention(anchor, *gate, features, lengths)
        return super().merge(anchor, features, lengths)


class CausalUniPT(_Folded, reference.CausalUniPT):
    __doc__ = reference.CausalUniPT.__doc__

    def features(self, hidden_states: Iterable[Tensor | HiddenState]) -> list[Tensor]:
        """F_0 to F_L, each (B, U, r)."""
        return [
            ops.folded_linear(state.values, *projection, state.statistics, self.saved_activations)
            for projection, state in zip(self.fold(), self.read(hidden_states), strict=True)
        ]

    def adapt(self, merged: Tensor) -> Tensor:
        """W2 gelu(W1 LN(G) + b1) + b2, (B, U, r)."""
        return ops.adapter(merged, *adapter_params(self.adapter))


class UniPTMemory(UniPT, reference.UniPTMemory):
    __doc__ = reference.UniPTMemory.__doc__


class UniPTDecoder(CausalUniPT, reference.UniPTDecoder):
    __doc__ = reference.UniPTDecoder.__doc__

    def hear(self, features: Tensor, memory: Tensor) -> Tensor:
        """X_i, (B, U, r); the scores of all frames are made again in the backward, a few clips at a time."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().hear(features, memory)
        size = max(1, _SCORES // max(1, features.shape[1] * memory.shape[1]))
        memory = memory.expand(len(features), -1, -1)
        parts = zip(features.split(size), memory.split(size), strict=True)
        heard = [recomputed(super(UniPTDecoder, self).hear, *part) for part in parts]
        return heard[0] if len(heard) == 1 else torch.cat(heard)


class SHERL(reference.SHERL):
    __doc__ = reference.SHERL.__doc__

    def merge(
        self, hidden_states: Iterable[Tensor | HiddenState], lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """h_{L-1} (B, T, D) and the merged layers (B, T, r), from which ``widen`` makes the output."""
        features = []
        for down, hidden_state in zip(self.down, self.read(hidden_states), strict=True):
            values = hidden_state.values
            # The deepest is needed again by widen: kept once as it is, it takes what two 8-bit copies would.
            keep = "exact" if down is self.down[-1] else self.saved_activations
            parameters = _of_this_step(gated_down_params(down))
            features.append(ops.gated_down(values, *parameters, keep, hidden_state.again))
        self.check_lengths(lengths, values)
        guide = linear_params(self.guide)
        if torch.is_grad_enabled() and any(each.requires_grad for each in (*guide, *features)):
            return values, GuidanceOfOwn.apply(*guide, *features)
        return values, ops.guidance(*guide, features)

    def widen(self, hidden_state: Tensor, merged: Tensor) -> Tensor:
        """The last encoder layer's input (B, T, D) from what ``merge`` gave. Cheap: whoever backpropagates
        through that layer in parts may compute it again, as ``widen_into`` does."""
        return ops.gated_up(hidden_state, merged, *linear_params(self.out), self.gate)

    def widen_into(
        self,
        hidden_state: Tensor,
        merged: Tensor,
        run: Callable[[Tensor, slice], Tensor],
        backward: Callable[[Tensor, Tensor, slice], Tensor],
        sizes: tuple[int, int],
    ) -> Tensor:
        """A frozen function of what ``widen`` gives, a few clips at a time, for which nothing is kept but the
        arguments: the backward computes it again.

        Args:
            hidden_state, merged: what ``merge`` gave; no gradient goes to the hidden state, and that of
                ``merged`` may be written over it.
            run: of the widened (b, T, D) and the slice of the batch that it is of, without autograd; gives
                (b, ...).
            backward: of the widened, the gradient of what ``run`` gave, and the slice; gives the gradient of
                the widened.
            sizes: clips at a time, in the forward and in the backward.

        Returns:
            (B, ...).
        """
        weight, bias = _of_this_step(linear_params(self.out))
        gate = self.gate.view_as(self.gate)  # of which its tanh is made
        return WidenInto.apply(run, backward, sizes, hidden_state.detach(), merged, weight, bias, gate)

    def forward(self, hidden_states: Iterable[Tensor | HiddenState], lengths: Tensor | None = None) -> Tensor:
        return self.widen(*self.merge(hidden_states, lengths))

    forward.__doc__ = reference.SHERL.forward.__doc__
