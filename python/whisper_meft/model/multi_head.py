"""Several trained classifiers on one pass of the frozen encoder that they share."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import WhisperForAudioClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from ..encoder.fingerprint import same_fingerprint
from ..encoder.frozen import FrozenEncoder
from ..encoder.shared_pass import Reader, pooled_of_several, same_encoder, share_weights
from ..errors import UserError
from ..methods import MeftConfig
from .backbone import resolve_backbone
from .base import check_tensors
from .config import MeftModelConfig
from .loading import HUB_OPTIONS, fetch, read_config
from .module import MeftModel


class MultiHead(nn.Module):
    """Several trained classifiers with the same frozen backbone, answered by one pass of it.

    That costs what one model costs, and the side network and the head of each other; SHERL also runs the last
    encoder layer once more for itself. The answers are those of each model alone: on a CPU the same bits,
    where ``chunk_size`` is the same; on a GPU to rounding. Everything is in evaluation mode and without
    gradient. The models stay usable by themselves.

    Args:
        models: of methods with a frozen encoder (lst, unipt, sherl, head, weighted_sum), on backbones with
            the same weights, number format and quantisation on one device, and with the same ``max_frames``.

    Attributes:
        encoder: the :class:`whisper_meft.FrozenEncoder` that runs.

    Raises:
        UserError: a model cannot share the pass.
    """

    def __init__(self, models: Sequence[MeftModel]):
        super().__init__()
        if isinstance(models, (str, nn.Module)) or not isinstance(models, Sequence) or not models:
            raise UserError(f"models must be a list of one or more MeftModel, got {_kind(models)}")
        for index, model in enumerate(models):
            if not isinstance(model, MeftModel):
                raise UserError(f"models[{index}] must be a MeftModel, which classifies, got {_kind(model)}")
        names = [f"models[{index}]" for index in range(len(models))]
        _check_options([model.meft_config for model in models], names)
        self.models = nn.ModuleList(models)
        self._check_encoders(names)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        names_or_paths: Sequence[str | os.PathLike],
        backbone: str | os.PathLike | nn.Module | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        quantization: str | None = None,
        device: str | torch.device | None = None,
        attention: str | None = None,
        **kwargs: Any,
    ) -> "MultiHead":
        """Loads saved models and their backbone, which is held once.

        Args:
            names_or_paths: folders that ``save_pretrained`` wrote, or names on the model hub.
            backbone: hub name, folder, or loaded Whisper to use instead of what the saved configs name.
            dtype, attn_implementation, quantization, device, attention: as for
                :meth:`whisper_meft.MeftModel.from_pretrained`, for all models.
            kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            UserError: a model cannot be loaded, or cannot share the pass.
        """
        if isinstance(names_or_paths, (str, os.PathLike)) or not len(names_or_paths):
            raise UserError(
                f"names_or_paths must be a list of one or more folders or hub names, got {names_or_paths!r}"
            )
        if unknown := sorted(kwargs.keys() - set(HUB_OPTIONS)):
            raise UserError(f"from_pretrained got unknown arguments: {', '.join(unknown)}")
        names = [os.fspath(name) for name in names_or_paths]
        folders = [fetch(name, kwargs) for name in names]
        configs = [read_config(folder) for folder in folders]
        # Before any weights are read.
        for name, config in zip(names, configs):
            if config.task != MeftModel.task:
                raise UserError(f"{name} is a model for {config.task}, a pass is shared by classifiers")
        _check_options([MeftConfig.from_dict(config.meft) for config in configs], names)
        for name, config in zip(names, configs):
            if not isinstance(backbone, nn.Module):
                _check_held_alike(configs[0], config, names[0], name, dtype, quantization)
            saved = configs[0].base_model_fingerprint, config.base_model_fingerprint
            if all(saved) and not same_fingerprint(*saved):
                raise UserError(
                    f"{names[0]} and {name} cannot share a pass: they were trained on different backbones, "
                    f"{configs[0].base_model_name_or_path} and {config.base_model_name_or_path}"
                )
        options = {"dtype": dtype, "quantization": quantization, "device": device, "attention": attention}
        options |= {"attn_implementation": attn_implementation, **kwargs}
        places = [_place_of(config, folder, backbone) for config, folder in zip(configs, folders)]
        models: list[MeftModel] = []
        for name, place in zip(names, places):
            # What is quantised has another last layer for SHERL, and is not quantised twice.
            again = models and place == places[0] and models[0].encoder.quantization is None
            given = _whisper_around(models[0].encoder) if again else backbone
            models.append(MeftModel.from_pretrained(name, backbone=given, **options))
        whole = cls(models)
        for model in models:
            if model.encoder is not whole.encoder:
                share_weights(whole.encoder, model.encoder, whole._last_layer_counts(model))
        return whole

    @property
    def _runs(self) -> MeftModel:
        """The model whose encoder runs: that of SHERL has a last layer of its own where it is quantised."""
        return next((m for m in self.models if not m.meft_config.through_last_layer), self.models[0])

    @property
    def encoder(self) -> FrozenEncoder:
        return self._runs.encoder

    def _last_layer_counts(self, model: MeftModel) -> bool:
        """Whether ``model`` reads what the last layer of the shared encoder gives."""
        return not model.meft_config.through_last_layer

    def _check_encoders(self, names: Sequence[str]) -> None:
        runs = self._runs
        first, its_name = runs.encoder, names[list(self.models).index(runs)]
        for model, name in zip(self.models, names):
            encoder = model.encoder
            for what, one, other in (
                ("the device", first.conv1.weight.device, encoder.conv1.weight.device),
                ("backbone_dtype", _word(first.dtype), _word(encoder.dtype)),
                ("backbone_quantization", first.quantization, encoder.quantization),
                (
                    "attn_implementation",
                    first.config._attn_implementation,
                    encoder.config._attn_implementation,
                ),
            ):
                _check_alike(what, one, other, its_name, name, "load them alike")
            if encoder is not first and not same_encoder(first, encoder, self._last_layer_counts(model)):
                raise UserError(
                    f"{its_name} and {name} cannot share a pass: their backbones have different weights or "
                    "sizes; run them one by one"
                )

    def train(self, mode: bool = True) -> "MultiHead":
        """Stays in evaluation mode whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[SequenceClassifierOutput, ...]:
        """The class scores of each model.

        Args:
            input_features: (B, mel bins, frames) log-mel. attention_mask: (B, frames) or (B, samples); see
                :meth:`whisper_meft.MeftModel.forward`.

        Returns:
            For each model, in order, its ``logits`` (B, its classes) in the head's dtype.

        Raises:
            UserError: wrong shape, dtype or device, or a model is in ``disable_adapter()``.
        """
        if input_features is None:
            raise UserError("input_features is needed, got None")
        check_tensors(input_features=input_features, attention_mask=attention_mask)
        for index, model in enumerate(self.models):
            if model._adapter_is_off:
                raise UserError(f"models[{index}] is in disable_adapter(), in which it is called by itself")
        self.eval()  # one of the models may have been put into training mode by itself
        features, lengths = self._runs._frames_to_compute(input_features, attention_mask)
        taken = [model.statistics_taken() for model in self.models]
        readers = [
            Reader(
                model.encoder,
                model.side_network,
                model.meft_config.final_norm,
                model.meft_config.through_last_layer,
                statistics,
            )
            for model, statistics in zip(self.models, taken)
        ]
        sizes = [getattr(model.meft_config, "chunk_size", None) for model in self.models]
        size = min(filter(None, sizes), default=None)
        pooled = pooled_of_several(self.encoder, readers, features, lengths, size)
        return tuple(
            SequenceClassifierOutput(logits=model.scores(*found))
            for model, *found in zip(self.models, pooled, taken)
        )


