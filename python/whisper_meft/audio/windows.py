"""How recordings that are longer than a model hears at once are cut."""

from dataclasses import dataclass

import numpy as np

from ..errors import UserError

WHISPER_SECONDS = 30.0  # that Whisper hears at most

_SHORTEST = 0.1  # seconds that can be asked for

# At the end of a recording so many seconds, but no more than this share of a window, get no window of their
# own: encoders and cutting to length add as much.
_REST, _SHARE = 0.1, 0.1


@dataclass(frozen=True)
class Windows:
    """How recordings are cut.

    They begin every ``hop`` seconds, as long as a whole one fits; a last one that ends with the recording
    follows where more than 0.1 s (or a tenth of a window) are left over. All of them are of one length, then.

    Args:
        length: of a window, in seconds. hop: from the beginning of one to that of the next; the length by
            default.

    Raises:
        UserError: a length of nothing, or a hop that leaves sound out.
    """

    length: float
    hop: float | None = None

    def __post_init__(self):
        if self.hop is None:
            object.__setattr__(self, "hop", self.length)
        if not 0 < self.length < np.inf:
            raise UserError(f"window must be a number of seconds above 0, got {self.length:g}")
        if not 0 < self.hop <= self.length:
            raise UserError(
                f"hop must be above 0 and at most the window's {self.length:g} seconds, got {self.hop:g}"
            )

    def __str__(self) -> str:
        return f"{self.length:g} s every {self.hop:g} s"

    @classmethod
    def within(
        cls,
        longest: float,
        length: float | None = None,
        hop: float | None = None,
        overlap: float = 0.0,
    ) -> "Windows":
        """Windows that a model hears whole.

        Args:
            longest: the seconds that it hears (:func:`whisper_meft.data.windows.longest_window`), and of a
                window by default. length, hop: what is asked for, at least 0.1 seconds.
            overlap: of windows that follow each other, as a share of them, where no hop is given.

        Raises:
            UserError: ``length`` is more than that, or see the class.
        """
        for name, value in (("window", length), ("hop", hop)):
            if value is not None and not value >= _SHORTEST:
                raise UserError(f"{name} must be at least {_SHORTEST:g} seconds, got {value:g}")
        if length is not None and length > longest + 1e-9:
            raise UserError(
                f"window must be at most the {longest:g} seconds that the model hears, got {length:g}"
            )
        length = longest if length is None else length
        return cls(length, length * (1 - overlap) if hop is None else hop)

    @property
    def rest(self) -> float:
        """Seconds at the end that get no window of their own."""
        return min(_REST, _SHARE * self.length)

    def needed(self, seconds: float | None) -> bool:
        """Whether a recording of this length, in seconds, is more than one window; not if that is unknown."""
        return seconds is not None and seconds > self.length + self.rest

    def starts(self, seconds: float) -> list[float]:
        """Where the windows of a recording begin, in seconds, ascending; ``seconds``: its length."""
        if not self.needed(seconds):
            return [0.0]
        whole = int((seconds - self.length) / self.hop + 1e-9) + 1
        # Whole microseconds, so that the same place is the same number with whatever hop it is reached.
        starts = [round(number * self.hop, 6) for number in range(whole)]
        if seconds - (starts[-1] + self.length) > self.rest:
            starts.append(round(seconds - self.length, 6))
        return starts

    def shares(self, seconds: float) -> np.ndarray:
        """:func:`shares` of a recording's windows."""
        starts = np.array(self.starts(seconds))
        return shares(starts, np.minimum(starts + self.length, seconds))


def shares(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Of how many seconds of a recording each window is to answer, float64 (windows,): of those that it alone
    has, and an equal share of those that it has with others.

    Args:
        starts, ends: (windows,) in seconds, ascending, nothing between two windows.
    """
    points = np.unique(np.concatenate([starts, ends]))
    there = np.searchsorted(starts, points, "right") - np.searchsorted(ends, points, "right")
    passed = np.concatenate([[0.0], np.cumsum(np.diff(points) / np.maximum(there[:-1], 1))])
    return np.interp(ends, points, passed) - np.interp(starts, points, passed)
