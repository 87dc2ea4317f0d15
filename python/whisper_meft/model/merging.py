"""A plain Whisper out of a model whose method only changes the backbone's weights."""

from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

from ..errors import UserError
from ..methods import MeftConfig
from ..once import warn_once


def check_mergeable(config: MeftConfig) -> None:
    """Raises UserError, with the reason, for a method that adds a network instead of changing weights."""
    if config.pooling != "mean":
        raise UserError(
            f"a model with pooling={config.pooling!r} cannot be merged: a plain Whisper classifier reads the "
            "mean over time alone; save it with save_pretrained (self-contained with save_backbone=True)"
        )
    if config.can_merge:
        return
    able = ", ".join(name for name, each in MeftConfig.methods().items() if each.can_merge)
    what = f"a {config.method} side network" if hasattr(config, "placement") else f"{config.method}"
    raise UserError(
        f"{what} cannot be merged into the backbone: it is a network of its own that runs beside the "
        f"backbone's weights, unlike {able}; save it with save_pretrained (self-contained with "
        "save_backbone=True)"
    )


def merged_classifier(model: nn.Module) -> WhisperForAudioClassification:
    """See :meth:`whisper_meft.MeftModel.merge_and_unload`."""
    _check(model, "classifier", "counts padding as sound")
    tensors = merged_tensors(model.encoder, "encoder.", torch.float32)
    for part in ("projector", "classifier"):
        tensors |= {f"{part}.{name}": t for name, t in getattr(model, part).state_dict().items()}
    if (temperature := model.config.calibration_temperature) is not None:  # which a plain Whisper has none of
        for name in ("classifier.weight", "classifier.bias"):
            tensors[name] = tensors[name] / temperature
    config = WhisperConfig.from_dict(model.encoder.config.to_dict())
    config.id2label, config.label2id = dict(model.config.id2label), dict(model.config.label2id)
    config.classifier_proj_size = model.config.classifier_proj_size
    config.use_weighted_layer_sum = False
    return _plain(WhisperForAudioClassification, model, config, tensors)


def merged_recogniser(model: nn.Module) -> WhisperForConditionalGeneration:
    """See :meth:`whisper_meft.MeftForConditionalGeneration.merge_and_unload`."""
    _check(model, "recogniser", "hears the padding")
    dtype = torch.promote_types(model.decoder.dtype, torch.float32)
    tensors = merged_tensors(model.encoder, "model.encoder.", dtype)
    tensors |= merged_tensors(model.decoder, "model.decoder.", dtype)
    head = tensors.pop("model.decoder.proj_out.weight", None)
    tied = model.decoder.proj_out.weight is model.decoder.embed_tokens.weight
    tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"] if tied else head
    config = WhisperConfig.from_dict(model.decoder.config.to_dict())
    plain = _plain(WhisperForConditionalGeneration, model, config, tensors)
    plain.tie_weights()
    plain.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    return plain


def _check(model: nn.Module, kind: str, does: str) -> None:
    check_mergeable(model.meft_config)
    model.check_not_given_up()
    if model._adapter_is_off:
        raise UserError(
            "what was trained is switched off by disable_adapter, and merging needs it: leave that first"
        )
    if model.encoder.quantization is not None:
        raise UserError(
            f"a backbone that is quantised to {model.encoder.quantization} cannot be merged: load the model "
            "with quantization='none'"
        )
    if model.meft_config.max_frames != "fidelity":
        warn_once(
            f"The model was trained with max_frames={model.meft_config.max_frames!r}; a plain Whisper "
            f"{kind} computes the whole window and {does}, so its scores will differ."
        )


@torch.no_grad()
def merged_tensors(part: nn.Module, prefix: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of an encoder or decoder with what was trained in them."""
    tensors = {prefix + name: t.detach().to(dtype) for name, t in part.backbone_state().items()}
    for name, module in part.named_modules():
        if hasattr(module, "get_delta_weight"):  # a layer of the LoRA family
            key = f"{prefix}{name}.weight"
            tensors[key] = tensors[key] + module.get_delta_weight("default").to(dtype)
    return tensors


def _plain(
    kind: type[PreTrainedModel], model: nn.Module, config: Any, tensors: dict[str, torch.Tensor]
) -> PreTrainedModel:
    config.dtype = next(iter(tensors.values())).dtype
    with torch.device("meta"):
        plain = kind._from_config(config, attn_implementation=model.encoder.config._attn_implementation)
    plain.load_state_dict({name: t.detach().clone() for name, t in tensors.items()}, assign=True)
    return plain.eval()
