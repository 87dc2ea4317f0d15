"""What may be done to a waveform: pure functions of arrays, float32 (samples,) in and out.

Each says what it does of what it is given, and a clip without samples stays one; what is drawn at random is
drawn elsewhere (:mod:`whisper_meft.data.augmenter`). Powers are taken in float64.
"""

import math

import numpy as np

from ..errors import LazyPackage

soxr = LazyPackage("soxr", "changing the speed of audio")

_FRAME_SECONDS = 0.02

_QUIET = 1e-4  # of the loudest frame's power, 40 dB below it: what is quieter is a pause

TELEPHONE_RATE = 8000

# Where a telephone band lets all through, and where nothing (Hz); in between the gain falls linearly.
_BAND, _BAND_EDGES = (300.0, 3400.0), (200.0, 3600.0)

_MU = 255.0


def change_speed(wave: np.ndarray, factor: float) -> np.ndarray:
    """Played ``factor`` times as fast, by resampling: tempo and pitch change together (Ko et al.,
    Interspeech 2015). (samples,) -> (samples / factor,), rounded down, but at least one sample."""
    if factor == 1 or not len(wave):
        return wave
    faster = soxr.resample(wave, factor, 1.0, quality="HQ")[: int(len(wave) / factor + 1e-6)]
    return faster if len(faster) else wave


def change_gain(wave: np.ndarray, gain_db: float) -> np.ndarray:
    """Made louder by so many dB. What passes full scale is not clipped."""
    return (wave * 10 ** (gain_db / 20)).astype(np.float32)


def sounding_power(wave: np.ndarray, rate: int) -> float:
    """Mean square of the part of a clip that sounds: of the frames of 20 ms whose power is at most 40 dB
    below the loudest one's. Pauses would make a clip seem quieter than its speech. 0 for silence."""
    if not len(wave):
        return 0.0
    size = max(1, round(rate * _FRAME_SECONDS))
    squares = np.square(wave, dtype=np.float64)
    energy = np.add.reduceat(squares, np.arange(0, len(wave), size))
    counts = np.full(len(energy), size)
    counts[-1] = len(wave) - size * (len(energy) - 1)
    power = energy / counts
    heard = power >= _QUIET * power.max()
    return float(energy[heard].sum() / counts[heard].sum())


def add_noise(wave: np.ndarray, noise: np.ndarray, snr_db: float, rate: int) -> np.ndarray:
    """A clip with noise, whose power over the clip is ``snr_db`` below that of the part that sounds.

    Args:
        wave: (samples,). noise: (n,) at the same rate, cut or repeated to the clip's length; where it is
            silent, or the clip is, nothing is added.
    """
    if not len(wave):
        return wave
    noise = np.resize(noise, len(wave))
    power = float(np.square(noise, dtype=np.float64).mean())
    if power == 0:
        return wave
    scale = math.sqrt(sounding_power(wave, rate) / power) * 10 ** (-snr_db / 20)
    return (wave + scale * noise.astype(np.float64)).astype(np.float32)


def coloured_noise(samples: int, exponent: float, rate: int, generator: np.random.Generator) -> np.ndarray:
    """Noise with a power spectrum of f^-exponent: 0 is white, 1 pink, 2 brown; below 60 Hz it is flat.
    float32 (samples,), of power 1."""
    size = _fast_length(samples)
    if not samples:
        return np.zeros(0, np.float32)
    spectrum = np.fft.rfft(generator.standard_normal(size))
    hertz = np.maximum(np.fft.rfftfreq(size, 1 / rate), 60.0)
    noise = np.fft.irfft(spectrum * (hertz / 60.0) ** (-exponent / 2), size)[:samples]
    power = float(np.square(noise).mean())
    return (noise / math.sqrt(power) if power else noise).astype(np.float32)


def reverberate(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    """A clip as it is heard in a room: convolved with its impulse response, whose highest peak, the direct
    sound, stays where it was, and brought back to the clip's power, as Kaldi and ESPnet do.

    Args:
        wave: (samples,). response: (n,) at the same rate; where it is silent nothing is done.

    Returns:
        (samples,): what echoes on behind the clip is cut off.
    """
    if not len(wave) or not len(response):
        return wave
    direct = int(np.abs(response).argmax())
    if response[direct] == 0:
        return wave
    response = response / response[direct]  # so that the direct sound keeps its sign
    size = _fast_length(len(wave) + len(response) - 1)
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(response, size)
    heard = np.fft.irfft(spectrum, size)[direct : direct + len(wave)]
    before, after = (float(np.square(each, dtype=np.float64).mean()) for each in (wave, heard))
    if not before or not after:
        return wave
    return (heard * math.sqrt(before / after)).astype(np.float32)


def telephone(wave: np.ndarray, rate: int, mu_law: bool = False) -> np.ndarray:
    """A clip as it comes through a telephone: 300 to 3400 Hz, sampled at 8 kHz; nothing below 200 or above
    3600 Hz is left.

    Args:
        wave: (samples,). rate: its own.
        mu_law: also in the 8 bits of ITU-T G.711's mu-law, full scale being the clip's peak.

    Returns:
        (samples,) at ``rate``.
    """
    narrow = _resample(wave, rate, TELEPHONE_RATE) if len(wave) else wave
    if not len(narrow):
        return np.zeros_like(wave)
    narrow = _in_band(narrow, TELEPHONE_RATE)
    if mu_law:
        narrow = _through_mu_law(narrow)
    back = _resample(narrow, TELEPHONE_RATE, rate)[: len(wave)]
    return np.pad(back, (0, len(wave) - len(back))).astype(np.float32, copy=False)


def _resample(wave: np.ndarray, rate: int, other: int) -> np.ndarray:
    return wave if rate == other else soxr.resample(wave, rate, other, quality="HQ")


def _in_band(wave: np.ndarray, rate: int) -> np.ndarray:
    # Silence behind the clip takes the filter's ringing, which would come round to its beginning.
    size = _fast_length(len(wave) + rate // 10)
    hertz = np.fft.rfftfreq(size, 1 / rate)
    corners = (_BAND_EDGES[0], *_BAND, _BAND_EDGES[1])
    gain = np.interp(hertz, corners, (0.0, 1.0, 1.0, 0.0))
    return np.fft.irfft(np.fft.rfft(wave, size) * gain, size)[: len(wave)].astype(np.float32)


def _through_mu_law(wave: np.ndarray) -> np.ndarray:
    peak = float(np.abs(wave).max())
    if peak == 0:
        return wave
    compressed = np.log1p(_MU * np.abs(wave) / peak) / math.log1p(_MU)
    levels = np.round(127 * compressed) / 127  # 8 bits: a sign and 7 of the level
    return (np.sign(wave) * peak * np.expm1(levels * math.log1p(_MU)) / _MU).astype(np.float32)


def _fast_length(least: int) -> int:
    """The smallest length of at least ``least`` whose Fourier transform is quick: 2^a, 3, 5 or 9 times it."""
    sizes = (odd << max(0, (max(least, 1) - 1) // odd).bit_length() for odd in (1, 3, 5, 9))
    return min(sizes)
