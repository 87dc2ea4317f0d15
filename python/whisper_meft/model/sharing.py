"""Who uses the modules of a Whisper: models share those of the base that they are made of."""

import gc
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from ..encoder.dtypes import parse_dtype
from ..encoder.quantization import is_in_pieces, is_quantized
from ..errors import UserError
from ..methods import MeftConfig
from ..methods.tuned import TunedConfig

_ENTRIES = 16  # of each tensor, by which a change is seen: training moves them all


class _Use:
    """What became of one Whisper: the models that live on it, and its weights before one of them trained."""

    def __init__(self):
        self.models: WeakSet[Any] = WeakSet()
        self.trained_by: str | None = None
        self.start: dict[str, list[float]] | None = None


# By the encoder's first module, which all share who share an encoder.
_USES: WeakKeyDictionary[nn.Module, _Use] = WeakKeyDictionary()


def check_unused(base: PreTrainedModel, options: MeftConfig) -> None:
    """Raises UserError where a model of these options cannot be made of ``base``: an earlier one has trained
    its weights, or one that lives would be changed by the new one's training or number format, or change it.

    The same options again are no other model: that is a notebook's cell run twice, see :func:`note_use`.
    """
    use = _USES.get(base.get_encoder().conv1)
    if use is None:
        return
    if use.start is not None and _changed(use.start, base):
        raise UserError(
            f"base was changed since a model of {use.trained_by}, which trains its weights, was made of it: "
            "load it anew, or give that model's merge_and_unload() to go on from what was trained"
        )
    converts = _converts(base, options)
    if not _in_the_way(use, options) and not (converts and use.models):
        return
    gc.collect()  # models lie in circles of references
    other = _in_the_way(use, options)
    if other is not None:
        trains = options.method if isinstance(options, TunedConfig) else other
        raise UserError(
            f"base is used by a model of {other}, and {trains} trains inside it, which would change both: "
            "load it anew for another model, or delete that one first"
        )
    for model in list(use.models) if converts else ():
        raise UserError(
            f"base is used by a model of {model.meft_config.method}, whose backbone {converts} would change "
            "too: load it anew for another model, or delete that one first"
        )


def note_use(model: Any, base: PreTrainedModel) -> None:
    """Notes that ``model`` was made of ``base``. A model of the same options that trains the same weights
    gives them up: it raises UserError where it is used."""
    options = model.meft_config
    use = _USES.setdefault(base.get_encoder().conv1, _Use())
    if isinstance(options, TunedConfig):
        for earlier in list(use.models):
            earlier.give_up()
        use.models.clear()
    use.models.add(model)
    if options.trains_backbone:
        use.trained_by = options.method
    if use.trained_by is not None:  # as they are now: the model may have brought them to another format
        use.start = {name: entries.tolist() for name, entries in _entries(base)}


def _in_the_way(use: _Use, options: MeftConfig) -> str | None:
    """The method of a model that lives on the same modules and cannot share them with one of ``options``."""
    for model in list(use.models):
        other = model.meft_config
        if other != options and (isinstance(other, TunedConfig) or isinstance(options, TunedConfig)):
            return other.method
    return None


def _converts(base: PreTrainedModel, options: MeftConfig) -> str | None:
    """Which of the options would have the weights of ``base`` in another format than they are in, or None.

    Of a base that is quantised nothing is made at all: the encoder says so.
    """
    if is_quantized(base.get_encoder().layers):
        return None
    if options.backbone_quantization is not None:
        return f"backbone_quantization {options.backbone_quantization}"
    dtype = parse_dtype(options.backbone_dtype)
    weights = base.get_encoder().conv1.weight
    return None if dtype in (None, weights.dtype) else f"backbone_dtype {options.backbone_dtype}"


def _entries(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """A few entries of each of the backbone's weights. Whoever keeps them keeps their values: tensors would
    count as the model's memory."""
    parts = [("encoder", base.get_encoder())]
    if hasattr(base, "get_decoder") and getattr(base, "model", None) is not None:
        parts.append(("decoder", base.get_decoder()))
    for part, module in parts:
        for name, weight in module.named_parameters():
            if weight.is_meta or isinstance(weight, FakeTensor) or is_in_pieces(weight):
                continue
            step = max(1, weight.numel() // _ENTRIES)
            yield f"{part}.{name}", weight.detach().flatten()[::step][:_ENTRIES].cpu()


def _changed(before: dict[str, list[float]], base: PreTrainedModel) -> bool:
    """Whether any of the weights was; that they are in another format is no change of theirs."""
    for name, now in _entries(base):
        if name in before:
            then = torch.tensor(before[name], dtype=torch.float64).to(now.dtype)
            if then.tolist() != now.tolist():
                return True
    return False
