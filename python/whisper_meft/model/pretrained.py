"""Loading the pretrained Whisper encoder and its feature extractor, with errors that name the argument."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PreTrainedModel,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperTokenizer,
)

from ..errors import UserError, one_line
from ..options.common import ModelArguments
from .backbone import check_source, load_backbone, quiet_transformers, resolve_backbone
from .declared import check_model_folder


def resolve_dtype(name: str, use_cpu: bool = False) -> str:
    """The dtype that "auto" stands for: bfloat16, or float16 on an older GPU, and float32 on the CPU."""
    if name != "auto":
        return name
    if use_cpu or not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def _from_hub(argument: str, name: str, load: Any, **options: Any) -> Any:
    try:
        return load(name, **options)
    except UserError:
        raise
    except Exception as error:  # whatever a broken folder or an unreachable hub gives
        raise UserError(f"{argument}: cannot load {name}: {one_line(error)}") from error


def load_config(arguments: ModelArguments) -> Any:
    """The WhisperConfig of the backbone.

    Raises:
        UserError: there is no such model, or it is not a Whisper checkpoint.
    """
    name = resolve_backbone(arguments.model_name_or_path)
    check_source("model_name_or_path", name)
    local_config = Path(name) / "config.json"
    if local_config.is_file() and "meft" in _read_config(local_config):
        raise UserError(
            f"model_name_or_path: {name} is a side network trained by this library, its backbone is needed"
        )
    if local_config.is_file():
        try:
            check_model_folder(name)
        except UserError as error:
            raise UserError(f"model_name_or_path: {error}") from error
    config = _from_hub(
        "model_name_or_path",
        name,
        AutoConfig.from_pretrained,
        revision=arguments.model_revision,
        cache_dir=arguments.cache_dir,
        token=arguments.token,
        trust_remote_code=arguments.trust_remote_code,
    )
    if config.model_type != "whisper":
        raise UserError(
            f"model_name_or_path: {name} is a {config.model_type} checkpoint, a Whisper checkpoint is needed"
        )
    return config


def load_whisper(
    arguments: ModelArguments,
    dtype: str,
    kind: type[PreTrainedModel] = WhisperForAudioClassification,
    quantized: bool = False,
) -> PreTrainedModel:
    """The pretrained model, see :func:`whisper_meft.model.backbone.load_backbone`.

    Args:
        arguments: where it is.
        dtype: "float32", "float16" or "bfloat16".
        kind: the class to load. quantized: whether its encoder is going to be: see there.
    """
    return load_backbone(
        arguments.model_name_or_path,
        dtype=getattr(torch, dtype),
        argument="model_name_or_path",
        kind=kind,
        quantized=quantized,
        revision=arguments.model_revision,
        cache_dir=arguments.cache_dir,
        token=arguments.token,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path: {path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def load_feature_extractor(
    name: str, argument: str = "feature_extractor_name", **hub: Any
) -> WhisperFeatureExtractor:
    """The log-mel feature extractor at ``name`` (folder or hub name).

    Raises:
        UserError: there is none, or it is not Whisper's.
    """
    name = resolve_backbone(name)
    path = Path(name)
    if path.is_dir() and not any(
        (path / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")
    ):
        raise UserError(
            f"{argument}: {name} holds no preprocessor_config.json; name the feature extractor's folder "
            "with --feature_extractor_name"
        )
    if not path.is_dir():
        check_source(argument, name)
    extractor = _from_hub(argument, os.fspath(name), WhisperFeatureExtractor.from_pretrained, **hub)
    kind = extractor.feature_extractor_type if hasattr(extractor, "feature_extractor_type") else None
    if kind not in (None, "WhisperFeatureExtractor"):
        raise UserError(f"{argument}: {name} is a {kind}, Whisper's feature extractor is needed")
    return extractor


def load_tokenizer(name: str, argument: str = "tokenizer_name", **hub: Any) -> WhisperTokenizer:
    """The tokenizer at ``name`` (folder or hub name).

    Raises:
        UserError: there is none, or it is not Whisper's.
    """
    name = resolve_backbone(name)
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{argument}: {name} holds no tokenizer.json; name its folder with --tokenizer_name")
    with quiet_transformers():
        tokenizer = _from_hub(argument, os.fspath(name), WhisperTokenizer.from_pretrained, **hub)
    if "<|startoftranscript|>" not in tokenizer.get_vocab():
        raise UserError(f"{argument}: {name} is not Whisper's tokenizer, it lacks <|startoftranscript|>")
    return tokenizer
