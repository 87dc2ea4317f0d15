"""Writing what was trained of a model into a folder, and uploading it."""

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel

from ..encoder.dtypes import HALF
from ..encoder.quantization import REVISION
from ..errors import UserError
from ..files import replacing, write_text
from ..once import warn_once
from .backbone import backbone_reference, found_here_alone
from .card import model_card
from .weights import plain_name, some_of


def save(
    model: PreTrainedModel, folder: Path, state_dict: dict[str, torch.Tensor] | None, save_backbone: bool
) -> None:
    """What :meth:`whisper_meft.MeftModel.save_pretrained` does; the config, by which a model is known, comes
    last.

    Args:
        model: to save. folder: where, made as needed.
        state_dict: tensors instead of the model's own. save_backbone: also write the encoder.

    Raises:
        UserError: the folder cannot be written or is the backbone's own, or the backbone cannot be saved.
    """
    model.check_not_given_up()
    if not save_backbone:
        model.check_frozen()
    _check_apart(model.config.base_model_name_or_path, folder)
    tensors = _to_save(model, model.state_dict() if state_dict is None else state_dict)
    model.check_config(tensors)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # What trains of the backbone's own weights is saved: which they came from does not matter.
    config.base_model_fingerprint = model.fingerprint() or None
    if config.task == "transcription":
        config.processor_class = "WhisperProcessor"  # what AutoProcessor makes of the folder
    config.quantization_revision = REVISION if model.encoder.quantization else None
    # The number format that was trained with, so that the scores come out the same after loading.
    dtype = model.encoder.dtype
    if model.meft_config.trains_backbone and dtype in HALF:  # cast to run: the masters are float32
        dtype = torch.float32
    config.meft = model.meft_config.to_dict() | {"backbone_dtype": str(dtype).removeprefix("torch.")}
    if save_backbone:
        model.write_backbone(folder / "backbone")
        config.base_model_name_or_path = "backbone"
    else:
        config.base_model_name_or_path = backbone_reference(model.config.base_model_name_or_path, folder)
        if not config.base_model_name_or_path:
            warn_once(
                "The backbone has no name to find it by: loading this model will need backbone=..., or "
                "save it with save_backbone=True."
            )
    with replacing(folder / "model.safetensors") as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    if not (folder / "README.md").exists():
        language = getattr(getattr(model, "generation_config", None), "language", None)
        write_text(folder / "README.md", model_card(config, language, folder))
    if getattr(model, "generation_config", None) is not None:
        write_text(folder / "generation_config.json", model.generation_config.to_json_string())
    write_text(folder / "config.json", config.to_json_string())


def _to_save(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the ``given`` tensors that are saved, by their names in the model."""
    saved = {plain_name(name) for name in model.saved_names()}
    tensors = {plain_name(name): tensor for name, tensor in given.items() if plain_name(name) in saved}
    if missing := sorted(saved - set(tensors)):
        raise UserError(
            f"state_dict must hold all that {model.meft_config.method} trains, it lacks {some_of(missing)}"
        )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _check_apart(backbone: str | None, folder: Path) -> None:
    """Raises UserError where ``folder`` is the backbone's own, whose files would be written over."""
    if backbone and os.path.isdir(backbone) and folder.is_dir() and os.path.samefile(backbone, folder):
        raise UserError(
            f"cannot save into {folder}: it is the folder of the backbone {backbone}, which would be "
            "overwritten; name another folder"
        )


def extractor_to_save(extractor: Any, max_frames: int | str) -> Any:
    """A copy of a feature extractor with the settings by which transformers' ``pipeline`` answers as
    ``whisper-meft predict`` does; as it is where padding counts as sound.

    Args:
        extractor: a ``WhisperFeatureExtractor``. max_frames: the method's option. A number that is whole
            seconds becomes the extractor's window; with others clips longer than that differ a little, since
            the loudness of a whole clip sets the floor of its log-mel.
    """
    if max_frames == "fidelity" or not hasattr(extractor, "return_attention_mask"):
        return extractor
    extractor = copy.deepcopy(extractor)
    extractor.return_attention_mask = True
    samples = 0 if max_frames == "longest" else 2 * max_frames * extractor.hop_length
    if samples and samples % extractor.sampling_rate == 0:
        extractor.chunk_length = min(samples // extractor.sampling_rate, extractor.chunk_length)
        extractor.n_samples = extractor.chunk_length * extractor.sampling_rate
        extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
    return extractor


def upload(
    model: PreTrainedModel,
    repo_id: str,
    state_dict: dict[str, torch.Tensor] | None,
    save_backbone: bool,
    private: bool | None,
    token: str | bool | None,
    **options: Any,
) -> Any:
    """What :meth:`whisper_meft.MeftModel.push_to_hub` does; ``options`` are ``HfApi.upload_folder``'s.

    Raises:
        UserError: the backbone is a local folder, which nobody else could find.
    """
    name = model.config.base_model_name_or_path
    if not save_backbone and (not name or found_here_alone(name)):
        raise UserError(
            f"the backbone ({name or 'no name'}) is not on the model hub, so nobody could load the "
            "upload: use push_to_hub(..., save_backbone=True)"
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=state_dict, save_backbone=save_backbone)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
