"""What a folder, or a name on the hub, holds: told by its config before anything is loaded."""

import json
import os
from pathlib import Path
from typing import Literal

from huggingface_hub import hf_hub_download

from .backbone import resolve_backbone
from .config import MeftModelConfig
from .loading import nowhere

Kind = Literal["classification", "transcription", "whisper"]


def kind_of(name: str | os.PathLike) -> Kind:
    """A saved model's task, or "whisper" for a plain Whisper with a decoder.

    Where the config is something else, "classification": loading that says what is wrong.

    Raises:
        UserError: there is no such folder, nor can it be had from the hub.
    """
    folder = Path(resolve_backbone(name))
    path = folder / "config.json"
    if not folder.exists():
        try:
            path = Path(hf_hub_download(os.fspath(name), "config.json"))
        except Exception as error:
            raise nowhere(name, error) from error
    try:
        values = json.loads(path.read_bytes())
        if values.get("model_type") == MeftModelConfig.model_type:
            return "transcription" if values.get("task") == "transcription" else "classification"
        classifies = "WhisperForAudioClassification" in (values.get("architectures") or ())
        return "whisper" if values.get("model_type") == "whisper" and not classifies else "classification"
    except Exception:
        return "classification"
