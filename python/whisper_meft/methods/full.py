"""Training the encoder's own weights: all of them, or the biases alone."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..encoder.tuned import TunedEncoder
from .checks import check_boolean
from .tuned import TunedEncoderConfig

_CONVOLUTIONS = "Whether conv1 and conv2 train too, which keeps their large activations."


@dataclass(kw_only=True)
class FullConfig(TunedEncoderConfig):
    """Full fine-tuning: every parameter of the encoder but its positions, which are constants, in float32."""

    method: ClassVar[str] = "full"
    trains_backbone: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    train_convolutions: bool = field(default=True, metadata={"help": _CONVOLUTIONS})

    def validate(self) -> None:
        super().validate()
        check_boolean("train_convolutions", self.train_convolutions)

    def prepare_encoder(self, encoder: TunedEncoder) -> None:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(self.trains(name))

    def trains(self, name: str) -> bool:
        """Whether the encoder's parameter of this name trains."""
        if name.startswith("conv"):
            return self.train_convolutions
        return not name.startswith("embed_positions")


@dataclass(kw_only=True)
class BitFitConfig(FullConfig):
    """BitFit (arXiv 2106.10199): the encoder's bias vectors, those of its LayerNorms included."""

    method: ClassVar[str] = "bitfit"

    def trains(self, name: str) -> bool:
        return name.endswith("bias") and super().trains(name)
