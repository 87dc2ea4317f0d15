"""Hidden states that were computed earlier, in the place of audio: what the model makes of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meft_kernels import SHERL, HiddenState
from meft_kernels.reference.eight_bit import CODE_DTYPES
from meft_kernels.reference.eight_bit import values as values_of

from ..errors import UserError
from .chunked import (
    automatic_chunk,
    automatic_slab,
    correcting,
    hearing,
    pooled_states,
)
from .frozen import FrozenEncoder
from .pooling import LastState, StatisticsOf


def states_read(side_network: nn.Module, num_layers: int) -> tuple[int, ...]:
    """Indices of the hidden states h_0 to h_L that a reader looks at, in order.

    Args:
        side_network: of a :class:`whisper_meft.MeftModel` with a frozen encoder. num_layers: L.
    """
    if hasattr(side_network, "taps"):
        return (0, *side_network.taps)
    return (num_layers,) if isinstance(side_network, LastState) else tuple(range(num_layers + 1))


def states_corrected(side_network: nn.Module, num_layers: int) -> tuple[int, ...]:
    """As :func:`states_read`, of a side network that corrects an output: with h_L, to whose LayerNorm it is
    added. SHERL's goes through the last layer, and h_L is not needed."""
    read = states_read(side_network, num_layers)
    return read if isinstance(side_network, SHERL) else tuple(sorted({*read, num_layers}))


@dataclass(frozen=True)
class StoredStates:
    """Hidden states of some layers for a batch, as ``forward`` is handed them.

    Args:
        read: their indices, in order.
        values: (B, S, T, D) raw layer outputs of frames or tokens, in any floating dtype or in 8 bits.
        lengths: (B,) how many of the T are the clip's own, or None.
        statistics: (B, S, T, 2) mean and rstd of the rows, where they are known.
        scales: (B, S, 2, D) of 8-bit codes.
    """

    read: tuple[int, ...]
    values: Tensor
    lengths: Tensor | None
    statistics: Tensor | None
    scales: Tensor | None

    def check(self, width: int, device: torch.device, along: str = "frames") -> None:
        """Raises UserError, by the name of ``forward``'s argument, for a shape, dtype or device that is not
        the model's. ``width``: D; ``device``: the model's; ``along``: what the T are."""
        states, lengths, statistics, scales = self.values, self.lengths, self.statistics, self.scales
        expected = f"(batch, {len(self.read)}, {along}, {width})"
        codes = isinstance(states, Tensor) and states.dtype in CODE_DTYPES.values()
        numbers = codes or isinstance(states, Tensor) and states.is_floating_point()
        if not numbers or states.ndim != 4:
            got = f"{tuple(states.shape)} of {states.dtype}" if isinstance(states, Tensor) else type(states)
            raise UserError(
                f"hidden_states must be a floating-point tensor of shape {expected}, or one of int8 codes, "
                f"got {got}"
            )
        batch, number, frames, found = states.shape
        if (number, found) != (len(self.read), width) or frames < 1:
            raise UserError(
                f"hidden_states must have shape {expected}, the layers {', '.join(map(str, self.read))} in "
                f"this order, got {tuple(states.shape)}"
            )
        if states.device != device:
            raise UserError(f"hidden_states are on {states.device}, the model is on {device}")
        integer = lengths is None or lengths.dtype in (torch.int64, torch.int32)
        if lengths is not None and (lengths.shape != (batch,) or not integer):
            raise UserError(
                f"hidden_state_lengths must be {batch} integers, one per clip, got shape "
                f"{tuple(lengths.shape)} of {lengths.dtype}"
            )
        if statistics is not None and statistics.shape != (batch, number, frames, 2):
            raise UserError(
                f"hidden_state_statistics must have shape {(batch, number, frames, 2)}, got "
                f"{tuple(statistics.shape)}"
            )
        if (scales is not None) != codes:
            needed = "are needed for" if scales is None else "only go with"
            raise UserError(f"hidden_state_scales {needed} hidden_states of 8 bits, got {states.dtype}")
        if scales is not None and (statistics is None or scales.shape != (batch, number, 2, width)):
            got = "no hidden_state_statistics" if statistics is None else tuple(scales.shape)
            raise UserError(
                f"8-bit hidden_states need hidden_state_scales of shape {(batch, number, 2, width)} and "
                f"hidden_state_statistics, got {got}"
            )

    def check_whole(self, frames: int, why: str) -> None:
        """Raises UserError unless every clip has ``frames`` of them; ``why``: says why so many."""
        if self.values.shape[2] != frames:
            raise UserError(f"hidden_states must have {frames} frames, {why}, got {self.values.shape[2]}")

    def clips(self, rows: slice) -> "StoredStates":
        """Those of some clips."""
        given = (self.values, self.lengths, self.statistics, self.scales)
        return StoredStates(self.read, *(None if each is None else each[rows] for each in given))

    def state(self, position: int, dtype: torch.dtype) -> Tensor:
        """(B, T, D), the ``position``-th of them, in ``dtype``."""
        state = self.values[:, position]
        if self.scales is not None:
            state = decoded(state, self.statistics[:, position], self.scales[:, position], dtype)
        return state.to(dtype)

    def stream(self, dtype: torch.dtype, statistics: bool) -> Iterator[Tensor | HiddenState | None]:
        """The states in ``dtype`` from h_0 on, None where nobody looks; ``statistics``: with those of their
        rows, where they are known."""
        position = 0
        for layer in range(self.read[-1] + 1):
            if layer != self.read[position]:
                yield None
                continue
            state = self.state(position, dtype)
            if statistics and self.statistics is not None:
                known = self.statistics[:, position]
                state = HiddenState(state, *(each.contiguous() for each in known.unbind(-1)))
            yield state
            position += 1


