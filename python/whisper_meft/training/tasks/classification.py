"""Training for the class of a clip."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
)

from ... import data
from ...data.examples import ExampleSet, check_known_labels, label_inventory
from ...errors import UserError
from ...evaluation import plots
from ...evaluation.metrics import Scores, score
from ...feature_cache.dataset import CachedDataset
from ...feature_cache.store import FeatureCache
from ...files import write_text
from ...methods import MeftConfig
from ...model.backbone import set_labels
from ...model.base import MeftBase
from ...options.common import DataFormatArguments
from ..many_classes import counts_text, predicted_classes
from ..trainer import MeftTrainer
from .base import Task


class Classification(Task):
    """Classes, named by the labels of the training examples.

    Args:
        config: the method. extractor: the backbone's feature extractor.
    """

    backbone_class = WhisperForAudioClassification
    curve = ("eval_accuracy", "evaluation accuracy")

    def __init__(self, config: MeftConfig, extractor: WhisperFeatureExtractor):
        self.max_frames, self.extractor = config.max_frames, extractor
        self.label2id: dict[str, int] = {}

    def reader_options(self, arguments: DataFormatArguments) -> dict[str, Any]:
        if arguments.text_column_name is not None:
            raise UserError(
                f"text_column_name: {arguments.text_column_name!r} is of transcripts; classes need none: "
                "give --task transcribe, or leave it out"
            )
        return arguments.reader_options()

    def check(self, training: ExampleSet, evaluation: ExampleSet | None) -> None:
        if evaluation is not None:
            check_known_labels(evaluation, label_inventory(training))

    def note(self, training: ExampleSet) -> None:
        self.label2id = {label: index for index, label in enumerate(label_inventory(training))}

    def prepare(self, base: PreTrainedModel) -> None:
        set_labels(base, list(self.label2id))

    def dataset(self, examples: ExampleSet, make_dataset: Callable[..., Dataset]) -> Dataset:
        return make_dataset(examples, self.extractor, self.label2id, self.max_frames)

    def collator(self) -> data.Collator:
        return data.Collator(self.extractor, self.max_frames)

    def cached_dataset(self, examples: ExampleSet, cache: FeatureCache, model: MeftBase) -> Dataset:
        return CachedDataset(examples, cache, model, self.label2id)

    def counted_step(self, training: ExampleSet) -> dict[str, Any]:
        return {"num_labels": len(label_inventory(training))}

    def describe(self, training: ExampleSet) -> list[str]:
        labels, counts = list(self.label2id), training.label_counts()
        return [
            f"training on {len(training)} examples of {len(labels)} classes",
            f"  {counts_text(counts, labels)}",
        ]

    def trainer_options(self, evaluation: ExampleSet | None) -> dict[str, Any]:
        return {
            "compute_metrics": make_compute_metrics(list(self.label2id)),
            "preprocess_logits_for_metrics": predicted_classes,
            "processing_class": self.extractor,
        }

    def score(
        self, trainer: MeftTrainer, evaluation: ExampleSet, load_base: Callable[[], PreTrainedModel]
    ) -> tuple[Scores, float | None]:
        found = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        scores = scores_of(found.predictions, found.label_ids, list(self.label2id))
        return scores, found.metrics.get("eval_loss")

    def summary(self, training: ExampleSet) -> dict[str, Any]:
        return {"labels": list(self.label2id)}

    def write_scores(self, folder: Path, scores: Scores) -> dict[str, Any]:
        write_text(folder / "evaluation.txt", scores.as_text(whole=True) + "\n")
        title = f"accuracy {scores.accuracy:.1%}"
        plots.plot_confusion(scores.confusion, scores.labels, folder / "confusion_matrix.png", title)
        return scores.as_dict()


def make_compute_metrics(labels: Sequence[str]):
    """The Trainer's compute_metrics for classes named ``labels``: accuracy, mean_class_accuracy, macro_f1."""

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        scores = scores_of(prediction.predictions, prediction.label_ids, labels)
        return {
            "accuracy": scores.accuracy,
            "mean_class_accuracy": scores.mean_class_accuracy,
            "macro_f1": scores.macro_f1,
        }

    return compute_metrics


def scores_of(predicted: np.ndarray, reference: np.ndarray, labels: Sequence[str]) -> Scores:
    """Scores what :func:`.many_classes.predicted_classes` gave against class indices (N,).

    Raises:
        UserError: an output was NaN or infinite.
    """
    if (predicted < 0).any():
        raise UserError("the model's outputs hold NaN or infinite values, so it cannot be scored")
    return score(reference, predicted, labels)
