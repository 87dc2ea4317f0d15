"""Checkpoints of the published code (arXiv 2512.02074) to saved models of this library and back.

The published classes are one Whisper classifier with the side network's tensors among the encoder's, all in
one file. The table of names is the whole difference; the values are the same.
"""

import json
import os
import warnings
from pathlib import Path

import safetensors.torch
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

from ..encoder.fingerprint import fingerprint, same_backbone
from ..encoder.frozen import FrozenEncoder
from ..errors import UserError, one_line
from ..files import read_json, replacing, write_json, write_text
from ..methods import MeftConfig
from ..methods.side_networks import LSTConfig, SHERLConfig, UniPTConfig, tapped_layers
from .backbone import load_backbone, resolve_backbone
from .base import check_sizes
from .config import MeftModelConfig
from .declared import check_declared_sizes
from .loading import fetch, read_config
from .module import MeftModel, get_meft_model
from .weights import check_names, load_checked, read_weights
from .whole_folder import whole_folder

# A tensor that every checkpoint of the method has, of shape [side width, backbone width].
_MARKS = {
    "lst": "encoder.first_downsample.1.weight",
    "unipt": "encoder.side_downsample0_encoder.1.weight",
    "sherl": "encoder.side_block.hor_block.0.fc1.weight",
}

_ADAPTER_MARK = "encoder.layers.0.LST_block.linear_1.weight"

# What the published scripts have written into them.
_PUBLISHED_SIZES = {
    "lst": {"reduction_factor": 8, "adapter_dim": 256},
    "unipt": {"reduction_factor": 16},
    "sherl": {"reduction_factor": 8},
}


