"""Samples that are already in memory: arrays, tensors and lists, of integers of any width and of floats."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .segments import Mono

LOUD = 256.0  # floats beyond this, 48 dB over full scale, are integers or another quantity

LOUDEST = 1e10  # integers written as floats reach 2^31; squares of much more leave the range of float32

_DIVIDE = "give them in the type that they were recorded in (int16, say), or as floats in -1 to 1"


@dataclass(frozen=True)
class Samples:
    """One or two axes of numbers, and what turns a part of them into float32 in [-1, 1).

    Attributes:
        array: ``(samples,)``, ``(samples, channels)`` or ``(channels, samples)``.
        zero, full: (x - zero) / full is the wave; full is None where it is x itself.
    """

    array: np.ndarray
    zero: float = 0.0
    full: float | None = None

    def __len__(self) -> int:
        return max(self.array.shape) if self.array.ndim == 2 else len(self.array)

    def part(self, first: int, last: int, mono: Mono) -> np.ndarray:
        """Samples ``first`` to ``last`` as float32 ``(samples,)``, made one channel."""
        if self.array.ndim == 1:
            part = self.array[first:last, None]
        elif self.array.shape[0] <= self.array.shape[1]:
            part = self.array[:, first:last].T
        else:
            part = self.array[first:last]  # [samples, channels]
        if part.dtype == np.float16:
            part = part.astype(np.float32)  # a mean of many would leave its range
        if self.full is not None:
            part = (part.astype(np.float64) - self.zero) / self.full
        with np.errstate(over="ignore", invalid="ignore"):  # what leaves float32's range becomes infinite
            return np.ascontiguousarray(mono(part), dtype=np.float32)


def as_samples(array: Any, name: str) -> Samples:
    """Samples of any kind, with the scale that their integers were stored in.

    8- and 16-bit integers are scaled by their width. Wider ones (Python lists and most columns of tables are
    int64) are 16-bit samples where all lie in -2^15 to 2^15, and 32-bit samples where some lie outside
    -2^23 to 2^23 - 1 or all have their lowest 8 bits unused; what lies between may be 24-bit samples or quiet
    32-bit ones. Whole numbers written as floats are taken in the same way.

    Raises:
        UserError: not numbers of one or two axes, or integers whose scale is not certain.
    """
    if hasattr(array, "detach"):  # a tensor; bfloat16 has no numpy equivalent
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    try:
        array = np.asarray(array)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is not an array of samples: {error}") from error
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2):
        raise UserError(
            f"{name} is not audio: a path, bytes, a binary file, an audio dict or an array of one or two "
            f"axes is accepted, got {array.dtype} of shape {array.shape}"
        )
    if array.dtype.itemsize <= 2 and array.dtype.kind in "iu":
        half = 2.0 ** (8 * array.dtype.itemsize - 1)
        return Samples(array, half if array.dtype.kind == "u" else 0.0, half)
    if not array.size or (array.dtype.kind == "f" and not _whole(array)):
        return Samples(array)
    return Samples(array, 0.0, _full_scale(array, name))


def _whole(array: np.ndarray) -> bool:
    """Whether floats are integers of a larger range than -1 to 1."""
    with np.errstate(invalid="ignore"):
        peak = max(abs(float(array.min())), abs(float(array.max())))
        return 1.0 < peak <= 2.0**31 and bool((array == np.round(array)).all())


def _full_scale(array: np.ndarray, name: str) -> float:
    """What 1.0 is in integers of more than 16 bits."""
    least, most = int(array.min()), int(array.max())
    values = f"{array.dtype} samples from {least} to {most}"
    if least < -(2**31) or most >= 2**31:
        raise UserError(f"{name} holds {values}, which no recording has: {_DIVIDE}")
    if least >= -(2**15) and most <= 2**15:  # rounding x 32768 gives 2^15 too
        # Bytes around 128 are unsigned 8-bit audio; as 16 bits they would be a click and silence.
        if least >= 0 and most < 256 and float(array.mean()) > 64:
            raise UserError(f"{name} holds {values}: unsigned bytes must be given as uint8")
        return 2.0**15
    wide = least < -(2**23) or most >= 2**23 or not (array.astype(np.int64) & 0xFF).any()
    if wide and array.dtype.kind != "u":
        return 2.0**31
    raise UserError(f"{name} holds {values}, whose number of bits cannot be told: {_DIVIDE}")
