"""What a classifier says of a recording over time, and of all of it."""

from collections.abc import Iterator, Sequence
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

    @property
    def weights(self) -> np.ndarray:
        """float64 (windows,): the shares, 0 where there is nothing to hear."""
        return np.where(self.muted, 0.0, self.shares)

    def pooled(self, classes: Sequence[int] | None = None) -> np.ndarray:
        """Logits of the whole, float32 (K,): :func:`pool`.

        Args:
            classes: of several models side by side the number of each one's, which are pooled by themselves.
        """
        cuts = np.cumsum(classes)[:-1] if classes else []
        each = [pool(part, self.weights) for part in np.split(self.logits, cuts, axis=1)]
        return np.concatenate(each).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    """float32, over the last axis; NaN where the logits are not finite."""
    return torch.from_numpy(logits).softmax(dim=-1).numpy()


def pool(logits: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The answer of a recording: the log of the mean of its windows' probabilities, the sum rule of Kittler
    et al. (On combining classifiers, IEEE TPAMI 20 (3), 1998), which errs least where estimates are rough.

    Where a recording changes its class, the probability of a class is the share of the time that has it;
    where it does not, one window that is sure of something else cannot outvote all others, as it could with
    the product of their probabilities.

    Args:
        logits: (windows, K). seconds: (windows,), how many each answers for, not all 0.

    Returns:
        float64 (K,), the exponentials of which have the sum 1.
    """
    weights = np.asarray(seconds, np.float64) / np.sum(seconds)
    counts = weights > 0
    each = torch.from_numpy(np.asarray(logits[counts], np.float64)).log_softmax(dim=-1)
    # In logs, because a probability may be below the least float.
    return torch.logsumexp(each + torch.from_numpy(np.log(weights[counts]))[:, None], dim=0).numpy()


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
    def of(
        cls,
        labels: Sequence[str],
        seconds: float,
        logits: np.ndarray,
        windows: WindowLogits | None,
        heard: float = np.inf,
    ) -> "Timeline":
        """Of a recording's ``logits`` (K,), and of its ``windows`` where it has several; of one that has not
        no more than so many seconds are ``heard``."""
        whole = softmax(logits)
        if windows is None:
            segments = [ClassifiedSegment(0.0, min(seconds, heard), labels[int(whole.argmax())], whole)]
        else:
            segments = []
            each = softmax(windows.logits)
            for start, end, row, muted in zip(windows.starts, windows.ends, each, windows.muted):
                label = None if muted else labels[int(row.argmax())]
                row = np.full_like(row, np.nan) if muted else row
                segments.append(ClassifiedSegment(float(start), float(end), label, row))
        return cls(labels, seconds, segments, labels[int(whole.argmax())], whole)

    def rows(
        self, reject_below: float | None = None, reject_label: str = "unknown"
    ) -> Iterator[dict[str, Any]]:
        """Of each segment "start", "end", "label" and "probabilities" by class, JSON-ready; the last two are
        None where nothing can be heard.

        Args:
            reject_below, reject_label: as of :func:`.classifier.predict`; with a threshold there is also
                "rejected".
        """
        for each in self.segments:
            row = answer_of(each.probabilities, self.labels, reject_below, reject_label)
            if row is None:
                row = {"label": None, "probabilities": None}
                row |= {} if reject_below is None else {"rejected": False}
            yield {"start": each.start, "end": each.end, **row}

    def as_dict(self, reject_below: float | None = None, reject_label: str = "unknown") -> dict[str, Any]:
        """JSON-ready: "label" and "probabilities" of the whole, and "segments", which are :meth:`rows`."""
        whole = answer_of(self.probabilities, self.labels, reject_below, reject_label)
        return {**whole, "segments": list(self.rows(reject_below, reject_label))}


def answer_of(
    probabilities: np.ndarray, labels: Sequence[str], reject_below: float | None, reject_label: str
) -> dict[str, Any] | None:
    """ "label" and "probabilities" by class, and with a threshold "rejected"; None where these probabilities
    (K,) are not finite."""
    if not np.isfinite(probabilities).all():
        return None
    named = {label: float(p) for label, p in zip(labels, probabilities)}
    answer = {"label": labels[int(probabilities.argmax())], "probabilities": named}
    if reject_below is not None:
        answer["rejected"] = bool(float(probabilities.max()) < reject_below)
        if answer["rejected"]:
            answer["label"] = reject_label
    return answer
