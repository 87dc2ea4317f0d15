"""What may be done to log-mel: SpecAugment."""

import numpy as np

# Of a clip's frames, the most that one stretch leaves out: p of Park et al.'s policies SM and SS.
_LONGEST_SHARE = 0.2


def spec_augment(
    features: np.ndarray, frames: int, masks: int, bins: int, longest: int, generator: np.random.Generator
) -> np.ndarray:
    """Bands of mel bins and stretches of time replaced by the clip's mean (Park et al., Interspeech 2019,
    without time warping, which gave the least there).

    Args:
        features: float32 (mel bins, frames'). frames: those that hold sound; what follows stays as it is.
        masks: how many bands and how many stretches; they may lie over each other.
        bins: widest band; each width from 0 to it is as likely. longest: of a stretch, in frames, likewise; a
            stretch has at most a fifth of the clip's frames.
        generator: the source of every choice.

    Returns:
        a new array of the same shape and dtype.
    """
    out, height = features.copy(), features.shape[0]
    if not frames:
        return out
    mean = features[:, :frames].mean(dtype=np.float64)
    bins, longest = min(bins, height), min(longest, int(_LONGEST_SHARE * frames))
    for _ in range(masks):
        wide = int(generator.integers(bins + 1))
        first = int(generator.integers(height - wide + 1))
        out[first : first + wide, :frames] = mean
        long = int(generator.integers(longest + 1))
        first = int(generator.integers(frames - long + 1))
        out[:, first : first + long] = mean
    return out
