"""A training run: data, backbone, method and the stock Trainer put together.

:func:`train` is the whole run and can be called from Python; the command line, the demo and the tests all go
through it.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    WhisperConfig,
    WhisperFeatureExtractor,
    set_seed,
)

from .. import data
from ..data.batching import batches_by_length
from ..data.examples import ExampleSet, label_inventory
from ..errors import UserError
from ..evaluation import plots
from ..evaluation.metrics import Scores, score
from ..feature_cache.dataset import CachedCollator, CachedDataset
from ..feature_cache.filling import prepare_cache
from ..feature_cache.store import FeatureCache
from ..files import check_writable, write_json, write_text
from ..methods import MeftConfig
from ..model.backbone import set_labels
from ..model.module import MeftModel, get_meft_model
from ..model.pretrained import load_config, load_feature_extractor, load_whisper, resolve_dtype
from ..options.common import MethodArguments, ModelArguments
from ..options.training import LEARNING_RATE, LEARNING_RATES, TrainArguments, TrainDataArguments
from . import checkpoints
from .console import main_process, say
from .data import RunData, load_data
from .fitting import fit_batch, out_of_memory
from .gradients import GradientReport
from .guard import FiniteGuard, Indexed, IndexedCollator, NonFiniteError
from .interrupts import Interrupts
from .log_lines import LogLines, ProgressBar
from .throughput import Throughput, as_text
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


def _not_about_mtime(record: logging.LogRecord) -> bool:
    # The Trainer warns when checkpoints follow each other within a second; it then sorts them by step.
    return "mtime may not be reliable" not in record.getMessage()


logging.getLogger("transformers.trainer_utils").addFilter(_not_about_mtime)


def method_config(
    arguments: MethodArguments, backbone_dtype: str, backbone_quantization: str | None = None
) -> MeftConfig:
    """The method's configuration; an option that the method does not have is an error."""
    backbone = {"backbone_dtype": backbone_dtype, "backbone_quantization": backbone_quantization}
    return MeftConfig.from_dict({**arguments.chosen(), **backbone})


# What a finished run leaves beside its checkpoints.
RESULT_FILES = [
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "training_args.bin",
    "README.md",
    "train_results.json",
    "eval_results.json",
    "evaluation.txt",
    "confusion_matrix.png",
    "learning_curve.png",
]


def prepare_output_dir(arguments: TrainArguments) -> Path | None:
    """Checks the output folder against what is asked for and finds the checkpoint to resume from, if any.

    Raises:
        UserError: the folder holds something and neither resuming nor overwriting was asked for, or the named
            checkpoint cannot be resumed from.
    """
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file, a folder is needed")
    wanted = (arguments.resume_from_checkpoint or "").strip()
    processes = arguments.world_size
    # One process at a time, the main one first: it may remove half-written checkpoints.
    with arguments.main_process_first(local=False, desc="looking for checkpoints"):
        if main_process():
            check_writable(folder / RESULT_FILES[0])
        if wanted.lower() in ("true", "latest"):
            found = checkpoints.newest_complete(folder, say, processes)
            if found is None:
                say(f"{folder} holds no complete checkpoint: training starts from the beginning")
            return found
        if wanted.lower() not in ("", "false"):
            return checkpoints.require_complete(Path(wanted), processes)
        if not folder.is_dir() or not any(folder.iterdir()):
            return None
        if not arguments.overwrite_output_dir:
            # Only the main process looks: it has not written anything yet when the others come here.
            raise UserError(
                f"output_dir: {folder} is not empty; name another folder, or go on with the run in it by "
                "--resume_from_checkpoint True, or start anew with --overwrite_output_dir True"
            )
        if main_process():
            for checkpoint in checkpoints.list_checkpoints(folder):
                shutil.rmtree(checkpoint)
            for name in RESULT_FILES:
                (folder / name).unlink(missing_ok=True)
    return None


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