def published_names(method: str, num_layers: int) -> dict[str, str]:
    """Our name of every tensor of side network and head, mapped to the published one.

    Args:
        method: ``"lst"``, ``"unipt"`` or ``"sherl"``, tapping all layers. num_layers: of the encoder.
    """
    modules, single = {}, {}
    if method == "lst":
        modules |= {"down.0.norm": "first_downsample.0", "down.0.linear": "first_downsample.1"}
        for i in range(num_layers):
            layer = f"layers.{i}"
            modules[f"down.{i + 1}.norm"] = f"{layer}.side_downsample.0"
            modules[f"down.{i + 1}.linear"] = f"{layer}.side_downsample.1"
            for part in ("norm", "linear_1", "linear_2"):
                modules[f"rungs.{i}.{part}"] = f"{layer}.LST_block.{part}"
            single[f"rungs.{i}.gate"] = f"{layer}.gate_param"
        modules |= {"up.norm": "final_upsample.0", "up.linear": "final_upsample.1", "norm": "layer_norm_LST"}
    elif method == "unipt":
        for i in range(num_layers + 1):
            down = "side_downsample0_encoder" if i == 0 else f"side_downsamples_encoder.{i - 1}"
            modules |= {f"down.{i}.norm": f"{down}.0", f"down.{i}.linear": f"{down}.1"}
        modules |= {
            "gate": "side_gate_layer_encoder",
            "adapter.norm": "side_projection_encoder.0",
            "adapter.linear_1": "side_projection_encoder.1",
            "adapter.linear_2": "side_projection_encoder.3",
            "up.norm": "side_upsample.0",
            "up.linear": "side_upsample.2",
            "norm": "layer_norm_unipt_encoder",
        }
    else:
        for i in range(num_layers):
            for k in (1, 2, 3):
                modules[f"down.{i}.linear_{k}"] = f"side_block.hor_block.{i}.fc{k}"
        modules |= {"guide": "side_block.guide_block.fc_attn", "out": "side_block.fc_out"}
        single["gate"] = "side_block.gate_params"
    kinds = ("weight", "bias")
    single |= {f"{ours}.{kind}": f"{name}.{kind}" for ours, name in modules.items() for kind in kinds}
    names = {f"side_network.{ours}": f"encoder.{name}" for ours, name in single.items()}
    heads = [f"{head}.{kind}" for head in ("projector", "classifier") for kind in kinds]
    return names | {name: name for name in heads}


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    method: str | None = None,
    backbone: str | os.PathLike | None = None,
) -> MeftModel:
    """Turns a checkpoint folder of the published code into a saved model of this library.

    Method, reduction factor and adapter width are read from the tensors' names and shapes.

    Args:
        src: holds ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin`` (whole or in shards).
        dst: folder to write. Self-contained, with the encoder of ``src`` in ``backbone/``, unless
            ``backbone`` is given.
        method: ``"lst"``, ``"unipt"`` or ``"sherl"``, if it should be checked.
        backbone: hub name or folder of the backbone that ``dst`` shall refer to instead of holding one.
            Needed where ``src`` holds the side network only.

    Returns:
        The converted model, in evaluation mode.

    Raises:
        UserError: ``src`` is no such checkpoint or damaged, tensors are missing or unknown (by name),
            ``method`` is another than the checkpoint's, or ``backbone`` does not fit or has other weights
            than ``src``.
    """
    src, dst = Path(src), Path(dst)
    _check_folders(src, dst)
    if backbone is not None:
        _check_apart(dst, resolve_backbone(backbone), "the backbone")
    whisper_config = _whisper_config(src)
    tensors = read_weights(src)
    check_declared_sizes(whisper_config.to_dict(), {name: t.shape for name, t in tensors.items()}, src)
    config = _side_config(tensors, src, method)
    if whisper_config.use_weighted_layer_sum:
        if config.method != "lst":  # the published LST computes the weighted sum and then discards it
            raise UserError(f"{src} was trained with use_weighted_layer_sum, which side networks do not have")
        tensors.pop("layer_weights", None)

    # The checkpoint's tensors fall into two parts; what is in neither is reported below.
    try:
        with torch.device("meta"):
            skeleton = WhisperForAudioClassification(whisper_config)
    except Exception as error:  # sizes that no Whisper can have
        raise UserError(f"{src / 'config.json'} cannot be used: {one_line(error)}") from error
    backbone_names = {f"encoder.{name}" for name in skeleton.encoder.state_dict()}
    own_backbone = {name: tensors.pop(name) for name in backbone_names & set(tensors)}
    if not own_backbone and backbone is None:
        raise UserError(f"{src} holds no backbone: name the one it was trained on (backbone=..., --backbone)")

    base = _own_base(whisper_config, own_backbone, src) if own_backbone else None
    if backbone is not None:
        named = load_backbone(backbone)
        if base is not None and not same_backbone(named.encoder, fingerprint(base.encoder)):
            raise UserError(
                f"the backbone {os.fspath(backbone)} has other weights than the one in {src}: leave it out "
                "(--backbone) to keep the checkpoint's own"
            )
        base = _with_head(named, whisper_config)
    model = get_meft_model(base, config)
    names = published_names(config.method, whisper_config.encoder_layers)
    state = model.state_dict()
    check_names(tensors, {published: state[ours] for ours, published in names.items()}, src)
    load_checked(model, {ours: tensors[published] for ours, published in names.items()}, src)
    with whole_folder(dst) as folder:
        model.save_pretrained(folder, save_backbone=backbone is None)
        _write_feature_extractor(src, folder, whisper_config)
    return model.eval()


