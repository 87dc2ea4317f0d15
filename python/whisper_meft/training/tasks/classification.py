"""Training for the class of a clip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
)

from ... import data
from ...audio.windows import Windows, shares
from ...data.examples import Example, ExampleSet, check_known_labels, label_inventory, listing
from ...data.streaming import Stream, check_label
from ...data.windows import is_muted, longest_window, recordings_of
from ...errors import UserError, printable
from ...evaluation import plots
from ...evaluation.metrics import Scores, score
from ...evaluation.timeline import pool
from ...feature_cache.dataset import CachedDataset
from ...feature_cache.store import FeatureCache
from ...files import write_text
from ...methods import MeftConfig
from ...model.backbone import set_labels
from ...model.base import MeftBase
from ...options.common import DataFormatArguments
from ...options.skew import COMPUTED_WEIGHTS, SkewArguments, read_class_weights
from ...options.training import TrainArguments, TrainDataArguments
from ..criterion import ClassLoss, computed_weights
from ..many_classes import counts_text, predicted_classes, weights_text
from ..trainer import MeftTrainer
from .base import Task, check_method


class Classification(Task):
    """Classes, named by the labels of the training examples.

    Args:
        config: the method. sizes, extractor: the backbone's config and feature extractor.
        arguments: of the run; of them the options for skewed classes are read.

    Raises:
        UserError: the method cannot do this, or the file of class weights cannot be used.
    """

    backbone_class = WhisperForAudioClassification
    curve = ("eval_accuracy", "evaluation accuracy")
    labelled = True

    def __init__(
        self,
        config: MeftConfig,
        sizes: WhisperConfig,
        extractor: WhisperFeatureExtractor,
        arguments: TrainArguments | None = None,
    ):
        check_method(config, sizes, self.backbone_class)
        self.max_frames, self.extractor = config.max_frames, extractor
        self.label2id: dict[str, int] = {}
        self.skew = SkewArguments() if arguments is None else arguments
        self._recordings: Recordings | None = None  # of the evaluation data
        self.label_smoothing = getattr(arguments, "label_smoothing_factor", 0.0)
        kind = self.skew.class_weights
        self._given_weights = None if kind in (None, *COMPUTED_WEIGHTS) else read_class_weights(kind)

    def reader_options(self, arguments: DataFormatArguments) -> dict[str, Any]:
        if arguments.text_column_name is not None:
            raise UserError(
                f"text_column_name: {arguments.text_column_name!r} is of transcripts; classes need none: "
                "give --task transcribe, or leave it out"
            )
        return arguments.reader_options()

    def windows(self, arguments: TrainDataArguments) -> Windows | None:
        if arguments.window is None:
            return None
        longest = longest_window(self.extractor, self.max_frames)
        return Windows.within(longest, arguments.window, arguments.hop)

    @property
    def counts_classes(self) -> bool:
        return self.skew.class_weights in COMPUTED_WEIGHTS

    def check_streamed(self, example: Example) -> None:
        check_label(example, self.label2id)

    def placeholder(self) -> Example:
        return Example(b"", next(iter(self.label2id)))

    def check(self, training: ExampleSet | Stream, evaluation: ExampleSet | None) -> None:
        labels = classes_of(training)
        if evaluation is not None:
            check_known_labels(evaluation, labels)
        if self._given_weights is not None:
            for names, of, lack in (
                (labels, self._given_weights, "has no weight of"),
                (self._given_weights, labels, "has a weight of"),
            ):
                if wrong := [name for name in names if name not in of]:
                    raise UserError(
                        f"class_weights: {self.skew.class_weights} {lack} {listing(wrong)}, the classes are "
                        f"{listing(labels)}"
                    )

    def note(self, training: ExampleSet | Stream) -> None:
        labels, kind = classes_of(training), self.skew.class_weights
        self.label2id = {label: index for index, label in enumerate(labels)}
        if self._given_weights is not None:
            self.weights = [self._given_weights[label] for label in labels]
        elif kind is not None:
            counts = training.label_counts()
            self.weights = computed_weights([counts[label] for label in labels], kind)

    def prepare(self, base: PreTrainedModel) -> None:
        set_labels(base, list(self.label2id))

    def dataset(self, examples: ExampleSet, make_dataset: Callable[..., Dataset], **more: Any) -> Dataset:
        return make_dataset(examples, self.extractor, self.label2id, self.max_frames, **more)

    def collator(self) -> data.Collator:
        return data.Collator(self.extractor, self.max_frames)

    def cached_dataset(
        self, examples: ExampleSet, cache: FeatureCache, model: MeftBase, **more: Any
    ) -> Dataset:
        return CachedDataset(examples, cache, model, self.label2id, **more)

    def counted_step(self, training: ExampleSet | Stream) -> dict[str, Any]:
        return {"num_labels": len(classes_of(training))}

    def describe(self, training: ExampleSet | Stream) -> list[str]:
        labels = list(self.label2id)
        if isinstance(training, Stream):
            lines = [f"training on a stream of {training.amount()} of {len(labels)} classes"]
        else:
            recordings = len(recordings_of(training))
            cut = "" if recordings == len(training) else f", windows of {recordings} recordings"
            lines = [f"training on {len(training)} examples of {len(labels)} classes{cut}"]
            lines += self._padding_of(training)
        if not isinstance(training, Stream) or training.counts is not None:
            lines.append(f"  {counts_text(training.label_counts(), labels)}")
        if self.weights is not None:
            kind = printable(self.skew.class_weights)
            lines.append(f"  weights in the loss ({kind}): {weights_text(self.weights, labels)}")
        if self.skew.sampling == "balanced":
            each = len(training) / len(labels)
            lines.append(f"  an epoch draws {each:.4g} examples of each class")
        return lines

    def _padding_of(self, training: ExampleSet) -> list[str]:
        """A line where most of what is computed would be padding, or none."""
        seconds = [example.seconds for example in training]
        window = self.extractor.n_samples / self.extractor.sampling_rate
        if self.max_frames != "fidelity" or None in seconds or 2 * sum(seconds) > len(seconds) * window:
            return []
        return [
            f"  they are {sum(seconds) / len(seconds):.3g} s long on average and padded to {window:g} s; as "
            "in the published code the padding is computed and pooled too: --max_frames longest leaves it out"
        ]

    def classes_to_balance(self, training: ExampleSet) -> list[int] | None:
        if self.skew.sampling == "natural":
            return None
        return [self.label2id[example.label] for example in training]

    @property
    def criterion(self) -> ClassLoss | None:
        """The loss in the place of the model's own cross-entropy, where another is asked for."""
        gamma = self.skew.gamma()
        if self.weights is None and not gamma:
            return None
        return ClassLoss(self.weights, gamma, self.label_smoothing)

    def trainer_options(self, evaluation: ExampleSet | None) -> dict[str, Any]:
        recordings = None if evaluation is None else Recordings.of(evaluation, self.extractor.sampling_rate)
        self._recordings = recordings
        return {
            "compute_loss_func": self.criterion,
            "compute_metrics": make_compute_metrics(list(self.label2id), recordings),
            "preprocess_logits_for_metrics": predicted_classes if recordings is None else only_logits,
            "evaluation_in_order": recordings is not None,
            "processing_class": self.extractor,
        }

    def score(
        self, trainer: MeftTrainer, evaluation: ExampleSet, load_base: Callable[[], PreTrainedModel]
    ) -> tuple[Scores, float | None]:
        found = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        scores = scores_of(found.predictions, found.label_ids, list(self.label2id), self._recordings)
        return scores, found.metrics.get("eval_loss")

    def summary(self, training: ExampleSet | Stream) -> dict[str, Any]:
        weights = None if self.weights is None else dict(zip(self.label2id, self.weights))
        gamma = self.skew.gamma() if self.skew.loss == "focal" else None  # which may be 0
        loss = {"loss": self.skew.loss, "focal_gamma": gamma, "class_weights": weights}
        return {"labels": list(self.label2id), **loss}

    def write_scores(self, folder: Path, scores: Scores) -> dict[str, Any]:
        write_text(folder / "evaluation.txt", scores.as_text(whole=True) + "\n")
        title = f"accuracy {scores.accuracy:.1%}"
        plots.plot_confusion(scores.confusion, scores.labels, folder / "confusion_matrix.png", title)
        return scores.as_dict()


