"""Classification scores in plain numpy: the paper's three, macro-F1 and the confusion matrix.

There may be many classes: nothing here is of size K x K unless it is asked for by name.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError, printable

# A text or a file with all pairs of classes is read by nobody where there are more.
MOST_IN_TEXT, MOST_IN_JSON = 30, 300

# Where not all classes are told, so many of the worst are.
MOST_CLASSES, WORST = 100, 20


class Confusion:
    """How often each class was taken for each other one, without the pairs that do not occur.

    Attributes:
        size: number of classes, K. cells: int64 (pairs, 3), reference class, predicted class and how often,
            in this order.
    """

    def __init__(self, size: int, cells: np.ndarray):
        self.size, self.cells = size, cells

    @classmethod
    def of(cls, matrix: "np.ndarray | Confusion") -> "Confusion":
        """Of a matrix (K, K), row = reference, column = predicted."""
        if isinstance(matrix, Confusion):
            return matrix
        matrix = np.asarray(matrix)
        places = np.argwhere(matrix)
        return cls(len(matrix), np.column_stack([places, matrix[tuple(places.T)]]).astype(np.int64))

    @property
    def right(self) -> np.ndarray:
        """int64 (K,): how often each class was recognised."""
        hits = self.cells[self.cells[:, 0] == self.cells[:, 1]]
        found = np.zeros(self.size, np.int64)
        found[hits[:, 0]] = hits[:, 2]
        return found

    def sum(self, axis: int) -> np.ndarray:
        """int64 (K,): how often each class is the reference (axis 1) or predicted (axis 0)."""
        found = np.zeros(self.size, np.int64)
        np.add.at(found, self.cells[:, 1 - axis], self.cells[:, 2])
        return found

    def worst(self, number: int) -> np.ndarray:
        """The rows of ``cells`` with the most mistakes, at most so many."""
        wrong = self.cells[self.cells[:, 0] != self.cells[:, 1]]
        return wrong[np.argsort(-wrong[:, 2], kind="stable")[:number]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        matrix = np.zeros((self.size, self.size), np.int64)
        matrix[self.cells[:, 0], self.cells[:, 1]] = self.cells[:, 2]
        return matrix if dtype is None else matrix.astype(dtype)

    def tolist(self) -> list[list[int]]:
        """The matrix as lists."""
        return np.asarray(self).tolist()


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
    return np.asarray(_confusion(reference, predicted, num_classes))


def _confusion(reference: np.ndarray, predicted: np.ndarray, num_classes: int) -> Confusion:
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
    pairs, counts = np.unique(pairs, return_counts=True)
    return Confusion(num_classes, np.column_stack([*np.divmod(pairs, num_classes), counts]))


@dataclass(frozen=True)
class Scores:
    """Everything that is reported about one set of predictions.

    Attributes:
        labels: class names, in index order.
        confusion: how often each class was taken for each other one; ``np.asarray`` of it is int64 (K, K),
            row = reference, column = predicted.
        count: number of examples scored.
        accuracy: share of examples that are right.
        per_class_accuracy: share of each class's examples that are right (its recall); NaN for a class
            that has no example.
        mean_class_accuracy: unweighted mean of per_class_accuracy over the classes that have examples.
        macro_f1: unweighted mean F1 over the classes that occur in the reference or the predictions.
    """

    labels: tuple[str, ...]
    confusion: Confusion
    count: int
    accuracy: float
    per_class_accuracy: np.ndarray
    mean_class_accuracy: float
    macro_f1: float

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON-ready values; a class without examples has accuracy None.

        ``confusion_matrix`` is a list of rows; of more than 300 classes there are instead ``confusions``, by
        reference and predicted class how often, without those that do not occur.
        """
        accuracies = zip(self.labels, self.per_class_accuracy.tolist())
        scores = {
            "count": self.count,
            "accuracy": self.accuracy,
            "mean_class_accuracy": self.mean_class_accuracy,
            "macro_f1": self.macro_f1,
            "per_class_accuracy": {label: None if np.isnan(value) else value for label, value in accuracies},
            "labels": list(self.labels),
        }
        if len(self.labels) <= MOST_IN_JSON:
            return scores | {"confusion_matrix": self.confusion.tolist()}
        confusions: dict[str, dict[str, int]] = defaultdict(dict)
        for reference, predicted, count in self.confusion.cells.tolist():
            confusions[self.labels[reference]][self.labels[predicted]] = count
        return scores | {"confusions": dict(confusions)}

    def as_text(self, whole: bool = False) -> str:
        """The scores as lines of text: the confusion matrix, or of more than 30 classes the worst pairs.

        Args:
            whole: tell every class's accuracy also where there are more than 100; else the worst.
        """
        lines = [
            f"accuracy             {self.accuracy:7.2%}   ({self.count} examples)",
            f"mean class accuracy  {self.mean_class_accuracy:7.2%}",
            f"macro-F1             {self.macro_f1:7.4f}",
        ]
        labels = [printable(label) for label in self.labels]
        classes = np.arange(len(labels))
        if whole or len(classes) <= MOST_CLASSES:
            lines.append("accuracy per class")
        else:
            worst = np.argsort(self.per_class_accuracy, kind="stable")[:WORST]  # NaN comes last
            classes = worst[~np.isnan(self.per_class_accuracy[worst])]
            lines.append(f"accuracy of the worst {len(classes)} of {len(labels)} classes")
        width = max(len(labels[index]) for index in classes)
        support = self.confusion.sum(axis=1)
        for index in classes:
            value = self.per_class_accuracy[index]
            shown = "no examples" if np.isnan(value) else f"{value:7.2%}   ({support[index]} examples)"
            lines.append(f"  {labels[index]:<{width}}  {shown}")
        if len(labels) <= MOST_IN_TEXT:
            return "\n".join([*lines, "confusion matrix", confusion_text(self.confusion, labels)])
        return "\n".join([*lines, *confused_pairs(self.confusion, labels)])


def score(reference: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> Scores:
    """Scores predictions against reference labels.

    Args:
        reference, predicted: class indices, integer arrays of shape (N,), N >= 1.
        labels: class names; index i means labels[i].

    Raises:
        UserError: there is nothing to score, or the arrays are not as described.
    """
    confusion = _confusion(reference, predicted, len(labels))
    count = int(confusion.cells[:, 2].sum())
    if count == 0:
        raise UserError("there are no examples to score")
    right = confusion.right.astype(np.float64)
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


def confused_pairs(confusion: Confusion, labels: Sequence[str]) -> list[str]:
    """The worst pairs of classes, as lines of text."""
    pairs = confusion.worst(WORST)
    if not len(pairs):
        return ["no class was taken for another"]
    support = confusion.sum(axis=1)
    width = max(len(labels[reference]) for reference, *_ in pairs)
    return ["most frequent mistakes"] + [
        f"  {labels[reference]:<{width}}  {count:>6} of {support[reference]} taken for {labels[predicted]}"
        for reference, predicted, count in pairs
    ]


def confusion_text(confusion: "np.ndarray | Confusion", labels: Sequence[str]) -> str:
    """A confusion matrix as aligned text: one row per reference class, one column per predicted class.

    Columns are numbered as the rows are, so that long class names do not widen the table.
    """
    confusion = np.asarray(confusion)
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
