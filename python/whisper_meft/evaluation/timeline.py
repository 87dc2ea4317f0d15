"""What a classifier says of a recording over time, and of all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..audio.windows import Windows


@dataclass(frozen=True)
class WindowLogits:
    """What a model gave for the windows of one recording.

    Attributes:
        logits: float32 (windows, K). muted: bool (windows,), where there is nothing to hear.
        shares: float64 (windows,), see :meth:`whisper_meft.audio.windows.Windows.shares`.
        starts, ends: (windows,) in seconds.
    """

    logits: np.ndarray
    muted: np.ndarray
    shares: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, muted: np.ndarray, windows: Windows, seconds: float) -> "WindowLogits":
        """Of a recording of so many seconds; one that is muted throughout counts as none that is."""
        muted = muted & ~muted.all()
        starts = np.array(windows.starts(seconds))
        ends = np.minimum(starts + windows.length, seconds)
        return cls(logits, muted, windows.shares(seconds), starts, ends)

    def pooled(self) -> np.ndarray:
        """Logits of the whole, float32 (K,): the log of the mean probability."""
        with np.errstate(divide="ignore"):
            return np.log(pool(softmax(self.logits), np.where(self.muted, 0, self.shares))).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    """float32, over the last axis; NaN where the logits are not finite."""
    return torch.from_numpy(logits).softmax(dim=-1).numpy()


def pool(probabilities: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The answer of a recording: the mean of its windows' probabilities, the sum rule of Kittler et al. (On
    combining classifiers, IEEE TPAMI 20 (3), 1998), which errs least where the estimates are rough.

    Where a recording changes its class, that of a class is the share of the time that has it; where it does
    not, one window that is sure of something else cannot outvote all others, as it could with the product.

    Args:
        probabilities: (windows, K). seconds: (windows,), how many each answers for, not all 0.

    Returns:
        float64 (K,), whose sum is 1; of one window what that has.
    """
    return np.average(np.asarray(probabilities, np.float64), axis=0, weights=seconds)


@dataclass(frozen=True)
class ClassifiedSegment:
    """One window of a recording.

    Attributes:
        start, end: in seconds from the beginning of the recording.
        label: the most probable class; None where nothing can be heard (no sample louder than -80 dB of full
            scale, in a recording that has others).
        probabilities: float32 (K,), in the order of the classifier's ``labels``; NaN where nothing can be
            heard.
    """

    start: float
    end: float
    label: str | None
    probabilities: np.ndarray


@dataclass(frozen=True)
class Timeline:
    """A recording's classes over time, and the answer for all of it.

    Attributes:
        labels: the K classes. seconds: the length of the recording.
        segments: its windows, in order of their beginning; they overlap. One where the recording is not
            longer than a window.
        label: the most probable class of the whole. probabilities: float32 (K,), what
            ``Classifier.probabilities`` gives: of one window its own, of several their mean, every second of
            the recording counting the same and windows without sound not at all (:func:`pool`).
    """

    labels: Sequence[str]
    seconds: float
    segments: list[ClassifiedSegment]
    label: str
    probabilities: np.ndarray

    @classmethod
    def of(cls, labels: Sequence[str], seconds: float, logits: np.ndarray, windows: WindowLogits | None):
        """Of a recording's ``logits`` (K,), and of its ``windows`` where it has several."""
        whole = softmax(logits)
        if windows is None:
            segments = [ClassifiedSegment(0.0, seconds, labels[int(whole.argmax())], whole)]
        else:
            segments = []
            each = softmax(windows.logits)
            for start, end, row, muted in zip(windows.starts, windows.ends, each, windows.muted):
                label = None if muted else labels[int(row.argmax())]
                row = np.full_like(row, np.nan) if muted else row
                segments.append(ClassifiedSegment(float(start), float(end), label, row))
        return cls(labels, seconds, segments, labels[int(whole.argmax())], whole)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: "label", "probabilities" by class, and "segments" with "start", "end", "label" and
        "probabilities", both None where nothing can be heard."""
        return {
            "label": self.label,
            "probabilities": _named(self.labels, self.probabilities),
            "segments": [
                {
                    "start": each.start,
                    "end": each.end,
                    "label": each.label,
                    "probabilities": None if each.label is None else _named(self.labels, each.probabilities),
                }
                for each in self.segments
            ],
        }


def _named(labels: Sequence[str], probabilities: np.ndarray) -> dict[str, float]:
    return {label: float(p) for label, p in zip(labels, probabilities)}
