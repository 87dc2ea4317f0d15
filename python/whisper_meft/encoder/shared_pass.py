"""One pass of the frozen encoder for several readers of its hidden states."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meft_kernels import HiddenState
from meft_kernels.reference.stand_in import device_type

from .cached import states_read
from .chunked import automatic_chunk, pooling
from .frozen import FrozenEncoder
from .pooling import StatisticsOf
from .quantization import pieces


@dataclass(frozen=True)
class Reader:
    """One of those who read the states of a pass; the arguments are those of
    :func:`whisper_meft.encoder.chunked.pooled_in_chunks`.

    Args:
        encoder: its own, of the weights that the pass is made with, for SHERL's last layer.
    """

    encoder: FrozenEncoder
    side_network: nn.Module
    final_norm: bool = False
    through_last_layer: bool = False
    taken: StatisticsOf | None = None

    @property
    def states(self) -> tuple[int, ...]:
        """Indices of the hidden states that it looks at."""
        return states_read(self.side_network, self.encoder.num_layers)

    @property
    def folds(self) -> bool:
        """Whether statistics of the rows are of use to it."""
        return hasattr(self.side_network, "fold")

    def seen(self, states: Iterable[Tensor | HiddenState | None]) -> Iterator[Tensor | HiddenState | None]:
        """The states of a pass as they are when the encoder runs for this reader alone."""
        for index, state in enumerate(states):
            if isinstance(state, HiddenState) and not self.folds:
                state = state.values
            if self.final_norm and index == self.encoder.num_layers:
                state = self.encoder.normed_output(state)
            yield state


@torch.no_grad()
def pooled_of_several(
    encoder: FrozenEncoder,
    readers: Sequence[Reader],
    features: Tensor,
    lengths: Tensor | None,
    chunk_size: int | None = None,
) -> list[Tensor]:
    """What :func:`whisper_meft.encoder.chunked.pooled_in_chunks` gives for each reader, without gradient,
    from one pass of the encoder, which ends with the last state that any of them looks at.

    Readers take a chunk one after the other. The one that looks at most states takes them as they come; what
    others look at is held for the chunk. On a CPU all is computed as for each reader alone, in the same
    chunks; on a GPU side networks take chunks too, not whole batches.

    Args:
        encoder: runs. readers: at least one; theirs have the same weights (:func:`same_encoder`).
        features, lengths, chunk_size: as for ``pooled_in_chunks``.

    Returns:
        (B, D) of each reader.

    Raises:
        UserError: see :meth:`FrozenEncoder.stream`.
    """
    clips, frames = features.shape[0], (features.shape[-1] + 1) // 2
    size = chunk_size or automatic_chunk(encoder, frames, features.device)
    # On a GPU a side network alone takes whole batches, whose statistics would wait: see `chunked`.
    statistics = device_type(features.device) == "cpu" and any(reader.folds for reader in readers)
    first, *others = sorted(readers, key=lambda reader: -len(reader.states))
    wanted = {index for reader in others for index in reader.states}
    functions = {
        id(each): pooling(each.encoder, each.side_network, clips, each.through_last_layer) for each in readers
    }
    pooled: dict[int, list[Tensor]] = {id(reader): [] for reader in readers}
    for start in range(0, max(clips, 1), size):
        part = features[start : start + size]
        of_part = None if lengths is None else lengths[start : start + size]
        passed = _Passed(encoder.stream(part, of_part, statistics=statistics), wanted)
        for reader in (first, *others):
            states = passed.live() if reader is first else passed.held()
            seen = reader.seen(states)
            seen = seen if reader.taken is None else reader.taken.watch(seen, of_part)
            pooled[id(reader)].append(functions[id(reader)](seen, of_part))
        del passed, states, seen
    return [torch.cat(pooled[id(reader)]) for reader in readers]


class _Passed:
    """Hidden states that pass by, of which some are held.

    Args:
        stream: of all of them, from h_0 on. wanted: indices of those that are held.
    """

    def __init__(self, stream: Iterator[Tensor | HiddenState], wanted: set[int]):
        self._stream, self._wanted = enumerate(stream), wanted
        self._held: dict[int, Tensor | HiddenState] = {}

    def live(self) -> Iterator[Tensor | HiddenState]:
        """All states, as they are made."""
        for index, state in self._stream:
            if index in self._wanted:
                self._held[index] = state
            yield state

    def held(self) -> Iterator[Tensor | HiddenState | None]:
        """Those that are held, and None for each of the others before the last of them."""
        last = max(self._wanted)
        if last not in self._held:  # whoever took the others needed no more
            for _ in self.live():
                if last in self._held:
                    break
        for index in range(last + 1):
            yield self._held.get(index)


def same_encoder(one: FrozenEncoder, other: FrozenEncoder, last_layer: bool = True) -> bool:
    """Whether two encoders compute the same hidden states, bit for bit: with the same weights in the same
    number format, in the same way. ``last_layer``: whether the last layer counts."""
    for name in ("activation_function", "encoder_attention_heads"):
        if getattr(one.config, name, None) != getattr(other.config, name, None):
            return False
    parts = ("conv1", "conv2", "embed_positions", "layer_norm")
    depth = len(one.layers) - (not last_layer)
    pairs = [(getattr(one, name), getattr(other, name)) for name in parts]
    pairs += zip(one.layers[:depth], other.layers[:depth])
    return len(one.layers) == len(other.layers) and all(_same(*pair) for pair in pairs)


def _same(one: nn.Module, other: nn.Module) -> bool:
    if one is other:
        return True
    ours, theirs = one.state_dict(), other.state_dict()
    if ours.keys() != theirs.keys():
        return False
    for name, tensor in ours.items():
        mine, yours = pieces(tensor), pieces(theirs[name])
        if len(mine) != len(yours):
            return False
        for each, its in zip(mine, yours):
            if (each.shape, each.dtype, each.device) != (its.shape, its.dtype, its.device):
                return False
            if each.data_ptr() != its.data_ptr() and not torch.equal(each, its):
                return False
    return True


def share_weights(one: FrozenEncoder, other: FrozenEncoder, last_layer: bool = True) -> None:
    """Puts the modules of ``one`` in the places of those of ``other``, which are the same
    (:func:`same_encoder`), so that their memory is needed once."""
    for name in ("conv1", "conv2", "embed_positions", "layer_norm"):
        setattr(other, name, getattr(one, name))
    for index in range(len(one.layers) - (not last_layer)):
        other.layers[index] = one.layers[index]
