"""A trained model that classifies: the inference loop of predicting and scoring."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..audio.windows import Windows
from ..data.examples import Example, ExampleSet
from ..data.windows import longest_window
from ..errors import UserError
from ..model.module import MeftModel
from ..options.inference import InferenceArguments
from .loaded import LoadedModel, extractor_of, load_trained, usable_device
from .timeline import Timeline, WindowLogits, answer_of, softmax


class Classifying(LoadedModel):
    """What one model and several on one pass have in common: how examples of any length are answered.

    Attributes:
        max_frames: what the models hear. windows: those that longer recordings are heard in; None: the first.
        classes: the number K of each model's classes. A row of :meth:`answers` has those of all side by side.
    """

    max_frames: int | str
    windows: Windows | None
    classes: Sequence[int]

    def windows_of(self, window: float | str | None, hop: float | None) -> Windows | None:
        """The windows that the arguments of these names mean for these models.

        Raises:
            UserError: windows that they do not hear whole, or that leave sound out.
        """
        if window == "first":
            return None
        longest = longest_window(self.feature_extractor, self.max_frames)
        return Windows.within(longest, window, hop, overlap=0.5)

    def answers(
        self,
        examples: ExampleSet,
        windows: Windows | None = None,
        done: Callable[[int, WindowLogits], None] | None = None,
    ) -> np.ndarray:
        """Logits of all examples, float32 (N, K of all models); of recordings longer than a window the log of
        their probabilities.

        Args:
            windows: by default those that the models hear.
            done: called with the index of each recording that is longer than a window and what its windows
                gave, the moment they are there, in any order.

        Raises:
            UserError: an example cannot be read.
        """
        windows = windows or self.windows
        if windows is None:
            return self._plain(examples)
        if any(example.seconds is None and not example.has_features for example in examples):
            examples, _ = self.check(examples, strict=True)
        is_long = np.array([not each.has_features and windows.needed(each.seconds) for each in examples])
        if not is_long.any():
            return self._plain(examples)
        short, long = np.flatnonzero(~is_long), np.flatnonzero(is_long)
        logits = np.empty((len(examples), sum(self.classes)), np.float32)
        if len(short):
            logits[short] = self._plain(examples.select(short))
        recordings = examples.select(long)
        for number, *given in self.over_windows(recordings, windows, self.max_frames, self._of_batch):
            found = WindowLogits.of(*given, windows, recordings[number].seconds)
            logits[long[number]] = found.pooled(self.classes)
            if done is not None:
                done(int(long[number]), found)
        return logits

    def _plain(self, examples: ExampleSet) -> np.ndarray:
        """Rows of examples of which no more than the models' window is heard."""
        order, loader = self.batches(examples, self.max_frames, self.max_frames != "fidelity")
        bar = tqdm(loader, desc="classifying", unit="batch", disable=not self.progress)
        rows = [self._of_batch(batch) for batch in bar]
        return np.concatenate(rows)[np.argsort(order)]

    def _of_batch(self, batch: dict[str, torch.Tensor]) -> np.ndarray:
        """float32 (B, K of all models)."""
        with torch.inference_mode():
            outputs = self.model(**{name: value.to(self.device) for name, value in batch.items()})
        each = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        return torch.cat([output.logits.float() for output in each], dim=1).cpu().numpy()


