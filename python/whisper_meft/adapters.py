"""Bottleneck adapters inside the encoder (Houlsby et al., arXiv 1902.00751)."""

from torch import Tensor, nn

from .wrapping import WrappedLinear, for_masters, wrap_linears


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

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        inner = nn.functional.gelu(self.down(for_masters(y, self.down.weight)))
        return y + self.up(inner).to(y.dtype)


def add_adapters(encoder: nn.Module, adapter_dim: int, dtype) -> None:
    """An adapter after the attention and one after the feed-forward block of every layer."""
    wrap_linears(encoder, ("out_proj", "fc2"), lambda linear: BottleneckAdapter(linear, adapter_dim, dtype))
