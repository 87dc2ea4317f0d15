"""One frozen layer of Whisper's encoder, run for its output alone: no gradient, little memory beside it."""

import torch
from torch import nn

from meft_kernels.reference.common import NORM_EPS
from meft_kernels.reference.stand_in import device_type

# Rows go through the feed-forward block so many elements of its inner width at a time.
_INNER_ELEMENTS = {"cpu": 2**22}
_DEFAULT_INNER_ELEMENTS = 2**25


def norm_with_statistics(
    norm: nn.LayerNorm, states: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """LayerNorm, and the row statistics that it computes anyway.

    Args:
        norm: over the last axis. states: (B, T, D) in the type of the norm's weights.

    Returns:
        The normalised states, and mean and rstd (B, T) for ``meft_kernels.HiddenState``; None for those where
        they are of no use there: another epsilon, or rounded to half precision, as the CPU does.
    """
    normed, mean, rstd = torch.native_layer_norm(
        states, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )
    if norm.eps != NORM_EPS or mean.dtype not in (torch.float32, torch.float64):
        return normed, None
    return normed, (mean.squeeze(-1), rstd.squeeze(-1))


def finish_layer(
    layer: nn.Module, states: torch.Tensor, normed: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """A ``WhisperEncoderLayer`` in evaluation mode, from its first LayerNorm's output on.

    Args:
        layer: gives the weights. states: (B, T, D), the layer's input. normed: (B, T, D), that after the
            layer's first LayerNorm. mask: for the attention, or None.

    Returns:
        (B, T, D), the layer's output.
    """
    attended = layer.self_attn(hidden_states=normed, attention_mask=mask)[0]
    del normed
    return add_feed_forward(layer, attended.add_(states))


def add_feed_forward(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The second half of a ``WhisperEncoderLayer`` in evaluation mode, written into its input.

    Args:
        layer: gives the weights. states: (B, T, D), contiguous, what the attention block gave.

    Returns:
        ``states``, which now are the layer's output; fp16 is clamped short of infinity as Hugging Face does.
    """
    rows = states.view(-1, states.shape[-1])
    blocks = 1
    if not torch.compiler.is_compiling():  # which would compile each number of blocks anew
        inner = _INNER_ELEMENTS.get(device_type(states.device), _DEFAULT_INNER_ELEMENTS)
        blocks = max(1, round(rows.shape[0] * layer.fc1.out_features / inner))
    exact_gelu = getattr(layer.activation_fn, "act", None) is nn.functional.gelu
    for block in rows.chunk(blocks):
        hidden = layer.fc1(layer.final_layer_norm(block))
        hidden = torch.ops.aten.gelu_(hidden) if exact_gelu else layer.activation_fn(hidden)
        block += layer.fc2(hidden)
    if states.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max - 1000
        states.clamp_(-limit, limit)
    return states
