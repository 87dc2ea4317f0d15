"""Hidden states that were computed earlier, in the place of audio: what the model makes of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from meft_kernels import HiddenState
from meft_kernels.reference.eight_bit import CODE_DTYPE

from ..errors import UserError
from .chunked import pooled_states
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


def pooled_of_cached(
    encoder: FrozenEncoder,
    side_network: nn.Module,
    read: Sequence[int],
    hidden_states: Tensor,
    lengths: Tensor | None,
    statistics: Tensor | None,
    scales: Tensor | None,
    final_norm: bool,
    through_last_layer: bool,
    taken: StatisticsOf | None = None,
) -> Tensor:
    """What :func:`whisper_meft.encoder.chunked.pooled_in_chunks` gives, without running the backbone.

    Args:
        encoder: the backbone, for the final LayerNorm and SHERL's last layer.
        side_network: what reads the states. read: their indices, see :func:`states_read`.
        hidden_states: (B, S, T, D) raw layer outputs, those of ``read``, in any floating dtype or in
            8 bits.
        lengths: (B,) valid frames, or None for all.
        statistics: (B, S, T, 2) mean and rstd of the rows, where they are known.
        scales: (B, S, 2, D) of 8-bit codes.
        final_norm, through_last_layer, taken: see ``pooled_in_chunks``.

    Returns:
        (B, D).

    Raises:
        UserError: a wrong shape, dtype or device.
    """
    _check(encoder, read, hidden_states, lengths, statistics, scales)

    def states() -> Iterator[Tensor | HiddenState | None]:
        position = 0
        for layer in range(read[-1] + 1):
            if layer != read[position]:
                yield None  # nobody looks at it
                continue
            state, known = hidden_states[:, position], None if statistics is None else statistics[:, position]
            if scales is not None:
                state = decoded(state, known, scales[:, position], encoder.dtype)
            state = state.to(encoder.dtype)
            if final_norm and layer == encoder.num_layers:
                with torch.no_grad(), torch.autocast(state.device.type, enabled=False):
                    state = encoder.layer_norm(state)
            elif known is not None and hasattr(side_network, "fold"):
                state = HiddenState(state, *(s.contiguous() for s in known.unbind(-1)))
            yield state
            position += 1

    stream = states() if taken is None else taken.watch(states(), lengths)
    return pooled_states(encoder, side_network, stream, lengths, through_last_layer)


@torch.no_grad()
def decoded(codes: Tensor, statistics: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states from 8 bits (``meft_kernels.reference.eight_bit``), on the device where they are.

    Args:
        codes: (B, T, D) float8. statistics: (B, T, 2) mean and rstd of the rows. scales: (B, 2, D) scale and
            shift of each clip's channels. dtype: of the result.

    Returns:
        (B, T, D).
    """
    scale, shift = scales[:, None].unbind(2)
    mean, rstd = statistics[..., None, :].unbind(-1)
    return codes.to(scale.dtype).mul_(scale).add_(shift).div_(rstd).add_(mean).to(dtype)


def _check(
    encoder: FrozenEncoder,
    read: Sequence[int],
    states: Tensor,
    lengths: Tensor | None,
    statistics: Tensor | None,
    scales: Tensor | None,
) -> None:
    expected = f"(batch, {len(read)}, frames, {encoder.hidden_size})"
    if not isinstance(states, Tensor) or states.ndim != 4 or not states.is_floating_point():
        got = f"{tuple(states.shape)} of {states.dtype}" if isinstance(states, Tensor) else type(states)
        raise UserError(f"hidden_states must be a floating-point tensor of shape {expected}, got {got}")
    batch, number, frames, width = states.shape
    if (number, width) != (len(read), encoder.hidden_size) or frames < 1:
        raise UserError(
            f"hidden_states must have shape {expected}, the layers {', '.join(map(str, read))} in this "
            f"order, got {tuple(states.shape)}"
        )
    weight = encoder.layer_norm.weight
    if states.device != weight.device:
        raise UserError(f"hidden_states are on {states.device}, the model is on {weight.device}")
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype not in (torch.int64, torch.int32)):
        raise UserError(
            f"hidden_state_lengths must be {batch} integers, one per clip, got shape {tuple(lengths.shape)} "
            f"of {lengths.dtype}"
        )
    if lengths is None and frames != encoder.max_source_positions:
        raise UserError(
            f"hidden_states must have {encoder.max_source_positions} frames, the backbone's whole window, "
            f"got {frames}: give hidden_state_lengths, with max_frames='longest' or a number in the config"
        )
    if statistics is not None and statistics.shape != (batch, number, frames, 2):
        raise UserError(
            f"hidden_state_statistics must have shape {(batch, number, frames, 2)}, got "
            f"{tuple(statistics.shape)}"
        )
    if (scales is not None) != (states.dtype == CODE_DTYPE):
        needed = "are needed for" if scales is None else "only go with"
        raise UserError(f"hidden_state_scales {needed} hidden_states of 8 bits, got {states.dtype}")
    if scales is not None and (statistics is None or scales.shape != (batch, number, 2, width)):
        got = "no hidden_state_statistics" if statistics is None else tuple(scales.shape)
        raise UserError(
            f"8-bit hidden_states need hidden_state_scales of shape {(batch, number, 2, width)} and "
            f"hidden_state_statistics, got {got}"
        )
