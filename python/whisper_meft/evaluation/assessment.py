"""Everything that is said about a classifier on labelled clips: scores, detection, calibration, for whom."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.examples import ExampleSet
from ..errors import printable
from ..files import write_json, write_text
from . import plots
from .calibration import Reliability, confidences_of, log_loss, reliability, threshold_that_keeps
from .classifier import Classifier
from .detection import (
    Decisions,
    Trials,
    equal_error_rate,
    false_acceptance,
    log_likelihood_ratios,
    row_slices,
)
from .metrics import Scores, score
from .open_set import OpenSet, score_rejection
from .resampling import DRAWS, ends, groups_of, times_drawn
from .scoring import finite_logits, logits_and_classes

# NIST's language recognition evaluations have segments of 3, 10 and 30 seconds.
DURATIONS = (3.0, 10.0, 30.0)

# Of more trials there is no EER: they would not fit into memory.
_MOST_SORTED = 5 * 10**7

# The sorted trials of a draw are gone over once; more than so many, and no interval of the EER is made.
_MOST_TRIALS = 10**7
_TRIALS_OF_ALL_DRAWS = 10**9
_FEWEST_DRAWS = 100

# So many speakers are told in text; of more, the worst.
_MOST_SPEAKERS, _WORST = 40, 20


@dataclass(frozen=True)
class Part:
    """Some of the clips.

    Attributes:
        count: their number. accuracy: the share that is right. mean_class_accuracy: the unweighted mean of it
            over the classes among them.
    """

    count: int
    accuracy: float
    mean_class_accuracy: float

    @classmethod
    def of(cls, reference: np.ndarray, right: np.ndarray) -> "Part":
        """Of class indices (n,) and bool (n,)."""
        return cls(len(right), float(right.mean()), _mean_class_accuracy(reference, right, None))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return vars(self).copy()


@dataclass(frozen=True)
class Assessment:
    """See the module.

    Attributes:
        scores: of the clips of classes that the model knows; so are all others but ``open_set``.
        equal_error_rate: of all trials of a clip and a class. per_class_error_rate: of each class's.
        average_cost: C_avg (:meth:`.detection.Decisions.average_cost`). Each of them None where there are
            clips of less than two classes; the rates also of more than 50 million trials.
        log_loss: the mean of -log of the probability of the right class.
        reliability: confidences beside accuracies, with the ECE.
        intervals: by the names in JSON, 95 % intervals; None where a draw has no value.
        drawn: what the intervals are of, "speakers" or "clips".
        per_duration, per_speaker: of the clips of like length, and of each speaker that is known.
        open_set: what a threshold does, or None.
        temperature: what the logits were divided by, or None.
    """

    scores: Scores
    equal_error_rate: float | None
    per_class_error_rate: dict[str, float | None]
    average_cost: float | None
    log_loss: float
    reliability: Reliability
    intervals: dict[str, tuple[float, float] | None]
    drawn: str
    per_duration: dict[str, Part]
    per_speaker: dict[str, Part]
    open_set: OpenSet | None
    temperature: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: what the scores give, and what is here beside them."""
        bins = self.reliability
        return {
            **self.scores.as_dict(),
            "eer": self.equal_error_rate,
            "cavg": self.average_cost,
            "ece": bins.error,
            "log_loss": self.log_loss,
            "intervals": {
                name: None if each is None else list(each) for name, each in self.intervals.items()
            },
            "interval_over": self.drawn,
            "calibration_temperature": self.temperature,
            "per_class_eer": self.per_class_error_rate,
            "per_duration": {name: part.as_dict() for name, part in self.per_duration.items()},
            "per_speaker": {name: part.as_dict() for name, part in self.per_speaker.items()},
            "reliability": [
                {
                    "above": float(low),
                    "up_to": float(high),
                    "count": int(count),
                    "confidence": None if not count else float(confidence),
                    "accuracy": None if not count else float(accuracy),
                }
                for low, high, count, confidence, accuracy in zip(
                    bins.edges, bins.edges[1:], bins.counts, bins.confidence, bins.accuracy
                )
            ],
            "open_set": None if self.open_set is None else self.open_set.as_dict(),
        }

    def as_text(self, whole: bool = False) -> str:
        """The scores as lines of text; ``whole``: also of more than 100 classes or 40 speakers all."""
        lines = [self.scores.as_text(whole), "", f"with 95 % intervals of draws of {self.drawn}"]
        told = {
            "accuracy": ("accuracy", self.scores.accuracy, ".2%"),
            "mean_class_accuracy": ("mean class accuracy", self.scores.mean_class_accuracy, ".2%"),
            "eer": ("EER", self.equal_error_rate, ".2%"),
            "cavg": ("C_avg", self.average_cost, ".4f"),
            "ece": ("ECE", self.reliability.error, ".2%"),
            "log_loss": ("log loss", self.log_loss, ".4f"),
        }
        for name, (shown, value, form) in told.items():
            if value is None:
                many = name == "eer" and self.average_cost is not None
                why = "too many trials" if many else "clips of two classes are needed"
                lines.append(f"  {shown:<19}  {why}")
                continue
            interval = self.intervals.get(name)
            reach = "" if interval is None else f"   {interval[0]:{form}} to {interval[1]:{form}}"
            lines.append(f"  {shown:<19}  {value:>7{form}}{reach}")
        if self.temperature is not None:
            lines.append(f"calibrated with temperature {self.temperature:.4g}")
        lines += ["accuracy by length", *_table(self.per_duration)]
        if len(self.per_speaker) > 1:
            parts = self.per_speaker
            worst = sorted(parts, key=lambda name: parts[name].accuracy)
            if whole or len(parts) <= _MOST_SPEAKERS:
                lines += ["accuracy by speaker", *_table(parts)]
            else:
                lines.append(f"accuracy of the worst {_WORST} of {len(parts)} speakers")
                lines += _table({name: parts[name] for name in worst[:_WORST]})
        return "\n".join(lines + ([] if self.open_set is None else self.open_set.as_text()))


