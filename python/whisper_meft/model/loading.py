"""Loading a saved model, and the backbone that it belongs to."""

import copy
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..encoder.dtypes import HALF, parse_dtype
from ..encoder.fingerprint import same_fingerprint
from ..encoder.quantization import REVISION
from ..errors import UserError, one_line
from ..files import read_json
from ..methods import MeftConfig
from .backbone import load_backbone, resolve_backbone
from .config import TASKS, MeftModelConfig
from .declared import check_declared_sizes, checked_labels
from .weights import check_names, load_checked, read_weights

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_IGNORED_OPTIONS = (
    "adapter_kwargs",
    "code_revision",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "use_safetensors",
    "weights_only",
)
# What a device map says that leaves the place to transformers.
_ANYWHERE = ("auto", "balanced", "balanced_low_0", "sequential")


def load(
    cls: type[PreTrainedModel],
    name_or_path: str | os.PathLike,
    backbone: str | os.PathLike | nn.Module | None,
    dtype: str | torch.dtype | None,
    attn_implementation: str | None,
    quantization: str | None,
    device: str | torch.device | None,
    attention: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """What :meth:`whisper_meft.MeftModel.from_pretrained` does: ``cls`` is the class to make, the rest its
    arguments.

    Raises:
        UserError: folder, config, weights or backbone are missing, damaged or do not belong together.
    """
    hub_options = {k: kwargs.pop(k) for k in HUB_OPTIONS if k in kwargs}
    earlier_name = kwargs.pop("torch_dtype", None)
    dtype = earlier_name if dtype is None else dtype
    device = _placed(device, kwargs.pop("device_map", None))
    _check_device(device)
    subfolder = kwargs.pop("subfolder", "") or ""
    saved_config = kwargs.pop("config", None)
    for name in [k for k in kwargs if k.startswith("_") or k in _IGNORED_OPTIONS]:
        kwargs.pop(name)
    if kwargs:
        raise UserError(f"from_pretrained got unknown arguments: {', '.join(sorted(kwargs))}")

    if saved_config is not None and not isinstance(saved_config, MeftModelConfig):
        raise UserError(
            "config must be None or the MeftModelConfig of a saved model, got "
            f"{type(saved_config).__name__}: the one in its folder is read without"
        )
    folder = fetch(name_or_path, hub_options) / subfolder
    config = saved_config if isinstance(saved_config, MeftModelConfig) else read_config(folder)
    if config.task != cls.task:
        raise UserError(
            f"{folder} holds a model for {config.task}, {cls.__name__} is for {cls.task}: load it by "
            f"{'MeftModel' if cls.task == 'transcription' else 'MeftForConditionalGeneration'}"
        )
    if attn_implementation is None and saved_config is config:  # where the Auto classes put it
        attn_implementation = config._attn_implementation
    dtype = parse_dtype(None if dtype == "auto" else dtype)
    trained_on = config.meft.get("backbone_quantization"), config.quantization_revision
    config = copy.deepcopy(config)
    runs_in, dtype = _apart_from_training(config, dtype)
    # A backbone that is loaded already stays as it is.
    config = _with_changes(config, dtype, isinstance(backbone, nn.Module), quantization, attention)
    MeftConfig.from_dict(config.meft)  # so that bad options are reported before anything is loaded
    tensors = read_weights(folder)

    base, name = _backbone_of(cls, config, folder, backbone, attn_implementation, hub_options)
    config.base_model_name_or_path = name or None
    if device is not None:
        base.get_encoder().to(device)
    _check_shapes(cls, config, base, tensors, folder)
    model = cls(config, base).to(device)
    model.name_or_path = config.name_or_path = os.fspath(name_or_path)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    load_checked(model, tensors, folder)
    saved = config.base_model_fingerprint
    if saved and not same_fingerprint(model.fingerprint(), saved):
        warnings.warn(
            f"the backbone {name or 'given'} has other weights than the one that {folder} was trained "
            "with: its scores will be wrong",
            stacklevel=3,
        )
    if runs_in is not None:
        model.cast_to_run(runs_in)
    if getattr(model, "generation_config", None) and (folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(folder)
    if trained_on[0] and model.encoder.quantization and trained_on[1] != REVISION:
        warnings.warn(
            f"{folder} was trained on a backbone that an earlier version rounded to {trained_on[0]} in "
            "another way: its scores may differ a little; train it again, or compare with "
            "quantization='none' (--backbone_quantization none)",
            stacklevel=3,
        )
    return model.eval()


def _placed(
    device: str | torch.device | None, device_map: str | int | torch.device | dict[str, Any] | None
) -> str | int | torch.device | None:
    """The one device that ``device_map`` of transformers stands for, in the place of ``device``."""
    if device_map is None:
        return device
    if device is not None:
        raise UserError(f"give device or device_map, not both, got {device!r} and {device_map!r}")
    if isinstance(device_map, dict):
        if len(device_map) != 1 or "" not in device_map:
            raise UserError(
                "device_map must be one device, 'auto' or {'': device}, for a model is not divided among "
                f"devices, got {device_map!r}"
            )
        device_map = device_map[""]
    if device_map in _ANYWHERE:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return device_map


def _check_device(device: str | torch.device | None) -> None:
    try:
        place = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device must be the name of a device, got {device!r}: {one_line(error)}") from error
    if place is not None and place.type == "meta":
        raise UserError("device must be one that holds weights, such as 'cpu' or 'cuda', got 'meta'")


def _generation_config(folder: Path) -> GenerationConfig:
    values = read_json(folder / "generation_config.json")
    values.pop("_from_model_config", None)  # which has all left out that transformers does not know
    try:
        return GenerationConfig.from_dict(values)
    except Exception as error:
        raise UserError(f"{folder / 'generation_config.json'} cannot be used: {one_line(error)}") from error


def _check_shapes(
    cls: type[PreTrainedModel],
    config: MeftModelConfig,
    base: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    folder: Path,
) -> None:
    """Compares the tensors with what the config describes before memory is taken for that."""
    config = copy.deepcopy(config)
    config.meft = config.meft | {"backbone_quantization": None}
    with torch.device("meta"):
        skeleton = cls(config, cls.base_class(base.config))
    saved = skeleton.saved_names()
    check_names(tensors, {name: t for name, t in skeleton.state_dict().items() if name in saved}, folder)


def _apart_from_training(
    config: MeftModelConfig, dtype: torch.dtype | None
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The half precision that a model is cast to once it is loaded, where its method trains float32 masters,
    and the number format of the backbone that is asked for else. One that was saved in half precision by an
    earlier version is float32."""
    options = MeftConfig.methods().get(str(config.meft.get("method")))
    if options is None or not options.trains_backbone:
        return None, dtype
    if config.meft.get("backbone_dtype") in [str(half).removeprefix("torch.") for half in HALF]:
        config.meft = config.meft | {"backbone_dtype": "float32"}
    return (dtype, None) if dtype in HALF else (None, dtype)


def _with_changes(
    config: MeftModelConfig,
    dtype: torch.dtype | None,
    as_it_is: bool,
    quantization: str | None,
    attention: str | None,
) -> MeftModelConfig:
    """A copy of a saved config with the number format, the quantisation and UniPT's attention that are asked
    for."""
    config = copy.deepcopy(config)
    if dtype is not None or as_it_is:
        config.meft = config.meft | {"backbone_dtype": None if dtype is None else str(dtype)}
    if quantization is not None:
        config.meft = config.meft | {
            "backbone_quantization": None if quantization == "none" else quantization
        }
    if attention is not None:
        method = config.meft.get("method")
        if method != "unipt":
            raise UserError(
                f"attention must be None for a model of {method}, it is an option of unipt, got {attention!r}"
            )
        config.meft = config.meft | {"attention": attention}
    return config


def _backbone_of(
    cls: type[PreTrainedModel],
    config: MeftModelConfig,
    folder: Path,
    backbone: str | os.PathLike | nn.Module | None,
    attn_implementation: str | None,
    hub_options: dict[str, Any],
) -> tuple[PreTrainedModel, str | None]:
    """The backbone that is given or else the one that the config names, and its name."""
    if isinstance(backbone, nn.Module):
        if not isinstance(backbone, cls.base_class):
            raise UserError(f"backbone must be a {cls.base_class.__name__}, got {type(backbone).__name__}")
        return backbone, getattr(getattr(backbone, "config", None), "_name_or_path", None)
    name = config.base_model_name_or_path if backbone is None else os.fspath(backbone)
    if not name:
        raise UserError(f"{folder} does not name its backbone: give it with backbone=... (--backbone)")
    name = resolve_backbone(name, folder if backbone is None else None)
    # The token and the like go along; the revision is that of the side network, not of the backbone.
    options = {k: v for k, v in hub_options.items() if k != "revision"}
    dtype = parse_dtype(config.meft.get("backbone_dtype"))
    options |= {"dtype": dtype, "attn_implementation": attn_implementation, "kind": cls.base_class}
    options["quantized"] = bool(config.meft.get("backbone_quantization"))
    return load_backbone(name, **options), name


def fetch(name: str | os.PathLike, hub_options: dict[str, Any]) -> Path:
    """The local folder of a saved model, downloaded first if ``name`` is one of the model hub."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file, the folder of a saved model is needed")
    name = os.fspath(name)
    try:
        # The config first: a wrong name must not download a whole Whisper.
        read_config(Path(hf_hub_download(name, "config.json", **hub_options)).parent)
        return Path(
            snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin"], **hub_options)
        )
    except UserError:
        raise
    except Exception as error:
        raise nowhere(name, error) from error


def nowhere(name: str | os.PathLike, error: Exception) -> UserError:
    """What to say of a model that is neither a folder nor, by ``error``, to be had from the hub."""
    return UserError(f"there is no folder {name}, nor can it be had from the model hub: {one_line(error)}")


def read_config(folder: Path) -> MeftModelConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: it was not written by MeftModel.save_pretrained")
    values = read_json(folder / "config.json")
    if not isinstance(values, dict) or values.get("model_type") != MeftModelConfig.model_type:
        kind = values.get("model_type") if isinstance(values, dict) else None
        raise UserError(
            f"{folder} holds a {kind or 'foreign'} model, not a side network; a checkpoint of the paper's "
            "code is turned into one by `whisper-meft convert`"
        )
    check_declared_sizes(values, {}, folder)
    try:
        config = MeftModelConfig.from_dict(values)
    except Exception as error:
        raise UserError(f"{folder / 'config.json'} cannot be used: {one_line(error)}") from error
    if config.task not in TASKS:
        raise UserError(
            f"{folder / 'config.json'} cannot be used: task must be {' or '.join(TASKS)}, got {config.task!r}"
        )
    for name in ("base_model_name_or_path", "base_model_fingerprint"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"{folder / 'config.json'} cannot be used: {name} must be text or null, got {value!r}"
            )
    for name, most in (("calibration_temperature", math.inf), ("rejection_threshold", 1)):
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and (0 < value < math.inf if most > 1 else 0 <= value <= most)):
            accepted = "a number from 0 to 1" if most == 1 else "a number above 0 and finite"
            raise UserError(
                f"{folder / 'config.json'} cannot be used: {name} must be {accepted}, got {value!r}"
            )
    if not isinstance(config.meft, dict):
        raise UserError(
            f"{folder / 'config.json'} cannot be used: it lacks the options of the method ('meft')"
        )
    if config.task == "classification":
        config.id2label = checked_labels(config.id2label, f"{folder / 'config.json'} cannot be used")
    return config
