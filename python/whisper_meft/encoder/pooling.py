"""Pooling of hidden states: what stands in a side network's place where there is none, and statistics."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from meft_kernels import HiddenState

POOLINGS = ("mean", "statistics")

# So many elements of a hidden state are normalised at a time for its statistics.
_ELEMENTS = 2**24

# A running statistic forgets slowly what is more clips ago: what trains moves what is standardised.
_HORIZON = 512


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


def mean_and_deviation_at_once(states: Tensor, lengths: Tensor | None) -> Tensor:
    """As :func:`mean_and_deviation`, in memory for the whole batch."""
    values = states.to(torch.promote_types(states.dtype, torch.float32))
    values = nn.functional.layer_norm(values, values.shape[-1:])
    mean = mean_over_time(values, lengths)
    variance = mean_over_time((values - mean[:, None]).square(), lengths)
    return torch.cat([mean, (variance + 1e-6).sqrt()], dim=-1)


def mean_and_deviation(states: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, T, D) -> (B, 2 D), mean and standard deviation over each clip's valid frames of the frames' values
    after a LayerNorm without parameters (whatever channel carries their energy), in at least float32."""
    size = max(1, _ELEMENTS // max(states[0].numel() if len(states) else 1, 1))
    parts = []
    for start in range(0, max(len(states), 1), size):
        part, valid = states[start : start + size], None if lengths is None else lengths[start : start + size]
        parts.append(mean_and_deviation_at_once(part, valid))
    return torch.cat(parts)


class StatisticsOf:
    """Takes :func:`mean_and_deviation` of one of the hidden states that pass by.

    Args:
        index: of that state in a stream.
    """

    def __init__(self, index: int):
        self.index = index
        self._parts: list[Tensor] = []

    def watch(
        self, states: Iterable[Tensor | HiddenState | None], lengths: Tensor | None
    ) -> Iterator[Tensor | HiddenState | None]:
        """Yields ``states`` as they are, of some clips of the batch; ``lengths``: their valid frames."""
        for index, state in enumerate(states):
            if index == self.index:
                values = state.values if isinstance(state, HiddenState) else state
                self._parts.append(mean_and_deviation(values, lengths))
            yield state

    def taken(self) -> Tensor:
        """(B, 2 D), of all clips that passed by, in their order."""
        return torch.cat(self._parts)


class RunningStandardisation(nn.Module):
    """Subtracts the running mean of each feature and divides by its running deviation.

    Both are of the clips seen in training, this batch included, with equal weights up to the last 512 and
    then falling: a batch of one clip does, and the result in evaluation depends on no other clip. They have
    no gradient, and nothing here trains. Before any training it changes nothing.

    Args:
        size: number of features F.
    """

    def __init__(self, size: int, device=None, dtype=None):
        super().__init__()
        self.register_buffer("clips", torch.zeros((), device=device, dtype=dtype))
        self.register_buffer("mean", torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("variance", torch.ones(size, device=device, dtype=dtype))

    def forward(self, values: Tensor, follow: bool = True) -> Tensor:
        """(B, F) -> (B, F); in training mode the statistics follow ``values``, unless told not to."""
        if follow and self.training and len(values):
            self._follow(values)
        return (values - self.mean) * (self.variance + 1e-6).rsqrt()

    @torch.no_grad()
    def _follow(self, values: Tensor) -> None:
        new = len(values)
        share = new / (self.clips + new).clamp(max=max(_HORIZON, new))
        mean, variance = values.mean(0), values.var(0, correction=0)
        between = (mean - self.mean).square() * share * (1 - share)
        # In place: whoever keeps several processes' buffers alike has noted these; autograd keeps none.
        self.variance.copy_((1 - share) * self.variance + share * variance + between)
        self.mean.lerp_(mean, share)
        self.clips.add_(new)
