"""Sizes that a config declares, compared with the shapes of the weights before memory is taken for them."""

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import WhisperConfig

from ..errors import UserError, one_line, printable
from ..files import read_json
from .weights import WEIGHT_FILES, weight_files

HEAD = ("projector.", "classifier.")

# Where there is nothing to compare with: far more than any Whisper has.
_MOST = {
    "d_model": 2**16,
    "hidden_size": 2**16,
    "encoder_layers": 1000,
    "num_hidden_layers": 1000,
    "encoder_attention_heads": 2**12,
    "num_attention_heads": 2**12,
    "encoder_ffn_dim": 2**18,
    "num_mel_bins": 2**12,
    "max_source_positions": 10**6,
    "classifier_proj_size": 2**16,
    "num_labels": 10**6,
}

# Size -> a tensor of the encoder or of the head, and which of its dimensions it is.
_SEEN_IN = {
    "d_model": ("conv1.weight", 0),
    "num_mel_bins": ("conv1.weight", 1),
    "max_source_positions": ("embed_positions.weight", 0),
    "encoder_ffn_dim": ("layers.0.fc1.weight", 0),
    "classifier_proj_size": ("projector.weight", 0),
    "num_labels": ("classifier.weight", 0),
}


def check_declared_sizes(config: Any, shapes: Mapping[str, Sequence[int]], where: str | Path) -> None:
    """Checks a Whisper config as it was read from JSON.

    Args:
        config: the content of ``config.json``.
        shapes: of the weights' tensors, by name; empty where they are not known.
        where: the folder, for messages.

    Raises:
        UserError: a size is no positive integer, is not that of the weights, or is out of all proportion.
    """
    file = Path(where) / "config.json"
    if not isinstance(config, dict):
        raise UserError(f"{file} cannot be used: it must be a JSON object, got {type(config).__name__}")
    for size, most in _MOST.items():
        value = config.get(size)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{file} cannot be used: {size} must be a positive integer, got {value!r}")
        found = _seen(size, shapes)
        if found is not None and value != found:
            raise UserError(f"{file} cannot be used: {size} is {value}, the weights have {found}")
        if value > most:
            raise UserError(f"{file} cannot be used: {size} must be at most {most}, got {value}")


def checked_labels(id2label: Any, where: str | Path) -> dict[int, str]:
    """The names of a classifier's classes, by their numbers.

    Args:
        id2label: as a config holds it; numbers may be text, as in JSON. where: whose it is, for messages.

    Raises:
        UserError: it is no mapping, numbers are left out, or names are no text or used twice.
    """
    if not isinstance(id2label, Mapping) or not id2label:
        raise UserError(f"{where}: id2label must name the classes by their numbers, got {id2label!r}")
    numbered = {int(k) if isinstance(k, str) and k.isdecimal() else k: name for k, name in id2label.items()}
    if len(numbered) != len(id2label) or set(numbered) != set(range(len(numbered))):
        keys = ", ".join(repr(key) for key in list(id2label)[:10])
        raise UserError(
            f"{where}: id2label must name the classes 0 to {len(id2label) - 1}, none left out, got {keys}"
        )
    labels = {index: numbered[index] for index in range(len(numbered))}
    if wrong := [name for name in labels.values() if not isinstance(name, str)]:
        raise UserError(f"{where}: the names in id2label must be text, got {wrong[0]!r}")
    if twice := [name for name, count in Counter(labels.values()).items() if count > 1]:
        raise UserError(f"{where}: id2label names two classes {printable(twice[0])!r}")
    return labels


def _seen(size: str, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The size that the weights show, if they do."""
    first = next((name for name in shapes if name.endswith("encoder.conv1.weight")), None)
    prefix = "encoder." if first is None else first.removesuffix("conv1.weight")
    if size == "encoder_layers" and first is not None:
        layers = f"{prefix}layers."
        return len({n.removeprefix(layers).partition(".")[0] for n in shapes if n.startswith(layers)})
    if size not in _SEEN_IN:
        return None
    name, dimension = _SEEN_IN[size]
    shape = shapes.get(name if name.startswith(HEAD) else prefix + name)
    return None if shape is None or len(shape) <= dimension else int(shape[dimension])


def check_model_folder(folder: str | Path) -> None:
    """:func:`check_declared_sizes` of a Whisper checkpoint in a local folder. Of pickled weights, whose
    shapes cannot be read ahead, only that no size is out of all proportion.

    Raises:
        UserError: see there; config or weights cannot be read, or hold something else than floating point.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    shapes: dict[str, Sequence[int]] = {}
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        for file in weight_files(folder):
            if file.suffix == ".safetensors" and file.is_file():
                shapes |= header_shapes(file)
    check_declared_sizes(config, shapes, folder)
    if config.get("model_type") == "whisper":  # sizes have second names, and defaults
        try:
            effective = WhisperConfig.from_dict(config).to_dict()
        except Exception as error:  # whatever transformers' own checks raise
            raise UserError(f"{folder / 'config.json'} cannot be used: {one_line(error)}") from error
        check_declared_sizes(effective, shapes, folder)


def header_shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file, by name, from its header alone.

    Raises:
        UserError: it has no such header, or a tensor of a Whisper holds integers.
    """
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("its header is cut short")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: [int(n) for n in entry["shape"]] for name, entry in entries.items()}
        kinds = {name: str(entry["dtype"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(
            f"cannot read {file}, it is damaged, incomplete or not a weights file: {error}"
        ) from error
    for name, kind in kinds.items():
        if kind != "BF16" and kind[:1] in "IUB" and ("encoder." in name or name.startswith(HEAD)):
            raise UserError(f"{name} in {file} holds {kind} values, weights must be floating point")
    return shapes
