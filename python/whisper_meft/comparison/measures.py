"""What methods are compared by: how right their classes are, or their transcripts."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel, WhisperForAudioClassification, WhisperForConditionalGeneration

from ..training.results import TrainResult


class Measure:
    """The scores of a task.

    Attributes:
        base_class: transformers' Whisper model of the task.
        key: the score that decides, by its name in a method's row; higher_is_better: which way.
        title: what it is called; column: on test data, in the table; second: (key, column) of another.
    """

    base_class: ClassVar[type[PreTrainedModel]]
    key: ClassVar[str]
    higher_is_better: ClassVar[bool]
    title: ClassVar[str]
    column: ClassVar[str]
    second: ClassVar[tuple[str, str]]

    def validation(self, outcome: TrainResult) -> dict[str, float]:
        """What a run's result holds of its validation scores."""
        raise NotImplementedError

    def quality(self, run: dict[str, Any]) -> tuple[float, ...]:
        """By which the best of several runs is chosen, the highest; of equal scores the loss decides."""
        sign = 1 if self.higher_is_better else -1
        return sign * run[f"validation_{self.key}"], -run["validation_loss"]

    def said(self, run: dict[str, Any]) -> str:
        """A run's validation score in a few words."""
        raise NotImplementedError

    def of_test(self, tests: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The entries of a method's row from the test scores of its seeds."""
        raise NotImplementedError


class ClassMeasure(Measure):
    """Accuracy of classes."""

    base_class = WhisperForAudioClassification
    key, higher_is_better = "accuracy", True
    title, column = "accuracy", "accuracy, test"
    second = ("mean_class_accuracy", "mean of classes")

    def validation(self, outcome: TrainResult) -> dict[str, float]:
        return {"validation_accuracy": outcome.scores.accuracy}

    def said(self, run: dict[str, Any]) -> str:
        return f"{run['validation_accuracy']:.1%} of the validation clips"

    def of_test(self, tests: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = ("accuracy", "mean_class_accuracy")
        return {name: spread([test[name] for test in tests]) for name in names}


class TranscriptMeasure(Measure):
    """Errors of transcripts, after Whisper's normaliser and as written."""

    base_class = WhisperForConditionalGeneration
    key, higher_is_better = "wer", False
    title, column = "word error rate", "WER, test"
    second = ("cer", "CER, test")

    def validation(self, outcome: TrainResult) -> dict[str, float]:
        return {"validation_wer": outcome.scores.scores.normalized_wer.rate}

    def said(self, run: dict[str, Any]) -> str:
        return f"WER {run['validation_wer']:.1%} on the validation clips"

    def of_test(self, tests: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = {"wer": "normalized_wer", "cer": "normalized_cer"}
        names |= {"wer_as_written": "wer", "cer_as_written": "cer"}
        nan = float("nan")  # where no reference has a word
        rates = {name: [test[scored]["rate"] for test in tests] for name, scored in names.items()}
        return {name: spread([nan if r is None else r for r in each]) for name, each in rates.items()}


MEASURES: dict[str, Measure] = {"classify": ClassMeasure(), "transcribe": TranscriptMeasure()}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (of the sample; None for a single value) and the values themselves."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation, "values": [float(value) for value in values]}
