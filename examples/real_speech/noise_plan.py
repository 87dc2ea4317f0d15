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

COPIES = {"none": 1, "matched": 8}  # versions of each training clip that the cache keeps; of others four
DTYPE = "bfloat16"  # of the backbone, at half of float32's time

# Options of `whisper-meft train`; a folder of noise is one of those that are made.
TRAININGS: dict[str, dict[str, Any]] = {
    "none": {},
    "noise": {"augment": ["noise:0.5"], "noise_snr": [0.0, 10.0]},
    "louder": {"augment": ["noise:0.8"], "noise_snr": [-5.0, 10.0]},
    "babble": {"augment": ["noise:0.8"], "noise_snr": [-5.0, 10.0], "noise_dir": "train"},
    # Nothing but what is hardest in the test, as loud as there: what can be learned of it at all.
    "matched": {"augment": ["noise:1"], "noise_snr": [-2.0, 2.0], "noise_dir": "voices"},
}

# Noise that test and validation clips are heard through, and how loud (dB of signal to noise).
KINDS = ("coloured", "babble")
LEVELS = (10.0, 0.0)
HEARD = {f"{kind} {level:g} dB": (kind, level) for kind in KINDS for level in LEVELS}

METHODS = (f"head:{RECIPE}", f"lst:{RECIPE}", f"unipt:{RECIPE}+attention=pooled:8")
RATE = 1e-3  # what the study of clean recordings chose for each of them, on validation clips
CHOSEN, OTHER = "babble", "louder"  # on the validation clips of fold 0
TOLD = "noise"  # the mildest, which the documentation named first
MATCHED, LONG = "matched", 3 * clean.FROZEN["epochs"]  # whose loss falls as late


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


def copies_of(how: str) -> int:
    """How many versions of a training clip the cache keeps."""
    return COPIES.get(how, 4)


def row(entry: str, how: str, epochs: int = clean.FROZEN["epochs"]) -> Row:
    entry = f"{entry}+backbone_dtype={DTYPE}+max_frames={clean.TRIMMED}"
    return Row("accents", entry, epochs, (RATE,), 1, how=how)


def plan() -> Iterator[Cell]:
    """Every run of the study, the most telling first. A cell may come twice; it is run once."""

    def cells(entry: str, how: str, folds: range, **changes: int) -> Iterator[Cell]:
        return (Cell(row(entry, how, **changes), fold, RATE, 0) for fold in folds)

    head, lst, unipt = METHODS
    every = folds_of("accents")
    for entry, how in ((head, "none"), (lst, "none"), (head, "louder"), (head, "babble"), (lst, CHOSEN)):
        yield from cells(entry, how, every[:1])
    for entries, folds in (((head, lst), every[:2]), ((head, lst, unipt), every)):
        for entry in entries:
            for fold in folds:
                for how in ("none", CHOSEN):
                    yield from cells(entry, how, every[fold : fold + 1])
    yield from cells(head, MATCHED, every, epochs=LONG)
    for how in (OTHER, TOLD):
        for entry in (head, lst):
            yield from cells(entry, how, every[:1])
    for how in (OTHER, TOLD):
        for entry in (head, lst):
            yield from cells(entry, how, every)
