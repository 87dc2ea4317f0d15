"""The frozen decoder's hidden states of transcripts, computed ahead: making and correcting them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from meft_kernels import CausalUniPT, HiddenState, LadderDecoder

from .frozen import FrozenDecoder


def token_states(
    decoder: FrozenDecoder, input_ids: Tensor, encoder_output: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """d_0 to d_L of every token: the embedding and the raw output of each layer.

    Args:
        input_ids: (B, U) token numbers. encoder_output: (B, T, D), what the decoder hears.
        mask: (B, U), 0 for padding on the left.

    Returns:
        L + 1 tensors (B, U, D), without gradient.
    """
    states: list[Tensor] = []

    def layer(module: nn.Module, given: Tensor, *arguments: Any, **options: Any) -> Tensor:
        states.append(given)
        return module(given, *arguments, **options)

    def norm(module: nn.Module, given: Tensor) -> Tensor:
        states.append(given)
        return given

    with torch.no_grad():
        decoder.run(decoder.around(layer, norm=norm), input_ids, encoder_output, mask)
    return states


def corrected_of_tokens(
    decoder: FrozenDecoder,
    side_network: nn.Module,
    states: Iterable[Tensor | HiddenState | None],
    mask: Tensor | None = None,
    memory: Tensor | None = None,
) -> Tensor:
    """LN(d_L) plus what ``side_network`` (LST or UniPT beside the decoder) makes of the tokens' states, as
    :class:`whisper_meft.decoder.corrected.CorrectedDecoder` gives it, without running the backbone.

    Args:
        states: (B, U, D) of d_0 to d_L; None for one that is not read. mask: (B, U), 0 for padding.
        memory: (B, T, r), what a ``LadderDecoder`` listens to.

    Returns:
        (B, U, D).
    """
    states = list(states)
    last = states[-1].values if isinstance(states[-1], HiddenState) else states[-1]
    with decoder.weights_as_they_are(last.device):
        with torch.no_grad():
            output = decoder.layer_norm(last)
        options = {}
        if isinstance(side_network, CausalUniPT | LadderDecoder):  # where tokens look at others
            options["valid"] = None if mask is None else mask.bool()
        if memory is not None:
            options["memory"] = memory
        return output + side_network.widen(side_network.state(states, None, **options))