class Classifier(Classifying):
    """A trained model with its feature extractor, ready to classify examples.

    Args:
        model: trained model; is put into evaluation mode on ``device``.
        feature_extractor: the one it was trained with.
        device: torch device; default a GPU if there is one.
        batch_size: clips per batch.
        num_workers: processes that read audio; 0 reads in this one.
        progress: show progress bars.
        window, hop: seconds of the windows that longer recordings are heard in, and from the beginning of one
            to that of the next; by default as many as the model hears, and half of them. "first" hears the
            beginning of longer recordings alone, as training without windows does.

    Raises:
        UserError: windows that the model does not hear whole, or that leave sound out.
    """

    def __init__(
        self,
        model: MeftModel,
        feature_extractor: Any,
        device: str | torch.device | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        progress: bool = True,
        window: float | str | None = None,
        hop: float | None = None,
    ):
        super().__init__(model, feature_extractor, device, batch_size, num_workers, progress)
        self.max_frames = model.meft_config.max_frames
        self.windows = self.windows_of(window, hop)
        names = model.config.id2label
        self.labels = [names[index] for index in range(model.config.num_labels)]
        self.classes = [len(self.labels)]

    @classmethod
    def load(
        cls, model_dir: str | Path, arguments: InferenceArguments, progress: bool = True
    ) -> "Classifier":
        """Loads the model in ``model_dir`` (a folder, or a name on the hub).

        Raises:
            UserError: model, backbone or feature extractor cannot be loaded or do not fit each other.
        """
        device = usable_device(arguments.device)
        model = load_trained(MeftModel, model_dir, arguments, device)
        named, max_frames = arguments.feature_extractor_name, model.meft_config.max_frames
        extractor = extractor_of(model_dir, named, model.config, max_frames)
        sizes = arguments.batch_size, arguments.num_workers, progress
        return cls(model, extractor, device, *sizes, arguments.window, arguments.hop)

    def probabilities(self, examples: ExampleSet) -> np.ndarray:
        """Class probabilities, float32 (N, K), rows in the order of ``examples``; NaN where the model's
        output was not finite. Of recordings longer than a window those of all their windows together, see
        :func:`.timeline.pool`.

        Raises:
            UserError: an example cannot be read.
        """
        return softmax(self.logits(examples))

    def logits(self, examples: ExampleSet) -> np.ndarray:
        """What the model's softmax is taken of, as :meth:`probabilities`; of recordings longer than a window
        the log of their probabilities."""
        return self.answers(examples)

    def segments(self, audio: Any, window: float | None = None, hop: float | None = None) -> Timeline:
        """What the model says of one recording over time, and of all of it.

        An hour takes no more memory than a minute: it is decoded, cut and classified as it goes. The answer
        for the whole is that of :meth:`probabilities`, and so is the one segment of a recording that is not
        longer than a window.

        Args:
            audio: anything that :func:`whisper_meft.audio.read_audio` reads, or an ``Example``; one of known
                length is not decoded to find it.
            window, hop: see the class; by default this classifier's. They begin every ``hop`` seconds; the
                last one ends with the recording. A rest of at most 0.1 seconds has none.

        Raises:
            UserError: the audio cannot be read; windows that the model does not hear whole; the model's
                output is NaN or infinite.
        """
        example = audio if isinstance(audio, Example) else Example(audio)
        examples = ExampleSet([example], "the recording")
        if example.seconds is None:
            examples, _ = self.check(examples, strict=True)
        given = window is not None or hop is not None or self.windows is None
        if window is None and self.windows is not None:
            window = self.windows.length
        windows = self.windows_of(window, hop) if given else self.windows
        parts: dict[int, WindowLogits] = {}
        logits = self.answers(examples, windows, parts.__setitem__)
        if not np.isfinite(logits).all():
            raise UserError(f"the model's output for {example.name} is NaN or infinite")
        return self.timeline(examples[0].seconds, logits[0], parts.get(0))

    def timeline(self, seconds: float | None, logits: np.ndarray, parts: WindowLogits | None) -> Timeline:
        """What :meth:`answers` says of a recording of so many seconds, in words; ``parts``: its windows,
        where it has several."""
        heard = longest_window(self.feature_extractor, self.max_frames)
        return Timeline.of(self.labels, heard if seconds is None else seconds, logits, parts, heard)


NOT_FINITE = "the model's output for it is NaN or infinite"


def predict(
    classifier: Classifier,
    files: Sequence[str],
    reject_below: float | None = None,
    reject_label: str = "unknown",
    done: Callable[[str, Timeline], None] | None = None,
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Classifies audio files; those that cannot be read do not stop the others.

    Args:
        reject_below: a clip whose most probable class has a lower probability gets the label
            ``reject_label`` instead.
        done: called with each file and what is said of it over time, in order.

    Returns:
        one {"file", "label", "probabilities": {label: p}} per readable file, in order, with a threshold also
        "rejected"; and (file, reason) of the unreadable ones.

    Raises:
        UserError: not one file is readable.
    """
    examples = ExampleSet([Example(audio=file, name=file) for file in files], "the files to classify")
    # The error of a single file says it all; of several the good ones are answered.
    good, bad = classifier.check(examples, strict=len(examples) == 1)
    parts: dict[int, WindowLogits] = {}
    logits = classifier.answers(good, done=None if done is None else parts.__setitem__)
    rows = []
    for index, (example, row) in enumerate(zip(good, softmax(logits))):
        answer = answer_of(row, classifier.labels, reject_below, reject_label)
        if answer is None:
            bad.append((example.name, NOT_FINITE))
            continue
        rows.append({"file": example.name, **answer})
        if done is not None:
            done(example.name, classifier.timeline(example.seconds, logits[index], parts.pop(index, None)))
    if not rows:
        raise UserError(f"no file could be classified; {bad[0][0]}: {bad[0][1]}")
    return rows, bad
