"""Finding, loading and recognising the frozen backbone that a saved side network refers to."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel, WhisperForAudioClassification
from transformers.utils import logging as hf_logging

from ..encoder.fingerprint import own_state
from ..errors import UserError, one_line, printable
from ..files import replacing, write_text
from ..synthetic.shipped import ASSETS
from .declared import HEAD, check_model_folder
from .weights import some_of

logger = logging.getLogger(__name__)


def resolve_backbone(name: str | os.PathLike, folder: str | os.PathLike | None = None) -> str:
    """Where the backbone called ``name`` is.

    Tried in this order: a folder relative to ``folder`` (that of the saved side network), a folder as
    written, the name of a backbone shipped with this package (such as ``phoneme-tiny``), else a name on the
    model hub, which is returned as it is.
    """
    name = os.path.expanduser(os.fspath(name))
    if folder is not None and not os.path.isabs(name) and (Path(folder) / name).is_dir():
        return str((Path(folder) / name).resolve())
    if os.path.isdir(name):
        return str(Path(name).resolve())
    if (ASSETS / name / "config.json").is_file():
        return str(ASSETS / name)
    return name


def found_here_alone(name: str | os.PathLike) -> bool:
    """Whether a backbone is a folder of this machine, there or not any more, and none shipped with this
    package: nobody else could load what refers to it."""
    where = Path(resolve_backbone(name))
    return where.is_absolute() and where.resolve().parent != ASSETS.resolve()


def check_source(argument: str, name: str) -> None:
    """Raises UserError if ``name`` can only mean a local folder and there is no model folder there."""
    path = Path(name)
    if path.is_file():
        raise UserError(f"{argument}: {name} is a file; a folder or the name of a model on the hub is needed")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{argument}: {name} holds no config.json, so it is not a model folder")
        return
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        hint = "; name another folder or hub model with backbone=... (--backbone)"
        raise UserError(f"{argument}: there is no folder {name}{hint if argument == 'backbone' else ''}")


def backbone_reference(name: str | None, folder: str | os.PathLike) -> str | None:
    """How a model saved in ``folder`` should name its backbone, so that it is found again by
    :func:`resolve_backbone`: relative when inside ``folder``, the bare name when shipped, else absolute."""
    if not name or not os.path.isdir(name):
        return name or None
    path = Path(name).resolve()
    if path.parent == ASSETS.resolve():
        return path.name
    inside = Path(folder).resolve()
    return str(path.relative_to(inside)) if path.is_relative_to(inside) else str(path)


def load_backbone(
    name: str | os.PathLike,
    folder: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    argument: str = "backbone",
    kind: type[PreTrainedModel] = WhisperForAudioClassification,
    quantized: bool = False,
    **hub_options: Any,
) -> PreTrainedModel:
    """Loads a Whisper checkpoint's encoder, with its classification head or, where it has none, a new one; or
    with its decoder.

    Args:
        name: a hub name, a folder, or the name of a shipped backbone; see :func:`resolve_backbone`.
        folder: what a relative path is relative to.
        dtype: number format of the weights; ``None`` keeps the checkpoint's.
        attn_implementation: ``"sdpa"``, ``"eager"`` or ``"flash_attention_2"``; ``None`` is transformers'
            choice.
        argument: what messages call ``name``.
        kind: the class to load, ``WhisperForAudioClassification`` or ``WhisperForConditionalGeneration``.
        quantized: whether the encoder is going to be quantised, which brings it to its number format layer
            by layer. On a CPU its weights are then pages of the checkpoint's files and take no memory of
            their own: they keep the checkpoint's format here, and the rest is in ``dtype``.
        hub_options: ``token``, ``revision``, ``cache_dir``, ``local_files_only`` and the like.

    Raises:
        UserError: not found, not a Whisper checkpoint, unreadable, or encoder weights are missing or of
            another shape.
    """
    where = resolve_backbone(name, folder)
    check_source(argument, where)
    if os.path.isdir(where):
        try:
            check_model_folder(where)
        except UserError as error:
            raise UserError(f"{argument}: {error}") from error
    called = os.fspath(name) if where == os.fspath(name) else f"{os.fspath(name)} (as {where})"
    options = {
        "dtype": "auto" if dtype is None or quantized else dtype,
        "output_loading_info": True,
        **hub_options,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with quiet_transformers():
            base, report = kind.from_pretrained(where, ignore_mismatched_sizes=True, **options)
    except Exception as error:  # whatever a broken folder or an unreachable hub gives
        raise UserError(
            f"{argument}: cannot load {called}: {one_line(error)}; name another folder or hub model with "
            f"{argument}=... (--{argument})"
        ) from error
    mismatched = [each[0] if isinstance(each, tuple) else each for each in report["mismatched_keys"]]
    needed = ("encoder.", "model.encoder.", "model.decoder.", "proj_out.")
    broken = sorted(key for key in [*report["missing_keys"], *mismatched] if key.startswith(needed))
    if broken:
        part = "encoder" if "encoder." in broken[0] else "decoder"
        raise UserError(
            f"{argument}: {called} lacks {len(broken)} {part} tensors (or has them in another shape), the "
            f"first is {broken[0]}: is it a Whisper checkpoint?"
        )
    if quantized and dtype is not None:
        encoder = set(base.get_encoder().parameters())
        for parameter in set(base.parameters()) - encoder:
            parameter.data = parameter.data.to(dtype)
    base.head_is_new = any(key.startswith(HEAD) for key in [*report["missing_keys"], *mismatched])
    return base


def set_labels(base: WhisperForAudioClassification, labels: Sequence[str]) -> None:
    """Gives a classifier the classes ``labels``, in index order.

    A head that was trained keeps the rows of these classes, by their names. If it lacks one of them, its last
    layer is new, and a warning says so.
    """
    names = [str(base.config.id2label.get(row, row)) for row in range(base.classifier.out_features)]
    base.config.id2label = dict(enumerate(labels))
    base.config.label2id = {label: index for index, label in enumerate(labels)}
    if _head_is_new(base, names):
        if len(names) != len(labels):
            base.classifier = _new_classifier(base.classifier, len(labels))
        return
    rows = {name: row for row, name in enumerate(names)}
    if len(rows) == len(names) and rows.keys() >= set(labels):
        kept = base.classifier
        base.classifier = nn.Linear(kept.in_features, len(labels)).to(kept.weight)
        with torch.no_grad():
            base.classifier.weight.copy_(kept.weight[[rows[label] for label in labels]])
            base.classifier.bias.copy_(kept.bias[[rows[label] for label in labels]])
        return
    logger.warning(
        "the backbone is a classifier of other classes (%s): the data's %d classes get a new last layer",
        some_of([printable(name) for name in names]),
        len(labels),
    )
    base.classifier = _new_classifier(base.classifier, len(labels))


def _head_is_new(base: WhisperForAudioClassification, names: Sequence[str]) -> bool:
    """Whether the head holds start values: as :func:`load_backbone` saw, else where no class has a name."""
    known = getattr(base, "head_is_new", None)
    return all(name == f"LABEL_{row}" for row, name in enumerate(names)) if known is None else known


def _new_classifier(old: nn.Linear, classes: int) -> nn.Linear:
    classifier = nn.Linear(old.in_features, classes, device=old.weight.device, dtype=old.weight.dtype)
    nn.init.normal_(classifier.weight, std=0.02)
    nn.init.zeros_(classifier.bias)
    return classifier


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading report and progress bar: that the head is new and the decoder unused is no news."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def write_backbone(encoder: nn.Module, folder: str | os.PathLike) -> None:
    """Writes a frozen encoder as an ordinary Hugging Face folder (``config.json``, ``model.safetensors``).

    The folder holds the encoder only, which is all that an audio classifier needs.

    Raises:
        UserError: the encoder is quantised, or the folder cannot be written.
    """
    tensors = {f"encoder.{name}": tensor for name, tensor in own_state(encoder).items()}
    config = type(encoder.config).from_dict(encoder.config.to_dict())
    config.architectures = ["WhisperForAudioClassification"]
    config.dtype = encoder.dtype
    write_whisper(encoder, tensors, config, folder)


def write_whisper(
    encoder: nn.Module, tensors: dict[str, torch.Tensor], config: Any, folder: str | os.PathLike
) -> None:
    """Writes tensors and config of a Whisper as an ordinary Hugging Face folder.

    Raises:
        UserError: the encoder is quantised, or the folder cannot be written.
    """
    if getattr(encoder, "quantization", None) is not None:
        raise UserError(
            f"a backbone that is quantised to {encoder.quantization} cannot be saved, its weights are "
            "rounded: leave save_backbone out, and keep the checkpoint that it was loaded from"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(Path(folder) / "model.safetensors") as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    write_text(Path(folder) / "config.json", config.to_json_string())
