"""Layers that take the place of one of the backbone's linear layers and add something trained to it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class WrappedLinear(nn.Module):
    """A frozen linear layer, ``base_layer``, with something added by a subclass."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Tensor:
        """The frozen weight: attention code looks at its type."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias


def for_masters(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` in the type of the trained ``weight``, unless autocast will see to the types."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def wrap_linears(part: nn.Module, names: Iterable[str], wrap: Callable[[nn.Linear], WrappedLinear]) -> None:
    """Puts ``wrap(linear)`` in the place of the linear layers called ``names`` in every layer of an encoder
    or decoder."""
    names = set(names)
    for layer in part.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if name in names:
                    setattr(parent, name, wrap(child))
