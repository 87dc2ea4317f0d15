"""Sparsely Shared LoRA (S2-LoRA, arXiv 2309.11756).

Weights of the same shape (out, in), of encoder and decoder together, share two low-rank factors, B (out, r)
and A (r, in); each weight W has its own rank coefficients e (r), which an L1 penalty makes sparse:

    W + scaling * B diag(e) A

As in AdaLoRA the coefficients are zero at the start and the factors drawn from N(0, 0.02^2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from .checks import check_number_from_0, check_positive_int, check_positive_number
from .low_rank import UpdateConfig
from .wrapping import WrappedLinear, for_masters, wrap_linears


@dataclass(kw_only=True)
class S2LoRAConfig(UpdateConfig):
    """S2-LoRA (arXiv 2309.11756): low-rank factors shared by all weights of a shape, sparse rank coefficients
    for each weight."""

    method: ClassVar[str] = "s2_lora"

    r: int = field(default=64, metadata={"help": "Rank of the shared factors."})
    lora_alpha: float = field(
        default=512, metadata={"help": "The update is scaled by this number divided by the rank."}
    )
    l1_weight: float = field(
        default=1e-4,
        metadata={"help": "Weight in the loss of the sum of the rank coefficients' absolute values."},
    )

    def validate(self) -> None:
        super().validate()
        check_positive_int("r", self.r)
        check_positive_number("lora_alpha", self.lora_alpha)
        check_number_from_0("l1_weight", self.l1_weight)

    def prepare(self, part: nn.Module, beside: nn.Module | None = None) -> None:
        shared = getattr(beside, "shared_factors", {})
        add_s2_lora(part, self.target_modules, self.r, self.lora_alpha / self.r, torch.float32, shared)

    def penalty(self, tuned: nn.Module) -> torch.Tensor | None:
        return self.l1_weight * l1_penalty(tuned) if self.l1_weight else None


class SharedFactors(nn.Module):
    """The two factors of all weights of one shape."""

    def __init__(self, out_features: int, in_features: int, r: int, **place):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **place))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **place))
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)


class S2LoRALinear(WrappedLinear):
    """A linear layer with an update through shared factors.

    Args:
        base_layer: the frozen layer. factors: of its shape. scaling: of the update.
    """

    def __init__(self, base_layer: nn.Linear, factors: SharedFactors, scaling: float):
        super().__init__(base_layer)
        self.factors = (factors,)  # in a tuple: they are registered once, with a part of the backbone
        self.scaling = scaling
        self.coefficients = nn.Parameter(torch.zeros_like(factors.lora_A[:, 0]))

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        (factors,) = self.factors
        inner = nn.functional.linear(for_masters(x, factors.lora_A), factors.lora_A)
        inner = inner * (self.scaling * self.coefficients).to(inner.dtype)
        return nn.functional.linear(inner, factors.lora_B).to(y.dtype)

    def get_delta_weight(self, adapter: str = "default") -> Tensor:
        """What is added to the frozen weight, (out, in); named as in peft."""
        (factors,) = self.factors
        return self.scaling * (factors.lora_B * self.coefficients) @ factors.lora_A


def add_s2_lora(
    part: nn.Module,
    names: list[str],
    r: int,
    scaling: float,
    dtype: torch.dtype,
    shared: Mapping[str, SharedFactors],
) -> None:
    """Puts the update on the linear layers called ``names``; factors of shapes that are not among the
    ``shared`` ones go to ``part.shared_factors``."""
    own = nn.ModuleDict()

    def wrap(linear: nn.Linear) -> S2LoRALinear:
        key = f"{linear.out_features}x{linear.in_features}"
        if key not in shared and key not in own:
            place = {"device": linear.weight.device, "dtype": dtype}
            own[key] = SharedFactors(linear.out_features, linear.in_features, r, **place)
        return S2LoRALinear(linear, shared[key] if key in shared else own[key], scaling)

    wrap_linears(part, names, wrap)
    part.shared_factors = own


def l1_penalty(tuned: nn.Module) -> Tensor:
    """The sum of the absolute values of all rank coefficients, a scalar."""
    layers = [module for module in tuned.modules() if isinstance(module, S2LoRALinear)]
    return torch.stack([layer.coefficients.abs().sum() for layer in layers]).sum()