def to_published(
    src: str | os.PathLike, dst: str | os.PathLike, backbone: str | os.PathLike | None = None
) -> None:
    """Turns a saved model of this library into a checkpoint folder that the published code loads.

    Args:
        src: folder or hub name of the saved model. dst: folder to write ``config.json`` and
            ``model.safetensors`` into, the backbone's tensors included.
        backbone: hub name or folder of the backbone, if not the one that ``src`` names. Of a model on a
            quantised one its weights as they were before are written, and a warning says so; another warning
            says what ``max_frames`` other than "fidelity" becomes.

    Raises:
        UserError: ``src`` cannot be loaded, is no side network, or taps only some of the layers or has
            another pooling or attention, which the published code cannot.
    """
    dst = Path(dst)
    if Path(src).is_dir():
        _check_folders(Path(src), dst)
    else:
        _check_destination(dst)
    # The published code has no quantised layers: it gets the weights that were rounded for this model.
    rounded_to = read_config(fetch(src, {})).meft.get("backbone_quantization")
    model = MeftModel.from_pretrained(src, backbone=backbone, quantization="none")
    config = model.meft_config
    if config.method not in _PUBLISHED_SIZES:
        raise UserError(
            f"{src} was trained by {config.method}: the published code loads side networks only, "
            f"{', '.join(_PUBLISHED_SIZES)}"
        )
    layers = tapped_layers(getattr(config, "layers", None), model.encoder.num_layers)
    if layers is not None and layers != list(range(1, model.encoder.num_layers + 1)):
        raise UserError(f"{src} taps the layers {layers}: the published code taps all of them")
    if config.pooling != "mean":
        raise UserError(
            f"{src} was trained with pooling={config.pooling!r}: the head of the published code reads the "
            "mean over time alone"
        )
    if getattr(config, "attention", "exact") != "exact":
        raise UserError(
            f"{src} has attention={config.attention!r}: the published code has the exact one alone"
        )
    values = config.to_dict()
    differing = {k: v for k, v in _PUBLISHED_SIZES[config.method].items() if values[k] != v}
    if differing:
        wanted = ", ".join(f"{k} {v}" for k, v in differing.items())
        warnings.warn(
            f"the published code has {wanted} written into it: change it there to load {dst}", stacklevel=2
        )
    if config.max_frames != "fidelity":
        warnings.warn(
            f"{src} was trained with max_frames={config.max_frames!r}; the published code computes the whole "
            "window and counts padding as sound, so its scores will differ",
            stacklevel=2,
        )
    if rounded_to is not None:
        warnings.warn(
            f"{src} was trained on a backbone that is rounded to {rounded_to}; {dst} holds the weights "
            "before that, so its scores will differ a little",
            stacklevel=2,
        )

    state = model.state_dict()
    names = published_names(config.method, model.encoder.num_layers)
    names |= {name: name for name in state if name.startswith("encoder.")}
    if (temperature := model.config.calibration_temperature) is not None:
        state |= {name: state[name] / temperature for name in ("classifier.weight", "classifier.bias")}
    tensors = {published: state[ours].detach().cpu().contiguous() for ours, published in names.items()}
    whisper_config = WhisperConfig.from_dict(model.encoder.config.to_dict())
    whisper_config.architectures = ["WhisperForAudioClassification"]
    whisper_config.use_weighted_layer_sum = False
    whisper_config.classifier_proj_size = model.config.classifier_proj_size
    whisper_config.id2label, whisper_config.label2id = model.config.id2label, model.config.label2id
    _check_apart(dst, model.config.base_model_name_or_path, "the backbone of the model")
    with whole_folder(dst) as folder:
        with replacing(folder / "model.safetensors") as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
        write_text(folder / "config.json", whisper_config.to_json_string())
        if Path(src).is_dir():
            _write_feature_extractor(Path(src), folder, whisper_config)


def _check_folders(src: Path, dst: Path) -> None:
    if not src.is_dir():
        raise UserError(f"there is no folder {src}")
    _check_destination(dst)
    if dst.exists() and dst.samefile(src):
        raise UserError(f"source and destination are both {src}: the checkpoint would be overwritten")
    _check_apart(dst, src, "the source")


def _check_destination(dst: Path) -> None:
    if dst.exists() and not dst.is_dir():
        raise UserError(f"cannot write into {dst}: it is a file, a folder is needed")
    if Path.cwd().is_relative_to(dst.resolve()):  # replaced, the shell would stand in a deleted one
        raise UserError(
            f"cannot write into {dst}: it is the folder that you are in, or above it; name another"
        )


def _check_apart(dst: Path, name: str | os.PathLike | None, what: str) -> None:
    """Raises UserError if replacing the folder ``dst`` would take away the folder ``name``, or a part."""
    if not name or not os.path.isdir(name) or not dst.exists():
        return
    kept, replaced = Path(name).resolve(), dst.resolve()
    if kept.is_relative_to(replaced) or replaced.is_relative_to(kept):
        raise UserError(f"{what} is {name}, writing {dst} would overwrite it: name another folder to write")


