"""Augmenting clips: what is drawn for which clip in which epoch, and the recordings that are mixed in."""

import hashlib
import logging
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..augmentation.settings import OF_WAVES, Augmentation
from ..augmentation.spectrograms import spec_augment
from ..augmentation.waves import (
    add_noise,
    change_gain,
    change_speed,
    coloured_noise,
    reverberate,
    telephone,
)
from ..errors import UserError, printable
from .checking import check_audio
from .examples import Example, ExampleSet
from .folders import list_audio_files

logger = logging.getLogger(__name__)

VERSION = 1  # of what a clip becomes: what was computed of an earlier one may be of another sound

_LONGEST_RESPONSE = 10.0  # seconds of a room's impulse response that are used

_SHORTEST = 0.1  # seconds of noise that are read at least: a few samples vanish when they are resampled

_STEEPEST = 2.0  # synthetic noise falls with frequency to the power of 0 to this: white to brown


class Augmenter:
    """Changes clips as :class:`whisper_meft.augmentation.settings.Augmentation` says.

    What is drawn for a clip depends on the seed, the epoch and the clip's name alone, each kind for itself:
    not on other clips, nor on how many processes read, nor on where a run was resumed.

    Args:
        settings: what is done. seed: of all choices.
        noise_dir: folder of recordings of noise, searched through; a clip gets a random stretch of a random
            one, repeated where it is shorter. Without it noise is synthetic, of a random colour from white to
            brown.
        room_dir: folder of room impulse responses, the first channel of each; needed by "room".
        sampling_rate: of the waveforms, in Hz.
        num_workers: threads that check the recordings, which are all decoded once; unusable ones are named in
            a warning and left out. progress: show a bar meanwhile.

    Raises:
        UserError: a folder is missing, holds no audio or none that can be used, or ``settings`` have no use
            for it.
    """

    def __init__(
        self,
        settings: Augmentation,
        seed: int = 0,
        noise_dir: str | Path | None = None,
        room_dir: str | Path | None = None,
        sampling_rate: int = 16_000,
        num_workers: int = 0,
        progress: bool = False,
    ):
        self.settings, self.seed, self.sampling_rate = settings, seed, sampling_rate
        self.folders = {"noise_dir": noise_dir, "room_dir": room_dir}
        for (name, folder), kind in zip(self.folders.items(), ("noise", "room")):
            if folder is not None and kind not in settings.kinds:
                raise UserError(f"{name} is for augment {kind}, which is not given")
        if "room" in settings.kinds and room_dir is None:
            raise UserError("room_dir is needed by augment room: a folder of room impulse responses")
        how = (sampling_rate, num_workers, progress)
        self.noises, self.rooms = (
            None if folder is None else recordings(name, str(folder), *how)
            for name, folder in self.folders.items()
        )

    @property
    def of_waves(self) -> list[str]:
        """The kinds that need a waveform."""
        return [kind for kind in self.settings.kinds if kind in OF_WAVES]

    @cached_property
    def speeds(self) -> tuple[float, float]:
        """The least and the greatest factor that speed changes by."""
        factors = (1.0, *(self.settings.speed_factors if "speed" in self.settings.kinds else ()))
        return min(factors), max(factors)

    def check_bins(self, bins: int) -> None:
        """Raises UserError where a band of SpecAugment may be all of so many mel bins."""
        if "spec" in self.settings.kinds and self.settings.spec_bins >= bins:
            raise UserError(
                f"spec_bins must be below the {bins} mel bins that there are, got {self.settings.spec_bins}"
            )

    def wave(self, wave: np.ndarray, name: str, version: str, most: int, whole: bool = False) -> np.ndarray:
        """A clip with all that is done to its waveform.

        Args:
            wave: float32 (samples,). name: of the clip.
            version: what tells this draw from others of the clip, such as the epoch.
            most: samples that may be left of it; what is behind them is cut off.
            whole: all of the clip is to be heard: a speed at which it would be longer is not taken.
        """
        settings = self.settings
        for kind in self.of_waves:
            draw = self._draw(kind, name, version)
            if draw is None:
                continue
            if kind == "speed":
                factor = settings.speed_factors[draw.integers(len(settings.speed_factors))]
                if not whole or len(wave) / factor <= most:
                    wave = change_speed(wave[: int(most * factor) + 1], factor)[:most]
            elif kind == "room":
                wave = reverberate(wave, self._response(draw))
            elif kind == "noise":
                snr = draw.uniform(*settings.noise_snr)
                wave = add_noise(wave, self._noise(len(wave), draw), snr, self.sampling_rate)
            elif kind == "telephone":
                wave = telephone(wave, self.sampling_rate, mu_law=bool(draw.random() < 0.5))
            else:
                wave = change_gain(wave, draw.uniform(*settings.gain_db))
        return wave[:most]

    def log_mel(self, features: np.ndarray, frames: int, name: str, version: str) -> np.ndarray:
        """A clip's log-mel, float32 (mel bins, frames'), with what is done to that; ``frames`` hold sound."""
        draw = self._draw("spec", name, version) if "spec" in self.settings.kinds else None
        if draw is None:
            return features
        settings = self.settings
        strengths = (settings.spec_masks, settings.spec_bins, settings.spec_frames)
        return spec_augment(features, frames, *strengths, draw)

    def as_dict(self) -> dict[str, Any]:
        """What is done, for the record of a run; plain JSON values."""
        folders = {name: str(folder) for name, folder in self.folders.items() if folder is not None}
        sets = {"noise_files": self.noises, "room_files": self.rooms}
        counts = {name: len(found) for name, found in sets.items() if found is not None}
        return {**self.settings.as_dict(), **folders, **counts, "seed": self.seed}

    def describe(self) -> str:
        """The kinds and how likely each is, in a line."""
        said = [
            kind if share == 1 else f"{kind} ({share:.0%})" for kind, share in self.settings.kinds.items()
        ]
        return ", ".join(said)

    def _draw(self, kind: str, name: str, version: str) -> np.random.Generator | None:
        """The source of a kind's choices for a clip, or None where nothing is to be done."""
        told = hashlib.sha256(
            "\0".join((str(self.seed), version, kind, name)).encode("utf-8", "surrogatepass")
        )
        generator = np.random.default_rng(int.from_bytes(told.digest()[:16], "little"))
        return generator if generator.random() < self.settings.kinds[kind] else None

    def _noise(self, samples: int, draw: np.random.Generator) -> np.ndarray:
        if self.noises is None:
            exponent = draw.uniform(0, _STEEPEST)
            return coloured_noise(samples, exponent, self.sampling_rate, draw)
        chosen = self.noises[int(draw.integers(len(self.noises)))]
        wanted = max(samples / self.sampling_rate, _SHORTEST)
        start = draw.uniform(0, max(0.0, chosen.seconds - wanted))
        part = Example(chosen.audio, name=chosen.name, start=start)
        noise, _ = part.read(self.sampling_rate, longest=wanted)
        return noise

    def _response(self, draw: np.random.Generator) -> np.ndarray:
        chosen = self.rooms[int(draw.integers(len(self.rooms)))]
        response, _ = chosen.read(self.sampling_rate, longest=_LONGEST_RESPONSE)
        return response


