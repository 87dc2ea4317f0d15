"""A Whisper encoder that trains, wholly or in part."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..errors import UserError
from .frozen import FrozenEncoder


class TunedEncoder(FrozenEncoder):
    """A :class:`FrozenEncoder` with trained parameters: the same stream, with gradient.

    Autograd keeps nothing below the first trained parameter. Frozen weights in half precision run under
    autocast to their type, so that float32 masters beside them are cast; float32 weights follow the
    surrounding autocast. Dropout is active in training mode, where the backbone's config has any (the
    published Whisper models have none); LayerDrop is not.

    Args:
        whisper_encoder: as for :class:`FrozenEncoder`; its modules are changed in place.
        dtype: number format of the frozen weights, ``None`` keeps it.
        prepare: called with this encoder while it is all frozen; unfreezes parameters and puts trained
            modules in. A module that replaces one of the encoder's holds that as ``base_layer``.
    """

    def __init__(
        self,
        whisper_encoder: nn.Module,
        dtype: str | torch.dtype | None,
        prepare: Callable[["TunedEncoder"], None],
    ):
        super().__init__(whisper_encoder, dtype)
        own = {id(parameter): name for name, parameter in self.named_parameters()}
        prepare(self)
        # Here -> in the backbone: the names of the backbone's tensors.
        self._backbone_names = {n: own[id(p)] for n, p in self.named_parameters() if id(p) in own}

    def train(self, mode: bool = True) -> "TunedEncoder":
        """Training or evaluation mode, as in any module."""
        return nn.Module.train(self, mode)

    def backbone_state(self) -> dict[str, torch.Tensor]:
        return {
            self._backbone_names[name]: tensor
            for name, tensor in self.state_dict().items()
            if name in self._backbone_names
        }

    def frozen_names(self) -> set[str]:
        return {n for n, p in self.named_parameters() if n in self._backbone_names and not p.requires_grad}

    def _states(
        self,
        input_features: torch.Tensor,
        lengths: torch.Tensor | None,
        final_norm: bool,
        statistics: bool = False,
    ) -> Iterator[torch.Tensor]:
        device = input_features.device
        with self._weights_as_they_are(device):
            states = self._embed(input_features, lengths)
            states = nn.functional.dropout(states, self.config.dropout, self.training)
            mask = self._attention_mask(lengths, states.shape[1])
        yield states
        for layer in self.layers:
            with self._weights_as_they_are(device):
                states = self._run(layer, states, mask)
                if final_norm and layer is self.layers[-1]:
                    states = self.layer_norm(states)
            yield states

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """Refused: layers with a gradient are not compiled here; torch.compile of the whole model is.

        Raises:
            UserError: always.
        """
        raise UserError(
            "backbone_compile is for methods beside a frozen encoder, this one trains inside it: use "
            "torch_compile"
        )

    def _to_evaluation(self) -> None:
        pass

    def _weights_as_they_are(self, device: torch.device):
        if self.dtype in (torch.float16, torch.bfloat16) and device.type != "meta":
            return torch.autocast(device.type, dtype=self.dtype)
        return super()._weights_as_they_are(device)
