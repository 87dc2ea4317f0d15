"""A trained recogniser, merged, as a folder for CTranslate2 (and faster-whisper, which runs that)."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration

from ..errors import UserError
from ..model.backbone import quiet_transformers
from ..model.merging import check_mergeable
from ..model.transcription import MeftForConditionalGeneration
from ..model.whole_folder import whole_folder
from .earlier import COPIED, of_earlier_export
from .onnx_folder import require

# Of the encoder's output, in its norm. What is rounded is reported, and may be further.
LARGEST_ERROR = 1e-3


def check_runs(model: MeftForConditionalGeneration) -> None:
    """Raises UserError, with the reason, for a model that CTranslate2 cannot run."""
    options = model.meft_config
    if not options.can_merge:
        raise UserError(
            f"CTranslate2 runs the layers of a plain Whisper alone, and what {options.method} trained is a "
            "network of its own beside or between them, which cannot be merged into their weights"
        )
    check_mergeable(options)


def export_ctranslate2(
    model: MeftForConditionalGeneration,
    feature_extractor: Any,
    tokenizer: Any,
    folder: str | os.PathLike,
    quantize: bool = False,
) -> float:
    """Merges a recogniser and writes it for CTranslate2, with tokenizer and feature extractor.

    Args:
        model: on the CPU. feature_extractor, tokenizer: its own.
        folder: what is written; the files of an earlier export in it go.
        quantize: in int8.

    Returns:
        How far CTranslate2's encoder output is from PyTorch's, in its norm, of a window with noise.

    Raises:
        UserError: the package is missing, the method cannot be merged, the output differs, or the folder
            cannot be written.
    """
    require(("ctranslate2",))
    from ctranslate2.converters import TransformersConverter

    check_runs(model)
    plain = model.merge_and_unload()
    goes = of_earlier_export(Path(folder))
    with tempfile.TemporaryDirectory() as merged, whole_folder(folder, goes) as beside:
        plain.save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        feature_extractor.save_pretrained(merged)
        try:
            converter = TransformersConverter(merged, copy_files=list(COPIED))
            with quiet_transformers():
                converter.convert(os.fspath(beside), "int8" if quantize else None, force=True)
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"CTranslate2 cannot convert this model: {error}") from error
        error = _error(plain, beside)
        if not quantize and not error <= LARGEST_ERROR:
            raise UserError(
                f"CTranslate2's encoder output differs from PyTorch's by {error:.2g} of its norm, more than "
                f"{LARGEST_ERROR:g}: nothing was written"
            )
    return error


@torch.no_grad()
def _error(plain: WhisperForConditionalGeneration, folder: Path) -> float:
    import ctranslate2

    config = plain.config
    shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
    features = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = plain.get_encoder()(torch.from_numpy(features)).last_hidden_state.numpy()
    whisper = ctranslate2.models.Whisper(os.fspath(folder), device="cpu", compute_type="default")
    found = np.array(whisper.encode(ctranslate2.StorageView.from_array(features)))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
