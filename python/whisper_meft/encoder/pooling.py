"""What stands in a side network's place where there is none: pooling of hidden states."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def past_end(lengths: Tensor, states: Tensor) -> Tensor:
    """(B,) valid frames to (B, T): which of the frames of ``states`` (B, T, ...) lie behind them."""
    return torch.arange(states.shape[1], device=states.device) >= lengths[:, None]


def sum_over_time(states: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, T, D) -> (B, D), the sum over each clip's valid frames, accumulated in at least float32."""
    if lengths is not None:
        states = states.masked_fill(past_end(lengths, states)[..., None], 0)
    return states.sum(1, dtype=torch.promote_types(states.dtype, torch.float32))


def mean_over_time(states: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, T, D) -> (B, D), the mean over each clip's valid frames, accumulated in at least float32."""
    if lengths is None:
        return states.mean(1, dtype=torch.promote_types(states.dtype, torch.float32))
    total = sum_over_time(states, lengths)
    return total / lengths[:, None].to(total.dtype)


class LastState(nn.Module):
    """Takes the encoder's output and nothing else; has no parameters."""

    def pooled(self, hidden_states: Iterable[Tensor], lengths: Tensor | None = None) -> Tensor:
        """The mean over time of the last of ``hidden_states``, each (B, T, D); returns (B, D), float32."""
        state = None
        for state in hidden_states:  # noqa: B007  earlier ones are freed as the next is made
            pass
        return mean_over_time(state, lengths)


class WeightedSum(nn.Module):
    """A learned softmax-weighted sum of all hidden states, as transformers' ``use_weighted_layer_sum``.

    Args:
        num_states: encoder layers + 1.
    """

    def __init__(self, num_states: int, device=None, dtype=None):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(num_states, device=device, dtype=dtype))

    def pooled(self, hidden_states: Iterable[Tensor], lengths: Tensor | None = None) -> Tensor:
        """As :meth:`LastState.pooled`, of the weighted sum. Mean over time and sum over layers commute, so
        the backward needs one vector per clip and layer."""
        means = torch.stack([mean_over_time(state, lengths) for state in hidden_states])  # (L + 1, B, D)
        return torch.einsum("l,lbd->bd", self.weights.softmax(0).to(means.dtype), means)
