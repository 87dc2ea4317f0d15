"""What a model says of one recording that somebody sends: within limits, in a sentence where it cannot."""

import os
from dataclasses import dataclass, replace

import numpy as np

from ..audio import read_window
from ..data.examples import Example, ExampleSet
from ..errors import UserError, printable
from ..evaluation.classifier import Classifier
from ..evaluation.generating import Transcript
from ..evaluation.timeline import Timeline
from ..evaluation.transcriber import Transcriber

_LOOKED_AT = 60.0  # seconds in which a microphone that was off is recognised
_SILENT = 2.0**-15  # the least that 16 bits hold


@dataclass(frozen=True)
class Classified:
    """What a classifier says of a recording.

    Attributes:
        timeline: its classes over time, and of the whole.
        label: the answer; that of rejecting where the most probable class is not probable enough.
        threshold: the probability below which it is, or None.
    """

    timeline: Timeline
    label: str
    threshold: float | None = None

    @property
    def rejected(self) -> bool:
        """Whether no class is probable enough."""
        return not self.is_enough(self.timeline.probabilities.max())

    def is_enough(self, probability: float) -> bool:
        """Whether a class of this probability is said."""
        return self.threshold is None or float(probability) >= self.threshold


@dataclass(frozen=True)
class Transcribed:
    """What a model that transcribes says of a recording of so many seconds."""

    seconds: float
    transcript: Transcript


class Listener:
    """A model that hears one recording after the other.

    Args:
        model: a :class:`.classifier.Classifier` or a :class:`.transcriber.Transcriber`.
        max_seconds: longer recordings are refused.
        reject_below: a recording whose most probable class has a lower probability gets ``reject_label``.
    """

    def __init__(
        self,
        model: Classifier | Transcriber,
        max_seconds: float = 600.0,
        reject_below: float | None = None,
        reject_label: str = "none of these",
    ):
        self.model, self.max_seconds = model, max_seconds
        self.reject_below, self.reject_label = reject_below, reject_label
        self.transcribes = isinstance(model, Transcriber)

    def hear(self, path: str | os.PathLike) -> Classified | Transcribed:
        """The answer for an audio file.

        Raises:
            UserError: it cannot be read, is longer than accepted or silent, or the model's output is not
                finite; the message names the file without its folder.
        """
        path = os.fsdecode(path)
        name = printable(os.path.basename(path))
        try:
            example = Example(audio=path, name=name, seconds=self._length(path, name))
            return self._transcribe(example) if self.transcribes else self._classify(example)
        except UserError as error:
            # What a library says may name the copy that was sent and the folder that it is in.
            raise UserError(str(error).replace(path, name)) from error

    def _length(self, path: str, name: str) -> float:
        """Of a recording that can be heard to its end, in seconds; no more of it is decoded than accepted."""
        rate, most = self.model.feature_extractor.sampling_rate, self.max_seconds
        wave, seconds = read_window(path, rate, stop=most + 1, name=name, longest=_LOOKED_AT, whole=True)
        if seconds > most + 0.01:
            raise UserError(f"{name} is longer than {duration(most)}, the most that this page hears")
        if seconds <= _LOOKED_AT and float(np.abs(wave).max()) < _SILENT:
            raise UserError(f"{name} holds nothing but silence: is the microphone on?")
        return seconds

    def _classify(self, example: Example) -> Classified:
        timeline = self.model.segments(example)
        found = Classified(timeline, timeline.label, self.reject_below)
        return replace(found, label=self.reject_label) if found.rejected else found

    def _transcribe(self, example: Example) -> Transcribed:
        (transcript,), bad = self.model.transcribe(ExampleSet([example], example.name))
        if transcript is None:
            raise UserError(f"{example.name}: {bad[0][1]}")
        return Transcribed(example.seconds, transcript)


def duration(seconds: float) -> str:
    """A length for people: "90 seconds", "10 minutes"."""
    if seconds < 120 and seconds % 60:
        return f"{seconds:g} second{'s'[: seconds != 1]}"
    return f"{seconds / 60:g} minute{'s'[: seconds != 60]}"
