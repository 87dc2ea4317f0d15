"""Layers that take the place of one of the backbone's linear layers and add something trained to it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WrappedLinear(nn.Module):
    """A frozen linear layer, ``base_layer``, with what a subclass adds to its output; switched off and on as
    the layers of peft are."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.disable_adapters = False

    def enable_adapters(self, enabled: bool) -> None:
        """Whether something is added from now on."""
        self.disable_adapters = not enabled

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y if self.disable_adapters else y + self.added(x, y)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added, in the type of ``y``: the frozen layer's output for ``x``."""
        raise NotImplementedError

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


@contextmanager
def switched_off(tuned: nn.Module) -> Iterator[None]:
    """Until it is left, the layers in ``tuned`` that took a frozen one's place, ours and peft's, do what that
    did."""
    layers = [each for each in tuned.modules() if hasattr(each, "base_layer")]
    before = [each.disable_adapters for each in layers]
    # peft freezes what it switches off, and would unfreeze all of it behind that.
    trained = [(parameter, parameter.requires_grad) for parameter in tuned.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, off in zip(layers, before):
            layer.enable_adapters(not off)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
