"""A training run: data, backbone, method and the stock Trainer put together.

:func:`train` is the whole run and can be called from Python; the command line, the demo and the tests all go
through it.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerState, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.training_args import OptimizerNames

from .. import data
from ..data.batching import LengthBatches, batches_by_length
from ..data.digest import digest_of
from ..data.examples import ExampleSet
from ..data.streaming import Stream, StreamedBatches
from ..errors import UserError, printable
from ..feature_cache.filling import prepare_cache
from ..feature_cache.store import FeatureCache
from ..model.base import MeftBase
from ..model.module import get_meft_model
from ..model.pretrained import load_whisper
from ..options.common import MethodArguments, ModelArguments
from ..options.training import TrainArguments, TrainDataArguments
from . import checkpoints
from .console import main_process, say
from .data import RunData, load_data
from .fitting import fit_batch, out_of_memory
from .gradients import GradientReport
from .guard import FiniteGuard, Indexed, IndexedCollator, NonFiniteError
from .heap import freed_memory_kept
from .interrupts import Interrupts, Stopped
from .lock import locked
from .log_lines import LogLines, ProgressBar
from .output_folder import check_output_dir, goes_on, make_room, prepare_output_dir
from .results import TrainResult, report, summarise, write_results
from .resuming import (
    EarlyStopping,
    check_finished_goes_on,
    check_goes_on,
    finished_results,
    is_at_end,
    stream_of,
)
from .settings import Settings, settle
from .stream_data import check_streaming, load_stream
from .streaming import OneByOne, StreamedTraining, settle_length
from .terms import free_terms, terms_of
from .throughput import Throughput, as_text
from .trainer import MeftTrainer


def _concerns_us(record: logging.LogRecord) -> bool:
    # The Trainer warns when checkpoints follow each other within a second, though it then sorts them by step;
    # and where a share of a run (logging_steps) is not the count in a checkpoint: what is asked for now
    # counts, and what must stay as it was is refused.
    text = record.getMessage()
    return "mtime may not be reliable" not in text and "The following arguments do not match" not in text


logging.getLogger("transformers.trainer_utils").addFilter(_concerns_us)


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
    evaluation.txt, confusion_matrix.png and learning_curve.png. With ``task="transcribe"`` no head and no
    confusion_matrix.png, but the tokenizer and generation_config.json.

    Raises:
        UserError: anything about the input that cannot be used, by name; NaN or infinity during training;
            trained parameters that never moved; another run is writing into the folder.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came; the latter's status is 143.
    """
    output_dir = Path(training_arguments.output_dir)
    check_output_dir(output_dir, _inputs(model_arguments, data_arguments))
    with Interrupts() as interrupts, locked(output_dir, main_process()):
        resume_from = prepare_output_dir(training_arguments)
        settings = settle(model_arguments, method_arguments, training_arguments)
        set_seed(training_arguments.seed)  # a new head draws its start values
        base = load_base(settings)
        examples = examples or read_examples(data_arguments, settings)
        settle_batch(settings, examples)
        if isinstance(examples.training, Stream):
            settle_length(training_arguments, examples.training)
        set_seed(training_arguments.seed)
        model = build_model(base, settings, examples)
        datasets = build_datasets(model, settings, examples, make_dataset, data_arguments)
        describe(model, settings, examples)
        trainer, watch = build_trainer(model, settings, examples, *datasets, interrupts, resume_from)
        check_resumed(trainer, settings, resume_from)
        result = earlier_result(trainer, settings, examples, resume_from)
        if result is None:
            with freed_memory_kept() if training_arguments.device.type == "cpu" else nullcontext():
                outcome = run_training(trainer, watch, settings, examples, resume_from)
            result = conclude(trainer, watch, settings, examples, outcome)
        watch.guard.close()
        if interrupts.asked is not None:  # with the last step: the run is whole, what comes behind it is not
            interrupts.leave()
        return result


def _inputs(model: ModelArguments, data_arguments: TrainDataArguments) -> dict[str, str | None]:
    """What a run reads, by the names of the options."""
    return {
        "model_name_or_path": model.model_name_or_path,
        "feature_extractor_name": model.feature_extractor_name,
        "train_data": data_arguments.train_data,
        "eval_data": data_arguments.eval_data,
    }


