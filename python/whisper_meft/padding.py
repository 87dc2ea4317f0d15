"""Where the sound of a clip ends in padded log-mel features, from the features or from a mask."""

import torch

from .errors import UserError

# Samples from one frame to the next in Whisper's log-mel.
HOP_LENGTH = 160


def frames_with_sound(features: torch.Tensor) -> torch.Tensor:
    """Frames of each clip before its padding, at least 1; (B,) int64.

    Padding is a constant over bins and frames that reaches to the end: padded silence, or zeros. Silence
    recorded at the end of a clip can look the same and is then taken for padding; the last window's overlap
    makes the result up to 2 frames too long.

    Args:
        features: (B, mel bins, frames).
    """
    if 0 in features.shape[1:]:
        return torch.ones(len(features), dtype=torch.long, device=features.device)
    sound = (features != features[:, :1, -1:]).any(dim=1)
    number = torch.arange(1, features.shape[-1] + 1, device=features.device)
    return (sound * number).amax(dim=1).clamp(min=1)


def frames_of_mask(mask: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Frames that ``attention_mask`` calls sound; (B,) int64.

    Args:
        mask: (B, frames), or (B, samples) of the waveform that the features were made of: 1 for
            sound, then 0. ``WhisperFeatureExtractor`` gives the first where ``return_attention_mask`` is an
            argument, the second where it is one of its settings.
        features: (B, mel bins, frames).

    Raises:
        UserError: another shape, or 0 before 1 (only looked at on the CPU).
    """
    batch, frames = features.shape[0], features.shape[2]
    # The extractor drops the last frame, which samples beyond a whole number of hops may or may not have.
    of_samples = mask.ndim == 2 and frames in (mask.shape[1] // HOP_LENGTH, -(-mask.shape[1] // HOP_LENGTH))
    if mask.ndim != 2 or len(mask) != batch or not (of_samples or mask.shape[1] == frames):
        raise UserError(
            f"attention_mask must have shape {(batch, frames)}, the batch and frames of input_features, or "
            f"({batch}, samples) with {HOP_LENGTH} samples for each frame, got {tuple(mask.shape)}"
        )
    hop = 1 if mask.shape[1] == frames else HOP_LENGTH
    sound = mask.to(features.device)[:, ::hop][:, :frames] != 0
    # Only where looking at the values costs no wait for a device (fake tensors have no values).
    visible = type(sound) is torch.Tensor and sound.device.type == "cpu" and not torch.compiler.is_compiling()
    if visible and bool((sound[:, 1:] & ~sound[:, :-1]).any()):
        raise UserError(
            "attention_mask must be 1 for sound and then 0 for padding, got 0 before 1: pad clips at their "
            "end"
        )
    return sound.sum(dim=1)
