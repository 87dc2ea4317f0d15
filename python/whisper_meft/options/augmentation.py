"""How training clips are augmented: the options that commands share."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..augmentation.settings import KINDS, OPTIONS, Augmentation, parse_kinds
from ..errors import UserError
from .parser import UsageError


def _told(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


_SURE, _HALF = ([kind for kind in KINDS if (KINDS[kind] == 1) is sure] for sure in (True, False))


@dataclass
class AugmentArguments:
    """How training clips are changed, anew in each epoch."""

    _argument_group_name = "augmentation"

    augment: list[str] | None = field(
        default=None,
        metadata={
            "help": f"change training clips anew in each epoch: some of {', '.join(KINDS)}, done in this "
            "order, with spaces or commas between; a number behind a colon is how likely it is for a clip, "
            f"as in noise:0.8; without one it is 1 of {_told(_SURE)}, 0.5 of {_told(_HALF)} (default: none)"
        },
    )
    speed_factors: list[float] | None = field(
        default=None,
        metadata={"help": "speeds to draw from; pitch goes with them (augment speed; default: 0.9 1.0 1.1)"},
    )
    noise_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder of recordings of noise, searched through (augment noise; default: synthetic "
            "noise, from white to brown)"
        },
    )
    noise_snr: list[float] | None = field(
        default=None,
        metadata={"help": "least and most signal-to-noise ratio, in dB (augment noise; default: 0 20)"},
    )
    room_dir: str | None = field(
        default=None,
        metadata={"help": "folder of room impulse responses, searched through (needed by augment room)"},
    )
    gain_db: list[float] | None = field(
        default=None, metadata={"help": "least and most gain, in dB (augment gain; default: -10 10)"}
    )
    spec_masks: int | None = field(
        default=None,
        metadata={"help": "SpecAugment's bands of mel bins, and stretches of time, of a clip (default: 2)"},
    )
    spec_bins: int | None = field(default=None, metadata={"help": "widest band, in mel bins (default: 27)"})
    spec_frames: int | None = field(
        default=None,
        metadata={"help": "longest stretch, in frames of 10 ms; at most a fifth of the clip (default: 100)"},
    )

    def augment_given(self) -> dict[str, Any]:
        """Those of these options that are given, by name."""
        given = {name: getattr(self, name) for name in ("augment", *OPTIONS)}
        return {name: value for name, value in given.items() if value is not None}

    def augmentation(self) -> Augmentation | None:
        """What is done to training clips, folders apart; None where nothing is.

        Raises:
            UserError: a value that cannot be used.
        """
        if self.augment is None:
            return None
        names = {each.name for each in dataclasses.fields(Augmentation)} - {"kinds"}
        given = {name: value for name, value in self.augment_given().items() if name in names}
        return Augmentation(parse_kinds(self.augment), **given)

    def check_augment(self) -> None:
        """Raises UsageError for values that cannot be used, or not together."""
        try:
            settings = self.augmentation()
        except UserError as error:
            raise UsageError(f"--{error}") from error
        for name, value in self.augment_given().items():
            if name == "augment" or (settings is not None and OPTIONS[name] in settings.kinds):
                continue
            said = " ".join(map(str, value)) if isinstance(value, list) else value
            raise UsageError(f"--{name} {said} is for --augment {OPTIONS[name]}, which is not given")
        if settings is not None and "room" in settings.kinds and self.room_dir is None:
            raise UsageError("--augment room needs --room_dir, a folder of room impulse responses")
        for name in ("noise_dir", "room_dir"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise UsageError(f"--{name} must be a folder of recordings, got {folder!r}")


def check_copies(copies: int | None, cached: bool, augmented: bool) -> None:
    """Raises UsageError where the number of augmented versions that a feature cache keeps does not fit.

    Args:
        copies: that number, if it is given. cached: whether there is a feature cache. augmented: whether
            clips are.
    """
    if copies is None:
        if cached and augmented:
            raise UsageError(
                "--augment changes clips in every epoch, and a feature cache holds what was computed once: "
                "--cache_copies says how many versions of each training clip it keeps, for epochs in turn"
            )
        return
    if copies < 1:
        raise UsageError(f"--cache_copies must be at least 1, got {copies}")
    if not cached:
        raise UsageError(f"--cache_copies {copies} needs --cache_features")
    if copies > 1 and not augmented:
        raise UsageError(f"--cache_copies {copies} needs --augment: without it all copies would be alike")
