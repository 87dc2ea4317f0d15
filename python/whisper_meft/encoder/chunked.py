"""A frozen encoder and what reads it, run over a batch in chunks inside one step.

No method mixes utterances, so a chunk's result is the same as in the whole batch, and so are the gradients,
to the rounding of a sum in another order. The backbone's transients then cost memory for one chunk alone.

On a GPU, where every kernel costs the host as much however little it does, what reads the hidden states takes
a slab of many chunks at a time: the encoder writes each hidden state of a slab chunk by chunk, and side
network, forward and backward, launches what it launches once per layer and slab. On a CPU a slab is a chunk:
what the cache holds decides there.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meft_kernels import HiddenState
from meft_kernels.reference.stand_in import device_type

from .frozen import FrozenEncoder
from .pooling import StatisticsOf, mean_over_time

# A chunk holds so many elements of the feed-forward block's inner width: on a GPU enough to fill it, on a CPU
# about one utterance of 30 seconds, which uses the cache best.
_INNER_ELEMENTS = {"cpu": 2**23}

_DEFAULT_INNER_ELEMENTS = 3 * 2**24

# What a side network's backward may hold for a slab, in bytes, beside what was kept for it.
_SLAB_BYTES = 9 * 2**25

# Row statistics come for free with the LayerNorm that the next layer begins with, whose output has to wait
# for that layer then: worth so many bytes.
_WAITING_BYTES = 2**27

# Backpropagating through a layer keeps about four times as much as running it. Where hidden states are kept
# as they are, a GPU has room for half of that: fewer clips at a time would be more launches.
_BACKWARD_SHARE = 4

# What SHERL's last layer may keep for its backward, in bytes, before it is computed again instead; a layer
# keeps about so many tensors of the backbone's width.
_KEPT_BYTES = 2**28

_KEPT_TENSORS = 16


def automatic_chunk(encoder: FrozenEncoder, frames: int, device: torch.device) -> int:
    """Utterances per chunk for clips of so many encoder frames."""
    inner = encoder.layers[0].fc1.out_features * max(frames, 1)
    return max(1, _INNER_ELEMENTS.get(device_type(device), _DEFAULT_INNER_ELEMENTS) // inner)


def automatic_slab(
    side_network: nn.Module, frames: int, clips: int, chunk: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Utterances that a side network takes at a time, of ``clips`` of so many encoder frames; ``chunk``:
    those that the backbone takes. ``dtype``: of the hidden states.

    A slab is 1, 2, 4, ... chunks: what is freed of one size is then of use for the others, where CUDA's
    allocator would keep odd remainders for nothing."""
    if device_type(device) == "cpu" or not hasattr(side_network, "backward_bytes"):
        return chunk
    most = _SLAB_BYTES // (side_network.backward_bytes(dtype.itemsize) * max(frames, 1))
    return max(1, min(clips, chunk << max(most // chunk, 1).bit_length() - 1))


def pooled_in_chunks(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    features: Tensor,
    lengths: Tensor | None,
    chunk_size: int | None = None,
    final_norm: bool = False,
    through_last_layer: bool = False,
    taken: StatisticsOf | None = None,
) -> Tensor:
    """Mean over time of what a side network (or another reader of hidden states) makes of a batch.

    Args:
        encoder: the backbone. side_network: has ``pooled(hidden_states, lengths)``, or is a SHERL.
        features: (B, mel bins, frames) log-mel. lengths: (B,) valid encoder frames, or None for all.
        chunk_size: utterances per chunk; None chooses. Whole batches are compiled, unless it is set.
        final_norm: read h_L after the encoder's final LayerNorm.
        through_last_layer: the output of ``side_network`` goes through the frozen last layer (SHERL).
        taken: takes statistics of the hidden states that pass by.

    Returns:
        (B, D), in the type that ``pooled`` gives.

    Raises:
        UserError: see :meth:`FrozenEncoder.stream`.
    """
    clips, frames = features.shape[0], (features.shape[-1] + 1) // 2
    slab = chunk_size
    if chunk_size is None and not torch.compiler.is_compiling():
        chunk_size = automatic_chunk(encoder, frames, features.device)
        slab = automatic_slab(side_network, frames, clips, chunk_size, encoder.dtype, features.device)
    fold = getattr(side_network, "fold", None)
    if fold is not None:  # once for all chunks
        read = partial(side_network.pooled, folded=fold())
    elif through_last_layer:
        read = partial(_through_last_layer, encoder, side_network, clips)
    else:
        read = side_network.pooled
    keeps = torch.is_grad_enabled() and getattr(side_network, "saved_activations", None) == "exact"
    waiting = 0
    if slab != chunk_size:
        waiting = slab * frames * encoder.hidden_size * encoder.dtype.itemsize
    statistics = fold is not None and (not waiting or (keeps and waiting <= _WAITING_BYTES))
    reading = (final_norm, statistics, chunk_size, not keeps)

    def run(features: Tensor, lengths: Tensor | None) -> Tensor:
        states = encoder.stream(features, lengths, *reading)
        return read(states if taken is None else taken.watch(states, lengths), lengths)

    if slab is None or clips <= slab:
        return run(features, lengths)
    pooled = []
    for start in range(0, clips, slab):
        of_part = None if lengths is None else lengths[start : start + slab]
        pooled.append(run(features[start : start + slab], of_part))
    return torch.cat(pooled)


def pooled_states(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    hidden_states: Iterable[Tensor | HiddenState],
    lengths: Tensor | None = None,
    through_last_layer: bool = False,
) -> Tensor:
    """As :func:`pooled_in_chunks`, of hidden states that are there already, the whole batch at once."""
    if through_last_layer:
        return _through_last_layer(encoder, side_network, None, hidden_states, lengths)
    return side_network.pooled(hidden_states, lengths)


def _through_last_layer(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    whole_batch: int | None,
    hidden_states: Iterable[Tensor | HiddenState],
    lengths: Tensor | None,
) -> Tensor:
    """SHERL and the mean over time of the frozen last layer's output. Of a large batch that layer is computed
    again for the backward, a few utterances at a time: kept, it would outweigh the side network.

    Args:
        whole_batch: utterances of the step, of which these are some; None: these are all.
    """
    deepest, merged = side_network.merge(hidden_states, lengths)

    def last(deepest: Tensor, merged: Tensor, lengths: Tensor | None) -> Tensor:
        return mean_over_time(encoder.last_layer(side_network.widen(deepest, merged), lengths), lengths)

    batch, frames, width = deepest.shape
    size = batch
    if not torch.compiler.is_compiling():
        kept = (whole_batch or batch) * frames * width * deepest.itemsize * _KEPT_TENSORS
        if not torch.is_grad_enabled() or kept <= _KEPT_BYTES:
            return last(deepest, merged, lengths)
        roomy = device_type(deepest.device) != "cpu" and side_network.saved_activations == "exact"
        share = _BACKWARD_SHARE // 2 if roomy else _BACKWARD_SHARE
        size = max(1, automatic_chunk(encoder, frames, deepest.device) // share)
    elif not torch.is_grad_enabled():
        return last(deepest, merged, lengths)
    parts = []
    for start in range(0, max(batch, 1), max(size, 1)):
        part = slice(start, start + size)
        arguments = (deepest[part], merged[part], None if lengths is None else lengths[part])
        parts.append(checkpoint(last, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts)
