"""A plain Whisper classifier out of a model whose method only changes the encoder's weights."""

import torch
from torch import nn
from transformers import WhisperConfig, WhisperForAudioClassification

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
    what = f"a {config.method} side network" if config.frozen_encoder else f"{config.method}"
    raise UserError(
        f"{what} cannot be merged into the backbone: it is a network of its own that runs beside the "
        f"encoder's weights, unlike {able}; save it with save_pretrained (self-contained with "
        "save_backbone=True)"
    )


@torch.no_grad()
def merged_classifier(model: nn.Module) -> WhisperForAudioClassification:
    """See :meth:`whisper_meft.MeftModel.merge_and_unload`."""
    check_mergeable(model.meft_config)
    if model.encoder.quantization is not None:
        raise UserError(
            f"a backbone that is quantised to {model.encoder.quantization} cannot be merged: load the model "
            "with quantization='none'"
        )
    if model.meft_config.max_frames != "fidelity":
        warn_once(
            f"The model was trained with max_frames={model.meft_config.max_frames!r}; a plain Whisper "
            "classifier computes the whole window and counts padding as sound, so its scores will differ."
        )
    encoder = model.encoder
    tensors = {f"encoder.{name}": t.float() for name, t in encoder.backbone_state().items()}
    for name, module in encoder.named_modules():
        if hasattr(module, "get_delta_weight"):  # a layer of the LoRA family
            key = f"encoder.{name}.weight"
            tensors[key] = tensors[key] + module.get_delta_weight("default").float()
    for part in ("projector", "classifier"):
        tensors |= {f"{part}.{name}": t for name, t in getattr(model, part).state_dict().items()}
    config = WhisperConfig.from_dict(encoder.config.to_dict())
    config.id2label, config.label2id = dict(model.config.id2label), dict(model.config.label2id)
    config.classifier_proj_size = model.config.classifier_proj_size
    config.use_weighted_layer_sum = False
    config.dtype = torch.float32
    with torch.device("meta"):
        plain = WhisperForAudioClassification._from_config(
            config, attn_implementation=encoder.config._attn_implementation
        )
    plain.load_state_dict({name: t.detach().clone() for name, t in tensors.items()}, assign=True)
    return plain.eval()