def _whisper_config(src: Path) -> WhisperConfig:
    values = read_json(src / "config.json")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind == MeftModelConfig.model_type:
        raise UserError(f"{src} is a saved model of this library already; --to_published goes the other way")
    if kind != "whisper":
        raise UserError(f"{src / 'config.json'} describes a {kind or 'foreign'} model, whisper is needed")
    check_declared_sizes(values, {}, src)
    try:
        return WhisperConfig.from_dict(values)
    except Exception as error:
        raise UserError(f"{src / 'config.json'} cannot be used: {one_line(error)}") from error


def _side_config(tensors: dict[str, torch.Tensor], src: Path, method: str | None) -> MeftConfig:
    """The method and its sizes, from names and shapes."""
    if method is not None and method not in _MARKS:
        raise UserError(f"method must be one of {', '.join(_MARKS)}, got {method!r}")
    found = [name for name, mark in _MARKS.items() if mark in tensors]
    if len(found) != 1:
        what = " and ".join(found) or "none"
        raise UserError(
            f"{src} should hold the tensors of one side network, found {what}: one of "
            f"{', '.join(_MARKS.values())} is needed"
        )
    if method not in (None, found[0]):
        raise UserError(f"{src} holds a {found[0]} side network, not {method}")
    width, hidden_size = _matrix(tensors, _MARKS[found[0]], src).shape
    # floor(hidden / floor(hidden / width)) is width whenever width came from an integer reduction factor.
    factor = hidden_size // max(width, 1)
    if factor < 1 or hidden_size // factor != width:
        raise UserError(f"{src} has side width {width}, which no reduction factor makes of {hidden_size}")
    if found[0] == "lst":
        return LSTConfig(reduction_factor=factor, adapter_dim=_matrix(tensors, _ADAPTER_MARK, src).shape[0])
    return (UniPTConfig if found[0] == "unipt" else SHERLConfig)(reduction_factor=factor)


def _matrix(tensors: dict[str, torch.Tensor], name: str, src: Path) -> torch.Tensor:
    if name not in tensors:
        raise UserError(f"the weights in {src} do not fit the model: {name} missing")
    if tensors[name].ndim != 2:
        raise UserError(f"{name} in {src} should be a matrix, got shape {tuple(tensors[name].shape)}")
    return tensors[name]


def _own_base(
    config: WhisperConfig, tensors: dict[str, torch.Tensor], src: Path
) -> WhisperForAudioClassification:
    """The checkpoint's own encoder, in its number format, with a new head."""
    base = WhisperForAudioClassification(config)
    check_names(tensors, {f"encoder.{k}": v for k, v in base.encoder.state_dict().items()}, src)
    dtype = tensors["encoder.conv1.weight"].dtype
    base.encoder = base.encoder.to(dtype)
    base.encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in tensors.items()})
    base.config._name_or_path = ""
    return base


def _with_head(named: WhisperForAudioClassification, config: WhisperConfig) -> WhisperForAudioClassification:
    """``named`` with a head of the sizes and labels in ``config``; its values are about to be replaced."""
    check_sizes(config, FrozenEncoder(named.encoder))
    named.config.classifier_proj_size = config.classifier_proj_size
    named.config.id2label, named.config.label2id = config.id2label, config.label2id
    named.projector = torch.nn.Linear(config.d_model, config.classifier_proj_size)
    named.classifier = torch.nn.Linear(config.classifier_proj_size, config.num_labels)
    return named


def _write_feature_extractor(src: Path, dst: Path, config: WhisperConfig) -> None:
    """Copies the feature extractor's settings, or writes Whisper's own: the published scripts save none.
    Either way the window is the backbone's, with padding as sound: see ``saving.extractor_to_save``."""
    saved = src / "preprocessor_config.json"
    seconds = config.max_source_positions / 50
    seconds = int(seconds) if seconds.is_integer() else seconds
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    values = read_json(saved) if saved.is_file() else {}
    if values.get("return_attention_mask"):
        for name in ("return_attention_mask", "chunk_length", "n_samples", "nb_max_frames"):
            values[name] = getattr(extractor, name)
    write_json(dst / saved.name, values or json.loads(extractor.to_json_string()))
