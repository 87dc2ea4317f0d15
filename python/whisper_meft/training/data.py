"""The examples of a training run: reading and checking them, setting validation data aside."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import data
from ..audio.windows import Windows
from ..data.examples import (
    ExampleSet,
    label_inventory,
    split_by_speaker,
    warn_on_shared_audio,
    warn_on_shared_speakers,
)
from ..data.splits import canonical_split, split_kinds
from ..data.streaming import Stream
from ..errors import UserError
from ..feature_cache.store import FeatureCache
from ..options.training import TrainDataArguments
from .console import main_process
from .tasks.base import Task


@dataclass
class RunData:
    """The examples of a run.

    Attributes:
        training, evaluation: usable examples; evaluation is None where nothing is evaluated. Those of a
            stream are looked at when they are read.
        left_out: (name, reason) of the unusable ones.
        note: how the evaluation data came to be, for the reader of its scores.
        windows: how clips longer than a window were cut, into an example for each; None: they were not.
    """

    training: ExampleSet | Stream
    evaluation: ExampleSet | None
    left_out: list[tuple[str, str]]
    note: str
    windows: Windows | None = None

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of their indices."""
        return label_inventory(self.training)

    @property
    def train_examples(self) -> int | None:
        """The number of training examples; None where those of a stream were not counted."""
        return self.training.size if isinstance(self.training, Stream) else len(self.training)


def load_data(
    arguments: TrainDataArguments,
    task: Task,
    evaluate: bool,
    select: bool,
    seed: int,
    num_workers: int = 0,
    progress: bool = True,
    cache_folder: str | None = None,
    feature_extractor: Any = None,
) -> RunData:
    """Reads and checks the examples, setting speakers aside for validation where no other data is there.

    Args:
        arguments: what to read.
        task: what is learnt of it.
        evaluate: whether evaluation data is needed.
        select: whether the best checkpoint is chosen on it.
        seed: of the split and of the choice of max_*_samples.
        num_workers: threads that check the audio.
        progress: show progress bars.
        cache_folder: of a feature cache, where there may be one yet: audio whose states it holds was decoded
            when they were made, and is not decoded again.
        feature_extractor: of the model; the examples must be what it can be given.

    Raises:
        UserError: the data cannot be found or used.
    """
    if arguments.streaming:
        raise UserError(
            "streaming: only `whisper-meft train` can, all else takes examples again: leave it out"
        )
    source, reading = arguments.train_data, task.reader_options(arguments)
    windows = task.windows(arguments)
    splits = data.list_splits(source, **reading)

    def load(source: str, split: str | None, most: int | None, **more: Any) -> ExampleSet:
        examples = data.load_examples(source, split=split, **reading, **more)
        return task.check_read(at_most(examples, most, seed))

    split = arguments.train_split_name or ("train" if splits else None)
    training = load(source, split, arguments.max_train_samples, every_label=True)
    evaluation, is_test, origin = None, False, ""
    if arguments.eval_data is not None:
        kinds = split_kinds(data.list_splits(arguments.eval_data, **reading)).values()
        split = arguments.eval_split_name or next((k for k in ("validation", "test") if k in kinds), None)
        evaluation = load(arguments.eval_data, split, arguments.max_eval_samples)
        is_test = "test" in (canonical_split(split or ""), canonical_split(Path(arguments.eval_data).stem))
    elif arguments.eval_split_name or "validation" in split_kinds(splits).values():
        split = arguments.eval_split_name or "validation"
        evaluation = load(source, split, arguments.max_eval_samples)
        is_test = canonical_split(split) == "test"
    show = progress and main_process()
    cached = cache_folder is not None and (Path(cache_folder) / "cache.json").is_file()
    known = FeatureCache(cache_folder).checked if cached else None
    how = (arguments.strict, num_workers, show, known, feature_extractor)
    training, left_out = usable_examples(task, training, *how)
    if evaluation is not None:
        evaluation, more = usable_examples(task, evaluation, *how)
        left_out = left_out + more
    elif evaluate:
        training, evaluation = split_by_speaker(training, arguments.validation_fraction, seed)
        evaluation = at_most(evaluation, arguments.max_eval_samples, seed)
        origin = (
            f"no evaluation data was given: {len(evaluation)} of {len(training) + len(evaluation)} training "
            "examples were set aside, by whole speakers where those are known; "
        )
    task.check(training, evaluation)
    if evaluation is not None:
        warn_on_shared_speakers(training, evaluation)
        warn_on_shared_audio(training, evaluation)
    if windows is not None:  # last, so that speakers and recordings stay whole
        training = data.cut_into_windows(training, windows)
        evaluation = None if evaluation is None else data.cut_into_windows(evaluation, windows)
    return RunData(training, evaluation, left_out, origin + note_on(select, is_test), windows)


def note_on(select: bool, is_test: bool) -> str:
    """What the reader of a run's scores should know of its evaluation data.

    Args:
        select: whether the best checkpoint is chosen on it. is_test: whether it looks like a test set.
    """
    if not select:
        return "the last weights are scored, nothing was chosen on this data"
    if is_test:
        return (
            "this looks like a test set, and the best checkpoint is chosen on it: its scores are optimistic; "
            "leave eval_data out to choose on speakers set aside from the training data, and score the test "
            "set with `whisper-meft evaluate`"
        )
    return "the best checkpoint is chosen on this data, so its scores are slightly optimistic"


def usable_examples(
    task: Task, examples: ExampleSet, strict: bool, *how: Any, **named: Any
) -> tuple[ExampleSet, list[tuple[str, str]]]:
    """The examples that can be used, and (name, reason) of the others, which are an error where strict; other
    arguments as in :func:`whisper_meft.data.check_audio`."""
    readable, left_out = data.check_audio(examples, strict, *how, **named)
    usable, more = task.usable(readable)
    if strict and more:
        raise UserError(f"{more[0][0]}: {more[0][1]}")
    return usable, left_out + more


def at_most(examples: ExampleSet, limit: int | None, seed: int) -> ExampleSet:
    """At most so many of the examples, chosen at random."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return examples.select(sorted(chosen.tolist()))
