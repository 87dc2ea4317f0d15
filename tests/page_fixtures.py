"""A tiny model of three classes with a window of 1 second, as a folder, and sound for it."""

from pathlib import Path

import numpy as np
from modelling_fixtures import randomise
from training_fixtures import RATE, TONES, make_backbone, tone
from transformers import WhisperFeatureExtractor
from whisper_meft import LSTConfig, get_meft_model
from whisper_meft.evaluation.classifier import Classifier
from whisper_meft.model.backbone import load_backbone, set_labels
from whisper_meft.options.inference import InferenceArguments


def make_model(folder: Path, labels: tuple[str, ...] = tuple(TONES)) -> Path:
    """Writes a side network with weights at random, and all that it needs."""
    backbone = make_backbone(folder / "base")
    base = load_backbone(backbone)
    set_labels(base, labels)
    model = randomise(get_meft_model(base, LSTConfig(max_frames="longest", reduction_factor=2)))
    model.save_pretrained(folder / "tones", save_backbone=True)
    WhisperFeatureExtractor.from_pretrained(backbone).save_pretrained(folder / "tones")
    return folder / "tones"


def load_classifier(folder: Path) -> Classifier:
    return Classifier.load(folder, InferenceArguments(device="cpu"), progress=False)


def sound(*seconds: float, seed: int = 0) -> np.ndarray:
    """One tone after the other, each an octave higher, at ``RATE``."""
    generator = np.random.default_rng(seed)
    return np.concatenate([tone(200 * 2**i, length, generator) for i, length in enumerate(seconds)])


__all__ = ["RATE", "load_classifier", "make_model", "sound"]