def recordings(
    name: str, folder: str, sampling_rate: int, num_workers: int = 0, progress: bool = False
) -> ExampleSet:
    """The recordings in a folder and below it, in the order of their paths, each with its length.

    Args:
        name: of the option that names the folder. Others as of :class:`Augmenter`.

    Raises:
        UserError: the folder is missing, holds no audio, or none that can be used.
    """
    if not Path(folder).is_dir():
        there = "is a file, a folder is needed" if Path(folder).exists() else "does not exist"
        raise UserError(f"{name}: {folder} {there}")
    if not (files := list_audio_files(folder)):
        raise UserError(f"{name}: no audio files were found under {folder}")
    return _checked(name, folder, tuple(files), sampling_rate, num_workers, progress)


@cache
def _checked(
    name: str, folder: str, files: tuple[str, ...], sampling_rate: int, num_workers: int, progress: bool
) -> ExampleSet:
    # Once in a process: a comparison trains many times with the same folder.
    channel = 0 if name == "room_dir" else None  # the mean of several microphones would be no room
    found = ExampleSet([Example(file, channel=channel) for file in files], f"{name} {folder}")
    good, bad = check_audio(found, False, num_workers, progress, feature_extractor=_Rate(sampling_rate))
    for example, reason in bad:
        logger.warning("%s: %s cannot be used: %s", name, printable(example), printable(reason))
    return good


class _Rate:
    """What :func:`check_audio` asks of a feature extractor."""

    def __init__(self, sampling_rate: int):
        self.sampling_rate = sampling_rate
