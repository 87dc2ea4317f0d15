"""A tiny random Whisper checkpoint and small generated audio, for tests of training and the command line."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

RATE = 16_000
# One tone per class, an octave apart: learnable from any frozen encoder in a few steps.
TONES = {"high": 2400.0, "low": 300.0, "middle": 900.0}


def make_backbone(folder: Path, **changes) -> Path:
    """Writes a random Whisper classifier with a 1-second window (50 encoder frames) as a folder."""
    options = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 64,
        "max_source_positions": 50,
        "num_mel_bins": 80,
        "classifier_proj_size": 16,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "init_std": 0.3,
        **changes,
    }
    torch.manual_seed(0)
    WhisperForAudioClassification(WhisperConfig(**options)).save_pretrained(folder)
    WhisperFeatureExtractor(
        feature_size=options["num_mel_bins"], chunk_length=options["max_source_positions"] // 50
    ).save_pretrained(folder)
    return folder


def tone(frequency: float, seconds: float, generator: np.random.Generator) -> np.ndarray:
    """A tone near ``frequency`` with an overtone and noise; float32 (samples,)."""
    time = np.arange(int(seconds * RATE)) / RATE
    frequency = frequency * generator.uniform(0.95, 1.05)
    wave = np.sin(2 * np.pi * frequency * time) + 0.3 * np.sin(4 * np.pi * frequency * time)
    wave = wave * generator.uniform(0.1, 0.3) + 0.01 * generator.standard_normal(len(time))
    return wave.astype(np.float32)


def make_audio_folder(folder: Path, per_class: int, seed: int = 0) -> Path:
    """Writes folder/<class>/<n>.wav with clips of 0.4 to 0.9 seconds."""
    generator = np.random.default_rng(seed)
    for label, frequency in TONES.items():
        (folder / label).mkdir(parents=True)
        for number in range(per_class):
            wave = tone(frequency, generator.uniform(0.4, 0.9), generator)
            pytest.importorskip("soundfile").write(folder / label / f"{label}{number}.wav", wave, RATE)
    return folder


def make_manifest(path: Path, audio_folder: Path, speakers_per_class: int) -> Path:
    """Writes a CSV manifest of an audio folder whose clips go to ``speakers_per_class`` speakers in turn."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "speaker"])
        for label_folder in sorted(audio_folder.iterdir()):
            for number, wav in enumerate(sorted(label_folder.glob("*.wav"))):
                speaker = f"{label_folder.name}-{number % speakers_per_class}"
                writer.writerow([wav, label_folder.name, speaker])
    return path


def train_command(backbone: Path, train_data: Path, output_dir: Path, **options) -> list[str]:
    """Arguments of `whisper-meft train` that learn the tones in a few epochs."""
    options = {
        "model_name_or_path": backbone,
        "train_data": train_data,
        "output_dir": output_dir,
        "reduction_factor": 2,
        "learning_rate": 3e-3,
        "num_train_epochs": 8,
        "disable_tqdm": True,
        "seed": 1,
        **options,
    }
    return ["train", *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def make_transcripts(path: Path, audio_folder: Path, speakers: int = 4) -> Path:
    """Writes a CSV manifest of an audio folder: what is said in a clip is the name of its tone."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "speaker"])
        for label_folder in sorted(audio_folder.iterdir()):
            for number, wav in enumerate(sorted(label_folder.glob("*.wav"))):
                writer.writerow([wav, label_folder.name, f"speaker{number % speakers}"])
    return path
