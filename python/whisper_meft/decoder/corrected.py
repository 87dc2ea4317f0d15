"""A frozen decoder with a side network that reads its hidden states token by token and corrects its output.

    x = LN(d_L) + Wu LN(s_L) + bu        (LST and UniPT; d_0 the embedded token, d_i the output of layer i)
    x = LN(Layer_L(SHERL(d_0 .. d_{L-1})))

No token sees the ones behind it: LST and SHERL look at each alone, UniPT's attention is causal, and so is
that of LST where it listens to a ladder beside the encoder. Keys of earlier tokens are kept in the cache of
the generation, as further layers beside the decoder's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from meft_kernels import SHERL, CausalUniPT, LadderDecoder, UniPTDecoder
from meft_kernels.recomputing import recomputed

from ..errors import UserError
from .chunked import keeps_much
from .frozen import FrozenDecoder


class CorrectedDecoder:
    """Makes Hugging Face decoders whose output a side network corrects.

    Args:
        decoder: the frozen one. side_network: reads its hidden states.
        clips: of a training step, of which each call has some: where the last layer of all would keep much
            for the backward, it is computed again there.
    """

    def __init__(self, decoder: FrozenDecoder, side_network: nn.Module, clips: int = 0):
        self.decoder = decoder
        self.side_network = side_network
        self.clips = clips

    def whisper_decoder(self) -> nn.Module:
        """The decoder for one call, or for a whole generation. Where gradients are enabled when it is called,
        they reach the side network and nothing below it."""
        return _Reading(self).whisper_decoder


class _Reading:
    """The hidden states of the tokens of one call, on their way to the side network."""

    def __init__(self, corrected: CorrectedDecoder):
        self.decoder, self.side_network = corrected.decoder, corrected.side_network
        self.clips = corrected.clips
        self.memory: Tensor | None = None
        self.states: list[Tensor] = []
        self.cache: Any = None
        self.mask: Tensor | None = None
        self.with_gradient = False
        through_last = isinstance(self.side_network, SHERL)
        self.whisper_decoder = self.decoder.around(
            self._layer,
            last=self._last_layer if through_last else None,
            norm=None if through_last else self._norm,
        )
        self.whisper_decoder.forward = _Begun(self, self.whisper_decoder)

    def begin(self, mask: Tensor | None) -> None:
        self.states, self.cache, self.mask = [], None, mask
        self.memory = None
        self.with_gradient = torch.is_grad_enabled()

    def _layer(self, layer: nn.Module, states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.states.append(states.detach())
        self.cache = options.get("past_key_values")
        mask, heard, *others = arguments
        width = states.shape[-1]
        if heard.shape[-1] > width:
            self.memory, heard = heard[..., width:], heard[..., :width]
        arguments = (mask, heard, *others)
        with torch.no_grad():
            return layer(states, *arguments, **options)

    def _last_layer(self, layer: nn.Module, states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.states.append(states.detach())
        with torch.set_grad_enabled(self.with_gradient):
            merged, heard = self.side_network(self.states), arguments[1]
            self.states = []  # which this object, being in a circle, would hold until it is collected
            keeps = merged.requires_grad and not torch.compiler.is_compiling()
            if keeps and keeps_much(self.decoder, self.clips, *heard.shape[1:], layers=1):
                return recomputed(layer, merged, *arguments, **options)
            return layer(merged, *arguments, **options)

    def _norm(self, norm: nn.Module, states: Tensor) -> Tensor:
        self.states.append(states.detach())
        with torch.no_grad():
            output = norm(states)
        with torch.set_grad_enabled(self.with_gradient):
            return output + self.side_network.widen(self._state())

    def _state(self) -> Tensor:
        valid = None if self.mask is None else self.mask.bool()
        if isinstance(self.side_network, LadderDecoder):
            cache = None if self.cache is None else self._keys_and_values
            return self.side_network.state(self.states, None, self.memory, cache, valid)
        if not isinstance(self.side_network, CausalUniPT):
            return self.side_network.state(self.states, None)
        past = None if self.cache is None else self._with_earlier_tokens
        options = {"memory": self.memory} if isinstance(self.side_network, UniPTDecoder) else {}
        return self.side_network.state(self.states, None, past=past, valid=valid, **options)

    def _with_earlier_tokens(self, features: list[Tensor]) -> list[Tensor]:
        """Features (B, U, r) of these tokens to (B, K, r) of all so far, by the cache of the generation,
        which follows beams and cuts by itself."""
        found = []
        for index, feature in enumerate(features):
            layer = self._cache_layer(self.cache.self_attention_cache, index)
            keys, _ = layer.update(feature[:, None], feature[:, None, :, :0])
            found.append(keys[:, 0])
        return found

    def _keys_and_values(
        self, rung: int, listens: bool, make: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """As ``LadderDecoder.state`` asks for them."""
        if not listens:
            return self._cache_layer(self.cache.self_attention_cache, rung).update(*make())
        layer = self._cache_layer(self.cache.cross_attention_cache, rung)
        return (layer.keys, layer.values) if layer.get_seq_length() else layer.update(*make())

    def _cache_layer(self, cache: DynamicCache, index: int) -> DynamicLayer:
        """The layer of a cache that is the side network's, behind those of the decoder."""
        if cache.layers[0].is_compileable:  # of a fixed length: its empty places would be looked at
            raise UserError(
                "cache_implementation must be None or 'dynamic' for a side network that keeps something of "
                f"earlier tokens, got a cache of {type(cache.layers[0]).__name__}"
            )
        index += self.decoder.num_layers
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        return cache.layers[index]


class _Begun:
    """A decoder's ``forward`` that first forgets the tokens of the call before."""

    def __init__(self, reading: _Reading, decoder: nn.Module):
        self.reading, self._forward = reading, type(decoder).forward.__get__(decoder)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.reading.begin(options.get("attention_mask"))
        return self._forward(*arguments, **options)
