"""The examples of a training run from a stream: its classes, found in a first pass or given, and what it is
evaluated on."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .. import data
from ..data.augmenter import Augmenter
from ..data.examples import listing, sort_labels
from ..data.names import composed
from ..data.splits import canonical_split, split_kinds
from ..data.streaming import ShardedExamples, Stream, count_labels
from ..errors import UserError
from ..options.common import listed_labels
from ..options.training import TrainArguments, TrainDataArguments
from .console import main_process, say
from .data import RunData, at_most, note_on, usable_examples
from .tasks.base import Task
from .together import gathered


def check_streaming(arguments: TrainDataArguments, training: TrainArguments) -> None:
    """Raises UserError where an option cannot be used with a stream."""
    reasons = {
        "sampling": "a class cannot be drawn from what has not come yet; --class_weights balanced can",
        "cache_features": "the states of all clips would have to fit; leave one of them out",
        "bucket_by_length": "clips come in batches of the order in which they are read",
        "max_frames_per_batch": "clips come in batches of the order in which they are read",
        "dataloader_drop_last": "all of its batches are full",
    }
    unset = {"sampling": "natural"}
    for name, reason in reasons.items():
        if (value := getattr(training, name)) not in (unset.get(name), None, False):
            raise UserError(f"{name}: {value} cannot be used with --streaming: {reason}")
    if arguments.window is not None:
        raise UserError(
            f"window: {arguments.window:g} cannot be used with --streaming: a stream's clips are heard from "
            "their beginning; cut them where they are stored"
        )
    if training.train_sampling_strategy != "random":
        raise UserError(
            f"train_sampling_strategy: {training.train_sampling_strategy} cannot be used with --streaming: "
            "clips are mixed by --shuffle_buffer"
        )
    if arguments.max_train_samples is not None:
        raise UserError(
            f"max_train_samples: {arguments.max_train_samples} cannot be used with --streaming: give "
            "--max_steps"
        )


def load_stream(
    arguments: TrainDataArguments,
    task: Task,
    training: TrainArguments,
    extractor: Any,
    augment: Augmenter | None = None,
) -> RunData:
    """Finds out what has to be known of a stream before training, and reads and checks the evaluation data,
    which is held as anywhere.

    A first pass over the labels alone finds the classes and counts the examples. It is left out where
    ``max_steps`` is given and, to classify, ``labels``.

    Raises:
        UserError: the data cannot be found or used.
    """
    source, reading = arguments.train_data, task.reader_options(arguments)
    splits = data.list_splits(source, streaming=True, **reading)
    split = arguments.train_split_name or ("train" if splits else None)
    shards = data.load_shards(source, split=split, **reading)
    if augment is not None and augment.of_waves and getattr(shards, "features", False):
        raise UserError(
            f"augment {', '.join(augment.of_waves)} cannot be used with log-mel that was computed earlier "
            f"({shards.description}); spec can"
        )
    evaluation, left_out, is_test = _evaluation(arguments, task, training, extractor, shards, splits, reading)
    listed = read_labels(arguments.labels) if task.labelled and arguments.labels else None
    counted = training.max_steps < 0 or task.counts_classes
    stream = Stream(shards, listed)
    if counted or (task.labelled and listed is None):
        stream = first_pass(shards, task.labelled, listed, training)
    task.check(stream, evaluation)
    return RunData(stream, evaluation, left_out, note_on(training.load_best_model_at_end, is_test))


def first_pass(
    shards: ShardedExamples, labelled: bool, listed: list[str] | None, training: TrainArguments
) -> Stream:
    """What a pass over the names and labels of a stream finds; the processes of a run share the shards.

    Args:
        labelled: whether classes are wanted. listed: those that there may be, or None.

    Raises:
        UserError: an example has no label, or one that is not listed; there are no examples.
    """
    what = "labels" if labelled else "examples"
    spared = "--max_steps and --labels spare that" if labelled else "--max_steps spares that"
    say(f"a first pass over the {what} of {shards.description} ({spared})")
    mine = range(training.process_index, len(shards), training.world_size)
    show = main_process() and not training.disable_tqdm
    bar = tqdm(mine, desc="counting examples", unit="shard", disable=not show)
    count = partial(count_labels, shards, bar, labelled)
    parts = [count()] if training.world_size == 1 else gathered(count)
    sizes = {shard: size for found, _ in parts for shard, size in found.items()}
    counts = sum((found for _, found in parts), Counter())
    if not sum(sizes.values()):
        raise UserError(f"{shards.description} holds no examples")
    if not labelled:
        return Stream(shards, None, tuple(sizes[shard] for shard in range(len(shards))))
    if listed is not None and (unknown := sort_labels(set(counts) - set(listed))):
        there = listing(f"{label} ({counts[label]} examples)" for label in unknown)
        raise UserError(f"labels: {shards.description} has others than {listing(listed, 30)}: {there}")
    labels = listed or sort_labels(counts)
    return Stream(shards, labels, tuple(sizes[shard] for shard in range(len(shards))), counts)


def read_labels(given: list[str]) -> list[str] | None:
    """The classes that ``--labels`` names, in order: themselves, or a file of one on each line, or of a JSON
    list; None for "all".

    Raises:
        UserError: the file cannot be read, or there are fewer than two.
    """
    if given == ["all"]:
        return None
    labels = sort_labels(composed(label.strip()) for label in listed_labels(given) if label.strip())
    if len(labels) < 2:
        raise UserError(f"labels: at least two classes are needed, got {listing(labels) or 'none'}")
    return labels


def _evaluation(
    arguments: TrainDataArguments,
    task: Task,
    training: TrainArguments,
    extractor: Any,
    shards: ShardedExamples,
    splits: list[str],
    reading: dict[str, Any],
) -> tuple[data.ExampleSet | None, list[tuple[str, str]], bool]:
    """(examples to evaluate on or None, (name, reason) of unusable ones, whether they may be a test set)."""
    source, split = arguments.eval_data, arguments.eval_split_name
    # The classes are listed, not chosen among: another one is an error here too.
    reading = {**reading, "labels": "all"}
    if source is not None:
        reading["data_format"] = None  # it need not be in shards
        kinds = split_kinds(data.list_splits(source, **reading)).values()
        split = split or next((kind for kind in ("validation", "test") if kind in kinds), None)
    else:
        there = not shards.far and "validation" in split_kinds(splits).values()
        split = split or ("validation" if there else None)
        source = None if split is None else arguments.train_data
    if source is None:
        if training.eval_strategy != "no":
            raise UserError(
                "streaming: no clips can be set aside from a stream: give --eval_data, in any layout, or "
                "--eval_strategy no"
            )
        return None, [], False
    examples = data.load_examples(source, split=split, **reading)
    examples = task.check_read(at_most(examples, arguments.max_eval_samples, training.seed))
    show = main_process() and not training.disable_tqdm
    how = (arguments.strict, training.dataloader_num_workers, show, None, extractor)
    usable, left_out = usable_examples(task, examples, *how)
    names = (canonical_split(split or ""), canonical_split(Path(source).stem))
    return usable, left_out, "test" in names
