"""A Whisper decoder that trains, wholly or in part."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from ..tuning import Tuned
from .frozen import Around, FrozenDecoder


class TunedDecoder(Tuned, FrozenDecoder):
    """A :class:`FrozenDecoder` with trained parameters.

    Where the embedding trains the head does, which is the same weight. Dropout is active in training mode,
    where the backbone's config has any; LayerDrop is not. For number formats see
    :class:`whisper_meft.tuning.Tuned`.

    Args:
        whisper: as for :class:`FrozenDecoder`; its modules are changed in place.
        dtype: number format of the frozen weights, ``None`` keeps it.
        prepare: unfreezes parameters and puts trained modules in, see
            :meth:`whisper_meft.tuning.Tuned.prepare`.
    """

    recomputes = False

    def __init__(
        self,
        whisper: WhisperForConditionalGeneration,
        dtype: torch.dtype | None,
        prepare: Callable[["TunedDecoder"], None],
    ):
        super().__init__(whisper, dtype)
        self.prepare(prepare)

    def around(self, *functions: Callable | None, **named: Callable | None) -> nn.Module:
        decoder: Any = super().around(*functions, **named)  # in evaluation mode: no LayerDrop
        if self.training and self.config.dropout:
            decoder.layers[0] = Around(decoder.layers[0], self._after_dropout)
        return decoder

    def _after_dropout(self, layer: nn.Module, states: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """The first layer on embedded tokens of which dropout has taken some."""
        return layer(nn.functional.dropout(states, self.config.dropout), *arguments, **options)

    def weights_as_they_are(self, device: torch.device) -> AbstractContextManager:
        return self.masters_autocast(device) or super().weights_as_they_are(device)
