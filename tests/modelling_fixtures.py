"""Tiny random Whisper models and batches, shared by the tests of the model layer."""

import torch
from torch.utils.data import Dataset
from transformers import WhisperConfig, WhisperForAudioClassification
from whisper_meft import LSTConfig, SHERLConfig, UniPTConfig

CONFIGS = {"lst": LSTConfig, "unipt": UniPTConfig, "sherl": SHERLConfig}
MELS, WINDOW, WIDTH, LAYERS, CLASSES = 12, 24, 32, 3, 3


def whisper_config(**changes) -> WhisperConfig:
    """Dropout and LayerDrop are on, so that a backbone that is not pinned to evaluation mode shows."""
    options = {
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "num_mel_bins": MELS,
        "max_source_positions": WINDOW,
        "classifier_proj_size": 10,
        "num_labels": CLASSES,
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "activation_dropout": 0.5,
        "encoder_layerdrop": 0.5,
        "init_std": 0.2,  # at 0.02 a random encoder of this size passes hardly any of its input on
        "vocab_size": 20,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
        "max_target_positions": 8,
    }
    return WhisperConfig(**{**options, **changes})


def tiny_whisper(seed=0, attn_implementation="sdpa", dtype=None, **changes) -> WhisperForAudioClassification:
    torch.manual_seed(seed)
    model = WhisperForAudioClassification._from_config(
        whisper_config(**changes), attn_implementation=attn_implementation
    )
    return model if dtype is None else model.to(dtype)


def randomise(module: torch.nn.Module, seed=1, std=0.3) -> torch.nn.Module:
    """Moves every trainable parameter away from its initial zeros and ones, so that no term drops out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module


def batch(size=4, frames=2 * WINDOW, seed=0, dtype=torch.float32):
    """(input_features (B, mels, frames), labels (B,))."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, MELS, frames, generator=generator).to(dtype)
    return features, torch.arange(size) % CLASSES


def mel_mask(frames: list[int], total: int) -> torch.Tensor:
    """(B, total) ones for each clip's mel frames, then zeros."""
    return (torch.arange(total) < torch.tensor(frames)[:, None]).long()


class ToyClips(Dataset):
    """Clips whose class is a constant added to some mel bins: easy to learn, so that training shows."""

    def __init__(self, size=24, seed=0, masks=False):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(size) % CLASSES
        self.features = torch.randn(size, MELS, 2 * WINDOW, generator=generator)
        for i, label in enumerate(self.labels):
            self.features[i, label * 3 : label * 3 + 3] += 2
        self.frames = torch.randint(WINDOW // 2, 2 * WINDOW + 1, (size,), generator=generator).tolist()
        self.masks = masks

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        item = {"input_features": self.features[i], "labels": int(self.labels[i])}
        if self.masks:
            item["attention_mask"] = mel_mask([self.frames[i]], 2 * WINDOW)[0]
        return item
