"""Whether probabilities are right: how far they are off, a temperature that mends it, and a threshold."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..data.examples import ExampleSet
from ..errors import UserError
from .classifier import Classifier
from .detection import row_slices
from .scoring import logits_and_classes
from .timeline import WindowLogits

BINS = 15


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def confidences_of(logits: np.ndarray) -> np.ndarray:
    """The probability of the most probable class, float64 (N,), of logits (N, K)."""
    parts = [np.exp(log_softmax(logits[rows]).max(1)) for rows in row_slices(*logits.shape)]
    return np.concatenate([np.zeros(0), *parts])


def log_loss(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """-log of the probability of the right class, float64 (N,)."""
    return -log_softmax(logits)[np.arange(len(reference)), reference]


@dataclass(frozen=True)
class Reliability:
    """Confidences in bins beside how often they are right.

    Attributes:
        edges: (M + 1,) of the bins, of equal width from 0 to 1; a bin holds its upper end.
        counts: int64 (M,). confidence, accuracy: (M,) their means, NaN in an empty bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error, ECE (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599,
        equation 5): sum_m n_m / n |accuracy_m - confidence_m|."""
        filled = self.counts > 0
        gaps = np.abs(self.accuracy - self.confidence)[filled]
        return float((self.counts[filled] * gaps).sum() / self.counts.sum())


def bin_of(confidences: np.ndarray, bins: int = BINS) -> np.ndarray:
    """int64 (N,): the bin ((m - 1) / M, m / M] of each confidence, from 0."""
    return np.clip(np.ceil(np.asarray(confidences) * bins).astype(np.int64) - 1, 0, bins - 1)


def reliability(
    confidences: np.ndarray, right: np.ndarray, bins: int = BINS, weights: np.ndarray | None = None
) -> Reliability:
    """How confident and how right a model is.

    Args:
        confidences: (N,) the probability of the class that is said. right: bool (N,) whether it is the
            reference. bins: their number, M. weights: (N,) how often each counts; None: once.
    """
    place = bin_of(confidences, bins)
    often = np.ones(len(place)) if weights is None else np.asarray(weights, float)
    counts = np.bincount(place, often, bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, often * confidences, bins) / counts
        accuracy = np.bincount(place, often * right, bins) / counts
    return Reliability(np.linspace(0, 1, bins + 1), counts, confidence, accuracy)


def fit_temperature(logits: np.ndarray, reference: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The temperature T at which softmax(logits / T) has the least log loss (Guo et al. 2017, section 4.2).

    The loss is convex in 1 / T; its derivative is brought to 0 by bisection, to the last bit or so.

    Args:
        logits: (N, K), finite. reference: (N,) class indices. weights: (N,) how much each counts; None:
            all alike.

    Raises:
        UserError: there is no such T: all clips are recognised, so that a smaller one always fits better, or
            the model does no better than a constant.
    """
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(1, keepdims=True)
    own = logits[np.arange(len(reference)), reference]

    def slope(sharpness: float) -> float:
        p = np.exp(log_softmax(logits * sharpness))
        return float(np.average((p * logits).sum(1) - own, weights=weights))

    if not len(reference):
        raise UserError("there are no examples to calibrate on")
    if (own == 0).all():
        raise UserError(
            f"no temperature can be found: all {len(own)} examples are recognised, so the sharper the "
            "better; give more of them, or harder ones"
        )
    if slope(0.0) >= 0:
        raise UserError(
            f"no temperature can be found: on these {len(own)} examples the model does no better than the "
            "same probability for every class; are they labelled as its training data was?"
        )
    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return 1 / middle
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)


def threshold_that_keeps(confidences: Sequence[float] | np.ndarray, share: float) -> float:
    """The highest threshold, rounded down to 6 decimals, at or above which at least ``share`` of the
    confidences lie.

    Args:
        confidences: (N,) of clips of known classes. share: from 0 to 1.
    """
    ordered = np.sort(np.asarray(confidences, np.float64))
    spare = int(np.floor((1 - share) * len(ordered) + 1e-9))
    lowest = ordered[min(spare, len(ordered) - 1)]
    # What is computed again in another batch may differ in the last bits.
    return float(np.floor(lowest * 1e6) / 1e6)


@dataclass(frozen=True)
class Calibration:
    """What was found on validation data.

    Attributes:
        temperature: T. reject_below: the threshold. keep: the share of the clips that it is to keep.
        kept: the share that it keeps here. count: clips.
        log_loss, error: mean log loss and ECE, before and after.
    """

    temperature: float
    reject_below: float
    keep: float
    kept: float
    count: int
    log_loss: tuple[float, float]
    error: tuple[float, float]

    def as_text(self) -> str:
        """A few lines for people."""
        return (
            f"temperature {self.temperature:.4g}, from {self.count} examples\n"
            f"log loss  {self.log_loss[0]:.4f} before, {self.log_loss[1]:.4f} after\n"
            f"ECE       {self.error[0]:7.2%} before, {self.error[1]:7.2%} after\n"
            f"reject_below {self.reject_below:.6g} keeps {self.kept:.2%} of them"
        )


def calibrate(classifier: Classifier, examples: ExampleSet, keep: float = 0.95) -> Calibration:
    """Finds a temperature and a threshold for a model, and gives them to its config.

    Args:
        classifier: the model; its config's ``calibration_temperature`` and ``rejection_threshold`` are set,
            whatever they were. On an error both stay.
        examples: labelled, not those that it was trained on; a temperature is that of windows, a threshold
            that of whole recordings. keep: share of them that is not to be rejected.

    Raises:
        UserError: there is no temperature, a label is not known, or an example cannot be read.
    """
    config = classifier.model.config
    parts: dict[int, WindowLogits] = {}
    before, config.calibration_temperature = config.calibration_temperature, None
    try:
        logits, reference = logits_and_classes(classifier, examples, parts.__setitem__)
    finally:  # until all is found the model stays as it was: a threshold is that of its temperature
        config.calibration_temperature = before
    temperature = fit_temperature(*_windows_and_clips(logits, reference, parts))
    losses, errors = [], []
    for divisor in (1.0, temperature):
        scaled = logits / divisor
        for index, part in parts.items():
            scaled[index] = replace(part, logits=part.logits / divisor).pooled()
        confidences = confidences_of(scaled)
        losses.append(float(log_loss(scaled, reference).mean()))
        errors.append(reliability(confidences, scaled.argmax(1) == reference).error)
    threshold = threshold_that_keeps(confidences, keep)
    config.calibration_temperature, config.rejection_threshold = temperature, threshold
    kept = float((confidences >= threshold).mean())
    return Calibration(temperature, threshold, keep, kept, len(reference), tuple(losses), tuple(errors))


def _windows_and_clips(
    logits: np.ndarray, reference: np.ndarray, parts: dict[int, WindowLogits]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What softmax is taken of: logits, classes, and how much each counts; a recording counts as one clip,
    shared among its ``parts`` in which there is something to hear."""
    if not parts:
        return logits, reference, None
    rows, classes, weights = [], [], []
    for index, (row, label) in enumerate(zip(logits, reference)):
        each = np.ones(1) if index not in parts else parts[index].weights
        rows.append(row[None] if index not in parts else parts[index].logits)
        classes.append(np.full(len(each), label))
        weights.append(each / each.sum())
    heard = np.concatenate(weights) > 0
    return tuple(np.concatenate(each)[heard] for each in (rows, classes, weights))