def _kind(value: Any) -> str:
    return "an empty one" if isinstance(value, (list, tuple)) and not value else type(value).__name__


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_alike(what: str, one: Any, other: Any, its_name: str, name: str, remedy: str) -> None:
    """Raises UserError where two models differ in ``what``."""
    if one != other:
        raise UserError(
            f"{its_name} and {name} cannot share a pass: {what} is {one} for the one and {other} for the "
            f"other; {remedy}, or run them one by one"
        )


def _check_options(configs: Sequence[MeftConfig], names: Sequence[str]) -> None:
    """Raises UserError unless models of these methods can share a pass."""
    for name, config in zip(names, configs):
        if not config.frozen_encoder:
            raise UserError(
                f"{name} cannot share a pass: {config.method} trains inside the encoder, whose hidden states "
                "are then no other's; run it by itself"
            )
        first, its = configs[0].max_frames, config.max_frames
        _check_alike("max_frames", first, its, names[0], name, "train them alike")


def _check_held_alike(
    one: MeftModelConfig,
    other: MeftModelConfig,
    its_name: str,
    name: str,
    dtype: str | torch.dtype | None,
    quantization: str | None,
) -> None:
    """Raises UserError where two saved models' backbones get another number format or quantisation."""
    saved = [
        (each.meft.get("backbone_dtype"), each.meft.get("backbone_quantization")) for each in (one, other)
    ]
    (one_dtype, one_kind), (other_dtype, other_kind) = saved
    if dtype in (None, "auto") and one_dtype and other_dtype:
        remedy = "give one with dtype=... (--backbone_dtype)"
        _check_alike("backbone_dtype", one_dtype, other_dtype, its_name, name, remedy)
    if quantization is None:
        remedy = "give one with quantization=... (--backbone_quantization)"
        _check_alike("backbone_quantization", one_kind, other_kind, its_name, name, remedy)


def _place_of(config: MeftModelConfig, folder: Path, backbone: Any) -> Any:
    """Where a saved model's backbone is loaded from, or what is given in its place; None where it does not
    say."""
    if backbone is not None:
        return backbone if isinstance(backbone, nn.Module) else resolve_backbone(backbone)
    name = config.base_model_name_or_path
    return resolve_backbone(name, folder) if name else None


def _whisper_around(encoder: FrozenEncoder) -> WhisperForAudioClassification:
    """A Whisper whose encoder's modules are those of ``encoder``, to make another model of; its head holds
    nothing."""
    with torch.device("meta"):
        whisper = WhisperForAudioClassification(encoder.config)
    own = whisper.get_encoder()
    for name, module in encoder.named_children():
        setattr(own, name, module)
    return whisper
