"""What a run ends with: its scores, its numbers, and the files that hold them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction, WhisperFeatureExtractor
from transformers.trainer_utils import TrainOutput

from .. import data
from ..errors import UserError, printable
from ..evaluation import plots
from ..evaluation.metrics import Scores, score
from ..files import write_json, write_text
from ..model.module import MeftModel
from .console import say
from .data import RunData
from .settings import Settings
from .trainer import MeftTrainer


@dataclass
class TrainResult:
    """What a finished run leaves in memory; the same is on disk in ``output_dir``.

    Attributes:
        model: the trained model, in evaluation mode.
        feature_extractor: the one it was trained with.
        scores: on the evaluation data, or None if there was none.
        training: numbers of the training run, as in train_results.json.
        history: the Trainer's log.
    """

    model: MeftModel
    feature_extractor: WhisperFeatureExtractor
    scores: Scores | None
    training: dict[str, Any]
    history: list[dict[str, Any]]


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


def score_evaluation(trainer: MeftTrainer, labels: Sequence[str]) -> tuple[Scores | None, float | None]:
    """The scores of the trainer's model on its evaluation data and the loss there; None without such data."""
    if trainer.eval_dataset is None:
        return None, None
    predicted = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    return scores_of(predicted.predictions, predicted.label_ids, labels), predicted.metrics.get("eval_loss")


def summarise(
    settings: Settings,
    examples: RunData,
    trainer: MeftTrainer,
    outcome: TrainOutput,
    rates: dict[str, Any],
    gradients: dict[str, Any],
) -> dict[str, Any]:
    """What train_results.json holds.

    Args:
        settings, examples, trainer: of the run. outcome: what ``trainer.train`` returned.
        rates: throughput. gradients: what became of the trained parameters.
    """
    trainable, total = trainer.model.get_nb_trainable_parameters()
    state = trainer.state
    return {
        "method": settings.config.to_dict(),
        "model_name_or_path": settings.model.model_name_or_path,
        "labels": examples.labels,
        "train_examples": len(examples.training),
        "train_data": examples.training.description,
        "epochs": state.epoch,
        "steps": state.global_step,
        "planned_steps": trainer.total_steps(),
        "batches": asdict(trainer.batches),
        "early_stopping_patience": settings.training.early_stopping_patience,
        "resumed_from_step": trainer.first_step,  # time and speed are those of the steps since then
        "learning_rate": settings.training.learning_rate,
        "head_learning_rate": settings.training.head_learning_rate,
        "train_loss": outcome.training_loss if (loss := trainer.mean_loss()) is None else loss,
        "train_runtime_seconds": outcome.metrics.get("train_runtime"),
        "train_samples_per_second": outcome.metrics.get("train_samples_per_second"),
        "throughput": rates,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "gradients": gradients,
        "best_checkpoint": state.best_model_checkpoint,
        "best_metric": state.best_metric,
        "feature_cache": settings.training.cache_features,
        "left_out": [{"file": name, "reason": reason} for name, reason in examples.left_out],
    }


def write_results(
    folder: Path,
    summary: dict[str, Any],
    scores: Scores | None,
    loss: float | None,
    examples: RunData,
    history: list[dict[str, Any]],
) -> None:
    """Writes a finished run's numbers and figures into ``folder``; train_results.json comes last."""
    plots.plot_learning_curve(history, folder / "learning_curve.png", summary["method"]["method"].upper())
    if scores is not None:
        _write_scores(folder, scores, loss, examples)
    write_json(folder / "train_results.json", summary)


def _write_scores(folder: Path, scores: Scores, loss: float | None, examples: RunData) -> None:
    write_json(
        folder / "eval_results.json",
        {"data": examples.evaluation.description, "note": examples.note, "loss": loss, **scores.as_dict()},
    )
    write_text(folder / "evaluation.txt", scores.as_text(whole=True) + "\n")
    plots.plot_confusion(
        scores.confusion, scores.labels, folder / "confusion_matrix.png", f"accuracy {scores.accuracy:.1%}"
    )


def report(folder: Path, scores: Scores | None, examples: RunData) -> None:
    """Prints how the run went."""
    if scores is not None:
        scored, note = printable(examples.evaluation.description), printable(examples.note)
        say(f"\nevaluation on {scored}\n{scores.as_text()}\nnote: {note}")
    say(f"\nmodel and results are in {folder}")
    if examples.left_out:
        count = len(examples.training) + len(examples.evaluation or ()) + len(examples.left_out)
        say(data.describe_bad(examples.left_out, count))
