"""Examples, sets of them, and what must hold between a training set and an evaluation set."""

import logging
import math
import os
import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from ..audio import decode_audio, describe_source, read_window, read_windows
from ..errors import UserError
from ..once import warn_once
from .names import composed, folded, whole_number
from .paths import RealPaths

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DatasetCell:
    """One cell of a Hugging Face dataset, read when it is needed.

    ``kind`` is "audio" (a value for :func:`whisper_meft.data.read_audio`) or "features" (log-mel, computed
    earlier). ``dataset`` must already have the format that the cell is wanted in. ``root``: the folder that
    the relative path of a value without sound starts from.
    """

    dataset: Any
    index: int
    column: str
    kind: Literal["audio", "features"] = "audio"
    root: str = ""

    def read(self) -> Any:
        value = self.dataset[self.index][self.column]
        if isinstance(value, dict):
            for key in ("array", "raw"):
                if isinstance(value.get(key), list):
                    # A list of Python integers no longer says how many bits were stored.
                    value[key] = np.asarray(value[key], _stored_type(self.dataset.features[self.column], key))
            if (
                self.root
                and value.get("path")
                and all(value.get(k) is None for k in ("bytes", "array", "raw"))
            ):
                value = {**value, "path": os.path.join(self.root, os.fsdecode(value["path"]))}
        return value


def _stored_type(feature: Any, key: str) -> str | None:
    """The number type that a column's ``key`` is stored in, None where that cannot be told."""
    feature = feature.get(key) if isinstance(feature, dict) else None
    while hasattr(feature, "feature"):
        feature = feature.feature
    dtype = str(getattr(feature, "dtype", ""))
    return dtype if dtype.startswith(("int", "uint", "float")) else None


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a recording: its file, or what else is its alone; seconds; a channel, ``None`` for all."""

    recording: str
    start: float
    stop: float
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One utterance.

    Attributes:
        audio: anything that :func:`whisper_meft.audio.read_audio` reads, or a :class:`DatasetCell`.
        label: name of its class, or ``None``.
        speaker: or ``None`` where unknown.
        text: its transcript, or ``None`` where unknown or not asked for; letters are composed (NFC).
        name: what messages and result files call it; by default the file, and the segment where there is one.
        start, stop: the segment of ``audio``, in ``unit``; ``None`` means its beginning and its end.
        unit: "seconds", or "samples" at the file's own rate.
        channel: the one that is heard, counted from 0; ``None``: all of them, averaged.
        seconds: its length, where known (:func:`whisper_meft.data.check_audio` finds it).
        window: of the segment, in seconds, how many are passed over and how many follow that are meant
            (:func:`whisper_meft.data.cut_into_windows`); ``None`` means all of it.
        inside: what it is called inside the shard or data set that holds it, which is the same wherever that
            lies; empty for files.
        spans: the parts of recordings that are heard in it, where ``audio`` is made of them when it is read.
    """

    audio: Any
    label: str | None = None
    speaker: str | None = None
    name: str = ""
    start: float | None = None
    stop: float | None = None
    unit: Literal["seconds", "samples"] = "seconds"
    seconds: float | None = None
    channel: int | None = None
    text: str | None = None
    window: tuple[float, float] | None = None
    inside: str = ""
    spans: tuple[Span, ...] = ()

    def __post_init__(self):
        # The same letters may be composed in one file system or spreadsheet and decomposed in another.
        for name in ("label", "speaker", "text"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, composed(value))
        if not self.name:
            name = describe_source(self.audio)
            if self.start is not None or self.stop is not None:
                stop = "end" if self.stop is None else f"{self.stop:g}"
                name += f" [{self.start or 0:g} to {stop} {'s' if self.unit == 'seconds' else self.unit}]"
            if self.channel is not None:
                name += f" [channel {self.channel}]"
            if self.window is not None:
                name += f" [window {self.window[0]:.7g} to {sum(self.window):.7g} s]"
            object.__setattr__(self, "name", name)

    @property
    def has_features(self) -> bool:
        """Whether ``audio`` is log-mel computed earlier and not sound."""
        return isinstance(self.audio, DatasetCell) and self.audio.kind == "features"

    def value(self) -> Any:
        """``audio``, fetched from its dataset where it is in one.

        Raises:
            UserError: the dataset cannot be read there.
        """
        if not isinstance(self.audio, DatasetCell):
            return self.audio
        try:
            return self.audio.read()
        except (
            Exception
        ) as error:  # pyarrow, file system or feature decoding: the row is what the user can mend
            raise UserError(f"{self.name} cannot be read from its dataset: {error}") from error

    def decode(self) -> tuple[np.ndarray, int]:
        """The waveform at its own rate, float32 ``(samples,)``, and that rate.

        Raises:
            UserError: naming the example, when its audio cannot be read.
        """
        how = {"unit": self.unit, "name": self.name, "channel": self.channel, "window": self.window}
        return decode_audio(self.value(), self.start, self.stop, **how)

    def read(
        self, sampling_rate: int, longest: float | None = None, whole: bool = False
    ) -> tuple[np.ndarray, float]:
        """The waveform at ``sampling_rate``, float32 ``(samples,)``, and how many seconds were decoded.

        ``longest`` (seconds): give no more than this. ``whole``: decode and check what follows as well, so
        that the length is that of the whole clip. Whoever checks a clip and whoever uses it both call this.

        Raises:
            UserError: naming the example, when its audio cannot be read.
        """
        return read_window(
            self.value(),
            sampling_rate,
            self.start,
            self.stop,
            unit=self.unit,
            name=self.name,
            channel=self.channel,
            longest=longest,
            whole=whole,
            window=self.window,
        )

    def read_windows(
        self, sampling_rate: int, starts: Sequence[float], length: float
    ) -> Iterator[np.ndarray]:
        """:func:`whisper_meft.audio.read_windows` of it.

        Raises:
            UserError: naming the example, when its audio cannot be read.
        """
        how = {"unit": self.unit, "name": self.name, "channel": self.channel}
        before = 0.0 if self.window is None else self.window[0]
        starts = [before + start for start in starts]
        return read_windows(self.value(), sampling_rate, starts, length, self.start, self.stop, **how)