def load_base(settings: Settings) -> PreTrainedModel:
    """The pretrained backbone, as its task needs it."""
    quantized = bool(settings.config.backbone_quantization)
    return load_whisper(settings.model, settings.dtype, settings.task.backbone_class, quantized)


def read_examples(data_arguments: TrainDataArguments, settings: Settings) -> RunData:
    """The run's examples; audio that a feature cache holds already is not decoded again."""
    arguments = settings.training
    if data_arguments.streaming:
        check_streaming(data_arguments, arguments)
        return load_stream(data_arguments, settings.task, arguments, settings.extractor, settings.augment)
    return load_data(
        data_arguments,
        settings.task,
        evaluate=arguments.eval_strategy != "no",
        select=arguments.load_best_model_at_end,
        seed=arguments.seed,
        num_workers=arguments.dataloader_num_workers,
        progress=not arguments.disable_tqdm,
        cache_folder=arguments.cache_features,
        feature_extractor=settings.extractor,
    )


def settle_batch(settings: Settings, examples: RunData) -> None:
    """Fits the batch to the device where that is asked for (changes ``settings.training``).

    Raises:
        UserError: nothing fits, or the examples do not fill one batch where only full ones are taken.
    """
    arguments = settings.training
    if arguments.auto_batch and (changed := fit_batch(*_fitting(settings, examples))):
        say(changed)
    smallest = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and examples.train_examples < smallest:
        raise UserError(
            f"dataloader_drop_last: the {examples.train_examples} training examples do not fill one batch of "
            f"{smallest}, so nothing is left to train on"
        )


def _fitting(settings: Settings, examples: RunData) -> tuple:
    """The arguments of the functions that count what fits into the device's memory."""
    step = settings.task.counted_step(examples.training)
    return settings.config, settings.backbone, settings.training, settings.dtype, step


def build_model(base: PreTrainedModel, settings: Settings, examples: RunData) -> MeftBase:
    """The model that is trained: the method put on the backbone, and what the task needs of the examples."""
    settings.task.note(examples.training)
    settings.task.prepare(base)
    if settings.config.backbone_quantization:
        base.get_encoder().to(settings.training.device)  # which decides how it is done
    model = get_meft_model(base, settings.config)
    if settings.model.backbone_compile:
        model.encoder.compile_layers()
    return model


def build_datasets(
    model: MeftBase,
    settings: Settings,
    examples: RunData,
    make_dataset: Callable[..., Dataset],
    data_arguments: TrainDataArguments | None = None,
) -> tuple[Any, Dataset, Dataset | None]:
    """(collator, training set, evaluation set or None): of log-mel features, or of the states in a feature
    cache, which is filled as needed. The training set of a stream gives whole batches, as ``data_arguments``
    say."""
    augmented = {} if settings.augment is None else {"augment": settings.augment}
    if settings.training.cache_features:
        cache, collator = _fill_cache(model, settings, examples), settings.task.cached_collator()
        if augmented:
            augmented["copies"] = settings.training.cache_copies

        def make(part: ExampleSet, **more: Any) -> Dataset:
            return settings.task.cached_dataset(part, cache, model, **more)
    else:
        collator = settings.task.collator()

        def make(part: ExampleSet, **more: Any) -> Dataset:
            return settings.task.dataset(part, make_dataset, **more)

    if isinstance(examples.training, Stream):
        training_set = StreamedBatches(
            examples.training,
            StreamedTraining.dealing(settings.training, data_arguments.shuffle_buffer),
            OneByOne(partial(make, **augmented), settings.task.placeholder()),
            collator,
            settings.task.check_streamed,
            data_arguments.strict,
        )
    else:
        training_set = make(examples.training, **augmented)
    return collator, training_set, None if examples.evaluation is None else make(examples.evaluation)


