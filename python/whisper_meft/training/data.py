"""The examples of a training run: reading and checking them, setting validation data aside."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import data
from ..data.examples import (
    ExampleSet,
    check_known_labels,
    label_inventory,
    split_by_speaker,
    warn_on_shared_audio,
    warn_on_shared_speakers,
)
from ..data.splits import canonical_split, split_kinds
from ..feature_cache.store import FeatureCache
from ..options.common import DataFormatArguments
from ..options.training import TrainDataArguments
from .console import main_process


@dataclass
class RunData:
    """The examples of a run.

    Attributes:
        training, evaluation: usable examples; evaluation is None where nothing is evaluated.
        left_out: (name, reason) of the unusable ones.
        note: how the evaluation data came to be, for the reader of its scores.
    """

    training: ExampleSet
    evaluation: ExampleSet | None
    left_out: list[tuple[str, str]]
    note: str

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of their indices."""
        return label_inventory(self.training)


def load_data(
    arguments: TrainDataArguments,
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
    source = arguments.train_data
    splits = _splits(arguments, source)
    training = _load(arguments, source, arguments.train_split_name or ("train" if splits else None))
    training = _at_most(training, arguments.max_train_samples, seed)
    evaluation, is_test, origin = None, False, ""
    if arguments.eval_data is not None:
        kinds = split_kinds(_splits(arguments, arguments.eval_data)).values()
        split = arguments.eval_split_name or next((k for k in ("validation", "test") if k in kinds), None)
        evaluation = _load(arguments, arguments.eval_data, split)
        is_test = "test" in (canonical_split(split or ""), canonical_split(Path(arguments.eval_data).stem))
    elif arguments.eval_split_name or "validation" in split_kinds(splits).values():
        split = arguments.eval_split_name or "validation"
        evaluation = _load(arguments, source, split)
        is_test = canonical_split(split) == "test"
    show = progress and main_process()
    cached = cache_folder is not None and (Path(cache_folder) / "cache.json").is_file()
    known = FeatureCache(cache_folder).checked if cached else None
    how = (arguments.strict, num_workers, show, known, feature_extractor)
    training, left_out = data.check_audio(training, *how)
    if evaluation is not None:
        evaluation = _at_most(evaluation, arguments.max_eval_samples, seed)
        evaluation, more = data.check_audio(evaluation, *how)
        left_out = left_out + more
    elif evaluate:
        training, evaluation = split_by_speaker(training, arguments.validation_fraction, seed)
        evaluation = _at_most(evaluation, arguments.max_eval_samples, seed)
        origin = (
            f"no evaluation data was given: {len(evaluation)} of {len(training) + len(evaluation)} training "
            "examples were set aside, by whole speakers where those are known; "
        )
    if evaluation is not None:
        check_known_labels(evaluation, label_inventory(training))
        warn_on_shared_speakers(training, evaluation)
        warn_on_shared_audio(training, evaluation)
    if not select:
        note = "the last weights are scored, nothing was chosen on this data"
    elif is_test:
        note = (
            "this looks like a test set, and the best checkpoint is chosen on it: its scores are optimistic; "
            "leave eval_data out to choose on speakers set aside from the training data, and score the test "
            "set with `whisper-meft evaluate`"
        )
    else:
        note = "the best checkpoint is chosen on this data, so its scores are slightly optimistic"
    return RunData(training, evaluation, left_out, origin + note)


def _splits(arguments: TrainDataArguments, source: str) -> list[str]:
    return data.list_splits(source, **arguments.reader_options())


def _load(arguments: DataFormatArguments, source: str, split: str | None) -> ExampleSet:
    return data.load_examples(source, split=split, **arguments.reader_options())


def _at_most(examples: ExampleSet, limit: int | None, seed: int) -> ExampleSet:
    if limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return examples.select(sorted(chosen.tolist()))
