"""Softmax attention as PyTorch computes it, with a faster backward on the CPU: the C++ kernel of
``csrc/self_attention.cpp``, which takes what PyTorch's own forward returns."""

import torch
from torch import Tensor
from torch.nn import functional

from . import native, ops
from .reference.stand_in import device_type
from .second_derivative import refuses_second_derivative

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def self_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``: softmax(scale Q Kᵀ) V of every clip and head.

    The values are PyTorch's own, to the bit. Where fp32 tensors on the CPU need a gradient, and the mask is
    of keys alone, a C++ kernel computes that; a clip's masked keys and values cost nothing there.

    Args:
        query: (B, H, T, head_dim). key, value: (B, H, T', head_dim). mask: which keys are looked at, boolean,
            or whatever PyTorch takes beside it; None for all. scale: head_dim ** -0.5 if None.

    Returns:
        (B, H, T, head_dim), in memory (B, T, H, head_dim) where PyTorch's fused attention gives it so.

    Raises:
        RuntimeError: arguments that PyTorch does not take, or a second derivative.
    """
    if _is_served(query, key, value, mask):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _SelfAttention.apply(query, key, value, mask, scale)[0]
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _is_served(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes the backward: of calls that PyTorch gives to its fused forward on the CPU."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not ops.uses_native():
        return False
    given = (query, key, value)
    if not any(tensor.requires_grad for tensor in given) or not native.has("self_attention_bwd"):
        return False
    if any(tensor.dtype != torch.float32 or device_type(tensor.device) != "cpu" for tensor in given):
        return False
    if query.ndim != 4 or not all(native.serves((tensor,)) and tensor.stride(-1) == 1 for tensor in given):
        return False
    batch, heads, _, head_dim = query.shape
    if key.shape != (batch, heads, key.shape[-2], head_dim) or value.shape != key.shape:
        return False
    if mask is not None and (mask.dtype != torch.bool or not _is_of_keys(mask, batch, key.shape[-2])):
        return False
    # Whoever switched PyTorch's fused attention off, or transforms functions, gets what PyTorch has for that.
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    is_plain = not in_transform and not torch.is_autocast_enabled("cpu")
    return is_plain and torch.backends.cuda.flash_sdp_enabled()


def _is_of_keys(mask: Tensor, batch: int, keys: int) -> bool:
    return mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, 1, keys)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float):
        bias = None
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
        out, logsumexp = _forward(query, key, value, attn_mask=bias, scale=scale)
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
