"""One frozen layer of Whisper's encoder: run for its output alone, with little memory beside it, or with
gradient to its input."""

from collections.abc import Iterable

import torch
from torch import nn

from meft_kernels.reference.common import NORM_EPS
from meft_kernels.reference.stand_in import device_type
from meft_kernels.self_attention import self_attention

from .quantization import project

# Rows go through the feed-forward block so many elements of its inner width at a time.
_INNER_ELEMENTS = {"cpu": 2**22}

_DEFAULT_INNER_ELEMENTS = 2**25

_CAPTURING = "transformers.utils.output_capturing"


def is_listened_to(layer: nn.Module) -> bool:
    """Whether there are hooks on a ``WhisperEncoderLayer``, or on those of its modules that ``finish_layer``
    does not call: they would not run."""
    return has_hooks((layer, layer.self_attn, layer.self_attn_layer_norm, layer.activation_fn))


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether any of the modules has forward hooks; of those that transformers leaves on layers once it was
    asked for hidden states, nobody waits for a call."""
    hooks = [
        hook
        for module in modules
        for found in (module._forward_hooks, module._forward_pre_hooks)
        for hook in found.values()
    ]
    return any(getattr(hook, "__module__", None) != _CAPTURING for hook in hooks)


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


def attend(attention: nn.Module, normed: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A ``WhisperAttention`` of the encoder in evaluation mode.

    With "sdpa" queries, keys and values are read where the projections wrote them, which Hugging Face's code
    copies; on the CPU a C++ kernel may take PyTorch's place.

    Args:
        attention: gives the weights. normed: (B, T, D). mask: for the attention, or None.

    Returns:
        (B, T, D), a tensor of its own.
    """
    if attention.config._attn_implementation != "sdpa":
        return attention(hidden_states=normed, attention_mask=mask)[0]
    heads = (*normed.shape[:-1], attention.num_heads, attention.head_dim)
    # Scaled before the product and not in it, as Whisper was trained.
    projected = project(normed, attention.q_proj, attention.k_proj, attention.v_proj)
    projected[0].mul_(attention.scaling)
    mixed = self_attention(*(states.view(heads).transpose(1, 2) for states in projected), mask, scale=1.0)
    del projected
    mixed = mixed.transpose(1, 2).reshape(normed.shape)  # where that is a copy, the only one from here on
    return attention.out_proj(mixed)


def finish_layer(
    layer: nn.Module,
    states: torch.Tensor,
    normed: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A ``WhisperEncoderLayer`` in evaluation mode, from its first LayerNorm's output on.

    Args:
        layer: gives the weights. states: (B, T, D), the layer's input. normed: (B, T, D), that after the
            layer's first LayerNorm. mask: for the attention, or None. out: (B, T, D), contiguous, where to
            write the output, which may be ``states``; None: a tensor of its own.

    Returns:
        (B, T, D), the layer's output.
    """
    attended = attend(layer.self_attn, normed, mask)
    del normed
    return add_feed_forward(layer, torch.add(attended, states, out=attended if out is None else out))


def add_feed_forward(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """The second half of a ``WhisperEncoderLayer`` in evaluation mode, written into its input.

    Args:
        layer: gives the weights. states: (B, T, D), contiguous, what the attention block gave.

    Returns:
        ``states``, which now are the layer's output.
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
    return clamp_half(states)


def run_with_gradient(layer: nn.Module, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A whole ``WhisperEncoderLayer`` in evaluation mode, with gradient to its input.

    Args:
        layer: gives the weights. states: (B, T, D) in their type. mask: for the attention, or None.

    Returns:
        (B, T, D).
    """
    states = states + attend(layer.self_attn, layer.self_attn_layer_norm(states), mask)
    hidden = layer.activation_fn(layer.fc1(layer.final_layer_norm(states)))
    return clamp_half(states + layer.fc2(hidden))


def clamp_half(states: torch.Tensor) -> torch.Tensor:
    """fp16 states short of infinity, as Hugging Face clamps a layer's output; those of other types."""
    if states.dtype != torch.float16:
        return states
    limit = torch.finfo(torch.float16).max - 1000
    return states.clamp_(-limit, limit)
