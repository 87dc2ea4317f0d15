"""The head alone, on the last or on a weighted sum of all hidden states of a frozen encoder."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..encoder.pooling import LastState, WeightedSum
from .base import MeftConfig


@dataclass(kw_only=True)
class HeadConfig(MeftConfig):
    """Only the head trains, on the output of the frozen encoder."""

    method: ClassVar[str] = "head"
    final_norm: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return LastState()


@dataclass(kw_only=True)
class WeightedSumConfig(HeadConfig):
    """A learned softmax-weighted sum of all hidden states of the frozen encoder, and the head."""

    method: ClassVar[str] = "weighted_sum"
    can_merge: ClassVar[bool] = False

    def build_side_network(self, hidden_size: int, num_layers: int, **place: Any) -> nn.Module:
        return WeightedSum(num_layers + 1, **place)