class ExampleSet(Sequence):
    """An immutable sequence of :class:`Example` with a ``description`` of where they come from.

    A slice is again an ``ExampleSet``.
    """

    def __init__(self, examples: Iterable[Example], description: str = "examples"):
        self.examples = tuple(examples)
        self.description = description

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return ExampleSet(self.examples[index], self.description)
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __repr__(self) -> str:
        return f"ExampleSet({len(self)} examples, {len(self.label_counts())} labels: {self.description})"

    def select(self, indices: Iterable[int], description: str | None = None) -> "ExampleSet":
        return ExampleSet((self.examples[i] for i in indices), description or self.description)

    def label_counts(self) -> Counter:
        """Examples per label, unlabelled ones left out."""
        return Counter(example.label for example in self.examples if example.label is not None)

    def speakers(self) -> set[str]:
        return {example.speaker for example in self.examples if example.speaker is not None}


def say_forms(labels: Iterable[str | None], where: str) -> None:
    """Says which labels are made one by composing their letters (NFC), as :class:`Example` does."""
    raw = {label for label in labels if label is not None and not label.isascii()}
    seen = Counter(map(composed, raw))
    doubled = sorted(label for label, count in seen.items() if count > 1)
    if doubled:
        warn_once(
            f"{where} has labels whose letters are composed in two ways (NFC, NFD); each is one class: "
            f"{listing(doubled)}"
        )