def _fill_cache(model: MeftBase, settings: Settings, examples: RunData) -> FeatureCache:
    """The cache that is trained from, complete."""
    arguments = settings.training
    autocast = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
    return prepare_cache(
        arguments.cache_features,
        model.to(arguments.device),
        settings.extractor,
        [part for part in (examples.training, examples.evaluation) if part is not None],
        arguments.cache_storage,
        autocast,
        arguments.dataloader_num_workers,
        not arguments.disable_tqdm and main_process(),
        say,
        arguments.distributed_state.wait_for_everyone,
        settings.task.tokens,
        settings.augment,
        arguments.cache_copies or 1,
    )


def describe(model: MeftBase, settings: Settings, examples: RunData) -> None:
    """Prints what is about to be trained, and on what."""
    trainable, total = model.get_nb_trainable_parameters()
    method, backbone = settings.config.method.upper(), settings.model.model_name_or_path
    share = f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%})"
    say(f"{method} on {backbone}: {share}")
    for line in settings.task.describe(examples.training):
        say(line)
    if settings.augment is not None:
        say(f"  augmented by {printable(settings.augment.describe())}")
    if examples.evaluation is not None:
        say(f"evaluating on {len(examples.evaluation)} examples; {printable(examples.note)}")


@dataclass
class Watch:
    """What watches over a run: NaN, parameters that do not move, Ctrl-C, speed."""

    guard: FiniteGuard
    report: GradientReport
    interrupts: Interrupts
    throughput: Throughput

    def rates(self, trainer: MeftTrainer) -> dict[str, Any]:
        """The throughput of all processes; all of them must call it."""
        return self.throughput.summary(trainer.over_processes)


def build_trainer(
    model: MeftBase,
    settings: Settings,
    examples: RunData,
    collator: Any,
    training_set: Dataset,
    evaluation_set: Dataset | None,
    interrupts: Interrupts,
    resume_from: Path | None,
) -> tuple[MeftTrainer, Watch]:
    """The Trainer of the run, and what watches over it."""
    arguments, streamed = settings.training, None
    augmentation = None if settings.augment is None else settings.augment.settings.as_dict()
    if isinstance(training_set, StreamedBatches):
        streamed = StreamedTraining(training_set, arguments, augmentation)
    watch = Watch(
        FiniteGuard(
            model,
            [example.name for example in examples.training] if streamed is None else streamed.names,
            [example.name for example in examples.evaluation or ()],
        ),
        GradientReport(model),
        interrupts,
        Throughput(None if streamed is not None else _seconds(settings, examples)),
    )
    callbacks: list[Any] = [watch.guard, watch.report]
    if arguments.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(arguments.early_stopping_patience))
    trainer = settings.task.trainer_class(
        model=model,
        args=arguments,
        length_batches=None if streamed is not None else _length_batches(settings, examples, training_set),
        windows=examples.windows and str(examples.windows),
        augmentation=augmentation,
        streamed=streamed,
        throughput=watch.throughput,
        interrupts=interrupts,
        before_first_save=partial(make_room, arguments, resume_from),
        train_dataset=Indexed(training_set) if streamed is None else training_set,
        eval_dataset=None if evaluation_set is None else Indexed(evaluation_set),
        data_collator=IndexedCollator(collator),
        callbacks=callbacks,
        **settings.task.trainer_options(examples.evaluation),
    )
    for standard in (PrinterCallback, ProgressCallback):
        trainer.pop_callback(standard)
    trainer.add_callback(LogLines)
    if not arguments.disable_tqdm:
        trainer.add_callback(ProgressBar)
    if arguments.cuda_graphs:
        model.use_cuda_graphs()
    if streamed is None:
        trainer.batches = replace(trainer.batches, order_of_clips=digest_of(examples.training, in_order=True))
    trainer.record.batches = asdict(trainer.batches)
    trainer.record.terms = terms_of(settings, examples, training_set)
    trainer.record.free = free_terms(arguments, trainer.record.terms)
    trainer.first_step = 0 if resume_from is None else checkpoints.checkpoint_step(resume_from)
    return trainer, watch


def _seconds(settings: Settings, examples: RunData) -> list[float | None]:
    """How much of each training example is heard, as far as that is known."""
    extractor = settings.extractor
    window = data.window_of(extractor, settings.config.max_frames)
    longest = window * extractor.hop_length / extractor.sampling_rate
    return [None if e.seconds is None else min(e.seconds, longest) for e in examples.training]


