"""Classifying a stream as it comes: what is kept of a clip is what the model says of it, and no sound."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from tqdm.auto import tqdm

from ..data.checking import check_audio
from ..data.dataset import warn_of_cut
from ..data.examples import Example, ExampleSet, listing
from ..data.streaming import ShardedExamples, check_label
from ..data.windows import longest_window
from ..errors import UserError
from ..once import warn_once
from .classifier import Classifier

_BATCHES = 8  # whose clips are held at a time


class HeardClassifier:
    """What :func:`.assessment.assess` asks of a classifier, for clips that it has heard already.

    Args:
        classifier: it. logits: float32 (N, K), of the examples whose ``audio`` is their row.
    """

    def __init__(self, classifier: Classifier, logits: np.ndarray):
        self.model, self.labels, self._logits = classifier.model, classifier.labels, logits
        self.windows = classifier.windows

    def answers(self, examples: ExampleSet, windows: None = None, done: None = None) -> np.ndarray:
        """As :meth:`.classifier.Classifier.answers`, of recordings that were heard in windows already."""
        return self._logits[[example.audio for example in examples]]


def hear(
    classifier: Classifier,
    shards: ShardedExamples,
    strict: bool = False,
    labels: Collection[str] | None = None,
    others: Collection[str] | None = (),
) -> tuple[HeardClassifier, ExampleSet, list[tuple[str, str]]]:
    """Classifies all examples of a source in shards, some batches at a time.

    Args:
        strict: raise for the first clip that cannot be used, instead of leaving it out.
        labels: those whose clips are heard; None: all.
        others: classes that the model does not know, of which there may be clips; None: any.

    Returns:
        what has their logits; the usable examples, without sound; and (name, reason) of the others.

    Raises:
        UserError: a shard cannot be read; a label is missing or of no class of the model; nothing is usable.
    """
    quiet, classifier.progress = classifier.progress, False
    rows, kept, bad = [], [], []
    heard = longest_window(classifier.feature_extractor, classifier.max_frames)
    known = [*classifier.labels, *(others or ())]
    try:
        for part in tqdm(_parts(shards, classifier, labels), desc="classifying", disable=not quiet):
            if others is not None:
                for example in part:
                    check_label(example, known)
            good, more = _usable(part, strict, classifier)
            bad += more
            if good:
                # Said at the end, of all; of features, whose length only reading them tells, in each part.
                classifier.say_cut = good[0].has_features
                rows.append(classifier.logits(ExampleSet(good, shards.description)))
                kept += [replace(each, audio=len(kept) + place) for place, each in enumerate(good)]
    finally:
        classifier.progress, classifier.say_cut = quiet, True
    if not kept:
        raise UserError(
            f"no example of {shards.description} can be used" + (f"; {bad[0][0]}: {bad[0][1]}" if bad else "")
        )
    if absent := sorted(set(labels or ()) - {each.label for each in kept}):
        warn_once(f"{shards.description} has no usable examples of {listing(absent)}, which labels names")
    long = sum(each.seconds is not None and each.seconds > heard for each in kept)
    if long and classifier.windows is None:
        warn_of_cut(long, len(kept), shards.description, heard)
    return HeardClassifier(classifier, np.concatenate(rows)), ExampleSet(kept, shards.description), bad


def _parts(
    shards: ShardedExamples, classifier: Classifier, labels: Collection[str] | None
) -> Iterator[list[Example]]:
    wanted = (example for example in shards if labels is None or example.label in labels)
    while part := list(islice(wanted, _BATCHES * classifier.batch_size)):
        yield part


def _usable(
    part: list[Example], strict: bool, classifier: Classifier
) -> tuple[list[Example], list[tuple[str, str]]]:
    good, bad = [], []
    for example in part:
        try:
            checked, _ = check_audio(
                ExampleSet([example]), True, progress=False, feature_extractor=classifier.feature_extractor
            )
            good += checked
        except UserError as error:
            if strict:
                raise
            bad.append((example.name, str(error).removeprefix(example.name).lstrip(": ")))
    return good, bad
