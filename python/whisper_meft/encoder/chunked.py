"""A frozen encoder and what reads it, run over a batch in chunks inside one step.

No method mixes utterances, so a chunk's result is the same as in the whole batch, and so are the gradients,
to the rounding of a sum in another order. The backbone's transients then cost memory for one chunk alone.

On a GPU, where every kernel costs the host as much however little it does, a side network takes the batch in
one slab: the encoder writes each hidden state of it chunk by chunk, and side network, forward and backward,
launches what it launches once per layer. On a CPU a slab is a chunk: what the cache holds decides there.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meft_kernels import HiddenState
from meft_kernels.reference.modules import SideNetwork
from meft_kernels.reference.stand_in import device_type

from .frozen import FrozenEncoder
from .last_layer import pooled_through_last_layer, states_through_last_layer
from .pooling import StatisticsOf

# A chunk holds so many elements of the feed-forward block's inner width: on a GPU enough to fill it, on a CPU
# about one utterance of 30 seconds, which uses the cache best.
_INNER_ELEMENTS = {"cpu": 2**23}

_DEFAULT_INNER_ELEMENTS = 3 * 2**24

# Row statistics come for free with the LayerNorm that the next layer begins with, whose output has to wait
# for that layer then: worth so many bytes.
_WAITING_BYTES = 2**27

# A correction is widened for so many bytes of the encoder's output at a time.
_WIDE_BYTES = 2**26

# What SHERL's last layer may keep for its backward, in bytes, before it is computed again instead; a layer
# keeps about so many tensors of the backbone's width.
_KEPT_BYTES = 2**28

_KEPT_TENSORS = 16

# Its backward then goes over as many clips at a time as hold a ninth of what is kept of the hidden states,
# two ninths while that is no more than so many bytes, or the least so many: smaller parts would be more
# launches. On a CPU it is a fourth of a chunk.
_BACKWARD_OF_KEPT = 9

_MORE_BACKWARD_BYTES = 2**29

_LEAST_BACKWARD_BYTES = 2**27

_BACKWARD_SHARE = 4


def automatic_chunk(encoder: FrozenEncoder, frames: int, device: torch.device) -> int:
    """Utterances per chunk for clips of so many encoder frames."""
    inner = encoder.layers[0].fc1.out_features * max(frames, 1)
    return max(1, _INNER_ELEMENTS.get(device_type(device), _DEFAULT_INNER_ELEMENTS) // inner)


def automatic_slab(side_network: nn.Module, clips: int, chunk: int, device: torch.device) -> int:
    """Utterances that a side network takes at a time, of so many ``clips``; ``chunk``: those that the
    backbone takes."""
    on_cpu = device_type(device) == "cpu"
    return max(1, clips) if not on_cpu and isinstance(side_network, SideNetwork) else chunk


def automatic_backward_part(
    encoder: FrozenEncoder, side_network: nn.Module, clips: int, states: Tensor
) -> int | None:
    """Utterances per part of SHERL's last layer in the backward, of a step of ``clips``; ``states``
    (..., T, D): of some of them. None: all, and what the layer keeps is kept."""
    frames, width, itemsize = max(states.shape[-2], 1), states.shape[-1], states.itemsize
    if clips * frames * width * itemsize * _KEPT_TENSORS <= _KEPT_BYTES:
        return None
    if device_type(states.device) == "cpu":
        return max(1, automatic_chunk(encoder, frames, states.device) // _BACKWARD_SHARE)
    exact = side_network.saved_activations == "exact"
    # The last one as it is, and in 8 bits those between it and the first, which is made again.
    copies = side_network.num_layers * itemsize if exact else max(side_network.num_layers - 2, 0)
    kept = clips * frames * width * (copies + itemsize)
    # At most the layer holds seven tensors of the backbone's width and one and a half of its inner width or,
    # where queries, keys and values are computed again, four and two.
    inner = encoder.layers[-1].fc1.out_features
    held = frames * itemsize * (7 * width + 3 * inner // 2 if exact else 4 * width + 2 * inner)
    share = kept // _BACKWARD_OF_KEPT
    return max(1, max(share, min(2 * share, _MORE_BACKWARD_BYTES), _LEAST_BACKWARD_BYTES) // held)


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
    read = pooling(encoder, side_network, features.shape[0], through_last_layer)
    pooled = []
    for states, of_part in _slabs(encoder, side_network, features, lengths, chunk_size, final_norm):
        pooled.append(read(states if taken is None else taken.watch(states, of_part), of_part))
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled)


def pooling(
    encoder: FrozenEncoder, side_network: nn.Module, clips: int, through_last_layer: bool = False
) -> Callable[[Iterable[Tensor | HiddenState | None], Tensor | None], Tensor]:
    """What makes the (b, D) of :func:`pooled_in_chunks` of the hidden states and the lengths of some of the
    ``clips`` of a step."""
    fold = getattr(side_network, "fold", None)
    if fold is not None:  # once for all chunks
        return partial(side_network.pooled, folded=fold())
    if through_last_layer:
        return partial(_pooled_through_last_layer, encoder, side_network, clips)
    return side_network.pooled


def corrected_in_chunks(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    features: Tensor,
    lengths: Tensor | None,
    chunk_size: int | None = None,
    through_last_layer: bool = False,
) -> Iterator[Tensor]:
    """The encoder's output with a side network's correction, for a decoder to read: LN(h_L) plus what
    ``side_network`` makes of the hidden states, or, of a SHERL, the frozen last layer's output for its input.

    Args:
        as :func:`pooled_in_chunks`.

    Yields:
        (b, T, D) of some of the clips, in order, in the type of the hidden states.
    """
    read = correcting(encoder, side_network, features.shape[0], through_last_layer)
    for states, of_part in _slabs(encoder, side_network, features, lengths, chunk_size, False):
        yield from read(states, of_part)


def heard_beside(
    encoder: FrozenEncoder,
    memory: nn.Module,
    features: Tensor,
    lengths: Tensor | None,
    chunk_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The encoder's own output, without gradient, and what a side network hears beside it.

    Args:
        memory: a ``meft_kernels.LadderMemory`` or ``UniPTMemory``.
        encoder, features, lengths, chunk_size: as for :func:`pooled_in_chunks`.

    Yields:
        (b, T, D) and (b, T, r) of some of the clips, in order.
    """
    read = hearing(encoder, memory)
    for states, of_part in _slabs(encoder, memory, features, lengths, chunk_size, False, True):
        yield from read(states, of_part)