def _length_batches(settings: Settings, examples: RunData, training_set: Dataset) -> LengthBatches | None:
    """The batches by length of the run, or of equally many clips of each class, if it has any; says what
    they save."""
    lengths = getattr(training_set, "lengths", None)
    frames = "fidelity" if settings.task.of_one_length else settings.config.max_frames
    classes = settings.task.classes_to_balance(examples.training)
    found = batches_by_length(lengths, frames, settings.training, len(training_set), classes)
    if found is not None:  # a clip that comes twice is augmented in two ways
        found.numbered = settings.augment is not None
    if found is not None and found.by_length:
        share = found.padding()
        say(f"{len(found)} batches by length an epoch: {share:.1%} of their frames are padding")
    return found


def check_resumed(trainer: MeftTrainer, settings: Settings, resume_from: Path | None) -> None:
    """Raises UserError if a checkpoint is of another model, counts other steps, or was trained on other terms
    than the run; its terms become those of the run too."""
    if resume_from is not None:
        checkpoints.check_same_model(resume_from, trainer.model.config, trainer.model.fingerprint())
        settings.task.check_resumed(resume_from)
        trainer.record.terms = check_goes_on(resume_from, trainer.batches, trainer.record)
        settings.training.optim = OptimizerNames(trainer.record.terms["optim"])
        if trainer.streamed is not None:
            trainer.streamed.go_on_from(resume_from)
        elif stream_of(resume_from) is not None:
            raise UserError(
                f"resume_from_checkpoint: {resume_from} was trained with --streaming: give it too"
            )


def earlier_result(
    trainer: MeftTrainer, settings: Settings, examples: RunData, resume_from: Path | None
) -> TrainResult | None:
    """What a finished run has left, where it is resumed; None where something is left to do.

    Raises:
        UserError: it left no checkpoint, and was trained otherwise.
    """
    arguments = settings.training
    ending = (trainer.total_steps(), arguments.early_stopping_patience)
    # A checkpoint that is named is gone back to, also in a finished run.
    named = not goes_on(arguments)
    if named and (resume_from is None or not is_at_end(resume_from, *ending)):
        return None
    folder, evaluated = Path(arguments.output_dir), examples.evaluation is not None
    told = (trainer.batches, trainer.record)
    finished = all((folder / name).is_file() for name in ("config.json", "train_results.json"))
    if finished and resume_from is None:
        checkpoints.check_same_model(folder, trainer.model.config, trainer.model.fingerprint())
        check_finished_goes_on(folder, *told)
    results = finished_results(folder, evaluated, *told, *ending, trainer.first_step)
    if results is None:
        return None
    checkpoints.check_same_model(folder, trainer.model.config, trainer.model.fingerprint())
    settings.task.check_resumed(folder)
    say(
        f"the run in {folder} is finished, at step {results['steps']}, and left as it is; a larger "
        "--num_train_epochs or --max_steps goes on with it"
    )
    trainer.load(folder)
    scores, _ = score_evaluation(trainer, settings, examples)
    report(folder, scores, examples)
    history = (
        []
        if resume_from is None
        else TrainerState.load_from_json(str(resume_from / "trainer_state.json")).log_history
    )
    return TrainResult(trainer.model.eval(), settings.extractor, scores, results, history)


def run_training(
    trainer: MeftTrainer, watch: Watch, settings: Settings, examples: RunData, resume_from: Path | None
) -> TrainOutput:
    """Trains, and says how it went; only takes over what is there if training was over at the checkpoint.
    That is compared with the start too: a run that was refused is not called a success when it is resumed.

    Raises:
        UserError: NaN or infinity turned up, the device's memory was too small, or trained parameters never
            moved.
        KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came.
    """
    ending = (trainer.total_steps(), settings.training.early_stopping_patience)
    if resume_from is not None and is_at_end(resume_from, *ending):
        say(f"training was over at {resume_from}; its results are written now")
        watch.report.begin()  # the seed gives the start values again
        trainer.load(resume_from)  # the last, also where another one is to be left
        watch.report.steps = trainer.first_step
        watch.report.look()
        watch.report.check(settings.training.learning_rate)
        trainer.take_over(resume_from)
        return TrainOutput(trainer.state.global_step, None, {})
    if resume_from is not None:
        say(f"resuming from {resume_from}")
    elif goes_on(settings.training):
        folder = settings.training.output_dir
        say(f"{folder} holds no complete checkpoint: training starts from the beginning")
    outcome = _train_until_stopped(trainer, watch, settings, examples, resume_from)
    watch.report.check(settings.training.learning_rate)
    say(watch.report.describe())
    if rates := watch.rates(trainer):
        say(f"training: {as_text(rates)}")
    return outcome


