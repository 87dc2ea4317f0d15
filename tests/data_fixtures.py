"""Small clips and tables that tests of the readers write and know again."""

import os

import numpy as np
import soundfile

RATE = 16_000


def wave(index: int, seconds: float = 0.2) -> np.ndarray:
    """A clip that is told from others by its mean."""
    return np.full(round(RATE * seconds), (index + 1) / 100, np.float32)


def write(path, index: int, seconds: float = 0.2):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave(index, seconds), RATE, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def index_of(example) -> int:
    """The index that the clip of an example was written with."""
    samples, rate = example.decode()
    assert rate == RATE
    return round(float(samples.mean()) * 100) - 1


def found(examples) -> list[tuple]:
    return [(index_of(example), example.label, example.speaker) for example in examples]


def table(path, *lines: str, encoding: str = "utf-8", end: str = "\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join(lines) + end).encode(encoding))
    return path


def names(examples) -> list[str]:
    return [os.path.basename(example.audio) for example in examples]
