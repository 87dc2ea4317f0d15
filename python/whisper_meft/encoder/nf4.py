"""Frozen linear layers in four bits: NormalFloat (QLoRA, arXiv 2305.14314), as QST (arXiv 2401.07004) holds
the backbone beside a side network."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 64  # weights that share a scale
_SCALES = 256  # scales that share a range


def _levels() -> Tensor:
    """The sixteen values of the format, ascending, (16,) in float32: quantiles of the normal distribution,
    seven below zero, zero and eight above, the outermost at -1 and 1."""
    # The quantiles reach as far as half of the mean distance of 15 and of 16 values from the ends of [0, 1].
    end = 1 - (1 / 30 + 1 / 32) / 2
    chance = [torch.linspace(end, 0.5, count, dtype=torch.float64)[:-1] for count in (8, 9)]
    negative, positive = (math.sqrt(2) * torch.erfinv(2 * each - 1) for each in chance)
    levels = torch.cat([-negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)])
    return (levels / levels.abs().max()).float()


@contextmanager
def unchanged_type(module: nn.Module, *names: str) -> Iterator[None]:
    """A context for a module's ``_apply``, in which its buffers of these names go where the others do and
    stay in their number format: a cast (``half()``) would round the scales of weights that are rounded."""
    before = {name: module._buffers[name] for name in names}
    yield
    for name, held in before.items():
        now = module._buffers[name]
        if now.dtype != held.dtype:
            module._buffers[name] = held.to(now.device)


class NF4Linear(nn.Module):
    """A frozen linear layer whose weights are held in four bits and widened for each product:

        W = scale_b level[code],   scale_b = lowest_c + step_c code_b

    b: blocks of 64 neighbouring weights, c: of 256 of their scales, which are held in 8 bits. 4.13 bits a
    weight. A gradient goes through to the input.

    Args:
        linear: the layer in floating point, (in, out), in * out a multiple of 64.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        blocks = linear.weight.detach().float().view(-1, _BLOCK)
        largest = blocks.abs().amax(1)
        parts = nn.functional.pad(largest, (0, -len(largest) % _SCALES), value=math.nan).view(-1, _SCALES)
        lowest = parts.nan_to_num(math.inf).amin(1)
        step = (parts.nan_to_num(-math.inf).amax(1) - lowest) / 255
        of_scales = torch.round((parts - lowest[:, None]) / step.clamp_min(1e-30)[:, None]).nan_to_num(0)
        self.register_buffer("scale_codes", of_scales.flatten()[: len(largest)].to(torch.uint8))
        self.register_buffer("lowest", lowest)
        self.register_buffer("step", step)
        levels = _levels().to(blocks.device)
        scale = self._scales().clamp_min(torch.finfo(torch.float32).tiny)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(blocks / scale[:, None], middles).to(torch.uint8).view(-1, 2)
        self.register_buffer("codes", codes[:, 0] * 16 + codes[:, 1])
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def _apply(self, *arguments: Any, **options: Any) -> "NF4Linear":
        with unchanged_type(self, "lowest", "step", "levels"):
            return super()._apply(*arguments, **options)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"

    def _scales(self) -> Tensor:
        """Of every block, in float32."""
        ranges = [
            each.repeat_interleave(_SCALES)[: len(self.scale_codes)] for each in (self.step, self.lowest)
        ]
        return self.scale_codes * ranges[0] + ranges[1]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in) in ``dtype``."""
        levels = self.levels.to(dtype)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)  # of every byte
        values = nn.functional.embedding(self.codes.int(), pairs).view(-1, _BLOCK)
        return values.mul_(self._scales().to(dtype)[:, None]).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) in any floating type -> (..., out) in that type."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight(x.dtype), bias)