def listing(names: Iterable[Any], limit: int = 8) -> str:
    """Names for a message: the first few, and how many more there are."""
    names = [str(name) for name in names]
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Distinct labels in order; as numbers when all are, so that class ids survive a round trip."""
    labels = set(labels)
    numeric = all(label.isascii() and label.isdigit() for label in labels)
    return sorted(labels, key=(lambda label: (int(label), label)) if numeric else None)


def label_inventory(train: ExampleSet) -> list[str]:
    """The class names, sorted, taken from the training examples alone.

    Raises:
        UserError: no examples, unlabelled examples, or a single class.
    """
    check_labelled(train)
    names = sort_labels(train.label_counts())
    if len(names) < 2:
        raise UserError(
            f"{train.description} has one label only ({names[0]}); training needs at least two classes"
        )
    return names


def check_labelled(examples: ExampleSet) -> None:
    """Raises:
    UserError: there are no examples, or some have no label.
    """
    if not len(examples):
        raise UserError(f"{examples.description} holds no examples")
    missing = [example.name for example in examples if example.label is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(examples)} examples of {examples.description} have no label: "
            f"{listing(missing, 3)}"
        )


def check_transcribed(examples: ExampleSet) -> None:
    """Raises:
    UserError: there are no examples, or some have no transcript.
    """
    if not len(examples):
        raise UserError(f"{examples.description} holds no examples")
    missing = [example.name for example in examples if not example.text]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(examples)} examples of {examples.description} have no transcript: "
            f"{listing(missing, 3)}"
        )


def check_known_labels(examples: ExampleSet, names: Sequence[str]) -> None:
    """Checks that a model with the classes ``names`` can be evaluated on ``examples``.

    Raises:
        UserError: no examples, unlabelled ones, or labels that are not among ``names``.
    """
    check_labelled(examples)
    counts = examples.label_counts()
    unknown = sort_labels(set(counts) - set(names))
    if unknown:
        there = listing(f"{label} ({counts[label]} examples)" for label in unknown)
        close = [(a, b) for a in unknown for b in names if folded(a) == folded(b)]
        hint = f" ({close[0][0]!r} is written {close[0][1]!r} there)" if close else ""
        raise UserError(
            f"{examples.description} has labels that the training data has not: {there}; "
            f"known are {listing(names, 30)}{hint}"
        )


def warn_on_shared_speakers(train: ExampleSet, evaluation: ExampleSet) -> list[str]:
    """Warns when speakers are heard in both sets, and returns them sorted.

    A model may recognise a voice instead of a class, so results on known speakers come out too high. Numbers
    are compared as such: 007 of one table is 7, or 7.0, in another that a program read and wrote again.
    """
    heard = set(map(_as_number, train.speakers()))
    shared = sorted(speaker for speaker in evaluation.speakers() if _as_number(speaker) in heard)
    if shared:
        known = set(shared)
        part = sum(example.speaker in known for example in evaluation) / len(evaluation)
        logger.warning(
            "%d of %d speakers of %s are also in %s (%s): %.0f %% of its examples are by known voices, "
            "so its figures will be too good",
            len(shared),
            len(evaluation.speakers()),
            evaluation.description,
            train.description,
            listing(shared, 5),
            100 * part,
        )
    return shared


def _as_number(speaker: str) -> str | int:
    number = whole_number(speaker)
    return speaker if number is None else number


def utterance(example: Example, real: RealPaths) -> Hashable:
    """What tells an utterance from others: its file however it is written, segment and channel; else its
    name."""
    if not isinstance(example.audio, str | os.PathLike):
        return composed(example.name)
    start, unit = example.start or 0, example.unit
    whole = not start and example.stop is None
    segment = start, example.stop, "seconds" if whole else unit
    return real(example.audio), *segment, example.channel, example.window


def _recording(example: Example, real: RealPaths) -> Hashable:
    """The recording of an example, each channel one of its own, or ``None`` where it is not told; of several
    that are mixed the first."""
    if isinstance(example.audio, str | os.PathLike):
        return real(example.audio), example.channel
    return (real(example.spans[0].recording), example.spans[0].channel) if example.spans else None


def warn_on_shared_audio(train: ExampleSet, evaluation: ExampleSet) -> list[str]:
    """Warns when the same utterance (file, segment and channel) is in both sets, or when segments of one
    recording overlap, and returns the names of those in ``evaluation`` sorted."""
    real = RealPaths(links=True)
    known = {utterance(example, real) for example in train}
    shared = sorted({composed(example.name) for example in evaluation if utterance(example, real) in known})
    overlapping = sorted({composed(each.name) for each in _overlapping(train, evaluation, real)} - {*shared})
    for names, what in ((shared, "are also in"), (overlapping, "overlap in time with recordings in")):
        if names:
            logger.warning(
                "%d utterances of %s %s %s: %s",
                len(names),
                evaluation.description,
                what,
                train.description,
                listing(names, 3),
            )
    return sorted(shared + overlapping)


def _overlapping(train: ExampleSet, evaluation: ExampleSet, real: RealPaths) -> Iterator[Example]:
    """The examples of the second set that share sound with the first: more than a millisecond of a file, in
    one channel. Times in seconds are not compared with those in samples, as rates are not known."""

    def places(example: Example) -> Iterator[tuple[tuple[str, str], int | None, float, float]]:
        """(file, unit) that it can be compared in, the channel, and from where to where it goes there."""
        for span in example.spans:
            yield (real(span.recording), "seconds"), span.channel, span.start, span.stop
        if isinstance(example.audio, str | os.PathLike):
            first = example.start or 0
            last = math.inf if example.stop is None else example.stop
            units = ("seconds", "samples") if not first and last == math.inf else (example.unit,)
            for unit in units:
                yield (real(example.audio), unit), example.channel, first, last

    wanted = {key for example in evaluation for key, *_ in places(example)}
    # By (file, unit) and channel; under "all" those of every channel, as their mean has each.
    spans: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for example in train:
        for key, channel, first, last in places(example):
            if key in wanted:
                spans[key, channel].append((first, last))
                spans[key, "all"].append((first, last))
    starts, ends = {}, {}
    for key, found in spans.items():
        found.sort()
        starts[key] = [first for first, _ in found]
        ends[key] = list(accumulate((last for _, last in found), max))  # the latest of it and those before

    def overlaps(key: tuple, first: float, last: float) -> bool:
        before = bisect_left(starts[key], last - 1e-3) if key in starts else 0
        return before > 0 and ends[key][before - 1] > first + 1e-3

    for example in evaluation:
        if any(
            overlaps((key, each), first, last)
            for key, channel, first, last in places(example)
            for each in (("all",) if channel is None else (channel, None))
        ):
            yield example


def split_by_speaker(
    examples: ExampleSet, fraction: float = 0.1, seed: int = 0
) -> tuple[ExampleSet, ExampleSet]:
    """Holds out about ``fraction`` of every label's examples, by whole speakers, as (train, validation).

    Where all have transcripts and not all have labels, these count as one label.
    Every label keeps at least one speaker in train; a label with a single speaker is not held out, and a
    warning says so. Where no speaker is known, whole recordings (of several channels each one) are held out
    at random within each label, and a warning says so too; where none can be spared, segments are, which
    another warning says. The same arguments give the same split.

    Raises:
        UserError: ``fraction`` outside (0, 1), unlabelled examples, or nothing that could be held out.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the validation fraction must lie between 0 and 1, got {fraction}")
    transcribed = all(example.text for example in examples) and any(e.label is None for e in examples)
    labels = ["" if transcribed else example.label for example in examples]
    if not transcribed:
        check_labelled(examples)
    unknown = sum(example.speaker is None for example in examples)
    if unknown == len(examples):
        logger.warning(
            "%s names no speakers: validation examples are picked at random within each label, by whole "
            "recordings, so voices may be shared and validation figures too good (name a speaker column if "
            "there is one)",
            examples.description,
        )
    elif unknown:
        logger.warning(
            "%d of %d examples of %s have no speaker; each of their recordings is taken as a speaker of its "
            "own",
            unknown,
            len(examples),
            examples.description,
        )

    # A group is a speaker, or one recording of unknown speaker. A speaker of several labels counts for the
    # most frequent one, and moves as a whole.
    groups: dict[Any, list[int]] = defaultdict(list)
    real = RealPaths(links=True)
    for index, example in enumerate(examples):
        group = example.speaker
        if group is None:
            group = _recording(example, real) or index
        groups[group].append(index)
    held = _held_out(groups.values(), labels, fraction, seed)
    if not held and len(groups) < len(examples) == unknown:
        held = _held_out(([index] for index in range(len(examples))), labels, fraction, seed)
        if held:
            logger.warning(
                "no label of %s can spare a whole recording: segments are held out instead, so training and "
                "validation hold the same recordings, and validation figures tell nothing of others (give "
                "evaluation data)",
                examples.description,
            )
    if not held:
        raise UserError(
            f"no validation set can be split off {examples.description}: every label has a single speaker "
            "(or recording, where no speaker is known); give evaluation data"
        )
    validation = examples.select(sorted(held), f"validation part of {examples.description}")
    absent = sort_labels({*labels} - {labels[i] for i in held})
    if absent:
        logger.warning(
            "labels with too few speakers to hold one out are not in the validation set: %s", listing(absent)
        )
    rest = (index for index in range(len(examples)) if index not in held)
    return examples.select(rest, f"training part of {examples.description}"), validation


def _held_out(
    groups: Iterable[list[int]], labels: Sequence[str | None], fraction: float, seed: int
) -> set[int]:
    """Which examples :func:`split_by_speaker` holds out, if it is by whole groups of them."""
    by_label: dict[str, list[list[int]]] = defaultdict(list)
    for members in groups:
        counts = Counter(labels[i] for i in members)
        by_label[max(sort_labels(counts), key=counts.get)].append(members)

    left = Counter(labels)
    held: set[int] = set()

    def hold_out(group: list[int]) -> bool:
        loss = Counter(labels[i] for i in group)
        if any(left[name] <= count for name, count in loss.items()):  # the last examples of a label stay
            return False
        left.subtract(loss)
        held.update(group)
        return True

    shuffle = random.Random(seed)
    for label in sort_labels(by_label):
        members = by_label[label]
        shuffle.shuffle(members)
        target = max(1, round(fraction * sum(map(len, members))))
        taken = 0
        for group in members:
            if taken < target and taken + len(group) <= 1.5 * target and hold_out(group):
                taken += len(group)
        if not taken:  # every speaker is larger than that: the smallest one goes
            any(hold_out(group) for group in sorted(members, key=len))
    return held
