"""What the page says of its model."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from ..model.backbone import resolve_backbone

_LONGEST_CARD = 100_000  # bytes
_SHOWN_LABELS = 12


@dataclass(frozen=True)
class About:
    """A model, in words.

    Attributes:
        title: what it is called. summary: a line that tells its method, backbone and classes.
        card: the Markdown of its README.md without the header, or None.
    """

    title: str
    summary: str
    card: str | None


def about(
    model_dir: str | os.PathLike, model: Any, labels: Sequence[str] | None, title: str | None = None
) -> About:
    """What can be told of a model that was loaded.

    Args:
        model_dir: its folder, of which only the last part of the name is told, or its name on the hub.
        model: the model itself. labels: its classes; None where it transcribes.
        title: what to call it; that name by default.
    """
    place = Path(resolve_backbone(model_dir))
    name = place.name if place.is_dir() else os.fspath(model_dir)
    return About(title or name, _summary(model, labels), _card(place, os.fspath(model_dir)))


def _summary(model: Any, labels: Sequence[str] | None) -> str:
    base = model.config._name_or_path if not hasattr(model, "meft_config") else None
    base = base or getattr(model.config, "base_model_name_or_path", None)
    named = f", {base}" if base and base != "backbone" and not os.path.isabs(base) else ""
    if not hasattr(model, "meft_config"):
        parts = ["Plain Whisper"]
    elif "reduction_factor" in model.config.meft:
        parts = [f"{model.config.meft['method'].upper()} side network on a frozen Whisper{named}"]
    else:
        parts = [f"Whisper{named}, method {model.config.meft['method']}"]
    if labels is not None:
        shown = ", ".join(labels[:_SHOWN_LABELS])
        more = f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
        parts.append(f"{len(labels)} classes: {shown}{more}")
        if getattr(model.config, "calibration_temperature", None) is not None:
            parts.append("calibrated")
    return " · ".join(parts)


def _card(place: Path, name: str) -> str | None:
    """The README.md of a folder, or that of the hub where it has been downloaded with the model."""
    found = place / "README.md" if place.is_dir() else try_to_load_from_cache(name, "README.md")
    try:
        with open(found, encoding="utf-8-sig", errors="replace") as file:
            text = file.read(_LONGEST_CARD)
    except (OSError, TypeError, ValueError):
        return None
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S).strip() or None
