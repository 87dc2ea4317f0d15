"""The part of a recording that is wanted."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import UserError
from .notes import say_once

_FEWEST = 1024  # samples that tell whether channels cancel each other

# Of the energy that channels add up to which have nothing to do with each other: of two a correlation below
# -0.95. Lossy coders and 8 bits leave up to -15 dB of channels that cancel each other.
_CANCELLED = 0.05

_RATES = (1_000, 1_000_000)  # Hz; a rate outside these is a damaged header


@dataclass(frozen=True, slots=True)
class Segment:
    """From ``start`` to ``stop`` in ``unit``; of that what follows the first ``after`` seconds, at most
    ``longest`` seconds; half open. ``channel`` (from 0) is heard alone; None averages all."""

    start: float
    stop: float
    unit: str
    longest: float = math.inf
    channel: int | None = None
    after: float = 0.0

    def within(self, longest: float) -> "Segment":
        """The first ``longest`` seconds of it."""
        return replace(self, longest=min(longest, self.longest))

    def frames(self, rate: int, name: str) -> tuple[int, float]:
        """The segment in samples at ``rate``; the second is ``inf`` where it reaches to the end.

        Raises:
            UserError: there is no sample in it.
        """
        scale = rate if self.unit == "seconds" else 1
        first = round(self.start * scale)
        last = self.stop if self.stop == math.inf else round(self.stop * scale)
        if last <= first:
            raise UserError(
                f"{name}: the segment from {self.start:g} to {self.stop:g} {self.unit} holds no sample at "
                f"{rate} Hz"
            )
        first += round(self.after * rate)
        if last <= first:
            raise UserError(f"{name}: the segment ends before the {self.after:g} s that are passed over")
        if self.longest != math.inf:
            last = min(last, first + max(1, round(self.longest * rate)))
        return first, last


def make_segment(
    start: Any,
    stop: Any,
    unit: Any,
    channel: int | None,
    longest: float | None,
    name: str,
    window: tuple[float, float] | None = None,
) -> Segment:
    """What these say; ``window``: the seconds of it that are passed over, and how many follow that are meant.

    Raises:
        UserError: these are no segment.
    """
    if unit not in ("seconds", "samples"):
        raise UserError(f'unit must be "seconds" or "samples", got {unit!r}')
    try:
        first = 0.0 if start is None else float(start)
        last = math.inf if stop is None else float(stop)
    except (TypeError, ValueError):
        raise UserError(f"{name}: start and stop must be numbers, got {start!r} and {stop!r}") from None
    if not 0 <= first < math.inf or math.isnan(last):
        raise UserError(f"{name}: start must be 0 or more and stop a number, got {start!r} and {stop!r}")
    if last <= first:
        raise UserError(f"{name}: the segment from {first:g} to {last:g} {unit} is empty")
    after, most = (0.0, math.inf) if window is None else window
    if not (0 <= after < math.inf and most > 0):
        raise UserError(f"{name}: a window begins at 0 or later and lasts more than 0 s, got {window!r}")
    return Segment(first, last, unit, most if longest is None else min(longest, most), channel, after)


def check_rate(rate: Any, name: str) -> int:
    """``rate`` as an integer number of Hz that a recording can have.

    Raises:
        UserError: it is none.
    """
    try:
        value = int(rate)
        if value != rate or not _RATES[0] <= value <= _RATES[1]:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{name} has a sampling rate of {rate!r} Hz; {_RATES[0]} to {_RATES[1]} are accepted"
        ) from None
    return value


class Mono:
    """Makes one channel of a recording's blocks, in order: the one that is asked for, or the mean of all.

    That of two of which one is the other inverted is silence: where channels cancel each other one of them is
    heard, which a warning says.
    """

    def __init__(self, channel: int | None, name: str):
        self.channel, self.name = channel, name
        self._instead = None  # the channel that is heard in place of a mean that is nothing

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """``[samples, channels]`` as ``(samples,)``.

        Raises:
            UserError: it has no such channel.
        """
        count = block.shape[1]
        if self.channel is None:
            return block[:, 0] if count == 1 else self._mean(block)
        if not 0 <= self.channel < count:
            raise UserError(
                f"{self.name} has {count} channel{'s'[: count > 1]}, channel {self.channel} (from 0) is not "
                "there"
            )
        return np.ascontiguousarray(block[:, self.channel])

    def _mean(self, block: np.ndarray) -> np.ndarray:
        mean = block.mean(axis=1)
        if len(block) >= _FEWEST:  # of fewer samples that is chance, and the block before has told
            with np.errstate(over="ignore", invalid="ignore"):
                # Of channels that have nothing to do with each other both sides are alike, but for the share.
                cancel = np.vdot(mean, mean) * block.shape[1] ** 2 < _CANCELLED * np.vdot(block, block)
            if not cancel:
                self._instead = None
            elif self._instead is None:
                energies = np.einsum("sc,sc->c", block, block, dtype=np.float64)
                self._instead = int(np.argmax(energies >= energies.max() / 2))
                say_once(
                    self.name,
                    "has channels that cancel each other, as one is another inverted: channel "
                    f"{self._instead} (from 0) is heard in place of their mean",
                )
        return mean if self._instead is None else np.ascontiguousarray(block[:, self._instead])


def begins_too_late(name: str, first: int, total: int, rate: int) -> UserError:
    return UserError(
        f"{name}: the segment begins at {first / rate:.2f} s, the audio ends at {total / rate:.2f} s"
    )