def scores_of(logits: Any, reference: np.ndarray, labels: Sequence[str]) -> Scores:
    """Scores logits (N, K) against class indices (N,).

    Raises:
        UserError: a logit is NaN or infinite.
    """
    logits = np.asarray(logits[0] if isinstance(logits, tuple | list) else logits)
    if not np.isfinite(logits).all():
        raise UserError("the model's outputs hold NaN or infinite values, so it cannot be scored")
    return score(reference, logits.argmax(axis=-1), labels)


def load_sizes_and_extractor(
    arguments: ModelArguments, config: MeftConfig
) -> tuple[WhisperConfig, WhisperFeatureExtractor]:
    """The backbone's config and its feature extractor, checked against each other and the method's options.

    Raises:
        UserError: one of them cannot be loaded, or they do not fit each other.
    """
    sizes = load_config(arguments)
    extractor = load_feature_extractor(
        arguments.feature_extractor_name or arguments.model_name_or_path,
        "feature_extractor_name" if arguments.feature_extractor_name else "model_name_or_path",
        revision=arguments.model_revision,
        cache_dir=arguments.cache_dir,
        token=arguments.token,
    )
    data.check_feature_extractor(extractor, sizes, config.max_frames)
    config.check_backbone(sizes.d_model, sizes.encoder_layers, sizes.max_source_positions)
    return sizes, extractor


