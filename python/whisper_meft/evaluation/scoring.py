"""Scoring a model on labelled examples, and writing the scores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..data.examples import ExampleSet, check_known_labels
from ..errors import UserError
from ..files import write_json, write_text
from . import plots
from .classifier import Classifier
from .metrics import Scores, score
from .timeline import WindowLogits

Done = Callable[[int, WindowLogits], None]


def finite_logits(classifier: Classifier, examples: ExampleSet, done: Done | None = None) -> np.ndarray:
    """What the softmax is taken of, float32 (N, K) in the order of ``examples``; ``done`` as of
    :meth:`.Classifier.answers`.

    Raises:
        UserError: an example cannot be read, or the model's output for it is NaN or infinite.
    """
    logits = classifier.answers(examples, done=done)
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise UserError(f"the model's output for {examples[int(finite.argmin())].name} is NaN or infinite")
    return logits


def logits_and_classes(
    classifier: Classifier, examples: ExampleSet, done: Done | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`finite_logits`, and the class indices (N,) that are right.

    Raises:
        UserError: as there, or an example has a label that the model does not know.
    """
    check_known_labels(examples, classifier.labels)
    index = {label: number for number, label in enumerate(classifier.labels)}
    reference = np.array([index[example.label] for example in examples])
    return finite_logits(classifier, examples, done), reference


def evaluate(classifier: Classifier, examples: ExampleSet) -> tuple[Scores, np.ndarray]:
    """Scores a model on labelled examples.

    Returns:
        the scores, and the class probabilities float32 (N, K) in the order of ``examples``.

    Raises:
        UserError: an example has a label that the model does not know, or cannot be read.
    """
    logits, reference = logits_and_classes(classifier, examples)
    probabilities = torch.from_numpy(logits).softmax(dim=-1).numpy()
    return score(reference, logits.argmax(axis=1), classifier.labels), probabilities


def write_scores(scores: Scores, folder: Path, description: str, **more: object) -> None:
    """Writes eval_results.json, evaluation.txt and confusion_matrix.png, atomically.

    Args:
        scores: what to write.
        folder: where; made as needed.
        description: what was scored.
        more: further entries of the JSON file.
    """
    write_json(folder / "eval_results.json", {"data": description, **more, **scores.as_dict()})
    write_text(folder / "evaluation.txt", scores.as_text(whole=True) + "\n")
    plots.plot_confusion(
        scores.confusion,
        scores.labels,
        folder / "confusion_matrix.png",
        f"accuracy {scores.accuracy:.1%}, {scores.count} examples",
    )
