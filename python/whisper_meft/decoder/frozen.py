"""The frozen Whisper decoder, run by Hugging Face's own code: for its masks, positions and caches.

What is ours happens inside layers that stand in the place of others: nothing of the decoder is written again.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration
from transformers.utils.output_capturing import maybe_install_capturing_hooks


def with_modules(module: nn.Module, **modules: nn.Module) -> nn.Module:
    """A copy of ``module`` with other modules of these names; whatever else it holds is shared."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **modules}
    return changed


class Around(nn.Module):
    """Calls ``function(layer, *arguments, **options)`` where ``layer`` would be called."""

    def __init__(self, layer: nn.Module, function: Callable):
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.function(self.layer, *arguments, **options)


class FrozenDecoder(nn.Module):
    """The decoder and the head of a Hugging Face Whisper, without gradients to their weights.

    The modules are shared with the model that is passed in, not copied. Frozen means frozen: no parameter
    requires a gradient, and nothing turns dropout or LayerDrop on. Weights in half precision run as they are,
    also under autocast.

    Args:
        whisper: gives the modules, and the code that runs them.
        dtype: number format to hold the weights in; None keeps it.
    """

    # Whether layers that would keep much for the backward are computed again there, unasked.
    recomputes = True

    def __init__(self, whisper: WhisperForConditionalGeneration, dtype: torch.dtype | None = None):
        super().__init__()
        decoder = whisper.model.decoder
        self.embed_tokens = decoder.embed_tokens
        self.embed_positions = decoder.embed_positions
        self.layers = decoder.layers
        self.layer_norm = decoder.layer_norm
        self.proj_out = whisper.proj_out  # its weight is the embedding's
        if dtype is not None:
            self._cast(dtype)
        self.requires_grad_(False)
        # In a tuple: their modules are those above, and are not to be found twice.
        self._whisper = (whisper,)
        self.eval()

    def _cast(self, dtype: torch.dtype) -> None:
        # New parameters, as the encoder's are, but one for each: the head's stays the embedding's.
        cast: dict[int, nn.Parameter] = {}
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.dtype != dtype:
                    new = cast.setdefault(id(parameter), parameter)
                    if new is parameter:
                        new = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                        cast[id(parameter)] = new
                    setattr(module, name, new)

    @property
    def config(self) -> Any:
        return self._whisper[0].config

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def max_target_positions(self) -> int:
        """The most tokens of a clip (448 for the published models)."""
        return self.embed_positions.num_embeddings

    def train(self, mode: bool = True) -> "FrozenDecoder":
        """Stays in evaluation mode whatever is asked for."""
        return super().train(False)

    def backbone_state(self) -> dict[str, Tensor]:
        """The backbone's own tensors by the names they have in the Hugging Face decoder, and the head's."""
        return self.state_dict()

    def frozen_names(self) -> set[str]:
        """Which tensors of ``state_dict`` stay as they were loaded, so that they need not be saved."""
        return set(self.state_dict())

    def _to_evaluation(self) -> None:
        if any(each.training for each in self.layers):  # train() was called on the model that shares them
            self.eval()

    def whisper(self, encoder: nn.Module, decoder: nn.Module) -> WhisperForConditionalGeneration:
        """Hugging Face's model with this encoder and decoder, in evaluation mode, to generate with."""
        whisper = self._whisper[0]
        model = with_modules(whisper.model, encoder=encoder, decoder=decoder)
        whole = with_modules(whisper, model=model, proj_out=self.proj_out)
        whole.training = model.training = False
        return whole

    def prepare_outputs(self) -> None:
        """To be called before decoders of :meth:`around` are asked for attentions or hidden states, as word
        timestamps do. transformers collects them by hooks on the layers and marks the decoder that has them:
        each copy without the mark would give the layers, which all share, one more.
        """
        maybe_install_capturing_hooks(self._whisper[0].model.decoder)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: without those hooks, local functions that cannot be pickled, and their
        mark. Where that is missing transformers puts them on again."""
        decoder = self._whisper[0].model.decoder
        if vars(decoder).pop("_output_capturing_hooks_installed", False):
            for module in decoder.modules():
                for number, hook in list(module._forward_hooks.items()):
                    if getattr(hook, "__module__", None) == maybe_install_capturing_hooks.__module__:
                        del module._forward_hooks[number]
        return self.__dict__

    def around(
        self,
        layer: Callable | None = None,
        last: Callable | None = None,
        norm: Callable | None = None,
    ) -> nn.Module:
        """Hugging Face's decoder on these modules, with functions called in the place of some.

        Args:
            layer: called for each layer as ``layer(module, *arguments, **options)``. last: for the last layer
                in place of ``layer``. norm: for the final LayerNorm.
        """
        self._to_evaluation()
        if self.config.output_attentions or self.config.output_hidden_states:
            self.prepare_outputs()
        functions = [layer] * (self.num_layers - 1) + [last or layer]
        layers = [Around(*both) if both[1] else both[0] for both in zip(self.layers, functions)]
        decoder = with_modules(
            self._whisper[0].model.decoder,
            embed_tokens=self.embed_tokens,
            embed_positions=self.embed_positions,
            layers=nn.ModuleList(layers),
            layer_norm=Around(self.layer_norm, norm) if norm else self.layer_norm,
        )
        decoder.training = False
        return decoder

    def weights_as_they_are(self, device: torch.device) -> AbstractContextManager:
        """Half and double precision weights are not for autocast to change."""
        if self.dtype != torch.float32 and device.type != "meta":
            return torch.autocast(device.type, enabled=False)
        return nullcontext()

    def run(
        self, decoder: nn.Module, input_ids: Tensor, encoder_output: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The output of a decoder that :meth:`around` gave, for whole sequences.

        Args:
            input_ids: (B, U) token numbers. encoder_output: (B, T, D), in any type. mask: (B, U), 0 for
                padding on the left.

        Returns:
            (B, U, D).
        """
        with self.weights_as_they_are(input_ids.device):
            if self.dtype != torch.float32:
                encoder_output = encoder_output.to(self.dtype)
            return decoder(
                input_ids=input_ids,
                attention_mask=mask,
                encoder_hidden_states=encoder_output,
                use_cache=False,
            ).last_hidden_state
