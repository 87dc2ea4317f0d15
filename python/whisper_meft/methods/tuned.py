"""What the methods that train inside the backbone have in common."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import WhisperForConditionalGeneration

from ..decoder.frozen import FrozenDecoder
from ..decoder.tuned import TunedDecoder
from ..encoder.dtypes import parse_dtype
from ..encoder.frozen import FrozenEncoder
from ..encoder.pooling import LastState
from ..encoder.tuned import TunedEncoder
from ..errors import UserError
from .base import MeftConfig
from .wrapping import switched_off

TARGETS = ("encoder", "decoder", "both")


class _UnlessTuned:
    """``frozen_encoder``: of options whose target is the decoder alone; of the method itself not."""

    def __get__(self, options: "TunedConfig | None", owner: type) -> bool:
        return options is not None and options.target == "decoder"


@dataclass(kw_only=True)
class TunedConfig(MeftConfig):
    """Options of the methods that train inside the backbone, and so backpropagate through it."""

    frozen_encoder: ClassVar[bool] = _UnlessTuned()
    final_norm: ClassVar[bool] = True
    transcribes: ClassVar[bool] = True

    target: str | None = field(
        default=None,
        metadata={
            "help": "What trains of a recogniser: 'encoder', 'decoder' or 'both'; unset is both. A "
            "classifier has an encoder alone."
        },
    )

    def validate(self) -> None:
        super().validate()
        if self.target not in (None, *TARGETS):
            accepted = " or ".join(map(repr, TARGETS))
            raise UserError(f"target must be None, {accepted}, got {self.target!r}")

    def build_encoder(self, whisper_encoder: nn.Module) -> FrozenEncoder:
        dtype = self._dtype(whisper_encoder)
        if self.frozen_encoder:
            return FrozenEncoder(whisper_encoder, dtype, self.backbone_quantization)
        return TunedEncoder(whisper_encoder, dtype, self.prepare)

    def build_decoder(self, whisper: WhisperForConditionalGeneration, encoder: nn.Module) -> FrozenDecoder:
        dtype = parse_dtype(self._dtype(whisper.model.decoder))
        if self.target == "encoder":
            return FrozenDecoder(whisper, dtype)
        return TunedDecoder(whisper, dtype, lambda decoder: self.prepare(decoder, encoder))

    def _dtype(self, part: nn.Module) -> str | None:
        if self.trains_backbone and next(part.parameters()).dtype != torch.float64:
            return "float32"
        return self.backbone_dtype

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return LastState()

    def switched_off(self, tuned: nn.Module) -> AbstractContextManager[None]:
        if self.trains_backbone:
            raise UserError(
                "disable_adapter is for methods that leave the backbone's own weights as they are, "
                f"{self.method} trains them: load the backbone anew"
            )
        return switched_off(tuned)

    def prepare(self, part: TunedEncoder | TunedDecoder, beside: nn.Module | None = None) -> None:
        """Unfreezes parameters of a frozen encoder or decoder, or puts trained modules into it.

        Args:
            part: what trains. beside: of a decoder the encoder, prepared before if it trains too.
        """
        raise NotImplementedError