def train(
    model_arguments: ModelArguments,
    method_arguments: MethodArguments,
    data_arguments: TrainDataArguments,
    training_arguments: TrainArguments,
    examples: RunData | None = None,
    make_dataset: Callable[..., data.SpeechDataset] = data.SpeechDataset,
) -> TrainResult:
    """One training run, from files to files.

    Args:
        model_arguments, method_arguments, data_arguments, training_arguments: as on the command line.
        examples: what ``load_data`` gave for these arguments, where several runs share it.
        make_dataset: called as :class:`whisper_meft.data.SpeechDataset`.

    Writes into ``training_arguments.output_dir``: checkpoints; the trained side network and head
    (config.json, model.safetensors) with the feature extractor; train_results.json, eval_results.json,
    evaluation.txt, confusion_matrix.png and learning_curve.png.

    Raises:
        UserError: anything about the input that cannot be used, by name; NaN or infinity during training;
            trained parameters that never moved.
    """
    output_dir = Path(training_arguments.output_dir)
    resume_from = prepare_output_dir(training_arguments)
    if resume_from is not None:
        checkpoints.check_steps_left(resume_from, training_arguments.max_steps)
    dtype = model_arguments.backbone_dtype
    if dtype == "auto" and MeftConfig.methods()[method_arguments.method].trains_backbone:
        dtype = "float32"
    dtype = resolve_dtype(dtype, training_arguments.use_cpu)
    config = method_config(method_arguments, dtype, model_arguments.backbone_quantization)
    if training_arguments.learning_rate is None:
        training_arguments.learning_rate = LEARNING_RATES.get(config.method, LEARNING_RATE)

    if training_arguments.cache_features and not config.frozen_encoder:
        raise UserError(
            f"cache_features: {config.method} trains inside the encoder, so its hidden states cannot be kept"
        )
    if model_arguments.backbone_compile and not config.frozen_encoder:
        raise UserError(
            f"backbone_compile: {config.method} trains inside the encoder; use --torch_compile True instead"
        )
    # What is quick to check comes first: a wrong name should not cost a pass over the data.
    backbone_config, extractor = load_sizes_and_extractor(model_arguments, config)
    set_seed(training_arguments.seed)  # a new head draws its start values
    base = load_whisper(model_arguments, dtype)
    examples = examples or load_data(
        data_arguments,
        evaluate=training_arguments.eval_strategy != "no",
        select=training_arguments.load_best_model_at_end,
        seed=training_arguments.seed,
        num_workers=training_arguments.dataloader_num_workers,
        progress=not training_arguments.disable_tqdm,
        cache_folder=training_arguments.cache_features,
    )
    labels = label_inventory(examples.training)
    label2id = {label: index for index, label in enumerate(labels)}

    fitting = (config, backbone_config, training_arguments, dtype, len(labels))
    if training_arguments.auto_batch and (changed := fit_batch(*fitting)):
        say(changed)
    set_seed(training_arguments.seed)
    smallest = training_arguments.per_device_train_batch_size * training_arguments.world_size
    if training_arguments.dataloader_drop_last and len(examples.training) < smallest:
        raise UserError(
            f"dataloader_drop_last: the {len(examples.training)} training examples do not fill one batch of "
            f"{smallest}, so nothing is left to train on"
        )
    set_labels(base, labels)
    if config.backbone_quantization:
        base.encoder.to(training_arguments.device)  # which decides how it is done
    model = get_meft_model(base, config)
    if model_arguments.backbone_compile:
        model.encoder.compile_layers()
    collator = data.Collator(extractor, config.max_frames)
    if training_arguments.cache_features:
        cache = _fill_cache(model, extractor, examples, training_arguments)
        collator = CachedCollator()

        def make_dataset(examples: ExampleSet, *_: Any) -> CachedDataset:
            return CachedDataset(examples, cache, model, label2id)

    training_set = make_dataset(examples.training, extractor, label2id, config.max_frames)
    evaluation_set = None
    if examples.evaluation is not None:
        evaluation_set = make_dataset(examples.evaluation, extractor, label2id, config.max_frames)
    _describe(model, config, examples, labels, model_arguments.model_name_or_path)

    guard = FiniteGuard(
        model,
        [example.name for example in examples.training],
        [example.name for example in examples.evaluation or ()],
    )
    report = GradientReport(model)
    interrupts = Interrupts()
    callbacks: list[Any] = [guard, report, interrupts]
    if training_arguments.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(training_arguments.early_stopping_patience))
    lengths = getattr(training_set, "lengths", None)
    length_batches = batches_by_length(lengths, config.max_frames, training_arguments, len(training_set))
    if length_batches is not None and length_batches.by_length:
        share = length_batches.padding()
        say(f"{len(length_batches)} batches by length an epoch: {share:.1%} of their frames are padding")
    longest = data.window_of(extractor, config.max_frames) * extractor.hop_length / extractor.sampling_rate
    seconds = [None if e.seconds is None else min(e.seconds, longest) for e in examples.training]
    throughput = Throughput(seconds)
    trainer = MeftTrainer(
        model=model,
        args=training_arguments,
        length_batches=length_batches,
        throughput=throughput,
        train_dataset=Indexed(training_set),
        eval_dataset=None if evaluation_set is None else Indexed(evaluation_set),
        data_collator=IndexedCollator(collator),
        compute_metrics=make_compute_metrics(labels),
        processing_class=extractor,
        callbacks=callbacks,
    )
    for standard in (PrinterCallback, ProgressCallback):
        trainer.pop_callback(standard)
    trainer.add_callback(LogLines)
    if not training_arguments.disable_tqdm:
        trainer.add_callback(ProgressBar)
    if resume_from is not None:
        checkpoints.check_same_model(resume_from, model.config)
        say(f"resuming from {resume_from}")
    try:
        with interrupts:
            outcome = trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    except NonFiniteError as error:
        good = checkpoints.list_checkpoints(output_dir)
        kept = f"the last good one is {good[0]}" if good else "there is none yet"
        raise NonFiniteError(f"{error}; checkpoints are as they were, {kept}") from error
    except torch.OutOfMemoryError as error:
        raise out_of_memory(*fitting) from error
    except KeyboardInterrupt:
        if checkpoints.list_checkpoints(output_dir):
            say(f"\nstopped; go on with --resume_from_checkpoint True --output_dir {output_dir}")
        raise

    report.check(training_arguments.learning_rate)
    say(report.describe())
    rates = throughput.summary(trainer.over_processes)
    if rates:
        say(f"training: {as_text(rates)}")
    trainer.save_model()
    scores, evaluation_loss = None, None
    if evaluation_set is not None:
        predicted = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        scores = scores_of(predicted.predictions, predicted.label_ids, labels)
        evaluation_loss = predicted.metrics.get("eval_loss")
    guard.close()
    trainable, total = model.get_nb_trainable_parameters()
    summary = {
        "method": config.to_dict(),
        "model_name_or_path": model_arguments.model_name_or_path,
        "labels": labels,
        "train_examples": len(examples.training),
        "train_data": examples.training.description,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "learning_rate": training_arguments.learning_rate,
        "train_loss": outcome.training_loss,
        "train_runtime_seconds": outcome.metrics.get("train_runtime"),
        "train_samples_per_second": outcome.metrics.get("train_samples_per_second"),
        "throughput": rates,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "gradients": report.report(),
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "best_metric": trainer.state.best_metric,
        "feature_cache": training_arguments.cache_features,
        "left_out": [{"file": name, "reason": reason} for name, reason in examples.left_out],
    }
    if main_process():
        _write_results(output_dir, summary, scores, evaluation_loss, examples, trainer.state.log_history)
    _report(output_dir, scores, examples)
    if training_arguments.push_to_hub:
        trainer.push_to_hub()
    return TrainResult(model.eval(), extractor, scores, summary, trainer.state.log_history)