def pooled_of_cached(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    stored: StoredStates,
    final_norm: bool,
    through_last_layer: bool,
    taken: StatisticsOf | None = None,
) -> Tensor:
    """What :func:`whisper_meft.encoder.chunked.pooled_in_chunks` gives, without running the backbone.

    Args:
        encoder: the backbone, for the final LayerNorm and SHERL's last layer.
        side_network: what reads the states. stored: those that :func:`states_read` names.
        final_norm, through_last_layer, taken: see ``pooled_in_chunks``.

    Returns:
        (B, D).

    Raises:
        UserError: a wrong shape, dtype or device.
    """
    stored.check(encoder.hidden_size, encoder.layer_norm.weight.device)
    if stored.lengths is None:
        why = "the backbone's whole window: give hidden_state_lengths, with max_frames='longest' or a number"
        stored.check_whole(encoder.max_source_positions, f"{why} in the config")

    def states() -> Iterator[Tensor | HiddenState | None]:
        statistics = hasattr(side_network, "fold") and not final_norm
        for layer, state in enumerate(stored.stream(encoder.dtype, statistics)):
            if final_norm and layer == encoder.num_layers:
                with torch.no_grad(), torch.autocast(state.device.type, enabled=False):
                    state = encoder.layer_norm(state)
            yield state

    stream = states() if taken is None else taken.watch(states(), stored.lengths)
    return pooled_states(encoder, side_network, stream, stored.lengths, through_last_layer)


def corrected_of_cached(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    stored: StoredStates,
    chunk_size: int | None = None,
    through_last_layer: bool = False,
) -> Iterator[Tensor]:
    """What :func:`whisper_meft.encoder.chunked.corrected_in_chunks` gives, without running the backbone.

    Args:
        as there; ``stored``: those that :func:`states_corrected` names.
    """
    read = correcting(encoder, side_network, len(stored.values), through_last_layer)
    for part in _slabs(encoder, side_network, stored, chunk_size):
        yield from read(part.stream(encoder.dtype, hasattr(side_network, "fold")), part.lengths)


def heard_of_cached(
    encoder: FrozenEncoder, memory: nn.Module, stored: StoredStates, chunk_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """What :func:`whisper_meft.encoder.chunked.heard_beside` gives, without running the backbone; arguments
    as for :func:`corrected_of_cached`."""
    read = hearing(encoder, memory)
    for part in _slabs(encoder, memory, stored, chunk_size):
        yield from read(part.stream(encoder.dtype, True), part.lengths)


def _slabs(
    encoder: FrozenEncoder, side_network: nn.Module, stored: StoredStates, chunk_size: int | None
) -> Iterator[StoredStates]:
    """As many clips as ``side_network`` takes at a time where the backbone runs."""
    clips, _, frames, _ = stored.values.shape
    size = chunk_size
    if size is None and torch.compiler.is_compiling():
        size = clips
    elif size is None:
        device = stored.values.device
        size = automatic_slab(side_network, clips, automatic_chunk(encoder, frames, device), device)
    for start in range(0, max(clips, 1), max(size, 1)):
        yield stored.clips(slice(start, start + size))


@torch.no_grad()
def decoded(codes: Tensor, statistics: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states from 8 bits (``meft_kernels.reference.eight_bit``), on the device where they are.

    Args:
        codes: (B, T, D) int8 or float8_e4m3fn. statistics: (B, T, 2) mean and rstd of the rows.
        scales: (B, 2, D) scale and shift of each clip's channels. dtype: of the result.

    Returns:
        (B, T, D).
    """
    scale, shift = scales[:, None].unbind(2)
    mean, rstd = statistics[..., None, :].unbind(-1)
    return values_of(codes, scale.dtype).mul_(scale).add_(shift).div_(rstd).add_(mean).to(dtype)
