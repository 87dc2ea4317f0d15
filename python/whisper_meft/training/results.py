"""What a run ends with: its scores, its numbers, and the files that hold them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import WhisperFeatureExtractor
from transformers.trainer_utils import TrainOutput

from .. import data
from ..data.streaming import Stream
from ..errors import UserError, printable
from ..evaluation import plots
from ..evaluation.metrics import Scores
from ..evaluation.recognition import Recognition
from ..files import write_json
from ..model.base import MeftBase
from ..model.card import DataUsed, describe_data, results_of, write_results_into_card
from ..model.config import MeftModelConfig
from .console import say
from .data import RunData
from .settings import Settings
from .tasks.base import Task
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

    model: MeftBase
    feature_extractor: WhisperFeatureExtractor
    scores: Scores | Recognition | None
    training: dict[str, Any]
    history: list[dict[str, Any]]


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
        **settings.task.summary(examples.training),
        "train_examples": examples.train_examples,
        "train_data": examples.training.description,
        "windows": examples.windows and asdict(examples.windows),
        "epochs": state.epoch,
        "steps": state.global_step,
        "planned_steps": trainer.total_steps(),
        "batches": asdict(trainer.batches),
        "terms": trainer.record.terms,
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
        "augmentation": None if settings.augment is None else settings.augment.as_dict(),
        "feature_cache": settings.training.cache_features,
        "cache_copies": settings.training.cache_copies,
        "left_out": [{"file": name, "reason": reason} for name, reason in examples.left_out],
    }


def write_results(
    folder: Path,
    config: MeftModelConfig,
    task: Task,
    summary: dict[str, Any],
    scores: Scores | Recognition | None,
    loss: float | None,
    examples: RunData,
    history: list[dict[str, Any]],
) -> None:
    """Writes a finished run's numbers, figures and card into ``folder``; train_results.json comes last."""
    title = summary["method"]["method"].upper()
    plots.plot_learning_curve(history, folder / "learning_curve.png", title, *task.curve)
    results = []
    if scores is not None:
        found = {"data": examples.evaluation.description, "note": examples.note, "loss": loss}
        found |= task.write_scores(folder, scores)
        write_json(folder / "eval_results.json", found)
        results = results_of(config, examples.evaluation, found)
    told = describe_data(
        examples.training, examples.evaluation, len(examples.left_out), examples.note, summary
    )
    try:
        hub_data = DataUsed.of(examples.training).hub_name
        write_results_into_card(folder, config, results, told, hub_data, afresh=True)
    except UserError as error:  # the user's own page, which may say what it likes
        say(str(error))
    write_json(folder / "train_results.json", summary)


def report(folder: Path, scores: Scores | Recognition | None, examples: RunData) -> None:
    """Prints how the run went."""
    if scores is not None:
        scored, note = printable(examples.evaluation.description), printable(examples.note)
        say(f"\nevaluation on {scored}\n{scores.as_text()}\nnote: {note}")
    say(f"\nmodel and results are in {folder}")
    left_out = [*examples.left_out, *getattr(scores, "left_out", ())]
    if left_out:
        count = None
        if not isinstance(examples.training, Stream):
            count = len(examples.training) + len(examples.evaluation or ()) + len(examples.left_out)
        say(data.describe_bad(left_out, count))
