"""A Whisper encoder that trains, wholly or in part."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..errors import UserError
from ..tuning import Tuned
from .frozen import FrozenEncoder


class TunedEncoder(Tuned, FrozenEncoder):
    """A :class:`FrozenEncoder` with trained parameters: the same stream, with gradient.

    Autograd keeps nothing below the first trained parameter. Dropout is active in training mode, where the
    backbone's config has any (the published Whisper models have none); LayerDrop is not. For number formats
    see :class:`whisper_meft.tuning.Tuned`.

    Args:
        whisper_encoder: as for :class:`FrozenEncoder`; its modules are changed in place.
        dtype: number format of the frozen weights, ``None`` keeps it.
        prepare: unfreezes parameters and puts trained modules in, see
            :meth:`whisper_meft.tuning.Tuned.prepare`.
    """

    constants = ("embed_positions.",)  # sinusoids

    def __init__(
        self,
        whisper_encoder: nn.Module,
        dtype: str | torch.dtype | None,
        prepare: Callable[["TunedEncoder"], None],
    ):
        super().__init__(whisper_encoder, dtype)
        self.prepare(prepare)

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

    def _weights_as_they_are(self, device: torch.device):
        return self.masters_autocast(device) or super()._weights_as_they_are(device)