def _table(parts: dict[str, Part]) -> list[str]:
    width = max(len(printable(name)) for name in parts)
    return [
        f"  {printable(name):<{width}}  {part.accuracy:7.2%}   ({part.count} examples)"
        for name, part in parts.items()
    ]


def assess(
    classifier: Classifier,
    examples: ExampleSet,
    unknown: ExampleSet | None = None,
    threshold: float | None = None,
    origin: str = "given",
) -> Assessment:
    """Scores a classifier.

    Args:
        examples: labelled, of classes that it knows. unknown: of classes that it does not know, or None.
        threshold: what is rejected; None: with ``unknown`` clips, the one that keeps 95 % of the known ones.
        origin: how the threshold was chosen, for people.

    Raises:
        UserError: an example has a label that the model does not know, cannot be read, or its output is not
            finite.
    """
    logits, reference = logits_and_classes(classifier, examples)
    outside = None
    if unknown is not None and len(unknown):
        outside = finite_logits(classifier, unknown), [example.label for example in unknown]
    return assess_logits(
        logits,
        reference,
        classifier.labels,
        [example.speaker for example in examples],
        [example.seconds for example in examples],
        outside,
        threshold,
        origin,
        classifier.model.config.calibration_temperature,
    )


def assess_logits(
    logits: np.ndarray,
    reference: np.ndarray,
    labels: Sequence[str],
    speakers: Sequence[str | None] | None = None,
    seconds: Sequence[float | None] | None = None,
    unknown: tuple[np.ndarray, Sequence[str]] | None = None,
    threshold: float | None = None,
    origin: str = "given",
    temperature: float | None = None,
) -> Assessment:
    """As :func:`assess`, of what a model gave.

    Args:
        logits: (N, K), finite. reference: (N,) class indices. labels: K names.
        speakers, seconds: of each clip, None where they are not known.
        unknown: logits (U, K) of clips of unknown classes, and the names of those.

    Raises:
        UserError: there is nothing to score.
    """
    scores = score(reference, logits.argmax(1), labels)  # which refuses what is nothing to score
    speakers = [None] * len(reference) if speakers is None else speakers
    right = logits.argmax(1) == reference
    parts = list(row_slices(*logits.shape))
    confidences = confidences_of(logits)
    losses = np.concatenate([log_loss(logits[rows], reference[rows]) for rows in parts])
    decisions = trials = None
    per_class = dict.fromkeys(labels, float("nan"))
    if logits.shape[1] > 1 and len(np.unique(reference)) > 1:
        decisions = Decisions.of(logits, reference)
    if decisions is not None and logits.size <= _MOST_SORTED:
        ratios = log_likelihood_ratios(logits)
        own = np.zeros(ratios.shape, bool)
        own[np.arange(len(reference)), reference] = True
        trials = Trials(ratios[own], ratios[~own])
        for index, label in enumerate(labels):
            of_class = own[:, index]
            per_class[label] = equal_error_rate(ratios[of_class, index], ratios[~of_class, index])
    of_clips = _of_clips(reference, right, losses, decisions)
    intervals, drawn = _intervals(speakers, of_clips, trials, logits.shape[1] - 1)
    open_set = None
    if threshold is not None or unknown is not None:
        if threshold is None:
            threshold, origin = threshold_that_keeps(confidences, 0.95), "keeps 95 % of the known clips here"
        outside, names, cost = None, (), None
        if unknown is not None:
            outside, names = confidences_of(unknown[0]), unknown[1]
            if decisions is not None:
                accepted = false_acceptance(unknown[0], decisions.present)
                cost = decisions.average_cost(false_acceptance=accepted)
        open_set = score_rejection(threshold, origin, confidences, right, outside, names, cost)
    return Assessment(
        scores=scores,
        equal_error_rate=None if trials is None else trials.equal_error_rate(),
        per_class_error_rate={name: None if np.isnan(rate) else rate for name, rate in per_class.items()},
        average_cost=None if decisions is None else decisions.average_cost(),
        log_loss=float(losses.mean()),
        reliability=reliability(confidences, right),
        intervals=intervals,
        drawn=drawn,
        per_duration=_by_duration(seconds, reference, right),
        per_speaker=_by(speakers, reference, right),
        open_set=open_set,
        temperature=temperature,
    )


