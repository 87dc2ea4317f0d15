"""The encoder's own softmax attention: PyTorch's, or on the CPU the faster C++ kernel of
``csrc/self_attention.cpp``."""

import torch
from torch import Tensor
from torch.nn import functional

from . import native, ops
from .ops.second_derivative import in_forward_mode, in_transform, refuses_second_derivative
from .reference.stand_in import device_type


def self_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``: softmax(scale Q Kᵀ) V of every clip and head.

    The C++ kernel takes fp32 tensors on the CPU with no mask or one of keys alone, and differs from PyTorch
    by rounding. What it leaves out of a clip costs nothing, and a head's values are the same bits whatever
    else is in the batch and for any number of threads. Other calls, calls under torch.compile, autocast,
    torch.func or forward-mode differentiation, and all under ``use_backend("reference")`` are PyTorch's own.

    Args:
        query: (B, H, T, head_dim). key, value: (B, H, T', head_dim). mask: which keys are looked at, boolean
            (B or 1, 1, 1, T'), or whatever PyTorch takes beside it; None for all. scale: head_dim ** -0.5 if
            None.

    Returns:
        (B, H, T, head_dim), in memory (B, T, H, head_dim) where a fused kernel gives it so. Zeros for a clip
        that looks at nothing.

    Raises:
        RuntimeError: arguments that PyTorch does not take, or a second derivative.
    """
    scale = query.shape[-1] ** -0.5 if scale is None and query.numel() else scale
    if not _is_served(query, key, value, mask, scale):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return _SelfAttention.apply(query, key, value, mask, scale)[0]
    return native.kernel("self_attention")(query, key, value, mask, scale)[0]


def _is_served(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> bool:
    """Whether the C++ kernel takes the call."""
    if torch.compiler.is_compiling() or not ops.uses_native() or not native.has("self_attention"):
        return False
    given = (query, key, value)
    if any(tensor.dtype != torch.float32 or device_type(tensor.device) != "cpu" for tensor in given):
        return False
    if query.ndim != 4 or not native.serves(given) or scale <= 0:
        return False
    batch, heads, _, head_dim = query.shape
    if key.shape != (batch, heads, key.shape[-2], head_dim) or value.shape != key.shape:
        return False
    if mask is not None and (mask.dtype != torch.bool or not _is_of_keys(mask, batch, key.shape[-2])):
        return False
    # Whoever switched PyTorch's fused attention off, or transforms functions, gets what PyTorch has for that.
    is_plain = not (in_transform() or in_forward_mode()) and not torch.is_autocast_enabled("cpu")
    return is_plain and torch.backends.cuda.flash_sdp_enabled()


def _is_of_keys(mask: Tensor, batch: int, keys: int) -> bool:
    return mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, 1, keys)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float):
        out, logsumexp = native.kernel("self_attention")(query, key, value, mask, scale)
        ctx.save_for_backward(query, key, value, mask, out, logsumexp)
        ctx.scale = scale
        ctx.mark_non_differentiable(logsumexp)
        return out, logsumexp

    @staticmethod
    @refuses_second_derivative
    def backward(ctx, grad: Tensor, _: Tensor):
        query, key, value, mask, out, logsumexp = ctx.saved_tensors
        kernel = native.kernel("self_attention_bwd")
        grads = kernel(grad, query, key, value, out, logsumexp, mask, ctx.scale)
        needed = zip(grads, ctx.needs_input_grad)
        return (*(each if is_needed else None for each, is_needed in needed), None, None)
