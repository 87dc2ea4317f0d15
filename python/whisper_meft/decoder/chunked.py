"""A frozen decoder over a batch in chunks: with gradient to the encoder's output, at little memory.

No token of one clip sees another clip, so a chunk's result is that of the whole batch. Of a large batch each
layer is computed again for the backward: kept, the keys and values of 1500 frames in every layer would
outweigh the side network. One that trains keeps what autograd keeps, unless gradient checkpointing is on.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from meft_kernels.recomputing import recomputed
from meft_kernels.reference.stand_in import device_type

from .frozen import FrozenDecoder

# Keys and values of so many bytes, of one layer, are there at a time where they are recomputed.
_LAYER_BYTES = {"cpu": 2**24}

_DEFAULT_LAYER_BYTES = 2**27

# What all layers may keep for the backward before they are computed again instead.
_KEPT_BYTES = 2**28


def _layer_bytes(decoder: FrozenDecoder, frames: int, width: int) -> int:
    """Of one clip's keys and values in one layer."""
    return max(1, 2 * frames * width * decoder.dtype.itemsize)


def keeps_much(
    decoder: FrozenDecoder, clips: int, frames: int, width: int, layers: int | None = None
) -> bool:
    """Whether keys and values of what ``clips`` hear, in ``layers`` layers or all, are too much to keep."""
    layers = decoder.num_layers if layers is None else layers
    return clips * _layer_bytes(decoder, frames, width) * layers > _KEPT_BYTES


def clips_at_a_time(decoder: FrozenDecoder, frames: int, width: int, device: torch.device) -> int:
    """So many clips that one layer's keys and values of what they hear, (frames, width) each, take little."""
    most = _LAYER_BYTES.get(device_type(device), _DEFAULT_LAYER_BYTES)
    return max(1, most // _layer_bytes(decoder, frames, width))


def decoded_in_chunks(
    decoder: FrozenDecoder, input_ids: Tensor, encoder_outputs: Iterable[Tensor], mask: Tensor | None = None
) -> Tensor:
    """The decoder's output, before its head.

    Args:
        input_ids: (B, U) token numbers. encoder_outputs: (b, T, D) of some clips after the other.
        mask: (B, U), 0 for padding on the left.

    Returns:
        (B, U, D), with gradient to ``encoder_outputs``.
    """
    clips, done = [], 0
    for output in encoder_outputs:
        size, whole = output.shape[0], output.shape[0]
        run = decoder.around()
        recomputes = decoder.recomputes and output.requires_grad and torch.is_grad_enabled()
        recomputes = recomputes and not torch.compiler.is_compiling()
        if recomputes and keeps_much(decoder, input_ids.shape[0], *output.shape[1:]):
            size = clips_at_a_time(decoder, *output.shape[1:], output.device)
            run = decoder.around(recomputed)
        for part in output.split(max(size, 1)) if size < whole else (output,):
            rows = slice(done, done + part.shape[0])
            of_part = None if mask is None else mask[rows]
            clips.append(decoder.run(run, input_ids[rows], part, of_part))
            done += part.shape[0]
    return clips[0] if len(clips) == 1 else torch.cat(clips)