def _train_until_stopped(
    trainer: MeftTrainer, watch: Watch, settings: Settings, examples: RunData, resume_from: Path | None
) -> TrainOutput:
    output_dir = Path(settings.training.output_dir)
    try:
        return trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    except NonFiniteError as error:
        good = _newest_checkpoint(trainer, output_dir, resume_from)
        kept = f"the last good one is {good}" if good else "there is none of this run yet"
        raise NonFiniteError(f"{error}; checkpoints are as they were, {kept}") from error
    except torch.OutOfMemoryError as error:
        raise out_of_memory(*_fitting(settings, examples)) from error
    except Stopped:
        _say_stopped(trainer, output_dir, resume_from)
        watch.interrupts.leave()
    except (KeyboardInterrupt, SystemExit):
        _say_stopped(trainer, output_dir, resume_from)
        raise
    except RuntimeError as error:
        # A signal to the whole group of processes ends those that read data, and that may be noticed first.
        if watch.interrupts.asked is None or "DataLoader worker" not in str(error):
            raise
        _say_stopped(trainer, output_dir, resume_from)
        watch.interrupts.leave()


def _newest_checkpoint(trainer: MeftTrainer, output_dir: Path, resume_from: Path | None) -> Path | None:
    """The newest of this run, not of an earlier one in its folder that goes when this one saves."""
    return next(iter(checkpoints.list_checkpoints(output_dir)), None) if trainer.has_saved else resume_from


def _say_stopped(trainer: MeftTrainer, output_dir: Path, resume_from: Path | None) -> None:
    where = f"\nstopped at step {trainer.state.global_step} of {trainer.state.max_steps}"
    newest = _newest_checkpoint(trainer, output_dir, resume_from)
    if newest is None or checkpoints.holds_model_only(newest):
        say(f"{where}; there is no checkpoint of this run to go on from")
        return
    # Of a run that went back, or came from another folder, the newest there is another.
    there = [each.resolve() for each in checkpoints.list_checkpoints(output_dir)[:1]]
    named = "True" if newest.resolve() in there else newest
    say(f"{where}; go on with --resume_from_checkpoint {named} --output_dir {output_dir}")


def score_evaluation(trainer: MeftTrainer, settings: Settings, examples: RunData) -> tuple[Any, float | None]:
    """The scores of the trainer's model on its evaluation data and the loss there; None without such data."""
    if examples.evaluation is None:
        return None, None
    return settings.task.score(trainer, examples.evaluation, partial(load_base, settings))


def conclude(
    trainer: MeftTrainer, watch: Watch, settings: Settings, examples: RunData, outcome: TrainOutput
) -> TrainResult:
    """Saves and scores the trained model, and writes the results."""
    folder, history = Path(settings.training.output_dir), trainer.state.log_history
    trainer.prepare_to_save()
    trainer.save_model()
    scores, loss = score_evaluation(trainer, settings, examples)
    if trainer.streamed is not None:
        examples.left_out += trainer.streamed.everything_left_out()
    summary = summarise(settings, examples, trainer, outcome, watch.rates(trainer), watch.report.report())
    if main_process():
        written = (summary, scores, loss, examples, history)
        write_results(folder, trainer.model.config, settings.task, *written)
    report(folder, scores, examples)
    if settings.training.push_to_hub:
        trainer.push_to_hub()
    return TrainResult(trainer.model.eval(), settings.extractor, scores, summary, history)
