"""Training the backbone's own weights: all of them, or the biases alone."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from ..tuning import Tuned
from .checks import check_boolean
from .tuned import TunedConfig

_CONVOLUTIONS = "Whether the encoder's conv1 and conv2 train too, which keeps their large activations."


@dataclass(kw_only=True)
class FullConfig(TunedConfig):
    """Full fine-tuning: every parameter but the encoder's positions, which are constants, in float32. The
    decoder's head is its embedding, and trains with it."""

    method: ClassVar[str] = "full"
    trains_backbone: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    train_convolutions: bool = field(default=True, metadata={"help": _CONVOLUTIONS})

    def validate(self) -> None:
        super().validate()
        check_boolean("train_convolutions", self.train_convolutions)

    def prepare(self, part: Tuned, beside: nn.Module | None = None) -> None:
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(self.trains(name) and not name.startswith(part.constants))

    def trains(self, name: str) -> bool:
        """Whether a part's parameter of this name trains, if it is no constant."""
        return self.train_convolutions or not name.startswith("conv")


@dataclass(kw_only=True)
class BitFitConfig(FullConfig):
    """BitFit (arXiv 2106.10199): the bias vectors, those of the LayerNorms included."""

    method: ClassVar[str] = "bitfit"

    def trains(self, name: str) -> bool:
        return name.endswith("bias") and super().trains(name)
