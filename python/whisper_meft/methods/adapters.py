"""Bottleneck adapters inside the backbone (Houlsby et al., arXiv 1902.00751)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from .checks import check_positive_int
from .tuned import TunedConfig
from .wrapping import WrappedLinear, for_masters, wrap_linears


@dataclass(kw_only=True)
class AdapterConfig(TunedConfig):
    """Bottleneck adapters (arXiv 1902.00751) after each block of each layer: attention (of a decoder both,
    to itself and to the encoder) and feed-forward."""

    method: ClassVar[str] = "adapter"

    adapter_dim: int = field(default=64, metadata={"help": "Inner width of each adapter."})

    def validate(self) -> None:
        super().validate()
        check_positive_int("adapter_dim", self.adapter_dim)

    def prepare(self, part: nn.Module, beside: nn.Module | None = None) -> None:
        add_adapters(part, self.adapter_dim, torch.float32)


class BottleneckAdapter(WrappedLinear):
    """y = linear(x), then y + W2 gelu(W1 y + b1) + b2 with W2, b2 zero at the start.

    Args:
        base_layer: the last linear layer of an attention or feed-forward block, so that the adapter sits
            between the block and the residual sum.
        adapter_dim: width of the bottleneck. dtype: of the adapter's parameters.
    """

    def __init__(self, base_layer: nn.Linear, adapter_dim: int, dtype=None):
        super().__init__(base_layer)
        place = {"device": base_layer.weight.device, "dtype": dtype}
        self.down = nn.Linear(base_layer.out_features, adapter_dim, **place)
        self.up = nn.Linear(adapter_dim, base_layer.out_features, **place)
        nn.init.normal_(self.down.weight, std=0.02)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        inner = nn.functional.gelu(self.down(for_masters(y, self.down.weight)))
        return self.up(inner).to(y.dtype)


def add_adapters(part: nn.Module, adapter_dim: int, dtype) -> None:
    """An adapter after every attention and feed-forward block of every layer."""
    wrap_linears(part, ("out_proj", "fc2"), lambda linear: BottleneckAdapter(linear, adapter_dim, dtype))
