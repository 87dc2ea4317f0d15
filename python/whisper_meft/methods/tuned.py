"""What the methods that train inside the encoder have in common."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..encoder.frozen import FrozenEncoder
from ..encoder.pooling import LastState
from ..encoder.tuned import TunedEncoder
from .base import MeftConfig


@dataclass(kw_only=True)
class TunedEncoderConfig(MeftConfig):
    """Options of the methods that train inside the encoder, and so backpropagate through it."""

    frozen_encoder: ClassVar[bool] = False
    final_norm: ClassVar[bool] = True

    def build_encoder(self, whisper_encoder: nn.Module) -> FrozenEncoder:
        dtype = self.backbone_dtype
        if self.trains_backbone and next(whisper_encoder.parameters()).dtype != torch.float64:
            dtype = "float32"
        return TunedEncoder(whisper_encoder, dtype, self.prepare_encoder)

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return LastState()

    def prepare_encoder(self, encoder: TunedEncoder) -> None:
        """Unfreezes parameters of a frozen encoder, or puts trained modules into it."""
        raise NotImplementedError
