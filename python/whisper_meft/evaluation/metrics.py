"""Classification scores in plain numpy: the paper's three, macro-F1 and the confusion matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError, printable


def confusion_matrix(reference: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts how often each class was taken for each other one.

    Args:
        reference, predicted: class indices 0..num_classes-1, integer arrays of shape (N,).
        num_classes: K.

    Returns:
        int64 (K, K); row = reference class, column = predicted class.

    Raises:
        UserError: the arrays differ in shape, are not 1-D integers, or hold an index outside 0..K-1.
    """
    reference, predicted = np.asarray(reference), np.asarray(predicted)
    for name, values in (("reference", reference), ("predicted", predicted)):
        if values.ndim != 1 or (values.size and not np.issubdtype(values.dtype, np.integer)):
            raise UserError(
                f"{name} must be a 1-D array of class indices, got {values.dtype} of shape {values.shape}"
            )
        if values.size and (values.min() < 0 or values.max() >= num_classes):
            raise UserError(
                f"{name} holds class index {values.min() if values.min() < 0 else values.max()}, "
                f"accepted are 0 to {num_classes - 1}"
            )
    if reference.shape != predicted.shape:
        raise UserError(f"reference has {len(reference)} labels but predicted has {len(predicted)}")
    pairs = reference.astype(np.int64) * num_classes + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """Everything that is reported about one set of predictions.

    Attributes:
        labels: class names, in index order.
        confusion: int64 (K, K), row = reference, column = predicted.
        count: number of examples scored.
        accuracy: share of examples that are right.
        per_class_accuracy: share of each class's examples that are right (its recall); NaN for a class
            that has no example.
        mean_class_accuracy: unweighted mean of per_class_accuracy over the classes that have examples.
        macro_f1: unweighted mean F1 over the classes that occur in the reference or the predictions.
    """

    labels: tuple[str, ...]
    confusion: np.ndarray
    count: int
    accuracy: float
    per_class_accuracy: np.ndarray
    mean_class_accuracy: float
    macro_f1: float

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON-ready values; a class without examples has accuracy None."""
        return {
            "count": self.count,
            "accuracy": self.accuracy,
            "mean_class_accuracy": self.mean_class_accuracy,
            "macro_f1": self.macro_f1,
            "per_class_accuracy": {
                label: None if np.isnan(value) else float(value)
                for label, value in zip(self.labels, self.per_class_accuracy)
            },
            "labels": list(self.labels),
            "confusion_matrix": self.confusion.tolist(),
        }

    def as_text(self) -> str:
        """The scores as a few lines of text for a terminal, confusion matrix included."""
        labels = [printable(label) for label in self.labels]
        width = max(map(len, labels))
        lines = [
            f"accuracy             {self.accuracy:7.2%}   ({self.count} examples)",
            f"mean class accuracy  {self.mean_class_accuracy:7.2%}",
            f"macro-F1             {self.macro_f1:7.4f}",
            "accuracy per class",
        ]
        for label, value, support in zip(labels, self.per_class_accuracy, self.confusion.sum(axis=1)):
            shown = "no examples" if np.isnan(value) else f"{value:7.2%}   ({support} examples)"
            lines.append(f"  {label:<{width}}  {shown}")
        return "\n".join([*lines, "confusion matrix", confusion_text(self.confusion, labels)])


def score(reference: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> Scores:
    """Scores predictions against reference labels.

    Args:
        reference, predicted: class indices, integer arrays of shape (N,), N >= 1.
        labels: class names; index i means labels[i].

    Raises:
        UserError: there is nothing to score, or the arrays are not as described.
    """
    confusion = confusion_matrix(reference, predicted, len(labels))
    count = int(confusion.sum())
    if count == 0:
        raise UserError("there are no examples to score")
    right = np.diag(confusion).astype(np.float64)
    support = confusion.sum(axis=1)  # [K] how often each class is the reference
    chosen = confusion.sum(axis=0)  # [K] how often each class is predicted
    per_class = np.divide(right, support, out=np.full(len(labels), np.nan), where=support > 0)
    occurs = (support + chosen) > 0
    f1 = 2 * right[occurs] / (support + chosen)[occurs]
    return Scores(
        labels=tuple(labels),
        confusion=confusion,
        count=count,
        accuracy=float(right.sum() / count),
        per_class_accuracy=per_class,
        mean_class_accuracy=float(np.nanmean(per_class)),
        macro_f1=float(f1.mean()),
    )


def confusion_text(confusion: np.ndarray, labels: Sequence[str]) -> str:
    """A confusion matrix as aligned text: one row per reference class, one column per predicted class.

    Columns are numbered as the rows are, so that long class names do not widen the table.
    """
    numbers = [str(index + 1) for index in range(len(labels))]
    width = max(len(label) for label in labels)
    number_width = len(numbers[-1])
    cell = max(len(str(int(confusion.max()))), number_width) + 2
    indent = number_width + 2 + width
    lines = [" " * indent + "".join(f"{number:>{cell}}" for number in numbers) + "   <- predicted"]
    for number, label, row in zip(numbers, labels, confusion):
        cells = "".join(f"{int(value):>{cell}}" for value in row)
        lines.append(f"{number:>{number_width}}  {label:<{width}}{cells}")
    return "\n".join(lines)
