"""A Whisper decoder that trains, wholly or in part."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import WhisperForConditionalGeneration

from ..tuning import Tuned
from .frozen import FrozenDecoder


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
        decoder: Any = super().around(*functions, **named)
        decoder.training, decoder.layerdrop = self.training, 0.0
        return decoder

    def weights_as_they_are(self, device: torch.device) -> AbstractContextManager:
        return self.masters_autocast(device) or super().weights_as_they_are(device)