def _fill_cache(
    model: MeftModel, extractor: WhisperFeatureExtractor, examples: RunData, arguments: TrainArguments
) -> FeatureCache:
    """The cache that is trained from, complete."""
    autocast = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
    return prepare_cache(
        arguments.cache_features,
        model.to(arguments.device),
        extractor,
        [part for part in (examples.training, examples.evaluation) if part is not None],
        arguments.cache_storage,
        autocast,
        arguments.dataloader_num_workers,
        not arguments.disable_tqdm and main_process(),
        say,
        arguments.distributed_state.wait_for_everyone,
    )


def _describe(
    model: MeftModel, config: MeftConfig, examples: RunData, labels: Sequence[str], backbone: str
) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    counts = examples.training.label_counts()
    say(
        f"{config.method.upper()} on {backbone}: {trainable:,} of {total:,} parameters train "
        f"({trainable / total:.2%})"
    )
    say(f"training on {len(examples.training)} examples of {len(labels)} classes")
    say("  " + ", ".join(f"{label}: {counts[label]}" for label in labels))
    if examples.evaluation is not None:
        say(f"evaluating on {len(examples.evaluation)} examples; {examples.note}")


def _write_results(
    folder: Path,
    summary: dict[str, Any],
    scores: Scores | None,
    loss: float | None,
    examples: RunData,
    history: list[dict[str, Any]],
) -> None:
    write_json(folder / "train_results.json", summary)
    plots.plot_learning_curve(history, folder / "learning_curve.png", summary["method"]["method"].upper())
    if scores is None:
        return
    write_json(
        folder / "eval_results.json",
        {"data": examples.evaluation.description, "note": examples.note, "loss": loss, **scores.as_dict()},
    )
    write_text(folder / "evaluation.txt", scores.as_text() + "\n")
    plots.plot_confusion(
        scores.confusion, scores.labels, folder / "confusion_matrix.png", f"accuracy {scores.accuracy:.1%}"
    )


def _report(folder: Path, scores: Scores | None, examples: RunData) -> None:
    if scores is not None:
        say(f"\nevaluation on {examples.evaluation.description}\n{scores.as_text()}\nnote: {examples.note}")
    say(f"\nmodel and results are in {folder}")
    if examples.left_out:
        count = len(examples.training) + len(examples.evaluation or ()) + len(examples.left_out)
        say(data.describe_bad(examples.left_out, count))
