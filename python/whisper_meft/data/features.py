"""Log-mel features: making them, how many frames there are, and whether an extractor fits a backbone."""

import math
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..padding import frames_with_sound
from .examples import Example

MaxFrames = str | int  # "fidelity", "longest" or a number of encoder frames


def check_feature_extractor(feature_extractor: Any, config: Any, max_frames: MaxFrames = "fidelity") -> None:
    """Checks that features of ``feature_extractor`` fit a backbone.

    Args:
        feature_extractor: a ``WhisperFeatureExtractor``.
        config: the backbone's ``WhisperConfig`` (``num_mel_bins``, ``max_source_positions``).
        max_frames: as in :class:`SpeechDataset`.

    Raises:
        UserError: other mel bins, a window that is not the encoder's, or more frames than it has positions.
    """
    bins, window = feature_extractor.feature_size, window_frames(feature_extractor)
    if bins != config.num_mel_bins:
        raise UserError(
            f"the feature extractor makes {bins} mel bins, the model reads {config.num_mel_bins}: use the "
            "feature extractor that belongs to the model (preprocessor_config.json in its folder)"
        )
    positions = config.max_source_positions
    if max_frames == "fidelity" and window != 2 * positions:
        raise UserError(
            f"the feature extractor makes {window} mel frames (chunk_length {feature_extractor.chunk_length} "
            f"s), the encoder reads {2 * positions}: use the model's own feature extractor"
        )
    if max_frames != "fidelity" and window_of(feature_extractor, max_frames) > 2 * positions:
        raise UserError(
            f"max_frames={max_frames!r} with this feature extractor allows "
            f"{window_of(feature_extractor, max_frames) // 2} encoder frames, the encoder has {positions} "
            f"positions: set max_frames to {positions} or less"
        )


def window_frames(feature_extractor: Any) -> int:
    return int(feature_extractor.n_samples) // feature_extractor.hop_length


def window_of(feature_extractor: Any, max_frames: MaxFrames) -> int:
    """Mel frames (10 ms each) that a clip may have at most.

    Raises:
        UserError: ``max_frames`` is none of "fidelity", "longest" and an integer from 1 to the window's
            encoder frames.
    """
    window = window_frames(feature_extractor)
    if max_frames in ("fidelity", "longest"):
        return window
    integer = isinstance(max_frames, int) and not isinstance(max_frames, bool)
    if not integer or not 1 <= max_frames <= window // 2:
        raise UserError(
            f'max_frames must be "fidelity", "longest" or an integer from 1 to {window // 2} (encoder frames '
            f"of 20 ms), got {max_frames!r}"
        )
    return 2 * max_frames


def log_mel(wave: np.ndarray, feature_extractor: Any, full_window: bool = False) -> np.ndarray:
    """Whisper's log-mel of one clip.

    The clip is followed by silence, as it is in a padded window, so the frames of a trimmed clip are those of
    the padded one. Only the frames that hold sound are computed: what follows them is one constant.

    Args:
        wave: float32 ``(samples,)`` at the extractor's rate, not longer than its window.
        full_window: all frames of the window instead of the ``ceil(samples / hop_length)`` of the clip.

    Returns:
        float32 ``(mel bins, frames)``.
    """
    hop = feature_extractor.hop_length
    frames, window = math.ceil(len(wave) / hop), window_frames(feature_extractor)
    # Enough silence behind the clip that the last frame computed sees nothing else, also not by reflection.
    padded = (frames + math.ceil(feature_extractor.n_fft / hop)) * hop
    short = not getattr(feature_extractor, "dither", 0.0)  # dithered silence is no constant
    if short:
        wave = np.pad(wave, (0, padded - len(wave)))
    mel = feature_extractor(
        wave,
        sampling_rate=feature_extractor.sampling_rate,
        padding="longest" if short else "max_length",
        return_tensors="np",
    )["input_features"][0]
    if full_window:
        return np.pad(mel, ((0, 0), (0, window - mel.shape[1])), mode="edge")
    return mel[:, :frames]


def true_frames(features: np.ndarray) -> int:
    """Frames of ``(mel bins, frames)`` log-mel before its padding, at least 1.

    As :func:`whisper_meft.padding.frames_with_sound`, of one clip.
    """
    return int(frames_with_sound(torch.from_numpy(features)[None])[0])


def read_features(example: Example, bins: int | None = None) -> np.ndarray:
    """Precomputed log-mel of an example, float32 ``(mel bins, frames)``, finite.

    Raises:
        UserError: it is not that, or its mel bins are not ``bins``.
    """
    try:
        features = np.asarray(example.value(), dtype=np.float32)
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{example.name}: input_features is not an array of numbers: {error}") from error
    except MemoryError as error:
        raise UserError(f"{example.name} needs more memory than there is") from error
    if features.ndim != 2 or not features.size:
        raise UserError(
            f"{example.name}: input_features must be (mel bins, frames), got shape {features.shape}"
        )
    if bins is not None and len(features) != bins:
        raise UserError(
            f"{example.name}: input_features has shape {features.shape}, {bins} mel bins are expected"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{example.name}: input_features holds values that are not finite (NaN or infinite)")
    return features
