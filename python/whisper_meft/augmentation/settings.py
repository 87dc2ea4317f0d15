"""What is done to training clips, how often and how strongly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

# In the order in which they are done, each with how likely it is for a clip where nothing is said.
KINDS: dict[str, float] = {
    "speed": 1.0,
    "room": 0.5,
    "noise": 0.5,
    "telephone": 0.5,
    "gain": 1.0,
    "spec": 1.0,
}

# Those that need a waveform.
OF_WAVES = tuple(kind for kind in KINDS if kind != "spec")

_LOUDEST_DB = 60.0

# Which option is of which kind.
OPTIONS = {
    "speed_factors": "speed",
    "room_dir": "room",
    "noise_dir": "noise",
    "noise_snr": "noise",
    "gain_db": "gain",
    "spec_masks": "spec",
    "spec_bins": "spec",
    "spec_frames": "spec",
}


def parse_kinds(entries: Sequence[str]) -> dict[str, float]:
    """``["speed,noise:0.3", "spec"]`` -> ``{"speed": 1.0, "noise": 0.3, "spec": 1.0}``, in the order of
    :data:`KINDS`.

    Raises:
        UserError: an unknown kind, one that is named twice, a probability outside (0, 1], or nothing.
    """
    found: dict[str, float] = {}
    for entry in (each.strip() for text in entries for each in text.split(",")):
        kind, colon, probability = entry.partition(":")
        if kind not in KINDS:
            raise UserError(f"augment must be some of {', '.join(KINDS)}, got {kind!r}")
        if kind in found:
            raise UserError(f"augment names {kind} twice")
        try:
            found[kind] = float(probability) if colon else KINDS[kind]
        except ValueError:
            found[kind] = math.nan
        if not 0 < found[kind] <= 1:
            raise UserError(
                f"augment: the probability of {kind} must be above 0 and at most 1, got {probability!r}"
            )
    if not found:
        raise UserError(f"augment must be some of {', '.join(KINDS)}, got nothing")
    return {kind: found[kind] for kind in KINDS if kind in found}


@dataclass(frozen=True)
class Augmentation:
    """What is done to training clips.

    Attributes:
        kinds: the probability of each kind, by name: some of "speed" (the waveform resampled, so that tempo
            and pitch change together), "room" (convolved with a recorded room impulse response), "noise"
            (added), "telephone" (300 to 3400 Hz at 8 kHz), "gain", and "spec" (SpecAugment: bands of mel bins
            and stretches of time left out); in whatever order, they are done in this one.
        speed_factors: one of them is drawn; 1.1 is faster, higher and shorter.
        noise_snr: least and most signal-to-noise ratio, in dB; drawn evenly between them.
        gain_db: least and most, in dB; drawn evenly between them.
        spec_masks: of each kind, bands and stretches.
        spec_bins: widest band, in mel bins. spec_frames: longest stretch, in frames of 10 ms.

    Raises:
        UserError: a value that cannot be used.
    """

    kinds: Mapping[str, float]
    speed_factors: Sequence[float] = (0.9, 1.0, 1.1)
    noise_snr: Sequence[float] = (0.0, 20.0)
    gain_db: Sequence[float] = (-10.0, 10.0)
    spec_masks: int = 2
    spec_bins: int = 27
    spec_frames: int = 100

    def __post_init__(self):
        kinds = parse_kinds([f"{kind}:{probability}" for kind, probability in self.kinds.items()])
        object.__setattr__(self, "kinds", kinds)
        for name in ("speed_factors", "noise_snr", "gain_db"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if not self.speed_factors or not all(0.5 <= factor <= 2 for factor in self.speed_factors):
            raise UserError(f"speed_factors must lie between 0.5 and 2, got {_said(self.speed_factors)}")
        for name, most in (("noise_snr", 100.0), ("gain_db", _LOUDEST_DB)):
            value = getattr(self, name)
            if len(value) != 2 or not -most <= value[0] <= value[1] <= most:
                raise UserError(
                    f"{name} must be two numbers of dB from {-most:g} to {most:g}, the lower one first, got "
                    f"{_said(value)}"
                )
        for name in ("spec_masks", "spec_bins", "spec_frames"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (name == "spec_masks"):
                least = int(name == "spec_masks")
                raise UserError(f"{name} must be an integer of at least {least}, got {value!r}")

    def as_dict(self) -> dict[str, Any]:
        """The kinds and what matters to them; plain JSON values."""
        named = {name: getattr(self, name, None) for name, kind in OPTIONS.items() if kind in self.kinds}
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in named.items()
            if value is not None
        }
        return {"kinds": dict(self.kinds), **values}


def _said(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
