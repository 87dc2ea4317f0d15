"""Rejecting clips of classes that a model does not know."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import printable


@dataclass(frozen=True)
class OpenSet:
    """What a threshold on the probability of the class that is said does.

    Attributes:
        threshold: clips below it are rejected. origin: how it was chosen.
        known, unknown: numbers of clips of classes that the model knows and does not know.
        kept: share of the known clips that is not rejected. kept_accuracy: share of those that is right;
            None where nothing is kept. false_acceptance: share of the unknown clips that is not rejected;
            None without any.
        per_class: the same of each unknown class.
        area: the probability that a known clip has a higher probability than an unknown one, the area under
            the ROC curve; None without unknown clips.
        average_cost: C_avg with clips outside the set; None without any, or without two known classes.
    """

    threshold: float
    origin: str
    known: int
    unknown: int
    kept: float
    kept_accuracy: float | None
    false_acceptance: float | None
    per_class: dict[str, float]
    area: float | None
    average_cost: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def as_text(self) -> list[str]:
        """Lines for people."""
        right = "" if self.kept_accuracy is None else f", {self.kept_accuracy:.2%} of those are right"
        lines = [
            f"rejecting below {self.threshold:.6g} ({self.origin})",
            f"  known classes    {self.kept:7.2%} of {self.known} clips are kept{right}",
        ]
        if self.false_acceptance is not None:
            lines.append(f"  unknown classes  {self.false_acceptance:7.2%} of {self.unknown} clips are kept")
            if len(self.per_class) > 1:
                width = max(len(printable(name)) for name in self.per_class)
                lines += [f"    {printable(n):<{width}}  {share:7.2%}" for n, share in self.per_class.items()]
            lines.append(f"  area under the ROC curve {self.area:.4f}")
            if self.average_cost is not None:
                lines.append(f"  C_avg with unknown classes {self.average_cost:.4f}")
        return lines


def area_under_roc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The probability that a positive scores higher than a negative, ties counting half."""
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, "left") + np.searchsorted(ordered, positives, "right")
    return float(below.sum() / (2 * len(positives) * len(negatives)))


def score_rejection(
    threshold: float,
    origin: str,
    confidences: np.ndarray,
    right: np.ndarray,
    unknown_confidences: np.ndarray | None = None,
    unknown_labels: Sequence[str] = (),
    average_cost: float | None = None,
) -> OpenSet:
    """Scores a threshold.

    Args:
        threshold, origin: see :class:`OpenSet`, as the last.
        confidences: (N,) of clips of known classes. right: bool (N,) whether their class is recognised.
        unknown_confidences: (U,) of clips of others. unknown_labels: (U,) the classes of those.
    """
    keeps = confidences >= threshold
    outside = np.zeros(0) if unknown_confidences is None else unknown_confidences
    accepted, labels = outside >= threshold, np.array(unknown_labels, object)
    names = sorted(set(unknown_labels))
    return OpenSet(
        threshold=float(threshold),
        origin=origin,
        known=len(confidences),
        unknown=len(outside),
        kept=float(keeps.mean()),
        kept_accuracy=float(right[keeps].mean()) if keeps.any() else None,
        false_acceptance=float(accepted.mean()) if len(outside) else None,
        per_class={name: float(accepted[labels == name].mean()) for name in names},
        area=area_under_roc(confidences, outside) if len(outside) else None,
        average_cost=average_cost,
    )
