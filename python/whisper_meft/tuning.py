"""A part of the backbone in which a method trains something: which of its tensors are whose."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar, Self

import torch
from torch import nn


class Tuned(nn.Module):
    """Mixed into a frozen encoder or decoder, in front of it: some of its parameters train after all.

    Frozen weights in half precision run under autocast to their type, so that float32 masters beside them are
    cast; float32 weights follow the surrounding autocast. Training mode is that of any module.
    """

    # What the names of tensors begin with that are constants, which no method trains.
    constants: ClassVar[tuple[str, ...]] = ()

    def prepare(self, prepare: Callable[[Self], None]) -> None:
        """Lets a method unfreeze parameters and put trained modules in.

        Args:
            prepare: called with this part while it is all frozen. A module that replaces one of the
                backbone's holds that as ``base_layer``.
        """
        own = {id(parameter): name for name, parameter in self.named_parameters()}
        prepare(self)
        # Here -> in the backbone: the names of the backbone's tensors.
        self._backbone_names = {n: own[id(p)] for n, p in self.named_parameters() if id(p) in own}

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode, as in any module."""
        return nn.Module.train(self, mode)

    def _to_evaluation(self) -> None:
        pass

    def backbone_state(self) -> dict[str, torch.Tensor]:
        return {
            self._backbone_names[name]: tensor
            for name, tensor in self.state_dict().items()
            if name in self._backbone_names
        }

    def frozen_names(self) -> set[str]:
        """Which tensors of ``state_dict`` need not be saved: they stay as loaded, or are another's alias."""
        named = dict(self.named_parameters())
        aliases = {name for name, _ in self.named_parameters(remove_duplicate=False)} - set(named)
        return aliases | {n for n, p in named.items() if n in self._backbone_names and not p.requires_grad}

    @property
    def trains_matrices(self) -> bool:
        """Whether matrices of the backbone's own train, so that it is not known by them."""
        named = self.named_parameters()
        return any(p.requires_grad and p.ndim > 1 and n in self._backbone_names for n, p in named)

    def masters_autocast(self, device: torch.device) -> AbstractContextManager | None:
        """Autocast to the type of half-precision weights; None where the weights are of another."""
        if self.dtype in (torch.float16, torch.bfloat16) and device.type != "meta":
            return torch.autocast(device.type, dtype=self.dtype)
        return None