def write_assessment(assessment: Assessment, folder: Path, description: str, **more: object) -> None:
    """Writes eval_results.json, evaluation.txt, confusion_matrix.png and reliability.png, atomically.

    Args:
        assessment: what to write. folder: where; made as needed. description: what was scored.
        more: further entries of the JSON file.
    """
    scores = assessment.scores
    write_json(folder / "eval_results.json", {"data": description, **more, **assessment.as_dict()})
    write_text(folder / "evaluation.txt", assessment.as_text(whole=True) + "\n")
    title = f"accuracy {scores.accuracy:.1%}, {scores.count} examples"
    plots.plot_confusion(scores.confusion, scores.labels, folder / "confusion_matrix.png", title)
    bins = assessment.reliability
    plots.plot_reliability(bins, folder / "reliability.png", f"ECE {bins.error:.1%}, {scores.count} examples")


def _mean_class_accuracy(reference: np.ndarray, right: np.ndarray, weights: np.ndarray | None) -> float:
    """Over the classes that there are clips of; ``weights``: how often each counts."""
    count = np.bincount(reference, weights)
    there = count > 0
    hits = np.bincount(reference, right if weights is None else right * weights)
    return float((hits[there] / count[there]).mean())


def _of_clips(
    reference: np.ndarray, right: np.ndarray, losses: np.ndarray, decisions: Decisions | None
) -> dict[str, Callable[[np.ndarray], float]]:
    """What can be said of clips that count so often, (N,); not the ECE, which a draw's repetitions raise."""
    found = {
        "accuracy": lambda often: float((often * right).sum() / often.sum()),
        "mean_class_accuracy": lambda often: _mean_class_accuracy(reference, right, often),
        "log_loss": lambda often: float((often * losses).sum() / often.sum()),
    }
    return found if decisions is None else found | {"cavg": decisions.average_cost}


def _intervals(
    speakers: Sequence[str | None],
    of_clips: dict[str, Callable[[np.ndarray], float]],
    trials: Trials | None,
    others: int,
) -> tuple[dict[str, tuple[float, float] | None], str]:
    """95 % intervals by name, and of what; ``others``: trials of a clip beside that of its class."""
    groups, drawn = groups_of(speakers)
    number = int(groups.max()) + 1
    values: dict[str, list[float]] = {name: [] for name in of_clips}
    for times in times_drawn(number):
        for row in times:
            often = row[groups].astype(float)
            for name, statistic in of_clips.items():
                values[name].append(statistic(often))
    intervals = {name: ends(each) for name, each in values.items()}
    size = len(groups) * (others + 1)
    if trials is not None and size <= _MOST_TRIALS:
        rates = []
        for times in times_drawn(number, min(DRAWS, max(_FEWEST_DRAWS, _TRIALS_OF_ALL_DRAWS // size))):
            for row in times:
                often = row[groups].astype(float)
                rates.append(trials.equal_error_rate(np.concatenate([often, np.repeat(often, others)])))
        intervals["eer"] = ends(rates)
    return intervals, drawn


def _by(
    names: Sequence[str | None], reference: np.ndarray, right: np.ndarray, order: Sequence[str] | None = None
) -> dict[str, Part]:
    """The clips of each name but None; ``order``: of the names, else by the alphabet."""
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name is not None:
            members.setdefault(name, []).append(index)
    known = sorted(members) if order is None else [name for name in order if name in members]
    return {name: Part.of(reference[members[name]], right[members[name]]) for name in known}


def _by_duration(
    seconds: Sequence[float | None] | None, reference: np.ndarray, right: np.ndarray
) -> dict[str, Part]:
    """The clips of like length; a length that is one of ``DURATIONS`` belongs to the shorter ones."""
    shown = [f"{each:g}" for each in DURATIONS]
    between = [f"{low} to {high} s" for low, high in zip(shown, shown[1:])]
    names = [f"up to {shown[0]} s", *between, f"over {shown[-1]} s"]
    unknown = "unknown length"
    seconds = [None] * len(reference) if seconds is None else seconds
    place = [unknown if s is None else names[int(np.searchsorted(DURATIONS, s))] for s in seconds]
    return _by(place, reference, right, [*names, unknown])