def correcting(
    encoder: FrozenEncoder, side_network: nn.Module, clips: int, through_last_layer: bool = False
) -> Callable[[Iterable[Tensor | HiddenState | None], Tensor | None], Iterator[Tensor]]:
    """What makes :func:`corrected_in_chunks`'s parts of the hidden states and the lengths of some of the
    ``clips`` of a step."""
    if through_last_layer:
        return partial(_through_last_layer, encoder, side_network, clips)
    return partial(_corrected, encoder, side_network, side_network.fold())


def hearing(
    encoder: FrozenEncoder, memory: nn.Module
) -> Callable[[Iterable[Tensor | HiddenState | None], Tensor | None], Iterator[tuple[Tensor, Tensor]]]:
    """As :func:`correcting`, for :func:`heard_beside`."""
    return partial(_corrected, encoder, memory, memory.fold(), join=_both)


def _both(own: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    return own, side


def _corrected(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    folded: list[tuple[Tensor, Tensor]],
    hidden_states: Iterable[Tensor | HiddenState],
    lengths: Tensor | None,
    join: Callable[[Tensor, Tensor], Any] = torch.add,
) -> Iterator[Any]:
    """Some clips at a time: at the backbone's width each part is short-lived, and what is added to it holds
    it in float32 on the way."""
    last = None

    def remembered() -> Iterator[Tensor | HiddenState]:
        nonlocal last
        for state in hidden_states:
            last = state
            yield state

    stream = remembered()
    state = side_network.state(stream, lengths, folded)
    for _ in stream:  # layers behind the last that is tapped
        pass
    last = last.values if isinstance(last, HiddenState) else last
    size = max(last.shape[0], 1)
    if not torch.compiler.is_compiling():
        size = max(1, _WIDE_BYTES // max(1, last.shape[1] * last.shape[2] * last.itemsize))
    for own, part in zip(last.split(size), state.split(size)):
        yield join(encoder.normed_output(own), side_network.widen(part))


def _through_last_layer(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    whole_batch: int,
    hidden_states: Iterable[Tensor | HiddenState],
    lengths: Tensor | None,
) -> Iterator[Tensor]:
    """SHERL and the frozen last layer's output for some of the ``whole_batch`` utterances of a step."""
    deepest, merged = side_network.merge(hidden_states, lengths)
    part = None
    if torch.is_grad_enabled():
        part = len(deepest)
        if not torch.compiler.is_compiling():
            part = automatic_backward_part(encoder, side_network, whole_batch, deepest)
    yield states_through_last_layer(encoder, side_network, deepest, merged, lengths, part)


def _slabs(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    features: Tensor,
    lengths: Tensor | None,
    chunk_size: int | None,
    final_norm: bool,
    first_again: bool = False,
) -> Iterator[tuple[Iterator[Tensor | HiddenState], Tensor | None]]:
    """The hidden states of as many clips as ``side_network`` takes at a time, and their lengths; arguments as
    for :func:`pooled_in_chunks`. ``first_again``: of a slab of chunks h_0 is made again rather than kept,
    also where the others are kept as they are."""
    clips, frames = features.shape[0], (features.shape[-1] + 1) // 2
    slab = chunk_size
    if chunk_size is None and not torch.compiler.is_compiling():
        chunk_size = automatic_chunk(encoder, frames, features.device)
        slab = automatic_slab(side_network, clips, chunk_size, features.device)
    folds = hasattr(side_network, "fold")
    keeps = torch.is_grad_enabled() and getattr(side_network, "saved_activations", None) == "exact"
    waiting = 0
    if slab != chunk_size:
        waiting = slab * frames * encoder.hidden_size * encoder.dtype.itemsize
    statistics = folds and (not waiting or (keeps and waiting <= _WAITING_BYTES))
    reads_again = folds or isinstance(side_network, SideNetwork)
    first_again = reads_again and torch.is_grad_enabled() and (first_again or not keeps)
    reading = (final_norm, statistics, chunk_size, not keeps, first_again)
    if slab is None or clips <= slab:
        yield encoder.stream(features, lengths, *reading), lengths
        return
    for start in range(0, clips, slab):
        of_part = None if lengths is None else lengths[start : start + slab]
        yield encoder.stream(features[start : start + slab], of_part, *reading), of_part


def pooled_states(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    hidden_states: Iterable[Tensor | HiddenState],
    lengths: Tensor | None = None,
    through_last_layer: bool = False,
) -> Tensor:
    """As :func:`pooled_in_chunks`, of hidden states that are there already, the whole batch at once."""
    if through_last_layer:
        return _pooled_through_last_layer(encoder, side_network, None, hidden_states, lengths)
    return side_network.pooled(hidden_states, lengths)


def _pooled_through_last_layer(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    whole_batch: int | None,
    hidden_states: Iterable[Tensor | HiddenState],
    lengths: Tensor | None,
) -> Tensor:
    """SHERL and the mean over time of the frozen last layer's output; ``whole_batch``: utterances of the
    step, of which these are some, or None: these are all."""
    deepest, merged = side_network.merge(hidden_states, lengths)
    clips, frames, device = deepest.shape[0], deepest.shape[1], deepest.device
    part = backward_part = clips
    if not torch.compiler.is_compiling():
        part = automatic_chunk(encoder, frames, device)
        backward_part = automatic_backward_part(encoder, side_network, whole_batch or clips, deepest)
    # Where 8-bit copies say that memory is dear.
    frugal = side_network.saved_activations != "exact" and device_type(device) != "cpu"
    sizes = max(part, backward_part or 0), backward_part
    return pooled_through_last_layer(encoder, side_network, deepest, merged, lengths, *sizes, frugal)
