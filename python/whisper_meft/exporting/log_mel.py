"""Whisper's log-mel in operations that every runtime has."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError


class LogMel(nn.Module):
    """What :class:`whisper_meft.data.SpeechDataset` makes of a clip, of a batch of padded waveforms.

    The Fourier transform of a frame is a product with cosines and sines, as a convolution over the waveform.

    Args:
        feature_extractor: a ``WhisperFeatureExtractor``. max_samples: what is heard of a clip at most.
        whole_window: the extractor's whole window, whatever the length of the clips.

    Raises:
        UserError: the extractor adds noise.
    """

    def __init__(self, feature_extractor: Any, max_samples: int, whole_window: bool):
        super().__init__()
        if getattr(feature_extractor, "dither", 0.0):
            raise UserError(
                f"the feature extractor adds noise (dither {feature_extractor.dither}), which a graph does "
                "not: set it to 0"
            )
        self.hop, self.size = feature_extractor.hop_length, feature_extractor.n_fft
        self.window, self.max_samples = int(feature_extractor.n_samples), max_samples
        self.whole_window = whole_window
        time, bins = np.arange(self.size), np.arange(self.size // 2 + 1)
        turns = 2 * np.pi * (bins[:, None] * time % self.size) / self.size
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * time / self.size)
        waves = np.concatenate([np.cos(turns), np.sin(turns)]) * hann
        self.register_buffer("waves", torch.from_numpy(waves[:, None]).float())
        filters = torch.from_numpy(np.asarray(feature_extractor.mel_filters)).float()
        self.register_buffer("filters", filters.T.contiguous())

    def forward(self, waveform: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel, and how much of it is sound.

        Args:
            waveform: (B, S) float32 at the extractor's rate; what lies behind ``samples`` is not read.
            samples: (B,) int64, of each clip.

        Returns:
            (B, mel bins, 2 T) with T = ceil(S / (2 hop)), or the whole window; and (B,) int64, the frames of
            each clip.
        """
        # Not by slices: whether one cuts anything cannot be told of a size that is not known.
        longest = torch.sym_min(waveform.shape[1], self.max_samples)
        samples = torch.minimum(samples.clamp(min=0), torch.full_like(samples, longest))
        frames = (samples + self.hop - 1) // self.hop
        if self.whole_window:
            size = computed = self.window // self.hop
        else:
            size = (longest + 2 * self.hop - 1) // (2 * self.hop) * 2
            computed = size + 2  # the last sound reaches two frames beyond its own
        place = torch.arange((computed - 1) * self.hop + self.size) - self.size // 2
        # The clip stands in a window of silence, which is reflected at both of its ends.
        place = torch.where(place >= self.window, 2 * self.window - 2 - place, place.abs())
        silence = self.window if self.whole_window else 2 * self.hop + self.size
        heard = F.pad(waveform, (0, silence)).index_select(1, place)
        heard = heard.masked_fill(place >= samples[:, None], 0)
        power = F.conv1d(heard[:, None], self.waves, stride=self.hop).square()
        power = torch.add(*power.split(self.size // 2 + 1, dim=1))
        mel = (self.filters @ power).clamp(min=1e-10).log10()
        inside = torch.arange(computed) < self.window // self.hop
        loudest = mel.masked_fill(~inside, -10.0).amax((1, 2), keepdim=True)
        return (torch.maximum(mel, loudest - 8.0)[..., :size] + 4.0) / 4.0, frames
