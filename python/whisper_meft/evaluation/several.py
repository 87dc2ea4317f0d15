"""Several trained models that classify, on one pass of the encoder that they share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.examples import Example, ExampleSet
from ..errors import UserError
from ..model.multi_head import MultiHead
from ..options.inference import InferenceArguments
from .classifier import NOT_FINITE, Classifying
from .loaded import extractor_of, load_trained, usable_device
from .timeline import answer_of, softmax

# What decides about the log-mel that a feature extractor makes.
_MAKES = ("feature_size", "sampling_rate", "hop_length", "n_fft", "n_samples", "dither", "padding_value")


class SeveralClassifiers(Classifying):
    """Trained models with the feature extractor that they share, ready to classify examples.

    Args:
        model: the trained models. names: what each is called, no two alike. The others are those of
            :class:`whisper_meft.evaluation.classifier.Classifier`.

    Attributes:
        labels: the classes of each model.

    Raises:
        UserError: windows that the models do not hear whole, or that leave sound out.
    """

    def __init__(
        self,
        model: MultiHead,
        names: Sequence[str],
        feature_extractor: Any,
        window: float | str | None = None,
        hop: float | None = None,
        **options: Any,
    ):
        super().__init__(model, feature_extractor, **options)
        configs = [each.config for each in model.models]
        self.names, self.configs = list(names), configs
        self.labels = [[config.id2label[i] for i in range(config.num_labels)] for config in configs]
        self.classes = [config.num_labels for config in configs]
        self.max_frames = model.models[0].meft_config.max_frames
        self.windows = self.windows_of(window, hop)

    @classmethod
    def load(
        cls, model_dirs: Sequence[str], arguments: InferenceArguments, progress: bool = True
    ) -> "SeveralClassifiers":
        """Loads the models in ``model_dirs`` (folders, or names on the hub).

        Raises:
            UserError: a model, a backbone or a feature extractor cannot be loaded, or they cannot share a
                pass.
        """
        names = names_of(model_dirs)
        device = usable_device(arguments.device)
        model = load_trained(MultiHead, model_dirs, arguments, device)
        max_frames, named = model.models[0].meft_config.max_frames, arguments.feature_extractor_name
        extractors = []
        for where, each in zip(model_dirs, model.models):
            extractors.append(extractor_of(where, named, each.config, max_frames))
            for key in _MAKES:
                one, other = (getattr(extractor, key, None) for extractor in (extractors[0], extractors[-1]))
                if one != other:
                    raise UserError(
                        f"{model_dirs[0]} and {where} cannot share a pass: {key} of the feature extractor is "
                        f"{one} for the one and {other} for the other; name one with feature_extractor_name "
                        "(--feature_extractor_name), or run them one by one"
                    )
        options = {"device": device, "batch_size": arguments.batch_size, "progress": progress}
        options |= {"window": arguments.window, "hop": arguments.hop}
        return cls(model, names, extractors[0], num_workers=arguments.num_workers, **options)

    def logits(self, examples: ExampleSet) -> list[np.ndarray]:
        """What each model's softmax is taken of, float32 (N, K), rows in the order of ``examples``; of
        recordings longer than a window the log of their probabilities.

        Raises:
            UserError: an example cannot be read.
        """
        return np.split(self.answers(examples), np.cumsum(self.classes)[:-1], axis=1)


def names_of(model_dirs: Sequence[str]) -> list[str]:
    """What models are called: the last parts of their paths, as many as tell them apart.

    Raises:
        UserError: one is named twice.
    """
    parts = [Path(model).parts if Path(model).parts else (".",) for model in model_dirs]
    resolved = [Path(model).resolve() if Path(model).exists() else model for model in model_dirs]
    for index, where in enumerate(resolved):
        if where in resolved[:index]:
            raise UserError(f"--model {model_dirs[index]} is named twice")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names) and not {".", ".."} & set(names):
            return names
    return [str(where) for where in resolved]


def predict_several(
    classifiers: SeveralClassifiers,
    files: Sequence[str],
    reject_below: Sequence[float | None],
    reject_label: str = "unknown",
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """As :func:`whisper_meft.evaluation.classifier.predict`, by several models.

    Args:
        reject_below: a threshold for each model, or None.

    Returns:
        one {"file", "models": {name: {"label", "probabilities", ...}}} per readable file, in order; and
        (file, reason) of the unreadable ones, and of those for which a model gives no finite output.

    Raises:
        UserError: not one file is readable.
    """
    examples = ExampleSet([Example(audio=file, name=file) for file in files], "the files to classify")
    # The error of a single file says it all; of several the good ones are answered.
    good, bad = classifiers.check(examples, strict=len(examples) == 1)
    probabilities = [softmax(each) for each in classifiers.logits(good)]
    rows = []
    for index, example in enumerate(good):
        answers = {
            name: answer_of(found[index], labels, threshold, reject_label)
            for name, found, labels, threshold in zip(
                classifiers.names, probabilities, classifiers.labels, reject_below
            )
        }
        if silent := [name for name, answer in answers.items() if answer is None]:
            bad.append((example.name, f"{silent[0]}: {NOT_FINITE}"))
        else:
            rows.append({"file": example.name, "models": answers})
    if not rows:
        raise UserError(f"no file could be classified; {bad[0][0]}: {bad[0][1]}")
    return rows, bad