def classes_of(training: ExampleSet | Stream) -> list[str]:
    """The classes that are trained, in the order of their indices.

    Raises:
        UserError: unlabelled examples, or fewer than two classes.
    """
    if not isinstance(training, Stream):
        return label_inventory(training)
    if len(training.labels) < 2:
        raise UserError(
            f"{training.description} has one label only ({training.labels[0]}); training needs at least two "
            "classes"
        )
    return training.labels


@dataclass(frozen=True)
class Recordings:
    """Which examples are windows of one recording.

    Attributes:
        groups: the indices of each recording's windows. seconds: float64 of each, how many it answers for:
            none where there is nothing to hear, unless that is so of all of them.
    """

    groups: list[list[int]]
    seconds: list[np.ndarray]

    @classmethod
    def of(cls, examples: ExampleSet, sampling_rate: int) -> "Recordings | None":
        """Of examples as they are evaluated; None where none of them is one of several windows, of which
        each is read."""
        groups = recordings_of(examples)
        if len(groups) == len(examples):
            return None
        seconds = []
        for group in groups:
            starts = np.array([(examples[i].window or (0.0,))[0] for i in group])
            lengths = np.array([examples[i].seconds if len(group) > 1 else 1.0 for i in group])
            muted = np.zeros(len(group), bool)
            if len(group) > 1:
                muted = np.array([is_muted(examples[i].read(sampling_rate)[0]) for i in group])
            seconds.append(np.where(muted & ~muted.all(), 0.0, shares(starts, starts + lengths)))
        return cls(groups, seconds)

    def classes(self, logits: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (recordings,): the most probable class of each, -1 where an output is not finite, and the
        right one; of logits (N, K) and class indices (N,) of the windows in their order."""
        found = []
        for group, seconds in zip(self.groups, self.seconds):
            finite = np.isfinite(logits[group]).all()
            found.append(pool(logits[group], seconds).argmax() if finite else -1)
        return np.array(found), reference[[group[0] for group in self.groups]]


def only_logits(logits: Any, labels: Any = None) -> torch.Tensor:
    """For the Trainer's ``preprocess_logits_for_metrics``: float32 (B, K)."""
    return (logits[0] if isinstance(logits, tuple | list) else logits).float()


def make_compute_metrics(labels: Sequence[str], recordings: Recordings | None = None):
    """The Trainer's compute_metrics for classes named ``labels``: accuracy, mean_class_accuracy, macro_f1."""

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        scores = scores_of(prediction.predictions, prediction.label_ids, labels, recordings)
        return {
            "accuracy": scores.accuracy,
            "mean_class_accuracy": scores.mean_class_accuracy,
            "macro_f1": scores.macro_f1,
        }

    return compute_metrics


def scores_of(
    predicted: np.ndarray,
    reference: np.ndarray,
    labels: Sequence[str],
    recordings: Recordings | None = None,
) -> Scores:
    """Scores what :func:`.many_classes.predicted_classes` gave, or with ``recordings`` the logits (N, K) of
    their windows, against class indices (N,).

    Raises:
        UserError: an output was NaN or infinite.
    """
    if recordings is not None:
        predicted, reference = recordings.classes(predicted, reference)
    if (predicted < 0).any():
        raise UserError("the model's outputs hold NaN or infinite values, so it cannot be scored")
    return score(reference, predicted, labels)
