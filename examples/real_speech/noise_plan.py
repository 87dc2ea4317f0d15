"""What the study of noise runs: side networks trained with and without augmentation, heard through noise.

Models learn the accents of people from clean recordings, as they are or augmented, and answer each test clip
as it is and through noise of two kinds at two levels. How to augment is chosen on fold 0, by the validation
clips heard through the same noises; other folds run what was chosen and what the comparison needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import plan as clean
from .plan import RECIPE, Cell, folds_of

COPIES = 4  # augmented versions of each training clip that the cache keeps
DTYPE = "bfloat16"  # of the backbone, at half of float32's time

# Options of `whisper-meft train`; a folder of noise is one of those that are made.
TRAININGS: dict[str, dict[str, Any]] = {
    "none": {},
    "noise": {"augment": ["noise:0.5"], "noise_snr": [0.0, 10.0]},
    "louder": {"augment": ["noise:0.8"], "noise_snr": [-5.0, 10.0]},
    "babble": {"augment": ["noise:0.8"], "noise_snr": [-5.0, 10.0], "noise_dir": "train"},
}

# Noise that test and validation clips are heard through, and how loud (dB of signal to noise).
KINDS = ("coloured", "babble")
LEVELS = (10.0, 0.0)
HEARD = {f"{kind} {level:g} dB": (kind, level) for kind in KINDS for level in LEVELS}

METHODS = (f"head:{RECIPE}", f"lst:{RECIPE}", f"unipt:{RECIPE}+attention=pooled:8")
RATE = 1e-3  # what the study of clean recordings chose for each of them, on validation clips
CHOSEN, OTHER = "babble", "louder"  # on the validation clips of fold 0
TOLD = "noise"  # the mildest, which the documentation named first


@dataclass(frozen=True)
class Row(clean.Row):
    """A method, and how its training clips are augmented.

    Attributes:
        how: of ``TRAININGS``.
    """

    how: str = "none"

    @property
    def name(self) -> str:
        return f"{super().name}-{self.how}"

    @property
    def budget(self) -> str:
        return f"{super().budget}-{self.how}"


def row(entry: str, how: str, epochs: int = clean.FROZEN["epochs"]) -> Row:
    entry = f"{entry}+backbone_dtype={DTYPE}+max_frames={clean.TRIMMED}"
    return Row("accents", entry, epochs, (RATE,), 1, how=how)


def plan() -> Iterator[Cell]:
    """Every run of the study, the most telling first. A cell may come twice; it is run once."""

    def cells(entry: str, how: str, folds: range) -> Iterator[Cell]:
        return (Cell(row(entry, how), fold, RATE, 0) for fold in folds)

    head, lst, unipt = METHODS
    every = folds_of("accents")
    for entry, how in ((head, "none"), (lst, "none"), (head, "louder"), (head, "babble"), (lst, CHOSEN)):
        yield from cells(entry, how, every[:1])
    for entries, folds in (((head, lst), every[:2]), ((head, lst, unipt), every)):
        for entry in entries:
            for fold in folds:
                for how in ("none", CHOSEN):
                    yield from cells(entry, how, every[fold : fold + 1])
    for how in TRAININGS:
        for entry in (head, lst):
            yield from cells(entry, how, every[:1])
    for how in (OTHER, TOLD):
        for entry in (head, lst):
            yield from cells(entry, how, every)
